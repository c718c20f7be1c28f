//! Interpreters that were built for a C library whose functions cannot be probed, made to run with this machine's.
//!
//! Their code is untouched. Older ones (before 2.34 libpthread has functions of its own for sockets) run as they are. What
//! newer ones ask of the newer library are a few functions that only have another name there (C23's `strtol` and its
//! kin): a small library provides these names, and the versions they are asked for by are made optional in a copy of the
//! program. Needed until requests can be seen without the C library's functions.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::interpreters::Interpreter;

/// The C libraries of GNU whose functions can be probed, in every program: 2.34 to this.
const PROBED: std::ops::RangeInclusive<u32> = 34..=40;

const NAMES: &str = r#"
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <wchar.h>
long number(const char *, char **, int) __asm__("__isoc23_strtol");
long number(const char *text, char **end, int base) { return strtol(text, end, base); }
unsigned long positive(const char *, char **, int) __asm__("__isoc23_strtoul");
unsigned long positive(const char *text, char **end, int base) { return strtoul(text, end, base); }
long wide(const wchar_t *, wchar_t **, int) __asm__("__isoc23_wcstol");
long wide(const wchar_t *text, wchar_t **end, int base) { return wcstol(text, end, base); }
int scan(const char *, const char *, ...) __asm__("__isoc23_sscanf");
int scan(const char *text, const char *format, ...) {
    va_list list;
    va_start(list, format);
    int found = vsscanf(text, format, list);
    va_end(list);
    return found;
}
"#;

/// A command that runs this interpreter with a C library that can be probed.
pub fn command(interpreter: &Interpreter) -> Result<Command, String> {
    const VERSION: &str = "import os; print(os.confstr('CS_GNU_LIBC_VERSION'))";
    let output = interpreter.command().args(["-c", VERSION]).output().map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let minor = said.strip_prefix("glibc 2.").and_then(|minor| minor.parse::<u32>().ok());
    let minor = minor.ok_or_else(|| format!("{} says of its C library: {said:?}", interpreter.name()))?;
    let Some(prefix) = interpreter.prefix.as_deref().filter(|_| !PROBED.contains(&minor)) else {
        return Ok(interpreter.command());
    };
    if minor < *PROBED.start() {
        let mut command = Command::new(&interpreter.program);
        command.env("PYTHONHOME", prefix);
        return Ok(command);
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("rehosted-{}", interpreter.version));
    let io = |error: std::io::Error| format!("{}: {error}", folder.display());
    fs::create_dir_all(&folder).map_err(io)?;
    let program = folder.join(format!("python{}", interpreter.version));
    let mut elf = fs::read(&interpreter.program).map_err(io)?;
    make_versions_optional(&mut elf).ok_or("its version needs are not understood")?;
    // A copy that runs cannot be written to.
    let _ = fs::remove_file(&program);
    fs::copy(&interpreter.program, &program).map_err(io)?;
    fs::write(&program, elf).map_err(io)?;
    let (source, names) = (folder.join("names.c"), folder.join("names.so"));
    fs::write(&source, NAMES).map_err(io)?;
    let built = Command::new("cc").args(["-shared", "-fPIC", "-O2", "-o"]).arg(&names).arg(&source).output();
    let built = built.map_err(|error| format!("no C compiler: {error}"))?;
    if !built.status.success() {
        return Err(String::from_utf8_lossy(&built.stderr).into_owned());
    }
    let mut command = Command::new(program);
    command.env("LD_PRELOAD", names).env("PYTHONHOME", prefix);
    Ok(command)
}

/// The first build of a version, and a command that runs it.
pub fn first_of(version: &'static str) -> Result<(Command, Interpreter), String> {
    let builds = super::interpreters::of_version(version)?;
    Ok((command(&builds[0])?, builds[0].clone()))
}

/// Marks every version that the file needs of a library as weak (System V ABI, `VER_FLG_WEAK`).
fn make_versions_optional(elf: &mut [u8]) -> Option<()> {
    const SHT_GNU_VERNEED: u64 = 0x6fff_fffe;
    const WEAK: u8 = 2;
    let number = |elf: &[u8], at: usize, size: usize| {
        let mut bytes = [0; 8];
        bytes[..size].copy_from_slice(elf.get(at..at + size)?);
        Some(u64::from_le_bytes(bytes) as usize)
    };
    let (sections, size, count) = (number(elf, 0x28, 8)?, number(elf, 0x3a, 2)?, number(elf, 0x3c, 2)?);
    let section = (0..count)
        .map(|n| sections + n * size)
        .find(|&at| number(elf, at + 4, 4) == Some(SHT_GNU_VERNEED as usize))?;
    let mut need = number(elf, section + 24, 8)?;
    loop {
        let mut version = need + number(elf, need + 8, 4)?;
        for _ in 0..number(elf, need + 2, 2)? {
            *elf.get_mut(version + 4)? |= WEAK;
            version += number(elf, version + 12, 4)?;
        }
        match number(elf, need + 12, 4)? {
            0 => return Some(()),
            next => need += next,
        }
    }
}

/// A command that runs a copy of this interpreter whose debug offsets say that it was built without the GIL, as the
/// free-threaded builds' say: there is no package of one. Nothing else of the copy is changed.
pub fn claiming_no_gil(interpreter: &Interpreter) -> Result<Command, String> {
    const COOKIE: &[u8] = b"xdebugpy";
    let honest = command(interpreter)?;
    let program = Path::new(honest.get_program()).to_owned();
    let library = interpreter
        .prefix
        .as_ref()
        .map(|prefix| prefix.join(format!("lib/libpython{}.so.1.0", interpreter.version)));
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("no-gil-{}", interpreter.version));
    let io = |error: std::io::Error| format!("{}: {error}", folder.display());
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).map_err(io)?;
    for original in [Some(program.clone()), library].into_iter().flatten().filter(|path| path.exists()) {
        let mut elf = fs::read(&original).map_err(io)?;
        // The cookie, the version, and whether there is no GIL.
        let minor = interpreter.version.rsplit_once('.').and_then(|(_, minor)| minor.parse().ok());
        let is_it = |at: &usize| elf.get(at + 10..at + 12) == Some(&[minor.unwrap_or_default(), 3]);
        // There may be a second one, which the first is initialised from.
        let found: Vec<usize> = memchr::memmem::find_iter(&elf, COOKIE).filter(is_it).collect();
        if found.is_empty() {
            continue;
        }
        found.iter().for_each(|at| elf[at + 16] = 1);
        let copy = folder.join(original.file_name().unwrap_or_default());
        fs::copy(&original, &copy).map_err(io)?;
        fs::write(&copy, elf).map_err(io)?;
        let mut command = Command::new(if original == program { &copy } else { &program });
        command.envs(honest.get_envs().filter_map(|(name, value)| Some((name, value?))));
        if original != program {
            command.env("LD_PRELOAD", &copy);
        }
        return Ok(command);
    }
    Err(format!("{} has no debug offsets", interpreter.name()))
}
