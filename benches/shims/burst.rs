//! Many pods at once: how long until all of them run, and what their shims weigh then.

use std::{sync::Arc, time::Instant};

use proxmox_lxcri::error::{Error, Result};
use tokio::task::JoinSet;

use crate::{
    bundle::Bundle,
    candidate::Candidate,
    crun::Container,
    lifecycle::INIT,
    lxc,
    memory::{Pod, SLEEP},
    process,
    results::{Metric, Results},
    run::{Bench, progress},
    shim::Io,
};

/// Runs the rounds.
///
/// # Errors
/// The first failure of any candidate.
pub(crate) async fn measure(bench: &Arc<Bench>, results: &mut Results) -> Result<()> {
    let rounds = bench.arguments.rounds.min(5);
    progress(&format!(
        "burst: {rounds} rounds of {} containers at once",
        bench.arguments.burst
    ));
    for round in 0..rounds {
        for candidate in bench.turn(round) {
            let samples = match candidate {
                Candidate::Crun => bare_crun(bench).await,
                Candidate::Lxc => bare_lxc(bench).await,
                _ => shims(bench, candidate).await,
            };
            results.extend(candidate, samples.map_err(|e| e.context(candidate.title()))?);
        }
    }
    Ok(())
}

fn bundles(bench: &Bench, args: &[&str]) -> Result<Vec<Bundle>> {
    (0..bench.arguments.burst)
        .map(|_| bench.bundles.make(args, None))
        .collect()
}

/// Waits for all; the first failure counts, the others are cancelled.
async fn all<T: 'static>(mut tasks: JoinSet<Result<T>>) -> Result<Vec<T>> {
    let mut done = Vec::new();
    while let Some(joined) = tasks.join_next().await {
        done.push(joined.map_err(|e| Error::unknown("a task panicked").with_source(e))??);
    }
    Ok(done)
}

async fn shims(bench: &Arc<Bench>, candidate: Candidate) -> Result<Vec<(Metric, f64)>> {
    let bundles = bundles(bench, &SLEEP)?;
    let begin = Instant::now();
    let mut starts = JoinSet::new();
    for bundle in bundles {
        let bench = Arc::clone(bench);
        starts.spawn(async move { Pod::start(&bench, candidate, bundle).await });
    }
    let pods = all(starts).await?;
    let took = begin.elapsed();

    tokio::time::sleep(bench.arguments.settle).await;
    let mut pss_mib = 0.0;
    for pod in &pods {
        pss_mib += process::memory_of_shim(pod.shim.pid())?.pss_kib / 1024.0;
    }
    let mut ends = JoinSet::new();
    for pod in pods {
        let bench = Arc::clone(bench);
        ends.spawn(async move { pod.end(&bench).await });
    }
    all(ends).await?;
    Ok(vec![
        (Metric::BurstTime, took.as_secs_f64() * 1e3),
        (Metric::BurstMemory, pss_mib),
    ])
}

async fn bare_crun(bench: &Arc<Bench>) -> Result<Vec<(Metric, f64)>> {
    let bundles = bundles(bench, &SLEEP)?;
    let begin = Instant::now();
    let mut starts = JoinSet::new();
    for bundle in bundles {
        let bench = Arc::clone(bench);
        starts.spawn(async move {
            let io = Io::new(&bundle, "init", true)?;
            let container = Container::create(&bench, &bundle, &io).await?;
            container.start().await?;
            Ok((container, bundle))
        });
    }
    let containers = all(starts).await?;
    let took = begin.elapsed();
    for (container, bundle) in containers {
        container.kill().await?;
        container.delete().await?;
        bench.bundles.remove(&bundle)?;
    }
    Ok(vec![(Metric::BurstTime, took.as_secs_f64() * 1e3)])
}

/// `lxc-execute` does not tell when the program was started, so it has to tell so itself.
async fn bare_lxc(bench: &Arc<Bench>) -> Result<Vec<(Metric, f64)>> {
    let bundles = bundles(bench, &INIT)?;
    let begin = Instant::now();
    let mut starts = JoinSet::new();
    for bundle in bundles {
        let bench = Arc::clone(bench);
        starts.spawn(async move {
            let io = Io::new(&bundle, "init", true)?;
            Ok((lxc::Container::execute(&bench, &bundle, &io).await?, bundle))
        });
    }
    let containers = all(starts).await?;
    let took = begin.elapsed();
    for (container, bundle) in containers {
        container.kill().await?;
        bench.bundles.remove(&bundle)?;
    }
    Ok(vec![(Metric::BurstTime, took.as_secs_f64() * 1e3)])
}
