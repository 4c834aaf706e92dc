//! What is counted of the calls to one neighbour.

crate::counters! {
    /// Calls to one neighbour.
    pub struct NeighbourCounters of SharedCounter {
        Counter calls: "Calls started",
        Counter failures: "Calls that failed, timed out or were refused",
        Counter not_found: "Answers that something does not exist",
        Counter denied: "Calls that the service denied: PERMISSION_DENIED, UNAUTHENTICATED",
        Counter invalid: "Calls that the service called invalid: INVALID_ARGUMENT, FAILED_PRECONDITION, UNIMPLEMENTED",
        Counter too_large: "Answers that are larger than NEIGHBOUR_ANSWER_MAX or a limit of the service: RESOURCE_EXHAUSTED, OUT_OF_RANGE",
        Counter unavailable: "Calls that failed otherwise, timeouts included",
        Counter large_answers: "Calls repeated because the answer is larger than 8 MiB: few such answers arrive at a time",
        Counter timeouts: "Calls without an answer before the deadline",
        Gauge in_flight: "Calls in flight",
        Counter renewals: "Connections replaced because calls got no answer",
    }
}
