//! Unmounting everything at and below a rootfs. Blocks: for a thread of its own.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    mount::{MntFlags, umount2},
    sys::stat::Mode,
};

use super::{mount::proc_path, mountinfo};
use crate::error::{Context, Error, Result};

/// How long mounts may stay busy in all before they are unmounted lazily. A process that was just killed lets go within milliseconds.
const BUSY_FOR: Duration = Duration::from_millis(500);

/// First pause before a busy mount is tried again; it doubles.
const BUSY_PAUSE: Duration = Duration::from_millis(5);

/// How often mountinfo is read before we say that somebody mounts faster than we unmount.
const ROUNDS: u32 = 64;

/// Room for a usual mountinfo; more is read all the same.
const MOUNTINFO_BYTES: usize = 32 << 10;

/// Unmounts everything at and below `rootfs`; see [`super::release`].
pub(super) fn all(rootfs: &Path) -> Result<()> {
    let Some(path) = real(rootfs)? else { return Ok(()) };
    let patience = Instant::now() + BUSY_FOR;
    for _ in 0..ROUNDS {
        let points = mounted(&path)?;
        if points.is_empty() {
            return Ok(());
        }
        let mut errors = Vec::new();
        let mut progress = false;
        // A mount comes after the one that it stands on, so backwards is from the leaves to the root. One that is hidden by a later
        // mount is reached in the next round.
        for point in points.iter().rev() {
            match unmount(&path, point, patience) {
                Ok(unmounted) => progress |= unmounted,
                Err(e) => errors.push(e),
            }
        }
        if progress {
            continue;
        }
        if mounted(&path)?.len() < points.len() {
            // Somebody else unmounts too.
            continue;
        }
        return Err(Error::all(errors).unwrap_or_else(|| {
            Error::precondition(format!(
                "cannot unmount {}: it is hidden by a mount of another folder",
                points[points.len() - 1].display()
            ))
        }));
    }
    Err(Error::unavailable(format!(
        "rootfs {} is mounted anew as fast as it is unmounted",
        rootfs.display()
    )))
}

/// `rootfs` as mountinfo would call it; `None` when its parent folder is gone, and with it everything in it.
fn real(rootfs: &Path) -> Result<Option<PathBuf>> {
    let (Some(parent), Some(name)) = (rootfs.parent(), rootfs.file_name()) else {
        return Ok(None);
    };
    match fs::canonicalize(parent) {
        Ok(parent) => Ok(Some(parent.join(name))),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(e) => Err(e).context(|| format!("cannot resolve {}", parent.display())),
    }
}

/// Where something is mounted at and below `path`, one entry for each mount, in the order of mountinfo.
fn mounted(path: &Path) -> Result<Vec<PathBuf>> {
    // Of this thread, whose mount namespace need not be that of the process.
    // In few reads: between two of them the list may change.
    let mut text = Vec::with_capacity(MOUNTINFO_BYTES);
    File::open("/proc/thread-self/mountinfo")
        .and_then(|mut file| file.read_to_end(&mut text))
        .context(|| "cannot read mountinfo")?;
    let points = mountinfo::parse(&text).map(|entry| entry.mount_point);
    Ok(points
        .filter(|point| point.starts_with(path))
        .map(|point| point.into_owned())
        .collect())
}

/// Takes the topmost mount at `point` away. `false` when there is none that can be seen.
fn unmount(rootfs: &Path, point: &Path, patience: Instant) -> Result<bool> {
    let Some((folder, name)) = parent(rootfs, point)? else {
        return Ok(false);
    };
    // From the parent folder on, which is held open: nobody can lead us elsewhere.
    let path = proc_path(&folder).join(name);
    let what = || format!("cannot unmount {}", point.display());
    let mut pause = BUSY_PAUSE;
    loop {
        match umount2(&path, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => return Ok(true),
            Err(nix::Error::EINVAL | nix::Error::ENOENT) => return Ok(false),
            Err(nix::Error::EBUSY) if Instant::now() < patience => {
                thread::sleep(pause);
                pause *= 2;
            }
            Err(nix::Error::EBUSY) => break,
            Err(e) => return Err(e).context(what),
        }
    }
    match umount2(&path, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH) {
        Ok(()) => {
            log::warn!("{} is still in use; it was unmounted lazily", point.display());
            Ok(true)
        }
        Err(nix::Error::EINVAL | nix::Error::ENOENT) => Ok(false),
        Err(e) => Err(e).context(what),
    }
}

/// The folder that holds `point`, and the name in it; `None` when it cannot be reached, which later mounts may change.
fn parent<'a>(rootfs: &Path, point: &'a Path) -> Result<Option<(OwnedFd, &'a OsStr)>> {
    let (Some(folder), Some(name)) = (point.parent(), point.file_name()) else {
        return Ok(None);
    };
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let opened = match folder.strip_prefix(rootfs) {
        // `point` is the rootfs itself; its parent has no symlinks left.
        Err(_) => nix::fcntl::open(folder, flags | OFlag::O_NOFOLLOW, Mode::empty()),
        Ok(below) => nix::fcntl::open(rootfs, flags | OFlag::O_NOFOLLOW, Mode::empty()).and_then(|root| {
            if below.as_os_str().is_empty() {
                return Ok(root);
            }
            let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS;
            openat2(&root, below, OpenHow::new().flags(flags).resolve(resolve))
        }),
    };
    match opened {
        Ok(folder) => Ok(Some((folder, name))),
        Err(nix::Error::ENOENT | nix::Error::ENOTDIR | nix::Error::ELOOP) => Ok(None),
        Err(e) => Err(e).context(|| format!("cannot open {}", folder.display())),
    }
}
