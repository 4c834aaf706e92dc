//! The tree keeps its shape: layers, deployment files, and documents that name what exists.

mod layers;
mod source;
