//! A Kafka and a Redis for one test, which can kill, pause and restart them.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use delivery_testkit::ports::free_port;
use rustix::process::{Pid, Signal, kill_process};

use super::wait::{SOON, until};

/// A service with a folder of its own. Dropping it kills the service and removes the folder.
#[derive(Debug)]
pub struct OwnService {
    script: &'static str,
    arguments: Vec<String>,
    environment: Vec<(&'static str, PathBuf)>,
    folder: PathBuf,
    child: Option<Child>,
    /// Its address.
    pub address: SocketAddr,
}

impl OwnService {
    /// A Redis.
    pub fn redis() -> Self {
        let port = free_port();
        Self::new("redis", port, vec![port.to_string()], Vec::new())
    }

    /// A Kafka with two listeners: a port, and the address that is advertised to its clients (a proxy in
    /// front of it).
    pub fn kafka(listeners: [(u16, SocketAddr); 2]) -> Self {
        let [(port, advertised), (second, second_advertised)] = listeners;
        let arguments = [port, free_port(), advertised.port(), second, second_advertised.port()];
        Self::new("kafka", port, arguments.iter().map(u16::to_string).collect(), Vec::new())
    }

    /// A Kafka whose second port speaks SASL_SSL. `pem`: a private key and its certificate, for 127.0.0.1.
    pub fn secured_kafka(second: u16, pem: PathBuf) -> Self {
        let port = free_port();
        let arguments = [port, free_port(), port, second, second];
        let environment = vec![("KAFKA_SECOND_PEM", pem)];
        Self::new("kafka", port, arguments.iter().map(u16::to_string).collect(), environment)
    }

    fn new(
        script: &'static str,
        port: u16,
        arguments: Vec<String>,
        environment: Vec<(&'static str, PathBuf)>,
    ) -> Self {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("{script}-{}-{port}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let mut service = Self { script, arguments, environment, folder, child: None, address };
        service.start();
        service
    }

    /// Starts it, for example after [`OwnService::kill`], and waits until it answers.
    pub fn start(&mut self) {
        self.launch();
        until(SOON, self.script, || self.answers().then_some(()));
    }

    /// Whether it accepts connections.
    pub fn answers(&self) -> bool {
        TcpStream::connect(self.address).is_ok()
    }

    /// Starts it without waiting for an answer.
    pub fn launch(&mut self) {
        assert!(self.child.is_none(), "it is running");
        let log = File::create(self.folder.join("output.log")).expect("a log file");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/services").join(self.script);
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(script)
            .arg(&self.folder)
            .args(&self.arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .spawn()
            .expect("the script starts");
        self.child = Some(child);
    }

    /// Sends SIGKILL. Its files stay for the next start.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGSTOP or SIGCONT.
    pub fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().expect("it is running");
        kill_process(Pid::from_child(child), signal).expect("it is running");
    }
}

impl Drop for OwnService {
    fn drop(&mut self) {
        self.kill();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
