//! What holds a container: the contract that every backend keeps.
//!
//! A backend knows no ttrpc, no fifo and no event. It gets file descriptors ([`ChildIo`]), acts, and hands back a pid and the
//! promise of an exit ([`Launched`]).

pub mod crun;
pub mod lxc;

use std::{
    future::Future,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    time::SystemTime,
};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::{
    config,
    error::{Error, Result},
    host::{
        cgroup::Cgroup,
        command::{Pidfd, Reaper},
    },
    task::{Backends, bundle::Bundle, record::Record},
};

/// A future that can be stored and sent to another task.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// How and when a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// The exit status; 128 + signal when signalled; 255 when nobody knows.
    pub status: u32,
    /// When it was reaped.
    pub at: SystemTime,
}

impl Exit {
    /// An exit that happens now.
    pub fn now(status: u32) -> Self {
        Self {
            status,
            at: SystemTime::now(),
        }
    }
}

/// A process that a backend has launched.
pub struct Launched {
    /// Its pid on the host (for a VM: QEMU's).
    pub pid: u32,
    /// The process itself, for signals.
    pub process: Arc<Pidfd>,
    /// Resolves when it has ended and was reaped. Subscribed before the launch, so an exit is never missed; it may be dropped, and
    /// then the process is reaped all the same.
    pub exit: BoxFuture<'static, Exit>,
    /// For init: the container's cgroup, with its limits, where that is not the one in which the process is born but one above it.
    pub cgroup: Option<Cgroup>,
}

/// The stdio of a process as the backend sees it: descriptors and nothing else. All are close-on-exec in the shim.
#[derive(Debug)]
pub enum ChildIo {
    /// Pipe ends (or files) for the process; `None` is `/dev/null`.
    Pipes {
        /// Read end for fd 0.
        stdin: Option<OwnedFd>,
        /// Write end for fd 1.
        stdout: Option<OwnedFd>,
        /// Write end for fd 2.
        stderr: Option<OwnedFd>,
    },
    /// A terminal: the runtime makes the pty and sends its master to this unix socket (OCI console socket protocol).
    Terminal {
        /// Absolute path of the listening socket.
        console_socket: PathBuf,
    },
}

/// What the authority (kernel, runtime, Proxmox) says of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]

pub enum Observed {
    /// Unknown to it.
    Absent,
    /// Prepared; the user's program does not run yet.
    Created {
        /// Init's pid on the host.
        pid: u32,
    },
    /// Runs (or is paused).
    Running {
        /// Init's pid on the host.
        pid: u32,
    },
    /// Ended, and not deleted.
    Stopped,
}

/// The process document of an exec, as the client sent it.
#[derive(Debug, Clone)]
pub struct ExecSpec {
    /// OCI `process` object, JSON.
    pub json: Vec<u8>,
    /// Its `terminal` as the request says it.
    pub terminal: bool,
}

/// What a checkpoint shall do; the fields of `containerd.runc.v1.CheckpointOptions`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckpointOptions {
    /// Folder that receives the images.
    pub image_path: PathBuf,
    /// Folder for CRIU's logs; the backend's default when empty.
    pub work_path: Option<PathBuf>,
    /// End the container afterwards.
    pub exit: bool,
    /// Allow open TCP connections.
    pub open_tcp: bool,
    /// Allow external unix sockets.
    pub external_unix_sockets: bool,
    /// Allow shell jobs (a terminal).
    pub terminal: bool,
    /// Handle file locks.
    pub file_locks: bool,
    /// CRIU's cgroup mode.
    pub cgroups_mode: String,
}

/// A runtime that holds one container.
///
/// Stateless: what must survive the shim is in the [`Record`], saved by the engine BEFORE the call, so that [`Backend::delete`]
/// can undo a half-made create from a fresh process (`shim delete`).
///
/// Every call may be cancelled (its future dropped) or killed at any instruction; `delete` then cleans up.
#[async_trait]
pub trait Backend: Send + Sync {
    /// "crun", "lxc", "proxmox-lxc" or "proxmox-vm".
    fn name(&self) -> &'static str;

    /// Prepares the container; the user's program MUST NOT run yet (OCI runtime.md, create). `Some` if init exists already.
    ///
    /// Takes `io` if init is born here. With [`Record::restore_from`] set, prepares a restore instead.
    async fn create(&self, rec: &Record, bundle: &Bundle, io: &mut Option<ChildIo>) -> Result<Option<Launched>>;

    /// Runs the user's program. `Some` if init is born here (then it takes `io`).
    async fn start(&self, rec: &Record, io: &mut Option<ChildIo>) -> Result<Option<Launched>>;

    /// Runs a further process. Stdio that the backend cannot give MUST be `Unimplemented`, never dropped.
    async fn exec(&self, rec: &Record, exec_id: &str, process: &ExecSpec, io: ChildIo) -> Result<Launched>;

    /// What init is sent for a Kill with `signal`. A backend whose init takes another signal for the wish to end it translates; SIGKILL
    /// MUST stay what it is. Execs get what the client says.
    fn init_signal(&self, rec: &Record, signal: i32) -> i32 {
        let _ = rec;
        signal
    }

    /// Called once, when init's exit and those of its execs have been published: what the backend has kept until then for whoever
    /// looks at the container's end may go.
    async fn exited(&self, rec: &Record) {
        let _ = rec;
    }

    /// Asks the authority, never a cache.
    async fn observe(&self, rec: &Record) -> Result<Observed>;

    /// Ends what still runs and removes everything that `create` made, except the rootfs. Idempotent; absence is success; goes on
    /// past errors and reports all of them.
    async fn delete(&self, rec: &Record) -> Result<()>;

    /// The last resort after a [`Backend::delete`] that ended with `failed`, where nobody will call it again: ends and removes by
    /// hand, without the authority, what it has not. Idempotent.
    ///
    /// # Errors
    /// `failed` where that cannot be done, or what went wrong by hand.
    async fn erase(&self, rec: &Record, failed: Error) -> Result<()> {
        let _ = rec;
        Err(failed)
    }

    /// Applies OCI `linux.resources` (JSON) to the running container.
    async fn update(&self, rec: &Record, resources_json: &[u8]) -> Result<()> {
        let _ = (rec, resources_json);
        Err(Error::unimplemented(format!(
            "backend {} cannot update resources",
            self.name()
        )))
    }

    /// Writes a checkpoint.
    async fn checkpoint(&self, rec: &Record, options: &CheckpointOptions) -> Result<()> {
        let _ = (rec, options);
        Err(Error::unimplemented(format!(
            "backend {} cannot checkpoint",
            self.name()
        )))
    }
}

/// The backend that the options name, for [`crate::task::Engine`].
///
/// # Errors
/// The returned function answers `Unimplemented`, by name, for a backend that does not exist yet.
pub fn all(reaper: &Reaper) -> Backends {
    let crun: Arc<dyn Backend> = Arc::new(crun::Crun::new(reaper.clone()));
    let lxc: Arc<dyn Backend> = Arc::new(lxc::Lxc::new(reaper.clone()));
    Arc::new(move |options| match options.backend.as_str() {
        "crun" => Ok(crun.clone()),
        "lxc" => Ok(lxc.clone()),
        known if config::BACKENDS.contains(&known) => Err(Error::unimplemented(format!(
            "backend {known} is known but not built yet; use backend crun"
        ))),
        other => Err(Error::invalid(format!(
            "unknown backend {other:?}; known are {}",
            config::BACKENDS.join(", ")
        ))),
    })
}

/// Checks an id that becomes part of a path: containerd's rule for identifiers, and nothing that could leave a folder.
///
/// # Errors
/// `InvalidArgument` for an empty id, one longer than 255 bytes, or one with characters other than `A-Za-z0-9_.-` at places where
/// containerd forbids them (so `/`, `..` and NUL too).
pub fn check_id(what: &str, id: &str) -> Result<()> {
    let ok = !id.is_empty()
        && id.len() <= 255
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
        && id.as_bytes()[0].is_ascii_alphanumeric()
        && !id.contains("..");
    if ok {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "invalid {what} {id:?}: letters, digits, '_', '.' and '-', starting with a letter or digit, at most 255"
    )))
}

/// `<bundle>/<name>`, for file names that this crate chose itself.
pub fn in_bundle(rec: &Record, name: &str) -> PathBuf {
    Path::new(&rec.bundle).join(name)
}
