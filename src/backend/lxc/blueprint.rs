//! A bundle as an LXC container: what LXC is told, what init does, what the cgroup is limited to, and which hooks run on the host.
//!
//! [`Blueprint::of`] is the mapping of the OCI runtime spec, as a whole. Each of its fields is in one of the parts, or is refused by
//! name; none is passed over. It knows no shim and no file but what the bundle names: who starts the container, under which name and
//! where in the cgroups, is said by [`Place`].

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxResources, Spec};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{
    config::{self, Item, Place},
    init::{self, hooks::Hook, process::Process, rootfs::Root},
};
use crate::error::{Context, Error, Result};

/// The version of the runtime-spec that the states of this crate comply with.
pub(super) const OCI_VERSION: &str = "1.0.2";

/// What a person decides beside the bundle.
#[derive(Debug, Clone, Copy, Default)]
pub struct Choices {
    /// No pivot_root.
    pub no_pivot_root: bool,
    /// No session keyring of its own.
    pub no_new_keyring: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Blueprint {
    /// The container's configuration, lxc.container.conf(5).
    pub items: Vec<Item>,
    /// What init does.
    pub init: init::Plan,
    /// Limits of the container's cgroup; device rules are among [`Blueprint::items`].
    pub resources: Option<LinuxResources>,
    /// Hooks on the host, before the root file system is entered: prestart, then createRuntime.
    pub before_pivot: Vec<Hook>,
    /// Hooks on the host, after the program was started.
    pub poststart: Vec<Hook>,
}

/// What hooks are told of a container besides its status and pid.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Facts {
    /// The id.
    pub id: String,
    /// Absolute path of the bundle.
    pub bundle: PathBuf,
    /// The bundle's annotations.
    pub annotations: HashMap<String, String>,
}

impl Facts {
    /// Those of a bundle.
    pub fn of(spec: &Spec, id: &str, bundle: &Path) -> Self {
        let annotations = spec.annotations().iter().flatten();
        Self {
            id: id.to_owned(),
            bundle: bundle.to_path_buf(),
            annotations: annotations.map(|(key, value)| (key.clone(), value.clone())).collect(),
        }
    }

    /// The state of the container (OCI runtime.md): `status` is `creating`, `created`, `running` or `stopped`; `pid` is init's as the
    /// reader counts, and absent once it is stopped.
    pub fn state(&self, status: &str, pid: Option<u32>) -> Value {
        let mut state = json!({
            "ociVersion": OCI_VERSION, "id": self.id, "status": status, "bundle": self.bundle.to_string_lossy(),
        });
        if let Some(pid) = pid {
            state["pid"] = pid.into();
        }
        if !self.annotations.is_empty() {
            state["annotations"] = json!(self.annotations);
        }
        state
    }
}

/// Reads `<bundle>/config.json` as a whole.
///
/// # Errors
/// `InvalidArgument` with the place in the file.
pub fn read_spec(bundle: &Path) -> Result<Spec> {
    let path = bundle.join("config.json");
    let text = std::fs::read(&path).context(|| format!("cannot read {}", path.display()))?;
    parse(&text, "/process/scheduler/flags").map_err(|e| {
        e.context(format!(
            "cannot read {} as an OCI runtime spec; the backend lxc has to understand each field of it",
            path.display()
        ))
    })
}

/// Parses a document of the OCI runtime spec, which has the flags of a scheduler at `flags`: the crate spells two of them in its own way.
///
/// # Errors
/// `InvalidArgument` with the place in the text.
pub(super) fn parse<T: DeserializeOwned>(text: &[u8], flags: &str) -> Result<T> {
    let invalid = |e: serde_json::Error| Error::invalid("not of the right shape").with_source(e);
    // serde would read an array as the fields in their order.
    if text.trim_ascii_start().first() != Some(&b'{') {
        return Err(Error::invalid("not a JSON object"));
    }
    const BEGIN: &[u8] = b"\"SCHED_FLAG_";
    if !text.windows(BEGIN.len()).any(|window| window == BEGIN) {
        return serde_json::from_slice(text).map_err(invalid);
    }
    let mut document: Value = serde_json::from_slice(text).map_err(invalid)?;
    for flag in document
        .pointer_mut(flags)
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
    {
        match flag.as_str() {
            Some("SCHED_FLAG_RESET_ON_FORK") => *flag = "SCHED_RESET_ON_FORK".into(),
            Some("SCHED_FLAG_DL_OVERRUN") => *flag = "SCHED_FLAG_D_L_OVERRUN".into(),
            _ => {}
        }
    }
    serde_json::from_value(document).map_err(invalid)
}

impl Blueprint {
    /// The mapping. A bundle whose init is [`Place::system`] is one that [`super::system::Init::adapt`] has changed. Blocks where a seccomp
    /// profile is compiled, see [`super::seccomp::compile`].
    ///
    /// # Errors
    /// `InvalidArgument` or `Unimplemented` with the field that is wrong or cannot be honoured.
    ///
    /// # Example
    /// ```
    /// use proxmox_lxcri::backend::lxc::{
    ///     blueprint::{Blueprint, Choices, read_spec},
    ///     config::{Layout, Place},
    /// };
    ///
    /// let bundle = tempfile::tempdir()?;
    /// let config = r#"{
    ///     "ociVersion": "1.2.0",
    ///     "root": {"path": "rootfs"},
    ///     "process": {"args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
    ///     "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}]}
    /// }"#;
    /// std::fs::write(bundle.path().join("config.json"), config)?;
    /// let layout = Layout {
    ///     container: "/lxc/900000".into(),
    ///     inner: Some("ns".into()),
    ///     monitor: "/lxc.monitor/900000".into(),
    ///     pivot: "/lxc.pivot/900000".into(),
    /// };
    /// let place = Place { layout: &layout, v2: true, time: true, system: None };
    /// let spec = read_spec(bundle.path())?;
    /// let blueprint = Blueprint::of(&spec, "900000", bundle.path(), &place, Choices::default())?;
    /// assert!(blueprint.items.contains(&("lxc.namespace.clone".into(), "mnt pid".into())));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn of(spec: &Spec, id: &str, bundle: &Path, place: &Place<'_>, choices: Choices) -> Result<Self> {
        let linux = spec
            .linux()
            .as_ref()
            .ok_or_else(|| Error::invalid("linux: an LXC container needs it"))?;
        let process = spec
            .process()
            .as_ref()
            .ok_or_else(|| Error::invalid("process: a container without one cannot be created"))?;
        for (field, there) in [
            ("solaris", spec.solaris().is_some()),
            ("windows", spec.windows().is_some()),
            ("vm", spec.vm().is_some()),
            ("linux.intelRdt", linux.intel_rdt().is_some()),
            (
                "linux.netDevices",
                linux.net_devices().as_ref().is_some_and(|all| !all.is_empty()),
            ),
            ("linux.memoryPolicy", linux.memory_policy().is_some()),
        ] {
            if there {
                return Err(Error::unimplemented(format!(
                    "{field}: the backend lxc cannot do that; leave it out, or use the backend crun"
                )));
            }
        }
        let all = spec.hooks().as_ref();
        #[allow(
            deprecated,
            reason = "prestart is deprecated in OCI, and still what some tools write"
        )]
        let prestart = all.and_then(|hooks| hooks.prestart().as_deref()).unwrap_or_default();
        let mut before_pivot = Hook::of(prestart, "prestart")?;
        let list = |hooks: Option<&Vec<oci_spec::runtime::Hook>>, stage: &str| {
            Hook::of(hooks.map(Vec::as_slice).unwrap_or_default(), stage)
        };
        before_pivot.extend(list(
            all.and_then(|hooks| hooks.create_runtime().as_ref()),
            "createRuntime",
        )?);
        // Refused here, though it runs much later.
        list(all.and_then(|hooks| hooks.poststop().as_ref()), "poststop")?;
        let name = |name: &Option<String>, field: &str, new: bool| match name.as_deref().filter(|name| !name.is_empty())
        {
            Some(name) if name.len() > 64 || name.contains('\0') => Err(Error::invalid(format!(
                "{field} {name:?} is longer than the 64 bytes that Linux takes, or holds a NUL byte"
            ))),
            Some(_) if !new => Err(Error::invalid(format!(
                "{field} needs a uts namespace in linux.namespaces; it would be the host's name"
            ))),
            name => Ok(name.map(str::to_owned)),
        };
        let mut root = Root::of(spec, bundle, choices.no_pivot_root)?;
        if let Some(init) = place.system {
            root.furnish(init.wants());
        }
        let mut items = config::items(linux, place)?;
        if choices.no_new_keyring {
            // That liblxc makes none, either: lxc.container.conf(5) says it of the value 0, liblxc does it for 1.
            items.push(("lxc.keyring.session".to_owned(), "1".to_owned()));
        }
        let uts = config::has_namespace(linux, oci_spec::runtime::LinuxNamespaceType::Uts);
        Ok(Self {
            items,
            init: init::Plan {
                root,
                process: Process::of(process, Some(linux))?,
                hostname: name(spec.hostname(), "hostname", uts)?,
                domainname: name(spec.domainname(), "domainname", uts)?,
                waits_for_hooks: !before_pivot.is_empty(),
                create_container: list(
                    all.and_then(|hooks| hooks.create_container().as_ref()),
                    "createContainer",
                )?,
                start_container: list(all.and_then(|hooks| hooks.start_container().as_ref()), "startContainer")?,
                facts: Facts::of(spec, id, bundle),
                keep_keyring: choices.no_new_keyring,
                constrained: config::has_namespace(linux, oci_spec::runtime::LinuxNamespaceType::User),
            },
            resources: linux.resources().clone(),
            before_pivot,
            poststart: list(all.and_then(|hooks| hooks.poststart().as_ref()), "poststart")?,
        })
    }
}

/// The poststop hooks of a bundle, for who removes the container.
///
/// # Errors
/// As [`read_spec`].
pub fn poststop(bundle: &Path, id: &str) -> Result<(Vec<Hook>, Facts)> {
    let spec = read_spec(bundle)?;
    let hooks = spec.hooks().as_ref().and_then(|hooks| hooks.poststop().as_deref());
    Ok((
        Hook::of(hooks.unwrap_or_default(), "poststop")?,
        Facts::of(&spec, id, bundle),
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::{backend::lxc::config::Layout, error::Kind};

    fn of(change: impl FnOnce(&mut Value)) -> Result<Blueprint> {
        chosen(Choices::default(), change)
    }

    fn chosen(choices: Choices, change: impl FnOnce(&mut Value)) -> Result<Blueprint> {
        let mut spec = json!({
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs"},
            "process": {"args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
            "annotations": {"a": "b"},
            "linux": {
                "namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "uts"}],
                "resources": {"memory": {"limit": 1_048_576}, "devices": [{"allow": false}]},
            },
        });
        change(&mut spec);
        let spec: Spec = serde_json::from_value(spec).unwrap();
        let layout = Layout {
            container: "/a/c1".into(),
            inner: None,
            monitor: "/a/lxc.monitor.c1".into(),
            pivot: "/a/lxc.pivot.c1".into(),
        };
        let place = Place {
            layout: &layout,
            v2: true,
            time: true,
            system: None,
        };
        Blueprint::of(&spec, "c1", Path::new("/b"), &place, choices)
    }

    #[track_caller]
    fn refused(kind: Kind, text: &str, change: impl FnOnce(&mut Value)) {
        let error = of(change).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(text), "{error}");
    }

    #[test]
    fn each_part_of_a_bundle_is_for_somebody() {
        let blueprint = of(|spec| {
            spec["hostname"] = "box".into();
            spec["domainname"] = "home".into();
        })
        .unwrap();
        assert!(
            blueprint
                .items
                .contains(&("lxc.cgroup2.devices.deny".into(), "a".into()))
        );
        assert!(
            blueprint
                .items
                .contains(&("lxc.namespace.clone".into(), "mnt pid uts".into()))
        );
        assert_eq!(blueprint.init.hostname.as_deref(), Some("box"));
        assert_eq!(blueprint.init.domainname.as_deref(), Some("home"));
        assert_eq!(blueprint.init.process.args, ["true"]);
        let memory = blueprint.resources.unwrap().memory().unwrap();
        assert_eq!(memory.limit(), Some(1_048_576));
        assert!(!blueprint.init.constrained && !blueprint.init.waits_for_hooks);
        let state = blueprint.init.facts.state("created", Some(7));
        assert_eq!(
            (
                &state["id"],
                &state["pid"],
                &state["bundle"],
                &state["annotations"]["a"]
            ),
            (&json!("c1"), &json!(7), &json!("/b"), &json!("b"))
        );
        let state = blueprint.init.facts.state("stopped", None);
        assert!(state.get("pid").is_none());
    }

    #[test]
    fn hooks_run_where_and_when_oci_says() {
        let hook = |name: &str| json!([{"path": format!("/hooks/{name}"), "args": [name, "x"], "timeout": 3}]);
        let blueprint = of(|spec| {
            for name in [
                "prestart",
                "createRuntime",
                "createContainer",
                "startContainer",
                "poststart",
                "poststop",
            ] {
                spec["hooks"][name] = hook(name);
            }
        })
        .unwrap();
        let names = |hooks: &[Hook]| hooks.iter().map(|hook| hook.name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&blueprint.before_pivot), ["prestart[0]", "createRuntime[0]"]);
        assert_eq!(names(&blueprint.init.create_container), ["createContainer[0]"]);
        assert_eq!(names(&blueprint.init.start_container), ["startContainer[0]"]);
        assert_eq!(names(&blueprint.poststart), ["poststart[0]"]);
        assert!(blueprint.init.waits_for_hooks);
        // One that runs at the very end is looked at now.
        refused(Kind::InvalidArgument, "hooks.poststop[0].path", |spec| {
            spec["hooks"]["poststop"] = json!([{"path": "relative"}]);
        });
    }

    #[test]
    fn neither_init_nor_lxc_makes_a_keyring_that_nobody_wants() {
        for no_new_keyring in [false, true] {
            let choices = Choices {
                no_new_keyring,
                ..Choices::default()
            };
            let blueprint = chosen(choices, |_| {}).unwrap();
            assert_eq!(blueprint.init.keep_keyring, no_new_keyring);
            let item = ("lxc.keyring.session".into(), "1".into());
            assert_eq!(blueprint.items.contains(&item), no_new_keyring);
        }
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_name() {
        for (field, value) in [
            ("intelRdt", json!({"closID": "a"})),
            (
                "memoryPolicy",
                json!({"mode": "MPOL_DEFAULT", "nodes": "0", "flags": []}),
            ),
        ] {
            refused(Kind::Unimplemented, &format!("linux.{field}"), |spec| {
                spec["linux"][field] = value;
            });
        }
        for (field, value) in [
            ("solaris", json!({"milestone": "svc:/milestone/container:default"})),
            ("windows", json!({"layerFolders": ["a"]})),
            ("vm", json!({"kernel": {"path": "/vmlinuz"}})),
        ] {
            refused(Kind::Unimplemented, &format!("{field}: "), |spec| {
                spec[field] = value;
            });
        }
        refused(Kind::Unimplemented, "linux.netDevices", |spec| {
            spec["linux"]["netDevices"] = json!({"eth0": {"name": "eth1"}});
        });
        refused(Kind::InvalidArgument, "process:", |spec| {
            spec.as_object_mut().unwrap().remove("process");
        });
        refused(Kind::InvalidArgument, "linux:", |spec| {
            spec.as_object_mut().unwrap().remove("linux");
        });
        refused(Kind::InvalidArgument, "hostname", |spec| {
            spec["hostname"] = "x".repeat(65).into()
        });
        // It would be the host's name.
        for field in ["hostname", "domainname"] {
            refused(Kind::InvalidArgument, field, |spec| {
                spec[field] = "box".into();
                spec["linux"]["namespaces"] = json!([{"type": "mount"}]);
            });
        }
    }

    #[test]
    fn a_user_namespace_leaves_to_the_shim_what_init_may_not_do() {
        let blueprint = of(|spec| {
            spec["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "user"}]);
            let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
            spec["linux"]["uidMappings"] = map.clone();
            spec["linux"]["gidMappings"] = map;
        })
        .unwrap();
        assert!(blueprint.init.constrained);
    }

    #[test]
    fn the_flags_of_a_scheduler_are_spelled_as_in_the_spec() {
        let text = json!({
            "ociVersion": "1.1.0",
            "process": {
                "args": ["SCHED_FLAG_DL_OVERRUN"], "cwd": "/", "user": {"uid": 0, "gid": 0},
                "scheduler": {"policy": "SCHED_FIFO", "flags": ["SCHED_FLAG_RESET_ON_FORK", "SCHED_FLAG_DL_OVERRUN", "SCHED_FLAG_RECLAIM"]},
            },
        });
        let spec: Spec = parse(text.to_string().as_bytes(), "/process/scheduler/flags").unwrap();
        let process = spec.process().as_ref().unwrap();
        assert_eq!(
            process.args().as_deref(),
            Some(&["SCHED_FLAG_DL_OVERRUN".to_owned()][..])
        );
        assert_eq!(process.scheduler().as_ref().unwrap().flags().as_ref().unwrap().len(), 3);
    }

    #[test]
    fn a_document_that_cannot_be_understood_is_named() {
        let folder = tempfile::tempdir().unwrap();
        for text in [&b""[..], b"[]", br#"{"ociVersion": 1}"#] {
            std::fs::write(folder.path().join("config.json"), text).unwrap();
            let error = read_spec(folder.path()).unwrap_err();
            assert_eq!(error.kind(), Kind::InvalidArgument);
            assert!(error.to_string().contains("config.json"), "{error}");
        }
        assert!(poststop(&folder.path().join("nowhere"), "c1").is_err());
    }
}
