//! The programs of `tests/node`: what they promise about errors, cleanliness, interruption and concurrency.
//!
//! Nothing is built or booted here. The scripts run from a copy of their folder, in which the recipe of the image is another one, with
//! programs in place of debootstrap, QEMU and qemu-img that the test writes: the one in QEMU's place runs the node's command on this
//! machine and speaks to `run` as the guest does. The rest is real: namespaces, locks, signals, fifos, a tmpfs for each test.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests fail by panicking")]

mod support;

use std::{
    fs,
    os::{
        fd::AsFd,
        unix::{
            fs::{PermissionsExt, symlink},
            process::{CommandExt, ExitStatusExt},
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use support::universe;

/// No script takes a tenth of this here; what takes longer hangs.
const BOUND: Duration = Duration::from_secs(60);

/// Makes the image at once, and notes that it did.
const RECIPE: &str = r#"#!/bin/bash
set -eu
echo "==> only step (0 s)"
echo built >>"$LXCRI_NODE_CACHE/../builds"
mkdir root
for file in disk.raw vmlinuz initrd packages; do echo "$1" >$file; done
"#;

/// Says that it began, and goes on when the file `go` is there; meanwhile it is busy in its folder, with a mount and a process more.
const SLOW_RECIPE: &str = r#"#!/bin/bash
set -eu
echo built >>"$LXCRI_NODE_CACHE/../builds"
mkdir root root/proc root/files
mount -t proc proc root/proc
(i=0; while :; do i=$((i + 1)); echo >root/files/$i; done) &
sleep 1000 &
touch "$LXCRI_NODE_CACHE/../begun"
until [ -e "$LXCRI_NODE_CACHE/../go" ]; do sleep 0.01; done
kill %1 %2
umount root/proc
echo >disk.raw
"#;

/// In the place of QEMU. `FAKE` says how it behaves; see the cases.
const QEMU: &str = r#"#!/bin/bash
[ "$1" != --version ] || { echo "QEMU emulator version 10"; exit; }
for argument; do
    case $argument in
    *id=results,path=*) results=${argument##*path=} results=${results//,,/,} ;;
    *file=*/files.tar,*) files=${argument#*file=} files=${files%,if=*} files=${files//,,/,} ;;
    file:*) console=${argument#file:} ;;
    esac
done
if [ -z "${results:-}" ]; then
    echo asked >>"$LXCRI_NODE_CACHE/../probes"
    [ "${FAKE:-}" != kvm-boots ] || { echo 'Kernel panic - not syncing' >"$console"; exec sleep 1000; }
    exit 1
fi
[ "${FAKE:-}" != fails ] || { echo "qemu: no such option" >&2; exit 1; }
echo "words of the guest" >"$console"
[ "${FAKE:-}" != ends ] || exit 0
if [ "${FAKE:-}" = hangs-in-boot ]; then
    [ ! -t 0 ] || stty raw -echo
    touch "$LXCRI_NODE_CACHE/../begun"
    exec sleep 1000
fi
echo "$@" >"$LXCRI_NODE_CACHE/../arguments"
cd "$(dirname "$files")" && mkdir -m 755 guest && mkdir -m 1777 guest/tmp && tar --extract --file "$files" -C guest && cd guest/node && mkdir results || exit
echo up >/dev/fd/6
mapfile -d '' -t command <command
echo begin >/dev/fd/6
[ "${FAKE:-}" != hangs-in-command ] || exec sleep 1000
setpriv --pdeathsig KILL timeout "$(cat timeout)" "${command[@]/#\/node\//./}" </dev/null >/dev/fd/5 2>&1
status=$?
tar --create --file "$results" -C results .
echo "exit $status" >/dev/fd/6
[ "${FAKE:-}" != hangs-in-power-off ] || exec sleep 1000
"#;

/// A copy of the scripts, on a tmpfs of its own, with programs, cache and temporary folder.
struct Scripts {
    folder: PathBuf,
}

impl Scripts {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        universe::token();
        // /run is the universe's own and ends with it.
        let folder = PathBuf::from(format!("/run/scripts.{}", NUMBER.fetch_add(1, Ordering::Relaxed)));
        fs::create_dir(&folder).unwrap();
        tmpfs(&folder, "size=32g,mode=755");
        let scripts = Self { folder };
        for name in ["checkout/tests/node", "bin", "cache", "tmp"] {
            fs::create_dir_all(scripts.path(name)).unwrap();
        }
        let original = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
        for name in ["common", "build", "run", "test", "shell"] {
            let (from, to) = (original.join("node").join(name), scripts.path("checkout/tests/node"));
            fs::copy(from, to.join(name)).unwrap();
        }
        fs::copy(original.join("report"), scripts.path("checkout/tests/report")).unwrap();
        scripts.recipe(RECIPE);
        // Ends as the file in the checkout says that the suites did.
        scripts.program("checkout/tests/node/guest/suites", "#!/bin/sh\necho suites; exit 7\n");
        scripts.program("bin/qemu-system-x86_64", QEMU);
        scripts.program("bin/qemu-img", "#!/bin/bash\n: >\"${@: -1}\"\n");
        scripts.program("bin/debootstrap", "#!/bin/sh\nexit 1\n");
        // The build of the release.
        scripts.program("bin/make", "#!/bin/sh\n");
        scripts
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn program(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn recipe(&self, text: &str) {
        self.program("checkout/tests/node/recipe", text);
    }

    fn real_recipe(&self) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/node/recipe");
        self.recipe(&fs::read_to_string(path).unwrap());
    }

    /// `program` with what every script here gets: a process group and an environment of its own.
    fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        let path = format!("{}:{}", self.path("bin").display(), std::env::var("PATH").unwrap());
        command
            .process_group(0)
            .stdin(Stdio::null())
            .env("PATH", path)
            .env("LXCRI_NODE_CACHE", self.path("cache"))
            .env("LXCRI_NODE_ACCEL", "tcg")
            .env("LXCRI_NODE_MEMORY", "1")
            .env("TMPDIR", self.path("tmp"))
            .env_remove("LXCRI_NODE_BOOT_TIMEOUT")
            .env_remove("LXCRI_NODE_MIRROR")
            .env_remove("FAKE");
        command
    }

    fn script(&self, name: &str, arguments: &[&str]) -> Command {
        let mut command = self.command(self.path("checkout/tests/node").join(name));
        command.args(arguments);
        command
    }

    fn build(&self) -> Said {
        self.start(&mut self.script("build", &[])).end()
    }

    fn run(&self, arguments: &[&str]) -> Said {
        self.start(&mut self.script("run", arguments)).end()
    }

    /// Starts it; what it says goes into files, so that nobody waits for who holds a pipe.
    fn start(&self, command: &mut Command) -> Running {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        // Not on the tmpfs, which some tests fill.
        let (out, err) = (format!("/run/{number}.out"), format!("/run/{number}.err"));
        command
            .stdout(fs::File::create(&out).unwrap())
            .stderr(fs::File::create(&err).unwrap());
        // Who started the tests in the background or by nohup ignores these, and a shell cannot trap what was ignored before it.
        // SAFETY: signal is async-signal-safe.
        unsafe {
            command.pre_exec(|| {
                for signal in [libc::SIGINT, libc::SIGHUP, libc::SIGTERM] {
                    libc::signal(signal, libc::SIG_DFL);
                }
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        Running {
            child,
            out: out.into(),
            err: err.into(),
        }
    }

    fn builds(&self) -> usize {
        lines(&self.path("builds"))
    }

    /// Names in the folder `name`, sorted.
    fn names(&self, name: &str) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(self.path(name))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// Names in the cache but for the lock.
    fn cached(&self) -> Vec<String> {
        let mut names = self.names("cache");
        names.retain(|name| !name.ends_with(".lock"));
        names
    }

    /// Processes that a script of this test started: they have its environment.
    fn processes(&self) -> Vec<String> {
        let mark = format!("LXCRI_NODE_CACHE={}/", self.folder.display());
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
            if String::from_utf8_lossy(&environment).contains(&mark) {
                let arguments = fs::read(entry.path().join("cmdline")).unwrap_or_default();
                let arguments = String::from_utf8_lossy(&arguments).replace('\0', " ");
                found.push(format!("{} {arguments}", entry.file_name().display()));
            }
        }
        found
    }

    /// Asserts that no process, mount, temporary folder or half-made image is there.
    fn assert_clean(&self) {
        assert_eq!(self.processes(), Vec::<String>::new(), "processes");
        self.assert_no_folders();
        let inside = format!(" {}/", self.folder.display());
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mounts: Vec<_> = mounts.lines().filter(|line| line.contains(&inside)).collect();
        assert_eq!(mounts, Vec::<&str>::new(), "mounts");
    }

    fn assert_no_folders(&self) {
        assert_eq!(self.names("tmp"), Vec::<String>::new(), "temporary files");
        let cached = self.names("cache");
        assert!(!cached.iter().any(|name| name.contains("building")), "{cached:?}");
    }

    fn eventually_no_process(&self) {
        until("the processes end", || self.processes().is_empty());
    }
}

impl Drop for Scripts {
    fn drop(&mut self) {
        let _ = umount2(&self.folder, MntFlags::MNT_DETACH);
        let _ = fs::remove_dir(&self.folder);
    }
}

struct Running {
    child: Child,
    out: PathBuf,
    err: PathBuf,
}

#[derive(Debug)]
struct Said {
    /// As a shell would have it.
    status: i32,
    out: String,
    err: String,
}

impl Running {
    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    fn out(&self) -> String {
        fs::read_to_string(&self.out).unwrap()
    }

    fn err(&self) -> String {
        fs::read_to_string(&self.err).unwrap()
    }

    fn end(mut self) -> Said {
        let end = Instant::now() + BOUND;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < end, "does not end: {}{}", self.out(), self.err());
            std::thread::sleep(Duration::from_millis(2));
        };
        Said {
            status: status.code().unwrap_or_else(|| 128 + status.signal().unwrap()),
            out: self.out(),
            err: self.err(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Of a test that failed: nothing of it goes on.
        if let Ok(None) = self.child.try_wait() {
            let _ = kill(Pid::from_raw(-self.pid().as_raw()), Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

impl Said {
    /// The sentence of a failure of the node itself: there is one, and nothing on stdout.
    #[track_caller]
    fn sentence(&self) -> &str {
        let errors: Vec<_> = self
            .err
            .lines()
            .filter_map(|line| line.strip_prefix("error: "))
            .collect();
        assert!(
            self.status == 125 && errors.len() == 1 && self.out.is_empty(),
            "{self:#?}"
        );
        errors[0]
    }

    #[track_caller]
    fn assert_fails(&self, words: &[&str]) {
        let sentence = self.sentence();
        for word in words {
            assert!(sentence.contains(word), "{word:?} is not in {sentence:?}");
        }
    }

    #[track_caller]
    fn assert_ends(&self, status: i32) {
        assert_eq!(self.status, status, "{self:#?}");
    }
}

#[track_caller]
fn until(what: &str, condition: impl Fn() -> bool) {
    let end = Instant::now() + BOUND;
    while !condition() {
        assert!(Instant::now() < end, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn lines(path: &Path) -> usize {
    fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

fn tmpfs(target: &Path, options: &str) {
    mount(Some("tmpfs"), target, Some("tmpfs"), MsFlags::empty(), Some(options)).unwrap();
}

fn make_old(path: &Path) {
    let set = Command::new("touch").args(["-d", "30 days ago"]).arg(path).status();
    assert!(set.unwrap().success());
}

// What is wrong, and what to do.

#[test]
fn a_package_that_apt_cannot_bring_is_named_in_a_sentence() {
    let scripts = Scripts::new();
    scripts.program(
        "only/apt-get",
        "#!/bin/bash\n[ \"$1\" = \"$FAILS\" ] && exit 100; exit 0\n",
    );
    scripts.program("only/id", "#!/bin/bash\necho 0\n");
    for step in ["update", "install"] {
        let mut command = scripts.command("/bin/bash");
        command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/dependencies"));
        // Where nothing is, all is missing.
        let said = scripts
            .start(command.env("PATH", scripts.path("only")).env("FAILS", step))
            .end();
        said.assert_ends(1);
        assert_eq!(said.err.matches("error: ").count(), 1, "{said:?}");
        for words in ["apt could not install", "busybox-static", "install them by hand"] {
            assert!(said.err.contains(words), "{words:?} is not in {}", said.err);
        }
    }
}

#[test]
fn a_missing_program_is_named_with_its_package() {
    let scripts = Scripts::new();
    // Every program of the machine, so that each can be left out; /usr/sbin itself is covered, because the scripts look there.
    for folder in ["all", "sbin"] {
        fs::create_dir(scripts.path(folder)).unwrap();
    }
    let none: Option<&str> = None;
    let sbin = scripts.path("sbin");
    mount(Some("/usr/sbin"), &sbin, none, MsFlags::MS_BIND, none).unwrap();
    for folder in [Path::new("/usr/bin"), &sbin, &scripts.path("bin")] {
        for entry in fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            let link = scripts.path("all").join(entry.file_name());
            let _ = fs::remove_file(&link);
            symlink(entry.path(), link).unwrap();
        }
    }
    for (script, program, package) in [
        ("run", "qemu-system-x86_64", "qemu-system-x86"),
        ("run", "qemu-img", "qemu-utils"),
        ("test", "qemu-system-x86_64", "qemu-system-x86"),
        ("test", "cargo", "install Rust"),
        ("test", "strip", "binutils"),
        ("build", "debootstrap", "debootstrap"),
        ("build", "mkfs.ext4", "e2fsprogs"),
        // By the build that it needs.
        ("run", "debootstrap", "debootstrap"),
    ] {
        let link = scripts.path("all").join(program);
        let target = fs::read_link(&link).unwrap_or_default();
        let _ = fs::remove_file(&link);
        let said = scripts.start(
            scripts
                .command("unshare")
                .env("PATH", scripts.path("all"))
                .args([
                    "--mount",
                    "bash",
                    "-c",
                    "mount -t tmpfs none /usr/sbin && exec \"$@\"",
                    "bash",
                ])
                .arg(scripts.path("checkout/tests/node").join(script))
                .arg("true"),
        );
        said.end().assert_fails(&[&format!("no {program} "), package]);
        if target != Path::new("") {
            symlink(target, link).unwrap();
        }
    }
    umount2(&sbin, MntFlags::MNT_DETACH).unwrap();
    assert_eq!(scripts.builds(), 0);
    scripts.assert_clean();
}

#[test]
fn a_disk_without_room_is_named_with_what_to_set() {
    let scripts = Scripts::new();
    let small = scripts.path("small");
    fs::create_dir(&small).unwrap();
    tmpfs(&small, "size=1m");
    let name = small.to_str().unwrap();
    let said = scripts.start(scripts.script("build", &[]).env("LXCRI_NODE_CACHE", &small));
    said.end()
        .assert_fails(&[name, "not enough disk space", "6 needed", "set LXCRI_NODE_CACHE"]);
    let said = scripts.start(scripts.script("run", &["true"]).env("TMPDIR", &small));
    said.end()
        .assert_fails(&[name, "not enough disk space", "4 needed", "set TMPDIR"]);
    let said = scripts.start(scripts.script("run", &["true"]).env("TMPDIR", small.join("none")));
    said.end().assert_fails(&["there is no folder", "/none", "set TMPDIR"]);
    assert_eq!(scripts.builds(), 0);
    umount2(&small, MntFlags::MNT_DETACH).unwrap();
    scripts.assert_clean();
}

#[test]
fn a_disk_that_is_full_in_the_middle_of_the_build_is_named_also_when_the_log_has_no_room_for_it() {
    let full = "mount -o remount,size=1m $LXCRI_NODE_CACHE/..; cat /dev/zero >disk.raw 2>/dev/null";
    // GNU tar 1.34, of a disk where somebody made room again.
    let said = "echo 'tar: ./usr/bin/perl: Cannot write: No space left on device'; exit 2";
    for end in [full, said] {
        let scripts = Scripts::new();
        scripts.recipe(&format!("#!/bin/bash\necho base >step\n{end}\n"));
        scripts
            .build()
            .assert_fails(&["no space left in", "/cache", "set LXCRI_NODE_CACHE"]);
        scripts.assert_clean();
    }
}

#[test]
fn an_archive_that_does_not_answer_is_named() {
    let words = [
        // debootstrap 1.0.128 and http://127.0.0.1:1/debian.
        "I: Retrieving InRelease \nI: Retrieving Release \nE: Failed getting release file http://127.0.0.1:1/debian/dists/trixie/Release",
        // The same, of an archive that goes away later.
        "E: Couldn't download packages: libacl1 libapt-pkg7.0",
        // apt 2.6
        "E: Failed to fetch http://127.0.0.1:1/x.deb  Could not connect to 127.0.0.1:1 (127.0.0.1). - connect (111: Connection refused)",
    ];
    for words in words {
        let scripts = Scripts::new();
        scripts.real_recipe();
        scripts.program("bin/debootstrap", &format!("#!/bin/bash\necho \"{words}\"\nexit 1\n"));
        let mirror = "http://127.0.0.1:1/debian";
        let said = scripts.start(scripts.script("build", &[]).env("LXCRI_NODE_MIRROR", mirror));
        said.end()
            .assert_fails(&["Debian's archive", mirror, "set LXCRI_NODE_MIRROR"]);
        scripts.assert_clean();
    }
}

#[test]
fn a_module_that_does_not_build_is_named_with_the_compilers_words() {
    let scripts = Scripts::new();
    scripts.real_recipe();
    // What the recipe expects of a base system and its packages until then.
    scripts.program(
        "bin/debootstrap",
        "#!/bin/bash
        mkdir -p root/{proc,sys,dev,boot,usr/bin,usr/sbin,var/tmp} root/etc/{apt/apt.conf.d,apt/sources.list.d,dpkg/dpkg.cfg.d} \
            root/etc/{initramfs-tools/conf.d,systemd/system} root/lib/modules/6.12.0-amd64
        touch root/etc/initramfs-tools/modules\n",
    );
    scripts.program(
        "bin/chroot",
        "#!/bin/bash\ncase $* in *zfs-dkms*) echo 'dmu.c:1: error: words of the compiler'; exit 10 ;; esac\n",
    );
    let said = scripts.build();
    let log = scripts.path("cache").join(&scripts.cached()[0]);
    said.assert_fails(&["the ZFS module did not build", log.to_str().unwrap()]);
    assert!(fs::read_to_string(&log).unwrap().contains("words of the compiler"));
    assert!(said.err.contains("node:   ZFS module"), "{said:?}");
    scripts.assert_clean();
}

#[test]
fn debootstraps_own_log_survives_the_folder() {
    let scripts = Scripts::new();
    scripts.recipe("#!/bin/bash\nmkdir -p root/debootstrap; echo 'dpkg: words' >root/debootstrap/debootstrap.log; echo base >step; exit 3\n");
    let said = scripts.build();
    said.assert_fails(&["status 3", "the step \"base\" failed"]);
    let log = scripts.path("cache").join(&scripts.cached()[0]);
    assert!(fs::read_to_string(&log).unwrap().contains("dpkg: words"));
}

#[test]
fn wrong_arguments_of_run_end_it_before_anything_is_built() {
    let scripts = Scripts::new();
    let no = |arguments: &[&str], words: &[&str]| scripts.run(arguments).assert_fails(words);
    no(&[], &["no command"]);
    no(&["--"], &["no command"]);
    no(&["--fast", "true"], &["unknown option --fast"]);
    no(&["--timeout"], &["--timeout needs a value"]);
    for bad in ["0", "ten", "-1", "010", "1s", ""] {
        no(&["--timeout", bad, "true"], &["--timeout", "not a number"]);
    }
    no(&["--files", "/none", "true"], &["--files /none", "no such folder"]);
    no(
        &["--results", "/proc/none", "true"],
        &["--results /proc/none", "choose one"],
    );
    no(&["--tty", "true"], &["--tty needs a terminal"]);
    for (variable, bad, words) in [
        ("LXCRI_NODE_ACCEL", "hvf", "neither auto, kvm nor tcg"),
        ("LXCRI_NODE_MEMORY", "4G", "not a number"),
        ("LXCRI_NODE_MEMORY", "99999999", "set LXCRI_NODE_MEMORY to less"),
        ("LXCRI_NODE_BOOT_TIMEOUT", "soon", "not a number"),
    ] {
        let said = scripts.start(scripts.script("run", &["true"]).env(variable, bad)).end();
        said.assert_fails(&[bad, words]);
    }
    let said = scripts.start(&mut scripts.script("shell", &[])).end();
    said.assert_fails(&["a shell needs a terminal", "tests/node/run"]);
    assert_eq!(scripts.builds(), 0);
    scripts.assert_clean();
}

#[test]
fn only_root_builds_and_everybody_uses_what_is_built() {
    let scripts = Scripts::new();
    let nobody = || {
        let mut command = scripts.command("setpriv");
        command
            .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
            .arg(scripts.path("checkout/tests/node/build"));
        command
    };
    scripts
        .start(&mut nobody())
        .end()
        .assert_fails(&["takes root", "sudo LXCRI_NODE_CACHE=", "/cache"]);
    let said = scripts
        .start(nobody().env("LXCRI_NODE_CACHE", scripts.path("cache/none")))
        .end();
    said.assert_fails(&["cannot make the cache folder", "set LXCRI_NODE_CACHE"]);
    let built = scripts.build();
    assert_eq!(scripts.start(&mut nobody()).end().out, built.out);
    scripts.assert_clean();
}

#[test]
fn a_failure_that_nobody_foresaw_is_no_status_of_a_command() {
    let scripts = Scripts::new();
    scripts.program("bin/qemu-img", "#!/bin/sh\necho 'qemu-img: words' >&2\nexit 1\n");
    let said = scripts.run(&["true"]);
    said.assert_fails(&["qemu-img create", "failed"]);
    assert!(said.err.contains("qemu-img: words"), "{said:?}");
    scripts.assert_clean();
}

#[test]
fn on_debian_12_backports_are_asked_by_the_machines_own_source_or_one_that_is_gone_afterwards() {
    for own in [true, false] {
        let scripts = Scripts::new();
        // Of all programs those that the script itself calls.
        fs::create_dir(scripts.path("few")).unwrap();
        for name in [
            "bash", "cat", "cp", "dirname", "grep", "id", "mkdir", "mktemp", "rm", "sed",
        ] {
            symlink(Path::new("/usr/bin").join(name), scripts.path("few").join(name)).unwrap();
        }
        scripts.program("few/cargo", "#!/bin/sh\n");
        scripts.program("few/ctr", "#!/bin/sh\n");
        let uri = if own {
            "'http://mirror/dists/bookworm-backports/InRelease'"
        } else {
            "'http://mirror/dists/bookworm/InRelease'"
        };
        scripts.program(
            "few/apt-get",
            &format!(
                "#!/bin/bash\nfor argument; do case $argument in *SourceParts=*) parts=${{argument#*=}} ;; esac; done\n\
                 case $* in *--print-uris*) echo \"{uri}\"; exit ;; *--target-release*) cat \"$parts/node.list\" ;; esac\n\
                 echo \"said: $*\"\n"
            ),
        );
        fs::write(scripts.path("os-release"), "VERSION_CODENAME=bookworm\n").unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/dependencies");
        let inside = "mount --bind \"$0\" /etc/os-release && PATH=$1 exec \"$2\" node";
        let mut command = scripts.command("unshare");
        command
            .args(["--mount", "bash", "-c", inside])
            .args([scripts.path("os-release"), scripts.path("few"), script]);
        let said = scripts.start(&mut command).end();
        said.assert_ends(0);
        assert!(
            said.out.contains("--target-release bookworm-backports qemu-system-x86"),
            "{said:?}"
        );
        assert_eq!(said.out.contains("main\n"), !own, "a source: {said:?}");
        scripts.assert_clean();
    }
}

// The image.

#[test]
fn an_image_is_built_once_and_its_folder_is_all_that_is_printed() {
    let scripts = Scripts::new();
    let first = scripts.build();
    first.assert_ends(0);
    let folder = Path::new(first.out.trim_end());
    assert_eq!(folder.parent(), Some(scripts.path("cache").as_path()));
    for file in ["disk.raw", "vmlinuz", "initrd", "packages"] {
        assert!(folder.join(file).is_file(), "{file}");
    }
    assert!(!folder.join("root").exists(), "what the disk was made of");
    let (step, built) = (
        first.err.find("node:   only step").unwrap(),
        first.err.find("image built").unwrap(),
    );
    assert!(step < built, "{first:?}");
    let second = scripts.build();
    assert_eq!((second.out.as_str(), second.err.as_str()), (first.out.as_str(), ""));
    assert_eq!(scripts.builds(), 1);
    assert_eq!(scripts.cached().len(), 1, "the image and nothing else");
    scripts.assert_clean();
}

#[test]
fn a_changed_recipe_is_another_image_and_a_changed_comment_is_not() {
    let scripts = Scripts::new();
    let first = scripts.build().out;
    scripts.recipe(&RECIPE.replace("set -eu\n", "set -eu\n# A word on it.\n    # Another.\n"));
    assert_eq!(scripts.build().out, first);
    assert_eq!(scripts.builds(), 1);
    scripts.recipe(&RECIPE.replace("vmlinuz", "vmlinuz # no comment's line\\\n"));
    assert_ne!(scripts.build().out, first);
    scripts.recipe(&RECIPE.replace("#!/bin/bash", "#!/usr/bin/env bash"));
    assert_ne!(scripts.build().out, first);
    assert_eq!(scripts.builds(), 3);
}

#[test]
fn a_folder_without_a_disk_is_no_image() {
    let scripts = Scripts::new();
    let folder = PathBuf::from(scripts.build().out.trim_end());
    fs::remove_file(folder.join("disk.raw")).unwrap();
    scripts.build().assert_ends(0);
    assert_eq!(scripts.builds(), 2);
    assert!(folder.join("disk.raw").is_file(), "not below its place");
    assert_eq!(
        fs::read_dir(&folder).unwrap().count(),
        4,
        "not mixed with what was there"
    );
}

#[test]
fn an_interrupted_build_leaves_nothing() {
    for (signal, group, status) in [
        (Signal::SIGINT, true, 130),
        (Signal::SIGTERM, false, 143),
        (Signal::SIGTERM, true, 143),
        (Signal::SIGHUP, true, 143),
    ] {
        let scripts = Scripts::new();
        scripts.recipe(SLOW_RECIPE);
        let build = scripts.start(&mut scripts.script("build", &[]));
        until("the recipe begins", || scripts.path("begun").exists());
        send(&build, signal, group);
        let said = build.end();
        said.assert_ends(status);
        assert_eq!(said.out, "");
        scripts.assert_clean();
    }
}

#[test]
fn what_a_killed_build_left_is_removed_by_the_next_one_of_any_recipe() {
    for next in [SLOW_RECIPE, RECIPE] {
        let scripts = Scripts::new();
        scripts.recipe(SLOW_RECIPE);
        let build = scripts.start(&mut scripts.script("build", &[]));
        until("the recipe begins", || scripts.path("begun").exists());
        send(&build, Signal::SIGKILL, false);
        build.end().assert_ends(137);
        scripts.eventually_no_process();
        assert!(
            scripts.cached().iter().any(|name| name.contains("building")),
            "nothing to remove"
        );
        fs::write(scripts.path("go"), "").unwrap();
        scripts.recipe(next);
        scripts.build().assert_ends(0);
        scripts.assert_clean();
    }
}

#[test]
fn of_two_builds_at_once_the_second_waits_and_takes_the_firsts_image() {
    let scripts = Scripts::new();
    scripts.recipe(SLOW_RECIPE);
    let first = scripts.start(&mut scripts.script("build", &[]));
    until("the recipe begins", || scripts.path("begun").exists());
    let second = scripts.start(&mut scripts.script("build", &[]));
    until("the second waits", || {
        second.err().contains("another process is building")
    });
    assert_eq!(second.out(), "", "before the image is whole");
    // One that is told to stop waiting does, and leaves the others alone.
    let third = scripts.start(&mut scripts.script("build", &[]));
    until("the third waits", || {
        third.err().contains("another process is building")
    });
    send(&third, Signal::SIGTERM, false);
    third.end().assert_ends(143);
    fs::write(scripts.path("go"), "").unwrap();
    let (first, second) = (first.end(), second.end());
    first.assert_ends(0);
    second.assert_ends(0);
    assert!(!first.out.is_empty() && first.out == second.out, "{first:?} {second:?}");
    assert_eq!(scripts.builds(), 1);
    scripts.assert_clean();
}

#[test]
fn a_build_that_waited_for_a_failed_one_builds() {
    let scripts = Scripts::new();
    scripts.recipe(SLOW_RECIPE);
    let first = scripts.start(&mut scripts.script("build", &[]));
    until("the recipe begins", || scripts.path("begun").exists());
    let second = scripts.start(&mut scripts.script("build", &[]));
    until("the second waits", || {
        second.err().contains("another process is building")
    });
    send(&first, Signal::SIGTERM, false);
    first.end().assert_ends(143);
    fs::write(scripts.path("go"), "").unwrap();
    second.end().assert_ends(0);
    assert_eq!(scripts.builds(), 2);
    scripts.assert_clean();
}

#[test]
fn old_images_go_but_for_those_in_use_and_what_is_not_ours() {
    let scripts = Scripts::new();
    let (old, used, foreign) = ("0123456789abcdef", "1123456789abcdef", "my-sixteen-bytes");
    let without_disk = "2123456789abcdef";
    for name in [old, used, foreign, without_disk] {
        let folder = scripts.path("cache").join(name);
        fs::create_dir(&folder).unwrap();
        if name != without_disk {
            fs::write(folder.join("disk.raw"), "").unwrap();
        }
        make_old(&folder);
    }
    let file = fs::File::open(scripts.path("cache").join(used)).unwrap();
    file.lock_shared().unwrap();
    let image = scripts.build().out;
    let image = Path::new(image.trim_end()).file_name().unwrap().to_str().unwrap();
    let mut expected = [used, foreign, without_disk, image];
    expected.sort_unstable();
    assert_eq!(scripts.cached(), expected);
}

// A run.

#[test]
fn a_run_ends_as_its_command_did_with_its_output_and_its_results() {
    let scripts = Scripts::new();
    for status in [0, 3, 124, 125] {
        let results = scripts.path(&format!("results.{status}"));
        let command = format!("echo to stdout; echo to stderr >&2; echo kept >results/file; exit {status}");
        let said = scripts.run(&["--results", results.to_str().unwrap(), "--", "sh", "-c", &command]);
        said.assert_ends(status);
        assert_eq!(said.out, "to stdout\nto stderr\n");
        assert_eq!(fs::read_to_string(results.join("file")).unwrap(), "kept\n");
        scripts.assert_clean();
    }
    assert_eq!(scripts.builds(), 1);
}

#[test]
fn a_command_that_is_not_in_time_ends_with_124_and_the_console() {
    let scripts = Scripts::new();
    let results = scripts.path("results");
    let said = scripts.run(&[
        "--timeout",
        "1",
        "--results",
        results.to_str().unwrap(),
        "sleep",
        "1000",
    ]);
    said.assert_ends(124);
    assert!(
        said.err.contains("error: the command was not done after 1 s"),
        "{said:?}"
    );
    assert_console_kept(&said, &results);
    scripts.assert_clean();
}

#[test]
fn the_files_are_laid_over_the_nodes_root() {
    let scripts = Scripts::new();
    let files = scripts.path("files");
    fs::create_dir_all(files.join("etc")).unwrap();
    fs::write(files.join("etc/motd"), "welcome\n").unwrap();
    let said = scripts.run(&["--files", files.to_str().unwrap(), "cat", "../etc/motd"]);
    said.assert_ends(0);
    assert_eq!(said.out, "welcome\n");
}

#[test]
fn folders_may_have_blanks_and_commas_in_their_names_and_be_relative() {
    let scripts = Scripts::new();
    for name in ["a, b/tmp", "a, b/cache"] {
        fs::create_dir_all(scripts.path(name)).unwrap();
    }
    let mut command = scripts.script(
        "run",
        &["--results", "a, b/results", "sh", "-c", "echo said >results/file"],
    );
    command
        .current_dir(&scripts.folder)
        .env("TMPDIR", "a, b/tmp")
        .env("LXCRI_NODE_CACHE", "a, b/cache");
    // The programs in the place of others look for the cache from elsewhere.
    scripts.recipe("#!/bin/sh\ntouch disk.raw\n");
    scripts.program(
        "bin/qemu-system-x86_64",
        &QEMU.replace("$LXCRI_NODE_CACHE", &scripts.path("cache").display().to_string()),
    );
    scripts.start(&mut command).end().assert_ends(0);
    let result = scripts.path("a, b/results/file");
    assert_eq!(fs::read_to_string(result).unwrap(), "said\n");
    let arguments = fs::read_to_string(scripts.path("arguments")).unwrap();
    assert!(
        arguments.contains("a,, b/tmp/") && !arguments.contains("file=a"),
        "{arguments}"
    );
    assert_eq!(scripts.names("a, b/tmp"), Vec::<String>::new());
}

#[test]
fn who_builds_with_a_private_umask_builds_for_everybody() {
    let scripts = Scripts::new();
    let mut command = scripts.command("sh");
    command
        .args(["-c", "umask 077; exec \"$0\""])
        .arg(scripts.path("checkout/tests/node/build"));
    let said = scripts.start(&mut command).end();
    said.assert_ends(0);
    for file in ["", "disk.raw", "vmlinuz"] {
        let mode = fs::metadata(Path::new(said.out.trim_end()).join(file))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o44, 0o44, "{file}");
    }
}

#[test]
fn folders_that_are_there_keep_their_modes_in_the_node_and_here() {
    let scripts = Scripts::new();
    // As mktemp makes it; a checkout may lie in /tmp.
    let (files, results) = (scripts.path("files"), scripts.path("results"));
    fs::create_dir_all(files.join("tmp/checkout")).unwrap();
    fs::create_dir(files.join("empty")).unwrap();
    fs::write(files.join("tmp/checkout/file"), "").unwrap();
    fs::create_dir(&results).unwrap();
    fs::set_permissions(&files, fs::Permissions::from_mode(0o700)).unwrap();
    fs::set_permissions(&results, fs::Permissions::from_mode(0o1777)).unwrap();
    let (from, to) = (files.to_str().unwrap(), results.to_str().unwrap());
    let stat = "stat -c %a .. ../tmp ../tmp/checkout ../empty; echo >results/file";
    let said = scripts.run(&["--files", from, "--results", to, "sh", "-c", stat]);
    said.assert_ends(0);
    assert_eq!(said.out, "755\n1777\n755\n755\n");
    assert!(results.join("file").is_file());
    assert_eq!(fs::metadata(&results).unwrap().permissions().mode() & 0o7777, 0o1777);
}

#[test]
fn output_is_streamed() {
    let scripts = Scripts::new();
    let go = scripts.path("go");
    let command = format!(
        "echo early; until [ -e {} ]; do sleep 0.01; done; echo late",
        go.display()
    );
    let run = scripts.start(&mut scripts.script("run", &["sh", "-c", &command]));
    until("the first line comes", || run.out() == "early\n");
    fs::write(go, "").unwrap();
    let said = run.end();
    said.assert_ends(0);
    assert_eq!(said.out, "early\nlate\n");
}

#[test]
fn a_qemu_that_ends_early_is_a_failure_of_the_node_with_its_words_or_the_console() {
    let scripts = Scripts::new();
    let said = scripts
        .start(scripts.script("run", &["true"]).env("FAKE", "fails"))
        .end();
    said.assert_fails(&["the node ended before its command did"]);
    assert!(said.err.contains("qemu: no such option"), "{said:?}");

    let results = scripts.path("results");
    let arguments = ["--results", results.to_str().unwrap(), "true"];
    let said = scripts
        .start(scripts.script("run", &arguments).env("FAKE", "ends"))
        .end();
    said.assert_fails(&["the node ended before its command did"]);
    assert_console_kept(&said, &results);
    // Without a folder for results, in the checkout's target.
    let said = scripts
        .start(scripts.script("run", &["true"]).env("FAKE", "ends"))
        .end();
    assert_console_kept(&said, &scripts.path("checkout/target/node"));
    scripts.assert_clean();
}

#[test]
fn a_node_that_hangs_is_given_up() {
    let scripts = Scripts::new();
    // A bound that is not to be reached is one that a busy machine meets.
    let hang = |(how, bound, timeout)| {
        let mut command = scripts.script("run", &["--timeout", timeout, "--", "sh", "-c", "echo said; exit 3"]);
        scripts.start(command.env("FAKE", how).env("LXCRI_NODE_BOOT_TIMEOUT", bound))
    };
    let runs = [
        ("hangs-in-boot", "1", "1000"),
        ("hangs-in-command", "6", "1"),
        ("hangs-in-power-off", "6", "1000"),
    ]
    .map(hang);
    let [boot, command, power_off] = runs.map(Running::end);
    boot.assert_fails(&["did not boot in 1 s", "LXCRI_NODE_BOOT_TIMEOUT"]);
    assert_console_kept(&boot, &scripts.path("checkout/target/node"));
    command.assert_fails(&["the node hangs", "console"]);
    assert_console_kept(&command, &scripts.path("checkout/target/node"));
    // Its command is done, so its status counts.
    power_off.assert_ends(3);
    assert_eq!(power_off.out, "said\n");
    scripts.assert_clean();
}

#[test]
fn a_node_that_fills_the_disk_is_given_up_with_what_to_set() {
    let scripts = Scripts::new();
    let (begun, small) = (scripts.path("begun"), scripts.path("small"));
    fs::create_dir(&small).unwrap();
    tmpfs(&small, "size=8g");
    let mut command = scripts.script("run", &["--timeout", "1", "true"]);
    command
        .env("FAKE", "hangs-in-boot")
        .env("LXCRI_NODE_BOOT_TIMEOUT", "2")
        .env("TMPDIR", &small);
    let run = scripts.start(&mut command);
    until("the boot begins", || begun.exists());
    let (none, full): (Option<&str>, _) = (None, Some("size=1m"));
    mount(none, &small, none, MsFlags::MS_REMOUNT, full).unwrap();
    run.end().assert_fails(&["no space left in", "/small", "set TMPDIR"]);
    umount2(&small, MntFlags::MNT_DETACH).unwrap();
    scripts.assert_clean();
}

#[test]
fn an_interrupted_run_leaves_nothing() {
    for (signal, group, status) in [
        (Signal::SIGINT, true, 130),
        (Signal::SIGTERM, false, 143),
        (Signal::SIGTERM, true, 143),
        (Signal::SIGHUP, true, 143),
    ] {
        let scripts = Scripts::new();
        let begun = scripts.path("begun");
        let run = scripts.start(scripts.script("run", &["true"]).env("FAKE", "hangs-in-boot"));
        until("the boot begins", || begun.exists());
        send(&run, signal, group);
        run.end().assert_ends(status);
        scripts.assert_clean();

        fs::remove_file(&begun).unwrap();
        let run = scripts.start(&mut scripts.script(
            "run",
            &[
                "setpriv",
                "--pdeathsig",
                "KILL",
                "sh",
                "-c",
                &format!("echo part; touch {}; exec sleep 1000", begun.display()),
            ],
        ));
        until("the command begins", || begun.exists());
        send(&run, signal, group);
        let said = run.end();
        said.assert_ends(status);
        // The fake's children are no virtual machine's: they end when they notice.
        scripts.eventually_no_process();
        scripts.assert_clean();
        fs::remove_file(&begun).unwrap();

        // While the image is made.
        scripts.recipe(SLOW_RECIPE);
        let run = scripts.start(&mut scripts.script("run", &["true"]));
        until("the recipe begins", || begun.exists());
        send(&run, signal, group);
        let said = run.end();
        assert!(said.status > 128, "{said:?}");
        scripts.eventually_no_process();
        scripts.assert_clean();
    }
}

#[test]
fn what_a_killed_run_left_is_removed_by_the_next_one_and_nothing_of_those_that_live() {
    let scripts = Scripts::new();
    let begun = scripts.path("begun");
    let hang = || {
        let run = scripts.start(scripts.script("run", &["true"]).env("FAKE", "hangs-in-boot"));
        until("the boot begins", || begun.exists());
        fs::remove_file(&begun).unwrap();
        run
    };
    let living = hang();
    let folders = scripts.names("tmp");
    let killed = hang();
    send(&killed, Signal::SIGKILL, false);
    killed.end().assert_ends(137);
    let left = scripts.names("tmp").len();
    assert_eq!(left, 2);
    fs::write(scripts.path("tmp/proxmox-lxcri-node.txt"), "not ours").unwrap();
    // QEMU ends with the killed one, at once but not at the same time.
    until("the next run removes it", || {
        scripts.run(&["true"]).assert_ends(0);
        let mut names = scripts.names("tmp");
        names.retain(|name| name != "proxmox-lxcri-node.txt");
        names == folders
    });
    fs::remove_file(scripts.path("tmp/proxmox-lxcri-node.txt")).unwrap();
    send(&living, Signal::SIGTERM, false);
    living.end().assert_ends(143);
    scripts.assert_clean();
}

#[test]
fn a_killed_run_whose_output_nobody_reads_leaves_no_process() {
    let scripts = Scripts::new();
    let begun = scripts.path("begun");
    // A pipe that is open for reading as long as somebody has it.
    let unread = "mkfifo $1/pipe && exec 3<>$1/pipe && exec $0 \\
        setpriv --pdeathsig KILL sh -c \"head -c 1000000 /dev/zero; touch $1/begun; exec sleep 1000\" >&3";
    let mut command = scripts.command("bash");
    command
        .args(["-c", unread])
        .args([&scripts.path("checkout/tests/node/run"), &scripts.folder]);
    let run = scripts.start(&mut command);
    until("the command begins", || begun.exists());
    send(&run, Signal::SIGKILL, false);
    run.end().assert_ends(137);
    scripts.eventually_no_process();
}

#[test]
fn runs_at_the_same_time_do_not_meet() {
    let scripts = Scripts::new();
    let runs: Vec<_> = (0..4)
        .map(|number| {
            let results = scripts.path(&format!("results.{number}"));
            // None goes on before all are there.
            let (here, all) = (scripts.path(&format!("here.{number}")), scripts.folder.display());
            let command = format!(
                "touch {}; until [ $(ls {all} | grep -c ^here) = 4 ]; do sleep 0.01; done; echo {number} | tee results/number; exit {number}",
                here.display()
            );
            scripts.start(&mut scripts.script(
                "run",
                &["--results", results.to_str().unwrap(), "sh", "-c", &command],
            ))
        })
        .collect();
    for (number, run) in (0..).zip(runs) {
        let said = run.end();
        said.assert_ends(number);
        assert_eq!(said.out, format!("{number}\n"));
        let result = scripts.path(&format!("results.{number}/number"));
        assert_eq!(fs::read_to_string(result).unwrap(), said.out);
    }
    assert_eq!(scripts.builds(), 1);
    scripts.assert_clean();
}

#[test]
fn whether_kvm_works_is_asked_once() {
    // A machine with /dev/kvm, whatever this one has.
    let dev = "mkdir $0 && mount --rbind /dev $0 && mount -t tmpfs none /dev && for file in $0/*; do ln -s $file /dev; done &&
        rm -f /dev/kvm && touch /dev/kvm && exec \"$@\"";
    for (behaviour, accelerator) in [("works", "tcg"), ("kvm-boots", "kvm")] {
        let scripts = Scripts::new();
        scripts.build().assert_ends(0);
        for _ in 0..2 {
            let mut command = scripts.command("unshare");
            command.args(["--mount", "bash", "-c", dev]).arg(scripts.path("dev"));
            command
                .arg(scripts.path("checkout/tests/node/run"))
                .args(["echo", "said"]);
            let said = scripts
                .start(command.env("LXCRI_NODE_ACCEL", "auto").env("FAKE", behaviour))
                .end();
            said.assert_ends(0);
            assert_eq!(said.out, "said\n");
            assert!(said.err.contains(&format!("booting ({accelerator})")), "{said:?}");
            let arguments = fs::read_to_string(scripts.path("arguments")).unwrap();
            assert!(arguments.contains(&format!("-accel {accelerator}")), "{arguments}");
            fs::remove_dir(scripts.path("dev")).unwrap();
        }
        assert_eq!(lines(&scripts.path("probes")), 1);
        // Another QEMU may know better, or be slower.
        scripts.program("bin/qemu-system-x86_64", &QEMU.replace("version 10", "version 7.2.22"));
        let mut command = scripts.command("unshare");
        command.args(["--mount", "bash", "-c", dev]).arg(scripts.path("dev"));
        command.arg(scripts.path("checkout/tests/node/run")).arg("true");
        let said = scripts
            .start(command.env("LXCRI_NODE_ACCEL", "auto").env("FAKE", behaviour))
            .end();
        said.assert_ends(0);
        assert_eq!(said.err.contains("tcg by QEMU 7;"), accelerator == "tcg", "{said:?}");
        assert_eq!(lines(&scripts.path("probes")), 2);
        fs::remove_dir(scripts.path("dev")).unwrap();
        scripts.assert_clean();
    }
}

#[test]
fn an_interrupted_run_gives_the_terminal_back_as_it_was() {
    let scripts = Scripts::new();
    let terminal = nix::pty::openpty(None, None).unwrap();
    let modes = || nix::sys::termios::tcgetattr(terminal.slave.as_fd()).unwrap();
    let before = modes();
    let mut command = scripts.script("run", &["--tty", "true"]);
    command
        .stdin(terminal.slave.try_clone().unwrap())
        .env("FAKE", "hangs-in-boot");
    let run = scripts.start(&mut command);
    until("the boot begins", || scripts.path("begun").exists());
    assert_ne!(modes(), before, "raw");
    send(&run, Signal::SIGTERM, false);
    run.end().assert_ends(143);
    assert_eq!(modes(), before);
    scripts.assert_clean();
}

// The suites.

/// In place of cargo: built a program.
const CARGO: &str = r#"#!/bin/sh
echo '{"target":{"kind":["test"],"name":"lifecycle","test":true},"profile":{"opt_level":"0","test":true},"executable":"/usr/bin/env"}'
"#;

#[test]
fn the_suites_end_the_test_as_they_ended_and_leave_nothing() {
    let scripts = Scripts::new();
    scripts.program("bin/cargo", CARGO);
    scripts.program("bin/strip", "#!/bin/sh\n");
    let said = scripts.start(&mut scripts.script("test", &[])).end();
    said.assert_ends(7);
    assert!(said.out.contains("suites\n"), "{said:?}");
    scripts.assert_clean();
}

#[test]
fn tests_that_do_not_compile_end_the_test_with_the_compilers_words() {
    let scripts = Scripts::new();
    // As cargo does: JSON swallows the words unless it is asked to render them.
    scripts.program(
        "bin/cargo",
        "#!/bin/sh\ncase $* in *=json-render-diagnostics*) exec >&2 ;; esac\necho 'error[E0308]: mismatched types'\nexit 101\n",
    );
    let said = scripts.start(&mut scripts.script("test", &[])).end();
    said.assert_fails(&["cargo test", "failed"]);
    assert!(said.err.contains("mismatched types"), "{said:?}");
    scripts.assert_clean();
}

#[test]
fn the_suites_find_the_checkout_whose_target_folder_is_elsewhere() {
    let scripts = Scripts::new();
    scripts.program("bin/cargo", CARGO);
    scripts.program("bin/strip", "#!/bin/sh\n");
    scripts.program(
        "checkout/tests/node/guest/suites",
        "#!/bin/sh\ncd ..$(cat checkout) && echo here\n",
    );
    let said = scripts.start(&mut scripts.script("test", &[])).end();
    said.assert_ends(0);
    assert!(said.out.starts_with("here\n"), "{said:?}");
}

#[test]
fn the_shim_in_the_node_is_the_release() {
    let scripts = Scripts::new();
    scripts.program("built/shim", "#!/bin/sh\necho debug\n");
    let shim = scripts.path("built/shim");
    scripts.program(
        "bin/cargo",
        &format!(
            "{CARGO}echo '{{\"target\":{{\"name\":\"shim\"}},\"profile\":{{\"test\":false}},\"executable\":\"{}\"}}'\n",
            shim.display()
        ),
    );
    scripts.program("bin/strip", "#!/bin/sh\n");
    // Where the tests look for it.
    scripts.program(
        "checkout/tests/node/guest/suites",
        "#!/bin/sh\n..$(readlink bin/shim)\n",
    );
    scripts.program(
        "bin/make",
        "#!/bin/sh\nmkdir -p target/bin && printf '#!/bin/sh\\necho release\\n' >target/bin/shim\n",
    );
    let said = scripts.start(&mut scripts.script("test", &[])).end();
    said.assert_ends(0);
    assert!(said.out.starts_with("release\n"), "{said:?}");

    // Never the debug build in its place.
    fs::remove_file(scripts.path("checkout/target/bin/shim")).unwrap();
    scripts.program("bin/make", "#!/bin/sh\n");
    scripts
        .start(&mut scripts.script("test", &[]))
        .end()
        .assert_fails(&["failed"]);
    scripts.assert_clean();
}

#[test]
fn tests_at_the_same_time_have_results_of_their_own() {
    let scripts = Scripts::new();
    scripts.program("bin/cargo", CARGO);
    scripts.program("bin/strip", "#!/bin/sh\n");
    let all = scripts.folder.display();
    // None goes on before both are there.
    scripts.program(
        "checkout/tests/node/guest/suites",
        &format!(
            "#!/bin/sh\ntouch {all}/here.$1; until [ $(ls {all} | grep -c ^here) = 2 ]; do sleep 0.01; done\necho time of $1 >results/times\n"
        ),
    );
    let tests = ["one", "two"].map(|lane| scripts.start(&mut scripts.script("test", &[lane])));
    for (lane, test) in ["one", "two"].into_iter().zip(tests) {
        let said = test.end();
        said.assert_ends(0);
        assert!(said.out.contains(&format!("time of {lane}\n")), "{said:?}");
    }
    scripts.assert_clean();
}

/// The node's own suites, with programs in place of the node's and of cargo's; `programs` are name and script of each test program.
fn with_suites(programs: &[(&str, &str)]) -> Scripts {
    let scripts = Scripts::new();
    let original = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/node/guest/suites");
    scripts.program(
        "checkout/tests/node/guest/suites",
        &fs::read_to_string(original).unwrap(),
    );
    for name in ["strip", "modprobe", "mount", "zpool", "systemd-detect-virt"] {
        scripts.program(&format!("bin/{name}"), "#!/bin/sh\n");
    }
    scripts.program(
        "bin/containerd",
        "#!/bin/sh\necho containerd containerd.io/containerd/v2 2.1.9~ds1 12345\n",
    );
    scripts.program(
        "bin/systemd-run",
        // A unit has of the caller's environment what it is given by name.
        "#!/bin/bash\nkept=()\nwhile [[ $1 == -* ]]; do\n\
         case $1 in --setenv) kept+=(\"$2=${!2}\") && shift ;; --unit | --property | --working-directory) shift ;; esac\n\
         shift\ndone\nexec env -i \"${kept[@]}\" \"$@\"\n",
    );
    let mut cargo = "#!/bin/sh\n".to_string();
    for (name, program) in programs {
        let path = format!("built/{name}");
        scripts.program(&path, &format!("#!/bin/bash\n{program}\n"));
        cargo += &format!(
            "echo '{{\"target\":{{\"name\":\"{name}\"}},\"profile\":{{\"test\":true}},\"executable\":\"{}\"}}'\n",
            scripts.path(&path).display()
        );
    }
    scripts.program("bin/cargo", &cargo);
    scripts
}

const PASSES: &str = r#"if [[ "--skip ctr::a_test lifecycle::a_test" == *"${1:-}"* ]]; then
    for word; do echo "test $word ... ok"; done
    echo "test result: ok. 1 passed; 0 failed; 0 ignored"
    exit
fi
echo "test result: ok. 0 passed; 0 failed; 0 ignored""#;

#[test]
fn what_did_not_run_in_the_node_is_no_success() {
    let programs = [("containerd", PASSES), ("cri", PASSES), ("node_scripts", "exit 1")];
    let test = |scripts: &Scripts, arguments: &[&str]| {
        let said = scripts.start(&mut scripts.script("test", arguments)).end();
        scripts.assert_clean();
        said
    };
    let fails = |said: Said, words: &[&str]| {
        said.assert_ends(1);
        for word in words {
            assert!(said.out.contains(word), "{word:?} is not in {}", said.out);
        }
    };
    let scripts = with_suites(&programs);
    let said = test(&scripts, &["containerd-2"]);
    said.assert_ends(0);
    assert!(said.out.contains("all tests passed"), "{said:?}");
    assert!(said.out.contains("containerd-2| ==> containerd-2: cri"), "{said:?}");
    test(&scripts, &["containerd-2", "--", "a_t"]).assert_ends(0);
    fails(
        test(&scripts, &["containerd-2", "--", "no_such"]),
        &["no_such", "no test ran"],
    );

    // Another containerd than the lane is for.
    fails(
        test(&scripts, &["systemd"]),
        &[
            "the lane systemd is for containerd 1.7",
            "systemd: cri",
            "did not run to its end",
        ],
    );

    // A skip of what the node has; that it has no cgroup v1 is its nature.
    for (skipped, fine) in [("lib::host::cgroup::v1", true), ("cri::a_test", false)] {
        let skips = format!("echo \"SKIPPED {skipped}: no x\" >>\"$LXCRI_SKIP_LOG\"\n{PASSES}");
        let said = test(
            &with_suites(&[("containerd", &skips), ("cri", PASSES)]),
            &["containerd-2"],
        );
        match fine {
            true => said.assert_ends(0),
            false => fails(said, &["SKIPPED cri::a_test: no x", "nothing may be skipped"]),
        }
    }

    // What a lane is about has another name now.
    let scripts = with_suites(&[("containerd", &PASSES.replace("ctr::", "new::")), ("cri", PASSES)]);
    fails(
        test(&scripts, &["containerd-2"]),
        &["containerd-2: containerd", "none of its tests ran"],
    );

    let scripts = with_suites(&[
        ("containerd", &PASSES.replace("for word;", "for word in ctr::;")),
        ("cri", PASSES),
    ]);
    fails(
        test(&scripts, &["containerd-2"]),
        &["containerd-2: containerd", "no test is named stdio::output"],
    );

    // A test program that nobody put into a lane.
    let scripts = with_suites(&[("containerd", PASSES), ("cri", PASSES), ("new_tests", PASSES)]);
    fails(test(&scripts, &["containerd-2"]), &["new_tests", "no lane runs it"]);
    // One that was not brought.
    let scripts = with_suites(&[("containerd", PASSES)]);
    fails(test(&scripts, &["containerd-2"]), &["containerd-2: cri", "FAILED"]);
    // One that takes its lane with it.
    let scripts = with_suites(&[("containerd", "kill -KILL $PPID"), ("cri", PASSES)]);
    fails(
        test(&scripts, &["containerd-2"]),
        &["containerd-2: cri", "did not run to its end"],
    );
}

#[test]
fn zfs_is_the_snapshotter_of_cri_and_of_all_about_the_rootfs() {
    let program = "echo \"by ${LXCRI_TEST_SNAPSHOTTER:-the default}${LXCRI_TEST_BACKEND:+ on $LXCRI_TEST_BACKEND}: $*.\"\nfor word; do echo \"test $word ... ok\"; done\n\
                   echo \"test result: ok. 1 passed; 0 failed; 0 ignored\"";
    let scripts = with_suites(&["containerd", "cri", "backend_contract", "lxc"].map(|name| (name, program)));
    scripts.program("bin/containerd", "#!/bin/sh\necho containerd x 1.7.24 y\n");
    let said = scripts.start(&mut scripts.script("test", &["systemd"])).end();
    said.assert_ends(0);
    for words in [
        "systemd: containerd\nsystemd| by the default: --skip rootfs:: --skip ctr::.",
        "systemd: containerd@zfs\nsystemd| by zfs: rootfs:: ctr::.",
        "systemd: cri@zfs\nsystemd| by zfs: .",
        "systemd: cri@lxc\nsystemd| by the default on lxc: .",
        "systemd: backend_contract\nsystemd| by the default: ",
        "systemd: lxc\nsystemd| by the default: systems::",
    ] {
        assert!(said.out.contains(words), "{words:?} is not in {}", said.out);
    }
    scripts.assert_clean();
}

#[test]
fn the_lane_of_selinux_has_a_boot_of_its_own_with_a_policy() {
    let program =
        "for word; do echo \"test $word ... ok\"; done; echo \"test result: ok. 1 passed; 0 failed; 0 ignored\"";
    let scripts = with_suites(&[("backend_contract", program)]);
    scripts.program("bin/containerd", "#!/bin/sh\necho containerd x 1.7.24 y\n");
    scripts.program("bin/dd", "#!/bin/sh\n");
    let arguments = || fs::read_to_string(scripts.path("arguments")).unwrap();
    let test = |lane: &str| scripts.start(&mut scripts.script("test", &[lane])).end();
    // Without a policy no test has a label, and all would be skipped.
    scripts.program("bin/secilc", "#!/bin/sh\nexit 1\n");
    let said = test("selinux");
    said.assert_ends(1);
    assert!(said.out.contains("did not run to its end"), "{said:?}");
    scripts.program("bin/secilc", "#!/bin/sh\n");
    let said = test("selinux");
    said.assert_ends(0);
    assert!(said.out.contains("selinux| test selinux ... ok"), "{said:?}");
    assert!(arguments().contains(" security=selinux "), "{}", arguments());
    // Any other lane is for the kernel as Debian boots it.
    test("private");
    assert!(!arguments().contains("security="), "{}", arguments());
    for lanes in [["selinux", "private"], ["private", "selinux"]] {
        let said = scripts.start(&mut scripts.script("test", &lanes)).end();
        said.assert_ends(2);
        assert!(
            said.out.contains("the lane selinux is for a boot of its own"),
            "{said:?}"
        );
    }
    // What a lane cannot run it leaves out, also when it is told what to run.
    let said = scripts
        .start(&mut scripts.script("test", &["selinux", "--", "some"]))
        .end();
    said.assert_ends(0);
    assert!(
        said.out
            .contains("test some ... ok\nselinux| test --skip ... ok\nselinux| test apparmor ... ok"),
        "{said:?}"
    );
}

#[test]
fn what_runs_on_lxc_7_finds_no_other_lxc() {
    let passes =
        "for word; do echo \"test $word ... ok\"; done; echo \"test result: ok. 1 passed; 0 failed; 0 ignored\"";
    let program = format!("echo \"on ${{LXCRI_TEST_BACKEND:-any}} with $(lxc-ls --version)\"\n{passes}");
    let scripts = with_suites(&["lxc", "backend_contract"].map(|name| (name, program.as_str())));
    // 7 where it has been laid over /usr in a mount namespace of its own.
    let outside = fs::read_link("/proc/self/ns/mnt").unwrap();
    let laid = scripts.path("laid");
    scripts.program(
        "bin/mount",
        &format!(
            "#!/bin/sh\nreadlink /proc/self/ns/mnt >{}\necho \"mount $*\" >&2\n",
            laid.display()
        ),
    );
    let tool = format!(
        "#!/bin/sh\n[ \"$(readlink /proc/self/ns/mnt)\" = {} ] && echo 6.0.4 || echo 7.0.0\n",
        outside.display()
    );
    scripts.program("bin/lxc-ls", &tool);
    let said = scripts.start(&mut scripts.script("test", &["lxc-7"])).end();
    said.assert_ends(0);
    assert_ne!(fs::read_to_string(&laid).unwrap().trim_end(), outside.to_str().unwrap());
    for words in [
        "mount -t overlay lxc-7 -o ro,lowerdir=/opt/lxc-7/usr:/usr /usr\n",
        "lxc-7: lxc\n",
        "on any with 7.0.0\n",
        "lxc-7: backend_contract@lxc\n",
        "on lxc with 7.0.0\n",
    ] {
        assert!(said.out.contains(words), "{words:?} is not in {}", said.out);
    }
    scripts.assert_clean();

    // Another one than the lane is for.
    scripts.program("bin/lxc-ls", "#!/bin/sh\necho 6.0.4\n");
    let said = scripts.start(&mut scripts.script("test", &["lxc-7"])).end();
    said.assert_ends(1);
    for words in ["the lane lxc-7 is for LXC 7, and \"6.0.4\"", "did not run to its end"] {
        assert!(said.out.contains(words), "{words:?} is not in {}", said.out);
    }
    scripts.assert_clean();
}

#[test]
fn suites_that_are_not_in_time_end_with_the_summary_of_those_that_were() {
    let scripts = with_suites(&[("containerd", PASSES), ("cri", "sleep 1000")]);
    let mut command = scripts.script("test", &["containerd-2"]);
    let said = scripts.start(command.env("LXCRI_NODE_TIMEOUT", "3")).end();
    said.assert_ends(124);
    for words in ["1 passed", "containerd-2: cri", "did not run to its end", "suites  "] {
        assert!(said.out.contains(words), "{words:?} is not in {}", said.out);
    }
}

#[test]
fn no_more_lanes_run_at_once_than_there_are_processors() {
    // In the checkout, where the suites run.
    let alone = "mkdir busy || touch met\nsleep 0.05\nrmdir busy\n";
    let with = |rest: &str| {
        let program = format!("{alone}{rest}");
        let scripts =
            with_suites(&["containerd", "cri", "backend_contract", "lxc"].map(|name| (name, program.as_str())));
        scripts.program("bin/nproc", "#!/bin/sh\necho 1\n");
        scripts.program(
            "bin/containerd",
            "#!/bin/sh\ncase $PATH in /opt/containerd-2/*) v=2.1.9 ;; *) v=1.7.24 ;; esac\necho containerd x $v y\n",
        );
        scripts
    };
    let scripts =
        with("for word; do echo \"test $word ... ok\"; done; echo \"test result: ok. 1 passed; 0 failed; 0 ignored\"");
    let said = scripts
        .start(&mut scripts.script("test", &["systemd", "containerd-2"]))
        .end();
    said.assert_ends(0);
    assert!(!scripts.path("checkout/met").exists(), "{}", said.out);
    for words in [
        "systemd| ==> systemd: backend_contract",
        "containerd-2| ==> containerd-2: cri",
    ] {
        assert!(said.out.contains(words), "{words:?} is not in {}", said.out);
    }
    scripts.assert_clean();

    // One that waits for its turn has not run when the time is up.
    let scripts = with("sleep 1000");
    let mut command = scripts.script("test", &["systemd", "containerd-2"]);
    let said = scripts.start(command.env("LXCRI_NODE_TIMEOUT", "3")).end();
    said.assert_ends(124);
    assert!(!said.out.contains("==> containerd-2"), "{}", said.out);
    assert_eq!(said.out.matches("did not run to its end").count(), 9, "{}", said.out);
}

#[test]
fn an_interrupted_test_ends_its_run() {
    for (signal, group) in [
        (Signal::SIGINT, true),
        (Signal::SIGTERM, false),
        (Signal::SIGTERM, true),
    ] {
        let scripts = Scripts::new();
        scripts.program("bin/cargo", CARGO);
        scripts.program("bin/strip", "#!/bin/sh\n");
        let test = scripts.start(scripts.script("test", &[]).env("FAKE", "hangs-in-boot"));
        until("the boot begins", || scripts.path("begun").exists());
        send(&test, signal, group);
        let said = test.end();
        assert!(said.status == 130 || said.status == 143, "{said:?}");
        scripts.eventually_no_process();
        scripts.assert_clean();
    }
}

#[track_caller]
fn assert_console_kept(said: &Said, folder: &Path) {
    let name = said
        .err
        .lines()
        .find_map(|line| line.strip_prefix("node: the guest's console is kept in "));
    let name = Path::new(name.unwrap_or_else(|| panic!("{said:?}")));
    assert_eq!(name.parent(), Some(folder));
    assert_eq!(fs::read_to_string(name).unwrap(), "words of the guest\n");
}

fn send(running: &Running, signal: Signal, group: bool) {
    let pid = running.pid().as_raw();
    kill(Pid::from_raw(if group { -pid } else { pid }), signal).unwrap();
}
