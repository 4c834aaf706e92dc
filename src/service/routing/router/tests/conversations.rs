use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use crate::domain::members::Members;
use crate::service::backends::ports::{
    BoxFuture, ConversationListing, ConversationSource, NeighbourError,
};
use crate::service::events::proto::conversation::v1::Conversation;

/// A conversation service that answers from a table, fails, or waits until the gate is opened.
#[derive(Default)]
pub(super) struct FakeConversations {
    pub(super) table: Mutex<HashMap<String, Vec<&'static str>>>,
    pub(super) requested: Mutex<Vec<String>>,
    pub(super) failing: AtomicBool,
    /// Conversations whose members, and users whose conversations it does not return.
    pub(super) failing_for: Mutex<HashSet<String>>,
    /// The users whose conversations were requested.
    pub(super) listed: Mutex<Vec<String>>,
    pub(super) gate: Option<tokio::sync::Semaphore>,
}

impl FakeConversations {
    pub(super) fn set(&self, conversation: &str, members: &[&'static str]) {
        self.table.lock().unwrap().insert(conversation.into(), members.to_vec());
    }

    pub(super) fn has(&self, conversation: &str, member: &str) -> bool {
        let table = self.table.lock().unwrap();
        table.get(conversation).is_some_and(|members| members.contains(&member))
    }

    /// Lets it answer this many requests.
    pub(super) fn open(&self, answers: usize) {
        self.gate.as_ref().unwrap().add_permits(answers);
    }

    pub(super) fn requested(&self) -> Vec<String> {
        self.requested.lock().unwrap().clone()
    }

    pub(super) fn listed(&self) -> Vec<String> {
        self.listed.lock().unwrap().clone()
    }

    fn fails(&self, subject: &str) -> Result<(), NeighbourError> {
        if self.failing.load(Ordering::Relaxed)
            || self.failing_for.lock().unwrap().contains(subject)
        {
            return Err(NeighbourError::Unavailable("fails by order".into()));
        }
        Ok(())
    }
}

pub(super) struct FakeSource(pub(super) Arc<FakeConversations>);

impl ConversationSource for FakeSource {
    fn members(&self, conversation: Arc<str>) -> BoxFuture<Result<Members, NeighbourError>> {
        let service = Arc::clone(&self.0);
        Box::pin(async move {
            service.requested.lock().unwrap().push(conversation.to_string());
            if let Some(gate) = &service.gate {
                gate.acquire().await.unwrap().forget();
            }
            service.fails(&conversation)?;
            let table = service.table.lock().unwrap();
            let members = table.get(&*conversation).ok_or(NeighbourError::NotFound)?;
            Ok(members.iter().collect())
        })
    }
}

impl ConversationListing for FakeSource {
    fn conversations_of(
        &self,
        user: Arc<str>,
    ) -> BoxFuture<Result<Vec<Conversation>, NeighbourError>> {
        let service = Arc::clone(&self.0);
        Box::pin(async move {
            service.listed.lock().unwrap().push(user.to_string());
            service.fails(&user)?;
            let table = service.table.lock().unwrap();
            let theirs = table.iter().filter(|(_, members)| members.contains(&&*user));
            let theirs = theirs.map(|(id, _)| Conversation {
                conversation_id: id.clone(),
                ..Conversation::default()
            });
            Ok(theirs.collect())
        })
    }
}
