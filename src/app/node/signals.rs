//! SIGTERM and SIGINT: the first one stops the node, the second one exits at once.

use std::io;
use std::process;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::app::telemetry::LogSink;

/// The handlers of both signals.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Installs the handlers.
    ///
    /// # Errors
    /// The operating system refuses.
    pub(super) fn catch() -> io::Result<Self> {
        let terminate = signal(SignalKind::terminate())?;
        let interrupt = signal(SignalKind::interrupt())?;
        Ok(Self { terminate, interrupt })
    }

    /// Waits for the next signal and returns its name and number.
    pub(super) async fn next(&mut self) -> (&'static str, i32) {
        tokio::select! {
            _ = self.terminate.recv() => ("SIGTERM", SignalKind::terminate().as_raw_value()),
            _ = self.interrupt.recv() => ("SIGINT", SignalKind::interrupt().as_raw_value()),
        }
    }

    /// Makes the second signal exit the process at once, with 128 plus its number as the status.
    /// `first_seen`: the first one has been received. Otherwise a drain request stops the node, and
    /// the first signal changes nothing: Kubernetes sends it after a `preStop` hook that drains.
    pub(super) fn exit_on_second(mut self, first_seen: bool, log: LogSink) {
        tokio::spawn(async move {
            if !first_seen {
                let (name, _) = self.next().await;
                tracing::info!("{name}: already draining; a second signal exits at once");
            }
            let (name, number) = self.next().await;
            tracing::warn!("second signal ({name}): exiting at once");
            log.flush();
            process::exit(128 + number);
        });
    }
}
