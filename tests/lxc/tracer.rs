//! strace on a shim and all that it starts.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use super::support::pod::{Daemon, Pod, until};

pub(super) struct Tracer {
    strace: Child,
    log: PathBuf,
}

impl Tracer {
    /// Attached to the shim of `pod`; `arguments` choose what is traced, and what is done then.
    pub(super) async fn of(daemon: &Daemon, pod: &Pod, arguments: &[&str]) -> Self {
        let log = daemon.folder.join("strace");
        let mut strace = Command::new("strace")
            .args(["-f", "--quiet=attach,personality,thread-execve"])
            .args(arguments)
            .arg("-o")
            .arg(&log)
            .args(["-p", &pod.pid.to_string()])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let traced = format!("TracerPid:\t{}", strace.id());
        let status = format!("/proc/{}/status", pod.pid);
        until("strace attaches", || {
            assert!(strace.try_wait().unwrap().is_none(), "strace does not attach");
            fs::read_to_string(&status).unwrap().contains(&traced).then_some(())
        })
        .await;
        Self { strace, log }
    }

    /// The lines that contain `text`, once all that was traced has ended.
    pub(super) async fn told(mut self, text: &str) -> Vec<String> {
        until("the tracer ends", || self.strace.try_wait().unwrap()).await;
        let errors: Vec<_> = BufReader::new(self.strace.stderr.take().unwrap())
            .lines()
            .map(Result::unwrap)
            .collect();
        assert!(errors.is_empty(), "{errors:?}");
        let log = fs::read_to_string(&self.log).unwrap();
        log.lines()
            .filter(|line| line.contains(text))
            .map(str::to_owned)
            .collect()
    }
}
