//! Create, start, wait, kill, pause, delete, and the order of the events.

use containerd_client::tonic::Code;
use serde_json::json;

use crate::support::{
    backend,
    events::{Events, topics},
    node,
    node::max_shim_version,
    until,
};

#[test]
fn the_output_and_the_exit_status_arrive() {
    node(async |node| {
        let task = node.sh("out", "echo out; echo err >&2; exit 7").start().await;
        assert_eq!(task.wait().await.status, 7);
        let deleted = task.delete().await.unwrap();
        assert_eq!((deleted.exit_status, deleted.pid), (7, task.pid));
        assert_eq!(task.io.stdout.text().await, "out\n");
        assert_eq!(task.io.stderr.text().await, "err\n");
        task.forget().await;
    });
}

#[test]
fn the_backend_that_this_suite_is_run_for_holds_the_containers() {
    node(async |node| {
        if !node.is_for_ours("has no backends") {
            return;
        }
        let task = node.sh("held", "exec sleep 1000").start().await;
        assert_eq!(backend::holding(&node.namespace, &task.id), [node.runtime.program()]);
        task.end().await;
    });
}

#[test]
fn the_task_service_that_the_daemon_asks_for_is_spoken() {
    node(async |node| {
        if !node.is_for_ours("chooses for itself") {
            return;
        }
        let task = node.sh("spoken", "exec sleep 1000").start().await;
        let bundle = node.bundle(&task.id);
        // What containerd notes of a shim, to find it again: since 2.0 with the version of its task service.
        let noted = std::fs::read(bundle.join("bootstrap.json")).ok();
        let version = noted.map(|json| serde_json::from_slice::<serde_json::Value>(&json).unwrap()["version"].clone());
        let expected = match node.release().await {
            (1, _) => None,
            (2, ..=2) => Some(json!(max_shim_version().unwrap_or(2))),
            _ => Some(json!(3)),
        };
        assert_eq!(version, expected, "containerd {:?}", node.release().await);
        task.end().await;
    });
}

#[test]
fn fifty_containers_that_exit_at_once_tell_it_in_order_and_once() {
    node(async |node| {
        let events = Events::of(node).await;
        for round in 0..10 {
            let five = (0..5).map(async |number| {
                let task = node.sh(&format!("quick-{round}-{number}"), "exit 3").start().await;
                assert_eq!(task.wait().await.status, 3);
                let (id, pid) = (task.id.clone(), task.pid);
                task.finish().await;
                (id, pid)
            });
            for (id, pid) in join_all(five).await {
                let about = events.until_deleted(&id).await;
                assert_eq!(topics(&about), ["create", "start", "exit", "delete"], "{id}");
                assert!(about.iter().all(|event| event.pid == pid), "{about:?}");
                assert_eq!(
                    (about[2].id.as_str(), about[2].status, about[3].status),
                    (id.as_str(), 3, 3)
                );
            }
        }
    });
}

#[test]
fn an_execs_events_come_in_order_and_before_inits_exit() {
    node(async |node| {
        let events = Events::of(node).await;
        let task = node.container("order", &["sleep", "1000"]).start().await;
        let short = task.exec("short", &["true"]).await;
        short.start().await.unwrap();
        assert_eq!(short.wait().await.status, 0);
        short.delete().await.unwrap();
        let long = task.exec("long", &["sleep", "1000"]).await;
        let long_pid = long.start().await.unwrap();
        let id = task.id.clone();
        // The exec dies because init does: the kernel ends a pid namespace with its init.
        task.kill(libc::SIGKILL).await.unwrap();
        assert_eq!(long.wait().await.status, 137);
        drop((short, long));
        assert_eq!(task.wait().await.status, 137);
        task.finish().await;

        let about = events.until_deleted(&id).await;
        let told: Vec<(&str, &str)> = about
            .iter()
            .map(|event| (event.topic.as_str(), event.id.as_str()))
            .collect();
        let mut expected = vec![
            ("create", ""),
            ("start", ""),
            ("exec-added", "short"),
            ("exec-started", "short"),
            ("exit", "short"),
            ("exec-added", "long"),
            ("exec-started", "long"),
            ("exit", "long"),
            ("exit", id.as_str()),
            ("delete", ""),
        ];
        if !node.runtime.is_ours() {
            // Go's shim promises no order between init's exit and its execs'.
            expected.sort_unstable();
            let mut told = told.clone();
            told.sort_unstable();
            assert_eq!(told, expected);
        } else {
            assert_eq!(told, expected);
        }
        let exit = about
            .iter()
            .find(|event| event.topic == "exit" && event.id == "long")
            .unwrap();
        assert_eq!((exit.pid, exit.status), (long_pid, 137));
    });
}

#[test]
fn a_wait_before_and_one_after_the_exit_say_the_same() {
    node(async |node| {
        let task = node.sh("wait", "read line; exit 42").stdin().start().await;
        let early = async { task.wait().await };
        let exit = async {
            until("it runs", async || (task.status().await == "RUNNING").then_some(())).await;
            task.io.stdin().await.write(b"go\n").await;
        };
        let (early, ()) = tokio::join!(early, exit);
        let late = task.wait().await;
        assert_eq!(early.status, 42);
        assert_eq!(early, late);
        let state = task.state("").await.unwrap();
        assert_eq!((state.exit_status, state.exited_at), (42, Some(early.at)));
        let deleted = task.finish().await;
        assert_eq!((deleted.exit_status, deleted.exited_at), (42, Some(early.at)));
    });
}

#[test]
fn the_status_follows_the_task() {
    node(async |node| {
        let events = Events::of(node).await;
        let task = node.container("status", &["sleep", "1000"]).create().await;
        assert_eq!(task.status().await, "CREATED");
        task.start().await.unwrap();
        assert_eq!(task.status().await, "RUNNING");
        task.pause().await.unwrap();
        assert_eq!(task.status().await, "PAUSED");
        task.resume().await.unwrap();
        assert_eq!(task.status().await, "RUNNING");
        task.kill(libc::SIGKILL).await.unwrap();
        task.wait().await;
        assert_eq!(task.status().await, "STOPPED");
        let id = task.id.clone();
        task.finish().await;
        let about = events.until_deleted(&id).await;
        assert_eq!(
            topics(&about),
            ["create", "start", "paused", "resumed", "exit", "delete"]
        );
    });
}

#[test]
fn a_paused_container_does_not_move_and_can_be_killed() {
    node(async |node| {
        let task = node
            .sh("pause", "while read line; do echo got $line; done")
            .stdin()
            .start()
            .await;
        let mut stdin = task.io.stdin().await;
        stdin.write(b"one\n").await;
        task.io.stdout.until("got one").await;
        task.pause().await.unwrap();
        stdin.write(b"two\n").await;
        let error = task
            .try_exec("late", crate::support::task::process(&["true"]), false)
            .await;
        let text = match error {
            Err(error) => error.message().to_string(),
            Ok(exec) => {
                let error = exec.start().await.unwrap_err().message().to_string();
                exec.delete().await.unwrap();
                error
            }
        };
        assert!(text.contains("paused"), "{text}");
        assert_eq!(task.io.stdout.so_far(), "got one\n");
        task.resume().await.unwrap();
        task.io.stdout.until("got two").await;
        task.pause().await.unwrap();
        task.kill(libc::SIGKILL).await.unwrap();
        if !node.runtime.is_ours() && node.runtime.program() == "crun" {
            // On cgroup v1 a frozen process does not die; Go's shim leaves that to the runtime, and crun does not thaw.
            task.resume().await.unwrap();
        }
        assert_eq!(task.wait().await.status, 137);
        task.finish().await;
    });
}

#[test]
fn a_signal_reaches_the_program_and_becomes_its_status() {
    node(async |node| {
        let script = "trap 'echo usr1' USR1; trap 'exit 33' TERM; echo ready; while :; do read -t 1000 line; done";
        let task = node.sh("signal", script).stdin().start().await;
        task.io.stdout.until("ready").await;
        task.kill(libc::SIGUSR1).await.unwrap();
        task.io.stdout.until("usr1").await;
        // Not init: so the default action of a signal applies, and kills.
        for (name, signal) in [("term", libc::SIGTERM), ("hup", libc::SIGHUP), ("kill", libc::SIGKILL)] {
            let exec = task.exec(name, &["sleep", "1000"]).await;
            exec.start().await.unwrap();
            until("the exec runs sleep", async || {
                let pids = task.pids().await.unwrap();
                let pid = pids.iter().find(|(_, exec)| exec == name)?.0;
                let command = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?;
                command.starts_with("sleep").then_some(())
            })
            .await;
            exec.kill(signal).await.unwrap();
            assert_eq!(exec.wait().await.status, 128 + signal as u32);
            assert_eq!(exec.delete().await.unwrap().exit_status, 128 + signal as u32);
        }
        task.kill(libc::SIGTERM).await.unwrap();
        assert_eq!(task.wait().await.status, 33);
        task.finish().await;
    });
}

#[test]
fn killing_what_has_finished_is_not_found() {
    node(async |node| {
        let task = node.container("dead", &["true"]).start().await;
        task.wait().await;
        for all in [false, true] {
            let error = task.kill_process("", libc::SIGKILL, all).await;
            // Go's shim answers a kill of all with success.
            if !all || node.runtime.is_ours() {
                let error = error.unwrap_err();
                assert_eq!(error.code(), Code::NotFound, "{error:?}");
                assert!(error.message().contains("process already finished"), "{error:?}");
            }
        }
        let error = task.kill_process("nobody", libc::SIGKILL, false).await.unwrap_err();
        assert_eq!(error.code(), Code::NotFound, "{error:?}");
        task.finish().await;
    });
}

#[test]
fn a_running_task_cannot_be_deleted_nor_started_nor_created_again() {
    node(async |node| {
        let task = node.container("busy", &["sleep", "1000"]).start().await;
        let error = task.delete().await.unwrap_err();
        node.assert_code(&error, Code::FailedPrecondition);
        assert!(error.message().contains("running"), "{error:?}");
        let error = task.start().await.unwrap_err();
        node.assert_code(&error, Code::FailedPrecondition);
        let error = task.create_again().await.unwrap_err();
        assert_eq!(error.code(), Code::AlreadyExists, "{error:?}");
        assert_eq!(task.status().await, "RUNNING", "none of this did anything");
        assert_eq!(task.end().await.exit_status, 137);
    });
}

#[test]
fn a_created_task_can_be_deleted_or_killed_without_a_start() {
    node(async |node| {
        let task = node.container("never", &["sleep", "1000"]).create().await;
        assert!(std::path::Path::new(&format!("/proc/{}", task.pid)).exists());
        task.finish().await;
        let task = node.container("shot", &["sleep", "1000"]).create().await;
        task.kill(libc::SIGKILL).await.unwrap();
        assert_eq!(task.wait().await.status, 137);
        task.finish().await;
    });
}

#[test]
fn a_deleted_task_is_not_found() {
    node(async |node| {
        let task = node.container("gone", &["true"]).start().await;
        task.wait().await;
        task.delete().await.unwrap();
        for error in [
            task.state("").await.map(drop),
            task.kill(libc::SIGKILL).await,
            task.pause().await,
            task.start().await.map(drop),
            task.delete().await.map(drop),
        ] {
            let error = error.unwrap_err();
            assert_eq!(error.code(), Code::NotFound, "{error:?}");
        }
        task.forget().await;
    });
}

#[test]
fn twenty_containers_live_at_once() {
    node(async |node| {
        let tasks = join_all((0..20).map(async |number| {
            let script = format!("echo number {number}; read line; exit {number}");
            let task = node.sh(&format!("many-{number}"), &script).stdin().start().await;
            task.io.stdout.until(&format!("number {number}\n")).await;
            task
        }))
        .await;
        assert_eq!(node.shims().len(), 20);
        join_all(tasks.into_iter().enumerate().map(async |(number, task)| {
            task.io.stdin().await.write(b"end\n").await;
            assert_eq!(task.wait().await.status as usize, number);
            task.finish().await;
        }))
        .await;
    });
}

#[test]
fn the_longest_id_is_fine() {
    node(async |node| {
        // containerd allows 76; a sha256 in hex has 64, more than a host name may have.
        let name = "0123456789abcdef".repeat(5);
        let name = &name[..76 - node.namespace.len() - 1];
        let task = node.sh(name, "echo fine").start().await;
        assert_eq!(task.wait().await.status, 0);
        task.delete().await.unwrap();
        assert_eq!(task.io.stdout.text().await, "fine\n");
        task.forget().await;
    });
}

#[test]
fn a_shared_pid_namespace_leaves_no_process_behind_init() {
    node(async |node| {
        let without_pid = |spec: &mut serde_json::Value| {
            let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.retain(|namespace| namespace["type"] != json!("pid"));
        };
        // The child holds the output open; it must not hang Delete.
        let task = node
            .sh("shared", "sleep 1000 & echo left; exit 4")
            .edit(without_pid)
            .start()
            .await;
        assert_eq!(task.wait().await.status, 4);
        task.delete().await.unwrap();
        assert_eq!(task.io.stdout.text().await, "left\n");
        task.forget().await;
    });
}

#[test]
fn namespaces_are_joined_by_path() {
    node(async |node| {
        let first = node.container("first", &["sleep", "1000"]).start().await;
        let pid = first.pid;
        let join = |spec: &mut serde_json::Value| {
            for namespace in spec["linux"]["namespaces"].as_array_mut().unwrap() {
                let (kind, file) = match namespace["type"].as_str().unwrap() {
                    "network" => ("network", "net"),
                    "ipc" => ("ipc", "ipc"),
                    "uts" => ("uts", "uts"),
                    "pid" => ("pid", "pid"),
                    _ => continue,
                };
                *namespace = json!({"type": kind, "path": format!("/proc/{pid}/ns/{file}")});
            }
            // The name belongs to the first one's namespace.
            spec.as_object_mut().unwrap().remove("hostname");
        };
        let links = "for ns in net ipc uts pid mnt; do readlink /proc/self/ns/$ns; done";
        let second = node.sh("second", links).edit(join).start().await;
        assert_eq!(second.wait().await.status, 0);
        second.delete().await.unwrap();
        let theirs = second.io.stdout.text().await;
        second.forget().await;
        let ours = first.ask("links", links).await;
        let (theirs, ours): (Vec<&str>, Vec<&str>) = (theirs.lines().collect(), ours.lines().collect());
        assert_eq!(theirs[..4], ours[..4]);
        assert_ne!(theirs[4], ours[4], "the mount namespace is its own");
        first.end().await;
    });
}

/// All of them, concurrently, in the order of the futures.
pub(crate) async fn join_all<T>(futures: impl IntoIterator<Item = impl Future<Output = T>>) -> Vec<T> {
    let mut pinned: Vec<_> = futures.into_iter().map(Box::pin).collect();
    let mut results: Vec<Option<T>> = pinned.iter().map(|_| None).collect();
    std::future::poll_fn(|context| {
        for (future, result) in pinned.iter_mut().zip(&mut results) {
            if result.is_none()
                && let std::task::Poll::Ready(value) = future.as_mut().poll(context)
            {
                *result = Some(value);
            }
        }
        match results.iter().all(Option::is_some) {
            true => std::task::Poll::Ready(()),
            false => std::task::Poll::Pending,
        }
    })
    .await;
    results.into_iter().flatten().collect()
}
