//! The programs are loaded by children of the tests; what the kernel then answers is what counts. getppid(2) takes no argument, so any
//! argument may be put into it.

use std::{
    collections::BTreeSet,
    mem::offset_of,
    os::fd::{FromRawFd, OwnedFd},
    process::Command,
    sync::{
        LazyLock,
        atomic::{AtomicI32, AtomicI64, AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::patience::{patience, pause};

static BOUND: LazyLock<Duration> = LazyLock::new(|| patience(20));

const PROBE: &str = "getppid";
const PROBE_NUMBER: libc::c_long = libc::SYS_getppid;

/// The children's own calls, for profiles that allow nothing else.
const OWN: [&str; 3] = ["exit", "exit_group", "rt_sigreturn"];

fn profile(value: Value) -> LinuxSeccomp {
    serde_json::from_value(value).unwrap()
}

fn compiled(value: Value) -> Filter {
    compile(&profile(value)).unwrap()
}

/// Allows everything but what `entries` say.
fn but(entries: Value) -> Filter {
    compiled(json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": entries }))
}

fn refusal(value: Value) -> String {
    let error = compile(&profile(value)).unwrap_err();
    assert_eq!(error.kind(), Kind::InvalidArgument, "{error}");
    error.to_string()
}

/// What a child does under a filter.
#[derive(Debug, Clone, Copy)]
enum Call {
    /// A system call with its arguments.
    Own(libc::c_long, [u64; ARGUMENTS]),
    /// getppid(2) in a second thread, then waiting for the end of that thread; answers 0.
    InThread,
    /// getppid(2) as a 32-bit program makes it.
    #[cfg(target_arch = "x86_64")]
    Of32Bits,
}

fn probe(arguments: [u64; ARGUMENTS]) -> Call {
    Call::Own(PROBE_NUMBER, arguments)
}

const PLAIN: Call = Call::Own(PROBE_NUMBER, [0; ARGUMENTS]);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Exited,
    Signalled(i32),
}

/// What the children of a test tell it, in memory that both see.
struct Page {
    /// What seccomp(2) answered, plus one; 0 before it did.
    loaded: AtomicI32,
    /// SIGSYS that a handler got.
    trapped: AtomicI32,
    /// The thread of `Call::InThread`, as long as it lives.
    thread: AtomicI32,
    done: AtomicUsize,
    /// Values, or errnos below zero.
    answers: [AtomicI64; 64],
}

/// The page of this process, in children: a signal handler has no other way to it.
static PAGE: AtomicUsize = AtomicUsize::new(0);

struct Child {
    pid: libc::pid_t,
    page: *mut Page,
}

impl Child {
    fn start(filter: &Filter, calls: &[Call]) -> Self {
        // SAFETY: new memory, at an address that the kernel chooses; all zero is a valid page of atomics.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<Page>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(page, libc::MAP_FAILED);
        let page = page.cast::<Page>();
        let bound = BOUND.as_secs() as libc::c_uint;
        // SAFETY: the child of a threaded process makes only async-signal-safe calls until it ends.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0);
        if pid == 0 {
            // SAFETY: as above; the page is mapped in the child, too.
            unsafe { child(&*page, filter, calls, bound) };
        }
        Self { pid, page }
    }

    fn page(&self) -> &Page {
        // SAFETY: mapped as long as `self`, and only atomics.
        unsafe { &*self.page }
    }

    fn end(&self) -> End {
        let mut status = 0;
        // SAFETY: a child that nobody else waits for; `alarm` bounds its life.
        assert_eq!(unsafe { libc::waitpid(self.pid, &raw mut status, 0) }, self.pid);
        match libc::WIFSIGNALED(status) {
            true => End::Signalled(libc::WTERMSIG(status)),
            false => {
                assert_eq!(
                    libc::WEXITSTATUS(status),
                    0,
                    "the filter was not loaded: {}",
                    self.page().loaded.load(SeqCst)
                );
                End::Exited
            }
        }
    }

    fn answers(&self) -> Vec<i64> {
        let page = self.page();
        let done = page.done.load(SeqCst);
        page.answers[..done].iter().map(|answer| answer.load(SeqCst)).collect()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: mapped by `start`.
        unsafe { libc::munmap(self.page.cast(), size_of::<Page>()) };
    }
}

extern "C" fn on_trap(_signal: c_int) {
    let page = PAGE.load(SeqCst) as *const Page;
    // SAFETY: set before the handler was, to a page that stays mapped in this process.
    unsafe { &*page }.trapped.fetch_add(1, SeqCst);
}

extern "C" fn in_thread(_argument: *mut c_void) -> c_int {
    // SAFETY: takes nothing, changes nothing.
    unsafe { libc::syscall(PROBE_NUMBER) };
    0
}

/// # Safety
/// For the child of a fork only.
unsafe fn child(page: &Page, filter: &Filter, calls: &[Call], bound: libc::c_uint) -> ! {
    // SAFETY: async-signal-safe calls with pointers to values that live on; the stack of a thread is memory of its own.
    unsafe {
        libc::alarm(bound);
        PAGE.store(std::ptr::from_ref(page) as usize, SeqCst);
        let mut on: libc::sigaction = std::mem::zeroed();
        on.sa_sigaction = on_trap as *const () as usize;
        libc::sigaction(libc::SIGSYS, &raw const on, std::ptr::null_mut());
        let size = 1 << 16;
        let stack = libc::mmap(
            std::ptr::null_mut(),
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        if filter.listener.is_none() {
            // No core files; but who may not be dumped is not served by pidfd_getfd(2) either.
            libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0);
        }
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        let program = libc::sock_fprog {
            len: (filter.program.len() / INSTRUCTION_BYTES) as libc::c_ushort,
            filter: filter.program.as_ptr().cast_mut().cast(),
        };
        let loaded = libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            filter.flags,
            &raw const program,
        );
        if loaded < 0 {
            page.loaded.store(-*libc::__errno_location(), SeqCst);
            libc::_exit(1);
        }
        page.loaded.store(loaded as i32 + 1, SeqCst);
        for (call, answer) in calls.iter().zip(&page.answers) {
            let value = match *call {
                Call::Own(number, [a, b, c, d, e, f]) => match libc::syscall(number, a, b, c, d, e, f) {
                    -1 => -i64::from(*libc::__errno_location()),
                    value => value,
                },
                Call::InThread => {
                    libc::clone(
                        in_thread,
                        stack.byte_add(size),
                        libc::CLONE_VM
                            | libc::CLONE_FS
                            | libc::CLONE_FILES
                            | libc::CLONE_SIGHAND
                            | libc::CLONE_THREAD
                            | libc::CLONE_SYSVSEM
                            | libc::CLONE_PARENT_SETTID
                            | libc::CLONE_CHILD_CLEARTID,
                        std::ptr::null_mut(),
                        page.thread.as_ptr(),
                        std::ptr::null_mut::<c_void>(),
                        page.thread.as_ptr(),
                    );
                    // The kernel clears it when the thread is gone.
                    while page.thread.load(SeqCst) != 0 {
                        libc::sched_yield();
                    }
                    0
                }
                #[cfg(target_arch = "x86_64")]
                Call::Of32Bits => getppid_of_32_bits(),
            };
            answer.store(value, SeqCst);
            page.done.fetch_add(1, SeqCst);
        }
        libc::_exit(0);
    }
}

/// # Safety
/// The kernel must serve 32-bit programs, else SIGSEGV ends the caller.
#[cfg(target_arch = "x86_64")]
unsafe fn getppid_of_32_bits() -> i64 {
    const NUMBER_ON_I386: u64 = 64;
    let answer: u64;
    // SAFETY: getppid(2) touches no memory; the registers that the entry clears are named.
    unsafe {
        std::arch::asm!(
            "int 0x80",
            inlateout("rax") NUMBER_ON_I386 => answer,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            options(nostack),
        );
    }
    i64::from(answer as i32)
}

/// What a child got for its calls under `filter`, and its end.
fn run(filter: &Filter, calls: &[Call]) -> (Vec<i64>, End) {
    let child = Child::start(filter, calls);
    let end = child.end();
    (child.answers(), end)
}

/// The answers of a child that lived to its end.
fn answers(filter: &Filter, calls: &[Call]) -> Vec<i64> {
    let (answers, end) = run(filter, calls);
    assert_eq!(end, End::Exited);
    answers
}

fn parent() -> i64 {
    i64::from(std::process::id())
}

/// `struct sock_filter` for `struct sock_filter`.
fn instructions(filter: &Filter) -> Vec<(u16, u8, u8, u32)> {
    filter
        .program
        .chunks_exact(INSTRUCTION_BYTES)
        .map(|bytes| {
            let code = u16::from_ne_bytes(bytes[..2].try_into().unwrap());
            (
                code,
                bytes[2],
                bytes[3],
                u32::from_ne_bytes(bytes[4..].try_into().unwrap()),
            )
        })
        .collect()
}

/// What the program can return.
fn returns(filter: &Filter) -> BTreeSet<u32> {
    let constant = (libc::BPF_RET | libc::BPF_K) as u16;
    let returned = instructions(filter).into_iter().filter(|(code, ..)| *code == constant);
    returned.map(|(.., value)| value).collect()
}

mod actions {
    use super::*;

    fn probe_gets(action: &str) -> Filter {
        but(json!([{ "names": [PROBE], "action": action }]))
    }

    #[test]
    fn an_errno_is_eperm_unless_told_otherwise() {
        let entry = |errno: Value| but(json!([{ "names": [PROBE], "action": "SCMP_ACT_ERRNO", "errnoRet": errno }]));
        let answer = |errno| answers(&entry(errno), &[PLAIN])[0];
        assert_eq!(answer(Value::Null), -i64::from(libc::EPERM));
        assert_eq!(answer(json!(libc::EOPNOTSUPP)), -i64::from(libc::EOPNOTSUPP));
        assert_eq!(answer(json!(4094)), -4094);
        // Who writes 0 wants a call that does nothing and succeeds.
        assert_eq!(answer(json!(0)), 0);
    }

    #[test]
    fn a_default_errno_is_eperm_unless_told_otherwise() {
        let answer = |errno: Value| {
            let filter = compiled(json!({
                "defaultAction": "SCMP_ACT_ERRNO",
                "defaultErrnoRet": errno,
                "syscalls": [{ "names": OWN, "action": "SCMP_ACT_ALLOW" }],
            }));
            answers(&filter, &[PLAIN])[0]
        };
        assert_eq!(answer(Value::Null), -i64::from(libc::EPERM));
        assert_eq!(answer(json!(libc::ENOSYS)), -i64::from(libc::ENOSYS));
    }

    #[test]
    fn an_entry_does_not_inherit_the_errno_of_the_default() {
        let filter = compiled(json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": libc::ENOSYS,
            "syscalls": [
                { "names": OWN, "action": "SCMP_ACT_ALLOW" },
                { "names": [PROBE], "action": "SCMP_ACT_ERRNO" },
            ],
        }));
        let other = Call::Own(libc::SYS_getuid, [0; ARGUMENTS]);
        assert_eq!(
            answers(&filter, &[PLAIN, other]),
            [-i64::from(libc::EPERM), -i64::from(libc::ENOSYS)]
        );
    }

    #[test]
    fn kill_process_ends_all_threads() {
        let filter = probe_gets("SCMP_ACT_KILL_PROCESS");
        assert_eq!(run(&filter, &[Call::InThread]), (vec![], End::Signalled(libc::SIGSYS)));
        assert_eq!(run(&filter, &[PLAIN]), (vec![], End::Signalled(libc::SIGSYS)));
    }

    #[test]
    fn kill_and_kill_thread_end_one_thread() {
        for action in ["SCMP_ACT_KILL", "SCMP_ACT_KILL_THREAD"] {
            let filter = probe_gets(action);
            assert_eq!(run(&filter, &[Call::InThread]), (vec![0], End::Exited), "{action}");
            assert_eq!(
                run(&filter, &[PLAIN]),
                (vec![], End::Signalled(libc::SIGSYS)),
                "{action}"
            );
        }
    }

    #[test]
    fn trap_sends_a_signal_that_can_be_handled() {
        let child = Child::start(&probe_gets("SCMP_ACT_TRAP"), &[PLAIN]);
        assert_eq!(child.end(), End::Exited);
        assert_eq!(child.page().trapped.load(SeqCst), 1);
        assert_ne!(child.answers(), [parent()]);
    }

    #[test]
    fn trace_without_a_tracer_is_enosys_and_carries_its_data() {
        for (errno, data) in [
            (Value::Null, libc::EPERM as u32),
            (json!(0), 0),
            (json!(0xffff), 0xffff),
        ] {
            let filter = but(json!([{ "names": [PROBE], "action": "SCMP_ACT_TRACE", "errnoRet": errno }]));
            assert_eq!(answers(&filter, &[PLAIN]), [-i64::from(libc::ENOSYS)]);
            assert!(returns(&filter).contains(&(libc::SECCOMP_RET_TRACE | data)), "{data}");
        }
    }

    #[test]
    fn log_lets_the_call_through() {
        let filter = probe_gets("SCMP_ACT_LOG");
        assert_eq!(answers(&filter, &[PLAIN]), [parent()]);
        assert!(returns(&filter).contains(&libc::SECCOMP_RET_LOG));
    }

    #[test]
    fn allow_lets_only_the_named_calls_through() {
        let filter = compiled(json!({
            "defaultAction": "SCMP_ACT_KILL_PROCESS",
            "syscalls": [{ "names": OWN, "action": "SCMP_ACT_ALLOW" }, { "names": [PROBE], "action": "SCMP_ACT_ALLOW" }],
        }));
        let other = Call::Own(libc::SYS_getuid, [0; ARGUMENTS]);
        assert_eq!(
            run(&filter, &[PLAIN, other, PLAIN]),
            (vec![parent()], End::Signalled(libc::SIGSYS))
        );
    }

    #[test]
    fn notify_asks_the_one_who_holds_the_listener() {
        let filter = compiled(json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            // TSYNC and a listener exclude each other unless they are combined with care.
            "flags": ["SECCOMP_FILTER_FLAG_TSYNC"],
            "listenerPath": "/run/agent.sock",
            "syscalls": [{ "names": [PROBE], "action": "SCMP_ACT_NOTIFY" }],
        }));
        let child = Child::start(&filter, &[PLAIN]);
        let start = Instant::now();
        while child.page().loaded.load(SeqCst) == 0 {
            assert!(start.elapsed() < *BOUND);
            std::thread::sleep(pause());
        }
        let listener = child.page().loaded.load(SeqCst) - 1;
        assert!(listener > 0, "{listener}");
        let taken = |fd: libc::c_long| {
            assert!(fd >= 0, "{}", io::Error::last_os_error());
            // SAFETY: a new descriptor that nobody else owns.
            unsafe { OwnedFd::from_raw_fd(fd as RawFd) }
        };
        // SAFETY: plain numbers; the child is not reaped yet.
        let process = taken(unsafe { libc::syscall(libc::SYS_pidfd_open, child.pid, 0) });
        // SAFETY: plain numbers.
        let listener = taken(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), listener, 0) });

        let mut ready = libc::pollfd {
            fd: listener.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one entry, which outlives the call.
        assert_eq!(unsafe { libc::poll(&raw mut ready, 1, BOUND.as_millis() as c_int) }, 1);
        // SAFETY: plain numbers; the kernel wants them zero.
        let mut asked: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        let fd = listener.as_raw_fd();
        // SAFETY: the structure that the request is for.
        let received = unsafe { libc::ioctl(fd, libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut asked) };
        assert_eq!(received, 0);
        assert_eq!(libc::c_long::from(asked.data.nr), PROBE_NUMBER);
        let answer = libc::seccomp_notif_resp {
            id: asked.id,
            val: 4711,
            error: 0,
            flags: 0,
        };
        // SAFETY: as above.
        let sent = unsafe { libc::ioctl(fd, libc::SECCOMP_IOCTL_NOTIF_SEND, &raw const answer) };
        assert_eq!(sent, 0);
        assert_eq!(child.end(), End::Exited);
        assert_eq!(child.answers(), [4711]);
    }
}

mod arguments {
    use super::*;

    const HIT: i64 = -(libc::EOPNOTSUPP as i64);

    fn when(args: Value) -> Filter {
        but(json!([{ "names": [PROBE], "action": "SCMP_ACT_ERRNO", "errnoRet": libc::EOPNOTSUPP, "args": args }]))
    }

    fn hits(filter: &Filter, tries: &[[u64; ARGUMENTS]]) -> Vec<bool> {
        let calls: Vec<_> = tries.iter().copied().map(probe).collect();
        answers(filter, &calls)
            .into_iter()
            .map(|answer| answer == HIT)
            .collect()
    }

    #[test]
    fn each_operator_holds_up_to_its_edge() {
        const MAX: u64 = u64::MAX;
        // Beyond 32 bits, a program compares in halves.
        const BIG: u64 = 0x1_0000_0005;
        /// Operator, value, valueTwo; arguments for which it holds, and for which not.
        type Row = (&'static str, u64, u64, &'static [u64], &'static [u64]);
        let table: &[Row] = &[
            ("NE", 5, 0, &[4, 6, 0, MAX, BIG], &[5]),
            ("NE", BIG, 0, &[5, BIG - 1, 0x2_0000_0005], &[BIG]),
            ("LT", 5, 0, &[4, 0], &[5, 6, MAX, BIG]),
            ("LT", BIG, 0, &[BIG - 1, MAX >> 32, 0], &[BIG, BIG + 1, 0x2_0000_0000]),
            ("LT", 0, 0, &[], &[0, 1, MAX]),
            ("LE", 5, 0, &[5, 4, 0], &[6, MAX, BIG]),
            ("LE", BIG, 0, &[BIG, BIG - 1, 0xffff_ffff], &[BIG + 1, 0x2_0000_0000]),
            ("LE", MAX, 0, &[0, MAX], &[]),
            ("EQ", 5, 0, &[5], &[4, 6, BIG, 0x5_0000_0000]),
            ("EQ", BIG, 0, &[BIG], &[5, 0x1_0000_0000]),
            ("EQ", MAX, 0, &[MAX], &[MAX - 1, MAX >> 32]),
            ("GE", 5, 0, &[5, 6, MAX, BIG], &[4, 0]),
            ("GE", BIG, 0, &[BIG, BIG + 1, 0x2_0000_0000], &[BIG - 1, 0xffff_ffff]),
            ("GE", 0, 0, &[0, MAX], &[]),
            ("GT", 5, 0, &[6, MAX, BIG], &[5, 4, 0]),
            ("GT", BIG, 0, &[BIG + 1, 0x2_0000_0000], &[BIG, 0xffff_ffff]),
            ("GT", MAX, 0, &[], &[MAX, 0]),
            (
                "MASKED_EQ",
                0xf0,
                0x30,
                &[0x30, 0x3f, BIG & 0xf00 | 0x30],
                &[0x20, 0x70, 0],
            ),
            (
                "MASKED_EQ",
                0xf_0000_0000,
                0x1_0000_0000,
                &[BIG, 0x1_0000_0000],
                &[5, 0x3_0000_0000],
            ),
            ("MASKED_EQ", 0, 0, &[0, MAX], &[]),
            // The flags by which clone(2) makes namespaces, as containerd's default profile has them.
            ("MASKED_EQ", 2_114_060_288, 0, &[0, 0x11], &[0x1000_0000, 0x0002_0000]),
        ];
        for (operator, value, two, matching, other) in table {
            let filter = when(json!([
                { "index": 0, "value": value, "valueTwo": two, "op": format!("SCMP_CMP_{operator}") }
            ]));
            let tries: Vec<_> = matching
                .iter()
                .chain(*other)
                .map(|value| [*value, 0, 0, 0, 0, 0])
                .collect();
            let expected: Vec<_> = (0..tries.len()).map(|index| index < matching.len()).collect();
            assert_eq!(
                hits(&filter, &tries),
                expected,
                "{operator} {value:#x} {two:#x}: {tries:x?}"
            );
        }
    }

    #[test]
    fn a_missing_second_value_is_zero() {
        let filter = when(json!([{ "index": 0, "value": 0xf, "op": "SCMP_CMP_MASKED_EQ" }]));
        assert_eq!(
            hits(&filter, &[[0x10, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]),
            [true, false]
        );
    }

    #[test]
    fn each_index_is_the_argument_of_that_place() {
        for index in 0..ARGUMENTS {
            let filter = when(json!([{ "index": index, "value": 7, "op": "SCMP_CMP_EQ" }]));
            let tries: Vec<_> = (0..ARGUMENTS)
                .map(|place| std::array::from_fn(|at| if at == place { 7 } else { 0 }))
                .collect();
            let expected: Vec<_> = (0..ARGUMENTS).map(|place| place == index).collect();
            assert_eq!(hits(&filter, &tries), expected, "{index}");
        }
    }

    #[test]
    fn conditions_on_different_arguments_must_all_hold() {
        let filter = when(json!([
            { "index": 0, "value": 1, "op": "SCMP_CMP_EQ" },
            { "index": 5, "value": 9, "op": "SCMP_CMP_GT" },
            { "index": 2, "value": 3, "op": "SCMP_CMP_NE" },
        ]));
        let tries = [
            [1, 0, 0, 0, 0, 10],
            [2, 0, 0, 0, 0, 10],
            [1, 0, 0, 0, 0, 9],
            [1, 0, 3, 0, 0, 10],
        ];
        assert_eq!(hits(&filter, &tries), [true, false, false, false]);
    }

    #[test]
    fn two_conditions_on_one_argument_make_all_of_them_alternatives() {
        let filter = when(json!([
            { "index": 0, "value": 1, "op": "SCMP_CMP_EQ" },
            { "index": 1, "value": 8, "op": "SCMP_CMP_EQ" },
            { "index": 0, "value": 2, "op": "SCMP_CMP_EQ" },
        ]));
        let tries = [
            [1, 0, 0, 0, 0, 0],
            [2, 0, 0, 0, 0, 0],
            [0, 8, 0, 0, 0, 0],
            [3, 0, 0, 0, 0, 0],
        ];
        assert_eq!(hits(&filter, &tries), [true, true, true, false]);
    }

    #[test]
    fn there_may_be_more_alternatives_than_arguments() {
        let conditions: Vec<_> = (10..20)
            .map(|value| json!({ "index": 3, "value": value, "op": "SCMP_CMP_EQ" }))
            .collect();
        let filter = when(json!(conditions));
        let tries: Vec<_> = (9..21).map(|value| [0, 0, 0, value, 0, 0]).collect();
        let expected: Vec<_> = (9..21).map(|value| (10..20).contains(&value)).collect();
        assert_eq!(hits(&filter, &tries), expected);
    }

    #[test]
    fn an_empty_list_of_conditions_always_holds() {
        assert_eq!(hits(&when(json!([])), &[[0; 6], [u64::MAX; 6]]), [true, true]);
    }

    #[test]
    fn entries_of_one_call_are_alternatives() {
        let entry = |value: u64, errno: i32| {
            json!({
                "names": [PROBE], "action": "SCMP_ACT_ERRNO", "errnoRet": errno,
                "args": [{ "index": 0, "value": value, "op": "SCMP_CMP_EQ" }],
            })
        };
        let filter = but(json!([entry(1, libc::ENOENT), entry(2, libc::EIO)]));
        let calls = [1, 2, 3].map(|value| probe([value, 0, 0, 0, 0, 0]));
        assert_eq!(
            answers(&filter, &calls),
            [-i64::from(libc::ENOENT), -i64::from(libc::EIO), parent()]
        );
    }

    /// An entry for a first argument of 1, or for any.
    fn entry(action: &str, conditional: bool) -> Value {
        let one = json!({ "index": 0, "value": 1, "op": "SCMP_CMP_EQ" });
        json!({ "names": [PROBE], "action": action, "args": if conditional { vec![one] } else { vec![] } })
    }

    #[test]
    fn of_entries_without_conditions_the_first_wins() {
        let (refuse, kill) = (entry("SCMP_ACT_ERRNO", false), entry("SCMP_ACT_KILL_PROCESS", false));
        assert_eq!(
            answers(&but(json!([refuse, kill])), &[PLAIN]),
            [-i64::from(libc::EPERM)]
        );
        let killed = (vec![], End::Signalled(libc::SIGSYS));
        assert_eq!(run(&but(json!([kill, refuse])), &[PLAIN]), killed);
    }

    #[test]
    fn an_entry_without_conditions_wins_over_one_with_conditions() {
        let (refuse, kill) = (entry("SCMP_ACT_ERRNO", false), entry("SCMP_ACT_KILL_PROCESS", true));
        for entries in [json!([refuse, kill]), json!([kill, refuse])] {
            let found = answers(&but(entries.clone()), &[probe([1, 0, 0, 0, 0, 0])]);
            assert_eq!(found, [-i64::from(libc::EPERM)], "{entries}");
        }
    }

    #[test]
    fn the_same_conditions_may_be_named_twice_but_not_with_two_actions() {
        let (refuse, kill) = (entry("SCMP_ACT_ERRNO", true), entry("SCMP_ACT_KILL_PROCESS", true));
        let calls = [1, 2].map(|value| probe([value, 0, 0, 0, 0, 0]));
        let twice = but(json!([refuse, refuse]));
        assert_eq!(answers(&twice, &calls), [-i64::from(libc::EPERM), parent()]);
        let refused = refusal(json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [refuse, kill] }));
        assert!(
            refused.starts_with(
                "linux.seccomp.syscalls[1], \"getppid\": another entry has another action for the same conditions"
            ),
            "{refused}"
        );
    }

    fn operator() -> impl Strategy<Value = &'static str> {
        prop::sample::select(vec!["NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"])
    }

    fn edge() -> impl Strategy<Value = u64> {
        prop::sample::select(vec![
            0,
            1,
            2,
            0x7fff_ffff,
            0xffff_ffff,
            0x1_0000_0000,
            0x1_0000_0001,
            u64::MAX - 1,
            u64::MAX,
        ])
    }

    fn holds(operator: &str, argument: u64, value: u64, two: u64) -> bool {
        match operator {
            "NE" => argument != value,
            "LT" => argument < value,
            "LE" => argument <= value,
            "EQ" => argument == value,
            "GE" => argument >= value,
            "GT" => argument > value,
            // libseccomp takes no notice of bits that the mask hides.
            _ => argument & value == two & value,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]
        #[test]
        fn any_conjunction_is_decided_like_in_arithmetic(
            conditions in prop::collection::btree_map(0..ARGUMENTS, (operator(), edge(), edge()), 1..4),
            tries in prop::collection::vec(prop::array::uniform6(edge()), 32),
        ) {
            let args: Vec<_> = conditions
                .iter()
                .map(|(index, (operator, value, two))| {
                    json!({ "index": index, "value": value, "valueTwo": two, "op": format!("SCMP_CMP_{operator}") })
                })
                .collect();
            let expected: Vec<_> = tries
                .iter()
                .map(|arguments| conditions.iter().all(|(index, (op, value, two))| holds(op, arguments[*index], *value, *two)))
                .collect();
            prop_assert_eq!(hits(&when(json!(args)), &tries), expected);
        }
    }
}

mod names {
    use super::*;

    #[test]
    fn all_names_of_an_entry_get_its_action() {
        let filter = but(json!([{ "names": ["getuid", PROBE], "action": "SCMP_ACT_ERRNO" }]));
        let calls = [libc::SYS_getuid, PROBE_NUMBER, libc::SYS_getpgrp].map(|number| Call::Own(number, [0; ARGUMENTS]));
        let found = answers(&filter, &calls);
        let refused = -i64::from(libc::EPERM);
        assert_eq!(found[..2], [refused, refused]);
        // 0 in a pid namespace that the group's leader is not in.
        assert!(found[2] >= 0, "{found:?}");
    }

    #[test]
    fn unknown_names_are_skipped_and_the_others_are_not() {
        let filter = but(json!([
            { "names": ["no_such_call", "", "getuid\u{0}", "\u{1F980}", PROBE], "action": "SCMP_ACT_ERRNO" },
        ]));
        let uid = Call::Own(libc::SYS_getuid, [0; ARGUMENTS]);
        let found = answers(&filter, &[PLAIN, uid]);
        assert_eq!(found[0], -i64::from(libc::EPERM));
        assert!(found[1] >= 0);
    }

    #[test]
    fn calls_of_other_architectures_are_no_error() {
        // On x86-64 there is no socketcall(2).
        let filter = but(json!([{ "names": ["socketcall", "arm_fadvise64_64"], "action": "SCMP_ACT_ERRNO" }]));
        assert_eq!(answers(&filter, &[PLAIN]), [parent()]);
    }

    #[test]
    fn an_entry_that_repeats_the_default_is_skipped() {
        for (default, entry) in [
            (json!({ "defaultAction": "SCMP_ACT_ALLOW" }), json!("SCMP_ACT_ALLOW")),
            (
                json!({ "defaultAction": "SCMP_ACT_KILL" }),
                json!("SCMP_ACT_KILL_THREAD"),
            ),
            (
                json!({ "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": libc::EPERM }),
                json!("SCMP_ACT_ERRNO"),
            ),
        ] {
            let without = compiled(default.clone());
            let mut with = default;
            with["syscalls"] = json!([{ "names": [PROBE], "action": entry }]);
            assert_eq!(compiled(with), without, "{entry}");
        }
    }

    #[test]
    fn the_same_errno_action_with_another_errno_is_not_skipped() {
        let filter = compiled(json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "syscalls": [
                { "names": OWN, "action": "SCMP_ACT_ALLOW" },
                { "names": [PROBE], "action": "SCMP_ACT_ERRNO", "errnoRet": libc::ENOSYS },
            ],
        }));
        assert_eq!(answers(&filter, &[PLAIN]), [-i64::from(libc::ENOSYS)]);
    }

    #[test]
    fn a_call_may_be_named_twice() {
        let filter = but(json!([
            { "names": [PROBE, PROBE], "action": "SCMP_ACT_ERRNO" },
            { "names": [PROBE], "action": "SCMP_ACT_ERRNO" },
        ]));
        assert_eq!(answers(&filter, &[PLAIN]), [-i64::from(libc::EPERM)]);
    }
}

mod architectures {
    use super::*;

    fn of(architectures: Value) -> Filter {
        compiled(json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": architectures,
            "syscalls": [{ "names": ["getuid", "getuid32"], "action": "SCMP_ACT_ERRNO" }],
        }))
    }

    #[test]
    fn the_native_one_is_always_in() {
        let calls = [PLAIN, Call::Own(libc::SYS_getuid, [0; ARGUMENTS])];
        for named in [
            json!([]),
            json!(["SCMP_ARCH_NATIVE"]),
            json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64"]),
        ] {
            assert_eq!(
                answers(&of(named.clone()), &calls),
                [parent(), -i64::from(libc::EPERM)],
                "{named}"
            );
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn the_calls_of_one_that_is_not_named_kill_even_where_all_is_allowed() {
        let nothing = compiled(json!({ "defaultAction": "SCMP_ACT_ALLOW" }));
        assert_eq!(answers(&nothing, &[PLAIN]), [parent()]);
        assert_eq!(run(&nothing, &[Call::Of32Bits]), (vec![], End::Signalled(libc::SIGSYS)));
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn rules_are_for_each_that_is_named() {
        let named = json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]);
        assert_eq!(answers(&of(named.clone()), &[Call::Of32Bits]), [parent()]);
        let filter = compiled(json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": named,
            "syscalls": [{ "names": [PROBE], "action": "SCMP_ACT_ERRNO" }],
        }));
        let refused = -i64::from(libc::EPERM);
        assert_eq!(answers(&filter, &[Call::Of32Bits, PLAIN]), [refused, refused]);
    }

    #[test]
    fn what_libseccomp_does_not_know_is_refused_by_name() {
        // No libseccomp up to 2.5 knows it; later ones do, and it has the other byte order than what these tests run on.
        let refused = refusal(json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_NATIVE", "SCMP_ARCH_M68K"],
        }));
        assert!(
            refused.starts_with("linux.seccomp.architectures[1] SCMP_ARCH_M68K"),
            "{refused}"
        );
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn another_byte_order_is_refused_by_name() {
        let refused = refusal(json!({ "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_S390X"] }));
        assert!(
            refused.starts_with("linux.seccomp.architectures[0] SCMP_ARCH_S390X has the other byte order"),
            "{refused}"
        );
    }

    #[test]
    fn the_crates_numbers_are_the_librarys() {
        let handle = dynamic::Library::open(LIBRARY, "a test", PACKAGE).unwrap();
        // SAFETY: the signature is that of seccomp.h; the handle outlives the loop.
        let resolve: unsafe extern "C" fn(*const c_char) -> u32 =
            unsafe { handle.function(c"seccomp_arch_resolve_name") }.unwrap();
        let names = [
            "X86",
            "X86_64",
            "X32",
            "ARM",
            "AARCH64",
            "MIPS",
            "MIPS64",
            "MIPS64N32",
            "MIPSEL",
            "MIPSEL64",
            "MIPSEL64N32",
            "PPC",
            "PPC64",
            "PPC64LE",
            "S390",
            "S390X",
            "PARISC",
            "PARISC64",
            "RISCV64",
        ];
        for name in names {
            let lower = CString::new(name.to_lowercase()).unwrap();
            // SAFETY: a C string that outlives the call.
            let number = unsafe { resolve(lower.as_ptr()) };
            let architecture: Arch = serde_json::from_value(json!(format!("SCMP_ARCH_{name}"))).unwrap();
            assert_eq!(architecture as u32, number, "{name}");
        }
    }
}

mod flags {
    use super::*;

    fn of(flags: Value, action: &str) -> u64 {
        compiled(json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "flags": flags,
            "listenerPath": "/run/agent.sock",
            "syscalls": [{ "names": [PROBE], "action": action }],
        }))
        .flags
    }

    #[test]
    fn flags_are_what_crun_would_pass_as_far_as_the_kernel_takes_it() {
        let listener = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
        let table = [
            (json!(null), libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW, 0),
            (json!([]), 0, 0),
            (json!(["SECCOMP_FILTER_FLAG_LOG"]), libc::SECCOMP_FILTER_FLAG_LOG, 0),
            (
                json!(["SECCOMP_FILTER_FLAG_SPEC_ALLOW"]),
                libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
                0,
            ),
            (
                json!(["SECCOMP_FILTER_FLAG_TSYNC"]),
                libc::SECCOMP_FILTER_FLAG_TSYNC | libc::SECCOMP_FILTER_FLAG_TSYNC_ESRCH,
                0,
            ),
            (
                json!(["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]),
                0,
                libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV,
            ),
            (
                json!([
                    "SECCOMP_FILTER_FLAG_LOG",
                    "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
                    "SECCOMP_FILTER_FLAG_LOG"
                ]),
                libc::SECCOMP_FILTER_FLAG_LOG | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
                0,
            ),
        ];
        for (flags, always, listening) in table {
            assert_eq!(of(flags.clone(), "SCMP_ACT_LOG"), always, "{flags}");
            assert_eq!(
                of(flags.clone(), "SCMP_ACT_NOTIFY"),
                always | listening | listener,
                "{flags}"
            );
        }
    }

    #[test]
    fn the_kernel_takes_every_flag_with_and_without_a_listener() {
        let all = json!([
            "SECCOMP_FILTER_FLAG_TSYNC",
            "SECCOMP_FILTER_FLAG_LOG",
            "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
            "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
        ]);
        for action in ["SCMP_ACT_LOG", "SCMP_ACT_NOTIFY"] {
            let filter = compiled(json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "flags": all,
                "listenerPath": "/run/agent.sock",
                "syscalls": [{ "names": ["getuid"], "action": action }],
            }));
            assert_eq!(answers(&filter, &[PLAIN]), [parent()], "{action}");
        }
    }

    #[test]
    fn an_unknown_flag_is_no_profile() {
        let value = json!({ "defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_NEW_LISTENER"] });
        assert!(serde_json::from_value::<LinuxSeccomp>(value).is_err());
    }
}

mod listeners {
    use super::*;

    fn notify(more: Value) -> Value {
        let mut profile = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [
                { "names": ["getuid"], "action": "SCMP_ACT_ERRNO" },
                { "names": ["no_such_call"], "action": "SCMP_ACT_NOTIFY" },
            ],
        });
        profile
            .as_object_mut()
            .unwrap()
            .append(&mut more.as_object().unwrap().clone());
        profile
    }

    #[test]
    fn path_and_metadata_are_passed_through() {
        let path = PathBuf::from("/run/agent.sock");
        let filter = compiled(notify(
            json!({ "listenerPath": path, "listenerMetadata": "MKNOD=/dev/null" }),
        ));
        let metadata = Some("MKNOD=/dev/null".to_owned());
        assert_eq!(
            filter.listener,
            Some(Listener {
                path: path.clone(),
                metadata
            })
        );
        let filter = compiled(notify(json!({ "listenerPath": path })));
        assert_eq!(filter.listener, Some(Listener { path, metadata: None }));
    }

    #[test]
    fn notify_without_a_path_is_refused() {
        for more in [json!({}), json!({ "listenerPath": "" })] {
            assert_eq!(
                refusal(notify(more)),
                "linux.seccomp.syscalls[1].action SCMP_ACT_NOTIFY needs an agent; set linux.seccomp.listenerPath"
            );
        }
        assert_eq!(
            refusal(json!({ "defaultAction": "SCMP_ACT_NOTIFY" })),
            "linux.seccomp.defaultAction SCMP_ACT_NOTIFY needs an agent; set linux.seccomp.listenerPath"
        );
    }

    #[test]
    fn a_path_without_notify_is_ignored() {
        let filter = compiled(json!({
            "defaultAction": "SCMP_ACT_ALLOW", "flags": [], "listenerPath": "/run/agent.sock", "listenerMetadata": "x",
        }));
        assert_eq!((filter.listener, filter.flags), (None, 0));
    }

    #[test]
    fn metadata_without_a_path_is_refused() {
        let refused = refusal(json!({ "defaultAction": "SCMP_ACT_ALLOW", "listenerMetadata": "x" }));
        assert!(refused.starts_with("linux.seccomp.listenerMetadata"), "{refused}");
    }

    #[test]
    fn the_calls_that_hand_a_listener_over_may_be_the_agents_too() {
        let calls = json!([{ "names": ["write", "sendmsg", "close"], "action": "SCMP_ACT_NOTIFY" }]);
        let filter = compiled(json!({
            "defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/agent.sock", "syscalls": calls,
        }));
        assert!(returns(&filter).contains(&libc::SECCOMP_RET_USER_NOTIF));
    }
}

mod refusals {
    use super::*;

    fn allow(entry: Value) -> Value {
        let fine = json!({ "names": ["getuid"], "action": "SCMP_ACT_ERRNO" });
        json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [fine, entry] })
    }

    #[test]
    fn an_index_beyond_the_arguments() {
        for index in [6_u64, 7, u64::from(u32::MAX) + 1, u64::MAX] {
            let args = json!([
                { "index": 5, "value": 0, "op": "SCMP_CMP_EQ" },
                { "index": index, "value": 0, "op": "SCMP_CMP_EQ" },
            ]);
            assert_eq!(
                refusal(allow(
                    json!({ "names": [PROBE], "action": "SCMP_ACT_ERRNO", "args": args })
                )),
                format!(
                    "linux.seccomp.syscalls[1].args[1].index {index} is no argument of a system call; there are 0 to 5"
                )
            );
        }
    }

    #[test]
    fn an_errno_beyond_what_a_program_can_return() {
        // 65536 cut to 16 bits would be success.
        for errno in [4095_u32, 65_536, u32::MAX] {
            assert_eq!(
                refusal(allow(
                    json!({ "names": [PROBE], "action": "SCMP_ACT_ERRNO", "errnoRet": errno })
                )),
                format!(
                    "linux.seccomp.syscalls[1].errnoRet {errno} is too great for SCMP_ACT_ERRNO; it takes 0 to 4094"
                )
            );
            assert_eq!(
                refusal(json!({ "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": errno })),
                format!("linux.seccomp.defaultErrnoRet {errno} is too great for SCMP_ACT_ERRNO; it takes 0 to 4094")
            );
        }
        assert_eq!(
            refusal(allow(
                json!({ "names": [PROBE], "action": "SCMP_ACT_TRACE", "errnoRet": 65_536 })
            )),
            "linux.seccomp.syscalls[1].errnoRet 65536 is too great for SCMP_ACT_TRACE; it takes 0 to 65535"
        );
    }

    #[test]
    fn an_errno_for_an_action_without_one() {
        for action in ["KILL", "KILL_PROCESS", "KILL_THREAD", "TRAP", "ALLOW", "LOG", "NOTIFY"] {
            let action = format!("SCMP_ACT_{action}");
            assert_eq!(
                refusal(allow(json!({ "names": [PROBE], "action": action, "errnoRet": 1 }))),
                format!(
                    "linux.seccomp.syscalls[1].errnoRet does not go with {action}; only SCMP_ACT_ERRNO and SCMP_ACT_TRACE have one"
                )
            );
            let refused = refusal(json!({ "defaultAction": action, "defaultErrnoRet": 1 }));
            assert!(
                refused.starts_with(&format!("linux.seccomp.defaultErrnoRet does not go with {action}")),
                "{refused}"
            );
        }
    }

    #[test]
    fn a_program_that_the_kernel_would_not_take() {
        let alternatives = |count: u64| {
            // With equal upper halves they would share instructions.
            let args: Vec<_> = (0..count)
                .map(|value| json!({ "index": 0, "value": value << 32 | value, "op": "SCMP_CMP_EQ" }))
                .collect();
            allow(json!({ "names": [PROBE], "action": "SCMP_ACT_ERRNO", "args": args }))
        };
        let few = compiled(alternatives(500));
        let calls = [499 << 32 | 499, 500 << 32 | 500].map(|value| probe([value, 0, 0, 0, 0, 0]));
        assert_eq!(answers(&few, &calls), [-i64::from(libc::EPERM), parent()]);
        // The first is refused because of its length, the second before libseccomp could wrap its count.
        for count in [3_000, 70_000] {
            assert_eq!(
                refusal(alternatives(count)),
                "linux.seccomp.syscalls: too many rules; the kernel takes programs of up to 4096 instructions"
            );
        }
    }

    #[test]
    fn a_machine_without_libseccomp_is_told_what_to_install() {
        for library in ["libseccomp-of-nobody.so.2", "libc.so.6"] {
            let error = Library::open(library).map(drop).unwrap_err();
            assert_eq!(error.kind(), Kind::Unavailable);
            let text = error.to_string();
            assert!(text.contains("libseccomp2") && text.contains(library), "{text}");
        }
        assert!(
            Library::open("libc.so.6")
                .map(drop)
                .unwrap_err()
                .to_string()
                .contains("seccomp_init")
        );
    }
}

/// containerd's and Docker's default profiles have this shape: some hundred calls for three architectures.
fn large() -> LinuxSeccomp {
    let names: Vec<_> = [
        PROBE,
        "read",
        "write",
        "openat",
        "close",
        "exit",
        "exit_group",
        "rt_sigreturn",
        "no_such_call",
    ]
    .into_iter()
    .map(str::to_owned)
    .chain((0..400).map(|number| format!("no_such_call_{number}")))
    .collect();
    profile(json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            { "names": names, "action": "SCMP_ACT_ALLOW" },
            {
                "names": ["clone"], "action": "SCMP_ACT_ALLOW",
                "args": [{ "index": 0, "value": 2_114_060_288, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ" }],
            },
            { "names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": libc::ENOSYS },
        ],
    }))
}

#[test]
fn the_shape_of_a_default_profile_works() {
    let filter = compile(&large()).unwrap();
    let calls = [
        PLAIN,
        Call::Own(libc::SYS_clone3, [0; ARGUMENTS]),
        Call::Own(libc::SYS_getuid, [0; ARGUMENTS]),
    ];
    assert_eq!(
        answers(&filter, &calls),
        [parent(), -i64::from(libc::ENOSYS), -i64::from(libc::EPERM)]
    );
}

#[test]
fn the_layout_of_a_comparison_is_that_of_seccomp_h() {
    let offsets = [
        offset_of!(Comparison, argument),
        offset_of!(Comparison, operator),
        offset_of!(Comparison, a),
        offset_of!(Comparison, b),
    ];
    assert_eq!((offsets, size_of::<Comparison>()), ([0, 4, 8, 16], 24));
}

/// Counts in a process of its own: other tests open and allocate, too.
#[test]
fn nothing_is_left_of_a_hundred_profiles() {
    const ALONE: &str = "LXCRI_SECCOMP_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let name = "backend::lxc::seccomp::tests::nothing_is_left_of_a_hundred_profiles";
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture", "--test-threads=1"])
            .env(ALONE, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && text.contains("1 passed"),
            "{text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        return;
    }
    // Enough for libseccomp to need memory that is missed.
    let args: Vec<_> = (0..100_u64)
        .map(|value| json!({ "index": 0, "value": value << 32 | value, "op": "SCMP_CMP_EQ" }))
        .collect();
    let good = profile(json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        { "names": [PROBE], "action": "SCMP_ACT_ERRNO", "args": args },
    ]}));
    // Refused when libseccomp has a database already.
    let bad = profile(json!({ "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_M68K"] }));
    let rounds = |count| {
        for _ in 0..count {
            compile(&good).unwrap();
            compile(&bad).unwrap_err();
            Library::open("libc.so.6").map(drop).unwrap_err();
        }
        let descriptors = std::fs::read_dir("/proc/self/fd").unwrap().count();
        let resident_pages: usize = std::fs::read_to_string("/proc/self/statm")
            .unwrap()
            .split(' ')
            .nth(1)
            .unwrap()
            .parse()
            .unwrap();
        (descriptors, resident_pages)
    };
    let before = rounds(20);
    let after = rounds(100);
    assert_eq!(after.0, before.0);
    // 2 MiB; the databases of a hundred of the good profile are far more.
    assert!(after.1 < before.1 + 512, "{before:?} {after:?} pages");
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    assert!(!maps.contains("libseccomp"), "{maps}");
}

fn one_of(words: &[&str]) -> impl Strategy<Value = Value> + use<> {
    let words: Vec<_> = words.iter().map(|word| json!(word)).collect();
    prop::sample::select(words)
}

fn any_action() -> impl Strategy<Value = Value> {
    let actions = [
        "KILL",
        "KILL_PROCESS",
        "KILL_THREAD",
        "TRAP",
        "ERRNO",
        "TRACE",
        "ALLOW",
        "LOG",
        "NOTIFY",
    ];
    one_of(
        &actions
            .map(|name| format!("SCMP_ACT_{name}"))
            .each_ref()
            .map(String::as_str),
    )
}

fn any_errno() -> impl Strategy<Value = Value> {
    prop_oneof![
        6 => Just(Value::Null),
        3 => (0..5000_u32).prop_map(Value::from),
        1 => any::<u32>().prop_map(Value::from),
    ]
}

fn any_argument() -> impl Strategy<Value = Value> {
    let operators = ["NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"].map(|name| format!("SCMP_CMP_{name}"));
    let operator = one_of(&operators.each_ref().map(String::as_str));
    (0..7_u64, any::<u64>(), any::<Option<u64>>(), operator)
        .prop_map(|(index, value, two, op)| json!({ "index": index, "value": value, "valueTwo": two, "op": op }))
}

fn any_entry() -> impl Strategy<Value = Value> {
    let known = one_of(&[
        "getuid",
        PROBE,
        "socket",
        "socketcall",
        "clone3",
        "ipc",
        "mmap",
        "write",
        "no_such_call",
        "",
    ]);
    let name = prop_oneof![9 => known, 1 => any::<String>().prop_map(Value::from)];
    (
        prop::collection::vec(name, 0..4),
        any_action(),
        any_errno(),
        prop::option::of(prop::collection::vec(any_argument(), 0..4)),
    )
        .prop_map(
            |(names, action, errno, args)| json!({ "names": names, "action": action, "errnoRet": errno, "args": args }),
        )
}

fn any_profile() -> impl Strategy<Value = Value> {
    let architectures = [
        "X86",
        "X86_64",
        "X32",
        "AARCH64",
        "ARM",
        "NATIVE",
        "S390X",
        "LOONGARCH64",
    ]
    .map(|name| format!("SCMP_ARCH_{name}"));
    let flags = ["TSYNC", "LOG", "SPEC_ALLOW", "WAIT_KILLABLE_RECV"].map(|name| format!("SECCOMP_FILTER_FLAG_{name}"));
    (
        any_action(),
        any_errno(),
        prop::option::of(prop::collection::vec(
            one_of(&architectures.each_ref().map(String::as_str)),
            0..3,
        )),
        prop::option::of(prop::collection::vec(
            one_of(&flags.each_ref().map(String::as_str)),
            0..3,
        )),
        prop_oneof![Just(Value::Null), one_of(&["", "/run/agent.sock"])],
        prop_oneof![3 => Just(Value::Null), 1 => one_of(&["", "x"])],
        prop::option::of(prop::collection::vec(any_entry(), 0..5)),
    )
        .prop_map(|(action, errno, architectures, flags, path, metadata, syscalls)| {
            json!({
                "defaultAction": action, "defaultErrnoRet": errno, "architectures": architectures, "flags": flags,
                "listenerPath": path, "listenerMetadata": metadata, "syscalls": syscalls,
            })
        })
}

proptest! {
    #[test]
    fn any_profile_is_a_filter_or_an_error(value in any_profile()) {
        match compile(&profile(value)) {
            Ok(filter) => {
                let count = filter.program.len() / INSTRUCTION_BYTES;
                prop_assert!((1..=MAX_INSTRUCTIONS).contains(&count));
                prop_assert_eq!(filter.program.len() % INSTRUCTION_BYTES, 0);
                let listens = filter.flags & libc::SECCOMP_FILTER_FLAG_NEW_LISTENER != 0;
                prop_assert_eq!(listens, filter.listener.is_some());
                // Whatever may come after it, the kernel took it: an agent that never answers is stopped by hand.
                let child = Child::start(&filter, &[]);
                let start = Instant::now();
                while child.page().loaded.load(SeqCst) == 0 && start.elapsed() < *BOUND {
                    std::thread::yield_now();
                }
                // SAFETY: a child that is not reaped yet.
                unsafe { libc::kill(child.pid, libc::SIGKILL) };
                let loaded = child.page().loaded.load(SeqCst);
                // SAFETY: as above; nobody else waits for it.
                unsafe { libc::waitpid(child.pid, std::ptr::null_mut(), 0) };
                prop_assert!(loaded > 0, "{}", io::Error::from_raw_os_error(-loaded));
            }
            Err(error) => {
                prop_assert_eq!(error.kind(), Kind::InvalidArgument);
                prop_assert!(error.to_string().starts_with("linux.seccomp."), "{}", error);
            }
        }
    }
}
