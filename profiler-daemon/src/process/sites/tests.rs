//! Code shapes of glibc, assembled by hand, and this machine's own libc.

use super::*;
use crate::process::maps::{Maps, open};

const AT: u64 = 0x1000;

/// Joins pieces of code; offsets in the tests count from the first byte.
fn code(pieces: &[&[u8]]) -> Vec<u8> {
    pieces.concat()
}

const SYSCALL: &[u8] = &[0x0f, 0x05];
const CMP_4096: &[u8] = &[0x48, 0x3d, 0x00, 0xf0, 0xff, 0xff]; // cmp $-4096,%rax
const CMP_4095: &[u8] = &[0x48, 0x3d, 0x01, 0xf0, 0xff, 0xff]; // cmp $-4095,%rax
const RET: &[u8] = &[0xc3];
const XOR_EAX: &[u8] = &[0x31, 0xc0];

/// mov $nr,%eax
fn mov_eax(nr: u8) -> Vec<u8> {
    vec![0xb8, nr, 0, 0, 0]
}

/// glibc 2.32 to 2.40: a flag in memory chooses between a plain and a cancellable path.
fn flagged(nr: u8) -> Vec<u8> {
    code(&[
        &[0x80, 0x3d, 0, 0, 0, 0, 0x00], // 0: cmpb $0,0(%rip)
        &[0x74, 0x11],                   // 7: je 26
        &mov_eax(nr),                    // 9
        SYSCALL,                         // 14
        CMP_4096,                        // 16
        &[0x77, 0x20],                   // 22: ja
        RET,                             // 24
        &[0x90],                         // 25
        &[0x48, 0x83, 0xec, 0x28],       // 26: sub $0x28,%rsp
        &[0xe8, 0, 0, 0, 0],             // 30: call
        &mov_eax(nr),                    // 35
        SYSCALL,                         // 40
        CMP_4096,                        // 42
        &[0x77, 0x05],                   // 48: ja
        &[0x44, 0x89, 0xc7],             // 50: mov %r8d,%edi
        RET,
    ])
}

#[test]
fn both_paths_are_found() {
    assert_eq!(find_result_sites(&flagged(45), AT, 45), Ok(vec![AT + 22, AT + 48]));
}

#[test]
fn another_system_call_is_refused() {
    assert_eq!(find_result_sites(&flagged(45), AT, 44), Err(Reason::WrongNumber));
}

#[test]
fn a_zero_from_a_test_is_a_number() {
    // glibc 2.31's `read`: `test` leaves the 0 that is its system call number.
    let read = code(&[
        &[0x64, 0x8b, 0x04, 0x25, 0x18, 0, 0, 0], // 0: mov %fs:0x18,%eax
        &[0x85, 0xc0],                            // 8: test %eax,%eax
        &[0x75, 0x0b],                            // 10: jne 23
        SYSCALL,                                  // 12
        CMP_4096,                                 // 14
        &[0x77, 0x0b],                            // 20: ja
        RET,                                      // 22
        XOR_EAX,                                  // 23
        SYSCALL,                                  // 25
        CMP_4096,                                 // 27
        &[0x0f, 0x87, 0, 0, 0, 0],                // 33: ja near
        RET,
    ]);
    assert_eq!(find_result_sites(&read, AT, 0), Ok(vec![AT + 20, AT + 33]));
    let mut inverted = read;
    inverted[10] = 0x74;
    assert_eq!(find_result_sites(&inverted, AT, 0), Err(Reason::WrongNumber));
}

/// What sends is followed from in front of its system call too.
#[test]
fn the_question_for_threads_is_a_site_in_front_of_every_system_call() {
    let entry = find_entry_site(&flagged(44), AT).unwrap();
    assert_eq!(entry, AT + 7);
    assert!(find_result_sites(&flagged(44), AT, 44).unwrap().iter().all(|site| *site > entry));
    // glibc 2.31's `sendto` moves an argument in between, and asks the thread's own memory.
    let sendto = code(&[
        &[0x41, 0x89, 0xca],                      // 0: mov %ecx,%r10d
        &[0x64, 0x8b, 0x04, 0x25, 0x18, 0, 0, 0], // 3: mov %fs:0x18,%eax
        &[0x85, 0xc0],                            // 11: test %eax,%eax
        &[0x75, 0x0b],                            // 13: jne 26
        &mov_eax(44),                             // 15
        SYSCALL,
    ]);
    assert_eq!(find_entry_site(&sendto, AT), Ok(AT + 13));
}

#[test]
fn the_plain_wrapper_of_a_macro_has_one_site() {
    // `sendfile`: the fourth argument moves to %r10 before the call.
    let sendfile = code(&[
        &[0x49, 0x89, 0xca], // 0: mov %rcx,%r10
        &mov_eax(40),        // 3
        SYSCALL,             // 8
        CMP_4095,            // 10
        &[0x73, 0x01],       // 16: jae
        RET,
        RET,
    ]);
    assert_eq!(find_result_sites(&sendfile, AT, 40), Ok(vec![AT + 16]));
    // The jump behind the system call is not one in front of it.
    assert_eq!(find_entry_site(&sendfile, AT), Err(Reason::Overwritten));
}

#[test]
fn an_overwritten_argument_or_result_is_refused() {
    for between in [
        &[0x89, 0xd7][..],         // mov %edx,%edi
        &[0x31, 0xf6],             // xor %esi,%esi
        &[0x48, 0x8b, 0x14, 0x24], // mov (%rsp),%rdx
        &[0x4d, 0x31, 0xd2],       // xor %r10,%r10
        &[0x48, 0xff, 0xc0],       // inc %rax
        &[0x5f],                   // pop %rdi
        &[0xe8, 0, 0, 0, 0],       // call
    ] {
        let function = code(&[&mov_eax(1), SYSCALL, between, CMP_4096, &[0x77, 0], RET]);
        assert_eq!(find_result_sites(&function, AT, 1), Err(Reason::NoJump), "{between:x?}");
    }
    // Saving the result elsewhere is harmless.
    let function = code(&[&mov_eax(1), SYSCALL, &[0x48, 0x89, 0xc3], CMP_4096, &[0x77, 0], RET]);
    assert_eq!(find_result_sites(&function, AT, 1), Ok(vec![AT + 16]));
}

#[test]
fn one_path_without_a_jump_spoils_all() {
    let mut function = flagged(45);
    function[48..50].copy_from_slice(&[0x66, 0x90]); // the second jump becomes a two-byte nop
    assert_eq!(find_result_sites(&function, AT, 45), Err(Reason::NoJump));
    function.truncate(50);
    assert!(find_result_sites(&function, AT, 45).is_err());
}

#[test]
fn a_wrapper_of_a_shared_function_has_no_result_site_but_an_entry() {
    // glibc 2.41: the number is pushed, `__syscall_cancel` makes the call.
    let close = code(&[
        &[0x48, 0x83, 0xec, 0x10], // 0: sub $0x10,%rsp
        &[0x48, 0x63, 0xff],       // 4: movslq %edi,%rdi
        &[0x6a, 0x03],             // 7: push $3 (not emulated)
        &[0x31, 0xf6],             // 9: xor %esi,%esi
        &[0xe8, 0, 0, 0, 0],       // 11: call
        &[0x48, 0x83, 0xc4, 0x18],
        RET,
    ]);
    assert_eq!(find_result_sites(&close, AT, 3), Err(Reason::NoSystemCall));
    assert_eq!(find_entry_site(&close, AT), Ok(AT + 11));
}

#[test]
fn the_entry_site_keeps_the_descriptor() {
    assert_eq!(find_entry_site(&flagged(3), AT), Ok(AT + 7));
    // endbr64; push %r12
    assert_eq!(find_entry_site(&[0xf3, 0x0f, 0x1e, 0xfa, 0x41, 0x54], AT), Ok(AT + 4));
    for spoiled in [
        &[0x89, 0xf7, 0x55][..],   // mov %esi,%edi; push
        &[0x48, 0x63, 0xfe, 0x55], // movslq %esi,%rdi; push
        &[0xc3, 0x55],             // ret; push
        &[0xff, 0xe0, 0x55],       // jmp *%rax; push
        &[0x0f, 0x1f, 0x00],       // a long nop, then the end
        &[],
    ] {
        assert_eq!(find_entry_site(spoiled, AT), Err(Reason::Overwritten), "{spoiled:x?}");
    }
}

proptest::proptest! {
    #[test]
    fn any_bytes_are_searched(code in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
        let inside = |site: u64| (AT..AT + code.len() as u64).contains(&site);
        assert!(find_result_sites(&code, AT, 0).into_iter().flatten().all(inside));
        assert!(find_entry_site(&code, AT).map_or(true, inside));
    }
}

/// The loader of the machine that runs the tests has mapped one.
fn own_libc() -> ElfFile {
    let maps = Maps::read(std::process::id()).unwrap();
    let mapping = maps.iter().find(|m| m.executable && m.file_name().starts_with("libc")).unwrap();
    ElfFile::parse(open(std::process::id(), mapping).unwrap()).unwrap()
}

/// Prints what a libc offers, and checks each site's bytes by hand: a `ja` or `jae` right behind the comparison, and in
/// front of what sends a `je` or `jne`, or a `push` where a function saves registers first.
fn check(elf: &ElfFile) -> usize {
    use std::os::unix::fs::FileExt;
    let mut found = 0;
    for function in FUNCTIONS {
        let sites = match result_sites(elf, function) {
            Ok(sites) => sites,
            Err(error) => {
                eprintln!("{error}");
                continue;
            }
        };
        found += 1;
        eprintln!("{}: {sites:x?}", function.name);
        assert!((1..=2).contains(&sites.len()), "{}", function.name);
        if let Ok(entry) = entry_site(elf, function.name) {
            let mut bytes = [0; 2];
            elf.file().read_exact_at(&mut bytes, entry).unwrap();
            eprintln!("{} is entered at {entry:x}", function.name);
            assert!(matches!(bytes, [0x74 | 0x75 | 0x50..=0x57, _] | [0x41, 0x50..=0x57]), "{bytes:x?}");
            assert!(sites.iter().all(|site| *site > entry), "{}", function.name);
        }
        for site in sites {
            let mut bytes = [0; 8];
            elf.file().read_exact_at(&mut bytes, site - 6).unwrap();
            assert!(bytes.starts_with(CMP_4096) || bytes.starts_with(CMP_4095));
            assert!(matches!(bytes[6..], [0x73 | 0x77, _] | [0x0f, 0x83 | 0x87]));
        }
    }
    eprintln!("close: {:x?}", entry_site(elf, "close").unwrap());
    found
}

#[test]
fn this_machines_libc() {
    if cfg!(not(target_arch = "x86_64")) {
        crate::skip::skip("this_machines_libc", "not x86-64");
        return;
    }
    let elf = own_libc();
    let found = check(&elf);
    // SAFETY: returns a static string.
    let version = unsafe { std::ffi::CStr::from_ptr(libc::gnu_get_libc_version()) };
    let minor: u32 = version.to_str().unwrap().split('.').nth(1).unwrap().parse().unwrap();
    if minor <= 40 {
        assert_eq!(found, FUNCTIONS.len());
        for name in ["send", "sendto", "write", "writev", "sendmsg"] {
            assert!(entry_site(&elf, name).is_ok(), "{name}");
        }
    }
    let missing = Function { name: "no_such_function", syscall: 0 };
    let error = result_sites(&elf, missing).unwrap_err();
    assert!(matches!(error, SiteError::NoCheapSite { reason: Reason::Undefined, .. }));
}

#[test]
fn what_is_handed_on_with_all_arguments_is_found() {
    // sub $8,%rsp; call AT+0x100; …: OpenSSL 3.0's `SSL_read_ex`.
    let whole = [&[0x48, 0x83, 0xec, 0x08, 0xe8][..], &0xf7i32.to_le_bytes(), &[0xc3]].concat();
    assert_eq!(find_handed_on(&whole, AT), Some(AT + 0x100));
    assert!(calls(&whole, AT, AT + 0x100) && !calls(&whole, AT, AT + 0x101));
    // xor %ecx,%ecx; call …: the fourth argument is another.
    let other = [&[0x31, 0xc9, 0xe8][..], &0xf9i32.to_le_bytes()].concat();
    assert_eq!(find_handed_on(&other, AT), None);
    // test %edx,%edx; js …; call …: not always.
    let branch = [&[0x85, 0xd2, 0x78, 0x10, 0xe8][..], &0xf7i32.to_le_bytes()].concat();
    assert_eq!(find_handed_on(&branch, AT), None);
    assert_eq!(find_handed_on(&[0x48, 0x83], AT), None, "not even an instruction");
}
