//! The engine on a fake backend: real processes without a container, and gates at which the test can hold a call.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

/// The part of the harness that needs no containerd.
#[path = "support"]
mod support {
    #![allow(dead_code, reason = "each test file uses another part of the harness")]

    pub(crate) mod patience;
}

use std::{
    collections::HashMap,
    fs::File,
    io::Write,
    os::fd::OwnedFd,
    sync::{
        Arc, LazyLock, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use proxmox_lxcri::{
    backend::{Backend, ChildIo, ExecSpec, Exit, Launched, Observed},
    error::{Error, Kind, Result},
    host::{
        cgroup::{self, Cgroup},
        command::{Command, Reaper},
    },
    task::{
        Cleaned, CreateRequest, Engine, Task,
        bundle::Bundle,
        cleanup,
        event::{Event, EventSink},
        process::Phase,
        record::{RECORD_FILE, Record},
        stdio,
    },
};
use support::patience::patience;
use tokio::sync::Semaphore;

/// Bound of every wait here: a test that reaches it has failed.
static BOUND: LazyLock<Duration> = LazyLock::new(|| patience(20));

/// Holds a call until the test lets it go on, and tells the test that it has arrived.
struct Gate {
    closed: AtomicBool,
    arrived: Semaphore,
    open: Semaphore,
}

impl Gate {
    fn new() -> Self {
        Self {
            closed: AtomicBool::new(false),
            arrived: Semaphore::new(0),
            open: Semaphore::new(0),
        }
    }

    async fn pass(&self) {
        if self.closed.load(Ordering::SeqCst) {
            self.arrived.add_permits(1);
            self.open.acquire().await.unwrap().forget();
        }
    }

    fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    async fn somebody_waits(&self) {
        self.arrived.acquire().await.unwrap().forget();
    }

    fn let_one_pass(&self) {
        self.open.add_permits(1);
    }
}

/// Runs the annotation `program` as a shell script: born in Create and released in Start, or born in Start where the annotation
/// `born` says so.
struct Fake {
    reaper: Reaper,
    releases: Mutex<HashMap<String, File>>,
    create: Gate,
    start: Gate,
    exec: Gate,
    delete: Gate,
    fail: Mutex<HashMap<&'static str, usize>>,
    calls: Mutex<Vec<&'static str>>,
}

impl Fake {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            reaper: Reaper::new(),
            releases: Mutex::default(),
            create: Gate::new(),
            start: Gate::new(),
            exec: Gate::new(),
            delete: Gate::new(),
            fail: Mutex::default(),
            calls: Mutex::default(),
        })
    }

    fn fail_once(&self, call: &'static str) {
        *self.fail.lock().unwrap().entry(call).or_default() += 1;
    }

    fn called(&self, call: &'static str) -> Result<()> {
        self.calls.lock().unwrap().push(call);
        match self.fail.lock().unwrap().get_mut(call) {
            Some(left) if *left > 0 => {
                *left -= 1;
                Err(Error::unknown(format!("{call} was told to fail")))
            }
            _ => Ok(()),
        }
    }

    fn launch(&self, script: &str, release: Option<OwnedFd>, io: ChildIo) -> Result<Launched> {
        let mut command = Command::new("/bin/sh").args(["-c", script]).die_with_parent();
        if let ChildIo::Pipes { stdin, stdout, stderr } = io {
            for (number, fd) in [stdin, stdout, stderr].into_iter().enumerate() {
                if let Some(fd) = fd {
                    command = match number {
                        0 => command.stdin(fd),
                        1 => command.stdout(fd),
                        _ => command.stderr(fd),
                    };
                }
            }
        }
        if let Some(fd) = release {
            command = command.fd(3, fd);
        }
        let mut child = self.reaper.spawn(command)?;
        Ok(Launched {
            pid: child.pid(),
            process: child.pidfd(),
            exit: Box::pin(async move { child.wait().await.unwrap_or(Exit::now(255)) }),
            cgroup: None,
        })
    }
}

struct FakeBackend(Arc<Fake>);

#[async_trait]
impl Backend for FakeBackend {
    fn name(&self) -> &'static str {
        "crun"
    }

    async fn create(&self, rec: &Record, bundle: &Bundle, io: &mut Option<ChildIo>) -> Result<Option<Launched>> {
        let on_disk = Record::load(&rec.bundle)?.expect("the record is on disk before the side effect");
        assert_eq!(on_disk.id, rec.id);
        self.0.called("create")?;
        self.0.create.pass().await;
        let program = &bundle.config.annotations["program"];
        if bundle
            .config
            .annotations
            .get("born")
            .is_some_and(|born| born == "start")
        {
            return Ok(None);
        }
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        let script = format!("read _ <&3 || exit 99; exec 3<&-; {program}");
        let launched = self.0.launch(&script, Some(read), io.take().unwrap())?;
        self.0.releases.lock().unwrap().insert(rec.id.clone(), write.into());
        Ok(Some(launched))
    }

    async fn start(&self, rec: &Record, io: &mut Option<ChildIo>) -> Result<Option<Launched>> {
        self.0.called("start")?;
        let Some(mut release) = self.0.releases.lock().unwrap().remove(&rec.id) else {
            self.0.start.pass().await;
            let bundle = Bundle::read(&rec.bundle)?;
            let program = &bundle.config.annotations["program"];
            let io = io.take().unwrap();
            self.0.called("birth")?;
            return self.0.launch(program, None, io).map(Some);
        };
        // A program that ended before anything was released is fine.
        let _ = release.write_all(b"\n");
        drop(release);
        self.0.start.pass().await;
        Ok(None)
    }

    async fn exec(&self, _rec: &Record, _exec_id: &str, process: &ExecSpec, io: ChildIo) -> Result<Launched> {
        self.0.called("exec")?;
        self.0.exec.pass().await;
        self.0.launch(std::str::from_utf8(&process.json).unwrap(), None, io)
    }

    async fn observe(&self, _rec: &Record) -> Result<Observed> {
        Ok(Observed::Absent)
    }

    async fn delete(&self, rec: &Record) -> Result<()> {
        self.0.called("delete")?;
        self.0.delete.pass().await;
        self.0.releases.lock().unwrap().remove(&rec.id);
        Ok(())
    }
}

#[derive(Default)]
struct Events(Mutex<Vec<Event>>);

impl EventSink for Events {
    fn publish(&self, event: Event, _at: SystemTime) {
        self.0.lock().unwrap().push(event);
    }
}

struct World {
    fake: Arc<Fake>,
    events: Arc<Events>,
    engine: Arc<Engine>,
    folder: tempfile::TempDir,
}

fn backends(fake: &Arc<Fake>) -> proxmox_lxcri::task::Backends {
    let fake = fake.clone();
    Arc::new(move |_| Ok(Arc::new(FakeBackend(fake.clone())) as Arc<dyn Backend>))
}

fn world() -> World {
    let fake = Fake::new();
    let events = Arc::new(Events::default());
    let folder = tempfile::tempdir().unwrap();
    let config_file = folder.path().join("config.toml");
    std::fs::write(&config_file, "").unwrap();
    let engine = Engine::new(
        "test",
        &config_file,
        events.clone(),
        backends(&fake),
        fake.reaper.clone(),
    );
    World {
        fake,
        events,
        engine,
        folder,
    }
}

impl World {
    fn request(&self, id: &str, program: &str) -> CreateRequest {
        let bundle = self.folder.path().join(id);
        std::fs::create_dir_all(&bundle).unwrap();
        let config = serde_json::json!({
            "annotations": {"program": program},
            "linux": {"namespaces": [{"type": "pid"}]},
        });
        std::fs::write(bundle.join("config.json"), config.to_string()).unwrap();
        CreateRequest {
            id: id.into(),
            bundle,
            ..CreateRequest::default()
        }
    }

    /// A created task whose init will be born in Start.
    async fn unborn(&self, id: &str, program: &str) -> Arc<Task> {
        let request = self.request(id, program);
        let config = serde_json::json!({
            "annotations": {"program": program, "born": "start"},
            "linux": {"namespaces": [{"type": "pid"}]},
        });
        std::fs::write(request.bundle.join("config.json"), config.to_string()).unwrap();
        self.engine.create(request).await.unwrap();
        self.engine.task(id).unwrap()
    }

    async fn created(&self, id: &str, program: &str) -> Arc<Task> {
        self.engine.create(self.request(id, program)).await.unwrap();
        self.engine.task(id).unwrap()
    }

    async fn running(&self, id: &str, program: &str) -> Arc<Task> {
        let task = self.created(id, program).await;
        task.start("").await.unwrap();
        task
    }

    /// Topics with the ids that they are about, without the `/tasks/` in front.
    fn told(&self) -> Vec<String> {
        let events = self.events.0.lock().unwrap();
        let about = |event: &Event| match event {
            Event::ExecAdded { exec_id, .. } | Event::ExecStarted { exec_id, .. } => exec_id.clone(),
            Event::Exit { id, .. } => id.clone(),
            Event::Create { container_id, .. }
            | Event::Start { container_id, .. }
            | Event::Delete { container_id, .. }
            | Event::Oom { container_id }
            | Event::Paused { container_id }
            | Event::Resumed { container_id }
            | Event::Checkpointed { container_id, .. } => container_id.clone(),
        };
        events
            .iter()
            .map(|event| format!("{} {}", event.topic().trim_start_matches("/tasks/"), about(event)))
            .collect()
    }

    /// Stdio with stdout in a file.
    fn to_file(&self, name: &str) -> stdio::Config {
        stdio::Config {
            stdout: format!("file://{}", self.folder.path().join(name).display()),
            ..stdio::Config::default()
        }
    }

    fn record_exists(&self, id: &str) -> bool {
        self.folder.path().join(id).join(RECORD_FILE).exists()
    }
}

async fn bounded<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(*BOUND, what).await.expect("this must not hang")
}

/// Holds the stdout of a living process open, as a grandchild that outlives it does; its drain has to wait.
fn hold_output(pid: u32) -> File {
    File::options().write(true).open(format!("/proc/{pid}/fd/1")).unwrap()
}

fn exec_spec(script: &str) -> ExecSpec {
    ExecSpec {
        json: script.into(),
        terminal: false,
    }
}

fn refused<T: std::fmt::Debug>(result: Result<T>, kind: Kind, text: &str) {
    let error = result.unwrap_err();
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(text), "{error}");
}

#[tokio::test]
async fn an_instant_exit_does_not_overtake_the_start() {
    for _ in 0..50 {
        let world = world();
        // Start is held until the program has ended for sure.
        world.fake.start.close();
        let task = world.created("a", "exit 7").await;
        let start = tokio::spawn({
            let task = task.clone();
            async move { task.start("").await }
        });
        bounded(world.fake.start.somebody_waits()).await;
        let init = task.init().pidfd().unwrap();
        bounded(init.wait_exited()).await.unwrap();
        tokio::task::yield_now().await;
        assert_eq!(world.told(), ["create a"]);
        world.fake.start.let_one_pass();
        bounded(start).await.unwrap().unwrap();
        let exit = bounded(task.wait("")).await.unwrap();
        assert_eq!(exit.status, 7);
        assert_eq!(bounded(world.engine.delete("a", "")).await.unwrap().1, exit);
        assert_eq!(world.told(), ["create a", "start a", "exit a", "delete a"]);
    }
}

#[tokio::test]
async fn a_deleted_task_leaves_no_record_and_its_id_is_free() {
    let world = world();
    for _ in 0..3 {
        let task = world.running("a", "exit 0").await;
        bounded(task.wait("")).await.unwrap();
        assert!(world.record_exists("a"));
        bounded(world.engine.delete("a", "")).await.unwrap();
        assert!(!world.record_exists("a"));
        refused(
            world.engine.task("a").map(|_| ()),
            Kind::NotFound,
            "container not created",
        );
    }
}

#[tokio::test]
async fn a_duplicate_id_is_refused_and_the_first_task_lives_on() {
    let world = world();
    let task = world.running("a", "exec sleep 1000").await;
    refused(
        world.engine.create(world.request("a", "exit 0")).await,
        Kind::AlreadyExists,
        "a",
    );
    assert_eq!(task.state("").unwrap().phase, Phase::Running);
    task.kill("", 9, false).await.unwrap();
    assert_eq!(bounded(task.wait("")).await.unwrap().status, 137);
}

#[tokio::test]
async fn of_two_creates_of_one_id_at_once_one_wins() {
    let world = world();
    world.fake.create.close();
    let first = tokio::spawn({
        let (engine, request) = (world.engine.clone(), world.request("a", "exit 0"));
        async move { engine.create(request).await }
    });
    bounded(world.fake.create.somebody_waits()).await;
    refused(
        world.engine.create(world.request("a", "exit 0")).await,
        Kind::AlreadyExists,
        "a",
    );
    world.fake.create.let_one_pass();
    assert!(bounded(first).await.unwrap().is_ok());
}

#[tokio::test]
async fn ids_that_could_leave_a_folder_are_refused() {
    let world = world();
    for id in [
        "",
        "..",
        "a/b",
        "/a",
        "a/../b",
        "a..b",
        ".a",
        "a\0b",
        "ä",
        &"x".repeat(300),
    ] {
        let mut request = world.request("good", "exit 0");
        request.id = id.into();
        refused(world.engine.create(request).await, Kind::InvalidArgument, "task id");
    }
    let task = world.running("a", "exec sleep 1000").await;
    refused(
        task.exec("../x", exec_spec("exit 0"), stdio::Config::default()),
        Kind::InvalidArgument,
        "exec id",
    );
}

#[tokio::test]
async fn a_bundle_without_or_with_a_broken_config_is_refused_and_leaves_nothing() {
    let world = world();
    let mut request = world.request("a", "exit 0");
    std::fs::write(request.bundle.join("config.json"), "{\"annotations\": 7").unwrap();
    refused(
        world.engine.create(request.clone()).await,
        Kind::InvalidArgument,
        "config.json",
    );
    std::fs::remove_file(request.bundle.join("config.json")).unwrap();
    refused(
        world.engine.create(request.clone()).await,
        Kind::InvalidArgument,
        "config.json",
    );
    request.bundle = "relative".into();
    refused(
        world.engine.create(request).await,
        Kind::InvalidArgument,
        "not absolute",
    );
    assert!(!world.record_exists("a"));
    assert!(world.told().is_empty());
}

#[tokio::test]
async fn a_create_that_fails_is_undone_and_tells_nothing() {
    let world = world();
    world.fake.fail_once("create");
    refused(
        world.engine.create(world.request("a", "exit 0")).await,
        Kind::Unknown,
        "create was told to fail",
    );
    assert_eq!(*world.fake.calls.lock().unwrap(), ["create", "delete"]);
    assert!(!world.record_exists("a"));
    assert!(world.told().is_empty());
    world.running("a", "exit 0").await;
}

/// A program in a cgroup that no container made; both go at the end.
struct Stranger {
    process: std::process::Child,
    name: String,
}

impl Stranger {
    fn new(name: &str) -> Self {
        let process = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let name = format!("lxcri-stranger-{name}-{}", std::process::id());
        cgroup::join(&name, process.id()).unwrap();
        Self { process, name }
    }

    fn lives(&mut self) -> bool {
        self.process.try_wait().unwrap().is_none()
    }

    async fn leave(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        let folder = Cgroup::expected(Some(&self.name), false, "x").unwrap().unwrap();
        folder.remove(*BOUND).await.unwrap();
    }
}

#[tokio::test]
async fn a_create_in_the_cgroup_of_others_is_refused_and_spares_them() {
    let world = world();
    let mut stranger = Stranger::new("path");
    // By its path, and by an id that is the name of a cgroup.
    let name = stranger.name.clone();
    for (id, path) in [("a", Some(&name)), (name.as_str(), None)] {
        let mut request = world.request(id, "exit 0");
        let config = serde_json::json!({"linux": {"cgroupsPath": path}});
        std::fs::write(request.bundle.join("config.json"), config.to_string()).unwrap();
        // Fails after the record is on disk.
        request.stdio.stdout = "/nonexistent/fifo".into();
        refused(
            world.engine.create(request).await,
            Kind::FailedPrecondition,
            "holds processes of somebody else",
        );
        assert!(!world.record_exists(id));
        assert!(stranger.lives());
    }
    assert!(world.fake.calls.lock().unwrap().is_empty());
    stranger.leave().await;
}

#[tokio::test]
async fn a_cgroup_path_that_leaves_the_hierarchy_is_refused_before_anything_is_done() {
    let world = world();
    let request = world.request("a", "exit 0");
    std::fs::write(
        request.bundle.join("config.json"),
        r#"{"linux": {"cgroupsPath": "/a/../../b"}}"#,
    )
    .unwrap();
    refused(world.engine.create(request).await, Kind::InvalidArgument, "cgroup path");
    assert!(!world.record_exists("a"));
}

#[tokio::test]
async fn a_missing_fifo_fails_the_create_by_its_name_and_everything_is_undone() {
    let world = world();
    let mut request = world.request("a", "exit 0");
    request.stdio.stdout = "/nonexistent/fifo".into();
    let error = world.engine.create(request).await.unwrap_err();
    assert!(error.to_string().contains("/nonexistent/fifo"), "{error}");
    assert!(!world.record_exists("a"));
}

#[tokio::test]
async fn a_kill_during_a_slow_create_gives_it_up_and_undoes_it() {
    let world = world();
    world.fake.create.close();
    let create = tokio::spawn({
        let (engine, request) = (world.engine.clone(), world.request("a", "exit 0"));
        async move { engine.create(request).await }
    });
    bounded(world.fake.create.somebody_waits()).await;
    let task = world.engine.task("a").unwrap();
    refused(
        task.kill("", 10, false).await,
        Kind::FailedPrecondition,
        "being created",
    );
    bounded(task.kill("", 9, false)).await.unwrap();
    refused(
        bounded(create).await.unwrap(),
        Kind::Aborted,
        "killed while it was being created",
    );
    assert!(!world.record_exists("a"));
    assert!(world.told().is_empty());
    refused(bounded(task.wait("")).await, Kind::NotFound, "process does not exist");
}

#[tokio::test]
async fn a_delete_during_a_slow_create_gives_it_up() {
    let world = world();
    world.fake.create.close();
    let create = tokio::spawn({
        let (engine, request) = (world.engine.clone(), world.request("a", "exit 0"));
        async move { engine.create(request).await }
    });
    bounded(world.fake.create.somebody_waits()).await;
    let (pid, exit) = bounded(world.engine.delete("a", "")).await.unwrap();
    assert_eq!((pid, exit.status), (0, 137));
    assert!(bounded(create).await.unwrap().is_err());
    assert!(!world.record_exists("a"));
}

#[tokio::test]
async fn kill_works_during_a_slow_start_and_the_exit_comes_after_the_start() {
    let world = world();
    world.fake.start.close();
    let task = world.created("a", "exec sleep 1000").await;
    let start = tokio::spawn({
        let task = task.clone();
        async move { task.start("").await }
    });
    bounded(world.fake.start.somebody_waits()).await;
    bounded(task.kill("", 9, false)).await.unwrap();
    world.fake.start.let_one_pass();
    bounded(start).await.unwrap().unwrap();
    assert_eq!(bounded(task.wait("")).await.unwrap().status, 137);
    assert_eq!(world.told(), ["create a", "start a", "exit a"]);
}

#[tokio::test]
async fn a_start_that_fails_leaves_the_task_created_and_deletable() {
    let world = world();
    world.fake.fail_once("start");
    let task = world.created("a", "exit 0").await;
    refused(task.start("").await, Kind::Unknown, "start was told to fail");
    assert_eq!(task.state("").unwrap().phase, Phase::Created);
    bounded(world.engine.delete("a", "")).await.unwrap();
    assert_eq!(world.told(), ["create a", "exit a", "delete a"]);
}

#[tokio::test]
async fn a_signal_for_an_init_that_is_being_born_is_delivered_at_its_birth() {
    let world = world();
    world.fake.start.close();
    let task = world.unborn("a", "exec sleep 1000").await;
    let start = tokio::spawn({
        let task = task.clone();
        async move { task.start("").await }
    });
    bounded(world.fake.start.somebody_waits()).await;
    bounded(task.kill("", 9, false)).await.unwrap();
    world.fake.start.let_one_pass();
    bounded(start).await.unwrap().unwrap();
    assert_eq!(bounded(task.wait("")).await.unwrap().status, 137);
    assert_eq!(world.told(), ["create a", "start a", "exit a"]);
}

#[tokio::test]
async fn an_init_that_is_born_and_cannot_be_recorded_is_ended_and_deletable() {
    let world = world();
    let task = world.unborn("a", "exec sleep 1000").await;
    let in_the_way = world.folder.path().join("a/.proxmox-lxcri.json.new");
    std::fs::create_dir(&in_the_way).unwrap();
    refused(task.start("").await, Kind::Unknown, "cannot write record");
    assert_eq!(bounded(task.wait("")).await.unwrap().status, 137);
    bounded(world.engine.delete("a", "")).await.unwrap();
    assert_eq!(world.told(), ["create a", "exit a", "delete a"]);
}

#[tokio::test]
async fn a_start_that_lost_the_stdio_is_not_repeated_without_it() {
    let world = world();
    world.fake.fail_once("birth");
    let task = world.unborn("a", "exit 0").await;
    refused(task.start("").await, Kind::Unknown, "birth was told to fail");
    refused(
        task.start("").await,
        Kind::FailedPrecondition,
        "went with the start that failed",
    );
    bounded(world.engine.delete("a", "")).await.unwrap();
}

#[tokio::test]
async fn an_unborn_init_is_deleted_without_an_exit() {
    let world = world();
    world.unborn("a", "exec sleep 1000").await;
    bounded(world.engine.delete("a", "")).await.unwrap();
    assert_eq!(world.told(), ["create a", "delete a"]);
}

#[tokio::test]
async fn a_created_task_that_is_deleted_ends_and_tells_so() {
    let world = world();
    let task = world.created("a", "exit 0").await;
    let process = task.init().pidfd().unwrap();
    let (pid, exit) = bounded(world.engine.delete("a", "")).await.unwrap();
    assert_eq!((pid, exit.status), (process.pid, 137));
    assert!(process.has_exited());
    assert_eq!(world.told(), ["create a", "exit a", "delete a"]);
}

#[tokio::test]
async fn a_running_task_and_a_running_exec_cannot_be_deleted() {
    let world = world();
    let task = world.running("a", "exec sleep 1000").await;
    refused(
        world.engine.delete("a", "").await,
        Kind::FailedPrecondition,
        "cannot delete a running process",
    );
    task.exec("e", exec_spec("exec sleep 1000"), stdio::Config::default())
        .unwrap();
    task.start("e").await.unwrap();
    refused(
        world.engine.delete("a", "e").await,
        Kind::FailedPrecondition,
        "cannot delete a running process",
    );
    assert_eq!(task.state("e").unwrap().phase, Phase::Running);
}

#[tokio::test]
async fn a_started_process_cannot_be_started_again() {
    let world = world();
    let task = world.running("a", "exec sleep 1000").await;
    refused(
        task.start("").await,
        Kind::FailedPrecondition,
        "cannot start a running process",
    );
    task.kill("", 9, false).await.unwrap();
    bounded(task.wait("")).await.unwrap();
    refused(
        task.start("").await,
        Kind::FailedPrecondition,
        "cannot start a stopped process",
    );
}

#[tokio::test]
async fn a_delete_that_fails_can_be_called_again() {
    let world = world();
    let task = world.running("a", "exit 3").await;
    bounded(task.wait("")).await.unwrap();
    world.fake.fail_once("delete");
    refused(
        world.engine.delete("a", "").await,
        Kind::Unknown,
        "delete was told to fail",
    );
    assert!(world.record_exists("a"));
    assert_eq!(task.state("").unwrap().phase, Phase::Stopped);
    assert_eq!(bounded(world.engine.delete("a", "")).await.unwrap().1.status, 3);
    assert_eq!(world.told(), ["create a", "start a", "exit a", "delete a"]);
}

#[tokio::test]
async fn two_deletes_at_once_get_the_same_answer_and_one_event() {
    let world = world();
    let task = world.running("a", "exit 3").await;
    bounded(task.wait("")).await.unwrap();
    world.fake.delete.close();
    let release = async {
        world.fake.delete.somebody_waits().await;
        tokio::task::yield_now().await;
        world.fake.delete.let_one_pass();
    };
    let both = async { tokio::join!(world.engine.delete("a", ""), world.engine.delete("a", ""), release) };
    let (first, second, ()) = bounded(both).await;
    assert_eq!(first.unwrap(), second.unwrap());
    assert_eq!(world.told(), ["create a", "start a", "exit a", "delete a"]);
}

#[tokio::test]
async fn two_deletes_of_a_created_task_at_once_get_the_same_answer_and_one_event() {
    let world = world();
    world.created("a", "exit 0").await;
    world.fake.delete.close();
    let release = async {
        world.fake.delete.somebody_waits().await;
        world.fake.delete.let_one_pass();
    };
    let both = async { tokio::join!(world.engine.delete("a", ""), world.engine.delete("a", ""), release) };
    let (first, second, ()) = bounded(both).await;
    assert_eq!(first.unwrap(), second.unwrap());
    assert_eq!(world.told(), ["create a", "exit a", "delete a"]);
}

#[tokio::test]
async fn two_deletes_of_an_exec_at_once_get_the_same_answer() {
    let world = world();
    let task = world.running("a", "exec sleep 1000").await;
    task.exec("e", exec_spec("exec sleep 1000"), world.to_file("log"))
        .unwrap();
    let output = hold_output(task.start("e").await.unwrap());
    task.kill("e", 9, false).await.unwrap();
    bounded(task.wait("e")).await.unwrap();
    let release = async { drop(output) };
    let both = async { tokio::join!(world.engine.delete("a", "e"), world.engine.delete("a", "e"), release) };
    let (first, second, ()) = bounded(both).await;
    assert_eq!(first.unwrap(), second.unwrap());
}

#[tokio::test]
async fn what_has_ended_cannot_be_killed_and_nothing_unknown_either() {
    let world = world();
    let task = world.running("a", "exit 0").await;
    bounded(task.wait("")).await.unwrap();
    refused(
        task.kill("", 9, false).await,
        Kind::NotFound,
        "process already finished",
    );
    refused(task.kill("", 9, true).await, Kind::NotFound, "process already finished");
    refused(
        task.kill("nope", 9, false).await,
        Kind::NotFound,
        "process does not exist nope",
    );
    refused(task.kill("", 0, false).await, Kind::InvalidArgument, "signal");
    refused(task.kill("", 65, false).await, Kind::InvalidArgument, "signal");
}

#[tokio::test]
async fn an_exec_that_was_never_started_cannot_be_killed_but_deleted() {
    let world = world();
    let task = world.running("a", "exec sleep 1000").await;
    task.exec("e", exec_spec("exit 0"), stdio::Config::default()).unwrap();
    refused(task.kill("e", 9, false).await, Kind::NotFound, "process not created");
    bounded(world.engine.delete("a", "e")).await.unwrap();
    refused(task.state("e"), Kind::NotFound, "process does not exist e");
    assert_eq!(world.told(), ["create a", "start a", "exec-added e"]);
}

#[tokio::test]
async fn an_exec_tells_added_started_exit_and_keeps_its_status_until_deleted() {
    let world = world();
    let task = world.running("a", "exec sleep 1000").await;
    task.exec("e", exec_spec("exit 5"), stdio::Config::default()).unwrap();
    refused(
        task.exec("e", exec_spec("exit 5"), stdio::Config::default()),
        Kind::AlreadyExists,
        "e",
    );
    let pid = task.start("e").await.unwrap();
    assert_eq!(bounded(task.wait("e")).await.unwrap().status, 5);
    let state = task.state("e").unwrap();
    assert_eq!(
        (state.pid, state.phase, state.exit.unwrap().status),
        (pid, Phase::Stopped, 5)
    );
    assert_eq!(bounded(world.engine.delete("a", "e")).await.unwrap().1.status, 5);
    assert_eq!(
        world.told(),
        ["create a", "start a", "exec-added e", "exec-started e", "exit e"]
    );
}

#[tokio::test]
async fn a_signal_for_an_exec_that_is_being_born_is_delivered_at_its_birth() {
    let world = world();
    let task = world.running("a", "exec sleep 1000").await;
    world.fake.exec.close();
    task.exec("e", exec_spec("exec sleep 1000"), stdio::Config::default())
        .unwrap();
    let start = tokio::spawn({
        let task = task.clone();
        async move { task.start("e").await }
    });
    bounded(world.fake.exec.somebody_waits()).await;
    bounded(task.kill("e", 9, false)).await.unwrap();
    world.fake.exec.let_one_pass();
    bounded(start).await.unwrap().unwrap();
    assert_eq!(bounded(task.wait("e")).await.unwrap().status, 137);
    assert_eq!(world.told()[2..], ["exec-added e", "exec-started e", "exit e"]);
}

#[tokio::test]
async fn an_exec_that_cannot_start_stays_created_and_is_deletable() {
    let world = world();
    let task = world.running("a", "exec sleep 1000").await;
    world.fake.fail_once("exec");
    task.exec("e", exec_spec("exit 0"), stdio::Config::default()).unwrap();
    refused(task.start("e").await, Kind::Unknown, "exec was told to fail");
    assert_eq!(task.state("e").unwrap().phase, Phase::Created);
    bounded(world.engine.delete("a", "e")).await.unwrap();
}

#[tokio::test]
async fn the_exits_of_execs_come_before_inits_and_no_exec_starts_after_it() {
    for _ in 0..20 {
        let world = world();
        let task = world.running("a", "exec sleep 1000").await;
        for exec in ["e1", "e2", "e3"] {
            task.exec(exec, exec_spec("exec sleep 1000"), stdio::Config::default())
                .unwrap();
            task.start(exec).await.unwrap();
        }
        task.exec("late", exec_spec("exit 0"), stdio::Config::default())
            .unwrap();
        task.kill("", 9, false).await.unwrap();
        bounded(task.wait("")).await.unwrap();
        let told = world.told();
        let exits: Vec<&str> = told.iter().filter_map(|event| event.strip_prefix("exit ")).collect();
        assert_eq!(exits.len(), 4, "{told:?}");
        assert_eq!(exits[3], "a");
        refused(
            task.start("late").await,
            Kind::FailedPrecondition,
            "init process is not running",
        );
        refused(
            task.exec("later", exec_spec("exit 0"), stdio::Config::default()),
            Kind::FailedPrecondition,
            "cannot exec in a stopped state",
        );
        bounded(world.engine.delete("a", "")).await.unwrap();
    }
}

#[tokio::test]
async fn init_that_dies_while_an_exec_is_being_born_waits_for_its_exit() {
    let world = world();
    let task = world.running("a", "exec sleep 1000").await;
    world.fake.exec.close();
    task.exec("e", exec_spec("exec sleep 1000"), stdio::Config::default())
        .unwrap();
    let start = tokio::spawn({
        let task = task.clone();
        async move { task.start("e").await }
    });
    bounded(world.fake.exec.somebody_waits()).await;
    let init = task.init().pidfd().unwrap();
    task.kill("", 9, false).await.unwrap();
    bounded(init.wait_exited()).await.unwrap();
    world.fake.exec.let_one_pass();
    bounded(start).await.unwrap().unwrap();
    bounded(task.wait("")).await.unwrap();
    assert_eq!(
        world.told(),
        [
            "create a",
            "start a",
            "exec-added e",
            "exec-started e",
            "exit e",
            "exit a"
        ]
    );
}

#[tokio::test]
async fn an_exec_that_is_born_after_inits_exit_was_told_is_ended_in_silence() {
    let world = world();
    let task = world.running("a", "exec sleep 1000").await;
    world.fake.exec.close();
    task.exec("e", exec_spec("exec sleep 1000"), stdio::Config::default())
        .unwrap();
    let start = tokio::spawn({
        let task = task.clone();
        async move { task.start("e").await }
    });
    bounded(world.fake.exec.somebody_waits()).await;
    let init = task.init().pidfd().unwrap();
    task.kill("", 9, false).await.unwrap();
    bounded(init.wait_exited()).await.unwrap();
    // The bound of waiting for the exec passes at once.
    tokio::time::pause();
    task.wait("").await.unwrap();
    tokio::time::resume();
    bounded(world.engine.delete("a", "")).await.unwrap();
    world.fake.exec.let_one_pass();
    refused(
        bounded(start).await.unwrap(),
        Kind::FailedPrecondition,
        "init has ended",
    );
    assert_eq!(
        world.told(),
        ["create a", "start a", "exec-added e", "exit a", "delete a"]
    );
}

#[tokio::test]
async fn a_stdin_that_is_closed_before_the_exec_starts_ends() {
    let world = world();
    let task = world.running("a", "exec sleep 1000").await;
    let fifo = world.folder.path().join("stdin");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let stdio = stdio::Config {
        stdin: fifo.display().to_string(),
        ..stdio::Config::default()
    };
    task.exec("e", exec_spec("read line && exit 8; exit 4"), stdio).unwrap();
    task.close_stdin("e").unwrap();
    task.start("e").await.unwrap();
    assert_eq!(bounded(task.wait("e")).await.unwrap().status, 4);
}

#[tokio::test]
async fn the_drains_of_many_execs_take_no_longer_than_that_of_one() {
    let world = world();
    let task = world.running("a", "exec sleep 1000").await;
    let mut held = Vec::new();
    for exec in ["e1", "e2", "e3", "e4"] {
        task.exec(exec, exec_spec("exec sleep 1000"), world.to_file(exec))
            .unwrap();
        held.push(hold_output(task.start(exec).await.unwrap()));
    }
    task.kill("", 9, false).await.unwrap();
    bounded(task.wait("")).await.unwrap();
    let bound = Duration::from_millis(task.record().options.drain_timeout_ms);
    // From here on the clock moves only when everything waits for it.
    tokio::time::pause();
    let before = tokio::time::Instant::now();
    world.engine.delete("a", "").await.unwrap();
    assert!(before.elapsed() < 2 * bound);
    drop(held);
}

#[tokio::test]
async fn connect_to_an_unknown_task_answers_pid_0() {
    let world = world();
    assert_eq!(world.engine.connect("nope"), 0);
    let task = world.running("a", "exec sleep 1000").await;
    assert_eq!(world.engine.connect("a"), task.init().pid());
}

#[tokio::test]
async fn pids_name_init_until_the_task_is_deleted() {
    let world = world();
    let task = world.running("a", "exec sleep 1000").await;
    let init = task.init().pid();
    assert_eq!(task.pids(), [(init, None)]);
    task.kill("", 9, false).await.unwrap();
    bounded(task.wait("")).await.unwrap();
    // A restarted containerd would take an empty answer for a leaked shim, and lose the exit status.
    assert_eq!(task.pids(), [(init, None)]);
}

#[tokio::test]
async fn a_shutdown_ends_an_empty_shim_and_spares_a_living_task() {
    let world = world();
    let task = world.running("a", "exec sleep 1000").await;
    world.engine.shutdown();
    assert!(!world.engine.is_idle());
    task.kill("", 9, false).await.unwrap();
    bounded(task.wait("")).await.unwrap();
    assert!(world.engine.is_idle());
    bounded(world.engine.delete("a", "")).await.unwrap();
    world.engine.shutdown();
    bounded(world.engine.done()).await;
}

#[tokio::test]
async fn a_shim_that_shuts_down_takes_no_new_task() {
    let world = world();
    world.engine.shutdown();
    refused(
        world.engine.create(world.request("a", "exit 0")).await,
        Kind::Unavailable,
        "shutting down",
    );
    assert!(!world.record_exists("a"));
}

#[tokio::test(start_paused = true)]
async fn a_shim_without_any_task_does_not_stay_for_ever() {
    let world = world();
    let before = tokio::time::Instant::now();
    world.engine.done().await;
    assert!(before.elapsed() >= Duration::from_secs(60));
}

#[tokio::test]
async fn cleanup_reports_the_exit_that_the_dead_shim_had_recorded() {
    let world = world();
    let task = world.running("a", "exit 42").await;
    let exit = bounded(task.wait("")).await.unwrap();
    let bundle = world.folder.path().join("a");
    refused(
        cleanup(&bundle, "other", "a", &backends(&world.fake)).await,
        Kind::FailedPrecondition,
        "nothing was touched",
    );
    let cleaned = cleanup(&bundle, "test", "a", &backends(&world.fake)).await.unwrap();
    assert_eq!(
        cleaned,
        Cleaned {
            pid: task.init().pid(),
            exit
        }
    );
    assert!(!world.record_exists("a"));
    let again = cleanup(&bundle, "test", "a", &backends(&world.fake)).await.unwrap();
    assert_eq!((again.pid, again.exit.status), (0, 137));
}

#[tokio::test]
async fn cleanup_ends_an_init_that_outlived_its_shim() {
    let world = world();
    let task = world.running("a", "exec sleep 1000").await;
    let init = task.init().pidfd().unwrap();
    let bundle = world.folder.path().join("a");
    let cleaned = cleanup(&bundle, "test", "a", &backends(&world.fake)).await.unwrap();
    assert_eq!((cleaned.pid, cleaned.exit.status), (init.pid, 137));
    bounded(init.wait_exited()).await.unwrap();
}

#[tokio::test]
async fn cleanup_without_a_record_has_nothing_to_do() {
    let world = world();
    let cleaned = cleanup(world.folder.path(), "test", "a", &backends(&world.fake))
        .await
        .unwrap();
    assert_eq!((cleaned.pid, cleaned.exit.status), (0, 137));
}

#[tokio::test]
async fn three_hundred_lifecycles_leave_no_descriptor_and_no_child() {
    let world = world();
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let once = async |n: usize| {
        let task = world.running("a", "exit 0").await;
        task.exec("e", exec_spec("exit 0"), stdio::Config::default()).ok();
        bounded(task.wait("")).await.unwrap();
        bounded(world.engine.delete("a", "")).await.unwrap();
        n
    };
    once(0).await;
    let before = descriptors();
    for n in 1..300 {
        once(n).await;
    }
    // Other tests of this process come and go; a leak of one per lifecycle would be hundreds.
    assert!(descriptors() < before + 100, "{before} before, {} after", descriptors());
}
