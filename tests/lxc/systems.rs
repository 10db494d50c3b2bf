//! System containers.

use super::*;

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
pub(super) fn with_busybox_init(a: &mut Bundle, more: &[&str]) {
    let upper = a.path.join("upper");
    fs::create_dir_all(upper.join("sbin")).unwrap();
    fs::create_dir_all(upper.join("etc")).unwrap();
    std::os::unix::fs::symlink("../bin/busybox", upper.join("sbin/init")).unwrap();
    let inittab = "::sysinit:/bin/sh -c 'echo up >/log'\n::respawn:/bin/sh -c 'touch /ready; exec sleep 100000'\n\
                   ::shutdown:/bin/sh -c 'echo down >>/log'\n";
    fs::write(upper.join("etc/inittab"), inittab).unwrap();
    as_a_system(a, more);
}

/// What an exec with the capabilities of the container prints, and how it ends.
async fn says(pod: &Pod, a: &Bundle, exec: &str, args: &[&str]) -> (u32, String) {
    let mut spec = process(args);
    spec["capabilities"] = a.spec["process"]["capabilities"].clone();
    pod.exec_says(a, exec, &spec).await
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

/// Puts a bundle on another read-only layer than busybox.
fn stands_on(a: &mut Bundle, folder: &str) {
    let lower = format!("lowerdir={}", busybox().display());
    for option in &mut a.rootfs[0].options {
        if *option == lower {
            *option = format!("lowerdir={folder}");
        }
    }
}

/// The cgroup of container a, with its limits (v2).
fn own_cgroup() -> PathBuf {
    let token = universe::token();
    let below = match universe::by_systemd() {
        true => format!("{token}.slice/lxcri-a.scope"),
        false => format!("{token}/a"),
    };
    Path::new("/sys/fs/cgroup").join(below)
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
    stands_on(a, "/");
    as_a_system(a, &[]);
}

#[test]
fn a_debian_with_systemd_boots_manages_its_cgroup_and_is_halted() {
    if !Path::new(SYSTEMD).exists() || !cgroup_v2() {
        let missing = "no systemd and no cgroup v2 on this machine, whose root file system the container would have";
        return support::skip::skip(
            "lxc::systems::a_debian_with_systemd_boots_manages_its_cgroup_and_is_halted",
            missing,
        );
    }
    lxc(async |daemon| {
        for terminal in [false, true] {
            let (pod, mut a) = pod(daemon, &["/sbin/init"]).await;
            with_the_machines_system(&mut a);
            a.spec["linux"]["resources"]["memory"] = json!({"limit": 1 << 30});
            a.spec["linux"]["resources"]["pids"] = json!({"limit": 4321});
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
            let own = own_cgroup();
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
            assert_eq!(limit("pids.max"), "4321\n");
            let script = "mknod /disk b 7 200 && head -c 1 /disk 2>&1 | grep -o 'not permitted'";
            let (_, inside) = says(&pod, &a, "device", &shell(script)).await;
            assert_eq!(inside, "not permitted\n");
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

/// Waits until systemd has started all that it shall, and asserts that nothing of it has failed.
async fn boots(pod: &Pod, a: &Bundle) {
    let mut number = 0;
    let state = until_told("systemd has booted", async || {
        number += 1;
        let exec = format!("boots{number}");
        let (_, state) = says(pod, a, &exec, &["systemctl", "is-system-running", "--wait"]).await;
        let state = state.trim().to_owned();
        // Anything else: it does not listen yet.
        matches!(state.as_str(), "running" | "degraded" | "maintenance").then_some(state)
    })
    .await;
    if state != "running" {
        let list = ["systemctl", "--failed", "--plain", "--no-legend", "--no-pager"];
        let (_, failed) = says(pod, a, "failed", &list).await;
        panic!("systemd is {state}: {failed}");
    }
}

/// A Debian with OpenRC, and with both of the inits that run it.
const OPENRC: &str = "/opt/openrc";

/// That Debian as a container's, with a service that writes down when it begins and ends.
fn with_openrc(a: &mut Bundle, more: &[&str]) {
    let upper = a.path.join("upper");
    let folders = ["etc/init.d", "etc/runlevels/default"].map(|folder| upper.join(folder));
    for folder in &folders {
        fs::create_dir_all(folder).unwrap();
    }
    let service = folders[0].join("recorder");
    let text = "#!/sbin/openrc-run\ncommand=/bin/sleep\ncommand_args=100000\ncommand_background=yes\npidfile=/run/recorder.pid\n\
                start_post() { echo up >/log; }\nstop_post() { echo down >>/log; }\n";
    fs::write(&service, text).unwrap();
    fs::set_permissions(&service, fs::Permissions::from_mode(0o755)).unwrap();
    std::os::unix::fs::symlink("/etc/init.d/recorder", folders[1].join("recorder")).unwrap();
    // What Proxmox VE adds: Debian's own line is about a script that it does not bring.
    let inittab = fs::read_to_string(Path::new(OPENRC).join("etc/inittab")).unwrap();
    fs::write(upper.join("etc/inittab"), inittab + "p0::powerfail:/sbin/init 0\n").unwrap();
    stands_on(a, OPENRC);
    as_a_system(a, more);
}

#[test]
fn a_debian_with_openrc_boots_and_is_halted_under_openrcs_init_and_under_sysvinit() {
    if !Path::new(OPENRC).exists() {
        return support::skip::skip(
            "lxc::systems::a_debian_with_openrc_boots_and_is_halted_under_openrcs_init_and_under_sysvinit",
            &format!("no Debian with OpenRC in {OPENRC}"),
        );
    }
    lxc(async |daemon| {
        for (program, more) in [
            ("/sbin/openrc-init", &["CAP_SYS_BOOT"][..]),
            ("/sbin/init", &["CAP_SYS_BOOT"]),
            ("/sbin/openrc-init", &[]),
            ("/sbin/init", &[]),
        ] {
            let (pod, mut a) = pod(daemon, &[program]).await;
            with_openrc(&mut a, more);
            let io = Io::terminal(&a.path, "console");
            let (console, stdin) = (io.read_stdout(), io.open_stdin());
            pod.run(&a, &io).await;
            let log = a.path.join("upper/log");
            let logs = async |text: &str| {
                let is_there = || (fs::read_to_string(&log).unwrap_or_default() == text).then_some(());
                until(&format!("{program} has logged {text:?}"), is_there).await;
            };
            logs("up\n").await;
            // It logs a moment before it counts as started.
            let mut number = 0;
            until_told("the service has started", async || {
                number += 1;
                let exec = format!("status{number}");
                let (status, text) = says(&pod, &a, &exec, &["rc-service", "recorder", "status"]).await;
                (status == 0 && text.contains("started")).then_some(())
            })
            .await;
            if cgroup_v2() {
                let service = own_cgroup().join("ns/openrc.recorder/cgroup.procs");
                assert_eq!(fs::read_to_string(service).unwrap().lines().count(), 1);
            }
            let known = daemon.told().len();
            pod.kill("a", "", libc::SIGTERM, false).await.unwrap();
            // Without the capability the init has nothing left to do, and no way to end.
            let ended = match more {
                [] => {
                    logs("up\ndown\n").await;
                    // OpenRC gives what is left three seconds; it takes no longer with the capability.
                    let ended = tokio::time::timeout(std::time::Duration::from_secs(6), pod.wait("a", "")).await;
                    assert!(ended.is_err(), "{program} has ended: {ended:?}");
                    pod.kill("a", "", libc::SIGKILL, false).await.unwrap();
                    137
                }
                _ => 128 + libc::SIGINT.cast_unsigned(),
            };
            assert_eq!(pod.wait("a", "").await.unwrap(), ended, "{program} {more:?}");
            logs("up\ndown\n").await;
            daemon.hears_after(known, &format!("exit a {ended}")).await;
            drop(stdin);
            assert_eq!(pod.delete("a", "").await.unwrap().exit_status, ended);
            let text = console.text().await;
            assert!(text.contains("is starting up"), "{text}");
            assert_eq!(exits(daemon, known), [format!("exit a {ended}")]);
            let shims = pod.shutdown().await;
            let warned = shims.contains("has no CAP_SYS_BOOT: when it is halted its services end, and it goes on");
            assert_eq!(warned, more.is_empty(), "{shims}");
            daemon.assert_nothing_left();
            fs::remove_dir_all(&a.path).unwrap();
        }
    });
}

// ---- what is missing ---------------------------------------------------------------------------------------------------------------
