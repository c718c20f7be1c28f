//! Oracles: the dynamic loader, `readelf`, a file made by hand; and files that lie.

use super::*;
use crate::process::maps::{Maps, open};
use std::io::Write;

fn libc_file() -> File {
    let maps = Maps::read(std::process::id()).unwrap();
    let mapping = maps.iter().find(|m| m.executable && m.file_name().starts_with("libc.so")).unwrap();
    open(std::process::id(), mapping).unwrap()
}

/// Oracle: the dynamic loader.
fn dlsym(name: &std::ffi::CStr) -> u64 {
    // SAFETY: a NUL-terminated name, looked up among what is loaded.
    unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) as u64 }
}

#[test]
fn symbols_and_bias_agree_with_the_loader() {
    let elf = ElfFile::parse(libc_file()).unwrap();
    let found = elf.symbols(&["recv", "close", "no_such_function"]).unwrap();
    assert_eq!(found.len(), 2);
    let maps = Maps::read(std::process::id()).unwrap();
    for (name, c) in [("recv", c"recv"), ("close", c"close")] {
        let address = dlsym(c);
        let mapping = maps.lookup(address).unwrap();
        let bias = elf.bias(mapping).unwrap();
        assert_eq!(found[name].value + bias, address);
        let offset = elf.offset_of(found[name].value).unwrap();
        assert_eq!(offset, address - mapping.start + mapping.offset);
        assert_eq!(elf.vaddr_of(offset), Some(found[name].value));
        let mut bytes = [0; 16];
        elf.read_vaddr(found[name].value, &mut bytes).unwrap();
        // SAFETY: 16 bytes of code of a function that is longer.
        let mapped = unsafe { *(address as *const [u8; 16]) };
        // Where somebody profiles this host, a probe's breakpoint (`int3`) stands for the byte of the file.
        let same = |(file, mapped): (&u8, &u8)| file == mapped || *mapped == 0xcc;
        assert!(bytes.iter().zip(&mapped).all(same), "{name}: {bytes:x?}, {mapped:x?}");
    }
    assert!(elf.debug_fits(0));
}

/// Oracle: the sizes in the symbol table.
#[test]
fn unwind_ranges_are_the_extents_of_functions() {
    let elf = ElfFile::parse(libc_file()).unwrap();
    let names = ["qsort", "getenv", "fopen", "pthread_create"];
    for (name, symbol) in elf.symbols(&names).unwrap() {
        let range = symbol.value..symbol.value + symbol.size;
        assert_eq!(elf.unwind_range(symbol.value), Some(range.clone()), "{name}");
        assert_eq!(elf.unwind_range(symbol.value + symbol.size - 1), Some(range), "{name}");
    }
    assert_eq!(elf.unwind_range(0), None);
    assert_eq!(elf.unwind_range(u64::MAX), None);
}

fn parse_bytes(bytes: &[u8]) -> Result<ElfFile, ElfError> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    ElfFile::parse(file)
}

#[test]
fn damaged_files_are_errors_or_empty() {
    let mut whole = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(libc_file(), 1 << 16), &mut whole).unwrap();
    assert!(parse_bytes(b"").is_err());
    assert!(parse_bytes(b"#!/bin/sh\n").is_err());
    for len in [1, 16, 63, 64, 100, 300, 1000, 5000] {
        if let Ok(elf) = parse_bytes(&whole[..len]) {
            // Section headers lie at the end of a file.
            assert!(elf.symbols(&["recv"]).is_err());
        }
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(200))]
    /// A small file of the real layout with a few bytes changed, headers by preference.
    #[test]
    fn changed_bytes_never_panic(changes in proptest::collection::vec((0usize..4096, 0u8..=255), 1..20)) {
        let mut bytes = small_elf();
        for (at, byte) in changes {
            let at = at % bytes.len();
            bytes[at] = byte;
        }
        if let Ok(elf) = parse_bytes(&bytes) {
            let _ = elf.symbols(&["f"]);
            let _ = elf.debug_fits(0);
            let _ = elf.read_vaddr(0x1000, &mut [0; 4]);
            let _ = elf.vaddr_of(u64::MAX);
            let _ = elf.unwind_range(0x1010);
        }
    }
}

/// One loadable segment, a note, a dynamic section and a symbol table with the symbol `f`.
fn small_elf() -> Vec<u8> {
    let mut b = vec![0u8; 1024];
    let mut put = |at: usize, bytes: &[u8]| b[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &[3, 0, 62, 0, 1]);
    put(32, &64u64.to_le_bytes()); // e_phoff
    put(40, &512u64.to_le_bytes()); // e_shoff
    put(52, &[64, 0, 56, 0, 3, 0, 64, 0, 3, 0, 2, 0]);
    for (n, kind, offset, size) in [(0, 1u32, 0u64, 1024u64), (1, 4, 256, 20), (2, 2, 288, 48)] {
        let at = 64 + n * 56;
        put(at, &kind.to_le_bytes());
        put(at + 4, &5u32.to_le_bytes());
        put(at + 8, &offset.to_le_bytes());
        put(at + 16, &(0x1000 + offset).to_le_bytes());
        put(at + 32, &size.to_le_bytes());
        put(at + 40, &size.to_le_bytes());
        put(at + 48, &4u64.to_le_bytes());
    }
    put(256, &[4, 0, 0, 0, 4, 0, 0, 0, 3, 0, 0, 0, b'G', b'N', b'U', 0, 1, 2, 3, 4]);
    for (n, tag, value) in [(0, 5u64, 0x1000 + 400u64), (1, 14, 3), (2, 0, 0)] {
        put(288 + n * 16, &tag.to_le_bytes());
        put(296 + n * 16, &value.to_le_bytes());
    }
    put(400, b"\0f\0lib.so\0");
    put(448, &1u32.to_le_bytes()); // st_name; the null symbol is at 424
    put(454, &[1]); // st_shndx
    put(456, &0x1234u64.to_le_bytes());
    put(464, &8u64.to_le_bytes());
    for (n, kind, offset, size, link, entry) in
        [(1, 11u32, 424u64, 48u64, 2u32, 24u64), (2, 3, 400, 10, 0, 0)]
    {
        let at = 512 + n * 64;
        put(at + 4, &kind.to_le_bytes());
        put(at + 24, &offset.to_le_bytes());
        put(at + 32, &size.to_le_bytes());
        put(at + 40, &link.to_le_bytes());
        put(at + 56, &entry.to_le_bytes());
    }
    b
}

#[test]
fn a_small_file_by_hand() {
    let elf = parse_bytes(&small_elf()).unwrap();
    assert_eq!(elf.symbols(&["f"]).unwrap()["f"], Symbol { value: 0x1234, size: 8 });
    assert_eq!((elf.offset_of(0x1010), elf.vaddr_of(0x10)), (Some(0x10), Some(0x1010)));
    assert_eq!((elf.offset_of(0xfff), elf.offset_of(0x1400)), (None, None));
}

#[test]
fn forged_sizes_allocate_nothing() {
    // 10 GB, all of it a hole, that claims to be one symbol table with one string table.
    let size = 10_000_000_000u64;
    let mut header = vec![0u8; 64 + 3 * 64];
    header[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    header[16..18].copy_from_slice(&3u16.to_le_bytes()); // ET_DYN
    header[18..20].copy_from_slice(&62u16.to_le_bytes()); // EM_X86_64
    header[20..24].copy_from_slice(&1u32.to_le_bytes());
    header[40..48].copy_from_slice(&64u64.to_le_bytes()); // e_shoff
    header[52..54].copy_from_slice(&64u16.to_le_bytes());
    header[58..60].copy_from_slice(&64u16.to_le_bytes()); // e_shentsize
    header[60..62].copy_from_slice(&3u16.to_le_bytes()); // e_shnum
    header[62] = 2; // e_shstrndx
    for (n, kind) in [(1, 11u32), (2, 3u32)] {
        let section = &mut header[64 + n * 64..][..64];
        section[4..8].copy_from_slice(&kind.to_le_bytes());
        section[24..32].copy_from_slice(&256u64.to_le_bytes());
        section[32..40].copy_from_slice(&(240 * 40_000_000u64).to_le_bytes());
        section[40..44].copy_from_slice(&2u32.to_le_bytes());
        section[56..64].copy_from_slice(&24u64.to_le_bytes());
    }
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&header).unwrap();
    file.set_len(size).unwrap();
    let elf = ElfFile::parse(file).unwrap();
    assert!(matches!(elf.symbols(&["recv"]), Err(ElfError::TooLarge)));
}

#[test]
fn a_file_truncated_after_parsing_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.so");
    std::fs::copy(std::env::current_exe().unwrap(), &path).unwrap();
    let elf = ElfFile::parse(File::open(&path).unwrap()).unwrap();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(4096).unwrap();
    assert!(elf.symbols(&["main"]).is_err());
    let code = elf.loads().iter().find(|l| l.executable).unwrap();
    assert!(matches!(elf.read_vaddr(code.vaddr, &mut [0; 8]), Err(ElfError::Io(_))));
}
