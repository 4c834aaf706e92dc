//! Upgrade requests, lawful, odd and hostile, each with the status it is answered with and a text
//! that the answer contains. The server has `/echo` on, takes any origin and no tokens (`delivery
//! dev`). Used on the parser alone and through a socket.

#[path = "upgrade_cases/handshake.rs"]
mod handshake;
#[path = "upgrade_cases/http.rs"]
mod http;
#[path = "upgrade_cases/request.rs"]
mod request;

use request::Request;

/// One request and its answer.
pub(crate) struct Case {
    /// What is odd about it; unique.
    pub(crate) name: &'static str,
    /// All its bytes.
    pub(crate) request: Vec<u8>,
    /// Status of the answer.
    pub(crate) status: u16,
    /// Somewhere in the answer.
    pub(crate) says: &'static str,
}

#[derive(Default)]
struct Table(Vec<Case>);

impl Table {
    fn is(&mut self, status: u16, says: &'static str, name: &'static str, request: Request) {
        self.raw(status, says, name, request.bytes());
    }

    fn raw(&mut self, status: u16, says: &'static str, name: &'static str, request: Vec<u8>) {
        self.0.push(Case { name, request, status, says });
    }
}

/// All of them.
pub(crate) fn cases() -> Vec<Case> {
    let mut table = Table::default();
    http::cases(&mut table);
    handshake::cases(&mut table);
    table.0
}
