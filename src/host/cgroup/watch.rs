//! Kernel files that tell of their changes.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

use tokio::io::{Interest, unix::AsyncFd};

/// The files that ring have a few short lines each.
const READ_MAX_BYTES: usize = 1024;

/// A file of cgroup v2 whose content changes: `cgroup.events`, `memory.events`.
///
/// It is polled for POLLPRI, which kernfs raises at each change, and not watched by inotify: the kernel allows a user 128 inotify
/// instances by default, fewer than a node's root has containers.
#[derive(Debug)]
pub(super) struct Changes {
    file: File,
    bell: Bell,
}

#[derive(Debug)]
enum Bell {
    Poll(AsyncFd<File>),
    /// Plain files cannot be polled; a test's fixture tree consists of them.
    #[cfg(test)]
    Inotify(AsyncFd<nix::sys::inotify::Inotify>),
}

impl Changes {
    /// Opens and watches a file. MUST be called in a tokio runtime.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let bell = match AsyncFd::with_interest(file.try_clone()?, Interest::PRIORITY) {
            #[cfg(test)]
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => {
                use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
                let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
                inotify.add_watch(path, AddWatchFlags::IN_MODIFY)?;
                Bell::Inotify(AsyncFd::with_interest(inotify, Interest::READABLE)?)
            }
            fd => Bell::Poll(fd?),
        };
        Ok(Self { file, bell })
    }

    /// The content now.
    pub(super) fn read(&self) -> io::Result<String> {
        // The open file that is polled (a duplicate shares it): kernfs takes a change as seen when it is read there. One read, so
        // that what is returned is what was taken as seen.
        let mut text = [0; READ_MAX_BYTES];
        let len = self.file.read_at(&mut text, 0)?;
        Ok(String::from_utf8_lossy(&text[..len]).into_owned())
    }

    /// Resolves when the content may have changed since the last call; a change is never missed. Loses nothing when cancelled.
    pub(super) async fn changed(&self) -> io::Result<()> {
        match &self.bell {
            // Forgotten before the caller reads, so a change during its read rings again.
            Bell::Poll(fd) => fd.ready(Interest::PRIORITY).await?.clear_ready(),
            #[cfg(test)]
            Bell::Inotify(fd) => {
                let mut ready = fd.readable().await?;
                while fd.get_ref().read_events().is_ok() {}
                ready.clear_ready();
            }
        }
        Ok(())
    }

    /// Resolves when `done` holds for the content.
    pub(super) async fn wait(&self, done: impl Fn(&str) -> bool) -> io::Result<()> {
        while !done(&self.read()?) {
            self.changed().await?;
        }
        Ok(())
    }
}
