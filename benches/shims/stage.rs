//! Where the measurement takes place: a mount namespace, a process namespace, a /run and a parent cgroup of its own.
//!
//! The program runs twice. The outer one makes the namespaces, starts itself again as their first process, and waits. When the
//! inner one ends, in whatever way, the kernel ends every process that it left and forgets every mount, file and socket, so that
//! the outer one finds only empty cgroups to remove. Ctrl-C kills the inner one.

use std::{
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::Duration,
};

use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, unshare},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
    unistd::{Pid, geteuid, getpid},
};
use proxmox_lxcri::error::{Context, Error, Kind, Result};

/// Tells the inner program the name of its cgroup.
const CGROUP: &str = "SHIMS_BENCH_CGROUP";
/// Everything is made here: a tmpfs, as on a real machine, that nobody else sees. The sockets of the shims and the state of the
/// runtimes lie in it too.
const RUN: &str = "/run";
/// Where a machine with cgroup v1 in hybrid mode mounts the second hierarchy, which crun refuses.
const HYBRID: &str = "/sys/fs/cgroup/unified";
const CGROUPS: &str = "/sys/fs/cgroup";

/// The folders that the measurement may write to.
#[derive(Debug, Clone)]
pub(crate) struct Stage {
    /// On a tmpfs; it vanishes with the namespace.
    pub(crate) scratch: PathBuf,
    /// Parent of all cgroups, as it is written into `linux.cgroupsPath`.
    pub(crate) cgroup: String,
    /// A network namespace for all containers, made beforehand as CRI does.
    pub(crate) netns: PathBuf,
}

impl Stage {
    /// The stage, if this is the inner program.
    pub(crate) fn inside() -> Option<Result<Self>> {
        let name = std::env::var(CGROUP).ok()?;
        Some(Self::enter(&name))
    }

    fn enter(name: &str) -> Result<Self> {
        if getpid() != Pid::from_raw(1) {
            return Err(Error::invalid(format!(
                "{CGROUP} is set by this program itself; unset it"
            )));
        }
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).context(|| "cannot ask for a signal at the parent's death")?;
        // The process namespace needs its own view, or /proc shows the pids of the outer one.
        cover(Path::new("/proc"), "proc")?;
        let scratch = Path::new(RUN).join("shims-bench");
        fs::create_dir(&scratch).context(|| format!("cannot make {}", scratch.display()))?;
        let netns = scratch.join("netns");
        make_netns(&netns)?;
        Ok(Self {
            cgroup: format!("/{name}"),
            scratch,
            netns,
        })
    }
}

/// Makes the namespaces, runs this program again inside of them, and cleans up behind it.
///
/// # Errors
/// `PermissionDenied` without root; the operating system's.
pub(crate) fn supervise() -> Result<ExitCode> {
    if !geteuid().is_root() {
        return Err(Error::new(
            Kind::PermissionDenied,
            "containers need root: run it with sudo",
        ));
    }
    let cgroup = format!("shims-bench-{}", getpid());
    let done = run_inside(&cgroup);
    let cleaned = remove_cgroups(&cgroup);
    match (done, cleaned) {
        (Ok(code), Ok(())) => Ok(code),
        (done, cleaned) => {
            let errors = done.err().into_iter().chain(cleaned.err()).collect();
            Error::all(errors).map_or(Ok(ExitCode::FAILURE), Err)
        }
    }
}

fn run_inside(cgroup: &str) -> Result<ExitCode> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGCHLD] {
        signals.add(signal);
    }
    // The child starts with an empty mask: std resets it.
    signals.thread_block().context(|| "cannot block signals")?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .context(|| "cannot make a signalfd")?;

    let program = std::env::current_exe().context(|| "cannot find this program")?;
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID).context(|| "cannot make namespaces")?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).context(|| "cannot make the mounts private")?;
    if is_mount_point(Path::new(HYBRID)) {
        // Covered, not unmounted: crun makes folders and plain files for its cgroups below this path, whatever it is, and on the
        // tmpfs beneath they would outlive this namespace.
        cover(Path::new(HYBRID), "tmpfs")?;
    }
    cover(Path::new(RUN), "tmpfs")?;

    let mut child = Command::new(program)
        .args(std::env::args_os().skip(1))
        .env(CGROUP, cgroup)
        .spawn()
        .context(|| "cannot start the inner program")?;
    let status = loop {
        if let Some(status) = child.try_wait().context(|| "cannot wait for the inner program")? {
            break status;
        }
        let mut fds = [PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e).context(|| "cannot wait for a signal"),
        }
        while let Ok(Some(info)) = signals.read_signal() {
            if info.ssi_signo != Signal::SIGCHLD as u32 {
                eprintln!("shims: interrupted; cleaning up");
                child.kill().context(|| "cannot end the inner program")?;
            }
        }
    };
    Ok(match status.code() {
        Some(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        None => ExitCode::FAILURE,
    })
}

/// Mounts an empty file system over a folder.
fn cover(folder: &Path, kind: &str) -> Result<()> {
    mount(Some("shims-bench"), folder, Some(kind), MsFlags::empty(), None::<&str>)
        .context(|| format!("cannot mount {kind} on {} in the private namespace", folder.display()))
}

fn remove_cgroups(name: &str) -> Result<()> {
    let entries = fs::read_dir(CGROUPS).context(|| format!("cannot read {CGROUPS}"))?;
    let mut roots = vec![PathBuf::from(CGROUPS)];
    roots.extend(entries.flatten().map(|entry| entry.path()));
    // The one hierarchy of v2, or those of v1; the cover of the hybrid one has no such file.
    roots.retain(|root| root.join("cgroup.procs").exists());
    for root in roots {
        let cgroup = root.join(name);
        let mut last = Ok(());
        // The kernel lets go of a dead process's cgroup a little after the process.
        for _ in 0..100 {
            last = remove_tree(&cgroup);
            if last.is_ok() {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        last.context(|| format!("cannot remove cgroup {}", cgroup.display()))?;
    }
    Ok(())
}

fn remove_tree(cgroup: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(cgroup) {
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    absent_is_fine(fs::remove_dir(cgroup))
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

fn is_mount_point(path: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounts
        .lines()
        .any(|line| line.split(' ').nth(4).is_some_and(|point| Path::new(point) == path))
}

/// A network namespace bound to `path`, made by a thread that then ends.
fn make_netns(path: &Path) -> Result<()> {
    fs::write(path, "").context(|| format!("cannot create {}", path.display()))?;
    let target = path.to_path_buf();
    let made = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).context(|| "cannot make a network namespace")?;
        mount(
            Some("/proc/thread-self/ns/net"),
            &target,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
        .context(|| format!("cannot bind the network namespace to {}", target.display()))
    });
    made.join()
        .unwrap_or_else(|_| Err(Error::unknown("the thread that makes a network namespace panicked")))
}
