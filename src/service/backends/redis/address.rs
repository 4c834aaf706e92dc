//! The address of Redis: one server or a cluster, with or without TLS and password.
//!
//! | form | meaning |
//! | --- | --- |
//! | `host:port`, `host` | one server (`REDIS_ADDR`; default port 6379) |
//! | `redis://[user:password@]host[:port][/db]` | one server |
//! | `rediss://…` | the same over TLS |
//! | `redis+cluster://[user:password@]host:port[,host:port…]` | a cluster, found through these nodes |
//! | `rediss+cluster://…` | the same over TLS |
//! | two or more of the first three, comma-separated | a cluster |
//!
//! User and password are percent-encoded. In a list, an item without a scheme uses scheme,
//! user and password of the first item.

use std::fmt;

use redis::{ConnectionAddr, ConnectionInfo, IntoConnectionInfo};

/// Maximum number of cluster nodes in an address; they report the others.
const SEEDS_MAX: usize = 64;

/// One server, or some nodes of a cluster. `Debug` and `Display` show hosts and ports only.
#[derive(Clone)]
pub enum RedisAddress {
    /// A single server, or a proxy that acts as one.
    Single(Box<ConnectionInfo>),
    /// At least one node of a Redis Cluster.
    Cluster(Vec<ConnectionInfo>),
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
         rediss, redis+cluster or rediss+cluster (characters such as @ : / % in a password must \
         be percent-encoded)"
    )]
    Malformed(usize),
    /// More than 64 items.
    #[error("the Redis address has more than {SEEDS_MAX} items")]
    TooMany,
    /// A cluster client cannot use Unix sockets.
    #[error("item {0} of the Redis address is not a TCP address")]
    NotTcp(usize),
}

impl RedisAddress {
    /// Parses one of the forms above.
    ///
    /// # Errors
    /// The text has another form; the error does not quote it.
    pub fn parse(text: &str) -> Result<Self, RedisAddressError> {
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
            Self::Cluster(nodes) => nodes,
        }
    }
}

fn node(url: &str) -> Option<ConnectionInfo> {
    let (_, rest) = url.split_once("://")?;
    let host = rest.rsplit_once('@').map_or(rest, |(_, host)| host);
    if host.is_empty() || host.starts_with([':', '/']) {
        return None;
    }
    url.into_connection_info().ok()
}

impl fmt::Display for RedisAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if matches!(self, Self::Cluster(_)) {
            f.write_str("cluster ")?;
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
            RedisAddress::Cluster(_) => panic!("{text} is one server"),
        }
    }

    fn cluster(text: &str) -> Vec<ConnectionInfo> {
        match RedisAddress::parse(text).unwrap() {
            RedisAddress::Cluster(nodes) => nodes,
            RedisAddress::Single(_) => panic!("{text} is a cluster"),
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
