//! Send queues: linked lists of frames in one pool per shard. A queue itself is a few numbers, and
//! has no allocation of its own.

use std::rc::Rc;

use crate::domain::encoding::Encoding;
use crate::domain::event::Event;
use crate::domain::outgoing::Outgoing;
use crate::uring::SendBuffer;

/// The end of a list.
const NONE: u32 = u32::MAX;
/// Pool entries that stay allocated when fewer are in use.
const FRAMES_KEPT: usize = 4096;

/// The entries of all queues of a shard.
#[derive(Debug)]
pub struct FramePool {
    nodes: Vec<QueuedFrame>,
    free: u32,
    used: usize,
}

#[derive(Debug)]
struct QueuedFrame {
    /// `None`: the entry is free.
    outgoing: Option<Rc<Outgoing>>,
    next: u32,
}

impl Default for FramePool {
    fn default() -> Self {
        Self { nodes: Vec::new(), free: NONE, used: 0 }
    }
}

impl FramePool {
    /// Memory of one queued frame besides the frame itself, bytes.
    pub const FRAME_BYTES: usize = size_of::<QueuedFrame>();

    /// Entries in use: frames in all queues.
    pub fn used(&self) -> usize {
        self.used
    }

    /// Entries that memory is allocated for.
    pub fn allocated(&self) -> usize {
        self.nodes.capacity()
    }

    fn take(&mut self, outgoing: Rc<Outgoing>) -> u32 {
        self.used += 1;
        let node = QueuedFrame { outgoing: Some(outgoing), next: NONE };
        if self.free == NONE {
            let index = u32::try_from(self.nodes.len()).expect("nodes fit 32 bits");
            self.nodes.push(node);
            index
        } else {
            let index = self.free;
            self.free = std::mem::replace(&mut self.nodes[index as usize], node).next;
            index
        }
    }

    fn release(&mut self, index: u32) -> (Rc<Outgoing>, u32) {
        let node = &mut self.nodes[index as usize];
        let outgoing = node.outgoing.take().expect("a linked node is in use");
        let next = std::mem::replace(&mut node.next, self.free);
        self.free = index;
        self.used -= 1;
        if self.used == 0 && self.nodes.len() > FRAMES_KEPT {
            // No list refers to any entry now, so this is the moment to shrink.
            self.nodes.clear();
            self.nodes.shrink_to(FRAMES_KEPT);
            self.free = NONE;
        }
        (outgoing, next)
    }

    fn outgoing(&self, index: u32) -> &Rc<Outgoing> {
        self.nodes[index as usize].outgoing.as_ref().expect("a linked node is in use")
    }
}

/// The frames queued for one connection, oldest first. The front frame may have been sent in part.
#[derive(Debug)]
pub struct SendQueue {
    front: u32,
    back: u32,
    /// Queued bytes: those of all frames minus [`SendQueue::front_sent`].
    bytes: u32,
    /// Bytes of the front frame that have been sent.
    front_sent: u32,
    frames: u16,
    /// The encoding of the frames.
    encoding: Encoding,
    /// Frames sent since the last cursor, at most 255. Counted by the owner, and only for sessions that get cursors. It
    /// is here because a queue has a byte to spare, and a connection has none.
    pub since_cursor: u8,
}

impl SendQueue {
    /// An empty queue for a connection of this encoding.
    pub fn new(encoding: Encoding) -> Self {
        Self {
            front: NONE,
            back: NONE,
            bytes: 0,
            front_sent: 0,
            frames: 0,
            encoding,
            since_cursor: 0,
        }
    }

    /// Changes the encoding. The queue must be empty.
    pub fn set_encoding(&mut self, encoding: Encoding) {
        assert!(self.is_empty());
        self.encoding = encoding;
    }

    /// The encoding of the frames.
    pub fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// Whether the queue is empty.
    pub fn is_empty(&self) -> bool {
        self.frames == 0
    }

    /// Queued frames, including one that was sent in part.
    pub fn frames(&self) -> usize {
        usize::from(self.frames)
    }

    /// Queued bytes.
    pub fn bytes(&self) -> usize {
        self.bytes as usize
    }

    /// What the frames would cost if no other queue had them, bytes.
    pub fn cost(&self) -> u64 {
        u64::from(self.bytes) + u64::from(self.frames) * Event::OVERHEAD_BYTES
    }

    #[cfg(any(test, feature = "simulation"))]
    /// The events among the frames.
    pub fn events<'a>(&self, pool: &'a FramePool) -> impl Iterator<Item = &'a Rc<Outgoing>> {
        let in_list = |node: u32| (node != NONE).then_some(node);
        let next = move |node: &u32| in_list(pool.nodes[*node as usize].next);
        let nodes = std::iter::successors(in_list(self.front), next);
        nodes.map(|node| pool.outgoing(node)).filter(|outgoing| outgoing.as_event().is_some())
    }

    /// Whether the front frame has been sent in part. It must be completed before anything else is
    /// sent.
    pub fn is_mid_frame(&self) -> bool {
        self.front_sent > 0
    }

    /// Appends a frame. The caller has checked the limits and that the frame exists in this
    /// encoding.
    pub fn push(&mut self, pool: &mut FramePool, outgoing: Rc<Outgoing>) {
        let length = outgoing.bytes(self.encoding).map_or(0, <[u8]>::len);
        assert!(length > 0, "an empty frame would never be sent");
        self.bytes = u32::try_from(self.bytes() + length).expect("the queue's byte limit fits");
        self.frames = self.frames.checked_add(1).expect("the queue's frame limit fits");
        let node = pool.take(outgoing);
        if self.back == NONE {
            self.front = node;
        } else {
            pool.nodes[self.back as usize].next = node;
        }
        self.back = node;
    }

    /// Removes the oldest frame as a whole. For queues from which nothing is being sent.
    pub fn pop(&mut self, pool: &mut FramePool) -> Option<Rc<Outgoing>> {
        if self.is_empty() {
            return None;
        }
        let length = self.front_length(pool);
        let left = length - self.front_sent as usize;
        Some(self.remove_front(pool, left))
    }

    /// Counts `sent` more bytes as sent. Removes the frames that are complete now and passes each
    /// to `done`.
    pub fn advance(
        &mut self,
        pool: &mut FramePool,
        mut sent: usize,
        mut done: impl FnMut(Rc<Outgoing>),
    ) {
        assert!(sent <= self.bytes(), "sent {sent} of {}", self.bytes());
        while sent > 0 {
            let left = self.front_length(pool) - self.front_sent as usize;
            if sent < left {
                self.front_sent += sent as u32;
                self.bytes -= sent as u32;
                return;
            }
            sent -= left;
            done(self.remove_front(pool, left));
        }
    }

    /// Drops all frames except those that were begun, and passes each dropped frame to `dropped`. Begun are one that was
    /// sent in part, and those of which at least a byte is among the first `sealed` bytes.
    pub fn cut(
        &mut self,
        pool: &mut FramePool,
        sealed: usize,
        mut dropped: impl FnMut(Rc<Outgoing>),
    ) {
        let front_sent = self.front_sent;
        let mut kept = Vec::new();
        let mut kept_bytes = 0;
        while !self.is_empty() && (kept_bytes < sealed || self.is_mid_frame()) {
            let left = self.front_left(pool);
            kept_bytes += left;
            kept.push(self.remove_front(pool, left));
        }
        self.clear(pool, &mut dropped);
        for outgoing in kept {
            self.push(pool, outgoing);
        }
        if !self.is_empty() {
            self.front_sent = front_sent;
            self.bytes -= front_sent;
        }
    }

    /// Appends the first `length` bytes of the queue to `out`.
    pub fn copy_front(&self, pool: &FramePool, length: usize, out: &mut Vec<u8>) {
        assert!(length <= self.bytes());
        let (mut node, mut from, mut missing) = (self.front, self.front_sent as usize, length);
        while missing > 0 {
            let bytes = &pool.outgoing(node).bytes(self.encoding).unwrap_or_default()[from..];
            let piece = &bytes[..bytes.len().min(missing)];
            out.extend_from_slice(piece);
            missing -= piece.len();
            (node, from) = (pool.nodes[node as usize].next, 0);
        }
    }

    /// Drops all frames and passes each to `dropped`.
    pub fn clear(&mut self, pool: &mut FramePool, mut dropped: impl FnMut(Rc<Outgoing>)) {
        while let Some(outgoing) = self.pop(pool) {
            dropped(outgoing);
        }
        assert_eq!((self.bytes, self.front_sent), (0, 0));
    }

    /// The buffer of the next send: one frame from shared memory, or as many frames as fit into
    /// `limit` bytes, copied into a buffer from `staging`. `staging` is called only if several
    /// frames fit, and returns an empty buffer; if it returns `None`, one frame is sent alone. The
    /// queue keeps all frames until [`SendQueue::advance`].
    pub fn next_send(
        &self,
        pool: &FramePool,
        limit: usize,
        staging: impl FnOnce() -> Option<Vec<u8>>,
    ) -> Option<SendBuffer> {
        if self.is_empty() {
            return None;
        }
        let front = || {
            let outgoing = Rc::clone(pool.outgoing(self.front));
            Some(SendBuffer::shared(outgoing, self.encoding, self.front_sent as usize))
        };
        let second = pool.nodes[self.front as usize].next;
        if second == NONE || self.front_left(pool) + self.length(pool, second) > limit {
            return front();
        }
        let Some(mut staging) = staging() else { return front() };
        assert!(staging.is_empty());
        let mut node = self.front;
        let mut from = self.front_sent as usize;
        while node != NONE {
            let bytes = pool.outgoing(node).bytes(self.encoding).unwrap_or_default();
            if staging.len() + bytes.len() - from > limit {
                break;
            }
            staging.extend_from_slice(&bytes[from..]);
            from = 0;
            node = pool.nodes[node as usize].next;
        }
        Some(SendBuffer::batch(staging))
    }

    fn length(&self, pool: &FramePool, node: u32) -> usize {
        pool.outgoing(node).bytes(self.encoding).map_or(0, <[u8]>::len)
    }

    fn front_length(&self, pool: &FramePool) -> usize {
        assert!(!self.is_empty());
        self.length(pool, self.front)
    }

    fn front_left(&self, pool: &FramePool) -> usize {
        self.front_length(pool) - self.front_sent as usize
    }

    /// `left` is the value of [`SendQueue::front_left`].
    fn remove_front(&mut self, pool: &mut FramePool, left: usize) -> Rc<Outgoing> {
        let (outgoing, next) = pool.release(self.front);
        self.front = next;
        self.frames -= 1;
        self.bytes -= left as u32;
        self.front_sent = 0;
        if self.frames == 0 {
            self.front = NONE;
            self.back = NONE;
        }
        outgoing
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(byte: u8, length: usize) -> Rc<Outgoing> {
        Outgoing::own(vec![byte; length].into())
    }

    #[test]
    fn one_frame_is_sent_in_place_and_several_are_copied() {
        let mut pool = FramePool::default();
        let mut queue = SendQueue::new(Encoding::Binary);
        assert!(queue.next_send(&pool, 100, || unreachable!()).is_none());
        let first = frame(1, 10);
        let address = first.bytes(Encoding::Binary).unwrap().as_ptr();
        queue.push(&mut pool, first);
        let buffer = queue.next_send(&pool, 100, || unreachable!()).unwrap();
        assert_eq!(buffer.as_ptr(), address);
        queue.push(&mut pool, frame(2, 5));
        queue.push(&mut pool, frame(3, 90));
        let buffer = queue.next_send(&pool, 100, || Some(Vec::new())).unwrap();
        assert_eq!(buffer[..], [&[1; 10][..], &[2; 5]].concat());
        queue.clear(&mut pool, drop);
        assert_eq!(pool.used(), 0);
    }

    #[test]
    fn cut_keeps_the_rest_of_a_frame_that_was_begun() {
        let mut pool = FramePool::default();
        let mut queue = SendQueue::new(Encoding::Binary);
        for byte in 0..3 {
            queue.push(&mut pool, frame(byte, 10));
        }
        queue.advance(&mut pool, 14, drop);
        let mut gone = 0;
        queue.cut(&mut pool, 0, |_| gone += 1);
        assert_eq!((gone, queue.frames(), queue.bytes()), (1, 1, 6));
        let rest = queue.next_send(&pool, 100, || None).unwrap();
        assert_eq!(rest[..], [1; 6]);
        queue.advance(&mut pool, 6, drop);
        assert!(queue.is_empty() && !queue.is_mid_frame());
    }

    #[test]
    fn cut_keeps_the_frames_that_are_sealed_in_part() {
        let mut pool = FramePool::default();
        let mut queue = SendQueue::new(Encoding::Binary);
        for byte in 0..4 {
            queue.push(&mut pool, frame(byte, 10));
        }
        queue.advance(&mut pool, 4, drop);
        let mut gone = 0;
        queue.cut(&mut pool, 7, |_| gone += 1);
        assert_eq!((gone, queue.frames(), queue.bytes()), (2, 2, 16));
        let mut front = Vec::new();
        queue.copy_front(&pool, 7, &mut front);
        assert_eq!(front, [0, 0, 0, 0, 0, 0, 1]);
        queue.clear(&mut pool, drop);
    }

    proptest! {
        /// Several queues on one pool, checked against byte strings: however the sends are split,
        /// the bytes come out in order, without loss or duplicates.
        #[test]
        fn bytes_come_out_in_order(
            steps in prop::collection::vec((0..3usize, any::<bool>(), 1..300usize), 1..400),
        ) {
            let mut pool = FramePool::default();
            let mut queues: Vec<_> = (0..3).map(|_| SendQueue::new(Encoding::Binary)).collect();
            let mut expected = vec![Vec::new(); 3];
            let mut sent = vec![Vec::new(); 3];
            for (number, (which, push, amount)) in steps.into_iter().enumerate() {
                let queue = &mut queues[which];
                if push {
                    queue.push(&mut pool, frame(number as u8, amount));
                    expected[which].extend(vec![number as u8; amount]);
                } else if let Some(buffer) = queue.next_send(&pool, 256, || Some(Vec::new())) {
                    let taken = amount.min(buffer.len());
                    sent[which].extend_from_slice(&buffer[..taken]);
                    queue.advance(&mut pool, taken, drop);
                }
                prop_assert_eq!(queue.bytes(), expected[which].len() - sent[which].len());
            }
            for (which, queue) in queues.iter_mut().enumerate() {
                while let Some(buffer) = queue.next_send(&pool, 256, || Some(Vec::new())) {
                    sent[which].extend_from_slice(&buffer);
                    queue.advance(&mut pool, buffer.len(), drop);
                }
            }
            prop_assert_eq!(sent, expected);
            prop_assert_eq!(pool.used(), 0);
        }
    }
}
