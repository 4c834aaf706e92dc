//! Logs. A sink that blocks or is full must not stop the process: lines go through a bounded
//! channel to a thread of their own. Lines that do not fit are dropped and counted.

use std::fmt;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use tokio::time::Instant;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::{Context, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Layer, registry};

use super::config::{LogFormat, Settings};
use crate::counters;
use crate::service::backends::outage::Outage;

/// Lines that may wait for the sink. Further lines are dropped.
pub const LINES_WAITING_MAX: usize = 8_192;
/// How long [`LogSink::flush`] waits.
const FLUSH_MAX: Duration = Duration::from_secs(1);

counters! {
    /// Counters of log lines.
    pub struct LogCounters of SharedCounter {
        Counter log_lines_dropped: "Log lines dropped because too many were waiting for the sink.",
        Counter log_write_errors: "Log lines whose write failed.",
        Counter log_library_lines_limited: "Lines of the Redis client library that were not logged, because others were shortly before.",
    }
}

enum LogItem {
    Line(Box<[u8]>),
    /// The thread drops the sender. By then it has written all earlier lines.
    Flush(SyncSender<()>),
}

/// Handle of the log thread. Cheap to clone.
#[derive(Clone)]
pub struct LogSink {
    lines: SyncSender<LogItem>,
    counters: Arc<LogCounters>,
}

impl LogSink {
    /// Starts the thread that writes to `sink`.
    ///
    /// # Errors
    /// The thread could not be started.
    pub fn start(sink: impl Write + Send + 'static) -> io::Result<Self> {
        let (lines, waiting) = sync_channel(LINES_WAITING_MAX);
        let counters = Arc::new(LogCounters::default());
        let counted = Arc::clone(&counters);
        thread::Builder::new()
            .name("log".into())
            .spawn(move || write_lines(sink, &waiting, &counted))?;
        Ok(Self { lines, counters })
    }

    /// The counters.
    pub fn counters(&self) -> &Arc<LogCounters> {
        &self.counters
    }

    /// Waits until all lines so far are written, at most a second.
    pub fn flush(&self) {
        self.flush_within(FLUSH_MAX);
    }

    /// The same, at most `limit`.
    pub fn flush_within(&self, limit: Duration) {
        let (sender, done) = sync_channel(0);
        if self.lines.try_send(LogItem::Flush(sender)).is_ok() {
            // Both results end the wait: the sender was dropped, or the time is up.
            let _ = done.recv_timeout(limit);
        }
    }
}

fn write_lines(mut sink: impl Write, waiting: &Receiver<LogItem>, counters: &LogCounters) {
    while let Ok(line) = waiting.recv() {
        match line {
            LogItem::Line(text) => {
                if sink.write_all(&text).is_err() {
                    counters.log_write_errors.add(1);
                }
            }
            LogItem::Flush(sender) => drop(sender),
        }
    }
}

/// Collects one log line, which `tracing-subscriber` writes in one or more pieces. Dropping it sends
/// the line.
pub struct LineWriter<'a> {
    sink: &'a LogSink,
    line: Vec<u8>,
}

impl Write for LineWriter<'_> {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        self.line.extend_from_slice(piece);
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for LineWriter<'_> {
    fn drop(&mut self) {
        let line = std::mem::take(&mut self.line).into_boxed_slice();
        if !line.is_empty() && self.sink.lines.try_send(LogItem::Line(line)).is_err() {
            self.sink.counters.log_lines_dropped.add(1);
        }
    }
}

impl<'a> MakeWriter<'a> for LogSink {
    type Writer = LineWriter<'a>;

    fn make_writer(&'a self) -> Self::Writer {
        LineWriter { sink: self, line: Vec::new() }
    }
}

/// Limits the lines of the Redis client library as those of an outage: one at once, then one after
/// growing intervals. Its cluster client logs several lines for each failed command. The link to
/// Redis logs the outage itself. Lines of level debug and trace are not limited.
struct LibraryLines {
    counters: Arc<LogCounters>,
    outage: Outage,
}

impl LibraryLines {
    fn new(counters: Arc<LogCounters>) -> Self {
        Self { counters, outage: Outage::default() }
    }
}

impl<S: Subscriber> Layer<S> for LibraryLines {
    fn event_enabled(&self, event: &Event<'_>, _context: Context<'_, S>) -> bool {
        if *event.metadata().level() > Level::INFO || !comes_from_redis(event) {
            return true;
        }
        let enabled = self.outage.failed(Instant::now()).is_some();
        if !enabled {
            self.counters.log_library_lines_limited.add(1);
        }
        enabled
    }
}

/// Whether the client library wrote the line. It uses the crate `log`; the bridge from there puts
/// the module's path into a field.
fn comes_from_redis(event: &Event<'_>) -> bool {
    struct Origin(bool);
    impl Visit for Origin {
        fn record_str(&mut self, field: &Field, value: &str) {
            self.0 |=
                field.name() == "log.target" && (value == "redis" || value.starts_with("redis::"));
        }
        fn record_debug(&mut self, _field: &Field, _value: &dyn fmt::Debug) {}
    }
    let mut origin = Origin(false);
    event.record(&mut origin);
    origin.0
}

/// Starts logging to standard error.
///
/// # Errors
/// The log thread did not start.
pub fn start(settings: &Settings) -> Result<LogSink, String> {
    let sink = LogSink::start(io::stderr())
        .map_err(|error| format!("the log thread did not start: {error}"))?;
    let lines = tracing_subscriber::fmt::layer().with_writer(sink.clone());
    let lines = match settings.log_format {
        LogFormat::Json => lines.json().flatten_event(true).with_current_span(true).boxed(),
        LogFormat::Text => {
            let colours = io::IsTerminal::is_terminal(&io::stderr());
            lines.with_ansi(colours).with_target(false).boxed()
        }
    };
    let limit = LibraryLines::new(Arc::clone(sink.counters()));
    registry().with(settings.log_level.clone()).with(limit).with(lines).init();
    Ok(sink)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::Sender;

    use super::*;

    /// A sink whose writes block until the test allows them.
    struct BlockedSink {
        asked: Sender<()>,
        allowed: Receiver<()>,
        taken: Sender<Vec<u8>>,
    }

    impl Write for BlockedSink {
        fn write(&mut self, line: &[u8]) -> io::Result<usize> {
            let _ = self.asked.send(());
            let _ = self.allowed.recv();
            let _ = self.taken.send(line.to_vec());
            Ok(line.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn blocked_sink_blocks_no_writer_and_dropped_lines_are_counted() {
        let (asked_in, asked) = std::sync::mpsc::channel();
        let (allow, allowed) = std::sync::mpsc::channel();
        let (taken_in, taken) = std::sync::mpsc::channel();
        let sink =
            LogSink::start(BlockedSink { asked: asked_in, allowed, taken: taken_in }).unwrap();
        let log = |line: String| sink.make_writer().write_all(line.as_bytes()).unwrap();

        log("0".into());
        asked.recv().unwrap();
        // The sink is blocked in the first line, so exactly LINES_WAITING_MAX more fit.
        for line in 1..=LINES_WAITING_MAX + 3 {
            log(line.to_string());
        }
        assert_eq!(sink.counters().log_lines_dropped.get(), 3);

        drop(allow);
        let lines: Vec<_> = taken.iter().take(LINES_WAITING_MAX + 1).collect();
        assert_eq!(lines.last().unwrap(), LINES_WAITING_MAX.to_string().as_bytes());
    }

    #[test]
    fn lines_of_the_redis_library_are_limited() {
        #[derive(Clone, Default)]
        struct Lines(Arc<std::sync::Mutex<Vec<u8>>>);
        impl Write for Lines {
            fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
                self.0.lock().unwrap().write(piece)
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (lines, counters) = (Lines::default(), Arc::<LogCounters>::default());
        let writer = lines.clone();
        let layer = tracing_subscriber::fmt::layer().with_writer(move || writer.clone());
        let subscriber = registry().with(LibraryLines::new(Arc::clone(&counters))).with(layer);
        tracing::subscriber::with_default(subscriber, || {
            for _ in 0..50 {
                tracing::warn!(target: "log", { log.target = "redis::cluster" }, "from the library");
                tracing::warn!(target: "log", { log.target = "redistribute" }, "from another");
                tracing::warn!("our own");
            }
        });
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        let count = |what| text.matches(what).count();
        assert_eq!(
            (count("from the library"), count("from another"), count("our own")),
            (1, 50, 50)
        );
        assert_eq!(counters.log_library_lines_limited.get(), 49);
    }

    #[test]
    fn failed_write_is_counted_and_flush_returns() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let sink = LogSink::start(Full).unwrap();
        sink.make_writer().write_all(b"line").unwrap();
        sink.flush();
        assert_eq!(sink.counters().log_write_errors.get(), 1);
    }
}
