//! A whole connection: a stream of bytes cut at arbitrary places tells what it tells uncut, holds
//! nothing when it ends between messages, and says what tungstenite says.

use delivery::protocol::receiver::{Flow, Incoming, MessageKind, ReceiveRules, Receiver, Scratch};

use super::input::{Input, frames};
use super::oracle::{self, Outcome, Told};

/// First byte: the rules and the kind of input. Second byte: how it is cut. Then the stream, as
/// bytes or as a script of frames.
pub fn check(data: &[u8]) {
    let mut input = Input(data);
    let shape = input.byte();
    let cut = input.byte();
    let rules = ReceiveRules {
        message_bytes_max: match shape & 0x83 {
            0 | 0x80 => 64,
            1 | 0x81 => 1000,
            2 => 4000,
            // Seldom, because the oracle is then fed as many zeros.
            0x82 => 70_000,
            _ => 0,
        },
        deflate: shape & 4 != 0,
    };
    let stream = if shape & 8 == 0 { input.0.to_vec() } else { frames(&mut input) };
    check_stream(&stream, &rules, cut);
}

/// Checks one stream, cut as `cut` seeds it.
pub fn check_stream(stream: &[u8], rules: &ReceiveRules, cut: u8) {
    let uncut = receive([stream.to_vec()], rules);
    let pieces = cut_by(stream, cut);
    assert_eq!(receive(pieces, rules), uncut, "cut and uncut differ");
    if !rules.deflate {
        oracle::compare(stream, rules.message_bytes_max, &uncut);
    }
}

/// Feeds the pieces to a receiver.
pub fn receive(pieces: impl IntoIterator<Item = Vec<u8>>, rules: &ReceiveRules) -> Outcome {
    let mut receiver = Receiver::default();
    let mut scratch = Scratch::default();
    let mut outcome = Outcome { told: Vec::new(), fault: None };
    for mut piece in pieces {
        let told = &mut outcome.told;
        let verdict = receiver.receive(&mut piece, rules, &mut scratch, &mut |incoming| {
            told.push(owned(incoming, rules));
            Flow::Continue
        });
        if let Err(fault) = verdict {
            assert_eq!(outcome.fault.replace(fault), None, "a fault after a fault");
            assert!((1000..1015).contains(&fault.close().code.0));
        }
    }
    let bound = 512 + 2 * (rules.message_bytes_max + rules.message_bytes_max / 256 + 64);
    assert!(receiver.held_bytes() <= bound, "holds {} bytes", receiver.held_bytes());
    if outcome.fault.is_some() || matches!(outcome.told.last(), Some(Told::Close(_))) {
        assert_eq!(receiver.held_bytes(), 0, "holds memory after its end");
    }
    outcome
}

fn owned(incoming: Incoming<'_>, rules: &ReceiveRules) -> Told {
    match incoming {
        Incoming::Message { kind, payload, compressed } => {
            assert!(payload.len() <= rules.message_bytes_max, "over the limit");
            assert!(rules.deflate || !compressed);
            match kind {
                MessageKind::Text => {
                    assert!(std::str::from_utf8(payload).is_ok());
                    Told::Text(payload.to_vec())
                }
                MessageKind::Binary => Told::Binary(payload.to_vec()),
            }
        }
        Incoming::Ping(payload) => Told::Ping(payload.to_vec()),
        Incoming::Pong(payload) => Told::Pong(payload.to_vec()),
        Incoming::Close(close) => {
            Told::Close(close.map(|(code, reason)| (code.0, reason.to_owned())))
        }
    }
}

/// Pieces of 1 to 16 or 1 to 4096 bytes, pseudo-random from the seed; for seed 0 single bytes.
fn cut_by(stream: &[u8], seed: u8) -> Vec<Vec<u8>> {
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
