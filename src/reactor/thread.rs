//! The thread of a shard.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::mpsc;
use std::sync::{Arc, OnceLock};
use std::thread::{Builder, JoinHandle};

use crate::domain::ids::ShardId;
use crate::reactor::config::ShardConfig;
use crate::reactor::shard::{Shard, ShardLinks, Turn};
use crate::uring::{Ring, RingConfig, SetupError};

/// Why a shard could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The ring cannot be set up. The text says what to do.
    #[error("shard {}: {source}", shard.0)]
    Ring {
        /// The shard.
        shard: ShardId,
        /// The reason.
        #[source]
        source: SetupError,
    },
    /// The system cannot create a thread.
    #[error("shard {}: cannot start a thread: {source}", shard.0)]
    Thread {
        /// The shard.
        shard: ShardId,
        /// The error of the system.
        #[source]
        source: io::Error,
    },
}

/// A running shard. Its thread ends after
/// [`ShardCommand::Stop`](crate::domain::command::ShardCommand::Stop), or when the session
/// manager's rings are dropped.
#[derive(Debug)]
pub struct ShardHandle {
    thread: JoinHandle<()>,
    failure: Arc<OnceLock<io::Error>>,
}

impl ShardHandle {
    /// Whether the thread has ended.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Why the ring failed while running, if that ended the thread.
    pub fn failure(&self) -> Option<&io::Error> {
        self.failure.get()
    }

    /// Waits until the thread has ended.
    pub fn join(self) {
        self.thread.join().expect("a panic ends the process");
    }
}

/// Starts a shard that accepts from `listener`, as other shards may. It gives up the descriptor when it has registered
/// the socket with its ring.
///
/// # Errors
/// The ring or the thread cannot be created.
pub fn spawn(
    shard: ShardId,
    config: ShardConfig,
    listener: Arc<OwnedFd>,
    links: ShardLinks,
) -> Result<ShardHandle, SpawnError> {
    let ring = RingConfig {
        connections: config.slots_max(),
        receive_buffers: config.receive_buffers,
        ..RingConfig::default()
    };
    // A ring belongs to the thread that creates it, so the thread reports the outcome.
    let (report, made) = mpsc::sync_channel(1);
    let failure = Arc::new(OnceLock::new());
    let failed = Arc::clone(&failure);
    let run = move || {
        let bell = Arc::clone(&links.bell);
        let set_up = || {
            let mut ring = Ring::new(&ring)?;
            ring.listen(listener.as_fd())?;
            ring.watch_doorbell(bell.as_fd())?;
            Ok(ring)
        };
        let kernel = match set_up() {
            Ok(ring) => ring,
            Err(source) => {
                // `spawn` waits for this report, so the send succeeds.
                let _ = report.send(Err(source));
                return;
            }
        };
        drop(listener);
        let _ = report.send(Ok(()));
        let mut shard = Shard::new(kernel, config, links);
        let error = loop {
            match shard.turn() {
                Ok(Turn::Done) => {}
                Ok(_) => return,
                Err(error) => break error,
            }
        };
        // Before the shard drops its rings, so that whoever notices its end finds the reason.
        let _ = failed.set(error);
    };
    let thread = Builder::new()
        .name(format!("shard-{}", shard.0))
        .spawn(run)
        .map_err(|source| SpawnError::Thread { shard, source })?;
    match made.recv().expect("the thread reports before it ends") {
        Ok(()) => Ok(ShardHandle { thread, failure }),
        Err(source) => Err(SpawnError::Ring { shard, source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{SocketAddr, TcpStream};
    use std::num::NonZeroU64;

    use tungstenite::{Error, HandshakeError, Message, client::IntoClientRequest as _};

    use crate::domain::capacity::Capacity;
    use crate::domain::close::{Close, CloseCode, EndReason};
    use crate::domain::command::{DeliveryClass, Recipients, ShardCommand, ShardReport, Ticket};
    use crate::domain::encoding::Encoding;
    use crate::domain::event::Event;
    use crate::domain::ids::ConnectionKey;
    use crate::domain::limiter::{ConnectionLimiter, ConnectionLimits};
    use crate::domain::limits::HANDOFF_RING_SLOTS;
    use crate::handoff::{Doorbell, PeerEnd, Pushed, connect};
    use crate::protocol::frame::{self, Opcode};
    use crate::protocol::upgrade::UpgradeRules;
    use crate::reactor::counters::ShardCounters;
    use crate::reactor::listener::{ListenerConfig, listen_on};

    /// A shard, and the service side's ends of its rings.
    struct Rig {
        address: SocketAddr,
        peer: PeerEnd,
        bell: Arc<Doorbell>,
        counters: Arc<ShardCounters>,
        handle: ShardHandle,
    }

    impl Rig {
        fn start() -> Self {
            Self::start_some(1, 200).remove(0)
        }

        /// Shards with room for `connections_max` connections each, on one address.
        fn start_some(shards: u16, connections_max: u32) -> Vec<Self> {
            let listen = ListenerConfig::new("127.0.0.1:0".parse().unwrap());
            let (listener, address) = listen_on(&listen).unwrap();
            let listener = Arc::new(listener);
            let capacity = Arc::new(Capacity::new(u32::from(shards) * connections_max));
            let start = |shard| {
                let (listener, capacity) = (Arc::clone(&listener), Arc::clone(&capacity));
                Self::start_one(ShardId(shard), connections_max, address, listener, capacity)
            };
            (0..shards).map(start).collect()
        }

        fn start_one(
            shard: ShardId,
            connections_max: u32,
            address: SocketAddr,
            listener: Arc<OwnedFd>,
            capacity: Arc<Capacity>,
        ) -> Self {
            let (shard_bell, bell) =
                (Arc::new(Doorbell::new().unwrap()), Arc::new(Doorbell::new().unwrap()));
            let (peer, end) = connect([HANDOFF_RING_SLOTS; 2], &shard_bell, &bell);
            let counters = Arc::new(ShardCounters::default());
            let config = ShardConfig {
                connections_max,
                upgrade: UpgradeRules { echo: true, ..UpgradeRules::default() },
                ..ShardConfig::default()
            };
            let links = ShardLinks {
                peers: vec![end],
                bell: shard_bell,
                limiter: Arc::new(ConnectionLimiter::new(ConnectionLimits::default())),
                capacity,
                counters: Arc::clone(&counters),
                handshaker: None,
            };
            let handle = spawn(shard, config, listener, links).unwrap();
            Self { address, peer, bell, counters, handle }
        }

        fn report(&mut self) -> ShardReport {
            loop {
                if let Some(report) = self.peer.reports.pop() {
                    return report;
                }
                self.bell.about_to_sleep();
                if self.peer.reports.is_empty() {
                    self.bell.wait(10_000);
                }
                self.bell.awake();
            }
        }

        fn command(&mut self, command: ShardCommand) {
            assert!(matches!(self.peer.commands.push(command), Pushed::Accepted));
            self.peer.commands.publish();
        }

        fn connect(&self, path: &str) -> tungstenite::WebSocket<TcpStream> {
            self.try_connect(path).expect("101")
        }

        /// The status of a refusal, if it does not answer 101.
        fn try_connect(&self, path: &str) -> Result<tungstenite::WebSocket<TcpStream>, u16> {
            let stream = TcpStream::connect(self.address).unwrap();
            let request = format!("ws://{}{path}", self.address).into_client_request().unwrap();
            match tungstenite::client(request, stream) {
                Ok((client, _)) => Ok(client),
                Err(HandshakeError::Failure(Error::Http(answer))) => Err(answer.status().as_u16()),
                Err(error) => panic!("{error}"),
            }
        }

        /// Connects a session and admits it.
        fn session(&mut self) -> (tungstenite::WebSocket<TcpStream>, ConnectionKey) {
            std::thread::scope(|scope| {
                let address = self.address;
                let client = scope.spawn(move || {
                    let stream = TcpStream::connect(address).unwrap();
                    let url = format!("ws://{address}/ws?user_id=u&device_id=d");
                    tungstenite::client(url.into_client_request().unwrap(), stream).unwrap().0
                });
                let ShardReport::Opened { connection, hello } = self.report() else { panic!() };
                assert_eq!((&hello.user_id[..], &hello.device_id[..]), ("u", "d"));
                self.command(ShardCommand::Admit { connection });
                (client.join().unwrap(), connection)
            })
        }

        fn stop(mut self) {
            let close = Close::new(CloseCode::GOING_AWAY, "server closing");
            self.command(ShardCommand::Stop { close });
            while !matches!(self.report(), ShardReport::Stopped) {}
            assert!(self.handle.failure().is_none());
            self.handle.join();
            assert_eq!(self.counters.counts.slots_used.get(), 0);
        }
    }

    fn event(payload: &[u8]) -> Arc<Event> {
        let frame = frame::encode(Opcode::Binary, false, payload);
        Arc::new(Event::new(None, 0).with_frame(Encoding::Binary, frame))
    }

    #[test]
    fn echo_comes_back() {
        let rig = Rig::start();
        let mut client = rig.connect("/echo");
        for length in [0, 1, 125, 126, 5_000, 70_000, 1_000_000] {
            let sent = Message::binary(vec![7; length]);
            client.send(sent.clone()).unwrap();
            assert_eq!(client.read().unwrap(), sent);
        }
        client.close(None).unwrap();
        while client.read().is_ok() {}
        rig.stop();
    }

    #[test]
    fn clients_get_the_room_of_all_shards_and_a_refusal_only_when_none_is_left() {
        let rigs = Rig::start_some(2, 16);
        let mut clients: Vec<_> = (0..32).map(|_| rigs[0].connect("/echo")).collect();
        assert_eq!(rigs[0].try_connect("/echo").err(), Some(503));
        let used = |rig: &Rig| rig.counters.counts.echoes.get();
        assert_eq!(rigs.iter().map(used).sum::<u64>(), 32);
        // When one has left, another gets its place, whichever shard it is of.
        for index in [0, 31, 16] {
            let mut client = clients.swap_remove(index);
            client.close(None).unwrap();
            while client.read().is_ok() {}
            drop(client);
            let next = std::iter::repeat_with(|| rigs[0].try_connect("/echo"));
            clients.push(next.take(1_000).find_map(Result::ok).expect("a place is free"));
        }
        drop(clients);
        rigs.into_iter().for_each(Rig::stop);
    }

    #[test]
    fn event_reaches_a_session_and_is_reported_done() {
        let mut rig = Rig::start();
        let (mut client, connection) = rig.session();
        rig.command(ShardCommand::GoLive { connection, delivered: Box::default() });
        for number in 1..=100_u64 {
            rig.command(ShardCommand::Deliver {
                event: event(&number.to_be_bytes()),
                recipients: Recipients::One((connection, Encoding::Binary)),
                class: DeliveryClass::Live,
                ticket: NonZeroU64::new(number).map(Ticket),
            });
        }
        for number in 1..=100_u64 {
            assert_eq!(client.read().unwrap(), Message::binary(number.to_be_bytes().to_vec()));
            let ShardReport::Done { ticket } = rig.report() else { panic!() };
            assert_eq!(ticket.0.get(), number);
        }
        client.send(Message::text(r#"{"last_sequences":{}}"#)).unwrap();
        let ShardReport::Message { text, .. } = rig.report() else { panic!() };
        assert_eq!(&*text, r#"{"last_sequences":{}}"#);
        client.close(None).unwrap();
        while client.read().is_ok() {}
        let ShardReport::Ended { connection: ended, why } = rig.report() else { panic!() };
        assert_eq!((ended, why), (connection, EndReason::ClosedByPeer));
        rig.stop();
    }

    #[test]
    fn stop_closes_open_connections() {
        let mut rig = Rig::start();
        let (mut client, _) = rig.session();
        let reader = std::thread::spawn(move || {
            let closed = client.read().unwrap();
            while client.read().is_ok() {}
            closed
        });
        rig.stop();
        let Message::Close(Some(close)) = reader.join().unwrap() else { panic!() };
        assert_eq!((u16::from(close.code), &close.reason[..]), (1001, "server closing"));
    }
}
