//! A `redis-server` process for one test, on a free loopback port.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use delivery_testkit::ports::free_port;

/// Longer than a connection takes on any machine.
const CONNECTED_WITHIN: Duration = Duration::from_secs(60);

/// Options of a server.
#[derive(Clone, Copy, Default)]
pub(crate) struct Options<'a> {
    /// `requirepass`.
    pub(crate) password: Option<&'a str>,
    /// TLS only, with these PEM files: certificate, key, root.
    pub(crate) tls: Option<(&'a Path, &'a Path, &'a Path)>,
    /// One node that owns every slot.
    pub(crate) cluster: bool,
    /// Further arguments.
    pub(crate) arguments: &'a [&'a str],
}

/// A running server; dropping it kills it.
pub(crate) struct Server {
    child: Child,
    /// Its port on loopback.
    pub(crate) port: u16,
    folder: TempDir,
}

/// Runs commands written as words.
pub(crate) trait Commands {
    /// Runs a command that must succeed; `""` is an empty word.
    fn command(&mut self, words: &str);
}

impl Commands for redis::Connection {
    fn command(&mut self, words: &str) {
        let mut words = words.split(' ').map(|word| if word == "\"\"" { "" } else { word });
        let mut command = redis::cmd(words.next().unwrap());
        for word in words {
            command.arg(word);
        }
        command.exec(self).unwrap_or_else(|error| panic!("{error}"));
    }
}

impl Server {
    /// Starts a server. `None`, with a message, if `redis-server` is not installed.
    pub(crate) fn start(options: Options<'_>) -> Option<Self> {
        // Another process may have taken the free port meanwhile.
        (0..5).find_map(|_| Self::start_on(free_port(), options)).or_else(|| {
            match Command::new("redis-server").arg("--version").output() {
                Ok(_) => panic!("redis-server does not start"),
                Err(_) => eprintln!("skipped: redis-server is not installed"),
            }
            None
        })
    }

    /// Starts a server on this port; `None` if that fails.
    pub(crate) fn start_on(port: u16, options: Options<'_>) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("redis-server");
        command.args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
        command.arg("--dir").arg(folder.path());
        match options.tls {
            Some((certificate, key, root)) => {
                command.args(["--port", "0", "--tls-auth-clients", "no", "--tls-port"]);
                command.arg(port.to_string()).arg("--tls-cert-file").arg(certificate);
                command.arg("--tls-key-file").arg(key).arg("--tls-ca-cert-file").arg(root);
            }
            None => {
                command.arg("--port").arg(port.to_string());
            }
        }
        if let Some(password) = options.password {
            command.args(["--requirepass", password]);
        }
        if options.cluster {
            command.args(["--cluster-enabled", "yes", "--cluster-port"]);
            command.arg(free_port().to_string());
        }
        command.args(options.arguments);
        let mut child = command.stdout(Stdio::piped()).stdin(Stdio::null()).spawn().ok()?;
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let ready =
            lines.by_ref().map_while(Result::ok).any(|line| line.contains("Ready to accept"));
        // Drain the log, so that the server never blocks on it.
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        let server = Self { child, port, folder };
        if !ready {
            return None;
        }
        if options.cluster {
            server.own_every_slot();
        }
        Some(server)
    }

    fn own_every_slot(&self) {
        let mut connection = self.connection();
        redis::cmd("CLUSTER")
            .arg(&["ADDSLOTSRANGE", "0", "16383"])
            .exec(&mut connection)
            .expect("Redis 7 or later");
        loop {
            let info: String = redis::cmd("CLUSTER").arg("INFO").query(&mut connection).unwrap();
            if info.contains("cluster_state:ok") {
                return;
            }
            std::thread::yield_now();
        }
    }

    /// A connection for the test's own commands; needs a server without password and TLS.
    pub(crate) fn connection(&self) -> redis::Connection {
        let client = redis::Client::open(("127.0.0.1", self.port)).unwrap();
        // A Sentinel closes all connections to a server that it promotes, also one that is being opened.
        let deadline = Instant::now() + CONNECTED_WITHIN;
        loop {
            match client.get_connection() {
                Ok(connection) => return connection,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
        }
    }

    /// Runs a command that must succeed, such as `CONFIG SET`, on a connection of its own.
    pub(crate) fn command(&self, words: &str) {
        self.connection().command(words);
    }

    /// Removes its folder, so that it can write no more files.
    pub(crate) fn remove_folder(&self) {
        std::fs::remove_dir_all(self.folder.path()).unwrap();
    }

    /// Kills it, like a crash.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Stops (`SIGSTOP`) or continues (`SIGCONT`) the process.
    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let process = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(process, signal).unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
