//! The benchmark's figures as Markdown: tables for people, in a section that says on which day, kernel and processor
//! they were measured, because they mean nothing without.

use std::fmt::Write as _;
use std::fs;
use std::process::Command;

use super::slices::{Outcome, Pairs};
use super::steady::{Sampling, Steady};
use crate::sh;

/// One page's rows.
pub struct Page {
    pub title: String,
    /// Why a row is missing is part of the result.
    pub rows: Vec<(&'static str, Result<Outcome, String>)>,
    pub steady: Vec<(&'static str, Result<Steady, String>)>,
}

/// How to read the tables.
pub const METHOD: &str = "Client, profiler and workers share the CPUs.

- **pairs**: how many were measured, a slice without and one with the profiler. Where a limit of time left fewer than planned,
  the cell says so. Each ratio is the median over the pairs, with a 95 % interval.
- **CPU per request**: of the workers. Without: the median over all slices. With: that times the ratio; the median of the
  other slices would compare moments in which the machine had different speeds.
- **bare clock**: the timer interrupts that a rate of 999 Hz takes, and nothing else: no program runs, nothing is
  written. In a virtual machine each of them can cost many times what it costs on hardware, and no profiler that
  samples at that rate can cost less.
- **p99**: over all requests of all slices without and with, so not paired.
- **recorded**: requests that reqprof recorded, of those that the client saw answered while it was attached.

The steady state is measured apart: attached once, watched after 5 s under the same load. The profiler's own CPU and the time
inside the BPF programs are shares of one core. For 1,000 samples/s: its own CPU over the samples it took, so that rates can be
compared; at a low rate most of it is the requests', not the samples'. The kernel's count of the time inside the BPF programs
costs something itself, which is in no other table.";

impl Page {
    pub fn failures(&self) -> usize {
        let rows = self.rows.iter().filter(|(_, outcome)| outcome.is_err()).count();
        rows + self.steady.iter().filter(|(_, steady)| steady.is_err()).count()
    }
}

/// The heading under which a run on this machine today is filed.
pub fn title() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let kernel = read("/proc/sys/kernel/osrelease").trim().to_owned();
    let info = read("/proc/cpuinfo");
    let field = |line: &str| Some(line.strip_prefix("model name")?.split_once(':')?.1.trim().to_owned());
    let model = info.lines().find_map(field).unwrap_or_else(|| "unknown processor".into());
    // Distributions and clouds add to it what tells nothing.
    let version = kernel.split('-').next().unwrap_or_default();
    // Timer interrupts cost far more there.
    let machine = if info.contains(" hypervisor") { ", virtual machine" } else { "" };
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let accounting = match kernel_option("CONFIG_IRQ_TIME_ACCOUNTING", &kernel) {
        Some(true) => "interrupts not in CPU time (CONFIG_IRQ_TIME_ACCOUNTING)",
        Some(false) => "interrupts in CPU time (no CONFIG_IRQ_TIME_ACCOUNTING)",
        None => "CONFIG_IRQ_TIME_ACCOUNTING unknown",
    };
    format!("{}, Linux {version}, {model}{machine}, {cpus} CPUs, {accounting}", today())
}

/// Whether the running kernel was built with an option. It matters for that one because the sampler runs in an interrupt:
/// with the option its time is nobody's, without it the interrupted worker's.
fn kernel_option(name: &str, release: &str) -> Option<bool> {
    let files = ["/proc/config.gz".to_owned(), format!("/boot/config-{release}")];
    let text = files.iter().find_map(|file| sh::capture(Command::new("gzip").args(["-dcf", file])).ok())?;
    Some(is_set(&text, name))
}

fn is_set(config: &str, name: &str) -> bool {
    config.lines().any(|line| line.strip_prefix(name) == Some("=y"))
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
            "| profiler | pairs | CPU per request, without → with | CPU ratio | throughput ratio | p99, without → with | recorded |\n\
             |---|---|---|---|---|---|---|\n",
        );
        for (label, outcome) in &page.rows {
            match outcome {
                Ok(outcome) => row(&mut text, label, outcome),
                Err(reason) => {
                    writeln!(text, "| {label} | 0 | not measured: {} | | | | |", one_line(reason))
                        .expect(INFALLIBLE);
                }
            }
        }
        if !page.steady.is_empty() {
            steady_table(&mut text, &page.steady);
        }
        for (label, steady) in &page.steady {
            if let Ok(Steady { sampling: Some(sampling), .. }) = steady {
                probes(&mut text, label, sampling);
            }
        }
    }
    text
}

const INFALLIBLE: &str = "writing to a string cannot fail";

fn row(text: &mut String, label: &str, outcome: &Outcome) {
    let Outcome { cpu_off_ms, cpu_ratio, throughput_ratio, p99_ms: (p99_off, p99_on), .. } = outcome;
    let Pairs { planned, measured } = outcome.pairs;
    let cut = if outcome.pairs.were_cut() { format!(" of {planned}, out of time") } else { String::new() };
    let cpu_on_ms = cpu_off_ms * cpu_ratio.median;
    let recorded =
        outcome.recorded.map_or("–".into(), |(recorded, answered)| format!("{recorded} of {answered}"));
    writeln!(
        text,
        "| {label} | {measured}{cut} | {cpu_off_ms:.2} → {cpu_on_ms:.2} ms | **{cpu_ratio}** | {throughput_ratio} | {p99_off:.1} → {p99_on:.1} ms | {recorded} |"
    )
    .expect(INFALLIBLE);
}

fn steady_table(text: &mut String, rows: &[(&str, Result<Steady, String>)]) {
    text.push_str(
        "\nIn a steady state:\n\n| profiler | its own CPU | for 1,000 samples/s | samples/s | requests/s | its memory | inside the BPF programs |\n\
         |---|---|---|---|---|---|---|\n",
    );
    let or_none = |text: Option<String>| text.unwrap_or_else(|| "–".into());
    for (label, steady) in rows {
        let steady = match steady {
            Ok(steady) => steady,
            Err(reason) => {
                writeln!(text, "| {label} | not measured: {} | | | | | |", one_line(reason))
                    .expect(INFALLIBLE);
                continue;
            }
        };
        let sampling = steady.sampling.as_ref();
        writeln!(
            text,
            "| {label} | {:.1} % | {} | {} | {:.1} | {} | {} |",
            steady.cpu_percent,
            or_none(steady.cpu_percent_per_thousand_samples().map(|percent| format!("{percent:.1} %"))),
            or_none(sampling.map(|sampling| format!("{:.0}", sampling.samples_per_second))),
            steady.requests_per_second,
            or_none(steady.resident_bytes.map(|bytes| format!("{:.0} MiB", bytes as f64 / 1048576.0))),
            or_none(sampling.map(|sampling| format!("{:.2} %", sampling.probes_percent_of_core))),
        )
        .expect(INFALLIBLE);
    }
}

fn probes(text: &mut String, label: &str, sampling: &Sampling) {
    let total: f64 = sampling.probes_us_per_request.iter().map(|(_, us)| us).sum();
    write!(
        text,
        "\nTime inside the BPF programs, {label}: {total:.1} µs per request.\n\n| program | µs per request |\n|---|---|\n"
    )
    .expect(INFALLIBLE);
    // Programs that did not run would only make the table long.
    for (labels, us) in sampling.probes_us_per_request.iter().filter(|(_, us)| *us >= 0.005) {
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
    fn rows_say_what_was_measured_and_why_something_was_not() {
        let outcome = |measured, recorded| Outcome {
            pairs: Pairs { planned: 40, measured },
            cpu_off_ms: 10.0,
            cpu_ratio: Estimate { median: 1.02, interval: Some((1.01, 1.03)), values: 40 },
            throughput_ratio: Estimate { median: 0.98, interval: None, values: 3 },
            p99_ms: (20.0, 21.0),
            recorded,
        };
        let steady = Steady {
            cpu_percent: 1.25,
            requests_per_second: 50.0,
            resident_bytes: Some(64 << 20),
            sampling: Some(Sampling {
                samples_per_second: 200.0,
                probes_us_per_request: vec![("probe=\"sample\"".into(), 3.0), ("probe=\"x\"".into(), 0.0)],
                probes_percent_of_core: 0.5,
            }),
        };
        let other =
            Steady { cpu_percent: 30.0, requests_per_second: 40.0, resident_bytes: None, sampling: None };
        let page = Page {
            title: "a page".into(),
            rows: vec![
                ("good", Ok(outcome(40, None))),
                ("cut", Ok(outcome(31, Some((5, 6))))),
                ("bad", Err("a | b\nmore".into())),
            ],
            steady: vec![("good", Ok(steady)), ("other", Ok(other)), ("bad", Err("no".into()))],
        };
        assert_eq!(page.failures(), 2);
        let text = render("How.", &[page]);
        let figures = "10.00 → 10.20 ms | **1.020 (1.010 to 1.030)** | 0.980 (n=3) | 20.0 → 21.0 ms";
        let expected = [
            format!("| good | 40 | {figures} | – |\n"),
            format!("| cut | 31 of 40, out of time | {figures} | 5 of 6 |\n"),
            "| bad | 0 | not measured: a / b | | | | |\n".into(),
            "| good | 1.2 % | 6.2 % | 200 | 50.0 | 64 MiB | 0.50 % |\n".into(),
            "| other | 30.0 % | – | – | 40.0 | – | – |\n| bad | not measured: no | | | | | |\n".into(),
            "good: 3.0 µs per request.\n\n| program | µs per request |\n|---|---|\n| `probe=\"sample\"` | 3.00 |\n".into(),
        ];
        for part in &expected {
            assert!(text.contains(part.as_str()), "no {part} in {text}");
        }
        // Every row has as many cells as its table's head.
        let cells = |line: &str| line.matches('|').count();
        for table in text.split("\n\n").filter(|block| block.starts_with('|')) {
            let head = cells(table.lines().next().unwrap());
            assert!(table.lines().all(|line| cells(line) == head), "{table}");
        }
    }

    #[test]
    fn an_option_of_the_kernel_is_set_or_not() {
        let config =
            "# CONFIG_IRQ_TIME_ACCOUNTING is not set\nCONFIG_IRQ_TIME_ACCOUNTING_X=y\nCONFIG_BPF=y\n";
        assert!(is_set(config, "CONFIG_BPF"));
        assert!(!is_set(config, "CONFIG_IRQ_TIME_ACCOUNTING"));
    }
}
