//! gRPC statuses that close a stream. `docs/grpc.md` has the table for clients.

use tonic::{Code, Status};

use crate::domain::close::{Close, CloseCode};
use crate::domain::command::Refusal;

/// Standard metadata: how long the client must wait before it retries, ms.
const PUSHBACK: &str = "grpc-retry-pushback-ms";

/// The status that corresponds to a WebSocket close code.
pub(super) fn of_close(close: &Close) -> Status {
    let code = match close.code {
        CloseCode::SESSION_REPLACED => Code::Aborted,
        CloseCode::TOKEN_EXPIRED => Code::Unauthenticated,
        CloseCode::POLICY_VIOLATION | CloseCode::MESSAGE_TOO_BIG => Code::ResourceExhausted,
        CloseCode::PROTOCOL_ERROR | CloseCode::UNSUPPORTED_DATA | CloseCode::INVALID_PAYLOAD => {
            Code::InvalidArgument
        }
        CloseCode::RESUME_TOO_LATE => Code::FailedPrecondition,
        CloseCode::EVENTS_MISSED => Code::DataLoss,
        CloseCode::NORMAL
        | CloseCode::GOING_AWAY
        | CloseCode::SERVICE_RESTART
        | CloseCode::TRY_AGAIN_LATER => Code::Unavailable,
        // Includes 1011, an internal error. An overflow has its own status and does not come here.
        _ => Code::Internal,
    };
    Status::new(code, close.reason.clone())
}

/// The status that corresponds to an HTTP refusal of an upgrade.
pub(crate) fn of_refusal(refusal: &Refusal) -> Status {
    let code = match refusal.status {
        400 => Code::InvalidArgument,
        401 => Code::Unauthenticated,
        403 => Code::PermissionDenied,
        429 => Code::ResourceExhausted,
        502..=504 => Code::Unavailable,
        _ => Code::Internal,
    };
    let mut status = Status::new(code, refusal.body.clone());
    if let Some(seconds) = refusal.retry_after_s {
        status.metadata_mut().insert(PUSHBACK, (u64::from(seconds) * 1000).into());
    }
    status
}

/// HTTP statuses that [`http_status`] gives.
pub(super) const HTTP_STATUSES: [u16; 8] = [400, 401, 403, 404, 408, 429, 500, 503];

/// The HTTP status of an upgrade that would be refused for the same reason.
pub(super) fn http_status(code: Code) -> u16 {
    match code {
        Code::InvalidArgument | Code::OutOfRange => 400,
        Code::Unauthenticated => 401,
        Code::PermissionDenied => 403,
        Code::Unimplemented => 404,
        Code::DeadlineExceeded => 408,
        Code::ResourceExhausted => 429,
        Code::Unavailable => 503,
        _ => 500,
    }
}

/// Too many live events were queued: the client reads too slowly.
pub(super) fn overflow() -> Status {
    Status::resource_exhausted("backpressure overflow: too many events were queued; reconnect")
}

/// The client read nothing for the stall timeout although events were queued.
pub(super) fn stalled() -> Status {
    Status::resource_exhausted("the stream was not read for too long; reconnect")
}

/// Too many live events were held during catch-up.
pub(super) fn catch_up_overflow() -> Status {
    Status::unavailable("catch-up overflow: reconnect and resume")
}

/// No catch-up completed for the catch-up timeout.
pub(super) fn catch_up_timeout() -> Status {
    Status::unavailable("catch-up took too long: reconnect and resume")
}

/// The node is draining or has not started.
pub(super) fn not_serving() -> Status {
    Status::unavailable("this node is not accepting sessions: connect to another one")
}

/// The node has reached its limit of streams.
pub(super) fn full() -> Status {
    Status::resource_exhausted("this node has reached its limit of streams: connect to another one")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn close_codes_map_to_statuses() {
        for (code, expected) in [
            (CloseCode::SESSION_REPLACED, Code::Aborted),
            (CloseCode::TOKEN_EXPIRED, Code::Unauthenticated),
            (CloseCode::SERVICE_RESTART, Code::Unavailable),
            (CloseCode::TRY_AGAIN_LATER, Code::Unavailable),
            (CloseCode::EVENTS_MISSED, Code::DataLoss),
            (CloseCode::INTERNAL_ERROR, Code::Internal),
        ] {
            let status = of_close(&Close::new(code, "the reason"));
            assert_eq!((status.code(), status.message()), (expected, "the reason"));
        }
    }

    #[test]
    fn refusal_carries_its_retry_delay() {
        let refusal =
            Refusal { status: 429, body: "too many sessions".into(), retry_after_s: Some(60) };
        let status = of_refusal(&refusal);
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(status.metadata().get(PUSHBACK).unwrap(), "60000");
    }
}
