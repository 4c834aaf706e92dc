//! The memory into which the kernel writes peer addresses.

use std::cell::UnsafeCell;
use std::mem::{MaybeUninit, size_of};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::domain::limits::ACCEPTS_IN_FLIGHT_MAX;

const UNKNOWN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

/// A socket address and its length, at a fixed address.
#[derive(Debug)]
pub(super) struct AddressCell {
    address: UnsafeCell<MaybeUninit<libc::sockaddr_storage>>,
    len: UnsafeCell<libc::socklen_t>,
}

impl AddressCell {
    fn new() -> Self {
        Self { address: UnsafeCell::new(MaybeUninit::zeroed()), len: UnsafeCell::new(0) }
    }

    /// The pointers for an accept: to the address and to its length.
    pub(super) fn pointers(&self) -> (*mut libc::sockaddr, *mut libc::socklen_t) {
        (self.address.get().cast(), self.len.get())
    }
}

/// The cells, each lent to one accept. They are on the heap and never move.
#[derive(Debug)]
pub(super) struct Accepts {
    cells: Box<[AddressCell]>,
    /// The slot of the connection to which the cell of the same index is lent.
    lent: [Option<u32>; ACCEPTS_IN_FLIGHT_MAX],
}

impl Accepts {
    pub(super) fn new() -> Self {
        Self {
            cells: (0..ACCEPTS_IN_FLIGHT_MAX).map(|_| AddressCell::new()).collect(),
            lent: [None; ACCEPTS_IN_FLIGHT_MAX],
        }
    }

    /// Lends a cell to the accept into `slot`, with its length set for the kernel. `None`: all are
    /// lent.
    pub(super) fn lend(&mut self, slot: u32) -> Option<&AddressCell> {
        debug_assert!(!self.lent.contains(&Some(slot)), "two accepts into one slot");
        let index = self.lent.iter().position(Option::is_none)?;
        self.lent[index] = Some(slot);
        let cell = &self.cells[index];
        // SAFETY:
        // - Exclusive: `lent[index]` was `None`, so no accept is in flight with this cell and the
        //   kernel does not touch it; `&mut self` keeps every other reader of `len` out.
        // - In bounds and aligned: it is the cell's own field.
        unsafe { *cell.len.get() = size_of::<libc::sockaddr_storage>() as libc::socklen_t };
        Some(cell)
    }

    /// Takes back the cell of a completed accept. `accepted`: the kernel has written it.
    pub(super) fn take_back(&mut self, slot: u32, accepted: bool) -> Option<SocketAddr> {
        let index = self
            .lent
            .iter()
            .position(|lent| *lent == Some(slot))
            .expect("an accept completes once and has a cell until then");
        self.lent[index] = None;
        accepted.then(|| read_address(&self.cells[index]))
    }
}

/// The address in a cell; the unspecified address for a peer without one (a Unix socket).
fn read_address(cell: &AddressCell) -> SocketAddr {
    // SAFETY:
    // - Exclusive: called by `take_back` alone, after the accept's only completion and with
    //   `&mut Accepts`, so neither the kernel nor anybody else writes the cell.
    // - Initialised: the cell was zero-filled when made and the kernel only writes bytes over it;
    //   a `sockaddr_storage` is plain integers, for which any bytes are a value.
    let storage = unsafe { (*cell.address.get()).assume_init() };
    let start: *const libc::sockaddr_storage = &raw const storage;
    match libc::c_int::from(storage.ss_family) {
        libc::AF_INET => {
            // SAFETY: `sockaddr_storage` is at least as large and as aligned as every socket
            // address (POSIX), `storage` is a live local, and `sockaddr_in` is plain integers.
            let v4 = unsafe { *start.cast::<libc::sockaddr_in>() };
            let address = Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr));
            SocketAddr::new(address.into(), u16::from_be(v4.sin_port))
        }
        libc::AF_INET6 => {
            // SAFETY: as for `sockaddr_in`: size and alignment by POSIX, a live local, and
            // `sockaddr_in6` is plain integers and bytes.
            let v6 = unsafe { *start.cast::<libc::sockaddr_in6>() };
            let address = Ipv6Addr::from(v6.sin6_addr.s6_addr).to_canonical();
            SocketAddr::new(address, u16::from_be(v6.sin6_port))
        }
        _ => UNKNOWN,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_run_out_and_are_returned() {
        let mut accepts = Accepts::new();
        for slot in 0..ACCEPTS_IN_FLIGHT_MAX as u32 {
            assert!(accepts.lend(slot).is_some());
        }
        assert!(accepts.lend(1000).is_none());
        assert_eq!(accepts.take_back(3, false), None);
        assert!(accepts.lend(1000).is_some());
        assert_eq!(accepts.take_back(1000, true), Some(UNKNOWN));
    }
}
