//! The rows of one `.eh_frame` section: from which address on which rule holds.
//!
//! In: the section's bytes, which may be forged. Out: [`Rows`] in the order of their addresses, without repetitions, and
//! counts of what was left out. The work is linear in the section's size and bounded by it: a description's own
//! instructions are part of the section, and those of the common part, which run once for each description, may only
//! be few.

use std::collections::BTreeMap;

use gimli::{BaseAddresses, CieOrFde, EhFrame, LittleEndian, UnwindContext, UnwindSection};
use profiler_common::unwind::Rule;
use rustc_hash::FxHashMap;

use super::rule::{Exception, Found, Slice, Storage, rule_of};

/// Bytes of instructions in a common part. Compilers write 5 to 8.
const COMMON_MAX: usize = 256;
/// Distinct rules of one file: node, the richest seen, has some 1,200. Those beyond are unsupported, so that one file
/// cannot take all the numbers there are.
const RULES_OF_ONE: usize = 4096;
/// Descriptions of one file: 24 MiB while it is read. Browsers and databases of 500 MB have some 600,000.
const DESCRIPTIONS_MAX: usize = 1 << 20;
/// Rows of one file: 16 MiB, a quarter of what all files may have. The largest server known has 4 million.
pub const ROWS_MAX: usize = 4 << 20;
/// Between functions lie up to so many bytes to align the next one. They are never run, so they may belong to the
/// function before; a longer gap is code without information.
pub const PADDING_MAX: u64 = 15;

/// What rows hold instead of a rule's number, which is the place in [`Rows::rules`].
pub const NONE: u16 = u16::MAX;
pub const UNSUPPORTED: u16 = u16::MAX - 1;
pub const STOP: u16 = u16::MAX - 2;

/// Why a section has no rows at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RowsError {
    #[error("it describes no code")]
    Empty,
    #[error("its code spans more than 4 GiB")]
    Span,
    #[error("it has more than {DESCRIPTIONS_MAX} descriptions or {ROWS_MAX} rows")]
    TooMany,
}

/// What was met on the way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Descriptions, of functions mostly.
    pub descriptions: usize,
    /// Descriptions that are damaged, from somewhere on.
    pub damaged: usize,
    /// Descriptions that begin inside another, which wins.
    pub overlapping: usize,
    /// The list of descriptions broke off here.
    pub broken: bool,
    /// Rows whose rule is not supported.
    pub unsupported: BTreeMap<Exception, usize>,
    /// Rules beyond [`RULES_OF_ONE`].
    pub rules_refused: usize,
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    /// The address that rows are relative to.
    pub base: u64,
    /// Where code begins, and its rule: a place in `rules`, or one of the marks. The last row is a [`NONE`].
    pub rows: Vec<(u32, u16)>,
    pub rules: Vec<Rule>,
    pub counts: Counts,
}

/// Where one is and what it covers. It is read again when its turn comes, which is cheap; keeping all that was read is
/// not.
struct Description {
    start: u64,
    end: u64,
    offset: usize,
}

/// `address`: where the section lies, as the file's other addresses go.
pub fn rows(section: &[u8], address: u64) -> Result<Rows, RowsError> {
    let mut eh_frame = EhFrame::new(section, LittleEndian);
    eh_frame.set_address_size(8);
    let bases = BaseAddresses::default().set_eh_frame(address);
    let mut counts = Counts::default();
    let descriptions = descriptions(&eh_frame, &bases, &mut counts)?;
    let (Some(first), Some(last)) = (descriptions.first(), descriptions.iter().map(|d| d.end).max()) else {
        return Err(RowsError::Empty);
    };
    let base = first.start;
    // One is left for the row behind the end.
    if last - base >= u64::from(u32::MAX) {
        return Err(RowsError::Span);
    }
    let mut building = Building { base, rows: Vec::new(), rules: Rules::default(), counts };
    let mut context = UnwindContext::new_in();
    let mut covered = base;
    for description in &descriptions {
        // Sorted by where they begin: the end of what came before is all there is to know.
        let start = description.start.max(covered);
        if start > description.start {
            building.counts.overlapping += 1;
        }
        if description.end <= start {
            continue;
        }
        if start - covered > PADDING_MAX {
            building.push(covered, NONE)?;
        }
        building.describe(description, start, &eh_frame, &bases, &mut context)?;
        covered = description.end;
    }
    building.push(covered, NONE)?;
    Ok(Rows { base, rows: building.rows, rules: building.rules.list, counts: building.counts })
}

/// All of them in the order of their addresses; of those that begin at the same, in the section's order.
fn descriptions(
    eh_frame: &EhFrame<Slice<'_>>,
    bases: &BaseAddresses,
    counts: &mut Counts,
) -> Result<Vec<Description>, RowsError> {
    let mut found = Vec::new();
    // Consecutive descriptions share their common part nearly always.
    let mut common = None;
    let mut entries = eh_frame.entries(bases);
    loop {
        let partial = match entries.next() {
            Ok(Some(CieOrFde::Fde(partial))) => partial,
            Ok(Some(CieOrFde::Cie(_))) => continue,
            Ok(None) => break,
            Err(_) => {
                // Nobody can say where the next one begins.
                counts.broken = true;
                break;
            }
        };
        counts.descriptions += 1;
        let entry = partial.parse(|section, bases, offset| match &common {
            Some((at, cie)) if *at == offset => Ok(Clone::clone(cie)),
            _ => {
                let cie = section.cie_from_offset(bases, offset)?;
                common = Some((offset, cie.clone()));
                Ok(cie)
            }
        });
        let Ok(entry) = entry else {
            counts.damaged += 1;
            continue;
        };
        let (start, Some(end)) = (entry.initial_address(), entry.initial_address().checked_add(entry.len()))
        else {
            counts.damaged += 1;
            continue;
        };
        let cie = entry.cie();
        if cie.entry_len() > COMMON_MAX || cie.return_address_register() != gimli::X86_64::RA {
            counts.damaged += 1;
            continue;
        }
        // A linker that drops a function leaves its description at 0.
        if start == 0 || end <= start {
            continue;
        }
        if found.len() >= DESCRIPTIONS_MAX {
            return Err(RowsError::TooMany);
        }
        found.push(Description { start, end, offset: entry.offset() });
    }
    found.sort_by_key(|description| description.start);
    Ok(found)
}

#[derive(Default)]
struct Rules {
    list: Vec<Rule>,
    numbers: FxHashMap<Rule, u16>,
}

struct Building {
    base: u64,
    rows: Vec<(u32, u16)>,
    rules: Rules,
    counts: Counts,
}

impl Building {
    /// From `start` on: an earlier description covers what is before.
    fn describe(
        &mut self,
        description: &Description,
        start: u64,
        eh_frame: &EhFrame<Slice<'_>>,
        bases: &BaseAddresses,
        context: &mut UnwindContext<usize, Storage>,
    ) -> Result<(), RowsError> {
        let mut known = start;
        let entry = eh_frame.fde_from_offset(bases, description.offset.into(), EhFrame::cie_from_offset);
        let Some((entry, mut table)) = entry
            .ok()
            .and_then(|entry| entry.rows(eh_frame, bases, context).ok().map(|table| (entry, table)))
        else {
            self.counts.damaged += 1;
            return self.push(start, NONE);
        };
        loop {
            match table.next_row() {
                Ok(Some(row)) => {
                    let (from, to) = (row.start_address().max(start), row.end_address().min(description.end));
                    // A row may go back, where it is forged.
                    if to <= from || from < known {
                        continue;
                    }
                    let found = rule_of(row, eh_frame, entry.is_signal_trampoline());
                    let rule = self.number(found);
                    self.push(from, rule)?;
                    known = to;
                }
                Ok(None) => break,
                Err(_) => {
                    self.counts.damaged += 1;
                    break;
                }
            }
        }
        if known < description.end { self.push(known, NONE) } else { Ok(()) }
    }

    fn number(&mut self, found: Found) -> u16 {
        let rule = match found {
            Found::Stop => return STOP,
            Found::Unsupported(exception) => {
                *self.counts.unsupported.entry(exception).or_default() += 1;
                return UNSUPPORTED;
            }
            Found::Rule(rule) => rule,
        };
        if let Some(number) = self.rules.numbers.get(&rule) {
            return *number;
        }
        if self.rules.list.len() >= RULES_OF_ONE {
            self.counts.rules_refused += 1;
            return UNSUPPORTED;
        }
        let number = self.rules.list.len() as u16;
        self.rules.list.push(rule);
        self.rules.numbers.insert(rule, number);
        number
    }

    /// Whatever holds from `address` on.
    fn push(&mut self, address: u64, rule: u16) -> Result<(), RowsError> {
        let key = (address - self.base) as u32;
        match self.rows.last_mut() {
            Some(last) if last.1 == rule => return Ok(()),
            Some(last) if last.0 == key => {
                // What was said of this address covers nothing.
                last.1 = rule;
                let len = self.rows.len();
                if len >= 2 && self.rows[len - 2].1 == rule {
                    self.rows.pop();
                }
                return Ok(());
            }
            _ => {}
        }
        if self.rows.len() >= ROWS_MAX {
            return Err(RowsError::TooMany);
        }
        self.rows.push((key, rule));
        Ok(())
    }
}
