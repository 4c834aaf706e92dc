//! TLS of the load client: rustls, which does not look at the server's certificate.

use std::io::{self, Read as _, Write as _};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, Error, SignatureScheme, version,
};

/// The TLS connections of a client, by session.
#[derive(Debug)]
pub(super) struct TlsConnections {
    config: Arc<ClientConfig>,
    connections: Vec<Option<Box<ClientConnection>>>,
}

impl TlsConnections {
    /// None yet. Sessions that come back use tickets.
    pub(super) fn new(sessions: usize) -> Self {
        let provider = Arc::new(ring::default_provider());
        let verifier = Arc::new(AnyCertificate(Arc::clone(&provider)));
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&version::TLS13])
            .expect("the provider has suites of TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_no_client_auth();
        config.resumption = rustls::client::Resumption::in_memory_sessions(2 * sessions);
        Self { config: Arc::new(config), connections: (0..sessions).map(|_| None).collect() }
    }

    /// A new connection of a session. Each session has its own tickets.
    pub(super) fn begin(&mut self, index: usize) {
        let name = ServerName::try_from(format!("s{index}.bench")).expect("a name");
        let connection = ClientConnection::new(Arc::clone(&self.config), name);
        self.connections[index] = Some(Box::new(connection.expect("a valid configuration")));
    }

    /// What is sent for these bytes, and for what the handshake has to say.
    pub(super) fn say(&mut self, index: usize, bytes: &[u8]) -> io::Result<Vec<u8>> {
        let connection = self.connections[index].as_mut().expect("it has begun");
        connection.writer().write_all(bytes)?;
        let mut out = Vec::new();
        while connection.wants_write() {
            connection.write_tls(&mut out)?;
        }
        Ok(out)
    }

    /// Appends the data in what was received to `out`.
    pub(super) fn hear(
        &mut self,
        index: usize,
        mut bytes: &[u8],
        out: &mut Vec<u8>,
    ) -> io::Result<()> {
        let connection = self.connections[index].as_mut().expect("it has begun");
        while !bytes.is_empty() {
            connection.read_tls(&mut bytes)?;
            let state = connection.process_new_packets().map_err(io::Error::other)?;
            let start = out.len();
            out.resize(start + state.plaintext_bytes_to_read(), 0);
            connection.reader().read_exact(&mut out[start..])?;
        }
        Ok(())
    }
}

#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.3 only".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
