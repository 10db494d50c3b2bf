//! One process of a task: its phase, its exit, its stdio. Init and execs walk the same table.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::watch;

use super::stdio::{Config, Stdio};
use crate::{
    backend::{ChildIo, Exit},
    error::{Error, Kind, Result},
    host::command::Pidfd,
};

/// Where a process is in its life. [`Phase::Creating`], [`Phase::Starting`], [`Phase::Pausing`] and [`Phase::Deleting`] are
/// claims: whoever set one moves on or takes it back, so that no lock is held while the work is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Being prepared; nothing to signal yet.
    Creating,
    /// Prepared; the user's program does not run.
    Created,
    /// Start is at work.
    Starting,
    /// The user's program runs.
    Running,
    /// Pause or Resume is at work.
    Pausing,
    /// Frozen.
    Paused,
    /// Ended and reaped.
    Stopped,
    /// Delete is at work.
    Deleting,
    /// Gone; only whoever still holds a reference sees it.
    Deleted,
}

/// What a client asks of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Intent {
    /// Start RPC.
    Start,
    /// Pause RPC.
    Pause,
    /// Resume RPC.
    Resume,
    /// Delete RPC.
    Delete,
    /// Exec RPC, asked of init.
    Exec,
    /// Update RPC, asked of init.
    Update,
    /// Checkpoint RPC, asked of init.
    Checkpoint,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Phase::Creating => "creating",
            Phase::Created => "created",
            Phase::Starting => "starting",
            Phase::Running => "running",
            Phase::Pausing => "pausing",
            Phase::Paused => "paused",
            Phase::Stopped => "stopped",
            Phase::Deleting => "deleting",
            Phase::Deleted => "deleted",
        })
    }
}

/// The whole truth about what may follow what: the phase that the intent leads to (a claim, or the same phase where nothing has to
/// be claimed).
///
/// # Errors
/// `FailedPrecondition` in the words that containerd's runc shim uses, because clients match them; `NotFound` once deleted.
pub fn next(phase: Phase, intent: Intent) -> Result<Phase> {
    use Intent as I;
    use Phase as P;
    let refused = |text: String| Err(Error::precondition(text));
    match (phase, intent) {
        (P::Deleted | P::Deleting, _) if intent != I::Delete => Err(Error::not_found(format!(
            "cannot {} a deleted process: process does not exist",
            verb(intent)
        ))),
        (P::Deleted, I::Delete) => Err(Error::not_found("process does not exist")),
        (P::Created, I::Start) => Ok(P::Starting),
        (P::Running, I::Pause) => Ok(P::Pausing),
        (P::Paused, I::Resume) => Ok(P::Pausing),
        (P::Stopped, I::Delete) => Ok(P::Deleting),
        (P::Created | P::Running | P::Starting, I::Exec) => Ok(phase),
        (P::Created | P::Running | P::Paused | P::Starting, I::Update) => Ok(phase),
        (P::Running | P::Paused, I::Checkpoint) => Ok(phase),
        (P::Running | P::Starting | P::Pausing | P::Paused, I::Delete) => {
            refused("cannot delete a running process".into())
        }
        (_, I::Pause | I::Resume | I::Checkpoint) => refused(format!("cannot {} task in {phase} state", verb(intent))),
        (_, I::Exec | I::Update) => refused(format!("cannot {} in a {phase} state", verb(intent))),
        (_, I::Start | I::Delete) => refused(format!("cannot {} a {phase} process", verb(intent))),
    }
}

fn verb(intent: Intent) -> &'static str {
    match intent {
        Intent::Start => "start",
        Intent::Pause => "pause",
        Intent::Resume => "resume",
        Intent::Delete => "delete",
        Intent::Exec => "exec",
        Intent::Update => "update",
        Intent::Checkpoint => "checkpoint",
    }
}

/// A process of a task. Cheap to share; every method is short and none awaits with a lock held.
pub struct Process {
    /// Where its stdio goes, as asked for.
    pub config: Config,
    phase: watch::Sender<Phase>,
    exit: watch::Sender<Option<Exit>>,
    live: Mutex<Live>,
}

#[derive(Default)]
struct Live {
    pid: u32,
    pidfd: Option<Arc<Pidfd>>,
    stdio: Option<Arc<Stdio>>,
    /// Kept from Create to Start where the backend gives birth in Start.
    io: Option<ChildIo>,
    /// Signals that came before there was a process.
    at_birth: Vec<i32>,
    /// CloseIO came; it may come before there is any stdio.
    stdin_closed: bool,
}

impl Process {
    /// A process in `phase` without a pid.
    pub fn new(config: Config, phase: Phase) -> Self {
        Self {
            config,
            phase: watch::Sender::new(phase),
            exit: watch::Sender::new(None),
            live: Mutex::default(),
        }
    }

    fn live(&self) -> MutexGuard<'_, Live> {
        // A panic elsewhere leaves these plain fields whole.
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The phase now.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Moves to `phase`, whatever it was.
    pub fn set(&self, phase: Phase) {
        self.phase.send_replace(phase);
    }

    /// Claims what `intent` leads to and returns the phase before it, to take back when the work fails.
    ///
    /// # Errors
    /// Those of [`next`].
    pub fn claim(&self, intent: Intent) -> Result<Phase> {
        let mut outcome = Err(Error::unknown("phase not read"));
        self.phase.send_if_modified(|phase| {
            outcome = next(*phase, intent).map(|to| std::mem::replace(phase, to));
            outcome.is_ok()
        });
        outcome
    }

    /// Moves from `from` to `to`; false when it is not in `from` any more.
    pub fn shift(&self, from: Phase, to: Phase) -> bool {
        self.phase.send_if_modified(|phase| {
            let matches = *phase == from;
            if matches {
                *phase = to;
            }
            matches
        })
    }

    /// Waits until the phase satisfies `condition`.
    pub async fn until(&self, condition: impl FnMut(&Phase) -> bool) {
        // The sender lives in self, so the channel cannot close.
        let _ = self.phase.subscribe().wait_for(condition).await;
    }

    /// The pid on the host; 0 before there is one.
    pub fn pid(&self) -> u32 {
        self.live().pid
    }

    /// The process itself, for signals.
    pub fn pidfd(&self) -> Option<Arc<Pidfd>> {
        self.live().pidfd.clone()
    }

    /// Remembers what was launched; returns the signals that came before its birth, for the caller to send.
    #[must_use = "signals that nobody sends are lost"]
    pub fn launched(&self, pid: u32, pidfd: Arc<Pidfd>) -> Vec<i32> {
        let mut live = self.live();
        live.pid = pid;
        live.pidfd = Some(pidfd);
        std::mem::take(&mut live.at_birth)
    }

    /// Remembers a signal for a process that is being born.
    ///
    /// # Errors
    /// `ResourceExhausted` when nobody was born in spite of many signals; or what the kernel says if it was born meanwhile.
    pub fn signal_at_birth(&self, signal: i32) -> Result<()> {
        let mut live = self.live();
        if let Some(pidfd) = &live.pidfd {
            return pidfd.signal(signal);
        }
        if live.at_birth.len() >= 64 {
            return Err(Error::new(
                Kind::ResourceExhausted,
                "too many signals for a process that is still being started",
            ));
        }
        live.at_birth.push(signal);
        Ok(())
    }

    /// Its stdio, once opened.
    pub fn stdio(&self) -> Option<Arc<Stdio>> {
        self.live().stdio.clone()
    }

    /// Remembers its stdio, and closes its stdin if that was asked for before.
    pub fn set_stdio(&self, stdio: Arc<Stdio>) {
        let mut live = self.live();
        if live.stdin_closed {
            stdio.close_stdin();
        }
        live.stdio = Some(stdio);
    }

    /// Lets stdin end, now or as soon as there is one: the client of an exec may see the end of its own input before Start.
    pub fn close_stdin(&self) {
        let mut live = self.live();
        live.stdin_closed = true;
        if let Some(stdio) = &live.stdio {
            stdio.close_stdin();
        }
    }

    /// Takes its stdio away; what is not shared is closed with it.
    pub fn take_stdio(&self) -> Option<Arc<Stdio>> {
        self.live().stdio.take()
    }

    /// Keeps the child's ends from Create to Start.
    pub fn keep_io(&self, io: Option<ChildIo>) {
        self.live().io = io;
    }

    /// The child's ends that were kept.
    pub fn take_io(&self) -> Option<ChildIo> {
        self.live().io.take()
    }

    /// How it ended, once it has.
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Tells everyone that it has ended: pid, then phase, then waiters. The exit event MUST have been published before.
    pub fn ended(&self, exit: Exit) {
        self.live().pidfd = None;
        self.set(Phase::Stopped);
        self.exit.send_replace(Some(exit));
    }

    /// Waits for the end. `None` when it will never come because the process was deleted before it ran.
    pub async fn wait(&self) -> Option<Exit> {
        let mut exit = self.exit.subscribe();
        tokio::select! {
            biased;
            ended = exit.wait_for(Option::is_some) => ended.ok().and_then(|value| *value),
            () = self.until(|phase| *phase == Phase::Deleted) => self.exit(),
        }
    }

    /// [`Process::wait`] with a bound; the error names what did not end.
    ///
    /// # Errors
    /// `DeadlineExceeded`.
    pub async fn wait_bounded(&self, bound: Duration, what: &str) -> Result<()> {
        match tokio::time::timeout(bound, self.wait()).await {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::new(
                Kind::DeadlineExceeded,
                format!("{what} (pid {}) has not ended within {bound:?}", self.pid()),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PHASES: [Phase; 9] = [
        Phase::Creating,
        Phase::Created,
        Phase::Starting,
        Phase::Running,
        Phase::Pausing,
        Phase::Paused,
        Phase::Stopped,
        Phase::Deleting,
        Phase::Deleted,
    ];

    fn allowed(intent: Intent) -> Vec<Phase> {
        PHASES
            .into_iter()
            .filter(|phase| next(*phase, intent).is_ok())
            .collect()
    }

    #[test]
    fn the_table_allows_what_the_task_api_allows() {
        use Phase::*;
        assert_eq!(allowed(Intent::Start), [Created]);
        assert_eq!(allowed(Intent::Pause), [Running]);
        assert_eq!(allowed(Intent::Resume), [Paused]);
        assert_eq!(allowed(Intent::Delete), [Stopped]);
        assert_eq!(allowed(Intent::Exec), [Created, Starting, Running]);
        assert_eq!(allowed(Intent::Update), [Created, Starting, Running, Paused]);
        assert_eq!(allowed(Intent::Checkpoint), [Running, Paused]);
    }

    #[test]
    fn refusals_use_the_words_that_clients_match() {
        let text = |phase, intent| next(phase, intent).unwrap_err().to_string();
        assert_eq!(text(Phase::Running, Intent::Delete), "cannot delete a running process");
        assert_eq!(text(Phase::Paused, Intent::Exec), "cannot exec in a paused state");
        assert_eq!(text(Phase::Stopped, Intent::Exec), "cannot exec in a stopped state");
        assert_eq!(text(Phase::Running, Intent::Start), "cannot start a running process");
        assert_eq!(text(Phase::Stopped, Intent::Start), "cannot start a stopped process");
        assert_eq!(
            text(Phase::Created, Intent::Pause),
            "cannot pause task in created state"
        );
        assert_eq!(
            next(Phase::Stopped, Intent::Start).unwrap_err().kind(),
            Kind::FailedPrecondition
        );
        assert_eq!(next(Phase::Deleted, Intent::Start).unwrap_err().kind(), Kind::NotFound);
    }

    #[test]
    fn of_two_claims_one_wins_and_can_be_taken_back() {
        let process = Process::new(Config::default(), Phase::Created);
        assert_eq!(process.claim(Intent::Start).unwrap(), Phase::Created);
        assert!(process.claim(Intent::Start).is_err());
        assert!(process.shift(Phase::Starting, Phase::Created));
        assert!(process.claim(Intent::Start).is_ok());
        assert!(!process.shift(Phase::Created, Phase::Running));
    }

    #[tokio::test]
    async fn a_wait_ends_with_the_exit_or_with_the_deletion_of_what_never_ran() {
        let process = Process::new(Config::default(), Phase::Running);
        let exit = Exit::now(7);
        process.ended(exit);
        assert_eq!(process.wait().await, Some(exit));
        let never = Process::new(Config::default(), Phase::Created);
        never.set(Phase::Deleted);
        assert_eq!(never.wait().await, None);
    }
}
