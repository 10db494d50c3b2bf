//! The mapping of every field, and processes that become programs which tell what they have become.

mod real;

use oci_spec::runtime::{Capability, Linux, Process as OciProcess};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::error::Kind;

fn oci(more: Value) -> OciProcess {
    let mut document = json!({"user": {}, "args": ["a"], "cwd": "/"});
    for (key, value) in more.as_object().unwrap() {
        document[key] = value.clone();
    }
    serde_json::from_value(document).unwrap()
}

fn linux(json: Value) -> Linux {
    serde_json::from_value(json).unwrap()
}

fn of(more: Value) -> Process {
    Process::of(&oci(more), None).unwrap()
}

fn refused(more: Value) -> String {
    let error = Process::of(&oci(more), None).unwrap_err();
    assert_eq!(error.kind(), Kind::InvalidArgument, "{error}");
    error.to_string()
}

#[test]
fn a_process_that_says_nothing_is_root_without_a_capability() {
    assert_eq!(
        of(json!({})),
        Process {
            args: vec!["a".into()],
            env: vec![],
            cwd: "/".into(),
            uid: 0,
            gid: 0,
            groups: vec![],
            umask: 0o022,
            capabilities: Sets::default(),
            rlimits: vec![],
            no_new_privileges: false,
            oom_score_adj: None,
            apparmor: None,
            selinux: None,
            seccomp: None,
            scheduler: None,
            io_priority: None,
            personality: None,
            exec_cpu_affinity: Affinity::default(),
            terminal: false,
            console_size: None,
        }
    );
}

#[test]
fn every_plain_field_arrives() {
    let process = of(json!({
        "args": ["/x", "a b", ""],
        "env": ["A=1", "B=", "A=2=3"],
        "cwd": "/w",
        "user": {"uid": 1, "gid": 2, "umask": 63, "additionalGids": [3, 4]},
        "noNewPrivileges": true,
        "oomScoreAdj": -5,
        "apparmorProfile": "p",
        "selinuxLabel": "l",
        "terminal": true,
        "consoleSize": {"height": 24, "width": 80},
    }));
    assert_eq!(process.args, ["/x", "a b", ""]);
    assert_eq!(process.env, ["A=2=3", "B="], "the last of a name, where its first was");
    assert_eq!(process.cwd, PathBuf::from("/w"));
    assert_eq!((process.uid, process.gid, process.umask), (1, 2, 63));
    assert_eq!(process.groups, [3, 4]);
    assert!(process.no_new_privileges && process.terminal);
    assert_eq!(process.oom_score_adj, Some(-5));
    assert_eq!(process.apparmor.as_deref(), Some("p"));
    assert_eq!(process.selinux.as_deref(), Some("l"));
    assert_eq!(process.console_size, Some(Size { rows: 24, columns: 80 }));
    let empty = of(
        json!({"apparmorProfile": "", "selinuxLabel": "", "commandLine": "", "user": {"username": ""},
        "consoleSize": {"height": 99999, "width": 1}}),
    );
    assert_eq!((empty.apparmor, empty.selinux, empty.console_size), (None, None, None));
    let unknown = of(json!({"terminal": true, "consoleSize": {"height": 0, "width": 0}}));
    assert_eq!(unknown.console_size, None);
}

#[test]
fn a_field_that_is_wrong_is_named() {
    for (json, text) in [
        (json!({"args": []}), "process.args: there is no program"),
        (json!({"args": null}), "process.args: there is no program"),
        (json!({"args": ["a", "b\0"]}), "process.args[1]: there is a NUL in it"),
        (
            json!({"commandLine": "a b"}),
            "process.commandLine is for Windows; use process.args",
        ),
        (json!({"env": ["A=1", "B"]}), "process.env[1]: \"B\" is not NAME=value"),
        (json!({"env": ["=x"]}), "process.env[0]: \"=x\" is not NAME=value"),
        (json!({"env": ["A=\0"]}), "process.env[0]: there is a NUL in it"),
        (json!({"cwd": ""}), "process.cwd: \"\" is no absolute path"),
        (json!({"cwd": "x"}), "process.cwd: \"x\" is no absolute path"),
        (json!({"cwd": "/\0"}), "process.cwd: there is a NUL in it"),
        (
            json!({"user": {"uid": u32::MAX}}),
            "process.user.uid: 4294967295 is nobody's",
        ),
        (
            json!({"user": {"gid": u32::MAX}}),
            "process.user.gid: 4294967295 is nobody's",
        ),
        (
            json!({"user": {"additionalGids": [1, u32::MAX]}}),
            "process.user.additionalGids[1]: 4294967295 is nobody's",
        ),
        (
            json!({"user": {"umask": 512}}),
            "process.user.umask: 512 is more than 511 (0777)",
        ),
        (
            json!({"user": {"username": "me"}}),
            "process.user.username is for Windows; use process.user.uid",
        ),
        (
            json!({"oomScoreAdj": 1001}),
            "process.oomScoreAdj: 1001 is not from -1000 to 1000",
        ),
        (
            json!({"oomScoreAdj": -1001}),
            "process.oomScoreAdj: -1001 is not from -1000 to 1000",
        ),
        (
            json!({"apparmorProfile": "\0"}),
            "process.apparmorProfile: there is a NUL in it",
        ),
        (
            json!({"selinuxLabel": "\0"}),
            "process.selinuxLabel: there is a NUL in it",
        ),
        (
            json!({"terminal": true, "consoleSize": {"height": 65536, "width": 1}}),
            "process.consoleSize.height: 65536 is more than 65535",
        ),
        (
            json!({"terminal": true, "consoleSize": {"height": 1, "width": 65536}}),
            "process.consoleSize.width: 65536 is more than 65535",
        ),
        (
            json!({"capabilities": {"effective": ["CAP_KILL", "CAP_CHOWN"], "permitted": ["CAP_KILL"]}}),
            "process.capabilities.effective: CAP_CHOWN is not in permitted",
        ),
        (
            json!({"capabilities": {"inheritable": ["CAP_KILL"]}}),
            "process.capabilities.inheritable: CAP_KILL is not in bounding",
        ),
        (
            json!({"rlimits": [{"type": "RLIMIT_CPU", "soft": 1, "hard": 1}, {"type": "RLIMIT_CPU", "soft": 1, "hard": 1}]}),
            "process.rlimits[1].type: RLIMIT_CPU is there twice",
        ),
        (
            json!({"rlimits": [{"type": "RLIMIT_CPU", "soft": 2, "hard": 1}]}),
            "process.rlimits[0].soft: RLIMIT_CPU 2 is more than hard, 1",
        ),
        (
            json!({"ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 8}}),
            "process.ioPriority.priority: 8 is not from 0 to 7",
        ),
        (
            json!({"ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": -1}}),
            "process.ioPriority.priority: -1 is not from 0 to 7",
        ),
    ] {
        assert_eq!(refused(json), text);
    }
}

/// linux/capability.h, in its order.
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

#[test]
fn every_capability_has_the_kernels_number_in_every_set() {
    for (number, name) in CAPABILITIES.iter().enumerate() {
        let known: Capability = serde_json::from_value(json!(format!("CAP_{name}"))).unwrap();
        assert_eq!(known.to_string(), *name);
        let list = json!([format!("CAP_{name}")]);
        let mask = 1 << number;
        let sets = of(
            json!({"capabilities": {"bounding": list, "effective": list, "inheritable": list, "permitted": list,
            "ambient": list}}),
        )
        .capabilities;
        assert_eq!(
            sets,
            Sets {
                bounding: mask,
                effective: mask,
                inheritable: mask,
                permitted: mask,
                ambient: mask
            },
            "{name}"
        );
    }
    let sets = of(json!({"capabilities": {"bounding": ["CAP_CHOWN", "CAP_BPF"], "permitted": ["CAP_KILL"], "ambient": ["CAP_LEASE"]}}))
        .capabilities;
    assert_eq!(
        sets,
        Sets {
            bounding: 1 | 1 << 39,
            permitted: 1 << 5,
            ambient: 1 << 28,
            ..Sets::default()
        }
    );
}

#[test]
fn every_resource_limit_has_the_kernels_number() {
    // asm-generic/resource.h, in its order.
    for (number, name) in [
        "CPU",
        "FSIZE",
        "DATA",
        "STACK",
        "CORE",
        "RSS",
        "NPROC",
        "NOFILE",
        "MEMLOCK",
        "AS",
        "LOCKS",
        "SIGPENDING",
        "MSGQUEUE",
        "NICE",
        "RTPRIO",
        "RTTIME",
    ]
    .iter()
    .enumerate()
    {
        let rlimits = of(json!({"rlimits": [{"type": format!("RLIMIT_{name}"), "soft": 1, "hard": u64::MAX}]})).rlimits;
        assert_eq!(
            rlimits,
            [Rlimit {
                resource: number as u32,
                soft: 1,
                hard: u64::MAX
            }],
            "{name}"
        );
    }
}

#[test]
fn every_policy_has_what_it_takes_and_nothing_else() {
    let plain = Scheduler {
        policy: 0,
        flags: 0,
        nice: 0,
        priority: 0,
        runtime: 0,
        deadline: 0,
        period: 0,
    };
    for (json, scheduler) in [
        (
            json!({"policy": "SCHED_OTHER", "nice": -20}),
            Scheduler { nice: -20, ..plain },
        ),
        (
            json!({"policy": "SCHED_FIFO", "priority": 1}),
            Scheduler {
                policy: 1,
                priority: 1,
                ..plain
            },
        ),
        (
            json!({"policy": "SCHED_RR", "priority": 99}),
            Scheduler {
                policy: 2,
                priority: 99,
                ..plain
            },
        ),
        (
            json!({"policy": "SCHED_BATCH", "nice": 19}),
            Scheduler {
                policy: 3,
                nice: 19,
                ..plain
            },
        ),
        (json!({"policy": "SCHED_IDLE"}), Scheduler { policy: 5, ..plain }),
        (
            json!({"policy": "SCHED_DEADLINE", "runtime": 1024, "deadline": 2048, "period": 4096}),
            Scheduler {
                policy: 6,
                runtime: 1024,
                deadline: 2048,
                period: 4096,
                ..plain
            },
        ),
        (
            json!({"policy": "SCHED_DEADLINE", "runtime": 1024, "deadline": 1024}),
            Scheduler {
                policy: 6,
                runtime: 1024,
                deadline: 1024,
                ..plain
            },
        ),
    ] {
        assert_eq!(of(json!({"scheduler": json})).scheduler, Some(scheduler));
    }
    for (json, field) in [
        (json!({"policy": "SCHED_ISO"}), "policy"),
        (json!({"policy": "SCHED_OTHER", "nice": 20}), "nice"),
        (json!({"policy": "SCHED_OTHER", "nice": -21}), "nice"),
        (json!({"policy": "SCHED_FIFO", "priority": 1, "nice": 1}), "nice"),
        (json!({"policy": "SCHED_IDLE", "nice": 1}), "nice"),
        (json!({"policy": "SCHED_OTHER", "priority": 1}), "priority"),
        (json!({"policy": "SCHED_FIFO"}), "priority"),
        (json!({"policy": "SCHED_RR", "priority": 100}), "priority"),
        (json!({"policy": "SCHED_RR", "priority": -1}), "priority"),
        (json!({"policy": "SCHED_OTHER", "runtime": 1024}), "runtime"),
        (json!({"policy": "SCHED_OTHER", "deadline": 1024}), "deadline"),
        (json!({"policy": "SCHED_OTHER", "period": 1024}), "period"),
        (
            json!({"policy": "SCHED_DEADLINE", "runtime": 1023, "deadline": 2048}),
            "runtime",
        ),
        (
            json!({"policy": "SCHED_DEADLINE", "runtime": 2048, "deadline": 1024}),
            "deadline",
        ),
        (
            json!({"policy": "SCHED_DEADLINE", "runtime": 1024, "deadline": 2048, "period": 1024}),
            "period",
        ),
        (
            json!({"policy": "SCHED_DEADLINE", "runtime": 1024, "deadline": u64::MAX}),
            "deadline",
        ),
    ] {
        let text = refused(json!({"scheduler": json}));
        assert!(text.starts_with(&format!("process.scheduler.{field}: ")), "{text}");
    }
}

#[test]
fn every_flag_of_a_scheduler_has_the_kernels_bit() {
    use oci_spec::runtime::LinuxSchedulerFlag as F;
    let with = |flag: F| {
        let mut scheduler: oci_spec::runtime::Scheduler =
            serde_json::from_value(json!({"policy": "SCHED_OTHER"})).unwrap();
        scheduler.set_flags(Some(vec![F::SchedResetOnFork, flag]));
        let mut process = oci(json!({}));
        process.set_scheduler(Some(scheduler));
        Process::of(&process, None)
    };
    for (flag, bit) in [
        (F::SchedResetOnFork, 1),
        (F::SchedFlagReclaim, 2),
        (F::SchedFlagDLOverrun, 4),
        (F::SchedFlagKeepPolicy, 8),
        (F::SchedFlagKeepParams, 16),
    ] {
        assert_eq!(with(flag).unwrap().scheduler.unwrap().flags, 1 | bit);
    }
    for flag in [F::SchedFlagUtilClampMin, F::SchedFlagUtilClampMax] {
        let text = with(flag).unwrap_err().to_string();
        assert!(text.starts_with("process.scheduler.flags[1]: "), "{text}");
    }
}

#[test]
fn every_class_of_io_priority_has_the_kernels_number() {
    for (class, number) in [("RT", 1), ("BE", 2), ("IDLE", 3)] {
        for level in 0..8 {
            let process = of(json!({"ioPriority": {"class": format!("IOPRIO_CLASS_{class}"), "priority": level}}));
            assert_eq!(process.io_priority, Some(number << 13 | level));
        }
    }
}

#[test]
fn a_personality_is_one_of_two_without_flags() {
    let with = |json: Value| Process::of(&oci(json!({})), Some(&linux(json!({"personality": json}))));
    assert_eq!(with(json!({"domain": "LINUX"})).unwrap().personality, Some(0));
    assert_eq!(
        with(json!({"domain": "LINUX32", "flags": []})).unwrap().personality,
        Some(8)
    );
    let error = with(json!({"domain": "LINUX", "flags": ["X"]})).unwrap_err();
    assert_eq!(
        error.to_string(),
        "linux.personality.flags[0]: \"X\"; OCI knows none yet"
    );
}

#[test]
fn an_affinity_is_for_an_exec_only() {
    let process = oci(json!({"execCPUAffinity": {"initial": "0", "final": "1-3,7"}}));
    assert_eq!(
        Process::of(&process, None).unwrap().exec_cpu_affinity,
        Affinity::default()
    );
    let exec = |json: Value| Process::of_exec(&oci(json!({"execCPUAffinity": json})), &oci(json!({})), None);
    assert_eq!(
        exec(json!({"initial": "0", "final": "1-3,7"}))
            .unwrap()
            .exec_cpu_affinity,
        Affinity {
            initial: Some(vec![(0, 0)]),
            last: Some(vec![(1, 3), (7, 7)])
        }
    );
    for (json, field) in [
        (json!({"initial": "3-1"}), "initial"),
        (json!({"final": "8192"}), "final"),
        (json!({"final": "0,99999999999"}), "final"),
    ] {
        let text = exec(json).unwrap_err().to_string();
        assert!(
            text.starts_with(&format!("process.execCPUAffinity.{field}: ")),
            "{text}"
        );
    }
}

#[test]
fn an_exec_takes_from_init_what_it_does_not_say() {
    let init = oci(
        json!({"env": ["A=1"], "capabilities": {"bounding": ["CAP_KILL"]}, "apparmorProfile": "p", "selinuxLabel": "l",
        "user": {"uid": 5}, "oomScoreAdj": 7, "noNewPrivileges": true}),
    );
    let exec = Process::of_exec(&oci(json!({})), &init, None).unwrap();
    assert_eq!(exec.env, ["A=1"]);
    assert_eq!(exec.capabilities.bounding, 1 << 5);
    assert_eq!(
        (exec.apparmor.as_deref(), exec.selinux.as_deref()),
        (Some("p"), Some("l"))
    );
    assert_eq!((exec.uid, exec.oom_score_adj, exec.no_new_privileges), (0, None, false));
    let own = json!({"env": ["B=1"], "capabilities": {}, "apparmorProfile": "q", "selinuxLabel": "m"});
    let exec = Process::of_exec(&oci(own), &init, None).unwrap();
    assert_eq!(exec.env, ["B=1"]);
    assert_eq!(exec.capabilities, Sets::default());
    assert_eq!(
        (exec.apparmor.as_deref(), exec.selinux.as_deref()),
        (Some("q"), Some("m"))
    );
}

#[test]
fn a_filter_is_compiled_and_survives_the_way_to_the_helper() {
    let linux = linux(
        json!({"seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/l", "listenerMetadata": "m",
        "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]}}),
    );
    let process = Process::of(&oci(json!({})), Some(&linux)).unwrap();
    let filter = process.seccomp.as_ref().unwrap();
    assert_eq!(filter.listener.as_ref().unwrap().path, PathBuf::from("/l"));
    let json = serde_json::to_string(&process).unwrap();
    assert_eq!(serde_json::from_str::<Process>(&json).unwrap(), process);
    assert!(json.len() < 2 * filter.program.len() + 1000, "{json}");
    let broken = |program: &str| {
        let mut document: Value = serde_json::from_str(&json).unwrap();
        document["seccomp"]["program"] = program.into();
        serde_json::from_value::<Process>(document).is_err()
    };
    assert!(broken("00") && broken("0") && broken("zz00000000000000") && broken("é0000000000000"));
}

#[test]
fn an_agent_is_told_the_container_process_state() {
    let state = json!({"id": "c1"});
    let message: Value = serde_json::from_str(&agent_message(Some("m"), 9, &state)).unwrap();
    assert_eq!(
        message,
        json!({"ociVersion": "1.0.2", "fds": ["seccompFd"], "pid": 9, "metadata": "m",
            "state": {"id": "c1"}})
    );
}

#[test]
fn a_home_is_that_of_the_users_first_line() {
    let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\n#:x:y\na:x:7::\nb:x:7:7:g:/home/b:\nc:x:7:7:g:/home/c:";
    assert_eq!(exec::home_in(passwd, 0), Some("/root"));
    assert_eq!(exec::home_in(passwd, 7), Some("/home/b"));
    assert_eq!(exec::home_in(passwd, 8), None);
}

fn any_process() -> impl Strategy<Value = Value> {
    let texts = || prop::collection::vec("[ =A-Za-z\\x00/é]{0,4}", 0..4);
    (
        texts(),
        texts(),
        "(/)?[a-z\\x00]{0,3}",
        any::<(u32, u32, Option<u32>)>(),
        any::<(Option<bool>, Option<i32>, Option<bool>)>(),
        any::<(u64, u64)>(),
        prop::collection::vec((0..16_usize, any::<u64>(), any::<u64>()), 0..3),
        any::<(Option<i32>, Option<i32>, Option<u64>, i64)>(),
    )
        .prop_map(|(args, env, cwd, user, flags, size, rlimits, scheduler)| {
            const NAMES: [&str; 16] = [
                "CPU", "FSIZE", "DATA", "STACK", "CORE", "RSS", "NPROC", "NOFILE", "MEMLOCK", "AS", "LOCKS", "SIGPENDING", "MSGQUEUE",
                "NICE", "RTPRIO", "RTTIME",
            ];
            json!({
                "args": args, "env": env, "cwd": cwd,
                "user": {"uid": user.0, "gid": user.1, "umask": user.2.map(|umask| umask % 1024)},
                "terminal": flags.0, "oomScoreAdj": flags.1.map(|score| score % 2000), "noNewPrivileges": flags.2,
                "consoleSize": {"height": size.0 % 100_000, "width": size.1 % 100_000},
                "rlimits": rlimits.iter().map(|(index, soft, hard)| json!({
                    "type": format!("RLIMIT_{}", NAMES[*index]), "soft": soft, "hard": hard
                })).collect::<Vec<_>>(),
                "scheduler": {"policy": "SCHED_OTHER", "nice": scheduler.0.map(|nice| nice % 30), "priority": scheduler.1,
                    "runtime": scheduler.2},
                "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": scheduler.3 % 12},
            })
        })
}

proptest! {
    #[test]
    fn a_process_is_refused_by_name_or_can_be_applied(json in any_process()) {
        match Process::of(&oci(json), None) {
            Err(error) => {
                prop_assert_eq!(error.kind(), Kind::InvalidArgument);
                prop_assert!(error.to_string().starts_with("process."), "{}", error);
            }
            Ok(process) => {
                let texts = process.args.iter().chain(&process.env);
                prop_assert!(texts.clone().all(|text| !text.contains('\0')));
                prop_assert!(process.env.iter().all(|variable| variable.find('=') > Some(0)));
                prop_assert!(process.cwd.is_absolute() && process.umask <= 0o777 && process.uid != u32::MAX);
                prop_assert!(process.rlimits.iter().all(|rlimit| rlimit.soft <= rlimit.hard));
                let json = serde_json::to_string(&process).unwrap();
                prop_assert_eq!(serde_json::from_str::<Process>(&json).unwrap(), process);
            }
        }
    }
}
