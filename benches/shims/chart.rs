//! The chart: one small group of bars per metric, each on its own scale, so that 2 ms and 200 ms are both readable.

use std::fmt::Write;

use crate::{
    arguments::Arguments,
    candidate::Candidate,
    report::{number, title},
    results::{Metric, Results, Unit},
};

/// What is drawn, where there are samples.
const SHOWN: [Metric; 15] = [
    Metric::ShimStart,
    Metric::Create,
    Metric::Start,
    Metric::FirstOutput,
    Metric::CreateToOutput,
    Metric::Exec,
    Metric::KillToExit,
    Metric::Delete,
    Metric::Total,
    Metric::Pss,
    Metric::PerContainer,
    Metric::Out,
    Metric::Through,
    Metric::BurstTime,
    Metric::BurstMemory,
];

const WIDTH: f64 = 960.0;
const MARGIN: f64 = 24.0;
const COLUMN: f64 = (WIDTH - 3.0 * MARGIN) / 2.0;
const BAR: f64 = 14.0;
const STEP: f64 = 18.0;
/// Room for the number right of the longest bar.
const NUMBERS: f64 = 96.0;
const HEADER: f64 = 92.0;

/// An SVG picture, on white, with the fonts that every viewer has.
pub(crate) fn draw(arguments: &Arguments, results: &Results) -> String {
    let groups: Vec<Metric> = SHOWN.into_iter().filter(|metric| results.has(*metric)).collect();
    #[allow(clippy::cast_precision_loss)]
    let group_height = 34.0 + STEP * arguments.candidates.len() as f64;
    #[allow(clippy::cast_precision_loss)]
    let rows = groups.len().div_ceil(2) as f64;
    let height = HEADER + rows * group_height + 56.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif\" font-size=\"12\" fill=\"#222222\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
    );
    label(
        &mut svg,
        MARGIN,
        34.0,
        "font-size=\"18\" font-weight=\"bold\"",
        "Shims side by side, one run",
    );
    let spread = format!(
        "bars: medians; lines: p10 to p90; each group has its own scale; ×: of {}, for LXC of {}; {} iterations",
        Candidate::Ours.reference().title(),
        Candidate::OursLxc.reference().title(),
        arguments.iterations
    );
    label(&mut svg, MARGIN, 54.0, "fill=\"#666666\"", &spread);
    legend(&mut svg, arguments);
    for (place, metric) in groups.iter().enumerate() {
        #[allow(clippy::cast_precision_loss)]
        let (column, row) = ((place % 2) as f64, (place / 2) as f64);
        let left = MARGIN + column * (COLUMN + MARGIN);
        group(&mut svg, arguments, results, *metric, left, HEADER + row * group_height);
    }
    let quiet = "fill=\"#666666\" font-size=\"11\"";
    let machine = &results.machine;
    label(&mut svg, MARGIN, height - 32.0, quiet, &machine.line());
    let programs = format!("{}; {}, commit {}", machine.programs(), machine.date, machine.commit);
    label(&mut svg, MARGIN, height - 16.0, quiet, &programs);
    svg.push_str("</svg>\n");
    svg
}

fn legend(svg: &mut String, arguments: &Arguments) {
    let mut left = MARGIN;
    for candidate in &arguments.candidates {
        rectangle(svg, left, 66.0, 12.0, 12.0, candidate.colour());
        label(svg, left + 18.0, 76.0, "", candidate.title());
        left += 150.0;
    }
}

fn group(svg: &mut String, arguments: &Arguments, results: &Results, metric: Metric, left: f64, top: f64) {
    let direction = if metric.unit() == Unit::MebibytesPerSecond {
        "more is better"
    } else {
        "less is better"
    };
    let heading = format!("{}, {}", title(arguments, metric).trim(), metric.unit().symbol());
    label(svg, left, top + 20.0, "font-weight=\"bold\"", &heading);
    label(
        svg,
        left + COLUMN,
        top + 20.0,
        "fill=\"#888888\" font-size=\"10\" text-anchor=\"end\"",
        direction,
    );
    let cells: Vec<(Candidate, _)> = arguments
        .candidates
        .iter()
        .filter_map(|candidate| Some((*candidate, results.summary(metric, *candidate)?)))
        .collect();
    let longest = cells
        .iter()
        .map(|(_, summary)| summary.p90)
        .fold(f64::MIN_POSITIVE, f64::max);
    let scale = (COLUMN - NUMBERS) / longest;
    let mut y = top + 28.0;
    for (candidate, summary) in cells {
        rectangle(svg, left, y, (summary.median * scale).max(1.0), BAR, candidate.colour());
        let middle = y + BAR / 2.0;
        let _ = writeln!(
            svg,
            "<path d=\"M{:.1} {middle:.1}H{:.1}\" stroke=\"#222222\" stroke-width=\"1.2\"/>",
            left + summary.p10 * scale,
            left + summary.p90 * scale
        );
        let reference = candidate.reference();
        let ratio = match results.summary(metric, reference) {
            Some(other) if candidate != reference && other.median > 0.0 => {
                format!("  ({:.2} ×)", summary.median / other.median)
            }
            _ => String::new(),
        };
        let x = left + summary.median.max(summary.p90) * scale + 6.0;
        label(svg, x, y + 11.5, "", &format!("{}{ratio}", number(summary.median)));
        y += STEP;
    }
}

fn rectangle(svg: &mut String, x: f64, y: f64, width: f64, height: f64, colour: &str) {
    let _ = writeln!(
        svg,
        "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{colour}\"/>"
    );
}

fn label(svg: &mut String, x: f64, y: f64, attributes: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" {attributes}>{text}</text>");
}
