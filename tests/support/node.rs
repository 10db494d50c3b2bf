//! A private containerd, and what a test asks of it.

use std::{
    fs,
    io::Write,
    os::unix::{fs::PermissionsExt, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{LazyLock, Mutex},
    time::{Duration, Instant},
};

use containerd_client::{
    Client,
    services::v1::{
        containers_client::ContainersClient, events_client::EventsClient, snapshots::snapshots_client::SnapshotsClient,
        tasks_client::TasksClient,
    },
    tonic::{Code, Request, Status, metadata::MetadataValue, transport::Channel},
};
use prost_types::Any;

use super::{
    backend,
    daemon::{Containerd, stop_unit},
    image::{self, Image},
    leaks::{self, Baseline},
    patience::{patience, pause},
    universe,
};

/// Bound of one RPC; the machine may be busy.
pub(crate) static RPC: LazyLock<Duration> = LazyLock::new(|| patience(60));
/// Bound of a wait for something that must happen.
pub(crate) static SOON: LazyLock<Duration> = LazyLock::new(|| patience(30));
/// Everything of the node lives here: short, because a unix socket's path has at most 108 bytes.
pub(crate) const FOLDER: &str = "/run/node";

/// The runtime under test: ours, or another one that validates the suite.
///
/// `LXCRI_TEST_RUNTIME=io.containerd.runc.v2` runs the suite on containerd's own shim, with the OCI runtime that `LXCRI_TEST_OCI`
/// names (runc when unset).
#[derive(Debug, Clone)]
pub(crate) struct Runtime {
    /// Such as `io.containerd.proxmox-lxcri.v1`.
    pub(crate) name: String,
    /// `BinaryName` for a runtime that is not ours.
    pub(crate) oci: Option<String>,
}

pub(crate) use super::leaks::OURS;

impl Runtime {
    fn from_environment() -> Self {
        let set = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        Self {
            name: set("LXCRI_TEST_RUNTIME").unwrap_or_else(|| OURS.into()),
            oci: set("LXCRI_TEST_OCI"),
        }
    }

    /// Whether it is ours.
    pub(crate) fn is_ours(&self) -> bool {
        self.name == OURS
    }

    /// The options that every container is created with: none for ours.
    pub(crate) fn options(&self) -> Option<Any> {
        let oci = self.oci.as_ref().filter(|_| !self.is_ours())?;
        let options = RuncOptions {
            binary_name: oci.clone(),
            ..RuncOptions::default()
        };
        Some(Any {
            type_url: "containerd.runc.v1.Options".into(),
            value: prost::Message::encode_to_vec(&options),
        })
    }

    /// What holds the containers behind it: the OCI runtime of another shim, or the backend of ours.
    pub(crate) fn program(&self) -> &str {
        match &self.oci {
            Some(oci) => oci,
            None if self.is_ours() => backend(),
            None => "runc",
        }
    }
}

/// The backend that holds every container of the node, where a container's own options do not name another one.
fn backend() -> &'static str {
    backend::chosen().unwrap_or("crun")
}

/// The file of our shim's options on this node: none, as on most machines, while the default backend is meant.
pub(crate) fn lxcri_config() -> Option<PathBuf> {
    (backend() != "crun").then(|| Path::new(FOLDER).join("lxcri.toml"))
}

/// The fields of `containerd.runc.v1.Options` that are set here.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct RuncOptions {
    /// The OCI runtime's program.
    #[prost(string, tag = "6")]
    pub(crate) binary_name: String,
    /// The folder of its state.
    #[prost(string, tag = "7")]
    pub(crate) root: String,
}

/// The daemon and its files. They live as long as the test process, or until a test fails.
#[derive(Debug)]
struct Daemon {
    process: Containerd,
    images: Images,
}

/// The images that the node knows.
#[derive(Debug, Clone)]
pub(crate) struct Images {
    /// [`image::BUSYBOX`].
    pub(crate) busybox: Image,
    /// [`image::PAUSE`].
    pub(crate) pause: Image,
}

/// A containerd of the test's own, with the means to ask it and to notice what it leaves behind.
pub(crate) struct Node {
    /// The test's name, `file::test`.
    pub(crate) test: String,
    /// The runtime under test.
    pub(crate) runtime: Runtime,
    /// containerd's namespace for this process's containers; part of every cgroup path.
    pub(crate) namespace: String,
    /// What was imported.
    pub(crate) images: Images,
    /// The snapshotter that root file systems come from.
    pub(crate) snapshotter: String,
    channel: Channel,
    tolerated: Mutex<Vec<String>>,
}

/// One test at a time: what a test leaves behind is then its own.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
static DAEMON: Mutex<Option<Daemon>> = Mutex::new(None);

/// Runs `test` on a node, on a tokio runtime of its own, for at most three minutes; then asserts that nothing was left behind.
///
/// The daemon is shared by the tests of a process. After a failure its log is kept (the path and the log's end are printed), and
/// everything that runs in the universe is killed, so that the next test begins on a fresh node.
///
/// # Panics
/// When the test does, or leaves something behind.
pub(crate) fn run(name: &str, cri: bool, test: impl AsyncFnOnce(&Node)) {
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a tokio runtime");
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let (baseline, tolerated) = runtime.block_on(async {
            let node = Node::open(name, cri).await;
            let baseline = Baseline::take(&not_ours());
            tokio::time::timeout(patience(180), test(&node))
                .await
                .unwrap_or_else(|_| panic!("{name} took more than {:?}", patience(180)));
            (baseline, node.tolerated.into_inner().unwrap())
        });
        baseline.assert_nothing_left(&tolerated);
    }));
    runtime.shutdown_background();
    if let Err(panic) = result {
        keep_log(name);
        tear_down();
        std::panic::resume_unwind(panic);
    }
}

impl Node {
    /// Starts the daemon if it does not run, and connects to it.
    async fn open(test: &str, cri: bool) -> Self {
        let known = daemon().as_ref().map(|daemon| daemon.images.clone());
        let is_new = known.is_none();
        let images = match known {
            Some(images) => images,
            None => {
                let images = prepare(cri).unwrap_or_else(|e| panic!("cannot prepare {FOLDER}: {e}"));
                *daemon() = Some(Daemon {
                    process: Containerd::start(),
                    images: images.clone(),
                });
                images
            }
        };
        let node = Self {
            test: test.into(),
            runtime: Runtime::from_environment(),
            namespace: universe::token(),
            images,
            snapshotter: snapshotter(),
            channel: connect().await,
            tolerated: Mutex::default(),
        };
        if is_new {
            node.import(&node.images.busybox).await;
            // The first container of a namespace makes folders and cgroups that stay for the next one. Whether it runs is not the
            // question here; a test will ask it.
            node.ctr_run(&["--rm"], "first", &["true"]).await;
        }
        if is_new && cri {
            for image in [&node.images.busybox, &node.images.pause] {
                finish(ctr("k8s.io", &["images", "import", &image.path()]), b"")
                    .await
                    .assert_ok();
            }
            super::cri::warm_up(&node).await;
        }
        node
    }

    /// A folder of the test's own on the node's file system; the caller removes it.
    pub(crate) fn folder(&self, name: &str) -> PathBuf {
        let folder = Path::new(FOLDER).join("work").join(name);
        fs::create_dir_all(&folder).expect("a folder on the node's tmpfs");
        folder
    }

    /// Path of containerd's gRPC socket.
    pub(crate) fn socket(&self) -> PathBuf {
        socket()
    }

    /// A container's bundle.
    pub(crate) fn bundle(&self, id: &str) -> PathBuf {
        let tasks = Path::new(FOLDER).join("state/io.containerd.runtime.v2.task");
        tasks.join(&self.namespace).join(id)
    }

    /// The daemon's release: major and minor number.
    pub(crate) async fn release(&self) -> (u32, u32) {
        let said = Client::from(self.channel.clone()).version().version(()).await;
        let version = said.expect("containerd's version").into_inner().version;
        let mut numbers = version
            .trim_start_matches('v')
            .split('.')
            .map(|number| number.parse().ok());
        match (numbers.next().flatten(), numbers.next().flatten()) {
            (Some(major), Some(minor)) => (major, minor),
            _ => panic!("containerd's version is {version:?}"),
        }
    }

    /// `message` as a request in the test's namespace, with a deadline.
    pub(crate) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let namespace = MetadataValue::try_from(&self.namespace).expect("an ASCII namespace");
        request.metadata_mut().insert("containerd-namespace", namespace);
        request.set_timeout(*RPC);
        request
    }

    /// The connection to containerd; it reconnects by itself.
    pub(crate) fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// containerd's task service.
    pub(crate) fn tasks(&self) -> TasksClient<Channel> {
        Client::from(self.channel()).tasks()
    }

    /// containerd's container store.
    pub(crate) fn containers(&self) -> ContainersClient<Channel> {
        Client::from(self.channel()).containers()
    }

    /// containerd's events.
    pub(crate) fn events(&self) -> EventsClient<Channel> {
        Client::from(self.channel()).events()
    }

    /// The snapshots.
    pub(crate) fn snapshots(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.channel())
    }

    /// Kills containerd with SIGKILL, as a crash or an upgrade would, and waits for its end.
    pub(crate) fn kill_containerd(&self) {
        if let Some(daemon) = daemon().as_mut() {
            daemon.process.kill();
        }
    }

    /// Starts containerd again, on the same state, and waits until it answers.
    pub(crate) async fn start_containerd(&self) {
        if let Some(daemon) = daemon().as_mut() {
            daemon.process = Containerd::start();
        }
        self.reconnect().await;
    }

    /// Restarts containerd as an upgrade does (`systemctl restart`, where it is a unit), and waits until it answers.
    pub(crate) async fn restart_containerd(&self) {
        if let Some(daemon) = daemon().as_mut() {
            daemon.process.restart();
        }
        self.reconnect().await;
    }

    async fn reconnect(&self) {
        drop(connect().await);
        // The test's own channel notices the loss with its next request, which may fail for that reason.
        until("the channel works again", async || {
            let version = Client::from(self.channel()).version().version(()).await;
            version.is_ok().then_some(())
        })
        .await;
    }

    /// The daemon's log so far.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(log()).unwrap_or_default()
    }

    /// Runs `ctr` in the test's namespace.
    pub(crate) async fn ctr(&self, arguments: &[&str]) -> Finished {
        self.ctr_fed(arguments, b"").await
    }

    /// Runs `ctr` with `stdin`.
    pub(crate) async fn ctr_fed(&self, arguments: &[&str], stdin: &[u8]) -> Finished {
        finish(self.ctr_command(arguments), stdin).await
    }

    /// The command line of `ctr` in the test's namespace.
    pub(crate) fn ctr_command(&self, arguments: &[&str]) -> Command {
        ctr(&self.namespace, arguments)
    }

    /// The arguments of `ctr run` that choose the runtime under test.
    pub(crate) fn ctr_runtime(&self) -> Vec<&str> {
        let mut arguments = vec!["--runtime", &self.runtime.name];
        if let Some(oci) = &self.runtime.oci {
            arguments.extend(["--runc-binary", oci]);
        }
        arguments
    }

    /// `ctr run <flags> <the tests' image> <id> <command>` with the runtime under test.
    pub(crate) async fn ctr_run(&self, flags: &[&str], id: &str, command: &[&str]) -> Finished {
        let mut arguments = vec!["run"];
        arguments.extend(self.ctr_runtime());
        arguments.extend(flags);
        arguments.extend([image::BUSYBOX, id]);
        arguments.extend(command);
        self.ctr(&arguments).await
    }

    /// Imports an image under the name that its archive holds.
    pub(crate) async fn import(&self, image: &Image) {
        self.ctr(&["images", "import", &image.path()]).await.assert_ok();
    }

    /// Says that the test cannot run because of `missing`; the test returns after it. See [`super::skip::skip`].
    pub(crate) fn skip(&self, missing: &str) {
        super::skip::skip(&self.test, missing);
    }

    /// False, with a skip that says so, when the suite is being validated on a runtime that lacks what the test asks of ours.
    pub(crate) fn is_for_ours(&self, what: &str) -> bool {
        if !self.runtime.is_ours() {
            self.skip(&format!("{} {what}", self.runtime.name));
        }
        self.runtime.is_ours()
    }

    /// Tolerates leftovers that begin with `prefix`, when the suite is being validated on a runtime that leaves them. Ours may not.
    pub(crate) fn others_may_leave(&self, prefix: &str) {
        if !self.runtime.is_ours() {
            self.tolerate(prefix);
        }
    }

    /// Lets something stay behind that is not the runtime's under test.
    pub(crate) fn tolerate(&self, prefix: &str) {
        self.tolerated.lock().unwrap().push(prefix.into());
    }

    /// Asserts an error's code. Go's shim answers Unknown to some calls that it refuses; a runtime that is not ours may do so.
    pub(crate) fn assert_code(&self, error: &Status, code: Code) {
        let accepted = error.code() == code || (!self.runtime.is_ours() && error.code() == Code::Unknown);
        assert!(accepted, "not {code:?}: {error:?}");
    }

    /// The datasets of the zfs snapshotter, snapshots not counted; none with another one.
    pub(crate) fn datasets(&self) -> Vec<String> {
        if self.snapshotter != "zfs" {
            return Vec::new();
        }
        let listed = zfs(&["list", "-H", "-o", "name", "-r", DATASET]);
        listed.lines().map(str::to_string).collect()
    }

    /// The shims of the runtime under test.
    pub(crate) fn shims(&self) -> Vec<leaks::Process> {
        leaks::shims(&self.runtime.name)
    }
}

/// What a finished program said.
#[derive(Debug)]
pub(crate) struct Finished {
    /// Exit status, or 128 + signal.
    pub(crate) status: i32,
    /// All of it.
    pub(crate) stdout: String,
    /// All of it.
    pub(crate) stderr: String,
    /// The command line, for messages.
    pub(crate) command: String,
}

impl Finished {
    /// # Panics
    /// With both outputs when the status is not 0.
    pub(crate) fn assert_ok(&self) -> &Self {
        self.assert_status(0)
    }

    /// # Panics
    /// With both outputs when the status is another.
    pub(crate) fn assert_status(&self, status: i32) -> &Self {
        assert_eq!(self.status, status, "{}\n{}{}", self.command, self.stdout, self.stderr);
        self
    }

    /// # Panics
    /// When it succeeded, or its stderr lacks `text`.
    pub(crate) fn assert_fails_with(&self, text: &str) -> &Self {
        assert_ne!(self.status, 0, "{} succeeded\n{}", self.command, self.stdout);
        assert!(
            self.stderr.contains(text),
            "{}: no {text:?} in {}",
            self.command,
            self.stderr
        );
        self
    }
}

fn ctr(namespace: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new("ctr");
    command
        .env("CONTAINERD_SNAPSHOTTER", snapshotter())
        .arg("--address")
        .arg(socket())
        .args(["--namespace", namespace])
        .args(arguments);
    command
}

/// Runs a program to its end, with a bound.
pub(crate) async fn finish(mut command: Command, stdin: &[u8]) -> Finished {
    let line = format!("{command:?}").replace('"', "");
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("cannot run {line}: {e}"));
    let (pid, mut feed) = (child.id(), child.stdin.take());
    let stdin = stdin.to_vec();
    std::thread::spawn(move || {
        if let Some(feed) = &mut feed {
            // A program that ends early does not read everything.
            let _ = feed.write_all(&stdin);
        }
    });
    let ended = tokio::task::spawn_blocking(move || child.wait_with_output());
    let output = match tokio::time::timeout(*RPC, ended).await {
        Ok(output) => output.expect("no panic").expect("wait"),
        Err(_) => {
            // SAFETY: the child was not reaped, so the number is its own.
            unsafe { libc::kill(pid as i32, libc::SIGKILL) };
            panic!("{line} did not end within {:?}", *RPC);
        }
    };
    let status = output
        .status
        .code()
        .unwrap_or_else(|| 128 + output.status.signal().unwrap_or(0));
    Finished {
        status,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        command: line,
    }
}

/// Waits, bounded by [`SOON`], until `condition` gives a value.
///
/// # Panics
/// Naming `what` when it does not.
pub(crate) async fn until<T>(what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let end = Instant::now() + *SOON;
    loop {
        if let Some(value) = condition().await {
            return value;
        }
        assert!(Instant::now() < end, "not within {:?}: {what}", *SOON);
        tokio::time::sleep(pause()).await;
    }
}

fn daemon() -> std::sync::MutexGuard<'static, Option<Daemon>> {
    DAEMON.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// overlayfs, or the one that `LXCRI_TEST_SNAPSHOTTER` names. zfs works on a dataset of the pool `lxcri`, which has to be there.
fn snapshotter() -> String {
    let named = std::env::var("LXCRI_TEST_SNAPSHOTTER").ok();
    named
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "overlayfs".into())
}

fn socket() -> PathBuf {
    Path::new(FOLDER).join("c.sock")
}

fn log() -> PathBuf {
    Path::new(FOLDER).join("containerd.log")
}

/// What containerd and the tests fill and collect as they like.
fn not_ours() -> Vec<PathBuf> {
    let mut folders = vec![log()];
    let root = Path::new(FOLDER).join("root");
    for name in [
        "io.containerd.content.v1.content",
        "io.containerd.metadata.v1.bolt",
        "io.containerd.snapshotter.v1.overlayfs",
        "io.containerd.snapshotter.v1.native",
        "io.containerd.snapshotter.v1.zfs",
    ] {
        folders.push(root.join(name));
    }
    folders
}

/// Makes the node's folders, configuration and images.
fn prepare(cri: bool) -> std::io::Result<Images> {
    // Panics with the reason when there is no private /run.
    universe::token();
    let folder = Path::new(FOLDER);
    if universe::by_systemd() {
        // What the test process before this one used.
        tear_down();
    }
    if snapshotter() == "zfs" {
        let mountpoint = folder.join("root/io.containerd.snapshotter.v1.zfs");
        fs::create_dir_all(&mountpoint)?;
        let mountpoint = mountpoint.display();
        zfs(&["create", "-o", &format!("mountpoint={mountpoint}"), DATASET]);
    }
    for name in ["bin", "tmp", "images", "cni", "work"] {
        fs::create_dir_all(folder.join(name))?;
    }
    // crun makes it, whatever it is asked, even for its version.
    fs::create_dir_all("/run/crun")?;
    // What the backends share and never remove; a test may use another one than the node's.
    fs::create_dir_all(Path::new("/run/proxmox-lxcri/crun").join(universe::token()))?;
    fs::create_dir_all(format!("/run/lxc/lock{}", leaks::LXC_PATH))?;
    if let Some(shim) = our_shim() {
        let program = folder.join("bin").join(leaks::shim_program(OURS));
        match max_shim_version() {
            None => std::os::unix::fs::symlink(shim, program)?,
            Some(version) => {
                let script = format!(
                    "#!/bin/sh\nMAX_SHIM_VERSION={version} exec '{}' \"$@\"\n",
                    shim.display()
                );
                fs::write(&program, script)?;
                fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
            }
        }
    }
    fs::write(
        folder.join("config.toml"),
        configuration(cri, &Runtime::from_environment()),
    )?;
    if let Some(file) = lxcri_config() {
        fs::write(file, format!("[options]\nbackend = \"{}\"\n", backend()))?;
    }
    fs::write(
        folder.join("cni/10-test.conflist"),
        format!(
            r#"{{"cniVersion": "0.4.0", "name": "test", "plugins": [{{"type": "bridge", "bridge": "lxcri0", "isGateway": true,
            "ipam": {{"type": "host-local", "subnet": "10.231.0.0/24", "dataDir": "{FOLDER}/ipam"}}}}]}}"#
        ),
    )?;
    let images = folder.join("images");
    Ok(Images {
        busybox: image::build(&images, "busybox", image::BUSYBOX, &["/bin/sh"], 0)?,
        pause: image::build(&images, "pause", image::PAUSE, &["/bin/sleep", "2147483647"], 0)?,
    })
}

/// What the zfs snapshotter works on; made anew with each node, in a pool that has to be there.
const DATASET: &str = "lxcri/containerd";

fn zfs(arguments: &[&str]) -> String {
    let output = Command::new("zfs").args(arguments).output();
    let output = output.unwrap_or_else(|e| panic!("LXCRI_TEST_SNAPSHOTTER=zfs, but zfs does not run: {e}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "zfs {arguments:?}: {stderr}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Our shim: the one that `LXCRI_TEST_SHIM` names, or the one that Cargo built for the tests.
pub(crate) fn our_shim() -> Option<PathBuf> {
    let named = std::env::var_os("LXCRI_TEST_SHIM").map(PathBuf::from);
    named.or_else(|| option_env!("CARGO_BIN_EXE_containerd-shim-proxmox-lxcri-v1").map(PathBuf::from))
}

/// `LXCRI_TEST_MAX_SHIM_VERSION`: what the shim is told instead of what containerd says. 2.0 to 2.2 say 2 and take 3, too.
pub(crate) fn max_shim_version() -> Option<u32> {
    let version = std::env::var("LXCRI_TEST_MAX_SHIM_VERSION").ok()?;
    Some(version.parse().expect("LXCRI_TEST_MAX_SHIM_VERSION is a number"))
}

/// containerd's configuration, in version 2 of the file, which 1.6 to 2.x read.
fn configuration(cri: bool, runtime: &Runtime) -> String {
    let disabled = if cri { "" } else { "\"io.containerd.grpc.v1.cri\", " };
    let name = &runtime.name;
    let binary = match &runtime.oci {
        Some(oci) => format!("BinaryName = \"{oci}\""),
        None => String::new(),
    };
    let pause = image::PAUSE;
    // Debian's package, or where Kubernetes puts them.
    let plugins = ["/usr/lib/cni", "/opt/cni/bin"]
        .into_iter()
        .find(|folder| Path::new(folder).join("bridge").exists());
    let plugins = plugins.unwrap_or("/usr/lib/cni");
    // Lowering a score needs CAP_SYS_RESOURCE, which not every test machine grants.
    let restrict = !holds_capability(24);
    let apparmor = fs::read_to_string("/sys/module/apparmor/parameters/enabled").unwrap_or_default();
    let no_apparmor = apparmor.trim() != "Y";
    let systemd = format!("SystemdCgroup = {}", universe::by_systemd());
    let snapshotter = snapshotter();
    let others = match snapshotter.as_str() {
        "zfs" => "",
        _ => "\"io.containerd.snapshotter.v1.zfs\", ",
    };
    // Snapshotters that nobody asked for make their folders as soon as the kernel has their file system.
    format!(
        r#"version = 2
root = "{FOLDER}/root"
state = "{FOLDER}/state"
temp = "{FOLDER}/tmp"
disabled_plugins = [{disabled}"io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.erofs", {others}"io.containerd.tracing.processor.v1.otlp"]
[grpc]
address = "{FOLDER}/c.sock"
[debug]
level = "trace"
[plugins."io.containerd.internal.v1.opt"]
path = "{FOLDER}/opt"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause}"
restrict_oom_score_adj = {restrict}
netns_mounts_under_state_dir = true
disable_apparmor = {no_apparmor}
stream_server_address = "127.0.0.1"
stream_server_port = "0"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{plugins}"
conf_dir = "{FOLDER}/cni"
[plugins."io.containerd.grpc.v1.cri".containerd]
default_runtime_name = "lxcri"
snapshotter = "{snapshotter}"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.lxcri]
runtime_type = "{name}"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.lxcri.options]
{systemd}
{binary}
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
"#
    )
}

/// Whether this process has the capability of that number.
fn holds_capability(number: u32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let set = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let set = u64::from_str_radix(set.unwrap_or_default().trim(), 16).unwrap_or_default();
    set & (1 << number) != 0
}

/// A connection to a containerd that answers.
async fn connect() -> Channel {
    until("containerd answers", async || {
        if let Some(daemon) = daemon().as_mut()
            && let Some(status) = daemon.process.ended()
        {
            panic!("containerd ended: {status}");
        }
        let channel = containerd_client::connect(socket()).await.ok()?;
        Client::from(channel.clone()).version().version(()).await.ok()?;
        Some(channel)
    })
    .await
}

/// Copies the daemon's log to where it outlives the universe, and prints its end.
fn keep_log(test: &str) {
    let folder = std::env::var_os("LXCRI_TEST_LOGS").or_else(|| option_env!("CARGO_TARGET_TMPDIR").map(Into::into));
    let folder = folder.map_or_else(std::env::temp_dir, PathBuf::from);
    let kept = folder.join(format!("{}.containerd.log", test.replace("::", ".")));
    let text = fs::read(log()).map_or_else(
        |e| format!("cannot be read: {e}"),
        |text| String::from_utf8_lossy(&text).into_owned(),
    );
    let lines: Vec<&str> = text.lines().collect();
    match fs::write(&kept, &text) {
        Ok(()) => eprintln!("{test} failed; containerd's log is {}, its end:", kept.display()),
        Err(e) => eprintln!(
            "{test} failed; containerd's log cannot be kept as {}: {e}; its end:",
            kept.display()
        ),
    }
    for line in &lines[lines.len().saturating_sub(40)..] {
        eprintln!("  {line}");
    }
}

/// Destroys the zfs snapshotter's dataset, if it is there, as soon as what was killed lets go of it.
fn destroy_dataset() {
    let run = |arguments: &[&str]| Command::new("zfs").args(arguments).output().expect("zfs");
    let end = Instant::now() + *SOON;
    while run(&["list", DATASET]).status.success() {
        let destroyed = run(&["destroy", "-R", DATASET]);
        let said = String::from_utf8_lossy(&destroyed.stderr);
        assert!(
            destroyed.status.success() || Instant::now() < end,
            "zfs destroy -R {DATASET}: {said}"
        );
        std::thread::sleep(pause());
    }
}

/// Kills everything in the universe but its init and the tests, and forgets the node.
fn tear_down() {
    if universe::by_systemd() {
        stop_unit();
    }
    leaks::kill_all(
        |_| true,
        || {
            if let Some(daemon) = daemon().as_mut() {
                let _ = daemon.process.ended();
            }
        },
    );
    *daemon() = None;
    for cgroup in universe::abandoned_cgroups() {
        let _ = fs::remove_dir(cgroup);
    }
    // Mounts first: what they hold is not the node's to remove.
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut targets: Vec<&str> = mounts.lines().filter_map(|line| line.split(' ').nth(4)).collect();
    targets.retain(|target| leaks::is_the_tests(target));
    for target in targets.iter().rev() {
        let target = std::ffi::CString::new(*target).unwrap_or_default();
        // SAFETY: a valid C string; the mount is in the private namespace, or one of the tests' own machine.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
    }
    if snapshotter() == "zfs" {
        destroy_dataset();
    }
    let folders = ["/run", leaks::LXC_PATH].map(|folder| fs::read_dir(folder).into_iter().flatten().flatten());
    for entry in folders.into_iter().flatten() {
        if !leaks::is_systemds(&entry.path()) {
            let _ = fs::remove_dir_all(entry.path()).or_else(|_| fs::remove_file(entry.path()));
        }
    }
}
