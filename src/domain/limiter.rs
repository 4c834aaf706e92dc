//! Limits on connections and handshakes per second, in total and per address. Shared by all shards and the
//! gRPC port, consulted once per accept.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::Mutex;

use hashbrown::HashMap;
use slab::Slab;

/// The limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// Connections from one address.
    pub connections_per_address_max: u32,
    /// Handshakes per second from one address.
    pub handshakes_per_address_per_s_max: u32,
    /// Handshakes per second in total.
    pub handshakes_per_s_max: u32,
    /// Leading bits of an IPv6 address that count as one address, 1 to 128.
    pub ipv6_prefix_bits: u8,
}

impl Default for ConnectionLimits {
    /// Many users may share one address (offices, mobile carriers, a proxy), so the limits per
    /// address are generous.
    fn default() -> Self {
        Self {
            connections_per_address_max: 20_000,
            handshakes_per_address_per_s_max: 2_000,
            handshakes_per_s_max: 20_000,
            ipv6_prefix_bits: 64,
        }
    }
}

/// The limit that a handshake exceeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LimitExceeded {
    /// Too many handshakes this second.
    TotalRate,
    /// Too many handshakes this second from this address.
    AddressRate,
    /// Too many connections from this address.
    AddressConnections,
}

/// The right to one connection from an address. It is returned when the connection has ended.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "the address would count as connected for ever"]
pub struct AddressPermit(NonZeroU32);

impl AddressPermit {
    fn new(id: u32) -> Self {
        Self(NonZeroU32::MIN.saturating_add(id))
    }

    fn id(&self) -> u32 {
        self.0.get() - 1
    }
}

/// Counts connections and handshakes per address. It has one entry per address that is connected,
/// or was or tried to be within the last second, so the connections and the handshake rate bound its
/// memory.
#[derive(Debug)]
pub struct ConnectionLimiter {
    config: ConnectionLimits,
    state: Mutex<LimiterState>,
}

#[derive(Debug, Default)]
struct LimiterState {
    total: RateWindow,
    index: HashMap<u128, u32>,
    entries: Slab<AddressUse>,
    /// Entries that may have become unused, each with the time from which it may be removed.
    expiring: VecDeque<(u64, u32)>,
}

#[derive(Debug)]
struct AddressUse {
    address: u128,
    open: u32,
    rate: RateWindow,
    /// Whether the entry is in [`LimiterState::expiring`].
    expiring: bool,
}

/// A count within one second of the clock. Seconds only go forward.
#[derive(Clone, Copy, Debug, Default)]
struct RateWindow {
    second: u64,
    count: u32,
}

/// How long an entry is kept after its last connection, ms: its rate is counted per second.
const EXPIRY_MS: u64 = 1_000;
/// Unused entries removed per call: more than one, so that they are removed faster than they are
/// added.
const REMOVALS_PER_CALL: usize = 2;

impl RateWindow {
    fn take(&mut self, now_ms: u64, limit: u32) -> bool {
        let second = now_ms / 1000;
        // The clock of another shard may be ahead: then this handshake counts in the later second.
        if self.second < second {
            *self = Self { second, count: 0 };
        }
        let room = self.count < limit;
        self.count += u32::from(room);
        room
    }
}

impl ConnectionLimiter {
    /// A limiter without connections.
    pub fn new(config: ConnectionLimits) -> Self {
        Self { config, state: Mutex::default() }
    }

    /// Admits a client from this address. All shards pass `now_ms` of the same monotonic clock. Each has read it at the
    /// beginning of its turn, so they may differ.
    ///
    /// # Errors
    /// The limit that is exceeded.
    pub fn admit(&self, address: IpAddr, now_ms: u64) -> Result<AddressPermit, LimitExceeded> {
        let address = self.normalise(address);
        let mut state = self.lock();
        state.remove_expired(now_ms);
        let id = state.entry(address, now_ms);
        let entry = &mut state.entries[id as usize];
        if entry.open >= self.config.connections_per_address_max {
            return Err(LimitExceeded::AddressConnections);
        }
        state.take(id, now_ms, &self.config)?;
        state.entries[id as usize].open += 1;
        Ok(AddressPermit::new(id))
    }

    /// Counts a handshake on a connection that was admitted before, such as a further call of gRPC.
    ///
    /// # Errors
    /// The rate that is exceeded.
    pub fn count_handshake(&self, address: IpAddr, now_ms: u64) -> Result<(), LimitExceeded> {
        let mut state = self.lock();
        state.remove_expired(now_ms);
        let id = state.entry(self.normalise(address), now_ms);
        state.take(id, now_ms, &self.config)
    }

    /// Returns the permit of a connection that has ended.
    pub fn release(&self, permit: AddressPermit, now_ms: u64) {
        let mut state = self.lock();
        let entry = &mut state.entries[permit.id() as usize];
        entry.open = entry.open.checked_sub(1).expect("one permit per connection");
        if entry.open == 0 {
            state.mark_expiring(permit.id(), now_ms);
        }
        state.remove_expired(now_ms);
    }

    #[cfg(test)]
    /// Number of entries.
    pub fn addresses(&self) -> usize {
        self.lock().entries.len()
    }

    #[cfg(any(test, feature = "simulation"))]
    /// Number of admitted connections.
    pub fn connections(&self) -> u64 {
        self.lock().entries.iter().map(|(_, entry)| u64::from(entry.open)).sum()
    }

    /// An address as a number: IPv4 is mapped to IPv6, IPv6 is cut to the prefix that one customer has.
    fn normalise(&self, address: IpAddr) -> u128 {
        match address.to_canonical() {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
            IpAddr::V6(v6) => {
                let host_bits = 128 - u32::from(self.config.ipv6_prefix_bits);
                v6.to_bits() & u128::MAX.checked_shl(host_bits).unwrap_or(0)
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, LimiterState> {
        self.state.lock().expect("no holder panics")
    }
}

impl LimiterState {
    /// Counts a handshake in both rates.
    fn take(
        &mut self,
        id: u32,
        now_ms: u64,
        limits: &ConnectionLimits,
    ) -> Result<(), LimitExceeded> {
        let rate = &mut self.entries[id as usize].rate;
        if !rate.take(now_ms, limits.handshakes_per_address_per_s_max) {
            return Err(LimitExceeded::AddressRate);
        }
        if !self.total.take(now_ms, limits.handshakes_per_s_max) {
            return Err(LimitExceeded::TotalRate);
        }
        Ok(())
    }

    fn entry(&mut self, address: u128, now_ms: u64) -> u32 {
        if let Some(id) = self.index.get(&address) {
            return *id;
        }
        let entry = AddressUse { address, open: 0, rate: RateWindow::default(), expiring: false };
        let id = u32::try_from(self.entries.insert(entry)).expect("addresses fit 32 bits");
        self.index.insert(address, id);
        // If the client is not admitted, no permit will release this entry.
        self.mark_expiring(id, now_ms);
        id
    }

    fn mark_expiring(&mut self, id: u32, now_ms: u64) {
        let entry = &mut self.entries[id as usize];
        if !std::mem::replace(&mut entry.expiring, true) {
            self.expiring.push_back((now_ms + EXPIRY_MS, id));
        }
    }

    fn remove_expired(&mut self, now_ms: u64) {
        for _ in 0..REMOVALS_PER_CALL {
            match self.expiring.front() {
                Some((from, _)) if *from <= now_ms => {}
                _ => return,
            }
            let Some((_, id)) = self.expiring.pop_front() else { return };
            let entry = &mut self.entries[id as usize];
            entry.expiring = false;
            if entry.open > 0 {
                continue;
            }
            if entry.rate.second == now_ms / 1000 {
                self.mark_expiring(id, now_ms);
                continue;
            }
            let entry = self.entries.remove(id as usize);
            self.index.remove(&entry.address);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V4: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));

    fn limiter(connections: u32, per_address: u32, total: u32) -> ConnectionLimiter {
        ConnectionLimiter::new(ConnectionLimits {
            connections_per_address_max: connections,
            handshakes_per_address_per_s_max: per_address,
            handshakes_per_s_max: total,
            ..ConnectionLimits::default()
        })
    }

    /// The limit is that of all shards together.
    #[test]
    fn shards_whose_clocks_differ_share_one_window() {
        let limits =
            ConnectionLimits { handshakes_per_address_per_s_max: 2, ..ConnectionLimits::default() };
        for limits in
            [limits, ConnectionLimits { handshakes_per_s_max: 2, ..ConnectionLimits::default() }]
        {
            let limiter = ConnectionLimiter::new(limits);
            let admitted = (0..100).filter(|turn| {
                let now_ms = if turn % 2 == 0 { 5_000 } else { 4_999 };
                limiter.admit(IpAddr::from([127, 0, 0, 1]), now_ms).is_ok()
            });
            assert_eq!(admitted.count(), 2);
            assert!(limiter.admit(IpAddr::from([127, 0, 0, 1]), 6_000).is_ok());
        }
    }

    #[test]
    fn one_customer_is_a_prefix_of_ipv6_or_an_address_of_ipv4() {
        for (ipv6_prefix_bits, same, other) in [
            (64, "2001:db8:1:2:ffff::1", "2001:db8:1:3::1"),
            (48, "2001:db8:1:ffff::1", "2001:db8:2:2::1"),
            (128, "2001:db8:1:2::1", "2001:db8:1:2::2"),
        ] {
            let one = ConnectionLimits { connections_per_address_max: 1, ..Default::default() };
            let limiter = ConnectionLimiter::new(ConnectionLimits { ipv6_prefix_bits, ..one });
            let admit = |address: &str| limiter.admit(address.parse().unwrap(), 0);
            let _first = admit("2001:db8:1:2::1").unwrap();
            assert_eq!(admit(same), Err(LimitExceeded::AddressConnections), "{same}");
            let _other = admit(other).unwrap();
            let _v4 = admit("192.0.2.1").unwrap();
            assert_eq!(admit("::ffff:192.0.2.1"), Err(LimitExceeded::AddressConnections));
            let _other = admit("192.0.2.2").unwrap();
        }
    }

    #[test]
    fn each_limit_has_its_own_error() {
        let limiter = limiter(2, 3, 4);
        let first = limiter.admit(V4, 0).unwrap();
        let second = limiter.admit(V4, 0).unwrap();
        assert_eq!(limiter.admit(V4, 0), Err(LimitExceeded::AddressConnections));
        limiter.release(first, 0);
        let third = limiter.admit(V4, 999).unwrap();
        limiter.release(third, 999);
        assert_eq!(limiter.admit(V4, 999), Err(LimitExceeded::AddressRate));
        let _other = limiter.admit("192.0.2.2".parse().unwrap(), 999).unwrap();
        assert_eq!(limiter.admit("192.0.2.3".parse().unwrap(), 999), Err(LimitExceeded::TotalRate));
        let _next_second = limiter.admit(V4, 1_000).unwrap();
        assert_eq!(limiter.connections(), 3);
        limiter.release(second, 1_000);
    }

    #[test]
    fn handshakes_within_a_connection_count_in_the_same_rates() {
        let limiter = limiter(1, 2, 3);
        let permit = limiter.admit(V4, 0).unwrap();
        assert_eq!(limiter.count_handshake(V4, 0), Ok(()));
        assert_eq!(limiter.count_handshake(V4, 0), Err(LimitExceeded::AddressRate));
        let other = "192.0.2.2".parse().unwrap();
        assert_eq!(limiter.count_handshake(other, 0), Ok(()));
        assert_eq!(limiter.count_handshake(other, 0), Err(LimitExceeded::TotalRate));
        assert_eq!(limiter.connections(), 1);
        limiter.release(permit, 0);
    }

    #[test]
    fn entries_of_released_addresses_are_removed() {
        let limiter = limiter(9, 9, 1_000_000);
        for number in 0..10_000_u32 {
            let address = IpAddr::V4(number.into());
            let permit = limiter.admit(address, u64::from(number)).unwrap();
            limiter.release(permit, u64::from(number));
        }
        assert!(limiter.addresses() < 2_200, "{}", limiter.addresses());
    }
}
