//! OOM kills inside a container's cgroup.

use std::{
    fs::File,
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::io::{Interest, unix::AsyncFd};

use super::{Cgroup, is_gone, parse::Keyed, read, tree, watch::Changes, write};
use crate::error::{Error, Result};

/// v1 rings before the kernel picks its victim, so the counter follows later: the eventfd's ring is followed by this many looks, at
/// 1, 2, 4, … 1024 ms. (Every cgroup below the one at its limit rings too; for those nothing follows.)
const LOOKS_AFTER_RING: u32 = 11;

/// Watches a container's cgroup for OOM kills. Holds descriptors only: three on v2, one on v1.
#[derive(Debug)]
pub struct OomWatch {
    source: Source,
    /// The kernel's count of kills that were reported.
    reported: u64,
    /// On v2, the cgroup around the container's.
    around: Option<Around>,
}

/// The `memory.events` of the cgroup around a container's, which counts the container's kills too, and those of its neighbours.
///
/// systemd removes a scope as soon as the last process has left it, and the count goes along, perhaps before anybody has looked. What
/// this one has gained since the last look at both was the container's then.
#[derive(Debug)]
struct Around {
    memory: Changes,
    seen: u64,
}

impl Around {
    fn of(memory_events: &Path) -> Option<Self> {
        let folder = memory_events.parent()?.parent()?;
        // The root has none, and a folder that is no cgroup neither.
        let memory = Changes::open(&folder.join("memory.events")).ok()?;
        let seen = kills_in(&memory)?;
        Some(Self { memory, seen })
    }

    /// Whether there were more kills since the last look.
    fn grew(&mut self) -> bool {
        let Some(kills) = kills_in(&self.memory) else {
            return false;
        };
        let more = kills > self.seen;
        self.seen = kills;
        more
    }
}

fn kills_in(memory_events: &Changes) -> Option<u64> {
    Keyed::parse(&memory_events.read().ok()?).get("oom_kill")
}

#[derive(Debug)]
enum Source {
    V2 {
        /// `memory.events`.
        memory: Changes,
        /// `cgroup.events`: rings when the last process leaves; nothing rings when the folder is removed.
        events: Changes,
    },
    V1 {
        bell: AsyncFd<EventFd>,
        /// Of the memory controller.
        folder: PathBuf,
        /// Whether `memory.oom_control` has the line `oom_kill` (since Linux 4.13). If not, every ring counts.
        counts: bool,
        looks_left: u32,
    },
}

impl Cgroup {
    /// Starts to watch for OOM kills; earlier ones are not reported. MUST be called in a tokio runtime, once processes are in the
    /// cgroup.
    ///
    /// # Errors
    /// `Unimplemented` without a memory controller, `NotFound` "cgroup does not exist", else the operating system's.
    pub fn watch_oom(&self) -> Result<OomWatch> {
        let folder = match self {
            Self::V2(folder) => folder,
            Self::V1(_) => self.v1("memory").ok_or_else(|| no_memory(self.folder()))?,
        };
        let watch = match self {
            Self::V2(_) => OomWatch::v2(&folder.join("memory.events"), &folder.join("cgroup.events")),
            Self::V1(_) => OomWatch::v1(folder),
        };
        watch.map_err(|e| {
            if is_gone(&e) && folder.is_dir() {
                return no_memory(folder).with_source(e);
            }
            self.error(e, || format!("watch cgroup {} for OOM kills", folder.display()))
        })
    }
}

fn no_memory(folder: &Path) -> Error {
    Error::unimplemented(format!(
        "cannot watch cgroup {} for OOM kills: it has no memory controller",
        folder.display()
    ))
}

impl OomWatch {
    pub(super) fn v2(memory_events: &Path, cgroup_events: &Path) -> io::Result<Self> {
        let around = Around::of(memory_events);
        let source = Source::V2 {
            memory: Changes::open(memory_events)?,
            events: Changes::open(cgroup_events)?,
        };
        Ok(Self {
            around,
            ..Self::new(source)?
        })
    }

    fn v1(folder: &Path) -> io::Result<Self> {
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let control = File::open(folder.join("memory.oom_control"))?;
        // The kernel needs the two numbers only during this write (cgroup-v1/memory.rst, OOM Control).
        write(
            &folder.join("cgroup.event_control"),
            &format!("{} {}", bell.as_raw_fd(), control.as_raw_fd()),
        )?;
        let counts = Keyed::parse(&read(&folder.join("memory.oom_control"))?)
            .get("oom_kill")
            .is_some();
        // SAFETY: an `EventFd` owns its descriptor for as long as it lives.
        let bell = unsafe { AsyncFd::register_with_interest(bell, Interest::READABLE)? };
        Self::new(Source::V1 {
            bell,
            folder: folder.to_path_buf(),
            counts,
            looks_left: 0,
        })
    }

    fn new(source: Source) -> io::Result<Self> {
        let reported = source.kills().unwrap_or_default();
        Ok(Self {
            source,
            reported,
            around: None,
        })
    }

    /// Whether the kernel has killed for want of memory since the last report (or since the watch began); reports it, so that
    /// [`OomWatch::next`] does not do so again. Never waits. One `true` may stand for several kills.
    ///
    /// Call it before an exit is published: the kill is counted before the victim can be reaped.
    pub fn check(&mut self) -> bool {
        if let Source::V1 {
            bell, counts: false, ..
        } = &self.source
        {
            // Without a counter a ring is all there is; the removal of the cgroup rings as well.
            return self.source.is_alive() && bell.get_ref().read().is_ok_and(|rings| rings > 0);
        }
        // Before the look at the container's own count: what comes between the two is seen by the next look.
        let around = self.around.as_ref().and_then(|around| kills_in(&around.memory));
        let Some(kills) = self.source.kills() else {
            return self.around.as_mut().is_some_and(Around::grew);
        };
        let more = kills > self.reported;
        // It falls when a sub-cgroup of v1 goes, with its own count.
        self.reported = kills;
        if let (Some(around), Some(seen)) = (&mut self.around, around) {
            around.seen = seen;
            if more {
                around.grew();
            }
        }
        more
    }

    /// Waits for an OOM kill that was not reported yet: `true`. One `true` may stand for several. `false` when there can be none any
    /// more: the cgroup is gone, or (v2) its last process has left it.
    ///
    /// May be cancelled at any point; nothing is lost. On v1 a kill in a sub-cgroup that has a limit of its own does not ring; only
    /// [`OomWatch::check`] sees it.
    ///
    /// # Errors
    /// The operating system's.
    pub async fn next(&mut self) -> Result<bool> {
        loop {
            // In this order: a last process that was killed has been counted before it left.
            let alive = self.source.is_alive();
            if self.check() {
                return Ok(true);
            }
            if !alive {
                return Ok(false);
            }
            self.source.ring(self.around.as_ref()).await.map_err(|e| {
                Error::new(crate::error::kind_of_io(&e), "cannot wait for OOM kills of a cgroup").with_source(e)
            })?;
        }
    }
}

/// Waits until the cgroup around the container's has something to tell; for ever where there is none. It is not gone before the
/// container's own.
async fn neighbours(around: Option<&Around>) -> io::Result<()> {
    match around {
        Some(around) => around.memory.changed().await,
        None => std::future::pending().await,
    }
}

impl Source {
    /// The kernel's count of OOM kills in the subtree; `None` when the cgroup is gone or does not count.
    fn kills(&self) -> Option<u64> {
        match self {
            // Counts the whole subtree, unless cgroup2 is mounted with memory_localevents.
            Self::V2 { memory, .. } => kills_in(memory),
            Self::V1 { folder, .. } => {
                let mut sum: Option<u64> = None;
                // Each v1 cgroup counts its own processes only.
                let add = &mut |at: std::os::fd::BorrowedFd<'_>| {
                    if let Some(kills) = Keyed::parse(&tree::read_at(at, "memory.oom_control")?).get("oom_kill") {
                        sum = Some(sum.unwrap_or_default().saturating_add(kills));
                    }
                    Ok(())
                };
                tree::walk(folder, add).ok()?;
                sum
            }
        }
    }

    fn is_alive(&self) -> bool {
        match self {
            Self::V2 { events, .. } => events
                .read()
                .is_ok_and(|text| Keyed::parse(&text).get("populated") != Some(0)),
            Self::V1 { folder, .. } => folder.join("cgroup.event_control").exists(),
        }
    }

    /// Waits until a look may be worth while.
    async fn ring(&mut self, around: Option<&Around>) -> io::Result<()> {
        match self {
            Self::V2 { memory, events } => tokio::select! {
                rung = memory.changed() => rung,
                rung = events.changed() => rung,
                // A kill among the neighbours, which is to be seen before the container's own count may go.
                rung = neighbours(around) => rung,
            },
            Self::V1 {
                bell,
                counts,
                looks_left,
                ..
            } => {
                if *looks_left > 0 {
                    // Taken before the wait, so that one that is cancelled each time ends too.
                    *looks_left -= 1;
                    tokio::time::sleep(Duration::from_millis(1 << (LOOKS_AFTER_RING - 1 - *looks_left))).await;
                    return Ok(());
                }
                bell.readable().await?.clear_ready();
                if *counts {
                    // Drained, so that the next ring is an edge. `check` drains it where rings are what counts.
                    let _ = bell.get_ref().read();
                    *looks_left = LOOKS_AFTER_RING;
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_kill_that_is_counted_after_the_ring_is_reported() {
        let folder = tempfile::tempdir().unwrap();
        let control = folder.path().join("memory.oom_control");
        std::fs::write(folder.path().join("cgroup.event_control"), "").unwrap();
        std::fs::write(&control, "oom_kill 3\n").unwrap();
        let mut watch = OomWatch::v1(folder.path()).unwrap();
        if let Source::V1 { bell, .. } = &watch.source {
            bell.get_ref().write(1).unwrap();
        }
        {
            let mut next = Box::pin(watch.next());
            // Until it has heard the ring and waits for the counter.
            tokio::select! {
                biased;
                _ = &mut next => panic!("nothing was killed yet"),
                () = tokio::time::sleep(Duration::from_millis(2)) => {}
            }
            std::fs::write(&control, "oom_kill 4\n").unwrap();
            let bound = Duration::from_secs(10);
            assert!(tokio::time::timeout(bound, next).await.unwrap().unwrap());
        }
        assert!(!watch.check());
    }

    #[tokio::test]
    async fn on_a_kernel_that_does_not_count_each_ring_is_a_kill_but_the_last() {
        let folder = tempfile::tempdir().unwrap();
        let control = folder.path().join("cgroup.event_control");
        for file in [&control, &folder.path().join("memory.oom_control")] {
            std::fs::write(file, "oom_kill_disable 0\nunder_oom 0\n").unwrap();
        }
        let mut watch = OomWatch::v1(folder.path()).unwrap();
        let ring = |watch: &OomWatch| match &watch.source {
            Source::V1 { bell, .. } => bell.get_ref().write(1).unwrap(),
            Source::V2 { .. } => unreachable!(),
        };
        assert!(!watch.check());
        ring(&watch);
        assert!(watch.check());
        assert!(!watch.check());
        ring(&watch);
        assert!(watch.next().await.unwrap());
        // The removal of the cgroup rings too.
        std::fs::remove_file(&control).unwrap();
        ring(&watch);
        assert!(!watch.check());
        assert!(!watch.next().await.unwrap());
    }
}
