//! Builds requests by changing a valid one.

/// `Sec-WebSocket-Accept` for the key of [`good`] (RFC 6455 §1.3).
pub(super) const ACCEPT: &str = "\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n";
/// In the response to a request without an upgrade.
pub(super) const UPGRADE: &str = "\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n";

/// Request line and header fields.
pub(super) struct Request {
    line: Vec<u8>,
    fields: Vec<Vec<u8>>,
}

pub(super) fn good() -> Request {
    Request {
        line: b"GET /ws?user_id=alice&device_id=phone HTTP/1.1".to_vec(),
        fields: [
            "Host: localhost:8083",
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            "Sec-WebSocket-Version: 13",
        ]
        .map(|field| field.as_bytes().to_vec())
        .to_vec(),
    }
}

/// A valid request with another request line.
pub(super) fn line(line: impl AsRef<[u8]>) -> Request {
    Request { line: line.as_ref().to_vec(), ..good() }
}

/// A valid request with another target.
pub(super) fn target(target: impl AsRef<str>) -> Request {
    line(format!("GET {} HTTP/1.1", target.as_ref()))
}

/// A valid request with another query.
pub(super) fn query(query: impl AsRef<str>) -> Request {
    target(format!("/ws?{}", query.as_ref()))
}

/// A valid request with one more field line.
pub(super) fn with(field: impl AsRef<[u8]>) -> Request {
    good().and(field)
}

/// A valid request in which this line replaces the field with the same name.
pub(super) fn instead(field: impl AsRef<[u8]>) -> Request {
    good().instead(field)
}

/// A valid request without the field of this name.
pub(super) fn without(name: &str) -> Request {
    let mut request = good();
    request.fields.retain(|field| !field.starts_with(name.as_bytes()));
    request
}

impl Request {
    pub(super) fn and(mut self, field: impl AsRef<[u8]>) -> Self {
        self.fields.push(field.as_ref().to_vec());
        self
    }

    pub(super) fn instead(mut self, field: impl AsRef<[u8]>) -> Self {
        let field = field.as_ref();
        let name = field.split(|byte| *byte == b':').next().expect("a name");
        let old = self.fields.iter_mut().find(|old| old.starts_with(name)).expect("a known field");
        *old = field.to_vec();
        self
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.line.clone();
        for field in &self.fields {
            bytes.extend_from_slice(b"\r\n");
            bytes.extend_from_slice(field);
        }
        bytes.extend_from_slice(b"\r\n\r\n");
        bytes
    }
}
