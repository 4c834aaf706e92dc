//! Process metrics under the names that Prometheus client libraries use.

use procfs::process::Process;

use crate::app::admin::{Collector, number};
use crate::domain::counters::MetricKind;

/// Memory and CPU time of this process, from `/proc/self/stat`.
pub(super) fn collector() -> Collector {
    Box::new(|page| {
        let Ok(stat) = Process::myself().and_then(|process| process.stat()) else { return };
        let bytes = number(stat.rss * procfs::page_size());
        let seconds = number(stat.utime + stat.stime) / number(procfs::ticks_per_second());
        let name = "process_resident_memory_bytes";
        page.sample(MetricKind::Gauge, name, "Resident memory, bytes.", &[], bytes);
        let name = "process_cpu_seconds_total";
        page.sample(MetricKind::Counter, name, "CPU time, user and system, seconds.", &[], seconds);
    })
}
