//! What the project wants to reach, as ratios and differences within one run.

use serde::Serialize;

use crate::{
    candidate::Candidate::{self, Crun, GoCrun, GoRunc, Lxc, Ours, OursLxc},
    results::{Metric, Results},
};

/// One target and how far it is.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Target {
    /// What, and how much.
    pub(crate) wanted: String,
    /// The same quantity as it was measured.
    pub(crate) measured: f64,
    /// The bound that it is compared with.
    pub(crate) bound: f64,
    /// "×", "ms", …
    pub(crate) unit: &'static str,
    /// Whether the bound is kept.
    pub(crate) reached: bool,
}

impl Target {
    /// "reached", or by how much not.
    pub(crate) fn verdict(&self) -> String {
        if self.reached {
            return "reached".into();
        }
        format!("missed by {}", quantity((self.measured - self.bound).abs(), self.unit))
    }

    /// The measured quantity with its unit.
    pub(crate) fn shown(&self) -> String {
        quantity(self.measured, self.unit)
    }
}

fn quantity(value: f64, unit: &str) -> String {
    match unit {
        "" => format!("{value:.0}"),
        "×" => format!("{value:.2} ×"),
        unit => format!("{value:.2} {unit}"),
    }
}

/// Compares our medians with the bounds; targets without samples are left out.
pub(crate) fn evaluate(results: &Results) -> Vec<Target> {
    let median = |metric, candidate| results.summary(metric, candidate).map(|summary| summary.median);
    let ratio = |metric: Metric, than: Candidate| Some(median(metric, Ours)? / median(metric, than)?);
    let mut targets = Vec::new();
    let mut add = |wanted: String, measured: Option<f64>, bound: f64, unit: &'static str, at_least: bool| {
        if let Some(measured) = measured {
            let reached = if at_least { measured >= bound } else { measured <= bound };
            targets.push(Target {
                wanted,
                measured,
                bound,
                unit,
                reached,
            });
        }
    };

    add(
        "shim start ≤ 0.3 × Go shim".into(),
        ratio(Metric::ShimStart, GoCrun),
        0.3,
        "×",
        false,
    );
    for (metric, bound) in [
        (Metric::Create, 2.0),
        (Metric::Start, 1.0),
        (Metric::Exec, 2.0),
        (Metric::Delete, 1.0),
    ] {
        let above = median(metric, Ours)
            .zip(median(metric, Crun))
            .map(|(ours, bare)| ours - bare);
        add(
            format!("{} ≤ bare crun + {bound} ms", metric.title()),
            above,
            bound,
            "ms",
            false,
        );
    }
    add(
        "kill to exit event ≤ 2 ms".into(),
        median(Metric::KillToExit, Ours),
        2.0,
        "ms",
        false,
    );
    // The whole machine is counted, so the iteration in which nobody else was born tells.
    let forks = results.summary(Metric::KillForks, Ours).map(|summary| summary.min);
    add("kill spawns no program".into(), forks, 0.0, "", false);
    add(
        "total ≤ 0.75 × Go shim + crun".into(),
        ratio(Metric::Total, GoCrun),
        0.75,
        "×",
        false,
    );
    add(
        "total ≤ 0.55 × Go shim + runc".into(),
        ratio(Metric::Total, GoRunc),
        0.55,
        "×",
        false,
    );
    add(
        "PSS of a shim ≤ 0.8 MiB".into(),
        median(Metric::Pss, Ours),
        0.8,
        "MiB",
        false,
    );
    add(
        "PSS of a shim ≤ 0.2 × Go shim".into(),
        ratio(Metric::Pss, GoCrun),
        0.2,
        "×",
        false,
    );
    add(
        "each further container ≤ 40 KiB".into(),
        median(Metric::PerContainer, Ours),
        40.0,
        "KiB",
        false,
    );
    for (throughput, cpu) in [(Metric::Out, Metric::OutCpu), (Metric::Through, Metric::ThroughCpu)] {
        let name = throughput.title();
        add(
            format!("{name} ≥ 1.5 × Go shim"),
            ratio(throughput, GoCrun),
            1.5,
            "×",
            true,
        );
        add(format!("CPU for {name} ≤ Go shim"), ratio(cpu, GoCrun), 1.0, "×", false);
    }
    add(
        "50 at once ≤ 0.75 × Go shim + crun".into(),
        ratio(Metric::BurstTime, GoCrun),
        0.75,
        "×",
        false,
    );
    add(
        "PSS of 50 ≤ 0.2 × Go shim + crun".into(),
        ratio(Metric::BurstMemory, GoCrun),
        0.2,
        "×",
        false,
    );
    let of_lxc = |metric| median(metric, OursLxc).zip(median(metric, Lxc));
    add(
        "LXC: create to output ≤ 1.3 × lxc-execute".into(),
        of_lxc(Metric::CreateToOutput).map(|(ours, bare)| ours / bare),
        1.3,
        "×",
        false,
    );
    add(
        "LXC: exec ≤ lxc-attach + 3 ms".into(),
        of_lxc(Metric::Exec).map(|(ours, bare)| ours - bare),
        3.0,
        "ms",
        false,
    );
    add(
        "LXC: each further container ≤ 3 MiB".into(),
        median(Metric::PerContainer, OursLxc).map(|kib| kib / 1024.0),
        3.0,
        "MiB",
        false,
    );
    targets
}
