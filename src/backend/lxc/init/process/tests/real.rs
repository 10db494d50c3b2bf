//! Processes that become programs; what they have become is what those write.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, IoSliceMut, Read},
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::{
            fs::{PermissionsExt, symlink},
            net::UnixStream,
        },
    },
    path::Path,
    process::{Command, Stdio},
};

use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::{
        signal::{SigHandler, SigSet, Signal, signal},
        socket::{ControlMessageOwned, MsgFlags, recvmsg},
        wait::waitpid,
    },
    unistd::{ForkResult, chroot, dup2_stderr, dup2_stdout, fork, pipe},
};

use super::*;
use crate::host::command::isolation;

fn inside(name: &str, wrapper: &[&str]) -> bool {
    isolation::inside(&format!("backend::lxc::init::process::tests::real::{name}"), wrapper)
}

/// What a forked process wrote, stderr last, and how it ended.
fn forked(body: impl FnOnce()) -> (String, i32) {
    let (read_end, write_end) = pipe().unwrap();
    // SAFETY: the child has one thread, and does what the helper does with one thread; glibc's fork keeps malloc usable.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            drop(read_end);
            dup2_stdout(&write_end).unwrap();
            dup2_stderr(&write_end).unwrap();
            drop(write_end);
            // A panic must not run the rest of the tests a second time.
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
            // SAFETY: takes an integer.
            unsafe { libc::_exit(if ended.is_ok() { 0 } else { 99 }) }
        }
        ForkResult::Parent { child } => {
            drop(write_end);
            let mut text = Vec::new();
            File::from(read_end).read_to_end(&mut text).unwrap();
            let status = match waitpid(child, None).unwrap() {
                nix::sys::wait::WaitStatus::Exited(_, status) => status,
                nix::sys::wait::WaitStatus::Signaled(_, signal, _) => 128 + signal as i32,
                other => panic!("{other:?}"),
            };
            (String::from_utf8_lossy(&text).into_owned(), status)
        }
    }
}

fn procfs_root() -> Proc {
    Proc::over(File::open("/proc").unwrap().into())
}

fn start(proc: &Proc) -> Start<'_> {
    Start {
        proc,
        constrained: false,
        keep_keyring: false,
        agent: None,
    }
}

/// Becomes the program after `before`; 77 and the error when that fails.
fn become_after(process: &Process, before: impl FnOnce()) -> (String, i32) {
    forked(|| {
        before();
        let proc = procfs_root();
        let found = process
            .find(false)
            .and_then(|program| process.label(&proc).map(|()| program));
        let error = match found {
            Ok(program) => process.exec(&program, start(&proc)),
            Err(error) => error,
        };
        let text = format!("{:?}: {error}", error.kind());
        let _ = nix::unistd::write(std::io::stdout(), text.as_bytes());
        // SAFETY: takes an integer.
        unsafe { libc::_exit(77) }
    })
}

fn become_program(process: &Process) -> (String, i32) {
    become_after(process, || {})
}

/// A process that runs a script, with all capabilities unless `more` says otherwise.
fn sh(script: &str, more: Value) -> Process {
    sh_with(script, more, None)
}

fn sh_with(script: &str, more: Value, linux: Option<Value>) -> Process {
    let mut document = json!({"args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"]});
    for (key, value) in more.as_object().unwrap() {
        document[key] = value.clone();
    }
    Process::of(&oci(document), linux.map(super::linux).as_ref()).unwrap()
}

fn written(process: &Process) -> String {
    let (text, status) = become_program(process);
    assert_eq!(status, 0, "{text}");
    text
}

/// The value of a line of /proc/self/status.
fn field<'a>(status: &'a str, name: &str) -> &'a str {
    status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"))
        .unwrap_or_else(|| panic!("no {name} in {status}"))
}

#[test]
fn a_program_has_its_user_groups_umask_folder_and_environment() {
    let dir = tempfile::tempdir().unwrap();
    let cwd = dir.path().join("only root's");
    fs::create_dir(&cwd).unwrap();
    fs::set_permissions(&cwd, fs::Permissions::from_mode(0o700)).unwrap();
    let script = "echo $(id -u) $(id -g) $(id -G); umask; pwd; tr '\\0' '\\n' </proc/$$/environ; echo $0 \"$1\"";
    let mut process = sh(
        script,
        json!({"user": {"uid": 1234, "gid": 56, "additionalGids": [7, 8], "umask": 0o27}, "cwd": cwd}),
    );
    process.args.extend(["zero".into(), "one  two".into()]);
    assert_eq!(
        written(&process),
        format!(
            "1234 56 56 7 8\n0027\n{}\nPATH=/usr/bin:/bin\nHOME=/\nzero one  two\n",
            cwd.display()
        )
    );
    let root = sh("id -G; echo $HOME", json!({}));
    assert_eq!(
        written(&root),
        "0\n/root\n",
        "no groups of the helper, the home of /etc/passwd"
    );
    let own = sh("echo $HOME", json!({"env": ["PATH=/bin", "HOME=/h"]}));
    assert_eq!(written(&own), "/h\n");
}

#[test]
fn a_working_folder_that_only_the_user_may_enter_is_entered_as_the_user() {
    let dir = tempfile::tempdir().unwrap();
    let cwd = dir.path().join("the user's");
    fs::create_dir(&cwd).unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&cwd, fs::Permissions::from_mode(0o700)).unwrap();
    std::os::unix::fs::chown(&cwd, Some(1000), None).unwrap();
    // Root without its rights over files, as on NFS.
    let squash = || {
        let without = !0b110_u64;
        capabilities::set(&Sets {
            permitted: without,
            effective: without,
            ..Sets::default()
        })
        .unwrap();
    };
    let user = sh("pwd", json!({"user": {"uid": 1000}, "cwd": cwd}));
    assert_eq!(become_after(&user, squash), (format!("{}\n", cwd.display()), 0));
    let other = sh("pwd", json!({"user": {"uid": 1001}, "cwd": cwd}));
    let text = format!("InvalidArgument: chdir `{}`: Permission denied", cwd.display());
    assert_eq!(become_after(&other, squash), (text, 77));
}

#[test]
fn a_user_may_open_its_own_stdio_again_and_devices_keep_their_owner() {
    let script = "exec </dev/null; echo again >/proc/$$/fd/1; stat -Lc '%u %g' /proc/$$/fd/1";
    let process = sh(script, json!({"user": {"uid": 1000, "gid": 56}}));
    let (text, code) = become_after(&process, || {
        nix::unistd::dup2_stdin(File::open("/dev/null").unwrap()).unwrap();
    });
    assert_eq!((text.as_str(), code), ("again\n1000 56\n", 0));
    let null = fs::metadata("/dev/null").unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&null), 0);
}

#[test]
fn a_program_has_its_five_capability_sets() {
    let sets = json!({"bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_BPF"], "permitted": ["CAP_CHOWN", "CAP_KILL"],
        "effective": ["CAP_KILL"], "inheritable": ["CAP_KILL", "CAP_CHOWN"], "ambient": ["CAP_KILL"]});
    let user = sh(
        "exec cat /proc/self/status",
        json!({"user": {"uid": 1000}, "capabilities": sets}),
    );
    let status = written(&user);
    let mask = |name| u64::from_str_radix(field(&status, name), 16).unwrap();
    // For a user the ambient ones are all that survive an exec.
    assert_eq!(
        ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"].map(mask),
        [1 | 1 << 5, 1 << 5, 1 << 5, 1 | 1 << 5 | 1 << 39, 1 << 5]
    );
    let root = sh(
        "exec cat /proc/self/status",
        json!({"capabilities": {"bounding": ["CAP_CHOWN"]}}),
    );
    let status = written(&root);
    let mask = |name| u64::from_str_radix(field(&status, name), 16).unwrap();
    // Root gets the bounding set by exec.
    assert_eq!(
        ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"].map(mask),
        [0, 1, 1, 1, 0]
    );
    let none = sh("exec cat /proc/self/status", json!({}));
    let status = written(&none);
    for name in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(&status, name), "0000000000000000", "{name}");
    }
}

#[test]
fn a_capability_that_the_helper_does_not_have_is_left_out() {
    let list = ["CAP_KILL", "CAP_SYS_TIME", "CAP_CHOWN"];
    let process = sh(
        "exec cat /proc/self/status",
        json!({"user": {"uid": 1000}, "capabilities": {"bounding": list, "permitted": list, "effective": list, "inheritable": list,
            "ambient": list}}),
    );
    let (status, code) = become_after(&process, || {
        let without = !(1_u64 << 25);
        capabilities::bound(without).unwrap();
        capabilities::set(&Sets {
            permitted: without,
            effective: without,
            ..Sets::default()
        })
        .unwrap();
    });
    assert_eq!(code, 0, "{status}");
    for name in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(&status, name), "0000000000000021", "{name}");
    }
}

#[test]
fn a_program_has_its_resource_limits_and_scheduling() {
    let process = sh(
        "cat /proc/self/limits; cat /proc/self/oom_score_adj; cut -d' ' -f19,41 /proc/self/stat; ionice -p $$; uname -m",
        json!({
            "rlimits": [
                {"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200},
                {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
                {"type": "RLIMIT_FSIZE", "soft": 1_u64 << 40, "hard": u64::MAX},
            ],
            "oomScoreAdj": 500,
            "scheduler": {"policy": "SCHED_BATCH", "nice": 7},
            "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 6},
        }),
    );
    let process = Process {
        personality: Some(8),
        ..process
    };
    let text = written(&process);
    let limit = |name: &str| -> Vec<String> {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_ascii_whitespace().take(2).map(str::to_owned).collect()
    };
    assert_eq!(limit("Max open files"), ["100", "200"]);
    assert_eq!(limit("Max core file size"), ["0", "0"]);
    assert_eq!(limit("Max file size"), ["1099511627776", "unlimited"]);
    assert!(text.contains("\n500\n7 3\nbest-effort: prio 6\n"), "{text}");
    if cfg!(target_arch = "x86_64") {
        assert!(text.ends_with("\ni686\n"), "{text}");
    }
}

#[test]
fn a_program_runs_on_its_processors_only() {
    let affinity = |list: &str| {
        let process = oci(
            json!({"args": ["cat", "/proc/self/status"], "env": ["PATH=/bin"], "execCPUAffinity": {"final": list}}),
        );
        become_program(&Process::of_exec(&process, &oci(json!({})), None).unwrap())
    };
    assert_eq!(field(&affinity("0").0, "Cpus_allowed_list"), "0");
    let (text, code) = affinity("8191");
    assert_eq!(code, 77, "{text}");
    assert!(text.starts_with("InvalidArgument: process.execCPUAffinity: "), "{text}");
}

#[test]
fn a_limit_that_cannot_be_set_is_an_error_that_names_the_field() {
    let lower = sh("true", json!({"oomScoreAdj": -900}));
    let drop_it = || {
        // As in a user namespace.
        let without = !(1_u64 << 24);
        capabilities::bound(without).unwrap();
        capabilities::set(&Sets {
            permitted: without,
            effective: without,
            ..Sets::default()
        })
        .unwrap();
    };
    let (text, code) = become_after(&lower, drop_it);
    assert_eq!(code, 77);
    assert!(
        text.starts_with("PermissionDenied: cannot set process.oomScoreAdj to -900: "),
        "{text}"
    );
    let raise = sh(
        "true",
        json!({"rlimits": [{"type": "RLIMIT_CORE", "soft": 0, "hard": 9}]}),
    );
    let (text, code) = become_after(&raise, || {
        drop_it();
        Rlimit {
            resource: libc::RLIMIT_CORE,
            soft: 0,
            hard: 0,
        }
        .set(0)
        .unwrap();
    });
    assert_eq!(code, 77);
    assert!(
        text.starts_with("PermissionDenied: cannot set process.rlimits RLIMIT_CORE to 0:9: "),
        "{text}"
    );
}

#[test]
fn limits_can_be_set_from_outside() {
    let mut sleeper = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
    let process = of(
        json!({"oomScoreAdj": 300, "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 5, "hard": 6}],
        "scheduler": {"policy": "SCHED_OTHER", "nice": 3}, "ioPriority": {"class": "IOPRIO_CLASS_IDLE", "priority": 0}}),
    );
    let pid = sleeper.id();
    process.constrain(&procfs_root(), Some(pid as libc::pid_t)).unwrap();
    let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
    let (limits, score, stat) = (read("limits"), read("oom_score_adj"), read("stat"));
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
    assert!(
        limits
            .lines()
            .any(|line| line.split_ascii_whitespace().eq("Max open files 5 6 files".split(' '))),
        "{limits}"
    );
    assert_eq!(score, "300\n");
    assert_eq!(stat.split(' ').nth(18), Some("3"));
    let other = fs::read_to_string("/proc/self/oom_score_adj").unwrap();
    assert_ne!(other, "300\n", "only that process");
}

#[test]
fn a_program_starts_with_default_signals_its_own_session_and_no_descriptor_of_the_helper() {
    let script = "cat /proc/self/status; cut -d' ' -f6 /proc/$$/stat; echo $$; ls -l /proc/$$/fd";
    let (text, code) = become_after(&sh(script, json!({})), || {
        for one in [Signal::SIGPIPE, Signal::SIGTERM, Signal::SIGCHLD] {
            // SAFETY: SIG_IGN is no handler.
            unsafe { signal(one, SigHandler::SigIgn) }.unwrap();
        }
        SigSet::all().thread_block().unwrap();
        let leaky = File::open("/dev/zero").unwrap();
        nix::fcntl::fcntl(&leaky, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
        std::mem::forget(leaky);
    });
    assert_eq!(code, 0, "{text}");
    for name in ["SigBlk", "SigIgn"] {
        assert_eq!(field(&text, name), "0000000000000000", "{name}");
    }
    let numbers: Vec<&str> = text.lines().filter(|line| line.parse::<u32>().is_ok()).collect();
    assert_eq!(numbers[0], numbers[1], "the program leads its session");
    assert!(!text.contains("/dev/zero"), "{text}");
}

#[test]
fn a_helper_cannot_be_traced_and_its_keyring_is_new() {
    let keyring = || {
        // SAFETY: KEYCTL_GET_KEYRING_ID of KEY_SPEC_SESSION_KEYRING takes integers.
        unsafe { libc::syscall(libc::SYS_keyctl, 0, -3, 0) }
    };
    let (text, code) = forked(|| {
        forbid_tracing().unwrap();
        assert_eq!(nix::sys::prctl::get_dumpable(), Ok(false));
        let before = keyring();
        exec::join_new_keyring().unwrap();
        assert!(before == -1 || keyring() != before);
    });
    assert_eq!(code, 0, "{text}");
}

/// A profile in which one call is refused.
fn denies(call: &str) -> Value {
    json!({"seccomp": {"defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": [call], "action": "SCMP_ACT_ERRNO", "errnoRet": libc::EXDEV}]}})
}

#[test]
fn a_filter_is_loaded_with_and_without_new_privileges() {
    for no_new_privileges in [false, true] {
        let process = sh_with(
            "cat /proc/self/status; mkdir /tmp/x-$$ && echo made",
            json!({"user": {"uid": 1000}, "noNewPrivileges": no_new_privileges}),
            Some(denies("mkdir")),
        );
        let (text, code) = become_program(&process);
        assert_eq!(code, 1, "{text}");
        assert_eq!(field(&text, "NoNewPrivs"), if no_new_privileges { "1" } else { "0" });
        assert_eq!(field(&text, "Seccomp"), "2");
        assert!(text.contains("Invalid cross-device link"), "{text}");
    }
}

#[test]
fn without_new_privileges_the_filter_is_the_last_thing() {
    let process = |no_new_privileges| {
        sh_with(
            "echo ran",
            json!({"user": {"uid": 1000}, "noNewPrivileges": no_new_privileges}),
            Some(denies("setresuid")),
        )
    };
    assert_eq!(written(&process(true)), "ran\n");
    let (text, code) = become_program(&process(false));
    assert_eq!(code, 77);
    assert!(text.contains("cannot set process.user.uid 1000: "), "{text}");
}

#[test]
fn a_flag_that_the_kernel_does_not_know_is_done_without() {
    let mut process = sh_with("cat /proc/self/status", json!({}), Some(denies("mkdir")));
    process.seccomp.as_mut().unwrap().flags |= 1 << 30;
    assert_eq!(field(&written(&process), "Seccomp"), "2");
}

nix::ioctl_readwrite!(notification, b'!', 0, libc::seccomp_notif);
nix::ioctl_readwrite!(answer, b'!', 1, libc::seccomp_notif_resp);

/// An agent that lets every call go on, but for `mkdir`; answers what it was sent, and how many calls it saw.
fn agent(socket: UnixStream) -> (Value, usize) {
    let mut text = [0; 4096];
    let mut iov = [IoSliceMut::new(&mut text)];
    let mut control = nix::cmsg_space!([i32; 2]);
    let message = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut iov,
        Some(&mut control),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )
    .unwrap();
    let length = message.bytes;
    let fds: Vec<i32> = message
        .cmsgs()
        .unwrap()
        .flat_map(|message| match message {
            ControlMessageOwned::ScmRights(fds) => fds,
            _ => vec![],
        })
        .collect();
    assert_eq!(fds.len(), 1);
    let state = serde_json::from_slice(&text[..length]).unwrap();
    // SAFETY: just received, nobody else's.
    let listener = unsafe { OwnedFd::from_raw_fd(fds[0]) };
    let mut seen = 0;
    loop {
        let mut polled = [nix::poll::PollFd::new(listener.as_fd(), nix::poll::PollFlags::POLLIN)];
        nix::poll::poll(&mut polled, nix::poll::PollTimeout::NONE).unwrap();
        if polled[0].revents().unwrap().contains(nix::poll::PollFlags::POLLHUP) {
            return (state, seen);
        }
        // SAFETY: plain numbers, for which zero is valid.
        let mut call: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel fills a zeroed struct seccomp_notif.
        match unsafe { notification(listener.as_raw_fd(), &mut call) } {
            Err(Errno::ENOENT | Errno::EINTR) => continue,
            other => other.unwrap(),
        };
        seen += 1;
        let refuse = i64::from(call.data.nr) == libc::SYS_mkdir || i64::from(call.data.nr) == libc::SYS_mkdirat;
        let mut word = libc::seccomp_notif_resp {
            id: call.id,
            val: 0,
            error: if refuse { -libc::EXDEV } else { 0 },
            // SECCOMP_USER_NOTIF_FLAG_CONTINUE
            flags: u32::from(!refuse),
        };
        // SAFETY: the kernel reads a struct seccomp_notif_resp.
        match unsafe { answer(listener.as_raw_fd(), &mut word) } {
            Err(Errno::ENOENT) => {}
            other => {
                other.unwrap();
            }
        }
    }
}

#[test]
fn an_agent_may_answer_every_system_call_of_the_loader() {
    for (no_new_privileges, flags) in [
        (true, json!([])),
        (false, json!([])),
        (true, json!(["SECCOMP_FILTER_FLAG_TSYNC"])),
    ] {
        let process = sh_with(
            "mkdir /tmp/x-$$",
            json!({"user": {"uid": 1000}, "noNewPrivileges": no_new_privileges}),
            Some(json!({"seccomp": {"defaultAction": "SCMP_ACT_NOTIFY", "listenerPath": "/l", "flags": flags}})),
        );
        let (ours, theirs) = UnixStream::pair().unwrap();
        let waits = std::thread::spawn(move || agent(ours));
        let (text, code) = forked(|| {
            // The other end, which this process has a copy of.
            let proc = procfs_root();
            let message = agent_message(None, 5, &json!({}));
            let start = Start {
                agent: Some(Agent {
                    socket: theirs.try_clone().unwrap().into(),
                    message,
                }),
                ..start(&proc)
            };
            let program = process.find(false).unwrap();
            panic!("{}", process.exec(&program, start));
        });
        drop(theirs);
        let (state, seen) = waits.join().unwrap();
        assert_eq!(code, 1, "{text}");
        assert!(text.contains("Invalid cross-device link"), "{text}");
        assert_eq!(state["fds"], json!(["seccompFd"]));
        assert!(seen > 20, "{seen}");
    }
}

#[test]
fn a_loader_with_a_real_time_policy_does_not_keep_its_second_thread_from_running() {
    let process = sh_with(
        "mkdir /tmp/x-$$",
        json!({"scheduler": {"policy": "SCHED_FIFO", "priority": 50}}),
        Some(
            json!({"seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/l",
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_NOTIFY"}]}}),
        ),
    );
    let (ours, theirs) = UnixStream::pair().unwrap();
    let waits = std::thread::spawn(move || agent(ours));
    let (text, code) = forked(|| {
        let proc = procfs_root();
        set_cpus(0, &[(0, 0)]).unwrap();
        // Where the cgroup has no real-time budget this is refused, and the rest of the test is as good as the others.
        let _ = process.constrain(&proc, None);
        let start = Start {
            constrained: true,
            agent: Some(Agent {
                socket: theirs.try_clone().unwrap().into(),
                message: "{}".into(),
            }),
            ..start(&proc)
        };
        let program = process.find(false).unwrap();
        panic!("{}", process.exec(&program, start));
    });
    drop(theirs);
    let (_, seen) = waits.join().unwrap();
    assert_eq!((code, seen), (1, 1), "{text}");
}

#[test]
fn a_listener_without_an_agent_is_an_error_before_anything_is_done() {
    let process = sh_with(
        "true",
        json!({}),
        Some(json!({"seccomp": {"defaultAction": "SCMP_ACT_NOTIFY", "listenerPath": "/l"}})),
    );
    let (text, code) = become_program(&process);
    assert_eq!(code, 77);
    assert_eq!(
        text,
        "FailedPrecondition: linux.seccomp.listenerPath: nobody has connected to /l"
    );
}

#[test]
fn an_agent_that_has_gone_is_an_error() {
    let process = sh_with(
        "true",
        json!({}),
        Some(
            json!({"seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/l",
            "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]}}),
        ),
    );
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(ours);
    let (text, _) = forked(|| {
        let proc = procfs_root();
        let start = Start {
            agent: Some(Agent {
                socket: theirs.into(),
                message: "{}".into(),
            }),
            ..start(&proc)
        };
        let program = process.find(false).unwrap();
        let text = process.exec(&program, start).to_string();
        let _ = nix::unistd::write(std::io::stdout(), text.as_bytes());
    });
    assert!(
        text.starts_with("cannot send the seccomp listener to linux.seccomp.listenerPath: "),
        "{text}"
    );
}

#[test]
fn where_a_user_namespace_denies_groups_they_are_left_as_they_are() {
    if !inside(
        "where_a_user_namespace_denies_groups_they_are_left_as_they_are",
        &["unshare", "--user", "--map-root-user"],
    ) {
        return;
    }
    assert_eq!(written(&sh("id -u", json!({"user": {"additionalGids": [4]}}))), "0\n");
}

#[test]
fn a_missing_or_unfit_program_is_told_in_the_words_of_the_crun_backend() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("plain"), "").unwrap();
    fs::create_dir(path("bin")).unwrap();
    fs::create_dir(path("bin/folder")).unwrap();
    fs::write(path("bin/plain"), "").unwrap();
    fs::write(path("file"), "").unwrap();
    symlink("nowhere", path("dangling")).unwrap();
    let none = |name: &str| format!("exec: {name:?}: executable file not found in $PATH: no such file or directory");
    for (name, text) in [
        ("nosuch", none("nosuch")),
        ("", none("")),
        (path("nosuch").as_str(), none(&path("nosuch"))),
        (path("file/x").as_str(), none(&path("file/x"))),
        (path("dangling").as_str(), none(&path("dangling"))),
        ("./nosuch", none("./nosuch")),
        (
            path("bin").as_str(),
            format!(
                "the path `{}` is not a regular file: Operation not permitted: the program is not an executable file",
                path("bin")
            ),
        ),
        (
            "folder",
            format!(
                "the path `{}` is not a regular file: Operation not permitted: the program is not an executable file",
                path("bin/folder")
            ),
        ),
        (
            path("plain").as_str(),
            "open executable: Permission denied: the program is not an executable file".into(),
        ),
        (
            "plain",
            "open executable: Permission denied: the program is not an executable file".into(),
        ),
    ] {
        let process = of(json!({"args": [name], "env": [format!("PATH=/nosuch:{}:/bin", path("bin"))]}));
        let error = process.find(false).unwrap_err();
        assert_eq!((error.kind(), error.to_string()), (Kind::InvalidArgument, text));
    }
    let without = of(json!({"args": ["sh"]}));
    assert_eq!(without.find(false).unwrap_err().to_string(), none("sh"));
}

#[test]
fn a_program_is_found_as_execvp_finds_it() {
    let dir = tempfile::tempdir().unwrap();
    let script = |name: &str, mode| {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, "#!/bin/sh\n").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    };
    let (_, second, here) = (script("a/x", 0o644), script("b/x", 0o755), script("y", 0o755));
    let find = |name: &str, path: &str| {
        of(json!({"args": [name], "cwd": dir.path(), "env": [format!("PATH={path}")]}))
            .find(false)
            .map(|program| program.path)
    };
    let path = format!("{0}/a:{0}/b", dir.path().display());
    assert_eq!(find("x", &path).unwrap(), second, "past one that is not executable");
    assert_eq!(
        find("y", "/nosuch:").unwrap(),
        here,
        "an empty element is the working folder"
    );
    assert_eq!(find("x", "b").unwrap(), second, "a relative one starts there");
    assert_eq!(find("b/x", "/bin").unwrap(), second);
    assert_eq!(find("./y", "/bin").unwrap(), dir.path().join("./y"));
}

#[test]
fn a_working_folder_is_made_for_init_only() {
    let dir = tempfile::tempdir().unwrap();
    let cwd = dir.path().join("a/b");
    let process = of(json!({"args": ["/bin/true"], "cwd": cwd}));
    let error = process.find(false).unwrap_err();
    assert_eq!(
        (error.kind(), error.to_string()),
        (
            Kind::InvalidArgument,
            format!("chdir `{}`: No such file or directory", cwd.display())
        )
    );
    process.find(true).unwrap();
    assert!(cwd.is_dir());
    fs::write(dir.path().join("file"), "").unwrap();
    let process = of(json!({"args": ["/bin/true"], "cwd": dir.path().join("file")}));
    let text = process.find(true).unwrap_err().to_string();
    assert!(text.ends_with("/file`: Not a directory"), "{text}");
}

#[test]
fn an_exec_that_fails_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str, mode| {
        let path = dir.path().join(name);
        // Not by this process: what another test forks meanwhile would hold it open, and a file that is written is not executed.
        let write = ["-c", "printf '%s' \"$1\" >\"$0\""];
        let written = std::process::Command::new("sh")
            .args(write)
            .arg(&path)
            .arg(text)
            .status();
        assert!(written.unwrap().success());
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    };
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    for (path, word) in [
        (
            file("no-interpreter", "#!/nosuch\n", 0o755),
            " (missing dynamic library?) `PATH`: No such file or directory",
        ),
        (file("text", "hello\n", 0o755), " `PATH`: Exec format error"),
        (file("roots", "#!/bin/sh\n", 0o700), " `PATH`: Permission denied"),
    ] {
        let process = of(json!({"args": [path], "user": {"uid": 1000}}));
        let word = word.replace("PATH", path.to_str().unwrap());
        assert_eq!(
            become_program(&process),
            (format!("InvalidArgument: exec container process{word}"), 77)
        );
    }
}

#[test]
fn a_working_folder_outside_of_the_root_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let process = of(json!({"args": ["/x"], "cwd": "/proc/self/fd/200"}));
    let (text, code) = forked(|| {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(
            None::<&str>,
            "/",
            None::<&str>,
            MsFlags::MS_REC | MsFlags::MS_PRIVATE,
            None::<&str>,
        )
        .unwrap();
        let root = dir.path();
        fs::create_dir(root.join("proc")).unwrap();
        mount(
            Some("/proc"),
            &root.join("proc"),
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
        .unwrap();
        let leaked = File::open("/etc").unwrap();
        // SAFETY: 200 is nobody's.
        assert_eq!(unsafe { libc::dup2(leaked.as_raw_fd(), 200) }, 200);
        chroot(root).unwrap();
        let proc = procfs_root();
        let error = process.exec(&Program { path: "/x".into() }, start(&proc));
        let _ = nix::unistd::write(std::io::stdout(), error.to_string().as_bytes());
    });
    assert_eq!(
        (text.as_str(), code),
        ("process.cwd: /proc/self/fd/200 is outside of the container's root", 0)
    );
}

#[test]
fn a_false_procfs_is_not_written_to() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("self")).unwrap();
    let file = dir.path().join("self/oom_score_adj");
    fs::write(&file, "0").unwrap();
    let proc = Proc::over(File::open(dir.path()).unwrap().into());
    let error = of(json!({"oomScoreAdj": 9})).constrain(&proc, None).unwrap_err();
    assert!(
        error.to_string().starts_with("cannot set process.oomScoreAdj to 9: "),
        "{error}"
    );
    assert_eq!(fs::read_to_string(&file).unwrap(), "0");
}

/// As a container may mount it on its own `/proc`: the profile cannot be set, and must not be forgotten.
#[test]
fn a_procfs_of_another_pid_namespace_hides_no_apparmor() {
    let mut other = Command::new("unshare")
        .args([
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "sh",
            "-c",
            "echo mounted; exec sleep 1000",
        ])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(other.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert_eq!(line, "mounted\n");
    let proc = Proc::over(File::open(format!("/proc/{}/root/proc", other.id())).unwrap().into());
    let labelled = sh("true", json!({"apparmorProfile": "p"})).label(&proc);
    other.kill().unwrap();
    other.wait().unwrap();
    let error = labelled.unwrap_err();
    assert_eq!(error.kind(), Kind::InvalidArgument);
    assert!(
        error.to_string().contains("cannot set process.apparmorProfile \"p\""),
        "{error}"
    );
}

#[test]
fn a_label_of_a_security_module_that_is_not_there_has_no_effect() {
    let apparmor = sh("echo ran", json!({"apparmorProfile": "proxmox-lxcri-no-such-profile"}));
    if fs::read("/proc/self/attr/apparmor/current").is_ok() {
        let (text, code) = become_program(&apparmor);
        assert_eq!(code, 77, "{text}");
        assert!(text.starts_with("InvalidArgument: "), "{text}");
    } else {
        assert_eq!(written(&apparmor), "ran\n");
    }
    if !Path::new("/sys/fs/selinux").exists() {
        assert_eq!(written(&sh("echo ran", json!({"selinuxLabel": "a:b:c:d"}))), "ran\n");
    }
}
