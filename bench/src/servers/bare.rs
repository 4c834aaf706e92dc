//! The limit: a ring that sends the same bytes to the same sockets, and nothing else.

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};

use crate::clock::now_ns;
use crate::control::Pushed;
use crate::frame;
use crate::generator::Generator;

const ENTRIES: u32 = 256;
const FLAGS: i32 = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;

fn ring() -> io::Result<IoUring> {
    IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_submit_all()
        .setup_cqsize(32_768)
        .build(ENTRIES)
}

/// A send, or what is left of one.
struct Send {
    descriptor: i32,
    frame: Rc<Vec<u8>>,
    from: usize,
}

/// Pushes until the generator is through: as many sends per submission as fit.
pub(super) fn push(mut generator: Generator, descriptors: &[i32]) -> io::Result<Pushed> {
    let generator_ns = generator.total_cost_ns();
    let mut ring = ring()?;
    let started_ns = now_ns();
    let mut messages = 0;
    let mut retries = 0;
    let mut waiting: VecDeque<Send> = VecDeque::new();
    let mut later: Vec<Send> = Vec::new();
    let mut in_flight: Vec<Option<Send>> = (0..ENTRIES).map(|_| None).collect();
    loop {
        while waiting.len() < ENTRIES as usize {
            let Some(item) = generator.next_due() else { break };
            let mut frame = Vec::with_capacity(item.value.len() + 10);
            frame::put(&mut frame, frame::BINARY, &item.value);
            let frame = Rc::new(frame);
            for session in item.sessions {
                messages += 1;
                let send =
                    Send { descriptor: descriptors[session], frame: Rc::clone(&frame), from: 0 };
                waiting.push_back(send);
            }
        }
        let batch = waiting.len().min(ENTRIES as usize);
        if batch == 0 && later.is_empty() {
            if generator.is_finished() {
                break;
            }
            let wait = generator.due_ns().map_or(0, |due| due.saturating_sub(now_ns()));
            std::thread::sleep(Duration::from_nanos(wait));
            continue;
        }
        for (place, send) in waiting.drain(..batch).enumerate() {
            let bytes = &send.frame[send.from..];
            let entry = opcode::Send::new(Fd(send.descriptor), bytes.as_ptr(), bytes.len() as u32)
                .flags(FLAGS)
                .build()
                .user_data(place as u64);
            in_flight[place] = Some(send);
            // SAFETY: the bytes belong to a frame that `in_flight` keeps until its completion has
            // been reaped below; a send with MSG_DONTWAIT completes within the `enter`. The queue is
            // empty before a batch and as long as one.
            unsafe { ring.submission().push(&entry).expect("a batch fits") };
        }
        ring.submit_and_wait(batch)?;
        for entry in ring.completion() {
            let mut send = in_flight[entry.user_data() as usize].take().expect("completes once");
            let sent = entry.result();
            if sent == -libc::EAGAIN {
                retries += 1;
                later.push(send);
            } else if sent >= 0 && send.from + (sent as usize) < send.frame.len() {
                retries += 1;
                send.from += sent as usize;
                later.push(send);
            }
        }
        assert!(in_flight[..batch].iter().all(Option::is_none), "a send is still under way");
        // Tried again before newer ones, so that no frame is cut in two by another.
        for send in later.drain(..).rev() {
            waiting.push_front(send);
        }
    }
    Ok(Pushed { messages, elapsed_ns: now_ns() - started_ns, generator_ns, retries })
}

/// A buffer per socket, for the time of an echo run.
const ECHO_BYTES: usize = 512;
const RECEIVE: u64 = 0;
const SEND: u64 = 1;

/// Answers every message on these sockets for so long.
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
