//! The LXC backend: OCI bundles as containers that `lxc-ls` lists and `lxc-attach` enters. Init is born in `create`.
//!
//! ```text
//! shim ──spawns──▶ monitor (this program, on liblxc) ──clones──▶ init (proxmox-lxcri-init), which becomes the user's program
//!   │                 └─ tells each child that it reaps                 ▲
//!   └──────── a connection of their own: plan, descriptors, start ──────┘
//! ```
//!
//! - [`blueprint`]: the mapping of a bundle, pure; [`config`]: its part for LXC.
//! - [`init`]: the helper inside; [`monitor`]: LXC's side; [`wire`]: what they say to each other.
//! - `create`, `exec`, `undo`: what the calls of the same names do; `order`: what the helper is told; `attend`: what the monitor says.
//! - `folder`: the name, and whose it is.
//! - [`system`]: containers that run a whole system, and what differs for them.
//!
//! A container's name is its id. Its cgroup is the one that the bundle asks for, the monitor's is `lxc.monitor.<name>` beside it. Nothing
//! here waits without a bound, and a create or exec that is given up takes its processes along: the monitor dies with the shim, init with
//! the monitor until it is the user's program, the process of an exec with the connection.

mod attend;
pub mod blueprint;
pub mod config;
mod create;
mod dynamic;
mod exec;
mod folder;
pub mod init;
pub mod monitor;
mod order;
pub mod seccomp;
pub mod system;
mod undo;
pub mod wire;

use std::{
    collections::HashMap,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, atomic::AtomicBool},
    time::Duration,
};

use async_trait::async_trait;
use oci_spec::runtime::LinuxResources;
use serde_json::Value;
use tokio::task::spawn_blocking;

use self::{
    attend::Monitor,
    blueprint::Facts,
    config::Layout,
    folder::{Folder, Owner},
    init::{hooks::Hook, process::Process},
    order::constrain,
    system::Init,
    undo::Poststop,
    wire::{Connection, FromInit, ToInit},
};
use super::{Backend, ChildIo, ExecSpec, Launched, Observed, check_id};
use crate::{
    error::{Context, Error, Kind, Result},
    host::{
        cgroup::{self, Cgroup},
        command::{Command, Reaper, is_alive},
        memory_file, systemd,
    },
    task::{bundle::Bundle, record::Record},
};

/// Bound of the wait for a process that was sent SIGKILL, and for LXC's own cleaning up.
const KILL_TIMEOUT: Duration = Duration::from_secs(3);

/// The helper's file, beside the shim's program.
const HELPER: &str = "proxmox-lxcri-init";

/// The cgroup that the init of a whole system manages, in the container's own with the limits.
const INNER: &str = "ns";

/// What of LXC's log goes into an error.
const LOG_MAX_BYTES: usize = 4096;

/// See the module.
pub struct Lxc {
    reaper: Reaper,
    /// Containers that this process has created, by id.
    live: Mutex<HashMap<String, Arc<Live>>>,
    /// The helper that belongs to this shim, also when a newer one has been installed.
    helper: OnceLock<OwnedFd>,
    /// Whether this process has looked for what is left of former containers.
    swept: AtomicBool,
}

/// A container that this process has created.
struct Live {
    init: Connection,
    monitor: Arc<Monitor>,
    /// To be run once, by Start.
    poststart: Mutex<Vec<Hook>>,
    facts: Facts,
    /// What of init's process is for the shim to set, before Start.
    constrained: Option<Process>,
    /// Its init, if it is that of a whole system.
    system: Option<Init>,
}

impl Lxc {
    /// A backend that runs its programs through `reaper`, which MUST be the process's one.
    pub fn new(reaper: Reaper) -> Self {
        Self {
            reaper,
            live: Mutex::default(),
            helper: OnceLock::new(),
            swept: AtomicBool::new(false),
        }
    }

    fn live(&self) -> MutexGuard<'_, HashMap<String, Arc<Live>>> {
        // Every change of the map is a single call.
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The helper in a read-only mount.
    fn sealed_helper(&self, helper: &Path) -> Result<OwnedFd> {
        if self.helper.get().is_none() {
            // Another task may have been first, with the same.
            let _ = self.helper.set(init::sealed(helper)?);
        }
        self.helper
            .get()
            .ok_or_else(|| Error::unknown("no helper"))?
            .try_clone()
            .context(|| "cannot hold the helper")
    }

    /// Runs a hook on the host; one that sets no bound itself has `bound`.
    async fn run_hook(&self, hook: &Hook, state: &Value, rec: &Record, bound: Duration) -> Result<()> {
        let what = || format!("hook {} {}", hook.name, hook.path.display());
        let stdin = memory_file(state.to_string().as_bytes())?;
        let mut command = Command::new(&hook.path)
            .env_clear()
            .cwd(&rec.bundle)
            .stdin(stdin.into());
        if let Some((argv0, args)) = hook.args.split_first() {
            command = command.arg0(argv0).args(args);
        }
        for (key, value) in hook.variables() {
            command = command.env(key, value);
        }
        let bound = hook.timeout_seconds.map_or(bound, Duration::from_secs);
        let output = self
            .reaper
            .output(command, bound)
            .await
            .map_err(|e| e.context(what()))?;
        if output.exit.status == 0 {
            return Ok(());
        }
        let stderr = String::from_utf8_lossy(&output.stderr);
        let stderr = match stderr.trim() {
            "" => String::new(),
            text => format!(": {text}"),
        };
        let status = output.exit.status;
        Err(Error::unknown(format!("{}: exit status {status}{stderr}", what())))
    }

    /// Runs hooks on the host, one after the other, to the first that fails.
    async fn run_hooks(&self, hooks: &[Hook], state: &Value, rec: &Record) -> Result<()> {
        for hook in hooks {
            self.run_hook(hook, state, rec, bound_of(rec)).await?;
        }
        Ok(())
    }

    /// Runs hooks on the host, one after the other. "The runtime MUST log a warning, but the remaining hooks and lifecycle continue" (OCI
    /// runtime.md).
    async fn run_hooks_anyway(&self, hooks: &[Hook], state: &Value, rec: &Record, bound: Duration) {
        for hook in hooks {
            if let Err(e) = self.run_hook(hook, state, rec, bound).await {
                log::warn!("container {}: {e}", rec.id);
            }
        }
    }
}

#[async_trait]
impl Backend for Lxc {
    fn name(&self) -> &'static str {
        "lxc"
    }

    /// # Errors
    /// "OCI runtime create failed: …" with the reason; for a missing program the words `executable file not found in $PATH`.
    /// `AlreadyExists` when LXC knows another container of that name. `DeadlineExceeded` at `runtime_timeout_ms`. [`Backend::delete`]
    /// removes what is left.
    async fn create(&self, rec: &Record, bundle: &Bundle, io: &mut Option<ChildIo>) -> Result<Option<Launched>> {
        if rec.restore_from.is_some() {
            return Err(Error::unimplemented(
                "the backend lxc cannot restore a checkpoint; use the backend crun",
            ));
        }
        bounded(rec, "create", "Delete removes what it made", async {
            self.create_unbounded(rec, bundle, io.take().unwrap_or(NO_IO)).await
        })
        .await
        .map(Some)
    }

    async fn start(&self, rec: &Record, _io: &mut Option<ChildIo>) -> Result<Option<Launched>> {
        let live = self.live().get(&rec.id).cloned();
        let live = live.ok_or_else(|| {
            Error::precondition(format!("container {} was not created by this shim, or is gone", rec.id))
        })?;
        bounded(
            rec,
            "start",
            "the container may be running; State tells, Delete ends it",
            async {
                let pid = rec.init.map_or(0, |init| init.pid);
                if let Some(process) = live.constrained.clone() {
                    constrain(process, pid).await?;
                }
                live.init
                    .send(&ToInit::Start { pid }, &[])
                    .await
                    .or_else(gone_is_fine)?;
                // Its end without a word is that of the connection at exec, or init's, whose exit tells the rest.
                let Some(packet) = live.init.receive().await? else {
                    return Ok(());
                };
                match packet.read()? {
                    FromInit::Failed(failure) => Err(failure.into()),
                    _ => Err(Error::unknown("init says what was not asked")),
                }
            },
        )
        .await?;
        let hooks = std::mem::take(&mut *live.poststart.lock().unwrap_or_else(PoisonError::into_inner));
        let pid = rec.init.map_or(0, |init| init.pid);
        let state = live.facts.state("running", Some(pid));
        let bound = bound_of(rec);
        // Whatever they do, the container runs.
        if tokio::time::timeout(bound, self.run_hooks_anyway(&hooks, &state, rec, bound))
            .await
            .is_err()
        {
            log::warn!(
                "container {}: its poststart hooks were not done within {} ms and were given up",
                rec.id,
                bound.as_millis()
            );
        }
        Ok(None)
    }

    /// # Errors
    /// "OCI runtime exec failed: …" with the reason, as in `create`. A process that was already made has ended then.
    async fn exec(&self, rec: &Record, exec_id: &str, process: &ExecSpec, io: ChildIo) -> Result<Launched> {
        check_id("exec id", exec_id)?;
        bounded(
            rec,
            "exec",
            "its process was killed, or ends as soon as it notices",
            self.exec_unbounded(rec, exec_id, process, io),
        )
        .await
    }

    async fn observe(&self, rec: &Record) -> Result<Observed> {
        if !matches!(
            Folder::of(rec, &rec.id).owner(&rec.namespace, &rec.bundle)?,
            Owner::Us(_)
        ) {
            return Ok(Observed::Absent);
        }
        let Some(init) = rec.init.filter(is_alive) else {
            return Ok(Observed::Stopped);
        };
        // Until it is the user's program it is the helper: this shim's, which may have been replaced in its folder, if it has one.
        let helper = match self.helper.get() {
            Some(helper) => PathBuf::from(format!("/proc/self/fd/{}", helper.as_raw_fd())),
            None => helper()?,
        };
        let file = |path: &Path| std::fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
        if file(Path::new(&format!("/proc/{}/exe", init.pid))) == file(&helper) {
            return Ok(Observed::Created { pid: init.pid });
        }
        Ok(Observed::Running { pid: init.pid })
    }

    fn init_signal(&self, rec: &Record, signal: i32) -> i32 {
        let system = self.live().get(&rec.id).and_then(|live| live.system);
        system.map_or(signal, |init| init.translate(signal))
    }

    async fn exited(&self, rec: &Record) {
        if let Some(live) = self.live().get(&rec.id) {
            live.monitor.release.notify_one();
        }
    }

    async fn delete(&self, rec: &Record) -> Result<()> {
        check_id("container id", &rec.id)?;
        bounded(
            rec,
            "delete",
            "Delete again to remove the rest",
            self.undo(rec, &Folder::of(rec, &rec.id), Poststop::Run),
        )
        .await
    }

    /// The poststop hooks do not run then: nothing else of a delete waits for others.
    async fn erase(&self, rec: &Record, failed: Error) -> Result<()> {
        self.undo(rec, &Folder::of(rec, &rec.id), Poststop::Skip).await?;
        log::warn!(
            "container {} was removed, its poststop hooks did not end: {failed}",
            rec.id
        );
        Ok(())
    }

    /// Device rules are not among what can be changed: clients send those of the bundle along with every update.
    async fn update(&self, rec: &Record, resources_json: &[u8]) -> Result<()> {
        let resources: LinuxResources = serde_json::from_slice(resources_json)
            .map_err(|e| Error::invalid("the resources are no OCI linux.resources").with_source(e))?;
        let cgroup = rec
            .cgroup
            .clone()
            .ok_or_else(|| Error::not_found(format!("cgroup does not exist: container {}", rec.id)))?;
        limit(rec, cgroup, resources)
            .await
            .map_err(|e| e.context("OCI runtime update failed"))
    }
}

const NO_IO: ChildIo = ChildIo::Pipes {
    stdin: None,
    stdout: None,
    stderr: None,
};

/// Who is gone tells why by other means.
fn gone_is_fine(error: Error) -> Result<()> {
    match error.kind() {
        Kind::Unavailable => Ok(()),
        _ => Err(error),
    }
}

/// Where the cgroups of a container lie.
fn layout(rec: &Record) -> Result<Layout> {
    let below = cgroup::parse::container_path(rec.cgroups_path.as_deref(), rec.options.systemd_cgroup, &rec.id)?
        .ok_or_else(|| {
            Error::invalid("linux.cgroupsPath is the root of the hierarchy; an LXC container needs its own")
        })?;
    let text = |path: &Path| match path.to_str() {
        Some(text) => Ok(format!("/{text}")),
        None => Err(Error::invalid("linux.cgroupsPath is not UTF-8")),
    };
    Ok(Layout {
        container: text(&below)?,
        inner: None,
        monitor: text(&below.with_file_name(format!("lxc.monitor.{}", rec.id)))?,
        pivot: text(&below.with_file_name(format!("lxc.pivot.{}", rec.id)))?,
    })
}

/// Writes limits, and makes systemd keep them.
async fn limit(rec: &Record, cgroup: Cgroup, resources: LinuxResources) -> Result<()> {
    let scope = match rec.options.systemd_cgroup {
        true => Some(systemd::scope_of(rec.cgroups_path.as_deref(), &rec.id)?),
        false => None,
    };
    let bound = bound_of(rec) / 2;
    blocking(move || {
        cgroup.limit(&resources)?;
        let (Some((unit, _)), Cgroup::V2(folder)) = (scope, &cgroup) else {
            return Ok(());
        };
        systemd::keep_limits(&unit, folder, bound)?;
        // It has put back what it has no property for: memory.oom.group.
        cgroup.limit(&resources)
    })
    .await
}

/// The helper's program.
fn helper() -> Result<PathBuf> {
    let own = std::env::current_exe().context(|| "cannot find this program")?;
    let helper = own.with_file_name(HELPER);
    if helper.is_file() {
        return Ok(helper);
    }
    Err(Error::precondition(format!(
        "{} does not exist; the backend lxc needs it beside this program: make install",
        helper.display()
    )))
}

fn bound_of(rec: &Record) -> Duration {
    Duration::from_millis(rec.options.runtime_timeout_ms)
}

async fn bounded<T>(rec: &Record, verb: &str, left_behind: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(bound_of(rec), work)
        .await
        .unwrap_or_else(|_| {
            Err(Error::deadline(format!(
                "LXC was not done within {} ms; {left_behind}",
                rec.options.runtime_timeout_ms
            )))
        })
        .map_err(|e| e.context(format!("OCI runtime {verb} failed")))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    spawn_blocking(work)
        .await
        .unwrap_or_else(|e| Err(Error::unknown("work in the background was given up").with_source(e)))
}
