//! Real cgroups (v1 where it is mounted, v2 by a mount of the test's own), and fixture trees for what this machine's kernel does not
//! show.

use std::{
    ffi::CString,
    fs,
    io::{Read, Write},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{
        LazyLock,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use containerd_shim_protos::{cgroups::metrics as v1, cgroups_v2::metrics as v2, protobuf::Message};

use super::*;
use crate::{error::Kind, patience::patience, skip::skip};

static BOUND: LazyLock<Duration> = LazyLock::new(|| patience(20));

/// A cgroup that a test made, in all of its hierarchies, below a parent of its own; the processes in it are killed and everything is
/// removed at the end.
struct Guard {
    cgroup: Cgroup,
    parents: Vec<PathBuf>,
    /// The test's own mount of v2; it has no place in the tree of files and goes with its descriptor.
    _mount: Option<OwnedFd>,
}

impl Guard {
    fn name() -> String {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        format!("lxcri-unit-test-{}-{number}", std::process::id())
    }

    /// In all v1 hierarchies; `None` says aloud that there are none.
    fn v1() -> Option<Self> {
        let host = Host::read().unwrap();
        let (mounts, _) = host.mounts();
        let mut folders = BTreeMap::new();
        let mut parents = Vec::new();
        let name = Self::name();
        for own in parse::memberships(&host.own) {
            let Some(mount) = mounts.iter().find(|mount| mount.has_controllers(own.controllers)) else {
                continue;
            };
            let parent = mount.point.join(&name);
            let folder = parent.join("ctr");
            fs::create_dir(&parent).unwrap();
            parents.push(parent.clone());
            fs::create_dir(&folder).unwrap();
            if own.controllers.split(',').any(|controller| controller == "cpuset") {
                for (above, below) in [(&mount.point, &parent), (&parent, &folder)] {
                    inherit(above, below, "cpuset.cpus").unwrap();
                    inherit(above, below, "cpuset.mems").unwrap();
                }
            }
            folders.insert(own.controllers.to_owned(), folder);
        }
        if folders.is_empty() {
            // Not by what is tested here: whether the kernel says that there is one.
            let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap();
            assert!(
                !mountinfo.contains(" - cgroup "),
                "hierarchies that were not found:\n{mountinfo}"
            );
            skip("lib::host::cgroup::v1", "no cgroup v1 hierarchy is mounted");
            return None;
        }
        Some(Self {
            cgroup: Cgroup::V1(folders),
            parents,
            _mount: None,
        })
    }

    /// In v2, mounted for this test.
    fn v2() -> Self {
        let mount = mount_cgroup2();
        let parent = PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd())).join(Self::name());
        let folder = parent.join("ctr");
        fs::create_dir(&parent).unwrap();
        let guard = Self {
            cgroup: Cgroup::V2(folder.clone()),
            parents: vec![parent],
            _mount: Some(mount),
        };
        fs::create_dir(&folder).unwrap();
        guard
    }

    /// Both worlds, as far as they are here.
    fn all() -> Vec<Self> {
        Self::v1().into_iter().chain([Self::v2()]).collect()
    }

    /// In the world that has the memory controller, with a limit.
    fn with_memory_limit(bytes: u64) -> Self {
        if let Some(guard) = Self::v1()
            && let Some(folder) = guard.cgroup.v1("memory")
        {
            write(&folder.join("memory.limit_in_bytes"), &bytes.to_string()).unwrap();
            let _ = write(&folder.join("memory.memsw.limit_in_bytes"), &bytes.to_string());
            return guard;
        }
        let guard = Self::v2();
        let Cgroup::V2(folder) = &guard.cgroup else {
            unreachable!()
        };
        for above in [guard.parents[0].parent().unwrap(), &guard.parents[0]] {
            write(&above.join("cgroup.subtree_control"), "+memory").expect("a memory controller, in v1 or v2");
        }
        write(&folder.join("memory.max"), &bytes.to_string()).unwrap();
        let _ = write(&folder.join("memory.swap.max"), "0");
        guard
    }

    fn add(&self, pid: u32) {
        for folder in self.cgroup.folders() {
            write(&folder.join("cgroup.procs"), &pid.to_string()).unwrap();
        }
    }

    /// A shell that is in the cgroup when it runs `script`.
    fn spawn(&self, script: &str) -> Process {
        let mut process = Process::spawn(script);
        self.add(process.pid());
        process.cgroup = Some(self.cgroup.clone());
        process.go()
    }

    fn sub(&self, name: &str) -> Self {
        let made = |folder: &Path| {
            let sub = folder.join(name);
            fs::create_dir(&sub).unwrap();
            if sub.join("cpuset.cpus").exists() {
                inherit(folder, &sub, "cpuset.cpus").unwrap();
                inherit(folder, &sub, "cpuset.mems").unwrap();
            }
            sub
        };
        let cgroup = match &self.cgroup {
            Cgroup::V2(folder) => Cgroup::V2(made(folder)),
            Cgroup::V1(folders) => Cgroup::V1(folders.iter().map(|(c, folder)| (c.clone(), made(folder))).collect()),
        };
        Self {
            cgroup,
            parents: Vec::new(),
            _mount: None,
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        for parent in &self.parents {
            let _ = tree::walk(parent, &mut |at| {
                let _ = tree::write_at(at, "freezer.state", "THAWED");
                let _ = tree::write_at(at, "cgroup.freeze", "0");
                Ok(())
            });
            // What a test spawned dies with its `Process`; this is for what those left behind.
            let end = std::time::Instant::now() + *BOUND;
            while std::time::Instant::now() < end {
                for pid in tree::pids(parent).unwrap_or_default() {
                    // SAFETY: only sends a signal, to a process in this test's own cgroup.
                    unsafe { libc::kill(pid as i32, libc::SIGKILL) };
                }
                match tree::remove(parent) {
                    Ok(()) => break,
                    Err(_) => std::thread::yield_now(),
                }
            }
        }
    }
}

/// A shell script that waits for its start, says "ready", and is killed at the end.
struct Process {
    child: Child,
    stdin: Option<ChildStdin>,
    /// Where it may be frozen.
    cgroup: Option<Cgroup>,
}

impl Process {
    fn spawn(script: &str) -> Self {
        let mut child = Command::new("/bin/sh")
            .args(["-c", &format!("read go; echo ready; {script}")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take();
        Self {
            child,
            stdin,
            cgroup: None,
        }
    }

    fn go(mut self) -> Self {
        self.say("go");
        assert_eq!(self.line(), "ready");
        self
    }

    fn say(&mut self, line: &str) {
        writeln!(self.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    /// One line of its output, not a byte more.
    fn line(&mut self) -> String {
        let mut line = Vec::new();
        let mut byte = [0];
        while self.child.stdout.as_mut().unwrap().read(&mut byte).unwrap() == 1 && byte != *b"\n" {
            line.push(byte[0]);
        }
        String::from_utf8(line).unwrap()
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn signal_that_ended_it(&mut self) -> Option<i32> {
        use std::os::unix::process::ExitStatusExt;
        self.child.wait().unwrap().signal()
    }

    fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        for folder in self.cgroup.iter().flat_map(Cgroup::folders) {
            // Up to the test's own parent: a failed test may have left any of them frozen.
            for folder in folder.ancestors().take(4) {
                let _ = write(&folder.join("freezer.state"), "THAWED");
            }
        }
        let _ = self.child.wait();
    }
}

/// A mount of cgroup2 that is in nobody's tree, with the flags of those that are: the hierarchy has one set, and takes the last mount's.
fn mount_cgroup2() -> OwnedFd {
    let flags_of_the_machine = || {
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mut mounts = mountinfo.lines().filter_map(|line| line.split_once(" - cgroup2 "));
        let flags = mounts.next().and_then(|(_, rest)| rest.split_once(' '));
        flags.map_or(String::new(), |(_, flags)| flags.to_owned())
    };
    let before = flags_of_the_machine();
    let flags: Vec<CString> = before
        .split(',')
        .filter(|flag| !["", "rw", "ro"].contains(flag))
        .map(|flag| CString::new(flag).unwrap())
        .collect();
    let fd = |rc: libc::c_long| {
        assert!(rc >= 0, "{}", std::io::Error::last_os_error());
        // SAFETY: a descriptor that the kernel has just handed out.
        unsafe { OwnedFd::from_raw_fd(rc as i32) }
    };
    // SAFETY: the strings end with NUL and live during the calls.
    unsafe {
        let context = fd(libc::syscall(libc::SYS_fsopen, c"cgroup2".as_ptr(), 1));
        let (set_flag, create) = (0, 6);
        let null = std::ptr::null::<libc::c_char>();
        for flag in &flags {
            assert_eq!(
                libc::syscall(
                    libc::SYS_fsconfig,
                    context.as_raw_fd(),
                    set_flag,
                    flag.as_ptr(),
                    null,
                    0
                ),
                0,
                "{flag:?}"
            );
        }
        assert_eq!(
            libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), create, null, null, 0),
            0
        );
        assert_eq!(flags_of_the_machine(), before);
        fd(libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), 1, 0))
    }
}

/// A v2 cgroup of plain files.
fn fixture(files: &[(&str, &str)]) -> (tempfile::TempDir, Cgroup) {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        fs::write(folder.path().join(name), text).unwrap();
    }
    let cgroup = Cgroup::V2(folder.path().to_path_buf());
    (folder, cgroup)
}

/// A host whose hierarchies are folders below `root`.
fn host(root: &Path, mountinfo: &str, own: &str) -> Host {
    Host {
        root: root.to_path_buf(),
        mountinfo: mountinfo.replace("/sys/fs/cgroup", root.to_str().unwrap()),
        own: own.to_owned(),
    }
}

const HYBRID: &str = include_str!("fixtures/mountinfo-hybrid");
const HYBRID_OWN: &str = "9:cpu,cpuacct:/\n8:memory:/shim/own\n7:freezer:/\n1:name=systemd:/\n0::/\n";
const UNIFIED: &str = "24 1 0:22 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n";
const UNIFIED_OWN: &str = "0::/system.slice/containerd.service\n";

fn made(root: &Path, folders: &[&str]) {
    for folder in folders {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
}

// Where a cgroup lies.

#[test]
fn a_process_is_found_in_its_own_cgroup() {
    for guard in Guard::all() {
        let process = guard.spawn("read x");
        match &guard.cgroup {
            Cgroup::V1(_) => assert_eq!(Cgroup::of_process(process.pid()).unwrap(), guard.cgroup),
            Cgroup::V2(folder) => {
                // Elsewhere v1 speaks, or v2 is mounted in another place.
                let root = guard.parents[0].parent().unwrap();
                let host = host(root, UNIFIED, "0::/\n");
                let text = fs::read_to_string(format!("/proc/{}/cgroup", process.pid())).unwrap();
                assert_eq!(host.resolve(&text).unwrap(), Cgroup::V2(folder.clone()));
            }
        }
        assert_eq!(guard.cgroup.pids().unwrap(), [process.pid()]);
    }
}

#[test]
fn our_own_cgroup_is_nobodys_container() {
    let error = Cgroup::of_process(std::process::id()).unwrap_err();
    assert_eq!(error.kind(), Kind::FailedPrecondition);
    let error = Cgroup::of_process(u32::MAX >> 1).unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
}

#[test]
fn in_hybrid_mode_v1_speaks_and_hierarchies_not_joined_are_left_out() {
    let root = tempfile::tempdir().unwrap();
    made(
        root.path(),
        &["cpu,cpuacct/c", "memory/c", "systemd/c", "unified/c", "freezer/c"],
    );
    let host = host(root.path(), HYBRID, HYBRID_OWN);
    let cgroup = host
        .resolve("9:cpu,cpuacct:/c\n8:memory:/c\n7:freezer:/\n1:name=systemd:/c\n0::/c\n")
        .unwrap();
    let at = |folder: &str| root.path().join(folder);
    assert_eq!(
        cgroup,
        Cgroup::V1(BTreeMap::from([
            ("cpu,cpuacct".into(), at("cpu,cpuacct/c")),
            ("memory".into(), at("memory/c")),
            ("name=systemd".into(), at("systemd/c")),
            ("unified".into(), at("unified/c")),
        ]))
    );
    assert!(!cgroup.is_v2());
    assert_eq!(cgroup.v1("cpuacct"), Some(at("cpu,cpuacct/c").as_path()));
}

#[test]
fn a_hierarchy_that_is_covered_by_a_later_mount_is_none() {
    let root = tempfile::tempdir().unwrap();
    // What runtimes leave in the folder that covers it looks like a cgroup.
    made(root.path(), &["memory/c", "unified/c"]);
    let covered = format!("{HYBRID}999 30 0:99 / /sys/fs/cgroup/unified rw - tmpfs none rw\n");
    let host = host(root.path(), &covered, HYBRID_OWN);
    let cgroup = host
        .resolve("9:cpu,cpuacct:/\n8:memory:/c\n7:freezer:/\n1:name=systemd:/\n0::/c\n")
        .unwrap();
    let memory = root.path().join("memory/c");
    assert_eq!(cgroup, Cgroup::V1(BTreeMap::from([("memory".into(), memory)])));
}

#[test]
fn roots_our_own_cgroup_and_those_above_it_are_refused() {
    let root = tempfile::tempdir().unwrap();
    made(
        root.path(),
        &["memory/shim/own", "unified/c", "system.slice/containerd.service/x"],
    );
    let hybrid = host(root.path(), HYBRID, HYBRID_OWN);
    for memory in ["/", "/shim", "/shim/own"] {
        let text = format!("9:cpu,cpuacct:/\n8:memory:{memory}\n7:freezer:/\n1:name=systemd:/\n0::/\n");
        assert_eq!(
            hybrid.resolve(&text).unwrap_err().kind(),
            Kind::FailedPrecondition,
            "{memory}"
        );
    }
    // v2 alone has no controllers on a hybrid host.
    assert!(hybrid.resolve("8:memory:/\n0::/c\n").is_err());
    let unified = host(root.path(), UNIFIED, UNIFIED_OWN);
    for path in ["/", "/system.slice", "/system.slice/containerd.service"] {
        assert_eq!(
            unified.resolve(&format!("0::{path}\n")).unwrap_err().kind(),
            Kind::FailedPrecondition
        );
    }
    assert!(unified.resolve("0::/system.slice/containerd.service/x\n").is_ok());
    assert_eq!(
        unified.resolve("0::/gone (deleted)\n").unwrap_err().kind(),
        Kind::NotFound
    );
    assert_eq!(
        unified.resolve("0::/../elsewhere\n").unwrap_err().kind(),
        Kind::NotFound
    );
}

#[test]
fn in_unified_mode_v2_speaks_even_beside_a_named_hierarchy() {
    let root = tempfile::tempdir().unwrap();
    made(root.path(), &["c", "systemd/c"]);
    let mounts = format!("{UNIFIED}25 24 0:23 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n");
    let host = host(root.path(), &mounts, "1:name=systemd:/\n0::/me\n");
    let cgroup = host.resolve("1:name=systemd:/c\n0::/c\n").unwrap();
    assert_eq!(cgroup, Cgroup::V2(root.path().join("c")));
    assert!(cgroup.is_v2());
}

#[test]
fn a_mount_of_a_part_of_the_hierarchy_shows_what_lies_below_that_part() {
    let root = tempfile::tempdir().unwrap();
    made(root.path(), &["c"]);
    let mounts = "24 1 0:22 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
    let host = host(root.path(), mounts, "0::/docker/abc/me\n");
    assert_eq!(
        host.resolve("0::/docker/abc/c\n").unwrap(),
        Cgroup::V2(root.path().join("c"))
    );
    assert!(host.resolve("0::/docker/other\n").is_err());
}

#[test]
fn after_a_crash_the_container_is_found_where_crun_puts_it() {
    let root = tempfile::tempdir().unwrap();
    made(
        root.path(),
        &[
            "memory/k8s.io/x",
            "freezer/k8s.io/x",
            "freezer/only-there",
            "memory/shim/own",
        ],
    );
    let hybrid = host(root.path(), HYBRID, HYBRID_OWN);
    let found = hybrid.existing(Path::new("k8s.io/x")).unwrap().unwrap();
    assert_eq!(found.folders().len(), 2);
    assert_eq!(
        hybrid
            .existing(Path::new("only-there"))
            .unwrap()
            .unwrap()
            .folders()
            .len(),
        1
    );
    assert_eq!(hybrid.existing(Path::new("k8s.io/y")).unwrap(), None);
    assert_eq!(
        hybrid.existing(Path::new("shim")).unwrap_err().kind(),
        Kind::FailedPrecondition
    );

    let root = tempfile::tempdir().unwrap();
    made(root.path(), &["system.slice/containerd.service", "system.slice/id"]);
    let unified = host(root.path(), UNIFIED, UNIFIED_OWN);
    assert_eq!(unified.sibling("id").unwrap(), Path::new("system.slice/id"));
    let found = unified.existing(&unified.sibling("id").unwrap()).unwrap().unwrap();
    assert_eq!(found, Cgroup::V2(root.path().join("system.slice/id")));
}

#[test]
fn what_is_expected_here_is_what_is_there() {
    assert_eq!(
        Cgroup::expected(Some("/lxcri-unit-test-absent/x"), false, "x").unwrap(),
        None
    );
    assert_eq!(Cgroup::expected(Some(""), false, "x").unwrap(), None);
    let invalid = Cgroup::expected(Some("/a/../../b"), false, "x").unwrap_err();
    assert_eq!(invalid.kind(), Kind::InvalidArgument);
    if let Some(guard) = Guard::v1() {
        let name = guard.parents[0].file_name().unwrap().to_str().unwrap();
        let found = Cgroup::expected(Some(&format!("{name}/ctr")), false, "x").unwrap();
        assert_eq!(found, Some(guard.cgroup.clone()));
    }
}

#[test]
fn a_cgroup_survives_the_record_on_disk() {
    for guard in Guard::all() {
        let text = serde_json::to_string(&guard.cgroup).unwrap();
        assert_eq!(serde_json::from_str::<Cgroup>(&text).unwrap(), guard.cgroup);
    }
}

#[test]
fn the_shim_joins_a_cgroup_that_did_not_exist() {
    let mut process = Process::spawn("read x");
    let name = Guard::name();
    let path = format!("/{name}/shim");
    join(&path, process.pid()).unwrap();
    let cgroup = Cgroup::of_process(process.pid()).unwrap();
    // Everything that it made is removed by this guard.
    let _guard = Guard {
        parents: cgroup
            .folders()
            .iter()
            .map(|folder| folder.parent().unwrap().to_path_buf())
            .collect(),
        cgroup: cgroup.clone(),
        _mount: None,
    };
    let text = fs::read_to_string(format!("/proc/{}/cgroup", process.pid())).unwrap();
    let elsewhere =
        parse::memberships(&text).filter(|m| m.path != path && (cgroup.is_v2() || !m.controllers.is_empty()));
    assert_eq!(elsewhere.collect::<Vec<_>>(), []);
    // It is there already: joining again is fine.
    join(&path, process.pid()).unwrap();
    assert!(process.is_running());
}

#[test]
fn joining_leaves_nothing_behind_when_it_fails() {
    let path = format!("{}/shim", Guard::name());
    let nobody = u32::MAX >> 1;
    assert!(join(&path, nobody).is_err());
    let host = Host::read().unwrap();
    for mount in host.mounts().0 {
        assert!(
            !mount.point.join(&path).parent().unwrap().exists(),
            "{}",
            mount.point.display()
        );
    }
    for root in ["", "/", "/a/../b"] {
        assert_eq!(join(root, nobody).unwrap_err().kind(), Kind::InvalidArgument);
    }
}

// Processes and signals.

#[test]
fn the_processes_of_the_whole_subtree_are_listed_in_order() {
    for guard in Guard::all() {
        let sub = guard.sub("sub");
        let deeper = sub.sub("deeper");
        let processes = [deeper.spawn("read x"), guard.spawn("read x"), sub.spawn("read x")];
        let mut pids: Vec<u32> = processes.iter().map(Process::pid).collect();
        pids.sort_unstable();
        assert_eq!(guard.cgroup.pids().unwrap(), pids);
        assert_eq!(deeper.cgroup.pids().unwrap(), [processes[0].pid()]);
    }
}

#[test]
fn a_process_is_lifted_out_of_a_cgroup_whose_parent_hands_on_controllers_and_taken_back() {
    for guard in Guard::all() {
        let inner = guard.sub("ns");
        let control = guard.cgroup.folder().join("cgroup.subtree_control");
        let mut one = None;
        if guard.cgroup.is_v2() {
            let top = guard.parents[0].parent().unwrap();
            let all = fs::read_to_string(top.join("cgroup.controllers")).unwrap();
            // One that takes no processes beside cgroups. A kernel whose controllers are all v1's has none to hand on.
            let known = ["memory", "pids", "hugetlb", "misc"];
            one = all
                .split_whitespace()
                .find(|name| known.contains(name))
                .map(str::to_owned);
            for above in [top, &guard.parents[0]] {
                one.iter()
                    .for_each(|one| write(&above.join("cgroup.subtree_control"), &format!("+{one}")).unwrap());
            }
        }
        let hand_on = || one.iter().for_each(|one| write(&control, &format!("+{one}")).unwrap());
        let handed_on = || fs::read_to_string(&control).unwrap_or_default().trim().to_owned();
        let process = inner.spawn("read x");
        let pid = process.pid();
        let direct = |cgroup: &Cgroup| {
            let files = cgroup.folders().into_iter().map(|folder| folder.join("cgroup.procs"));
            files.map(|file| fs::read_to_string(file).unwrap()).collect::<String>()
        };
        let up = || {
            guard.add(pid);
            assert_eq!((direct(&inner.cgroup), handed_on()), (String::new(), String::new()));
            Ok(())
        };
        hand_on();
        // As LXC delegates to the root of a user namespace.
        let prefix = format!("{}.", one.as_deref().unwrap_or("cgroup"));
        let files = fs::read_dir(inner.cgroup.folder())
            .unwrap()
            .map(|entry| entry.unwrap().path());
        let mut of_controller = files.filter(|path| path.file_name().unwrap().to_string_lossy().starts_with(&prefix));
        let some = of_controller.next().unwrap();
        std::os::unix::fs::chown(&some, Some(1234), Some(5678)).unwrap();
        guard.cgroup.lift("ns", pid, up).unwrap();
        let of = fs::metadata(&some).unwrap();
        assert_eq!((of.uid(), of.gid()), (1234, 5678), "{some:?}");
        assert_eq!(
            (inner.cgroup.pids().unwrap(), direct(&guard.cgroup)),
            (vec![pid], String::new())
        );
        assert_eq!(handed_on(), one.clone().unwrap_or_default());

        let error = guard
            .cgroup
            .lift("ns", pid, || Err(Error::unavailable("no bus")))
            .unwrap_err();
        assert_eq!((error.kind(), error.to_string()), (Kind::Unavailable, "no bus".into()));
        assert_eq!(handed_on(), "");
        hand_on();
        let error = guard.cgroup.lift("none", pid, || Ok(())).unwrap_err();
        assert_eq!(error.kind(), Kind::Unknown, "{error}");
        assert_eq!(handed_on(), one.unwrap_or_default());
    }
}

#[tokio::test]
async fn a_cgroup_that_is_gone_is_not_found_by_readers_and_fine_for_those_who_end_it() {
    for guard in Guard::all() {
        guard.cgroup.remove(*BOUND).await.unwrap();
        let errors = [
            guard.cgroup.pids().unwrap_err(),
            guard.cgroup.metrics().unwrap_err(),
            guard.cgroup.signal_all(0).unwrap_err(),
            guard.cgroup.is_frozen().unwrap_err(),
            guard.cgroup.freeze(*BOUND).await.unwrap_err(),
            guard.cgroup.watch_oom().map(|_| ()).unwrap_err(),
        ];
        for error in errors {
            assert_eq!(error.kind(), Kind::NotFound, "{error}");
            assert!(error.to_string().starts_with("cgroup does not exist"), "{error}");
        }
        guard.cgroup.kill_all(*BOUND).await.unwrap();
        guard.cgroup.remove(*BOUND).await.unwrap();
    }
}

#[test]
fn a_signal_reaches_every_process_of_the_subtree_and_no_other() {
    for guard in Guard::all() {
        let sub = guard.sub("sub");
        let script = "trap 'echo got it; exit' USR1; echo armed; while :; do read x; done";
        let mut inside = [guard.spawn(script), sub.spawn(script)];
        let mut outside = Process::spawn(script).go();
        for process in inside.iter_mut().chain([&mut outside]) {
            assert_eq!(process.line(), "armed");
        }
        assert_eq!(guard.cgroup.signal_all(libc::SIGUSR1).unwrap(), 2);
        for process in &mut inside {
            // A shell handles the signal when its `read` returns.
            assert_eq!(process.line(), "got it");
        }
        assert!(outside.is_running());
        assert_eq!(guard.cgroup.signal_all(1000).unwrap_err().kind(), Kind::InvalidArgument);
    }
}

#[tokio::test]
async fn kill_all_ends_the_whole_subtree_also_when_it_is_frozen() {
    for guard in Guard::all() {
        let sub = guard.sub("sub");
        let mut processes = [guard.spawn("trap '' TERM; read x"), sub.spawn("read x")];
        sub.cgroup.freeze(*BOUND).await.unwrap();
        guard.cgroup.freeze(*BOUND).await.unwrap();
        guard.cgroup.kill_all(*BOUND).await.unwrap();
        assert_eq!(guard.cgroup.pids().unwrap(), [0_u32; 0]);
        for process in &mut processes {
            assert_eq!(process.signal_that_ended_it(), Some(libc::SIGKILL));
        }
        guard.cgroup.kill_all(*BOUND).await.unwrap();
    }
}

/// A process that forks as fast as it can, and so do its children, once it is in the cgroup.
fn fork_bomb(guard: &Guard, limiter: Option<&Guard>) -> libc::pid_t {
    let (read, write_end) = nix::unistd::pipe().unwrap();
    // SAFETY: the child of a threaded process makes only async-signal-safe calls until it is killed.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        // SAFETY: as above; the buffer is one byte.
        unsafe {
            libc::close(write_end.as_raw_fd());
            let mut byte = 0_u8;
            libc::read(read.as_raw_fd(), std::ptr::from_mut(&mut byte).cast(), 1);
            loop {
                libc::fork();
            }
        }
    }
    for guard in limiter.into_iter().chain([guard]) {
        guard.add(pid as u32);
    }
    drop(write_end);
    pid
}

/// At most 40 processes, by whichever hierarchy can limit them: so a test that fails does not take the machine with it.
fn limit_processes(guard: &Guard) -> Option<Guard> {
    let other = if guard.cgroup.is_v2() { Guard::v1() } else { None };
    let limiter = other.as_ref().unwrap_or(guard);
    if limiter.cgroup.is_v2() {
        for above in [guard.parents[0].parent().unwrap(), &guard.parents[0]] {
            write(&above.join("cgroup.subtree_control"), "+pids").unwrap();
        }
    }
    let folder = limiter.cgroup.v1("pids").unwrap_or(limiter.cgroup.folder());
    write(&folder.join("pids.max"), "40").expect("a pids controller, in v1 or v2");
    other
}

#[tokio::test]
async fn kill_all_outruns_a_fork_bomb() {
    for guard in Guard::all() {
        let limiter = limit_processes(&guard);
        let pid = fork_bomb(&guard, limiter.as_ref());
        while guard.cgroup.pids().unwrap().len() < 30 {
            std::thread::yield_now();
        }
        guard.cgroup.kill_all(*BOUND).await.unwrap();
        assert_eq!(guard.cgroup.pids().unwrap(), [0_u32; 0]);
        // SAFETY: reaps the child of this test, which nobody else knows.
        unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
    }
}

#[tokio::test]
async fn kill_all_sees_the_end_of_a_cgroup_that_somebody_else_removes_at_once() {
    // As systemd does with an empty scope. That the frozen process is no longer frozen is told, that it is gone is not.
    for _ in 0..20 {
        let guard = Guard::v2();
        let _process = guard.spawn("read x");
        guard.cgroup.freeze(*BOUND).await.unwrap();
        let folder = guard.cgroup.folder().to_path_buf();
        let remover = std::thread::spawn(move || while fs::remove_dir(&folder).is_err() {});
        guard.cgroup.kill_all(*BOUND).await.unwrap();
        remover.join().unwrap();
    }
}

// Freeze.

#[tokio::test]
async fn a_frozen_container_does_not_run_until_it_is_thawed() {
    for guard in Guard::all() {
        let mut process = guard.spawn("while read x; do echo $x; done");
        assert!(!guard.cgroup.is_frozen().unwrap());
        guard.cgroup.freeze(*BOUND).await.unwrap();
        guard.cgroup.freeze(*BOUND).await.unwrap();
        assert!(guard.cgroup.is_frozen().unwrap());
        process.say("hello");
        guard.cgroup.thaw(*BOUND).await.unwrap();
        assert!(!guard.cgroup.is_frozen().unwrap());
        assert_eq!(process.line(), "hello");
    }
}

#[tokio::test]
async fn a_freeze_waits_until_the_kernel_says_that_it_is_done() {
    let (folder, cgroup) = fixture(&[("cgroup.events", "populated 1\nfrozen 0\n"), ("cgroup.freeze", "0")]);
    let freeze = tokio::spawn(async move { cgroup.freeze(*BOUND).await });
    while fs::read_to_string(folder.path().join("cgroup.freeze")).unwrap() != "1" {
        tokio::task::yield_now().await;
    }
    assert!(!freeze.is_finished());
    fs::write(folder.path().join("cgroup.events"), "populated 1\nfrozen 1\n").unwrap();
    freeze.await.unwrap().unwrap();
    assert_eq!(fs::read_to_string(folder.path().join("cgroup.freeze")).unwrap(), "1");
}

#[tokio::test(start_paused = true)]
async fn a_freeze_that_does_not_come_is_taken_back() {
    let (folder, cgroup) = fixture(&[("cgroup.events", "populated 1\nfrozen 0\n"), ("cgroup.freeze", "0")]);
    let error = cgroup.freeze(*BOUND).await.unwrap_err();
    assert_eq!(error.kind(), Kind::DeadlineExceeded, "{error}");
    assert_eq!(fs::read_to_string(folder.path().join("cgroup.freeze")).unwrap(), "0");

    let mut freeze = Box::pin(cgroup.freeze(*BOUND));
    std::future::poll_fn(|context| {
        assert!(freeze.as_mut().poll(context).is_pending());
        std::task::Poll::Ready(())
    })
    .await;
    assert_eq!(fs::read_to_string(folder.path().join("cgroup.freeze")).unwrap(), "1");
    drop(freeze);
    assert_eq!(fs::read_to_string(folder.path().join("cgroup.freeze")).unwrap(), "0");
}

#[tokio::test(start_paused = true)]
async fn a_v1_freezer_that_stays_at_freezing_is_given_up() {
    let folder = tempfile::tempdir().unwrap();
    // Takes what is written and never says FROZEN.
    std::os::unix::fs::symlink("/dev/null", folder.path().join("freezer.state")).unwrap();
    let cgroup = Cgroup::V1(BTreeMap::from([("freezer".into(), folder.path().to_path_buf())]));
    let error = cgroup.freeze(*BOUND).await.unwrap_err();
    assert_eq!(error.kind(), Kind::DeadlineExceeded, "{error}");
}

#[tokio::test]
async fn without_a_freezer_there_is_no_pause() {
    let (_folder, v2) = fixture(&[("cgroup.events", "populated 1\n")]);
    let v1 = Cgroup::V1(BTreeMap::from([("memory".into(), PathBuf::from("/sys"))]));
    for cgroup in [v1, v2] {
        let error = cgroup.freeze(*BOUND).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unimplemented, "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_a_change_sleeps_until_there_is_one() {
    let guard = Guard::v2();
    let events = watch::Changes::open(&guard.cgroup.folder().join("cgroup.events")).unwrap();
    let mut rings = 0;
    loop {
        assert_eq!(events.read().unwrap(), "populated 0\nfrozen 0\n");
        tokio::select! {
            biased;
            rung = events.changed() => rung.unwrap(),
            // The paused clock moves when there is nothing else to do.
            () = tokio::time::sleep(*BOUND) => break,
        }
        rings += 1;
        assert!(rings < 5, "it rings without a change");
    }
    write(&guard.cgroup.folder().join("cgroup.freeze"), "1").unwrap();
    tokio::time::resume();
    tokio::time::timeout(*BOUND, events.changed()).await.unwrap().unwrap();
}

// Removal.

#[tokio::test]
async fn removal_takes_the_subtree_and_its_processes_and_nothing_above() {
    for guard in Guard::all() {
        let sub = guard.sub("sub");
        let _deeper = sub.sub("deeper");
        let other = guard.sub("other");
        let mut process = other.spawn("read x");
        other.cgroup.freeze(*BOUND).await.unwrap();
        guard.cgroup.remove(*BOUND).await.unwrap();
        assert_eq!(process.signal_that_ended_it(), Some(libc::SIGKILL));
        for folder in guard.cgroup.folders() {
            assert!(!folder.exists());
            assert!(folder.parent().unwrap().exists());
        }
        guard.cgroup.remove(*BOUND).await.unwrap();
    }
}

#[tokio::test]
async fn cgroups_nested_deeper_than_a_path_can_name_are_listed_and_removed() {
    use nix::{
        fcntl::{OFlag, openat},
        sys::stat::{Mode, mkdirat},
    };
    let guard = Guard::v2();
    let name = "n".repeat(200);
    let mut at = OwnedFd::from(fs::File::open(guard.cgroup.folder()).unwrap());
    for _ in 0..30 {
        mkdirat(&at, name.as_str(), Mode::S_IRWXU).unwrap();
        at = openat(&at, name.as_str(), OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).unwrap();
    }
    let process = Process::spawn("read x");
    tree::write_at(
        std::os::fd::AsFd::as_fd(&at),
        "cgroup.procs",
        &process.pid().to_string(),
    )
    .unwrap();
    assert_eq!(guard.cgroup.pids().unwrap(), [process.pid()]);
    guard.cgroup.remove(*BOUND).await.unwrap();
    assert!(!guard.cgroup.folder().exists());
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_removed_is_named_and_the_rest_goes() {
    let root = tempfile::tempdir().unwrap();
    made(root.path(), &["memory", "freezer/a", "freezer/b"]);
    // A folder with a file in it is what no cgroup is; rmdir refuses.
    fs::write(root.path().join("memory/file"), "").unwrap();
    let folders = ["memory", "freezer", "gone"].map(|name| (name.to_owned(), root.path().join(name)));
    let error = Cgroup::V1(BTreeMap::from(folders)).remove(*BOUND).await.unwrap_err();
    assert!(error.to_string().contains("/memory"), "{error}");
    assert!(!root.path().join("freezer").exists());
    assert!(root.path().join("memory/file").exists());
}

// Metrics.

#[test]
fn v1_metrics_are_those_of_the_processes() {
    let Some(guard) = Guard::v1() else { return };
    let mut process = guard.spawn("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo done; read x");
    assert_eq!(process.line(), "done");
    let metrics = guard.cgroup.metrics().unwrap();
    assert_eq!(metrics.type_url, "io.containerd.cgroups.v1.Metrics");
    let metrics = v1::Metrics::parse_from_bytes(&metrics.value).unwrap();
    assert!(metrics.cpu.usage.total > 0);
    assert!(metrics.cpu.usage.per_cpu.iter().sum::<u64>() >= metrics.cpu.usage.total);
    assert!(metrics.cpu.throttling.is_some());
    assert_eq!(metrics.pids.current, 1);
    assert_eq!(metrics.pids.limit, 0);
    assert!(metrics.memory.usage.usage > 0);
    assert!(metrics.memory.usage.max >= metrics.memory.usage.usage);
    assert!(metrics.memory.usage.limit > 1 << 60);
    assert!(metrics.memory.hierarchical_memory_limit > 1 << 60);
    assert_eq!(metrics.memory_oom_control.oom_kill, 0);
    assert!(metrics.blkio.is_some());
    // Not mounted here, so not there.
    assert_eq!(metrics.hugetlb.is_empty(), guard.cgroup.v1("hugetlb").is_none());
    assert_eq!(metrics.rdma.is_none(), guard.cgroup.v1("rdma").is_none());
}

#[test]
fn v1_metrics_have_containerds_units_and_names() {
    let root = tempfile::tempdir().unwrap();
    made(
        root.path(),
        &["cpu,cpuacct", "memory", "pids", "blkio", "hugetlb", "rdma"],
    );
    let page = fs::read_dir("/sys/kernel/mm/hugepages")
        .unwrap()
        .find_map(|entry| parse::huge_page_size(entry.unwrap().file_name().to_str().unwrap()))
        .expect("a kernel with huge pages");
    let ticks = clock_ticks();
    let files = [
        ("cpu,cpuacct/cpuacct.usage", "5000\n".to_owned()),
        ("cpu,cpuacct/cpuacct.usage_percpu", "2000 3000 \n".into()),
        (
            "cpu,cpuacct/cpuacct.stat",
            format!("user {}\nsystem {}\n", 3 * ticks, 2 * ticks),
        ),
        (
            "cpu,cpuacct/cpu.stat",
            "nr_periods 1\nnr_throttled 2\nthrottled_time 3\n".into(),
        ),
        (
            "memory/memory.stat",
            "cache 1\npgpgin 2\ntotal_pgmajfault 3\nhierarchical_memsw_limit 4\n".into(),
        ),
        ("memory/memory.usage_in_bytes", "10\n".into()),
        ("memory/memory.memsw.limit_in_bytes", "20\n".into()),
        ("memory/memory.kmem.max_usage_in_bytes", "30\n".into()),
        ("memory/memory.kmem.tcp.failcnt", "40\n".into()),
        (
            "memory/memory.oom_control",
            "oom_kill_disable 1\nunder_oom 0\noom_kill 7\n".into(),
        ),
        ("pids/pids.current", "3\n".into()),
        ("pids/pids.max", "100\n".into()),
        (
            "blkio/blkio.throttle.io_serviced_recursive",
            "999:9 Read 4\nTotal 4\n".into(),
        ),
        (
            "blkio/blkio.throttle.io_service_bytes",
            "999:9 Write 8\nTotal 8\n".into(),
        ),
        ("blkio/blkio.sectors_recursive", "999:9 16\n".into()),
        ("rdma/rdma.current", "mlx4_0 hca_handle=1 hca_object=2\n".into()),
        ("rdma/rdma.max", "mlx4_0 hca_handle=max hca_object=9\n".into()),
    ];
    for (name, text) in &files {
        fs::write(root.path().join(name), text).unwrap();
    }
    fs::write(root.path().join(format!("hugetlb/hugetlb.{page}.usage_in_bytes")), "5").unwrap();
    fs::write(root.path().join(format!("hugetlb/hugetlb.{page}.failcnt")), "6").unwrap();
    let folders = ["cpu,cpuacct", "memory", "pids", "blkio", "hugetlb", "rdma"];
    let cgroup = Cgroup::V1(folders.map(|name| (name.to_owned(), root.path().join(name))).into());
    let metrics = v1::Metrics::parse_from_bytes(&cgroup.metrics().unwrap().value).unwrap();
    let usage = &metrics.cpu.usage;
    assert_eq!(
        (usage.total, usage.user, usage.kernel),
        (5000, 3_000_000_000, 2_000_000_000)
    );
    assert_eq!(usage.per_cpu, [2000, 3000]);
    let throttling = &metrics.cpu.throttling;
    assert_eq!(
        (
            throttling.periods,
            throttling.throttled_periods,
            throttling.throttled_time
        ),
        (1, 2, 3)
    );
    let memory = &metrics.memory;
    assert_eq!((memory.cache, memory.pg_pg_in), (1, 2));
    assert_eq!((memory.total_pg_maj_fault, memory.hierarchical_swap_limit), (3, 4));
    assert_eq!((memory.usage.usage, memory.swap.limit), (10, 20));
    assert_eq!((memory.kernel.max, memory.kernel_tcp.failcnt), (30, 40));
    let oom = &metrics.memory_oom_control;
    assert_eq!((oom.oom_kill_disable, oom.under_oom, oom.oom_kill), (1, 0, 7));
    assert_eq!((metrics.pids.current, metrics.pids.limit), (3, 100));
    let line = |entries: &[v1::BlkIOEntry]| {
        entries
            .iter()
            .map(|e| (e.major, e.minor, e.op.clone(), e.value))
            .collect::<Vec<_>>()
    };
    assert_eq!(line(&metrics.blkio.io_serviced_recursive), [(999, 9, "Read".into(), 4)]);
    assert_eq!(
        line(&metrics.blkio.io_service_bytes_recursive),
        [(999, 9, "Write".into(), 8)]
    );
    assert_eq!(line(&metrics.blkio.sectors_recursive), [(999, 9, String::new(), 16)]);
    assert_eq!(
        (metrics.rdma.current[0].hca_handles, metrics.rdma.limit[0].hca_handles),
        (1, u32::MAX)
    );
    assert_eq!(metrics.hugetlb.len(), 1);
    assert_eq!((metrics.hugetlb[0].usage, metrics.hugetlb[0].failcnt), (5, 6));
    assert_eq!(metrics.hugetlb[0].pagesize, page);
}

fn clock_ticks() -> u64 {
    // SAFETY: reads a constant.
    unsafe { libc::sysconf(libc::_SC_CLK_TCK) as u64 }
}

#[test]
fn v2_metrics_without_controllers_have_cpu_only() {
    let guard = Guard::v2();
    // Its parent has handed none on.
    let controllers = fs::read_to_string(guard.cgroup.folder().join("cgroup.controllers")).unwrap();
    assert_eq!(controllers.trim(), "");
    let mut process = guard.spawn("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo done; read x");
    assert_eq!(process.line(), "done");
    let metrics = guard.cgroup.metrics().unwrap();
    assert_eq!(metrics.type_url, "io.containerd.cgroups.v2.Metrics");
    let metrics = v2::Metrics::parse_from_bytes(&metrics.value).unwrap();
    assert!(metrics.cpu.usage_usec > 0);
    assert!(metrics.memory.is_none() && metrics.pids.is_none() && metrics.io.is_none());
    assert!(metrics.memory_events.is_none() && metrics.rdma.is_none() && metrics.hugetlb.is_empty());
}

#[test]
fn v2_metrics_have_containerds_units_and_names() {
    let (_folder, cgroup) = fixture(&[
        (
            "cpu.stat",
            "usage_usec 5\nuser_usec 3\nsystem_usec 2\nnr_periods 4\nnr_throttled 6\nthrottled_usec 7\nnr_bursts 8\nburst_usec 9\n",
        ),
        ("cpu.pressure", "some avg10=1.50 avg60=0.00 avg300=0.00 total=42\n"),
        (
            "memory.stat",
            "anon 1\nfile 2\npgfault 3\nworkingset_refault_anon 4\nworkingset_refault_file 5\nthp_collapse_alloc 6\n",
        ),
        ("memory.current", "100\n"),
        ("memory.max", "max\n"),
        ("memory.peak", "200\n"),
        ("memory.swap.current", "300\n"),
        ("memory.swap.max", "400\n"),
        (
            "memory.events",
            "low 1\nhigh 2\nmax 3\noom 4\noom_kill 5\noom_group_kill 6\n",
        ),
        ("pids.current", "9\n"),
        ("pids.max", "max\n"),
        ("io.stat", "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n"),
        ("rdma.current", "mlx4_0 hca_handle=1 hca_object=2\n"),
        ("rdma.max", "mlx4_0 hca_handle=max hca_object=9\n"),
    ]);
    let metrics = v2::Metrics::parse_from_bytes(&cgroup.metrics().unwrap().value).unwrap();
    let cpu = &metrics.cpu;
    assert_eq!((cpu.usage_usec, cpu.user_usec, cpu.system_usec), (5, 3, 2));
    assert_eq!((cpu.nr_periods, cpu.nr_throttled, cpu.throttled_usec), (4, 6, 7));
    assert_eq!((cpu.nr_bursts, cpu.burst_usec), (8, 9));
    assert_eq!((cpu.psi.some.avg10, cpu.psi.some.total), (1.5, 42));
    let memory = &metrics.memory;
    assert_eq!((memory.anon, memory.file, memory.pgfault), (1, 2, 3));
    assert_eq!((memory.workingset_refault, memory.thp_collapse_alloc), (9, 6));
    assert_eq!(
        (memory.usage, memory.usage_limit, memory.max_usage),
        (100, u64::MAX, 200)
    );
    assert_eq!((memory.swap_usage, memory.swap_limit), (300, 400));
    let events = &metrics.memory_events;
    assert_eq!((events.low, events.high, events.max), (1, 2, 3));
    assert_eq!((events.oom, events.oom_kill, events.oom_group_kill), (4, 5, 6));
    assert_eq!((metrics.pids.current, metrics.pids.limit), (9, u64::MAX));
    let io = &metrics.io.usage[0];
    assert_eq!(
        (io.major, io.minor, io.rbytes, io.wbytes, io.rios, io.wios),
        (254, 0, 1, 2, 3, 4)
    );
    assert_eq!(metrics.rdma.limit[0].hca_handles, u32::MAX);
}

// OOM kills.

/// Asks for more than the limit of these tests and is killed for it: `tail` keeps a line that does not end. One process alone, so
/// that the kernel has no second choice; with a limit of its own, should that of the cgroup not hold.
const EAT: &str = "(ulimit -v 1000000; exec tail -n 1 /dev/zero)";
const LIMIT_BYTES: u64 = 16 << 20;

#[tokio::test]
async fn an_oom_kill_is_reported_while_the_container_goes_on() {
    let guard = Guard::with_memory_limit(LIMIT_BYTES);
    let mut process = guard.spawn(&format!("while read x; do {EAT}; echo survived; done"));
    let mut watch = guard.cgroup.watch_oom().unwrap();
    assert!(!watch.check());
    for _ in 0..2 {
        process.say("eat");
        assert!(tokio::time::timeout(*BOUND, watch.next()).await.unwrap().unwrap());
        assert_eq!(process.line(), "survived");
        watch.check();
    }
    assert!(process.is_running());
}

#[tokio::test]
async fn an_oom_kill_of_init_is_known_before_its_exit_is_published_and_reported_once() {
    let guard = Guard::with_memory_limit(LIMIT_BYTES);
    let mut process = guard.spawn("read x; ulimit -v 1000000; exec tail -n 1 /dev/zero");
    let mut watch = guard.cgroup.watch_oom().unwrap();
    process.say("eat");
    assert_eq!(process.signal_that_ended_it(), Some(libc::SIGKILL));
    assert!(watch.check());
    assert!(!watch.check());
    guard.cgroup.remove(*BOUND).await.unwrap();
    assert!(!tokio::time::timeout(*BOUND, watch.next()).await.unwrap().unwrap());
}

#[tokio::test]
async fn a_wait_that_is_given_up_again_and_again_misses_no_oom_kill() {
    let guard = Guard::with_memory_limit(LIMIT_BYTES);
    let mut process = guard.spawn(&format!("read x; {EAT}; echo survived; read x"));
    let mut watch = guard.cgroup.watch_oom().unwrap();
    process.say("eat");
    let reported = async {
        loop {
            tokio::select! {
                biased;
                reported = watch.next() => break reported,
                () = tokio::task::yield_now() => {}
            }
        }
    };
    assert!(tokio::time::timeout(*BOUND, reported).await.unwrap().unwrap());
}

#[tokio::test]
async fn an_oom_kill_in_a_sub_cgroup_counts_for_the_container() {
    let guard = Guard::with_memory_limit(LIMIT_BYTES);
    let sub = guard.sub("sub");
    let mut process = sub.spawn(&format!("read x; {EAT}; echo survived; read x"));
    let mut watch = guard.cgroup.watch_oom().unwrap();
    process.say("eat");
    assert!(tokio::time::timeout(*BOUND, watch.next()).await.unwrap().unwrap());
}

#[tokio::test]
async fn a_killed_process_is_no_oom_kill() {
    let guard = Guard::with_memory_limit(LIMIT_BYTES);
    let process = guard.spawn("read x");
    let mut watch = guard.cgroup.watch_oom().unwrap();
    guard.cgroup.kill_all(*BOUND).await.unwrap();
    drop(process);
    assert!(!watch.check());
    guard.cgroup.remove(*BOUND).await.unwrap();
    assert!(!tokio::time::timeout(*BOUND, watch.next()).await.unwrap().unwrap());
}

#[tokio::test]
async fn on_v2_the_kills_are_counted_not_the_ooms() {
    let events = |oom: u32, kills: u32| format!("low 0\nhigh 0\nmax 9\noom {oom}\noom_kill {kills}\n");
    let (folder, cgroup) = fixture(&[
        ("cgroup.events", "populated 1\nfrozen 0\n"),
        ("memory.events", &events(1, 1)),
    ]);
    let memory = folder.path().join("memory.events");
    let mut watch = cgroup.watch_oom().unwrap();
    assert!(!watch.check());
    fs::write(&memory, events(2, 1)).unwrap();
    assert!(!watch.check());
    let next = tokio::spawn(async move { (watch.next().await, watch) });
    tokio::task::yield_now().await;
    fs::write(&memory, events(2, 3)).unwrap();
    let (reported, mut watch) = tokio::time::timeout(*BOUND, next).await.unwrap().unwrap();
    assert!(reported.unwrap());
    assert!(!watch.check());
    // The last process is killed and leaves: first the kill, then the end.
    fs::write(&memory, events(3, 4)).unwrap();
    fs::write(folder.path().join("cgroup.events"), "populated 0\nfrozen 0\n").unwrap();
    assert!(watch.next().await.unwrap());
    assert!(!watch.next().await.unwrap());
}

#[tokio::test]
async fn on_v2_a_kill_is_known_when_the_cgroup_went_before_anybody_looked() {
    let kills = |kills: u32| format!("oom {kills}\noom_kill {kills}\n");
    let slice = tempfile::tempdir().unwrap();
    let scope = slice.path().join("a.scope");
    fs::create_dir(&scope).unwrap();
    let (around, own) = (slice.path().join("memory.events"), scope.join("memory.events"));
    fs::write(&around, kills(7)).unwrap();
    fs::write(&own, kills(0)).unwrap();
    fs::write(scope.join("cgroup.events"), "populated 1\n").unwrap();
    let watch = || OomWatch::v2(&own, &scope.join("cgroup.events")).unwrap();
    // What a removed file has to say.
    let gone = || fs::write(&own, "").unwrap();
    let mut killed = watch();
    let mut survivor = watch();
    // A neighbour's, in time.
    fs::write(&around, kills(8)).unwrap();
    assert!(!killed.check() && !survivor.check());
    gone();
    assert!(!survivor.check());
    fs::write(&around, kills(9)).unwrap();
    assert!(killed.check());
    assert!(!killed.check());
    // One that was seen is not told again.
    fs::write(&own, kills(0)).unwrap();
    let mut told = watch();
    fs::write(&own, kills(1)).unwrap();
    fs::write(&around, kills(10)).unwrap();
    assert!(told.check());
    gone();
    assert!(!told.check());
}

#[tokio::test]
async fn on_v2_the_watch_ends_with_the_last_process() {
    let guard = Guard::v2();
    let process = guard.spawn("read x");
    // This machine's v2 may lack the memory controller; its own file of events stands in, it rings the same way.
    let mut watch = OomWatch::v2(
        &guard.cgroup.folder().join("cgroup.events"),
        &guard.cgroup.folder().join("cgroup.events"),
    )
    .unwrap();
    let next = tokio::spawn(async move { watch.next().await });
    tokio::task::yield_now().await;
    drop(process);
    assert!(!tokio::time::timeout(*BOUND, next).await.unwrap().unwrap().unwrap());
}

#[tokio::test]
async fn without_a_memory_controller_there_is_no_watch() {
    let (_folder, v2) = fixture(&[("cgroup.events", "populated 1\n")]);
    let v1 = Cgroup::V1(BTreeMap::from([("freezer".into(), PathBuf::from("/sys"))]));
    for cgroup in [v1, v2] {
        assert_eq!(cgroup.watch_oom().unwrap_err().kind(), Kind::Unimplemented);
    }
}

/// OCI resources.
fn resources(json: serde_json::Value) -> oci_spec::runtime::LinuxResources {
    serde_json::from_value(json).unwrap()
}

#[test]
fn limits_are_what_the_kernel_says_afterwards() {
    let guard = Guard::with_memory_limit(64 << 20);
    let v2 = guard.cgroup.is_v2();
    if v2 {
        for above in [guard.parents[0].parent().unwrap(), &guard.parents[0]] {
            write(&above.join("cgroup.subtree_control"), "+pids +cpu").unwrap();
        }
    }
    let value = |controller: &str, v1: &str, v2: &str| {
        let folder = guard.cgroup.v1(controller);
        let file = folder.map_or_else(|| guard.cgroup.folder().join(v2), |folder| folder.join(v1));
        read(&file).unwrap().trim().to_owned()
    };
    let cpu = if v2 { "25000 50000" } else { "25000" };
    // Up, down and up again: memory and swap together bound memory alone in v1, and a quota the period.
    for (mib, micros) in [(32_u64, 50_000), (128, 25_000), (16, 100_000)] {
        let bytes = mib << 20;
        guard
            .cgroup
            .limit(&resources(serde_json::json!({
                "memory": {"limit": bytes, "swap": bytes},
                "pids": {"limit": mib},
                "cpu": {"shares": 512, "quota": micros / 2, "period": micros},
            })))
            .unwrap();
        assert_eq!(
            value("memory", "memory.limit_in_bytes", "memory.max"),
            bytes.to_string()
        );
        assert_eq!(value("pids", "pids.max", "pids.max"), mib.to_string());
        if micros == 50_000 {
            assert_eq!(value("cpu", "cpu.cfs_quota_us", "cpu.max"), cpu);
            assert_eq!(value("cpu", "cpu.shares", "cpu.weight"), if v2 { "59" } else { "512" });
        }
    }
    // What is not mentioned stays.
    guard
        .cgroup
        .limit(&resources(serde_json::json!({"pids": {"limit": -1}})))
        .unwrap();
    assert_eq!(value("pids", "pids.max", "pids.max"), "max");
    assert_eq!(
        value("memory", "memory.limit_in_bytes", "memory.max"),
        (16 << 20).to_string()
    );
}

#[test]
fn a_limit_that_the_kernel_refuses_is_named_with_its_value() {
    let guard = Guard::with_memory_limit(64 << 20);
    let wrong = serde_json::json!({"cpu": {"cpus": "4000-5000"}, "memory": {"limit": 33 << 20}});
    let error = guard.cgroup.limit(&resources(wrong)).unwrap_err().to_string();
    assert!(
        error.contains("cpus") && error.contains(if guard.cgroup.is_v2() { "enabled" } else { "4000-5000" }),
        "{error}"
    );
}

#[test]
fn a_controller_that_is_missing_is_named() {
    let pids = serde_json::json!({"pids": {"limit": 5}});
    let v1 = Cgroup::V1(BTreeMap::from([("freezer".into(), PathBuf::from("/sys"))]));
    let error = v1.limit(&resources(pids.clone())).unwrap_err();
    assert_eq!(error.kind(), Kind::FailedPrecondition);
    assert!(
        error.to_string().contains("no cgroup of the controller pids"),
        "{error}"
    );
    let (_folder, v2) = fixture(&[("cgroup.controllers", "cpu memory\n")]);
    let error = v2.limit(&resources(pids)).unwrap_err();
    assert_eq!(error.kind(), Kind::FailedPrecondition);
    assert!(error.to_string().contains("controller pids is not enabled"), "{error}");
    // A kernel without accounting for swap.
    let (folder, v2) = fixture(&[("cgroup.controllers", "memory\n"), ("memory.max", "max\n")]);
    v2.limit(&resources(serde_json::json!({"memory": {"limit": 8192, "swap": 8192}})))
        .unwrap();
    assert_eq!(fs::read_to_string(folder.path().join("memory.max")).unwrap(), "8192");
}

#[test]
fn a_memory_limit_below_the_use_is_refused_where_that_is_asked_for() {
    let (folder, cgroup) = fixture(&[("memory.current", "8192\n"), ("memory.max", "max\n")]);
    let limit = |check: bool, bytes: i64| {
        cgroup.limit(&resources(
            serde_json::json!({"memory": {"limit": bytes, "checkBeforeUpdate": check}}),
        ))
    };
    let error = limit(true, 8192).unwrap_err();
    assert_eq!(error.kind(), Kind::FailedPrecondition);
    assert!(error.to_string().contains("uses 8192 bytes"), "{error}");
    assert_eq!(fs::read_to_string(folder.path().join("memory.max")).unwrap(), "max\n");
    limit(true, 8193).unwrap();
    limit(true, -1).unwrap();
    limit(false, 4096).unwrap();
    assert_eq!(fs::read_to_string(folder.path().join("memory.max")).unwrap(), "4096");
}

#[test]
fn a_process_that_goes_where_it_is_stays_there() {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap();
    let members = own_members(Path::new(ROOT), &own).find(|members| members.exists());
    go(&members.expect("a hierarchy in its usual place")).unwrap();
    assert_eq!(fs::read_to_string("/proc/self/cgroup").unwrap(), own);

    let texts = "5:cpu,cpuacct:/a\n4:freezer:/b c\n3:pids:/../d\n1:name=systemd:/e\n0::/\n";
    let found: Vec<_> = own_members(Path::new("/r"), texts).collect();
    assert_eq!(
        found,
        [Path::new("/r/freezer/b c/cgroup.procs"), Path::new("/r/cgroup.procs")]
    );
    // Nothing is made of what is no hierarchy.
    let folder = tempfile::tempdir().unwrap();
    assert!(go(&folder.path().join("cgroup.procs")).is_err());
    assert!(folder.path().read_dir().unwrap().next().is_none());
}
