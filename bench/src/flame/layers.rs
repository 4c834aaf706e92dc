//! Which part of the whole a sample belongs to.

use std::collections::BTreeMap;

use super::Stacks;

/// The kernel's way out: socket, TCP, IP, the loopback device.
const SEND: &str = "kernel: send";
/// What loopback adds on the sender's core: the receiver's TCP and IP.
const DELIVERED: &str = "kernel: the receiver's half of loopback";
/// The kernel's way in, for what clients send.
const RECEIVE: &str = "kernel: receive";
/// Submissions, completions, watches.
const RING: &str = "kernel: io_uring itself";
/// Futexes, eventfds, the scheduler.
const WAKES: &str = "kernel: sleeping and waking";
const KERNEL_OTHER: &str = "kernel: other";
const SHARD: &str = "shard (reactor, uring, protocol)";
const HANDOFF: &str = "hand-off";
const ROUTER: &str = "router (envelope, members, directory, offsets)";
const ENCODE: &str = "encoding";
const KAFKA: &str = "Kafka's client";
const ALLOCATION: &str = "allocation";
/// Work that only the measurement does.
const GENERATOR: &str = "generating the events";
const OTHER: &str = "other";

/// Samples of each layer, most first.
pub fn layers(stacks: &Stacks) -> Vec<(&'static str, u64)> {
    let mut counts = BTreeMap::new();
    for (stack, count) in stacks {
        *counts.entry(layer_of(stack)).or_default() += count;
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    counts
}

/// By the system's functions: the first that occurs anywhere in the stack decides.
const KERNEL: [(&str, &str); 24] = [
    ("tcp_v4_rcv", DELIVERED),
    ("__netif_receive_skb", DELIVERED),
    ("net_rx_action", DELIVERED),
    ("tcp_sendmsg", SEND),
    ("io_send", SEND),
    ("sys_sendto", SEND),
    ("__tcp_transmit_skb", SEND),
    ("tcp_recvmsg", RECEIVE),
    ("io_recv", RECEIVE),
    ("sys_recvfrom", RECEIVE),
    ("sys_futex", WAKES),
    ("eventfd_write", WAKES),
    ("eventfd_read", WAKES),
    ("io_cqring_wait", WAKES),
    ("sys_epoll_wait", WAKES),
    ("sys_poll", WAKES),
    ("sys_ppoll", WAKES),
    ("nanosleep", WAKES),
    ("schedule", WAKES),
    ("sys_io_uring_enter", RING),
    ("syscall_exit", KERNEL_OTHER),
    ("do_syscall_64", KERNEL_OTHER),
    ("asm_", KERNEL_OTHER),
    ("entry_SYSCALL", KERNEL_OTHER),
];

/// By our own functions and those of libraries: the innermost that is known decides.
const PROCESS: [(&str, &str); 22] = [
    ("mi_", ALLOCATION),
    ("malloc", ALLOCATION),
    ("cfree", ALLOCATION),
    ("rd_kafka", KAFKA),
    ("rdkafka", KAFKA),
    ("delivery::service::routing::kafka", KAFKA),
    ("delivery_bench::generator", GENERATOR),
    ("delivery_bench::payload", GENERATOR),
    ("delivery_bench::ours::Source", GENERATOR),
    ("<delivery_bench::ours", GENERATOR),
    ("delivery::service::events::encode", ENCODE),
    ("delivery::protocol::frame::encode", ENCODE),
    ("delivery::protocol::deflate", ENCODE),
    ("zlib_rs", ENCODE),
    ("serde_json", ENCODE),
    ("delivery::handoff", HANDOFF),
    ("rtrb", HANDOFF),
    ("delivery::service", ROUTER),
    ("delivery::reactor", SHARD),
    ("delivery::uring", SHARD),
    ("io_uring::", SHARD),
    ("delivery::protocol", SHARD),
];

fn layer_of(stack: &[String]) -> &'static str {
    let any = |what: &str| stack.iter().any(|frame| frame.contains(what));
    if stack[0].starts_with("ksoftirqd") {
        return DELIVERED;
    }
    if let Some((_, layer)) = KERNEL.iter().find(|(what, _)| any(what)) {
        return layer;
    }
    for frame in stack.iter().rev() {
        let name = frame.trim_start_matches('_');
        let found = PROCESS.iter().find(|(what, _)| match *what {
            "mi_" => name.starts_with("mi_"),
            what => frame.contains(what),
        });
        if let Some((_, layer)) = found {
            return layer;
        }
    }
    if stack[0].starts_with("rdk") { KAFKA } else { OTHER }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(frames: &[&str]) -> &'static str {
        layer_of(&frames.iter().map(|frame| (*frame).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn innermost_of_ours_and_any_of_the_kernels() {
        let send =
            ["shard-0", "delivery::uring::ring::Ring::enter", "do_syscall_64", "tcp_sendmsg"];
        assert_eq!(of(&send), SEND);
        assert_eq!(of(&[&send[..], &["tcp_v4_rcv", "sock_def_readable"]].concat()), DELIVERED);
        assert_eq!(
            of(&["router", "delivery::service::routing::router::Core", "_mi_page_malloc"]),
            ALLOCATION
        );
        assert_eq!(of(&["router", "delivery::service::routing::router::Core", "memcpy"]), ROUTER);
        assert_eq!(of(&["rdk:broker1", "poll_loop"]), KAFKA);
        assert_eq!(of(&["main", "std::rt"]), OTHER);
        assert_eq!(of(&["ksoftirqd/0", "anything"]), DELIVERED);
    }
}
