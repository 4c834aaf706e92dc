//! TLS of a client of this program's own.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;

use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

/// A connection in plaintext, or over TLS.
pub(super) trait ByteStream: Read + Write {}

impl<T: Read + Write> ByteStream for T {}

/// Why there is no connection over TLS.
pub(super) enum SecureError {
    /// It stays so.
    Permanent(String),
    /// Another attempt may succeed.
    Io(io::Error),
}

/// Makes a handshake for HTTP/1.1. `authorities`: PEM file of those to trust; `None`: those that browsers trust.
///
/// # Errors
/// See [`SecureError`].
pub(super) fn secure(
    mut stream: TcpStream,
    host: &str,
    authorities: Option<&Path>,
) -> Result<Box<dyn ByteStream>, SecureError> {
    let permanent = |error: &dyn std::fmt::Display| SecureError::Permanent(error.to_string());
    let mut roots = RootCertStore::empty();
    match authorities {
        None => roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
        Some(path) => {
            let unreadable =
                |error| SecureError::Permanent(format!("--ca {}: {error}", path.display()));
            for certificate in CertificateDer::pem_file_iter(path).map_err(unreadable)? {
                roots.add(certificate.map_err(unreadable)?).map_err(|error| permanent(&error))?;
            }
        }
    }
    let mut config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| permanent(&error))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let name = ServerName::try_from(host.to_owned()).map_err(|error| permanent(&error))?;
    let mut tls =
        ClientConnection::new(Arc::new(config), name).map_err(|error| permanent(&error))?;
    while tls.is_handshaking() {
        tls.complete_io(&mut stream).map_err(|error| match error.kind() {
            // What rustls does not accept, such as the certificate.
            io::ErrorKind::InvalidData => permanent(&error),
            _ => SecureError::Io(error),
        })?;
    }
    Ok(Box::new(StreamOwned::new(tls, stream)))
}
