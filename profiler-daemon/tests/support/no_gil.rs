//! An interpreter whose debug offsets say that it was built without the GIL, as the free-threaded builds' say: there is no
//! package of one.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::interpreters::Interpreter;

/// A command that runs a copy of this interpreter that says so. Nothing else of the copy is changed.
pub fn claiming(interpreter: &Interpreter) -> Result<Command, String> {
    const COOKIE: &[u8] = b"xdebugpy";
    let library = interpreter
        .prefix
        .as_ref()
        .map(|prefix| prefix.join(format!("lib/libpython{}.so.1.0", interpreter.version)));
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("no-gil-{}", interpreter.version));
    let io = |error: std::io::Error| format!("{}: {error}", folder.display());
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).map_err(io)?;
    let program = &interpreter.program;
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
        if original == *program {
            return Ok(interpreter.running(copy).command());
        }
        let mut command = interpreter.command();
        command.env("LD_PRELOAD", &copy);
        return Ok(command);
    }
    Err(format!("{} has no debug offsets", interpreter.name()))
}
