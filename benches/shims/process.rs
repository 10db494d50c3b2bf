//! Foreign processes: spawned commands, pidfds, memory and CPU time.

use std::{
    fs,
    os::fd::{FromRawFd, OwnedFd},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::wait::{WaitPidFlag, waitpid},
    time::{ClockId, clock_getcpuclockid, clock_gettime},
    unistd::Pid,
};
use proxmox_lxcri::{
    backend::lxc::monitor::ACTION,
    error::{Context, Error, Result},
};
use tokio::io::{Interest, unix::AsyncFd};

/// Bound of every wait for a command, a process or an event.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Runs `command` to its end on a thread of its own; the time goes from before the spawn to after the reaping.
///
/// # Errors
/// The operating system's; a non-zero exit, with the command's stderr if it went through a pipe; `DeadlineExceeded` after
/// [`PATIENCE`] (the command goes on then, until the process namespace ends).
pub(crate) async fn run(mut command: Command, stdin: Vec<u8>) -> Result<Finished> {
    let text = format!("{command:?}");
    let work = tokio::task::spawn_blocking(move || -> std::io::Result<_> {
        let begin = Instant::now();
        let mut child = command.spawn()?;
        if let Some(mut pipe) = child.stdin.take() {
            // Shorter than a pipe's buffer; a program that does not read it is free not to.
            let _ = std::io::Write::write_all(&mut pipe, &stdin);
        }
        let output = child.wait_with_output()?;
        Ok((begin, Instant::now(), output))
    });
    let joined = tokio::time::timeout(PATIENCE, work)
        .await
        .map_err(|_| Error::deadline(format!("{text} did not end in {PATIENCE:?}")))?;
    let (begin, end, output) = joined
        .map_err(|e| Error::unknown(format!("the thread of {text} panicked")).with_source(e))?
        .context(|| format!("cannot run {text}"))?;
    let stdout = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        return Err(Error::unknown(format!(
            "{text} ended with {}: {} {}",
            output.status,
            stdout.trim(),
            stderr.trim()
        )));
    }
    Ok(Finished {
        begin,
        end,
        stdout: stdout.into_owned(),
    })
}

/// Spawns `command`, which is waited for through [`Process`]; the time is that before the spawn.
///
/// # Errors
/// The operating system's.
pub(crate) async fn spawn(mut command: Command) -> Result<(Instant, Process)> {
    let text = format!("{command:?}");
    let work = tokio::task::spawn_blocking(move || -> std::io::Result<_> {
        let begin = Instant::now();
        Ok((begin, command.spawn()?.id()))
    });
    let joined = work.await;
    let (begin, pid) = joined
        .map_err(|e| Error::unknown(format!("the thread of {text} panicked")).with_source(e))?
        .context(|| format!("cannot run {text}"))?;
    Ok((begin, Process::open(pid)?))
}

/// A command that ended well.
pub(crate) struct Finished {
    /// Before the spawn.
    pub(crate) begin: Instant,
    /// After the reaping.
    pub(crate) end: Instant,
    /// What it said, if its stdout was a pipe.
    pub(crate) stdout: String,
}

impl Finished {
    /// How long it took.
    pub(crate) fn took(&self) -> Duration {
        self.end - self.begin
    }
}

/// A command without stdio.
pub(crate) fn quiet(program: &std::path::Path) -> Command {
    let mut command = Command::new(program);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    command
}

/// A process that this program is, or becomes by reparenting, the parent of.
pub(crate) struct Process {
    pid: Pid,
    fd: AsyncFd<OwnedFd>,
}

impl Process {
    /// Opens a pidfd.
    ///
    /// # Errors
    /// `NotFound` when there is no such process.
    pub(crate) fn open(pid: u32) -> Result<Self> {
        let pid = i32::try_from(pid).map_err(|e| Error::invalid(format!("pid {pid}")).with_source(e))?;
        // SAFETY: pidfd_open takes two integers; it returns a new descriptor, close-on-exec by definition, or -1.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error()).context(|| format!("cannot open a pidfd of {pid}"));
        }
        // SAFETY: the descriptor is new and nobody else's; it fits an int by pidfd_open's contract.
        #[allow(clippy::cast_possible_truncation)]
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        // SAFETY: the descriptor is owned by the AsyncFd alone and stays open until that is dropped.
        let registered = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
        let fd = registered
            .map_err(std::io::Error::from)
            .context(|| format!("cannot poll the pidfd of {pid}"))?;
        Ok(Self {
            pid: Pid::from_raw(pid),
            fd,
        })
    }

    /// Its pid.
    pub(crate) fn pid(&self) -> u32 {
        self.pid.as_raw().cast_unsigned()
    }

    /// When the process was seen to be gone; a zombie of ours is reaped.
    ///
    /// # Errors
    /// `DeadlineExceeded` after [`PATIENCE`].
    pub(crate) async fn gone(&self) -> Result<Instant> {
        let ready = tokio::time::timeout(PATIENCE, self.fd.readable()).await;
        let at = Instant::now();
        drop(
            ready
                .map_err(|_| Error::deadline(format!("process {} did not end in {PATIENCE:?}", self.pid)))?
                .context(|| format!("cannot poll the pidfd of {}", self.pid))?,
        );
        // Not our child (yet): its parent reaps it.
        let _ = waitpid(self.pid, Some(WaitPidFlag::WNOHANG));
        Ok(at)
    }
}

/// The children of a process.
///
/// # Errors
/// The operating system's.
pub(crate) fn children(parent: u32) -> Result<Vec<u32>> {
    let entries = fs::read_dir("/proc").context(|| "cannot read /proc")?;
    let pids = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    // Who ends meanwhile is nobody's child any more. The name, in brackets, may hold anything.
    Ok(pids
        .filter(|pid: &u32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
            fields.split_whitespace().nth(1) == Some(parent.to_string().as_str())
        })
        .collect())
}

/// Memory of a process or of several, KiB.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Memory {
    /// Proportional set size: shared pages divided by the number of their users.
    pub(crate) pss_kib: f64,
    /// Pages of nobody else.
    pub(crate) private_kib: f64,
}

/// What a shim costs: its own memory, and that of the monitors that it keeps for LXC's containers.
///
/// # Errors
/// As [`memory`].
pub(crate) fn memory_of_shim(shim: u32) -> Result<Memory> {
    let mut sum = memory(shim)?;
    for child in children(shim)? {
        let command = fs::read(format!("/proc/{child}/cmdline")).unwrap_or_default();
        if command.split(|byte| *byte == 0).nth(1) == Some(ACTION.as_bytes()) {
            let monitor = memory(child)?;
            sum.pss_kib += monitor.pss_kib;
            sum.private_kib += monitor.private_kib;
        }
    }
    Ok(sum)
}

/// Reads `/proc/<pid>/smaps_rollup`.
///
/// # Errors
/// The operating system's; `Unknown` when a field is missing.
fn memory(pid: u32) -> Result<Memory> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).context(|| format!("cannot read {path}"))?;
    let field = |name: &str| -> Result<f64> {
        text.lines()
            .find_map(|line| {
                line.strip_prefix(name)?
                    .strip_prefix(':')?
                    .split_whitespace()
                    .next()?
                    .parse()
                    .ok()
            })
            .ok_or_else(|| Error::unknown(format!("{path} has no field {name}")))
    };
    Ok(Memory {
        pss_kib: field("Pss")?,
        private_kib: field("Private_Clean")? + field("Private_Dirty")?,
    })
}

/// CPU time of all threads of a process so far, ended ones included; children are not.
///
/// # Errors
/// `NotFound` when there is no such process.
pub(crate) fn cpu_time(pid: u32) -> Result<Duration> {
    let clock: nix::Result<ClockId> = clock_getcpuclockid(Pid::from_raw(pid.cast_signed()));
    let time = clock
        .and_then(clock_gettime)
        .context(|| format!("cannot read the CPU clock of process {pid}"))?;
    Ok(time.into())
}

/// Processes and threads created on the whole machine since its boot.
///
/// # Errors
/// The operating system's.
pub(crate) fn forks() -> Result<f64> {
    let text = fs::read_to_string("/proc/stat").context(|| "cannot read /proc/stat")?;
    text.lines()
        .find_map(|line| line.strip_prefix("processes ")?.parse().ok())
        .ok_or_else(|| Error::unknown("/proc/stat has no field processes"))
}
