//! The real program, called as containerd calls it: `start`, `delete`, `-info`, `-v`.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

/// The part of the harness that needs no containerd.
#[path = "support"]
mod support {
    pub(crate) mod patience;
}

use std::{
    collections::HashSet,
    ffi::OsStr,
    fs,
    io::Write,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{fs::FileTypeExt, net::UnixStream, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::LazyLock,
    thread,
    time::{Duration, Instant},
};

use containerd_shim_protos::{
    api::DeleteResponse,
    bootstrap_api::{BootstrapParams, BootstrapResult},
    protobuf::{Message, well_known_types::any::Any},
    types::introspection::RuntimeInfo,
};
use support::patience::{patience, pause};

const PROGRAM: &str = env!("CARGO_BIN_EXE_containerd-shim-proxmox-lxcri-v1");
static BOUND: LazyLock<Duration> = LazyLock::new(|| patience(20));

/// A containerd of the test's own: an address that nobody else has, bundles, and an eye on what is left at the end.
struct Daemon {
    dir: tempfile::TempDir,
}

impl Daemon {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn address(&self) -> String {
        self.dir.path().join("c.sock").display().to_string()
    }

    fn bundle(&self, id: &str, annotations: &str) -> PathBuf {
        let bundle = self.dir.path().join(id);
        fs::create_dir_all(&bundle).unwrap();
        let config = format!(r#"{{"ociVersion":"1.0.2","annotations":{{{annotations}}}}}"#);
        fs::write(bundle.join("config.json"), config).unwrap();
        nix::unistd::mkfifo(&bundle.join("log"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        bundle
    }

    fn command(&self, bundle: &Path, id: &str, action: &str) -> Command {
        let mut command = Command::new(PROGRAM);
        command
            .current_dir(bundle)
            .args(["-namespace", "test", "-id", id, "-address", &self.address()])
            .args(["-publish-binary", "/usr/bin/containerd", action])
            .env_remove("MAX_SHIM_VERSION")
            .env("TTRPC_ADDRESS", format!("{}.ttrpc", self.address()))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// The shims of this daemon: processes whose command line names its address.
    fn shims(&self) -> Vec<i32> {
        let address = self.address();
        let mut pids = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse() else {
                continue;
            };
            let mut words = Vec::new();
            eventually("a process that was just executed has its arguments", || {
                words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
                // Kernel threads and the dead have no program.
                !words.is_empty() || fs::read_link(entry.path().join("exe")).is_err()
            });
            let words: Vec<_> = words.split(|b| *b == 0).collect();
            if words.contains(&address.as_bytes()) && !words.iter().any(|w| [&b"start"[..], b"delete"].contains(w)) {
                pids.push(pid);
            }
        }
        pids
    }

    /// A child of a shim is as its parent for a moment, until it executes its program.
    fn has_shims(&self, number: usize) {
        eventually(&format!("{number} shims"), || self.shims().len() == number);
    }

    fn signal(&self, signal: nix::sys::signal::Signal) {
        for pid in self.shims() {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal);
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.signal(nix::sys::signal::SIGKILL);
        for entry in fs::read_dir(self.dir.path()).into_iter().flatten().flatten() {
            if let Ok(address) = fs::read_to_string(entry.path().join("address")) {
                let _ = fs::remove_file(socket(&address));
            }
        }
    }
}

fn socket(address: &str) -> PathBuf {
    PathBuf::from(address.strip_prefix("unix://").unwrap_or_else(|| panic!("{address:?}")))
}

/// Waits for a condition of the outside world; fails when it does not come true.
fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + *BOUND;
    while !condition() {
        assert!(Instant::now() < end, "not within {:?}: {what}", *BOUND);
        thread::sleep(pause());
    }
}

fn output(mut command: Command, input: &[u8]) -> Output {
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    child.wait_with_output().unwrap()
}

/// The answer of a `start` that succeeds and keeps stderr clean.
fn answer(output: Output) -> Vec<u8> {
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert!(output.status.success(), "{output:?}");
    output.stdout
}

fn text(output: Output) -> String {
    String::from_utf8(answer(output)).unwrap()
}

fn refusal(output: Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_eq!(output.stdout, b"");
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(text.lines().count(), 1, "{text:?}");
    text
}

#[test]
fn containerd_1_6_gets_a_plain_address_and_finds_it_again_in_the_bundle() {
    let daemon = Daemon::new();
    let bundle = daemon.bundle("a", "");
    let address = text(daemon.command(&bundle, "a", "start").output().unwrap());
    assert_eq!(fs::read_to_string(bundle.join("address")).unwrap(), address);
    assert!(fs::metadata(socket(&address)).unwrap().file_type().is_socket());
    UnixStream::connect(socket(&address)).unwrap();
}

#[test]
fn containerd_1_7_gets_json_and_2_3_gets_protobuf() {
    let daemon = Daemon::new();
    let bundle = daemon.bundle("a", "");
    let mut command = daemon.command(&bundle, "a", "start");
    command.env("MAX_SHIM_VERSION", "2");
    let options = Any {
        type_url: "containerd.runc.v1.Options".into(),
        ..Default::default()
    };
    let json = answer(output(command, &options.write_to_bytes().unwrap()));
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(json["version"], 2);
    assert_eq!(json["protocol"], "ttrpc");
    UnixStream::connect(socket(json["address"].as_str().unwrap())).unwrap();

    let bundle = daemon.bundle("b", "");
    let folder = daemon.dir.path().join("s");
    let params = BootstrapParams {
        instance_id: "b".into(),
        namespace: "test".into(),
        containerd_grpc_address: daemon.address(),
        socket_dir: Some(folder.display().to_string()),
        ..Default::default()
    };
    let mut command = daemon.command(&bundle, "b", "start");
    command.env("MAX_SHIM_VERSION", "2");
    let result = answer(output(command, &params.write_to_bytes().unwrap()));
    let result = BootstrapResult::parse_from_bytes(&result).unwrap();
    assert_eq!((result.version, result.protocol.as_str()), (3, "ttrpc"));
    assert_eq!(socket(&result.address).parent(), Some(folder.as_path()));
    UnixStream::connect(socket(&result.address)).unwrap();
}

#[test]
fn a_closed_stdin_is_no_trouble_and_an_open_one_is_not_waited_for() {
    let daemon = Daemon::new();
    let bundle = daemon.bundle("a", "");
    let mut command = daemon.command(&bundle, "a", "start");
    // SAFETY: close(2) is async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            libc::close(0);
            Ok(())
        });
    }
    let address = text(command.output().unwrap());
    let mut command = daemon.command(&bundle, "a", "start");
    let (reader, kept_open) = std::io::pipe().unwrap();
    assert_eq!(text(command.stdin(reader).output().unwrap()), address);
    drop(kept_open);
}

#[test]
fn the_shim_is_a_detached_process_that_holds_nothing_of_its_caller() {
    let daemon = Daemon::new();
    let bundle = daemon.bundle("a", "");
    let leaked = fs::File::open("/dev/null").unwrap();
    let mut command = daemon.command(&bundle, "a", "start");
    command.arg("-ignored").env("SOMETHING", "kept");
    // SAFETY: dup2(2) is async-signal-safe; the copy is not close-on-exec.
    unsafe {
        use std::os::fd::AsRawFd;
        let fd = leaked.as_raw_fd();
        command.pre_exec(move || {
            if libc::dup2(fd, 9) == 9 {
                Ok(())
            } else {
                Err(std::io::Error::last_os_error())
            }
        });
    }
    text(command.output().unwrap());
    daemon.has_shims(1);
    let pid = daemon.shims()[0];
    let proc = PathBuf::from(format!("/proc/{pid}"));
    eventually("the shim has its name", || {
        fs::read_to_string(proc.join("comm")).unwrap() == "containerd-shim\n"
    });
    eventually("the shim has left the bundle", || {
        fs::read_link(proc.join("cwd")).unwrap() == Path::new("/")
    });
    assert_eq!(
        nix::unistd::getsid(Some(nix::unistd::Pid::from_raw(pid)))
            .unwrap()
            .as_raw(),
        pid
    );
    let cmdline = fs::read_to_string(proc.join("cmdline")).unwrap();
    let words: Vec<_> = cmdline.split_terminator('\0').skip(1).collect();
    assert_eq!(words, ["-namespace", "test", "-id", "a", "-address", &daemon.address()]);
    for fd in 0..3 {
        assert_eq!(
            fs::read_link(proc.join(format!("fd/{fd}"))).unwrap(),
            Path::new("/dev/null")
        );
    }
    assert!(
        fs::read_link(proc.join("fd/3"))
            .unwrap()
            .to_string_lossy()
            .starts_with("socket:")
    );
    assert!(
        fs::symlink_metadata(proc.join("fd/9")).is_err()
            || fs::read_link(proc.join("fd/9")).unwrap() != Path::new("/dev/null")
    );
    let environ = fs::read(proc.join("environ")).unwrap();
    assert!(environ.split(|b| *b == 0).any(|entry| entry == b"SOMETHING=kept"));
}

#[test]
fn the_shim_speaks_into_containerds_log() {
    let daemon = Daemon::new();
    let bundle = daemon.bundle("a", "");
    // As containerd opens it.
    let mut log = fs::File::options()
        .read(true)
        .write(true)
        .open(bundle.join("log"))
        .unwrap();
    let mut command = daemon.command(&bundle, "a", "start");
    let args: Vec<_> = command.get_args().map(OsStr::to_owned).collect();
    command = Command::new(PROGRAM);
    command
        .current_dir(&bundle)
        .arg("-debug")
        .args(args)
        .stdin(Stdio::null());
    text(command.output().unwrap());
    let mut line = [0; 4096];
    let length = std::io::Read::read(&mut log, &mut line).unwrap();
    let line = std::str::from_utf8(&line[..length]).unwrap();
    assert!(line.starts_with("time=\"20"), "{line}");
    assert!(line.contains("level=debug msg=\"serving, pid "), "{line}");
    assert!(
        line.ends_with("runtime=io.containerd.proxmox-lxcri.v1 namespace=test id=a\n"),
        "{line}"
    );
}

#[test]
fn the_shim_is_killed_before_containerd_but_not_before_its_time() {
    let daemon = Daemon::new();
    let bundle = daemon.bundle("a", "");
    text(daemon.command(&bundle, "a", "start").output().unwrap());
    let score = |pid: &str| -> i32 {
        let text = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
        text.trim().parse().unwrap()
    };
    assert_eq!(score(&daemon.shims()[0].to_string()), (score("self") + 1).min(1000));
}

#[test]
fn a_pod_shares_one_shim_and_others_do_not() {
    let daemon = Daemon::new();
    let pod = r#""io.kubernetes.cri.sandbox-id":"pod","io.containerd.runc.v2.group":"ignored""#;
    let group = r#""io.containerd.runc.v2.group":"pod""#;
    let mut addresses = Vec::new();
    for (id, annotations) in [("pod", pod), ("c1", pod), ("c2", group), ("other", "")] {
        let bundle = daemon.bundle(id, annotations);
        addresses.push(text(daemon.command(&bundle, id, "start").output().unwrap()));
        assert_eq!(
            &fs::read_to_string(bundle.join("address")).unwrap(),
            addresses.last().unwrap()
        );
    }
    assert_eq!(addresses[0], addresses[1]);
    assert_eq!(addresses[0], addresses[2]);
    assert_ne!(addresses[0], addresses[3]);
    daemon.has_shims(2);
}

#[test]
fn twenty_starts_of_a_group_at_once_make_one_shim() {
    let daemon = Daemon::new();
    let children: Vec<_> = (0..20)
        .map(|n| {
            let id = format!("c{n}");
            let bundle = daemon.bundle(&id, r#""io.kubernetes.cri.sandbox-id":"pod""#);
            daemon.command(&bundle, &id, "start").spawn().unwrap()
        })
        .collect();
    let addresses: HashSet<_> = children
        .into_iter()
        .map(|c| text(c.wait_with_output().unwrap()))
        .collect();
    assert_eq!(addresses.len(), 1);
    daemon.has_shims(1);
    UnixStream::connect(socket(addresses.iter().next().unwrap())).unwrap();
}

#[test]
fn the_socket_of_a_killed_shim_is_taken_over() {
    let daemon = Daemon::new();
    let bundle = daemon.bundle("a", "");
    let address = text(daemon.command(&bundle, "a", "start").output().unwrap());
    let before = daemon.shims();
    daemon.signal(nix::sys::signal::SIGKILL);
    eventually("the shim is dead", || UnixStream::connect(socket(&address)).is_err());
    assert!(socket(&address).exists());
    assert_eq!(text(daemon.command(&bundle, "a", "start").output().unwrap()), address);
    UnixStream::connect(socket(&address)).unwrap();
    assert!(daemon.shims().iter().any(|pid| !before.contains(pid)));
}

/// A shim that cannot serve removes its socket file. `before_the_word` happens while it waits for the word of `start`, which is given if
/// that answers true.
fn a_shim_leaves_no_socket(before_the_word: impl FnOnce(&Path, &OwnedFd) -> bool) {
    let daemon = Daemon::new();
    let bundle = daemon.bundle("c1", "");
    let path = daemon.dir.path().join("half");
    let socket = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Unix,
        nix::sys::socket::SockType::Stream,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    let place = nix::sys::socket::UnixAddr::new(&path).unwrap();
    nix::sys::socket::bind(socket.as_raw_fd(), &place).unwrap();
    let (done, doing) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    let away = |fd: &OwnedFd| nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(20)).unwrap();
    let (socket_away, done_away) = (away(&socket), away(&done));
    let mut command = Command::new(PROGRAM);
    command
        .current_dir(&bundle)
        .args(["-namespace", "test", "-id", "c1", "-address", &daemon.address()])
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    // SAFETY: dup2 is async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            for (from, to) in [(socket_away, 3), (done_away, 4)] {
                if libc::dup2(from, to) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    let child = command.spawn().unwrap();
    assert!(path.exists());
    if before_the_word(&bundle, &socket) {
        nix::unistd::write(&doing, b".").unwrap();
    }
    drop(doing);
    let output = child.wait_with_output().unwrap();
    assert!(!output.status.success());
    assert!(!path.exists(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_shim_whose_start_was_killed_half_way_removes_the_socket_file() {
    // Between bind and listen: a place, and the end of its pipe.
    a_shim_leaves_no_socket(|_, _| false);
}

#[test]
fn a_shim_whose_bundle_is_gone_before_it_serves_removes_the_socket_file() {
    a_shim_leaves_no_socket(|bundle, socket| {
        nix::sys::socket::listen(socket, nix::sys::socket::Backlog::MAXCONN).unwrap();
        fs::remove_dir_all(bundle).unwrap();
        true
    });
}

#[test]
fn a_shim_that_nobody_asks_for_anything_goes_with_its_bundle() {
    let daemon = Daemon::new();
    let bundle = daemon.bundle("a", "");
    let address = text(daemon.command(&bundle, "a", "start").output().unwrap());
    daemon.has_shims(1);
    fs::remove_dir_all(&bundle).unwrap();
    eventually("the shim is gone", || daemon.shims().is_empty());
    assert!(!socket(&address).exists());
}

#[test]
fn a_signal_ends_an_idle_shim_and_its_socket() {
    let daemon = Daemon::new();
    let bundle = daemon.bundle("a", "");
    let address = text(daemon.command(&bundle, "a", "start").output().unwrap());
    let pid = daemon.shims()[0];
    eventually("the shim waits for signals", || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let caught = status.lines().find_map(|l| l.strip_prefix("SigCgt:")).unwrap();
        u64::from_str_radix(caught.trim(), 16).unwrap() & (1 << (libc::SIGTERM - 1)) != 0
    });
    daemon.signal(nix::sys::signal::SIGTERM);
    eventually("the shim is gone", || daemon.shims().is_empty());
    assert!(!socket(&address).exists());
}

#[test]
fn a_wrong_call_is_told_in_one_sentence_and_leaves_nothing() {
    let daemon = Daemon::new();
    let bundle = daemon.bundle("a", "");
    let broken = daemon.bundle("broken", "");
    fs::write(broken.join("config.json"), "{").unwrap();
    let none = daemon.bundle("none", "");
    fs::remove_file(none.join("config.json")).unwrap();
    for (command, part) in [
        (daemon.command(&broken, "broken", "start"), "config.json"),
        (daemon.command(&none, "none", "start"), "config.json"),
        (daemon.command(&bundle, "../a", "start"), "invalid id"),
        (daemon.command(&bundle, "a", "run"), "unknown action"),
        (daemon.command(&bundle, "a/b", "delete"), "invalid id"),
    ] {
        let mut command = command;
        let text = refusal(command.output().unwrap());
        assert!(text.contains(part), "{text}");
    }
    let text = refusal(Command::new(PROGRAM).stdin(Stdio::null()).output().unwrap());
    assert!(text.contains("containerd runs this program by itself"), "{text}");
    let text = refusal(
        Command::new(PROGRAM)
            .args(["-namespace", "n", "-id", "a"])
            .output()
            .unwrap(),
    );
    assert!(text.contains("descriptor 3"), "{text}");
    assert!(daemon.shims().is_empty());
    assert!(!broken.join("address").exists());
}

#[test]
fn a_shim_that_cannot_be_started_leaves_no_socket() {
    let daemon = Daemon::new();
    let bundle = daemon.bundle("a", "");
    let folder = daemon.dir.path().join("s");
    let params = BootstrapParams {
        instance_id: "a".into(),
        namespace: "test".into(),
        socket_dir: Some(folder.display().to_string()),
        ..Default::default()
    };
    // In the way of the address file, which is written after the socket was bound.
    fs::create_dir(bundle.join("address")).unwrap();
    let command = daemon.command(&bundle, "a", "start");
    let text = refusal(output(command, &params.write_to_bytes().unwrap()));
    assert!(text.contains("cannot write"), "{text}");
    assert!(daemon.shims().is_empty());
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0, "a socket was left");
    assert_eq!(fs::read_dir(&bundle).unwrap().count(), 3, "a file was left");
}

#[test]
fn delete_answers_and_removes_the_dead_shims_socket_as_often_as_it_is_called() {
    let daemon = Daemon::new();
    let bundle = daemon.bundle("a", "");
    let address = text(daemon.command(&bundle, "a", "start").output().unwrap());
    let delete = |dir: &Path| {
        let mut command = daemon.command(dir, "a", "delete");
        let mut args: Vec<_> = command.get_args().map(OsStr::to_owned).collect();
        args.splice(0..0, ["-bundle".into(), bundle.clone().into()]);
        command = Command::new(PROGRAM);
        let output = command.args(args).current_dir(dir).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        DeleteResponse::parse_from_bytes(&output.stdout).unwrap()
    };
    // The shim lives: its socket is not touched.
    assert_eq!(delete(&bundle).exit_status, 137);
    UnixStream::connect(socket(&address)).unwrap();
    daemon.signal(nix::sys::signal::SIGKILL);
    eventually("the shim is dead", || UnixStream::connect(socket(&address)).is_err());
    for _ in 0..2 {
        let response = delete(Path::new("/"));
        assert_eq!(response.exit_status, 137);
        assert!(response.exited_at.seconds > 1_600_000_000);
        assert!(!socket(&address).exists());
    }
}

#[test]
fn info_describes_the_runtime() {
    let options = Any {
        type_url: "containerd.runc.v1.Options".into(),
        ..Default::default()
    };
    for (input, expected) in [(Vec::new(), None), (options.write_to_bytes().unwrap(), Some(options))] {
        let mut command = Command::new(PROGRAM);
        command.arg("-info").stdout(Stdio::piped()).stderr(Stdio::piped());
        let info = RuntimeInfo::parse_from_bytes(&answer(output(command, &input))).unwrap();
        assert_eq!(info.name, "io.containerd.proxmox-lxcri.v1");
        assert_eq!(info.version.version, env!("CARGO_PKG_VERSION"));
        assert_eq!(info.options.into_option(), expected);
    }
}

/// Options of runc's shim, by hand: field number and text.
fn runc_options(field: u8, text: &str) -> Vec<u8> {
    let mut value = vec![field << 3 | 2, u8::try_from(text.len()).unwrap()];
    value.extend(text.as_bytes());
    let any = Any {
        type_url: "containerd.runc.v1.Options".into(),
        value,
        ..Default::default()
    };
    any.write_to_bytes().unwrap()
}

#[test]
fn info_has_the_features_that_the_runtime_program_tells() {
    let dir = tempfile::tempdir().unwrap();
    let crun = dir.path().join("crun");
    for (script, expected) in [
        (
            r#"#!/bin/sh
        [ "$1" = features ] && echo '{"ociVersionMin":"1.0.0"}'"#,
            Some("{\"ociVersionMin\":\"1.0.0\"}"),
        ),
        ("#!/bin/sh\necho '{}'; exit 1", None),
        ("#!/bin/sh\necho garbage", None),
    ] {
        fs::write(&crun, script).unwrap();
        fs::set_permissions(&crun, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let mut command = Command::new(PROGRAM);
        command.arg("-info").stdout(Stdio::piped()).stderr(Stdio::piped());
        // binary_name
        let input = runc_options(6, crun.to_str().unwrap());
        let info = RuntimeInfo::parse_from_bytes(&answer(output(command, &input))).unwrap();
        let features = info.features.into_option();
        let value = features.as_ref().map(|any| std::str::from_utf8(&any.value).unwrap());
        assert_eq!(value, expected, "{script}");
        if let Some(any) = features {
            assert_eq!(
                any.type_url,
                "types.containerd.io/opencontainers/runtime-spec/1/features/Features"
            );
        }
    }
}

#[test]
fn the_shim_is_in_its_cgroup_from_the_beginning() {
    let daemon = Daemon::new();
    let bundle = daemon.bundle("a", "");
    let name = format!("/proxmox-lxcri-test-{}", std::process::id());
    // shim_cgroup
    let address = text(output(daemon.command(&bundle, "a", "start"), &runc_options(3, &name)));
    let pid = daemon.shims()[0];
    let membership = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    assert!(membership.lines().any(|line| line.ends_with(&name)), "{membership}");
    daemon.signal(nix::sys::signal::SIGKILL);
    eventually("the shim is dead", || UnixStream::connect(socket(&address)).is_err());
    let folders: Vec<_> = fs::read_to_string("/proc/self/mounts")
        .unwrap()
        .lines()
        .filter(|line| line.split(' ').nth(2).is_some_and(|kind| kind.starts_with("cgroup")))
        .map(|line| PathBuf::from(format!("{}{name}", line.split(' ').nth(1).unwrap())))
        .filter(|folder| folder.exists())
        .collect();
    assert!(!folders.is_empty());
    for folder in folders {
        eventually("the cgroup is empty", || fs::remove_dir(&folder).is_ok());
    }
}

#[test]
fn a_mistake_in_the_options_is_told_before_there_is_a_shim() {
    let daemon = Daemon::new();
    let bundle = daemon.bundle("a", "");
    let text = refusal(output(daemon.command(&bundle, "a", "start"), &runc_options(3, "../x")));
    assert!(text.contains("cgroup"), "{text}");
    let any = Any {
        type_url: "unknown.Options".into(),
        ..Default::default()
    };
    let text = refusal(output(
        daemon.command(&bundle, "a", "start"),
        &any.write_to_bytes().unwrap(),
    ));
    assert!(text.contains("unknown.Options"), "{text}");
    assert!(daemon.shims().is_empty());
    assert!(!bundle.join("address").exists());
}

#[test]
fn version_and_help_help() {
    let run = |flag| text(Command::new(PROGRAM).arg(flag).output().unwrap());
    assert!(run("-v").contains(env!("CARGO_PKG_VERSION")));
    let help = run("--help");
    for word in [
        "start",
        "delete",
        "-namespace",
        "-info",
        "io.containerd.proxmox-lxcri.v1",
        "TTRPC_ADDRESS",
        "/etc/proxmox-lxcri/config.toml",
    ] {
        assert!(help.contains(word), "{word}");
    }
}

#[test]
fn the_manual_names_every_flag_and_variable_of_the_help() {
    let manual = include_str!("../packaging/containerd-shim-proxmox-lxcri-v1.8").replace('\\', "");
    let help = text(Command::new(PROGRAM).arg("-h").output().unwrap());
    let named = help
        .split(|c: char| c.is_whitespace() || c == ',')
        .filter(|word| word.starts_with('-') || word.contains('_') && word.to_uppercase() == *word);
    let mut count = 0;
    for word in named.filter(|word| !["-flag", "--flag", "-flag=value", "--runtime"].contains(word)) {
        assert!(manual.contains(word), "{word}");
        count += 1;
    }
    assert!(count > 12, "{count}");
}
