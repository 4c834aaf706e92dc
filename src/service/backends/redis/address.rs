//! The address of Redis: one server, a primary named by Sentinels, or a cluster, with or without TLS
//! and password.
//!
//! | form | meaning |
//! | --- | --- |
//! | `host:port`, `host` | one server (`REDIS_ADDR`; default port 6379) |
//! | `redis://[user:password@]host[:port][/db]` | one server |
//! | `rediss://…` | the same over TLS |
//! | `redis+cluster://[user:password@]host:port[,host:port…]` | a cluster, found through these nodes |
//! | `rediss+cluster://…` | the same over TLS |
//! | `redis+sentinel://[user:password@]host[:port][,host[:port]…]/NAME[/db][?sentinel_user=…&sentinel_password=…]` | the primary that these Sentinels monitor as NAME (default port 26379) |
//! | `rediss+sentinel://…` | the same over TLS, to the Sentinels and to the servers |
//! | two or more of the first three, comma-separated | a cluster |
//!
//! User and password are percent-encoded. In a list, an item without a scheme uses scheme,
//! user and password of the first item. In a Sentinel address, user, password and database are
//! those of the servers; `sentinel_user` and `sentinel_password` are those of the Sentinels.

use std::fmt;

use redis::{ConnectionAddr, ConnectionInfo, IntoConnectionInfo};

/// Maximum number of cluster nodes or Sentinels in an address; they report the others.
const SEEDS_MAX: usize = 64;

/// Default port of a Sentinel.
const SENTINEL_PORT: u16 = 26_379;

/// One server, Sentinels, or some nodes of a cluster. `Debug` and `Display` show hosts and ports only.
#[derive(Clone)]
pub enum RedisAddress {
    /// A single server, or a proxy that acts as one.
    Single(Box<ConnectionInfo>),
    /// The primary that Sentinels name.
    Sentinel(Box<SentinelAddress>),
    /// At least one node of a Redis Cluster.
    Cluster(Vec<ConnectionInfo>),
}

/// Sentinels and the primary that they monitor.
#[derive(Clone)]
pub struct SentinelAddress {
    /// At least one.
    pub(super) sentinels: Vec<ConnectionInfo>,
    /// The name in `sentinel monitor NAME …`.
    pub(super) primary: String,
    /// TLS, user, password and database of the servers; the host is a placeholder.
    pub(super) server: ConnectionInfo,
}

/// Why an address is invalid. Never quotes it, because it may hold a password.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RedisAddressError {
    /// No item.
    #[error("the Redis address is empty")]
    Empty,
    /// Neither host:port nor a supported URL.
    #[error(
        "item {0} of the Redis address is neither host:port nor a URL with the scheme redis, \
         rediss, redis+cluster, rediss+cluster, redis+sentinel or rediss+sentinel (characters such as @ : / % in a password must \
         be percent-encoded)"
    )]
    Malformed(usize),
    /// More than 64 items.
    #[error("the Redis address has more than {SEEDS_MAX} items")]
    TooMany,
    /// A cluster client cannot use Unix sockets.
    #[error("item {0} of the Redis address is not a TCP address")]
    NotTcp(usize),
    /// A Sentinel address of another form.
    #[error(
        "the Sentinel address {0}: its form is \
         redis+sentinel://user:password@host:26379,host:26379/NAME/db, with the user, password and \
         database of the servers, and NAME as in `sentinel monitor NAME …`; add \
         ?sentinel_user=…&sentinel_password=… if the Sentinels have a password"
    )]
    Sentinel(&'static str),
}

impl RedisAddress {
    /// Parses one of the forms above.
    ///
    /// # Errors
    /// The text has another form; the error does not quote it.
    pub fn parse(text: &str) -> Result<Self, RedisAddressError> {
        if let Some((scheme, rest)) = text.split_once("://")
            && let Some(plain) = scheme.trim().strip_suffix("+sentinel")
        {
            return sentinel(plain, rest.trim()).map(|address| Self::Sentinel(Box::new(address)));
        }
        let items: Vec<&str> =
            text.split(',').map(str::trim).filter(|item| !item.is_empty()).collect();
        let first = *items.first().ok_or(RedisAddressError::Empty)?;
        if items.len() > SEEDS_MAX {
            return Err(RedisAddressError::TooMany);
        }
        let (scheme, rest) = first.split_once("://").unwrap_or(("redis", first));
        let (plain_scheme, cluster) = match scheme.strip_suffix("+cluster") {
            Some(plain) => (plain, true),
            None => (scheme, items.len() > 1),
        };
        let credentials = rest.rsplit_once('@').map(|(credentials, _)| credentials);
        let mut nodes = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            let url = match item.split_once("://") {
                Some((scheme, rest)) => {
                    format!("{}://{rest}", scheme.strip_suffix("+cluster").unwrap_or(scheme))
                }
                None => match credentials {
                    Some(credentials) => format!("{plain_scheme}://{credentials}@{item}"),
                    None => format!("{plain_scheme}://{item}"),
                },
            };
            nodes.push(node(&url).ok_or(RedisAddressError::Malformed(index + 1))?);
        }
        if !cluster {
            return Ok(Self::Single(Box::new(nodes.swap_remove(0))));
        }
        match nodes.iter().position(|node| matches!(node.addr(), ConnectionAddr::Unix(_))) {
            Some(index) => Err(RedisAddressError::NotTcp(index + 1)),
            None => Ok(Self::Cluster(nodes)),
        }
    }

    fn nodes(&self) -> &[ConnectionInfo] {
        match self {
            Self::Single(node) => std::slice::from_ref(node),
            Self::Sentinel(address) => &address.sentinels,
            Self::Cluster(nodes) => nodes,
        }
    }
}

/// Parses what follows `redis+sentinel://`. `scheme`: `redis` or `rediss`.
fn sentinel(scheme: &str, text: &str) -> Result<SentinelAddress, RedisAddressError> {
    use RedisAddressError::Sentinel;
    if !matches!(scheme, "redis" | "rediss") {
        return Err(RedisAddressError::Malformed(1));
    }
    let (text, options) = text.split_once('?').unwrap_or((text, ""));
    let (mut user, mut password) = ("", "");
    for option in options.split('&').filter(|option| !option.is_empty()) {
        match option.split_once('=') {
            Some(("sentinel_user", value)) => user = value,
            Some(("sentinel_password", value)) => password = value,
            _ => return Err(Sentinel("has an unknown option")),
        }
    }
    let (hosts, path) = text.split_once('/').unwrap_or((text, ""));
    let (name, database) = path.split_once('/').unwrap_or((path, ""));
    if name.is_empty() {
        return Err(Sentinel("lacks the name of the primary"));
    }
    let (credentials, hosts) = match hosts.rsplit_once('@') {
        Some((credentials, hosts)) => (format!("{credentials}@"), hosts),
        None => (String::new(), hosts),
    };
    let own = match (user, password) {
        ("", "") => String::new(),
        (_, "") => return Err(Sentinel("has a sentinel_user without a sentinel_password")),
        _ => format!("{user}:{password}@"),
    };
    let hosts: Vec<&str> =
        hosts.split(',').map(str::trim).filter(|host| !host.is_empty()).collect();
    if hosts.len() > SEEDS_MAX {
        return Err(RedisAddressError::TooMany);
    }
    let mut sentinels = Vec::with_capacity(hosts.len());
    for (index, host) in hosts.iter().enumerate() {
        let port = if has_port(host) { String::new() } else { format!(":{SENTINEL_PORT}") };
        let url = format!("{scheme}://{own}{host}{port}");
        sentinels.push(node(&url).ok_or(RedisAddressError::Malformed(index + 1))?);
    }
    let first = sentinels.first().ok_or(Sentinel("names no Sentinel"))?.addr().clone();
    let server = node(&format!("{scheme}://{credentials}host/{database}"))
        .ok_or(Sentinel("has an invalid user, password or database"))?
        .set_addr(first);
    Ok(SentinelAddress { sentinels, primary: name.to_owned(), server })
}

/// Whether a host, which may be an IPv6 address in brackets, is followed by a port.
fn has_port(host: &str) -> bool {
    host.rsplit_once(']').map_or(host, |(_, rest)| rest).contains(':')
}

fn node(url: &str) -> Option<ConnectionInfo> {
    let (_, rest) = url.split_once("://")?;
    let host = rest.rsplit_once('@').map_or(rest, |(_, host)| host);
    if host.is_empty() || host.starts_with([':', '/']) {
        return None;
    }
    url.into_connection_info().ok()
}

/// The same node settings for another host and port.
pub(super) fn at(node: &ConnectionInfo, host: &str, port: u16) -> ConnectionInfo {
    let address = match node.addr() {
        ConnectionAddr::TcpTls { insecure, tls_params, .. } => ConnectionAddr::TcpTls {
            host: host.to_owned(),
            port,
            insecure: *insecure,
            tls_params: tls_params.clone(),
        },
        _ => ConnectionAddr::Tcp(host.to_owned(), port),
    };
    node.clone().set_addr(address)
}

/// The host of a TCP address; empty: a Unix socket.
pub(super) fn host_of(node: &ConnectionInfo) -> &str {
    match node.addr() {
        ConnectionAddr::Tcp(host, _) | ConnectionAddr::TcpTls { host, .. } => host,
        _ => "",
    }
}

impl fmt::Display for RedisAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Single(_) => {}
            Self::Sentinel(address) => write!(f, "{} of the Sentinels ", address.primary)?,
            Self::Cluster(_) => f.write_str("cluster ")?,
        }
        for (index, node) in self.nodes().iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{}", node.addr())?;
        }
        Ok(())
    }
}

impl fmt::Debug for RedisAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn single(text: &str) -> ConnectionInfo {
        match RedisAddress::parse(text).unwrap() {
            RedisAddress::Single(node) => *node,
            address => panic!("{text} is one server: {address}"),
        }
    }

    fn cluster(text: &str) -> Vec<ConnectionInfo> {
        match RedisAddress::parse(text).unwrap() {
            RedisAddress::Cluster(nodes) => nodes,
            address => panic!("{text} is a cluster: {address}"),
        }
    }

    fn sentinels(text: &str) -> SentinelAddress {
        match RedisAddress::parse(text).unwrap() {
            RedisAddress::Sentinel(address) => *address,
            address => panic!("{text} names Sentinels: {address}"),
        }
    }

    #[test]
    fn bare_host_is_one_plain_server() {
        assert_eq!(*single("redis:6380").addr(), ConnectionAddr::Tcp("redis".into(), 6380));
        assert_eq!(*single("redis").addr(), ConnectionAddr::Tcp("redis".into(), 6379));
        assert_eq!(*single("[::1]:6380").addr(), ConnectionAddr::Tcp("::1".into(), 6380));
    }

    #[test]
    fn url_sets_tls_user_password_and_database() {
        let node = single("rediss://app:p%40ss%2Fword@redis.example:6390/3");
        assert!(matches!(node.addr(), ConnectionAddr::TcpTls { port: 6390, .. }));
        assert_eq!(node.redis_settings().username(), Some("app"));
        assert_eq!(node.redis_settings().password(), Some("p@ss/word"));
        assert_eq!(node.redis_settings().db(), 3);
    }

    #[test]
    fn cluster_items_share_scheme_and_credentials_of_the_first() {
        let nodes = cluster("rediss+cluster://app:secret@a:7000, b:7001");
        assert_eq!(
            nodes.iter().map(|node| node.addr().to_string()).collect::<Vec<_>>(),
            ["a:7000", "b:7001"]
        );
        for node in nodes {
            assert!(matches!(node.addr(), ConnectionAddr::TcpTls { .. }));
            assert_eq!(node.redis_settings().password(), Some("secret"));
        }
        assert_eq!(cluster("a:1,b:2").len(), 2);
        assert_eq!(cluster("redis+cluster://a:1").len(), 1);
        assert_eq!(cluster("redis://a:1,redis://b:2").len(), 2);
    }

    #[test]
    fn sentinels_and_servers_have_credentials_of_their_own() {
        let text = "rediss+sentinel://app:p%40ss@a,b:7000,[::1]/main/3\
                    ?sentinel_user=watcher&sentinel_password=hunter%202";
        let SentinelAddress { sentinels, primary, server } = sentinels(text);
        let hosts: Vec<_> = sentinels.iter().map(|node| node.addr().to_string()).collect();
        assert_eq!((hosts.len(), &hosts[..2]), (3, &["a:26379".into(), "b:7000".into()][..]));
        assert!(hosts[2].contains("::1") && hosts[2].ends_with("26379"), "{hosts:?}");
        for node in &sentinels {
            assert!(matches!(node.addr(), ConnectionAddr::TcpTls { .. }));
            assert_eq!(node.redis_settings().username(), Some("watcher"));
            assert_eq!(node.redis_settings().password(), Some("hunter 2"));
        }
        assert_eq!(primary, "main");
        assert!(matches!(server.addr(), ConnectionAddr::TcpTls { .. }));
        assert_eq!(server.redis_settings().username(), Some("app"));
        assert_eq!(server.redis_settings().password(), Some("p@ss"));
        assert_eq!(server.redis_settings().db(), 3);
        let address = RedisAddress::parse(text).unwrap().to_string();
        assert!(address.starts_with("main of the Sentinels a:26379,b:7000"), "{address}");
        assert!(!address.contains("p@ss") && !address.contains("hunter"), "{address}");
    }

    #[test]
    fn plain_sentinel_address_has_no_credentials() {
        let SentinelAddress { sentinels, server, .. } =
            self::sentinels("redis+sentinel://a:1/main");
        assert_eq!(*sentinels[0].addr(), ConnectionAddr::Tcp("a".into(), 1));
        assert_eq!(server.redis_settings().password(), None);
        assert_eq!(server.redis_settings().db(), 0);
    }

    #[test]
    fn error_of_a_sentinel_address_teaches_the_form() {
        for (bad, why) in [
            ("redis+sentinel://a:1", "lacks the name"),
            ("redis+sentinel://a:1/", "lacks the name"),
            ("redis+sentinel:///main", "names no Sentinel"),
            ("redis+sentinel://a/main/x", "invalid user, password or database"),
            ("redis+sentinel://a/main?password=hunter2", "unknown option"),
            ("redis+sentinel://a/main?sentinel_user=hunter2", "without a sentinel_password"),
        ] {
            let error = RedisAddress::parse(bad).unwrap_err().to_string();
            assert!(error.contains(why), "{bad}: {error}");
            assert!(error.contains("redis+sentinel://user:password@host:26379"), "{error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
        let error = RedisAddress::parse("redis+sentinel://a:1,b:x/main").unwrap_err();
        assert_eq!(error, RedisAddressError::Malformed(2));
        let error = RedisAddress::parse("http+sentinel://a:1/main").unwrap_err();
        assert_eq!(error, RedisAddressError::Malformed(1));
    }

    #[test]
    fn malformed_addresses_are_rejected_without_being_quoted() {
        assert_eq!(RedisAddress::parse(" , ").unwrap_err(), RedisAddressError::Empty);
        for bad in ["http://a:1", "redis://", "a:port", ":6379", "redis://u:hunter2@:1/"] {
            let error = RedisAddress::parse(bad).unwrap_err();
            assert_eq!(error, RedisAddressError::Malformed(1), "{bad}");
            assert!(!error.to_string().contains("hunter2"));
        }
        assert_eq!(
            RedisAddress::parse("redis+cluster://a:1,b:x").unwrap_err(),
            RedisAddressError::Malformed(2)
        );
    }

    #[test]
    fn password_is_not_printed() {
        let address = RedisAddress::parse("redis://app:hunter2@a:1").unwrap();
        assert_eq!(format!("{address} {address:?}"), "a:1 a:1");
    }
}
