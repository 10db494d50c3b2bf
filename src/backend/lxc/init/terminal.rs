//! The terminal of a process: a pty of the container's own devpts.
//!
//! For init, after pivot_root: [`open`], [`bind_console`], [`send`], [`make_controlling`]. For an exec the same without the console.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::{
    errno::Errno,
    fcntl::{OFlag, openat},
    sys::{
        stat::{Mode, SFlag, fstat, major, minor},
        statfs::{FsType, fstatfs},
    },
    unistd::{Uid, fchown, getpid, getsid, setsid},
};
use serde::{Deserialize, Serialize};

use super::{open_below, send_descriptor};
use crate::{
    error::{Context, Error, Result},
    rootfs::sys::{move_mount, open_tree_clone_of},
};

const DEVPTS_SUPER_MAGIC: i64 = 0x1cd1;

/// Of a file for the console where there is none; with a terminal on it, it has the terminal's owner and mode.
const CONSOLE_MODE: Mode = Mode::from_bits_truncate(0o620);

mod ioctl {
    nix::ioctl_write_ptr_bad!(unlock, libc::TIOCSPTLCK, libc::c_int);
    nix::ioctl_read_bad!(number, libc::TIOCGPTN, libc::c_uint);
    nix::ioctl_write_ptr_bad!(size, libc::TIOCSWINSZ, libc::winsize);
    nix::ioctl_write_int_bad!(control, libc::TIOCSCTTY);
}

/// `process.consoleSize` (OCI config.md), in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// The height.
    pub rows: u16,
    /// The width.
    pub columns: u16,
}

/// Both ends of a pty.
#[derive(Debug)]
pub struct Terminal {
    /// For the shim.
    pub master: OwnedFd,
    /// For the process.
    pub slave: OwnedFd,
}

/// Makes a pty in `dev`/pts, whose slave belongs to `uid`. `dev` is the container's /dev.
///
/// What the container has there is not trusted: no symlink is followed, and it has to be a devpts.
///
/// # Errors
/// `InvalidArgument` when `dev`/pts is no devpts; the operating system's.
pub fn open(dev: BorrowedFd<'_>, uid: u32, size: Option<Size>) -> Result<Terminal> {
    let none = || "process.terminal: the container has no devpts at /dev/pts";
    let pts = match open_below(dev, "pts", OFlag::O_PATH | OFlag::O_DIRECTORY) {
        Err(errno @ (Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP)) => {
            return Err(Error::invalid(none()).with_source(errno));
        }
        other => other.context(|| "cannot open /dev/pts")?,
    };
    if fstatfs(&pts).context(|| "cannot examine /dev/pts")?.filesystem_type() != FsType(DEVPTS_SUPER_MAGIC) {
        return Err(Error::invalid(none()));
    }
    let master =
        open_below(pts.as_fd(), "ptmx", OFlag::O_RDWR | OFlag::O_NOCTTY).context(|| "cannot open /dev/pts/ptmx")?;
    let examine = || "cannot examine /dev/pts/ptmx";
    let (folder, file) = (fstat(&pts).context(examine)?, fstat(&master).context(examine)?);
    if folder.st_dev != file.st_dev || (major(file.st_rdev), minor(file.st_rdev)) != (5, 2) {
        return Err(Error::invalid(
            "process.terminal: something is mounted on /dev/pts/ptmx of the container",
        ));
    }
    // SAFETY: TIOCSPTLCK reads one int where the pointer says, and that is a live reference.
    unsafe { ioctl::unlock(master.as_raw_fd(), &0) }.context(|| "cannot unlock the terminal")?;
    // By the master, whatever is at /dev/pts/<number> now.
    let flags = (OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC).bits();
    // SAFETY: TIOCGPTPEER takes an integer.
    let slave = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) };
    let slave = Errno::result(slave).context(|| "cannot open the other end of the terminal")?;
    // SAFETY: the call succeeded, so it is a new descriptor that nobody else owns.
    let slave = unsafe { OwnedFd::from_raw_fd(slave) };
    // The group is what the devpts was mounted with.
    fchown(&slave, Some(Uid::from_raw(uid)), None)
        .context(|| format!("cannot give the terminal to process.user.uid {uid}"))?;
    if let Some(size) = size {
        let size = libc::winsize {
            ws_row: size.rows,
            ws_col: size.columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: TIOCSWINSZ reads one winsize where the pointer says, and that is a live reference.
        unsafe { ioctl::size(master.as_raw_fd(), &size) }.context(|| "cannot set process.consoleSize")?;
    }
    Ok(Terminal { master, slave })
}

/// Mounts the terminal on `dev`/console, which is made when it is missing. `dev` is the container's /dev, in this mount namespace.
///
/// # Errors
/// `InvalidArgument` when it is a symlink or a folder; the operating system's. A new file is left behind.
pub fn bind_console(dev: BorrowedFd<'_>, slave: BorrowedFd<'_>) -> Result<()> {
    let what = || "cannot make /dev/console";
    let made = openat(
        dev,
        "console",
        OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC,
        CONSOLE_MODE,
    );
    match made {
        // A read-only /dev may have one.
        Ok(_) | Err(Errno::EEXIST | Errno::EROFS) => {}
        Err(errno) => return Err(errno).context(what),
    }
    let console = match open_below(dev, "console", OFlag::O_PATH) {
        Err(Errno::ELOOP) => return Err(Error::invalid("/dev/console of the container is a symlink")),
        other => other.context(what)?,
    };
    let kind = SFlag::from_bits_truncate(fstat(&console).context(what)?.st_mode) & SFlag::S_IFMT;
    if kind == SFlag::S_IFDIR {
        return Err(Error::invalid("/dev/console of the container is a folder"));
    }
    let terminal = open_tree_clone_of(slave, false).context(|| "cannot take the terminal's mount")?;
    move_mount(terminal.as_fd(), console.as_fd()).context(|| "cannot mount the terminal on /dev/console")
}

/// Sends the master to the shim over a connected socket, as OCI runtimes send it to a console socket.
///
/// # Errors
/// The operating system's.
pub fn send(console_socket: OwnedFd, master: OwnedFd) -> Result<()> {
    let mut number = 0;
    // SAFETY: TIOCGPTN stores one unsigned int where the pointer says, and that is a live local.
    unsafe { ioctl::number(master.as_raw_fd(), &mut number) }.context(|| "cannot ask for the terminal's number")?;
    send_descriptor(
        console_socket.as_fd(),
        master.as_fd(),
        format!("/dev/pts/{number}").as_bytes(),
    )
    .context(|| "cannot send the terminal")
}

/// Begins a session, unless this process leads one.
pub(super) fn lead_session() -> Result<()> {
    let leads = getsid(None).is_ok_and(|session| session == getpid());
    if !leads {
        setsid().context(|| "cannot begin a session")?;
    }
    Ok(())
}

/// Makes the terminal the controlling one of a new session, and stdin, stdout and stderr. A process that leads its session already keeps
/// it; the session MUST have no terminal yet, and a process that leads a group but no session cannot do this.
///
/// # Errors
/// The operating system's.
pub fn make_controlling(slave: OwnedFd) -> Result<()> {
    lead_session()?;
    // SAFETY: TIOCSCTTY takes an integer; 0 is not to take it from another session.
    unsafe { ioctl::control(slave.as_raw_fd(), 0) }.context(|| "cannot make the terminal the controlling one")?;
    for number in 0..=2 {
        // dup2 of a descriptor to itself would leave it close-on-exec.
        let result = if slave.as_raw_fd() == number {
            // SAFETY: F_SETFD takes an integer.
            unsafe { libc::fcntl(number, libc::F_SETFD, 0) }
        } else {
            // SAFETY: what was at 0, 1 and 2 is stdio, which nobody owns.
            unsafe { libc::dup2(slave.as_raw_fd(), number) }
        };
        Errno::result(result).context(|| format!("cannot make the terminal descriptor {number}"))?;
    }
    if slave.as_raw_fd() <= 2 {
        // It is stdio now.
        std::mem::forget(slave);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
