//! Who answers: on every host one server for TCP and one for datagrams, which say their name and
//! whom they see, and then repeat what they get.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::cells::{APP_PORT, HOST_PORT, STRICT_PORT};
use crate::support::TestLab;
use lab::network::has_ipv6;

/// How long a connection may be idle.
const IDLE: Duration = Duration::from_secs(20);

/// Servers of a lab; dropping stops them.
pub(crate) struct Servers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Servers {
    pub(crate) fn start(lab: &TestLab) -> Self {
        let mut servers = Self {
            stop: Arc::default(),
            threads: Vec::new(),
        };
        for host in ["server-a", "server-b", "plain-b"] {
            for port in [APP_PORT, STRICT_PORT] {
                servers.on(lab, host, port);
            }
        }
        for host in ["node-a", "node-b", "outside"] {
            servers.on(lab, host, HOST_PORT);
        }
        servers
    }

    fn on(&mut self, lab: &TestLab, host: &'static str, port: u16) {
        let any: IpAddr = if has_ipv6() {
            [0; 16].into()
        } else {
            [0; 4].into()
        };
        let at = SocketAddr::new(any, port);
        let listener = lab.lab.on(host, || TcpListener::bind(at)).unwrap().unwrap();
        listener.set_nonblocking(true).unwrap();
        let stop = Arc::clone(&self.stop);
        self.threads.push(thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, peer)) => drop(thread::spawn(move || {
                        // Whoever asked says how it went.
                        let _ = serve(stream, host, peer.ip().to_canonical());
                    })),
                    Err(_) => thread::sleep(Duration::from_millis(3)),
                }
            }
        }));
        // One per family and address: an answer leaves from the address that was asked.
        for address in addresses(lab, host) {
            let at = SocketAddr::new(address, port);
            let socket = lab.lab.on(host, || UdpSocket::bind(at)).unwrap().unwrap();
            socket
                .set_read_timeout(Some(Duration::from_millis(50)))
                .unwrap();
            let stop = Arc::clone(&self.stop);
            self.threads.push(thread::spawn(move || {
                let mut buffer = vec![0; 64 << 10];
                while !stop.load(Ordering::Relaxed) {
                    let Ok((length, peer)) = socket.recv_from(&mut buffer) else {
                        continue;
                    };
                    let mut answer = greeting(host, peer.ip()).into_bytes();
                    answer.resize(answer.len().max(length), b'.');
                    // As above.
                    let _ = socket.send_to(&answer, peer);
                }
            }));
        }
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn addresses(lab: &TestLab, host: &str) -> Vec<IpAddr> {
    let status = lab.lab.status();
    let found = status.hosts.into_iter().find(|each| each.name == host);
    found.unwrap().addresses
}

fn greeting(host: &str, peer: IpAddr) -> String {
    format!("{host} sees {peer}\n")
}

fn serve(mut stream: TcpStream, host: &str, peer: IpAddr) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(IDLE))?;
    stream.set_write_timeout(Some(IDLE))?;
    let mut buffer = vec![0; 64 << 10];
    let mut told = false;
    loop {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            return Ok(());
        }
        if !told {
            stream.write_all(greeting(host, peer).as_bytes())?;
            told = true;
        }
        stream.write_all(&buffer[..length])?;
    }
}
