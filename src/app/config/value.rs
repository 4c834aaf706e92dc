//! The types a setting can have: how each is read from text, and how it is shown again.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use crate::domain::command::Secret;
pub use crate::service::routing::kafka::RoutingMode;

/// A type of the settings table.
pub trait Value: Sized {
    /// What `--help` and the reference call it.
    const KIND: &'static str;
    /// How it is written in TOML.
    const TOML: Toml = Toml::Text;
    /// Whether its value must never be shown.
    const SECRET: bool = false;

    /// Reads it.
    ///
    /// # Errors
    /// What is wrong with the text, as the end of a sentence that begins with the text.
    fn parse(text: &str) -> Result<Self, String>;

    /// The text that [`Value::parse`] reads back as the same value (a mask for secrets).
    fn show(&self) -> String;

    /// Whether it lies between the bounds, both included. Types without an order have none.
    fn within(&self, _min: &Self, _max: &Self) -> bool {
        true
    }
}

/// How a value is written in TOML.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Toml {
    /// A quoted string.
    Text,
    /// An integer or a boolean; a quoted string is accepted too.
    Bare,
    /// An array of strings; a string with commas is accepted too.
    List,
}

/// Where to listen: `8083`, `:8083` or `host:port`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenAddress {
    /// `None`: the command's own choice, every address for `serve` and loopback for `dev`.
    pub ip: Option<IpAddr>,
    /// 0: any free port.
    pub port: u16,
}

impl ListenAddress {
    /// The socket address, with `ip` where none was given.
    pub fn or(self, ip: IpAddr) -> SocketAddr {
        SocketAddr::new(self.ip.unwrap_or(ip), self.port)
    }
}

impl Value for ListenAddress {
    const KIND: &'static str = "address";

    fn parse(text: &str) -> Result<Self, String> {
        let bare = text.strip_prefix(':').unwrap_or(text);
        if bare.bytes().all(|b| b.is_ascii_digit()) {
            let port = bare.parse().map_err(|_| "is not a port (0 to 65535)".to_owned())?;
            return Ok(Self { ip: None, port });
        }
        let address = text
            .to_socket_addrs()
            .map_err(|_| "is not a port, nor a host and port that this machine knows".to_owned())?
            .next()
            .ok_or("is a host without an address")?;
        Ok(Self { ip: Some(address.ip()), port: address.port() })
    }

    fn show(&self) -> String {
        match self.ip {
            Some(_) => self.or(Ipv4Addr::UNSPECIFIED.into()).to_string(),
            None => self.port.to_string(),
        }
    }
}

/// Another process: `host:port`. Not resolved before it is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerAddress(String);

impl PeerAddress {
    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Value for PeerAddress {
    const KIND: &'static str = "host:port";

    fn parse(text: &str) -> Result<Self, String> {
        let (host, port) = text.rsplit_once(':').ok_or("has no port")?;
        if host.is_empty() || host.contains(['/', '@', ' ']) {
            return Err("is not host:port".to_owned());
        }
        match port.parse::<u16>() {
            Ok(0) | Err(_) => Err("has no port from 1 to 65535".to_owned()),
            Ok(_) => Ok(Self(text.to_owned())),
        }
    }

    fn show(&self) -> String {
        self.0.clone()
    }
}

/// A neighbour's gRPC address: `host:port` and `http://host:port` in the clear, `https://host:port`
/// with TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrpcAddress(String);

impl GrpcAddress {
    /// With its scheme.
    pub fn url(&self) -> String {
        if self.0.contains("://") { self.0.clone() } else { format!("http://{}", self.0) }
    }
}

impl Value for GrpcAddress {
    const KIND: &'static str = "host:port or URL";

    fn parse(text: &str) -> Result<Self, String> {
        let rest = match text.split_once("://") {
            Some(("http" | "https", rest)) => rest.trim_end_matches('/'),
            Some(_) => return Err("has a scheme other than http and https".to_owned()),
            None => text,
        };
        PeerAddress::parse(rest)?;
        Ok(Self(text.trim_end_matches('/').to_owned()))
    }

    fn show(&self) -> String {
        self.0.clone()
    }
}

/// A URL that may hold a password: shown without it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecretUrl(Secret);

impl SecretUrl {
    /// The whole URL, password included: for connecting only.
    pub fn expose(&self) -> &str {
        self.0.expose()
    }

    /// The same, still wrapped.
    pub fn secret(&self) -> &Secret {
        &self.0
    }

    /// The URL with its password masked.
    pub fn masked(&self) -> String {
        let url = self.expose();
        let Some((scheme, rest)) = url.split_once("://") else { return MASK.to_owned() };
        match rest.rsplit_once('@') {
            Some((_, host)) => format!("{scheme}://{MASK}@{host}"),
            None => url.to_owned(),
        }
    }
}

impl Value for SecretUrl {
    const KIND: &'static str = "URL";
    const SECRET: bool = true;

    fn parse(text: &str) -> Result<Self, String> {
        match text.split_once("://") {
            Some((scheme, rest)) if !scheme.is_empty() && !rest.is_empty() => {
                Ok(Self(Secret::new(text.to_owned())))
            }
            _ => Err("is not a URL".to_owned()),
        }
    }

    fn show(&self) -> String {
        self.masked()
    }
}

/// What is shown in a secret's place.
pub const MASK: &str = "********";

impl Value for Secret {
    const KIND: &'static str = "secret";
    const SECRET: bool = true;

    fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("is empty".to_owned());
        }
        Ok(Self::new(text.to_owned()))
    }

    fn show(&self) -> String {
        MASK.to_owned()
    }
}

/// A name: printable, without spaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name(String);

impl Name {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Value for Name {
    const KIND: &'static str = "name";

    fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("is empty".to_owned());
        }
        if text.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return Err("holds a space or a control character".to_owned());
        }
        Ok(Self(text.to_owned()))
    }

    fn show(&self) -> String {
        self.0.clone()
    }
}

impl Value for PathBuf {
    const KIND: &'static str = "path";

    fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() { Err("is empty".to_owned()) } else { Ok(text.into()) }
    }

    fn show(&self) -> String {
        self.display().to_string()
    }
}

/// A plain number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Count(pub u64);

impl Count {
    /// As a table size. Every bound in the table fits.
    pub fn size(self) -> usize {
        usize::try_from(self.0).expect("64-bit machines only: asserted in lib.rs")
    }

    /// As a 32-bit number; more is taken for the greatest.
    pub fn u32(self) -> u32 {
        u32::try_from(self.0).unwrap_or(u32::MAX)
    }
}

impl Value for Count {
    const KIND: &'static str = "number";
    const TOML: Toml = Toml::Bare;

    fn parse(text: &str) -> Result<Self, String> {
        let digits: String = text.chars().filter(|c| *c != '_').collect();
        digits.parse().map(Self).map_err(|_| "is not a whole number".to_owned())
    }

    fn show(&self) -> String {
        self.0.to_string()
    }

    fn within(&self, min: &Self, max: &Self) -> bool {
        (min..=max).contains(&self)
    }
}

/// Bytes: `65536`, `64KiB` or `1MiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl Size {
    /// In bytes.
    pub fn bytes(self) -> usize {
        usize::try_from(self.0).expect("64-bit machines only: asserted in lib.rs")
    }
}

const SIZE_UNITS: [(&str, u64); 4] =
    [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

impl Value for Size {
    const KIND: &'static str = "size";

    fn parse(text: &str) -> Result<Self, String> {
        let (digits, unit) = SIZE_UNITS
            .iter()
            .find_map(|(suffix, unit)| {
                text.strip_suffix(suffix).map(|rest| (rest.trim_end(), *unit))
            })
            .unwrap_or((text, 1));
        let number: u64 =
            digits.parse().map_err(|_| "is not a size in bytes, KiB, MiB or GiB".to_owned())?;
        number.checked_mul(unit).map(Self).ok_or_else(|| "is more than any machine has".to_owned())
    }

    fn show(&self) -> String {
        let (suffix, unit) = SIZE_UNITS
            .iter()
            .find(|(_, unit)| self.0 >= *unit && self.0.is_multiple_of(*unit))
            .unwrap_or(&("B", 1));
        format!("{}{suffix}", self.0 / unit)
    }

    fn within(&self, min: &Self, max: &Self) -> bool {
        (min..=max).contains(&self)
    }
}

const TIME_UNITS: [(&str, u64); 4] = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)];

impl Value for Duration {
    const KIND: &'static str = "time";

    fn parse(text: &str) -> Result<Self, String> {
        let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (digits, suffix) = text.split_at(split);
        let wrong = || "is not a time with its unit (ms, s, m or h)".to_owned();
        let number: u64 = digits.parse().map_err(|_| wrong())?;
        // Zero needs no unit; any other bare number could mean two things.
        let unit = match TIME_UNITS.iter().find(|(name, _)| *name == suffix.trim()) {
            Some((_, unit)) => *unit,
            None if suffix.is_empty() && number == 0 => 1,
            None => return Err(wrong()),
        };
        number.checked_mul(unit).map(Self::from_millis).ok_or_else(wrong)
    }

    fn show(&self) -> String {
        let ms = u64::try_from(self.as_millis()).unwrap_or(u64::MAX);
        let (suffix, unit) = TIME_UNITS
            .iter()
            .rev()
            .find(|(_, unit)| ms >= *unit && ms.is_multiple_of(*unit))
            .unwrap_or(&("s", 1_000));
        format!("{}{suffix}", ms / unit)
    }

    fn within(&self, min: &Self, max: &Self) -> bool {
        (min..=max).contains(&self)
    }
}

impl Value for bool {
    const KIND: &'static str = "true or false";
    const TOML: Toml = Toml::Bare;

    fn parse(text: &str) -> Result<Self, String> {
        match text.to_ascii_lowercase().as_str() {
            "true" | "1" | "yes" | "on" => Ok(true),
            "false" | "0" | "no" | "off" => Ok(false),
            _ => Err("is neither true nor false".to_owned()),
        }
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

/// Not set where the text is empty.
impl<T: Value> Value for Option<T> {
    const KIND: &'static str = T::KIND;
    const TOML: Toml = T::TOML;
    const SECRET: bool = T::SECRET;

    fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() { Ok(None) } else { T::parse(text).map(Some) }
    }

    fn show(&self) -> String {
        self.as_ref().map_or_else(String::new, T::show)
    }

    fn within(&self, min: &Self, max: &Self) -> bool {
        match (self, min, max) {
            (Some(value), Some(min), Some(max)) => value.within(min, max),
            _ => true,
        }
    }
}

/// A value or `auto`: found out at start by the rule in the setting's description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Auto<T> {
    /// By the rule.
    Auto,
    /// Given.
    Given(T),
}

impl<T: Value> Value for Auto<T> {
    const KIND: &'static str = T::KIND;
    const TOML: Toml = T::TOML;

    fn parse(text: &str) -> Result<Self, String> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        T::parse(text).map(Self::Given).map_err(|problem| format!("{problem}, nor `auto`"))
    }

    fn show(&self) -> String {
        match self {
            Self::Auto => "auto".to_owned(),
            Self::Given(value) => value.show(),
        }
    }

    fn within(&self, min: &Self, max: &Self) -> bool {
        match (self, min, max) {
            (Self::Given(value), Self::Given(min), Self::Given(max)) => value.within(min, max),
            _ => true,
        }
    }
}

/// Comma-separated values. Empty text is an empty list.
impl<T: Value> Value for Vec<T> {
    const KIND: &'static str = "list";
    const TOML: Toml = Toml::List;

    fn parse(text: &str) -> Result<Self, String> {
        text.split(',')
            .map(str::trim)
            .filter(|item| !item.is_empty())
            .map(|item| {
                T::parse(item).map_err(|problem| format!("has an item `{item}` that {problem}"))
            })
            .collect()
    }

    fn show(&self) -> String {
        self.iter().map(T::show).collect::<Vec<_>>().join(",")
    }
}

/// Reads an enum as a setting that is one of a few words.
macro_rules! words {
    ($name:ident { $($variant:ident = $word:literal,)* }) => {
        impl Value for $name {
            const KIND: &'static str = concat!("one of:", $(" ", $word),*);

            fn parse(text: &str) -> Result<Self, String> {
                match text {
                    $($word => Ok(Self::$variant),)*
                    _ => Err(concat!("is none of:", $(" ", $word),*).to_owned()),
                }
            }

            fn show(&self) -> String {
                match self { $(Self::$variant => $word,)* }.to_owned()
            }
        }
    };
}

/// Declares an enum that is read as one of a few words.
macro_rules! choice {
    ($(#[$outer:meta])* $name:ident { $($(#[$inner:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$outer])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($(#[$inner])* $variant,)* }

        words! { $name { $($variant = $word,)* } }
    };
}

words! { RoutingMode { Group = "group", Broadcast = "broadcast", } }

choice! {
    /// Who may connect.
    AuthMode {
        /// Whoever has a valid token.
        Jwt = "jwt",
        /// Everybody, as anybody.
        Trust = "trust",
    }
}
choice! {
    /// Who is told about sessions.
    PresenceMode {
        /// The presence service, by gRPC.
        Service = "service",
        /// Its keys and channel in Redis, written directly.
        Redis = "redis",
        /// Nobody.
        Off = "off",
    }
}
choice! {
    /// How a log line looks.
    LogFormat {
        /// For people.
        Text = "text",
        /// For machines: one JSON object a line.
        Json = "json",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_forms_of_the_contract() {
        for (text, ip, port) in [
            ("8083", None, 8083),
            (":8083", None, 8083),
            ("127.0.0.1:8083", Some("127.0.0.1"), 8083),
            ("[::1]:8083", Some("::1"), 8083),
        ] {
            let parsed = ListenAddress::parse(text).unwrap();
            assert_eq!(parsed, ListenAddress { ip: ip.map(|ip| ip.parse().unwrap()), port });
        }
        assert!(ListenAddress::parse("localhost:80").unwrap().ip.unwrap().is_loopback());
        for wrong in ["65536", "http", "", ":", "1.2.3.4", "host:"] {
            assert!(ListenAddress::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn times_and_sizes_read_back_what_they_show() {
        for text in ["0s", "1ms", "1500ms", "54s", "5m", "2h"] {
            assert_eq!(Duration::parse(text).unwrap().show(), text);
        }
        for text in ["1B", "64KiB", "3MiB", "2GiB", "1025B"] {
            assert_eq!(Size::parse(text).unwrap().show(), text);
        }
        assert_eq!(Duration::parse("0").unwrap(), Duration::ZERO);
        for wrong in ["", "5", "s", "-1s", "1.5s", "5 days", "99999999999999999h"] {
            assert!(Duration::parse(wrong).is_err(), "{wrong}");
        }
        for wrong in ["", "KiB", "-1", "64kb", "99999999999GiB"] {
            assert!(Size::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn grpc_address_says_whether_it_wants_tls() {
        assert_eq!(GrpcAddress::parse("msg:50052").unwrap().url(), "http://msg:50052");
        assert_eq!(GrpcAddress::parse("https://msg:443/").unwrap().url(), "https://msg:443");
        for wrong in ["msg", "ftp://msg:1", "msg:0", ":1", "http://"] {
            assert!(GrpcAddress::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn passwords_are_masked() {
        let url = SecretUrl::parse("rediss://user:hunter2@redis:6379/0").unwrap();
        assert_eq!(url.show(), "rediss://********@redis:6379/0");
        assert!(!format!("{url:?}").contains("hunter2"));
        assert_eq!(Secret::parse("hunter2").unwrap().show(), MASK);
    }

    #[test]
    fn list_names_the_item_at_fault() {
        let problem = Vec::<PeerAddress>::parse("a:1, b").unwrap_err();
        assert_eq!(problem, "has an item `b` that has no port");
    }
}
