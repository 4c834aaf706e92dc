//! A client of a node's admin port: readiness, metrics, orders.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// How long an answer may take. Only a node that hangs takes as long.
const ANSWER_MAX: Duration = Duration::from_secs(120);

/// An HTTP answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// The head, with the status line.
    pub head: String,
    /// The body.
    pub body: String,
}

/// One request on a connection of its own.
///
/// # Errors
/// The server does not answer in time, or cuts the connection.
pub fn request(address: SocketAddr, method: &str, path: &str) -> std::io::Result<Answer> {
    let mut stream = TcpStream::connect_timeout(&address, ANSWER_MAX)?;
    stream.set_read_timeout(Some(ANSWER_MAX))?;
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    );
    stream.write_all(head.as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    Ok(Answer { status, head: head.into(), body: body.into() })
}

/// A metrics page.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    samples: Vec<(String, f64)>,
}

impl Metrics {
    /// Reads the Prometheus text format.
    pub fn parse(page: &str) -> Self {
        let samples = page
            .lines()
            .filter(|line| !line.starts_with('#'))
            .filter_map(|line| line.rsplit_once(' '))
            .filter_map(|(series, value)| Some((series.to_owned(), value.parse().ok()?)))
            .collect();
        Self { samples }
    }

    /// Reads the metrics of the node with this admin port.
    ///
    /// # Errors
    /// The node does not answer, or not with status 200.
    pub fn of(admin: SocketAddr) -> std::io::Result<Self> {
        let answer = request(admin, "GET", "/metrics")?;
        match answer.status {
            200 => Ok(Self::parse(&answer.body)),
            _ => Err(std::io::Error::other(answer.head)),
        }
    }

    /// The samples of one metric: labels and value.
    pub fn samples(&self, name: &str) -> impl Iterator<Item = (&str, f64)> {
        self.samples.iter().filter_map(move |(series, value)| {
            let labels = series.strip_prefix(name)?;
            (labels.is_empty() || labels.starts_with('{')).then_some((labels, *value))
        })
    }

    /// The sum over the series of this name whose labels contain each of `labels` (`name="value"`).
    pub fn sum(&self, name: &str, labels: &[&str]) -> f64 {
        self.samples(name)
            .filter(|(own, _)| labels.iter().all(|label| own.contains(label)))
            .map(|(_, value)| value)
            .sum()
    }

    /// The series that grew, and by how much.
    pub fn grown_since(&self, before: &Self) -> Vec<(String, f64)> {
        let old: BTreeMap<_, _> =
            before.samples.iter().map(|(name, value)| (name, *value)).collect();
        let grown = self.samples.iter().map(|(name, value)| {
            (name.clone(), value - old.get(name).copied().unwrap_or_default())
        });
        grown.filter(|(_, by)| *by > 0.0).collect()
    }

    /// The series with this prefix that are not 0.
    pub fn nonzero(&self, prefix: &str) -> Vec<(String, f64)> {
        let wanted = |sample: &&(String, f64)| sample.0.starts_with(prefix) && sample.1 != 0.0;
        self.samples.iter().filter(wanted).cloned().collect()
    }

    /// Whether there is a series of this name.
    pub fn has(&self, name: &str) -> bool {
        self.samples(name).next().is_some()
    }
}
