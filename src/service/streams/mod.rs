//! gRPC `DeliveryApi.Connect`: the server, and the hub that holds its sessions like a shard.

pub mod grpc;
pub mod hub;
