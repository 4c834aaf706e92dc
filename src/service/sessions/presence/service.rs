//! Telling the presence service, by gRPC.

use std::sync::Arc;

use tonic::{Code, Status};

use super::queue::{Job, Outcome};
use super::{Backend, Jobs};
use crate::service::backends::neighbours::PresenceService;
use crate::service::backends::ports::BoxFuture;
use crate::service::members::directory::SessionIds;

/// See the module.
pub(super) struct Told {
    service: PresenceService,
    instance: Arc<str>,
}

impl Told {
    pub(super) fn new(service: PresenceService, instance: Arc<str>) -> Self {
        Self { service, instance }
    }
}

impl Backend for Told {
    fn perform(&self, jobs: Jobs) -> BoxFuture<Vec<Outcome>> {
        let service = self.service.clone();
        let instance = Arc::clone(&self.instance);
        Box::pin(async move {
            let mut outcomes = Vec::with_capacity(jobs.len());
            for (ids, job) in &jobs {
                let outcome = perform(&service, &instance, ids, *job).await;
                outcomes.push(outcome.unwrap_or_else(|status| failure(&status)));
            }
            outcomes
        })
    }

    /// One: each call is on its own, so that a slow one delays no other.
    fn batch(&self) -> usize {
        1
    }
}

async fn perform(
    service: &PresenceService,
    instance: &str,
    ids: &SessionIds,
    job: Job,
) -> Result<Outcome, Status> {
    let (user, device) = (ids.user(), ids.device());
    match job {
        Job::Register => service.register(user, device, instance).await?,
        Job::Refresh { check: false } => match service.refresh(user, device).await {
            Err(status) if status.code() == Code::NotFound => return Ok(Outcome::Vanished),
            refreshed => refreshed?,
        },
        Job::Refresh { check: true } => match holder(service, ids).await? {
            None => return Ok(Outcome::Vanished),
            Some(holder) if holder != instance => return Ok(Outcome::Elsewhere),
            Some(_) => service.refresh(user, device).await?,
        },
        Job::Unregister => match holder(service, ids).await? {
            None => return Ok(Outcome::Vanished),
            Some(holder) if holder != instance => return Ok(Outcome::Elsewhere),
            Some(_) => service.unregister(user, device).await?,
        },
    }
    Ok(Outcome::Done)
}

/// The instance that a session is registered with.
async fn holder(service: &PresenceService, ids: &SessionIds) -> Result<Option<String>, Status> {
    let devices = service.devices(ids.user()).await?;
    let registered = devices.into_iter().find(|device| device.device_id == ids.device());
    Ok(registered.map(|device| device.instance_id))
}

/// Whether trying again may help.
fn failure(status: &Status) -> Outcome {
    match status.code() {
        Code::InvalidArgument
        | Code::OutOfRange
        | Code::FailedPrecondition
        | Code::PermissionDenied
        | Code::Unimplemented => Outcome::Rejected,
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::NotFound
        | Code::AlreadyExists
        | Code::ResourceExhausted
        | Code::Aborted
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss
        | Code::Unauthenticated => Outcome::Failed,
    }
}
