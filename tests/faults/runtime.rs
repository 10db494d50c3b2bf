//! A runtime program that is missing, hangs, lies, or takes its time.

use std::{fs, process::Command};

use containerd_shim_protos::{api::Status, ttrpc::Code};

use crate::{
    FOREVER, Gate, Stub, fault, fault_of_crun, fault_of_lxc, it_works, lives, pod, send, shell,
    support::{
        backend::own_processes,
        gate::FileGate,
        pod::{Bundle, Daemon, Io, Pod, appears, process, refused},
    },
    until, until_told,
};

/// The bound of a call in these tests; the least that can be set.
const SHORT: &str = "runtime_timeout_ms = 1000";

/// After a failed Create: nothing is left, and the same bundle works.
async fn works_again(daemon: &Daemon, stub: &Stub, pod: Pod, a: &Bundle) {
    stub.heal();
    refused(pod.state("a", "").await, Code::NOT_FOUND, "container not created");
    assert!(!a.path.join("proxmox-lxcri.json").exists());
    let mut again = a.clone();
    again.spec["process"]["args"] = serde_json::json!(["echo", "fine"]);
    it_works(&pod, &again).await;
    pod.shutdown().await;
    daemon.assert_nothing_left();
}

#[test]
fn a_missing_crun_is_named_and_nothing_is_left() {
    fault_of_crun(async |daemon, stub| {
        let (pod, a) = pod(daemon, stub, &FOREVER).await;
        stub.uninstall();
        refused(
            pod.create(&a, &Io::none()).await,
            Code::UNAVAILABLE,
            "/stub/crun was not found",
        );
        stub.install();
        works_again(daemon, stub, pod, &a).await;
    });
}

#[test]
fn a_crun_that_goes_missing_later_fails_the_call_and_changes_nothing() {
    fault_of_crun(async |daemon, stub| {
        let (pod, a) = pod(daemon, stub, &FOREVER).await;
        let pid = pod.create(&a, &Io::none()).await.unwrap();
        stub.uninstall();
        refused(
            pod.start_process("a", "").await,
            Code::UNAVAILABLE,
            "/stub/crun was not found",
        );
        assert_eq!(pod.status("a").await, Status::CREATED);
        stub.install();
        assert_eq!(pod.start_process("a", "").await.unwrap(), pid);
        pod.exec("a", "e1", &process(&FOREVER), &Io::none()).await.unwrap();
        stub.uninstall();
        refused(
            pod.start_process("a", "e1").await,
            Code::UNAVAILABLE,
            "/stub/crun was not found",
        );
        let resources = serde_json::json!({"pids": {"limit": 100}});
        refused(
            pod.update("a", &resources).await,
            Code::UNAVAILABLE,
            "/stub/crun was not found",
        );
        pod.kill("a", "", libc::SIGKILL, false).await.unwrap();
        assert_eq!(pod.wait("a", "").await.unwrap(), 137);
        refused(pod.delete("a", "").await, Code::UNAVAILABLE, "/stub/crun was not found");
        assert_eq!(pod.status("a").await, Status::STOPPED);
        stub.install();
        assert_eq!(pod.delete("a", "").await.unwrap().exit_status, 137);
        it_works(&pod, &daemon.bundle("b", &["echo", "fine"])).await;
        pod.shutdown().await;
    });
}

#[test]
fn a_create_that_hangs_is_ended_at_its_bound() {
    fault_of_crun(async |daemon, stub| {
        for after in [false, true] {
            let (mut pod, a) = pod(daemon, stub, &FOREVER).await;
            pod.options = stub.options(SHORT);
            let _gate = if after {
                stub.holds_after("create")
            } else {
                stub.holds_before("create")
            };
            let answer = pod.create(&a, &Io::fifos(&a.path, "init")).await;
            refused(answer, Code::DEADLINE_EXCEEDED, "crun did not end within 1000 ms");
            works_again(daemon, stub, pod, &a).await;
            fs::remove_dir_all(&a.path).unwrap();
        }
    });
}

#[test]
fn a_create_that_hangs_is_undone_by_hand_where_delete_hangs_too() {
    fault_of_crun(async |daemon, stub| {
        let (mut pod, a) = pod(daemon, stub, &FOREVER).await;
        pod.options = stub.options(SHORT);
        let _gates = [stub.holds_after("create"), stub.holds_before("delete")];
        let answer = pod.create(&a, &Io::none()).await;
        refused(answer, Code::DEADLINE_EXCEEDED, "crun did not end within 1000 ms");
        works_again(daemon, stub, pod, &a).await;
    });
}

#[test]
fn a_hook_that_hangs_in_create_ends_with_it() {
    fault(async |daemon, stub| {
        let (mut pod, mut a) = pod(daemon, stub, &FOREVER).await;
        pod.options = stub.options(SHORT);
        let gate = Gate::new(a.path.join("gate"));
        a.spec["hooks"]["createRuntime"] = gate.hook();
        let answer = pod.create(&a, &Io::none()).await;
        refused(answer, Code::DEADLINE_EXCEEDED, stub.late());
        a.spec["hooks"] = serde_json::json!({});
        works_again(daemon, stub, pod, &a).await;
    });
}

#[test]
fn a_start_that_hangs_leaves_the_container_as_it_truly_is() {
    fault_of_crun(async |daemon, stub| {
        for after in [false, true] {
            let before = daemon.told().len();
            let (mut pod, a) = pod(daemon, stub, &shell("touch /ran; exec sleep 100000")).await;
            pod.options = stub.options(SHORT);
            let pid = pod.create(&a, &Io::none()).await.unwrap();
            let _gate = if after {
                stub.holds_after("start")
            } else {
                stub.holds_before("start")
            };
            let answer = pod.start_process("a", "").await;
            refused(answer, Code::DEADLINE_EXCEEDED, "crun did not end within 1000 ms");
            stub.heal();
            if after {
                assert_eq!(pod.status("a").await, Status::RUNNING);
                assert_eq!(daemon.hears_after(before, "start a").await, ["create a", "start a"]);
                refused(
                    pod.start_process("a", "").await,
                    Code::FAILED_PRECONDITION,
                    "cannot start a running process",
                );
            } else {
                assert_eq!(pod.status("a").await, Status::CREATED);
                assert!(!a.path.join("upper/ran").exists());
                assert_eq!(pod.start_process("a", "").await.unwrap(), pid);
            }
            pod.end("a").await;
            pod.shutdown().await;
            daemon.assert_nothing_left();
            fs::remove_dir_all(&a.path).unwrap();
        }
    });
}

/// crun's Start is over before the hook begins.
#[test]
fn a_start_that_hangs_in_a_hook_can_be_repeated_or_the_container_be_deleted() {
    fault_of_lxc(async |daemon, stub| {
        for repeated in [true, false] {
            let before = daemon.told().len();
            let (mut pod, mut a) = pod(daemon, stub, &shell("touch /ran; exec sleep 100000")).await;
            pod.options = stub.options(SHORT);
            a.spec["hooks"]["startContainer"] = serde_json::json!([{"path": "/bin/cat", "args": ["cat", "/gate"]}]);
            let pid = pod.create(&a, &Io::none()).await.unwrap();
            // The hook runs inside.
            let gate = Gate::new(a.path.join("rootfs/gate"));
            let answer = pod.start_process("a", "").await;
            refused(answer, Code::DEADLINE_EXCEEDED, stub.late());
            assert_eq!(pod.status("a").await, Status::CREATED);
            assert_eq!(daemon.hears_after(before, "create a").await, ["create a"]);
            assert!(!a.path.join("upper/ran").exists());
            if repeated {
                let (started, _held) = tokio::join!(pod.start_process("a", ""), async {
                    // Opened and closed: the hook reads the end of the file.
                    drop(gate.reached().await);
                });
                assert_eq!(started.unwrap(), pid);
                assert_eq!(pod.status("a").await, Status::RUNNING);
                appears(&a.path.join("upper/ran")).await;
                pod.end("a").await;
            } else {
                assert_eq!(pod.delete("a", "").await.unwrap().exit_status, 137);
                assert!(!a.path.join("upper/ran").exists());
            }
            pod.shutdown().await;
            let told = daemon.told().split_off(before);
            let all = ["create a", "start a", "exit a 137", "delete a 137"];
            let expected = all.iter().filter(|told| repeated || !told.starts_with("start"));
            assert!(told.iter().eq(expected), "{told:?}");
            daemon.assert_nothing_left();
            fs::remove_dir_all(&a.path).unwrap();
        }
    });
}

#[test]
fn an_exec_that_hangs_leaves_no_process_and_can_be_started_again() {
    fault_of_crun(async |daemon, stub| {
        let (mut pod, a) = pod(daemon, stub, &FOREVER).await;
        pod.options = stub.options(SHORT);
        let init = pod.run(&a, &Io::none()).await;
        for after in [false, true] {
            let exec = if after { "e1" } else { "e2" };
            let io = Io::fifos(&a.path, exec);
            pod.exec("a", exec, &process(&shell("exec sleep 7777")), &io)
                .await
                .unwrap();
            let _gate = if after {
                stub.holds_after("exec")
            } else {
                stub.holds_before("exec")
            };
            let answer = pod.start_process("a", exec).await;
            refused(answer, Code::DEADLINE_EXCEEDED, "crun did not end within 1000 ms");
            assert_eq!(pod.state("a", exec).await.unwrap().status, Status::CREATED.into());
            // A killed process is counted until it is reaped.
            let left = until_told("one process is left", async || {
                Some(pod.pids("a").await.unwrap()).filter(|pids| pids.len() == 1)
            })
            .await;
            assert_eq!(left.into_keys().collect::<Vec<_>>(), [init]);
            stub.heal();
            pod.start_process("a", exec).await.unwrap();
            pod.kill("a", exec, libc::SIGKILL, false).await.unwrap();
            assert_eq!(pod.wait("a", exec).await.unwrap(), 137);
            pod.delete("a", exec).await.unwrap();
        }
        pod.end("a").await;
        pod.shutdown().await;
    });
}

#[test]
fn a_delete_that_hangs_says_so_leaves_nothing_running_and_can_be_repeated() {
    fault(async |daemon, stub| {
        let (mut pod, mut a) = pod(daemon, stub, &shell("exit 4")).await;
        pod.options = stub.options(SHORT);
        let _gate = stub.holds("delete", &mut a);
        pod.run(&a, &Io::none()).await;
        assert_eq!(pod.wait("a", "").await.unwrap(), 4);
        let answer = pod.delete("a", "").await;
        refused(answer, Code::DEADLINE_EXCEEDED, "Delete again to remove the rest");
        assert_eq!(pod.status("a").await, Status::STOPPED);
        assert_eq!(pod.wait("a", "").await.unwrap(), 4);
        stub.heal();
        assert_eq!(pod.delete("a", "").await.unwrap().exit_status, 4);
        let told = daemon.hears("delete a 4").await;
        assert_eq!(told, ["create a", "start a", "exit a 4", "delete a 4"]);
        pod.shutdown().await;
        daemon.assert_nothing_left();
    });
}

#[test]
fn a_create_whose_own_processes_are_killed_fails_and_leaves_nothing() {
    fault(async |daemon, stub| {
        let (pod, mut a) = pod(daemon, stub, &FOREVER).await;
        let gate = Gate::new(a.path.join("gate"));
        a.spec["hooks"]["createRuntime"] = gate.hook();
        let io = Io::fifos(&a.path, "init");
        let creating = pod.create(&a, &io);
        let killing = async {
            let held = gate.reached().await;
            let own = own_processes(stub.backend, "a");
            assert!(!own.is_empty(), "nobody is at work");
            for process in own {
                // One may go with another.
                // SAFETY: the pid is of the tests' private pid namespace.
                unsafe { libc::kill(process.pid.cast_signed(), libc::SIGKILL) };
            }
            held
        };
        let (created, held) = tokio::join!(creating, killing);
        let refusal = created.unwrap_err();
        assert!(refusal.text.contains("OCI runtime create failed"), "{refusal:?}");
        // The hook is its author's: it ends when it likes to.
        drop(held);
        a.spec["hooks"] = serde_json::json!({});
        works_again(daemon, stub, pod, &a).await;
    });
}

// ---- what it says ------------------------------------------------------------------------------------------------------------------

/// A script that puts `command`'s output where crun was told to write its log.
fn into_log(command: &str) -> String {
    format!("while [ \"$1\" != --log ]; do shift; done; {command} >\"$2\"")
}

/// A script that tells `pid`, as crun does.
fn tells_pid(pid: &str) -> String {
    format!("while [ \"$1\" != --pid-file ]; do shift; done; printf '%s' '{pid}' >\"$2\"; exit 0")
}

#[test]
fn garbage_and_silence_become_clear_errors() {
    fault_of_crun(async |daemon, stub| {
        let (pod, a) = pod(daemon, stub, &FOREVER).await;
        for (script, text) in [
            ("exit 1".to_owned(), "crun ended with status 1 and gave no reason"),
            (
                "kill -9 $$".to_owned(),
                "crun was killed by signal 9 and gave no reason",
            ),
            (
                into_log("printf 'not json\\n\\377\\000{'") + "; exit 3",
                "crun ended with status 3",
            ),
            (
                into_log("yes '{\"level\": 7}' | head -c 9000000") + "; exit 5",
                "crun ended with status 5",
            ),
            (
                into_log("echo '{\"msg\":\"the moon is full\",\"level\":\"error\"}'") + "; exit 1",
                "OCI runtime create failed: the moon is full",
            ),
            ("exit 0".to_owned(), "crun succeeded, but told no pid"),
            (tells_pid("moon"), "told a pid that is none: \"moon\""),
            (tells_pid("-7"), "told a pid that is none"),
            (tells_pid("0"), "told a pid that is none"),
            (tells_pid("1"), "told a pid that is none"),
            (tells_pid("99999999999999999999"), "told a pid that is none"),
            (
                tells_pid("4194300"),
                "crun told pid 4194300, which is no process that it has made",
            ),
        ] {
            stub.at("create", &script);
            refused(pod.create(&a, &Io::none()).await, Code::UNKNOWN, text);
        }
        works_again(daemon, stub, pod, &a).await;
    });
}

#[test]
fn a_process_that_is_not_the_containers_is_neither_adopted_nor_killed() {
    fault_of_crun(async |daemon, stub| {
        let (pod, a) = pod(daemon, stub, &FOREVER).await;
        let b = daemon.bundle("b", &shell("sleep 1000 & sleep 1000"));
        let other = pod.run(&b, &Io::none()).await;
        let inside = until("the child of the other container", || {
            let children = fs::read_to_string(format!("/proc/{other}/task/{other}/children")).unwrap();
            children
                .split_whitespace()
                .next()
                .map(|pid| pid.parse::<u32>().unwrap())
        })
        .await;
        let mut stranger = Command::new("sleep").arg("1000").spawn().unwrap();
        let victims = [stranger.id(), std::process::id(), pod.pid, other, inside];
        for victim in victims {
            for script in [
                tells_pid(&victim.to_string()),
                // Killed, or given up, with the lie told already.
                tells_pid(&victim.to_string()).replace("exit 0", "exit 1"),
            ] {
                stub.at("create", &script);
                refused(
                    pod.create(&a, &Io::none()).await,
                    Code::UNKNOWN,
                    "OCI runtime create failed",
                );
                pod.exec("b", "e1", &process(&FOREVER), &Io::none()).await.unwrap();
                stub.at("exec", &script);
                refused(
                    pod.start_process("b", "e1").await,
                    Code::UNKNOWN,
                    "OCI runtime exec failed",
                );
                pod.delete("b", "e1").await.unwrap();
                assert!(victims.iter().all(|pid| lives(*pid)), "{victim} was killed");
            }
        }
        stub.heal();
        stranger.kill().unwrap();
        stranger.wait().unwrap();
        // Its exit still belongs to it.
        pod.kill("b", "", libc::SIGKILL, false).await.unwrap();
        assert_eq!(pod.wait("b", "").await.unwrap(), 137);
        pod.delete("b", "").await.unwrap();
        works_again(daemon, stub, pod, &a).await;
    });
}

// ---- others meanwhile --------------------------------------------------------------------------------------------------------------

#[test]
fn a_kill_ends_a_slow_create() {
    fault(async |daemon, stub| {
        for after in [false, true] {
            if after && !stub.is_crun() {
                continue;
            }
            let (pod, mut a) = pod(daemon, stub, &FOREVER).await;
            let gate = if after {
                stub.holds_after("create")
            } else {
                stub.holds("create", &mut a)
            };
            let io = Io::none();
            let creating = pod.create(&a, &io);
            let killing = async {
                let held = gate.reached().await;
                refused(
                    pod.kill("a", "", libc::SIGUSR1, false).await,
                    Code::FAILED_PRECONDITION,
                    "being created",
                );
                pod.kill("a", "", libc::SIGTERM, false).await.unwrap();
                held
            };
            let (created, _held) = tokio::join!(creating, killing);
            refused(created, Code::ABORTED, "killed while it was being created");
            works_again(daemon, stub, pod, &a).await;
            fs::remove_dir_all(&a.path).unwrap();
        }
    });
}

#[test]
fn a_delete_ends_a_slow_create() {
    fault(async |daemon, stub| {
        let (pod, mut a) = pod(daemon, stub, &FOREVER).await;
        let gate = stub.holds("create", &mut a);
        let io = Io::none();
        let creating = pod.create(&a, &io);
        let deleting = async {
            let held = gate.reached().await;
            let deleted = pod.delete("a", "").await.unwrap();
            assert_eq!((deleted.pid, deleted.exit_status), (0, 137));
            held
        };
        let (created, _held) = tokio::join!(creating, deleting);
        refused(created, Code::ABORTED, "");
        works_again(daemon, stub, pod, &a).await;
    });
}

#[test]
fn a_kill_in_a_slow_start_ends_the_container_as_soon_as_the_start_is_over() {
    fault(async |daemon, stub| {
        for after in [false, true] {
            // The hook of a start runs when the program does.
            if !after && !stub.is_crun() {
                continue;
            }
            let (pod, mut a) = pod(daemon, stub, &FOREVER).await;
            let before = daemon.told().len();
            let gate = match (after, stub.is_crun()) {
                (true, true) => stub.holds_after("start"),
                (true, false) => stub.holds("start", &mut a),
                (false, _) => stub.holds_before("start"),
            };
            pod.create(&a, &Io::none()).await.unwrap();
            let starting = pod.start_process("a", "");
            let killing = async {
                let held = gate.reached().await;
                refused(
                    pod.delete("a", "").await,
                    Code::FAILED_PRECONDITION,
                    "cannot delete a running process",
                );
                pod.kill("a", "", libc::SIGKILL, false).await.unwrap();
                drop(held);
                pod.wait("a", "").await.unwrap()
            };
            let (started, status) = tokio::join!(starting, killing);
            // It was started, or it was not.
            assert_eq!(started.is_ok(), after, "{started:?}");
            assert_eq!(status, 137);
            pod.delete("a", "").await.unwrap();
            // Ended by the drain of the events.
            pod.shutdown().await;
            let told = daemon.told().split_off(before);
            let expected = ["create a", "start a", "exit a 137", "delete a 137"];
            let expected = expected.iter().filter(|told| after || !told.starts_with("start"));
            assert!(told.iter().eq(expected), "{told:?}");
            daemon.assert_nothing_left();
            fs::remove_dir_all(&a.path).unwrap();
        }
    });
}

#[test]
fn a_container_whose_init_dies_in_a_slow_exec_ends() {
    fault(async |daemon, stub| {
        let (pod, a) = pod(daemon, stub, &FOREVER).await;
        let pid = pod.run(&a, &Io::none()).await;
        pod.exec("a", "e1", &process(&["touch", "/ran"]), &Io::none())
            .await
            .unwrap();
        // No hook runs in an exec.
        let (crun, file) = match stub.is_crun() {
            true => (Some(stub.holds_before("exec")), None),
            false => (None, Some(FileGate::in_exec(&a.path))),
        };
        let dying = async {
            let held = match (&crun, file) {
                (Some(gate), _) => (Some(gate.reached().await), None),
                (None, file) => (None, Some(file.unwrap().reached().await)),
            };
            send(pid, libc::SIGKILL);
            until("init's end", || (!lives(pid)).then_some(())).await;
            drop(held);
            pod.wait("a", "").await.unwrap()
        };
        let (started, status) = tokio::join!(pod.start_process("a", "e1"), dying);
        if stub.is_crun() {
            refused(started, Code::FAILED_PRECONDITION, "OCI runtime exec failed");
        } else {
            // It was born by then, and has gone with all others.
            started.unwrap();
            assert_eq!(pod.wait("a", "e1").await.unwrap(), 137);
            assert_eq!(
                daemon.hears("exit a 137").await[3..],
                ["exec-started e1", "exit e1 137", "exit a 137"]
            );
        }
        assert_eq!(status, 137);
        assert!(!a.path.join("upper/ran").exists());
        pod.delete("a", "").await.unwrap();
        it_works(&pod, &daemon.bundle("b", &["echo", "fine"])).await;
        pod.shutdown().await;
    });
}
