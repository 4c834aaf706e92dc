//! gRPC `DeliveryApi.Connect`: the server, and the hub that holds its sessions as a shard does.

pub mod grpc;
pub mod hub;
