//! Threads for the handshakes of the gRPC port. A full handshake takes a signature, with RSA 1 ms of a core, so that
//! thousands of them would delay the events of everybody else on the threads of the service.
//!
//! These threads have a lower priority than the others: where cores are short, events come first. Handshakes take turns,
//! one for each thread, in the order in which their clients asked. One that has waited for half of its time is given up,
//! because its client needs the other half: otherwise, where more clients come than the threads can serve, each would be
//! served too late.

use std::future::Future;
use std::io;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// How much lower the priority is (nice(2)): a thread has a tenth of the time that another one has on the same core.
const NICE: i32 = 10;

/// The threads. They end when it is dropped, and with them the handshakes.
#[derive(Debug)]
pub struct HandshakeThreads {
    /// `Some` until the drop.
    runtime: Option<Runtime>,
    turns: Semaphore,
}

impl HandshakeThreads {
    /// Starts so many threads, 1 at least.
    ///
    /// # Errors
    /// The operating system refuses.
    pub fn start(threads: usize) -> io::Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(threads)
            .max_blocking_threads(1)
            .thread_name("tls")
            .on_thread_start(|| {
                // Forbidden in some containers. Then it has the priority of the others.
                let _ = rustix::process::nice(NICE);
            })
            // Messages of clients come first: their handshakes have cost a signature already.
            .global_queue_interval(1)
            .enable_time()
            .build()?;
        Ok(Self { runtime: Some(runtime), turns: Semaphore::new(threads) })
    }

    /// Runs `handshake` on the threads. It ends when the future is dropped. `None`: it has panicked, or the node stops.
    pub async fn run<T: Send + 'static>(
        &self,
        handshake: impl Future<Output = T> + Send + 'static,
    ) -> Option<T> {
        let mut tasks = JoinSet::new();
        tasks.spawn_on(handshake, self.runtime.as_ref()?.handle());
        tasks.join_next().await?.ok()
    }

    /// Waits for a turn to sign, until it is dropped. `None`: `patience` is over.
    pub async fn turn(&self, patience: Duration) -> Option<SemaphorePermit<'_>> {
        timeout(patience, self.turns.acquire()).await.ok()?.ok()
    }
}

impl Drop for HandshakeThreads {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Does not wait, because it is dropped within another runtime.
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use tokio::sync::oneshot;

    use super::*;

    fn priority() -> i32 {
        rustix::process::getpriority_process(None).unwrap()
    }

    #[tokio::test]
    async fn handshakes_run_on_threads_of_lower_priority() {
        let threads = HandshakeThreads::start(1).unwrap();
        let own = priority();
        let seen = threads.run(async { (thread::current().name() == Some("tls"), priority()) });
        assert_eq!(seen.await, Some((true, (own + NICE).min(19))));
        assert_eq!(priority(), own);
    }

    #[tokio::test]
    async fn handshakes_take_turns() {
        let threads = HandshakeThreads::start(2).unwrap();
        let long = Duration::from_secs(600);
        let [first, _second] =
            [threads.turn(long).await, threads.turn(long).await].map(Option::unwrap);
        assert!(threads.turn(Duration::ZERO).await.is_none());
        drop(first);
        assert!(threads.turn(Duration::ZERO).await.is_some());
    }

    #[tokio::test]
    async fn handshake_ends_when_nobody_waits_for_it() {
        let threads = Arc::new(HandshakeThreads::start(1).unwrap());
        let (begun, begins) = oneshot::channel();
        let (alive, ended) = oneshot::channel::<()>();
        let running = Arc::clone(&threads);
        let waiting = tokio::spawn(async move {
            running
                .run(async move {
                    let _alive = alive;
                    let _ = begun.send(());
                    std::future::pending::<()>().await;
                })
                .await
        });
        begins.await.unwrap();
        waiting.abort();
        assert!(ended.await.is_err(), "its future is dropped");
    }
}
