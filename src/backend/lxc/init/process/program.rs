//! Which file a process runs, and whether its working folder is there.

use std::{
    ffi::CString,
    fs::{self, DirBuilder},
    os::unix::{ffi::OsStrExt, fs::DirBuilderExt},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, OFlag, open},
    sys::stat::Mode,
    unistd::{AccessFlags, faccessat},
};

use super::{Process, value_of};
use crate::{
    backend::lxc::init::io_errno,
    error::{Error, Kind, Result},
};

/// The file that a process runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// Absolute, in the container's root.
    pub path: PathBuf,
}

impl Process {
    /// Finds the program and the working folder. MUST run in the container's root, with the helper's privileges.
    ///
    /// A name with a slash is a path, relative to the working folder; others are looked up in PATH of the process's own environment,
    /// as execvp(3) does. There is no default PATH, as there is none with crun 1.8.1 and runc: without one, nothing is found.
    ///
    /// With `make_cwd` a missing working folder is made, owned by root, as crun does for init and not for an exec.
    ///
    /// # Errors
    /// `InvalidArgument` in the words that the backend `crun` has for it.
    pub fn find(&self, make_cwd: bool) -> Result<Program> {
        self.check_cwd(make_cwd)?;
        let name = self.args.first().map(String::as_str).unwrap_or_default();
        if name.is_empty() {
            return Err(not_found(name));
        }
        if name.contains('/') {
            let path = self.cwd.join(name);
            return match runs(&path) {
                Ok(()) => Ok(Program { path }),
                Err(errno) => Err(refused(name, &path, errno)),
            };
        }
        let path = self.env.iter().find_map(|variable| value_of(variable, "PATH"));
        // What was in the way of an earlier one is told when there is no later one.
        let mut first = None;
        for folder in path.into_iter().flat_map(|path| path.split(':')) {
            // An empty one is the working folder.
            let path = self.cwd.join(folder).join(name);
            match runs(&path) {
                Ok(()) => return Ok(Program { path }),
                Err(Errno::ENOENT | Errno::ENOTDIR) => {}
                Err(errno) => first = first.or(Some((path, errno))),
            }
        }
        Err(match first {
            Some((path, errno)) => refused(name, &path, errno),
            None => not_found(name),
        })
    }

    fn check_cwd(&self, make: bool) -> Result<()> {
        let look = || {
            open(
                &self.cwd,
                OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
                Mode::empty(),
            )
            .map(drop)
        };
        let result = match look() {
            Err(Errno::ENOENT) if make => DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(&self.cwd)
                .map_err(io_errno)
                .and_then(|()| look()),
            other => other,
        };
        match result {
            // Perhaps the user may enter what root may not (NFS): `exec` tries again.
            Ok(()) | Err(Errno::EACCES) => Ok(()),
            Err(errno) => Err(no_cwd(&self.cwd, errno)),
        }
    }
}

/// Whether the file can be executed by somebody, root among them.
fn runs(path: &Path) -> nix::Result<()> {
    // Paths made of strings without NUL.
    let file = CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)?;
    let meta = fs::metadata(path).map_err(io_errno)?;
    if !meta.is_file() {
        return Err(Errno::EISDIR);
    }
    faccessat(AT_FDCWD, file.as_c_str(), AccessFlags::X_OK, AtFlags::AT_EACCESS)
}

fn not_found(name: &str) -> Error {
    Error::invalid(format!(
        "exec: {name:?}: executable file not found in $PATH: no such file or directory"
    ))
}

/// Why `path`, which was found for `name`, does not do.
fn refused(name: &str, path: &Path, errno: Errno) -> Error {
    match errno {
        Errno::ENOENT | Errno::ENOTDIR => not_found(name),
        Errno::EISDIR => Error::invalid(format!(
            "the path `{}` is not a regular file: {}: the program is not an executable file",
            path.display(),
            Errno::EPERM.desc()
        )),
        errno => Error::invalid(format!(
            "open executable: {}: the program is not an executable file",
            errno.desc()
        )),
    }
}

/// The error of a working folder that cannot be entered.
pub(super) fn no_cwd(cwd: &Path, errno: Errno) -> Error {
    Error::invalid(format!("chdir `{}`: {}", cwd.display(), errno.desc()))
}

/// The error of execve(2).
pub(super) fn not_executed(path: &Path, errno: Errno) -> Error {
    let hint = if errno == Errno::ENOENT {
        " (missing dynamic library?)"
    } else {
        ""
    };
    let kind = match errno {
        Errno::ENOENT
        | Errno::ENOTDIR
        | Errno::EACCES
        | Errno::ENOEXEC
        | Errno::ELOOP
        | Errno::E2BIG
        | Errno::EINVAL => Kind::InvalidArgument,
        errno => crate::error::kind_of_io(&errno.into()),
    };
    Error::new(
        kind,
        format!("exec container process{hint} `{}`: {}", path.display(), errno.desc()),
    )
}
