//! Stdio of a process: what stands between containerd's client and the container.
//!
//! ```text
//! client's fifo ──▶ copy ──▶ pipe ──▶ process      stdin
//! client's fifo ◀── copy ◀── pipe ◀── process      stdout, stderr: fifo or file
//! logger        ◀─────────── pipe ◀── process      stdout, stderr: the logger reads by itself
//! client's fifos ◀── copy ──▶ pty master           terminal, which the runtime sends
//! ```
//!
//! Each stream is a tokio task that sleeps until the kernel says that bytes can move; it holds descriptors and no buffer. A stream
//! that ends closes the client's side at once.

mod console;
mod copy;
mod logger;
mod target;
#[cfg(test)]
mod tests;

use std::{
    fmt,
    os::fd::OwnedFd,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    unistd::{Gid, Uid, fchown, pipe2},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::watch,
    task::AbortHandle,
    time::timeout,
};

use self::{
    console::ConsoleSocket,
    copy::{Copy, Descriptor, End, Sink, Source},
    target::Target,
};
use crate::{
    backend::ChildIo,
    error::{Context, Error, Result},
    host::command::Reaper,
};

/// Bound of the wait after the bound of a drain, until the streams have done as ordered. They wait for nobody then, so it only fires
/// on a machine that stands still; what is left is aborted.
const FINISH_TIMEOUT: Duration = Duration::from_secs(1);

/// Where a process's stdio goes, as the client asked for it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    /// Fifo path or URI; empty for none.
    pub stdin: String,
    /// Fifo path or URI; empty for none.
    pub stdout: String,
    /// Fifo path or URI; empty for none, and always empty with a terminal.
    pub stderr: String,
    /// A pty instead of pipes.
    pub terminal: bool,
}

/// Whose stdio it is: for loggers, which are told, and for errors and the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Names<'a> {
    /// containerd's namespace.
    pub namespace: &'a str,
    /// Task id.
    pub container: &'a str,
    /// Exec id; `None` for init.
    pub exec: Option<&'a str>,
}

impl fmt::Display for Names<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.container)?;
        match self.exec {
            Some(exec) => write!(f, " exec {exec}"),
            None => Ok(()),
        }
    }
}

/// The shim's side of a process's stdio.
///
/// Dropped, everything is closed, the socket file of a terminal is gone, and loggers are left to finish by themselves.
#[derive(Debug)]
pub struct Stdio {
    about: String,
    streams: Arc<Streams>,
    /// Write end of the client's stdin fifo. While it is open, stdin does not end.
    keeper: Keeper,
    terminal: Option<Mutex<Terminal>>,
    tasks: Mutex<Vec<AbortHandle>>,
}

type Keeper = Arc<Mutex<Option<OwnedFd>>>;

/// What the streams tell and are told.
#[derive(Debug)]
struct Streams {
    output: watch::Sender<Output>,
    finish: watch::Sender<bool>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Output {
    /// Streams that have not ended.
    open: usize,
    /// One of those that ended has not delivered everything.
    lost: bool,
}

/// Counts an output stream for as long as it lives, however it ends.
struct Open(Arc<Streams>);

impl Open {
    fn new(streams: &Arc<Streams>) -> Self {
        streams.output.send_modify(|output| output.open += 1);
        Self(Arc::clone(streams))
    }

    fn ended(self, end: End) {
        self.0.output.send_modify(|output| output.lost |= end != End::Complete);
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.output.send_modify(|output| output.open -= 1);
    }
}

#[derive(Debug)]
struct Terminal {
    /// Taken when the process is launched.
    waiting: Option<Waiting>,
    /// The last size that was asked for.
    size: Option<libc::winsize>,
    /// The master; the streams own it, so that it is closed as soon as they end.
    master: Weak<AsyncFd<OwnedFd>>,
}

#[derive(Debug)]
struct Waiting {
    socket: ConsoleSocket,
    stdin: Option<OwnedFd>,
    stdout: Sink,
}

/// Opens the client's side and makes the process's side. MUST run inside the runtime.
///
/// `scratch` is an absolute path of a folder for the console socket: the bundle. `owner` (uid, gid) gets the pipes, so that the
/// container's user may open `/dev/stdout` again. Output is copied and stdin is filled from here on; nothing waits for the client to
/// open its end.
///
/// The strings in `config` are hostile: nothing but what is there is opened, except that `file://` makes files and folders. Plain
/// paths to regular files are appended to, as containerd's runc shim does.
///
/// # Errors
/// `InvalidArgument` for strings that mean nothing, `NotFound` for a fifo or logger that does not exist, `DeadlineExceeded` for a
/// logger that does not get ready, or the operating system's. Nothing is left behind then, except files that `file://` made; also when
/// the future is dropped.
pub async fn open(
    config: &Config,
    names: Names<'_>,
    scratch: &Path,
    owner: (u32, u32),
    reaper: &Reaper,
) -> Result<(Stdio, ChildIo)> {
    let stdin = match target::parse("stdin", &config.stdin)? {
        Target::Nothing => None,
        Target::Path(path) => Some(target::open_input(&path)?),
        Target::File(_) | Target::Logger(_) => {
            return Err(Error::invalid(format!("stdin {:?} is not a fifo", config.stdin)));
        }
    };
    let (stdin, keeper) = stdin.unzip();
    let stdio = Stdio {
        about: names.to_string(),
        streams: Arc::new(Streams {
            output: watch::Sender::default(),
            finish: watch::Sender::default(),
        }),
        keeper: Arc::new(Mutex::new(keeper)),
        terminal: None,
        tasks: Mutex::default(),
    };
    let stdout = target::parse("stdout", &config.stdout)?;
    if config.terminal {
        return stdio.with_terminal(stdin, stdout, &names, scratch, reaper).await;
    }
    let stderr = target::parse("stderr", &config.stderr)?;
    stdio.with_pipes(stdin, [stdout, stderr], &names, owner, reaper).await
}

impl Stdio {
    async fn with_pipes(
        self,
        stdin: Option<OwnedFd>,
        targets: [Target; 2],
        names: &Names<'_>,
        owner: (u32, u32),
        reaper: &Reaper,
    ) -> Result<(Self, ChildIo)> {
        // What can fail on the client's account comes first, loggers last: until then there is no process to undo.
        let child_stdin = match stdin {
            None => None,
            Some(fifo) => {
                let (read_end, write_end) = pipe(owner)?;
                let sink = Sink::Pipe(watched(nonblocking(write_end)?, Interest::WRITABLE)?);
                self.copy_stdin(fifo, sink)?;
                Some(read_end)
            }
        };
        let mut child_ends = [None, None];
        let mut logged = [None, None];
        for (index, (stream, target)) in ["stdout", "stderr"].into_iter().zip(&targets).enumerate() {
            let sink = match target {
                Target::Nothing => continue,
                Target::Path(path) => Some(target::open_output(stream, path)?),
                Target::File(path) => Some(target::open_file(stream, path)?),
                Target::Logger(_) => None,
            };
            let (read_end, write_end) = pipe(owner)?;
            child_ends[index] = Some(write_end);
            match sink {
                Some(sink) => {
                    let source = Source::Pipe(watched(nonblocking(read_end)?, Interest::READABLE)?);
                    self.copy_output(stream, source, sink);
                }
                None => logged[index] = Some(read_end),
            }
        }
        let [stdout, stderr] = targets;
        let [logged_stdout, logged_stderr] = logged;
        match (stdout, stderr) {
            (Target::Logger(command), other) if other == Target::Logger(command.clone()) => {
                self.log_by(reaper, &command, names, logged_stdout, logged_stderr)
                    .await?;
            }
            (stdout, stderr) => {
                if let Target::Logger(command) = stdout {
                    self.log_by(reaper, &command, names, logged_stdout, None).await?;
                }
                if let Target::Logger(command) = stderr {
                    self.log_by(reaper, &command, names, None, logged_stderr).await?;
                }
            }
        }
        let [stdout, stderr] = child_ends;
        let child = ChildIo::Pipes {
            stdin: child_stdin,
            stdout,
            stderr,
        };
        Ok((self, child))
    }

    async fn with_terminal(
        mut self,
        stdin: Option<OwnedFd>,
        target: Target,
        names: &Names<'_>,
        scratch: &Path,
        reaper: &Reaper,
    ) -> Result<(Self, ChildIo)> {
        let stdout = match &target {
            Target::Nothing => Sink::Nothing,
            Target::Path(path) => target::open_output("stdout", path)?,
            Target::File(path) => target::open_file("stdout", path)?,
            Target::Logger(command) => {
                // Only the shim writes into this pipe, so it belongs to the shim's user.
                let (read_end, write_end) = pipe2(OFlag::O_CLOEXEC).context(|| "cannot make a pipe")?;
                let sink = Sink::Pipe(watched(nonblocking(write_end)?, Interest::WRITABLE)?);
                self.log_by(reaper, command, names, Some(read_end), None).await?;
                sink
            }
        };
        let socket = ConsoleSocket::listen(scratch)?;
        let console_socket = socket.path().to_path_buf();
        self.terminal = Some(Mutex::new(Terminal {
            waiting: Some(Waiting { socket, stdin, stdout }),
            size: None,
            master: Weak::new(),
        }));
        Ok((self, ChildIo::Terminal { console_socket }))
    }

    /// Tells that the backend has launched the process: takes the terminal, at most 10 s, and begins to copy. Nothing to do for pipes.
    /// MUST be called once, after a successful launch.
    ///
    /// # Errors
    /// `DeadlineExceeded` when no terminal came, `InvalidArgument` when what came is none. The socket is gone in any case; the process
    /// has no terminal then and should be ended.
    pub async fn launched(&self) -> Result<()> {
        let Some(terminal) = &self.terminal else {
            return Ok(());
        };
        let waiting = lock(terminal).waiting.take();
        let Some(Waiting { socket, stdin, stdout }) = waiting else {
            return Err(Error::precondition(format!(
                "the terminal of {} was taken already",
                self.about
            )));
        };
        let master = socket
            .master()
            .await
            .context(|| format!("no terminal for {}", self.about))?;
        let master = watched(master, Interest::READABLE | Interest::WRITABLE)?;
        {
            let mut terminal = lock(terminal);
            terminal.master = Arc::downgrade(&master);
            if let Some(size) = terminal.size {
                console::set_size(&master, &size)?;
            }
        }
        let source = Source::Terminal(Arc::clone(&master));
        let output = Copy::new(format!("terminal of {}", self.about), source, stdout);
        let input = match stdin {
            None => None,
            Some(fifo) => {
                let source = Source::Pipe(watched(fifo, Interest::READABLE)?);
                Some(Copy::new(
                    format!("stdin of {}", self.about),
                    source,
                    Sink::Device(master),
                ))
            }
        };
        let finish = self.streams.finish.subscribe();
        let open = Open::new(&self.streams);
        let keeper = Arc::clone(&self.keeper);
        self.spawn(async move {
            let input = async {
                if let Some(input) = input {
                    input.run(finish.clone()).await;
                    lock(&keeper).take();
                }
                // The end of stdin is not the end of the terminal.
                std::future::pending::<()>().await;
            };
            tokio::select! {
                end = output.run(finish.clone()) => open.ended(end),
                () = input => {}
            }
            lock(&keeper).take();
        });
        Ok(())
    }

    /// Sets the size of the terminal, in characters. Without a terminal, or after its end, nothing happens; before the launch the size
    /// is kept for it.
    ///
    /// # Errors
    /// `InvalidArgument` for more than 65,535 of either.
    pub fn resize(&self, width: u32, height: u32) -> Result<()> {
        let Some(terminal) = &self.terminal else {
            return Ok(());
        };
        let (Ok(columns), Ok(rows)) = (u16::try_from(width), u16::try_from(height)) else {
            return Err(Error::invalid(format!(
                "terminal size {width}x{height} is more than 65535x65535"
            )));
        };
        let size = libc::winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let mut terminal = lock(terminal);
        terminal.size = Some(size);
        match terminal.master.upgrade() {
            Some(master) => console::set_size(&master, &size),
            None => Ok(()),
        }
    }

    /// Lets stdin end once everything is delivered that the client has written or, while it holds its fifo open, will write
    /// (containerd task API, CloseIO). Idempotent. The stdin of a terminal ends without the process seeing it.
    pub fn close_stdin(&self) {
        lock(&self.keeper).take();
    }

    /// Waits until the process's output has ended (every holder of its pipes has gone) and was handed over, for loggers until they have
    /// exited; at most `bound`. Then what can be moved without waiting is moved, and everything is closed. To be called after the
    /// process's exit; true if nothing was left behind or lost.
    pub async fn drain(&self, bound: Duration) -> bool {
        // A terminal that never came.
        if let Some(terminal) = &self.terminal {
            lock(terminal).waiting.take();
        }
        let mut output = self.streams.output.subscribe();
        let in_time = timeout(bound, output.wait_for(|output| output.open == 0)).await.is_ok();
        self.streams.finish.send_replace(true);
        self.close_stdin();
        if !in_time {
            let _ = timeout(FINISH_TIMEOUT, output.wait_for(|output| output.open == 0)).await;
        }
        let complete = in_time && !output.borrow().lost;
        for task in lock(&self.tasks).drain(..) {
            task.abort();
        }
        complete
    }

    fn copy_stdin(&self, fifo: OwnedFd, sink: Sink) -> Result<()> {
        let source = Source::Pipe(watched(fifo, Interest::READABLE)?);
        let copy = Copy::new(format!("stdin of {}", self.about), source, sink);
        let finish = self.streams.finish.subscribe();
        let keeper = Arc::clone(&self.keeper);
        self.spawn(async move {
            copy.run(finish).await;
            // A client that writes on learns that nobody reads any more.
            lock(&keeper).take();
        });
        Ok(())
    }

    fn copy_output(&self, stream: &str, source: Source, sink: Sink) {
        let copy = Copy::new(format!("{stream} of {}", self.about), source, sink);
        let finish = self.streams.finish.subscribe();
        let open = Open::new(&self.streams);
        self.spawn(async move { open.ended(copy.run(finish).await) });
    }

    async fn log_by(
        &self,
        reaper: &Reaper,
        command: &target::LoggerCommand,
        names: &Names<'_>,
        stdout: Option<OwnedFd>,
        stderr: Option<OwnedFd>,
    ) -> Result<()> {
        let logger = logger::start(reaper, command, names, stdout, stderr).await?;
        let finish = self.streams.finish.subscribe();
        let open = Open::new(&self.streams);
        self.spawn(async move { open.ended(logger.run(finish).await) });
        Ok(())
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        lock(&self.tasks).push(tokio::spawn(task).abort_handle());
    }
}

impl Drop for Stdio {
    fn drop(&mut self) {
        self.close_stdin();
        for task in lock(&self.tasks).drain(..) {
            task.abort();
        }
    }
}

/// A pipe that belongs to `owner`: (read end, write end), both blocking, as programs expect it.
fn pipe((uid, gid): (u32, u32)) -> Result<(OwnedFd, OwnedFd)> {
    let (read_end, write_end) = pipe2(OFlag::O_CLOEXEC).context(|| "cannot make a pipe for stdio")?;
    // Both ends are one inode.
    fchown(&read_end, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
        .context(|| format!("cannot give a stdio pipe to {uid}:{gid}"))?;
    Ok((read_end, write_end))
}

/// Makes our end of a pipe nonblocking; the other end has a description, and so a mode, of its own.
fn nonblocking(fd: OwnedFd) -> Result<OwnedFd> {
    fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).context(|| "cannot prepare a stdio pipe")?;
    Ok(fd)
}

fn watched(fd: OwnedFd, interest: Interest) -> Result<Descriptor> {
    copy::watched(fd, interest)
        .map(Arc::new)
        .map_err(|(_, e)| e)
        .context(|| "cannot watch a descriptor of stdio")
}

/// None of these locks is held while anything waits or fails, so a poisoned one is still right.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
