//! Ports for servers that tests start.

use std::net::{Ipv4Addr, TcpListener};
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU32, Ordering};

/// Below this, systems keep ports for their own services.
const LOWEST: u16 = 10_000;
/// Enough for every server of one run.
const ENOUGH: usize = 1_000;

/// A port nobody listens on, given out once.
///
/// It lies outside the range from which the kernel takes the ports of outgoing connections (ip(7),
/// `ip_local_port_range`): one inside it may be taken by any connection of any test before the server
/// that it is meant for listens. Where that range leaves no room, the kernel chooses.
pub fn free_port() -> u16 {
    static GIVEN: AtomicU32 = AtomicU32::new(0);
    let range = outside(&ephemeral());
    for _ in 0..range.len() {
        // Test processes that run side by side begin at places of their own.
        let number = GIVEN.fetch_add(1, Ordering::Relaxed).wrapping_add(std::process::id() * 61);
        let offset = number as usize % range.len();
        let port = *range.start() + u16::try_from(offset).expect("within a range of ports");
        if TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok() {
            return port;
        }
    }
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    listener.local_addr().expect("bound").port()
}

/// Where outgoing connections take their ports from.
fn ephemeral() -> RangeInclusive<u16> {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range");
    let text = text.expect("Linux has this file");
    let mut ends = text.split_whitespace().map(|end| end.parse().expect("a port"));
    let mut next = || ends.next().expect("two numbers");
    next()..=next()
}

/// The larger room beside it; empty if neither side has enough.
#[expect(clippy::reversed_empty_ranges, reason = "an empty range is meant")]
fn outside(ephemeral: &RangeInclusive<u16>) -> RangeInclusive<u16> {
    let below = LOWEST..=ephemeral.start().saturating_sub(1);
    let above = ephemeral.end().saturating_add(1)..=u16::MAX - 1;
    let larger = if below.len() >= above.len() { below } else { above };
    if larger.len() >= ENOUGH { larger } else { 1..=0 }
}
