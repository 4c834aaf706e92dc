//! The only folder with kernel unsafe: the ring, its operations, its completion tokens, its receive buffers.
