//! Sends the answer of one call over HTTP/2.

use std::future::poll_fn;
use std::pin::pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, SendStream};
use http_body::Body as _;
use tonic::body::Body;
use tonic::codegen::http;

/// Sends the response and then its body, frame by frame. The next frame is taken from the body when the client's
/// window has let the last one in. Ends early when the client resets the stream.
///
/// # Errors
/// The stream or its connection has ended.
pub(super) async fn send(
    response: http::Response<Body>,
    mut respond: SendResponse<Bytes>,
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
                if !window_opens(&mut stream).await? {
                    return Ok(());
                }
                stream.send_data(bytes, false)?;
            }
            Err(frame) => {
                if let Ok(trailers) = frame.into_trailers() {
                    return stream.send_trailers(trailers);
                }
            }
        }
    }
}

/// Waits until the client's window is open. Returns whether it is; otherwise the stream has ended.
async fn window_opens(stream: &mut SendStream<Bytes>) -> Result<bool, h2::Error> {
    // One byte: HTTP/2 asks for the rest when it has the frame. A larger claim would keep the window of the
    // connection from the other streams.
    stream.reserve_capacity(1);
    while stream.capacity() == 0 {
        match until_reset(stream, SendStream::poll_capacity).await?.flatten() {
            Some(capacity) => capacity?,
            None => return Ok(false),
        };
    }
    Ok(true)
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
