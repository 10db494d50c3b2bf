//! Clients that give up, vanish, or come back in the middle of a call.

use std::{fs, time::Duration};

use containerd_shim_protos::{
    api::{self, Status},
    ttrpc::Code,
};
use serde_json::json;

use crate::{
    FOREVER, fault, fault_of_crun, it_works, lives, pod, send, shell,
    support::{
        gate::FileGate,
        leaks,
        pod::{Io, Pod, SHIM, Start, process, refused},
    },
    until, until_told,
};

/// A deadline that passes while the call is held.
const SHORT: Duration = Duration::from_millis(150);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leaving {
    /// The client's own deadline is over; it stays connected.
    Deadline,
    /// The connection is gone.
    Disconnect,
}

const BOTH: [Leaving; 2] = [Leaving::Deadline, Leaving::Disconnect];

/// Makes a call that a gate holds, and gives it up in the middle.
macro_rules! given_up {
    ($pod:ident, $gate:ident, $leaving:ident, $method:literal, $response:ty, $request:expr) => {{
        let request = $request;
        match $leaving {
            Leaving::Deadline => {
                let answer = $pod.call_bounded::<_, $response>($method, &request, SHORT).await;
                assert!(answer.is_err(), "{answer:?}");
                $gate.reached().await
            }
            Leaving::Disconnect => {
                let held = $gate.holds($pod.call::<_, $response>($method, &request)).await;
                $pod.reconnect().await;
                held
            }
        }
    }};
}

#[test]
fn a_create_that_nobody_waits_for_comes_to_its_end() {
    fault(async |daemon, stub| {
        for leaving in BOTH {
            let (mut pod, mut a) = pod(daemon, stub, &FOREVER).await;
            let before = daemon.told().len();
            let gate = stub.holds("create", &mut a);
            let request = pod.create_request(&a, &Io::none());
            let held = given_up!(pod, gate, leaving, "Create", api::CreateTaskResponse, request);
            // The id is taken until then.
            refused(pod.create(&a, &Io::none()).await, Code::ALREADY_EXISTS, "a");
            assert_eq!(pod.connect("a").await.unwrap(), 0);
            drop(held);
            until("the create event", || daemon.told().get(before).cloned()).await;
            assert_eq!(pod.status("a").await, Status::CREATED);
            pod.end("a").await;
            pod.shutdown().await;
            daemon.assert_nothing_left();
            stub.heal();
            fs::remove_dir_all(&a.path).unwrap();
            fs::remove_file(&gate.0).unwrap();
        }
    });
}

#[test]
fn a_create_that_nobody_waits_for_and_fails_leaves_nothing() {
    fault(async |daemon, stub| {
        for leaving in BOTH {
            let (mut pod, mut a) = pod(daemon, stub, &["no-such-program"]).await;
            let gate = stub.holds("create", &mut a);
            let request = pod.create_request(&a, &Io::none());
            let held = given_up!(pod, gate, leaving, "Create", api::CreateTaskResponse, request);
            drop(held);
            until_told("the task is gone", async || pod.state("a", "").await.err()).await;
            pod.shutdown().await;
            daemon.assert_nothing_left();
            stub.heal();
            fs::remove_dir_all(&a.path).unwrap();
            fs::remove_file(&gate.0).unwrap();
        }
    });
}

#[test]
fn starts_that_nobody_waits_for_come_to_their_end() {
    fault(async |daemon, stub| {
        for leaving in BOTH {
            let (mut pod, mut a) = pod(daemon, stub, &FOREVER).await;
            let gate = stub.holds("start", &mut a);
            let pid = pod.create(&a, &Io::none()).await.unwrap();
            let before = daemon.told().len();
            let start = |exec: &str| api::StartRequest {
                id: "a".into(),
                exec_id: exec.into(),
                ..Default::default()
            };
            let held = given_up!(pod, gate, leaving, "Start", api::StartResponse, start(""));
            drop(held);
            daemon.hears_after(before, "start a").await;
            assert_eq!(pod.status("a").await, Status::RUNNING);
            assert_eq!(pod.connect("a").await.unwrap(), pid);
            pod.exec("a", "e1", &process(&FOREVER), &Io::none()).await.unwrap();
            // A signal for what is being born is kept for it.
            if stub.is_crun() {
                let exec_gate = stub.holds_before("exec");
                let held = given_up!(pod, exec_gate, leaving, "Start", api::StartResponse, start("e1"));
                pod.kill("a", "e1", libc::SIGKILL, false).await.unwrap();
                drop(held);
                fs::remove_file(&exec_gate.0).unwrap();
            } else {
                // No hook runs in an exec.
                let exec_gate = FileGate::in_exec(&a.path);
                let held = given_up!(pod, exec_gate, leaving, "Start", api::StartResponse, start("e1"));
                pod.kill("a", "e1", libc::SIGKILL, false).await.unwrap();
                drop(held);
            }
            assert_eq!(pod.wait("a", "e1").await.unwrap(), 137);
            pod.delete("a", "e1").await.unwrap();
            pod.end("a").await;
            pod.shutdown().await;
            daemon.assert_nothing_left();
            stub.heal();
            fs::remove_dir_all(&a.path).unwrap();
            fs::remove_file(&gate.0).unwrap();
        }
    });
}

#[test]
fn a_delete_that_nobody_waits_for_comes_to_its_end() {
    fault(async |daemon, stub| {
        for leaving in BOTH {
            let (mut pod, mut a) = pod(daemon, stub, &shell("exit 6")).await;
            let gate = stub.holds("delete", &mut a);
            pod.run(&a, &Io::none()).await;
            assert_eq!(pod.wait("a", "").await.unwrap(), 6);
            let request = api::DeleteRequest {
                id: "a".into(),
                ..Default::default()
            };
            let held = given_up!(pod, gate, leaving, "Delete", api::DeleteResponse, request);
            // A second one joins the first.
            let (second, ()) = tokio::join!(pod.delete("a", ""), async { drop(held) });
            match second {
                Ok(deleted) => assert_eq!(deleted.exit_status, 6),
                // It came when the first was over.
                Err(refusal) => assert_eq!(refusal.code, Code::NOT_FOUND, "{}", refusal.text),
            }
            refused(pod.state("a", "").await, Code::NOT_FOUND, "container not created");
            pod.shutdown().await;
            let deletes = daemon.told().into_iter().filter(|told| told == "delete a 6");
            assert_eq!(deletes.count(), if leaving == Leaving::Deadline { 1 } else { 2 });
            daemon.assert_nothing_left();
            stub.heal();
            fs::remove_dir_all(&a.path).unwrap();
            fs::remove_file(&gate.0).unwrap();
        }
    });
}

#[test]
fn an_update_that_nobody_waits_for_comes_to_its_end() {
    fault_of_crun(async |daemon, stub| {
        let (mut pod, a) = pod(daemon, stub, &FOREVER).await;
        pod.run(&a, &Io::none()).await;
        for leaving in BOTH {
            let gate = stub.holds_before("update");
            let limit = if leaving == Leaving::Deadline { 51 } else { 52 };
            let request = api::UpdateTaskRequest {
                id: "a".into(),
                resources: Some(containerd_shim_protos::protobuf::well_known_types::any::Any {
                    type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
                    value: json!({"pids": {"limit": limit}}).to_string().into_bytes(),
                    ..Default::default()
                })
                .into(),
                ..Default::default()
            };
            let held = given_up!(pod, gate, leaving, "Update", api::Empty, request);
            drop(held);
            until("the limit", || {
                crate::support::universe::cgroups_named(&crate::support::universe::token())
                    .iter()
                    .any(|cgroup| {
                        fs::read_to_string(cgroup.join("pids.max")).is_ok_and(|max| max.trim() == limit.to_string())
                    })
                    .then_some(())
            })
            .await;
            stub.heal();
            fs::remove_file(&gate.0).unwrap();
        }
        pod.end("a").await;
        pod.shutdown().await;
    });
}

#[test]
fn quick_calls_that_are_given_up_at_once_leave_the_truth() {
    fault(async |daemon, stub| {
        let (mut pod, a) = pod(daemon, stub, &FOREVER).await;
        pod.run(&a, &Io::none()).await;
        // Sent, and the connection cut before the answer.
        macro_rules! cut {
            ($method:literal, $request:ty) => {{
                let mut request = <$request>::new();
                request.id = "a".into();
                let instant = Duration::from_millis(1);
                // Answered or not: both happen.
                let _ = pod
                    .call_bounded::<_, api::Empty>($method, &request, instant)
                    .await;
                pod.reconnect().await;
            }};
        }
        for _ in 0..20 {
            cut!("Stats", api::StatsRequest);
            cut!("Pids", api::PidsRequest);
            cut!("Wait", api::WaitRequest);
            cut!("State", api::StateRequest);
            cut!("Connect", api::ConnectRequest);
            // One that was cut before it was sent is sent again.
            while pod.status("a").await != Status::PAUSED {
                cut!("Pause", api::PauseRequest);
            }
            while pod.status("a").await != Status::RUNNING {
                cut!("Resume", api::ResumeRequest);
            }
        }
        let mut kill = api::KillRequest::new();
        kill.id = "a".into();
        kill.signal = 9;
        let _ = pod
            .call_bounded::<_, api::Empty>("Kill", &kill, Duration::from_millis(1))
            .await;
        pod.reconnect().await;
        let _ = pod.kill("a", "", libc::SIGKILL, false).await;
        assert_eq!(pod.wait("a", "").await.unwrap(), 137);
        pod.delete("a", "").await.unwrap();
        it_works(&pod, &daemon.bundle("b", &["echo", "fine"])).await;
        pod.shutdown().await;
    });
}

#[test]
fn waits_that_nobody_waits_for_keep_nothing_in_the_shim() {
    fault(async |daemon, stub| {
        let (mut pod, a) = pod(daemon, stub, &FOREVER).await;
        pod.run(&a, &Io::none()).await;
        let before = leaks::open_descriptors(pod.pid);
        for _ in 0..50 {
            let mut wait = api::WaitRequest::new();
            wait.id = "a".into();
            let answer = pod
                .call_bounded::<_, api::WaitResponse>("Wait", &wait, Duration::from_millis(2))
                .await;
            assert!(answer.is_err());
            pod.reconnect().await;
            pod.connect("a").await.unwrap();
        }
        until("the connections are closed", || {
            (leaks::open_descriptors(pod.pid) <= before).then_some(())
        })
        .await;
        pod.end("a").await;
        pod.shutdown().await;
    });
}

#[test]
fn a_restarted_containerd_is_answered_while_a_create_hangs() {
    fault(async |daemon, stub| {
        let (mut pod, a) = pod(daemon, stub, &FOREVER).await;
        let pid = pod.run(&a, &Io::none()).await;
        let mut b = daemon.bundle("b", &FOREVER);
        let gate = stub.holds("create", &mut b);
        let io = Io::none();
        let held = gate.holds(pod.create(&b, &io)).await;
        pod.reconnect().await;
        // The gate is still closed.
        assert_eq!(pod.connect("a").await.unwrap(), pid);
        assert_eq!(pod.pids("a").await.unwrap().into_keys().collect::<Vec<_>>(), [pid]);
        assert_eq!(pod.connect("b").await.unwrap(), 0);
        assert_eq!(pod.pids("b").await.unwrap().len(), 0);
        assert_eq!(pod.status("b").await, Status::CREATED);
        drop(held);
        daemon.hears("create b").await;
        for id in ["a", "b"] {
            pod.end(id).await;
        }
        pod.shutdown().await;
    });
}

// ---- signals to the shim -----------------------------------------------------------------------------------------------------------

#[test]
fn a_shim_ignores_the_signals_of_a_session_while_a_container_lives_and_obeys_without_one() {
    fault(async |daemon, stub| {
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            let (pod, a) = pod(daemon, stub, &FOREVER).await;
            let pid = pod.run(&a, &Io::none()).await;
            for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
                send(pod.pid, signal);
                assert_eq!(pod.connect("a").await.unwrap(), pid);
            }
            assert!(lives(pid));
            pod.kill("a", "", libc::SIGKILL, false).await.unwrap();
            pod.wait("a", "").await.unwrap();
            pod.delete("a", "").await.unwrap();
            let shim = pod.pid;
            send(shim, signal);
            until("the shim ends", || (!lives(shim)).then_some(())).await;
            daemon.assert_nothing_left();
            fs::remove_dir_all(&a.path).unwrap();
        }
        assert!(
            !leaks::processes()
                .iter()
                .any(|process| process.command.starts_with(SHIM))
        );
    });
}

// ---- the log -----------------------------------------------------------------------------------------------------------------------

#[test]
fn a_shim_whose_log_nobody_reads_never_waits_for_a_reader() {
    fault(async |daemon, stub| {
        for stuck in [false, true] {
            let a = daemon.bundle("a", &shell("echo fine"));
            // Held open and full, or without any reader.
            let reader = stuck.then(|| {
                let log = a.path.join("log");
                let log = fs::OpenOptions::new().read(true).write(true).open(log).unwrap();
                fill(&log);
                log
            });
            let start = Start {
                reads_log: false,
                ..Start::default()
            };
            let mut pod = Pod::start_with(daemon, &a, &start).await;
            pod.options = stub.options(if stub.is_crun() { "crun_debug = true" } else { "" });
            it_works(&pod, &a).await;
            // Errors are logged too.
            let b = daemon.bundle("b", &["no-such-program"]);
            for _ in 0..20 {
                assert!(pod.create(&b, &Io::none()).await.is_err());
            }
            pod.shutdown().await;
            drop(reader);
            daemon.assert_nothing_left();
            fs::remove_dir_all(&a.path).unwrap();
            fs::remove_dir_all(&b.path).unwrap();
        }
    });
}

/// Writes into a fifo until nothing more goes in.
fn fill(mut fifo: &fs::File) {
    use std::io::Write as _;
    let flags = nix::fcntl::OFlag::O_NONBLOCK;
    nix::fcntl::fcntl(fifo, nix::fcntl::FcntlArg::F_SETFL(flags)).unwrap();
    while fifo.write(&[b'x'; 4096]).is_ok() {}
}
