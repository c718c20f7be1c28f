//! `cargo xtask bench overhead`: what it costs to be profiled, by us and by others, on a page of a real site.
//!
//! Two databases behind the same page: SQLite, where a request makes few socket calls, and PostgreSQL, where its 51
//! queries make about a hundred. What can be attached and detached is measured on the same running server in
//! alternating slices; middlewares cannot, so they alternate between two servers. See [`slices`] for why.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;

use crate::demo::{build_reqprof, require_root};
use crate::sh;
use crate::site::service::Lifetime;
use crate::site::{Install, ServeOptions, Site};
use peer::{Peer, Tools};
use report::Page;
use slices::{Outcome, Shape};

mod boundaries;
mod peer;
mod postgres;
mod report;
mod slices;
mod stats;
mod steady;
mod unwind;
mod usage;

/// As many as the smallest machine has processors; one connection each, so that latency is work and not waiting.
const WORKERS: usize = 2;
/// 51 queries; see deploy/demo/README.md.
const PATH: &str = "/orders/1/";
/// How long the whole may take on a slow machine, if nothing else is asked for and the plan is not longer.
const LIMIT: Duration = Duration::from_secs(45 * 60);
/// Starting a page's servers and filling its database.
const PREPARATION: Duration = Duration::from_secs(20);
/// What is measured if nothing else is asked for.
const ALL_PEERS: [Peer; 7] = [
    Peer::Control,
    Peer::Clock999,
    Peer::Reqprof,
    Peer::Reqprof999,
    Peer::PySpy,
    Peer::Pyinstrument,
    Peer::Cprofile,
];
/// What a new document says above its first section.
const INTRODUCTION: &str = "# Overhead\n\nMeasured by `cargo xtask bench overhead`. Ratios are with the profiler over \
    without it: a CPU ratio of 1.02 means that\nthe site's workers need 2 % more CPU time for the same request.\n";

#[derive(clap::Subcommand)]
pub enum Command {
    /// CPU time, throughput and latency of a real site with and without each profiler
    Overhead(OverheadOptions),
    /// Time per sample for deep stacks; memory of unwind tables, and how long they take to make
    Unwind(unwind::Options),
    /// What it costs to see a request by each source, on a server that does nothing; whether all were seen
    Boundaries(boundaries::Options),
}

#[derive(clap::Args)]
pub struct OverheadOptions {
    /// Pairs of slices per profiler and page
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pairs: u32,
    /// Length of a slice, such as 3s or 500ms
    #[arg(long, default_value = "1500ms", value_parser = slice_length)]
    slice: Duration,
    /// Length of a slice of a middleware, which costs so much that less will do
    #[arg(long, default_value = "750ms", value_parser = slice_length)]
    middleware_slice: Duration,
    /// How long a profiler's own CPU time and memory are watched, once per profiler and page
    #[arg(long, default_value = "30s", value_parser = slice_length)]
    steady: Duration,
    /// Measure fewer pairs rather than longer than this, such as 30m, in all [default: 45m, or what the plan needs]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    within: Option<Duration>,
    /// Six pairs of one second: to see that it works, not what it costs
    #[arg(long, conflicts_with_all = ["pairs", "slice", "middleware_slice", "steady"])]
    quick: bool,
    /// Only these profilers (repeatable)
    #[arg(long, value_enum)]
    only: Vec<Peer>,
    /// Only this database (repeatable)
    #[arg(long, value_enum)]
    page: Vec<Database>,
    /// File the result in this Markdown document, under a heading with day, kernel and processor
    #[arg(long, value_name = "FILE")]
    write: Option<PathBuf>,
    /// Use this reqprof instead of building one
    #[arg(long, value_name = "FILE")]
    reqprof: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Database {
    Sqlite,
    Postgresql,
}

impl Database {
    fn title(self) -> &'static str {
        match self {
            Self::Sqlite => "SQLite",
            Self::Postgresql => "PostgreSQL",
        }
    }
}

pub fn run(command: &Command) -> Result<()> {
    match command {
        Command::Overhead(options) => overhead(options),
        Command::Unwind(options) => unwind::run(options),
        Command::Boundaries(options) => boundaries::run(options),
    }
}

fn overhead(options: &OverheadOptions) -> Result<()> {
    let plan = Plan::new(options);
    let peers = if options.only.is_empty() { ALL_PEERS.to_vec() } else { options.only.clone() };
    let databases = if options.page.is_empty() {
        vec![Database::Sqlite, Database::Postgresql]
    } else {
        options.page.clone()
    };
    require_root()?;
    if databases.contains(&Database::Postgresql) {
        postgres::install()?;
    }

    let install = Install::prepare()?;
    install.add_packages("requirements-bench.txt")?;
    let home = sh::root().join("target/bench");
    fs::create_dir_all(&home).with_context(|| format!("cannot create {}", home.display()))?;
    let reqprof = match &options.reqprof {
        Some(file) => Some(std::path::absolute(file)?),
        None if peers.iter().any(|peer| peer.is_reqprof()) => Some(build_reqprof()?),
        None => None,
    };
    let tools = Tools { reqprof, py_spy: install.program("py-spy"), home };

    let expected = plan.page(&peers) * databases.len() as u32;
    let limit = options.within.unwrap_or_else(|| LIMIT.max(expected.mul_f64(1.25)));
    eprintln!(
        "{} pairs of {:?} ({:?} for a middleware) for each of {} profilers on {} pages: about {}, at most {}.",
        plan.pairs,
        plan.slice,
        plan.middleware_slice,
        peers.len(),
        databases.len(),
        minutes(expected),
        minutes(limit)
    );
    let schedule = Schedule { begun: Instant::now(), stretch: limit.as_secs_f64() / expected.as_secs_f64() };
    let bench = Bench { install, tools, peers, plan, schedule };
    let mut pages: Vec<Page> = Vec::new();
    for (place, database) in (0..).zip(databases) {
        pages.push(bench.page(database, bench.plan.page(&bench.peers) * place));
    }

    let (title, body) = (report::title(), report::render(&bench.method(options), &pages));
    println!("## {title}\n\n{body}");
    if let Some(file) = &options.write {
        write_document(&sh::root().join(file), INTRODUCTION, &title, &body)?;
    }
    let failures: usize = pages.iter().map(Page::failures).sum();
    ensure!(failures == 0, "{failures} of the measurements failed; their rows say why");
    Ok(())
}

struct Bench {
    install: Install,
    tools: Tools,
    peers: Vec<Peer>,
    plan: Plan,
    schedule: Schedule,
}

/// How much is measured.
struct Plan {
    pairs: u32,
    slice: Duration,
    middleware_slice: Duration,
    steady: Duration,
}

/// By when each measurement has to be done: the limit of the whole, divided as the expected times are. So a slow
/// machine takes pairs from all of them instead of whole rows from the end.
struct Schedule {
    begun: Instant,
    /// The limit over the expected time.
    stretch: f64,
}

impl Plan {
    fn new(options: &OverheadOptions) -> Self {
        if options.quick {
            let second = Duration::from_secs(1);
            return Self { pairs: 6, slice: second, middleware_slice: second, steady: second * 5 };
        }
        let OverheadOptions { pairs, slice, middleware_slice, steady, .. } = *options;
        Self { pairs, slice, middleware_slice, steady }
    }

    fn slice(&self, peer: Peer) -> Duration {
        if peer.middleware().is_some() { self.middleware_slice } else { self.slice }
    }

    /// Two slices, each with its warm-up. In two pairs of what attaches, one attaching and one detaching.
    fn pairs(&self, peer: Peer) -> Duration {
        (self.slice(peer) * 2 + slices::WARM_UP + slices::settle(peer) + peer.transition() / 2) * self.pairs
    }

    fn steady(&self, peer: Peer) -> Duration {
        if peer.has_process() { peer.transition() + steady::SETTLE + self.steady } else { Duration::ZERO }
    }

    fn page(&self, peers: &[Peer]) -> Duration {
        PREPARATION + peers.iter().map(|peer| self.pairs(*peer) + self.steady(*peer)).sum::<Duration>()
    }
}

impl Schedule {
    fn deadline(&self, expected: Duration) -> Instant {
        self.begun + expected.mul_f64(self.stretch)
    }
}

impl Bench {
    /// A database that does not start must not cost the other page's figures.
    ///
    /// `expected`: what all pages before this one should have taken.
    fn page(&self, database: Database, expected: Duration) -> Page {
        eprintln!("Page backed by {}:", database.title());
        let mut page = Page { title: database.title().into(), rows: Vec::new(), steady: Vec::new() };
        if let Err(reason) = explained(self.measure(database, expected, &mut page)) {
            page.rows.push(("the page itself", Err(reason)));
        }
        page
    }

    fn measure(&self, database: Database, mut expected: Duration, page: &mut Page) -> Result<()> {
        // The cluster outlives the servers that are connected to it: locals are dropped last to first.
        let (_cluster, url) = match database {
            Database::Sqlite => (None, self.install.sqlite()?),
            Database::Postgresql => {
                let cluster = postgres::Cluster::start(&self.tools.home)?;
                self.install.fill(&cluster.url)?;
                let url = cluster.url.clone();
                (Some(cluster), url)
            }
        };
        let site = self.serve(&url, None)?;
        expected += PREPARATION;
        for (place, peer) in self.peers.iter().enumerate() {
            expected += self.plan.pairs(*peer);
            let slice = self.plan.slice(*peer);
            let shape = Shape {
                pairs: self.plan.pairs,
                slice,
                connections: WORKERS,
                path: PATH.into(),
                deadline: self.schedule.deadline(expected),
            };
            if place == 0 {
                // The first requests import what the page needs.
                slices::drive(&site, &shape, slice)?;
            }
            eprintln!("  {} …", peer.label());
            let outcome = match peer.middleware() {
                Some(name) => self.middleware(*peer, name, &site, &url, &shape),
                None => slices::attachable(*peer, &self.tools, &site, &shape),
            };
            page.rows.push((peer.label(), explained(outcome)));
            expected += self.plan.steady(*peer);
            if peer.has_process() {
                let steady = steady::measure(*peer, &self.tools, &site, &shape, self.plan.steady);
                page.steady.push((peer.label(), explained(steady)));
            }
        }
        Ok(())
    }

    /// What the figures are of: the text above the tables.
    fn method(&self, options: &OverheadOptions) -> String {
        let Plan { pairs, slice, middleware_slice, steady } = self.plan;
        let peers = options.only.iter().map(|peer| ("--only", peer.to_possible_value()));
        let pages = options.page.iter().map(|page| ("--page", page.to_possible_value()));
        let choice: String = peers
            .chain(pages)
            .filter_map(|(flag, value)| Some(format!(" {flag} {}", value?.get_name())))
            .collect();
        format!(
            "`cargo xtask bench overhead --pairs {pairs} --slice {}ms --middleware-slice {}ms --steady {}ms{choice}`\n\n\
             `{PATH}` of the demo shop, {WORKERS} gunicorn sync workers, {WORKERS} connections. {}",
            slice.as_millis(),
            middleware_slice.as_millis(),
            steady.as_millis(),
            report::METHOD
        )
    }

    fn middleware(&self, peer: Peer, name: &str, plain: &Site, url: &str, shape: &Shape) -> Result<Outcome> {
        let folder = self.tools.home.join(format!("profiles-{name}"));
        let profiled = self.serve(url, Some((name.to_owned(), folder.clone())))?;
        slices::drive(&profiled, shape, shape.slice)?;
        let outcome = slices::middleware(peer, plain, &profiled, &folder, shape);
        drop(profiled);
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
        outcome
    }

    fn serve(&self, url: &str, middleware: Option<(String, PathBuf)>) -> Result<Site> {
        let name = middleware.as_ref().map_or("plain", |(name, _)| name);
        self.install.serve(&ServeOptions {
            name: format!("bench-{name}"),
            workers: WORKERS,
            database_url: url.into(),
            middleware,
            lifetime: Lifetime::Bound,
        })
    }
}

/// One profiler that does not work here must not cost the others' figures: its row says why.
fn explained<T>(outcome: Result<T>) -> Result<T, String> {
    outcome.map_err(|error| {
        eprintln!("  failed: {error:#}");
        format!("{error:#}")
    })
}

/// `introduction`: what a new document says above its first section.
fn write_document(file: &Path, introduction: &str, title: &str, body: &str) -> Result<()> {
    let before = match fs::read_to_string(file) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => introduction.into(),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", file.display())),
    };
    if let Some(folder) = file.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    }
    fs::write(file, report::merge(&before, title, body))
        .with_context(|| format!("cannot write {}", file.display()))?;
    eprintln!("Written to {}.", file.display());
    Ok(())
}

fn minutes(duration: Duration) -> String {
    format!("{:.0} minutes", (duration.as_secs_f64() / 60.0).ceil())
}

/// `500ms`, `30s`, `5m`, as everywhere in reqprof.
fn duration(text: &str) -> Result<Duration> {
    let split = text.find(|letter: char| letter.is_ascii_alphabetic()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(split);
    let number: u64 =
        digits.parse().with_context(|| format!("`{text}` is no duration such as 500ms or 3s"))?;
    let milliseconds = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        _ => anyhow::bail!("`{text}` needs a unit: ms, s or m"),
    };
    Ok(Duration::from_millis(number.saturating_mul(milliseconds)))
}

fn slice_length(text: &str) -> Result<Duration> {
    let slice = duration(text)?;
    ensure!((100..=600_000).contains(&slice.as_millis()), "a slice is between 100ms and 10m long");
    Ok(slice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units_and_bounds() {
        assert_eq!(slice_length("500ms").unwrap(), Duration::from_millis(500));
        assert_eq!(slice_length("3s").unwrap(), Duration::from_secs(3));
        assert_eq!(slice_length("1m").unwrap(), Duration::from_secs(60));
        assert_eq!(duration("99m").unwrap(), Duration::from_secs(5940));
        for bad in ["3", "s", "1ms", "99m", "3 s", "3h", ""] {
            assert!(slice_length(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_expected_time_covers_every_slice() {
        let seconds = Duration::from_secs;
        let plan = Plan { pairs: 10, slice: seconds(3), middleware_slice: seconds(1), steady: seconds(30) };
        // Two slices and two warm-ups of 0.3 s.
        assert_eq!(plan.page(&[Peer::Cprofile]), PREPARATION + seconds(26));
        // A warm-up of 0.3 s and one of 1 s; attaching in every second pair and once more for the steady state, which is
        // waited for 5 s.
        let attaching = Peer::Reqprof.transition();
        assert_eq!(plan.page(&[Peer::Reqprof]), PREPARATION + seconds(73 + 35) + attaching * 6);
    }

    /// Two pages, seven rows, forty pairs: what CI and docs/overhead.md take.
    #[test]
    fn the_default_plan_fits_its_limit() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            options: OverheadOptions,
        }
        let Line { options } = clap::Parser::parse_from(["bench"]);
        let expected = Plan::new(&options).page(&ALL_PEERS) * 2;
        assert!(expected < LIMIT, "{expected:?}");
    }

    #[test]
    fn a_limit_is_divided_as_the_expected_times_are() {
        let begun = Instant::now();
        let schedule = Schedule { begun, stretch: 0.5 };
        assert_eq!(schedule.deadline(Duration::from_secs(60)), begun + Duration::from_secs(30));
    }
}
