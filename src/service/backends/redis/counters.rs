//! Counters of the link, the hand-offs, the subscriptions and the nodes without hand-off through the log.

use crate::counters;

counters! {
    /// Connections and commands of a link.
    pub struct RedisLinkCounters of SharedCounter {
        Gauge redis_up: "1 while Redis serves: the last probe, a write, succeeded and no command was refused since",
        Counter redis_connections: "Connections to Redis established",
        Counter redis_connection_failures: "Attempts to connect to Redis that failed",
        Counter redis_connection_losses: "Established connections to Redis that were lost",
        Counter redis_commands: "Commands sent to Redis",
        Counter redis_commands_failed: "Commands to Redis without an answer: connection lost or timed out",
        Counter redis_commands_refused: "Commands not sent because Redis was unreachable",
        Counter redis_refused_replica: "Probes, commands and connections that a read-only replica refused (READONLY, MASTERDOWN)",
        Counter redis_refused_no_replicas: "Refused because the primary has too few replicas (NOREPLICAS)",
        Counter redis_refused_memory: "Refused because maxmemory is reached and nothing may be evicted (OOM)",
        Counter redis_refused_disk: "Refused because Redis cannot write to its disk (MISCONF)",
        Counter redis_refused_loading: "Refused because Redis is loading its data (LOADING)",
        Counter redis_refused_cluster_down: "Refused because the cluster is down or a slot has no owner (CLUSTERDOWN)",
        Counter redis_refused_moved: "Refused because a key is on another node of a cluster (MOVED, ASK, TRYAGAIN)",
        Counter redis_refused_credentials: "Refused because of user or password (NOAUTH, WRONGPASS, DENIED)",
        Counter redis_refused_permission: "Refused by the access rules of the user (NOPERM)",
        Counter redis_refused_busy: "Refused because a script runs for too long (BUSY)",
        Counter redis_refused_clients: "Connections refused because Redis has too many clients (maxclients)",
        Counter redis_refused_other: "Refused with another error that is not the fault of a single command",
    }
}

counters! {
    /// Connections and messages of the subscriptions.
    pub struct SubscriptionCounters of SharedCounter {
        Gauge redis_subscribed: "1 while subscribed",
        Counter redis_subscriptions: "Connections subscribed",
        Counter redis_subscription_gaps: "Periods without a subscription after the first subscription",
        Counter redis_subscription_gap_ms: "Time without a subscription, ms, from the last sign of life; what is published then is lost, and all sessions are closed with 4409",
        Counter redis_hand_offs: "Records handed over by other nodes",
        Counter redis_hand_offs_dropped: "Handed-over records dropped because the queue to the router was full",
        Counter redis_hand_off_gaps: "Times that this happened, until the queue was empty again; all sessions are then closed with 4409",
        Gauge redis_hand_offs_waiting: "Handed-over records waiting for the router",
        Counter redis_gaps_heard: "Messages of other nodes that users may have missed an event; their sessions are closed with 4409",
        Counter redis_gap_users_heard: "Users named in these messages",
        Counter redis_gaps_heard_everybody: "Those of these messages that concern all users",
        Counter redis_presence_updates: "Presence changes received",
        Counter redis_moves_heard: "Users announced as registered, by all nodes including this one",
    }
}

counters! {
    /// Outcomes of hand-offs.
    pub struct NodesCounters of SharedCounter {
        Counter redis_forwards_local: "Records without a recipient on another node",
        Counter redis_forwards: "Records accepted for hand-off",
        Counter redis_forwards_refused_down: "Records not accepted because Redis was unreachable",
        Counter redis_forwards_refused_full: "Records not accepted because the queue was full",
        Counter redis_forwards_failed: "Records not handed over to all nodes because Redis failed or timed out",
        Gauge redis_forwards_waiting: "Records waiting for their hand-off",
        Gauge redis_forwards_bytes: "Bytes of these records",
        Counter redis_lookups: "Users looked up in the registry",
        Counter redis_lookups_failed: "Users whose lookup failed",
        Counter redis_publishes: "Records published to another instance",
        Counter redis_publishes_failed: "Publishes without an answer",
        Counter redis_publishes_unheard: "Publishes without a listener: their instance is down, or closes its sessions with 4409 when it listens again",
        Counter redis_publishes_again: "Publishes repeated to the location of a second lookup",
        Counter redis_gaps_told: "Messages that told the other nodes which users may have missed an event, so that their sessions are closed with 4409",
        Gauge redis_gap_users_untold: "Users about whom the other nodes are not told yet",
        Gauge redis_gap_everybody_untold: "1 while the other nodes are not told yet that all their users may have missed an event",
        Counter redis_moves_announced: "Users whose registration on this node was announced to the other nodes",
        Counter redis_moves_unannounced: "Users whose announcement failed because Redis failed or was unreachable",
    }
}

counters! {
    /// Nodes that take no hand-offs through the log.
    pub struct LegacyCounters of SharedCounter {
        Gauge legacy_nodes: "Instances that are subscribed to their channel in Redis and have no lease: nodes without hand-off through the log",
        Gauge legacy_exchange: "1 while events are exchanged with such nodes through Redis",
        Counter legacy_exchange_changes: "Times that this began or ended",
        Counter legacy_checks_failed: "Times that Redis did not say which instances are subscribed",
        Counter legacy_lease_overdue: "Records that arrived through Redis while the lease of this node was overdue; all sessions are then closed with 4409",
    }
}
