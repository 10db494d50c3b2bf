//! Real mounts, each test in a mount namespace of its own: whatever a test leaves behind goes with its thread.

use std::{
    ffi::OsString,
    fs::{self, File},
    future::Future,
    io::{Read, Write},
    os::{
        fd::AsRawFd,
        unix::{
            ffi::OsStringExt,
            fs::{MetadataExt, PermissionsExt, symlink},
        },
    },
    process::Command as Program,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use nix::{
    mount::{MsFlags, mount as mount2},
    sched::{CloneFlags, unshare},
};

use super::*;
use crate::error::Kind;

const NONE: Option<&str> = None;

/// Runs `test` in a folder and a mount namespace of its own, and checks that it has left no mount in that folder.
fn alone(test: impl FnOnce(&Path) + Send + 'static) {
    let thread = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNS).expect("these tests need root");
        mount2(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().canonicalize().unwrap();
        test(&path);
        assert_eq!(below(&path), [] as [PathBuf; 0], "mounts are left");
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs the test `name` again, in a process where nothing else runs. `true` in that process, `false` in this one when it is over.
fn alone_in_a_process(name: &str, path: Option<&Path>) -> bool {
    const MARK: &str = "ROOTFS_TEST_ALONE";
    if std::env::var_os(MARK).is_some() {
        return true;
    }
    let mut program = Program::new(std::env::current_exe().unwrap());
    program.args([
        "--exact",
        &format!("rootfs::tests::{name}"),
        "--nocapture",
        "--test-threads=1",
    ]);
    if let Some(path) = path {
        program.env("PATH", format!("{}:{}", path.display(), std::env::var("PATH").unwrap()));
    }
    let output = program.env(MARK, "1").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{said}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(said.contains("1 passed"), "{name} did not run: {said}");
    false
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

fn prepare_now(mounts: &[Mount], rootfs: &Path) -> Result<()> {
    run(prepare(&Reaper::new(), mounts, rootfs))
}

fn prepare_with(api: OverlayApi, mounts: &[Mount], rootfs: &Path) -> Result<()> {
    run(prepare_by(&Reaper::new(), mounts, rootfs, api))
}

fn release_now(rootfs: &Path) {
    run(release(rootfs)).unwrap();
}

fn mount_of(kind: &str, source: impl AsRef<Path>, options: &[&str]) -> Mount {
    Mount {
        kind: kind.into(),
        source: source.as_ref().display().to_string(),
        target: String::new(),
        options: options.iter().map(|&option| option.into()).collect(),
    }
}

fn tmpfs() -> Mount {
    mount_of("tmpfs", "tmpfs", &[])
}

fn at(target: &str, mount: Mount) -> Mount {
    Mount {
        target: target.into(),
        ..mount
    }
}

/// Mount points at and below `path`.
fn below(path: &Path) -> Vec<PathBuf> {
    let text = fs::read("/proc/thread-self/mountinfo").unwrap();
    let points = mountinfo::parse(&text).map(|entry| entry.mount_point.into_owned());
    points.filter(|point| point.starts_with(path)).collect()
}

/// Type, options, optional fields and file system options of the topmost mount at `path`.
fn mounted_at(path: &Path) -> Option<(String, String, String, String)> {
    let text = fs::read("/proc/thread-self/mountinfo").unwrap();
    let entry = mountinfo::parse(&text)
        .filter(|entry| &*entry.mount_point == path)
        .last()?;
    let text = |text: &std::ffi::OsStr| text.to_str().unwrap().to_owned();
    let optional = String::from_utf8(entry.optional.to_vec()).unwrap();
    Some((
        text(&entry.fs_type),
        text(&entry.options),
        optional,
        text(&entry.super_options),
    ))
}

fn has(options: &str, word: &str) -> bool {
    options.split(',').any(|option| option == word)
}

/// Waits for what another thread or the kernel is about to do.
fn eventually(what: &str, mut happened: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !happened() {
        assert!(Instant::now() < end, "never happened: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

fn folder(path: PathBuf) -> PathBuf {
    fs::create_dir_all(&path).unwrap();
    path
}

/// Layers that each hold a file with their number, and upper and work folders.
fn layers(base: &Path, names: impl Iterator<Item = String>) -> (Vec<String>, Vec<String>) {
    let mut layers = Vec::new();
    for (number, name) in names.enumerate() {
        let layer = folder(base.join(name));
        fs::write(layer.join(format!("f{number}")), number.to_string()).unwrap();
        layers.push(layer.display().to_string());
    }
    let writable = ["upper", "work"].map(|name| format!("{name}dir={}", folder(base.join(name)).display()));
    (layers, writable.into())
}

fn overlay_of(layers: &[String], others: &[String]) -> Mount {
    let escape = |layer: &String| layer.replace('\\', r"\\").replace(':', r"\:").replace(',', r"\,");
    let list = layers.iter().map(escape).collect::<Vec<_>>().join(":");
    let mut mount = mount_of("overlay", "overlay", &["index=off"]);
    mount.options.extend(others.iter().cloned());
    mount.options.push(format!("lowerdir={list}"));
    mount
}

fn shows_all_layers(rootfs: &Path, count: usize) {
    for number in 0..count {
        assert_eq!(
            fs::read_to_string(rootfs.join(format!("f{number}"))).unwrap(),
            number.to_string()
        );
    }
}

const BOTH: [OverlayApi; 2] = [OverlayApi::Layers, OverlayApi::Page];

#[test]
fn an_overlay_of_two_layers_is_writable_and_goes_away() {
    for api in BOTH {
        alone(move |base| {
            let (lower, upper) = layers(base, ["a", "b"].map(String::from).into_iter());
            let rootfs = base.join("rootfs");
            prepare_with(api, &[overlay_of(&lower, &upper)], &rootfs).unwrap();
            shows_all_layers(&rootfs, 2);
            fs::write(rootfs.join("new"), "x").unwrap();
            assert!(base.join("upper/new").exists());
            let (kind, _, _, options) = mounted_at(&rootfs).unwrap();
            assert_eq!(kind, "overlay");
            assert!(
                options.contains(&format!("upperdir={}/upper", base.display())),
                "{options}"
            );
            release_now(&rootfs);
            assert!(base.join("upper/new").exists(), "release deletes nothing");
        });
    }
}

#[test]
fn an_overlay_of_a_hundred_and_twenty_layers_with_short_names_is_mounted() {
    // The form of containerd's snapshots: in full longer than a page, relative to their folder not.
    for api in BOTH {
        alone(move |base| {
            let base = folder(base.join("a-folder-with-a-long-name-as-var-lib-containerd-has-it/snapshots"));
            let (lower, upper) = layers(&base, (0..120).map(|number| format!("{number}/fs")));
            let rootfs = base.join("rootfs");
            prepare_with(api, &[overlay_of(&lower, &upper)], &rootfs).unwrap();
            shows_all_layers(&rootfs, 120);
            if api == OverlayApi::Page {
                assert!(
                    mounted_at(&rootfs).unwrap().3.contains("lowerdir=0/fs:1/fs:"),
                    "names a person can follow"
                );
            }
            release_now(&rootfs);
        });
    }
}

#[test]
fn an_overlay_of_a_hundred_and_twenty_layers_with_long_names_is_mounted() {
    for api in BOTH {
        alone(move |base| {
            let cwd = std::env::current_dir().unwrap();
            let long = "n".repeat(240);
            let (lower, upper) = layers(base, (0..120).map(|number| format!("{long}{number}/{long}")));
            let rootfs = base.join("rootfs");
            prepare_with(api, &[overlay_of(&lower, &upper)], &rootfs).unwrap();
            shows_all_layers(&rootfs, 120);
            fs::write(rootfs.join("new"), "x").unwrap();
            release_now(&rootfs);
            assert_eq!(std::env::current_dir().unwrap(), cwd);
        });
    }
}

#[test]
fn names_of_layers_may_hold_separators() {
    for api in BOTH {
        alone(move |base| {
            let (lower, upper) = layers(base, [r"a:b", r"c,d\e", "f g"].map(String::from).into_iter());
            let rootfs = base.join("root fs\n\\040");
            prepare_with(api, &[overlay_of(&lower, &upper)], &rootfs).unwrap();
            shows_all_layers(&rootfs, 3);
            release_now(&rootfs);
        });
    }
}

#[test]
fn an_overlay_without_upper_folder_is_read_only() {
    for api in BOTH {
        alone(move |base| {
            let (lower, _) = layers(base, ["a", "b"].map(String::from).into_iter());
            let rootfs = base.join("rootfs");
            prepare_with(api, &[overlay_of(&lower, &[])], &rootfs).unwrap();
            shows_all_layers(&rootfs, 2);
            let error = fs::write(rootfs.join("new"), "x").unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EROFS));
            release_now(&rootfs);
        });
    }
}

#[test]
fn a_single_layer_without_upper_folder_becomes_a_read_only_bind() {
    alone(|base| {
        let (lower, _) = layers(base, std::iter::once("a".into()));
        let rootfs = base.join("rootfs");
        prepare_now(&[overlay_of(&lower, &[])], &rootfs).unwrap();
        shows_all_layers(&rootfs, 1);
        let (kind, options, _, _) = mounted_at(&rootfs).unwrap();
        assert_ne!(kind, "overlay");
        assert!(has(&options, "ro"));
        release_now(&rootfs);
    });
}

#[test]
fn options_of_the_overlay_reach_it() {
    for api in BOTH {
        alone(move |base| {
            let (lower, mut others) = layers(base, ["a", "b"].map(String::from).into_iter());
            others.extend(
                [
                    "userxattr",
                    "volatile",
                    "noexec",
                    "nodev",
                    "x-systemd.whatever",
                    "X-containerd.x=y",
                ]
                .map(String::from),
            );
            let rootfs = base.join("rootfs");
            prepare_with(api, &[overlay_of(&lower, &others)], &rootfs).unwrap();
            let (_, options, _, fs_options) = mounted_at(&rootfs).unwrap();
            assert!(has(&options, "noexec") && has(&options, "nodev"), "{options}");
            assert!(
                has(&fs_options, "userxattr") && fs_options.contains("volatile"),
                "{fs_options}"
            );
            release_now(&rootfs);
        });
    }
}

#[test]
fn a_read_only_bind_is_read_only_and_keeps_what_its_source_forbids() {
    alone(|base| {
        let source = folder(base.join("source"));
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
        mount2(Some("tmpfs"), &source, Some("tmpfs"), flags, NONE).unwrap();
        fs::write(source.join("f"), "x").unwrap();
        let rootfs = base.join("rootfs");
        prepare_now(&[mount_of("bind", &source, &["rbind", "ro"])], &rootfs).unwrap();
        let (_, options, _, _) = mounted_at(&rootfs).unwrap();
        for word in ["ro", "nosuid", "nodev", "noatime"] {
            assert!(has(&options, word), "{word} in {options}");
        }
        assert_eq!(
            fs::write(rootfs.join("f"), "y").unwrap_err().raw_os_error(),
            Some(libc::EROFS)
        );
        fs::write(source.join("f"), "y").unwrap();
        release_now(&rootfs);

        prepare_now(
            &[mount_of("bind", &source, &["bind", "rw", "suid", "relatime", "noexec"])],
            &rootfs,
        )
        .unwrap();
        let (_, options, _, _) = mounted_at(&rootfs).unwrap();
        for word in ["rw", "nosuid", "nodev", "relatime", "noexec"] {
            assert!(has(&options, word), "{word} in {options}");
        }
        release_now(&rootfs);
        release_now(&source);
    });
}

#[test]
fn a_writable_bind_of_a_read_only_mount_stays_read_only() {
    alone(|base| {
        let source = folder(base.join("source"));
        mount2(Some("tmpfs"), &source, Some("tmpfs"), MsFlags::MS_RDONLY, NONE).unwrap();
        let rootfs = base.join("rootfs");
        prepare_now(&[mount_of("bind", &source, &["rbind", "rw"])], &rootfs).unwrap();
        assert!(has(&mounted_at(&rootfs).unwrap().1, "ro"));
        release_now(&rootfs);
        release_now(&source);
    });
}

#[test]
fn a_recursive_bind_brings_the_mounts_below() {
    alone(|base| {
        let source = folder(base.join("source/sub"));
        mount2(Some("tmpfs"), &source, Some("tmpfs"), MsFlags::empty(), NONE).unwrap();
        fs::write(source.join("f"), "x").unwrap();
        let rootfs = base.join("rootfs");
        prepare_now(&[mount_of("bind", base.join("source"), &["rbind"])], &rootfs).unwrap();
        assert!(rootfs.join("sub/f").exists());
        release_now(&rootfs);
        prepare_now(&[mount_of("bind", base.join("source"), &["bind"])], &rootfs).unwrap();
        assert!(!rootfs.join("sub/f").exists());
        release_now(&rootfs);
        assert!(source.join("f").exists(), "release leaves the source alone");
        release_now(&source);
    });
}

#[test]
fn propagation_is_as_asked_for() {
    alone(|base| {
        let rootfs = base.join("rootfs");
        for (word, expected) in [
            ("rshared", "shared:"),
            ("shared", "shared:"),
            ("rprivate", ""),
            ("unbindable", "unbindable"),
        ] {
            prepare_now(&[mount_of("tmpfs", "tmpfs", &[word])], &rootfs).unwrap();
            let optional = mounted_at(&rootfs).unwrap().2;
            assert!(
                optional.starts_with(expected) && optional.is_empty() == expected.is_empty(),
                "{word}: {optional}"
            );
            release_now(&rootfs);
        }
        // Below a shared mount a new one is shared too, unless it was asked not to be.
        let shared = folder(base.join("shared"));
        prepare_now(&[mount_of("tmpfs", "tmpfs", &["shared"])], &shared).unwrap();
        let rootfs = shared.join("rootfs");
        for (words, expected) in [(&[][..], "shared:"), (&["private"][..], ""), (&["rslave"][..], "")] {
            prepare_now(&[mount_of("tmpfs", "tmpfs", words)], &rootfs).unwrap();
            let optional = mounted_at(&rootfs).unwrap().2;
            assert!(
                optional.starts_with(expected) && optional.is_empty() == expected.is_empty(),
                "{words:?}: {optional}"
            );
            release_now(&rootfs);
        }
        release_now(&shared);
    });
}

#[test]
fn a_tmpfs_gets_its_options_by_either_call() {
    // "silent" has no word in fsconfig(2), so it takes mount(2).
    for more in [&[][..], &["silent"][..]] {
        alone(move |base| {
            let rootfs = base.join("rootfs");
            let words = [&["size=64k,mode=0710", "nosuid", "noatime", "defaults"], more].concat();
            prepare_now(&[mount_of("tmpfs", "named", &words)], &rootfs).unwrap();
            let (kind, options, _, fs_options) = mounted_at(&rootfs).unwrap();
            assert_eq!(kind, "tmpfs");
            assert!(has(&options, "nosuid") && has(&options, "noatime"), "{options}");
            assert!(
                has(&fs_options, "size=64k") && has(&fs_options, "mode=710"),
                "{fs_options}"
            );
            release_now(&rootfs);
        });
    }
}

#[test]
fn a_remount_changes_the_mount_that_is_there() {
    alone(|base| {
        let rootfs = base.join("rootfs");
        prepare_now(&[tmpfs(), mount_of("tmpfs", "tmpfs", &["remount", "ro"])], &rootfs).unwrap();
        assert_eq!(below(&rootfs).len(), 1);
        assert!(has(&mounted_at(&rootfs).unwrap().1, "ro"));
        release_now(&rootfs);
    });
}

#[test]
fn a_failing_second_mount_undoes_the_first() {
    alone(|base| {
        let rootfs = base.join("rootfs");
        let mounts = [tmpfs(), mount_of("nosuchfs", "some-source", &["ro", "flavour=sweet"])];
        let error = prepare_now(&mounts, &rootfs).unwrap_err();
        assert_eq!(error.kind(), Kind::Unimplemented);
        let text = error.to_string();
        for part in [
            "nosuchfs",
            "some-source",
            "ro,flavour=sweet",
            &rootfs.display().to_string(),
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(below(base).is_empty());
        assert!(!rootfs.exists(), "the folder was ours");

        fs::create_dir(&rootfs).unwrap();
        prepare_now(&mounts, &rootfs).unwrap_err();
        assert!(rootfs.exists(), "the folder was not ours");
    });
}

#[test]
fn without_mounts_nothing_is_touched() {
    alone(|base| {
        prepare_now(&[], &base.join("rootfs")).unwrap();
        assert!(!base.join("rootfs").exists());
    });
}

#[test]
fn what_the_file_system_says_is_in_the_error() {
    alone(|base| {
        let rootfs = base.join("rootfs");
        let error = prepare_now(&[mount_of("tmpfs", "tmpfs", &["flavour=sweet"])], &rootfs).unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument);
        assert!(error.to_string().contains("Unknown parameter 'flavour'"), "{error}");

        let (mut lower, upper) = layers(base, ["a", "b"].map(String::from).into_iter());
        lower.push(base.join("missing").display().to_string());
        for api in BOTH {
            let error = prepare_with(api, &[overlay_of(&lower, &upper)], &rootfs).unwrap_err();
            assert_eq!(error.kind(), Kind::NotFound, "{error}");
            assert!(error.to_string().contains("/missing"), "{error}");
        }
        let error = prepare_now(&[mount_of("bind", base.join("missing"), &["rbind"])], &rootfs).unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound, "{error}");
    });
}

#[test]
fn secrets_are_in_no_error() {
    alone(|base| {
        let mut mount = mount_of(
            "tmpfs",
            "//joe:hunter1@host/share",
            &["user=joe", "password=hunter2,more", "size=1m"],
        );
        let text = prepare_now(&[mount.clone()], &base.join("rootfs"))
            .unwrap_err()
            .to_string();
        assert!(!text.contains("hunter") && !text.contains("more"), "{text}");
        assert!(
            text.contains("password=…") && text.contains("user=joe") && text.contains("//joe:…@host/share"),
            "{text}"
        );

        let error = Error::unknown("says hunter4 and hunter5,x").context("hunter6");
        mount.options = vec![
            "user=joe,password=hunter4,secret=hunter5,x".into(),
            "key=hunter6".into(),
        ];
        let text = without_secrets(error, &mount).to_string();
        assert!(!text.contains("hunter"), "{text}");

        mount.options = vec!["uidmap=0:1:1".into(), "secret=hunter3".into()];
        let text = prepare_now(&[mount], &base.join("rootfs")).unwrap_err().to_string();
        assert!(!text.contains("hunter") && text.contains("uidmap"), "{text}");
    });
}

#[test]
fn an_error_is_not_as_long_as_its_layers() {
    alone(|base| {
        let lower: Vec<_> = (0..300)
            .map(|number| format!("/nowhere/{}/{number}", "ä".repeat(30)))
            .collect();
        let text = prepare_now(&[overlay_of(&lower, &[])], &base.join("rootfs"))
            .unwrap_err()
            .to_string();
        assert!(text.len() < 3000 && text.contains("bytes more"), "{text}");
    });
}

#[test]
fn a_hostile_target_stays_inside_the_rootfs() {
    alone(|base| {
        let outside = folder(base.join("outside"));
        let layer = folder(base.join("layer"));
        let inside = folder(layer.join("inside"));
        symlink(&outside, layer.join("absolute")).unwrap();
        symlink("../../../../../../inside", layer.join("upwards")).unwrap();
        symlink("/proc/self/root", layer.join("magic")).unwrap();
        let rootfs = base.join("rootfs");
        let bind = mount_of("bind", &layer, &["rbind"]);

        let error = prepare_now(&[bind.clone(), at("/absolute", tmpfs())], &rootfs).unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound, "{error}");
        prepare_now(&[bind.clone(), at("magic/tmp", tmpfs())], &rootfs).unwrap_err();
        assert!(below(base).is_empty());

        for (target, place) in [
            ("upwards", "inside"),
            ("/../..", ""),
            ("inside/../../../inside", "inside"),
        ] {
            prepare_now(&[bind.clone(), at(target, tmpfs())], &rootfs).unwrap();
            assert_eq!(
                below(base),
                [rootfs.clone(), rootfs.join(place).components().collect()],
                "{target}"
            );
            release_now(&rootfs);
        }
        assert!(inside.exists());
    });
}

#[test]
fn a_rootfs_that_is_a_symlink_or_no_folder_of_its_own_is_refused() {
    alone(|base| {
        let elsewhere = folder(base.join("elsewhere"));
        symlink(&elsewhere, base.join("link")).unwrap();
        let error = prepare_now(&[tmpfs()], &base.join("link")).unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument, "{error}");
        for path in ["/", "relative", "", "/.."] {
            assert_eq!(
                prepare_now(&[tmpfs()], Path::new(path)).unwrap_err().kind(),
                Kind::InvalidArgument
            );
            assert_eq!(run(release(Path::new(path))).unwrap_err().kind(), Kind::InvalidArgument);
        }
    });
}

#[test]
fn stacked_nested_and_hidden_mounts_are_released() {
    alone(|base| {
        let rootfs = folder(base.join("rootfs"));
        let mounts = |deep: &Path| {
            mount2(Some("t"), &rootfs, Some("tmpfs"), MsFlags::empty(), NONE).unwrap();
            for _ in 0..2 {
                let deep = folder(rootfs.join(deep));
                mount2(Some("t"), &deep, Some("tmpfs"), MsFlags::empty(), NONE).unwrap();
            }
        };
        mounts(Path::new("a/b"));
        // Hides all of the former.
        mounts(Path::new("c"));
        assert_eq!(below(&rootfs).len(), 6);
        release_now(&rootfs);
        assert!(below(&rootfs).is_empty());
    });
}

#[test]
fn release_is_idempotent_and_absence_is_success() {
    alone(|base| {
        let rootfs = base.join("rootfs");
        release_now(&rootfs);
        release_now(&base.join("no/such/bundle/rootfs"));
        prepare_now(&[tmpfs()], &rootfs).unwrap();
        release_now(&rootfs);
        release_now(&rootfs);
    });
}

#[test]
fn release_touches_no_neighbour_and_follows_no_symlink() {
    alone(|base| {
        let (rootfs, neighbour) = (base.join("rootfs"), base.join("rootfs2"));
        prepare_now(&[tmpfs()], &rootfs).unwrap();
        prepare_now(&[tmpfs()], &neighbour).unwrap();
        release_now(&rootfs);
        assert_eq!(below(base), std::slice::from_ref(&neighbour));

        let link = base.join("link");
        symlink(&neighbour, &link).unwrap();
        release_now(&link);
        assert_eq!(below(base), std::slice::from_ref(&neighbour));

        // A bundle may well be reached through a symlink.
        symlink(base, base.join("way")).unwrap();
        release_now(&base.join("way/rootfs2"));
        assert!(below(base).is_empty());
    });
}

#[test]
fn mount_points_with_odd_bytes_are_released() {
    alone(|base| {
        let rootfs = base.join(OsString::from_vec(b"r \t\n\\040#\xff".to_vec()));
        prepare_now(&[tmpfs()], &rootfs).unwrap();
        let deep = folder(rootfs.join("a\nb"));
        mount2(Some("t"), &deep, Some("tmpfs"), MsFlags::empty(), NONE).unwrap();
        release_now(&rootfs);
    });
}

#[test]
fn a_busy_rootfs_is_released_all_the_same() {
    alone(|base| {
        let rootfs = base.join("rootfs");
        prepare_now(&[tmpfs()], &rootfs).unwrap();
        fs::write(rootfs.join("f"), "x").unwrap();
        let mut busy = File::open(rootfs.join("f")).unwrap();
        release_now(&rootfs);
        assert!(below(&rootfs).is_empty());
        let mut text = String::new();
        busy.read_to_string(&mut text).unwrap();
        assert_eq!(text, "x", "who uses it goes on");
    });
}

/// Loop devices that have `image` behind them.
fn loops_of(image: &Path) -> usize {
    let devices = fs::read_dir("/sys/block").unwrap().flatten();
    let files = devices.filter_map(|device| fs::read_to_string(device.path().join("loop/backing_file")).ok());
    files.filter(|file| file.trim_end() == image.to_str().unwrap()).count()
}

fn ext4_image(base: &Path) -> PathBuf {
    let image = base.join("image");
    File::create(&image).unwrap().set_len(4 << 20).unwrap();
    let made = Program::new("/usr/sbin/mkfs.ext4")
        .arg("-q")
        .arg(&image)
        .status()
        .expect("mkfs.ext4 of e2fsprogs");
    assert!(made.success());
    image
}

#[test]
fn a_file_system_in_a_file_is_mounted_by_a_loop_device_that_goes_with_it() {
    alone(|base| {
        let image = ext4_image(base);
        let rootfs = base.join("rootfs");
        for (options, writable) in [(&["loop", "rw"][..], true), (&["ro", "loop", "direct-io"][..], false)] {
            prepare_now(&[mount_of("ext4", &image, options)], &rootfs).unwrap();
            assert_eq!(mounted_at(&rootfs).unwrap().0, "ext4");
            assert_eq!(fs::write(rootfs.join("f"), "x").is_ok(), writable);
            assert_eq!(fs::read_to_string(rootfs.join("f")).unwrap(), "x");
            assert_eq!(loops_of(&image), 1);
            release_now(&rootfs);
            eventually("the loop device is free", || loops_of(&image) == 0);
        }
    });
}

#[test]
fn a_failed_mount_leaves_no_loop_device() {
    alone(|base| {
        let image = base.join("image");
        fs::write(&image, vec![0; 1 << 20]).unwrap();
        for options in [&["loop"][..], &["loop", "silent"][..]] {
            prepare_now(&[mount_of("ext4", &image, options)], &base.join("rootfs")).unwrap_err();
            eventually("the loop device is free", || loops_of(&image) == 0);
        }
        let error = prepare_now(&[mount_of("ext4", base.join("none"), &["loop"])], &base.join("rootfs")).unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound);
    });
}

/// The smallest EROFS image: one block, an empty root folder.
fn erofs_image(base: &Path) -> PathBuf {
    let mut image = vec![0_u8; 4096];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    // Super block: magic, 2^12 bytes per block, root is inode 36 (at 36 * 32), one inode, one block.
    put(1024, &0xE0F5_E1E2_u32.to_le_bytes());
    put(1024 + 12, &[12]);
    put(1024 + 14, &36_u16.to_le_bytes());
    put(1024 + 16, &1_u64.to_le_bytes());
    put(1024 + 36, &1_u32.to_le_bytes());
    // Compact inode with inline data: a folder with "." and "..".
    let inode = 36 * 32;
    put(inode, &(2_u16 << 1).to_le_bytes());
    put(inode + 4, &0o040_755_u16.to_le_bytes());
    put(inode + 6, &2_u16.to_le_bytes());
    put(inode + 8, &27_u32.to_le_bytes());
    for (number, name_at) in [(0, 24_u16), (1, 25)] {
        let entry = inode + 32 + 12 * number;
        put(entry, &36_u64.to_le_bytes());
        put(entry + 8, &name_at.to_le_bytes());
        put(entry + 10, &[2]);
    }
    put(inode + 32 + 24, b"...");
    let path = base.join("image.erofs");
    fs::write(&path, image).unwrap();
    path
}

#[test]
fn an_erofs_image_is_mounted_from_its_file_or_a_loop_device() {
    alone(|base| {
        let image = erofs_image(base);
        let rootfs = base.join("rootfs");
        for options in [&["ro"][..], &["ro", "loop"][..]] {
            prepare_now(&[mount_of("erofs", &image, options)], &rootfs).unwrap();
            assert_eq!(mounted_at(&rootfs).unwrap().0, "erofs");
            assert_eq!(fs::metadata(&rootfs).unwrap().mode() & 0o777, 0o755);
            release_now(&rootfs);
            eventually("the loop device is free", || loops_of(&image) == 0);
        }
    });
}

/// A folder on a file system that can map owners, with a file of root in it.
fn owned_by_root(path: PathBuf) -> PathBuf {
    let folder = folder(path);
    fs::write(folder.join("f"), "x").unwrap();
    fs::set_permissions(folder.join("f"), fs::Permissions::from_mode(0o644)).unwrap();
    folder
}

fn owners(path: &Path) -> (u32, u32) {
    let metadata = fs::metadata(path).unwrap();
    (metadata.uid(), metadata.gid())
}

#[test]
fn a_bind_shows_mapped_owners() {
    alone(|base| {
        let source = owned_by_root(base.join("source"));
        let rootfs = base.join("rootfs");
        let options = ["rbind", "rw", "uidmap=0:1000:10,10:5000:1", "gidmap=0:2000:65536"];
        prepare_now(&[mount_of("bind", &source, &options)], &rootfs).unwrap();
        assert_eq!(owners(&rootfs.join("f")), (1000, 2000));
        assert_eq!(owners(&source.join("f")), (0, 0));
        release_now(&rootfs);
    });
}

#[test]
fn a_file_system_shows_mapped_owners_by_either_call() {
    for more in [&[][..], &["silent"][..]] {
        alone(move |base| {
            let image = ext4_image(base);
            let rootfs = base.join("rootfs");
            let options = [&["loop", "uidmap=0:1000:10", "gidmap=0:2000:10"], more].concat();
            prepare_now(&[mount_of("ext4", &image, &options)], &rootfs).unwrap();
            assert_eq!(owners(&rootfs), (1000, 2000));
            assert_eq!(below(&rootfs).len(), 1);
            release_now(&rootfs);
            eventually("the loop device is free", || loops_of(&image) == 0);
        });
    }
}

#[test]
fn an_overlay_shows_the_mapped_owners_of_its_layers_and_leaves_no_mount_of_them() {
    for api in BOTH {
        alone(move |base| {
            let (mut lower, mut others) = layers(base, (0..70).map(|number| format!("l{number}")));
            lower.push(owned_by_root(base.join("source")).display().to_string());
            others.extend(["uidmap=0:100000:65536", "gidmap=0:200000:65536"].map(String::from));
            let before = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
            let rootfs = base.join("rootfs");
            prepare_with(api, &[overlay_of(&lower, &others)], &rootfs).unwrap();
            assert_eq!(owners(&rootfs.join("f")), (100_000, 200_000));
            assert_eq!(owners(&base.join("source/f")), (0, 0));
            shows_all_layers(&rootfs, 70);
            fs::write(rootfs.join("new"), "x").unwrap();
            assert_eq!(
                fs::read_to_string("/proc/thread-self/mountinfo")
                    .unwrap()
                    .lines()
                    .count(),
                before.lines().count() + 1
            );
            release_now(&rootfs);
            assert_eq!(fs::read_to_string("/proc/thread-self/mountinfo").unwrap(), before);
            assert_eq!(
                fs::read_dir(&rootfs).unwrap().count(),
                0,
                "no folder for the layers is left"
            );
        });
    }
}

#[test]
fn a_single_layer_shows_mapped_owners_too() {
    alone(|base| {
        let lower = [owned_by_root(base.join("source")).display().to_string()];
        let rootfs = base.join("rootfs");
        let others = ["uidmap=0:7:1", "gidmap=0:8:1"].map(String::from);
        prepare_now(&[overlay_of(&lower, &others)], &rootfs).unwrap();
        assert_eq!(owners(&rootfs.join("f")), (7, 8));
        release_now(&rootfs);
    });
}

#[test]
fn maps_that_overlap_are_refused() {
    alone(|base| {
        let source = owned_by_root(base.join("source"));
        let mount = mount_of(
            "bind",
            &source,
            &["rbind", "uidmap=0:1000:10,5:5000:10", "gidmap=0:0:1"],
        );
        let error = prepare_now(&[mount], &base.join("rootfs")).unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument, "{error}");
        assert!(error.to_string().contains("uid_map"), "{error}");
    });
}

/// Programs `mount.fuse` and `mount.fuse3` in a folder of PATH; only in a process of its own can PATH be set.
fn with_helper(name: &str, script: &str, test: impl FnOnce(&Path) + Send + 'static) {
    let path = tempfile::tempdir().unwrap();
    for program in ["mount.fuse", "mount.fuse3"] {
        let file = path.path().join(program);
        fs::write(&file, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
    }
    if alone_in_a_process(name, Some(path.path())) {
        alone(test);
    }
}

#[test]
fn a_fuse_type_is_mounted_by_its_helper() {
    let script = r#"mount -t tmpfs helper "$2" && echo "${0##*/} $@" > "$2/said""#;
    with_helper("a_fuse_type_is_mounted_by_its_helper", script, |base| {
        let rootfs = base.join("rootfs");
        let mount = mount_of("fuse3.fuse-overlayfs", "overlay", &["lowerdir=/a:/b", "ro"]);
        prepare_now(&[mount], &rootfs).unwrap();
        let said = fs::read_to_string(rootfs.join("said")).unwrap();
        let path = rootfs.display();
        assert_eq!(
            said,
            format!("mount.fuse3 overlay {path} -o lowerdir=/a:/b -o ro -t fuse-overlayfs\n")
        );
        release_now(&rootfs);
        assert!(below(base).is_empty());
        prepare_now(&[tmpfs(), mount_of("fuse.x", "s", &[])], &rootfs).unwrap();
        assert!(
            fs::read_to_string(rootfs.join("said"))
                .unwrap()
                .starts_with("mount.fuse s ")
        );
        release_now(&rootfs);
    });
}

#[test]
fn a_helper_that_fails_after_its_mount_leaves_nothing() {
    let script = r#"mount -t tmpfs helper "$2"; echo "no luck with $6" >&2; exit 3"#;
    with_helper("a_helper_that_fails_after_its_mount_leaves_nothing", script, |base| {
        let mount = mount_of("fuse.x", "source", &["a=b", "password=hunter2"]);
        let error = prepare_now(&[tmpfs(), mount], &base.join("rootfs"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("mount.fuse ended with status 3: no luck") && error.contains("fuse.x"),
            "{error}"
        );
        assert!(!error.contains("hunter2"), "{error}");
        assert!(below(base).is_empty());
    });
}

#[test]
fn a_helper_that_mounts_nothing_is_an_error() {
    with_helper("a_helper_that_mounts_nothing_is_an_error", "exit 0", |base| {
        let error = prepare_now(&[mount_of("fuse.x", "s", &[])], &base.join("rootfs")).unwrap_err();
        assert!(error.to_string().contains("nothing is mounted"), "{error}");
        assert!(!base.join("rootfs").exists());
    });
}

#[test]
fn a_missing_helper_is_named() {
    alone(|base| {
        let error = prepare_now(&[mount_of("fuse.x", "s", &[])], &base.join("rootfs")).unwrap_err();
        assert!(error.to_string().contains("mount.fuse"), "{error}");
        assert!(!base.join("rootfs").exists());
    });
}

/// A FUSE file system whose look-ups wait until the test lets them go: storage that hangs.
struct Storage {
    asked: tokio::sync::mpsc::UnboundedReceiver<()>,
    answer: mpsc::Sender<()>,
    path: PathBuf,
}

impl Storage {
    fn mount(path: PathBuf) -> Self {
        let mut device = File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let data = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        mount2(
            Some("hangs"),
            &path,
            Some("fuse"),
            MsFlags::empty(),
            Some(data.as_str()),
        )
        .unwrap();
        let (ask, asked) = tokio::sync::mpsc::unbounded_channel();
        let (answer, answers) = mpsc::channel();
        thread::spawn(move || {
            let mut request = vec![0_u8; 1 << 17];
            // Ends when the file system is unmounted.
            while let Ok(40..) = device.read(&mut request) {
                let number = |at: usize| u32::from_le_bytes(request[at..at + 4].try_into().unwrap());
                let mut attributes = [0_u8; 88];
                attributes[60..64].copy_from_slice(&0o040_755_u32.to_le_bytes());
                attributes[64..68].copy_from_slice(&2_u32.to_le_bytes());
                let body = match number(4) {
                    // LOOKUP: every name is a folder, once the test agrees.
                    1 => {
                        let _ = ask.send(());
                        let _ = answers.recv();
                        let mut body = vec![0_u8; 40];
                        body[0] = 2;
                        body.extend(attributes);
                        body
                    }
                    // GETATTR
                    3 => [&[0_u8; 16][..], &attributes].concat(),
                    // INIT: protocol 7.31
                    26 => {
                        let mut body = vec![0_u8; 64];
                        body[0] = 7;
                        body[4] = 31;
                        body[20..24].copy_from_slice(&4096_u32.to_le_bytes());
                        body
                    }
                    // FORGET, INTERRUPT and BATCH_FORGET have no answer.
                    2 | 36 | 42 => continue,
                    _ => Vec::new(),
                };
                let error = if body.is_empty() { -libc::ENOSYS } else { 0 };
                let mut reply = (16 + body.len() as u32).to_le_bytes().to_vec();
                reply.extend(error.to_le_bytes());
                reply.extend(&request[8..16]);
                reply.extend(body);
                let _ = device.write(&reply);
            }
        });
        Self { asked, answer, path }
    }

    fn mount_of_a_folder_in_it(&self) -> Mount {
        mount_of("bind", self.path.join("folder"), &["rbind"])
    }
}

/// Threads of this module in this process.
fn mounting_threads() -> usize {
    let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
    let names = tasks.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
    names
        .filter(|name| matches!(name.trim_end(), "mount" | "unmount"))
        .count()
}

/// Gives up when the storage hangs, and lets the storage answer afterwards.
fn give_up_in_the_middle(base: &Path, mounts: impl FnOnce(&Storage) -> Vec<Mount>) {
    let mut storage = Storage::mount(folder(base.join("storage")));
    let (rootfs, mounts) = (base.join("rootfs"), mounts(&storage));
    let reaper = Reaper::new();
    run(async {
        tokio::select! {
            result = prepare(&reaper, &mounts, &rootfs) => panic!("the storage does not hang: {result:?}"),
            // That this arrives shows too that the runtime goes on.
            asked = storage.asked.recv() => asked.unwrap(),
        }
    });
    assert!(mounting_threads() >= 1, "the kernel holds the thread");
    storage.answer.send(()).unwrap();
    // A thread that was just started has no name yet, so that alone is not the end.
    eventually("everything is undone", || {
        mounting_threads() == 0 && below(&rootfs).is_empty() && !rootfs.exists()
    });
    release_now(&storage.path);
}

#[test]
fn a_dropped_future_leaves_nothing_when_its_only_mount_succeeds_later() {
    if alone_in_a_process(
        "a_dropped_future_leaves_nothing_when_its_only_mount_succeeds_later",
        None,
    ) {
        alone(|base| give_up_in_the_middle(base, |storage| vec![storage.mount_of_a_folder_in_it()]));
    }
}

#[test]
fn a_dropped_future_leaves_nothing_of_the_mounts_before() {
    if alone_in_a_process("a_dropped_future_leaves_nothing_of_the_mounts_before", None) {
        alone(|base| {
            give_up_in_the_middle(base, |storage| {
                vec![tmpfs(), tmpfs(), storage.mount_of_a_folder_in_it(), tmpfs()]
            })
        });
    }
}

#[test]
fn a_mount_that_was_finished_when_the_future_was_dropped_is_undone() {
    if alone_in_a_process("a_mount_that_was_finished_when_the_future_was_dropped_is_undone", None) {
        alone(|base| {
            let mut storage = Storage::mount(folder(base.join("storage")));
            let (rootfs, mounts) = (base.join("rootfs"), [storage.mount_of_a_folder_in_it()]);
            let reaper = Reaper::new();
            run(async {
                let mut prepare = Box::pin(prepare(&reaper, &mounts, &rootfs));
                tokio::select! {
                    result = &mut prepare => panic!("the storage does not hang: {result:?}"),
                    asked = storage.asked.recv() => asked.unwrap(),
                }
                // Never polled again, so nobody takes what the thread hands over.
                storage.answer.send(()).unwrap();
                eventually("it is mounted", || {
                    !below(&rootfs).is_empty() && mounting_threads() == 0
                });
            });
            eventually("it is undone", || below(&rootfs).is_empty() && !rootfs.exists());
            release_now(&storage.path);
        });
    }
}

#[test]
fn a_process_that_is_killed_leaves_none_of_its_mapped_layers() {
    const BASE: &str = "ROOTFS_TEST_KILLED";
    const NAME: &str = "rootfs::tests::a_process_that_is_killed_leaves_none_of_its_mapped_layers";
    let overlay = |base: &Path| {
        let (lower, _) = layers(base, ["a", "b"].map(String::from).into_iter());
        let upper = format!("upperdir={}", base.join("storage/folder").display());
        let work = format!("workdir={}", base.join("work").display());
        overlay_of(&lower, &[upper, work, "uidmap=0:7:1".into(), "gidmap=0:8:1".into()])
    };
    if let Some(base) = std::env::var_os(BASE) {
        let base = Path::new(&base);
        let result = prepare_now(&[tmpfs(), overlay(base)], &base.join("rootfs"));
        panic!("the storage does not hang: {result:?}");
    }
    alone(move |base| {
        let mut storage = Storage::mount(folder(base.join("storage")));
        let mut program = Program::new(std::env::current_exe().unwrap());
        let mut child = program.args(["--exact", NAME]).env(BASE, base).spawn().unwrap();
        // The layers are mapped and mounted when the upper folder is looked up.
        storage.asked.blocking_recv().unwrap();
        child.kill().unwrap();
        // Dead for sure, but the kernel buries nobody in the middle of a system call.
        storage.answer.send(()).unwrap();
        child.wait().unwrap();
        let rootfs = base.join("rootfs");
        assert_eq!(
            below(base),
            [storage.path.clone(), rootfs.clone()],
            "only the finished mount is left"
        );
        release_now(&rootfs);
        assert_eq!(fs::read_dir(&rootfs).unwrap().count(), 0);
        release_now(&storage.path);
    });
}

#[test]
fn nothing_is_left_after_many_rootfs() {
    if !alone_in_a_process("nothing_is_left_after_many_rootfs", None) {
        return;
    }
    alone(|base| {
        let image = ext4_image(base);
        let (lower, mut others) = layers(base, (0..5).map(|number| format!("l{number}")));
        others.extend(["uidmap=0:1000:10", "gidmap=0:1000:10"].map(String::from));
        let rootfs = base.join("rootfs");
        let count = || {
            let count = |path: &str| fs::read_dir(path).unwrap().count();
            // Without the options of the file systems, which others may change meanwhile: those of cgroup2 are the machine's.
            let text = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
            let mounts: Vec<_> = text
                .lines()
                .map(|line| line.rsplit_once(' ').unwrap().0.to_owned())
                .collect();
            let children = fs::read_to_string("/proc/thread-self/children").unwrap();
            (
                count("/proc/self/fd"),
                count("/proc/self/task"),
                mounts,
                children,
                loops_of(&image),
            )
        };
        let round = |api| {
            let mounts = [
                overlay_of(&lower, &others),
                at("/", mount_of("ext4", &image, &["loop", "ro"])),
            ];
            prepare_with(api, &mounts, &rootfs).unwrap();
            release_now(&rootfs);
            let mounts = [mounts.as_slice(), &[mount_of("nosuchfs", "x", &[])]].concat();
            prepare_with(api, &mounts, &rootfs).unwrap_err();
        };
        round(OverlayApi::Layers);
        eventually("all is quiet", || mounting_threads() == 0 && loops_of(&image) == 0);
        let before = count();
        for _ in 0..5 {
            BOTH.into_iter().for_each(round);
        }
        eventually("everything is as before", || count() == before);
    });
}
