//! Rules of the tree: layers and import cycles, names, plain English, documents that match the code, and
//! `tests/run`.

mod docs;
mod english;
mod imports;
mod layers;
mod names;
mod runner;
mod source;
