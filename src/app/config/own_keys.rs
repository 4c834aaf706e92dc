//! The keys of tokens that the node has itself, and the tokens of its operators: in settings and in files.

use std::path::{Path, PathBuf};

use super::Settings;
use crate::domain::command::Secret;
use crate::service::sessions::auth::OwnKeys;

/// Shortest secret: HS256 needs a key as long as its hash (RFC 7518 §3.2).
pub(super) const SECRET_BYTES_MIN: usize = 32;
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
    let secret = ("jwt_secret", &settings.jwt_secret);
    let file = ("jwt_secret_file", &settings.jwt_secret_file);
    let mut own = OwnKeys { secrets: secrets(secret, file, long_enough)?, pem: None };
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

/// Reads the tokens of operators, from a file if a setting names one.
///
/// # Errors
/// As for [`own_keys`].
pub fn admin_tokens(settings: &Settings) -> Result<Vec<Secret>, BadKey> {
    let token = ("admin_token", &settings.admin_token);
    secrets(token, ("admin_token_file", &settings.admin_token_file), usable_token)
}

/// The secret of one setting, and those of each line of the file that another one names.
pub(super) fn secrets(
    (setting, given): (&'static str, &Option<Secret>),
    (file_setting, file): (&'static str, &Option<PathBuf>),
    check: impl Fn(&str) -> Result<(), String>,
) -> Result<Vec<Secret>, BadKey> {
    let mut all = Vec::new();
    if let Some(secret) = given {
        check(secret.expose()).map_err(|why| BadKey { setting, why })?;
        all.push(secret.clone());
    }
    let Some(path) = file else { return Ok(all) };
    let bad =
        |why: String| BadKey { setting: file_setting, why: format!("`{}` {why}", path.display()) };
    let text = String::from_utf8(read(path).map_err(bad)?)
        .map_err(|_| bad("holds bytes that are not UTF-8".to_owned()))?;
    let before = all.len();
    for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.is_empty()) {
        check(line).map_err(|why| bad(format!("has a secret in line {number} that {why}")))?;
        all.push(Secret::new(line.to_owned()));
    }
    if all.len() == before {
        return Err(bad("holds no secret".to_owned()));
    }
    Ok(all)
}

/// Whether the secret that everybody can read in RealChat's documents is among the keys.
pub fn has_development_secret(own: &OwnKeys) -> bool {
    own.secrets.iter().any(|secret| secret.expose() == DEVELOPMENT_SECRET)
}

pub(super) fn read(path: &Path) -> Result<Vec<u8>, String> {
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

/// A token goes into a header field (RFC 6750 §2.1).
fn usable_token(token: &str) -> Result<(), String> {
    if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(
            "has a character that an Authorization field cannot carry: use letters and digits"
                .to_owned(),
        );
    }
    if token.len() < SECRET_BYTES_MIN {
        return Err(format!(
            "is shorter than {SECRET_BYTES_MIN} bytes, which is too easy to guess: make one with `openssl rand -base64 32`"
        ));
    }
    Ok(())
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

    #[test]
    fn admin_tokens_are_long_and_fit_into_a_header() {
        let mut settings = dev_settings(&[]);
        assert_eq!(admin_tokens(&settings), Ok(Vec::new()));
        let mut of = |token: &str| {
            settings.admin_token = Some(Secret::new(token.to_owned()));
            admin_tokens(&settings)
        };
        assert_eq!(of(LONG).unwrap().len(), 1);
        let error = of("short").unwrap_err();
        assert!(error.setting == "admin_token" && error.why.contains("openssl rand"), "{error}");
        let error = of(&format!("{LONG} {LONG}")).unwrap_err();
        assert!(error.why.contains("Authorization") && !error.why.contains(LONG), "{error}");
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), format!("{LONG}\n{LONG}x\n")).unwrap();
        let flags = [("admin_token_file", file.path().to_str().unwrap())];
        assert_eq!(admin_tokens(&dev_settings(&flags)).unwrap().len(), 2);
    }
}
