//! Puts everything at its place. Runs in init.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{OFlag, open, readlinkat},
    mount::{MsFlags, mount as mount2},
    sys::stat::{Mode, fstat},
    unistd::{fchdir, symlinkat},
};

use super::{
    Mounted, Root, cgroups, copy, nodes,
    place::{self, Make, is},
    plan::{Action, Mount},
    trees,
    words::{Attributes, Kind, Propagation},
};
use crate::{
    backend::lxc::init::proc::Proc,
    error::{Context, Error, Kind as ErrorKind, Result},
    rootfs::{
        mount::{Parameter, Refusal, attributes, find, fits_context, from_context, page_of, parameters},
        sys::{self, attr},
    },
};

/// Where a kernel with SELinux shows it.
const SELINUX: &str = "/sys/fs/selinux/enforce";

/// A root in the making.
pub(super) struct Work<'a> {
    pub(super) plan: &'a Root,
    pub(super) root: OwnedFd,
    pub(super) proc: Proc,
    /// The host's `/sys`, until it is used.
    sys_of_host: Option<OwnedFd>,
    /// Made read-only in the end, with their places.
    pub(super) read_only: Vec<(OwnedFd, PathBuf)>,
    /// Made unbindable in the end, recursively or not.
    unbindable: Vec<(OwnedFd, bool, PathBuf)>,
}

pub(super) fn all(plan: &Root, trees: Vec<OwnedFd>) -> Result<Mounted> {
    let mut trees = trees.into_iter();
    let mut next = || {
        let missing =
            || Error::invalid("fewer descriptors came than the plan wants; they and the plan must be of one bundle");
        trees.next().ok_or_else(missing)
    };
    let none: Option<&str> = None;
    // LXC did it. If it had not, the root would appear on the host, and pivot_root(2) would refuse.
    mount2(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)
        .context(|| "cannot part the mounts of init from the host's")?;
    let root = next()?;
    place_root(plan, &root)?;
    let proc = if plan.user_namespace {
        proc_below_user_namespace(next()?)?
    } else {
        Proc::open()?
    };
    let sys_of_host = if plan.sys_of_host { Some(next()?) } else { None };
    let mut work = Work {
        plan,
        root,
        proc,
        sys_of_host,
        read_only: Vec::new(),
        unbindable: Vec::new(),
    };
    for mount in &plan.mounts {
        let tree = match &mount.action {
            Action::Bind { .. } => Some(next()?),
            _ => None,
        };
        work.mount(mount, tree)?;
    }
    for device in &plan.devices {
        let tree = if trees::needs_tree(plan, device) {
            Some(next()?)
        } else {
            None
        };
        nodes::make(&work, device, tree)?;
    }
    if !plan.dev_of_host {
        nodes::symlinks(&work)?;
    }
    for sysctl in &plan.sysctls {
        work.proc
            .write(&format!("sys/{}", sysctl.path), &sysctl.value)
            .context(|| format!("linux.sysctl: {}", sysctl.key))?;
    }
    for (number, path) in plan.masked_paths.iter().enumerate() {
        let field = || format!("linux.maskedPaths[{number}]: cannot mask {}", path.display());
        mask(&work, path).context(field)?;
    }
    for (number, path) in plan.read_only_paths.iter().enumerate() {
        let field = || {
            format!(
                "linux.readonlyPaths[{number}]: cannot make {} read-only",
                path.display()
            )
        };
        work.read_only_path(path).context(field)?;
    }
    work.finish()
}

/// Over its own place on the host, so that hooks find the mounts at the path that the state tells them.
fn place_root(plan: &Root, root: &OwnedFd) -> Result<()> {
    if plan.propagation.recursive && plan.propagation.kind != Kind::Private {
        // What the bundle has mounted below the root gets the kind too.
        trees::propagate(root, true, plan.propagation.kind)
            .and_then(|()| trees::propagate(root, false, Kind::Private))
            .context(|| "linux.rootfsPropagation: cannot set the kind of what is below the root")?;
    }
    let folder = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let place = open(&plan.path, folder, Mode::empty())
        // In a user namespace the way there may be closed.
        .or_else(|_| open("/", folder, Mode::empty()))
        .context(|| "cannot open /")?;
    sys::move_mount(root.as_fd(), place.as_fd()).context(|| format!("cannot mount the root {}", plan.path.display()))
}

/// The kernel makes a new procfs in a user namespace only where a whole one is mounted already (mount_namespaces(7)), and LXC has taken
/// that away. So the host's comes back for as long as the host's root is there.
fn proc_below_user_namespace(of_host: OwnedFd) -> Result<Proc> {
    if let Ok(point) = open("/proc", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()) {
        sys::move_mount(of_host.as_fd(), point.as_fd()).context(|| "cannot put /proc of the host back")?;
    }
    match Proc::open() {
        // The pid namespace is not of this user namespace. The host's knows this process as well.
        Err(e) if e.kind() == ErrorKind::PermissionDenied => Ok(Proc::over(of_host)),
        proc => proc,
    }
}

/// `cannot mount "proc" at /proc`.
fn at(kind: &str, mount: &Mount) -> String {
    format!(
        "mounts[{}]: cannot mount {kind:?} at {}",
        mount.number,
        mount.destination.display()
    )
}

impl Work<'_> {
    fn mount(&mut self, mount: &Mount, tree: Option<OwnedFd>) -> Result<()> {
        match &mount.action {
            Action::Bind { source, .. } => {
                let tree = tree.ok_or_else(|| Error::unknown("a bind mount without a descriptor"))?;
                let what = || {
                    let (number, at) = (mount.number, mount.destination.display());
                    format!("mounts[{number}]: cannot bind {} at {at}", source.display())
                };
                self.bind(mount, tree).context(what)
            }
            Action::FileSystem { kind, .. } => self.file_system(mount).context(|| at(kind, mount)),
            Action::Cgroups { source, flags, .. } => {
                let flags = MsFlags::from_bits_retain(*flags);
                cgroups::mount(self, mount, source, flags).context(|| at("cgroup", mount))
            }
            Action::Remount { bind, flags, data } => {
                let flags = MsFlags::from_bits_retain(*flags);
                let what = || {
                    format!(
                        "mounts[{}]: cannot remount {}",
                        mount.number,
                        mount.destination.display()
                    )
                };
                self.remount(mount, *bind, flags, data).context(what)
            }
        }
    }

    fn bind(&mut self, mount: &Mount, tree: OwnedFd) -> Result<()> {
        let stat = fstat(&tree).context(|| "cannot stat the source")?;
        if is(&stat, libc::S_IFLNK) {
            return self.symlink(mount, &tree);
        }
        let what = if is(&stat, libc::S_IFDIR) {
            Make::Folder
        } else {
            Make::File
        };
        let place = self.place(&mount.destination, what, true)?;
        sys::move_mount(tree.as_fd(), place.as_fd()).context(|| "move_mount")?;
        self.settled(mount, tree)
    }

    /// The symlink that `source` holds, again at the place of the mount.
    fn symlink(&self, mount: &Mount, source: &OwnedFd) -> Result<()> {
        let target = readlinkat(source, "").context(|| "cannot read the symlink")?;
        let entry = place::entry(self.root.as_fd(), &mount.destination).context(|| "cannot make its folder")?;
        match symlinkat(target.as_os_str(), &entry.parent, entry.name.as_os_str()) {
            Err(nix::Error::EEXIST)
                if readlinkat(&entry.parent, entry.name.as_os_str()).is_ok_and(|there| there == target) =>
            {
                Ok(())
            }
            made => made.context(|| "cannot make the symlink"),
        }
    }

    /// The place of a mount, made if it is missing.
    pub(super) fn place(&self, path: &Path, what: Make, symlinks: bool) -> Result<OwnedFd> {
        place::make(self.root.as_fd(), path, what, symlinks).context(|| "cannot open or make the place in the root")
    }

    fn file_system(&mut self, mount: &Mount) -> Result<()> {
        let Action::FileSystem {
            kind,
            source,
            flags,
            data,
            copy_up,
        } = &mount.action
        else {
            return Err(Error::unknown("no file system"));
        };
        let flags = MsFlags::from_bits_retain(*flags);
        // Who writes to these trusts where they are: an image must not lead them elsewhere.
        let symlinks = !matches!(kind.as_str(), "proc" | "sysfs");
        let place = self.place(&mount.destination, Make::Folder, symlinks)?;
        let data = self.labelled(kind, data);
        let Some(parameters) = parameters(&data).filter(|_| fits_context(kind, flags)) else {
            return self.by_mount(mount, &place, (kind, source, flags, &data));
        };
        let made = from_context(kind, source, flags, &parameters);
        let detached = match (made, self.sys_of_host.take()) {
            (Err(refusal), Some(sys)) if kind == "sysfs" && is_refused(&refusal) => {
                let attributes = Attributes {
                    set: attributes(flags),
                    clear: 0,
                };
                trees::set(&sys, false, attributes).context(|| "cannot set the options of the host's /sys")?;
                sys
            }
            (made, unused) => {
                self.sys_of_host = unused;
                made?
            }
        };
        if *copy_up {
            let has = |key: &str| parameters.iter().any(|parameter: &Parameter<'_>| parameter.key == key);
            let top = !(has("mode") || has("uid") || has("gid"));
            copy::copy(place.as_fd(), detached.as_fd(), top).context(|| "tmpcopyup")?;
        }
        sys::move_mount(detached.as_fd(), place.as_fd()).context(|| "move_mount")?;
        self.settled(mount, detached)
    }

    /// By mount(2), for what fsconfig(2) has no words for.
    fn by_mount(
        &mut self,
        mount: &Mount,
        place: &OwnedFd,
        (kind, source, flags, data): (&str, &str, MsFlags, &[String]),
    ) -> Result<()> {
        if matches!(&mount.action, Action::FileSystem { copy_up: true, .. }) {
            return Err(Error::invalid("tmpcopyup goes with neither silent nor iversion"));
        }
        let page = page_of(data)?;
        inside(place, || {
            mount2(Some(source), ".", Some(kind), flags, Some(page.as_str())).context(|| "mount")
        })?;
        let mounted = find(self.root.as_fd(), &mount.destination, true).context(|| "cannot open the mount")?;
        self.settled(mount, mounted)
    }

    /// Options with the label that SELinux gives to files of the container, where a file system takes it from its mount.
    fn labelled(&self, kind: &str, data: &[String]) -> Vec<String> {
        let mut data = data.to_vec();
        let takes = !matches!(kind, "proc" | "sysfs" | "mqueue" | "cgroup" | "cgroup2");
        if let Some(label) = &self.plan.label
            && takes
            && !data.iter().any(|word| word.starts_with("context="))
            && Path::new(SELINUX).exists()
        {
            data.push(format!("context=\"{label}\""));
        }
        data
    }

    fn remount(&self, mount: &Mount, bind: bool, flags: MsFlags, data: &[String]) -> Result<()> {
        let there = find(self.root.as_fd(), &mount.destination, true).context(|| "cannot open it")?;
        if !bind {
            let page = page_of(data)?;
            let none: Option<&str> = None;
            let remount = flags | MsFlags::MS_REMOUNT;
            inside(&there, || {
                mount2(none, ".", none, remount, Some(page.as_str())).context(|| "mount")
            })?;
        } else {
            let all = attr::RDONLY | attr::NOSUID | attr::NODEV | attr::NOEXEC | attr::NODIRATIME | attr::NOSYMFOLLOW;
            let set = attributes(flags);
            let exactly = Attributes {
                set,
                clear: (all & !set) | attr::ATIME,
            };
            match trees::set(&there, false, exactly) {
                // What the kernel has locked stays.
                Err(e) if e.raw_os_error() == Some(libc::EPERM) => {
                    let clear = if set & attr::ATIME == 0 { 0 } else { attr::ATIME };
                    trees::set(&there, false, Attributes { set, clear })
                }
                set => set,
            }
            .context(|| "mount_setattr")?;
        }
        trees::set(&there, true, mount.recursive).context(|| "cannot set the recursive options")?;
        match mount.propagation {
            Some(Propagation { kind, recursive }) => {
                trees::propagate(&there, recursive, kind).context(|| "cannot set the propagation")
            }
            None => Ok(()),
        }
    }

    /// What remains to be done with a mount that is at its place.
    pub(super) fn settled(&mut self, mount: &Mount, mounted: OwnedFd) -> Result<()> {
        if !matches!(mount.action, Action::Bind { .. }) {
            trees::set(&mounted, true, mount.recursive).context(|| "cannot set the recursive options")?;
        }
        // Before anything is mounted inside: of a bind that is to be private, the host's is a peer up to here. It may have to be copied
        // for a read-only path yet, so it is made unbindable in the end.
        match mount.propagation {
            None => {}
            Some(Propagation {
                kind: Kind::Unbindable,
                recursive,
            }) => {
                trees::propagate(&mounted, recursive, Kind::Private).context(|| "cannot set the propagation")?;
                let mounted = duplicate(&mounted)?;
                self.unbindable.push((mounted, recursive, mount.destination.clone()));
            }
            Some(Propagation { kind, recursive }) => {
                trees::propagate(&mounted, recursive, kind).context(|| "cannot set the propagation")?;
            }
        }
        if mount.read_only {
            self.read_only.push((mounted, mount.destination.clone()));
        }
        Ok(())
    }

    fn read_only_path(&mut self, path: &Path) -> Result<()> {
        let Some(there) = present(self.root.as_fd(), path)? else {
            return Ok(());
        };
        let copy = sys::open_tree_clone_of(there.as_fd(), true).context(|| "open_tree")?;
        trees::propagate(&copy, true, Kind::Private).context(|| "cannot set the propagation")?;
        // Only the topmost mount, as with crun and runc: what the bundle has mounted below, it wants as it is.
        trees::set(&copy, false, READ_ONLY).context(|| "mount_setattr")?;
        sys::move_mount(copy.as_fd(), there.as_fd()).context(|| "move_mount")
    }

    fn finish(self) -> Result<Mounted> {
        for (mounted, path) in &self.read_only {
            trees::set(mounted, false, READ_ONLY).context(|| format!("cannot make {} read-only", path.display()))?;
        }
        for (mounted, recursive, path) in &self.unbindable {
            trees::propagate(mounted, *recursive, Kind::Unbindable)
                .context(|| format!("cannot make {} unbindable", path.display()))?;
        }
        Ok(Mounted {
            root: self.root,
            proc: self.proc,
        })
    }
}

const READ_ONLY: Attributes = Attributes {
    set: attr::RDONLY,
    clear: 0,
};

pub(super) fn duplicate(fd: &OwnedFd) -> Result<OwnedFd> {
    fd.try_clone().context(|| "cannot duplicate a descriptor")
}

pub(super) fn is_refused(refusal: &Refusal) -> bool {
    matches!(refusal.cause.raw_os_error(), Some(libc::EPERM | libc::EBUSY))
}

/// What is at `path`; `None` if nothing is.
fn present(root: BorrowedFd<'_>, path: &Path) -> Result<Option<OwnedFd>> {
    match find(root, path, true) {
        Err(nix::Error::ENOENT | nix::Error::ENOTDIR | nix::Error::EACCES) => Ok(None),
        found => found.map(Some).context(|| "cannot open it"),
    }
}

fn mask(work: &Work<'_>, path: &Path) -> Result<()> {
    let Some(there) = present(work.root.as_fd(), path)? else {
        return Ok(());
    };
    let stat = fstat(&there).context(|| "cannot stat it")?;
    let mask = if is(&stat, libc::S_IFDIR) {
        let data = work.labelled("tmpfs", &[]);
        let parameters = parameters(&data).unwrap_or_default();
        from_context("tmpfs", "tmpfs", MsFlags::MS_RDONLY, &parameters)?
    } else {
        null()?
    };
    sys::move_mount(mask.as_fd(), there.as_fd()).context(|| "move_mount")
}

/// The host's, for the container's may be anything.
fn null() -> Result<OwnedFd> {
    let null = sys::open_tree_clone("/dev/null", false).context(|| "cannot open /dev/null of the host")?;
    let stat = fstat(&null).context(|| "cannot stat /dev/null of the host")?;
    if !is(&stat, libc::S_IFCHR) || stat.st_rdev != libc::makedev(1, 3) {
        return Err(Error::precondition("/dev/null of the host is not the device c 1:3"));
    }
    trees::propagate(&null, false, Kind::Private).context(|| "cannot set the propagation")?;
    Ok(null)
}

/// Calls with `folder` as the working folder: mount(2) takes paths only, and without `/proc` a descriptor has no other one.
fn inside<T>(folder: &OwnedFd, call: impl FnOnce() -> Result<T>) -> Result<T> {
    let before = open(".", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).context(|| "cannot open .")?;
    fchdir(folder).context(|| "cannot go to the place in the root")?;
    let result = call();
    fchdir(before).context(|| "cannot go back")?;
    result
}
