//! Daemons and shims that die.

use containerd_client::tonic::Code;

use crate::support::{Node, events::Events, leaks, node, task::Task, until};

/// What Go's shim leaves when it is killed.
const SOCKET: &str = "socket /run/containerd/s/";

/// SIGKILL, SIGTERM, … to a process of the universe.
fn send(pid: u32, signal: i32) {
    // SAFETY: plain system call; the pid is that of a container or shim of the test.
    let result = unsafe { libc::kill(pid as i32, signal) };
    assert_eq!(result, 0, "kill {pid}: {}", std::io::Error::last_os_error());
}

/// Answers each line of its stdin, and ends with 5 when there is no more.
async fn talker(node: &Node) -> Task<'_> {
    node.sh("talker", "while read line; do echo got $line; done; exit 5")
        .stdin()
        .start()
        .await
}

#[test]
fn containerd_dies_and_finds_its_containers_again() {
    node(async |node| {
        let talker = talker(node).await;
        let ender = node
            .sh("ender", "trap 'exit 9' TERM; echo ready; while :; do sleep 0.01; done")
            .start()
            .await;
        let paused = node.container("paused", &["sleep", "1000"]).start().await;
        paused.pause().await.unwrap();
        let exec = talker.exec("exec", &["sleep", "1000"]).await;
        let exec_pid = exec.start().await.unwrap();
        ender.io.stdout.until("ready").await;
        let mut stdin = talker.io.stdin().await;
        stdin.write(b"before\n").await;
        talker.io.stdout.until("got before\n").await;

        node.kill_containerd();
        // Life goes on without it.
        stdin.write(b"meanwhile\n").await;
        talker.io.stdout.until("got meanwhile\n").await;
        send(ender.pid, libc::SIGTERM);
        until("the container's init ends", async || {
            // The shim reaps it.
            (!std::path::Path::new(&format!("/proc/{}", ender.pid)).exists()).then_some(())
        })
        .await;
        let log_before = node.log().len();
        node.start_containerd().await;

        assert_eq!(talker.status().await, "RUNNING");
        assert_eq!(paused.status().await, "PAUSED");
        assert_eq!(ender.status().await, "STOPPED");
        assert_eq!(ender.wait().await.status, 9);
        stdin.write(b"after\n").await;
        talker.io.stdout.until("got before\ngot meanwhile\ngot after\n").await;
        assert_eq!(talker.ask("ask", "echo still here").await, "still here\n");
        assert!(
            talker
                .pids()
                .await
                .unwrap()
                .iter()
                .any(|(pid, id)| *pid == exec_pid && id == "exec")
        );
        exec.kill(libc::SIGKILL).await.unwrap();
        assert_eq!(exec.wait().await.status, 137);
        exec.delete().await.unwrap();
        drop(exec);

        // The exit that happened meanwhile is told once. (Its event may come before anybody could subscribe: the log has it.)
        // ender's, ask's and exec's:
        until("the missed exit is told", async || {
            (exits_forwarded(&node.log()[log_before..]) >= 3).then_some(())
        })
        .await;
        assert_eq!(ender.finish().await.exit_status, 9);
        talker.close_stdin("").await.unwrap();
        drop(stdin);
        assert_eq!(talker.wait().await.status, 5);
        talker.finish().await;
        paused.resume().await.unwrap();
        paused.end().await;
        // ender, ask, exec, talker, paused: each of them once.
        until("all exits are told", async || {
            (exits_forwarded(&node.log()[log_before..]) >= 5).then_some(())
        })
        .await;
        assert_eq!(exits_forwarded(&node.log()[log_before..]), 5);
    });
}

#[test]
fn containers_run_on_through_a_restart_of_containerd() {
    node(async |node| {
        let talker = talker(node).await;
        let mut stdin = talker.io.stdin().await;
        let shims = node.shims();
        node.restart_containerd().await;
        assert_eq!(talker.status().await, "RUNNING");
        assert_eq!(node.shims(), shims);
        stdin.write(b"after\n").await;
        talker.io.stdout.until("got after\n").await;
        assert_eq!(talker.ask("ask", "echo still here").await, "still here\n");
        talker.close_stdin("").await.unwrap();
        drop(stdin);
        assert_eq!(talker.wait().await.status, 5);
        talker.finish().await;
    });
}

/// The number of exit events in a piece of the daemon's log.
fn exits_forwarded(log: &str) -> usize {
    log.lines()
        .filter(|line| line.contains("event forwarded") && line.contains("topic=/tasks/exit "))
        .count()
}

#[test]
fn a_shim_that_is_killed_takes_its_container_along() {
    node(async |node| {
        node.others_may_leave(SOCKET);
        let events = Events::of(node).await;
        let task = node.container("orphan", &["sleep", "1000"]).start().await;
        let exec = task.exec("exec", &["sleep", "1000"]).await;
        let exec_pid = exec.start().await.unwrap();
        drop(exec);
        let shims = node.shims();
        assert_eq!(shims.len(), 1, "{shims:?}");
        send(shims[0].pid, libc::SIGKILL);
        let id = task.id.clone();
        let about = events.until(&id, |event| event.topic == "exit").await;
        let exit = about
            .iter()
            .find(|event| event.topic == "exit" && event.id == id)
            .unwrap();
        assert_eq!(exit.status, 137, "{exit:?}");
        until("the task is forgotten", async || {
            let error = task.state("").await.err()?;
            (error.code() == Code::NotFound).then_some(())
        })
        .await;
        for pid in [task.pid, exec_pid] {
            until("its processes are gone", async || {
                (!leaks::processes().iter().any(|process| process.pid == pid)).then_some(())
            })
            .await;
        }
        task.forget().await;
    });
}

#[test]
fn a_shim_that_died_while_containerd_was_away_is_cleaned_up_after() {
    node(async |node| {
        node.others_may_leave(SOCKET);
        let task = node.container("both", &["sleep", "1000"]).start().await;
        node.kill_containerd();
        send(node.shims()[0].pid, libc::SIGKILL);
        until("the shim is gone", async || node.shims().is_empty().then_some(())).await;
        node.start_containerd().await;
        until("the task is forgotten", async || {
            let error = task.state("").await.err()?;
            (error.code() == Code::NotFound).then_some(())
        })
        .await;
        task.forget().await;
    });
}

#[test]
fn a_shim_ignores_sigterm_while_its_container_lives() {
    node(async |node| {
        if !node.is_for_ours("ends on SIGTERM") {
            return;
        }
        let task = node
            .sh("session", "while read line; do echo got $line; done")
            .stdin()
            .start()
            .await;
        let shim = node.shims().remove(0);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGPIPE] {
            send(shim.pid, signal);
        }
        task.io.stdin().await.write(b"on\n").await;
        task.io.stdout.until("got on\n").await;
        assert_eq!(task.status().await, "RUNNING");
        assert_eq!(node.shims(), [shim]);
        task.end().await;
    });
}

#[test]
fn a_shim_outlives_neither_its_container_nor_a_failed_create() {
    node(async |node| {
        let task = node.container("last", &["true"]).start().await;
        assert_eq!(node.shims().len(), 1);
        task.wait().await;
        task.finish().await;
        until("its shim ended", async || node.shims().is_empty().then_some(())).await;
        let broken = node
            .container("never", &["true"])
            .edit(|spec| spec["root"]["path"] = "/no/such".into());
        assert!(broken.rootfs(vec![]).try_create().await.is_err());
        until("its shim ended", async || node.shims().is_empty().then_some(())).await;
    });
}

#[test]
fn a_container_whose_init_is_killed_behind_the_shims_back_has_exited() {
    node(async |node| {
        let task = node.container("behind", &["sleep", "1000"]).start().await;
        send(task.pid, libc::SIGKILL);
        assert_eq!(task.wait().await.status, 137);
        assert_eq!(task.finish().await.exit_status, 137);
    });
}

#[test]
fn a_client_that_gives_up_leaves_no_half_container() {
    node(async |node| {
        node.others_may_leave(SOCKET);
        for number in 0..5 {
            let name = format!("hasty-{number}");
            let built = node.container(&name, &["sleep", "1000"]);
            // The connection is dropped in the middle of Create, at another place in each round.
            let patience = std::time::Duration::from_millis(5 + 10 * number);
            let outcome = tokio::time::timeout(patience, built.try_create()).await;
            let id = format!("{name}-{}", node.namespace);
            match outcome {
                Ok(task) => {
                    task.unwrap().end().await;
                }
                Err(_) => {
                    until("what was made can be removed", async || {
                        node.remove_whatever_is_there(&id).await.then_some(())
                    })
                    .await;
                }
            }
        }
    });
}
