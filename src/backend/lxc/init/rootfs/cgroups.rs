//! The mount of type "cgroup": the container's own cgroups, whichever version the host has.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use nix::{
    fcntl::{OFlag, openat},
    mount::MsFlags,
    sys::{
        stat::{Mode, mkdirat},
        statfs::{CGROUP2_SUPER_MAGIC, statfs},
    },
    unistd::symlinkat,
};

use super::{
    attach::{Work, duplicate, is_refused},
    place::Make,
    plan::{Action, Mount},
    trees,
    words::{Attributes, Kind},
};
use crate::{
    error::{Context, Error, Result},
    host::cgroup::parse::{folder_in, memberships, mounts},
    rootfs::{
        mount::{Parameter, Refusal, attributes, from_context},
        sys,
    },
};

/// Where a host has its cgroups.
pub(super) const CGROUPS: &str = "/sys/fs/cgroup";

/// The hierarchy of v1 that systemd keeps its units in, which limits nothing.
const SYSTEMD: &str = "name=systemd";

pub(super) fn mount(work: &mut Work<'_>, mount: &Mount, source: &str, flags: MsFlags) -> Result<()> {
    let place = work.place(&mount.destination, Make::Folder, true)?;
    let host = statfs(CGROUPS).context(|| format!("cannot tell the version of {CGROUPS}"))?;
    if host.filesystem_type() == CGROUP2_SUPER_MAGIC {
        let detached = version_2(work, source, flags)?;
        sys::move_mount(detached.as_fd(), place.as_fd()).context(|| "move_mount")?;
        return work.settled(mount, detached);
    }
    let size = [Parameter::new("size=1024k"), Parameter::new("mode=755")];
    let top = from_context("tmpfs", source, flags, &size)?;
    sys::move_mount(top.as_fd(), place.as_fd()).context(|| "move_mount")?;
    version_1(work, mount, &top, flags)?;
    work.settled(mount, top)
}

/// The cgroups of this process, and what is mounted in its namespace.
fn own_cgroups(work: &Work<'_>) -> Result<(String, String)> {
    let read = |path: &str| work.proc.read(path).context(|| format!("cannot read /proc/{path}"));
    Ok((read("self/cgroup")?, read("self/mountinfo")?))
}

fn version_2(work: &Work<'_>, source: &str, flags: MsFlags) -> Result<OwnedFd> {
    if work.plan.cgroup_namespace {
        return match from_context("cgroup2", source, flags, &[]) {
            Err(refusal) if is_refused(&refusal) => copy(Path::new(CGROUPS), flags),
            made => Ok(made?),
        };
    }
    // A new mount would show the whole hierarchy.
    let (text, table) = own_cgroups(work)?;
    let own = memberships(&text).find(|membership| membership.controllers.is_empty());
    let folder = own.and_then(|own| {
        let mut all = mounts(&table).filter(|mount| mount.fs_type == "cgroup2");
        all.find_map(|mount| folder_in(&mount.root, &mount.point, own.path))
    });
    let folder = folder.ok_or_else(|| Error::not_found("the container's own cgroup is not mounted on the host"))?;
    copy(&folder, flags)
}

/// One mount for each hierarchy, named after its controllers, and a symlink for each controller of several.
fn version_1(work: &mut Work<'_>, mount: &Mount, top: &OwnedFd, flags: MsFlags) -> Result<()> {
    let (text, table) = own_cgroups(work)?;
    for own in memberships(&text).filter(|own| !own.controllers.is_empty()) {
        let name = match own.controllers {
            // The kernel's order of these is not the one of their folders.
            "net_prio,net_cls" => "net_cls,net_prio",
            "cpuacct,cpu" => "cpu,cpuacct",
            other => other.strip_prefix("name=").unwrap_or(other),
        };
        let what = || format!("cgroup {name}");
        if name.contains('/') {
            continue;
        }
        let hierarchy = if work.plan.cgroup_namespace {
            match of_namespace(own.controllers, flags) {
                // As when the host has the controller and no such mount.
                Err(refusal) if matches!(refusal.cause.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) => None,
                made => Some(made.map_err(Error::from).context(what)?),
            }
        } else {
            let folder = mounts(&table)
                .filter(|mount| mount.has_controllers(own.controllers))
                .find_map(|mount| folder_in(&mount.root, &mount.point, own.path));
            folder.map(|folder| copy(&folder, flags)).transpose().context(what)?
        };
        let Some(hierarchy) = hierarchy else { continue };
        mkdirat(top, name, Mode::from_bits_truncate(0o755)).context(what)?;
        let place = openat(
            top,
            name,
            OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC,
            Mode::empty(),
        )
        .context(what)?;
        sys::move_mount(hierarchy.as_fd(), place.as_fd()).context(what)?;
        if let Some(propagation) = mount.propagation {
            trees::propagate(&hierarchy, false, propagation.kind).context(what)?;
        }
        let delegated = matches!(mount.action, Action::Cgroups { delegated: true, .. });
        if mount.read_only || (delegated && own.controllers != SYSTEMD) {
            work.read_only
                .push((duplicate(&hierarchy)?, mount.destination.join(name)));
        }
        if name.contains(',') {
            for controller in name.split(',') {
                match symlinkat(name, top, controller) {
                    Ok(()) | Err(nix::Error::EEXIST) => {}
                    Err(e) => return Err(e).context(|| format!("cannot make the symlink {controller}")),
                }
            }
        }
    }
    Ok(())
}

/// A hierarchy as the cgroup namespace shows it.
fn of_namespace(controllers: &str, flags: MsFlags) -> Result<OwnedFd, Refusal> {
    let parameters: Vec<_> = controllers.split(',').map(Parameter::new).collect();
    from_context("cgroup", "cgroup", flags, &parameters)
}

/// A detached copy of a folder of the host's cgroups.
fn copy(folder: &Path, flags: MsFlags) -> Result<OwnedFd> {
    let tree = sys::open_tree_clone(folder, false).context(|| format!("cannot open {}", folder.display()))?;
    trees::propagate(&tree, false, Kind::Private).context(|| "cannot set the propagation")?;
    let set = attributes(flags);
    trees::set(&tree, false, Attributes { set, clear: 0 }).context(|| "mount_setattr")?;
    Ok(tree)
}
