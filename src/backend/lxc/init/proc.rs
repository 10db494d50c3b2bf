//! `/proc` of init's own, which nobody else sees: LXC takes the host's away, and the container's is the image's to cover.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    sys::stat::Mode,
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

    /// The procfs that `mount`, a descriptor of its root, holds.
    pub fn over(mount: OwnedFd) -> Self {
        Self(mount)
    }

    /// The whole of the file `path`, which is relative: "self/cgroup".
    ///
    /// # Errors
    /// The kernel's, also for a path that leaves procfs.
    pub fn read(&self, path: &str) -> Result<String> {
        let mut text = String::new();
        self.file(path, OFlag::O_RDONLY)
            .and_then(|mut file| file.read_to_string(&mut text))
            .context(|| format!("cannot read /proc/{path}"))?;
        Ok(text)
    }

    /// Writes `text` to the file `path` in one call, as the files of procfs want it.
    ///
    /// # Errors
    /// The kernel's, also for a path that leaves procfs.
    pub fn write(&self, path: &str, text: &str) -> Result<()> {
        self.file(path, OFlag::O_WRONLY)
            .and_then(|mut file| match file.write(text.as_bytes())? {
                length if length == text.len() => Ok(()),
                _ => Err(io::ErrorKind::WriteZero.into()),
            })
            .context(|| format!("cannot write /proc/{path}"))
    }

    /// No magic link, no mount on the way, nothing outside: what is opened is procfs.
    fn file(&self, path: &str, mode: OFlag) -> io::Result<File> {
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
    use crate::error::Kind;

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
            let error = proc.read(path).unwrap_err();
            assert!(
                error.to_string().starts_with(&format!("cannot read /proc/{path}")),
                "{error}"
            );
        }
        assert_eq!(proc.write("nothing", "1").unwrap_err().kind(), Kind::NotFound);
    }
}
