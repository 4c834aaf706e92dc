//! The keys of tokens that the node has itself: in settings and in files.

use std::path::Path;

use super::Settings;
use crate::domain::command::Secret;
use crate::service::sessions::auth::OwnKeys;

/// Shortest secret: HS256 needs a key as long as its hash (RFC 7518 §3.2).
const SECRET_BYTES_MIN: usize = 32;
/// The secret that RealChat documents for development (contract §5). It is shorter, and published.
const DEVELOPMENT_SECRET: &str = "dev-secret-change-me-in-prod";

/// Why a key cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{setting} {why}")]
pub struct BadKey {
    /// The setting.
    pub setting: &'static str,
    /// What is wrong, to follow the name of the setting.
    pub why: String,
}

/// Reads the keys, from files where settings name files.
///
/// # Errors
/// A file cannot be read, or a key cannot be used.
pub fn own_keys(settings: &Settings) -> Result<OwnKeys, BadKey> {
    let mut own = OwnKeys::default();
    if let Some(secret) = &settings.jwt_secret {
        let setting = "jwt_secret";
        long_enough(secret.expose()).map_err(|why| BadKey { setting, why })?;
        own.secrets.push(secret.clone());
    }
    if let Some(path) = &settings.jwt_secret_file {
        let setting = "jwt_secret_file";
        let bad = |why: String| BadKey { setting, why: format!("`{}` {why}", path.display()) };
        let text = String::from_utf8(read(path).map_err(bad)?)
            .map_err(|_| bad("holds bytes that are not UTF-8".to_owned()))?;
        let before = own.secrets.len();
        for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.is_empty()) {
            long_enough(line)
                .map_err(|why| bad(format!("has a secret in line {number} that {why}")))?;
            own.secrets.push(Secret::new(line.to_owned()));
        }
        if own.secrets.len() == before {
            return Err(bad("holds no secret".to_owned()));
        }
    }
    if let Some(path) = &settings.jwt_key_file {
        let setting = "jwt_key_file";
        let bad = |why: String| BadKey { setting, why: format!("`{}` {why}", path.display()) };
        own.pem = Some(read(path).map_err(bad)?);
        OwnKeys { pem: own.pem.clone(), secrets: Vec::new() }
            .check()
            .map_err(|why| bad(format!("cannot be used: {why}")))?;
    }
    Ok(own)
}

/// Whether the secret that everybody can read in RealChat's documents is among the keys.
pub fn has_development_secret(own: &OwnKeys) -> bool {
    own.secrets.iter().any(|secret| secret.expose() == DEVELOPMENT_SECRET)
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    std::fs::read(path).map_err(|error| format!("cannot be read: {error}"))
}

fn long_enough(secret: &str) -> Result<(), String> {
    if secret.len() >= SECRET_BYTES_MIN || secret == DEVELOPMENT_SECRET {
        return Ok(());
    }
    Err(format!(
        "is shorter than {SECRET_BYTES_MIN} bytes, which is too easy to guess (RFC 7518 §3.2): make one with `openssl rand \
         -base64 32`, and give it to the auth service as well"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::app::config::dev_settings;

    const LONG: &str = "0123456789abcdef0123456789abcdef";

    fn of_file(setting: &'static str, content: &str) -> Result<OwnKeys, BadKey> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        own_keys(&dev_settings(&[(setting, file.path().to_str().unwrap())]))
    }

    #[test]
    fn each_line_of_the_file_is_a_secret() {
        let other = "another-secret-of-at-least-32-bytes";
        let own = of_file("jwt_secret_file", &format!("{LONG}\n\n{other}\r\n")).unwrap();
        let texts: Vec<_> = own.secrets.iter().map(Secret::expose).collect();
        assert_eq!(texts, [LONG, other]);
        for (content, said) in [
            ("", "holds no secret"),
            ("\n", "holds no secret"),
            (&*format!("{LONG}\nshort"), "has a secret in line 2 that is shorter than 32 bytes"),
        ] {
            let error = of_file("jwt_secret_file", content).unwrap_err();
            assert!(error.setting == "jwt_secret_file" && error.why.contains(said), "{error}");
            assert!(!error.why.contains("short`"), "it names no secret");
        }
        let error = of_file("jwt_key_file", "no key").unwrap_err();
        assert!(error.why.contains("no PEM public key"), "{error}");
    }

    #[test]
    fn short_secret_is_refused_but_for_the_published_one() {
        let of = |secret: &str| own_keys(&dev_settings(&[("jwt_secret", secret)]));
        assert!(of("0123456789abcdef0123456789abcde").unwrap_err().why.contains("openssl rand"));
        assert!(!has_development_secret(&of(LONG).unwrap()));
        assert!(has_development_secret(&of("dev-secret-change-me-in-prod").unwrap()));
    }
}
