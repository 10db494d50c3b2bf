//! The shim itself: one process per group, serving the task service on the socket that `start` gave it.

use std::{
    collections::HashMap,
    env,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        prctl,
        socket::{SockType, getsockopt, sockopt},
        stat::{Mode, umask},
    },
};
use tokio::signal::unix::{SignalKind, signal};
use ttrpc::asynchronous::{Server, Service, transport::Listener};

use super::{args::Flags, events::Publisher, log::FifoLog};
use crate::{
    backend::{BoxFuture, check_id},
    error::{Context, Error, Result},
    host::command::become_subreaper,
};

/// The descriptor on which `start` leaves the socket.
pub const LISTENER_FD: i32 = 3;
/// The descriptor of a pipe with a byte once `start` has told the address, and its end when `start` has died before.
pub const START_FD: i32 = 4;

/// Bound of the wait for `start`, which has a few system calls to make.
const START_BOUND: Duration = Duration::from_secs(10);

/// When a shim first looks whether its bundle is still there.
const FIRST_LOOK: Duration = Duration::from_secs(1);

/// Bound of the delivery of the last events.
const DRAIN_BOUND: Duration = Duration::from_secs(5);
/// Bound of the answers that are still being written at the end.
const GOODBYE_BOUND: Duration = Duration::from_secs(1);

/// What the server needs of the engine.
pub struct Parts {
    /// The ttrpc services by their full names.
    pub services: HashMap<String, Service>,
    /// Resolves when the shim shall end: Shutdown was called and nothing lives.
    pub done: BoxFuture<'static, ()>,
    /// Whether a container lives, which keeps signals from ending the shim.
    pub busy: Box<dyn Fn() -> bool + Send + Sync>,
    /// Refuses tasks from now on if there is none; whether there was none.
    pub end_if_empty: Box<dyn Fn() -> bool + Send + Sync>,
}

/// Runs the shim until it has nothing to do any more. `build` makes the engine, inside the runtime.
///
/// The process is prepared here: name, umask, memory allocator, log, subreaper, working directory `/` (so that neither the bundle nor
/// what it lies on is kept busy).
///
/// # Errors
/// `FailedPrecondition` when descriptor 3 is not a listening socket: somebody ran the program without an action.
pub fn serve(flags: &Flags, build: impl FnOnce(&Flags, Arc<Publisher>) -> Parts) -> Result<()> {
    // First: a person who runs the program without any word shall read what it is, not what is wrong with an id.
    let listener = inherited_listener()?;
    check_id("namespace", &flags.namespace)?;
    check_id("id", &flags.id)?;
    let socket = listener
        .local_addr()
        .ok()
        .and_then(|a| a.as_pathname().map(PathBuf::from));
    let (bundle, runtime) = begin(flags).inspect_err(|_| {
        // The bundle may be gone already. While this process still listens, so that the file cannot be anybody else's.
        if let Some(socket) = &socket {
            let _ = std::fs::remove_file(socket);
        }
    })?;
    let result = runtime.block_on(run(flags, &bundle, listener, socket, build));
    if let Err(e) = &result {
        log::error!("{e}");
    }
    // Whatever still blocks in a thread must not keep the process.
    runtime.shutdown_background();
    result
}

/// Prepares this process; the bundle and the runtime.
fn begin(flags: &Flags) -> Result<(PathBuf, tokio::runtime::Runtime)> {
    let bundle = env::current_dir().context(|| "cannot see the working directory")?;
    prepare();
    FifoLog::new(&bundle, &flags.namespace, &flags.id, flags.debug).install()?;
    env::set_current_dir("/").context(|| "cannot leave the bundle")?;
    become_subreaper()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(4)
        .thread_keep_alive(Duration::from_secs(2))
        .build()
        .context(|| "cannot start the runtime")?;
    Ok((bundle, runtime))
}

async fn run(
    flags: &Flags,
    bundle: &Path,
    listener: UnixListener,
    socket: Option<PathBuf>,
    build: impl FnOnce(&Flags, Arc<Publisher>) -> Parts,
) -> Result<()> {
    let ttrpc_address = env::var("TTRPC_ADDRESS").ok().filter(|address| !address.is_empty());
    let fallback = || Some(format!("{}.ttrpc", flags.address)).filter(|_| !flags.address.is_empty());
    let publisher = Arc::new(Publisher::new(
        &flags.namespace,
        ttrpc_address.or_else(fallback).as_deref(),
    ));
    let Parts {
        services,
        done,
        busy,
        end_if_empty,
    } = build(flags, publisher.clone());
    let listener = Listener::try_from(listener).context(|| "cannot use the listening socket")?;
    let mut server = Server::new().add_listener(listener).register_service(services);
    server
        .start()
        .await
        .map_err(|e| Error::unknown("cannot serve on the socket").with_source(e))?;
    log::debug!("serving, pid {}", std::process::id());
    tokio::select! {
        () = done => log::debug!("nothing left to do"),
        () = forsaken(bundle, end_if_empty) => log::debug!("the bundle is gone, and there is no task"),
        result = ended_by_signal(busy) => result?,
    }
    // While this process still listens, so that the file cannot be anybody else's.
    if let Some(socket) = socket {
        let _ = std::fs::remove_file(socket);
    }
    let left = publisher.drain(DRAIN_BOUND).await;
    if left > 0 {
        log::error!("{left} events are lost: containerd did not take them within {DRAIN_BOUND:?}");
    }
    let _ = tokio::time::timeout(GOODBYE_BOUND, server.shutdown()).await;
    Ok(())
}

/// Returns when nobody will ever ask this shim for anything: containerd has given up in the moment in which `start` had told the address,
/// or with Create, and removed the bundle. Looks ever more rarely.
async fn forsaken(bundle: &Path, end_if_empty: impl Fn() -> bool) {
    let mut pause = FIRST_LOOK;
    loop {
        tokio::time::sleep(pause).await;
        pause = pause.saturating_mul(2);
        if !bundle.exists() && end_if_empty() {
            return;
        }
    }
}

/// Returns when a signal asks for the end and no container lives. systemd sends SIGTERM to everything that it finds in a session or
/// a unit; containers must not die of it.
async fn ended_by_signal(busy: Box<dyn Fn() -> bool + Send + Sync>) -> Result<()> {
    let listen = |kind| signal(kind).context(|| "cannot listen for signals");
    let mut terminate = listen(SignalKind::terminate())?;
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut hangup = listen(SignalKind::hangup())?;
    loop {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
            _ = hangup.recv() => "SIGHUP",
        };
        if !busy() {
            log::info!("{name}: no container lives, ending");
            return Ok(());
        }
        log::warn!("{name} ignored: containers live; SIGKILL ends the shim alone");
    }
}

fn inherited_listener() -> Result<UnixListener> {
    let not_ours = || {
        Error::precondition(
            "containerd runs this program by itself, with the action start or delete; -h tells more (without an action it is the shim \
             itself, and descriptor 3 must be its listening socket)",
        )
    };
    // SAFETY: borrowed only for these two calls; a closed descriptor makes them fail with EBADF.
    let fd = unsafe { BorrowedFd::borrow_raw(LISTENER_FD) };
    if getsockopt(&fd, sockopt::SockType) != Ok(SockType::Stream) {
        return Err(not_ours());
    }
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(|_| not_ours())?;
    // SAFETY: open, as seen above, and nothing else in this process owns it: it was inherited.
    let listener: UnixListener = unsafe { OwnedFd::from_raw_fd(fd.as_raw_fd()) }.into();
    let go_on = start_is_done();
    if go_on && getsockopt(&listener, sockopt::AcceptConn) == Ok(true) {
        return Ok(listener);
    }
    // `start` was killed. Nobody knows this shim, and its file, if there is one, is nobody's.
    if let Some(path) = listener
        .local_addr()
        .ok()
        .as_ref()
        .and_then(|address| address.as_pathname())
    {
        let _ = std::fs::remove_file(path);
    }
    Err(not_ours())
}

/// Waits until `start` has done its part or is dead; whether it has done it.
fn start_is_done() -> bool {
    // SAFETY: borrowed only for this call; a closed descriptor makes it fail.
    let fd = unsafe { BorrowedFd::borrow_raw(START_FD) };
    if fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).is_err() {
        // Nobody to wait for; the socket tells the rest.
        return true;
    }
    // SAFETY: open, as seen above, and nothing else in this process owns it: it was inherited.
    let pipe = unsafe { OwnedFd::from_raw_fd(fd.as_raw_fd()) };
    let mut word = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
    let bound = PollTimeout::try_from(START_BOUND).unwrap_or(PollTimeout::MAX);
    poll(&mut word, bound) == Ok(1) && nix::unistd::read(&pipe, &mut [0]) == Ok(1)
}

/// Settings of the process that cannot fail, or whose failure changes nothing that matters.
fn prepare() {
    // The name under which operators look for shims; the program was run as /proc/self/exe.
    let _ = prctl::set_name(c"containerd-shim");
    umask(Mode::from_bits_truncate(0o022));
    #[cfg(target_env = "gnu")]
    // SAFETY: plain settings of the allocator, before any other thread exists.
    unsafe {
        // One arena, also for the threads of the blocking pool; free memory at the top goes back early.
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 64 << 10);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 << 10);
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::{Signal, raise};
    use tokio::sync::mpsc;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_shim_without_task_and_bundle_ends() {
        const LONG: Duration = Duration::from_secs(3600);
        let folder = tempfile::tempdir().unwrap();
        let bundle = folder.path().join("bundle");
        std::fs::create_dir(&bundle).unwrap();
        let waits = async |empty: bool| tokio::time::timeout(LONG, forsaken(&bundle, || empty)).await;
        waits(true).await.unwrap_err();
        std::fs::remove_dir(&bundle).unwrap();
        waits(false).await.unwrap_err();
        let begun = tokio::time::Instant::now();
        waits(true).await.unwrap();
        assert_eq!(begun.elapsed(), FIRST_LOOK);
    }

    #[tokio::test]
    async fn signals_are_ignored_while_a_container_lives() {
        let (asked, mut questions) = mpsc::unbounded_channel();
        let mut answers = [true, true, false].into_iter();
        let answers = std::sync::Mutex::new(move || answers.next().unwrap());
        let mut end = tokio::spawn(ended_by_signal(Box::new(move || {
            asked.send(()).unwrap();
            answers.lock().unwrap()()
        })));
        // Until the handlers are there, a signal would end this process.
        while !caught(Signal::SIGHUP) {
            tokio::task::yield_now().await;
        }
        for signal in [Signal::SIGTERM, Signal::SIGINT] {
            raise(signal).unwrap();
            questions.recv().await.unwrap();
            assert!(!end.is_finished());
        }
        raise(Signal::SIGHUP).unwrap();
        (&mut end).await.unwrap().unwrap();
    }

    fn caught(signal: Signal) -> bool {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
        u64::from_str_radix(mask.trim(), 16).unwrap() & (1 << (signal as i32 - 1)) != 0
    }
}
