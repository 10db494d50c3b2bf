//! What containerd says that happened.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use containerd_client::{
    events::{
        TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOom, TaskPaused, TaskResumed, TaskStart,
    },
    services::v1::{PublishRequest, SubscribeRequest},
};
use prost::Message;
use prost_types::Any;

use super::{
    node::{Node, SOON, until},
    patience::pause,
};

/// A task event, reduced to what tests compare.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Event {
    /// Without `/tasks/`: "create", "start", "exit", …
    pub(crate) topic: String,
    /// The container.
    pub(crate) container: String,
    /// The exec, or the container again (exit) or nothing (delete) for init.
    pub(crate) id: String,
    /// 0 where the event has none.
    pub(crate) pid: u32,
    /// Of exit and delete.
    pub(crate) status: u32,
}

impl Event {
    fn decode(topic: &str, any: &Any) -> Option<Self> {
        fn read<T: Message + Default>(any: &Any) -> T {
            T::decode(any.value.as_slice())
                .unwrap_or_else(|e| panic!("event {} is not what it says: {e}", any.type_url))
        }
        let (container, id, pid, status) = match topic.strip_prefix("/tasks/")? {
            "create" => {
                let event: TaskCreate = read(any);
                (event.container_id, String::new(), event.pid, 0)
            }
            "start" => {
                let event: TaskStart = read(any);
                (event.container_id, String::new(), event.pid, 0)
            }
            "exec-added" => {
                let event: TaskExecAdded = read(any);
                (event.container_id, event.exec_id, 0, 0)
            }
            "exec-started" => {
                let event: TaskExecStarted = read(any);
                (event.container_id, event.exec_id, event.pid, 0)
            }
            "exit" => {
                let event: TaskExit = read(any);
                assert!(event.exited_at.is_some(), "an exit without a time: {event:?}");
                (event.container_id, event.id, event.pid, event.exit_status)
            }
            "delete" => {
                let event: TaskDelete = read(any);
                (event.container_id, event.id, event.pid, event.exit_status)
            }
            "oom" => (read::<TaskOom>(any).container_id, String::new(), 0, 0),
            "paused" => (read::<TaskPaused>(any).container_id, String::new(), 0, 0),
            "resumed" => (read::<TaskResumed>(any).container_id, String::new(), 0, 0),
            _ => return None,
        };
        Some(Self {
            topic: topic.trim_start_matches("/tasks/").into(),
            container,
            id,
            pid,
            status,
        })
    }
}

/// A subscription; collects in the background until it is dropped.
pub(crate) struct Events {
    seen: Arc<Mutex<Vec<Event>>>,
    reader: tokio::task::JoinHandle<()>,
}

impl Drop for Events {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Events {
    /// Subscribes; returns once events arrive, so that none that follows is missed.
    pub(crate) async fn of(node: &Node) -> Self {
        const READY: &str = "/lxcri-test/ready";
        let seen = Arc::new(Mutex::new(Vec::new()));
        let ready = Arc::new(tokio::sync::Notify::new());
        let (list, signal, mut client) = (seen.clone(), ready.clone(), node.events());
        let mut request = node.request(SubscribeRequest { filters: vec![] });
        request.set_timeout(Duration::from_secs(600));
        let reader = tokio::spawn(async move {
            let mut stream = client.subscribe(request).await.expect("subscribe").into_inner();
            while let Ok(Some(envelope)) = stream.message().await {
                if envelope.topic == READY {
                    signal.notify_one();
                }
                if let Some(event) = envelope
                    .event
                    .as_ref()
                    .and_then(|any| Event::decode(&envelope.topic, any))
                {
                    list.lock().unwrap().push(event);
                }
            }
        });
        until("the event subscription works", async || {
            let event = Any {
                type_url: "containerd.events.NamespaceCreate".into(),
                value: vec![],
            };
            let request = PublishRequest {
                topic: READY.into(),
                event: Some(event),
            };
            node.events().publish(node.request(request)).await.expect("publish");
            tokio::time::timeout(Duration::from_millis(50), ready.notified())
                .await
                .ok()
        })
        .await;
        Self { seen, reader }
    }

    /// Everything so far about `container`, in the order of arrival.
    pub(crate) fn about(&self, container: &str) -> Vec<Event> {
        let mut events = self.seen.lock().unwrap().clone();
        events.retain(|event| event.container == container);
        events
    }

    /// Waits until the container's delete event came, and gives everything about it.
    pub(crate) async fn until_deleted(&self, container: &str) -> Vec<Event> {
        self.until(container, |event| {
            event.topic == "delete" && (event.id.is_empty() || event.id == container)
        })
        .await
    }

    /// Waits for an event about `container`, and gives everything about it so far.
    ///
    /// # Panics
    /// With what did come, when it does not come.
    pub(crate) async fn until(&self, container: &str, wanted: impl Fn(&Event) -> bool) -> Vec<Event> {
        let end = std::time::Instant::now() + *SOON;
        loop {
            let events = self.about(container);
            if events.iter().any(&wanted) {
                return events;
            }
            assert!(
                std::time::Instant::now() < end,
                "the event did not come; these did: {events:#?}"
            );
            tokio::time::sleep(pause()).await;
        }
    }
}

/// The topics, in order.
pub(crate) fn topics(events: &[Event]) -> Vec<&str> {
    events.iter().map(|event| event.topic.as_str()).collect()
}
