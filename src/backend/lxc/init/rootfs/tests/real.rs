//! Real mounts. A thread in a mount namespace of its own is the host; a child in further namespaces is init.

use std::{
    fs::{self, File},
    io::{Read, Seek, Write},
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink},
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    thread,
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::{
        stat::{Mode, SFlag, mknod, umask},
        wait::{WaitStatus, waitpid},
    },
    unistd::{ForkResult, fork, pipe2, setresgid, setresuid},
};
use serde_json::{Value, json};

use super::{super::Mounted, planned};
use crate::{
    backend::lxc::init::{proc::Proc, rootfs::Root},
    error::{Error, Kind, Result},
};

const NONE: Option<&str> = None;

/// Runs `test` with a mount namespace of its own as the host, in whose folder a shared tmpfs with an empty bundle is.
fn on_a_host(test: impl FnOnce(&Path) + Send + 'static) {
    let thread = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNS).expect("these tests need root");
        mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).unwrap();
        let folder = tempfile::tempdir().unwrap();
        tmpfs(folder.path());
        fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
        mount(NONE, folder.path(), NONE, MsFlags::MS_SHARED, NONE).unwrap();
        fs::create_dir(folder.path().join("rootfs")).unwrap();
        test(folder.path());
        umount2(folder.path(), MntFlags::MNT_DETACH).unwrap();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn tmpfs(path: &Path) {
    mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), NONE).unwrap();
}

fn write(path: impl AsRef<Path>, text: &str) {
    fs::create_dir_all(path.as_ref().parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

#[derive(Clone, Copy, PartialEq)]
enum Space {
    /// A mount namespace alone.
    Mounts,
    /// All of them, with ids from 100000.
    Users,
    /// The same with the host's network.
    UsersOnHostNetwork,
}

/// Makes `root` in the namespaces `space` and runs `test` in a process that has done all of it up to entering.
fn mounted(root: &Root, space: Space, test: impl FnOnce(Mounted)) {
    let trees = root.open().unwrap();
    init(space, || test(root.mount(trees).unwrap()));
}

/// The same with the root entered.
fn entered(root: &Root, space: Space, test: impl FnOnce(&Proc)) {
    mounted(root, space, |mounted| test(&root.enter(mounted).unwrap()));
}

/// What comes of the mounts.
fn failed(root: &Root, space: Space, test: impl FnOnce(Error)) {
    let trees = root.open().unwrap();
    init(space, || test(root.mount(trees).unwrap_err()));
}

/// Runs `body` as init, which LXC has left without `/proc`.
fn init(space: Space, body: impl FnOnce()) {
    // No end of file is waited for: a test beside this one may have forked a copy of any descriptor.
    let report = nix::sys::memfd::memfd_create("report", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
    let (go, maps) = pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    let (unshared, ready) = pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    // SAFETY: the child has one thread, and ends by _exit(2) in this function.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            let run = || {
                unshare(CloneFlags::CLONE_NEWNS).unwrap();
                // Before the user namespace, in which it is locked.
                umount2("/proc", MntFlags::MNT_DETACH).unwrap();
                let mut flags = CloneFlags::CLONE_NEWNS
                    | CloneFlags::CLONE_NEWUSER
                    | CloneFlags::CLONE_NEWPID
                    | CloneFlags::CLONE_NEWIPC
                    | CloneFlags::CLONE_NEWUTS
                    | CloneFlags::CLONE_NEWCGROUP;
                if space == Space::Users {
                    flags |= CloneFlags::CLONE_NEWNET;
                }
                if space != Space::Mounts {
                    unshare(flags).unwrap();
                }
                nix::unistd::write(&ready, b"x").unwrap();
                let mut byte = [0];
                let _ = File::from(go).read(&mut byte).unwrap();
                if space != Space::Mounts {
                    setresgid(0.into(), 0.into(), 0.into()).unwrap();
                    setresuid(0.into(), 0.into(), 0.into()).unwrap();
                    // SAFETY: as above.
                    if let ForkResult::Parent { child } = unsafe { fork() }.unwrap() {
                        return assert_eq!(waitpid(child, None).unwrap(), WaitStatus::Exited(child, 0));
                    }
                }
                mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_SLAVE, NONE).unwrap();
                body();
            };
            // No hook of its own: another test may panic at the time of the fork, and hold the lock that is in the way then.
            let ok = catch_unwind(AssertUnwindSafe(run)).map_err(|panic| {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
                let _ = File::from(report).write_all(text.unwrap_or("a panic without a text").as_bytes());
            });
            // SAFETY: nothing of the test harness is to run in this copy of it.
            unsafe { libc::_exit(i32::from(ok.is_err())) }
        }
        ForkResult::Parent { child } => {
            let mut byte = [0];
            let _ = File::from(unshared).read(&mut byte).unwrap();
            if space != Space::Mounts {
                for map in ["uid_map", "gid_map"] {
                    fs::write(format!("/proc/{child}/{map}"), "0 100000 65536\n").unwrap();
                }
            }
            nix::unistd::write(&maps, b"x").unwrap();
            let status = waitpid(child, None).unwrap();
            let mut report = File::from(report);
            report.seek(std::io::SeekFrom::Start(0)).unwrap();
            let mut text = String::new();
            report.read_to_string(&mut text).unwrap();
            assert!(matches!(status, WaitStatus::Exited(_, 0)), "{status:?}: {text}");
        }
    }
}

fn users(namespaces: &[&str]) -> Value {
    let mut all = vec![json!({"type": "mount"}), json!({"type": "user"})];
    all.extend(namespaces.iter().map(|kind| json!({"type": kind})));
    json!(all)
}

/// Points, options and optional fields of the mounts.
fn table(proc: &Proc) -> Vec<(PathBuf, String, String, String)> {
    let text = proc.read("self/mountinfo").unwrap();
    let entries = crate::rootfs::mountinfo::parse(text.as_bytes());
    entries
        .map(|entry| {
            (
                entry.mount_point.into_owned(),
                entry.options.to_string_lossy().into_owned(),
                String::from_utf8_lossy(entry.optional).into_owned(),
                entry.fs_type.to_string_lossy().into_owned(),
            )
        })
        .collect()
}

/// Options and optional fields of the topmost mount at `point`.
fn row(proc: &Proc, point: &str) -> (String, String) {
    let all = table(proc);
    let found = all.iter().rev().find(|row| row.0 == Path::new(point));
    let (_, options, optional, _) = found.unwrap_or_else(|| panic!("nothing at {point}: {all:#?}"));
    (options.clone(), optional.clone())
}

fn has(options: &str, word: &str) -> bool {
    options.split(',').any(|option| option == word)
}

fn usual() -> Vec<Value> {
    vec![
        json!({"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]}),
        json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]}),
        json!({"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]}),
        json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]}),
        json!({"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]}),
        json!({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]}),
        json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}),
        json!({"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]}),
    ]
}

#[test]
fn a_usual_bundle_becomes_a_root_and_nothing_of_the_host_is_left() {
    on_a_host(|host| {
        write(host.join("rootfs/etc/passwd"), "root");
        let root = planned(host, json!(usual()), json!({})).unwrap();
        let host = host.to_path_buf();
        entered(&root, Space::Mounts, move |proc| {
            assert_eq!(std::env::current_dir().unwrap(), Path::new("/"));
            assert_eq!(fs::read_to_string("/etc/passwd").unwrap(), "root");
            assert!(!host.exists());
            let all = table(proc);
            for (point, ..) in &all {
                let own = ["/", "/proc", "/dev", "/sys", "/run"].map(Path::new);
                let inside = *point == own[0] || own[1..].iter().any(|own| point.starts_with(own));
                assert!(inside, "{all:#?}");
            }
            assert_eq!(all.iter().filter(|row| row.0 == Path::new("/")).count(), 1);
            let (options, _) = row(proc, "/sys");
            assert!(
                has(&options, "ro") && has(&options, "nosuid") && has(&options, "nodev"),
                "{options}"
            );
            assert!(has(&row(proc, "/dev").0, "rw"));
            let root_of_1 = fs::metadata("/dev/null").unwrap();
            assert!(root_of_1.file_type().is_char_device() && root_of_1.rdev() == libc::makedev(1, 3));
            for (name, target) in [
                ("fd", "/proc/self/fd"),
                ("ptmx", "pts/ptmx"),
                ("stdin", "/proc/self/fd/0"),
            ] {
                assert_eq!(fs::read_link(format!("/dev/{name}")).unwrap(), Path::new(target));
            }
            File::options().read(true).write(true).open("/dev/ptmx").unwrap();
            assert_eq!(fs::read_dir("/dev/pts").unwrap().count(), 1);
            assert_eq!(fs::metadata("/dev/shm").unwrap().permissions().mode() & 0o7777, 0o1777);
        });
    });
}

#[test]
fn each_hierarchy_of_cgroups_shows_the_own_cgroup_and_is_read_only() {
    on_a_host(|host| {
        let root = planned(host, json!(usual()), json!({})).unwrap();
        entered(&root, Space::Mounts, |proc| {
            let text = proc.read("self/cgroup").unwrap();
            let own = crate::host::cgroup::parse::memberships(&text).filter(|own| !own.controllers.is_empty());
            let mut seen = 0;
            for own in own {
                let name = own.controllers.strip_prefix("name=").unwrap_or(own.controllers);
                let folder = Path::new("/sys/fs/cgroup").join(name);
                let members = fs::read_to_string(folder.join("cgroup.procs")).unwrap();
                let pid = std::process::id().to_string();
                assert!(members.lines().any(|line| line == pid), "{folder:?}");
                assert!(has(&row(proc, folder.to_str().unwrap()).0, "ro"));
                seen += 1;
            }
            assert!(seen > 0 || Path::new("/sys/fs/cgroup/cgroup.procs").exists());
            assert!(has(&row(proc, "/sys/fs/cgroup").0, "ro"));
            let error = fs::create_dir("/sys/fs/cgroup/x").unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EROFS));
        });
    });
}

#[test]
fn a_shared_bind_is_a_peer_of_the_hosts_and_the_others_are_not() {
    on_a_host(|host| {
        for name in ["shared", "slave", "private", "plain"] {
            fs::create_dir_all(host.join(name).join("of-host")).unwrap();
            fs::create_dir_all(host.join(name).join("of-init")).unwrap();
            mount(Some(&host.join(name)), &host.join(name), NONE, MsFlags::MS_BIND, NONE).unwrap();
            mount(NONE, &host.join(name), NONE, MsFlags::MS_SHARED, NONE).unwrap();
        }
        let bind = |name: &str, options: &[&str]| json!({"destination": format!("/{name}"), "type": "bind", "source": host.join(name), "options": options});
        let mut mounts = vec![
            bind("shared", &["rbind", "rshared"]),
            bind("slave", &["rbind", "rslave"]),
            bind("private", &["rbind", "rprivate"]),
            bind("plain", &["rbind"]),
        ];
        // A mount of the bundle inside a bind is nothing to the host, but in a shared one.
        for name in ["slave", "private", "plain"] {
            mounts.push(json!({"destination": format!("/{name}/of-bundle"), "type": "tmpfs", "source": "tmpfs"}));
        }
        let root = planned(host, json!(mounts), json!({})).unwrap();
        let trees = root.open().unwrap();
        let (go, sent) = pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        let (reached, tell) = pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        let hosts = host.to_path_buf();
        // Another thread with the same namespace, for the one that starts init waits for it.
        let other = thread::scope(|scope| {
            let other = scope.spawn(|| {
                let mut byte = [0];
                let _ = File::from(reached).read(&mut byte).unwrap();
                for name in ["shared", "slave", "private", "plain"] {
                    tmpfs(&hosts.join(name).join("of-host"));
                    fs::write(hosts.join(name).join("of-host/file"), "").unwrap();
                }
                let seen = |name: &str| hosts.join(name).join("of-init/file").exists();
                let seen = ["shared", "slave", "private", "plain"].map(seen);
                let leaked = |name: &&str| {
                    let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
                    table.contains(&format!("{}/{name}/of-bundle ", hosts.display()))
                };
                let leaked = ["slave", "private", "plain"].iter().any(leaked);
                nix::unistd::write(&sent, b"x").unwrap();
                (seen, leaked)
            });
            init(Space::Mounts, || {
                let mounted = root.mount(trees).unwrap();
                root.enter(mounted).unwrap();
                for name in ["shared", "slave", "private", "plain"] {
                    tmpfs(&Path::new("/").join(name).join("of-init"));
                    fs::write(Path::new("/").join(name).join("of-init/file"), "").unwrap();
                }
                nix::unistd::write(&tell, b"x").unwrap();
                let mut byte = [0];
                let _ = File::from(go.try_clone().unwrap()).read(&mut byte).unwrap();
                let seen = |name: &str| Path::new("/").join(name).join("of-host/file").exists();
                assert_eq!(
                    ["shared", "slave", "private", "plain"].map(seen),
                    [true, true, false, false]
                );
            });
            other.join().unwrap()
        });
        assert_eq!(other, ([true, false, false, false], false));
    });
}

#[test]
fn a_bind_without_a_kind_of_its_own_gets_that_of_the_root() {
    for (word, wanted) in [
        ("rshared", "shared:"),
        ("rslave", "master:"),
        ("rprivate", ""),
        ("private", ""),
        ("runbindable", "unbindable"),
        ("unbindable", "unbindable"),
    ] {
        on_a_host(move |host| {
            fs::create_dir(host.join("a")).unwrap();
            mount(Some(&host.join("a")), &host.join("a"), NONE, MsFlags::MS_BIND, NONE).unwrap();
            mount(NONE, &host.join("a"), NONE, MsFlags::MS_SHARED, NONE).unwrap();
            let mounts = json!([
                {"destination": "/a", "type": "bind", "source": host.join("a"), "options": ["bind"]},
                {"destination": "/own", "type": "bind", "source": host.join("a"), "options": ["bind", "private"]},
                {"destination": "/proc", "type": "proc", "source": "proc"},
            ]);
            let linux =
                json!({"rootfsPropagation": word, "readonlyPaths": ["/proc/sys"], "maskedPaths": ["/proc/keys"]});
            let root = planned(host, mounts, linux).unwrap();
            entered(&root, Space::Mounts, move |proc| {
                let (_, optional) = row(proc, "/a");
                assert!(
                    optional.starts_with(wanted) && optional.is_empty() == wanted.is_empty(),
                    "{word}: {optional}"
                );
                assert_eq!(row(proc, "/own").1, "", "{word}");
                let (_, of_root) = row(proc, "/");
                // It has no master, for nothing of the host's is to be a peer of it.
                let wanted = if wanted == "master:" { "" } else { wanted };
                assert!(
                    of_root.starts_with(wanted) && of_root.is_empty() == wanted.is_empty(),
                    "{word}: {of_root}"
                );
            });
        });
    }
}

#[test]
fn recursive_read_only_reaches_the_mounts_below_and_plain_does_not() {
    on_a_host(|host| {
        fs::create_dir_all(host.join("a/below")).unwrap();
        tmpfs(&host.join("a/below"));
        let bind = |at: &str, options: &[&str]| json!({"destination": at, "type": "bind", "source": host.join("a"), "options": options});
        let mounts = json!([
            bind("/rro", &["rbind", "rro", "rnosuid"]),
            bind("/ro", &["rbind", "ro", "noexec"]),
            bind("/rw", &["rbind"])
        ]);
        let root = planned(host, mounts, json!({})).unwrap();
        entered(&root, Space::Mounts, |proc| {
            let write = |path: &str| fs::write(Path::new(path).join("x"), "").map_err(|e| e.raw_os_error().unwrap());
            for (path, wanted) in [
                ("/rro", Err(libc::EROFS)),
                ("/rro/below", Err(libc::EROFS)),
                ("/ro", Err(libc::EROFS)),
                ("/ro/below", Ok(())),
                ("/rw", Ok(())),
                ("/rw/below", Ok(())),
            ] {
                assert_eq!(write(path), wanted, "{path}");
            }
            assert!(has(&row(proc, "/rro/below").0, "nosuid"));
            assert!(has(&row(proc, "/ro").0, "noexec") && !has(&row(proc, "/ro/below").0, "noexec"));
        });
    });
}

#[test]
fn a_bind_keeps_what_its_source_forbids_unless_an_option_takes_it_back() {
    on_a_host(|host| {
        fs::create_dir(host.join("a")).unwrap();
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_RDONLY;
        mount(Some("tmpfs"), &host.join("a"), Some("tmpfs"), flags, NONE).unwrap();
        let bind = |at: &str, options: &[&str]| json!({"destination": at, "type": "bind", "source": host.join("a"), "options": options});
        let mounts = json!([
            bind("/kept", &["bind", "rw", "noexec"]),
            bind("/back", &["bind", "suid"])
        ]);
        of_users(host);
        let root = planned(host, mounts.clone(), json!({"namespaces": users(&["network"])})).unwrap();
        entered(&root, Space::Users, |proc| {
            let back = row(proc, "/back").0;
            assert!(has(&back, "nodev") && has(&back, "nosuid"), "{back}");
        });
        let root = planned(host, mounts, json!({})).unwrap();
        entered(&root, Space::Mounts, |proc| {
            let (kept, back) = (row(proc, "/kept").0, row(proc, "/back").0);
            assert!(
                ["nosuid", "nodev", "noexec", "ro"].iter().all(|word| has(&kept, word)),
                "{kept}"
            );
            assert!(has(&back, "nodev") && !has(&back, "nosuid"), "{back}");
        });
    });
}

#[test]
fn a_tmpfs_gets_a_copy_of_what_it_covers() {
    on_a_host(|host| {
        let top = host.join("rootfs/data");
        write(top.join("a/b/file"), "text");
        fs::set_permissions(top.join("a/b/file"), PermissionsExt::from_mode(0o4711)).unwrap();
        std::os::unix::fs::lchown(top.join("a/b/file"), Some(12), Some(34)).unwrap();
        fs::set_permissions(top.join("a/b/file"), PermissionsExt::from_mode(0o4711)).unwrap();
        symlink("b/nowhere", top.join("a/link")).unwrap();
        mknod(&top.join("fifo"), SFlag::S_IFIFO, Mode::from_bits_truncate(0o640), 0).unwrap();
        fs::set_permissions(&top, PermissionsExt::from_mode(0o2751)).unwrap();
        let mounts = json!([
            {"destination": "/data", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup", "ro", "size=1m"]},
            {"destination": "/new", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup", "mode=700"]},
        ]);
        let root = planned(host, mounts, json!({})).unwrap();
        entered(&root, Space::Mounts, |proc| {
            assert_eq!(fs::read_to_string("/data/a/b/file").unwrap(), "text");
            let file = fs::metadata("/data/a/b/file").unwrap();
            assert_eq!((file.mode() & 0o7777, file.uid(), file.gid()), (0o4711, 12, 34));
            assert_eq!(fs::read_link("/data/a/link").unwrap(), Path::new("b/nowhere"));
            assert!(fs::metadata("/data/fifo").unwrap().file_type().is_fifo());
            assert_eq!(fs::metadata("/data").unwrap().mode() & 0o7777, 0o2751);
            assert_eq!(fs::metadata("/new").unwrap().mode() & 0o7777, 0o700);
            assert!(has(&row(proc, "/data").0, "ro"));
        });
        assert!(top.join("a/b/file").exists());
    });
}

#[test]
fn no_symlink_of_an_image_leads_a_mount_out_of_the_root() {
    on_a_host(|host| {
        fs::create_dir_all(host.join("outside")).unwrap();
        write(host.join("data/file"), "");
        let rootfs = host.join("rootfs");
        symlink(host.join("outside"), rootfs.join("absolute")).unwrap();
        symlink("../../../../../outside", rootfs.join("relative")).unwrap();
        symlink("/run", rootfs.join("to-nothing")).unwrap();
        symlink("loop", rootfs.join("loop")).unwrap();
        fs::create_dir(rootfs.join("deep")).unwrap();
        symlink("/target", rootfs.join("deep/link")).unwrap();
        let bind =
            |at: &str| json!({"destination": at, "type": "bind", "source": host.join("data"), "options": ["bind"]});
        let mounts = json!([
            bind("/absolute/x"),
            bind("/relative"),
            bind("/to-nothing/y/z"),
            bind("/../../up"),
            // What the host has and the image has not.
            bind("/usr/lib"),
            bind("/deep/link/new"),
        ]);
        let root = planned(host, mounts, json!({})).unwrap();
        let path = host.to_path_buf();
        entered(&root, Space::Mounts, move |_| {
            for at in [
                "/outside/file",
                "/run/y/z/file",
                "/up/file",
                "/usr/lib/file",
                "/target/new/file",
            ] {
                assert!(Path::new(at).exists(), "{at}");
            }
            let inside = path.strip_prefix("/").unwrap();
            assert!(Path::new("/").join(inside).join("outside/x/file").exists());
        });
        assert_eq!(fs::read_dir(host.join("outside")).unwrap().count(), 0);
        let root = planned(host, json!([bind("/loop/x")]), json!({})).unwrap();
        failed(&root, Space::Mounts, |error| {
            let text = error.to_string();
            assert!(text.contains("mounts[0]") && text.contains("/loop/x"), "{text}");
        });
    });
}

#[test]
fn procfs_is_mounted_nowhere_but_where_it_is_asked_for() {
    on_a_host(|host| {
        fs::create_dir(host.join("rootfs/else")).unwrap();
        symlink("/else", host.join("rootfs/proc")).unwrap();
        let root = planned(
            host,
            json!([{"destination": "/proc", "type": "proc", "source": "proc"}]),
            json!({}),
        )
        .unwrap();
        failed(&root, Space::Mounts, |error| {
            let text = error.to_string();
            assert!(text.contains("cannot mount \"proc\" at /proc"), "{text}");
        });
    });
}

#[test]
fn devices_have_their_mode_and_owner_whatever_the_umask_is() {
    on_a_host(|host| {
        let mut mounts = usual();
        mounts.truncate(2);
        let devices = json!([
            {"path": "/dev/mine", "type": "c", "major": 1, "minor": 5, "fileMode": 0o662, "uid": 7, "gid": 8},
            {"path": "/dev/sub/block", "type": "b", "major": 7, "minor": 99, "fileMode": 0o60600 },
            {"path": "/dev/pipe", "type": "p"},
            {"path": "/elsewhere/u", "type": "u", "major": 1, "minor": 3, "uid": 3},
        ]);
        let root = planned(host, json!(mounts), json!({"devices": devices})).unwrap();
        let trees = root.open().unwrap();
        init(Space::Mounts, || {
            umask(Mode::from_bits_truncate(0o077));
            let mounted = root.mount(trees).unwrap();
            root.enter(mounted).unwrap();
            let now = umask(Mode::empty());
            assert_eq!(now.bits(), 0o077);
            for (path, mode, uid, gid, rdev) in [
                ("/dev/mine", libc::S_IFCHR | 0o662, 7, 8, libc::makedev(1, 5)),
                ("/dev/sub/block", libc::S_IFBLK | 0o600, 0, 0, libc::makedev(7, 99)),
                ("/dev/pipe", libc::S_IFIFO | 0o666, 0, 0, 0),
                ("/elsewhere/u", libc::S_IFCHR | 0o666, 3, 0, libc::makedev(1, 3)),
                ("/dev/full", libc::S_IFCHR | 0o666, 0, 0, libc::makedev(1, 7)),
                ("/dev/sub", libc::S_IFDIR | 0o755, 0, 0, 0),
            ] {
                let file = fs::metadata(path).unwrap();
                assert_eq!(
                    (file.mode(), file.uid(), file.gid(), file.rdev()),
                    (mode, uid, gid, rdev),
                    "{path}"
                );
            }
        });
    });
}

#[test]
fn a_device_that_something_else_is_in_the_place_of_is_refused_and_a_right_one_is_not() {
    on_a_host(|host| {
        write(host.join("rootfs/dev/odd"), "");
        mknod(
            &host.join("rootfs/dev/even"),
            SFlag::S_IFCHR,
            Mode::from_bits_truncate(0o600),
            libc::makedev(1, 3),
        )
        .unwrap();
        let device = |path: &str| json!([{"path": path, "type": "c", "major": 1, "minor": 3, "gid": 5}]);
        let root = planned(host, json!([]), json!({"devices": device("/dev/odd")})).unwrap();
        failed(&root, Space::Mounts, |error| {
            assert_eq!(error.kind(), Kind::FailedPrecondition);
            assert!(error.to_string().starts_with("linux.devices[0]: /dev/odd: "), "{error}");
        });
        let root = planned(host, json!([]), json!({"devices": device("/dev/even")})).unwrap();
        entered(&root, Space::Mounts, |_| {
            let file = fs::metadata("/dev/even").unwrap();
            assert_eq!((file.mode() & 0o777, file.gid()), (0o666, 5));
        });
    });
}

/// Takes the capability to make nodes, for good.
fn drop_mknod() {
    const CAP_MKNOD: u32 = 27;
    const VERSION_3: u32 = 0x2008_0522;
    let header = [VERSION_3, 0];
    // effective, permitted and inheritable of the lower capabilities, then of the higher.
    let mut sets = [0_u32; 6];
    // SAFETY: header and sets are as capget(2) has them for this version.
    unsafe {
        assert_eq!(libc::syscall(libc::SYS_capget, header.as_ptr(), sets.as_mut_ptr()), 0);
        for set in &mut sets[..3] {
            *set &= !(1 << CAP_MKNOD);
        }
        assert_eq!(libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()), 0);
    }
}

#[test]
fn where_no_node_can_be_made_the_hosts_is_put_there_if_it_is_the_same_device() {
    on_a_host(|host| {
        let device =
            |path: &str, kind: &str, minor: u32| json!({"path": path, "type": kind, "major": 1, "minor": minor});
        let devices = json!([device("/dev/zero", "c", 5), {"path": "/dev/pipe", "type": "p"}]);
        let root = planned(host, json!(usual()[..2]), json!({"devices": devices})).unwrap();
        let trees = root.open().unwrap();
        init(Space::Mounts, || {
            drop_mknod();
            let mounted = root.mount(trees).unwrap();
            let proc = root.enter(mounted).unwrap();
            for (path, minor) in [("/dev/zero", 5), ("/dev/null", 3)] {
                let file = fs::metadata(path).unwrap();
                assert!(file.file_type().is_char_device(), "{path}");
                assert_eq!(file.rdev(), libc::makedev(1, minor), "{path}");
                // It panics where nothing is mounted.
                row(&proc, path);
            }
            fs::write("/dev/null", "x").unwrap();
            assert!(fs::metadata("/dev/pipe").unwrap().file_type().is_fifo());
        });
        for (wrong, text) in [
            (device("/dev/null", "c", 5), "the host's is another device"),
            (device("/dev/null", "b", 3), "the host's is another device"),
            (device("/dev/nowhere", "c", 3), "nor /dev/nowhere of the host be opened"),
        ] {
            let root = planned(host, json!(usual()[..2]), json!({"devices": [wrong]})).unwrap();
            let trees = root.open().unwrap();
            init(Space::Mounts, || {
                drop_mknod();
                let error = root.mount(trees).unwrap_err().to_string();
                assert!(
                    error.starts_with("linux.devices[0]: /dev/n") && error.contains(text),
                    "{error}"
                );
            });
        }
    });
}

#[test]
fn nothing_is_made_in_the_hosts_dev() {
    on_a_host(|host| {
        fs::create_dir(host.join("dev")).unwrap();
        let mounts = json!([{"destination": "/dev", "type": "bind", "source": host.join("dev"), "options": ["rbind"]}]);
        let linux = json!({"devices": [{"path": "/dev/mine", "type": "c", "major": 1, "minor": 5}]});
        let root = planned(host, mounts, linux).unwrap();
        entered(&root, Space::Mounts, |_| {
            assert_eq!(fs::read_dir("/dev").unwrap().count(), 0)
        });
    });
}

#[test]
fn masked_paths_are_empty_and_read_only_paths_cannot_be_written() {
    on_a_host(|host| {
        write(host.join("rootfs/secret/key"), "key");
        write(host.join("rootfs/secret.txt"), "key");
        write(host.join("rootfs/keep/file"), "");
        fs::create_dir(host.join("rootfs/keep/open")).unwrap();
        symlink("/secret", host.join("rootfs/alias")).unwrap();
        let mounts = json!([{"destination": "/keep/open", "type": "tmpfs", "source": "tmpfs"}]);
        let linux = json!({
            "maskedPaths": ["/alias", "/secret.txt", "/absent", "/secret.txt/below"],
            "readonlyPaths": ["/keep", "/keep/absent", "/absent"],
        });
        let root = planned(host, mounts, linux).unwrap();
        entered(&root, Space::Mounts, |proc| {
            assert_eq!(fs::read_dir("/secret").unwrap().count(), 0);
            assert!(has(&row(proc, "/secret").0, "ro"));
            assert_eq!(fs::read_to_string("/secret.txt").unwrap(), "");
            assert!(fs::metadata("/secret.txt").unwrap().file_type().is_char_device());
            let error = fs::write("/keep/file", "x").unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EROFS));
            fs::write("/keep/open/x", "").unwrap();
            assert!(!Path::new("/absent").exists());
        });
        assert_eq!(fs::read_to_string(host.join("rootfs/secret.txt")).unwrap(), "key");
    });
}

#[test]
fn a_file_is_bound_on_a_file_that_is_made_for_it() {
    on_a_host(|host| {
        write(host.join("hosts"), "127.0.0.1");
        symlink("hosts", host.join("link")).unwrap();
        let mounts = json!([
            {"destination": "/etc/deep/hosts", "type": "bind", "source": host.join("hosts"), "options": ["bind", "ro"]},
            {"destination": "/etc/relative", "source": "hosts", "options": ["bind"]},
            {"destination": "/etc/link", "type": "bind", "source": host.join("link"), "options": ["bind", "copy-symlink"]},
        ]);
        let root = planned(host, mounts, json!({})).unwrap();
        entered(&root, Space::Mounts, |_| {
            assert_eq!(fs::read_to_string("/etc/deep/hosts").unwrap(), "127.0.0.1");
            assert_eq!(
                fs::write("/etc/deep/hosts", "").unwrap_err().raw_os_error(),
                Some(libc::EROFS)
            );
            assert_eq!(fs::read_to_string("/etc/relative").unwrap(), "127.0.0.1");
            assert_eq!(fs::read_link("/etc/link").unwrap(), Path::new("hosts"));
        });
    });
}

#[test]
fn the_root_is_writable_until_it_is_entered_and_read_only_afterwards() {
    on_a_host(|host| {
        let spec = json!({
            "ociVersion": "1.2.0",
            "root": {"path": host.join("rootfs"), "readonly": true},
            "mounts": [{"destination": "/rw", "type": "tmpfs", "source": "tmpfs"}],
            "linux": {"namespaces": [{"type": "mount"}]},
        });
        let root = super::of(&spec, host).unwrap();
        let path = host.join("rootfs");
        mounted(&root, Space::Mounts, |mounted| {
            // As a hook of createContainer sees it.
            fs::write(path.join("hook"), "").unwrap();
            root.enter(mounted).unwrap();
            assert_eq!(fs::write("/x", "").unwrap_err().raw_os_error(), Some(libc::EROFS));
            assert!(Path::new("/hook").exists());
            fs::write("/rw/x", "").unwrap();
        });
        fs::write(host.join("rootfs/x"), "").unwrap();
    });
}

#[test]
fn without_pivot_root_the_root_is_moved_over_the_hosts() {
    on_a_host(|host| {
        write(host.join("rootfs/here"), "");
        let spec = json!({
            "ociVersion": "1.2.0",
            "root": {"path": "rootfs"},
            "mounts": usual(),
            "linux": {"namespaces": [{"type": "mount"}]},
        });
        let root = Root::of(&serde_json::from_value(spec).unwrap(), host, true).unwrap();
        let path = host.to_path_buf();
        entered(&root, Space::Mounts, move |_| {
            assert!(Path::new("/here").exists() && !path.exists());
            assert!(Path::new("/../../here").exists());
            assert_eq!(std::env::current_dir().unwrap(), Path::new("/"));
        });
    });
}

#[test]
fn a_sysctl_reaches_its_namespace_and_an_unknown_one_is_named() {
    on_a_host(|host| {
        of_users(host);
        let linux = |key: &str| {
            json!({
                "namespaces": users(&["network", "ipc", "uts", "pid", "cgroup"]),
                "sysctl": {key: "4242", "kernel.msgmax": "9000"},
            })
        };
        let root = planned(host, json!(usual()), linux("net/ipv4/no.such")).unwrap();
        failed(&root, Space::Users, |error| {
            assert!(
                error.to_string().starts_with("linux.sysctl: net/ipv4/no.such: "),
                "{error}"
            );
        });
        let root = planned(host, json!(usual()), linux("net.core.somaxconn")).unwrap();
        entered(&root, Space::Users, |proc| {
            assert_eq!(proc.read("sys/net/core/somaxconn").unwrap(), "4242\n");
            assert_eq!(proc.read("sys/kernel/msgmax").unwrap(), "9000\n");
        });
    });
}

#[test]
fn a_sysctl_of_a_joined_namespace_is_refused_when_that_is_the_hosts() {
    on_a_host(|host| {
        let linux = json!({
            "namespaces": [{"type": "mount"}, {"type": "network", "path": "/proc/self/ns/net"}],
            "sysctl": {"net.core.somaxconn": "1"},
        });
        let root = planned(host, json!([]), linux).unwrap();
        let error = root.open().unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument);
        assert!(error.to_string().contains("is the host's"), "{error}");
    });
}

/// A rootfs of the container's users, in a folder that these cannot look into.
fn of_users(host: &Path) {
    write(host.join("secret/file"), "text");
    std::os::unix::fs::chown(host.join("rootfs"), Some(100_000), Some(100_000)).unwrap();
    fs::set_permissions(host.join("secret"), PermissionsExt::from_mode(0o700)).unwrap();
    fs::set_permissions(host, PermissionsExt::from_mode(0o700)).unwrap();
}

#[test]
fn a_user_namespace_gets_the_same_root_with_the_hosts_nodes() {
    on_a_host(|host| {
        of_users(host);
        let mut mounts = usual();
        mounts.push(
            json!({"destination": "/bound", "type": "bind", "source": host.join("secret/file"), "options": ["bind"]}),
        );
        let linux = json!({
            "namespaces": users(&["network", "ipc", "uts", "pid", "cgroup"]),
            "uidMappings": [{"containerID": 0, "hostID": 100_000, "size": 65_536}],
            "gidMappings": [{"containerID": 0, "hostID": 100_000, "size": 65_536}],
            "devices": [
                {"path": "/dev/other-name", "type": "c", "major": 1, "minor": 5},
                {"path": "/dev/fifo", "type": "p", "fileMode": 0o600, "uid": 5},
            ],
            "maskedPaths": ["/proc/keys", "/proc/scsi", "/sys/firmware"],
            "readonlyPaths": ["/proc/sys"],
        });
        if !Path::new("/dev/char/1:5").exists() {
            fs::create_dir_all("/dev/char").unwrap();
            symlink("../zero", "/dev/char/1:5").unwrap();
        }
        let root = planned(host, json!(mounts), linux).unwrap();
        let path = host.to_path_buf();
        entered(&root, Space::Users, move |proc| {
            assert!(!path.exists());
            assert_eq!(fs::read_to_string("/bound").unwrap(), "text");
            for (path, number) in [("/dev/null", (1, 3)), ("/dev/other-name", (1, 5)), ("/dev/tty", (5, 0))] {
                let file = fs::metadata(path).unwrap();
                assert!(file.file_type().is_char_device(), "{path}");
                assert_eq!(file.rdev(), libc::makedev(number.0, number.1), "{path}");
            }
            fs::write("/dev/null", "x").unwrap();
            let fifo = fs::metadata("/dev/fifo").unwrap();
            assert_eq!((fifo.mode(), fifo.uid()), (libc::S_IFIFO | 0o600, 5));
            assert_eq!(fs::metadata("/dev").unwrap().uid(), 0);
            assert_eq!(
                fs::read_to_string("/proc/1/cgroup").unwrap(),
                proc.read("self/cgroup").unwrap()
            );
            assert_eq!(fs::read_to_string("/proc/keys").unwrap(), "");
            assert!(has(&row(proc, "/proc/sys").0, "ro") && has(&row(proc, "/sys").0, "ro"));
            let all = table(proc);
            assert!(all.iter().all(|row| !row.0.starts_with(&path)), "{all:#?}");
            assert_eq!(
                all.iter()
                    .filter(|row| row.3 == "proc" && row.0 == Path::new("/proc"))
                    .count(),
                1
            );
        });
    });
}

#[test]
fn the_hosts_sys_stands_in_where_a_new_one_is_refused() {
    on_a_host(|host| {
        of_users(host);
        let mut mounts = usual();
        mounts.truncate(6);
        let root = planned(host, json!(mounts), json!({"namespaces": users(&["pid", "ipc"])})).unwrap();
        entered(&root, Space::UsersOnHostNetwork, |proc| {
            let (options, optional) = row(proc, "/sys");
            assert!(
                ["ro", "nosuid", "nodev"].iter().all(|word| has(&options, word)),
                "{options}"
            );
            assert!(!optional.contains("shared:"), "{optional}");
            assert!(Path::new("/sys/kernel").exists());
        });
    });
}

#[test]
fn owners_are_shifted_by_the_maps_of_the_mount_or_of_the_container() {
    on_a_host(|host| {
        of_users(host);
        let range = |inside: u32, outside: u32| json!([{"containerID": inside, "hostID": outside, "size": 1000}]);
        let source = host.join("secret");
        let mounts = json!([
            {"destination": "/own", "type": "bind", "source": source, "options": ["bind"],
             "uidMappings": range(0, 100_007), "gidMappings": range(0, 100_008)},
            {"destination": "/containers", "type": "bind", "source": source, "options": ["rbind", "ridmap"]},
            {"destination": "/none", "type": "bind", "source": source, "options": ["bind"]},
        ]);
        let linux = json!({
            "namespaces": users(&["network", "pid"]),
            "uidMappings": [{"containerID": 0, "hostID": 100_000, "size": 65_536}],
            "gidMappings": [{"containerID": 0, "hostID": 100_000, "size": 65_536}],
        });
        let root = planned(host, mounts, linux).unwrap();
        entered(&root, Space::Users, |_| {
            let owner = |path: &str| fs::metadata(path).map(|file| (file.uid(), file.gid())).unwrap();
            assert_eq!(owner("/own"), (7, 8));
            assert_eq!(owner("/containers"), (0, 0));
            assert_eq!(owner("/none"), (65_534, 65_534));
            let _ = File::options().mode(0o600).read(true).open("/containers/file").unwrap();
        });
    });
}

#[test]
fn a_mount_is_changed_by_a_remount() {
    on_a_host(|host| {
        fs::create_dir(host.join("a")).unwrap();
        let mounts = json!([
            {"destination": "/t", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid"]},
            {"destination": "/t", "type": "tmpfs", "options": ["remount", "size=4096"]},
            {"destination": "/b", "type": "bind", "source": host.join("a"), "options": ["bind", "nosuid"]},
            {"destination": "/b", "options": ["remount", "bind", "ro", "nodev", "shared"]},
        ]);
        let root = planned(host, mounts, json!({})).unwrap();
        entered(&root, Space::Mounts, |proc| {
            let (options, optional) = row(proc, "/b");
            assert!(
                has(&options, "ro") && has(&options, "nodev") && !has(&options, "nosuid"),
                "{options}"
            );
            assert!(optional.starts_with("shared:"), "{optional}");
            assert!(proc.read("self/mountinfo").unwrap().contains("size=4k"));
        });
    });
}

#[test]
fn long_options_and_old_flags_are_given_to_the_older_call() {
    on_a_host(|host| {
        let layers: Vec<String> = (0..12)
            .map(|n| format!("{}/layer-{n}-{}", host.display(), "x".repeat(40)))
            .collect();
        for layer in &layers {
            fs::create_dir(layer).unwrap();
        }
        write(Path::new(&layers[11]).join("file"), "deep");
        let mounts = json!([
            {"destination": "/o", "type": "overlay", "source": "overlay", "options": ["ro", format!("lowerdir={}", layers.join(":"))]},
            {"destination": "/t", "type": "tmpfs", "source": "tmpfs", "options": ["silent", "ro"]},
        ]);
        let root = planned(host, mounts, json!({})).unwrap();
        entered(&root, Space::Mounts, |proc| {
            assert_eq!(fs::read_to_string("/o/file").unwrap(), "deep");
            assert!(has(&row(proc, "/t").0, "ro"));
        });
    });
}

#[test]
fn an_error_says_what_could_not_be_mounted_and_where() {
    on_a_host(|host| {
        let root = planned(
            host,
            json!([{"destination": "/x", "type": "tmpfs", "source": "t", "options": ["size=many"]}]),
            json!({}),
        );
        failed(&root.unwrap(), Space::Mounts, |error| {
            assert!(
                error
                    .to_string()
                    .starts_with("mounts[0]: cannot mount \"tmpfs\" at /x: "),
                "{error}"
            );
        });
        let root = planned(
            host,
            json!([{"destination": "/x", "source": "/nowhere", "options": ["bind"]}]),
            json!({}),
        );
        let error: Result<_> = root.unwrap().open();
        let error = error.unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("mounts[0]: cannot open /nowhere for /x: "),
            "{error}"
        );
        assert_eq!(error.kind(), Kind::NotFound);
    });
}
