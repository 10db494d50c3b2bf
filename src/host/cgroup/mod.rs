//! cgroups of a container: v1, hybrid and v2, by the kernel's files only; no program is spawned.
//!
//! - [`Cgroup`]: where a container's cgroup lies, its processes, freeze, signals, removal (`control`);
//! - `Cgroup::limit`: OCI resources as values of its files (`limits`);
//! - [`Metrics`]: what containerd's Stats answers;
//! - [`OomWatch`]: OOM kills;
//! - [`parse`]: the texts of the kernel, pure.
//!
//! Which hierarchy speaks: cgroup v2 when it is mounted on `/sys/fs/cgroup` (unified) or when there is no v1 at all. Otherwise
//! (legacy and hybrid) the v1 controllers do, and a v2 hierarchy beside them is only emptied and removed.

mod control;
mod limits;
mod metrics;
mod oom;
pub mod parse;
#[cfg(test)]
mod tests;
mod tree;
mod watch;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{self, Write as _},
    os::unix::fs::{MetadataExt, lchown},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use self::parse::Mount;
pub use self::{metrics::Metrics, oom::OomWatch};
use crate::error::{Context, Error, Result, kind_of_io};

/// Where the hierarchies are mounted by convention; crun looks nowhere else.
const ROOT: &str = "/sys/fs/cgroup";

/// The stack of a thread that reads and writes one small file.
const STACK_BYTES: usize = 32 << 10;

/// The name under which the v2 hierarchy of a hybrid host is kept beside the v1 controllers.
const UNIFIED: &str = "unified";

/// The file of a cgroup of v2 that names the controllers which it hands on.
const SUBTREE_CONTROL: &str = "cgroup.subtree_control";

/// A container's cgroup: a folder of v2, or a folder in each v1 hierarchy.
///
/// Never the root of a hierarchy, and never a cgroup that holds this process: the constructors refuse both, so that no call here
/// can freeze, kill or remove more than a container. It is plain data and fits into the record on disk; the folders may be gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cgroup {
    /// The folder in the unified hierarchy.
    V2(PathBuf),
    /// Controllers of a hierarchy as `/proc/<pid>/cgroup` lists them ("memory", "cpu,cpuacct", "name=systemd", and "unified" for a
    /// hybrid host's v2) → the folder in it.
    V1(BTreeMap<String, PathBuf>),
}

impl Cgroup {
    /// The cgroup in which a process is right now.
    ///
    /// Call it for init between create and start, while nothing in the container can have moved it. Where crun puts init into a
    /// sub-cgroup of the container (`<scope>/container` with systemd on v2) that sub-cgroup is the answer: it has the limits.
    ///
    /// v1 hierarchies in which the process sits in the root or with this process are left out.
    ///
    /// # Errors
    /// `NotFound` if the process or its folder is gone, `FailedPrecondition` if it sits in no cgroup of its own.
    pub fn of_process(pid: u32) -> Result<Self> {
        let text = read(Path::new(&format!("/proc/{pid}/cgroup")))
            .context(|| format!("cannot find the cgroup of process {pid}"))?;
        Host::read()?
            .resolve(&text)
            .context(|| format!("cannot find the cgroup of process {pid}"))
    }

    /// Where crun puts container `id`, for a fresh process that cleans up after a crash; `None` if nothing is there (any more), or
    /// if `cgroups_path` names the root of the hierarchy, which is no container's.
    ///
    /// `cgroups_path` is the spec's `linux.cgroupsPath`, `systemd` says whether crun was told to use systemd. With systemd this is
    /// the whole scope.
    ///
    /// # Errors
    /// `InvalidArgument` for a path with `..` and the like, `FailedPrecondition` if this process itself sits there, else the
    /// operating system's.
    pub fn expected(cgroups_path: Option<&str>, systemd: bool, id: &str) -> Result<Option<Self>> {
        let Some(below) = parse::container_path(cgroups_path, systemd, id)? else {
            return Ok(None);
        };
        let host = Host::read()?;
        let found = host.existing(&below)?;
        // crun falls back to a sibling of its own cgroup where it may not create `/<id>`. The shim's own is where it was started.
        if found.is_none() && cgroups_path.is_none() && !systemd {
            return host.sibling(id).map_or(Ok(None), |below| host.existing(&below));
        }
        Ok(found)
    }

    /// Whether cgroup v2 speaks for the container.
    pub fn is_v2(&self) -> bool {
        matches!(self, Self::V2(_))
    }

    /// The host pids of all processes in the cgroup and below it, ascending, each once. Zombies are not among them.
    ///
    /// # Errors
    /// `NotFound` "cgroup does not exist", else the operating system's.
    pub fn pids(&self) -> Result<Vec<u32>> {
        let folder = self.folder();
        let pids =
            tree::pids(folder).map_err(|e| self.error(e, || format!("list the processes of {}", folder.display())))?;
        Ok(pids.into_iter().collect())
    }

    /// The files `cgroup.procs` by which a process joins the container whose init is `init`, one for each hierarchy.
    ///
    /// On v2 a cgroup that hands on controllers takes no processes (cgroups(7), "no internal processes"): there it is the one of init.
    pub fn joinable(&self, init: u32) -> Vec<PathBuf> {
        let hands_on =
            |folder: &Path| fs::read_to_string(folder.join(SUBTREE_CONTROL)).is_ok_and(|list| !list.trim().is_empty());
        let of_init = match self {
            Self::V2(folder) if hands_on(folder) => Self::of_process(init).ok(),
            _ => None,
        };
        let folders = of_init.as_ref().unwrap_or(self).folders();
        folders.into_iter().map(|folder| folder.join("cgroup.procs")).collect()
    }

    /// Lets `during` move the process `pid`, which is in the cgroup `inner` inside this one, into this one, and takes it back: systemd
    /// moves the processes up that it is told of for a scope.
    ///
    /// On v2 a cgroup that hands on controllers takes no processes (cgroups(7), "no internal processes"), so it hands none on
    /// meanwhile. The controllers' files in `inner` are made anew: they keep their owners, and limits are lost.
    ///
    /// # Errors
    /// That of `during`, else the operating system's, never `NotFound`. The process is in either cgroup then, and no controllers may be
    /// handed on.
    pub fn lift(&self, inner: &str, pid: u32, during: impl FnOnce() -> Result<()>) -> Result<()> {
        let (folder, file) = (self.folder(), |name: &str| self.folder().join(name));
        let failed = |what: &str, path: &Path, e: io::Error| {
            Error::unknown(format!("cannot {what} {}", path.display())).with_source(e)
        };
        let read = |path: &Path| match self {
            Self::V2(_) => fs::read_to_string(path).map_err(|e| failed("read", path, e)),
            Self::V1(_) => Ok(String::new()),
        };
        let write = |path: &Path, text: &str| {
            let opened = fs::OpenOptions::new().write(true).open(path);
            let written = opened.and_then(|mut file| file.write_all(text.as_bytes()));
            written.map_err(|e| failed(&format!("write {text:?} to"), path, e))
        };
        let control = file(SUBTREE_CONTROL);
        let hand_on = |sign: &str, names: &[&str]| match names {
            [] => Ok(()),
            _ => write(
                &control,
                &names.iter().map(|name| format!("{sign}{name} ")).collect::<String>(),
            ),
        };
        let list = read(&control)?;
        let mut names: Vec<&str> = list.split_whitespace().collect();
        let delegated = owned_by_others(&folder.join(inner)).map_err(|e| failed("list", &folder.join(inner), e))?;
        hand_on("-", &names)?;
        during()?;
        for folder in self.folders() {
            write(&folder.join(inner).join("cgroup.procs"), &pid.to_string())?;
        }
        // systemd may have taken some away meanwhile (`DisableControllers=` of the slice).
        let left = read(&file("cgroup.controllers"))?;
        names.retain(|name| left.split_whitespace().any(|one| one == *name));
        hand_on("+", &names)?;
        for (path, user, group) in delegated {
            match lchown(&path, Some(user), Some(group)) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed("give away", &path, e)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Every folder once.
    fn folders(&self) -> BTreeSet<&Path> {
        match self {
            Self::V2(folder) => BTreeSet::from([folder.as_path()]),
            Self::V1(folders) => folders.values().map(PathBuf::as_path).collect(),
        }
    }

    /// The folder of a v1 controller.
    fn v1(&self, controller: &str) -> Option<&Path> {
        match self {
            Self::V2(_) => None,
            Self::V1(folders) => folders
                .iter()
                .find(|(names, _)| names.split(',').any(|name| name == controller))
                .map(|(_, folder)| folder.as_path()),
        }
    }

    /// The folder that is asked for processes and named in messages: all of crun's v1 folders hold the same processes.
    fn folder(&self) -> &Path {
        match self {
            Self::V2(folder) => folder,
            Self::V1(folders) => ["memory", "pids", "freezer"]
                .into_iter()
                .find_map(|controller| self.v1(controller))
                .or_else(|| folders.values().next().map(PathBuf::as_path))
                .unwrap_or(Path::new("")),
        }
    }

    /// An error of a file of this cgroup.
    fn error(&self, error: io::Error, what: impl FnOnce() -> String) -> Error {
        if is_gone(&error) {
            return Error::not_found("cgroup does not exist").with_source(error);
        }
        Error::new(kind_of_io(&error), format!("cannot {}", what())).with_source(error)
    }
}

/// Whether cgroup v2 speaks for the containers of this machine.
///
/// # Errors
/// The operating system's.
pub fn speaks_v2() -> Result<bool> {
    Ok(Host::read()?.mounts().1)
}

/// Puts a process (the shim) into the cgroup `path` of every hierarchy, made where it is missing, as containerd's runc shim does for
/// its option `ShimCgroup`. On a hybrid host v2 is left alone.
///
/// # Errors
/// `InvalidArgument` for a path with `..` or the root. Else all that went wrong: hierarchies that work are joined all the same, and
/// a folder made in vain is removed.
pub fn join(path: &str, pid: u32) -> Result<()> {
    let below = parse::relative(path)?;
    if below.as_os_str().is_empty() {
        return Err(Error::invalid(format!(
            "cannot join cgroup {path:?}: that is the root; name a cgroup below it"
        )));
    }
    Host::read()?.join(&below, pid)
}

/// Begins, in the background, what the kernel lets the next process wait for that changes its cgroup.
///
/// After some idle time that is a grace period of RCU, several milliseconds on a machine with a few processors (the lock
/// `cgroup_threadgroup_rwsem`, a percpu_rw_semaphore): a large part of what a container's creation takes. So this process asks first,
/// by going where it is. Whoever joins a cgroup soon finds the period over, or well under way.
pub fn expect_a_join() {
    let write = || {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        // One hierarchy will do; the lock is the same for all. Without one, whoever joins waits as ever.
        let _ = own_members(Path::new(ROOT), &own).find(|members| go(members).is_ok());
    };
    let _ = std::thread::Builder::new()
        .name("cgroup".into())
        .stack_size(STACK_BYTES)
        .spawn(write);
}

/// The files in a cgroup that are not root's, with user and group.
fn owned_by_others(folder: &Path) -> io::Result<Vec<(PathBuf, u32, u32)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let of = entry.metadata()?;
        if (of.uid(), of.gid()) != (0, 0) {
            found.push((entry.path(), of.uid(), of.gid()));
        }
    }
    Ok(found)
}

/// Puts this process into the cgroup of a file `cgroup.procs`.
fn go(members: &Path) -> io::Result<()> {
    fs::OpenOptions::new().write(true).open(members)?.write_all(b"0")
}

/// Files `cgroup.procs` of the cgroups that a `/proc/<pid>/cgroup` names, where hierarchies are mounted by convention.
fn own_members<'a>(root: &'a Path, own: &'a str) -> impl Iterator<Item = PathBuf> + use<'a> {
    // One above the cgroup namespace is told as "/../x".
    let hierarchies = parse::memberships(own).filter(|own| {
        matches!(own.controllers, "" | "freezer" | "pids") && !own.path.split('/').any(|name| name == "..")
    });
    hierarchies.map(move |own| {
        let path = own.path.trim_start_matches('/');
        root.join(own.controllers).join(path).join("cgroup.procs")
    })
}

/// How the hierarchies are mounted here, and where this process is in them.
struct Host {
    /// Where hierarchies are looked for first.
    root: PathBuf,
    mountinfo: String,
    own: String,
}

/// A hierarchy that speaks for containers here.
struct Hierarchy<'a> {
    /// As in `/proc/<pid>/cgroup`; empty for v2.
    controllers: &'a str,
    own_path: &'a str,
    /// Candidates, best first: what a container's tools see under the root, then any other place.
    mounts: Vec<&'a Mount<'a>>,
}

impl Host {
    fn read() -> Result<Self> {
        Ok(Self {
            root: PathBuf::from(ROOT),
            mountinfo: read(Path::new("/proc/self/mountinfo")).context(|| "cannot read the mounts")?,
            own: read(Path::new("/proc/self/cgroup")).context(|| "cannot read the cgroups of this process")?,
        })
    }

    /// The mounts that matter, and whether v2 speaks.
    fn mounts(&self) -> (Vec<Mount<'_>>, bool) {
        let mut on_root = None;
        let mut mounts: Vec<Mount<'_>> = Vec::new();
        for mount in parse::mounts(&self.mountinfo) {
            if mount.point == self.root {
                on_root = Some(mount.fs_type == "cgroup2");
            }
            // Hidden by what was mounted at the same place later.
            mounts.retain(|former| former.point != mount.point);
            if matches!(mount.fs_type, "cgroup" | "cgroup2") {
                mounts.push(mount);
            }
        }
        let unified = on_root == Some(true) || mounts.iter().all(|mount| mount.fs_type == "cgroup2");
        (mounts, unified)
    }

    /// Calls `visit` with each hierarchy that speaks; on a hybrid host with v2 as well, after v1.
    fn each<T>(&self, mut visit: impl FnMut(&Hierarchy<'_>) -> Option<T>) -> (Vec<T>, bool) {
        let (mounts, unified) = self.mounts();
        let found = parse::memberships(&self.own)
            .filter(|own| !unified || own.controllers.is_empty())
            .filter_map(|own| {
                let mut candidates: Vec<&Mount<'_>> = mounts
                    .iter()
                    .filter(|mount| match own.controllers {
                        "" => mount.fs_type == "cgroup2",
                        controllers => mount.has_controllers(controllers),
                    })
                    .collect();
                // The latest mount of a place hides what was there.
                candidates.reverse();
                candidates.sort_by_key(|mount| !mount.point.starts_with(&self.root));
                visit(&Hierarchy {
                    controllers: own.controllers,
                    own_path: own.path,
                    mounts: candidates,
                })
            })
            .collect();
        (found, unified)
    }

    /// The cgroup that a `/proc/<pid>/cgroup` describes.
    fn resolve(&self, text: &str) -> Result<Cgroup> {
        let mut shared = false;
        let mut missing = false;
        let (found, unified) = self.each(|hierarchy| {
            let path = parse::memberships(text)
                .find(|member| member.controllers == hierarchy.controllers)?
                .path;
            if Path::new(hierarchy.own_path).starts_with(path) {
                shared = true;
                return None;
            }
            let folder = hierarchy
                .mounts
                .iter()
                .filter_map(|mount| parse::folder_in(&mount.root, &mount.point, path))
                .find(|folder| folder.is_dir());
            missing |= folder.is_none();
            Some((hierarchy.controllers.to_owned(), folder?))
        });
        match Cgroup::from_folders(found, unified) {
            Some(cgroup) => Ok(cgroup),
            None if shared && !missing => Err(Error::precondition(
                "it sits in the root or in the cgroup of this process, not in one of its own",
            )),
            None => Err(Error::not_found("cgroup does not exist")),
        }
    }

    /// The cgroup at `below` in every hierarchy, as far as it exists.
    fn existing(&self, below: &Path) -> Result<Option<Cgroup>> {
        let mut ours = None;
        let (found, unified) = self.each(|hierarchy| {
            let folder = hierarchy
                .mounts
                .iter()
                .map(|mount| mount.point.join(below))
                .find(|folder| folder.is_dir())?;
            let own = hierarchy
                .mounts
                .iter()
                .find_map(|mount| parse::folder_in(&mount.root, &mount.point, hierarchy.own_path));
            if own.is_some_and(|own| own.starts_with(&folder)) {
                ours = Some(folder);
                return None;
            }
            Some((hierarchy.controllers.to_owned(), folder))
        });
        if let Some(folder) = ours {
            return Err(Error::precondition(format!(
                "cgroup {} holds this process and so is not a container's; choose another cgroupsPath",
                folder.display()
            )));
        }
        Ok(Cgroup::from_folders(found, unified))
    }

    /// `id` beside our own cgroup, relative to the mount of v2; only there crun does that.
    fn sibling(&self, id: &str) -> Option<PathBuf> {
        let (found, unified) = self.each(|hierarchy| {
            let mount = hierarchy.mounts.first()?;
            let own = Path::new(hierarchy.own_path).strip_prefix(&mount.root).ok()?;
            Some(own.parent()?.join(id))
        });
        found.into_iter().next().filter(|_| unified)
    }

    fn join(&self, below: &Path, pid: u32) -> Result<()> {
        let mut errors = Vec::new();
        let (joined, _) = self.each(|hierarchy| {
            let (_, unified) = self.mounts();
            if hierarchy.controllers.is_empty() && !unified {
                return None;
            }
            let mount = hierarchy.mounts.first()?;
            match enter(&mount.point, below, hierarchy.controllers, pid) {
                Ok(()) => Some(()),
                Err(e) => {
                    let folder = mount.point.join(below);
                    errors.push(
                        Error::new(
                            kind_of_io(&e),
                            format!("cannot put process {pid} into cgroup {}", folder.display()),
                        )
                        .with_source(e),
                    );
                    None
                }
            }
        });
        match Error::all(errors) {
            Some(error) => Err(error),
            None if joined.is_empty() => Err(Error::unimplemented(format!(
                "cannot join cgroup {}: no cgroup hierarchy is mounted",
                below.display()
            ))),
            None => Ok(()),
        }
    }
}

impl Cgroup {
    fn from_folders(found: Vec<(String, PathBuf)>, unified: bool) -> Option<Self> {
        if unified {
            return found.into_iter().next().map(|(_, folder)| Self::V2(folder));
        }
        let folders: BTreeMap<String, PathBuf> = found
            .into_iter()
            .map(|(controllers, folder)| match controllers.as_str() {
                "" => (UNIFIED.to_owned(), folder),
                _ => (controllers, folder),
            })
            .collect();
        // A hybrid host's v2 alone has no controllers to speak with.
        folders
            .keys()
            .any(|controllers| controllers != UNIFIED)
            .then_some(Self::V1(folders))
    }
}

/// Makes the cgroup `below` and puts a process into it.
fn enter(point: &Path, below: &Path, controllers: &str, pid: u32) -> io::Result<()> {
    let mut folder = point.to_path_buf();
    let mut made = Vec::new();
    let mut result = Ok(());
    for part in below {
        let parent = folder.clone();
        folder.push(part);
        result = match fs::create_dir(&folder) {
            Ok(()) => {
                made.push(folder.clone());
                Ok(())
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(e) => Err(e),
        };
        // A new cpuset of v1 has no CPUs and takes no process.
        if result.is_ok() && controllers.split(',').any(|controller| controller == "cpuset") {
            result = inherit(&parent, &folder, "cpuset.cpus").and_then(|()| inherit(&parent, &folder, "cpuset.mems"));
        }
        if result.is_err() {
            break;
        }
    }
    let result = result.and_then(|()| write(&folder.join("cgroup.procs"), &pid.to_string()));
    if result.is_err() {
        for folder in made.iter().rev() {
            // Only what is empty goes; somebody else may have found a use for it meanwhile.
            let _ = fs::remove_dir(folder);
        }
    }
    result
}

fn inherit(parent: &Path, folder: &Path, file: &str) -> io::Result<()> {
    if !read(&folder.join(file))?.trim().is_empty() {
        return Ok(());
    }
    write(&folder.join(file), read(&parent.join(file))?.trim())
}

/// A kernel file as text; what is not UTF-8 (a name that a container chose) is replaced and then found nowhere.
fn read(path: &Path) -> io::Result<String> {
    let bytes = super::read_kernel_file(path)?;
    Ok(String::from_utf8(bytes).unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned()))
}

/// Writes a value into a kernel file, in one write as the kernel wants it. Never creates a file.
fn write(path: &Path, value: &str) -> io::Result<()> {
    use std::io::Write;
    let mut file = fs::OpenOptions::new().write(true).open(path)?;
    file.write_all(value.as_bytes())
}

/// Whether an error says that the cgroup was removed: open files of a removed one give ENODEV.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ESRCH))
}
