//! `start`: finds the shim of the container's group or makes one, and answers its address.
//!
//! The socket listens before the answer is printed, so the first connect succeeds even if the shim is not up yet: it waits in the
//! backlog. The shim is started first, with a socket that has no place yet: if this process is killed at whatever instruction (the
//! caller's deadline), either there is no socket file, or a shim that removes it and ends, because nobody tells it to go on. This process does everything that the shim inherits (cgroup, OOM score, core scheduling) on itself, before the shim's
//! first instruction; it ends right afterwards.

use std::{
    env,
    ffi::{CString, OsString},
    fs,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStringExt,
    },
    path::Path,
};

use log::{Level, Log, Record};
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn},
    sys::{
        signal::{SigSet, Signal},
        stat::Mode,
    },
    unistd::{getppid, pipe2},
};

use super::{
    address_file,
    args::Flags,
    bootstrap::{self, Environment, Request},
    container,
    log::FifoLog,
    server::{LISTENER_FD, START_FD},
    socket::{Acquired, Claim, DEFAULT_DIR, Place, unbound},
};
use crate::{
    backend::check_id,
    config,
    error::{Context, Error, Result},
    host::cgroup,
    task::bundle::Bundle,
};

/// Highest OOM score adjustment (proc(5), oom_score_adj).
const OOM_SCORE_ADJ_MAX: i32 = 1000;

/// What `start` has to say.
#[derive(Debug)]
pub struct Started {
    /// What is to be printed.
    pub answer: Vec<u8>,
    /// A shim that was made just now, and waits.
    pub shim: Option<Newborn>,
}

/// A shim that listens and waits for the word that its address was told. Without it (this process was killed) it ends: nobody would
/// ever call it.
#[derive(Debug)]
pub struct Newborn(OwnedFd);

impl Newborn {
    /// Says that the answer was printed.
    ///
    /// # Errors
    /// The operating system's: the shim is gone.
    pub fn is_known(self) -> Result<()> {
        nix::unistd::write(self.0, b".")
            .map(drop)
            .context(|| "the shim has ended right after its start")
    }
}

/// Does it, for the bundle in the working directory.
///
/// # Errors
/// When the arguments, stdin or the bundle are wrong, or the operating system refuses. No socket, no process and no address file is
/// left behind then.
pub fn start(flags: &Flags) -> Result<Started> {
    check_id("namespace", &flags.namespace)?;
    check_id("id", &flags.id)?;
    let input = bootstrap::read_stdin(std::io::stdin().as_fd())?;
    let environment = Environment {
        ttrpc_address: env::var("TTRPC_ADDRESS").ok(),
        grpc_address: env::var("GRPC_ADDRESS").ok(),
        max_shim_version: env::var("MAX_SHIM_VERSION").ok(),
    };
    let request = bootstrap::decode(&input, flags, &environment)?;
    let cwd = env::current_dir().context(|| "cannot see the working directory")?;
    let bundle = Bundle::read(&cwd)?;
    let dir = request.socket_dir.as_deref().unwrap_or(Path::new(DEFAULT_DIR));
    let place = Place::new(dir, &request.address, &flags.namespace, bundle.group(&flags.id))?;
    let answer = bootstrap::encode(request.form, &place.address())?;
    let shim = match place.acquire()? {
        Acquired::Live => write_address(&cwd, &place).map(|()| None)?,
        Acquired::Free(claim) => launch(flags, &request, &bundle, &place, claim)
            .map(Some)
            .inspect_err(|_| {
                let _ = fs::remove_file(address_file(&cwd));
            })?,
    };
    Ok(Started { answer, shim })
}

fn launch(flags: &Flags, request: &Request, bundle: &Bundle, place: &Place, claim: Claim<'_>) -> Result<Newborn> {
    let log = FifoLog::new(&bundle.path, &flags.namespace, &flags.id, request.debug);
    join_cgroup(flags, request, bundle)?;
    if let Err(e) = adjust_oom_score() {
        // Raising needs no right; lowering, after somebody raised ours, may be forbidden. Containers run all the same.
        warn(&log, &e);
    }
    schedule_core(&log)?;
    write_address(&bundle.path, place)?;
    let socket = unbound()?;
    let (done, doing) = pipe2(OFlag::O_CLOEXEC).context(|| "cannot make a pipe")?;
    spawn(flags, request, &socket, &done)?;
    claim.listen(&socket)?;
    Ok(Newborn(doing))
}

/// Puts this process, and so the shim, into the cgroup that the options name.
///
/// All options are resolved, not only the one: containerd sends the same again with Create, and a mistake in them is better told
/// before there is a shim.
fn join_cgroup(flags: &Flags, request: &Request, bundle: &Bundle) -> Result<()> {
    let options = config::load(&config::config_file(), request.options(), container(flags, bundle))?;
    if options.shim_cgroup.is_empty() {
        return Ok(());
    }
    cgroup::join(&options.shim_cgroup, std::process::id())
        .context(|| format!("cannot put the shim into cgroup {}", options.shim_cgroup))
}

/// One above containerd's own, which ran us: the kernel takes a shim before the daemon, and containers, whose score CRI sets, before
/// the shim.
fn adjust_oom_score() -> Result<()> {
    let parent = format!("/proc/{}/oom_score_adj", getppid());
    let text = fs::read_to_string(&parent).context(|| format!("cannot read {parent}"))?;
    let score: i32 = text
        .trim()
        .parse()
        .map_err(|e| Error::unknown(format!("cannot understand {parent}")).with_source(e))?;
    let score = (score + 1).min(OOM_SCORE_ADJ_MAX);
    fs::write("/proc/self/oom_score_adj", score.to_string())
        .context(|| format!("cannot set the OOM score of the shim to {score}"))
}

/// With SCHED_CORE set, the shim and its containers get a core-scheduling cookie of their own: no hyperthread is shared with others.
fn schedule_core(log: &FifoLog) -> Result<()> {
    if env::var_os("SCHED_CORE").is_none_or(|value| value.is_empty()) {
        return Ok(());
    }
    // SAFETY: prctl(PR_SCHED_CORE) with constants and no pointer: pid 0 is this process.
    let result = unsafe {
        libc::prctl(
            libc::PR_SCHED_CORE,
            libc::PR_SCHED_CORE_CREATE,
            0,
            libc::PR_SCHED_CORE_SCOPE_THREAD_GROUP,
            0,
        )
    };
    match nix::errno::Errno::result(result) {
        // No hyperthreads, nothing to share.
        Err(nix::errno::Errno::ENODEV) => {
            warn(log, &"SCHED_CORE is set, but this machine has no hyperthreads");
            Ok(())
        }
        result => result
            .map(drop)
            .context(|| "cannot create a core-scheduling domain (SCHED_CORE)"),
    }
}

/// stderr belongs to containerd's parser; what is only worth a warning goes to the log.
fn warn(log: &FifoLog, text: &dyn std::fmt::Display) {
    log.log(
        &Record::builder()
            .level(Level::Warn)
            .args(format_args!("{text}"))
            .build(),
    );
}

fn write_address(bundle: &Path, place: &Place) -> Result<()> {
    let target = address_file(bundle);
    let partial = bundle.join(".address.new");
    fs::write(&partial, place.address())
        .and_then(|()| fs::rename(&partial, &target))
        .inspect_err(|_| {
            let _ = fs::remove_file(&partial);
        })
        .context(|| format!("cannot write {}", target.display()))
}

/// Runs this program again as the shim: in a session of its own, with `socket` as descriptor 3, `done` as descriptor 4, and nothing
/// else of ours.
fn spawn(flags: &Flags, request: &Request, socket: &OwnedFd, done: &OwnedFd) -> Result<()> {
    let failed = || "cannot start the shim";
    // SAFETY: no pointer; marks every descriptor from 3 on close-on-exec, ours and what the caller leaked.
    let result = unsafe { libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as i32) };
    nix::errno::Errno::result(result).context(failed)?;

    let mut actions = PosixSpawnFileActions::init().context(failed)?;
    for fd in 0..3 {
        actions
            .add_open(fd, "/dev/null", OFlag::O_RDWR, Mode::empty())
            .context(failed)?;
    }
    // Copies out of the way first, so that neither takes the other's number.
    let away = |fd: &OwnedFd| fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(START_FD + 1)).context(failed);
    let (socket, done) = (away(socket)?, away(done)?);
    actions.add_dup2(socket, LISTENER_FD).context(failed)?;
    actions.add_dup2(done, START_FD).context(failed)?;

    let mut attributes = PosixSpawnAttr::init().context(failed)?;
    let session = PosixSpawnFlags::from_bits_retain(libc::POSIX_SPAWN_SETSID.into());
    let signals = PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK | PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF;
    attributes.set_flags(session | signals).context(failed)?;
    attributes.set_sigmask(&SigSet::empty()).context(failed)?;
    let mut defaults = SigSet::empty();
    for signal in Signal::iterator().filter(|s| !matches!(s, Signal::SIGKILL | Signal::SIGSTOP)) {
        defaults.add(signal);
    }
    attributes.set_sigdefault(&defaults).context(failed)?;

    let program = env::args_os()
        .next()
        .unwrap_or_else(|| "containerd-shim-proxmox-lxcri-v1".into());
    let mut arguments: Vec<OsString> = vec![
        program,
        "-namespace".into(),
        flags.namespace.clone().into(),
        "-id".into(),
        flags.id.clone().into(),
        "-address".into(),
        request.address.clone().into(),
    ];
    if request.debug {
        arguments.push("-debug".into());
    }
    let mut environment: Vec<OsString> = Vec::new();
    for (name, value) in env::vars_os().filter(|(name, _)| name != "TTRPC_ADDRESS") {
        environment.push([name, value].join(std::ffi::OsStr::new("=")));
    }
    if let Some(address) = &request.ttrpc_address {
        environment.push(format!("TTRPC_ADDRESS={address}").into());
    }
    posix_spawn(
        c"/proc/self/exe",
        &actions,
        &attributes,
        &c_strings(arguments)?,
        &c_strings(environment)?,
    )
    .map(drop)
    .context(failed)
}

fn c_strings(words: Vec<OsString>) -> Result<Vec<CString>> {
    words
        .into_iter()
        .map(|word| {
            CString::new(word.into_vec()).map_err(|e| Error::invalid("an address has a NUL character").with_source(e))
        })
        .collect()
}
