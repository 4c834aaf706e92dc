//! Calls that have ended while the socket of their connection took nothing. HTTP/2 keeps the end of each until it is
//! written, and the places of sessions do not count them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Such calls for each connection that the node may have: all together may have so many, and then no connection may
/// have more.
const PER_CONNECTION: usize = 10;
/// Memory of one of them in HTTP/2, bytes: the stream, and its trailers. Measured: 4,240.
const ENDED_CALL_BYTES: u64 = 4_608;
/// Memory of all of them for each connection that the node may have, bytes: the limit, and as much for connections that
/// have less.
pub(super) const UNSENT_BYTES_MAX: u64 = 2 * PER_CONNECTION as u64 * ENDED_CALL_BYTES;

/// Those of all connections.
#[derive(Debug)]
pub(super) struct UnsentEnds {
    count: AtomicUsize,
    max: usize,
}

impl UnsentEnds {
    pub(super) fn new(connections_max: usize) -> Arc<Self> {
        let max = connections_max.saturating_mul(PER_CONNECTION);
        Arc::new(Self { count: AtomicUsize::new(0), max })
    }
}

/// Those of one connection.
#[derive(Debug)]
pub(super) struct OwnUnsentEnds {
    all: Arc<UnsentEnds>,
    own: usize,
}

impl OwnUnsentEnds {
    pub(super) fn new(all: &Arc<UnsentEnds>) -> Self {
        Self { all: Arc::clone(all), own: 0 }
    }

    /// Counts one. Returns whether there is room for it.
    pub(super) fn add(&mut self) -> bool {
        self.own += 1;
        let all = self.all.count.fetch_add(1, Ordering::Relaxed) + 1;
        all <= self.all.max || self.own <= PER_CONNECTION
    }

    /// The socket has taken them.
    pub(super) fn sent(&mut self) {
        self.all.count.fetch_sub(std::mem::take(&mut self.own), Ordering::Relaxed);
    }
}

impl Drop for OwnUnsentEnds {
    fn drop(&mut self) {
        self.sent();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connection_with_more_than_its_share_is_told_when_all_are_full() {
        let all = UnsentEnds::new(2);
        let [mut large, mut small] = [(); 2].map(|()| OwnUnsentEnds::new(&all));
        assert!((0..2 * PER_CONNECTION).all(|_| large.add()));
        assert!((0..PER_CONNECTION).all(|_| small.add()));
        assert!(!small.add() && !large.add());
        small.sent();
        assert!(!large.add());
        drop(large);
        assert!((0..2 * PER_CONNECTION).all(|_| small.add()));
        assert!(!small.add());
    }
}
