//! Compiles `proto/`: messages, gRPC clients and servers.

use std::error::Error;

const PROTOS: [&str; 5] = [
    "realchat/shared/v1/events.proto",
    "realchat/message/v1/message_api.proto",
    "realchat/conversation/v1/conversation_api.proto",
    "realchat/presence/v1/presence_api.proto",
    "realchat/delivery/v1/delivery_api.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=../../proto");
    tonic_prost_build::configure()
        .bytes(".realchat.shared.v1.EventEnvelope.payload")
        // `DeliveryApi.Connect` would collide with the generated `connect(endpoint)`: clients are
        // made from a channel instead.
        .build_transport(false)
        .include_file("proto.rs")
        .compile_fds(protox::compile(PROTOS, ["../../proto"])?)?;
    Ok(())
}
