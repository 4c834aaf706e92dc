//! tokio-uring, a task per connection, and tungstenite over bytes in memory: it knows no io_uring.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio_uring::net::TcpStream;
use tungstenite::protocol::{Role, WebSocket, WebSocketConfig};
use tungstenite::{Bytes, Message};

use crate::clock::now_ns;
use crate::control::{self, Prepared, Pushed, Sessions, Word, word};
use crate::frame;
use crate::generator::{Generator, Plan};
use crate::names;

/// Messages that wait for one session, as in Delivery.
const QUEUE: usize = 128;
const READ_BYTES: usize = 4096;
/// tokio-uring submits when its thread parks; a yield does not park it.
const PARK: Duration = Duration::from_millis(1);

/// One session's events, and the bell of its writer.
#[derive(Default)]
struct Mailbox {
    events: RefCell<VecDeque<Bytes>>,
    bell: Notify,
}

struct Shared {
    sessions: RefCell<Vec<Option<Rc<Mailbox>>>>,
    open: Cell<usize>,
    sent: Cell<u64>,
}

/// Bytes in memory as the stream that tungstenite wants.
#[derive(Default)]
struct Pipe {
    input: VecDeque<u8>,
    output: Vec<u8>,
}

impl Read for Pipe {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.input.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.input.read(into)
    }
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.output.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Until the standard input ends.
pub(super) fn run(listener: TcpListener, capacity: usize) -> io::Result<()> {
    let words = control::commands(|| {});
    tokio_uring::start(async move {
        let shared = Rc::new(Shared {
            sessions: RefCell::new(vec![None; capacity]),
            open: Cell::new(0),
            sent: Cell::new(0),
        });
        let listener = tokio_uring::net::TcpListener::from_std(listener);
        tokio_uring::spawn(accept(listener, Rc::clone(&shared)));
        loop {
            let Ok(line) = words.try_recv() else {
                tokio::time::sleep(Duration::from_millis(5)).await;
                continue;
            };
            match word(&line) {
                Some(Word::Sessions) => control::answer(&Sessions { sessions: shared.open.get() }),
                Some(Word::Prepare(_)) => control::answer(&Prepared { prepared: false }),
                Some(Word::Push(plan)) => control::answer(&push(plan, &shared).await),
                Some(Word::Echo(_)) => {}
                Some(Word::Quit) => std::process::exit(0),
                None => eprintln!("unknown word: {line}"),
            }
        }
    })
}

async fn accept(listener: tokio_uring::net::TcpListener, shared: Rc<Shared>) {
    while let Ok((stream, _)) = listener.accept().await {
        tokio_uring::spawn(serve(stream, Rc::clone(&shared)));
    }
}

async fn serve(stream: TcpStream, shared: Rc<Shared>) {
    let stream = Rc::new(stream);
    let mut head = Vec::new();
    let end = loop {
        let (read, buffer) = stream.read(vec![0; READ_BYTES]).await;
        match read {
            Ok(0) | Err(_) => return,
            Ok(count) => head.extend_from_slice(&buffer[..count]),
        }
        if let Some(end) = frame::head_end(&head) {
            break end;
        }
    };
    let Some(answer) = frame::upgrade_answer(&head[..end]) else { return };
    if stream.write_all(answer).await.0.is_err() {
        return;
    }
    let mailbox = Rc::new(Mailbox::default());
    if let Some(session) = names::index_of(&head[..end])
        && let Some(place) = shared.sessions.borrow_mut().get_mut(session)
    {
        *place = Some(Rc::clone(&mailbox));
    }
    shared.open.set(shared.open.get() + 1);
    let config = WebSocketConfig::default().read_buffer_size(READ_BYTES).write_buffer_size(0);
    let mut pipe = Pipe::default();
    pipe.input.extend(&head[end..]);
    let socket = WebSocket::from_raw_socket(pipe, Role::Server, Some(config));
    let socket = Rc::new(RefCell::new(socket));
    let writer = tokio_uring::spawn(write(
        Rc::clone(&stream),
        Rc::clone(&socket),
        Rc::clone(&mailbox),
        Rc::clone(&shared),
    ));
    read(&stream, &socket, &mailbox).await;
    writer.abort();
    shared.open.set(shared.open.get() - 1);
}

async fn read(stream: &TcpStream, socket: &RefCell<WebSocket<Pipe>>, mailbox: &Mailbox) {
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let (read, back) = stream.read(buffer).await;
        buffer = back;
        let Ok(count @ 1..) = read else { return };
        let mut socket = socket.borrow_mut();
        socket.get_mut().input.extend(&buffer[..count]);
        loop {
            match socket.read() {
                Ok(Message::Binary(payload)) => {
                    mailbox.events.borrow_mut().push_back(payload);
                    mailbox.bell.notify_one();
                }
                Ok(_) => {}
                Err(tungstenite::Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                    break;
                }
                Err(_) => return,
            }
        }
        if !socket.get_mut().output.is_empty() {
            mailbox.bell.notify_one();
        }
    }
}

async fn write(
    stream: Rc<TcpStream>,
    socket: Rc<RefCell<WebSocket<Pipe>>>,
    mailbox: Rc<Mailbox>,
    shared: Rc<Shared>,
) {
    loop {
        let mut count = 0;
        {
            let mut socket = socket.borrow_mut();
            while let Some(event) = mailbox.events.borrow_mut().pop_front() {
                count += 1;
                if socket.write(Message::Binary(event)).is_err() {
                    return;
                }
            }
            let _ = socket.flush(); // into memory: it cannot fail
        }
        let output = std::mem::take(&mut socket.borrow_mut().get_mut().output);
        if output.is_empty() {
            mailbox.bell.notified().await;
            continue;
        }
        if stream.write_all(output).await.0.is_err() {
            return;
        }
        shared.sent.set(shared.sent.get() + count);
    }
}

async fn push(plan: Plan, shared: &Shared) -> Pushed {
    let sessions: Vec<Option<Rc<Mailbox>>> = shared.sessions.borrow().clone();
    let mut generator = Generator::new(plan, shared.open.get());
    let generator_ns = generator.total_cost_ns();
    let started_ns = now_ns();
    let before = shared.sent.get();
    let (mut messages, mut retries) = (0_u64, 0);
    while !generator.is_finished() {
        let Some(item) = generator.next_due() else {
            let wait = generator.due_ns().map_or(0, |due| due.saturating_sub(now_ns()));
            tokio::time::sleep(Duration::from_nanos(wait)).await;
            continue;
        };
        let value = Bytes::from(item.value);
        for mailbox in sessions[item.sessions].iter().flatten() {
            messages += 1;
            while mailbox.events.borrow().len() >= QUEUE {
                retries += 1;
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            mailbox.events.borrow_mut().push_back(value.clone());
            mailbox.bell.notify_one();
            if messages % 256 == 0 {
                tokio::time::sleep(PARK).await;
            }
        }
        // As far ahead as Delivery's rings let a router be.
        while messages - (shared.sent.get() - before) > 8192 {
            tokio::time::sleep(PARK).await;
        }
    }
    while shared.sent.get() - before < messages {
        tokio::time::sleep(PARK).await;
    }
    Pushed { messages, elapsed_ns: now_ns() - started_ns, generator_ns, retries, sends: None }
}
