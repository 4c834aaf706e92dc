//! The frame header decoder: what it reads, written again, is what it read; what it wants more of,
//! it cannot have had enough of; a fault once seen stays.

use delivery::protocol::frame::{ClientHeader, HeaderContext, HeaderStep};

/// Checks the header at the front of `data` under every context.
pub fn check(data: &[u8]) {
    for (deflate, message_open) in [(false, false), (false, true), (true, false), (true, true)] {
        check_in(data, HeaderContext { deflate, message_open });
    }
}

fn check_in(data: &[u8], context: HeaderContext) {
    let mut wanted = 1;
    for len in 0..=data.len().min(20) {
        let prefix = &data[..len];
        match ClientHeader::decode(prefix, context) {
            Ok(HeaderStep::NeedMore(total)) => {
                assert!(total > len && total >= wanted, "asks for what it has, or for less");
                wanted = total;
            }
            Ok(HeaderStep::Complete(header, used)) => {
                assert!(used == len && wanted <= used, "whole later or earlier than announced");
                assert_eq!(written(&header), prefix);
                // Nothing behind the header changes it.
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
    assert!(data.len() < 14, "14 bytes are always a header or a fault");
}

/// The one lawful way to write a header (RFC 6455 §5.2).
fn written(header: &ClientHeader) -> Vec<u8> {
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
