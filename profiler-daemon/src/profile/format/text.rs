//! The call tree for a person at a terminal.
//!
//! In: a profile. Out: a few lines on the request, then the tree, hottest first, with time and percentage per frame.
//! Application code stands out. Library, native and kernel frames on the way are folded into groups: where the
//! application calls into a library, the library's outermost frame is shown and what is below it becomes
//! `[N frames hidden: django, sqlite3]`, under which the application's next frames go on. Percentages are coloured as
//! people know it from pyinstrument: red above 60 % of the total, yellow above 20 %, green above 5 %.

use std::fmt::Write;

use anstyle::{AnsiColor, Style};

use super::super::{Function, NodeRef, Profile, UNSAMPLED};
use super::origin::{self, Origin};
use super::{Subject, View, duration, percent, printable};

/// How the tree is shown.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// ANSI colours.
    pub color: bool,
    /// Fold library, native and kernel frames.
    pub fold: bool,
    /// Frames below this part of the total are left out, percent.
    pub min_percent: f64,
}

impl Default for Options {
    fn default() -> Self {
        Self { color: false, fold: true, min_percent: 0.5 }
    }
}

/// Most packages that a group of hidden frames names.
const MAX_PACKAGES: usize = 4;
/// Most lines that a frame names.
const MAX_LINES: usize = 3;

pub fn render(profile: &Profile, subject: &Subject, view: View, options: &Options) -> String {
    let profile = profile.in_view(view);
    let mut page = Page { out: String::new(), options: *options, total: profile.root().total().ns };
    page.header(&profile, subject, view);
    page.tree(&profile, subject);
    page.out
}

/// What a line of the tree stands for.
enum Row<'a> {
    Frame(NodeRef<'a>),
    Hidden(Region<'a>),
}

/// Frames that belong to nobody's application and are connected.
struct Region<'a> {
    frames: usize,
    ns: u64,
    /// Packages, the one that took the most time itself first.
    packages: Vec<&'a str>,
    /// The frames below that are shown again.
    exits: Vec<NodeRef<'a>>,
}

impl<'a> Region<'a> {
    fn below(tops: &[NodeRef<'a>]) -> Self {
        let mut region = Self {
            frames: 0,
            ns: tops.iter().fold(0, |sum, node| sum.saturating_add(node.total().ns)),
            packages: Vec::new(),
            exits: Vec::new(),
        };
        let mut packages: Vec<(u64, &str)> = Vec::new();
        let mut todo: Vec<NodeRef<'a>> = tops.iter().rev().copied().collect();
        while let Some(node) = todo.pop() {
            if !folds(node) {
                region.exits.push(node);
                continue;
            }
            region.frames += 1;
            let name = origin::package(node.function());
            match packages.iter_mut().find(|(_, known)| *known == name) {
                Some((ns, _)) => *ns = ns.saturating_add(node.own().ns),
                None if name.is_empty() => {}
                None => packages.push((node.own().ns, name)),
            }
            todo.extend(node.children().into_iter().rev());
        }
        packages.sort_by_key(|(ns, _)| std::cmp::Reverse(*ns));
        region.packages = packages.into_iter().map(|(_, name)| name).collect();
        region.exits.sort_by_key(|node| std::cmp::Reverse(node.total().ns));
        region
    }
}

fn folds(node: NodeRef<'_>) -> bool {
    Origin::of(node.function()).folds()
}

impl<'a> Row<'a> {
    fn ns(&self) -> u64 {
        match self {
            Self::Frame(node) => node.total().ns,
            Self::Hidden(region) => region.ns,
        }
    }

    /// What is shown below, hottest first.
    fn below(&self, fold: bool) -> Vec<Row<'a>> {
        let mut rows = match self {
            Self::Hidden(region) => region.exits.iter().copied().map(Row::Frame).collect(),
            Self::Frame(node) if !fold => node.children().into_iter().map(Row::Frame).collect(),
            Self::Frame(node) if node.is_root() || !folds(*node) => {
                node.children().into_iter().map(Self::entry).collect()
            }
            Self::Frame(node) => {
                let (inside, exits): (Vec<_>, Vec<_>) = node.children().into_iter().partition(|n| folds(*n));
                let mut rows: Vec<Row<'a>> = exits.into_iter().map(Row::Frame).collect();
                let region = Region::below(&inside);
                match (region.frames, inside.first()) {
                    (0, _) | (_, None) => {}
                    (1, Some(only)) => rows.push(Row::Frame(*only)),
                    _ => rows.push(Row::Hidden(region)),
                }
                rows
            }
        };
        rows.sort_by_key(|row| std::cmp::Reverse(row.ns()));
        rows
    }

    /// How a call from the application or the root is shown. The frames of the interpreter between two Python
    /// functions say nothing, so native code that only leads back to the application is hidden from its first frame.
    fn entry(node: NodeRef<'a>) -> Row<'a> {
        if Origin::of(node.function()) == Origin::Native {
            let region = Region::below(&[node]);
            if region.frames > 1 && !region.exits.is_empty() {
                return Row::Hidden(region);
            }
        }
        Row::Frame(node)
    }
}

/// A row and what stands before it.
struct Placed<'a> {
    row: Row<'a>,
    indent: String,
    /// Whether it is the last of its siblings.
    last: bool,
}

struct Page {
    out: String,
    options: Options,
    total: u64,
}

const BOLD: Style = Style::new().bold();
const DIM: Style = Style::new().dimmed();

impl Page {
    fn styled(&mut self, style: Style, text: &str) {
        if self.options.color && style != Style::new() && !text.is_empty() {
            let _ = write!(self.out, "{style}{text}{style:#}");
        } else {
            self.out.push_str(text);
        }
    }

    fn header(&mut self, profile: &Profile, subject: &Subject, view: View) {
        self.styled(BOLD, &printable(&subject.title));
        self.out.push_str("\n\n");
        let status = subject.status.map(|status| format!(" -> {status}")).unwrap_or_default();
        let known = |word: &str| if word.is_empty() { "-".to_owned() } else { word.to_owned() };
        let (method, route) = (known(&subject.method), known(&subject.route));
        self.field("request", &format!("{method} {route}{status}"));
        self.field("service", &subject.service);
        self.field("id", subject.request_id.as_deref().unwrap_or_default());
        self.field("trace", subject.trace_id.as_deref().unwrap_or_default());
        let whole = profile.duration_ns();
        let mut text = duration(whole);
        if profile.requests() > 1 {
            let _ = write!(
                text,
                " in {} requests, {} each on average",
                profile.requests(),
                duration(whole / profile.requests())
            );
            if let Some(hit) = subject.with_samples {
                let _ = write!(text, "; {hit} of them with samples");
            }
        }
        self.field("duration", &text);
        let unsampled = profile.root().children().into_iter().find(|node| node.name() == UNSAMPLED);
        let sampled = self.total - unsampled.map_or(0, |node| node.own().ns);
        let mut text = format!("{} on the CPU in {} samples", duration(sampled), profile.samples());
        if profile.samples() == 0 {
            text = "no samples: shorter than the sampling interval, or it only waited".into();
        } else if whole > 0 {
            let _ = write!(text, " ({:.0} % of the duration)", percent(sampled, whole));
        }
        self.field("sampled", &text);
        if profile.truncated_samples() > 0 {
            let text = format!("{} samples not shown to their end: tree full", profile.truncated_samples());
            self.field("truncated", &text);
        }
        if view != View::Wall {
            self.field("view", view.name());
        }
        self.out.push('\n');
    }

    fn field(&mut self, name: &str, value: &str) {
        let value = printable(value.trim());
        if !value.is_empty() {
            self.styled(DIM, &format!("  {name:<10}"));
            let _ = writeln!(self.out, "{value}");
        }
    }

    fn tree(&mut self, profile: &Profile, subject: &Subject) {
        self.cost(self.total);
        self.styled(BOLD, &printable(&subject.title));
        self.out.push('\n');
        let mut omitted = 0;
        // The rows still to be written, the next one last, each with what stands before it.
        let mut todo = self.below(&Row::Frame(profile.root()), "", &mut omitted);
        while let Some(Placed { row, indent, last }) = todo.pop() {
            self.styled(DIM, &format!("{indent}{}", if last { "└─ " } else { "├─ " }));
            self.row(&row);
            let indent = format!("{indent}{}", if last { "   " } else { "│  " });
            todo.extend(self.below(&row, &indent, &mut omitted));
        }
        if omitted > 0 {
            let text =
                format!("\n{omitted} branches below {} % of the total not shown\n", self.options.min_percent);
            self.styled(DIM, &text);
        }
    }

    /// The rows below a row that are worth showing, the first one last.
    fn below<'a>(&self, row: &Row<'a>, indent: &str, omitted: &mut usize) -> Vec<Placed<'a>> {
        let mut rows = row.below(self.options.fold);
        let all = rows.len();
        rows.retain(|row| percent(row.ns(), self.total) >= self.options.min_percent);
        *omitted += all - rows.len();
        rows.reverse();
        let placed = |(place, row)| Placed { row, indent: indent.to_string(), last: place == 0 };
        rows.into_iter().enumerate().map(placed).collect()
    }

    fn row(&mut self, row: &Row<'_>) {
        self.cost(row.ns());
        match row {
            Row::Hidden(region) => {
                let named = &region.packages[..region.packages.len().min(MAX_PACKAGES)];
                let mut names = named.iter().map(|name| printable(name)).collect::<Vec<_>>().join(", ");
                if region.packages.len() > MAX_PACKAGES {
                    names.push_str(", …");
                }
                self.styled(DIM, &format!("[{} frames hidden: {names}]", region.frames));
            }
            Row::Frame(node) => {
                let origin = Origin::of(node.function());
                let style = match origin {
                    Origin::App => BOLD,
                    Origin::Wait => Style::new().fg_color(Some(AnsiColor::Cyan.into())),
                    _ => Style::new(),
                };
                self.styled(style, &printable(node.name()));
                let place = place(node.function(), node.hottest_line());
                if !place.is_empty() {
                    self.styled(DIM, &format!("  {place}"));
                }
                if origin == Origin::App {
                    self.styled(DIM, &self.lines(*node));
                }
            }
        }
        self.out.push('\n');
    }

    /// The hot lines of a function, where there is more than one worth naming.
    fn lines(&self, node: NodeRef<'_>) -> String {
        let mut lines: Vec<_> = node
            .lines()
            .into_iter()
            .filter(|(_, t)| percent(t.total_ns, self.total) >= self.options.min_percent.max(1.0))
            .collect();
        if lines.len() < 2 {
            return String::new();
        }
        lines.sort_by_key(|(line, totals)| (std::cmp::Reverse(totals.total_ns), *line));
        lines.truncate(MAX_LINES);
        let texts: Vec<String> =
            lines.iter().map(|(line, totals)| format!("{line}: {}", duration(totals.total_ns))).collect();
        format!("  (lines {})", texts.join(", "))
    }

    fn cost(&mut self, ns: u64) {
        let percent = percent(ns, self.total);
        let color = match percent {
            p if p > 60.0 => Some(AnsiColor::Red),
            p if p > 20.0 => Some(AnsiColor::Yellow),
            p if p > 5.0 => Some(AnsiColor::Green),
            _ => None,
        };
        let style = match color {
            Some(color) => Style::new().fg_color(Some(color.into())),
            None => Style::new(),
        };
        self.styled(style, &format!("{} {percent:.1} %", duration(ns)));
        self.out.push_str("  ");
    }
}

/// `file:line`, as far as known.
fn place(function: &Function, line: u32) -> String {
    let file = printable(origin::short_file(function));
    match (file.is_empty(), line) {
        (true, _) => String::new(),
        (false, 0) => file.into_owned(),
        (false, line) => format!("{file}:{line}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::testing::{frame, py, stack};
    use super::super::super::{Builder, FrameKind};
    use super::*;

    fn django(name: &str, line: u32) -> super::super::super::Frame {
        frame(FrameKind::Python, name, "/v/lib/python3.11/site-packages/django/core.py", line, 1)
    }

    fn native(name: &str) -> super::super::super::Frame {
        frame(FrameKind::Native, name, "/usr/lib/libsqlite3.so.0", 0, 0)
    }

    fn sample() -> Profile {
        let mut b = Builder::default();
        let outer = [django("get_response", 5), django("inner", 6), django("handle", 7)];
        let mut s = outer.to_vec();
        s.push(py("view", 42));
        let view = s.clone();
        s.extend([django("query", 8), django("fetch", 9), native("sqlite3_step")]);
        b.add(&stack(&s), 70_000_000);
        let mut s = view;
        s[3].line = 45;
        s.push(py("total", 50));
        b.add(&stack(&s), 20_000_000);
        b.add(&stack(&outer), 100_000);
        b.finish(100_000_000)
    }

    fn subject() -> Subject {
        Subject {
            title: "GET /orders 200 - 100.0 ms".into(),
            route: "/orders".into(),
            method: "GET".into(),
            status: Some(200),
            ..Subject::default()
        }
    }

    #[test]
    fn library_frames_fold_into_groups() {
        let text = render(&sample(), &subject(), View::Wall, &Options::default());
        let expected = "\
GET /orders 200 - 100.0 ms

  request   GET /orders -> 200
  duration  100.0 ms
  sampled   90.1 ms on the CPU in 3 samples (90 % of the duration)

100.0 ms 100.0 %  GET /orders 200 - 100.0 ms
├─ 90.1 ms 90.1 %  get_response  django/core.py:5
│  └─ 90.1 ms 90.1 %  [2 frames hidden: django]
│     └─ 90.0 ms 90.0 %  view  /srv/shop/views.py:42  (lines 42: 70.0 ms, 45: 20.0 ms)
│        ├─ 70.0 ms 70.0 %  query  django/core.py:8
│        │  └─ 70.0 ms 70.0 %  [2 frames hidden: libsqlite3.so.0, django]
│        └─ 20.0 ms 20.0 %  total  /srv/shop/views.py:50
└─ 9.90 ms 9.9 %  [unsampled]
";
        assert_eq!(text, expected);
    }

    #[test]
    fn without_folding_every_frame_is_shown() {
        let text = render(&sample(), &subject(), View::Cpu, &Options { fold: false, ..Options::default() });
        for name in ["inner", "handle", "fetch", "sqlite3_step  libsqlite3.so.0"] {
            assert!(text.contains(name), "{text}");
        }
        assert!(!text.contains("hidden") && !text.contains("unsampled"));
    }

    #[test]
    fn colours_follow_the_share_of_the_total() {
        let text = render(&sample(), &subject(), View::Wall, &Options { color: true, ..Options::default() });
        assert!(text.contains("\x1b[31m90.0 ms 90.0 %\x1b[0m"), "red above 60 %: {text}");
        assert!(text.contains("\x1b[32m20.0 ms 20.0 %\x1b[0m"), "20 % exactly is green: {text}");
        assert!(text.contains("\x1b[1mview\x1b[0m"));
    }

    #[test]
    fn the_interpreter_between_python_functions_is_hidden_whole() {
        let mut b = Builder::default();
        let eval = |name| frame(FrameKind::Native, name, "/usr/bin/python3.11", 0, 0);
        b.add(&stack(&[py("outer", 1), eval("vectorcall"), eval("eval"), py("inner", 2)]), 1_000_000);
        let text = render(&b.finish(0), &subject(), View::Cpu, &Options::default());
        assert!(text.contains("[2 frames hidden: python3.11]") && !text.contains("vectorcall"), "{text}");
    }

    #[test]
    fn small_branches_are_left_out_and_counted() {
        let mut b = Builder::default();
        b.add(&stack(&[py("big", 1)]), 1_000_000);
        b.add(&stack(&[py("small", 1)]), 4_000);
        let text = render(&b.finish(0), &subject(), View::Cpu, &Options::default());
        assert!(!text.contains("small") && text.contains("1 branches below 0.5 %"), "{text}");
    }

    #[test]
    fn merged_profiles_tell_the_average() {
        let mut sum = sample();
        sum.merge(&sample());
        let text = render(&sum, &subject(), View::Wall, &Options::default());
        assert!(text.contains("200.0 ms in 2 requests, 100.0 ms each on average"), "{text}");
    }
}
