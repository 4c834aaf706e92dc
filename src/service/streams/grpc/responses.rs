//! Sends the answer of one call over HTTP/2.

use std::future::{Future as _, pending, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use h2::server::SendResponse;
use h2::{Reason, SendStream};
use http_body::Body as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tonic::body::Body;
use tonic::codegen::http;

use super::CONNECTION_SEND_BYTES;
use crate::service::streams::hub::Outbox;

/// Longest [`Piece`], bytes: what HTTP/2 puts into one frame unless the client wants larger ones (RFC 9113 §4.2).
const PIECE_BYTES: usize = 16 * 1024;
/// What a piece costs besides its bytes: its entry in the queue of HTTP/2, and the allocator.
const PIECE_COST: usize = 512;
const _: () = assert!(PIECE_BYTES + PIECE_COST <= CONNECTION_SEND_BYTES);

/// Room of one connection for what HTTP/2 has and the socket has not taken yet, of all its streams, also of those that
/// have ended. Who comes first gets it first, so the streams take turns.
#[derive(Clone, Debug)]
pub(super) struct SendRoom(Arc<Semaphore>);

impl SendRoom {
    pub(super) fn new() -> Self {
        Self(Arc::new(Semaphore::new(CONNECTION_SEND_BYTES)))
    }

    async fn take(&self, bytes: usize) -> OwnedSemaphorePermit {
        let cost = u32::try_from(bytes + PIECE_COST).expect("at most one piece");
        Arc::clone(&self.0).acquire_many_owned(cost).await.expect("never closed")
    }
}

/// A part of a body, on its way to the socket. A copy, so that it keeps no memory but its own: the rest of an event may
/// be much larger.
#[derive(Debug)]
pub(super) struct Piece {
    bytes: Bytes,
    /// Free again when HTTP/2 has written the piece or has dropped it.
    _room: Option<OwnedSemaphorePermit>,
}

impl Piece {
    /// Without bytes: the end of a stream.
    fn end() -> Self {
        Self { bytes: Bytes::new(), _room: None }
    }
}

impl Buf for Piece {
    fn remaining(&self) -> usize {
        self.bytes.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.bytes.chunk()
    }

    fn advance(&mut self, bytes: usize) {
        self.bytes.advance(bytes);
    }
}

/// Sends the response and then its body, frame by frame. HTTP/2 gets only what the client's window lets out and the
/// connection has `room` for, so that little waits there. The next frame is taken from the body when the last one is
/// out. Ends early when the client resets the stream, and when the session has ended although its client has not read
/// everything: then the stream is reset, because the status cannot overtake the rest of an event.
pub(super) async fn send(
    response: http::Response<Body>,
    mut respond: SendResponse<Piece>,
    room: &SendRoom,
) {
    let outbox = response.extensions().get::<Arc<Outbox>>().map(Arc::clone);
    let ended = async {
        match &outbox {
            Some(outbox) => outbox.ended().await,
            None => pending().await,
        }
    };
    tokio::select! {
        biased;
        // gRPC libraries report this reason as `RESOURCE_EXHAUSTED`.
        () = ended => respond.send_reset(Reason::ENHANCE_YOUR_CALM),
        // An error means that the stream has ended.
        _ = send_whole(response, &mut respond, outbox.as_deref(), room) => {}
    }
}

/// # Errors
/// The stream or its connection has ended.
async fn send_whole(
    response: http::Response<Body>,
    respond: &mut SendResponse<Piece>,
    outbox: Option<&Outbox>,
    room: &SendRoom,
) -> Result<(), h2::Error> {
    let (head, body) = response.into_parts();
    let is_whole = body.is_end_stream();
    let mut stream = respond.send_response(http::Response::from_parts(head, ()), is_whole)?;
    if is_whole {
        return Ok(());
    }
    let mut body = pin!(body);
    loop {
        let next = until_reset(&mut stream, |_, context| body.as_mut().poll_frame(context)).await?;
        let frame = match next {
            Some(Some(Ok(frame))) => frame,
            Some(Some(Err(_))) => {
                stream.send_reset(Reason::INTERNAL_ERROR);
                return Ok(());
            }
            Some(None) => return stream.send_data(Piece::end(), true),
            None => return Ok(()),
        };
        match frame.into_data() {
            Ok(bytes) => {
                if !send_data(&mut stream, bytes, outbox, room).await? {
                    return Ok(());
                }
            }
            Err(frame) => {
                if let Ok(trailers) = frame.into_trailers() {
                    return stream.send_trailers(trailers);
                }
            }
        }
    }
}

/// Sends bytes as the client's window lets them out, and the socket takes them. Returns whether all are out; otherwise
/// the stream has ended.
async fn send_data(
    stream: &mut SendStream<Piece>,
    mut bytes: Bytes,
    outbox: Option<&Outbox>,
    room: &SendRoom,
) -> Result<bool, h2::Error> {
    loop {
        if let Some(outbox) = outbox {
            outbox.let_out(bytes.len(), Instant::now());
        }
        if bytes.is_empty() {
            return Ok(true);
        }
        let wanted = bytes.len().min(PIECE_BYTES);
        stream.reserve_capacity(wanted);
        while stream.capacity() == 0 {
            match until_reset(stream, SendStream::poll_capacity).await?.flatten() {
                Some(capacity) => capacity?,
                None => return Ok(false),
            };
        }
        // The window first: a stream whose window is closed has no room that others need.
        let allowed = stream.capacity().min(wanted);
        let mut taking = pin!(room.take(allowed));
        let Some(room) = until_reset(stream, |_, context| taking.as_mut().poll(context)).await?
        else {
            return Ok(false);
        };
        // The client may have made the window smaller meanwhile (RFC 9113 §6.9.2).
        let piece = bytes.split_to(stream.capacity().min(allowed));
        if !piece.is_empty() {
            let bytes = Bytes::copy_from_slice(&piece);
            stream.send_data(Piece { bytes, _room: Some(room) }, false)?;
        }
    }
}

/// What `poll` gives. `None`: the client has reset the stream before.
async fn until_reset<T>(
    stream: &mut SendStream<Piece>,
    mut poll: impl FnMut(&mut SendStream<Piece>, &mut Context<'_>) -> Poll<T>,
) -> Result<Option<T>, h2::Error> {
    poll_fn(|context| match stream.poll_reset(context) {
        Poll::Ready(reset) => Poll::Ready(reset.map(|_| None)),
        Poll::Pending => poll(stream, context).map(|ready| Ok(Some(ready))),
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use http_body::Frame;
    use tokio::time::{advance, sleep};
    use tonic::Status;

    use super::*;
    use crate::service::streams::hub::OutboxLimits;

    /// A client that lets out a part of an event at a time makes progress.
    #[tokio::test(start_paused = true)]
    async fn each_byte_that_the_window_lets_out_is_progress() {
        const WINDOW: u32 = 1_000;
        let outbox = Arc::new(Outbox::new(&OutboxLimits::default()));
        let mut response = http::Response::new(Body::new("x".repeat(5 * WINDOW as usize)));
        response.extensions_mut().insert(Arc::clone(&outbox));
        let (client, server) = tokio::io::duplex(1 << 16);
        tokio::spawn(async move {
            let mut http2 = h2::server::Builder::new().handshake(server).await.unwrap();
            let (_request, respond) = http2.accept().await.unwrap().unwrap();
            tokio::spawn(async move { send(response, respond, &SendRoom::new()).await });
            while http2.accept().await.is_some() {}
        });
        let mut builder = h2::client::Builder::new();
        let handshake = builder.initial_window_size(WINDOW).handshake::<_, Bytes>(client);
        let (mut requests, http2) = handshake.await.unwrap();
        tokio::spawn(http2);
        let (response, _) = requests.send_request(http::Request::new(()), true).unwrap();
        let mut body = response.await.unwrap().into_body();
        for _ in 1..5 {
            let piece = body.data().await.unwrap().unwrap();
            assert_eq!(piece.len(), WINDOW as usize);
            assert_eq!(outbox.unread_since(), Some(Instant::now()));
            advance(Duration::from_secs(10)).await;
            body.flow_control().release_capacity(piece.len()).unwrap();
        }
        body.data().await.unwrap().unwrap();
        assert_eq!(outbox.unread_since(), None);
    }

    /// A body of events that counts what is taken from it.
    struct Events {
        left: usize,
        taken: Arc<AtomicUsize>,
    }

    const EVENT: usize = 40_000;
    const EVENTS: usize = 10;

    impl http_body::Body for Events {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            Poll::Ready(self.left.checked_sub(1).map(|left| {
                self.left = left;
                self.taken.fetch_add(EVENT, Ordering::Relaxed);
                Ok(Frame::data(vec![0; EVENT].into()))
            }))
        }
    }

    /// Windows wide open, and a socket that takes nothing: HTTP/2 holds what the connection has room for, however many
    /// streams it has. When the client reads, it gets everything.
    #[tokio::test(start_paused = true)]
    async fn streams_of_a_connection_share_its_room() {
        const STREAMS: usize = 40;
        let taken = Arc::new(AtomicUsize::new(0));
        let (client, server) = tokio::io::duplex(1_024);
        let mut builder = h2::client::Builder::new();
        let builder = builder.initial_window_size(1 << 30).initial_connection_window_size(1 << 30);
        let (http2, client) = tokio::join!(
            h2::server::Builder::new().max_send_buffer_size(1 << 20).handshake(server),
            builder.handshake::<_, Bytes>(client),
        );
        let (mut http2, (requests, mut reads)) = (http2.unwrap(), client.unwrap());
        let mut requests = requests;
        let mut answers = Vec::new();
        let mut responds = Vec::new();
        for _ in 0..STREAMS {
            let begin = async {
                requests = requests.clone().ready().await.unwrap();
                answers.push(requests.send_request(http::Request::new(()), true).unwrap().0);
                let (_request, respond) = http2.accept().await.unwrap().unwrap();
                responds.push(respond);
            };
            tokio::select! {
                () = begin => {}
                _ = &mut reads => unreachable!("the server is open"),
            }
        }
        let room = SendRoom::new();
        for respond in responds {
            let (room, taken) = (room.clone(), Arc::clone(&taken));
            let response = http::Response::new(Body::new(Events { left: EVENTS, taken }));
            tokio::spawn(async move { send(response, respond, &room).await });
        }
        tokio::spawn(async move { while http2.accept().await.is_some() {} });
        // The clock moves when nothing else does.
        sleep(Duration::from_secs(1)).await;
        let waits = taken.load(Ordering::Relaxed);
        assert!(waits <= CONNECTION_SEND_BYTES + STREAMS * EVENT, "{waits}");
        tokio::spawn(reads);
        for answer in answers {
            let mut body = answer.await.unwrap().into_body();
            let mut bytes = 0;
            while let Some(piece) = body.data().await {
                bytes += piece.unwrap().len();
            }
            assert_eq!(bytes, EVENTS * EVENT);
        }
        assert_eq!(room.0.available_permits(), CONNECTION_SEND_BYTES);
    }
}
