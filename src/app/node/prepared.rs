//! What a node does before any part of it starts: catch signals, compute the sizes, check the limits of the system.

use std::sync::RwLock;
use std::thread;

use rustix::process::{Resource, getrlimit};

use super::signals::{Handlers, Signals};
use super::sizing::{Machine, Sizing};
use crate::app::config::{Profile, Settings};

/// Threads besides those of [`Sizing`]: 31 for `HANDOFF=log` and one broker, most of them of librdkafka, which has one
/// per broker for each of its clients; the embedded Kafka of `dev`; name look-ups.
const THREADS_OWN: usize = 44;
/// Stack of a thread that only waits, bytes.
const STACK_BYTES: usize = 64 * 1024;

/// Caught signals, and sizes that fit into the limits of the system.
pub struct Prepared {
    pub(super) sizing: Sizing,
    pub(super) signals: Signals,
}

impl Prepared {
    /// To be called before anything else starts. A signal that comes earlier kills the process.
    ///
    /// # Errors
    /// A limit of the system is too low. The text names it, and a value that works.
    pub fn new(settings: &Settings, profile: Profile) -> Result<Self, String> {
        let cannot = |error| format!("cannot catch signals: {error}");
        let handlers = Handlers::install(profile).map_err(cannot)?;
        let sizing = Sizing::decide(settings, Machine::detect())?;
        let services = usize::from(sizing.shards) + usize::from(sizing.routers);
        let handshakes = if settings.has_tls() { sizing.handshake_threads() } else { 0 };
        try_threads(services + sizing.service_threads + handshakes + THREADS_OWN)?;
        Ok(Self { sizing, signals: handlers.watch().map_err(cannot)? })
    }
}

/// Has as many threads at once for a moment. librdkafka aborts the process, or waits without end, if it gets too few.
fn try_threads(needed: usize) -> Result<(), String> {
    let gate = RwLock::new(());
    thread::scope(|scope| {
        let _closed = gate.write();
        for started in 0..needed {
            let wait = || drop(gate.read());
            let thread = thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, wait);
            thread.map_err(|error| too_few(started, needed, &error))?;
        }
        Ok(())
    })
}

fn too_few(started: usize, needed: usize, error: &std::io::Error) -> String {
    let limit = getrlimit(Resource::Nproc).current;
    let shown = limit.map_or_else(|| "unlimited".to_owned(), |limit| limit.to_string());
    let works = limit.unwrap_or(0) + (needed - started) as u64;
    format!(
        "the system lets this process start {started} threads, but {needed} are needed, and more with many Kafka brokers: {error}\n      \
         The limit of the user's processes and threads (RLIMIT_NPROC) is {shown}; systemd and containers have one of their own.\n      \
         example: ulimit -u {works}; in systemd TasksMax=512; in Docker --pids-limit=512"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_about_threads_has_a_number_that_works() {
        let error = std::io::Error::from(std::io::ErrorKind::WouldBlock);
        let limit = getrlimit(Resource::Nproc).current.unwrap_or(0);
        let text = too_few(7, 50, &error);
        assert!(text.contains("RLIMIT_NPROC"), "{text}");
        assert!(text.contains(&format!("ulimit -u {};", limit + 43)), "{text}");
    }
}
