//! The epoll server. It also accepts the connections of the bare ring.

use std::io;
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::io::Errno;

use super::bare;
use super::rings::Rings;
use super::table::{COMMAND, LISTENER, Table};
use crate::clock::now_ns;
use crate::control::{self, OpenSessions, Prepared, Pushed, Word};
use crate::frame;
use crate::generator::{Generator, PushPlan};

const EVENTS_MAX: usize = 512;
/// Events sent between two waits for the sockets.
const BATCH: usize = 256;

/// How it sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Engine {
    /// `send(2)`.
    Send,
    /// A ring.
    Uring,
}

struct Server {
    table: Table,
    engine: Engine,
    /// Rings that take over the sockets of open sessions, if parking.
    parking: Option<Rings>,
    push: Option<Push>,
}

struct Push {
    generator: Generator,
    started_ns: u64,
    messages: u64,
    generator_ns: u64,
}

/// Runs until the standard input ends. `park`: rings keep the sockets in their file tables.
pub(super) fn run(
    listener: TcpListener,
    capacity: usize,
    engine: Engine,
    park: bool,
) -> io::Result<()> {
    let parking = park.then(|| Rings::parking(capacity)).transpose()?;
    let table = Table::new(listener, capacity)?;
    let bell = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let flags = EventFlags::IN | EventFlags::ET;
    epoll::add(table.epoll(), &*bell, EventData::new_u64(COMMAND), flags)?;
    let ringer = Arc::clone(&bell);
    let words = control::commands(Word::parse, move || {
        let _ = rustix::io::write(&*ringer, &1_u64.to_ne_bytes()); // fails only if full, which wakes as well
    });
    Server { table, engine, parking, push: None }.serve(&words)
}

impl Server {
    fn serve(&mut self, words: &Receiver<Word>) -> io::Result<()> {
        let mut events: Vec<epoll::Event> = Vec::with_capacity(EVENTS_MAX);
        loop {
            let wait = self.advance();
            events.clear();
            match epoll::wait(
                self.table.epoll(),
                rustix::buffer::spare_capacity(&mut events),
                wait.as_ref(),
            ) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            for event in &events {
                match { event.data }.u64() {
                    LISTENER => self.table.accept()?,
                    COMMAND => {}
                    number => {
                        let flags = event.flags;
                        if flags.contains(EventFlags::OUT) {
                            self.table.flush(number as usize);
                        }
                        if flags != EventFlags::OUT
                            && let Some(session) = self.table.read(number as usize)
                            && let Some(rings) = &mut self.parking
                            && let Some(socket) = self.table.take(session)
                        {
                            rings.park(session, &socket)?;
                        }
                    }
                }
            }
            if !self.obey(words)? {
                return Ok(());
            }
        }
    }

    fn obey(&mut self, words: &Receiver<Word>) -> io::Result<bool> {
        loop {
            let word = match words.try_recv() {
                Ok(word) => word,
                Err(TryRecvError::Empty) => return Ok(true),
                Err(TryRecvError::Disconnected) => return Ok(false),
            };
            match word {
                Word::Sessions => control::answer(&OpenSessions { sessions: self.sessions() }),
                Word::Prepare(_) => control::answer(&Prepared { prepared: false }),
                Word::Push(plan) => self.begin(plan)?,
                Word::Echo(ms) if self.engine == Engine::Uring => {
                    let descriptors: Vec<i32> = self.table.descriptors().collect();
                    bare::echo(&descriptors, ms)?;
                }
                Word::Presence | Word::Calls | Word::Echo(_) => {}
                Word::Quit => return Ok(false),
            }
        }
    }

    fn sessions(&self) -> usize {
        self.parking.as_ref().map_or(self.table.open, Rings::sessions)
    }

    fn begin(&mut self, plan: PushPlan) -> io::Result<()> {
        let generator = Generator::new(plan, self.sessions());
        match self.engine {
            Engine::Send => {
                let generator_ns = generator.total_cost_ns();
                self.push =
                    Some(Push { generator, started_ns: now_ns(), messages: 0, generator_ns });
                Ok(())
            }
            Engine::Uring => {
                let pushed = match &mut self.parking {
                    Some(rings) => bare::push(generator, rings)?,
                    None => {
                        let descriptor = |session| {
                            self.table.of(session).map_or(-1, |found| found.socket.as_raw_fd())
                        };
                        let descriptors = (0..self.table.open).map(descriptor).collect();
                        bare::push(generator, &mut Rings::of(descriptors)?)?
                    }
                };
                control::answer(&pushed);
                Ok(())
            }
        }
    }

    /// Pushes due events. Returns the timeout for epoll.
    fn advance(&mut self) -> Option<Timespec> {
        let no_wait = Some(Timespec { tv_sec: 0, tv_nsec: 0 });
        let Some(push) = &mut self.push else { return None };
        let mut frames = Vec::new();
        for _ in 0..BATCH {
            let Some(item) = push.generator.next_due() else { break };
            frames.clear();
            frame::put(&mut frames, frame::BINARY, &item.value);
            for session in item.sessions {
                push.messages += 1;
                if let Some(connection) = self.table.of(session) {
                    let number = connection.socket.as_raw_fd() as usize;
                    self.table.send(number, &frames);
                }
            }
        }
        if push.generator.is_finished() {
            if self.table.unsent > 0 {
                return None; // epoll reports when they can be sent
            }
            control::answer(&Pushed {
                messages: push.messages,
                elapsed_ns: now_ns() - push.started_ns,
                generator_ns: push.generator_ns,
                retries: 0,
                sends: Some(push.messages),
            });
            self.push = None;
            return None;
        }
        match push.generator.due_ns().map(|due| due.saturating_sub(now_ns())) {
            None | Some(0) => no_wait,
            Some(wait) => Some(Timespec {
                tv_sec: (wait / 1_000_000_000) as i64,
                tv_nsec: (wait % 1_000_000_000) as i64,
            }),
        }
    }
}
