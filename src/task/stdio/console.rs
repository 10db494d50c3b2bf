//! The console socket: the runtime makes a pty inside the container and sends its master here (OCI runtime, `--console-socket`).

use std::{
    fs,
    hash::{BuildHasher, RandomState},
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl, open},
    sys::{
        socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket},
        stat::{Mode, fchmod},
    },
};
use tokio::{
    io::Interest,
    net::{UnixListener, UnixStream},
    time::timeout,
};

use crate::error::{Context, Error, Result};

/// Bound of the wait for the master after the launch. The runtime has sent it before it returns, so this only fires on a broken one.
pub(super) const CONSOLE_TIMEOUT: Duration = Duration::from_secs(10);

/// `sun_path` is 108 bytes with its NUL.
const SUN_PATH_MAX_BYTES: usize = 107;

nix::ioctl_read_bad!(tiocgptn, libc::TIOCGPTN, libc::c_uint);
nix::ioctl_write_ptr_bad!(tiocswinsz, libc::TIOCSWINSZ, libc::winsize);

/// Sets the size of a terminal.
pub(super) fn set_size(master: &impl AsRawFd, size: &libc::winsize) -> Result<()> {
    // SAFETY: TIOCSWINSZ reads one winsize where the pointer says, and that is a live reference.
    unsafe { tiocswinsz(master.as_raw_fd(), size) }
        .map(drop)
        .context(|| "cannot set the size of the terminal")
}

/// A listening console socket; its file is removed on drop.
#[derive(Debug)]
pub(super) struct ConsoleSocket {
    listener: UnixListener,
    /// How another process reaches it.
    path: PathBuf,
    /// The file itself.
    file: PathBuf,
    /// Keeps `path` alive where it leads through this process.
    _folder: OwnedFd,
}

impl ConsoleSocket {
    /// Listens in `folder`, reachable for the owner of this process only.
    ///
    /// The folder of a pod's container is 118 bytes long by itself, more than a socket's address takes. Then the path that is handed out
    /// leads through `/proc/<pid>/fd/<folder>`: short, no further folder to clean up after a crash, and good for every process that
    /// may look into this one, as the runtime does, being root in the same pid namespace.
    pub(super) fn listen(folder: &Path) -> Result<Self> {
        let what = || format!("cannot listen for the terminal in {}", folder.display());
        let handle = open(
            folder,
            OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
            Mode::empty(),
        )
        .context(what)?;
        loop {
            let name = format!(".console-{:016x}", RandomState::new().hash_one(handle.as_raw_fd()));
            let file = folder.join(&name);
            let path = if file.as_os_str().len() <= SUN_PATH_MAX_BYTES {
                file.clone()
            } else {
                PathBuf::from(format!("/proc/{}/fd/{}/{name}", std::process::id(), handle.as_raw_fd()))
            };
            let listener = match listen_at(&path) {
                Err(Errno::EADDRINUSE) => continue,
                other => other.map_err(io::Error::from),
            }
            .and_then(|fd| UnixListener::from_std(fd.into()))
            .inspect_err(|_| {
                let _ = fs::remove_file(&file);
            })
            .context(what)?;
            return Ok(Self {
                listener,
                path,
                file,
                _folder: handle,
            });
        }
    }

    /// Where the runtime connects to.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Accepts one connection and takes the master from it. Whoever connects is not trusted.
    ///
    /// # Errors
    /// `DeadlineExceeded` after [`CONSOLE_TIMEOUT`]; `InvalidArgument` for anything but one message with exactly one descriptor that is
    /// the master of a pty. All descriptors that came are closed then.
    pub(super) async fn master(self) -> Result<OwnedFd> {
        let received = timeout(CONSOLE_TIMEOUT, async {
            let (stream, _) = self.listener.accept().await.context(|| "cannot accept the terminal")?;
            receive(&stream).await
        });
        received.await.map_err(|_| {
            Error::deadline(format!(
                "the runtime sent no terminal within {} s; nothing is left behind",
                CONSOLE_TIMEOUT.as_secs()
            ))
        })?
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.file);
    }
}

fn listen_at(path: &Path) -> nix::Result<OwnedFd> {
    let fd = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )?;
    // On Linux the file of a socket gets the mode that the socket had before, less the umask: there is no moment in which others can
    // connect.
    fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(fd.as_raw_fd(), &UnixAddr::new(path.as_os_str().as_bytes())?)?;
    listen(&fd, Backlog::new(1)?)?;
    Ok(fd)
}

async fn receive(stream: &UnixStream) -> Result<OwnedFd> {
    let mut fds = loop {
        stream.readable().await.context(|| "cannot receive the terminal")?;
        match stream.try_io(Interest::READABLE, || receive_now(stream.as_raw_fd())) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => {
                return Err(Error::invalid("cannot receive the terminal").with_source(e));
            }
            other => break other.context(|| "cannot receive the terminal")?,
        }
    };
    let Some(fd) = fds.pop().filter(|_| fds.is_empty()) else {
        return Err(Error::invalid(
            "expected exactly one descriptor on the console socket, the master of a pty",
        ));
    };
    let mut number = 0;
    // SAFETY: TIOCGPTN stores one unsigned int where the pointer says, and that is a live local; other files refuse it.
    unsafe { tiocgptn(fd.as_raw_fd(), &mut number) }
        .map_err(|e| Error::invalid("what came on the console socket is not the master of a pty").with_source(e))?;
    let flags = fcntl(&fd, FcntlArg::F_GETFL).context(|| "cannot examine the terminal")?;
    // The description is shared with its sender, who has no more use for it.
    fcntl(
        &fd,
        FcntlArg::F_SETFL(OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK),
    )
    .context(|| "cannot prepare the terminal")?;
    Ok(fd)
}

/// Takes one message and all descriptors in it.
///
/// nix hands out no descriptor of a truncated message, and those that the kernel did make would stay open; so this is libc.
fn receive_now(socket: RawFd) -> io::Result<Vec<OwnedFd>> {
    // The runtime sends the path of the slave along; nobody needs it, but without data there is no control message.
    let mut data = [0_u8; 256];
    let mut control = Control([0; CONTROL_BYTES]);
    let mut iov = libc::iovec {
        iov_base: data.as_mut_ptr().cast(),
        iov_len: data.len(),
    };
    // SAFETY: msghdr is plain data, for which zeroes are valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut iov;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = control.0.len() as _;
    // SAFETY: every pointer in `message` leads to a live local of the length that stands beside it.
    let read = unsafe { libc::recvmsg(socket, &mut message, libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT) };
    if read < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut fds = Vec::new();
    // SAFETY: the kernel has filled `message`; CMSG_FIRSTHDR and CMSG_NXTHDR stay inside of msg_control and return null at its end,
    // cmsg_len covers the header and the descriptors that follow it, and these were made for us just now, so nobody else owns them.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&message);
        while let Some(found) = header.as_ref() {
            if found.cmsg_level == libc::SOL_SOCKET && found.cmsg_type == libc::SCM_RIGHTS {
                // Some libcs have a shorter type here.
                #[allow(clippy::unnecessary_cast)]
                let bytes = found.cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                let first = libc::CMSG_DATA(header).cast::<RawFd>();
                for index in 0..bytes / size_of::<RawFd>() {
                    fds.push(OwnedFd::from_raw_fd(first.add(index).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(&message, header);
        }
    }
    if message.msg_flags & libc::MSG_CTRUNC != 0 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "more descriptors than one, or no room for it",
        ));
    }
    Ok(fds)
}

/// Room for two descriptors, so that a second one is noticed, not just cut off.
const CONTROL_BYTES: usize = 64;

/// A control buffer with the alignment of `cmsghdr`.
#[repr(C, align(8))]
struct Control([u8; CONTROL_BYTES]);
