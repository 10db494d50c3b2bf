//! Bundles: the same rootfs and config.json for every candidate.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use proxmox_lxcri::error::{Context, Error, Result};
use serde_json::{Value, json};

use crate::stage::Stage;

/// Programs that the containers use; all are busybox.
const APPLETS: [&str; 6] = ["sh", "sleep", "cat", "dd", "true", "echo"];

/// Makes bundles with ids that are not used twice, on the whole machine: LXC has them at the root of the cgroups.
pub(crate) struct Bundles {
    stage: Stage,
    busybox: PathBuf,
    next: AtomicU32,
}

/// One bundle.
#[derive(Debug, Clone)]
pub(crate) struct Bundle {
    /// The container's id.
    pub(crate) id: String,
    /// The folder; the fifos are made there too.
    pub(crate) path: PathBuf,
}

impl Bundles {
    /// Finds a static busybox and copies it next to the bundles, so that hard links reach it.
    ///
    /// # Errors
    /// `NotFound` when there is none.
    pub(crate) fn new(stage: &Stage) -> Result<Self> {
        let source = ["/bin/busybox", "/usr/bin/busybox"]
            .into_iter()
            .find(|path| Path::new(path).exists());
        let source = source.ok_or_else(|| Error::not_found("no busybox: apt-get install busybox-static"))?;
        let busybox = stage.scratch.join("busybox");
        fs::copy(source, &busybox).context(|| format!("cannot copy {source}"))?;
        Ok(Self {
            stage: stage.clone(),
            busybox,
            next: AtomicU32::new(1),
        })
    }

    /// A bundle that runs `args`, alone in its pod or in the pod of `sandbox`.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn make(&self, args: &[&str], sandbox: Option<&Bundle>) -> Result<Bundle> {
        let id = format!("{}-{}", self.stage.name, self.next.fetch_add(1, Ordering::Relaxed));
        let path = self.stage.scratch.join("bundles").join(&id);
        let make = || -> std::io::Result<()> {
            for folder in ["bin", "dev", "proc", "sys", "run", "tmp", "etc"] {
                fs::create_dir_all(path.join("rootfs").join(folder))?;
            }
            for applet in APPLETS {
                fs::hard_link(&self.busybox, path.join("rootfs/bin").join(applet))?;
            }
            let sandbox_id = sandbox.map_or(&id, |bundle| &bundle.id);
            let config = config(&self.stage, &id, sandbox_id, args);
            fs::write(path.join("config.json"), serde_json::to_vec_pretty(&config)?)
        };
        make().context(|| format!("cannot make bundle {}", path.display()))?;
        Ok(Bundle { id, path })
    }

    /// Removes a bundle whose container is deleted.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn remove(&self, bundle: &Bundle) -> Result<()> {
        fs::remove_dir_all(&bundle.path).context(|| format!("cannot remove bundle {}", bundle.path.display()))
    }
}

/// `process` of the spec, also for an exec.
pub(crate) fn process(args: &[&str]) -> Value {
    let capabilities = [
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
    json!({
        "terminal": false,
        "user": { "uid": 0, "gid": 0 },
        "args": args,
        "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        "cwd": "/",
        "capabilities": { "bounding": capabilities, "effective": capabilities, "permitted": capabilities },
        "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
        "noNewPrivileges": true,
    })
}

/// containerd's default spec, with the pod annotations and the network namespace by path as CRI gives them. Debian's crun 1.8
/// knows OCI 1.0 only.
fn config(stage: &Stage, id: &str, sandbox: &str, args: &[&str]) -> Value {
    let role = if id == sandbox { "sandbox" } else { "container" };
    json!({
        "ociVersion": "1.0.2",
        "process": process(args),
        "root": { "path": "rootfs" },
        "hostname": id,
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] },
            { "destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"] },
            { "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"] },
            { "destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
        ],
        "annotations": {
            "io.kubernetes.cri.container-type": role,
            "io.kubernetes.cri.sandbox-id": sandbox,
        },
        "linux": {
            "cgroupsPath": format!("{}/{id}", stage.cgroup),
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
            "namespaces": [
                { "type": "pid" },
                { "type": "ipc" },
                { "type": "uts" },
                { "type": "mount" },
                { "type": "network", "path": stage.netns },
            ],
            "maskedPaths": ["/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}
