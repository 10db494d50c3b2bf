//! The containerd of a node: a child of the tests, or, where systemd runs the machine and the machine is the tests' own
//! ([`universe::by_systemd`]), the machine's unit `containerd.service`, as its package made it but for configuration and log.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Instant,
};

use super::{
    node::{FOLDER, SOON, lxcri_config},
    universe,
};

const UNIT: &str = "containerd.service";
/// Lives until the machine is switched off.
const DROP_IN: &str = "/run/systemd/system/containerd.service.d/tests.conf";

/// A running containerd.
#[derive(Debug)]
pub(crate) enum Containerd {
    /// A child of the test process.
    Child(Child),
    /// systemd's.
    Unit,
}

impl Containerd {
    /// Starts it on the configuration in the node's folder; it may not answer yet.
    pub(crate) fn start() -> Self {
        if !universe::by_systemd() {
            return Self::Child(spawn());
        }
        fs::create_dir_all(Path::new(DROP_IN).parent().expect("a folder")).expect("the folder of drop-ins");
        fs::write(DROP_IN, drop_in()).expect("the unit's drop-in");
        systemctl(&["daemon-reload"]);
        systemctl(&["start", UNIT]);
        Self::Unit
    }

    /// Kills it with SIGKILL, as a crash would, and waits for its end.
    pub(crate) fn kill(&mut self) {
        match self {
            Self::Child(child) => {
                child.kill().expect("kill containerd");
                child.wait().expect("reap containerd");
            }
            Self::Unit => {
                systemctl(&["kill", "--kill-whom=main", "--signal=KILL", UNIT]);
                let end = Instant::now() + *SOON;
                while active() {
                    assert!(Instant::now() < end, "{UNIT} survived SIGKILL");
                    std::thread::yield_now();
                }
            }
        }
    }

    /// Stops it in order and starts it again, as an upgrade does.
    pub(crate) fn restart(&mut self) {
        match self {
            Self::Child(child) => {
                // SAFETY: an unreaped child's number is its own.
                unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGTERM) };
                child.wait().expect("reap containerd");
                *child = spawn();
            }
            Self::Unit => systemctl(&["restart", UNIT]),
        }
    }

    /// How it ended, if it did.
    pub(crate) fn ended(&mut self) -> Option<String> {
        match self {
            Self::Child(child) => child.try_wait().ok().flatten().map(|status| status.to_string()),
            Self::Unit => (!active()).then(|| "see journalctl -u containerd".into()),
        }
    }
}

/// Stops the unit; what it started runs on.
pub(crate) fn stop_unit() {
    if active() {
        systemctl(&["stop", UNIT]);
    }
    // It may have been killed before.
    let _ = Command::new("systemctl").args(["reset-failed", UNIT]).output();
}

fn active() -> bool {
    let state = Command::new("systemctl").args(["is-active", UNIT]).output();
    let state = String::from_utf8_lossy(&state.expect("systemctl").stdout)
        .trim()
        .to_string();
    !["inactive", "failed", "unknown"].contains(&state.as_str())
}

pub(crate) fn systemctl(arguments: &[&str]) {
    let output = Command::new("systemctl").args(arguments).output().expect("systemctl");
    assert!(
        output.status.success(),
        "systemctl {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// The node's programs first, so that the shim under test is found.
fn path() -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    format!("{FOLDER}/bin:{path}:/usr/sbin:/sbin")
}

fn log() -> PathBuf {
    Path::new(FOLDER).join("containerd.log")
}

fn drop_in() -> String {
    let path = path();
    let program = path
        .split(':')
        .map(|folder| Path::new(folder).join("containerd"))
        .find(|program| program.exists())
        .expect("containerd in PATH");
    let log = log();
    let config = match lxcri_config() {
        Some(file) => format!("Environment=PROXMOX_LXCRI_CONFIG={}\n", file.display()),
        None => String::new(),
    };
    format!(
        "[Service]\nExecStart=\nExecStart={} --config {FOLDER}/config.toml\nEnvironment=PATH={path} TMPDIR={FOLDER}/tmp\n\
         {config}Restart=no\nStandardOutput=append:{log}\nStandardError=append:{log}\n",
        program.display(),
        log = log.display(),
    )
}

fn spawn() -> Child {
    use std::os::unix::process::CommandExt as _;
    let log = File::options()
        .create(true)
        .append(true)
        .open(log())
        .expect("containerd's log");
    Command::new("containerd")
        .args(["--config", &format!("{FOLDER}/config.toml")])
        .env("PATH", path())
        .env("TMPDIR", format!("{FOLDER}/tmp"))
        .envs(lxcri_config().map(|file| ("PROXMOX_LXCRI_CONFIG", file)))
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("a descriptor"))
        .stderr(log)
        .process_group(0)
        .spawn()
        .unwrap_or_else(|e| panic!("cannot run containerd: {e}; packaging/dependencies installs it"))
}
