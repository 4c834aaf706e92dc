//! The conversation and the message service: computed answers, and none for the unknown conversations.

use std::future::pending;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::ops::Range;
use std::sync::Arc;

use delivery_testkit::services::{Answer, Call, Neighbours, serve};
use tonic::Status;

use super::{ABSENT, LARGE, ORDINARY, UNKNOWN, small_number};
use crate::names;
use crate::payload::conversation_number;

/// The members of the conversations.
#[derive(Debug)]
pub(super) struct Known {
    /// Small conversations: one for each session of a node, with a session on each node.
    pub(super) small: usize,
    pub(super) nodes: usize,
    /// Members of the large conversation.
    pub(super) large: usize,
    /// Those of them who are connected.
    pub(super) connected: Range<usize>,
}

pub(super) struct BesideServices(Known);

impl BesideServices {
    /// Serves on a free port, in a runtime of its own. Returns the address.
    pub(super) fn serve(known: Known) -> io::Result<(tokio::runtime::Runtime, String)> {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?.to_string();
        let served = serve(Arc::new(Self(known)), listener, None);
        runtime.spawn(async move { served.await.expect("served") });
        Ok((runtime, address))
    }

    fn members(&self, number: usize) -> Option<Vec<String>> {
        let Known { small, nodes, large, connected } = &self.0;
        if number == LARGE {
            let absent = (0..large.saturating_sub(connected.len())).map(|at| ABSENT + at);
            return Some(connected.clone().chain(absent).map(names::user).collect());
        }
        if (ORDINARY..UNKNOWN).contains(&number) {
            let each = connected.len() / nodes;
            return Some(connected.clone().step_by(each.max(1)).map(names::user).collect());
        }
        let index = number.checked_sub(small_number(0)).filter(|index| index < small)?;
        Some((0..*nodes).map(|node| names::user(node * small + index)).collect())
    }
}

impl Neighbours for BesideServices {
    async fn answer(&self, call: Call) -> Result<Answer, Status> {
        match call {
            Call::Members { conversation } => match conversation_number(&conversation) {
                Some(number) if number >= UNKNOWN => pending().await,
                number => number
                    .and_then(|number| self.members(number))
                    .map(Answer::Members)
                    .ok_or_else(|| Status::not_found("no conversation of this load")),
            },
            Call::List { .. } => Ok(Answer::Conversations(Vec::new())),
            Call::Sync { .. } => Ok(Answer::Messages(Vec::new())),
            Call::Presence { .. } => Ok(Answer::Presence(Vec::new())),
            Call::Devices { .. } => Ok(Answer::Devices(Vec::new())),
            Call::Register { .. } | Call::Unregister { .. } | Call::Refresh { .. } => {
                Ok(Answer::Done)
            }
        }
    }
}
