//! The runtime under a real containerd, through its API and through `ctr`.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests fail by panicking")]

mod support;

use support::{
    events::{Events, topics},
    node,
};

#[test]
fn ctr_shows_the_output_and_exits_with_the_containers_status() {
    node(async |node| {
        let run = node.ctr_run(&["--rm"], &format!("a-{}", node.namespace), &["sh", "-c", "echo out; echo err >&2; exit 7"]).await;
        run.assert_status(7);
        assert_eq!(run.stdout, "out\n");
        assert!(run.stderr.contains("err\n"), "{}", run.stderr);
    });
}

#[test]
fn the_output_and_the_exit_status_arrive() {
    node(async |node| {
        let events = Events::of(node).await;
        let task = node.sh("out", "echo out; echo err >&2; exit 7").start().await;
        assert_eq!(task.wait().await.status, 7);
        let id = task.id.clone();
        let deleted = task.delete().await.unwrap();
        assert_eq!(deleted.exit_status, 7);
        assert_eq!(task.io.stdout.text().await, "out\n");
        assert_eq!(task.io.stderr.text().await, "err\n");
        task.forget().await;
        let events = events.until_deleted(&id).await;
        assert_eq!(topics(&events), ["create", "start", "exit", "delete"]);
    });
}
