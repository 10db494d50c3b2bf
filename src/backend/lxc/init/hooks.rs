//! Hooks (OCI config.md, "POSIX-platform Hooks"), and the state that they get.
//!
//! One after the other, each to its end; the first that fails is the last. The helper is the first process of its pid namespace, so only
//! the hook itself is waited for, by its number.

use std::{
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, FromRawFd, OwnedFd},
        unix::process::{CommandExt, ExitStatusExt},
    },
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

use super::seal_descriptors;
use crate::{
    error::{Context, Error, Kind, Result},
    host::memory_file,
};

/// How much of a hook's stderr goes into an error. The rest is read and dropped.
const STDERR_MAX_BYTES: usize = 4096;

/// A hook as the helper runs it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hook {
    /// Where it stands in the bundle: `createContainer[0]`.
    pub name: String,
    /// Absolute.
    pub path: PathBuf,
    /// From argv[0] on; the path alone when the bundle has none.
    pub args: Vec<String>,
    /// All of its environment: `NAME=value`.
    pub env: Vec<String>,
    /// Killed after so many seconds, with its process group.
    pub timeout_seconds: Option<u64>,
}

impl Hook {
    /// The hooks of one kind; `kind` is the field: `createContainer`.
    ///
    /// # Errors
    /// `InvalidArgument` with the field that is wrong.
    pub fn of(hooks: &[oci_spec::runtime::Hook], kind: &str) -> Result<Vec<Self>> {
        let mut list = Vec::new();
        for (index, hook) in hooks.iter().enumerate() {
            let bad = |field: &str, why: String| Err(Error::invalid(format!("hooks.{kind}[{index}].{field}: {why}")));
            let path = hook.path();
            if !path.is_absolute() {
                return bad("path", format!("{:?} is no absolute path", path.display().to_string()));
            }
            if path.to_string_lossy().contains('\0') {
                return bad("path", "there is a NUL in it".into());
            }
            let args = match hook.args() {
                Some(args) if !args.is_empty() => args.clone(),
                _ => vec![path.to_string_lossy().into_owned()],
            };
            let env = hook.env().clone().unwrap_or_default();
            for (field, texts) in [("args", &args), ("env", &env)] {
                if let Some(at) = texts.iter().position(|text| text.contains('\0')) {
                    return bad(&format!("{field}[{at}]"), "there is a NUL in it".into());
                }
            }
            if let Some(at) = env.iter().position(|variable| !matches!(variable.find('='), Some(1..))) {
                return bad(&format!("env[{at}]"), format!("{:?} is not NAME=value", env[at]));
            }
            let timeout_seconds = match hook.timeout() {
                None => None,
                Some(seconds) => match u64::try_from(seconds) {
                    Ok(seconds @ 1..) => Some(seconds),
                    _ => return bad("timeout", format!("{seconds} is not more than 0")),
                },
            };
            list.push(Self {
                name: format!("{kind}[{index}]"),
                path: path.clone(),
                args,
                env,
                timeout_seconds,
            });
        }
        Ok(list)
    }

    /// All of its environment, name and value.
    pub fn variables(&self) -> impl Iterator<Item = (&str, &str)> {
        self.env.iter().filter_map(|variable| variable.split_once('='))
    }

    fn run(&self, state: &str) -> Result<()> {
        let what = || format!("hook {} {}", self.name, self.path.display());
        let mut child = self.spawn(state).map_err(|error| {
            // The bundle's fault; and "not found" must not look like that of a container.
            let kind = match error.raw_os_error() {
                Some(libc::ENOENT | libc::ENOTDIR | libc::EACCES | libc::ENOEXEC) => Kind::InvalidArgument,
                _ => Kind::Unknown,
            };
            Error::new(kind, what()).with_source(error)
        })?;
        let deadline = self
            .timeout_seconds
            .and_then(|seconds| Instant::now().checked_add(Duration::from_secs(seconds)));
        let mut stderr = Vec::new();
        let ended = watch(&mut child, deadline, &mut stderr);
        let mut fate = "killed".to_owned();
        if !matches!(ended, Ok(Some(_))) {
            // It leads its group, and it has not been waited for: the number is its own.
            match killpg(Pid::from_raw(child.id() as i32), Signal::SIGKILL) {
                Ok(()) => drop(child.wait()),
                // A profile of AppArmor may keep signals from it. It ends with the container.
                Err(errno) => fate = format!("not ended, and not to be killed ({errno})"),
            }
        }
        let stderr = String::from_utf8_lossy(&stderr);
        let stderr = match stderr.trim() {
            "" => String::new(),
            text => format!(": {text}"),
        };
        match ended {
            Ok(Some(status)) if status.success() => Ok(()),
            Ok(Some(status)) => Err(Error::unknown(format!("{}: {}{stderr}", what(), ended_as(status)))),
            Ok(None) => Err(Error::deadline(format!(
                "{}: {fate} after {} s, its timeout{stderr}",
                what(),
                self.timeout_seconds.unwrap_or_default()
            ))),
            Err(error) => Err(error).context(|| format!("{}: cannot wait for it", what())),
        }
    }

    fn spawn(&self, state: &str) -> io::Result<Child> {
        // A file: nobody has to write while the hook reads, or does not, or has gone.
        let stdin = memory_file(state.as_bytes()).map_err(io::Error::other)?;
        let mut command = Command::new(&self.path);
        if let Some((argv0, args)) = self.args.split_first() {
            command.arg0(argv0).args(args);
        }
        command
            .env_clear()
            .envs(self.variables())
            .process_group(0)
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
    }
}

/// Runs hooks in their order, with `state` on stdin. Their stdout is dropped.
///
/// # Errors
/// `hook createContainer[0] /path: exit status 1: <stderr>`: `InvalidArgument` when it cannot be executed, `DeadlineExceeded` when its
/// time is over (then its process group was killed; what left the group goes on), else `Unknown`. Later hooks are not run.
pub fn run(hooks: &[Hook], state: &str) -> Result<()> {
    if !hooks.is_empty() {
        seal_descriptors().context(|| "cannot seal the descriptors")?;
    }
    hooks.iter().try_for_each(|hook| hook.run(state))
}

fn ended_as(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => status.to_string(),
    }
}

/// Reads what a hook writes until it has ended, or until `deadline`: then it answers `None`, and has not waited for it.
///
/// The end is that of the process. Others may have its stdout and stderr still, and hold them for ever.
fn watch(child: &mut Child, deadline: Option<Instant>, stderr: &mut Vec<u8>) -> io::Result<Option<ExitStatus>> {
    // SAFETY: pidfd_open takes two integers and returns a new descriptor or -1; the child has not been waited for.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, child.id() as libc::pid_t, 0) };
    let pidfd = Errno::result(pidfd)?;
    // SAFETY: the call succeeded, so the descriptor is open and nobody else's.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd as libc::c_int) };
    let mut dropped = Vec::new();
    let mut out = Output::new(child.stdout.take().map(OwnedFd::from))?;
    let mut err = Output::new(child.stderr.take().map(OwnedFd::from))?;
    loop {
        let timeout = match deadline {
            None => PollTimeout::NONE,
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    err.read(stderr)?;
                    return Ok(None);
                }
                // Up, so as not to turn round; no more than poll(2) can take at once.
                PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
            }
        };
        let mut polled = vec![PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        for output in [&out, &err] {
            polled.extend(output.0.iter().map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLIN)));
        }
        match poll(&mut polled, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let ended = polled.first().is_some_and(|process| process.any() == Some(true));
        out.read(&mut dropped)?;
        dropped.clear();
        err.read(stderr)?;
        if ended {
            return child.wait().map(Some);
        }
    }
}

/// A pipe that a hook writes to; `None` after its end.
struct Output(Option<File>);

impl Output {
    fn new(pipe: Option<OwnedFd>) -> io::Result<Self> {
        if let Some(pipe) = &pipe {
            let flags = OFlag::from_bits_retain(fcntl(pipe, FcntlArg::F_GETFL)?);
            fcntl(pipe, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        }
        Ok(Self(pipe.map(File::from)))
    }

    /// Takes what is there, for as long as one reader can be kept busy by one pipe; keeps the first [`STDERR_MAX_BYTES`].
    fn read(&mut self, kept: &mut Vec<u8>) -> io::Result<()> {
        let mut buffer = [0_u8; 16 << 10];
        // A writer that never pauses must not keep this from the clock.
        for _ in 0..16 {
            let Some(pipe) = &mut self.0 else {
                return Ok(());
            };
            match pipe.read(&mut buffer) {
                Ok(0) => self.0 = None,
                Ok(length) => {
                    let room = STDERR_MAX_BYTES.saturating_sub(kept.len());
                    kept.extend(buffer.iter().take(length.min(room)));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
