//! Allowed origins of web pages (RFC 6455 §10.2, RFC 6454).

/// Allowed values of `Origin`. A request without `Origin` is not from a browser and always allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origins {
    /// Any origin.
    Any,
    /// Only origins that match a pattern.
    Listed(Box<[OriginPattern]>),
}

/// One origin, or all hosts below one domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OriginPattern {
    /// Lower-case scheme with `://`.
    scheme: Box<str>,
    /// Lower-case host and port; starts with a dot for a wildcard.
    authority: Box<str>,
    wildcard: bool,
}

/// A pattern that is not an origin.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not an origin: write `https://app.example.com`, `http://localhost:3000` or `https://*.example.com`"
)]
pub struct BadOrigin(String);

impl Origins {
    /// Parses the setting. `*` alone means any origin.
    ///
    /// # Errors
    ///
    /// [`BadOrigin`] for the first invalid pattern.
    pub fn parse<'a>(patterns: impl IntoIterator<Item = &'a str>) -> Result<Self, BadOrigin> {
        let patterns: Vec<&str> = patterns.into_iter().collect();
        if patterns == ["*"] {
            return Ok(Self::Any);
        }
        Ok(Self::Listed(patterns.into_iter().map(OriginPattern::parse).collect::<Result<_, _>>()?))
    }

    /// Whether a page of this origin may connect.
    pub fn allow(&self, origin: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Listed(patterns) => patterns.iter().any(|pattern| pattern.matches(origin)),
        }
    }
}

impl OriginPattern {
    fn parse(text: &str) -> Result<Self, BadOrigin> {
        let bad = || BadOrigin(text.to_owned());
        let lower = text.to_ascii_lowercase();
        let (scheme, authority) = lower.split_once("://").ok_or_else(bad)?;
        let (wildcard, host) = match authority.strip_prefix('*') {
            Some(rest) if rest.starts_with('.') => (true, &rest[1..]),
            Some(_) => return Err(bad()),
            None => (false, authority),
        };
        let scheme_valid = !scheme.is_empty() && scheme.bytes().all(|b| b.is_ascii_alphanumeric());
        if !scheme_valid || host.contains('*') || !super::target::is_authority(host) {
            return Err(bad());
        }
        let authority = authority.trim_start_matches('*');
        Ok(Self { scheme: format!("{scheme}://").into(), authority: authority.into(), wildcard })
    }

    fn matches(&self, origin: &str) -> bool {
        let origin = origin.to_ascii_lowercase();
        let Some(authority) = origin.strip_prefix(&*self.scheme) else { return false };
        match self.wildcard {
            // Requires a character before the dot: `https://.example.com` has no host.
            true => authority.len() > self.authority.len() && authority.ends_with(&*self.authority),
            false => authority == &*self.authority,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listed_origins_are_allowed() {
        let list = ["https://app.example.com", "http://localhost:3000", "https://*.corp.example"];
        let origins = Origins::parse(list).expect("valid patterns");
        for good in [
            "https://app.example.com",
            "HTTPS://App.Example.Com",
            "http://localhost:3000",
            "https://a.corp.example",
            "https://a.b.corp.example",
        ] {
            assert!(origins.allow(good), "{good}");
        }
        for bad in [
            "",
            "null",
            "http://app.example.com",
            "https://app.example.com:444",
            "https://app.example.com.evil.test",
            "https://evilcorp.example",
            "https://corp.example",
            "https://.corp.example",
            "http://localhost",
        ] {
            assert!(!origins.allow(bad), "{bad}");
        }
        assert!(Origins::parse(["*"]).is_ok_and(|any| any.allow("null")));
    }

    #[test]
    fn error_names_the_invalid_pattern() {
        for bad in [
            "",
            "app.example.com",
            "https://",
            "https://a/b",
            "https://*",
            "https://a.*.b",
            "*://a",
        ] {
            assert_eq!(Origins::parse([bad]), Err(BadOrigin(bad.into())), "{bad}");
        }
    }
}
