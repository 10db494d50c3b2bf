//! Loads `linux.seccomp`, and hands the descriptor of its notifications to the agent.
//!
//! From the moment in which a filter with a listener is loaded, each system call of the loader may be one that waits for the agent's
//! answer. So a second thread hands the descriptor over: it shares the table of descriptors and is not filtered, since a filter is for the
//! thread that loads it. Both talk through memory. A thread and not a process, because the user's program must not find a child that
//! it has not made; exec ends all other threads.

use std::{
    hint::spin_loop,
    io,
    os::fd::{AsFd, FromRawFd, OwnedFd},
    sync::{
        Arc, Barrier,
        atomic::{AtomicI32, Ordering},
    },
    thread,
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::{
        socket::{setsockopt, sockopt::SendTimeout},
        time::TimeVal,
    },
};
use serde_json::json;

use crate::{
    backend::lxc::{blueprint::OCI_VERSION, init::send_descriptor, seccomp::Filter},
    error::{Context, Error, Result},
};

/// How long an agent may not read; then its descriptor is closed, so that system calls meant for it fail with ENOSYS.
const AGENT_TIMEOUT_SECONDS: i64 = 10;

/// How often the second thread looks for the descriptor, between the begin of [`Process::exec`](super::Process::exec) and the filter.
const LOOK: Duration = Duration::from_micros(100);

const STACK_BYTES: usize = 64 << 10;

/// Who answers SCMP_ACT_NOTIFY.
#[derive(Debug)]
pub struct Agent {
    /// A unix stream socket, connected to `linux.seccomp.listenerPath`.
    pub socket: OwnedFd,
    /// [`agent_message`]
    pub message: String,
}

/// The container process state (OCI runtime.md), as it is sent to an agent. `pid` is the process's on the host, `state` the OCI state of
/// the container ([`Facts::state`](crate::backend::lxc::blueprint::Facts::state)).
pub fn agent_message(metadata: Option<&str>, pid: u32, state: &serde_json::Value) -> String {
    let mut message = json!({ "ociVersion": OCI_VERSION, "fds": ["seccompFd"], "pid": pid, "state": state });
    if let Some(metadata) = metadata {
        message["metadata"] = metadata.into();
    }
    message.to_string()
}

/// What both threads write and read.
#[derive(Debug)]
struct Hand {
    /// The descriptor, [`NONE`] before there is one, [`NEVER`] when there will be none.
    listener: AtomicI32,
    /// 0 when it is with the agent, an errno when that failed, [`NONE`] before.
    done: AtomicI32,
}

const NONE: i32 = -1;
const NEVER: i32 = -2;

/// A filter that can be loaded now.
pub(super) struct Loader<'a> {
    filter: &'a Filter,
    hand: Option<Arc<Hand>>,
}

impl<'a> Loader<'a> {
    /// Starts the second thread when the filter has a listener.
    pub(super) fn new(filter: &'a Filter, agent: Option<Agent>) -> Result<Self> {
        let hand = match (&filter.listener, agent) {
            (None, _) => None,
            (Some(listener), None) => {
                return Err(Error::precondition(format!(
                    "linux.seccomp.listenerPath: nobody has connected to {}",
                    listener.path.display()
                )));
            }
            (Some(_), Some(agent)) => {
                setsockopt(&agent.socket, SendTimeout, &TimeVal::new(AGENT_TIMEOUT_SECONDS, 0))
                    .context(|| "cannot prepare the socket of the seccomp agent")?;
                let hand = Arc::new(Hand {
                    listener: AtomicI32::new(NONE),
                    done: AtomicI32::new(NONE),
                });
                let theirs = hand.clone();
                // Until it has left this thread's policy and processor, which it may have to share with a loader that never sleeps.
                let ready = Arc::new(Barrier::new(2));
                let theirs_ready = ready.clone();
                thread::Builder::new()
                    .stack_size(STACK_BYTES)
                    .spawn(move || hand_over(&theirs, &theirs_ready, agent))
                    .context(|| "cannot start the thread that hands the seccomp listener over")?;
                ready.wait();
                Some(hand)
            }
        };
        Ok(Self { filter, hand })
    }

    /// Loads it. With a listener, this thread makes no system call from then on until the descriptor is gone.
    pub(super) fn load(self) -> Result<()> {
        // There is no thread that would have to follow, and the second one must not.
        let flags = self.filter.flags & !(libc::SECCOMP_FILTER_FLAG_TSYNC | libc::SECCOMP_FILTER_FLAG_TSYNC_ESRCH);
        let Some(hand) = &self.hand else {
            return match self.set(flags) {
                // A kernel that lacks one of the flags: crun does without them.
                Err(Errno::EINVAL) if flags != 0 => self.set(0),
                other => other,
            }
            .map(drop)
            .context(|| "cannot load linux.seccomp");
        };
        let listener = self
            .set(flags)
            .context(|| "cannot load linux.seccomp with a listener")?;
        hand.listener.store(listener, Ordering::Release);
        loop {
            match hand.done.load(Ordering::Acquire) {
                NONE => spin_loop(),
                0 => return Ok(()),
                errno => {
                    return Err(io::Error::from_raw_os_error(errno))
                        .context(|| "cannot send the seccomp listener to linux.seccomp.listenerPath");
                }
            }
        }
    }

    fn set(&self, flags: u64) -> nix::Result<i32> {
        let program = libc::sock_fprog {
            // At most 4096.
            len: (self.filter.program.len() / size_of::<libc::sock_filter>()) as u16,
            filter: self.filter.program.as_ptr().cast_mut().cast(),
        };
        // SAFETY: the kernel copies `len` instructions from where the pointer says, at any alignment; that many are there.
        let result = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                flags,
                std::ptr::from_ref(&program),
            )
        };
        Errno::result(result).map(|result| result as i32)
    }
}

impl Drop for Loader<'_> {
    fn drop(&mut self) {
        if let Some(hand) = &self.hand {
            // Only when there never was one.
            let _ = hand
                .listener
                .compare_exchange(NONE, NEVER, Ordering::AcqRel, Ordering::Acquire);
        }
    }
}

/// The second thread.
fn hand_over(hand: &Hand, ready: &Barrier, agent: Agent) {
    // The loader waits on a processor. One with a real-time policy, set before, would keep a thread like itself off that processor.
    let parameter = libc::sched_param { sched_priority: 0 };
    let everywhere = [u64::MAX; 128];
    // SAFETY: the parameter and the mask, whose size is told, outlive the calls. Everybody may do both for itself; a failure is no harm.
    unsafe {
        libc::syscall(
            libc::SYS_sched_setscheduler,
            0,
            libc::SCHED_OTHER,
            std::ptr::from_ref(&parameter),
        );
        libc::syscall(
            libc::SYS_sched_setaffinity,
            0,
            size_of_val(&everywhere),
            everywhere.as_ptr(),
        );
    }
    ready.wait();
    let listener = loop {
        match hand.listener.load(Ordering::Acquire) {
            NONE => thread::sleep(LOOK),
            NEVER => return,
            listener => break listener,
        }
    };
    // SAFETY: seccomp(2) has just made it, and the loader leaves it to this thread.
    let listener = unsafe { OwnedFd::from_raw_fd(listener) };
    let sent = send_descriptor(agent.socket.as_fd(), listener.as_fd(), agent.message.as_bytes());
    // Before the word: the loader goes on to exec.
    drop((listener, agent));
    hand.done
        .store(sent.err().map_or(0, |errno| errno as i32), Ordering::Release);
}
