//! What the numbers were measured on.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{SystemTime, UNIX_EPOCH},
};

use proxmox_lxcri::error::{Error, Result};
use serde::Serialize;

use crate::run::Bench;

/// A description for the report.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Machine {
    /// UTC, YYYY-MM-DD.
    pub(crate) date: String,
    /// Short hash, with a plus sign when the tree was changed.
    pub(crate) commit: String,
    pub(crate) cpu: String,
    pub(crate) cores: usize,
    pub(crate) memory_mib: u64,
    pub(crate) system: String,
    pub(crate) kernel: String,
    pub(crate) cgroup: &'static str,
    pub(crate) crun: String,
    pub(crate) runc: String,
    pub(crate) go_shim: String,
    /// Nothing where it is not installed.
    pub(crate) lxc: Option<String>,
    pub(crate) ours: String,
}

impl Machine {
    /// One line.
    pub(crate) fn line(&self) -> String {
        format!(
            "{}, {} cores, {:.0} GiB, {}, Linux {}, cgroup {}",
            self.cpu,
            self.cores,
            self.memory_mib as f64 / 1024.0,
            self.system,
            self.kernel,
            self.cgroup
        )
    }

    /// The programs, one line.
    pub(crate) fn programs(&self) -> String {
        let lxc = self.lxc.as_ref().map(|version| format!("LXC {version}; "));
        format!(
            "{}; {}; {}Go shim of {}",
            self.crun,
            self.runc,
            lxc.unwrap_or_default(),
            self.go_shim
        )
    }
}

/// Looks at the machine. What cannot be found out is "unknown": a description does not end a run.
pub(crate) fn describe(bench: &Bench) -> Machine {
    let git = |args: &[&str]| said(Command::new("git").args(args));
    let commit = git(&["rev-parse", "--short", "HEAD"]).unwrap_or_else(unknown);
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|text| !text.is_empty());
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    Machine {
        date: date(SystemTime::now()),
        commit: if changed { commit + "+" } else { commit },
        cpu: field(&cpuinfo, "model name", ':').unwrap_or_else(unknown),
        cores: std::thread::available_parallelism().map_or(0, usize::from),
        memory_mib: field(&meminfo, "MemTotal", ':')
            .and_then(|text| text.split(' ').next()?.parse::<u64>().ok())
            .map_or(0, |kib| kib / 1024),
        system: field(&release, "PRETTY_NAME", '=').map_or_else(unknown, |name| name.trim_matches('"').into()),
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease").map_or_else(|_| unknown(), |text| text.trim().into()),
        cgroup: if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
            "v2"
        } else {
            "v1"
        },
        crun: first_line(Command::new(&bench.crun).arg("--version")),
        runc: first_line(Command::new("runc").arg("--version")),
        go_shim: said(Command::new(&bench.go).arg("-v"))
            .and_then(|text| field(&text, "  Version", ':'))
            .map_or_else(unknown, |version| format!("containerd {version}")),
        lxc: said(Command::new(&bench.lxc).arg("--version")),
        ours: bench.arguments.ours.display().to_string(),
    }
}

/// The absolute path of a program; a bare name is looked up in PATH.
///
/// # Errors
/// `NotFound`, with what to do.
pub(crate) fn program(name: &Path) -> Result<PathBuf> {
    let found = if name.components().count() > 1 {
        Some(name.to_path_buf())
    } else {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path)
            .map(|folder| folder.join(name))
            .find(|path| path.is_file())
    };
    found.filter(|path| path.is_file()).ok_or_else(|| {
        Error::not_found(format!(
            "no program {}: install it (apt-get install crun runc containerd lxc), or leave it out with --candidates",
            name.display()
        ))
    })
}

fn unknown() -> String {
    "unknown".into()
}

fn said(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

fn first_line(command: &mut Command) -> String {
    said(command)
        .and_then(|text| text.lines().next().map(str::to_owned))
        .unwrap_or_else(unknown)
}

fn field(text: &str, name: &str, mark: char) -> Option<String> {
    text.lines()
        .filter_map(|line| line.split_once(mark))
        .find(|(key, _)| key.trim_end() == name)
        .map(|(_, value)| value.trim().to_owned())
}

/// Days since 1970 to a date of the Gregorian calendar (Howard Hinnant, chrono-compatible date algorithms, civil_from_days).
fn date(at: SystemTime) -> String {
    let days = at
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs() / 86_400);
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}
