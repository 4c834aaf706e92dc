//! Cursors of clients: decoding any bytes succeeds or fails without a panic. A cursor has exactly one
//! encoding.

use delivery::domain::cursor::{Cursor, CursorExpired, POSITIONS_MAX};

/// Checks bytes as a cursor of a gRPC client, as one with a valid checksum, and as a cursor in text.
pub fn check(data: &[u8]) {
    check_bytes(data);
    let mut summed = data.to_vec();
    summed.extend(crc32c(data).to_be_bytes());
    check_bytes(&summed);
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(cursor) = Cursor::from_text(text) {
        assert_eq!(cursor.to_text(), text);
    }
}

fn check_bytes(bytes: &[u8]) {
    match Cursor::decode(bytes) {
        Ok(cursor) => {
            assert_eq!(cursor.encode(), bytes);
            assert_eq!(Cursor::from_text(&cursor.to_text()), Ok(cursor.clone()));
            let positions = cursor.positions();
            assert!((1..=POSITIONS_MAX).contains(&positions.len()));
            assert!(positions.iter().all(|it| it.next >= 0));
            assert!(
                positions
                    .windows(2)
                    .all(|it| { (it[0].topic, it[0].partition) < (it[1].topic, it[1].partition) })
            );
        }
        Err(CursorExpired::OtherVersion) => assert_ne!(bytes[0], 1),
        Err(why) => assert_eq!(why, CursorExpired::Malformed),
    }
}

/// CRC-32C bit by bit, independent of the table under test.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut sum = !0_u32;
    for byte in bytes {
        sum ^= u32::from(*byte);
        for _ in 0..8 {
            sum = (sum >> 1) ^ (0x82F6_3B78 & 0_u32.wrapping_sub(sum & 1));
        }
    }
    !sum
}
