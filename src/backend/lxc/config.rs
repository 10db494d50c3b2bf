//! What LXC is told of an OCI bundle: its namespaces, cgroups and device rules, as items of lxc.container.conf(5). Pure.
//!
//! LXC gets no root file system. It makes the namespaces and the cgroups, moves init there, answers `lxc-info`, `lxc-attach` and
//! `lxc-stop`, and tells the exit; all that OCI says of the inside (mounts, devices, process) is done by init itself before it
//! becomes the user's program. What LXC has keys for is too little for that (docs/decisions/0018).

use std::{collections::BTreeSet, path::Path};

use oci_spec::runtime::{Linux, LinuxDeviceCgroup, LinuxDeviceType, LinuxIdMapping, LinuxNamespaceType};

use super::system::Init;
use crate::error::{Error, Result};

/// An item of lxc.container.conf(5).
pub type Item = (String, String);

/// Where the cgroups of a container lie, as paths below the root of each hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The container's, with its limits.
    pub container: String,
    /// The name of a cgroup in it that holds the processes, so that the container cannot change its own limits.
    pub inner: Option<String>,
    /// The one of the process that waits for init.
    pub monitor: String,
    /// Where that process goes in the end, to remove the other two.
    pub pivot: String,
}

/// What is true of this machine and this container, beside the bundle.
#[derive(Debug, Clone)]
pub struct Place<'a> {
    /// Where the cgroups lie.
    pub layout: &'a Layout,
    /// Whether cgroup v2 speaks.
    pub v2: bool,
    /// Whether the kernel has time namespaces: where it has none, liblxc goes on without.
    pub time: bool,
    /// The init of a whole system, if it is one.
    pub system: Option<Init>,
}

/// Devices that every container may use, and that it may make nodes of any: what crun adds to each list of rules.
const DEFAULT_DEVICES: [&str; 12] = [
    "c *:* m",
    "b *:* m",
    "c 1:3 rwm",
    "c 1:8 rwm",
    "c 1:7 rwm",
    "c 5:0 rwm",
    "c 1:5 rwm",
    "c 1:9 rwm",
    "c 5:1 rwm",
    "c 136:* rwm",
    "c 5:2 rwm",
    "c 10:200 rwm",
];

/// In a second.
const NANOSECONDS: i64 = 1_000_000_000;

/// The items for `linux` of a bundle, in their order.
///
/// # Errors
/// `InvalidArgument` with the field that LXC cannot do, or that contradicts itself.
pub fn items(linux: &Linux, place: &Place<'_>) -> Result<Vec<Item>> {
    let mut items = Items(Vec::new());
    // LXC's own devices, terminals and confinement: all of that is init's.
    items.add("lxc.autodev", "0");
    items.add("lxc.tty.max", "0");
    items.add("lxc.pty.max", "0");
    items.add("lxc.console.path", "none");
    items.add("lxc.apparmor.profile", "unconfined");
    // For `lxc-stop`.
    items.add(
        "lxc.signal.halt",
        place.system.map_or("SIGTERM", Init::halt_signal_name),
    );
    items.namespaces(linux, place.time)?;
    items.cgroups(place)?;
    let rules = linux
        .resources()
        .as_ref()
        .and_then(|resources| resources.devices().as_ref());
    items.devices(rules.map_or(&[], Vec::as_slice), place.v2)?;
    Ok(items.0)
}

struct Items(Vec<Item>);

impl Items {
    fn add(&mut self, key: impl Into<String>, value: impl Into<String>) {
        self.0.push((key.into(), value.into()));
    }

    fn namespaces(&mut self, linux: &Linux, time: bool) -> Result<()> {
        let mut seen = BTreeSet::new();
        let mut new = Vec::new();
        let mut shared = Vec::new();
        for namespace in linux.namespaces().iter().flatten() {
            let name = name(namespace.typ());
            if !seen.insert(name) {
                return Err(Error::invalid(format!("linux.namespaces: {name} is there twice")));
            }
            match namespace.path() {
                Some(path) if !path.as_os_str().is_empty() => {
                    shared.push((name, value("linux.namespaces.path", path)?))
                }
                _ => new.push(name),
            }
        }
        if !new.contains(&"mnt") {
            return Err(Error::invalid(
                "linux.namespaces: an LXC container has a mount namespace of its own, which this bundle does not ask for",
            ));
        }
        self.add("lxc.namespace.clone", new.join(" "));
        for (name, path) in shared {
            self.add(format!("lxc.namespace.share.{name}"), path);
        }
        match (new.contains(&"net"), seen.contains("net")) {
            (true, _) => {
                self.add("lxc.net.0.type", "empty");
                // With the loopback device up, as other runtimes leave it: 127.0.0.1 works without a network.
                self.add("lxc.net.0.flags", "up");
            }
            (_, false) => self.add("lxc.net.0.type", "none"),
            _ => {}
        }
        self.users(linux, seen.contains("user"))?;
        if new.contains(&"time") && !time {
            return Err(Error::invalid(
                "linux.namespaces: this kernel has no time namespaces (CONFIG_TIME_NS)",
            ));
        }
        self.time(linux, new.contains(&"time"))
    }

    /// Of a namespace that is joined LXC has to be told the maps too, or it does not become root in it.
    fn users(&mut self, linux: &Linux, mapped: bool) -> Result<()> {
        let maps = [
            ("u", "uidMappings", linux.uid_mappings()),
            ("g", "gidMappings", linux.gid_mappings()),
        ];
        for (kind, field, map) in maps {
            let map: &[LinuxIdMapping] = map.as_deref().unwrap_or_default();
            match (mapped, map.is_empty()) {
                (true, true) => {
                    return Err(Error::invalid(format!(
                        "linux.{field} is empty, and a user namespace needs it; where the namespace is joined by path, put its maps here"
                    )));
                }
                (false, false) => {
                    return Err(Error::invalid(format!(
                        "linux.{field} needs a user namespace in linux.namespaces"
                    )));
                }
                _ => {}
            }
            for range in map {
                let (inside, outside, size) = (range.container_id(), range.host_id(), range.size());
                self.add("lxc.idmap", format!("{kind} {inside} {outside} {size}"));
            }
        }
        Ok(())
    }

    fn time(&mut self, linux: &Linux, new: bool) -> Result<()> {
        let offsets = linux.time_offsets().iter().flatten();
        let mut offsets: Vec<_> = offsets.collect();
        offsets.sort_by_key(|(clock, _)| clock.as_str());
        for (clock, offset) in offsets {
            let key = match clock.as_str() {
                "boottime" => "lxc.time.offset.boot",
                "monotonic" => "lxc.time.offset.monotonic",
                other => {
                    return Err(Error::invalid(format!(
                        "linux.timeOffsets: {other:?} is neither boottime nor monotonic"
                    )));
                }
            };
            if !new {
                return Err(Error::invalid(
                    "linux.timeOffsets needs a new time namespace in linux.namespaces",
                ));
            }
            let wrong = |why: &str| format!("linux.timeOffsets.{clock}: {why}");
            let below = i64::from(offset.nanosecs().unwrap_or_default());
            let (more, nanoseconds) = (below / NANOSECONDS, below % NANOSECONDS);
            let Some(seconds) = offset.secs().unwrap_or_default().checked_add(more) else {
                return Err(Error::invalid(wrong("out of range")));
            };
            // LXC hands the kernel either number with a 0 for the other.
            let value = match (seconds, nanoseconds) {
                (0, 1..) => format!("{nanoseconds}ns"),
                (_, 0) => format!("{seconds}s"),
                _ => {
                    return Err(Error::invalid(wrong(
                        "the backend lxc takes whole seconds, or less than one; leave nanosecs out, or use the backend crun",
                    )));
                }
            };
            self.add(key, value);
        }
        Ok(())
    }

    fn cgroups(&mut self, place: &Place<'_>) -> Result<()> {
        // The paths are those of the hierarchy, not of the cgroup that the shim happens to be in.
        self.add("lxc.cgroup.relative", "0");
        let layout = place.layout;
        self.add("lxc.cgroup.dir.container", cgroup(&layout.container)?);
        if let Some(inner) = &layout.inner {
            self.add("lxc.cgroup.dir.container.inner", cgroup(inner)?);
        }
        self.add("lxc.cgroup.dir.monitor", cgroup(&layout.monitor)?);
        self.add("lxc.cgroup.dir.monitor.pivot", cgroup(&layout.pivot)?);
        Ok(())
    }

    fn devices(&mut self, rules: &[LinuxDeviceCgroup], v2: bool) -> Result<()> {
        // Without rules all is allowed, as with crun.
        if rules.is_empty() {
            return Ok(());
        }
        let version = if v2 { "cgroup2" } else { "cgroup" };
        for (number, rule) in rules.iter().enumerate() {
            let verb = if rule.allow() { "allow" } else { "deny" };
            for value in device(rule).map_err(|e| e.context(format!("linux.resources.devices[{number}]")))? {
                self.add(format!("lxc.{version}.devices.{verb}"), value);
            }
        }
        for rule in DEFAULT_DEVICES {
            self.add(format!("lxc.{version}.devices.allow"), rule);
        }
        Ok(())
    }
}

/// Whether the bundle asks for a namespace of this kind, new or by path.
pub(super) fn has_namespace(linux: &Linux, kind: LinuxNamespaceType) -> bool {
    linux
        .namespaces()
        .iter()
        .flatten()
        .any(|namespace| namespace.typ() == kind)
}

/// LXC's name of a namespace.
fn name(kind: LinuxNamespaceType) -> &'static str {
    match kind {
        LinuxNamespaceType::Mount => "mnt",
        LinuxNamespaceType::Cgroup => "cgroup",
        LinuxNamespaceType::Uts => "uts",
        LinuxNamespaceType::Ipc => "ipc",
        LinuxNamespaceType::User => "user",
        LinuxNamespaceType::Pid => "pid",
        LinuxNamespaceType::Network => "net",
        LinuxNamespaceType::Time => "time",
    }
}

/// A path as a value: LXC reads a line.
fn value(field: &str, path: &Path) -> Result<String> {
    match path.to_str() {
        Some(text) if path.is_absolute() && !text.contains(char::is_control) && text.trim() == text => {
            Ok(text.to_owned())
        }
        _ => Err(Error::invalid(format!(
            "{field}: {} cannot be given to LXC; it has to be absolute, in UTF-8, without line breaks and without blanks at its ends",
            path.display()
        ))),
    }
}

/// A path below the root of the hierarchies.
fn cgroup(path: &str) -> Result<String> {
    let relative = crate::host::cgroup::parse::relative(path)?;
    match relative.to_str() {
        // LXC takes blanks and quotes at the ends of a value away, and would use another's cgroup.
        Some(text)
            if !text.is_empty()
                && !text.contains(char::is_control)
                && text.trim() == text
                && !text.starts_with(['"', '\'']) =>
        {
            Ok(text.to_owned())
        }
        _ => Err(Error::invalid(format!(
            "{path:?} cannot be given to LXC as a container's cgroup; it needs a name, without line breaks, and without blanks or \
             quotes at its ends"
        ))),
    }
}

/// The lines of one rule in the kernel's form. A rule for all devices is one for each type, unless it is for all that one can do.
fn device(rule: &LinuxDeviceCgroup) -> Result<Vec<String>> {
    let access = rule
        .access()
        .as_deref()
        .filter(|access| !access.is_empty())
        .unwrap_or("rwm");
    let letters: BTreeSet<char> = access.chars().collect();
    if !letters.iter().all(|letter| "rwm".contains(*letter)) || letters.len() != access.len() {
        return Err(Error::invalid(format!("access {access:?} is not made of r, w and m")));
    }
    let number = |number: Option<i64>, what: &str| match number {
        None | Some(-1) => Ok("*".to_owned()),
        Some(number @ 0..=4_294_967_295) => Ok(number.to_string()),
        Some(number) => Err(Error::invalid(format!("{what} {number} is out of range"))),
    };
    let (major, minor) = (number(rule.major(), "major")?, number(rule.minor(), "minor")?);
    let types: &[&str] = match rule.typ() {
        Some(LinuxDeviceType::B) => &["b"],
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => &["c"],
        None | Some(LinuxDeviceType::A) if letters.len() == 3 && major == "*" && minor == "*" => {
            return Ok(vec!["a".into()]);
        }
        None | Some(LinuxDeviceType::A) => &["b", "c"],
        Some(LinuxDeviceType::P) => return Err(Error::invalid("type p: a fifo is no device of a cgroup")),
    };
    Ok(types
        .iter()
        .map(|kind| format!("{kind} {major}:{minor} {access}"))
        .collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::error::Kind;

    fn layout() -> Layout {
        Layout {
            container: "/lxc/c1".into(),
            inner: None,
            monitor: "lxc.monitor/c1".into(),
            pivot: "lxc.pivot/c1".into(),
        }
    }

    fn mapped(linux: Value, layout: &Layout, v2: bool) -> Result<Vec<String>> {
        let linux: Linux = serde_json::from_value(linux).unwrap();
        let place = Place {
            layout,
            v2,
            time: true,
            system: None,
        };
        let items = items(&linux, &place)?;
        Ok(items
            .into_iter()
            .map(|(key, value)| format!("{key} = {value}"))
            .collect())
    }

    /// The items that are not the same for every container.
    fn own(linux: Value) -> Vec<String> {
        let always = mapped(json!({"namespaces": [{"type": "mount"}]}), &layout(), true).unwrap();
        let items = mapped(linux, &layout(), true).unwrap();
        items.into_iter().filter(|item| !always.contains(item)).collect()
    }

    fn refused(linux: Value) -> String {
        let error = mapped(linux, &layout(), true).unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument, "{error}");
        error.to_string()
    }

    #[test]
    fn lxc_touches_nothing_inside_the_container() {
        let items = mapped(json!({"namespaces": [{"type": "mount"}]}), &layout(), true).unwrap();
        assert_eq!(
            items,
            [
                "lxc.autodev = 0",
                "lxc.tty.max = 0",
                "lxc.pty.max = 0",
                "lxc.console.path = none",
                "lxc.apparmor.profile = unconfined",
                "lxc.signal.halt = SIGTERM",
                "lxc.namespace.clone = mnt",
                "lxc.net.0.type = none",
                "lxc.cgroup.relative = 0",
                "lxc.cgroup.dir.container = lxc/c1",
                "lxc.cgroup.dir.monitor = lxc.monitor/c1",
                "lxc.cgroup.dir.monitor.pivot = lxc.pivot/c1",
            ]
        );
    }

    #[test]
    fn namespaces_are_new_or_those_of_a_path() {
        for (namespaces, wanted) in [
            (
                json!([{"type": "mount"}, {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "network"}, {"type": "cgroup"}]),
                &[
                    "lxc.namespace.clone = mnt pid ipc uts net cgroup",
                    "lxc.net.0.type = empty",
                    "lxc.net.0.flags = up",
                ][..],
            ),
            (
                json!([{"type": "mount", "path": ""}, {"type": "network", "path": "/proc/7/ns/net"}, {"type": "pid", "path": "/a b"}]),
                &[
                    "lxc.namespace.share.net = /proc/7/ns/net",
                    "lxc.namespace.share.pid = /a b",
                ],
            ),
            (
                json!([{"type": "mount"}, {"type": "cgroup", "path": "/c"}, {"type": "time", "path": "/t"}]),
                &["lxc.namespace.share.cgroup = /c", "lxc.namespace.share.time = /t"],
            ),
        ] {
            assert_eq!(own(json!({"namespaces": namespaces})), wanted);
        }
        for (namespaces, wanted) in [
            (json!([{"type": "pid"}]), "mount namespace of its own"),
            (json!([{"type": "mount", "path": "/m"}]), "mount namespace of its own"),
            (
                json!([{"type": "mount"}, {"type": "pid"}, {"type": "pid", "path": "/p"}]),
                "pid is there twice",
            ),
            (
                json!([{"type": "mount"}, {"type": "network", "path": "net"}]),
                "has to be absolute",
            ),
            (
                json!([{"type": "mount"}, {"type": "network", "path": "/a\nlxc.x = y"}]),
                "without line breaks",
            ),
            (
                json!([{"type": "mount"}, {"type": "network", "path": "/a "}]),
                "blanks at its ends",
            ),
        ] {
            let error = refused(json!({"namespaces": namespaces}));
            assert!(error.contains(wanted), "{error}");
        }
    }

    #[test]
    fn users_are_mapped_in_a_user_namespace() {
        let range =
            |inside: u32, outside: u32, size: u32| json!({"containerID": inside, "hostID": outside, "size": size});
        let namespaces = json!([{"type": "mount"}, {"type": "user"}]);
        let linux = json!({
            "namespaces": namespaces,
            "uidMappings": [range(0, 100_000, 65_536), range(70_000, 5, 1)],
            "gidMappings": [range(0, u32::MAX, 1)],
        });
        assert_eq!(
            own(linux),
            [
                "lxc.namespace.clone = mnt user",
                "lxc.idmap = u 0 100000 65536",
                "lxc.idmap = u 70000 5 1",
                "lxc.idmap = g 0 4294967295 1",
            ]
        );
        let joined = json!([{"type": "mount"}, {"type": "user", "path": "/u"}]);
        assert_eq!(
            own(json!({"namespaces": joined, "uidMappings": [range(0, 1, 1)], "gidMappings": [range(0, 2, 1)]})),
            [
                "lxc.namespace.share.user = /u",
                "lxc.idmap = u 0 1 1",
                "lxc.idmap = g 0 2 1",
            ]
        );
        for namespaces in [namespaces, joined] {
            let error = refused(json!({"namespaces": namespaces, "uidMappings": [range(0, 1, 1)]}));
            assert!(error.contains("linux.gidMappings is empty"), "{error}");
        }
        let error = refused(json!({"namespaces": [{"type": "mount"}], "uidMappings": [range(0, 1, 1)]}));
        assert!(error.contains("linux.uidMappings needs a user namespace"), "{error}");
    }

    #[test]
    fn clocks_are_shifted_in_a_new_time_namespace() {
        let namespaces = json!([{"type": "mount"}, {"type": "time"}]);
        let with = |offsets: Value| json!({"namespaces": namespaces, "timeOffsets": offsets});
        assert_eq!(
            own(with(
                json!({"monotonic": {"secs": 2, "nanosecs": 1_000_000_000}, "boottime": {"secs": -1}})
            )),
            [
                "lxc.namespace.clone = mnt time",
                "lxc.time.offset.boot = -1s",
                "lxc.time.offset.monotonic = 3s",
            ]
        );
        assert_eq!(
            own(with(json!({"monotonic": {"nanosecs": 5}, "boottime": {}}))),
            [
                "lxc.namespace.clone = mnt time",
                "lxc.time.offset.boot = 0s",
                "lxc.time.offset.monotonic = 5ns",
            ]
        );
        for (linux, wanted) in [
            (with(json!({"realtime": {"secs": 1}})), "\"realtime\" is neither"),
            (
                with(json!({"boottime": {"secs": i64::MAX, "nanosecs": 1_000_000_000}})),
                "linux.timeOffsets.boottime: out of range",
            ),
            (
                with(json!({"boottime": {"secs": -1, "nanosecs": 5}})),
                "linux.timeOffsets.boottime: the backend lxc takes whole seconds",
            ),
            (
                json!({"namespaces": [{"type": "mount"}], "timeOffsets": {"boottime": {"secs": 1}}}),
                "new time namespace",
            ),
        ] {
            let error = refused(linux);
            assert!(error.contains(wanted), "{error}");
        }
    }

    #[test]
    fn a_kernel_without_time_namespaces_is_no_reason_to_do_without() {
        let with = |namespaces: Value| {
            let linux = serde_json::from_value(json!({"namespaces": namespaces})).unwrap();
            let place = Place {
                layout: &layout(),
                v2: true,
                time: false,
                system: None,
            };
            items(&linux, &place)
        };
        let error = with(json!([{"type": "mount"}, {"type": "time"}])).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("linux.namespaces: this kernel has no time"),
            "{error}"
        );
        assert!(with(json!([{"type": "mount"}])).is_ok());
    }

    #[test]
    fn cgroups_lie_where_the_layout_says() {
        let layout = Layout {
            inner: Some("ns".into()),
            ..layout()
        };
        let items = mapped(json!({"namespaces": [{"type": "mount"}]}), &layout, true).unwrap();
        assert!(
            items.contains(&"lxc.cgroup.dir.container.inner = ns".into()),
            "{items:?}"
        );
        for path in ["", "/", "../x", "/a/../../b", "a\nb", "/\"a\"", "'a/b'", "/a ", " a"] {
            let layout = Layout {
                container: path.into(),
                ..layout.clone()
            };
            let error = mapped(json!({"namespaces": [{"type": "mount"}]}), &layout, true).unwrap_err();
            assert_eq!(error.kind(), Kind::InvalidArgument, "{path:?}");
        }
    }

    #[test]
    fn device_rules_keep_their_order_and_end_with_what_every_container_may_use() {
        let rules = json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rw"},
            {"allow": true, "type": "b", "major": 8, "access": "r"},
            {"allow": true, "type": "a", "major": -1, "minor": -1, "access": "m"},
            {"allow": false, "type": "u", "major": 10, "minor": -1},
            {"allow": true},
        ]);
        let linux = json!({"namespaces": [{"type": "mount"}], "resources": {"devices": rules}});
        for (v2, version) in [(true, "cgroup2"), (false, "cgroup")] {
            let items = mapped(linux.clone(), &layout(), v2).unwrap();
            let rules: Vec<&str> = items
                .iter()
                .filter_map(|item| item.strip_prefix(&format!("lxc.{version}.devices.")))
                .collect();
            assert_eq!(
                rules[..7],
                [
                    "deny = a",
                    "allow = c 1:3 rw",
                    "allow = b 8:* r",
                    "allow = b *:* m",
                    "allow = c *:* m",
                    "deny = c 10:* rwm",
                    "allow = a",
                ]
            );
            let defaults: Vec<String> = DEFAULT_DEVICES.iter().map(|rule| format!("allow = {rule}")).collect();
            assert_eq!(rules[7..], defaults);
        }
        for (rule, wanted) in [
            (json!({"allow": true, "access": "rx"}), "access \"rx\""),
            (json!({"allow": true, "access": "rr"}), "access \"rr\""),
            (json!({"allow": true, "type": "p"}), "type p"),
            (json!({"allow": true, "type": "c", "major": -2}), "major -2"),
            (
                json!({"allow": true, "type": "c", "minor": 4_294_967_296_i64}),
                "minor 4294967296",
            ),
        ] {
            let rules = json!([{"allow": false}, rule]);
            let error = refused(json!({"namespaces": [{"type": "mount"}], "resources": {"devices": rules}}));
            assert!(
                error.contains("linux.resources.devices[1]") && error.contains(wanted),
                "{error}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_path_makes_a_second_item(path in "/(?s).{0,40}") {
            let linux = json!({"namespaces": [{"type": "mount"}, {"type": "network", "path": path}]});
            if let Ok(items) = mapped(linux, &layout(), true) {
                prop_assert!(items.iter().all(|item| !item.contains(['\n', '\r', '\0'])));
                let wanted = format!("lxc.namespace.share.net = {path}");
                prop_assert!(items.contains(&wanted));
            }
        }
    }
}
