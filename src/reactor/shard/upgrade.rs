//! From the upgrade request to the session.

use super::{SESSION_MANAGER, Shard};
use crate::domain::close::EndReason;
use crate::domain::command::{Hello, Refusal, ShardReport};
use crate::domain::ids::ConnectionKey;
use crate::protocol::phase::Signal;
use crate::protocol::upgrade::{self, Refused, Route, Upgrade, UpgradeRequest};
use crate::reactor::connection::{Deciding, Flags, Holding, Lifecycle};
use crate::reactor::queue::SendQueue;
use crate::uring::Kernel;

impl<K: Kernel> Shard<K> {
    /// Handles bytes of the request. It usually arrives in one piece and is parsed in the receive
    /// buffer.
    pub(super) fn handshake_bytes(&mut self, key: ConnectionKey, bytes: &[u8]) {
        let Lifecycle::Handshake(handshake) = &mut self.slab[key].lifecycle else {
            panic!("request bytes outside the handshake");
        };
        let kept = !handshake.input.is_empty();
        if kept {
            handshake.input.extend_from_slice(bytes);
        }
        let input = if kept { &handshake.input[..] } else { bytes };
        match upgrade::parse_on(input, &self.config.upgrade, &mut handshake.progress) {
            Ok(Upgrade::NeedMore) if kept => {}
            Ok(Upgrade::NeedMore) => handshake.input.extend_from_slice(bytes),
            Ok(Upgrade::Complete(request, consumed)) => {
                let rest = input[consumed..].to_vec();
                let address = handshake.peer;
                match request.route {
                    Route::Session => self.requested(key, *request, address, rest),
                    Route::Echo => self.open_echo(key, &request, rest),
                }
            }
            Err(refused) => {
                self.counters.counts.requests_refused.add(1);
                self.answer(key, &refused, EndReason::Refused);
            }
        }
    }

    /// A request for a session: the session manager decides.
    fn requested(
        &mut self,
        key: ConnectionKey,
        request: UpgradeRequest,
        address: std::net::IpAddr,
        rest: Vec<u8>,
    ) {
        let deciding = Deciding {
            response: upgrade::response_101(&request).into(),
            deflate: request.deflate.is_some(),
            held: SendQueue::new(request.encoding()),
            rest,
        };
        let hello = Hello {
            encoding: request.encoding(),
            user_id: request.user_id,
            device_id: request.device_id,
            token: request.token,
            address,
        };
        let deadline = self.after(self.config.handshake_ms_max);
        self.set_lifecycle(key, Lifecycle::Deciding(Box::new(deciding)));
        let connection = &mut self.slab[key];
        connection.flags.set(Flags::OPENED);
        connection.deadline = deadline.into();
        self.schedule(key);
        let hello = Box::new(hello);
        self.reports.push(SESSION_MANAGER, ShardReport::Opened { connection: key, hello });
    }

    fn open_echo(&mut self, key: ConnectionKey, request: &UpgradeRequest, mut rest: Vec<u8>) {
        let window_bits = request.deflate.map(|deflate| deflate.server_window_bits);
        self.set_lifecycle(key, Lifecycle::Echo(window_bits));
        self.open(key, upgrade::response_101(request).into(), request.deflate.is_some());
        if !rest.is_empty() {
            self.frames(key, &mut rest);
        }
    }

    /// The session manager admits the session.
    pub(super) fn admit(&mut self, key: ConnectionKey) {
        let deadline = self.after(self.config.resume_grace_ms);
        let deciding = match self.slab.get_mut(key).map(|connection| &mut connection.lifecycle) {
            Some(Lifecycle::Deciding(deciding)) => deciding,
            _ => return self.counters.counts.commands_stale.add(1),
        };
        let encoding = deciding.held.encoding();
        let queue = std::mem::replace(&mut deciding.held, SendQueue::new(encoding));
        let holding =
            Lifecycle::Holding(Box::new(Holding { queue, deadline, delivered_by_catch_up: None }));
        let Lifecycle::Deciding(deciding) = self.set_lifecycle(key, holding) else {
            panic!("the lifecycle was checked above");
        };
        self.slab[key].queue.set_encoding(encoding);
        self.open(key, deciding.response, deciding.deflate);
        let mut rest = deciding.rest;
        if !rest.is_empty() {
            self.frames(key, &mut rest);
        }
        self.receive_on(key);
    }

    /// Queues the 101.
    fn open(&mut self, key: ConnectionKey, response: Box<[u8]>, deflate: bool) {
        self.counters.counts.upgraded.add(1);
        let connection = &mut self.slab[key];
        connection.phase =
            connection.phase.next(Signal::UpgradeSent).expect("the phase was upgrading");
        connection.last_received = self.now.into();
        if deflate {
            connection.flags.set(Flags::DEFLATE);
        }
        self.push_own(key, response);
        self.schedule(key);
    }

    /// The session manager refuses the session.
    pub(super) fn refuse(&mut self, key: ConnectionKey, refusal: Refusal) {
        let Some(Lifecycle::Deciding(_)) =
            self.slab.get(key).map(|connection| &connection.lifecycle)
        else {
            return self.counters.counts.commands_stale.add(1);
        };
        self.counters.counts.requests_refused_by_service.add(1);
        self.answer(key, &Refused::from(refusal), EndReason::Refused);
        self.receive_on(key);
    }
}
