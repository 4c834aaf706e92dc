//! tokio-uring, two tasks per connection, and tungstenite over bytes in memory, because it does not
//! support io_uring.

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
use crate::control::{self, OpenSessions, Prepared, Pushed, Word};
use crate::frame;
use crate::generator::{Generator, PushPlan};
use crate::names;

/// Queue of one session, messages, as in Delivery.
const QUEUE: usize = 128;
const READ_BYTES: usize = 4096;
/// tokio-uring submits when its thread parks; a yield does not park it.
const PARK: Duration = Duration::from_millis(1);

/// Events of one session, and what wakes its writer.
#[derive(Default)]
struct Mailbox {
    events: RefCell<VecDeque<Bytes>>,
    bell: Notify,
}

struct Mailboxes {
    sessions: RefCell<Vec<Option<Rc<Mailbox>>>>,
    open: Cell<usize>,
    sent: Cell<u64>,
}

/// A stream for tungstenite over bytes in memory.
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

/// Runs until the standard input ends.
pub(super) fn run(listener: TcpListener, capacity: usize) -> io::Result<()> {
    let words = control::commands(Word::parse, || {});
    tokio_uring::start(async move {
        let mailboxes = Rc::new(Mailboxes {
            sessions: RefCell::new(vec![None; capacity]),
            open: Cell::new(0),
            sent: Cell::new(0),
        });
        let listener = tokio_uring::net::TcpListener::from_std(listener);
        tokio_uring::spawn(accept(listener, Rc::clone(&mailboxes)));
        loop {
            let Ok(word) = words.try_recv() else {
                tokio::time::sleep(Duration::from_millis(5)).await;
                continue;
            };
            match word {
                Word::Sessions => control::answer(&OpenSessions { sessions: mailboxes.open.get() }),
                Word::Prepare(_) => control::answer(&Prepared { prepared: false }),
                Word::Push(plan) => control::answer(&push(plan, &mailboxes).await),
                Word::Presence | Word::Calls | Word::Echo(_) => {}
                Word::Quit => std::process::exit(0),
            }
        }
    })
}

async fn accept(listener: tokio_uring::net::TcpListener, mailboxes: Rc<Mailboxes>) {
    while let Ok((stream, _)) = listener.accept().await {
        tokio_uring::spawn(serve(stream, Rc::clone(&mailboxes)));
    }
}

async fn serve(stream: TcpStream, mailboxes: Rc<Mailboxes>) {
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
        && let Some(place) = mailboxes.sessions.borrow_mut().get_mut(session)
    {
        *place = Some(Rc::clone(&mailbox));
    }
    mailboxes.open.set(mailboxes.open.get() + 1);
    let config = WebSocketConfig::default().read_buffer_size(READ_BYTES).write_buffer_size(0);
    let mut pipe = Pipe::default();
    pipe.input.extend(&head[end..]);
    let socket = WebSocket::from_raw_socket(pipe, Role::Server, Some(config));
    let socket = Rc::new(RefCell::new(socket));
    let writer = tokio_uring::spawn(write(
        Rc::clone(&stream),
        Rc::clone(&socket),
        Rc::clone(&mailbox),
        Rc::clone(&mailboxes),
    ));
    read(&stream, &socket, &mailbox).await;
    writer.abort();
    mailboxes.open.set(mailboxes.open.get() - 1);
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
    mailboxes: Rc<Mailboxes>,
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
        mailboxes.sent.set(mailboxes.sent.get() + count);
    }
}

async fn push(plan: PushPlan, mailboxes: &Mailboxes) -> Pushed {
    let sessions: Vec<Option<Rc<Mailbox>>> = mailboxes.sessions.borrow().clone();
    let mut generator = Generator::new(plan, mailboxes.open.get());
    let generator_ns = generator.total_cost_ns();
    let started_ns = now_ns();
    let before = mailboxes.sent.get();
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
        // As far ahead as Delivery's rings allow.
        while messages - (mailboxes.sent.get() - before) > 8192 {
            tokio::time::sleep(PARK).await;
        }
    }
    while mailboxes.sent.get() - before < messages {
        tokio::time::sleep(PARK).await;
    }
    Pushed { messages, elapsed_ns: now_ns() - started_ns, generator_ns, retries, sends: None }
}
