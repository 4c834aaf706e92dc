//! What the hand-off through the log costs on this machine: the table of sessions, the topics of the cluster, and
//! the router with and without hand-off. `docs/sizing.md` has the figures.

mod large;
mod names;
mod routing;
mod table;
mod tail;
mod topics;

pub use large::LargePlan;
pub use routing::RoutePlan;
pub use table::TablePlan;
pub use tail::TailPlan;
pub use topics::{HandOffPlan, ReadyPlan};
