//! The limit: an io_uring that only sends the same bytes to the same sockets.

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};

use super::rings::{ENTRIES, FLAGS, Rings, ring};
use crate::clock::now_ns;
use crate::control::Pushed;
use crate::frame;
use crate::generator::Generator;

/// A send, or the rest of one.
struct Send {
    session: usize,
    frames: Rc<Vec<u8>>,
    from: usize,
}

/// Queue of sends, in order.
struct Waiting {
    sends: VecDeque<Send>,
    /// Last batch of each session.
    batch_of: Vec<u64>,
    batch: u64,
}

impl Waiting {
    fn new(sessions: usize) -> Self {
        Self { sends: VecDeque::new(), batch_of: vec![0; sessions], batch: 0 }
    }

    /// Consecutive events for one session are merged into one send.
    fn push(&mut self, session: usize, frame: &Rc<Vec<u8>>) {
        match self.sends.back_mut() {
            Some(last) if last.session == session => {
                Rc::make_mut(&mut last.frames).extend_from_slice(frame);
            }
            _ => self.sends.push_back(Send { session, frames: Rc::clone(frame), from: 0 }),
        }
    }

    /// The next sends that can be in flight together: never two of one socket, because a short send
    /// would let the other one cut into its frame.
    fn next_batch(&mut self, into: &mut Vec<Send>) {
        self.batch += 1;
        while into.len() < ENTRIES as usize
            && self.sends.front().is_some_and(|send| self.batch_of[send.session] != self.batch)
        {
            let send = self.sends.pop_front().expect("checked above");
            self.batch_of[send.session] = self.batch;
            into.push(send);
        }
    }
}

/// Pushes until the generator is finished, with as many sends per submission as fit.
pub(super) fn push(mut generator: Generator, rings: &mut Rings) -> io::Result<Pushed> {
    let generator_ns = generator.total_cost_ns();
    let started_ns = now_ns();
    let mut messages = 0;
    let (mut retries, mut sends) = (0, 0);
    let mut waiting = Waiting::new(rings.sessions());
    let mut in_flight: Vec<Send> = Vec::with_capacity(ENTRIES as usize);
    let mut results = [0; ENTRIES as usize];
    loop {
        while waiting.sends.len() < ENTRIES as usize {
            let Some(item) = generator.next_due() else { break };
            let mut frame = Vec::with_capacity(item.value.len() + 10);
            frame::put(&mut frame, frame::BINARY, &item.value);
            let frame = Rc::new(frame);
            for session in item.sessions {
                messages += 1;
                waiting.push(session, &frame);
            }
        }
        waiting.next_batch(&mut in_flight);
        if in_flight.is_empty() {
            if generator.is_finished() {
                break;
            }
            let wait = generator.due_ns().map_or(0, |due| due.saturating_sub(now_ns()));
            std::thread::sleep(Duration::from_nanos(wait));
            continue;
        }
        for (place, send) in in_flight.iter().enumerate() {
            let bytes = &send.frames[send.from..];
            // SAFETY: the bytes belong to frames that `in_flight` keeps, unchanged, until all
            // completions have been reaped below.
            unsafe { rings.send(send.session, bytes, place) };
        }
        sends += in_flight.len() as u64;
        rings.submit(&mut results)?;
        // The rest of a short send goes first, so that no other frame cuts into it. The client counts
        // sockets that failed.
        for (place, mut send) in in_flight.drain(..).enumerate().rev() {
            let sent = match results[place] {
                error if error == -libc::EAGAIN => 0,
                error if error < 0 => continue,
                sent => sent as usize,
            };
            send.from += sent;
            if send.from < send.frames.len() {
                retries += 1;
                waiting.sends.push_front(send);
            }
        }
    }
    Ok(Pushed {
        messages,
        elapsed_ns: now_ns() - started_ns,
        generator_ns,
        retries,
        sends: Some(sends),
    })
}

/// Size of the receive buffer of each socket in an echo run.
const ECHO_BYTES: usize = 512;
const RECEIVE: u64 = 0;
const SEND: u64 = 1;

/// Echoes every message on these sockets for this time.
pub(super) fn echo(descriptors: &[i32], ms: u64) -> io::Result<()> {
    let mut ring = ring()?;
    let ends = now_ns() + ms * 1_000_000;
    let mut inputs: Vec<Box<[u8; ECHO_BYTES]>> =
        descriptors.iter().map(|_| Box::new([0; ECHO_BYTES])).collect();
    let mut outputs: Vec<Vec<u8>> = descriptors.iter().map(|_| Vec::new()).collect();
    let timeout = Timespec::from(Duration::from_millis(20));
    let arguments = SubmitArgs::new().timespec(&timeout);
    let receive = |inputs: &mut Vec<Box<[u8; ECHO_BYTES]>>, at: usize| {
        opcode::Recv::new(Fd(descriptors[at]), inputs[at].as_mut_ptr(), ECHO_BYTES as u32)
            .build()
            .user_data((at as u64) << 1 | RECEIVE)
    };
    for at in 0..descriptors.len() {
        let entry = receive(&mut inputs, at);
        submit(&mut ring, &entry)?;
    }
    while now_ns() < ends {
        match ring.submitter().submit_with_args(1, &arguments) {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::ETIME) => {}
            Err(error) => return Err(error),
        }
        let completions: Vec<cqueue::Entry> = ring.completion().collect();
        for entry in completions {
            let at = (entry.user_data() >> 1) as usize;
            if entry.user_data() & 1 == SEND || entry.result() <= 0 {
                continue;
            }
            outputs[at].clear();
            let mut used = 0;
            let input = &mut inputs[at][..entry.result() as usize];
            while let Some(found) = frame::parse_masked(&mut input[used..]) {
                frame::put(&mut outputs[at], frame::BINARY, found.payload);
                used += found.total;
            }
            let send = opcode::Send::new(
                Fd(descriptors[at]),
                outputs[at].as_ptr(),
                outputs[at].len() as u32,
            )
            .flags(FLAGS)
            .build()
            .user_data((at as u64) << 1 | SEND);
            submit(&mut ring, &send)?;
            let entry = receive(&mut inputs, at);
            submit(&mut ring, &entry)?;
        }
    }
    // The receives are still armed: the ring ends in the background, so their memory stays.
    std::mem::forget((inputs, outputs));
    Ok(())
}

fn submit(ring: &mut IoUring, entry: &squeue::Entry) -> io::Result<()> {
    // SAFETY: receives point into a box per socket that outlives the ring (it is leaked after the
    // run); sends point into an output that is not touched before the next message of that socket,
    // which comes after this one was answered, and MSG_DONTWAIT completes them within the `enter`.
    while unsafe { ring.submission().push(entry) }.is_err() {
        ring.submit()?;
    }
    Ok(())
}
