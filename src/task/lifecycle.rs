//! One task: what happens to its container, in which order, and what is undone when it fails.
//!
//! Two rules keep the promised order of events (create < start < exit < delete, exec-added < exec-started < that exec's exit, every
//! exec's exit < init's, OOM < the exit it caused):
//!
//! - an event is published before the phase changes to what it tells, so whoever waits for the phase comes later in the queue;
//! - an exit is published only by the process's one supervisor, which waits until nobody claims the process any more.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use tokio::{
    sync::{Notify, mpsc, oneshot},
    time::Instant,
};

use super::{
    CGROUP_BOUND, CreateRequest,
    bundle::Bundle,
    event::{Event, EventSink},
    process::{Intent, Phase, Process, next},
    record::Record,
    remove_cgroup,
    stdio::{self, Stdio},
};
use crate::{
    backend::{Backend, BoxFuture, ChildIo, ExecSpec, Exit, Launched, Observed},
    error::{Error, Kind, Result},
    host::{
        cgroup::{Cgroup, OomWatch},
        command::{self, Reaper},
    },
    rootfs,
};

/// Bound of waiting for a process that was sent SIGKILL.
const KILL_BOUND: Duration = Duration::from_secs(10);

/// A container and its processes.
pub struct Task {
    pub(super) record: Mutex<Arc<Record>>,
    pub(super) backend: Arc<dyn Backend>,
    pub(super) sink: Arc<dyn EventSink>,
    pub(super) reaper: Reaper,
    pub(super) init: Arc<Process>,
    pub(super) execs: Mutex<BTreeMap<String, Exec>>,
    /// Set by a Kill during Create; Create then gives up and undoes.
    pub(super) abort: Notify,
    /// Rung by a SIGKILL during Pause; Pause then gives up and thaws.
    pub(super) pause_abort: Notify,
    /// Set as soon as init is reaped, before its exit is published: no exec is started from then on.
    pub(super) init_ended: AtomicBool,
    /// Asks the supervisor of init to publish a pending OOM before an exec's exit is published.
    pub(super) oom_checks: Mutex<Option<mpsc::UnboundedSender<oneshot::Sender<()>>>>,
}

/// An exec of a task, and what it is to run.
#[derive(Clone)]
pub(super) struct Exec {
    pub(super) process: Arc<Process>,
    pub(super) spec: Arc<ExecSpec>,
}

/// Whether somebody may ask again for what could not be removed.
#[derive(Debug, Clone, Copy)]
enum Chance {
    NotLast,
    Last,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each guarded value is replaced or changed by one call, so it is whole after a panic elsewhere.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Task {
    pub(super) fn new(
        record: Record,
        backend: Arc<dyn Backend>,
        sink: Arc<dyn EventSink>,
        reaper: Reaper,
        stdio: stdio::Config,
    ) -> Self {
        Self {
            record: Mutex::new(Arc::new(record)),
            backend,
            sink,
            reaper,
            init: Arc::new(Process::new(stdio, Phase::Creating)),
            execs: Mutex::default(),
            abort: Notify::new(),
            pause_abort: Notify::new(),
            init_ended: AtomicBool::new(false),
            oom_checks: Mutex::default(),
        }
    }

    /// The record as it is on disk.
    pub fn record(&self) -> Arc<Record> {
        lock(&self.record).clone()
    }

    /// Changes the record, on disk first.
    fn update_record(&self, change: impl FnOnce(&mut Record)) -> Result<()> {
        let mut current = lock(&self.record);
        let mut changed = (**current).clone();
        change(&mut changed);
        changed.save()?;
        *current = Arc::new(changed);
        Ok(())
    }

    pub(super) fn publish(&self, event: Event, at: SystemTime) {
        self.sink.publish(event, at);
    }

    pub(super) fn id(&self) -> String {
        self.record().id.clone()
    }

    /// The first process.
    pub fn init(&self) -> &Arc<Process> {
        &self.init
    }

    /// Init for an empty `exec_id`, else that exec.
    ///
    /// # Errors
    /// `NotFound` in containerd's words.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        self.exec_entry(exec_id).map(|exec| exec.process)
    }

    fn exec_entry(&self, exec_id: &str) -> Result<Exec> {
        lock(&self.execs)
            .get(exec_id)
            .cloned()
            .ok_or_else(|| Error::not_found(format!("process does not exist {exec_id}")))
    }

    pub(super) fn cgroup(&self) -> Result<Cgroup> {
        self.record()
            .cgroup
            .clone()
            .ok_or_else(|| Error::not_found(format!("cgroup does not exist: container {}", self.id())))
    }

    // ---- create ----------------------------------------------------------------------------------------------------------------

    pub(super) async fn create(self: &Arc<Self>, bundle: &Bundle, request: &CreateRequest) -> Result<u32> {
        let created = tokio::select! {
            biased;
            () = self.abort.notified() => Err(Error::aborted("killed while it was being created")),
            created = self.prepare(bundle, request) => created,
        };
        match created {
            Ok(launched) => {
                let pid = self.init.pid();
                let at = SystemTime::now();
                self.publish(
                    Event::Create {
                        container_id: request.id.clone(),
                        bundle: request.bundle.clone(),
                        rootfs: request.rootfs.clone(),
                        io: request.stdio.clone(),
                        checkpoint: request.checkpoint.clone(),
                        pid,
                    },
                    at,
                );
                self.init.set(Phase::Created);
                if let Some(exit) = launched {
                    self.supervise_init(exit);
                }
                Ok(pid)
            }
            Err(error) => {
                if let Err(undo) = self.remove_everything(Chance::Last).await {
                    log::error!("cannot undo the create of {}: {undo}", request.id);
                }
                self.init.set(Phase::Deleted);
                Err(error)
            }
        }
    }

    /// Record, rootfs, stdio, backend: each after what it needs to be undone is on disk.
    async fn prepare(&self, bundle: &Bundle, request: &CreateRequest) -> Result<Option<BoxFuture<'static, Exit>>> {
        self.record().save()?;
        if let Some(target) = &self.record().rootfs {
            rootfs::prepare(&self.reaper, &request.rootfs, target).await?;
        }
        let (stdio, io) = self.open_stdio(&self.init, "").await?;
        let mut io = Some(io);
        let launched = self.backend.create(&self.record(), bundle, &mut io).await?;
        let Some(launched) = launched else {
            self.init.keep_io(io);
            return Ok(None);
        };
        self.adopt(&launched)?;
        stdio.launched().await?;
        Ok(Some(launched.exit))
    }

    /// Notes down who init is and where it lives, and sends it the signals that came before its birth.
    fn adopt(&self, launched: &Launched) -> Result<()> {
        let pid = launched.pid;
        let early = self.init.launched(pid, launched.process.clone());
        let cgroup = launched
            .cgroup
            .clone()
            .map_or_else(|| Cgroup::of_process(pid), Ok)
            .inspect_err(|e| log::warn!("container {} has no cgroup of its own: {e}", self.id()))
            .ok();
        let identity = command::identity(pid).ok();
        self.update_record(|record| {
            record.init = identity;
            record.cgroup = cgroup;
        })?;
        for signal in early {
            let signal = self.backend.init_signal(&self.record(), signal);
            launched.process.signal(signal).or_else(gone_is_fine)?;
        }
        Ok(())
    }

    async fn open_stdio(&self, process: &Process, exec_id: &str) -> Result<(Arc<Stdio>, ChildIo)> {
        let record = self.record();
        let names = stdio::Names {
            namespace: &record.namespace,
            container: &record.id,
            exec: (!exec_id.is_empty()).then_some(exec_id),
        };
        let owner = (record.options.io_uid, record.options.io_gid);
        let (stdio, io) = stdio::open(&process.config, names, &record.bundle, owner, &self.reaper).await?;
        let stdio = Arc::new(stdio);
        process.set_stdio(stdio.clone());
        Ok((stdio, io))
    }

    // ---- start -----------------------------------------------------------------------------------------------------------------

    /// Start of init (empty `exec_id`) or of an exec. Returns the pid.
    ///
    /// # Errors
    /// `FailedPrecondition` in the wrong phase; what the backend said otherwise, and then the process is as before.
    pub async fn start(self: &Arc<Self>, exec_id: &str) -> Result<u32> {
        if exec_id.is_empty() {
            self.start_init().await
        } else {
            self.start_exec(exec_id).await
        }
    }

    async fn start_init(self: &Arc<Self>) -> Result<u32> {
        self.init.claim(Intent::Start)?;
        let mut io = self.init.take_io();
        if self.init.pid() == 0 && io.is_none() {
            self.init.shift(Phase::Starting, Phase::Created);
            return Err(Error::precondition(format!(
                "the stdio of task {} went with the start that failed; delete it and create it anew",
                self.id()
            )));
        }
        let started = self.backend.start(&self.record(), &mut io).await;
        let failed = |e: Error| e.context(format!("cannot start task {}", self.id()));
        let born = match started {
            Ok(None) => None,
            Ok(Some(launched)) => match self.adopt(&launched) {
                Ok(()) => Some(launched.exit),
                Err(e) => {
                    // It must not run on unrecorded. Its exit is told, so that Delete finds it ended.
                    if let Err(e) = launched.process.signal(libc::SIGKILL).or_else(gone_is_fine) {
                        log::error!("cannot end init of {}: {e}", self.id());
                    }
                    self.init.shift(Phase::Starting, Phase::Created);
                    self.supervise_init(launched.exit);
                    return Err(failed(e));
                }
            },
            Err(e) => {
                self.start_failed(io).await;
                return Err(failed(e));
            }
        };
        if born.is_some()
            && let Some(stdio) = self.init.stdio()
            && let Err(e) = stdio.launched().await
        {
            // It runs; a terminal that did not arrive must not end it unseen.
            log::error!("no terminal for task {}: {e}", self.id());
        }
        let pid = self.init.pid();
        self.publish(
            Event::Start {
                container_id: self.id(),
                pid,
            },
            SystemTime::now(),
        );
        self.init.shift(Phase::Starting, Phase::Running);
        if let Some(exit) = born {
            self.supervise_init(exit);
        }
        Ok(pid)
    }

    /// Finds out what a failed start has left: a container as before, or one whose program runs all the same.
    async fn start_failed(&self, io: Option<ChildIo>) {
        let alive = self.init.pidfd().is_some_and(|init| !init.has_exited());
        if alive && let Ok(Observed::Running { pid }) = self.backend.observe(&self.record()).await {
            self.publish(
                Event::Start {
                    container_id: self.id(),
                    pid,
                },
                SystemTime::now(),
            );
            self.init.shift(Phase::Starting, Phase::Running);
            return;
        }
        self.init.keep_io(io);
        self.init.shift(Phase::Starting, Phase::Created);
    }

    async fn start_exec(self: &Arc<Self>, exec_id: &str) -> Result<u32> {
        let exec = self.exec_entry(exec_id)?;
        if self.init_ended.load(Ordering::Acquire) {
            return Err(Error::precondition(format!(
                "container {} init process is not running",
                self.id()
            )));
        }
        next(self.init.phase(), Intent::Exec)?;
        exec.process.claim(Intent::Start)?;
        match self.launch_exec(exec_id, &exec).await {
            Ok(exit) => {
                let pid = exec.process.pid();
                self.publish(
                    Event::ExecStarted {
                        container_id: self.id(),
                        exec_id: exec_id.to_owned(),
                        pid,
                    },
                    SystemTime::now(),
                );
                exec.process.shift(Phase::Starting, Phase::Running);
                self.supervise_exec(exec_id, exec.process, exit);
                Ok(pid)
            }
            Err(e) => {
                exec.process.take_stdio();
                exec.process.shift(Phase::Starting, Phase::Created);
                Err(e.context(format!("cannot start exec {exec_id} of task {}", self.id())))
            }
        }
    }

    async fn launch_exec(&self, exec_id: &str, exec: &Exec) -> Result<BoxFuture<'static, Exit>> {
        let (stdio, io) = self.open_stdio(&exec.process, exec_id).await?;
        let launched = self.backend.exec(&self.record(), exec_id, &exec.spec, io).await?;
        let process = launched.process.clone();
        let early = exec.process.launched(launched.pid, launched.process);
        let ready = async {
            for signal in early {
                // A Kill that came before there was anything to signal.
                process.signal(signal).or_else(gone_is_fine)?;
            }
            stdio.launched().await?;
            match self.init.exit() {
                None => Ok(()),
                // Its supervisor did not wait any longer. No event of an exec may follow.
                Some(_) => Err(Error::precondition("init has ended meanwhile")),
            }
        };
        if let Err(e) = ready.await {
            process.signal(libc::SIGKILL).or_else(gone_is_fine)?;
            if tokio::time::timeout(KILL_BOUND, launched.exit).await.is_err() {
                log::error!("an exec that was given up (pid {}) still runs", process.pid);
            }
            return Err(e);
        }
        Ok(launched.exit)
    }

    // ---- exits -----------------------------------------------------------------------------------------------------------------

    fn supervise_init(self: &Arc<Self>, exit: BoxFuture<'static, Exit>) {
        let task = self.clone();
        let (checks, requests) = mpsc::unbounded_channel();
        *lock(&self.oom_checks) = Some(checks);
        let oom = self.cgroup().and_then(|cgroup| cgroup.watch_oom());
        let oom = oom
            .inspect_err(|e| log::warn!("no OOM events for {}: {e}", self.id()))
            .ok();
        tokio::spawn(async move { task.init_supervisor(exit, oom, requests).await });
    }

    async fn init_supervisor(
        &self,
        mut exit: BoxFuture<'static, Exit>,
        mut oom: Option<OomWatch>,
        mut checks: mpsc::UnboundedReceiver<oneshot::Sender<()>>,
    ) {
        let exit = loop {
            tokio::select! {
                biased;
                exit = &mut exit => break exit,
                Some(done) = checks.recv() => {
                    self.publish_pending_oom(&mut oom);
                    // The asker may have gone; nothing depends on the answer then.
                    let _ = done.send(());
                }
                killed = next_oom(&mut oom) => match killed {
                    true => self.publish_oom(),
                    false => oom = None,
                },
            }
        };
        self.init_ended.store(true, Ordering::Release);
        if let Err(e) = self.update_record(|record| record.exit = Some(exit)) {
            log::error!("cannot record the exit of {}: {e}", self.id());
        }
        *lock(&self.oom_checks) = None;
        self.publish_pending_oom(&mut oom);
        drop(checks);
        self.end_execs().await;
        self.publish_pending_oom(&mut oom);
        self.init
            .until(|phase| !matches!(phase, Phase::Creating | Phase::Starting | Phase::Pausing))
            .await;
        let id = self.id();
        self.publish(
            Event::Exit {
                container_id: id.clone(),
                id,
                pid: self.init.pid(),
                exit,
            },
            exit.at,
        );
        self.init.ended(exit);
        self.backend.exited(&self.record()).await;
    }

    fn publish_pending_oom(&self, oom: &mut Option<OomWatch>) {
        if oom.as_mut().is_some_and(OomWatch::check) {
            self.publish_oom();
        }
    }

    fn publish_oom(&self) {
        self.publish(
            Event::Oom {
                container_id: self.id(),
            },
            SystemTime::now(),
        );
    }

    /// Sees to it that every exec of a dead init has ended and was reported.
    async fn end_execs(&self) {
        if self.record().shares_pid_namespace
            && let Ok(cgroup) = self.cgroup()
            && let Err(e) = cgroup.kill_all(CGROUP_BOUND).await
        {
            log::error!("processes of {} outlive its init: {e}", self.id());
        }
        let execs: Vec<Exec> = lock(&self.execs).values().cloned().collect();
        // One for all of them, so that the exit of init does not wait longer the more execs hang.
        let deadline = Instant::now() + KILL_BOUND;
        for exec in execs {
            let ended = async {
                exec.process.until(|phase| *phase != Phase::Starting).await;
                if exec.process.phase() == Phase::Running {
                    if let Some(pidfd) = exec.process.pidfd() {
                        // In a private pid namespace the kernel has done it already.
                        let _ = pidfd.signal(libc::SIGKILL);
                    }
                    exec.process.wait().await;
                }
            };
            if tokio::time::timeout_at(deadline, ended).await.is_err() {
                log::error!(
                    "an exec of {} (pid {}) outlives its init",
                    self.id(),
                    exec.process.pid()
                );
            }
        }
    }

    fn supervise_exec(self: &Arc<Self>, exec_id: &str, process: Arc<Process>, exit: BoxFuture<'static, Exit>) {
        let task = self.clone();
        let id = exec_id.to_owned();
        tokio::spawn(async move {
            let exit = exit.await;
            if exit.status == 128 + libc::SIGKILL as u32 {
                task.oom_before_exit().await;
            }
            task.publish(
                Event::Exit {
                    container_id: task.id(),
                    id,
                    pid: process.pid(),
                    exit,
                },
                exit.at,
            );
            process.ended(exit);
        });
    }

    /// Lets init's supervisor publish an OOM that the kernel has counted already.
    async fn oom_before_exit(&self) {
        let checks = lock(&self.oom_checks).clone();
        if let Some(checks) = checks {
            let (done, answer) = oneshot::channel();
            if checks.send(done).is_ok() {
                // An error means that init ended meanwhile; its supervisor checks by itself.
                let _ = answer.await;
            }
        }
    }

    // ---- delete ----------------------------------------------------------------------------------------------------------------

    pub(super) async fn delete_exec(&self, exec_id: &str) -> Result<(u32, Exit)> {
        let process = self.process(exec_id)?;
        process.until(|phase| *phase != Phase::Deleting).await;
        if process.phase() != Phase::Deleted {
            if !process.shift(Phase::Created, Phase::Deleting) {
                process.claim(Intent::Delete)?;
            }
            self.drain(&process, self.drain_deadline()).await;
            process.set(Phase::Deleted);
            lock(&self.execs).remove(exec_id);
        }
        Ok((process.pid(), process.exit().unwrap_or(Exit::now(0))))
    }

    pub(super) async fn delete(&self) -> Result<(u32, Exit)> {
        // Each wait leaves the phase that it began in, for whatever another call has made of it meanwhile.
        loop {
            match self.init.phase() {
                Phase::Creating => {
                    self.abort.notify_one();
                    self.init.until(|phase| *phase != Phase::Creating).await;
                }
                Phase::Created => self.end_created().await?,
                Phase::Deleting => self.init.until(|phase| *phase != Phase::Deleting).await,
                Phase::Deleted => return Ok((self.init.pid(), self.init.exit().unwrap_or(Exit::now(137)))),
                _ => break,
            }
        }
        self.init.claim(Intent::Delete)?;
        let exit = self.init.exit().unwrap_or(Exit::now(137));
        let execs = std::mem::take(&mut *lock(&self.execs));
        // One for all execs, so that Delete does not take longer the more of them there are.
        let deadline = self.drain_deadline();
        for exec in execs.into_values() {
            self.drain(&exec.process, deadline).await;
            exec.process.set(Phase::Deleted);
        }
        self.drain(&self.init, self.drain_deadline()).await;
        if let Err(e) = self.remove_everything(Chance::NotLast).await {
            self.init.set(Phase::Stopped);
            return Err(e.context(format!("cannot delete task {}", self.id())));
        }
        self.publish(
            Event::Delete {
                container_id: self.id(),
                id: String::new(),
                pid: self.init.pid(),
                exit,
            },
            SystemTime::now(),
        );
        self.init.set(Phase::Deleted);
        Ok((self.init.pid(), exit))
    }

    /// Ends a container whose program never ran.
    async fn end_created(&self) -> Result<()> {
        match self.init.pidfd() {
            Some(pidfd) => {
                self.signal_one(&self.init, &pidfd, libc::SIGKILL)
                    .await
                    .or_else(gone_is_fine)?;
                self.init.wait_bounded(KILL_BOUND, "init of a created container").await
            }
            // Not born yet (a backend that gives birth in Start): nothing to end.
            None if self.init.shift(Phase::Created, Phase::Stopped) => Ok(()),
            None => Ok(()),
        }
    }

    fn drain_deadline(&self) -> Instant {
        Instant::now() + Duration::from_millis(self.record().options.drain_timeout_ms)
    }

    /// Lets the rest of the output reach its reader, until the deadline, and closes everything.
    async fn drain(&self, process: &Process, deadline: Instant) {
        process.take_io();
        let Some(stdio) = process.take_stdio() else { return };
        if !stdio.drain(deadline.saturating_duration_since(Instant::now())).await {
            log::warn!(
                "output of {} (pid {}) was cut; drain_timeout_ms bounds how long it is waited for",
                self.id(),
                process.pid()
            );
        }
    }

    /// Undoes what Create did, in the reverse order; goes on past errors.
    async fn remove_everything(&self, chance: Chance) -> Result<()> {
        self.init.take_io();
        self.init.take_stdio();
        let record = self.record();
        let mut errors = Vec::new();
        let deleted = match (self.backend.delete(&record).await, chance) {
            (Err(e), Chance::Last) => self.backend.erase(&record, e).await,
            (deleted, _) => deleted,
        };
        errors.extend(deleted.err());
        if let (Some(pidfd), None) = (self.init.pidfd(), self.init.exit()) {
            // The create failed after init was born; the backend knows it or not, it must go.
            errors.extend(pidfd.signal(libc::SIGKILL).or_else(gone_is_fine).err());
        }
        errors.extend(remove_cgroup(&record).await.err());
        if let Some(target) = &record.rootfs {
            errors.extend(rootfs::release(target).await.err());
        }
        match Error::all(errors) {
            Some(error) => Err(error),
            None => record.remove(),
        }
    }
}

/// Pends for ever where nothing is watched.
async fn next_oom(oom: &mut Option<OomWatch>) -> bool {
    match oom {
        Some(watch) => watch.next().await.unwrap_or_else(|e| {
            log::warn!("OOM events end: {e}");
            false
        }),
        None => std::future::pending().await,
    }
}

pub(super) fn gone_is_fine(error: Error) -> Result<()> {
    match error.kind() {
        Kind::NotFound => Ok(()),
        _ => Err(error),
    }
}
