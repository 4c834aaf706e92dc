//! A real node: `delivery serve` and its admin port.

use std::io;
use std::path::Path;
use std::time::Duration;

use delivery_testkit::ports::free_port;

use super::services::Services;
use crate::admin::AdminPort;
use crate::program::Program;

const START_MAX: Duration = Duration::from_secs(60);

/// Key and claims of the tokens.
pub(super) const TOKEN_SECRET: &str = "a-secret-of-the-load-with-enough-bytes";
pub(super) const TOKEN_ISSUER: &str = "realchat-auth";
pub(super) const TOKEN_AUDIENCE: &str = "realchat";

/// A running node.
pub(super) struct Node {
    program: Program,
    pub(super) address: String,
    admin: AdminPort,
}

impl Node {
    /// Starts a node that uses `services`, and waits until it is ready. `more` settings come last.
    pub(super) fn start(
        log: &Path,
        program: &Path,
        shards: usize,
        services: &Services,
        settings: &[(&'static str, String)],
        more: &[(String, String)],
    ) -> io::Result<Self> {
        let port = free_port();
        let admin = AdminPort(free_port());
        let mut environment = vec![
            ("HTTP_PORT", format!("127.0.0.1:{port}")),
            ("HTTP_ADDR", format!("127.0.0.1:{}", admin.0)),
            ("GRPC_ADDR", "127.0.0.1:0".to_owned()),
            ("SHARDS", shards.to_string()),
            // All clients connect from one host, at the same time.
            ("HANDSHAKES_PER_SECOND", "0".to_owned()),
            ("HANDSHAKES_PER_SECOND_PER_ADDRESS", "0".to_owned()),
            ("CONNECTIONS_PER_ADDRESS", "0".to_owned()),
            ("AUTH_MODE", "jwt".to_owned()),
            ("JWT_SECRET", TOKEN_SECRET.to_owned()),
            ("JWT_ISSUER", TOKEN_ISSUER.to_owned()),
            ("JWT_AUDIENCE", TOKEN_AUDIENCE.to_owned()),
            ("KAFKA_BROKERS", services.brokers.clone()),
            ("KAFKA_TOPICS", services.topics.clone()),
            // With Redis the node is one of a group that hands over through the log. The brokers may have the
            // sessions of other runs.
            ("KAFKA_GROUP", services.run.clone()),
            ("SESSIONS_TOPIC", format!("{}-sessions", services.run)),
            ("HANDOFF_TOPIC", format!("{}-handoff", services.run)),
        ];
        if let Some(redis) = services.redis_address() {
            environment.push(("REDIS_ADDR", redis));
        }
        environment.extend(settings.iter().cloned());
        environment.extend(more.iter().map(|(name, value)| (name.as_str(), value.clone())));
        let command = [program.display().to_string(), "serve".to_owned()];
        let program = Program::start("delivery", Some(log), &command, &environment)?;
        let mut node = Self { program, address: format!("127.0.0.1:{port}"), admin };
        node.program.wait_until(START_MAX, || admin.is_ready())?;
        Ok(node)
    }

    pub(super) fn id(&self) -> u32 {
        self.program.id()
    }

    /// See [`AdminPort::metric`].
    pub(super) fn metric(&self, name: &str, label: &str) -> io::Result<f64> {
        self.admin.metric(name, label)
    }

    /// See [`AdminPort::metrics`].
    pub(super) fn metrics(&self, name: &str) -> io::Result<Vec<(String, f64)>> {
        self.admin.metrics(name)
    }
}
