//! containerd's side of the events: a ttrpc server at TTRPC_ADDRESS that notes when each one arrives.

use std::{
    path::Path,
    sync::{Arc, Mutex},
    time::Instant,
};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{Empty, ForwardRequest},
    events::task::TaskExit,
    protobuf::Message,
    shim_async::{Events as Service, create_events},
    ttrpc::{
        self,
        asynchronous::{Server, TtrpcContext},
    },
};
use proxmox_lxcri::error::{Error, Result};
use tokio::sync::Notify;

use crate::process::PATIENCE;

/// The exits that were seen, and who waits for them.
#[derive(Clone, Default)]
pub(crate) struct Events {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    exits: Mutex<Vec<Exit>>,
    changed: Notify,
}

struct Exit {
    container: String,
    process: String,
    at: Instant,
}

impl Events {
    /// Serves at `socket` until the returned server is dropped.
    ///
    /// # Errors
    /// The server's.
    pub(crate) async fn serve(&self, socket: &Path) -> Result<Server> {
        let service = create_events(Arc::new(self.clone()));
        let failed = |e: ttrpc::Error| Error::unknown("cannot serve the events").with_source(e);
        let mut server = Server::new()
            .bind(&format!("unix://{}", socket.display()))
            .map_err(failed)?
            .register_service(service);
        server.start().await.map_err(failed)?;
        Ok(server)
    }

    /// When the exit of a process of a container arrived (init's process id is the container's); it is forgotten then.
    ///
    /// # Errors
    /// `DeadlineExceeded` after [`PATIENCE`].
    pub(crate) async fn exit(&self, container: &str, process: &str) -> Result<Instant> {
        let arrived = async {
            loop {
                let changed = self.shared.changed.notified();
                if let Some(at) = self.take(container, process) {
                    return at;
                }
                changed.await;
            }
        };
        tokio::time::timeout(PATIENCE, arrived)
            .await
            .map_err(|_| Error::deadline(format!("no exit event of {container}/{process} in {PATIENCE:?}")))
    }

    fn take(&self, container: &str, process: &str) -> Option<Instant> {
        let mut exits = lock(&self.shared.exits);
        let found = exits
            .iter()
            .position(|exit| exit.container == container && exit.process == process)?;
        Some(exits.swap_remove(found).at)
    }
}

#[async_trait]
impl Service for Events {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let at = Instant::now();
        let envelope = request.envelope();
        if envelope.topic() == "/tasks/exit" {
            let exit = TaskExit::parse_from_bytes(&envelope.event().value)
                .map_err(|e| ttrpc::Error::Others(format!("cannot decode a TaskExit: {e}")))?;
            lock(&self.shared.exits).push(Exit {
                container: exit.container_id,
                process: exit.id,
                at,
            });
            self.shared.changed.notify_waiters();
        }
        Ok(Empty::default())
    }
}

/// A panic elsewhere leaves the list as it was: a push or a removal is one step.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
