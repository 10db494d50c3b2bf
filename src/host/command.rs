//! The only place that forks and reaps.
//!
//! Every process that this crate starts is a [`Child`] of the [`Reaper`]; every process that becomes our child without being started
//! by us (a container's init, once the runtime program has left) is given to it by [`Reaper::adopt`]. Each of them is held by a
//! pidfd and reaped through that pidfd, never by number, so that a reused pid cannot be mistaken for it. What nobody asked for
//! (orphans of containers without a pid namespace of their own) is reaped by [`Reaper::run`].
//!
//! Nothing else in the process may wait for children.

mod pidfd;
mod reaper;

use std::{
    ffi::OsString,
    fs, io,
    os::{
        fd::{FromRawFd, OwnedFd, RawFd},
        raw::{c_char, c_int, c_void},
        unix::{ffi::OsStrExt, fs::PermissionsExt},
    },
    path::PathBuf,
    ptr,
};

use crate::error::{Context, Error, Result};

pub use pidfd::{Pidfd, end, identity, is_alive, left_of_session, parent};
pub use reaper::{Child, Hold, OUTPUT_MAX_BYTES, Output, Reaper};

/// Stack of a child between clone and exec. The child only makes system calls; unoptimised builds need some KiB.
const CHILD_STACK_BYTES: usize = 64 << 10;

/// Makes orphaned descendants our children, so that a container's init is reaped here after the runtime program has left.
///
/// # Errors
/// The operating system's.
pub fn become_subreaper() -> Result<()> {
    nix::sys::prctl::set_child_subreaper(true).context(|| "cannot become the reaper of orphaned descendants")
}

/// A program to be run, with everything that its process starts with.
///
/// Without more words: the environment of this process, its working folder, `/dev/null` for stdin, stdout and stderr, no other
/// descriptor, no signal blocked or ignored.
#[derive(Debug)]
pub struct Command {
    program: OsString,
    arg0: Option<OsString>,
    args: Vec<OsString>,
    clear_env: bool,
    env: Vec<(OsString, OsString)>,
    cwd: Option<PathBuf>,
    fds: Vec<(OwnedFd, RawFd)>,
    die_with_parent: bool,
    group: Group,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Group {
    Inherited,
    Process,
    Session,
}

impl Command {
    /// A program: a path when the name has a `/`, else looked up in `PATH`.
    pub fn new(program: impl Into<OsString>) -> Self {
        Self {
            program: program.into(),
            arg0: None,
            args: Vec::new(),
            clear_env: false,
            env: Vec::new(),
            cwd: None,
            fds: Vec::new(),
            die_with_parent: false,
            group: Group::Inherited,
        }
    }

    /// What the program sees as its name, argument 0; without it the name that it was given by.
    pub fn arg0(mut self, arg0: impl Into<OsString>) -> Self {
        self.arg0 = Some(arg0.into());
        self
    }

    /// One more argument.
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// More arguments.
    pub fn args<I: IntoIterator<Item: Into<OsString>>>(mut self, args: I) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Starts with an empty environment.
    pub fn env_clear(mut self) -> Self {
        self.clear_env = true;
        self
    }

    /// Sets a variable.
    pub fn env(mut self, key: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.env.push((key.into(), value.into()));
        self
    }

    /// The working folder.
    pub fn cwd(mut self, path: impl Into<PathBuf>) -> Self {
        self.cwd = Some(path.into());
        self
    }

    /// Descriptor 0.
    pub fn stdin(self, fd: OwnedFd) -> Self {
        self.fd(0, fd)
    }

    /// Descriptor 1.
    pub fn stdout(self, fd: OwnedFd) -> Self {
        self.fd(1, fd)
    }

    /// Descriptor 2.
    pub fn stderr(self, fd: OwnedFd) -> Self {
        self.fd(2, fd)
    }

    /// A descriptor that the program finds at `number`; a later call for the same number wins.
    pub fn fd(mut self, number: RawFd, fd: OwnedFd) -> Self {
        self.fds.retain(|(_, taken)| *taken != number);
        self.fds.push((fd, number));
        self
    }

    /// The program gets SIGKILL when the thread that spawns it ends (PR_SET_PDEATHSIG), also when that happened before it was set.
    pub fn die_with_parent(mut self) -> Self {
        self.die_with_parent = true;
        self
    }

    /// A process group of its own; it is killed as a whole when its [`Child`] is dropped.
    pub fn process_group(mut self) -> Self {
        self.group = Group::Process;
        self
    }

    /// A session (and process group) of its own; it is killed as a whole when its [`Child`] is dropped.
    pub fn session(mut self) -> Self {
        self.group = Group::Session;
        self
    }

    /// Variables as the program will see them, the last of a name winning.
    fn environment(&self) -> Vec<(OsString, OsString)> {
        let mut env: Vec<(OsString, OsString)> = if self.clear_env {
            Vec::new()
        } else {
            std::env::vars_os()
                .filter(|(key, _)| !self.env.iter().any(|(set, _)| set == key))
                .collect()
        };
        for (i, (key, value)) in self.env.iter().enumerate() {
            if !self.env[i + 1..].iter().any(|(later, _)| later == key) {
                env.push((key.clone(), value.clone()));
            }
        }
        env
    }

    fn lookup(&self) -> Result<PathBuf> {
        if self.program.as_bytes().contains(&b'/') {
            return Ok(self.program.clone().into());
        }
        let path = std::env::var_os("PATH")
            .unwrap_or_else(|| "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into());
        let runs = |file: &PathBuf| {
            fs::metadata(file).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
        };
        std::env::split_paths(&path)
            .map(|folder| folder.join(&self.program))
            .find(runs)
            .ok_or_else(|| {
                Error::not_found(format!(
                    "program {} is in none of the folders of PATH ({})",
                    self.program.display(),
                    path.display()
                ))
            })
    }
}

/// What the child reads between clone and exec. It shares the parent's memory, so it must not allocate, lock or panic.
struct Plan {
    program: *const c_char,
    argv: *const *const c_char,
    envp: *const *const c_char,
    /// Null to stay.
    cwd: *const c_char,
    /// (descriptor now, number wanted).
    fds: *mut (c_int, c_int),
    fds_len: usize,
    /// The parent to die with; 0 for none.
    parent: libc::pid_t,
    group: Group,
    /// Written by the child: where it failed, and the errno.
    failed: Step,
    errno: c_int,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Nothing,
    Prepare,
    Cwd,
    Exec,
}

extern "C" fn child(plan: *mut c_void) -> c_int {
    // SAFETY: `plan` is the `Plan` of `clone_and_exec`, whose thread sleeps until this process has called exec or exit (CLONE_VFORK),
    // so it is valid and not used by anybody else.
    let plan = unsafe { &mut *plan.cast::<Plan>() };
    // SAFETY: as above for every pointer in it.
    plan.failed = unsafe { become_program(plan) };
    // SAFETY: errno is the thread's, and this process has borrowed the thread that sleeps.
    plan.errno = unsafe { *libc::__errno_location() };
    127
}

/// Returns only when something failed; errno says why.
///
/// # Safety
/// To be called in a child made by clone(CLONE_VM | CLONE_VFORK), with all signals blocked and every pointer of `plan` valid.
unsafe fn become_program(plan: &Plan) -> Step {
    // SAFETY: only system calls (async-signal-safe) on valid pointers and on this process's own descriptor table, signal table and
    // attributes, which it does not share with the parent.
    unsafe {
        // The kernel's struct sigaction with SIG_DFL, no flags and an empty mask is all zero.
        let default = [0u64; 4];
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        // Handlers must be gone before signals are let through: they would run on the parent's memory. Not by libc's sigaction,
        // which leaves out the two that it keeps for itself; whoever started us may have left them ignored.
        for signal in 1..=64 {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                default.as_ptr(),
                ptr::null_mut::<u64>(),
                size_of::<u64>(),
            );
        }
        let grouped = match plan.group {
            Group::Inherited => 0,
            Group::Process => libc::setpgid(0, 0),
            Group::Session => libc::setsid(),
        };
        if grouped < 0 {
            return Step::Prepare;
        }
        if plan.parent != 0 {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) < 0 {
                return Step::Prepare;
            }
            // The parent may have died before the line above.
            if libc::getppid() != plan.parent {
                libc::_exit(128 + libc::SIGKILL);
            }
        }
        let mut highest = 2;
        for i in 0..plan.fds_len {
            highest = highest.max((*plan.fds.add(i)).1);
        }
        // First out of the way of the wanted numbers, then to their places.
        for i in 0..plan.fds_len {
            let entry = &mut *plan.fds.add(i);
            if entry.0 <= highest {
                entry.0 = libc::fcntl(entry.0, libc::F_DUPFD_CLOEXEC, highest + 1);
                if entry.0 < 0 {
                    return Step::Prepare;
                }
            }
        }
        // Descriptors of this process are close-on-exec; what it was itself started with by mistake ends here too. Kernels before
        // 5.11 refuse, and then the first sentence has to do.
        libc::syscall(libc::SYS_close_range, 3, c_int::MAX, libc::CLOSE_RANGE_CLOEXEC);
        for i in 0..plan.fds_len {
            let (now, wanted) = *plan.fds.add(i);
            if libc::dup2(now, wanted) < 0 {
                return Step::Prepare;
            }
        }
        if !plan.cwd.is_null() && libc::chdir(plan.cwd) < 0 {
            return Step::Cwd;
        }
        libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut());
        libc::execve(plan.program, plan.argv, plan.envp);
        Step::Exec
    }
}

/// Starts the process of `plan`; answers its pid and pidfd once it has called exec or exit.
fn clone_and_exec(plan: &mut Plan) -> io::Result<(u32, OwnedFd)> {
    let mut stack = Vec::<u128>::with_capacity(CHILD_STACK_BYTES / size_of::<u128>());
    let top = stack.spare_capacity_mut().as_mut_ptr_range().end;
    let mut pidfd: c_int = -1;
    // A copy of the memory is not made (CLONE_VM): the time of a spawn does not depend on the size of this process, and the child
    // reports errors through `plan`. No handler of ours may run in the child, so signals are blocked until it has reset them.
    // SAFETY: `stack` outlives the child's use of it, because CLONE_VFORK lets this thread sleep until exec or exit; it grows down
    // from `top`, which is aligned to 16. `plan` likewise. `child` keeps to what such a child may do.
    let pid = unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        let pid = libc::clone(
            child,
            top.cast(),
            libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD,
            ptr::from_mut(plan).cast(),
            &mut pidfd as *mut c_int,
        );
        let error = io::Error::last_os_error();
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, ptr::null_mut());
        if pid < 0 {
            return Err(error);
        }
        pid
    };
    // SAFETY: clone succeeded, so CLONE_PIDFD has stored a new descriptor, close-on-exec.
    Ok((pid as u32, unsafe { OwnedFd::from_raw_fd(pidfd) }))
}

/// For tests of every module that run a [`Reaper`] to the full: it reaps all strangers, so it must not share a process with tests
/// that start children of their own.
#[cfg(test)]
pub(crate) mod isolation {
    const MARK: &str = "PROXMOX_LXCRI_TEST_INSIDE";

    /// Runs the test `name` (its full path inside the crate) again in a process of its own, behind the command line `wrapper`.
    /// Answers whether this is that process, so that the body is to be run.
    pub(crate) fn inside(name: &str, wrapper: &[&str]) -> bool {
        if std::env::var_os(MARK).is_some_and(|inside| inside == name) {
            return true;
        }
        let exe = std::env::current_exe().unwrap();
        let mut line: Vec<&std::ffi::OsStr> = wrapper.iter().map(std::ffi::OsStr::new).collect();
        line.push(exe.as_os_str());
        let output = std::process::Command::new(line[0])
            .args(&line[1..])
            .args(["--exact", name, "--nocapture", "--test-threads=1"])
            .env(MARK, name)
            .output()
            .unwrap();
        let text = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        // "1 passed" also tells a mistyped name from a test that ran.
        assert!(
            output.status.success() && text.contains("1 passed"),
            "{name}: {}\n{text}",
            output.status
        );
        false
    }

    /// A current-thread runtime, as the shim has it.
    pub(crate) fn block_on<F: Future>(body: F) -> F::Output {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(async { tokio::time::timeout(crate::patience::patience(60), body).await })
            .expect("a minute is enough for every test")
    }
}

#[cfg(test)]
mod tests;
