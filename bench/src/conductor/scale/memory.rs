//! Memory of the process, of the kernel's slab caches, and of the socket buffers.

use std::collections::BTreeMap;
use std::fs;
use std::io;

use crate::usage;

/// A run stops below this, bytes, before the kernel kills other programs.
const AVAILABLE_MIN: u64 = 3 << 29;
const PAGE: u64 = 4096;
/// Slab caches of a socket and of an entry of the client's epoll. (An `eventpoll_pwq` has the size of an
/// `anon_vma_chain`, so the kernel may put it into that cache.)
const SOCKETS: [&str; 13] = [
    "TCP",
    "sock_inode_cache",
    "filp",
    "dentry",
    "lsm_inode_cache",
    "lsm_file_cache",
    "eventpoll_epi",
    "eventpoll_pwq",
    "anon_vma_chain",
    "ep_head",
    "tcp_bind_bucket",
    "tcp_bind2_bucket",
    "tw_sock_TCP",
];

/// Memory at one moment.
#[derive(Clone, Debug, Default)]
pub(super) struct Reading {
    /// Resident memory of the process, bytes.
    pub(super) resident: u64,
    /// Slab memory of the machine, bytes.
    pub(super) slab: u64,
    /// Buffers of all TCP sockets, bytes.
    pub(super) socket_buffers: u64,
    /// Slab memory by cache, bytes; empty if only root can read it.
    caches: BTreeMap<String, u64>,
}

impl Reading {
    pub(super) fn take(process: u32) -> io::Result<Self> {
        let caches = fs::read_to_string("/proc/slabinfo").unwrap_or_default();
        Ok(Self {
            resident: usage::resident_bytes(process)?,
            slab: usage::slab_bytes()?,
            socket_buffers: usage::socket_buffer_bytes()?,
            caches: caches.lines().filter_map(cache).collect(),
        })
    }

    /// Growth of the caches since `before`, bytes per session; largest first.
    pub(super) fn growth(&self, before: &Self, sessions: f64) -> Vec<(&str, f64)> {
        let mut grown: Vec<_> = self
            .caches
            .iter()
            .map(|(name, bytes)| {
                let was = before.caches.get(name).copied().unwrap_or(0);
                (name.as_str(), (*bytes as f64 - was as f64) / sessions)
            })
            .filter(|(_, bytes)| bytes.abs() >= 1.0)
            .collect();
        grown.sort_by(|a, b| b.1.total_cmp(&a.1));
        grown
    }
}

/// Growth of the caches that belong to neither a socket nor the client, bytes.
pub(super) fn beyond_the_sockets(growth: &[(&str, f64)]) -> f64 {
    growth.iter().filter(|(name, _)| !SOCKETS.contains(name)).map(|(_, bytes)| bytes).sum()
}

/// Name and bytes of a line of `/proc/slabinfo`.
fn cache(line: &str) -> Option<(String, u64)> {
    let mut fields = line.split_whitespace();
    let name = fields.next()?.to_owned();
    let pages_per_slab: u64 = fields.nth(4)?.parse().ok()?;
    let slabs: u64 = line.split("slabdata").nth(1)?.split_whitespace().nth(1)?.parse().ok()?;
    Some((name, slabs * pages_per_slab * PAGE))
}

/// Fails if the machine is about to run out of memory.
pub(super) fn watch() -> io::Result<()> {
    let available = usage::available_bytes()?;
    if available < AVAILABLE_MIN {
        let left = available >> 20;
        return Err(io::Error::other(format!("stopped: only {left} MiB of memory available")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cache_lines_are_parsed() {
        let line = "TCP   78  130  2368   13    8 : tunables    0    0    0 : slabdata     10     10      0";
        assert_eq!(cache(line), Some(("TCP".to_owned(), 10 * 8 * 4096)));
        assert_eq!(cache("slabinfo - version: 2.1"), None);
        assert_eq!(cache("# name <active_objs>"), None);
    }

    #[test]
    fn growth_beyond_the_sockets_is_summed() {
        assert_eq!(beyond_the_sockets(&[("TCP", 2368.0), ("io_kiocb", 256.0), ("a", 4.0)]), 260.0);
    }
}
