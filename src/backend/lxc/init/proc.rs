//! `/proc` of init's own, which nobody else sees: LXC takes the host's away, and the container's is the image's to cover.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    sys::{
        stat::Mode,
        statfs::{PROC_SUPER_MAGIC, fstatfs},
    },
};

use crate::{
    error::{Context, Result},
    rootfs::sys::{FsContext, attr},
};

/// A mount of procfs that stands nowhere, and is gone with this.
#[derive(Debug)]
pub struct Proc(OwnedFd);

impl Proc {
    /// procfs of the caller's pid namespace.
    ///
    /// # Errors
    /// The kernel's. `PermissionDenied` in a user namespace which does not own the pid namespace, or in whose mount namespace no
    /// whole `/proc` is mounted; [`Proc::over`] is for that.
    pub fn open() -> Result<Self> {
        Self::mount().context(|| "cannot mount procfs for init itself")
    }

    fn mount() -> io::Result<Self> {
        FsContext::open(c"proc")?
            .mount(attr::NOSUID | attr::NODEV | attr::NOEXEC)
            .map(Self)
    }

    /// The procfs that `mount`, a descriptor of its root, holds. If it holds another file system, all else fails with EXDEV.
    pub fn over(mount: OwnedFd) -> Self {
        Self(mount)
    }

    /// The whole of the file `path`, which is relative: "self/cgroup".
    ///
    /// # Errors
    /// The kernel's, also for a path that leaves procfs.
    pub fn read(&self, path: &str) -> io::Result<String> {
        let mut text = String::new();
        self.file(path, OFlag::O_RDONLY)?.read_to_string(&mut text)?;
        Ok(text)
    }

    /// Writes `text` to the file `path` in one call, as the files of procfs want it.
    ///
    /// # Errors
    /// The kernel's, also for a path that leaves procfs.
    pub fn write(&self, path: &str, text: &str) -> io::Result<()> {
        match self.file(path, OFlag::O_WRONLY)?.write(text.as_bytes())? {
            length if length == text.len() => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    /// No magic link, no mount on the way, nothing outside: what is opened is of the file system that this was made of, and that has to be
    /// procfs. What is written there decides how confined a process is.
    fn file(&self, path: &str, mode: OFlag) -> io::Result<File> {
        if fstatfs(&self.0)?.filesystem_type() != PROC_SUPER_MAGIC {
            return Err(Errno::EXDEV.into());
        }
        let how = OpenHow::new()
            .flags(mode | OFlag::O_CLOEXEC)
            .mode(Mode::empty())
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS | ResolveFlag::RESOLVE_NO_XDEV);
        Ok(openat2(&self.0, path, how)?.into())
    }
}

impl AsFd for Proc {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn init_reads_procfs_that_is_mounted_nowhere() {
        let proc = Proc::open().unwrap();
        let of_self = proc.read("self/status").unwrap();
        assert!(
            of_self.contains(&format!("Pid:\t{}\n", std::process::id())),
            "{of_self}"
        );
        assert!(
            !std::fs::read_to_string("/proc/self/mountinfo")
                .unwrap()
                .contains(" /proc rw - proc none")
        );
    }

    #[test]
    fn nothing_but_procfs_is_opened_through_it() {
        let proc = Proc::open().unwrap();
        for path in [
            "../etc/passwd",
            "/etc/passwd",
            "self/root/etc/passwd",
            "self/cwd",
            "nothing",
        ] {
            assert!(proc.read(path).is_err(), "{path}");
        }
        assert_eq!(proc.write("nothing", "1").unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
