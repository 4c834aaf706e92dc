//! The parts of the hot path, each against the best crate that does the same.
//!
//!     cargo bench --manifest-path bench/Cargo.toml

use std::hint::black_box;
use std::io::Cursor;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use delivery::domain::encoding::Encoding;
use delivery::domain::ids::{ConnectionKey, SessionAddress, ShardId};
use delivery::domain::limits::HANDOFF_RING_SLOTS;
use delivery::handoff::{Doorbell, Pushed, ring};
use delivery::protocol::receiver::{Flow, ReceiveRules, Receiver, Scratch};
use delivery::protocol::{mask, utf8};
use delivery::service::events::envelope;
use delivery::service::events::proto::message::v1::MessageSentEvent;
use delivery::service::events::proto::shared::v1::EventEnvelope;
use delivery::service::members::directory::{Directory, SessionIds};
use delivery_bench::names;
use delivery_bench::payload::{Stamp, Template};
use prost::Message as _;
use tungstenite::protocol::{Role, WebSocket};

/// So many frames in one receive buffer.
const FRAMES: usize = 16;
const KEY: [u8; 4] = [0x12, 0x34, 0x56, 0x78];

fn client_frames(payload: usize) -> Vec<u8> {
    let mut frames = Vec::new();
    for _ in 0..FRAMES {
        frames.push(0x82);
        frames.push(0x80 | payload as u8);
        frames.extend_from_slice(&KEY);
        let mut masked = vec![b'x'; payload];
        mask::apply(&mut masked, KEY);
        frames.extend_from_slice(&masked);
    }
    frames
}

fn decode(c: &mut Criterion) {
    let frames = client_frames(100);
    let mut group = c.benchmark_group("decode 16 frames of 100 bytes");
    group.throughput(Throughput::Elements(FRAMES as u64));
    group.bench_function("ours", |b| {
        let rules = ReceiveRules { message_bytes_max: 1 << 20, deflate: false };
        let (mut receiver, mut scratch) = (Receiver::default(), Scratch::default());
        b.iter_batched_ref(
            || frames.clone(),
            |input| {
                let mut seen = 0;
                receiver
                    .receive(input, &rules, &mut scratch, &mut |incoming| {
                        black_box(incoming);
                        seen += 1;
                        Flow::Continue
                    })
                    .unwrap();
                assert_eq!(seen, FRAMES);
            },
            BatchSize::SmallInput,
        );
    });
    group.bench_function("tungstenite", |b| {
        b.iter_batched(
            || WebSocket::from_raw_socket(Cursor::new(frames.clone()), Role::Server, None),
            |mut socket| {
                for _ in 0..FRAMES {
                    black_box(socket.read().unwrap());
                }
            },
            BatchSize::SmallInput,
        );
    });
    group.finish();
}

fn unmask(c: &mut Criterion) {
    for bytes in [100, 4096] {
        let mut group = c.benchmark_group(format!("unmask {bytes} bytes"));
        group.throughput(Throughput::Bytes(bytes));
        let mut payload = vec![b'x'; bytes as usize];
        group.bench_function("ours", |b| b.iter(|| mask::apply(black_box(&mut payload), KEY)));
        group.bench_function("fastwebsockets", |b| {
            b.iter(|| fastwebsockets::unmask(black_box(&mut payload), KEY));
        });
        group.finish();
    }
}

fn text(c: &mut Criterion) {
    let line = "Grüße, мир, 世界 and plain ASCII as most of it is. ".repeat(20);
    let mut group = c.benchmark_group("check 1 KB of UTF-8");
    group.throughput(Throughput::Bytes(line.len() as u64));
    group.bench_function("ours", |b| {
        b.iter(|| black_box(utf8::as_text(black_box(line.as_bytes()))))
    });
    group.bench_function("std", |b| {
        b.iter(|| black_box(std::str::from_utf8(black_box(line.as_bytes()))))
    });
    group.finish();
}

fn envelopes(c: &mut Criterion) {
    let value = Template::new(256).envelope(1, Stamp { sequence: 5, intended_ns: 6 });
    let mut group = c.benchmark_group("read an envelope of 256 bytes");
    group.bench_function("ours", |b| {
        b.iter(|| black_box(envelope::decode(black_box(&value)).unwrap().conversation().is_some()));
    });
    group.bench_function("prost", |b| {
        b.iter(|| {
            let envelope = EventEnvelope::decode(black_box(&value[..])).unwrap();
            let event = MessageSentEvent::decode(envelope.payload).unwrap();
            black_box(event.message.unwrap().conversation_id.len())
        });
    });
    group.finish();
}

fn routing(c: &mut Criterion) {
    const SESSIONS: usize = 200_000;
    let address = |slot: usize| SessionAddress {
        shard: ShardId(0),
        encoding: Encoding::Binary,
        connection: ConnectionKey { slot: slot as u32, generation: 0 },
    };
    let users: Vec<String> = (0..SESSIONS).map(names::user).collect();
    let ours = Directory::new();
    let map = dashmap::DashMap::new();
    for (at, user) in users.iter().enumerate() {
        ours.insert(SessionIds::new(user, &names::device(at)), address(at));
        map.insert(user.clone(), vec![address(at)]);
    }
    let mut at = 0;
    let mut next = move || {
        at = (at + 7919) % SESSIONS;
        at
    };
    let mut group = c.benchmark_group("sessions of one of 200,000 users");
    group.bench_function("ours", |b| {
        b.iter(|| {
            ours.sessions_of(&users[next()], |address| {
                black_box(address);
            })
        });
    });
    group.bench_function("dashmap", |b| {
        b.iter(|| {
            for address in map.get(&users[next()]).unwrap().iter() {
                black_box(address);
            }
        });
    });
    group.finish();
}

/// Time that a second thread needs to take `items` items that this one hands over.
fn handed_over(
    items: u64,
    mut push: impl FnMut([u64; 8]) -> bool,
    take: impl FnMut() -> bool + Send,
) -> Duration {
    let from = Instant::now();
    std::thread::scope(|scope| {
        let mut take = take;
        scope.spawn(move || {
            let mut taken = 0;
            while taken < items {
                if take() {
                    taken += 1;
                } else {
                    std::hint::spin_loop();
                }
            }
        });
        for item in 0..items {
            while !push([item; 8]) {
                std::hint::spin_loop();
            }
        }
    });
    from.elapsed()
}

fn handoff(c: &mut Criterion) {
    let mut group = c.benchmark_group("hand 64 bytes to another thread");
    group.bench_function("ours", |b| {
        b.iter_custom(|items| {
            let bell = Arc::new(Doorbell::new().unwrap());
            let (mut producer, mut consumer) = ring(HANDOFF_RING_SLOTS, bell);
            handed_over(
                items,
                move |item| {
                    let pushed = matches!(producer.push(item), Pushed::Accepted);
                    producer.publish();
                    pushed
                },
                move || consumer.pop().is_some(),
            )
        });
    });
    group.bench_function("crossbeam ArrayQueue", |b| {
        b.iter_custom(|items| {
            let queue = Arc::new(crossbeam_queue::ArrayQueue::new(HANDOFF_RING_SLOTS));
            let other = Arc::clone(&queue);
            handed_over(items, move |item| queue.push(item).is_ok(), move || other.pop().is_some())
        });
    });
    group.bench_function("tokio mpsc", |b| {
        b.iter_custom(|items| {
            let (sender, mut receiver) = tokio::sync::mpsc::channel(HANDOFF_RING_SLOTS);
            handed_over(
                items,
                move |item| sender.try_send(item).is_ok(),
                move || receiver.try_recv().is_ok(),
            )
        });
    });
    group.finish();
}

criterion_group!(parts, decode, unmask, text, envelopes, routing, handoff);
criterion_main!(parts);
