//! The benchmark's figures as Markdown: tables for people, in a section that says on which day, kernel and processor
//! they were measured, because they mean nothing without.

use std::fmt::Write as _;
use std::fs;
use std::process::Command;

use super::probes::ProbeTime;
use super::slices::Outcome;

/// One page's rows.
pub struct Page {
    pub title: String,
    /// Why a row is missing is part of the result.
    pub rows: Vec<(&'static str, Result<Outcome, String>)>,
    pub probes: Vec<(&'static str, Result<ProbeTime, String>)>,
}

impl Page {
    pub fn failures(&self) -> usize {
        let rows = self.rows.iter().filter(|(_, outcome)| outcome.is_err()).count();
        rows + self.probes.iter().filter(|(_, time)| time.is_err()).count()
    }
}

/// The heading under which a run on this machine today is filed.
pub fn title() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let kernel = read("/proc/sys/kernel/osrelease").trim().to_owned();
    let info = read("/proc/cpuinfo");
    let field = |line: &str| Some(line.strip_prefix("model name")?.split_once(':')?.1.trim().to_owned());
    let model = info.lines().find_map(field).unwrap_or_else(|| "unknown processor".into());
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{}, Linux {kernel}, {model}, {cpus} CPUs", today())
}

fn today() -> String {
    let output = Command::new("date").args(["-u", "+%Y-%m-%d"]).output();
    output.map_or_else(|_| "unknown day".into(), |out| String::from_utf8_lossy(&out.stdout).trim().to_owned())
}

/// The section's text below its heading.
pub fn render(method: &str, pages: &[Page]) -> String {
    let mut text = format!("{method}\n");
    for page in pages {
        write!(text, "\n### {}\n\n", page.title).expect(INFALLIBLE);
        text.push_str(
            "| profiler | CPU per request, off → on | CPU ratio | throughput ratio | p99 off → on | its own CPU | its memory | recorded |\n\
             |---|---|---|---|---|---|---|---|\n",
        );
        for (label, outcome) in &page.rows {
            match outcome {
                Ok(outcome) => row(&mut text, label, outcome),
                Err(reason) => {
                    writeln!(text, "| {label} | not measured: {} | | | | | | |", one_line(reason))
                        .expect(INFALLIBLE);
                }
            }
        }
        for (label, time) in &page.probes {
            match time {
                Ok(time) => probes(&mut text, label, time),
                Err(reason) => {
                    write!(
                        text,
                        "\nTime inside the BPF programs, {label}: not measured: {}\n",
                        one_line(reason)
                    )
                    .expect(INFALLIBLE);
                }
            }
        }
    }
    text
}

const INFALLIBLE: &str = "writing to a string cannot fail";

fn row(text: &mut String, label: &str, outcome: &Outcome) {
    let (cpu_off, cpu_on) = outcome.cpu_ms;
    let (p99_off, p99_on) = outcome.p99_ms;
    let own_cpu = outcome.own_cpu_percent.map_or("–".into(), |percent| format!("{percent:.1} %"));
    let memory = outcome
        .own_resident_bytes
        .map_or("–".into(), |bytes| format!("{:.0} MiB", bytes as f64 / 1048576.0));
    let recorded =
        outcome.recorded.map_or("–".into(), |(recorded, answered)| format!("{recorded} of {answered}"));
    writeln!(
        text,
        "| {label} | {cpu_off:.2} → {cpu_on:.2} ms | **{}** | {} | {p99_off:.1} → {p99_on:.1} ms | {own_cpu} | {memory} | {recorded} |",
        outcome.cpu_ratio, outcome.throughput_ratio
    )
    .expect(INFALLIBLE);
}

fn probes(text: &mut String, label: &str, time: &ProbeTime) {
    let total: f64 = time.per_request_us.iter().map(|(_, us)| us).sum();
    write!(
        text,
        "\nTime inside the BPF programs, {label}: {total:.1} µs per request, {:.2} % of one core.\n\n| program | µs per request |\n|---|---|\n",
        time.percent_of_core
    )
    .expect(INFALLIBLE);
    // Programs that did not run would only make the table long.
    for (labels, us) in time.per_request_us.iter().filter(|(_, us)| *us >= 0.005) {
        writeln!(text, "| `{labels}` | {us:.2} |").expect(INFALLIBLE);
    }
}

/// Errors may span lines; a table's cell must not, nor may it hold a column's edge.
fn one_line(reason: &str) -> String {
    reason.lines().next().unwrap_or_default().replace('|', "/")
}

/// Files a section in a document: in place of the one with the same heading, else before all others, so that the
/// newest comes first.
pub fn merge(document: &str, title: &str, body: &str) -> String {
    let heading = format!("## {title}");
    let section = format!("{heading}\n\n{}\n", body.trim());
    let lines: Vec<&str> = document.lines().collect();
    let next_from = |from: usize| {
        lines.iter().skip(from).position(|line| line.starts_with("## ")).map_or(lines.len(), |at| from + at)
    };
    let (start, end) = match lines.iter().position(|line| *line == heading) {
        Some(own) => (own, next_from(own + 1)),
        None => (next_from(0), next_from(0)),
    };
    let mut parts: Vec<String> = vec![lines[..start].join("\n"), section, lines[end..].join("\n")];
    parts.retain(|part| !part.trim().is_empty());
    let mut merged = parts.iter().map(|part| part.trim()).collect::<Vec<_>>().join("\n\n");
    merged.push('\n');
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::stats::Estimate;

    #[test]
    fn a_new_section_comes_first_and_an_old_one_is_replaced() {
        let first = merge("# Overhead\n\nIntroduction.\n", "day 1", "one\n");
        assert_eq!(first, "# Overhead\n\nIntroduction.\n\n## day 1\n\none\n");
        let second = merge(&first, "day 2", "two");
        assert_eq!(second, "# Overhead\n\nIntroduction.\n\n## day 2\n\ntwo\n\n## day 1\n\none\n");
        let again = merge(&second, "day 2", "### sub\n\nTWO");
        assert_eq!(again, "# Overhead\n\nIntroduction.\n\n## day 2\n\n### sub\n\nTWO\n\n## day 1\n\none\n");
        assert_eq!(merge(&again, "day 2", "two"), second);
        assert_eq!(merge("", "day 1", "one"), "## day 1\n\none\n");
    }

    #[test]
    fn a_failed_row_says_why_in_one_cell() {
        let estimate = Estimate { median: 1.02, interval: Some((1.01, 1.03)), values: 40 };
        let outcome = Outcome {
            cpu_ms: (10.0, 10.2),
            cpu_ratio: estimate,
            throughput_ratio: Estimate { median: 0.98, interval: None, values: 3 },
            p99_ms: (20.0, 21.0),
            own_cpu_percent: Some(1.25),
            own_resident_bytes: Some(64 << 20),
            recorded: None,
        };
        let page = Page {
            title: "a page".into(),
            rows: vec![("good", Ok(outcome)), ("bad", Err("a | b\nmore".into()))],
            probes: Vec::new(),
        };
        assert_eq!(page.failures(), 1);
        let text = render("How.", &[page]);
        let expected = "| good | 10.00 → 10.20 ms | **1.020 (1.010 to 1.030)** | 0.980 (n=3) | 20.0 → 21.0 ms | 1.2 % | 64 MiB | – |\n\
                        | bad | not measured: a / b | | | | | | |\n";
        assert!(text.ends_with(expected), "{text}");
    }
}
