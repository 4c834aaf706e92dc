//! Certificates: reads chains with their private keys, and selects one for each handshake.
//!
//! | name that the client sends (SNI, RFC 6066 §3) | pair |
//! | --- | --- |
//! | a name of a certificate | that pair |
//! | a name that a certificate has as `*.example.com` | that pair, unless another one has the whole name |
//! | another name, or none | the first pair |
//!
//! If several pairs have a name, those with ECDSA and Ed25519 keys come first, because their signatures cost the node a
//! fraction of those of RSA. The client gets the first one that it can verify.

use std::collections::HashMap;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{SignatureAlgorithm, SignatureScheme};
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};

/// Certificates of one chain. No authority uses more than four.
const CHAIN_MAX: usize = 10;

/// Why a chain cannot be used. Certificates are numbered from 1.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// There is no section `CERTIFICATE`.
    #[error("holds no certificate: a file with lines `-----BEGIN CERTIFICATE-----` is needed")]
    Empty,
    /// The PEM is damaged.
    #[error("is damaged: {0}")]
    NotPem(String),
    /// There are too many.
    #[error(
        "holds more than {CHAIN_MAX} certificates: a chain is needed, not a collection of authorities"
    )]
    TooLong,
    /// One is not X.509 version 3 (RFC 5280).
    #[error("holds a certificate (number {0}) that cannot be read: {1}")]
    Unreadable(usize, webpki::Error),
    /// One does not name the next one as its issuer.
    #[error(
        "is not in order: certificate {0} is not issued by certificate {next}; the certificate of the server comes first, \
         then its issuer, and so on", next = .0 + 1
    )]
    Order(usize),
    /// A signature does not fit the key of the issuer.
    #[error(
        "holds a signature that does not fit: an issuer in it has the right name and the wrong key"
    )]
    Signature,
}

/// Why a private key cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PrivateKeyError {
    /// There is no section with a private key.
    #[error("holds no private key: a file with a line `-----BEGIN PRIVATE KEY-----` is needed")]
    Missing,
    /// It needs a password.
    #[error("is encrypted: `openssl pkey -in FILE -out DECRYPTED` decrypts it")]
    Encrypted,
    /// The PEM is damaged.
    #[error("is damaged: {0}")]
    NotPem(String),
    /// ring does not know it.
    #[error(
        "holds a key that is not RSA of 2048 to 4096 bits, ECDSA with P-256 or P-384, or Ed25519"
    )]
    Unsupported,
    /// It belongs to another certificate.
    #[error("holds a key that does not belong to its certificate")]
    Mismatch,
}

/// A chain whose certificates follow each other, the one of the server first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateChain {
    certificates: Vec<CertificateDer<'static>>,
    names: Vec<String>,
    valid_from_s: u64,
    expires_at_s: u64,
}

impl CertificateChain {
    /// Reads the certificates of a PEM file. Other sections are ignored. Whether they are valid at a time, and whom a
    /// client trusts, is not checked.
    ///
    /// # Errors
    /// See [`ChainError`].
    pub fn from_pem(pem: &[u8]) -> Result<Self, ChainError> {
        let sections = CertificateDer::pem_slice_iter(pem).take(CHAIN_MAX + 1);
        let certificates: Vec<CertificateDer<'static>> =
            sections.collect::<Result<_, _>>().map_err(|e| ChainError::NotPem(e.to_string()))?;
        if certificates.is_empty() {
            return Err(ChainError::Empty);
        }
        if certificates.len() > CHAIN_MAX {
            return Err(ChainError::TooLong);
        }
        let (mut valid_from_s, mut expires_at_s) = (0, u64::MAX);
        let mut names = Vec::new();
        let mut issuer = None;
        for (number, der) in (1..).zip(&certificates) {
            let unreadable = |error| ChainError::Unreadable(number, error);
            let certificate = EndEntityCert::try_from(der).map_err(unreadable)?;
            if issuer.is_some_and(|issuer: Vec<u8>| issuer != certificate.subject()) {
                return Err(ChainError::Order(number - 1));
            }
            let (from_s, until_s) = validity(&certificate).map_err(unreadable)?;
            valid_from_s = valid_from_s.max(from_s);
            expires_at_s = expires_at_s.min(until_s);
            if number == 1 {
                names.extend(certificate.valid_dns_names().map(str::to_ascii_lowercase));
            }
            issuer = Some(certificate.issuer().to_vec());
        }
        check_signatures(&certificates, valid_from_s)?;
        Ok(Self { certificates, names, valid_from_s, expires_at_s })
    }

    /// The DNS names of the server, in lower case; some may begin with `*.`.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// When all certificates are valid, Unix time in seconds.
    pub fn valid_from_s(&self) -> u64 {
        self.valid_from_s
    }

    /// The end of the last second in which all certificates are valid, Unix time in seconds.
    pub fn expires_at_s(&self) -> u64 {
        self.expires_at_s
    }
}

/// Unix time in seconds of `notBefore` and `notAfter` (RFC 5280 §4.1.2.5).
///
/// webpki tells them only as the reason why a certificate is not valid, which it checks before everything else.
fn validity(certificate: &EndEntityCert<'_>) -> Result<(u64, u64), webpki::Error> {
    let at = |time_s| {
        let time = UnixTime::since_unix_epoch(Duration::from_secs(time_s));
        let usage = KeyUsage::server_auth();
        certificate.verify_for_usage(&[], &[], &[], time, usage, None, None).map(|_| ())
    };
    let until_s = match at(u64::MAX) {
        Err(webpki::Error::CertExpired { not_after, .. }) => not_after.as_secs(),
        Err(error) => return Err(error),
        Ok(()) => u64::MAX,
    };
    match at(0) {
        Err(webpki::Error::CertNotValidYet { not_before, .. }) => {
            Ok((not_before.as_secs(), until_s))
        }
        _ => Ok((0, until_s)),
    }
}

/// Checks that the last certificate verifies the others. Only a wrong signature is an error: clients have rules of their
/// own, and algorithms that this node lacks.
fn check_signatures(chain: &[CertificateDer<'_>], time_s: u64) -> Result<(), ChainError> {
    let [server, between @ .., last] = chain else { return Ok(()) };
    let (Ok(server), Ok(anchor)) =
        (EndEntityCert::try_from(server), anchor_from_trusted_cert(last))
    else {
        return Ok(());
    };
    let algorithms = default_provider().signature_verification_algorithms.all;
    let time = UnixTime::since_unix_epoch(Duration::from_secs(time_s));
    let usage = KeyUsage::server_auth();
    match server.verify_for_usage(algorithms, &[anchor], between, time, usage, None, None) {
        Err(webpki::Error::InvalidSignatureForPublicKey) => Err(ChainError::Signature),
        _ => Ok(()),
    }
}

/// A certificate chain with its private key.
#[derive(Clone, Debug)]
pub struct CertifiedPair {
    chain: CertificateChain,
    key: Arc<CertifiedKey>,
}

/// The chain says what the key is.
impl PartialEq for CertifiedPair {
    fn eq(&self, other: &Self) -> bool {
        self.chain == other.chain
    }
}

impl CertifiedPair {
    /// Reads the first private key of a PEM file: PKCS #8, PKCS #1 or SEC 1. Other sections are ignored.
    ///
    /// # Errors
    /// See [`PrivateKeyError`].
    pub fn new(chain: CertificateChain, key_pem: &[u8]) -> Result<Self, PrivateKeyError> {
        let is_encrypted = key_pem.windows(9).any(|part| part == b"ENCRYPTED");
        let key = PrivateKeyDer::from_pem_slice(key_pem).map_err(|error| match error {
            _ if is_encrypted => PrivateKeyError::Encrypted,
            pem::Error::NoItemsFound => PrivateKeyError::Missing,
            error => PrivateKeyError::NotPem(error.to_string()),
        })?;
        let key = default_provider().key_provider.load_private_key(key).map_err(|_| {
            if is_encrypted { PrivateKeyError::Encrypted } else { PrivateKeyError::Unsupported }
        })?;
        let key = CertifiedKey::new(chain.certificates.clone(), key);
        key.keys_match().map_err(|_| PrivateKeyError::Mismatch)?;
        Ok(Self { chain, key: Arc::new(key) })
    }

    /// Its chain.
    pub fn chain(&self) -> &CertificateChain {
        &self.chain
    }
}

/// The pairs of a node. They may be replaced while handshakes are made: each one uses either the old or the new ones.
#[derive(Debug)]
pub struct Certificates {
    current: RwLock<Arc<Selection>>,
}

impl Certificates {
    /// # Panics
    /// If there is no pair.
    pub fn new(pairs: &[CertifiedPair]) -> Self {
        Self { current: RwLock::new(Arc::new(Selection::new(pairs))) }
    }

    /// Replaces all pairs. Connections stay.
    ///
    /// # Panics
    /// If there is no pair.
    pub fn replace(&self, pairs: &[CertifiedPair]) {
        let selection = Arc::new(Selection::new(pairs));
        *self.current.write().expect("no holder panics") = selection;
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, client: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let selection = Arc::clone(&self.current.read().expect("no holder panics"));
        Some(selection.choose(client.server_name(), client.signature_schemes()))
    }
}

/// The pairs, by name. No list is empty.
#[derive(Debug)]
struct Selection {
    /// Names in lower case, some with `*.`.
    by_name: HashMap<String, Vec<Arc<CertifiedKey>>>,
    /// For all other names.
    first: Vec<Arc<CertifiedKey>>,
}

impl Selection {
    fn new(pairs: &[CertifiedPair]) -> Self {
        let mut by_name: HashMap<_, Vec<_>> = HashMap::new();
        for CertifiedPair { chain, key } in pairs {
            for name in &chain.names {
                by_name.entry(name.clone()).or_default().push(Arc::clone(key));
            }
        }
        for keys in by_name.values_mut() {
            keys.sort_by_key(|pair| pair.key.algorithm() == SignatureAlgorithm::RSA);
        }
        let first = pairs.first().expect("there is a pair");
        let same_name = first.chain.names.first().and_then(|name| by_name.get(name));
        let first = same_name.cloned().unwrap_or_else(|| vec![Arc::clone(&first.key)]);
        Self { by_name, first }
    }

    /// `name`: in lower case. `verifiable`: what the client can verify.
    fn choose(&self, name: Option<&str>, verifiable: &[SignatureScheme]) -> Arc<CertifiedKey> {
        let with_name = name.and_then(|name| self.with_name(name)).unwrap_or(&self.first);
        let mut all = with_name.iter();
        let verified = all.find(|pair| pair.key.choose_scheme(verifiable).is_some());
        // Otherwise the handshake fails, whichever it is.
        Arc::clone(verified.unwrap_or(&with_name[0]))
    }

    fn with_name(&self, name: &str) -> Option<&Vec<Arc<CertifiedKey>>> {
        // A wildcard stands for one label (RFC 6125 §6.4.3).
        let wildcard = || self.by_name.get(&format!("*.{}", name.split_once('.')?.1));
        self.by_name.get(name).or_else(wildcard)
    }
}

#[cfg(test)]
mod tests {
    use rcgen::KeyPair;

    use super::super::testing::{RSA_KEY, TestAuthority};
    use super::*;

    const EC_KEY: &str = include_str!("testdata/ec_pkcs8.pem");

    fn ec_key() -> KeyPair {
        KeyPair::from_pem(EC_KEY).unwrap()
    }

    fn chain(pem: &str) -> Result<CertificateChain, ChainError> {
        CertificateChain::from_pem(pem.as_bytes())
    }

    #[test]
    fn chain_has_names_and_times() {
        let authority = TestAuthority::new("authority");
        let names = ["Chat.example.com", "*.example.org", "192.0.2.1"];
        let (pem, _) = authority.pem_of_years(&names, ec_key(), (2020, 2021));
        let chain = chain(&pem).unwrap();
        assert_eq!(chain.names(), ["chat.example.com", "*.example.org"]);
        assert_eq!(chain.valid_from_s(), 1_577_836_800, "2020-01-01");
        assert_eq!(chain.expires_at_s(), 1_609_459_200, "2021-01-01");
        // From 2050 on the times have another type (RFC 5280 §4.1.2.5).
        let (pem, _) = authority.pem_of_years(&names, ec_key(), (1971, 2100));
        let first = &pem[..pem.len() - authority.pem().len()];
        let chain = CertificateChain::from_pem(first.as_bytes()).unwrap();
        assert_eq!((chain.valid_from_s(), chain.expires_at_s()), (31_536_000, 4_102_444_800));
    }

    #[test]
    fn chain_that_cannot_be_used_is_refused_with_the_reason() {
        let (authority, other) = (TestAuthority::new("authority"), TestAuthority::new("other"));
        let (pem, key) = authority.pem_of_years(&["chat.test"], ec_key(), (2020, 2040));
        let server = &pem[..pem.len() - authority.pem().len()];
        let namesake = TestAuthority::new("authority");
        let damaged = pem.replace("BEGIN CERTIFICATE-----\nM", "BEGIN CERTIFICATE-----\n!");
        let garbage = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        for (text, said) in [
            (String::new(), "holds no certificate"),
            (key, "holds no certificate"),
            (damaged, "is damaged"),
            (garbage.to_owned(), "(number 1) that cannot be read"),
            (server.to_owned() + garbage, "(number 2) that cannot be read"),
            (authority.pem() + server, "certificate 1 is not issued by certificate 2"),
            (server.to_owned() + &other.pem(), "certificate 1 is not issued by certificate 2"),
            (pem.clone() + &other.pem(), "certificate 2 is not issued by certificate 3"),
            (server.to_owned() + &namesake.pem(), "the right name and the wrong key"),
            (authority.pem().repeat(CHAIN_MAX + 1), "more than 10 certificates"),
        ] {
            let error = chain(&text).unwrap_err().to_string();
            assert!(error.contains(said), "{said}: {error}");
        }
        assert!(chain(server).is_ok(), "clients may know the issuer");
        assert!(chain(&format!("Bag Attributes\n{pem}{EC_KEY}")).is_ok());
    }

    #[test]
    fn key_is_read_in_each_form_and_must_belong_to_the_certificate() {
        let authority = TestAuthority::new("authority");
        let of = |key: KeyPair| chain(&authority.pem_of_years(&["c.test"], key, (2020, 2040)).0);
        let (ec, rsa) = (of(ec_key()).unwrap(), of(KeyPair::from_pem(RSA_KEY).unwrap()).unwrap());
        let read = |chain: &CertificateChain, key: &str| {
            CertifiedPair::new(chain.clone(), key.as_bytes()).map(|_| ())
        };
        for key in [EC_KEY, include_str!("testdata/ec_sec1.pem")] {
            assert_eq!(read(&ec, key), Ok(()));
            assert_eq!(read(&rsa, key), Err(PrivateKeyError::Mismatch));
        }
        for key in [RSA_KEY, include_str!("testdata/rsa_pkcs1.pem")] {
            assert_eq!(read(&rsa, key), Ok(()));
            assert_eq!(
                read(&ec, &format!("{}{key}", authority.pem())),
                Err(PrivateKeyError::Mismatch)
            );
        }
        let encrypted = include_str!("testdata/ec_encrypted.pem");
        assert_eq!(read(&ec, encrypted), Err(PrivateKeyError::Encrypted));
        assert_eq!(read(&ec, include_str!("testdata/p521.pem")), Err(PrivateKeyError::Unsupported));
        assert_eq!(read(&ec, &authority.pem()), Err(PrivateKeyError::Missing));
        let damaged = EC_KEY.replace("-----\nM", "-----\n!");
        assert!(matches!(read(&ec, &damaged), Err(PrivateKeyError::NotPem(_))));
    }

    #[test]
    fn pairs_with_the_same_certificates_are_equal() {
        let authority = TestAuthority::new("authority");
        let (first, second) = (authority.pair(&["a.test"]), authority.pair(&["a.test"]));
        assert_eq!(first, first.clone());
        assert_ne!(first, second);
    }
}
