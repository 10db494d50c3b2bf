//! Events on their way to containerd: one queue, one sender, in order, until they have arrived.
//!
//! The sender connects when the first event is there. When containerd is away it goes on trying with the same event, so nothing
//! overtakes anything. An event whose answer was lost with the connection is sent again: containerd may hear it twice, never not at
//! all.
//!
//! The queue is bounded. Over the bound, what matters least goes first (`rank`); an exit is given up only for want of anything
//! else, beyond a bound that no node reaches, since processes are started by the very daemon that would have to be away.

use std::{
    collections::VecDeque,
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
        if self.exits > self.bounds.exits
            && let Some(at) = self.events.iter().position(|queued| queued.rank == EXIT)
        {
            self.drop_at(at);
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
                // A daemon that says so is away as much as one that does not answer.
                Err(Failure::Refused(status)) if status.code() == Code::UNAVAILABLE => {}
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
        Some(name) => UnixStream::connect(format!("\0{name}")).await,
        None => UnixStream::connect(path).await,
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

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use async_trait::async_trait;
    use containerd_shim_protos::{protobuf::well_known_types::empty::Empty, shim_async::create_events};
    use tokio::sync::mpsc;
    use ttrpc::asynchronous::{Server, TtrpcContext, transport::Listener};

    use super::*;
    use crate::{backend::Exit, rootfs::Mount, task::stdio};

    fn exit(status: u32) -> Exit {
        Exit {
            status,
            at: UNIX_EPOCH + Duration::new(7, 8),
        }
    }

    fn start(pid: u32) -> Event {
        Event::Start {
            container_id: "c".into(),
            pid,
        }
    }

    fn ended(pid: u32) -> Event {
        Event::Exit {
            container_id: "c".into(),
            id: "c".into(),
            pid,
            exit: exit(0),
        }
    }

    fn one_of_each() -> Vec<Event> {
        let container_id = || "c".to_owned();
        vec![
            Event::Create {
                container_id: container_id(),
                bundle: "/b".into(),
                rootfs: vec![Mount {
                    kind: "bind".into(),
                    source: "/s".into(),
                    target: "t".into(),
                    options: vec!["ro".into()],
                }],
                io: stdio::Config {
                    stdin: "i".into(),
                    stdout: "o".into(),
                    stderr: "e".into(),
                    terminal: true,
                },
                checkpoint: "k".into(),
                pid: 1,
            },
            start(2),
            Event::ExecAdded {
                container_id: container_id(),
                exec_id: "x".into(),
            },
            Event::ExecStarted {
                container_id: container_id(),
                exec_id: "x".into(),
                pid: 3,
            },
            Event::Exit {
                container_id: container_id(),
                id: "x".into(),
                pid: 3,
                exit: exit(4),
            },
            Event::Delete {
                container_id: container_id(),
                id: "x".into(),
                pid: 3,
                exit: exit(4),
            },
            Event::Oom {
                container_id: container_id(),
            },
            Event::Paused {
                container_id: container_id(),
            },
            Event::Resumed {
                container_id: container_id(),
            },
            Event::Checkpointed {
                container_id: container_id(),
                checkpoint: "k".into(),
            },
        ]
    }

    #[test]
    fn each_topic_has_its_message() {
        let table = [
            ("/tasks/create", "TaskCreate"),
            ("/tasks/start", "TaskStart"),
            ("/tasks/exec-added", "TaskExecAdded"),
            ("/tasks/exec-started", "TaskExecStarted"),
            ("/tasks/exit", "TaskExit"),
            ("/tasks/delete", "TaskDelete"),
            ("/tasks/oom", "TaskOOM"),
            ("/tasks/paused", "TaskPaused"),
            ("/tasks/resumed", "TaskResumed"),
            ("/tasks/checkpointed", "TaskCheckpointed"),
        ];
        let texts = [
            r#"container_id: "c" bundle: "/b" rootfs {type: "bind" source: "/s" target: "t" options: "ro"} io {stdin: "i" stdout: "o" stderr: "e" terminal: true} checkpoint: "k" pid: 1"#,
            r#"container_id: "c" pid: 2"#,
            r#"container_id: "c" exec_id: "x""#,
            r#"container_id: "c" exec_id: "x" pid: 3"#,
            r#"container_id: "c" id: "x" pid: 3 exit_status: 4 exited_at {seconds: 7 nanos: 8}"#,
            r#"container_id: "c" pid: 3 exit_status: 4 exited_at {seconds: 7 nanos: 8} id: "x""#,
            r#"container_id: "c""#,
            r#"container_id: "c""#,
            r#"container_id: "c""#,
            r#"container_id: "c" checkpoint: "k""#,
        ];
        for ((event, (topic, name)), text) in one_of_each().iter().zip(table).zip(texts) {
            let any = encode(event).unwrap();
            assert_eq!(event.topic(), topic);
            assert_eq!(any.type_url, format!("containerd.events.{name}"));
            assert_eq!(decoded(&any), text);
        }
    }

    /// The message as text, decoded as what its type says.
    fn decoded(any: &Any) -> String {
        let file = task::file_descriptor();
        let name = any.type_url.strip_prefix("containerd.events.").unwrap();
        let message = file.messages().find(|m| m.name() == name).unwrap();
        message.parse_from_bytes(&any.value).unwrap().to_string()
    }

    /// containerd's end: records what it is told, and answers as it is told to.
    struct Daemon {
        heard: mpsc::UnboundedSender<Envelope>,
        answer: ttrpc::Result<()>,
    }

    #[async_trait]
    impl containerd_shim_protos::shim_async::Events for Daemon {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            self.heard.send(request.envelope.unwrap()).unwrap();
            self.answer.clone().map(|()| Empty::default())
        }
    }

    struct Place {
        _dir: tempfile::TempDir,
        path: PathBuf,
        sender: mpsc::UnboundedSender<Envelope>,
        heard: mpsc::UnboundedReceiver<Envelope>,
    }

    impl Place {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let (sender, heard) = mpsc::unbounded_channel();
            Self {
                path: dir.path().join("c.sock.ttrpc"),
                _dir: dir,
                sender,
                heard,
            }
        }

        fn publisher(&self) -> Publisher {
            Publisher::new("ns", self.path.to_str())
        }

        async fn daemon(&self, answer: ttrpc::Result<()>) -> Server {
            let _ = std::fs::remove_file(&self.path);
            let listener = std::os::unix::net::UnixListener::bind(&self.path).unwrap();
            let service = Arc::new(Daemon {
                heard: self.sender.clone(),
                answer,
            });
            let mut server = Server::new()
                .add_listener(Listener::try_from(listener).unwrap())
                .register_service(create_events(service));
            server.start().await.unwrap();
            server
        }

        /// The pids of the next `count` start events.
        async fn pids(&mut self, count: usize) -> Vec<u32> {
            let mut pids = Vec::new();
            while pids.len() < count {
                let envelope = tokio::time::timeout(Duration::from_secs(60), self.heard.recv()).await;
                let event = envelope.unwrap().unwrap().event.unwrap();
                pids.push(task::TaskStart::parse_from_bytes(&event.value).unwrap().pid);
            }
            pids
        }
    }

    const BOUND: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn events_arrive_in_order_with_time_namespace_and_topic() {
        let mut place = Place::new();
        let _daemon = place.daemon(Ok(())).await;
        let publisher = place.publisher();
        let at = UNIX_EPOCH + Duration::new(1, 2);
        for event in one_of_each() {
            publisher.publish(event, at);
        }
        assert_eq!(publisher.drain(BOUND).await, 0);
        for event in one_of_each() {
            let envelope = place.heard.try_recv().unwrap();
            assert_eq!(envelope, super::envelope("ns", &event, at).unwrap());
            assert_eq!((envelope.timestamp.seconds, envelope.timestamp.nanos), (1, 2));
        }
        assert!(place.heard.try_recv().is_err());
    }

    #[tokio::test]
    async fn a_daemon_that_comes_later_hears_everything() {
        let mut place = Place::new();
        let publisher = place.publisher();
        for pid in 0..100 {
            publisher.publish(start(pid), SystemTime::now());
        }
        assert_eq!(publisher.drain(Duration::from_millis(1)).await, 100);
        let _daemon = place.daemon(Ok(())).await;
        assert_eq!(place.pids(100).await, (0..100).collect::<Vec<_>>());
        assert_eq!(publisher.drain(BOUND).await, 0);
        assert!(place.heard.try_recv().is_err());
    }

    #[tokio::test]
    async fn a_restarted_daemon_hears_the_rest_once_and_in_order() {
        let mut place = Place::new();
        let publisher = place.publisher();
        for round in 0..3 {
            let mut daemon = place.daemon(Ok(())).await;
            let first = round * 20;
            // Ten that the last daemon did not hear, ten for this one.
            let waiting: u32 = if round == 0 { 0 } else { 10 };
            for pid in first..first + 10 {
                publisher.publish(start(pid), SystemTime::now());
            }
            let heard = place.pids(10 + waiting as usize).await;
            assert_eq!(heard, (first - waiting..first + 10).collect::<Vec<_>>());
            assert_eq!(publisher.drain(BOUND).await, 0);
            daemon.shutdown().await.unwrap();
            drop(daemon);
            for pid in first + 10..first + 20 {
                publisher.publish(start(pid), SystemTime::now());
            }
        }
        assert!(place.heard.try_recv().is_err());
    }

    #[tokio::test]
    async fn an_event_whose_answer_is_lost_is_sent_again() {
        let mut place = Place::new();
        let listener = tokio::net::UnixListener::bind(&place.path).unwrap();
        let publisher = place.publisher();
        publisher.publish(start(1), SystemTime::now());
        publisher.publish(start(2), SystemTime::now());
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut header = [0; 10];
        tokio::io::AsyncReadExt::read_exact(&mut stream, &mut header)
            .await
            .unwrap();
        drop((stream, listener));
        let _daemon = place.daemon(Ok(())).await;
        assert_eq!(place.pids(2).await, [1, 2]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_refused_event_does_not_hold_up_the_others_for_ever() {
        let mut place = Place::new();
        for (code, attempts) in [(Code::INVALID_ARGUMENT, 1), (Code::UNKNOWN, MAX_REFUSALS as usize)] {
            let answer = Err(ttrpc::Error::RpcStatus(ttrpc::get_status(code, "no")));
            let mut daemon = place.daemon(answer).await;
            let publisher = place.publisher();
            publisher.publish(start(1), SystemTime::now());
            publisher.publish(start(2), SystemTime::now());
            let mut expected = vec![1; attempts];
            expected.extend(vec![2; attempts]);
            assert_eq!(place.pids(2 * attempts).await, expected);
            assert_eq!(publisher.drain(BOUND).await, 0);
            daemon.shutdown().await.unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_waits_for_an_absent_daemon_no_longer_than_it_may() {
        let place = Place::new();
        let publisher = place.publisher();
        publisher.publish(start(1), SystemTime::now());
        publisher.publish(start(2), SystemTime::now());
        let before = Instant::now();
        assert_eq!(publisher.drain(Duration::from_secs(3)).await, 2);
        assert_eq!(before.elapsed().as_secs(), 3);
    }

    #[tokio::test]
    async fn without_an_address_events_are_given_up_at_once() {
        let publisher = Publisher::new("ns", Some(""));
        publisher.publish(start(1), SystemTime::now());
        publisher.publish(start(2), SystemTime::now());
        assert_eq!(publisher.drain(BOUND).await, 0);
        assert_eq!(publisher.shared.queue().dropped, 2);
    }

    fn queued(event: &Event) -> Queued {
        Queued {
            rank: rank(event),
            envelope: envelope("ns", event, UNIX_EPOCH).unwrap(),
        }
    }

    fn topics(queue: &mut Queue) -> Vec<String> {
        std::iter::from_fn(|| queue.take())
            .map(|q| q.envelope.event.type_url.replace("containerd.events.Task", ""))
            .collect()
    }

    #[test]
    fn what_matters_least_is_dropped_first_and_the_rest_keeps_its_order() {
        for (events, left) in [
            (0, &["Exit"][..]),
            (4, &["Create", "Start", "Exit", "Delete", "OOM"]),
            (
                6,
                &["Create", "Start", "ExecAdded", "ExecStarted", "Exit", "Delete", "OOM"],
            ),
            (
                7,
                &[
                    "Create",
                    "Start",
                    "ExecAdded",
                    "ExecStarted",
                    "Exit",
                    "Delete",
                    "OOM",
                    "Checkpointed",
                ],
            ),
        ] {
            let mut queue = Queue::new(Bounds {
                events,
                bytes: usize::MAX,
                exits: 10,
            });
            for event in one_of_each() {
                queue.push(queued(&event));
            }
            assert_eq!(queue.dropped as usize, 10 - left.len());
            assert_eq!(topics(&mut queue), left);
        }
    }

    #[test]
    fn memory_is_bounded_and_exits_outlive_everything() {
        let size = queued(&start(1_000_000)).bytes();
        let mut queue = Queue::new(Bounds {
            events: usize::MAX,
            bytes: 5 * size,
            exits: 1_000,
        });
        for n in 0..1_000 {
            queue.push(queued(&start(1_000_000 + n)));
            queue.push(queued(&ended(n)));
            assert!(queue.bytes <= 5 * size);
        }
        assert_eq!((queue.exits, queue.left()), (1_000, 1_005));
        assert_eq!(queue.dropped, 995);
        assert_eq!(queue.push(queued(&ended(1_000))), Some(996));
        assert_eq!(queue.exits, 1_000);
        while queue.take().is_some() {}
        assert_eq!((queue.bytes, queue.exits), (0, 0));
    }
}
