//! The limits per address, which the gRPC port shares with the shards.

use std::net::IpAddr;
use std::sync::Arc;

use crate::domain::limiter::{AddressPermit, ConnectionLimiter, LimitExceeded};

/// The limiter of all ports, with the clock that they share.
#[derive(Clone, Debug)]
pub struct AddressLimits {
    limiter: Arc<ConnectionLimiter>,
    now_ms: fn() -> u64,
}

impl AddressLimits {
    /// `now_ms`: the monotonic clock of all callers of `limiter`, ms.
    pub fn new(limiter: Arc<ConnectionLimiter>, now_ms: fn() -> u64) -> Self {
        Self { limiter, now_ms }
    }

    /// Admits a connection. It is counted until the place is dropped.
    pub(super) fn admit(&self, address: IpAddr) -> Result<AddressPlace, LimitExceeded> {
        let permit = self.limiter.admit(address, (self.now_ms)())?;
        Ok(AddressPlace { limits: self.clone(), address, permit: Some(permit) })
    }
}

/// An admitted connection.
#[derive(Debug)]
pub(super) struct AddressPlace {
    limits: AddressLimits,
    address: IpAddr,
    /// `Some` until the drop.
    permit: Option<AddressPermit>,
}

impl AddressPlace {
    pub(super) fn address(&self) -> IpAddr {
        self.address
    }

    /// The clock of the limits, ms.
    pub(super) fn now_ms(&self) -> u64 {
        (self.limits.now_ms)()
    }

    /// Counts a further call on the connection as a handshake.
    pub(super) fn count_handshake(&self) -> Result<(), LimitExceeded> {
        self.limits.limiter.count_handshake(self.address, self.now_ms())
    }
}

impl Drop for AddressPlace {
    fn drop(&mut self) {
        if let Some(permit) = self.permit.take() {
            self.limits.limiter.release(permit, self.now_ms());
        }
    }
}
