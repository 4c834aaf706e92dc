//! Free ports for servers that tests start.

use std::net::{Ipv4Addr, TcpListener};
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU32, Ordering};

/// Lower ports are left to the services of the system.
const PORT_MIN: u16 = 10_000;
/// A smaller range is too small for the servers of one run.
const RANGE_PORTS_MIN: usize = 1_000;

/// A port that nobody listens on. Never returns the same port twice in one process, unless the range
/// is used up.
///
/// The port lies outside the range from which the kernel takes the ports of outgoing connections
/// (ip(7), `ip_local_port_range`): any connection of any test could take a port in that range before
/// the server listens. If that range leaves too little room, the kernel chooses the port.
pub fn free_port() -> u16 {
    static RETURNED: AtomicU32 = AtomicU32::new(0);
    let range = outside(&ephemeral());
    for _ in 0..range.len() {
        // Parallel test processes start at different offsets.
        let number = RETURNED.fetch_add(1, Ordering::Relaxed).wrapping_add(std::process::id() * 61);
        let offset = number as usize % range.len();
        let port = *range.start() + u16::try_from(offset).expect("within a range of ports");
        if TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok() {
            return port;
        }
    }
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    listener.local_addr().expect("bound").port()
}

/// The ports of outgoing connections.
fn ephemeral() -> RangeInclusive<u16> {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range");
    let text = text.expect("Linux has this file");
    let mut ends = text.split_whitespace().map(|end| end.parse().expect("a port"));
    let mut next = || ends.next().expect("two numbers");
    next()..=next()
}

/// The larger of the ranges below and above it; empty if both are too small.
#[expect(clippy::reversed_empty_ranges, reason = "an empty range is meant")]
fn outside(ephemeral: &RangeInclusive<u16>) -> RangeInclusive<u16> {
    let below = PORT_MIN..=ephemeral.start().saturating_sub(1);
    let above = ephemeral.end().saturating_add(1)..=u16::MAX - 1;
    let larger = if below.len() >= above.len() { below } else { above };
    if larger.len() >= RANGE_PORTS_MIN { larger } else { 1..=0 }
}
