//! Interoperability with real clients: tungstenite, Node `ws`, Python `websockets`, and a page in
//! Chromium; both subprotocols, with and without permessage-deflate.

use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use delivery_testkit::publisher::{Publisher, new_topic};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use super::support::node::{Node, NodeBuilder};
use super::support::services::kafka_brokers;
use super::support::tally::Tally;
use super::tls::Certificates;

/// Limit for one line of a client: a browser on a busy machine starts slowly.
const LINE_WITHIN: Duration = Duration::from_secs(60);
const MESSAGES: i64 = 200;

/// A client program that connects and prints one line per event.
struct Client {
    lines: Receiver<String>,
    /// Closed to make the client close its session.
    input: Option<ChildStdin>,
    close_page: Arc<AtomicBool>,
    child: Option<Child>,
}

impl Client {
    /// A program that prints its lines to standard output.
    fn program(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("installed by tests/run clients");
        let output = child.stdout.take().expect("piped");
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let input = child.stdin.take();
        Self { lines, input, close_page: Arc::default(), child: Some(child) }
    }

    /// Chromium with `tests/clients/browser.html`, which posts its lines to this process.
    fn browser(profile: &Path, url: &str, protocol: &str, authority: Option<&Path>) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let page = listener.local_addr().expect("bound");
        let (sender, lines) = channel();
        let close_page = Arc::new(AtomicBool::new(false));
        let close = close_page.clone();
        std::thread::spawn(move || serve_page(&listener, &sender, &close));
        if let Some(authority) = authority {
            trust(profile, authority);
        }
        let query = format!("url={}&protocol={protocol}", url.replace('&', "%26"));
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--", "chromium", "--headless=new", "--no-sandbox"])
            .args(["--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0"])
            .arg(format!("--user-data-dir={}", profile.display()))
            .env("HOME", profile)
            .arg(format!("http://{page}/?{query}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("installed by tests/run clients");
        Self { lines, input: None, close_page, child: Some(child) }
    }

    fn line(&self) -> String {
        self.lines.recv_timeout(LINE_WITHIN).expect("a line of the client")
    }

    fn close(&mut self) {
        self.close_page.store(true, Ordering::Relaxed);
        self.input = None;
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Serves the page and receives the lines that it posts. The answer to a post may order it to close.
fn serve_page(listener: &TcpListener, lines: &Sender<String>, close: &AtomicBool) {
    for stream in listener.incoming().map_while(Result::ok) {
        // Chromium opens connections on which it sends no request.
        let (lines, close) = (lines.clone(), close.load(Ordering::Relaxed));
        std::thread::spawn(move || serve_one(stream, &lines, close));
    }
}

fn serve_one(mut stream: TcpStream, lines: &Sender<String>, close: bool) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut request = String::new();
    reader.read_line(&mut request).ok().filter(|count| *count > 0)?;
    let mut length = 0;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok().filter(|count| *count > 0)?;
        if let Some(value) = header.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().ok()?;
        }
        if header == "\r\n" {
            break;
        }
    }
    let mut posted = vec![0; length];
    reader.read_exact(&mut posted).ok()?;
    let page = include_str!("../clients/browser.html");
    let body = if request.starts_with("GET / ") || request.starts_with("GET /?") {
        page
    } else if close {
        "close"
    } else {
        ""
    };
    for line in String::from_utf8_lossy(&posted).lines() {
        lines.send(line.into()).ok()?;
    }
    let head = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).ok()?;
    stream.write_all(body.as_bytes()).ok()
}

/// A client of this URL and subprotocol, with or without permessage-deflate. With a certificate of an authority it must
/// trust that one.
type Start = fn(&str, &str, bool, Option<&Path>) -> Client;

/// Publishes a conversation of one member, and checks what the client received and how it closed.
fn feels_at_home(start: Start, protocol: &str, deflate: bool, tls: Option<&Certificates>) {
    let brokers = kafka_brokers();
    let topic = new_topic(&brokers, "clients", 1);
    let builder = tls.map_or_else(NodeBuilder::serve, |tls| tls.settings(NodeBuilder::serve()));
    let node = builder.kafka(&brokers, &topic).set("DEFLATE", deflate).start();
    let scheme = if tls.is_some() { "wss" } else { "ws" };
    let url = format!("{scheme}://{}/ws?user_id=reader&device_id=desk", node.public);
    let authority = tls.map(|tls| tls.path("ca.crt"));
    let mut client = start(&url, protocol, deflate, authority.as_deref());

    let opened = client.line();
    let expected_protocol = if protocol == "-" {
        ["open - ", "open realchat.v1 "]
    } else {
        ["open realchat.v1.json ", "open realchat.v1 "]
    };
    assert!(expected_protocol.iter().any(|start| opened.starts_with(start)), "{opened}");
    assert!(protocol == "-" || opened.starts_with(&format!("open {protocol} ")), "{opened}");
    assert_eq!(opened.contains("permessage-deflate"), deflate, "{opened}");

    let mut publisher = Publisher::new(&brokers, &topic);
    publisher.created("room", &["reader".into()]);
    for sequence in 1..=MESSAGES {
        // Below and above the threshold for compression, and longer than a 16-bit length.
        let length = match sequence {
            _ if sequence % 50 == 0 => 70_000,
            _ => [10, 300, 2_000, 5_000][sequence as usize % 4],
        };
        publisher.message("room", sequence, "reader", &"Grüße, мир! ".repeat(length / 12 + 1));
    }
    publisher.flush(LINE_WITHIN);

    let mut tally = Tally::default();
    let mut sequences = Vec::new();
    while tally.messages < MESSAGES as u64 && sequences.len() < MESSAGES as usize {
        let line = client.line();
        match line.split_once(' ') {
            Some(("binary", encoded)) => {
                assert_ne!(protocol, "realchat.v1.json");
                tally.saw(&STANDARD.decode(encoded).expect("base64"));
            }
            Some(("text", json)) => {
                assert_eq!(protocol, "realchat.v1.json");
                let event = serde_json::from_str(json).expect("JSON");
                sequences
                    .extend(find(&event, "sequence").map(|value| value.parse::<i64>().unwrap()));
            }
            _ => panic!("unexpected line of the client: {line}"),
        }
    }
    if protocol == "realchat.v1.json" {
        assert!(sequences.iter().copied().eq(1..=MESSAGES), "{sequences:?}");
    } else {
        let stream = &tally.streams["room"];
        assert_eq!((stream.last, stream.duplicates, stream.out_of_order), (MESSAGES, 0, 0));
        assert!(stream.missing.is_empty());
    }
    closes_in_order(&node, &mut publisher, &mut client);
}

/// The closing handshake that the client begins: 1000 is answered with 1000.
fn closes_in_order(node: &Node, publisher: &mut Publisher, client: &mut Client) {
    client.close();
    // The page receives the order to close with the answer to its next post.
    publisher.message("room", MESSAGES + 1, "reader", "wake up");
    loop {
        let line = client.line();
        if line.starts_with("closed") {
            assert!(line.starts_with("closed 1000"), "{line}");
            break;
        }
    }
    super::support::wait::until(LINE_WITHIN, "the session has ended", || {
        let ended = node.metrics().sum("delivery_shard_ended_total", &["closed_by_peer"]);
        (ended >= 1.0).then_some(())
    });
}

/// The text of the first member of this name, at any depth.
fn find(value: &serde_json::Value, name: &str) -> Option<String> {
    match value {
        serde_json::Value::Object(members) => match members.get(name) {
            Some(serde_json::Value::String(found)) => Some(found.clone()),
            _ => members.values().find_map(|member| find(member, name)),
        },
        _ => None,
    }
}

fn installed(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn compression(deflate: bool) -> &'static str {
    if deflate { "deflate" } else { "plain" }
}

fn node_ws(url: &str, protocol: &str, deflate: bool, authority: Option<&Path>) -> Client {
    Client::program(
        Command::new("node")
            .env("NODE_EXTRA_CA_CERTS", authority.unwrap_or(Path::new("")))
            .env("NODE_PATH", installed(".services/clients/node_modules"))
            .arg(installed("tests/clients/node.js"))
            .args([url, protocol, compression(deflate)]),
    )
}

fn python_websockets(url: &str, protocol: &str, deflate: bool, authority: Option<&Path>) -> Client {
    Client::program(
        Command::new(installed(".services/clients/python/bin/python"))
            .env("SSL_CERT_FILE", authority.unwrap_or(Path::new("")))
            .arg(installed("tests/clients/python.py"))
            .args([url, protocol, compression(deflate)]),
    )
}

/// Always offers deflate; the server's setting decides whether it is used.
fn chromium(url: &str, protocol: &str, deflate: bool, authority: Option<&Path>) -> Client {
    let profile = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!(
        "chromium-{}-{protocol}-{}-{}",
        std::process::id(),
        compression(deflate),
        authority.is_some(),
    ));
    Client::browser(&profile, url, protocol, authority)
}

/// In this process, without deflate.
fn tungstenite(url: &str, protocol: &str, _deflate: bool, authority: Option<&Path>) -> Client {
    use tungstenite::Message;
    use tungstenite::client::{IntoClientRequest as _, client};

    let mut request = url.into_client_request().expect("a URL");
    if protocol != "-" {
        request.headers_mut().insert("Sec-WebSocket-Protocol", protocol.parse().expect("a token"));
    }
    let address = request.uri().authority().expect("an address").as_str().to_owned();
    let stream = TcpStream::connect(address).expect("connects");
    let stream: Box<dyn Stream> = match authority {
        None => Box::new(stream),
        Some(authority) => Box::new(secured(stream, authority)),
    };
    let (mut socket, response) = client(request, stream).expect("an upgrade");
    let chosen =
        response.headers().get("Sec-WebSocket-Protocol").map(|value| value.to_str().unwrap());
    let (sender, lines) = channel();
    sender.send(format!("open {} -", chosen.unwrap_or("-"))).expect("we listen");
    socket.send(Message::text(r#"{"last_sequences":{}}"#)).expect("open");
    let close = Arc::new(AtomicBool::new(false));
    let close_page = close.clone();
    std::thread::spawn(move || {
        loop {
            let line = match socket.read() {
                Ok(Message::Binary(payload)) => format!("binary {}", STANDARD.encode(&payload)),
                Ok(Message::Text(text)) => format!("text {text}"),
                Ok(Message::Close(Some(frame))) => format!("closed {}", u16::from(frame.code)),
                Ok(_) => continue,
                Err(_) => break,
            };
            if sender.send(line).is_err() {
                break;
            }
            if close.swap(false, Ordering::Relaxed) {
                let code = tungstenite::protocol::frame::coding::CloseCode::Normal;
                let frame = tungstenite::protocol::CloseFrame { code, reason: "".into() };
                let _ = socket.close(Some(frame));
            }
        }
    });
    Client { lines, input: None, close_page, child: None }
}

trait Stream: Read + Write + Send {}

impl<T: Read + Write + Send> Stream for T {}

fn secured(stream: TcpStream, authority: &Path) -> StreamOwned<ClientConnection, TcpStream> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(authority).expect("a certificate")).expect("a root");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider);
    let builder = builder.with_safe_default_protocol_versions().expect("versions");
    let config = Arc::new(builder.with_root_certificates(roots).with_no_client_auth());
    let name = ServerName::from(stream.peer_addr().expect("connected").ip());
    StreamOwned::new(ClientConnection::new(config, name).expect("a name"), stream)
}

/// Makes programs with this home directory trust an authority, as an administrator would.
fn trust(home: &Path, authority: &Path) {
    let database = home.join(".pki/nssdb");
    std::fs::create_dir_all(&database).expect("a folder");
    let database = format!("sql:{}", database.display());
    let certutil = |arguments: &[&str]| {
        let mut command = Command::new("certutil");
        let done = command.args(["-d", &database]).args(arguments).status();
        assert!(done.expect("installed by tests/run clients").success());
    };
    certutil(&["-N", "--empty-password"]);
    let authority = authority.to_str().expect("a path of tests");
    certutil(&["-A", "-n", "tests", "-t", "C,,", "-i", authority]);
}

macro_rules! clients {
    ($tls:ident; $($name:ident: $client:ident, $protocol:literal, $deflate:literal;)+) => {$(
        #[test]
        #[ignore = "needs Kafka and the clients: tests/run clients"]
        fn $name() {
            feels_at_home($client, $protocol, $deflate, $tls().as_ref());
        }
    )+};
}

fn plaintext() -> Option<Certificates> {
    None
}

fn with_tls() -> Option<Certificates> {
    Some(Certificates::new(&["localhost", "127.0.0.1"]))
}

clients! {
    with_tls;
    tungstenite_binary_over_tls: tungstenite, "realchat.v1", false;
    node_ws_binary_over_tls: node_ws, "realchat.v1", false;
    node_ws_json_deflate_over_tls: node_ws, "realchat.v1.json", true;
    python_websockets_binary_over_tls: python_websockets, "realchat.v1", false;
    python_websockets_json_deflate_over_tls: python_websockets, "realchat.v1.json", true;
    chromium_binary_over_tls: chromium, "realchat.v1", false;
    chromium_json_deflate_over_tls: chromium, "realchat.v1.json", true;
}

clients! {
    plaintext;
    tungstenite_binary: tungstenite, "realchat.v1", false;
    tungstenite_json: tungstenite, "realchat.v1.json", false;
    tungstenite_without_subprotocol: tungstenite, "-", false;
    node_ws_binary: node_ws, "realchat.v1", false;
    node_ws_binary_deflate: node_ws, "realchat.v1", true;
    node_ws_json: node_ws, "realchat.v1.json", false;
    node_ws_json_deflate: node_ws, "realchat.v1.json", true;
    node_ws_without_subprotocol: node_ws, "-", true;
    python_websockets_binary: python_websockets, "realchat.v1", false;
    python_websockets_binary_deflate: python_websockets, "realchat.v1", true;
    python_websockets_json: python_websockets, "realchat.v1.json", false;
    python_websockets_json_deflate: python_websockets, "realchat.v1.json", true;
    python_websockets_without_subprotocol: python_websockets, "-", true;
    chromium_binary: chromium, "realchat.v1", false;
    chromium_binary_deflate: chromium, "realchat.v1", true;
    chromium_json: chromium, "realchat.v1.json", false;
    chromium_json_deflate: chromium, "realchat.v1.json", true;
    chromium_without_subprotocol: chromium, "-", true;
}

/// Stubs generated from `proto/` by another implementation.
#[test]
#[ignore = "needs the clients: tests/run clients"]
fn python_grpc_stubs_catch_up_and_close() {
    python_grpc_stubs(NodeBuilder::dev(), |node| node.grpc.to_string(), None);
}

#[test]
#[ignore = "needs the clients: tests/run clients"]
fn python_grpc_stubs_catch_up_and_close_over_tls() {
    let files = super::tls::Certificates::new(&["localhost"]);
    let address = |node: &Node| format!("localhost:{}", node.grpc.port());
    python_grpc_stubs(files.node(), address, Some(files.path("ca.crt")));
}

/// `authority`: of the server, if it speaks TLS.
fn python_grpc_stubs(
    node: NodeBuilder,
    address: impl Fn(&Node) -> String,
    authority: Option<PathBuf>,
) {
    use delivery_testkit::neighbours::FakeNeighbours;

    use crate::support::back_end::with_neighbours;

    let neighbours = FakeNeighbours::start();
    neighbours.state().create("room", &["alice"], 5);
    let node = with_neighbours(node, &neighbours).start();
    let mut client = Client::program(
        Command::new(installed(".services/clients/python/bin/python"))
            .arg(installed("tests/clients/stream.py"))
            .args([&*address(&node), "alice", "laptop", "room", "2"])
            .args(authority),
    );
    for sequence in 3..=5 {
        let expected = format!("event room {sequence} message {sequence} of room");
        assert_eq!(client.line(), expected);
    }
    client.close();
    assert_eq!(client.line(), "ended");
}
