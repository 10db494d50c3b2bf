//! The shim's side of a monitor: what it has said, and how init has ended.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use tokio::sync::{Notify, watch};

use super::{
    KILL_TIMEOUT,
    wire::{self, Connection, Continue, FromMonitor, Packet},
};
use crate::{
    backend::{BoxFuture, Exit},
    error::{Error, Result},
    host::command::{Child, Pidfd},
};

/// The shim's side of a monitor.
pub(super) struct Monitor {
    pub(super) told: watch::Sender<Told>,
    /// Init, once it is known: the child whose exit is held until [`Backend::exited`].
    pub(super) init: OnceLock<u32>,
    /// Lets LXC clean up after init's exit.
    pub(super) release: Notify,
    pub(super) process: Arc<Pidfd>,
    /// The console of a whole system, open until init has ended: who reads the other end would take a moment in which nobody inside has
    /// it open for its end.
    pub(super) console: Mutex<Option<OwnedFd>>,
}

/// What the monitor has said.
#[derive(Debug, Clone, Default)]
pub(super) struct Told {
    pub(super) exit: Option<Exit>,
    pub(super) failed: Option<wire::Failure>,
    /// It has ended.
    pub(super) gone: bool,
}

impl Monitor {
    /// Holds a console instead of the former one.
    pub(super) fn hold(&self, console: Option<OwnedFd>) {
        *self.console.lock().unwrap_or_else(PoisonError::into_inner) = console;
    }

    /// Resolves when there will be no init: LXC has failed, or has ended.
    pub(super) async fn fails(&self) -> Error {
        let mut told = self.told.subscribe();
        let failed = told.wait_for(|told| told.failed.is_some() || told.gone).await;
        match failed.ok().and_then(|told| told.failed.clone()) {
            Some(failure) => failure.into(),
            None => Error::unknown("LXC ended before init was born"),
        }
    }

    /// Resolves when the container that is being prepared has ended.
    pub(super) async fn ends(&self) -> Error {
        let mut told = self.told.subscribe();
        let told = told.wait_for(|told| told.exit.is_some() || told.gone).await;
        match told.ok().and_then(|told| told.exit) {
            Some(exit) => Error::unknown(format!("init ended with status {} while it was prepared", exit.status)),
            None => Error::unknown("the monitor ended while init was prepared"),
        }
    }
}

/// Init's next word, or why there will be none.
pub(super) async fn heard(init: &Connection, monitor: &Monitor) -> Result<Packet> {
    match init.receive().await? {
        Some(packet) => Ok(packet),
        None => Err(tokio::time::timeout(KILL_TIMEOUT, monitor.ends())
            .await
            .unwrap_or_else(|_| Error::unknown("init ended while it was prepared"))),
    }
}

/// Listens to a monitor until it has ended, and reaps it.
pub(super) async fn attend(monitor: Arc<Monitor>, mut child: Child, connection: Connection) {
    loop {
        match connection
            .receive()
            .await
            .map(|packet| packet.map(|packet| packet.read()))
        {
            Ok(Some(Ok(FromMonitor::Reaped { pid, status }))) => {
                if monitor.init.get() == Some(&pid) {
                    monitor.hold(None);
                    monitor.told.send_modify(|told| told.exit = Some(Exit::now(status)));
                    // Until then the cgroup stays.
                    tokio::select! {
                        () = monitor.release.notified() => {}
                        _ = child.wait() => {}
                    }
                }
                // It may have been killed meanwhile.
                let _ = connection.send(&Continue, &[]).await;
            }
            Ok(Some(Ok(FromMonitor::Failed(failure)))) => {
                monitor.told.send_modify(|told| told.failed = Some(failure));
            }
            Ok(Some(Err(e))) | Err(e) => {
                log::error!("cannot understand the monitor (pid {}): {e}", child.pid());
                child.kill();
                break;
            }
            Ok(None) => break,
        }
    }
    let _ = child.wait().await;
    monitor.hold(None);
    monitor.told.send_modify(|told| told.gone = true);
}

/// Init's exit: as the monitor tells it. When the monitor was killed, init is a child of ours; one that stands still is killed for that.
pub(super) fn exit_of(
    monitor: Arc<Monitor>,
    process: Arc<Pidfd>,
    adopted: BoxFuture<'static, Exit>,
) -> BoxFuture<'static, Exit> {
    Box::pin(async move {
        let known = async {
            let mut told = monitor.told.subscribe();
            let told = told.wait_for(|told| told.exit.is_some() || told.gone).await;
            told.ok().and_then(|told| told.exit)
        };
        let silent = async {
            if process.wait_exited().await.is_err() {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(KILL_TIMEOUT).await;
            log::warn!(
                "the monitor of init {} does not tell its end; it is killed",
                process.pid
            );
            let _ = monitor.process.signal(libc::SIGKILL);
            std::future::pending().await
        };
        let exit = tokio::select! {
            exit = known => exit,
            exit = silent => exit,
        };
        match exit {
            Some(exit) => exit,
            None => adopted.await,
        }
    })
}
