//! Samples, and what is made of them.

use std::collections::BTreeMap;

use proxmox_lxcri::error::{Error, Result};
use serde::Serialize;

use crate::{candidate::Candidate, machine::Machine};

macro_rules! metrics {
    ($($(#[$doc:meta])* $name:ident = $key:literal, $title:literal, $unit:ident;)*) => {
        /// A row of the table.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub(crate) enum Metric { $($(#[$doc])* $name,)* }

        impl Metric {
            /// In the order of the table.
            pub(crate) const ALL: &'static [Self] = &[$(Self::$name),*];
            /// Its name in the JSON.
            pub(crate) fn key(self) -> &'static str { match self { $(Self::$name => $key,)* } }
            /// Its name for a person.
            pub(crate) fn title(self) -> &'static str { match self { $(Self::$name => $title,)* } }
            /// What its numbers count.
            pub(crate) fn unit(self) -> Unit { match self { $(Self::$name => Unit::$unit,)* } }
        }
    };
}

metrics! {
    /// From the spawn of `start` to the answer of the first RPC.
    ShimStart = "shim_start", "shim start", Milliseconds;
    /// The `start` command alone.
    StartCommand = "start_command", "  its start command", Milliseconds;
    /// Task.Create, or `crun create`.
    Create = "create", "create", Milliseconds;
    /// Task.Start, or `crun start`.
    Start = "start", "start", Milliseconds;
    /// From the call of start to the first byte of stdout.
    FirstOutput = "first_output", "start to first output", Milliseconds;
    /// From the call of create, or the spawn of `crun create` or `lxc-execute`, to the first byte of stdout.
    CreateToOutput = "create_to_output", "create to first output", Milliseconds;
    /// Add, start, exit and delete of an exec, or `crun exec` or `lxc-attach`.
    Exec = "exec", "exec", Milliseconds;
    /// Task.Exec.
    ExecAdd = "exec_add", "  add", Milliseconds;
    /// Task.Start of the exec.
    ExecStart = "exec_start", "  start", Milliseconds;
    /// From the call of Task.Start to the exit event.
    ExecExit = "exec_exit", "  start to exit event", Milliseconds;
    /// Task.Delete of the exec.
    ExecDelete = "exec_delete", "  delete", Milliseconds;
    /// From the call of Task.Kill to the exit event, or of `crun kill` or `lxc-stop` to init's end.
    KillToExit = "kill_to_exit", "kill to exit event", Milliseconds;
    /// Processes and threads that the machine started meanwhile.
    KillForks = "kill_forks", "  processes born", Count;
    /// Task.Delete, or `crun delete`, or from init's end to that of `lxc-execute`.
    Delete = "delete", "delete", Milliseconds;
    /// From Task.Shutdown to the shim's end.
    Shutdown = "shutdown", "shim shutdown", Milliseconds;
    /// From the spawn of `start` to the first byte of stdout.
    Total = "total", "total to first output", Milliseconds;
    /// From the spawn of `start` to the shim's end.
    Whole = "whole", "whole life", Milliseconds;
    /// Mean PSS of the shims side by side; with LXC, of each together with its monitors.
    Pss = "pss", "PSS of a shim", Mebibytes;
    /// Mean private memory of the shims side by side.
    Private = "private", "private memory", Mebibytes;
    /// PSS of a shim among them with one container.
    PssOne = "pss_one_container", "PSS, 1 container", Mebibytes;
    /// The same shim's with many containers.
    PssMany = "pss_many_containers", "PSS, 10 containers", Mebibytes;
    /// What each further container adds to the PSS.
    PerContainer = "per_container", "each further container", Kibibytes;
    /// Container to stdout.
    Out = "stdout", "stdout", MebibytesPerSecond;
    /// The shim's CPU time for it.
    OutCpu = "stdout_cpu", "  CPU of the shim", Milliseconds;
    /// Stdin through the container to stdout.
    Through = "stdin_stdout", "stdin to stdout", MebibytesPerSecond;
    /// The shim's CPU time for it.
    ThroughCpu = "stdin_stdout_cpu", "  CPU of the shim", Milliseconds;
    /// From the first shim's start until all containers run.
    BurstTime = "burst_time", "50 at once, started", Milliseconds;
    /// Sum of the PSS of their shims.
    BurstMemory = "burst_memory", "  PSS of their shims", Mebibytes;
}

/// What a number counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    Milliseconds,
    Mebibytes,
    Kibibytes,
    MebibytesPerSecond,
    Count,
}

impl Unit {
    /// Its abbreviation.
    pub(crate) fn symbol(self) -> &'static str {
        match self {
            Self::Milliseconds => "ms",
            Self::Mebibytes => "MiB",
            Self::Kibibytes => "KiB",
            Self::MebibytesPerSecond => "MiB/s",
            Self::Count => "",
        }
    }
}

/// Median and spread of the samples of one metric and candidate.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Summary {
    /// Number of samples.
    pub(crate) count: usize,
    pub(crate) median: f64,
    pub(crate) p10: f64,
    pub(crate) p90: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Summary {
    fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        Some(Self {
            count: sorted.len(),
            median: percentile(&sorted, 0.5),
            p10: percentile(&sorted, 0.1),
            p90: percentile(&sorted, 0.9),
            min,
            max,
        })
    }
}

/// Of a sorted, not empty slice, interpolated.
#[allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss
)]
fn percentile(sorted: &[f64], part: f64) -> f64 {
    let place = part * (sorted.len() - 1) as f64;
    let below = place.floor();
    let (low, high) = (sorted[below as usize], sorted[place.ceil() as usize]);
    low + (high - low) * (place - below)
}

/// Everything that one run saw.
pub(crate) struct Results {
    /// Where it ran.
    pub(crate) machine: Machine,
    /// What a reader has to know.
    pub(crate) notes: Vec<String>,
    samples: BTreeMap<(Metric, Candidate), Vec<f64>>,
}

impl Results {
    /// Without samples.
    pub(crate) fn new(machine: Machine, notes: Vec<String>) -> Self {
        Self {
            machine,
            notes,
            samples: BTreeMap::new(),
        }
    }

    /// Adds the samples of one iteration.
    pub(crate) fn extend(&mut self, candidate: Candidate, samples: Vec<(Metric, f64)>) {
        for (metric, value) in samples {
            self.samples.entry((metric, candidate)).or_default().push(value);
        }
    }

    /// The samples of one cell of the table.
    pub(crate) fn samples(&self, metric: Metric, candidate: Candidate) -> &[f64] {
        self.samples.get(&(metric, candidate)).map_or(&[], Vec::as_slice)
    }

    /// `None` where there are no samples.
    pub(crate) fn summary(&self, metric: Metric, candidate: Candidate) -> Option<Summary> {
        Summary::of(self.samples(metric, candidate))
    }

    /// Whether any candidate has samples of a metric.
    pub(crate) fn has(&self, metric: Metric) -> bool {
        Candidate::ALL
            .iter()
            .any(|candidate| !self.samples(metric, *candidate).is_empty())
    }

    /// Nobody measures in zero time, and nothing weighs less than nothing: such a number is a defect of the harness.
    ///
    /// # Errors
    /// `Unknown`, naming the first such number, or when there is none at all.
    pub(crate) fn check(&self) -> Result<()> {
        if self.samples.is_empty() {
            return Err(Error::unknown("nothing was measured"));
        }
        for ((metric, candidate), samples) in &self.samples {
            let may_be_zero = matches!(metric, Metric::KillForks | Metric::PerContainer);
            let sane = |value: &f64| value.is_finite() && (*value > 0.0 || may_be_zero && *value >= 0.0);
            if let Some(odd) = samples.iter().find(|value| !sane(value)) {
                return Err(Error::unknown(format!(
                    "{} of {} was measured as {odd}",
                    metric.key(),
                    candidate.key()
                )));
            }
        }
        Ok(())
    }
}
