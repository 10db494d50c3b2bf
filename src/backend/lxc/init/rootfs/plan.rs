//! From the bundle to what init does. Pure.

use std::{
    collections::BTreeMap,
    os::unix::ffi::OsStrExt,
    path::{Component, Path, PathBuf},
};

use nix::mount::MsFlags;
use oci_spec::runtime::{
    Linux, LinuxDevice, LinuxDeviceType, LinuxIdMapping, LinuxNamespaceType, Mount as OciMount, Spec,
};
use serde::{Deserialize, Serialize};

use super::{
    Root,
    cgroups::CGROUPS,
    words::{Attributes, Kind, Propagation, Words},
};
use crate::{
    backend::lxc::system::Tmpfs,
    error::{Context, Error, Result},
    rootfs::{
        mount::attributes,
        options::{IdMap, IdRange, MS_NOSYMFOLLOW, Options},
        sys::attr,
    },
};

/// The most ranges that the kernel takes for a map of ids.
const ID_RANGES_MAX: usize = 340;

/// One of `mounts`.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
pub(super) struct Mount {
    /// Its index, for errors.
    pub(super) number: usize,
    /// Path inside the root.
    pub(super) destination: PathBuf,
    /// What is put there.
    pub(super) action: Action,
    /// The kind that the mount gets; `None` leaves it as the kernel makes it, private.
    pub(super) propagation: Option<Propagation>,
    /// Made read-only when everything is mounted, for other mounts may need their places made inside.
    pub(super) read_only: bool,
    /// Attributes of it and all that is below it, set before anything else is mounted there.
    pub(super) recursive: Attributes,
}

/// What a mount is made of.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
pub(super) enum Action {
    /// A file or folder of the host; the descriptor comes from [`Root::open`].
    Bind {
        source: PathBuf,
        recursive: bool,
        attributes: Attributes,
        owners: Option<Owners>,
        /// A symlink is made again inside instead of being followed.
        copy_symlink: bool,
    },
    /// A file system of its own.
    FileSystem {
        kind: String,
        source: String,
        /// Flags of mount(2).
        flags: u64,
        data: Vec<String>,
        /// What the image has at the place is copied into it.
        copy_up: bool,
    },
    /// The container's own cgroups, of v1 or v2.
    Cgroups {
        source: String,
        flags: u64,
        /// Of v1 all but systemd's are read-only, in which there are no limits.
        delegated: bool,
    },
    /// Other options for what is mounted there already.
    Remount { bind: bool, flags: u64, data: Vec<String> },
}

/// How an idmapped mount shifts owners.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
pub(super) struct Owners {
    pub(super) map: Map,
    /// Of all mounts below as well.
    pub(super) recursive: bool,
}

/// Where the map comes from.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
pub(super) enum Map {
    /// The bundle's.
    Ranges(IdMap),
    /// That of the user namespace at a path.
    Of(PathBuf),
}

/// A device node or fifo.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
pub(super) struct Device {
    pub(super) path: PathBuf,
    pub(super) kind: Node,
    pub(super) major: u32,
    pub(super) minor: u32,
    /// Permissions, not reduced by any umask.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Its index in `linux.devices`; `None` for one that every container has.
    pub(super) number: Option<usize>,
}

/// Kind of a node.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq)]
pub(super) enum Node {
    Character,
    Block,
    Fifo,
}

/// A value for procfs.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
pub(super) struct Sysctl {
    /// As the bundle spells it.
    pub(super) key: String,
    /// Below `/proc/sys`.
    pub(super) path: String,
    pub(super) value: String,
    /// A namespace that the container joins and that must not be the host's for this key: "net" and its path.
    pub(super) not_of_host: Option<(String, PathBuf)>,
}

/// Which namespaces the container has.
struct Namespaces<'a>(&'a Linux);

/// One of them.
enum Namespace<'a> {
    New,
    Joined(&'a Path),
    Host,
}

impl Namespaces<'_> {
    fn of(&self, kind: LinuxNamespaceType) -> Namespace<'_> {
        let mut all = self.0.namespaces().iter().flatten();
        match all.find(|namespace| namespace.typ() == kind) {
            None => Namespace::Host,
            Some(namespace) => match namespace.path() {
                Some(path) if !path.as_os_str().is_empty() => Namespace::Joined(path),
                _ => Namespace::New,
            },
        }
    }
}

pub(super) fn root(spec: &Spec, bundle: &Path, no_pivot_root: bool) -> Result<Root> {
    if !bundle.is_absolute() {
        return Err(Error::invalid(format!("bundle {} is not absolute", bundle.display())));
    }
    let root = spec
        .root()
        .as_ref()
        .ok_or_else(|| Error::invalid("root: a container needs one"))?;
    if root.path().as_os_str().is_empty() {
        return Err(Error::invalid("root.path is empty"));
    }
    no_nul(root.path()).context(|| "root.path")?;
    let linux = spec
        .linux()
        .as_ref()
        .ok_or_else(|| Error::invalid("linux: a container needs namespaces"))?;
    let namespaces = Namespaces(linux);
    let user_namespace = !matches!(namespaces.of(LinuxNamespaceType::User), Namespace::Host);
    let propagation = match linux.rootfs_propagation().as_deref().unwrap_or_default() {
        "" => Propagation::default(),
        word => Propagation::parse(word).ok_or_else(|| {
            Error::invalid(format!(
                "linux.rootfsPropagation: {word:?} is not one of [r]shared, [r]slave, [r]private, [r]unbindable"
            ))
        })?,
    };
    let mut plan = Planner {
        linux,
        bundle,
        user_namespace,
        propagation,
        dev_of_host: false,
    };
    let mut mounts = Vec::new();
    for (number, mount) in spec.mounts().iter().flatten().enumerate() {
        mounts.push(plan.mount(number, mount)?);
    }
    let devices = if plan.dev_of_host { Vec::new() } else { devices(linux)? };
    let sysfs = |mount: &Mount| matches!(&mount.action, Action::FileSystem { kind, .. } if kind == "sysfs");
    let sys_of_host = user_namespace
        && mounts.iter().any(sysfs)
        && !matches!(namespaces.of(LinuxNamespaceType::Network), Namespace::New);
    Ok(Root {
        path: bundle.join(root.path()),
        read_only: root.readonly().unwrap_or_default(),
        propagation,
        no_pivot_root,
        user_namespace,
        cgroup_namespace: !matches!(namespaces.of(LinuxNamespaceType::Cgroup), Namespace::Host),
        sys_of_host,
        mounts,
        dev_of_host: plan.dev_of_host,
        devices,
        masked_paths: paths("linux.maskedPaths", linux.masked_paths().as_deref())?,
        read_only_paths: paths("linux.readonlyPaths", linux.readonly_paths().as_deref())?,
        sysctls: sysctls(linux, &namespaces)?,
        label: linux.mount_label().clone().filter(|label| !label.is_empty()),
    })
}

/// See [`Root::furnish`].
pub(super) fn furnish(root: &mut Root, wanted: &[Tmpfs]) {
    for tmpfs in wanted {
        let destination = Path::new(tmpfs.destination);
        if root.mounts.iter().any(|mount| mount.destination == destination) {
            continue;
        }
        let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_STRICTATIME;
        flags.set(MsFlags::MS_NOEXEC, tmpfs.noexec);
        let action = Action::FileSystem {
            kind: "tmpfs".into(),
            source: "tmpfs".into(),
            flags: flags.bits(),
            data: tmpfs.data.iter().map(|word| (*word).to_owned()).collect(),
            copy_up: false,
        };
        let at = after_parents(root, destination);
        root.mounts.insert(at, added(root, destination, action));
    }
    let destination = Path::new(CGROUPS);
    let shows = |mount: &Mount| match &mount.action {
        Action::Cgroups { .. } => true,
        Action::FileSystem { kind, .. } => kind == "cgroup2" || mount.read_only,
        _ => mount.read_only,
    };
    root.mounts
        .retain(|mount| mount.destination != destination || !shows(mount));
    // What is left there the bundle wants as it is, and can be written.
    if root.mounts.iter().any(|mount| mount.destination == destination) {
        return;
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RELATIME;
    let action = Action::Cgroups {
        source: "cgroup".into(),
        flags: flags.bits(),
        delegated: true,
    };
    let at = after_parents(root, destination);
    root.mounts.insert(at, added(root, destination, action));
}

/// Before what is mounted inside, after what it is mounted in.
fn after_parents(root: &Root, destination: &Path) -> usize {
    let parent = |mount: &Mount| mount.destination != destination && destination.starts_with(&mount.destination);
    root.mounts.iter().rposition(parent).map_or(0, |at| at + 1)
}

/// A mount that is not in the bundle, numbered as if it came after those.
fn added(root: &Root, destination: &Path, action: Action) -> Mount {
    let last = root.mounts.iter().map(|mount| mount.number).max();
    let inherited = root.propagation.recursive && root.propagation.kind != Kind::Private;
    Mount {
        number: last.map_or(0, |last| last + 1),
        destination: destination.to_path_buf(),
        action,
        propagation: inherited.then_some(root.propagation),
        read_only: false,
        recursive: Attributes::default(),
    }
}

fn no_nul(path: &Path) -> Result<()> {
    if path.as_os_str().as_bytes().contains(&0) {
        return Err(Error::invalid("a path holds a NUL byte"));
    }
    Ok(())
}

/// Whether a path of the container names something other than its root.
fn inside(path: &Path) -> Result<()> {
    no_nul(path)?;
    if !path.components().any(|part| matches!(part, Component::Normal(_))) {
        return Err(Error::invalid(format!(
            "{path:?} names nothing below the root of the container"
        )));
    }
    Ok(())
}

fn paths(field: &str, list: Option<&[String]>) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for (number, path) in list.unwrap_or_default().iter().enumerate() {
        let path = PathBuf::from(path);
        inside(&path).context(|| format!("{field}[{number}]"))?;
        paths.push(path);
    }
    Ok(paths)
}

struct Planner<'a> {
    linux: &'a Linux,
    bundle: &'a Path,
    user_namespace: bool,
    propagation: Propagation,
    /// `/dev` is a bind, in which no device is made.
    dev_of_host: bool,
}

impl Planner<'_> {
    fn mount(&mut self, number: usize, mount: &OciMount) -> Result<Mount> {
        let field = |name: &str| format!("mounts[{number}].{name}");
        let destination = mount.destination();
        inside(destination).context(|| field("destination"))?;
        let kind = mount.typ().as_deref().unwrap_or_default();
        let words = match mount.options() {
            Some(words) => Words::parse(words),
            None => Words::parse(&defaults(destination, kind)),
        };
        let words = words.context(|| field("options"))?;
        let options = &words.options;
        let refuse = |name: &str, why: &str| Err(Error::invalid(format!("{}: {why}", field(name))));
        if options.loop_device || options.direct_io {
            return refuse("options", "a loop device has to be made by the client");
        }
        if options.idmap.is_some() {
            return refuse(
                "options",
                "uidmap= and gidmap= are containerd's; say mounts[].uidMappings",
            );
        }
        let remount = options.flags.contains(MsFlags::MS_REMOUNT);
        let bind = (options.is_bind() || kind == "bind") && !remount;
        let has_owners = words.idmap.is_some() || mount.uid_mappings().is_some() || mount.gid_mappings().is_some();
        if has_owners && !bind {
            return refuse("uidMappings", "only the owners of a bind mount can be mapped");
        }
        if words.copy_up && (kind != "tmpfs" || bind || remount) {
            return refuse("options", "tmpcopyup is for a tmpfs");
        }
        if words.copy_symlink && !bind {
            return refuse("options", "copy-symlink is for a bind mount");
        }
        let physical = !remount && !bind && !is_virtual(kind);
        let flags = if physical {
            options.flags
        } else {
            options.flags - MsFlags::MS_RDONLY
        };
        let flags = (flags - MsFlags::MS_REMOUNT - MsFlags::MS_BIND - MsFlags::MS_REC).bits();
        let source = match mount.source() {
            Some(source) if !source.as_os_str().is_empty() => Some(source.as_path()),
            _ => None,
        };
        if let Some(source) = source {
            no_nul(source).context(|| field("source"))?;
        }
        let action = if remount {
            let flags = (options.flags - MsFlags::MS_REMOUNT - MsFlags::MS_BIND - MsFlags::MS_REC).bits();
            Action::Remount {
                bind: options.is_bind(),
                flags,
                data: options.data.clone(),
            }
        } else if bind {
            let Some(source) = source else {
                return refuse("source", "a bind mount needs one");
            };
            if let Some(word) = options.data.first() {
                return refuse(
                    "options",
                    &format!("{word:?} is no option of a bind mount, which has no file system to understand it"),
                );
            }
            if destination.components().eq(Path::new("/dev").components()) {
                self.dev_of_host = true;
            }
            Action::Bind {
                source: self.bundle.join(source),
                recursive: options.flags.contains(MsFlags::MS_REC),
                attributes: self.attributes(options),
                owners: self.owners(number, mount, words.idmap)?,
                copy_symlink: words.copy_symlink,
            }
        } else {
            if kind.is_empty() {
                return refuse("type", "missing, and the mount is no bind");
            }
            if kind.contains('\0') {
                return refuse("type", "holds a NUL byte");
            }
            let source = source.map_or_else(|| kind.to_owned(), |source| source.to_string_lossy().into_owned());
            match kind {
                "cgroup" if !options.data.is_empty() => {
                    let word = &options.data[0];
                    return refuse(
                        "options",
                        &format!("{word:?} is nothing that the host's cgroups could be asked for"),
                    );
                }
                "cgroup" => Action::Cgroups {
                    source,
                    flags,
                    delegated: false,
                },
                _ => Action::FileSystem {
                    kind: kind.to_owned(),
                    source,
                    flags,
                    data: options.data.clone(),
                    copy_up: words.copy_up,
                },
            }
        };
        let own = match options.propagation {
            Some(flags) => Propagation::of(flags),
            None => None,
        };
        let propagation = match own {
            Some(own) => Some(own),
            None if bind => Some(self.propagation),
            // As if the kind were given to the root and all below it in the end.
            None if !remount && self.propagation.recursive && self.propagation.kind != Kind::Private => {
                Some(self.propagation)
            }
            None => None,
        };
        Ok(Mount {
            number,
            destination: destination.clone(),
            action,
            propagation,
            read_only: !remount && options.flags.contains(MsFlags::MS_RDONLY),
            recursive: words.recursive,
        })
    }

    /// Attributes of a bind. What its source forbids stays forbidden unless an option takes it back by name; in a user namespace also
    /// then, as the kernel would keep it. `rw` takes nothing back: clients write it where they mean "not `ro`".
    fn attributes(&self, options: &Options) -> Attributes {
        let atime = MsFlags::MS_NOATIME | MsFlags::MS_RELATIME | MsFlags::MS_STRICTATIME;
        let set = attributes(options.flags - MsFlags::MS_RDONLY);
        let mut clear = 0;
        if options.flags.intersects(atime) {
            clear |= attr::ATIME;
        }
        if !self.user_namespace {
            let names = [
                (MsFlags::MS_NOSUID, attr::NOSUID),
                (MsFlags::MS_NODEV, attr::NODEV),
                (MsFlags::MS_NOEXEC, attr::NOEXEC),
                (MsFlags::MS_NODIRATIME, attr::NODIRATIME),
                (MS_NOSYMFOLLOW, attr::NOSYMFOLLOW),
                (atime, attr::ATIME),
            ];
            for (flags, attribute) in names {
                if options.cleared.intersects(flags) {
                    clear |= attribute;
                }
            }
        }
        Attributes { set, clear }
    }

    fn owners(&self, number: usize, mount: &OciMount, word: Option<bool>) -> Result<Option<Owners>> {
        let recursive = word.unwrap_or_default();
        let uids = mount.uid_mappings().as_deref().unwrap_or_default();
        let gids = mount.gid_mappings().as_deref().unwrap_or_default();
        let field = |name: &str| format!("mounts[{number}].{name}");
        let map = match (uids.is_empty(), gids.is_empty(), word) {
            (true, true, None) => return Ok(None),
            (false, false, _) => Map::Ranges(IdMap {
                uids: ranges(uids).context(|| field("uidMappings"))?,
                gids: ranges(gids).context(|| field("gidMappings"))?,
            }),
            (true, true, Some(_)) => self.map_of_container().context(|| field("options"))?,
            _ => {
                return Err(Error::invalid(format!(
                    "{}: uidMappings and gidMappings need each other",
                    field("uidMappings")
                )));
            }
        };
        Ok(Some(Owners { map, recursive }))
    }

    /// That of the container's user namespace.
    fn map_of_container(&self) -> Result<Map> {
        match Namespaces(self.linux).of(LinuxNamespaceType::User) {
            Namespace::Joined(path) => Ok(Map::Of(path.to_path_buf())),
            Namespace::New => {
                let uids = self.linux.uid_mappings().as_deref().unwrap_or_default();
                let gids = self.linux.gid_mappings().as_deref().unwrap_or_default();
                Ok(Map::Ranges(IdMap {
                    uids: ranges(uids).context(|| "linux.uidMappings")?,
                    gids: ranges(gids).context(|| "linux.gidMappings")?,
                }))
            }
            Namespace::Host => Err(Error::invalid(
                "idmap without uidMappings and gidMappings needs a user namespace in linux.namespaces",
            )),
        }
    }
}

fn ranges(list: &[LinuxIdMapping]) -> Result<Vec<IdRange>> {
    if list.is_empty() || list.len() > ID_RANGES_MAX {
        return Err(Error::invalid(format!(
            "{} ranges; the kernel takes 1 to {ID_RANGES_MAX}",
            list.len()
        )));
    }
    let mut ranges = Vec::new();
    for range in list {
        let (container, host, size) = (range.container_id(), range.host_id(), range.size());
        let ends = |first: u32| first.checked_add(size).is_some();
        if size == 0 || !ends(container) || !ends(host) {
            return Err(Error::invalid(format!(
                "range {container} {host} {size} is empty or leaves 32 bits"
            )));
        }
        ranges.push(IdRange { container, host, size });
    }
    Ok(ranges)
}

/// Whether a file system keeps nothing on a device, so that it can be made read-only after it was filled.
fn is_virtual(kind: &str) -> bool {
    matches!(
        kind,
        "tmpfs" | "proc" | "sysfs" | "devpts" | "mqueue" | "cgroup" | "cgroup2" | "ramfs"
    )
}

/// The options of a mount that names none, as crun has them.
fn defaults(destination: &Path, kind: &str) -> Vec<String> {
    let words: &[&str] = match destination.to_str().unwrap_or_default() {
        "/dev/cgroup" | "/sys/fs/cgroup" => &["noexec", "nosuid", "strictatime"],
        "/dev" => &["noexec", "strictatime", "mode=755"],
        "/dev/shm" => &["noexec", "nosuid", "nodev", "mode=1777", "size=65536k"],
        "/dev/mqueue" | "/sys" => &["noexec", "nosuid", "nodev"],
        "/dev/pts" => &["noexec", "nosuid", "newinstance", "ptmxmode=0666", "mode=620", "gid=5"],
        _ => &[],
    };
    let words = words.iter().map(|word| (*word).to_owned());
    match kind {
        // What speaks to a tmpfs or devpts means nothing to a bind.
        "bind" | "none" | "" => words
            .filter(|word| !word.contains('=') && word != "newinstance")
            .collect(),
        _ => words.collect(),
    }
}

/// What every container has.
const DEFAULT_DEVICES: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/tty", 5, 0),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
];

fn devices(linux: &Linux) -> Result<Vec<Device>> {
    let mut devices = Vec::new();
    for (number, device) in linux.devices().iter().flatten().enumerate() {
        devices.push(of_bundle(number, device).context(|| format!("linux.devices[{number}]"))?);
    }
    for (path, major, minor) in DEFAULT_DEVICES {
        let path = PathBuf::from(path);
        if devices.iter().all(|device| device.path != path) {
            devices.push(Device {
                path,
                kind: Node::Character,
                major,
                minor,
                mode: 0o666,
                uid: 0,
                gid: 0,
                number: None,
            });
        }
    }
    Ok(devices)
}

fn of_bundle(number: usize, device: &LinuxDevice) -> Result<Device> {
    let path = device.path();
    inside(path).context(|| "path")?;
    if !path.is_absolute() || path.file_name().is_none() {
        return Err(Error::invalid(format!(
            "path: {path:?} is not an absolute path of a node"
        )));
    }
    let (kind, bits) = match device.typ() {
        LinuxDeviceType::C | LinuxDeviceType::U => (Node::Character, libc::S_IFCHR),
        LinuxDeviceType::B => (Node::Block, libc::S_IFBLK),
        LinuxDeviceType::P => (Node::Fifo, libc::S_IFIFO),
        LinuxDeviceType::A => return Err(Error::invalid("type: a node is of one of c, b, u, p")),
    };
    // The kernel's dev_t has 12 and 20 bits for them.
    let within = |name: &str, value: i64, end: i64| match u32::try_from(value) {
        Ok(value) if i64::from(value) < end => Ok(value),
        _ => Err(Error::invalid(format!("{name}: {value} is out of range"))),
    };
    let (major, minor) = match kind {
        Node::Fifo => (0, 0),
        _ => (
            within("major", device.major(), 1 << 12)?,
            within("minor", device.minor(), 1 << 20)?,
        ),
    };
    let mode = device.file_mode().unwrap_or(0o666);
    // Some clients hand over what stat(2) said.
    let mode = if mode & libc::S_IFMT == bits { mode - bits } else { mode };
    if mode > 0o7777 {
        return Err(Error::invalid(format!("fileMode: {mode:#o} is no mode of such a node")));
    }
    Ok(Device {
        path: path.clone(),
        kind,
        major,
        minor,
        mode,
        uid: device.uid().unwrap_or_default(),
        gid: device.gid().unwrap_or_default(),
        number: Some(number),
    })
}

/// Keys of the IPC namespace.
const IPC_KEYS: [&str; 8] = [
    "kernel/msgmax",
    "kernel/msgmnb",
    "kernel/msgmni",
    "kernel/sem",
    "kernel/shmall",
    "kernel/shmmax",
    "kernel/shmmni",
    "kernel/shm_rmid_forced",
];

fn sysctls(linux: &Linux, namespaces: &Namespaces<'_>) -> Result<Vec<Sysctl>> {
    let mut sysctls = Vec::new();
    // In one order, whatever order the map has.
    let sorted: BTreeMap<_, _> = linux.sysctl().iter().flatten().collect();
    for (key, value) in sorted {
        let refuse = |why: &str| Err(Error::invalid(format!("linux.sysctl: {key}: {why}")));
        let path = path_of(key);
        if path.split('/').any(|part| matches!(part, "" | "." | "..")) || key.contains('\0') {
            return refuse("no name of a kernel setting");
        }
        let (kind, name) = match path.as_str() {
            "kernel/hostname" => return refuse("the host name is set by the field hostname"),
            "kernel/domainname" => (LinuxNamespaceType::Uts, "uts"),
            path if IPC_KEYS.contains(&path) || path.starts_with("fs/mqueue/") => (LinuxNamespaceType::Ipc, "ipc"),
            path if path.starts_with("net/") => (LinuxNamespaceType::Network, "net"),
            path if path.starts_with("user/") => (LinuxNamespaceType::User, "user"),
            _ => return refuse("belongs to no namespace, so it would change the host"),
        };
        let not_of_host = match namespaces.of(kind) {
            Namespace::New => None,
            Namespace::Joined(path) => Some((name.to_owned(), path.to_path_buf())),
            Namespace::Host => return refuse(&format!("needs a {name} namespace in linux.namespaces")),
        };
        sysctls.push(Sysctl {
            key: key.clone(),
            path,
            value: value.clone(),
            not_of_host,
        });
    }
    Ok(sysctls)
}

/// sysctl(8): the first separator decides which of `.` and `/` separates; the other one then stands for a dot in a name.
fn path_of(key: &str) -> String {
    match key.find(['.', '/']) {
        Some(at) if key.as_bytes()[at] == b'.' => key
            .chars()
            .map(|c| match c {
                '.' => '/',
                '/' => '.',
                c => c,
            })
            .collect(),
        _ => key.to_owned(),
    }
}
