//! What the nodes of a cluster tell each other through Kafka, without Kafka: who is where, what is handed
//! over, what was routed lately. (`ROUTING_MODE=group` with `HANDOFF=log`. In `broadcast` mode none of this
//! exists.)
//!
//! In `group` mode the nodes share the partitions. The **owner** of a partition decides who receives each record.
//! The **holder** of a session delivers to it. Every node has both roles. Two topics connect them:
//!
//! ```text
//!               beginnings, ends, leases                    every node reads all of it
//!   holder ───────────────────────────► delivery.sessions ──────────────────────────► table of every node
//!                                                                                           │
//!               live, replay, gap, passed                   each node reads one partition   ▼ who is where
//!   holder ◄─────────────────────────── delivery.handoff ◄────────────────────────────── owner
//! ```
//!
//! Everything here is a state machine: records and times are arguments. `routing::router` drives it (`owner`,
//! `holding`, `replay`), `routing::kafka` has the clients of the topics, and `routing::simulation` tests all of
//! them together from a seed.
//!
//! # Names
//!
//! | name | meaning |
//! | --- | --- |
//! | epoch | a random 64-bit number that identifies one run of one node ([`ports::NodeEpoch`]); never used again |
//! | *P*, *o* | a source partition, and an offset in it |
//! | *b* | the offset in the sessions topic at which the beginning of a session is stored |
//! | *T* | the offset in the sessions topic below which a lane has applied all beginnings (`table` in the code) |
//! | *V* | the position of *P* from which a session wants its records |
//! | generation | grows with each owner of a source partition |
//! | tail | the last records of a partition that its owner routed, in memory ([`tail`]) |
//!
//! The sessions topic has one partition on purpose. Every node reads all of it anyway, and a total order of
//! beginnings makes *T* and *b* plain numbers. One partition carries about 10,000 beginnings a second of 86
//! bytes (`docs/sizing.md`).
//!
//! # The topics
//!
//! | record of the sessions topic | key | value |
//! | --- | --- | --- |
//! | lease | epoch | instance, hand-off partition, version, host, `replaces`, `as_of`, `since`, and the next offset to route of each owned *P* |
//! | beginning | epoch, user, device | serial of the session in its epoch, and `as_of`: the offset below which the holder had read this topic when it admitted the session |
//! | end | as its beginning | none (a tombstone) |
//!
//! The epoch in the key means that a node overwrites and removes only its own records: a late end of an older
//! session cannot remove a newer one on another node. The wire format is
//! `proto/delivery/cluster/v1/cluster.proto`.
//!
//! A hand-off has the key and value of the source record, the epoch that it is for, and a header with *P*, *o*,
//! generation, *T* and one of
//!
//! * **live**: the users that it is for;
//! * **replay**: the serial of one session;
//! * **gap**: the serial of a session for which records are no longer available: it is closed with 4409;
//! * **missed range**: the same for all sessions that began in a range of the sessions topic;
//! * **missed**: the users of a record that is too large to be handed over: the same for their sessions;
//! * **lost**: a range of *P* that is gone, and was not read: the same for all sessions that may lack a record of it;
//! * **passed**: no record; the next offset of each partition of the owner.
//!
//! One idempotent producer per node, without a time limit, keeps the order. The offset of a record is done when all
//! its hand-offs are stored and its local sends are done.
//!
//! # The rules, and where they are
//!
//! | rule | module |
//! | --- | --- |
//! | which epochs live, and which of two nodes has an instance | [`nodes`] |
//! | who is where, and what an owner sees of it | [`table`] |
//! | which sessions need a replay, and from where | [`newcomers`] |
//! | the replay, the barrier, the order of an owner's hand-offs | `routing::router::owner`, `turn`, `replay` |
//! | which session needs a record that arrives | [`holder`] |
//! | the generation of an owner | `routing::kafka::claims` |
//! | the beginning and the end of a session, as its node writes them | [`announcer`] |
//! | the lease of this node | [`lease`], [`own_epoch`] |
//! | sessions that have missed events | [`missed`] |
//!
//! # Why nothing is missed, and nothing arrives twice
//!
//! **Within one generation.** *V* was stated before the 101, so every record that is appended after the 101 is at
//! *V* or later. The owner applies the beginning at some next offset *n*. From *n* on it names the session in every
//! record; before the first of them it replays what lies between *V* and *n*. One producer and one partition keep that
//! order. So the session gets [*V*, ∞) once, in order. What is below its 101 it may get as well: it was live
//! somewhere else, or catches up, and a message is known by its sequence.
//!
//! **The owner dies, or loses the partition, before its replay is stored.** Its commits carry the *T* whose replays are
//! stored. The successor starts with that *T* and replays again. The holder drops what the session has: it remembers
//! the last offset delivered to each young session.
//!
//! **… after its replay is stored.** The successor resends [*c*, …) from the committed offset *c* as live records that
//! name the session. Some of them may have been handed over before the session was known, so the highest offset that
//! passed at the holder is above them. But the session is still young there (`established` moves only with records
//! above the highest), so it gets them.
//!
//! **The successor's table is behind that of its predecessor.** It routes nothing before it has read the sessions topic
//! up to the committed *T*. If the predecessor had applied more than it committed, the successor knows fewer sessions,
//! and would route records without them. It replays those when it applies their beginnings; the holder makes these
//! sessions young again when it sees the lower *T*, so they take the replay and drop what they have.
//!
//! **A zombie**, an owner that continues after its partition was given to another one. Before its successor has sent
//! anything to this holder, what it has sent is a complete prefix, and the successor's repetition is not above the
//! highest offset. Afterwards its generation is too low, and the holder discards it. It cannot take a generation after
//! its successor: the group coordinator refuses the commit of a member that has lost the partition. Its lanes obey the
//! same state for its own sessions.
//!
//! **A record is parked**, because its owner does not know its members, and later records of other conversations pass
//! it. It holds back the committed offset, so a successor routes it again, and everything behind it. Holders drop what
//! passed before, but for what was parked (rules 2, 4 and 5 of [`holder`]). A replay leaves out what is parked: the
//! session is known when the record is routed, and gets it live. Nothing parked is routed while a replay is paused,
//! which would miss it.
//!
//! **A partition moves to the holder itself.** The node first delivers everything that was stored in its hand-off
//! partition before its claim (the barrier). Acknowledged hand-offs of the former owner are below it, and hand-offs
//! that were not acknowledged belong to records that were not committed, which the node routes itself.
//!
//! **Sessions of the owner's own node** that began before the lane did wait for the replay: the lane delivers live
//! records to them only from the *T* on at which it has replayed what came before (`Holder::needs_of_lane`). Otherwise
//! a later record would arrive first, and the replayed ones would be taken for repetitions. Sessions that are admitted
//! after the start of the lane get everything directly.
//!
//! **The end of a session** is not confused with the beginning of its successor on the same node, because replays name
//! serials, and a serial is used once.
//!
//! **Records are gone that their owner has not read**: expired, or lost by the log. The owner closes the sessions of
//! its own node. To every other node it sends **lost** before anything else of its generation, and it routes and
//! commits nothing before that is stored. So a successor finds the loss again in the committed offset. A record that
//! was parked holds back that offset, so it is lost with its owner although later ones were handed over, and the
//! holders know that they lack it. A node that was the owner, and was stopped, is told like the others.
//!
//! **What cannot be repaired closes the session.** The tail does not reach back to *V*, the statement of *V* is
//! forgotten, the beginning itself is forgotten, hand-offs were deleted before they were read, a record is too large:
//! the session leaves the directory and the holder's state before anything else is delivered ([`missed`]), and is
//! closed with 4409. A client resumes from the highest sequence that it saw, so a later event would hide the gap.
//!
//! # Considered, and not chosen
//!
//! * gRPC streams between nodes: they need discovery, ports, certificates, windows, acknowledgements and repair, which
//!   Kafka has already.
//! * Positions from `ListOffsets` instead of leases: requests to every leader each second.
//! * Several partitions for sessions: every comparison of *T* becomes one of vectors.
//! * A claim record in the sessions topic as the generation: a zombie may write it late; the coordinator fences
//!   commits.

pub mod announcer;
#[cfg(test)]
mod announcing;
pub mod holder;
pub mod lease;
#[cfg(test)]
mod losses;
pub mod missed;
#[cfg(test)]
mod model;
pub mod newcomers;
pub mod nodes;
pub mod own_epoch;
mod parked_offsets;
pub mod ports;
pub mod table;
pub mod tail;
pub mod wire;
