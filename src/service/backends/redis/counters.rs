//! Counters of a link.

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
