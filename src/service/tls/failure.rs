//! Why handshakes fail.

use std::io;

use rustls::{Error, InvalidMessage, PeerIncompatible};

use super::TlsCounters;

/// Why a handshake failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsFailure {
    /// The client sent something other than TLS.
    NotTls,
    /// The client does not offer TLS 1.3.
    Version,
    /// The client offers nothing else that the node can use.
    Incompatible,
    /// The client does not offer the protocol of the port (ALPN).
    Protocol,
    /// The client sent an alert.
    ByClient,
    /// The connection ended.
    Gone,
    /// Too many handshakes waited for a signature.
    Busy,
    /// A message was not valid, or the node failed.
    Other,
}

impl TlsFailure {
    /// Counts it.
    pub fn count(self, counters: &TlsCounters) {
        let counter = match self {
            Self::NotTls => &counters.failed_not_tls,
            Self::Version => &counters.failed_version,
            Self::Incompatible => &counters.failed_incompatible,
            Self::Protocol => &counters.failed_protocol,
            Self::ByClient => &counters.failed_by_client,
            Self::Gone => &counters.failed_gone,
            Self::Busy => &counters.failed_busy,
            Self::Other => &counters.failed_other,
        };
        counter.add(1);
    }
}

impl From<&Error> for TlsFailure {
    fn from(error: &Error) -> Self {
        match error {
            Error::InvalidMessage(InvalidMessage::InvalidContentType) => Self::NotTls,
            Error::PeerIncompatible(
                PeerIncompatible::Tls12NotOffered
                | PeerIncompatible::Tls12NotOfferedOrEnabled
                | PeerIncompatible::SupportedVersionsExtensionRequired,
            ) => Self::Version,
            Error::PeerIncompatible(_) => Self::Incompatible,
            Error::NoApplicationProtocol => Self::Protocol,
            Error::AlertReceived(_) => Self::ByClient,
            _ => Self::Other,
        }
    }
}

/// Of a stream whose errors contain those of rustls.
impl From<&io::Error> for TlsFailure {
    fn from(error: &io::Error) -> Self {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
            Some(error) => error.into(),
            None => Self::Gone,
        }
    }
}
