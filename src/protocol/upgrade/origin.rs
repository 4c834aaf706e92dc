//! Allowed origins of web pages (RFC 6455 §10.2, RFC 6454).

use super::target;

/// Allowed values of `Origin`. A request without `Origin` is not from a browser and always allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origins {
    /// Any origin.
    Any,
    /// Only origins that match a pattern.
    Listed(Box<[OriginPattern]>),
}

/// One origin, all hosts below one domain, or all ports of a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OriginPattern {
    /// `null`: pages without an origin of their own, such as those of sandboxed frames and of files.
    Null,
    /// `scheme://host`, with or without a port.
    Site {
        /// Lower-case scheme.
        scheme: Box<str>,
        /// Lower-case host. Starts with a dot for all hosts below it. Empty for `file://`.
        host: Box<str>,
        /// Its port.
        port: PortPattern,
    },
}

/// The port of an origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortPattern {
    /// Any, or none.
    Any,
    /// This one. `None`: that of the scheme, or none.
    One(Option<u16>),
}

/// A pattern that is not an origin.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{entry}` is not an origin: {advice}")]
pub struct BadOrigin {
    entry: String,
    advice: String,
}

/// What is said of an entry that resembles no origin.
const FORMS: &str =
    "write `https://app.example.com`, `https://*.example.com`, `http://localhost:*` or `null`";

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
        let parse = |entry: &&str| OriginPattern::parse(entry).ok_or_else(|| BadOrigin::of(entry));
        Ok(Self::Listed(patterns.iter().map(parse).collect::<Result<_, _>>()?))
    }

    /// Whether a page of this origin may connect.
    pub fn allow(&self, origin: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Listed(patterns) => {
                let origin = origin.to_ascii_lowercase();
                patterns.iter().any(|pattern| pattern.matches(&origin))
            }
        }
    }
}

impl OriginPattern {
    fn parse(text: &str) -> Option<Self> {
        let text = text.to_ascii_lowercase();
        if text == "null" {
            return Some(Self::Null);
        }
        let (scheme, authority) = text.split_once("://")?;
        let is_scheme = scheme.starts_with(|first: char| first.is_ascii_alphabetic())
            && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte));
        let (whole_host, port) = split_port(authority);
        let host = whole_host.strip_prefix('*').unwrap_or(whole_host);
        let is_wildcard = host.len() < whole_host.len();
        let port = match port {
            Some("*") => PortPattern::Any,
            Some(digits) => PortPattern::One(other_port(scheme, digits.parse().ok()?)),
            None => PortPattern::One(None),
        };
        let is_host = match host.strip_prefix('.').filter(|_| is_wildcard) {
            Some(domain) => target::is_authority(domain) && !domain.starts_with(['[', '.']),
            None if host.is_empty() => scheme == "file" && port == PortPattern::One(None),
            None => !is_wildcard && target::is_authority(host) && !host.starts_with('.'),
        };
        if !is_scheme || !is_host || host.contains('*') {
            return None;
        }
        Some(Self::Site { scheme: scheme.into(), host: host.into(), port })
    }

    /// `origin`: in lower case.
    fn matches(&self, origin: &str) -> bool {
        let Self::Site { scheme, host, port } = self else { return origin == "null" };
        let Some(authority) =
            origin.strip_prefix(&**scheme).and_then(|rest| rest.strip_prefix("://"))
        else {
            return false;
        };
        let (origin_host, origin_port) = split_port(authority);
        let origin_port = match origin_port.map(str::parse) {
            Some(Ok(port)) => other_port(scheme, port),
            Some(Err(_)) => return false,
            None => None,
        };
        let is_host = match host.starts_with('.') {
            // Requires a character before the dot: `https://.example.com` has no host.
            true => origin_host.len() > host.len() && origin_host.ends_with(&**host),
            false => origin_host == &**host,
        };
        is_host && (*port == PortPattern::Any || *port == PortPattern::One(origin_port))
    }
}

impl BadOrigin {
    /// Says what a browser would send instead, if that can be guessed.
    fn of(entry: &str) -> Self {
        let (scheme, rest) = match entry.trim().split_once("://") {
            Some((scheme, rest)) => (Some(scheme), rest),
            None => (None, entry.trim()),
        };
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let authority = authority.rsplit('@').next().unwrap_or_default();
        let host = split_port(authority).0;
        let scheme = scheme.unwrap_or(match host {
            "localhost" | "127.0.0.1" | "[::1]" => "http",
            _ => "https",
        });
        let guess = format!("{scheme}://{authority}");
        let advice = if !entry.is_ascii() {
            "write the host as browsers send it, in Punycode (`xn--…`)".to_owned()
        } else if guess != entry && OriginPattern::parse(&guess).is_some() {
            format!("a browser would send `{guess}`")
        } else if entry.contains('*') {
            "a `*` stands for what is left of a domain (`https://*.example.com`), for a port \
             (`http://localhost:*`), or alone for every origin"
                .to_owned()
        } else {
            FORMS.to_owned()
        };
        Self { entry: entry.to_owned(), advice }
    }
}

/// The host, which may be an IPv6 address in brackets, and what follows its colon.
fn split_port(authority: &str) -> (&str, Option<&str>) {
    match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (authority, None),
    }
}

/// `None` for the port of the scheme: browsers leave it out (RFC 6454 §6.1).
fn other_port(scheme: &str, port: u16) -> Option<u16> {
    (!matches!((scheme, port), ("https", 443) | ("http", 80))).then_some(port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listed_origins_are_allowed() {
        let list = [
            "https://app.example.com",
            "http://localhost:3000",
            "https://*.corp.example",
            "https://with-port.example:443",
            "http://127.0.0.1:*",
            "http://[::1]:8080",
            "https://*.ports.example:*",
            "chrome-extension://mhjfbmdgcfjbbpaeojofohoefgiehjai",
            "file://",
        ];
        let origins = Origins::parse(list).expect("valid patterns");
        for good in [
            "https://app.example.com",
            "https://app.example.com:443",
            "HTTPS://App.Example.Com",
            "http://localhost:3000",
            "https://a.corp.example",
            "https://a.b.corp.example",
            "https://with-port.example",
            "http://127.0.0.1",
            "http://127.0.0.1:5173",
            "http://[::1]:8080",
            "https://a.ports.example:8443",
            "chrome-extension://mhjfbmdgcfjbbpaeojofohoefgiehjai",
            "file://",
        ] {
            assert!(origins.allow(good), "{good}");
        }
        for bad in [
            "",
            "null",
            "http://app.example.com",
            "https://app.example.com:444",
            "https://app.example.com:80",
            "https://app.example.com:",
            "https://app.example.com.evil.test",
            "https://evilcorp.example",
            "https://corp.example",
            "https://.corp.example",
            "https://a.corp.example:8443",
            "http://localhost",
            "http://127.0.0.1:x",
            "http://127.0.0.1:70000",
            "http://127.0.0.1.evil.test:80",
            "http://[::1]",
            "chrome-extension://other",
            "file://host",
            "https://ports.example:1",
        ] {
            assert!(!origins.allow(bad), "{bad}");
        }
        assert!(Origins::parse(["*"]).is_ok_and(|any| any.allow("null")));
        let null = Origins::parse(["null"]).unwrap();
        assert!(null.allow("null") && !null.allow("https://null") && !null.allow(""));
    }

    #[test]
    fn error_names_the_invalid_pattern_and_what_a_browser_would_send() {
        for (bad, advice) in [
            ("", "write `https://app.example.com`"),
            ("app.example.com", "send `https://app.example.com`"),
            ("localhost:3000", "send `http://localhost:3000`"),
            ("localhost:*", "send `http://localhost:*`"),
            ("https://", "write `https://app.example.com`"),
            ("https://a/b", "send `https://a`"),
            ("https://a.example/", "send `https://a.example`"),
            ("file:///", "send `file://`"),
            ("https://user@a.example", "send `https://a.example`"),
            ("https://*", "a `*` stands for"),
            ("https://a.*.b", "a `*` stands for"),
            ("*://a", "a `*` stands for"),
            ("https://bücher.example", "Punycode"),
            ("https://a:70000", "write `https://app.example.com`"),
            ("https://a:", "write `https://app.example.com`"),
        ] {
            let error = Origins::parse([bad]).unwrap_err().to_string();
            assert!(error.contains(&format!("`{bad}`")) && error.contains(advice), "{error}");
        }
    }
}
