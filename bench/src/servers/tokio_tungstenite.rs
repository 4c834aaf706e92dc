//! The usual design: tokio, a task per connection, tungstenite, a channel per session.

use std::io;
use std::net::TcpListener;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ::tokio_tungstenite::{WebSocketStream, accept_hdr_async_with_config};
use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc::{Receiver, Sender, channel, error::TrySendError};
use tokio_rustls::TlsAcceptor;
use tungstenite::handshake::server::{Request, Response};
use tungstenite::protocol::WebSocketConfig;
use tungstenite::{Bytes, Message};

use crate::clock::now_ns;
use crate::control::{self, OpenSessions, Prepared, Pushed, Word};
use crate::generator::{Generator, Item, PushPlan};
use crate::names;
use crate::usage;

/// Queue of one session, messages, as in Delivery.
const QUEUE: usize = 128;

/// Sizes of the buffers.
#[derive(Clone, Copy, Debug)]
pub(super) enum Buffers {
    /// As small as possible: the best case of this server.
    Small,
    /// Defaults of tungstenite: 128 KiB for reading and 128 KiB for writing, per session.
    Defaults,
}

impl Buffers {
    fn config(self) -> WebSocketConfig {
        match self {
            Self::Small => WebSocketConfig::default().read_buffer_size(4096).write_buffer_size(0),
            Self::Defaults => WebSocketConfig::default(),
        }
    }
}

struct SessionTable {
    buffers: Buffers,
    tls: Option<TlsAcceptor>,
    /// Sender of session `index`.
    sessions: Mutex<Vec<Option<Sender<Bytes>>>>,
    open: AtomicUsize,
    sent: AtomicU64,
}

/// Runs until the standard input ends.
pub(super) fn run(
    listener: TcpListener,
    capacity: usize,
    buffers: Buffers,
    tls: Option<TlsAcceptor>,
) -> io::Result<()> {
    // One worker: the server has one core.
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let table = Arc::new(SessionTable {
        buffers,
        tls,
        sessions: Mutex::new(vec![None; capacity]),
        open: AtomicUsize::new(0),
        sent: AtomicU64::new(0),
    });
    runtime.spawn(accept(listener, Arc::clone(&table)));
    let words = control::commands(Word::parse, || {});
    for word in words {
        match word {
            Word::Sessions => {
                control::answer(&OpenSessions { sessions: table.open.load(Ordering::Relaxed) });
            }
            Word::Prepare(_) => control::answer(&Prepared { prepared: false }),
            Word::Push(plan) => control::answer(&push(plan, &table)),
            Word::Presence | Word::Calls | Word::Echo(_) => {}
            Word::Quit => break,
        }
    }
    Ok(())
}

async fn accept(listener: TcpListener, table: Arc<SessionTable>) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    loop {
        let (stream, _) = listener.accept().await?;
        let table = Arc::clone(&table);
        tokio::spawn(async move {
            match &table.tls {
                None => serve(stream, &table).await,
                Some(tls) => {
                    if let Ok(stream) = tls.accept(stream).await {
                        serve(stream, &table).await;
                    }
                }
            }
        });
    }
}

async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin, table: &SessionTable) {
    let mut session = None;
    #[expect(clippy::result_large_err, reason = "tungstenite's own signature")]
    let note = |request: &Request, response: Response| {
        session = names::index_of(request.uri().to_string().as_bytes());
        Ok(response)
    };
    let config = table.buffers.config();
    let Ok(socket) = accept_hdr_async_with_config(stream, note, Some(config)).await else { return };
    let (sender, receiver) = channel(QUEUE);
    if let Some(session) = session
        && let Some(place) = table.sessions.lock().expect("no holder panics").get_mut(session)
    {
        *place = Some(sender);
    }
    table.open.fetch_add(1, Ordering::Relaxed);
    converse(socket, receiver, table).await;
    table.open.fetch_sub(1, Ordering::Relaxed);
}

async fn converse(
    mut socket: WebSocketStream<impl AsyncRead + AsyncWrite + Unpin>,
    mut events: Receiver<Bytes>,
    table: &SessionTable,
) {
    loop {
        tokio::select! {
            event = events.recv() => {
                let Some(event) = event else { return };
                let mut count = 1;
                if socket.feed(Message::Binary(event)).await.is_err() {
                    return;
                }
                // Waiting events are sent together with it.
                while let Ok(event) = events.try_recv() {
                    count += 1;
                    if socket.feed(Message::Binary(event)).await.is_err() {
                        return;
                    }
                }
                if socket.flush().await.is_err() {
                    return;
                }
                table.sent.fetch_add(count, Ordering::Relaxed);
            }
            message = socket.next() => match message {
                Some(Ok(message @ Message::Binary(_))) => {
                    if socket.send(message).await.is_err() {
                        return;
                    }
                }
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return,
            },
        }
    }
}

/// Runs on the calling thread, which also reads the words.
fn push(plan: PushPlan, table: &SessionTable) -> Pushed {
    let sessions: Vec<Option<Sender<Bytes>>> =
        table.sessions.lock().expect("no holder panics").clone();
    let open = table.open.load(Ordering::Relaxed);
    let cpu = usage::thread_ns();
    let started_ns = now_ns();
    let before = table.sent.load(Ordering::Relaxed);
    let mut generator = Generator::new(plan, open);
    let (mut messages, mut retries) = (0, 0);
    while !generator.is_finished() {
        let Some(Item { sessions: recipients, value, .. }) = generator.next_due() else {
            let wait = generator.due_ns().map_or(0, |due| due.saturating_sub(now_ns()));
            std::thread::sleep(Duration::from_nanos(wait));
            continue;
        };
        let value = Bytes::from(value);
        for sender in sessions[recipients].iter().flatten() {
            messages += 1;
            let mut event = value.clone();
            while let Err(TrySendError::Full(back)) = sender.try_send(event) {
                retries += 1;
                event = back;
                std::thread::sleep(Duration::from_micros(100));
            }
        }
        // As far ahead as Delivery's rings allow.
        while messages - (table.sent.load(Ordering::Relaxed) - before) > 8192 {
            std::thread::sleep(Duration::from_micros(100));
        }
    }
    while table.sent.load(Ordering::Relaxed) - before < messages {
        std::thread::sleep(Duration::from_micros(100));
    }
    Pushed {
        messages,
        elapsed_ns: now_ns() - started_ns,
        generator_ns: usage::thread_ns() - cpu,
        retries,
        sends: None,
    }
}
