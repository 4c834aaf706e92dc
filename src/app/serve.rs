//! `delivery serve`: runs a node in production.

use super::config::{Loaded, Profile};
use super::node::{self, Plan, Prepared};
use crate::reactor::listener::any_address;

/// Runs until the node is stopped.
///
/// # Errors
/// A part could not be started. The text says which, and what to do.
pub fn run(loaded: Loaded) -> Result<(), String> {
    let prepared = Prepared::new(&loaded.settings, Profile::Serve)?;
    let ip = any_address();
    node::run(Plan { settings: loaded.settings, prepared, ip, try_page: None }, |_| {})
}
