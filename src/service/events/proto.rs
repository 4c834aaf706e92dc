//! The wire types of contract §1, generated from `proto/`: messages, gRPC clients and servers, and
//! proto3 JSON.
#![allow(missing_docs, unreachable_pub, clippy::all, reason = "generated code")]

macro_rules! package {
    ($name:ident, $package:literal) => {
        pub mod $name {
            pub mod v1 {
                tonic::include_proto!($package);
                include!(concat!(env!("OUT_DIR"), "/", $package, ".serde.rs"));
            }
        }
    };
}

package!(shared, "realchat.shared.v1");
package!(message, "realchat.message.v1");
package!(conversation, "realchat.conversation.v1");
package!(presence, "realchat.presence.v1");
package!(delivery, "realchat.delivery.v1");

/// The descriptors of all packages, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/realchat_descriptor.bin"));
