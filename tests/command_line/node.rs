//! A `dev` node: its demo, published events, stopping and draining.

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use delivery_testkit::ports::free_port;
use rustix::process::Signal;

use crate::support::client::{Client, Received};
use crate::support::fleet::{Connect, dial};
use crate::support::node::{Node, NodeBuilder, binary};
use crate::support::wait::{SOON, until};
use crate::tail::Tail;

fn publish(node: &Node, arguments: &[&str]) {
    let brokers = until(SOON, "the start-up message contains the brokers", || {
        let log = node.log();
        let (brokers, _) = log.split_once("--brokers ")?.1.split_once(' ')?;
        Some(brokers.to_owned())
    });
    let brokers = brokers.as_str();
    let output = Command::new(binary())
        .args(["publish", "--brokers", brokers])
        .args(arguments)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// As after the kill of a node, whose sockets the kernel frees behind its back.
#[test]
fn node_waits_for_a_port_that_is_in_use_for_a_moment() {
    let port = free_port();
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
    let mut node = NodeBuilder::dev().set("HTTP_PORT", port).spawn();
    until(SOON, "it tries", || node.log().contains("is in use; trying again").then_some(()));
    drop(taken);
    let started = until(SOON, "it has started or given up", || {
        let ready = node.get("/health/ready").is_some_and(|answer| answer.status == 200);
        (ready || node.ended().is_some()).then_some(ready)
    });
    // On a machine that is busy for seconds between the two lines above, it may have given up.
    assert!(started || node.log().contains("HTTP_PORT: cannot listen"), "{}", node.log());
}

/// A port alone is that port of all addresses of the machine.
#[test]
fn serve_listens_on_ipv6_and_ipv4() {
    let ports = [free_port(), free_port(), free_port()];
    let names = ["HTTP_PORT", "HTTP_ADDR", "GRPC_ADDR"];
    let node = (names.iter().zip(ports))
        .fold(NodeBuilder::serve(), |node, (name, port)| node.set(name, port))
        .set("KAFKA_BROKERS", "127.0.0.1:9")
        .spawn();
    let has_ipv6 = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok();
    let of_both = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
    for address in of_both.into_iter().filter(|address| address.is_ipv4() || has_ipv6) {
        for port in ports {
            let connect = || TcpStream::connect((address, port)).ok();
            until(SOON, &format!("port {port} of {address} is open\n{}", node.log()), connect);
        }
    }
}

#[test]
fn demo_sends_messages_to_a_connected_client() {
    let node = NodeBuilder::dev().set("DEV_DEMO", "true").start();
    let tail = Tail::connect(&node, "carol", &["--count", "4"]);
    let mut last = 0;
    let mut messages = 0;
    while let Some(event) = tail.event() {
        // The client may connect before or after the conversation is created.
        if event["eventType"] == "EVENT_TYPE_CONVERSATION_CREATED" {
            continue;
        }
        assert_eq!(event["eventType"], "EVENT_TYPE_MESSAGE_SENT");
        let message = &event["payload"]["message"];
        assert_eq!(message["conversationId"], "demo");
        let sequence: i64 = message["sequence"].as_str().unwrap().parse().unwrap();
        assert!(sequence > last);
        (last, messages) = (sequence, messages + 1);
    }
    assert!(messages >= 3);
}

#[test]
fn published_events_reach_the_current_members() {
    let node = NodeBuilder::dev().start();
    let alice = Tail::connect(&node, "alice", &["--count", "5"]);
    let bob = Tail::connect(&node, "bob", &["--count", "4"]);
    let team =
        |event: &'static [&str]| [&event[..1], &["--conversation", "team"], &event[1..]].concat();
    let both: [(&[&str], &str); 4] = [
        (&["create", "--members", "alice,bob"], "CONVERSATION_CREATED"),
        (&["message", "--sender", "bob", "Hello"], "MESSAGE_SENT"),
        (&["read", "--user", "alice", "--sequence", "1"], "READ_RECEIPT_UPDATED"),
        (&["remove", "--user", "bob"], "MEMBERSHIP_CHANGED"),
    ];
    for (event, kind) in both {
        publish(&node, &team(event));
        // The events are in two topics, whose records are not ordered among each other. Waiting for each
        // event orders them.
        assert_eq!([alice.kind(), bob.kind()], [Some(kind.into()), Some(kind.into())]);
    }
    assert_eq!(bob.kind(), None);
    publish(&node, &team(&["delete", "--message-id", "m"]));
    assert_eq!(alice.kind().as_deref(), Some("MESSAGE_DELETED"));
    assert_eq!(alice.kind(), None);
}

#[test]
fn signal_ends_sessions_with_1001_and_the_process_with_0() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut node = NodeBuilder::dev().start();
        let tail = Tail::connect(&node, "alice", &[]);
        node.signal(signal);
        let notice = tail.notice();
        assert!(notice.starts_with("closed with 1001 "), "{notice}");
        let status = until(SOON, "the node exits", || node.ended());
        assert_eq!(status.code(), Some(0), "{}", node.log());
    }
}

fn until_not_ready(node: &Node) {
    until(SOON, "readiness turns off", || {
        node.get("/health/ready").filter(|answer| answer.status == 503)
    });
    assert_eq!(node.get("/health/ready").unwrap().body.trim(), "not ready: draining");
}

#[test]
fn drain_request_is_not_cut_short_by_the_first_signal() {
    let mut node = NodeBuilder::dev().set("DRAIN_PERIOD", "1h").start();
    let _first = Tail::connect(&node, "alice", &[]);
    let _second = Tail::connect(&node, "bob", &[]);
    assert_eq!(node.post("/admin/drain").unwrap().status, 202);
    until_not_ready(&node);
    node.signal(Signal::TERM);
    until(SOON, "the first signal is logged", || {
        node.log().contains("SIGTERM: already draining").then_some(())
    });
    assert_eq!(node.ended(), None);
    node.signal(Signal::TERM);
    let status = until(SOON, "the node exits", || node.ended());
    assert_eq!(status.code(), Some(128 + 15), "{}", node.log());
}

#[test]
fn second_signal_exits_at_once_during_the_drain_delay() {
    let mut node = NodeBuilder::dev().set("DRAIN_DELAY", "10m").start();
    node.signal(Signal::INT);
    until_not_ready(&node);
    assert!(node.metrics().sum("delivery_draining", &[]) > 0.0);
    node.signal(Signal::TERM);
    let status = until(SOON, "the node exits", || node.ended());
    assert_eq!(status.code(), Some(128 + 15), "{}", node.log());
}

/// Whether a client that connects after readiness has turned off is served and then closed with 1012.
/// `false`: the machine was so slow that the delay was over before the client had its event.
fn served_during_the_delay(delay: Duration) -> bool {
    let mut node = NodeBuilder::dev()
        .set("DRAIN_DELAY", format!("{}s", delay.as_secs()))
        .set("DRAIN_PERIOD", "1s")
        .start();
    publish(&node, &["create", "--conversation", "team", "--members", "alice,bob"]);
    let begun = Instant::now();
    node.signal(Signal::TERM);
    until_not_ready(&node);
    let over = |what: String| {
        assert!(begun.elapsed() >= delay, "{what} in the delay of {delay:?}: {}", node.log());
        false
    };
    let connect = Connect::session(node.public, "alice", "phone");
    let mut stream = match dial(&connect) {
        Ok(stream) => stream,
        Err(error) => return over(error.to_string()),
    };
    if let Err(error) = stream.write_all(connect.request().as_bytes()) {
        return over(error.to_string());
    }
    let mut client = Client::adopt(stream);
    match client.receive() {
        Received::Open(_) => {}
        other => return over(format!("{other:?}")),
    }
    publish(&node, &["message", "--conversation", "team", "--sender", "bob", "Hello"]);
    match client.receive() {
        Received::Binary(_) => {}
        other => return over(format!("{other:?}")),
    }
    match client.receive_end() {
        Received::Closed(1012, reason) => assert!(reason.starts_with("draining;"), "{reason}"),
        other => panic!("{other:?}"),
    }
    // It was not closed early.
    assert!(begun.elapsed() >= delay);
    let status = until(SOON, "the node exits", || node.ended());
    assert_eq!(status.code(), Some(0), "{}", node.log());
    true
}

/// Promise: “No client is refused while load balancers notice.”
#[test]
fn draining_node_serves_new_connections_during_the_drain_delay() {
    // Longer and longer, for slow machines.
    assert!([4, 20, 100].map(Duration::from_secs).into_iter().any(served_during_the_delay));
}

/// Every word of a text that looks like the name of one of our metrics.
fn metric_names(text: &str) -> Vec<&str> {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = text.split(|c| !word(c));
    let ours = ["delivery_", "kafka_", "websocket_", "message_delivery_", "http_", "process_"];
    words.filter(|w| ours.iter().any(|prefix| w.starts_with(prefix)) && !w.ends_with('_')).collect()
}

#[test]
fn alerts_and_dashboard_name_only_metrics_that_exist() {
    // All services are configured, so that their metrics exist, but none is running.
    let mut settings = NodeBuilder::dev();
    let unused = format!("127.0.0.1:{}", free_port());
    for name in ["REDIS_ADDR", "MSG_SVC_ADDR", "CONV_SVC_ADDR", "PRESENCE_SVC_ADDR"] {
        settings = settings.set(name, &unused);
    }
    let own = rcgen::generate_simple_self_signed(["chat.test".to_owned()]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for (setting, pem) in
        [("TLS_CERT", own.cert.pem()), ("TLS_KEY", own.signing_key.serialize_pem())]
    {
        let file = folder.path().join(setting);
        std::fs::write(&file, pem).unwrap();
        settings = settings.set(setting, file.display());
    }
    let node = settings.set("ROUTING_MODE", "broadcast").spawn();
    let page = until(SOON, "the metrics page contains the consumer lag", || {
        let page = node.get("/metrics")?.body;
        page.contains("\nkafka_consumer_lag{").then_some(page)
    });
    // Its partitions would not be read without the topics of the cluster.
    let member = NodeBuilder::serve()
        .set("KAFKA_BROKERS", format!("127.0.0.1:{}", free_port()))
        .set("ROUTING_MODE", "group")
        .set("HANDOFF", "log")
        .spawn();
    let cluster = until(SOON, "the admin port answers", || Some(member.get("/metrics")?.body));
    let page = page + &cluster;
    let mut names: Vec<&str> = page.lines().filter_map(|line| line.split('{').next()).collect();
    names.extend(names.clone().iter().filter_map(|name| name.strip_suffix("_bucket")));
    for file in ["deploy/prometheus/alerts.yaml", "deploy/grafana/delivery.json"] {
        let text = std::fs::read_to_string(file).unwrap();
        let found = metric_names(&text);
        assert!(found.len() > 10, "{file}");
        let unknown: Vec<_> = found.iter().filter(|name| !names.contains(name)).collect();
        assert!(unknown.is_empty(), "{file}: {unknown:?}");
    }
}
