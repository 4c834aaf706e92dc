//! Programs that run beside the load and end with the conductor, even if that is killed.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const POLL: Duration = Duration::from_millis(50);

/// See the module. Killed when dropped: nothing of theirs is kept.
pub(super) struct Program {
    child: Child,
    name: String,
}

impl Program {
    /// Starts `command`; what it prints goes to `NAME.log` in `directory`.
    pub(super) fn start(
        name: &str,
        directory: &Path,
        command: &[String],
        environment: &[(&str, String)],
    ) -> io::Result<Self> {
        let log = File::create(directory.join(format!("{name}.log")))?;
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .args(command)
            .envs(environment.iter().map(|(name, value)| (*name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        Ok(Self { child, name: name.to_owned() })
    }

    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until `there` is true.
    pub(super) fn until(&mut self, limit: Duration, there: impl Fn() -> bool) -> io::Result<()> {
        let deadline = Instant::now() + limit;
        while !there() {
            if let Some(status) = self.child.try_wait()? {
                return Err(io::Error::other(format!("{} ended: {status}", self.name)));
            }
            if Instant::now() > deadline {
                return Err(io::Error::other(format!("{} is not there in time", self.name)));
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

/// A port that nobody listens on, below those that connections take.
pub(super) fn free_port() -> io::Result<u16> {
    let start = 20_000 + std::process::id() as u16 % 5_000;
    (start..start + 5_000)
        .find(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok())
        .ok_or_else(|| io::Error::other("no free port"))
}

/// Whether somebody listens there.
pub(super) fn answers(port: u16) -> bool {
    TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok()
}
