//! A real node, `delivery serve`, with what it says of itself.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::time::Duration;

use super::child::{Program, free_port};
use super::services::Services;

const START_MAX: Duration = Duration::from_secs(60);
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// Claims of the tokens, and the key.
pub(super) const TOKEN_SECRET: &str = "a-secret-of-the-load-with-enough-bytes";
pub(super) const TOKEN_ISSUER: &str = "realchat-auth";
pub(super) const TOKEN_AUDIENCE: &str = "realchat";

/// See the module.
pub(super) struct Node {
    program: Program,
    pub(super) address: String,
    admin: u16,
}

impl Node {
    /// Starts it among `services`, ready when this returns. `more` settings come last.
    pub(super) fn start(
        directory: &Path,
        program: &Path,
        shards: usize,
        services: &Services,
        settings: &[(&'static str, String)],
        more: &[(String, String)],
    ) -> io::Result<Self> {
        let port = free_port()?;
        let admin = port + 2;
        let mut environment = vec![
            ("HTTP_PORT", format!("127.0.0.1:{port}")),
            ("HTTP_ADDR", format!("127.0.0.1:{admin}")),
            ("GRPC_ADDR", String::new()),
            ("SHARDS", shards.to_string()),
            // All clients have one host, and come at once.
            ("HANDSHAKES_PER_SECOND", "0".to_owned()),
            ("HANDSHAKES_PER_SECOND_PER_ADDRESS", "0".to_owned()),
            ("CONNECTIONS_PER_ADDRESS", "0".to_owned()),
            ("AUTH_MODE", "jwt".to_owned()),
            ("JWT_SECRET", TOKEN_SECRET.to_owned()),
            ("JWT_ISSUER", TOKEN_ISSUER.to_owned()),
            ("JWT_AUDIENCE", TOKEN_AUDIENCE.to_owned()),
            ("KAFKA_BROKERS", services.brokers.clone()),
            ("KAFKA_TOPICS", services.topics.clone()),
        ];
        if let Some(redis) = services.redis_address() {
            environment.push(("REDIS_ADDR", redis));
        }
        environment.extend(settings.iter().cloned());
        environment.extend(more.iter().map(|(name, value)| (name.as_str(), value.clone())));
        let command = [program.display().to_string(), "serve".to_owned()];
        let program = Program::start("delivery", directory, &command, &environment)?;
        let mut node = Self { program, address: format!("127.0.0.1:{port}"), admin };
        node.program.until(START_MAX, || get(admin, "/health/ready").is_ok())?;
        Ok(node)
    }

    pub(super) fn id(&self) -> u32 {
        self.program.id()
    }

    /// The sum of all samples of a metric that have this in their labels.
    pub(super) fn metric(&self, name: &str, label: &str) -> io::Result<f64> {
        Ok(samples(&get(self.admin, "/metrics")?, name)
            .filter(|(labels, _)| labels.contains(label))
            .map(|(_, value)| value)
            .sum())
    }

    /// All samples of a metric: labels and value.
    pub(super) fn metrics(&self, name: &str) -> io::Result<Vec<(String, f64)>> {
        let page = get(self.admin, "/metrics")?;
        Ok(samples(&page, name).map(|(labels, value)| (labels.to_owned(), value)).collect())
    }
}

fn samples<'a>(page: &'a str, name: &'a str) -> impl Iterator<Item = (&'a str, f64)> {
    page.lines().filter_map(move |line| {
        let (labels, value) = line.strip_prefix(name)?.rsplit_once(' ')?;
        let is_it = labels.is_empty() || labels.starts_with('{');
        Some((labels, value.parse().ok()?)).filter(|_| is_it)
    })
}

/// The body of an answer of status 200.
fn get(port: u16, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
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
