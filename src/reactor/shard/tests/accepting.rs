//! Connections before the upgrade: limits, refusals, deadlines.

use super::*;

#[test]
fn unfinished_request_is_answered_408() {
    let mut rig = Rig::new(ShardConfig { handshake_ms_max: 1_000, ..ShardConfig::default() });
    let mut client = rig.connect(100_000);
    rig.sends(&client, b"GET /ws?user_id=u&dev");
    rig.pass(900);
    assert_eq!(rig.receives(&mut client), None);
    rig.pass(200);
    assert_eq!(rig.receives(&mut client), Some(WireEvent::Answer(408)));
    assert!(rig.shard.kernel().server_ended(client.socket));
    rig.pass(2_000);
    assert!(rig.shard.kernel().is_closed(client.socket));
}

#[test]
fn full_shard_answers_503_and_serves_the_next_when_a_slot_is_free() {
    let mut rig = Rig::new(ShardConfig { connections_max: 1, ..ShardConfig::default() });
    let (first, key) = rig.live(100_000);
    let mut second = rig.connect(100_000);
    assert_eq!(rig.receives(&mut second), Some(WireEvent::Answer(503)));
    rig.shard.kernel_mut().client_resets(first.socket);
    rig.turns();
    let (_, next) = rig.live(100_000);
    assert_ne!(next, key);
}

#[test]
fn full_shard_leaves_clients_to_the_others_while_these_have_room() {
    let mut rig = Rig::new(ShardConfig { connections_max: 1, ..ShardConfig::default() });
    rig.capacity.give_back();
    let (first, _) = rig.live(100_000);
    let mut second = rig.connect(100_000);
    rig.pass(1_000);
    assert_eq!(rig.receives(&mut second), None);
    assert_eq!(rig.shard.kernel().backlog_len(), 1, "another shard accepts it");
    assert!(rig.capacity.take());
    rig.turns();
    assert_eq!(rig.receives(&mut second), Some(WireEvent::Answer(503)));
    rig.shard.kernel_mut().client_resets(first.socket);
    rig.turns();
    rig.live(100_000);
}

#[test]
fn refused_clients_that_stay_do_not_keep_others_from_an_answer() {
    let config = ShardConfig {
        connections_max: 1,
        refusals_max: 3,
        accepts_max: 2,
        ..ShardConfig::default()
    };
    let mut rig = Rig::new(config);
    rig.live(100_000);
    for _ in 0..20 {
        let mut refused = rig.connect(100_000);
        assert_eq!(rig.receives(&mut refused), Some(WireEvent::Answer(503)));
    }
    assert_eq!(rig.counters.counts.refusals_cut.get(), 19);
}

#[test]
fn refused_request_is_answered_and_its_end_reported() {
    let mut rig = Rig::new(ShardConfig::default());
    let (mut client, connection) = rig.request_session(100_000);
    let refusal = Refusal { status: 401, body: "no".into(), retry_after_s: None };
    rig.command(ShardCommand::Refuse { connection, refusal });
    assert_eq!(rig.receives(&mut client), Some(WireEvent::Answer(401)));
    rig.shard.kernel_mut().client_ends(client.socket);
    rig.turns();
    assert_eq!(rig.ended(), EndReason::Refused);
}
