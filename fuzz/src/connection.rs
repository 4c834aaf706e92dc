//! A complete connection: the receiver emits the same for a stream however it is split, holds bounded
//! memory, and agrees with tungstenite.

use delivery::protocol::receiver::{Flow, Incoming, MessageKind, ReceiveRules, Receiver, Scratch};

use tungstenite::Message;
use tungstenite::protocol::CloseFrame;

use super::input::{FuzzInput, frames};
use super::oracle::{self, Transcript};

/// First byte: the rules and the kind of input. Second byte: how the stream is split. Rest: the
/// stream, as bytes or as a script of frames.
pub fn check(data: &[u8]) {
    let mut input = FuzzInput(data);
    let shape = input.byte();
    let split_seed = input.byte();
    let rules = ReceiveRules {
        message_bytes_max: match shape & 0x83 {
            0 | 0x80 => 64,
            1 | 0x81 => 1000,
            2 => 4000,
            // Rare, because the oracle is fed as many zeros.
            0x82 => 70_000,
            _ => 0,
        },
        deflate: shape & 4 != 0,
    };
    let stream = if shape & 8 == 0 { input.0.to_vec() } else { frames(&mut input) };
    let transcript = receive([stream.clone()], &rules);
    let pieces = split(&stream, split_seed);
    assert_eq!(receive(pieces, &rules), transcript, "depends on how the stream is split");
    if !rules.deflate {
        oracle::compare(&stream, rules.message_bytes_max, &transcript);
    }
}

/// Passes the pieces to a receiver.
fn receive(pieces: impl IntoIterator<Item = Vec<u8>>, rules: &ReceiveRules) -> Transcript {
    let mut receiver = Receiver::default();
    let mut scratch = Scratch::default();
    let mut transcript = Transcript { incoming: Vec::new(), error: None };
    for mut piece in pieces {
        let received = &mut transcript.incoming;
        let result = receiver.receive(&mut piece, rules, &mut scratch, &mut |incoming| {
            received.push(owned(incoming, rules));
            Flow::Continue
        });
        if let Err(error) = result {
            assert_eq!(transcript.error.replace(error), None, "an error after an error");
            assert!((1000..1015).contains(&error.close().code.0));
        }
    }
    let held_max = 512 + 2 * (rules.message_bytes_max + rules.message_bytes_max / 256 + 64);
    assert!(receiver.held_bytes() <= held_max, "holds {} bytes", receiver.held_bytes());
    if transcript.error.is_some() || transcript.incoming.last().is_some_and(Message::is_close) {
        assert_eq!(receiver.held_bytes(), 0, "holds memory after it has stopped");
    }
    transcript
}

fn owned(incoming: Incoming<'_>, rules: &ReceiveRules) -> Message {
    match incoming {
        Incoming::Message { kind, payload, compressed } => {
            assert!(payload.len() <= rules.message_bytes_max, "over the limit");
            assert!(rules.deflate || !compressed);
            match kind {
                MessageKind::Text => Message::text(std::str::from_utf8(payload).expect("checked")),
                MessageKind::Binary => Message::binary(payload.to_vec()),
            }
        }
        Incoming::Ping(payload) => Message::Ping(payload.to_vec().into()),
        Incoming::Pong(payload) => Message::Pong(payload.to_vec().into()),
        Incoming::Close(close) => Message::Close(
            close.map(|(code, reason)| CloseFrame { code: code.0.into(), reason: reason.into() }),
        ),
    }
}

/// Pieces of 1 to 16 or 1 to 4096 bytes, pseudo-random from the seed; single bytes for seed 0.
fn split(stream: &[u8], seed: u8) -> Vec<Vec<u8>> {
    let longest = if seed & 1 == 0 { 16 } else { 4096 };
    let mut state = u32::from(seed);
    let mut pieces = Vec::new();
    let mut rest = stream;
    while !rest.is_empty() {
        state = state.wrapping_mul(0x915f_77f5).wrapping_add(u32::from(seed));
        let len = (1 + (state >> 16) as usize % longest).min(rest.len());
        pieces.push(rest[..len].to_vec());
        rest = &rest[len..];
    }
    pieces
}
