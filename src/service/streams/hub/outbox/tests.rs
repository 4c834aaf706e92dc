use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::domain::caught_up::SequenceRun;
use crate::domain::encoding::Encoding;
use crate::domain::event::Event;
use crate::domain::ids::ConversationPosition;
use crate::service::streams::hub::delivery::Notices;

fn delivery(conversation: u64, sequence: Option<i64>, bytes: &[u8]) -> Arc<Delivery> {
    let conversation = ConversationKey(conversation);
    let position = sequence.map(|sequence| ConversationPosition { conversation, sequence });
    let event = Event::new(position, 0)
        .of_conversation(conversation)
        .with_frame(Encoding::Stream, bytes.into());
    Delivery::new(Arc::new(event), None, None, &Arc::new(Notices::default())).unwrap()
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

fn live(outbox: &Outbox, delivery: &Arc<Delivery>) -> DeliverOutcome {
    outbox.deliver(DeliveryClass::Live, delivery, Instant::now())
}

fn caught_up(outbox: &Outbox, delivery: &Arc<Delivery>) -> DeliverOutcome {
    outbox.deliver(DeliveryClass::CatchUp, delivery, Instant::now())
}

/// How long the outboxes of these tests remember what catch-up delivered.
const DEDUPE: Duration = Duration::from_secs(300);

/// Catch-up has delivered these sequences.
fn go_live(outbox: &Outbox, conversation: u64, sequences: impl IntoIterator<Item = i64>) {
    go_live_at(outbox, conversation, sequences, Instant::now());
}

fn go_live_at(
    outbox: &Outbox,
    conversation: u64,
    sequences: impl IntoIterator<Item = i64>,
    now: Instant,
) {
    let conversation = ConversationKey(conversation);
    let run = |sequence| SequenceRun::one(ConversationPosition { conversation, sequence });
    let delivered = CaughtUp::new(Some(conversation), sequences.into_iter().map(run).collect());
    outbox.go_live(Box::new(delivered), now, now + DEDUPE);
}

fn open(limits: &OutboxLimits) -> Outbox {
    let outbox = Outbox::new(limits);
    outbox.opening_done(Instant::now());
    outbox
}

fn open_default() -> Outbox {
    open(&OutboxLimits::default())
}

fn catch_up(outbox: &Outbox, conversation: u64) {
    let report = outbox.report_position(ConversationKey(conversation), Instant::now());
    assert_eq!(report, PositionReport::CatchUp);
}

#[test]
fn live_events_are_held_for_their_own_conversation_only() {
    let outbox = open_default();
    catch_up(&outbox, 1);
    assert_eq!(live(&outbox, &message(1, 6)), DeliverOutcome::Held);
    assert_eq!(live(&outbox, &message(2, 70)), DeliverOutcome::Queued);
    assert_eq!(caught_up(&outbox, &message(1, 5)), DeliverOutcome::Queued);
    assert_eq!(caught_up(&outbox, &message(1, 6)), DeliverOutcome::Queued);
    assert_eq!(live(&outbox, &message(1, 7)), DeliverOutcome::Held);
    assert_eq!(sequences(&outbox), [70, 5, 6]);
    go_live(&outbox, 1, [5, 6]);
    assert_eq!(sequences(&outbox), [7]);
    assert_eq!(live(&outbox, &message(1, 6)), DeliverOutcome::Duplicate);
}

/// Issue “From the log to the members”: “the message service commits a lower sequence late”. Neither a
/// position that the client names, nor one that it acknowledges, nor a higher message that catch-up
/// delivered makes it a duplicate.
#[test]
fn only_exactly_what_catch_up_delivered_is_a_duplicate() {
    let outbox = open_default();
    catch_up(&outbox, 1);
    assert_eq!(live(&outbox, &message(1, 3)), DeliverOutcome::Held);
    assert_eq!(caught_up(&outbox, &message(1, 4)), DeliverOutcome::Queued);
    go_live(&outbox, 1, [4]);
    assert_eq!(
        outbox.report_position(ConversationKey(1), Instant::now()),
        PositionReport::Acknowledged
    );
    assert_eq!(live(&outbox, &message(1, 9)), DeliverOutcome::Queued);
    assert_eq!(live(&outbox, &message(1, 4)), DeliverOutcome::Duplicate);
    assert_eq!(live(&outbox, &message(1, 2)), DeliverOutcome::Queued);
    assert_eq!(sequences(&outbox), [4, 3, 9, 2]);
}

#[test]
fn what_catch_up_has_delivered_is_forgotten_in_time() {
    let (outbox, start) = (open_default(), Instant::now());
    for (conversation, second) in [(1, 0), (2, 10), (3, 20)] {
        catch_up(&outbox, conversation);
        go_live_at(&outbox, conversation, [7], start + Duration::from_secs(second));
    }
    for (second, expected) in [(0, [true; 3]), (10, [false, true, true]), (25, [false; 3])] {
        outbox.forget_delivered(
            start + DEDUPE + Duration::from_secs(second) - Duration::from_secs(1),
        );
        let known = [1, 2, 3].map(|it| outbox.state().is_duplicate(&message(it, 7)));
        assert_eq!(known, expected, "{second}");
    }
}

#[test]
fn held_events_have_their_own_limits() {
    let limits = OutboxLimits { hold_messages_max: 2, ..OutboxLimits::default() };
    let outbox = open(&limits);
    catch_up(&outbox, 1);
    for sequence in 1..=128 {
        let expected = match sequence {
            96 => DeliverOutcome::QueuedLong,
            _ => DeliverOutcome::Queued,
        };
        assert_eq!(live(&outbox, &message(2, sequence)), expected);
    }
    assert_eq!(live(&outbox, &message(2, 129)), DeliverOutcome::Overflow);
    assert_eq!(live(&outbox, &message(1, 1)), DeliverOutcome::Held);
    assert_eq!(live(&outbox, &message(1, 2)), DeliverOutcome::Held);
    assert_eq!(live(&outbox, &message(1, 3)), DeliverOutcome::CatchUpOverflow);
    // Released events do not count against the limit of live events.
    go_live(&outbox, 1, []);
    drop(take(&outbox));
    assert_eq!(live(&outbox, &message(2, 129)), DeliverOutcome::Queued);
    assert_eq!(live(&outbox, &message(1, 3)), DeliverOutcome::Overflow);
}

#[test]
fn catch_up_without_progress_is_reported() {
    let (outbox, start) = (open_default(), Instant::now());
    let later = |seconds| start + std::time::Duration::from_secs(seconds);
    assert_eq!(outbox.catch_up_since(), None);
    let _ = outbox.report_position(ConversationKey(1), later(1));
    let _ = outbox.report_position(ConversationKey(2), later(2));
    assert_eq!(outbox.catch_up_since(), Some(later(1)));
    go_live_at(&outbox, 2, [], later(3));
    assert_eq!(outbox.catch_up_since(), Some(later(3)));
    go_live_at(&outbox, 1, [], later(4));
    assert_eq!(outbox.catch_up_since(), None);
}

#[test]
fn live_events_are_limited_in_bytes_but_one_always_fits() {
    let limits = OutboxLimits { live_bytes_max: 10, ..OutboxLimits::default() };
    let outbox = open(&limits);
    assert_eq!(live(&outbox, &delivery(1, None, &[0; 11])), DeliverOutcome::QueuedLong);
    assert_eq!(live(&outbox, &delivery(1, None, &[0; 1])), DeliverOutcome::Overflow);
    drop(take(&outbox));
    assert_eq!(live(&outbox, &delivery(1, None, &[0; 4])), DeliverOutcome::Queued);
    assert_eq!(live(&outbox, &delivery(1, None, &[0; 6])), DeliverOutcome::QueuedLong);
    assert_eq!(live(&outbox, &delivery(1, None, &[0; 1])), DeliverOutcome::Overflow);
}

#[test]
fn queue_that_is_nearly_full_is_awaited_until_half_of_it_is_free() {
    let limits = OutboxLimits { live_bytes_max: 12, ..OutboxLimits::default() };
    let outbox = open(&limits);
    let drained = || outbox.drained().ends_wait;
    assert_eq!(live(&outbox, &delivery(1, None, &[0; 8])), DeliverOutcome::Queued);
    assert!(!outbox.awaits_writer());
    // Longer than what is left: no overflow, because nothing has waited for its queue yet.
    assert_eq!(live(&outbox, &delivery(1, None, &[0; 7])), DeliverOutcome::QueuedLong);
    drop(take(&outbox));
    assert!(outbox.awaits_writer() && !drained());
    drop(take(&outbox));
    assert!(!outbox.awaits_writer() && drained() && !drained());
    assert_eq!(live(&outbox, &delivery(1, None, &[0; 12])), DeliverOutcome::QueuedLong);
    outbox.close(Status::aborted(""), Unsent::Send);
    assert!(!outbox.awaits_writer());
}

#[test]
fn caught_up_messages_have_their_own_limits() {
    let limits = OutboxLimits { catch_up_messages_max: 2, ..OutboxLimits::default() };
    let outbox = Outbox::new(&limits);
    assert_eq!(caught_up(&outbox, &message(1, 1)), DeliverOutcome::Queued);
    assert_eq!(caught_up(&outbox, &message(1, 2)), DeliverOutcome::Queued);
    assert_eq!(caught_up(&outbox, &message(1, 3)), DeliverOutcome::CatchUpOverflow);
    assert_eq!(live(&outbox, &message(2, 1)), DeliverOutcome::Held);
}

#[test]
fn conversations_of_a_session_are_limited() {
    let limits = OutboxLimits { conversations_max: 1, ..OutboxLimits::default() };
    let outbox = Outbox::new(&limits);
    catch_up(&outbox, 1);
    assert_eq!(outbox.report_position(ConversationKey(2), Instant::now()), PositionReport::TooMany);
    assert_eq!(
        outbox.report_position(ConversationKey(1), Instant::now()),
        PositionReport::Acknowledged
    );
}

#[test]
fn opening_stops_before_its_held_events_overflow() {
    let outbox = Outbox::new(&OutboxLimits { hold_messages_max: 4, ..OutboxLimits::default() });
    catch_up(&outbox, 2);
    for sequence in 1..=2 {
        assert_eq!(live(&outbox, &message(1, sequence)), DeliverOutcome::Held);
    }
    assert!(take(&outbox).is_none());
    assert_eq!(live(&outbox, &message(2, 1)), DeliverOutcome::Held);
    assert_eq!(sequences(&outbox), [1, 2]);
    assert_eq!(live(&outbox, &message(2, 2)), DeliverOutcome::Held);
}

#[test]
fn close_sends_queued_events_and_drops_held_events() {
    let outbox = open_default();
    catch_up(&outbox, 1);
    let _ = live(&outbox, &message(2, 1));
    let _ = live(&outbox, &message(1, 1));
    assert_eq!(outbox.close(Status::aborted("first"), Unsent::Send), 1);
    assert_eq!(outbox.close(Status::internal("second"), Unsent::Send), 0);
    assert_eq!(live(&outbox, &message(2, 2)), DeliverOutcome::Ended);
    go_live(&outbox, 1, []);
    assert_eq!(take(&outbox).unwrap().unwrap().event().position.unwrap().sequence, 1);
    assert_eq!(take(&outbox).unwrap().unwrap_err().message(), "first");
}

#[test]
fn stall_is_measured_from_the_last_event_taken() {
    let outbox = open_default();
    assert_eq!(outbox.unread_since(), None);
    let _ = live(&outbox, &message(1, 1));
    let first = outbox.unread_since().unwrap();
    let _ = live(&outbox, &message(1, 2));
    assert_eq!(outbox.unread_since(), Some(first));
    drop(take(&outbox));
    assert!(outbox.unread_since().unwrap() > first);
    drop(take(&outbox));
    assert_eq!(outbox.unread_since(), None);
}

/// A client that opens its window a little at a time keeps it closed.
#[test]
fn events_wait_for_a_window_until_all_that_the_writer_has_is_out() {
    let outbox = open_default();
    let _ = live(&outbox, &message(1, 1));
    let start = Instant::now();
    let after = |us| start + Duration::from_micros(us);
    assert_eq!(outbox.waiting_for_window(after(5_000)), None, "the writer has not run");
    for us in [0, 500, 1_000] {
        outbox.let_out(10, after(us));
    }
    assert_eq!(outbox.waiting_for_window(after(999)), None);
    assert_eq!(outbox.waiting_for_window(after(1_000)).unwrap().0, 1);
    outbox.let_out(0, after(1_100));
    outbox.let_out(10, after(1_100));
    assert_eq!(outbox.waiting_for_window(after(2_000)), None);
}

/// One random action. Conversations are numbered; each has an append-only log.
#[derive(Clone, Debug)]
enum Action {
    Publish(u64),
    /// An event without a sequence.
    Unsequenced(u64),
    ReportPosition(u64, i64),
    /// Catch-up delivers a page of at most this many messages.
    Page(u64, usize),
    OpeningDone,
    Take(usize),
}

const CONVERSATIONS: u64 = 3;
/// Messages of each conversation from before the session.
const BEFORE: i64 = 5;

fn action() -> impl Strategy<Value = Action> {
    let conversation = 0..CONVERSATIONS;
    prop_oneof![
        4 => conversation.clone().prop_map(Action::Publish),
        1 => conversation.clone().prop_map(Action::Unsequenced),
        1 => (conversation.clone(), 0_i64..8).prop_map(|(c, back)| Action::ReportPosition(c, back)),
        3 => (conversation, 1_usize..4).prop_map(|(c, size)| Action::Page(c, size)),
        1 => Just(Action::OpeningDone),
        3 => (1_usize..5).prop_map(Action::Take),
    ]
}

/// Model: the logs, the catch-up positions, and what the client has received.
#[derive(Debug, Default)]
struct Model {
    /// Sequence of the newest message.
    newest: BTreeMap<u64, i64>,
    /// For each unsequenced event, the newest sequence when it was published.
    unsequenced: BTreeMap<u64, Vec<i64>>,
    /// Position of catch-up; `None` once it is complete.
    catching_up: BTreeMap<u64, Option<i64>>,
    /// The position that the client named.
    named: BTreeMap<u64, i64>,
    /// Last sequence received, or the start position.
    received: BTreeMap<u64, i64>,
    unsequenced_received: BTreeMap<u64, usize>,
}

impl Model {
    fn page(&mut self, outbox: &Outbox, conversation: u64, size: usize) {
        let Some(Some(at)) = self.catching_up.get_mut(&conversation) else { return };
        let newest = self.newest.get(&conversation).copied().unwrap_or_default();
        let last = newest.min(*at + size as i64);
        for sequence in *at + 1..=last {
            assert_eq!(caught_up(outbox, &message(conversation, sequence)), DeliverOutcome::Queued);
        }
        let complete = last - *at < size as i64;
        *at = last;
        if complete {
            go_live(outbox, conversation, self.named[&conversation] + 1..=last);
            self.catching_up.insert(conversation, None);
        }
    }

    fn receive(&mut self, delivery: &Delivery) {
        let conversation = delivery.event().conversation.unwrap().0;
        let at = self.received.entry(conversation).or_default();
        match delivery.event().position {
            Some(position) => {
                assert_eq!(
                    position.sequence,
                    *at + 1,
                    "conversation {conversation}: gap or duplicate"
                );
                *at = position.sequence;
            }
            None => {
                let index = self.unsequenced_received.entry(conversation).or_default();
                assert!(
                    *at >= self.unsequenced[&conversation][*index],
                    "an unsequenced event overtook a message"
                );
                *index += 1;
            }
        }
    }
}

proptest! {
    /// A client that reports its positions during the opening receives each log from there completely,
    /// once and in order, for any interleaving of catch-up, live events and reads.
    #[test]
    fn catch_up_to_live_neither_loses_nor_repeats_nor_reorders(
        actions in prop::collection::vec(action(), 1..200),
    ) {
        let limits = OutboxLimits { live_messages_max: 1_000, ..OutboxLimits::default() };
        let outbox = Outbox::new(&limits);
        let mut model = Model::default();
        // Only catch-up can deliver these.
        for conversation in 0..CONVERSATIONS {
            model.newest.insert(conversation, BEFORE);
            model.received.insert(conversation, BEFORE);
        }
        let mut opening = true;
        for action in actions {
            match action {
                Action::Publish(conversation) => {
                    let newest = model.newest.get_mut(&conversation).unwrap();
                    *newest += 1;
                    let _ = live(&outbox, &message(conversation, *newest));
                }
                Action::Unsequenced(conversation) => {
                    let newest = model.newest[&conversation];
                    model.unsequenced.entry(conversation).or_default().push(newest);
                    let _ = live(&outbox, &delivery(conversation, None, b"unsequenced"));
                }
                Action::ReportPosition(conversation, back) => {
                    if opening && !model.catching_up.contains_key(&conversation) {
                        // What a client has is from before the session.
                        let after = (BEFORE - back).max(0);
                        prop_assert_eq!(
                            outbox.report_position(ConversationKey(conversation), Instant::now()),
                            PositionReport::CatchUp
                        );
                        model.catching_up.insert(conversation, Some(after));
                        model.named.insert(conversation, after);
                        model.received.insert(conversation, after);
                    }
                }
                Action::Page(conversation, size) => model.page(&outbox, conversation, size),
                Action::OpeningDone => {
                    opening = false;
                    outbox.opening_done(Instant::now());
                }
                Action::Take(count) => {
                    for _ in 0..count {
                        let Some(Ok(delivery)) = take(&outbox) else { break };
                        model.receive(&delivery);
                    }
                }
            }
        }
        outbox.opening_done(Instant::now());
        for conversation in 0..CONVERSATIONS {
            while matches!(model.catching_up.get(&conversation), Some(Some(_))) {
                model.page(&outbox, conversation, 3);
            }
        }
        while let Some(Ok(delivery)) = take(&outbox) {
            model.receive(&delivery);
        }
        for conversation in 0..CONVERSATIONS {
            prop_assert_eq!(model.received[&conversation], model.newest[&conversation]);
            let unsequenced = model.unsequenced.get(&conversation).map_or(0, Vec::len);
            prop_assert_eq!(model.unsequenced_received.get(&conversation).copied().unwrap_or(0), unsequenced);
        }
        let state = outbox.state();
        prop_assert_eq!((state.live.messages, state.live.bytes), (0, 0));
        prop_assert_eq!((state.holding.messages, state.holding.bytes), (0, 0));
        prop_assert_eq!(state.catching_up, 0);
        prop_assert_eq!((state.catch_up.messages, state.catch_up.bytes), (0, 0));
    }
}
