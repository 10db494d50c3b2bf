//! The user's way: `ctr`, with right and with wrong inputs.

use std::{
    io::{Read, Write},
    os::{fd::AsRawFd, unix::process::CommandExt},
    process::Stdio,
    sync::{Arc, Mutex},
};

use crate::support::{backend, image, node, until};

#[test]
fn a_run_shows_the_output_and_exits_with_the_containers_status() {
    node(async |node| {
        let id = format!("run-{}", node.namespace);
        let run = node
            .ctr_run(&["--rm"], &id, &["sh", "-c", "echo out; echo err >&2; exit 7"])
            .await;
        run.assert_status(7);
        assert_eq!(run.stdout, "out\n");
        assert!(run.stderr.contains("err\n"), "{}", run.stderr);
    });
}

#[test]
fn what_is_piped_into_a_run_comes_out() {
    node(async |node| {
        let id = format!("pipe-{}", node.namespace);
        let mut arguments = vec!["run", "--rm"];
        arguments.extend(node.ctr_runtime());
        arguments.extend([image::BUSYBOX, &id, "sh", "-c", "head -n 2 | tr a-z A-Z"]);
        // Not to the end of the input: ctr 1.6 forgets to pass on an end that comes before the container was created.
        let run = node.ctr_fed(&arguments, b"pear\napple\n").await;
        assert_eq!(run.assert_ok().stdout, "PEAR\nAPPLE\n");
    });
}

#[test]
fn a_run_with_a_terminal_takes_the_size_of_the_callers() {
    node(async |node| {
        let id = format!("tty-{}", node.namespace);
        let mut arguments = vec!["run", "--rm", "--tty"];
        arguments.extend(node.ctr_runtime());
        let script =
            "tty; while [ \"$(stty size)\" != '33 111' ]; do :; done; echo sized; read word; echo word $word; exit 5";
        arguments.extend([image::BUSYBOX, &id, "sh", "-c", script]);
        let size = nix::pty::Winsize {
            ws_row: 33,
            ws_col: 111,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pty = nix::pty::openpty(Some(&size), None).unwrap();
        let slave = pty.slave;
        let mut command = node.ctr_command(&arguments);
        command
            .stdin(Stdio::from(slave.try_clone().unwrap()))
            .stdout(Stdio::from(slave.try_clone().unwrap()))
            .stderr(Stdio::from(slave.try_clone().unwrap()));
        // SAFETY: both calls are async-signal-safe; descriptor 0 is the terminal by then.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                libc::ioctl(0, libc::TIOCSCTTY, 0);
                Ok(())
            });
        }
        let mut child = command.spawn().unwrap();
        drop((command, slave));
        assert!(pty.master.as_raw_fd() > 2);
        let (mut reader, mut writer) = (
            std::fs::File::from(pty.master.try_clone().unwrap()),
            std::fs::File::from(pty.master),
        );
        let seen = Arc::new(Mutex::new(String::new()));
        let list = seen.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // EIO: the last holder of the other side has gone.
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                list.lock()
                    .unwrap()
                    .push_str(&String::from_utf8_lossy(&buffer[..count]));
            }
        });
        let shows = async |text: &str| {
            until(text, async || seen.lock().unwrap().contains(text).then_some(())).await;
        };
        shows("/dev/pts/").await;
        shows("sized").await;
        writer.write_all(b"hello\n").unwrap();
        shows("word hello").await;
        let status = tokio::task::spawn_blocking(move || child.wait())
            .await
            .unwrap()
            .unwrap();
        assert_eq!(status.code(), Some(5), "{}", seen.lock().unwrap());
    });
}

#[test]
fn a_detached_container_is_listed_entered_paused_measured_and_killed() {
    node(async |node| {
        let id = &format!("long-{}", node.namespace);
        node.ctr_run(&["--detach", "--null-io"], id, &["sleep", "1000"])
            .await
            .assert_ok();
        let status = async || {
            let list = node.ctr(&["tasks", "list"]).await;
            let line = list
                .assert_ok()
                .stdout
                .lines()
                .find(|line| line.starts_with(id.as_str()));
            line.unwrap_or_else(|| panic!("{id} is not listed"))
                .split_whitespace()
                .nth(2)
                .unwrap()
                .to_string()
        };
        assert_eq!(status().await, "RUNNING");

        let exec = node
            .ctr(&["tasks", "exec", "--exec-id", "one", id, "sh", "-c", "echo in; exit 3"])
            .await;
        assert_eq!(exec.assert_status(3).stdout, "in\n");
        let exec = node
            .ctr(&["tasks", "exec", "--exec-id", "two", "--cwd", "/tmp", id, "pwd"])
            .await;
        assert_eq!(exec.assert_ok().stdout, "/tmp\n");

        node.ctr(&["tasks", "pause", id]).await.assert_ok();
        assert_eq!(status().await, "PAUSED");
        node.ctr(&["tasks", "resume", id]).await.assert_ok();
        assert_eq!(status().await, "RUNNING");

        let processes = node.ctr(&["tasks", "ps", id]).await;
        assert_eq!(processes.assert_ok().stdout.lines().count(), 2, "{}", processes.stdout);
        let metrics = node.ctr(&["tasks", "metrics", id]).await;
        assert!(metrics.assert_ok().stdout.contains("memory"), "{}", metrics.stdout);

        node.ctr(&["tasks", "delete", id])
            .await
            .assert_fails_with("must be stopped before deletion");
        node.ctr(&["tasks", "kill", "--signal", "SIGKILL", id])
            .await
            .assert_ok();
        until("it stopped", async || (status().await == "STOPPED").then_some(())).await;
        let deleted = node.ctr(&["tasks", "delete", id]).await;
        assert!(
            deleted.assert_ok().stderr.contains("non-zero exit code 137"),
            "{deleted:?}"
        );
        node.ctr(&["containers", "delete", id]).await.assert_ok();
    });
}

#[test]
fn an_attached_client_sees_the_rest_of_the_output_and_the_exit() {
    node(async |node| {
        let id = &format!("attach-{}", node.namespace);
        let folder = node.folder("gate");
        let gate = format!("type=bind,src={},dst=/gate,options=rbind:rw", folder.display());
        let script = "while [ ! -e /gate/open ]; do echo tick; sleep 0.01; done; echo late; exit 6";
        // ctr leaves at once; what it opened for the container's output stays, with nobody reading.
        node.ctr_run(&["--detach", "--mount", &gate], id, &["sh", "-c", script])
            .await
            .assert_ok();

        let seen = folder.join("seen");
        let mut attach = node.ctr_command(&["tasks", "attach", id]);
        attach
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(&seen).unwrap());
        let mut attach = attach.spawn().unwrap();
        let shows = async |text: &str| {
            until(text, async || {
                std::fs::read_to_string(&seen).unwrap().contains(text).then_some(())
            })
            .await;
        };
        shows("tick\n").await;
        std::fs::write(folder.join("open"), "").unwrap();
        shows("late\n").await;
        let status = tokio::task::spawn_blocking(move || attach.wait())
            .await
            .unwrap()
            .unwrap();
        assert_eq!(status.code(), Some(6));
        node.ctr(&["containers", "delete", id]).await.assert_ok();
        std::fs::remove_dir_all(folder).unwrap();
    });
}

#[test]
fn a_run_logs_to_a_uri() {
    node(async |node| {
        let folder = node.folder("ctr-log");
        let uri = format!("file://{}/log", folder.display());
        let id = &format!("log-{}", node.namespace);
        node.ctr_run(&["--detach", "--log-uri", &uri], id, &["echo", "logged"])
            .await
            .assert_ok();
        until("the line was logged", async || {
            let text = std::fs::read_to_string(folder.join("log")).unwrap_or_default();
            (text == "logged\n").then_some(())
        })
        .await;
        until("it stopped", async || {
            let list = node.ctr(&["tasks", "list"]).await.stdout;
            list.contains("STOPPED").then_some(())
        })
        .await;
        node.ctr(&["tasks", "delete", id]).await.assert_ok();
        node.ctr(&["containers", "delete", id]).await.assert_ok();
        std::fs::remove_dir_all(folder).unwrap();
    });
}

#[test]
fn wrong_inputs_are_clear_errors_and_leave_nothing() {
    node(async |node| {
        let id = &format!("wrong-{}", node.namespace);
        let run = async |flags: &[&str], command: &[&str]| {
            let mut all = vec!["--rm"];
            all.extend(flags);
            node.ctr_run(&all, id, command).await
        };
        run(&[], &["no-such-program"])
            .await
            .assert_fails_with("no-such-program");
        run(
            &["--mount", "type=bind,src=/no/such/source,dst=/x,options=rbind"],
            &["true"],
        )
        .await
        .assert_fails_with("no");
        run(&["--with-ns", "network:/no/such/namespace"], &["true"])
            .await
            .assert_fails_with("no");
        run(&["--log-uri", "binary:///no/such/logger"], &["true"])
            .await
            .assert_fails_with("no");

        for bad in ["a/b", "..", "", "a b"] {
            let outcome = node.ctr_run(&["--rm"], bad, &["true"]).await;
            assert_ne!(outcome.status, 0, "{bad:?} is no id");
        }
        let mut arguments = vec!["run", "--rm"];
        arguments.extend(node.ctr_runtime());
        arguments.extend(["lxcri.test/no-such-image:1", id, "true"]);
        node.ctr(&arguments).await.assert_fails_with("not found");
        let unknown = [
            "run",
            "--rm",
            "--runtime",
            "io.containerd.no-such.v1",
            image::BUSYBOX,
            id,
            "true",
        ];
        node.ctr(&unknown).await.assert_fails_with("no-such");

        node.ctr(&["tasks", "kill", id]).await.assert_fails_with("not found");
        node.ctr(&["tasks", "exec", "--exec-id", "x", id, "true"])
            .await
            .assert_fails_with("not found");
        node.ctr(&["tasks", "pause", id]).await.assert_fails_with("not found");
        node.ctr(&["tasks", "delete", id]).await.assert_fails_with("not found");
    });
}

#[test]
fn an_id_is_taken_once() {
    node(async |node| {
        let id = &format!("twice-{}", node.namespace);
        node.ctr_run(&["--detach", "--null-io"], id, &["sleep", "1000"])
            .await
            .assert_ok();
        node.ctr_run(&["--detach", "--null-io"], id, &["true"])
            .await
            .assert_fails_with("already exists");
        node.ctr(&["tasks", "exec", "--exec-id", "bad/id", id, "true"])
            .await
            .assert_fails_with("");
        node.ctr(&["tasks", "exec", "--exec-id", "x", id, "no-such-program"])
            .await
            .assert_fails_with("no-such-program");
        node.ctr(&["tasks", "kill", "--all", "--signal", "9", id])
            .await
            .assert_ok();
        until("it stopped", async || {
            let list = node.ctr(&["tasks", "list"]).await.stdout;
            list.contains("STOPPED").then_some(())
        })
        .await;
        let deleted = node.ctr(&["tasks", "delete", id]).await;
        assert!(
            deleted.assert_ok().stderr.contains("non-zero exit code 137"),
            "{deleted:?}"
        );
        node.ctr(&["containers", "delete", id]).await.assert_ok();
    });
}

#[test]
fn options_come_from_a_file_and_wrong_ones_are_named() {
    node(async |node| {
        if !node.is_for_ours("knows no options file") {
            return;
        }
        let folder = node.folder("options");
        let file = folder.join("options.toml");
        let path = file.to_str().unwrap();
        let run = async |text: &str| {
            std::fs::write(&file, text).unwrap();
            node.ctr_run(&["--rm", "--runtime-config-path", path], "options", &["echo", "fine"])
                .await
        };
        for backend in backend::built() {
            let text = format!("backend = \"{backend}\"\n");
            assert_eq!(run(&text).await.assert_ok().stdout, "fine\n", "{backend}");
        }
        run("no_such_key = 1\n").await.assert_fails_with("no_such_key");
        run("backend = 7\n").await.assert_fails_with("backend");
        run("backend = \n").await.assert_fails_with(path);
        let others = ["lxc", "proxmox-lxc", "proxmox-vm", "no-such-backend"];
        for backend in others.iter().filter(|name| !backend::built().contains(name)) {
            run(&format!("backend = \"{backend}\"\n"))
                .await
                .assert_fails_with(backend);
        }
        run("backend = \"crun\"\ncrun_binary = \"/no/such/crun\"\n")
            .await
            .assert_fails_with("/no/such/crun");
        std::fs::remove_dir_all(folder).unwrap();
    });
}

#[test]
fn annotations_choose_options_and_wrong_ones_are_named() {
    node(async |node| {
        if !node.is_for_ours("reads no annotations of ours") {
            return;
        }
        let run = async |annotation: &str| {
            node.ctr_run(&["--rm", "--annotation", annotation], "annotated", &["echo", "fine"])
                .await
        };
        for backend in backend::built() {
            let annotation = format!("io.proxmox-lxcri.backend={backend}");
            assert_eq!(run(&annotation).await.assert_ok().stdout, "fine\n", "{backend}");
        }
        run("io.proxmox-lxcri.backend=proxmox-vm")
            .await
            .assert_fails_with("proxmox-vm");
        run("io.proxmox-lxcri.no_such_key=1")
            .await
            .assert_fails_with("no_such_key");
    });
}
