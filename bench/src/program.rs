//! Programs that run beside the load. The kernel kills them when the thread that started them ends,
//! even if this process is killed.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const POLL: Duration = Duration::from_millis(50);

/// A running program. Killed when dropped: it keeps nothing on disk that is needed later.
pub struct Program {
    child: Child,
    name: String,
}

impl Program {
    /// Starts `command`. Its output goes to `log`, or, without one, its errors to those of this
    /// process.
    ///
    /// # Errors
    /// The program or its log cannot be opened.
    pub fn start(
        name: &str,
        log: Option<&Path>,
        command: &[String],
        environment: &[(&str, String)],
    ) -> io::Result<Self> {
        let mut child = Command::new("setpriv");
        child
            .args(["--pdeathsig", "KILL", "--"])
            .args(command)
            .envs(environment.iter().map(|(name, value)| (*name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        if let Some(log) = log {
            let log = File::create(log)?;
            child.stdout(log.try_clone()?).stderr(log);
        }
        Ok(Self { child: child.spawn()?, name: name.to_owned() })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until `ready` returns true.
    ///
    /// # Errors
    /// The program ended, or it is not ready within `limit`.
    pub fn wait_until(&mut self, limit: Duration, ready: impl Fn() -> bool) -> io::Result<()> {
        let deadline = Instant::now() + limit;
        while !ready() {
            if let Some(status) = self.child.try_wait()? {
                return Err(io::Error::other(format!("{} ended: {status}", self.name)));
            }
            if Instant::now() > deadline {
                let text = format!("{} is not ready within {limit:?}", self.name);
                return Err(io::Error::other(text));
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The program of this name in the folder of this one.
pub fn beside(name: &str) -> PathBuf {
    std::env::current_exe().unwrap_or_default().with_file_name(name)
}

/// Whether something listens on this port of the loopback interface.
pub fn is_listening(port: u16) -> bool {
    TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok()
}
