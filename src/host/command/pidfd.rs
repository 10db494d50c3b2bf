//! Processes held by pidfd, and told apart by their time of birth.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
    ptr,
    sync::{Arc, OnceLock},
    time::Duration,
};

use nix::poll::{PollFd, PollFlags, PollTimeout};
use tokio::io::{Interest, unix::AsyncFd};

use crate::{
    error::{Context, Error, Kind, Result},
    host::read_kernel_file,
    task::record::Identity,
};

/// A process, held by a pidfd: its number cannot be taken by another.
#[derive(Debug)]
pub struct Pidfd {
    /// Number on the host, for messages and events.
    pub pid: u32,
    fd: Arc<OwnedFd>,
    /// Made at the first wait; one for all waiters, because epoll takes a descriptor only once.
    watch: OnceLock<AsyncFd<Arc<OwnedFd>>>,
}

impl Pidfd {
    /// Holds the process that has the number `pid` now.
    ///
    /// # Errors
    /// `NotFound` ("process already finished") when there is none; the operating system's.
    pub fn open(pid: u32) -> Result<Self> {
        let number = libc::pid_t::try_from(pid)
            .ok()
            .filter(|pid| *pid > 0)
            .ok_or_else(|| Error::invalid(format!("{pid} is not the number of a process")))?;
        // SAFETY: pidfd_open takes two integers and returns a new descriptor or -1.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, number, 0) };
        if fd < 0 {
            let error = io::Error::last_os_error();
            // A number that some thread still has but no process: that of a process which was reaped this very moment, or of a thread
            // that leads none. Linux 6.12 says EINVAL, 6.18 ENOENT.
            if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) {
                return Err(Error::not_found("process already finished"));
            }
            return Err(process_error(error, &format!("cannot open process {pid}")));
        }
        // SAFETY: the call succeeded, so the descriptor is open and nobody else's; the kernel made it close-on-exec.
        Ok(Self::new(pid, unsafe { OwnedFd::from_raw_fd(fd as RawFd) }))
    }

    pub(super) fn new(pid: u32, fd: OwnedFd) -> Self {
        Self {
            pid,
            fd: Arc::new(fd),
            watch: OnceLock::new(),
        }
    }

    /// The descriptor.
    pub fn as_fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Sends a signal to this very process.
    ///
    /// # Errors
    /// `NotFound` ("process already finished") when it has ended, reaped or not (the kernel accepts signals to a zombie, so that is
    /// asked first); `InvalidArgument` for a number that is no signal; the operating system's.
    pub fn signal(&self, signal: i32) -> Result<()> {
        if self.has_exited() {
            return Err(Error::not_found("process already finished"));
        }
        // SAFETY: the descriptor is open for the whole call; a null siginfo is what kill(2) sends.
        let sent = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.fd.as_raw_fd(),
                signal,
                ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        if sent == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() == Some(libc::EINVAL) {
            return Err(Error::invalid(format!("{signal} is not a signal")).with_source(error));
        }
        Err(process_error(
            error,
            &format!("cannot send signal {signal} to process {}", self.pid),
        ))
    }

    /// Whether the process has ended, reaped or not.
    pub fn has_exited(&self) -> bool {
        let mut fds = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
        loop {
            match nix::poll::poll(&mut fds, PollTimeout::ZERO) {
                Err(nix::errno::Errno::EINTR) => {}
                ready => return ready.is_ok_and(|ready| ready > 0),
            }
        }
    }

    /// Waits until the process has ended. Does not reap it; any number of callers may wait; safe to cancel.
    ///
    /// # Errors
    /// The operating system's when the descriptor cannot be watched (no tokio runtime, no memory).
    pub async fn wait_exited(&self) -> Result<()> {
        // Never cleared: a process that has ended stays so.
        self.watched()?
            .readable()
            .await
            .map(|_guard| ())
            .context(|| format!("cannot wait for process {}", self.pid))
    }

    pub(super) fn watched(&self) -> Result<&AsyncFd<Arc<OwnedFd>>> {
        if let Some(watch) = self.watch.get() {
            return Ok(watch);
        }
        // SAFETY: the `Arc` answers with the same descriptor for ever and keeps it open as long as the watch lives.
        match unsafe { AsyncFd::register_with_interest(Arc::clone(&self.fd), Interest::READABLE) } {
            Ok(watch) => Ok(self.watch.get_or_init(|| watch)),
            // Another thread was first.
            Err(error) => self
                .watch
                .get()
                .ok_or_else(|| io::Error::from(error))
                .context(|| format!("cannot watch process {}", self.pid)),
        }
    }
}

fn process_error(error: io::Error, what: &str) -> Error {
    match error.raw_os_error() {
        Some(libc::ESRCH) => Error::not_found("process already finished"),
        _ => Err::<(), _>(error)
            .context(|| what)
            .err()
            .unwrap_or_else(|| Error::unknown(what)),
    }
}

/// Tells the process with the number `pid` apart from any later one.
///
/// # Errors
/// `NotFound` when there is none; `Unknown` when `/proc` cannot be understood.
pub fn identity(pid: u32) -> Result<Identity> {
    let Stat { start_ticks, .. } = read_stat(pid)?;
    Ok(Identity { pid, start_ticks })
}

/// The parent of the process with the number `pid`, in the numbers of this process's pid namespace.
///
/// # Errors
/// `NotFound` when there is none; `Unknown` when `/proc` cannot be understood.
pub fn parent(pid: u32) -> Result<u32> {
    read_stat(pid).map(|stat| stat.parent)
}

/// Whether that very process still runs; a zombie does not.
pub fn is_alive(identity: &Identity) -> bool {
    read_stat(identity.pid)
        .is_ok_and(|stat| stat.start_ticks == identity.start_ticks && !matches!(stat.state, b'Z' | b'X' | b'x'))
}

/// Ends that very process, which need not be a child of ours, and waits until it has ended. Gone already is success.
///
/// # Errors
/// `DeadlineExceeded` when it still runs after `bound`; the kernel's refusal to signal it.
pub async fn end(identity: &Identity, bound: Duration) -> Result<()> {
    let gone_is_fine = |error: Error| match error.kind() {
        Kind::NotFound => Ok(()),
        _ => Err(error),
    };
    let pidfd = match Pidfd::open(identity.pid) {
        Ok(pidfd) => pidfd,
        Err(e) => return gone_is_fine(e),
    };
    // Looked at only now: the descriptor names whoever has the number, and keeps naming it.
    if !is_alive(identity) {
        return Ok(());
    }
    pidfd.signal(libc::SIGKILL).or_else(gone_is_fine)?;
    tokio::time::timeout(bound, pidfd.wait_exited())
        .await
        .unwrap_or_else(|_| {
            let pid = identity.pid;
            Err(Error::deadline(format!(
                "process {pid} still runs {bound:?} after SIGKILL"
            )))
        })
}

/// What a dead process left of the session that it led, except its own process group: the process groups of programs that it ran,
/// with everything that those ran and that has not left the group. Empty as long as the leader lives.
///
/// Only processes in the cgroup of this process, or in `cgroup`, count: should the numbers have been given away once more since
/// then, they are of another cgroup.
///
/// # Errors
/// The operating system's.
pub fn left_of_session(leader: &Identity, cgroup: &str) -> Result<Vec<Identity>> {
    let mut left = Vec::new();
    // A number that is in use as a session's is given to no new process.
    if read_stat(leader.pid).is_ok_and(|stat| stat.start_ticks != leader.start_ticks) || is_alive(leader) {
        return Ok(left);
    }
    let cgroups_of = |pid: &str| fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let own = cgroups_of("self");
    for entry in fs::read_dir("/proc").context(|| "cannot read /proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(stat) = read_stat(pid) else { continue };
        if stat.session != leader.pid || stat.group == leader.pid || stat.start_ticks < leader.start_ticks {
            continue;
        }
        let cgroups = cgroups_of(&pid.to_string());
        if cgroups == own || (!cgroup.is_empty() && cgroups.lines().any(|line| line.ends_with(&format!(":{cgroup}")))) {
            left.push(Identity {
                pid,
                start_ticks: stat.start_ticks,
            });
        }
    }
    Ok(left)
}

/// The part of proc_pid_stat(5) that is read here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stat {
    pub(super) state: u8,
    pub(super) parent: u32,
    pub(super) group: u32,
    pub(super) session: u32,
    pub(super) start_ticks: u64,
}

pub(super) fn read_stat(pid: u32) -> Result<Stat> {
    let path = format!("/proc/{pid}/stat");
    let text = read_kernel_file(&path).context(|| format!("cannot read {path}"))?;
    parse_stat(&text).ok_or_else(|| Error::unknown(format!("cannot parse {path}")))
}

/// Fields 3 to 6, and 22.
pub(super) fn parse_stat(text: &[u8]) -> Option<Stat> {
    // The program's name is in parentheses and may contain any character, so fields are counted from the last one.
    let after_name = text.iter().rposition(|byte| *byte == b')')? + 1;
    let mut fields = std::str::from_utf8(text.get(after_name..)?)
        .ok()?
        .split_ascii_whitespace();
    Some(Stat {
        state: *fields.next()?.as_bytes().first()?,
        parent: fields.next()?.parse().ok()?,
        group: fields.next()?.parse().ok()?,
        session: fields.next()?.parse().ok()?,
        start_ticks: fields.nth(15)?.parse().ok()?,
    })
}
