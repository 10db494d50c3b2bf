//! Kernel files that tell of their changes.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path, time::Duration};

use tokio::{
    io::{Interest, unix::AsyncFd},
    time::timeout,
};

/// The files that ring have a few short lines each.
const READ_MAX_BYTES: usize = 1024;

/// How long a wait trusts that it will be told. The kernel tells of one change of a file in 10 ms and puts off the next by a timer,
/// which the removal of the cgroup stops (cgroup_file_notify and cgroup_rm_file in kernel/cgroup/cgroup.c); systemd removes a scope as
/// soon as it is empty.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// A file of cgroup v2 whose content changes: `cgroup.events`, `memory.events`.
///
/// It is polled for POLLPRI, which kernfs raises at each change, and not watched by inotify: the kernel allows a user 128 inotify
/// instances by default, fewer than a node's root has containers.
#[derive(Debug)]
pub(super) enum Changes {
    /// A file of kernfs.
    Polled(AsyncFd<File>),
    /// Plain files cannot be polled; a test's fixture tree consists of them.
    #[cfg(test)]
    Plain(File, AsyncFd<File>),
}

impl Changes {
    /// Opens and watches a file. MUST be called in a tokio runtime.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        // SAFETY: a `File` keeps its descriptor open, and the same one, for as long as it lives.
        match unsafe { AsyncFd::register_with_interest(File::open(path)?, Interest::PRIORITY) } {
            Ok(file) => Ok(Self::Polled(file)),
            Err(e) => {
                let (_file, e) = e.into_parts();
                #[cfg(test)]
                if e.raw_os_error() == Some(libc::EPERM) {
                    return Self::plain(_file, path);
                }
                Err(e)
            }
        }
    }

    #[cfg(test)]
    fn plain(file: File, path: &Path) -> io::Result<Self> {
        use std::os::{
            fd::{AsRawFd, FromRawFd},
            unix::ffi::OsStrExt,
        };

        let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
        // SAFETY: the path ends with NUL and lives during the call; the descriptor has just been made, for this `File` alone, which
        // keeps it open for as long as it lives.
        let inotify = unsafe {
            let inotify = File::from_raw_fd(libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK));
            assert!(libc::inotify_add_watch(inotify.as_raw_fd(), path.as_ptr(), libc::IN_MODIFY) >= 0);
            AsyncFd::register_with_interest(inotify, Interest::READABLE)?
        };
        Ok(Self::Plain(file, inotify))
    }

    fn file(&self) -> &File {
        match self {
            Self::Polled(file) => file.get_ref(),
            #[cfg(test)]
            Self::Plain(file, _) => file,
        }
    }

    /// The content now.
    pub(super) fn read(&self) -> io::Result<String> {
        // The descriptor that is polled: kernfs takes a change as seen when it is read there. One read, so
        // that what is returned is what was taken as seen.
        let mut text = [0; READ_MAX_BYTES];
        let len = self.file().read_at(&mut text, 0)?;
        Ok(String::from_utf8_lossy(&text[..len]).into_owned())
    }

    /// Resolves when the content may have changed since the last call. Loses nothing when cancelled. Of a cgroup that is removed the
    /// last changes may not be told; see [`LOOK_AGAIN`].
    pub(super) async fn changed(&self) -> io::Result<()> {
        match self {
            // Forgotten before the caller reads, so a change during its read rings again.
            Self::Polled(fd) => fd.ready(Interest::PRIORITY).await?.clear_ready(),
            #[cfg(test)]
            Self::Plain(_, fd) => {
                let mut ready = fd.readable().await?;
                use io::Read;
                let mut events = [0; 4096];
                while fd.get_ref().read(&mut events).is_ok() {}
                ready.clear_ready();
            }
        }
        Ok(())
    }

    /// Resolves when `done` holds for the content.
    ///
    /// # Errors
    /// ENODEV when the cgroup is gone; else the operating system's.
    pub(super) async fn wait(&self, done: impl Fn(&str) -> bool) -> io::Result<()> {
        while !done(&self.read()?) {
            if let Ok(changed) = timeout(LOOK_AGAIN, self.changed()).await {
                changed?;
            }
        }
        Ok(())
    }
}
