//! The load client: one thread, one epoll, 32 bytes per session.
//!
//! Words on the standard input, each answered by one JSON line:
//!
//! | word | does |
//! | --- | --- |
//! | `reset` | clears counts and sequences |
//! | `trace` | does the same, and records each message until the next reset |
//! | `arrivals` | prints the recorded messages |
//! | `report` | prints the counts since the last reset |
//! | `latency` | prints the histogram of latencies since then, to be merged with those of other clients |
//! | `echo WINDOW BYTES MS` | sends messages and waits for their echoes, `WINDOW` in flight |
//! | `churn COUNT` | closes this many sessions and connects them again |
//! | `drop` | closes all sockets without a close frame |
//! | `return ADDRESS RATE` | connects all sessions that are down to this server, this many per second |
//! | `storm COUNT` | connects and closes this many times in all |
//! | `stall`, `unstall` | stops and resumes reading |
//! | `quit` | exits |

mod dial;
mod echo;
pub(crate) mod net;
mod request;
mod rooms;
mod run;
mod session;
mod tally;
mod tls;

pub use request::ClientConfig;
pub use run::Client;
