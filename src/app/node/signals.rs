//! SIGTERM and SIGINT: the first one stops the node, the second one exits at once.
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

use crate::app::telemetry::LogSink;

/// Installed handlers. From now on the signals do not kill the process, but wait until [`Handlers::watch`].
pub(super) struct Handlers {
    runtime: Runtime,
    terminate: Signal,
    interrupt: Signal,
}

/// The signals of a node.
pub(super) struct Signals {
    first: watch::Receiver<Option<&'static str>>,
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
    pub(super) fn install() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let entered = runtime.enter();
        let terminate = signal(SignalKind::terminate())?;
        let interrupt = signal(SignalKind::interrupt())?;
        drop(entered);
        Ok(Self { runtime, terminate, interrupt })
    }

    /// Starts the thread.
    ///
    /// # Errors
    /// The operating system refuses.
    pub(super) fn watch(self) -> io::Result<Signals> {
        let Self { runtime, mut terminate, mut interrupt } = self;
        let (stop, first) = watch::channel(None);
        let node = Arc::new(NodeFacts::default());
        let facts = Arc::clone(&node);
        let watching = async move {
            let (name, _) = next(&mut terminate, &mut interrupt).await;
            if facts.ends.load(Ordering::Relaxed) {
                tracing::info!("{name}: already draining; a second signal exits at once");
            }
            stop.send_replace(Some(name));
            let (name, number) = next(&mut terminate, &mut interrupt).await;
            tracing::warn!("second signal ({name}): exiting at once");
            if let Some(log) = facts.log.get() {
                log.flush();
            }
            process::exit(128 + number);
        };
        thread::Builder::new().name("signals".into()).spawn(move || runtime.block_on(watching))?;
        Ok(Signals { first, node })
    }
}

/// Waits for the next signal and returns its name and number.
async fn next(terminate: &mut Signal, interrupt: &mut Signal) -> (&'static str, i32) {
    tokio::select! {
        _ = terminate.recv() => ("SIGTERM", SignalKind::terminate().as_raw_value()),
        _ = interrupt.recv() => ("SIGINT", SignalKind::interrupt().as_raw_value()),
    }
}

impl Signals {
    /// The log has started. It is flushed before an exit.
    pub(super) fn log_to(&self, log: LogSink) {
        let _ = self.node.log.set(log);
    }

    /// Waits for the first signal and returns its name.
    pub(super) async fn first(&mut self) -> &'static str {
        let name = self.first.wait_for(Option::is_some).await.ok().and_then(|name| *name);
        name.expect("the thread of the signals ends with the process")
    }

    /// The node drains or stops. If a drain request is the reason, the first signal changes nothing: Kubernetes sends it after
    /// a `preStop` hook that drains.
    pub(super) fn node_ends(&self) {
        self.node.ends.store(true, Ordering::Relaxed);
    }
}
