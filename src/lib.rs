//! Delivery holds the client connections of a RealChat back end: it reads events from Kafka and
//! pushes each one to every connected device of every member of its conversation.

pub mod app;
pub mod domain;
pub mod handoff;
pub mod protocol;
pub mod reactor;
pub mod service;
pub mod uring;

/// The fakes that the unit tests share with the tests of the whole name the crate from outside.
#[cfg(test)]
extern crate self as delivery;
