//! Certificates and the secrets of session tickets: in settings and in files.

use std::path::{Path, PathBuf};

use super::Settings;
use super::own_keys::{BadKey, SECRET_BYTES_MIN, read, secrets};
use crate::domain::command::Secret;
use crate::service::tls::certificates::{CertificateChain, CertifiedPair};
use crate::service::tls::tickets::SECRETS_MAX;

/// Pairs of a node. Each has samples of its own on the metrics page.
const PAIRS_MAX: usize = 100;

/// What the settings of TLS name.
#[derive(Clone, Debug, PartialEq)]
pub struct TlsFiles {
    /// Empty: no TLS.
    pub pairs: Vec<TlsPair>,
    /// Those of session tickets, the one for new tickets first. Empty: none is shared with other nodes.
    pub ticket_secrets: Vec<Secret>,
}

/// A certificate chain with its private key.
#[derive(Clone, Debug, PartialEq)]
pub struct TlsPair {
    /// The file of the chain.
    pub file: PathBuf,
    /// Its content, with the key.
    pub pair: CertifiedPair,
}

/// Reads the files.
///
/// # Errors
/// A file cannot be read, its content cannot be used, or a setting is missing.
pub fn tls_files(settings: &Settings) -> Result<TlsFiles, BadKey> {
    let (chains, keys) = (&settings.tls_cert, &settings.tls_key);
    if chains.len() != keys.len() {
        let (setting, other) = if chains.len() < keys.len() {
            ("tls_cert", "tls_key")
        } else {
            ("tls_key", "tls_cert")
        };
        let (less, more) = (chains.len().min(keys.len()), chains.len().max(keys.len()));
        let why = format!(
            "names {less} files, and {other} names {more}: each certificate file needs the file of its key, in the same order"
        );
        return Err(BadKey { setting, why });
    }
    if chains.len() > PAIRS_MAX {
        let why = format!("names more than {PAIRS_MAX} files");
        return Err(BadKey { setting: "tls_cert", why });
    }
    let mut pairs: Vec<TlsPair> = Vec::new();
    for (number, (file, key)) in chains.iter().zip(keys).enumerate() {
        let bad = |why: String| bad_file("tls_cert", file, &why);
        if chains[..number].contains(file) {
            return Err(bad("is named twice".to_owned()));
        }
        let chain = CertificateChain::from_pem(&read(file).map_err(bad)?)
            .map_err(|error| bad(error.to_string()))?;
        if number > 0 && chain.names().is_empty() {
            let why = "has no DNS name (subjectAltName), so that no client could ask for it: name it first, or leave it out";
            return Err(bad(why.to_owned()));
        }
        let bad = |why: String| bad_file("tls_key", key, &why);
        let pair = CertifiedPair::new(chain, &read(key).map_err(bad)?)
            .map_err(|error| bad(error.to_string()))?;
        pairs.push(TlsPair { file: file.clone(), pair });
    }
    let given = ("tls_ticket_secret", &settings.tls_ticket_secret);
    let setting = "tls_ticket_secret_file";
    let ticket_secrets = secrets(given, (setting, &settings.tls_ticket_secret_file), long_enough)?;
    if ticket_secrets.len() > SECRETS_MAX {
        let why = format!("holds more secrets than {SECRETS_MAX}, `tls_ticket_secret` included");
        return Err(BadKey { setting, why });
    }
    Ok(TlsFiles { pairs, ticket_secrets })
}

/// `why`: to follow the name of the file.
fn bad_file(setting: &'static str, file: &Path, why: &str) -> BadKey {
    BadKey { setting, why: format!("`{}` {why}", file.display()) }
}

fn long_enough(secret: &str) -> Result<(), String> {
    if secret.len() >= SECRET_BYTES_MIN {
        return Ok(());
    }
    Err(format!(
        "is shorter than {SECRET_BYTES_MIN} bytes, which is too easy to guess: make one with `openssl rand -base64 32`, and \
         give it to all nodes"
    ))
}

#[cfg(test)]
mod tests {
    use rcgen::KeyPair;
    use tempfile::TempDir;

    use super::*;
    use crate::app::config::{Layers, Profile, load};
    use crate::service::tls::testing::TestAuthority;

    /// A folder with files of `authority`: `NAME.crt` and `NAME.key`.
    fn folder(authority: &TestAuthority, names: &[(&str, &[&str])]) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, of_server) in names {
            let key = KeyPair::generate().unwrap();
            let (chain, key) = authority.pem_of_years(of_server, key, (2000, 4000));
            std::fs::write(folder.path().join(format!("{name}.crt")), chain).unwrap();
            std::fs::write(folder.path().join(format!("{name}.key")), key).unwrap();
        }
        folder
    }

    /// The settings with these files of the folder.
    fn loaded(
        folder: &TempDir,
        certs: &[&str],
        keys: &[&str],
        others: &[(&'static str, &str)],
    ) -> Result<TlsFiles, String> {
        let list = |names: &[&str]| {
            let paths = names.iter().map(|name| folder.path().join(name).display().to_string());
            paths.collect::<Vec<_>>().join(",")
        };
        let files = [("tls_cert", list(certs)), ("tls_key", list(keys))];
        let others = others.iter().map(|(name, value)| (*name, (*value).to_owned()));
        let layers = Layers::new(Profile::Dev).with_flags(files.into_iter().chain(others));
        let loaded = load(layers).map_err(|errors| errors.to_string())?;
        Ok(tls_files(&loaded.settings).unwrap())
    }

    #[test]
    fn pairs_are_read_and_nothing_is_needed() {
        let authority = TestAuthority::new("authority");
        let folder = folder(&authority, &[("a", &["a.test"]), ("b", &["b.test"])]);
        let files = loaded(&folder, &["a.crt", "b.crt"], &["a.key", "b.key"], &[]).unwrap();
        let names: Vec<_> = files.pairs.iter().flat_map(|pair| pair.pair.chain().names()).collect();
        assert_eq!(names, ["a.test", "b.test"]);
        assert_eq!(files.pairs[1].file, folder.path().join("b.crt"));
        let none = loaded(&folder, &[], &[], &[]).unwrap();
        assert!(none.pairs.is_empty() && none.ticket_secrets.is_empty());
    }

    #[test]
    fn what_cannot_be_used_is_refused_with_setting_and_file() {
        let authority = TestAuthority::new("authority");
        let folder =
            folder(&authority, &[("a", &["a.test"]), ("b", &["b.test"]), ("ip", &["192.0.2.1"])]);
        for (certs, keys, said) in [
            (
                &["a.crt"][..],
                &[][..],
                "--tls-key (command line): names 0 files, and tls_cert names 1",
            ),
            (&[], &["a.key"], "--tls-cert (command line): names 0 files, and tls_key names 1"),
            (&["a.crt", "b.crt"], &["a.key"], "--tls-key (command line): names 1 files"),
            (&["a.crt"], &["b.key"], "--tls-key (command line): `"),
            (&["a.crt"], &["b.key"], "b.key` holds a key that does not belong to its certificate"),
            (&["no.crt"], &["a.key"], "no.crt` cannot be read"),
            (&["a.crt"], &["no.key"], "no.key` cannot be read"),
            (&["a.key"], &["a.key"], "a.key` holds no certificate"),
            (&["a.crt"], &["a.crt"], "a.crt` holds no private key"),
            (&["a.crt", "a.crt"], &["a.key", "a.key"], "a.crt` is named twice"),
            (&["a.crt", "ip.crt"], &["a.key", "ip.key"], "ip.crt` has no DNS name"),
        ] {
            let error = loaded(&folder, certs, keys, &[]).unwrap_err();
            assert!(error.contains(said), "{said}: {error}");
        }
        assert!(loaded(&folder, &["ip.crt", "a.crt"], &["ip.key", "a.key"], &[]).is_ok());
    }

    #[test]
    fn ticket_secrets_are_long_and_few_and_that_of_the_setting_comes_first() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("secrets");
        let of_file = |content: &str, given: &str| {
            std::fs::write(&file, content).unwrap();
            let file = ("tls_ticket_secret_file", file.to_str().unwrap());
            let given = [("tls_ticket_secret", given)];
            let given = given.into_iter().filter(|(_, secret)| !secret.is_empty());
            loaded(&folder, &[], &[], &given.chain([file]).collect::<Vec<_>>())
        };
        let secrets: Vec<String> =
            (0..9).map(|n| format!("{n}123456789abcdef0123456789abcdef")).collect();
        let files = of_file(&secrets[1..8].join("\n"), &secrets[0]).unwrap();
        let texts: Vec<_> = files.ticket_secrets.iter().map(Secret::expose).collect();
        assert_eq!(texts, secrets[..8]);
        for (content, given, said) in [
            (
                &*secrets.join("\n"),
                "",
                "--tls-ticket-secret-file (command line): holds more secrets than 8",
            ),
            ("short", "", "line 1 that is shorter than 32 bytes"),
            (&secrets[0], "short", "--tls-ticket-secret (command line): is shorter than 32 bytes"),
        ] {
            let error = of_file(content, given).unwrap_err();
            assert!(error.contains(said), "{said}: {error}");
            assert!(!error.contains("`short`"), "it names no secret: {error}");
        }
    }
}
