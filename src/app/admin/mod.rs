//! The admin port and its Unix socket: health, metrics, in `dev` a page that shows events, and below `/admin/` what
//! operators do, for which `access` decides who may.

mod access;
mod actions;
mod connections;
mod drain;
mod exposition;
mod requests;

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, Version, header};
use axum::middleware::{self, Next};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio::time::Instant;

pub use access::AdminTokens;
pub use actions::Operated;
pub use connections::AdminCounters;
pub use drain::{DrainSwitch, NotCancelled};
pub use exposition::{MetricsPage, number};
pub use requests::{RequestMetrics, answered};

use access::AdminPeer;
use connections::RequestDeadlines;

use crate::protocol::upgrade::is_authority;

/// The content type of the Prometheus text format.
const TEXT_FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A condition of readiness. Returns what is missing, or `None`.
pub type ReadinessCheck = Box<dyn Fn() -> Option<String> + Send + Sync>;
/// Writes the metrics of one component.
pub type Collector = Box<dyn Fn(&mut MetricsPage) + Send + Sync>;

/// The state behind the admin port.
pub struct Admin {
    /// The `service` label of all metrics.
    pub service: String,
    /// The conditions of readiness.
    pub checks: Vec<ReadinessCheck>,
    /// The metrics of all components; `None`: `/metrics` is off.
    pub collectors: Option<Vec<Collector>>,
    /// Starts and cancels the drain.
    pub drain: Arc<DrainSwitch>,
    /// The page served at `/try`.
    pub try_page: Option<String>,
    /// Counts the requests to this port.
    pub requests: RequestMetrics,
    /// Counts its connections.
    pub connections: Arc<AdminCounters>,
    /// The tokens that may act.
    pub tokens: Arc<AdminTokens>,
    /// What operators act on.
    pub operated: Operated,
}

/// Requests of operators that are carried out at a time. The others wait, as long as their connection may.
const ACTIONS_MAX: usize = 8;

impl Admin {
    /// Why the node is not ready; empty if it is. From the start of the drain to the exit, that is
    /// the only reason.
    pub fn missing(&self) -> Vec<String> {
        if self.drain.is_on() {
            return vec!["draining".to_owned()];
        }
        self.checks.iter().filter_map(|check| check()).collect()
    }
}

/// Serves the admin port, and the socket if there is one, until the future is dropped. Each has its own limit of
/// connections, so that nobody who can only reach the port locks out an operator on the socket.
pub async fn serve(port: TcpListener, socket: Option<UnixListener>, admin: Arc<Admin>) {
    let counters = Arc::clone(&admin.connections);
    let (router, deadlines) = (router(admin), RequestDeadlines::default());
    let on_port = connections::serve(port, router.clone(), deadlines, Arc::clone(&counters));
    let on_socket = async {
        if let Some(socket) = socket {
            connections::serve(socket, router, deadlines, counters).await;
        }
    };
    tokio::join!(on_port, on_socket);
}

fn router(admin: Arc<Admin>) -> axum::Router {
    let door = (Arc::clone(&admin), Arc::new(Semaphore::new(ACTIONS_MAX)));
    let actions = axum::Router::new()
        .route("/admin/drain", post(actions::drain))
        .route("/admin/undrain", post(actions::undrain))
        .route("/admin/sessions", get(actions::sessions))
        .route("/admin/sessions/close", post(actions::close))
        .route("/admin/tokens/revoke", post(actions::revoke))
        .route_layer(middleware::from_fn_with_state(door, authorize));
    axum::Router::new()
        .route("/health/live", get(async || "OK"))
        .route("/health/ready", get(ready))
        .route("/metrics", get(metrics))
        .route("/try", get(try_page))
        .merge(actions)
        .fallback(async || (StatusCode::NOT_FOUND, NOT_FOUND))
        .layer(middleware::from_fn_with_state(Arc::clone(&admin), count))
        .with_state(admin)
}

const NOT_FOUND: &str = "not found; paths: /health/live, /health/ready, /metrics, /admin/sessions, \
                         POST /admin/sessions/close, POST /admin/tokens/revoke, POST /admin/drain, POST /admin/undrain\n";

async fn count(State(admin): State<Arc<Admin>>, request: Request, next: Next) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let begun = Instant::now();
    let response = if names_one_host(&request) {
        next.run(request).await
    } else {
        (
            StatusCode::BAD_REQUEST,
            "Host must be given once, as a name or an address, with or without a port\n",
        )
            .into_response()
    };
    admin.requests.record(method.as_str(), &path, response.status().as_u16(), begun.elapsed());
    response
}

/// RFC 9112 §3.2: HTTP/1.1 requires a Host field, and no version allows two or an invalid one. The same as on the
/// public port.
fn names_one_host(request: &Request) -> bool {
    let mut hosts = request.headers().get_all(header::HOST).iter();
    match (hosts.next(), hosts.next()) {
        (None, _) => request.version() < Version::HTTP_11,
        (Some(host), None) => host.to_str().is_ok_and(is_authority),
        (Some(_), Some(_)) => false,
    }
}

async fn ready(State(admin): State<Arc<Admin>>) -> Response {
    let missing = admin.missing();
    if missing.is_empty() {
        return "OK".into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {}\n", missing.join("; ")))
        .into_response()
}

async fn metrics(State(admin): State<Arc<Admin>>) -> Response {
    let Some(collectors) = &admin.collectors else {
        return (StatusCode::NOT_FOUND, "METRICS_ENABLED is false\n").into_response();
    };
    let mut page = MetricsPage::new(&admin.service);
    for collect in collectors {
        collect(&mut page);
    }
    admin.requests.write(&mut page);
    ([(header::CONTENT_TYPE, TEXT_FORMAT)], page.render()).into_response()
}

/// Lets only those through who may act, [`ACTIONS_MAX`] at a time, and tells the handler who it is.
async fn authorize(
    State((admin, turns)): State<(Arc<Admin>, Arc<Semaphore>)>,
    mut request: Request,
    next: Next,
) -> Response {
    let peer = request.extensions().get::<AdminPeer>().copied();
    let peer = peer.expect("each connection has one");
    match access::judge(peer, request.headers(), &admin.tokens) {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            let _turn = turns.acquire().await;
            next.run(request).await
        }
        Err(denied) => {
            admin.connections.requests_denied.add(1);
            tracing::debug!("admin: {} of {peer:?} denied: {denied}", request.uri().path());
            let mut response = (denied.status(), format!("{denied}\n")).into_response();
            if denied.status() == StatusCode::UNAUTHORIZED {
                let scheme = HeaderValue::from_static("Bearer");
                response.headers_mut().insert(header::WWW_AUTHENTICATE, scheme);
            }
            response
        }
    }
}

async fn try_page(State(admin): State<Arc<Admin>>) -> Response {
    match &admin.try_page {
        Some(page) => Html(page.clone()).into_response(),
        None => (StatusCode::NOT_FOUND, NOT_FOUND).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;
    use tokio::sync::watch;

    use super::*;
    use crate::domain::command::Secret;
    use crate::domain::counters::MetricKind;
    use crate::handoff::Doorbell;
    use crate::service::cluster::missed::MissedSessions;
    use crate::service::members::directory::Directory;
    use crate::service::sessions::auth::Authenticator;
    use crate::service::sessions::catch_up::CatchUpService;
    use crate::service::sessions::manager::{
        SessionConfig, SessionHandle, SessionManager, SessionPorts,
    };
    use crate::service::sessions::presence::Presence;

    async fn send(address: SocketAddr, request: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let text = format!("{request} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    async fn start(admin: Admin) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, None, Arc::new(admin)));
        address
    }

    /// The sessions of a node without shards.
    fn no_sessions() -> SessionHandle {
        let bell = Arc::new(Doorbell::new().unwrap());
        let directory = Arc::new(Directory::new());
        let missed = MissedSessions::new(Arc::clone(&directory), None, Arc::clone(&bell));
        let ports = SessionPorts {
            bell,
            shards: Vec::new(),
            directory,
            missed: Arc::new(missed),
            announcer: None,
            auth: Authenticator::trust(),
            presence: Presence::off(),
            catch_up: CatchUpService::without_messages(Default::default(), Arc::default()),
        };
        SessionManager::spawn(SessionConfig::default(), ports, Arc::default()).unwrap()
    }

    fn admin(
        checks: Vec<ReadinessCheck>,
        collectors: Option<Vec<Collector>>,
    ) -> (Admin, watch::Receiver<bool>) {
        let drain = Arc::new(DrainSwitch::default());
        let drained = drain.subscribe();
        let requests = RequestMetrics::default();
        let service = "push".to_owned();
        let connections = Arc::default();
        let (try_page, tokens) = (None, Arc::new(AdminTokens::new(&[])));
        let operated =
            Operated { node: "node-1".into(), sessions: no_sessions(), has_tokens: true };
        let admin = Admin {
            service,
            checks,
            collectors,
            drain,
            try_page,
            requests,
            connections,
            tokens,
            operated,
        };
        (admin, drained)
    }

    #[tokio::test]
    async fn readiness_names_what_is_missing_and_turns_off_with_the_drain() {
        let assigned = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&assigned);
        let kafka: ReadinessCheck = Box::new(move || {
            (!seen.load(Ordering::Relaxed)).then(|| "kafka: no partition assigned".to_owned())
        });
        let (admin, drained) = admin(vec![kafka], None);
        let address = start(admin).await;

        assert_eq!(send(address, "GET /health/live").await, (200, "OK".into()));
        let (status, body) = send(address, "GET /health/ready").await;
        assert_eq!((status, body.as_str()), (503, "not ready: kafka: no partition assigned\n"));
        assigned.store(true, Ordering::Relaxed);
        assert_eq!(send(address, "GET /health/ready").await, (200, "OK".into()));

        assert_eq!(send(address, "GET /admin/drain").await.0, 405);
        assert!(!*drained.borrow());
        assert_eq!(send(address, "POST /admin/drain").await.0, 202);
        assert!(*drained.borrow());
        assert_eq!(send(address, "POST /admin/undrain").await.0, 200);
        assert!(!*drained.borrow());
        let (status, body) = send(address, "POST /admin/undrain").await;
        assert_eq!((status, &*body), (409, "the node does not drain\n"));
        assert_eq!(send(address, "POST /admin/drain").await.0, 202);
        // What is missing while the node stops does not matter any more.
        assigned.store(false, Ordering::Relaxed);
        assert_eq!(send(address, "GET /health/ready").await, (503, "not ready: draining\n".into()));
        assert_eq!(send(address, "GET /metrics").await.0, 404);
        assert_eq!(send(address, "GET /try").await.0, 404);
    }

    /// Sends these bytes on a connection of its own, and returns everything up to its end.
    async fn exchange(address: SocketAddr, bytes: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(bytes.as_bytes()).await.unwrap();
        let mut answer = String::new();
        // A reset is an end, too.
        let _ = stream.read_to_string(&mut answer).await;
        answer
    }

    /// `access` has all cases.
    #[tokio::test]
    async fn request_that_is_denied_does_nothing_and_is_told_why() {
        let (admin, drained) = admin(Vec::new(), None);
        let counters = Arc::clone(&admin.connections);
        let tokens = Arc::clone(&admin.tokens);
        let address = start(admin).await;
        let drain = async |fields: &str| {
            let head = format!("POST /admin/drain HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n");
            exchange(address, &head).await
        };
        let answer = drain("Origin: null\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 403 ") && answer.contains("web pages"), "{answer}");
        tokens.replace(&[Secret::new("0123456789abcdef0123456789abcdef".to_owned())]);
        let answer = drain("").await;
        assert!(answer.starts_with("HTTP/1.1 401 "), "{answer}");
        assert!(answer.contains("www-authenticate: Bearer\r\n"), "{answer}");
        // Neither says anything about a path that does not exist, nor about health.
        assert_eq!(send(address, "GET /admin/none").await.0, 404);
        assert_eq!(send(address, "GET /health/live").await.0, 200);
        assert!(!*drained.borrow());
        assert_eq!(counters.requests_denied.get(), 2);
        let answer = drain("Authorization: Bearer 0123456789abcdef0123456789abcdef\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 202 ") && *drained.borrow(), "{answer}");
    }

    /// Each with its status and the beginning of its answer.
    #[tokio::test]
    async fn requests_that_make_no_sense_are_refused_with_what_to_do() {
        let (admin, _drained) = admin(Vec::new(), None);
        let address = start(admin).await;
        for (request, status, text) in [
            ("GET /admin/sessions", 200, r#"{"next":null,"node":"node-1","sessions":[]}"#),
            ("GET /admin/sessions?user=alice&limit=5&after=7.1", 200, "{"),
            ("GET /admin/sessions?limit=0", 400, "limit must be 1 to 1000"),
            ("GET /admin/sessions?limit=1001", 400, "limit must be 1 to 1000"),
            ("GET /admin/sessions?after=x", 400, "after must be `next`"),
            ("GET /admin/sessions?users=a", 400, "`users` is no parameter here"),
            ("POST /admin/sessions", 405, ""),
            ("GET /admin/sessions/close?user=a", 405, ""),
            ("POST /admin/sessions/close?user=a", 200, r#"{"closed":0,"node":"node-1"}"#),
            ("POST /admin/sessions/close?device=a", 400, "user is missing"),
            ("POST /admin/tokens/revoke?user=a", 200, r#"{"before":""#),
            ("POST /admin/tokens/revoke?everybody=true&before=5", 200, "{"),
            ("POST /admin/drain?delay=10", 400, "delay must be a time with a unit"),
            ("POST /admin/drain?delay=25h", 400, "delay must be"),
            ("POST /admin/tokens/revoke", 400, "one of user=… and everybody=true"),
            ("POST /admin/tokens/revoke?user=a&everybody=true", 400, "one of"),
            ("POST /admin/tokens/revoke?everybody=yes", 400, "everybody must be `true`"),
            ("POST /admin/tokens/revoke?everybody=true&before=5&per_second=10", 200, "{"),
            ("POST /admin/tokens/revoke?everybody=true&per_second=9", 400, "per_second must be"),
            ("POST /admin/tokens/revoke?user=a&per_second=10", 400, "per_second must be"),
            ("POST /admin/tokens/revoke?user=a&before=soon", 400, "before must be a time"),
            ("POST /admin/tokens/revoke?user=a&before=4000000000", 400, "before is in the future"),
        ] {
            let (found, body) = send(address, request).await;
            assert!(found == status && body.starts_with(text), "{request}: {found} {body}");
        }
    }

    #[tokio::test]
    async fn socket_serves_what_the_port_serves_and_needs_no_token() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admin.sock");
        let (admin, drained) = admin(Vec::new(), None);
        admin.tokens.replace(&[Secret::new("0123456789abcdef0123456789abcdef".to_owned())]);
        let port = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let socket = UnixListener::bind(&path).unwrap();
        tokio::spawn(serve(port, Some(socket), Arc::new(admin)));
        let mut stream = tokio::net::UnixStream::connect(&path).await.unwrap();
        stream.write_all(b"POST /admin/drain HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 202 ") && *drained.borrow(), "{answer}");
    }

    #[tokio::test]
    async fn request_names_one_host() {
        let (admin, _drained) = admin(Vec::new(), None);
        let address = start(admin).await;
        for (fields, version, status) in [
            ("Host: x\r\n", "1.1", 200),
            ("", "1.1", 400),
            ("Host: x\r\nHost: x\r\n", "1.1", 400),
            ("Host: a b\r\n", "1.1", 400),
            ("Host: user@x\r\n", "1.1", 400),
            ("", "1.0", 200),
            ("Host: x\r\nHost: x\r\n", "1.0", 400),
        ] {
            let request = format!("GET /health/live HTTP/{version}\r\n{fields}\r\n");
            let answer = exchange(address, &request).await;
            assert_eq!(answer.split(' ').nth(1), Some(&*status.to_string()), "{request}{answer}");
        }
    }

    #[tokio::test]
    async fn request_head_and_answer_have_deadlines() {
        let (admin, _drained) = admin(Vec::new(), None);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let counters = Arc::clone(&admin.connections);
        let deadlines =
            RequestDeadlines { head: Duration::from_millis(50), answer: Duration::ZERO };
        let slow = axum::Router::new().fallback(std::future::pending::<()>);
        tokio::spawn(connections::serve(listener, slow, deadlines, Arc::clone(&counters)));
        assert_eq!(exchange(address, "GET /health/live HTTP/1.1\r\nHo").await, "");
        assert_eq!(counters.connections_late.get(), 1);
        assert_eq!(exchange(address, "GET / HTTP/1.1\r\nHost: x\r\n\r\n").await, "");
        assert_eq!(counters.connections_stalled.get(), 1);
    }

    /// Issue 13: the liveness probe failed beside 1,197 half requests.
    #[tokio::test]
    async fn half_requests_make_room_for_a_probe() {
        let (admin, _drained) = admin(Vec::new(), None);
        let counters = Arc::clone(&admin.connections);
        let address = start(admin).await;
        let mut half = Vec::new();
        for _ in 0..connections::CONNECTIONS_MAX + 10 {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(b"GET /health/live HTTP/1.1\r\n").await.unwrap();
            half.push(stream);
        }
        assert_eq!(send(address, "GET /health/live").await, (200, "OK".into()));
        assert_eq!(counters.connections_replaced.get(), 11);
        assert_eq!(counters.connections_refused.get(), 0);
        let mut end = Vec::new();
        let _ = half[0].read_to_end(&mut end).await;
        assert!(end.is_empty());
    }

    #[tokio::test]
    async fn metrics_contain_components_and_admin_requests() {
        let open: Collector = Box::new(|page| {
            page.sample(
                MetricKind::Gauge,
                "websocket_connections_active",
                "Open sessions.",
                &[],
                7.0,
            );
        });
        let (admin, _drained) = admin(Vec::new(), Some(vec![open]));
        let address = start(admin).await;
        send(address, "GET /health/live").await;
        send(address, "GET /no/such/path").await;
        let (status, body) = send(address, "GET /metrics").await;
        assert_eq!(status, 200);
        let labels = "service=\"push\",method=\"GET\"";
        for line in [
            "websocket_connections_active{service=\"push\"} 7".to_owned(),
            format!("http_requests_total{{{labels},path=\"/health/live\",status=\"200\"}} 1"),
            format!("http_requests_total{{{labels},path=\"other\",status=\"404\"}} 1"),
            format!("http_request_duration_seconds_count{{{labels},path=\"/health/live\"}} 1"),
        ] {
            assert!(body.lines().any(|found| found == line), "{line}\n{body}");
        }
    }
}
