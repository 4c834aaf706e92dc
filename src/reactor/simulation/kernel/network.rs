//! The other side: what clients do to the kernel and what can be seen of it from outside.

use super::*;

impl SimulatedKernel {
    /// A client connects. `None`: nobody listens.
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
            closed: false,
            received_at_ms: self.now_ms,
            unannounced: false,
            file: None,
        });
        self.backlog.push_back(id);
        Some(id)
    }

    /// The client sends. After its end, a reset or the shard's close it goes nowhere.
    pub fn client_sends(&mut self, id: SocketId, bytes: &[u8]) {
        let socket = &mut self.sockets[id.0];
        let open = !socket.inbound_ended && !socket.reset && !socket.closed;
        if open && !bytes.is_empty() {
            socket.inbound.extend(bytes);
            socket.unannounced = true;
        }
    }

    /// The client ends its half.
    pub fn client_ends(&mut self, id: SocketId) {
        let socket = &mut self.sockets[id.0];
        socket.inbound_ended = true;
        socket.unannounced = true;
    }

    /// The client resets the connection. What it sent before may be lost.
    pub fn client_resets(&mut self, id: SocketId) {
        let lost = self.random.chance(128);
        let socket = &mut self.sockets[id.0];
        socket.reset = true;
        socket.unannounced = true;
        if lost {
            socket.inbound.clear();
        }
    }

    /// The client reads up to `limit` bytes, which makes room.
    pub fn client_reads(&mut self, id: SocketId, limit: usize) {
        let socket = &mut self.sockets[id.0];
        socket.outbound -= socket.outbound.min(limit);
    }

    /// What the shard has sent since this was last asked, in order.
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

    /// When the shard last received something of it.
    pub fn received_at_ms(&self, id: SocketId) -> u64 {
        self.sockets[id.0].received_at_ms
    }

    /// Whether the shard's half has ended, or all of it.
    pub fn server_ended(&self, id: SocketId) -> bool {
        let socket = &self.sockets[id.0];
        socket.outbound_ended || socket.closed
    }

    /// Whether it has been accepted and something can be exchanged.
    pub fn is_open(&self, id: SocketId) -> bool {
        let socket = &self.sockets[id.0];
        socket.file.is_some() && !socket.reset
    }

    /// Whether the shard has closed it.
    pub fn is_closed(&self, id: SocketId) -> bool {
        self.sockets[id.0].closed
    }

    /// What is in flight on a file, to be compared with what the shard believes.
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

    /// Receive buffers in completions that have not been handed over.
    pub fn leases_waiting(&self) -> usize {
        let lent = |completion: &&Completion<SimulatedLease>| {
            matches!(completion, Completion::Received { received: Received::Bytes { .. }, .. })
        };
        self.completions.iter().filter(lent).count()
    }

    /// Connections with something to receive (bytes, an end, a failure) of which the shard has been
    /// told everything, and which it has not asked for.
    pub fn unasked(&self) -> Vec<ConnectionKey> {
        if !self.completions.is_empty() {
            return Vec::new();
        }
        let unasked = |file: &&File| {
            let Some(id) = file.socket else { return false };
            let socket = &self.sockets[id.0];
            let something = !socket.inbound.is_empty() || socket.inbound_ended || socket.reset;
            something && !socket.unannounced && !file.in_flight.any(RequestSet::RECEIVE)
        };
        self.files.iter().flatten().filter(unasked).map(|file| file.key).collect()
    }

    /// Requests and completions that have not been handed over.
    pub fn pending(&self) -> usize {
        self.requests.len() + self.completions.len()
    }
}
