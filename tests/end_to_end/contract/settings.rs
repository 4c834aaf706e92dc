//! Contract §5 and §6: the settings of existing deployments, and the metrics and probes that they read.

use std::process::Command;

use delivery_testkit::admin::request;

use crate::support::back_end::BackEnd;
use crate::support::client::Client;
use crate::support::node::NodeBuilder;

/// Runs `delivery config` with these variables: whether they are valid, and its output.
fn config(variables: &[(&str, &str)]) -> (bool, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_delivery"))
        .arg("config")
        .env_clear()
        .envs(variables.iter().copied())
        .output()
        .expect("the binary starts");
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).expect("UTF-8"))
}

#[test]
fn every_variable_of_the_contract_is_taken() {
    let (valid, printed) = config(&[
        ("HTTP_PORT", ":18083"),
        ("HTTP_ADDR", ":18093"),
        ("KAFKA_BROKERS", "kafka-1:9092,kafka-2:9092"),
        ("KAFKA_TOPICS", "one.events,two.events"),
        ("REDIS_ADDR", "redis:6379"),
        ("INSTANCE_ID", "delivery-3"),
        ("MSG_SVC_ADDR", "message:50052"),
        ("CONV_SVC_ADDR", "conversation:50051"),
        ("PRESENCE_SVC_ADDR", "presence:50053"),
        ("JWT_SECRET", "a-secret-that-nobody-may-read-here"),
        ("SERVICE_NAME", "delivery-blue"),
        ("METRICS_ENABLED", "true"),
        ("TRACING_ENABLED", "false"),
    ]);
    assert!(valid, "{printed}");
    for value in [
        "18083",
        "18093",
        "kafka-1:9092",
        "kafka-2:9092",
        "one.events",
        "two.events",
        "redis:6379",
        "delivery-3",
        "message:50052",
        "conversation:50051",
        "presence:50053",
        "delivery-blue",
    ] {
        assert!(printed.contains(value), "{value} is not in effect:\n{printed}");
    }
    assert!(!printed.contains("nobody-may-read"), "the secret is shown");
}

#[test]
fn port_is_taken_with_and_without_a_colon() {
    for port in ["18083", ":18083", "127.0.0.1:18083", "[::1]:18083"] {
        let variables =
            [("HTTP_PORT", port), ("KAFKA_BROKERS", "kafka:9092"), ("AUTH_MODE", "trust")];
        let (valid, printed) = config(&variables);
        assert!(valid && printed.contains("18083"), "{port}: {printed}");
    }
}

#[test]
fn defaults_are_those_of_the_contract() {
    let (valid, printed) = config(&[("KAFKA_BROKERS", "kafka:9092"), ("AUTH_MODE", "trust")]);
    assert!(valid, "{printed}");
    for value in [
        "8083",
        "8093",
        "messaging.events.v1",
        "conversation.events.v1",
        "delivery-service-group",
        "54s",
        "1m",
        "128",
    ] {
        assert!(printed.contains(value), "{value} is not in effect:\n{printed}");
    }
}

#[test]
fn wrong_settings_are_refused_by_name() {
    let good = [("KAFKA_BROKERS", "kafka:9092"), ("AUTH_MODE", "trust")];
    for (name, value) in [
        ("HTTP_PORT", "many"),
        ("SHARDS", "0"),
        ("PING_INTERVAL", "54"),
        ("AUTH_MODE", "sometimes"),
        ("ROUTING_MODE", "both"),
        ("KAFKA_BROKERS", "nowhere"),
    ] {
        let (valid, printed) = config(&[good[0], good[1], (name, value)]);
        assert!(!valid, "{name}={value} is taken");
        assert!(printed.contains(name), "{name}={value}: {printed}");
    }
    let (valid, printed) = config(&[]);
    assert!(!valid);
    assert!(printed.contains("KAFKA_BROKERS") || printed.contains("kafka_brokers"), "{printed}");
}

#[test]
fn health_answers_ok_and_metrics_are_a_page() {
    let node = NodeBuilder::dev().start();
    for path in ["/health/live", "/health/ready"] {
        let answer = node.get(path).expect("answers");
        assert_eq!((answer.status, answer.body.trim()), (200, "OK"), "{path}");
    }
    let page = node.get("/metrics").expect("answers");
    assert_eq!(page.status, 200);
    assert!(page.head.to_ascii_lowercase().contains("content-type: text/plain"), "{}", page.head);
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn dashboards_find_the_names_they_use() {
    let mut back_end = BackEnd::start("names", 2);
    let node = back_end.node().set("SERVICE_NAME", "delivery-blue").start();
    let mut alice = Client::session(node.public, "alice", "phone");
    back_end.publisher.created("room", &["alice".into()]);
    crate::support::back_end::event(&mut alice);
    request(node.public, "GET", "/nowhere").expect("answers");
    let metrics = node.metrics();
    let service = r#"service="delivery-blue""#;
    assert_eq!(metrics.sum("websocket_connections_active", &[service]), 1.0);
    assert!(metrics.has("kafka_consumer_lag"));
    let topic = format!("topic=\"{}\"", back_end.topic);
    metrics.sum("kafka_consumer_lag", &[service, &topic, "partition=\"0\""]);
    assert!(metrics.sum("message_delivery_latency_seconds_count", &[service]) >= 1.0);
    assert!(
        metrics.sum("message_delivery_latency_seconds_bucket", &[service, "le=\"+Inf\""]) >= 1.0
    );
    let labels = [service, "method=\"GET\"", "path=\"/health/ready\"", "status=\"200\""];
    assert!(metrics.sum("http_requests_total", &labels) >= 1.0);
    assert!(metrics.sum("http_request_duration_seconds_count", &labels[..3]) >= 1.0);
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn readiness_says_what_is_missing() {
    let back_end = BackEnd::start("missing", 1);
    let port = delivery_testkit::ports::free_port();
    let node = back_end.node().set("KAFKA_BROKERS", format!("127.0.0.1:{port}")).spawn();
    let answer =
        crate::support::wait::until(std::time::Duration::from_secs(20), "it answers", || {
            node.get("/health/ready").filter(|answer| answer.status != 200)
        });
    assert_eq!(answer.status, 503);
    assert!(answer.body.to_lowercase().contains("kafka"), "{}", answer.body);
    assert_eq!(node.get("/health/live").map(|answer| answer.status), Some(200));
}
