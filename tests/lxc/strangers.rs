//! Containers, folders, mounts and cgroups that are not ours are left alone.

use super::*;

/// Everything below a folder, byte for byte, with its modes and times.
fn tree(folder: &Path) -> BTreeMap<PathBuf, (u32, i64, i64, Vec<u8>)> {
    let mut all = BTreeMap::new();
    let mut paths = vec![folder.to_owned()];
    while let Some(path) = paths.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        let bytes = if meta.is_dir() {
            paths.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            vec![]
        } else if meta.is_file() {
            fs::read(&path).unwrap()
        } else {
            vec![]
        };
        all.insert(path, (meta.mode(), meta.mtime(), meta.mtime_nsec(), bytes));
    }
    all
}

/// An operator's container of that name, and what it is made of.
fn foreign(id: &str, config: &str) -> PathBuf {
    let folder = Path::new(LXC_PATH).join(id);
    fs::create_dir_all(folder.join("rootfs/etc")).unwrap();
    fs::write(folder.join("config"), config).unwrap();
    fs::write(folder.join("rootfs/etc/hostname"), "precious\n").unwrap();
    folder
}

/// Takes it away again, with what LXC's tools leave of it.
fn gone(folder: &Path) {
    fs::remove_dir_all(folder).unwrap();
    let id = folder.file_name().unwrap().to_string_lossy();
    let _ = fs::remove_file(format!("/run/lxc/lock{LXC_PATH}/.{id}"));
}

/// A Create is refused because of that folder, and neither it nor the cleaning up after a dead shim has changed anything there.
async fn is_left_alone(daemon: &Daemon, folder: &Path) {
    let (pod, a) = pod(daemon, &FOREVER).await;
    let before = tree(folder);
    for _ in 0..2 {
        refused(
            pod.create(&a, &Io::none()).await,
            Code::ALREADY_EXISTS,
            folder.to_str().unwrap(),
        );
        refused(pod.state("a", "").await, Code::NOT_FOUND, "container not created");
    }
    assert_eq!(tree(folder), before);
    pod.dies().await;
    let response = delete_dead(daemon, &a).unwrap();
    assert_eq!((response.pid, response.exit_status), (0, 137));
    assert_eq!(tree(folder), before);
    assert_eq!(daemon.told(), [""; 0]);
    fs::remove_dir_all(&a.path).unwrap();
}

#[test]
fn a_folder_of_that_name_that_is_not_ours_is_refused_by_name_and_not_touched() {
    lxc(async |daemon| {
        let folder = foreign("a", "lxc.uts.name = a\nlxc.rootfs.path = dir:/var/lib/lxc/a/rootfs\n");
        is_left_alone(daemon, &folder).await;
        gone(&folder);
        // Whatever it is.
        fs::create_dir(&folder).unwrap();
        is_left_alone(daemon, &folder).await;
        gone(&folder);
        let a = daemon.bundle("a", &FOREVER);
        the_next_works(daemon, &a).await;
    });
}

#[test]
fn a_container_of_that_name_that_is_not_ours_and_runs_is_refused_by_name_and_runs_on() {
    lxc(async |daemon| {
        let token = universe::token();
        let folder = foreign(
            "a",
            &format!(
                "lxc.uts.name = a\nlxc.rootfs.path = overlay:{}:{LXC_PATH}/a/rootfs\nlxc.init.cmd = /bin/sleep 4242\nlxc.net.0.type = empty\n\
                 lxc.apparmor.profile = unchanged\nlxc.autodev = 0\nlxc.console.path = none\nlxc.tty.max = 0\n\
                 lxc.cgroup.dir.container = {token}/foreign\nlxc.cgroup.dir.monitor = {token}/foreign-monitor\n\
                 lxc.cgroup.dir.monitor.pivot = {token}/foreign-pivot\n",
                busybox().display()
            ),
        );
        tool("lxc-start", &["-d", "-n", "a"]).await;
        let pid = tool("lxc-info", &["-n", "a", "-pH"]).await;
        is_left_alone(daemon, &folder).await;
        assert_eq!(tool("lxc-info", &["-n", "a", "-sH"]).await, "RUNNING\n");
        assert_eq!(tool("lxc-info", &["-n", "a", "-pH"]).await, pid);
        tool("lxc-stop", &["-k", "-n", "a"]).await;
        // Its monitor outlives the answer.
        until("its end", || {
            support::leaks::abstract_sockets().is_empty().then_some(())
        })
        .await;
        // LXC never removes the last of its cgroups.
        let of_the_pivot = universe::cgroups_named(&format!("{token}/foreign-pivot"));
        until("the monitor's end", || {
            of_the_pivot
                .iter()
                .all(|cgroup| !cgroup.exists() || fs::remove_dir(cgroup).is_ok())
                .then_some(())
        })
        .await;
        gone(&folder);
        let a = daemon.bundle("a", &FOREVER);
        the_next_works(daemon, &a).await;
    });
}

#[test]
fn the_same_id_in_another_namespace_is_refused_and_its_end_harms_nobody() {
    lxc(async |daemon| {
        let (first, a) = pod(daemon, &FOREVER).await;
        let pid = first.run(&a, &Io::none()).await;
        // In a bundle and a cgroup of its own: all that they share is the name.
        let mut other = daemon.bundle("other", &FOREVER);
        other.id = "a".into();
        let start = Start {
            namespace: "elsewhere",
            ..Start::default()
        };
        let mut second = Pod::start_with(daemon, &other, &start).await;
        second.options = on(BACKEND);
        assert_ne!(second.pid, first.pid);
        refused(
            second.create(&other, &Io::none()).await,
            Code::ALREADY_EXISTS,
            &format!("{LXC_PATH}/a"),
        );
        second.dies().await;
        let response = deleted(&run_shim(daemon, &other, &start, "delete")).unwrap();
        assert_eq!((response.pid, response.exit_status), (0, 137));
        assert_eq!(first.status("a").await, Status::RUNNING);
        assert_eq!(tool("lxc-info", &["-n", "a", "-pH"]).await, format!("{pid}\n"));
        assert_eq!(exits(daemon, 0), [""; 0]);
        first.end("a").await;
        first.shutdown().await;
    });
}

#[test]
fn what_others_have_mounted_in_a_containers_folder_survives_its_delete() {
    lxc(async |daemon| {
        let (pod, a) = pod(daemon, &shell("exit 3")).await;
        let theirs = daemon.folder.join("theirs");
        fs::create_dir(&theirs).unwrap();
        fs::write(theirs.join("file"), "precious").unwrap();
        pod.run(&a, &Io::none()).await;
        let place = Path::new(LXC_PATH).join("a/rootfs");
        fs::create_dir(&place).unwrap();
        let none: Option<&str> = None;
        let bind = nix::mount::MsFlags::MS_BIND;
        nix::mount::mount(Some(&theirs), &place, none, bind, none).unwrap();
        assert_eq!(pod.wait("a", "").await.unwrap(), 3);
        refused(
            pod.delete("a", "").await,
            Code::FAILED_PRECONDITION,
            &place.display().to_string(),
        );
        assert_eq!(fs::read_to_string(theirs.join("file")).unwrap(), "precious");
        nix::mount::umount(&place).unwrap();
        fs::remove_dir_all(&theirs).unwrap();
        is_deleted_clean(daemon, pod, &a, 3).await;
    });
}

/// The cgroups of a container and of its monitor, which both carry the id.
fn cgroups_of(id: &str) -> (Vec<PathBuf>, Vec<PathBuf>) {
    let all = universe::cgroups_named(&universe::token()).into_iter();
    let (mut containers, mut monitors): (Vec<_>, Vec<_>) = all
        .filter(|path| path.to_string_lossy().contains(id))
        .partition(|path| path.to_string_lossy().contains(&format!("{}/{id}", universe::token())));
    containers.sort();
    monitors.sort();
    (containers, monitors)
}

#[test]
fn cgroups_that_a_crash_has_left_are_taken_and_all_are_removed() {
    lxc(async |daemon| {
        // Nobody else's monitor has this name, at the root of the hierarchy that all tests share.
        let id = format!("m{}", universe::token());
        let a = daemon.bundle(&id, &FOREVER);
        let mut pod = Pod::start(daemon, &a).await;
        pod.options = on(BACKEND);
        let mut known = (vec![], vec![]);
        for _ in 0..2 {
            pod.run(&a, &Io::none()).await;
            let (containers, monitors) = cgroups_of(&id);
            assert!(!containers.is_empty());
            assert!(
                known.0.is_empty() || known == (containers.clone(), monitors.clone()),
                "others: {known:?}"
            );
            pod.end(&id).await;
            let left: Vec<_> = containers
                .iter()
                .chain(&monitors)
                .filter(|path| path.exists())
                .collect();
            assert!(left.is_empty(), "{left:?}");
            // As a machine that lost its shims and monitors has them.
            for path in containers.iter().chain(&monitors) {
                fs::create_dir_all(path).unwrap();
            }
            known = (containers, monitors);
        }
        for path in known.0.iter().chain(&known.1).rev() {
            let _ = fs::remove_dir(path);
        }
        pod.shutdown().await;
    });
}

#[test]
fn a_monitors_cgroup_in_which_others_live_is_refused_and_they_live_on() {
    lxc(async |daemon| {
        let (pod, a) = pod(daemon, &shell("echo fine")).await;
        let hierarchy = match cgroup_v2() {
            true => "/sys/fs/cgroup",
            false => "/sys/fs/cgroup/pids",
        };
        for name in ["lxc.monitor.a", "lxc.pivot.a"] {
            // As that of an LXC container of this name below another lxcpath.
            let folder = Path::new(hierarchy).join(universe::token()).join(name);
            fs::create_dir(&folder).unwrap();
            let mut other = Command::new("sleep").arg("1000").spawn().unwrap();
            fs::write(folder.join("cgroup.procs"), other.id().to_string()).unwrap();
            refused(pod.create(&a, &Io::none()).await, Code::FAILED_PRECONDITION, name);
            assert_eq!(other.try_wait().unwrap(), None, "somebody else was killed");
            other.kill().unwrap();
            other.wait().unwrap();
            until("the cgroup's end", || fs::remove_dir(&folder).ok()).await;
        }
        runs(&pod, &a).await;
        pod.shutdown().await;
    });
}

// ---- ends behind our back ----------------------------------------------------------------------------------------------------------

/// A unit's name is the machine's, wherever its cgroup lies.
#[test]
fn a_scope_of_that_name_that_is_not_ours_is_refused_and_goes_on() {
    if !universe::by_systemd() {
        return support::skip::skip(
            "lxc::strangers::a_scope_of_that_name_that_is_not_ours_is_refused_and_goes_on",
            "the tests have no systemd of their own",
        );
    }
    lxc(async |daemon| {
        let scope = format!("--unit=lxcri-{}.scope", "a");
        let arguments = ["--scope", "--quiet", "--slice=system.slice", &scope, "sleep", "100000"];
        let mut stranger = Command::new("systemd-run")
            .args(arguments)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let members = Path::new("/sys/fs/cgroup/system.slice/lxcri-a.scope/cgroup.procs");
        let lives = || {
            fs::read_to_string(members)
                .is_ok_and(|list| list.lines().count() == 1)
                .then_some(())
        };
        until("the scope runs", lives).await;
        for args in [&FOREVER[..], &["/sbin/init"]] {
            let (pod, mut a) = pod(daemon, args).await;
            systems::with_busybox_init(&mut a, &[]);
            for _ in 0..2 {
                refused(pod.create(&a, &Io::none()).await, Code::ALREADY_EXISTS, "lxcri-a.scope");
            }
            pod.dies().await;
            delete_dead(daemon, &a).unwrap();
            assert_eq!(lives(), Some(()), "{args:?}");
            fs::remove_dir_all(&a.path).unwrap();
        }
        stranger.kill().unwrap();
        stranger.wait().unwrap();
        until("the scope has gone", || (!members.exists()).then_some(())).await;
    });
}
