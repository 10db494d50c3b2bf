//! What happens to tasks, as it is told to containerd. The order of the calls of [`EventSink::publish`] is the order of the events.

use std::{path::PathBuf, time::SystemTime};

use crate::{backend::Exit, rootfs::Mount};

/// One of the ten task events of containerd (containerd api/events/task.proto).
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// `/tasks/create`
    Create {
        /// Task id.
        container_id: String,
        /// The bundle folder.
        bundle: PathBuf,
        /// The rootfs mounts of the request.
        rootfs: Vec<Mount>,
        /// stdin, stdout, stderr and terminal as requested.
        io: crate::task::stdio::Config,
        /// Checkpoint restored from; empty otherwise.
        checkpoint: String,
        /// Init's pid.
        pid: u32,
    },
    /// `/tasks/start`
    Start {
        /// Task id.
        container_id: String,
        /// Init's pid.
        pid: u32,
    },
    /// `/tasks/exec-added`
    ExecAdded {
        /// Task id.
        container_id: String,
        /// Exec id.
        exec_id: String,
    },
    /// `/tasks/exec-started`
    ExecStarted {
        /// Task id.
        container_id: String,
        /// Exec id.
        exec_id: String,
        /// The exec's pid.
        pid: u32,
    },
    /// `/tasks/exit`
    Exit {
        /// Task id.
        container_id: String,
        /// Exec id, or the task id again for init.
        id: String,
        /// Pid of the process that ended.
        pid: u32,
        /// How and when.
        exit: Exit,
    },
    /// `/tasks/delete`
    Delete {
        /// Task id.
        container_id: String,
        /// Exec id, or empty for init.
        id: String,
        /// Pid of the deleted process.
        pid: u32,
        /// How and when it ended.
        exit: Exit,
    },
    /// `/tasks/oom`
    Oom {
        /// Task id.
        container_id: String,
    },
    /// `/tasks/paused`
    Paused {
        /// Task id.
        container_id: String,
    },
    /// `/tasks/resumed`
    Resumed {
        /// Task id.
        container_id: String,
    },
    /// `/tasks/checkpointed`
    Checkpointed {
        /// Task id.
        container_id: String,
        /// Folder of the images.
        checkpoint: String,
    },
}

impl Event {
    /// The topic of containerd's event exchange.
    pub fn topic(&self) -> &'static str {
        match self {
            Event::Create { .. } => "/tasks/create",
            Event::Start { .. } => "/tasks/start",
            Event::ExecAdded { .. } => "/tasks/exec-added",
            Event::ExecStarted { .. } => "/tasks/exec-started",
            Event::Exit { .. } => "/tasks/exit",
            Event::Delete { .. } => "/tasks/delete",
            Event::Oom { .. } => "/tasks/oom",
            Event::Paused { .. } => "/tasks/paused",
            Event::Resumed { .. } => "/tasks/resumed",
            Event::Checkpointed { .. } => "/tasks/checkpointed",
        }
    }
}

/// Takes events in order. MUST NOT block and MUST NOT reorder; what happens to a daemon that is away is its business.
pub trait EventSink: Send + Sync {
    /// Queues one event that happened at `at`.
    fn publish(&self, event: Event, at: SystemTime);
}
