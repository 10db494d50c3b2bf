//! What init does before it becomes the user's program (docs/decisions/0018).
//!
//! The shim makes the plans, which are pure data; the helper program that LXC starts as the container's init carries them out. It has one
//! thread.

pub mod hooks;
pub mod proc;
pub mod process;
pub mod rootfs;
pub mod terminal;

use std::{
    io::IoSlice,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    sys::{
        socket::{ControlMessage, MsgFlags, sendmsg},
        stat::Mode,
    },
};

/// Opens what lies below `folder`, through no symlink.
fn open_below(folder: BorrowedFd<'_>, path: &str, flags: OFlag) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .mode(Mode::empty())
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(folder, path, how)
}

/// Makes every descriptor above 2 close-on-exec, so that no program of the container gets one of the helper's.
///
/// # Errors
/// The operating system's (kernels before 5.11).
pub fn seal_descriptors() -> nix::Result<()> {
    // SAFETY: close_range takes three integers; with this flag it closes nothing now.
    let result = unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_int::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    Errno::result(result).map(drop)
}

/// Sends `data` over a stream socket, and a descriptor with its first byte.
fn send_descriptor(socket: BorrowedFd<'_>, descriptor: BorrowedFd<'_>, data: &[u8]) -> nix::Result<()> {
    let rights = [descriptor.as_raw_fd()];
    let mut control: &[ControlMessage<'_>] = &[ControlMessage::ScmRights(&rights)];
    let mut rest = data;
    loop {
        match sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(rest)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        ) {
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
            Ok(sent) => {
                rest = rest.get(sent..).unwrap_or_default();
                control = &[];
                if rest.is_empty() {
                    return Ok(());
                }
            }
        }
    }
}
