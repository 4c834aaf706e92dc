//! Connections of the epoll and bare servers, by descriptor and by session.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use crate::frame;
use crate::names;

pub(super) const LISTENER: u64 = u64::MAX;
pub(super) const COMMAND: u64 = u64::MAX - 1;

/// One connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) socket: OwnedFd,
    /// An incomplete request or frame.
    partial: Vec<u8>,
    /// Bytes that the socket did not take.
    pub(super) unsent: Vec<u8>,
    open: bool,
    session: Option<usize>,
}

/// All connections.
#[derive(Debug)]
pub(super) struct Table {
    epoll: OwnedFd,
    listener: TcpListener,
    /// By descriptor.
    connections: Vec<Option<Connection>>,
    /// Descriptor of session `index`.
    by_session: Vec<Option<u32>>,
    pub(super) open: usize,
    pub(super) unsent: usize,
    buffer: Vec<u8>,
}

impl Table {
    pub(super) fn new(listener: TcpListener, capacity: usize) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        listener.set_nonblocking(true)?;
        epoll::add(&epoll, &listener, EventData::new_u64(LISTENER), EventFlags::IN)?;
        Ok(Self {
            epoll,
            listener,
            connections: Vec::new(),
            by_session: vec![None; capacity],
            open: 0,
            unsent: 0,
            buffer: vec![0; 64 * 1024],
        })
    }

    pub(super) fn epoll(&self) -> &OwnedFd {
        &self.epoll
    }

    pub(super) fn accept(&mut self) -> io::Result<()> {
        loop {
            let socket: OwnedFd = match self.listener.accept() {
                Ok((stream, _)) => stream.into(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            };
            let number = socket.as_raw_fd() as usize;
            epoll::add(&self.epoll, &socket, EventData::new_u64(number as u64), EventFlags::IN)?;
            if number >= self.connections.len() {
                self.connections.resize_with(number + 1, || None);
            }
            self.connections[number] = Some(Connection {
                socket,
                partial: Vec::new(),
                unsent: Vec::new(),
                open: false,
                session: None,
            });
        }
    }

    /// The connection of a session.
    pub(super) fn of(&self, session: usize) -> Option<&Connection> {
        let number = (*self.by_session.get(session)?)?;
        self.connections[number as usize].as_ref()
    }

    /// Descriptors of all open sessions.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = i32> + '_ {
        self.by_session.iter().flatten().map(|number| *number as i32)
    }

    /// Reads and answers. Returns the session if its hello has arrived, after which it sends nothing
    /// more.
    pub(super) fn read(&mut self, number: usize) -> Option<usize> {
        let connection = self.connections.get_mut(number)?.as_mut()?;
        let kept = connection.partial.len();
        self.buffer[..kept].copy_from_slice(&connection.partial);
        let into = &mut self.buffer[kept..];
        let count = match rustix::net::recv(&connection.socket, into, RecvFlags::DONTWAIT) {
            Ok((count @ 1.., _)) => count,
            Err(Errno::AGAIN) => return None,
            Ok((0, _)) | Err(_) => {
                self.lose(number);
                return None;
            }
        };
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut used = 0;
        let mut answers = Vec::new();
        let input = &mut buffer[..kept + count];
        if !connection.open {
            let Some(head) = frame::head_end(input) else {
                connection.partial = input.to_vec();
                self.buffer = buffer;
                return None;
            };
            if let Some(answer) = frame::upgrade_answer(&input[..head]) {
                answers = answer;
                connection.open = true;
                self.open += 1;
                if let Some(session) = names::index_of(&input[..head])
                    && let Some(place) = self.by_session.get_mut(session)
                {
                    *place = Some(number as u32);
                    connection.session = Some(session);
                }
            }
            used = head;
        }
        let (mut closing, mut hello) = (false, None);
        while let Some(found) = frame::parse_masked(&mut input[used..]) {
            match found.opcode {
                frame::TEXT => hello = connection.session,
                frame::BINARY => frame::put(&mut answers, frame::BINARY, found.payload),
                frame::PING => frame::put(&mut answers, frame::PONG, found.payload),
                frame::CLOSE => closing = true,
                _ => {}
            }
            used += found.total;
        }
        connection.partial.clear();
        connection.partial.extend_from_slice(&input[used..]);
        self.buffer = buffer;
        if !answers.is_empty() {
            self.send(number, &answers);
        }
        if closing {
            self.lose(number);
            return None;
        }
        hello
    }

    /// Removes the socket of an open session from epoll and returns it. `None`: it has unsent bytes.
    pub(super) fn take(&mut self, session: usize) -> Option<OwnedFd> {
        let place = self.by_session.get_mut(session)?;
        let number = (*place)? as usize;
        let connection = self.connections[number].take_if(|taken| taken.unsent.is_empty())?;
        *place = None;
        // Closing the descriptor would not remove it from epoll: a ring keeps the file open.
        epoll::delete(&self.epoll, &connection.socket).expect("a connection of ours is in the set");
        Some(connection.socket)
    }

    /// Sends as much as the socket takes and keeps the rest.
    pub(super) fn send(&mut self, number: usize, bytes: &[u8]) {
        let Some(Some(connection)) = self.connections.get_mut(number) else { return };
        if !connection.unsent.is_empty() {
            connection.unsent.extend_from_slice(bytes);
            return;
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let sent = match rustix::net::send(&connection.socket, bytes, flags) {
            Ok(sent) => sent,
            Err(Errno::AGAIN) => 0,
            Err(_) => return self.lose(number),
        };
        if sent < bytes.len() {
            connection.unsent.extend_from_slice(&bytes[sent..]);
            self.unsent += 1;
            let flags = EventFlags::IN | EventFlags::OUT;
            let data = EventData::new_u64(number as u64);
            epoll::modify(&self.epoll, connection.socket.as_fd(), data, flags)
                .expect("a connection of ours is in the set");
        }
    }

    /// Sends unsent bytes of a socket that is writable again.
    pub(super) fn flush(&mut self, number: usize) {
        let Some(Some(connection)) = self.connections.get_mut(number) else { return };
        if connection.unsent.is_empty() {
            return;
        }
        let unsent = std::mem::take(&mut connection.unsent);
        self.unsent -= 1;
        let data = EventData::new_u64(number as u64);
        epoll::modify(&self.epoll, connection.socket.as_fd(), data, EventFlags::IN)
            .expect("a connection of ours is in the set");
        self.send(number, &unsent);
    }

    fn lose(&mut self, number: usize) {
        let Some(connection) = self.connections[number].take() else { return };
        self.open -= usize::from(connection.open);
        self.unsent -= usize::from(!connection.unsent.is_empty());
        for place in &mut self.by_session {
            if *place == Some(number as u32) {
                *place = None;
            }
        }
    }
}
