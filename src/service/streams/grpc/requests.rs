//! What a client sends on one stream, from HTTP/2 to the call.
//!
//! ```text
//!  HTTP/2 ── frames ──► receive() ──► Inbox ──► RequestBody ──► call
//!         ◄───────────── flow control ─────────────┘
//! ```
//!
//! A small frame costs HTTP/2 some 256 bytes until it is taken, whatever it contains, and `h2` ends the whole
//! connection if too many wait. So [`receive`] takes every frame at once, in the task of the connection, and keeps
//! the bytes one behind the other. The client's window opens only when the call takes them, so an inbox never has
//! more than [`STREAM_WINDOW_BYTES`](super::STREAM_WINDOW_BYTES).

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};

use bytes::{Bytes, BytesMut};
use h2::{FlowControl, RecvStream};
use http_body::Frame;
use tokio::sync::Notify;
use tonic::Status;

/// Bytes received on one stream that its call has not taken yet.
#[derive(Debug)]
pub(super) struct Inbox {
    state: Mutex<InboxState>,
    /// Notified when the call is over.
    over: Notify,
}

#[derive(Debug)]
struct InboxState {
    bytes: BytesMut,
    flow: FlowControl,
    /// The client sends no more; with the error, if that is why.
    ended: bool,
    error: Option<Status>,
    /// The call takes no more.
    discards: bool,
    reader: Option<Waker>,
}

impl Inbox {
    pub(super) fn new(flow: FlowControl) -> Arc<Self> {
        let state = InboxState {
            bytes: BytesMut::new(),
            flow,
            ended: false,
            error: None,
            discards: false,
            reader: None,
        };
        Arc::new(Self { state: Mutex::new(state), over: Notify::new() })
    }

    /// The call is over when this is dropped.
    pub(super) fn call(self: &Arc<Self>) -> RunningCall {
        RunningCall(Arc::clone(self))
    }

    fn received(&self, bytes: &[u8]) {
        let mut state = self.lock();
        if state.discards {
            state.release(bytes.len());
            return;
        }
        state.bytes.extend_from_slice(bytes);
        state.wake();
    }

    fn ended(&self, error: Option<Status>) {
        let mut state = self.lock();
        (state.ended, state.error) = (true, error);
        state.wake();
    }

    fn lock(&self) -> MutexGuard<'_, InboxState> {
        self.state.lock().expect("no holder panics")
    }
}

impl InboxState {
    fn wake(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }

    /// Lets the client send as many bytes more.
    fn release(&mut self, bytes: usize) {
        // An error means that the stream has ended.
        let _ = self.flow.release_capacity(bytes);
    }

    fn take(&mut self) -> Bytes {
        let bytes = self.bytes.split().freeze();
        self.release(bytes.len());
        bytes
    }
}

/// The running call of an [`Inbox`].
#[derive(Debug)]
pub(super) struct RunningCall(Arc<Inbox>);

impl Drop for RunningCall {
    fn drop(&mut self) {
        self.0.over.notify_one();
    }
}

/// Receives the frames of one stream until the call is over. If the client is not done by then, the stream is reset.
pub(super) async fn receive(mut stream: RecvStream, inbox: Arc<Inbox>) {
    tokio::select! {
        // Biased: what came before the end of the call is received before it.
        biased;
        () = receive_all(&mut stream, &inbox) => inbox.over.notified().await,
        () = inbox.over.notified() => {}
    }
}

async fn receive_all(stream: &mut RecvStream, inbox: &Inbox) {
    loop {
        match stream.data().await {
            Some(Ok(bytes)) => inbox.received(&bytes),
            Some(Err(error)) => return inbox.ended(Some(error.into())),
            None => return inbox.ended(None),
        }
    }
}

/// The requests of one stream, as the body of an HTTP request.
#[derive(Debug)]
pub(super) struct RequestBody(pub(super) Arc<Inbox>);

impl http_body::Body for RequestBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let mut state = self.0.lock();
        if !state.bytes.is_empty() {
            let bytes = state.take();
            return Poll::Ready(Some(Ok(Frame::data(bytes))));
        }
        if state.ended {
            return Poll::Ready(state.error.take().map(Err));
        }
        state.reader = Some(context.waker().clone());
        Poll::Pending
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.discards = true;
        state.take();
    }
}
