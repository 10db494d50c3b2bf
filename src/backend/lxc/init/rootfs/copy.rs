//! Copies a folder into a fresh tmpfs, for the option `tmpcopyup`.

use std::{
    ffi::{CStr, OsStr},
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::ffi::OsStrExt,
    },
};

use nix::{
    dir::Dir,
    fcntl::{AtFlags, OFlag, openat, readlinkat},
    sys::{
        stat::{FileStat, Mode, SFlag, UtimensatFlags, fchmod, fchmodat, fstat, futimens, mkdirat, mknodat, utimensat},
        time::TimeSpec,
    },
    unistd::{Gid, Uid, fchown, fchownat, symlinkat},
};

use super::place::stat_at;
use crate::{
    backend::lxc::init::io_errno,
    error::{Context, Error, Result},
};

/// How deep folders may lie in each other: each level holds three descriptors.
const DEPTH_MAX: u32 = 200;

/// Copies what is in `from` into `to`: folders, files, symlinks and nodes, with owners, modes, times and extended attributes. With
/// `top`, those of `from` itself as well. Hard links become files of their own.
pub(super) fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>, top: bool) -> Result<()> {
    let from: File = openat(from, ".", folder(), Mode::empty())
        .context(|| "cannot read the folder to copy")?
        .into();
    let to: File = openat(to, ".", folder(), Mode::empty())
        .context(|| "cannot open the new tmpfs")?
        .into();
    contents(&from, &to, 0)?;
    if top {
        let stat = fstat(&from).context(|| "cannot stat the folder to copy")?;
        metadata(&from, &to, &stat).context(|| "cannot copy the owner and mode of the folder")?;
    }
    Ok(())
}

fn folder() -> OFlag {
    OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC
}

fn contents(from: &File, to: &File, depth: u32) -> Result<()> {
    if depth > DEPTH_MAX {
        return Err(Error::invalid(format!("folders lie more than {DEPTH_MAX} deep")));
    }
    let again = openat(from, ".", folder(), Mode::empty()).context(|| "cannot read a folder")?;
    let mut entries = Dir::from_fd(again).context(|| "cannot read a folder")?;
    for entry in entries.iter() {
        let entry = entry.context(|| "cannot read a folder")?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            one(from, to, name, depth).context(|| format!("cannot copy {:?}", name.to_string_lossy()))?;
        }
    }
    Ok(())
}

fn one(from: &File, to: &File, name: &CStr, depth: u32) -> Result<()> {
    let name = OsStr::from_bytes(name.to_bytes());
    let stat = stat_at(from.as_fd(), name).context(|| "cannot stat it")?;
    let read = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    match stat.st_mode & libc::S_IFMT {
        libc::S_IFDIR => {
            let source: File = openat(from, name, folder(), Mode::empty())
                .context(|| "cannot open it")?
                .into();
            mkdirat(to, name, Mode::S_IRWXU).context(|| "cannot make it")?;
            let copy: File = openat(to, name, folder(), Mode::empty())
                .context(|| "cannot open the copy")?
                .into();
            contents(&source, &copy, depth + 1)?;
            metadata(&source, &copy, &stat).context(|| "cannot copy its attributes")
        }
        libc::S_IFREG => {
            let mut source: File = openat(from, name, read, Mode::empty())
                .context(|| "cannot open it")?
                .into();
            let write = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let mut copy: File = openat(to, name, write, Mode::S_IRUSR | Mode::S_IWUSR)
                .context(|| "cannot make it")?
                .into();
            io::copy(&mut source, &mut copy).context(|| "cannot copy its contents")?;
            metadata(&source, &copy, &stat).context(|| "cannot copy its attributes")
        }
        kind => nameless(from, to, name, &stat, kind).context(|| "cannot make it"),
    }
}

/// What cannot be opened for its attributes: symlinks and nodes.
fn nameless(from: &File, to: &File, name: &OsStr, stat: &FileStat, kind: libc::mode_t) -> nix::Result<()> {
    if kind == libc::S_IFLNK {
        symlinkat(readlinkat(from, name)?.as_os_str(), to, name)?;
    } else {
        let kind = SFlag::from_bits_truncate(kind);
        mknodat(to, name, kind, Mode::from_bits_truncate(stat.st_mode), stat.st_rdev)?;
    }
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    fchownat(to, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)?;
    if kind != libc::S_IFLNK {
        let mode = Mode::from_bits_truncate(stat.st_mode);
        fchmodat(to, name, mode, nix::sys::stat::FchmodatFlags::FollowSymlink)?;
    }
    let (accessed, modified) = times(stat);
    utimensat(to, name, &accessed, &modified, UtimensatFlags::NoFollowSymlink)
}

fn times(stat: &FileStat) -> (TimeSpec, TimeSpec) {
    (
        TimeSpec::new(stat.st_atime, stat.st_atime_nsec),
        TimeSpec::new(stat.st_mtime, stat.st_mtime_nsec),
    )
}

fn metadata(from: &File, to: &File, stat: &FileStat) -> nix::Result<()> {
    fchown(to, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
    // After the owner, whose change takes set-user-id away.
    fchmod(to, Mode::from_bits_truncate(stat.st_mode))?;
    extended(from, to)?;
    let (accessed, modified) = times(stat);
    futimens(to, &accessed, &modified)
}

/// Extended attributes, as far as both file systems have them.
fn extended(from: &File, to: &File) -> nix::Result<()> {
    let read = |call: &dyn Fn(*mut u8, usize) -> libc::ssize_t| -> nix::Result<Vec<u8>> {
        // Lists and values have 64 KiB at most (xattr(7)).
        let mut buffer = vec![0_u8; 64 << 10];
        let length = call(buffer.as_mut_ptr(), buffer.len());
        let length = usize::try_from(length).map_err(|_| io_errno(io::Error::last_os_error()))?;
        buffer.truncate(length);
        Ok(buffer)
    };
    // SAFETY: the buffer has the length that is passed, the descriptor is open.
    let names = read(&|buffer, length| unsafe { libc::flistxattr(from.as_raw_fd(), buffer.cast(), length) });
    let names = match names {
        Err(nix::Error::EOPNOTSUPP) => return Ok(()),
        names => names?,
    };
    for name in names.split_inclusive(|&byte| byte == 0) {
        let Ok(name) = CStr::from_bytes_with_nul(name) else {
            continue;
        };
        // SAFETY: as above; the name is NUL-terminated.
        let value =
            read(&|buffer, length| unsafe { libc::fgetxattr(from.as_raw_fd(), name.as_ptr(), buffer.cast(), length) });
        let Ok(value) = value else { continue };
        // SAFETY: name and value live through the call, the length is the value's.
        let set = unsafe { libc::fsetxattr(to.as_raw_fd(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
        match (set, io_errno(io::Error::last_os_error())) {
            (0, _) | (_, nix::Error::EOPNOTSUPP | nix::Error::EPERM) => {}
            (_, e) => return Err(e),
        }
    }
    Ok(())
}
