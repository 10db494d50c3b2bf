//! The only place that forks and reaps.
//!
//! Every process that this crate starts is a [`Child`] of the [`Reaper`]; every process that becomes our child without being started
//! by us (a container's init, once the runtime program has left) is given to it by [`Reaper::adopt`]. Each of them is held by a
//! pidfd and reaped through that pidfd, never by number, so that a reused pid cannot be mistaken for it. What nobody asked for
//! (orphans of containers without a pid namespace of their own) is reaped by [`Reaper::run`].
//!
//! Nothing else in the process may wait for children.

use std::{
    collections::HashMap,
    ffi::{CString, OsStr, OsString},
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
        raw::{c_char, c_int, c_void},
        unix::{ffi::OsStrExt, fs::PermissionsExt},
    },
    path::{Path, PathBuf},
    ptr,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use nix::poll::{PollFd, PollFlags, PollTimeout};
use tokio::{
    io::{AsyncReadExt, Interest, unix::AsyncFd},
    net::unix::pipe,
    signal::unix::{SignalKind, signal},
    sync::Notify,
};

use crate::{
    backend::{BoxFuture, Exit},
    error::{Context, Error, Kind, Result},
    task::record::Identity,
};

/// Bound of each stream that [`Reaper::output`] captures; what a program writes beyond it is read and thrown away.
pub const OUTPUT_MAX_BYTES: usize = 1 << 20;

/// Status of a process whose exit nobody can know.
const STATUS_UNKNOWN: u32 = 255;

/// Stack of a child between clone and exec. The child only makes system calls; unoptimised builds need some KiB.
const CHILD_STACK_BYTES: usize = 64 << 10;

/// Makes orphaned descendants our children, so that a container's init is reaped here after the runtime program has left.
///
/// # Errors
/// The operating system's.
pub fn become_subreaper() -> Result<()> {
    nix::sys::prctl::set_child_subreaper(true).context(|| "cannot become the reaper of orphaned descendants")
}

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
            return Err(process_error(
                io::Error::last_os_error(),
                &format!("cannot open process {pid}"),
            ));
        }
        // SAFETY: the call succeeded, so the descriptor is open and nobody else's; the kernel made it close-on-exec.
        Ok(Self::new(pid, unsafe { OwnedFd::from_raw_fd(fd as RawFd) }))
    }

    fn new(pid: u32, fd: OwnedFd) -> Self {
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

    fn watched(&self) -> Result<&AsyncFd<Arc<OwnedFd>>> {
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
struct Stat {
    state: u8,
    parent: u32,
    group: u32,
    session: u32,
    start_ticks: u64,
}

fn read_stat(pid: u32) -> Result<Stat> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read(&path).context(|| format!("cannot read {path}"))?;
    parse_stat(&text).ok_or_else(|| Error::unknown(format!("cannot parse {path}")))
}

/// Fields 3 to 6, and 22.
fn parse_stat(text: &[u8]) -> Option<Stat> {
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

/// A program to be run, with everything that its process starts with.
///
/// Without more words: the environment of this process, its working folder, `/dev/null` for stdin, stdout and stderr, no other
/// descriptor, no signal blocked or ignored.
#[derive(Debug)]
pub struct Command {
    program: OsString,
    args: Vec<OsString>,
    clear_env: bool,
    env: Vec<(OsString, OsString)>,
    cwd: Option<PathBuf>,
    fds: Vec<(OwnedFd, RawFd)>,
    die_with_parent: bool,
    group: Group,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Group {
    Inherited,
    Process,
    Session,
}

impl Command {
    /// A program: a path when the name has a `/`, else looked up in `PATH`.
    pub fn new(program: impl Into<OsString>) -> Self {
        Self {
            program: program.into(),
            args: Vec::new(),
            clear_env: false,
            env: Vec::new(),
            cwd: None,
            fds: Vec::new(),
            die_with_parent: false,
            group: Group::Inherited,
        }
    }

    /// One more argument.
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// More arguments.
    pub fn args<I: IntoIterator<Item: Into<OsString>>>(mut self, args: I) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Starts with an empty environment.
    pub fn env_clear(mut self) -> Self {
        self.clear_env = true;
        self
    }

    /// Sets a variable.
    pub fn env(mut self, key: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.env.push((key.into(), value.into()));
        self
    }

    /// The working folder.
    pub fn cwd(mut self, path: impl Into<PathBuf>) -> Self {
        self.cwd = Some(path.into());
        self
    }

    /// Descriptor 0.
    pub fn stdin(self, fd: OwnedFd) -> Self {
        self.fd(0, fd)
    }

    /// Descriptor 1.
    pub fn stdout(self, fd: OwnedFd) -> Self {
        self.fd(1, fd)
    }

    /// Descriptor 2.
    pub fn stderr(self, fd: OwnedFd) -> Self {
        self.fd(2, fd)
    }

    /// A descriptor that the program finds at `number`; a later call for the same number wins.
    pub fn fd(mut self, number: RawFd, fd: OwnedFd) -> Self {
        self.fds.retain(|(_, taken)| *taken != number);
        self.fds.push((fd, number));
        self
    }

    /// The program gets SIGKILL when the thread that spawns it ends (PR_SET_PDEATHSIG), also when that happened before it was set.
    pub fn die_with_parent(mut self) -> Self {
        self.die_with_parent = true;
        self
    }

    /// A process group of its own; it is killed as a whole when its [`Child`] is dropped.
    pub fn process_group(mut self) -> Self {
        self.group = Group::Process;
        self
    }

    /// A session (and process group) of its own; it is killed as a whole when its [`Child`] is dropped.
    pub fn session(mut self) -> Self {
        self.group = Group::Session;
        self
    }

    /// Variables as the program will see them, the last of a name winning.
    fn environment(&self) -> Vec<(OsString, OsString)> {
        let mut env: Vec<(OsString, OsString)> = if self.clear_env {
            Vec::new()
        } else {
            std::env::vars_os()
                .filter(|(key, _)| !self.env.iter().any(|(set, _)| set == key))
                .collect()
        };
        for (i, (key, value)) in self.env.iter().enumerate() {
            if !self.env[i + 1..].iter().any(|(later, _)| later == key) {
                env.push((key.clone(), value.clone()));
            }
        }
        env
    }

    fn lookup(&self) -> Result<PathBuf> {
        if self.program.as_bytes().contains(&b'/') {
            return Ok(self.program.clone().into());
        }
        let path = std::env::var_os("PATH")
            .unwrap_or_else(|| "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into());
        let runs = |file: &PathBuf| {
            fs::metadata(file).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
        };
        std::env::split_paths(&path)
            .map(|folder| folder.join(&self.program))
            .find(runs)
            .ok_or_else(|| {
                Error::not_found(format!(
                    "program {} is in none of the folders of PATH ({})",
                    self.program.display(),
                    path.display()
                ))
            })
    }
}

/// What the child reads between clone and exec. It shares the parent's memory, so it must not allocate, lock or panic.
struct Plan {
    program: *const c_char,
    argv: *const *const c_char,
    envp: *const *const c_char,
    /// Null to stay.
    cwd: *const c_char,
    /// (descriptor now, number wanted).
    fds: *mut (c_int, c_int),
    fds_len: usize,
    /// The parent to die with; 0 for none.
    parent: libc::pid_t,
    group: Group,
    /// Written by the child: where it failed, and the errno.
    failed: Step,
    errno: c_int,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Nothing,
    Prepare,
    Cwd,
    Exec,
}

extern "C" fn child(plan: *mut c_void) -> c_int {
    // SAFETY: `plan` is the `Plan` of `clone_and_exec`, whose thread sleeps until this process has called exec or exit (CLONE_VFORK),
    // so it is valid and not used by anybody else.
    let plan = unsafe { &mut *plan.cast::<Plan>() };
    // SAFETY: as above for every pointer in it.
    plan.failed = unsafe { become_program(plan) };
    // SAFETY: errno is the thread's, and this process has borrowed the thread that sleeps.
    plan.errno = unsafe { *libc::__errno_location() };
    127
}

/// Returns only when something failed; errno says why.
///
/// # Safety
/// To be called in a child made by clone(CLONE_VM | CLONE_VFORK), with all signals blocked and every pointer of `plan` valid.
unsafe fn become_program(plan: &Plan) -> Step {
    // SAFETY: only system calls (async-signal-safe) on valid pointers and on this process's own descriptor table, signal table and
    // attributes, which it does not share with the parent.
    unsafe {
        // The kernel's struct sigaction with SIG_DFL, no flags and an empty mask is all zero.
        let default = [0u64; 4];
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        // Handlers must be gone before signals are let through: they would run on the parent's memory. Not by libc's sigaction,
        // which leaves out the two that it keeps for itself; whoever started us may have left them ignored.
        for signal in 1..=64 {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                default.as_ptr(),
                ptr::null_mut::<u64>(),
                size_of::<u64>(),
            );
        }
        let grouped = match plan.group {
            Group::Inherited => 0,
            Group::Process => libc::setpgid(0, 0),
            Group::Session => libc::setsid(),
        };
        if grouped < 0 {
            return Step::Prepare;
        }
        if plan.parent != 0 {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) < 0 {
                return Step::Prepare;
            }
            // The parent may have died before the line above.
            if libc::getppid() != plan.parent {
                libc::_exit(128 + libc::SIGKILL);
            }
        }
        let mut highest = 2;
        for i in 0..plan.fds_len {
            highest = highest.max((*plan.fds.add(i)).1);
        }
        // First out of the way of the wanted numbers, then to their places.
        for i in 0..plan.fds_len {
            let entry = &mut *plan.fds.add(i);
            if entry.0 <= highest {
                entry.0 = libc::fcntl(entry.0, libc::F_DUPFD_CLOEXEC, highest + 1);
                if entry.0 < 0 {
                    return Step::Prepare;
                }
            }
        }
        // Descriptors of this process are close-on-exec; what it was itself started with by mistake ends here too. Kernels before
        // 5.11 refuse, and then the first sentence has to do.
        libc::syscall(libc::SYS_close_range, 3, c_int::MAX, libc::CLOSE_RANGE_CLOEXEC);
        for i in 0..plan.fds_len {
            let (now, wanted) = *plan.fds.add(i);
            if libc::dup2(now, wanted) < 0 {
                return Step::Prepare;
            }
        }
        if !plan.cwd.is_null() && libc::chdir(plan.cwd) < 0 {
            return Step::Cwd;
        }
        libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut());
        libc::execve(plan.program, plan.argv, plan.envp);
        Step::Exec
    }
}

/// Starts the process of `plan`; answers its pid and pidfd once it has called exec or exit.
fn clone_and_exec(plan: &mut Plan) -> io::Result<(u32, OwnedFd)> {
    let mut stack = Vec::<u128>::with_capacity(CHILD_STACK_BYTES / size_of::<u128>());
    let top = stack.spare_capacity_mut().as_mut_ptr_range().end;
    let mut pidfd: c_int = -1;
    // A copy of the memory is not made (CLONE_VM): the time of a spawn does not depend on the size of this process, and the child
    // reports errors through `plan`. No handler of ours may run in the child, so signals are blocked until it has reset them.
    // SAFETY: `stack` outlives the child's use of it, because CLONE_VFORK lets this thread sleep until exec or exit; it grows down
    // from `top`, which is aligned to 16. `plan` likewise. `child` keeps to what such a child may do.
    let pid = unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        let pid = libc::clone(
            child,
            top.cast(),
            libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD,
            ptr::from_mut(plan).cast(),
            &mut pidfd as *mut c_int,
        );
        let error = io::Error::last_os_error();
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, ptr::null_mut());
        if pid < 0 {
            return Err(error);
        }
        pid
    };
    // SAFETY: clone succeeded, so CLONE_PIDFD has stored a new descriptor, close-on-exec.
    Ok((pid as u32, unsafe { OwnedFd::from_raw_fd(pidfd) }))
}

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
struct State {
    owned: HashMap<u32, Arc<Slot>>,
    holds: usize,
    /// A stranger was left alone because of a hold.
    skipped: bool,
}

#[derive(Debug)]
struct Slot {
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

    fn lock(&self) -> MutexGuard<'_, State> {
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
        let mut argv = vec![text(&command.program)?];
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

    /// Whether a program that was started here may have made that process: it is a child of such a program which still runs, or has
    /// become ours, and nobody has taken it over. What programs tell about pids is not to be believed without that.
    pub fn may_be_left_to_us(&self, pid: u32) -> bool {
        let own = std::process::id();
        let is_owned = |pid: u32| self.lock().owned.contains_key(&pid);
        let Ok(process) = read_stat(pid) else { return false };
        if process.parent == own {
            return !is_owned(pid);
        }
        // The processes of containers have owned parents too, but those lead sessions of their own.
        let (Ok(parent), Ok(us)) = (read_stat(process.parent), read_stat(own)) else {
            return false;
        };
        parent.parent == own && is_owned(process.parent) && parent.session == us.session
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

/// For tests of every module that run a [`Reaper`] to the full: it reaps all strangers, so it must not share a process with tests
/// that start children of their own.
#[cfg(test)]
pub(crate) mod isolation {
    const MARK: &str = "PROXMOX_LXCRI_TEST_INSIDE";

    /// Runs the test `name` (its full path inside the crate) again in a process of its own, behind the command line `wrapper`.
    /// Answers whether this is that process, so that the body is to be run.
    pub(crate) fn inside(name: &str, wrapper: &[&str]) -> bool {
        if std::env::var_os(MARK).is_some_and(|inside| inside == name) {
            return true;
        }
        let exe = std::env::current_exe().unwrap();
        let mut line: Vec<&std::ffi::OsStr> = wrapper.iter().map(std::ffi::OsStr::new).collect();
        line.push(exe.as_os_str());
        let output = std::process::Command::new(line[0])
            .args(&line[1..])
            .args(["--exact", name, "--nocapture", "--test-threads=1"])
            .env(MARK, name)
            .output()
            .unwrap();
        let text = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        // "1 passed" also tells a mistyped name from a test that ran.
        assert!(
            output.status.success() && text.contains("1 passed"),
            "{name}: {}\n{text}",
            output.status
        );
        false
    }

    /// A current-thread runtime, as the shim has it.
    pub(crate) fn block_on<F: Future>(body: F) -> F::Output {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(async { tokio::time::timeout(std::time::Duration::from_secs(60), body).await })
            .expect("a minute is enough for every test")
    }
}

#[cfg(test)]
mod tests;
