//! The deadlines of the steps in which a node stops.

use std::time::Duration;

use tokio::time::Instant;

/// Longest time reserved for one step.
const SHARE_MAX: Duration = Duration::from_secs(1);

/// When each step ends at the latest. A step that is done earlier leaves its time to the next ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Deadlines {
    /// All sessions have ended.
    pub sessions: Instant,
    /// All gRPC connections are closed.
    pub streams: Instant,
    /// All records in flight are done.
    pub records: Instant,
    /// Offsets are committed, and the consumer group is left.
    pub group: Instant,
    /// The other nodes know of the end (`HANDOFF=log`).
    pub cluster: Instant,
    /// All tasks have ended, and the process exits.
    pub exit: Instant,
}

impl Deadlines {
    /// For a node whose sessions are all told to close by `closed`. Each step after the first has an
    /// eighth of `stop_timeout`, at most [`SHARE_MAX`]; the sessions have the rest.
    pub(super) fn new(closed: Instant, stop_timeout: Duration) -> Self {
        let share = (stop_timeout / 8).min(SHARE_MAX);
        let exit = closed + stop_timeout;
        Self {
            sessions: exit - share * 5,
            streams: exit - share * 4,
            records: exit - share * 3,
            group: exit - share * 2,
            cluster: exit - share,
            exit,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_step_ends_with_the_stop_timeout_and_each_step_has_time() {
        for (stop_timeout, sessions, share) in [
            (
                Duration::from_millis(100),
                Duration::from_micros(37_500),
                Duration::from_micros(12_500),
            ),
            (Duration::from_secs(10), Duration::from_secs(5), Duration::from_secs(1)),
            (Duration::from_secs(600), Duration::from_secs(595), Duration::from_secs(1)),
        ] {
            let closed = Instant::now();
            let Deadlines { sessions: first, streams, records, group, cluster, exit } =
                Deadlines::new(closed, stop_timeout);
            assert_eq!(exit - closed, stop_timeout);
            assert_eq!(first - closed, sessions);
            assert_eq!(
                [
                    streams - first,
                    records - streams,
                    group - records,
                    cluster - group,
                    exit - cluster
                ],
                [share; 5]
            );
        }
    }
}
