//! `delivery serve`: runs a node in production.

use std::net::{IpAddr, Ipv4Addr};

use super::config::{Loaded, Profile};
use super::node::{self, Plan, Prepared};

/// Runs until the node is stopped.
///
/// # Errors
/// A part could not be started. The text says which, and what to do.
pub fn run(loaded: Loaded) -> Result<(), String> {
    let ip = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    let prepared = Prepared::new(&loaded.settings, Profile::Serve)?;
    node::run(Plan { settings: loaded.settings, prepared, ip, try_page: None }, |_| {})
}
