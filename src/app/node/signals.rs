//! SIGTERM and SIGINT: the first begins the end, the second is the end.

use std::io;
use std::process;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::app::telemetry::LogSink;

/// Both, from now on caught.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Catches them.
    ///
    /// # Errors
    /// The system refuses.
    pub(super) fn catch() -> io::Result<Self> {
        let terminate = signal(SignalKind::terminate())?;
        let interrupt = signal(SignalKind::interrupt())?;
        Ok(Self { terminate, interrupt })
    }

    /// The next one: its name and number.
    pub(super) async fn next(&mut self) -> (&'static str, i32) {
        tokio::select! {
            _ = self.terminate.recv() => ("SIGTERM", SignalKind::terminate().as_raw_value()),
            _ = self.interrupt.recv() => ("SIGINT", SignalKind::interrupt().as_raw_value()),
        }
    }

    /// From now on the next one ends the process at once, as the shell would report it.
    pub(super) fn leave_at_the_next(mut self, log: LogSink) {
        tokio::spawn(async move {
            let (name, number) = self.next().await;
            tracing::warn!("{name} again: leaving at once");
            log.flush();
            process::exit(128 + number);
        });
    }
}
