//! The shard: the event loop, the connection slab, send queues, the timer wheel; generic over a kernel.
