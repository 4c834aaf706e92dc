//! The contract, sentence by sentence: `docs/contract.md` says which test proves which.

mod events;
mod nodes;
mod presence;
mod resume;
mod seam;
mod settings;
mod storm;
mod stream;
mod tokens;
mod wire;
