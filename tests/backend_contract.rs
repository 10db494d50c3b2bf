//! The contract of a backend, seen from containerd's side: one suite, every backend that is built.
//!
//! Drives the real shim over its socket, without containerd. Each backend that `tests/backends` names must pass all of it;
//! `LXCRI_TEST_BACKEND` chooses one.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

/// The part of the harness that needs no containerd.
mod support {
    #![allow(dead_code, reason = "each test file uses another part of the harness")]
    #![allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::print_stderr,
        reason = "a harness fails by panicking"
    )]

    pub(crate) mod backend;
    pub(crate) mod drive;
    pub(crate) mod image;
    pub(crate) mod leaks;
    pub(crate) mod patience;
    pub(crate) mod pod;
    pub(crate) mod skip;
    pub(crate) mod universe;
}

use std::{
    collections::BTreeSet,
    fs,
    io::Write,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
    process::{Command, Stdio},
};

use containerd_shim_protos::{
    api::{self, Status},
    cgroups::metrics::Metrics as MetricsV1,
    cgroups_v2::metrics::Metrics as MetricsV2,
    protobuf::{Message, well_known_types::any::Any},
    ttrpc::Code,
};
use serde_json::json;
use support::{
    backend,
    drive::alone,
    patience::patience,
    pod::{
        Bundle, Daemon, FOREVER, Io, NAMESPACE, Pod, Reading, Start, appears, mount, options, process, refused, shell,
        until,
    },
    universe,
};

/// Runs a test once for each backend, one test at a time, and asserts that nothing is left behind.
fn each_backend<F: AsyncFn(&mut Daemon, &str)>(test: F) {
    on(&backend::wanted(), test);
}

/// Runs a test on crun alone: it is about that program.
fn crun_alone<F: AsyncFn(&mut Daemon, &str)>(test: F) {
    let mut backends = backend::wanted();
    backends.retain(|backend| *backend == "crun");
    on(&backends, test);
}

fn on<F: AsyncFn(&mut Daemon, &str)>(backends: &[&'static str], test: F) {
    backend::each(backends, |backend| alone(async |daemon| test(daemon, backend).await));
}

/// A pod on `backend` with its first bundle.
async fn pod(daemon: &Daemon, backend: &str, args: &[&str]) -> (Pod, Bundle) {
    let bundle = daemon.bundle("a", args);
    let mut pod = Pod::start(daemon, &bundle).await;
    pod.options = Some(options(&format!("backend = \"{backend}\"")));
    (pod, bundle)
}

// ---- lifecycle -------------------------------------------------------------------------------------------------------------------

#[test]
fn a_container_runs_prints_and_exits_with_its_status() {
    each_backend(async |daemon, backend| {
        let (pod, a) = pod(daemon, backend, &shell("echo out; echo err >&2; exit 42")).await;
        let io = Io::fifos(&a.path, "init");
        let (stdout, stderr) = (io.read_stdout(), io.read_stderr());
        let pid = pod.create(&a, &io).await.unwrap();
        assert_eq!(pod.status("a").await, Status::CREATED);
        assert_eq!(pod.pids("a").await.unwrap().len(), 1);
        assert_eq!(pod.start_process("a", "").await.unwrap(), pid);
        assert_eq!(pod.wait("a", "").await.unwrap(), 42);
        assert_eq!(stdout.text().await, "out\n");
        assert_eq!(stderr.text().await, "err\n");
        let state = pod.state("a", "").await.unwrap();
        assert_eq!((state.pid, state.exit_status, state.id.as_str()), (pid, 42, "a"));
        assert_eq!(state.status, Status::STOPPED.into());
        assert_eq!((state.stdout, state.bundle), (io.stdout, a.path.display().to_string()));
        let deleted = pod.delete("a", "").await.unwrap();
        assert_eq!((deleted.pid, deleted.exit_status), (pid, 42));
        refused(pod.state("a", "").await, Code::NOT_FOUND, "container not created");
        assert_eq!(
            daemon.hears("delete a 42").await,
            ["create a", "start a", "exit a 42", "delete a 42"]
        );
        pod.shutdown().await;
    });
}

#[test]
fn both_versions_of_the_task_service_answer_alike() {
    each_backend(async |daemon, backend| {
        let (mut pod, a) = pod(daemon, backend, &FOREVER).await;
        pod.run(&a, &Io::none()).await;
        let second = pod.state("a", "").await.unwrap();
        pod.speak("containerd.task.v3.Task");
        assert_eq!(pod.state("a", "").await.unwrap(), second);
        pod.end("a").await;
        pod.shutdown().await;
    });
}

#[test]
fn an_instant_exit_never_overtakes_its_start() {
    each_backend(async |daemon, backend| {
        let (pod, first) = pod(daemon, backend, &["true"]).await;
        for n in 0..30 {
            let bundle = if n == 0 {
                first.clone()
            } else {
                daemon.bundle(&format!("c{n}"), &["true"])
            };
            let id = bundle.id.as_str();
            pod.run(&bundle, &Io::none()).await;
            assert_eq!(pod.wait(id, "").await.unwrap(), 0);
            pod.delete(id, "").await.unwrap();
            let told = daemon.hears(&format!("delete {id} 0")).await;
            let own: Vec<_> = told.iter().filter(|told| told.split(' ').nth(1) == Some(id)).collect();
            assert_eq!(
                own,
                [
                    &format!("create {id}"),
                    &format!("start {id}"),
                    &format!("exit {id} 0"),
                    &format!("delete {id} 0")
                ]
            );
        }
        pod.shutdown().await;
    });
}

#[test]
fn a_signal_is_128_more_as_an_exit_status() {
    each_backend(async |daemon, backend| {
        let (pod, a) = pod(daemon, backend, &FOREVER).await;
        pod.run(&a, &Io::none()).await;
        // Pid 1 takes only what it handles, and SIGKILL.
        for (exec, signal) in [
            ("hup", libc::SIGHUP),
            ("term", libc::SIGTERM),
            ("usr", libc::SIGUSR1),
            ("kill", libc::SIGKILL),
        ] {
            pod.exec("a", exec, &process(&FOREVER), &Io::none()).await.unwrap();
            pod.start_process("a", exec).await.unwrap();
            pod.kill("a", exec, signal, false).await.unwrap();
            assert_eq!(pod.wait("a", exec).await.unwrap(), 128 + signal.cast_unsigned());
        }
        pod.kill("a", "", libc::SIGKILL, false).await.unwrap();
        assert_eq!(pod.wait("a", "").await.unwrap(), 137);
        refused(
            pod.kill("a", "", libc::SIGTERM, false).await,
            Code::NOT_FOUND,
            "process already finished",
        );
        refused(
            pod.kill("a", "", libc::SIGKILL, true).await,
            Code::NOT_FOUND,
            "process already finished",
        );
        pod.delete("a", "").await.unwrap();
        pod.shutdown().await;
    });
}

#[test]
fn kill_all_reaches_every_process_of_the_container() {
    each_backend(async |daemon, backend| {
        let (pod, a) = pod(
            daemon,
            backend,
            &shell("trap 'exit 3' TERM; sleep 1000 & sleep 1000 & touch /ready; wait"),
        )
        .await;
        pod.run(&a, &Io::none()).await;
        appears(&a.path.join("upper/ready")).await;
        assert!(pod.pids("a").await.unwrap().len() >= 3);
        pod.kill("a", "", libc::SIGTERM, true).await.unwrap();
        assert_eq!(pod.wait("a", "").await.unwrap(), 3);
        pod.delete("a", "").await.unwrap();
        pod.shutdown().await;
    });
}

#[test]
fn a_created_container_can_be_deleted_and_never_ran() {
    each_backend(async |daemon, backend| {
        let (pod, a) = pod(daemon, backend, &["touch", "/ran"]).await;
        pod.create(&a, &Io::none()).await.unwrap();
        assert_eq!(pod.delete("a", "").await.unwrap().exit_status, 137);
        assert!(!a.path.join("upper/ran").exists());
        pod.shutdown().await;
    });
}

#[test]
fn what_runs_is_not_deleted_and_what_exists_not_created_twice() {
    each_backend(async |daemon, backend| {
        let (pod, a) = pod(daemon, backend, &FOREVER).await;
        let pid = pod.run(&a, &Io::none()).await;
        refused(
            pod.delete("a", "").await,
            Code::FAILED_PRECONDITION,
            "cannot delete a running process",
        );
        refused(pod.create(&a, &Io::none()).await, Code::ALREADY_EXISTS, "a");
        refused(
            pod.start_process("a", "").await,
            Code::FAILED_PRECONDITION,
            "cannot start a running process",
        );
        assert_eq!(pod.state("a", "").await.unwrap().pid, pid);
        assert_eq!(pod.status("a").await, Status::RUNNING);
        pod.end("a").await;
        pod.shutdown().await;
    });
}

#[test]
fn unknown_things_are_not_found() {
    each_backend(async |daemon, backend| {
        let (pod, a) = pod(daemon, backend, &FOREVER).await;
        refused(pod.state("nope", "").await, Code::NOT_FOUND, "nope");
        refused(pod.start_process("nope", "").await, Code::NOT_FOUND, "nope");
        refused(pod.delete("nope", "").await, Code::NOT_FOUND, "nope");
        refused(pod.pids("nope").await, Code::NOT_FOUND, "nope");
        refused(pod.wait("nope", "").await, Code::NOT_FOUND, "nope");
        refused(pod.stats("nope").await, Code::NOT_FOUND, "nope");
        pod.run(&a, &Io::none()).await;
        refused(
            pod.state("a", "nope").await,
            Code::NOT_FOUND,
            "process does not exist nope",
        );
        refused(
            pod.start_process("a", "nope").await,
            Code::NOT_FOUND,
            "process does not exist nope",
        );
        refused(
            pod.kill("a", "nope", 9, false).await,
            Code::NOT_FOUND,
            "process does not exist nope",
        );
        pod.end("a").await;
        pod.shutdown().await;
    });
}

// ---- exec ------------------------------------------------------------------------------------------------------------------------

#[test]
fn an_exec_runs_beside_init_with_stdio_and_status_of_its_own() {
    each_backend(async |daemon, backend| {
        let (pod, a) = pod(daemon, backend, &FOREVER).await;
        let init = pod.run(&a, &Io::none()).await;
        let io = Io::fifos(&a.path, "e1");
        let (stdout, stderr) = (io.read_stdout(), io.read_stderr());
        let mut spec = process(&shell("echo $WHO at $(pwd); id -u; echo oops >&2; read line; exit 9"));
        spec["env"] = json!(["PATH=/bin", "WHO=me"]);
        spec["cwd"] = "/tmp".into();
        spec["user"] = json!({"uid": 1000, "gid": 1000});
        pod.exec("a", "e1", &spec, &io).await.unwrap();
        refused(pod.exec("a", "e1", &spec, &io).await, Code::ALREADY_EXISTS, "e1");
        refused(
            pod.kill("a", "e1", 9, false).await,
            Code::NOT_FOUND,
            "process not created",
        );
        let mut stdin = io.open_stdin();
        let pid = pod.start_process("a", "e1").await.unwrap();
        assert_ne!(pid, init);
        let pids = pod.pids("a").await.unwrap();
        assert_eq!((pids[&pid].as_str(), pids[&init].as_str()), ("e1", ""));
        refused(
            pod.delete("a", "e1").await,
            Code::FAILED_PRECONDITION,
            "cannot delete a running process",
        );
        stdin.write_all(b"go\n").unwrap();
        assert_eq!(pod.wait("a", "e1").await.unwrap(), 9);
        assert_eq!(stdout.text().await, "me at /tmp\n1000\n");
        assert_eq!(stderr.text().await, "oops\n");
        assert_eq!(pod.delete("a", "e1").await.unwrap().exit_status, 9);
        refused(pod.state("a", "e1").await, Code::NOT_FOUND, "process does not exist e1");
        assert_eq!(
            daemon.hears("exit e1 9").await,
            ["create a", "start a", "exec-added e1", "exec-started e1", "exit e1 9"]
        );
        pod.end("a").await;
        pod.shutdown().await;
    });
}

#[test]
fn the_exits_of_execs_come_before_that_of_init() {
    each_backend(async |daemon, backend| {
        let (pod, a) = pod(daemon, backend, &FOREVER).await;
        pod.run(&a, &Io::none()).await;
        for exec in ["e1", "e2", "e3"] {
            pod.exec("a", exec, &process(&FOREVER), &Io::none()).await.unwrap();
            pod.start_process("a", exec).await.unwrap();
        }
        pod.exec("a", "late", &process(&FOREVER), &Io::none()).await.unwrap();
        pod.kill("a", "", libc::SIGKILL, false).await.unwrap();
        assert_eq!(pod.wait("a", "").await.unwrap(), 137);
        let told = daemon.hears("exit a 137").await;
        let exits: Vec<_> = told.iter().filter(|told| told.starts_with("exit ")).collect();
        assert_eq!(exits.len(), 4, "{told:?}");
        assert_eq!(exits[3], "exit a 137");
        refused(
            pod.start_process("a", "late").await,
            Code::FAILED_PRECONDITION,
            "init process is not running",
        );
        pod.delete("a", "").await.unwrap();
        pod.shutdown().await;
    });
}

#[test]
fn a_missing_program_is_named_in_the_words_that_clients_match() {
    each_backend(async |daemon, backend| {
        let (pod, a) = pod(daemon, backend, &["no-such-program"]).await;
        let refusal = pod.create(&a, &Io::none()).await.unwrap_err().text;
        assert!(refusal.contains("OCI runtime create failed: "), "{refusal}");
        assert!(refusal.contains("executable file not found in $PATH"), "{refusal}");
        assert!(refusal.contains("no-such-program"), "{refusal}");
        refused(pod.state("a", "").await, Code::NOT_FOUND, "container not created");
        let b = daemon.bundle("b", &FOREVER);
        pod.run(&b, &Io::none()).await;
        pod.exec("b", "e1", &process(&["no-such-program"]), &Io::none())
            .await
            .unwrap();
        let refusal = pod.start_process("b", "e1").await.unwrap_err().text;
        assert!(refusal.contains("OCI runtime exec failed: "), "{refusal}");
        assert!(refusal.contains("executable file not found in $PATH"), "{refusal}");
        pod.delete("b", "e1").await.unwrap();
        pod.end("b").await;
        pod.shutdown().await;
    });
}

// ---- stdio -----------------------------------------------------------------------------------------------------------------------

#[test]
fn no_byte_of_20_mib_is_lost_from_stdin_to_stdout() {
    each_backend(async |daemon, backend| {
        let (pod, a) = pod(daemon, backend, &["cat"]).await;
        let io = Io::fifos(&a.path, "init");
        let stdout = io.read_stdout();
        let mut stdin = io.open_stdin();
        pod.run(&a, &io).await;
        let sent: Vec<u8> = (0..20 << 20).map(|n: u32| (n % 251) as u8).collect();
        let writer = {
            let sent = sent.clone();
            tokio::task::spawn_blocking(move || stdin.write_all(&sent).unwrap())
        };
        writer.await.unwrap();
        // The client has gone; only CloseIO is the end of the input.
        assert_eq!(pod.status("a").await, Status::RUNNING);
        pod.close_stdin("a", "").await.unwrap();
        assert_eq!(pod.wait("a", "").await.unwrap(), 0);
        assert!(stdout.bytes().await == sent, "stdout differs from stdin");
        pod.delete("a", "").await.unwrap();
        pod.shutdown().await;
    });
}

#[test]
fn what_was_written_right_before_the_exit_arrives() {
    each_backend(async |daemon, backend| {
        let (pod, a) = pod(daemon, backend, &shell("head -c 8388608 /dev/zero | tr '\\0' x")).await;
        let io = Io::fifos(&a.path, "init");
        let stdout = io.read_stdout();
        pod.run(&a, &io).await;
        assert_eq!(pod.wait("a", "").await.unwrap(), 0);
        pod.delete("a", "").await.unwrap();
        let bytes = stdout.bytes().await;
        assert_eq!(bytes.len(), 8 << 20);
        assert!(bytes.iter().all(|byte| *byte == b'x'));
        pod.shutdown().await;
    });
}

#[test]
fn a_reader_may_leave_and_come_back() {
    each_backend(async |daemon, backend| {
        let (pod, a) = pod(daemon, backend, &shell("while read line; do echo got $line; done")).await;
        let io = Io::fifos(&a.path, "init");
        let mut stdin = io.open_stdin();
        let mut first = fs::OpenOptions::new().read(true).write(true).open(&io.stdout).unwrap();
        pod.run(&a, &io).await;
        stdin.write_all(b"one\n").unwrap();
        let mut line = [0; 8];
        std::io::Read::read_exact(&mut first, &mut line).unwrap();
        assert_eq!(&line, b"got one\n");
        drop(first);
        stdin.write_all(b"two\n").unwrap();
        let second = io.read_stdout();
        stdin.write_all(b"three\n").unwrap();
        drop(stdin);
        pod.close_stdin("a", "").await.unwrap();
        assert_eq!(pod.wait("a", "").await.unwrap(), 0);
        assert_eq!(second.text().await, "got two\ngot three\n");
        pod.delete("a", "").await.unwrap();
        pod.shutdown().await;
    });
}

#[test]
fn a_reader_that_never_reads_does_not_hang_delete() {
    each_backend(async |daemon, backend| {
        let (mut pod, a) = pod(
            daemon,
            backend,
            &shell("head -c 400000 /dev/zero & sleep 0.1; kill -9 $!; exit 0"),
        )
        .await;
        pod.options = Some(options(&format!("backend = \"{backend}\"\ndrain_timeout_ms = 200")));
        let io = Io::fifos(&a.path, "init");
        pod.run(&a, &io).await;
        assert_eq!(pod.wait("a", "").await.unwrap(), 0);
        pod.delete("a", "").await.unwrap();
        pod.shutdown().await;
    });
}

#[test]
fn a_grandchild_that_holds_the_output_does_not_hang_the_delete_of_its_exec() {
    each_backend(async |daemon, backend| {
        let (mut pod, a) = pod(daemon, backend, &FOREVER).await;
        pod.options = Some(options(&format!("backend = \"{backend}\"\ndrain_timeout_ms = 200")));
        pod.run(&a, &Io::none()).await;
        let io = Io::fifos(&a.path, "e1");
        let stdout = io.read_stdout();
        pod.exec("a", "e1", &process(&shell("sleep 1000 & echo done")), &io)
            .await
            .unwrap();
        pod.start_process("a", "e1").await.unwrap();
        assert_eq!(pod.wait("a", "e1").await.unwrap(), 0);
        pod.delete("a", "e1").await.unwrap();
        assert_eq!(stdout.text().await, "done\n");
        pod.end("a").await;
        pod.shutdown().await;
    });
}

#[test]
fn a_terminal_is_a_terminal_that_can_be_resized() {
    each_backend(async |daemon, backend| {
        let (pod, mut a) = pod(daemon, backend, &shell("tty; read line; stty size; exit 4")).await;
        a.spec["process"]["terminal"] = true.into();
        let io = Io::terminal(&a.path, "init");
        let stdout = io.read_stdout();
        let mut stdin = io.open_stdin();
        pod.run(&a, &io).await;
        pod.resize("a", "", 132, 43).await.unwrap();
        stdin.write_all(b"go\n").unwrap();
        assert_eq!(pod.wait("a", "").await.unwrap(), 4);
        let text = stdout.text().await;
        assert!(text.contains("/dev/"), "{text:?}");
        assert!(text.contains("43 132"), "{text:?}");
        pod.delete("a", "").await.unwrap();
        pod.shutdown().await;
    });
}

#[test]
fn an_exec_with_a_terminal_beside_an_init_without_one() {
    each_backend(async |daemon, backend| {
        let (pod, a) = pod(daemon, backend, &FOREVER).await;
        pod.run(&a, &Io::none()).await;
        let io = Io::terminal(&a.path, "e1");
        let stdout = io.read_stdout();
        pod.exec("a", "e1", &process(&shell("test -t 0 && test -t 1 && echo yes")), &io)
            .await
            .unwrap();
        pod.start_process("a", "e1").await.unwrap();
        assert_eq!(pod.wait("a", "e1").await.unwrap(), 0);
        assert_eq!(stdout.text().await, "yes\r\n");
        pod.delete("a", "e1").await.unwrap();
        pod.resize("a", "", 80, 25).await.unwrap();
        pod.end("a").await;
        pod.shutdown().await;
    });
}

#[test]
fn output_can_go_to_a_file_and_to_a_logger() {
    each_backend(async |daemon, backend| {
        let (pod, a) = pod(daemon, backend, &shell("echo to the file")).await;
        let file = a.path.join("log/../logs/out.log");
        let file = Path::new("/").join(file.strip_prefix("/").unwrap().to_string_lossy().replace("log/../", ""));
        let io = Io {
            stdout: format!("file://{}", file.display()),
            ..Io::none()
        };
        pod.run(&a, &io).await;
        pod.wait("a", "").await.unwrap();
        pod.delete("a", "").await.unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "to the file\n");

        let b = daemon.bundle("b", &shell("echo to the logger; echo and this >&2"));
        let logger = b.path.join("logger");
        let script = "#!/bin/sh\nexec 5>&-\necho \"$CONTAINER_NAMESPACE $CONTAINER_ID $*\" >$2.who\ncat <&3 >$2.out\ncat <&4 >$2.err\nmv $2.err $2.done\n";
        fs::write(&logger, script).unwrap();
        fs::set_permissions(&logger, fs::Permissions::from_mode(0o755)).unwrap();
        let uri = format!("binary://{}?to={}", logger.display(), b.path.join("to").display());
        let io = Io {
            stdout: uri.clone(),
            stderr: uri,
            ..Io::none()
        };
        pod.run(&b, &io).await;
        pod.wait("b", "").await.unwrap();
        pod.delete("b", "").await.unwrap();
        appears(&b.path.join("to.done")).await;
        assert_eq!(fs::read_to_string(b.path.join("to.out")).unwrap(), "to the logger\n");
        assert_eq!(fs::read_to_string(b.path.join("to.done")).unwrap(), "and this\n");
        assert_eq!(
            fs::read_to_string(b.path.join("to.who")).unwrap(),
            format!("contract b to {}\n", b.path.join("to").display())
        );
        pod.shutdown().await;
    });
}

// ---- pause, update, stats, OOM ---------------------------------------------------------------------------------------------------

#[test]
fn a_paused_container_stands_still_takes_no_exec_and_can_be_killed() {
    each_backend(async |daemon, backend| {
        let (pod, a) = pod(daemon, backend, &FOREVER).await;
        refused(pod.pause("a").await, Code::NOT_FOUND, "a");
        pod.run(&a, &Io::none()).await;
        pod.pause("a").await.unwrap();
        assert_eq!(pod.status("a").await, Status::PAUSED);
        refused(
            pod.exec("a", "e1", &process(&["true"]), &Io::none()).await,
            Code::FAILED_PRECONDITION,
            "cannot exec in a paused state",
        );
        refused(
            pod.pause("a").await,
            Code::FAILED_PRECONDITION,
            "cannot pause task in paused state",
        );
        refused(
            pod.delete("a", "").await,
            Code::FAILED_PRECONDITION,
            "cannot delete a running process",
        );
        pod.resume("a").await.unwrap();
        assert_eq!(pod.status("a").await, Status::RUNNING);
        refused(
            pod.resume("a").await,
            Code::FAILED_PRECONDITION,
            "cannot resume task in running state",
        );
        pod.exec("a", "e1", &process(&["true"]), &Io::none()).await.unwrap();
        pod.start_process("a", "e1").await.unwrap();
        assert_eq!(pod.wait("a", "e1").await.unwrap(), 0);
        pod.pause("a").await.unwrap();
        pod.kill("a", "", libc::SIGKILL, false).await.unwrap();
        assert_eq!(pod.wait("a", "").await.unwrap(), 137);
        pod.delete("a", "").await.unwrap();
        let told = daemon.hears("delete a 137").await;
        assert_eq!(told[2..4], ["paused a", "resumed a"]);
        pod.shutdown().await;
    });
}

#[test]
fn a_paused_container_dies_by_kill_all() {
    each_backend(async |daemon, backend| {
        let (pod, a) = pod(daemon, backend, &FOREVER).await;
        pod.run(&a, &Io::none()).await;
        pod.pause("a").await.unwrap();
        pod.kill("a", "", libc::SIGKILL, true).await.unwrap();
        assert_eq!(pod.wait("a", "").await.unwrap(), 137);
        pod.delete("a", "").await.unwrap();
        pod.shutdown().await;
    });
}

#[test]
fn stats_are_those_of_the_containers_cgroup() {
    each_backend(async |daemon, backend| {
        let (pod, a) = pod(daemon, backend, &shell("touch /ready; while :; do :; done")).await;
        pod.run(&a, &Io::none()).await;
        appears(&a.path.join("upper/ready")).await;
        let stats = pod.stats("a").await.unwrap();
        if support::pod::cgroup_v2() {
            assert_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics");
            let metrics = MetricsV2::parse_from_bytes(&stats.value).unwrap();
            assert!(metrics.pids.current > 0);
            assert!(metrics.memory.usage > 0 && metrics.cpu.usage_usec > 0, "{metrics:?}");
        } else {
            assert_eq!(stats.type_url, "io.containerd.cgroups.v1.Metrics");
            let metrics = MetricsV1::parse_from_bytes(&stats.value).unwrap();
            assert!(metrics.pids.current > 0);
            assert!(
                metrics.memory.usage.usage > 0 && metrics.cpu.usage.total > 0,
                "{metrics:?}"
            );
        }
        pod.end("a").await;
        pod.shutdown().await;
    });
}

#[test]
fn update_changes_the_limits_of_a_running_container() {
    each_backend(async |daemon, backend| {
        let (pod, a) = pod(daemon, backend, &FOREVER).await;
        pod.run(&a, &Io::none()).await;
        pod.update("a", &json!({"memory": {"limit": 64 << 20}, "pids": {"limit": 77}}))
            .await
            .unwrap();
        let stats = pod.stats("a").await.unwrap().value;
        let (memory, pids) = match support::pod::cgroup_v2() {
            true => {
                let metrics = MetricsV2::parse_from_bytes(&stats).unwrap();
                (metrics.memory.usage_limit, metrics.pids.limit)
            }
            false => {
                let metrics = MetricsV1::parse_from_bytes(&stats).unwrap();
                (metrics.memory.usage.limit, metrics.pids.limit)
            }
        };
        assert_eq!((memory, pids), (64 << 20, 77));
        assert!(pod.update("a", &json!("garbage")).await.is_err());
        pod.end("a").await;
        pod.shutdown().await;
    });
}

#[test]
fn an_oom_is_told_before_the_exit_that_it_caused() {
    each_backend(async |daemon, backend| {
        let (pod, mut a) = pod(daemon, backend, &shell("x=a; while :; do x=$x$x; done")).await;
        a.spec["linux"]["resources"]["memory"] = json!({"limit": 16 << 20, "swap": 16 << 20});
        pod.run(&a, &Io::none()).await;
        assert_eq!(pod.wait("a", "").await.unwrap(), 137);
        let told = daemon.hears("exit a 137").await;
        assert_eq!(told, ["create a", "start a", "oom a", "exit a 137"]);
        pod.delete("a", "").await.unwrap();
        pod.shutdown().await;
    });
}

// ---- what containers are made of ---------------------------------------------------------------------------------------------------

#[test]
fn one_shim_serves_a_pod_whose_containers_share_namespaces_by_path() {
    each_backend(async |daemon, backend| {
        let sandbox = daemon
            .bundle("sandbox", &FOREVER)
            .annotate("io.kubernetes.cri.sandbox-id", "sandbox");
        let mut first = Pod::start(daemon, &sandbox).await;
        first.options = Some(options(&format!("backend = \"{backend}\"")));
        let pid = first.run(&sandbox, &Io::none()).await;
        let mut app = daemon
            .bundle(
                "app",
                &shell("readlink /proc/self/ns/net; sleep 1000 & touch /ready; exec sleep 1000"),
            )
            .annotate("io.kubernetes.cri.sandbox-id", "sandbox");
        app.joins(pid, &["network", "pid", "ipc", "uts"]);
        let again = Pod::start(daemon, &app).await;
        assert_eq!((again.pid, &again.address), (first.pid, &first.address));
        let io = Io::fifos(&app.path, "init");
        let stdout = io.read_stdout();
        let app_pid = first.run(&app, &io).await;
        appears(&app.path.join("upper/ready")).await;
        assert!(first.pids("app").await.unwrap().len() >= 2);
        for namespace in ["net", "ipc", "uts", "pid"] {
            let of = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
            assert_eq!(of(pid), of(app_pid), "{namespace}");
        }
        // Its background process lives in the sandbox's pid namespace: nobody but the shim ends it.
        first.kill("app", "", libc::SIGKILL, false).await.unwrap();
        assert_eq!(first.wait("app", "").await.unwrap(), 137);
        assert!(stdout.text().await.starts_with("net:["));
        first.delete("app", "").await.unwrap();
        assert_eq!(first.status("sandbox").await, Status::RUNNING);
        let again = first
            .call::<_, api::Empty>("Shutdown", &api::ShutdownRequest::default())
            .await;
        again.unwrap();
        assert_eq!(first.status("sandbox").await, Status::RUNNING);
        first.end("sandbox").await;
        first.shutdown().await;
    });
}

#[test]
fn a_user_namespace_maps_root_to_nobody_special() {
    each_backend(async |daemon, backend| {
        let (pod, mut a) = pod(
            daemon,
            backend,
            &shell("cat /proc/self/uid_map; touch /tmp/mine; sleep 1000"),
        )
        .await;
        let ids = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        a.spec["linux"]["uidMappings"] = ids.clone();
        a.spec["linux"]["gidMappings"] = ids;
        a.spec["linux"]["namespaces"]
            .as_array_mut()
            .unwrap()
            .push(json!({"type": "user"}));
        let io = Io::fifos(&a.path, "init");
        let mut stdout = fs::OpenOptions::new().read(true).write(true).open(&io.stdout).unwrap();
        let pid = pod.run(&a, &io).await;
        let mut line = [0; 64];
        let read = tokio::task::spawn_blocking(move || {
            std::io::Read::read(&mut stdout, &mut line).map(|n| line[..n].to_vec())
        });
        let line = String::from_utf8(read.await.unwrap().unwrap()).unwrap();
        assert_eq!(line.split_whitespace().collect::<Vec<_>>(), ["0", "100000", "65536"]);
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert!(status.contains("Uid:\t100000\t"), "{status}");
        pod.end("a").await;
        pod.shutdown().await;
    });
}

/// As containerd's CRI makes a pod with `hostUsers: false`: the maps stand beside the path.
#[test]
fn containers_of_a_pod_share_its_user_namespace() {
    each_backend(async |daemon, backend| {
        let ids = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        let with_users = |bundle: &mut Bundle, namespace: serde_json::Value| {
            let linux = &mut bundle.spec["linux"];
            linux["uidMappings"] = ids.clone();
            linux["gidMappings"] = ids.clone();
            linux["namespaces"].as_array_mut().unwrap().push(namespace);
        };
        let (pod, mut sandbox) = pod(daemon, backend, &FOREVER).await;
        with_users(&mut sandbox, json!({"type": "user"}));
        let pid = pod.run(&sandbox, &Io::none()).await;
        let of_sandbox = |file: &str| fs::read_link(format!("/proc/{pid}/ns/{file}")).unwrap();

        let look = "id -u; id -g; cat /proc/self/uid_map; grep CapEff /proc/self/status; touch /tmp/$1; stat -c %u /tmp/$1; \
            cd /proc/self/ns; readlink user; readlink net; readlink ipc; hostname";
        let args = |name| [shell(look).as_slice(), &["sh", name]].concat();
        let mut app = daemon.bundle("b", &args("init"));
        with_users(&mut app, json!({"type": "user"}));
        app.joins(pid, &["network", "user", "ipc", "uts"]);
        let chown = json!(["CAP_CHOWN"]);
        app.spec["process"]["capabilities"] = json!({"bounding": chown, "permitted": chown, "effective": chown});
        let io = Io::fifos(&app.path, "init");
        let stdout = io.read_stdout();
        pod.run(&app, &io).await;
        assert_eq!(pod.wait("b", "").await.unwrap(), 0);
        let joined = ["user", "net", "ipc"].map(|kind| of_sandbox(kind).display().to_string());
        let wanted = format!("0 0 0 100000 65536 CapEff: 0000000000000001 0 {} ", joined.join(" "));
        let words = |text: String| text.split_whitespace().collect::<Vec<_>>().join(" ");
        let said = words(stdout.text().await);
        assert!(said.starts_with(&wanted), "{said}");
        pod.delete("b", "").await.unwrap();

        let io = Io::fifos(&sandbox.path, "e1");
        let stdout = io.read_stdout();
        let mut process = process(&args("exec"));
        process["capabilities"] = app.spec["process"]["capabilities"].clone();
        pod.exec("a", "e1", &process, &io).await.unwrap();
        pod.start_process("a", "e1").await.unwrap();
        assert_eq!(pod.wait("a", "e1").await.unwrap(), 0);
        let said = words(stdout.text().await);
        assert!(said.starts_with(&wanted), "{said}");
        pod.end("a").await;
        pod.shutdown().await;
    });
}

/// Profiles of AppArmor with these names, until it is dropped: what has one of them may do all but write below `/denied`.
struct Profiles(String);

impl Profiles {
    /// With the rules that each has beside those about files.
    fn load(all: &[(&str, &str)]) -> Self {
        let profile = |(name, rules): &(&str, &str)| {
            format!("profile {name} flags=(attach_disconnected) {{ file, deny /denied/** w, {rules} }}\n")
        };
        let text: String = all.iter().map(profile).collect();
        parse_profiles("--replace", &text);
        Self(text)
    }
}

impl Drop for Profiles {
    fn drop(&mut self) {
        // Another panic would end the program, and tell nothing of the first.
        if !std::thread::panicking() {
            parse_profiles("--remove", &self.0);
        }
    }
}

fn parse_profiles(action: &str, text: &str) {
    let mut parser = Command::new("apparmor_parser");
    let mut child = parser
        .args([action, "--skip-cache"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "apparmor_parser {action}");
}

#[test]
fn a_process_is_confined_by_the_apparmor_profile_that_it_asks_for() {
    let enabled = fs::read_to_string("/sys/module/apparmor/parameters/enabled").unwrap_or_default();
    if enabled != "Y\n" {
        return support::skip::skip(
            "backend_contract::a_process_is_confined_by_the_apparmor_profile_that_it_asks_for",
            "AppArmor is not enabled in this kernel",
        );
    }
    each_backend(async |daemon, backend| {
        // Profiles are the machine's, whoever else runs tests on it.
        let own = |name: &str| format!("{}-{name}", universe::token());
        let [init, other, deaf, lost] = ["init", "exec", "deaf", "lost"].map(own);
        let rules = "capability, network, signal,";
        let _profiles = Profiles::load(&[(&init, rules), (&other, rules), (&deaf, "capability, network,")]);
        let try_it = "cat /proc/self/attr/current; mkdir -p /denied /free; touch /free/file /denied/file; echo $?";
        let denied = |profile: &str| format!("{profile} (enforce)\n1\n");
        let (pod, mut a) = pod(daemon, backend, &shell(&format!("{try_it}; sleep 1000"))).await;
        a.spec["process"]["apparmorProfile"] = init.as_str().into();
        // What init runs before the program is confined as well.
        let hook = json!(["sh", "-c", "cat /proc/self/attr/current >/hook"]);
        a.spec["hooks"] = json!({"startContainer": [{"path": "/bin/sh", "args": hook}]});
        let io = Io::fifos(&a.path, "init");
        let stdout = io.read_stdout();
        pod.run(&a, &io).await;
        appears(&a.path.join("upper/free/file")).await;
        let hook = fs::read_to_string(a.path.join("upper/hook")).unwrap();
        assert_eq!(hook, format!("{init} (enforce)\n"));
        for (exec, own, wanted) in [
            ("e1", None, denied(&init)),
            ("e2", Some(other.as_str()), denied(&other)),
            ("e3", Some("unconfined"), "unconfined\n0\n".into()),
        ] {
            let mut process = process(&shell(try_it));
            if let Some(own) = own {
                process["apparmorProfile"] = own.into();
            }
            let (_, text) = pod.exec_says(&a, exec, &process).await;
            assert_eq!(text, wanted, "{exec}");
        }
        let mut process = process(&["true"]);
        process["apparmorProfile"] = lost.as_str().into();
        pod.exec("a", "e4", &process, &Io::none()).await.unwrap();
        let text = format!("cannot set process.apparmorProfile {lost:?}; is it loaded?");
        let (code, text) = match backend {
            "crun" => (Code::UNKNOWN, "attr/apparmor/exec`: No such file or directory"),
            _ => (Code::INVALID_ARGUMENT, text.as_str()),
        };
        refused(pod.start_process("a", "e4").await, code, text);
        pod.end("a").await;
        assert_eq!(stdout.text().await, denied(&init));

        let mut b = daemon.bundle("b", &["true"]);
        b.spec["process"]["apparmorProfile"] = lost.as_str().into();
        refused(pod.create(&b, &Io::none()).await, code, text);
        refused(pod.state("b", "").await, Code::NOT_FOUND, "container not created");
        // A hook that no signal reaches is not waited for. crun knows no time of these hooks.
        if backend != "crun" {
            let mut c = daemon.bundle("c", &["true"]);
            c.spec["process"]["apparmorProfile"] = deaf.as_str().into();
            let hook = json!({"path": "/bin/sleep", "args": ["sleep", "100000"], "timeout": 1});
            c.spec["hooks"] = json!({"startContainer": [hook]});
            pod.create(&c, &Io::none()).await.unwrap();
            let text = "not ended, and not to be killed (EACCES: Permission denied) after 1 s, its timeout";
            refused(pod.start_process("c", "").await, Code::DEADLINE_EXCEEDED, text);
            pod.wait("c", "").await.unwrap();
            pod.delete("c", "").await.unwrap();
        }
        pod.shutdown().await;
    });
}

/// The labels of the keyrings that this user may see.
fn labels_of_keyrings() -> BTreeSet<String> {
    let keys = fs::read_to_string("/proc/keys").unwrap();
    let rings = keys.lines().filter(|line| line.contains(" keyring "));
    rings
        .filter_map(|line| {
            let id = i32::from_str_radix(line.split(' ').next().unwrap(), 16).unwrap();
            let mut label = [0_u8; 64];
            // SAFETY: the kernel writes at most as many bytes as it is told. One that is gone meanwhile is an error.
            let size = unsafe {
                libc::syscall(
                    libc::SYS_keyctl,
                    libc::KEYCTL_GET_SECURITY,
                    id,
                    label.as_mut_ptr(),
                    label.len(),
                )
            };
            let size = usize::try_from(size).ok()?;
            Some(
                String::from_utf8_lossy(&label[..size.min(label.len())])
                    .trim_end_matches('\0')
                    .to_owned(),
            )
        })
        .collect()
}

/// The policy with these labels is the node's: tests/node/guest/selinux.cil.
#[test]
fn a_process_and_its_mounts_have_the_selinux_labels_that_they_ask_for() {
    // The kernel takes there what its policy knows.
    if fs::write("/sys/fs/selinux/context", "u:r:init_t").is_err() {
        return support::skip::skip(
            "backend_contract::a_process_and_its_mounts_have_the_selinux_labels_that_they_ask_for",
            "no SELinux with the tests' policy",
        );
    }
    each_backend(async |daemon, backend| {
        // Keyrings live as long as somebody has them: each backend has labels that the other has not.
        let [init, other] = match backend {
            "crun" => ["u:r:crun_init_t", "u:r:crun_exec_t"],
            _ => ["u:r:init_t", "u:r:exec_t"],
        };
        let look = "cat /proc/self/attr/current; echo; grep -o 'context=[^, ]*' /proc/mounts | sort -u; touch /ready";
        let (pod, mut a) = pod(daemon, backend, &shell(&format!("{look}; sleep 1000"))).await;
        a.spec["process"]["selinuxLabel"] = init.into();
        a.spec["linux"]["mountLabel"] = "u:r:mount_t".into();
        let io = Io::fifos(&a.path, "init");
        let stdout = io.read_stdout();
        pod.run(&a, &io).await;
        appears(&a.path.join("upper/ready")).await;
        let rings = labels_of_keyrings();
        assert!(rings.contains(init), "{rings:?}");
        let labels = |process: &str| format!("{process}\0\ncontext=u:r:mount_t\n");
        for (exec, own, wanted) in [("e1", None, init), ("e2", Some(other), other)] {
            let mut process = process(&shell(look));
            if let Some(own) = own {
                process["selinuxLabel"] = own.into();
            }
            let (_, text) = pod.exec_says(&a, exec, &process).await;
            assert_eq!(text, labels(wanted), "{exec}");
        }
        let (code, text) = match backend {
            "crun" => (Code::UNKNOWN, ": Invalid argument"),
            _ => (Code::INVALID_ARGUMENT, "cannot set process.selinuxLabel \"u:r:none_t\""),
        };
        let mut process = process(&["true"]);
        process["selinuxLabel"] = "u:r:none_t".into();
        pod.exec("a", "e3", &process, &Io::none()).await.unwrap();
        refused(pod.start_process("a", "e3").await, code, text);
        pod.end("a").await;
        assert_eq!(stdout.text().await, labels(init));

        let mut b = daemon.bundle("b", &["true"]);
        b.spec["process"]["selinuxLabel"] = "u:r:none_t".into();
        refused(pod.create(&b, &Io::none()).await, code, text);
        refused(pod.state("b", "").await, Code::NOT_FOUND, "container not created");
        pod.shutdown().await;
    });
}

#[test]
fn a_read_only_root_and_a_hundred_and_twenty_layers() {
    each_backend(async |daemon, backend| {
        let (pod, mut a) = pod(
            daemon,
            backend,
            &shell("cat /layer-1 /layer-120; touch /nope && exit 1; exit 0"),
        )
        .await;
        let mut layers = Vec::new();
        for n in (1..=120).rev() {
            let layer = daemon.folder.join(format!("a-layer-with-a-rather-long-name-{n}"));
            fs::create_dir(&layer).unwrap();
            fs::write(layer.join(format!("layer-{n}")), format!("{n}\n")).unwrap();
            layers.push(layer.display().to_string());
        }
        layers.push(support::pod::busybox().display().to_string());
        a.rootfs[0].options[0] = format!("lowerdir={}", layers.join(":"));
        a.spec["root"]["readonly"] = true.into();
        let io = Io::fifos(&a.path, "init");
        let stdout = io.read_stdout();
        pod.run(&a, &io).await;
        assert_eq!(pod.wait("a", "").await.unwrap(), 0);
        assert_eq!(stdout.text().await, "1\n120\n");
        pod.delete("a", "").await.unwrap();
        pod.shutdown().await;
    });
}

#[test]
fn hooks_run_at_their_moments_with_the_state_on_stdin() {
    each_backend(async |daemon, backend| {
        let (pod, mut a) = pod(daemon, backend, &["true"]).await;
        let hook = |name: &str| {
            let to = a.path.join(name);
            json!([{"path": "/bin/sh", "args": ["sh", "-c", format!("cat >{}", to.display())]}])
        };
        a.spec["hooks"] =
            json!({"createRuntime": hook("created"), "poststart": hook("started"), "poststop": hook("stopped")});
        pod.create(&a, &Io::none()).await.unwrap();
        let state: serde_json::Value = serde_json::from_slice(&fs::read(a.path.join("created")).unwrap()).unwrap();
        assert_eq!(state["id"], "a");
        pod.start_process("a", "").await.unwrap();
        assert!(a.path.join("started").exists());
        pod.wait("a", "").await.unwrap();
        assert!(!a.path.join("stopped").exists());
        pod.delete("a", "").await.unwrap();
        assert!(a.path.join("stopped").exists());
        pod.shutdown().await;
    });
}

#[test]
fn a_program_gets_no_descriptor_beyond_its_stdio() {
    each_backend(async |daemon, backend| {
        let (pod, a) = pod(daemon, backend, &shell("ls /proc/self/fd; sleep 1000")).await;
        let io = Io::fifos(&a.path, "init");
        let mut stdout = fs::OpenOptions::new().read(true).write(true).open(&io.stdout).unwrap();
        pod.run(&a, &io).await;
        let mut bytes = [0; 64];
        let read = tokio::task::spawn_blocking(move || {
            std::io::Read::read(&mut stdout, &mut bytes).map(|n| bytes[..n].to_vec())
        });
        // 3 is the folder that ls reads.
        assert_eq!(String::from_utf8(read.await.unwrap().unwrap()).unwrap(), "0\n1\n2\n3\n");
        let io = Io::fifos(&a.path, "e1");
        let stdout = io.read_stdout();
        pod.exec("a", "e1", &process(&["ls", "/proc/self/fd"]), &io)
            .await
            .unwrap();
        pod.start_process("a", "e1").await.unwrap();
        assert_eq!(stdout.text().await, "0\n1\n2\n3\n");
        pod.wait("a", "e1").await.unwrap();
        pod.delete("a", "e1").await.unwrap();
        pod.end("a").await;
        pod.shutdown().await;
    });
}

// ---- bad input ---------------------------------------------------------------------------------------------------------------------

#[test]
fn bad_requests_are_refused_by_name_and_leave_nothing() {
    each_backend(async |daemon, backend| {
        let (mut pod, a) = pod(daemon, backend, &FOREVER).await;
        let good = pod.options.clone();
        for id in ["..", "a/b", "../a", "/a", ""] {
            let mut request = pod.create_request(&a, &Io::none());
            request.id = id.into();
            let answer = pod.call::<_, api::CreateTaskResponse>("Create", &request).await;
            refused(answer, Code::INVALID_ARGUMENT, "task id");
        }
        for known in ["lxc", "proxmox-lxc", "proxmox-vm"] {
            if !backend::built().contains(&known) {
                pod.options = Some(options(&format!("backend = \"{known}\"")));
                refused(pod.create(&a, &Io::none()).await, Code::UNIMPLEMENTED, known);
            }
        }
        pod.options = Some(options("backend = \"docker\""));
        refused(pod.create(&a, &Io::none()).await, Code::INVALID_ARGUMENT, "docker");
        pod.options = Some(options("no_such_key = 1"));
        refused(pod.create(&a, &Io::none()).await, Code::INVALID_ARGUMENT, "no_such_key");
        pod.options = Some(options("not toml at all"));
        refused(pod.create(&a, &Io::none()).await, Code::INVALID_ARGUMENT, "");
        pod.options = Some(Any {
            type_url: "example.com/Unknown".into(),
            value: vec![1, 2, 3],
            ..Any::default()
        });
        refused(
            pod.create(&a, &Io::none()).await,
            Code::INVALID_ARGUMENT,
            "example.com/Unknown",
        );
        pod.options = good;
        fs::write(&daemon.config_file, "[options]\nno_such_key = 1\n").unwrap();
        refused(pod.create(&a, &Io::none()).await, Code::INVALID_ARGUMENT, "no_such_key");
        fs::write(&daemon.config_file, "").unwrap();
        let annotated = a.clone().annotate("io.proxmox-lxcri.no-such-key", "1");
        refused(
            pod.create(&annotated, &Io::none()).await,
            Code::INVALID_ARGUMENT,
            "no-such-key",
        );
        let hostile = a.clone().annotate("io.proxmox-lxcri.crun_binary", "/tmp/evil");
        refused(
            pod.create(&hostile, &Io::none()).await,
            Code::INVALID_ARGUMENT,
            "crun_binary",
        );
        a.write();
        let request = pod.create_request(&a, &Io::none());
        fs::write(a.path.join("config.json"), "{").unwrap();
        let answer = pod.call::<_, api::CreateTaskResponse>("Create", &request).await;
        refused(answer, Code::INVALID_ARGUMENT, "config.json");
        fs::remove_file(a.path.join("config.json")).unwrap();
        let answer = pod.call::<_, api::CreateTaskResponse>("Create", &request).await;
        refused(answer, Code::INVALID_ARGUMENT, "config.json");
        let mut io = Io::none();
        io.stdout = a.path.join("no-fifo").display().to_string();
        let refusal = pod.create(&a, &io).await.unwrap_err().text;
        assert!(refusal.contains("no-fifo"), "{refusal}");
        io.stdout = "gopher://x".into();
        refused(pod.create(&a, &io).await, Code::INVALID_ARGUMENT, "gopher");
        // And now it works: nothing of all this was left in its way.
        pod.run(&a, &Io::none()).await;
        pod.end("a").await;
        pod.shutdown().await;
    });
}

#[test]
fn a_mount_that_fails_half_way_is_undone() {
    each_backend(async |daemon, backend| {
        let (pod, mut a) = pod(daemon, backend, &FOREVER).await;
        a.rootfs.push(mount("no-such-file-system", "none", &["secret=1"]));
        let refusal = pod.create(&a, &Io::none()).await.unwrap_err().text;
        assert!(refusal.contains("no-such-file-system"), "{refusal}");
        assert!(!support::pod::is_mounted(&a.path.join("rootfs")));
        a.rootfs.pop();
        a.rootfs[0].options[0] = "lowerdir=/nonexistent".into();
        assert!(pod.create(&a, &Io::none()).await.is_err());
        assert!(!support::pod::is_mounted(&a.path.join("rootfs")));
        pod.shutdown().await;
    });
}

#[test]
fn a_missing_rootfs_is_an_error() {
    each_backend(async |daemon, backend| {
        let (pod, mut a) = pod(daemon, backend, &FOREVER).await;
        a.rootfs.clear();
        a.spec["root"]["path"] = "/nonexistent/rootfs".into();
        let refusal = pod.create(&a, &Io::none()).await.unwrap_err().text;
        assert!(refusal.contains("OCI runtime create failed"), "{refusal}");
        pod.shutdown().await;
    });
}

#[test]
fn a_checkpoint_works_or_says_what_is_missing() {
    each_backend(async |daemon, backend| {
        // Not a lone sleep: a checkpoint interrupts it, and it would end.
        let script = "while :; do sleep 1000; done";
        let (pod, a) = pod(daemon, backend, &shell(script)).await;
        pod.run(&a, &Io::none()).await;
        let request = api::CheckpointTaskRequest {
            id: "a".into(),
            path: a.path.join("images").display().to_string(),
            ..Default::default()
        };
        let answer = pod.call::<_, api::Empty>("Checkpoint", &request).await;
        let missing = match backend {
            "crun" => (!support::pod::crun_has_criu()).then_some("CRIU"),
            // No CRIU changes that.
            _ => Some("checkpoint"),
        };
        if let Some(named) = missing {
            refused(answer, Code::UNIMPLEMENTED, named);
            assert!(!Path::new(&request.path).exists(), "images of nothing");
            assert_eq!(pod.status("a").await, Status::RUNNING);
            pod.end("a").await;
            pod.shutdown().await;
            return;
        }
        answer.unwrap();
        assert_eq!(pod.status("a").await, Status::RUNNING);
        pod.end("a").await;

        let b = daemon.bundle("b", &["never asked for: the program is the checkpoint's"]);
        let mut restore = pod.create_request(&b, &Io::none());
        restore.checkpoint = request.path;
        pod.call::<_, api::CreateTaskResponse>("Create", &restore)
            .await
            .unwrap();
        let pid = pod.start_process("b", "").await.unwrap();
        assert_eq!(pod.status("b").await, Status::RUNNING);
        assert!(pod.pids("b").await.unwrap().contains_key(&pid));
        let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
        assert!(command.contains(script), "{command:?}");
        pod.end("b").await;
        pod.shutdown().await;
    });
}

/// Only what the shim does about it: the program says that it has CRIU, notes a checkpoint down, and makes anew what it shall restore
/// (not by `crun run --detach`: that returns while the process that made the container, in a session of its own, still lives).
#[test]
fn a_checkpoint_and_a_restore_are_asked_of_a_crun_that_has_criu() {
    crun_alone(async |daemon, backend| {
        let (mut pod, a) = pod(daemon, backend, &FOREVER).await;
        let (program, asked) = (daemon.folder.join("crun"), daemon.folder.join("asked"));
        let script = format!(
            "#!/bin/sh
            case \" $* \" in
                *' --version '*) echo 'crun +CRIU'; exit;;
                *' checkpoint '*) echo \"$*\" >{}; exit;;
                *' restore '*) ;;
                *) exec crun \"$@\";;
            esac
            globals=${{*%% restore *}}
            left=$#
            while [ $left -gt 0 ]; do
                word=$1; shift; left=$((left - 1))
                case $word in
                    restore) set -- \"$@\" create;;
                    --image-path) shift; left=$((left - 1));;
                    --detach|--tcp-established|--ext-unix-sk|--file-locks) ;;
                    *) set -- \"$@\" \"$word\";;
                esac
            done
            crun \"$@\" && exec crun $globals start \"$word\"\n",
            asked.display()
        );
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let images = daemon.folder.join("images");
        fs::create_dir(&images).unwrap();
        pod.options = Some(options(&format!(
            "crun_binary = {program:?}\ncriu_image_path = \"{}/default\"",
            images.display()
        )));

        pod.run(&a, &Io::none()).await;
        for (path, folder) in [
            (images.display().to_string(), images.clone()),
            (String::new(), images.join("default")),
        ] {
            let request = api::CheckpointTaskRequest {
                id: "a".into(),
                path,
                ..Default::default()
            };
            pod.call::<_, api::Empty>("Checkpoint", &request).await.unwrap();
            let asked = fs::read_to_string(&asked).unwrap();
            let wanted = format!("checkpoint --image-path {} --leave-running a\n", folder.display());
            assert!(asked.ends_with(&wanted), "{asked}");
        }
        daemon.hears("checkpointed a").await;
        pod.end("a").await;

        let b = daemon.bundle("b", &shell("echo restored; read line; exit 6"));
        let io = Io::fifos(&b.path, "init");
        let (stdout, mut stdin) = (io.read_stdout(), io.open_stdin());
        let mut request = pod.create_request(&b, &io);
        request.checkpoint = images.display().to_string();
        let created: api::CreateTaskResponse = pod.call("Create", &request).await.unwrap();
        assert_eq!((created.pid, pod.status("b").await), (0, Status::CREATED));
        let pid = pod.start_process("b", "").await.unwrap();
        assert_eq!(
            (pod.status("b").await, pod.pids("b").await.unwrap().contains_key(&pid)),
            (Status::RUNNING, true)
        );
        stdin.write_all(b"go\n").unwrap();
        assert_eq!(pod.wait("b", "").await.unwrap(), 6);
        assert_eq!(stdout.text().await, "restored\n");
        pod.delete("b", "").await.unwrap();
        let told = daemon.hears("delete b 6").await;
        let own: Vec<_> = told.iter().filter(|told| told.split(' ').nth(1) == Some("b")).collect();
        assert_eq!(own, ["create b", "start b", "exit b 6", "delete b 6"]);
        pod.shutdown().await;
    });
}

/// They name a program, or none: a backend that is chosen elsewhere is not overruled by them.
#[test]
fn options_of_runc_do_not_change_the_backend() {
    each_backend(async |daemon, backend| {
        let (mut pod, a) = pod(daemon, backend, &FOREVER).await;
        fs::write(&daemon.config_file, format!("[options]\nbackend = \"{backend}\"\n")).unwrap();
        let mut runc = containerd_shim_protos::shim::oci::Options::new();
        runc.io_uid = 1000;
        pod.options = Some(Any {
            type_url: "containerd.runc.v1.Options".into(),
            value: runc.write_to_bytes().unwrap(),
            ..Any::default()
        });
        pod.run(&a, &Io::none()).await;
        assert_eq!(backend::holding(NAMESPACE, "a"), [backend]);
        pod.end("a").await;
        pod.shutdown().await;
    });
}

// ---- the shim itself ---------------------------------------------------------------------------------------------------------------

#[test]
fn existing_runc_options_keep_working() {
    crun_alone(async |daemon, backend| {
        let (mut pod, a) = pod(daemon, backend, &FOREVER).await;
        let mut runc = containerd_shim_protos::shim::oci::Options::new();
        runc.binary_name = "crun".into();
        runc.root = daemon.folder.join("state").display().to_string();
        pod.options = Some(Any {
            type_url: "containerd.runc.v1.Options".into(),
            value: runc.write_to_bytes().unwrap(),
            ..Any::default()
        });
        pod.run(&a, &Io::none()).await;
        assert!(daemon.folder.join("state/contract/a").exists());
        pod.end("a").await;
        pod.shutdown().await;
    });
}

#[test]
fn three_hundred_lifecycles_leave_nothing_in_the_shim() {
    each_backend(async |daemon, backend| {
        let (pod, a) = pod(daemon, backend, &shell("echo out")).await;
        pod.run(&a, &Io::none()).await;
        pod.wait("a", "").await.unwrap();
        pod.delete("a", "").await.unwrap();
        let before = support::leaks::open_descriptors(pod.pid);
        for n in 0..300 {
            let bundle = daemon.bundle(&format!("c{n}"), &shell("echo out"));
            let io = Io::fifos(&bundle.path, "init");
            let stdout = io.read_stdout();
            pod.run(&bundle, &io).await;
            pod.wait(&bundle.id, "").await.unwrap();
            pod.delete(&bundle.id, "").await.unwrap();
            assert_eq!(stdout.text().await, "out\n");
            fs::remove_dir_all(&bundle.path).unwrap();
        }
        assert_eq!(support::leaks::open_descriptors(pod.pid), before);
        pod.shutdown().await;
    });
}

#[test]
fn twenty_containers_at_once() {
    each_backend(async |daemon, backend| {
        let (shim, _) = pod(daemon, backend, &FOREVER).await;
        let pod = &shim;
        let all = (0..20).map(|n| {
            let bundle = daemon.bundle(&format!("c{n}"), &shell(&format!("echo {n}; exit {n}")));
            async move {
                let io = Io::fifos(&bundle.path, "init");
                let stdout = io.read_stdout();
                pod.run(&bundle, &io).await;
                assert_eq!(pod.wait(&bundle.id, "").await.unwrap(), n);
                assert_eq!(stdout.text().await, format!("{n}\n"));
                pod.delete(&bundle.id, "").await.unwrap();
            }
        });
        support::pod::together(all).await;
        shim.shutdown().await;
    });
}

#[test]
fn events_wait_for_a_daemon_that_is_away_and_arrive_once_and_in_order() {
    each_backend(async |daemon, backend| {
        let (pod, a) = pod(daemon, backend, &shell("exit 5")).await;
        pod.create(&a, &Io::none()).await.unwrap();
        daemon.hears("create a").await;
        daemon.vanish().await;
        pod.start_process("a", "").await.unwrap();
        pod.wait("a", "").await.unwrap();
        pod.delete("a", "").await.unwrap();
        assert_eq!(daemon.told(), ["create a"]);
        daemon.listen().await;
        assert_eq!(
            daemon.hears("delete a 5").await,
            ["create a", "start a", "exit a 5", "delete a 5"]
        );
        pod.shutdown().await;
    });
}

#[test]
fn a_client_deadline_in_the_middle_of_a_call_never_leaves_half_a_container() {
    each_backend(async |daemon, backend| {
        // Hooks hold the calls for as long as the test likes.
        let (pod, mut a) = pod(daemon, backend, &FOREVER).await;
        let gate = |name: &str| {
            let path = a.path.join(name);
            nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
            json!([{"path": "/bin/cat", "args": ["cat", path]}])
        };
        a.spec["hooks"] =
            json!({"createRuntime": gate("creating"), "poststart": gate("starting"), "poststop": gate("stopping")});
        let open = async |name: &str| {
            let path = a.path.join(name);
            // Opening it otherwise would wait for the reader, for ever.
            let opens = || {
                let mut write = fs::OpenOptions::new();
                write.write(true).custom_flags(libc::O_NONBLOCK).open(&path).ok()
            };
            until(name, opens).await;
        };
        let request = pod.create_request(&a, &Io::none());
        let short = patience(1) / 5;
        let answer = pod
            .call_bounded::<_, api::CreateTaskResponse>("Create", &request, short)
            .await;
        assert!(answer.is_err());
        open("creating").await;
        daemon.hears("create a").await;
        assert_eq!(pod.status("a").await, Status::CREATED);
        let start = api::StartRequest {
            id: "a".into(),
            ..Default::default()
        };
        let answer = pod.call_bounded::<_, api::StartResponse>("Start", &start, short).await;
        assert!(answer.is_err());
        open("starting").await;
        daemon.hears("start a").await;
        assert_eq!(pod.status("a").await, Status::RUNNING);
        pod.kill("a", "", libc::SIGKILL, false).await.unwrap();
        pod.wait("a", "").await.unwrap();
        let delete = api::DeleteRequest {
            id: "a".into(),
            ..Default::default()
        };
        let answer = pod
            .call_bounded::<_, api::DeleteResponse>("Delete", &delete, short)
            .await;
        assert!(answer.is_err());
        open("stopping").await;
        daemon.hears("delete a 137").await;
        pod.shutdown().await;
    });
}

#[test]
fn a_shim_that_lost_its_last_task_goes_and_takes_its_socket_along() {
    each_backend(async |daemon, backend| {
        let (pod, a) = pod(daemon, backend, &["true"]).await;
        let socket = pod.address.trim_start_matches("unix://").to_owned();
        assert!(Path::new(&socket).exists());
        pod.run(&a, &Io::none()).await;
        pod.wait("a", "").await.unwrap();
        pod.delete("a", "").await.unwrap();
        pod.shutdown().await;
        assert!(!Path::new(&socket).exists());
        // The next start is another shim.
        let b = daemon.bundle("b", &["true"]);
        let start = Start {
            service: "containerd.task.v3.Task",
            ..Start::default()
        };
        let pod = Pod::start_with(daemon, &b, &start).await;
        pod.run(&b, &Io::none()).await;
        pod.wait("b", "").await.unwrap();
        pod.delete("b", "").await.unwrap();
        pod.shutdown().await;
    });
}

#[test]
fn an_attached_reader_sees_the_end_as_soon_as_the_program_has_ended() {
    each_backend(async |daemon, backend| {
        let (pod, a) = pod(daemon, backend, &shell("echo hello")).await;
        let io = Io::fifos(&a.path, "init");
        let stdout = Reading::of(&io.stdout);
        pod.run(&a, &io).await;
        // No Delete before the end of the output: ctr waits for it.
        assert_eq!(stdout.text().await, "hello\n");
        pod.wait("a", "").await.unwrap();
        pod.delete("a", "").await.unwrap();
        pod.shutdown().await;
    });
}
