//! The connection to one neighbour: its calls, their deadline and size limit, and its replacement.

use std::future::Future;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Request, Response, Status};

use super::answers::{FailureClass, Refusals, shortened};
use super::counters::NeighbourCounters;
use crate::service::backends::outage::Outage;

/// Default of the maximum size of an answer, bytes (`NEIGHBOUR_ANSWER_MAX`): a user in ten conversations
/// of 100,000 members.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// Answers up to this size may arrive in every call in flight, bytes.
pub const COMMON_ANSWER_BYTES_MAX: usize = 8 << 20;
/// Larger answers of one neighbour that arrive at a time; further ones wait. So the memory of answers
/// does not grow with the number of calls in flight.
pub const LARGE_ANSWERS_MAX: usize = 2;
/// Calls in a row without an answer after which the connection is replaced.
pub(super) const UNANSWERED_CALLS_MAX: u32 = 3;
/// Message of the status of a call without an answer.
const NO_ANSWER: &str = "no answer in time";
/// Added to the deadline in the request. tonic enforces that deadline on this side too, and its
/// error would look like an answer of the neighbour, so our own must come first.
const DEADLINE_MARGIN: Duration = Duration::from_millis(50);
/// Minimum time between two replacements, so that a slow neighbour does not get many new
/// connections.
pub(super) const RENEWAL_INTERVAL: Duration = Duration::from_secs(5);

/// Address and timeouts of one neighbour.
#[derive(Clone, Debug)]
pub struct NeighbourConfig {
    /// `http://host:port` without TLS, `https://host:port` with TLS.
    pub url: String,
    /// Trusted roots for `https`, PEM; `None`: the public web's.
    pub root_certificates: Option<Vec<u8>>,
    /// Name of the setting with the address, for the log.
    pub setting: &'static str,
    /// Maximum size of an answer, bytes. A larger answer is rejected when its length arrives.
    pub answer_bytes_max: usize,
    /// Deadline of one call, connecting included.
    pub call_timeout: Duration,
    /// Time to establish a connection.
    pub connect_timeout: Duration,
    /// Interval of HTTP/2 pings while calls are in flight and nothing arrives. Idle connections use
    /// TCP keepalive instead, because gRPC servers by default treat idle HTTP/2 pings as abuse.
    pub keepalive_interval: Duration,
    /// Time for the answer to a ping.
    pub keepalive_timeout: Duration,
}

impl NeighbourConfig {
    /// Defaults: answers up to 64 MiB, 2 s per call, 2 s to connect, a ping after 20 s, 5 s for its answer.
    pub fn new(url: String) -> Self {
        Self {
            url,
            root_certificates: None,
            setting: "the address",
            answer_bytes_max: ANSWER_BYTES_MAX,
            call_timeout: Duration::from_secs(2),
            connect_timeout: Duration::from_secs(2),
            keepalive_interval: Duration::from_secs(20),
            keepalive_timeout: Duration::from_secs(5),
        }
    }

    fn endpoint(&self) -> Result<Endpoint, tonic::transport::Error> {
        let endpoint = Endpoint::from_shared(self.url.clone())?
            .connect_timeout(self.connect_timeout)
            .tcp_nodelay(true)
            .tcp_keepalive(Some(self.keepalive_interval))
            .tcp_keepalive_interval(Some(self.keepalive_timeout))
            .http2_keep_alive_interval(self.keepalive_interval)
            .keep_alive_timeout(self.keepalive_timeout)
            .keep_alive_while_idle(false);
        if !self.url.starts_with("https://") {
            return Ok(endpoint);
        }
        let tls = ClientTlsConfig::new();
        endpoint.tls_config(match &self.root_certificates {
            Some(roots) => tls.ca_certificate(Certificate::from_pem(roots)),
            None => tls.with_webpki_roots(),
        })
    }
}

/// The channel to one neighbour.
pub(super) struct NeighbourLink {
    endpoint: Endpoint,
    channel: RwLock<Channel>,
    setting: &'static str,
    answer_bytes_max: usize,
    /// Permits for answers beyond [`COMMON_ANSWER_BYTES_MAX`].
    large_answers: Semaphore,
    call_timeout: Duration,
    /// Calls in a row without an answer.
    unanswered: AtomicU32,
    pub(super) renewed: Mutex<Instant>,
    outage: Outage,
    refusals: Refusals,
    counters: Arc<NeighbourCounters>,
}

/// Decrements the gauge when the call ends or its future is dropped.
struct InFlight<'a>(&'a NeighbourCounters);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.in_flight.sub(1);
    }
}

impl NeighbourLink {
    pub(super) fn new(
        config: &NeighbourConfig,
        counters: Arc<NeighbourCounters>,
    ) -> Result<Self, tonic::transport::Error> {
        let endpoint = config.endpoint()?;
        Ok(Self {
            channel: RwLock::new(endpoint.connect_lazy()),
            endpoint,
            setting: config.setting,
            answer_bytes_max: config.answer_bytes_max,
            large_answers: Semaphore::new(LARGE_ANSWERS_MAX),
            call_timeout: config.call_timeout,
            unanswered: AtomicU32::new(0),
            renewed: Mutex::new(Instant::now()),
            outage: Outage::default(),
            refusals: Refusals::default(),
            counters,
        })
    }

    /// Makes one call with its deadline. The request contains the deadline too.
    pub(super) async fn call<Q, A, F>(
        &self,
        question: Q,
        ask: impl FnOnce(Channel, Request<Q>) -> F,
    ) -> Result<A, Status>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        self.attempt(question, ask).await.inspect_err(|status| self.note_failure(status))
    }

    /// Like [`NeighbourLink::call`], for answers whose size is not known. `ask` gets the size limit, and
    /// `take` the answer. An answer larger than [`COMMON_ANSWER_BYTES_MAX`] is asked for again, with few
    /// others at a time. The first attempt costs little: the limit is checked against the length, which
    /// comes first.
    pub(super) async fn call_sized<Q: Clone, A, T, F>(
        &self,
        question: Q,
        ask: impl Fn(Channel, Request<Q>, usize) -> F,
        take: impl FnOnce(A) -> T,
    ) -> Result<T, Status>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let common = self.answer_bytes_max.min(COMMON_ANSWER_BYTES_MAX);
        let small = |channel, request| ask(channel, request, common);
        match self.attempt(question.clone(), small).await {
            Ok(answer) => return Ok(take(answer)),
            // The code of tonic for an answer beyond the limit.
            Err(status) if status.code() == Code::OutOfRange && common < self.answer_bytes_max => {}
            Err(status) => {
                self.note_failure(&status);
                return Err(status);
            }
        }
        self.counters.large_answers.add(1);
        let closed = |_| Status::internal("the semaphore is never closed");
        let permit = self.large_answers.acquire().await.map_err(closed)?;
        let large = |channel, request| ask(channel, request, self.answer_bytes_max);
        let answer = self.call(question, large).await.map(take);
        drop(permit);
        answer
    }

    /// Makes one call. Its failure is not noted yet, only its success.
    async fn attempt<Q, A, F>(
        &self,
        question: Q,
        ask: impl FnOnce(Channel, Request<Q>) -> F,
    ) -> Result<A, Status>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        self.counters.calls.add(1);
        self.counters.in_flight.add(1);
        let _in_flight = InFlight(&self.counters);
        let channel = self.channel.read().expect("no holder panics").clone();
        let mut request = Request::new(question);
        request.set_timeout(self.call_timeout + DEADLINE_MARGIN);
        match timeout(self.call_timeout, ask(channel, request)).await {
            Ok(answer) => {
                self.unanswered.store(0, Ordering::Relaxed);
                if answer.is_ok() {
                    self.note_success();
                }
                answer.map(Response::into_inner)
            }
            Err(_) => {
                self.counters.timeouts.add(1);
                if self.unanswered.fetch_add(1, Ordering::Relaxed) + 1 >= UNANSWERED_CALLS_MAX {
                    self.note_unreachable(NO_ANSWER);
                    self.renew();
                }
                Err(Status::deadline_exceeded(NO_ANSWER))
            }
        }
    }

    /// Host and port, for the log. They hold no secret.
    fn address(&self) -> String {
        let uri = self.endpoint.uri();
        let port = uri.port_u16().map_or_else(String::new, |port| format!(":{port}"));
        format!("{}{port}", uri.host().unwrap_or_default())
    }

    /// Counts a failed call by its class, and logs it.
    fn note_failure(&self, status: &Status) {
        self.counters.failures.add(1);
        let now = Instant::now();
        self.refusals.failed(status, (self.setting, &self.address()), &self.counters, now);
        if FailureClass::of(status.code()) != FailureClass::Unavailable {
            self.note_reachable(now);
        } else if status.message() != NO_ANSWER {
            // Missing answers are noted when several are missing in a row.
            self.note_unreachable(&format!("{:?}: {}", status.code(), shortened(status.message())));
        }
    }

    fn note_success(&self) {
        let now = Instant::now();
        self.note_reachable(now);
        self.refusals.succeeded(|| self.address(), now);
    }

    fn note_unreachable(&self, why: &str) {
        if let Some(report) = self.outage.failed(Instant::now()) {
            let (service, setting) = (self.address(), self.setting);
            tracing::warn!(service, setting, why, "service unavailable{report}");
        }
    }

    fn note_reachable(&self, now: Instant) {
        if let Some(recovery) = self.outage.succeeded(now) {
            tracing::info!(service = self.address(), "service available again {recovery}");
        }
    }

    /// Opens a new connection for later calls. Calls in flight keep the old one.
    fn renew(&self) {
        let mut renewed = self.renewed.lock().expect("no holder panics");
        if renewed.elapsed() < RENEWAL_INTERVAL {
            return;
        }
        *renewed = Instant::now();
        self.unanswered.store(0, Ordering::Relaxed);
        *self.channel.write().expect("no holder panics") = self.endpoint.connect_lazy();
        self.counters.renewals.add(1);
    }
}
