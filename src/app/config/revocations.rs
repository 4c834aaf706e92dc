//! The file of revoked tokens. Each line has a moment and a user, or `*` for everybody; `#` begins a comment:
//!
//! ```text
//! 2026-11-30T12:00:00Z alice
//! 1764504000 *
//! ```

use std::path::Path;

use super::Settings;
use super::own_keys::BadKey;
use crate::domain::limits::ID_BYTES_MAX;
use crate::service::events::timestamp::{unix_ms, unix_s_of};
use crate::service::sessions::manager::{RevokedTokens, USERS_REVOKED_MAX};

/// Reads the revocations, if a setting names a file.
///
/// # Errors
/// The file cannot be read, or a line cannot be used.
pub fn revocations(settings: &Settings) -> Result<Vec<RevokedTokens>, BadKey> {
    let Some(path) = &settings.revocations_file else { return Ok(Vec::new()) };
    of_file(path).map_err(|why| BadKey {
        setting: "revocations_file",
        why: format!("`{}` {why}", path.display()),
    })
}

fn of_file(path: &Path) -> Result<Vec<RevokedTokens>, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("cannot be read: {error}"))?;
    let now_s = unix_ms() / 1000;
    let mut all = Vec::new();
    for (number, line) in (1..).zip(text.lines().map(str::trim)) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        all.push(of_line(line, now_s).map_err(|why| format!("has a line {number} that {why}"))?);
    }
    if all.len() > USERS_REVOKED_MAX {
        return Err(format!(
            "has more than {USERS_REVOKED_MAX} lines: revoke everybody's tokens instead"
        ));
    }
    Ok(all)
}

fn of_line(line: &str, now_s: u64) -> Result<RevokedTokens, String> {
    let (moment, user) = line
        .split_once(char::is_whitespace)
        .ok_or("has no user behind its moment; `*` means everybody")?;
    let before_s = unix_s_of(moment).ok_or_else(|| {
        format!("begins with `{moment}`, which is no time in seconds since 1970, nor one like 2026-11-30T12:00:00Z")
    })?;
    let user = user.trim_start();
    if user.len() > ID_BYTES_MAX {
        return Err(format!("has a user id of more than {ID_BYTES_MAX} bytes"));
    }
    let user = (user != "*").then_some(user);
    RevokedTokens::new(user, before_s, now_s).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<RevokedTokens>, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        of_file(file.path())
    }

    #[test]
    fn each_line_is_a_revocation() {
        let of = |user, before_s| RevokedTokens::new(user, before_s, before_s).unwrap();
        let text = "# stolen phones\n\n1700000000 alice\n 2023-11-14T22:13:20Z  bob b \n5\t*\n";
        let expected =
            [of(Some("alice"), 1_700_000_000), of(Some("bob b"), 1_700_000_000), of(None, 5)];
        assert_eq!(read(text).unwrap(), expected);
        assert_eq!(read(""), Ok(Vec::new()));
    }

    #[test]
    fn error_names_the_line() {
        for (text, why) in [
            ("5 alice\nalice\n", "has a line 2 that has no user behind its moment"),
            ("alice 5\n", "has a line 1 that begins with `alice`"),
            ("4000000000 alice\n", "has a line 1 that is in the future"),
            (&*format!("5 {}\n", "x".repeat(257)), "has a line 1 that has a user id of more than"),
            (&*"5 a\n".repeat(USERS_REVOKED_MAX + 1), "has more than 100000 lines"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }
}
