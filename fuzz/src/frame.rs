//! The frame header decoder: encoding a decoded header yields the input; it requests more input only
//! if it needs it; an error does not depend on the bytes that follow.

use delivery::protocol::frame::{ClientHeader, HeaderContext, HeaderStep};

/// Checks the header at the front of `data` in every context.
pub fn check(data: &[u8]) {
    for (deflate, message_open) in [(false, false), (false, true), (true, false), (true, true)] {
        check_in(data, HeaderContext { deflate, message_open });
    }
}

fn check_in(data: &[u8], context: HeaderContext) {
    let mut needed = 1;
    for len in 0..=data.len().min(20) {
        let prefix = &data[..len];
        match ClientHeader::decode(prefix, context) {
            Ok(HeaderStep::NeedMore(total)) => {
                assert!(total > len && total >= needed, "needs less than it has or needed before");
                needed = total;
            }
            Ok(HeaderStep::Complete(header, used)) => {
                assert!(used == len && needed <= used, "complete later or earlier than announced");
                assert_eq!(encode(&header), prefix);
                // The bytes after the header do not change the result.
                assert_eq!(
                    ClientHeader::decode(data, context),
                    Ok(HeaderStep::Complete(header, used))
                );
                return;
            }
            Err(error) => {
                assert_eq!(ClientHeader::decode(data, context), Err(error));
                return;
            }
        }
    }
    assert!(data.len() < 14, "14 bytes are always a header or an error");
}

/// The only valid encoding of a header (RFC 6455 §5.2).
fn encode(header: &ClientHeader) -> Vec<u8> {
    let first = (u8::from(header.fin) << 7) | (u8::from(header.rsv1) << 6) | header.opcode as u8;
    let mut bytes = vec![first];
    match header.length {
        length @ 0..=125 => bytes.push(0x80 | length as u8),
        length @ 126..=0xffff => {
            bytes.push(0x80 | 126);
            bytes.extend((length as u16).to_be_bytes());
        }
        length => {
            bytes.push(0x80 | 127);
            bytes.extend(length.to_be_bytes());
        }
    }
    bytes.extend(header.key);
    bytes
}
