//! A handshake with rustls, without buffers and without I/O, up to the point where the record layer of
//! `protocol::tls` takes over.

use std::cell::RefCell;
use std::fmt;
use std::sync::Arc;

use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData};
use rustls::{CipherSuite, HandshakeKind, KeyLog, ServerConfig};
use zeroize::Zeroizing;

use crate::protocol::tls::record::whole_length;
use crate::protocol::tls::{Alert, HandshakeProgress, Secrets, Suite, TlsHandshake};

use super::TlsCounters;
use super::failure::TlsFailure;

const CLIENT: &str = "CLIENT_TRAFFIC_SECRET_0";
const SERVER: &str = "SERVER_TRAFFIC_SECRET_0";

#[derive(Default)]
struct Captured {
    client: Option<Zeroizing<Vec<u8>>>,
    server: Option<Zeroizing<Vec<u8>>>,
}

thread_local! {
    /// The traffic secrets of the handshake that is being made on this thread. A key log is the only way to them: from
    /// the keys that rustls extracts no next keys can be derived, and a `KernelConnection`, which can do it, has more
    /// memory than everything else that a session keeps.
    static CAPTURED: RefCell<Captured> = RefCell::default();
}

#[derive(Debug)]
struct CaptureSecrets;

impl KeyLog for CaptureSecrets {
    fn log(&self, label: &str, _client_random: &[u8], secret: &[u8]) {
        CAPTURED.with_borrow_mut(|captured| {
            let secret = Some(Zeroizing::new(secret.to_vec()));
            match label {
                CLIENT => captured.client = secret,
                SERVER => captured.server = secret,
                _ => {}
            }
        });
    }

    fn will_log(&self, label: &str) -> bool {
        label == CLIENT || label == SERVER
    }
}

/// Prepares a configuration for [`ServerHandshake`].
pub fn capture_secrets(config: &mut ServerConfig) {
    config.enable_secret_extraction = true;
    config.key_log = Arc::new(CaptureSecrets);
}

/// One handshake.
pub struct ServerHandshake {
    /// `None`: it has ended.
    connection: Option<UnbufferedServerConnection>,
    /// Whole records that rustls has seen and still needs: the parts of a message.
    records: Vec<u8>,
    captured: Captured,
    counters: Arc<TlsCounters>,
}

impl ServerHandshake {
    /// Nothing has come from the client.
    ///
    /// # Errors
    /// The configuration cannot be used.
    pub(super) fn begin(
        config: &Arc<ServerConfig>,
        counters: &Arc<TlsCounters>,
    ) -> Result<Box<dyn TlsHandshake>, rustls::Error> {
        let connection = Some(UnbufferedServerConnection::new(Arc::clone(config))?);
        let (captured, counters) = (Captured::default(), Arc::clone(counters));
        Ok(Box::new(Self { connection, records: Vec::new(), captured, counters }))
    }

    /// Handles the records one by one: behind the last one of the handshake there may be data, which rustls must not
    /// see. Returns whether the handshake is complete.
    fn handle_records(
        &mut self,
        input: &mut Vec<u8>,
        output: &mut Vec<u8>,
    ) -> Result<bool, rustls::Error> {
        let mut taken = 0;
        let mut outcome = Ok(false);
        while let Some(length) = whole_length(&input[taken..])
            && let Some(record) = input.get(taken..taken + length)
        {
            self.records.extend_from_slice(record);
            taken += length;
            outcome = self.handle_record(output);
            if !matches!(outcome, Ok(false)) {
                break;
            }
        }
        input.drain(..taken);
        outcome
    }

    fn handle_record(&mut self, output: &mut Vec<u8>) -> Result<bool, rustls::Error> {
        let connection = self.connection.as_mut().expect("it has not ended");
        CAPTURED.set(Captured::default());
        let outcome = loop {
            let status = connection.process_tls_records(&mut self.records);
            let discard = status.discard;
            let goes_on = match status.state {
                Ok(ConnectionState::EncodeTlsData(data)) => encode(data, output).map(|()| true),
                Ok(ConnectionState::TransmitTlsData(data)) => {
                    data.done();
                    Ok(true)
                }
                Ok(ConnectionState::BlockedHandshake | ConnectionState::WriteTraffic(_)) => {
                    Ok(false)
                }
                Ok(_) => Err(rustls::Error::HandshakeNotComplete),
                Err(error) => Err(error),
            };
            self.records.drain(..discard);
            match goes_on {
                Ok(true) => {}
                Ok(false) => break Ok(!connection.is_handshaking()),
                Err(error) => break Err(error),
            }
        };
        let captured = CAPTURED.take();
        self.captured.client = captured.client.or(self.captured.client.take());
        self.captured.server = captured.server.or(self.captured.server.take());
        outcome
    }

    /// What rustls has left to say after an error: an alert. It has none for a message that is too long.
    fn encode_alert(&mut self, output: &mut Vec<u8>) {
        let Some(connection) = &mut self.connection else { return };
        let before = output.len();
        while let Ok(ConnectionState::EncodeTlsData(data)) =
            connection.process_tls_records(&mut self.records).state
            && encode(data, output).is_ok()
        {}
        if output.len() == before {
            output.extend_from_slice(&Alert::DECODE_ERROR.plain_record());
        }
    }

    fn secrets(&mut self) -> Result<Box<Secrets>, rustls::Error> {
        let connection = self.connection.take().expect("it has not ended");
        let suite = match connection.negotiated_cipher_suite().map(|it| it.suite()) {
            Some(CipherSuite::TLS13_AES_128_GCM_SHA256) => Suite::Aes128Gcm,
            Some(CipherSuite::TLS13_AES_256_GCM_SHA384) => Suite::Aes256Gcm,
            Some(CipherSuite::TLS13_CHACHA20_POLY1305_SHA256) => Suite::ChaCha20Poly1305,
            _ => return Err(rustls::Error::General("not a cipher suite of TLS 1.3".to_owned())),
        };
        let (extracted, _) = connection.dangerous_into_kernel_connection()?;
        let (server_records, _) = extracted.tx;
        let missing =
            || rustls::Error::General("rustls has not logged a traffic secret".to_owned());
        let client = self.captured.client.take().ok_or_else(missing)?;
        let server = self.captured.server.take().ok_or_else(missing)?;
        Ok(Box::new(Secrets { suite, client, server, server_records }))
    }
}

impl TlsHandshake for ServerHandshake {
    fn advance(&mut self, input: &mut Vec<u8>, output: &mut Vec<u8>) -> HandshakeProgress {
        let outcome = match self.handle_records(input, output) {
            Ok(false) => return HandshakeProgress::NeedMore,
            Ok(true) => {
                let kind = self.connection.as_ref().and_then(|it| it.handshake_kind());
                self.secrets().map(|secrets| (secrets, kind == Some(HandshakeKind::Resumed)))
            }
            Err(error) => Err(error),
        };
        match outcome {
            Ok((secrets, is_resumed)) => {
                let counters = &self.counters;
                if is_resumed {
                    counters.handshakes_resumed.add(1);
                } else {
                    counters.handshakes_full.add(1);
                }
                HandshakeProgress::Done(secrets)
            }
            Err(error) => {
                tracing::debug!("a TLS handshake has failed: {error}");
                TlsFailure::from(&error).count(&self.counters);
                self.encode_alert(output);
                HandshakeProgress::Failed
            }
        }
    }
}

impl fmt::Debug for ServerHandshake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerHandshake").finish_non_exhaustive()
    }
}

fn encode<Data>(
    mut data: EncodeTlsData<'_, Data>,
    output: &mut Vec<u8>,
) -> Result<(), rustls::Error> {
    let start = output.len();
    let required = match data.encode(&mut []) {
        Err(EncodeError::InsufficientSize(size)) => size.required_size,
        _ => return Ok(()),
    };
    output.resize(start + required, 0);
    match data.encode(&mut output[start..]) {
        Ok(written) => {
            output.truncate(start + written);
            Ok(())
        }
        Err(error) => Err(rustls::Error::General(error.to_string())),
    }
}

#[cfg(test)]
mod tests;
