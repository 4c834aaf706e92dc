//! Ids of the users and devices of the load: numbered, and as long as real ones (a UUID; 16 bytes).

/// The user of session `index`: 36 bytes.
pub fn user(index: usize) -> String {
    format!("00000000-0000-4000-8000-{index:012}")
}

/// The device of session `index`: 16 bytes.
pub fn device(index: usize) -> String {
    format!("device-{index:09}")
}

/// The inverse of [`user`].
pub fn number(user: &str) -> Option<usize> {
    user.get(24..36)?.parse().ok()
}

/// The session of an upgrade request, from the user in its request line.
pub fn index_of(request: &[u8]) -> Option<usize> {
    let at = memchr::memmem::find(request, b"user_id=")? + b"user_id=".len();
    number(std::str::from_utf8(request.get(at..at + 36)?).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_those_of_real_ids_and_numbers_come_back() {
        assert_eq!((user(7).len(), device(7).len()), (36, 16));
        assert_eq!((number(&user(7)), number("somebody")), (Some(7), None));
        let request = format!("GET /ws?user_id={}&device_id=x HTTP/1.1", user(123_456));
        assert_eq!(index_of(request.as_bytes()), Some(123_456));
        assert_eq!(index_of(b"GET /ws?user_id=short"), None);
    }
}
