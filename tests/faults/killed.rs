//! A shim that is killed at whatever it does, and what `delete` finds afterwards.

use std::fs;

use serde_json::json;

use crate::{
    FOREVER, Gate, Stub, appears, fault, fault_of_crun, it_works, lives, pod, shell,
    support::{
        leaks,
        patience::patience,
        pod::{Bundle, Daemon, Io, Pod, Start, begin_shim, delete_dead, deleted, is_mounted, process},
    },
    the_next_works,
};

/// The annotation that makes a container one of a pod.
const SANDBOX: &str = "io.kubernetes.cri.sandbox-id";

/// Kills the shim; then `delete` answers for each container (pid, exit status), nothing is left, and the next one works.
async fn dies(daemon: &Daemon, stub: &Stub, pod: Pod, containers: &[(&Bundle, u32, u32)]) {
    pod.dies().await;
    for (bundle, pid, status) in containers {
        let response = delete_dead(daemon, bundle).unwrap();
        assert_eq!((response.pid, response.exit_status), (*pid, *status));
        assert!(response.exited_at.is_some());
    }
    daemon.assert_nothing_left();
    for (bundle, ..) in containers {
        let again = delete_dead(daemon, bundle).unwrap();
        assert_eq!((again.pid, again.exit_status), (0, 137));
    }
    for (bundle, ..) in containers {
        the_next_works(daemon, stub, bundle).await;
    }
}

#[test]
fn before_it_was_asked_for_anything() {
    fault(async |daemon, stub| {
        let (pod, a) = pod(daemon, stub, &FOREVER).await;
        dies(daemon, stub, pod, &[(&a, 0, 137)]).await;
    });
}

#[test]
fn before_crun_has_created() {
    fault_of_crun(async |daemon, stub| {
        let (pod, a) = pod(daemon, stub, &FOREVER).await;
        let gate = stub.holds_before("create");
        let _held = gate.holds(pod.create(&a, &Io::none())).await;
        dies(daemon, stub, pod, &[(&a, 0, 137)]).await;
    });
}

#[test]
fn while_hooks_of_create_run() {
    fault(async |daemon, stub| {
        for hook in ["prestart", "createRuntime", "createContainer"] {
            let (pod, mut a) = pod(daemon, stub, &FOREVER).await;
            let gate = Gate::new(a.path.join("gate"));
            a.spec["hooks"][hook] = gate.hook();
            let _held = gate.holds(pod.create(&a, &Io::none())).await;
            dies(daemon, stub, pod, &[(&a, 0, 137)]).await;
        }
    });
}

#[test]
fn after_crun_has_created_and_before_anybody_knows() {
    fault_of_crun(async |daemon, stub| {
        let (pod, a) = pod(daemon, stub, &FOREVER).await;
        let gate = stub.holds_after("create");
        let _held = gate.holds(pod.create(&a, &Io::none())).await;
        dies(daemon, stub, pod, &[(&a, 0, 137)]).await;
    });
}

#[test]
fn with_a_created_container() {
    fault(async |daemon, stub| {
        let (pod, a) = pod(daemon, stub, &["touch", "/ran"]).await;
        let pid = pod.create(&a, &Io::fifos(&a.path, "init")).await.unwrap();
        dies(daemon, stub, pod, &[(&a, pid, 137)]).await;
        assert!(!a.path.join("upper/ran").exists());
    });
}

#[test]
fn before_and_after_crun_has_started() {
    fault_of_crun(async |daemon, stub| {
        for after in [false, true] {
            let (pod, a) = pod(daemon, stub, &FOREVER).await;
            let pid = pod.create(&a, &Io::fifos(&a.path, "init")).await.unwrap();
            let gate = if after {
                stub.holds_after("start")
            } else {
                stub.holds_before("start")
            };
            let _held = gate.holds(pod.start_process("a", "")).await;
            dies(daemon, stub, pod, &[(&a, pid, 137)]).await;
        }
    });
}

#[test]
fn with_a_running_container_and_its_stdio() {
    fault(async |daemon, stub| {
        let (pod, a) = pod(daemon, stub, &shell("echo hello; sleep 1000 & sleep 1000")).await;
        let io = Io::fifos(&a.path, "init");
        let stdout = io.read_stdout();
        let _stdin = io.open_stdin();
        let pid = pod.run(&a, &io).await;
        let bound = pod.pids("a").await.unwrap();
        assert!(bound.contains_key(&pid));
        dies(daemon, stub, pod, &[(&a, pid, 137)]).await;
        // The client's reader ends, with or without the last words.
        let text = stdout.text().await;
        assert!("hello\n".starts_with(&text), "{text:?}");
    });
}

#[test]
fn with_a_terminal() {
    fault(async |daemon, stub| {
        let (pod, mut a) = pod(daemon, stub, &FOREVER).await;
        a.spec["process"]["terminal"] = true.into();
        let pid = pod.run(&a, &Io::terminal(&a.path, "init")).await;
        let io = Io::terminal(&a.path, "e1");
        pod.exec("a", "e1", &process(&FOREVER), &io).await.unwrap();
        pod.start_process("a", "e1").await.unwrap();
        dies(daemon, stub, pod, &[(&a, pid, 137)]).await;
    });
}

#[test]
fn while_a_terminal_is_awaited() {
    fault(async |daemon, stub| {
        let (pod, mut a) = pod(daemon, stub, &FOREVER).await;
        a.spec["process"]["terminal"] = true.into();
        let gate = stub.holds("create", &mut a);
        let _held = gate.holds(pod.create(&a, &Io::terminal(&a.path, "init"))).await;
        dies(daemon, stub, pod, &[(&a, 0, 137)]).await;
    });
}

#[test]
fn before_and_after_crun_has_made_an_exec() {
    fault_of_crun(async |daemon, stub| {
        for after in [false, true] {
            let (pod, a) = pod(daemon, stub, &FOREVER).await;
            let pid = pod.run(&a, &Io::none()).await;
            pod.exec("a", "e1", &process(&FOREVER), &Io::fifos(&a.path, "e1"))
                .await
                .unwrap();
            let gate = if after {
                stub.holds_after("exec")
            } else {
                stub.holds_before("exec")
            };
            let _held = gate.holds(pod.start_process("a", "e1")).await;
            dies(daemon, stub, pod, &[(&a, pid, 137)]).await;
        }
    });
}

#[test]
fn with_execs_that_run() {
    fault(async |daemon, stub| {
        let (pod, a) = pod(daemon, stub, &FOREVER).await;
        let pid = pod.run(&a, &Io::none()).await;
        for exec in ["e1", "e2"] {
            pod.exec("a", exec, &process(&shell("sleep 1000 & sleep 1000")), &Io::none())
                .await
                .unwrap();
            pod.start_process("a", exec).await.unwrap();
        }
        dies(daemon, stub, pod, &[(&a, pid, 137)]).await;
    });
}

#[test]
fn with_a_paused_container() {
    fault(async |daemon, stub| {
        let (pod, a) = pod(daemon, stub, &FOREVER).await;
        let pid = pod.run(&a, &Io::none()).await;
        pod.exec("a", "e1", &process(&FOREVER), &Io::none()).await.unwrap();
        pod.start_process("a", "e1").await.unwrap();
        pod.pause("a").await.unwrap();
        dies(daemon, stub, pod, &[(&a, pid, 137)]).await;
    });
}

#[test]
fn with_a_container_that_has_ended_whose_true_status_is_told() {
    fault(async |daemon, stub| {
        let (pod, a) = pod(daemon, stub, &shell("exit 42")).await;
        let pid = pod.run(&a, &Io::none()).await;
        assert_eq!(pod.wait("a", "").await.unwrap(), 42);
        dies(daemon, stub, pod, &[(&a, pid, 42)]).await;
    });
}

#[test]
fn before_and_after_crun_has_deleted() {
    fault_of_crun(async |daemon, stub| {
        for after in [false, true] {
            let (pod, a) = pod(daemon, stub, &shell("exit 42")).await;
            let pid = pod.run(&a, &Io::none()).await;
            assert_eq!(pod.wait("a", "").await.unwrap(), 42);
            let gate = if after {
                stub.holds_after("delete")
            } else {
                stub.holds_before("delete")
            };
            let held = gate.holds(pod.delete("a", "")).await;
            pod.dies().await;
            // The next one is not held.
            stub.heal();
            let response = delete_dead(daemon, &a).unwrap();
            assert_eq!((response.pid, response.exit_status), (pid, 42));
            daemon.assert_nothing_left();
            drop(held);
            the_next_works(daemon, stub, &a).await;
        }
    });
}

#[test]
fn and_crun_hangs_for_ever_in_the_delete_of_what_runs() {
    fault_of_crun(async |daemon, stub| {
        let (pod, a) = pod(daemon, stub, &shell("sleep 1000 & sleep 1000")).await;
        let pid = pod.run(&a, &Io::none()).await;
        pod.exec("a", "e1", &process(&FOREVER), &Io::none()).await.unwrap();
        pod.start_process("a", "e1").await.unwrap();
        let _gate = stub.holds_before("delete");
        dies(daemon, stub, pod, &[(&a, pid, 137)]).await;
    });
}

#[test]
fn and_crun_is_not_there_any_more() {
    fault_of_crun(async |daemon, stub| {
        let (pod, a) = pod(daemon, stub, &FOREVER).await;
        let pid = pod.run(&a, &Io::none()).await;
        pod.dies().await;
        stub.uninstall();
        let response = delete_dead(daemon, &a).unwrap();
        assert_eq!((response.pid, response.exit_status), (pid, 137));
        daemon.assert_nothing_left();
        stub.install();
        the_next_works(daemon, stub, &a).await;
    });
}

#[test]
fn and_crun_refuses_to_delete() {
    fault_of_crun(async |daemon, stub| {
        let (pod, a) = pod(daemon, stub, &FOREVER).await;
        let pid = pod.run(&a, &Io::none()).await;
        stub.at("delete", "exit 1");
        dies(daemon, stub, pod, &[(&a, pid, 137)]).await;
    });
}

#[test]
fn while_hooks_of_start_and_delete_run() {
    fault(async |daemon, stub| {
        for hook in ["poststart", "poststop"] {
            let (pod, mut a) = pod(daemon, stub, &shell("test -e /go || exec sleep 100000; exit 3")).await;
            let gate = Gate::new(a.path.join("gate"));
            a.spec["hooks"][hook] = gate.hook();
            let status = if hook == "poststop" { 3 } else { 137 };
            if hook == "poststop" {
                fs::write(a.path.join("upper/go"), "").unwrap();
            }
            let pid = pod.create(&a, &Io::none()).await.unwrap();
            let _held = if hook == "poststop" {
                pod.start_process("a", "").await.unwrap();
                assert_eq!(pod.wait("a", "").await.unwrap(), 3);
                gate.holds(pod.delete("a", "")).await
            } else {
                gate.holds(pod.start_process("a", "")).await
            };
            dies(daemon, stub, pod, &[(&a, pid, status)]).await;
        }
    });
}

#[test]
fn with_a_user_namespace() {
    fault(async |daemon, stub| {
        let (pod, mut a) = pod(daemon, stub, &shell("sleep 1000 & sleep 1000")).await;
        let ids = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        a.spec["linux"]["uidMappings"] = ids.clone();
        a.spec["linux"]["gidMappings"] = ids;
        a.spec["linux"]["namespaces"]
            .as_array_mut()
            .unwrap()
            .push(json!({"type": "user"}));
        let pid = pod.run(&a, &Io::none()).await;
        dies(daemon, stub, pod, &[(&a, pid, 137)]).await;
    });
}

/// A sandbox and a container that shares its pid namespace: the shim, both bundles and both pids.
async fn two(daemon: &Daemon, stub: &Stub) -> (Pod, [Bundle; 2], [u32; 2]) {
    let sandbox = daemon.bundle("sandbox", &FOREVER).annotate(SANDBOX, "sandbox");
    let mut pod = Pod::start(daemon, &sandbox).await;
    pod.options = stub.options("");
    let first = pod.run(&sandbox, &Io::none()).await;
    let mut app = daemon
        .bundle("app", &shell("sleep 1000 & touch /ready; sleep 1000"))
        .annotate(SANDBOX, "sandbox");
    for namespace in app.spec["linux"]["namespaces"].as_array_mut().unwrap() {
        if namespace["type"] == "pid" {
            namespace["path"] = format!("/proc/{first}/ns/pid").into();
        }
    }
    Pod::start(daemon, &app).await;
    let second = pod.run(&app, &Io::none()).await;
    pod.exec("app", "e1", &process(&FOREVER), &Io::none()).await.unwrap();
    pod.start_process("app", "e1").await.unwrap();
    appears(&app.path.join("upper/ready")).await;
    (pod, [sandbox, app], [first, second])
}

#[test]
fn with_a_pod_of_two_that_share_their_pids() {
    fault(async |daemon, stub| {
        for reverse in [false, true] {
            let (pod, bundles, pids) = two(daemon, stub).await;
            let mut containers = [(&bundles[0], pids[0], 137), (&bundles[1], pids[1], 137)];
            if reverse {
                containers.reverse();
            }
            dies(daemon, stub, pod, &containers).await;
        }
    });
}

/// What containerd 2 does with a pod's container when the pod's shim has died: it removes the bundle and asks nobody.
fn forgotten(bundle: &Bundle) {
    let rootfs = bundle.path.join("rootfs");
    nix::mount::umount2(&rootfs, nix::mount::MntFlags::MNT_DETACH).unwrap();
    fs::remove_dir_all(&bundle.path).unwrap();
}

#[test]
fn with_a_pod_of_which_containerd_deletes_the_sandbox_alone() {
    fault(async |daemon, stub| {
        let (pod, [sandbox, app], pids) = two(daemon, stub).await;
        let [alone, ended] = [("alone", "exec sleep 1000"), ("ended", "exit 7")]
            .map(|(id, script)| daemon.bundle(id, &shell(script)).annotate(SANDBOX, "sandbox"));
        let running = pod.run(&alone, &Io::none()).await;
        let over = pod.run(&ended, &Io::none()).await;
        assert_eq!(pod.wait("ended", "").await.unwrap(), 7);
        daemon.hears("exit ended 7").await;
        pod.dies().await;
        let response = delete_dead(daemon, &sandbox).unwrap();
        assert_eq!((response.pid, response.exit_status), (pids[0], 137));
        daemon.assert_nothing_left();
        assert_eq!(names_of_records(&sandbox), [""; 0]);
        // containerd 1.6 and 1.7 ask for the others too.
        for (bundle, pid, status) in [(&app, pids[1], 137), (&alone, running, 137), (&ended, over, 7)] {
            let response = delete_dead(daemon, bundle).unwrap();
            assert_eq!((response.pid, response.exit_status), (pid, status), "{}", bundle.id);
        }
        daemon.assert_nothing_left();
    });
}

#[test]
fn with_a_pod_of_which_containerd_has_forgotten_all_but_the_sandbox() {
    fault(async |daemon, stub| {
        for works in [true, false] {
            if !works && !stub.is_crun() {
                continue;
            }
            let (pod, [sandbox, app], pids) = two(daemon, stub).await;
            let alone = daemon.bundle("alone", &FOREVER).annotate(SANDBOX, "sandbox");
            pod.run(&alone, &Io::none()).await;
            pod.dies().await;
            forgotten(&app);
            forgotten(&alone);
            if !works {
                stub.at("delete", "exit 1");
            }
            let response = delete_dead(daemon, &sandbox).unwrap();
            assert_eq!((response.pid, response.exit_status), (pids[0], 137));
            daemon.assert_nothing_left();
            the_next_works(daemon, stub, &sandbox).await;
        }
    });
}

#[test]
fn at_each_step_of_a_container_that_containerd_forgets() {
    fault(async |daemon, stub| {
        for verb in ["create", "start", "exec", "delete"] {
            for done in [false, true] {
                // Hooks run in the middle of a step, and in an exec there are none.
                if !stub.is_crun() && (done || verb == "exec") {
                    continue;
                }
                let sandbox = daemon.bundle("sandbox", &FOREVER).annotate(SANDBOX, "sandbox");
                let mut pod = Pod::start(daemon, &sandbox).await;
                pod.options = stub.options("");
                let pid = pod.run(&sandbox, &Io::none()).await;
                let mut app = daemon.bundle("app", &FOREVER).annotate(SANDBOX, "sandbox");
                Pod::start(daemon, &app).await;
                if verb != "exec" {
                    stub.hook(verb, &mut app);
                }
                if verb != "create" {
                    pod.create(&app, &Io::none()).await.unwrap();
                }
                if ["exec", "delete"].contains(&verb) {
                    pod.start_process("app", "").await.unwrap();
                }
                match verb {
                    "exec" => pod.exec("app", "e1", &process(&FOREVER), &Io::none()).await.unwrap(),
                    "delete" => {
                        pod.kill("app", "", libc::SIGKILL, false).await.unwrap();
                        pod.wait("app", "").await.unwrap();
                    }
                    _ => {}
                }
                let gate = if done {
                    stub.holds_after(verb)
                } else {
                    stub.holds_before(verb)
                };
                let held = match verb {
                    "create" => gate.holds(pod.create(&app, &Io::none())).await,
                    "start" => gate.holds(pod.start_process("app", "")).await,
                    "exec" => gate.holds(pod.start_process("app", "e1")).await,
                    _ => gate.holds(pod.delete("app", "")).await,
                };
                pod.dies().await;
                drop(held);
                stub.heal();
                forgotten(&app);
                let response = delete_dead(daemon, &sandbox).unwrap();
                assert_eq!((response.pid, response.exit_status), (pid, 137), "{verb} {done}");
                daemon.assert_nothing_left();
                fs::remove_dir_all(&sandbox.path).unwrap();
                fs::remove_file(gate.0).unwrap();
            }
        }
    });
}

#[test]
fn and_a_whole_pod_is_deleted_at_once() {
    fault(async |daemon, stub| {
        for hangs in [false, true] {
            if hangs && !stub.is_crun() {
                continue;
            }
            let (pod, [sandbox, app], pids) = two(daemon, stub).await;
            let more: Vec<Bundle> = (0..4)
                .map(|n| {
                    daemon
                        .bundle(&format!("more{n}"), &FOREVER)
                        .annotate(SANDBOX, "sandbox")
                })
                .collect();
            let mut containers = vec![(&sandbox, pids[0]), (&app, pids[1])];
            for bundle in &more {
                containers.push((bundle, pod.run(bundle, &Io::none()).await));
            }
            pod.dies().await;
            let _gate = hangs.then(|| stub.holds_before("delete"));
            let start = Start::default();
            let begin = std::time::Instant::now();
            let all: Vec<_> = containers
                .iter()
                .map(|(bundle, _)| begin_shim(daemon, bundle, &start, "delete"))
                .collect();
            for (one, (bundle, pid)) in all.into_iter().zip(&containers) {
                let response = deleted(&one.wait_with_output().unwrap()).unwrap();
                assert_eq!((response.pid, response.exit_status), (*pid, 137), "{}", bundle.id);
            }
            // containerd kills them then.
            assert!(begin.elapsed() < patience(5), "{:?}", begin.elapsed());
            daemon.assert_nothing_left();
            for (bundle, _) in containers {
                fs::remove_dir_all(&bundle.path).unwrap();
            }
        }
    });
}

#[test]
fn and_somebody_else_is_at_work_on_the_containers_of_the_pod() {
    fault(async |daemon, stub| {
        let sandbox = daemon.bundle("sandbox", &shell("exit 3")).annotate(SANDBOX, "sandbox");
        let mut pod = Pod::start(daemon, &sandbox).await;
        pod.options = stub.options("");
        let first = pod.run(&sandbox, &Io::none()).await;
        daemon.hears("exit sandbox 3").await;
        let mut others = Vec::new();
        for id in ["free", "app", "more", "most"] {
            let bundle = daemon.bundle(id, &FOREVER).annotate(SANDBOX, "sandbox");
            let pid = pod.run(&bundle, &Io::none()).await;
            others.push((bundle, pid));
        }
        pod.dies().await;
        let lock = |(bundle, _): &(Bundle, u32)| {
            let folder = fs::File::open(&bundle.path).unwrap();
            nix::fcntl::Flock::lock(folder, nix::fcntl::FlockArg::LockExclusive).unwrap()
        };
        let held: Vec<_> = others[1..].iter().map(lock).collect();
        let error = delete_dead(daemon, &sandbox).unwrap_err();
        assert!(error.contains("cleaning up sandbox took more than"), "{error}");
        assert!(others[1..].iter().all(|(_, pid)| lives(*pid)));
        // What nobody else is at work on is done all the same.
        assert!(!is_mounted(&sandbox.path.join("rootfs")) && !lives(others[0].1));
        drop(held);
        let response = delete_dead(daemon, &sandbox).unwrap();
        assert_eq!((response.pid, response.exit_status), (first, 3));
        daemon.assert_nothing_left();
    });
}

#[test]
fn and_a_record_in_the_sandbox_is_broken_or_not_of_this_pod() {
    fault(async |daemon, stub| {
        let sandbox = daemon.bundle("sandbox", &FOREVER).annotate(SANDBOX, "sandbox");
        let mut pod = Pod::start(daemon, &sandbox).await;
        pod.options = stub.options("");
        let first = pod.run(&sandbox, &Io::none()).await;
        let app = daemon.bundle("app", &FOREVER).annotate(SANDBOX, "sandbox");
        let pid = pod.run(&app, &Io::none()).await;
        pod.dies().await;
        assert_eq!(names_of_records(&sandbox), ["proxmox-lxcri.app.json"]);
        let [record, foreign] = ["app", "foreign"].map(|id| sandbox.path.join(format!("proxmox-lxcri.{id}.json")));
        let text = fs::read_to_string(&record).unwrap();
        fs::remove_file(&record).unwrap();
        for (path, broken, wanted) in [
            (&record, &text[..text.len() / 2], "cannot parse record"),
            (&foreign, &*text, "is of container app; nothing of it was touched"),
        ] {
            fs::write(path, broken).unwrap();
            let error = delete_dead(daemon, &sandbox).unwrap_err();
            assert!(
                error.contains(wanted) && error.contains(path.to_str().unwrap()),
                "{error}"
            );
            assert!(lives(pid));
            fs::remove_file(path).unwrap();
        }
        let of_another = text.replace("\"namespace\":\"contract\"", "\"namespace\":\"other\"");
        assert_ne!(text, of_another);
        fs::write(&record, of_another).unwrap();
        let response = delete_dead(daemon, &sandbox).unwrap();
        assert_eq!((response.pid, response.exit_status), (first, 137));
        assert!(lives(pid));
        fs::write(&record, text).unwrap();
        delete_dead(daemon, &sandbox).unwrap();
        daemon.assert_nothing_left();
    });
}

#[test]
fn nothing_of_a_container_that_is_deleted_stays_in_its_sandbox() {
    fault(async |daemon, stub| {
        let sandbox = daemon.bundle("sandbox", &FOREVER).annotate(SANDBOX, "sandbox");
        let mut pod = Pod::start(daemon, &sandbox).await;
        pod.options = stub.options("");
        pod.run(&sandbox, &Io::none()).await;
        let mut app = daemon.bundle("app", &shell("echo fine")).annotate(SANDBOX, "sandbox");
        it_works(&pod, &app).await;
        assert_eq!(names_of_records(&sandbox), [""; 0]);
        stub.fails("create", &mut app);
        pod.create(&app, &Io::none()).await.unwrap_err();
        assert_eq!(names_of_records(&sandbox), [""; 0]);
        stub.heal();
        // A sandbox that is gone first takes nothing from the others.
        pod.run(&app, &Io::none()).await;
        pod.kill("sandbox", "", libc::SIGKILL, false).await.unwrap();
        pod.wait("sandbox", "").await.unwrap();
        pod.delete("sandbox", "").await.unwrap();
        fs::remove_dir_all(&sandbox.path).unwrap();
        assert_eq!(pod.wait("app", "").await.unwrap(), 0);
        pod.delete("app", "").await.unwrap();
        pod.shutdown().await;
        daemon.assert_nothing_left();
    });
}

/// The second names of records in the bundle of a sandbox, and what may be left of making them.
fn names_of_records(sandbox: &Bundle) -> Vec<String> {
    let names = fs::read_dir(&sandbox.path).unwrap().flatten();
    names
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with("proxmox-lxcri.") && name != "proxmox-lxcri.json")
        .collect()
}

#[test]
fn and_the_record_is_broken() {
    fault(async |daemon, stub| {
        let (pod, a) = pod(daemon, stub, &FOREVER).await;
        let pid = pod.run(&a, &Io::none()).await;
        pod.dies().await;
        let record = a.path.join("proxmox-lxcri.json");
        let text = fs::read(&record).unwrap();
        fs::write(&record, &text[..text.len() / 2]).unwrap();
        let error = delete_dead(daemon, &a).unwrap_err();
        assert!(error.contains("cannot parse record"), "{error}");
        assert!(!is_mounted(&a.path.join("rootfs")));
        // Whoever repairs it, or the next start of a container of that id, finds the rest.
        fs::write(&record, &text).unwrap();
        let response = delete_dead(daemon, &a).unwrap();
        assert_eq!((response.pid, response.exit_status), (pid, 137));
        daemon.assert_nothing_left();
        the_next_works(daemon, stub, &a).await;
    });
}

// ---- and another one in its place ------------------------------------------------------------------------------------------------

#[test]
fn its_socket_is_taken_over_and_the_cleaning_up_leaves_that_alone() {
    fault(async |daemon, stub| {
        let (pod, bundles, pids) = two(daemon, stub).await;
        let address = pod.address.clone();
        pod.dies().await;
        // A third container of the pod comes before anybody has cleaned up.
        let next = daemon.bundle("next", &shell("echo fine")).annotate(SANDBOX, "sandbox");
        let mut second = Pod::start(daemon, &next).await;
        second.options = stub.options("");
        assert_eq!(second.address, address);
        let runs = daemon.bundle("runs", &FOREVER).annotate(SANDBOX, "sandbox");
        let running = second.run(&runs, &Io::none()).await;
        for (bundle, pid) in bundles.iter().zip(pids) {
            assert_eq!(delete_dead(daemon, bundle).unwrap().pid, pid);
        }
        it_works(&second, &next).await;
        // The sandbox's `delete` meant the dead shim's containers.
        assert!(lives(running));
        second.kill("runs", "", libc::SIGKILL, false).await.unwrap();
        assert_eq!(second.wait("runs", "").await.unwrap(), 137);
        second.delete("runs", "").await.unwrap();
        second.reconnect().await;
        assert_eq!(second.connect("next").await.unwrap(), 0);
        second.shutdown().await;
        daemon.assert_nothing_left();
    });
}

#[test]
fn twenty_starts_at_once_for_one_pod_make_one_shim() {
    fault(async |daemon, stub| {
        let (former, ..) = two(daemon, stub).await;
        // The socket of a dead shim makes it harder.
        former.dies().await;
        let bundles: Vec<Bundle> = (0..20)
            .map(|n| {
                let bundle = daemon.bundle(&format!("c{n}"), &["sh", "-c", "echo fine"]);
                let bundle = bundle.annotate(SANDBOX, "sandbox");
                bundle.write();
                bundle
            })
            .collect();
        let start = Start::default();
        let all: Vec<_> = bundles
            .iter()
            .map(|bundle| begin_shim(daemon, bundle, &start, "start"))
            .collect();
        let answers: Vec<String> = all
            .into_iter()
            .map(|one| {
                let output = one.wait_with_output().unwrap();
                assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
                String::from_utf8(output.stdout).unwrap()
            })
            .collect();
        assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
        // Not what watches over the containers that the dead one has left.
        assert_eq!(leaks::shims(leaks::OURS).len(), 1);
        // The log is that of whichever came first.
        let start = Start {
            reads_log: false,
            ..start
        };
        let mut pod = Pod::start_with(daemon, &bundles[0], &start).await;
        pod.options = stub.options("");
        it_works(&pod, &bundles[0]).await;
        it_works(&pod, &bundles[19]).await;
        for id in ["sandbox", "app"] {
            let path = daemon.folder.join(id);
            let bundle = Bundle {
                id: id.into(),
                path,
                spec: json!({}),
                rootfs: vec![],
            };
            delete_dead(daemon, &bundle).unwrap();
        }
        pod.shutdown().await;
        daemon.assert_nothing_left();
    });
}
