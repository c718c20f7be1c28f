//! Any bytes as a section `.eh_frame`, behind eight for where it lies.

#![no_main]

use libfuzzer_sys::fuzz_target;
use profiler_fuzz::host::check_rows;
use profiler_fuzz::unwind::rows::rows;

fuzz_target!(|bytes: &[u8]| {
    let Some((address, section)) = bytes.split_first_chunk::<8>() else { return };
    if let Ok(rows) = rows(section, u64::from_le_bytes(*address)) {
        check_rows(&rows);
    }
});
