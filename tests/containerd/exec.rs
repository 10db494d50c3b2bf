//! Further processes of a task.

use containerd_client::tonic::Code;
use serde_json::json;

use super::lifecycle::join_all;
use crate::support::{node, task::process, until};

#[test]
fn an_exec_has_its_own_output_status_folder_user_and_environment() {
    node(async |node| {
        let task = node.container("exec", &["sleep", "1000"]).start().await;
        let mut document = process(&["sh", "-c", "pwd; id -u; id -g; echo $COLOUR; echo bad >&2; exit 9"]);
        document["cwd"] = json!("/home/guest");
        document["user"] = json!({"uid": 1000, "gid": 1000});
        document["env"].as_array_mut().unwrap().push(json!("COLOUR=blue"));
        let exec = task.try_exec("look", document, false).await.unwrap();
        let pid = exec.start().await.unwrap();
        assert_ne!(pid, task.pid);
        assert_eq!(exec.wait().await.status, 9);
        let deleted = exec.delete().await.unwrap();
        assert_eq!((deleted.exit_status, deleted.pid), (9, pid));
        assert_eq!(exec.io.stdout.text().await, "/home/guest\n1000\n1000\nblue\n");
        assert_eq!(exec.io.stderr.text().await, "bad\n");
        drop(exec);
        task.end().await;
    });
}

#[test]
fn an_exec_with_a_terminal_can_be_talked_to_and_resized() {
    node(async |node| {
        let task = node.container("shell", &["sleep", "1000"]).start().await;
        let mut document = process(&["sh"]);
        document["terminal"] = json!(true);
        let exec = task.try_exec("sh", document, true).await.unwrap();
        exec.start().await.unwrap();
        let mut stdin = exec.io.stdin().await;
        stdin.write(b"tty; echo $((6*7))\n").await;
        exec.io.stdout.until("/dev/pts/").await;
        exec.io.stdout.until("42").await;
        task.resize("sh", 111, 33).await.unwrap();
        stdin.write(b"stty size\n").await;
        exec.io.stdout.until("33 111").await;
        stdin.write(b"exit 6\n").await;
        assert_eq!(exec.wait().await.status, 6);
        exec.delete().await.unwrap();
        drop((stdin, exec));
        task.end().await;
    });
}

#[test]
fn a_missing_program_is_named_to_the_client_of_an_exec() {
    node(async |node| {
        let task = node.container("missing", &["sleep", "1000"]).start().await;
        let exec = task.exec("nope", &["no-such-program"]).await;
        let error = exec.start().await.unwrap_err();
        assert!(error.message().contains("OCI runtime exec failed"), "{error:?}");
        if node.runtime.is_ours() || node.runtime.program() == "runc" {
            assert!(
                error.message().contains("executable file not found in $PATH"),
                "{error:?}"
            );
        }
        exec.delete().await.unwrap();
        drop(exec);
        assert_eq!(task.ask("still", "echo alive").await, "alive\n");
        task.end().await;
    });
}

#[test]
fn an_exec_id_is_taken_once_and_free_after_delete() {
    node(async |node| {
        let task = node.container("ids", &["sleep", "1000"]).start().await;
        let exec = task.exec("one", &["sleep", "1000"]).await;
        let error = task.exec_again("one").await.unwrap_err();
        assert_eq!(error.code(), Code::AlreadyExists, "{error:?}");
        let error = exec.kill(libc::SIGTERM).await.unwrap_err();
        if node.runtime.is_ours() {
            assert_eq!(error.code(), Code::NotFound, "it was not started: {error:?}");
        }
        exec.start().await.unwrap();
        let error = exec.delete().await.unwrap_err();
        node.assert_code(&error, Code::FailedPrecondition);
        assert!(error.message().contains("running"), "{error:?}");
        exec.kill(libc::SIGKILL).await.unwrap();
        assert_eq!(exec.wait().await.status, 137);
        let error = exec.kill(libc::SIGKILL).await.unwrap_err();
        assert_eq!(error.code(), Code::NotFound, "{error:?}");
        assert!(error.message().contains("process already finished"), "{error:?}");
        exec.delete().await.unwrap();
        let error = task.state("one").await.unwrap_err();
        assert_eq!(error.code(), Code::NotFound, "{error:?}");
        drop(exec);
        assert_eq!(task.ask("one", "echo again").await, "again\n");
        task.end().await;
    });
}

#[test]
fn an_added_exec_that_never_started_is_deleted_with_nothing_left() {
    node(async |node| {
        let task = node.container("unused", &["sleep", "1000"]).start().await;
        let exec = task.exec("never", &["true"]).await;
        exec.delete().await.unwrap();
        drop(exec);
        task.end().await;
    });
}

#[test]
fn an_exec_cannot_start_after_inits_exit() {
    node(async |node| {
        let task = node.container("over", &["sleep", "1000"]).start().await;
        let exec = task.exec("late", &["true"]).await;
        task.kill(libc::SIGKILL).await.unwrap();
        task.wait().await;
        let error = exec.start().await.unwrap_err();
        node.assert_code(&error, Code::FailedPrecondition);
        let _ = exec.delete().await;
        drop(exec);
        task.finish().await;
    });
}

#[test]
fn twenty_execs_run_side_by_side() {
    node(async |node| {
        let task = node.container("crowd", &["sleep", "1000"]).start().await;
        let answers = join_all((0..20).map(|number| {
            let (task, script) = (&task, format!("echo {number}"));
            async move { task.ask(&format!("e{number}"), &script).await }
        }))
        .await;
        let expected: Vec<String> = (0..20).map(|number| format!("{number}\n")).collect();
        assert_eq!(answers, expected);
        task.end().await;
    });
}

#[test]
fn pids_name_the_execs() {
    node(async |node| {
        let task = node.container("pids", &["sleep", "1000"]).start().await;
        let exec = task.exec("named", &["sleep", "1000"]).await;
        let pid = exec.start().await.unwrap();
        let mut pids = until("both are listed", async || {
            let pids = task.pids().await.unwrap();
            (pids.len() == 2).then_some(pids)
        })
        .await;
        pids.sort_unstable();
        let mut expected = [(task.pid, String::new()), (pid, "named".to_string())];
        // Go's shim gives init no details or its own id.
        pids.iter_mut()
            .filter(|(other, _)| *other == task.pid)
            .for_each(|(_, id)| id.clear());
        expected.sort_unstable();
        assert_eq!(pids, expected);
        exec.kill(libc::SIGKILL).await.unwrap();
        exec.wait().await;
        exec.delete().await.unwrap();
        drop(exec);
        task.end().await;
    });
}

#[test]
fn a_grandchild_that_keeps_the_output_open_does_not_hang_an_exec() {
    node(async |node| {
        let task = node.container("parent", &["sleep", "1000"]).start().await;
        let exec = task.exec("forks", &["sh", "-c", "sleep 1000 & echo forked"]).await;
        exec.start().await.unwrap();
        assert_eq!(exec.wait().await.status, 0);
        exec.delete().await.unwrap();
        assert_eq!(exec.io.stdout.so_far(), "forked\n");
        drop(exec);
        assert_eq!(task.status().await, "RUNNING");
        task.end().await;
    });
}

#[test]
fn a_process_in_the_container_has_no_descriptor_but_its_own() {
    node(async |node| {
        let task = node.sh("fds", "ls /proc/self/fd; read line").stdin().start().await;
        // 3 is the folder that ls reads.
        task.io.stdout.until("0\n1\n2\n3\n").await;
        assert_eq!(task.io.stdout.so_far(), "0\n1\n2\n3\n");
        assert_eq!(task.ask("fds", "ls /proc/self/fd").await, "0\n1\n2\n3\n");
        task.end().await;
    });
}
