//! Redis, Kafka and the neighbours, as a deployment has them.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::super::child::{Worker, number};
use super::child::{Program, answers, free_port};

const START_MAX: Duration = Duration::from_secs(90);

/// Who is told of sessions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// Redis, and it alone is known of the neighbours: the fan-out of changes and catch-up are off.
    Redis,
    /// The presence service over gRPC; without Redis.
    Service,
    /// Nobody.
    Off,
}

/// Everything around a node.
pub(super) struct Services {
    _kafka: Option<Program>,
    redis: Option<(Program, u16)>,
    pub(super) backend: Worker,
    /// Of the three neighbours.
    pub(super) neighbours: String,
    pub(super) brokers: String,
    pub(super) topics: String,
    presence: Presence,
}

impl Services {
    /// Starts what is needed; Kafka only if `brokers` names none.
    pub(super) fn start(
        directory: &Path,
        backend: &Path,
        brokers: Option<&str>,
        presence: Presence,
        sessions: usize,
    ) -> io::Result<Self> {
        let (kafka, brokers) = match brokers {
            Some(brokers) => (None, brokers.to_owned()),
            None => {
                let (kafka, brokers) = kafka(directory)?;
                (Some(kafka), brokers)
            }
        };
        let redis = (presence == Presence::Redis).then(|| redis(directory)).transpose()?;
        let backend = Worker::start(&[
            backend.display().to_string(),
            format!("--brokers={brokers}"),
            format!("--sessions={sessions}"),
        ])?;
        let ready = backend.expect("ready")?;
        let text = |name: &str| ready[name].as_str().unwrap_or_default().to_owned();
        Ok(Self {
            _kafka: kafka,
            redis,
            neighbours: text("ready"),
            topics: format!("{},{}", text("messages"), text("conversations")),
            backend,
            brokers,
            presence,
        })
    }

    pub(super) fn redis_address(&self) -> Option<String> {
        self.redis.as_ref().map(|(_, port)| format!("127.0.0.1:{port}"))
    }

    /// Sessions that presence holds; `None`: nobody is told.
    pub(super) fn registered(&mut self) -> io::Result<Option<u64>> {
        Ok(match self.presence {
            Presence::Off => None,
            Presence::Service => {
                Some(number(&self.backend.ask("presence", "registered")?, "registered") as u64)
            }
            Presence::Redis => match &self.redis {
                // A key for the session and one for the user's set of devices.
                Some((_, port)) => Some(keys(*port)? / 2),
                None => None,
            },
        })
    }
}

fn kafka(directory: &Path) -> io::Result<(Program, String)> {
    let start = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/services/kafka");
    let data = directory.join("kafka");
    let _ = fs::remove_dir_all(&data);
    let port = free_port()?;
    let mut command = vec![start.display().to_string(), data.display().to_string()];
    // The controller's port is the next but one, should the next be taken meanwhile.
    command.extend([port.to_string(), (port + 2).to_string()]);
    let mut kafka = Program::start("kafka", directory, &command, &[])?;
    kafka.until(START_MAX, || answers(port)).map_err(|error| {
        io::Error::other(format!("{error}; `tests/run setup` fetches Kafka, --brokers names one"))
    })?;
    Ok((kafka, format!("127.0.0.1:{port}")))
}

fn redis(directory: &Path) -> io::Result<(Program, u16)> {
    let port = free_port()?;
    let arguments = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--port"];
    let mut command = vec!["redis-server".to_owned()];
    command.extend(arguments.map(str::to_owned));
    command.push(port.to_string());
    let mut redis = Program::start("redis", directory, &command, &[])?;
    redis.until(START_MAX, || answers(port))?;
    Ok((redis, port))
}

fn keys(port: u16) -> io::Result<u64> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.write_all(b"DBSIZE\r\n")?;
    let mut answer = [0; 32];
    let count = stream.read(&mut answer)?;
    std::str::from_utf8(&answer[..count])
        .ok()
        .and_then(|text| text.trim().strip_prefix(':')?.parse().ok())
        .ok_or_else(|| io::Error::other("Redis does not say how many keys it has"))
}
