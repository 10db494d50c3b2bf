//! Monitors and inits that end or stand still when nobody expects it.

use std::{
    io::{Read, Write},
    os::unix::fs::OpenOptionsExt,
};

use super::*;

/// Kills the monitor of `a`, and waits for its end.
async fn loses_its_monitor() {
    let monitor = monitor("a");
    send(monitor, libc::SIGKILL);
    until("the monitor's end", || (!lives(monitor)).then_some(())).await;
}

#[test]
fn a_container_that_was_started_outlives_its_monitor_and_its_exit_is_known() {
    lxc(async |daemon| {
        for (killed, status) in [(true, 137), (false, 3)] {
            let known = daemon.told().len();
            let (pod, a) = pod(daemon, &shell("while read line; do echo $line; done; exit 3")).await;
            let io = Io::fifos(&a.path, "init");
            let mut stdout = fs::OpenOptions::new();
            let mut stdout = stdout
                .read(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(&io.stdout)
                .unwrap();
            let mut stdin = io.open_stdin();
            let pid = pod.run(&a, &io).await;
            loses_its_monitor().await;
            // A signal of its death is there before its end is seen: what can still answer, lives on.
            stdin.write_all(b"here\n").unwrap();
            let mut answer = [0; 5];
            until("init answers", || {
                stdout.read(&mut answer).ok().filter(|read| *read > 0)
            })
            .await;
            assert_eq!(&answer, b"here\n");
            let state = pod.state("a", "").await.unwrap();
            assert_eq!((state.status, state.pid), (Status::RUNNING.into(), pid));
            assert_eq!(pod.pids("a").await.unwrap().into_keys().collect::<Vec<_>>(), [pid]);
            pod.exec("a", "e1", &process(&["true"]), &Io::none()).await.unwrap();
            pod.start_process("a", "e1").await.unwrap();
            assert_eq!(pod.wait("a", "e1").await.unwrap(), 0);
            assert_eq!(tool("lxc-info", &["-n", "a", "-sH"]).await, "STOPPED\n");
            assert_eq!(exits(daemon, known), ["exit e1 0"]);
            assert!(lives(pid), "its init has gone along");
            match killed {
                true => pod.kill("a", "", libc::SIGKILL, false).await.unwrap(),
                false => {
                    drop(stdin);
                    pod.close_stdin("a", "").await.unwrap();
                }
            }
            assert_eq!(pod.wait("a", "").await.unwrap(), status);
            daemon.hears_after(known, &format!("exit a {status}")).await;
            is_deleted_clean(daemon, pod, &a, status).await;
            let told = exits(daemon, known);
            assert_eq!(told, ["exit e1 0", &format!("exit a {status}"), "exit a 0"]);
        }
    });
}

#[test]
fn a_container_that_was_not_started_ends_with_its_monitor() {
    lxc(async |daemon| {
        let (pod, a) = pod(daemon, &["touch", "/ran"]).await;
        let pid = pod.create(&a, &Io::none()).await.unwrap();
        loses_its_monitor().await;
        assert_eq!(pod.wait("a", "").await.unwrap(), 137);
        assert!(!lives(pid), "its init lives");
        let state = pod.state("a", "").await.unwrap();
        assert_eq!(
            (state.status, state.pid, state.exit_status),
            (Status::STOPPED.into(), pid, 137)
        );
        let refusal = pod.start_process("a", "").await.unwrap_err();
        assert_eq!(refusal.code, Code::FAILED_PRECONDITION, "{}", refusal.text);
        assert!(!a.path.join("upper/ran").exists());
        daemon.hears("exit a 137").await;
        is_deleted_clean(daemon, pod, &a, 137).await;
        assert_eq!(exits(daemon, 0), ["exit a 137", "exit a 0"]);
    });
}

#[test]
fn a_monitor_that_stands_still_does_not_hinder_the_delete_of_a_dead_shim() {
    lxc(async |daemon| {
        let (pod, a) = pod(daemon, &FOREVER).await;
        let pid = pod.run(&a, &Io::none()).await;
        send(monitor("a"), libc::SIGSTOP);
        pod.dies().await;
        let response = delete_dead(daemon, &a).unwrap();
        assert_eq!((response.pid, response.exit_status), (pid, 137));
        daemon.assert_nothing_left();
        the_next_works(daemon, &a).await;
    });
}

#[test]
fn a_monitor_that_stands_still_does_not_keep_back_an_exit() {
    lxc(async |daemon| {
        let (pod, a) = pod(daemon, &shell("sleep 1000 & wait; exit 3")).await;
        pod.run(&a, &Io::none()).await;
        send(monitor("a"), libc::SIGSTOP);
        pod.kill("a", "", libc::SIGKILL, false).await.unwrap();
        assert_eq!(pod.wait("a", "").await.unwrap(), 137);
        is_deleted_clean(daemon, pod, &a, 137).await;
    });
}

#[test]
fn an_init_that_is_killed_before_its_start_has_exited_and_cannot_be_started() {
    lxc(async |daemon| {
        let (pod, a) = pod(daemon, &["touch", "/ran"]).await;
        let pid = pod.create(&a, &Io::none()).await.unwrap();
        send(pid, libc::SIGKILL);
        assert_eq!(pod.wait("a", "").await.unwrap(), 137);
        assert_eq!(pod.status("a").await, Status::STOPPED);
        let refusal = pod.start_process("a", "").await.unwrap_err();
        assert_eq!(refusal.code, Code::FAILED_PRECONDITION, "{}", refusal.text);
        assert!(!a.path.join("upper/ran").exists());
        daemon.hears("exit a 137").await;
        is_deleted_clean(daemon, pod, &a, 137).await;
        assert_eq!(daemon.told()[..3], ["create a", "exit a 137", "delete a 137"]);
    });
}

#[test]
fn a_container_that_reboots_or_powers_off_has_ended_once_and_does_not_come_back() {
    lxc(async |daemon| {
        // reboot(2): "the signal that the init process is terminated with".
        for (program, signal) in [("reboot", libc::SIGHUP), ("poweroff", libc::SIGINT)] {
            let known = daemon.told().len();
            let status = 128 + signal.cast_unsigned();
            let (pod, mut a) = pod(daemon, &shell(&format!("echo up >>/boots; {program} -f; sleep 100000"))).await;
            for set in ["bounding", "effective", "permitted"] {
                let set = a.spec["process"]["capabilities"][set].as_array_mut().unwrap();
                set.push("CAP_SYS_BOOT".into());
            }
            let pid = pod.run(&a, &Io::none()).await;
            assert_eq!(pod.wait("a", "").await.unwrap(), status, "{program}");
            let state = pod.state("a", "").await.unwrap();
            assert_eq!((state.status, state.pid), (Status::STOPPED.into(), pid));
            daemon.hears_after(known, &format!("exit a {status}")).await;
            assert_eq!(pod.delete("a", "").await.unwrap().exit_status, status);
            assert_eq!(
                fs::read_to_string(a.path.join("upper/boots")).unwrap(),
                "up\n",
                "{program}"
            );
            pod.shutdown().await;
            daemon.assert_nothing_left();
            let told = daemon.told().split_off(known);
            let expected = [
                "create a",
                "start a",
                &format!("exit a {status}"),
                &format!("delete a {status}"),
            ];
            assert_eq!(told, expected);
            fs::remove_dir_all(&a.path).unwrap();
        }
    });
}

// ---- systems -----------------------------------------------------------------------------------------------------------------------
