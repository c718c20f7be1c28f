//! Oracles: `readelf`, which reads the same notes by its own means, and the assembler, which takes every operand that we
//! take and says that it means the same.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::*;

/// Programs and libraries of the host that have probes.
fn files() -> Vec<PathBuf> {
    ["/usr/bin/python3.11", "/usr/lib/x86_64-linux-gnu/libstdc++.so.6", "/usr/sbin/php-fpm8.2"]
        .iter()
        .map(PathBuf::from)
        .filter(|path| path.exists())
        .collect()
}

fn of(path: &Path) -> Vec<Probe> {
    probes(&ElfFile::parse(File::open(path).expect("a file")).expect("ELF")).expect("notes")
}

/// As in the note, with the names that registers have when they are meant whole.
fn whole(word: &str) -> String {
    let (size, operand) = word.split_once('@').expect("a size");
    let narrow = [("%eax", "%rax"), ("%ebp", "%rbp"), ("%edx", "%rdx"), ("%ecx", "%rcx"), ("%ebx", "%rbx")];
    let more = [("%esi", "%rsi"), ("%edi", "%rdi"), ("%r8d", "%r8"), ("%r12d", "%r12"), ("%r13d", "%r13")];
    let mut operand = operand.to_owned();
    for (narrow, wide) in narrow.iter().chain(&more) {
        operand = operand.replace(narrow, wide);
    }
    let bare = operand.starts_with('(');
    format!("{size}@{}{operand}", if bare { "0" } else { "" })
}

#[test]
fn probes_are_those_that_readelf_shows() {
    let files = files();
    assert!(!files.is_empty(), "no file with probes: neither Python nor the C++ library");
    for path in files {
        let output = Command::new("readelf").arg("--notes").arg(&path).output().expect("readelf");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut lines = text.lines().map(str::trim);
        let mut found = of(&path).into_iter();
        let mut count = 0;
        while let Some(line) = lines.next() {
            let Some(provider) = line.strip_prefix("Provider: ") else { continue };
            let mut field =
                |name: &str| lines.next().and_then(|line| line.strip_prefix(name)).unwrap_or_default();
            let name = field("Name: ");
            let places = field("Location: ");
            let arguments = field("Arguments:").trim();
            let mut numbers = places.split(", ").map(|part| {
                let digits = part.rsplit("0x").next().unwrap_or_default();
                u64::from_str_radix(digits, 16).expect("a number")
            });
            let (address, _base, semaphore) = (numbers.next(), numbers.next(), numbers.next());
            let probe = found.next().expect("as many probes as readelf shows");
            assert_eq!((probe.provider.as_str(), probe.name.as_str()), (provider, name));
            // Nobody moved these files after they were linked.
            assert_eq!((Some(probe.address), probe.semaphore), (address, semaphore.filter(|at| *at != 0)));
            let ours: Vec<String> =
                probe.arguments.iter().map(|word| word.as_ref().expect("understood").to_string()).collect();
            let theirs: Vec<String> = arguments.split_whitespace().map(whole).collect();
            assert_eq!(ours, theirs, "{provider}:{name}");
            count += 1;
        }
        println!("{}: {count} probes", path.display());
        assert!(count >= 3 && found.next().is_none());
    }
}

/// The instructions that read what lies there: a move from the operand, as it was written and as it was understood.
#[test]
fn operands_mean_to_the_assembler_what_they_mean_here() {
    let operands = [
        "%rax",
        "%r8",
        "%r15",
        "%rsp",
        "$0",
        "$-1",
        "$4096",
        "$0x7f",
        "(%rdi)",
        "8(%rbp)",
        "-80(%rbx)",
        "0x10(%r12)",
        "(%rax,%rcx)",
        "(%rax,%rcx,8)",
        "-24(%r13,%r14,4)",
        "16(,%rdx,2)",
        "4096",
    ];
    let assemble = |words: &[String]| {
        let dir = tempfile::tempdir().expect("a folder");
        let (source, object) = (dir.path().join("a.s"), dir.path().join("a.o"));
        let text: String = words.iter().map(|word| format!("mov {word}, %r11\n")).collect();
        std::fs::write(&source, text).expect("room");
        let done = Command::new("as").arg(&source).arg("-o").arg(&object).status().expect("as");
        assert!(done.success());
        let dump = Command::new("objdump").arg("-d").arg(&object).output().expect("objdump").stdout;
        String::from_utf8_lossy(&dump).lines().skip(5).collect::<Vec<_>>().join("\n")
    };
    let written: Vec<String> = operands.iter().map(|word| (*word).to_owned()).collect();
    let understood: Vec<String> = operands
        .iter()
        .map(|word| {
            let argument: Argument = format!("8@{word}").parse().expect("understood");
            argument.to_string().trim_start_matches("8@").to_owned()
        })
        .collect();
    assert_eq!(assemble(&written), assemble(&understood));
}

#[test]
fn every_name_of_a_register_is_known() {
    let place = |word: &str| word.parse::<Argument>().ok().map(|argument| argument.place);
    let names = [
        ["rax", "eax", "ax", "al"],
        ["rdx", "edx", "dx", "dl"],
        ["rcx", "ecx", "cx", "cl"],
        ["rbx", "ebx", "bx", "bl"],
        ["rsi", "esi", "si", "sil"],
        ["rdi", "edi", "di", "dil"],
        ["rbp", "ebp", "bp", "bpl"],
        ["rsp", "esp", "sp", "spl"],
        ["r8", "r8d", "r8w", "r8b"],
        ["r9", "r9d", "r9w", "r9b"],
        ["r10", "r10d", "r10w", "r10b"],
        ["r15", "r15d", "r15w", "r15b"],
    ];
    let numbers = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15];
    for (names, number) in names.iter().zip(numbers) {
        for (name, size) in names.iter().zip([8, 4, 2, 1]) {
            assert_eq!(place(&format!("-{size}@%{name}")), Some(Place::Register(number)), "{name}");
        }
    }
}

#[test]
fn what_is_no_argument_says_so() {
    let words = [
        "",
        "@",
        "8@",
        "3@%rax",
        "8f@%xmm0",
        "8@%xmm0",
        "8@%ah",
        "8@%r16",
        "8@%r7",
        "8@%r8dd",
        "8@%rip",
        "8@symbol(%rip)",
        "8@4(%rip)",
        "8@(%eax)",
        "8@(%rax",
        "8@()",
        "8@(,)",
        "8@(%rax,%rbx,3)",
        "8@(%rax,%rbx,8,1)",
        "8@$",
        "8@$--1",
        "8@$+1",
        "8@$0x",
        "8@--4(%rax)",
        "8@$99999999999999999999",
        "%rax",
        "+8@%rax",
        "8@ %rax",
    ];
    for word in words {
        assert!(word.parse::<Argument>().is_err(), "{word:?}");
    }
    let long = format!("8@{}", "x".repeat(1000));
    assert_eq!(long.parse::<Argument>().expect_err("nothing").0.len(), SHOWN_MAX);
}

const SHOWN_MAX: usize = 64;

/// A note as `sys/sdt.h` writes it.
fn written(owner: &[u8], kind: u32, numbers: [u64; 3], words: &[u8]) -> Vec<u8> {
    let mut description: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    description.extend(words);
    let mut note: Vec<u8> =
        [owner.len() as u32, description.len() as u32, kind].iter().flat_map(|n| n.to_le_bytes()).collect();
    for part in [owner, &description] {
        note.extend(part);
        note.resize(note.len().next_multiple_of(4), 0);
    }
    note
}

#[test]
fn addresses_move_with_the_base_and_damage_ends_the_list() {
    let one = written(OWNER, TYPE, [0x1000, 0x5000, 0x7000], b"shop\0paid\08@%rdi -4@$7\0");
    let other = written(b"GNU\0", TYPE, [1, 2, 3], b"a\0b\0\0");
    let kind = written(OWNER, 4, [1, 2, 3], b"a\0b\0\0");
    let unnamed = written(OWNER, TYPE, [1, 2, 3], b"\0b\0\0");
    let bare = written(OWNER, TYPE, [0x2000, 0, 0], b"shop\0left\0\0");
    let notes = [one.as_slice(), &other, &kind, &unnamed, &bare].concat();
    let found = parse(&notes, Some(0x5100));
    let places: Vec<_> =
        found.iter().map(|p| (p.name.as_str(), p.address, p.semaphore, p.arguments.len())).collect();
    assert_eq!(places, [("paid", 0x1100, Some(0x7100), 2), ("left", 0x2000, None, 0)]);
    assert_eq!(parse(&notes, None)[0].address, 0x1000);
    // The last byte fills it up.
    for cut in 0..one.len() - 1 {
        assert_eq!(parse(&one[..cut], None), [], "{cut}");
    }
    // A size that leads out of the section, and one that leads around.
    for size in [0x7fff_ffffu32, u32::MAX] {
        for at in [0, 4] {
            let mut wild = notes.clone();
            wild[at..at + 4].copy_from_slice(&size.to_le_bytes());
            assert_eq!(parse(&wild, None), []);
        }
    }
    let many = one.repeat(PROBES_MAX + 7);
    assert_eq!(parse(&many, None).len(), PROBES_MAX);
    let greedy = written(OWNER, TYPE, [1, 0, 0], format!("a\0b\0{}\0", "8@%rax ".repeat(40)).as_bytes());
    assert_eq!(parse(&greedy, None)[0].arguments.len(), ARGUMENTS_MAX);
}
