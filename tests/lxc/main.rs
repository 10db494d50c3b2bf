//! What is true of the backend `lxc` alone: its containers are LXC's, for LXC's tools and for whoever has containers there already.
//!
//! Drives the real shim over its socket, without containerd.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

/// The part of the harness that needs no containerd.
#[path = "../support"]
mod support {
    #![allow(dead_code, reason = "each test file uses another part of the harness")]
    #![allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::print_stderr,
        reason = "a harness fails by panicking"
    )]

    pub(crate) mod backend;
    pub(crate) mod drive;
    pub(crate) mod gate;
    pub(crate) mod image;
    pub(crate) mod leaks;
    pub(crate) mod patience;
    pub(crate) mod pod;
    pub(crate) mod skip;
    pub(crate) mod universe;
}
mod bundle;
mod ends;
mod steps;
mod strangers;
mod systems;
mod tools;
mod tracer;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::{
        fd::{FromRawFd, OwnedFd},
        unix::fs::{MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use containerd_shim_protos::{
    api::{self, Status},
    protobuf::well_known_types::any::Any,
    ttrpc::Code,
};
use serde_json::json;
use support::{
    backend,
    drive::{self, alone, it_works as runs, lives, remove_locks_of, send},
    gate::FileGate,
    leaks::LXC_PATH,
    pod::{
        Bundle, Daemon, FOREVER, Io, NAMESPACE, Pod, Refused, SHIM, Start, appears, busybox, cgroup_v2, delete_dead,
        deleted, options, process, refused, run_shim, shell, until, until_told,
    },
    universe,
};

const BACKEND: &str = "lxc";
/// The annotation that makes a container one of a pod.
const SANDBOX: &str = "io.kubernetes.cri.sandbox-id";

/// Runs a test, one at a time, and asserts that nothing is left behind.
fn lxc(test: impl AsyncFnOnce(&mut Daemon)) {
    alone(test);
}

fn on(backend: &str) -> Option<Any> {
    Some(options(&format!("backend = \"{backend}\"")))
}

/// A pod on LXC with its first bundle.
async fn pod(daemon: &Daemon, args: &[&str]) -> (Pod, Bundle) {
    let bundle = daemon.bundle("a", args);
    let mut pod = Pod::start(daemon, &bundle).await;
    pod.options = on(BACKEND);
    (pod, bundle)
}

/// The output of one of LXC's tools, which succeeds. Meanwhile events are taken.
async fn tool(program: &str, arguments: &[&str]) -> String {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null());
    let output = tokio::task::spawn_blocking(move || command.output().unwrap())
        .await
        .unwrap();
    let [stdout, stderr] = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(output.status.success(), "{program} {arguments:?}: {stdout}{stderr}");
    stdout
}

/// The process that waits for the container's init.
fn monitor(id: &str) -> u32 {
    let own = backend::own_processes(BACKEND, id);
    let mut monitors = own.iter().filter(|process| process.program() != backend::LXC_INIT);
    let (first, more) = (monitors.next(), monitors.next());
    assert!(first.is_some() && more.is_none(), "not one monitor: {own:?}");
    first.unwrap().pid
}

/// The exits that were told, after the first `known` events.
fn exits(daemon: &Daemon, known: usize) -> Vec<String> {
    let mut told = daemon.told().split_off(known);
    told.retain(|told| told.starts_with("exit "));
    told
}

/// Delete; then nothing is left of it, and the next one of that name works.
async fn is_deleted_clean(daemon: &Daemon, pod: Pod, a: &Bundle, status: u32) {
    assert_eq!(pod.delete(&a.id, "").await.unwrap().exit_status, status);
    pod.shutdown().await;
    daemon.assert_nothing_left();
    the_next_works(daemon, a).await;
}

async fn the_next_works(daemon: &Daemon, former: &Bundle) {
    drive::the_next_works(daemon, former, on(BACKEND)).await;
}

// ---- LXC's tools -----------------------------------------------------------------------------------------------------------------

#[test]
fn a_missing_liblxc_is_told_by_its_package_and_hinders_no_other_backend() {
    lxc(async |daemon| {
        let a = daemon.bundle("a", &shell("echo fine"));
        let start = Start {
            env: BTreeMap::from([("PROXMOX_LXCRI_LIBLXC".into(), "/nonexistent/liblxc.so.1".into())]),
            ..Start::default()
        };
        let mut pod = Pod::start_with(daemon, &a, &start).await;
        pod.options = on(BACKEND);
        for text in ["liblxc1", "/nonexistent/liblxc.so.1"] {
            refused(pod.create(&a, &Io::none()).await, Code::UNAVAILABLE, text);
        }
        refused(pod.state("a", "").await, Code::NOT_FOUND, "container not created");
        pod.options = on("crun");
        runs(&pod, &a).await;
        pod.shutdown().await;
    });
}

/// Copies of the shim and its helper, to be replaced, and how the shim is started then.
fn installed(daemon: &Daemon) -> (Start, [PathBuf; 2]) {
    let bin = daemon.folder.join("bin");
    fs::create_dir(&bin).unwrap();
    let copies = [Path::new(SHIM), &Path::new(SHIM).with_file_name(backend::LXC_INIT)].map(|program| {
        let copy = bin.join(program.file_name().unwrap());
        fs::copy(program, &copy).unwrap();
        copy
    });
    let start = Start {
        program: Some(copies[0].clone()),
        ..Start::default()
    };
    (start, copies)
}

/// The shim without what it needs beside it.
#[test]
fn a_missing_helper_is_told_by_its_path_and_hinders_no_other_backend() {
    lxc(async |daemon| {
        let (start, [_, helper]) = installed(daemon);
        let aside = helper.with_extension("aside");
        fs::rename(&helper, &aside).unwrap();
        let a = daemon.bundle("a", &shell("echo fine"));
        let mut pod = Pod::start_with(daemon, &a, &start).await;
        pod.options = on(BACKEND);
        let missing = format!(
            "{} does not exist; the backend lxc needs it beside this program: make install",
            helper.display()
        );
        refused(pod.create(&a, &Io::none()).await, Code::FAILED_PRECONDITION, &missing);
        refused(pod.state("a", "").await, Code::NOT_FOUND, "container not created");
        pod.options = on("crun");
        runs(&pod, &a).await;
        pod.options = on(BACKEND);
        fs::copy(&aside, &helper).unwrap();
        runs(&pod, &daemon.bundle("later", &shell("echo fine"))).await;
        // Gone while a container runs, which can be ended and deleted without.
        let b = daemon.bundle("b", &FOREVER);
        let pid = pod.run(&b, &Io::none()).await;
        fs::remove_file(&helper).unwrap();
        pod.exec("b", "e1", &process(&["true"]), &Io::none()).await.unwrap();
        refused(pod.start_process("b", "e1").await, Code::FAILED_PRECONDITION, &missing);
        assert_eq!(pod.status("b").await, Status::RUNNING);
        pod.end("b").await;
        fs::remove_dir_all(&b.path).unwrap();
        // Also by who comes after a shim that has died.
        fs::copy(&aside, &helper).unwrap();
        let c = daemon.bundle("c", &FOREVER);
        assert_ne!(pod.run(&c, &Io::none()).await, pid);
        fs::remove_file(&helper).unwrap();
        pod.dies().await;
        for bundle in [&c, &a] {
            deleted(&run_shim(daemon, bundle, &start, "delete")).unwrap();
        }
        daemon.assert_nothing_left();
    });
}

#[test]
fn a_cgroup_that_the_backend_cannot_make_is_refused_by_name_and_nothing_is_left() {
    lxc(async |daemon| {
        let (mut pod, mut a) = pod(daemon, &shell("echo fine")).await;
        let path = a.spec["linux"]["cgroupsPath"].clone();
        for root in ["/", "//", "/."] {
            a.spec["linux"]["cgroupsPath"] = root.into();
            let text = "linux.cgroupsPath is the root of the hierarchy; an LXC container needs its own";
            refused(pod.create(&a, &Io::none()).await, Code::INVALID_ARGUMENT, text);
        }
        // As CRI asks for it, where systemd manages the cgroups.
        pod.options = Some(options(&format!("backend = \"{BACKEND}\"\nsystemd_cgroup = true")));
        let mut b = daemon.bundle("b", &["true"]);
        let mut c = daemon.bundle("c", &["/sbin/init"]);
        systems::with_busybox_init(&mut c, &[]);
        let (code, text) = match cgroup_v2() {
            true => (
                Code::UNAVAILABLE,
                "cannot reach systemd over /run/dbus/system_bus_socket; is dbus running?",
            ),
            false => (
                Code::UNIMPLEMENTED,
                "makes systemd's scopes on cgroup v2 alone; set systemd_cgroup = false, or use the backend crun",
            ),
        };
        for bundle in [&mut b, &mut c] {
            bundle.spec["linux"]["cgroupsPath"] = format!("system.slice:lxcri:{}", bundle.id).into();
            refused(pod.create(bundle, &Io::none()).await, code, text);
        }
        for id in ["a", "b", "c"] {
            refused(pod.state(id, "").await, Code::NOT_FOUND, "container not created");
        }
        pod.options = on(BACKEND);
        a.spec["linux"]["cgroupsPath"] = path;
        runs(&pod, &a).await;
        pod.shutdown().await;
    });
}

/// A client that restores learns at once that it cannot, and nothing is left.
#[test]
fn a_restore_is_refused_and_the_bundle_works_without() {
    lxc(async |daemon| {
        let (pod, a) = pod(daemon, &shell("echo fine")).await;
        let images = daemon.folder.join("images");
        fs::create_dir(&images).unwrap();
        let mut restore = pod.create_request(&a, &Io::none());
        restore.checkpoint = images.display().to_string();
        let answer = pod.call::<_, api::CreateTaskResponse>("Create", &restore).await;
        refused(answer, Code::UNIMPLEMENTED, "checkpoint");
        refused(pod.state("a", "").await, Code::NOT_FOUND, "container not created");
        runs(&pod, &a).await;
        pod.shutdown().await;
    });
}

#[test]
fn a_shim_whose_program_was_replaced_makes_containers_as_before() {
    lxc(async |daemon| {
        let (start, [shim, helper]) = installed(daemon);
        let a = daemon.bundle("a", &shell("echo fine"));
        let mut pod = Pod::start_with(daemon, &a, &start).await;
        pod.options = on(BACKEND);
        runs(&pod, &a).await;
        // As a package's upgrade does; the new helper would not understand this shim.
        for program in [&shim, &helper] {
            fs::remove_file(program).unwrap();
        }
        fs::write(&helper, "#!/bin/sh\nexit 1\n").unwrap();
        fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
        let b = daemon.bundle("b", &FOREVER);
        pod.run(&b, &Io::none()).await;
        let io = Io::fifos(&b.path, "e1");
        let stdout = io.read_stdout();
        pod.exec("b", "e1", &process(&shell("echo fine")), &io).await.unwrap();
        pod.start_process("b", "e1").await.unwrap();
        assert_eq!(pod.wait("b", "e1").await.unwrap(), 0);
        assert_eq!(stdout.text().await, "fine\n");
        pod.end("b").await;
        pod.shutdown().await;
    });
}

/// What a Start that failed has left is told by the helper that init is, and not by the one that is installed since.
#[test]
fn a_start_that_hangs_after_an_upgrade_leaves_a_container_that_was_not_started() {
    lxc(async |daemon| {
        let (start, [_, helper]) = installed(daemon);
        let mut a = daemon.bundle("a", &["touch", "/ran"]);
        a.spec["hooks"]["startContainer"] = json!([{"path": "/bin/sleep", "args": ["sleep", "100000"]}]);
        let mut pod = Pod::start_with(daemon, &a, &start).await;
        pod.options = Some(options(&format!("backend = \"{BACKEND}\"\nruntime_timeout_ms = 1000")));
        pod.create(&a, &Io::none()).await.unwrap();
        let newer = helper.with_extension("newer");
        fs::copy(&helper, &newer).unwrap();
        fs::rename(&newer, &helper).unwrap();
        let answer = pod.start_process("a", "").await;
        refused(answer, Code::DEADLINE_EXCEEDED, "LXC was not done within 1000 ms");
        assert_eq!(pod.status("a").await, Status::CREATED);
        pod.delete("a", "").await.unwrap();
        pod.shutdown().await;
        assert_eq!(daemon.told(), ["create a", "exit a 137", "delete a 137"]);
        assert!(!a.path.join("upper/ran").exists());
    });
}

// ---- pods and execs ----------------------------------------------------------------------------------------------------------------

#[test]
fn a_pod_may_mix_crun_and_lxc_by_annotation_and_share_its_namespaces() {
    lxc(async |daemon| {
        for (outer, inner) in [("crun", "lxc"), ("lxc", "crun"), ("lxc", "lxc")] {
            const KEY: &str = "io.proxmox-lxcri.backend";
            let sandbox = daemon.bundle("sandbox", &FOREVER);
            let sandbox = sandbox.annotate(SANDBOX, "sandbox").annotate(KEY, outer);
            let pod = Pod::start(daemon, &sandbox).await;
            let pid = pod.run(&sandbox, &Io::none()).await;
            let app = daemon.bundle("app", &shell("sleep 1000 & touch /ready; exec sleep 1000"));
            let mut app = app.annotate(SANDBOX, "sandbox").annotate(KEY, inner);
            app.joins(pid, &["network", "pid", "ipc", "uts"]);
            let again = Pod::start(daemon, &app).await;
            assert_eq!(again.pid, pod.pid, "one shim for the pod");
            let app_pid = pod.run(&app, &Io::none()).await;
            appears(&app.path.join("upper/ready")).await;
            let has = |id| backend::holding(NAMESPACE, id);
            assert_eq!((has("sandbox"), has("app")), (vec![outer], vec![inner]));
            for namespace in ["net", "ipc", "uts", "pid"] {
                let of = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
                assert_eq!(of(pid), of(app_pid), "{namespace} of {inner} in {outer}");
            }
            let of = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/mnt")).unwrap();
            assert_ne!(of(pid), of(app_pid), "{inner} in {outer}");
            // Its background process lives in the sandbox's pid namespace: nobody but the shim ends it.
            assert!(pod.pids("app").await.unwrap().len() >= 2);
            pod.exec("app", "e1", &process(&["true"]), &Io::none()).await.unwrap();
            pod.start_process("app", "e1").await.unwrap();
            assert_eq!(pod.wait("app", "e1").await.unwrap(), 0);
            pod.end("app").await;
            assert_eq!(pod.status("sandbox").await, Status::RUNNING);
            pod.end("sandbox").await;
            pod.shutdown().await;
            daemon.assert_nothing_left();
            for bundle in [&sandbox, &app] {
                fs::remove_dir_all(&bundle.path).unwrap();
            }
        }
    });
}

#[test]
fn an_exec_has_its_own_user_capabilities_and_limits_with_and_without_a_terminal() {
    lxc(async |daemon| {
        let (pod, a) = pod(daemon, &FOREVER).await;
        pod.run(&a, &Io::none()).await;
        let script = "id -u; id -G; umask; ulimit -n; ulimit -Hn; grep -E 'Cap|NoNew' /proc/self/status | tr '\\t' ' '; \
                      test -t 0 && echo terminal";
        let own = ["CAP_NET_BIND_SERVICE"];
        let mut spec = process(&shell(script));
        spec["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [5, 7], "umask": 0o27});
        spec["capabilities"] =
            json!({"bounding": own, "effective": own, "permitted": own, "inheritable": own, "ambient": own});
        spec["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 99}]);
        let capabilities = ["Inh", "Prm", "Eff", "Bnd", "Amb"].map(|set| format!("Cap{set}: 0000000000000400"));
        let mut expected = vec![
            "1000".to_owned(),
            "1000 5 7".into(),
            "0027".into(),
            "77".into(),
            "99".into(),
        ];
        expected.extend(capabilities);
        expected.push("NoNewPrivs: 1".into());
        for terminal in [false, true] {
            let exec = if terminal { "e1" } else { "e2" };
            let io = match terminal {
                true => Io::terminal(&a.path, exec),
                false => Io::fifos(&a.path, exec),
            };
            let stdout = io.read_stdout();
            let _stdin = io.open_stdin();
            pod.exec("a", exec, &spec, &io).await.unwrap();
            pod.start_process("a", exec).await.unwrap();
            assert_eq!(pod.wait("a", exec).await.unwrap(), u32::from(!terminal));
            let mut expected = expected.clone();
            if terminal {
                expected.push("terminal".into());
            }
            assert_eq!(stdout.text().await.lines().collect::<Vec<_>>(), expected);
            pod.delete("a", exec).await.unwrap();
        }
        pod.end("a").await;
        pod.shutdown().await;
    });
}

/// What comes of a Create and of the Start of an exec on `backend`, for a process that `change` has made one that cannot run.
async fn refusals(daemon: &Daemon, backend: &str, change: fn(&mut serde_json::Value)) -> [Option<(Code, String)>; 2] {
    let mut a = daemon.bundle("a", &FOREVER);
    let upper = a.path.join("upper");
    fs::create_dir(upper.join("folder")).unwrap();
    fs::write(upper.join("file"), "#!/bin/sh\n").unwrap();
    fs::set_permissions(upper.join("file"), fs::Permissions::from_mode(0o644)).unwrap();
    let works = a.spec["process"].clone();
    let mut pod = Pod::start(daemon, &a).await;
    pod.options = on(backend);
    change(&mut a.spec["process"]);
    let fails = std::mem::replace(&mut a.spec["process"], works);
    pod.run(&a, &Io::none()).await;
    pod.exec("a", "e1", &fails, &Io::none()).await.unwrap();
    let exec = pod.start_process("a", "e1").await.err();
    pod.end("a").await;
    a.spec["process"] = fails;
    let create = pod.create(&a, &Io::none()).await.err();
    if create.is_none() {
        pod.delete("a", "").await.unwrap();
    }
    pod.shutdown().await;
    fs::remove_dir_all(&a.path).unwrap();
    let args = &a.spec["process"]["args"];
    let told = |refusal: Refused| (refusal.code, as_any_crun_says(&refusal.text, args[0].as_str().unwrap()));
    [create.map(told), exec.map(told)]
}

/// An error about `program` in the words of crun 1.21, also one in those of 1.8.1 (libcrun's utils.c, `find_executable`, and linux.c,
/// `libcrun_safe_chdir`): where crun itself has changed its words, the backend LXC has those of one of its versions.
fn as_any_crun_says(text: &str, program: &str) -> String {
    text.replace(
        "open executable: Operation not permitted",
        &format!("the path `{program}` is not a regular file: Operation not permitted"),
    )
    .replace(
        "open executable: Permission denied",
        &format!("the path `{program}` exists but it is not executable: Operation not permitted"),
    )
    .replace("failed: chdir `", "failed: chdir to `")
}

/// Clients match these texts.
#[test]
fn a_process_that_cannot_run_is_told_in_the_same_words_as_with_crun() {
    lxc(async |daemon| {
        type Change = fn(&mut serde_json::Value);
        let cases: [(&str, Change); 8] = [
            ("no such name", |process| process["args"] = json!(["no-such-program"])),
            ("no such path", |process| process["args"] = json!(["/no/such/program"])),
            ("a folder", |process| process["args"] = json!(["/folder"])),
            ("not executable", |process| process["args"] = json!(["/file"])),
            ("not executable, by name", |process| {
                process["args"] = json!(["file"]);
                process["env"] = json!(["PATH=/folder:/:/bin"]);
            }),
            // Made for a container, and not for an exec.
            ("no such cwd", |process| process["cwd"] = "/no/such/folder".into()),
            ("a cwd that is a file", |process| process["cwd"] = "/file".into()),
            ("a cwd below a file", |process| process["cwd"] = "/file/folder".into()),
        ];
        let mut different = Vec::new();
        for (case, change) in cases {
            let crun = refusals(daemon, "crun", change).await;
            let lxc = refusals(daemon, BACKEND, change).await;
            assert!(lxc[1].is_some(), "{case}: the exec runs");
            for (call, crun, lxc) in [("create", &crun[0], &lxc[0]), ("exec", &crun[1], &lxc[1])] {
                if crun != lxc {
                    different.push(format!("{case}, {call}:\n  crun {crun:?}\n  LXC  {lxc:?}"));
                }
            }
        }
        assert!(different.is_empty(), "{}", different.join("\n"));
    });
}

#[test]
fn an_exec_that_was_given_up_never_becomes_its_program() {
    lxc(async |daemon| {
        let (mut pod, a) = pod(daemon, &FOREVER).await;
        pod.options = Some(options(&format!("backend = \"{BACKEND}\"\nruntime_timeout_ms = 3000")));
        let pid = pod.run(&a, &Io::none()).await;
        let gate = FileGate::in_exec(&a.path);
        pod.exec("a", "e1", &process(&["touch", "/ran"]), &Io::none())
            .await
            .unwrap();
        let refusal = pod.start_process("a", "e1").await.unwrap_err();
        assert_eq!(refusal.code, Code::DEADLINE_EXCEEDED, "{}", refusal.text);
        // Whoever waits may go on.
        drop(gate);
        until_told("init is alone", async || {
            (pod.pids("a").await.unwrap().into_keys().collect::<Vec<_>>() == [pid]).then_some(())
        })
        .await;
        assert!(!a.path.join("upper/ran").exists(), "it ran");
        pod.end("a").await;
        pod.shutdown().await;
    });
}

#[test]
fn creates_that_fail_leave_nothing_in_the_shim() {
    lxc(async |daemon| {
        let (pod, mut a) = pod(daemon, &["/nonexistent"]).await;
        let count = |folder: &str| fs::read_dir(format!("/proc/{}/{folder}", pod.pid)).unwrap().count();
        let open = || count("fd");
        let hook = json!([{"path": "/bin/sh", "args": ["sh", "-c", "exit 4"]}]);
        let mut known = 0;
        for round in 0..20 {
            // Before init is born, in init, on the host meanwhile.
            match round % 3 {
                0 => a.spec["process"]["args"] = json!(["/nonexistent"]),
                1 => a.spec["hooks"]["createRuntime"] = hook.clone(),
                _ => {
                    a.spec["hooks"] = json!({});
                    a.spec["linux"]["namespaces"][0]["path"] = "/nonexistent".into();
                }
            }
            pod.create(&a, &Io::none()).await.unwrap_err();
            a.spec["linux"]["namespaces"][0].as_object_mut().unwrap().remove("path");
            // Warm by then.
            if round == 3 {
                known = open();
            }
        }
        until("no descriptor more than before", || (open() <= known).then_some(())).await;
        assert!(backend::own_processes(BACKEND, "a").is_empty());
        a.spec["hooks"] = json!({});
        a.spec["process"]["args"] = json!(shell("echo fine"));
        runs(&pod, &a).await;
        pod.shutdown().await;
    });
}

// ---- beside crun -------------------------------------------------------------------------------------------------------------------

/// Everything that a program can find out about itself, by name. What is counted anew for every process or mount is left out.
/// A shell that forks blocks all signals for a moment, so it reads that line by itself.
const LOOK: &str = r#"cd /proc/$$
while read -r key value; do test "$key" = SigBlk: && echo "blocked $value"; done <status
grep -vE '^(SigBlk|Vm|Rss|Hugetlb|.*ctxt_switches|State|Tgid|Ngid|Pid|PPid|NStgid|NSpid|NSpgid|NSsid|FDSize|Threads|SigQ|Name|CoreDumping|untag)' status
sed 's/^/limit /' limits
sed -E 's/^[0-9]+ [0-9]+ [0-9]+:[0-9]+ /mount /; s/shared:[0-9]+/shared/; s/master:[0-9]+/master/; s/overlay rw.*/overlay/' mountinfo
tr '\0' '\n' <environ | sed 's/^/env /'
sed 's/^/cgroup /' cgroup
for fd in 0 1 2 3 4 5 6 7 8 9 10 11 12; do test -e fd/$fd && echo "fd $fd $(readlink fd/$fd | sed 's/[0-9][0-9]*/N/') $(stat -L -c '%u:%g %a' fd/$fd)"; done
for file in oom_score_adj attr/current personality coredump_filter loginuid sessionid setgroups uid_map timerslack_ns; do echo "$file $(cat $file 2>&1 | tr '\0' ' ')"; done
set -- $(sed 's/.*) //' stat); echo "group $3 session $4 terminal $5 foreground $6 priority ${16} nice ${17} rt ${38} policy ${39}"
echo "cwd $(readlink cwd) root $(readlink root) exe $(readlink exe)"
echo "names $(hostname) $(cat /proc/sys/kernel/domainname)"
echo "first port for all $(cat /proc/sys/net/ipv4/ip_unprivileged_port_start)"
ls -lAn /dev /dev/pts /dev/shm / /sys /sys/fs/cgroup /new 2>&1 | grep -v '^total' | sed -E 's/[A-Z][a-z]{2} +[0-9]+ +[0-9:]+ //; s/^(.{10}) +[0-9]+/\1/; s/^/ls /'
ip link 2>&1 | head -2
"#;

/// Where the two differ, and shall.
const INTENDED: [&str; 6] = [
    // The terminal keeps the attributes of the devpts that it is of.
    " /dev/console ",
    // `ro` of the mount holds for its top, too; and crun makes symlinks to hierarchies that are not there.
    " /sys/fs/cgroup",
    "net_cls",
    "net_prio",
    // Masks and read-only paths keep nosuid, nodev and noexec of what they cover; a masked file is the host's null device as it is.
    " /proc/",
    " /sys/firmware ",
];

/// crun 1.8.1 leaves an exec in a session outside of the container, and without the OOM score that the client asked for.
const OWN_IN_EXECS: [&str; 2] = ["group ", "oom_score_adj "];

/// What init and an exec find out.
async fn found_out(
    daemon: &Daemon,
    backend: &str,
    change: impl Fn(&mut serde_json::Value),
    terminal: bool,
) -> [String; 2] {
    let mut a = daemon.bundle("a", &shell(&format!("{LOOK}\nsleep 1000 &\necho done; wait")));
    change(&mut a.spec);
    // For a program that is not root to tell that it has looked.
    fs::set_permissions(a.path.join("upper"), fs::Permissions::from_mode(0o777)).unwrap();
    let mut spec = a.spec["process"].clone();
    spec["args"] = json!(shell(LOOK));
    let mut pod = Pod::start(daemon, &a).await;
    pod.options = on(backend);
    let io = |name: &str| match terminal {
        true => Io::terminal(&a.path, name),
        false => Io::fifos(&a.path, name),
    };
    a.spec["process"]["terminal"] = terminal.into();
    let first = io("init");
    let stdout = first.read_stdout();
    let stdin = first.open_stdin();
    pod.run(&a, &first).await;
    appears(&a.path.join("upper/looked")).await;
    let second = io("e1");
    let output = second.read_stdout();
    let exec_stdin = second.open_stdin();
    pod.exec("a", "e1", &spec, &second).await.unwrap();
    pod.start_process("a", "e1").await.unwrap();
    pod.wait("a", "e1").await.unwrap();
    pod.delete("a", "e1").await.unwrap();
    drop((stdin, exec_stdin));
    pod.end("a").await;
    pod.shutdown().await;
    fs::remove_dir_all(&a.path).unwrap();
    [stdout.text().await, output.text().await]
}

#[test]
fn the_program_sees_the_same_on_both_backends() {
    lxc(async |daemon| {
        type Change = fn(&mut serde_json::Value);
        let cases: [(&str, bool, Change); 4] = [
            ("plain", false, |_| {}),
            ("terminal", true, |_| {}),
            ("user", false, |spec| {
                spec["process"]["user"] = json!({"uid": 1000, "gid": 1001, "additionalGids": [5, 7]});
                spec["process"]["cwd"] = "/new/folder".into();
                spec["process"]["noNewPrivileges"] = false.into();
                spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 99}]);
                spec["process"]["oomScoreAdj"] = 100.into();
                spec["process"]["capabilities"]["inheritable"] = json!(["CAP_CHOWN"]);
                spec["process"]["capabilities"]["ambient"] = json!(["CAP_CHOWN"]);
            }),
            ("as containerd has it", false, |spec| {
                let mounts = spec["mounts"].as_array_mut().unwrap();
                mounts.push(json!({"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]}));
                mounts.push(json!({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]}));
                mounts.push(json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}));
                mounts.push(json!({"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]}));
                mounts.push(json!({"destination": "/etc/hosts", "type": "bind", "source": "/etc/hosts", "options": ["rbind", "rprivate", "rw"]}));
                spec["linux"]["namespaces"]
                    .as_array_mut()
                    .unwrap()
                    .push(json!({"type": "cgroup"}));
                spec["linux"]["maskedPaths"] = json!([
                    "/proc/acpi",
                    "/proc/kcore",
                    "/proc/keys",
                    "/proc/timer_list",
                    "/sys/firmware"
                ]);
                spec["linux"]["readonlyPaths"] = json!([
                    "/proc/asound",
                    "/proc/bus",
                    "/proc/fs",
                    "/proc/irq",
                    "/proc/sys",
                    "/proc/sysrq-trigger"
                ]);
                spec["linux"]["rootfsPropagation"] = "private".into();
                spec["domainname"] = "home.example".into();
                spec["linux"]["sysctl"] = json!({"net.ipv4.ip_unprivileged_port_start": "0"});
            }),
        ];
        let mut different = Vec::new();
        for (case, terminal, change) in cases {
            let change = |spec: &mut serde_json::Value| {
                change(spec);
                let script = spec["process"]["args"][2]
                    .as_str()
                    .unwrap()
                    .replace("echo done", ": >/looked");
                spec["process"]["args"][2] = script.into();
            };
            let crun = found_out(daemon, "crun", change, terminal).await;
            let lxc = found_out(daemon, BACKEND, change, terminal).await;
            for (who, crun, lxc) in [("init", &crun[0], &lxc[0]), ("exec", &crun[1], &lxc[1])] {
                assert!(crun.lines().count() > 60, "{crun}");
                let intended = |line: &str| {
                    let of_exec = who == "exec" && OWN_IN_EXECS.iter().any(|start| line.starts_with(start));
                    of_exec || INTENDED.iter().any(|part| line.contains(part))
                };
                for (name, these, those) in [("crun", crun, lxc), ("LXC", lxc, crun)] {
                    let others: BTreeSet<&str> = those.lines().collect();
                    let alone = these.lines().filter(|line| !others.contains(line) && !intended(line));
                    different.extend(alone.map(|line| format!("{case}, {who}: only with {name}: {line}")));
                }
            }
        }
        assert!(different.is_empty(), "{}", different.join("\n"));
    });
}
