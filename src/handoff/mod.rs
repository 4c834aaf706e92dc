//! The bounded rings between the service side and the shards, and the bell that wakes a sleeper.

mod doorbell;
mod ring;

pub use doorbell::Doorbell;
pub use ring::{Consumer, Producer, Pushed, ring};
