//! An interpreter of another distribution that is started by itself and not by a loader that is named, so that it is its own
//! program to whoever asks what the process runs.

use std::path::Path;

use super::interpreters::Interpreter;

/// A copy of it names the loader (System V ABI, `PT_INTERP`), and where it finds its libraries is in its environment.
pub fn started_by_itself(interpreter: &Interpreter, folder: &Path) -> Result<Interpreter, String> {
    let [loader, _, search, _] = &interpreter.line[..] else { return Ok(interpreter.clone()) };
    let io = |error: std::io::Error| error.to_string();
    let mut elf = std::fs::read(&interpreter.program).map_err(io)?;
    let number = |at: usize, size: usize| {
        let mut bytes = [0; 8];
        bytes[..size].copy_from_slice(&elf[at..at + size]);
        u64::from_le_bytes(bytes) as usize
    };
    let (headers, size, count) = (number(0x20, 8), number(0x36, 2), number(0x38, 2));
    const PT_INTERP: usize = 3;
    let mut places = (0..count).map(|n| headers + n * size);
    let header = places.find(|at| number(*at, 4) == PT_INTERP).ok_or("it names no loader")?;
    let (place, path) = (elf.len() as u64, [loader.as_encoded_bytes(), b"\0"].concat());
    elf[header + 8..header + 16].copy_from_slice(&place.to_le_bytes());
    elf[header + 32..header + 40].copy_from_slice(&(path.len() as u64).to_le_bytes());
    elf.extend(path);
    let copy = folder.join(interpreter.program.file_name().unwrap_or_default());
    std::fs::copy(&interpreter.program, &copy).and_then(|_| std::fs::write(&copy, elf)).map_err(io)?;
    let home = interpreter.prefix.as_ref().map(|prefix| ("PYTHONHOME".into(), prefix.clone().into()));
    let variables = home.into_iter().chain([("LD_LIBRARY_PATH".into(), search.clone())]).collect();
    Ok(Interpreter { program: copy.clone(), line: vec![copy.into()], variables, ..interpreter.clone() })
}
