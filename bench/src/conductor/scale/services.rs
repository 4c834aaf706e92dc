//! The services around a node: Redis, Kafka and the back end.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::ValueEnum;
use delivery_testkit::ports::free_port;

use crate::conductor::child::{Worker, number};
use crate::program::{Program, is_listening};

const START_MAX: Duration = Duration::from_secs(90);

/// Where the node registers its sessions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Presence {
    /// Redis.
    Redis,
    /// The presence service over gRPC; without Redis.
    Service,
    /// Nowhere.
    Off,
}

/// The running services.
pub(super) struct Services {
    _kafka: Option<Program>,
    redis: Option<(Program, u16)>,
    pub(super) backend: Worker,
    /// Address of the conversation, message and presence services.
    pub(super) neighbours: String,
    pub(super) brokers: String,
    /// Topics of events, separated by commas.
    pub(super) topics: String,
    /// Name of this run; no other run uses it.
    pub(super) run: String,
    presence: Presence,
}

impl Services {
    /// Starts the services; Kafka only if `brokers` names none.
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
            run: text("messages"),
            backend,
            brokers,
            presence,
        })
    }

    pub(super) fn redis_address(&self) -> Option<String> {
        self.redis.as_ref().map(|(_, port)| format!("127.0.0.1:{port}"))
    }

    /// Sessions registered with presence, while none ends; `None`: presence is off.
    pub(super) fn registered(&mut self) -> io::Result<Option<u64>> {
        Ok(match self.presence {
            Presence::Off => None,
            Presence::Service => {
                Some(number(&self.backend.ask("presence", "registered")?, "registered") as u64)
            }
            Presence::Redis => match &self.redis {
                // A key for the session, one for its fence (which outlives it by a minute or two), and one for
                // the user's set of devices.
                Some((_, port)) => Some(keys(*port)? / 3),
                None => None,
            },
        })
    }
}

fn kafka(directory: &Path) -> io::Result<(Program, String)> {
    let start = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/services/kafka");
    let data = directory.join("kafka");
    let _ = fs::remove_dir_all(&data);
    let (port, controller) = (free_port(), free_port());
    let mut command = vec![start.display().to_string(), data.display().to_string()];
    command.extend([port.to_string(), controller.to_string()]);
    let mut kafka = Program::start("kafka", Some(&directory.join("kafka.log")), &command, &[])?;
    kafka.wait_until(START_MAX, || is_listening(port)).map_err(|error| {
        io::Error::other(format!(
            "{error}; run `tests/run setup` first, or name brokers with --brokers"
        ))
    })?;
    Ok((kafka, format!("127.0.0.1:{port}")))
}

fn redis(directory: &Path) -> io::Result<(Program, u16)> {
    let port = free_port();
    let arguments = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--port"];
    let mut command = vec!["redis-server".to_owned()];
    command.extend(arguments.map(str::to_owned));
    command.push(port.to_string());
    let mut redis = Program::start("redis", Some(&directory.join("redis.log")), &command, &[])?;
    redis.wait_until(START_MAX, || is_listening(port))?;
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
        .ok_or_else(|| io::Error::other("DBSIZE: unexpected answer of Redis"))
}
