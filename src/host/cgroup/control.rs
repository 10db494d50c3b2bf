//! Freeze, signals and removal of a container's cgroup.

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
    time::Duration,
};

use tokio::time::{Instant, sleep, timeout};

use super::{Cgroup, is_gone, parse::Keyed, read, tree, watch::Changes, write};
use crate::error::{Error, Result};

/// Pauses between looks at what v1 (and a busy cgroup) tells nobody: this long at first, then twice as long each time.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
/// The longest of these pauses.
const LONGEST_PAUSE: Duration = Duration::from_millis(50);
/// How long a freeze may take that only makes a kill surer.
const SNAPSHOT_BOUND: Duration = Duration::from_millis(100);
/// How many processes are held by a descriptor at once.
const SIGNAL_CHUNK: usize = 64;
/// How many pids an error message lists.
const NAMED_PIDS: usize = 8;

/// The pauses between looks.
struct Pauses(Duration);

impl Pauses {
    fn new() -> Self {
        Self(FIRST_PAUSE)
    }

    async fn pause(&mut self) {
        sleep(self.0).await;
        self.0 = (self.0 * 2).min(LONGEST_PAUSE);
    }
}

/// Takes a freeze back unless it succeeded, also when the caller's future is dropped half-way.
struct ThawOnDrop<'a>(Option<&'a Cgroup>);

impl Drop for ThawOnDrop<'_> {
    fn drop(&mut self) {
        if let Some(cgroup) = self.0.take()
            && let Err(e) = cgroup.request_frozen(false)
            && !is_gone(&e)
        {
            log::warn!(
                "cannot take back the freeze of cgroup {}: {e}",
                cgroup.folder().display()
            );
        }
    }
}

impl Cgroup {
    /// Whether all processes are frozen, by this cgroup or one above it.
    ///
    /// # Errors
    /// `NotFound` "cgroup does not exist", `Unimplemented` where the kernel has no freezer, else the operating system's.
    pub fn is_frozen(&self) -> Result<bool> {
        let (folder, file) = self.freezer()?;
        let file = if self.is_v2() { "cgroup.events" } else { file };
        let text = read(&folder.join(file)).map_err(|e| self.freezer_error(e, folder))?;
        Ok(match self {
            Self::V2(_) => Keyed::parse(&text).get("frozen") == Some(1),
            Self::V1(_) => text.trim() == "FROZEN",
        })
    }

    /// Stops every process of the cgroup and below (containerd task API, Pause) and waits until they have stopped. Idempotent.
    ///
    /// On failure, when `bound` is over, and when cancelled, the freeze is taken back.
    ///
    /// # Errors
    /// `DeadlineExceeded`; `NotFound` "cgroup does not exist"; `Unimplemented` where the kernel has no freezer; else the operating
    /// system's.
    pub async fn freeze(&self, bound: Duration) -> Result<()> {
        self.freezer()?;
        let mut guard = ThawOnDrop(Some(self));
        self.set_frozen(true, bound).await?;
        guard.0 = None;
        Ok(())
    }

    /// Lets the processes run again (containerd task API, Resume). Idempotent.
    ///
    /// # Errors
    /// As [`Cgroup::freeze`]; `DeadlineExceeded` too when a cgroup above is frozen. The request stands then, and takes effect as
    /// soon as it can.
    pub async fn thaw(&self, bound: Duration) -> Result<()> {
        self.set_frozen(false, bound).await
    }

    async fn set_frozen(&self, frozen: bool, bound: Duration) -> Result<()> {
        let (folder, _) = self.freezer()?;
        match timeout(bound, self.reach_frozen(folder, frozen)).await {
            Ok(done) => done.map_err(|e| self.freezer_error(e, folder)),
            Err(_) => Err(Error::deadline(format!(
                "cannot {} cgroup {} within {bound:?}; {}",
                if frozen { "freeze" } else { "thaw" },
                folder.display(),
                if frozen {
                    "the freeze was taken back"
                } else {
                    "a cgroup above may be frozen"
                }
            ))),
        }
    }

    async fn reach_frozen(&self, folder: &Path, frozen: bool) -> io::Result<()> {
        match self {
            Self::V2(_) => {
                let events = Changes::open(&folder.join("cgroup.events"))?;
                self.request_frozen(frozen)?;
                let wanted = Some(u64::from(frozen));
                events.wait(|text| Keyed::parse(text).get("frozen") == wanted).await
            }
            // v1 tells nobody, and a process that was just forking may keep it at FREEZING until it is asked again
            // (cgroup-v1/freezer-subsystem.rst).
            Self::V1(_) => {
                let wanted = if frozen { "FROZEN" } else { "THAWED" };
                let mut pauses = Pauses::new();
                loop {
                    self.request_frozen(frozen)?;
                    if read(&folder.join("freezer.state"))?.trim() == wanted {
                        return Ok(());
                    }
                    pauses.pause().await;
                }
            }
        }
    }

    /// Asks for it and does not wait.
    fn request_frozen(&self, frozen: bool) -> io::Result<()> {
        let (folder, file) = self.freezer().map_err(io::Error::other)?;
        write(&folder.join(file), self.frozen_value(frozen))
    }

    fn frozen_value(&self, frozen: bool) -> &'static str {
        match (self, frozen) {
            (Self::V2(_), true) => "1",
            (Self::V2(_), false) => "0",
            (Self::V1(_), true) => "FROZEN",
            (Self::V1(_), false) => "THAWED",
        }
    }

    /// The folder and the file that freeze.
    fn freezer(&self) -> Result<(&Path, &'static str)> {
        match self {
            Self::V2(folder) => Ok((folder, "cgroup.freeze")),
            Self::V1(_) => match self.v1("freezer") {
                Some(folder) => Ok((folder, "freezer.state")),
                None => Err(no_freezer(self.folder())),
            },
        }
    }

    fn freezer_error(&self, error: io::Error, folder: &Path) -> Error {
        if is_gone(&error) && folder.is_dir() {
            return no_freezer(folder).with_source(error);
        }
        self.error(error, || format!("freeze or thaw cgroup {}", folder.display()))
    }

    /// Sends a signal to every process of the cgroup and below; the answer is how many got it.
    ///
    /// Processes are held by pidfd while their membership is read again, so that a reused number is never signalled. One that is
    /// forked meanwhile may be missed; [`Cgroup::kill_all`] does not miss any.
    ///
    /// # Errors
    /// `InvalidArgument` for a signal that does not exist; `NotFound` "cgroup does not exist"; else the operating system's.
    pub fn signal_all(&self, signal: i32) -> Result<usize> {
        // SIGRTMAX is 64; 0 asks whether there is somebody.
        if !(0..=64).contains(&signal) {
            return Err(Error::invalid(format!("invalid signal {signal}: 0 to 64")));
        }
        let folder = self.folder();
        signal_members(signal, || tree::pids(folder))
            .map_err(|e| self.error(e, || format!("signal the processes of cgroup {}", folder.display())))
    }

    /// Ends every process of the cgroup and below with SIGKILL, frozen ones too, and waits until none is left. Idempotent; a cgroup
    /// that is gone is success.
    ///
    /// v2: `cgroup.kill`. v1, and v2 before Linux 5.14: signals in a loop, with the cgroup frozen meanwhile, so that no fork outruns
    /// them; a paused container is not paused any more afterwards. May be cancelled; a freeze of its own is taken back then.
    ///
    /// # Errors
    /// `DeadlineExceeded` with the processes that are left (they have the signal and end when the kernel lets them); else the
    /// operating system's.
    pub async fn kill_all(&self, bound: Duration) -> Result<()> {
        match timeout(bound, self.kill_until_empty()).await {
            Ok(Err(e)) if is_gone(&e) => Ok(()),
            Ok(done) => done.map_err(|e| self.error(e, || format!("kill cgroup {}", self.folder().display()))),
            Err(_) => Err(Error::deadline(format!(
                "cannot empty cgroup {} within {bound:?}; {}",
                self.folder().display(),
                self.leftovers()
            ))),
        }
    }

    async fn kill_until_empty(&self) -> io::Result<()> {
        if let Self::V2(folder) = self {
            let events = Changes::open(&folder.join("cgroup.events"))?;
            match write(&folder.join("cgroup.kill"), "1") {
                Ok(()) => {
                    return events.wait(|text| Keyed::parse(text).get("populated") == Some(0)).await;
                }
                // An older kernel, or a threaded cgroup.
                Err(e) if is_gone(&e) || e.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
                Err(e) => return Err(e),
            }
        }
        let mut pauses = Pauses::new();
        let mut first = true;
        while !self.members()?.is_empty() {
            self.kill_round(!first).await?;
            if !self.members()?.is_empty() {
                pauses.pause().await;
            }
            first = false;
        }
        Ok(())
    }

    /// Signals all once, `frozen` so that none can fork meanwhile, and lets them die of it.
    async fn kill_round(&self, frozen: bool) -> io::Result<()> {
        let freezer = self.freezer().ok().filter(|_| frozen);
        let guard = ThawOnDrop(freezer.map(|_| self));
        if let Some((folder, _)) = freezer {
            // Without the freeze (one sleeps uninterruptibly) the signals still reach everyone but a newborn; the next round does.
            let _ = timeout(SNAPSHOT_BOUND, self.reach_frozen(folder, true)).await;
        }
        signal_members(libc::SIGKILL, || self.members())?;
        drop(guard);
        self.thaw_tree();
        Ok(())
    }

    /// Takes back every freeze, also those that the container made below. On v1 the frozen do not die.
    fn thaw_tree(&self) {
        let Ok((folder, file)) = self.freezer() else { return };
        let thawed = tree::walk(folder, &mut |at| tree::write_at(at, file, self.frozen_value(false)));
        if let Err(e) = thawed
            && !is_gone(&e)
        {
            log::warn!("cannot thaw cgroup {}: {e}", folder.display());
        }
    }

    /// Whether processes live in the cgroup or below it, in any hierarchy. Zombies do not count; a cgroup that is gone is empty.
    ///
    /// # Errors
    /// The operating system's.
    pub fn is_populated(&self) -> Result<bool> {
        self.members()
            .map(|members| !members.is_empty())
            .map_err(|e| self.error(e, || format!("list the processes of {}", self.folder().display())))
    }

    /// Where it lies, for messages.
    pub fn path(&self) -> &Path {
        self.folder()
    }

    /// The processes in any of the hierarchies; a hierarchy in which it is gone has none.
    fn members(&self) -> io::Result<BTreeSet<u32>> {
        let mut members = BTreeSet::new();
        for folder in self.folders() {
            match tree::pids(folder) {
                Err(e) if is_gone(&e) => {}
                pids => members.append(&mut pids?),
            }
        }
        Ok(members)
    }

    fn leftovers(&self) -> String {
        let members = self.members().unwrap_or_default();
        let named: Vec<String> = members.iter().take(NAMED_PIDS).map(u32::to_string).collect();
        let more = if members.len() > NAMED_PIDS { " and more" } else { "" };
        match named.is_empty() {
            true => "no process is left in it".into(),
            false => format!("left in it: {}{more}", named.join(" ")),
        }
    }

    /// Removes the cgroup and everything below in all hierarchies, and kills who is left in it. Absence is success; goes on past
    /// errors. Folders above are left, also those that crun has made on the way.
    ///
    /// # Errors
    /// All of them; a folder that is busy when `bound` is over is `DeadlineExceeded`. What could not be removed is left as it is,
    /// and another call may succeed. May be cancelled and called again.
    pub async fn remove(&self, bound: Duration) -> Result<()> {
        let deadline = Instant::now() + bound;
        let mut left = self.folders();
        let mut errors = Vec::new();
        let mut pauses = Pauses::new();
        let mut first = true;
        loop {
            let last = Instant::now() >= deadline;
            left.retain(|folder| match tree::remove(folder) {
                Ok(()) => false,
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                    if last {
                        errors.push(
                            Error::deadline(format!(
                                "cannot remove cgroup {} within {bound:?}; {}",
                                folder.display(),
                                self.leftovers()
                            ))
                            .with_source(e),
                        );
                    }
                    true
                }
                Err(e) => {
                    let what = format!("cannot remove cgroup {}", folder.display());
                    errors.push(Error::new(crate::error::kind_of_io(&e), what).with_source(e));
                    false
                }
            });
            if left.is_empty() || last {
                break;
            }
            // The kernel frees an empty cgroup a moment after its last process, so the first try is only repeated.
            if let Err(e) = self.kill_round(!first).await {
                log::warn!("cannot kill the rest of cgroup {}: {e}", self.folder().display());
            }
            let rest = deadline.saturating_duration_since(Instant::now());
            let _ = timeout(rest, pauses.pause()).await;
            first = false;
        }
        Error::all(errors).map_or(Ok(()), Err)
    }
}

fn no_freezer(folder: &Path) -> Error {
    Error::unimplemented(format!(
        "cannot freeze cgroup {}: it has no freezer; Linux 5.2 has one in v2, in v1 the controller must be mounted",
        folder.display()
    ))
}

/// Signals those that `members` names, twice: before and after they are held.
fn signal_members(signal: i32, members: impl Fn() -> io::Result<BTreeSet<u32>>) -> io::Result<usize> {
    let all: Vec<u32> = members()?.into_iter().collect();
    let mut signalled = 0;
    for chunk in all.chunks(SIGNAL_CHUNK) {
        let mut held = Vec::with_capacity(chunk.len());
        for pid in chunk {
            match pidfd_open(*pid) {
                Ok(fd) => held.push((*pid, fd)),
                Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {}
                Err(e) => return Err(e),
            }
        }
        // The number may have gone to a stranger between the list and the open. If it is (still) listed now, then either the held
        // process is the member, or it has ended and takes no signal.
        let still = members()?;
        for (_, fd) in held.iter().filter(|(pid, _)| still.contains(pid)) {
            match pidfd_send_signal(fd, signal) {
                Ok(()) => signalled += 1,
                Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {}
                Err(e) => return Err(e),
            }
        }
    }
    Ok(signalled)
}

fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes two integers; no memory is passed.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = libc::c_int::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just given us this descriptor (close-on-exec by itself), and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn pidfd_send_signal(fd: &OwnedFd, signal: i32) -> io::Result<()> {
    // SAFETY: the descriptor is open during the call; a null siginfo asks the kernel to fill it as kill(2) does.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            fd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if rc < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
