//! What the helper is told to do, and the descriptors that go with it.

use std::{
    fs::File,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{fs::FileExt, net::UnixStream},
    },
};

use nix::{errno::Errno, sys::memfd::MFdFlags};
use serde::Serialize;

use super::{
    LOG_MAX_BYTES, blocking, gone_is_fine,
    init::{self, Order, process::Process},
    wire::{self, Connection, ToInit},
};
use crate::{
    backend::ChildIo,
    error::{Context, Error, Result},
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
    fds.insert(0, Scratch::new(&document)?.0.into());
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
        let proc = File::open("/proc").context(|| "cannot open /proc")?;
        let pid = libc::pid_t::try_from(pid).ok();
        process.constrain(proc.as_fd(), pid)
    })
    .await
}

/// A file in memory.
pub(super) struct Scratch(pub(super) File);

impl Scratch {
    pub(super) fn new(content: &[u8]) -> Result<Self> {
        let make = |more| nix::sys::memfd::memfd_create(c"proxmox-lxcri", MFdFlags::MFD_CLOEXEC | more);
        // Hardened kernels (vm.memfd_noexec=2) demand the flag, those before 6.3 refuse it.
        let file = match make(MFdFlags::from_bits_retain(libc::MFD_NOEXEC_SEAL)) {
            Err(Errno::EINVAL) => make(MFdFlags::empty()),
            made => made,
        };
        let file = File::from(file.context(|| "cannot make a file in memory")?);
        file.write_all_at(content, 0).context(|| "cannot write to memory")?;
        Ok(Self(file))
    }

    /// An error with what LXC has written about it.
    pub(super) fn explain(&self, error: Error) -> Error {
        let mut text = vec![0; LOG_MAX_BYTES as usize];
        let read = self.0.read_at(&mut text, 0).unwrap_or(0);
        text.truncate(read);
        let text = String::from_utf8_lossy(&text);
        // "lxc c1 20261126… ERROR    start - ../src/lxc/start.c:…:function:123 - Reason"
        let reasons: Vec<&str> = text.lines().filter_map(|line| line.splitn(3, " - ").nth(2)).collect();
        match reasons.is_empty() {
            true => error,
            false => Error::new(error.kind(), format!("{error}: {}", reasons.join("; "))),
        }
    }
}
