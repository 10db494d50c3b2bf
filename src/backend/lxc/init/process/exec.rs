//! From the helper to the user's program.

use std::{
    ffi::CString,
    fs::File,
    io::Read,
    os::{
        fd::BorrowedFd,
        unix::{
            ffi::OsStrExt,
            fs::{FileTypeExt, OpenOptionsExt},
        },
    },
    ptr,
};

use nix::{
    errno::Errno,
    sys::{
        signal::SigSet,
        stat::{Mode, SFlag, fstat, umask},
    },
    unistd::{Gid, Uid, chdir, execve, fchown},
};

use super::{
    Process, Program,
    capabilities::{self, prctl},
    filter::{Agent, Loader},
    program::{no_cwd, not_executed},
    value_of,
};
use crate::{
    backend::lxc::init::{proc::Proc, seal_descriptors, terminal::lead_session},
    error::{Context, Error, Result},
};

/// What [`Process::exec`] needs to know beside the process itself.
#[derive(Debug)]
pub struct Start<'a> {
    /// procfs that shows this process's pid namespace.
    pub proc: &'a Proc,
    /// [`Process::constrain`] was called for this process.
    pub constrained: bool,
    /// Whether to leave the session keyring of the helper (`no_new_keyring`).
    pub keep_keyring: bool,
    /// Who gets the descriptor of a filter that has a listener.
    pub agent: Option<Agent>,
}

/// Where a container keeps its users, and how much of that is read.
const PASSWD: &str = "/etc/passwd";
const PASSWD_MAX_BYTES: u64 = 4 << 20;

impl Process {
    /// Becomes the program; returns only the error. Call it in the container's root, as root there, in the process that is to become the
    /// program and that has no other thread, with stdio (or the terminal) in place. The helper's memory cannot be read from the
    /// container from here on; see also [`forbid_tracing`](super::forbid_tracing) for the time before.
    ///
    /// After an error this process is neither what it was nor what it should be, and MUST end: with `seccomp` it may be that not even
    /// the error can be told. Without `no_new_privileges` the filter is loaded before the user is changed, so that loading is still
    /// allowed, and with it as the last thing of all, as crun and runc do. A profile has to allow what is done after it.
    pub fn exec(&self, program: &Program, start: Start<'_>) -> Error {
        match self.become_program(program, start) {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    fn become_program(&self, program: &Program, start: Start<'_>) -> Result<std::convert::Infallible> {
        // Everything that allocates or opens files is done while that is allowed.
        let path = c_string(program.path.as_os_str().as_bytes())?;
        let args = c_strings(&self.args)?;
        let env = c_strings(&self.environment())?;
        super::forbid_tracing()?;
        let mut loader = match &self.seccomp {
            Some(filter) => Some(Loader::new(filter, start.agent)?),
            None => None,
        };
        if !start.constrained {
            self.constrain(start.proc, None)?;
        }
        lead_session()?;
        if !start.keep_keyring {
            // Or SELinux would not let the program use it. An exec forgets it.
            if let Some(label) = self.selinux_label(start.proc) {
                proc_label(start.proc, "keycreate", label)?;
            }
            join_new_keyring()?;
        }
        if let Some(personality) = self.personality {
            // SAFETY: personality takes an integer.
            Errno::result(unsafe { libc::personality(personality.into()) })
                .context(|| "cannot set linux.personality")?;
        }
        self.own_stdio()?;
        self.set_groups(start.proc)?;
        umask(Mode::from_bits_retain(self.umask));
        // Root may enter folders that the user may not; on NFS it can be the other way round. crun tries both, too.
        let entered = self.enter_cwd();
        seal_descriptors().context(|| "cannot seal the descriptors")?;
        reset_signals()?;
        if !self.no_new_privileges
            && let Some(loader) = loader.take()
        {
            loader.load()?;
        }
        capabilities::bound(self.capabilities.bounding)?;
        self.become_user()?;
        capabilities::set(&self.capabilities)?;
        if entered.is_err() {
            self.enter_cwd()?;
        }
        if self.no_new_privileges {
            prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0).context(|| "cannot set process.noNewPrivileges")?;
        }
        if let Some(loader) = loader.take() {
            loader.load()?;
        }
        let Err(errno) = execve(&path, &args, &env);
        Err(not_executed(&program.path, errno))
    }

    /// The variables, with HOME as /etc/passwd of the container has it.
    fn environment(&self) -> Vec<String> {
        let mut env = self.env.clone();
        if !env.iter().any(|variable| value_of(variable, "HOME").is_some()) {
            env.push(format!("HOME={}", home(self.uid)));
        }
        env
    }

    /// Gives stdio to the user, who may want to open /dev/stdout again. crun does so with all but terminals; here devices keep their owner,
    /// for they may be the node's.
    fn own_stdio(&self) -> Result<()> {
        for number in 0..=2 {
            // SAFETY: these descriptors are stdio for as long as the process lives; a closed one is an error of fstat(2).
            let stream = unsafe { BorrowedFd::borrow_raw(number) };
            let Ok(stat) = fstat(stream) else {
                continue;
            };
            let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
            let is_device = kind == SFlag::S_IFCHR || kind == SFlag::S_IFBLK;
            if is_device || (stat.st_uid, stat.st_gid) == (self.uid, self.gid) {
                continue;
            }
            match fchown(stream, Some(Uid::from_raw(self.uid)), Some(Gid::from_raw(self.gid))) {
                // The owner is not in the user namespace, or the file system is read-only: crun goes on.
                Ok(()) | Err(Errno::EINVAL | Errno::EPERM | Errno::EROFS) => {}
                Err(errno) => return Err(errno).context(|| format!("cannot give descriptor {number} to the user")),
            }
        }
        Ok(())
    }

    fn set_groups(&self, proc: &Proc) -> Result<()> {
        // Where the user namespace forbids it, crun leaves them as they are.
        if proc
            .read("thread-self/setgroups")
            .is_ok_and(|text| text.starts_with("deny"))
        {
            return Ok(());
        }
        // Not by libc, which tells all threads (`filter::Loader` may have one).
        // SAFETY: the list has the length that is told, and outlives the call.
        let result = unsafe { libc::syscall(libc::SYS_setgroups, self.groups.len(), self.groups.as_ptr()) };
        Errno::result(result)
            .map(drop)
            .context(|| "cannot set process.user.additionalGids")
    }

    fn become_user(&self) -> Result<()> {
        prctl(libc::PR_SET_KEEPCAPS, 1, 0).context(|| "cannot keep the capabilities")?;
        // SAFETY: three integers each. Not by libc, see `set_groups`.
        let result = unsafe { libc::syscall(libc::SYS_setresgid, self.gid, self.gid, self.gid) };
        Errno::result(result).context(|| format!("cannot set process.user.gid {}", self.gid))?;
        // SAFETY: as above.
        let result = unsafe { libc::syscall(libc::SYS_setresuid, self.uid, self.uid, self.uid) };
        Errno::result(result).context(|| format!("cannot set process.user.uid {}", self.uid))?;
        // A program that is no longer there shall not end the container; some kernels clear it with the user, some do not.
        prctl(libc::PR_SET_PDEATHSIG, 0, 0).context(|| "cannot clear the parent's death signal")
    }

    fn enter_cwd(&self) -> Result<()> {
        chdir(&self.cwd).map_err(|errno| no_cwd(&self.cwd, errno))?;
        // A magic link of /proc can lead to a folder of the host that somebody has left open (CVE-2024-21626): then the kernel gives
        // a path that does not begin with a slash.
        let mut buffer = [0_u8; libc::PATH_MAX as usize];
        // SAFETY: the kernel writes at most as many bytes as it is told.
        let result = unsafe { libc::syscall(libc::SYS_getcwd, buffer.as_mut_ptr(), buffer.len()) };
        match Errno::result(result) {
            Ok(_) if buffer.first() == Some(&b'/') => Ok(()),
            // Longer than PATH_MAX: reachable.
            Err(Errno::ERANGE) => Ok(()),
            Err(errno) => Err(no_cwd(&self.cwd, errno)),
            Ok(_) => Err(Error::invalid(format!(
                "process.cwd: {} is outside of the container's root",
                self.cwd.display()
            ))),
        }
    }

    /// Sets the security modules' labels of what this process executes next, and of what its children execute: startContainer hooks are
    /// confined as the program is, as with crun and runc. crun ignores the labels of a module that is not enabled.
    ///
    /// # Errors
    /// `InvalidArgument` with the field: the label is not known.
    pub fn label(&self, proc: &Proc) -> Result<()> {
        if let Some(profile) = &self.apparmor {
            // Only a kernel with AppArmor has the folder, and only an enabled AppArmor answers there. A procfs of another pid namespace,
            // which the container may have mounted in the place of its own, has nothing of this process at all.
            let now = proc.read("thread-self/attr/apparmor/current");
            let knows_us = proc.read("thread-self/status").is_ok();
            let absent =
                |error: &std::io::Error| knows_us && matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL));
            if !now.as_ref().is_err_and(absent) {
                proc.write("thread-self/attr/apparmor/exec", &format!("exec {profile}"))
                    .context(|| format!("cannot set process.apparmorProfile {profile:?}; is it loaded?"))
                    .map_err(as_wrong)?;
            }
        }
        match self.selinux_label(proc) {
            Some(label) => proc_label(proc, "exec", label),
            None => Ok(()),
        }
    }

    /// The label, where SELinux is enabled.
    fn selinux_label(&self, proc: &Proc) -> Option<&str> {
        let label = self.selinux.as_deref()?;
        // An enabled SELinux has its file system. A procfs that cannot tell (subset=pid) is no reason to go on without.
        let absent = |text: String| !text.lines().any(|line| line == "nodev\tselinuxfs");
        (!proc.read("filesystems").is_ok_and(absent)).then_some(label)
    }
}

/// Sets what SELinux labels by `attribute` (proc_pid_attr(5)).
fn proc_label(proc: &Proc, attribute: &str, label: &str) -> Result<()> {
    proc.write(&format!("thread-self/attr/{attribute}"), label)
        .context(|| format!("cannot set process.selinuxLabel {label:?}"))
        .map_err(as_wrong)
}

/// "Not found" of a profile must not look like one of a container.
fn as_wrong(error: Error) -> Error {
    Error::invalid("the process cannot be confined").with_source(error)
}

fn c_string(bytes: &[u8]) -> Result<CString> {
    CString::new(bytes).map_err(|_| Error::invalid("process: there is a NUL in a text for the program"))
}

fn c_strings(texts: &[String]) -> Result<Vec<CString>> {
    texts.iter().map(|text| c_string(text.as_bytes())).collect()
}

/// The home of a user. `/` when nobody knows, as with crun.
fn home(uid: u32) -> String {
    let text = || -> std::io::Result<String> {
        // It is the image's: anything may be there.
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC)
            .open(PASSWD)?;
        let kind = file.metadata()?.file_type();
        if kind.is_char_device() || kind.is_block_device() {
            return Err(Errno::EINVAL.into());
        }
        let mut text = Vec::new();
        file.take(PASSWD_MAX_BYTES).read_to_end(&mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    };
    text()
        .ok()
        .as_deref()
        .and_then(|text| home_in(text, uid))
        .unwrap_or("/")
        .to_owned()
}

/// passwd(5)
pub(super) fn home_in(passwd: &str, uid: u32) -> Option<&str> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let number = fields.nth(2)?;
        let home = fields.nth(2)?;
        (number.parse() == Ok(uid) && !home.is_empty() && !home.contains('\0')).then_some(home)
    })
}

/// A session keyring that nobody has prepared: without a name, unlike crun's and runc's, it cannot be another container's.
pub(super) fn join_new_keyring() -> Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_int = 1;
    // SAFETY: the name is null.
    let result = unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            KEYCTL_JOIN_SESSION_KEYRING,
            ptr::null::<libc::c_char>(),
        )
    };
    match Errno::result(result) {
        // A kernel without keyrings.
        Ok(_) | Err(Errno::ENOSYS) => Ok(()),
        Err(errno) => Err(errno)
            .context(|| "cannot make a session keyring; raise kernel.keys.maxkeys and maxbytes, or set no_new_keyring"),
    }
}

/// No signal is ignored or blocked in the program.
fn reset_signals() -> Result<()> {
    // The kernel's struct sigaction with SIG_DFL, no flags and an empty mask is all zero.
    let default = [0_u64; 4];
    for signal in 1..=64 {
        // Not by libc's sigaction, which leaves out the two that it keeps for itself.
        // SAFETY: the kernel reads one sigaction where the pointer says. It refuses SIGKILL and SIGSTOP, which cannot be changed.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                default.as_ptr(),
                ptr::null_mut::<u64>(),
                size_of::<u64>(),
            )
        };
    }
    SigSet::empty()
        .thread_set_mask()
        .context(|| "cannot unblock the signals")
}
