//! Create: from a bundle to an init that waits for Start.

use std::{
    fs::File,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::Path,
    sync::{Arc, Mutex, OnceLock, atomic::Ordering},
};

use tokio::sync::{Notify, watch};

use super::{
    INNER, KILL_TIMEOUT, LOG_MAX_BYTES, Live, Lxc,
    attend::{Monitor, Told, attend, exit_of, heard},
    blocking,
    blueprint::{self, Blueprint, Choices},
    bound_of,
    config::{Layout, Place},
    folder::{self, Folder, Owner},
    helper, layout, limit, monitor,
    order::{agent, order},
    system::Init,
    undo::Poststop,
    wire::{self, Connection, FromInit, ToInit},
};
use crate::{
    backend::{BoxFuture, ChildIo, Exit, Launched},
    error::{Context, Error, Result},
    host::{
        cgroup::{self, Cgroup},
        command::{self, Child, Command, Pidfd, identity},
        memory_file, systemd,
    },
    task::{bundle::Bundle, record::Record},
};

impl Lxc {
    pub(super) async fn create_unbounded(&self, rec: &Record, bundle: &Bundle, io: ChildIo) -> Result<Launched> {
        let helper = helper()?;
        monitor::check_path(&rec.options.lxc_path)?;
        if rec.options.systemd_cgroup && !cgroup::speaks_v2()? {
            // There systemd writes device rules of its own into a scope, after LXC.
            return Err(Error::unimplemented(
                "the backend lxc makes systemd's scopes on cgroup v2 alone; set systemd_cgroup = false, or use the backend crun",
            ));
        }
        let layout = layout(rec)?;
        let (blueprint, system) = blueprint_of(rec, &bundle.path, &layout).await?;
        let folder = Folder::of(rec, &rec.id);
        let mut mark = self.claim(rec, &folder, &blueprint, &layout).await?;
        let agent = agent(&blueprint.init.process).await?;
        let root = blueprint.init.root.clone();
        let trees = blocking(move || root.open()).await?;

        let (boot, boot_end) = wire::pair()?;
        let (connection, init_end) = wire::pair()?;
        wire::send(boot.as_fd(), &ToInit::Go, &[init_end.as_fd()]).context(|| "cannot write to a new socket")?;
        drop((boot, init_end));
        let connection = Connection::new(connection)?;
        let (child, monitor, log) = self.spawn_monitor(rec, &helper, boot_end)?;
        mark.monitor = Some(identity(child.pid())?);
        let monitor_pid = child.pid();
        tokio::spawn(attend(monitor.clone(), child, log.0));
        folder.mark(&mark)?;

        let answer = self.hello(&connection, &monitor, monitor_pid).await;
        let (pid, process, adopted) = answer.map_err(|e| explain(&log.1, e))?;
        let live = Arc::new(Live {
            init: connection,
            monitor: monitor.clone(),
            poststart: Mutex::new(blueprint.poststart),
            facts: blueprint.init.facts.clone(),
            constrained: blueprint.init.constrained.then(|| blueprint.init.process.clone()),
            system,
        });
        // From here on `delete` lets LXC clean up.
        self.live().insert(rec.id.clone(), live.clone());
        // Init is in the one that it manages, and all that we do is done to the one around it.
        let outer = match system {
            Some(_) => Cgroup::expected(Some(&layout.container), false, &rec.id)?,
            None => None,
        };
        if rec.options.systemd_cgroup {
            enter_scope(rec, pid, outer.clone()).await?;
        }
        // After systemd, which writes limits of its own.
        if let Some(resources) = blueprint.resources {
            let cgroup = match &outer {
                Some(cgroup) => cgroup.clone(),
                None => Cgroup::of_process(pid)?,
            };
            limit(rec, cgroup, resources).await?;
        }
        let before_pivot = blueprint.before_pivot;
        order(&live.init, blueprint.init, None, io, agent, trees).await?;
        loop {
            let packet = heard(&live.init, &monitor).await?;
            match packet.read()? {
                FromInit::Mounted => {
                    let state = live.facts.state("creating", Some(pid));
                    tokio::select! {
                        ran = self.run_hooks(&before_pivot, &state, rec) => ran?,
                        error = monitor.ends() => return Err(error),
                    }
                    live.init.send(&ToInit::Go, &[]).await?;
                }
                FromInit::Created => {
                    if system.is_some() {
                        monitor.hold(packet.fds.into_iter().next());
                    }
                    break;
                }
                FromInit::Failed(failure) => return Err(failure.into()),
                FromInit::Hello => {}
            }
        }
        Ok(Launched {
            pid,
            process: process.clone(),
            exit: exit_of(monitor, process, adopted),
            cgroup: outer,
        })
    }

    /// Takes the name, and clears away what an earlier container of this very bundle has left.
    async fn claim(
        &self,
        rec: &Record,
        folder: &Folder,
        blueprint: &Blueprint,
        layout: &Layout,
    ) -> Result<folder::Mark> {
        if !self.swept.swap(true, Ordering::Relaxed)
            && let Err(e) = folder::sweep(&rec.options.lxc_path)
        {
            log::warn!("cannot clear away what is left of former containers: {e}");
        }
        match folder.owner(&rec.namespace, &rec.bundle)? {
            Owner::Us(_) => {
                log::warn!("container {} is left of a former attempt; it is removed", rec.id);
                self.undo(rec, folder, Poststop::Run).await?;
            }
            Owner::Another(whose) => return Err(folder.taken(&whose)),
            Owner::Nobody => {}
        }
        let mut cgroups = Vec::new();
        for path in [&layout.container, &layout.monitor, &layout.pivot] {
            cgroups.extend(Cgroup::expected(Some(path), false, &rec.id)?);
        }
        // Before the folder is ours: whoever undoes a container of ours ends everybody in them. An LXC container of this name below another
        // lxcpath may have its monitor there.
        for cgroup in &cgroups {
            if cgroup.is_populated()? {
                return Err(Error::precondition(format!(
                    "cgroup {} holds processes of somebody else; choose another id or cgroupsPath, or end them",
                    cgroup.path().display()
                )));
            }
        }
        let mark = folder.claim(rec, &blueprint.items)?;
        // LXC wants to make them.
        for cgroup in cgroups {
            cgroup.remove(KILL_TIMEOUT).await?;
        }
        Ok(mark)
    }

    #[allow(clippy::type_complexity, reason = "used once")]
    fn spawn_monitor(
        &self,
        rec: &Record,
        helper: &Path,
        boot: OwnedFd,
    ) -> Result<(Child, Arc<Monitor>, (Connection, File))> {
        let (ours, theirs) = wire::pair()?;
        let ours = Connection::new(ours)?;
        let log = memory_file(&[])?;
        // Not by its path, where a newer one may have been installed.
        let mut command = Command::new("/proc/self/exe")
            .env_clear()
            .arg0("containerd-shim-proxmox-lxcri-v1")
            .arg(monitor::ACTION)
            .arg(&rec.options.lxc_path)
            .arg(&rec.id)
            .arg(helper)
            .fd(monitor::BOOT_FD, boot)
            .fd(monitor::SHIM_FD, theirs)
            .fd(monitor::HELPER_FD, self.sealed_helper(helper)?)
            .fd(
                monitor::LOG_FD,
                log.try_clone().context(|| "cannot open a file in memory again")?.into(),
            )
            .die_with_parent()
            .process_group();
        for key in ["PATH", monitor::LIBRARY_VARIABLE] {
            if let Some(value) = std::env::var_os(key) {
                command = command.env(key, value);
            }
        }
        let child = self.reaper.spawn(command)?;
        let monitor = Arc::new(Monitor {
            told: watch::Sender::new(Told::default()),
            init: OnceLock::new(),
            release: Notify::new(),
            process: child.pidfd(),
            console: Mutex::default(),
        });
        Ok((child, monitor, (ours, log)))
    }

    /// Waits for init's birth and takes hold of it.
    async fn hello(
        &self,
        connection: &Connection,
        monitor: &Monitor,
        monitor_pid: u32,
    ) -> Result<(u32, Arc<Pidfd>, BoxFuture<'static, Exit>)> {
        let pid = tokio::select! {
            biased;
            packet = connection.receive() => match packet? {
                Some(packet) => match packet.read()? {
                    FromInit::Hello => packet.pid,
                    FromInit::Failed(failure) => return Err(failure.into()),
                    _ => None,
                },
                // The monitor had the other end, and init was not born.
                None => return Err(monitor.fails().await),
            },
            failure = monitor.fails() => return Err(failure),
        };
        let strange = || Error::unknown("init does not tell who it is; is proxmox-lxcri-init of this version?");
        let pid = pid.ok_or_else(strange)?;
        // Before the look at its parent: what is reaped from here on is told, what was reaped before has no parent.
        let _ = monitor.init.set(pid);
        let (process, adopted) = self.reaper.adopt(pid)?;
        // The descriptor names whoever has the number; LXC's child has had it since before it spoke.
        if command::parent(pid)? != monitor_pid {
            return Err(strange());
        }
        Ok((pid, process, adopted))
    }
}

async fn blueprint_of(rec: &Record, bundle: &Path, layout: &Layout) -> Result<(Blueprint, Option<Init>)> {
    let (id, bundle, mut layout) = (rec.id.clone(), bundle.to_path_buf(), layout.clone());
    let choices = Choices {
        no_pivot_root: rec.options.no_pivot_root,
        no_new_keyring: rec.options.no_new_keyring,
    };
    blocking(move || {
        let mut spec = blueprint::read_spec(&bundle)?;
        let v2 = cgroup::speaks_v2()?;
        let system = Init::of_bundle(&spec, &bundle);
        if let Some(init) = system {
            init.adapt(&mut spec)?;
            if !init.can_end(&spec) {
                log::warn!(
                    "container {id}: its init ({init:?}) powers off by reboot(2), and has no CAP_SYS_BOOT: when it is halted its \
                     services end, and it goes on until SIGKILL"
                );
            }
            // Of v1 it gets no hierarchy to manage that has limits.
            layout.inner = v2.then(|| INNER.to_owned());
        }
        let place = Place {
            layout: &layout,
            v2,
            time: Path::new("/proc/self/ns/time").exists(),
            system,
        };
        Ok((Blueprint::of(&spec, &id, &bundle, &place, choices)?, system))
    })
    .await
}

/// Makes the cgroup in which LXC has put init a scope of systemd's, so that systemd keeps its hands off what is in it. Of a system it
/// is the one around init's, `outer`.
async fn enter_scope(rec: &Record, init: u32, outer: Option<Cgroup>) -> Result<()> {
    let (unit, slice) = systemd::scope_of(rec.cgroups_path.as_deref(), &rec.id)?;
    let description = format!("LXC container {} of containerd's namespace {}", rec.id, rec.namespace);
    // Its own error tells more than that of the whole create.
    let bound = bound_of(rec) / 2;
    blocking(move || {
        let start = || systemd::start_scope(&unit, &slice, &description, &[init], bound);
        match outer {
            Some(outer) => outer.lift(INNER, init, start),
            None => start(),
        }
    })
    .await
}

/// An error with what LXC has written about it.
fn explain(log: &File, error: Error) -> Error {
    let mut text = vec![0; LOG_MAX_BYTES];
    let read = log.read_at(&mut text, 0).unwrap_or(0);
    text.truncate(read);
    let text = String::from_utf8_lossy(&text);
    // "lxc c1 20261126… ERROR    start - ../src/lxc/start.c:…:function:123 - Reason"
    let reasons: Vec<&str> = text.lines().filter_map(|line| line.splitn(3, " - ").nth(2)).collect();
    match reasons.is_empty() {
        true => error,
        false => Error::new(error.kind(), format!("{error}: {}", reasons.join("; "))),
    }
}
