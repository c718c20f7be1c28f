//! The standard `process_*` metrics. The crate's collector counts CPU time in whole seconds, in which a daemon that uses
//! little of it stands still for minutes; that one is replaced.

use prometheus::core::{Collector, Desc};
use prometheus::process_collector::ProcessCollector;
use prometheus::proto::{Counter, MetricFamily};

const CPU_SECONDS: &str = "process_cpu_seconds_total";

/// See the module.
pub(super) struct Process(ProcessCollector);

impl Process {
    pub(super) fn of_this_one() -> Self {
        Self(ProcessCollector::for_self())
    }
}

impl Collector for Process {
    fn desc(&self) -> Vec<&Desc> {
        self.0.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let mut families = self.0.collect();
        let cpu = families.iter_mut().filter(|family| family.name() == CPU_SECONDS);
        for metric in cpu.flat_map(|family| family.mut_metric().iter_mut()) {
            let mut counter = Counter::default();
            counter.set_value(cpu_seconds());
            metric.set_counter(counter);
        }
        families
    }
}

/// Seconds that this process has spent on CPUs, in user and kernel mode.
fn cpu_seconds() -> f64 {
    // SAFETY: all-zero bytes are a valid `rusage`.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a live `rusage`. It cannot fail with these arguments.
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exported() -> f64 {
        let families = Process::of_this_one().collect();
        let family = families.iter().find(|family| family.name() == CPU_SECONDS).unwrap();
        family.get_metric()[0].get_counter().get_value()
    }

    #[test]
    fn cpu_time_has_parts_of_seconds() {
        let before = exported();
        let mut sum = 0_u64;
        // Until some CPU time has passed, by the count of the thread itself.
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let mut own = || {
            // SAFETY: the pointer is to a live timespec.
            unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
            time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
        };
        let start = own();
        while own() - start < 0.02 {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        let after = exported();
        assert!(after > before, "{before} {after}");
        assert!(after.fract() != 0.0 || before.fract() != 0.0, "{before} {after}");
    }
}
