//! Actions of the clients, and of the other shards that accept some of them.

use super::*;

impl Simulation {
    /// Other shards accept clients, or their clients leave.
    pub(super) fn other_shards_act(&mut self) {
        if self.shard.is_none() {
            return;
        }
        let now_ms = self.elsewhere_ms();
        let accepts = self.elsewhere.is_empty() || self.random.chance(128);
        let has_room = self.elsewhere.len() < self.setup.room_elsewhere as usize;
        if accepts && has_room && self.capacity.take() {
            self.accept_elsewhere();
        } else if !accepts && let Some(permit) = self.elsewhere.pop() {
            self.limiter.release(permit, now_ms);
            self.capacity.give_back();
        }
    }

    /// Another shard accepts a client that waits, or one of its own, and has taken a place for it.
    pub(super) fn accept_elsewhere(&mut self) {
        let now_ms = self.elsewhere_ms();
        let address = self.address().into();
        self.kernel().accept_elsewhere();
        match self.limiter.admit(address, now_ms) {
            Ok(permit) => {
                self.elsewhere.push(permit);
                self.count_handshakes(now_ms, 1);
            }
            Err(_) => self.capacity.give_back(),
        }
    }

    /// The time of another shard: each reads the clock when its turn begins.
    fn elsewhere_ms(&mut self) -> u64 {
        self.now_ms() + self.random.between(0, 4_000) - 2_000
    }

    fn address(&mut self) -> Ipv4Addr {
        Ipv4Addr::from(0x7F00_0000 + self.random.below(self.setup.addresses) as u32)
    }

    pub(super) fn connect(&mut self) {
        if self.active.len() >= self.setup.clients_max || self.resting {
            return;
        }
        let kind = match self.random.below(32) {
            0 => ClientKind::Bad,
            1 => ClientKind::Endless,
            2..=5 => ClientKind::Echo,
            6..=14 => ClientKind::Session { json: true },
            _ => ClientKind::Session { json: false },
        };
        let address = self.address();
        let stands_by = matches!(kind, ClientKind::Session { .. }) && self.random.chance(40);
        let capacity = self.random.pick(&[300, 3_000, 30_000, 300_000]);
        let capacity = if stands_by { usize::MAX / 2 } else { capacity };
        let Some(shard) = self.shard.as_mut() else { return };
        let Some(socket) = shard.kernel_mut().connect(address, capacity) else { return };
        let number = self.clients.len();
        note(TraceEvent::Connect(number));
        let mut client = Client::new(number, socket, kind, &mut self.random);
        let speaks_tls =
            self.handshaker.is_some() && !(kind == ClientKind::Bad && self.random.chance(128));
        client.tls = speaks_tls.then(|| ClientTls::new(number));
        if stands_by {
            (client.stands_by, client.reading) = (true, Reading::Prompt);
        }
        self.clients.push(client);
        self.active.push(number);
        self.summary.clients += 1;
        self.send_some(number);
    }

    pub(super) fn client_acts(&mut self) {
        if self.active.is_empty() || self.shard.is_none() {
            return;
        }
        let number = self.active[self.random.below(self.active.len())];
        if self.resting {
            return self.read_all(number);
        }
        if self.clients[number].stands_by {
            return self.stand_by(number);
        }
        match self.random.below(32) {
            0..=11 => self.send_some(number),
            12..=24 => self.read_some(number),
            25..=28 => self.speak(number),
            29 if self.random.chance(self.setup.floods) => self.flood(number),
            29 => self.speak(number),
            _ => self.leave(number),
        }
    }

    /// Sends a random part of a client's queued bytes.
    pub(super) fn send_some(&mut self, number: usize) {
        let (now_ms, message_ms_max) = (self.now_ms(), self.setup.config.message_ms_max);
        let client = &mut self.clients[number];
        if client.outbox.is_empty() {
            return;
        }
        let all = client.outbox.len();
        let length = if self.random.chance(200) { all } else { 1 + self.random.below(all) };
        let bytes = client.takes(length, now_ms, message_ms_max);
        note(TraceEvent::Sends(number, "bytes", length));
        self.client_says(number, &bytes);
    }

    fn read_some(&mut self, number: usize) {
        let client = &self.clients[number];
        let limit = match client.reading {
            Reading::Prompt => usize::MAX,
            Reading::Slow => self.random.below(200),
            Reading::Stalled => return,
        };
        let socket = client.socket;
        note(TraceEvent::Reads(number, limit));
        self.kernel().client_reads(socket, limit);
    }

    /// Reads everything and sends all queued bytes.
    pub(super) fn read_all(&mut self, number: usize) {
        let socket = self.clients[number].socket;
        self.kernel().client_reads(socket, usize::MAX);
        let (now_ms, message_ms_max) = (self.now_ms(), self.setup.config.message_ms_max);
        let client = &mut self.clients[number];
        let bytes = client.takes(client.outbox.len(), now_ms, message_ms_max);
        self.client_says(number, &bytes);
        let client = &mut self.clients[number];
        if client.session.close_seen.is_some() && client.may_send() {
            client.answer_close(&mut self.random);
        }
    }

    fn speak(&mut self, number: usize) {
        let client = &mut self.clients[number];
        if !client.may_send() || client.answered != Some(101) || client.outbox.len() > 100_000 {
            return;
        }
        let random = &mut self.random;
        if client.session.close_seen.is_some() {
            return client.answer_close(random);
        }
        if client.kind == ClientKind::Echo {
            return match random.below(16) {
                0 => client.queue_ping(random),
                1 => client.queue_close(random),
                _ => client.queue_echo(random),
            };
        }
        match random.below(64) {
            0 => client.queue_close(random),
            1 if client.tls.is_some() && random.chance(128) => self.break_records(number),
            1 => client.queue_violation(random),
            2 => client.queue_flood(random),
            3..=15 => client.queue_ping(random),
            16..=20 => client.queue_pong(random),
            21..=28 => client.queue_meaningless(random),
            _ => client.queue_text(random),
        }
    }

    /// A client sends without pause from now on, first what it has queued.
    fn flood(&mut self, number: usize) {
        let client = &mut self.clients[number];
        if client.acts.floods || client.acts.ended || client.acts.reset {
            return;
        }
        (client.acts.floods, client.acts.broke_protocol) = (true, true);
        client.reading = Reading::Stalled;
        let (socket, bytes): (_, Vec<u8>) = (client.socket, client.outbox.drain(..).collect());
        note(TraceEvent::Floods(number));
        self.kernel().client_sends(socket, &bytes);
        self.kernel().client_floods(socket);
    }

    /// Now and then, shuts down or resets a client's connection without a close frame.
    fn leave(&mut self, number: usize) {
        if !self.random.chance(self.setup.leaving) {
            return;
        }
        let client = &mut self.clients[number];
        let socket = client.socket;
        if client.acts.reset || client.acts.ended || client.acts.floods {
            return;
        }
        if self.random.chance(128) {
            client.acts.reset = true;
            note(TraceEvent::Resets(number));
            self.kernel().client_resets(socket);
        } else {
            client.acts.ended = true;
            note(TraceEvent::Ends(number));
            self.kernel().client_ends(socket);
        }
    }
}
