//! A container through containerd's API, as a Go client would use it.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use containerd_client::{
    services::v1::{
        CheckpointTaskRequest, CloseIoRequest, Container, CreateContainerRequest, CreateTaskRequest,
        DeleteContainerRequest, DeleteProcessRequest, DeleteResponse, DeleteTaskRequest, ExecProcessRequest,
        GetContainerRequest, GetRequest, KillRequest, ListPidsRequest, MetricsRequest, PauseTaskRequest,
        ResizePtyRequest, ResumeTaskRequest, StartRequest, UpdateTaskRequest, WaitRequest, WaitResponse,
        container::Runtime,
        snapshots::{PrepareSnapshotRequest, RemoveSnapshotRequest},
    },
    tonic::{Code, Status},
    types::{Metric, Mount, v1::Process},
};
use prost_types::Any;
use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt, net::unix::pipe};

use super::{
    node::{Node, RPC, SOON, until},
    patience::pause,
};

/// The type of a spec in containerd's store.
const SPEC_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";
/// The type of an exec's process document.
const PROCESS_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";

/// What a container shall be.
pub(crate) struct Builder<'n> {
    node: &'n Node,
    id: String,
    spec: Value,
    options: Option<Any>,
    stdin: bool,
    parent: String,
    rootfs: Option<Vec<Mount>>,
    uris: Option<[String; 2]>,
}

impl Node {
    /// A container of the tests' image that runs `arguments`. `name` becomes its id, with the universe's token.
    pub(crate) fn container(&self, name: &str, arguments: &[&str]) -> Builder<'_> {
        let id = format!("{name}-{}", self.namespace);
        Builder {
            node: self,
            spec: spec(&self.namespace, &id, arguments),
            id,
            options: self.runtime.options(),
            stdin: false,
            parent: self.images.busybox.chain_id.clone(),
            rootfs: None,
            uris: None,
        }
    }

    /// A container that runs `sh -c <script>`.
    pub(crate) fn sh(&self, name: &str, script: &str) -> Builder<'_> {
        self.container(name, &["/bin/sh", "-c", script])
    }
}

impl<'n> Builder<'n> {
    /// A terminal instead of pipes.
    pub(crate) fn tty(self) -> Self {
        self.edit(|spec| spec["process"]["terminal"] = json!(true))
    }

    /// A fifo for stdin; without it stdin is `/dev/null`.
    pub(crate) fn stdin(mut self) -> Self {
        self.stdin = true;
        self
    }

    /// Changes the OCI spec.
    pub(crate) fn edit(mut self, change: impl FnOnce(&mut Value)) -> Self {
        change(&mut self.spec);
        self
    }

    /// Other runtime options than the runtime's own.
    pub(crate) fn options(mut self, type_url: &str, value: Vec<u8>) -> Self {
        self.options = Some(Any {
            type_url: type_url.into(),
            value,
        });
        self
    }

    /// Another image's chain id.
    pub(crate) fn image(mut self, chain_id: &str) -> Self {
        self.parent = chain_id.into();
        self
    }

    /// These mounts instead of a snapshot's.
    pub(crate) fn rootfs(mut self, mounts: Vec<Mount>) -> Self {
        self.rootfs = Some(mounts);
        self
    }

    /// Stdout and stderr as URIs (`file://…`, `binary://…`) instead of fifos.
    pub(crate) fn log_to(mut self, stdout: &str, stderr: &str) -> Self {
        self.uris = Some([stdout.into(), stderr.into()]);
        self
    }

    /// Stores the container, prepares its snapshot and creates its task.
    pub(crate) async fn create(self) -> Task<'n> {
        let id = self.id.clone();
        self.try_create().await.unwrap_or_else(|e| panic!("create {id}: {e:?}"))
    }

    /// As [`Builder::create`]; when the task cannot be created, container and snapshot are removed again.
    pub(crate) async fn try_create(self) -> Result<Task<'n>, Status> {
        let node = self.node;
        let request = CreateContainerRequest {
            container: Some(Container {
                id: self.id.clone(),
                runtime: Some(Runtime {
                    name: node.runtime.name.clone(),
                    options: self.options.clone(),
                }),
                spec: Some(Any {
                    type_url: SPEC_TYPE.into(),
                    value: self.spec.to_string().into_bytes(),
                }),
                snapshotter: node.snapshotter.clone(),
                snapshot_key: self.id.clone(),
                ..Container::default()
            }),
        };
        node.containers().create(node.request(request)).await?;
        let prepared = match &self.rootfs {
            Some(mounts) => Ok(mounts.clone()),
            None => node.prepare(&self.id, &self.parent).await,
        };
        let rootfs = match prepared {
            Ok(mounts) => mounts,
            Err(error) => {
                node.forget(&self.id).await;
                return Err(error);
            }
        };
        let terminal = self.spec["process"]["terminal"] == json!(true);
        let io = match &self.uris {
            None => Io::fifos(node, &self.id, self.stdin, !terminal),
            Some([stdout, stderr]) => Io::uris(node, &self.id, stdout, stderr),
        };
        let request = CreateTaskRequest {
            container_id: self.id.clone(),
            rootfs,
            stdin: io.stdin_path.clone(),
            stdout: io.stdout_path.clone(),
            stderr: io.stderr_path.clone(),
            terminal,
            options: self.options.clone(),
            ..CreateTaskRequest::default()
        };
        match node.tasks().create(node.request(request)).await {
            Ok(response) => Ok(Task {
                node,
                id: self.id,
                pid: response.into_inner().pid,
                io,
                chain: self.rootfs.is_none(),
            }),
            Err(error) => {
                drop(io);
                node.forget(&self.id).await;
                Err(error)
            }
        }
    }

    /// [`Builder::create`], then start.
    pub(crate) async fn start(self) -> Task<'n> {
        let task = self.create().await;
        task.start()
            .await
            .unwrap_or_else(|e| panic!("start {}: {e:?}", task.id));
        task
    }
}

impl Node {
    async fn prepare(&self, key: &str, parent: &str) -> Result<Vec<Mount>, Status> {
        let request = PrepareSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.into(),
            parent: parent.into(),
            ..PrepareSnapshotRequest::default()
        };
        Ok(self
            .snapshots()
            .prepare(self.request(request))
            .await?
            .into_inner()
            .mounts)
    }

    /// Kills and deletes the task `id` and forgets the container, as far as they exist; true once none of it exists.
    ///
    /// For what a client left that gave up half-way: it does not know how far it came.
    pub(crate) async fn remove_whatever_is_there(&self, id: &str) -> bool {
        let kill = KillRequest {
            container_id: id.into(),
            signal: libc::SIGKILL as u32,
            ..KillRequest::default()
        };
        let _ = self.tasks().kill(self.request(kill)).await;
        let delete = DeleteTaskRequest {
            container_id: id.into(),
        };
        let task = self.tasks().delete(self.request(delete)).await;
        if !task.is_err_and(|error| error.code() == Code::NotFound) {
            return false;
        }
        self.forget(id).await;
        let request = GetContainerRequest { id: id.into() };
        let container = self.containers().get(self.request(request)).await;
        container.is_err_and(|error| error.code() == Code::NotFound)
    }

    /// Removes a container's entry and snapshot, whatever is there of them.
    pub(crate) async fn forget(&self, id: &str) {
        let request = RemoveSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: id.into(),
        };
        let _ = self.snapshots().remove(self.request(request)).await;
        let request = DeleteContainerRequest { id: id.into() };
        let _ = self.containers().delete(self.request(request)).await;
    }
}

/// A created task. Ends with [`Task::delete`] and [`Task::forget`], or [`Task::end`].
pub(crate) struct Task<'n> {
    node: &'n Node,
    /// Its container's id.
    pub(crate) id: String,
    /// Init's pid.
    pub(crate) pid: u32,
    /// Init's stdio.
    pub(crate) io: Io,
    chain: bool,
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Exit {
    pub(crate) status: u32,
    pub(crate) at: prost_types::Timestamp,
}

impl From<WaitResponse> for Exit {
    fn from(response: WaitResponse) -> Self {
        Self {
            status: response.exit_status,
            at: response.exited_at.expect("an exit has a time"),
        }
    }
}

impl<'n> Task<'n> {
    /// Start.
    pub(crate) async fn start(&self) -> Result<u32, Status> {
        self.start_process("").await
    }

    async fn start_process(&self, exec_id: &str) -> Result<u32, Status> {
        let request = StartRequest {
            container_id: self.id.clone(),
            exec_id: exec_id.into(),
        };
        Ok(self
            .node
            .tasks()
            .start(self.node.request(request))
            .await?
            .into_inner()
            .pid)
    }

    /// Wait, for init (empty) or an exec.
    pub(crate) async fn wait_for(&self, exec_id: &str) -> Result<Exit, Status> {
        let request = WaitRequest {
            container_id: self.id.clone(),
            exec_id: exec_id.into(),
        };
        Ok(self
            .node
            .tasks()
            .wait(self.node.request(request))
            .await?
            .into_inner()
            .into())
    }

    /// Init's exit.
    pub(crate) async fn wait(&self) -> Exit {
        self.wait_for("")
            .await
            .unwrap_or_else(|e| panic!("wait for {}: {e:?}", self.id))
    }

    /// Kill of init alone.
    pub(crate) async fn kill(&self, signal: i32) -> Result<(), Status> {
        self.kill_process("", signal, false).await
    }

    /// Kill of init (empty), an exec, or all.
    pub(crate) async fn kill_process(&self, exec_id: &str, signal: i32, all: bool) -> Result<(), Status> {
        let request = KillRequest {
            container_id: self.id.clone(),
            exec_id: exec_id.into(),
            signal: signal as u32,
            all,
        };
        self.node.tasks().kill(self.node.request(request)).await.map(drop)
    }

    /// Delete of the task.
    pub(crate) async fn delete(&self) -> Result<DeleteResponse, Status> {
        let request = DeleteTaskRequest {
            container_id: self.id.clone(),
        };
        Ok(self.node.tasks().delete(self.node.request(request)).await?.into_inner())
    }

    /// The task's state, or an exec's.
    pub(crate) async fn state(&self, exec_id: &str) -> Result<Process, Status> {
        let request = GetRequest {
            container_id: self.id.clone(),
            exec_id: exec_id.into(),
        };
        let response = self.node.tasks().get(self.node.request(request)).await?.into_inner();
        Ok(response.process.expect("a state"))
    }

    /// Init's status: "RUNNING", …
    pub(crate) async fn status(&self) -> String {
        let state = self
            .state("")
            .await
            .unwrap_or_else(|e| panic!("state of {}: {e:?}", self.id));
        state.status().as_str_name().to_string()
    }

    /// Create for the id of this task, which exists.
    pub(crate) async fn create_again(&self) -> Result<(), Status> {
        let request = CreateTaskRequest {
            container_id: self.id.clone(),
            options: self.node.runtime.options(),
            ..CreateTaskRequest::default()
        };
        self.node.tasks().create(self.node.request(request)).await.map(drop)
    }

    /// Exec for the id of an exec that exists.
    pub(crate) async fn exec_again(&self, exec_id: &str) -> Result<(), Status> {
        let request = ExecProcessRequest {
            container_id: self.id.clone(),
            exec_id: exec_id.into(),
            spec: Some(Any {
                type_url: PROCESS_TYPE.into(),
                value: process(&["true"]).to_string().into_bytes(),
            }),
            ..ExecProcessRequest::default()
        };
        self.node.tasks().exec(self.node.request(request)).await.map(drop)
    }

    /// Pause.
    pub(crate) async fn pause(&self) -> Result<(), Status> {
        let request = PauseTaskRequest {
            container_id: self.id.clone(),
        };
        self.node.tasks().pause(self.node.request(request)).await.map(drop)
    }

    /// Resume.
    pub(crate) async fn resume(&self) -> Result<(), Status> {
        let request = ResumeTaskRequest {
            container_id: self.id.clone(),
        };
        self.node.tasks().resume(self.node.request(request)).await.map(drop)
    }

    /// Pids with the ids of their execs (empty for others).
    pub(crate) async fn pids(&self) -> Result<Vec<(u32, String)>, Status> {
        #[derive(Clone, PartialEq, prost::Message)]
        struct ProcessDetails {
            #[prost(string, tag = "1")]
            exec_id: String,
        }
        let request = ListPidsRequest {
            container_id: self.id.clone(),
        };
        let response = self
            .node
            .tasks()
            .list_pids(self.node.request(request))
            .await?
            .into_inner();
        let details = |info: Option<Any>| match info {
            None => String::new(),
            Some(any) => {
                assert_eq!(
                    any.type_url.rsplit('/').next(),
                    Some("containerd.runc.v1.ProcessDetails")
                );
                let details: ProcessDetails = prost::Message::decode(any.value.as_slice()).expect("ProcessDetails");
                details.exec_id
            }
        };
        Ok(response
            .processes
            .into_iter()
            .map(|process| (process.pid, details(process.info)))
            .collect())
    }

    /// Stats, as containerd hands them on.
    pub(crate) async fn metrics(&self) -> Metric {
        let request = MetricsRequest {
            filters: vec![format!("id=={}", self.id)],
        };
        let response = self.node.tasks().metrics(self.node.request(request)).await;
        let mut metrics = response
            .unwrap_or_else(|e| panic!("metrics of {}: {e:?}", self.id))
            .into_inner()
            .metrics;
        metrics.retain(|metric| metric.id == self.id);
        metrics.pop().unwrap_or_else(|| panic!("no metrics of {}", self.id))
    }

    /// Update with OCI `linux.resources`.
    pub(crate) async fn update(&self, resources: Value) -> Result<(), Status> {
        let request = UpdateTaskRequest {
            container_id: self.id.clone(),
            resources: Some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
                value: resources.to_string().into_bytes(),
            }),
            ..UpdateTaskRequest::default()
        };
        self.node.tasks().update(self.node.request(request)).await.map(drop)
    }

    /// Checkpoint, with `containerd.runc.v1.CheckpointOptions`; the container goes on. Gives the number of blobs that were written
    /// into containerd's content store.
    pub(crate) async fn checkpoint(&self, folder: &str) -> Result<usize, Status> {
        #[derive(Clone, PartialEq, prost::Message)]
        struct CheckpointOptions {
            #[prost(string, tag = "8")]
            image_path: String,
        }
        let options = CheckpointOptions {
            image_path: folder.into(),
        };
        let request = CheckpointTaskRequest {
            container_id: self.id.clone(),
            options: Some(Any {
                type_url: "containerd.runc.v1.CheckpointOptions".into(),
                value: prost::Message::encode_to_vec(&options),
            }),
            ..CheckpointTaskRequest::default()
        };
        let response = self.node.tasks().checkpoint(self.node.request(request)).await?;
        Ok(response.into_inner().descriptors.len())
    }

    /// ResizePty of init (empty) or an exec.
    pub(crate) async fn resize(&self, exec_id: &str, width: u32, height: u32) -> Result<(), Status> {
        let request = ResizePtyRequest {
            container_id: self.id.clone(),
            exec_id: exec_id.into(),
            width,
            height,
        };
        self.node.tasks().resize_pty(self.node.request(request)).await.map(drop)
    }

    /// CloseIO of init's stdin (empty) or an exec's.
    pub(crate) async fn close_stdin(&self, exec_id: &str) -> Result<(), Status> {
        let request = CloseIoRequest {
            container_id: self.id.clone(),
            exec_id: exec_id.into(),
            stdin: true,
        };
        self.node.tasks().close_io(self.node.request(request)).await.map(drop)
    }

    /// Adds an exec.
    pub(crate) async fn exec(&self, exec_id: &str, arguments: &[&str]) -> Exec<'_, 'n> {
        self.try_exec(exec_id, process(arguments), false)
            .await
            .unwrap_or_else(|e| panic!("exec {exec_id} in {}: {e:?}", self.id))
    }

    /// Adds an exec with a process document.
    pub(crate) async fn try_exec(&self, exec_id: &str, process: Value, stdin: bool) -> Result<Exec<'_, 'n>, Status> {
        let terminal = process["terminal"] == json!(true);
        let io = Io::fifos(self.node, &format!("{}-{exec_id}", self.id), stdin, !terminal);
        let request = ExecProcessRequest {
            container_id: self.id.clone(),
            exec_id: exec_id.into(),
            stdin: io.stdin_path.clone(),
            stdout: io.stdout_path.clone(),
            stderr: io.stderr_path.clone(),
            terminal,
            spec: Some(Any {
                type_url: PROCESS_TYPE.into(),
                value: process.to_string().into_bytes(),
            }),
        };
        self.node.tasks().exec(self.node.request(request)).await?;
        Ok(Exec {
            task: self,
            id: exec_id.into(),
            io,
        })
    }

    /// Runs `sh -c <script>` in the container and gives its output; the exec is deleted.
    pub(crate) async fn ask(&self, exec_id: &str, script: &str) -> String {
        let exec = self.exec(exec_id, &["/bin/sh", "-c", script]).await;
        exec.start()
            .await
            .unwrap_or_else(|e| panic!("start exec {exec_id}: {e:?}"));
        let exit = exec.wait().await;
        exec.delete().await.expect("delete an exec that ended");
        let output = exec.io.stdout.text().await;
        assert_eq!(exit.status, 0, "{script}: {output}");
        output
    }

    /// Removes container and snapshot after the task was deleted, and the fifos.
    pub(crate) async fn forget(self) {
        let Self {
            node, id, io, chain, ..
        } = self;
        drop(io);
        if !chain {
            let request = DeleteContainerRequest { id };
            node.containers()
                .delete(node.request(request))
                .await
                .expect("delete the container");
            return;
        }
        node.forget(&id).await;
    }

    /// Kills what still runs, deletes the task, removes the rest; gives what Delete said.
    pub(crate) async fn end(self) -> DeleteResponse {
        if let Err(error) = self.kill_process("", libc::SIGKILL, true).await {
            assert_eq!(error.code(), Code::NotFound, "{error:?}");
        }
        self.wait().await;
        self.finish().await
    }

    /// Deletes a task that ended, removes the rest; gives what Delete said.
    pub(crate) async fn finish(self) -> DeleteResponse {
        let response = self
            .delete()
            .await
            .unwrap_or_else(|e| panic!("delete {}: {e:?}", self.id));
        self.forget().await;
        response
    }
}

/// A further process of a task.
pub(crate) struct Exec<'t, 'n> {
    task: &'t Task<'n>,
    pub(crate) id: String,
    pub(crate) io: Io,
}

impl Exec<'_, '_> {
    pub(crate) async fn start(&self) -> Result<u32, Status> {
        self.task.start_process(&self.id).await
    }

    pub(crate) async fn wait(&self) -> Exit {
        self.task
            .wait_for(&self.id)
            .await
            .unwrap_or_else(|e| panic!("wait for exec {}: {e:?}", self.id))
    }

    pub(crate) async fn kill(&self, signal: i32) -> Result<(), Status> {
        self.task.kill_process(&self.id, signal, false).await
    }

    pub(crate) async fn delete(&self) -> Result<DeleteResponse, Status> {
        let request = DeleteProcessRequest {
            container_id: self.task.id.clone(),
            exec_id: self.id.clone(),
        };
        let node = self.task.node;
        Ok(node.tasks().delete_process(node.request(request)).await?.into_inner())
    }
}

/// The client's side of a process's stdio. Dropping it removes the fifos.
pub(crate) struct Io {
    folder: PathBuf,
    pub(crate) stdin_path: String,
    pub(crate) stdout_path: String,
    pub(crate) stderr_path: String,
    pub(crate) stdout: Output,
    pub(crate) stderr: Output,
}

impl Drop for Io {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

impl Io {
    fn fifos(node: &Node, name: &str, stdin: bool, stderr: bool) -> Self {
        let folder = node.folder(name);
        let fifo = |name: &str| {
            let path = folder.join(name);
            nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).expect("a fifo");
            path.to_str().expect("UTF-8").to_string()
        };
        let (stdout_path, stderr_path) = (fifo("1"), if stderr { fifo("2") } else { String::new() });
        Self {
            stdin_path: if stdin { fifo("0") } else { String::new() },
            stdout: Output::read(&stdout_path),
            stderr: Output::read(&stderr_path),
            stdout_path,
            stderr_path,
            folder,
        }
    }

    fn uris(node: &Node, name: &str, stdout: &str, stderr: &str) -> Self {
        Self {
            folder: node.folder(name),
            stdin_path: String::new(),
            stdout: Output::read(""),
            stderr: Output::read(""),
            stdout_path: stdout.into(),
            stderr_path: stderr.into(),
        }
    }

    /// Opens stdin for writing; the shim holds the other end once the process was created.
    pub(crate) async fn stdin(&self) -> Stdin {
        let path = Path::new(&self.stdin_path).to_path_buf();
        Stdin(
            until("the shim opens stdin", async || {
                pipe::OpenOptions::new().open_sender(&path).ok()
            })
            .await,
        )
    }

    /// Stops reading, as a client that goes away.
    pub(crate) fn detach(&mut self) {
        self.stdout.detach();
        self.stderr.detach();
    }

    /// Reads again, from what comes next.
    pub(crate) fn attach(&mut self) {
        self.stdout = Output::read(&self.stdout_path);
        self.stderr = Output::read(&self.stderr_path);
    }
}

/// The writing end of a process's stdin.
pub(crate) struct Stdin(pipe::Sender);

impl Stdin {
    pub(crate) async fn write(&mut self, bytes: &[u8]) {
        let written = tokio::time::timeout(*RPC, self.0.write_all(bytes)).await;
        written.expect("stdin is read in time").expect("write to stdin");
    }
}

/// What a process wrote, as it arrives.
pub(crate) struct Output {
    bytes: Arc<Mutex<Vec<u8>>>,
    reader: tokio::task::JoinHandle<()>,
}

impl Drop for Output {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Output {
    /// Reads a fifo to its end: when its last writer has closed it. An empty path has ended already.
    fn read(path: &str) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let receiver = (!path.is_empty()).then(|| pipe::OpenOptions::new().open_receiver(path).expect("open a fifo"));
        let list = bytes.clone();
        let reader = tokio::spawn(async move {
            let Some(receiver) = receiver else { return };
            let mut buffer = vec![0; 64 * 1024];
            // Without a writer yet the fifo is not readable; after the last one has gone it reads as ended.
            while receiver.readable().await.is_ok() {
                match receiver.try_read(&mut buffer) {
                    Ok(0) => return,
                    Ok(count) => list.lock().unwrap().extend_from_slice(&buffer[..count]),
                    Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                    Err(e) => panic!("read a fifo: {e}"),
                }
            }
        });
        Self { bytes, reader }
    }

    /// Stops reading, as a client that goes away.
    pub(crate) fn detach(&self) {
        self.reader.abort();
    }

    /// What came so far.
    pub(crate) fn so_far(&self) -> String {
        String::from_utf8_lossy(&self.bytes.lock().unwrap()).into_owned()
    }

    /// Waits until `text` came.
    pub(crate) async fn until(&self, text: &str) {
        let end = std::time::Instant::now() + *SOON;
        while !self.so_far().contains(text) {
            assert!(std::time::Instant::now() < end, "no {text:?} in {:?}", self.so_far());
            tokio::time::sleep(pause()).await;
        }
    }

    /// Everything, once every writer has closed.
    pub(crate) async fn bytes(&self) -> Vec<u8> {
        until("the output ends", async || self.reader.is_finished().then_some(())).await;
        self.bytes.lock().unwrap().clone()
    }

    /// [`Output::bytes`] as text.
    pub(crate) async fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes().await).into_owned()
    }
}

/// An OCI process document.
pub(crate) fn process(arguments: &[&str]) -> Value {
    let capabilities = json!([
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FSETID",
        "CAP_FOWNER",
        "CAP_MKNOD",
        "CAP_NET_RAW",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETFCAP",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_CHROOT",
        "CAP_KILL",
        "CAP_AUDIT_WRITE"
    ]);
    json!({
        "terminal": false,
        "user": {"uid": 0, "gid": 0},
        "args": arguments,
        "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
        "cwd": "/",
        "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
        "noNewPrivileges": true,
    })
}

/// An OCI spec like the one that containerd's clients make.
pub(crate) fn spec(namespace: &str, id: &str, arguments: &[&str]) -> Value {
    let mount = |target: &str, kind: &str, options: &[&str]| json!({"destination": target, "type": kind, "source": kind, "options": options});
    json!({
        "ociVersion": "1.0.2",
        "process": process(arguments),
        "root": {"path": "rootfs"},
        "hostname": "test",
        "mounts": [
            mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/run", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        ],
        "linux": {
            "cgroupsPath": format!("/{namespace}/{id}"),
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}],
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}
