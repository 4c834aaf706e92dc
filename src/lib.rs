//! Delivery holds the client connections of a RealChat back end: it reads events from Kafka and
//! pushes each one to every connected device of every member of its conversation.

pub mod app;
pub mod domain;
pub mod handoff;
pub mod protocol;
pub mod reactor;
pub mod service;
pub mod uring;
