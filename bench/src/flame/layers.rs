//! Which part of the whole a sample belongs to.

use std::collections::BTreeMap;

use super::Stacks;

/// A part of the whole, in the order of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Layer {
    /// The system's way out: socket, TCP, IP, the loopback device.
    Send,
    /// What loopback adds on the sender's core: the receiver's TCP and IP.
    Delivered,
    /// The system's way in, for what clients send.
    Receive,
    /// The ring itself: submissions, completions, watches.
    Ring,
    /// Sleeping and waking: futexes, eventfds, the scheduler.
    Wakes,
    /// The system, otherwise.
    Kernel,
    /// The shard: queues, timers, frames.
    Shard,
    /// Rings and bells between the threads.
    Handoff,
    /// Routing: records, members, directory, offsets.
    Router,
    /// Writing the frames.
    Encode,
    /// librdkafka and what reads from it.
    Kafka,
    /// The allocator.
    Allocation,
    /// What only the measurement does.
    Generator,
    /// Everything else.
    Other,
}

impl Layer {
    /// Its name in the table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Send => "kernel: send",
            Self::Delivered => "kernel: the receiver's half of loopback",
            Self::Receive => "kernel: receive",
            Self::Ring => "kernel: io_uring itself",
            Self::Wakes => "kernel: sleeping and waking",
            Self::Kernel => "kernel: other",
            Self::Shard => "shard (reactor, uring, protocol)",
            Self::Handoff => "hand-off",
            Self::Router => "router (envelope, members, directory, offsets)",
            Self::Encode => "encoding",
            Self::Kafka => "Kafka's client",
            Self::Allocation => "allocation",
            Self::Generator => "making the events",
            Self::Other => "other",
        }
    }
}

/// Samples of each layer.
pub fn layers(stacks: &Stacks) -> BTreeMap<Layer, u64> {
    let mut counts = BTreeMap::new();
    for (stack, count) in stacks {
        *counts.entry(layer_of(stack)).or_default() += count;
    }
    counts
}

/// By the system's functions: the first that occurs anywhere in the stack decides.
const KERNEL: [(&str, Layer); 24] = [
    ("tcp_v4_rcv", Layer::Delivered),
    ("__netif_receive_skb", Layer::Delivered),
    ("net_rx_action", Layer::Delivered),
    ("tcp_sendmsg", Layer::Send),
    ("io_send", Layer::Send),
    ("sys_sendto", Layer::Send),
    ("__tcp_transmit_skb", Layer::Send),
    ("tcp_recvmsg", Layer::Receive),
    ("io_recv", Layer::Receive),
    ("sys_recvfrom", Layer::Receive),
    ("sys_futex", Layer::Wakes),
    ("eventfd_write", Layer::Wakes),
    ("eventfd_read", Layer::Wakes),
    ("io_cqring_wait", Layer::Wakes),
    ("sys_epoll_wait", Layer::Wakes),
    ("sys_poll", Layer::Wakes),
    ("sys_ppoll", Layer::Wakes),
    ("nanosleep", Layer::Wakes),
    ("schedule", Layer::Wakes),
    ("sys_io_uring_enter", Layer::Ring),
    ("syscall_exit", Layer::Kernel),
    ("do_syscall_64", Layer::Kernel),
    ("asm_", Layer::Kernel),
    ("entry_SYSCALL", Layer::Kernel),
];

/// By our own functions and those of libraries: the innermost that is known decides.
const PROCESS: [(&str, Layer); 22] = [
    ("mi_", Layer::Allocation),
    ("malloc", Layer::Allocation),
    ("cfree", Layer::Allocation),
    ("rd_kafka", Layer::Kafka),
    ("rdkafka", Layer::Kafka),
    ("delivery::service::routing::kafka", Layer::Kafka),
    ("delivery_bench::generator", Layer::Generator),
    ("delivery_bench::payload", Layer::Generator),
    ("delivery_bench::ours::Source", Layer::Generator),
    ("<delivery_bench::ours", Layer::Generator),
    ("delivery::service::events::encode", Layer::Encode),
    ("delivery::protocol::frame::encode", Layer::Encode),
    ("delivery::protocol::deflate", Layer::Encode),
    ("zlib_rs", Layer::Encode),
    ("serde_json", Layer::Encode),
    ("delivery::handoff", Layer::Handoff),
    ("rtrb", Layer::Handoff),
    ("delivery::service", Layer::Router),
    ("delivery::reactor", Layer::Shard),
    ("delivery::uring", Layer::Shard),
    ("io_uring::", Layer::Shard),
    ("delivery::protocol", Layer::Shard),
];

fn layer_of(stack: &[String]) -> Layer {
    let any = |what: &str| stack.iter().any(|frame| frame.contains(what));
    if stack[0].starts_with("ksoftirqd") {
        return Layer::Delivered;
    }
    if let Some((_, layer)) = KERNEL.iter().find(|(what, _)| any(what)) {
        return *layer;
    }
    for frame in stack.iter().rev() {
        let name = frame.trim_start_matches('_');
        let found = PROCESS.iter().find(|(what, _)| match *what {
            "mi_" => name.starts_with("mi_"),
            what => frame.contains(what),
        });
        if let Some((_, layer)) = found {
            return *layer;
        }
    }
    if stack[0].starts_with("rdk") { Layer::Kafka } else { Layer::Other }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(frames: &[&str]) -> Layer {
        layer_of(&frames.iter().map(|frame| (*frame).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn innermost_of_ours_and_any_of_the_kernels() {
        let send =
            ["shard-0", "delivery::uring::ring::Ring::enter", "do_syscall_64", "tcp_sendmsg"];
        assert_eq!(of(&send), Layer::Send);
        assert_eq!(
            of(&[&send[..], &["tcp_v4_rcv", "sock_def_readable"]].concat()),
            Layer::Delivered
        );
        assert_eq!(
            of(&["router", "delivery::service::routing::router::Core", "_mi_page_malloc"]),
            Layer::Allocation
        );
        assert_eq!(
            of(&["router", "delivery::service::routing::router::Core", "memcpy"]),
            Layer::Router
        );
        assert_eq!(of(&["rdk:broker1", "poll_loop"]), Layer::Kafka);
        assert_eq!(of(&["main", "std::rt"]), Layer::Other);
        assert_eq!(of(&["ksoftirqd/0", "anything"]), Layer::Delivered);
    }
}
