//! Any stack under real unwind tables, this program's own: the walk ends, and no frame lies below its callee's.

#![no_main]

use std::fs::File;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use profiler_common::unwind::Space;
use profiler_ebpf::memory::{Block, Fault, Memory};
use profiler_ebpf::native::Walker;
use profiler_fuzz::host::Host;
use profiler_fuzz::process::elf::ElfFile;
use profiler_fuzz::unwind::{rows::rows, section::Section};

const STACK: u64 = 0x7fff_0000_0000;
/// As many frames as the kernel side walks, and some.
const FRAMES: usize = 600;

struct Stack<'a>(&'a [u8]);

impl Memory for Stack<'_> {
    fn fill<const N: usize>(&self, address: u64, size: u32, block: &mut Block<N>) -> Result<(), Fault> {
        let from = address.checked_sub(STACK).ok_or(Fault)? as usize;
        let read = self.0.get(from..from.saturating_add(size as usize)).ok_or(Fault)?;
        // SAFETY: `size` is at most N.
        unsafe { std::ptr::copy_nonoverlapping(read.as_ptr(), block.as_mut_ptr(), read.len()) };
        Ok(())
    }
}

fn host() -> &'static Host {
    static HOST: OnceLock<Host> = OnceLock::new();
    HOST.get_or_init(|| {
        let elf = ElfFile::parse(File::open("/proc/self/exe").expect("ourselves")).expect("an ELF file");
        let section = Section::of(&elf).expect("a section");
        Host::new(&rows(&section.bytes, section.address).expect("rows"))
    })
}

fuzz_target!(|bytes: &[u8]| {
    let Some((registers, stack)) = bytes.split_first_chunk::<32>() else { return };
    let word = |at: usize| u64::from_le_bytes(registers[at * 8..][..8].try_into().expect("eight bytes"));
    let host = host();
    let mut all = [word(3); 16];
    // Within the stack, mostly, and code of ours.
    (all[6], all[7]) = (STACK + word(1) % 0x1_0000, STACK + word(2) % 0x1_0000);
    let mut walker = Box::new(Walker::new());
    walker.begin(host.table.base + word(0) % 0x100_0000, all, Space { count: 1, ..Space::default() });
    let memory = Stack(stack);
    for _ in 0..FRAMES {
        let sp = walker.sp;
        if walker.step(&memory, host).is_err() {
            break;
        }
        // A signal's frame may lie on another stack.
        assert!(walker.sp > sp || walker.exact != 0);
    }
});
