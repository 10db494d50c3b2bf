//! The mapping, without a kernel.

use std::path::Path;

use nix::mount::MsFlags;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::{
    super::{
        Root,
        plan::{Action, Map, Mount, Node},
        words::{Attributes, Kind, Propagation, Words},
    },
    of, planned,
};
use crate::{
    backend::lxc::system::Init,
    error::Kind as ErrorKind,
    rootfs::{
        options::{IdMap, IdRange, MS_NOSYMFOLLOW},
        sys::attr,
    },
};

const BUNDLE: &str = "/run/bundle";

fn plan(mounts: Value, linux: Value) -> Root {
    planned(Path::new(BUNDLE), mounts, linux).unwrap()
}

fn refused(mounts: Value, linux: Value) -> String {
    let error = planned(Path::new(BUNDLE), mounts, linux).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
    error.to_string()
}

fn one(mount: Value) -> Mount {
    plan(json!([mount]), json!({})).mounts.remove(0)
}

fn bind(options: &[&str]) -> Mount {
    one(json!({"destination": "/x", "type": "bind", "source": "/s", "options": options}))
}

fn flags_of(kind: &str, options: &[&str]) -> (MsFlags, bool, Vec<String>) {
    let mount = one(json!({"destination": "/x", "type": kind, "options": options}));
    match mount.action {
        Action::FileSystem { flags, data, .. } => (MsFlags::from_bits_retain(flags), mount.read_only, data),
        other => panic!("{other:?}"),
    }
}

#[test]
fn plain_words_are_flags_of_a_file_system() {
    for (word, opposite, flag) in [
        ("nosuid", "suid", MsFlags::MS_NOSUID),
        ("nodev", "dev", MsFlags::MS_NODEV),
        ("noexec", "exec", MsFlags::MS_NOEXEC),
        ("sync", "async", MsFlags::MS_SYNCHRONOUS),
        ("mand", "nomand", MsFlags::MS_MANDLOCK),
        ("noatime", "atime", MsFlags::MS_NOATIME),
        ("nodiratime", "diratime", MsFlags::MS_NODIRATIME),
        ("relatime", "norelatime", MsFlags::MS_RELATIME),
        ("strictatime", "nostrictatime", MsFlags::MS_STRICTATIME),
        ("lazytime", "nolazytime", MsFlags::MS_LAZYTIME),
        ("nosymfollow", "symfollow", MS_NOSYMFOLLOW),
        ("silent", "loud", MsFlags::MS_SILENT),
        ("iversion", "noiversion", MsFlags::MS_I_VERSION),
    ] {
        assert_eq!(flags_of("tmpfs", &[word]), (flag, false, vec![]), "{word}");
        assert_eq!(flags_of("tmpfs", &[word, opposite]).0, MsFlags::empty(), "{opposite}");
        assert_eq!(flags_of("tmpfs", &[opposite, word]).0, flag, "{word}");
    }
    assert_eq!(flags_of("tmpfs", &["dirsync"]).0, MsFlags::MS_DIRSYNC);
    assert_eq!(flags_of("tmpfs", &["defaults"]), (MsFlags::empty(), false, vec![]));
    let data = vec!["size=1k".to_owned(), "mode=755".to_owned()];
    assert_eq!(
        flags_of("tmpfs", &["size=1k", "nodev", "mode=755"]),
        (MsFlags::MS_NODEV, false, data)
    );
}

#[test]
fn a_virtual_file_system_is_made_read_only_late_and_one_on_a_device_at_once() {
    for kind in ["tmpfs", "proc", "sysfs", "devpts", "mqueue", "cgroup2"] {
        assert_eq!(flags_of(kind, &["ro"]), (MsFlags::empty(), true, vec![]), "{kind}");
    }
    for kind in ["ext4", "squashfs", "overlay"] {
        assert_eq!(flags_of(kind, &["ro"]), (MsFlags::MS_RDONLY, true, vec![]), "{kind}");
    }
    assert_eq!(flags_of("tmpfs", &["ro", "rw"]), (MsFlags::empty(), false, vec![]));
}

#[test]
fn a_bind_sets_attributes_and_takes_back_only_what_is_named() {
    let atime = attr::ATIME;
    for (options, set, clear) in [
        (&["bind"][..], 0, 0),
        (&["bind", "rw"], 0, 0),
        (&["bind", "ro"], 0, 0),
        (&["bind", "nosuid", "nodev"], attr::NOSUID | attr::NODEV, 0),
        (&["bind", "suid"], 0, attr::NOSUID),
        (&["bind", "dev"], 0, attr::NODEV),
        (&["bind", "noexec", "exec"], 0, attr::NOEXEC),
        (
            &["bind", "diratime", "symfollow"],
            0,
            attr::NODIRATIME | attr::NOSYMFOLLOW,
        ),
        (&["bind", "noatime"], attr::NOATIME, atime),
        (&["bind", "strictatime"], attr::STRICTATIME, atime),
        (&["bind", "relatime"], 0, atime),
        (&["bind", "atime"], 0, atime),
    ] {
        let Action::Bind {
            attributes, recursive, ..
        } = bind(options).action
        else {
            panic!("{options:?}");
        };
        assert_eq!(
            (attributes, recursive),
            (Attributes { set, clear }, false),
            "{options:?}"
        );
    }
    assert!(bind(&["bind", "ro"]).read_only);
    assert!(matches!(bind(&["rbind"]).action, Action::Bind { recursive: true, .. }));
    // The kind is word enough.
    assert!(matches!(bind(&[]).action, Action::Bind { recursive: false, .. }));
    let linux = json!({
        "namespaces": [{"type": "mount"}, {"type": "user"}],
    });
    let mounts =
        json!([{"destination": "/x", "type": "none", "source": "s", "options": ["bind", "suid", "dev", "nodev"]}]);
    match plan(mounts, linux).mounts.remove(0).action {
        Action::Bind { attributes, source, .. } => {
            assert_eq!(
                attributes,
                Attributes {
                    set: attr::NODEV,
                    clear: 0
                }
            );
            assert_eq!(source, Path::new("/run/bundle/s"));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn recursive_words_are_attributes_of_all_mounts_below() {
    for (words, set, clear) in [
        (&["rro"][..], attr::RDONLY, 0),
        (&["rro", "rrw"], 0, attr::RDONLY),
        (&["rrw", "rro"], attr::RDONLY, 0),
        (&["rnosuid"], attr::NOSUID, 0),
        (&["rsuid"], 0, attr::NOSUID),
        (&["rnodev"], attr::NODEV, 0),
        (&["rdev"], 0, attr::NODEV),
        (&["rnoexec"], attr::NOEXEC, 0),
        (&["rexec"], 0, attr::NOEXEC),
        (&["rnodiratime"], attr::NODIRATIME, 0),
        (&["rdiratime"], 0, attr::NODIRATIME),
        (&["rnosymfollow"], attr::NOSYMFOLLOW, 0),
        (&["rsymfollow"], 0, attr::NOSYMFOLLOW),
        (&["rnoatime"], attr::NOATIME, attr::ATIME),
        (&["rstrictatime"], attr::STRICTATIME, attr::ATIME),
        (&["rnoatime", "rstrictatime"], attr::STRICTATIME, attr::ATIME),
        (&["rrelatime"], 0, attr::ATIME),
        (&["rnorelatime"], 0, attr::ATIME),
        (&["ratime"], 0, attr::ATIME),
        (&["rnostrictatime"], 0, attr::ATIME),
    ] {
        let mut options = vec!["rbind"];
        options.extend(words);
        assert_eq!(bind(&options).recursive, Attributes { set, clear }, "{words:?}");
    }
    for word in ["rsync", "rasync", "rdirsync", "rmand", "rnomand"] {
        let mount = json!([{"destination": "/x", "type": "bind", "source": "/s", "options": ["rbind", word]}]);
        let error = refused(mount, json!({}));
        assert!(
            error.starts_with("mounts[0].options: ") && error.contains(word),
            "{error}"
        );
    }
}

#[test]
fn a_mount_has_its_own_kind_of_propagation_or_a_bind_the_roots() {
    let kinds = [
        ("shared", Kind::Shared),
        ("slave", Kind::Slave),
        ("private", Kind::Private),
        ("unbindable", Kind::Unbindable),
    ];
    for (word, kind) in kinds {
        for recursive in [false, true] {
            let word = if recursive { format!("r{word}") } else { word.to_owned() };
            let wanted = Propagation { kind, recursive };
            assert_eq!(bind(&["rbind", &word]).propagation, Some(wanted), "{word}");
            let mounts = json!([
                {"destination": "/a", "type": "bind", "source": "/s", "options": ["bind"]},
                {"destination": "/b", "type": "bind", "source": "/s", "options": ["bind", "slave"]},
                {"destination": "/c", "type": "tmpfs"},
            ]);
            let root = plan(mounts, json!({"rootfsPropagation": word}));
            assert_eq!((root.propagation, root.mounts[0].propagation), (wanted, Some(wanted)));
            let own = Propagation {
                kind: Kind::Slave,
                recursive: false,
            };
            assert_eq!(root.mounts[1].propagation, Some(own));
            let of_tmpfs = (recursive && kind != Kind::Private).then_some(wanted);
            assert_eq!(root.mounts[2].propagation, of_tmpfs, "{word}");
        }
    }
    for none in [json!({}), json!({"rootfsPropagation": ""})] {
        assert_eq!(plan(json!([]), none).propagation, Propagation::default());
    }
    for word in ["ro", "shareds", "rshared,rslave"] {
        let error = refused(json!([]), json!({"rootfsPropagation": word}));
        assert!(error.starts_with("linux.rootfsPropagation: "), "{error}");
    }
}

#[test]
fn a_mount_without_options_gets_those_that_crun_gives_it() {
    for (kind, destination, flags, data) in [
        ("proc", "/proc", MsFlags::empty(), &[][..]),
        (
            "sysfs",
            "/sys",
            MsFlags::MS_NOEXEC | MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
            &[],
        ),
        (
            "tmpfs",
            "/dev",
            MsFlags::MS_NOEXEC | MsFlags::MS_STRICTATIME,
            &["mode=755"],
        ),
        (
            "devpts",
            "/dev/pts",
            MsFlags::MS_NOEXEC | MsFlags::MS_NOSUID,
            &["newinstance", "ptmxmode=0666", "mode=620", "gid=5"],
        ),
        ("tmpfs", "/else", MsFlags::empty(), &[]),
    ] {
        let wanted = Action::FileSystem {
            kind: kind.into(),
            source: kind.into(),
            flags: flags.bits(),
            data: data.iter().map(|&word| word.into()).collect(),
            copy_up: false,
        };
        let mount = one(json!({"destination": destination, "type": kind}));
        assert_eq!(mount.action, wanted, "{destination}");
        // None are none.
        let mount = one(json!({"destination": destination, "type": kind, "options": []}));
        assert!(matches!(mount.action, Action::FileSystem { flags: 0, data, .. } if data.is_empty()));
    }
}

#[test]
fn owners_are_mapped_by_ranges_or_by_the_user_namespace() {
    let ranges = |outside: u32| json!([{"containerID": 0, "hostID": outside, "size": 10}]);
    let mount = |options: Value, maps: bool| {
        let mut mount = json!({"destination": "/x", "type": "bind", "source": "/s", "options": options});
        if maps {
            mount["uidMappings"] = ranges(5);
            mount["gidMappings"] = ranges(6);
        }
        json!([mount])
    };
    let owners = |mounts: Value, linux: Value| match plan(mounts, linux).mounts.remove(0).action {
        Action::Bind { owners, .. } => owners.map(|owners| (owners.map, owners.recursive)),
        other => panic!("{other:?}"),
    };
    let map = |uid, gid| {
        let range = |host| {
            vec![IdRange {
                container: 0,
                host,
                size: 10,
            }]
        };
        Map::Ranges(IdMap {
            uids: range(uid),
            gids: range(gid),
        })
    };
    let own = map(5, 6);
    assert_eq!(owners(mount(json!(["bind"]), false), json!({})), None);
    assert_eq!(
        owners(mount(json!(["bind"]), true), json!({})),
        Some((own.clone(), false))
    );
    assert_eq!(
        owners(mount(json!(["bind", "idmap"]), true), json!({})),
        Some((own.clone(), false))
    );
    assert_eq!(
        owners(mount(json!(["rbind", "ridmap"]), true), json!({})),
        Some((own, true))
    );
    let new = json!({"namespaces": [{"type": "user"}], "uidMappings": ranges(7), "gidMappings": ranges(8)});
    let of_container = map(7, 8);
    assert_eq!(
        owners(mount(json!(["bind", "idmap"]), false), new),
        Some((of_container, false))
    );
    let joined = json!({"namespaces": [{"type": "user", "path": "/n"}]});
    let of_path = Map::Of("/n".into());
    assert_eq!(
        owners(mount(json!(["bind", "idmap"]), false), joined),
        Some((of_path, false))
    );

    let error = refused(mount(json!(["bind", "idmap"]), false), json!({}));
    assert!(
        error.contains("mounts[0].options") && error.contains("needs a user namespace"),
        "{error}"
    );
    for (maps, wanted) in [
        (json!({"uidMappings": ranges(5)}), "need each other"),
        (
            json!({"uidMappings": ranges(u32::MAX), "gidMappings": ranges(1)}),
            "leaves 32 bits",
        ),
    ] {
        let mut mounts = mount(json!(["bind"]), false);
        for (key, value) in maps.as_object().unwrap() {
            mounts[0][key] = value.clone();
        }
        let error = refused(mounts, json!({}));
        assert!(
            error.contains("mounts[0].uidMappings") && error.contains(wanted),
            "{error}"
        );
    }
}

#[test]
fn a_mount_that_cannot_be_honoured_is_refused_with_its_field() {
    for (mount, wanted) in [
        (json!({"destination": "/x"}), "mounts[1].type: missing"),
        (json!({"destination": "/x", "type": "t\0"}), "mounts[1].type: "),
        (json!({"destination": "", "type": "tmpfs"}), "mounts[1].destination: "),
        (json!({"destination": "/", "type": "tmpfs"}), "mounts[1].destination: "),
        (
            json!({"destination": "/..", "type": "tmpfs"}),
            "mounts[1].destination: ",
        ),
        (
            json!({"destination": "/x\0", "type": "tmpfs"}),
            "mounts[1].destination: ",
        ),
        (json!({"destination": "/x", "type": "bind"}), "mounts[1].source: "),
        (
            json!({"destination": "/x", "type": "bind", "source": "a\0"}),
            "mounts[1].source: ",
        ),
        (
            json!({"destination": "/x", "type": "tmpfs", "options": ["a\0"]}),
            "mounts[1].options: ",
        ),
        (
            json!({"destination": "/x", "type": "ext4", "options": ["loop"]}),
            "loop device",
        ),
        (
            json!({"destination": "/x", "type": "bind", "source": "/s", "options": ["size=1"]}),
            "\"size=1\" is no option",
        ),
        (
            json!({"destination": "/x", "type": "bind", "source": "/s", "options": ["tmpcopyup"]}),
            "tmpcopyup",
        ),
        (
            json!({"destination": "/x", "type": "proc", "options": ["tmpcopyup"]}),
            "tmpcopyup",
        ),
        (
            json!({"destination": "/x", "type": "tmpfs", "options": ["copy-symlink"]}),
            "copy-symlink",
        ),
        (
            json!({"destination": "/x", "type": "tmpfs", "options": ["idmap"]}),
            "mounts[1].uidMappings",
        ),
        (
            json!({"destination": "/x", "type": "bind", "source": "/s", "options": ["idmap=uids=0-1-2"]}),
            "uidMappings",
        ),
        (
            json!({"destination": "/x", "type": "tmpfs", "options": ["uidmap=0:1:2", "gidmap=0:1:2"]}),
            "mounts[1].options: ",
        ),
        (
            json!({"destination": "/x", "type": "cgroup", "options": ["name=x"]}),
            "mounts[1].options: ",
        ),
    ] {
        let error = refused(json!([{"destination": "/ok", "type": "tmpfs"}, mount]), json!({}));
        assert!(
            error.contains("mounts[1].") && error.contains(wanted),
            "{mount}: {error}"
        );
    }
}

#[test]
fn a_remount_changes_what_is_there() {
    let mount = one(json!({"destination": "/x", "options": ["remount", "bind", "ro", "rnosuid"]}));
    let flags = MsFlags::MS_RDONLY.bits();
    let wanted = Action::Remount {
        bind: true,
        flags,
        data: vec![],
    };
    assert_eq!((mount.action, mount.read_only), (wanted, false));
    assert_eq!(mount.recursive.set, attr::NOSUID);
}

#[test]
fn devices_are_those_of_the_bundle_and_then_those_of_every_container() {
    let devices = json!([
        {"path": "/dev/a", "type": "c", "major": 10, "minor": 200, "fileMode": 0o20640, "uid": 1, "gid": 2},
        {"path": "/dev/b", "type": "b", "major": 4095, "minor": 1_048_575},
        {"path": "/dev/tty", "type": "u", "major": 5, "minor": 0, "fileMode": 0},
        {"path": "/x/p", "type": "p", "major": -1},
    ]);
    let devices = plan(json!([]), json!({"devices": devices})).devices;
    let rows: Vec<_> = devices
        .iter()
        .map(|d| (d.path.to_str().unwrap(), d.kind, d.major, d.minor, d.mode, d.uid, d.gid))
        .collect();
    let (c, b, p) = (Node::Character, Node::Block, Node::Fifo);
    assert_eq!(
        rows,
        [
            ("/dev/a", c, 10, 200, 0o640, 1, 2),
            ("/dev/b", b, 4095, 1_048_575, 0o666, 0, 0),
            ("/dev/tty", c, 5, 0, 0, 0, 0),
            ("/x/p", p, 0, 0, 0o666, 0, 0),
            ("/dev/null", c, 1, 3, 0o666, 0, 0),
            ("/dev/zero", c, 1, 5, 0o666, 0, 0),
            ("/dev/full", c, 1, 7, 0o666, 0, 0),
            ("/dev/random", c, 1, 8, 0o666, 0, 0),
            ("/dev/urandom", c, 1, 9, 0o666, 0, 0),
        ]
    );
    let dev = json!([{"destination": "/dev/", "type": "bind", "source": "/dev", "options": ["rbind"]}]);
    let root = plan(dev, json!({"devices": [{"path": "/dev/a", "type": "c"}]}));
    assert!(root.dev_of_host && root.devices.is_empty());
    for (device, wanted) in [
        (json!({"path": "/dev/a", "type": "a"}), "linux.devices[0]: type: "),
        (json!({"path": "dev/a", "type": "c"}), "linux.devices[0]: path: "),
        (json!({"path": "/", "type": "c"}), "linux.devices[0]: path: "),
        (
            json!({"path": "/dev/a", "type": "c", "major": -1}),
            "linux.devices[0]: major: ",
        ),
        (
            json!({"path": "/dev/a", "type": "c", "minor": 1_048_576}),
            "linux.devices[0]: minor: ",
        ),
        (
            json!({"path": "/dev/a", "type": "c", "fileMode": 0o60600}),
            "linux.devices[0]: fileMode: ",
        ),
    ] {
        let error = refused(json!([]), json!({"devices": [device]}));
        assert!(error.starts_with(wanted), "{error}");
    }
}

#[test]
fn a_sysctl_needs_a_namespace_that_it_belongs_to() {
    let namespaces = json!([
        {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "user"}, {"type": "network", "path": "/n"},
    ]);
    for (key, path, joined) in [
        ("net.ipv4.ip_forward", "net/ipv4/ip_forward", true),
        (
            "net/ipv4/conf/eth0.100/forwarding",
            "net/ipv4/conf/eth0.100/forwarding",
            true,
        ),
        (
            "net.ipv4.conf.eth0/100.forwarding",
            "net/ipv4/conf/eth0.100/forwarding",
            true,
        ),
        ("kernel.shm_rmid_forced", "kernel/shm_rmid_forced", false),
        ("kernel/sem", "kernel/sem", false),
        ("fs.mqueue.msg_max", "fs/mqueue/msg_max", false),
        ("kernel.domainname", "kernel/domainname", false),
        ("user.max_user_namespaces", "user/max_user_namespaces", false),
    ] {
        let sysctls = plan(json!([]), json!({"namespaces": namespaces, "sysctl": {key: "1"}})).sysctls;
        let wanted = joined.then(|| ("net".to_owned(), "/n".into()));
        assert_eq!((sysctls[0].path.as_str(), &sysctls[0].not_of_host), (path, &wanted));
        let error = refused(
            json!([]),
            json!({"namespaces": [{"type": "mount"}], "sysctl": {key: "1"}}),
        );
        assert!(error.starts_with(&format!("linux.sysctl: {key}: needs a ")), "{error}");
    }
    for key in [
        "kernel.hostname",
        "kernel.pid_max",
        "vm.swappiness",
        "net",
        "",
        "net..x",
        "net/../kernel/pid_max",
        "net.x\0",
        "/net/x",
    ] {
        let error = refused(json!([]), json!({"namespaces": namespaces, "sysctl": {key: "1"}}));
        assert!(error.starts_with(&format!("linux.sysctl: {key}: ")), "{error}");
    }
}

#[test]
fn the_root_and_its_masks_come_from_their_fields() {
    let spec = |root: Value| json!({"ociVersion": "1.2.0", "root": root, "linux": {}});
    let bundle = Path::new(BUNDLE);
    let relative = of(&spec(json!({"path": "rootfs", "readonly": true})), bundle).unwrap();
    assert_eq!(
        (relative.path.as_path(), relative.read_only),
        (Path::new("/run/bundle/rootfs"), true)
    );
    let absolute = of(&spec(json!({"path": "/r"})), bundle).unwrap();
    assert_eq!((absolute.path.as_path(), absolute.read_only), (Path::new("/r"), false));
    for (spec, bundle, wanted) in [
        (spec(json!({"path": ""})), BUNDLE, "root.path"),
        (spec(json!({"path": "a\0"})), BUNDLE, "root.path"),
        (spec(json!({"path": "a"})), "bundle", "bundle"),
        (json!({"ociVersion": "1.2.0", "linux": {}}), BUNDLE, "root: "),
        (json!({"ociVersion": "1.2.0", "root": {"path": "a"}}), BUNDLE, "linux: "),
    ] {
        let error = of(&spec, Path::new(bundle)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.to_string().contains(wanted), "{error}");
    }
    for field in ["maskedPaths", "readonlyPaths"] {
        for path in ["", "/", "a\0"] {
            let error = refused(json!([]), json!({field: ["/ok", path]}));
            assert!(error.starts_with(&format!("linux.{field}[1]: ")), "{error}");
        }
    }
}

#[test]
fn the_hosts_sys_is_fetched_only_where_a_new_one_may_be_refused() {
    let sys = json!([{"destination": "/sys", "type": "sysfs"}]);
    for (namespaces, wanted) in [
        (json!([{"type": "mount"}]), false),
        (json!([{"type": "user"}]), true),
        (json!([{"type": "user"}, {"type": "network", "path": "/n"}]), true),
        (json!([{"type": "user"}, {"type": "network"}]), false),
    ] {
        let root = plan(sys.clone(), json!({"namespaces": namespaces}));
        assert_eq!(root.sys_of_host, wanted, "{namespaces}");
        assert!(!plan(json!([]), json!({"namespaces": namespaces})).sys_of_host);
    }
}

#[test]
fn a_plan_is_the_same_after_a_trip_through_a_socket() {
    let mounts = json!([
        {"destination": "/x", "type": "bind", "source": "/s", "options": ["rbind", "rro", "rslave", "ridmap"]},
        {"destination": "/y", "type": "tmpfs", "options": ["tmpcopyup", "size=1"]},
        {"destination": "/z", "type": "cgroup", "options": ["ro"]},
    ]);
    let linux = json!({
        "namespaces": [{"type": "user", "path": "/u"}, {"type": "ipc"}],
        "sysctl": {"kernel.sem": "1 2"},
        "mountLabel": "system_u:object_r:container_file_t:s0",
    });
    let root = plan(mounts, linux);
    let text = serde_json::to_string(&root).unwrap();
    assert_eq!(serde_json::from_str::<Root>(&text).unwrap(), root);
}

proptest! {
    #[test]
    fn no_mount_makes_the_plan_panic(
        destination in "(?s).{0,20}",
        kind in "(bind|tmpfs|proc|cgroup|(?s).{0,5})",
        source in "(?s).{0,10}",
        options in proptest::collection::vec("(bind|rbind|ro|rro|remount|idmap|rshared|tmpcopyup|copy-symlink|uidmap=|(?s).{0,12})", 0..6),
        sizes in proptest::collection::vec(any::<u32>(), 0..3),
    ) {
        let maps: Vec<Value> = sizes.iter().map(|size| json!({"containerID": size, "hostID": 1, "size": size})).collect();
        let mount = json!({
            "destination": destination, "type": kind, "source": source, "options": options,
            "uidMappings": maps, "gidMappings": maps,
        });
        if let Err(error) = planned(Path::new(BUNDLE), json!([mount]), json!({})) {
            prop_assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            let text = error.to_string();
            prop_assert!(text.starts_with("mounts[0]."), "{}", text);
        }
    }

    #[test]
    fn no_field_of_linux_makes_the_plan_panic(
        key in "(?s).{0,20}",
        path in "(?s).{0,20}",
        word in "(?s).{0,10}",
        numbers in any::<(i64, i64, u32)>(),
    ) {
        let linux = json!({
            "namespaces": [{"type": "network"}],
            "sysctl": {key: "1"},
            "rootfsPropagation": word,
            "maskedPaths": [path],
            "devices": [{"path": path, "type": "c", "major": numbers.0, "minor": numbers.1, "fileMode": numbers.2}],
        });
        if let Err(error) = planned(Path::new(BUNDLE), json!([]), linux) {
            prop_assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        }
    }

    #[test]
    fn no_words_make_a_contradiction(words in proptest::collection::vec("r?(no)?(ro|rw|suid|dev|exec|atime|diratime|relatime|strictatime|symfollow)", 0..8)) {
        if let Ok(words) = Words::parse(&words) {
            let Attributes { set, clear } = words.recursive;
            prop_assert_eq!(set & clear & !attr::ATIME, 0);
            prop_assert!(set & attr::ATIME == 0 || clear & attr::ATIME == attr::ATIME);
        }
    }
}

#[test]
fn a_system_finds_what_it_wants_where_the_bundle_mounts_nothing() {
    let furnished = |mounts: Value| {
        let mut root = planned(Path::new("/b"), mounts, json!({})).unwrap();
        root.furnish(Init::Systemd.wants());
        let of = |mount: &Mount| {
            let kind = match &mount.action {
                Action::FileSystem { kind, .. } => kind.clone(),
                Action::Cgroups { delegated, .. } => format!("cgroups {delegated}"),
                _ => "bind".into(),
            };
            format!("{} {} {kind}", mount.number, mount.destination.display())
        };
        root.mounts.iter().map(of).collect::<Vec<_>>()
    };
    for (mounts, wanted) in [
        (
            json!([]),
            &[
                "3 /sys/fs/cgroup cgroups true",
                "2 /tmp tmpfs",
                "0 /run tmpfs",
                "1 /run/lock tmpfs",
            ][..],
        ),
        // The numbers of the bundle's stay; what lies inside comes after what it lies in.
        (
            json!([
                {"destination": "/run/secrets", "type": "bind", "source": "/s"},
                {"destination": "/sys", "type": "sysfs", "options": ["ro"]},
                {"destination": "/sys/fs/cgroup", "type": "cgroup", "options": ["ro"]},
                {"destination": "/tmp/", "type": "bind", "source": "/t"},
            ]),
            &[
                "4 /run tmpfs",
                "5 /run/lock tmpfs",
                "0 /run/secrets bind",
                "1 /sys sysfs",
                "6 /sys/fs/cgroup cgroups true",
                "3 /tmp/ bind",
            ],
        ),
        (
            json!([
                {"destination": "/sys/fs/cgroup", "type": "bind", "source": "/c", "options": ["ro"]},
                {"destination": "/run", "type": "tmpfs"},
                {"destination": "/tmp", "type": "tmpfs"},
            ]),
            &[
                "4 /sys/fs/cgroup cgroups true",
                "1 /run tmpfs",
                "3 /run/lock tmpfs",
                "2 /tmp tmpfs",
            ],
        ),
        // What it could write already is as the bundle wants it.
        (
            json!([
                {"destination": "/sys/fs/cgroup", "type": "bind", "source": "/c"},
                {"destination": "/run/lock", "type": "tmpfs"},
            ]),
            &[
                "3 /tmp tmpfs",
                "2 /run tmpfs",
                "0 /sys/fs/cgroup bind",
                "1 /run/lock tmpfs",
            ],
        ),
    ] {
        assert_eq!(furnished(mounts.clone()), wanted, "{mounts}");
    }
}
