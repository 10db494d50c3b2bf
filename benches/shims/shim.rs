//! A shim, driven as containerd 1.6 drives it: `start` with the bundle as working folder, then the Task service over ttrpc.

use std::{
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use containerd_shim_protos::{
    api::{
        ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse, DeleteRequest, DeleteResponse, Empty,
        ExecProcessRequest, KillRequest, ShutdownRequest, StartRequest, StartResponse,
    },
    protobuf::{Message, well_known_types::any::Any},
    shim::oci,
    shim_async::Client,
    ttrpc::proto::{KeyValue, Request},
};
use proxmox_lxcri::{
    config::proto::runtimeoptions,
    error::{Error, Result},
};

use crate::{
    bundle::{self, Bundle},
    candidate::Candidate,
    fifo::{self, Output},
    process::{self, PATIENCE, Process},
    run::Bench,
};

/// containerd's namespace of everything here.
const NAMESPACE: &str = "bench";

/// A running shim.
pub(crate) struct Shim {
    client: Client,
    service: String,
    pid: u32,
    process: Process,
    options: Any,
    log: Output,
    /// From the spawn of `start` to its end.
    pub(crate) start_command: Duration,
    /// Before the spawn of `start`.
    pub(crate) begin: Instant,
    /// From the spawn of `start` to the answer of the first RPC: only then can it be used.
    pub(crate) usable: Duration,
}

/// The fifos of one process, and what reads them.
pub(crate) struct Io {
    stdin: PathBuf,
    stdout: PathBuf,
    stderr: PathBuf,
    /// Standard output, unless somebody else reads it.
    pub(crate) output: Option<Output>,
    /// Standard error.
    _errors: Output,
}

impl Io {
    /// Fifos named after `name` in the bundle; stdin is not used. `read` says whether stdout is read here.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn new(bundle: &Bundle, name: &str, read: bool) -> Result<Self> {
        let stdout = fifo::make(bundle.path.join(format!("{name}.stdout")))?;
        let stderr = fifo::make(bundle.path.join(format!("{name}.stderr")))?;
        Ok(Self {
            stdin: PathBuf::new(),
            output: read.then(|| Output::new(&stdout)).transpose()?,
            _errors: Output::new(&stderr)?,
            stdout,
            stderr,
        })
    }

    /// Adds a stdin.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn with_stdin(mut self, bundle: &Bundle, name: &str) -> Result<Self> {
        self.stdin = fifo::make(bundle.path.join(format!("{name}.stdin")))?;
        Ok(self)
    }

    /// Path of the fifo for standard input.
    pub(crate) fn stdin(&self) -> &Path {
        &self.stdin
    }

    /// Path of the fifo for standard output.
    pub(crate) fn stdout(&self) -> &Path {
        &self.stdout
    }

    /// When the first byte of standard output arrived.
    ///
    /// # Errors
    /// As [`Output::first`].
    pub(crate) async fn first(&self) -> Result<Instant> {
        match &self.output {
            Some(output) => output.first().await,
            None => Err(Error::unknown("nobody reads this output")),
        }
    }
}

impl Shim {
    /// Starts the shim of a bundle's pod, or finds the one that runs already, and asks it who it is.
    ///
    /// # Errors
    /// When `start` fails or answers nonsense, or the shim does not answer.
    pub(crate) async fn start(bench: &Bench, candidate: Candidate, bundle: &Bundle) -> Result<Self> {
        let containerd = bench.stage.scratch.join("containerd.sock");
        let options = options(bench, candidate);
        let log = Output::new(&fifo::make(bundle.path.join("log"))?)?;
        let mut command = Command::new(bench.shim(candidate));
        command
            .args(["-namespace", NAMESPACE, "-id", &bundle.id, "-address"])
            .arg(&containerd)
            .args(["-publish-binary", "/bin/true", "start"])
            .current_dir(&bundle.path)
            .env("GOMAXPROCS", "2")
            .env("MAX_SHIM_VERSION", "2")
            .env("TTRPC_ADDRESS", &bench.events_socket)
            .env("GRPC_ADDRESS", &containerd)
            .env("NAMESPACE", NAMESPACE)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        let stdin = options
            .write_to_bytes()
            .map_err(|e| Error::unknown("cannot encode the options").with_source(e))?;
        let started = process::run(command, stdin).await.map_err(|e| with_log(e, &log))?;
        let (address, version) = answer(&started.stdout)?;
        let service = format!("containerd.task.v{version}.Task");
        let client = Client::connect(&address)
            .await
            .map_err(|e| Error::unavailable(format!("cannot connect to {address}")).with_source(e))?;
        let connect = ConnectRequest {
            id: bundle.id.clone(),
            ..Default::default()
        };
        let connected: ConnectResponse = call(&client, &service, "Connect", &connect)
            .await
            .map_err(|e| with_log(e, &log))?;
        let usable = started.begin.elapsed();
        let pid = connected.shim_pid();
        Ok(Self {
            client,
            service,
            process: Process::open(pid)?,
            pid,
            options,
            log,
            start_command: started.took(),
            begin: started.begin,
            usable,
        })
    }

    /// Its pid.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Task.Create.
    ///
    /// # Errors
    /// The shim's.
    pub(crate) async fn create(&self, bundle: &Bundle, io: &Io) -> Result<()> {
        let request = CreateTaskRequest {
            id: bundle.id.clone(),
            bundle: text(&bundle.path),
            stdin: text(&io.stdin),
            stdout: text(&io.stdout),
            stderr: text(&io.stderr),
            options: Some(self.options.clone()).into(),
            ..Default::default()
        };
        self.call::<_, CreateTaskResponse>("Create", &request).await.map(|_| ())
    }

    /// Task.Start of init (`exec_id` empty) or of an exec.
    ///
    /// # Errors
    /// The shim's.
    pub(crate) async fn start_process(&self, id: &str, exec_id: &str) -> Result<()> {
        let request = StartRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.call::<_, StartResponse>("Start", &request).await.map(|_| ())
    }

    /// Task.Exec: adds a process, does not run it.
    ///
    /// # Errors
    /// The shim's.
    pub(crate) async fn exec(&self, id: &str, exec_id: &str, args: &[&str], io: &Io) -> Result<()> {
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
            value: bundle::process(args).to_string().into_bytes(),
            ..Default::default()
        };
        let request = ExecProcessRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            stdin: text(&io.stdin),
            stdout: text(&io.stdout),
            stderr: text(&io.stderr),
            spec: Some(spec).into(),
            ..Default::default()
        };
        self.call::<_, Empty>("Exec", &request).await.map(|_| ())
    }

    /// Task.Kill of init with SIGKILL.
    ///
    /// # Errors
    /// The shim's.
    pub(crate) async fn kill(&self, id: &str) -> Result<()> {
        let request = KillRequest {
            id: id.into(),
            signal: libc::SIGKILL.cast_unsigned(),
            ..Default::default()
        };
        self.call::<_, Empty>("Kill", &request).await.map(|_| ())
    }

    /// Task.Delete of init (`exec_id` empty) or of an exec; answers its exit status.
    ///
    /// # Errors
    /// The shim's.
    pub(crate) async fn delete(&self, id: &str, exec_id: &str) -> Result<u32> {
        let request = DeleteRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.call::<_, DeleteResponse>("Delete", &request)
            .await
            .map(|response| response.exit_status())
    }

    /// Kills and deletes a container.
    ///
    /// # Errors
    /// The shim's.
    pub(crate) async fn end(&self, bench: &Bench, id: &str) -> Result<()> {
        self.kill(id).await?;
        bench.events.exit(id, id).await?;
        self.delete(id, "").await.map(|_| ())
    }

    /// Task.Shutdown, as containerd does after the last container's Delete; returns when the process is gone.
    ///
    /// # Errors
    /// `DeadlineExceeded` when it stays.
    pub(crate) async fn shutdown(self, id: &str) -> Result<()> {
        let request = ShutdownRequest {
            id: id.into(),
            ..Default::default()
        };
        // A shim may be gone before its answer is sent.
        let _ = call::<_, Empty>(&self.client, &self.service, "Shutdown", &request).await;
        let gone = self.process.gone().await.map(|_| ());
        gone.map_err(|e| with_log(e.context(format!("shim {} ignores Shutdown", self.pid)), &self.log))
    }

    async fn call<Q: Message, R: Message>(&self, method: &str, request: &Q) -> Result<R> {
        let answer = call(&self.client, &self.service, method, request).await;
        answer.map_err(|e| with_log(e, &self.log))
    }
}

async fn call<Q: Message, R: Message>(client: &Client, service: &str, method: &str, request: &Q) -> Result<R> {
    let failed =
        |e: Box<dyn std::error::Error + Send + Sync>| Error::unknown(format!("{method} failed")).with_source(e);
    let namespace = KeyValue {
        key: "containerd-namespace-ttrpc".into(),
        value: NAMESPACE.into(),
        ..Default::default()
    };
    let request = Request {
        service: service.into(),
        method: method.into(),
        payload: request.write_to_bytes().map_err(|e| failed(e.into()))?,
        timeout_nano: i64::try_from(PATIENCE.as_nanos()).unwrap_or(i64::MAX),
        metadata: vec![namespace],
        ..Default::default()
    };
    let response = client.request(request).await.map_err(|e| failed(e.into()))?;
    R::parse_from_bytes(&response.payload).map_err(|e| failed(e.into()))
}

fn with_log(e: Error, log: &Output) -> Error {
    match log.tail() {
        tail if tail.is_empty() => e,
        tail => e.context(format!("the shim's log ends with {tail:?}")),
    }
}

/// What `start` printed: the plain address, or JSON with the version of the task service.
fn answer(stdout: &str) -> Result<(String, u32)> {
    let stdout = stdout.trim();
    if stdout.starts_with("unix://") {
        return Ok((stdout.into(), 2));
    }
    let nonsense = || Error::unknown(format!("start answered {stdout:?}, which is no address"));
    let json: serde_json::Value = serde_json::from_str(stdout).map_err(|e| nonsense().with_source(e))?;
    let address = json["address"].as_str().ok_or_else(nonsense)?;
    let version = json["version"].as_u64().unwrap_or(2);
    Ok((address.into(), u32::try_from(version).unwrap_or(2)))
}

/// Every candidate keeps its state inside the scratch folder.
fn options(bench: &Bench, candidate: Candidate) -> Any {
    let state = text(&bench.stage.scratch.join(candidate.key()));
    let (type_url, value) = match candidate {
        Candidate::OursLxc => {
            let options = runtimeoptions::Options {
                config_body: format!("backend = \"lxc\"\nlxc_path = {state:?}\n").into_bytes(),
                ..Default::default()
            };
            ("runtimeoptions.v1.Options", prost::Message::encode_to_vec(&options))
        }
        _ => {
            let runtime = if candidate == Candidate::GoRunc { "runc" } else { "crun" };
            let options = oci::Options {
                binary_name: runtime.into(),
                root: state,
                ..Default::default()
            };
            // All shims understand them.
            (
                "containerd.runc.v1.Options",
                options.write_to_bytes().unwrap_or_default(),
            )
        }
    };
    Any {
        type_url: type_url.into(),
        value,
        ..Default::default()
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
