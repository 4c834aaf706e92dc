//! RFC 6455 and its HTTP upgrade as pure functions and state machines: bytes and `now` in, events out.
