//! What the client's strings for stdin, stdout and stderr mean, and the descriptors behind them. The strings are hostile.

use std::{
    ffi::OsString,
    fs::{DirBuilder, OpenOptions},
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{
            ffi::OsStringExt,
            fs::{DirBuilderExt, OpenOptionsExt},
        },
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::{
    fcntl::{OFlag, open},
    sys::stat::{Mode, SFlag, fstat},
};
use tokio::io::Interest;

use super::copy::{Sink, watched};
use crate::error::{Context, Error, Kind, Result};

/// Where one stream of a process goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Target {
    /// `/dev/null`.
    Nothing,
    /// A plain path or `fifo://`: a fifo, or for output anything that takes bytes.
    Path(PathBuf),
    /// `file://`: appended to, created with its parent folders.
    File(PathBuf),
    /// `binary://`: a program that gets the pipes.
    Logger(LoggerCommand),
}

/// What to run as a logger.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LoggerCommand {
    pub(super) program: PathBuf,
    pub(super) args: Vec<OsString>,
    pub(super) env: Vec<(OsString, OsString)>,
}

/// Reads one of the strings of a request; `stream` names it in errors.
///
/// The query of a logger becomes its arguments as in containerd's runc shim: each key, then its first value, which may be empty;
/// keys that begin with `env.` become its environment. The order is that of the query.
///
/// # Errors
/// `InvalidArgument` for a relative path, an unknown scheme, a host part, a broken escape or a NUL.
pub(super) fn parse(stream: &str, text: &str) -> Result<Target> {
    if text.is_empty() {
        return Ok(Target::Nothing);
    }
    let invalid = |why: &str| Error::invalid(format!("invalid {stream} {text:?}: {why}"));
    if text.contains('\0') {
        return Err(invalid("it contains a NUL"));
    }
    if text.starts_with('/') {
        return Ok(Target::Path(text.into()));
    }
    let Some((scheme, rest)) = text.split_once(':') else {
        return Err(invalid(
            "neither an absolute path nor one of fifo://, file:// and binary://",
        ));
    };
    let rest = rest.split_once('#').map_or(rest, |(rest, _fragment)| rest);
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let path = path.strip_prefix("//").unwrap_or(path);
    if !path.starts_with('/') {
        return Err(invalid("the part after the scheme is not an absolute path"));
    }
    let decode = |part: &str, plus: bool| unescape(part, plus).ok_or_else(|| invalid("a broken escape or a NUL"));
    let path = PathBuf::from(decode(path, false)?);
    match scheme {
        "fifo" => Ok(Target::Path(path)),
        "file" => Ok(Target::File(path)),
        "binary" => {
            let mut command = LoggerCommand {
                program: path,
                args: Vec::new(),
                env: Vec::new(),
            };
            let mut seen: Vec<OsString> = Vec::new();
            for pair in query.split('&').filter(|pair| !pair.is_empty()) {
                let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
                let (key, value) = (decode(key, true)?, decode(value, true)?);
                if seen.contains(&key) {
                    continue;
                }
                seen.push(key.clone());
                match key.as_encoded_bytes().strip_prefix(b"env.") {
                    None => command.args.extend([key, value]),
                    Some(name) if name.is_empty() || name.contains(&b'=') => {
                        return Err(invalid("an environment variable without a proper name"));
                    }
                    Some(name) => command.env.push((OsString::from_vec(name.to_vec()), value)),
                }
            }
            Ok(Target::Logger(command))
        }
        _ => Err(invalid("unknown scheme; known are fifo, file and binary")),
    }
}

/// Undoes percent escapes, and `+` for a space where `plus`. `None` for a broken escape or a NUL.
fn unescape(text: &str, plus: bool) -> Option<OsString> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'%' => {
                let mut digit = || bytes.next().and_then(|b| char::from(b).to_digit(16));
                let (high, low) = (digit()?, digit()?);
                u8::try_from(high * 16 + low).ok()?
            }
            b'+' if plus => b' ',
            other => other,
        });
    }
    (!out.contains(&0)).then(|| OsString::from_vec(out))
}

/// Opens what an output path names. Never waits for a reader.
///
/// A fifo is held open at both ends: a reader may leave and come back, its absence is no SIGPIPE, and what was written meanwhile
/// stays in the fifo. Symbolic links are followed, as the runc shim does: whoever may name the path may start containers.
///
/// # Errors
/// `NotFound` when nothing is there, `InvalidArgument` for what cannot take output, or the operating system's.
pub(super) fn open_output(stream: &str, path: &Path) -> Result<Sink> {
    let (handle, kind) = look(stream, path)?;
    let flags = match kind {
        SFlag::S_IFIFO => OFlag::O_RDWR,
        SFlag::S_IFREG | SFlag::S_IFCHR => OFlag::O_WRONLY | OFlag::O_APPEND,
        _ => {
            return Err(Error::invalid(format!(
                "{stream} {} is neither a fifo nor a file",
                path.display()
            )));
        }
    };
    let fd = reopen(&handle, flags).context(|| format!("cannot open {stream} {}", path.display()))?;
    sink(fd, kind == SFlag::S_IFIFO).context(|| format!("cannot watch {stream} {}", path.display()))
}

/// Opens a log file for appending; makes it (mode 0644) and its parent folders (mode 0755) where they are missing.
///
/// # Errors
/// The operating system's.
pub(super) fn open_file(stream: &str, path: &Path) -> Result<Sink> {
    if let Some(parent) = path.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(parent)
            .context(|| format!("cannot make the folder of {stream} {}", path.display()))?;
    }
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o644)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .context(|| format!("cannot open {stream} {}", path.display()))?;
    sink(file.into(), false).context(|| format!("cannot watch {stream} {}", path.display()))
}

/// Opens the client's fifo for stdin: its read end, and a write end without which a client that goes away would be an end of file.
///
/// # Errors
/// `NotFound` when nothing is there, `InvalidArgument` for what is not a fifo, or the operating system's.
pub(super) fn open_input(path: &Path) -> Result<(OwnedFd, OwnedFd)> {
    let (handle, kind) = look("stdin", path)?;
    if kind != SFlag::S_IFIFO {
        return Err(Error::invalid(format!("stdin {} is not a fifo", path.display())));
    }
    let open = || -> nix::Result<(OwnedFd, OwnedFd)> {
        Ok((reopen(&handle, OFlag::O_RDONLY)?, reopen(&handle, OFlag::O_WRONLY)?))
    };
    open().context(|| format!("cannot open stdin {}", path.display()))
}

/// Finds out what a path names without opening it: opening a device may have effects.
fn look(stream: &str, path: &Path) -> Result<(OwnedFd, SFlag)> {
    let handle = match open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()) {
        Err(nix::Error::ENOENT) => {
            return Err(Error::new(
                Kind::NotFound,
                format!("{stream} {} does not exist; its client has to make it", path.display()),
            ));
        }
        other => other.context(|| format!("cannot open {stream} {}", path.display()))?,
    };
    let stat = fstat(&handle).context(|| format!("cannot examine {stream} {}", path.display()))?;
    Ok((handle, SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT))
}

/// Opens the file behind a descriptor once more, with an open file description of its own: `O_NONBLOCK` belongs to the description,
/// and it must not reach whoever shares the first one.
pub(super) fn reopen(fd: &impl AsFd, flags: OFlag) -> nix::Result<OwnedFd> {
    open(
        proc_path(fd).as_path(),
        flags | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
}

/// The path by which a descriptor can be opened again.
pub(super) fn proc_path(fd: &impl AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))
}

/// A sink that waits where the kernel can tell readiness, and just writes where it cannot (regular files, `/dev/null`).
fn sink(fd: OwnedFd, fifo: bool) -> io::Result<Sink> {
    match watched(fd, Interest::WRITABLE) {
        Ok(fd) if fifo => Ok(Sink::Fifo(Arc::new(fd))),
        Ok(fd) => Ok(Sink::Device(Arc::new(fd))),
        Err((fd, error)) if error.raw_os_error() == Some(libc::EPERM) => Ok(Sink::File(fd)),
        Err((_, error)) => Err(error),
    }
}
