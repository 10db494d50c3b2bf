//! What is true of the backend `lxc` alone: its containers are LXC's, for LXC's tools and for whoever has containers there already.
//!
//! Drives the real shim over its socket, without containerd.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

/// The part of the harness that needs no containerd.
mod support {
    #![allow(dead_code, reason = "each test file uses another part of the harness")]
    #![allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::print_stderr,
        reason = "a harness fails by panicking"
    )]

    pub(crate) mod backend;
    pub(crate) mod image;
    pub(crate) mod leaks;
    pub(crate) mod patience;
    pub(crate) mod pod;
    pub(crate) mod skip;
    pub(crate) mod universe;
}

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::CString,
    fs,
    os::{
        fd::{FromRawFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{MetadataExt, PermissionsExt},
        },
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
    leaks::LXC_PATH,
    pod::{
        Bundle, Daemon, FOREVER, Io, NAMESPACE, Pod, SHIM, Start, WHOLE, appears, busybox, cgroup_v2, delete_dead,
        deleted, options, process, refused, run_shim, shell, until, until_told,
    },
    universe,
};

const BACKEND: &str = "lxc";
/// The annotation that makes a container one of a pod.
const SANDBOX: &str = "io.kubernetes.cri.sandbox-id";

/// Runs a test, one at a time, and asserts that nothing is left behind.
fn lxc<F: AsyncFn(&mut Daemon)>(test: F) {
    universe::token();
    static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut daemon = Daemon::new().await;
        let ended = tokio::time::timeout(*WHOLE, test(&mut daemon)).await;
        assert!(ended.is_ok(), "not done after {:?}", *WHOLE);
        daemon.ends().await;
    });
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

/// SIGKILL, SIGSTOP, … to a process of the universe.
fn send(pid: u32, signal: i32) {
    // SAFETY: the pid is of the tests' private pid namespace.
    let result = unsafe { libc::kill(pid.cast_signed(), signal) };
    assert_eq!(result, 0, "kill {pid}: {}", std::io::Error::last_os_error());
}

fn lives(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.starts_with(" Z"))
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
    // Fails where something is mounted.
    fs::remove_dir_all(&former.path).unwrap();
    let next = daemon.bundle(&former.id, &shell("echo fine"));
    let mut pod = Pod::start(daemon, &next).await;
    pod.options = on(BACKEND);
    runs(&pod, &next).await;
    pod.shutdown().await;
    fs::remove_dir_all(&next.path).unwrap();
}

/// A container that prints "fine" runs from Create to Delete.
async fn runs(pod: &Pod, bundle: &Bundle) {
    let io = Io::fifos(&bundle.path, "runs");
    let stdout = io.read_stdout();
    pod.run(bundle, &io).await;
    assert_eq!(pod.wait(&bundle.id, "").await.unwrap(), 0);
    assert_eq!(stdout.text().await, "fine\n");
    pod.delete(&bundle.id, "").await.unwrap();
}

// ---- LXC's tools -----------------------------------------------------------------------------------------------------------------

#[test]
fn lxc_ls_lists_a_container_while_it_runs() {
    lxc(async |daemon| {
        let (pod, a) = pod(daemon, &FOREVER).await;
        pod.run(&a, &Io::none()).await;
        assert_eq!(tool("lxc-ls", &["-1", "--active"]).await, "a\n");
        assert_eq!(backend::holding(NAMESPACE, "a"), [BACKEND]);
        pod.end("a").await;
        assert_eq!(tool("lxc-ls", &["-1"]).await, "");
        pod.shutdown().await;
    });
}

#[test]
fn lxc_info_tells_the_state_and_the_pid_that_the_task_tells() {
    lxc(async |daemon| {
        let (pod, a) = pod(daemon, &FOREVER).await;
        let pid = pod.run(&a, &Io::none()).await;
        assert_eq!(pod.state("a", "").await.unwrap().pid, pid);
        assert_eq!(tool("lxc-info", &["-n", "a", "-sH"]).await, "RUNNING\n");
        assert_eq!(tool("lxc-info", &["-n", "a", "-pH"]).await, format!("{pid}\n"));
        pod.end("a").await;
        pod.shutdown().await;
    });
}

#[test]
fn lxc_attach_runs_a_program_inside() {
    lxc(async |daemon| {
        let (pod, a) = pod(daemon, &shell("echo $$ >/pid; exec sleep 100000")).await;
        pod.run(&a, &Io::none()).await;
        appears(&a.path.join("upper/pid")).await;
        let script = "hostname; cat /pid; readlink /proc/1/exe";
        let said = tool("lxc-attach", &["-n", "a", "--", "/bin/sh", "-c", script]).await;
        assert_eq!(said, "box\n1\n/bin/busybox\n");
        // That was no process of the shim's.
        assert_eq!(exits(daemon, 0), [""; 0]);
        pod.end("a").await;
        pod.shutdown().await;
    });
}

#[test]
fn a_container_whose_folder_was_removed_behind_our_back_ends_and_leaves_nothing() {
    lxc(async |daemon| {
        let (pod, a) = pod(daemon, &FOREVER).await;
        let pid = pod.run(&a, &Io::none()).await;
        let monitor = monitor("a");
        fs::remove_dir_all(Path::new(LXC_PATH).join("a")).unwrap();
        assert_eq!(pod.state("a", "").await.unwrap().pid, pid);
        pod.kill("a", "", libc::SIGKILL, false).await.unwrap();
        assert_eq!(pod.wait("a", "").await.unwrap(), 137);
        pod.delete("a", "").await.unwrap();
        until("the monitor ends", || (!lives(monitor)).then_some(())).await;
        pod.shutdown().await;
    });
}

/// LXC's socket is one of the network namespace, and takes whoever is root there.
#[test]
fn lxcs_socket_answers_no_other_container() {
    lxc(async |daemon| {
        let (pod, a) = pod(daemon, &FOREVER).await;
        let pid = pod.run(&a, &Io::none()).await;
        // As root of a container that has the host's network.
        let stop = "timeout -s KILL 10 lxc-stop -k -n a; lxc-info -n a -sH";
        for inside in [
            &["unshare", "--pid", "--fork", "--mount-proc"][..],
            // And the host's processes, but none of its capabilities.
            &["setpriv", "--bounding-set", "-all", "--inh-caps", "-all"],
        ] {
            let mut command = Command::new(inside[0]);
            command.args(&inside[1..]).args(shell(stop));
            let output = command.output().unwrap();
            assert!(
                !String::from_utf8_lossy(&output.stdout).contains("RUNNING"),
                "{output:?}"
            );
            assert!(lives(pid), "{inside:?}");
        }
        assert_eq!(tool("lxc-info", &["-n", "a", "-sH"]).await, "RUNNING\n");
        assert_eq!(exits(daemon, 0), [""; 0]);
        pod.end("a").await;
        pod.shutdown().await;
    });
}

/// CVE-2019-5736: what a container can execute of the host's, it must not be able to write.
#[test]
fn the_helper_cannot_be_written_by_way_of_the_process_that_it_is() {
    lxc(async |daemon| {
        let (pod, a) = pod(daemon, &FOREVER).await;
        let pid = pod.create(&a, &Io::none()).await.unwrap();
        let program = format!("/proc/{pid}/exe");
        assert!(fs::read(&program).unwrap().starts_with(b"\x7fELF"));
        // While it runs the kernel refuses that by itself; afterwards the mount does.
        let mount = nix::sys::statvfs::statvfs(program.as_str()).unwrap();
        assert!(mount.flags().contains(nix::sys::statvfs::FsFlags::ST_RDONLY));
        pod.delete("a", "").await.unwrap();
        pod.shutdown().await;
    });
}

#[test]
fn a_container_that_lxc_stop_kills_behind_our_back_has_exited_once() {
    lxc(async |daemon| {
        let (pod, a) = pod(daemon, &FOREVER).await;
        pod.run(&a, &Io::none()).await;
        tool("lxc-stop", &["-k", "-n", "a"]).await;
        assert_eq!(pod.wait("a", "").await.unwrap(), 137);
        assert_eq!(pod.status("a").await, Status::STOPPED);
        daemon.hears("exit a 137").await;
        is_deleted_clean(daemon, pod, &a, 137).await;
        assert_eq!(exits(daemon, 0), ["exit a 137", "exit a 0"]);
    });
}

#[test]
fn a_container_that_lxc_stop_asks_to_end_has_exited_as_it_did() {
    lxc(async |daemon| {
        let script = "trap 'exit 3' TERM; touch /ready; while :; do sleep 0.01; done";
        let (pod, a) = pod(daemon, &shell(script)).await;
        pod.run(&a, &Io::none()).await;
        appears(&a.path.join("upper/ready")).await;
        tool("lxc-stop", &["-n", "a"]).await;
        assert_eq!(pod.wait("a", "").await.unwrap(), 3);
        assert_eq!(pod.status("a").await, Status::STOPPED);
        daemon.hears("exit a 3").await;
        is_deleted_clean(daemon, pod, &a, 3).await;
        assert_eq!(exits(daemon, 0), ["exit a 3", "exit a 0"]);
    });
}

#[test]
fn another_lxc_path_is_where_the_tools_find_the_container() {
    lxc(async |daemon| {
        let (mut pod, a) = pod(daemon, &FOREVER).await;
        let path = daemon.folder.join("containers");
        let text = path.to_str().unwrap();
        pod.options = Some(options(&format!("backend = \"{BACKEND}\"\nlxc_path = \"{text}\"")));
        let pid = pod.run(&a, &Io::none()).await;
        assert_eq!(tool("lxc-ls", &["-P", text, "-1", "--active"]).await, "a\n");
        assert_eq!(
            tool("lxc-info", &["-P", text, "-n", "a", "-pH"]).await,
            format!("{pid}\n")
        );
        assert_eq!(fs::read_dir(LXC_PATH).unwrap().count(), 0);
        pod.end("a").await;
        assert_eq!(fs::read_dir(&path).map_or(0, Iterator::count), 0);
        pod.shutdown().await;
        // The folders of liblxc's locks for each path, which it shares with the tools; the locks themselves may not stay.
        let locks = Path::new("/run/lxc/lock").join(path.strip_prefix("/").unwrap());
        for folder in locks
            .ancestors()
            .take_while(|folder| *folder != Path::new("/run/lxc/lock"))
        {
            let _ = fs::remove_dir(folder);
        }
    });
}

// ---- what is there already ---------------------------------------------------------------------------------------------------------

/// Everything below a folder, byte for byte, with its modes and times.
fn tree(folder: &Path) -> BTreeMap<PathBuf, (u32, i64, i64, Vec<u8>)> {
    let mut all = BTreeMap::new();
    let mut paths = vec![folder.to_owned()];
    while let Some(path) = paths.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        let bytes = if meta.is_dir() {
            paths.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            vec![]
        } else if meta.is_file() {
            fs::read(&path).unwrap()
        } else {
            vec![]
        };
        all.insert(path, (meta.mode(), meta.mtime(), meta.mtime_nsec(), bytes));
    }
    all
}

/// An operator's container of that name, and what it is made of.
fn foreign(id: &str, config: &str) -> PathBuf {
    let folder = Path::new(LXC_PATH).join(id);
    fs::create_dir_all(folder.join("rootfs/etc")).unwrap();
    fs::write(folder.join("config"), config).unwrap();
    fs::write(folder.join("rootfs/etc/hostname"), "precious\n").unwrap();
    folder
}

/// Takes it away again, with what LXC's tools leave of it.
fn gone(folder: &Path) {
    fs::remove_dir_all(folder).unwrap();
    let id = folder.file_name().unwrap().to_string_lossy();
    let _ = fs::remove_file(format!("/run/lxc/lock{LXC_PATH}/.{id}"));
}

/// A Create is refused because of that folder, and neither it nor the cleaning up after a dead shim has changed anything there.
async fn is_left_alone(daemon: &Daemon, folder: &Path) {
    let (pod, a) = pod(daemon, &FOREVER).await;
    let before = tree(folder);
    for _ in 0..2 {
        refused(
            pod.create(&a, &Io::none()).await,
            Code::ALREADY_EXISTS,
            folder.to_str().unwrap(),
        );
        refused(pod.state("a", "").await, Code::NOT_FOUND, "container not created");
    }
    assert_eq!(tree(folder), before);
    pod.dies().await;
    let response = delete_dead(daemon, &a).unwrap();
    assert_eq!((response.pid, response.exit_status), (0, 137));
    assert_eq!(tree(folder), before);
    assert_eq!(daemon.told(), [""; 0]);
    fs::remove_dir_all(&a.path).unwrap();
}

#[test]
fn a_folder_of_that_name_that_is_not_ours_is_refused_by_name_and_not_touched() {
    lxc(async |daemon| {
        let folder = foreign("a", "lxc.uts.name = a\nlxc.rootfs.path = dir:/var/lib/lxc/a/rootfs\n");
        is_left_alone(daemon, &folder).await;
        gone(&folder);
        // Whatever it is.
        fs::create_dir(&folder).unwrap();
        is_left_alone(daemon, &folder).await;
        gone(&folder);
        let a = daemon.bundle("a", &FOREVER);
        the_next_works(daemon, &a).await;
    });
}

#[test]
fn a_container_of_that_name_that_is_not_ours_and_runs_is_refused_by_name_and_runs_on() {
    lxc(async |daemon| {
        let token = universe::token();
        let folder = foreign(
            "a",
            &format!(
                "lxc.uts.name = a\nlxc.rootfs.path = overlay:{}:{LXC_PATH}/a/rootfs\nlxc.init.cmd = /bin/sleep 4242\nlxc.net.0.type = empty\n\
                 lxc.apparmor.profile = unchanged\nlxc.autodev = 0\nlxc.console.path = none\nlxc.tty.max = 0\n\
                 lxc.cgroup.dir.container = {token}/foreign\nlxc.cgroup.dir.monitor = {token}/foreign-monitor\n\
                 lxc.cgroup.dir.monitor.pivot = {token}/foreign-pivot\n",
                busybox().display()
            ),
        );
        tool("lxc-start", &["-d", "-n", "a"]).await;
        let pid = tool("lxc-info", &["-n", "a", "-pH"]).await;
        is_left_alone(daemon, &folder).await;
        assert_eq!(tool("lxc-info", &["-n", "a", "-sH"]).await, "RUNNING\n");
        assert_eq!(tool("lxc-info", &["-n", "a", "-pH"]).await, pid);
        tool("lxc-stop", &["-k", "-n", "a"]).await;
        // Its monitor outlives the answer.
        until("its end", || {
            support::leaks::abstract_sockets().is_empty().then_some(())
        })
        .await;
        // LXC never removes the last of its cgroups.
        let of_the_pivot = universe::cgroups_named(&format!("{token}/foreign-pivot"));
        until("the monitor's end", || {
            of_the_pivot
                .iter()
                .all(|cgroup| !cgroup.exists() || fs::remove_dir(cgroup).is_ok())
                .then_some(())
        })
        .await;
        gone(&folder);
        let a = daemon.bundle("a", &FOREVER);
        the_next_works(daemon, &a).await;
    });
}

#[test]
fn the_same_id_in_another_namespace_is_refused_and_its_end_harms_nobody() {
    lxc(async |daemon| {
        let (first, a) = pod(daemon, &FOREVER).await;
        let pid = first.run(&a, &Io::none()).await;
        // In a bundle and a cgroup of its own: all that they share is the name.
        let mut other = daemon.bundle("other", &FOREVER);
        other.id = "a".into();
        let start = Start {
            namespace: "elsewhere",
            ..Start::default()
        };
        let mut second = Pod::start_with(daemon, &other, &start).await;
        second.options = on(BACKEND);
        assert_ne!(second.pid, first.pid);
        refused(
            second.create(&other, &Io::none()).await,
            Code::ALREADY_EXISTS,
            &format!("{LXC_PATH}/a"),
        );
        second.dies().await;
        let response = deleted(&run_shim(daemon, &other, &start, "delete")).unwrap();
        assert_eq!((response.pid, response.exit_status), (0, 137));
        assert_eq!(first.status("a").await, Status::RUNNING);
        assert_eq!(tool("lxc-info", &["-n", "a", "-pH"]).await, format!("{pid}\n"));
        assert_eq!(exits(daemon, 0), [""; 0]);
        first.end("a").await;
        first.shutdown().await;
    });
}

#[test]
fn what_others_have_mounted_in_a_containers_folder_survives_its_delete() {
    lxc(async |daemon| {
        let (pod, a) = pod(daemon, &shell("exit 3")).await;
        let theirs = daemon.folder.join("theirs");
        fs::create_dir(&theirs).unwrap();
        fs::write(theirs.join("file"), "precious").unwrap();
        pod.run(&a, &Io::none()).await;
        let place = Path::new(LXC_PATH).join("a/rootfs");
        fs::create_dir(&place).unwrap();
        let none: Option<&str> = None;
        let bind = nix::mount::MsFlags::MS_BIND;
        nix::mount::mount(Some(&theirs), &place, none, bind, none).unwrap();
        assert_eq!(pod.wait("a", "").await.unwrap(), 3);
        refused(
            pod.delete("a", "").await,
            Code::FAILED_PRECONDITION,
            &place.display().to_string(),
        );
        assert_eq!(fs::read_to_string(theirs.join("file")).unwrap(), "precious");
        nix::mount::umount(&place).unwrap();
        fs::remove_dir_all(&theirs).unwrap();
        is_deleted_clean(daemon, pod, &a, 3).await;
    });
}

/// The cgroups of a container and of its monitor, which both carry the id.
fn cgroups_of(id: &str) -> (Vec<PathBuf>, Vec<PathBuf>) {
    let all = universe::cgroups_named(&universe::token()).into_iter();
    let (mut containers, mut monitors): (Vec<_>, Vec<_>) = all
        .filter(|path| path.to_string_lossy().contains(id))
        .partition(|path| path.to_string_lossy().contains(&format!("{}/{id}", universe::token())));
    containers.sort();
    monitors.sort();
    (containers, monitors)
}

#[test]
fn cgroups_that_a_crash_has_left_are_taken_and_all_are_removed() {
    lxc(async |daemon| {
        // Nobody else's monitor has this name, at the root of the hierarchy that all tests share.
        let id = format!("m{}", universe::token());
        let a = daemon.bundle(&id, &FOREVER);
        let mut pod = Pod::start(daemon, &a).await;
        pod.options = on(BACKEND);
        let mut known = (vec![], vec![]);
        for _ in 0..2 {
            pod.run(&a, &Io::none()).await;
            let (containers, monitors) = cgroups_of(&id);
            assert!(!containers.is_empty());
            assert!(
                known.0.is_empty() || known == (containers.clone(), monitors.clone()),
                "others: {known:?}"
            );
            pod.end(&id).await;
            let left: Vec<_> = containers
                .iter()
                .chain(&monitors)
                .filter(|path| path.exists())
                .collect();
            assert!(left.is_empty(), "{left:?}");
            // As a machine that lost its shims and monitors has them.
            for path in containers.iter().chain(&monitors) {
                fs::create_dir_all(path).unwrap();
            }
            known = (containers, monitors);
        }
        for path in known.0.iter().chain(&known.1).rev() {
            let _ = fs::remove_dir(path);
        }
        pod.shutdown().await;
    });
}

#[test]
fn a_monitors_cgroup_in_which_others_live_is_refused_and_they_live_on() {
    lxc(async |daemon| {
        if universe::by_systemd() {
            return;
        }
        let (pod, a) = pod(daemon, &shell("echo fine")).await;
        let hierarchy = match cgroup_v2() {
            true => "/sys/fs/cgroup",
            false => "/sys/fs/cgroup/pids",
        };
        for name in ["lxc.monitor.a", "lxc.pivot.a"] {
            // As that of an LXC container of this name below another lxcpath.
            let folder = Path::new(hierarchy).join(universe::token()).join(name);
            fs::create_dir(&folder).unwrap();
            let mut other = Command::new("sleep").arg("1000").spawn().unwrap();
            fs::write(folder.join("cgroup.procs"), other.id().to_string()).unwrap();
            refused(pod.create(&a, &Io::none()).await, Code::FAILED_PRECONDITION, name);
            assert_eq!(other.try_wait().unwrap(), None, "somebody else was killed");
            other.kill().unwrap();
            other.wait().unwrap();
            until("the cgroup's end", || fs::remove_dir(&folder).ok()).await;
        }
        runs(&pod, &a).await;
        pod.shutdown().await;
    });
}

// ---- ends behind our back ----------------------------------------------------------------------------------------------------------

#[test]
fn a_monitor_that_is_killed_costs_no_exit_and_leaves_nothing() {
    lxc(async |daemon| {
        for started in [true, false] {
            let known = daemon.told().len();
            let (pod, a) = pod(daemon, &FOREVER).await;
            let pid = pod.create(&a, &Io::none()).await.unwrap();
            if started {
                pod.start_process("a", "").await.unwrap();
            }
            send(monitor("a"), libc::SIGKILL);
            // It may have taken the container along, now or soon, or not.
            if let Err(refusal) = pod.kill("a", "", libc::SIGKILL, false).await {
                assert_eq!(refusal.code, Code::NOT_FOUND, "{}", refusal.text);
            }
            assert_eq!(pod.wait("a", "").await.unwrap(), 137);
            assert!(!lives(pid), "its init lives");
            let state = pod.state("a", "").await.unwrap();
            assert_eq!(
                (state.status, state.pid, state.exit_status),
                (Status::STOPPED.into(), pid, 137)
            );
            daemon.hears_after(known, "exit a 137").await;
            is_deleted_clean(daemon, pod, &a, 137).await;
            assert_eq!(exits(daemon, known), ["exit a 137", "exit a 0"]);
        }
    });
}

#[test]
fn the_state_agrees_with_the_kernel_after_the_monitor_was_killed() {
    lxc(async |daemon| {
        let (pod, a) = pod(daemon, &FOREVER).await;
        let pid = pod.run(&a, &Io::none()).await;
        let monitor = monitor("a");
        send(monitor, libc::SIGKILL);
        until("the monitor's end", || (!lives(monitor)).then_some(())).await;
        // Whether the container goes on is LXC's affair; what contradicts the kernel is an end that is not told yet.
        until_told("state and kernel agree", async || {
            ((pod.status("a").await == Status::RUNNING) == lives(pid)).then_some(())
        })
        .await;
        if lives(pid) {
            assert_eq!(pod.pids("a").await.unwrap().into_keys().collect::<Vec<_>>(), [pid]);
            pod.kill("a", "", libc::SIGKILL, false).await.unwrap();
        }
        assert_eq!(pod.wait("a", "").await.unwrap(), 137);
        is_deleted_clean(daemon, pod, &a, 137).await;
    });
}

#[test]
fn a_monitor_that_stands_still_does_not_hinder_the_delete_of_a_dead_shim() {
    lxc(async |daemon| {
        let (pod, a) = pod(daemon, &FOREVER).await;
        let pid = pod.run(&a, &Io::none()).await;
        send(monitor("a"), libc::SIGSTOP);
        pod.dies().await;
        let response = delete_dead(daemon, &a).unwrap();
        assert_eq!((response.pid, response.exit_status), (pid, 137));
        daemon.assert_nothing_left();
        the_next_works(daemon, &a).await;
    });
}

#[test]
fn a_monitor_that_stands_still_does_not_keep_back_an_exit() {
    lxc(async |daemon| {
        let (pod, a) = pod(daemon, &shell("sleep 1000 & wait; exit 3")).await;
        pod.run(&a, &Io::none()).await;
        send(monitor("a"), libc::SIGSTOP);
        pod.kill("a", "", libc::SIGKILL, false).await.unwrap();
        assert_eq!(pod.wait("a", "").await.unwrap(), 137);
        is_deleted_clean(daemon, pod, &a, 137).await;
    });
}

#[test]
fn an_init_that_is_killed_before_its_start_has_exited_and_cannot_be_started() {
    lxc(async |daemon| {
        let (pod, a) = pod(daemon, &["touch", "/ran"]).await;
        let pid = pod.create(&a, &Io::none()).await.unwrap();
        send(pid, libc::SIGKILL);
        assert_eq!(pod.wait("a", "").await.unwrap(), 137);
        assert_eq!(pod.status("a").await, Status::STOPPED);
        let refusal = pod.start_process("a", "").await.unwrap_err();
        assert_eq!(refusal.code, Code::FAILED_PRECONDITION, "{}", refusal.text);
        assert!(!a.path.join("upper/ran").exists());
        daemon.hears("exit a 137").await;
        is_deleted_clean(daemon, pod, &a, 137).await;
        assert_eq!(daemon.told()[..3], ["create a", "exit a 137", "delete a 137"]);
    });
}

#[test]
fn a_container_that_reboots_or_powers_off_has_ended_once_and_does_not_come_back() {
    lxc(async |daemon| {
        // reboot(2): "the signal that the init process is terminated with".
        for (program, signal) in [("reboot", libc::SIGHUP), ("poweroff", libc::SIGINT)] {
            let known = daemon.told().len();
            let status = 128 + signal.cast_unsigned();
            let (pod, mut a) = pod(daemon, &shell(&format!("echo up >>/boots; {program} -f; sleep 100000"))).await;
            for set in ["bounding", "effective", "permitted"] {
                let set = a.spec["process"]["capabilities"][set].as_array_mut().unwrap();
                set.push("CAP_SYS_BOOT".into());
            }
            let pid = pod.run(&a, &Io::none()).await;
            assert_eq!(pod.wait("a", "").await.unwrap(), status, "{program}");
            let state = pod.state("a", "").await.unwrap();
            assert_eq!((state.status, state.pid), (Status::STOPPED.into(), pid));
            daemon.hears_after(known, &format!("exit a {status}")).await;
            assert_eq!(pod.delete("a", "").await.unwrap().exit_status, status);
            assert_eq!(
                fs::read_to_string(a.path.join("upper/boots")).unwrap(),
                "up\n",
                "{program}"
            );
            pod.shutdown().await;
            daemon.assert_nothing_left();
            let told = daemon.told().split_off(known);
            let expected = [
                "create a",
                "start a",
                &format!("exit a {status}"),
                &format!("delete a {status}"),
            ];
            assert_eq!(told, expected);
            fs::remove_dir_all(&a.path).unwrap();
        }
    });
}

// ---- systems -----------------------------------------------------------------------------------------------------------------------

/// What containerd gives a container that asks for nothing.
const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// As a client asks for a system: its init, containerd's capabilities and `more`, and a `/sys` that can only be read.
fn as_a_system(a: &mut Bundle, more: &[&str]) {
    let capabilities: Vec<&str> = CAPABILITIES.iter().chain(more).copied().collect();
    for set in ["bounding", "effective", "permitted"] {
        a.spec["process"]["capabilities"][set] = json!(capabilities);
    }
    let mounts = a.spec["mounts"].as_array_mut().unwrap();
    let options = json!(["nosuid", "noexec", "nodev", "ro"]);
    for (destination, kind) in [("/sys", "sysfs"), ("/sys/fs/cgroup", "cgroup")] {
        mounts.push(json!({"destination": destination, "type": kind, "source": kind, "options": options}));
    }
}

/// A container whose init is busybox's, with a line of what it does when the system ends.
fn with_busybox_init(a: &mut Bundle, more: &[&str]) {
    let upper = a.path.join("upper");
    fs::create_dir_all(upper.join("sbin")).unwrap();
    fs::create_dir_all(upper.join("etc")).unwrap();
    std::os::unix::fs::symlink("../bin/busybox", upper.join("sbin/init")).unwrap();
    let inittab = "::sysinit:/bin/sh -c 'echo up >/log'\n::respawn:/bin/sh -c 'touch /ready; exec sleep 100000'\n\
                   ::shutdown:/bin/sh -c 'echo down >>/log'\n";
    fs::write(upper.join("etc/inittab"), inittab).unwrap();
    as_a_system(a, more);
}

/// What a program that is run by an exec prints, and how it ends.
async fn says(pod: &Pod, a: &Bundle, exec: &str, args: &[&str]) -> (u32, String) {
    let io = Io::fifos(&a.path, exec);
    let stdout = io.read_stdout();
    let mut spec = process(args);
    spec["capabilities"] = a.spec["process"]["capabilities"].clone();
    pod.exec(&a.id, exec, &spec, &io).await.unwrap();
    pod.start_process(&a.id, exec).await.unwrap();
    let status = pod.wait(&a.id, exec).await.unwrap();
    let text = stdout.text().await;
    pod.delete(&a.id, exec).await.unwrap();
    (status, text)
}

#[test]
fn a_system_is_ended_by_the_signal_of_its_init_and_its_execs_by_their_own() {
    lxc(async |daemon| {
        // Without CAP_SYS_BOOT init can only exit; with it the kernel tells what it has asked for (reboot(2)).
        for (all, signal, more, status) in [
            (false, libc::SIGTERM, &[][..], 0),
            (
                true,
                libc::SIGTERM,
                &["CAP_SYS_BOOT"],
                128 + libc::SIGINT.cast_unsigned(),
            ),
            (
                false,
                libc::SIGPWR,
                &["CAP_SYS_BOOT"],
                128 + libc::SIGINT.cast_unsigned(),
            ),
            (false, libc::SIGUSR2, &[], 0),
        ] {
            let known = daemon.told().len();
            let (pod, mut a) = pod(daemon, &["/sbin/init"]).await;
            with_busybox_init(&mut a, more);
            pod.run(&a, &Io::none()).await;
            appears(&a.path.join("upper/ready")).await;
            pod.exec("a", "e1", &process(&FOREVER), &Io::none()).await.unwrap();
            pod.start_process("a", "e1").await.unwrap();
            pod.kill("a", "e1", libc::SIGTERM, false).await.unwrap();
            assert_eq!(pod.wait("a", "e1").await.unwrap(), 128 + libc::SIGTERM.cast_unsigned());
            pod.kill("a", "", signal, all).await.unwrap();
            assert_eq!(pod.wait("a", "").await.unwrap(), status, "{signal} {more:?}");
            daemon.hears_after(known, &format!("exit a {status}")).await;
            assert_eq!(fs::read_to_string(a.path.join("upper/log")).unwrap(), "up\ndown\n");
            is_deleted_clean(daemon, pod, &a, status).await;
            let told = exits(daemon, known);
            assert_eq!(told, ["exit e1 143", &format!("exit a {status}"), "exit a 0"]);
        }
    });
}

#[test]
fn a_system_that_does_not_end_by_itself_is_killed() {
    lxc(async |daemon| {
        let (pod, mut a) = pod(daemon, &["/sbin/init"]).await;
        with_busybox_init(&mut a, &[]);
        pod.run(&a, &Io::none()).await;
        appears(&a.path.join("upper/ready")).await;
        pod.kill("a", "", libc::SIGKILL, false).await.unwrap();
        assert_eq!(pod.wait("a", "").await.unwrap(), 137);
        assert_eq!(fs::read_to_string(a.path.join("upper/log")).unwrap(), "up\n");
        is_deleted_clean(daemon, pod, &a, 137).await;
    });
}

#[test]
fn lxc_stop_ends_a_system_in_good_order() {
    lxc(async |daemon| {
        let (pod, mut a) = pod(daemon, &["/sbin/init"]).await;
        with_busybox_init(&mut a, &[]);
        pod.run(&a, &Io::none()).await;
        appears(&a.path.join("upper/ready")).await;
        tool("lxc-stop", &["-n", "a"]).await;
        assert_eq!(pod.wait("a", "").await.unwrap(), 0);
        assert_eq!(fs::read_to_string(a.path.join("upper/log")).unwrap(), "up\ndown\n");
        is_deleted_clean(daemon, pod, &a, 0).await;
    });
}

#[test]
fn a_system_has_what_it_expects_and_an_application_that_is_called_so_has_not() {
    lxc(async |daemon| {
        let script = "tr '\\0' '\\n' </proc/1/environ | grep container=; awk '$2 == \"/run\" {print $3}' /proc/mounts; \
                      for group in /sys/fs/cgroup /sys/fs/cgroup/*/; do mkdir ${group%/}/of-mine 2>/dev/null && echo ${group%/}; done; true";
        for (is_system, program) in [(true, "/sbin/init"), (false, "/bin/init-of-an-application")] {
            let (pod, mut a) = pod(daemon, &[program]).await;
            with_busybox_init(&mut a, &[]);
            let upper = a.path.join("upper");
            fs::create_dir(upper.join("bin")).unwrap();
            let application = upper.join("bin/init-of-an-application");
            fs::write(&application, "#!/bin/sh\ntouch /ready\nexec sleep 100000\n").unwrap();
            fs::set_permissions(&application, fs::Permissions::from_mode(0o755)).unwrap();
            // A limit that must not be in reach of the container.
            a.spec["linux"]["resources"]["pids"] = json!({"limit": 77});
            let pid = pod.run(&a, &Io::none()).await;
            appears(&upper.join("ready")).await;
            let (status, text) = says(&pod, &a, "e1", &shell(script)).await;
            assert_eq!(status, 0);
            let own = match (is_system, cgroup_v2()) {
                (false, _) => "",
                (true, true) => "container=lxc\ntmpfs\n/sys/fs/cgroup\n",
                (true, false) => "container=lxc\ntmpfs\n/sys/fs/cgroup\n/sys/fs/cgroup/systemd\n",
            };
            let top_of_v1 = text.replace("/sys/fs/cgroup/of-mine\n", "");
            assert_eq!(top_of_v1, own, "{program}");
            // The limits are where init is not.
            let token = universe::token();
            let limited: Vec<_> = universe::cgroups_named(&format!("{token}/a"))
                .into_iter()
                .filter(|cgroup| fs::read_to_string(cgroup.join("pids.max")).is_ok_and(|limit| limit == "77\n"))
                .collect();
            assert_eq!(limited.len(), 1, "{limited:?}");
            let holds_init = universe::cgroups_with(&format!("{token}/a"), pid).contains(&limited[0]);
            assert_eq!(holds_init, !(is_system && cgroup_v2()));
            // The whole is what is asked about and acted upon.
            let pids = pod.pids("a").await.unwrap();
            assert!(pids.contains_key(&pid), "{pids:?}");
            pod.pause("a").await.unwrap();
            pod.resume("a").await.unwrap();
            pod.end("a").await;
            pod.shutdown().await;
            daemon.assert_nothing_left();
            fs::remove_dir_all(&a.path).unwrap();
        }
    });
}

/// The file by which Debian's systemd is known, on the machine of the tests.
const SYSTEMD: &str = "/usr/lib/systemd/systemd";

/// The machine's own root file system as a container's, with nothing of what makes it that machine.
fn with_the_machines_system(a: &mut Bundle) {
    let upper = a.path.join("upper");
    let units = upper.join("etc/systemd/system");
    fs::create_dir_all(&units).unwrap();
    // What runs the tests, and what is about disks.
    for unit in [
        "node.service",
        "zfs.target",
        "zfs-volumes.target",
        "systemd-remount-fs.service",
    ] {
        std::os::unix::fs::symlink("/dev/null", units.join(unit)).unwrap();
    }
    fs::write(upper.join("etc/hostname"), "box\n").unwrap();
    let lower = format!("lowerdir={}", busybox().display());
    for option in &mut a.rootfs[0].options {
        if *option == lower {
            *option = "lowerdir=/".into();
        }
    }
    as_a_system(a, &[]);
}

#[test]
fn a_debian_with_systemd_boots_manages_its_cgroup_and_is_halted() {
    if !Path::new(SYSTEMD).exists() || !cgroup_v2() {
        let missing = "no systemd and no cgroup v2 on this machine, whose root file system the container would have";
        return support::skip::skip(
            "lxc::a_debian_with_systemd_boots_manages_its_cgroup_and_is_halted",
            missing,
        );
    }
    lxc(async |daemon| {
        for terminal in [false, true] {
            let (pod, mut a) = pod(daemon, &["/sbin/init"]).await;
            with_the_machines_system(&mut a);
            a.spec["linux"]["resources"]["memory"] = json!({"limit": 1 << 30});
            let (io, console) = match terminal {
                true => {
                    let io = Io::terminal(&a.path, "console");
                    let console = io.read_stdout();
                    (io, Some(console))
                }
                false => (Io::none(), None),
            };
            let stdin = terminal.then(|| io.open_stdin());
            let pid = pod.run(&a, &io).await;
            let own = Path::new("/sys/fs/cgroup").join(universe::token()).join("a");
            let holds_init = || {
                let members = fs::read_to_string(own.join("ns/init.scope/cgroup.procs")).unwrap_or_default();
                members.lines().any(|member| member == pid.to_string()).then_some(())
            };
            until("init in a cgroup that it has made", holds_init).await;
            boots(&pod, &a).await;
            let (status, _) = says(
                &pod,
                &a,
                "run",
                &[
                    "systemd-run",
                    "--unit=limited",
                    "--property=MemoryMax=64M",
                    "sleep",
                    "100000",
                ],
            )
            .await;
            assert_eq!(status, 0);
            let script = "cat /proc/self/cgroup /sys/fs/cgroup/system.slice/limited.service/memory.max";
            let (_, inside) = says(&pod, &a, "look", &shell(script)).await;
            assert_eq!(inside, format!("0::/init.scope\n{}\n", 64 << 20));
            let limit = |path: &str| fs::read_to_string(own.join(path)).unwrap();
            assert_eq!(
                limit("ns/system.slice/limited.service/memory.max"),
                format!("{}\n", 64 << 20)
            );
            assert_eq!(limit("memory.max"), format!("{}\n", 1 << 30));
            let known = daemon.told().len();
            pod.kill("a", "", libc::SIGTERM, false).await.unwrap();
            assert_eq!(pod.wait("a", "").await.unwrap(), 0);
            daemon.hears_after(known, "exit a 0").await;
            drop(stdin);
            assert_eq!(pod.delete("a", "").await.unwrap().exit_status, 0);
            if let Some(console) = console {
                let text = console.text().await;
                assert!(text.contains("Welcome to") && text.contains("System Halt"), "{text}");
            }
            assert_eq!(exits(daemon, known), ["exit a 0"]);
            pod.shutdown().await;
            daemon.assert_nothing_left();
            fs::remove_dir_all(&a.path).unwrap();
        }
    });
}

/// Waits until systemd says that all is started.
async fn boots(pod: &Pod, a: &Bundle) {
    let mut number = 0;
    until_told("systemd has booted", async || {
        number += 1;
        let exec = format!("boots{number}");
        let (_, state) = says(pod, a, &exec, &["systemctl", "is-system-running", "--wait"]).await;
        // Anything else: it does not listen yet.
        matches!(state.trim(), "running" | "degraded").then_some(())
    })
    .await;
}

// ---- what is missing ---------------------------------------------------------------------------------------------------------------

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
        let a = daemon.bundle("a", &shell("echo fine"));
        let mut pod = Pod::start_with(daemon, &a, &start).await;
        pod.options = on(BACKEND);
        // As a package's upgrade does.
        fs::remove_file(&copies[0]).unwrap();
        runs(&pod, &a).await;
        pod.shutdown().await;
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
            for namespace in app.spec["linux"]["namespaces"].as_array_mut().unwrap() {
                let file = match namespace["type"].as_str().unwrap() {
                    "network" => "net",
                    kind @ ("pid" | "ipc" | "uts") => kind,
                    _ => continue,
                };
                namespace["path"] = format!("/proc/{pid}/ns/{file}").into();
            }
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

#[test]
fn an_exec_that_was_given_up_never_becomes_its_program() {
    lxc(async |daemon| {
        let (mut pod, a) = pod(daemon, &FOREVER).await;
        pod.options = Some(options(&format!("backend = \"{BACKEND}\"\nruntime_timeout_ms = 3000")));
        let pid = pod.run(&a, &Io::none()).await;
        // The last file that the helper opens, after it was told to start.
        let passwd = CString::new(a.path.join("rootfs/etc/passwd").as_os_str().as_bytes()).unwrap();
        // SAFETY: integers and a C string; the descriptor is new, and nobody else's.
        let gate = unsafe {
            let gate = libc::fanotify_init(libc::FAN_CLASS_CONTENT | libc::FAN_CLOEXEC, libc::O_RDONLY as u32);
            assert!(gate >= 0, "{}", std::io::Error::last_os_error());
            let marked = libc::fanotify_mark(
                gate,
                libc::FAN_MARK_ADD,
                libc::FAN_OPEN_PERM,
                libc::AT_FDCWD,
                passwd.as_ptr(),
            );
            assert_eq!(marked, 0, "{}", std::io::Error::last_os_error());
            OwnedFd::from_raw_fd(gate)
        };
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
const LOOK: &str = r#"cd /proc/$$
grep -vE '^(Vm|Rss|Hugetlb|.*ctxt_switches|State|Tgid|Ngid|Pid|PPid|NStgid|NSpid|NSpgid|NSsid|FDSize|Threads|SigQ|Name|CoreDumping|untag)' status
sed 's/^/limit /' limits
sed -E 's/^[0-9]+ [0-9]+ [0-9]+:[0-9]+ /mount /; s/shared:[0-9]+/shared/; s/master:[0-9]+/master/; s/overlay rw.*/overlay/' mountinfo
tr '\0' '\n' <environ | sed 's/^/env /'
sed 's/^/cgroup /' cgroup
for fd in 0 1 2 3 4 5 6 7 8 9 10 11 12; do test -e fd/$fd && echo "fd $fd $(readlink fd/$fd | sed 's/[0-9][0-9]*/N/') $(stat -L -c '%u:%g %a' fd/$fd)"; done
for file in oom_score_adj attr/current personality coredump_filter loginuid sessionid setgroups uid_map timerslack_ns; do echo "$file $(cat $file 2>&1 | tr '\0' ' ')"; done
set -- $(sed 's/.*) //' stat); echo "group $3 session $4 terminal $5 foreground $6 priority ${16} nice ${17} rt ${38} policy ${39}"
echo "cwd $(readlink cwd) root $(readlink root) exe $(readlink exe)"
echo "names $(hostname) $(cat /proc/sys/kernel/domainname)"
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
