//! Folded stacks: one line per distinct stack, `outer;inner;leaf 1234`, as flamegraph.pl and many others read them.
//!
//! The number is the time in whole microseconds. What rounding cuts off one line is carried to the next, so the sum
//! of all lines is the total rounded down, not off by half a microsecond per line; lines that come to 0 are left out.
//! A frame is `name (file:first line)`; the kernel's end in `_[k]`, which flamegraph.pl colours. Since `;` separates
//! frames and a line ends a stack, these become `:` and U+FFFD in names.

use super::super::{FrameKind, Function, NodeRef, Profile};
use super::{View, origin, printable};

/// Time of samples without any frame.
const NO_STACK: &str = "[no stack]";

pub fn render(profile: &Profile, view: View) -> String {
    let profile = profile.in_view(view);
    let labels: Vec<String> = profile.functions().iter().map(label).collect();
    let mut out = Lines { text: String::new(), carry: 0 };
    out.stack(NO_STACK, profile.root());
    let mut path = String::new();
    // Where in `path` the frames of each depth begin.
    let mut starts: Vec<usize> = Vec::new();
    for (depth, node) in profile.walk() {
        if let Some(&start) = starts.get(depth - 1) {
            path.truncate(start);
            starts.truncate(depth - 1);
        }
        starts.push(path.len());
        if depth > 1 {
            path.push(';');
        }
        path.push_str(&labels[node.function_id()]);
        out.stack(&path, node);
    }
    out.text
}

struct Lines {
    text: String,
    /// Nanoseconds not yet written, less than a microsecond.
    carry: u64,
}

impl Lines {
    fn stack(&mut self, path: &str, node: NodeRef<'_>) {
        let ns = node.own().ns.saturating_add(self.carry);
        self.carry = ns % 1_000;
        if ns >= 1_000 {
            self.text.push_str(path);
            self.text.push_str(&format!(" {}\n", ns / 1_000));
        }
    }
}

fn label(function: &Function) -> String {
    let mut label = printable(&function.name).replace(';', ":");
    let file = printable(origin::short_file(function)).replace(';', ":");
    match (file.is_empty(), function.first_line) {
        (true, _) => {}
        (false, 0) => label.push_str(&format!(" ({file})")),
        (false, line) => label.push_str(&format!(" ({file}:{line})")),
    }
    if function.kind == FrameKind::Kernel {
        label.push_str("_[k]");
    }
    label
}

#[cfg(test)]
mod tests {
    use super::super::super::Builder;
    use super::super::super::testing::{frame, py, stack};
    use super::*;

    #[test]
    fn stacks_and_their_microseconds() {
        let mut b = Builder::default();
        b.add(&stack(&[py("main", 3), py("a", 10)]), 10_600);
        b.add(&stack(&[py("main", 3), frame(FrameKind::Native, "inflate", "/usr/lib/libz.so.1", 0, 0)]), 600);
        b.add(&stack(&[py("main", 3), frame(FrameKind::Kernel, "vfs_read", "", 0, 0)]), 400);
        b.add(&stack(&[py("x;y\nz", 3)]), 2_400);
        b.add(&[], 5_000);
        let text = render(&b.finish(30_000), View::Wall);
        // 600 ns left of `a` and 600 ns of `inflate` make a line; 200 ns of that and 400 ns of `vfs_read` do not.
        assert_eq!(
            text,
            "[no stack] 5\n\
             main (/srv/shop/views.py:1);a (/srv/shop/views.py:1) 10\n\
             main (/srv/shop/views.py:1);inflate (libz.so.1) 1\n\
             [unsampled] 11\n\
             x:y\u{fffd}z (/srv/shop/views.py:1) 3\n"
        );
    }

    #[test]
    fn the_sum_is_the_total_rounded_down() {
        let mut b = Builder::default();
        for i in 0..1_000 {
            b.add(&stack(&[py(&format!("f{i}"), 1)]), 1_999);
        }
        let text = render(&b.finish(0), View::Cpu);
        let sum: u64 = text
            .lines()
            .map(|l| l.rsplit(' ').next().expect("a number").parse::<u64>().expect("a number"))
            .sum();
        assert_eq!(sum, 1_999);
    }
}
