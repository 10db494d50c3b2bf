//! A pod and its containers through CRI, as kubelet would make them.

use std::{collections::HashMap, path::PathBuf};

use containerd_client::tonic::{Status, transport::Channel};
use k8s_cri::v1::{
    AttachRequest, Container, ContainerConfig, ContainerMetadata, ContainerState, ContainerStatsRequest,
    ContainerStatus, ContainerStatusRequest, CreateContainerRequest, DnsConfig, ExecRequest, ExecSyncRequest,
    ExecSyncResponse, ImageSpec, ImageStatusRequest, Int64Value, LinuxContainerConfig, LinuxContainerResources,
    LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, ListContainersRequest,
    NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata, PodSandboxState, PodSandboxStatus,
    PodSandboxStatusRequest, RemoveContainerRequest, RemovePodSandboxRequest, RunPodSandboxRequest,
    StartContainerRequest, StopContainerRequest, StopPodSandboxRequest, UpdateContainerResourcesRequest,
    image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient,
};

use super::{
    image,
    node::{Node, until},
    universe, websocket,
};

/// The name of the handler (a RuntimeClass's) that selects the runtime under test.
pub(crate) const HANDLER: &str = "lxcri";

impl Node {
    /// CRI's runtime service.
    pub(crate) fn cri(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel())
    }

    /// The configuration of a pod with namespaces of its own.
    pub(crate) fn pod_config(&self, name: &str) -> PodSandboxConfig {
        PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.into(),
                uid: format!("{name}-{}", self.namespace),
                namespace: "default".into(),
                attempt: 0,
            }),
            hostname: name.into(),
            log_directory: self.folder(name).to_string_lossy().into_owned(),
            dns_config: Some(DnsConfig {
                servers: vec!["127.0.0.1".into()],
                ..DnsConfig::default()
            }),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: match universe::by_systemd() {
                    true => format!("{}.slice", self.namespace),
                    false => format!("/{}", self.namespace),
                },
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces(NamespaceMode::Container)),
                    ..LinuxSandboxSecurityContext::default()
                }),
                ..LinuxPodSandboxConfig::default()
            }),
            ..PodSandboxConfig::default()
        }
    }

    /// Runs a pod on the runtime under test.
    pub(crate) async fn pod(&self, name: &str) -> Pod<'_> {
        self.pod_with(HANDLER, self.pod_config(name))
            .await
            .unwrap_or_else(|e| panic!("run pod {name}: {e:?}"))
    }

    /// Runs a pod on the runtime that `handler` names.
    pub(crate) async fn pod_with(&self, handler: &str, config: PodSandboxConfig) -> Result<Pod<'_>, Status> {
        let request = RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: handler.into(),
        };
        let id = self
            .cri()
            .run_pod_sandbox(self.request(request))
            .await?
            .into_inner()
            .pod_sandbox_id;
        Ok(Pod {
            node: self,
            id,
            logs: PathBuf::from(&config.log_directory),
            config,
        })
    }
}

/// Namespaces of a pod: network and ipc of its own, pid as said.
pub(crate) fn namespaces(pid: NamespaceMode) -> NamespaceOption {
    NamespaceOption {
        network: NamespaceMode::Pod.into(),
        pid: pid.into(),
        ipc: NamespaceMode::Pod.into(),
        ..NamespaceOption::default()
    }
}

/// Waits until CRI knows the images, and runs a first pod with a container, which makes folders, cgroups and a bridge that stay for the next ones.
pub(crate) async fn warm_up(node: &Node) {
    for name in [image::BUSYBOX, image::PAUSE] {
        until("CRI knows the images", async || {
            let request = ImageStatusRequest {
                image: Some(ImageSpec {
                    image: name.into(),
                    ..ImageSpec::default()
                }),
                verbose: false,
            };
            let mut images = ImageServiceClient::new(node.channel());
            images
                .image_status(node.request(request))
                .await
                .ok()?
                .into_inner()
                .image
                .map(drop)
        })
        .await;
    }
    // Whether it runs is not the question here; a test will ask it.
    if let Ok(pod) = node.pod_with(HANDLER, node.pod_config("first")).await {
        let _ = pod.create(pod.container_config("first", &["true"])).await;
        pod.remove().await;
    }
}

/// A running pod. Ends with [`Pod::remove`].
pub(crate) struct Pod<'n> {
    node: &'n Node,
    /// The sandbox's id.
    pub(crate) id: String,
    /// Where its containers' logs are.
    pub(crate) logs: PathBuf,
    /// As it was run.
    pub(crate) config: PodSandboxConfig,
}

impl<'n> Pod<'n> {
    /// The configuration of a container that runs `arguments`.
    pub(crate) fn container_config(&self, name: &str, arguments: &[&str]) -> ContainerConfig {
        ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: name.into(),
                attempt: 0,
            }),
            image: Some(ImageSpec {
                image: image::BUSYBOX.into(),
                ..ImageSpec::default()
            }),
            command: arguments.iter().map(|argument| argument.to_string()).collect(),
            log_path: format!("{name}.log"),
            linux: Some(LinuxContainerConfig {
                resources: Some(LinuxContainerResources::default()),
                security_context: Some(LinuxContainerSecurityContext {
                    namespace_options: self
                        .config
                        .linux
                        .as_ref()
                        .and_then(|linux| linux.security_context.as_ref())
                        .and_then(|context| context.namespace_options.clone()),
                    ..LinuxContainerSecurityContext::default()
                }),
            }),
            ..ContainerConfig::default()
        }
    }

    /// CreateContainer.
    pub(crate) async fn create(&self, config: ContainerConfig) -> Result<PodContainer<'n>, Status> {
        let request = CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config.clone()),
            sandbox_config: Some(self.config.clone()),
        };
        let response = self.node.cri().create_container(self.node.request(request)).await?;
        Ok(PodContainer {
            node: self.node,
            id: response.into_inner().container_id,
            log: self.logs.join(&config.log_path),
        })
    }

    /// Creates and starts a container that runs `sh -c <script>`.
    pub(crate) async fn sh(&self, name: &str, script: &str) -> PodContainer<'n> {
        self.start(self.container_config(name, &["/bin/sh", "-c", script]))
            .await
    }

    /// Creates and starts a container.
    pub(crate) async fn start(&self, config: ContainerConfig) -> PodContainer<'n> {
        let name = config.log_path.clone();
        let container = self
            .create(config)
            .await
            .unwrap_or_else(|e| panic!("create container {name}: {e:?}"));
        container
            .start()
            .await
            .unwrap_or_else(|e| panic!("start container {name}: {e:?}"));
        container
    }

    /// PodSandboxStatus.
    pub(crate) async fn status(&self) -> PodSandboxStatus {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: self.id.clone(),
            verbose: false,
        };
        let response = self.node.cri().pod_sandbox_status(self.node.request(request)).await;
        response
            .unwrap_or_else(|e| panic!("status of pod {}: {e:?}", self.id))
            .into_inner()
            .status
            .expect("a status")
    }

    /// Whether the sandbox is ready.
    pub(crate) async fn is_ready(&self) -> bool {
        self.status().await.state() == PodSandboxState::SandboxReady
    }

    /// Ids of the containers that CRI lists for this pod.
    pub(crate) async fn containers(&self) -> Vec<Container> {
        let response = self
            .node
            .cri()
            .list_containers(self.node.request(ListContainersRequest::default()))
            .await;
        let mut containers = response.expect("list containers").into_inner().containers;
        containers.retain(|container| container.pod_sandbox_id == self.id);
        containers
    }

    /// StopPodSandbox; idempotent.
    pub(crate) async fn stop(&self) {
        let request = StopPodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
        };
        let response = self.node.cri().stop_pod_sandbox(self.node.request(request)).await;
        response.unwrap_or_else(|e| panic!("stop pod {}: {e:?}", self.id));
    }

    /// StopPodSandbox, RemovePodSandbox (which removes the containers too), and the logs.
    pub(crate) async fn remove(self) {
        self.stop().await;
        let request = RemovePodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
        };
        let response = self.node.cri().remove_pod_sandbox(self.node.request(request)).await;
        response.unwrap_or_else(|e| panic!("remove pod {}: {e:?}", self.id));
        let _ = std::fs::remove_dir_all(&self.logs);
    }
}

/// A container of a pod; removed with it.
pub(crate) struct PodContainer<'n> {
    node: &'n Node,
    /// Its id.
    pub(crate) id: String,
    log: PathBuf,
}

impl PodContainer<'_> {
    /// StartContainer.
    pub(crate) async fn start(&self) -> Result<(), Status> {
        let request = StartContainerRequest {
            container_id: self.id.clone(),
        };
        self.node
            .cri()
            .start_container(self.node.request(request))
            .await
            .map(drop)
    }

    /// ContainerStatus.
    pub(crate) async fn status(&self) -> ContainerStatus {
        let request = ContainerStatusRequest {
            container_id: self.id.clone(),
            verbose: false,
        };
        let response = self.node.cri().container_status(self.node.request(request)).await;
        response
            .unwrap_or_else(|e| panic!("status of container {}: {e:?}", self.id))
            .into_inner()
            .status
            .expect("a status")
    }

    /// Waits until it has exited.
    pub(crate) async fn exited(&self) -> ContainerStatus {
        until("the container exits", async || {
            let status = self.status().await;
            (status.state() == ContainerState::ContainerExited).then_some(status)
        })
        .await
    }

    /// The lines of its log: (stream, "F" or "P", text).
    pub(crate) fn log(&self) -> Vec<(String, String, String)> {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let mut lines = Vec::new();
        for line in text.lines() {
            // <time> <stream> <tag> <text>
            let mut fields = line.splitn(4, ' ').skip(1).map(str::to_string);
            let (Some(stream), Some(tag), Some(text)) = (fields.next(), fields.next(), fields.next()) else {
                panic!("not a line of a CRI log: {line:?}");
            };
            lines.push((stream, tag, text));
        }
        lines
    }

    /// Waits until a line of its log has this text.
    pub(crate) async fn logs(&self, text: &str) {
        until(&format!("the log says {text:?}"), async || {
            let raw = std::fs::read_to_string(&self.log).unwrap_or_default();
            // The last line may be half-written.
            raw.lines().any(|line| line.ends_with(text)).then_some(())
        })
        .await;
    }

    /// ExecSync of `sh -c <script>`; `timeout_seconds` 0 is none.
    pub(crate) async fn exec_sync(&self, script: &str, timeout_seconds: i64) -> Result<ExecSyncResponse, Status> {
        let request = ExecSyncRequest {
            container_id: self.id.clone(),
            cmd: vec!["/bin/sh".into(), "-c".into(), script.into()],
            timeout: timeout_seconds,
        };
        Ok(self
            .node
            .cri()
            .exec_sync(self.node.request(request))
            .await?
            .into_inner())
    }

    /// The output of a script that succeeds.
    pub(crate) async fn ask(&self, script: &str) -> String {
        let response = self
            .exec_sync(script, 0)
            .await
            .unwrap_or_else(|e| panic!("{script}: {e:?}"));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert_eq!(response.exit_code, 0, "{script}: {}", text(&response.stderr));
        text(&response.stdout)
    }

    /// Exec with stdin and stdout (and stderr without a terminal), as a stream.
    pub(crate) async fn exec(&self, command: &[&str], tty: bool) -> websocket::Stream {
        let request = ExecRequest {
            container_id: self.id.clone(),
            cmd: command.iter().map(|word| word.to_string()).collect(),
            tty,
            stdin: true,
            stdout: true,
            stderr: !tty,
        };
        let url = self
            .node
            .cri()
            .exec(self.node.request(request))
            .await
            .expect("exec")
            .into_inner()
            .url;
        open(url).await
    }

    /// Attach with stdin and stdout, as a stream.
    pub(crate) async fn attach(&self, tty: bool) -> websocket::Stream {
        let request = AttachRequest {
            container_id: self.id.clone(),
            stdin: true,
            tty,
            stdout: true,
            stderr: !tty,
        };
        let url = self
            .node
            .cri()
            .attach(self.node.request(request))
            .await
            .expect("attach")
            .into_inner()
            .url;
        open(url).await
    }

    /// ContainerStats: CPU in nanoseconds and memory's working set in bytes.
    pub(crate) async fn stats(&self) -> Option<(u64, u64)> {
        let request = ContainerStatsRequest {
            container_id: self.id.clone(),
        };
        let stats = self
            .node
            .cri()
            .container_stats(self.node.request(request))
            .await
            .expect("stats")
            .into_inner()
            .stats?;
        let cpu = stats.cpu?.usage_core_nano_seconds?.value;
        Some((cpu, stats.memory?.working_set_bytes?.value))
    }

    /// UpdateContainerResources.
    pub(crate) async fn update(&self, resources: LinuxContainerResources) -> Result<(), Status> {
        let request = UpdateContainerResourcesRequest {
            container_id: self.id.clone(),
            linux: Some(resources),
            annotations: HashMap::new(),
            ..UpdateContainerResourcesRequest::default()
        };
        self.node
            .cri()
            .update_container_resources(self.node.request(request))
            .await
            .map(drop)
    }

    /// StopContainer, with a grace period; idempotent.
    pub(crate) async fn stop(&self, grace_seconds: i64) {
        let request = StopContainerRequest {
            container_id: self.id.clone(),
            timeout: grace_seconds,
        };
        let response = self.node.cri().stop_container(self.node.request(request)).await;
        response.unwrap_or_else(|e| panic!("stop container {}: {e:?}", self.id));
    }

    /// RemoveContainer.
    pub(crate) async fn remove(self) {
        let request = RemoveContainerRequest {
            container_id: self.id.clone(),
        };
        let response = self.node.cri().remove_container(self.node.request(request)).await;
        response.unwrap_or_else(|e| panic!("remove container {}: {e:?}", self.id));
    }
}

async fn open(url: String) -> websocket::Stream {
    let opened = tokio::task::spawn_blocking(move || websocket::Stream::open(&url)).await;
    opened.expect("no panic").expect("open the stream")
}

/// A user id for a security context.
pub(crate) fn user(id: i64) -> Option<Int64Value> {
    Some(Int64Value { value: id })
}
