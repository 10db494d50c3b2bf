//! What the container stands on: snapshots, mounts, user namespaces, hooks, checkpoints.

use containerd_client::{tonic::Code, types::Mount};
use serde_json::json;

use crate::support::{Node, image, node, until};

#[test]
fn a_read_only_rootfs_is_read_only() {
    node(async |node| {
        let task = node
            .sh("ro", "touch /file 2>&1; touch /run/file && echo fine")
            .edit(|spec| spec["root"]["readonly"] = json!(true))
            .start()
            .await;
        assert_eq!(task.wait().await.status, 0);
        task.delete().await.unwrap();
        assert_eq!(
            task.io.stdout.text().await,
            "touch: /file: Read-only file system\nfine\n"
        );
        task.forget().await;
    });
}

#[test]
fn the_rootfs_is_what_the_snapshotter_gave_and_goes_with_it() {
    node(async |node| {
        let task = node
            .sh(
                "ground",
                "touch /written; grep ' / ' /proc/mounts | cut -d ' ' -f 3; exec sleep 1000",
            )
            .start()
            .await;
        let kind = match node.snapshotter.as_str() {
            "zfs" => "zfs\n",
            _ => "overlay\n",
        };
        task.io.stdout.until(kind).await;
        assert_eq!(task.io.stdout.so_far(), kind);
        let before = node.datasets();
        task.end().await;
        if node.snapshotter == "zfs" {
            until("the container's dataset is gone", async || {
                (node.datasets().len() == before.len() - 1).then_some(())
            })
            .await;
        }
    });
}

#[test]
fn an_image_of_more_than_a_hundred_layers_is_mounted_whole() {
    node(async |node| {
        let folder = node.folder("layers");
        let image = image::build(&folder, "layers", "lxcri.test/layers:1", &["/bin/sh"], 110).unwrap();
        node.import(&image).await;
        let task = node
            .sh("layers", "cat /layer-1 /layer-110; ls / | grep -c layer-")
            .image(&image.chain_id)
            .start()
            .await;
        assert_eq!(task.wait().await.status, 0);
        task.delete().await.unwrap();
        assert_eq!(task.io.stdout.text().await, "1\n110\n110\n");
        task.forget().await;
        node.ctr(&["images", "remove", "--sync", "lxcri.test/layers:1"])
            .await
            .assert_ok();
        std::fs::remove_dir_all(folder).unwrap();
    });
}

#[test]
fn a_user_namespace_maps_root_to_nobody_of_the_host() {
    node(async |node| {
        let map = "0:231072:65536";
        let run = node
            .ctr_run(
                &["--rm", "--uidmap", map, "--gidmap", map],
                &format!("user-{}", node.namespace),
                &[
                    "sh",
                    "-c",
                    "id -u; cat /proc/self/uid_map; stat -c %u /bin; touch /made && stat -c %u /made",
                ],
            )
            .await;
        run.assert_ok();
        let words: Vec<&str> = run.stdout.split_whitespace().collect();
        assert_eq!(words, ["0", "0", "231072", "65536", "0", "0"]);
    });
}

#[test]
fn hooks_run_with_the_state_and_at_their_time() {
    node(async |node| {
        let folder = node.folder("hooks");
        let hook = |name: &str| {
            let script = format!("cat >{0}/{name}.json; echo {name} >>{0}/order", folder.display());
            json!([{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"]}])
        };
        let hooks = json!({
            "createRuntime": hook("createRuntime"),
            "poststart": hook("poststart"),
            "poststop": hook("poststop"),
        });
        let order = || std::fs::read_to_string(folder.join("order")).unwrap_or_default();
        let task = node
            .container("hooks", &["sleep", "1000"])
            .edit(|spec| spec["hooks"] = hooks)
            .create()
            .await;
        if node.runtime.program() != "runc" {
            // runc 1.1 runs poststart hooks when it creates.
            assert_eq!(order(), "createRuntime\n");
        }
        task.start().await.unwrap();
        until("poststart ran", async || {
            (order() == "createRuntime\npoststart\n").then_some(())
        })
        .await;
        let (id, pid) = (task.id.clone(), task.pid);
        task.end().await;
        assert_eq!(order(), "createRuntime\npoststart\npoststop\n");
        let state = std::fs::read_to_string(folder.join("createRuntime.json")).unwrap();
        let state: serde_json::Value = serde_json::from_str(&state).unwrap();
        assert_eq!((&state["id"], &state["pid"]), (&json!(id), &json!(pid)));
        std::fs::remove_dir_all(folder).unwrap();
    });
}

#[test]
fn a_hook_that_fails_fails_the_create_and_leaves_nothing() {
    node(async |node| {
        let hook = json!({"createRuntime": [{"path": "/bin/sh", "args": ["sh", "-c", "exit 3"]}]});
        let created = node
            .container("bad-hook", &["true"])
            .edit(|spec| spec["hooks"] = hook)
            .try_create()
            .await;
        match created {
            Err(error) => assert!(error.message().contains("OCI runtime create failed"), "{error:?}"),
            Ok(_) => panic!("created in spite of its hook"),
        }
    });
}

#[test]
fn a_missing_program_is_named_and_nothing_is_left() {
    node(async |node| {
        let error = match node.container("nope", &["no-such-program"]).try_create().await {
            Err(error) => error,
            // Some runtimes notice only at the start.
            Ok(task) => {
                let error = task.start().await.unwrap_err();
                task.finish().await;
                error
            }
        };
        assert!(error.message().contains("OCI runtime"), "{error:?}");
        if node.runtime.is_ours() || node.runtime.program() == "runc" {
            assert!(
                error.message().contains("executable file not found in $PATH"),
                "{error:?}"
            );
        }
    });
}

#[test]
fn a_missing_rootfs_is_an_error_and_nothing_is_left() {
    node(async |node| {
        let without = |spec: &mut serde_json::Value| spec["root"]["path"] = json!("/no/such/rootfs");
        let created = node
            .container("empty", &["true"])
            .edit(without)
            .rootfs(vec![])
            .try_create()
            .await;
        let error = match created {
            Err(error) => error,
            Ok(task) => {
                let error = task.start().await.unwrap_err();
                task.finish().await;
                error
            }
        };
        assert!(!error.message().is_empty());
    });
}

#[test]
fn mounts_that_fail_half_way_are_undone() {
    node(async |node| {
        let folder = node.folder("half");
        image::busybox_root(&folder.join("root")).unwrap();
        let bind = Mount {
            r#type: "bind".into(),
            source: folder.join("root").to_string_lossy().into_owned(),
            target: String::new(),
            options: vec!["rbind".into(), "rw".into()],
        };
        let wrong = Mount {
            r#type: "no-such-filesystem".into(),
            source: "none".into(),
            ..bind.clone()
        };
        let created = node
            .container("half", &["true"])
            .rootfs(vec![bind.clone(), wrong])
            .try_create()
            .await;
        assert!(created.is_err());
        drop(created);
        // The same folder works when nothing is wrong.
        let task = node.container("whole", &["true"]).rootfs(vec![bind]).start().await;
        assert_eq!(task.wait().await.status, 0);
        task.finish().await;
        std::fs::remove_dir_all(folder).unwrap();
    });
}

#[test]
fn a_broken_spec_is_an_error_and_nothing_is_left() {
    node(async |node| {
        let broken: [fn(&mut serde_json::Value); 4] = [
            |spec| *spec = json!({}),
            |spec| spec["process"]["args"] = json!([]),
            |spec| spec["linux"]["namespaces"][0]["path"] = json!("/no/such/namespace"),
            |spec| {
                spec["mounts"][0] =
                    json!({"destination": "/x", "type": "bind", "source": "/no/such", "options": ["bind"]})
            },
        ];
        for (number, change) in broken.into_iter().enumerate() {
            match node
                .container(&format!("broken-{number}"), &["true"])
                .edit(change)
                .try_create()
                .await
            {
                Err(error) => assert!(!error.message().is_empty()),
                Ok(task) => {
                    // Refused at the start, or (an empty list of arguments) never.
                    let _ = task.start().await.unwrap_err();
                    task.finish().await;
                }
            }
        }
    });
}

#[test]
fn unknown_options_are_named() {
    node(async |node| {
        if !node.is_for_ours("takes options of its own type alone") {
            return;
        }
        #[derive(Clone, PartialEq, prost::Message)]
        struct RuntimeOptions {
            #[prost(string, tag = "1")]
            type_url: String,
            #[prost(string, tag = "2")]
            config_path: String,
            #[prost(bytes = "vec", tag = "3")]
            config_body: Vec<u8>,
        }
        let encode = |options: &RuntimeOptions| prost::Message::encode_to_vec(options);
        let body = RuntimeOptions {
            config_body: b"no_such_key = 1\n".to_vec(),
            ..RuntimeOptions::default()
        };
        let path = RuntimeOptions {
            config_path: "/no/such/options.toml".into(),
            ..RuntimeOptions::default()
        };
        for (value, named) in [(encode(&body), "no_such_key"), (encode(&path), "/no/such/options.toml")] {
            let task = node
                .container("options", &["true"])
                .options("runtimeoptions.v1.Options", value);
            let Err(error) = task.try_create().await else {
                panic!("created with options that nobody knows");
            };
            assert!(
                matches!(error.code(), Code::InvalidArgument | Code::NotFound | Code::Unknown),
                "{error:?}"
            );
            assert!(error.message().contains(named), "{error:?}");
        }
    });
}

#[test]
fn options_of_an_unknown_type_are_an_error_and_nothing_is_left() {
    node(async |node| {
        let created = node
            .container("typed", &["true"])
            .options("no.such.Options", vec![8, 1])
            .try_create()
            .await;
        assert!(created.is_err());
    });
}

#[test]
fn a_checkpoint_without_criu_is_a_clear_error_and_the_container_goes_on() {
    node(async |node| {
        if criu_missing(node).is_none() {
            // The other test covers this machine.
            return;
        }
        let task = node
            .sh("frozen", "while read line; do echo got $line; done")
            .stdin()
            .start()
            .await;
        let error = task
            .checkpoint(node.folder("checkpoint").to_str().unwrap())
            .await
            .unwrap_err();
        let text = error.message().to_lowercase();
        assert!(text.contains("criu") || text.contains("checkpoint"), "{error:?}");
        if !has_checkpoints(node) {
            assert_eq!(error.code(), Code::Unimplemented, "{error:?}");
        }
        task.io.stdin().await.write(b"on\n").await;
        task.io.stdout.until("got on\n").await;
        task.end().await;
        std::fs::remove_dir_all(node.folder("checkpoint")).unwrap();
    });
}

#[test]
fn a_checkpoint_is_written_and_the_container_goes_on() {
    node(async |node| {
        if !has_checkpoints(node) {
            // The other test asks for the refusal.
            return;
        }
        if let Some(missing) = criu_missing(node) {
            node.skip(&missing);
            return;
        }
        let script = "i=0; while read line; do i=$((i+1)); echo line $i; done";
        let task = node.sh("saved", script).stdin().start().await;
        task.io.stdin().await.write(b"a\n").await;
        task.io.stdout.until("line 1\n").await;
        let folder = node.folder("checkpoint");
        assert_ne!(task.checkpoint(folder.to_str().unwrap()).await.unwrap(), 0);
        task.io.stdin().await.write(b"b\n").await;
        task.io.stdout.until("line 2\n").await;
        task.end().await;
        std::fs::remove_dir_all(folder).unwrap();
    });
}

/// Whether what holds the containers could write a checkpoint, on a machine with all that it needs.
fn has_checkpoints(node: &Node) -> bool {
    node.runtime.program() != "lxc"
}

/// What a checkpoint lacks, on this machine or at all.
fn criu_missing(node: &Node) -> Option<String> {
    if !has_checkpoints(node) {
        return Some("the backend has no checkpoints".into());
    }
    let says = |program: &str, argument: &str, text: &str| {
        let output = std::process::Command::new(program).arg(argument).output();
        output.is_ok_and(|output| {
            output.status.success()
                && [output.stdout, output.stderr]
                    .iter()
                    .any(|o| String::from_utf8_lossy(o).contains(text))
        })
    };
    if node.runtime.program() == "crun" && !says("crun", "--version", "+CRIU") {
        return Some("crun is built without CRIU".into());
    }
    (!says("criu", "check", "Looks good")).then(|| "no criu that works with this kernel".into())
}
