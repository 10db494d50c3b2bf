//! The pure functions on recorded outputs, and a few real runs; the contract suite has the whole lifecycle.

use std::{collections::HashSet, io::Read, process};

use super::*;
use crate::{
    backend::BoxFuture,
    host::command::{
        become_subreaper,
        isolation::{self, block_on},
    },
};

fn record(dir: &Path) -> Record {
    Record {
        id: "c1".into(),
        namespace: "ns".into(),
        bundle: dir.join("bundle"),
        sandbox: None,
        backend: "crun".into(),
        options: Options {
            crun_root: dir.join("crun"),
            ..Options::default()
        },
        rootfs: None,
        cgroups_path: None,
        shares_pid_namespace: false,
        restore_from: None,
        cgroup: None,
        shim: None,
        init: None,
        exit: None,
    }
}

fn words(args: Vec<OsString>) -> String {
    args.join(std::ffi::OsStr::new(" ")).into_string().unwrap()
}

#[test]
fn every_option_becomes_an_argument() {
    let mut rec = record(Path::new("/t"));
    let log = Path::new("/log");
    assert_eq!(
        words(global_args(&rec, log).unwrap()),
        "--root /t/crun/ns --log /log --log-format json"
    );
    assert_eq!(words(create_args(&rec, Path::new("/b"))), "--bundle /b c1");
    rec.options.systemd_cgroup = true;
    rec.options.crun_debug = true;
    rec.options.no_pivot_root = true;
    rec.options.no_new_keyring = true;
    rec.options.criu_work_path = Some("/w".into());
    assert_eq!(
        words(global_args(&rec, log).unwrap()),
        "--root /t/crun/ns --log /log --log-format json --systemd-cgroup --debug"
    );
    assert_eq!(
        words(create_args(&rec, Path::new("/b"))),
        "--bundle /b --no-pivot --no-new-keyring c1"
    );
    assert_eq!(
        words(restore_args(&rec, Path::new("/i"))),
        "--bundle /t/bundle --image-path /i --work-path /w --tcp-established --ext-unix-sk --file-locks --detach c1"
    );
    let mut options = CheckpointOptions {
        image_path: "/i".into(),
        ..CheckpointOptions::default()
    };
    assert_eq!(
        words(checkpoint_args(&rec, &options).unwrap()),
        "checkpoint --image-path /i --work-path /w --leave-running c1"
    );
    options = CheckpointOptions {
        image_path: "/i".into(),
        work_path: Some("/x".into()),
        exit: true,
        open_tcp: true,
        external_unix_sockets: true,
        terminal: true,
        file_locks: true,
        cgroups_mode: "strict".into(),
    };
    assert_eq!(
        words(checkpoint_args(&rec, &options).unwrap()),
        "checkpoint --image-path /i --work-path /x --tcp-established --ext-unix-sk --shell-job --file-locks \
         --manage-cgroups-mode strict c1"
    );
    options.cgroups_mode = "--root=/".into();
    assert_eq!(
        checkpoint_args(&rec, &options).unwrap_err().kind(),
        Kind::InvalidArgument
    );
    options.image_path = PathBuf::new();
    assert_eq!(
        checkpoint_args(&rec, &options).unwrap_err().kind(),
        Kind::InvalidArgument
    );
}

#[test]
fn an_id_or_namespace_that_leaves_the_folder_is_refused() {
    for bad in ["", "..", "a/b", "../x", "--root", "a\0b"] {
        let mut rec = record(Path::new("/t"));
        rec.id = bad.into();
        assert_eq!(state_dir(&rec).unwrap_err().kind(), Kind::InvalidArgument, "{bad:?}");
        assert!(global_args(&rec, Path::new("/l")).is_err(), "{bad:?}");
        rec = record(Path::new("/t"));
        rec.namespace = bad.into();
        assert_eq!(state_dir(&rec).unwrap_err().kind(), Kind::InvalidArgument, "{bad:?}");
    }
}

#[test]
fn the_request_says_whether_an_exec_has_a_terminal() {
    let spec = |json: &str, terminal| ExecSpec {
        json: json.into(),
        terminal,
    };
    let document = exec_document(&spec(r#"{"args":["a"],"terminal":true,"newer":1}"#, false)).unwrap();
    assert_eq!(
        serde_json::from_slice::<Value>(&document).unwrap(),
        json!({"args": ["a"], "terminal": false, "newer": 1})
    );
    for bad in ["", "[]", "1", "{"] {
        assert_eq!(
            exec_document(&spec(bad, true)).unwrap_err().kind(),
            Kind::InvalidArgument
        );
    }
}

/// The log of one failed call, as it was recorded.
fn from_log(status: u32, log: &str) -> (Kind, String) {
    let error = classify("c1", status, &errors_of_log(log.as_bytes()));
    (error.kind(), error.to_string())
}

#[test]
fn the_reasons_of_crun_1_8_1_have_their_kinds() {
    for (status, log, kind, text) in [
        (
            1,
            r#"{"msg":"executable file `nosuch` not found in $PATH: No such file or directory","level":"error","time":"2026-11-23T06:02:34.470570Z"}"#,
            Kind::InvalidArgument,
            r#"exec: "nosuch": executable file not found in $PATH: no such file or directory"#,
        ),
        // It says the same of an absolute path.
        (
            255,
            r#"{"msg":"executable file `/nosuch` not found in $PATH: No such file or directory","level":"error","time":"2026-11-23T06:02:35.194537Z"}"#,
            Kind::InvalidArgument,
            r#"exec: "/nosuch": executable file not found in $PATH: no such file or directory"#,
        ),
        // A folder.
        (
            255,
            r#"{"msg":"open executable: Operation not permitted","level":"error","time":"2026-11-23T06:39:57.101513Z"}"#,
            Kind::InvalidArgument,
            "open executable: Operation not permitted: the program is not an executable file",
        ),
        (
            255,
            r#"{"msg":"open executable: Permission denied","level":"error","time":"2026-11-23T06:02:35.215592Z"}"#,
            Kind::InvalidArgument,
            "open executable: Permission denied: the program is not an executable file",
        ),
        (
            255,
            r#"{"msg":"chdir `/none`: No such file or directory","level":"error","time":"2026-11-23T06:02:35.232391Z"}"#,
            Kind::InvalidArgument,
            "chdir `/none`: No such file or directory",
        ),
        (
            1,
            r#"{"msg":"error opening file `/run/crun/c1/status`: No such file or directory","level":"error","time":"2026-11-23T06:02:34.478964Z"}"#,
            Kind::NotFound,
            "container c1 does not exist: error opening file `/run/crun/c1/status`: No such file or directory",
        ),
        (
            1,
            r#"{"msg":"container `c1` already exists","level":"error","time":"2026-11-23T06:02:35.122325Z"}"#,
            Kind::AlreadyExists,
            "container `c1` already exists",
        ),
        (
            1,
            r#"{"msg":"cannot open `/run/crun/c1/exec.fifo`: No such file or directory","level":"error","time":"2026-11-23T06:02:35.138393Z"}"#,
            Kind::FailedPrecondition,
            "cannot open `/run/crun/c1/exec.fifo`: No such file or directory",
        ),
        (
            1,
            "{\"msg\":\"setns(pid=12403, CLONE_NEWUSER): No such process\",\"level\":\"error\",\"time\":\"2026-11-23T06:02:35.588916Z\"}\n\
             {\"msg\":\"fail startup\",\"level\":\"error\",\"time\":\"2026-11-23T06:02:35.589306Z\"}",
            Kind::FailedPrecondition,
            "setns(pid=12403, CLONE_NEWUSER): No such process; fail startup",
        ),
        (
            1,
            r#"{"msg":"the container `c1` is not running","level":"error","time":"2026-11-23T06:20:44.123758Z"}"#,
            Kind::FailedPrecondition,
            "the container `c1` is not running",
        ),
        (
            1,
            r#"{"msg":"the container `c1` is paused","level":"error","time":"2026-11-23T06:20:44.123758Z"}"#,
            Kind::FailedPrecondition,
            "the container `c1` is paused",
        ),
        (
            1,
            r#"{"msg":"the container `c1` is not in `created` or `stopped` state","level":"error","time":"2026-11-23T06:02:35.616273Z"}"#,
            Kind::FailedPrecondition,
            "the container `c1` is not in `created` or `stopped` state",
        ),
        (
            1,
            r#"{"msg":"error loading config.json","level":"error","time":"2026-11-23T06:02:35.682176Z"}"#,
            Kind::InvalidArgument,
            "error loading config.json",
        ),
        (
            1,
            r#"{"msg":"writing file `memory.limit_in_bytes`: Device or resource busy","level":"error","time":"2026-11-23T06:02:35.246167Z"}"#,
            Kind::Unknown,
            "writing file `memory.limit_in_bytes`: Device or resource busy",
        ),
        (
            1,
            r#"{"msg":"cgroups in hybrid mode not supported, drop all controllers from cgroupv2","level":"error","time":"2026-11-23T06:32:04.450861Z"}"#,
            Kind::Unimplemented,
            "cgroups in hybrid mode not supported, drop all controllers from cgroupv2: crun needs cgroup v1 or v2 alone; boot with \
             systemd.unified_cgroup_hierarchy=1, or unmount /sys/fs/cgroup/unified",
        ),
        (
            1,
            r#"{"msg":"unknown version specified","level":"error","time":"2026-11-23T06:02:35.674452Z"}"#,
            Kind::Unimplemented,
            "unknown version specified: this crun is too old for the ociVersion in config.json; install a newer crun",
        ),
        (
            1,
            r#"{"msg":"the path `/bin` is not a regular file: Operation not permitted","level":"error","time":"2026-11-23T12:33:02.512880Z"}"#,
            Kind::InvalidArgument,
            "the path `/bin` is not a regular file: Operation not permitted: the program is not an executable file",
        ),
        (
            1,
            r#"{"msg":"the path `/noexec` exists but it is not executable: Operation not permitted","level":"error","time":"2026-11-23T12:50:41.803114Z"}"#,
            Kind::InvalidArgument,
            "the path `/noexec` exists but it is not executable: Operation not permitted: the program is not an executable file",
        ),
        (
            1,
            r#"{"msg":"could not load `libcriu.so.2`","level":"error","time":"2026-11-23T09:12:41.016624Z"}"#,
            Kind::Unimplemented,
            "could not load `libcriu.so.2`: crun loads this library of CRIU for checkpoints; install libcriu2",
        ),
    ] {
        assert_eq!(from_log(status, log), (kind, text.to_owned()));
    }
}

/// Not recorded but read in crun's source after 1.8.1 (status.c): the same reason, wrapped.
#[test]
fn the_wrapped_reason_of_a_newer_crun_is_understood() {
    let log = r#"{"msg":"container `c1` does not exist: error opening file `/run/crun/c1/status`: No such file or directory","level":"error"}"#;
    assert_eq!(from_log(1, log).0, Kind::NotFound);
}

/// Not recorded but read in the source of crun 1.21 (linux.c, libcrun_safe_chdir).
#[test]
fn the_words_of_crun_1_21_for_a_working_folder_are_understood() {
    let log = r#"{"msg":"chdir to `/none`: No such file or directory","level":"error"}"#;
    let text = "chdir to `/none`: No such file or directory".to_owned();
    assert_eq!(from_log(1, log), (Kind::InvalidArgument, text));
}

#[test]
fn a_program_cannot_choose_the_kind_of_its_error() {
    let log = r#"{"msg":"executable file `x` already exists` not found in $PATH: No such file or directory","level":"error"}"#;
    let (kind, text) = from_log(1, log);
    assert_eq!(kind, Kind::InvalidArgument);
    assert!(
        text.starts_with("exec: \"x` already exists\": executable file not found in $PATH"),
        "{text}"
    );
}

#[test]
fn garbage_in_the_log_still_gives_a_clear_error() {
    for log in [
        "",
        "\n\n",
        "\u{0}\u{1}",
        "{\"msg\":1}",
        "Segmentation fault",
        "{\"level\":\"error\"}",
    ] {
        assert_eq!(
            from_log(3, log),
            (Kind::Unknown, "crun ended with status 3 and gave no reason".into()),
            "{log:?}"
        );
    }
    assert_eq!(from_log(137, "").1, "crun was killed by signal 9 and gave no reason");
    assert_eq!(from_log(255, "").1, "crun ended with status 255 and gave no reason");
    let long = format!("{{\"msg\":\"{}\",\"level\":\"error\"}}", "ä".repeat(100_000));
    assert_eq!(from_log(1, &long).1.chars().count(), MESSAGE_MAX_CHARS);
    let debug = "{\"msg\":\"one\",\"level\":\"debug\"}\n{\"msg\":\"two\",\"level\":\"error\"}";
    assert_eq!(from_log(1, debug).1, "two");
}

#[test]
fn only_the_number_of_a_process_is_a_pid() {
    assert_eq!(parse_pid(b"12403").unwrap(), 12403);
    assert_eq!(parse_pid(b"12403\n").unwrap(), 12403);
    for bad in ["", "0", "1", "-5", "4294967295", "12 34", "x"] {
        assert!(parse_pid(bad.as_bytes()).is_err(), "{bad:?}");
    }
}

#[test]
fn the_end_of_a_long_log_is_read() {
    let scratch = Scratch::new(b"0123456789").unwrap();
    assert_eq!(scratch.read_end(4).unwrap(), b"6789");
    assert_eq!(scratch.read_end(100).unwrap(), b"0123456789");
    assert_eq!(fs::read(scratch.path()).unwrap(), b"0123456789");
}

#[test]
fn the_features_of_a_crun_without_that_command_come_from_its_version() {
    let text = "crun version 1.8.1\ncommit: f8a096be060b22ccd3d5f3ebe44108517fbf6c30\nrundir: /run/crun\nspec: 1.0.0\n\
                +SYSTEMD +SELINUX +APPARMOR +CAP +SECCOMP +EBPF +YAJL\n";
    let features = features_of_version(text).unwrap();
    assert_eq!(features["annotations"]["run.oci.crun.version"], "1.8.1");
    assert_eq!(features["annotations"]["run.oci.crun.checkpoint.enabled"], "false");
    assert_eq!(features["linux"]["seccomp"]["enabled"], true);
    assert_eq!(features["ociVersionMax"], "1.0.0");
    assert_eq!(features_of_version("runc version 1.1.5"), None);
    assert_eq!(features_of_version(""), None);
}

// Real runs. Each is in a process and a mount namespace of its own, without the cgroup v2 folder that crun refuses beside v1.

const UNSHARED: &[&str] = &[
    "unshare",
    "-m",
    "sh",
    "-c",
    // A hybrid machine without its unified hierarchy. Not by unmounting that: crun makes its folders there all the same, and they
    // would stay on the machine's tmpfs.
    "if mountpoint -q /sys/fs/cgroup/unified; then
        aside=$(mktemp -d) && mount --rbind /sys/fs/cgroup $aside && mount -t tmpfs none /sys/fs/cgroup || exit
        for from in $aside/*; do
            to=/sys/fs/cgroup/${from##*/}
            if [ -L $from ]; then cp -d $from $to
            elif [ $to != /sys/fs/cgroup/unified ]; then mkdir $to && mount --bind $from $to
            fi || exit
        done
        umount -l $aside && rmdir $aside || exit
    fi
    exec \"$0\" \"$@\"",
];

struct Node {
    dir: tempfile::TempDir,
    crun: Crun,
    rec: Record,
}

/// Runs `body` with a backend, a bundle and a running reaper; fails if anything of the container is left.
fn with_node(name: &str, args: &[&str], body: impl for<'a> FnOnce(&'a mut Node) -> BoxFuture<'a, ()>) {
    if !isolation::inside(&format!("backend::crun::tests::{name}"), UNSHARED) {
        return;
    }
    become_subreaper().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut rec = record(dir.path());
    rec.id = format!("crun-test-{name}-{}", process::id());
    let bin = rec.bundle.join("rootfs/bin");
    fs::create_dir_all(&bin).unwrap();
    // Its applets are hard links, which have to be on the file system of the program that makes them.
    let path = std::env::var_os("PATH").unwrap();
    let mut programs = std::env::split_paths(&path).map(|folder| folder.join("busybox"));
    let program = programs.find(|path| path.is_file()).expect("busybox-static is needed");
    fs::copy(program, bin.join("busybox")).unwrap();
    let busybox = process::Command::new(bin.join("busybox"))
        .arg("--install")
        .arg(&bin)
        .status()
        .unwrap();
    assert!(busybox.success(), "busybox-static is needed");
    fs::write(rec.bundle.join("rootfs/noexec"), "").unwrap();
    let spec = process::Command::new("crun")
        .arg("spec")
        .current_dir(&rec.bundle)
        .status()
        .unwrap();
    assert!(spec.success(), "crun is needed");
    let config = rec.bundle.join("config.json");
    let mut json: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    json["process"]["terminal"] = false.into();
    json["process"]["args"] = args.into();
    rec.cgroups_path = Some(format!("/{}", rec.id));
    json["linux"]["cgroupsPath"] = rec.cgroups_path.clone().into();
    fs::write(&config, json.to_string()).unwrap();
    let before = entries(&rec.bundle);
    block_on(async {
        let reaper = Reaper::new();
        let running = tokio::spawn({
            let reaper = reaper.clone();
            async move { reaper.run().await }
        });
        let mut node = Node {
            crun: Crun::new(reaper),
            dir,
            rec,
        };
        body(&mut node).await;
        assert_eq!(node.crun.observe(&node.rec).await.unwrap(), Observed::Absent);
        assert_eq!(entries(&node.rec.bundle), before);
        assert_eq!(entries(&root(&node.rec).unwrap()), HashSet::new());
        let cgroup = Cgroup::expected(node.rec.cgroups_path.as_deref(), false, &node.rec.id).unwrap();
        assert_eq!(cgroup, None);
        // crun and all that it started are gone, or about to be.
        while is_busy(&node.rec.id) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        running.abort();
    });
}

fn entries(dir: &Path) -> HashSet<OsString> {
    fs::read_dir(dir)
        .map(|dir| dir.map(|entry| entry.unwrap().file_name()).collect())
        .unwrap_or_default()
}

/// Whether a process has children of this test left, or is in a cgroup of the container.
fn is_busy(id: &str) -> bool {
    fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        let cgroup = fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
        status.contains(&format!("PPid:\t{}\n", process::id())) || cgroup.contains(id)
    })
}

impl Node {
    /// Creates the container; its init and what it writes.
    async fn create(&self) -> Result<(Launched, File)> {
        let bundle = Bundle::read(&self.rec.bundle).unwrap();
        let (out, io) = output_io();
        let mut io = Some(io);
        let launched = self.crun.create(&self.rec, &bundle, &mut io).await?;
        assert!(io.is_none());
        Ok((launched.unwrap(), out))
    }

    async fn exec(&self, args: &[&str]) -> Result<(Launched, File)> {
        let (out, io) = output_io();
        let process = ExecSpec {
            json: json!({"args": args, "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}})
                .to_string()
                .into(),
            terminal: false,
        };
        Ok((self.crun.exec(&self.rec, "e1", &process, io).await?, out))
    }

    /// A program in place of crun.
    fn fake_crun(&mut self, script: &str) {
        use std::os::unix::fs::PermissionsExt;
        let path = self.dir.path().join("fake-crun");
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        self.rec.options.crun_binary = path;
    }
}

fn output_io() -> (File, ChildIo) {
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    let io = ChildIo::Pipes {
        stdin: None,
        stdout: Some(write.try_clone().unwrap()),
        stderr: Some(write),
    };
    (read.into(), io)
}

fn rest(mut file: File) -> String {
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn a_container_is_created_started_and_tells_its_exit_and_output() {
    with_node(
        "a_container_is_created_started_and_tells_its_exit_and_output",
        &["/bin/sh", "-c", "echo out; ls /proc/self/fd >&2; exit 42"],
        |node| {
            Box::pin(async {
                assert_eq!(node.crun.observe(&node.rec).await.unwrap(), Observed::Absent);
                let (init, out) = node.create().await.unwrap();
                let pid = init.pid;
                assert_eq!(node.crun.observe(&node.rec).await.unwrap(), Observed::Created { pid });
                let status = read_status(&state_dir(&node.rec).unwrap()).unwrap();
                assert_eq!(status.identity(), Some(identity(pid).unwrap()));
                node.crun.start(&node.rec, &mut None).await.unwrap();
                assert_eq!(init.exit.await.status, 42);
                // Only stdio, and the folder that ls reads.
                assert_eq!(rest(out), "out\n0\n1\n2\n3\n");
                assert_eq!(node.crun.observe(&node.rec).await.unwrap(), Observed::Stopped);
                node.crun.delete(&node.rec).await.unwrap();
                node.crun.delete(&node.rec).await.unwrap();
                let error = node.crun.start(&node.rec, &mut None).await.err().unwrap();
                assert_eq!(error.kind(), Kind::NotFound, "{error}");
            })
        },
    );
}

#[test]
fn an_exec_tells_its_exit_and_a_missing_program_is_named() {
    with_node(
        "an_exec_tells_its_exit_and_a_missing_program_is_named",
        &["/bin/sleep", "1000"],
        |node| {
            Box::pin(async {
                let (init, _out) = node.create().await.unwrap();
                let error = node.create().await.err().unwrap();
                assert_eq!(error.kind(), Kind::AlreadyExists, "{error}");
                node.crun.start(&node.rec, &mut None).await.unwrap();
                let error = node.crun.start(&node.rec, &mut None).await.err().unwrap();
                assert_eq!(error.kind(), Kind::FailedPrecondition, "{error}");
                assert_eq!(
                    node.crun.observe(&node.rec).await.unwrap(),
                    Observed::Running { pid: init.pid }
                );
                // So short that it is dead before its number is read.
                for status in 0..5u32 {
                    let (exec, out) = node
                        .exec(&["sh", "-c", &format!("echo {status}; exit {status}")])
                        .await
                        .unwrap();
                    assert_eq!(exec.exit.await.status, status);
                    assert_eq!(rest(out), format!("{status}\n"));
                }
                for (program, text) in [
                    ("nosuch", "exec: \"nosuch\": executable file not found in $PATH"),
                    (
                        "/nosuch",
                        "exec: \"/nosuch\": executable file not found in $PATH: no such file",
                    ),
                    ("/bin", "the program is not an executable file"),
                    ("/noexec", "the program is not an executable file"),
                ] {
                    let error = node.exec(&[program]).await.err().unwrap();
                    if program == "/noexec" {
                        // crun 1.8's words, and those of 1.21.
                        let reasons = ["Permission denied", "exists but it is not executable"];
                        let text = error.to_string();
                        assert!(reasons.iter().any(|reason| text.contains(reason)), "{text}");
                    }
                    assert_eq!(error.kind(), Kind::InvalidArgument, "{error}");
                    assert!(error.to_string().starts_with("OCI runtime exec failed: "), "{error}");
                    assert!(error.to_string().contains(text), "{error}");
                }
                node.crun
                    .update(&node.rec, br#"{"memory":{"limit":100000000}}"#)
                    .await
                    .unwrap();
                assert!(node.crun.update(&node.rec, b"{").await.is_err());
                let checkpoint = CheckpointOptions {
                    image_path: node.dir.path().join("images"),
                    ..CheckpointOptions::default()
                };
                // With CRIU it would be made; the contract suite sees to that.
                let version = process::Command::new("crun").arg("--version").output().unwrap().stdout;
                if !String::from_utf8_lossy(&version).contains("+CRIU") {
                    let error = node.crun.checkpoint(&node.rec, &checkpoint).await.unwrap_err();
                    assert_eq!(error.kind(), Kind::Unimplemented, "{error}");
                }
                // It still runs.
                node.crun.delete(&node.rec).await.unwrap();
                assert_eq!(init.exit.await.status, 137);
                assert_eq!(node.exec(&["true"]).await.err().unwrap().kind(), Kind::NotFound);
            })
        },
    );
}

#[test]
fn a_create_that_fails_says_why_and_leaves_nothing() {
    with_node("a_create_that_fails_says_why_and_leaves_nothing", &["nosuch"], |node| {
        Box::pin(async {
            let error = node.create().await.err().unwrap();
            assert_eq!(error.kind(), Kind::InvalidArgument);
            assert_eq!(
                error.to_string(),
                "OCI runtime create failed: exec: \"nosuch\": executable file not found in $PATH: no such file or directory"
            );
            node.crun.delete(&node.rec).await.unwrap();

            node.fake_crun("echo garbage; head -c 100000 /dev/urandom > \"$4\"; exit 3");
            let error = node.create().await.err().unwrap();
            assert_eq!(
                error.to_string(),
                "OCI runtime create failed: crun ended with status 3 and gave no reason"
            );
            node.fake_crun("exit 0");
            let error = node.create().await.err().unwrap();
            assert!(error.to_string().contains("told no pid"), "{error}");
            node.fake_crun("sleep 1000 & wait");
            node.rec.options.runtime_timeout_ms = 300;
            let error = node.create().await.err().unwrap();
            assert_eq!(error.kind(), Kind::DeadlineExceeded);
            assert!(
                error
                    .to_string()
                    .contains("within 300 ms and was killed; Delete removes"),
                "{error}"
            );
            node.rec.options.crun_binary = "no-crun-here".into();
            let error = node.create().await.err().unwrap();
            assert_eq!(error.kind(), Kind::Unavailable);
            assert!(
                error
                    .to_string()
                    .contains("no-crun-here was not found; install the package crun"),
                "{error}"
            );
            // Nothing was made, so crun is not needed to remove it.
            node.crun.delete(&node.rec).await.unwrap();
        })
    });
}

#[test]
fn a_process_of_a_call_that_is_given_up_is_killed() {
    with_node("a_process_of_a_call_that_is_given_up_is_killed", &["true"], |node| {
        Box::pin(async {
            // Between the pid file and its end: it made a process, and hangs.
            let marker = node.dir.path().join("made");
            node.fake_crun(&format!(
                "setsid sleep 1000 & while [ \"$1\" != --pid-file ]; do shift; done; printf $! > \"$2\"; echo $! > {}; wait",
                marker.display()
            ));
            tokio::select! {
                _ = node.exec(&["true"]) => panic!("it does not end"),
                () = async {
                    while fs::read(&marker).unwrap_or_default().is_empty() {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                } => {}
            }
        })
    });
}

#[test]
fn what_a_crun_killed_in_the_middle_of_create_left_is_deleted() {
    with_node(
        "what_a_crun_killed_in_the_middle_of_create_left_is_deleted",
        &["/bin/sleep", "1000"],
        |node| {
            Box::pin(async {
                // Given up at ever later points, until one create gets to its end.
                let mut step = Duration::ZERO;
                loop {
                    let made = tokio::time::timeout(step, node.create()).await.is_ok();
                    node.crun.delete(&node.rec).await.unwrap();
                    assert_eq!(node.crun.observe(&node.rec).await.unwrap(), Observed::Absent);
                    while is_busy(&node.rec.id) {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                    if made {
                        break;
                    }
                    step += Duration::from_millis(2);
                }
                // A state that crun cannot read: its own delete would leave the process.
                for status in ["", "{", "{}"] {
                    let (init, _out) = node.create().await.unwrap();
                    fs::write(state_dir(&node.rec).unwrap().join("status"), status).unwrap();
                    node.crun.delete(&node.rec).await.unwrap();
                    assert_eq!(init.exit.await.status, 137, "{status:?}");
                }
                // The same of a running one, which holds nothing of crun's: the record knows it.
                let (init, _out) = node.create().await.unwrap();
                node.crun.start(&node.rec, &mut None).await.unwrap();
                node.rec.init = Some(identity(init.pid).unwrap());
                fs::write(state_dir(&node.rec).unwrap().join("status"), "").unwrap();
                node.crun.delete(&node.rec).await.unwrap();
                assert_eq!(init.exit.await.status, 137);
            })
        },
    );
}

#[test]
fn a_container_of_another_bundle_is_not_deleted_for_its_name() {
    with_node(
        "a_container_of_another_bundle_is_not_deleted_for_its_name",
        &["/bin/sleep", "1000"],
        |node| {
            Box::pin(async {
                let (init, _out) = node.create().await.unwrap();
                let mut other = node.rec.clone();
                other.bundle = node.dir.path().join("other");
                fs::create_dir(&other.bundle).unwrap();
                assert_eq!(node.crun.observe(&other).await.unwrap(), Observed::Absent);
                node.crun.delete(&other).await.unwrap();
                let pid = init.pid;
                assert_eq!(node.crun.observe(&node.rec).await.unwrap(), Observed::Created { pid });
                // By another name of the same folder it is the same.
                other.bundle = node.dir.path().join("link");
                std::os::unix::fs::symlink(&node.rec.bundle, &other.bundle).unwrap();
                node.crun.delete(&other).await.unwrap();
                assert_eq!(init.exit.await.status, 137);
            })
        },
    );
}

#[test]
fn a_restore_without_criu_is_unimplemented() {
    with_node("a_restore_without_criu_is_unimplemented", &["true"], |node| {
        Box::pin(async {
            node.rec.restore_from = Some(node.dir.path().join("nowhere"));
            assert_eq!(node.create().await.err().unwrap().kind(), Kind::InvalidArgument);
            node.rec.restore_from = Some(node.dir.path().to_owned());
            node.fake_crun("printf 'crun version 1.8.1\\n+SYSTEMD +YAJL\\n'");
            let error = node.create().await.err().unwrap();
            assert_eq!(error.kind(), Kind::Unimplemented);
            assert!(error.to_string().contains("was built without CRIU"), "{error}");
            node.fake_crun("printf 'crun version 1.21\\n+SYSTEMD +CRIU\\n'");
            let bundle = Bundle::read(&node.rec.bundle).unwrap();
            let mut io = Some(no_io());
            assert!(node.crun.create(&node.rec, &bundle, &mut io).await.unwrap().is_none());
            assert!(io.is_some(), "init is born in start");
            let features = node.crun.features(&node.rec.options).await;
            assert!(features.is_err(), "a version is no list of features");
            node.rec.options.crun_binary = "crun".into();
            let features = node.crun.features(&node.rec.options).await.unwrap();
            assert!(features["ociVersionMax"].is_string(), "{features}");
        })
    });
}
