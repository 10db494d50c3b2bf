//! The fifos of a container's stdio, as a client of containerd makes them.

use std::{
    fs::{File, OpenOptions},
    io::{Read, Write},
    os::{fd::AsFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    time::Instant,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::stat::Mode,
    unistd::mkfifo,
};
use proxmox_lxcri::error::{Context, Error, Result};
use tokio::{io::AsyncReadExt, net::unix::pipe, sync::watch, task::JoinHandle};

use crate::process::PATIENCE;

/// Makes a fifo.
///
/// # Errors
/// The operating system's.
pub(crate) fn make(path: PathBuf) -> Result<PathBuf> {
    mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).context(|| format!("cannot make fifo {}", path.display()))?;
    Ok(path)
}

/// Opens a fifo so that neither side blocks the other: this end counts as a reader and as a writer.
///
/// # Errors
/// The operating system's.
pub(crate) fn open(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .context(|| format!("cannot open fifo {}", path.display()))
}

/// What comes out of a fifo: read in the background from the moment of [`Output::new`] until dropped.
pub(crate) struct Output {
    first: watch::Receiver<Option<Instant>>,
    tail: watch::Receiver<Vec<u8>>,
    task: JoinHandle<()>,
}

impl Output {
    /// Begins to read.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn new(path: &Path) -> Result<Self> {
        let mut fifo = pipe::OpenOptions::new()
            .read_write(true)
            .open_receiver(path)
            .context(|| format!("cannot open fifo {}", path.display()))?;
        let (first_in, first) = watch::channel(None);
        let (tail_in, tail) = watch::channel(Vec::new());
        let task = tokio::spawn(async move {
            let mut buffer = vec![0; 4096];
            while let Ok(count @ 1..) = fifo.read(&mut buffer).await {
                let at = Instant::now();
                first_in.send_if_modified(|first| first.is_none() && first.replace(at).is_none());
                tail_in.send_modify(|tail| {
                    tail.extend_from_slice(&buffer[..count]);
                    let surplus = tail.len().saturating_sub(4096);
                    tail.drain(..surplus);
                });
            }
        });
        Ok(Self { first, tail, task })
    }

    /// When the first byte arrived.
    ///
    /// # Errors
    /// `DeadlineExceeded` after [`PATIENCE`].
    pub(crate) async fn first(&self) -> Result<Instant> {
        let mut first = self.first.clone();
        let at = tokio::time::timeout(PATIENCE, first.wait_for(Option::is_some)).await;
        at.ok()
            .and_then(Result::ok)
            .and_then(|at| *at)
            .ok_or_else(|| Error::deadline(format!("a container printed nothing in {PATIENCE:?}")))
    }

    /// The last of what arrived, for an error message.
    pub(crate) fn tail(&self) -> String {
        String::from_utf8_lossy(&self.tail.borrow()).trim().to_owned()
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Reads exactly `bytes` from a fifo, blocking; `mark` is called at the first byte and at the last.
///
/// # Errors
/// `DeadlineExceeded` when nothing comes for [`PATIENCE`]; the operating system's.
pub(crate) fn drain<T>(mut fifo: &File, bytes: u64, mut mark: impl FnMut() -> T) -> Result<(T, T)> {
    let mut buffer = vec![0; 256 << 10];
    let mut missing = bytes;
    let mut first = None;
    loop {
        match fifo.read(&mut buffer) {
            Ok(count) => {
                if first.is_none() {
                    first = Some(mark());
                }
                missing = missing
                    .checked_sub(count as u64)
                    .ok_or_else(|| Error::unknown(format!("more than {bytes} bytes came out of a container")))?;
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => ready(fifo, PollFlags::POLLIN).map_err(|e| {
                e.context(format!(
                    "{missing} of {bytes} bytes of a container's output are missing"
                ))
            })?,
            Err(e) => return Err(e).context(|| "cannot read a container's output"),
        }
        if missing == 0
            && let Some(first) = first
        {
            return Ok((first, mark()));
        }
    }
}

/// Writes exactly `bytes` to a fifo, blocking.
///
/// # Errors
/// `DeadlineExceeded` when nobody reads for [`PATIENCE`]; the operating system's.
pub(crate) fn fill(mut fifo: &File, bytes: u64) -> Result<()> {
    let buffer: Vec<u8> = (0..=u8::MAX).cycle().take(64 << 10).collect();
    let mut missing = bytes;
    while missing > 0 {
        let length = buffer.len().min(usize::try_from(missing).unwrap_or(usize::MAX));
        match fifo.write(&buffer[..length]) {
            Ok(count) => missing -= count as u64,
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => ready(fifo, PollFlags::POLLOUT)
                .map_err(|e| e.context(format!("{missing} of {bytes} bytes of a container's input are left")))?,
            Err(e) => return Err(e).context(|| "cannot write a container's input"),
        }
    }
    Ok(())
}

fn ready(fifo: &File, flags: PollFlags) -> Result<()> {
    let mut fds = [PollFd::new(fifo.as_fd(), flags)];
    let bound = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
    match poll(&mut fds, bound) {
        Ok(0) => Err(Error::deadline(format!("the fifo stood still for {PATIENCE:?}"))),
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
        Err(e) => Err(e).context(|| "cannot poll a fifo"),
    }
}
