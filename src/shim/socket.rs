//! The socket of a group: where it is, whether somebody listens on it, and the taking over of a dead one.
//!
//! The file is `<folder>/<sha256 of containerd's address, namespace and group>`, the folder `/run/containerd/s` unless containerd
//! names another. The address of the daemon is part of the name, so private daemons do not meet.
//!
//! Whoever looks at the file in order to change it holds an exclusive `flock` on the folder. The kernel takes it back from a process
//! that dies, and no lock file is left behind. It is held for a few system calls and the start of the shim, none of which waits.

use std::{
    fs,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{DirBuilderExt, PermissionsExt},
        },
    },
    path::{Path, PathBuf},
    sync::mpsc,
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket},
};
use sha2::{Digest, Sha256};

use crate::error::{Context, Error, Result};

/// Folder of the sockets when containerd does not name one; the same as that of containerd's own shims.
pub const DEFAULT_DIR: &str = "/run/containerd/s";

/// `sun_path` without its terminator.
const PATH_MAX_BYTES: usize = 107;

/// Bound of the wait for the folder's lock. Its holders never block, so only one that was stopped (SIGSTOP) can exhaust it.
const LOCK_BOUND: Duration = Duration::from_secs(4);

/// Where the socket of a group is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    dir: PathBuf,
    name: String,
}

/// What [`Place::acquire`] found.
#[derive(Debug)]
pub enum Acquired<'a> {
    /// A shim of the group listens.
    Live,
    /// Nobody does.
    Free(Claim<'a>),
}

/// The right to a free place. Nobody else finds or takes it as long as this lives.
#[derive(Debug)]
pub struct Claim<'a> {
    place: &'a Place,
    _lock: Flock<OwnedFd>,
}

impl Claim<'_> {
    /// Lets `socket` (of [`unbound`]) listen at the place.
    ///
    /// # Errors
    /// The operating system's; no socket file is left behind then.
    pub fn listen(self, socket: &OwnedFd) -> Result<()> {
        let path = self.place.path();
        let failed = || format!("cannot listen on {}", path.display());
        let address = UnixAddr::new(&path).context(failed)?;
        bind(socket.as_raw_fd(), &address).context(failed)?;
        // Before it listens, so that nobody else can ever connect.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))
            .context(|| format!("cannot protect {}", path.display()))
            .and_then(|()| listen(socket, Backlog::MAXCONN).context(failed))
            .inspect_err(|_| {
                let _ = fs::remove_file(&path);
            })
    }
}

/// A unix socket that has no place yet.
///
/// # Errors
/// The operating system's.
pub fn unbound() -> Result<OwnedFd> {
    socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).context(|| "cannot make a socket")
}

#[derive(Debug, PartialEq, Eq)]
enum Probe {
    Absent,
    Dead,
    Live,
}

impl Place {
    /// The place of `group`'s socket in `dir`.
    ///
    /// # Errors
    /// `InvalidArgument` when the path is relative or longer than a socket's may be.
    pub fn new(dir: &Path, containerd_address: &str, namespace: &str, group: &str) -> Result<Self> {
        let mut hash = Sha256::new();
        for part in [containerd_address, namespace] {
            hash.update(part);
            // A separator that no argument can contain, so that no group can be named like another namespace's.
            hash.update([0]);
        }
        hash.update(group);
        let mut name = String::with_capacity(64);
        for byte in hash.finalize() {
            for digit in [byte >> 4, byte & 15] {
                name.push(char::from_digit(digit.into(), 16).unwrap_or('0'));
            }
        }
        let length = dir.as_os_str().len() + 1 + name.len();
        if !dir.is_absolute() || length > PATH_MAX_BYTES {
            return Err(Error::invalid(format!(
                "socket folder {} cannot be used: it must be absolute and have at most {} bytes",
                dir.display(),
                PATH_MAX_BYTES - 1 - name.len()
            )));
        }
        Ok(Self { dir: dir.into(), name })
    }

    /// The place that `address` (`unix:///…`) names, provided that it is the same group's, in whatever folder.
    pub fn relocated(&self, address: &str) -> Option<Self> {
        let path = Path::new(address.trim().strip_prefix("unix://")?);
        let same = path.is_absolute() && path.file_name()?.as_bytes() == self.name.as_bytes();
        same.then(|| Self {
            dir: path.parent().unwrap_or(Path::new("/")).into(),
            name: self.name.clone(),
        })
    }

    /// The socket file.
    pub fn path(&self) -> PathBuf {
        self.dir.join(&self.name)
    }

    /// The address in the form that containerd dials.
    pub fn address(&self) -> String {
        format!("unix://{}", self.path().display())
    }

    /// Finds the group's shim or claims its place, removing the socket of a dead one. Of any number of callers at once, exactly one
    /// gets [`Acquired::Free`]; the others wait until it listens.
    ///
    /// # Errors
    /// The operating system's; `DeadlineExceeded` when another caller holds its claim for ever.
    pub fn acquire(&self) -> Result<Acquired<'_>> {
        if let Some(parent) = self.dir.parent() {
            // containerd's state folder must be traversable for remapped users, its sockets need not.
            create_dir(parent, 0o711)?;
        }
        create_dir(&self.dir, 0o700)?;
        let lock = self.lock()?;
        match self.probe()? {
            Probe::Live => return Ok(Acquired::Live),
            Probe::Dead => self.unlink()?,
            Probe::Absent => {}
        }
        Ok(Acquired::Free(Claim {
            place: self,
            _lock: lock,
        }))
    }

    /// Removes the socket file if nobody listens on it; says whether it is gone.
    ///
    /// # Errors
    /// The operating system's.
    pub fn remove_if_dead(&self) -> Result<bool> {
        if !self.dir.is_dir() {
            return Ok(true);
        }
        let _lock = self.lock()?;
        match self.probe()? {
            Probe::Live => return Ok(false),
            Probe::Dead => self.unlink()?,
            Probe::Absent => {}
        }
        Ok(true)
    }

    fn unlink(&self) -> Result<()> {
        let path = self.path();
        match fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(e).context(|| format!("cannot remove socket {}", path.display()))
            }
            _ => Ok(()),
        }
    }

    /// Whether somebody listens. Never waits: a shim whose backlog is full is alive.
    fn probe(&self) -> Result<Probe> {
        let path = self.path();
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let failed = || format!("cannot see whether {} is alive", path.display());
        let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None).context(failed)?;
        match connect(socket.as_raw_fd(), &UnixAddr::new(&path).context(failed)?) {
            Ok(()) | Err(Errno::EAGAIN | Errno::EINPROGRESS) => Ok(Probe::Live),
            Err(Errno::ENOENT) => Ok(Probe::Absent),
            Err(Errno::ECONNREFUSED) => Ok(Probe::Dead),
            Err(e) => Err(e).context(failed),
        }
    }

    fn lock(&self) -> Result<Flock<OwnedFd>> {
        let failed = || format!("cannot lock {}", self.dir.display());
        let dir: OwnedFd = fs::File::open(&self.dir).context(failed)?.into();
        let dir = match Flock::lock(dir, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((dir, Errno::EWOULDBLOCK)) => dir,
            Err((_, e)) => return Err(e).context(failed),
        };
        // flock(2) has no time-out; a thread that is left behind when it does not come back gives it one.
        let (sender, receiver) = mpsc::sync_channel(1);
        std::thread::Builder::new()
            .spawn(move || sender.send(Flock::lock(dir, FlockArg::LockExclusive).map_err(|(_, e)| e)))
            .context(failed)?;
        match receiver.recv_timeout(LOCK_BOUND) {
            Ok(lock) => lock.context(failed),
            Err(_) => Err(Error::deadline(format!(
                "{}: still held after {LOCK_BOUND:?}; \"lsof {}\" names the holder",
                failed(),
                self.dir.display()
            ))),
        }
    }
}

fn create_dir(dir: &Path, mode: u32) -> Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(dir)
        .context(|| format!("cannot create {}", dir.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn place(dir: &Path, group: &str) -> Place {
        Place::new(&dir.join("s"), "/run/c.sock", "ns", group).unwrap()
    }

    /// The listening socket of a new shim, or `None` where there is one already.
    fn listen_at(place: &Place) -> Option<OwnedFd> {
        match place.acquire().unwrap() {
            Acquired::Live => None,
            Acquired::Free(claim) => {
                let socket = unbound().unwrap();
                claim.listen(&socket).unwrap();
                Some(socket)
            }
        }
    }

    #[test]
    fn daemons_namespaces_and_groups_do_not_meet() {
        let dir = Path::new("/run/s");
        let name = |address, namespace, group| Place::new(dir, address, namespace, group).unwrap().name;
        let names = [
            name("/a", "n", "g"),
            name("/b", "n", "g"),
            name("/a", "m", "g"),
            name("/a", "n", "h"),
            name("/a", "n", "../m/g"),
            name("/a/n", "", "g"),
        ];
        let different: std::collections::HashSet<_> = names.iter().collect();
        assert_eq!(different.len(), names.len());
        assert!(
            names
                .iter()
                .all(|name| name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit()))
        );
    }

    #[test]
    fn a_path_that_no_socket_can_have_is_refused() {
        assert!(Place::new(Path::new(&format!("/{}", "x".repeat(42))), "", "", "").is_err());
        assert!(Place::new(Path::new(&format!("/{}", "x".repeat(41))), "", "", "").is_ok());
        assert!(Place::new(Path::new("s"), "", "", "").is_err());
    }

    #[test]
    fn only_a_socket_of_the_same_group_is_followed_to_another_folder() {
        let place = place(Path::new("/run"), "g");
        let there = format!("unix:///elsewhere/{}\n", place.name);
        assert_eq!(
            place.relocated(&there).unwrap().path(),
            Path::new("/elsewhere").join(&place.name)
        );
        for other in ["unix:///etc/passwd", "", "/elsewhere", "unix://"] {
            assert_eq!(place.relocated(other), None, "{other}");
        }
    }

    #[test]
    fn a_second_start_finds_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let place = place(dir.path(), "g");
        let _listener = listen_at(&place).expect("nobody was there");
        assert_eq!(fs::metadata(place.path()).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(place.acquire().unwrap(), Acquired::Live));
        assert!(!place.remove_if_dead().unwrap());
        assert!(place.path().exists());
    }

    #[test]
    fn a_shim_with_a_full_backlog_is_alive() {
        let dir = tempfile::tempdir().unwrap();
        let place = place(dir.path(), "g");
        drop(listen_at(&place));
        fs::remove_file(place.path()).unwrap();
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let address = UnixAddr::new(&place.path()).unwrap();
        let listener = socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
        nix::sys::socket::bind(listener.as_raw_fd(), &address).unwrap();
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
        let mut waiting = Vec::new();
        loop {
            let client = socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
            match connect(client.as_raw_fd(), &address) {
                Ok(()) => waiting.push(client),
                Err(e) => {
                    assert_eq!(e, Errno::EAGAIN);
                    break;
                }
            }
        }
        assert_eq!(place.probe().unwrap(), Probe::Live);
    }

    #[test]
    fn the_socket_of_a_dead_shim_is_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let place = place(dir.path(), "g");
        drop(listen_at(&place));
        assert!(UnixStream::connect(place.path()).is_err());
        let _listener = listen_at(&place).expect("nobody listens there");
        UnixStream::connect(place.path()).unwrap();
    }

    #[test]
    fn a_dead_socket_is_removed_and_its_absence_is_success() {
        let dir = tempfile::tempdir().unwrap();
        let place = place(dir.path(), "g");
        assert!(place.remove_if_dead().unwrap());
        drop(listen_at(&place));
        assert!(place.remove_if_dead().unwrap());
        assert!(!place.path().exists());
        assert!(place.remove_if_dead().unwrap());
    }

    #[test]
    fn of_many_starts_at_once_one_gets_the_socket_and_nothing_else_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let place = place(dir.path(), "g");
        // A dead shim's socket makes it harder.
        drop(listen_at(&place));
        let bound: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..16).map(|_| scope.spawn(|| listen_at(&place))).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        let bound = bound.iter().flatten().count();
        assert_eq!(bound, 1);
        assert_eq!(fs::read_dir(dir.path().join("s")).unwrap().count(), 1);
    }
}
