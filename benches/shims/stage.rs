//! Where the measurement takes place: namespaces of mounts, processes and the network, a /run and a parent cgroup of its own.
//!
//! The program runs three times. The outer one makes the namespaces, starts itself again as their first process, and waits. That one
//! starts the inner one, which measures, and stands for the node's init beside it: LXC takes its cgroup for the place below which
//! containers are. When the inner one ends, in whatever way, so does the first, and the kernel ends every process that is left and
//! forgets every mount, file and socket, so that the outer one finds only empty cgroups to remove. Ctrl-C kills the first.

use std::{
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Command, ExitCode, ExitStatus},
    time::Duration,
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, unshare},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
    unistd::{geteuid, getpid},
};
use proxmox_lxcri::error::{Context, Error, Kind, Result};

/// Tells the inner program the name of its cgroup.
const CGROUP: &str = "SHIMS_BENCH_CGROUP";
/// Everything is made here: a tmpfs, as on a real machine, that nobody else sees. The sockets of the shims and the state of the
/// runtimes lie in it too.
const RUN: &str = "/run";
const CGROUPS: &str = "/sys/fs/cgroup";
/// The name below [`CGROUPS`] of the second hierarchy of a machine with cgroup v1 in hybrid mode, which crun refuses.
const HYBRID: &str = "unified";
/// LXC's own folder, empty here.
const LXC: &str = "/var/lib/lxc";

/// The folders that the measurement may write to.
#[derive(Debug, Clone)]
pub(crate) struct Stage {
    /// On a tmpfs; it vanishes with the namespace.
    pub(crate) scratch: PathBuf,
    /// A name that no other run on the machine has at this time.
    pub(crate) name: String,
    /// Parent of all cgroups, as it is written into `linux.cgroupsPath`.
    pub(crate) cgroup: String,
    /// A network namespace for all containers, made beforehand as CRI does.
    pub(crate) netns: PathBuf,
}

/// Which of the three this program is.
pub(crate) enum Role {
    /// The one that the user has started.
    Outer,
    /// The first process of the namespaces.
    First,
    /// The one that measures.
    Inner(Stage),
}

impl Role {
    /// Finds out, and makes the stage where this is the inner program.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn find() -> Result<Self> {
        let Ok(name) = std::env::var(CGROUP) else {
            return Ok(Self::Outer);
        };
        match getpid().as_raw() {
            1 => Ok(Self::First),
            2 => Stage::enter(&name).map(Self::Inner),
            _ => Err(Error::invalid(format!(
                "{CGROUP} is set by this program itself; unset it"
            ))),
        }
    }
}

impl Stage {
    fn enter(name: &str) -> Result<Self> {
        die_with_parent()?;
        // What a shim or LXC leaves behind becomes this program's child, which can wait for its end.
        nix::sys::prctl::set_child_subreaper(true).context(|| "cannot adopt orphans")?;
        for root in hierarchies()? {
            let file = root.join("cgroup.procs");
            fs::write(&file, "1").context(|| format!("cannot move the first process by {}", file.display()))?;
        }
        let scratch = Path::new(RUN).join("shims-bench");
        fs::create_dir(&scratch).context(|| format!("cannot make {}", scratch.display()))?;
        let netns = scratch.join("netns");
        make_netns(&netns)?;
        Ok(Self {
            name: name.into(),
            cgroup: format!("/{name}"),
            scratch,
            netns,
        })
    }
}

/// Runs the first process: starts the inner program and ends with it.
///
/// # Errors
/// The operating system's.
pub(crate) fn stand_by() -> Result<ExitCode> {
    die_with_parent()?;
    // The process namespace needs its own view, or /proc shows the pids of the outer one.
    cover(Path::new("/proc"), "proc")?;
    let mut child = again()?.spawn().context(|| "cannot start the inner program")?;
    let status = child.wait().context(|| "cannot wait for the inner program")?;
    Ok(exit_code(status))
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

    // LXC's command sockets are abstract: their names belong to the network namespace.
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNET)
        .context(|| "cannot make namespaces")?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).context(|| "cannot make the mounts private")?;
    cover(Path::new(RUN), "tmpfs")?;
    if Path::new(CGROUPS).join(HYBRID).exists() {
        hide_hybrid()?;
    }
    if Path::new(LXC).exists() {
        cover(Path::new(LXC), "tmpfs")?;
    }

    let mut child = again()?
        .env(CGROUP, cgroup)
        .spawn()
        .context(|| "cannot start the first process")?;
    let status = loop {
        if let Some(status) = child.try_wait().context(|| "cannot wait for the first process")? {
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
                child.kill().context(|| "cannot end the first process")?;
            }
        }
    };
    Ok(exit_code(status))
}

/// This program with the same arguments.
fn again() -> Result<Command> {
    let mut command = Command::new(std::env::current_exe().context(|| "cannot find this program")?);
    command.args(std::env::args_os().skip(1));
    Ok(command)
}

fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    code.map_or(ExitCode::FAILURE, ExitCode::from)
}

fn die_with_parent() -> Result<()> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).context(|| "cannot ask for a signal at the parent's death")
}

/// Mounts an empty file system over a folder.
fn cover(folder: &Path, kind: &str) -> Result<()> {
    mount(Some("shims-bench"), folder, Some(kind), MsFlags::empty(), None::<&str>)
        .context(|| format!("cannot mount {kind} on {} in the private namespace", folder.display()))
}

/// Builds [`CGROUPS`] of a hybrid machine again, without the second hierarchy.
///
/// Covering or unmounting that alone is not enough. LXC looks for hierarchies by mount and by name, and crun makes folders and plain
/// files for its cgroups below that path, whatever it is; on the machine's tmpfs beneath they would outlive this namespace.
fn hide_hybrid() -> Result<()> {
    let aside = Path::new(RUN).join("cgroup");
    let failed = || format!("cannot build {CGROUPS} again in the private namespace");
    let bind = |from: &Path, to: &Path, more: MsFlags| {
        mount(Some(from), to, None::<&str>, MsFlags::MS_BIND | more, None::<&str>).context(failed)
    };
    fs::create_dir(&aside).context(failed)?;
    bind(Path::new(CGROUPS), &aside, MsFlags::MS_REC)?;
    umount2(CGROUPS, MntFlags::MNT_DETACH).context(failed)?;
    cover(Path::new(CGROUPS), "tmpfs")?;
    for entry in fs::read_dir(&aside).context(failed)?.flatten() {
        let (from, to) = (entry.path(), Path::new(CGROUPS).join(entry.file_name()));
        if entry.file_name() == HYBRID {
            continue;
        } else if let Ok(target) = fs::read_link(&from) {
            std::os::unix::fs::symlink(target, to).context(failed)?;
        } else if from.is_dir() {
            fs::create_dir(&to).context(failed)?;
            bind(&from, &to, MsFlags::empty())?;
        }
    }
    umount2(&aside, MntFlags::MNT_DETACH).context(failed)?;
    fs::remove_dir(&aside).context(failed)
}

/// The roots of the hierarchies: the one of cgroup v2, or each of v1.
fn hierarchies() -> Result<Vec<PathBuf>> {
    let one = PathBuf::from(CGROUPS);
    if one.join("cgroup.procs").exists() {
        return Ok(vec![one]);
    }
    let entries = fs::read_dir(&one).context(|| format!("cannot read {CGROUPS}"))?;
    // Not the links such as cpu,cpuacct.
    let folders = entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    let mut roots: Vec<_> = folders.map(|entry| entry.path()).collect();
    roots.retain(|root| root.join("cgroup.procs").exists());
    Ok(roots)
}

/// Removes this run's cgroup, and what LXC calls by the name of one of its containers.
fn remove_cgroups(name: &str) -> Result<()> {
    let mut cgroups = Vec::new();
    let of_container = format!(".{name}-");
    for root in hierarchies()? {
        let entries = fs::read_dir(&root).context(|| format!("cannot read {}", root.display()))?;
        let ours = entries.flatten().filter(|entry| {
            let entry = entry.file_name();
            entry == name || entry.to_string_lossy().contains(&of_container)
        });
        cgroups.extend(ours.map(|entry| entry.path()));
    }
    for cgroup in cgroups {
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
