//! Places inside the root: found and made by descriptor, so that nothing that an image or another process puts in the way leads out.

use std::{
    ffi::{OsStr, OsString},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Component, Path},
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, openat, readlinkat},
    sys::stat::{FileStat, Mode, fstat, mkdirat},
    unistd::{UnlinkatFlags, unlinkat},
};

use crate::{
    backend::lxc::init::io_errno,
    rootfs::mount::{LOOKUP_TRIES, find},
};

/// As many symlinks as the kernel follows on one path.
const SYMLINKS_MAX: u32 = 40;

/// What is made of a place that is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Make {
    Folder,
    File,
}

/// The last name of a path, and the folder that it is in.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) parent: OwnedFd,
    pub(super) name: OsString,
}

impl Entry {
    /// What the name itself is, a symlink too, as an `O_PATH` descriptor.
    pub(super) fn open(&self) -> nix::Result<OwnedFd> {
        openat(
            &self.parent,
            self.name.as_os_str(),
            OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC,
            Mode::empty(),
        )
    }

    pub(super) fn unlink(&self) -> nix::Result<()> {
        unlinkat(&self.parent, self.name.as_os_str(), UnlinkatFlags::NoRemoveDir)
    }

    /// A new empty file.
    pub(super) fn file(&self) -> nix::Result<()> {
        file(self.parent.as_fd(), &self.name)
    }
}

pub(super) fn is(stat: &FileStat, kind: libc::mode_t) -> bool {
    stat.st_mode & libc::S_IFMT == kind
}

/// As [`find`], and what is missing of it is made, mode 0755.
pub(super) fn make(root: BorrowedFd<'_>, path: &Path, what: Make, symlinks: bool) -> nix::Result<OwnedFd> {
    match find(root, path, symlinks) {
        Err(Errno::ENOENT) => walk(root, path, what, symlinks),
        found => found,
    }
}

/// The folder of the last name of `path`, made if it is missing.
pub(super) fn entry(root: BorrowedFd<'_>, path: &Path) -> nix::Result<Entry> {
    let name = path.file_name().ok_or(Errno::EINVAL)?.to_owned();
    let parent = match path.parent() {
        Some(parent) if parent.components().any(|part| part != Component::RootDir) => {
            make(root, parent, Make::Folder, true)?
        }
        _ => root.try_clone_to_owned().map_err(io_errno)?,
    };
    Ok(Entry { parent, name })
}

/// Name by name, for openat2(2) makes no folders, and a symlink may lead to where nothing is yet. `..` goes back to a folder that was
/// passed and is held open, so it never gets above `root`.
fn walk(root: BorrowedFd<'_>, path: &Path, what: Make, symlinks: bool) -> nix::Result<OwnedFd> {
    let mut passed: Vec<OwnedFd> = Vec::new();
    let mut rest = Vec::new();
    push(&mut rest, path);
    let mut followed = 0;
    let mut lost_races = 0;
    while let Some(name) = rest.pop() {
        if name == ".." {
            passed.pop();
            continue;
        }
        let here = passed.last().map_or(root, AsFd::as_fd);
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        match openat(here, name.as_os_str(), flags, Mode::empty()) {
            Ok(found) if is(&fstat(&found)?, libc::S_IFLNK) => {
                followed += 1;
                if followed > SYMLINKS_MAX || !symlinks {
                    return Err(Errno::ELOOP);
                }
                let target = readlinkat(&found, "")?;
                if Path::new(&target).is_absolute() {
                    passed.clear();
                }
                push(&mut rest, Path::new(&target));
            }
            Ok(found) => passed.push(found),
            Err(Errno::ENOENT) => {
                let made = if rest.is_empty() && what == Make::File {
                    file(here, &name)
                } else {
                    mkdirat(here, name.as_os_str(), Mode::from_bits_truncate(0o755))
                };
                match made {
                    Err(Errno::EEXIST) if lost_races < LOOKUP_TRIES => lost_races += 1,
                    made => made?,
                }
                rest.push(name);
            }
            Err(e) => return Err(e),
        }
    }
    match passed.pop() {
        Some(last) => Ok(last),
        None => root.try_clone_to_owned().map_err(io_errno),
    }
}

fn push(rest: &mut Vec<OsString>, path: &Path) {
    let parts = path.components().rev().filter_map(|part| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsStr::new("..").to_owned()),
        _ => None,
    });
    rest.extend(parts);
}

fn file(parent: BorrowedFd<'_>, name: &OsStr) -> nix::Result<()> {
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(parent, name, flags, Mode::from_bits_truncate(0o755)).map(drop)
}

/// Metadata of a name without following it.
pub(super) fn stat_at(parent: BorrowedFd<'_>, name: &OsStr) -> nix::Result<FileStat> {
    nix::sys::stat::fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW)
}
