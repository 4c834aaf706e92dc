//! The rings of the bare server. They find the socket of a session by its descriptor or, for more
//! sessions than descriptors, in the file tables of several rings.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use io_uring::types::{Fd, Fixed};
use io_uring::{IoUring, opcode, squeue};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Sends of one batch.
pub(super) const ENTRIES: u32 = 256;
pub(super) const FLAGS: i32 = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;

pub(super) fn ring() -> io::Result<IoUring> {
    IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_submit_all()
        .setup_cqsize(32_768)
        .build(ENTRIES)
}

/// The rings and the sockets.
pub(super) struct Rings {
    rings: Vec<IoUring>,
    /// Queued sends of each ring.
    queued: Vec<usize>,
    sockets: Sockets,
}

enum Sockets {
    /// Descriptor of each session.
    Descriptors(Vec<i32>),
    /// Session `s` is file `s % each` of ring `s / each`.
    Parked { each: usize, count: usize },
}

impl Rings {
    /// One ring for these descriptors, by session.
    pub(super) fn of(descriptors: Vec<i32>) -> io::Result<Self> {
        let sockets = Sockets::Descriptors(descriptors);
        Ok(Self { rings: vec![ring()?], queued: vec![0], sockets })
    }

    /// Rings whose tables together hold `capacity` sockets. A table cannot be larger than
    /// `RLIMIT_NOFILE`.
    pub(super) fn parking(capacity: usize) -> io::Result<Self> {
        let limit = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })?;
        let most = limit.maximum.map_or(capacity, |most| most as usize);
        let each = most.min(capacity);
        let rings = (0..capacity.div_ceil(each))
            .map(|_| {
                let ring = ring()?;
                ring.submitter().register_files_sparse(each as u32)?;
                Ok(ring)
            })
            .collect::<io::Result<Vec<_>>>()?;
        let queued = vec![0; rings.len()];
        Ok(Self { rings, queued, sockets: Sockets::Parked { each, count: 0 } })
    }

    /// Puts the socket of a session into a table. Its descriptor can be closed then.
    pub(super) fn park(&mut self, session: usize, socket: &OwnedFd) -> io::Result<()> {
        let Sockets::Parked { each, count } = &mut self.sockets else {
            panic!("these rings send to descriptors");
        };
        let (ring, file) = (&self.rings[session / *each], session % *each);
        ring.submitter().register_files_update(file as u32, &[socket.as_raw_fd()])?;
        *count += 1;
        Ok(())
    }

    /// Sessions with a socket.
    pub(super) fn sessions(&self) -> usize {
        match &self.sockets {
            Sockets::Descriptors(descriptors) => descriptors.len(),
            Sockets::Parked { count, .. } => *count,
        }
    }

    /// Queues one send of a batch. `place`: index of its result.
    ///
    /// # Safety
    /// `bytes` stay where they are, unchanged, until [`Rings::submit`] has returned.
    pub(super) unsafe fn send(&mut self, session: usize, bytes: &[u8], place: usize) {
        let (pointer, length) = (bytes.as_ptr(), bytes.len() as u32);
        let (at, entry): (usize, squeue::Entry) = match &self.sockets {
            Sockets::Descriptors(descriptors) => {
                let send = opcode::Send::new(Fd(descriptors[session]), pointer, length);
                (0, send.flags(FLAGS).build())
            }
            Sockets::Parked { each, .. } => {
                let send = opcode::Send::new(Fixed((session % each) as u32), pointer, length);
                (session / each, send.flags(FLAGS).build())
            }
        };
        let entry = entry.user_data(place as u64);
        // SAFETY: the caller keeps the bytes until `submit` has reaped every completion, and a send
        // with MSG_DONTWAIT completes within the `enter`. The queue is empty before a batch and as
        // long as one.
        unsafe { self.rings[at].submission().push(&entry).expect("a batch fits") };
        self.queued[at] += 1;
    }

    /// Submits the queued sends with one system call per ring, and writes their results to their
    /// places.
    pub(super) fn submit(&mut self, results: &mut [i32]) -> io::Result<()> {
        for (ring, queued) in self.rings.iter_mut().zip(&mut self.queued) {
            if *queued == 0 {
                continue;
            }
            ring.submit_and_wait(*queued)?;
            let mut completed = 0;
            for entry in ring.completion() {
                results[entry.user_data() as usize] = entry.result();
                completed += 1;
            }
            assert_eq!(completed, *queued, "a send is still in flight");
            *queued = 0;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    #[test]
    fn parked_sockets_are_found_across_rings_without_descriptors() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let mut rings = Rings::parking(3).unwrap();
        let ring_of_its_own = ring().unwrap();
        ring_of_its_own.submitter().register_files_sparse(2).unwrap();
        // As if a table held only two.
        rings.sockets = Sockets::Parked { each: 2, count: 0 };
        rings.rings.push(ring_of_its_own);
        rings.queued.push(0);
        let mut clients: Vec<TcpStream> = (0..3)
            .map(|session| {
                let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
                rings.park(session, &listener.accept().unwrap().0.into()).unwrap();
                client
            })
            .collect();
        assert_eq!(rings.sessions(), 3);
        let mut results = [0; 3];
        for session in 0..3 {
            let bytes: &'static [u8] = [b"a", b"b", b"c"][session];
            // SAFETY: the bytes are static.
            unsafe { rings.send(session, bytes, 2 - session) };
        }
        rings.submit(&mut results).unwrap();
        assert_eq!(results, [1; 3]);
        for (client, sent) in clients.iter_mut().zip(b"abc") {
            let mut got = [0];
            client.read_exact(&mut got).unwrap();
            assert_eq!(got[0], *sent);
        }
    }
}
