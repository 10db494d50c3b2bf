//! Pods under a real containerd, through CRI, as kubelet would run them.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests fail by panicking")]

mod support;

use containerd_client::tonic::Code;
use k8s_cri::v1::{ContainerMetadata, ContainerState, LinuxContainerResources, NamespaceMode};

use support::{
    Node, backend,
    cri::{HANDLER, namespaces, user},
    cri_node, leaks, until,
    websocket::{RESIZE, STATUS, STDERR, STDIN, STDOUT},
};

#[test]
fn a_pod_of_two_containers_has_one_shim_and_one_network() {
    cri_node(async |node| {
        let pod = node.pod("pair").await;
        assert!(pod.is_ready().await);
        let status = pod.status().await;
        assert_eq!(status.runtime_handler, HANDLER);
        let address = status.network.unwrap().ip;
        assert!(!address.is_empty());
        let web = pod.sh("web", "echo up; exec sleep 1000").await;
        let side = pod.sh("side", "echo beside >&2; exec sleep 1000").await;
        assert_eq!(node.shims().len(), 1, "one shim per pod");
        for container in [&web, &side] {
            assert_eq!(container.status().await.state(), ContainerState::ContainerRunning);
            assert!(container.ask("ip -4 address show eth0").await.contains(&address));
            assert_eq!(container.ask("hostname").await, "pair\n");
        }
        let links = "for ns in net ipc uts; do readlink /proc/self/ns/$ns; done";
        assert_eq!(web.ask(links).await, side.ask(links).await);
        let own = "for ns in pid mnt; do readlink /proc/self/ns/$ns; done";
        assert_ne!(web.ask(own).await, side.ask(own).await);
        web.logs("stdout F up").await;
        side.logs("stderr F beside").await;
        assert_eq!(pod.containers().await.len(), 2);
        pod.remove().await;
    });
}

#[test]
fn a_log_has_every_line_of_both_streams() {
    cri_node(async |node| {
        let pod = node.pod("logs").await;
        let script = "i=0; while [ $i -lt 500 ]; do echo out $i; echo err $i >&2; i=$((i+1)); done; printf end";
        let container = pod.sh("talk", script).await;
        assert_eq!(container.exited().await.exit_code, 0);
        until("the log is complete", async || {
            (container.log().len() == 1001).then_some(())
        })
        .await;
        let log = container.log();
        for stream in ["out", "err"] {
            let lines: Vec<&str> = log
                .iter()
                .filter(|line| line.0 == format!("std{stream}") && line.1 == "F")
                .map(|line| line.2.as_str())
                .collect();
            let expected: Vec<String> = (0..500).map(|number| format!("{stream} {number}")).collect();
            assert!(
                lines.starts_with(&expected.iter().map(String::as_str).collect::<Vec<_>>()),
                "{stream}"
            );
        }
        assert!(
            log.iter().any(|line| line.2 == "end"),
            "what has no line end is there too"
        );
        pod.remove().await;
    });
}

#[test]
fn exec_sync_gives_output_and_status_and_keeps_its_timeout() {
    cri_node(async |node| {
        let pod = node.pod("exec").await;
        let container = pod.sh("main", "exec sleep 1000").await;
        let response = container.exec_sync("echo out; echo err >&2; exit 7", 0).await.unwrap();
        assert_eq!(response.exit_code, 7);
        assert_eq!(
            (response.stdout.as_slice(), response.stderr.as_slice()),
            (b"out\n".as_slice(), b"err\n".as_slice())
        );
        let error = container.exec_sync("exec sleep 999", 1).await.unwrap_err();
        assert_eq!(error.code(), Code::DeadlineExceeded, "{error:?}");
        until("what took too long was killed", async || {
            let runs = leaks::processes().iter().any(|process| process.command == "sleep 999");
            (!runs).then_some(())
        })
        .await;
        assert_eq!(container.ask("echo alive").await, "alive\n");
        let megabyte = container
            .exec_sync("head -c 1000000 /dev/zero | tr '\\0' x", 0)
            .await
            .unwrap();
        assert_eq!(megabyte.stdout.len(), 1_000_000);
        pod.remove().await;
    });
}

#[test]
fn exec_streams_both_ways_with_and_without_a_terminal() {
    cri_node(async |node| {
        let pod = node.pod("stream").await;
        let container = pod.sh("main", "exec sleep 1000").await;

        let mut stream = container
            .exec(&["sh", "-c", "read word; echo got $word; echo bad >&2; exit 4"], false)
            .await;
        let stream = tokio::task::spawn_blocking(move || {
            stream.send(STDIN, b"hello\n").unwrap();
            let (mut out, mut err, mut status) = (String::new(), String::new(), String::new());
            while let Some((channel, bytes)) = stream.receive().unwrap() {
                let text = String::from_utf8_lossy(&bytes);
                match channel {
                    STDOUT => out.push_str(&text),
                    STDERR => err.push_str(&text),
                    STATUS => status.push_str(&text),
                    other => panic!("channel {other}: {text}"),
                }
            }
            (out, err, status)
        });
        let (out, err, status) = stream.await.unwrap();
        assert_eq!((out.as_str(), err.as_str()), ("got hello\n", "bad\n"));
        let status: serde_json::Value = serde_json::from_str(&status).unwrap();
        assert_eq!(status["details"]["causes"][0]["message"], "4", "{status}");

        let mut terminal = container.exec(&["sh"], true).await;
        tokio::task::spawn_blocking(move || {
            terminal.send(STDIN, b"tty\n").unwrap();
            terminal.until(STDOUT, "/dev/pts/").unwrap();
            terminal.send(RESIZE, br#"{"Width":123,"Height":45}"#).unwrap();
            let wait = b"while [ \"$(stty size)\" != '45 123' ]; do :; done; echo si''zed\n";
            terminal.send(STDIN, wait).unwrap();
            terminal.until(STDOUT, "sized").unwrap();
            terminal.send(STDIN, b"exit\n").unwrap();
            while terminal.receive().unwrap().is_some() {}
        })
        .await
        .unwrap();
        pod.remove().await;
    });
}

#[test]
fn attach_reaches_the_container_itself_and_may_leave_and_return() {
    cri_node(async |node| {
        let pod = node.pod("attach").await;
        let mut config = pod.container_config(
            "main",
            &["sh", "-c", "while read line; do echo got $line; done; exit 3"],
        );
        config.stdin = true;
        let container = pod.start(config).await;
        for word in ["one", "two"] {
            let mut stream = container.attach(false).await;
            tokio::task::spawn_blocking(move || {
                stream.send(STDIN, format!("{word}\n").as_bytes()).unwrap();
                stream.until(STDOUT, &format!("got {word}\n")).unwrap();
            })
            .await
            .unwrap();
        }
        container.logs("stdout F got one").await;
        container.logs("stdout F got two").await;
        assert_eq!(container.status().await.state(), ContainerState::ContainerRunning);
        pod.remove().await;
    });
}

#[test]
fn stats_have_numbers_and_limits_can_be_updated() {
    cri_node(async |node| {
        let pod = node.pod("stats").await;
        let container = pod
            .sh(
                "main",
                "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; exec sleep 1000",
            )
            .await;
        until("its stats come", async || {
            let (cpu, memory) = container.stats().await?;
            (cpu > 0 && memory > 0).then_some(())
        })
        .await;
        let resources = LinuxContainerResources {
            memory_limit_in_bytes: 48 << 20,
            cpu_quota: 25_000,
            cpu_period: 100_000,
            ..LinuxContainerResources::default()
        };
        container.update(resources).await.unwrap();
        let found = support::universe::cgroups_named(&container.id);
        // What holds for the processes is the least of all that they are in.
        let limit = found.iter().filter_map(|cgroup| {
            let read = |file| std::fs::read_to_string(cgroup.join(file)).ok();
            let text = read("memory.limit_in_bytes").or_else(|| read("memory.max"))?;
            text.trim().parse::<u64>().ok()
        });
        assert_eq!(limit.min(), Some(48 << 20), "{found:?}");
        pod.remove().await;
    });
}

#[test]
fn a_stop_waits_for_the_grace_period_and_then_kills() {
    cri_node(async |node| {
        let pod = node.pod("stop").await;
        let polite = pod
            .sh("polite", "trap 'exit 5' TERM; echo ready; while :; do sleep 0.01; done")
            .await;
        let deaf = pod
            .sh("deaf", "trap '' TERM; echo ready; while :; do sleep 0.01; done")
            .await;
        polite.logs("ready").await;
        deaf.logs("ready").await;
        polite.stop(30).await;
        assert_eq!(polite.exited().await.exit_code, 5);
        deaf.stop(1).await;
        assert_eq!(deaf.exited().await.exit_code, 137);
        // Both are idempotent.
        deaf.stop(1).await;
        pod.stop().await;
        pod.stop().await;
        assert!(!pod.is_ready().await);
        pod.remove().await;
        until("its shim ended", async || node.shims().is_empty().then_some(())).await;
    });
}

#[test]
fn a_container_that_crashes_leaves_its_pod_and_can_be_made_again() {
    cri_node(async |node| {
        let pod = node.pod("crash").await;
        let other = pod.sh("other", "exec sleep 1000").await;
        let crashed = pod.sh("main", "echo dying; sleep 0.2; exit 3").await;
        let status = crashed.exited().await;
        assert_eq!((status.exit_code, status.reason.as_str()), (3, "Error"));
        assert!(status.finished_at >= status.started_at);
        assert!(pod.is_ready().await);
        assert_eq!(other.status().await.state(), ContainerState::ContainerRunning);
        crashed.remove().await;
        let mut again = pod.container_config("main", &["sh", "-c", "echo again; exec sleep 1000"]);
        again.metadata = Some(ContainerMetadata {
            name: "main".into(),
            attempt: 1,
        });
        again.log_path = "main-1.log".into();
        let again = pod.start(again).await;
        again.logs("again").await;
        assert_eq!(node.shims().len(), 1);
        pod.remove().await;
    });
}

#[test]
fn a_container_that_runs_out_of_memory_says_so() {
    cri_node(async |node| {
        let pod = node.pod("oom").await;
        let mut config = pod.container_config("hog", &["tail", "/dev/zero"]);
        config.linux.as_mut().unwrap().resources = Some(LinuxContainerResources {
            memory_limit_in_bytes: 16 << 20,
            memory_swap_limit_in_bytes: 16 << 20,
            ..LinuxContainerResources::default()
        });
        let hog = pod.start(config).await;
        let status = hog.exited().await;
        assert_eq!(status.exit_code, 137);
        until("the reason is told", async || {
            (hog.status().await.reason == "OOMKilled").then_some(())
        })
        .await;
        pod.remove().await;
    });
}

#[test]
fn the_handler_chooses_the_runtime_and_an_unknown_one_is_an_error() {
    cri_node(async |node| {
        let error = node
            .pod_with("no-such-handler", node.pod_config("unknown"))
            .await
            .err()
            .unwrap();
        assert!(error.message().contains("no-such-handler"), "{error:?}");
        let _ = std::fs::remove_dir_all(node.folder("unknown"));
        if support::image::find("containerd-shim-runc-v2").is_none() {
            node.skip("no containerd-shim-runc-v2 in PATH");
            return;
        }
        // The state folder of the other shim, which it never removes.
        node.tolerate("folder /run/containerd/runc");
        let ours = node.pod("ours").await;
        let theirs = node.pod_with("runc", node.pod_config("theirs")).await.unwrap();
        let expected = if node.runtime.name == "io.containerd.runc.v2" {
            2
        } else {
            1
        };
        assert_eq!(leaks::shims("io.containerd.runc.v2").len(), expected);
        assert_eq!(node.shims().len(), expected);
        ours.remove().await;
        theirs.remove().await;
    });
}

#[test]
fn a_missing_program_is_named_in_the_error_and_in_the_status() {
    cri_node(async |node| {
        let pod = node.pod("missing").await;
        let container = pod
            .create(pod.container_config("nope", &["no-such-program"]))
            .await
            .unwrap();
        let error = container.start().await.unwrap_err();
        assert!(error.message().contains("no-such-program"), "{error:?}");
        if node.runtime.is_ours() || node.runtime.program() == "runc" {
            assert!(
                error.message().contains("executable file not found in $PATH"),
                "{error:?}"
            );
        }
        let status = container.status().await;
        assert_eq!(status.state(), ContainerState::ContainerExited);
        assert_eq!((status.reason.as_str(), status.exit_code), ("StartError", 128));
        assert!(status.message.contains("no-such-program"), "{status:?}");
        // The pod is none the worse for it.
        let fine = pod.sh("fine", "echo fine").await;
        assert_eq!(fine.exited().await.exit_code, 0);
        pod.remove().await;
    });
}

/// Waits until a containerd that was started again answers the kubelet.
async fn cri_recovers(node: &Node) {
    until("CRI has recovered", async || {
        let request = node.request(k8s_cri::v1::VersionRequest::default());
        node.cri().version(request).await.ok().map(drop)
    })
    .await;
}

#[test]
fn containerd_dies_and_its_pods_do_not() {
    cri_node(async |node| {
        let pod = node.pod("restart").await;
        let stays = pod.sh("stays", "echo up; exec sleep 1000").await;
        let ends = pod
            .sh("ends", "trap 'exit 9' TERM; echo ready; while :; do sleep 0.01; done")
            .await;
        ends.logs("ready").await;
        let pid = leaks::processes()
            .into_iter()
            .find(|process| process.command.contains("exit 9"))
            .expect("the container's init")
            .pid;
        node.kill_containerd();
        // SAFETY: a process of the tests' private pid namespace.
        unsafe { libc::kill(pid as i32, libc::SIGTERM) };
        until("it ends meanwhile", async || {
            (!leaks::processes().iter().any(|process| process.pid == pid)).then_some(())
        })
        .await;
        node.start_containerd().await;
        cri_recovers(node).await;
        assert!(pod.is_ready().await);
        assert_eq!(stays.status().await.state(), ContainerState::ContainerRunning);
        assert_eq!(ends.exited().await.exit_code, 9);
        assert_eq!(stays.ask("echo still here").await, "still here\n");
        assert_eq!(node.shims().len(), 1);
        let new = pod.sh("new", "echo new; exec sleep 1000").await;
        new.logs("new").await;
        assert_eq!(
            node.shims().len(),
            1,
            "a container after the restart joins the pod's shim"
        );
        pod.remove().await;
    });
}

#[test]
fn pods_run_on_through_a_restart_of_containerd() {
    cri_node(async |node| {
        let pod = node.pod("upgrade").await;
        let main = pod
            .sh("main", "echo up; trap 'exit 4' TERM; while :; do sleep 0.01; done")
            .await;
        main.logs("up").await;
        let before = node.shims();
        node.restart_containerd().await;
        cri_recovers(node).await;
        assert!(pod.is_ready().await);
        assert_eq!(main.status().await.state(), ContainerState::ContainerRunning);
        assert_eq!(main.ask("echo still here").await, "still here\n");
        main.stop(30).await;
        assert_eq!(main.exited().await.exit_code, 4);
        assert_eq!(node.shims(), before, "the pod's shim is the same");
        pod.remove().await;
    });
}

#[test]
fn the_backend_that_this_suite_is_run_for_holds_the_sandbox_and_its_containers() {
    cri_node(async |node| {
        if !node.is_for_ours("has no backends") {
            return;
        }
        let pod = node.pod("held").await;
        let main = pod.sh("main", "exec sleep 1000").await;
        for id in [&pod.id, &main.id] {
            assert_eq!(backend::holding("k8s.io", id), [node.runtime.program()]);
        }
        pod.remove().await;
    });
}

#[test]
fn the_cgroups_are_the_drivers() {
    cri_node(async |node| {
        let pod = node.pod("cgroups").await;
        let main = pod.sh("main", "exec sleep 1000").await;
        let mut found = support::universe::cgroups_named(&main.id);
        if node.runtime.program() == "lxc" {
            // Where the process that waits for init is kept: not among the container's.
            found.retain(|cgroup| !cgroup.to_string_lossy().contains("/lxc.monitor"));
        }
        assert!(!found.is_empty());
        let (scope, name) = match support::universe::by_systemd() {
            true => {
                let scope = format!("cri-containerd-{}.scope", main.id);
                (Some(scope.clone()), format!("{}.slice/{scope}", node.namespace))
            }
            false => (None, format!("{}/{}", node.namespace, main.id)),
        };
        // crun keeps the processes of a scope in a cgroup inside it.
        let inner = scope.is_some().then(|| format!("{name}/container"));
        for cgroup in &found {
            let inside = inner.as_ref().is_some_and(|inner| cgroup.ends_with(inner));
            assert!(cgroup.ends_with(&name) || inside, "{found:?}");
        }
        assert!(found.iter().any(|cgroup| cgroup.ends_with(&name)), "{found:?}");
        let active = |scope: &str| {
            let output = std::process::Command::new("systemctl")
                .args(["is-active", scope])
                .output();
            String::from_utf8(output.unwrap().stdout).unwrap()
        };
        if let Some(scope) = &scope {
            assert_eq!(active(scope), "active\n");
        }
        pod.remove().await;
        if let Some(scope) = &scope {
            assert_eq!(active(scope), "inactive\n");
        }
    });
}

#[test]
fn a_pod_whose_shim_was_killed_is_not_ready_and_can_be_removed() {
    cri_node(async |node| {
        node.others_may_leave("socket /run/containerd/s/");
        let pod = node.pod("lost").await;
        let container = pod.sh("main", "exec sleep 1000").await;
        let shims = node.shims();
        assert_eq!(shims.len(), 1);
        // SAFETY: a process of the tests' private pid namespace.
        unsafe { libc::kill(shims[0].pid as i32, libc::SIGKILL) };
        assert_ne!(container.exited().await.exit_code, 0);
        until("the sandbox is not ready", async || {
            (!pod.is_ready().await).then_some(())
        })
        .await;
        pod.remove().await;
    });
}

#[test]
fn a_pod_whose_sandbox_process_dies_is_not_ready() {
    cri_node(async |node| {
        let pod = node.pod("pause").await;
        let pause = leaks::processes()
            .into_iter()
            .find(|process| process.command.contains("sleep 2147483647"))
            .unwrap();
        // SAFETY: a process of the tests' private pid namespace.
        unsafe { libc::kill(pause.pid as i32, libc::SIGKILL) };
        until("the sandbox is not ready", async || {
            (!pod.is_ready().await).then_some(())
        })
        .await;
        pod.remove().await;
    });
}

#[test]
fn a_pod_may_share_its_pid_namespace() {
    cri_node(async |node| {
        let mut config = node.pod_config("shared");
        let linux = config.linux.as_mut().unwrap();
        linux.security_context.as_mut().unwrap().namespace_options = Some(namespaces(NamespaceMode::Pod));
        let pod = node.pod_with(HANDLER, config).await.unwrap();
        let first = pod.sh("first", "sleep 1001 & exec sleep 1002").await;
        let second = pod.sh("second", "exec sleep 1003").await;
        until("the first container's processes run", async || {
            let seen = second.ask("ps").await;
            ["2147483647", "1001", "1002", "1003"]
                .iter()
                .all(|word| seen.contains(word))
                .then_some(())
        })
        .await;
        // A container's end takes what it left in the shared namespace along.
        first.stop(0).await;
        first.exited().await;
        until("nothing of the first container runs", async || {
            let seen = second.ask("ps").await;
            (!seen.contains("1001") && !seen.contains("1002")).then_some(())
        })
        .await;
        pod.remove().await;
    });
}

#[test]
fn a_pod_may_use_the_hosts_network() {
    cri_node(async |node| {
        let mut config = node.pod_config("host");
        let mut options = namespaces(NamespaceMode::Container);
        options.network = NamespaceMode::Node.into();
        config.hostname = String::new();
        config
            .linux
            .as_mut()
            .unwrap()
            .security_context
            .as_mut()
            .unwrap()
            .namespace_options = Some(options);
        let pod = node.pod_with(HANDLER, config).await.unwrap();
        let container = pod.sh("main", "exec sleep 1000").await;
        let own = std::fs::read_link("/proc/self/ns/net").unwrap();
        assert_eq!(
            container.ask("readlink /proc/self/ns/net").await.trim(),
            own.to_str().unwrap()
        );
        pod.remove().await;
    });
}

#[test]
fn a_security_context_is_kept() {
    cri_node(async |node| {
        let pod = node.pod("secure").await;
        let mut config = pod.container_config("main", &["sh", "-c", "id -u; id -g; touch /file; exec sleep 1000"]);
        let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
        context.run_as_user = user(1000);
        context.run_as_group = user(1000);
        context.readonly_rootfs = true;
        context.no_new_privs = true;
        let container = pod.start(config).await;
        container.logs("stdout F 1000").await;
        container.logs("Read-only file system").await;
        assert_eq!(
            container.ask("id -u; grep NoNewPrivs /proc/self/status").await,
            "1000\nNoNewPrivs:\t1\n"
        );
        pod.remove().await;
    });
}

#[test]
fn five_pods_at_once_do_not_meet() {
    cri_node(async |node| {
        let mut pods = Vec::new();
        for number in 0..5 {
            let pod = node.pod(&format!("many-{number}")).await;
            let container = pod.sh("main", "hostname; exec sleep 1000").await;
            container.logs(&format!("many-{number}")).await;
            pods.push(pod);
        }
        assert_eq!(node.shims().len(), 5);
        for pod in pods {
            pod.remove().await;
        }
    });
}

#[test]
fn a_pods_shim_keeps_no_descriptor_of_what_ended() {
    cri_node(async |node| {
        let pod = node.pod("long").await;
        let stays = pod.sh("stays", "exec sleep 1000").await;
        let shims = node.shims();
        let descriptors = || leaks::open_descriptors(shims[0].pid);
        let round = async |number: usize| {
            let container = pod.sh(&format!("c{number}"), "echo out; exit 0").await;
            container.exited().await;
            container.remove().await;
            assert_eq!(stays.ask("echo in").await, "in\n");
        };
        // The first round may open what stays for all.
        round(0).await;
        let before = descriptors();
        for number in 1..=20 {
            round(number).await;
        }
        until(&format!("the descriptors are {before} again"), async || {
            (descriptors() <= before).then_some(())
        })
        .await;
        pod.remove().await;
    });
}
