//! Sends the answer of one call over HTTP/2.

use std::future::{pending, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, SendStream};
use http_body::Body as _;
use tokio::time::Instant;
use tonic::body::Body;
use tonic::codegen::http;

use crate::service::streams::hub::Outbox;

/// Sends the response and then its body, frame by frame. HTTP/2 gets only what the client's window lets out, so that
/// nothing waits there. The next frame is taken from the body when the last one is out. Ends early when the client
/// resets the stream, and when the session has ended although its client has not read everything: then the stream is
/// reset, because the status cannot overtake the rest of an event.
pub(super) async fn send(response: http::Response<Body>, mut respond: SendResponse<Bytes>) {
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
        _ = send_whole(response, &mut respond, outbox.as_deref()) => {}
    }
}

/// # Errors
/// The stream or its connection has ended.
async fn send_whole(
    response: http::Response<Body>,
    respond: &mut SendResponse<Bytes>,
    outbox: Option<&Outbox>,
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
            Some(None) => return stream.send_data(Bytes::new(), true),
            None => return Ok(()),
        };
        match frame.into_data() {
            Ok(bytes) => {
                if !send_data(&mut stream, bytes, outbox).await? {
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

/// Sends bytes as the client's window lets them out. Returns whether all are out; otherwise the stream has ended.
async fn send_data(
    stream: &mut SendStream<Bytes>,
    mut bytes: Bytes,
    outbox: Option<&Outbox>,
) -> Result<bool, h2::Error> {
    loop {
        if let Some(outbox) = outbox {
            outbox.let_out(bytes.len(), Instant::now());
        }
        if bytes.is_empty() {
            return Ok(true);
        }
        stream.reserve_capacity(bytes.len());
        while stream.capacity() == 0 {
            match until_reset(stream, SendStream::poll_capacity).await?.flatten() {
                Some(capacity) => capacity?,
                None => return Ok(false),
            };
        }
        let piece = bytes.split_to(stream.capacity().min(bytes.len()));
        stream.send_data(piece, false)?;
    }
}

/// What `poll` gives. `None`: the client has reset the stream before.
async fn until_reset<T>(
    stream: &mut SendStream<Bytes>,
    mut poll: impl FnMut(&mut SendStream<Bytes>, &mut Context<'_>) -> Poll<T>,
) -> Result<Option<T>, h2::Error> {
    poll_fn(|context| match stream.poll_reset(context) {
        Poll::Ready(reset) => Poll::Ready(reset.map(|_| None)),
        Poll::Pending => poll(stream, context).map(|ready| Ok(Some(ready))),
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::advance;

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
            let mut http2 = h2::server::handshake(server).await.unwrap();
            let (_request, respond) = http2.accept().await.unwrap().unwrap();
            tokio::spawn(send(response, respond));
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
}
