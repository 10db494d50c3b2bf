//! The table, the JSON, and the section of the README.

use std::{
    fmt::Write,
    fs,
    path::{Path, PathBuf},
};

use proxmox_lxcri::error::{Context, Error, Result};
use serde_json::{Map, Value, json};

use crate::{
    arguments::Arguments,
    chart,
    results::{Metric, Results, Summary, Unit},
    targets::{self, Target},
};

const BEGIN: &str = "<!-- bench:begin -->";
const END: &str = "<!-- bench:end -->";
/// Path of the chart inside the repository.
const CHART: &str = "docs/bench/shims.svg";

/// Prints the table and writes the files.
///
/// # Errors
/// The operating system's; a README without the marks.
pub(crate) fn publish(arguments: &Arguments, results: &Results) -> Result<()> {
    let targets = targets::evaluate(results);
    print!("{}", table(arguments, results, &targets));
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = target_folder(root).join("bench");
    let json = folder.join("shims.json");
    write(&json, &format!("{:#}\n", document(arguments, results, &targets)))?;
    let svg = chart::draw(arguments, results);
    write(&folder.join("shims.svg"), &svg)?;
    println!("\nwritten: {}, {}", json.display(), folder.join("shims.svg").display());
    if arguments.readme {
        write(&root.join(CHART), &svg)?;
        let readme = root.join("README.md");
        let text = fs::read_to_string(&readme).context(|| format!("cannot read {}", readme.display()))?;
        write(&readme, &replace(&text, &section(arguments, results, &targets))?)?;
        println!("written: {}, {}", readme.display(), root.join(CHART).display());
    }
    Ok(())
}

/// cargo's target folder: this program lies in `<target>/<profile>/deps`.
fn target_folder(root: &Path) -> PathBuf {
    let program = std::env::current_exe().ok();
    let folder = program.as_deref().and_then(|program| program.ancestors().nth(3));
    folder.map_or_else(|| root.join("target"), Path::to_path_buf)
}

fn write(path: &Path, text: &str) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)
        .and_then(|()| fs::write(path, text))
        .context(|| format!("cannot write {}", path.display()))
}

/// Three digits that count.
pub(crate) fn number(value: f64) -> String {
    match value {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value => format!("{value:.2}"),
    }
}

fn cell(metric: Metric, summary: Option<Summary>) -> String {
    match summary {
        None => "-".into(),
        Some(summary) if metric.unit() == Unit::Count => format!("{:.0} (min {:.0})", summary.median, summary.min),
        Some(summary) => format!(
            "{} ({}–{})",
            number(summary.median),
            number(summary.p10),
            number(summary.p90)
        ),
    }
}

/// The title of a row, with the numbers of this run where they differ from the usual ones.
pub(crate) fn title(arguments: &Arguments, metric: Metric) -> String {
    match metric {
        Metric::PssMany => format!("PSS, {} containers", arguments.containers),
        Metric::Pss => format!("PSS, {} pods", arguments.pods),
        Metric::BurstTime => format!("{} at once, started", arguments.burst),
        Metric::BurstMemory => format!("  PSS of the {} shims", arguments.burst),
        metric => metric.title().into(),
    }
}

fn table(arguments: &Arguments, results: &Results, targets: &[Target]) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(text, "\n{}\n{}", results.machine.line(), results.machine.programs());
    let _ = writeln!(
        text,
        "{}, commit {}; median (p10–p90) of {} iterations{}\n",
        results.machine.date,
        results.machine.commit,
        arguments.iterations,
        if arguments.quick {
            "; QUICK: the numbers say little"
        } else {
            ""
        }
    );
    for note in &results.notes {
        let _ = writeln!(text, "{note}\n");
    }
    let _ = write!(text, "{:<22} {:<5}", "", "");
    for candidate in &arguments.candidates {
        let _ = write!(text, " {:>17}", candidate.title());
    }
    text.push('\n');
    for metric in Metric::ALL.iter().copied().filter(|metric| results.has(*metric)) {
        let _ = write!(text, "{:<22} {:<5}", title(arguments, metric), metric.unit().symbol());
        for candidate in &arguments.candidates {
            let _ = write!(text, " {:>17}", cell(metric, results.summary(metric, *candidate)));
        }
        text.push('\n');
    }
    if !targets.is_empty() {
        let _ = writeln!(text, "\n{:<42} {:>12}", "target", "measured");
        for target in targets {
            let _ = writeln!(
                text,
                "{:<42} {:>12}  {}",
                target.wanted,
                target.shown(),
                target.verdict()
            );
        }
    }
    text
}

fn document(arguments: &Arguments, results: &Results, targets: &[Target]) -> Value {
    let mut metrics = Map::new();
    for metric in Metric::ALL.iter().copied().filter(|metric| results.has(*metric)) {
        let mut candidates = Map::new();
        for candidate in &arguments.candidates {
            if let Some(summary) = results.summary(metric, *candidate) {
                let samples = results.samples(metric, *candidate);
                let value = json!({ "summary": summary, "samples": samples });
                candidates.insert(candidate.key().into(), value);
            }
        }
        let value = json!({ "title": title(arguments, metric).trim(), "unit": metric.unit().symbol(), "candidates": candidates });
        metrics.insert(metric.key().into(), value);
    }
    json!({
        "machine": results.machine,
        "run": {
            "quick": arguments.quick,
            "iterations": arguments.iterations,
            "warm_up": arguments.warm_up,
            "pods": arguments.pods,
            "containers": arguments.containers,
            "settle_ms": u64::try_from(arguments.settle.as_millis()).unwrap_or(u64::MAX),
            "stdio_bytes": arguments.stdio_bytes,
            "burst": arguments.burst,
        },
        "metrics": metrics,
        "targets": targets,
        "notes": results.notes,
    })
}

fn section(arguments: &Arguments, results: &Results, targets: &[Target]) -> String {
    let machine = &results.machine;
    let mut text = format!(
        "![Medians of the phases, memory and throughput; shorter is better, except for throughput]({CHART})\n\n\
         `make bench` on {}; {}. {}, commit {}. Medians of one run in which the candidates take turns, {} iterations, \
         p10 to p90 in brackets.\n\n",
        machine.line(),
        machine.programs(),
        machine.date,
        machine.commit,
        arguments.iterations
    );
    for note in &results.notes {
        let _ = writeln!(text, "{note}\n");
    }
    text.push_str("| |");
    for candidate in &arguments.candidates {
        let _ = write!(text, " {} |", candidate.title());
    }
    text.push_str("\n| --- |");
    text.push_str(&" ---: |".repeat(arguments.candidates.len()));
    text.push('\n');
    for metric in Metric::ALL.iter().copied().filter(|metric| results.has(*metric)) {
        let title = title(arguments, metric);
        let indent = if title.starts_with(' ') { "&emsp;" } else { "" };
        let unit = metric.unit().symbol();
        let comma = if unit.is_empty() { "" } else { ", " };
        let _ = write!(text, "| {indent}{}{comma}{unit} |", title.trim());
        for candidate in &arguments.candidates {
            let _ = write!(text, " {} |", cell(metric, results.summary(metric, *candidate)));
        }
        text.push('\n');
    }
    if !targets.is_empty() {
        text.push_str("\n| target | measured | |\n| --- | ---: | --- |\n");
        for target in targets {
            let _ = writeln!(
                text,
                "| {} | {} | {} |",
                target.wanted,
                target.shown(),
                target.verdict()
            );
        }
    }
    text
}

/// Puts `section` between the marks.
fn replace(readme: &str, section: &str) -> Result<String> {
    let missing = || Error::invalid(format!("README.md has no {BEGIN} … {END}"));
    let (head, rest) = readme.split_once(BEGIN).ok_or_else(missing)?;
    let (_, tail) = rest.split_once(END).ok_or_else(missing)?;
    Ok(format!("{head}{BEGIN}\n{section}{END}{tail}"))
}
