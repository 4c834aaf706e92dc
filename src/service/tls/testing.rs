//! An authority for tests, and the certificates that it issues.

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair,
    date_time_ymd,
};

use super::certificates::{CertificateChain, CertifiedPair};

/// A key of 2048 bits.
pub(crate) const RSA_KEY: &str = include_str!("../sessions/auth/testdata/rsa_private.pem");

/// An authority whose certificate clients trust.
pub(crate) struct TestAuthority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl TestAuthority {
    /// `name`: the common name. Each has a key of its own.
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        Self { issuer: CertifiedIssuer::self_signed(params, key).unwrap() }
    }

    pub(crate) fn pem(&self) -> String {
        self.issuer.pem()
    }

    pub(crate) fn certificate(&self) -> &Certificate {
        self.issuer.as_ref()
    }

    /// The chain and the key of a server, as PEM. Valid in the years from `years.0` to `years.1`, both times on January 1.
    pub(crate) fn pem_of_years(
        &self,
        names: &[&str],
        key: KeyPair,
        years: (i32, i32),
    ) -> (String, String) {
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.not_before = date_time_ymd(years.0, 1, 1);
        params.not_after = date_time_ymd(years.1, 1, 1);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (certificate.pem() + &self.pem(), key.serialize_pem())
    }

    /// A server with these names and a key for ECDSA.
    pub(crate) fn pair(&self, names: &[&str]) -> CertifiedPair {
        self.pair_with(names, KeyPair::generate().unwrap())
    }

    pub(crate) fn pair_with(&self, names: &[&str], key: KeyPair) -> CertifiedPair {
        let (chain, key) = self.pem_of_years(names, key, (2000, 4000));
        let chain = CertificateChain::from_pem(chain.as_bytes()).unwrap();
        CertifiedPair::new(chain, key.as_bytes()).unwrap()
    }
}
