//! Line tables up to 3.10: pairs of bytes, a distance in the byte code and a difference of lines (`Objects/lnotab_notes.txt`).

use super::Entry;

/// `co_linetable` of 3.10: each pair is a run of instructions; those of -128 have no line.
#[derive(Clone, Debug)]
pub struct Ranges<'a> {
    pairs: std::slice::Iter<'a, [u8; 2]>,
    offset: u32,
    line: i64,
}

impl<'a> Ranges<'a> {
    pub fn new(table: &'a [u8], first_line: u32) -> Self {
        Self { pairs: table.as_chunks().0.iter(), offset: 0, line: first_line.into() }
    }
}

impl Iterator for Ranges<'_> {
    type Item = Entry;

    fn next(&mut self) -> Option<Entry> {
        const NO_LINE: i8 = -128;
        let &[distance, difference] = self.pairs.next()?;
        let difference = difference.cast_signed();
        let start = self.offset;
        self.offset = start.checked_add(distance.into())?;
        if difference != NO_LINE {
            self.line += i64::from(difference);
        }
        let line = if difference == NO_LINE { None } else { u32::try_from(self.line).ok() };
        Some(Entry { start, end: self.offset, line })
    }
}

/// `co_lnotab`, up to 3.9: each pair says where another line begins; the last one goes on to the end.
#[derive(Clone, Debug)]
pub struct Lnotab<'a> {
    pairs: std::slice::Iter<'a, [u8; 2]>,
    offset: u32,
    line: i64,
    over: bool,
}

impl<'a> Lnotab<'a> {
    pub fn new(table: &'a [u8], first_line: u32) -> Self {
        Self { pairs: table.as_chunks().0.iter(), offset: 0, line: first_line.into(), over: false }
    }
}

impl Iterator for Lnotab<'_> {
    type Item = Entry;

    fn next(&mut self) -> Option<Entry> {
        if self.over {
            return None;
        }
        let (start, line) = (self.offset, u32::try_from(self.line).ok());
        match self.pairs.next() {
            Some(&[distance, difference]) => {
                self.offset = start.checked_add(distance.into())?;
                self.line += i64::from(difference.cast_signed());
            }
            None => {
                self.over = true;
                self.offset = u32::MAX;
            }
        }
        Some(Entry { start, end: self.offset, line })
    }
}
