//! What is there before and after: processes, mounts, cgroups, sockets, fifos, files, network namespaces, LXC's containers.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
    sync::LazyLock,
    time::{Duration, Instant},
};

use super::{
    patience::{patience, pause},
    universe,
};

/// Our runtime type.
pub(crate) const OURS: &str = "io.containerd.proxmox-lxcri.v1";
/// Where LXC has its containers.
pub(crate) const LXC_PATH: &str = "/var/lib/lxc";

/// How long leftovers may take to go by themselves: containerd removes snapshots' mounts and reaps shims in the background.
static SETTLE: LazyLock<Duration> = LazyLock::new(|| patience(15));

/// Everything in the universe that a container could leave behind, at one moment.
#[derive(Debug)]
pub(crate) struct Baseline {
    found: BTreeSet<String>,
    ignored: Vec<PathBuf>,
}

impl Baseline {
    /// Takes stock. Files below the folders `ignored` do not count (containerd's content store, database and snapshots, which are
    /// collected when its garbage collector likes to).
    pub(crate) fn take(ignored: &[PathBuf]) -> Self {
        Self {
            found: stock(ignored),
            ignored: ignored.to_vec(),
        }
    }

    /// What is there now and was not before.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        stock(&self.ignored).difference(&self.found).cloned().collect()
    }

    /// Waits, bounded, until nothing is left that was not there before and does not begin with one of `tolerated`.
    ///
    /// # Panics
    /// Naming each leftover.
    pub(crate) fn assert_nothing_left(&self, tolerated: &[String]) {
        let end = Instant::now() + *SETTLE;
        loop {
            let mut left = self.leftovers();
            left.retain(|thing| !tolerated.iter().any(|prefix| thing.starts_with(prefix)));
            if left.is_empty() {
                return;
            }
            if Instant::now() > end {
                panic!("left behind:\n  {}", left.join("\n  "));
            }
            std::thread::sleep(pause());
        }
    }

    /// Takes away what is there now and was not before, as far as it can: a test that failed is not to fail those after it.
    pub(crate) fn clear_away(&self) {
        let before = |process: &Process| process.is_the_daemon() || self.found.contains(&process.to_string());
        kill_all(|process| !before(process), || ());
        let left = self.leftovers();
        let of = |kind: &str| {
            let kind = format!("{kind} ");
            left.iter()
                .filter_map(move |thing| thing.strip_prefix(&kind).map(str::to_string))
        };
        // Only where nothing was mounted before: what is told of a mount can change without it.
        let target = |mount: &str| mount.split(" (").next().unwrap_or_default().to_string();
        let mounts = self.found.iter().filter_map(|thing| thing.strip_prefix("mount "));
        let known: BTreeSet<_> = mounts.map(target).collect();
        let new = |target: &String| is_the_tests(target) && !known.contains(target);
        for target in of("mount").map(|mount| target(&mount)).filter(new) {
            let target = std::ffi::CString::new(target).unwrap_or_default();
            // SAFETY: a valid C string.
            unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
        }
        for cgroup in universe::cgroups_named(&universe::token()) {
            if left.contains(&format!("cgroup {}", cgroup.display())) {
                let _ = fs::remove_dir(cgroup);
            }
        }
        // Abstract sockets go with whoever holds them.
        let ours = |path: &String| path.starts_with('/') && !is_systemds(Path::new(path));
        for file in ["socket", "fifo", "file"].into_iter().flat_map(of).filter(ours) {
            let _ = fs::remove_file(file);
        }
        let mut folders: Vec<_> = of("folder").filter(ours).collect();
        folders.sort_unstable();
        for folder in folders.iter().rev() {
            let _ = fs::remove_dir(folder);
        }
    }
}

/// Kills the processes of the universe that `chosen` picks until none of them lives any more, for a bounded time. `reap` is called
/// again and again meanwhile.
pub(crate) fn kill_all(chosen: impl Fn(&Process) -> bool, mut reap: impl FnMut()) {
    let end = Instant::now() + *SETTLE;
    loop {
        universe::thaw();
        let mut left = processes();
        left.retain(|process| process.pid != 1 && process.pid != std::process::id() && chosen(process));
        for process in &left {
            // SAFETY: every process of the private pid namespace was started by the tests; so was what a machine of the tests' own has
            // besides its units.
            unsafe { libc::kill(process.pid as i32, libc::SIGKILL) };
        }
        reap();
        if left.iter().all(|process| process.command.ends_with(" Z]")) || Instant::now() > end {
            return;
        }
        std::thread::sleep(pause());
    }
}

fn stock(ignored: &[PathBuf]) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for process in processes() {
        // It may be another one now: tests restart it.
        if !process.is_the_daemon() {
            found.insert(process.to_string());
        }
    }
    for line in read("/proc/self/mountinfo").lines() {
        let mut fields = line.split(' ');
        let target = fields.nth(4).unwrap_or_default();
        let mut kind = line.split(" - ").nth(1).unwrap_or_default();
        if kind.starts_with("cgroup2 ") {
            // Its options belong to the machine, not to a mount: the last one to mount it anywhere sets them, and CRIU does.
            kind = "cgroup2";
        }
        // Whoever made it private would cut the machine's other namespaces off from it.
        let shared = if fields.any(|field| field.starts_with("shared:")) {
            ", shared"
        } else {
            ""
        };
        found.insert(format!("mount {target} ({kind}{shared})"));
    }
    for cgroup in universe::cgroups_named(&universe::token()) {
        found.insert(format!("cgroup {}", cgroup.display()));
    }
    // The machine's: a container's user who owned it could take it from everybody.
    if let Ok(null) = fs::metadata("/dev/null") {
        found.insert(format!("owner {} of /dev/null", null.uid()));
    }
    for socket in abstract_sockets() {
        found.insert(format!("socket {socket}"));
    }
    let mut ignored = ignored.to_vec();
    // What CRIU has learned about the kernel, for the next time.
    ignored.push("/run/criu.kdat".into());
    if universe::by_systemd() {
        ignored.extend(SYSTEMDS.map(PathBuf::from));
        // Scopes and slices that it made for containers.
        files(Path::new("/run/systemd/transient"), &[], &mut found);
        found.retain(|thing| !(thing.starts_with("file /run/systemd/transient/") && thing.ends_with(".service")));
    }
    for folder in ["/run", "/var/lib/cni", LXC_PATH] {
        files(Path::new(folder), &ignored, &mut found);
    }
    found
}

/// Whether a mount at `target` belongs to a test, and not to the universe.
pub(crate) fn is_the_tests(target: &str) -> bool {
    let below = |folder: &str| target.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/'));
    (below("/run") || below(LXC_PATH)) && !is_systemds(Path::new(target))
}

/// The abstract sockets of LXC's containers, as the kernel writes them. Where a path is too long for one, LXC takes a hash of it:
/// "@lxc/…".
pub(crate) fn abstract_sockets() -> BTreeSet<String> {
    let text = read("/proc/net/unix");
    let names = text.lines().filter_map(|line| line.split_whitespace().nth(7));
    let lxcs = |name: &&str| name.starts_with("@/var/lib/lxc") || name.starts_with("@lxc/");
    names.filter(lxcs).map(str::to_string).collect()
}

/// What is in `/run` of a machine that systemd runs, and is not the tests'.
const SYSTEMDS: [&str; 9] = [
    "/run/systemd",
    "/run/udev",
    "/run/dbus",
    "/run/log",
    "/run/user",
    "/run/credentials",
    "/run/lock",
    "/run/mount",
    "/run/blkid",
];

/// Whether `path` is below what systemd has in `/run`.
pub(crate) fn is_systemds(path: &Path) -> bool {
    universe::by_systemd() && SYSTEMDS.iter().any(|folder| path.starts_with(folder))
}

/// Takes out of the processes of a machine that systemd runs those that are none of these tests': the kernel's, and what descends from
/// another unit, in its cgroup or not. Other tests that run at the same time in namespaces of their own are units as well.
fn retain_the_tests(all: &mut Vec<Process>) {
    // Asked time and again.
    static OWN: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    let own = OWN.get_or_init(|| unit_of("self"));
    let is_the_machines = |process: &Process| {
        let kernels = process.pid == 2 || process.parent == 2;
        let others = |unit: String| unit != "containerd.service" && Some(&unit) != own.as_ref();
        kernels || unit_of(&process.pid.to_string()).is_some_and(others)
    };
    let parents: HashMap<u32, u32> = all.iter().map(|process| (process.pid, process.parent)).collect();
    let machines: HashSet<u32> = all
        .iter()
        .filter(|one| is_the_machines(one))
        .map(|one| one.pid)
        .collect();
    all.retain(|process| {
        let mut line = std::iter::successors(Some(process.pid), |pid| parents.get(pid).copied());
        // systemd is everybody's ancestor. Where a parent has ended meanwhile, so that the line does not lead there, it is not known
        // whose process this is.
        process.pid != 1 && line.find(|pid| *pid == 1 || machines.contains(pid)) == Some(1)
    });
}

/// The unit of systemd that a process belongs to; `None` for what is in a slice of its own, as pods are.
fn unit_of(pid: &str) -> Option<String> {
    let text = read(format!("/proc/{pid}/cgroup"));
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    let mut parts = path.trim_start_matches('/').split('/');
    match (parts.next(), parts.next()) {
        (Some("system.slice"), Some(unit)) => Some(unit.into()),
        (Some(unit @ ("init.scope" | "user.slice")), _) => Some(unit.into()),
        _ => None,
    }
}

fn files(folder: &Path, ignored: &[PathBuf], found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if ignored.contains(&path) {
            continue;
        }
        let Ok(kind) = entry.file_type() else { continue };
        let name = match kind {
            kind if kind.is_socket() => "socket",
            kind if kind.is_fifo() => "fifo",
            kind if kind.is_dir() => "folder",
            _ => "file",
        };
        found.insert(format!("{name} {}", path.display()));
        if kind.is_dir() {
            files(&path, ignored, found);
        }
    }
}

/// A process of the universe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    pub(crate) parent: u32,
    /// Arguments joined by blanks, or the name in brackets when there are none.
    pub(crate) command: String,
}

impl Process {
    /// The name of its program.
    pub(crate) fn program(&self) -> &str {
        let path = self.command.split(' ').next().unwrap_or_default();
        path.rsplit('/').next().unwrap_or_default()
    }

    fn first_argument(&self) -> Option<&str> {
        self.command.split(' ').nth(1)
    }

    /// Whether it is the tests' containerd.
    fn is_the_daemon(&self) -> bool {
        self.program() == "containerd" && self.first_argument() == Some("--config")
    }

    /// Whether it is a shim, as containerd starts them, and not another process that the program of one becomes, such as LXC's monitor.
    pub(crate) fn is_a_shim(&self) -> bool {
        self.program().starts_with("containerd-shim-") && self.first_argument() == Some("-namespace")
    }
}

impl std::fmt::Display for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "process {} {}", self.pid, self.command)
    }
}

/// Every process of the universe (all of them were started by the tests).
pub(crate) fn processes() -> Vec<Process> {
    let mut all = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // stat: "pid (name) state ppid …"; the name may hold blanks and brackets.
        let stat = read(entry.path().join("stat"));
        let Some((head, tail)) = stat.rsplit_once(')') else {
            continue;
        };
        let parent = tail.split_whitespace().nth(1).and_then(|p| p.parse().ok()).unwrap_or(0);
        let arguments = read(entry.path().join("cmdline")).replace('\0', " ");
        let command = if arguments.is_empty() {
            let state = tail.split_whitespace().next().unwrap_or_default();
            format!("[{} {state}]", head.split_once('(').map_or("", |(_, name)| name))
        } else {
            arguments.trim_end().to_string()
        };
        all.push(Process { pid, parent, command });
    }
    if universe::by_systemd() {
        retain_the_tests(&mut all);
    }
    all
}

/// The shims of `runtime` (such as `io.containerd.runc.v2`) that run in the universe.
pub(crate) fn shims(runtime: &str) -> Vec<Process> {
    let program = shim_program(runtime);
    let mut shims = processes();
    shims.retain(|process| process.program() == program && process.is_a_shim());
    shims
}

/// The program that containerd runs for a runtime type: `io.containerd.runc.v2` → `containerd-shim-runc-v2`.
pub(crate) fn shim_program(runtime: &str) -> String {
    let mut parts = runtime.rsplit('.');
    let (version, name) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    format!("containerd-shim-{name}-{version}")
}

/// The number of descriptors that a process has open.
pub(crate) fn open_descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, |entries| entries.count())
}

fn read(path: impl AsRef<Path>) -> String {
    fs::read(path).map_or_else(|_| String::new(), |bytes| String::from_utf8_lossy(&bytes).into_owned())
}
