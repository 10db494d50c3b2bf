//! The harness itself: that it is where it says it is, and notices what it is there to notice.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests fail by panicking")]

mod support;

use std::{fs, os::linux::net::SocketAddrExt, path::Path, process::Command};

use support::{backend, leaks, leaks::Baseline, skip, universe};

/// These tests look at the whole universe; one at a time.
static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());

fn alone() -> std::sync::MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[test]
fn the_universe_has_nothing_of_the_machine() {
    let _alone = alone();
    let _token = universe::token();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let run = mounts
        .lines()
        .find(|line| line.split(' ').nth(4) == Some("/run"))
        .expect("a mount on /run");
    assert!(run.contains(" - tmpfs "), "{run}");
    assert_eq!(
        fs::read_dir(leaks::LXC_PATH).unwrap().count(),
        0,
        "the machine's containers"
    );
    assert!(!mounts.contains(" - cgroup2 cgroup2 ") || Path::new("/sys/fs/cgroup/cgroup.controllers").exists());
    assert!(!Path::new("/sys/fs/cgroup/unified").exists());
    assert_eq!(std::process::id(), 2, "1 is the universe's init");
    let cgroups = fs::read_to_string("/proc/1/cgroup").unwrap();
    let hidden = |line: &&str| line.starts_with("0::") && !Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let elsewhere: Vec<_> = cgroups
        .lines()
        .filter(|line| !hidden(line) && !line.ends_with(":/"))
        .collect();
    assert!(
        elsewhere.is_empty(),
        "init is not where that of a machine is: {elsewhere:?}"
    );
    let strangers: Vec<_> = leaks::processes()
        .into_iter()
        .filter(|process| process.pid > 2)
        .collect();
    assert!(strangers.is_empty(), "{strangers:?}");
    let devices = fs::read_to_string("/proc/net/dev").unwrap();
    assert_eq!(
        devices
            .lines()
            .skip(2)
            .filter(|line| !line.trim_start().starts_with("lo:"))
            .count(),
        0,
        "{devices}"
    );
}

#[test]
fn every_kind_of_leftover_is_named() {
    let _alone = alone();
    let before = Baseline::take(&[]);
    assert_eq!(before.leftovers(), Vec::<String>::new());

    let folder = Path::new("/run/left");
    fs::create_dir(folder).unwrap();
    let lxc = Path::new(leaks::LXC_PATH).join(universe::token());
    fs::create_dir(&lxc).unwrap();
    fs::write(lxc.join("config"), "").unwrap();
    // One whose path fits, and one that LXC has made a hash of.
    let abstracts = [
        format!("{}/command", lxc.display()),
        format!("lxc/{}/command", universe::token()),
    ]
    .map(|name| {
        let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
        (std::os::unix::net::UnixListener::bind_addr(&address).unwrap(), name)
    });
    fs::write(folder.join("file"), "").unwrap();
    nix::unistd::mkfifo(&folder.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let socket = std::os::unix::net::UnixListener::bind(folder.join("socket")).unwrap();
    let mount = folder.join("mount");
    fs::create_dir(&mount).unwrap();
    let none: Option<&str> = None;
    nix::mount::mount(Some("tmpfs"), &mount, Some("tmpfs"), nix::mount::MsFlags::empty(), none).unwrap();
    let cgroup = ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"]
        .into_iter()
        .find(|root| Path::new(root).join("cgroup.procs").exists());
    let cgroup = Path::new(cgroup.expect("a cgroup hierarchy")).join(universe::token());
    fs::create_dir(&cgroup).unwrap();
    let mut process = Command::new("sleep").arg("1000").spawn().unwrap();
    // A program that has only just been executed has no arguments in /proc yet.
    let arguments = format!("/proc/{}/cmdline", process.id());
    while fs::read(&arguments).unwrap().is_empty() {
        std::thread::yield_now();
    }

    let left = before.leftovers();
    for expected in [
        "folder /run/left".to_string(),
        "file /run/left/file".into(),
        "fifo /run/left/fifo".into(),
        "socket /run/left/socket".into(),
        format!("folder {}", lxc.display()),
        format!("file {}/config", lxc.display()),
        format!("socket @{}", abstracts[0].1),
        format!("socket @{}", abstracts[1].1),
        "mount /run/left/mount (tmpfs".into(),
        format!("cgroup {}", cgroup.display()),
        format!("process {} sleep 1000", process.id()),
    ] {
        assert!(
            left.iter().any(|thing| thing.starts_with(&expected)),
            "{expected} is not among {left:#?}"
        );
    }

    process.kill().unwrap();
    process.wait().unwrap();
    fs::remove_dir(&cgroup).unwrap();
    nix::mount::umount(&mount).unwrap();
    drop((socket, abstracts));
    fs::remove_dir_all(folder).unwrap();
    fs::remove_dir_all(lxc).unwrap();
    before.assert_nothing_left(&[]);
}

#[test]
fn orphans_are_reaped_by_the_universes_init() {
    let _alone = alone();
    let before = Baseline::take(&[]);
    let output = Command::new("sh").args(["-c", "sleep 0 & echo $!"]).output().unwrap();
    let pid: u32 = String::from_utf8(output.stdout).unwrap().trim().parse().unwrap();
    before.assert_nothing_left(&[]);
    assert!(!leaks::processes().iter().any(|process| process.pid == pid));
}

#[test]
fn a_skip_is_allowed_only_with_its_reason() {
    let list = "# comment\na::b because\na::c\n";
    assert!(skip::allowed(list, "a::b"));
    assert!(!skip::allowed(list, "a::c"), "no reason");
    assert!(!skip::allowed(list, "a::d"));
    assert!(!skip::allowed(list, "#"));
}

#[test]
fn a_skip_on_another_backend_is_not_one_on_crun() {
    assert_eq!(skip::name("a::b", None), "a::b");
    assert_eq!(skip::name("a::b", Some("crun")), "a::b");
    assert_eq!(skip::name("a::b", Some("lxc")), "a::b@lxc");
    assert!(!skip::allowed("a::b because", &skip::name("a::b", Some("lxc"))));
    assert!(!skip::allowed("a::b@lxc because", &skip::name("a::b", None)));
}

#[test]
fn a_backend_that_fails_is_named_and_the_next_one_has_its_turn() {
    let ran = std::cell::RefCell::new(Vec::new());
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        backend::each(&["one", "two"], |backend| {
            ran.borrow_mut().push(backend);
            assert_eq!(backend, "two", "as this test wants it");
        });
    }));
    let text = *outcome.unwrap_err().downcast::<String>().unwrap();
    assert_eq!(text, "failed on backend one");
    assert_eq!(ran.into_inner(), ["one", "two"]);
}

#[test]
fn what_a_shims_program_becomes_is_a_shim_only_as_containerd_starts_it() {
    let process = |command: &str| leaks::Process {
        pid: 7,
        parent: 1,
        command: command.into(),
    };
    let path = "/run/node/bin/containerd-shim-proxmox-lxcri-v1";
    assert!(process(&format!("{path} -namespace n -id a -address b")).is_a_shim());
    assert!(!process(&format!("{path} lxc-monitor a")).is_a_shim());
    assert!(!process(path).is_a_shim());
    assert!(!process("sh -namespace").is_a_shim());
}

#[test]
fn a_runtime_type_names_its_program() {
    assert_eq!(leaks::shim_program("io.containerd.runc.v2"), "containerd-shim-runc-v2");
    assert_eq!(
        leaks::shim_program(support::node::OURS),
        "containerd-shim-proxmox-lxcri-v1"
    );
}
