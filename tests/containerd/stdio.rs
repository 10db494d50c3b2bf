//! Bytes in and out: fifos, terminals, files, logger programs; clients that leave and come back.

use std::os::unix::fs::PermissionsExt;

use crate::support::{node, until};

/// Bytes that show when one is lost, doubled or out of place.
fn pattern(count: usize) -> Vec<u8> {
    (0..count)
        .map(|index| (index % 251) as u8 ^ (index / 65_536) as u8)
        .collect()
}

#[test]
fn stdin_arrives_and_close_io_ends_it() {
    node(async |node| {
        let task = node.container("cat", &["cat"]).stdin().start().await;
        let mut stdin = task.io.stdin().await;
        stdin.write(b"first\n").await;
        task.io.stdout.until("first\n").await;
        // A client that merely goes away is no end of the input.
        drop(stdin);
        let mut stdin = task.io.stdin().await;
        stdin.write(b"second\n").await;
        task.io.stdout.until("second\n").await;
        assert_eq!(task.status().await, "RUNNING");
        task.close_stdin("").await.unwrap();
        drop(stdin);
        assert_eq!(task.wait().await.status, 0);
        task.delete().await.unwrap();
        assert_eq!(task.io.stdout.text().await, "first\nsecond\n");
        task.forget().await;
    });
}

#[test]
fn close_io_ends_the_stdin_of_an_exec() {
    node(async |node| {
        let task = node.container("host", &["sleep", "1000"]).start().await;
        let exec = task
            .try_exec("cat", crate::support::task::process(&["cat"]), true)
            .await
            .unwrap();
        exec.start().await.unwrap();
        let mut stdin = exec.io.stdin().await;
        stdin.write(b"line\n").await;
        exec.io.stdout.until("line\n").await;
        task.close_stdin("cat").await.unwrap();
        drop(stdin);
        assert_eq!(exec.wait().await.status, 0);
        exec.delete().await.unwrap();
        drop(exec);
        task.end().await;
    });
}

#[test]
fn without_a_stdin_the_input_has_ended() {
    node(async |node| {
        let task = node.container("null", &["cat"]).start().await;
        assert_eq!(task.wait().await.status, 0);
        task.finish().await;
    });
}

#[test]
fn twenty_mebibytes_go_through_stdin_to_stdout_unchanged() {
    node(async |node| {
        let bytes = pattern(20 << 20);
        let task = node.container("through", &["cat"]).stdin().start().await;
        let mut stdin = task.io.stdin().await;
        stdin.write(&bytes).await;
        task.close_stdin("").await.unwrap();
        drop(stdin);
        assert_eq!(task.wait().await.status, 0);
        task.delete().await.unwrap();
        let back = task.io.stdout.bytes().await;
        assert_eq!(back.len(), bytes.len());
        assert!(back == bytes, "the bytes are others");
        task.forget().await;
    });
}

#[test]
fn eight_mebibytes_right_before_the_exit_are_complete_when_delete_returns() {
    node(async |node| {
        let task = node.sh("burst", "head -c 8388608 /dev/zero | tr '\\0' x").start().await;
        assert_eq!(task.wait().await.status, 0);
        task.delete().await.unwrap();
        let bytes = task.io.stdout.bytes().await;
        assert_eq!(bytes.len(), 8 << 20);
        assert!(bytes.iter().all(|byte| *byte == b'x'));
        task.forget().await;
    });
}

#[test]
fn a_reader_that_leaves_and_comes_back_misses_nothing_and_kills_nobody() {
    node(async |node| {
        let mut task = node
            .sh("detach", "while read line; do echo got $line; done")
            .stdin()
            .start()
            .await;
        let mut stdin = task.io.stdin().await;
        stdin.write(b"one\n").await;
        task.io.stdout.until("got one\n").await;
        task.io.detach();
        stdin.write(b"two\n").await;
        // The container has read it when the pipe to it is empty and it sleeps in the next read; its answer is then in the fifo.
        until("the answer waits in the fifo", async || {
            fifo_holds(&task.io.stdout_path).then_some(())
        })
        .await;
        task.io.attach();
        task.io.stdout.until("got two\n").await;
        stdin.write(b"three\n").await;
        task.io.stdout.until("got two\ngot three\n").await;
        task.end().await;
    });
}

/// Whether bytes wait in a fifo, without taking them.
fn fifo_holds(path: &str) -> bool {
    use std::os::fd::AsFd;
    let flags = nix::fcntl::OFlag::O_RDONLY | nix::fcntl::OFlag::O_NONBLOCK | nix::fcntl::OFlag::O_CLOEXEC;
    let fifo = nix::fcntl::open(path, flags, nix::sys::stat::Mode::empty()).unwrap();
    let mut wanted = [nix::poll::PollFd::new(fifo.as_fd(), nix::poll::PollFlags::POLLIN)];
    nix::poll::poll(&mut wanted, nix::poll::PollTimeout::ZERO).unwrap() == 1
        && wanted[0]
            .revents()
            .is_some_and(|events| events.contains(nix::poll::PollFlags::POLLIN))
}

#[test]
fn a_reader_that_never_reads_does_not_hang_kill_and_delete() {
    node(async |node| {
        let task = node.sh("flood", "echo begun >&2; exec cat /dev/zero").create().await;
        task.io.stdout.detach();
        task.start().await.unwrap();
        task.io.stderr.until("begun").await;
        task.kill(libc::SIGKILL).await.unwrap();
        assert_eq!(task.wait().await.status, 137);
        // Bounded: the node's requests have deadlines.
        task.finish().await;
    });
}

#[test]
fn a_terminal_is_one_stream_that_can_be_resized() {
    node(async |node| {
        let task = node
            .sh("tty", "tty; echo err >&2; read answer; stty size; exit $answer")
            .tty()
            .stdin()
            .start()
            .await;
        task.io.stdout.until("/dev/pts/").await;
        task.io.stdout.until("err\r\n").await;
        task.resize("", 132, 43).await.unwrap();
        task.io.stdin().await.write(b"5\n").await;
        assert_eq!(task.wait().await.status, 5);
        task.delete().await.unwrap();
        let text = task.io.stdout.text().await;
        assert!(text.contains("43 132"), "{text:?}");
        task.forget().await;
    });
}

#[test]
fn a_resize_without_a_terminal_succeeds_and_does_nothing() {
    node(async |node| {
        let task = node.container("flat", &["sleep", "1000"]).start().await;
        task.resize("", 80, 25).await.unwrap();
        task.end().await;
    });
}

#[test]
fn output_goes_to_a_file() {
    node(async |node| {
        let folder = node.folder("file-logs");
        let uri = format!("file://{}/log", folder.display());
        let script = "echo out; echo err >&2; head -c 1000000 /dev/zero | tr '\\0' y";
        let task = node.sh("files", script).log_to(&uri, &uri).start().await;
        assert_eq!(task.wait().await.status, 0);
        task.finish().await;
        let text = std::fs::read_to_string(folder.join("log")).unwrap();
        assert_eq!(text.len(), 1_000_008);
        assert!(text.contains("out\n") && text.contains("err\n"));
        std::fs::remove_dir_all(folder).unwrap();
    });
}

#[test]
fn output_goes_to_a_logger_program() {
    node(async |node| {
        // Nodes of Debian run nothing from below /run.
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let program = folder.join("logger");
        // The contract: 3 is stdout, 4 is stderr, closing 5 says that it is ready; arguments come from the URI's query.
        let script = "#!/bin/sh\nfor word; do last=$word; done\ncat <&3 >$last.out 5>&- &\ncat <&4 >$last.err 5>&- &\n\
                      env >$last.env\nexec 5>&- 3<&- 4<&-\nwait\n";
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let uri = format!("binary://{}?to={}/log", program.display(), folder.display());
        let task = node
            .sh(
                "logged",
                "echo out; echo err >&2; head -c 1000000 /dev/zero | tr '\\0' z",
            )
            .log_to(&uri, &uri)
            .start()
            .await;
        assert_eq!(task.wait().await.status, 0);
        let id = task.id.clone();
        task.finish().await;
        // The logger ends when both of its inputs have ended.
        let out = until("the logger has written everything", async || {
            let out = std::fs::read_to_string(folder.join("log.out")).ok()?;
            (out.len() == 1_000_004).then_some(out)
        })
        .await;
        assert!(out.starts_with("out\nzzz"));
        let err = until("stderr was logged", async || {
            let err = std::fs::read_to_string(folder.join("log.err")).ok()?;
            (!err.is_empty()).then_some(err)
        })
        .await;
        assert_eq!(err, "err\n");
        let environment = std::fs::read_to_string(folder.join("log.env")).unwrap();
        assert!(environment.contains(&format!("CONTAINER_ID={id}\n")), "{environment}");
        assert!(
            environment.contains(&format!("CONTAINER_NAMESPACE={}\n", node.namespace)),
            "{environment}"
        );
    });
}

#[test]
fn a_logger_that_cannot_run_fails_the_create_and_leaves_nothing() {
    node(async |node| {
        let uri = "binary:///no/such/logger";
        let created = node.sh("unlogged", "true").log_to(uri, uri).try_create().await;
        match created {
            Err(error) => assert!(error.message().contains("logger"), "{error:?}"),
            Ok(_) => panic!("a container without its logger was created"),
        }
    });
}
