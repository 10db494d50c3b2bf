//! Exec: a further process in a container that runs.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    HELPER, Lxc, blocking,
    blueprint::{self, Facts},
    gone_is_fine, helper,
    init::{self, ExecPlan, process::Process},
    order::{agent, constrain, order},
    wire::{self, Connection, FromInit, ToInit},
};
use crate::{
    backend::{ChildIo, ExecSpec, Launched},
    error::{Context, Error, Result},
    host::command::{Command, Pidfd, is_alive},
    task::record::Record,
};

impl Lxc {
    pub(super) async fn exec_unbounded(
        &self,
        rec: &Record,
        exec_id: &str,
        spec: &ExecSpec,
        io: ChildIo,
    ) -> Result<Launched> {
        let helper = helper()?;
        let init = rec
            .init
            .filter(is_alive)
            .ok_or_else(|| Error::precondition(format!("container {} is not running", rec.id)))?;
        // It would stand still with the others, before it could say anything.
        if let Some(cgroup) = &rec.cgroup
            && cgroup.is_frozen().unwrap_or(false)
        {
            return Err(Error::precondition(format!("the container `{}` is paused", rec.id)));
        }
        let target = Pidfd::open(init.pid)?;
        let (plan, agent) = self.exec_plan(rec, init.pid, spec).await?;
        // Then all that was read by its number was its own.
        if !is_alive(&init) {
            return Err(Error::precondition(format!("container {} is not running", rec.id)));
        }
        let constrained = (plan.namespaces & libc::CLONE_NEWUSER != 0).then(|| plan.process.clone());
        let (connection, theirs) = wire::pair()?;
        let connection = Connection::new(connection)?;
        // What it makes is our child at once, and may end before its number is known here.
        let hold = self.reaper.hold();
        let command = Command::new(format!("/proc/self/fd/{}", init::HELPER_FD))
            .env_clear()
            .arg0(&helper)
            .arg(init::EXEC)
            .arg(&rec.id)
            .arg(exec_id)
            .fd(init::EXEC_FD, theirs)
            .fd(init::HELPER_FD, self.sealed_helper(&helper)?)
            .die_with_parent()
            .process_group();
        let mut child = self.reaper.spawn(command)?;
        order(&connection, plan, Some(target.as_fd().as_fd()), io, agent, Vec::new()).await?;
        let birth = match connection.receive().await? {
            Some(packet) => match packet.read()? {
                FromInit::Hello => packet.pid,
                FromInit::Failed(failure) => return Err(failure.into()),
                _ => None,
            },
            None => None,
        };
        let Some(pid) = birth else {
            let exit = child.wait().await?;
            return Err(Error::unknown(format!(
                "{HELPER} ended with status {} before it made the process",
                exit.status
            )));
        };
        let (process, exit) = self.reaper.adopt(pid)?;
        let mut unfinished = Unfinished(Some(process.clone()));
        drop(hold);
        child.wait().await?;
        if let Some(process) = constrained {
            constrain(process, pid).await?;
        }
        connection
            .send(&ToInit::Start { pid }, &[])
            .await
            .or_else(gone_is_fine)?;
        // Its end without a word is that of the connection at exec.
        if let Some(packet) = connection.receive().await? {
            return match packet.read()? {
                FromInit::Failed(failure) => Err(failure.into()),
                _ => Err(Error::unknown(format!("{HELPER} says what was not asked"))),
            };
        }
        unfinished.0 = None;
        Ok(Launched {
            pid,
            process,
            exit,
            cgroup: None,
        })
    }

    async fn exec_plan(&self, rec: &Record, init: u32, spec: &ExecSpec) -> Result<(ExecPlan, Option<OwnedFd>)> {
        let mut document: oci_spec::runtime::Process = blueprint::parse(&spec.json, "/scheduler/flags")
            .map_err(|e| e.context("cannot read the process of the exec as an OCI process"))?;
        document.set_terminal(Some(spec.terminal));
        let bundle = rec.bundle.clone();
        let id = rec.id.clone();
        let (process, facts) = blocking(move || {
            // The container's seccomp profile holds for its execs, as with crun.
            let spec = blueprint::read_spec(&bundle)?;
            let init = spec.process().as_ref().unwrap_or(&document);
            let process = Process::of_exec(&document, init, spec.linux().as_ref())?;
            Ok((process, Facts::of(&spec, &id, &bundle)))
        })
        .await?;
        let agent = agent(&process).await?;
        let cgroups = match &rec.cgroup {
            Some(cgroup) => cgroup.joinable(init),
            None => Vec::new(),
        };
        Ok((
            ExecPlan {
                process,
                cgroups,
                namespaces: namespaces_of(init)?,
                facts,
                init,
                keep_keyring: rec.options.no_new_keyring,
            },
            agent,
        ))
    }
}

/// The process of an exec that nobody knows of yet: given up, it is killed, for it may have been told to become the program.
struct Unfinished(Option<Arc<Pidfd>>);

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(process) = &self.0 {
            // It may have ended already.
            let _ = process.signal(libc::SIGKILL);
        }
    }
}

/// The namespaces in which a process is and this one is not, CLONE_NEW*.
fn namespaces_of(pid: u32) -> Result<i32> {
    let mut flags = 0;
    for (name, flag) in [
        ("user", libc::CLONE_NEWUSER),
        ("mnt", libc::CLONE_NEWNS),
        ("pid", libc::CLONE_NEWPID),
        ("ipc", libc::CLONE_NEWIPC),
        ("uts", libc::CLONE_NEWUTS),
        ("net", libc::CLONE_NEWNET),
        ("cgroup", libc::CLONE_NEWCGROUP),
        ("time", CLONE_NEWTIME),
    ] {
        let read = |pid: &str| match std::fs::read_link(format!("/proc/{pid}/ns/{name}")) {
            // A kernel without namespaces of this kind.
            Err(e) if e.kind() == io::ErrorKind::NotFound && Path::new(&format!("/proc/{pid}/ns")).exists() => {
                Ok(PathBuf::new())
            }
            link => link.context(|| format!("cannot see the namespaces of process {pid}")),
        };
        if read("self")? != read(&pid.to_string())? {
            flags |= flag;
        }
    }
    Ok(flags)
}

const CLONE_NEWTIME: i32 = 0x80;
