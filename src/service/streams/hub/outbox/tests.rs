use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::domain::encoding::Encoding;
use crate::domain::event::Event;
use crate::service::streams::hub::delivery::Signals;

fn delivery(conversation: u64, sequence: Option<i64>, bytes: &[u8]) -> Arc<Delivery> {
    let conversation = ConversationKey(conversation);
    let position = sequence.map(|sequence| ConversationPosition { conversation, sequence });
    let event = Event::new(position, 0)
        .of_conversation(conversation)
        .with_frame(Encoding::Stream, bytes.into());
    Delivery::new(Arc::new(event), None, &Arc::new(Signals::default())).unwrap()
}

fn message(conversation: u64, sequence: i64) -> Arc<Delivery> {
    delivery(conversation, Some(sequence), b"event")
}

fn take(outbox: &Outbox) -> Option<Result<Arc<Delivery>, Status>> {
    match outbox.poll_next(&mut Context::from_waker(Waker::noop()), Instant::now()) {
        Poll::Ready(next) => Some(next),
        Poll::Pending => None,
    }
}

fn sequences(outbox: &Outbox) -> Vec<i64> {
    let mut taken = Vec::new();
    while let Some(Ok(delivery)) = take(outbox) {
        taken.push(delivery.event().position.unwrap().sequence);
    }
    taken
}

fn live(outbox: &Outbox, delivery: &Arc<Delivery>) -> Delivered {
    outbox.deliver(DeliveryClass::Live, delivery, Instant::now())
}

fn caught_up(outbox: &Outbox, delivery: &Arc<Delivery>) -> Delivered {
    outbox.deliver(DeliveryClass::CatchUp, delivery, Instant::now())
}

fn release(outbox: &Outbox, stream: u64, sequence: i64) {
    let position = ConversationPosition { conversation: ConversationKey(stream), sequence };
    outbox.release(&[position], Instant::now());
}

fn open() -> Outbox {
    let outbox = Outbox::new(OutboxLimits::default());
    outbox.open_up(Instant::now());
    outbox
}

#[test]
fn live_events_wait_for_their_own_conversation_only() {
    let outbox = open();
    assert_eq!(outbox.mention(ConversationKey(1), 4, Instant::now()), Mention::Resume);
    assert_eq!(live(&outbox, &message(1, 6)), Delivered::Held);
    assert_eq!(live(&outbox, &message(2, 70)), Delivered::Queued);
    assert_eq!(caught_up(&outbox, &message(1, 5)), Delivered::Queued);
    assert_eq!(caught_up(&outbox, &message(1, 6)), Delivered::Queued);
    assert_eq!(live(&outbox, &message(1, 7)), Delivered::Held);
    assert_eq!(sequences(&outbox), [70, 5, 6]);
    release(&outbox, 1, 6);
    assert_eq!(sequences(&outbox), [7]);
    assert_eq!(live(&outbox, &message(1, 6)), Delivered::Duplicate);
}

#[test]
fn what_the_client_acknowledged_is_not_sent_to_it() {
    let outbox = open();
    assert_eq!(outbox.mention(ConversationKey(1), 4, Instant::now()), Mention::Resume);
    release(&outbox, 1, 4);
    assert_eq!(outbox.mention(ConversationKey(1), 9, Instant::now()), Mention::Acknowledged);
    assert_eq!(live(&outbox, &message(1, 9)), Delivered::Duplicate);
    assert_eq!(live(&outbox, &message(1, 10)), Delivered::Queued);
}

#[test]
fn held_events_have_bounds_of_their_own() {
    let limits = OutboxLimits { hold_messages_max: 2, ..OutboxLimits::default() };
    let outbox = Outbox::new(limits);
    outbox.open_up(Instant::now());
    let _ = outbox.mention(ConversationKey(1), 0, Instant::now());
    for sequence in 1..=128 {
        assert_eq!(live(&outbox, &message(2, sequence)), Delivered::Queued);
    }
    assert_eq!(live(&outbox, &message(2, 129)), Delivered::Overflow);
    assert_eq!(live(&outbox, &message(1, 1)), Delivered::Held);
    assert_eq!(live(&outbox, &message(1, 2)), Delivered::Held);
    assert_eq!(live(&outbox, &message(1, 3)), Delivered::CatchUpOverflow);
    // What is released does not count as what is read too slowly.
    release(&outbox, 1, 0);
    drop(take(&outbox));
    assert_eq!(live(&outbox, &message(2, 129)), Delivered::Queued);
    assert_eq!(live(&outbox, &message(1, 3)), Delivered::Overflow);
}

#[test]
fn catch_up_that_gets_nowhere_is_seen() {
    let (outbox, start) = (open(), Instant::now());
    let later = |seconds| start + std::time::Duration::from_secs(seconds);
    assert_eq!(outbox.resuming_since(), None);
    let _ = outbox.mention(ConversationKey(1), 0, later(1));
    let _ = outbox.mention(ConversationKey(2), 0, later(2));
    assert_eq!(outbox.resuming_since(), Some(later(1)));
    let position = ConversationPosition { conversation: ConversationKey(2), sequence: 0 };
    outbox.release(&[position], later(3));
    assert_eq!(outbox.resuming_since(), Some(later(3)));
    outbox.release(
        &[ConversationPosition { conversation: ConversationKey(1), sequence: 0 }],
        later(4),
    );
    assert_eq!(outbox.resuming_since(), None);
}

#[test]
fn live_events_are_bounded_in_bytes_but_one_always_fits() {
    let limits = OutboxLimits { live_bytes_max: 10, ..OutboxLimits::default() };
    let outbox = Outbox::new(limits);
    outbox.open_up(Instant::now());
    assert_eq!(live(&outbox, &delivery(1, None, &[0; 11])), Delivered::Queued);
    assert_eq!(live(&outbox, &delivery(1, None, &[0; 1])), Delivered::Overflow);
    drop(take(&outbox));
    assert_eq!(live(&outbox, &delivery(1, None, &[0; 4])), Delivered::Queued);
    assert_eq!(live(&outbox, &delivery(1, None, &[0; 6])), Delivered::Queued);
    assert_eq!(live(&outbox, &delivery(1, None, &[0; 1])), Delivered::Overflow);
}

#[test]
fn caught_up_messages_have_bounds_of_their_own() {
    let limits = OutboxLimits { catch_up_messages_max: 2, ..OutboxLimits::default() };
    let outbox = Outbox::new(limits);
    assert_eq!(caught_up(&outbox, &message(1, 1)), Delivered::Queued);
    assert_eq!(caught_up(&outbox, &message(1, 2)), Delivered::Queued);
    assert_eq!(caught_up(&outbox, &message(1, 3)), Delivered::CatchUpOverflow);
    assert_eq!(live(&outbox, &message(2, 1)), Delivered::Held);
}

#[test]
fn conversations_of_a_session_are_bounded() {
    let limits = OutboxLimits { conversations_max: 1, ..OutboxLimits::default() };
    let outbox = Outbox::new(limits);
    assert_eq!(outbox.mention(ConversationKey(1), 0, Instant::now()), Mention::Resume);
    assert_eq!(outbox.mention(ConversationKey(2), 0, Instant::now()), Mention::TooMany);
    assert_eq!(outbox.mention(ConversationKey(1), 1, Instant::now()), Mention::Acknowledged);
}

#[test]
fn busy_opening_ends_before_it_fills_the_queue() {
    let outbox = Outbox::new(OutboxLimits { hold_messages_max: 4, ..OutboxLimits::default() });
    let _ = outbox.mention(ConversationKey(2), 0, Instant::now());
    for sequence in 1..=2 {
        assert_eq!(live(&outbox, &message(1, sequence)), Delivered::Held);
    }
    assert!(take(&outbox).is_none());
    assert_eq!(live(&outbox, &message(2, 1)), Delivered::Held);
    assert_eq!(sequences(&outbox), [1, 2]);
    assert_eq!(live(&outbox, &message(2, 2)), Delivered::Held);
}

#[test]
fn end_follows_what_is_queued_and_never_what_is_held() {
    let outbox = open();
    let _ = outbox.mention(ConversationKey(1), 0, Instant::now());
    let _ = live(&outbox, &message(2, 1));
    let _ = live(&outbox, &message(1, 1));
    assert_eq!(outbox.end(Status::aborted("first"), false), 1);
    assert_eq!(outbox.end(Status::internal("second"), false), 0);
    assert_eq!(live(&outbox, &message(2, 2)), Delivered::Ended);
    release(&outbox, 1, 0);
    assert_eq!(take(&outbox).unwrap().unwrap().event().position.unwrap().sequence, 1);
    assert_eq!(take(&outbox).unwrap().unwrap_err().message(), "first");
}

#[test]
fn stall_is_seen_from_the_last_thing_taken() {
    let outbox = open();
    assert_eq!(outbox.waiting_since(), None);
    let _ = live(&outbox, &message(1, 1));
    let first = outbox.waiting_since().unwrap();
    let _ = live(&outbox, &message(1, 2));
    assert_eq!(outbox.waiting_since(), Some(first));
    drop(take(&outbox));
    assert!(outbox.waiting_since().unwrap() > first);
    drop(take(&outbox));
    assert_eq!(outbox.waiting_since(), None);
}

/// What may happen, in any order. Conversations are numbered; each has a log that only grows.
#[derive(Clone, Debug)]
enum Step {
    Publish(u64),
    /// An event without a place in the log.
    Fact(u64),
    Mention(u64, i64),
    /// A page of at most this many messages.
    Page(u64, usize),
    OpenUp,
    Take(usize),
}

const CONVERSATIONS: u64 = 3;

fn step() -> impl Strategy<Value = Step> {
    let conversation = 0..CONVERSATIONS;
    prop_oneof![
        4 => conversation.clone().prop_map(Step::Publish),
        1 => conversation.clone().prop_map(Step::Fact),
        1 => (conversation.clone(), 0_i64..8).prop_map(|(c, back)| Step::Mention(c, back)),
        3 => (conversation, 1_usize..4).prop_map(|(c, size)| Step::Page(c, size)),
        1 => Just(Step::OpenUp),
        3 => (1_usize..5).prop_map(Step::Take),
    ]
}

/// The log, what the client asked for, and what it has got so far.
#[derive(Debug, Default)]
struct Oracle {
    /// Per conversation: sequence of the newest message, and after which each fact came.
    newest: BTreeMap<u64, i64>,
    facts: BTreeMap<u64, Vec<i64>>,
    /// Where catch-up stands; `None` once it is complete.
    resuming: BTreeMap<u64, Option<i64>>,
    /// The last sequence the client got or began from.
    at: BTreeMap<u64, i64>,
    facts_got: BTreeMap<u64, usize>,
}

impl Oracle {
    fn page(&mut self, outbox: &Outbox, conversation: u64, size: usize) {
        let Some(Some(at)) = self.resuming.get_mut(&conversation) else { return };
        let newest = self.newest.get(&conversation).copied().unwrap_or_default();
        let last = newest.min(*at + size as i64);
        for sequence in *at + 1..=last {
            assert_eq!(caught_up(outbox, &message(conversation, sequence)), Delivered::Queued);
        }
        let complete = last - *at < size as i64;
        *at = last;
        if complete {
            release(outbox, conversation, last);
            self.resuming.insert(conversation, None);
        }
    }

    fn got(&mut self, delivery: &Delivery) {
        let conversation = delivery.event().conversation.unwrap().0;
        let at = self.at.entry(conversation).or_default();
        match delivery.event().position {
            Some(position) => {
                assert_eq!(position.sequence, *at + 1, "in {conversation}: a gap, or twice");
                *at = position.sequence;
            }
            None => {
                let index = self.facts_got.entry(conversation).or_default();
                assert!(*at >= self.facts[&conversation][*index], "a fact overtook its message");
                *index += 1;
            }
        }
    }
}

proptest! {
    /// A client that names its conversations at the start gets each one's log from there, whole,
    /// once and in order, however catch-up, live events and reading interleave.
    #[test]
    fn seam_neither_loses_nor_repeats_nor_reorders(
        steps in prop::collection::vec(step(), 1..200),
    ) {
        let limits = OutboxLimits { live_messages_max: 1_000, ..OutboxLimits::default() };
        let outbox = Outbox::new(limits);
        let mut oracle = Oracle::default();
        // Before the session: some history that only catch-up can bring.
        for conversation in 0..CONVERSATIONS {
            oracle.newest.insert(conversation, 5);
            oracle.at.insert(conversation, 5);
        }
        let mut opening = true;
        for step in steps {
            match step {
                Step::Publish(conversation) => {
                    let newest = oracle.newest.get_mut(&conversation).unwrap();
                    *newest += 1;
                    let _ = live(&outbox, &message(conversation, *newest));
                }
                Step::Fact(conversation) => {
                    let newest = oracle.newest[&conversation];
                    oracle.facts.entry(conversation).or_default().push(newest);
                    let _ = live(&outbox, &delivery(conversation, None, b"fact"));
                }
                Step::Mention(conversation, back) => {
                    if opening && !oracle.resuming.contains_key(&conversation) {
                        let after = (oracle.newest[&conversation] - back).max(0);
                        prop_assert_eq!(
                            outbox.mention(ConversationKey(conversation), after, Instant::now()),
                            Mention::Resume
                        );
                        oracle.resuming.insert(conversation, Some(after));
                        oracle.at.insert(conversation, after);
                    }
                }
                Step::Page(conversation, size) => oracle.page(&outbox, conversation, size),
                Step::OpenUp => {
                    opening = false;
                    outbox.open_up(Instant::now());
                }
                Step::Take(count) => {
                    for _ in 0..count {
                        let Some(Ok(delivery)) = take(&outbox) else { break };
                        oracle.got(&delivery);
                    }
                }
            }
        }
        outbox.open_up(Instant::now());
        for conversation in 0..CONVERSATIONS {
            while matches!(oracle.resuming.get(&conversation), Some(Some(_))) {
                oracle.page(&outbox, conversation, 3);
            }
        }
        while let Some(Ok(delivery)) = take(&outbox) {
            oracle.got(&delivery);
        }
        for conversation in 0..CONVERSATIONS {
            prop_assert_eq!(oracle.at[&conversation], oracle.newest[&conversation]);
            let facts = oracle.facts.get(&conversation).map_or(0, Vec::len);
            prop_assert_eq!(oracle.facts_got.get(&conversation).copied().unwrap_or(0), facts);
        }
        let state = outbox.state();
        prop_assert_eq!((state.live.messages, state.live.bytes), (0, 0));
        prop_assert_eq!((state.holding.messages, state.holding.bytes), (0, 0));
        prop_assert_eq!(state.resuming, 0);
        prop_assert_eq!((state.catch_up.messages, state.catch_up.bytes), (0, 0));
    }
}
