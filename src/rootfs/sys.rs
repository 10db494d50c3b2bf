//! The kernel's mount API by descriptor (fsopen(2), open_tree(2), mount_setattr(2), …; Linux 5.12), which libc does not wrap.
//!
//! A mount that is made here is detached: nobody sees it and it is gone with its descriptor, until [`move_mount`] puts it somewhere.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use libc::{c_int, c_uint};
use nix::NixPath;

const OPEN_TREE_CLONE: c_uint = 1;
const OPEN_TREE_CLOEXEC: c_uint = libc::O_CLOEXEC as c_uint;
const FSOPEN_CLOEXEC: c_uint = 1;
const FSMOUNT_CLOEXEC: c_uint = 1;
const MOVE_MOUNT_F_EMPTY_PATH: c_uint = 0x04;
const MOVE_MOUNT_T_EMPTY_PATH: c_uint = 0x40;
const FSCONFIG_SET_FLAG: c_uint = 0;
const FSCONFIG_SET_STRING: c_uint = 1;
const FSCONFIG_CMD_CREATE: c_uint = 6;

/// Attributes of a mount (linux/mount.h).
pub(crate) mod attr {
    /// Read-only.
    pub(crate) const RDONLY: u64 = 0x01;
    /// No set-user-id programs.
    pub(crate) const NOSUID: u64 = 0x02;
    /// No device nodes.
    pub(crate) const NODEV: u64 = 0x04;
    /// No programs.
    pub(crate) const NOEXEC: u64 = 0x08;
    /// The field that holds relatime (0), [`NOATIME`] or [`STRICTATIME`].
    pub(crate) const ATIME: u64 = 0x70;
    /// Never update access times.
    pub(crate) const NOATIME: u64 = 0x10;
    /// Always update access times.
    pub(crate) const STRICTATIME: u64 = 0x20;
    /// Never update access times of folders.
    pub(crate) const NODIRATIME: u64 = 0x80;
    /// Map owners through a user namespace.
    pub(crate) const IDMAP: u64 = 0x0010_0000;
    /// Follow no symlinks.
    pub(crate) const NOSYMFOLLOW: u64 = 0x0020_0000;
}

/// `struct mount_attr` of mount_setattr(2).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct MountAttr {
    pub(crate) set: u64,
    pub(crate) clear: u64,
    pub(crate) propagation: u64,
    pub(crate) userns_fd: u64,
}

fn descriptor(result: libc::c_long) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so `result` is a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(result as c_int) })
}

fn done(result: libc::c_long) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A detached copy of the mount that holds `path`, from there on; with all mounts below it when `recursive`.
pub(crate) fn open_tree_clone<P: ?Sized + NixPath>(path: &P, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= libc::AT_RECURSIVE as c_uint;
    }
    let result = path.with_nix_path(|path| {
        // SAFETY: `path` is NUL-terminated and lives through the call.
        unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) }
    })?;
    descriptor(result)
}

/// The same for what `fd` holds, which may be an `O_PATH` descriptor.
pub(crate) fn open_tree_clone_of(fd: BorrowedFd<'_>, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH as c_uint;
    if recursive {
        flags |= libc::AT_RECURSIVE as c_uint;
    }
    // SAFETY: the path is an empty C string, the descriptor is open.
    descriptor(unsafe { libc::syscall(libc::SYS_open_tree, fd.as_raw_fd(), c"".as_ptr(), flags) })
}

/// Attaches the detached mount `from` on top of `to`.
pub(crate) fn move_mount(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: both paths are empty C strings, both descriptors are open.
    done(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            from.as_raw_fd(),
            c"".as_ptr(),
            to.as_raw_fd(),
            c"".as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH,
        )
    })
}

/// Changes attributes of `mount`; of all mounts below it too when `recursive`.
pub(crate) fn mount_setattr(mount: BorrowedFd<'_>, recursive: bool, attributes: &MountAttr) -> io::Result<()> {
    let mut flags = libc::AT_EMPTY_PATH;
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    // SAFETY: the path is an empty C string, `attributes` is a `struct mount_attr` of the size that is passed.
    done(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of::<MountAttr>(),
        )
    })
}

/// A file system that is being configured.
#[derive(Debug)]
pub(crate) struct FsContext(OwnedFd);

impl FsContext {
    /// fsopen(2).
    pub(crate) fn open(kind: &CStr) -> io::Result<Self> {
        // SAFETY: `kind` is NUL-terminated and lives through the call.
        descriptor(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), FSOPEN_CLOEXEC) }).map(Self)
    }

    fn config(&self, command: c_uint, key: Option<&CStr>, value: Option<&CStr>) -> io::Result<()> {
        let pointer = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
        // SAFETY: key and value are null or NUL-terminated, as the command wants them, and live through the call.
        done(unsafe {
            libc::syscall(
                libc::SYS_fsconfig,
                self.0.as_raw_fd(),
                command,
                pointer(key),
                pointer(value),
                0,
            )
        })
    }

    /// An option with a value. The kernel takes at most 255 bytes.
    pub(crate) fn set(&self, key: &CStr, value: &CStr) -> io::Result<()> {
        self.config(FSCONFIG_SET_STRING, Some(key), Some(value))
    }

    /// An option without a value.
    pub(crate) fn set_flag(&self, key: &CStr) -> io::Result<()> {
        self.config(FSCONFIG_SET_FLAG, Some(key), None)
    }

    /// Makes the file system, and a detached mount of it with `attributes` ([`attr`]).
    pub(crate) fn mount(&self, attributes: u64) -> io::Result<OwnedFd> {
        self.config(FSCONFIG_CMD_CREATE, None, None)?;
        // SAFETY: the descriptor is open; the other arguments are plain numbers.
        descriptor(unsafe {
            libc::syscall(
                libc::SYS_fsmount,
                self.0.as_raw_fd(),
                FSMOUNT_CLOEXEC,
                attributes as c_uint,
            )
        })
    }

    /// What the file system itself says went wrong, joined by `; `; empty when it says nothing.
    pub(crate) fn complaints(&self) -> String {
        let mut texts: Vec<String> = Vec::new();
        let mut line = [0_u8; 1024];
        // The kernel keeps eight lines. Each read takes one, "e <text>" for an error, and fails when none is left.
        for _ in 0..8 {
            let Ok(length) = nix::unistd::read(&self.0, &mut line) else {
                break;
            };
            if let Some(text) = line[..length].strip_prefix(b"e ") {
                texts.push(String::from_utf8_lossy(text).trim_end().to_owned());
            }
        }
        texts.join("; ")
    }
}
