//! The admin port beside clients that behave badly.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use crate::support::node::NodeBuilder;
use crate::support::wait::SOON;

/// Issue 13: 1,197 half requests used all descriptors, and the liveness probe failed.
#[test]
fn half_requests_do_not_fail_the_liveness_probe() {
    const HALF: usize = 600;
    let node = NodeBuilder::dev().start();
    let mut half: Vec<_> = (0..HALF)
        .map(|_| {
            let mut stream = TcpStream::connect(node.admin).expect("the server accepts");
            stream.write_all(b"GET /health/live HTTP/1.1\r\nHost: x\r\n").expect("a fresh socket");
            stream
        })
        .collect();
    assert_eq!(node.get("/health/live").expect("an answer").status, 200);
    // The oldest ones have made room.
    let oldest = &mut half[0];
    oldest.set_read_timeout(Some(SOON)).expect("a socket");
    let ended = match oldest.read(&mut [0]) {
        Ok(read) => read == 0,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    };
    assert!(ended);
    assert!(node.metrics().sum("delivery_admin_connections_replaced_total", &[]) >= 300.0);
}
