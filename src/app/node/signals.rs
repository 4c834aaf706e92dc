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

    /// Makes the next signal exit the process at once, with 128 plus its number as the status.
    pub(super) fn exit_on_next(mut self, log: LogSink) {
        tokio::spawn(async move {
            let (name, number) = self.next().await;
            tracing::warn!("second signal ({name}): exiting at once");
            log.flush();
            process::exit(128 + number);
        });
    }
}
