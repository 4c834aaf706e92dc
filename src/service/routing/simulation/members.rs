//! The members of the conversations of the simulated cluster: known from the start, or asked for.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use tokio::sync::oneshot;

use super::logs::{conversation_name, conversations, members, user_name};
use crate::domain::members::Members;
use crate::service::backends::ports::{BoxFuture, ConversationSource, NeighbourError};
use crate::service::members::membership::{
    Membership, MembershipConfig, MembershipCounters, ReadBy, RecordPosition,
};

/// A request for the members of a conversation.
type Question = (Arc<str>, oneshot::Sender<Members>);

/// The conversation service. It answers when the simulation says so.
pub(super) struct ConversationsService {
    waiting: Mutex<VecDeque<Question>>,
    /// Whether the request that has waited for the shortest time is answered first. Then the records of the others
    /// are passed.
    latest_first: bool,
}

impl ConversationSource for ConversationsService {
    fn members(&self, conversation: Arc<str>) -> BoxFuture<Result<Members, NeighbourError>> {
        let (answer, wait) = oneshot::channel();
        self.waiting.lock().expect("one thread").push_back((conversation, answer));
        Box::pin(async { wait.await.map_err(|_| NeighbourError::NotFound) })
    }
}

impl ConversationsService {
    pub(super) fn new(latest_first: bool) -> Self {
        Self { waiting: Mutex::default(), latest_first }
    }

    /// Answers this many requests.
    pub(super) fn answer(&self, amount: usize, runtime: &tokio::runtime::Runtime) {
        let run = || runtime.block_on(async { tokio::task::yield_now().await });
        run();
        for _ in 0..amount {
            let next = {
                let mut waiting = self.waiting.lock().expect("one thread");
                if self.latest_first { waiting.pop_back() } else { waiting.pop_front() }
            };
            let Some((name, answer)) = next else { break };
            let number = name.strip_prefix("conversation-").expect("ours");
            let members = members(number.parse().expect("a number"));
            let _ = answer.send(members.into_iter().map(user_name).collect());
        }
        run();
    }
}

/// The membership cache of a node. Without a service it knows all conversations.
pub(super) fn membership(
    service: Option<Arc<ConversationsService>>,
    runtime: tokio::runtime::Handle,
) -> Arc<Membership> {
    let config =
        MembershipConfig { fetch_deadline_ms: u64::MAX >> 20, ..MembershipConfig::default() };
    let has_service = service.is_some();
    let source = service.map(|source| source as Arc<dyn ConversationSource>);
    let counters = Arc::<MembershipCounters>::default();
    let membership = Membership::new(config, source, runtime, counters);
    if !has_service {
        for conversation in conversations() {
            let names: Vec<_> = members(conversation).into_iter().map(user_name).collect();
            let names: Vec<_> = names.iter().map(String::as_str).collect();
            let position = RecordPosition { topic: 1, partition: 0, offset: conversation as i64 };
            let by = ReadBy::Follower(position);
            membership.created(&conversation_name(conversation), &names, by, 0);
        }
    }
    membership.follow();
    membership
}
