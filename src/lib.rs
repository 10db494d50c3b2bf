//! `containerd-shim-proxmox-lxcri-v1`: one containerd runtime for crun containers, LXC containers and, later, Proxmox VE
//! containers and Proxmox VE virtual machines.
//!
//! # The rooms, in the order in which a request walks through them
//!
//! ```text
//! containerd ──ttrpc──▶ shim/     decodes, spawns, encodes; sockets, events, log; decides nothing
//!                        │
//!                        ▼
//!                       task/     the engine: phases, order of events, stdio, the durable record
//!                        │  ╲
//!                        ▼   ▼
//!                   backend/  rootfs/   what runs the container · what it stands on
//!                        │   ╱
//!                        ▼  ▼
//!                       host/     the kernel: processes by pidfd, cgroups; systemd's scopes
//! ```
//!
//! A request goes down once and comes back once. Nothing in `backend` knows ttrpc, fifos or events; nothing in `shim` knows
//! crun, LXC or Proxmox.
//!
//! # Glossary
//!
//! - **task**: a container as containerd sees it while it is created or runs; one [`task::Task`].
//! - **process**: init or an exec of a task; both walk the same phases ([`task::process::Phase`]).
//! - **exec**: a further process in a running task.
//! - **bundle**: the folder with `config.json` that containerd made for a task.
//! - **rootfs**: what the task's mounts make of `<bundle>/rootfs`.
//! - **sandbox**: the first container of a pod; the pod's other tasks live in the same shim.
//! - **record**: the file `<bundle>/proxmox-lxcri.json`, which tells a fresh process what has to be undone.
//! - **backend**: what holds a container: crun, LXC, later a Proxmox CT or a Proxmox VM.
//! - **monitor**: the parent of an LXC container's init: this program, on liblxc.
//! - **helper**: `proxmox-lxcri-init`, which becomes an LXC container's init, and its execs.
//!
//! # Phases of a process
//!
//! ```text
//! Creating ─▶ Created ─▶ Starting ─▶ Running ⇄ Pausing/Paused
//!     │          │           │          │
//!     ▼          ▼           ▼          ▼
//!   (gone)    Stopped ◀──────┴──────────┘ ─▶ Deleting ─▶ Deleted
//! ```

pub mod backend;
pub mod config;
pub mod error;
pub mod host;
pub mod rootfs;
pub mod shim;
pub mod task;

// What unit tests have in common with the others.
#[cfg(test)]
#[path = "../tests/support/patience.rs"]
#[allow(dead_code, reason = "each of the tests uses another part")]
mod patience;
#[cfg(test)]
#[path = "../tests/support/skip.rs"]
mod skip;
