//! The Task service: decodes, spawns, encodes; decides nothing.
//!
//! The same handlers answer as `containerd.task.v2.Task` (containerd up to 1.7) and `containerd.task.v3.Task` (2.x): the messages
//! have the same shape. Whatever changes something runs in a task of its own, so that a client whose deadline passes, or whose
//! connection breaks, never leaves it half done.

use std::{collections::HashMap, future::Future, path::PathBuf, sync::Arc};

use async_trait::async_trait;
use containerd_shim_protos::{
    api,
    protobuf::{
        Message, MessageField,
        well_known_types::{any::Any, empty::Empty},
    },
    shim::oci,
    shim_async,
};
use ttrpc::r#async::{Service, TtrpcContext};

use super::events::timestamp;
use crate::{
    backend::{CheckpointOptions, ExecSpec, Exit},
    error::{Error, Kind},
    rootfs::Mount,
    task::{CreateRequest, Engine, RuntimeOptions, process::Phase, stdio},
};

/// The ttrpc services of a shim, by name.
pub fn services(engine: &Arc<Engine>) -> HashMap<String, Service> {
    let mut services = HashMap::new();
    for name in ["containerd.task.v2.Task", "containerd.task.v3.Task"] {
        let handlers = Arc::new(TaskService { engine: engine.clone() });
        // One generated service, under whatever name the crate gives it.
        services.extend(
            shim_async::create_task(handlers)
                .into_values()
                .map(|service| (name.to_owned(), service)),
        );
    }
    services
}

struct TaskService {
    engine: Arc<Engine>,
}

/// The ttrpc status that stands for an error: its code by kind, its text as a person reads it.
pub fn status(error: &Error) -> ttrpc::Error {
    let code = match error.kind() {
        Kind::InvalidArgument => ttrpc::Code::INVALID_ARGUMENT,
        Kind::NotFound => ttrpc::Code::NOT_FOUND,
        Kind::AlreadyExists => ttrpc::Code::ALREADY_EXISTS,
        Kind::FailedPrecondition => ttrpc::Code::FAILED_PRECONDITION,
        Kind::Unimplemented => ttrpc::Code::UNIMPLEMENTED,
        Kind::DeadlineExceeded => ttrpc::Code::DEADLINE_EXCEEDED,
        Kind::Unavailable => ttrpc::Code::UNAVAILABLE,
        Kind::PermissionDenied => ttrpc::Code::PERMISSION_DENIED,
        Kind::ResourceExhausted => ttrpc::Code::RESOURCE_EXHAUSTED,
        Kind::Aborted => ttrpc::Code::ABORTED,
        Kind::Unknown => ttrpc::Code::UNKNOWN,
    };
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, error))
}

/// Runs `work` to its end in a task of its own, whatever becomes of the caller.
async fn to_its_end<T: Send + 'static>(
    rpc: &'static str,
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> ttrpc::Result<T> {
    let done = tokio::spawn(async move {
        work.await.inspect_err(|e| match e.kind() {
            Kind::Unknown | Kind::DeadlineExceeded | Kind::ResourceExhausted => log::error!("{rpc}: {e}"),
            _ => log::debug!("{rpc}: {e}"),
        })
    });
    match done.await {
        Ok(result) => result.map_err(|e| status(&e)),
        Err(e) => Err(status(&Error::unknown(format!("{rpc} broke off")).with_source(e))),
    }
}

fn any(type_url: &str, value: Vec<u8>) -> MessageField<Any> {
    let mut any = Any::new();
    any.type_url = type_url.to_owned();
    any.value = value;
    MessageField::some(any)
}

fn delete_response(pid: u32, exit: Exit) -> api::DeleteResponse {
    let mut response = api::DeleteResponse::new();
    response.pid = pid;
    response.exit_status = exit.status;
    response.exited_at = MessageField::some(timestamp(exit.at));
    response
}

fn mount(mount: api::Mount) -> Mount {
    Mount {
        kind: mount.type_,
        source: mount.source,
        target: mount.target,
        options: mount.options,
    }
}

fn checkpoint_options(path: String, options: Option<Any>) -> Result<CheckpointOptions, Error> {
    let mut given = oci::CheckpointOptions::new();
    if let Some(any) = options.filter(|any| !any.value.is_empty()) {
        if !any.type_url.ends_with("containerd.runc.v1.CheckpointOptions") {
            return Err(Error::invalid(format!("unknown checkpoint options {}", any.type_url)));
        }
        given
            .merge_from_bytes(&any.value)
            .map_err(|e| Error::invalid("cannot decode containerd.runc.v1.CheckpointOptions").with_source(e))?;
    }
    let image_path = if path.is_empty() { given.image_path } else { path };
    // None: the backend has its own place for images, by option criu_image_path, or refuses.
    if !image_path.is_empty() && !image_path.starts_with('/') {
        return Err(Error::invalid(format!(
            "checkpoint path {image_path:?} is not absolute"
        )));
    }
    Ok(CheckpointOptions {
        image_path: image_path.into(),
        work_path: (!given.work_path.is_empty()).then(|| PathBuf::from(given.work_path)),
        exit: given.exit,
        open_tcp: given.open_tcp,
        external_unix_sockets: given.external_unix_sockets,
        terminal: given.terminal,
        file_locks: given.file_locks,
        cgroups_mode: given.cgroups_mode,
    })
}

fn state_response(request: api::StateRequest, state: crate::task::State) -> api::StateResponse {
    let mut response = api::StateResponse::new();
    response.bundle = state.bundle.display().to_string();
    response.pid = state.pid;
    response.status = match state.phase {
        Phase::Creating | Phase::Created | Phase::Starting => api::Status::CREATED,
        Phase::Running => api::Status::RUNNING,
        Phase::Pausing => api::Status::PAUSING,
        Phase::Paused => api::Status::PAUSED,
        Phase::Stopped | Phase::Deleting | Phase::Deleted => api::Status::STOPPED,
    }
    .into();
    response.stdin = state.stdio.stdin;
    response.stdout = state.stdio.stdout;
    response.stderr = state.stdio.stderr;
    response.terminal = state.stdio.terminal;
    if let Some(exit) = state.exit {
        response.exit_status = exit.status;
        response.exited_at = MessageField::some(timestamp(exit.at));
    }
    // The runc shim answers with the id of the process, and clients compare it.
    response.id = match request.exec_id.is_empty() {
        true => request.id,
        false => request.exec_id.clone(),
    };
    response.exec_id = request.exec_id;
    response
}

#[async_trait]
impl shim_async::Task for TaskService {
    async fn state(&self, _: &TtrpcContext, request: api::StateRequest) -> ttrpc::Result<api::StateResponse> {
        let task = self.engine.task(&request.id).map_err(|e| status(&e))?;
        let state = task.state(&request.exec_id).map_err(|e| status(&e))?;
        Ok(state_response(request, state))
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        mut request: api::CreateTaskRequest,
    ) -> ttrpc::Result<api::CreateTaskResponse> {
        let engine = self.engine.clone();
        to_its_end("create", async move {
            let request = CreateRequest {
                options: request
                    .options
                    .take()
                    .map_or_else(RuntimeOptions::default, |any| RuntimeOptions {
                        type_url: any.type_url,
                        value: any.value,
                    }),
                id: request.id,
                bundle: request.bundle.into(),
                rootfs: request.rootfs.into_iter().map(mount).collect(),
                stdio: stdio::Config {
                    stdin: request.stdin,
                    stdout: request.stdout,
                    stderr: request.stderr,
                    terminal: request.terminal,
                },
                checkpoint: request.checkpoint,
            };
            let mut response = api::CreateTaskResponse::new();
            response.pid = engine.create(request).await?;
            Ok(response)
        })
        .await
    }

    async fn start(&self, _: &TtrpcContext, request: api::StartRequest) -> ttrpc::Result<api::StartResponse> {
        let engine = self.engine.clone();
        to_its_end("start", async move {
            let mut response = api::StartResponse::new();
            response.pid = engine.task(&request.id)?.start(&request.exec_id).await?;
            Ok(response)
        })
        .await
    }

    async fn delete(&self, _: &TtrpcContext, request: api::DeleteRequest) -> ttrpc::Result<api::DeleteResponse> {
        let engine = self.engine.clone();
        to_its_end("delete", async move {
            let (pid, exit) = engine.delete(&request.id, &request.exec_id).await?;
            Ok(delete_response(pid, exit))
        })
        .await
    }

    async fn pids(&self, _: &TtrpcContext, request: api::PidsRequest) -> ttrpc::Result<api::PidsResponse> {
        let task = self.engine.task(&request.id).map_err(|e| status(&e))?;
        let mut response = api::PidsResponse::new();
        for (pid, exec_id) in task.pids() {
            let mut process = api::ProcessInfo::new();
            process.pid = pid;
            if let Some(exec_id) = exec_id {
                let mut details = oci::ProcessDetails::new();
                details.exec_id = exec_id;
                let value = details.write_to_bytes().map_err(|e| {
                    status(&Error::unknown("cannot encode containerd.runc.v1.ProcessDetails").with_source(e))
                })?;
                process.info = any("containerd.runc.v1.ProcessDetails", value);
            }
            response.processes.push(process);
        }
        Ok(response)
    }

    async fn pause(&self, _: &TtrpcContext, request: api::PauseRequest) -> ttrpc::Result<Empty> {
        let engine = self.engine.clone();
        to_its_end("pause", async move {
            engine.task(&request.id)?.pause().await.map(|()| Empty::new())
        })
        .await
    }

    async fn resume(&self, _: &TtrpcContext, request: api::ResumeRequest) -> ttrpc::Result<Empty> {
        let engine = self.engine.clone();
        to_its_end("resume", async move {
            engine.task(&request.id)?.resume().await.map(|()| Empty::new())
        })
        .await
    }

    async fn checkpoint(&self, _: &TtrpcContext, mut request: api::CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        let engine = self.engine.clone();
        to_its_end("checkpoint", async move {
            let options = checkpoint_options(request.path, request.options.take())?;
            engine.task(&request.id)?.checkpoint(&options).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> ttrpc::Result<Empty> {
        let engine = self.engine.clone();
        to_its_end("kill", async move {
            let task = engine.task(&request.id)?;
            task.kill(&request.exec_id, request.signal, request.all).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn exec(&self, _: &TtrpcContext, mut request: api::ExecProcessRequest) -> ttrpc::Result<Empty> {
        let added = || {
            let spec = ExecSpec {
                json: request.spec.take().map(|any| any.value).unwrap_or_default(),
                terminal: request.terminal,
            };
            let stdio = stdio::Config {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
            };
            self.engine.task(&request.id)?.exec(&request.exec_id, spec, stdio)
        };
        added().map(|()| Empty::new()).map_err(|e| status(&e))
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: api::ResizePtyRequest) -> ttrpc::Result<Empty> {
        let task = self.engine.task(&request.id).map_err(|e| status(&e))?;
        task.resize_pty(&request.exec_id, request.width, request.height)
            .map_err(|e| status(&e))?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: api::CloseIORequest) -> ttrpc::Result<Empty> {
        let task = self.engine.task(&request.id).map_err(|e| status(&e))?;
        if request.stdin {
            task.close_stdin(&request.exec_id).map_err(|e| status(&e))?;
        }
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, mut request: api::UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let engine = self.engine.clone();
        to_its_end("update", async move {
            let resources = request.resources.take().map(|any| any.value).unwrap_or_default();
            if resources.is_empty() {
                return Err(Error::invalid("update without resources"));
            }
            engine.task(&request.id)?.update(&resources).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn wait(&self, _: &TtrpcContext, request: api::WaitRequest) -> ttrpc::Result<api::WaitResponse> {
        // Changes nothing, so it may be dropped with its client.
        let task = self.engine.task(&request.id).map_err(|e| status(&e))?;
        let exit = task.wait(&request.exec_id).await.map_err(|e| status(&e))?;
        let mut response = api::WaitResponse::new();
        response.exit_status = exit.status;
        response.exited_at = MessageField::some(timestamp(exit.at));
        Ok(response)
    }

    async fn stats(&self, _: &TtrpcContext, request: api::StatsRequest) -> ttrpc::Result<api::StatsResponse> {
        let task = self.engine.task(&request.id).map_err(|e| status(&e))?;
        let metrics = task.stats().map_err(|e| status(&e))?;
        let mut response = api::StatsResponse::new();
        response.stats = any(metrics.type_url, metrics.value);
        Ok(response)
    }

    async fn connect(&self, _: &TtrpcContext, request: api::ConnectRequest) -> ttrpc::Result<api::ConnectResponse> {
        let mut response = api::ConnectResponse::new();
        response.shim_pid = std::process::id();
        response.task_pid = self.engine.connect(&request.id);
        response.version = env!("CARGO_PKG_VERSION").to_owned();
        Ok(response)
    }

    async fn shutdown(&self, _: &TtrpcContext, _: api::ShutdownRequest) -> ttrpc::Result<Empty> {
        self.engine.shutdown();
        Ok(Empty::new())
    }
}
