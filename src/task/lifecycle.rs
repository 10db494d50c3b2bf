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

use tokio::sync::{Notify, mpsc, oneshot};

use super::{
    CGROUP_BOUND, CreateRequest, State,
    bundle::Bundle,
    event::{Event, EventSink},
    process::{Intent, Phase, Process, next},
    record::Record,
    remove_cgroup,
    stdio::{self, Stdio},
};
use crate::{
    backend::{Backend, BoxFuture, CheckpointOptions, ChildIo, ExecSpec, Exit, Launched, Observed, check_id},
    error::{Error, Kind, Result},
    host::{
        cgroup::{Cgroup, Metrics, OomWatch},
        command::{self, Pidfd, Reaper},
    },
    rootfs,
};

/// Bound of waiting for a process that was sent SIGKILL.
const KILL_BOUND: Duration = Duration::from_secs(10);

/// Bound of freezing a cgroup; the freeze is taken back when it fires.
const FREEZE_BOUND: Duration = Duration::from_secs(10);

/// A container and its processes.
pub struct Task {
    record: Mutex<Arc<Record>>,
    backend: Arc<dyn Backend>,
    sink: Arc<dyn EventSink>,
    reaper: Reaper,
    init: Arc<Process>,
    execs: Mutex<BTreeMap<String, Exec>>,
    /// Set by a Kill during Create; Create then gives up and undoes.
    abort: Notify,
    /// Set as soon as init is reaped, before its exit is published: no exec is started from then on.
    init_ended: AtomicBool,
    /// Asks the supervisor of init to publish a pending OOM before an exec's exit is published.
    oom_checks: Mutex<Option<mpsc::UnboundedSender<oneshot::Sender<()>>>>,
}

#[derive(Clone)]
struct Exec {
    process: Arc<Process>,
    spec: Arc<ExecSpec>,
}

/// Whether somebody may ask again for what could not be removed.
#[derive(Debug, Clone, Copy)]
enum Chance {
    NotLast,
    Last,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
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

    fn publish(&self, event: Event, at: SystemTime) {
        self.sink.publish(event, at);
    }

    fn id(&self) -> String {
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

    fn cgroup(&self) -> Result<Cgroup> {
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
        let exit = self.adopt(launched)?;
        stdio.launched().await?;
        Ok(Some(exit))
    }

    /// Notes down who init is and where it lives.
    fn adopt(&self, launched: Launched) -> Result<BoxFuture<'static, Exit>> {
        let pid = launched.pid;
        self.init.launched(pid, launched.process);
        let cgroup = Cgroup::of_process(pid)
            .inspect_err(|e| log::warn!("container {} has no cgroup of its own: {e}", self.id()))
            .ok();
        let identity = command::identity(pid).ok();
        self.update_record(|record| {
            record.init = identity;
            record.cgroup = cgroup;
        })?;
        Ok(launched.exit)
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
        let started = self.backend.start(&self.record(), &mut io).await;
        let born = match started {
            Ok(Some(launched)) => self.adopt(launched).map(Some),
            Ok(None) => Ok(None),
            Err(e) => Err(e),
        };
        let born = match born {
            Ok(born) => born,
            Err(e) => {
                let error = e.context(format!("cannot start task {}", self.id()));
                self.start_failed(io).await;
                return Err(error);
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
        for signal in exec.process.launched(launched.pid, launched.process) {
            // A Kill that came before there was anything to signal.
            process.signal(signal).or_else(gone_is_fine)?;
        }
        if let Err(e) = stdio.launched().await {
            process.signal(libc::SIGKILL).or_else(gone_is_fine)?;
            launched.exit.await;
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
            if tokio::time::timeout(KILL_BOUND, ended).await.is_err() {
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

    // ---- signals ---------------------------------------------------------------------------------------------------------------

    /// Kill. Never waits for another operation: a Create that is at work is given up, an exec that is being born gets the signal
    /// at its birth.
    ///
    /// # Errors
    /// `NotFound` "process already finished" for what has ended, `NotFound` for an exec that was not started, `InvalidArgument`
    /// for a number that is no signal.
    pub async fn kill(&self, exec_id: &str, signal: u32, all: bool) -> Result<()> {
        let signal = check_signal(signal)?;
        let process = self.process(exec_id)?;
        let ending = matches!(signal, libc::SIGKILL | libc::SIGTERM | libc::SIGINT | libc::SIGQUIT);
        match process.phase() {
            Phase::Stopped | Phase::Deleting | Phase::Deleted => return Err(finished()),
            Phase::Creating if ending => {
                self.abort.notify_one();
                return Ok(());
            }
            Phase::Creating => {
                return Err(Error::precondition(
                    "container is being created; only a signal that ends it is taken",
                ));
            }
            Phase::Created if !exec_id.is_empty() => {
                return Err(Error::not_found(format!("process not created: exec {exec_id}")));
            }
            _ => {}
        }
        if all
            && exec_id.is_empty()
            && let Ok(cgroup) = self.cgroup()
        {
            return self.kill_cgroup(&cgroup, signal).await;
        }
        let Some(pidfd) = process.pidfd() else {
            return match process.exit() {
                Some(_) => Err(finished()),
                None => process.signal_at_birth(signal),
            };
        };
        self.signal_one(&process, &pidfd, signal).await
    }

    async fn signal_one(&self, process: &Process, pidfd: &Pidfd, signal: i32) -> Result<()> {
        pidfd.signal(signal)?;
        let is_init = Arc::as_ptr(&self.init) == std::ptr::from_ref(process);
        // A frozen v1 cgroup keeps even a killed process; v2 lets it go.
        if signal == libc::SIGKILL
            && is_init
            && let Ok(cgroup) = self.cgroup()
            && !cgroup.is_v2()
        {
            let paused = matches!(self.init.phase(), Phase::Paused | Phase::Pausing);
            // Others than us may freeze it, too.
            if paused || cgroup.is_frozen().unwrap_or(false) {
                cgroup.thaw(FREEZE_BOUND).await?;
            }
        }
        Ok(())
    }

    async fn kill_cgroup(&self, cgroup: &Cgroup, signal: i32) -> Result<()> {
        if signal == libc::SIGKILL {
            return cgroup.kill_all(CGROUP_BOUND).await;
        }
        match cgroup.signal_all(signal)? {
            0 => Err(finished()),
            _ => Ok(()),
        }
    }

    // ---- exec, and what a running task can be asked for -------------------------------------------------------------------------

    /// Exec: adds a process, which Start then runs.
    ///
    /// # Errors
    /// `InvalidArgument` for a bad id; `AlreadyExists`; `FailedPrecondition` when the task does not run.
    pub fn exec(&self, exec_id: &str, spec: ExecSpec, stdio: stdio::Config) -> Result<()> {
        check_id("exec id", exec_id)?;
        next(self.init.phase(), Intent::Exec)?;
        {
            let mut execs = lock(&self.execs);
            if execs.contains_key(exec_id) {
                return Err(Error::already_exists(format!("id {exec_id}")));
            }
            execs.insert(
                exec_id.to_owned(),
                Exec {
                    process: Arc::new(Process::new(stdio, Phase::Created)),
                    spec: Arc::new(spec),
                },
            );
        }
        self.publish(
            Event::ExecAdded {
                container_id: self.id(),
                exec_id: exec_id.to_owned(),
            },
            SystemTime::now(),
        );
        Ok(())
    }

    /// Pause: freezes the container's cgroup.
    ///
    /// # Errors
    /// `FailedPrecondition` when it does not run; `DeadlineExceeded` when it did not freeze, and then it runs on.
    pub async fn pause(&self) -> Result<()> {
        self.freeze(Intent::Pause, Phase::Running, Phase::Paused).await
    }

    /// Resume: thaws it.
    ///
    /// # Errors
    /// `FailedPrecondition` when it is not paused.
    pub async fn resume(&self) -> Result<()> {
        self.freeze(Intent::Resume, Phase::Paused, Phase::Running).await
    }

    async fn freeze(&self, intent: Intent, before: Phase, after: Phase) -> Result<()> {
        let cgroup = self.cgroup()?;
        self.init.claim(intent)?;
        let done = match intent {
            Intent::Pause => cgroup.freeze(FREEZE_BOUND).await,
            _ => cgroup.thaw(FREEZE_BOUND).await,
        };
        if let Err(e) = done {
            self.init.shift(Phase::Pausing, before);
            return Err(e);
        }
        let container_id = self.id();
        let event = match after {
            Phase::Paused => Event::Paused { container_id },
            _ => Event::Resumed { container_id },
        };
        self.publish(event, SystemTime::now());
        self.init.shift(Phase::Pausing, after);
        Ok(())
    }

    /// Update: applies OCI `linux.resources` (JSON).
    ///
    /// # Errors
    /// `FailedPrecondition` when it has ended; what the backend said otherwise.
    pub async fn update(&self, resources_json: &[u8]) -> Result<()> {
        next(self.init.phase(), Intent::Update)?;
        serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(resources_json)
            .map_err(|e| Error::invalid("resources are not an OCI linux.resources object").with_source(e))?;
        self.backend.update(&self.record(), resources_json).await
    }

    /// Checkpoint: writes the images of the running container.
    ///
    /// # Errors
    /// `FailedPrecondition` when it does not run; `Unimplemented` where the backend cannot.
    pub async fn checkpoint(&self, options: &CheckpointOptions) -> Result<()> {
        next(self.init.phase(), Intent::Checkpoint)?;
        self.backend.checkpoint(&self.record(), options).await?;
        self.publish(
            Event::Checkpointed {
                container_id: self.id(),
                checkpoint: options.image_path.display().to_string(),
            },
            SystemTime::now(),
        );
        Ok(())
    }

    /// Stats: the metrics of the container's cgroup.
    ///
    /// # Errors
    /// `NotFound` "cgroup does not exist".
    pub fn stats(&self) -> Result<Metrics> {
        self.cgroup()?.metrics()
    }

    /// Pids: every process of the container with the id of the exec that it is, if it is one. Never empty while init lives, and
    /// never waits: containerd reaps a shim whose answer is empty or late (#13848).
    pub fn pids(&self) -> Vec<(u32, Option<String>)> {
        let mut pids = self.cgroup().and_then(|cgroup| cgroup.pids()).unwrap_or_default();
        let init = self.init.pid();
        if pids.is_empty() && init != 0 && self.init.exit().is_none() {
            pids.push(init);
        }
        let execs: BTreeMap<u32, String> = lock(&self.execs)
            .iter()
            .filter(|(_, exec)| exec.process.exit().is_none())
            .map(|(id, exec)| (exec.process.pid(), id.clone()))
            .collect();
        pids.into_iter().map(|pid| (pid, execs.get(&pid).cloned())).collect()
    }

    /// State of init or of an exec.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn state(&self, exec_id: &str) -> Result<State> {
        let process = self.process(exec_id)?;
        Ok(State {
            bundle: self.record().bundle.clone(),
            pid: process.pid(),
            phase: process.phase(),
            stdio: process.config.clone(),
            exit: process.exit(),
        })
    }

    /// Wait: the exit of init or of an exec, at once if it has ended.
    ///
    /// # Errors
    /// `NotFound` when there is no such process, or when it was deleted before it ran.
    pub async fn wait(&self, exec_id: &str) -> Result<Exit> {
        let process = self.process(exec_id)?;
        process
            .wait()
            .await
            .ok_or_else(|| Error::not_found("process does not exist: deleted before it ran"))
    }

    /// ResizePty; without a terminal it does nothing.
    ///
    /// # Errors
    /// `NotFound`, or what the kernel said.
    pub fn resize_pty(&self, exec_id: &str, width: u32, height: u32) -> Result<()> {
        match self.process(exec_id)?.stdio() {
            Some(stdio) => stdio.resize(width, height),
            None => Ok(()),
        }
    }

    /// CloseIO of stdin.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn close_stdin(&self, exec_id: &str) -> Result<()> {
        if let Some(stdio) = self.process(exec_id)?.stdio() {
            stdio.close_stdin();
        }
        Ok(())
    }

    // ---- delete ----------------------------------------------------------------------------------------------------------------

    pub(super) async fn delete_exec(&self, exec_id: &str) -> Result<(u32, Exit)> {
        let process = self.process(exec_id)?;
        if !process.shift(Phase::Created, Phase::Deleting) {
            process.claim(Intent::Delete)?;
        }
        self.drain(&process).await;
        process.set(Phase::Deleted);
        lock(&self.execs).remove(exec_id);
        Ok((process.pid(), process.exit().unwrap_or(Exit::now(0))))
    }

    pub(super) async fn delete(&self) -> Result<(u32, Exit)> {
        match self.init.phase() {
            Phase::Creating => {
                self.abort.notify_one();
                self.init.until(|phase| *phase != Phase::Creating).await;
            }
            Phase::Deleting => self.init.until(|phase| *phase != Phase::Deleting).await,
            _ => {}
        }
        if self.init.phase() == Phase::Created {
            self.end_created().await?;
        }
        if self.init.phase() == Phase::Deleted {
            return Ok((self.init.pid(), self.init.exit().unwrap_or(Exit::now(137))));
        }
        self.init.claim(Intent::Delete)?;
        let exit = self.init.exit().unwrap_or(Exit::now(137));
        let execs = std::mem::take(&mut *lock(&self.execs));
        for exec in execs.into_values() {
            self.drain(&exec.process).await;
            exec.process.set(Phase::Deleted);
        }
        self.drain(&self.init).await;
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

    /// Lets the rest of the output reach its reader, within the bound, and closes everything.
    async fn drain(&self, process: &Process) {
        process.take_io();
        let Some(stdio) = process.take_stdio() else { return };
        let bound = Duration::from_millis(self.record().options.drain_timeout_ms);
        if !stdio.drain(bound).await {
            log::warn!(
                "output of {} (pid {}) was cut after {bound:?}",
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

fn finished() -> Error {
    Error::not_found("process already finished")
}

fn gone_is_fine(error: Error) -> Result<()> {
    match error.kind() {
        Kind::NotFound => Ok(()),
        _ => Err(error),
    }
}

fn check_signal(signal: u32) -> Result<i32> {
    match i32::try_from(signal) {
        Ok(signal) if (1..=64).contains(&signal) => Ok(signal),
        _ => Err(Error::invalid(format!("{signal} is not a signal number (1 to 64)"))),
    }
}
