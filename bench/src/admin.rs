//! A client of a node's admin port: readiness and metrics.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::time::Duration;

const ANSWER_MAX: Duration = Duration::from_secs(30);

/// The admin port of a node on this machine.
#[derive(Clone, Copy, Debug)]
pub struct AdminPort(pub u16);

impl AdminPort {
    /// Whether the node is ready.
    pub fn is_ready(self) -> bool {
        self.get("/health/ready").is_ok()
    }

    /// The sum of all samples of a metric whose labels contain `label`.
    ///
    /// # Errors
    /// The node does not answer.
    pub fn metric(self, name: &str, label: &str) -> io::Result<f64> {
        let samples = self.metrics(name)?;
        Ok(samples
            .iter()
            .filter(|(labels, _)| labels.contains(label))
            .map(|(_, value)| value)
            .sum())
    }

    /// All samples of a metric: labels and value.
    ///
    /// # Errors
    /// The node does not answer.
    pub fn metrics(self, name: &str) -> io::Result<Vec<(String, f64)>> {
        let page = self.get("/metrics")?;
        Ok(samples(&page, name).map(|(labels, value)| (labels.to_owned(), value)).collect())
    }

    /// The body of an answer of status 200.
    fn get(self, path: &str) -> io::Result<String> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.0))?;
        stream.set_read_timeout(Some(ANSWER_MAX))?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        match answer.split_once("\r\n\r\n") {
            Some((head, body)) if head.starts_with("HTTP/1.1 200") => Ok(body.to_owned()),
            _ => Err(io::Error::other(format!("GET {path}: {answer}"))),
        }
    }
}

fn samples<'a>(page: &'a str, name: &'a str) -> impl Iterator<Item = (&'a str, f64)> {
    page.lines().filter_map(move |line| {
        let (labels, value) = line.strip_prefix(name)?.rsplit_once(' ')?;
        let is_it = labels.is_empty() || labels.starts_with('{');
        Some((labels, value.parse().ok()?)).filter(|_| is_it)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_of_a_metric_are_found() {
        let page = "# HELP a x\na{part=\"b\"} 1\nab 3\na 2.5\na{part=\"c\"} 4\n";
        assert_eq!(samples(page, "a").count(), 3);
        assert_eq!(samples(page, "ab").collect::<Vec<_>>(), [("", 3.0)]);
    }
}
