//! Fetches pages. Sessions that want the same page share the call, if it has not been sent yet.
//!
//! ```text
//!  session ──► wanted ──► queue ──► call sent ──► page to all that joined
//!  session ──► joins ──────┘          │
//!  session ──► a fetch of its own ◄───┘ comes too late
//! ```
//!
//! A session must not join a call that was sent before: what was committed since then may have been
//! routed before the session's 101, so it would come neither with the page nor live. Calls wait in the
//! queue when many sessions return at once, which is when sharing matters.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use prost::Message as _;
use tokio::sync::watch;

use super::CatchUpResources;
use super::page::Page;
use crate::service::backends::ports::NeighbourError;
use crate::service::events::proto::message::v1::Message;

/// What a session wants.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct PageRequest {
    pub(super) conversation: Arc<str>,
    pub(super) after: i64,
    pub(super) page_size: u16,
    /// The only user that the page is for; `None`: any member of the conversation.
    pub(super) reader: Option<Arc<str>>,
}

/// `None`: the call has not been answered yet.
type Answer = Option<Result<Arc<Page>, NeighbourError>>;

/// The fetches that others can join. Bounded by the steps that sessions have running.
#[derive(Default)]
pub(super) struct Fetches(Mutex<HashMap<PageRequest, watch::Receiver<Answer>>>);

impl CatchUpResources {
    /// Fetches a page on behalf of a user, or joins a fetch of another session.
    pub(super) async fn fetch(
        self: &Arc<Self>,
        request: PageRequest,
        user: &Arc<str>,
    ) -> Result<Arc<Page>, NeighbourError> {
        let mut answer = self.join(request, user);
        let answer = answer.wait_for(Option::is_some).await.map(|answer| answer.clone());
        let ended = || NeighbourError::Unavailable("the fetch ended without an answer".into());
        answer.ok().flatten().unwrap_or_else(|| Err(ended()))
    }

    fn join(self: &Arc<Self>, request: PageRequest, user: &Arc<str>) -> watch::Receiver<Answer> {
        let mut queued = self.fetches.0.lock().expect("no holder panics");
        if let Some(answer) = queued.get(&request) {
            self.counters.pages_shared.add(1);
            return answer.clone();
        }
        let (answers, answer) = watch::channel(None);
        queued.insert(request.clone(), answer.clone());
        tokio::spawn(Arc::clone(self).run_fetch(request, Arc::clone(user), answers));
        answer
    }

    async fn run_fetch(
        self: Arc<Self>,
        request: PageRequest,
        user: Arc<str>,
        answers: watch::Sender<Answer>,
    ) {
        let permit = self.limits.page_call().await;
        self.fetches.0.lock().expect("no holder panics").remove(&request);
        let PageRequest { conversation, after, page_size, .. } = request;
        if answers.is_closed() {
            return; // The sessions that wanted it have ended.
        }
        let messages =
            self.messages.as_ref().expect("pages are requested only with a message service");
        let call = messages.messages_after(user, Arc::clone(&conversation), after, page_size);
        let answer = tokio::select! {
            answer = call => answer,
            () = answers.closed() => return,
        };
        let answer = answer.map(|messages| {
            // Charged before the permit is returned, so that the pages beyond the bound are counted.
            let charge = self.limits.charge(messages.iter().map(Message::encoded_len).sum());
            Arc::new(Page::new(&conversation, (after, page_size), messages, charge))
        });
        drop(permit);
        let _ = answers.send(Some(answer)); // The sessions may have ended.
    }
}
