//! Any bytes as an ELF file: whatever is asked of it is answered or refused.

#![no_main]

use libfuzzer_sys::fuzz_target;
use profiler_fuzz::host::check_rows;
use profiler_fuzz::process::anonymous;
use profiler_fuzz::process::elf::{ElfFile, bias};
use profiler_fuzz::process::maps::Mapping;
use profiler_fuzz::unwind::{rows::rows, section::Section};

fuzz_target!(|bytes: &[u8]| {
    let Ok(elf) = ElfFile::parse(anonymous::file(bytes).expect("room")) else { return };
    if let Ok(symbols) = elf.symbols(&["_PyRuntime", "_PyEval_EvalFrameDefault", "Py_Version", "main"]) {
        for symbol in symbols.values() {
            let _ = elf.unwind_range(symbol.value);
            let _ = elf.offset_of(symbol.value);
        }
    }
    for load in elf.loads() {
        let mapping = Mapping { start: 0x7f00_0000_0000, offset: load.offset, executable: load.executable };
        let _ = bias(elf.loads(), &mapping);
        let _ = elf.read_vaddr(load.vaddr, &mut [0; 16]);
        let _ = elf.vaddr_of(load.offset);
        let _ = elf.unwind_range(load.vaddr);
    }
    let _ = (elf.names_another(), elf.debug_fits(1 << 20));
    if let Ok(section) = Section::of(&elf)
        && let Ok(rows) = rows(&section.bytes, section.address)
    {
        check_rows(&rows);
    }
});
