//! Runtime options, annotations, routing rules, file and defaults → one [`Options`] value.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The prost types of `proto/`.
pub mod proto {
    #![allow(missing_docs, unreachable_pub)]
    /// `proto/options.proto`.
    pub mod proxmoxlxcri {
        include!(concat!(env!("OUT_DIR"), "/proxmoxlxcri.v1.rs"));
    }
    /// `proto/runtimeoptions.proto`.
    pub mod runtimeoptions {
        include!(concat!(env!("OUT_DIR"), "/runtimeoptions.v1.rs"));
    }
}

/// What was decided for one container; every field has its value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Options {
    /// "crun", "lxc", "proxmox-lxc" or "proxmox-vm".
    pub backend: String,
    /// The crun program: a name looked up in PATH, or an absolute path.
    pub crun_binary: PathBuf,
    /// Folder of crun's state; the containerd namespace is appended.
    pub crun_root: PathBuf,
    /// crun creates systemd scopes.
    pub systemd_cgroup: bool,
    /// No pivot_root.
    pub no_pivot_root: bool,
    /// No new session keyring.
    pub no_new_keyring: bool,
    /// cgroup that the shim itself joins; empty for none.
    pub shim_cgroup: String,
    /// Owner of the stdio pipes.
    pub io_uid: u32,
    /// Group of the stdio pipes.
    pub io_gid: u32,
    /// Folder for CRIU's images.
    pub criu_image_path: Option<PathBuf>,
    /// Folder for CRIU's work files.
    pub criu_work_path: Option<PathBuf>,
    /// Bound of one call of the runtime program, milliseconds.
    pub runtime_timeout_ms: u64,
    /// Bound of the wait for the rest of the output after an exit, milliseconds.
    pub drain_timeout_ms: u64,
    /// crun's debug messages go into the shim's log.
    pub crun_debug: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            backend: "crun".into(),
            crun_binary: "crun".into(),
            crun_root: "/run/proxmox-lxcri/crun".into(),
            systemd_cgroup: false,
            no_pivot_root: false,
            no_new_keyring: false,
            shim_cgroup: String::new(),
            io_uid: 0,
            io_gid: 0,
            criu_image_path: None,
            criu_work_path: None,
            runtime_timeout_ms: 120_000,
            drain_timeout_ms: 2_000,
            crun_debug: false,
        }
    }
}
