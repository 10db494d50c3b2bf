//! What becomes of a process before it becomes the user's program.
//!
//! ```text
//! the shim     Process::of, of_exec     the OCI document, checked; an error names the field
//! the helper   find, label              at create, in the container's root: an error of Create
//!              constrain                by the helper, or by the shim where a user namespace is in the way
//!              exec                     at start; returns only an error
//! ```
//!
//! What the words of OCI leave open is as with crun, and the place says so.

mod capabilities;
mod exec;
mod filter;
mod limits;
mod program;

use std::path::PathBuf;

use oci_spec::runtime::{Linux, LinuxPersonality, LinuxPersonalityDomain, Process as OciProcess};
use serde::{Deserialize, Serialize};

pub use capabilities::Sets;
pub use exec::Start;
pub use filter::{Agent, agent_message};
pub use limits::{Affinity, Cpus, Rlimit, Scheduler, set_cpus};
pub use program::Program;

use super::{proc::Proc, terminal::Size};
use crate::{
    backend::lxc::seccomp::{self, Filter},
    error::{Context, Error, Result},
};

/// The umask of a process that asks for none, as with crun.
const UMASK: u32 = 0o022;

/// A process as the helper makes it.
///
/// The program of `seccomp` goes as hexadecimal text into the JSON: up to 64 KiB, mostly about 16. Together with a long environment that
/// may be more than a packet of a socket takes, so the whole document is best sent as a file in memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// At least one; the first names the program.
    pub args: Vec<String>,
    /// `NAME=value`, each name once.
    pub env: Vec<String>,
    /// Absolute.
    pub cwd: PathBuf,
    /// As the container's user namespace counts.
    pub uid: u32,
    /// As the container's user namespace counts.
    pub gid: u32,
    /// `user.additionalGids`: replaces the groups of the helper, also when it is empty.
    pub groups: Vec<u32>,
    /// Always set.
    pub umask: u32,
    /// All five sets.
    pub capabilities: Sets,
    /// Each resource once.
    pub rlimits: Vec<Rlimit>,
    /// `noNewPrivileges`
    pub no_new_privileges: bool,
    /// From -1000 to 1000; `None` leaves the helper's.
    pub oom_score_adj: Option<i32>,
    /// The profile from exec on. Without effect where AppArmor is not enabled, as with crun.
    pub apparmor: Option<String>,
    /// The label from exec on. Without effect where SELinux is not enabled, as with crun.
    pub selinux: Option<String>,
    /// `linux.seccomp`
    pub seccomp: Option<Filter>,
    /// `None` leaves the helper's.
    pub scheduler: Option<Scheduler>,
    /// For ioprio_set(2); `None` leaves the helper's.
    pub io_priority: Option<u16>,
    /// For personality(2).
    pub personality: Option<u32>,
    /// For an exec only. [`Affinity::initial`] is for the caller, before it moves into the cgroup.
    pub exec_cpu_affinity: Affinity,
    /// Whether stdio is a terminal.
    pub terminal: bool,
    /// Of the terminal.
    pub console_size: Option<Size>,
}

impl Process {
    /// `process` of a bundle. Blocks (see [`seccomp::compile`]).
    ///
    /// `execCPUAffinity` "is not applicable to the container's init process" (OCI config.md).
    ///
    /// # Errors
    /// `InvalidArgument` with the field that is wrong or that cannot be honoured; those of [`seccomp::compile`].
    pub fn of(process: &OciProcess, linux: Option<&Linux>) -> Result<Self> {
        let args = process.args().clone().unwrap_or_default();
        if args.is_empty() {
            return Err(Error::invalid("process.args: there is no program"));
        }
        for (index, arg) in args.iter().enumerate() {
            text(arg, || format!("process.args[{index}]"))?;
        }
        if process.command_line().as_ref().is_some_and(|line| !line.is_empty()) {
            return Err(Error::invalid("process.commandLine is for Windows; use process.args"));
        }
        let (uid, gid, groups, umask) = user(process)?;
        let oom_score_adj = process.oom_score_adj();
        if let Some(score) = oom_score_adj.filter(|score| !(-1000..=1000).contains(score)) {
            return Err(Error::invalid(format!(
                "process.oomScoreAdj: {score} is not from -1000 to 1000"
            )));
        }
        let terminal = process.terminal().unwrap_or(false);
        Ok(Self {
            args,
            env: environment(process.env().as_deref().unwrap_or_default())?,
            cwd: cwd(process)?,
            uid,
            gid,
            groups,
            umask,
            capabilities: Sets::of(process.capabilities().as_ref())?,
            rlimits: Rlimit::list(process.rlimits().as_deref().unwrap_or_default())?,
            no_new_privileges: process.no_new_privileges().unwrap_or(false),
            oom_score_adj,
            apparmor: label(process.apparmor_profile(), "process.apparmorProfile")?,
            selinux: label(process.selinux_label(), "process.selinuxLabel")?,
            seccomp: linux
                .and_then(|linux| linux.seccomp().as_ref())
                .map(seccomp::compile)
                .transpose()?,
            scheduler: process.scheduler().as_ref().map(Scheduler::of).transpose()?,
            io_priority: process.io_priority().as_ref().map(limits::io_priority).transpose()?,
            personality: linux
                .and_then(|linux| linux.personality().as_ref())
                .map(personality)
                .transpose()?,
            exec_cpu_affinity: Affinity::default(),
            terminal,
            console_size: if terminal { console_size(process)? } else { None },
        })
    }

    /// `process` of an exec in the container whose init has the process `init`; `linux` is the container's.
    ///
    /// What the exec does not say is init's, as with crun: the environment (when it has none at all), the capabilities, the labels.
    ///
    /// # Errors
    /// As [`Process::of`].
    pub fn of_exec(process: &OciProcess, init: &OciProcess, linux: Option<&Linux>) -> Result<Self> {
        let mut whole = process.clone();
        if whole.env().as_ref().is_none_or(Vec::is_empty) {
            whole.set_env(init.env().clone());
        }
        if whole.capabilities().is_none() {
            whole.set_capabilities(init.capabilities().clone());
        }
        if whole.apparmor_profile().is_none() {
            whole.set_apparmor_profile(init.apparmor_profile().clone());
        }
        if whole.selinux_label().is_none() {
            whole.set_selinux_label(init.selinux_label().clone());
        }
        let mut plan = Self::of(&whole, linux)?;
        if let Some(affinity) = process.exec_cpu_affinity() {
            let list = |list: &Option<String>, field| list.as_deref().map(|list| limits::cpus(list, field)).transpose();
            plan.exec_cpu_affinity = Affinity {
                initial: list(affinity.initial(), "initial")?,
                last: list(affinity.cpu_affinity_final(), "final")?,
            };
        }
        Ok(plan)
    }

    /// Sets the OOM score, the scheduler, the I/O priority, the processors and the resource limits, in this order: of process `pid` as
    /// `proc` and the caller's pid namespace count, or of this one.
    ///
    /// In a user namespace nobody may raise a hard limit or lower an OOM score, so for such a container this is for the shim to do,
    /// between create and start, and [`Start::constrained`] says that it was done.
    ///
    /// # Errors
    /// The operating system's, with the field. What was set before stays.
    pub fn constrain(&self, proc: &Proc, pid: Option<libc::pid_t>) -> Result<()> {
        let number = pid.unwrap_or(0);
        if let Some(score) = self.oom_score_adj {
            limits::set_oom_score(proc, pid, score)?;
        }
        if let Some(scheduler) = &self.scheduler {
            scheduler.set(number)?;
        }
        if let Some(value) = self.io_priority {
            limits::set_io_priority(number, value)?;
        }
        if let Some(cpus) = &self.exec_cpu_affinity.last {
            set_cpus(number, cpus)?;
        }
        for rlimit in &self.rlimits {
            rlimit.set(number)?;
        }
        Ok(())
    }
}

/// Keeps the container's processes from reading and tracing this one, which is among them: not even those of the same user may
/// (PR_SET_DUMPABLE). The program's exec ends it. For the helper to call before the container's processes can see it.
///
/// # Errors
/// The operating system's.
pub fn forbid_tracing() -> Result<()> {
    capabilities::prctl(libc::PR_SET_DUMPABLE, 0, 0).context(|| "cannot forbid to be traced")
}

/// A text that goes to the kernel as a C string.
fn text(text: &str, field: impl FnOnce() -> String) -> Result<()> {
    if text.contains('\0') {
        return Err(Error::invalid(format!("{}: there is a NUL in it", field())));
    }
    Ok(())
}

fn label(label: &Option<String>, field: &str) -> Result<Option<String>> {
    let label = label.clone().filter(|label| !label.is_empty());
    if let Some(label) = &label {
        text(label, || field.to_owned())?;
    }
    Ok(label)
}

/// The variables, the last of a name in the place of its first, as with crun and runc.
fn environment(env: &[String]) -> Result<Vec<String>> {
    let mut list: Vec<String> = Vec::new();
    for (index, variable) in env.iter().enumerate() {
        let field = || format!("process.env[{index}]");
        text(variable, field)?;
        let name = match variable.split_once('=') {
            Some((name, _)) if !name.is_empty() => name,
            _ => {
                return Err(Error::invalid(format!("{}: {variable:?} is not NAME=value", field())));
            }
        };
        match list.iter_mut().find(|known| value_of(known, name).is_some()) {
            Some(known) => known.clone_from(variable),
            None => list.push(variable.clone()),
        }
    }
    Ok(list)
}

/// The value of a variable, if this is the one with that name.
fn value_of<'a>(variable: &'a str, name: &str) -> Option<&'a str> {
    variable.strip_prefix(name)?.strip_prefix('=')
}

fn cwd(process: &OciProcess) -> Result<PathBuf> {
    let cwd = process.cwd();
    text(&cwd.to_string_lossy(), || "process.cwd".to_owned())?;
    if !cwd.is_absolute() {
        return Err(Error::invalid(format!(
            "process.cwd: {:?} is no absolute path",
            cwd.display().to_string()
        )));
    }
    Ok(cwd.clone())
}

/// (uid, gid, groups, umask)
fn user(process: &OciProcess) -> Result<(u32, u32, Vec<u32>, u32)> {
    let user = process.user();
    if user.username().as_ref().is_some_and(|name| !name.is_empty()) {
        return Err(Error::invalid(
            "process.user.username is for Windows; use process.user.uid",
        ));
    }
    // For setresuid(2) and its kind -1 is "as it is": root.
    let id = |id: u32, field: &dyn Fn() -> String| match id {
        u32::MAX => Err(Error::invalid(format!("{}: {id} is nobody's", field()))),
        _ => Ok(id),
    };
    let uid = id(user.uid(), &|| "process.user.uid".to_owned())?;
    let gid = id(user.gid(), &|| "process.user.gid".to_owned())?;
    let groups = user.additional_gids().clone().unwrap_or_default();
    for (index, group) in groups.iter().enumerate() {
        id(*group, &|| format!("process.user.additionalGids[{index}]"))?;
    }
    let umask = user.umask().unwrap_or(UMASK);
    if umask > 0o777 {
        return Err(Error::invalid(format!(
            "process.user.umask: {umask} is more than {} (0777)",
            0o777
        )));
    }
    Ok((uid, gid, groups, umask))
}

fn console_size(process: &OciProcess) -> Result<Option<Size>> {
    let Some(size) = process.console_size() else {
        return Ok(None);
    };
    let cells = |cells: u64, field: &str| {
        u16::try_from(cells).map_err(|_| {
            Error::invalid(format!(
                "process.consoleSize.{field}: {cells} is more than {}",
                u16::MAX
            ))
        })
    };
    let (rows, columns) = (cells(size.height(), "height")?, cells(size.width(), "width")?);
    // What clients send that do not know it; crun sets none then.
    Ok((rows != 0 && columns != 0).then_some(Size { rows, columns }))
}

fn personality(personality: &LinuxPersonality) -> Result<u32> {
    if let Some(flag) = personality.flags().iter().flatten().next() {
        return Err(Error::invalid(format!(
            "linux.personality.flags[0]: {flag:?}; OCI knows none yet"
        )));
    }
    // linux/personality.h
    Ok(match personality.domain() {
        LinuxPersonalityDomain::PerLinux => 0,
        LinuxPersonalityDomain::PerLinux32 => 8,
    })
}

#[cfg(test)]
mod tests;
