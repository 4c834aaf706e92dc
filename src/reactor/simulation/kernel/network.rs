//! The network side of the simulated kernel: actions of the clients, and what can be observed from
//! outside.

use super::*;

impl SimulatedKernel {
    /// A client connects. `None`: the listener is closed.
    pub fn connect(&mut self, address: Ipv4Addr, outbound_capacity: usize) -> Option<SocketId> {
        if !self.listening {
            return None;
        }
        let id = SocketId(self.sockets.len());
        self.sockets.push(Socket {
            address: SocketAddr::from((address, 1024)),
            inbound: VecDeque::new(),
            inbound_ended: false,
            outbound: 0,
            outbound_capacity,
            sent: Vec::new(),
            outbound_ended: false,
            reset: false,
            error: Errno::CONNRESET,
            closed: false,
            received_at_ms: self.now_ms,
            floods: false,
            flooded: 0,
            unannounced: false,
            file: None,
        });
        self.backlog.push_back(id);
        Some(id)
    }

    /// Clients that wait to be accepted.
    pub fn backlog_len(&self) -> usize {
        self.backlog.len()
    }

    /// Another shard accepts a client.
    pub fn accept_elsewhere(&mut self) {
        if let Some(id) = self.backlog.pop_front() {
            self.sockets[id.0].closed = true;
        }
    }

    /// A client sends. Bytes after its FIN, a reset or the shard's close are lost.
    pub fn client_sends(&mut self, id: SocketId, bytes: &[u8]) {
        let socket = &mut self.sockets[id.0];
        let open = !socket.inbound_ended && !socket.reset && !socket.closed;
        if open && !bytes.is_empty() {
            socket.inbound.extend(bytes);
            socket.unannounced = true;
        }
    }

    /// From now on a client sends more whenever everything has been received.
    pub fn client_floods(&mut self, id: SocketId) {
        let socket = &mut self.sockets[id.0];
        socket.flooded = -(socket.inbound.len() as isize);
        socket.floods = true;
        self.client_sends(id, &[FLOOD]);
    }

    /// Number of bytes of its flood that the shard has received from a client: negative before the first.
    pub fn flooded(&self, id: SocketId) -> isize {
        self.sockets[id.0].flooded
    }

    /// A client shuts down its half of the stream.
    pub fn client_ends(&mut self, id: SocketId) {
        let socket = &mut self.sockets[id.0];
        socket.inbound_ended = true;
        socket.unannounced = true;
    }

    /// A client resets the connection, or the network fails. Bytes that it sent before may be lost.
    pub fn client_resets(&mut self, id: SocketId) {
        let lost = self.random.chance(128);
        let error = self.random.pick(&[Errno::CONNRESET, Errno::TIMEDOUT, Errno::HOSTUNREACH]);
        let socket = &mut self.sockets[id.0];
        socket.reset = true;
        socket.error = error;
        socket.unannounced = true;
        if lost {
            socket.inbound.clear();
        }
    }

    /// A client reads up to `limit` bytes, which makes room in the send buffer.
    pub fn client_reads(&mut self, id: SocketId, limit: usize) {
        let socket = &mut self.sockets[id.0];
        socket.outbound -= socket.outbound.min(limit);
    }

    /// The bytes that the shard has sent since the last call.
    pub fn take_sent(&mut self, id: SocketId) -> Vec<u8> {
        std::mem::take(&mut self.sockets[id.0].sent)
    }

    /// Bytes that the client has not read.
    pub fn unread(&self, id: SocketId) -> usize {
        self.sockets[id.0].outbound
    }

    /// Bytes that the shard has not received.
    pub fn unreceived(&self, id: SocketId) -> usize {
        self.sockets[id.0].inbound.len()
    }

    /// When the shard last received bytes from it.
    pub fn received_at_ms(&self, id: SocketId) -> u64 {
        self.sockets[id.0].received_at_ms
    }

    /// Whether the shard has shut down its half, or closed the socket.
    pub fn server_ended(&self, id: SocketId) -> bool {
        let socket = &self.sockets[id.0];
        socket.outbound_ended || socket.closed
    }

    /// Whether the client is reset, and loses what it has not read.
    #[cfg(test)]
    pub fn is_reset(&self, id: SocketId) -> bool {
        self.sockets[id.0].reset
    }

    /// Whether it has been accepted and is not reset or closed.
    pub fn is_open(&self, id: SocketId) -> bool {
        let socket = &self.sockets[id.0];
        socket.file.is_some() && !socket.reset
    }

    /// Whether the shard has closed it.
    pub fn is_closed(&self, id: SocketId) -> bool {
        self.sockets[id.0].closed
    }

    /// The requests in flight on a file, to compare with the shard's.
    pub fn in_flight(&self, key: ConnectionKey) -> RequestSet {
        match self.files.get(key.slot as usize) {
            Some(Some(file)) if file.key == key => file.in_flight,
            _ => RequestSet::default(),
        }
    }

    /// Files that are open or being accepted.
    pub fn files_open(&self) -> usize {
        self.files.iter().flatten().count()
    }

    /// Receive buffers that are lent.
    pub fn buffers_lent(&self) -> usize {
        self.buffers - self.buffers_free.get()
    }

    /// Receive buffers in completions that the shard has not reaped.
    pub fn leases_waiting(&self) -> usize {
        let lent = |completion: &&Completion<SimulatedLease>| {
            matches!(completion, Completion::Received { received: Received::Bytes { .. }, .. })
        };
        self.completions.iter().filter(lent).count()
    }

    /// Connections with something to receive (bytes, FIN, a failure) that the kernel has announced
    /// to the shard, or will not announce, and the shard has not requested.
    pub fn unasked(&self) -> Vec<ConnectionKey> {
        if !self.completions.is_empty() {
            return Vec::new();
        }
        let unasked = |file: &&File| {
            let Some(id) = file.socket else { return false };
            let socket = &self.sockets[id.0];
            let something = !socket.inbound.is_empty() || socket.inbound_ended || socket.reset;
            let polls = file.in_flight.any(RequestSet::POLL_READABLE);
            let announced = !socket.unannounced || !polls;
            something && announced && !file.in_flight.any(RequestSet::RECEIVE)
        };
        self.files.iter().flatten().filter(unasked).map(|file| file.key).collect()
    }

    /// Requests and completions that the shard has not reaped.
    pub fn pending(&self) -> usize {
        self.queued.len() + self.requests.len() + self.completions.len()
    }
}
