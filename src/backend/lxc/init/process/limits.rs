//! What the kernel grants a process: resource limits, scheduling, processors, the OOM score.
//!
//! All of it can be set from the outside by number, and some of it has to be: in a user namespace nobody may raise a hard limit or lower an
//! OOM score.

use nix::errno::Errno;
use oci_spec::runtime::{
    IOPriorityClass, LinuxIOPriority, LinuxSchedulerFlag, LinuxSchedulerPolicy, PosixRlimit, PosixRlimitType,
    Scheduler as OciScheduler,
};
use serde::{Deserialize, Serialize};

use crate::{
    backend::lxc::init::proc::Proc,
    error::{Context, Error, Result},
};

/// A resource limit, as for prlimit(2). `u64::MAX` is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rlimit {
    /// `RLIMIT_*`
    pub resource: u32,
    /// What counts.
    pub soft: u64,
    /// How far the process can raise it.
    pub hard: u64,
}

/// `struct sched_attr` of sched_setattr(2) without its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scheduler {
    /// `SCHED_*`
    pub policy: u32,
    /// `SCHED_FLAG_*`
    pub flags: u64,
    /// For SCHED_OTHER and SCHED_BATCH.
    pub nice: i32,
    /// For SCHED_FIFO and SCHED_RR.
    pub priority: u32,
    /// Nanoseconds, for SCHED_DEADLINE.
    pub runtime: u64,
    /// Nanoseconds, for SCHED_DEADLINE.
    pub deadline: u64,
    /// Nanoseconds, for SCHED_DEADLINE; 0 for that of `deadline`.
    pub period: u64,
}

/// An inclusive range of processors.
pub type Cpus = (u32, u32);

/// `execCPUAffinity` (OCI config.md): for an exec only.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Affinity {
    /// While the process moves into the container's cgroup.
    pub initial: Option<Vec<Cpus>>,
    /// From then on.
    pub last: Option<Vec<Cpus>>,
}

/// As many processors as a mask of ours can name; Linux is built for 8192 at most.
const MAX_CPUS: u32 = 8192;

/// What SCHED_DEADLINE calls the least runtime.
const DEADLINE_MIN_NS: u64 = 1 << 10;

impl Rlimit {
    pub(super) fn list(rlimits: &[PosixRlimit]) -> Result<Vec<Self>> {
        let mut list: Vec<Self> = Vec::new();
        for (index, rlimit) in rlimits.iter().enumerate() {
            let (name, resource) = (rlimit.typ(), resource(rlimit.typ()));
            if list.iter().any(|other| other.resource == resource) {
                return Err(Error::invalid(format!(
                    "process.rlimits[{index}].type: {name} is there twice"
                )));
            }
            if rlimit.soft() > rlimit.hard() {
                return Err(Error::invalid(format!(
                    "process.rlimits[{index}].soft: {name} {} is more than hard, {}",
                    rlimit.soft(),
                    rlimit.hard()
                )));
            }
            list.push(Self {
                resource,
                soft: rlimit.soft(),
                hard: rlimit.hard(),
            });
        }
        Ok(list)
    }

    /// Sets the limit of a process; 0 is this one.
    pub(super) fn set(&self, pid: libc::pid_t) -> Result<()> {
        let new = libc::rlimit64 {
            rlim_cur: self.soft,
            rlim_max: self.hard,
        };
        // SAFETY: `new` is a rlimit64 that outlives the call; the old one is not asked for.
        let result = unsafe {
            libc::syscall(
                libc::SYS_prlimit64,
                pid,
                self.resource,
                std::ptr::from_ref(&new),
                std::ptr::null_mut::<libc::rlimit64>(),
            )
        };
        Errno::result(result).map(drop).context(|| {
            format!(
                "cannot set process.rlimits {} to {}:{}",
                name(self.resource),
                self.soft,
                self.hard
            )
        })
    }
}

#[allow(clippy::unnecessary_cast, reason = "musl has signed numbers")]
const RESOURCES: [(PosixRlimitType, u32); 16] = [
    (PosixRlimitType::RlimitCpu, libc::RLIMIT_CPU as u32),
    (PosixRlimitType::RlimitFsize, libc::RLIMIT_FSIZE as u32),
    (PosixRlimitType::RlimitData, libc::RLIMIT_DATA as u32),
    (PosixRlimitType::RlimitStack, libc::RLIMIT_STACK as u32),
    (PosixRlimitType::RlimitCore, libc::RLIMIT_CORE as u32),
    (PosixRlimitType::RlimitRss, libc::RLIMIT_RSS as u32),
    (PosixRlimitType::RlimitNproc, libc::RLIMIT_NPROC as u32),
    (PosixRlimitType::RlimitNofile, libc::RLIMIT_NOFILE as u32),
    (PosixRlimitType::RlimitMemlock, libc::RLIMIT_MEMLOCK as u32),
    (PosixRlimitType::RlimitAs, libc::RLIMIT_AS as u32),
    (PosixRlimitType::RlimitLocks, libc::RLIMIT_LOCKS as u32),
    (PosixRlimitType::RlimitSigpending, libc::RLIMIT_SIGPENDING as u32),
    (PosixRlimitType::RlimitMsgqueue, libc::RLIMIT_MSGQUEUE as u32),
    (PosixRlimitType::RlimitNice, libc::RLIMIT_NICE as u32),
    (PosixRlimitType::RlimitRtprio, libc::RLIMIT_RTPRIO as u32),
    (PosixRlimitType::RlimitRttime, libc::RLIMIT_RTTIME as u32),
];

fn resource(name: PosixRlimitType) -> u32 {
    // Each has its line.
    RESOURCES
        .iter()
        .find(|(known, _)| *known == name)
        .map_or(u32::MAX, |(_, number)| *number)
}

fn name(resource: u32) -> String {
    RESOURCES
        .iter()
        .find(|(_, number)| *number == resource)
        .map_or_else(|| resource.to_string(), |(name, _)| name.to_string())
}

impl Scheduler {
    pub(super) fn of(scheduler: &OciScheduler) -> Result<Self> {
        use LinuxSchedulerPolicy as P;
        let bad = |field: &str, why: String| Err(Error::invalid(format!("process.scheduler.{field}: {why}")));
        let name = *scheduler.policy();
        let policy = match name {
            P::SchedOther => libc::SCHED_OTHER,
            P::SchedFifo => libc::SCHED_FIFO,
            P::SchedRr => libc::SCHED_RR,
            P::SchedBatch => libc::SCHED_BATCH,
            P::SchedIdle => libc::SCHED_IDLE,
            P::SchedDeadline => libc::SCHED_DEADLINE,
            P::SchedIso => return bad("policy", "Linux has no SCHED_ISO".into()),
        };
        let nice = scheduler.nice().unwrap_or(0);
        if !(-20..=19).contains(&nice) {
            return bad("nice", format!("{nice} is not from -20 to 19"));
        }
        if nice != 0 && !matches!(name, P::SchedOther | P::SchedBatch) {
            return bad("nice", format!("{name} has none; leave it out"));
        }
        let priority = scheduler.priority().unwrap_or(0);
        match name {
            P::SchedFifo | P::SchedRr if !(1..=99).contains(&priority) => {
                return bad("priority", format!("{priority} is not from 1 to 99"));
            }
            P::SchedFifo | P::SchedRr => {}
            _ if priority != 0 => return bad("priority", format!("{name} has none; leave it out")),
            _ => {}
        }
        let [runtime, deadline, period] =
            [scheduler.runtime(), scheduler.deadline(), scheduler.period()].map(|value| value.unwrap_or(0));
        for (field, value) in [("runtime", runtime), ("deadline", deadline), ("period", period)] {
            if value != 0 && name != P::SchedDeadline {
                return bad(field, format!("{name} has none; leave it out"));
            }
            if value > i64::MAX as u64 {
                return bad(field, format!("{value} is too great"));
            }
        }
        if name == P::SchedDeadline {
            if runtime < DEADLINE_MIN_NS {
                return bad("runtime", format!("{runtime} is less than {DEADLINE_MIN_NS}"));
            }
            if deadline < runtime {
                return bad("deadline", format!("{deadline} is less than runtime, {runtime}"));
            }
            if period != 0 && period < deadline {
                return bad("period", format!("{period} is less than deadline, {deadline}"));
            }
        }
        let mut flags = 0;
        for (index, flag) in scheduler.flags().iter().flatten().enumerate() {
            use LinuxSchedulerFlag as F;
            flags |= match flag {
                F::SchedResetOnFork => libc::SCHED_FLAG_RESET_ON_FORK,
                F::SchedFlagReclaim => libc::SCHED_FLAG_RECLAIM,
                F::SchedFlagDLOverrun => libc::SCHED_FLAG_DL_OVERRUN,
                F::SchedFlagKeepPolicy => libc::SCHED_FLAG_KEEP_POLICY,
                F::SchedFlagKeepParams => libc::SCHED_FLAG_KEEP_PARAMS,
                F::SchedFlagUtilClampMin | F::SchedFlagUtilClampMax => {
                    return bad(
                        &format!("flags[{index}]"),
                        format!("{flag}: OCI has no field for the value of a clamp; leave it out"),
                    );
                }
            } as u64;
        }
        Ok(Self {
            policy: policy as u32,
            flags,
            nice,
            priority: priority as u32,
            runtime,
            deadline,
            period,
        })
    }

    pub(super) fn set(&self, pid: libc::pid_t) -> Result<()> {
        #[repr(C)]
        struct Attributes {
            size: u32,
            policy: u32,
            flags: u64,
            nice: i32,
            priority: u32,
            runtime: u64,
            deadline: u64,
            period: u64,
        }
        let attributes = Attributes {
            size: size_of::<Attributes>() as u32,
            policy: self.policy,
            flags: self.flags,
            nice: self.nice,
            priority: self.priority,
            runtime: self.runtime,
            deadline: self.deadline,
            period: self.period,
        };
        // SAFETY: the first version of `struct sched_attr`, with its size in it, alive for the call.
        let result = unsafe { libc::syscall(libc::SYS_sched_setattr, pid, std::ptr::from_ref(&attributes), 0) };
        Errno::result(result)
            .map(drop)
            .context(|| "cannot set process.scheduler")
    }
}

/// `process.ioPriority` as a value of ioprio_set(2).
pub(super) fn io_priority(priority: &LinuxIOPriority) -> Result<u16> {
    let class: u16 = match priority.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    match u16::try_from(priority.priority()) {
        Ok(level @ 0..=7) => Ok(class << 13 | level),
        _ => Err(Error::invalid(format!(
            "process.ioPriority.priority: {} is not from 0 to 7",
            priority.priority()
        ))),
    }
}

pub(super) fn set_io_priority(pid: libc::pid_t, value: u16) -> Result<()> {
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    // SAFETY: ioprio_set takes three integers.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, pid, libc::c_int::from(value)) };
    Errno::result(result)
        .map(drop)
        .context(|| "cannot set process.ioPriority")
}

/// A list as `0-3,7`.
pub(super) fn cpus(list: &str, field: &str) -> Result<Vec<Cpus>> {
    let range = |text: &str| -> Option<Cpus> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let (first, last) = (first.parse().ok()?, last.parse().ok()?);
        (first <= last && last < MAX_CPUS).then_some((first, last))
    };
    list.split(',').map(range).collect::<Option<_>>().ok_or_else(|| {
        Error::invalid(format!(
            "process.execCPUAffinity.{field}: {list:?} is no list of processors from 0 to {} such as \"0-3,7\"",
            MAX_CPUS - 1
        ))
    })
}

/// Binds a process to processors; 0 is this one.
///
/// # Errors
/// `InvalidArgument` when the machine or the cpuset has none of them; the operating system's.
pub fn set_cpus(pid: libc::pid_t, cpus: &[Cpus]) -> Result<()> {
    let mut mask = vec![0_u64; MAX_CPUS as usize / 64];
    for cpu in cpus.iter().flat_map(|(first, last)| *first..=*last) {
        if let Some(word) = mask.get_mut(cpu as usize / 64) {
            *word |= 1 << (cpu % 64);
        }
    }
    // SAFETY: the mask has the length that is told, and outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_sched_setaffinity,
            pid,
            size_of_val(mask.as_slice()),
            mask.as_ptr(),
        )
    };
    match Errno::result(result) {
        Err(Errno::EINVAL) => Err(Error::invalid(format!(
            "process.execCPUAffinity: the container may use none of the processors {cpus:?}"
        ))),
        other => other.map(drop).context(|| "cannot set process.execCPUAffinity"),
    }
}

/// Writes `process.oomScoreAdj` of a process.
pub(super) fn set_oom_score(proc: &Proc, pid: Option<libc::pid_t>, score: i32) -> Result<()> {
    let folder = pid.map_or_else(|| "self".to_owned(), |pid| pid.to_string());
    let file = format!("{folder}/oom_score_adj");
    let text = score.to_string();
    // Lowering needs CAP_SYS_RESOURCE in the first user namespace; staying where one is does not.
    if proc.read(&file).is_ok_and(|now| now.trim() == text) {
        return Ok(());
    }
    proc.write(&file, &text)
        .context(|| format!("cannot set process.oomScoreAdj to {score}"))
}
