//! The phases of one container, from the shim's start to its end.

use std::time::{Duration, Instant};

use proxmox_lxcri::error::{Error, Result};

use crate::{
    candidate::Candidate,
    crun::Container,
    lxc, process,
    results::{Metric, Results},
    run::{Bench, progress},
    shim::{Io, Shim},
};

/// Prints, then stays until it is killed.
pub(crate) const INIT: [&str; 3] = ["/bin/sh", "-c", "echo ready; exec /bin/sleep 3600"];
/// The process of an exec: over at once.
const EXEC: [&str; 1] = ["/bin/true"];

/// Before a candidate's turn. The first process in a while that joins a cgroup waits for a grace period of the kernel's RCU, and for
/// some milliseconds the next ones do not (rcu_sync_enter in cgroup_procs_write_start). Nobody is to profit from who was there before,
/// as those would who have no shim to start.
const QUIET: Duration = Duration::from_millis(50);

/// Runs the iterations.
///
/// # Errors
/// The first failure of any candidate.
pub(crate) async fn measure(bench: &Bench, results: &mut Results) -> Result<()> {
    let warm_up = bench.arguments.warm_up;
    let count = bench.arguments.iterations;
    progress(&format!("lifecycle: {warm_up} + {count} iterations"));
    for iteration in 0..warm_up + count {
        for candidate in bench.turn(iteration) {
            tokio::time::sleep(QUIET).await;
            let samples = match candidate {
                Candidate::Crun => bare_crun(bench).await,
                Candidate::Lxc => bare_lxc(bench).await,
                _ => shim(bench, candidate).await,
            };
            let samples = samples.map_err(|e| e.context(format!("{}, iteration {iteration}", candidate.title())))?;
            if iteration >= warm_up {
                results.extend(candidate, samples);
            }
        }
    }
    Ok(())
}

/// Milliseconds.
fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

async fn shim(bench: &Bench, candidate: Candidate) -> Result<Vec<(Metric, f64)>> {
    let bundle = bench.bundles.make(&INIT, None)?;
    let id = bundle.id.as_str();
    let io = Io::new(&bundle, "init", true)?;
    let exec_io = Io::new(&bundle, "exec", true)?;

    let shim = Shim::start(bench, candidate, &bundle).await?;

    let begin_create = Instant::now();
    shim.create(&bundle, &io).await?;
    let begin_start = Instant::now();
    shim.start_process(id, "").await?;
    let started = begin_start.elapsed();
    let first = io.first().await?;

    let begin_exec = Instant::now();
    shim.exec(id, "exec", &EXEC, &exec_io).await?;
    let exec_added = Instant::now();
    shim.start_process(id, "exec").await?;
    let exec_started = Instant::now();
    let exec_exited = bench.events.exit(id, "exec").await?;
    let begin_exec_delete = Instant::now();
    let status = shim.delete(id, "exec").await?;
    let exec_deleted = Instant::now();
    if status != 0 {
        return Err(Error::unknown(format!("the exec ended with status {status}")));
    }

    let forks = process::forks()?;
    let begin_kill = Instant::now();
    shim.kill(id).await?;
    let exited = bench.events.exit(id, id).await?;
    let forks = process::forks()? - forks;

    let begin_delete = Instant::now();
    let status = shim.delete(id, "").await?;
    let deleted = begin_delete.elapsed();
    if status != 137 {
        return Err(Error::unknown(format!(
            "the killed container ended with status {status}, not 137"
        )));
    }
    let (begin, usable, start_command) = (shim.begin, shim.usable, shim.start_command);
    let begin_shutdown = Instant::now();
    shim.shutdown(id).await?;
    let end = Instant::now();

    bench.bundles.remove(&bundle)?;
    Ok(vec![
        (Metric::ShimStart, ms(usable)),
        (Metric::StartCommand, ms(start_command)),
        (Metric::Create, ms(begin_start - begin_create)),
        (Metric::Start, ms(started)),
        (Metric::FirstOutput, ms(first.duration_since(begin_start))),
        (Metric::CreateToOutput, ms(first.duration_since(begin_create))),
        (Metric::Exec, ms(exec_deleted - begin_exec)),
        (Metric::ExecAdd, ms(exec_added - begin_exec)),
        (Metric::ExecStart, ms(exec_started - exec_added)),
        (Metric::ExecExit, ms(exec_exited.duration_since(exec_added))),
        (Metric::ExecDelete, ms(exec_deleted - begin_exec_delete)),
        (Metric::KillToExit, ms(exited.duration_since(begin_kill))),
        (Metric::KillForks, forks),
        (Metric::Delete, ms(deleted)),
        (Metric::Shutdown, ms(end - begin_shutdown)),
        (Metric::Total, ms(first.duration_since(begin))),
        (Metric::Whole, ms(end - begin)),
    ])
}

async fn bare_crun(bench: &Bench) -> Result<Vec<(Metric, f64)>> {
    let bundle = bench.bundles.make(&INIT, None)?;
    let io = Io::new(&bundle, "init", true)?;

    let container = Container::create(bench, &bundle, &io).await?;
    let started = container.start().await?;
    let first = io.first().await?;
    let exec = container.exec(&EXEC).await?;
    let killed = container.kill().await?;
    let deleted = container.delete().await?;
    let whole = container.begin.elapsed();
    let total = first.duration_since(container.begin);

    bench.bundles.remove(&bundle)?;
    Ok(vec![
        (Metric::Create, ms(container.created)),
        (Metric::Start, ms(started.took())),
        (Metric::FirstOutput, ms(first.duration_since(started.begin))),
        (Metric::CreateToOutput, ms(total)),
        (Metric::Exec, ms(exec)),
        (Metric::KillToExit, ms(killed)),
        (Metric::Delete, ms(deleted)),
        (Metric::Total, ms(total)),
        (Metric::Whole, ms(whole)),
    ])
}

async fn bare_lxc(bench: &Bench) -> Result<Vec<(Metric, f64)>> {
    let bundle = bench.bundles.make(&INIT, None)?;
    let io = Io::new(&bundle, "init", true)?;

    let container = lxc::Container::execute(bench, &bundle, &io).await?;
    let exec = container.attach(&EXEC).await?;
    let (killed, cleaned) = container.kill().await?;
    let whole = container.begin.elapsed();
    let total = container.first.duration_since(container.begin);

    bench.bundles.remove(&bundle)?;
    Ok(vec![
        (Metric::CreateToOutput, ms(total)),
        (Metric::Exec, ms(exec)),
        (Metric::KillToExit, ms(killed)),
        (Metric::Delete, ms(cleaned)),
        (Metric::Total, ms(total)),
        (Metric::Whole, ms(whole)),
    ])
}
