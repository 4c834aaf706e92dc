//! SIGTERM and SIGINT: the first one stops the node, the second one exits at once. SIGHUP: a node in production reads
//! the files of its keys again; `dev` stops, because its terminal was closed.
//!
//! They have a thread of their own, so that the second one works whatever the rest of the process waits for.

use std::io;
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;

use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use crate::app::config::Profile;
use crate::app::telemetry::LogSink;

/// Installed handlers. From now on the signals do not kill the process, but wait until [`Handlers::watch`].
pub(super) struct Handlers {
    runtime: Runtime,
    caught: Caught,
}

/// The signals that a node handles.
struct Caught {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
    hang_up_stops: bool,
    /// Counts the requests to read files again.
    read_again: watch::Sender<u64>,
}

/// The signals of a node.
pub(super) struct Signals {
    first: watch::Receiver<Option<&'static str>>,
    read_again: watch::Receiver<u64>,
    node: Arc<NodeFacts>,
}

/// What the thread of the signals knows of the node.
#[derive(Default)]
struct NodeFacts {
    /// Set when the log has started.
    log: OnceLock<LogSink>,
    /// The node drains or stops already.
    ends: AtomicBool,
}

impl Handlers {
    /// Installs the handlers.
    ///
    /// # Errors
    /// The operating system refuses.
    pub(super) fn install(profile: Profile) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let entered = runtime.enter();
        // Asked before the handler replaces it.
        let hang_up_stops = profile == Profile::Dev && !hang_up_is_ignored();
        let caught = Caught {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
            hang_up_stops,
            read_again: watch::Sender::new(0),
        };
        drop(entered);
        Ok(Self { runtime, caught })
    }

    /// Starts the thread.
    ///
    /// # Errors
    /// The operating system refuses.
    pub(super) fn watch(self) -> io::Result<Signals> {
        let Self { runtime, mut caught } = self;
        let read_again = caught.read_again.subscribe();
        let (stop, first) = watch::channel(None);
        let node = Arc::new(NodeFacts::default());
        let facts = Arc::clone(&node);
        let watching = async move {
            let (name, _) = caught.next().await;
            if facts.ends.load(Ordering::Relaxed) {
                tracing::info!("{name}: already draining; a second signal exits at once");
            }
            stop.send_replace(Some(name));
            let (name, number) = caught.next().await;
            tracing::warn!("second signal ({name}): exiting at once");
            if let Some(log) = facts.log.get() {
                log.flush();
            }
            process::exit(128 + number);
        };
        thread::Builder::new().name("signals".into()).spawn(move || runtime.block_on(watching))?;
        Ok(Signals { first, read_again, node })
    }
}

/// Whether whoever started the process wants it to survive its terminal (`nohup`). See `proc_pid_status(5)`.
fn hang_up_is_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask & 1 << (SignalKind::hangup().as_raw_value() - 1) != 0)
}

impl Caught {
    /// Waits for the next signal that stops the node, and returns its name and number.
    async fn next(&mut self) -> (&'static str, i32) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => {
                    return ("SIGTERM", SignalKind::terminate().as_raw_value());
                }
                _ = self.interrupt.recv() => {
                    return ("SIGINT", SignalKind::interrupt().as_raw_value());
                }
                _ = self.hang_up.recv() => {
                    if self.hang_up_stops {
                        return ("SIGHUP", SignalKind::hangup().as_raw_value());
                    }
                    tracing::info!("SIGHUP: the files of keys and tokens are read again, if there are any");
                    self.read_again.send_modify(|times| *times += 1);
                }
            }
        }
    }
}

impl Signals {
    /// The log has started. It is flushed before an exit.
    pub(super) fn log_to(&self, log: LogSink) {
        let _ = self.node.log.set(log);
    }

    /// Changes when the files of keys are to be read again.
    pub(super) fn read_again(&self) -> watch::Receiver<u64> {
        self.read_again.clone()
    }

    /// Waits for the first signal that stops the node, and returns its name.
    pub(super) async fn first(&mut self) -> &'static str {
        let name = self.first.wait_for(Option::is_some).await.ok().and_then(|name| *name);
        name.expect("the thread of the signals ends with the process")
    }

    /// The node drains or stops, or does not any more. If a drain request is the reason, the first signal changes nothing:
    /// Kubernetes sends it after a `preStop` hook that drains.
    pub(super) fn node_ends(&self, ends: bool) {
        self.node.ends.store(ends, Ordering::Relaxed);
    }
}
