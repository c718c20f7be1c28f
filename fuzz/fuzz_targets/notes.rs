//! Any bytes as notes of probes: what is understood is what was written, and the rest is refused.

#![no_main]

use libfuzzer_sys::fuzz_target;
use profiler_fuzz::process::usdt::{Argument, parse};

fuzz_target!(|bytes: &[u8]| {
    for probe in parse(bytes, Some(0x1000)) {
        assert!(!probe.provider.is_empty() && !probe.name.is_empty());
        for argument in probe.arguments.into_iter().flatten() {
            let again: Argument = argument.to_string().parse().expect("what it was written as");
            assert_eq!(again, argument);
        }
    }
});
