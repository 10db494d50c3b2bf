//! Throughput and CPU of the stdio copy: a container that writes, and one that reads and writes.

use std::{fs::File, time::Instant};

use proxmox_lxcri::error::{Error, Result};

use crate::{
    bundle::Bundle,
    candidate::Candidate,
    crun::Container,
    fifo, process,
    results::{Metric, Results},
    run::{Bench, progress},
    shim::{Io, Shim},
};

/// Bytes of one write of the container.
const BLOCK: u64 = 64 << 10;

/// Runs the rounds.
///
/// # Errors
/// The first failure of any candidate, and every lost byte.
pub(crate) async fn measure(bench: &Bench, results: &mut Results) -> Result<()> {
    let rounds = bench.arguments.rounds;
    progress(&format!(
        "stdio: {rounds} rounds of {} MiB",
        bench.arguments.stdio_bytes >> 20
    ));
    for round in 0..rounds {
        // LXC's containers write to the fifos by themselves too, as crun's do; one such limit is enough.
        for candidate in bench.turn(round).filter(|candidate| *candidate != Candidate::Lxc) {
            for direction in [Direction::Out, Direction::Through] {
                let samples = copy(bench, candidate, direction).await;
                results.extend(candidate, samples.map_err(|e| e.context(candidate.title()))?);
            }
        }
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq)]
enum Direction {
    /// The container writes to stdout.
    Out,
    /// The container copies stdin to stdout.
    Through,
}

/// Who copies, if anybody does.
enum Copier {
    Shim(Shim),
    Nobody(Container),
}

async fn copy(bench: &Bench, candidate: Candidate, direction: Direction) -> Result<Vec<(Metric, f64)>> {
    let bytes = bench.arguments.stdio_bytes / BLOCK * BLOCK;
    let count = format!("count={}", bytes / BLOCK);
    let block = format!("bs={BLOCK}");
    let args: &[&str] = match direction {
        Direction::Out => &["/bin/dd", "if=/dev/zero", &block, &count],
        Direction::Through => &["/bin/cat"],
    };
    let bundle = bench.bundles.make(args, None)?;
    let mut io = Io::new(&bundle, "init", false)?;
    if direction == Direction::Through {
        io = io.with_stdin(&bundle, "init")?;
    }
    // Held open by the harness, so that neither the shim nor the container waits for it.
    let stdout = fifo::open(io.stdout())?;
    let stdin = match direction {
        Direction::Out => None,
        Direction::Through => Some(fifo::open(io.stdin())?),
    };
    let copier = if candidate.has_shim() {
        let shim = Shim::start(bench, candidate, &bundle).await?;
        shim.create(&bundle, &io).await?;
        Copier::Shim(shim)
    } else {
        Copier::Nobody(Container::create(bench, &bundle, &io).await?)
    };
    let pid = match &copier {
        Copier::Shim(shim) => Some(shim.pid()),
        Copier::Nobody(_) => None,
    };
    let transfer = tokio::task::spawn_blocking(move || transfer(&stdout, stdin, bytes, pid));
    match &copier {
        Copier::Shim(shim) => shim.start_process(&bundle.id, "").await?,
        Copier::Nobody(container) => drop(container.start().await?),
    }
    let joined = transfer.await;
    let (seconds, cpu_ms) = joined.map_err(|e| Error::unknown("the thread that copies panicked").with_source(e))??;
    end(bench, copier, &bundle, direction).await?;
    bench.bundles.remove(&bundle)?;

    #[allow(clippy::cast_precision_loss)]
    let mib_per_second = bytes as f64 / f64::from(1 << 20) / seconds;
    let (throughput, cpu) = match direction {
        Direction::Out => (Metric::Out, Metric::OutCpu),
        Direction::Through => (Metric::Through, Metric::ThroughCpu),
    };
    let mut samples = vec![(throughput, mib_per_second)];
    samples.extend(cpu_ms.map(|cpu_ms| (cpu, cpu_ms)));
    Ok(samples)
}

/// Moves the bytes: seconds from the first byte out to the last, and the shim's CPU time in between, milliseconds.
fn transfer(stdout: &File, stdin: Option<File>, bytes: u64, pid: Option<u32>) -> Result<(f64, Option<f64>)> {
    let writer = stdin.map(|stdin| std::thread::spawn(move || fifo::fill(&stdin, bytes).map(|()| stdin)));
    let mark = || (Instant::now(), pid.map(process::cpu_time));
    let (first, last) = fifo::drain(stdout, bytes, mark)?;
    if let Some(writer) = writer {
        let written = writer.join();
        written.map_err(|_| Error::unknown("the thread that writes a container's input panicked"))??;
    }
    let cpu = match (first.1.transpose()?, last.1.transpose()?) {
        (Some(first), Some(last)) => Some((last.saturating_sub(first)).as_secs_f64() * 1e3),
        _ => None,
    };
    Ok(((last.0 - first.0).as_secs_f64(), cpu))
}

async fn end(bench: &Bench, copier: Copier, bundle: &Bundle, direction: Direction) -> Result<()> {
    match copier {
        Copier::Shim(shim) => {
            if direction == Direction::Through {
                shim.kill(&bundle.id).await?;
            }
            bench.events.exit(&bundle.id, &bundle.id).await?;
            shim.delete(&bundle.id, "").await?;
            shim.shutdown(&bundle.id).await
        }
        Copier::Nobody(container) => {
            match direction {
                Direction::Out => drop(container.exited().await?),
                Direction::Through => drop(container.kill().await?),
            }
            container.delete().await.map(|_| ())
        }
    }
}
