//! OCI `linux.seccomp` as a program for seccomp(2).
//!
//! [`compile`] runs in the shim, before the container's init exists, so that a bad profile is an error of Create and init has
//! nothing left to do but one system call. The rules mean what they mean to crun and runc; where those two differ, the place says
//! whom it follows.
//!
//! libseccomp makes the program. It is loaded by dlopen(3) for the time of one call: a shim whose containers have no profile
//! neither needs the library nor carries it in memory.
//!
//! Unlike runc, and like crun, no prologue answers ENOSYS for system calls that are newer than the profile: they get the default
//! action.

use std::{
    ffi::{CString, c_char, c_int, c_uint, c_void},
    io::{self, Read, Seek},
    os::fd::{AsRawFd, RawFd},
    path::PathBuf,
    ptr::NonNull,
};

use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSyscall,
};
use serde::{Deserialize, Serialize};

use super::dynamic;
use crate::{
    error::{Context, Error, Kind, Result},
    host::memory_file,
};

const LIBRARY: &str = "libseccomp.so.2";
const PACKAGE: &str = "libseccomp2";

/// The arguments of a system call.
const ARGUMENTS: usize = 6;

/// The kernel's BPF_MAXINSNS: it refuses longer programs with EINVAL, which at the time of loading would explain nothing.
const MAX_INSTRUCTIONS: usize = 4096;

const INSTRUCTION_BYTES: usize = size_of::<libc::sock_filter>();

/// libseccomp counts the instructions of a program in 16 bits, and writes past its memory when that count wraps.
const LIBRARY_INSTRUCTIONS: usize = u16::MAX as usize;

/// The greatest errno that libseccomp lets a program return.
const MAX_ERRNO: u32 = 4094;

/// A program and how to load it.
///
/// It is for the thread that loads it and for what that thread starts later. The loader MUST have set no_new_privs or have
/// CAP_SYS_ADMIN in its user namespace; the program is in the byte order of this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filter {
    /// An array of `struct sock_filter` (linux/filter.h): 1 to 4096 instructions of 8 bytes. The kernel copies it, so its alignment
    /// does not matter.
    #[serde(with = "hexadecimal")]
    pub program: Vec<u8>,
    /// `SECCOMP_FILTER_FLAG_*` for SECCOMP_SET_MODE_FILTER, NEW_LISTENER among them exactly when there is a [`Filter::listener`].
    /// Then a success returns a descriptor, else 0; a failure is always an errno.
    ///
    /// A kernel that lacks one of the flags answers EINVAL. crun then loads the same program with flags 0, unless there is a listener.
    pub flags: u64,
    /// Who answers SCMP_ACT_NOTIFY.
    ///
    /// As with crun every system call may be the agent's to answer, write(2) and sendmsg(2) too. So the loader MUST NOT make a system
    /// call between seccomp(2) and the moment at which the descriptor is with somebody else: another thread takes it, out
    /// of the table of descriptors that both share.
    pub listener: Option<Listener>,
}

/// The agent that gets the descriptor (OCI config-linux.md, listenerPath).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listener {
    /// Path of its unix stream socket.
    pub path: PathBuf,
    /// The `metadata` of the container process state that is sent to it.
    pub metadata: Option<String>,
}

/// A program as text: two digits for a byte, where a list of numbers would take four characters.
mod hexadecimal {
    use std::fmt::Write;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use super::INSTRUCTION_BYTES;

    pub(super) fn serialize<S: Serializer>(program: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        let mut text = String::with_capacity(2 * program.len());
        for byte in program {
            // Writing to a String cannot fail.
            let _ = write!(text, "{byte:02x}");
        }
        serializer.serialize_str(&text)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
        let (pairs, rest) = text.as_bytes().as_chunks::<2>();
        let program: Option<Vec<u8>> = pairs
            .iter()
            .map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?))
            .collect();
        program
            .filter(|program| rest.is_empty() && program.len() % INSTRUCTION_BYTES == 0)
            .ok_or_else(|| D::Error::custom("a seccomp program is a text of hexadecimal instructions"))
    }
}

/// Compiles a profile.
///
/// There is no profile without a program. One that allows everything still ends processes that make system calls of an architecture
/// which it does not name, and crun and runc load it too.
///
/// Leaves nothing behind: no descriptor, no memory, no library. Blocks, so it is not for an async thread: milliseconds for the
/// default profiles of containerd and Docker, but libseccomp takes many seconds for hundreds of conditions on one call.
///
/// # Errors
/// - `InvalidArgument`: a field of the profile, named by its path, is out of range or contradicts another one, or the program
///   would be too long for the kernel.
/// - `Unavailable`: this machine has no libseccomp.
pub fn compile(seccomp: &LinuxSeccomp) -> Result<Filter> {
    let rules = Rules::read(seccomp)?;
    let listener = listener(seccomp)?;
    let flags = flags(seccomp, listener.is_some());
    let library = Library::open(LIBRARY)?;
    let program = rules.program(&library)?;
    Ok(Filter {
        program,
        flags,
        listener,
    })
}

/// What a profile says, checked as far as libseccomp is not needed for it.
struct Rules<'a> {
    default: u32,
    architectures: &'a [Arch],
    rules: Vec<Rule<'a>>,
}

/// One entry of `linux.seccomp.syscalls`.
///
/// Which of several for one call wins is libseccomp's to say, as with crun and runc: one without conditions wins over those with
/// conditions, the first without conditions over the later ones.
struct Rule<'a> {
    /// The entry's index, for errors.
    index: usize,
    names: &'a [String],
    action: u32,
    /// The action is taken when all of the comparisons of any of these hold.
    alternatives: Vec<Vec<Comparison>>,
}

/// libseccomp's `struct scmp_arg_cmp`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
struct Comparison {
    argument: c_uint,
    operator: c_uint,
    /// The value; the mask for SCMP_CMP_MASKED_EQ.
    a: u64,
    /// The value under the mask for SCMP_CMP_MASKED_EQ, else unused.
    b: u64,
}

impl<'a> Rules<'a> {
    fn read(seccomp: &'a LinuxSeccomp) -> Result<Self> {
        let default = action(
            seccomp.default_action(),
            seccomp.default_errno_ret(),
            "linux.seccomp.defaultErrnoRet",
        )?;
        let mut rules = Vec::new();
        for (index, entry) in list(seccomp.syscalls()).iter().enumerate() {
            let rule = Rule::read(index, entry)?;
            // libseccomp refuses rules that say nothing new.
            if rule.action != default {
                rules.push(rule);
            }
        }
        let rules = Self {
            default,
            architectures: list(seccomp.architectures()),
            rules,
        };
        if rules.most_instructions() > LIBRARY_INSTRUCTIONS {
            return Err(too_long());
        }
        Ok(rules)
    }

    /// No program of these rules is longer, whichever architectures they are for. Far from the real length: a comparison is up to
    /// three comparisons of 32 bits, each a load, a mask, a jump and a jump over more than 255 instructions; next to them there are
    /// the number's own, and those of a second number where calls are multiplexed (socketcall(2)).
    fn most_instructions(&self) -> usize {
        let per_architecture = self.rules.iter().fold(0_usize, |sum, rule| {
            let each = rule.alternatives.iter().map(|all| 8 + 12 * all.len()).sum::<usize>();
            sum.saturating_add(each.saturating_mul(rule.names.len()))
        });
        // The native one is never named or named once more.
        per_architecture.saturating_mul(self.architectures.len() + 1)
    }

    fn program(&self, library: &Library) -> Result<Vec<u8>> {
        let database = Database::new(library, self.default)?;
        for (index, architecture) in self.architectures.iter().enumerate() {
            database.add_architecture(index, *architecture)?;
        }
        for rule in &self.rules {
            for name in rule.names {
                let Some(number) = library.number(name) else {
                    // Profiles name the calls of every kernel and architecture there is.
                    log::debug!(
                        "linux.seccomp.syscalls[{}]: no system call {name:?}; skipped",
                        rule.index
                    );
                    continue;
                };
                for comparisons in &rule.alternatives {
                    database.add_rule(rule, name, number, comparisons)?;
                }
            }
        }
        let program = database.export()?;
        match program.len() / INSTRUCTION_BYTES {
            1..=MAX_INSTRUCTIONS if program.len() % INSTRUCTION_BYTES == 0 => Ok(program),
            count if count > MAX_INSTRUCTIONS => Err(too_long()),
            _ => Err(Error::unknown(format!(
                "libseccomp made a program of {} bytes out of linux.seccomp, which is no list of instructions",
                program.len()
            ))),
        }
    }
}

impl<'a> Rule<'a> {
    fn read(index: usize, entry: &'a LinuxSyscall) -> Result<Self> {
        let field = format!("linux.seccomp.syscalls[{index}]");
        let action = action(entry.action(), entry.errno_ret(), &format!("{field}.errnoRet"))?;
        let mut seen = [false; ARGUMENTS];
        let mut twice = false;
        let mut comparisons = Vec::new();
        for (number, argument) in list(entry.args()).iter().enumerate() {
            let Some(seen) = seen.get_mut(argument.index()) else {
                return Err(Error::invalid(format!(
                    "{field}.args[{number}].index {} is no argument of a system call; there are 0 to {}",
                    argument.index(),
                    ARGUMENTS - 1
                )));
            };
            twice |= std::mem::replace(seen, true);
            comparisons.push(Comparison::from(argument));
        }
        let alternatives = if twice {
            // The spec leaves it open. crun and runc take all of an entry's conditions for alternatives as soon as two of them are on
            // one argument; runc, unlike crun, knows more than six of them.
            comparisons.into_iter().map(|one| vec![one]).collect()
        } else {
            vec![comparisons]
        };
        Ok(Self {
            index,
            names: entry.names(),
            action,
            alternatives,
        })
    }
}

impl From<&LinuxSeccompArg> for Comparison {
    fn from(argument: &LinuxSeccompArg) -> Self {
        Self {
            // Less than six.
            argument: argument.index() as c_uint,
            // The crate gives the operators libseccomp's numbers.
            operator: argument.op() as c_uint,
            a: argument.value(),
            b: argument.value_two().unwrap_or(0),
        }
    }
}

fn list<T>(field: &Option<Vec<T>>) -> &[T] {
    field.as_deref().unwrap_or_default()
}

fn too_long() -> Error {
    Error::invalid(format!(
        "linux.seccomp.syscalls: too many rules; the kernel takes programs of up to {MAX_INSTRUCTIONS} instructions"
    ))
}

/// The number that a program returns for an action (`SECCOMP_RET_*`, the same as libseccomp's `SCMP_ACT_*`).
///
/// `field` is where `errno_ret` comes from.
fn action(action: LinuxSeccompAction, errno_ret: Option<u32>, field: &str) -> Result<u32> {
    use LinuxSeccompAction as A;
    let (base, most) = match action {
        A::ScmpActErrno => (libc::SECCOMP_RET_ERRNO, MAX_ERRNO),
        A::ScmpActTrace => (libc::SECCOMP_RET_TRACE, libc::SECCOMP_RET_DATA),
        // The spec: "When the action doesn't support an errno, the runtime MUST print and error and fail."
        _ if errno_ret.is_some() => {
            return Err(Error::invalid(format!(
                "{field} does not go with {action}; only SCMP_ACT_ERRNO and SCMP_ACT_TRACE have one"
            )));
        }
        A::ScmpActKill | A::ScmpActKillThread => return Ok(libc::SECCOMP_RET_KILL_THREAD),
        A::ScmpActKillProcess => return Ok(libc::SECCOMP_RET_KILL_PROCESS),
        A::ScmpActTrap => return Ok(libc::SECCOMP_RET_TRAP),
        A::ScmpActNotify => return Ok(libc::SECCOMP_RET_USER_NOTIF),
        A::ScmpActLog => return Ok(libc::SECCOMP_RET_LOG),
        A::ScmpActAllow => return Ok(libc::SECCOMP_RET_ALLOW),
    };
    let data = errno_ret.unwrap_or(libc::EPERM as u32);
    // Cut to its 16 bits, a greater one could become 0: a call that is refused and seems to succeed.
    if data > most {
        return Err(Error::invalid(format!(
            "{field} {data} is too great for {action}; it takes 0 to {most}"
        )));
    }
    Ok(base | data)
}

/// The agent, if any action needs one.
fn listener(seccomp: &LinuxSeccomp) -> Result<Option<Listener>> {
    // As runc does, an empty text is taken for none.
    let path = seccomp
        .listener_path()
        .as_ref()
        .filter(|path| !path.as_os_str().is_empty());
    let metadata = seccomp.listener_metadata().as_ref().filter(|text| !text.is_empty());
    if path.is_none() && metadata.is_some() {
        return Err(Error::invalid(
            "linux.seccomp.listenerMetadata is for an agent; set linux.seccomp.listenerPath or leave it out",
        ));
    }
    let notify = LinuxSeccompAction::ScmpActNotify;
    let field = if seccomp.default_action() == notify {
        "linux.seccomp.defaultAction".to_owned()
    } else {
        match list(seccomp.syscalls())
            .iter()
            .position(|entry| entry.action() == notify)
        {
            Some(index) => format!("linux.seccomp.syscalls[{index}].action"),
            // The spec: "If the SCMP_ACT_NOTIFY action is not used this value is ignored."
            None => return Ok(None),
        }
    };
    match path {
        Some(path) => Ok(Some(Listener {
            path: path.clone(),
            metadata: metadata.cloned(),
        })),
        None => Err(Error::invalid(format!(
            "{field} {notify} needs an agent; set linux.seccomp.listenerPath"
        ))),
    }
}

fn flags(seccomp: &LinuxSeccomp, listens: bool) -> u64 {
    use LinuxSeccompFilterFlag as F;
    // Without a list crun and runc load with SPEC_ALLOW; an empty list is a list.
    let wanted = seccomp.flags().as_deref().unwrap_or(&[F::SeccompFilterFlagSpecAllow]);
    let mut flags = if listens {
        libc::SECCOMP_FILTER_FLAG_NEW_LISTENER
    } else {
        0
    };
    for flag in wanted {
        flags |= match flag {
            F::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
            F::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
            // By itself it makes seccomp(2) return the id of a thread that could not follow, which looks like a listener; so the kernel
            // refuses it together with one. runc never passes it, crun only passes it: with NOTIFY that fails.
            F::SeccompFilterFlagTsync => libc::SECCOMP_FILTER_FLAG_TSYNC | libc::SECCOMP_FILTER_FLAG_TSYNC_ESRCH,
            // The kernel refuses it without a listener, to which it would make no difference.
            F::SeccompFilterFlagWaitKillableRecv if listens => libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV,
            F::SeccompFilterFlagWaitKillableRecv => 0,
        };
    }
    flags
}

/// libseccomp, as far as it is needed. Signatures: seccomp.h.
struct Library {
    init: unsafe extern "C" fn(u32) -> *mut c_void,
    release: unsafe extern "C" fn(*mut c_void),
    arch_add: unsafe extern "C" fn(*mut c_void, u32) -> c_int,
    rule_add_array: unsafe extern "C" fn(*mut c_void, u32, c_int, c_uint, *const Comparison) -> c_int,
    syscall_resolve_name: unsafe extern "C" fn(*const c_char) -> c_int,
    export_bpf: unsafe extern "C" fn(*mut c_void, c_int) -> c_int,
    /// Keeps the others valid.
    _handle: dynamic::Library,
}

impl Library {
    fn open(name: &str) -> Result<Self> {
        let handle = dynamic::Library::open(name, "linux.seccomp", PACKAGE)?;
        // SAFETY: each name has its signature of seccomp.h; the handle goes into the same value.
        unsafe {
            Ok(Self {
                init: handle.function(c"seccomp_init")?,
                release: handle.function(c"seccomp_release")?,
                arch_add: handle.function(c"seccomp_arch_add")?,
                rule_add_array: handle.function(c"seccomp_rule_add_array")?,
                syscall_resolve_name: handle.function(c"seccomp_syscall_resolve_name")?,
                export_bpf: handle.function(c"seccomp_export_bpf")?,
                _handle: handle,
            })
        }
    }

    /// libseccomp's number of a system call: the native architecture's, or a negative one of libseccomp's own for calls that only others
    /// have. `None` for a name that it has never heard.
    fn number(&self, name: &str) -> Option<c_int> {
        // __NR_SCMP_ERROR
        const UNKNOWN: c_int = -1;
        let name = CString::new(name).ok()?;
        // SAFETY: a C string that outlives the call.
        let number = unsafe { (self.syscall_resolve_name)(name.as_ptr()) };
        (number != UNKNOWN).then_some(number)
    }
}

/// A `scmp_filter_ctx`, released when dropped.
struct Database<'a> {
    library: &'a Library,
    context: NonNull<c_void>,
}

impl<'a> Database<'a> {
    fn new(library: &'a Library, default: u32) -> Result<Self> {
        // SAFETY: a plain number.
        let context = unsafe { (library.init)(default) };
        let context = NonNull::new(context).ok_or_else(|| {
            Error::invalid("linux.seccomp.defaultAction: this libseccomp or this kernel does not know it as a default")
        })?;
        Ok(Self { library, context })
    }

    fn add_architecture(&self, index: usize, architecture: Arch) -> Result<()> {
        // The crate gives the architectures libseccomp's numbers.
        // SAFETY: the context is valid as long as `self`.
        let code = unsafe { (self.library.arch_add)(self.context.as_ptr(), architecture as u32) };
        match -code {
            // The native one is in every filter.
            0 | libc::EEXIST => Ok(()),
            libc::EDOM => Err(refused(
                code,
                format!(
                    "linux.seccomp.architectures[{index}] {architecture} has the other byte order than this machine"
                ),
            )),
            _ => Err(refused(
                code,
                format!("linux.seccomp.architectures[{index}] {architecture}: this libseccomp does not know it"),
            )),
        }
    }

    fn add_rule(&self, rule: &Rule<'_>, name: &str, number: c_int, comparisons: &[Comparison]) -> Result<()> {
        // At most `ARGUMENTS`.
        let count = comparisons.len() as c_uint;
        // SAFETY: the context is valid as long as `self`; the comparisons are `count` ones, which libseccomp only reads.
        let code = unsafe {
            (self.library.rule_add_array)(self.context.as_ptr(), rule.action, number, count, comparisons.as_ptr())
        };
        let what = match -code {
            0 => return Ok(()),
            libc::EEXIST => "another entry has another action for the same conditions",
            libc::EINVAL => "this libseccomp or this kernel does not know the action",
            _ => "libseccomp refuses the rule",
        };
        Err(refused(
            code,
            format!("linux.seccomp.syscalls[{}], {name:?}: {what}", rule.index),
        ))
    }

    fn export(&self) -> Result<Vec<u8>> {
        // libseccomp before 2.6 exports to nothing but a descriptor, and a pipe would block on a long program.
        let mut file = memory_file(&[])?;
        let fd: RawFd = file.as_raw_fd();
        // SAFETY: the context is valid as long as `self`, the descriptor as long as `file`.
        let code = unsafe { (self.library.export_bpf)(self.context.as_ptr(), fd) };
        if code < 0 {
            return Err(refused(code, "cannot compile linux.seccomp".to_owned()));
        }
        let mut program = Vec::new();
        file.rewind()
            .and_then(|()| file.read_to_end(&mut program))
            .context(|| "cannot read the program of linux.seccomp")?;
        Ok(program)
    }
}

impl Drop for Database<'_> {
    fn drop(&mut self) {
        // SAFETY: made by seccomp_init of the same library, released once.
        unsafe { (self.library.release)(self.context.as_ptr()) };
    }
}

/// An error of libseccomp's, a negative errno.
fn refused(code: c_int, message: String) -> Error {
    let kind = match -code {
        libc::EINVAL | libc::EEXIST | libc::EDOM | libc::EACCES | libc::EPERM | libc::EOPNOTSUPP => {
            Kind::InvalidArgument
        }
        libc::ENOMEM => Kind::ResourceExhausted,
        _ => Kind::Unknown,
    };
    Error::new(kind, message).with_source(io::Error::from_raw_os_error(-code))
}

#[cfg(test)]
mod tests;
