//! One row of DWARF call frame information as a [`Rule`].
//!
//! In: what gimli made of a row. Out: a rule that the kernel side can follow with three registers (program counter,
//! stack pointer, frame pointer), or one of the marks that say why there is none. Numbers of registers are those of the
//! System V ABI for x86-64, figure 3.36.

use gimli::{
    CfaRule, EhFrame, EndianSlice, LittleEndian, Operation, Register, RegisterRule, UnwindContextStorage,
    UnwindTableRow,
};
use profiler_common::unwind::{Rule, cfa, fp, ra};

pub(super) type Slice<'a> = EndianSlice<'a, LittleEndian>;
pub(super) type Row = UnwindTableRow<usize, Storage>;

/// Room for what a row says: each of the 17 registers once, and some. A row is copied for every state that is
/// remembered, so room for gimli's 192 would make a forged file six times as slow to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Storage;

impl UnwindContextStorage<usize> for Storage {
    type Rules = [(Register, RegisterRule<usize>); 32];
    /// As many states as gimli remembers by itself.
    type Stack = Box<[UnwindTableRow<usize, Self>; 4]>;
}

const RBP: Register = Register(6);
const RSP: Register = Register(7);
/// The return address's column.
const RA: Register = Register(16);

/// What a row says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Found {
    Rule(Rule),
    /// The return address is undefined: nothing called this.
    Stop,
    /// It needs registers or calculations that we do not have.
    Unsupported(Exception),
}

/// Why a row is not supported, for counting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Exception {
    /// The CFA is relative to a register other than the stack and the frame pointer.
    CfaRegister,
    /// The CFA is an expression of another shape than those below.
    CfaExpression,
    /// The return address is not where calls put it.
    ReturnAddress,
    /// An offset that is not of this world.
    Offset,
}

/// `signal`: the frame was made by the kernel, to run a handler.
pub(super) fn rule_of(row: &Row, section: &EhFrame<Slice<'_>>, signal: bool) -> Found {
    match convert(row, section, signal) {
        Ok(found) => found,
        Err(exception) => Found::Unsupported(exception),
    }
}

fn convert(row: &Row, section: &EhFrame<Slice<'_>>, signal: bool) -> Result<Found, Exception> {
    let mut rule = Rule::default();
    let return_address = row.register(RA);
    if return_address == Some(RegisterRule::Undefined) {
        return Ok(Found::Stop);
    }
    match row.cfa() {
        CfaRule::RegisterAndOffset { register, offset } => {
            rule.cfa = match *register {
                RSP => cfa::SP,
                RBP => cfa::FP,
                Register(number @ 0..16) => {
                    rule.register = number as u8;
                    cfa::LEAF
                }
                _ => return Err(Exception::CfaRegister),
            };
            rule.cfa_offset = small(*offset)?;
        }
        CfaRule::Expression(expression) => {
            let code = expression.get(section).map_err(|_| Exception::CfaExpression)?.0;
            cfa_expression(code, &mut rule)?;
        }
    }
    match return_address {
        Some(RegisterRule::Offset(-8)) => rule.ra = ra::BELOW_CFA,
        Some(RegisterRule::Expression(at)) if signal && rule.extra == 0 => {
            let at = at.get(section).ok().and_then(|code| register_plus(code.0));
            let Some((RSP, offset)) = at else { return Err(Exception::ReturnAddress) };
            (rule.ra, rule.extra) = (ra::AT_SP, small(offset)?);
        }
        _ => return Err(Exception::ReturnAddress),
    }
    // A frame pointer that is lost does not hinder the next step, unless that needs it.
    let (kind, offset) = match row.register(RBP) {
        None | Some(RegisterRule::SameValue) => (fp::SAME, 0),
        Some(RegisterRule::Offset(offset)) => (fp::AT_CFA, offset),
        Some(RegisterRule::Expression(at)) => match at.get(section).ok().and_then(|c| register_plus(c.0)) {
            Some((RBP, offset)) => (fp::AT_FP, offset),
            Some((RSP, offset)) => (fp::AT_SP, offset),
            _ => (fp::LOST, 0),
        },
        Some(_) => (fp::LOST, 0),
    };
    (rule.fp, rule.fp_offset) = (kind, small(offset)?);
    Ok(Found::Rule(rule))
}

fn small(offset: i64) -> Result<i32, Exception> {
    i32::try_from(offset).map_err(|_| Exception::Offset)
}

/// At most so many operations: the longest known shape has nine.
const OPERATIONS_MAX: usize = 9;

fn operations(code: Slice<'_>) -> Option<Vec<Operation<Slice<'_>>>> {
    let encoding = gimli::Encoding { address_size: 8, format: gimli::Format::Dwarf32, version: 4 };
    let mut rest = code;
    let mut found = Vec::with_capacity(OPERATIONS_MAX);
    while !rest.is_empty() {
        if found.len() == OPERATIONS_MAX {
            return None;
        }
        found.push(Operation::parse(&mut rest, encoding).ok()?);
    }
    Some(found)
}

/// A register plus a constant.
fn register_plus(code: Slice<'_>) -> Option<(Register, i64)> {
    match operations(code)?.as_slice() {
        [Operation::RegisterOffset { register, offset, .. }] => Some((*register, *offset)),
        _ => None,
    }
}

/// Three shapes are in use: what GCC writes for functions that align their stack and glibc for its signal trampoline
/// (the CFA is stored on the stack), and what GNU ld writes for the procedure linkage table.
fn cfa_expression(code: Slice<'_>, rule: &mut Rule) -> Result<(), Exception> {
    use Operation as Op;
    let wrong = Exception::CfaExpression;
    let ops = operations(code).ok_or(wrong)?;
    match ops.as_slice() {
        [Op::RegisterOffset { register, offset, .. }, Op::Deref { space: false, size: 8, .. }, rest @ ..] => {
            rule.cfa = match *register {
                RSP => cfa::AT_SP,
                RBP => cfa::AT_FP,
                _ => return Err(Exception::CfaRegister),
            };
            rule.cfa_offset = small(*offset)?;
            rule.extra = match rest {
                [] => 0,
                [Op::PlusConstant { value }] => small(i64::try_from(*value).map_err(|_| Exception::Offset)?)?,
                _ => return Err(wrong),
            };
            Ok(())
        }
        // rsp + 8 + ((rip & 15 >= n) << 3)
        [
            Op::RegisterOffset { register: RSP, offset: 8, .. },
            Op::RegisterOffset { register: RA, offset: 0, .. },
            Op::UnsignedConstant { value: 15 },
            Op::And,
            Op::UnsignedConstant { value: from @ 1..=15 },
            Op::Ge,
            Op::UnsignedConstant { value: 3 },
            Op::Shl,
            Op::Plus,
        ] => {
            (rule.cfa, rule.cfa_offset) = (cfa::PLT, *from as i32);
            Ok(())
        }
        _ => Err(wrong),
    }
}
