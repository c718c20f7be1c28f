//! Names as they go into frames: valid, printable, short.
//!
//! In: names that a target chose. Out: the same names without control characters and of bounded length. Escaping
//! for HTML, terminals and labels is up to whoever prints them.

use std::borrow::Cow;

/// Longest name or path kept, in bytes. Deeply nested C++ templates are longer and no more telling for it.
pub(super) const NAME_MAX: usize = 512;

/// Replaces control characters by U+FFFD and cuts at [`NAME_MAX`] bytes, ending in `…` where it was longer.
pub(super) fn clean(name: &str) -> Cow<'_, str> {
    if name.len() <= NAME_MAX && !name.chars().any(char::is_control) {
        return Cow::Borrowed(name);
    }
    let mut out = String::with_capacity(name.len().min(NAME_MAX));
    for c in name.chars() {
        let c = if c.is_control() { char::REPLACEMENT_CHARACTER } else { c };
        if out.len() + c.len_utf8() > NAME_MAX {
            while out.len() + '…'.len_utf8() > NAME_MAX {
                out.pop();
            }
            out.push('…');
            break;
        }
        out.push(c);
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn printable_names_stay_as_they_are() {
        for name in ["", "f", "<listcomp>", "Täst.inner", &"a".repeat(NAME_MAX)] {
            assert!(matches!(clean(name), Cow::Borrowed(same) if same == name));
        }
    }

    #[test]
    fn control_characters_and_length_are_tamed() {
        assert_eq!(clean("a\nb\x1b[31m\u{7f}\u{85}\0"), "a\u{fffd}b\u{fffd}[31m\u{fffd}\u{fffd}\u{fffd}");
        for name in ["a".repeat(513), "é".repeat(300), "🙀".repeat(200), "\n".repeat(400)] {
            let cut = clean(&name);
            assert!(cut.len() <= NAME_MAX && cut.len() > NAME_MAX - 8 && cut.ends_with('…'));
        }
    }
}
