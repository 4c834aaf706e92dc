//! The threads that make the TLS handshakes of WebSocket clients, one for each shard. A signature takes as long as the
//! delivery of hundreds of events, so the shards make none. The threads have a low priority: on a busy core, a storm of
//! handshakes waits for events, not the other way round.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use rustls::ServerConfig;

use crate::handoff::{Consumer, Doorbell, Duplex, Producer, Pushed, ring};
use crate::protocol::tls::handshake::JOBS_MAX;
use crate::protocol::tls::{HandshakeProgress, Job};

use super::TlsCounters;
use super::failure::TlsFailure;
use super::handshake::ServerHandshake;

/// Above the shards and everything else, which have 0 (setpriority(2)).
const NICE: i32 = 10;
/// Longest sleep, ms. A ring that is abandoned rings the bell.
const SLEEP_MS_MAX: u32 = 60_000;

/// What a shard has of the rings between both.
pub type HandshakeRings = Duplex<Producer<Job>, Consumer<Job>>;

/// Makes handshakes for one shard.
#[derive(Debug)]
pub struct Handshaker {
    end: Duplex<Consumer<Job>, Producer<Job>>,
    bell: Arc<Doorbell>,
    config: Arc<ServerConfig>,
    counters: Arc<TlsCounters>,
}

impl Handshaker {
    /// Makes the handshakes of the shard that sleeps on `shard_bell`. `config` was made by
    /// [`capture_secrets`](super::handshake::capture_secrets).
    ///
    /// # Errors
    /// The process is out of file descriptors.
    pub fn new(
        config: Arc<ServerConfig>,
        counters: Arc<TlsCounters>,
        shard_bell: &Arc<Doorbell>,
    ) -> io::Result<(Self, HandshakeRings)> {
        let bell = Arc::new(Doorbell::new()?);
        let (commands, jobs) = ring(JOBS_MAX, Arc::clone(&bell));
        let (done, reports) = ring(JOBS_MAX, Arc::clone(shard_bell));
        let end = Duplex { commands: jobs, reports: done };
        Ok((Self { end, bell, config, counters }, Duplex { commands, reports }))
    }

    /// Starts the thread. It ends with the shard.
    ///
    /// # Errors
    /// The process cannot have another thread.
    pub fn spawn(self, name: String) -> io::Result<JoinHandle<()>> {
        std::thread::Builder::new().name(name).spawn(move || self.run())
    }

    fn run(mut self) {
        // Without it, handshakes and events share the core equally: no reason to fail.
        if let Err(error) = rustix::process::setpriority_process(None, NICE) {
            tracing::warn!("cannot lower the priority of TLS handshakes: setpriority: {error}");
        }
        loop {
            while let Some(job) = self.end.commands.pop() {
                if !self.advance(job) {
                    return;
                }
            }
            self.bell.about_to_sleep();
            if self.end.commands.is_abandoned() && self.end.commands.is_empty() {
                return;
            }
            if self.end.commands.is_empty() {
                self.bell.wait(SLEEP_MS_MAX);
            }
            self.bell.awake();
        }
    }

    /// Returns whether the shard is still there.
    fn advance(&mut self, mut job: Job) -> bool {
        let begun = match job.handshake.take() {
            Some(handshake) => Ok(handshake),
            None => ServerHandshake::begin(&self.config, &self.counters),
        };
        job.progress = match begun {
            Ok(mut handshake) => {
                let progress = handshake.advance(&mut job.input, &mut job.output);
                job.handshake =
                    matches!(progress, HandshakeProgress::NeedMore).then_some(handshake);
                progress
            }
            Err(error) => {
                TlsFailure::from(&error).count(&self.counters);
                tracing::error!("cannot begin a TLS handshake: {error}");
                HandshakeProgress::Failed
            }
        };
        match self.end.reports.push(job) {
            Pushed::Accepted => {
                self.end.reports.publish();
                true
            }
            Pushed::Full(_) => panic!("the ring has room for all that may be under way"),
            Pushed::Closed(_) => false,
        }
    }
}
