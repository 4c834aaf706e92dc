//! Compiles `proto/` with protox (no `protoc` needed): messages, gRPC stubs, proto3 JSON.

use std::error::Error;
use std::path::PathBuf;
use std::{env, fs};

use prost::Message as _;

const PROTOS: [&str; 6] = [
    "realchat/shared/v1/events.proto",
    "realchat/message/v1/message_api.proto",
    "realchat/conversation/v1/conversation_api.proto",
    "realchat/presence/v1/presence_api.proto",
    "realchat/delivery/v1/delivery_api.proto",
    "delivery/cluster/v1/cluster.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let out = PathBuf::from(env::var("OUT_DIR")?);

    let descriptors = protox::compile(PROTOS, ["proto"])?;
    let encoded = descriptors.encode_to_vec();
    fs::write(out.join("realchat_descriptor.bin"), &encoded)?;

    tonic_prost_build::configure()
        .bytes(".realchat.shared.v1.EventEnvelope.payload")
        .extern_path(".google.protobuf.Timestamp", "crate::service::events::timestamp::Timestamp")
        // The method `DeliveryApi.Connect` would collide with the generated `connect(endpoint)`.
        // Clients are created from a channel instead.
        .build_transport(false)
        .compile_fds(descriptors)?;

    pbjson_build::Builder::new().register_descriptors(&encoded)?.build(&[".realchat"])?;
    Ok(())
}
