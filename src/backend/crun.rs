//! The crun backend. Init is born in `create`.

use std::{fs, path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;

use super::{Backend, ChildIo, ExecSpec, Launched, Observed, in_bundle};
use crate::{
    error::{Context, Error, Result},
    host::command::{Command, Reaper},
    task::{bundle::Bundle, record::Record},
};

/// See the module.
#[derive(Debug)]
pub struct Crun {
    reaper: Reaper,
}

impl Crun {
    /// A backend that keeps no state.
    pub fn new(reaper: Reaper) -> Self {
        Self { reaper }
    }

    fn command(&self, rec: &Record) -> Command {
        Command::new(rec.options.crun_binary.clone())
            .arg("--root")
            .arg(rec.options.crun_root.join(&rec.namespace))
            .arg("--log")
            .arg(in_bundle(rec, "log.json"))
            .args(["--log-format", "json"])
            .die_with_parent()
    }

    async fn run(&self, rec: &Record, what: &str, command: Command) -> Result<()> {
        let log = in_bundle(rec, "log.json");
        let _ = fs::remove_file(&log);
        let mut child = self.reaper.spawn(command)?;
        let exit = tokio::time::timeout(Duration::from_millis(rec.options.runtime_timeout_ms), child.wait())
            .await
            .map_err(|_| Error::deadline("crun hangs"))??;
        if exit.status != 0 {
            let text = fs::read_to_string(&log).unwrap_or_default();
            let missing = if text.contains("not found in $PATH") {
                ": executable file not found in $PATH"
            } else {
                ""
            };
            return Err(Error::unknown(format!("OCI runtime {what} failed: {text}{missing}")));
        }
        Ok(())
    }

    fn adopt(&self, pid_file: &PathBuf) -> Result<Launched> {
        let pid = fs::read_to_string(pid_file)
            .context(|| "pid file")?
            .trim()
            .parse()
            .map_err(|_| Error::unknown("pid"))?;
        let _ = fs::remove_file(pid_file);
        let (process, exit) = self.reaper.adopt(pid)?;
        Ok(Launched { pid, process, exit })
    }
}

fn stdio(command: Command, io: ChildIo) -> Command {
    match io {
        ChildIo::Pipes { stdin, stdout, stderr } => {
            let mut command = command;
            if let Some(fd) = stdin {
                command = command.stdin(fd);
            }
            if let Some(fd) = stdout {
                command = command.stdout(fd);
            }
            if let Some(fd) = stderr {
                command = command.stderr(fd);
            }
            command
        }
        ChildIo::Terminal { console_socket } => command.arg("--console-socket").arg(console_socket),
    }
}

#[async_trait]
impl Backend for Crun {
    fn name(&self) -> &'static str {
        "crun"
    }

    async fn create(&self, rec: &Record, bundle: &Bundle, io: &mut Option<ChildIo>) -> Result<Option<Launched>> {
        let _hold = self.reaper.hold();
        let pid_file = in_bundle(rec, "init.pid");
        fs::create_dir_all(rec.options.crun_root.join(&rec.namespace)).context(|| "root")?;
        let mut command = self
            .command(rec)
            .arg("create")
            .arg("--bundle")
            .arg(&bundle.path)
            .arg("--pid-file")
            .arg(&pid_file);
        if let Some(io) = io.take() {
            command = stdio(command, io);
        }
        self.run(rec, "create", command.arg(&rec.id)).await?;
        self.adopt(&pid_file).map(Some)
    }

    async fn start(&self, rec: &Record, _io: &mut Option<ChildIo>) -> Result<Option<Launched>> {
        self.run(rec, "start", self.command(rec).arg("start").arg(&rec.id))
            .await?;
        Ok(None)
    }

    async fn exec(&self, rec: &Record, exec_id: &str, process: &ExecSpec, io: ChildIo) -> Result<Launched> {
        let _hold = self.reaper.hold();
        let pid_file = in_bundle(rec, &format!("exec-{exec_id}.pid"));
        let spec = in_bundle(rec, &format!("exec-{exec_id}.json"));
        fs::write(&spec, &process.json).context(|| "spec")?;
        let command = self
            .command(rec)
            .args(["exec", "--detach", "--process"])
            .arg(&spec)
            .arg("--pid-file")
            .arg(&pid_file);
        let done = self.run(rec, "exec", stdio(command, io).arg(&rec.id)).await;
        let _ = fs::remove_file(&spec);
        done?;
        self.adopt(&pid_file)
    }

    async fn observe(&self, _rec: &Record) -> Result<Observed> {
        Err(Error::unimplemented("observe"))
    }

    async fn delete(&self, rec: &Record) -> Result<()> {
        match self
            .run(
                rec,
                "delete",
                self.command(rec).args(["delete", "--force"]).arg(&rec.id),
            )
            .await
        {
            Err(e) if !e.to_string().contains("does not exist") && !e.to_string().contains("No such file") => Err(e),
            _ => {
                let _ = fs::remove_file(in_bundle(rec, "log.json"));
                Ok(())
            }
        }
    }

    async fn update(&self, rec: &Record, resources_json: &[u8]) -> Result<()> {
        let file = in_bundle(rec, "update.json");
        fs::write(&file, resources_json).context(|| "x")?;
        self.run(
            rec,
            "update",
            self.command(rec)
                .arg("update")
                .arg("--resources")
                .arg(&file)
                .arg(&rec.id),
        )
        .await
    }
}
