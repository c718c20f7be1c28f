//! Where a thread keeps its interpreter state: CPython's thread-specific key, and where glibc puts such data.
//!
//! In: the interpreter's memory and glibc's code. Out: the key, and how far the first block of slots is from the thread
//! pointer. That differs between glibc's versions, and no symbol tells it; the code of `pthread_getspecific` does.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};

use super::{PythonError, elf_error, open_elf};
use crate::process::maps::{Mapping, Maps};
use crate::process::memory::Memory;

/// glibc's `PTHREAD_KEYS_MAX`.
const KEYS_MAX: u32 = 1024;

/// `Py_tss_t`: an `int` that is 1 once the key exists, then the key.
pub(super) fn read_key(memory: &impl Memory, address: u64) -> Result<u32, PythonError> {
    let initialized = memory.read_u32(address)?;
    if initialized == 0 {
        return Err(PythonError::NotStarted);
    }
    let key = memory.read_u32(address.wrapping_add(4))?;
    if initialized == 1 && key < KEYS_MAX {
        Ok(key)
    } else {
        Err(PythonError::Layout("no key where it should be"))
    }
}

/// Finds glibc in the maps (before 2.34 the function is in libpthread) and reads the offset off its code.
pub(super) fn thread_data_block(pid: u32, maps: &Maps) -> Result<u32, PythonError> {
    let defines = |m: &&Mapping| m.is_glibc() || m.file_name().starts_with("libpthread");
    for mapping in maps.iter().filter(|m| m.executable && m.is_file()).filter(defines) {
        let elf = open_elf(pid, mapping)?;
        let name = "pthread_getspecific";
        let found = elf.symbols(&[name]).map_err(|source| elf_error(mapping, source))?;
        let Some(symbol) = found.get(name) else { continue };
        // The way to the first block is at its start.
        let mut code = vec![0; symbol.size.min(128) as usize];
        elf.read_vaddr(symbol.value, &mut code).map_err(|source| elf_error(mapping, source))?;
        return first_block(&code).map_err(PythonError::ThreadData);
    }
    Err(PythonError::ThreadData("no glibc"))
}

/// A register's value as far as it is understood: `tp` times the thread pointer, plus `key` times the function's
/// argument, plus a constant.
#[derive(Clone, Copy, Default)]
struct Linear {
    tp: bool,
    key: u64,
    constant: u64,
}

/// Reads the offset of `specific_1stblock` off the code of `pthread_getspecific`.
///
/// A slot is `{ uintptr_t seq; void *data }`, and the function's first load of `data` is from
/// `thread pointer + block + key * 16 + 8`: everything up to that load is evaluated symbolically.
pub(super) fn first_block(code: &[u8]) -> Result<u32, &'static str> {
    let mut registers: [Option<Linear>; 16] = [None; 16];
    let argument = Some(Linear { tp: false, key: 1, constant: 0 });
    registers[Register::RDI.number()] = argument;
    let mut decoder = Decoder::new(64, code, DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    while decoder.can_decode() {
        decoder.decode_out(&mut instruction);
        if instruction.is_invalid() {
            break;
        }
        // The jump that leaves for second-level keys is not taken.
        if instruction.flow_control() == FlowControl::ConditionalBranch
            || matches!(instruction.mnemonic(), Mnemonic::Cmp | Mnemonic::Endbr64 | Mnemonic::Nop)
        {
            continue;
        }
        if instruction.flow_control() != FlowControl::Next || instruction.op0_kind() != OpKind::Register {
            break;
        }
        let target = instruction.op0_register().full_register();
        if !target.is_gpr64() {
            break;
        }
        if let Some(address) = data_load(&instruction, &registers) {
            let block = address.constant.checked_sub(8).ok_or("negative offset")?;
            return u32::try_from(block).map_err(|_| "offset too large");
        }
        registers[target.number()] = evaluate(&instruction, &registers);
    }
    Err("no load from the first block")
}

/// The address of a load, if it is that of a slot's data.
fn data_load(instruction: &Instruction, registers: &[Option<Linear>; 16]) -> Option<Linear> {
    let loads = instruction.mnemonic() == Mnemonic::Mov && instruction.op1_kind() == OpKind::Memory;
    if !loads || instruction.segment_prefix() != Register::None {
        return None;
    }
    effective_address(instruction, registers).filter(|a| a.tp && a.key == 16)
}

fn evaluate(instruction: &Instruction, registers: &[Option<Linear>; 16]) -> Option<Linear> {
    let get = |register: Register| registers.get(register.full_register().number()).copied().flatten();
    let old = get(instruction.op0_register());
    // Offset 0x10 of the thread control block holds the thread pointer itself.
    let thread_pointer = instruction.op1_kind() == OpKind::Memory
        && instruction.memory_segment() == Register::FS
        && instruction.memory_base() == Register::None
        && instruction.memory_index() == Register::None
        && instruction.memory_displacement64() == 0x10;
    let operand = match instruction.op1_kind() {
        OpKind::Register if instruction.op1_register().is_gpr() => get(instruction.op1_register()),
        OpKind::Memory if thread_pointer => Some(Linear { tp: true, key: 0, constant: 0 }),
        OpKind::Memory => None,
        OpKind::Register => None,
        // Not every other kind is an immediate: string instructions have operands of their own.
        _ => instruction.try_immediate(1).ok().map(|constant| Linear { tp: false, key: 0, constant }),
    };
    match instruction.mnemonic() {
        Mnemonic::Mov => operand,
        Mnemonic::Lea => effective_address(instruction, registers),
        Mnemonic::Add => {
            let (a, b) = (old?, operand?);
            Some(Linear {
                tp: a.tp ^ b.tp,
                key: a.key.checked_add(b.key)?,
                constant: a.constant.wrapping_add(b.constant),
            })
            .filter(|_| !(a.tp && b.tp))
        }
        Mnemonic::Shl => {
            let (a, n) = (old?, u32::try_from(operand?.constant).ok()?);
            (!a.tp && n < 16).then(|| Linear { tp: false, key: a.key << n, constant: a.constant << n })
        }
        _ => None,
    }
}

fn effective_address(instruction: &Instruction, registers: &[Option<Linear>; 16]) -> Option<Linear> {
    let base = instruction.memory_base();
    if !base.is_gpr() || instruction.memory_index() != Register::None {
        return None;
    }
    let base = registers[base.full_register().number()]?;
    let constant = base.constant.wrapping_add(instruction.memory_displacement64());
    Some(Linear { constant, ..base })
}
