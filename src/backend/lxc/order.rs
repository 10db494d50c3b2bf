//! What the helper is told to do, and the descriptors that go with it.

use std::{
    fs::File,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use serde::Serialize;

use super::{
    blocking, gone_is_fine,
    init::{self, Order, proc::Proc, process::Process},
    wire::{self, Connection, ToInit},
};
use crate::{
    backend::ChildIo,
    error::{Context, Error, Result},
    host::memory_file,
};

/// Sends what is to be done, and what with.
pub(super) async fn order<P: Serialize>(
    connection: &Connection,
    plan: P,
    init: Option<BorrowedFd<'_>>,
    io: ChildIo,
    agent: Option<OwnedFd>,
    trees: Vec<OwnedFd>,
) -> Result<()> {
    let mut fds: Vec<OwnedFd> = Vec::new();
    let has_init = init.is_some();
    if let Some(init) = init {
        fds.push(init.try_clone_to_owned().context(|| "cannot hand on a process")?);
    }
    let has_console = matches!(io, ChildIo::Terminal { .. });
    match io {
        ChildIo::Terminal { console_socket } => {
            let socket = UnixStream::connect(&console_socket)
                .context(|| format!("cannot reach the console socket {}", console_socket.display()))?;
            fds.push(socket.into());
        }
        ChildIo::Pipes { stdin, stdout, stderr } => {
            for stream in [stdin, stdout, stderr] {
                fds.push(match stream {
                    Some(stream) => stream,
                    None => File::options()
                        .read(true)
                        .write(true)
                        .open("/dev/null")
                        .context(|| "cannot open /dev/null")?
                        .into(),
                });
            }
        }
    }
    let has_agent = agent.is_some();
    fds.extend(agent);
    fds.extend(trees);
    let document = serde_json::to_vec(&Order {
        version: init::VERSION.to_owned(),
        plan,
        has_init,
        has_console,
        has_agent,
    })
    .map_err(|e| Error::unknown("cannot encode the plan").with_source(e))?;
    fds.insert(0, memory_file(&document)?.into());
    let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    let mut message = ToInit::Plan { fds: fds.len() };
    for chunk in borrowed.chunks(wire::PACKET_MAX_FDS) {
        connection.send(&message, chunk).await.or_else(gone_is_fine)?;
        message = ToInit::More;
    }
    Ok(())
}

/// The socket of the agent that answers seccomp's questions.
pub(super) async fn agent(process: &Process) -> Result<Option<OwnedFd>> {
    let listener = process.seccomp.as_ref().and_then(|filter| filter.listener.as_ref());
    let Some(path) = listener.map(|listener| listener.path.clone()) else {
        return Ok(None);
    };
    blocking(move || {
        UnixStream::connect(&path)
            .map(|socket| Some(socket.into()))
            .context(|| {
                format!(
                    "linux.seccomp.listenerPath: cannot reach the agent at {}",
                    path.display()
                )
            })
    })
    .await
}

/// Sets what a process in a user namespace may not set by itself.
pub(super) async fn constrain(process: Process, pid: u32) -> Result<()> {
    blocking(move || {
        let proc = Proc::over(File::open("/proc").context(|| "cannot open /proc")?.into());
        let pid = libc::pid_t::try_from(pid).ok();
        process.constrain(&proc, pid)
    })
    .await
}
