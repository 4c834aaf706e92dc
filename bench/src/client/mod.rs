//! The load client: one thread, one epoll, some tens of bytes per session.
//!
//! Words on the standard input, each answered by one JSON line:
//!
//! | word | does |
//! | --- | --- |
//! | `reset` | forgets counts and sequences |
//! | `trace` | does the same, and notes each message from then on until the next reset |
//! | `arrivals` | prints what was noted |
//! | `report` | prints the counts since the last reset |
//! | `latency` | prints the whole histogram of latencies since then, to be added to those of other clients |
//! | `echo WINDOW BYTES MS` | sends messages, `WINDOW` of them under way at a time, and waits for each to come back |
//! | `churn COUNT` | closes so many sessions and connects them again |
//! | `storm COUNT` | connects and closes so many times in all |
//! | `stall`, `unstall` | stops and resumes reading |
//! | `quit` | ends |

mod dial;
mod echo;
mod net;
mod request;
mod run;
mod session;
mod tally;

pub use request::ClientConfig;
pub use run::Client;
