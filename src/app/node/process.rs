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

#[cfg(test)]
mod tests {
    use super::collector;
    use crate::app::admin::MetricsPage;

    #[test]
    fn process_has_memory_and_cpu_time_under_the_usual_names() {
        // Enough for one tick of the clock that the kernel counts in.
        let spent = std::time::Instant::now();
        while spent.elapsed().as_millis() < 50 {}
        let mut page = MetricsPage::new("delivery");
        collector()(&mut page);
        let text = page.render();
        let value = |name: &str| -> f64 {
            let line = text.lines().find(|line| line.starts_with(name)).expect(name);
            line.rsplit(' ').next().expect("a value").parse().expect("a number")
        };
        assert!(value("process_resident_memory_bytes") > 1e6, "{text}");
        assert!(value("process_cpu_seconds_total") > 0.0, "{text}");
    }
}
