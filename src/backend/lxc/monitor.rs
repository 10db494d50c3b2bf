//! The monitor of a container: a process that is LXC's part in it, and init's parent.
//!
//! The shim runs its own program with [`ACTION`], so that the two share their pages. The process loads liblxc, hands it the
//! configuration that is in the container's folder, and stays in `lxc_container.start` until the container has ended. liblxc makes the
//! namespaces and cgroups, executes the helper as init, answers `lxc-info`, `lxc-attach`, `lxc-stop` and their like, and removes the
//! cgroups.
//!
//! liblxc reaps init and tells its status only when everything is over. So the program has a `waitpid` of its own, which the dynamic
//! loader prefers to libc's, also for a library that is loaded later (ld.so(8); docs/decisions/0019): it tells the shim before it reaps,
//! so that a status is never lost, and waits for its word. Until then the cgroup is there, in which an OOM kill is counted.
//!
//! liblxc answers at an abstract socket, which belongs to a network namespace: where a container has the host's, every process of root's
//! in it could stop or enter every other container. So `accept` is the program's own too, and lets nobody in who is in another pid or
//! user namespace than the monitor, or has no CAP_SYS_ADMIN.
//!
//! liblxc executes init by its path. The program's own `execvp` takes the descriptor instead that the shim has of the helper: a read-only
//! mount (see [`super::init`]) of the very file that belongs to this shim, also when a newer one has been installed meanwhile.
//!
//! Before it makes the container, liblxc makes every mount that it sees a slave, because it is told of no root file system: the mounts of
//! the host, which would tell no other namespace any more of what is mounted and unmounted. So `mount` is the program's own too, and does
//! not do that in the monitor.
//!
//! A reboot(2) in a pid namespace ends init with SIGHUP, and liblxc would start the container again, behind everybody's back. It is told
//! SIGINT instead, the halt; the shim hears the truth.

use std::{
    ffi::{CStr, CString, OsStr, OsString, c_char, c_int, c_void},
    io::Write,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    process::ExitCode,
    ptr,
    sync::atomic::{AtomicI32, AtomicU64, Ordering},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout},
    sys::socket::{
        AddressFamily, Shutdown, SockFlag, SockType, getsockopt, shutdown, socketpair, sockopt::PeerCredentials,
    },
};

use super::{
    dynamic::Library,
    init,
    wire::{self, FromMonitor},
};
use crate::{
    error::{Error, Result},
    host::cgroup,
};

/// The first argument that makes the shim's program a monitor. lxcpath, name and the helper's path follow.
pub const ACTION: &str = "lxc-monitor";

/// The descriptor that init inherits: the way to its own connection.
pub const BOOT_FD: RawFd = 3;
/// The connection to the shim.
pub const SHIM_FD: RawFd = 4;
/// A file in memory for liblxc's log.
pub const LOG_FD: RawFd = 5;

/// The helper, in a read-only mount.
pub const HELPER_FD: RawFd = 6;

/// Names another liblxc than the system's; for tests of a machine without one.
pub const LIBRARY_VARIABLE: &str = "PROXMOX_LXCRI_LIBLXC";

const LIBRARY: &str = "liblxc.so.1";
const PACKAGE: &str = "liblxc1";

/// The least version: what has `lxc.cgroup.dir.container` and pidfds.
const LEAST: u32 = 5;

/// The first version without cgroup v1: it has no `lxc.cgroup.` keys for devices, and fails where v1 is mounted.
const WITHOUT_V1: u32 = 7;

/// `struct lxc_container` of lxccontainer.h up to the last member that is used. Members are only ever appended.
#[repr(C)]
struct Container {
    name: *mut c_char,
    configfile: *mut c_char,
    pidfile: *mut c_char,
    slock: *mut c_void,
    privlock: *mut c_void,
    numthreads: c_int,
    lxc_conf: *mut c_void,
    error_string: *mut c_char,
    error_num: c_int,
    daemonize: bool,
    config_path: *mut c_char,
    is_defined: *const c_void,
    state: *const c_void,
    is_running: *const c_void,
    freeze: *const c_void,
    unfreeze: *const c_void,
    init_pid: *const c_void,
    load_config: *const c_void,
    start: Option<unsafe extern "C" fn(*mut Container, c_int, *const *const c_char) -> bool>,
    startl: *const c_void,
    stop: *const c_void,
    want_daemonize: Option<unsafe extern "C" fn(*mut Container, bool) -> bool>,
}

/// `struct lxc_log`.
#[repr(C)]
struct Log {
    name: *const c_char,
    lxcpath: *const c_char,
    file: *const c_char,
    level: *const c_char,
    prefix: *const c_char,
    quiet: bool,
}

/// The connection to the shim, once this process is a monitor.
static SHIM: AtomicI32 = AtomicI32::new(-1);
/// The number of this process's mount namespace, once it is a monitor.
static MOUNTS: AtomicU64 = AtomicU64::new(0);

/// Runs the monitor to the container's end. `args` are those after [`ACTION`]. What keeps the container from being started is told to the
/// shim and written to stderr.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    // SAFETY: the shim has given this descriptor to this process, which uses it to its end.
    let shim = unsafe { BorrowedFd::borrow_raw(SHIM_FD) };
    let Err(error) = run(&args.into_iter().collect::<Vec<_>>()) else {
        return ExitCode::SUCCESS;
    };
    // Without a shim there is nobody to tell.
    let _ = writeln!(std::io::stderr(), "{ACTION}: {error}");
    let _ = wire::send(shim, &FromMonitor::Failed(error.into()), &[]);
    ExitCode::FAILURE
}

fn run(args: &[OsString]) -> Result<()> {
    let [lxcpath, name, helper] = args else {
        return Err(Error::invalid(format!(
            "{ACTION} is what this program calls by itself, with lxcpath, name and the helper"
        )));
    };
    // Only init's is handed on.
    for fd in [SHIM_FD, LOG_FD, HELPER_FD] {
        // SAFETY: F_SETFD on a number; a wrong one is an error that changes nothing.
        unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    let (lxcpath, name, helper) = (text(lxcpath)?, text(name)?, text(helper)?);
    let library = Library::open(
        &std::env::var(LIBRARY_VARIABLE).unwrap_or_else(|_| LIBRARY.into()),
        "the backend lxc",
        PACKAGE,
    )?;
    // SAFETY: the names have these signatures in lxccontainer.h and version.h; the library stays open until the process ends.
    let (version, log_init, container_new) = unsafe {
        (
            library.function::<unsafe extern "C" fn() -> *const c_char>(c"lxc_get_version")?,
            library.function::<unsafe extern "C" fn(*mut Log) -> c_int>(c"lxc_log_init")?,
            library.function::<unsafe extern "C" fn(*const c_char, *const c_char) -> *mut Container>(
                c"lxc_container_new",
            )?,
        )
    };
    // SAFETY: returns a C string that is never freed.
    let version = unsafe { CStr::from_ptr(version()) }.to_string_lossy().into_owned();
    check_version(&version, cgroup::speaks_v2()?)?;
    let file = text(OsStr::new(&format!("/proc/self/fd/{LOG_FD}")))?;
    let mut log = Log {
        name: name.as_ptr(),
        lxcpath: lxcpath.as_ptr(),
        file: file.as_ptr(),
        level: c"ERROR".as_ptr(),
        prefix: c"lxc".as_ptr(),
        quiet: true,
    };
    // SAFETY: all strings outlive the call. Without a log nothing is lost but a reason.
    unsafe { log_init(&mut log) };
    // SAFETY: two C strings. It reads the configuration in the container's folder.
    let container = unsafe { container_new(name.as_ptr(), lxcpath.as_ptr()) };
    // SAFETY: null, or a container that liblxc has made and that lives until the process ends.
    let Some(api) = (unsafe { container.as_ref() }) else {
        return Err(Error::unknown("LXC does not take the configuration"));
    };
    let (Some(start), Some(want_daemonize)) = (api.start, api.want_daemonize) else {
        return Err(Error::unknown(format!("liblxc {version} lacks functions")));
    };
    SHIM.store(SHIM_FD, Ordering::Relaxed);
    MOUNTS.store(mount_namespace().unwrap_or_default(), Ordering::Relaxed);
    let argv = [helper.as_ptr(), init::INIT.as_ptr(), name.as_ptr(), ptr::null()];
    // SAFETY: the functions are those of this container; argv is a null-terminated array of C strings that outlives the call.
    let started = unsafe { want_daemonize(container, false) && start(container, 0, argv.as_ptr()) };
    // It answers false as well for a container that ran and ended with a status other than 0. Whoever waits knows by then.
    if started {
        return Ok(());
    }
    Err(Error::unknown("LXC did not start the container"))
}

/// Whether liblxc of this version can run containers on this machine; `v2` is whether cgroup v2 speaks.
fn check_version(version: &str, v2: bool) -> Result<()> {
    let major = version.split('.').next().and_then(|major| major.parse::<u32>().ok());
    match major {
        Some(LEAST..WITHOUT_V1) => Ok(()),
        Some(WITHOUT_V1..) if v2 => Ok(()),
        Some(WITHOUT_V1..) => Err(Error::precondition(format!(
            "liblxc {version} runs containers on cgroup v2 alone, and this machine has v1; boot it with cgroup v2, install {PACKAGE} \
             {LEAST}.0 or 6.0, or use the backend crun"
        ))),
        _ => Err(Error::precondition(format!(
            "liblxc {version} is too old for the backend lxc; install {PACKAGE} {LEAST}.0 or newer"
        ))),
    }
}

fn text(text: &OsStr) -> Result<CString> {
    CString::new(text.as_bytes()).map_err(|e| Error::invalid("a NUL byte in an argument").with_source(e))
}

/// The `waitpid` of the shim's program; the program exports it under that name.
///
/// # Safety
/// As waitpid(2): `status` is null or writable.
pub unsafe extern "C" fn waitpid(pid: libc::pid_t, status: *mut c_int, options: c_int) -> libc::pid_t {
    let shim = SHIM.load(Ordering::Relaxed);
    // While it is a zombie: if this process is killed now, the child becomes the shim's, with its status.
    let told = shim >= 0 && pid > 0 && options & !libc::WNOHANG == 0 && announce(shim, pid, options);
    let mut raw = 0;
    // SAFETY: wait4 writes one int where it is told to, and no resource use.
    let reaped = unsafe {
        libc::syscall(
            libc::SYS_wait4,
            pid,
            &raw mut raw,
            options,
            ptr::null_mut::<libc::rusage>(),
        )
    };
    let reaped = reaped as libc::pid_t;
    if reaped > 0 && shim >= 0 {
        let told = told || {
            let status = match libc::WIFEXITED(raw) {
                true => libc::WEXITSTATUS(raw),
                false => 128 + libc::WTERMSIG(raw),
            };
            tell(shim, reaped, status)
        };
        if told {
            // Until the shim answers or is gone.
            // SAFETY: see `main`.
            let _ = wire::receive(unsafe { BorrowedFd::borrow_raw(shim) });
        }
        if libc::WIFSIGNALED(raw) && libc::WTERMSIG(raw) == libc::SIGHUP {
            raw = libc::SIGINT;
        }
    }
    if reaped > 0 && !status.is_null() {
        // SAFETY: the caller's promise.
        unsafe { *status = raw };
    }
    reaped
}

/// Waits for a child as waitpid(2) does, without reaping it, and tells the shim; whether that was done.
fn announce(shim: RawFd, pid: libc::pid_t, options: c_int) -> bool {
    // SAFETY: an all-zero siginfo_t is valid, and waitid writes nothing else. The pid stays 0 when there is nothing to report.
    let (done, info) = unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let options = libc::WEXITED | libc::WNOWAIT | options;
        (libc::waitid(libc::P_PID, pid.cast_unsigned(), &mut info, options), info)
    };
    // SAFETY: waitid fills these fields (SIGCHLD), or leaves them zero.
    let (found, status) = unsafe { (info.si_pid(), info.si_status()) };
    if done < 0 || found != pid {
        return false;
    }
    let status = match info.si_code {
        libc::CLD_EXITED => status,
        _ => 128 + status,
    };
    tell(shim, pid, status)
}

/// Tells the shim of a child's end, unless it is gone.
fn tell(shim: RawFd, pid: libc::pid_t, status: c_int) -> bool {
    let message = FromMonitor::Reaped {
        pid: pid.cast_unsigned(),
        status: status.cast_unsigned(),
    };
    // SAFETY: see `main`.
    let shim = unsafe { BorrowedFd::borrow_raw(shim) };
    wire::send(shim, &message, &[]).is_ok()
}

/// Whether a path can be an argument of a monitor.
///
/// # Errors
/// `InvalidArgument` for one that LXC would take apart.
pub(super) fn check_path(path: &Path) -> Result<()> {
    match path.to_str() {
        Some(text) if path.is_absolute() && !text.contains([':', '\n', '\0']) => Ok(()),
        _ => Err(Error::invalid(format!(
            "{} cannot be given to LXC; it has to be absolute, in UTF-8, without colons and line breaks",
            path.display()
        ))),
    }
}

/// The `accept` and, with flags, `accept4` of the shim's program; the program exports it under these names.
///
/// # Safety
/// As accept4(2): `address` and `length` are null or writable.
pub unsafe extern "C" fn accept4(
    socket: c_int,
    address: *mut libc::sockaddr,
    length: *mut libc::socklen_t,
    flags: c_int,
) -> c_int {
    // SAFETY: the caller's promise.
    let peer = unsafe { libc::syscall(libc::SYS_accept4, socket, address, length, flags) } as c_int;
    if peer < 0 || SHIM.load(Ordering::Relaxed) < 0 {
        return peer;
    }
    // SAFETY: accept4 has just made it for us.
    let stranger = unsafe { OwnedFd::from_raw_fd(peer) };
    if is_of_the_host(&stranger) {
        return stranger.into_raw_fd();
    }
    // An error would end liblxc's loop, and the container. It gets somebody who has hung up already.
    match socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC) {
        Ok((silent, _)) => silent.into_raw_fd(),
        // No descriptors left: then a shut connection has to do.
        Err(_) => {
            let _ = shutdown(stranger.as_raw_fd(), Shutdown::Both);
            stranger.into_raw_fd()
        }
    }
}

/// As accept(2).
///
/// # Safety
/// As [`accept4`].
pub unsafe extern "C" fn accept(socket: c_int, address: *mut libc::sockaddr, length: *mut libc::socklen_t) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { accept4(socket, address, length, 0) }
}

/// Whether who has connected is in the pid and user namespace of this process, may administer it, and still lives.
fn is_of_the_host(peer: &OwnedFd) -> bool {
    // 0 for somebody whom this pid namespace does not see.
    let Some(pid) = getsockopt(peer, PeerCredentials)
        .ok()
        .map(|peer| peer.pid())
        .filter(|pid| *pid > 0)
    else {
        return false;
    };
    let same = |kind: &str| {
        let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok();
        of("self").is_some_and(|own| of(&pid.to_string()) == Some(own))
    };
    // Root of a container that has all of the host's namespaces is root no more than by name.
    let rules = || {
        const SYS_ADMIN: u32 = 21;
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let mut lines = status.lines().filter_map(|line| line.strip_prefix("CapEff:"));
        let effective = lines.next().and_then(|set| u64::from_str_radix(set.trim(), 16).ok());
        effective.is_some_and(|set| set & 1 << SYS_ADMIN != 0)
    };
    // Last: as long as it lives, the number was its own.
    same("pid") && same("user") && rules() && lives(peer)
}

/// Whether the process that has connected has not ended. Kernels before 6.5 do not tell, and are believed.
fn lives(peer: &OwnedFd) -> bool {
    const SO_PEERPIDFD: c_int = 77;
    let (mut pidfd, mut length) = (-1, size_of::<c_int>() as libc::socklen_t);
    // SAFETY: both pointers are live locals of the size that is told.
    let told = unsafe {
        libc::getsockopt(
            peer.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut pidfd).cast(),
            &raw mut length,
        )
    };
    if told < 0 {
        return std::io::Error::last_os_error().raw_os_error() == Some(libc::ENOPROTOOPT);
    }
    // SAFETY: the call succeeded, so the descriptor is new and ours.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    matches!(nix::poll::poll(&mut fds, PollTimeout::ZERO), Ok(0))
}

/// The `execvp` of the shim's program; the program exports it under that name.
///
/// # Safety
/// As execvp(3): `file` is a C string, `argv` a null-terminated array of them.
pub unsafe extern "C" fn execvp(file: *const c_char, argv: *const *const c_char) -> c_int {
    /// More than init has.
    const MOST: usize = 8;
    // SAFETY: the caller's promise.
    let args: Vec<*const c_char> = (0..MOST)
        .map_while(|index| Some(unsafe { *argv.add(index) }).filter(|arg| !arg.is_null()))
        .collect();
    // SAFETY: as above.
    let first = args.get(1).map(|arg| unsafe { CStr::from_ptr(*arg) });
    if SHIM.load(Ordering::Relaxed) >= 0 && args.len() < MOST && first == Some(init::INIT) {
        let mut sealed = args;
        sealed[1] = init::SEALED_INIT.as_ptr();
        sealed.push(ptr::null());
        let none: [*const c_char; 1] = [ptr::null()];
        // SAFETY: the arrays are null-terminated and hold C strings. It returns only when it failed, and then by the path.
        unsafe {
            libc::syscall(
                libc::SYS_execveat,
                HELPER_FD,
                c"".as_ptr(),
                sealed.as_ptr(),
                none.as_ptr(),
                libc::AT_EMPTY_PATH,
            );
        }
    }
    unsafe extern "C" {
        static environ: *const *const c_char;
    }
    // SAFETY: the caller's promise; `environ` is libc's.
    unsafe { libc::execvpe(file, argv, environ) }
}

/// The `mount` of the shim's program; the program exports it under that name.
///
/// # Safety
/// As mount(2): all pointers are null or C strings; `data` is what the file system takes.
pub unsafe extern "C" fn mount(
    source: *const c_char,
    target: *const c_char,
    kind: *const c_char,
    flags: libc::c_ulong,
    data: *const c_void,
) -> c_int {
    let propagation = libc::MS_SHARED | libc::MS_PRIVATE | libc::MS_SLAVE | libc::MS_UNBINDABLE;
    // Init, a child of this process, has its mounts for itself.
    let of_monitor = || Some(MOUNTS.load(Ordering::Relaxed)) == mount_namespace();
    if SHIM.load(Ordering::Relaxed) >= 0 && flags & propagation != 0 && of_monitor() {
        return 0;
    }
    // SAFETY: the caller's promise.
    unsafe { libc::syscall(libc::SYS_mount, source, target, kind, flags, data) as c_int }
}

/// The number of the mount namespace of this process.
fn mount_namespace() -> Option<u64> {
    nix::sys::stat::stat(c"/proc/self/ns/mnt").ok().map(|stat| stat.st_ino)
}

#[cfg(test)]
mod tests {
    use std::{fs, process::Command, thread};

    use nix::fcntl::{FcntlArg, OFlag, fcntl};

    use super::*;
    use crate::error::Kind;

    /// Whoever kills the monitor between the two would take the status along.
    #[test]
    fn a_child_is_told_before_it_is_reaped() {
        let (ours, theirs) = wire::pair().unwrap();
        // So much unread that the monitor cannot tell yet.
        fcntl(&theirs, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        while wire::send(theirs.as_fd(), &"", &[]).is_ok() {}
        fcntl(&theirs, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
        let child = Command::new("sh").args(["-c", "exit 7"]).spawn().unwrap().id();
        let (send, receive) = std::sync::mpsc::channel();
        SHIM.store(theirs.as_raw_fd(), Ordering::Relaxed);
        let monitor = thread::spawn(move || {
            send.send(nix::unistd::gettid()).unwrap();
            let mut status = 0;
            // SAFETY: a child of this process, and a live local.
            let reaped = unsafe { waitpid(child.cast_signed(), &mut status, 0) };
            (reaped, libc::WEXITSTATUS(status))
        });
        let thread = receive.recv().unwrap();
        let telling = format!("{} ", libc::SYS_sendmsg);
        let call = format!("/proc/self/task/{thread}/syscall");
        while !fs::read_to_string(&call).unwrap().starts_with(&telling) {
            thread::yield_now();
        }
        let stat = fs::read_to_string(format!("/proc/{child}/stat")).unwrap();
        assert!(stat.contains(") Z "), "{stat}");
        let told = loop {
            let packet = wire::receive(ours.as_fd()).unwrap().unwrap();
            if let Ok(told) = packet.read::<FromMonitor>() {
                break told;
            }
        };
        assert_eq!(told, FromMonitor::Reaped { pid: child, status: 7 });
        wire::send(ours.as_fd(), &wire::Continue, &[]).unwrap();
        assert_eq!(monitor.join().unwrap(), (child.cast_signed(), 7));
        SHIM.store(-1, Ordering::Relaxed);
    }

    #[test]
    fn a_liblxc_that_cannot_run_containers_here_is_refused_by_its_version() {
        // As lxc_get_version of Debian 12, 13 and sid tells them; and of a development version.
        for (version, v2) in [
            ("5.0.2", false),
            ("6.0.4", false),
            ("6.0.4", true),
            ("7.0.0", true),
            ("7.0.0-devel", true),
            ("10.1", true),
        ] {
            assert!(check_version(version, v2).is_ok(), "{version}");
        }
        for (version, v2, wanted) in [
            ("4.0.6", true, "liblxc 4.0.6 is too old"),
            ("", true, "too old"),
            ("7.0.0", false, "liblxc 7.0.0 runs containers on cgroup v2 alone"),
        ] {
            let error = check_version(version, v2).unwrap_err();
            assert_eq!(error.kind(), Kind::FailedPrecondition);
            assert!(error.to_string().contains(wanted), "{error}");
        }
    }
}
