//! What the system knows of this process, under the names that Prometheus clients use.

use crate::app::admin::{FamilyKind, Samples};

/// A page of `/proc/self/statm` (ARM kernels may be built with larger ones), and the tick of
/// `/proc/self/stat`, which the kernel keeps at this for everybody (`USER_HZ`).
const PAGE_BYTES: f64 = 4096.0;
const TICKS_PER_S: f64 = 100.0;

/// See the module.
pub(super) fn samples() -> Samples {
    Box::new(|page| {
        if let Some(bytes) = resident_bytes() {
            let (name, help) = ("process_resident_memory_bytes", "Resident memory.");
            page.sample(FamilyKind::Gauge, name, help, &[], bytes);
        }
        if let Some(seconds) = cpu_seconds() {
            let (name, help) = ("process_cpu_seconds_total", "CPU time, user and system.");
            page.sample(FamilyKind::Counter, name, help, &[], seconds);
        }
    })
}

fn resident_bytes() -> Option<f64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: f64 = statm.split(' ').nth(1)?.parse().ok()?;
    Some(pages * PAGE_BYTES)
}

fn cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name in parentheses may hold anything; what follows it is numbers.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let user: f64 = fields.nth(11)?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some((user + system) / TICKS_PER_S)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_memory_and_spends_time() {
        assert!(resident_bytes().unwrap() > 1e6);
        let before = cpu_seconds().unwrap();
        let mut spent = 0_u64;
        while cpu_seconds().unwrap() <= before {
            spent = std::hint::black_box(spent.wrapping_add(1));
        }
    }
}
