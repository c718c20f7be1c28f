//! Every address of the code of well-known files: one step of our walk, with made-up registers on made-up memory,
//! leads where gimli's rows lead when they are followed as DWARF says.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Instant;

use gimli::{
    BaseAddresses, CfaRule, EhFrame, EhFrameHdr, EvaluationResult, LittleEndian, Location, RegisterRule,
    UnwindContext, UnwindExpression, UnwindSection, UnwindTableRow, Value,
};
use profiler_common::unwind::{RULE_NONE, RULE_STOP, RULE_UNSUPPORTED, Space, end, fp};
use profiler_ebpf::memory::{Block, Fault, Memory};
use profiler_ebpf::native::{Tables, Walker, rule_number};

use super::host::Host;
use crate::process::elf::ElfFile;
use crate::skip::skip;
use crate::unwind::rows::{PADDING_MAX, rows};
use crate::unwind::rule::Slice;
use crate::unwind::section::Section;

const SP: u64 = 0x7fff_0000_1000;
const FP: u64 = SP + 0x2340;

/// As DWARF numbers them: the frame pointer is the seventh, the stack pointer the eighth.
fn registers() -> [u64; 16] {
    let mut registers = std::array::from_fn(|n| SP + 0x5000 + n as u64 * 0x100);
    (registers[6], registers[7]) = (FP, SP);
    registers
}

/// Every word of it holds something else, and what it holds is above the stack pointer.
struct MadeUp;

fn word_at(address: u64) -> u64 {
    SP + 0x10_0000 + (address.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) * 8
}

impl Memory for MadeUp {
    fn fill<const N: usize>(&self, address: u64, size: u32, block: &mut Block<N>) -> Result<(), Fault> {
        for at in 0..u64::from(size) {
            // Of overlapping words each has its own bytes only where they are aligned to the first.
            let word = word_at(address + (at & !7)).to_le_bytes();
            // SAFETY: `size` is at most N.
            unsafe { *block.as_mut_ptr().add(at as usize) = word[at as usize & 7] };
        }
        Ok(())
    }
}

/// What the caller's registers are.
#[derive(Debug, PartialEq, Eq)]
enum Caller {
    At {
        pc: u64,
        sp: u64,
        /// `None`: it is not known.
        fp: Option<u64>,
    },
    Nobody,
}

type Row = UnwindTableRow<usize>;

fn evaluate(
    expression: &UnwindExpression<usize>,
    section: &EhFrame<Slice<'_>>,
    pc: u64,
    initial: Option<u64>,
) -> Option<u64> {
    let encoding = gimli::Encoding { address_size: 8, format: gimli::Format::Dwarf32, version: 4 };
    let mut evaluation = expression.get(section).ok()?.evaluation(encoding);
    if let Some(value) = initial {
        evaluation.set_initial_value(value);
    }
    let mut state = evaluation.evaluate().ok()?;
    loop {
        state = match state {
            EvaluationResult::Complete => break,
            EvaluationResult::RequiresMemory { address, .. } => {
                evaluation.resume_with_memory(Value::Generic(word_at(address))).ok()?
            }
            EvaluationResult::RequiresRegister { register, .. } => {
                let value = register_value(register, pc)?;
                evaluation.resume_with_register(Value::Generic(value)).ok()?
            }
            _ => return None,
        };
    }
    match evaluation.as_result().first()?.location {
        Location::Address { address } => Some(address),
        _ => None,
    }
}

/// Whether the CFA is calculated with registers other than the stack pointer, the frame pointer and the program counter.
fn calculates_with_others(row: &Row, section: &EhFrame<Slice<'_>>) -> bool {
    let CfaRule::Expression(expression) = row.cfa() else { return false };
    let encoding = gimli::Encoding { address_size: 8, format: gimli::Format::Dwarf32, version: 4 };
    let mut operations = expression.get(section).expect("an expression").operations(encoding);
    while let Some(operation) = operations.next().expect("an operation") {
        if let gimli::Operation::RegisterOffset { register, .. } = operation
            && ![gimli::X86_64::RBP, gimli::X86_64::RSP, gimli::X86_64::RA].contains(&register)
        {
            return true;
        }
    }
    false
}

fn register_value(register: gimli::Register, pc: u64) -> Option<u64> {
    if register == gimli::X86_64::RA { Some(pc) } else { registers().get(register.0 as usize).copied() }
}

/// Follows a row as DWARF 5, 6.4.3 says. `None`: it takes registers that we do not have.
fn follow(row: &Row, section: &EhFrame<Slice<'_>>, pc: u64) -> Option<Caller> {
    let ra = row.register(gimli::X86_64::RA)?;
    if ra == RegisterRule::Undefined {
        return Some(Caller::Nobody);
    }
    let frame = match row.cfa() {
        CfaRule::RegisterAndOffset { register, offset } => {
            register_value(*register, pc)?.wrapping_add_signed(*offset)
        }
        CfaRule::Expression(expression) => evaluate(expression, section, pc, None)?,
    };
    let value = |rule: RegisterRule<usize>, same: u64| match rule {
        RegisterRule::SameValue => Some(same),
        RegisterRule::Offset(offset) => Some(word_at(frame.wrapping_add_signed(offset))),
        RegisterRule::ValOffset(offset) => Some(frame.wrapping_add_signed(offset)),
        RegisterRule::Register(register) => register_value(register, pc),
        RegisterRule::Expression(at) => evaluate(&at, section, pc, Some(frame)).map(word_at),
        RegisterRule::ValExpression(at) => evaluate(&at, section, pc, Some(frame)),
        _ => None,
    };
    let fp = row.register(gimli::X86_64::RBP).map_or(Some(FP), |rule| value(rule, FP));
    Some(Caller::At { pc: value(ra, pc)?, sp: frame, fp })
}

fn step(host: &Host, pc: u64) -> Caller {
    let mut walker = Box::new(Walker::new());
    walker.begin(pc, registers(), Space { count: 1, ..Space::default() });
    match walker.step(&MadeUp, host) {
        Ok(()) => Caller::At { pc: walker.pc, sp: walker.sp, fp: Some(walker.fp) },
        Err(end::COMPLETE) => Caller::Nobody,
        Err(reason) => panic!("at {pc:#x}: {reason}"),
    }
}

/// Addresses by what became of them.
type Tally = BTreeMap<&'static str, u64>;

/// Compares what our table says for all addresses where this row holds, and says what became of them.
fn compare_row(
    path: &Path,
    row: &Row,
    eh_frame: &EhFrame<Slice<'_>>,
    host: &Host,
    addresses: Range<u64>,
) -> &'static str {
    let described = |pc| format!("{}: at {pc:#x}, by {row:?}", path.display());
    let first = rule_number(host, &host.mapping, addresses.start);
    for pc in addresses.clone() {
        let found = rule_number(host, &host.mapping, pc);
        assert_eq!(found, first, "{}: within a row, at {pc:#x}", path.display());
    }
    // Assembler of OpenSSL keeps its caller's stack pointer in a table on the stack.
    if first == RULE_UNSUPPORTED && calculates_with_others(row, eh_frame) {
        return "exception: calculation with other registers";
    }
    // `longjmp` and `setcontext`, where most registers are the next context's already.
    let returns = row.register(gimli::X86_64::RA);
    if first == RULE_UNSUPPORTED && returns != Some(RegisterRule::Offset(-8)) {
        return "exception: no return address of a call";
    }
    if first == RULE_UNSUPPORTED {
        for pc in addresses {
            // A rule of ours would have been possible, otherwise.
            assert_eq!(follow(row, eh_frame, pc), None, "{}", described(pc));
        }
        return "exception: not supported";
    }
    assert_ne!(first, RULE_NONE, "{}", described(addresses.start));
    let lost = host.rule_of(first).is_some_and(|rule| rule.fp == fp::LOST);
    // An expression may depend on the address's place in a line of 16.
    let by_address = matches!(row.cfa(), CfaRule::Expression(_));
    for pc in addresses.take(if by_address { usize::MAX } else { 1 }) {
        let expected = follow(row, eh_frame, pc);
        let mut found = step(host, pc);
        if let Caller::At { fp, .. } = &mut found
            && lost
        {
            *fp = None;
        }
        assert_eq!(Some(found), expected, "{}", described(pc));
    }
    if lost { "exception: frame pointer lost" } else { "equal" }
}

fn compare(path: &Path) -> Option<Tally> {
    let elf = ElfFile::parse(File::open(path).ok()?).expect("an ELF file");
    let section = Section::of(&elf).expect("a section");
    let began = Instant::now();
    let rows = rows(&section.bytes, section.address).expect("rows");
    let host = Host::new(&rows);
    let took = began.elapsed();
    assert!(
        !rows.counts.broken && rows.counts.damaged == 0 && rows.counts.rules_refused == 0,
        "{:?}",
        rows.counts
    );

    let (at, size) = elf.unwind_header().expect("an index");
    let mut index = vec![0; size as usize];
    elf.read_vaddr(at, &mut index).expect("the index");
    let bases = BaseAddresses::default().set_eh_frame(section.address).set_eh_frame_hdr(at);
    let index = EhFrameHdr::new(&index, LittleEndian).parse(&bases, 8).expect("the index");
    let index = index.table().expect("the index's table");
    let mut eh_frame = EhFrame::new(&section.bytes, LittleEndian);
    eh_frame.set_address_size(8);
    let mut context = UnwindContext::new();

    let mut tally = Tally::new();
    let mut count = |what, n| *tally.entry(what).or_insert(0) += n;
    let mut since_covered = u64::MAX;
    for load in elf.loads().iter().filter(|load| load.executable) {
        let mut pc = load.vaddr;
        let end = load.vaddr + load.file_size;
        while pc < end {
            let fde = index.fde_for_address(&eh_frame, &bases, pc, EhFrame::cie_from_offset);
            let Ok(fde) = fde else {
                since_covered = since_covered.saturating_add(1);
                if rule_number(&host, &host.mapping, pc) == RULE_NONE {
                    count("no information", 1);
                } else {
                    assert!(since_covered <= PADDING_MAX, "{}: made up at {pc:#x}", path.display());
                    count("exception: padding", 1);
                }
                pc += 1;
                continue;
            };
            since_covered = 0;
            let mut table = fde.rows(&eh_frame, &bases, &mut context).expect("rows");
            while let Some(row) = table.next_row().expect("a row") {
                let to = row.end_address().min(end);
                if to > pc {
                    count(compare_row(path, row, &eh_frame, &host, pc..to), to - pc);
                    pc = to;
                }
            }
            assert!(pc >= fde.end_address().min(end), "{}: gimli's rows end at {pc:#x}", path.display());
        }
    }
    println!(
        "{}: {} rows, {} rules, {} blocks ({} KiB), {} descriptions in {:.0?}; {:?}; {tally:?}",
        path.display(),
        rows.rows.len(),
        rows.rules.len(),
        host.table.blocks.len(),
        host.table.blocks.len() / 2,
        rows.counts.descriptions,
        took,
        rows.counts,
    );
    Some(tally)
}

impl Host {
    fn rule_of(&self, number: u16) -> Option<profiler_common::unwind::Rule> {
        if number == RULE_STOP { None } else { self.rule(number).copied() }
    }
}

/// Exceptions that do not end a walk, or not wrongly.
const LESSER: [&str; 2] = ["exception: padding", "exception: frame pointer lost"];

/// Compares a file if it is there. At most so many of its described addresses may be exceptions that end a walk.
fn check(test: &str, path: &Path, exceptions: u64) {
    let Some(tally) = compare(path) else { return skip(test, format!("no {}", path.display())) };
    let ends = |what: &str| what.starts_with("exception: ") && !LESSER.contains(&what);
    let other: u64 = tally.iter().filter(|(what, _)| ends(what)).map(|(_, n)| n).sum();
    assert!(tally["equal"] > 10_000 && other <= exceptions, "{}: {tally:?}", path.display());
}

fn library(name: &str) -> PathBuf {
    Path::new("/usr/lib/x86_64-linux-gnu").join(name)
}

#[test]
fn every_address_has_gimlis_rule() {
    let test = "every_address_has_gimlis_rule";
    let names = ["libc.so.6", "libpython3.11.so.1.0", "libssl.so.3", "libcrypto.so.3", "libstdc++.so.6"];
    for name in names.iter().chain(&["ld-linux-x86-64.so.2"]) {
        // Of millions of addresses: switches of contexts in libc, calculations in libcrypto's assembler.
        check(test, &library(name), if *name == "libcrypto.so.3" { 5000 } else { 500 });
    }
    let pyenv = std::env::var_os("HOME").map_or_else(PathBuf::new, PathBuf::from).join(".pyenv/versions");
    for version in pyenv.read_dir().into_iter().flatten().flatten() {
        for file in version.path().join("lib").read_dir().into_iter().flatten().flatten() {
            let name = file.file_name().to_string_lossy().into_owned();
            if name.starts_with("libpython3.") && name.ends_with(".so.1.0") {
                check(test, &file.path(), 100);
            }
        }
    }
}

#[test]
fn every_address_of_a_large_program_has_gimlis_rule() {
    check("every_address_of_a_large_program_has_gimlis_rule", Path::new("/usr/bin/node"), 5000);
}
