//! How connections are closed.

use super::*;

#[test]
fn full_queue_completes_its_frame_and_closes_with_1011() {
    let mut rig = Rig::new(ShardConfig { queue_frames_max: 4, ..ShardConfig::default() });
    let (mut client, key) = rig.live(205);
    rig.shard.kernel_mut().client_reads(client.socket, usize::MAX);
    for sequence in 1..=30 {
        rig.delivers(key, sequence, DeliveryClass::Live);
    }
    rig.shard.kernel_mut().client_reads(client.socket, usize::MAX);
    rig.turns();
    for sequence in 1..=21_i64 {
        let Some(WireEvent::Frame(_, payload)) = rig.receives(&mut client) else { panic!() };
        assert_eq!(payload, sequence.to_be_bytes());
    }
    assert_eq!(closed_with(rig.receives(&mut client)), 1011);
    assert_eq!(rig.done().len(), 30, "dropped deliveries are done too");
}

#[test]
fn close_frame_of_the_client_is_answered_with_its_code() {
    let mut rig = Rig::new(ShardConfig::default());
    let (mut client, _) = rig.live(100_000);
    rig.sends(&client, &client_frame(true, CLOSE, &[0x0B, 0xB8], [7; 4]));
    assert_eq!(closed_with(rig.receives(&mut client)), 3000);
    assert!(rig.shard.kernel().server_ended(client.socket));
    rig.shard.kernel_mut().client_ends(client.socket);
    rig.turns();
    assert_eq!(rig.ended(), EndReason::ClosedByPeer);
}

#[test]
fn client_without_an_answer_to_the_close_frame_is_reset_only_if_it_has_not_taken_everything() {
    for (room, is_reset) in [(100_000, false), (250, true)] {
        let mut rig = Rig::new(ShardConfig { close_ms_max: 1_000, ..ShardConfig::default() });
        let (client, connection) = rig.live(room);
        for sequence in 1..=20 {
            rig.delivers(connection, sequence, DeliveryClass::Live);
        }
        let (close, why) =
            (Close::new(CloseCode::GOING_AWAY, "server closing"), EndReason::Draining);
        rig.command(ShardCommand::Close { connection, close, why });
        assert!(!rig.shard.kernel().server_ended(client.socket));
        rig.pass(2_000);
        assert!(rig.shard.kernel().server_ended(client.socket));
        assert_eq!(rig.shard.kernel().is_reset(client.socket), is_reset, "room for {room} bytes");
    }
}

#[test]
fn exceeded_rate_is_closed_with_1008_and_an_invalid_frame_with_1002() {
    let mut rig = Rig::new(ShardConfig { inbound_frames_per_s_max: 3, ..ShardConfig::default() });
    let (mut client, _) = rig.live(100_000);
    for _ in 0..3 {
        rig.sends(&client, &client_frame(true, 10, &[], [1; 4]));
    }
    assert_eq!(rig.receives(&mut client), None);
    rig.sends(&client, &client_frame(true, 10, &[], [1; 4]));
    assert_eq!(closed_with(rig.receives(&mut client)), 1008);
    let (mut client, _) = rig.live(100_000);
    rig.sends(&client, &[0x81, 0x01, b'x']);
    assert_eq!(closed_with(rig.receives(&mut client)), 1002);
}
