//! The steps of one session that are running.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;

use tokio::task::{Id, JoinSet};

use super::CatchUpFailure;
use super::page::Page;
use super::positions::ConversationStep;

/// The outcome of a [`ConversationStep`].
pub(super) enum StepOutcome {
    /// Whether the user is a member of the conversation.
    Membership(Arc<str>, bool),
    /// A page of the conversation.
    Page {
        conversation: Arc<str>,
        page: Arc<Page>,
        /// Events that were routed after the request are delivered live.
        is_final: bool,
    },
    /// There is no such conversation, as far as the service knows.
    NotFound(ConversationStep),
}

/// The running steps, and what each of them does. Dropping it aborts them.
#[derive(Default)]
pub(super) struct RunningSteps {
    tasks: JoinSet<Result<StepOutcome, CatchUpFailure>>,
    steps: HashMap<Id, ConversationStep>,
}

impl RunningSteps {
    pub(super) fn len(&self) -> usize {
        self.tasks.len()
    }

    pub(super) fn start(
        &mut self,
        step: ConversationStep,
        run: impl Future<Output = Result<StepOutcome, CatchUpFailure>> + Send + 'static,
    ) {
        let id = self.tasks.spawn(run).id();
        self.steps.insert(id, step);
    }

    /// The outcome of the step that ends next; `None`: none is running.
    pub(super) async fn next(&mut self) -> Option<Result<StepOutcome, CatchUpFailure>> {
        let (id, outcome) = match self.tasks.join_next_with_id().await? {
            Ok((id, outcome)) => (id, outcome),
            Err(error) => (error.id(), Err(CatchUpFailure::SessionEnded)),
        };
        self.steps.remove(&id);
        Some(outcome)
    }

    /// Aborts all steps and drops their outcomes. Returns the steps, which have to run again.
    pub(super) async fn abort(&mut self) -> impl Iterator<Item = ConversationStep> {
        self.tasks.shutdown().await;
        std::mem::take(&mut self.steps).into_values()
    }
}
