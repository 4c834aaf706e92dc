//! Processor time and memory: of a process, of a core's softirq thread, of the machine.

use std::fs;
use std::io;

use procfs::process::{Process, all_processes};
use procfs::{Current as _, Meminfo};
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Pins the calling thread, and the threads that it creates later, to one core.
///
/// # Errors
/// The core does not exist.
pub fn pin(core: usize) -> io::Result<()> {
    let mut set = CpuSet::new();
    set.set(core);
    Ok(sched_setaffinity(None, &set)?)
}

/// Calls `start` on one core, which the threads that it creates inherit. The calling thread then moves back.
///
/// # Errors
/// The core does not exist.
pub fn on_core<T>(core: usize, start: impl FnOnce() -> T) -> io::Result<T> {
    let own = sched_getaffinity(None)?;
    pin(core)?;
    let started = start();
    sched_setaffinity(None, &own)?;
    Ok(started)
}

/// Processor time of all threads of a process, ns.
///
/// # Errors
/// The process does not exist, or the kernel has no scheduler statistics.
pub fn process_ns(pid: u32) -> io::Result<u64> {
    let threads = process(pid)?.tasks().map_err(io::Error::other)?;
    // A thread may end in the meantime.
    let used = threads.flatten().filter_map(|thread| thread.schedstat().ok());
    Ok(used.map(|used| used.sum_exec_runtime).sum())
}

/// Processor time of the threads of a process whose names begin like this, ns.
///
/// # Errors
/// The process does not exist.
pub fn threads_ns(pid: u32, name: &str) -> io::Result<u64> {
    let threads = process(pid)?.tasks().map_err(io::Error::other)?;
    let named = threads.flatten().filter(|it| it.stat().is_ok_and(|it| it.comm.starts_with(name)));
    Ok(named.filter_map(|it| it.schedstat().ok()).map(|used| used.sum_exec_runtime).sum())
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
    let is_it = |process: &Process| process.stat().is_ok_and(|stat| stat.comm == wanted);
    let found = all_processes().map_err(io::Error::other)?.flatten().find(is_it);
    let thread = found.ok_or_else(|| io::Error::other(format!("no thread {wanted}")))?;
    Ok(thread.schedstat().map_err(io::Error::other)?.sum_exec_runtime)
}

fn process(pid: u32) -> io::Result<Process> {
    Process::new(pid.cast_signed()).map_err(io::Error::other)
}

/// Resident memory of a process, bytes.
///
/// # Errors
/// The process does not exist.
pub fn resident_bytes(pid: u32) -> io::Result<u64> {
    let status = process(pid)?.status().map_err(io::Error::other)?;
    status.vmrss.map(|kib| kib * 1024).ok_or_else(|| io::Error::other("no VmRSS"))
}

/// Slab memory of the kernel, for the whole machine, bytes.
///
/// # Errors
/// `/proc` is not mounted.
pub fn slab_bytes() -> io::Result<u64> {
    Ok(Meminfo::current().map_err(io::Error::other)?.slab)
}

/// Memory available without swapping, bytes.
///
/// # Errors
/// `/proc` is not mounted.
pub fn available_bytes() -> io::Result<u64> {
    let available = Meminfo::current().map_err(io::Error::other)?.mem_available;
    available.ok_or_else(|| io::Error::other("no MemAvailable"))
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
