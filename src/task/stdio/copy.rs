//! Moves bytes from one descriptor to another, for as long as there are any.
//!
//! Between pipes bulk data is spliced: the pages change hands and are never copied. A splice moves whole pipe buffers, though, so a
//! trickle of short lines would fill a pipe with nearly empty pages; what fits a page is therefore read and written, which lets the
//! kernel merge it. Nothing is allocated while nothing moves.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::inotify::{AddWatchFlags, InitFlags, Inotify},
    unistd::{read, write},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::watch,
};

use super::target::{proc_path, reopen};

/// Up to here bytes are copied rather than spliced. Also PIPE_BUF: a write of this size to a pipe is all or nothing.
const SMALL_BYTES: usize = 4096;

/// The buffer for bulk data that cannot be spliced; it lives on the stack of one call.
const BULK_BYTES: usize = 32 << 10;

/// Most that one splice moves.
const SPLICE_BYTES: usize = 1 << 20;

/// What the pipes of a busy stream grow to; costs 10 KiB of kernel memory each. Copying 256 MiB between two dd took 0.17 s with it,
/// 0.25 s with a quarter of it and 0.49 s with the 64 KiB that a pipe begins with; reads and writes of 32 KiB took 0.56 s and 4.5
/// times the CPU time (medians of 15 in one run on two busy cores).
const BUSY_PIPE_BYTES: i32 = 1 << 20;

/// A stream is busy once this much was there at a time.
const BUSY_BYTES: usize = 32 << 10;

/// Most that is moved after the order to finish: whoever goes on writing shall not keep us.
const LAST_BYTES: usize = 2 << 20;

/// A nonblocking descriptor that tells when it is ready.
pub(super) type Descriptor = Arc<AsyncFd<OwnedFd>>;

/// Registers a nonblocking descriptor with the runtime that this is called on. A refused one is given back: regular files cannot be
/// waited for (EPERM).
pub(super) fn watched(fd: OwnedFd, interest: Interest) -> Result<AsyncFd<OwnedFd>, (OwnedFd, io::Error)> {
    // SAFETY: an OwnedFd always yields the one descriptor that it owns, and the AsyncFd owns it from here on, so that it stays open as
    // long as it is registered.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(|refused| refused.into_parts())
}

/// Where bytes come from.
#[derive(Debug)]
pub(super) enum Source {
    /// Read end of a pipe or fifo.
    Pipe(Descriptor),
    /// Master of a pty.
    Terminal(Descriptor),
}

impl Source {
    fn descriptor(&self) -> &Descriptor {
        let (Source::Pipe(fd) | Source::Terminal(fd)) = self;
        fd
    }
}

/// Where bytes go.
#[derive(Debug)]
pub(super) enum Sink {
    /// Write end of a pipe whose reader may be gone for good.
    Pipe(Descriptor),
    /// The client's fifo, held open at both ends.
    Fifo(Descriptor),
    /// A character device, the master of a pty included.
    Device(Descriptor),
    /// What is always ready: a regular file.
    File(OwnedFd),
    /// Bytes are thrown away.
    Nothing,
}

impl Sink {
    fn descriptor(&self) -> Option<&Descriptor> {
        match self {
            Sink::Pipe(fd) | Sink::Fifo(fd) | Sink::Device(fd) => Some(fd),
            Sink::File(_) | Sink::Nothing => None,
        }
    }
}

/// How a copy ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The source ended and the sink took everything.
    Complete,
    /// Ordered to finish, the sink's reader is gone for good, or bytes were lost.
    Incomplete,
}

/// One direction of a stream.
#[derive(Debug)]
pub(super) struct Copy {
    /// For the log: "stdout of NAMESPACE/ID".
    about: String,
    source: Source,
    sink: Sink,
    /// Read, and not written yet: at most one buffer.
    rest: Vec<u8>,
    /// The last transfer was large, so the next one probably is.
    bulk: bool,
    /// Splice works between these two.
    splices: bool,
    /// The pipes were made larger, or cannot be.
    grown: bool,
    lost: bool,
}

/// What one attempt came to.
enum Step {
    Moved(usize),
    /// The source has nothing now.
    Empty,
    /// The sink takes nothing now.
    Full,
    /// One of the two; splice does not say which.
    EmptyOrFull,
    Ended,
    SinkGone,
}

impl Copy {
    pub(super) fn new(about: String, source: Source, sink: Sink) -> Self {
        Self {
            about,
            source,
            sink,
            rest: Vec::new(),
            bulk: false,
            splices: true,
            grown: false,
            lost: false,
        }
    }

    /// Copies until the source ends, the sink's reader is gone, or `finish` becomes true; then what is there right now is still
    /// moved as far as the sink takes it without waiting. Closes both when it returns or is dropped.
    pub(super) async fn run(mut self, mut finish: watch::Receiver<bool>) -> End {
        let end = tokio::select! {
            biased;
            // An error means that nobody can give the order any more.
            Ok(_) = finish.wait_for(|finish| *finish) => None,
            end = self.until_end() => Some(end),
        };
        let end = match end {
            Some(end) => end,
            None => self.finish_now(),
        };
        if end != End::Complete {
            return end;
        }
        let Self {
            about,
            source,
            sink,
            lost,
            ..
        } = self;
        drop(source);
        let handed_over = match sink {
            Sink::Fifo(fifo) => match Unread::check(fifo, about) {
                None => true,
                Some(unread) => tokio::select! {
                    biased;
                    Ok(_) = finish.wait_for(|finish| *finish) => false,
                    () = unread.wait() => true,
                },
            },
            _ => true,
        };
        if lost || !handed_over {
            return End::Incomplete;
        }
        End::Complete
    }

    async fn until_end(&mut self) -> End {
        loop {
            // A chatty stream gives way to the others, and to requests.
            tokio::task::consume_budget().await;
            let step = match self.step() {
                Ok(Step::EmptyOrFull) => self.tell_apart(),
                other => other,
            };
            let goes_on = match step {
                Ok(Step::Ended) => return End::Complete,
                Ok(Step::SinkGone) => return End::Incomplete,
                Ok(Step::Moved(_) | Step::EmptyOrFull) => continue,
                Ok(Step::Empty) => becomes_ready(self.source.descriptor(), Side::Source).await,
                Ok(Step::Full) => match self.sink.descriptor() {
                    Some(sink) => becomes_ready(sink, Side::Sink).await,
                    None => continue,
                },
                Err(e) => Err(e),
            };
            match goes_on {
                Ok(true) => {}
                // The far side has hung up, so that this one will never be told to be ready again.
                Ok(false) => return End::Incomplete,
                Err(e) => {
                    log::error!("cannot go on with {}: {e}", self.about);
                    return End::Incomplete;
                }
            }
        }
    }

    fn tell_apart(&self) -> io::Result<Step> {
        Ok(if !asked(self.source.descriptor(), Side::Source)? {
            Step::Empty
        } else if self
            .sink
            .descriptor()
            .is_some_and(|sink| asked(sink, Side::Sink).is_ok_and(|ready| !ready))
        {
            Step::Full
        } else {
            // Something has changed since.
            Step::EmptyOrFull
        })
    }

    fn finish_now(&mut self) -> End {
        let mut moved = 0;
        while moved < LAST_BYTES {
            match self.step() {
                Ok(Step::Moved(n)) => moved += n,
                Ok(Step::Ended) => return End::Complete,
                _ => break,
            }
        }
        End::Incomplete
    }

    fn step(&mut self) -> io::Result<Step> {
        if !self.rest.is_empty() {
            let rest = std::mem::take(&mut self.rest);
            return self.put(&rest);
        }
        if !self.bulk {
            return self.copy::<SMALL_BYTES>();
        }
        if self.splices
            && let (Source::Pipe(source), Sink::Pipe(sink) | Sink::Fifo(sink)) = (&self.source, &self.sink)
        {
            let flags = SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK;
            return match splice(source.get_ref(), None, sink.get_ref(), None, SPLICE_BYTES, flags) {
                Ok(0) => Ok(Step::Ended),
                Ok(n) => {
                    self.bulk = n > SMALL_BYTES;
                    if n >= BUSY_BYTES && !self.grown {
                        self.grown = true;
                        // Without the right to it the pipes stay as they are.
                        let _ = fcntl(source.get_ref(), FcntlArg::F_SETPIPE_SZ(BUSY_PIPE_BYTES));
                        let _ = fcntl(sink.get_ref(), FcntlArg::F_SETPIPE_SZ(BUSY_PIPE_BYTES));
                    }
                    Ok(Step::Moved(n))
                }
                Err(Errno::EAGAIN) => Ok(Step::EmptyOrFull),
                Err(Errno::EINTR) => Ok(Step::Moved(0)),
                Err(Errno::EPIPE) => Ok(Step::SinkGone),
                Err(_) => {
                    self.splices = false;
                    Ok(Step::Moved(0))
                }
            };
        }
        self.copy::<BULK_BYTES>()
    }

    /// Reads at most `N` bytes and writes them. Not inlined, so that the buffer is only there while it is used.
    #[inline(never)]
    fn copy<const N: usize>(&mut self) -> io::Result<Step> {
        let mut buffer = [0; N];
        match read(self.source.descriptor().get_ref(), &mut buffer) {
            Ok(0) => Ok(Step::Ended),
            Ok(n) => {
                self.bulk = n >= SMALL_BYTES;
                self.put(&buffer[..n])
            }
            Err(Errno::EAGAIN) => Ok(Step::Empty),
            Err(Errno::EINTR) => Ok(Step::Moved(0)),
            // The other side of a pty was closed by everyone.
            Err(Errno::EIO) if matches!(self.source, Source::Terminal(_)) => Ok(Step::Ended),
            Err(e) => Err(e.into()),
        }
    }

    /// Writes what is possible and keeps the rest.
    fn put(&mut self, bytes: &[u8]) -> io::Result<Step> {
        let result = match &self.sink {
            Sink::Pipe(fd) | Sink::Fifo(fd) | Sink::Device(fd) => write(fd.get_ref(), bytes),
            Sink::File(fd) => write(fd, bytes),
            Sink::Nothing => Ok(bytes.len()),
        };
        let (step, written) = match result {
            Ok(n) => (Step::Moved(n), n),
            Err(Errno::EAGAIN) if self.sink.descriptor().is_some() => (Step::Full, 0),
            Err(Errno::EINTR) => (Step::Moved(0), 0),
            Err(Errno::EPIPE) if matches!(self.sink, Sink::Pipe(_)) => return Ok(Step::SinkGone),
            Err(e) => {
                // A full disk must neither block nor kill the process: its output is lost until there is room again.
                if !self.lost {
                    self.lost = true;
                    log::error!("cannot write {}, it is lost from here on: {e}", self.about);
                }
                (Step::Moved(bytes.len()), bytes.len())
            }
        };
        if written < bytes.len() {
            self.rest = bytes[written..].to_vec();
        }
        Ok(step)
    }
}

#[derive(Clone, Copy)]
enum Side {
    Source,
    Sink,
}

impl Side {
    fn interest(self) -> Interest {
        match self {
            Side::Source => Interest::READABLE,
            Side::Sink => Interest::WRITABLE,
        }
    }
}

/// Whether `fd` is ready by the kernel's word. After a no, tokio waits for the next edge; the kernel is asked inside `try_io`, so that
/// an edge which comes after the question is not forgotten with it.
fn asked(fd: &AsyncFd<OwnedFd>, side: Side) -> io::Result<bool> {
    let flags = match side {
        Side::Source => PollFlags::POLLIN,
        Side::Sink => PollFlags::POLLOUT,
    };
    let asked = fd.try_io(side.interest(), |fd| match polled(fd.as_fd(), flags) {
        Ok(events) if events.is_empty() => Err(io::ErrorKind::WouldBlock.into()),
        Ok(_) => Ok(()),
        Err(e) => Err(e.into()),
    });
    match asked {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(e) => Err(e),
    }
}

/// Waits until `fd` is ready; early returns are harmless. False when it can no longer be waited for: tokio never forgets a hang-up,
/// and where the kernel does (a pty's other side that is opened again) waiting on would be a busy loop.
async fn becomes_ready(fd: &AsyncFd<OwnedFd>, side: Side) -> io::Result<bool> {
    if asked(fd, side)? {
        return Ok(true);
    }
    let ready = fd.ready(side.interest()).await?.ready();
    let hung_up = match side {
        Side::Source => ready.is_read_closed(),
        Side::Sink => ready.is_write_closed(),
    };
    Ok(!hung_up || asked(fd, side)?)
}

/// The events that are there now; errors and hang-ups always count.
pub(super) fn polled(fd: BorrowedFd<'_>, flags: PollFlags) -> nix::Result<PollFlags> {
    let mut fds = [PollFd::new(fd, flags)];
    poll(&mut fds, PollTimeout::ZERO)?;
    Ok(fds[0].revents().unwrap_or(PollFlags::empty()))
}

/// Whether a pipe holds no byte; true when it cannot be told.
fn is_drained(pipe: &impl AsFd) -> bool {
    nix::ioctl_read_bad!(fionread, libc::FIONREAD, libc::c_int);
    let mut bytes = 0;
    // SAFETY: FIONREAD stores one int where the pointer says, and that is a live local.
    let _ = unsafe { fionread(pipe.as_fd().as_raw_fd(), &mut bytes) };
    bytes == 0
}

/// The last bytes of a stream, in a client's fifo whose reader is away. Closing both ends now would destroy them.
struct Unread {
    about: String,
    writer: OwnedFd,
}

impl Unread {
    /// `None`, with the fifo closed, when everything was taken or a reader is there to take it: that one waits for the end of file.
    fn check(fifo: Descriptor, about: String) -> Option<Self> {
        if is_drained(&*fifo) {
            return None;
        }
        let writer = match reopen(&*fifo, OFlag::O_WRONLY) {
            Ok(writer) => writer,
            Err(e) => {
                log::warn!("cannot wait for a reader of {about}: {e}");
                return None;
            }
        };
        // Only without a read end of our own does POLLERR say that nobody has one. The write end keeps the bytes alive.
        drop(fifo);
        let unread = Self { about, writer };
        (!unread.settled()).then_some(unread)
    }

    fn settled(&self) -> bool {
        let no_reader =
            polled(self.writer.as_fd(), PollFlags::empty()).is_ok_and(|events| events.contains(PollFlags::POLLERR));
        !no_reader || is_drained(&self.writer)
    }

    /// Waits until a reader has come. The kernel has no readiness for that, but inotify tells of the open.
    async fn wait(self) {
        let watch = || -> io::Result<AsyncFd<OwnedFd>> {
            let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
            inotify.add_watch(proc_path(&self.writer).as_path(), AddWatchFlags::IN_OPEN)?;
            watched(OwnedFd::from(inotify), Interest::READABLE).map_err(|(_, e)| e)
        };
        let opened = match watch() {
            Ok(opened) => opened,
            Err(e) => {
                // A reader still gets the bytes; only its end of file is late, until the order to finish.
                log::warn!("cannot see a reader of {} come: {e}", self.about);
                return std::future::pending().await;
            }
        };
        while !self.settled() {
            let Ok(mut ready) = opened.readable().await else {
                return;
            };
            let mut events = [0; 512];
            while read(opened.get_ref(), &mut events).is_ok_and(|n| n > 0) {}
            ready.clear_ready();
        }
    }
}
