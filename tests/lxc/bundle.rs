//! What a bundle asks of an LXC container.

use std::{
    io::{IoSliceMut, Read},
    os::{
        fd::{AsFd, AsRawFd},
        unix::net::{UnixListener, UnixStream},
    },
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{ControlMessageOwned, MsgFlags, recvmsg},
};
use serde_json::Value;

use super::{
    support::{pod::BOUND, skip::skip},
    tracer::Tracer,
    *,
};

/// What `script` prints as init and as an exec of one container; `more` are options.
async fn says_twice(daemon: &Daemon, more: &str, script: &str, change: impl Fn(&mut Bundle)) -> [String; 2] {
    let (mut pod, mut a) = pod(daemon, &shell(&format!("{script}\n: >/ready; exec sleep 100000"))).await;
    pod.options = Some(options(&format!("backend = \"{BACKEND}\"\n{more}")));
    change(&mut a);
    let texts = both_say(&pod, &a, script).await;
    pod.shutdown().await;
    fs::remove_dir_all(&a.path).unwrap();
    texts
}

/// The same of a bundle whose init runs `script` and then makes the file `/ready`.
async fn both_say(pod: &Pod, a: &Bundle, script: &str) -> [String; 2] {
    // For a root of another user namespace to tell that it is ready.
    fs::set_permissions(a.path.join("upper"), fs::Permissions::from_mode(0o777)).unwrap();
    let io = Io::fifos(&a.path, "init");
    let stdout = io.read_stdout();
    pod.run(a, &io).await;
    appears(&a.path.join("upper/ready")).await;
    let mut spec = a.spec["process"].clone();
    spec["args"] = json!(shell(script));
    let (_, of_exec) = pod.exec_says(a, "e1", &spec).await;
    pod.end(&a.id).await;
    [stdout.text().await, of_exec]
}

#[track_caller]
fn both_are(texts: [String; 2], expected: &str) {
    for (who, text) in ["init", "exec"].iter().zip(texts) {
        assert_eq!(text, expected, "{who}");
    }
}

fn may(a: &mut Bundle, capability: &str) {
    for set in ["bounding", "effective", "permitted"] {
        let set = a.spec["process"]["capabilities"][set].as_array_mut().unwrap();
        set.push(capability.into());
    }
}

fn new_namespace(a: &mut Bundle, kind: &str) {
    let namespaces = a.spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.push(json!({"type": kind}));
}

// ---- seccomp ---------------------------------------------------------------------------------------------------------------------

/// A profile in which making a folder is `action`.
fn mkdir_is(action: &str) -> Value {
    json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir", "mkdirat"], "action": action}]})
}

#[test]
fn a_seccomp_profile_and_a_personality_hold_in_init_and_in_an_exec() {
    lxc(async |daemon| {
        let script = "mkdir /tmp/made 2>&1; uname -m; test -e /tmp/made || echo none";
        let texts = says_twice(daemon, "", script, |a| {
            let mut profile = mkdir_is("SCMP_ACT_ERRNO");
            profile["syscalls"][0]["errnoRet"] = libc::EXDEV.into();
            a.spec["linux"]["seccomp"] = profile;
            a.spec["linux"]["personality"] = json!({"domain": "LINUX32"});
        })
        .await;
        let machine = if cfg!(target_arch = "x86_64") { "i686" } else { "armv8l" };
        let refusal = "mkdir: can't create directory '/tmp/made': Invalid cross-device link";
        both_are(texts, &format!("{refusal}\n{machine}\nnone\n"));
    });
}

nix::ioctl_readwrite!(notification, b'!', 0, libc::seccomp_notif);
nix::ioctl_readwrite!(answer, b'!', 1, libc::seccomp_notif_resp);

fn becomes_readable(file: &impl AsFd) {
    let mut polled = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
    let bound = PollTimeout::try_from(*BOUND).unwrap();
    assert_eq!(poll(&mut polled, bound), Ok(1), "nothing to read");
    // Who has written may have gone since.
    assert!(polled[0].revents().unwrap().contains(PollFlags::POLLIN));
}

/// An agent of one process, of which it refuses the first call that it is asked about; what it was sent, and the pid of who called.
fn agent(listener: &UnixListener) -> (Value, u32) {
    becomes_readable(listener);
    let (socket, _) = listener.accept().unwrap();
    becomes_readable(&socket);
    let (text, filter) = container_process_state(&socket);
    becomes_readable(&filter);
    // SAFETY: plain numbers, for which zero is valid; the kernel fills a zeroed struct seccomp_notif.
    let call = unsafe {
        let mut call: libc::seccomp_notif = std::mem::zeroed();
        notification(filter.as_raw_fd(), &mut call).unwrap();
        call
    };
    let mut word = libc::seccomp_notif_resp {
        id: call.id,
        val: 0,
        error: -libc::EMLINK,
        flags: 0,
    };
    // SAFETY: the kernel reads a struct seccomp_notif_resp.
    unsafe { answer(filter.as_raw_fd(), &mut word) }.unwrap();
    (serde_json::from_slice(&text).unwrap(), call.pid)
}

/// The message to its end, and the descriptor that came with its first byte.
fn container_process_state(mut socket: &UnixStream) -> (Vec<u8>, OwnedFd) {
    let mut text = vec![0; 4096];
    let mut parts = [IoSliceMut::new(&mut text)];
    let mut control = nix::cmsg_space!([i32; 2]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags).unwrap();
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
    // SAFETY: just received, nobody else's.
    let filter = unsafe { OwnedFd::from_raw_fd(fds[0]) };
    text.truncate(length);
    socket.set_read_timeout(Some(*BOUND)).unwrap();
    socket.read_to_end(&mut text).unwrap();
    (text, filter)
}

/// OCI runtime.md, "Container Process State", and what its seccomp listener is for.
#[test]
fn the_agent_at_listener_path_is_told_of_each_process_and_answers_its_calls() {
    lxc(async |daemon| {
        let path = daemon.folder.join("agent.sock");
        let listener = std::sync::Arc::new(UnixListener::bind(&path).unwrap());
        let agent = || {
            let listener = listener.clone();
            tokio::task::spawn_blocking(move || agent(&listener))
        };
        let (pod, mut a) = pod(daemon, &shell("mkdir /made 2>&1; : >/ready; exec sleep 100000")).await;
        let mut profile = mkdir_is("SCMP_ACT_NOTIFY");
        profile["listenerPath"] = path.to_str().unwrap().into();
        profile["listenerMetadata"] = "of the test".into();
        a.spec["linux"]["seccomp"] = profile;
        a.spec["annotations"] = json!({"colour": "blue"});
        let refused = "mkdir: can't create directory '/made': Too many links\n";
        let state = |process: u32, status: &str, init: u32| {
            json!({
                "ociVersion": "1.0.2",
                "fds": ["seccompFd"],
                "pid": process,
                "metadata": "of the test",
                "state": {
                    "ociVersion": "1.0.2", "id": "a", "status": status, "pid": init,
                    "bundle": a.path.to_str().unwrap(), "annotations": {"colour": "blue"},
                },
            })
        };

        let told = agent();
        let io = Io::fifos(&a.path, "init");
        let stdout = io.read_stdout();
        let init = pod.run(&a, &io).await;
        let (message, _) = told.await.unwrap();
        assert_eq!(message, state(init, "created", init));
        appears(&a.path.join("upper/ready")).await;

        let told = agent();
        let exec = Io::fifos(&a.path, "e1");
        let output = exec.read_stderr();
        pod.exec("a", "e1", &process(&["mkdir", "/made"]), &exec).await.unwrap();
        let pid = pod.start_process("a", "e1").await.unwrap();
        let (message, caller) = told.await.unwrap();
        assert_eq!(message, state(pid, "running", init));
        assert_eq!(caller, pid);
        assert_eq!(pod.wait("a", "e1").await.unwrap(), 1);
        assert_eq!(output.text().await, refused);
        pod.delete("a", "e1").await.unwrap();
        pod.end("a").await;
        assert_eq!(stdout.text().await, refused);
        assert!(!a.path.join("upper/made").exists());

        // Nobody is there to ask.
        fs::remove_file(&path).unwrap();
        let refusal = pod.create(&a, &Io::none()).await.unwrap_err();
        let text = "linux.seccomp.listenerPath: cannot reach the agent at";
        assert!(refusal.text.contains(text), "{}", refusal.text);
        pod.shutdown().await;
    });
}

// ---- hooks -----------------------------------------------------------------------------------------------------------------------

/// OCI config.md, "POSIX-platform Hooks", and runtime.md, "State".
#[test]
fn each_kind_of_hook_runs_in_its_turn_and_place_and_is_told_the_state_of_then() {
    lxc(async |daemon| {
        const KINDS: [&str; 6] = [
            "prestart",
            "createRuntime",
            "createContainer",
            "startContainer",
            "poststart",
            "poststop",
        ];
        let (pod, mut a) = pod(daemon, &shell("echo program >>/log/order; exec sleep 100000")).await;
        let log = a.path.join("log.d");
        fs::create_dir(&log).unwrap();
        let mounts = a.spec["mounts"].as_array_mut().unwrap();
        mounts.push(json!({"destination": "/log", "type": "bind", "source": log, "options": ["rbind", "rw"]}));
        a.spec["annotations"] = json!({"colour": "blue"});
        for kind in KINDS {
            let own = log.display().to_string();
            let below = a.path.join("rootfs/log").display().to_string();
            let (to, more) = match kind {
                // The host's files, and the container's mounts below its root file system.
                "createContainer" => (own, format!("test -e {below}/order && test ! -e /log")),
                "startContainer" => ("/log".into(), format!("test ! -e {}", a.path.display())),
                _ => (own, format!("test ! -e {below}/order && test ! -e /log")),
            };
            let script = format!("cat >{to}/{kind} && echo {kind} >>{to}/order && {more}");
            a.spec["hooks"][kind] = json!([
                {"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"]},
                {"path": "/bin/sh", "args": ["sh", "-c", format!("echo {kind} again >>{to}/order")]},
            ]);
        }
        let order = || fs::read_to_string(log.join("order")).unwrap();
        let twice = |kinds: &[&str]| -> String { kinds.iter().map(|kind| format!("{kind}\n{kind} again\n")).collect() };
        let pid = pod.create(&a, &Io::none()).await.unwrap();
        assert_eq!(order(), twice(&KINDS[..3]));
        pod.start_process("a", "").await.unwrap();
        // The program runs beside the hooks from then on.
        until("the program", || order().contains("program\n").then_some(())).await;
        assert_eq!(order().replace("program\n", ""), twice(&KINDS[..5]));
        assert!(order().starts_with(&twice(&KINDS[..4])), "{}", order());
        pod.end("a").await;
        assert_eq!(order().replace("program\n", ""), twice(&KINDS));
        let pids = [Some(pid), Some(pid), Some(1), Some(1), Some(pid), None];
        let statuses = ["creating", "creating", "creating", "created", "running", "stopped"];
        for ((kind, pid), status) in KINDS.iter().zip(pids).zip(statuses) {
            let state: Value = serde_json::from_slice(&fs::read(log.join(kind)).unwrap()).unwrap();
            let mut expected = json!({
                "ociVersion": "1.0.2", "id": "a", "status": status, "bundle": a.path, "annotations": {"colour": "blue"},
            });
            if let Some(pid) = pid {
                expected["pid"] = pid.into();
            }
            assert_eq!(state, expected, "{kind}");
        }
        pod.shutdown().await;
    });
}

/// OCI runtime.md 1.0.2, "Lifecycle": what fails after the program was started is a warning in the log.
#[test]
fn a_hook_that_fails_ends_a_container_that_does_not_run_yet_and_no_other() {
    lxc(async |daemon| {
        let (pod, mut a) = pod(daemon, &FOREVER).await;
        let fails = json!([{"path": "/bin/sh", "args": ["sh", "-c", "echo no luck >&2; exit 3"]}]);
        for kind in ["prestart", "createRuntime", "createContainer"] {
            a.spec["hooks"] = json!({kind: fails});
            let answer = pod.create(&a, &Io::none()).await;
            let text = format!("hook {kind}[0] /bin/sh: exit status 3: no luck");
            refused(answer, Code::UNKNOWN, &text);
            refused(pod.state("a", "").await, Code::NOT_FOUND, "container not created");
        }
        a.spec["hooks"] = json!({"startContainer": fails});
        pod.create(&a, &Io::none()).await.unwrap();
        let text = "hook startContainer[0] /bin/sh: exit status 3: no luck";
        refused(pod.start_process("a", "").await, Code::UNKNOWN, text);
        pod.wait("a", "").await.unwrap();
        pod.delete("a", "").await.unwrap();
        a.spec["hooks"] = json!({"poststart": fails, "poststop": fails});
        pod.run(&a, &Io::none()).await;
        pod.end("a").await;
        let log = pod.shutdown().await;
        for kind in ["poststart", "poststop"] {
            let line = format!("hook {kind}[0] /bin/sh: exit status 3: no luck");
            assert!(log.contains(&line), "{log}");
        }
    });
}

// ---- namespaces ------------------------------------------------------------------------------------------------------------------

#[test]
fn a_domainname_and_sysctls_are_the_containers_own() {
    lxc(async |daemon| {
        let files = "/proc/sys/kernel/domainname /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/msgmax";
        let of_host = || {
            files
                .split(' ')
                .map(|file| fs::read_to_string(file).unwrap())
                .collect::<String>()
        };
        let before = of_host();
        let texts = says_twice(daemon, "", &format!("cat {files}"), |a| {
            a.spec["domainname"] = "home.example".into();
            a.spec["linux"]["sysctl"] = json!({"net.ipv4.ip_unprivileged_port_start": "81", "kernel.msgmax": "9001"});
        })
        .await;
        both_are(texts, "home.example\n81\n9001\n");
        assert_eq!(of_host(), before);
    });
}

/// Whether this process has CAP_SYS_RESOURCE.
fn may_exceed_limits() -> bool {
    const SYS_RESOURCE: u32 = 24;
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let set = status.lines().find_map(|line| line.strip_prefix("CapEff:\t")).unwrap();
    u64::from_str_radix(set, 16).unwrap() & 1 << SYS_RESOURCE != 0
}

/// Nobody may do so in a user namespace, where root is nobody of the host's.
#[test]
fn a_user_namespace_does_not_keep_limits_and_oom_scores_from_being_set() {
    lxc(async |daemon| {
        const OWN_LIMIT: u64 = 5000;
        // Without the capability the shim can do no more than init could by itself.
        let (limit, score) = if may_exceed_limits() { (6000, -7) } else { (4000, 700) };
        let script = "grep -o 'Max open files.*files' /proc/self/limits | tr -s ' '; cat /proc/self/oom_score_adj /proc/self/uid_map | tr -s ' '";
        let (pod, mut a) = pod(daemon, &shell(&format!("{script}\n: >/ready; exec sleep 100000"))).await;
        let own = libc::rlimit64 {
            rlim_cur: OWN_LIMIT,
            rlim_max: OWN_LIMIT,
        };
        // SAFETY: a live local; the old limit is not asked for.
        let set = unsafe { libc::prlimit64(pod.pid.cast_signed(), libc::RLIMIT_NOFILE, &own, std::ptr::null_mut()) };
        assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
        new_namespace(&mut a, "user");
        let ids = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        a.spec["linux"]["uidMappings"] = ids.clone();
        a.spec["linux"]["gidMappings"] = ids;
        a.spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": limit - 1, "hard": limit}]);
        a.spec["process"]["oomScoreAdj"] = score.into();
        let texts = both_say(&pod, &a, script).await;
        let expected = format!("Max open files {} {limit} files\n{score}\n 0 100000 65536\n", limit - 1);
        both_are(texts, &expected);
        pod.shutdown().await;
    });
}

#[test]
fn a_time_namespace_has_the_offsets_of_the_bundle() {
    lxc(async |daemon| {
        let day = 86_400;
        let set = |a: &mut Bundle| {
            new_namespace(a, "time");
            a.spec["linux"]["timeOffsets"] = json!({
                "boottime": {"secs": 400 * day},
                "monotonic": {"nanosecs": 5},
            });
        };
        if !Path::new("/proc/self/ns/time").exists() {
            let (pod, mut a) = pod(daemon, &FOREVER).await;
            set(&mut a);
            let text = "linux.namespaces: this kernel has no time namespaces";
            refused(pod.create(&a, &Io::none()).await, Code::INVALID_ARGUMENT, text);
            pod.shutdown().await;
            return;
        }
        let script = "tr -s ' ' </proc/self/timens_offsets; cut -d . -f 1 /proc/uptime";
        for text in says_twice(daemon, "", script, set).await {
            let lines: Vec<_> = text.lines().collect();
            assert_eq!(lines[..2], ["monotonic 0 5", "boottime 34560000 0"]);
            let uptime = lines[2].parse::<i64>().unwrap();
            assert!(uptime >= 400 * day, "{uptime}");
        }
    });
}

// ---- devices ---------------------------------------------------------------------------------------------------------------------

#[test]
fn a_device_that_no_rule_allows_can_be_made_and_not_opened() {
    lxc(async |daemon| {
        // /dev/mem; the kernel's log, which whoever is root may open for writing; /dev/null.
        let script =
            "for n in 1 11 3; do test -e /dev/d$n || mknod /dev/d$n c 1 $n; (: >/dev/d$n) 2>&1 && echo $n; done";
        for (rules, log) in [
            (
                json!([{"allow": false, "access": "rwm"}]),
                "sh: can't create /dev/d11: Operation not permitted",
            ),
            (
                json!([{"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "major": 1, "minor": 11, "access": "rw"}]),
                "11",
            ),
        ] {
            let texts = says_twice(daemon, "", script, |a| {
                may(a, "CAP_MKNOD");
                a.spec["linux"]["resources"]["devices"] = rules.clone();
            })
            .await;
            both_are(
                texts,
                &format!("sh: can't create /dev/d1: Operation not permitted\n{log}\n3\n"),
            );
        }
    });
}

// ---- paths -----------------------------------------------------------------------------------------------------------------------

#[test]
fn a_path_may_have_blanks_in_it() {
    lxc(async |daemon| {
        let folder = daemon.folder.clone();
        daemon.folder = folder.join("two words");
        fs::create_dir(&daemon.folder).unwrap();
        let mut a = daemon.bundle(
            "a",
            &shell("cat '/in side/of it/file'; pwd; : >/ready; exec sleep 100000"),
        );
        daemon.folder = folder;
        let source = a.path.join("out side");
        fs::create_dir(&source).unwrap();
        fs::write(source.join("file"), "found\n").unwrap();
        let mounts = a.spec["mounts"].as_array_mut().unwrap();
        let options_of_it = json!(["rbind", "ro"]);
        mounts
            .push(json!({"destination": "/in side/of it", "type": "bind", "source": source, "options": options_of_it}));
        a.spec["process"]["cwd"] = "/in side".into();
        let lxc_path = daemon.folder.join("LXC's containers");
        let mut pod = Pod::start(daemon, &a).await;
        let text = lxc_path.to_str().unwrap();
        pod.options = Some(options(&format!("backend = \"{BACKEND}\"\nlxc_path = \"{text}\"")));
        let texts = both_say(&pod, &a, "cat '/in side/of it/file'; pwd").await;
        both_are(texts, "found\n/in side\n");
        pod.run(&a, &Io::none()).await;
        // `lxc-ls --active` goes by /proc/net/unix, where it takes a blank for the end of a path.
        assert_eq!(tool("lxc-info", &["-P", text, "-n", "a", "-sH"]).await, "RUNNING\n");
        pod.end("a").await;
        assert_eq!(fs::read_dir(&lxc_path).map_or(0, Iterator::count), 0);
        pod.shutdown().await;
        remove_locks_of(&lxc_path);
    });
}

// ---- processors ------------------------------------------------------------------------------------------------------------------

/// The processors that this process may use, from "0-2,7".
fn processors() -> Vec<u32> {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let list = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:\t"))
        .unwrap();
    list.split(',')
        .flat_map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            first.parse().unwrap()..=last.parse().unwrap()
        })
        .collect()
}

#[test]
fn an_exec_that_asks_for_processors_that_are_not_there_is_refused() {
    lxc(async |daemon| {
        let (pod, a) = pod(daemon, &FOREVER).await;
        pod.run(&a, &Io::none()).await;
        for field in ["initial", "final"] {
            let mut spec = process(&["true"]);
            spec["execCPUAffinity"] = json!({field: "8191"});
            pod.exec("a", field, &spec, &Io::none()).await.unwrap();
            let text = "process.execCPUAffinity: the container may use none of the processors";
            refused(pod.start_process("a", field).await, Code::INVALID_ARGUMENT, text);
            pod.delete("a", field).await.unwrap();
        }
        pod.end("a").await;
        pod.shutdown().await;
    });
}

#[test]
fn an_exec_runs_on_the_processors_that_it_asks_for() {
    let processors = processors();
    let [one, other, ..] = processors[..] else {
        return skip(
            "lxc::bundle::an_exec_runs_on_the_processors_that_it_asks_for",
            "this machine has one processor",
        );
    };
    lxc(async |daemon| {
        let (pod, a) = pod(daemon, &FOREVER).await;
        pod.run(&a, &Io::none()).await;
        for (exec, initial, last) in [("e1", one, other), ("e2", other, one)] {
            let mut spec = process(&["grep", "Cpus_allowed_list", "/proc/self/status"]);
            spec["execCPUAffinity"] = json!({"initial": initial.to_string(), "final": last.to_string()});
            let (_, text) = pod.exec_says(&a, exec, &spec).await;
            assert_eq!(text, format!("Cpus_allowed_list:\t{last}\n"));
        }
        pod.end("a").await;
        pod.shutdown().await;
    });
}

// ---- a liblxc that is too old ----------------------------------------------------------------------------------------------------

/// The machine's liblxc, in the words of a version 4.
fn old_liblxc(loaded_by: u32, version: &str, copy: &Path) -> String {
    let maps = fs::read_to_string(format!("/proc/{loaded_by}/maps")).unwrap();
    let path = maps.lines().filter_map(|line| Some(&line[line.find('/')?..]));
    let path = path.into_iter().find(|path| path.contains("/liblxc.so.1")).unwrap();
    let mut library = fs::read(path).unwrap();
    let old = format!("4{}", &version[1..]);
    let text = [version.as_bytes(), b"\0"].concat();
    let mut found = 0;
    for at in 0..library.len() - text.len() {
        if library[at..].starts_with(&text) {
            library[at] = b'4';
            found += 1;
        }
    }
    assert!(found > 0, "{path} does not hold its version, {version}");
    fs::write(copy, library).unwrap();
    old
}

#[test]
fn a_liblxc_that_is_too_old_is_told_by_its_version_and_hinders_no_other_backend() {
    lxc(async |daemon| {
        let copy = daemon.folder.join("liblxc.so.1");
        let version = tool("lxc-info", &["--version"]).await;
        let (first, a) = pod(daemon, &FOREVER).await;
        first.run(&a, &Io::none()).await;
        let old = old_liblxc(monitor("a"), version.trim(), &copy);
        first.end("a").await;
        first.shutdown().await;
        fs::remove_dir_all(&a.path).unwrap();

        let a = daemon.bundle("a", &shell("echo fine"));
        let start = Start {
            env: BTreeMap::from([("PROXMOX_LXCRI_LIBLXC".into(), copy.display().to_string())]),
            ..Start::default()
        };
        let mut pod = Pod::start_with(daemon, &a, &start).await;
        pod.options = on(BACKEND);
        let answer = pod.create(&a, &Io::none()).await;
        refused(answer, Code::FAILED_PRECONDITION, &format!("liblxc {old} is too old"));
        refused(pod.state("a", "").await, Code::NOT_FOUND, "container not created");
        pod.options = on("crun");
        runs(&pod, &a).await;
        pod.shutdown().await;
    });
}

// ---- options ---------------------------------------------------------------------------------------------------------------------

/// Makes a key that only who has this thread's session keyring, which is a new one, can see.
fn key_of_this_session(name: &std::ffi::CStr) {
    const JOIN_SESSION_KEYRING: i32 = 1;
    const SETPERM: i32 = 5;
    const SESSION_KEYRING: i32 = -3;
    const POSSESSOR_ALL: i32 = 0x3f00_0000;
    // SAFETY: integers, C strings, and one byte of a live one.
    unsafe {
        let none = std::ptr::null::<libc::c_char>();
        assert!(libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, none) > 0);
        let (kind, content) = (c"user".as_ptr(), c"x".as_ptr());
        let key = libc::syscall(libc::SYS_add_key, kind, name.as_ptr(), content, 1, SESSION_KEYRING);
        assert!(key > 0, "{}", std::io::Error::last_os_error());
        assert_eq!(libc::syscall(libc::SYS_keyctl, SETPERM, key, POSSESSOR_ALL), 0);
    }
}

#[test]
fn a_container_has_a_session_keyring_of_its_own_unless_no_new_keyring_is_set() {
    lxc(async |daemon| {
        // What this thread starts, shims among it, has its keyring.
        key_of_this_session(c"lxcri-test-key");
        let script = "grep -c lxcri-test-key /proc/keys";
        for (option, seen) in [("no_new_keyring = false", "0\n"), ("no_new_keyring = true", "1\n")] {
            both_are(says_twice(daemon, option, script, |_| {}).await, seen);
        }
    });
}

#[test]
fn a_container_pivots_to_its_root_unless_no_pivot_root_is_set() {
    lxc(async |daemon| {
        for (option, count) in [("false", 1), ("true", 0)] {
            let script = "ls /; cat /proc/mounts; : >/ready; exec sleep 100000";
            let (mut pod, a) = pod(daemon, &shell(script)).await;
            pod.options = Some(options(&format!("backend = \"{BACKEND}\"\nno_pivot_root = {option}")));
            let calls = ["-e", "trace=pivot_root", "-e", "signal=none"];
            let pivots = Tracer::of(daemon, &pod, &calls).await;
            for text in both_say(&pod, &a, "ls /; cat /proc/mounts").await {
                // Nothing of the host's is to be seen.
                let (folders, mounts) = text.split_at(text.find("overlay ").unwrap());
                assert!(folders.contains("bin\n") && !folders.contains("run\n"), "{text}");
                assert!(
                    mounts.starts_with("overlay / overlay ") && !mounts.contains(" /run"),
                    "{text}"
                );
            }
            pod.shutdown().await;
            let pivots = pivots.told(" pivot_root(").await;
            assert_eq!(pivots.len(), count, "no_pivot_root = {option}");
            fs::remove_dir_all(&a.path).unwrap();
        }
    });
}
