//! Answers to the replay requests of this node, on their way to the readers that wait for them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use hashbrown::HashMap;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::service::cluster::wire::ReplayAnswer;

/// The requests that wait for an answer. Each has at most one answer of each router of the node that was asked, within
/// the bounds of the request.
#[derive(Debug, Default)]
pub struct ReplayAnswers {
    latest: AtomicU64,
    waiting: Mutex<HashMap<u64, UnboundedSender<ReplayAnswer>>>,
}

/// A request that waits for its answers, until it is dropped.
pub(super) struct OpenRequest {
    pub(super) id: u64,
    pub(super) answers: UnboundedReceiver<ReplayAnswer>,
    of: Arc<ReplayAnswers>,
}

impl Drop for OpenRequest {
    fn drop(&mut self) {
        self.of.waiting.lock().expect("no holder panics").remove(&self.id);
    }
}

impl ReplayAnswers {
    /// A new request.
    pub(super) fn open(self: &Arc<Self>) -> OpenRequest {
        let id = self.latest.fetch_add(1, Ordering::Relaxed) + 1;
        let (sender, answers) = unbounded_channel();
        self.waiting.lock().expect("no holder panics").insert(id, sender);
        OpenRequest { id, answers, of: Arc::clone(self) }
    }

    /// An answer has arrived. One that nobody waits for any more is dropped.
    pub(super) fn arrived(&self, answer: ReplayAnswer) {
        let waiting = self.waiting.lock().expect("no holder panics");
        if let Some(sender) = waiting.get(&answer.id) {
            // Fails only if the request ends now.
            let _ = sender.send(answer);
        }
    }
}
