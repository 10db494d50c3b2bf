//! The engine: every task of this shim, the same for every backend.
//!
//! [`Engine`] holds the map and hands out [`Task`]s; a [`Task`] orders what happens to one container. Each public method is one
//! call of containerd's Task API and MUST be run to its end: the caller spawns it, so that a client's deadline never leaves half a
//! container (containerd #7496).

pub mod bundle;
mod cleanup;
pub mod event;
mod lifecycle;
pub mod process;
pub mod record;
mod requests;
pub mod stdio;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::sync::watch;

pub use cleanup::{Cleaned, cleanup};
pub use lifecycle::Task;

use self::{bundle::Bundle, event::EventSink, process::Phase, record::Record};
use crate::{
    backend::{Backend, Exit, check_id},
    config::{self, Options},
    error::{Error, Result},
    host::{
        cgroup::{self, Cgroup},
        command::{self, Reaper},
    },
    rootfs::Mount,
};

/// How long a shim whose tasks have all ended, and that was asked to shut down, waits for somebody to delete them. `shim delete`
/// reports their true exit status from the record afterwards.
const LINGER: Duration = Duration::from_secs(30);

/// How long a shim without any task lives on: containerd calls Create within milliseconds after `start`, or never.
const EMPTY: Duration = Duration::from_secs(300);

/// Bound of ending what is left in a dead container's cgroup, and of removing the cgroup.
const CGROUP_BOUND: Duration = Duration::from_secs(3);

/// Chooses the backend of a container.
pub type Backends = Arc<dyn Fn(&Options) -> Result<Arc<dyn Backend>> + Send + Sync>;

/// What Create needs to know.
#[derive(Debug, Clone, Default)]
pub struct CreateRequest {
    /// The task's id.
    pub id: String,
    /// Absolute path of the bundle.
    pub bundle: PathBuf,
    /// Mounts of the rootfs; none when the bundle brings its rootfs.
    pub rootfs: Vec<Mount>,
    /// Where stdio goes.
    pub stdio: stdio::Config,
    /// Folder of a checkpoint to restore from; empty for none.
    pub checkpoint: String,
    /// Runtime options as the client sent them.
    pub options: RuntimeOptions,
}

/// Runtime options as they arrive: a protobuf `Any`, taken apart. Both parts empty: the client sent none.
#[derive(Debug, Clone, Default)]
pub struct RuntimeOptions {
    /// Full name of the message.
    pub type_url: String,
    /// The encoded message.
    pub value: Vec<u8>,
}

/// What State answers.
#[derive(Debug, Clone)]
pub struct State {
    /// The bundle.
    pub bundle: PathBuf,
    /// The process's pid, 0 before there is one.
    pub pid: u32,
    /// Its phase.
    pub phase: Phase,
    /// Its stdio as asked for.
    pub stdio: stdio::Config,
    /// How it ended, once it has.
    pub exit: Option<Exit>,
}

/// All tasks of one shim.
pub struct Engine {
    namespace: String,
    config_file: PathBuf,
    sink: Arc<dyn EventSink>,
    backends: Backends,
    reaper: Reaper,
    tasks: Mutex<BTreeMap<String, Arc<Task>>>,
    /// Counts changes of `tasks`, so that a deferred shutdown sees whether anything happened meanwhile.
    changes: AtomicU64,
    done: watch::Sender<bool>,
}

impl Engine {
    /// An engine without tasks, for one containerd namespace.
    pub fn new(
        namespace: &str,
        config_file: &Path,
        sink: Arc<dyn EventSink>,
        backends: Backends,
        reaper: Reaper,
    ) -> Arc<Self> {
        Arc::new(Self {
            namespace: namespace.to_owned(),
            config_file: config_file.to_path_buf(),
            sink,
            backends,
            reaper,
            tasks: Mutex::default(),
            changes: AtomicU64::new(0),
            done: watch::Sender::new(false),
        })
    }

    fn tasks(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Task>>> {
        // The map is whole after a panic elsewhere: every change of it is a single call.
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The task `id`.
    ///
    /// # Errors
    /// `NotFound` in containerd's words.
    pub fn task(&self, id: &str) -> Result<Arc<Task>> {
        self.tasks()
            .get(id)
            .cloned()
            .ok_or_else(|| Error::not_found(format!("container not created: task {id}")))
    }

    /// Create: prepares the container up to the point where only the user's program is missing. Returns init's pid.
    ///
    /// When it fails, or a Kill overtakes it, everything is undone and the id is free again.
    ///
    /// # Errors
    /// `InvalidArgument` for a bad id, bundle, option or cgroup path; `AlreadyExists` for a duplicate id; `FailedPrecondition` when
    /// others live in the container's cgroup; `Unimplemented` for a backend that does not exist yet; `Aborted` when killed meanwhile;
    /// `Unavailable` once the shim shuts down; else what failed.
    pub async fn create(self: &Arc<Self>, request: CreateRequest) -> Result<u32> {
        check_id("task id", &request.id)?;
        if self.task(&request.id).is_ok() {
            return Err(Error::already_exists(format!("task {}", request.id)));
        }
        cgroup::expect_a_join();
        let bundle = Bundle::read(&request.bundle)?;
        let runtime = config::Any {
            type_url: &request.options.type_url,
            value: &request.options.value,
        };
        let container = config::Container {
            namespace: &self.namespace,
            id: &request.id,
            annotations: &bundle.config.annotations,
            cgroups_path: bundle.config.linux.cgroups_path.as_deref(),
        };
        let options = config::load(&self.config_file, runtime, container)?;
        let backend = (self.backends)(&options)?;
        check_cgroup(
            bundle.config.linux.cgroups_path.as_deref(),
            options.systemd_cgroup,
            &request.id,
        )?;
        let record = Record {
            id: request.id.clone(),
            namespace: self.namespace.clone(),
            bundle: request.bundle.clone(),
            sandbox: bundle.sandbox(&request.id),
            backend: backend.name().to_owned(),
            rootfs: (!request.rootfs.is_empty()).then(|| request.bundle.join("rootfs")),
            cgroups_path: bundle.config.linux.cgroups_path.clone(),
            shares_pid_namespace: bundle.shares_pid_namespace(),
            restore_from: (!request.checkpoint.is_empty()).then(|| PathBuf::from(&request.checkpoint)),
            options,
            cgroup: None,
            shim: command::identity(std::process::id()).ok(),
            init: None,
            exit: None,
        };
        let task = Arc::new(Task::new(
            record,
            backend,
            self.sink.clone(),
            self.reaper.clone(),
            request.stdio.clone(),
        ));
        {
            let mut tasks = self.tasks();
            // Under the lock, as in `shutdown`: of a Create and a Shutdown at once one sees the other.
            if *self.done.borrow() {
                return Err(Error::unavailable("this shim is shutting down; start another one"));
            }
            if tasks.contains_key(&request.id) {
                return Err(Error::already_exists(format!("task {}", request.id)));
            }
            tasks.insert(request.id.clone(), task.clone());
        }
        self.changes.fetch_add(1, Ordering::Relaxed);
        let created = task.create(&bundle, &request).await;
        if created.is_err() {
            self.forget(&request.id, &task);
        }
        created.map_err(|e| e.context(format!("cannot create task {}", request.id)))
    }

    /// Delete: removes an ended (or never started) process. For init the whole task goes; with it its execs.
    ///
    /// A second Delete while the first is at work waits for it and gets the same answer.
    ///
    /// # Errors
    /// `FailedPrecondition` while it runs; `NotFound`; else what could not be removed, and then it may be called again.
    pub async fn delete(&self, id: &str, exec_id: &str) -> Result<(u32, Exit)> {
        let task = self.task(id)?;
        if !exec_id.is_empty() {
            return task.delete_exec(exec_id).await;
        }
        let deleted = task.delete().await?;
        self.forget(id, &task);
        Ok(deleted)
    }

    fn forget(&self, id: &str, task: &Arc<Task>) {
        let mut tasks = self.tasks();
        if tasks.get(id).is_some_and(|known| Arc::ptr_eq(known, task)) {
            tasks.remove(id);
            self.changes.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Connect: init's pid, or 0 for a task that does not exist.
    pub fn connect(&self, id: &str) -> u32 {
        self.task(id).map(|task| task.init().pid()).unwrap_or_default()
    }

    /// Shutdown: ends the shim unless a task still lives. With only ended tasks left it ends after a while during which they may
    /// still be deleted.
    pub fn shutdown(self: &Arc<Self>) {
        let alive = |engine: &Self| engine.tasks().values().any(|task| task.init().exit().is_none());
        if self.end_if_empty() {
            return;
        }
        if alive(self) {
            return;
        }
        let engine = self.clone();
        let seen = self.changes.load(Ordering::Relaxed);
        tokio::spawn(async move {
            tokio::time::sleep(LINGER).await;
            if engine.changes.load(Ordering::Relaxed) == seen && !alive(&engine) {
                log::warn!("shutting down with ended tasks that nobody deleted; `delete` reports their exit status");
                engine.done.send_replace(true);
            }
        });
    }

    /// Whether nothing lives here: the moment when a termination signal may end the shim.
    pub fn is_idle(&self) -> bool {
        self.tasks().values().all(|task| task.init().exit().is_some())
    }

    /// Ends the shim if there is no task; whether that is so. Create fails from then on.
    pub fn end_if_empty(&self) -> bool {
        let tasks = self.tasks();
        if tasks.is_empty() {
            self.done.send_replace(true);
        }
        tasks.is_empty()
    }

    /// Waits until the shim may end: after [`Engine::shutdown`], or when it stays without any task for five minutes.
    pub async fn done(&self) {
        let mut done = self.done.subscribe();
        loop {
            let seen = self.changes.load(Ordering::Relaxed);
            match tokio::time::timeout(EMPTY, done.wait_for(|done| *done)).await {
                Ok(_) => return,
                Err(_) if self.changes.load(Ordering::Relaxed) == seen => {
                    if self.end_if_empty() {
                        log::warn!("no task for {EMPTY:?}; shutting down");
                    }
                }
                Err(_) => {}
            }
        }
    }
}

/// Refuses a cgroup in which somebody lives already: whoever undoes the container ends and removes everything in its cgroup, also
/// before the container's own processes were in it.
fn check_cgroup(cgroups_path: Option<&str>, systemd: bool, id: &str) -> Result<()> {
    match Cgroup::expected(cgroups_path, systemd, id)? {
        Some(cgroup) if cgroup.is_populated()? => Err(Error::precondition(format!(
            "cgroup {} of container {id} holds processes of somebody else; choose another cgroupsPath, or end them",
            cgroup.path().display()
        ))),
        _ => Ok(()),
    }
}

/// Ends what is left in the container's cgroup and removes it; a container without one is fine.
async fn remove_cgroup(record: &Record) -> Result<()> {
    let cgroup = match &record.cgroup {
        Some(cgroup) => Some(cgroup.clone()),
        None => Cgroup::expected(
            record.cgroups_path.as_deref(),
            record.options.systemd_cgroup,
            &record.id,
        )?,
    };
    match cgroup {
        Some(cgroup) => cgroup.remove(CGROUP_BOUND).await,
        None => Ok(()),
    }
}
