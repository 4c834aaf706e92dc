//! Nouns: ids, events, what crosses the hand-off, limits, counters. Imports nothing of ours.

pub mod budget;
pub mod capacity;
pub mod caught_up;
pub mod close;
pub mod command;
pub mod counted;
pub mod counters;
pub mod cursor;
pub mod cursor_schedule;
pub mod encoding;
pub mod event;
pub mod ids;
pub mod limiter;
pub mod limits;
pub mod members;
pub mod outgoing;
pub mod wait_allowance;
