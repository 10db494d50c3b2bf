//! The bare crun commands: what remains when there is no shim.

use std::{
    fs::{self, File, OpenOptions},
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use proxmox_lxcri::error::{Context, Error, Result};

use crate::{
    bundle::Bundle,
    process::{self, Process},
    run::Bench,
    shim::Io,
};

/// A container made by the crun program.
pub(crate) struct Container {
    crun: PathBuf,
    root: PathBuf,
    id: String,
    init: Process,
    /// Before the spawn of `crun create`.
    pub(crate) begin: Instant,
    /// How long `crun create` took.
    pub(crate) created: Duration,
}

impl Container {
    /// `crun create`, with the fifo as the container's stdout.
    ///
    /// # Errors
    /// crun's.
    pub(crate) async fn create(bench: &Bench, bundle: &Bundle, io: &Io) -> Result<Self> {
        let root = bench.stage.scratch.join("bare");
        let pid_file = bundle.path.join("init.pid");
        let errors = bundle.path.join("crun.log");
        let mut command = command(&bench.crun, &root, "create");
        command
            .arg("--bundle")
            .arg(&bundle.path)
            .arg("--pid-file")
            .arg(&pid_file)
            .arg(&bundle.id)
            .stdout(writer(io.stdout())?)
            // A pipe would stay open in the container, and nobody would see its end.
            .stderr(File::create(&errors).context(|| "cannot make crun's log")?);
        if !io.stdin().as_os_str().is_empty() {
            command.stdin(reader(io.stdin())?);
        }
        let done = process::run(command, Vec::new()).await;
        let done = done.map_err(|e| e.context(fs::read_to_string(&errors).unwrap_or_default()))?;
        let pid = fs::read_to_string(&pid_file).context(|| "crun wrote no pid file")?;
        let pid = pid
            .trim()
            .parse()
            .map_err(|e| Error::unknown(format!("crun's pid file says {pid:?}")).with_source(Box::new(e) as Box<_>))?;
        Ok(Self {
            crun: bench.crun.clone(),
            root,
            id: bundle.id.clone(),
            init: Process::open(pid)?,
            begin: done.begin,
            created: done.took(),
        })
    }

    /// `crun start`.
    ///
    /// # Errors
    /// crun's.
    pub(crate) async fn start(&self) -> Result<process::Finished> {
        self.run("start", &[]).await
    }

    /// `crun exec`, from its spawn to the end of the process inside.
    ///
    /// # Errors
    /// crun's.
    pub(crate) async fn exec(&self, args: &[&str]) -> Result<Duration> {
        Ok(self.run("exec", args).await?.took())
    }

    /// `crun kill` with SIGKILL, from its spawn to the end of init.
    ///
    /// # Errors
    /// crun's.
    pub(crate) async fn kill(&self) -> Result<Duration> {
        let (killed, gone) = tokio::join!(self.run("kill", &["KILL"]), self.init.gone());
        Ok(gone?.duration_since(killed?.begin))
    }

    /// Returns when init has ended by itself.
    ///
    /// # Errors
    /// `DeadlineExceeded` when it does not.
    pub(crate) async fn exited(&self) -> Result<Instant> {
        self.init.gone().await
    }

    /// `crun delete`.
    ///
    /// # Errors
    /// crun's.
    pub(crate) async fn delete(&self) -> Result<Duration> {
        Ok(self.run("delete", &[]).await?.took())
    }

    async fn run(&self, verb: &str, args: &[&str]) -> Result<process::Finished> {
        let mut command = command(&self.crun, &self.root, verb);
        command.arg(&self.id).args(args);
        process::run(command, Vec::new()).await
    }
}

fn command(crun: &std::path::Path, root: &std::path::Path, verb: &str) -> Command {
    let mut command = process::quiet(crun);
    command.arg("--root").arg(root).arg(verb);
    command
}

/// The end that the container writes to; the harness reads already, so this does not block.
///
/// # Errors
/// The operating system's.
pub(crate) fn writer(path: &std::path::Path) -> Result<File> {
    OpenOptions::new()
        .write(true)
        .open(path)
        .context(|| format!("cannot open {}", path.display()))
}

/// The end that the container reads from; opened for both, so that it does not wait for a writer.
fn reader(path: &std::path::Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .context(|| format!("cannot open {}", path.display()))
}
