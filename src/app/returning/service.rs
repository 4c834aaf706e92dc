//! The model of the message service: it takes sequences, commits them in any order, and publishes a record
//! for each. It answers with pages of what is committed.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use prost::Message as _;
use tokio::time::sleep;

use crate::domain::members::Members;
use crate::reactor::simulation::random::Random;
use crate::service::backends::ports::{
    BoxFuture, ConversationListing, ConversationSource, MessageSource, NeighbourError,
};
use crate::service::events::encode::encode_envelope;
use crate::service::events::proto::conversation::v1::Conversation;
use crate::service::events::proto::message::v1::{Message, MessageSentEvent};
use crate::service::events::proto::shared::v1::EventType;

pub(super) const CONVERSATIONS: usize = 2;
/// The user of all sessions.
pub(super) const USER: &str = "alice";

/// The name of a conversation.
pub(super) fn conversation(of: usize) -> String {
    format!("room-{of}")
}

/// The number of a conversation of this name.
pub(super) fn number_of(name: &str) -> usize {
    name.strip_prefix("room-").and_then(|number| number.parse().ok()).expect("a room")
}

/// A record of the log.
#[derive(Clone, Debug)]
pub(super) struct ModelRecord {
    pub(super) conversation: usize,
    pub(super) sequence: i64,
    /// A serialized `EventEnvelope`. Its message says where it is in the log.
    pub(super) value: Vec<u8>,
}

#[derive(Debug, Default)]
struct StoreState {
    /// The last sequence that was taken.
    taken: [i64; CONVERSATIONS],
    uncommitted: Vec<(usize, i64)>,
    committed: [BTreeSet<i64>; CONVERSATIONS],
    /// Committed and not published yet, or to be published once more.
    unpublished: Vec<(usize, i64)>,
    /// Records that are not routed yet.
    log: VecDeque<ModelRecord>,
    /// Records that are routed.
    routed: u64,
    published: u64,
}

/// What the message service has, and the log.
#[derive(Debug)]
pub(super) struct MessageStore(Mutex<StoreState>);

/// A message as both the service and the log have it; `content` says where it comes from.
fn message(of: usize, sequence: i64, content: String) -> Message {
    Message {
        message_id: format!("{of}/{sequence}"),
        conversation_id: conversation(of),
        sender_user_id: "bob".into(),
        sequence,
        content,
        ..Message::default()
    }
}

impl MessageStore {
    /// Some messages from long ago, which are not in the log any more: none, some, or more than a page.
    pub(super) fn new(random: &mut Random) -> Self {
        let mut state = StoreState::default();
        for of in 0..CONVERSATIONS {
            let old = random.pick(&[0, 0, 3, 3, 95, 205]);
            state.taken[of] = old;
            state.committed[of] = (1..=old).collect();
        }
        Self(Mutex::new(state))
    }

    fn state(&self) -> MutexGuard<'_, StoreState> {
        self.0.lock().expect("no holder panics")
    }

    /// A transaction takes a sequence.
    pub(super) fn takes_sequence(&self, random: &mut Random) {
        let of = random.below(CONVERSATIONS);
        let mut state = self.state();
        state.taken[of] += 1;
        let sequence = state.taken[of];
        state.uncommitted.push((of, sequence));
    }

    /// Any transaction is committed. Later it will be published, now and then twice.
    pub(super) fn commits(&self, random: &mut Random) {
        let mut state = self.state();
        if state.uncommitted.is_empty() {
            return;
        }
        let index = random.below(state.uncommitted.len());
        let (of, sequence) = state.uncommitted.swap_remove(index);
        state.committed[of].insert(sequence);
        for _ in 0..if random.chance(24) { 2 } else { 1 } {
            state.unpublished.push((of, sequence));
        }
    }

    /// Any committed message is published.
    pub(super) fn publishes(&self, random: &mut Random) {
        let mut state = self.state();
        if state.unpublished.is_empty() {
            return;
        }
        let index = random.below(state.unpublished.len());
        let (of, sequence) = state.unpublished.swap_remove(index);
        let content = format!("live {}", state.published);
        state.published += 1;
        let sent = MessageSentEvent { message: Some(message(of, sequence, content)) };
        let value = encode_envelope(EventType::MessageSent, None, sent.encode_to_vec());
        state.log.push_back(ModelRecord { conversation: of, sequence, value });
    }

    /// Commits and publishes everything.
    pub(super) fn finish(&self, random: &mut Random) {
        while !self.state().uncommitted.is_empty() {
            self.commits(random);
        }
        while !self.state().unpublished.is_empty() {
            self.publishes(random);
        }
    }

    pub(super) fn has_records(&self) -> bool {
        !self.state().log.is_empty()
    }

    /// The next record, with its place in the log.
    pub(super) fn routes(&self) -> Option<(u64, ModelRecord)> {
        let mut state = self.state();
        let record = state.log.pop_front()?;
        let index = state.routed;
        state.routed += 1;
        Some((index, record))
    }

    pub(super) fn committed(&self, of: usize) -> BTreeSet<i64> {
        self.state().committed[of].clone()
    }

    /// Whether every sequence of the conversation that was taken is committed, published and routed.
    pub(super) fn is_quiet(&self, of: usize) -> bool {
        let state = self.state();
        let waiting = state.uncommitted.iter().chain(&state.unpublished).map(|(it, _)| *it);
        let queued = state.log.iter().map(|record| record.conversation);
        !waiting.chain(queued).any(|it| it == of)
    }
}

/// The services that catch-up calls. Each answer takes some time, and is that of any moment in it.
pub(super) struct StoreService {
    store: Arc<MessageStore>,
    random: Mutex<Random>,
}

impl StoreService {
    pub(super) fn new(store: Arc<MessageStore>, seed: u64) -> Self {
        Self { store, random: Mutex::new(Random::new(seed)) }
    }

    fn answer<T: Send + 'static>(
        &self,
        answer: impl FnOnce(&MessageStore) -> T + Send + 'static,
    ) -> BoxFuture<Result<T, NeighbourError>> {
        let mut random = self.random.lock().expect("no holder panics");
        let [before, after] = [0; 2].map(|_| Duration::from_millis(random.between(0, 9)));
        let store = Arc::clone(&self.store);
        Box::pin(async move {
            sleep(before).await;
            let answer = answer(&store);
            sleep(after).await;
            Ok(answer)
        })
    }
}

impl MessageSource for StoreService {
    fn messages_after(
        &self,
        _user: Arc<str>,
        conversation: Arc<str>,
        after: i64,
        page_size: u16,
    ) -> BoxFuture<Result<Vec<Message>, NeighbourError>> {
        let of = number_of(&conversation);
        self.answer(move |store| {
            let committed = store.committed(of);
            let page = committed.range(after.saturating_add(1)..).take(page_size.into());
            page.map(|sequence| message(of, *sequence, "stored".into())).collect()
        })
    }
}

impl ConversationListing for StoreService {
    fn conversations_of(
        &self,
        _user: Arc<str>,
    ) -> BoxFuture<Result<Vec<Conversation>, NeighbourError>> {
        let listed = |of| Conversation { conversation_id: conversation(of), ..Default::default() };
        self.answer(move |_| (0..CONVERSATIONS).map(listed).collect())
    }
}

impl ConversationSource for StoreService {
    fn members(&self, _conversation: Arc<str>) -> BoxFuture<Result<Members, NeighbourError>> {
        self.answer(|_| [USER].into_iter().collect())
    }
}
