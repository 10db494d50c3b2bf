//! What a created task can be asked for, from Kill to CloseIO. None of these calls waits for another one.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use super::{
    CGROUP_BOUND, State, Task,
    event::Event,
    lifecycle::{Exec, lock},
    process::{Intent, Phase, Process, next},
    stdio,
};
use crate::{
    backend::{CheckpointOptions, ExecSpec, Exit, check_id},
    error::{Error, Result},
    host::{
        cgroup::{Cgroup, Metrics},
        command::Pidfd,
    },
};

/// Bound of freezing a cgroup; the freeze is taken back when it fires.
const FREEZE_BOUND: Duration = Duration::from_secs(10);

impl Task {
    /// Kill. Never waits for another operation: a Create that is at work is given up, an exec that is being born gets the signal
    /// at its birth. A signal to init is the backend's to translate ([`crate::backend::Backend::init_signal`]).
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
            Phase::Pausing if signal == libc::SIGKILL && (all || exec_id.is_empty()) => self.pause_abort.notify_one(),
            _ => {}
        }
        let wanted = match exec_id {
            "" => self.backend.init_signal(&self.record(), signal),
            _ => signal,
        };
        // An init that is asked to end in its own way ends all others, in its order.
        if all
            && exec_id.is_empty()
            && wanted == signal
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
        self.signal_one(&process, &pidfd, wanted).await
    }

    pub(super) async fn signal_one(&self, process: &Process, pidfd: &Pidfd, signal: i32) -> Result<()> {
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
            Intent::Pause => tokio::select! {
                biased;
                // Given up, the freeze thaws by itself; on v1 what is frozen does not die.
                () = self.pause_abort.notified() => Err(Error::aborted("killed while it was being paused")),
                frozen = cgroup.freeze(FREEZE_BOUND) => frozen,
            },
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
        // crun takes what it does not understand for "not mentioned".
        serde_json::from_slice::<oci_spec::runtime::LinuxResources>(resources_json)
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

    /// Pids: every process of the container with the id of the exec that it is, if it is one. Never waits, and names init until
    /// Delete: a restarted containerd takes a shim whose answer is late (#13848) or empty for a leak, and with it would go the exit
    /// status of a container that ended meanwhile.
    pub fn pids(&self) -> Vec<(u32, Option<String>)> {
        let mut pids = self.cgroup().and_then(|cgroup| cgroup.pids()).unwrap_or_default();
        let init = self.init.pid();
        if pids.is_empty() && init != 0 {
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

    /// CloseIO of stdin, at any time: it is remembered for an exec that was not started yet.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn close_stdin(&self, exec_id: &str) -> Result<()> {
        self.process(exec_id)?.close_stdin();
        Ok(())
    }
}

fn finished() -> Error {
    Error::not_found("process already finished")
}

fn check_signal(signal: u32) -> Result<i32> {
    match i32::try_from(signal) {
        Ok(signal) if (1..=64).contains(&signal) => Ok(signal),
        _ => Err(Error::invalid(format!("{signal} is not a signal number (1 to 64)"))),
    }
}
