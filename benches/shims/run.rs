//! One run: every part, every candidate by turns, then the report.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use proxmox_lxcri::error::{Context, Error, Result};

use crate::{
    arguments::{Arguments, Part},
    bundle::Bundles,
    burst,
    candidate::Candidate,
    events::Events,
    lifecycle, lxc, machine, memory, report,
    results::Results,
    stage::Stage,
    stdio,
};

/// What every measurement needs.
pub(crate) struct Bench {
    /// Where it takes place.
    pub(crate) stage: Stage,
    /// What was asked for.
    pub(crate) arguments: Arguments,
    /// Where events arrive.
    pub(crate) events: Events,
    /// The socket of the events server: TTRPC_ADDRESS.
    pub(crate) events_socket: PathBuf,
    /// Makes bundles.
    pub(crate) bundles: Bundles,
    /// The crun program.
    pub(crate) crun: PathBuf,
    /// The Go shim.
    pub(crate) go: PathBuf,
    /// `lxc-execute`; LXC's other commands lie beside it.
    pub(crate) lxc: PathBuf,
}

impl Bench {
    /// The shim binary of a candidate that has one.
    pub(crate) fn shim(&self, candidate: Candidate) -> &Path {
        match candidate {
            Candidate::Ours | Candidate::OursLxc => &self.arguments.ours,
            _ => &self.go,
        }
    }

    /// The candidates, beginning with another one each time, so that none always follows the same neighbour.
    pub(crate) fn turn(&self, iteration: usize) -> impl Iterator<Item = Candidate> {
        let candidates = &self.arguments.candidates;
        let first = iteration % candidates.len().max(1);
        candidates[first..].iter().chain(&candidates[..first]).copied()
    }
}

/// Measures and reports.
///
/// # Errors
/// A missing program; every failed RPC, command or wait. A missed target is none.
pub(crate) fn run(arguments: &Arguments, stage: Stage) -> Result<()> {
    // One thread, so that a timestamp is taken by the thread that saw the bytes; commands are waited for on the blocking pool.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(arguments.burst.max(64))
        .build()
        .context(|| "cannot build the runtime")?;
    let (arguments, notes) = attendance(arguments)?;
    let done = runtime.block_on(measure(&arguments, notes, stage));
    // A command that hangs is ended by the kernel together with this process.
    runtime.shutdown_background();
    let results = done?;
    report::publish(&arguments, &results)
}

/// Leaves out who needs LXC where that is not installed, with a note.
fn attendance(arguments: &Arguments) -> Result<(Arguments, Vec<String>)> {
    let mut arguments = arguments.clone();
    let mut notes = Vec::new();
    if let Err(e) = machine::program(Path::new(lxc::EXECUTE)) {
        let all = arguments.candidates.len();
        arguments.candidates.retain(|candidate| !candidate.needs_lxc());
        if arguments.candidates.is_empty() {
            return Err(e);
        }
        if arguments.candidates.len() < all {
            notes.push("LXC is not installed (apt-get install lxc), so it is left out.".into());
        }
    }
    Ok((arguments, notes))
}

async fn measure(arguments: &Arguments, notes: Vec<String>, stage: Stage) -> Result<Results> {
    let needs = |candidate| arguments.candidates.contains(&candidate);
    let crun = machine::program(Path::new("crun"))?;
    let mut go = arguments.go.clone();
    if needs(Candidate::GoCrun) || needs(Candidate::GoRunc) {
        go = machine::program(&arguments.go)?;
    }
    if needs(Candidate::GoRunc) {
        machine::program(Path::new("runc"))?;
    }
    if needs(Candidate::Ours) || needs(Candidate::OursLxc) {
        machine::program(&arguments.ours)?;
    }
    let mut lxc = PathBuf::from(lxc::EXECUTE);
    if arguments.candidates.iter().any(|candidate| candidate.needs_lxc()) {
        lxc = machine::program(&lxc)?;
    }
    let events = Events::default();
    let events_socket = stage.scratch.join("events.sock");
    let mut server = events.serve(&events_socket).await?;
    let bench = Arc::new(Bench {
        bundles: Bundles::new(&stage)?,
        stage,
        arguments: arguments.clone(),
        events,
        events_socket,
        crun,
        go,
        lxc,
    });
    let mut results = Results::new(machine::describe(&bench), notes);
    for part in &arguments.parts {
        match part {
            Part::Lifecycle => lifecycle::measure(&bench, &mut results).await,
            Part::Memory => memory::measure(&bench, &mut results).await,
            Part::Stdio => stdio::measure(&bench, &mut results).await,
            Part::Burst => burst::measure(&bench, &mut results).await,
        }
        .map_err(|e| e.context(format!("part {}", part.key())))?;
    }
    server
        .shutdown()
        .await
        .map_err(|e| Error::unknown("cannot end the events server").with_source(e))?;
    results.check()?;
    Ok(results)
}

/// Tells a person who waits what is going on.
pub(crate) fn progress(text: &str) {
    eprintln!("shims: {text}");
}
