//! What is around a container goes wrong: the disk, the streams, the daemon's events, the cgroups.

use std::{
    fs,
    io::{Read, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{self, Status},
    shim::events::ForwardRequest,
    shim_async::create_events,
    ttrpc::{self, Code, r#async::TtrpcContext},
};

use crate::{
    FOREVER, Stub, fault, it_works, lives, pod, send, shell,
    support::{
        drive::remove_locks_of,
        pod::{Bundle, Daemon, Io, Pod, cgroup_v2, delete_dead, is_mounted, process, refused},
        universe,
    },
    the_next_works, until,
};

// ---- the disk ----------------------------------------------------------------------------------------------------------------------

/// A file system of 256 KiB.
struct Tiny(PathBuf);

impl Tiny {
    fn new(daemon: &Daemon) -> Self {
        let path = daemon.folder.join("tiny");
        fs::create_dir(&path).unwrap();
        nix::mount::mount(
            Some("tiny"),
            &path,
            Some("tmpfs"),
            nix::mount::MsFlags::empty(),
            Some("size=256k"),
        )
        .unwrap();
        Self(path)
    }

    /// The bundle of `a` in here; the layers of its rootfs are elsewhere.
    fn holds(&self, a: &Bundle) -> Bundle {
        let path = self.0.join(&a.id);
        fs::create_dir(&path).unwrap();
        fs::create_dir(path.join("rootfs")).unwrap();
        nix::unistd::mkfifo(&path.join("log"), nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        Bundle { path, ..a.clone() }
    }

    /// Not a byte more.
    fn fill(&self) {
        let mut ballast = fs::File::create(self.0.join("ballast")).unwrap();
        while ballast.write(&[0; 4096]).is_ok() {}
    }

    fn empty(&self) {
        fs::remove_file(self.0.join("ballast")).unwrap();
    }

    fn goes(self) {
        nix::mount::umount(&self.0).unwrap();
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_full_disk_fails_a_create_which_leaves_nothing() {
    fault(async |daemon, stub| {
        let tiny = Tiny::new(daemon);
        let a = tiny.holds(&daemon.bundle("a", &["echo", "fine"]));
        let mut pod = Pod::start(daemon, &a).await;
        pod.options = stub.options("");
        let request = pod.create_request(&a, &Io::none());
        let before = names(&a.path);
        tiny.fill();
        let answer = pod.call::<_, api::CreateTaskResponse>("Create", &request).await;
        refused(answer, Code::RESOURCE_EXHAUSTED, "No space left on device");
        assert_eq!(names(&a.path), before);
        assert!(!is_mounted(&a.path.join("rootfs")));
        refused(pod.state("a", "").await, Code::NOT_FOUND, "container not created");
        tiny.empty();
        it_works(&pod, &a).await;
        pod.shutdown().await;
        tiny.goes();
    });
}

#[test]
fn a_disk_that_fills_up_later_costs_no_exit() {
    fault(async |daemon, stub| {
        let tiny = Tiny::new(daemon);
        let a = tiny.holds(&daemon.bundle("a", &shell("exit 7")));
        let mut pod = Pod::start(daemon, &a).await;
        pod.options = stub.options("");
        pod.create(&a, &Io::none()).await.unwrap();
        tiny.fill();
        pod.start_process("a", "").await.unwrap();
        assert_eq!(pod.wait("a", "").await.unwrap(), 7);
        assert_eq!(pod.delete("a", "").await.unwrap().exit_status, 7);
        pod.shutdown().await;
        assert_eq!(daemon.told(), ["create a", "start a", "exit a 7", "delete a 7"]);
        tiny.goes();
    });
}

#[test]
fn a_full_disk_under_a_log_file_does_not_hold_the_container() {
    fault(async |daemon, stub| {
        let tiny = Tiny::new(daemon);
        let (pod, a) = pod(daemon, stub, &shell("head -c 1000000 /dev/zero; echo done >/done")).await;
        let mut io = Io::none();
        io.stdout = format!("file://{}", tiny.0.join("out").display());
        pod.run(&a, &io).await;
        assert_eq!(pod.wait("a", "").await.unwrap(), 0);
        assert!(a.path.join("upper/done").exists());
        pod.delete("a", "").await.unwrap();
        assert!(fs::metadata(tiny.0.join("out")).unwrap().len() >= 65536);
        pod.shutdown().await;
        tiny.goes();
    });
}

#[test]
fn a_full_disk_under_the_state_of_the_backend_fails_a_create_which_leaves_nothing() {
    fault(async |daemon, stub| {
        let tiny = Tiny::new(daemon);
        let (mut pod, a) = pod(daemon, stub, &["echo", "fine"]).await;
        let root = tiny.0.join("state");
        let (key, folder) = match stub.is_crun() {
            true => ("crun_root", root.join("contract")),
            false => ("lxc_path", root.clone()),
        };
        pod.options = stub.options(&format!("{key} = \"{}\"", root.display()));
        fs::create_dir_all(&folder).unwrap();
        tiny.fill();
        refused(
            pod.create(&a, &Io::none()).await,
            Code::RESOURCE_EXHAUSTED,
            "No space left on device",
        );
        assert!(names(&folder).is_empty());
        assert!(!is_mounted(&a.path.join("rootfs")));
        tiny.empty();
        it_works(&pod, &a).await;
        pod.shutdown().await;
        tiny.goes();
        if !stub.is_crun() {
            remove_locks_of(&root);
        }
    });
}

// ---- streams -----------------------------------------------------------------------------------------------------------------------

#[test]
fn a_reader_that_is_never_there_or_leaves_for_good_hinders_nobody() {
    fault(async |daemon, stub| {
        for leaves in [false, true] {
            let (mut pod, a) = pod(daemon, stub, &shell("cat /dev/zero")).await;
            pod.options = stub.options("drain_timeout_ms = 100");
            let io = Io::fifos(&a.path, "init");
            let reader = leaves.then(|| {
                let open = fs::OpenOptions::new()
                    .read(true)
                    .custom_flags(libc::O_NONBLOCK)
                    .open(&io.stdout);
                open.unwrap()
            });
            pod.run(&a, &io).await;
            if let Some(mut reader) = reader {
                until("output", || reader.read(&mut [0; 100_000]).ok().filter(|n| *n > 0)).await;
            }
            assert_eq!(pod.status("a").await, Status::RUNNING);
            pod.end("a").await;
            pod.shutdown().await;
            daemon.assert_nothing_left();
            fs::remove_dir_all(&a.path).unwrap();
        }
    });
}

#[test]
fn fifos_may_be_removed_when_they_are_open_and_must_be_there_before() {
    fault(async |daemon, stub| {
        let (pod, a) = pod(daemon, stub, &shell("while read line; do echo $line; done; exit 3")).await;
        let io = Io::fifos(&a.path, "init");
        let stdout = io.read_stdout();
        let mut stdin = io.open_stdin();
        pod.create(&a, &io).await.unwrap();
        for path in [&io.stdin, &io.stdout, &io.stderr] {
            fs::remove_file(path).unwrap();
        }
        pod.start_process("a", "").await.unwrap();
        stdin.write_all(b"still here\n").unwrap();
        drop(stdin);
        pod.close_stdin("a", "").await.unwrap();
        assert_eq!(pod.wait("a", "").await.unwrap(), 3);
        assert_eq!(stdout.text().await, "still here\n");
        pod.delete("a", "").await.unwrap();
        let refusal = pod.create(&a, &io).await;
        refused(refusal, Code::NOT_FOUND, "its client has to make it");
        let mut again = a.clone();
        again.spec["process"]["args"] = serde_json::json!(["echo", "fine"]);
        it_works(&pod, &again).await;
        // The same for an exec, which is as before then.
        let b = daemon.bundle("b", &FOREVER);
        pod.run(&b, &Io::none()).await;
        let io = Io::fifos(&b.path, "e1");
        pod.exec("b", "e1", &process(&["true"]), &io).await.unwrap();
        fs::remove_file(&io.stderr).unwrap();
        refused(
            pod.start_process("b", "e1").await,
            Code::NOT_FOUND,
            "its client has to make it",
        );
        assert_eq!(pod.state("b", "e1").await.unwrap().status, Status::CREATED.into());
        pod.delete("b", "e1").await.unwrap();
        pod.end("b").await;
        pod.shutdown().await;
    });
}

/// A logger program that runs `script`.
fn logger(daemon: &Daemon, script: &str) -> Io {
    let path = daemon.folder.join("logger");
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    Io {
        stdout: format!("binary://{}", path.display()),
        stderr: format!("binary://{}", path.display()),
        ..Io::none()
    }
}

#[test]
fn a_logger_that_dies_in_the_middle_does_not_hold_the_container() {
    fault(async |daemon, stub| {
        for end in ["exit 1", "exit 0", "kill -9 $$"] {
            let (pod, a) = pod(
                daemon,
                stub,
                &shell("head -c 1000000 /dev/zero; head -c 1000000 /dev/zero >&2; exit 5"),
            )
            .await;
            let io = logger(daemon, &format!("exec 5>&-; head -c 1000 <&3 >/dev/null; {end}"));
            pod.run(&a, &io).await;
            assert_eq!(pod.wait("a", "").await.unwrap(), 5);
            pod.delete("a", "").await.unwrap();
            pod.shutdown().await;
            daemon.assert_nothing_left();
            fs::remove_dir_all(&a.path).unwrap();
        }
    });
}

#[test]
fn a_logger_that_is_missing_or_never_ready_fails_the_create_which_leaves_nothing() {
    fault(async |daemon, stub| {
        let (pod, a) = pod(daemon, stub, &["echo", "fine"]).await;
        let mut io = Io::none();
        io.stdout = "binary:///no/such/logger".into();
        refused(pod.create(&a, &io).await, Code::NOT_FOUND, "/no/such/logger");
        io = logger(daemon, "exec sleep 5555");
        refused(
            pod.create(&a, &io).await,
            Code::DEADLINE_EXCEEDED,
            "did not close descriptor 5",
        );
        // A Kill need not wait for that.
        let creating = pod.create(&a, &io);
        let killing = async {
            let command = "sleep 5555";
            until("the logger runs", || {
                let all = crate::support::leaks::processes();
                all.iter().any(|process| process.command == command).then_some(())
            })
            .await;
            pod.kill("a", "", libc::SIGKILL, false).await.unwrap();
        };
        let (created, ()) = tokio::join!(creating, killing);
        refused(created, Code::ABORTED, "killed while it was being created");
        it_works(&pod, &a).await;
        pod.shutdown().await;
    });
}

// ---- events ------------------------------------------------------------------------------------------------------------------------

/// A lifecycle that nobody is told of, and the shim's end.
async fn unheard(daemon: &Daemon, stub: &Stub) {
    let (pod, a) = pod(daemon, stub, &shell("exit 8")).await;
    pod.run(&a, &Io::none()).await;
    assert_eq!(pod.wait("a", "").await.unwrap(), 8);
    assert_eq!(pod.delete("a", "").await.unwrap().exit_status, 8);
    it_works(&pod, &daemon.bundle("b", &["echo", "fine"])).await;
    let log = pod.shutdown().await;
    assert!(log.contains("events are lost"), "{log}");
    daemon.assert_nothing_left();
}

#[test]
fn a_daemon_that_is_never_there_hinders_nobody() {
    fault(async |daemon, stub| {
        daemon.vanish().await;
        unheard(daemon, stub).await;
    });
}

#[test]
fn a_daemon_that_takes_events_and_never_answers_hinders_nobody() {
    fault(async |daemon, stub| {
        daemon.vanish().await;
        // The kernel accepts.
        let _listener = std::os::unix::net::UnixListener::bind(daemon.events_socket()).unwrap();
        unheard(daemon, stub).await;
    });
}

#[test]
fn a_daemon_that_answers_with_errors_hinders_nobody() {
    struct Refuses;
    #[async_trait]
    impl containerd_shim_protos::shim_async::Events for Refuses {
        async fn forward(&self, _: &TtrpcContext, _: ForwardRequest) -> ttrpc::Result<api::Empty> {
            Err(ttrpc::Error::RpcStatus(ttrpc::get_status(Code::UNAVAILABLE, "not now")))
        }
    }
    fault(async |daemon, stub| {
        daemon.vanish().await;
        let address = format!("unix://{}", daemon.events_socket().display());
        let mut server = ttrpc::asynchronous::Server::new()
            .bind(&address)
            .unwrap()
            .register_service(create_events(std::sync::Arc::new(Refuses)));
        server.start().await.unwrap();
        unheard(daemon, stub).await;
        server.shutdown().await.unwrap();
    });
}

/// What the process has put into memory, in KiB. Pages of its program are none of that: they are "private" whenever no other shim
/// happens to run.
fn filled_kib(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().next().unwrap().parse::<u64>().unwrap()
    };
    field("Anonymous:") + field("Swap:")
}

#[test]
fn events_that_nobody_takes_fill_no_memory() {
    fault(async |daemon, stub| {
        daemon.vanish().await;
        let (pod, a) = pod(daemon, stub, &FOREVER).await;
        pod.run(&a, &Io::none()).await;
        let spec = process(&["true"]);
        let add_and_delete = async |times: u32| {
            for _ in 0..times {
                pod.exec("a", "e1", &spec, &Io::none()).await.unwrap();
                pod.delete("a", "e1").await.unwrap();
            }
        };
        // More than the queue takes.
        add_and_delete(2100).await;
        let full = filled_kib(pod.pid);
        add_and_delete(3000).await;
        let more = filled_kib(pod.pid);
        assert!(more < full + 256, "{full} KiB, then {more} KiB");
        pod.end("a").await;
        pod.shutdown().await;
    });
}

// ---- cgroups, mounts and processes -------------------------------------------------------------------------------------------------

/// The cgroups of a container.
fn cgroups_of(id: &str) -> Vec<PathBuf> {
    let mut all = universe::cgroups_named(&universe::token());
    all.retain(|path| path.ends_with(format!("{}/{id}", universe::token())));
    assert!(!all.is_empty());
    all
}

#[test]
fn a_stranger_in_the_cgroup_does_not_hinder_delete() {
    fault(async |daemon, stub| {
        for killed in [false, true] {
            let (pod, a) = pod(daemon, stub, &FOREVER).await;
            let pid = pod.run(&a, &Io::none()).await;
            let mut strangers = Vec::new();
            for cgroup in universe::cgroups_with(&universe::token(), pid) {
                // One hierarchy each, as an administrator would do it.
                let stranger = Command::new("sleep").arg("1000").spawn().unwrap();
                fs::write(cgroup.join("cgroup.procs"), stranger.id().to_string()).unwrap();
                strangers.push(stranger);
            }
            // And one that has cgroups below.
            let below = cgroups_of("a").remove(0).join("below");
            fs::create_dir(&below).unwrap();
            if killed {
                pod.dies().await;
                assert_eq!(delete_dead(daemon, &a).unwrap().pid, pid);
            } else {
                pod.kill("a", "", libc::SIGKILL, false).await.unwrap();
                pod.wait("a", "").await.unwrap();
                pod.delete("a", "").await.unwrap();
                pod.shutdown().await;
            }
            for mut stranger in strangers {
                stranger.wait().unwrap();
            }
            daemon.assert_nothing_left();
            the_next_works(daemon, stub, &a).await;
        }
    });
}

#[test]
fn a_rootfs_that_somebody_uses_does_not_hinder_delete() {
    fault(async |daemon, stub| {
        for killed in [false, true] {
            let (pod, a) = pod(daemon, stub, &FOREVER).await;
            let pid = pod.run(&a, &Io::none()).await;
            let rootfs = a.path.join("rootfs");
            let mut user = Command::new("sleep").arg("1000").current_dir(&rootfs).spawn().unwrap();
            if killed {
                pod.dies().await;
                assert_eq!(delete_dead(daemon, &a).unwrap().pid, pid);
            } else {
                pod.end("a").await;
                pod.shutdown().await;
            }
            assert!(!is_mounted(&rootfs));
            assert!(lives(user.id()), "it is not the container's");
            user.kill().unwrap();
            user.wait().unwrap();
            daemon.assert_nothing_left();
            the_next_works(daemon, stub, &a).await;
        }
    });
}

#[test]
fn an_init_that_is_killed_behind_our_back_has_ended_as_it_has() {
    fault(async |daemon, stub| {
        for started in [true, false] {
            let before = daemon.told().len();
            let (pod, a) = pod(daemon, stub, &FOREVER).await;
            let pid = pod.create(&a, &Io::none()).await.unwrap();
            if started {
                pod.start_process("a", "").await.unwrap();
                pod.exec("a", "e1", &process(&FOREVER), &Io::none()).await.unwrap();
                pod.start_process("a", "e1").await.unwrap();
            }
            send(pid, libc::SIGKILL);
            assert_eq!(pod.wait("a", "").await.unwrap(), 137);
            assert_eq!(pod.status("a").await, Status::STOPPED);
            refused(
                pod.kill("a", "", 9, true).await,
                Code::NOT_FOUND,
                "process already finished",
            );
            assert_eq!(pod.delete("a", "").await.unwrap().exit_status, 137);
            pod.shutdown().await;
            let told = daemon.told().split_off(before);
            let exits: Vec<_> = told.iter().filter(|told| told.starts_with("exit")).collect();
            let expected: &[&str] = if started {
                &["exit e1 137", "exit a 137"]
            } else {
                &["exit a 137"]
            };
            assert_eq!(exits, expected, "{told:?}");
            daemon.assert_nothing_left();
            fs::remove_dir_all(&a.path).unwrap();
        }
    });
}

#[test]
fn a_cgroup_that_is_killed_as_a_whole_has_ended_once() {
    fault(async |daemon, stub| {
        let (pod, a) = pod(daemon, stub, &shell("sleep 1000 & sleep 1000 & sleep 1000")).await;
        pod.run(&a, &Io::none()).await;
        pod.exec("a", "e1", &process(&FOREVER), &Io::none()).await.unwrap();
        pod.start_process("a", "e1").await.unwrap();
        // From the youngest on; it may have gone with another.
        for pid in pod.pids("a").await.unwrap().into_keys().rev() {
            // SAFETY: the pid is of the tests' private pid namespace.
            unsafe { libc::kill(pid.cast_signed(), libc::SIGKILL) };
        }
        assert_eq!(pod.wait("a", "").await.unwrap(), 137);
        assert_eq!(pod.wait("a", "e1").await.unwrap(), 137);
        pod.delete("a", "").await.unwrap();
        pod.shutdown().await;
        let told = daemon.told();
        let exits: Vec<_> = told.iter().filter(|told| told.starts_with("exit")).collect();
        assert_eq!(exits, ["exit e1 137", "exit a 137"]);
    });
}

/// Freezes a container as an administrator does; waits until it is.
async fn freeze(id: &str) {
    let freezer = cgroups_of(id)
        .into_iter()
        .find(|path| path.join(freezer_file()).exists())
        .unwrap();
    let (write, file, frozen) = match cgroup_v2() {
        true => ("1", "cgroup.events", "frozen 1"),
        false => ("FROZEN", "freezer.state", "FROZEN"),
    };
    fs::write(freezer.join(freezer_file()), write).unwrap();
    until("it is frozen", || {
        fs::read_to_string(freezer.join(file))
            .unwrap()
            .contains(frozen)
            .then_some(())
    })
    .await;
}

fn freezer_file() -> &'static str {
    if cgroup_v2() { "cgroup.freeze" } else { "freezer.state" }
}

#[test]
fn a_container_that_somebody_froze_can_be_killed_and_deleted() {
    fault(async |daemon, stub| {
        for all in [false, true] {
            let (pod, a) = pod(daemon, stub, &FOREVER).await;
            pod.run(&a, &Io::none()).await;
            freeze("a").await;
            pod.kill("a", "", libc::SIGKILL, all).await.unwrap();
            assert_eq!(pod.wait("a", "").await.unwrap(), 137);
            pod.delete("a", "").await.unwrap();
            // One that was never started.
            let b = daemon.bundle("b", &FOREVER);
            pod.create(&b, &Io::none()).await.unwrap();
            freeze("b").await;
            pod.delete("b", "").await.unwrap();
            pod.shutdown().await;
            daemon.assert_nothing_left();
            fs::remove_dir_all(&a.path).unwrap();
            fs::remove_dir_all(&b.path).unwrap();
        }
    });
}

#[test]
fn a_frozen_container_of_a_dead_shim_is_deleted_also_without_crun() {
    fault(async |daemon, stub| {
        for with_crun in [true, false] {
            if !with_crun && !stub.is_crun() {
                continue;
            }
            let (pod, a) = pod(daemon, stub, &shell("sleep 1000 & sleep 1000")).await;
            let pid = pod.run(&a, &Io::none()).await;
            freeze("a").await;
            pod.dies().await;
            if !with_crun {
                stub.at("delete", "exit 1");
            }
            assert_eq!(delete_dead(daemon, &a).unwrap().pid, pid);
            daemon.assert_nothing_left();
            the_next_works(daemon, stub, &a).await;
        }
    });
}

#[test]
fn an_exec_into_what_somebody_froze_is_refused() {
    fault(async |daemon, stub| {
        let (pod, a) = pod(daemon, stub, &FOREVER).await;
        pod.run(&a, &Io::none()).await;
        freeze("a").await;
        pod.exec("a", "e1", &process(&FOREVER), &Io::none()).await.unwrap();
        refused(
            pod.start_process("a", "e1").await,
            Code::FAILED_PRECONDITION,
            "the container `a` is paused",
        );
        pod.end("a").await;
        it_works(&pod, &daemon.bundle("b", &["echo", "fine"])).await;
        pod.shutdown().await;
    });
}
