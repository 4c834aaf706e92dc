//! Addresses of the real services, from the environment (`tests/run` starts them and sets it).

fn from_environment(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| {
        panic!("{name} is not set: run `tests/run end_to_end`, or set it to a server of your own")
    })
}

/// `host:port` of a Kafka broker.
pub fn kafka_brokers() -> String {
    from_environment("KAFKA_BROKERS")
}

/// `host:port` of a Redis.
pub fn redis_addr() -> String {
    from_environment("REDIS_ADDR")
}
