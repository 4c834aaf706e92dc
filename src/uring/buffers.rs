//! The receive buffers that the kernel picks from (a provided-buffer ring), and their leases.
//!
//! ```text
//! mapping: | ring: count × 16 bytes, rounded up to a page | buffer 0 | buffer 1 | … |
//!            entry: address u64, length u32, buffer u16, (entry 0 only:) tail u16
//! ```
//!
//! The kernel owns a buffer from the moment it is published in the ring until a completion names
//! it. Then it is lent as a [`Lease`]; dropping the lease publishes it again.

use std::cell::Cell;
use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};
use std::rc::Rc;
use std::slice;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::types::BufRingEntry;

use crate::domain::limits::RECEIVE_BUFFER_BYTES;

/// The only buffer group of a ring.
pub(super) const BUFFER_GROUP: u16 = 0;
const PAGE_BYTES: usize = 4096;
/// The kernel's bound (`io_uring_register(2)`).
pub(super) const BUFFERS_MAX: u16 = 1 << 15;

/// Fields of `struct io_uring_buf` (`linux/io_uring.h`).
const ADDRESS_OFFSET: usize = 0;
const LENGTH_OFFSET: usize = 8;
const ID_OFFSET: usize = 12;

const _: () = assert!(RECEIVE_BUFFER_BYTES.is_multiple_of(PAGE_BYTES));

/// The mapping, and which buffers are lent.
#[derive(Debug)]
pub(super) struct BufferRing {
    mapping: NonNull<u8>,
    mapping_bytes: usize,
    buffers_offset: usize,
    /// A power of two.
    count: u16,
    tail: Cell<u16>,
    lent: Box<[Cell<bool>]>,
}

impl BufferRing {
    /// Maps `count` buffers. None is lent or published yet. Pages use no memory before the kernel
    /// writes them.
    pub(super) fn new(count: u16) -> io::Result<Self> {
        assert!(count.is_power_of_two() && count <= BUFFERS_MAX);
        let ring_bytes = usize::from(count) * size_of::<BufRingEntry>();
        let buffers_offset = ring_bytes.next_multiple_of(PAGE_BYTES);
        let mapping_bytes = buffers_offset + usize::from(count) * RECEIVE_BUFFER_BYTES;
        // SAFETY:
        // - A new private anonymous mapping at an address of the kernel's choice: it cannot overlap
        //   memory of anybody else; no file is involved.
        // - The result is checked before it is used.
        let mapping = unsafe {
            libc::mmap(
                ptr::null_mut(),
                mapping_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if mapping == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let mapping = NonNull::new(mapping.cast()).expect("mmap returns no null mapping");
        Ok(Self {
            mapping,
            mapping_bytes,
            buffers_offset,
            count,
            tail: Cell::new(0),
            lent: (0..count).map(|_| Cell::new(false)).collect(),
        })
    }

    /// Address of the ring: page-aligned, as registration requires.
    pub(super) fn ring_address(&self) -> u64 {
        self.mapping.as_ptr() as u64
    }

    pub(super) fn count(&self) -> u16 {
        self.count
    }

    /// Gives all buffers to the kernel. Call it once, after registration.
    pub(super) fn publish_all(&self) {
        assert_eq!(self.tail.get(), 0);
        for id in 0..self.count {
            self.publish(id);
        }
    }

    fn buffer_ptr(&self, id: u16) -> *mut u8 {
        assert!(id < self.count);
        // SAFETY: `id < count`, so the offset is within the one mapping of
        // `buffers_offset + count * RECEIVE_BUFFER_BYTES` bytes, which fits an `isize` (2^15 buffers
        // of one page and their ring are less than 2^28 bytes).
        unsafe {
            self.mapping.as_ptr().add(self.buffers_offset + usize::from(id) * RECEIVE_BUFFER_BYTES)
        }
    }

    /// Gives the buffer to the kernel. The caller has no reference into it any more.
    fn publish(&self, id: u16) {
        let tail = self.tail.get();
        let place = tail & (self.count - 1);
        let entries: *mut BufRingEntry = self.mapping.as_ptr().cast();
        let address = self.buffer_ptr(id) as u64;
        // SAFETY:
        // - In bounds and aligned: `place < count` and the mapping begins, page-aligned, with
        //   `count` entries of 16 bytes; the offsets are those of `struct io_uring_buf`.
        // - No reference to the entry is made: entry 0 also holds the tail, which the kernel reads at any
        //   time. The three fields are written by this thread only (`BufferRing` is not `Sync`). The kernel
        //   reads them only below the tail; these are not below it, since at most `count` buffers exist and
        //   `id` is not published.
        unsafe {
            let entry = entries.add(usize::from(place)).cast::<u8>();
            entry.add(ADDRESS_OFFSET).cast::<u64>().write(address);
            entry.add(LENGTH_OFFSET).cast::<u32>().write(RECEIVE_BUFFER_BYTES as u32);
            entry.add(ID_OFFSET).cast::<u16>().write(id);
        }
        let tail = tail.wrapping_add(1);
        self.tail.set(tail);
        // SAFETY:
        // - `BufRingEntry::tail` asks for the first entry of the ring, initialised: it is, see
        //   above. The field is two bytes, aligned to two.
        // - It is shared with the kernel only by atomic access, from both sides, from here on.
        let kernel_tail = unsafe { AtomicU16::from_ptr(BufRingEntry::tail(entries).cast_mut()) };
        // Release: a kernel that sees the tail also sees the entry.
        kernel_tail.store(tail, Ordering::Release);
    }
}

impl Drop for BufferRing {
    /// Runs when the ring and all leases are gone. A dropped ring leaks its reference unless the
    /// kernel has completed all operations.
    fn drop(&mut self) {
        // SAFETY:
        // - The range is exactly what `mmap` returned and is unmapped once.
        // - No lease is left: each holds an `Rc` of `self`. The kernel is done: `Ring::drop` leaks
        //   its `Rc` unless every operation has completed, and closes the ring before letting go.
        unsafe { libc::munmap(self.mapping.as_ptr().cast(), self.mapping_bytes) };
    }
}

/// A receive buffer filled by the kernel. Dropping it returns it.
#[derive(Debug)]
pub struct Lease {
    ring: Rc<BufferRing>,
    id: u16,
    len: usize,
}

impl Lease {
    /// Takes a buffer that a completion named, with the number of bytes it holds.
    pub(super) fn take(ring: &Rc<BufferRing>, id: u16, len: usize) -> Self {
        assert!(id < ring.count, "the kernel named an unknown buffer");
        assert!(len <= RECEIVE_BUFFER_BYTES);
        assert!(!ring.lent[usize::from(id)].replace(true), "the kernel used a lent buffer");
        Self { ring: Rc::clone(ring), id, len }
    }
}

impl Deref for Lease {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY:
        // - In bounds: `take` checked `id < count` and `len`, and neither changes.
        // - Initialised: the mapping is zero-filled, so every byte is valid.
        // - Unchanged while shared: `take` never lends a lent `id`, the kernel regains it only in
        //   `drop`, and a mutable slice would borrow the lease exclusively.
        // - Alive: the `Rc` keeps the mapping, and the slice borrows `self`.
        unsafe { slice::from_raw_parts(self.ring.buffer_ptr(self.id), self.len) }
    }
}

impl DerefMut for Lease {
    fn deref_mut(&mut self) -> &mut [u8] {
        assert!(self.len <= RECEIVE_BUFFER_BYTES); // pair of the check in `take`
        // SAFETY: in bounds, initialised and alive as in `deref`.
        // - Exclusive: no other lease has this `id`, the kernel regains it only in `drop`, and
        //   `&mut self` keeps a second slice of this lease out.
        unsafe { slice::from_raw_parts_mut(self.ring.buffer_ptr(self.id), self.len) }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        assert!(self.ring.lent[usize::from(self.id)].replace(false)); // pair of `take`
        self.ring.publish(self.id);
    }
}

#[cfg(test)]
impl Lease {
    /// Whether this lease is the last owner of the buffers.
    pub(super) fn is_last_of_its_ring(&self) -> bool {
        Rc::strong_count(&self.ring) == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lease_outlives_its_ring() {
        let ring = Rc::new(BufferRing::new(4).unwrap());
        ring.publish_all();
        let mut lease = Lease::take(&ring, 2, 5);
        drop(ring);
        lease.copy_from_slice(b"hello");
        assert_eq!(*lease, *b"hello");
    }

    #[test]
    fn kernel_finds_the_fields_where_its_header_has_them() {
        let ring = BufferRing::new(4).unwrap();
        ring.publish_all();
        let entries: *const BufRingEntry = ring.mapping.as_ptr().cast();
        for id in 0..4 {
            // SAFETY: `id` is below the number of entries, and no kernel uses this ring.
            let entry = unsafe { &*entries.add(usize::from(id)) };
            let expected = (ring.buffer_ptr(id) as u64, RECEIVE_BUFFER_BYTES as u32, id);
            assert_eq!((entry.addr(), entry.len(), entry.bid()), expected);
        }
        // SAFETY: the first entry, see above.
        assert_eq!(unsafe { *BufRingEntry::tail(entries) }, 4);
    }

    #[test]
    fn buffers_do_not_overlap() {
        let ring = Rc::new(BufferRing::new(2).unwrap());
        ring.publish_all();
        let mut first = Lease::take(&ring, 0, RECEIVE_BUFFER_BYTES);
        let mut second = Lease::take(&ring, 1, RECEIVE_BUFFER_BYTES);
        first.fill(1);
        second.fill(2);
        assert!(first.iter().all(|byte| *byte == 1));
        assert!(ring.lent.iter().all(Cell::get));
        drop((first, second));
        assert!(!ring.lent.iter().any(Cell::get));
        assert_eq!(ring.tail.get(), 4);
    }

    #[test]
    #[should_panic(expected = "lent buffer")]
    fn buffer_is_not_lent_twice() {
        let ring = Rc::new(BufferRing::new(2).unwrap());
        ring.publish_all();
        let _first = Lease::take(&ring, 0, 1);
        let _second = Lease::take(&ring, 0, 1);
    }
}
