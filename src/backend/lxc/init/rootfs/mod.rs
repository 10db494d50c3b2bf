//! The container's file system as init makes it: root, mounts, devices, sysctls, masked and read-only paths.
//!
//! ```text
//!  shim, on the host                      init, in the new namespaces
//!  Root::of     bundle → plan (pure)
//!  Root::open   copies of the host's ───▶ Root::mount   everything at its place, by descriptor
//!               mounts, as descriptors    Root::enter   pivot_root
//! ```
//!
//! No path is used twice: a place inside the root is found by openat2(2) or name by name, and what is mounted there is attached to the
//! descriptor that was found. Of what an image puts in the way nothing leads out of the root.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{OFlag, open},
    mount::{MntFlags, MsFlags, mount as mount2, umount2},
    sys::stat::{Mode, umask},
    unistd::{chdir, chroot, fchdir, pivot_root},
};
use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};

use super::proc::Proc;
use crate::{
    backend::lxc::system::Tmpfs,
    error::{Context, Result},
    rootfs::sys::{self, attr},
};

mod attach;
mod cgroups;
mod copy;
mod nodes;
mod place;
mod plan;
mod trees;
mod words;

#[cfg(test)]
mod tests;

use words::{Attributes, Propagation};

/// What init makes of a bundle's root, mounts, devices, sysctls, masked and read-only paths. Pure data.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
pub struct Root {
    /// On the host, absolute.
    path: PathBuf,
    read_only: bool,
    propagation: Propagation,
    no_pivot_root: bool,
    /// New or joined.
    user_namespace: bool,
    /// New or joined.
    cgroup_namespace: bool,
    /// The host's `/sys` may have to stand in for a new sysfs, which belongs to the owner of the network namespace.
    sys_of_host: bool,
    mounts: Vec<plan::Mount>,
    /// `/dev` is a bind; nothing is made in it.
    dev_of_host: bool,
    devices: Vec<plan::Device>,
    masked_paths: Vec<PathBuf>,
    read_only_paths: Vec<PathBuf>,
    sysctls: Vec<plan::Sysctl>,
    /// `linux.mountLabel`, for a kernel with SELinux.
    label: Option<String>,
}

/// A root that is complete and that nobody has entered.
#[derive(Debug)]
pub struct Mounted {
    root: OwnedFd,
    proc: Proc,
}

impl Root {
    /// The plan of a bundle, which is an absolute path. With `no_pivot_root` the root is moved over `/`, for a host that runs from an
    /// initramfs.
    ///
    /// # Errors
    /// `InvalidArgument` with the field that is wrong, or that cannot be honoured: `mounts[3].options: …`.
    pub fn of(spec: &Spec, bundle: &Path, no_pivot_root: bool) -> Result<Self> {
        plan::root(spec, bundle, no_pivot_root)
    }

    /// Adds what the init of a whole system expects: `wanted` where the bundle mounts nothing, and cgroups that it can manage, in the
    /// place of those that the bundle only shows.
    pub fn furnish(&mut self, wanted: &[Tmpfs]) {
        plan::furnish(self, wanted);
    }

    /// In the shim, with the host's mounts in view: what [`Root::mount`] attaches, in the order in which that wants it. Blocks. The
    /// descriptors are close-on-exec; nothing is left behind when they are closed. There may be more than one message can carry
    /// (unix(7), `SCM_MAX_FD`).
    ///
    /// # Errors
    /// The kernel's, with the field of the bundle; `InvalidArgument` when a sysctl would be the host's.
    pub fn open(&self) -> Result<Vec<OwnedFd>> {
        trees::open(self)
    }

    /// In init, in its namespaces and with the host's files still in view: makes everything, and enters nothing. MUST be called by a
    /// process of one thread, for it changes umask and working folder for the time of the call.
    ///
    /// # Errors
    /// The kernel's, with what was mounted or made and where. What was mounted until then goes with the mount namespace; what was made
    /// on the way (folders, nodes) stays in the root.
    pub fn mount(&self, trees: Vec<OwnedFd>) -> Result<Mounted> {
        let before = umask(Mode::empty());
        let mounted = attach::all(self, trees);
        umask(before);
        mounted
    }

    /// In init, after the hooks that want to run before: `/` is the container's root afterwards and the working folder, and nothing of
    /// the host's is mounted any more. Gives procfs back, which stays usable.
    ///
    /// # Errors
    /// The kernel's; init is of no use then.
    pub fn enter(&self, mounted: Mounted) -> Result<Proc> {
        let Mounted { root, proc } = mounted;
        fchdir(&root).context(|| "cannot go to the container's root")?;
        if self.no_pivot_root {
            move_over(&root)?;
        } else {
            pivot()?;
        }
        chdir("/").context(|| "cannot go to the container's root")?;
        if self.read_only {
            let read_only = Attributes {
                set: attr::RDONLY,
                clear: 0,
            };
            trees::set(&root, false, read_only).context(|| "root.readonly: cannot make the root read-only")?;
        }
        // Last, for pivot_root(2) refuses a shared root. What is mounted below got its kind when it was mounted.
        trees::propagate(&root, false, self.propagation.kind)
            .context(|| "linux.rootfsPropagation: cannot set the kind of the root")?;
        Ok(proc)
    }
}

/// The working folder becomes `/`, without a folder inside for the old root: that is mounted over the new one and taken away again.
fn pivot() -> Result<()> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let old = open("/", flags, Mode::empty()).context(|| "cannot open /")?;
    pivot_root(".", ".").context(|| "cannot pivot to the container's root")?;
    fchdir(&old).context(|| "cannot go back to the host's root")?;
    // Or the host's mounts would be taken away with ours.
    let none: Option<&str> = None;
    mount2(none, ".", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .context(|| "cannot part the old root from the host's")?;
    umount2(".", MntFlags::MNT_DETACH).context(|| "cannot detach the host's root")
}

/// The working folder, which `root` holds, becomes `/`, and the host's root stays below it, where nothing leads.
fn move_over(root: &OwnedFd) -> Result<()> {
    // Two whole ones are left in view otherwise (mount_namespaces(7)), or covered only. They may be gone already.
    for point in ["/proc", "/sys"] {
        let _ = umount2(point, MntFlags::MNT_DETACH);
    }
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let old = open("/", flags, Mode::empty()).context(|| "cannot open /")?;
    sys::move_mount(root.as_fd(), old.as_fd()).context(|| "cannot move the container's root over the host's")?;
    chroot(".").context(|| "cannot make the container's root the root")
}
