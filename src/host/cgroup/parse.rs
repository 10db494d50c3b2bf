//! The texts of the kernel, as pure functions: `/proc/<pid>/cgroup`, `/proc/<pid>/mountinfo` and the files of a cgroup; and the
//! rule by which crun turns a `cgroupsPath` into a folder.
//!
//! Nothing here panics or fails on a text that the kernel would not write: a line that cannot be parsed is skipped. What the texts
//! say may come from inside a container (names of cgroups, of devices), so it is hostile.

use std::path::{Component, Path, PathBuf};

use crate::error::{Error, Result};

/// One line of `/proc/<pid>/cgroup`: where a process lies in one hierarchy (cgroups(7)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Membership<'a> {
    /// The hierarchy's controllers, joined by commas, or `name=…`; empty for cgroup v2.
    pub controllers: &'a str,
    /// The path from the root of the hierarchy as the reader's cgroup namespace sees it.
    pub path: &'a str,
}

/// The memberships of a process, in the kernel's order.
pub fn memberships(text: &str) -> impl Iterator<Item = Membership<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':');
        let hierarchy: u32 = fields.next()?.parse().ok()?;
        let (controllers, path) = (fields.next()?, fields.next()?);
        // Hierarchy 0 is cgroup v2 and has no list; every other one has.
        ((hierarchy == 0) == controllers.is_empty() && path.starts_with('/'))
            .then_some(Membership { controllers, path })
    })
}

/// One line of `/proc/<pid>/mountinfo` (proc_pid_mountinfo(5)), as far as cgroups need it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount<'a> {
    /// What of the file system is mounted, octal escapes decoded.
    pub root: PathBuf,
    /// Where, octal escapes decoded.
    pub point: PathBuf,
    /// "cgroup", "cgroup2", "tmpfs", …
    pub fs_type: &'a str,
    /// The super block's options; those of a cgroup v1 name its controllers.
    pub options: &'a str,
}

impl Mount<'_> {
    /// Whether this is the cgroup v1 hierarchy that a [`Membership`] calls `controllers`.
    pub fn has_controllers(&self, controllers: &str) -> bool {
        self.fs_type == "cgroup"
            && !controllers.is_empty()
            && controllers
                .split(',')
                .all(|controller| self.options.split(',').any(|option| option == controller))
    }
}

/// The mounts of a mountinfo, in the kernel's order.
pub fn mounts(text: &str) -> impl Iterator<Item = Mount<'_>> {
    text.lines().filter_map(|line| {
        let (front, back) = line.split_once(" - ")?;
        let mut front = front.split(' ').skip(3);
        let (root, point) = (unescape(front.next()?), unescape(front.next()?));
        let mut back = back.split(' ');
        let fs_type = back.next()?;
        let options = back.nth(1)?;
        (root.is_absolute() && point.is_absolute()).then_some(Mount {
            root,
            point,
            fs_type,
            options,
        })
    })
}

/// Decodes the octal escapes (`\040` is a space) that the kernel writes into mountinfo; what is no escape stays as it is.
pub fn unescape(text: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;

    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let [first, tail @ ..] = rest {
        if let (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..]) = (*first, tail) {
            out.push(((a - b'0') << 6) | ((b - b'0') << 3) | (c - b'0'));
            rest = after;
        } else {
            out.push(*first);
            rest = tail;
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(out))
}

/// Where the folder of `path` is when `root` of its hierarchy is mounted on `point`; `None` if it cannot be seen there.
pub fn folder_in(root: &Path, point: &Path, path: &str) -> Option<PathBuf> {
    let below = Path::new(path).strip_prefix(root).ok()?;
    // A path above our cgroup namespace's root reads `/../…`.
    below
        .components()
        .all(|part| matches!(part, Component::Normal(_)))
        .then(|| point.join(below))
}

/// A path below a hierarchy's root that names a cgroup: absolute or relative, made relative, empty parts dropped. Empty when it
/// names the root itself.
///
/// # Errors
/// `InvalidArgument` for `..`, NUL, a line break, or a part of more than 255 bytes.
pub fn relative(path: &str) -> Result<PathBuf> {
    let bad = path.contains(['\0', '\n']) || path.split('/').any(|part| part == ".." || part.len() > 255);
    if bad {
        return Err(Error::invalid(format!(
            "invalid cgroup path {path:?}: no \"..\", no NUL, no line break, parts of at most 255 bytes"
        )));
    }
    Ok(path
        .split('/')
        .filter(|part| !part.is_empty() && *part != ".")
        .collect())
}

/// Where crun puts the container `id`, relative to the mount point of a hierarchy (crun 1.8.1, libcrun/cgroup-cgroupfs.c and
/// cgroup-systemd.c). `None` when the path names the root of the hierarchy, which is nobody's.
///
/// With `systemd` the form is `slice:prefix:name`, and the answer is the scope; below it crun makes a further cgroup `container` on
/// v2.
///
/// # Errors
/// `InvalidArgument` for a path that leaves the hierarchy, and for a slice or scope that systemd would refuse.
pub fn container_path(cgroups_path: Option<&str>, systemd: bool, id: &str) -> Result<Option<PathBuf>> {
    let path = match cgroups_path {
        _ if id.contains('/') => return Err(Error::invalid(format!("invalid container id {id:?}: contains \"/\""))),
        path if systemd => systemd_path(path.unwrap_or_default(), id)?,
        Some(path) => relative(path)?,
        None => relative(id)?,
    };
    Ok(Some(path).filter(|path| !path.as_os_str().is_empty()))
}

fn systemd_path(path: &str, id: &str) -> Result<PathBuf> {
    let (scope, slice) = systemd_units(path, id);
    if scope.contains('/') {
        return Err(Error::invalid(format!(
            "invalid systemd cgroup path {path:?}: a scope's name contains no \"/\""
        )));
    }
    Ok(slice_path(slice)?.join(relative(&scope)?))
}

/// The scope and the slice that a path of the form `slice:prefix:name` names, as crun reads it, whether systemd takes the names or
/// not.
pub(in crate::host) fn systemd_units<'a>(path: &'a str, id: &str) -> (String, &'a str) {
    let (slice, scope) = if path.is_empty() {
        // No slice is asked for: systemd's own default.
        ("", format!("crun-{id}"))
    } else {
        let (slice, unit) = path.split_once(':').unwrap_or((path, path));
        (slice, unit.replacen(':', "-", 1))
    };
    let slice = if slice.is_empty() { "system.slice" } else { slice };
    (format!("{scope}.scope"), slice)
}

/// The folders of a slice: `a-b.slice` lies in `a.slice` (systemd.slice(5)); `-.slice` is the root.
///
/// # Errors
/// `InvalidArgument` for a name that systemd would refuse.
pub fn slice_path(slice: &str) -> Result<PathBuf> {
    let invalid = || Error::invalid(format!("invalid systemd slice {slice:?}: not of the form a-b.slice"));
    let name = slice.strip_suffix(".slice").ok_or_else(invalid)?;
    if name == "-" {
        return Ok(PathBuf::new());
    }
    if name.contains('/') || name.split('-').any(str::is_empty) {
        return Err(invalid());
    }
    let ends = name.match_indices('-').map(|(at, _)| at).chain([name.len()]);
    let path: Vec<String> = ends.map(|end| format!("{}.slice", &name[..end])).collect();
    relative(&path.join("/"))
}

/// A file with one number: `max` is `u64::MAX`, a negative number (v1's "no limit") 0 as in containerd/cgroups.
pub fn number(text: &str) -> Option<u64> {
    match text.trim() {
        "max" => Some(u64::MAX),
        text => match text.parse::<u64>() {
            Ok(value) => Some(value),
            Err(_) => text.parse::<i64>().ok().map(|_| 0),
        },
    }
}

/// A flat keyed file (`memory.stat`, `cpu.stat`, `cgroup.events`, `memory.oom_control`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Keyed<'a>(Vec<(&'a str, u64)>);

impl<'a> Keyed<'a> {
    /// Parses `key number` lines.
    pub fn parse(text: &'a str) -> Self {
        let pairs = text.lines().filter_map(|line| {
            let mut fields = line.split_ascii_whitespace();
            let (key, value) = (fields.next()?, number(fields.next()?)?);
            fields.next().is_none().then_some((key, value))
        });
        Self(pairs.collect())
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<u64> {
        self.0.iter().find(|(name, _)| *name == key).map(|(_, value)| *value)
    }

    /// The value of a key, 0 if it is not there.
    pub fn or_zero(&self, key: &str) -> u64 {
        self.get(key).unwrap_or_default()
    }
}

/// The pids of a `cgroup.procs`, unsorted. Pid 0, which the kernel shows for a process outside the reader's pid namespace, is left
/// out: nobody may ever signal it.
pub fn pids(text: &str) -> impl Iterator<Item = u32> + '_ {
    text.lines()
        .filter_map(|line| line.trim().parse().ok())
        .filter(|pid| *pid > 0 && i32::try_from(*pid).is_ok())
}

/// One line of a v1 `blkio` statistics file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlkioLine<'a> {
    /// Device number, major.
    pub major: u64,
    /// Device number, minor.
    pub minor: u64,
    /// "Read", "Write", "Sync", …; empty in files without operations.
    pub op: &'a str,
    /// Bytes, operations, nanoseconds or sectors, as the file says.
    pub value: u64,
}

/// The lines `major:minor [op] value`; the sum in the last line is left out.
pub fn blkio(text: &str) -> impl Iterator<Item = BlkioLine<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let (major, minor) = device_number(fields.next()?)?;
        let (op, value) = match (fields.next()?, fields.next()) {
            (op, Some(value)) => (op, value),
            (value, None) => ("", value),
        };
        fields.next().is_none().then_some(())?;
        Some(BlkioLine {
            major,
            minor,
            op,
            value: value.parse().ok()?,
        })
    })
}

fn device_number(text: &str) -> Option<(u64, u64)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// One device of v2's `io.stat`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IoLine {
    /// Device number, major.
    pub major: u64,
    /// Device number, minor.
    pub minor: u64,
    /// Bytes read.
    pub rbytes: u64,
    /// Bytes written.
    pub wbytes: u64,
    /// Read operations.
    pub rios: u64,
    /// Write operations.
    pub wios: u64,
}

/// The lines `major:minor key=value …`; unknown keys are skipped, and so is a device without any known one.
pub fn io_stat(text: &str) -> impl Iterator<Item = IoLine> + '_ {
    text.lines().filter_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let (major, minor) = device_number(fields.next()?)?;
        let mut io = IoLine {
            major,
            minor,
            ..IoLine::default()
        };
        let mut known = false;
        for (key, value) in fields.filter_map(|field| field.split_once('=')) {
            let slot = match key {
                "rbytes" => &mut io.rbytes,
                "wbytes" => &mut io.wbytes,
                "rios" => &mut io.rios,
                "wios" => &mut io.wios,
                _ => continue,
            };
            if let Ok(value) = value.parse() {
                *slot = value;
                known = true;
            }
        }
        known.then_some(io)
    })
}

/// One device of `rdma.current` or `rdma.max`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RdmaLine<'a> {
    /// The device's name.
    pub device: &'a str,
    /// HCA handles; `max` is `u32::MAX`.
    pub hca_handles: u32,
    /// HCA objects; `max` is `u32::MAX`.
    pub hca_objects: u32,
}

/// The lines `device hca_handle=… hca_object=…`.
pub fn rdma(text: &str) -> impl Iterator<Item = RdmaLine<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let mut rdma = RdmaLine {
            device: fields.next()?,
            hca_handles: 0,
            hca_objects: 0,
        };
        let mut known = false;
        for (key, value) in fields.filter_map(|field| field.split_once('=')) {
            let slot = match key {
                "hca_handle" => &mut rdma.hca_handles,
                "hca_object" => &mut rdma.hca_objects,
                _ => continue,
            };
            *slot = match value {
                "max" => u32::MAX,
                value => match value.parse() {
                    Ok(value) => value,
                    Err(_) => continue,
                },
            };
            known = true;
        }
        known.then_some(rdma)
    })
}

/// One line of a `*.pressure` file.
#[derive(Debug, Clone, PartialEq)]
pub struct PressureLine<'a> {
    /// "some" or "full".
    pub share: &'a str,
    /// Percent of the last 10 s, 60 s and 300 s.
    pub averages: [f64; 3],
    /// Stalled time, microseconds.
    pub total: u64,
}

/// The lines `some|full avg10=… avg60=… avg300=… total=…`.
pub fn pressure(text: &str) -> impl Iterator<Item = PressureLine<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let share = fields.next()?;
        let mut value = |key: &str| fields.next()?.strip_prefix(key)?.strip_prefix('=');
        let mut average = |key: &str| value(key)?.parse::<f64>().ok().filter(|value| value.is_finite());
        let averages = [average("avg10")?, average("avg60")?, average("avg300")?];
        let total = value("total")?.parse().ok()?;
        Some(PressureLine { share, averages, total })
    })
}

/// The name of `/proc/partitions` for a device number.
pub fn partition(text: &str, major: u64, minor: u64) -> Option<&str> {
    text.lines().find_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let this = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        (this == (major, minor)).then(|| fields.nth(1)).flatten()
    })
}

/// The size in the names of the hugetlb files (`2MB`) for a name in `/sys/kernel/mm/hugepages` (`hugepages-2048kB`).
pub fn huge_page_size(name: &str) -> Option<String> {
    let kib: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
    Some(match kib {
        0..0x400 => format!("{kib}KB"),
        0x400..0x10_0000 => format!("{}MB", kib >> 10),
        _ => format!("{}GB", kib >> 20),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HYBRID: &str = include_str!("fixtures/mountinfo-hybrid");

    #[test]
    fn memberships_are_read_as_the_kernel_writes_them() {
        let text = "12:cpu,cpuacct:/a\n1:name=systemd:/b:c d\n0::/e\nnonsense\n3::/no list\n0:pids:/v2 with a list\n4:pids:relative\n";
        let found: Vec<_> = memberships(text).map(|m| (m.controllers, m.path)).collect();
        assert_eq!(found, [("cpu,cpuacct", "/a"), ("name=systemd", "/b:c d"), ("", "/e")]);
    }

    #[test]
    fn mounts_are_read_with_their_optional_fields_and_escapes() {
        let text = "36 35 98:0 /mnt1 /a\\040b\\134 rw,noatime shared:1 master:2 - cgroup my\\040src rw,cpu,cpuacct\n";
        let found: Vec<_> = mounts(text).collect();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].point, Path::new("/a b\\"));
        assert_eq!(found[0].root, Path::new("/mnt1"));
        assert!(found[0].has_controllers("cpuacct,cpu"));
        assert!(!found[0].has_controllers("cpu,memory"));
        assert!(!found[0].has_controllers(""));
        assert_eq!(mounts(HYBRID).filter(|mount| mount.fs_type == "cgroup").count(), 9);
        assert_eq!(mounts(HYBRID).filter(|mount| mount.fs_type == "cgroup2").count(), 1);
    }

    #[test]
    fn a_path_that_a_mount_does_not_show_has_no_folder() {
        let folder = |root: &str, path: &str| folder_in(Path::new(root), Path::new("/m"), path);
        assert_eq!(folder("/", "/a/b"), Some("/m/a/b".into()));
        assert_eq!(folder("/docker/x", "/docker/x/y"), Some("/m/y".into()));
        assert_eq!(folder("/docker/x", "/docker/xy"), None);
        assert_eq!(folder("/", "/../other"), None);
    }

    #[test]
    fn crun_puts_containers_where_we_expect_them() {
        let at = |path, systemd| container_path(path, systemd, "id").map_err(|e| e.kind());
        let some = |path: &str| Ok(Some(PathBuf::from(path)));
        let invalid = Err(crate::error::Kind::InvalidArgument);
        // (cgroupsPath, systemd, folder)
        assert_eq!(at(None, false), some("id"));
        assert_eq!(at(Some("/k8s.io/x"), false), some("k8s.io/x"));
        assert_eq!(at(Some("rel//x/"), false), some("rel/x"));
        assert_eq!(at(Some("a.slice:cri:x"), false), some("a.slice:cri:x"));
        assert_eq!(at(Some(""), false), Ok(None));
        assert_eq!(at(Some("/"), false), Ok(None));
        assert_eq!(at(Some("/a/../b"), false), invalid);
        assert_eq!(at(Some("/a\0"), false), invalid);
        assert_eq!(at(None, true), some("system.slice/crun-id.scope"));
        assert_eq!(at(Some(""), true), some("system.slice/crun-id.scope"));
        assert_eq!(
            at(Some("kubepods-burstable-pod1.slice:cri-containerd:x"), true),
            some("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-x.scope")
        );
        assert_eq!(at(Some("a.slice:x"), true), some("a.slice/x.scope"));
        assert_eq!(at(Some("a.slice:p:x:y"), true), some("a.slice/p-x:y.scope"));
        assert_eq!(at(Some("-.slice:p:x"), true), some("p-x.scope"));
        assert_eq!(at(Some(":p:x"), true), some("system.slice/p-x.scope"));
        assert_eq!(at(Some("a.slice:p:../x"), true), invalid);
        assert_eq!(at(Some("a/b.slice:p:x"), true), invalid);
        assert_eq!(at(Some("a--b.slice:p:x"), true), invalid);
        assert_eq!(at(Some("/not/systemd"), true), invalid);
        assert!(container_path(None, false, "a/b").is_err());
        assert!(container_path(None, false, "..").is_err());
    }

    #[test]
    fn numbers_are_what_containerd_takes_them_for() {
        assert_eq!(number("12\n"), Some(12));
        assert_eq!(number("max\n"), Some(u64::MAX));
        assert_eq!(number("-1"), Some(0));
        assert_eq!(number("12 13"), None);
        assert_eq!(number(""), None);
    }

    #[test]
    fn lines_that_cannot_be_parsed_are_skipped() {
        let stat = Keyed::parse("a 1\nb\nc x\nd 2 3\ne 4\n");
        assert_eq!(
            [
                stat.get("a"),
                stat.get("b"),
                stat.get("c"),
                stat.get("d"),
                stat.get("e")
            ],
            [Some(1), None, None, None, Some(4)]
        );
        let lines: Vec<_> = blkio("8:0 Read 5\n8:0 7\nTotal 12\n8 0 Read 1\n8:0 Read 1 2\n").collect();
        assert_eq!(
            lines
                .iter()
                .map(|l| (l.major, l.minor, l.op, l.value))
                .collect::<Vec<_>>(),
            [(8, 0, "Read", 5), (8, 0, "", 7)]
        );
        let io: Vec<_> = io_stat("254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5\n254:1 \n254:x rbytes=1\n").collect();
        assert_eq!(io.len(), 1);
        assert_eq!((io[0].rbytes, io[0].wbytes, io[0].rios, io[0].wios), (1, 2, 3, 4));
        let found: Vec<_> = rdma("mlx4_0 hca_handle=2 hca_object=max\nocrdma1 hca_handle=x\n\n").collect();
        assert_eq!(found.len(), 1);
        assert_eq!(
            (found[0].device, found[0].hca_handles, found[0].hca_objects),
            ("mlx4_0", 2, u32::MAX)
        );
        let psi: Vec<_> = pressure("some avg10=0.10 avg60=1.00 avg300=2.50 total=99\nfull avg10=x\n").collect();
        assert_eq!(psi.len(), 1);
        assert_eq!(
            (psi[0].share, psi[0].averages, psi[0].total),
            ("some", [0.1, 1.0, 2.5], 99)
        );
    }

    #[test]
    fn a_process_outside_our_pid_namespace_is_nobody() {
        assert_eq!(pids("0\n12\n-1\n4294967295\nx\n7\n").collect::<Vec<_>>(), [12, 7]);
    }

    #[test]
    fn devices_and_page_sizes_get_their_names() {
        let partitions = "major minor  #blocks  name\n\n 254        0  268435456 vda\n 8 16 1 sdb\n";
        assert_eq!(partition(partitions, 8, 16), Some("sdb"));
        assert_eq!(partition(partitions, 8, 17), None);
        let size = |name| huge_page_size(name);
        assert_eq!(size("hugepages-2048kB").as_deref(), Some("2MB"));
        assert_eq!(size("hugepages-1048576kB").as_deref(), Some("1GB"));
        assert_eq!(size("hugepages-64kB").as_deref(), Some("64KB"));
        assert_eq!(size("2048kB"), None);
    }

    fn escape(path: &str) -> String {
        path.bytes()
            .map(|byte| match byte {
                b' ' | b'\t' | b'\n' | b'\\' => format!("\\{byte:03o}"),
                byte => (byte as char).to_string(),
            })
            .collect()
    }

    proptest! {
        #[test]
        fn no_text_makes_a_parser_panic(text in "(?s).{0,200}") {
            let _ = memberships(&text).count();
            let _ = mounts(&text).count();
            let _ = unescape(&text);
            let _ = folder_in(Path::new("/"), Path::new("/m"), &text);
            let _ = Keyed::parse(&text).get("x");
            let _ = (pids(&text).count(), blkio(&text).count(), io_stat(&text).count());
            let _ = (rdma(&text).count(), pressure(&text).count(), partition(&text, 1, 1));
            let _ = (number(&text), huge_page_size(&text));
        }

        #[test]
        fn no_text_of_the_right_letters_makes_a_parser_panic(text in "[0-9a-z:/=., \\\\\n-]{0,200}") {
            let _ = memberships(&text).count();
            let _ = mounts(&format!("1 2 3 {text} - {text}")).count();
            let _ = unescape(&text);
            let _ = (pids(&text).count(), blkio(&text).count(), io_stat(&text).count());
            let _ = (rdma(&text).count(), pressure(&text).count(), partition(&text, 1, 1));
        }

        #[test]
        fn no_path_leads_out_of_the_hierarchy(path in "[a-c.:/\0\n-]{0,40}(\\.slice)?[a-c.:/-]{0,20}", id in "[a-z./]{1,10}", systemd: bool) {
            for path in [Some(path.as_str()), None] {
                if let Ok(Some(path)) = container_path(path, systemd, &id) {
                    prop_assert!(!path.as_os_str().is_empty());
                    prop_assert!(path.components().all(|part| matches!(part, Component::Normal(_))));
                }
            }
            if let Some(folder) = folder_in(Path::new("/"), Path::new("/m"), &path) {
                prop_assert!(folder.starts_with("/m"));
                prop_assert!(folder.components().all(|part| part != Component::ParentDir));
            }
        }

        #[test]
        fn escapes_are_undone(path in "/[ -~\t\n]{0,40}") {
            prop_assert_eq!(unescape(&escape(&path)), PathBuf::from(path));
        }

        #[test]
        fn memberships_come_back(lines in proptest::collection::vec(("[a-z,=]{1,12}", "/[ -~]{0,30}"), 0..12)) {
            let text: String = lines.iter().enumerate().map(|(i, (c, p))| format!("{}:{c}:{p}\n", i + 1)).collect();
            let found: Vec<_> = memberships(&text).map(|m| (m.controllers.to_owned(), m.path.to_owned())).collect();
            prop_assert_eq!(found, lines);
        }

        #[test]
        fn keyed_values_come_back(pairs in proptest::collection::btree_map("[a-z_]{1,20}", any::<u64>(), 0..40)) {
            let text: String = pairs.iter().map(|(key, value)| format!("{key} {value}\n")).collect();
            let stat = Keyed::parse(&text);
            for (key, value) in &pairs {
                prop_assert_eq!(stat.get(key), Some(*value));
            }
        }
    }
}
