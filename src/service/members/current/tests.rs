use super::*;
use crate::service::members::membership::{
    MembershipConfig, MembershipCounters, ReadBy, RecordPosition,
};

/// A replica that knows alice and bob in `x`, and nothing that came later.
struct Replica;

impl ConversationSource for Replica {
    fn members(&self, conversation: Arc<str>) -> BoxFuture<Result<Members, NeighbourError>> {
        Box::pin(async move {
            match &*conversation {
                "x" => Ok(["alice", "bob"].iter().collect()),
                _ => Err(NeighbourError::NotFound),
            }
        })
    }
}

impl ConversationListing for Replica {
    fn conversations_of(
        &self,
        user: Arc<str>,
    ) -> BoxFuture<Result<Vec<Conversation>, NeighbourError>> {
        Box::pin(async move {
            match &*user {
                "alice" | "bob" => Ok(vec![Conversation {
                    conversation_id: "x".into(),
                    ..Conversation::default()
                }]),
                _ => Err(NeighbourError::NotFound),
            }
        })
    }
}

struct Bench {
    conversations: CurrentConversations,
    membership: Arc<Membership>,
    offset: i64,
}

impl Bench {
    fn new() -> Self {
        let source: Arc<dyn ConversationSource> = Arc::new(Replica);
        let membership = Membership::new(
            MembershipConfig::default(),
            Some(source),
            tokio::runtime::Handle::current(),
            Arc::<MembershipCounters>::default(),
        );
        membership.follow();
        let conversations = CurrentConversations::new(Arc::new(Replica), Arc::clone(&membership));
        Self { conversations, membership, offset: 0 }
    }

    fn next(&mut self) -> ReadBy {
        self.offset += 1;
        ReadBy::Follower(RecordPosition { topic: 0, partition: 0, offset: self.offset })
    }

    fn change(&mut self, conversation: &str, user: &str, added: bool) {
        let by = self.next();
        self.membership.changed(conversation, user, added, by);
    }

    async fn members(&self, conversation: &str) -> Result<Members, NeighbourError> {
        self.conversations.members(conversation.into()).await
    }

    async fn listed(&self, user: &str) -> Result<Vec<String>, NeighbourError> {
        let listed = self.conversations.conversations_of(user.into()).await?;
        let mut ids: Vec<_> = listed.into_iter().map(|one| one.conversation_id).collect();
        ids.sort_unstable();
        Ok(ids)
    }
}

fn list(users: &[&str]) -> Result<Members, NeighbourError> {
    Ok(users.iter().collect())
}

/// Promise: “An answer of the conversation service is never behind the log that was read:”
#[tokio::test]
async fn answers_are_not_behind_the_log_that_was_read() {
    let mut bench = Bench::new();
    bench.change("x", "bob", false);
    bench.change("x", "carol", true);
    assert_eq!(bench.members("x").await, list(&["alice", "carol"]));
    assert_eq!(bench.listed("bob").await, Ok(vec![]));
    assert_eq!(bench.listed("carol").await, Ok(vec!["x".into()]));
    assert_eq!(bench.listed("alice").await, Ok(vec!["x".into()]));
    bench.change("x", "bob", true);
    assert_eq!(bench.listed("bob").await, Ok(vec!["x".into()]));
}

#[tokio::test]
async fn conversation_that_only_the_log_knows_has_its_members() {
    let mut bench = Bench::new();
    let by = bench.next();
    bench.membership.created("new", &["bob", "dave"], by, 0);
    assert_eq!(bench.members("new").await, list(&["bob", "dave"]));
    assert_eq!(bench.listed("bob").await, Ok(vec!["new".into(), "x".into()]));
    assert_eq!(bench.listed("dave").await, Ok(vec!["new".into()]));
    bench.change("new", "dave", false);
    assert_eq!(bench.listed("dave").await, Ok(vec![]));
    assert_eq!(bench.members("other").await, Err(NeighbourError::NotFound));
    assert_eq!(bench.listed("erin").await, Err(NeighbourError::NotFound));
}
