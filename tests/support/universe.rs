//! A private universe for a test process: its own mount, pid and network namespace, entered before `main`.
//!
//! Why before `main`: a mount namespace belongs to a thread, and libtest starts threads. A function in `.init_array` runs while the
//! process has one thread, so that every thread, and every child, lives in the same namespaces. `cargo test` needs no wrapper.
//!
//! What it buys:
//! - **mounts**: `/run` is an empty tmpfs (so the shims' sockets in `/run/containerd/s`, crun's state and ours are private, and
//!   overlayfs has an upper layer that works whatever `/tmp` is), `/var/lib/cni` and `/var/lib/lxc` too, and
//!   `/sys/fs/cgroup/unified` of a hybrid machine is gone, because crun refuses to work beside it;
//! - **cgroups**: those of the machine; the universe's init is in the root of each hierarchy, as a machine's is;
//! - **pids**: `/proc` shows nothing but what the tests started, so a leak check needs no guess; and when the test process ends, by
//!   whatever signal, the kernel ends the rest;
//! - **network**: bridges and addresses of CNI never meet the machine's.
//!
//! On a machine that is the tests' own and that systemd runs (the node of `make test-node`, with `LXCRI_TEST_SYSTEMD=1`) the machine
//! is the universe, and nothing is entered: systemd manages processes by their numbers in its own namespace, and is asked over its
//! socket in `/run`. See [`by_systemd`].
//!
//! Three processes: the outermost waits and removes cgroups that a crashed test left; pid 1 of the new pid namespace reaps orphans
//! as an init does; pid 2 runs the tests. To look inside while a test runs: `nsenter -t <pid of the deepest one> -m -p -n`.

use std::{
    ffi::{CStr, CString, OsStr},
    io,
    os::unix::{ffi::OsStrExt, fs::PermissionsExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicI32, Ordering},
};

/// Set to the token of the universe for everything that runs in it.
const TOKEN: &str = "LXCRI_TEST_UNIVERSE";
/// Set when the universe could not be entered: the reason.
const FAILURE: &str = "LXCRI_TEST_UNIVERSE_FAILURE";
/// Folders of the machine that are empty in the universe, as `/run` is: libcni's cache has no other place, and LXC's tools look for
/// containers where the machine's own are.
const EMPTIED: [&CStr; 2] = [c"/var/lib/cni", c"/var/lib/lxc"];

/// SAFETY of the section: the C library calls it once, before `main`, with one thread alive.
#[used]
#[unsafe(link_section = ".init_array")]
static ENTER: extern "C" fn() = enter;

/// A name that no other test process on the machine has: part of every container id, namespace and cgroup path of this one.
///
/// # Panics
/// When the universe could not be entered, with the reason.
pub(crate) fn token() -> String {
    if let Ok(reason) = std::env::var(FAILURE) {
        panic!("the tests with a real containerd need root with CAP_SYS_ADMIN: {reason}");
    }
    std::env::var(TOKEN).expect("no universe was entered")
}

/// Whether the machine itself is the universe, and systemd runs it: containerd is a unit, and CRI's cgroups are systemd's.
pub(crate) fn by_systemd() -> bool {
    std::env::var_os("LXCRI_TEST_SYSTEMD").is_some_and(|value| value == "1")
}

extern "C" fn enter() {
    // A program that a test started from its own executable is in the universe already.
    if std::env::var_os(TOKEN).is_some() {
        return;
    }
    // SAFETY: no other thread exists that could read the environment.
    unsafe {
        std::env::set_var(TOKEN, format!("lx{}x", libc::getpid()));
    }
    if by_systemd() {
        return;
    }
    if let Err(reason) = leave_the_machine() {
        // SAFETY: as above.
        unsafe { std::env::set_var(FAILURE, reason) };
    }
}

/// Enters the namespaces; returns in pid 2 of the new universe, or in the same process when nothing could be done.
fn leave_the_machine() -> Result<(), String> {
    // SAFETY: plain system calls.
    check("unshare(mount, pid, network)", unsafe {
        libc::unshare(libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWNET)
    })?;
    mount(None, "/", None, libc::MS_REC | libc::MS_PRIVATE)?;
    let_go_below("/run");
    mount(Some("tmpfs"), "/run", Some("tmpfs"), 0)?;
    if Path::new("/sys/fs/cgroup/unified").exists() {
        hide_unified().map_err(|e| format!("cannot hide /sys/fs/cgroup/unified: {e}"))?;
    }
    let mut made = Vec::new();
    for folder in EMPTIED {
        let path = path_of(folder);
        if std::fs::create_dir(path).is_ok() {
            made.push(folder);
        }
        mount(Some("tmpfs"), &path.to_string_lossy(), Some("tmpfs"), 0)?;
        // A tmpfs is everybody's, and these are not.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))
            .map_err(|e| format!("cannot set the mode of {}: {e}", path.display()))?;
    }

    // SAFETY: the process has one thread.
    match check("fork", unsafe { libc::fork() })? {
        0 => {}
        init => clean_up_after(init, &made),
    }
    // SAFETY: plain system call; the outermost process cannot leave us behind.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    mount(
        Some("proc"),
        "/proc",
        Some("proc"),
        libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC,
    )?;
    // As systemd has it on every machine of its own.
    mount(None, "/", None, libc::MS_REC | libc::MS_SHARED)?;
    raise_loopback()?;
    let (mut moved, moves) = io::pipe().map_err(|e| format!("pipe: {e}"))?;
    // SAFETY: the process has one thread.
    match check("fork", unsafe { libc::fork() })? {
        0 => {
            drop(moves);
            io::copy(&mut moved, &mut io::sink()).map_err(|e| format!("cannot wait for the universe's init: {e}"))?;
            Ok(())
        }
        tests => {
            enter_root_cgroups();
            drop((moves, moved));
            reap_until(tests)
        }
    }
}

/// Unmounts here what is about to be covered. It would stay mounted in this namespace otherwise, and its dataset busy for whoever has
/// mounted it: other tests do that at the same time, in the namespace that this one is a copy of.
fn let_go_below(folder: &str) {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let targets = table.lines().filter_map(|line| line.split(' ').nth(4));
    let below: Vec<&str> = targets.filter(|target| Path::new(target).starts_with(folder)).collect();
    for target in below.iter().rev().filter(|target| **target != folder) {
        let target = CString::new(*target).unwrap_or_default();
        // SAFETY: a valid C string. What is not unmounted is only covered, as all was before.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
    }
}

/// Puts this process where the init of a machine is: LXC takes the cgroups of pid 1 for the root of all that it makes. The tests stay
/// where they were started.
fn enter_root_cgroups() {
    let hierarchies = std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
    let folders = hierarchies
        .map(|entry| entry.path())
        .filter(|path| path.is_dir() && !path.is_symlink());
    for root in folders.chain([PathBuf::from("/sys/fs/cgroup")]) {
        // In a v2 hierarchy the folders are cgroups, and no roots.
        let is_root = !root.join("cgroup.type").exists();
        let members = root.join("cgroup.procs");
        if is_root && members.exists() {
            let _ = std::fs::write(members, "0");
        }
    }
}

/// Builds `/sys/fs/cgroup` of a hybrid machine again, without its `unified`.
///
/// Unmounting that alone is not enough: crun makes folders for the "unified" hierarchy all the same, and they would land on the
/// machine's own tmpfs.
fn hide_unified() -> Result<(), String> {
    const GROUPS: &str = "/sys/fs/cgroup";
    const ASIDE: &str = "/run/cgroup";
    let text = |e: io::Error| e.to_string();
    std::fs::create_dir(ASIDE).map_err(text)?;
    mount(Some(GROUPS), ASIDE, None, libc::MS_BIND | libc::MS_REC)?;
    // Not merely covered: what is mounted below must not be in mountinfo, where runtimes look for hierarchies.
    // SAFETY: a valid C string.
    check("umount /sys/fs/cgroup", unsafe {
        libc::umount2(c"/sys/fs/cgroup".as_ptr(), libc::MNT_DETACH)
    })?;
    mount(Some("tmpfs"), GROUPS, Some("tmpfs"), 0)?;
    for entry in std::fs::read_dir(ASIDE).map_err(text)?.flatten() {
        let (from, to) = (entry.path(), Path::new(GROUPS).join(entry.file_name()));
        if entry.file_name() == "unified" {
            continue;
        } else if entry.file_type().map_err(text)?.is_dir() {
            std::fs::create_dir(&to).map_err(text)?;
            mount(from.to_str(), &to.to_string_lossy(), None, libc::MS_BIND)?;
        } else if let Ok(target) = std::fs::read_link(&from) {
            std::os::unix::fs::symlink(target, to).map_err(text)?;
        }
    }
    // SAFETY: a valid C string.
    check("umount /run/cgroup", unsafe {
        libc::umount2(c"/run/cgroup".as_ptr(), libc::MNT_DETACH)
    })?;
    std::fs::remove_dir(ASIDE).map_err(text)
}

fn path_of(folder: &CStr) -> &Path {
    Path::new(OsStr::from_bytes(folder.to_bytes()))
}

fn check(what: &str, result: i32) -> Result<i32, String> {
    if result < 0 {
        return Err(format!("{what}: {}", io::Error::last_os_error()));
    }
    Ok(result)
}

fn mount(source: Option<&str>, target: &str, kind: Option<&str>, flags: libc::c_ulong) -> Result<(), String> {
    let text = |s: Option<&str>| s.map(|s| CString::new(s).unwrap_or_default());
    let (source, kind, path) = (text(source), text(kind), CString::new(target).unwrap_or_default());
    let pointer = |s: &Option<CString>| s.as_ref().map_or(std::ptr::null(), |s| s.as_ptr());
    // SAFETY: all strings outlive the call.
    let result = unsafe { libc::mount(pointer(&source), path.as_ptr(), pointer(&kind), flags, std::ptr::null()) };
    check(&format!("mount {target}"), result).map(drop)
}

/// `ip link set lo up`, for containerd's stream server.
fn raise_loopback() -> Result<(), String> {
    // SAFETY: the socket is closed below; the request is a zeroed ifreq with a short name.
    unsafe {
        let socket = check(
            "socket",
            libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0),
        )?;
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[0] = b'l' as libc::c_char;
        request.ifr_name[1] = b'o' as libc::c_char;
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
        let result = libc::ioctl(socket, libc::SIOCSIFFLAGS, &request);
        let result = check("raise the loopback device", result);
        libc::close(socket);
        result.map(drop)
    }
}

static INIT: AtomicI32 = AtomicI32::new(0);

extern "C" fn end_the_universe(_signal: i32) {
    // SAFETY: kill is async-signal-safe; the pid is our unreaped child's.
    unsafe { libc::kill(INIT.load(Ordering::Relaxed), libc::SIGKILL) };
}

/// The outermost process: waits for the universe's end, removes the cgroups that it left and the folders that were `made`, exits as
/// the tests did.
fn clean_up_after(init: i32, made: &[&CStr]) -> ! {
    INIT.store(init, Ordering::Relaxed);
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler only calls kill.
        unsafe { libc::signal(signal, end_the_universe as *const () as libc::sighandler_t) };
    }
    let code = wait_for(init);
    for cgroup in abandoned_cgroups() {
        let _ = std::fs::remove_dir(cgroup);
    }
    for folder in made {
        // SAFETY: a valid C string.
        unsafe { libc::umount2(folder.as_ptr(), libc::MNT_DETACH) };
        let _ = std::fs::remove_dir(path_of(folder));
    }
    // SAFETY: nothing of this process needs a destructor.
    unsafe { libc::_exit(code) }
}

/// The cgroups of this universe, and, seen from outside of all of them, those of universes that are dead; children before parents.
pub(crate) fn abandoned_cgroups() -> Vec<PathBuf> {
    let token = std::env::var(TOKEN).unwrap_or_default();
    // Inside, where the tests are number 2, the numbers in the names mean nothing.
    let outside = std::process::id() != 2;
    let mut found = cgroups_named("lx");
    found.retain(|cgroup| {
        let mut names = cgroup.components().map(|part| part.as_os_str().to_string_lossy());
        names.any(|name| name.contains(&token) || (outside && is_of_the_dead(&name)))
    });
    found
}

/// Whether `name` is the token of a universe whose outermost process was killed before it could clean up.
fn is_of_the_dead(name: &str) -> bool {
    let digits = name.strip_prefix("lx").and_then(|rest| rest.strip_suffix('x'));
    let Some(pid) = digits.and_then(|digits| digits.parse().ok()) else {
        return false;
    };
    // SAFETY: signal 0 only asks whether the process exists.
    unsafe { libc::kill(pid, 0) != 0 && io::Error::last_os_error().raw_os_error() == Some(libc::ESRCH) }
}

/// Pid 1: reaps orphans until the tests end.
fn reap_until(tests: i32) -> ! {
    let code = loop {
        let mut status = 0;
        // SAFETY: `status` is a valid place.
        let pid = unsafe { libc::waitpid(-1, &mut status, 0) };
        if pid == tests {
            break exit_code(status);
        }
        if pid < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::ECHILD) {
            break 1;
        }
    };
    thaw();
    // SAFETY: as above.
    unsafe { libc::_exit(code) }
}

/// Takes back every freeze that failed tests have left: the frozen do not die, and would keep the universe.
pub(crate) fn thaw() {
    let token = std::env::var(TOKEN).unwrap_or_default();
    for cgroup in cgroups_named(&token) {
        for (file, value) in [("freezer.state", "THAWED"), ("cgroup.freeze", "0")] {
            if cgroup.join(file).exists() {
                let _ = std::fs::write(cgroup.join(file), value);
            }
        }
    }
}

fn wait_for(pid: i32) -> i32 {
    let mut status = 0;
    loop {
        // SAFETY: `status` is a valid place.
        if unsafe { libc::waitpid(pid, &mut status, 0) } == pid {
            return exit_code(status);
        }
        if io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
            return 1;
        }
    }
}

fn exit_code(status: i32) -> i32 {
    if libc::WIFEXITED(status) {
        libc::WEXITSTATUS(status)
    } else {
        128 + libc::WTERMSIG(status)
    }
}

/// Every cgroup, in all hierarchies, that has `token` in its path; children before parents.
pub(crate) fn cgroups_named(token: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::from("/sys/fs/cgroup")];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = std::fs::read_dir(&folder) else {
            continue;
        };
        for entry in entries.flatten() {
            // cgroupfs reports the type of an entry; links such as /sys/fs/cgroup/cpu must not be followed twice.
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                let path = entry.path();
                // crun leaves plain folders where a hierarchy is not mounted; they are not cgroups.
                if path.to_string_lossy().contains(token) && path.join("cgroup.procs").exists() {
                    found.push(path.clone());
                }
                folders.push(path);
            }
        }
    }
    found.sort_by_key(|path| std::cmp::Reverse(path.components().count()));
    found
}

/// Of the cgroups that have `name` in their path those that the process is in, one in each hierarchy.
pub(crate) fn cgroups_with(name: &str, pid: u32) -> Vec<PathBuf> {
    let holds = |cgroup: &PathBuf| {
        let members = std::fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
        members.lines().any(|member| member.parse() == Ok(pid))
    };
    let mut found = cgroups_named(name);
    found.retain(holds);
    found
}
