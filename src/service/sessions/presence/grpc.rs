//! Registers sessions with the presence service, by gRPC.

use std::sync::Arc;

use tonic::{Code, Status};

use super::queue::OperationOutcome::{self, Done, Elsewhere, Failed, Rejected, Vanished};
use super::queue::PresenceOperation::{self, Refresh, Register, Unregister};
use super::{OperationBatch, OperationResult, PendingOperation, PresenceBackend};
use crate::service::backends::neighbours::PresenceService;
use crate::service::backends::ports::BoxFuture;
use crate::service::members::directory::SessionIds;

/// The presence service.
pub(super) struct GrpcPresence {
    service: PresenceService,
    instance: Arc<str>,
}

impl GrpcPresence {
    pub(super) fn new(service: PresenceService, instance: Arc<str>) -> Self {
        Self { service, instance }
    }
}

impl PresenceBackend for GrpcPresence {
    fn perform(&self, operations: OperationBatch) -> BoxFuture<Vec<OperationResult>> {
        let service = self.service.clone();
        let instance = Arc::clone(&self.instance);
        Box::pin(async move {
            let mut results = Vec::with_capacity(operations.len());
            for PendingOperation { ids, operation, .. } in &operations {
                let outcome = perform(&service, &instance, ids, *operation).await;
                let outcome = outcome.unwrap_or_else(|status| failure(&status));
                results.push(OperationResult { outcome, fence: None });
            }
            results
        })
    }

    /// One, so that a slow call delays no other.
    fn batch_max(&self) -> usize {
        1
    }
}

async fn perform(
    service: &PresenceService,
    instance: &str,
    ids: &SessionIds,
    operation: PresenceOperation,
) -> Result<OperationOutcome, Status> {
    let (user, device) = (ids.user(), ids.device());
    match operation {
        Register => service.register(user, device, instance).await?,
        Refresh { check: false } => match service.refresh(user, device).await {
            Err(status) if status.code() == Code::NotFound => {
                return Ok(Vanished);
            }
            refreshed => refreshed?,
        },
        Refresh { check: true } => match holder(service, ids).await? {
            None => return Ok(Vanished),
            Some(holder) if holder != instance => return Ok(Elsewhere),
            Some(_) => service.refresh(user, device).await?,
        },
        Unregister => match holder(service, ids).await? {
            None => return Ok(Vanished),
            Some(holder) if holder != instance => return Ok(Elsewhere),
            Some(_) => service.unregister(user, device).await?,
        },
    }
    Ok(Done)
}

/// The instance that a session is registered with.
async fn holder(service: &PresenceService, ids: &SessionIds) -> Result<Option<String>, Status> {
    let devices = service.devices(ids.user()).await?;
    let registered = devices.into_iter().find(|device| device.device_id == ids.device());
    Ok(registered.map(|device| device.instance_id))
}

/// Whether a retry may help. It does when a service that denies the calls of this node is configured
/// correctly; a malformed request stays malformed.
fn failure(status: &Status) -> OperationOutcome {
    match status.code() {
        Code::InvalidArgument
        | Code::OutOfRange
        | Code::FailedPrecondition
        | Code::Unimplemented => Rejected,
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::NotFound
        | Code::PermissionDenied
        | Code::AlreadyExists
        | Code::ResourceExhausted
        | Code::Aborted
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss
        | Code::Unauthenticated => Failed,
    }
}
