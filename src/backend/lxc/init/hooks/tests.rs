//! Real hooks; `sh` is their interpreter.

use std::{fs, os::unix::fs::PermissionsExt};

use serde_json::json;

use super::*;
use crate::host::command::isolation;

fn inside(name: &str) -> bool {
    isolation::inside(&format!("backend::lxc::init::hooks::tests::{name}"), &["env"])
}

fn sh(script: &str) -> Hook {
    Hook {
        name: "createContainer[0]".into(),
        path: "/bin/sh".into(),
        args: vec!["sh".into(), "-c".into(), script.into()],
        env: vec!["PATH=/usr/bin:/bin".into()],
        timeout_seconds: Some(60),
    }
}

fn oci(json: serde_json::Value) -> oci_spec::runtime::Hook {
    serde_json::from_value(json).unwrap()
}

#[test]
fn a_hook_of_a_bundle_is_checked_and_keeps_every_field() {
    let whole = oci(json!({"path": "/h", "args": ["x", "y z"], "env": ["A=b=c"], "timeout": 3}));
    assert_eq!(
        Hook::of(&[whole, oci(json!({"path": "/h"}))], "createContainer").unwrap(),
        [
            Hook {
                name: "createContainer[0]".into(),
                path: "/h".into(),
                args: vec!["x".into(), "y z".into()],
                env: vec!["A=b=c".into()],
                timeout_seconds: Some(3),
            },
            Hook {
                name: "createContainer[1]".into(),
                path: "/h".into(),
                args: vec!["/h".into()],
                env: vec![],
                timeout_seconds: None,
            },
        ]
    );
    for (json, text) in [
        (json!({"path": "h"}), "hooks.x[0].path: \"h\" is no absolute path"),
        (json!({"path": "/h\0"}), "hooks.x[0].path: there is a NUL in it"),
        (
            json!({"path": "/h", "args": ["a", "\0"]}),
            "hooks.x[0].args[1]: there is a NUL in it",
        ),
        (
            json!({"path": "/h", "env": ["A"]}),
            "hooks.x[0].env[0]: \"A\" is not NAME=value",
        ),
        (
            json!({"path": "/h", "env": ["=a"]}),
            "hooks.x[0].env[0]: \"=a\" is not NAME=value",
        ),
        (
            json!({"path": "/h", "env": ["A=\0"]}),
            "hooks.x[0].env[0]: there is a NUL in it",
        ),
        (
            json!({"path": "/h", "timeout": 0}),
            "hooks.x[0].timeout: 0 is not more than 0",
        ),
        (
            json!({"path": "/h", "timeout": -1}),
            "hooks.x[0].timeout: -1 is not more than 0",
        ),
    ] {
        let error = Hook::of(&[oci(json)], "x").unwrap_err();
        assert_eq!(
            (error.kind(), error.to_string()),
            (Kind::InvalidArgument, text.to_owned())
        );
    }
}

#[test]
fn a_hook_gets_the_state_its_arguments_and_only_its_environment() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("out");
    // More than a pipe holds.
    let state = format!("{{\"x\":\"{}\"}}", "y".repeat(1 << 20));
    let mut hook = sh(r#"{ cat; printf '|%s|%s|' "$0" "$1"; cat /proc/$$/environ | tr '\0' ' '; } >"$OUT""#);
    hook.args.extend(["zero".into(), "one two".into()]);
    hook.env = vec!["PATH=/bin:/usr/bin".into(), format!("OUT={}", file.display())];
    run(&[hook], &state).unwrap();
    let text = fs::read_to_string(&file).unwrap();
    let (stdin, rest) = text.split_at(state.len());
    assert!(stdin == state, "the state came in another form");
    let mut variables: Vec<&str> = rest
        .strip_prefix("|zero|one two|")
        .unwrap()
        .split_ascii_whitespace()
        .collect();
    variables.sort_unstable();
    assert_eq!(
        variables,
        [format!("OUT={}", file.display()).as_str(), "PATH=/bin:/usr/bin"]
    );
}

#[test]
fn a_hook_that_fails_is_named_with_what_it_wrote_to_stderr_and_the_next_one_is_not_run() {
    let dir = tempfile::tempdir().unwrap();
    let mark = dir.path().join("mark");
    let hooks = [
        sh("true"),
        Hook {
            name: "createContainer[1]".into(),
            ..sh("echo noise; echo broken >&2; exit 3")
        },
        sh(&format!("touch {}", mark.display())),
    ];
    let error = run(&hooks, "{}").unwrap_err();
    assert_eq!(
        error.to_string(),
        "hook createContainer[1] /bin/sh: exit status 3: broken"
    );
    assert_eq!(error.kind(), Kind::Unknown);
    assert!(!mark.exists());
    let error = run(&[sh("kill -9 $$")], "{}").unwrap_err();
    assert_eq!(error.to_string(), "hook createContainer[0] /bin/sh: killed by signal 9");
}

#[test]
fn a_hook_that_cannot_be_executed_is_an_error_of_the_bundle() {
    let dir = tempfile::tempdir().unwrap();
    let plain = dir.path().join("plain");
    fs::write(&plain, "x").unwrap();
    fs::set_permissions(&plain, fs::Permissions::from_mode(0o644)).unwrap();
    for (path, word) in [
        (dir.path().join("none"), "No such file"),
        (plain, "Permission denied"),
        (dir.path().to_owned(), "Permission denied"),
    ] {
        let error = run(&[Hook { path, ..sh("true") }], "{}").unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument, "{error}");
        assert!(error.to_string().contains(word), "{error}");
    }
}

#[test]
fn a_hook_that_reads_nothing_is_no_error() {
    run(&[sh("exec <&-; true")], &"x".repeat(1 << 20)).unwrap();
}

#[test]
fn a_hook_may_write_more_than_a_pipe_holds_to_both() {
    let error = run(
        &[sh(
            "head -c 1000000 /dev/zero | tr '\\0' o; head -c 1000000 /dev/zero | tr '\\0' e >&2; exit 1",
        )],
        "{}",
    )
    .unwrap_err()
    .to_string();
    assert_eq!(
        error,
        format!(
            "hook createContainer[0] /bin/sh: exit status 1: {}",
            "e".repeat(STDERR_MAX_BYTES)
        )
    );
}

#[test]
fn a_hook_is_over_when_its_process_is_and_not_its_descendants() {
    let begin = Instant::now();
    let error = run(&[sh("sleep 1000 & echo here >&2; echo $! >&2; exit 1")], "{}")
        .unwrap_err()
        .to_string();
    let sleeper: i32 = error.rsplit('\n').next().unwrap().parse().unwrap();
    nix::sys::signal::kill(Pid::from_raw(sleeper), Signal::SIGKILL).unwrap();
    assert!(begin.elapsed() < crate::patience::patience(30), "{:?}", begin.elapsed());
}

#[test]
fn a_hook_that_outlives_its_timeout_is_killed_with_its_group() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("pid");
    let hook = Hook {
        timeout_seconds: Some(1),
        ..sh(&format!(
            "sleep 1000 & echo $! >{}; echo begun >&2; wait",
            file.display()
        ))
    };
    let error = run(&[hook], "{}").unwrap_err();
    assert_eq!(error.kind(), Kind::DeadlineExceeded);
    assert_eq!(
        error.to_string(),
        "hook createContainer[0] /bin/sh: killed after 1 s, its timeout: begun"
    );
    let sleeper = fs::read_to_string(&file).unwrap();
    // Its new parent has to reap it.
    let gone = || match fs::read_to_string(format!("/proc/{}/stat", sleeper.trim())) {
        Ok(stat) => stat.contains(") Z "),
        Err(_) => true,
    };
    let deadline = Instant::now() + crate::patience::patience(30);
    while !gone() {
        assert!(Instant::now() < deadline, "the sleeper lives");
        std::thread::yield_now();
    }
}

#[test]
fn a_hook_that_writes_without_an_end_is_killed_too() {
    let hook = Hook {
        timeout_seconds: Some(1),
        ..sh("exec cat /dev/zero >&2")
    };
    assert_eq!(run(&[hook], "{}").unwrap_err().kind(), Kind::DeadlineExceeded);
}

#[test]
fn a_hook_gets_no_descriptor_of_the_helper() {
    if !inside("a_hook_gets_no_descriptor_of_the_helper") {
        return;
    }
    let leaky = File::open("/dev/zero").unwrap();
    fcntl(&leaky, FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
    let error = run(&[sh("ls -l /proc/self/fd >&2; exit 1")], "{}")
        .unwrap_err()
        .to_string();
    assert!(error.contains("0 -> ") && !error.contains("/dev/zero"), "{error}");
}

#[test]
fn only_the_hook_itself_is_reaped() {
    if !inside("only_the_hook_itself_is_reaped") {
        return;
    }
    let mut other = Command::new("true").spawn().unwrap();
    run(&[sh("true")], "{}").unwrap();
    assert!(other.wait().unwrap().success());
}
