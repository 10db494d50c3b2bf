//! A file at which whoever opens it waits: holds what no hook runs in, such as the process of an exec.

use std::{
    ffi::CString,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::pod::until;

/// Holds everybody who opens the file, until this is dropped; then all of them go on.
pub(crate) struct FileGate(OwnedFd);

impl FileGate {
    /// At `file`, on whatever way it is opened. It must not be opened by the tests themselves, which would wait for themselves.
    pub(crate) fn at(file: &Path) -> Self {
        let path = CString::new(file.as_os_str().as_bytes()).unwrap();
        // SAFETY: integers and a C string; the descriptor is new, and nobody else's.
        unsafe {
            let gate = libc::fanotify_init(libc::FAN_CLASS_CONTENT | libc::FAN_CLOEXEC, libc::O_RDONLY as u32);
            assert!(gate >= 0, "{}", std::io::Error::last_os_error());
            let gate = OwnedFd::from_raw_fd(gate);
            let (add, what) = (libc::FAN_MARK_ADD, libc::FAN_OPEN_PERM);
            let marked = libc::fanotify_mark(gate.as_raw_fd(), add, what, libc::AT_FDCWD, path.as_ptr());
            assert_eq!(marked, 0, "{}: {}", file.display(), std::io::Error::last_os_error());
            Self(gate)
        }
    }

    /// The last file that the process of an exec opens, after it was told to start and before it becomes the program: the container's
    /// /etc/passwd.
    pub(crate) fn in_exec(bundle: &Path) -> Self {
        Self::at(&bundle.join("rootfs/etc/passwd"))
    }

    /// Waits until somebody is there, who is let go when this is dropped.
    pub(crate) async fn reached(self) -> Self {
        let is_there = || {
            let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            (poll(&mut fds, PollTimeout::ZERO).unwrap() > 0).then_some(())
        };
        until("somebody opens the file", is_there).await;
        self
    }

    /// Waits until `call` has led somebody here, and goes away from the call as a client does whose deadline is over.
    pub(crate) async fn holds<T: std::fmt::Debug>(self, call: impl Future<Output = T>) -> Self {
        tokio::select! {
            ended = call => panic!("not held: {ended:?}"),
            held = self.reached() => held,
        }
    }
}
