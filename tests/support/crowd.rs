//! Tens of thousands of idle sessions. After its handshake, a client's socket moves into the file table
//! of a ring and its descriptor is closed. So `RLIMIT_NOFILE` bounds one table instead of the number of
//! clients, and a client costs no memory beyond its socket.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::os::fd::AsRawFd as _;

use io_uring::IoUring;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with};

use super::fleet::{Connect, masked_frame, raise_descriptor_limit};
use super::wait::SOON;

/// Handshakes in flight.
const AT_ONCE: usize = 64;
/// Files of one table, if `RLIMIT_NOFILE` allows that many.
const TABLE_FILES: u32 = 16_000;
/// Descriptors left for the rest of the test.
const DESCRIPTORS_OWN: u64 = 256;
/// Clients of one source address: few enough that the system finds a free port quickly.
const PER_SOURCE: usize = 5_000;
/// The first source address.
const FIRST_SOURCE: Ipv4Addr = Ipv4Addr::new(127, 0, 64, 1);
/// Longer than any answer to an upgrade request.
const HEAD_BYTES_MAX: usize = 1024;

/// A ring that only holds files.
struct Table {
    ring: IoUring,
    used: u32,
}

/// The clients. Dropping it terminates all of them without a close frame.
pub struct Crowd {
    server: SocketAddr,
    tables: Vec<Table>,
    table_files: u32,
    clients: usize,
}

impl Crowd {
    /// A crowd without clients. Raises `RLIMIT_NOFILE` of this process, and of those that it starts,
    /// to the maximum.
    pub fn new(server: SocketAddr) -> Self {
        let room = raise_descriptor_limit().saturating_sub(DESCRIPTORS_OWN);
        let table_files = TABLE_FILES.min(u32::try_from(room).unwrap_or(u32::MAX));
        Self { server, tables: Vec::new(), table_files, clients: 0 }
    }

    /// Connects until there are this many clients, each a different user. Ids are as long as real ones:
    /// 36 bytes for the user, 16 for the device.
    pub fn grow(&mut self, clients: usize) {
        while self.clients < clients {
            let until = clients.min(self.clients + AT_ONCE);
            let handshaking: Vec<_> =
                (self.clients..until).map(|number| self.dial(number)).collect();
            for mut stream in handshaking {
                await_opening(&mut stream);
                let hello = masked_frame(true, 1, br#"{"last_sequences":{}}"#);
                stream.write_all(&hello).expect("a fresh socket takes a small message");
                self.keep(&stream);
            }
            self.clients = until;
        }
    }

    /// Connects and sends the upgrade request.
    fn dial(&self, number: usize) -> TcpStream {
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None);
        let socket = socket.expect("a socket");
        let source = u32::from(FIRST_SOURCE) + (number / PER_SOURCE) as u32;
        bind(&socket, &SocketAddrV4::new(source.into(), 0)).expect("a loopback address");
        connect(&socket, &self.server).expect("the server accepts");
        let mut stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(SOON)).expect("not zero");
        let user = format!("5eed0000-0000-4000-8000-{number:012}");
        let request = Connect::session(self.server, &user, &format!("device-{number:09}"));
        stream.write_all(request.request().as_bytes()).expect("a fresh socket takes it");
        stream
    }

    /// Puts the socket into a table, so that its descriptor can be closed.
    fn keep(&mut self, stream: &TcpStream) {
        if self.tables.last().is_none_or(|table| table.used == self.table_files) {
            let ring = IoUring::new(1).expect("a ring");
            ring.submitter().register_files_sparse(self.table_files).expect("within the limit");
            self.tables.push(Table { ring, used: 0 });
        }
        let table = self.tables.last_mut().expect("there is one");
        let descriptors = [stream.as_raw_fd()];
        let kept = table.ring.submitter().register_files_update(table.used, &descriptors);
        assert_eq!(kept.expect("a place in the table"), 1);
        table.used += 1;
    }
}

fn await_opening(stream: &mut TcpStream) {
    let mut head = [0; HEAD_BYTES_MAX];
    let mut length = 0;
    while !head[..length].ends_with(b"\r\n\r\n") {
        let count = stream.read(&mut head[length..]).expect("an answer to the upgrade request");
        assert!(count > 0, "no answer: {}", String::from_utf8_lossy(&head[..length]));
        length += count;
    }
    let head = String::from_utf8_lossy(&head[..length]);
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
}
