//! Sections that nobody's compiler wrote, or only its bytes.

use std::fs::File;

use proptest::prelude::*;

use profiler_common::unwind::{Rule, cfa, fp, ra};
use profiler_ebpf::native::rule_number;

use super::host::{Host, check_rows};
use super::kept::Kept;
use crate::process::elf::{ElfFile, FileId};
use crate::unwind::cache::{Cache, NoTable, Read};
use crate::unwind::rows::{ROWS_MAX, Rows, RowsError, STOP, UNSUPPORTED, rows};
use crate::unwind::section::Section;

/// Where the section lies.
const ADDRESS: u64 = 0x10_0000;

/// DWARF's instructions that the tests use (DWARF 5, 7.24).
const ADVANCE: u8 = 0x40;
const OFFSET: u8 = 0x80;
const DEF_CFA: u8 = 0x0c;
const DEF_CFA_OFFSET: u8 = 0x0e;
const DEF_CFA_REGISTER: u8 = 0x0d;
const DEF_CFA_EXPRESSION: u8 = 0x0f;
const EXPRESSION: u8 = 0x10;
const UNDEFINED: u8 = 0x07;

/// The CFA is `rsp + 8`, the return address below it.
const COMMON: &[u8] = &[DEF_CFA, 7, 8, OFFSET | 16, 1];

/// A section in the making.
#[derive(Default)]
struct Making(Vec<u8>);

impl Making {
    fn entry(&mut self, body: &[u8]) -> usize {
        let at = self.0.len();
        let size = body.len().next_multiple_of(8) + 4;
        self.0.extend((size as u32).to_le_bytes());
        self.0.extend(body);
        self.0.resize(at + 4 + size, 0);
        at
    }

    /// A common part: addresses are relative to their place, 4 bytes.
    fn common(&mut self, augmentation: &[u8], instructions: &[u8]) -> usize {
        let body = [
            &0u32.to_le_bytes()[..],
            &[1],
            augmentation,
            // Code alignment 1, data alignment -8, return address in column 16, one byte of augmentation: pcrel, sdata4.
            &[0, 1, 0x78, 16, 1, 0x1b],
            instructions,
        ];
        self.entry(&body.concat())
    }

    fn description(&mut self, common: usize, start: u64, length: u32, instructions: &[u8]) {
        let here = self.0.len();
        let pointer = (here + 4 - common) as u32;
        let place = ADDRESS + here as u64 + 8;
        let start = start.wrapping_sub(place) as u32;
        let body =
            [&pointer.to_le_bytes()[..], &start.to_le_bytes(), &length.to_le_bytes(), &[0], instructions];
        self.entry(&body.concat());
    }

    fn rows(&self) -> Result<Rows, RowsError> {
        rows(&self.0, ADDRESS)
    }
}

/// What the table says of each address.
fn said(rows: &Rows, addresses: impl IntoIterator<Item = u64>) -> Vec<Option<Rule>> {
    use profiler_ebpf::native::Tables;
    let host = Host::new(rows);
    addresses.into_iter().map(|pc| host.rule(rule_number(&host, &host.mapping, pc)).copied()).collect()
}

fn sp(cfa_offset: i32) -> Option<Rule> {
    Some(Rule { cfa: cfa::SP, cfa_offset, ..Rule::default() })
}

#[test]
fn rows_are_in_the_order_of_addresses_and_gaps_are_left() {
    let mut section = Making::default();
    let common = section.common(b"zR", COMMON);
    // In another order than that of the addresses; the second and third are next to each other but for padding.
    section.description(common, 0x3000, 0x20, &[]);
    section.description(common, 0x1000, 0x18, &[ADVANCE | 4, DEF_CFA_OFFSET, 16]);
    section.description(common, 0x1020, 0x10, &[]);
    let rows = section.rows().expect("rows");
    let keys: Vec<u32> = rows.rows.iter().map(|row| row.0).collect();
    assert_eq!((rows.base, keys), (0x1000, vec![0, 4, 0x20, 0x30, 0x2000, 0x2020]));
    assert_eq!(
        said(
            &rows,
            [0xfff, 0x1000, 0x1003, 0x1004, 0x101f, 0x1020, 0x102f, 0x1030, 0x2fff, 0x3000, 0x301f, 0x3020]
        ),
        [None, sp(8), sp(8), sp(16), sp(16), sp(8), sp(8), None, None, sp(8), sp(8), None]
    );
}

#[test]
fn rows_far_from_each_other_are_found() {
    let mut section = Making::default();
    let common = section.common(b"zR", COMMON);
    // Each in a leaf of its own, and enough of them for three levels.
    let starts: Vec<u64> = (0..5000u64).map(|n| 0x20_0000 + n * 0x4_0000).collect();
    for &start in &starts {
        section.description(common, start, 0x3_0000, &[ADVANCE | 1, DEF_CFA_OFFSET, 16]);
    }
    let rows = section.rows().expect("rows");
    assert_eq!(rows.rows.len(), starts.len() * 3);
    assert!(Host::new(&rows).mapping.levels() == 3);
    let of = |&start: &u64| [start - 1, start, start + 1, start + 0x2_ffff, start + 0x3_0000];
    let found = said(&rows, starts.iter().flat_map(of));
    for (start, found) in starts.iter().zip(found.chunks(5)) {
        assert_eq!(found, [None, sp(8), sp(16), sp(16), None], "{start:#x}");
    }
}

#[test]
fn what_is_special_is_told_apart() {
    let mut section = Making::default();
    let common = section.common(b"zR", COMMON);
    let signal = section.common(b"zRS", &[]);
    section.description(common, 0x1000, 0x10, &[UNDEFINED, 16]);
    section.description(common, 0x1010, 0x10, &[DEF_CFA_REGISTER, 3]);
    section.description(common, 0x1020, 0x10, &[DEF_CFA_REGISTER, 17]);
    section.description(common, 0x1030, 0x10, &[DEF_CFA_REGISTER, 6, OFFSET | 6, 2]);
    // breg7 + 160, deref; rip at breg7 + 168; rbp at breg7 + 120 (numbers in SLEB128).
    let trampoline = [
        &[DEF_CFA_EXPRESSION, 4, 0x77, 0xa0, 1, 0x06][..],
        &[EXPRESSION, 16, 3, 0x77, 0xa8, 1],
        &[EXPRESSION, 6, 3, 0x77, 0xf8, 0],
    ];
    section.description(signal, 0x1040, 0x10, &trampoline.concat());
    // rsp + 8 + ((rip & 15 >= 11) << 3)
    let plt = [DEF_CFA_EXPRESSION, 11, 0x77, 8, 0x80, 0, 0x3f, 0x1a, 0x3b, 0x2a, 0x33, 0x24, 0x22];
    section.description(common, 0x1050, 0x10, &plt);
    // Something that nobody writes: rsp + rax.
    section.description(common, 0x1060, 0x10, &[DEF_CFA_EXPRESSION, 5, 0x77, 0, 0x70, 0, 0x22]);
    let rows = section.rows().expect("rows");
    let rule = |key: u32| rows.rows[rows.rows.partition_point(|row| row.0 <= key) - 1].1;
    assert_eq!((rule(0x0), rule(0x20), rule(0x60)), (STOP, UNSUPPORTED, UNSUPPORTED));
    assert_eq!(rows.counts.unsupported.values().sum::<usize>(), 2);
    let base = Rule::default();
    let expected = [
        (0x10, Rule { cfa: cfa::LEAF, register: 3, cfa_offset: 8, ..base }),
        (0x30, Rule { cfa: cfa::FP, cfa_offset: 8, fp: fp::AT_CFA, fp_offset: -16, ..base }),
        (
            0x40,
            Rule {
                cfa: cfa::AT_SP,
                cfa_offset: 160,
                fp: fp::AT_SP,
                fp_offset: 120,
                ra: ra::AT_SP,
                extra: 168,
                ..base
            },
        ),
        (0x50, Rule { cfa: cfa::PLT, cfa_offset: 11, ..base }),
    ];
    for (key, expected) in expected {
        assert_eq!(rows.rules[usize::from(rule(key))], expected, "{key:#x}");
    }
}

#[test]
fn what_overlaps_belongs_to_whoever_began_before() {
    let mut section = Making::default();
    let common = section.common(b"zR", COMMON);
    section.description(common, 0x1000, 0x100, &[DEF_CFA_OFFSET, 32]);
    section.description(common, 0x1080, 0x100, &[DEF_CFA_OFFSET, 64]);
    section.description(common, 0x1090, 0x10, &[DEF_CFA_OFFSET, 96]);
    let rows = section.rows().expect("rows");
    assert_eq!(rows.counts.overlapping, 2);
    assert_eq!(
        said(&rows, [0x1080, 0x1095, 0x10ff, 0x1100, 0x117f]),
        [sp(32), sp(32), sp(32), sp(64), sp(64)]
    );
}

#[test]
fn what_cannot_be_is_refused_and_counted() {
    let empty = Making::default();
    assert_eq!(empty.rows().err(), Some(RowsError::Empty));
    let mut section = Making::default();
    let common = section.common(b"zR", COMMON);
    section.description(common, 0x1000, 0x10, &[]);
    section.description(common, 0x1_2000_0000, 0x10, &[]);
    // The distance is 4 bytes in the section, so it takes code below and above it.
    assert!(matches!(section.rows(), Ok(_) | Err(RowsError::Span)));

    // Common instructions run for each description.
    let mut section = Making::default();
    let long = section.common(b"zR", &[0; 400]);
    let common = section.common(b"zR", COMMON);
    section.description(long, 0x1000, 0x10, &[]);
    section.description(common, 0x2000, 0x10, &[]);
    // An instruction that there is not.
    section.description(common, 0x3000, 0x10, &[ADVANCE | 8, 0x3f]);
    let rows = section.rows().expect("rows");
    assert_eq!((rows.base, rows.counts.damaged), (0x2000, 2));
    assert_eq!(said(&rows, [0x2000, 0x2010, 0x3000, 0x3009]), [sp(8), None, sp(8), None]);

    // The end of one is not the beginning of another.
    let whole = section.0.len();
    section.0.extend(1000u32.to_le_bytes());
    let rows = section.rows().expect("rows");
    assert!(rows.counts.broken);
    assert_eq!(rows.counts.descriptions, 3);
    section.0.truncate(whole - 4);
    assert!(section.rows().expect("rows").counts.broken);
}

#[test]
fn a_file_has_so_many_rules_and_rows_and_no_more() {
    // Every row another rule, and two rows for each byte of code.
    let mut section = Making::default();
    let common = section.common(b"zR", COMMON);
    let mut instructions = Vec::new();
    for n in 0..20_000u32 {
        // A number of 16 bits in ULEB128.
        let offset = 1000 + n;
        let [a, b, c] = [offset as u8 | 0x80, (offset >> 7) as u8 | 0x80, (offset >> 14) as u8];
        instructions.extend([ADVANCE | 1, DEF_CFA_OFFSET, a, b, c]);
    }
    section.description(common, 0x1000, 0x10_0000, &instructions);
    let rows = section.rows().expect("rows");
    assert_eq!(rows.rules.len(), 4096);
    assert_eq!(rows.counts.rules_refused, 20_001 - 4096);

    let mut section = Making::default();
    let common = section.common(b"zR", COMMON);
    let pair = [ADVANCE | 1, DEF_CFA_OFFSET, 16, ADVANCE | 1, DEF_CFA_OFFSET, 8];
    let instructions = pair.repeat(ROWS_MAX / 2 + 1);
    section.description(common, 0x1000, u32::MAX / 2, &instructions);
    assert_eq!(section.rows().err(), Some(RowsError::TooMany));
}

#[test]
fn rows_that_are_spread_take_no_room_from_others() {
    let mut section = Making::default();
    let common = section.common(b"zR", COMMON);
    for n in 0..50_000 {
        section.description(
            common,
            0x20_0000 + n * 0x1_4000,
            0x1_4000,
            if n % 2 == 0 { &[] } else { &[DEF_CFA_OFFSET, 16] },
        );
    }
    let mut cache = Cache::default();
    let section = Section { bytes: section.0, address: ADDRESS };
    let id = FileId { dev: 1, inode: 2, size: 3, mtime: 4 };
    let read = Read { loads: Vec::new(), section: Ok(section) };
    assert_eq!(cache.add(id, read, &mut &mut Kept::default()).table, Err(NoTable::TooLarge));
    assert_eq!((cache.usage().bytes, cache.usage().rules), (0, 0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        if let Ok(rows) = rows(&bytes, ADDRESS) {
            check_rows(&rows);
        }
    }

    /// A real section with a few bytes changed.
    #[test]
    fn a_damaged_section_is_read_as_far_as_it_goes(
        changes in proptest::collection::vec((any::<u32>(), any::<u8>()), 1..50),
        kept in 0.0..1.0f64,
    ) {
        let file = File::open("/usr/lib/x86_64-linux-gnu/libssl.so.3").or_else(|_| File::open("/proc/self/exe"));
        let elf = ElfFile::parse(file.expect("a file")).expect("an ELF file");
        let mut section = Section::of(&elf).expect("a section");
        let size = section.bytes.len().min(1 << 16);
        section.bytes.truncate((size as f64 * kept) as usize + 64);
        let size = section.bytes.len();
        for (at, byte) in changes {
            section.bytes[at as usize % size] = byte;
        }
        if let Ok(rows) = rows(&section.bytes, section.address) {
            check_rows(&rows);
        }
    }
}
