//! The classes of a neighbour's failed answers: what each means, its counter and its log line.
//!
//! | class | codes | what callers do |
//! | --- | --- | --- |
//! | not found | `NOT_FOUND` | ask once more after a short delay, because replicas lag; then it is final |
//! | denied | `PERMISSION_DENIED`, `UNAUTHENTICATED` | retry like an unavailable service |
//! | invalid | `INVALID_ARGUMENT`, `FAILED_PRECONDITION`, `UNIMPLEMENTED` | the same; but an id that only a client has named and that is an invalid argument is malformed |
//! | too large | `RESOURCE_EXHAUSTED`, `OUT_OF_RANGE`, also from the limit of this node | the same |
//! | unavailable | every other code, and no answer in time | the same |
//!
//! Only "not found" says that something does not exist. A service that refuses is not configured as this
//! node expects, and its answer says nothing about the conversation. So callers do not give up before
//! their deadline, and the log names what to do.

use std::time::Duration;

use tokio::time::Instant;
use tonic::{Code, Status};

use super::counters::NeighbourCounters;
use crate::domain::counters::SharedCounter;
use crate::service::backends::outage::Outage;
use crate::service::backends::ports::NeighbourError;

/// A refusal counts as over when none has followed for so long: other methods of the service may
/// succeed meanwhile.
const CALM: Duration = Duration::from_secs(60);
/// Characters of a service's message that are logged.
const MESSAGE_CHARS_MAX: usize = 200;

/// The class of a failed answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FailureClass {
    NotFound,
    Denied,
    Invalid,
    TooLarge,
    Unavailable,
}

impl FailureClass {
    pub(super) fn of(code: Code) -> Self {
        match code {
            Code::NotFound => Self::NotFound,
            Code::PermissionDenied | Code::Unauthenticated => Self::Denied,
            Code::InvalidArgument | Code::FailedPrecondition | Code::Unimplemented => Self::Invalid,
            Code::ResourceExhausted | Code::OutOfRange => Self::TooLarge,
            Code::Ok
            | Code::Cancelled
            | Code::Unknown
            | Code::DeadlineExceeded
            | Code::AlreadyExists
            | Code::Aborted
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss => Self::Unavailable,
        }
    }

    fn counter(self, counters: &NeighbourCounters) -> &SharedCounter {
        match self {
            Self::NotFound => &counters.not_found,
            Self::Denied => &counters.denied,
            Self::Invalid => &counters.invalid,
            Self::TooLarge => &counters.too_large,
            Self::Unavailable => &counters.unavailable,
        }
    }

    /// What an operator can do. `None`: it is no refusal.
    fn remedy(self) -> Option<&'static str> {
        match self {
            Self::NotFound | Self::Unavailable => None,
            Self::Denied => Some(
                "the service denies the calls of this node: allow them in the service, or correct its address",
            ),
            Self::Invalid => Some(
                "the service calls the requests of this node invalid: compare its version with the contract (or a client names \
                 malformed ids)",
            ),
            Self::TooLarge => Some(
                "the answer is too large, or a quota is exhausted: raise NEIGHBOUR_ANSWER_MAX, or the limits of \
                 the service",
            ),
        }
    }
}

impl From<Status> for NeighbourError {
    fn from(status: Status) -> Self {
        let text = format!("{:?}", status.code());
        match FailureClass::of(status.code()) {
            FailureClass::NotFound => Self::NotFound,
            FailureClass::Denied => Self::Denied(text),
            FailureClass::Invalid if status.code() == Code::InvalidArgument => Self::Invalid(text),
            FailureClass::Invalid => Self::Unsupported(text),
            FailureClass::TooLarge => Self::TooLarge(text),
            FailureClass::Unavailable => Self::Unavailable(text),
        }
    }
}

/// Counts failed answers, and logs the refusals of each class at growing intervals.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    denied: Outage,
    invalid: Outage,
    too_large: Outage,
}

impl Refusals {
    fn outage(&self, class: FailureClass) -> Option<&Outage> {
        match class {
            FailureClass::Denied => Some(&self.denied),
            FailureClass::Invalid => Some(&self.invalid),
            FailureClass::TooLarge => Some(&self.too_large),
            FailureClass::NotFound | FailureClass::Unavailable => None,
        }
    }

    /// A call failed with this status. `setting`: the name of the setting with the address `service`.
    pub(super) fn failed(
        &self,
        status: &Status,
        (setting, service): (&str, &str),
        counters: &NeighbourCounters,
        now: Instant,
    ) {
        let class = FailureClass::of(status.code());
        class.counter(counters).add(1);
        let (Some(outage), Some(remedy)) = (self.outage(class), class.remedy()) else { return };
        if let Some(report) = outage.failed(now) {
            let why = shortened(status.message());
            let code = status.code();
            tracing::warn!(service, setting, ?code, why, "{remedy}{report}");
        }
    }

    /// A call succeeded.
    pub(super) fn succeeded(&self, service: impl Fn() -> String, now: Instant) {
        for (outage, class) in
            [(&self.denied, "denied"), (&self.invalid, "invalid"), (&self.too_large, "too large")]
        {
            if let Some(recovery) = outage.succeeded_after(CALM, now) {
                tracing::info!(service = service(), "no call was {class} for a minute, {recovery}");
            }
        }
    }
}

/// The start of a message, for the log.
pub(super) fn shortened(message: &str) -> &str {
    let end = message.char_indices().nth(MESSAGE_CHARS_MAX).map_or(message.len(), |(at, _)| at);
    &message[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Promise: “Only NOT_FOUND means that something does not exist.”
    #[test]
    fn only_not_found_means_that_something_does_not_exist() {
        for number in 0..=16 {
            let code = Code::from_i32(number);
            let error = NeighbourError::from(Status::new(code, ""));
            assert_eq!(error == NeighbourError::NotFound, code == Code::NotFound, "{code:?}");
        }
    }

    #[test]
    fn each_class_has_a_counter_and_each_refusal_names_a_remedy() {
        let (refusals, counters) = (Refusals::default(), NeighbourCounters::default());
        for number in 1..=16 {
            let status = Status::new(Code::from_i32(number), "no");
            refusals.failed(&status, ("CONV_SVC_ADDR", "host:1"), &counters, Instant::now());
        }
        let NeighbourCounters { not_found, denied, invalid, too_large, unavailable, .. } =
            &counters;
        let counted = [not_found, denied, invalid, too_large, unavailable].map(SharedCounter::get);
        assert_eq!(counted, [1, 2, 3, 2, 8]);
        for class in [FailureClass::Denied, FailureClass::Invalid, FailureClass::TooLarge] {
            assert!(class.remedy().is_some() && refusals.outage(class).is_some());
        }
    }
}
