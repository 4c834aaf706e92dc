//! `delivery dev`: runs a node without anything else installed.

mod demo;
mod kafka;

use std::net::{IpAddr, Ipv4Addr};

use super::config::{
    AuthMode, ListenAddress, Loaded, PeerAddress, Profile, SettingValue as _, Settings, TABLE,
};
use super::node::{self, Addresses, Plan, Prepared};
use super::terminal;
use demo::Demo;
use kafka::EmbeddedKafka;

/// The page served at `/try`. The marks are replaced by the port and the scheme of the WebSocket port.
const TRY_PAGE: &str = include_str!("try.html");
const PORT_MARK: &str = "{{WEBSOCKET_PORT}}";
const SCHEME_MARK: &str = "{{WEBSOCKET_SCHEME}}";

/// Runs until the node is stopped.
///
/// # Errors
/// A part could not be started. The text says which, and what to do.
pub fn run(loaded: Loaded) -> Result<(), String> {
    let Loaded { mut settings, sources } = loaded;
    let prepared = Prepared::new(&settings, Profile::Dev)?;
    refuse_public_trust(&settings)?;
    let embedded = if settings.kafka_brokers.is_empty() {
        let kafka = EmbeddedKafka::start(&settings.kafka_topics)?;
        settings.kafka_brokers = Vec::<PeerAddress>::parse(&kafka.brokers())?;
        Some(kafka)
    } else {
        let mut sources = TABLE.iter().zip(sources);
        let (_, source) =
            sources.find(|(row, _)| row.name == "kafka_brokers").expect("in the table");
        terminal::print(&format!("Using Kafka at {} ({source})\n", settings.kafka_brokers.show()))?;
        None
    };
    // Only the embedded Kafka gets demo messages, never the user's own.
    let demo_wanted = settings.dev_demo && embedded.is_some();
    let mut demo = None;
    let shown = settings.clone();
    let plan = Plan {
        ip: IpAddr::V4(Ipv4Addr::LOCALHOST),
        try_page: Some(|addresses: &Addresses| {
            let port = addresses.websocket.port().to_string();
            let scheme = websocket_scheme(addresses.is_secure);
            TRY_PAGE.replace(PORT_MARK, &port).replace(SCHEME_MARK, scheme)
        }),
        settings,
        prepared,
    };
    node::run(plan, |addresses| {
        let greeting = greeting(&shown, addresses, embedded.is_some(), demo_wanted);
        if let Err(why) = terminal::print(&format!("{greeting}\n")) {
            tracing::warn!("{why}");
        }
        if demo_wanted {
            demo = Demo::start(&shown)
                .inspect_err(|why| tracing::error!("the demo did not start: {why}"))
                .ok();
        }
    })
}

/// Without authentication, only this machine may connect.
fn refuse_public_trust(settings: &Settings) -> Result<(), String> {
    let listens = [
        ("HTTP_PORT", Some(settings.http_port)),
        ("HTTP_ADDR", Some(settings.http_addr)),
        ("GRPC_ADDR", settings.grpc_addr),
    ];
    let public = |address: ListenAddress| address.ip.is_some_and(|ip| !ip.is_loopback());
    for (name, address) in listens {
        if let Some(address) = address
            && public(address)
            && settings.auth_mode == AuthMode::Trust
        {
            return Err(format!(
                "{name}: {} is reachable from other machines, and `dev` lets anybody connect as any user\n      \
                 example: {name}=127.0.0.1:{}, or AUTH_MODE=jwt with JWT_SECRET, or `delivery serve`",
                address.show(),
                address.port
            ));
        }
    }
    Ok(())
}

/// What is running, what is missing, and what to try next. Every command can be pasted as it is.
fn greeting(settings: &Settings, at: &Addresses, embedded: bool, demo: bool) -> String {
    let brokers = settings.kafka_brokers.show();
    let program = program();
    let (websocket, admin) = (at.websocket, at.admin);
    let scheme = websocket_scheme(settings.has_tls());
    let mut out = format!(
        "\nDelivery is running. Stop it with Ctrl-C.\n\n  \
         WebSocket  {scheme}://{websocket}/ws\n  \
         admin      http://{admin}/health/ready  http://{admin}/metrics\n"
    );
    if let Some(grpc) = at.grpc {
        out += &format!("  gRPC       {grpc}  (DeliveryApi.Connect)\n");
    }
    out += &format!("  Kafka      {brokers}{}\n", if embedded { "  (embedded)" } else { "" });
    if embedded {
        out += "\nKafka is a mock inside this process (librdkafka's). It stores nothing on disk: its events \
                are lost\nwhen the process ends, and it holds only the last 5 MiB of each partition.\n";
    }
    out += &missing(settings);
    if demo {
        out += "\nThe conversation `demo` (alice, bob, carol) gets a message about once a second. Watch it as alice:\n";
    } else {
        out += &format!(
            "\nCreate a conversation, then watch it as alice:\n\n    \
             {program} publish --brokers {brokers} create --conversation demo --members alice,bob,carol\n"
        );
    }
    // Each command uses another device, so that none replaces the session of another.
    let url = format!("{scheme}://{websocket}/ws?user_id=alice&device_id=");
    out += &format!(
        "\n  in a browser:\n    http://{admin}/try\n\
         \n  with this program, in another terminal:\n    \
         {program} tail --url {scheme}://{websocket} --user alice --device phone\n\
         \n  with websocat:\n    websocat --protocol realchat.v1.json '{url}laptop'\n\
         \n  with Python (pip install websockets):\n    \
         python3 -c \"from websockets.sync.client import connect\n\
         for event in connect('{url}tablet', subprotocols=['realchat.v1.json']): print(event)\"\n\
         \nSend a message:\n\n    \
         {program} publish --brokers {brokers} message --conversation demo --sender bob \"Hello\"\n\
         \nSee who is connected:\n\n    {program} admin sessions --admin {admin}\n"
    );
    out
}

/// Of URLs to the public port. `is_secure`: it speaks TLS.
fn websocket_scheme(is_secure: bool) -> &'static str {
    if is_secure { "wss" } else { "ws" }
}

/// The parts of a production node that are missing.
fn missing(settings: &Settings) -> String {
    let mut without = Vec::new();
    if !settings.has_redis() {
        without.push("no Redis (one node only)");
    }
    if settings.msg_svc_addr.is_none() {
        without.push("no message service (no catch-up after a reconnect)");
    }
    if settings.conv_svc_addr.is_none() {
        without.push("no conversation service (members come from events only)");
    }
    if settings.presence_svc_addr.is_none() {
        without.push("no presence service");
    }
    let mut out = String::new();
    if !without.is_empty() {
        out += &format!("There is {}.\n", without.join(",\n"));
    }
    if settings.auth_mode == AuthMode::Trust {
        out += "Anybody on this machine can connect as any user.\n";
    }
    out
}

/// The path this program was called with, so that the commands work as printed.
fn program() -> String {
    let name = std::env::args().next().unwrap_or_else(|| "delivery".to_owned());
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+".contains(c);
    if name.chars().all(plain) { name } else { format!("'{}'", name.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::super::config::dev_settings;
    use super::*;

    #[test]
    fn trust_is_refused_on_public_addresses() {
        assert!(refuse_public_trust(&dev_settings(&[])).is_ok());
        assert!(refuse_public_trust(&dev_settings(&[("http_port", "127.0.0.1:0")])).is_ok());
        for name in ["http_port", "http_addr", "grpc_addr"] {
            let why = refuse_public_trust(&dev_settings(&[(name, "0.0.0.0:8083")])).unwrap_err();
            assert!(why.starts_with(&name.to_uppercase()), "{why}");
        }
        let secret = "0123456789abcdef0123456789abcdef";
        let jwt = [("auth_mode", "jwt"), ("jwt_secret", secret), ("http_port", "0.0.0.0:1")];
        assert!(refuse_public_trust(&dev_settings(&jwt)).is_ok());
    }

    #[test]
    fn greeting_has_the_actual_ports_and_names_what_is_missing() {
        let mut settings = dev_settings(&[]);
        settings.kafka_brokers = Vec::<PeerAddress>::parse("127.0.0.1:40001").unwrap();
        let at = Addresses {
            websocket: "127.0.0.1:40002".parse().unwrap(),
            admin: "127.0.0.1:40003".parse().unwrap(),
            grpc: Some("127.0.0.1:40004".parse().unwrap()),
            is_secure: false,
        };
        let text = greeting(&settings, &at, true, true);
        for part in [
            "--brokers 127.0.0.1:40001 message",
            "ws://127.0.0.1:40002/ws?user_id=alice",
            "--url ws://127.0.0.1:40002",
            "http://127.0.0.1:40003/try",
            "127.0.0.1:40004",
            "stores nothing",
            "no Redis",
            "Anybody",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
    }
}
