//! Logger programs (`binary://`): a process that gets the read ends of the container's pipes, as containerd's runc shim starts it.
//!
//! The program finds stdout at descriptor 3, stderr at 4 and a pipe at 5, which it closes when it is ready. It reads the container's
//! pipes itself; nothing is copied here. The shim keeps a read end of each beside it, so that the container neither blocks nor gets
//! SIGPIPE when the logger dies: then the rest of the output is read here and thrown away.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use nix::{fcntl::OFlag, poll::PollFlags, unistd::pipe2};
use tokio::{
    io::{AsyncReadExt, Interest},
    net::unix::pipe,
    sync::watch,
    time::timeout,
};

use super::{
    Names,
    copy::{Copy, End, Sink, Source, polled, watched},
    target::{LoggerCommand, reopen},
};
use crate::{
    error::{Context, Error, Result},
    host::command::{Child, Command, Reaper},
};

/// Bound of the wait until a logger is ready; it is killed then.
pub(super) const READY_TIMEOUT: Duration = Duration::from_secs(10);

/// A running logger. Dropped, it is left to read its pipes to the end by itself.
#[derive(Debug)]
pub(super) struct Logger {
    about: String,
    child: Option<Child>,
    /// Read ends with descriptions of their own, not registered anywhere as long as the logger lives.
    pipes: Vec<OwnedFd>,
}

/// Starts a logger and waits until it is ready. `None` for a stream that goes elsewhere: the logger then sees its end at once.
///
/// # Errors
/// `NotFound` for a missing program, `DeadlineExceeded` for one that does not become ready within [`READY_TIMEOUT`] (it is killed and
/// reaped), or the operating system's.
pub(super) async fn start(
    reaper: &Reaper,
    command: &LoggerCommand,
    names: &Names<'_>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
) -> Result<Logger> {
    let about = format!("logger {} of {}", command.program.display(), names);
    let what = || format!("cannot start {about}");
    let mut pipes = Vec::new();
    for read_end in [&stdout, &stderr].into_iter().flatten() {
        pipes.push(reopen(read_end, OFlag::O_RDONLY).context(what)?);
    }
    let ended = || pipe2(OFlag::O_CLOEXEC).map(|(read_end, _)| read_end);
    let or_ended = |fd: Option<OwnedFd>| fd.map_or_else(ended, Ok);
    let (ready, ready_end) = pipe2(OFlag::O_CLOEXEC).context(what)?;
    let mut ready = pipe::Receiver::from_owned_fd(ready).context(what)?;
    let mut program = Command::new(&command.program)
        .args(&command.args)
        .env_clear()
        .fd(3, or_ended(stdout).context(what)?)
        .fd(4, or_ended(stderr).context(what)?)
        .fd(5, ready_end);
    for (key, value) in &command.env {
        program = program.env(key, value);
    }
    // Set last, so that the URI cannot forge them. The id of an exec stands for itself, as with the runc shim.
    program = program
        .env("CONTAINER_ID", names.exec.unwrap_or(names.container))
        .env("CONTAINER_NAMESPACE", names.namespace);
    let mut child = reaper.spawn(program).context(what)?;
    match timeout(READY_TIMEOUT, ready.read(&mut [0])).await {
        Ok(read) => {
            read.context(what)?;
        }
        Err(_) => {
            child.kill();
            let _ = child.wait().await;
            return Err(Error::deadline(format!(
                "{about} did not close descriptor 5 within {} s to say that it is ready; it was killed",
                READY_TIMEOUT.as_secs()
            )));
        }
    }
    Ok(Logger {
        about,
        child: Some(child),
        pipes,
    })
}

impl Logger {
    /// Waits for the logger's end; should that come before the container's, throws the output away until the container has ended
    /// too, or `finish` becomes true.
    pub(super) async fn run(mut self, mut finish: watch::Receiver<bool>) -> End {
        let Some(child) = &mut self.child else {
            return End::Incomplete;
        };
        let exit = tokio::select! {
            biased;
            Ok(_) = finish.wait_for(|finish| *finish) => return End::Incomplete,
            exit = child.wait() => exit,
        };
        let still_written = |pipe: &OwnedFd| {
            polled(pipe.as_fd(), PollFlags::empty()).is_ok_and(|events| !events.contains(PollFlags::POLLHUP))
        };
        let failed = !matches!(&exit, Ok(exit) if exit.status == 0);
        let early = self.pipes.iter().any(still_written);
        if !failed && !early {
            return End::Complete;
        }
        match exit {
            Ok(exit) => log::error!("{} ended with status {}, output is lost", self.about, exit.status),
            Err(e) => log::error!("{} is lost: {e}", self.about),
        }
        let discard = |pipe: Option<OwnedFd>| {
            let finish = finish.clone();
            let about = &self.about;
            async move {
                match pipe.map(|pipe| discard(about, pipe)) {
                    None => {}
                    Some(Ok(copy)) => drop(copy.run(finish).await),
                    Some(Err(e)) => log::error!("cannot read on for {about}: {e}"),
                }
            }
        };
        // One for stdout, one for stderr, and no more.
        let (one, other) = (self.pipes.pop(), self.pipes.pop());
        tokio::join!(discard(one), discard(other));
        End::Incomplete
    }
}

impl Drop for Logger {
    fn drop(&mut self) {
        if let Some(child) = self.child.take() {
            child.leave();
        }
    }
}

fn discard(about: &str, pipe: OwnedFd) -> io::Result<Copy> {
    let pipe = watched(pipe, Interest::READABLE).map_err(|(_, e)| e)?;
    let pipe = Source::Pipe(Arc::new(pipe));
    Ok(Copy::new(format!("output for {about}"), pipe, Sink::Nothing))
}
