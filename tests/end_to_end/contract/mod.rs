//! The contract, sentence by sentence: `docs/contract.md` names the test of each.

mod events;
mod first_message;
mod leaving;
mod members;
mod nodes;
mod presence;
mod registry;
mod resume;
mod seam;
mod settings;
mod storm;
mod stream;
mod tokens;
mod wire;
