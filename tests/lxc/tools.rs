//! LXC's own tools see and do what they would with any container.

use super::*;

#[test]
fn lxc_ls_lists_a_container_while_it_runs() {
    lxc(async |daemon| {
        let (pod, a) = pod(daemon, &FOREVER).await;
        pod.run(&a, &Io::none()).await;
        assert_eq!(tool("lxc-ls", &["-1", "--active"]).await, "a\n");
        assert_eq!(backend::holding(NAMESPACE, "a"), [BACKEND]);
        pod.end("a").await;
        assert_eq!(tool("lxc-ls", &["-1"]).await, "");
        pod.shutdown().await;
    });
}

#[test]
fn lxc_info_tells_the_state_and_the_pid_that_the_task_tells() {
    lxc(async |daemon| {
        let (pod, a) = pod(daemon, &FOREVER).await;
        let pid = pod.run(&a, &Io::none()).await;
        assert_eq!(pod.state("a", "").await.unwrap().pid, pid);
        assert_eq!(tool("lxc-info", &["-n", "a", "-sH"]).await, "RUNNING\n");
        assert_eq!(tool("lxc-info", &["-n", "a", "-pH"]).await, format!("{pid}\n"));
        pod.end("a").await;
        pod.shutdown().await;
    });
}

#[test]
fn lxc_attach_runs_a_program_inside() {
    lxc(async |daemon| {
        let (pod, a) = pod(daemon, &shell("echo $$ >/pid; exec sleep 100000")).await;
        pod.run(&a, &Io::none()).await;
        appears(&a.path.join("upper/pid")).await;
        let script = "hostname; cat /pid; readlink /proc/1/exe";
        let said = tool("lxc-attach", &["-n", "a", "--", "/bin/sh", "-c", script]).await;
        assert_eq!(said, "box\n1\n/bin/busybox\n");
        // That was no process of the shim's.
        assert_eq!(exits(daemon, 0), [""; 0]);
        pod.end("a").await;
        pod.shutdown().await;
    });
}

/// Whether the cgroup that a process is in is frozen.
fn is_frozen(pid: u32) -> bool {
    let states = universe::cgroups_with(&universe::token(), pid)
        .into_iter()
        .filter_map(|cgroup| {
            let (file, frozen) = match cgroup_v2() {
                true => ("cgroup.events", "frozen 1"),
                false => ("freezer.state", "FROZEN"),
            };
            let text = fs::read_to_string(cgroup.join(file)).ok()?;
            Some(text.contains(frozen))
        });
    let states: Vec<_> = states.collect();
    assert_eq!(states.len(), 1, "not one cgroup of {pid} that can be frozen");
    states[0]
}

#[test]
fn lxc_freeze_stops_a_container_that_the_task_calls_running_until_lxc_unfreeze() {
    lxc(async |daemon| {
        for program in [&FOREVER[..], &["/sbin/init"]] {
            let (pod, mut a) = pod(daemon, program).await;
            if program == ["/sbin/init"] {
                systems::with_busybox_init(&mut a, &[]);
            }
            let pid = pod.run(&a, &Io::none()).await;
            pod.exec("a", "e1", &process(&["true"]), &Io::none()).await.unwrap();
            tool("lxc-freeze", &["-n", "a"]).await;
            assert!(is_frozen(pid), "{program:?}");
            assert_eq!(tool("lxc-info", &["-n", "a", "-sH"]).await, "FROZEN\n");
            // The task has not paused it.
            assert_eq!(pod.status("a").await, Status::RUNNING);
            let refusal = pod.start_process("a", "e1").await;
            refused(refusal, Code::FAILED_PRECONDITION, "the container `a` is paused");
            tool("lxc-unfreeze", &["-n", "a"]).await;
            assert!(!is_frozen(pid), "{program:?}");
            assert_eq!(tool("lxc-info", &["-n", "a", "-sH"]).await, "RUNNING\n");
            pod.start_process("a", "e1").await.unwrap();
            assert_eq!(pod.wait("a", "e1").await.unwrap(), 0);
            // What is frozen is killed all the same.
            tool("lxc-freeze", &["-n", "a"]).await;
            pod.end("a").await;
            pod.shutdown().await;
            daemon.assert_nothing_left();
            fs::remove_dir_all(&a.path).unwrap();
        }
    });
}

/// Options of setpriv(1).
const WITHOUT_PTRACE: [&str; 4] = ["--bounding-set", "-sys_ptrace", "--inh-caps", "-sys_ptrace"];

/// Whether a process that is root, and lacks no capability but the one to trace what is not to be traced, can look into this one.
async fn can_be_traced(pid: u32) -> bool {
    let script = format!("echo asks; readlink /proc/{pid}/exe >/dev/null && echo reads; :");
    let said = tool(
        "setpriv",
        &[&["--bounding-set", "-sys_ptrace"][..], &shell(&script)].concat(),
    )
    .await;
    assert!(said.starts_with("asks\n"), "{said}");
    said == "asks\nreads\n"
}

#[test]
fn the_helper_cannot_be_traced_and_the_program_that_it_becomes_can() {
    lxc(async |daemon| {
        // Else the helper could be traced by nobody who lacks the capability that it has itself.
        let shim = daemon.folder.join("shim-without-ptrace");
        let script = format!("#!/bin/sh\nexec setpriv {} {SHIM} \"$@\"\n", WITHOUT_PTRACE.join(" "));
        fs::write(&shim, script).unwrap();
        fs::set_permissions(&shim, fs::Permissions::from_mode(0o755)).unwrap();
        let start = Start {
            program: Some(shim),
            ..Start::default()
        };
        let a = daemon.bundle("a", &FOREVER);
        let mut pod = Pod::start_with(daemon, &a, &start).await;
        pod.options = on(BACKEND);
        let pid = pod.create(&a, &Io::none()).await.unwrap();
        assert!(!can_be_traced(pid).await, "init can be traced");
        pod.start_process("a", "").await.unwrap();
        assert!(can_be_traced(pid).await, "nothing can be traced");
        let gate = FileGate::in_exec(&a.path);
        pod.exec("a", "e1", &process(&FOREVER), &Io::none()).await.unwrap();
        let starting = pod.start_process("a", "e1");
        let looking = async {
            let held = gate.reached().await;
            let mut execs: Vec<_> = pod.pids("a").await.unwrap().into_keys().collect();
            execs.retain(|exec| *exec != pid);
            assert_eq!(execs.len(), 1, "{execs:?}");
            let traced = can_be_traced(execs[0]).await;
            drop(held);
            traced
        };
        let (started, traced) = tokio::join!(starting, looking);
        assert!(!traced, "the process of an exec can be traced");
        assert!(can_be_traced(started.unwrap()).await, "nothing can be traced");
        pod.end("a").await;
        pod.shutdown().await;
    });
}

#[test]
fn a_container_whose_folder_was_removed_behind_our_back_ends_and_leaves_nothing() {
    lxc(async |daemon| {
        let (pod, a) = pod(daemon, &FOREVER).await;
        let pid = pod.run(&a, &Io::none()).await;
        let monitor = monitor("a");
        fs::remove_dir_all(Path::new(LXC_PATH).join("a")).unwrap();
        assert_eq!(pod.state("a", "").await.unwrap().pid, pid);
        pod.kill("a", "", libc::SIGKILL, false).await.unwrap();
        assert_eq!(pod.wait("a", "").await.unwrap(), 137);
        pod.delete("a", "").await.unwrap();
        until("the monitor ends", || (!lives(monitor)).then_some(())).await;
        pod.shutdown().await;
    });
}

/// LXC's socket is one of the network namespace, and takes whoever is root there.
#[test]
fn lxcs_socket_answers_no_other_container() {
    lxc(async |daemon| {
        let (pod, a) = pod(daemon, &FOREVER).await;
        let pid = pod.run(&a, &Io::none()).await;
        // As root of a container that has the host's network.
        let stop =
            "lxc-info --version >/dev/null && echo asks; timeout -s KILL 10 lxc-stop -k -n a; lxc-info -n a -sH; :";
        for inside in [
            &["unshare", "--pid", "--fork", "--mount-proc"][..],
            // All capabilities, in a user namespace that has all of the host's others.
            &["unshare", "--user", "--map-root-user"],
            // And the host's processes, but none of its capabilities.
            &["setpriv", "--bounding-set", "-all", "--inh-caps", "-all"],
        ] {
            let [program, arguments @ ..] = inside else {
                unreachable!()
            };
            let said = tool(program, &[arguments, &shell(stop)].concat()).await;
            assert!(
                said.starts_with("asks\n") && !said.contains("RUNNING"),
                "{inside:?}: {said}"
            );
            assert!(lives(pid), "{inside:?}");
        }
        assert_eq!(tool("lxc-info", &["-n", "a", "-sH"]).await, "RUNNING\n");
        assert_eq!(exits(daemon, 0), [""; 0]);
        pod.end("a").await;
        pod.shutdown().await;
    });
}

/// CVE-2019-5736: what a container can execute of the host's, it must not be able to write.
#[test]
fn the_helper_cannot_be_written_by_way_of_the_process_that_it_is() {
    lxc(async |daemon| {
        let (pod, a) = pod(daemon, &FOREVER).await;
        let pid = pod.create(&a, &Io::none()).await.unwrap();
        let program = format!("/proc/{pid}/exe");
        assert!(fs::read(&program).unwrap().starts_with(b"\x7fELF"));
        // While it runs the kernel refuses that by itself; afterwards the mount does.
        let mount = nix::sys::statvfs::statvfs(program.as_str()).unwrap();
        assert!(mount.flags().contains(nix::sys::statvfs::FsFlags::ST_RDONLY));
        pod.delete("a", "").await.unwrap();
        pod.shutdown().await;
    });
}

#[test]
fn a_container_that_lxc_stop_kills_behind_our_back_has_exited_once() {
    lxc(async |daemon| {
        let (pod, a) = pod(daemon, &FOREVER).await;
        pod.run(&a, &Io::none()).await;
        tool("lxc-stop", &["-k", "-n", "a"]).await;
        assert_eq!(pod.wait("a", "").await.unwrap(), 137);
        assert_eq!(pod.status("a").await, Status::STOPPED);
        daemon.hears("exit a 137").await;
        is_deleted_clean(daemon, pod, &a, 137).await;
        assert_eq!(exits(daemon, 0), ["exit a 137", "exit a 0"]);
    });
}

#[test]
fn a_container_that_lxc_stop_asks_to_end_has_exited_as_it_did() {
    lxc(async |daemon| {
        let script = "trap 'exit 3' TERM; touch /ready; while :; do sleep 0.01; done";
        let (pod, a) = pod(daemon, &shell(script)).await;
        pod.run(&a, &Io::none()).await;
        appears(&a.path.join("upper/ready")).await;
        tool("lxc-stop", &["-n", "a"]).await;
        assert_eq!(pod.wait("a", "").await.unwrap(), 3);
        assert_eq!(pod.status("a").await, Status::STOPPED);
        daemon.hears("exit a 3").await;
        is_deleted_clean(daemon, pod, &a, 3).await;
        assert_eq!(exits(daemon, 0), ["exit a 3", "exit a 0"]);
    });
}

#[test]
fn another_lxc_path_is_where_the_tools_find_the_container() {
    lxc(async |daemon| {
        let (mut pod, a) = pod(daemon, &FOREVER).await;
        let path = daemon.folder.join("containers");
        let text = path.to_str().unwrap();
        pod.options = Some(options(&format!("backend = \"{BACKEND}\"\nlxc_path = \"{text}\"")));
        let pid = pod.run(&a, &Io::none()).await;
        assert_eq!(tool("lxc-ls", &["-P", text, "-1", "--active"]).await, "a\n");
        assert_eq!(
            tool("lxc-info", &["-P", text, "-n", "a", "-pH"]).await,
            format!("{pid}\n")
        );
        assert_eq!(fs::read_dir(LXC_PATH).unwrap().count(), 0);
        pod.end("a").await;
        assert_eq!(fs::read_dir(&path).map_or(0, Iterator::count), 0);
        pod.shutdown().await;
        remove_locks_of(&path);
    });
}

// ---- what is there already ---------------------------------------------------------------------------------------------------------
