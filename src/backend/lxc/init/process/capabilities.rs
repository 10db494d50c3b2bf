//! The five capability sets of a process.

use nix::errno::Errno;
use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities};
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};

/// Masks of capabilities: bit n is the one with the number n (linux/capability.h).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sets {
    /// What the process and its descendants can ever get.
    pub bounding: u64,
    /// What counts now.
    pub effective: u64,
    /// What files with inheritable capabilities may give.
    pub inheritable: u64,
    /// What can be made effective.
    pub permitted: u64,
    /// What programs without file capabilities keep. The kernel lets only those in that are permitted and inheritable.
    pub ambient: u64,
}

impl Sets {
    /// `process.capabilities`. Without it a process has none, as with crun.
    ///
    /// # Errors
    /// `InvalidArgument` for what capset(2) would refuse: effective ones that are not permitted, inheritable ones that are not in the
    /// bounding set. Ambient ones that are not both permitted and inheritable are no error with crun and runc, and have no effect.
    pub fn of(capabilities: Option<&LinuxCapabilities>) -> Result<Self> {
        let Some(sets) = capabilities else {
            return Ok(Self::default());
        };
        within("effective", sets.effective(), "permitted", sets.permitted())?;
        within("inheritable", sets.inheritable(), "bounding", sets.bounding())?;
        Ok(Self {
            bounding: mask(sets.bounding()),
            effective: mask(sets.effective()),
            inheritable: mask(sets.inheritable()),
            permitted: mask(sets.permitted()),
            ambient: mask(sets.ambient()),
        })
    }
}

/// Every capability of one set must be in the other.
fn within(name: &str, set: &Option<Capabilities>, other: &str, among: &Option<Capabilities>) -> Result<()> {
    let among = mask(among);
    let stray = set.iter().flatten().filter(|one| among & 1 << number(**one) == 0);
    // The sets are hashed; the error is the same each time.
    match stray.min_by_key(|one| number(**one)) {
        Some(one) => Err(Error::invalid(format!(
            "process.capabilities.{name}: CAP_{one} is not in {other}"
        ))),
        None => Ok(()),
    }
}

fn mask(set: &Option<Capabilities>) -> u64 {
    set.iter().flatten().fold(0, |mask, one| mask | 1 << number(*one))
}

/// linux/capability.h
fn number(capability: Capability) -> u32 {
    use Capability as C;
    match capability {
        C::Chown => 0,
        C::DacOverride => 1,
        C::DacReadSearch => 2,
        C::Fowner => 3,
        C::Fsetid => 4,
        C::Kill => 5,
        C::Setgid => 6,
        C::Setuid => 7,
        C::Setpcap => 8,
        C::LinuxImmutable => 9,
        C::NetBindService => 10,
        C::NetBroadcast => 11,
        C::NetAdmin => 12,
        C::NetRaw => 13,
        C::IpcLock => 14,
        C::IpcOwner => 15,
        C::SysModule => 16,
        C::SysRawio => 17,
        C::SysChroot => 18,
        C::SysPtrace => 19,
        C::SysPacct => 20,
        C::SysAdmin => 21,
        C::SysBoot => 22,
        C::SysNice => 23,
        C::SysResource => 24,
        C::SysTime => 25,
        C::SysTtyConfig => 26,
        C::Mknod => 27,
        C::Lease => 28,
        C::AuditWrite => 29,
        C::AuditControl => 30,
        C::Setfcap => 31,
        C::MacOverride => 32,
        C::MacAdmin => 33,
        C::Syslog => 34,
        C::WakeAlarm => 35,
        C::BlockSuspend => 36,
        C::AuditRead => 37,
        C::Perfmon => 38,
        C::Bpf => 39,
        C::CheckpointRestore => 40,
    }
}

const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: libc::c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Half {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// prctl(2) with numbers only.
pub(super) fn prctl(option: libc::c_int, a: u64, b: u64) -> nix::Result<()> {
    // SAFETY: none of the options used here takes a pointer.
    let result = unsafe { libc::syscall(libc::SYS_prctl, option, a, b, 0, 0) };
    Errno::result(result).map(drop)
}

/// Takes all capabilities out of the bounding set that are not in `bounding`, those too of which this program has not heard.
pub(super) fn bound(bounding: u64) -> Result<()> {
    for number in 0..64 {
        if bounding & 1 << number != 0 {
            continue;
        }
        match prctl(libc::PR_CAPBSET_DROP, number, 0) {
            // The kernel has no such capability, nor one with a greater number.
            Err(Errno::EINVAL) => break,
            other => other.context(|| format!("cannot drop capability {number} from the bounding set"))?,
        }
    }
    Ok(())
}

/// What this thread may have: (permitted, bounding).
fn have() -> Result<(u64, u64)> {
    let mut header = Header {
        version: CAPABILITY_VERSION_3,
        pid: 0,
    };
    let mut halves = [Half::default(); 2];
    // SAFETY: a header of version 3 and the two halves that belong to it, alive for the call.
    let result = unsafe { libc::syscall(libc::SYS_capget, &mut header, halves.as_mut_ptr()) };
    Errno::result(result).context(|| "cannot read the capabilities")?;
    let permitted = u64::from(halves[1].permitted) << 32 | u64::from(halves[0].permitted);
    let mut bounding = 0;
    for number in 0..64_u64 {
        // SAFETY: only numbers.
        if unsafe { libc::syscall(libc::SYS_prctl, libc::PR_CAPBSET_READ, number, 0, 0, 0) } == 1 {
            bounding |= 1 << number;
        }
    }
    Ok((permitted, bounding))
}

/// Sets all but the bounding set. What this process does not have itself is left out, as runc does: a node that has dropped a capability
/// runs containers that ask for it.
pub(super) fn set(sets: &Sets) -> Result<()> {
    let (held, bounding) = have()?;
    let permitted = sets.permitted & held;
    let effective = sets.effective & permitted;
    let inheritable = sets.inheritable & bounding;
    let mut header = Header {
        version: CAPABILITY_VERSION_3,
        pid: 0,
    };
    let half = |shift: u32| Half {
        effective: (effective >> shift) as u32,
        permitted: (permitted >> shift) as u32,
        inheritable: (inheritable >> shift) as u32,
    };
    let mut halves = [half(0), half(32)];
    // SAFETY: a header of version 3 and the two halves that belong to it, alive for the call.
    let result = unsafe { libc::syscall(libc::SYS_capset, &mut header, halves.as_mut_ptr()) };
    Errno::result(result).context(|| "cannot set the capabilities")?;
    prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as u64, 0)
        .context(|| "cannot clear the ambient capabilities")?;
    for number in (0..64).filter(|number| sets.ambient & 1 << number != 0) {
        match prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE as u64, number) {
            // Unknown to the kernel, or not both permitted and inheritable: crun goes on.
            Ok(()) | Err(Errno::EINVAL | Errno::EPERM) => {}
            Err(error) => Err(error).context(|| format!("cannot raise the ambient capability {number}"))?,
        }
    }
    Ok(())
}
