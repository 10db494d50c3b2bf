//! Where the measurement takes place: a mount namespace, a process namespace, a tmpfs and a parent cgroup of its own.
//!
//! The program runs twice. The outer one makes the namespaces, starts itself again as their first process, and waits. When the
//! inner one ends, in whatever way, the kernel ends every process that it left, so that the outer one finds only empty cgroups and
//! a few socket files to remove. Ctrl-C kills the inner one.

use std::{
    fs,
    io::{self, Write},
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::Duration,
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, unshare},
    sys::signal::{SigSet, Signal},
    sys::signalfd::{SfdFlags, SignalFd},
    unistd::{Pid, geteuid, getpid},
};
use proxmox_lxcri::error::{Context, Error, Result};

/// Tells the inner program its folder.
const SCRATCH: &str = "SHIMS_BENCH_SCRATCH";
/// Where a machine with cgroup v1 in hybrid mode mounts the second hierarchy, which crun refuses.
const HYBRID: &str = "/sys/fs/cgroup/unified";
const CGROUPS: &str = "/sys/fs/cgroup";

/// The folders that the measurement may write to.
#[derive(Debug, Clone)]
pub(crate) struct Stage {
    /// A tmpfs; it vanishes with the namespace.
    pub(crate) scratch: PathBuf,
    /// Parent of all cgroups, as it is written into `linux.cgroupsPath`.
    pub(crate) cgroup: String,
    /// A network namespace for all containers, made beforehand as CRI does.
    pub(crate) netns: PathBuf,
}

impl Stage {
    /// The stage, if this is the inner program.
    pub(crate) fn inside() -> Option<Result<Self>> {
        let scratch = PathBuf::from(std::env::var_os(SCRATCH)?);
        Some(Self::enter(scratch))
    }

    fn enter(scratch: PathBuf) -> Result<Self> {
        if getpid() != Pid::from_raw(1) {
            return Err(Error::invalid(format!(
                "{SCRATCH} is set by this program itself; unset it"
            )));
        }
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).context(|| "cannot ask for a signal at the parent's death")?;
        // The process namespace needs its own view, or /proc shows the pids of the outer one.
        mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), None::<&str>).context(|| "cannot mount /proc")?;
        let netns = scratch.join("netns");
        make_netns(&netns)?;
        let name = cgroup_name(&scratch)?;
        Ok(Self {
            cgroup: format!("/{name}"),
            scratch,
            netns,
        })
    }

    /// Notes a socket file outside the scratch folder, so that it is removed in the end.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn note_socket(&self, socket: &Path) -> Result<()> {
        fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.scratch.join("sockets"))
            .and_then(|mut file| writeln!(file, "{}", socket.display()))
            .context(|| "cannot note the socket of a shim")
    }
}

/// Makes the namespaces, runs this program again inside of them, and cleans up behind it.
///
/// # Errors
/// `PermissionDenied` without root; the operating system's.
pub(crate) fn supervise() -> Result<ExitCode> {
    if !geteuid().is_root() {
        return Err(Error::new(
            proxmox_lxcri::error::Kind::PermissionDenied,
            "containers need root: run it with sudo",
        ));
    }
    let scratch = tempfile::Builder::new()
        .prefix("shims-bench.")
        .tempdir()
        .context(|| "cannot make a temporary folder")?;
    let done = run_inside(scratch.path());
    let mut errors = clean(scratch.path());
    match done {
        Ok(code) => Error::all(errors).map_or(Ok(code), Err),
        Err(e) => {
            errors.insert(0, e);
            Error::all(errors).map_or(Ok(ExitCode::FAILURE), Err)
        }
    }
}

fn run_inside(scratch: &Path) -> Result<ExitCode> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGCHLD] {
        signals.add(signal);
    }
    // The child starts with an empty mask: std resets it.
    signals.thread_block().context(|| "cannot block signals")?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .context(|| "cannot make a signalfd")?;

    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID).context(|| "cannot make namespaces")?;
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )
    .context(|| "cannot make the mounts private")?;
    if is_mount_point(Path::new(HYBRID)) {
        // Covered, not unmounted: crun makes folders and plain files for its cgroups below this path, whatever it is, and on the
        // tmpfs beneath they would outlive this namespace.
        mount(
            Some("shims-bench"),
            HYBRID,
            Some("tmpfs"),
            MsFlags::empty(),
            None::<&str>,
        )
        .context(|| format!("cannot cover {HYBRID} in the private namespace"))?;
    }
    // Like containerd's state folder: in memory.
    mount(
        Some("shims-bench"),
        scratch,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("mode=0711"),
    )
    .context(|| format!("cannot mount a tmpfs on {}", scratch.display()))?;

    let program = std::env::current_exe().context(|| "cannot find this program")?;
    let mut child = Command::new(program)
        .args(std::env::args_os().skip(1))
        .env(SCRATCH, scratch)
        .spawn()
        .context(|| "cannot start the inner program")?;
    let status = loop {
        if let Some(status) = child.try_wait().context(|| "cannot wait for the inner program")? {
            break status;
        }
        let mut fds = [PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
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

/// Removes what outlives the namespaces.
fn clean(scratch: &Path) -> Vec<Error> {
    let mut errors = Vec::new();
    if let Ok(sockets) = fs::read_to_string(scratch.join("sockets")) {
        for socket in sockets.lines() {
            errors.extend(
                absent_is_fine(fs::remove_file(socket))
                    .context(|| format!("cannot remove {socket}"))
                    .err(),
            );
        }
    }
    // Whatever was mounted below is in this private namespace only; the folder itself is on the machine.
    while umount2(scratch, MntFlags::MNT_DETACH).is_ok() {}
    match cgroup_name(scratch) {
        Ok(name) => errors.extend(remove_cgroups(&name).err()),
        Err(e) => errors.push(e),
    }
    errors
}

fn cgroup_name(scratch: &Path) -> Result<String> {
    let name = scratch.file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| Error::invalid(format!("odd temporary folder {}", scratch.display())))?;
    // systemd reads a dot in a cgroup's name as a unit's suffix.
    Ok(name.replace('.', "-"))
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
