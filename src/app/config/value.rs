//! The types of settings: how each is read from text and shown as text.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use tracing_subscriber::filter::{LevelFilter, Targets};

use crate::domain::command::Secret;
pub use crate::service::routing::kafka::RoutingMode;

/// The type of a setting.
pub trait SettingValue: Sized {
    /// Its name in `--help` and in the reference.
    const KIND: &'static str;
    /// How it is written in TOML.
    const TOML: TomlForm = TomlForm::Text;
    /// Whether its value must never be shown.
    const SECRET: bool = false;

    /// Reads a value.
    ///
    /// # Errors
    /// What is wrong with the text, as the end of a sentence that begins with the text.
    fn parse(text: &str) -> Result<Self, String>;

    /// The text that [`SettingValue::parse`] reads back as the same value (a mask for secrets).
    fn show(&self) -> String;

    /// The number that is compared with the bounds of the setting. `None`: the value has no order.
    fn magnitude(&self) -> Option<u64> {
        None
    }
}

/// How a value is written in TOML.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TomlForm {
    /// A quoted string.
    Text,
    /// An integer or a boolean; a quoted string is accepted too.
    Bare,
    /// An array of strings; a string with commas is accepted too.
    List,
}

/// An address to listen on: `8083`, `:8083` or `host:port`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenAddress {
    /// `None`: the default of the command, every address for `serve` and loopback for `dev`.
    pub ip: Option<IpAddr>,
    /// 0: any free port.
    pub port: u16,
}

impl ListenAddress {
    /// The socket address, with `ip` as the default.
    pub fn or(self, ip: IpAddr) -> SocketAddr {
        SocketAddr::new(self.ip.unwrap_or(ip), self.port)
    }
}

impl SettingValue for ListenAddress {
    const KIND: &'static str = "address";

    fn parse(text: &str) -> Result<Self, String> {
        let bare = text.strip_prefix(':').unwrap_or(text);
        if bare.bytes().all(|b| b.is_ascii_digit()) {
            let port = bare.parse().map_err(|_| "is not a port (0 to 65535)".to_owned())?;
            return Ok(Self { ip: None, port });
        }
        let address = text
            .to_socket_addrs()
            .map_err(|_| {
                "is neither a port nor a host and port, or the host cannot be resolved".to_owned()
            })?
            .next()
            .ok_or("is a host that has no address")?;
        Ok(Self { ip: Some(address.ip()), port: address.port() })
    }

    fn show(&self) -> String {
        match self.ip {
            Some(_) => self.or(Ipv4Addr::UNSPECIFIED.into()).to_string(),
            None => self.port.to_string(),
        }
    }
}

/// The address of another process: `host:port`. Resolved when it is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerAddress(String);

impl PeerAddress {
    /// The text as given.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl SettingValue for PeerAddress {
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

/// The address of a gRPC service: `host:port` or `http://host:port` without TLS,
/// `https://host:port` with TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrpcAddress(String);

impl GrpcAddress {
    /// The address with its scheme.
    pub fn url(&self) -> String {
        if self.0.contains("://") { self.0.clone() } else { format!("http://{}", self.0) }
    }
}

impl SettingValue for GrpcAddress {
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

/// A URL that may contain a password, which is never shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecretUrl(Secret);

impl SecretUrl {
    /// The whole URL with its password: for connecting only.
    pub fn expose(&self) -> &str {
        self.0.expose()
    }

    /// The whole URL as a secret.
    pub fn secret(&self) -> &Secret {
        &self.0
    }
}

impl SettingValue for SecretUrl {
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

    /// The URL with user, password and options masked: options may hold passwords too.
    fn show(&self) -> String {
        let Some((scheme, rest)) = self.expose().split_once("://") else { return MASK.to_owned() };
        let (rest, options) = match rest.split_once('?') {
            Some((rest, _)) => (rest, format!("?{MASK}")),
            None => (rest, String::new()),
        };
        match rest.rsplit_once('@') {
            Some((_, host)) => format!("{scheme}://{MASK}@{host}{options}"),
            None => format!("{scheme}://{rest}{options}"),
        }
    }
}

/// Shown instead of a secret.
pub const MASK: &str = "********";

impl SettingValue for Secret {
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

/// Printable text without spaces.
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

impl SettingValue for Name {
    const KIND: &'static str = "name";

    fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("is empty".to_owned());
        }
        if text.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return Err("contains a space or a control character".to_owned());
        }
        Ok(Self(text.to_owned()))
    }

    fn show(&self) -> String {
        self.0.clone()
    }
}

impl SettingValue for PathBuf {
    const KIND: &'static str = "path";

    fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() { Err("is empty".to_owned()) } else { Ok(text.into()) }
    }

    fn show(&self) -> String {
        self.display().to_string()
    }
}

/// The permissions of a file, in octal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileMode(pub u32);

impl SettingValue for FileMode {
    const KIND: &'static str = "octal mode";

    fn parse(text: &str) -> Result<Self, String> {
        match u32::from_str_radix(text, 8) {
            Ok(mode) if mode <= 0o777 && (3..=4).contains(&text.len()) => Ok(Self(mode)),
            _ => Err("is no mode of a file in octal, such as 0600 or 0660".to_owned()),
        }
    }

    fn show(&self) -> String {
        format!("{:04o}", self.0)
    }
}

/// A number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Count(pub u64);

impl Count {
    /// As a size.
    pub fn size(self) -> usize {
        usize::try_from(self.0).expect("64-bit machines only, asserted in lib.rs")
    }

    /// As a 32-bit number, saturating.
    pub fn u32(self) -> u32 {
        u32::try_from(self.0).unwrap_or(u32::MAX)
    }
}

impl SettingValue for Count {
    const KIND: &'static str = "number";
    const TOML: TomlForm = TomlForm::Bare;

    fn parse(text: &str) -> Result<Self, String> {
        let digits: String = text.chars().filter(|c| *c != '_').collect();
        digits.parse().map(Self).map_err(|_| "is not a whole number".to_owned())
    }

    fn show(&self) -> String {
        self.0.to_string()
    }

    fn magnitude(&self) -> Option<u64> {
        Some(self.0)
    }
}

/// A number of bytes: `65536`, `64KiB` or `1MiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl Size {
    /// In bytes.
    pub fn bytes(self) -> usize {
        usize::try_from(self.0).expect("64-bit machines only, asserted in lib.rs")
    }
}

const SIZE_UNITS: [(&str, u64); 4] =
    [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

impl SettingValue for Size {
    const KIND: &'static str = "size";

    fn parse(text: &str) -> Result<Self, String> {
        let (digits, unit) = SIZE_UNITS
            .iter()
            .find_map(|(suffix, unit)| {
                text.strip_suffix(suffix).map(|rest| (rest.trim_end(), *unit))
            })
            .unwrap_or((text, 1));
        let number: u64 = digits
            .parse()
            .map_err(|_| "is not a size in bytes, or in B, KiB, MiB or GiB".to_owned())?;
        number.checked_mul(unit).map(Self).ok_or_else(|| "is too large".to_owned())
    }

    fn show(&self) -> String {
        let (suffix, unit) = SIZE_UNITS
            .iter()
            .find(|(_, unit)| self.0 >= *unit && self.0.is_multiple_of(*unit))
            .unwrap_or(&("B", 1));
        format!("{}{suffix}", self.0 / unit)
    }

    fn magnitude(&self) -> Option<u64> {
        Some(self.0)
    }
}

const TIME_UNITS: [(&str, u64); 4] = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)];

impl SettingValue for Duration {
    const KIND: &'static str = "time";

    fn parse(text: &str) -> Result<Self, String> {
        let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (digits, suffix) = text.split_at(split);
        let wrong = || "is not a time with a unit (ms, s, m or h)".to_owned();
        let number: u64 = digits.parse().map_err(|_| wrong())?;
        // Zero needs no unit; any other number without one is ambiguous.
        let unit = match TIME_UNITS.iter().find(|(name, _)| *name == suffix.trim()) {
            Some((_, unit)) => *unit,
            None if suffix.is_empty() && number == 0 => 1,
            None => return Err(wrong()),
        };
        number.checked_mul(unit).map(Self::from_millis).ok_or_else(wrong)
    }

    fn show(&self) -> String {
        let ms = self.magnitude().unwrap_or(u64::MAX);
        let (suffix, unit) = TIME_UNITS
            .iter()
            .rev()
            .find(|(_, unit)| ms >= *unit && ms.is_multiple_of(*unit))
            .unwrap_or(&("s", 1_000));
        format!("{}{suffix}", ms / unit)
    }

    fn magnitude(&self) -> Option<u64> {
        u64::try_from(self.as_millis()).ok()
    }
}

impl SettingValue for bool {
    const KIND: &'static str = "true or false";
    const TOML: TomlForm = TomlForm::Bare;

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

/// An empty text means not set.
impl<T: SettingValue> SettingValue for Option<T> {
    const KIND: &'static str = T::KIND;
    const TOML: TomlForm = T::TOML;
    const SECRET: bool = T::SECRET;

    fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() { Ok(None) } else { T::parse(text).map(Some) }
    }

    fn show(&self) -> String {
        self.as_ref().map_or_else(String::new, T::show)
    }
}

/// A value, or `auto`: chosen at start by the rule in the description of the setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Auto<T> {
    /// Chosen at start.
    Auto,
    /// Given by the operator.
    Given(T),
}

impl<T: SettingValue> SettingValue for Auto<T> {
    const KIND: &'static str = T::KIND;
    const TOML: TomlForm = T::TOML;

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

    fn magnitude(&self) -> Option<u64> {
        match self {
            Self::Auto => None,
            Self::Given(value) => value.magnitude(),
        }
    }
}

/// Values separated by commas. An empty text is an empty list.
impl<T: SettingValue> SettingValue for Vec<T> {
    const KIND: &'static str = "list";
    const TOML: TomlForm = TomlForm::List;

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

/// The level of all log lines, the levels of single targets, or both:
/// `info,delivery::service=debug`.
impl SettingValue for Targets {
    const KIND: &'static str = "log levels";

    fn parse(text: &str) -> Result<Self, String> {
        text.split(',').map(str::trim).try_fold(Self::new(), |targets, directive| {
            let (target, level) = directive.rsplit_once('=').unwrap_or(("", directive));
            let parsed = level.parse::<LevelFilter>().ok().filter(|_| !level.is_empty());
            let level = parsed.ok_or_else(|| {
                format!(
                    "has `{level}` in place of a level (off, error, warn, info, debug or trace)"
                )
            })?;
            Ok(match target {
                "" => targets.with_default(level),
                target => targets.with_target(target, level),
            })
        })
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

/// Implements [`SettingValue`] for an enum: each variant is one word.
macro_rules! words {
    ($name:ident { $($variant:ident = $word:literal,)* }) => {
        impl SettingValue for $name {
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

/// Declares an enum and applies `words!` to it.
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
        /// Clients with a valid token.
        Jwt = "jwt",
        /// Anybody, as any user.
        Trust = "trust",
    }
}
choice! {
    /// How an event reaches users on other nodes.
    HandOffMode {
        /// Through topics of the cluster in Kafka.
        Log = "log",
        /// Through the registry and Redis.
        Redis = "redis",
    }
}
choice! {
    /// When to exchange events with nodes that take no hand-offs through the log.
    LegacyNodesMode {
        /// While such nodes may exist.
        Auto = "auto",
        /// Always.
        On = "on",
        /// Never.
        Off = "off",
    }
}
choice! {
    /// Where presence is reported.
    PresenceMode {
        /// To the presence service, over gRPC.
        Service = "service",
        /// To Redis, in the keys and the channel of the presence service.
        Redis = "redis",
        /// Nowhere.
        Off = "off",
    }
}
choice! {
    /// The format of log lines.
    LogFormat {
        /// Text for people.
        Text = "text",
        /// One JSON object per line.
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
        let url = SecretUrl::parse("redis+sentinel://a/main?sentinel_password=hunter2").unwrap();
        assert_eq!(url.show(), "redis+sentinel://a/main?********");
        assert_eq!(Secret::parse("hunter2").unwrap().show(), MASK);
    }

    #[test]
    fn list_error_names_the_invalid_item() {
        let problem = Vec::<PeerAddress>::parse("a:1, b").unwrap_err();
        assert_eq!(problem, "has an item `b` that has no port");
    }

    #[test]
    fn log_levels_are_for_everything_or_for_a_target() {
        for text in ["warn", "librdkafka=debug,info", "off"] {
            assert_eq!(Targets::parse(text).unwrap().show(), text);
        }
        let targets = Targets::parse("info, delivery::service::routing=DEBUG").unwrap();
        let shown = |target, level| targets.would_enable(target, &level);
        use tracing::Level;
        assert!(shown("delivery", Level::INFO) && !shown("delivery", Level::DEBUG));
        assert!(shown("delivery::service::routing::kafka", Level::DEBUG));
        for wrong in
            ["", " ", "info,", "inof", "info,delivery", "delivery=", "delivery=loud", "d[span]=x"]
        {
            let problem = Targets::parse(wrong).unwrap_err();
            assert!(problem.contains("error, warn, info"), "{problem}");
        }
    }
}
