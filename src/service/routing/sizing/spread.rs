//! How the members of a conversation spread over the nodes.
//!
//! Sessions are taken to be independent: each is on any of the N nodes with the same probability, as behind a
//! load balancer. Clients that prefer a node (a region, a sticky balancer) are on fewer nodes, so these
//! figures are upper bounds for them.

/// Sessions of the members of conversations.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MemberSessions {
    /// The share of the members who have a session.
    pub online: f64,
    /// Sessions of each member who has one.
    pub devices: f64,
}

/// Probability that a user who is online has a session on a given node.
fn on_a_node(nodes: f64, sessions: MemberSessions) -> f64 {
    1.0 - (1.0 - 1.0 / nodes).powf(sessions.devices)
}

/// Nodes other than the owner on which members of a conversation have a session, on average: hand-offs of one
/// record. With all members online on one device it is (N − 1) × (1 − (1 − 1/N)^m).
pub fn other_nodes(nodes: f64, members: f64, sessions: MemberSessions) -> f64 {
    let nobody = (1.0 - sessions.online * on_a_node(nodes, sessions)).powf(members);
    (nodes - 1.0) * (1.0 - nobody)
}

/// Users whom these hand-offs name, all together, on average.
pub fn named_users(nodes: f64, members: f64, sessions: MemberSessions) -> f64 {
    (nodes - 1.0) * members * sessions.online * on_a_node(nodes, sessions)
}

/// Other nodes that read the same partition of the hand-off topic as a node, on average. Each node takes its
/// epoch, a random number, modulo the number of partitions.
pub fn nodes_beside(nodes: f64, partitions: f64) -> f64 {
    (nodes - 1.0) / partitions
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use rand::rngs::StdRng;
    use rand::{RngExt as _, SeedableRng as _};

    use super::*;

    const ALL: MemberSessions = MemberSessions { online: 1.0, devices: 1.0 };

    #[test]
    fn few_members_are_on_few_nodes_and_many_on_all() {
        // Of two members one is elsewhere than the owner with probability 1 − (1/2)².
        assert!((other_nodes(2.0, 2.0, ALL) - 0.75).abs() < 1e-12);
        assert!((other_nodes(50.0, 100_000.0, ALL) - 49.0).abs() < 1e-9);
        assert_eq!(other_nodes(50.0, 10.0, MemberSessions { online: 0.0, ..ALL }), 0.0);
        assert_eq!(other_nodes(1.0, 10.0, ALL), 0.0);
        assert!((named_users(50.0, 1_000.0, ALL) - 980.0).abs() < 1e-9);
    }

    /// By throwing dice.
    #[test]
    fn averages_are_those_of_random_places() {
        let mut random = StdRng::seed_from_u64(1);
        for (nodes, members, online, devices) in
            [(3, 2, 1.0, 1), (7, 5, 1.0, 2), (50, 10, 0.4, 1), (50, 100, 0.4, 2)]
        {
            let (mut reached, mut named, mut beside) = (0.0, 0.0, 0.0);
            let rounds = 4_000;
            for _ in 0..rounds {
                let mut on = vec![BTreeSet::new(); nodes];
                for member in 0..members {
                    if random.random_bool(online) {
                        (0..devices).for_each(|_| {
                            on[random.random_range(0..nodes)].insert(member);
                        });
                    }
                }
                // The owner is the first.
                reached += on[1..].iter().filter(|users| !users.is_empty()).count() as f64;
                named += on[1..].iter().map(BTreeSet::len).sum::<usize>() as f64;
                let epochs: Vec<u64> = (0..nodes).map(|_| random.random()).collect();
                let same = |epoch: &&u64| **epoch % 32 == epochs[0] % 32;
                beside += epochs[1..].iter().filter(same).count() as f64;
            }
            let (n, m) = (nodes as f64, f64::from(members));
            let sessions = MemberSessions { online, devices: f64::from(devices) };
            let near = |sum: f64, expected: f64| {
                let found = sum / f64::from(rounds);
                assert!((found / expected - 1.0).abs() < 0.06, "{found}, computed {expected}");
            };
            near(reached, other_nodes(n, m, sessions));
            near(named, named_users(n, m, sessions));
            near(beside, nodes_beside(n, 32.0));
        }
    }
}
