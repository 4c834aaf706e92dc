//! The admin API of a node as a client sees it: one request on a connection of its own.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use crate::domain::command::Secret;

/// The port of HTTP_ADDR by default.
const PORT: &str = "8093";
/// Time to connect to one address.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// Longest silence while an answer is awaited. A node gives up after 10 s.
const SILENCE_MAX: Duration = Duration::from_secs(15);
/// Largest answer, bytes: many times that of a thousand sessions.
const ANSWER_BYTES_MAX: u64 = 16 << 20;
/// Header fields of an answer.
const FIELDS_MAX: usize = 64;

/// Where the admin API of one node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Endpoint {
    /// Its port. `host` is what was given.
    Port { address: SocketAddr, host: String },
    /// Its Unix socket.
    Socket(PathBuf),
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Port { address, .. } => write!(f, "http://{address}"),
            Self::Socket(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl Endpoint {
    /// The nodes that a text names: `unix:/path`, or a host with or without `http://` and port. A name stands for all its
    /// IPv4 addresses or, if it has none, for all its IPv6 addresses.
    ///
    /// # Errors
    /// The text is something else, or the name has no address.
    pub(super) fn named(text: &str) -> Result<Vec<Self>, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            return match path.starts_with('/') {
                true => Ok(vec![Self::Socket(path.into())]),
                false => Err(format!(
                    "{text}: not an absolute path; example: unix:/run/delivery/admin.sock"
                )),
            };
        }
        let host = match text.split_once("://") {
            None => text,
            Some(("http", rest)) => rest,
            Some((scheme, _)) => {
                return Err(format!(
                    "{text}: `{scheme}://` is not supported; example: http://node-1:{PORT}"
                ));
            }
        };
        let host = host.trim_end_matches('/');
        if host.is_empty() || host.contains(['/', '?', '@', ' ']) {
            return Err(format!("{text}: not a host with a port; example: http://node-1:{PORT}"));
        }
        let has_port = host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        let host = if has_port && !host.ends_with(']') {
            host.to_owned()
        } else {
            format!("{host}:{PORT}")
        };
        let found = host.to_socket_addrs().map_err(|error| format!("{host}: {error}"))?;
        let (mut all, others): (Vec<_>, Vec<_>) = found.partition(SocketAddr::is_ipv4);
        if all.is_empty() {
            all = others;
        }
        all.sort_unstable();
        all.dedup();
        Ok(all.into_iter().map(|address| Self::Port { address, host: host.clone() }).collect())
    }

    /// Sends a request, and returns the JSON of its answer.
    ///
    /// # Errors
    /// There is no answer, or it says what is wrong.
    pub(super) fn ask(
        &self,
        method: &str,
        path: &str,
        token: Option<&Secret>,
    ) -> Result<Value, String> {
        let failed = |why: String| format!("{self}: {why}");
        let (status, body) =
            self.exchange(method, path, token).map_err(|e| failed(explained(&e)))?;
        if status / 100 != 2 {
            return Err(failed(format!("{status}: {}", body.trim())));
        }
        serde_json::from_str(&body).map_err(|_| {
            failed("the answer is no JSON: is this the admin API of Delivery?".to_owned())
        })
    }

    fn exchange(
        &self,
        method: &str,
        path: &str,
        token: Option<&Secret>,
    ) -> io::Result<(u16, String)> {
        let (mut stream, host): (Box<dyn Stream>, &str) = match self {
            Self::Port { address, host } => {
                let stream = TcpStream::connect_timeout(address, CONNECT_MAX)?;
                stream.set_read_timeout(Some(SILENCE_MAX))?;
                (Box::new(stream), host)
            }
            Self::Socket(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(Some(SILENCE_MAX))?;
                (Box::new(stream), "localhost")
            }
        };
        let authorization = token
            .map_or_else(String::new, |it| format!("Authorization: Bearer {}\r\n", it.expose()));
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {host}\r\n{authorization}Content-Length: 0\r\nConnection: close\r\n\r\n"
        );
        stream.write_all(head.as_bytes())?;
        let mut answer = Vec::new();
        stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer)?;
        parse(&answer).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
    }
}

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

/// The status and the body of a whole answer.
fn parse(answer: &[u8]) -> Option<(u16, String)> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut response = httparse::Response::new(&mut fields);
    let httparse::Status::Complete(head) = response.parse(answer).ok()? else { return None };
    let body = &answer[head..];
    let length = response.headers.iter().find(|it| it.name.eq_ignore_ascii_case("content-length"));
    if let Some(length) = length {
        let length: usize = std::str::from_utf8(length.value).ok()?.parse().ok()?;
        if body.len() != length {
            return None;
        }
    }
    Some((response.code?, String::from_utf8_lossy(body).into_owned()))
}

fn explained(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => {
            format!("{error}: is a node running, with this HTTP_ADDR or ADMIN_SOCKET?")
        }
        io::ErrorKind::PermissionDenied => {
            format!("{error}: use the user that runs the node, or root")
        }
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => {
            "no answer in time: is the node overloaded, or is this another port?".to_owned()
        }
        io::ErrorKind::InvalidData => {
            "no whole HTTP answer: is this the admin port (HTTP_ADDR)?".to_owned()
        }
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_ports_and_sockets() {
        let one = |text: &str| match &Endpoint::named(text).unwrap()[..] {
            [one] => one.to_string(),
            several => panic!("{text}: {several:?}"),
        };
        for (text, expected) in [
            ("127.0.0.1", "http://127.0.0.1:8093"),
            ("http://127.0.0.1:1234/", "http://127.0.0.1:1234"),
            ("[::1]", "http://[::1]:8093"),
            ("http://[::1]:5", "http://[::1]:5"),
            ("localhost:7", "http://127.0.0.1:7"),
            ("unix:/run/a.sock", "unix:/run/a.sock"),
            ("unix:///run/a.sock", "unix:/run/a.sock"),
        ] {
            assert_eq!(one(text), expected, "{text}");
        }
        for (text, why) in [
            ("https://a", "`https://` is not supported"),
            ("unix:a.sock", "not an absolute path"),
            ("http://a/b", "not a host"),
            ("", "not a host"),
        ] {
            assert!(Endpoint::named(text).unwrap_err().contains(why), "{text}");
        }
    }

    #[test]
    fn answer_that_is_cut_off_is_none() {
        let whole = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n{}\n";
        assert_eq!(parse(whole), Some((200, "{}\n".to_owned())));
        for cut in 0..whole.len() {
            assert_eq!(parse(&whole[..cut]), None, "{cut}");
        }
        assert_eq!(parse(b"\x00\x01"), None);
    }
}
