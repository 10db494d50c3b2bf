//! Who owns which child, and who reaps the rest.

use std::{
    collections::HashMap,
    ffi::{CString, OsStr},
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd},
        raw::{c_char, c_int},
        unix::ffi::OsStrExt,
    },
    path::Path,
    ptr,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use tokio::{
    io::AsyncReadExt,
    net::unix::pipe,
    signal::unix::{SignalKind, signal},
    sync::Notify,
};

use super::{
    Command, Group, Plan, Step, clone_and_exec,
    pidfd::{Pidfd, read_stat},
};
use crate::{
    backend::{BoxFuture, Exit},
    error::{Context, Error, Result},
};

/// Bound of each stream that [`Reaper::output`] captures; what a program writes beyond it is read and thrown away.
pub const OUTPUT_MAX_BYTES: usize = 1 << 20;

/// Status of a process whose exit nobody can know.
pub(super) const STATUS_UNKNOWN: u32 = 255;

/// Owns the processes that somebody waits for, and reaps those that nobody waits for. One per process; clones are the same reaper.
#[derive(Debug, Clone, Default)]
pub struct Reaper {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    state: Mutex<State>,
    /// Wakes [`Reaper::run`] when a zombie may have lost its owner.
    again: Notify,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) owned: HashMap<u32, Arc<Slot>>,
    holds: usize,
    /// A stranger was left alone because of a hold.
    skipped: bool,
}

#[derive(Debug)]
pub(super) struct Slot {
    pidfd: Arc<Pidfd>,
    exit: OnceLock<Exit>,
}

/// While it lives, strangers are not reaped. See [`Reaper::hold`].
#[derive(Debug)]
pub struct Hold {
    reaper: Reaper,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut state = self.reaper.lock();
        state.holds -= 1;
        if state.holds == 0 && std::mem::take(&mut state.skipped) {
            self.reaper.inner.again.notify_one();
        }
    }
}

impl Reaper {
    /// A reaper that owns nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is locked; and were it so, the set would still be right.
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a program. MUST be called on a tokio runtime with I/O enabled.
    ///
    /// Blocks until exec has succeeded or failed (below a millisecond).
    ///
    /// # Errors
    /// `NotFound` with the program's name when it does not exist; `InvalidArgument` for a NUL byte; the operating system's. Nothing is
    /// left behind.
    pub fn spawn(&self, command: Command) -> Result<Child> {
        let program = command.lookup()?;
        let what = || format!("cannot run {}", program.display());
        let text = |text: &OsStr| {
            CString::new(text.as_bytes())
                .map_err(|e| Error::invalid(format!("{}: NUL byte in {text:?}", what())).with_source(e))
        };
        let path = text(program.as_os_str())?;
        let mut argv = vec![text(command.arg0.as_ref().unwrap_or(&command.program))?];
        for arg in &command.args {
            argv.push(text(arg)?);
        }
        let mut envp = Vec::new();
        for (key, value) in command.environment() {
            let mut variable = key;
            variable.push("=");
            variable.push(value);
            envp.push(text(&variable)?);
        }
        let cwd = match &command.cwd {
            Some(cwd) => Some(text(cwd.as_os_str())?),
            None => None,
        };
        let pointers = |strings: &[CString]| -> Vec<*const c_char> {
            strings.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect()
        };
        let (argv_pointers, envp_pointers) = (pointers(&argv), pointers(&envp));

        let null = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/null")
            .context(|| "cannot open /dev/null")?;
        let mut fds: Vec<(c_int, c_int)> = command
            .fds
            .iter()
            .map(|(fd, number)| (fd.as_raw_fd(), *number))
            .collect();
        for number in 0..=2 {
            if !fds.iter().any(|(_, wanted)| *wanted == number) {
                fds.push((null.as_raw_fd(), number));
            }
        }

        let mut plan = Plan {
            program: path.as_ptr(),
            argv: argv_pointers.as_ptr(),
            envp: envp_pointers.as_ptr(),
            cwd: cwd.as_ref().map_or(ptr::null(), |cwd| cwd.as_ptr()),
            fds: fds.as_mut_ptr(),
            fds_len: fds.len(),
            parent: if command.die_with_parent {
                nix::unistd::getpid().as_raw()
            } else {
                0
            },
            group: command.group,
            failed: Step::Nothing,
            errno: 0,
        };
        // Between clone and registration the child is a stranger.
        let hold = self.hold();
        let (pid, pidfd) = clone_and_exec(&mut plan).context(what)?;
        let child = self.own(Arc::new(Pidfd::new(pid, pidfd))).map(|owned| Child {
            owned,
            grouped: command.group != Group::Inherited,
            left: false,
        });
        drop(hold);
        if plan.failed == Step::Nothing {
            return child;
        }
        let error = io::Error::from_raw_os_error(plan.errno);
        let context = match plan.failed {
            Step::Cwd => format!(
                "{} in folder {}",
                what(),
                command.cwd.as_deref().unwrap_or(Path::new("")).display()
            ),
            _ => what(),
        };
        Err(error).context(|| context)
    }

    /// Runs a program to its end and captures what it writes, at most [`OUTPUT_MAX_BYTES`] of each stream.
    ///
    /// It runs in a process group of its own. At the bound, or when the future is dropped, the group is killed and the program reaped.
    /// A descendant that keeps the streams open after the program's exit is neither waited for nor killed.
    ///
    /// # Errors
    /// Those of [`Reaper::spawn`]; `DeadlineExceeded` with program and bound. A status other than 0 is not an error here.
    pub async fn output(&self, command: Command, timeout: Duration) -> Result<Output> {
        let name = command.program.display().to_string();
        let (stdout, stdout_end) = output_pipe()?;
        let (stderr, stderr_end) = output_pipe()?;
        let mut child = self.spawn(command.process_group().stdout(stdout_end).stderr(stderr_end))?;
        let (mut stdout, mut stderr) = (Capture::new(stdout), Capture::new(stderr));
        let run = async {
            // The pipes are emptied all the time, so that the program is not stuck in a write.
            let read = async {
                tokio::join!(stdout.read_on(), stderr.read_on());
                std::future::pending::<Result<Exit>>().await
            };
            let exit = tokio::select! {
                exit = child.wait() => exit,
                never = read => never,
            };
            stdout.read_rest();
            stderr.read_rest();
            exit
        };
        match tokio::time::timeout(timeout, run).await {
            Ok(exit) => Ok(Output {
                exit: exit?,
                stdout: stdout.bytes,
                stderr: stderr.bytes,
            }),
            Err(_) => {
                child.kill();
                let _ = child.wait().await;
                Err(Error::deadline(format!(
                    "{name} did not end within {} ms; it was killed",
                    timeout.as_millis()
                )))
            }
        }
    }

    /// Takes over a process that became our child when its parent left (see [`become_subreaper`]).
    ///
    /// The future resolves when it has ended and was reaped; the status is 255 if it was not our child. The future may be dropped: the
    /// process is then reaped by [`Reaper::run`]. The caller MUST hold a [`Hold`] taken before the launch, or the exit of a short
    /// process may already be gone. MUST be called on a tokio runtime with I/O enabled.
    ///
    /// # Errors
    /// `NotFound` ("process already finished") when no process has that number; the operating system's.
    pub fn adopt(&self, pid: u32) -> Result<(Arc<Pidfd>, BoxFuture<'static, Exit>)> {
        let owned = self.own(Arc::new(Pidfd::open(pid)?))?;
        Ok((
            Arc::clone(&owned.slot.pidfd),
            Box::pin(async move { owned.wait().await }),
        ))
    }

    /// Whether a program that was started here may have made that process: it is a child of such a program, which runs or is just
    /// being killed, or has become ours, and nobody has taken it over. What programs tell about pids is not to be believed without that.
    pub fn may_be_left_to_us(&self, pid: u32) -> bool {
        let own = std::process::id();
        if self.lock().owned.contains_key(&pid) {
            return false;
        }
        let Ok(process) = read_stat(pid) else { return false };
        if process.parent == own {
            return true;
        }
        // The processes of containers have parents that are our children too, but those lead sessions of their own.
        let (Ok(parent), Ok(us)) = (read_stat(process.parent), read_stat(own)) else {
            return false;
        };
        parent.parent == own && parent.session == us.session
    }

    /// While the guard lives, strangers are not reaped: a launch is in flight whose pid is not known yet.
    ///
    /// Keep it for the launch only, and never while waiting for a container to end: the init of a pid namespace does not end before
    /// every process in it is reaped, strangers of ours too (pid_namespaces(7)).
    pub fn hold(&self) -> Hold {
        self.lock().holds += 1;
        Hold { reaper: self.clone() }
    }

    /// Reaps what nobody waits for, until it is dropped. MUST run as long as this process has children; once.
    ///
    /// # Errors
    /// The operating system's when SIGCHLD cannot be listened to.
    pub async fn run(&self) -> Result<()> {
        let mut exits = signal(SignalKind::child()).context(|| "cannot listen to SIGCHLD")?;
        loop {
            self.reap_zombies();
            tokio::select! {
                _ = exits.recv() => {}
                () = self.inner.again.notified() => {}
            }
        }
    }

    fn own(&self, pidfd: Arc<Pidfd>) -> Result<Owned> {
        let slot = Arc::new(Slot {
            pidfd,
            exit: OnceLock::new(),
        });
        self.lock().owned.insert(slot.pidfd.pid, Arc::clone(&slot));
        let owned = Owned {
            reaper: self.clone(),
            slot,
        };
        // Now, so that waiting cannot fail later.
        owned.slot.pidfd.watched()?;
        Ok(owned)
    }

    /// The kernel shows one zombie at a time, the eldest child first. One that is owned is reaped for its owner, who may not be waiting
    /// yet; so it never hides those behind it.
    fn reap_zombies(&self) {
        let mut state = self.lock();
        while let Ok(Some((pid, _))) = wait_id(libc::P_ALL, 0, libc::WNOWAIT) {
            let reaped = match state.owned.get(&pid).cloned() {
                Some(slot) => state.reap(&slot),
                None if state.holds > 0 => {
                    state.skipped = true;
                    false
                }
                // It cannot have become another process: only this module reaps, and the lock is held.
                None => matches!(wait_id(libc::P_PID, pid, 0), Ok(Some(_))),
            };
            if !reaped {
                return;
            }
        }
    }
}

impl State {
    /// Reaps a process that has ended, for its owner; whether that is done (now or before).
    fn reap(&mut self, slot: &Arc<Slot>) -> bool {
        if slot.exit.get().is_some() {
            return true;
        }
        let status = match wait_id(libc::P_PIDFD, slot.pidfd.as_fd().as_raw_fd() as u32, 0) {
            Ok(Some((_, status))) => status,
            // Ended, but a tracer (strace) has not let go of it.
            Ok(None) => return false,
            // Not our child, so nobody tells us.
            Err(_) => STATUS_UNKNOWN,
        };
        self.disown(slot);
        slot.exit.set(Exit::now(status)).is_ok()
    }

    fn disown(&mut self, slot: &Arc<Slot>) {
        // The number may belong to a new child already.
        if self
            .owned
            .get(&slot.pidfd.pid)
            .is_some_and(|known| Arc::ptr_eq(known, slot))
        {
            self.owned.remove(&slot.pidfd.pid);
        }
    }
}

/// waitid(2) for ended children, without blocking: the pid and the status (128 + signal).
fn wait_id(kind: libc::idtype_t, id: u32, more: c_int) -> io::Result<Option<(u32, u32)>> {
    // SAFETY: an all-zero siginfo_t is valid, and waitid writes nothing else. The pid stays 0 when there is nothing to report.
    let (done, info) = unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let done = libc::waitid(kind, id, &mut info, libc::WEXITED | libc::WNOHANG | more);
        (done, info)
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: waitid fills these fields (SIGCHLD), or leaves them zero.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    if pid == 0 {
        return Ok(None);
    }
    let status = match info.si_code {
        libc::CLD_EXITED => status as u32,
        _ => 128 + status as u32,
    };
    Ok(Some((pid as u32, status)))
}

/// The right to the exit of one process.
#[derive(Debug)]
struct Owned {
    reaper: Reaper,
    slot: Arc<Slot>,
}

impl Owned {
    async fn wait(&self) -> Exit {
        if self.slot.pidfd.wait_exited().await.is_err() {
            // The runtime is being shut down; nobody reads the answer.
            return Exit::now(STATUS_UNKNOWN);
        }
        self.reap();
        if let Some(exit) = self.slot.exit.get() {
            return *exit;
        }
        // A tracer holds the zombie. When it lets go, SIGCHLD comes again.
        let Ok(mut exits) = signal(SignalKind::child()) else {
            return Exit::now(STATUS_UNKNOWN);
        };
        loop {
            self.reap();
            if let Some(exit) = self.slot.exit.get() {
                return *exit;
            }
            exits.recv().await;
        }
    }

    fn reap(&self) {
        self.reaper.lock().reap(&self.slot);
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        let mut state = self.reaper.lock();
        if self.slot.exit.get().is_none() {
            // A stranger from now on.
            state.disown(&self.slot);
            self.reaper.inner.again.notify_one();
        }
    }
}

/// A program that was started by [`Reaper::spawn`]. Dropped before its exit was seen, it is killed (with its process group, if it has
/// one of its own) and reaped by [`Reaper::run`]; [`Child::leave`] lets it live.
#[derive(Debug)]
pub struct Child {
    owned: Owned,
    grouped: bool,
    left: bool,
}

impl Child {
    /// Its number.
    pub fn pid(&self) -> u32 {
        self.owned.slot.pidfd.pid
    }

    /// The process, for signals.
    pub fn pidfd(&self) -> Arc<Pidfd> {
        Arc::clone(&self.owned.slot.pidfd)
    }

    /// Waits for its end and reaps it. Safe to cancel and to repeat.
    ///
    /// # Errors
    /// None so far; the type leaves room.
    pub async fn wait(&mut self) -> Result<Exit> {
        Ok(self.owned.wait().await)
    }

    /// Leaves it to end by itself; [`Reaper::run`] reaps it then.
    pub fn leave(mut self) {
        self.left = true;
    }

    /// Sends SIGKILL to it, and to its process group if it has one of its own. Does nothing once it was reaped.
    pub fn kill(&self) {
        // Under the lock it is not reaped in between, so the number is still the group's.
        let _state = self.owned.reaper.lock();
        if self.owned.slot.exit.get().is_some() {
            return;
        }
        let _ = self.owned.slot.pidfd.signal(libc::SIGKILL);
        if self.grouped {
            // SAFETY: kill takes two integers. The group exists as long as its leader is not reaped.
            unsafe { libc::kill(-(self.pid() as libc::pid_t), libc::SIGKILL) };
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.left {
            self.kill();
        }
    }
}

/// What a program left behind, from [`Reaper::output`].
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub exit: Exit,
    /// What it wrote, at most [`OUTPUT_MAX_BYTES`].
    pub stdout: Vec<u8>,
    /// What it wrote, at most [`OUTPUT_MAX_BYTES`].
    pub stderr: Vec<u8>,
}

fn output_pipe() -> Result<(pipe::Receiver, OwnedFd)> {
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).context(|| "cannot make a pipe")?;
    let read = pipe::Receiver::from_owned_fd(read).context(|| "cannot watch a pipe")?;
    Ok((read, write))
}

/// The reading side of one captured stream.
struct Capture {
    from: pipe::Receiver,
    bytes: Vec<u8>,
}

impl Capture {
    fn new(from: pipe::Receiver) -> Self {
        Self {
            from,
            bytes: Vec::new(),
        }
    }

    async fn read_on(&mut self) {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = self.from.read(&mut buffer).await {
            self.keep(&buffer[..n]);
        }
    }

    /// What is in the pipe now.
    fn read_rest(&mut self) {
        let mut buffer = [0; 4096];
        // A descendant may go on writing: no more than a pipe can hold.
        for _ in 0..(OUTPUT_MAX_BYTES / buffer.len()) {
            match nix::unistd::read(&self.from, &mut buffer) {
                Ok(n @ 1..) => self.keep(&buffer[..n]),
                _ => return,
            }
        }
    }

    fn keep(&mut self, bytes: &[u8]) {
        let room = OUTPUT_MAX_BYTES - self.bytes.len();
        self.bytes.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }
}
