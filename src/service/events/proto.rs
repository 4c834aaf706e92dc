//! The wire types of contract §1, generated from `proto/`: messages, gRPC clients and servers, and
//! proto3 JSON.
#![allow(missing_docs, unreachable_pub, clippy::all, reason = "generated code")]

pub mod shared {
    pub mod v1 {
        tonic::include_proto!("realchat.shared.v1");
        include!(concat!(env!("OUT_DIR"), "/realchat.shared.v1.serde.rs"));
    }
}
pub mod message {
    pub mod v1 {
        tonic::include_proto!("realchat.message.v1");
        include!(concat!(env!("OUT_DIR"), "/realchat.message.v1.serde.rs"));
    }
}
pub mod conversation {
    pub mod v1 {
        tonic::include_proto!("realchat.conversation.v1");
        include!(concat!(env!("OUT_DIR"), "/realchat.conversation.v1.serde.rs"));
    }
}
pub mod presence {
    pub mod v1 {
        tonic::include_proto!("realchat.presence.v1");
        include!(concat!(env!("OUT_DIR"), "/realchat.presence.v1.serde.rs"));
    }
}
pub mod delivery {
    pub mod v1 {
        tonic::include_proto!("realchat.delivery.v1");
        include!(concat!(env!("OUT_DIR"), "/realchat.delivery.v1.serde.rs"));
    }
}

/// The descriptors of all packages, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/realchat_descriptor.bin"));
