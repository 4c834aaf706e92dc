//! A message service and a conversation service within the test, so that time can be virtual.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::domain::members::Members;
use crate::service::events::proto::conversation::v1::Conversation;

/// Messages by conversation, all of them open to every user; and the recorded calls.
#[derive(Default)]
pub(super) struct Shelf {
    pub(super) state: Mutex<ShelfState>,
    /// How long a call takes. The page is that of the time of the call.
    pub(super) delay: Duration,
    /// `ListConversations` names none, so that membership is asked for each.
    pub(super) lists_nothing: bool,
}

#[derive(Default)]
pub(super) struct ShelfState {
    conversations: BTreeMap<String, BTreeSet<i64>>,
    pages: Vec<(String, i64)>,
    lists: usize,
    members: usize,
}

impl Shelf {
    fn state(&self) -> std::sync::MutexGuard<'_, ShelfState> {
        self.state.lock().expect("no holder panics")
    }

    /// The conversation has the messages up to `last`.
    pub(super) fn holds(&self, conversation: &str, last: i64) {
        self.commits(conversation, 1..=last);
    }

    pub(super) fn commits(&self, conversation: &str, more: impl IntoIterator<Item = i64>) {
        self.state().conversations.entry(conversation.to_owned()).or_default().extend(more);
    }

    /// The sequences after which a conversation was requested.
    pub(super) fn asked_for(&self, conversation: &str) -> Vec<i64> {
        let state = self.state();
        state.pages.iter().filter(|(of, _)| of == conversation).map(|(_, after)| *after).collect()
    }

    /// Calls of `SyncMessages`.
    pub(super) fn pages(&self) -> usize {
        self.state().pages.len()
    }

    /// Calls of `ListConversations`.
    pub(super) fn lists(&self) -> usize {
        self.state().lists
    }

    /// Calls of `GetConversation`.
    pub(super) fn members(&self) -> usize {
        self.state().members
    }

    fn late<T: Send + 'static>(&self, answer: T) -> BoxFuture<Result<T, NeighbourError>> {
        let delay = self.delay;
        Box::pin(async move {
            if !delay.is_zero() {
                tokio::time::sleep(delay).await;
            }
            Ok(answer)
        })
    }
}

impl MessageSource for Shelf {
    fn messages_after(
        &self,
        _user: Arc<str>,
        conversation: Arc<str>,
        after: i64,
        page_size: u16,
    ) -> BoxFuture<Result<Vec<Message>, NeighbourError>> {
        let mut state = self.state();
        state.pages.push((conversation.to_string(), after));
        let stored = state.conversations.get(&*conversation).into_iter().flatten();
        let message = |sequence: &i64| super::message(&conversation, *sequence);
        let wanted = stored.filter(|sequence| **sequence > after).take(page_size.into());
        let page: Vec<_> = wanted.map(message).collect();
        drop(state);
        self.late(page)
    }
}

impl ConversationListing for Shelf {
    fn conversations_of(
        &self,
        _user: Arc<str>,
    ) -> BoxFuture<Result<Vec<Conversation>, NeighbourError>> {
        let mut state = self.state();
        state.lists += 1;
        let conversation =
            |id: &String| Conversation { conversation_id: id.clone(), ..Conversation::default() };
        let listed = state.conversations.keys().filter(|_| !self.lists_nothing).map(conversation);
        let listed: Vec<_> = listed.collect();
        drop(state);
        self.late(listed)
    }
}

impl ConversationSource for Shelf {
    fn members(&self, _conversation: Arc<str>) -> BoxFuture<Result<Members, NeighbourError>> {
        self.state().members += 1;
        self.late(["alice"].into_iter().collect::<Members>())
    }
}

/// Catch-up from a shelf. The test takes the session manager's part.
pub(super) struct ShelfBench {
    pub(super) shelf: Arc<Shelf>,
    pub(super) catch_up: CatchUpService,
    pub(super) counters: Arc<CatchUpCounters>,
    out: mpsc::Sender<CatchUpReport>,
    steps: mpsc::Receiver<CatchUpReport>,
}

impl ShelfBench {
    pub(super) fn new(config: CatchUpConfig, shelf: Shelf) -> Self {
        let shelf = Arc::new(shelf);
        let access = ReadAccess::Checked { listing: shelf.clone(), source: shelf.clone() };
        let counters = Arc::new(CatchUpCounters::default());
        let catch_up = CatchUpService::new(config, shelf.clone(), access, Arc::clone(&counters));
        let (out, steps) = mpsc::channel(16);
        Self { shelf, catch_up, counters, out, steps }
    }

    pub(super) fn begin(&self, slot: u32, named: &[(&str, i64)]) {
        self.begin_with(slot, named, None);
    }

    pub(super) fn begin_with(
        &self,
        slot: u32,
        named: &[(&str, i64)],
        cursor: Option<CursorRequest>,
    ) {
        self.begin_scope(slot, CatchUpScope::Session(positions(named)), cursor);
    }

    /// A gRPC session has named a conversation.
    pub(super) fn begin_conversation(&self, slot: u32, conversation: &str) {
        let scope = CatchUpScope::Conversation { conversation: conversation.into(), after: 0 };
        self.begin_scope(slot, scope, None);
    }

    fn begin_scope(&self, slot: u32, scope: CatchUpScope, cursor: Option<CursorRequest>) {
        let connection = ConnectionKey { slot, generation: 0 };
        let address = SessionAddress { shard: ShardId(0), encoding: Encoding::Stream, connection };
        let ids = SessionIds::new("alice", &slot.to_string());
        let request = CatchUpRequest { ids, address, scope, cursor, visibility: None };
        let begun = self.catch_up.begin(request, self.out.clone());
        assert!(matches!(begun, CatchUpStart::Running(_)), "{begun:?}");
    }

    /// The next report: the slot of its session, and the step.
    pub(super) async fn step(&mut self) -> (u32, CatchUpStep) {
        let report = self.steps.recv().await.expect("the bench holds a sender");
        (report.address.connection.slot, report.step)
    }
}
