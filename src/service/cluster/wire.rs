//! The wire format of the two topics (`proto/delivery/cluster/v1/cluster.proto`).
#![allow(missing_docs, unreachable_pub, clippy::all, reason = "generated code")]

tonic::include_proto!("delivery.cluster.v1");
