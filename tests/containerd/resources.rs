//! cgroups: stats, limits, OOM.

use std::path::PathBuf;

use containerd_shim_protos::{
    cgroups::metrics::Metrics as MetricsV1, cgroups_v2::metrics::Metrics as MetricsV2, protobuf::Message,
};
use serde_json::json;

use crate::support::{events::Events, node, universe::cgroups_with, until};

/// Whether the machine has the unified hierarchy alone.
fn unified() -> bool {
    std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

/// A file of a container's cgroup, `v1` as "controller/file".
fn cgroup_file(namespace: &str, id: &str, v1: &str, v2: &str) -> String {
    let path = match (unified(), v1.split_once('/')) {
        (false, Some((controller, file))) => PathBuf::from("/sys/fs/cgroup")
            .join(controller)
            .join(namespace)
            .join(id)
            .join(file),
        _ => PathBuf::from("/sys/fs/cgroup").join(namespace).join(id).join(v2),
    };
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.trim().to_string()
}

#[test]
fn stats_come_in_the_type_of_the_hierarchy_and_with_numbers() {
    node(async |node| {
        let task = node
            .sh(
                "stats",
                "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo done; sleep 1000",
            )
            .start()
            .await;
        task.io.stdout.until("done").await;
        let data = task.metrics().await.data.unwrap();
        let kind = data.type_url.rsplit('/').next().unwrap();
        if unified() {
            assert_eq!(kind, "io.containerd.cgroups.v2.Metrics");
            let metrics = MetricsV2::parse_from_bytes(&data.value).unwrap();
            assert!(metrics.cpu.usage_usec > 0 && metrics.memory.usage > 0, "{metrics:?}");
            assert!(metrics.pids.current >= 1, "{metrics:?}");
        } else {
            assert_eq!(kind, "io.containerd.cgroups.v1.Metrics");
            let metrics = MetricsV1::parse_from_bytes(&data.value).unwrap();
            assert!(
                metrics.cpu.usage.total > 0 && metrics.memory.usage.usage > 0,
                "{metrics:?}"
            );
            assert!(metrics.pids.current >= 1, "{metrics:?}");
        }
        task.end().await;
    });
}

#[test]
fn limits_of_the_spec_hold_and_update_changes_them() {
    node(async |node| {
        let task = node
            .container("limits", &["sleep", "1000"])
            .edit(|spec| spec["linux"]["resources"] = json!({"memory": {"limit": 64 << 20}, "pids": {"limit": 50}}))
            .start()
            .await;
        let memory = || cgroup_file(&node.namespace, &task.id, "memory/memory.limit_in_bytes", "memory.max");
        let pids = || cgroup_file(&node.namespace, &task.id, "pids/pids.max", "pids.max");
        assert_eq!((memory(), pids()), ("67108864".into(), "50".into()));
        task.update(json!({"memory": {"limit": 96 << 20}, "cpu": {"shares": 512, "quota": 50000, "period": 100000}}))
            .await
            .unwrap();
        assert_eq!(memory(), "100663296");
        assert_eq!(pids(), "50", "what was not mentioned stays");
        let quota = cgroup_file(&node.namespace, &task.id, "cpu/cpu.cfs_quota_us", "cpu.max");
        assert!(quota == "50000" || quota == "50000 100000", "{quota}");
        let error = task.update(json!({"memory": {"limit": "much"}})).await.unwrap_err();
        assert!(!error.message().is_empty());
        assert_eq!(memory(), "100663296", "a broken update changes nothing");
        task.end().await;
    });
}

#[test]
fn running_out_of_memory_is_told() {
    node(async |node| {
        let events = Events::of(node).await;
        let limit = json!({"memory": {"limit": 16 << 20, "swap": 16 << 20}});
        let task = node
            .container("oom", &["tail", "/dev/zero"])
            .edit(|spec| spec["linux"]["resources"] = limit)
            .start()
            .await;
        assert_eq!(task.wait().await.status, 137);
        let id = task.id.clone();
        events.until(&id, |event| event.topic == "oom").await;
        task.finish().await;
        let about = events.until_deleted(&id).await;
        let place = |topic| about.iter().position(|event| event.topic == topic).unwrap();
        if node.runtime.is_ours() {
            assert!(place("oom") < place("exit"), "the cause comes first: {about:?}");
        }
    });
}

#[test]
fn a_process_that_runs_out_of_memory_does_not_end_the_container() {
    node(async |node| {
        let events = Events::of(node).await;
        let limit = json!({"memory": {"limit": 16 << 20, "swap": 16 << 20}});
        let task = node
            .container("half", &["sleep", "1000"])
            .edit(|spec| spec["linux"]["resources"] = limit)
            .start()
            .await;
        let exec = task.exec("hog", &["tail", "/dev/zero"]).await;
        exec.start().await.unwrap();
        assert_eq!(exec.wait().await.status, 137);
        exec.delete().await.unwrap();
        drop(exec);
        events.until(&task.id, |event| event.topic == "oom").await;
        assert_eq!(task.status().await, "RUNNING");
        task.end().await;
    });
}

#[test]
fn a_cgroup_that_a_stranger_entered_is_removed_all_the_same() {
    node(async |node| {
        let task = node.container("guest", &["sleep", "1000"]).start().await;
        // A process that the runtime never started, such as `nsenter` of an administrator.
        let mut stranger = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        for cgroup in cgroups_with(&task.id, task.pid) {
            std::fs::write(cgroup.join("cgroup.procs"), stranger.id().to_string()).unwrap();
        }
        let pids = until("the stranger is listed", async || {
            let pids = task.pids().await.ok()?;
            (pids.len() == 2).then_some(pids)
        })
        .await;
        assert!(pids.iter().any(|(pid, _)| *pid == stranger.id()));
        task.kill_process("", libc::SIGKILL, true).await.unwrap();
        task.wait().await;
        let status = tokio::task::spawn_blocking(move || stranger.wait())
            .await
            .unwrap()
            .unwrap();
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&status),
            Some(libc::SIGKILL)
        );
        task.finish().await;
    });
}
