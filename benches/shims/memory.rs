//! Memory of idle shims, LXC's monitors included: many pods side by side, and one pod with many containers.

use proxmox_lxcri::error::Result;

use crate::{
    bundle::Bundle,
    candidate::Candidate,
    process,
    results::{Metric, Results},
    run::{Bench, progress},
    shim::{Io, Shim},
};

/// Stays until it is killed, and prints nothing.
pub(crate) const SLEEP: [&str; 2] = ["/bin/sleep", "3600"];

/// A started container of a pod.
pub(crate) struct Member {
    pub(crate) bundle: Bundle,
    _io: Io,
}

/// A shim and the containers of its pod; the first is the sandbox.
pub(crate) struct Pod {
    pub(crate) shim: Shim,
    pub(crate) members: Vec<Member>,
}

impl Pod {
    /// Starts a shim and its first container.
    ///
    /// # Errors
    /// The shim's.
    pub(crate) async fn start(bench: &Bench, candidate: Candidate, bundle: Bundle) -> Result<Self> {
        let io = Io::new(&bundle, "init", true)?;
        let shim = Shim::start(bench, candidate, &bundle).await?;
        shim.create(&bundle, &io).await?;
        shim.start_process(&bundle.id, "").await?;
        let members = vec![Member { bundle, _io: io }];
        Ok(Self { shim, members })
    }

    /// Adds a container, through `start` of the shim binary as containerd does.
    ///
    /// # Errors
    /// The shim's; `Unknown` when `start` made a second shim for the pod.
    async fn grow(&mut self, bench: &Bench, candidate: Candidate) -> Result<()> {
        let bundle = bench
            .bundles
            .make(&SLEEP, self.members.first().map(|member| &member.bundle))?;
        let io = Io::new(&bundle, "init", true)?;
        let shim = Shim::start(bench, candidate, &bundle).await?;
        if shim.pid() != self.shim.pid() {
            return Err(proxmox_lxcri::error::Error::unknown(format!(
                "the pod of shim {} got a second shim {}",
                self.shim.pid(),
                shim.pid()
            )));
        }
        shim.create(&bundle, &io).await?;
        shim.start_process(&bundle.id, "").await?;
        self.members.push(Member { bundle, _io: io });
        Ok(())
    }

    /// Ends the containers, the sandbox last, and the shim.
    ///
    /// # Errors
    /// The shim's.
    pub(crate) async fn end(mut self, bench: &Bench) -> Result<()> {
        let mut last = String::new();
        while let Some(member) = self.members.pop() {
            self.shim.end(bench, &member.bundle.id).await?;
            bench.bundles.remove(&member.bundle)?;
            last = member.bundle.id;
        }
        self.shim.shutdown(&last).await
    }
}

/// Runs the rounds.
///
/// # Errors
/// The first failure of any candidate.
pub(crate) async fn measure(bench: &Bench, results: &mut Results) -> Result<()> {
    let rounds = bench.arguments.rounds.min(3);
    progress(&format!("memory: {rounds} rounds of {} pods", bench.arguments.pods));
    for round in 0..rounds {
        for candidate in bench.turn(round).filter(|candidate| candidate.has_shim()) {
            let samples = side_by_side(bench, candidate).await;
            results.extend(candidate, samples.map_err(|e| e.context(candidate.title()))?);
        }
    }
    Ok(())
}

#[allow(clippy::cast_precision_loss)]
async fn side_by_side(bench: &Bench, candidate: Candidate) -> Result<Vec<(Metric, f64)>> {
    let arguments = &bench.arguments;
    let mut pods = Vec::new();
    for _ in 0..arguments.pods {
        pods.push(Pod::start(bench, candidate, bench.bundles.make(&SLEEP, None)?).await?);
    }
    tokio::time::sleep(arguments.settle).await;
    let mut pss = 0.0;
    let mut private = 0.0;
    for pod in &pods {
        let memory = process::memory_of_shim(pod.shim.pid())?;
        pss += memory.pss_kib;
        private += memory.private_kib;
    }
    let count = pods.len().max(1) as f64;

    let mut per_container = Vec::new();
    if let Some(pod) = pods.first_mut() {
        let before = process::memory_of_shim(pod.shim.pid())?;
        for _ in 1..arguments.containers {
            pod.grow(bench, candidate).await?;
        }
        tokio::time::sleep(arguments.settle).await;
        let after = process::memory_of_shim(pod.shim.pid())?;
        let further = (arguments.containers.max(2) - 1) as f64;
        per_container = vec![
            (Metric::PssOne, before.pss_kib / 1024.0),
            (Metric::PssMany, after.pss_kib / 1024.0),
            (
                Metric::PerContainer,
                (after.pss_kib - before.pss_kib).max(0.0) / further,
            ),
        ];
    }
    for pod in pods {
        pod.end(bench).await?;
    }
    let mut samples = vec![
        (Metric::Pss, pss / count / 1024.0),
        (Metric::Private, private / count / 1024.0),
    ];
    samples.extend(per_container);
    Ok(samples)
}
