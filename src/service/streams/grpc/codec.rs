//! Codec of `Connect`: decodes requests; events are already encoded.

use std::sync::Arc;

use bytes::BufMut;
use prost::Message;
use tonic::Status;
use tonic::codec::{BufferSettings, Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

use crate::service::events::proto::delivery::v1::DeliveryConnectRequest;
use crate::service::streams::hub::Delivery;

/// Initial buffer of a stream per direction, bytes.
const BUFFER_BYTES: usize = 1024;
/// Events that are ready together are sent together up to about this size, bytes.
pub(super) const BATCH_BYTES: usize = 32 * 1024;

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct EventCodec;

impl Codec for EventCodec {
    type Encode = Arc<Delivery>;
    type Decode = DeliveryConnectRequest;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for EventCodec {
    type Item = Arc<Delivery>;
    type Error = Status;

    /// Copies the shared bytes and drops the delivery.
    fn encode(&mut self, delivery: Self::Item, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.reserve(delivery.bytes().len());
        out.put_slice(delivery.bytes());
        Ok(())
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(BUFFER_BYTES, BATCH_BYTES)
    }
}

impl Decoder for EventCodec {
    type Item = DeliveryConnectRequest;
    type Error = Status;

    fn decode(&mut self, input: &mut DecodeBuf<'_>) -> Result<Option<Self::Item>, Status> {
        // Malformed bytes are the fault of the client.
        DeliveryConnectRequest::decode(input)
            .map(Some)
            .map_err(|error| Status::invalid_argument(format!("malformed request: {error}")))
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(BUFFER_BYTES, BATCH_BYTES)
    }
}
