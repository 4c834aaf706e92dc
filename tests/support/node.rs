//! A Delivery process: configured through its environment, observed from outside only.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use delivery_testkit::admin::{Answer, Metrics, request};
use delivery_testkit::ports::free_port;
use rustix::process::{Pid, Signal, kill_process};

use super::wait::{SOON, until};

/// Lines of a node's output that are shown when its test fails.
const LAST_LINES: usize = 40;

/// The binary under test: `DELIVERY_BIN`, or the one cargo built with the tests.
pub fn binary() -> PathBuf {
    std::env::var_os("DELIVERY_BIN")
        .map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_delivery")), PathBuf::from)
}

fn local(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

/// Configuration of a node: environment variables, as in a deployment.
#[derive(Clone, Debug)]
pub struct NodeBuilder {
    command: &'static str,
    settings: BTreeMap<String, String>,
    /// File for its output; `None`: a new file.
    output: Option<&'static str>,
    /// Commands of the shell that starts it.
    limits: String,
}

impl NodeBuilder {
    /// `delivery serve`, one shard, no tokens, on ports of its own.
    pub fn serve() -> Self {
        Self { command: "serve", settings: BTreeMap::new(), output: None, limits: String::new() }
            .base()
    }

    /// `delivery dev` without its demo. Needs no other service.
    pub fn dev() -> Self {
        Self { command: "dev", settings: BTreeMap::new(), output: None, limits: String::new() }
            .base()
            .set("DEV_DEMO", "false")
    }

    fn base(self) -> Self {
        self.set("HTTP_PORT", local(free_port()))
            .set("HTTP_ADDR", local(free_port()))
            .set("GRPC_ADDR", local(free_port()))
            .set("SHARDS", 1)
            .set("AUTH_MODE", "trust")
            // No load balancer polls it.
            .set("DRAIN_DELAY", "0s")
            // No test may fail because the machine is slow. A test of a time limit sets that limit.
            .set("CALL_TIMEOUT", "60s")
            .set("HANDSHAKE_TIMEOUT", "2m")
            .set("IDLE_TIMEOUT", "10m")
            .set("PING_INTERVAL", "5m")
            .set("WRITE_TIMEOUT", "2m")
            // All clients of a test connect from one address.
            .set("CONNECTIONS_PER_ADDRESS", 0)
            .set("HANDSHAKES_PER_SECOND_PER_ADDRESS", 0)
    }

    /// Sets one variable.
    pub fn set(mut self, name: &str, value: impl ToString) -> Self {
        self.settings.insert(name.into(), value.to_string());
        self
    }

    /// Reads this topic, in a consumer group of its own.
    pub fn kafka(self, brokers: &str, topic: &str) -> Self {
        self.set("KAFKA_BROKERS", brokers).set("KAFKA_TOPICS", topic).set("KAFKA_GROUP", topic)
    }

    /// The same settings on other ports.
    pub fn on_ports_of_its_own(self) -> Self {
        let shards = self.settings["SHARDS"].clone();
        self.base().set("SHARDS", shards)
    }

    /// Writes its output to an existing file.
    pub fn output(mut self, path: &'static str) -> Self {
        self.output = Some(path);
        self
    }

    /// The shell runs this first, such as `ulimit -n 64`.
    pub fn under(mut self, limits: &str) -> Self {
        self.limits = limits.into();
        self
    }

    fn address(&self, name: &str) -> SocketAddr {
        let value = &self.settings[name];
        match value.parse() {
            Ok(port) => local(port),
            Err(_) => value.parse().expect("a port, or host:port"),
        }
    }

    /// Starts it without waiting for readiness. Its output goes to a file in the target folder.
    pub fn spawn(&self) -> Node {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let log_path = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("node-{}-{number}.log", std::process::id()));
        let log = match self.output {
            Some(path) => File::options().write(true).open(path),
            None => File::create(&log_path),
        };
        let log = log.expect("a log file");
        // The kernel kills the node when the test ends, even if the test is killed.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--", "bash", "-c"])
            .arg(format!("{}\nexec \"$0\" \"$@\"", self.limits))
            .arg(binary())
            .arg(self.command)
            .env_clear()
            .envs(std::env::var_os("PATH").map(|path| ("PATH", path)))
            .envs(std::env::var_os("DELIVERY_LOG").map(|filter| ("LOG_LEVEL", filter)))
            .envs(&self.settings)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .spawn()
            .expect("the binary starts");
        Node {
            child,
            log_path,
            public: self.address("HTTP_PORT"),
            admin: self.address("HTTP_ADDR"),
            grpc: self.address("GRPC_ADDR"),
        }
    }

    /// Starts it and waits until it is ready.
    pub fn start(&self) -> Node {
        let mut node = self.spawn();
        node.wait_ready();
        node
    }
}

/// A running node; killed when dropped.
#[derive(Debug)]
pub struct Node {
    child: Child,
    log_path: PathBuf,
    /// The WebSocket address.
    pub public: SocketAddr,
    /// Health and metrics.
    pub admin: SocketAddr,
    /// The gRPC stream.
    pub grpc: SocketAddr,
}

impl Node {
    /// Waits for `200` of `/health/ready`.
    pub fn wait_ready(&mut self) {
        until(SOON, "the node is ready", || {
            if let Some(status) = self.child.try_wait().expect("our child") {
                panic!("the node exited ({status}):\n{}", self.log());
            }
            self.get("/health/ready").filter(|answer| answer.status == 200).map(|_| ())
        });
    }

    /// Its output so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log_path).unwrap_or_default()
    }

    /// An answer of the admin port; `None`: no answer.
    pub fn get(&self, path: &str) -> Option<Answer> {
        request(self.admin, "GET", path).ok()
    }

    /// Posts to the admin port.
    pub fn post(&self, path: &str) -> Option<Answer> {
        request(self.admin, "POST", path).ok()
    }

    /// Every sample of the metrics page.
    pub fn metrics(&self) -> Metrics {
        Metrics::of(self.admin).expect("the admin port answers")
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("it is running");
    }

    /// Its exit status, if it has exited.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("our child")
    }

    /// Sends SIGTERM and waits until it exits.
    pub fn stop(&mut self, limit: Duration) -> ExitStatus {
        self.signal(Signal::TERM);
        until(limit, "the node stops after SIGTERM", || self.ended())
    }

    /// Sends SIGKILL.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Resident memory, bytes.
    pub fn resident_bytes(&self) -> u64 {
        let process = procfs::process::Process::new(self.child.id().cast_signed());
        let status = process.and_then(|process| process.status()).expect("it is running");
        status.vmrss.expect("a process has VmRSS") * 1024
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<_> = log.lines().collect();
            let last = lines[lines.len().saturating_sub(LAST_LINES)..].join("\n");
            eprintln!("--- the node's last lines ({}):\n{last}", self.log_path.display());
        } else {
            let _ = std::fs::remove_file(&self.log_path);
        }
    }
}
