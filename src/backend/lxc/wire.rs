//! Packets between the shim, a container's init before it is the user's program, and the monitor.
//!
//! One packet is one JSON document, and descriptors beside it. The socket is a pair of SOCK_SEQPACKET: boundaries are kept, and the end
//! is told when the last holder of the other side is gone, by close, exec or death.

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::{
    cmsg_space,
    errno::Errno,
    sys::socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixCredentials, recvmsg,
        sendmsg, setsockopt, socketpair, sockopt::PassCred,
    },
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::io::{Interest, unix::AsyncFd};

use crate::error::{Context, Error, Kind, Result};

/// Upper bound of a document. What is larger travels as a file in memory beside it.
const PACKET_MAX_BYTES: usize = 64 << 10;

/// Descriptors of one packet; the kernel takes 253.
pub const PACKET_MAX_FDS: usize = 200;

/// What failed elsewhere, on its way to the client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Its kind.
    pub kind: Kind,
    /// Its text, with all causes.
    pub text: String,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        // What does not fit into a packet would be lost as a whole.
        let mut text = error.to_string();
        if let Some((end, _)) = text.char_indices().nth(8192) {
            text.truncate(end);
        }
        Self {
            kind: error.kind(),
            text,
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        Self::new(failure.kind, failure.text)
    }
}

/// What init tells the shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromInit {
    /// It is born, in its namespaces and cgroups. The packet carries its pid.
    Hello,
    /// The root file system is complete and not entered; it waits for [`ToInit::Go`]. Told only where the plan has hooks for that moment.
    Mounted,
    /// Nothing is missing but the program; it waits for [`ToInit::Start`].
    Created,
    /// It gives up, and ends.
    Failed(Failure),
}

/// What the shim tells init.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToInit {
    /// The document of what to do is in the file in memory that comes first among the descriptors. More packets [`ToInit::More`] bring
    /// the rest of them, `fds` in all.
    Plan {
        /// How many descriptors there are.
        fds: usize,
    },
    /// More descriptors.
    More,
    /// The hooks of the runtime have run.
    Go,
    /// Become the program.
    Start {
        /// The receiver's pid in the shim's pid namespace, which it cannot know by itself.
        pid: u32,
    },
}

/// What the monitor tells the shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromMonitor {
    /// This child of its own has ended. It reaps it, and waits for the answer before it does anything else.
    Reaped {
        /// In the numbers of the shim's pid namespace.
        pid: u32,
        /// 128 + signal when signalled.
        status: u32,
    },
    /// LXC could not be used, or has not started the container.
    Failed(Failure),
}

/// The shim's answer to [`FromMonitor::Reaped`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Continue;

/// A packet that has arrived.
#[derive(Debug)]
pub struct Packet {
    bytes: Vec<u8>,
    /// What came beside it, close-on-exec.
    pub fds: Vec<OwnedFd>,
    /// The sender, where the receiver has asked for it.
    pub pid: Option<u32>,
}

impl Packet {
    /// The document.
    ///
    /// # Errors
    /// `Unknown` when it is another one.
    pub fn read<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_slice(&self.bytes).map_err(|e| Error::unknown("cannot understand a packet").with_source(e))
    }
}

/// Two ends; both close-on-exec.
///
/// # Errors
/// The operating system's.
pub fn pair() -> Result<(OwnedFd, OwnedFd)> {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .context(|| "cannot make a pair of sockets")
}

/// Sends one packet.
///
/// # Errors
/// The operating system's; EPIPE when nobody holds the other end.
pub fn send(socket: BorrowedFd<'_>, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > PACKET_MAX_BYTES {
        return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    loop {
        let sent = sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(&bytes)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        );
        match sent {
            Err(Errno::EINTR) => {}
            sent => return Ok(sent.map(drop)?),
        }
    }
}

/// Takes one packet; `None` when the other end is gone.
///
/// # Errors
/// The operating system's; `InvalidData` for a packet that was cut.
pub fn receive(socket: BorrowedFd<'_>) -> io::Result<Option<Packet>> {
    let mut bytes = vec![0; PACKET_MAX_BYTES];
    let mut control = cmsg_space!([RawFd; PACKET_MAX_FDS], UnixCredentials);
    let mut packet = Packet {
        bytes: Vec::new(),
        fds: Vec::new(),
        pid: None,
    };
    let (length, flags) = loop {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let received = match recvmsg::<()>(
            socket.as_raw_fd(),
            &mut parts,
            Some(&mut control),
            MsgFlags::MSG_CMSG_CLOEXEC,
        ) {
            // A peer that died with something unread: the kernel says so once, before it hands out what the peer had sent.
            Err(Errno::EINTR | Errno::ECONNRESET) => continue,
            received => received?,
        };
        for message in received.cmsgs()? {
            match message {
                ControlMessageOwned::ScmRights(fds) => packet.fds.extend(fds.into_iter().map(|fd| {
                    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
                    unsafe { OwnedFd::from_raw_fd(fd) }
                })),
                ControlMessageOwned::ScmCredentials(sender) => packet.pid = u32::try_from(sender.pid()).ok(),
                _ => {}
            }
        }
        break (received.bytes, received.flags);
    };
    if flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a packet was cut"));
    }
    // No document is empty.
    if length == 0 {
        return Ok(None);
    }
    bytes.truncate(length);
    packet.bytes = bytes;
    Ok(Some(packet))
}

/// The shim's end of a pair.
#[derive(Debug)]
pub struct Connection(AsyncFd<OwnedFd>);

impl Connection {
    /// Takes an end, and asks the kernel to tell who sends.
    ///
    /// # Errors
    /// The operating system's.
    pub fn new(socket: OwnedFd) -> Result<Self> {
        let what = || "cannot watch a socket";
        setsockopt(&socket, PassCred, &true).context(what)?;
        let flags = nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK);
        nix::fcntl::fcntl(&socket, flags).context(what)?;
        // SAFETY: an `OwnedFd` answers with the same open descriptor as long as it lives.
        unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE | Interest::WRITABLE) }
            .map(Self)
            .map_err(io::Error::from)
            .context(what)
    }

    /// Sends one packet. Cancelled, it is sent whole or not at all.
    ///
    /// # Errors
    /// `Unavailable` when nobody holds the other end; the operating system's.
    pub async fn send(&self, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> Result<()> {
        let sent = self
            .0
            .async_io(Interest::WRITABLE, |socket| send(socket.as_fd(), message, fds))
            .await;
        match sent {
            // The latter where it left something unread.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EPIPE | libc::ECONNRESET)) => {
                Err(Error::unavailable("the other side is gone").with_source(e))
            }
            sent => sent.context(|| "cannot send a packet"),
        }
    }

    /// Takes one packet; `None` when the other end is gone. Cancelled, nothing is lost.
    ///
    /// # Errors
    /// The operating system's.
    pub async fn receive(&self) -> Result<Option<Packet>> {
        self.0
            .async_io(Interest::READABLE, |socket| receive(socket.as_fd()))
            .await
            .context(|| "cannot receive a packet")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_arrives_with_its_descriptors_and_the_end_is_told() {
        let (ours, theirs) = pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let fds = vec![file.as_fd(); PACKET_MAX_FDS];
        send(ours.as_fd(), &ToInit::Plan { fds: 3 }, &fds).unwrap();
        send(ours.as_fd(), &ToInit::Go, &[]).unwrap();
        drop(ours);
        let packet = receive(theirs.as_fd()).unwrap().unwrap();
        assert_eq!(packet.read::<ToInit>().unwrap(), ToInit::Plan { fds: 3 });
        assert_eq!(packet.fds.len(), PACKET_MAX_FDS);
        for fd in &packet.fds {
            let flags = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GETFD).unwrap();
            assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
        }
        assert_eq!(
            receive(theirs.as_fd()).unwrap().unwrap().read::<ToInit>().unwrap(),
            ToInit::Go
        );
        assert!(receive(theirs.as_fd()).unwrap().is_none());
        let gone = send(theirs.as_fd(), &ToInit::Go, &[]).unwrap_err();
        assert_eq!(gone.raw_os_error(), Some(libc::EPIPE));
    }

    #[test]
    fn the_last_words_of_a_peer_that_died_with_something_unread_are_heard() {
        let (ours, theirs) = pair().unwrap();
        send(ours.as_fd(), &ToInit::Start { pid: 7 }, &[]).unwrap();
        let failed = FromInit::Failed(Error::not_found("no such program").into());
        send(theirs.as_fd(), &failed, &[]).unwrap();
        drop(theirs);
        let packet = receive(ours.as_fd()).unwrap().unwrap();
        assert_eq!(packet.read::<FromInit>().unwrap(), failed);
        assert!(receive(ours.as_fd()).unwrap().is_none());
        // Nor is a death without a word an error.
        let (ours, theirs) = pair().unwrap();
        send(ours.as_fd(), &ToInit::Go, &[]).unwrap();
        drop(theirs);
        assert!(receive(ours.as_fd()).unwrap().is_none());
    }

    #[tokio::test]
    async fn the_shim_hears_who_sends() {
        let (ours, theirs) = pair().unwrap();
        let ours = Connection::new(ours).unwrap();
        send(theirs.as_fd(), &FromInit::Hello, &[]).unwrap();
        let packet = ours.receive().await.unwrap().unwrap();
        assert_eq!(packet.pid, Some(std::process::id()));
        drop(theirs);
        assert!(ours.receive().await.unwrap().is_none());
        let error = ours.send(&ToInit::Go, &[]).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable);
    }

    #[test]
    fn a_failure_keeps_kind_and_text_and_fits_into_a_packet() {
        let failure = Failure::from(Error::invalid("ä".repeat(100_000)));
        let (ours, theirs) = pair().unwrap();
        send(ours.as_fd(), &FromInit::Failed(failure.clone()), &[]).unwrap();
        let packet = receive(theirs.as_fd()).unwrap().unwrap();
        assert_eq!(packet.read::<FromInit>().unwrap(), FromInit::Failed(failure.clone()));
        let error = Error::from(failure);
        assert_eq!(error.kind(), Kind::InvalidArgument);
        assert!(error.to_string().starts_with("ää"));
    }
}
