//! The tree keeps its shape: layers, deployment files, and documents that name what exists.

mod docs;
mod imports;
mod layers;
mod runner;
mod source;
