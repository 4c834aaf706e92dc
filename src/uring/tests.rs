//! The ring against the real kernel, over loopback.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use super::clock::EPOCH_MS;
use super::*;
use crate::domain::ids::ConnectionKey;
use crate::domain::limits::{ACCEPTS_IN_FLIGHT_MAX, RECEIVE_BUFFER_BYTES};

const CONFIG: RingConfig = RingConfig { connections: 128, receive_buffers: 4, submissions: 8 };

fn key(slot: u32) -> ConnectionKey {
    ConnectionKey { slot, generation: slot + 5 }
}

fn listening() -> (Ring, TcpListener) {
    let mut ring = Ring::new(&CONFIG).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    ring.listen(listener.as_fd()).unwrap();
    (ring, listener)
}

fn next(ring: &mut Ring) -> Completion<Lease> {
    loop {
        if let Some(completion) = ring.next_completion() {
            return completion;
        }
        ring.enter(Wait::Forever).unwrap();
    }
}

/// A ring, and a client whose socket is its file 0.
fn connected() -> (Ring, TcpStream) {
    let (mut ring, listener) = listening();
    ring.accept(key(0));
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    match next(&mut ring) {
        Completion::Accepted { connection, peer } => {
            assert_eq!((connection, peer), (key(0), client.local_addr().unwrap()));
        }
        other => panic!("{other:?}"),
    }
    (ring, client)
}

fn receive(ring: &mut Ring) -> Received<Lease> {
    ring.receive(key(0));
    match next(ring) {
        Completion::Received { connection, received } => {
            assert_eq!(connection, key(0));
            received
        }
        other => panic!("{other:?}"),
    }
}

fn send(ring: &mut Ring, bytes: Vec<u8>) -> Result<usize, Errno> {
    ring.send(key(0), SendBuffer::batch(bytes.clone()));
    match next(ring) {
        Completion::Sent { connection, buffer, result } => {
            assert_eq!((connection, &buffer[..]), (key(0), &bytes[..]));
            result
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn accepts_name_their_slots_and_peers() {
    let (mut ring, listener) = listening();
    for slot in 0..ACCEPTS_IN_FLIGHT_MAX as u32 {
        ring.accept(key(slot));
    }
    let address = listener.local_addr().unwrap();
    let clients: Vec<_> =
        (0..ACCEPTS_IN_FLIGHT_MAX).map(|_| TcpStream::connect(address).unwrap()).collect();
    let mut peers = Vec::new();
    for _ in &clients {
        let Completion::Accepted { connection, peer } = next(&mut ring) else {
            panic!("an accept failed");
        };
        peers.push((peer, connection.slot as u8));
    }
    // The client with that address receives what is sent through the slot.
    for (_, slot) in &peers {
        ring.send(key(u32::from(*slot)), SendBuffer::batch(vec![*slot]));
    }
    for _ in &clients {
        assert!(matches!(next(&mut ring), Completion::Sent { result: Ok(1), .. }));
    }
    for mut client in clients {
        let mut byte = [0];
        client.read_exact(&mut byte).unwrap();
        assert!(peers.contains(&(client.local_addr().unwrap(), byte[0])));
    }
}

#[test]
fn poll_announces_data_and_the_end_of_stream() {
    let (mut ring, mut client) = connected();
    ring.poll_readable(key(0));
    for text in [b"first", b"again"] {
        client.write_all(text).unwrap();
        match next(&mut ring) {
            Completion::Readable { connection, armed: true, broken: false } => {
                assert_eq!(connection, key(0));
            }
            other => panic!("{other:?}"),
        }
        let Received::Bytes { mut lease, more: false } = receive(&mut ring) else {
            panic!("nothing received");
        };
        assert_eq!(*lease, *text);
        lease[0] = b'!'; // ours to change
        assert!(matches!(receive(&mut ring), Received::Nothing));
    }
    drop(client);
    assert!(matches!(next(&mut ring), Completion::Readable { .. }));
    assert!(matches!(receive(&mut ring), Received::End));
}

#[test]
fn data_beyond_one_buffer_is_announced() {
    let (mut ring, mut client) = connected();
    let text: Vec<u8> = (0..RECEIVE_BUFFER_BYTES + 100).map(|n| n as u8).collect();
    client.write_all(&text).unwrap();
    let mut got = Vec::new();
    loop {
        match receive(&mut ring) {
            Received::Bytes { lease, more } => {
                got.extend_from_slice(&lease);
                assert_eq!(more, got.len() < text.len());
            }
            Received::Nothing if got.len() < text.len() => {} // still on its way
            Received::Nothing => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(got, text);
}

#[test]
fn exhausted_buffers_lose_nothing() {
    let (mut ring, mut client) = connected();
    let mut leases = Vec::new();
    for n in 0..CONFIG.receive_buffers as u8 {
        client.write_all(&[n]).unwrap();
        leases.push(loop {
            match receive(&mut ring) {
                Received::Bytes { lease, .. } => break lease,
                Received::Nothing => {}
                other => panic!("{other:?}"),
            }
        });
    }
    client.write_all(b"x").unwrap();
    ring.poll_readable(key(0));
    assert!(matches!(next(&mut ring), Completion::Readable { .. }));
    assert!(matches!(receive(&mut ring), Received::NoBuffers));
    for (n, lease) in leases.iter().enumerate() {
        assert_eq!(**lease, [n as u8]);
    }
    drop(leases);
    let Received::Bytes { lease, .. } = receive(&mut ring) else { panic!("lost") };
    assert_eq!(*lease, *b"x");
}

#[test]
fn full_socket_takes_a_part_and_announces_room() {
    let (mut ring, mut client) = connected();
    let chunk = vec![7; 1 << 20];
    let mut sent = 0;
    loop {
        match send(&mut ring, chunk.clone()) {
            Ok(count) => sent += count,
            Err(Errno::AGAIN) => break,
            Err(other) => panic!("{other:?}"),
        }
    }
    ring.poll_writable(key(0));
    let reader = std::thread::spawn(move || {
        let mut got = vec![0; sent];
        client.read_exact(&mut got).unwrap();
        (client, got)
    });
    assert!(matches!(next(&mut ring), Completion::Writable { .. }));
    assert!(send(&mut ring, vec![8]).is_ok());
    let (mut client, got) = reader.join().unwrap();
    assert!(got.iter().all(|byte| *byte == 7));
    let mut last = [0];
    client.read_exact(&mut last).unwrap();
    assert_eq!(last, [8]);
}

#[test]
fn close_delivers_what_was_sent_and_frees_the_file() {
    let (mut ring, mut client) = connected();
    assert_eq!(send(&mut ring, b"bye".to_vec()), Ok(3));
    ring.shutdown(key(0));
    assert!(matches!(next(&mut ring), Completion::ShutDown { .. }));
    ring.close(key(0), HowToClose::Orderly);
    assert!(matches!(next(&mut ring), Completion::Closed { .. }));
    let mut text = String::new();
    client.read_to_string(&mut text).unwrap();
    assert_eq!(text, "bye");
    assert!(matches!(receive(&mut ring), Received::Failed(Errno::BADF)));
}

#[test]
fn abort_resets_the_peer() {
    let (mut ring, mut client) = connected();
    while send(&mut ring, vec![0; 1 << 20]).is_ok() {}
    ring.close(key(0), HowToClose::Abort);
    assert!(matches!(next(&mut ring), Completion::Closed { .. }));
    let error = client.read_to_end(&mut Vec::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

#[test]
fn cancel_ends_every_poll_of_the_connection() {
    let (mut ring, client) = connected();
    while send(&mut ring, vec![0; 1 << 20]).is_ok() {}
    ring.poll_readable(key(0));
    ring.poll_writable(key(0));
    ring.enter(Wait::No).unwrap();
    assert!(ring.next_completion().is_none());
    ring.cancel(key(0));
    let (mut readable, mut writable, mut cancel) = (0, 0, 0);
    for _ in 0..3 {
        match next(&mut ring) {
            Completion::Readable { armed: false, .. } => readable += 1,
            Completion::Writable { .. } => writable += 1,
            Completion::Cancelled { .. } => cancel += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((readable, writable, cancel, ring.in_flight()), (1, 1, 1, 0));
    drop(client);
}

#[test]
fn stopped_listener_ends_its_accepts_and_refuses_clients() {
    let (mut ring, listener) = listening();
    let address = listener.local_addr().unwrap();
    drop(listener); // the table's own reference keeps it open
    for slot in 0..3 {
        ring.accept(key(slot));
    }
    let client = TcpStream::connect(address).unwrap();
    assert!(matches!(next(&mut ring), Completion::Accepted { .. }));
    ring.stop_accepting();
    for _ in 0..2 {
        let Completion::AcceptFailed { error, .. } = next(&mut ring) else { panic!("no failure") };
        assert_eq!(error, Errno::CANCELED);
    }
    while ring.in_flight() > 0 {
        ring.enter(Wait::Forever).unwrap();
        assert!(ring.next_completion().is_none());
    }
    assert_eq!(TcpStream::connect(address).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    drop(client);
}

#[test]
fn doorbell_ends_a_wait_each_time() {
    let mut ring = Ring::new(&CONFIG).unwrap();
    let bell = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    ring.watch_doorbell(bell.as_fd()).unwrap();
    for _ in 0..3 {
        std::thread::scope(|scope| {
            scope.spawn(|| rustix::io::write(&bell, &1_u64.to_ne_bytes()).unwrap());
            ring.enter(Wait::Forever).unwrap();
            assert!(ring.next_completion().is_none());
        });
        rustix::io::read(&bell, &mut [0; 8]).unwrap();
    }
}

/// A shard whose doorbell is not watched would be deaf without anybody noticing.
#[test]
fn watch_that_ends_is_renewed_or_fails_the_ring() {
    let mut ring = Ring::new(&CONFIG).unwrap();
    let bell = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    ring.watch_doorbell(bell.as_fd()).unwrap();
    for result in [Ok(1), Err(Errno::NOMEM), Err(Errno::CANCELED)] {
        let watches = ring.in_flight();
        ring.doorbell_unwatched(result);
        assert_eq!(ring.in_flight(), watches + 1);
        ring.enter(Wait::No).unwrap();
    }
    ring.doorbell_unwatched(Err(Errno::BADF));
    assert_eq!(ring.enter(Wait::No).unwrap_err().raw_os_error(), Some(libc::EBADF));
}

#[test]
fn wait_ends_at_its_deadline_and_enter_reads_the_clocks() {
    let mut ring = Ring::new(&CONFIG).unwrap();
    let (before, unix_before) = (ring.now_ms(), ring.unix_ms());
    assert!(before >= EPOCH_MS);
    ring.enter(Wait::UntilMs(before)).unwrap(); // already past
    while ring.now_ms() < before + 2 {
        ring.enter(Wait::UntilMs(before + 2)).unwrap();
    }
    assert!(ring.unix_ms() > unix_before);
    assert!(ring.next_completion().is_none());
}

#[test]
fn operations_beyond_the_bound_are_queued() {
    let (mut ring, _client) = connected();
    let asked = 3 * 4096;
    for _ in 0..asked {
        ring.receive(key(0));
    }
    assert_eq!(ring.in_flight(), asked);
    for _ in 0..asked {
        let Completion::Received { received: Received::Nothing, .. } = next(&mut ring) else {
            panic!("not a receive");
        };
        assert!(!ring.has_overflown());
    }
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn dropped_ring_leaves_no_operation_in_flight() {
    let (mut ring, mut client) = connected();
    client.write_all(b"kept").unwrap();
    let lease = loop {
        match receive(&mut ring) {
            Received::Bytes { lease, .. } => break lease,
            Received::Nothing => {}
            other => panic!("{other:?}"),
        }
    };
    while send(&mut ring, vec![0; 1 << 20]).is_ok() {}
    ring.accept(key(1));
    ring.poll_readable(key(0));
    ring.poll_writable(key(0));
    ring.enter(Wait::No).unwrap();
    ring.receive(key(0)); // queued, not submitted
    ring.send(key(0), SendBuffer::batch(vec![1])); // likewise
    drop(ring);
    assert!(lease.is_last_of_its_ring(), "the buffers were leaked: something did not complete");
    assert_eq!(*lease, *b"kept");
}
