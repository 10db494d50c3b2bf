//! User namespaces that carry a map of owners (mount_setattr(2), idmapped mounts).

use std::{
    fmt::Write as _,
    fs, io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use nix::{
    fcntl::OFlag,
    sys::signal::{SigSet, SigmaskHow, pthread_sigmask},
};

use super::{
    options::{IdMap, IdRange},
    sys::{self, MountAttr, attr},
};
use crate::error::{Context, Error, Result, kind_of_io};

/// A user namespace with the given maps.
///
/// A namespace is born with a process in it, so one is made for the time of this call. It runs no program, owns no signal, sends no
/// SIGCHLD and is no ordinary child (`__WALL`), so no other wait of this process sees it; it ends on the end of this process too.
///
/// # Errors
/// The kernel's, among them `InvalidArgument` for maps that overlap.
pub(crate) fn user_namespace(map: &IdMap) -> Result<OwnedFd> {
    let (wait, alive) = nix::unistd::pipe2(OFlag::O_CLOEXEC).context(|| "cannot make a pipe")?;
    let holder = Holder::start(&wait).context(|| "cannot make a user namespace")?;
    let file = |name: &str| format!("/proc/{}/{name}", holder.pid);
    let write = |name: &str, ranges: &[IdRange]| {
        fs::write(file(name), lines(ranges)).map_err(|e| {
            let kind = match e.raw_os_error() {
                Some(libc::EINVAL) => crate::error::Kind::InvalidArgument,
                _ => kind_of_io(&e),
            };
            Error::new(
                kind,
                format!("cannot write {name} of a user namespace; ranges must not overlap"),
            )
            .with_source(e)
        })
    };
    write("uid_map", &map.uids)?;
    write("gid_map", &map.gids)?;
    let namespace = fs::File::open(file("ns/user")).context(|| "cannot open a user namespace")?;
    drop(alive);
    Ok(namespace.into())
}

/// Shifts the owners that the detached mount `mount` shows, recursively those of the mounts below as well.
pub(crate) fn apply(mount: &OwnedFd, namespace: &OwnedFd, recursive: bool) -> io::Result<()> {
    use std::os::fd::AsFd;
    let attributes = MountAttr {
        set: attr::IDMAP,
        userns_fd: namespace.as_raw_fd() as u64,
        ..MountAttr::default()
    };
    sys::mount_setattr(mount.as_fd(), recursive, &attributes)
}

fn lines(ranges: &[IdRange]) -> String {
    let mut text = String::new();
    for IdRange { container, host, size } in ranges {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{container} {host} {size}");
    }
    text
}

/// The process that keeps a user namespace alive; ended and reaped when dropped.
struct Holder {
    pid: i64,
    pidfd: OwnedFd,
}

impl Holder {
    /// Starts the process. It ends when the other end of `wait` is closed everywhere.
    fn start(wait: &OwnedFd) -> io::Result<Self> {
        let mut pidfd: libc::c_int = -1;
        // SAFETY: `clone_args` is plain numbers; zero is valid for each of them.
        let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
        arguments.flags = (libc::CLONE_NEWUSER | libc::CLONE_PIDFD) as u64;
        arguments.pidfd = &raw mut pidfd as u64;
        let wait = wait.as_raw_fd() as libc::c_uint;

        // No signal handler of ours may run in the process: it would write into pipes that it shares with us.
        let mut before = SigSet::empty();
        pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), Some(&mut before))?;
        // SAFETY: the arguments outlive the call. No stack is given and CLONE_VM is not set, so the process goes on with a copy of this
        // memory, in which only this thread exists; up to its end it does nothing but system calls.
        let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of::<libc::clone_args>()) };
        if pid == 0 {
            // SAFETY: only raw system calls on numbers and on one byte of this stack; none of them returns into Rust code of others.
            unsafe {
                if wait > 0 {
                    libc::syscall(libc::SYS_close_range, 0, wait - 1, 0);
                }
                libc::syscall(libc::SYS_close_range, wait + 1, libc::c_uint::MAX, 0);
                let mut byte = 0_u8;
                libc::syscall(libc::SYS_read, wait, &raw mut byte, 1);
                loop {
                    libc::syscall(libc::SYS_exit_group, 0);
                }
            }
        }
        let result = match pid {
            ..0 => Err(io::Error::last_os_error()),
            _ => {
                // SAFETY: the kernel stored a new descriptor (close-on-exec) that nobody else owns.
                let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
                Ok(Self { pid, pidfd })
            }
        };
        pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None)?;
        result
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // SAFETY: the pidfd is open; no siginfo is passed. The process is not reaped yet, so this reaches no other.
        let _ = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.as_raw_fd(),
                libc::SIGKILL,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        // Bounded: SIGKILL was sent to a process that sits in read(2).
        // SAFETY: a null siginfo and a null rusage are allowed.
        let _ = unsafe {
            libc::syscall(
                libc::SYS_waitid,
                libc::P_PIDFD,
                self.pidfd.as_raw_fd(),
                std::ptr::null_mut::<libc::siginfo_t>(),
                libc::WEXITED | libc::__WALL,
                std::ptr::null_mut::<libc::rusage>(),
            )
        };
    }
}
