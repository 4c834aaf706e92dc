//! Sends records when they are due, and traces each.

use std::io;
use std::time::Duration;

use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::OwnedHeaders;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _, ProducerContext};

use super::trace::{TracedProducer, UNTRACED};
use super::{KAFKA_MAX, POLL, failed};
use crate::clock::now_ns;
use crate::generator::{Generator, Item, PushPlan};
use crate::payload::{Stamp, conversation_id};

/// Sends the records of a plan to `topic`, with `headers` in each. Their passages are traced if they are due
/// one by one.
pub(super) fn push(
    producer: &TracedProducer,
    topic: &str,
    headers: Option<&OwnedHeaders>,
    plan: PushPlan,
    sessions: usize,
) -> io::Result<()> {
    let mut generator = Generator::new(plan, sessions);
    while !generator.is_finished() {
        let Some(item) = generator.next_due() else {
            let wait = generator.due_ns().map_or(0, |due| due.saturating_sub(now_ns()));
            producer.poll(Duration::ZERO);
            std::thread::sleep(Duration::from_nanos(wait));
            continue;
        };
        let number = if plan.is_one_by_one() { trace(producer, &item) } else { UNTRACED };
        let key = conversation_id(item.conversation);
        let record = BaseRecord::with_opaque_to(topic, number).key(&*key).payload(&*item.value);
        let record = match headers {
            Some(headers) => record.headers(headers.clone()),
            None => record,
        };
        write(producer, record)?;
    }
    producer.flush(KAFKA_MAX).map_err(|error| failed(&error))
}

fn trace(producer: &TracedProducer, item: &Item) -> usize {
    let stamp = Stamp::find(&item.value).expect("every value has one");
    producer.context().begin(item.sessions.start, stamp.sequence, stamp.intended_ns)
}

/// Queues a record; waits while the queue is full.
pub(crate) fn write<C: ProducerContext>(
    producer: &BaseProducer<C>,
    mut record: BaseRecord<'_, str, [u8], C::DeliveryOpaque>,
) -> io::Result<()> {
    loop {
        match producer.send(record) {
            Ok(()) => break,
            Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), back)) => {
                producer.poll(POLL);
                record = back;
            }
            Err((error, _)) => return Err(failed(&error)),
        }
    }
    producer.poll(Duration::ZERO);
    Ok(())
}
