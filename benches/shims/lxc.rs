//! LXC's own commands: what remains when there is no shim.
//!
//! `lxc-execute` is the peer of create and start: it prepares the container and runs the program in one go, and stays as its monitor.
//! With a configuration that is handed to it, it needs no container that was defined before, and it needs no init in the root file
//! system: its own code is the container's first process, which makes the program its child.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use proxmox_lxcri::{
    backend::lxc::config::{self, Layout, Place},
    error::{Context, Error, Result},
};
use serde_json::Value;

use crate::{
    bundle::Bundle,
    crun::writer,
    process::{self, Process},
    run::Bench,
    shim::Io,
};

/// The command whose presence tells that LXC is installed.
pub(crate) const EXECUTE: &str = "lxc-execute";

/// A container made by `lxc-execute`.
pub(crate) struct Container {
    /// Folder of the commands.
    commands: PathBuf,
    lxc_path: PathBuf,
    id: String,
    monitor: Process,
    init: Process,
    /// Before the spawn of `lxc-execute`.
    pub(crate) begin: Instant,
    /// When the first byte of stdout arrived.
    pub(crate) first: Instant,
}

impl Container {
    /// Runs a bundle whose program prints something, with the fifo as its stdout, until it has.
    ///
    /// # Errors
    /// LXC's.
    pub(crate) async fn execute(bench: &Bench, bundle: &Bundle, io: &Io) -> Result<Self> {
        let lxc_path = bench.stage.scratch.join("lxc");
        fs::create_dir_all(&lxc_path).context(|| format!("cannot make {}", lxc_path.display()))?;
        let (configuration, args) = configuration(&bundle.path)?;
        let file = bundle.path.join("lxc.conf");
        fs::write(&file, configuration).context(|| format!("cannot write {}", file.display()))?;
        let errors = bundle.path.join("lxc.log");
        let commands = bench.lxc.parent().unwrap_or(Path::new("/")).to_path_buf();
        let mut command = command(&commands, EXECUTE, &bundle.id, &lxc_path);
        command
            .arg("-f")
            .arg(&file)
            .arg("--")
            .args(args)
            .stdout(writer(io.stdout())?)
            .stderr(File::create(&errors).context(|| "cannot make LXC's log")?);
        let (begin, monitor) = process::spawn(command).await?;
        let first = tokio::select! {
            biased;
            first = io.first() => first,
            _ = monitor.gone() => Err(Error::unknown("lxc-execute ended before the program said anything")),
        };
        let first = first.map_err(|e| e.context(fs::read_to_string(&errors).unwrap_or_default()))?;
        let init = process::children(monitor.pid())?.first().copied();
        let init = init.ok_or_else(|| Error::unknown("lxc-execute has no child"))?;
        Ok(Self {
            commands,
            lxc_path,
            id: bundle.id.clone(),
            monitor,
            init: Process::open(init)?,
            begin,
            first,
        })
    }

    /// `lxc-attach`, from its spawn to the end of the process inside.
    ///
    /// # Errors
    /// LXC's.
    pub(crate) async fn attach(&self, args: &[&str]) -> Result<Duration> {
        let mut command = command(&self.commands, "lxc-attach", &self.id, &self.lxc_path);
        command.arg("--").args(args);
        Ok(process::run(command, Vec::new()).await?.took())
    }

    /// `lxc-stop` with SIGKILL: how long from its spawn to the end of init, and from then to that of `lxc-execute`, which cleans up.
    ///
    /// # Errors
    /// LXC's.
    pub(crate) async fn kill(&self) -> Result<(Duration, Duration)> {
        let mut command = command(&self.commands, "lxc-stop", &self.id, &self.lxc_path);
        command.arg("-k");
        let stopped = process::run(command, Vec::new());
        let (stopped, gone, cleaned) = tokio::join!(stopped, self.init.gone(), self.monitor.gone());
        let gone = gone?;
        Ok((
            gone.duration_since(stopped?.begin),
            cleaned?.saturating_duration_since(gone),
        ))
    }
}

fn command(commands: &Path, name: &str, id: &str, lxc_path: &Path) -> Command {
    let mut command = process::quiet(&commands.join(name));
    command.arg("-n").arg(id).arg("-P").arg(lxc_path);
    command
}

/// A bundle as lxc.container.conf(5), and the program that it runs. It covers what is in the bundles of this benchmark.
fn configuration(bundle: &Path) -> Result<(String, Vec<String>)> {
    let path = bundle.join("config.json");
    let text = fs::read(&path).context(|| format!("cannot read {}", path.display()))?;
    let spec: Value =
        serde_json::from_slice(&text).map_err(|e| Error::invalid(path.display().to_string()).with_source(e))?;
    let mut lines = vec![
        format!("lxc.rootfs.path = dir:{}", bundle.join("rootfs").display()),
        format!("lxc.uts.name = {}", word(&spec["hostname"])),
        "lxc.tty.max = 0".into(),
        "lxc.console.path = none".into(),
        "lxc.apparmor.profile = unconfined".into(),
    ];
    lines.extend(of_linux(&spec["linux"])?);
    mounts(&spec, &mut lines);
    process(&spec["process"], &mut lines);
    let args = list(&spec["process"]["args"]).map(word).map(str::to_owned).collect();
    Ok((lines.join("\n") + "\n", args))
}

/// Namespaces, cgroups and device rules are those of the backend's own mapping; devices, terminals and mounts are LXC's to make here.
fn of_linux(linux: &Value) -> Result<Vec<String>> {
    let path = word(&linux["cgroupsPath"]);
    let (parent, id) = path.rsplit_once('/').unwrap_or(("", path));
    let layout = Layout {
        container: path.into(),
        inner: None,
        monitor: format!("{parent}/lxc.monitor.{id}"),
        pivot: format!("{parent}/lxc.pivot.{id}"),
    };
    let place = Place {
        layout: &layout,
        v2: Path::new("/sys/fs/cgroup/cgroup.controllers").exists(),
        time: true,
        system: None,
    };
    let linux = serde_json::from_value(linux.clone())
        .map_err(|e| Error::invalid("the bundle is no OCI runtime spec").with_source(e))?;
    let ours = ["lxc.namespace.", "lxc.net.", "lxc.cgroup.", "lxc.cgroup2."];
    let items = config::items(&linux, &place)?.into_iter();
    let items = items.filter(|(key, _)| ours.iter().any(|prefix| key.starts_with(prefix)));
    Ok(items.map(|(key, value)| format!("{key} = {value}")).collect())
}

fn mounts(spec: &Value, lines: &mut Vec<String>) {
    for mount in list(&spec["mounts"]) {
        let options: Vec<_> = list(&mount["options"]).map(word).collect();
        match word(&mount["destination"]) {
            // With LXC's device nodes and links, which are those of OCI.
            "/dev" => {
                let size = options
                    .iter()
                    .find_map(|option| option.strip_prefix("size=")?.strip_suffix('k'));
                let bytes = size.and_then(|kib| kib.parse::<u64>().ok()).map_or(0, |kib| kib << 10);
                lines.push("lxc.autodev = 1".into());
                lines.push(format!("lxc.autodev.tmpfs.size = {bytes}"));
            }
            "/dev/pts" => lines.push("lxc.pty.max = 1024".into()),
            destination => lines.push(format!(
                "lxc.mount.entry = {} {} {} {},create=dir 0 0",
                word(&mount["source"]),
                destination.trim_start_matches('/'),
                word(&mount["type"]),
                options.join(",")
            )),
        }
    }
    // A runtime passes over what the kernel does not have.
    let there = |path: &&str| Path::new(path).exists();
    for path in list(&spec["linux"]["maskedPaths"]).map(word).filter(there) {
        let inside = path.trim_start_matches('/');
        lines.push(match Path::new(path).is_dir() {
            true => format!("lxc.mount.entry = tmpfs {inside} tmpfs ro 0 0"),
            false => format!("lxc.mount.entry = /dev/null {inside} none bind 0 0"),
        });
    }
    for path in list(&spec["linux"]["readonlyPaths"]).map(word).filter(there) {
        let inside = path.trim_start_matches('/');
        lines.push(format!("lxc.mount.entry = {inside} {inside} none bind,ro,relative 0 0"));
    }
}

fn process(process: &Value, lines: &mut Vec<String>) {
    let capabilities = list(&process["capabilities"]["bounding"]).map(word);
    let kept: Vec<_> = capabilities
        .map(|name| name.trim_start_matches("CAP_").to_lowercase())
        .collect();
    lines.push(format!("lxc.cap.keep = {}", kept.join(" ")));
    if process["noNewPrivileges"] == true {
        lines.push("lxc.no_new_privs = 1".into());
    }
    for limit in list(&process["rlimits"]) {
        let name = word(&limit["type"]).trim_start_matches("RLIMIT_").to_lowercase();
        lines.push(format!("lxc.prlimit.{name} = {}:{}", limit["soft"], limit["hard"]));
    }
    for variable in list(&process["env"]) {
        lines.push(format!("lxc.environment = {}", word(variable)));
    }
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn word(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
