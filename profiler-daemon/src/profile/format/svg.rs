//! An interactive flame graph as one SVG file.
//!
//! In: a profile. Out: a drawing that any viewer shows, and that in a browser can be hovered, searched and zoomed by
//! mouse and keyboard. It needs nothing else: no server, no other file, no network. Positions are percentages of the
//! width, so it fits its window without the script. The script is embedded; a server that sends the file under a
//! Content-Security-Policy has to allow `script-src 'unsafe-inline'; style-src 'unsafe-inline'`, and can sandbox it
//! with `sandbox allow-scripts`. Every text is escaped, so nothing but our script can run.
//!
//! Callees stand below their callers, hottest first. Frames narrower than 0.05 % of the total are left out, which
//! bounds a row to 2,000 frames; the title says how many are missing.

use std::fmt::Write;

use super::super::{FrameKind, NodeRef, Profile};
use super::origin::{self, Origin};
use super::{Subject, View, duration, percent, printable};

const STYLE: &str = include_str!("svg.css");
const SCRIPT: &str = include_str!("svg.js");

/// Frames narrower than this part of the total are not drawn, percent.
const MIN_PERCENT: f64 = 0.05;
/// Margin left and right, percent of the width.
const PAD: f64 = 1.0;
/// Height of a row, px.
const ROW: usize = 20;
/// Where the graph begins, px.
const TOP: usize = 158;
/// Width that texts are cut for where no script adapts them, px.
const STATIC_WIDTH: f64 = 1200.0;
/// Width of a letter at 12 px, px.
const LETTER: f64 = 7.3;
/// Most lines of a function that its description names.
const MAX_LINES: usize = 5;

pub fn render(profile: &Profile, subject: &Subject, view: View) -> String {
    let profile = profile.in_view(view);
    let root = profile.root();
    let mut drawing = Drawing {
        graph: String::new(),
        total: root.total().ns,
        requests: profile.requests(),
        deepest: 0,
        omitted: 0,
    };
    drawing.frame(0, 0, root, &subject.title, "");
    // Where the next frame of each depth begins, ns.
    let mut next = vec![0u64, 0];
    // Nodes below this depth belong to a frame that is not drawn.
    let mut skip = usize::MAX;
    for (depth, node) in profile.walk() {
        if depth > skip {
            drawing.omitted += 1;
            continue;
        }
        skip = usize::MAX;
        let start = next[depth];
        next.truncate(depth);
        next.push(start.saturating_add(node.total().ns));
        next.push(start);
        if percent(node.total().ns, drawing.total) < MIN_PERCENT {
            drawing.omitted += 1;
            skip = depth;
            continue;
        }
        drawing.frame(depth, start, node, node.name(), origin::short_file(node.function()));
    }
    drawing.page(&profile, subject, view)
}

struct Drawing {
    graph: String,
    total: u64,
    requests: u64,
    deepest: usize,
    omitted: usize,
}

impl Drawing {
    fn frame(&mut self, depth: usize, start: u64, node: NodeRef<'_>, name: &str, file: &str) {
        self.deepest = self.deepest.max(depth);
        // A profile without time still shows its root.
        let share = |ns: u64| if self.total == 0 { 0.0 } else { ns as f64 / self.total as f64 };
        let (x, width) = if node.is_root() { (0.0, 1.0) } else { (share(start), share(node.total().ns)) };
        let inner = 100.0 - 2.0 * PAD;
        let y = TOP + ROW * depth;
        let room = ((width * STATIC_WIDTH * inner / 100.0 - 10.0) / LETTER).max(0.0) as usize;
        let class = if node.is_root() { "r0".to_string() } else { class(node) };
        let _ = writeln!(
            self.graph,
            "<g class=\"f\" data-d=\"{depth}\" data-x=\"{x:.7}\" data-w=\"{width:.7}\">\
             <rect class=\"{class}\" x=\"{:.4}%\" y=\"{y}\" width=\"{:.4}%\" height=\"{}\" rx=\"2\"/>\
             <text x=\"{:.4}%\" dx=\"5\" y=\"{}\">{}</text><title>{}</title></g>",
            PAD + inner * x,
            inner * width,
            ROW - 1,
            PAD + inner * x,
            y + ROW - 7,
            escape(&cut(name, room)),
            escape_lines(&self.about(node, name, file)),
        );
    }

    /// What hovering tells: name, place, total, own time, lines.
    fn about(&self, node: NodeRef<'_>, name: &str, file: &str) -> [String; 6] {
        let line = node.hottest_line();
        let place = match (file.is_empty(), line) {
            (true, _) => String::new(),
            (false, 0) => file.to_string(),
            (false, line) => format!("{file}:{line}"),
        };
        let cost = |ns: u64| format!("{} · {:.1} %", duration(ns), percent(ns, self.total));
        let samples = match node.total().samples {
            0 => String::new(),
            1 => " · 1 sample".into(),
            samples => format!(" · {samples} samples"),
        };
        let own = if node.own().ns == 0 { "none".into() } else { cost(node.own().ns) };
        let mut lines: Vec<_> = node.lines().into_iter().collect();
        lines.sort_by_key(|(line, totals)| (std::cmp::Reverse(totals.total_ns), *line));
        lines.truncate(MAX_LINES);
        let lines: Vec<String> =
            lines.iter().map(|(line, totals)| format!("{line}: {}", duration(totals.total_ns))).collect();
        [
            name.to_string(),
            place,
            format!("total  {}{samples}", cost(node.total().ns)),
            format!("self  {own}"),
            if lines.len() > 1 { format!("lines  {}", lines.join(",  ")) } else { String::new() },
            if self.requests > 1 {
                format!("per request  {}", duration(node.total().ns / self.requests))
            } else {
                String::new()
            },
        ]
    }

    fn page(self, profile: &Profile, subject: &Subject, view: View) -> String {
        let height = TOP + ROW * (self.deepest + 1) + 40;
        let omitted = match self.omitted {
            0 => String::new(),
            n => format!("{n} frames narrower than {MIN_PERCENT} % not drawn"),
        };
        let mut facts = Vec::new();
        if !subject.service.is_empty() {
            facts.push(subject.service.clone());
        }
        match profile.requests() {
            0 | 1 => facts.push(duration(profile.duration_ns())),
            n => facts.push(format!("{n} requests, {} each on average", duration(profile.duration_ns() / n))),
        }
        facts.push(format!("{} CPU samples", profile.samples()));
        facts.push(match view {
            View::Wall => "wall clock".into(),
            View::Cpu => "CPU time".into(),
            View::OffCpu => "off-CPU time".into(),
        });
        if let Some(ns) = inside_application(profile) {
            let share = percent(ns, self.total);
            facts.push(format!("{share:.1} % in application code and what it calls"));
        }
        if profile.truncated_samples() > 0 {
            facts.push(format!("{} samples cut", profile.truncated_samples()));
        }
        if let Some(id) = &subject.request_id {
            facts.push(format!("id {id}"));
        }
        let title = match omitted.as_str() {
            "" => subject.title.clone(),
            omitted => format!("{} ({omitted})", subject.title),
        };
        let mut out = String::with_capacity(self.graph.len() + STYLE.len() + SCRIPT.len() + 4_096);
        let _ = write!(
            out,
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
             <svg xmlns=\"http://www.w3.org/2000/svg\" width=\"100%\" height=\"{height}\" \
             data-pad=\"{PAD}\" data-row=\"{ROW}\" data-top=\"{TOP}\" data-total=\"{}\">\n\
             <title>{}</title>\n<style><![CDATA[\n{STYLE}]]></style>\n\
             <defs><pattern id=\"wait\" width=\"8\" height=\"8\" patternUnits=\"userSpaceOnUse\" \
             patternTransform=\"rotate(45)\"><rect width=\"8\" height=\"8\" fill=\"#dfe4ea\"/>\
             <rect width=\"3\" height=\"8\" fill=\"#d1d8e0\"/></pattern></defs>\n\
             <rect id=\"bg\" width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
             <g class=\"head\"><text class=\"title\" x=\"{PAD}%\" y=\"32\">{}</text>\
             <text class=\"dim\" x=\"{PAD}%\" y=\"53\">{}</text>\n",
            self.total,
            escape(&title),
            escape(&subject.title),
            escape(&facts.join("  ·  ")),
        );
        summary(&mut out, profile, self.total);
        let _ = write!(
            out,
            "</g>\n<foreignObject x=\"{PAD}%\" y=\"114\" width=\"{}%\" height=\"36\">\
             <div xmlns=\"http://www.w3.org/1999/xhtml\" class=\"bar\">\
             <input id=\"q\" type=\"search\" placeholder=\"Search functions and files\" \
             aria-label=\"Search functions and files\" spellcheck=\"false\"/>\
             <button id=\"reset\" type=\"button\">Reset zoom</button>\
             <button id=\"flip\" type=\"button\">Root at bottom</button>\
             <button id=\"outer\" type=\"button\">Hide outer rows</button>\
             <span class=\"found\" id=\"found\" role=\"status\"></span>\
             <span class=\"keys\">click to zoom · <kbd>/</kbd> search · <kbd>←↑↓→</kbd> <kbd>Enter</kbd> move, zoom · \
             <kbd>f</kbd> flip · <kbd>Esc</kbd> reset</span></div></foreignObject>\n\
             <g id=\"graph\">\n{}</g>\n<text class=\"foot\" x=\"{PAD}%\" y=\"{}\">{}</text>\n\
             <g id=\"tip\"><rect rx=\"6\"/><text/></g>\n<script><![CDATA[\n{SCRIPT}]]></script>\n</svg>\n",
            100.0 - 2.0 * PAD,
            self.graph,
            height - 14,
            escape(&omitted),
        );
        out
    }
}

/// Time in application code with everything that it calls; `None` where there is no such code. Its own time alone is
/// mostly next to nothing: it is called functions that take the time.
fn inside_application(profile: &Profile) -> Option<u64> {
    let is_app = |node: NodeRef<'_>| !node.is_root() && Origin::of(node.function()) == Origin::App;
    // By node: parents come first.
    let mut inside = vec![false; profile.nodes().len()];
    let mut sum = None;
    for node in profile.nodes() {
        let below = node.parent().is_some_and(|parent| inside[parent.index()]);
        inside[node.index()] = below || is_app(node);
        if is_app(node) && !below {
            sum = Some(sum.unwrap_or(0_u64).saturating_add(node.total().ns));
        }
    }
    sum
}

/// The bar that says whose code the time itself was spent in, callees apart, and its legend.
fn summary(out: &mut String, profile: &Profile, total: u64) {
    let kinds = [
        (Origin::App, "a0", "application"),
        (Origin::Library, "l0", "libraries"),
        (Origin::Native, "n0", "native"),
        (Origin::Kernel, "k0", "kernel"),
        (Origin::Wait, "w0", "not on CPU or unsampled"),
    ];
    let mut x = 0.0;
    let heading = "self time:";
    let _ = writeln!(out, "<text x=\"{PAD}%\" y=\"97\">{heading}</text>");
    // Pixels from the left margin.
    let mut legend = heading.len() * 7 + 8;
    for (kind, class, name) in kinds {
        let own: Vec<u64> = profile
            .nodes()
            .filter(|node| !node.is_root() && Origin::of(node.function()) == kind)
            .map(|node| node.own().ns)
            .collect();
        if own.is_empty() {
            continue;
        }
        let share = percent(own.into_iter().fold(0, u64::saturating_add), total);
        let scale = (100.0 - 2.0 * PAD) / 100.0;
        let label = format!("{name} {share:.1} %");
        let _ = writeln!(
            out,
            "<rect class=\"{class}\" x=\"{:.4}%\" y=\"68\" width=\"{:.4}%\" height=\"8\"/>\
             <rect class=\"{class}\" x=\"{PAD}%\" y=\"87\" width=\"11\" height=\"11\" rx=\"3\" \
             transform=\"translate({legend} 0)\"/>\
             <text x=\"{PAD}%\" dx=\"{}\" y=\"97\">{}</text>",
            PAD + x * scale,
            share * scale,
            legend + 17,
            escape(&label),
        );
        x += share;
        // Seven pixels a letter, the coloured square and a gap.
        legend += label.len() * 7 + 42;
    }
}

/// The colour: by whose code it is, in one of four shades by the function's package, so that a package is one patch.
fn class(node: NodeRef<'_>) -> String {
    let letter = match Origin::of(node.function()) {
        Origin::App => 'a',
        Origin::Library => 'l',
        Origin::Native => 'n',
        Origin::Kernel => 'k',
        Origin::Wait => 'w',
    };
    let text = match node.kind() {
        FrameKind::Kernel => node.name(),
        _ => origin::package(node.function()),
    };
    let shade = text.bytes().fold(5381u32, |hash, byte| hash.wrapping_mul(33) ^ u32::from(byte)) >> 3 & 3;
    format!("{letter}{shade}")
}

/// As much of a name as fits; nothing when that would be a letter or two.
fn cut(text: &str, room: usize) -> String {
    if room < 3 {
        return String::new();
    }
    if text.chars().count() <= room {
        return text.to_string();
    }
    text.chars().take(room - 1).chain(['…']).collect()
}

fn escape_lines(lines: &[String]) -> String {
    lines.iter().map(|line| escape(line)).collect::<Vec<_>>().join("\n")
}

/// For text and attributes of XML.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in printable(text).chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::super::Builder;
    use super::super::super::testing::{frame, py, stack};
    use super::*;

    fn attribute(element: &str, name: &str) -> f64 {
        let from = element.find(&format!(" {name}=\"")).expect("attribute") + name.len() + 3;
        let text = &element[from..];
        text[..text.find('"').expect("end")].trim_end_matches('%').parse().expect("number")
    }

    fn frames(svg: &str) -> Vec<(&str, f64, f64, f64)> {
        svg.lines()
            .filter(|line| line.starts_with("<g class=\"f\""))
            .map(|line| {
                let title = line.split("<title>").nth(1).expect("title");
                (
                    title.split('<').next().expect("name"),
                    attribute(line, "data-d"),
                    attribute(line, "data-x"),
                    attribute(line, "data-w"),
                )
            })
            .collect()
    }

    #[test]
    fn the_head_tells_what_the_application_causes_and_what_it_does_itself() {
        let mut b = Builder::default();
        let django =
            || frame(FrameKind::Python, "get_response", "/v/lib/python3.11/site-packages/django/x.py", 1, 1);
        let native = || frame(FrameKind::Native, "sqlite3_step", "/usr/lib/libsqlite3.so.0", 0, 0);
        b.add(&stack(&[django(), py("view", 3), native()]), 700);
        b.add(&stack(&[django(), py("view", 3), django(), py("inner", 3)]), 200);
        b.add(&stack(&[django()]), 100);
        let svg = render(&b.finish(0), &Subject::default(), View::Cpu);
        assert!(svg.contains("90.0 % in application code and what it calls"));
        for label in ["self time:", "application 20.0 %", "libraries 10.0 %", "native 70.0 %"] {
            assert!(svg.contains(&format!(">{label}</text>")), "{label}");
        }
        let mut b = Builder::default();
        b.add(&stack(&[django()]), 100);
        assert!(!render(&b.finish(0), &Subject::default(), View::Cpu).contains("in application code"));
    }

    #[test]
    fn frames_stand_where_they_should() {
        let mut b = Builder::default();
        b.add(&stack(&[py("main", 3), py("a", 10), py("deep", 1)]), 500);
        b.add(&stack(&[py("main", 3), py("b", 10)]), 250);
        b.add(&stack(&[py("main", 3)]), 50);
        b.add(&stack(&[py("other", 3), py("c", 10)]), 150);
        b.add(&[], 50);
        let svg = render(&b.finish(0), &Subject { title: "GET /".into(), ..Subject::default() }, View::Cpu);
        // Names end at the line's end: a description has one fact per line.
        assert_eq!(
            frames(&svg),
            [
                ("GET /", 0.0, 0.0, 1.0),
                ("main", 1.0, 0.0, 0.8),
                ("a", 2.0, 0.0, 0.5),
                ("deep", 3.0, 0.0, 0.5),
                ("b", 2.0, 0.5, 0.25),
                ("other", 1.0, 0.8, 0.15),
                ("c", 2.0, 0.8, 0.15),
            ]
        );
    }

    #[test]
    fn narrow_frames_are_left_out_with_all_below_and_the_title_says_so() {
        let mut b = Builder::default();
        b.add(&stack(&[py("big", 1)]), 10_000);
        b.add(&stack(&[py("narrow", 1), py("below", 1)]), 4);
        b.add(&stack(&[py("tail", 1)]), 3_000);
        let svg = render(&b.finish(0), &Subject { title: "T".into(), ..Subject::default() }, View::Cpu);
        assert_eq!(frames(&svg).iter().map(|f| f.0).collect::<Vec<_>>(), ["T", "big", "tail"]);
        assert!(svg.contains("<title>T (2 frames narrower than 0.05 % not drawn)</title>"));
    }

    #[test]
    fn names_are_escaped() {
        let mut b = Builder::default();
        b.add(&stack(&[py("]]></script><script>alert(1)</script>\u{1}&\"'", 1)]), 10);
        b.add(&stack(&[frame(FrameKind::Native, "operator<<", "<b>.so", 0, 0)]), 10);
        let subject = Subject { title: "<img src=x onerror=alert(1)>".into(), ..Subject::default() };
        let svg = render(&b.finish(0), &subject, View::Cpu);
        assert_eq!(svg.matches("<script>").count(), 1);
        assert!(!svg.contains("<img") && !svg.contains("<b>") && !svg.contains('\u{1}'));
        assert!(svg.contains("operator&lt;&lt;"));
    }

    #[test]
    fn the_embedded_parts_cannot_end_their_section() {
        assert!(!STYLE.contains("]]>") && !SCRIPT.contains("]]>"));
    }
}
