//! Where in libc a probe costs little.
//!
//! In: an ELF file that defines a function such as `recv`. Out: file offsets of instructions inside it to put
//! uprobes on. The kernel *emulates* a few instructions under a uprobe (`nop`, `push`, relative `jmp`, `jcc` and
//! `call`; `arch/x86/kernel/uprobes.c`) and single-steps all others, at some twenty times the price. So the entry of
//! a function is nearly always the wrong place.
//!
//! glibc follows each `syscall` with a comparison against the error range and a conditional jump. At that jump the
//! result is in `%rax` and the arguments are still in their registers, because the kernel preserves all but
//! `%rax`, `%rcx` and `%r11`: one cheap probe sees arguments *and* result ([`result_sites`]).
//!
//! What must be seen before the call (`close`, after which the descriptor may be another's; when a call that sends was
//! entered) is seen at the first emulated instruction from the entry ([`entry_site`]): most wrappers begin by asking
//! whether there are several threads, which ends in a conditional jump.
//!
//! From 2.41 on glibc makes cancellable calls in a shared function (`__syscall_cancel`), so that the wrappers have
//! no such jump: [`NoCheapSite`] says so, and the caller chooses another source.

use std::collections::HashSet;

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, OpAccess};
use iced_x86::{Mnemonic, OpKind, Register};

use super::elf::{ElfError, ElfFile};

/// A libc function whose result is of interest, and the system call it makes on x86-64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function {
    pub name: &'static str,
    pub syscall: u32,
}

/// Functions whose results follow a connection, with their system calls.
pub const FUNCTIONS: [Function; 14] = [
    Function { name: "recv", syscall: libc::SYS_recvfrom as u32 },
    Function { name: "recvfrom", syscall: libc::SYS_recvfrom as u32 },
    Function { name: "read", syscall: libc::SYS_read as u32 },
    Function { name: "readv", syscall: libc::SYS_readv as u32 },
    Function { name: "recvmsg", syscall: libc::SYS_recvmsg as u32 },
    Function { name: "send", syscall: libc::SYS_sendto as u32 },
    Function { name: "sendto", syscall: libc::SYS_sendto as u32 },
    Function { name: "write", syscall: libc::SYS_write as u32 },
    Function { name: "writev", syscall: libc::SYS_writev as u32 },
    Function { name: "sendmsg", syscall: libc::SYS_sendmsg as u32 },
    Function { name: "sendfile", syscall: libc::SYS_sendfile as u32 },
    Function { name: "sendfile64", syscall: libc::SYS_sendfile as u32 },
    Function { name: "accept", syscall: libc::SYS_accept as u32 },
    Function { name: "accept4", syscall: libc::SYS_accept4 as u32 },
];

/// Why there is no cheap site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    #[error("the file does not define it")]
    Undefined,
    #[error("its code is not understood")]
    Undecodable,
    #[error("it makes no system call itself (glibc 2.41 and later share one function for that)")]
    NoSystemCall,
    #[error("it makes a system call whose number is not the expected one")]
    WrongNumber,
    #[error("a system call is not followed by an emulated jump with the arguments intact")]
    NoJump,
    #[error("no emulated instruction comes before its arguments are overwritten or its system call")]
    Overwritten,
}

/// A function that cannot be probed cheaply.
#[derive(Debug, thiserror::Error)]
pub enum SiteError {
    #[error("{function}: {reason}")]
    NoCheapSite { function: String, reason: Reason },
    #[error("{function}: {source}")]
    Elf { function: String, source: ElfError },
}

/// glibc's wrappers are 20 to 200 bytes; a symbol that claims more is not one.
const CODE_MAX: u64 = 4096;
/// A function of 4 KiB, every instruction in a few states.
const STEPS_MAX: usize = 8192;

/// File offsets of the jumps after each system call of a function: there `%rax` is the result (`-errno` on failure)
/// and `%rdi`, `%rsi`, `%rdx`, `%r10` the arguments. All paths through the function pass exactly one of them.
pub fn result_sites(elf: &ElfFile, function: Function) -> Result<Vec<u64>, SiteError> {
    let (code, address) = code_of(elf, function.name)?;
    let sites = find_result_sites(&code, address, function.syscall);
    sites.and_then(|sites| to_offsets(elf, &sites)).map_err(|reason| no_site(function.name, reason))
}

/// File offset of the first emulated instruction that every call of the function passes with `%rdi` as the caller
/// gave it (its low half: a sign extension in place is let through), before it makes a system call.
pub fn entry_site(elf: &ElfFile, function: &str) -> Result<u64, SiteError> {
    let (code, address) = code_of(elf, function)?;
    let site = find_entry_site(&code, address);
    site.and_then(|site| to_offsets(elf, &[site]))
        .map(|found| found[0])
        .map_err(|reason| no_site(function, reason))
}

/// File offset of the first emulated instruction of a function that no symbol names, by its address in the file.
pub fn entry_site_at(elf: &ElfFile, vaddr: u64) -> Result<u64, Reason> {
    let mut code = [0; ENTRY];
    elf.read_vaddr(vaddr, &mut code).map_err(|_| Reason::Undecodable)?;
    Ok(to_offsets(elf, &[find_entry_site(&code, vaddr)?])?[0])
}

/// File offset of a function that both of two others hand their work to, where that begins with an emulated `push`. The
/// second one hands it its own four arguments.
///
/// OpenSSL's `SSL_read` and `SSL_read_ex` begin with what must be single-stepped, and what they call has no name; a
/// probe at a function's end can only be put in at its first instruction.
pub fn inner_function(elf: &ElfFile, one: &str, other: &str) -> Option<u64> {
    let (code, address) = code_of(elf, other).ok()?;
    let inner = find_handed_on(&code, address)?;
    let (code, address) = code_of(elf, one).ok()?;
    if !calls(&code, address, inner) {
        return None;
    }
    let mut begin = [0; ENTRY];
    elf.read_vaddr(inner, &mut begin).ok()?;
    let first = decode(&begin, inner, inner)?;
    (first.code() == Code::Push_r64 && is_emulated(&first)).then(|| elf.offset_of(inner)).flatten()
}

/// Bytes at a function's start that are looked at where its size is not known: most begin with a `push`.
const ENTRY: usize = 32;

fn no_site(function: &str, reason: Reason) -> SiteError {
    SiteError::NoCheapSite { function: function.to_owned(), reason }
}

fn to_offsets(elf: &ElfFile, addresses: &[u64]) -> Result<Vec<u64>, Reason> {
    addresses.iter().map(|&a| elf.offset_of(a).ok_or(Reason::Undecodable)).collect()
}

fn code_of(elf: &ElfFile, function: &str) -> Result<(Vec<u8>, u64), SiteError> {
    let elf_error = |source| SiteError::Elf { function: function.to_owned(), source };
    let found = elf.symbols(&[function]).map_err(elf_error)?;
    let symbol = found.get(function).ok_or_else(|| no_site(function, Reason::Undefined))?;
    if symbol.size == 0 || symbol.size > CODE_MAX {
        return Err(no_site(function, Reason::Undecodable));
    }
    let mut code = vec![0; symbol.size as usize];
    elf.read_vaddr(symbol.value, &mut code).map_err(elf_error)?;
    Ok((code, symbol.value))
}

/// What is known at one point of a path from the entry.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct State {
    /// The value of `%eax`, before the system call.
    eax: Option<u32>,
    /// The previous instruction was `test %eax,%eax`.
    tested: bool,
    after: After,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum After {
    /// No system call yet on this path.
    Nothing,
    Syscall,
    /// And its result was compared with the error range.
    Compared,
}

/// Follows every path from the entry. Each one that makes a system call must reach a site; one that does not would
/// be a call the probes miss, so then there is none at all.
fn find_result_sites(code: &[u8], address: u64, syscall: u32) -> Result<Vec<u64>, Reason> {
    let mut info = InstructionInfoFactory::new();
    let mut sites = Vec::new();
    let mut seen = HashSet::new();
    let mut work = vec![(address, State { eax: None, tested: false, after: After::Nothing })];
    while let Some((ip, state)) = work.pop() {
        if !seen.insert((ip, state)) {
            continue;
        }
        if seen.len() > STEPS_MAX {
            return Err(Reason::Undecodable);
        }
        let instruction = decode(code, address, ip).ok_or(Reason::Undecodable)?;
        let next = instruction.next_ip();
        if state.after == After::Compared && instruction.code().is_jcc_short_or_near() {
            if !is_emulated(&instruction) {
                return Err(Reason::NoJump);
            }
            sites.push(ip);
            continue;
        }
        if instruction.mnemonic() == Mnemonic::Syscall {
            match state.eax {
                Some(nr) if nr == syscall => {}
                _ => return Err(Reason::WrongNumber),
            }
            work.push((next, State { eax: None, tested: false, after: After::Syscall }));
            continue;
        }
        if state.after != After::Nothing {
            let compared = is_error_check(&instruction);
            let lost = instruction.flow_control() != FlowControl::Next
                || (!compared && overwrites(&mut info, &instruction, &SITE_REGISTERS));
            // Another instruction between comparison and jump may change the flags: none does in glibc.
            if lost || state.after == After::Compared {
                return Err(Reason::NoJump);
            }
            let after = if compared { After::Compared } else { After::Syscall };
            work.push((next, State { after, ..state }));
            continue;
        }
        let inside = |target: u64| (address..address + code.len() as u64).contains(&target);
        let eax = eax_after(&mut info, &instruction, state.eax);
        let plain = State { eax, tested: is_test_eax(&instruction), after: After::Nothing };
        match instruction.flow_control() {
            FlowControl::Next => work.push((next, plain)),
            // A call returns, with `%eax` unknown; one that does not only adds a path that makes no difference.
            FlowControl::Call | FlowControl::IndirectCall => {
                work.push((next, State { eax: None, ..plain }));
            }
            FlowControl::ConditionalBranch => {
                let zero = State { eax: Some(0), ..plain };
                let (taken, fallen) = match instruction.mnemonic() {
                    Mnemonic::Je if state.tested => (zero, plain),
                    Mnemonic::Jne if state.tested => (plain, zero),
                    _ => (plain, plain),
                };
                work.push((next, fallen));
                if inside(instruction.near_branch_target()) {
                    work.push((instruction.near_branch_target(), taken));
                }
            }
            FlowControl::UnconditionalBranch if inside(instruction.near_branch_target()) => {
                work.push((instruction.near_branch_target(), plain));
            }
            _ => {}
        }
    }
    sites.sort_unstable();
    sites.dedup();
    if sites.is_empty() { Err(Reason::NoSystemCall) } else { Ok(sites) }
}

/// Straight on from the entry, up to the first instruction that is emulated; nothing before it can branch or make a
/// system call, so every call passes it, and does so first.
fn find_entry_site(code: &[u8], address: u64) -> Result<u64, Reason> {
    let mut info = InstructionInfoFactory::new();
    let mut ip = address;
    loop {
        let instruction = decode(code, address, ip).ok_or(Reason::Overwritten)?;
        if is_emulated(&instruction) {
            return Ok(ip);
        }
        let extends_in_place = instruction.code() == Code::Movsxd_r64_rm32
            && instruction.op0_register() == Register::RDI
            && instruction.op1_kind() == OpKind::Register
            && instruction.op1_register() == Register::EDI;
        let lost = instruction.flow_control() != FlowControl::Next
            || (!extends_in_place && overwrites(&mut info, &instruction, &[Register::RDI]));
        if lost {
            return Err(Reason::Overwritten);
        }
        ip = instruction.next_ip();
    }
}

/// Whether the first instruction of a function is an emulated one.
pub fn begins_cheaply(elf: &ElfFile, function: &str) -> bool {
    let begins = |(code, address): (Vec<u8>, u64)| {
        decode(&code, address, address).is_some_and(|first| is_emulated(&first))
    };
    code_of(elf, function).is_ok_and(begins)
}

/// What a function calls first, before any branch, with its four arguments as they were.
fn find_handed_on(code: &[u8], address: u64) -> Option<u64> {
    const ARGUMENTS: [Register; 4] = [Register::RDI, Register::RSI, Register::RDX, Register::RCX];
    let mut info = InstructionInfoFactory::new();
    let mut ip = address;
    loop {
        let instruction = decode(code, address, ip)?;
        if instruction.code() == Code::Call_rel32_64 {
            return Some(instruction.near_branch_target());
        }
        if instruction.flow_control() != FlowControl::Next || overwrites(&mut info, &instruction, &ARGUMENTS)
        {
            return None;
        }
        ip = instruction.next_ip();
    }
}

/// Whether some instruction of a function calls this one.
fn calls(code: &[u8], address: u64, target: u64) -> bool {
    let mut decoder = Decoder::with_ip(64, code, address, DecoderOptions::NONE);
    decoder.iter().any(|i| i.code() == Code::Call_rel32_64 && i.near_branch_target() == target)
}

/// What a program at a result site reads.
const SITE_REGISTERS: [Register; 5] =
    [Register::RAX, Register::RDI, Register::RSI, Register::RDX, Register::R10];

fn decode(code: &[u8], address: u64, ip: u64) -> Option<Instruction> {
    let rest = code.get(usize::try_from(ip.checked_sub(address)?).ok()?..)?;
    let instruction = Decoder::with_ip(64, rest, ip, DecoderOptions::NONE).decode();
    (!instruction.is_invalid()).then_some(instruction)
}

/// Whether every kernel from 5.10 on emulates the instruction under a uprobe. Longer `nop`s are emulated only by
/// newer ones; `endbr64` by none.
fn is_emulated(instruction: &Instruction) -> bool {
    let code = instruction.code();
    match code {
        Code::Push_r64 => instruction.len() <= 2,
        Code::Nopd => instruction.len() == 1,
        Code::Jmp_rel8_64 => instruction.len() == 2,
        Code::Jmp_rel32_64 | Code::Call_rel32_64 => instruction.len() == 5,
        // With a prefix they are longer; the kernel refuses some of those.
        _ if code.is_jcc_short() => instruction.len() == 2,
        _ if code.is_jcc_near() => instruction.len() == 6,
        _ => false,
    }
}

/// `cmp $-4096,%rax` before `ja`, or `cmp $-4095,%rax` before `jae`.
fn is_error_check(instruction: &Instruction) -> bool {
    instruction.mnemonic() == Mnemonic::Cmp
        && instruction.op0_kind() == OpKind::Register
        && instruction.op0_register() == Register::RAX
        && instruction.op1_kind() == OpKind::Immediate32to64
        && matches!(instruction.immediate(1) as i64, -4096 | -4095)
}

fn is_test_eax(instruction: &Instruction) -> bool {
    instruction.mnemonic() == Mnemonic::Test
        && instruction.op0_kind() == OpKind::Register
        && instruction.op1_kind() == OpKind::Register
        && instruction.op0_register() == Register::EAX
        && instruction.op1_register() == Register::EAX
}

fn eax_after(info: &mut InstructionInfoFactory, instruction: &Instruction, eax: Option<u32>) -> Option<u32> {
    let to_eax = instruction.op_count() > 0
        && instruction.op0_kind() == OpKind::Register
        && instruction.op0_register() == Register::EAX;
    if to_eax && instruction.code() == Code::Mov_r32_imm32 {
        return Some(instruction.immediate32());
    }
    let clears = to_eax && instruction.mnemonic() == Mnemonic::Xor && instruction.op_count() == 2;
    if clears && instruction.op1_kind() == OpKind::Register && instruction.op1_register() == Register::EAX {
        return Some(0);
    }
    if overwrites(info, instruction, &[Register::RAX]) { None } else { eax }
}

fn overwrites(info: &mut InstructionInfoFactory, instruction: &Instruction, registers: &[Register]) -> bool {
    info.info(instruction).used_registers().iter().any(|used| {
        let writes = !matches!(
            used.access(),
            OpAccess::None | OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess
        );
        writes && registers.contains(&used.register().full_register())
    })
}

#[cfg(test)]
mod tests;
