//! `proxmox-lxcri-init`: what runs inside a container before the user's program does, and becomes it.
//!
//! As init it is executed by liblxc, in the container's namespaces and cgroups, with the host's files in view. It takes its own
//! connection to the shim from the descriptor that it inherits, and then
//!
//! ```text
//! Hello ─▶ (plan, descriptors) ─▶ mounts ─▶ Mounted ─▶ Go ─▶ createContainer hooks ─▶ pivot_root ─▶ terminal, program looked up
//!   ─▶ Created ─▶ Start ─▶ startContainer hooks ─▶ process attributes ─▶ exec
//! ```
//!
//! As the process of an exec it is run by the shim, on the host: it joins the cgroups and namespaces, makes the process, a child of the
//! shim's like itself, and ends. That process goes on from `Hello`.
//!
//! A program of the container can execute `/proc/self/exe`, and reach the helper's file by it (CVE-2019-5736). So the helper runs from a
//! read-only mount of its file that nobody can change, because it stands nowhere. The shim makes it; where LXC executes init by its path
//! all the same, init executes itself once more from such a mount.
//!
//! The connection is close-on-exec, so that its end tells the shim that the program runs. Every failure before that is told, and ends
//! the process. It has one thread and only makes system calls; nothing of the container runs beside it that it did not start.

pub mod hooks;
pub mod proc;
pub mod process;
pub mod rootfs;
pub mod terminal;

use std::{
    ffi::{CStr, CString, OsStr, OsString},
    fs::{File, OpenOptions},
    io::{IoSlice, Read, Seek, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    process::ExitCode,
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2},
    sched::{CloneFlags, setns},
    sys::{
        socket::{ControlMessage, MsgFlags, sendmsg},
        stat::Mode,
    },
    unistd::{Gid, Uid, dup2_stderr, dup2_stdin, dup2_stdout, setresgid, setresuid},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use self::{hooks::Hook, proc::Proc, process::Process, rootfs::Root};
use super::{
    blueprint::Facts,
    monitor::BOOT_FD,
    wire::{self, FromInit, ToInit},
};
use crate::{
    error::{Context, Error, Kind, Result},
    rootfs::sys,
};

/// The first argument that makes the helper an init; the container's name follows, for who looks at processes.
pub const INIT: &CStr = c"init";
/// The same, from the read-only mount.
pub(super) const SEALED_INIT: &CStr = c"sealed-init";
/// The first argument that makes the helper the process of an exec; the container's name and the exec's follow.
pub const EXEC: &str = "exec";

/// The connection of an exec.
pub const EXEC_FD: RawFd = 3;
/// The read-only mount from which an exec's helper is executed.
pub const HELPER_FD: RawFd = 4;

/// What init does; the part of a bundle that is done inside.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Mounts and files.
    pub root: Root,
    /// What becomes of init itself.
    pub process: Process,
    /// The name of the uts namespace.
    pub hostname: Option<String>,
    /// Its NIS domain.
    pub domainname: Option<String>,
    /// Whether hooks run on the host before the root file system is entered.
    pub waits_for_hooks: bool,
    /// Hooks before the root file system is entered.
    pub create_container: Vec<Hook>,
    /// Hooks before the program runs.
    pub start_container: Vec<Hook>,
    /// What hooks and the agent of seccomp are told.
    pub facts: Facts,
    /// No session keyring of its own.
    pub keep_keyring: bool,
    /// Whether the shim sets what init may not: it is in a user namespace.
    pub constrained: bool,
}

/// What the process of an exec does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExecPlan {
    /// What becomes of it.
    pub process: Process,
    /// Files named cgroup.procs, one of each hierarchy.
    pub cgroups: Vec<PathBuf>,
    /// Namespaces of the container that are not the host's, CLONE_NEW*.
    pub namespaces: i32,
    /// What the agent of seccomp is told.
    pub facts: Facts,
    /// The container's init, as the shim counts; for the same.
    pub init: u32,
    /// No session keyring of its own.
    pub keep_keyring: bool,
}

/// The helper and the shim have to be of one version: plans are no format to keep.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The document that comes first, and what the descriptors behind it are, in this order.
#[derive(Debug, Serialize, Deserialize)]
pub struct Order<P> {
    /// [`VERSION`] of the shim.
    pub version: String,
    /// What to do.
    pub plan: P,
    /// The init whose namespaces are joined, by pidfd.
    pub has_init: bool,
    /// The connected socket that gets the terminal's master; without it, the three standard streams.
    pub has_console: bool,
    /// The connected socket of the agent of seccomp.
    pub has_agent: bool,
}

/// The descriptors of an [`Order`].
#[derive(Debug, Default)]
struct Given {
    init: Option<OwnedFd>,
    console: Option<OwnedFd>,
    stdio: Option<[OwnedFd; 3]>,
    agent: Option<OwnedFd>,
    trees: Vec<OwnedFd>,
}

/// Runs the helper. `args` are those after the program's name.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    let first = args.first().map(OsString::as_os_str).unwrap_or_default();
    if first == OsStr::from_bytes(INIT.to_bytes()) {
        // What cannot be told to the shim before there is a connection makes LXC's start fail.
        let Err(error) = run_sealed(&args);
        let _ = writeln!(std::io::stderr(), "proxmox-lxcri-init: {error}");
        return ExitCode::FAILURE;
    }
    let exec = first == EXEC;
    if !exec && first != OsStr::from_bytes(SEALED_INIT.to_bytes()) {
        let _ = writeln!(
            std::io::stderr(),
            "proxmox-lxcri-init: this program is run by containerd-shim-proxmox-lxcri-v1 alone"
        );
        return ExitCode::FAILURE;
    }
    // What LXC has left open besides, and what this process was given by mistake.
    // SAFETY: three integers; nothing here owns a descriptor yet.
    unsafe { libc::syscall(libc::SYS_close_range, BOOT_FD + 1, libc::c_uint::MAX, 0) };
    // SAFETY: the shim, or LXC, has given this process the descriptor; it is taken once.
    let given = unsafe { OwnedFd::from_raw_fd(if exec { EXEC_FD } else { BOOT_FD }) };
    let connection = if exec { close_on_exec(given) } else { connection(given) };
    let connection = match connection {
        Ok(connection) => connection,
        // Nobody can be told but who reads LXC's output.
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "proxmox-lxcri-init: {error}");
            return ExitCode::FAILURE;
        }
    };
    let done = match exec {
        true => joined(&connection),
        false => init(&connection),
    };
    let Err(error) = done else { return ExitCode::SUCCESS };
    let _ = wire::send(connection.as_fd(), &FromInit::Failed(error.into()), &[]);
    ExitCode::FAILURE
}

/// A read-only mount of a file, which stands nowhere.
///
/// # Errors
/// The kernel's.
pub(super) fn sealed(file: &Path) -> Result<OwnedFd> {
    let what = || format!("cannot make a read-only mount of {}", file.display());
    let mount = sys::open_tree_clone(file, false).context(what)?;
    sys::mount_setattr(
        mount.as_fd(),
        false,
        &sys::MountAttr {
            set: sys::attr::RDONLY,
            ..sys::MountAttr::default()
        },
    )
    .context(what)?;
    Ok(mount)
}

/// Executes this program, which has the path in `argv[0]`, once more from a read-only mount.
fn run_sealed(args: &[OsString]) -> Result<std::convert::Infallible> {
    let path = std::env::args_os().next().unwrap_or_default();
    let mount = sealed(Path::new(&path))?;
    let argv = [path.as_bytes(), SEALED_INIT.to_bytes()];
    let rest = args.iter().skip(1).map(|arg| arg.as_bytes());
    let argv: Vec<CString> = argv
        .into_iter()
        .chain(rest)
        .map(CString::new)
        .collect::<std::result::Result<_, _>>()
        .map_err(|e| Error::invalid("a NUL byte in an argument").with_source(e))?;
    let env: [CString; 0] = [];
    nix::unistd::execveat(&mount, c"", &argv, &env, AtFlags::AT_EMPTY_PATH)
        .context(|| format!("cannot execute {} from a read-only mount", path.display()))
}

/// The errno in an error of std.
fn io_errno(error: std::io::Error) -> nix::Error {
    error.raw_os_error().map_or(nix::Error::EIO, nix::Error::from_raw)
}

fn close_on_exec(fd: OwnedFd) -> Result<OwnedFd> {
    nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))
        .context(|| "this program is run by containerd-shim-proxmox-lxcri-v1 alone")?;
    Ok(fd)
}

/// Init's own connection, which waits in the socket that the monitor has too.
fn connection(boot: OwnedFd) -> Result<OwnedFd> {
    let what = || "this program is run by containerd-shim-proxmox-lxcri-v1 alone";
    let packet = wire::receive(boot.as_fd()).context(what)?;
    packet
        .and_then(|packet| packet.fds.into_iter().next())
        .ok_or_else(|| Error::invalid(what()))
}

fn tell(connection: &OwnedFd, message: &FromInit) -> Result<()> {
    wire::send(connection.as_fd(), message, &[]).context(|| "cannot reach the shim")
}

/// The shim's next word, and what comes with it. It says nothing any more when it gives the container up.
fn hear(connection: &OwnedFd) -> Result<(ToInit, Vec<OwnedFd>)> {
    let packet = wire::receive(connection.as_fd())
        .context(|| "cannot hear the shim")?
        .ok_or_else(|| Error::new(Kind::Aborted, "the shim has given this process up"))?;
    Ok((packet.read()?, packet.fds))
}

fn unexpected() -> Error {
    Error::unknown("the shim says something else than was expected")
}

/// What to do, and with what.
fn order<P: DeserializeOwned>(connection: &OwnedFd) -> Result<(P, Given)> {
    let (ToInit::Plan { fds: all }, mut fds) = hear(connection)? else {
        return Err(unexpected());
    };
    while fds.len() < all {
        fds.extend(hear(connection)?.1);
    }
    let mut fds = fds.into_iter();
    let missing = || Error::unknown("the shim has sent fewer descriptors than it says");
    let mut document = File::from(fds.next().ok_or_else(missing)?);
    let mut text = Vec::new();
    document
        .rewind()
        .and_then(|()| document.read_to_end(&mut text))
        .context(|| "cannot read the plan")?;
    /// Read first, because another version's plan may not be readable at all.
    #[derive(Deserialize)]
    struct Version {
        version: String,
    }
    let version = serde_json::from_slice::<Version>(&text).map(|order| order.version);
    if version.as_deref().ok() != Some(VERSION) {
        return Err(Error::precondition(format!(
            "proxmox-lxcri-init {VERSION} does not belong to the shim {}; restart the pod, so that it gets a new shim",
            version.as_deref().unwrap_or("that runs")
        )));
    }
    let order: Order<P> =
        serde_json::from_slice(&text).map_err(|e| Error::unknown("cannot understand the plan").with_source(e))?;
    let mut next = || fds.next().ok_or_else(missing);
    let mut given = Given::default();
    if order.has_init {
        given.init = Some(next()?);
    }
    if order.has_console {
        given.console = Some(next()?);
    } else {
        given.stdio = Some([next()?, next()?, next()?]);
    }
    if order.has_agent {
        given.agent = Some(next()?);
    }
    given.trees = fds.collect();
    Ok((order.plan, given))
}

/// From birth to the program.
fn init(connection: &OwnedFd) -> Result<()> {
    process::forbid_tracing()?;
    tell(connection, &FromInit::Hello)?;
    let (plan, mut given) = order::<Plan>(connection)?;
    if let Some(name) = &plan.hostname {
        nix::unistd::sethostname(name).context(|| format!("cannot set hostname {name:?}"))?;
    }
    if let Some(name) = &plan.domainname {
        set_domainname(name)?;
    }
    let mounted = plan.root.mount(std::mem::take(&mut given.trees))?;
    if plan.waits_for_hooks {
        tell(connection, &FromInit::Mounted)?;
        let (ToInit::Go, _) = hear(connection)? else {
            return Err(unexpected());
        };
    }
    let state = |status| plan.facts.state(status, Some(std::process::id())).to_string();
    hooks::run(&plan.create_container, &state("creating"))?;
    let proc = plan.root.enter(mounted)?;
    let terminal = terminal(&plan.process, given.console.take(), true)?;
    let program = plan.process.find(true)?;
    plan.process.label(&proc)?;
    // The terminal goes along for who holds it open meanwhile.
    let held: Vec<BorrowedFd<'_>> = terminal.iter().map(AsFd::as_fd).collect();
    wire::send(connection.as_fd(), &FromInit::Created, &held).context(|| "cannot reach the shim")?;
    let pid = start(connection)?;
    hooks::run(&plan.start_container, &state("created"))?;
    let last = Last {
        proc: &proc,
        terminal,
        given,
        agent: agent_message(&plan.process, &plan.facts.state("created", Some(pid)), pid),
        keep_keyring: plan.keep_keyring,
        constrained: plan.constrained,
    };
    last.become_program(&plan.process, &program)
}

/// Joins a container and makes the process there.
fn joined(connection: &OwnedFd) -> Result<()> {
    process::forbid_tracing()?;
    let (plan, mut given) = order::<ExecPlan>(connection)?;
    if let Some(cpus) = &plan.process.exec_cpu_affinity.initial {
        process::set_cpus(0, cpus)?;
    }
    for file in &plan.cgroups {
        join_cgroup(file)?;
    }
    let target = given
        .init
        .take()
        .ok_or_else(|| Error::unknown("no container to join"))?;
    let flags = CloneFlags::from_bits_retain(plan.namespaces);
    if !flags.is_empty() {
        setns(&target, flags).context(|| "cannot join the namespaces of the container")?;
    }
    drop(target);
    if flags.contains(CloneFlags::CLONE_NEWUSER) {
        // Nobody of the host is somebody in there.
        setresgid(Gid::from_raw(0), Gid::from_raw(0), Gid::from_raw(0))
            .and_then(|()| setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0)))
            .context(|| "cannot become root of the container's user namespace")?;
        // A change of ids makes a process dumpable as it was executed.
        process::forbid_tracing()?;
    }
    // SAFETY: clone without a stack of its own is fork, for a process with one thread. The new process has the parent of this one.
    match unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_PARENT | libc::SIGCHLD, 0, 0, 0, 0) } {
        ..0 => Err(std::io::Error::last_os_error()).context(|| "cannot make a process in the container"),
        0 => {
            let done = born(connection, &plan, given);
            if let Err(error) = done {
                let _ = wire::send(connection.as_fd(), &FromInit::Failed(error.into()), &[]);
            }
            std::process::exit(1)
        }
        _ => Ok(()),
    }
}

fn born(connection: &OwnedFd, plan: &ExecPlan, mut given: Given) -> Result<()> {
    tell(connection, &FromInit::Hello)?;
    let terminal = terminal(&plan.process, given.console.take(), false)?;
    let program = plan.process.find(false)?;
    let proc = own_proc()?;
    plan.process.label(&proc)?;
    let pid = start(connection)?;
    let user_namespace = plan.namespaces & libc::CLONE_NEWUSER != 0;
    let last = Last {
        proc: &proc,
        terminal,
        given,
        agent: agent_message(&plan.process, &plan.facts.state("running", Some(plan.init)), pid),
        keep_keyring: plan.keep_keyring,
        constrained: user_namespace,
    };
    last.become_program(&plan.process, &program)
}

/// procfs for the process of an exec: the container's own where the kernel gives no other, in a user namespace.
fn own_proc() -> Result<Proc> {
    Proc::open().or_else(|e| match open_folder("/proc") {
        Ok(folder) => Ok(Proc::over(folder)),
        Err(_) => Err(e),
    })
}

fn open_folder(path: &str) -> nix::Result<OwnedFd> {
    nix::fcntl::open(
        path,
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
}

/// Waits for the word, which says this process's pid on the host.
fn start(connection: &OwnedFd) -> Result<u32> {
    match hear(connection)? {
        (ToInit::Start { pid }, _) => Ok(pid),
        _ => Err(unexpected()),
    }
}

fn agent_message(process: &Process, state: &serde_json::Value, pid: u32) -> Option<String> {
    let listener = process.seccomp.as_ref()?.listener.as_ref()?;
    Some(process::agent_message(listener.metadata.as_deref(), pid, state))
}

fn set_domainname(name: &str) -> Result<()> {
    // SAFETY: the kernel reads as many bytes as it is told.
    match unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()).context(|| format!("cannot set domainname {name:?}")),
    }
}

fn join_cgroup(file: &std::path::Path) -> Result<()> {
    OpenOptions::new()
        .write(true)
        .open(file)
        .and_then(|mut file| file.write_all(b"0"))
        .context(|| format!("cannot join the cgroup of {}", file.display()))
}

/// Makes the terminal and hands its master to the shim.
fn terminal(process: &Process, console: Option<OwnedFd>, is_init: bool) -> Result<Option<OwnedFd>> {
    let Some(console) = console else { return Ok(None) };
    let dev = open_folder("/dev").context(|| "process.terminal: cannot open /dev of the container")?;
    let made = terminal::open(dev.as_fd(), process.uid, process.console_size)?;
    if is_init {
        terminal::bind_console(dev.as_fd(), made.slave.as_fd())?;
    }
    terminal::send(console, made.master)?;
    Ok(Some(made.slave))
}

/// What the last steps need.
struct Last<'a> {
    proc: &'a Proc,
    terminal: Option<OwnedFd>,
    given: Given,
    agent: Option<String>,
    keep_keyring: bool,
    constrained: bool,
}

impl Last<'_> {
    /// Returns only when it failed.
    fn become_program(self, process: &Process, program: &process::Program) -> Result<()> {
        if let Some(slave) = self.terminal {
            terminal::make_controlling(slave)?;
        } else if let Some([stdin, stdout, stderr]) = &self.given.stdio {
            dup2_stdin(stdin)
                .and_then(|()| dup2_stdout(stdout))
                .and_then(|()| dup2_stderr(stderr))
                .context(|| "cannot set the standard streams")?;
        }
        let agent = match (self.given.agent, self.agent) {
            (Some(socket), Some(message)) => Some(process::Agent { socket, message }),
            _ => None,
        };
        Err(process.exec(
            program,
            process::Start {
                proc: self.proc,
                constrained: self.constrained,
                keep_keyring: self.keep_keyring,
                agent,
            },
        ))
    }
}

/// Opens what lies below `folder`, through no symlink.
fn open_below(folder: BorrowedFd<'_>, path: &str, flags: OFlag) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .mode(Mode::empty())
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(folder, path, how)
}

/// Makes every descriptor above 2 close-on-exec, so that no program of the container gets one of the helper's.
///
/// # Errors
/// The operating system's (kernels before 5.11).
pub fn seal_descriptors() -> nix::Result<()> {
    // SAFETY: close_range takes three integers; with this flag it closes nothing now.
    let result = unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_int::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    Errno::result(result).map(drop)
}

/// Sends `data` over a stream socket, and a descriptor with its first byte.
fn send_descriptor(socket: BorrowedFd<'_>, descriptor: BorrowedFd<'_>, data: &[u8]) -> nix::Result<()> {
    let rights = [descriptor.as_raw_fd()];
    let mut control: &[ControlMessage<'_>] = &[ControlMessage::ScmRights(&rights)];
    let mut rest = data;
    loop {
        match sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(rest)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        ) {
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
            Ok(sent) => {
                rest = rest.get(sent..).unwrap_or_default();
                control = &[];
                if rest.is_empty() {
                    return Ok(());
                }
            }
        }
    }
}
