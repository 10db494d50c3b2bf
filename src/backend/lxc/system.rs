//! System containers: those whose first program is the init of a whole system, which makes services and expects a machine.
//!
//! A container is one when its program is an init that is known here, as root and as number 1 of a pid namespace of its own. Nobody has
//! to say so, and a program that is merely called by another name is an application, which gets what its bundle says and nothing else.
//! Pure, but for [`Init::of_bundle`], which looks into the root file system.

use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::{Path, PathBuf},
};

use oci_spec::runtime::{Capability, LinuxNamespaceBuilder, LinuxNamespaceType, Spec};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Context, Error, Result},
    rootfs::mount::find,
};

/// glibc's, with which these inits are built; the kernel's is two less.
const SIGRTMIN: i32 = 34;

/// The inits that are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Init {
    /// systemd(1).
    Systemd,
    /// openrc-init(8). Where OpenRC is run by another init, it is that one.
    OpenRc,
    /// `init` of busybox, as Alpine has it.
    Busybox,
    /// init(8) of sysvinit.
    SysV,
}

/// A tmpfs that a system expects to find or to be allowed to mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tmpfs {
    /// Absolute.
    pub destination: &'static str,
    /// Whether nothing on it can be executed.
    pub noexec: bool,
    /// Its own options.
    pub data: &'static [&'static str],
}

/// The sizes are systemd's own.
const RUN: Tmpfs = Tmpfs {
    destination: "/run",
    noexec: false,
    data: &["mode=755", "size=20%", "nr_inodes=800k"],
};
const LOCK: Tmpfs = Tmpfs {
    destination: "/run/lock",
    noexec: true,
    data: &["mode=1777", "size=5120k"],
};
const TMP: Tmpfs = Tmpfs {
    destination: "/tmp",
    noexec: false,
    data: &["mode=1777", "size=50%", "nr_inodes=1m"],
};

impl Init {
    /// Which init a program is: `asked` is `process.args[0]`, `resolved` where that leads inside the root file system, and
    /// `has_inittab` whether there is an `/etc/inittab`. `None` for an application.
    ///
    /// Of sysvinit nothing but the place is its own. Applications are called `init` as well (s6-overlay's `/init`), and none of them
    /// lies there and reads that file.
    pub fn of(asked: &Path, resolved: &Path, has_inittab: bool) -> Option<Self> {
        let name = |path: &Path| path.file_name().and_then(|name| name.to_str().map(str::to_owned));
        match name(resolved)?.as_str() {
            "systemd" => Some(Self::Systemd),
            "openrc-init" => Some(Self::OpenRc),
            "busybox" if name(asked)? == "init" => Some(Self::Busybox),
            "init"
                if has_inittab
                    && ["/sbin/init", "/usr/sbin/init"]
                        .iter()
                        .any(|place| resolved == Path::new(place)) =>
            {
                Some(Self::SysV)
            }
            _ => None,
        }
    }

    /// The init of a bundle. What cannot be looked at is an application: its create will say why it cannot run.
    pub fn of_bundle(spec: &Spec, bundle: &Path) -> Option<Self> {
        let process = spec.process().as_ref().filter(|process| process.user().uid() == 0)?;
        let asked = Path::new(process.args().as_ref()?.first()?);
        let mut namespaces = spec.linux().as_ref()?.namespaces().iter().flatten();
        let is_first = namespaces.any(|namespace| {
            let joins = namespace
                .path()
                .as_ref()
                .is_some_and(|path| !path.as_os_str().is_empty());
            namespace.typ() == LinuxNamespaceType::Pid && !joins
        });
        // A name alone is looked for in $PATH, which is what a shell's user means, not somebody who boots a system.
        if !is_first || !asked.is_absolute() {
            return None;
        }
        let root = File::open(bundle.join(spec.root().as_ref()?.path())).ok()?;
        let program = find(root.as_fd(), asked, true).ok()?;
        let resolved = inside(root.as_fd(), program.as_fd()).ok()?;
        let program = File::from(program).metadata().ok()?;
        if !program.is_file() {
            return None;
        }
        let has_inittab = find(root.as_fd(), Path::new("/etc/inittab"), true).is_ok();
        Self::of(asked, &resolved, has_inittab)
    }

    /// The signal that makes it end the system in good order.
    pub fn halt_signal(self) -> i32 {
        match self {
            // systemd(1), SIGNALS: halt.target. SIGTERM would make it execute itself anew.
            Self::Systemd => SIGRTMIN + 3,
            // openrc-init.c: SIGTERM and SIGPWR shut down, SIGINT reboots.
            Self::OpenRc => libc::SIGTERM,
            // busybox, init.c: SIGUSR2 powers off, SIGTERM reboots.
            Self::Busybox => libc::SIGUSR2,
            // init(8): what /etc/inittab has for powerwait and powerfail.
            Self::SysV => libc::SIGPWR,
        }
    }

    /// The same, as lxc.container.conf(5) has it.
    pub fn halt_signal_name(self) -> &'static str {
        match self {
            Self::Systemd => "SIGRTMIN+3",
            Self::OpenRc => "SIGTERM",
            Self::Busybox => "SIGUSR2",
            Self::SysV => "SIGPWR",
        }
    }

    /// What init is sent for `signal`: for those by which clients (SIGTERM) and LXC (SIGPWR) mean the end, the one that it takes for
    /// that. All others are what they are.
    pub fn translate(self, signal: i32) -> i32 {
        match signal {
            libc::SIGTERM | libc::SIGPWR => self.halt_signal(),
            other => other,
        }
    }

    /// Whether it comes to an end when it has ended everything else. OpenRC's and sysvinit only know reboot(2), the others exit where
    /// they may not call that.
    pub fn can_end(self, spec: &Spec) -> bool {
        let capabilities = spec
            .process()
            .as_ref()
            .and_then(|process| process.capabilities().as_ref());
        let may_reboot = || {
            let bounding = capabilities.and_then(|sets| sets.bounding().as_ref());
            bounding.is_some_and(|set| set.contains(&Capability::SysBoot))
        };
        match self {
            Self::Systemd | Self::Busybox => true,
            Self::OpenRc | Self::SysV => may_reboot(),
        }
    }

    /// What it finds mounted where the bundle mounts nothing: with the capabilities that containerd gives it may not mount it itself.
    pub fn wants(self) -> &'static [Tmpfs] {
        match self {
            Self::Systemd => &[RUN, LOCK, TMP],
            Self::SysV => &[RUN, LOCK],
            Self::OpenRc | Self::Busybox => &[RUN],
        }
    }

    /// Changes what is not about mounts: the program learns that it is in a container (systemd.io, CONTAINER_INTERFACE), and the
    /// cgroup that it manages is the root of those that it sees.
    ///
    /// # Errors
    /// None that a valid bundle has.
    pub fn adapt(self, spec: &mut Spec) -> Result<()> {
        if let Some(process) = spec.process_mut() {
            let mut env = process.env().clone().unwrap_or_default();
            if !env.iter().any(|variable| variable.starts_with("container=")) {
                env.push("container=lxc".into());
            }
            process.set_env(Some(env));
        }
        if let Some(linux) = spec.linux_mut() {
            let mut namespaces = linux.namespaces().clone().unwrap_or_default();
            if !namespaces
                .iter()
                .any(|namespace| namespace.typ() == LinuxNamespaceType::Cgroup)
            {
                let new = LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Cgroup).build();
                namespaces.push(new.map_err(|e| Error::unknown("cannot describe a cgroup namespace").with_source(e))?);
            }
            linux.set_namespaces(Some(namespaces));
        }
        Ok(())
    }
}

/// The path of what `found` holds, as seen from `root`.
fn inside(root: BorrowedFd<'_>, found: BorrowedFd<'_>) -> Result<PathBuf> {
    let path = |fd: BorrowedFd<'_>| {
        let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
        std::fs::read_link(&link).context(|| format!("cannot read {link}"))
    };
    let (root, found) = (path(root)?, path(found)?);
    match found.strip_prefix(&root) {
        Ok(below) => Ok(Path::new("/").join(below)),
        Err(_) => Err(Error::not_found(format!(
            "{} is not in {}",
            found.display(),
            root.display()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn an_init_is_known_by_what_its_path_leads_to() {
        for (asked, resolved, has_inittab, wanted) in [
            ("/sbin/init", "/usr/lib/systemd/systemd", false, Some(Init::Systemd)),
            ("/sbin/init", "/usr/lib/systemd/systemd", true, Some(Init::Systemd)),
            (
                "/lib/systemd/systemd",
                "/usr/lib/systemd/systemd",
                false,
                Some(Init::Systemd),
            ),
            ("/sbin/init", "/sbin/openrc-init", false, Some(Init::OpenRc)),
            ("/sbin/openrc-init", "/usr/bin/openrc-init", true, Some(Init::OpenRc)),
            ("/sbin/init", "/bin/busybox", true, Some(Init::Busybox)),
            ("/init", "/usr/bin/busybox", false, Some(Init::Busybox)),
            ("/sbin/init", "/sbin/init", true, Some(Init::SysV)),
            ("/sbin/init", "/usr/sbin/init", true, Some(Init::SysV)),
            // Applications, some of them with names like these.
            ("/sbin/init", "/sbin/init", false, None),
            ("/init", "/init", true, None),
            ("/bin/sh", "/bin/busybox", true, None),
            ("/bin/busybox", "/bin/busybox", true, None),
            ("/sbin/init", "/sbin/runit-init", true, None),
            ("/sbin/docker-init", "/sbin/docker-init", true, None),
            ("/usr/bin/systemd-nspawn", "/usr/bin/systemd-nspawn", false, None),
            (
                "/lib/systemd/systemd-journald",
                "/usr/lib/systemd/systemd-journald",
                false,
                None,
            ),
            ("/bin/systemd", "/bin/bash", false, None),
            ("/", "/", true, None),
        ] {
            let found = Init::of(Path::new(asked), Path::new(resolved), has_inittab);
            assert_eq!(found, wanted, "{asked} -> {resolved}, inittab: {has_inittab}");
        }
    }

    #[test]
    fn the_signals_that_mean_the_end_are_the_inits_own_and_others_stay() {
        for (init, halt, name) in [
            (Init::Systemd, 37, "SIGRTMIN+3"),
            (Init::OpenRc, libc::SIGTERM, "SIGTERM"),
            (Init::Busybox, libc::SIGUSR2, "SIGUSR2"),
            (Init::SysV, libc::SIGPWR, "SIGPWR"),
        ] {
            assert_eq!((init.halt_signal(), init.halt_signal_name()), (halt, name));
            for signal in 1..=64 {
                let means_the_end = [libc::SIGTERM, libc::SIGPWR].contains(&signal);
                let wanted = if means_the_end { halt } else { signal };
                assert_eq!(init.translate(signal), wanted, "{init:?}: {signal}");
            }
        }
    }

    fn bundle(args: &[&str]) -> Value {
        json!({
            "ociVersion": "1.2.0",
            "root": {"path": "rootfs"},
            "process": {"args": args, "cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["A=b"]},
            "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}]},
        })
    }

    fn read(spec: &Value) -> Spec {
        serde_json::from_value(spec.clone()).unwrap()
    }

    #[test]
    fn a_bundle_is_looked_into_and_never_left() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("rootfs");
        for path in ["sbin", "usr/lib/systemd", "bin", "etc"] {
            fs::create_dir_all(root.join(path)).unwrap();
        }
        fs::write(root.join("usr/lib/systemd/systemd"), "").unwrap();
        // Absolute, and out of the root if it were the host's.
        symlink("/../../lib/systemd/systemd", root.join("sbin/init")).unwrap();
        symlink("usr/lib", root.join("lib")).unwrap();
        symlink("init", root.join("sbin/loop")).unwrap();
        symlink("nowhere", root.join("sbin/nowhere")).unwrap();
        fs::create_dir(root.join("bin/systemd")).unwrap();
        let of = |spec: &Value| Init::of_bundle(&read(spec), folder.path());
        for asked in ["/sbin/init", "/lib/systemd/systemd", "/sbin/loop"] {
            assert_eq!(
                of(&bundle(&[asked, "--log-level=debug"])),
                Some(Init::Systemd),
                "{asked}"
            );
        }
        for asked in [
            "init",
            "sbin/init",
            "/sbin/nowhere",
            "/bin/systemd",
            "/etc",
            "/none",
            "",
        ] {
            assert_eq!(of(&bundle(&[asked])), None, "{asked}");
        }
        // Not as another user, not beside other processes, not without anything.
        for (pointer, value) in [
            ("/process/user/uid", json!(1000)),
            ("/linux/namespaces", json!([{"type": "mount"}])),
            ("/linux/namespaces", json!([{"type": "pid", "path": "/proc/7/ns/pid"}])),
            ("/process/args", json!([])),
            ("/root/path", json!("nothing")),
        ] {
            let mut spec = bundle(&["/sbin/init"]);
            *spec.pointer_mut(pointer).unwrap() = value.clone();
            assert_eq!(of(&spec), None, "{pointer}: {value}");
        }
    }

    #[test]
    fn an_init_that_only_reboots_cannot_end_without_the_capability() {
        for (capabilities, may_reboot) in [
            (json!({"bounding": ["CAP_KILL", "CAP_SYS_BOOT"]}), true),
            (json!({"bounding": ["CAP_KILL"], "permitted": ["CAP_SYS_BOOT"]}), false),
            (json!({}), false),
            (json!(null), false),
        ] {
            let mut spec = bundle(&["/sbin/init"]);
            spec["process"]["capabilities"] = capabilities;
            let spec = read(&spec);
            for (init, wanted) in [
                (Init::Systemd, true),
                (Init::Busybox, true),
                (Init::OpenRc, may_reboot),
                (Init::SysV, may_reboot),
            ] {
                assert_eq!(init.can_end(&spec), wanted, "{init:?}: {spec:?}");
            }
        }
    }

    #[test]
    fn an_init_learns_of_its_container_and_has_cgroups_of_its_own() {
        let adapted = |spec: &Value| {
            let mut spec = read(spec);
            Init::Systemd.adapt(&mut spec).unwrap();
            let spec = serde_json::to_value(spec).unwrap();
            (spec["process"]["env"].clone(), spec["linux"]["namespaces"].clone())
        };
        let mut spec = bundle(&["/sbin/init"]);
        let (env, namespaces) = adapted(&spec);
        assert_eq!(env, json!(["A=b", "container=lxc"]));
        assert_eq!(
            namespaces,
            json!([{"type": "mount"}, {"type": "pid"}, {"type": "cgroup"}])
        );
        // What the bundle says stays.
        spec["process"]["env"] = json!(["container=oci"]);
        spec["linux"]["namespaces"] = json!([{"type": "cgroup", "path": "/c"}]);
        let (env, namespaces) = adapted(&spec);
        assert_eq!(env, json!(["container=oci"]));
        assert_eq!(namespaces, json!([{"type": "cgroup", "path": "/c"}]));
    }
}
