//! `delivery serve`: a node for production.

use std::net::{IpAddr, Ipv4Addr};

use super::config::Loaded;
use super::node::{self, Plan};

/// Runs until it is told to stop.
///
/// # Errors
/// Something could not be started; says what, and what to do.
pub fn run(loaded: Loaded) -> Result<(), String> {
    let ip = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    node::run(Plan { settings: loaded.settings, ip, try_page: None }, |_| {})
}
