//! A shim without containerd: its `start`, its Task service over ttrpc, and somebody who takes its events.

use std::{
    collections::BTreeMap,
    fs,
    io::Read,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, LazyLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use containerd_shim_protos::{
    api,
    protobuf::{Message, MessageField, well_known_types::any::Any},
    shim::oci,
    shim_async::{Client, create_events},
    ttrpc::{self, r#async::TtrpcContext},
};
use containerd_shim_protos::{
    events::task as events,
    shim::{event::Envelope, events::ForwardRequest},
};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::{
    image,
    leaks::{Baseline, LXC_PATH},
    patience::{patience, pause},
    universe,
};

/// Bound of one RPC and of every wait; the machine may be busy.
pub(crate) static BOUND: LazyLock<Duration> = LazyLock::new(|| patience(60));
/// Bound of a whole test.
pub(crate) static WHOLE: LazyLock<Duration> = LazyLock::new(|| patience(120));
/// The shim under test.
pub(crate) const SHIM: &str = env!("CARGO_BIN_EXE_containerd-shim-proxmox-lxcri-v1");
/// containerd's namespace of everything here.
pub(crate) const NAMESPACE: &str = "contract";

/// A failed RPC: what clients match on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refused {
    pub(crate) code: ttrpc::Code,
    pub(crate) text: String,
}

pub(crate) type Answer<T> = Result<T, Refused>;

/// Asserts that a call was refused with this code and a text that contains `text`.
#[track_caller]
pub(crate) fn refused<T: std::fmt::Debug>(answer: Answer<T>, code: ttrpc::Code, text: &str) {
    let refused = answer.expect_err("this must be refused");
    assert_eq!(refused.code, code, "{}", refused.text);
    assert!(
        refused.text.contains(text),
        "{:?} does not contain {text:?}",
        refused.text
    );
}

/// One event as tests compare it: "exit e1 137".
pub(crate) type Told = String;

/// Takes events as containerd does.
#[derive(Default)]
struct Inbox {
    told: watch::Sender<Vec<Told>>,
}

struct Events(Arc<Inbox>);

#[async_trait]
impl containerd_shim_protos::shim_async::Events for Events {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<api::Empty> {
        let envelope = request.envelope.clone().unwrap_or_default();
        let told = tell(&envelope);
        self.0.told.send_modify(|all| all.push(told));
        Ok(api::Empty::new())
    }
}

fn tell(envelope: &Envelope) -> Told {
    fn read<T: Message>(any: &Any) -> T {
        T::parse_from_bytes(&any.value).unwrap_or_else(|e| panic!("{} is not what it says: {e}", any.type_url))
    }
    assert_eq!(envelope.namespace, NAMESPACE);
    let any = &*envelope.event;
    let topic = envelope.topic.strip_prefix("/tasks/").unwrap_or(&envelope.topic);
    match topic {
        "create" => format!("create {}", read::<events::TaskCreate>(any).container_id),
        "start" => format!("start {}", read::<events::TaskStart>(any).container_id),
        "exec-added" => format!("exec-added {}", read::<events::TaskExecAdded>(any).exec_id),
        "exec-started" => format!("exec-started {}", read::<events::TaskExecStarted>(any).exec_id),
        "exit" => {
            let exit = read::<events::TaskExit>(any);
            assert!(exit.pid != 0 && exit.exited_at.is_some(), "{exit:?}");
            format!("exit {} {}", exit.id, exit.exit_status)
        }
        "delete" => {
            let delete = read::<events::TaskDelete>(any);
            format!("delete {} {}", delete.container_id, delete.exit_status)
        }
        "oom" => format!("oom {}", read::<events::TaskOOM>(any).container_id),
        "paused" => format!("paused {}", read::<events::TaskPaused>(any).container_id),
        "resumed" => format!("resumed {}", read::<events::TaskResumed>(any).container_id),
        "checkpointed" => format!("checkpointed {}", read::<events::TaskCheckpointed>(any).container_id),
        other => panic!("unknown topic {other}"),
    }
}

/// The daemon's side: a folder, an event service, and the baseline that must hold again at the end.
pub(crate) struct Daemon {
    pub(crate) folder: PathBuf,
    inbox: Arc<Inbox>,
    server: Option<ttrpc::asynchronous::Server>,
    baseline: Baseline,
    /// A configuration file for the shims that are started from here.
    pub(crate) config_file: PathBuf,
}

static NUMBER: AtomicUsize = AtomicUsize::new(0);

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.baseline.clear_away();
        }
    }
}

impl Daemon {
    /// An event service that listens in a folder of its own.
    pub(crate) async fn new() -> Self {
        fs::create_dir_all("/run/containerd/s").unwrap();
        // What runtimes share and never remove: crun's default folder (made by `crun --version`), and ours.
        fs::create_dir_all("/run/crun").unwrap();
        // LXC's folder of locks, too.
        fs::create_dir_all(format!("/run/lxc/lock{LXC_PATH}")).unwrap();
        fs::create_dir_all(format!("/run/proxmox-lxcri/crun/{NAMESPACE}")).unwrap();
        busybox();
        parent_cgroups();
        let baseline = Baseline::take(&[]);
        let folder = PathBuf::from(format!("/run/t{}", NUMBER.fetch_add(1, Ordering::Relaxed)));
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("config.toml"), "").unwrap();
        let mut daemon = Self {
            config_file: folder.join("config.toml"),
            folder,
            inbox: Arc::default(),
            server: None,
            baseline,
        };
        daemon.listen().await;
        daemon
    }

    /// Begins to take events (again).
    pub(crate) async fn listen(&mut self) {
        let socket = self.events_socket();
        let _ = fs::remove_file(&socket);
        let mut server = ttrpc::asynchronous::Server::new()
            .bind(&format!("unix://{}", socket.display()))
            .unwrap()
            .register_service(create_events(Arc::new(Events(self.inbox.clone()))));
        server.start().await.unwrap();
        self.server = Some(server);
    }

    /// Is gone, as a containerd that was stopped.
    pub(crate) async fn vanish(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.shutdown().await.unwrap();
        }
        let _ = fs::remove_file(self.events_socket());
    }

    /// Where the shims find the event service.
    pub(crate) fn events_socket(&self) -> PathBuf {
        self.folder.join("containerd.sock.ttrpc")
    }

    /// What was told so far.
    pub(crate) fn told(&self) -> Vec<Told> {
        self.inbox.told.borrow().clone()
    }

    /// Waits until `told` was told, and returns everything.
    pub(crate) async fn hears(&self, told: &str) -> Vec<Told> {
        self.hears_after(0, told).await
    }

    /// Waits until `told` was told after the first `known` events, and returns all that came after them.
    pub(crate) async fn hears_after(&self, known: usize, told: &str) -> Vec<Told> {
        let mut all = self.inbox.told.subscribe();
        let new = |all: &Vec<Told>| all[known..].iter().any(|one| one == told);
        match tokio::time::timeout(*BOUND, all.wait_for(new)).await {
            Ok(all) => all.unwrap()[known..].to_vec(),
            Err(_) => panic!("{told:?} was never told: {:?}", self.told()),
        }
    }

    /// Asserts that nothing is there, outside of the daemon's own folder, that was not there before.
    pub(crate) fn assert_nothing_left(&self) {
        let own = ["fifo", "file", "folder", "socket"].map(|kind| format!("{kind} {}", self.folder.display()));
        self.baseline.assert_nothing_left(&own);
    }

    /// Stops and asserts that nothing is there that was not there before.
    pub(crate) async fn ends(mut self) {
        self.vanish().await;
        fs::remove_dir_all(&self.folder).unwrap();
        // What the shims of this process share: empty folders, made once.
        self.baseline.assert_nothing_left(&[]);
    }

    /// A bundle with a busybox rootfs, and a spec that the test may change.
    pub(crate) fn bundle(&self, id: &str, args: &[&str]) -> Bundle {
        let path = self.folder.join(id);
        fs::create_dir(&path).unwrap();
        fs::create_dir(path.join("rootfs")).unwrap();
        nix::unistd::mkfifo(&path.join("log"), nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        Bundle {
            id: id.into(),
            spec: spec(id, args),
            rootfs: overlay(&path),
            path,
        }
    }
}

/// The folders above the containers' cgroups: a runtime makes them, and they are nobody's to remove.
fn parent_cgroups() {
    if universe::by_systemd() {
        let slice = format!("{}.slice", universe::token());
        let started = Command::new("systemctl").args(["start", &slice]).status();
        assert!(started.unwrap().success(), "systemctl start {slice}");
        return;
    }
    let folders: Vec<PathBuf> = match cgroup_v2() {
        true => vec!["/sys/fs/cgroup".into()],
        false => fs::read_dir("/sys/fs/cgroup")
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect(),
    };
    for folder in folders.iter().filter(|folder| folder.join("cgroup.procs").exists()) {
        fs::create_dir_all(folder.join(universe::token())).unwrap();
    }
}

/// The read-only layer that every container here stands on; made once per process.
pub(crate) fn busybox() -> &'static Path {
    let root = Path::new("/run/busybox");
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        // Where the machine is the universe, another program may have made it before.
        let _ = fs::remove_dir_all(root);
        fs::create_dir_all(root).unwrap();
        image::busybox_root(root).unwrap();
    });
    root
}

fn overlay(bundle: &Path) -> Vec<api::Mount> {
    for folder in ["upper", "work"] {
        fs::create_dir(bundle.join(folder)).unwrap();
    }
    vec![mount(
        "overlay",
        "overlay",
        &[
            &format!("lowerdir={}", busybox().display()),
            &format!("upperdir={}", bundle.join("upper").display()),
            &format!("workdir={}", bundle.join("work").display()),
        ],
    )]
}

/// A mount as a snapshotter hands it out.
pub(crate) fn mount(kind: &str, source: &str, options: &[&str]) -> api::Mount {
    api::Mount {
        type_: kind.into(),
        source: source.into(),
        options: options.iter().map(|option| (*option).into()).collect(),
        ..api::Mount::default()
    }
}

fn spec(id: &str, args: &[&str]) -> Value {
    let capabilities = json!([
        "CAP_CHOWN",
        "CAP_KILL",
        "CAP_SETUID",
        "CAP_SETGID",
        "CAP_NET_BIND_SERVICE"
    ]);
    json!({
        "ociVersion": "1.0.2",
        "process": process(args),
        "root": {"path": "rootfs"},
        "hostname": "box",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev"]},
        ],
        "linux": {
            "cgroupsPath": match universe::by_systemd() {
                true => format!("{}.slice:lxcri:{id}", universe::token()),
                false => format!("/{}/{id}", universe::token()),
            },
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}],
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
        },
        "annotations": {"test.capabilities": capabilities.to_string()},
    })
}

/// An OCI process that runs `args` as root.
pub(crate) fn process(args: &[&str]) -> Value {
    let capabilities = json!([
        "CAP_CHOWN",
        "CAP_KILL",
        "CAP_SETUID",
        "CAP_SETGID",
        "CAP_NET_BIND_SERVICE"
    ]);
    json!({
        "terminal": false,
        "user": {"uid": 0, "gid": 0},
        "args": args,
        "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
        "cwd": "/",
        "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
        "noNewPrivileges": true,
    })
}

/// What a container is made of; change it before Create.
#[derive(Debug, Clone)]
pub(crate) struct Bundle {
    pub(crate) id: String,
    pub(crate) path: PathBuf,
    pub(crate) spec: Value,
    pub(crate) rootfs: Vec<api::Mount>,
}

impl Bundle {
    pub(crate) fn write(&self) {
        fs::write(self.path.join("config.json"), self.spec.to_string()).unwrap();
    }

    /// Shares the namespaces of a process: those that the bundle asks for, of these types of OCI.
    pub(crate) fn joins(&mut self, pid: u32, types: &[&str]) {
        for namespace in self.spec["linux"]["namespaces"].as_array_mut().unwrap() {
            let kind = namespace["type"].as_str().unwrap();
            if types.contains(&kind) {
                let file = if kind == "network" { "net" } else { kind };
                namespace["path"] = format!("/proc/{pid}/ns/{file}").into();
            }
        }
    }

    /// Adds an annotation.
    pub(crate) fn annotate(mut self, key: &str, value: &str) -> Self {
        self.spec["annotations"][key] = value.into();
        self
    }
}

/// The stdio of one process: fifos, and what came out of them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Io {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
}

impl Io {
    /// No stdio at all.
    pub(crate) fn none() -> Self {
        Self::default()
    }

    /// Three fifos named after `name` in the bundle; nobody reads them yet.
    pub(crate) fn fifos(bundle: &Path, name: &str) -> Self {
        let make = |stream: &str| {
            let path = bundle.join(format!("{name}.{stream}"));
            nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o700)).unwrap();
            path.display().to_string()
        };
        Self {
            stdin: make("in"),
            stdout: make("out"),
            stderr: make("err"),
            terminal: false,
        }
    }

    /// A terminal: stdin and stdout by fifo, no stderr.
    pub(crate) fn terminal(bundle: &Path, name: &str) -> Self {
        let mut io = Self::fifos(bundle, name);
        io.stderr.clear();
        io.terminal = true;
        io
    }

    /// Reads stdout to its end, in a thread, as `ctr` does: it begins before the container exists.
    pub(crate) fn read_stdout(&self) -> Reading {
        Reading::of(&self.stdout)
    }

    /// As [`Io::read_stdout`].
    pub(crate) fn read_stderr(&self) -> Reading {
        Reading::of(&self.stderr)
    }

    /// The writing end of stdin; does not wait for the shim.
    pub(crate) fn open_stdin(&self) -> fs::File {
        let file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&self.stdin)
            .unwrap();
        let flags = nix::fcntl::OFlag::empty();
        nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_SETFL(flags)).unwrap();
        // Held open for writing only: a second open, now that it cannot block.
        let writer = fs::OpenOptions::new().write(true).open(&self.stdin).unwrap();
        drop(file);
        writer
    }
}

/// What a reader in a thread of its own has seen, once the writer is done.
pub(crate) struct Reading(std::thread::JoinHandle<Vec<u8>>);

impl Reading {
    pub(crate) fn of(path: &str) -> Self {
        let path = path.to_owned();
        Self(std::thread::spawn(move || {
            let mut all = Vec::new();
            fs::File::open(path).unwrap().read_to_end(&mut all).unwrap();
            all
        }))
    }

    /// Everything, once the other side has closed.
    pub(crate) async fn bytes(self) -> Vec<u8> {
        let joined = tokio::task::spawn_blocking(move || self.0.join().unwrap());
        tokio::time::timeout(*BOUND, joined)
            .await
            .expect("stdout never ends")
            .unwrap()
    }

    /// The same, as text.
    pub(crate) async fn text(self) -> String {
        String::from_utf8(self.bytes().await).unwrap()
    }
}

/// How a shim is started; the defaults are what containerd 1.6 does.
#[derive(Debug, Clone)]
pub(crate) struct Start {
    /// containerd's namespace.
    pub(crate) namespace: &'static str,
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) stdin: Vec<u8>,
    pub(crate) service: &'static str,
    /// Another one than [`SHIM`].
    pub(crate) program: Option<PathBuf>,
    pub(crate) path: Option<String>,
    /// Whether somebody reads the log fifo.
    pub(crate) reads_log: bool,
}

impl Default for Start {
    fn default() -> Self {
        Self {
            namespace: NAMESPACE,
            env: BTreeMap::new(),
            stdin: Vec::new(),
            service: "containerd.task.v2.Task",
            path: None,
            program: None,
            reads_log: true,
        }
    }
}

/// A running shim.
pub(crate) struct Pod {
    client: Client,
    service: String,
    pub(crate) address: String,
    pub(crate) pid: u32,
    pub(crate) options: Option<Any>,
    log: std::thread::JoinHandle<Vec<u8>>,
}

/// Runs a subcommand of the shim binary as containerd does.
pub(crate) fn run_shim(daemon: &Daemon, bundle: &Bundle, start: &Start, subcommand: &str) -> std::process::Output {
    let child = begin_shim(daemon, bundle, start, subcommand);
    child.wait_with_output().unwrap()
}

/// As [`run_shim`], without the wait for its end.
pub(crate) fn begin_shim(daemon: &Daemon, bundle: &Bundle, start: &Start, subcommand: &str) -> std::process::Child {
    use std::io::Write as _;
    let mut command = Command::new(start.program.as_deref().unwrap_or(Path::new(SHIM)));
    command
        .args(["-namespace", start.namespace, "-id", &bundle.id, "-address"])
        .arg(daemon.folder.join("containerd.sock"))
        .args(["-publish-binary", "/bin/true"])
        .current_dir(&bundle.path)
        .env("TTRPC_ADDRESS", daemon.events_socket())
        .env("PROXMOX_LXCRI_CONFIG", &daemon.config_file)
        .env("NAMESPACE", start.namespace)
        .envs(&start.env)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    if let Some(path) = &start.path {
        command.env("PATH", path);
    }
    if subcommand == "delete" {
        command.arg("-bundle").arg(&bundle.path);
    }
    let mut child = command.arg("-debug").arg(subcommand).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&start.stdin).unwrap();
    child
}

/// Runs `delete` of a dead shim as containerd does, within its bound. The error is what it wrote to stderr.
pub(crate) fn delete_dead(daemon: &Daemon, bundle: &Bundle) -> Result<api::DeleteResponse, String> {
    let begin = std::time::Instant::now();
    let output = run_shim(daemon, bundle, &Start::default(), "delete");
    // containerd kills it then, and a killed one could not finish.
    assert!(begin.elapsed() < patience(5), "delete took {:?}", begin.elapsed());
    deleted(&output)
}

/// What `delete` answered.
pub(crate) fn deleted(output: &std::process::Output) -> Result<api::DeleteResponse, String> {
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    match output.status.success() {
        true => Ok(api::DeleteResponse::parse_from_bytes(&output.stdout).unwrap()),
        false => Err(errors),
    }
}

impl Pod {
    /// Starts the shim of `bundle`'s pod, or finds it.
    pub(crate) async fn start(daemon: &Daemon, bundle: &Bundle) -> Self {
        Self::start_with(daemon, bundle, &Start::default()).await
    }

    pub(crate) async fn start_with(daemon: &Daemon, bundle: &Bundle, start: &Start) -> Self {
        bundle.write();
        let log = start.reads_log.then(|| bundle.path.join("log"));
        let log = std::thread::spawn(move || {
            let mut all = Vec::new();
            if let Some(log) = log {
                let _ = fs::File::open(log).unwrap().read_to_end(&mut all);
            }
            all
        });
        let output = run_shim(daemon, bundle, start, "start");
        let answer = String::from_utf8(output.stdout).unwrap();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() && errors.is_empty(), "start: {answer} {errors}");
        let address = match serde_json::from_str::<Value>(&answer) {
            Ok(json) => json["address"].as_str().unwrap().to_owned(),
            Err(_) => answer.trim().to_owned(),
        };
        let client = Client::connect(&address).await.unwrap();
        let mut pod = Self {
            client,
            service: start.service.into(),
            address,
            pid: 0,
            options: None,
            log,
        };
        let connected: api::ConnectResponse = pod
            .call("Connect", &with_id::<api::ConnectRequest>(&bundle.id))
            .await
            .unwrap();
        pod.pid = connected.shim_pid;
        pod
    }

    /// Cuts the connection and makes a new one, as a containerd that was started again.
    pub(crate) async fn reconnect(&mut self) {
        self.client = Client::connect(&self.address).await.unwrap();
    }

    /// What Connect answers: the pid of the task's init.
    pub(crate) async fn connect(&self, id: &str) -> Answer<u32> {
        let response: api::ConnectResponse = self.call("Connect", &with_id::<api::ConnectRequest>(id)).await?;
        assert_eq!(response.shim_pid, self.pid);
        Ok(response.task_pid)
    }

    /// The same shim under the other version of the service.
    pub(crate) fn speak(&mut self, service: &str) {
        self.service = service.into();
    }

    /// One RPC with containerd's metadata.
    pub(crate) async fn call<Q: Message, R: Message>(&self, method: &str, request: &Q) -> Answer<R> {
        self.call_bounded(method, request, *BOUND).await
    }

    /// One RPC with the client's deadline.
    pub(crate) async fn call_bounded<Q: Message, R: Message>(
        &self,
        method: &str,
        request: &Q,
        bound: Duration,
    ) -> Answer<R> {
        let request = ttrpc::proto::Request {
            service: self.service.clone(),
            method: method.into(),
            payload: request.write_to_bytes().unwrap(),
            timeout_nano: i64::try_from(bound.as_nanos()).unwrap(),
            ..Default::default()
        };
        match self.client.request(request).await {
            Ok(response) => Ok(R::parse_from_bytes(&response.payload).unwrap()),
            Err(ttrpc::Error::RpcStatus(status)) => Err(Refused {
                code: status.code(),
                text: status.message,
            }),
            Err(e) => Err(Refused {
                code: ttrpc::Code::UNAVAILABLE,
                text: e.to_string(),
            }),
        }
    }

    pub(crate) fn create_request(&self, bundle: &Bundle, io: &Io) -> api::CreateTaskRequest {
        bundle.write();
        api::CreateTaskRequest {
            id: bundle.id.clone(),
            bundle: bundle.path.display().to_string(),
            rootfs: bundle.rootfs.clone(),
            stdin: io.stdin.clone(),
            stdout: io.stdout.clone(),
            stderr: io.stderr.clone(),
            terminal: io.terminal,
            options: MessageField::from_option(self.options.clone()),
            ..Default::default()
        }
    }

    pub(crate) async fn create(&self, bundle: &Bundle, io: &Io) -> Answer<u32> {
        let request = self.create_request(bundle, io);
        let response: api::CreateTaskResponse = self.call("Create", &request).await?;
        Ok(response.pid)
    }

    pub(crate) async fn start_process(&self, id: &str, exec_id: &str) -> Answer<u32> {
        let request = api::StartRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        let response: api::StartResponse = self.call("Start", &request).await?;
        Ok(response.pid)
    }

    /// Create and Start.
    pub(crate) async fn run(&self, bundle: &Bundle, io: &Io) -> u32 {
        let pid = self.create(bundle, io).await.unwrap();
        assert_eq!(self.start_process(&bundle.id, "").await.unwrap(), pid);
        pid
    }

    pub(crate) async fn exec(&self, id: &str, exec_id: &str, process: &Value, io: &Io) -> Answer<()> {
        let mut process = process.clone();
        process["terminal"] = io.terminal.into();
        let request = api::ExecProcessRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            terminal: io.terminal,
            stdin: io.stdin.clone(),
            stdout: io.stdout.clone(),
            stderr: io.stderr.clone(),
            spec: MessageField::some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
                value: process.to_string().into_bytes(),
                ..Default::default()
            }),
            ..Default::default()
        };
        self.call::<_, api::Empty>("Exec", &request).await.map(drop)
    }

    /// What an exec in the container of `bundle` prints, run to its end, and how it ends.
    pub(crate) async fn exec_says(&self, bundle: &Bundle, exec: &str, process: &Value) -> (u32, String) {
        let io = Io::fifos(&bundle.path, exec);
        let stdout = io.read_stdout();
        self.exec(&bundle.id, exec, process, &io).await.unwrap();
        self.start_process(&bundle.id, exec).await.unwrap();
        let status = self.wait(&bundle.id, exec).await.unwrap();
        let text = stdout.text().await;
        self.delete(&bundle.id, exec).await.unwrap();
        (status, text)
    }

    pub(crate) async fn kill(&self, id: &str, exec_id: &str, signal: i32, all: bool) -> Answer<()> {
        let request = api::KillRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            signal: signal.cast_unsigned(),
            all,
            ..Default::default()
        };
        self.call::<_, api::Empty>("Kill", &request).await.map(drop)
    }

    pub(crate) async fn wait(&self, id: &str, exec_id: &str) -> Answer<u32> {
        let request = api::WaitRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        let response: api::WaitResponse = self.call("Wait", &request).await?;
        assert!(response.exited_at.is_some());
        Ok(response.exit_status)
    }

    pub(crate) async fn delete(&self, id: &str, exec_id: &str) -> Answer<api::DeleteResponse> {
        let request = api::DeleteRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.call("Delete", &request).await
    }

    /// Kill with SIGKILL, Wait, Delete.
    pub(crate) async fn end(&self, id: &str) {
        self.kill(id, "", libc::SIGKILL, false).await.unwrap();
        self.wait(id, "").await.unwrap();
        self.delete(id, "").await.unwrap();
    }

    pub(crate) async fn state(&self, id: &str, exec_id: &str) -> Answer<api::StateResponse> {
        let request = api::StateRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.call("State", &request).await
    }

    pub(crate) async fn status(&self, id: &str) -> api::Status {
        self.state(id, "").await.unwrap().status.enum_value().unwrap()
    }

    pub(crate) async fn pids(&self, id: &str) -> Answer<BTreeMap<u32, String>> {
        let response: api::PidsResponse = self.call("Pids", &with_id::<api::PidsRequest>(id)).await?;
        let details = |info: &Any| {
            assert!(
                info.type_url.ends_with("containerd.runc.v1.ProcessDetails"),
                "{}",
                info.type_url
            );
            oci::ProcessDetails::parse_from_bytes(&info.value).unwrap().exec_id
        };
        let one = |process: api::ProcessInfo| (process.pid, process.info.as_ref().map(details).unwrap_or_default());
        Ok(response.processes.into_iter().map(one).collect())
    }

    pub(crate) async fn pause(&self, id: &str) -> Answer<()> {
        self.call::<_, api::Empty>("Pause", &with_id::<api::PauseRequest>(id))
            .await
            .map(drop)
    }

    pub(crate) async fn resume(&self, id: &str) -> Answer<()> {
        self.call::<_, api::Empty>("Resume", &with_id::<api::ResumeRequest>(id))
            .await
            .map(drop)
    }

    pub(crate) async fn update(&self, id: &str, resources: &Value) -> Answer<()> {
        let request = api::UpdateTaskRequest {
            id: id.into(),
            resources: MessageField::some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
                value: resources.to_string().into_bytes(),
                ..Default::default()
            }),
            ..Default::default()
        };
        self.call::<_, api::Empty>("Update", &request).await.map(drop)
    }

    pub(crate) async fn stats(&self, id: &str) -> Answer<Any> {
        let response: api::StatsResponse = self.call("Stats", &with_id::<api::StatsRequest>(id)).await?;
        Ok(response.stats.unwrap_or_default())
    }

    pub(crate) async fn resize(&self, id: &str, exec_id: &str, width: u32, height: u32) -> Answer<()> {
        let request = api::ResizePtyRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            width,
            height,
            ..Default::default()
        };
        self.call::<_, api::Empty>("ResizePty", &request).await.map(drop)
    }

    pub(crate) async fn close_stdin(&self, id: &str, exec_id: &str) -> Answer<()> {
        let request = api::CloseIORequest {
            id: id.into(),
            exec_id: exec_id.into(),
            stdin: true,
            ..Default::default()
        };
        self.call::<_, api::Empty>("CloseIO", &request).await.map(drop)
    }

    /// Shutdown; the shim must be gone afterwards. Returns its log.
    pub(crate) async fn shutdown(self) -> String {
        let pidfd = self.pidfd();
        self.shutdown_of(pidfd).await
    }

    /// The shim, which has to live.
    pub(crate) fn pidfd(&self) -> std::os::fd::OwnedFd {
        pidfd(self.pid)
    }

    /// As [`Pod::shutdown`], of a shim that may have ended already; `pidfd` was taken when it lived.
    pub(crate) async fn shutdown_of(self, pidfd: std::os::fd::OwnedFd) -> String {
        // It may be gone before its answer is written.
        let _ = self
            .call::<_, api::Empty>("Shutdown", &api::ShutdownRequest::default())
            .await;
        gone(pidfd).await;
        self.log()
    }

    /// Kills the shim as nobody expects it, and waits until it is gone.
    pub(crate) async fn dies(self) -> String {
        let pidfd = self.pidfd();
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(self.pid.cast_signed()),
            nix::sys::signal::SIGKILL,
        )
        .unwrap();
        gone(pidfd).await;
        self.log()
    }

    fn log(self) -> String {
        String::from_utf8_lossy(&self.log.join().unwrap()).into_owned()
    }
}

fn pidfd(pid: u32) -> std::os::fd::OwnedFd {
    use std::os::fd::FromRawFd as _;
    // SAFETY: a plain system call; its result is checked and owned by nobody else.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, pid.cast_signed(), 0);
        assert!(fd >= 0, "no process {pid}");
        std::os::fd::OwnedFd::from_raw_fd(i32::try_from(fd).unwrap())
    }
}

async fn gone(pidfd: std::os::fd::OwnedFd) {
    // SAFETY: an `OwnedFd` keeps its descriptor open, and the same one, for as long as it lives.
    let pidfd = unsafe { tokio::io::unix::AsyncFd::register(pidfd) }.unwrap();
    let _ = tokio::time::timeout(*BOUND, pidfd.readable())
        .await
        .expect("it must end")
        .unwrap();
}

trait WithId: Message {
    fn set_id(&mut self, id: &str);
}

macro_rules! with_id_field {
    ($($message:ty),*) => {$(
        impl WithId for $message {
            fn set_id(&mut self, id: &str) {
                self.id = id.into();
            }
        }
    )*};
}

with_id_field!(
    api::ConnectRequest,
    api::PidsRequest,
    api::PauseRequest,
    api::ResumeRequest,
    api::StatsRequest
);

fn with_id<T: WithId>(id: &str) -> T {
    let mut message = T::new();
    message.set_id(id);
    message
}

/// Runtime options as CRI sends them for a runtime type that it does not know.
pub(crate) fn options(toml: &str) -> Any {
    #[derive(Clone, PartialEq, prost::Message)]
    struct Options {
        #[prost(string, tag = "1")]
        type_url: String,
        #[prost(string, tag = "2")]
        config_path: String,
        #[prost(bytes = "vec", tag = "3")]
        config_body: Vec<u8>,
    }
    let message = Options {
        config_body: toml.into(),
        ..Options::default()
    };
    Any {
        type_url: "runtimeoptions.v1.Options".into(),
        value: prost::Message::encode_to_vec(&message),
        ..Any::default()
    }
}

/// A program that does not end by itself.
pub(crate) const FOREVER: [&str; 2] = ["sleep", "100000"];

/// A shell with a script.
pub(crate) fn shell(script: &str) -> [&str; 3] {
    ["sh", "-c", script]
}

/// Looks until there is something to see.
pub(crate) async fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = tokio::time::Instant::now() + *BOUND;
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(tokio::time::Instant::now() < end, "never happened: {what}");
        tokio::time::sleep(pause()).await;
    }
}

/// As [`until`], for what only an RPC tells.
pub(crate) async fn until_told<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let asked = async {
        loop {
            if let Some(told) = ask().await {
                return told;
            }
            tokio::time::sleep(pause()).await;
        }
    };
    match tokio::time::timeout(*BOUND, asked).await {
        Ok(told) => told,
        Err(_) => panic!("never happened: {what}"),
    }
}

/// Waits until a file is there.
pub(crate) async fn appears(path: &Path) {
    until(&path.display().to_string(), || path.exists().then_some(())).await;
}

/// Whether the machine's cgroups, as the tests see them, are v2.
pub(crate) fn cgroup_v2() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

/// Whether something is mounted at `path`.
pub(crate) fn is_mounted(path: &Path) -> bool {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    text.lines().any(|line| line.split(' ').nth(4) == path.to_str())
}

/// Whether crun was built with CRIU.
pub(crate) fn crun_has_criu() -> bool {
    let output = Command::new("crun").arg("--version").output().unwrap();
    String::from_utf8_lossy(&output.stdout).contains("+CRIU")
}

/// Runs all of them at once, on this thread.
pub(crate) async fn together<F: Future<Output = ()>>(all: impl IntoIterator<Item = F>) {
    let mut all: Vec<_> = all.into_iter().map(Box::pin).collect();
    std::future::poll_fn(|context| {
        all.retain_mut(|one| one.as_mut().poll(context).is_pending());
        match all.is_empty() {
            true => std::task::Poll::Ready(()),
            false => std::task::Poll::Pending,
        }
    })
    .await;
}
