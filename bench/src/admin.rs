//! The admin port of a node on this machine.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use delivery_testkit::admin::{Metrics, request};

/// The port.
#[derive(Clone, Copy, Debug)]
pub struct AdminPort(pub u16);

impl AdminPort {
    fn address(self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.0).into()
    }

    /// Whether the node is ready.
    pub fn is_ready(self) -> bool {
        request(self.address(), "GET", "/health/ready").is_ok_and(|answer| answer.status == 200)
    }

    /// The sum of all samples of a metric whose labels contain `label`.
    ///
    /// # Errors
    /// The node does not answer.
    pub fn metric(self, name: &str, label: &str) -> io::Result<f64> {
        Ok(Metrics::of(self.address())?.sum(name, &[label]))
    }

    /// All samples of a metric: labels and value.
    ///
    /// # Errors
    /// The node does not answer.
    pub fn metrics(self, name: &str) -> io::Result<Vec<(String, f64)>> {
        let metrics = Metrics::of(self.address())?;
        Ok(metrics.samples(name).map(|(labels, value)| (labels.to_owned(), value)).collect())
    }
}
