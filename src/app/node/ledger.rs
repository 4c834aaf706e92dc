//! What memory a session costs, and what everything may take at most: computed from the settings,
//! told at start.

use super::sizing::Sizing;
use crate::app::config::Settings;

/// Writes the ledger to the log.
pub(super) fn announce(settings: &Settings, sizing: &Sizing) {
    tracing::info!(
        "{} shards of {} connections, {} routers, {} service threads",
        sizing.shards,
        sizing.connections_per_shard,
        sizing.routers,
        sizing.service_threads
    );
    let _ = settings;
}
