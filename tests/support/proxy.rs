//! A TCP proxy on loopback that can cut its connections as a broken network does: bytes stop, but
//! neither end sees a FIN or a reset.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// Interval at which a copying thread checks whether it must stop.
const CHECK_INTERVAL: Duration = Duration::from_millis(100);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Passing,
    /// Accepts no connections, passes no bytes, closes nothing.
    Silent,
    Stopped,
}

#[derive(Debug)]
struct ModeSwitch {
    mode: Mutex<Mode>,
    changed: Condvar,
}

impl ModeSwitch {
    /// Waits while silent. `false`: stopped.
    fn may_pass(&self) -> bool {
        let mode = self.mode.lock().expect("no holder panics");
        let silent = |mode: &mut Mode| *mode == Mode::Silent;
        *self.changed.wait_while(mode, silent).expect("no holder panics") == Mode::Passing
    }

    fn set(&self, mode: Mode) {
        *self.mode.lock().expect("no holder panics") = mode;
        self.changed.notify_all();
    }
}

/// A running proxy. Closes its connections when dropped.
#[derive(Debug)]
pub struct Proxy {
    /// Its address.
    pub address: SocketAddr,
    shared: Arc<ModeSwitch>,
}

impl Proxy {
    /// Forwards connections to `target`, on a free port.
    pub fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let address = listener.local_addr().expect("bound");
        let shared =
            Arc::new(ModeSwitch { mode: Mutex::new(Mode::Passing), changed: Condvar::new() });
        let accepting = shared.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if !accepting.may_pass() {
                    break;
                }
                // If the target refuses, the client's connection is closed.
                if let Ok(server) = TcpStream::connect(target) {
                    let _ = join(client, server, &accepting);
                }
            }
        });
        Self { address, shared }
    }

    /// Cuts both directions of every connection, and accepts no new one.
    pub fn cut(&self) {
        self.shared.set(Mode::Silent);
    }

    /// Forwards again. Bytes sent in the meantime arrive late, as after a retransmission.
    pub fn heal(&self) {
        self.shared.set(Mode::Passing);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.set(Mode::Stopped);
        // Wakes the accepting thread.
        let _ = TcpStream::connect(self.address);
    }
}

fn join(client: TcpStream, server: TcpStream, shared: &Arc<ModeSwitch>) -> io::Result<()> {
    for stream in [&client, &server] {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(CHECK_INTERVAL))?;
    }
    let pairs = [(client.try_clone()?, server.try_clone()?), (server, client)];
    for (from, to) in pairs {
        let shared = shared.clone();
        std::thread::spawn(move || copy(from, to, &shared));
    }
    Ok(())
}

fn copy(mut from: TcpStream, mut to: TcpStream, shared: &ModeSwitch) {
    let mut buffer = vec![0; 64 * 1024];
    while shared.may_pass() {
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => {
                if !shared.may_pass() || to.write_all(&buffer[..count]).is_err() {
                    break;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => break,
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cut_holds_bytes_and_heal_delivers_them() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let proxy = Proxy::start(listener.local_addr().unwrap());
        let mut client = TcpStream::connect(proxy.address).unwrap();
        client.write_all(b"one").unwrap();
        let (mut server, _) = listener.accept().unwrap();
        let mut read = [0; 3];
        server.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"one");

        proxy.cut();
        client.write_all(b"two").unwrap();
        server.set_read_timeout(Some(3 * CHECK_INTERVAL)).unwrap();
        assert_eq!(server.read(&mut read).unwrap_err().kind(), io::ErrorKind::WouldBlock);

        proxy.heal();
        server.set_read_timeout(None).unwrap();
        server.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"two");
        drop(proxy);
        assert_eq!(server.read(&mut read).unwrap(), 0, "closed with the proxy");
    }
}
