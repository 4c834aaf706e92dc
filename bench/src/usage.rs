//! Processor time and memory: of a process, of a core's softirq thread, of the machine.

use std::fs;
use std::io;

use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_setaffinity};

/// Pins the calling thread, and the threads that it creates later, to one core.
///
/// # Errors
/// The core does not exist.
pub fn pin(core: usize) -> io::Result<()> {
    let mut set = CpuSet::new();
    set.set(core);
    Ok(sched_setaffinity(None, &set)?)
}

/// Processor time of all threads of a process, ns.
///
/// # Errors
/// The process does not exist, or the kernel has no scheduler statistics.
pub fn process_ns(pid: u32) -> io::Result<u64> {
    let mut total = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end in the meantime.
        total += run_ns(&thread?.path().join("schedstat")).unwrap_or(0);
    }
    Ok(total)
}

/// Processor time of the calling thread, ns.
pub fn thread_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Processor time of `ksoftirqd` of a core, ns: the part of loopback traffic that is not charged to a
/// process.
///
/// # Errors
/// The kernel threads are not visible in `/proc`.
pub fn softirq_ns(core: usize) -> io::Result<u64> {
    let wanted = format!("ksoftirqd/{core}");
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        let is_it = fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.trim() == wanted);
        if is_it {
            return run_ns(&path.join("schedstat"));
        }
    }
    Err(io::Error::other(format!("no thread {wanted}")))
}

fn run_ns(schedstat: &std::path::Path) -> io::Result<u64> {
    fs::read_to_string(schedstat)?
        .split_whitespace()
        .next()
        .and_then(|first| first.parse().ok())
        .ok_or_else(|| io::Error::other("schedstat of an unknown form"))
}

/// Resident memory of a process, bytes.
///
/// # Errors
/// The process does not exist.
pub fn resident_bytes(pid: u32) -> io::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    kib_of(&status, "VmRSS:").ok_or_else(|| io::Error::other("no VmRSS"))
}

/// Slab memory of the kernel, for the whole machine, bytes.
///
/// # Errors
/// `/proc` is not mounted.
pub fn slab_bytes() -> io::Result<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    kib_of(&meminfo, "Slab:").ok_or_else(|| io::Error::other("no Slab"))
}

/// Memory available without swapping, bytes.
///
/// # Errors
/// `/proc` is not mounted.
pub fn available_bytes() -> io::Result<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    kib_of(&meminfo, "MemAvailable:").ok_or_else(|| io::Error::other("no MemAvailable"))
}

/// Memory of the buffers of all TCP sockets of the machine, bytes.
///
/// # Errors
/// `/proc` is not mounted.
pub fn socket_buffer_bytes() -> io::Result<u64> {
    let sockets = fs::read_to_string("/proc/net/sockstat")?;
    let line = sockets.lines().find(|line| line.starts_with("TCP:"));
    line.and_then(|line| line.rsplit_once(" mem ")?.1.trim().parse::<u64>().ok())
        .map(|pages| pages * 4096)
        .ok_or_else(|| io::Error::other("sockstat of an unknown form"))
}

fn kib_of(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

/// The process id of a child as [`Pid`].
pub fn pid_of(id: u32) -> Option<Pid> {
    Pid::from_raw(i32::try_from(id).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_process_has_run_and_takes_memory() {
        let me = std::process::id();
        assert!(thread_ns() > 0);
        assert!(process_ns(me).is_ok());
        assert!(resident_bytes(me).unwrap() > 100_000);
        assert!(slab_bytes().unwrap() > 0);
        assert!(available_bytes().unwrap() > 0);
        assert!(socket_buffer_bytes().is_ok());
    }
}
