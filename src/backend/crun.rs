//! The crun backend. Init is born in `create` (for a restore: in `start`).
//!
//! Each call is one run of the program, nothing more: what it reads and writes besides the container's stdio (the process document,
//! the pid, its log) are memory files of this process that it reaches through `/proc`, so that no call leaves a file behind, not even
//! one that is killed half-way. crun's own truth about a container is `<root>/<namespace>/<id>/status`; it is read, never copied.
//!
//! Texts of crun are matched in [`classify`] only, against outputs recorded from the named versions.

use std::{
    ffi::OsString,
    fs::{self, DirBuilder, File},
    io::{self, Read},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{DirBuilderExt, FileExt},
    },
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Duration,
};

use async_trait::async_trait;
use nix::{
    fcntl::{OFlag, openat},
    sys::stat::{Mode, SFlag, mknodat},
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Backend, CheckpointOptions, ChildIo, ExecSpec, Launched, Observed, check_id};
use crate::{
    config::Options,
    error::{Context, Error, Kind, Result},
    host::{
        cgroup::Cgroup,
        command::{Command, Output, Pidfd, Reaper, end, identity, is_alive},
        memory_file,
    },
    rootfs::sys::{FsContext, attr},
    task::{
        bundle::Bundle,
        record::{Identity, Record},
    },
};

/// What of crun's log is read, from its end.
const LOG_MAX_BYTES: u64 = 64 << 10;
/// What of crun's errors goes into one of ours.
const MESSAGE_MAX_CHARS: usize = 2048;
/// What of crun's status file is read. It holds a dozen short fields.
const STATUS_MAX_BYTES: u64 = 1 << 20;
/// Bound of the wait for a process that was sent SIGKILL.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);
/// Variables that crun, CRIU and the way to systemd need. Not NOTIFY_SOCKET and LISTEN_FDS, which crun would hand on to the container.
const ENVIRONMENT: [&str; 4] = ["PATH", "HOME", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS"];

/// See the module.
#[derive(Debug, Clone)]
pub struct Crun {
    reaper: Reaper,
    /// See [`Crun::or_null`].
    null: Arc<OnceLock<File>>,
}

/// crun's commands, as they are in an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verb {
    Create,
    Start,
    Exec,
    Update,
    Checkpoint,
    Restore,
    Delete,
}

impl Verb {
    fn name(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Start => "start",
            Self::Exec => "exec",
            Self::Update => "update",
            Self::Checkpoint => "checkpoint",
            Self::Restore => "restore",
            Self::Delete => "delete",
        }
    }

    /// What a run that was killed at its bound may have left.
    fn left_behind(self) -> &'static str {
        match self {
            Self::Create => "Delete removes what it made",
            Self::Start | Self::Restore => "the container may be running; State tells, Delete ends it",
            Self::Exec => "its process was killed if crun had told its pid, else it ends with the container",
            Self::Update => "some of the limits may be set; Update again",
            Self::Checkpoint => "the images are incomplete, and the container may be frozen; Resume or Delete it",
            Self::Delete => "Delete again to remove the rest",
        }
    }
}

impl Crun {
    /// A backend that keeps no state; it runs crun through `reaper`, which MUST be the process's one.
    pub fn new(reaper: Reaper) -> Self {
        Self {
            reaper,
            null: Arc::default(),
        }
    }

    /// For a stream that is absent, a null device of the shim's own.
    ///
    /// crun makes the user of a process the owner of its stdio. By that the node's `/dev/null` would belong to whoever is root in a user
    /// namespace. Where the shim may not make devices it is the node's, as with any other shim.
    fn or_null(&self, stream: Option<OwnedFd>) -> Result<Option<OwnedFd>> {
        if stream.is_some() {
            return Ok(stream);
        }
        if self.null.get().is_none() {
            match null_device() {
                // Another task may have been first, with another one.
                Ok(null) => drop(self.null.set(null)),
                Err(e) => log::debug!("no null device of the shim's own: {e}"),
            }
        }
        let null = self.null.get().map(|null| null.try_clone().map(OwnedFd::from));
        null.transpose().context(|| "cannot hold the null device")
    }

    /// What the crun program can do, in the form of OCI features.md: `crun features`, or what `crun --version` tells where that
    /// command does not exist (crun 1.8.1).
    ///
    /// # Errors
    /// `Unavailable` when there is no such program; `DeadlineExceeded`; `Unknown` when it prints something else.
    pub async fn features(&self, options: &Options) -> Result<Value> {
        let output = self.ask(options, "features").await?;
        if output.exit.status == 0 {
            return serde_json::from_slice(&output.stdout).map_err(|e| {
                Error::unknown(format!(
                    "cannot parse the output of {} features",
                    options.crun_binary.display()
                ))
                .with_source(e)
            });
        }
        let version = self.ask(options, "--version").await?;
        features_of_version(&String::from_utf8_lossy(&version.stdout)).ok_or_else(|| {
            Error::unknown(format!(
                "{} --version does not look like crun's; check crun_binary",
                options.crun_binary.display()
            ))
        })
    }

    /// Fails unless crun was built with CRIU.
    async fn require_criu(&self, options: &Options, what: &str) -> Result<()> {
        let version = self.ask(options, "--version").await?;
        if String::from_utf8_lossy(&version.stdout)
            .split_ascii_whitespace()
            .any(|word| word == "+CRIU")
        {
            return Ok(());
        }
        Err(Error::unimplemented(format!(
            "cannot {what}: {} was built without CRIU (its --version does not list +CRIU); use a crun that has it",
            options.crun_binary.display()
        )))
    }

    async fn ask(&self, options: &Options, argument: &str) -> Result<Output> {
        let command = crun_command(options).arg(argument);
        self.reaper
            .output(command, timeout(options))
            .await
            .map_err(|e| missing_program(e, options))
    }

    /// Runs crun to its end.
    async fn call(&self, rec: &Record, verb: Verb, args: Vec<OsString>, io: ChildIo) -> Result<()> {
        let log = Scratch::new(&[])?;
        let failed = |e: Error| e.context(format!("OCI runtime {} failed", verb.name()));
        let mut command = crun_command(&rec.options)
            .args(global_args(rec, &log.path())?)
            .args(args)
            .die_with_parent()
            .process_group();
        if let ChildIo::Pipes { stdin, stdout, stderr } = io {
            for (number, fd) in [stdin, stdout, stderr].into_iter().enumerate() {
                if let Some(fd) = fd {
                    command = command.fd(number as i32, fd);
                }
            }
        }
        let mut child = self
            .reaper
            .spawn(command)
            .map_err(|e| failed(missing_program(e, &rec.options)))?;
        let exit = match tokio::time::timeout(timeout(&rec.options), child.wait()).await {
            Ok(exit) => exit?,
            Err(_) => {
                child.kill();
                let _ = tokio::time::timeout(KILL_TIMEOUT, child.wait()).await;
                return Err(failed(Error::deadline(format!(
                    "crun did not end within {} ms and was killed; {}",
                    rec.options.runtime_timeout_ms,
                    verb.left_behind()
                ))));
            }
        };
        if exit.status == 0 && !rec.options.crun_debug {
            return Ok(());
        }
        let log = log.read_end(LOG_MAX_BYTES)?;
        if rec.options.crun_debug {
            for line in String::from_utf8_lossy(&log).lines() {
                log::debug!("crun {} {}: {line}", verb.name(), rec.id);
            }
        }
        if exit.status == 0 {
            return Ok(());
        }
        Err(failed(classify(&rec.id, exit.status, &errors_of_log(&log))))
    }

    /// Runs a command of crun that leaves a process behind, and takes that process over.
    async fn launch(&self, rec: &Record, verb: Verb, args: Vec<OsString>, io: ChildIo) -> Result<Launched> {
        // The process becomes our child when crun leaves, and may end before its number is known here.
        let hold = self.reaper.hold();
        let mut birth = Birth {
            reaper: self.reaper.clone(),
            pid_file: Scratch::new(&[])?,
            done: false,
        };
        let mut all = vec![verb.name().into(), "--pid-file".into(), birth.pid_file.path().into()];
        if let ChildIo::Terminal { console_socket } = &io {
            all.extend(["--console-socket".into(), console_socket.into()]);
        }
        all.extend(args);
        let io = match io {
            ChildIo::Pipes { stdin, stdout, stderr } => ChildIo::Pipes {
                stdin: self.or_null(stdin)?,
                stdout: self.or_null(stdout)?,
                stderr: self.or_null(stderr)?,
            },
            terminal => terminal,
        };
        self.call(rec, verb, all, io).await?;
        let Some(pid) = birth.pid()? else {
            return Err(Error::unknown(format!(
                "OCI runtime {} failed: crun succeeded, but told no pid; check crun_binary",
                verb.name()
            )));
        };
        if !self.reaper.may_be_left_to_us(pid) {
            return Err(Error::unknown(format!(
                "OCI runtime {} failed: crun told pid {pid}, which is no process that it has made; check crun_binary",
                verb.name()
            )));
        }
        let (process, exit) = self.reaper.adopt(pid)?;
        birth.done = true;
        drop(hold);
        Ok(Launched {
            pid,
            process,
            exit,
            cgroup: None,
        })
    }

    /// Ends everything in the container's cgroup, the frozen too: signals alone do not end those.
    async fn kill_cgroup(&self, rec: &Record) -> Result<()> {
        let cgroup = match &rec.cgroup {
            Some(cgroup) => Some(cgroup.clone()),
            None => Cgroup::expected(rec.cgroups_path.as_deref(), rec.options.systemd_cgroup, &rec.id)?,
        };
        match cgroup {
            Some(cgroup) => cgroup.kill_all(KILL_TIMEOUT).await,
            None => Ok(()),
        }
    }

    /// Undoes by hand what crun cannot: its state folder, if there is one, does not tell any more what it made.
    async fn undo_half_made(&self, rec: &Record, dir: &Path) -> Result<()> {
        self.kill_cgroup(rec).await?;
        let mut leftovers: Vec<Identity> = rec.init.into_iter().collect();
        if dir.exists() {
            leftovers.extend(processes_that_hold(dir)?);
        }
        for process in leftovers {
            end(&process, KILL_TIMEOUT).await?;
        }
        if !dir.exists() {
            return Ok(());
        }
        let cgroup = Cgroup::expected(rec.cgroups_path.as_deref(), rec.options.systemd_cgroup, &rec.id)?;
        if let Some(cgroup) = cgroup {
            cgroup.remove(KILL_TIMEOUT).await?;
        }
        // Last: as long as it is there, another delete comes this way.
        match fs::remove_dir_all(dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(e).context(|| format!("cannot remove {}", dir.display()))
            }
            _ => Ok(()),
        }
    }
}

#[async_trait]
impl Backend for Crun {
    fn name(&self) -> &'static str {
        "crun"
    }

    /// # Errors
    /// "OCI runtime create failed: …" with crun's reason; for a missing program the words `executable file not found in $PATH`.
    /// `DeadlineExceeded` at [`Options::runtime_timeout_ms`]. [`Backend::delete`] removes what is left.
    async fn create(&self, rec: &Record, bundle: &Bundle, io: &mut Option<ChildIo>) -> Result<Option<Launched>> {
        if let Some(images) = &rec.restore_from {
            if !images.is_dir() {
                return Err(Error::invalid(format!(
                    "cannot restore {}: checkpoint {} is not a folder",
                    rec.id,
                    images.display()
                )));
            }
            self.require_criu(&rec.options, "restore a container").await?;
        }
        let root = root(rec)?;
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&root)
            .context(|| format!("cannot make crun's state folder {}", root.display()))?;
        if rec.restore_from.is_some() {
            return Ok(None);
        }
        let launched = self
            .launch(rec, Verb::Create, create_args(rec, &bundle.path), take_io(io))
            .await?;
        Ok(Some(launched))
    }

    async fn start(&self, rec: &Record, io: &mut Option<ChildIo>) -> Result<Option<Launched>> {
        if let Some(images) = &rec.restore_from {
            let launched = self
                .launch(rec, Verb::Restore, restore_args(rec, images), take_io(io))
                .await?;
            return Ok(Some(launched));
        }
        let args = vec![Verb::Start.name().into(), rec.id.clone().into()];
        self.call(rec, Verb::Start, args, no_io()).await?;
        Ok(None)
    }

    /// # Errors
    /// "OCI runtime exec failed: …" with crun's reason, as in `create`. A process that was already made is killed then.
    async fn exec(&self, rec: &Record, exec_id: &str, process: &ExecSpec, io: ChildIo) -> Result<Launched> {
        check_id("exec id", exec_id)?;
        let document = Scratch::new(&exec_document(process)?)?;
        let args = vec![
            "--process".into(),
            document.path().into(),
            "--detach".into(),
            rec.id.clone().into(),
        ];
        self.launch(rec, Verb::Exec, args, io).await
    }

    async fn observe(&self, rec: &Record) -> Result<Observed> {
        let dir = state_dir(rec)?;
        let Some(status) = read_status(&dir).filter(|status| !status.is_of_another(&rec.bundle)) else {
            return Ok(Observed::Absent);
        };
        let Some(init) = status.identity().filter(is_alive) else {
            return Ok(Observed::Stopped);
        };
        // crun's init opens and removes this fifo when it is started.
        if dir.join("exec.fifo").exists() {
            return Ok(Observed::Created { pid: init.pid });
        }
        Ok(Observed::Running { pid: init.pid })
    }

    /// Works on a state that crun left half-written, too: crun 1.8.1 removes such a state with success while its processes live on.
    /// A container of the same id in the same crun root, but of another bundle, is another daemon's and is left alone.
    async fn delete(&self, rec: &Record) -> Result<()> {
        let dir = state_dir(rec)?;
        let Some(status) = read_status(&dir) else {
            return self.undo_half_made(rec, &dir).await;
        };
        if status.is_of_another(&rec.bundle) {
            log::warn!(
                "container {} in {} belongs to bundle {}; it is left alone",
                rec.id,
                dir.display(),
                status.bundle.display()
            );
            return Ok(());
        }
        let mut errors = Vec::new();
        let args = vec![Verb::Delete.name().into(), "--force".into(), rec.id.clone().into()];
        match self.call(rec, Verb::Delete, args, no_io()).await {
            Err(e) if e.kind() != Kind::NotFound => errors.push(e),
            _ => {}
        }
        if dir.exists() {
            // The state stays for the next delete: it knows the cgroup. But nothing runs on.
            errors.extend(self.kill_cgroup(rec).await.err());
            for process in status.identity().into_iter().chain(rec.init) {
                errors.extend(end(&process, KILL_TIMEOUT).await.err());
            }
        }
        Error::all(errors).map_or(Ok(()), Err)
    }

    /// The poststop hooks do not run then. They are crun's to run, and it is crun that does not work.
    async fn erase(&self, rec: &Record, failed: Error) -> Result<()> {
        let dir = state_dir(rec)?;
        if let Some(status) = read_status(&dir) {
            if status.is_of_another(&rec.bundle) {
                return Err(failed);
            }
            self.kill_cgroup(rec).await?;
            if let Some(init) = status.identity() {
                end(&init, KILL_TIMEOUT).await?;
            }
        }
        self.undo_half_made(rec, &dir).await?;
        log::warn!(
            "container {} was removed without crun, its poststop hooks did not run: {failed}",
            rec.id
        );
        Ok(())
    }

    async fn update(&self, rec: &Record, resources_json: &[u8]) -> Result<()> {
        let resources = Scratch::new(resources_json)?;
        let args = vec![
            Verb::Update.name().into(),
            "--resources".into(),
            resources.path().into(),
            rec.id.clone().into(),
        ];
        self.call(rec, Verb::Update, args, no_io()).await
    }

    async fn checkpoint(&self, rec: &Record, options: &CheckpointOptions) -> Result<()> {
        let args = checkpoint_args(rec, options)?;
        self.require_criu(&rec.options, "checkpoint a container").await?;
        self.call(rec, Verb::Checkpoint, args, no_io()).await
    }
}

/// A file in memory that crun opens by path. It ends with this process or the value, whatever happens in between.
#[derive(Debug)]
struct Scratch(File);

impl Scratch {
    fn new(content: &[u8]) -> Result<Self> {
        memory_file(content).map(Self)
    }

    fn path(&self) -> PathBuf {
        // Not /proc/self: crun shall open this process's descriptor, it does not inherit it.
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()).into()
    }

    fn read_end(&self, max: u64) -> Result<Vec<u8>> {
        let read = || -> io::Result<Vec<u8>> {
            let size = self.0.metadata()?.len();
            let mut bytes = vec![0; size.min(max) as usize];
            let mut done = 0;
            // A process of crun that still lives may write while this reads.
            while done < bytes.len() {
                match self
                    .0
                    .read_at(&mut bytes[done..], size.saturating_sub(max) + done as u64)?
                {
                    0 => break,
                    n => done += n,
                }
            }
            bytes.truncate(done);
            Ok(bytes)
        };
        read().context(|| "cannot read what crun wrote")
    }
}

/// A process that crun is about to make. Dropped before it was adopted, it is killed, so that a failed or cancelled call leaves none.
struct Birth {
    reaper: Reaper,
    pid_file: Scratch,
    done: bool,
}

impl Birth {
    fn pid(&self) -> Result<Option<u32>> {
        let text = self.pid_file.read_end(32)?;
        if text.is_empty() {
            return Ok(None);
        }
        parse_pid(&text).map(Some)
    }
}

impl Drop for Birth {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        if let Ok(Some(pid)) = self.pid()
            // The number may be another's: crun has reaped the process itself, or has told nonsense.
            && let Ok(process) = Pidfd::open(pid)
            && self.reaper.may_be_left_to_us(pid)
        {
            let _ = process.signal(libc::SIGKILL);
        }
    }
}

fn parse_pid(text: &[u8]) -> Result<u32> {
    std::str::from_utf8(text)
        .ok()
        .and_then(|text| text.trim().parse::<u32>().ok())
        .filter(|pid| (2..=i32::MAX as u32).contains(pid))
        .ok_or_else(|| {
            Error::unknown(format!(
                "crun told a pid that is none: {:?}",
                String::from_utf8_lossy(text)
            ))
        })
}

/// A null device in a file system of its own, which is gone with the descriptor.
fn null_device() -> io::Result<File> {
    let folder = FsContext::open(c"tmpfs")?;
    folder.set(c"nr_inodes", c"2")?;
    let folder = folder.mount(attr::NOSUID | attr::NOEXEC)?;
    let mode = Mode::from_bits_truncate(0o666);
    mknodat(&folder, "null", SFlag::S_IFCHR, mode, libc::makedev(1, 3))?;
    Ok(openat(&folder, "null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())?.into())
}

fn take_io(io: &mut Option<ChildIo>) -> ChildIo {
    io.take().unwrap_or_else(no_io)
}

fn no_io() -> ChildIo {
    ChildIo::Pipes {
        stdin: None::<OwnedFd>,
        stdout: None,
        stderr: None,
    }
}

fn timeout(options: &Options) -> Duration {
    Duration::from_millis(options.runtime_timeout_ms)
}

fn crun_command(options: &Options) -> Command {
    ENVIRONMENT
        .iter()
        .filter_map(|key| Some((key, std::env::var_os(key)?)))
        .fold(
            Command::new(&options.crun_binary).env_clear(),
            |command, (key, value)| command.env(key, value),
        )
}

/// The containers of one containerd namespace.
fn root(rec: &Record) -> Result<PathBuf> {
    check_id("namespace", &rec.namespace)?;
    Ok(rec.options.crun_root.join(&rec.namespace))
}

/// crun's state of one container.
fn state_dir(rec: &Record) -> Result<PathBuf> {
    check_id("container id", &rec.id)?;
    Ok(root(rec)?.join(&rec.id))
}

fn global_args(rec: &Record, log: &Path) -> Result<Vec<OsString>> {
    check_id("container id", &rec.id)?;
    let mut args: Vec<OsString> = vec![
        "--root".into(),
        root(rec)?.into(),
        "--log".into(),
        log.into(),
        "--log-format".into(),
        "json".into(),
    ];
    if rec.options.systemd_cgroup {
        args.push("--systemd-cgroup".into());
    }
    if rec.options.crun_debug {
        args.push("--debug".into());
    }
    Ok(args)
}

fn create_args(rec: &Record, bundle: &Path) -> Vec<OsString> {
    let mut args: Vec<OsString> = vec!["--bundle".into(), bundle.into()];
    if rec.options.no_pivot_root {
        args.push("--no-pivot".into());
    }
    if rec.options.no_new_keyring {
        args.push("--no-new-keyring".into());
    }
    args.push(rec.id.clone().into());
    args
}

/// What the checkpoint was allowed to contain is allowed here: it was decided when it was taken, and the request does not repeat it.
fn restore_args(rec: &Record, images: &Path) -> Vec<OsString> {
    let mut args: Vec<OsString> = vec![
        "--bundle".into(),
        rec.bundle.clone().into(),
        "--image-path".into(),
        images.into(),
    ];
    if let Some(work) = &rec.options.criu_work_path {
        args.extend(["--work-path".into(), work.into()]);
    }
    for flag in ["--tcp-established", "--ext-unix-sk", "--file-locks", "--detach"] {
        args.push(flag.into());
    }
    args.push(rec.id.clone().into());
    args
}

fn checkpoint_args(rec: &Record, options: &CheckpointOptions) -> Result<Vec<OsString>> {
    let images = Some(&options.image_path)
        .filter(|path| !path.as_os_str().is_empty())
        .or(rec.options.criu_image_path.as_ref())
        .ok_or_else(|| Error::invalid(format!("cannot checkpoint {}: no image path is given", rec.id)))?;
    let mut args: Vec<OsString> = vec![Verb::Checkpoint.name().into(), "--image-path".into(), images.into()];
    if let Some(work) = options.work_path.as_ref().or(rec.options.criu_work_path.as_ref()) {
        args.extend(["--work-path".into(), work.into()]);
    }
    for (wanted, flag) in [
        (!options.exit, "--leave-running"),
        (options.open_tcp, "--tcp-established"),
        (options.external_unix_sockets, "--ext-unix-sk"),
        (options.terminal, "--shell-job"),
        (options.file_locks, "--file-locks"),
    ] {
        if wanted {
            args.push(flag.into());
        }
    }
    match options.cgroups_mode.as_str() {
        "" => {}
        mode @ ("soft" | "full" | "strict" | "ignore") => {
            args.extend(["--manage-cgroups-mode".into(), mode.into()]);
        }
        mode => {
            return Err(Error::invalid(format!(
                "cannot checkpoint {}: unknown cgroups mode {mode:?}; known are soft, full, strict and ignore",
                rec.id
            )));
        }
    }
    args.push(rec.id.clone().into());
    Ok(args)
}

/// The process document as crun shall see it: whether there is a terminal is said by the request, not by the document.
fn exec_document(process: &ExecSpec) -> Result<Vec<u8>> {
    let invalid = |e: serde_json::Error| Error::invalid("the process of the exec is not a JSON object").with_source(e);
    let mut document: serde_json::Map<String, Value> = serde_json::from_slice(&process.json).map_err(invalid)?;
    document.insert("terminal".into(), process.terminal.into());
    serde_json::to_vec(&document).map_err(invalid)
}

/// The part of crun's status file that is read here.
#[derive(Debug, Deserialize, PartialEq, Eq)]
struct Status {
    pid: u32,
    /// Field 22 of /proc/<pid>/stat; 0 in versions that did not write it.
    #[serde(default, rename = "process-start-time")]
    start_ticks: u64,
    /// The folder that crun was started in, without symbolic links.
    #[serde(default)]
    bundle: PathBuf,
}

impl Status {
    /// Whether the container was made from another bundle, which still exists.
    fn is_of_another(&self, bundle: &Path) -> bool {
        let real = |path: &Path| fs::canonicalize(path).ok();
        self.bundle != bundle && self.bundle.is_absolute() && {
            let theirs = real(&self.bundle);
            theirs.is_some() && theirs != real(bundle)
        }
    }

    fn identity(&self) -> Option<Identity> {
        // 0 in the status of a container that was made and has no init yet.
        (self.pid > 1).then_some(Identity {
            pid: self.pid,
            start_ticks: self.start_ticks,
        })
    }
}

/// `None` when there is none, or none that can be understood.
fn read_status(dir: &Path) -> Option<Status> {
    let mut text = Vec::new();
    File::open(dir.join("status"))
        .ok()?
        .take(STATUS_MAX_BYTES)
        .read_to_end(&mut text)
        .ok()?;
    serde_json::from_slice(&text).ok()
}

/// Processes with an open file below `dir`: the halves of a crun that did not come to its end hold its fifo.
fn processes_that_hold(dir: &Path) -> Result<Vec<Identity>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context(|| "cannot read /proc")? {
        let Ok(entry) = entry else { continue };
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        // Before the look at its files, so that a later process of that number is not meant.
        let Ok(process) = identity(pid) else { continue };
        let Ok(fds) = fs::read_dir(entry.path().join("fd")) else {
            continue;
        };
        let holds = fds
            .flatten()
            .any(|fd| fs::read_link(fd.path()).is_ok_and(|target| target != dir && target.starts_with(dir)));
        if holds && pid != std::process::id() {
            found.push(process);
        }
    }
    Ok(found)
}

fn missing_program(error: Error, options: &Options) -> Error {
    if error.kind() != Kind::NotFound {
        return error;
    }
    Error::unavailable(format!(
        "the program {} was not found; install the package crun, or set crun_binary to where it is",
        options.crun_binary.display()
    ))
    .with_source(error)
}

/// The errors in a JSON log of crun, in order; the last names the outermost. Empty for anything else.
fn errors_of_log(log: &[u8]) -> Vec<String> {
    #[derive(Deserialize)]
    struct Line {
        msg: String,
        #[serde(default)]
        level: String,
    }
    String::from_utf8_lossy(log)
        .lines()
        .filter_map(|line| serde_json::from_str::<Line>(line).ok())
        .filter(|line| matches!(line.level.as_str(), "error" | ""))
        .map(|line| line.msg)
        .collect()
}

/// The one place that understands crun's words. `errors` as [`errors_of_log`] gives them; `status` is crun's exit status.
fn classify(id: &str, status: u32, errors: &[String]) -> Error {
    let message: String = errors.join("; ").chars().take(MESSAGE_MAX_CHARS).collect();
    let ended = match status {
        129.. if status <= 128 + 64 => format!("crun was killed by signal {}", status - 128),
        _ => format!("crun ended with status {status}"),
    };
    if message.is_empty() {
        return Error::unknown(format!("{ended} and gave no reason"));
    }
    // Arguments of the user are part of some texts, so those are matched from their beginning.
    let starts = |text: &str| errors.iter().any(|e| e.starts_with(text));
    let has = |text: &str| message.contains(text);
    if let Some(program) = errors.iter().find_map(|e| missing_executable(e)) {
        return Error::invalid(format!(
            "exec: {program:?}: executable file not found in $PATH: no such file or directory"
        ));
    }
    if starts("open executable: ")
        || starts("the path `") && (has("` is not a regular file") || has("` exists but it is not executable"))
    {
        return Error::invalid(format!("{message}: the program is not an executable file"));
    }
    if starts("cgroups in hybrid mode not supported") {
        return Error::unimplemented(format!(
            "{message}: crun needs cgroup v1 or v2 alone; boot with systemd.unified_cgroup_hierarchy=1, or unmount /sys/fs/cgroup/unified"
        ));
    }
    if starts("unknown version specified") {
        return Error::unimplemented(format!(
            "{message}: this crun is too old for the ociVersion in config.json; install a newer crun"
        ));
    }
    if starts("could not load `libcriu") {
        return Error::unimplemented(format!(
            "{message}: crun loads this library of CRIU for checkpoints; install libcriu2"
        ));
    }
    if starts("unknown command") {
        return Error::unimplemented(message);
    }
    if starts("error opening file `") && has("/status`: No such file or directory")
        || starts(&format!("container `{id}` does not exist"))
    {
        return Error::not_found(format!("container {id} does not exist: {message}"));
    }
    if starts(&format!("container `{id}` already exists")) {
        return Error::already_exists(message);
    }
    if starts("the container `")
        && (has("is not running") || has("is not in `created`") || message.ends_with("` is paused"))
        || starts(&format!("container `{id}` is not running"))
        || starts("setns(pid=") && has("No such process")
        || starts("cannot open `") && has("/exec.fifo`: No such file or directory")
    {
        return Error::precondition(message);
    }
    let kind = if has("No space left on device")
        || has("Cannot allocate memory")
        || has("Resource temporarily unavailable")
        || has("Too many open files")
    {
        Kind::ResourceExhausted
    } else if starts("error loading config.json")
        || starts("chdir `")
        || starts("chdir to `")
        || starts("invalid USERSPEC")
        || starts("cannot parse the data")
    {
        Kind::InvalidArgument
    } else if message.ends_with("Operation not permitted") {
        Kind::PermissionDenied
    } else {
        Kind::Unknown
    };
    Error::new(kind, message)
}

/// The program of "executable file `x` not found in $PATH: No such file or directory" (also without the words on PATH).
fn missing_executable(error: &str) -> Option<&str> {
    let rest = error.strip_prefix("executable file `")?;
    rest.rfind("` not found").map(|end| &rest[..end])
}

/// What `crun --version` tells, in the form of OCI features.md; `None` when it is not crun's.
fn features_of_version(text: &str) -> Option<Value> {
    let version = text.lines().next()?.strip_prefix("crun version ")?.trim();
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let built_with = |word: &str| text.split_ascii_whitespace().any(|w| w == word);
    Some(json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": field("spec:").unwrap_or("1.0.0"),
        "linux": {
            "apparmor": { "enabled": built_with("+APPARMOR") },
            "seccomp": { "enabled": built_with("+SECCOMP") },
            "selinux": { "enabled": built_with("+SELINUX") },
        },
        "annotations": {
            "run.oci.crun.version": version,
            "run.oci.crun.commit": field("commit:").unwrap_or(""),
            "run.oci.crun.checkpoint.enabled": built_with("+CRIU").to_string(),
        },
    }))
}

#[cfg(test)]
mod tests;
