//! Upgrade requests: valid, unusual and hostile, each with the status of its response and a text that
//! the response contains. The server enables `/echo` and accepts any origin without tokens (`delivery
//! dev`). Used with the parser alone and over a socket.

#[path = "upgrade_cases/handshake.rs"]
mod handshake;
#[path = "upgrade_cases/http.rs"]
mod http;
#[path = "upgrade_cases/request.rs"]
mod request;

use request::Request;

/// A request and its response.
pub(crate) struct Case {
    /// What is special about the request; unique.
    pub(crate) name: &'static str,
    /// The complete request.
    pub(crate) request: Vec<u8>,
    /// Status of the response.
    pub(crate) status: u16,
    /// Text that the response contains.
    pub(crate) contains: &'static str,
}

#[derive(Default)]
struct Table(Vec<Case>);

impl Table {
    fn accepts(&mut self, name: &'static str, request: Request) {
        self.is(101, request::ACCEPT, name, request);
    }

    fn is(&mut self, status: u16, contains: &'static str, name: &'static str, request: Request) {
        self.raw(status, contains, name, request.bytes());
    }

    fn raw(
        &mut self,
        status: u16,
        contains: &'static str,
        name: &'static str,
        request: impl Into<Vec<u8>>,
    ) {
        self.0.push(Case { name, request: request.into(), status, contains });
    }
}

/// All cases.
pub(crate) fn cases() -> Vec<Case> {
    let mut table = Table::default();
    http::cases(&mut table);
    handshake::cases(&mut table);
    table.0
}
