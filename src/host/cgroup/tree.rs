//! Walks over a cgroup and what lies below it.
//!
//! A container may nest cgroups deeper than a path can name (PATH_MAX) or a recursion can go, so the walks hold one descriptor, go
//! down by name and up by `..`. A cgroup cannot be moved to another parent, so `..` always leads back.

use std::{
    collections::BTreeSet,
    ffi::CString,
    io::{self, Read},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use nix::{
    dir::{Dir, Type},
    fcntl::{OFlag, openat},
    sys::stat::{Mode, fstat},
    unistd::{UnlinkatFlags, unlinkat},
};

use super::{is_gone, parse};

const FOLDER: OFlag = OFlag::O_RDONLY
    .union(OFlag::O_DIRECTORY)
    .union(OFlag::O_NOFOLLOW)
    .union(OFlag::O_CLOEXEC);

fn open(folder: &Path) -> io::Result<OwnedFd> {
    Ok(nix::fcntl::open(folder, FOLDER, Mode::empty())?)
}

/// The names of the cgroups right below.
fn children(at: BorrowedFd<'_>) -> io::Result<Vec<CString>> {
    // kernfs counts sub-folders as links, like most file systems: the common leaf needs no listing of its sixty files.
    if fstat(at)?.st_nlink == 2 {
        return Ok(Vec::new());
    }
    let mut dir = Dir::openat(at, ".", FOLDER, Mode::empty())?;
    let mut names = Vec::new();
    for entry in dir.iter() {
        let entry = entry?;
        let name = entry.file_name();
        if entry.file_type() == Some(Type::Directory) && name != c"." && name != c".." {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

/// Calls `visit` with the cgroup and everything below, parents first. What vanishes meanwhile is skipped.
///
/// # Errors
/// The first one of `visit` or the operating system; ENOENT only if `folder` itself is gone.
pub(super) fn walk(folder: &Path, visit: &mut dyn FnMut(BorrowedFd<'_>) -> io::Result<()>) -> io::Result<()> {
    let mut at = open(folder)?;
    visit(at.as_fd())?;
    let mut levels = vec![children(at.as_fd())?];
    while let Some(names) = levels.last_mut() {
        let Some(name) = names.pop() else {
            levels.pop();
            if !levels.is_empty() {
                at = openat(&at, "..", FOLDER, Mode::empty())?;
            }
            continue;
        };
        match openat(&at, name.as_c_str(), FOLDER, Mode::empty()) {
            Ok(child) => {
                let below = visit(child.as_fd()).and_then(|()| children(child.as_fd()));
                match below {
                    Err(e) if is_gone(&e) => {}
                    below => {
                        levels.push(below?);
                        at = child;
                    }
                }
            }
            Err(nix::Error::ENOENT) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// The text of a file of a cgroup.
pub(super) fn read_at(at: BorrowedFd<'_>, file: &str) -> io::Result<String> {
    let fd = openat(
        at,
        file,
        OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?;
    let mut bytes = Vec::with_capacity(4 << 10);
    std::fs::File::from(fd).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Writes into a file of a cgroup.
pub(super) fn write_at(at: BorrowedFd<'_>, file: &str, value: &str) -> io::Result<()> {
    use std::io::Write;
    let fd = openat(
        at,
        file,
        OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?;
    std::fs::File::from(fd).write_all(value.as_bytes())
}

/// The processes of the cgroup and everything below.
pub(super) fn pids(folder: &Path) -> io::Result<BTreeSet<u32>> {
    let mut pids = BTreeSet::new();
    walk(folder, &mut |at| match read_at(at, "cgroup.procs") {
        Ok(text) => {
            pids.extend(parse::pids(&text));
            Ok(())
        }
        // A threaded cgroup of v2: its processes are listed at the root of the threaded subtree.
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
        Err(e) => Err(e),
    })?;
    Ok(pids)
}

/// Removes the cgroup and everything below, deepest first; absence is success. Goes on past what cannot be removed.
///
/// # Errors
/// The last one; EBUSY means that processes (or cgroups, made meanwhile) are left.
pub(super) fn remove(folder: &Path) -> io::Result<()> {
    /// One level of the descent: the names still to be removed at the place where the descriptor stands.
    struct Level {
        name: CString,
        children: Vec<CString>,
    }

    let mut result = Ok(());
    let mut at = match open(folder) {
        Err(e) if is_gone(&e) => return Ok(()),
        at => at?,
    };
    let mut top = children(at.as_fd())?;
    let mut levels: Vec<Level> = Vec::new();
    loop {
        let next = levels.last_mut().map_or(&mut top, |level| &mut level.children).pop();
        if let Some(name) = next {
            // Most have no children of their own: one call.
            match unlinkat(&at, name.as_c_str(), UnlinkatFlags::RemoveDir) {
                Ok(()) | Err(nix::Error::ENOENT) => continue,
                Err(nix::Error::EBUSY | nix::Error::ENOTEMPTY) => {}
                Err(e) => {
                    result = Err(e.into());
                    continue;
                }
            }
            match openat(&at, name.as_c_str(), FOLDER, Mode::empty()) {
                Ok(child) => {
                    let children = children(child.as_fd())?;
                    if children.is_empty() {
                        // Busy by processes, not by children.
                        result = Err(nix::Error::EBUSY.into());
                        continue;
                    }
                    at = child;
                    levels.push(Level { name, children });
                }
                Err(nix::Error::ENOENT) => {}
                Err(e) => result = Err(e.into()),
            }
            continue;
        }
        let Some(done) = levels.pop() else { break };
        at = openat(&at, "..", FOLDER, Mode::empty())?;
        match unlinkat(&at, done.name.as_c_str(), UnlinkatFlags::RemoveDir) {
            Ok(()) | Err(nix::Error::ENOENT) => {}
            Err(e) => result = Err(e.into()),
        }
    }
    drop(at);
    match std::fs::remove_dir(folder) {
        Err(e) if !is_gone(&e) => Err(e),
        _ => result,
    }
}
