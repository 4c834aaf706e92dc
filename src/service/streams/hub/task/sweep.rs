//! Deadlines of the streams.

use tokio::time::Instant;

use super::{CursorState, Hub, StreamState};
use crate::domain::close::EndReason;
use crate::service::streams::hub::outbox::Unsent;
use crate::service::streams::hub::status;

impl Hub {
    /// Closes stalled streams. Removes streams that exceed their close timeout, and requests whose
    /// caller is gone.
    pub(super) fn sweep(&mut self, now: Instant) {
        let mut stalled = Vec::new();
        let mut catch_up_stalled = Vec::new();
        let mut ended = Vec::new();
        let mut abandoned = Vec::new();
        let expired =
            |since: Option<Instant>, limit| since.is_some_and(|since| since + limit <= now);
        for (connection, stream) in self.streams.iter_mut() {
            let (config, outbox) = (&self.config, &stream.outbox);
            outbox.forget_delivered(now);
            if stream.cursors == CursorState::Owed {
                stream.cursors = CursorState::On;
                self.cursors.want(connection);
            }
            match &stream.state {
                StreamState::Requested(reply) if reply.is_closed() => abandoned.push(connection),
                StreamState::Closing { why, deadline } if *deadline <= now => {
                    outbox.end();
                    ended.push((connection, *why));
                }
                StreamState::Live if expired(outbox.unread_since(), config.stall_timeout) => {
                    stalled.push(connection);
                }
                StreamState::Live if expired(outbox.catch_up_since(), config.catch_up_timeout) => {
                    catch_up_stalled.push(connection);
                }
                StreamState::Live | StreamState::Requested(_) | StreamState::Closing { .. } => {}
            }
        }
        for connection in stalled {
            self.metrics.counters.stream_stalls.add(1);
            self.close(connection, status::stalled(), EndReason::WriteTimeout, Unsent::Discard);
        }
        for connection in catch_up_stalled {
            self.metrics.counters.stream_catch_up_timeouts.add(1);
            let (status, why) = (status::catch_up_timeout(), EndReason::ClosedByService);
            self.close(connection, status, why, Unsent::Discard);
        }
        for (connection, why) in ended {
            self.stream_ended(connection, why);
        }
        for connection in abandoned {
            self.remove(connection, EndReason::HandshakeTimeout);
        }
    }
}
