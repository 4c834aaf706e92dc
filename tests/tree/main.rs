//! Rules of the tree: layers and import cycles, documents that match the code, and
//! `tests/run`.

mod docs;
mod imports;
mod layers;
mod runner;
mod source;
