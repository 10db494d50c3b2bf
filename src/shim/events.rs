//! Events on their way to containerd: one queue, one sender, in order, until they have arrived.
//!
//! The sender connects when the first event is there. When containerd is away it goes on trying with the same event, so nothing
//! overtakes anything. An event whose answer was lost with the connection is sent again: containerd may hear it twice, never not at
//! all.
//!
//! The queue is bounded. Over the bound, what matters least goes first ([`rank`]); an exit is given up only for want of anything
//! else, beyond a bound that no node reaches, since processes are started by the very daemon that would have to be away.

use std::{
    collections::VecDeque,
    os::linux::net::SocketAddrExt,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use containerd_shim_protos::{
    events::task,
    protobuf::{
        Message, MessageField,
        well_known_types::{any::Any, timestamp::Timestamp},
    },
    shim::{event::Envelope, events::ForwardRequest},
    shim_async::{Client, EventsClient},
    types::mount,
};
use tokio::{net::UnixStream, sync::Notify, task::JoinHandle, time::Instant};
use ttrpc::{Code, asynchronous::transport::Socket, context};

use crate::{
    error::{Error, Result},
    task::event::{Event, EventSink},
};

/// Events that wait at most, exits aside.
const MAX_EVENTS: usize = 2_048;
/// Bytes of payload that wait at most, exits aside.
const MAX_BYTES: usize = 1 << 20;
/// Exits that wait at most.
const MAX_EXITS: usize = 65_536;

/// First and longest pause between two attempts.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Bound of one connect and of one call; then the connection is given up and the event is sent again on a new one.
const CALL_BOUND: Duration = Duration::from_secs(5);
/// How often one event is offered to a daemon that answers with an error.
const MAX_REFUSALS: u32 = 8;

/// Sends events to containerd. Dropping it stops the sender; [`Publisher::drain`] first.
pub struct Publisher {
    shared: Arc<Shared>,
    sender: Option<JoinHandle<()>>,
}

struct Shared {
    namespace: String,
    queue: Mutex<Queue>,
    /// Something was queued.
    filled: Notify,
    /// Nothing waits and nothing is on its way.
    empty: Notify,
    /// Try now instead of after the pause.
    hurry: Notify,
}

impl Publisher {
    /// A publisher to containerd's ttrpc socket (a path, `unix://` or `@abstract`). Connects to nothing yet. Without an address
    /// events are counted and given up, with one warning.
    ///
    /// MUST be called inside a tokio runtime.
    pub fn new(namespace: &str, ttrpc_address: Option<&str>) -> Self {
        let shared = Arc::new(Shared {
            namespace: namespace.into(),
            queue: Mutex::new(Queue::new(Bounds::default())),
            filled: Notify::new(),
            empty: Notify::new(),
            hurry: Notify::new(),
        });
        let sender = ttrpc_address
            .filter(|address| !address.is_empty())
            .map(|address| tokio::spawn(send_all(shared.clone(), address.to_owned())));
        Self { shared, sender }
    }

    /// Waits until everything has arrived, at most for `bound`. Returns how many events are left.
    pub async fn drain(&self, bound: Duration) -> usize {
        let deadline = Instant::now() + bound;
        self.shared.hurry.notify_one();
        loop {
            let empty = self.shared.empty.notified();
            tokio::pin!(empty);
            // Registered before the look, so that an event that arrives in between is not missed.
            empty.as_mut().enable();
            let left = self.shared.queue().left();
            if left == 0 || self.sender.is_none() || tokio::time::timeout_at(deadline, empty).await.is_err() {
                return left;
            }
        }
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        if let Some(sender) = &self.sender {
            sender.abort();
        }
    }
}

impl EventSink for Publisher {
    fn publish(&self, event: Event, at: SystemTime) {
        let topic = event.topic();
        if self.sender.is_none() {
            let mut queue = self.shared.queue();
            queue.dropped += 1;
            if queue.dropped == 1 {
                log::warn!(
                    "no address to send events to (TTRPC_ADDRESS is not set); {topic} and all later ones are lost"
                );
            }
            return;
        }
        match envelope(&self.shared.namespace, &event, at) {
            Ok(envelope) => {
                let dropped = self.shared.queue().push(Queued {
                    rank: rank(&event),
                    envelope,
                });
                if let Some(total) = dropped.filter(|total| total.is_power_of_two()) {
                    log::warn!("containerd takes no events; {total} of the less important ones were dropped so far");
                }
                self.shared.filled.notify_one();
            }
            Err(e) => log::error!("{e}"),
        }
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn next(&self) -> Envelope {
        loop {
            let filled = self.filled.notified();
            if let Some(queued) = self.queue().take() {
                return queued.envelope;
            }
            filled.await;
        }
    }

    fn sent(&self) {
        let mut queue = self.queue();
        queue.in_flight = false;
        if queue.left() == 0 {
            self.empty.notify_waiters();
        }
    }
}

/// What happens to an event when there is no room: the lowest goes first, of equals the oldest. [`EXIT`] stays.
fn rank(event: &Event) -> u8 {
    match event {
        Event::Paused { .. } | Event::Resumed { .. } | Event::Checkpointed { .. } => 0,
        Event::ExecAdded { .. } | Event::ExecStarted { .. } => 1,
        Event::Create { .. } | Event::Start { .. } | Event::Delete { .. } | Event::Oom { .. } => 2,
        Event::Exit { .. } => EXIT,
    }
}

const EXIT: u8 = 3;

struct Queued {
    rank: u8,
    envelope: Envelope,
}

impl Queued {
    fn bytes(&self) -> usize {
        self.envelope.event.value.len()
    }
}

struct Bounds {
    events: usize,
    bytes: usize,
    exits: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            events: MAX_EVENTS,
            bytes: MAX_BYTES,
            exits: MAX_EXITS,
        }
    }
}

struct Queue {
    bounds: Bounds,
    events: VecDeque<Queued>,
    /// Of `events` without the exits.
    bytes: usize,
    exits: usize,
    in_flight: bool,
    dropped: u64,
}

impl Queue {
    fn new(bounds: Bounds) -> Self {
        Self {
            bounds,
            events: VecDeque::new(),
            bytes: 0,
            exits: 0,
            in_flight: false,
            dropped: 0,
        }
    }

    /// Appends, and makes room. The number of all that were ever dropped, if some were now.
    fn push(&mut self, queued: Queued) -> Option<u64> {
        self.count(&queued, true);
        self.events.push_back(queued);
        let before = self.dropped;
        while self.events.len() - self.exits > self.bounds.events || self.bytes > self.bounds.bytes {
            let lowest = self.events.iter().map(|queued| queued.rank).min();
            let Some(at) = self.events.iter().position(|queued| Some(queued.rank) == lowest) else {
                break;
            };
            self.drop_at(at);
        }
        if self.exits > self.bounds.exits {
            if let Some(at) = self.events.iter().position(|queued| queued.rank == EXIT) {
                self.drop_at(at);
            }
        }
        (self.dropped > before).then_some(self.dropped)
    }

    fn drop_at(&mut self, at: usize) {
        if let Some(queued) = self.events.remove(at) {
            self.count(&queued, false);
            self.dropped += 1;
        }
    }

    /// The next one to send; it counts as left until `in_flight` is taken back.
    fn take(&mut self) -> Option<Queued> {
        let queued = self.events.pop_front()?;
        self.count(&queued, false);
        self.in_flight = true;
        if self.events.is_empty() {
            // What an outage made large is not kept for good.
            self.events.shrink_to(16);
        }
        Some(queued)
    }

    fn count(&mut self, queued: &Queued, added: bool) {
        let (number, amount) = match queued.rank {
            EXIT => (&mut self.exits, 1),
            _ => (&mut self.bytes, queued.bytes()),
        };
        *number = if added { *number + amount } else { *number - amount };
    }

    fn left(&self) -> usize {
        self.events.len() + usize::from(self.in_flight)
    }
}

enum Failure {
    /// The daemon answered, with an error.
    Refused(ttrpc::Status),
    /// No daemon, no connection, no answer.
    Away(String),
}

async fn send_all(shared: Arc<Shared>, address: String) {
    let mut client = None;
    loop {
        let request = ForwardRequest {
            envelope: MessageField::some(shared.next().await),
            ..Default::default()
        };
        let topic = request.envelope.topic.as_str();
        let (mut pause, mut refusals, mut told) = (PAUSE.0, 0, false);
        loop {
            let reused = client.is_some();
            match forward(&mut client, &address, &request).await {
                Ok(()) => {
                    if told {
                        log::info!("containerd takes events again at {address}");
                    }
                    break;
                }
                Err(Failure::Refused(status)) => {
                    refusals += 1;
                    if status.code() == Code::INVALID_ARGUMENT || refusals == MAX_REFUSALS {
                        log::error!(
                            "event {topic} is lost: containerd refused it: {:?} {}",
                            status.code(),
                            status.message()
                        );
                        break;
                    }
                }
                Err(Failure::Away(e)) => {
                    client = None;
                    // The connection of the last event, perhaps long ago, to a daemon that was restarted since.
                    if reused {
                        continue;
                    }
                    if !told {
                        log::warn!("containerd takes no events at {address} ({e}); they wait, beginning with {topic}");
                        told = true;
                    }
                }
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(PAUSE.1),
                () = shared.hurry.notified() => pause = PAUSE.0,
            }
        }
        shared.sent();
    }
}

async fn forward(client: &mut Option<EventsClient>, address: &str, request: &ForwardRequest) -> Result<(), Failure> {
    let client = match client {
        Some(client) => client,
        None => {
            let stream = tokio::time::timeout(CALL_BOUND, connect(address))
                .await
                .map_err(|_| Failure::Away("connecting takes too long".into()))?
                .map_err(|e| Failure::Away(e.to_string()))?;
            client.insert(EventsClient::new(Client::new(Socket::from(stream))))
        }
    };
    match client.forward(context::with_duration(CALL_BOUND), request).await {
        Ok(_) => Ok(()),
        Err(ttrpc::Error::RpcStatus(status)) => Err(Failure::Refused(status)),
        Err(e) => Err(Failure::Away(e.to_string())),
    }
}

async fn connect(address: &str) -> std::io::Result<UnixStream> {
    let path = address.strip_prefix("unix://").unwrap_or(address);
    match path.strip_prefix('@') {
        Some(name) => {
            let stream = std::os::unix::net::UnixStream::connect_addr(
                &std::os::unix::net::SocketAddr::from_abstract_name(name)?,
            )?;
            stream.set_nonblocking(true)?;
            UnixStream::from_std(stream)
        }
        None => UnixStream::connect(Path::new(path)).await,
    }
}

fn envelope(namespace: &str, event: &Event, at: SystemTime) -> Result<Envelope> {
    Ok(Envelope {
        timestamp: MessageField::some(timestamp(at)),
        namespace: namespace.into(),
        topic: event.topic().into(),
        event: MessageField::some(encode(event)?),
        ..Default::default()
    })
}

/// The event as containerd's consumers decode it: the bare message name as type, as containerd's typeurl writes it.
///
/// # Errors
/// `Unknown` when the protobuf encoder fails.
pub fn encode(event: &Event) -> Result<Any> {
    match event.clone() {
        Event::Create {
            container_id,
            bundle,
            rootfs,
            io,
            checkpoint,
            pid,
        } => any(
            "containerd.events.TaskCreate",
            &task::TaskCreate {
                container_id,
                bundle: bundle.to_string_lossy().into_owned(),
                rootfs: rootfs
                    .into_iter()
                    .map(|m| mount::Mount {
                        type_: m.kind,
                        source: m.source,
                        target: m.target,
                        options: m.options,
                        ..Default::default()
                    })
                    .collect(),
                io: MessageField::some(task::TaskIO {
                    stdin: io.stdin,
                    stdout: io.stdout,
                    stderr: io.stderr,
                    terminal: io.terminal,
                    ..Default::default()
                }),
                checkpoint,
                pid,
                ..Default::default()
            },
        ),
        Event::Start { container_id, pid } => any(
            "containerd.events.TaskStart",
            &task::TaskStart {
                container_id,
                pid,
                ..Default::default()
            },
        ),
        Event::ExecAdded { container_id, exec_id } => any(
            "containerd.events.TaskExecAdded",
            &task::TaskExecAdded {
                container_id,
                exec_id,
                ..Default::default()
            },
        ),
        Event::ExecStarted {
            container_id,
            exec_id,
            pid,
        } => any(
            "containerd.events.TaskExecStarted",
            &task::TaskExecStarted {
                container_id,
                exec_id,
                pid,
                ..Default::default()
            },
        ),
        Event::Exit {
            container_id,
            id,
            pid,
            exit,
        } => any(
            "containerd.events.TaskExit",
            &task::TaskExit {
                container_id,
                id,
                pid,
                exit_status: exit.status,
                exited_at: MessageField::some(timestamp(exit.at)),
                ..Default::default()
            },
        ),
        Event::Delete {
            container_id,
            id,
            pid,
            exit,
        } => any(
            "containerd.events.TaskDelete",
            &task::TaskDelete {
                container_id,
                id,
                pid,
                exit_status: exit.status,
                exited_at: MessageField::some(timestamp(exit.at)),
                ..Default::default()
            },
        ),
        Event::Oom { container_id } => any(
            "containerd.events.TaskOOM",
            &task::TaskOOM {
                container_id,
                ..Default::default()
            },
        ),
        Event::Paused { container_id } => any(
            "containerd.events.TaskPaused",
            &task::TaskPaused {
                container_id,
                ..Default::default()
            },
        ),
        Event::Resumed { container_id } => any(
            "containerd.events.TaskResumed",
            &task::TaskResumed {
                container_id,
                ..Default::default()
            },
        ),
        Event::Checkpointed {
            container_id,
            checkpoint,
        } => any(
            "containerd.events.TaskCheckpointed",
            &task::TaskCheckpointed {
                container_id,
                checkpoint,
                ..Default::default()
            },
        ),
    }
}

fn any(type_url: &str, message: &impl Message) -> Result<Any> {
    let value = message
        .write_to_bytes()
        .map_err(|e| Error::unknown(format!("cannot encode event {type_url}")).with_source(e))?;
    Ok(Any {
        type_url: type_url.into(),
        value,
        ..Default::default()
    })
}

/// A time in containerd's form; before 1970 there is none.
pub fn timestamp(at: SystemTime) -> Timestamp {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
        ..Default::default()
    }
}
