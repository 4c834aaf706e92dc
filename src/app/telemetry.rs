//! Logs. A sink that blocks or is full must not stop the process: lines go through a bounded
//! channel to a thread of their own, and those that do not fit are counted.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use super::config::{LogFormat, Settings};
use crate::counters;

/// Lines that may wait for the sink.
pub const LINES_WAITING_MAX: usize = 8_192;
/// How long the last lines may take to get out when the process leaves.
const FLUSH_MAX: Duration = Duration::from_secs(1);

counters! {
    /// What became of the log lines.
    pub struct LogCounters of SharedCounter {
        Counter log_lines_dropped: "Log lines dropped because the sink did not take them in time.",
        Counter log_write_errors: "Writes of log lines that the sink refused.",
    }
}

enum Line {
    Text(Box<[u8]>),
    /// Everything before it is out: tell so by dropping the sender.
    Flush(SyncSender<()>),
}

/// The way to the sink. Cheap to clone.
#[derive(Clone)]
pub struct LogSink {
    lines: SyncSender<Line>,
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

    /// For the metrics page.
    pub fn counters(&self) -> &Arc<LogCounters> {
        &self.counters
    }

    /// Waits until what was logged so far is out, at most a second.
    pub fn flush(&self) {
        let (sender, done) = sync_channel(0);
        if self.lines.try_send(Line::Flush(sender)).is_ok() {
            // Either answer is the end of the wait: the sender was dropped, or the time is over.
            let _ = done.recv_timeout(FLUSH_MAX);
        }
    }
}

fn write_lines(mut sink: impl Write, waiting: &Receiver<Line>, counters: &LogCounters) {
    while let Ok(line) = waiting.recv() {
        match line {
            Line::Text(text) => {
                if sink.write_all(&text).is_err() {
                    counters.log_write_errors.add(1);
                }
            }
            Line::Flush(sender) => drop(sender),
        }
    }
}

/// One log line in the making: `tracing-subscriber` writes it in one or more pieces.
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
        if !line.is_empty() && self.sink.lines.try_send(Line::Text(line)).is_err() {
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

/// Sends the program's log to standard error.
///
/// # Errors
/// The directives of `log_level` are wrong, or the log thread did not start.
pub fn start(settings: &Settings) -> Result<LogSink, String> {
    let directives = settings.log_level.as_str();
    let filter = EnvFilter::try_new(directives).map_err(|error| {
        format!("log_level `{directives}` is not a level or a list of directives: {error}\n      example: LOG_LEVEL=info")
    })?;
    let sink = LogSink::start(io::stderr())
        .map_err(|error| format!("the log thread did not start: {error}"))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(sink.clone());
    match settings.log_format {
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(true).init(),
        LogFormat::Text => {
            let colours = io::IsTerminal::is_terminal(&io::stderr());
            builder.with_ansi(colours).with_target(false).init();
        }
    }
    Ok(sink)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::Sender;

    use super::*;

    /// A sink that takes nothing before it is allowed to, and says when it was asked.
    struct Stuck {
        asked: Sender<()>,
        allowed: Receiver<()>,
        taken: Sender<Vec<u8>>,
    }

    impl Write for Stuck {
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
    fn stuck_sink_stops_nobody_and_what_it_missed_is_counted() {
        let (asked_in, asked) = std::sync::mpsc::channel();
        let (allow, allowed) = std::sync::mpsc::channel();
        let (taken_in, taken) = std::sync::mpsc::channel();
        let sink = LogSink::start(Stuck { asked: asked_in, allowed, taken: taken_in }).unwrap();
        let log = |line: String| sink.make_writer().write_all(line.as_bytes()).unwrap();

        log("0".into());
        asked.recv().unwrap();
        // The sink is stuck with the first line: so many fit, and not one more.
        for line in 1..=LINES_WAITING_MAX + 3 {
            log(line.to_string());
        }
        assert_eq!(sink.counters().log_lines_dropped.get(), 3);

        drop(allow);
        let lines: Vec<_> = taken.iter().take(LINES_WAITING_MAX + 1).collect();
        assert_eq!(lines.last().unwrap(), LINES_WAITING_MAX.to_string().as_bytes());
    }

    #[test]
    fn refused_write_is_counted_and_flush_returns() {
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
