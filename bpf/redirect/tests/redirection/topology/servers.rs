//! Small servers and clients, in any namespace.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use redirect::{ListenerMap, Role};
use socket2::{Domain, Protocol, Socket, Type};

use super::inside;

pub(super) const CONNECT_PATIENCE: Duration = Duration::from_millis(1500);

/// What stalls this long is lost.
const TALK_PATIENCE: Duration = Duration::from_secs(8);

pub(super) fn connect(from: Option<IpAddr>, to: SocketAddr) -> Result<TcpStream, std::io::Error> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    if let Some(source) = from {
        socket.set_ip_transparent_v4(true)?;
        socket.bind(&SocketAddr::from((source, 0)).into())?;
    }
    socket.connect_timeout(&to.into(), CONNECT_PATIENCE)?;
    Ok(TcpStream::from(socket))
}

/// A server that sends back what it gets, on all connections at once.
#[derive(Debug)]
pub(crate) struct Echo {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    pub(crate) fn app(netns: &Path, port: u16) -> Self {
        let address = (Ipv6Addr::UNSPECIFIED, port).into();
        Self::serve(inside(netns, || listen(address, false)))
    }

    /// ztunnel's outbound listener as an echo.
    pub(crate) fn ztunnel(netns: &Path, map: Option<&Path>) -> Self {
        let address = (Ipv6Addr::UNSPECIFIED, 15001).into();
        let socket = inside(netns, || listen(address, true));
        if let Some(path) = map {
            let mut map = ListenerMap::open(path).unwrap();
            map.set(Role::Outbound, 0, socket.as_fd()).unwrap();
        }
        Self::serve(socket)
    }

    /// Another of ztunnel's listeners as an echo.
    pub(crate) fn role(netns: &Path, role: Role, map: &Path) -> Self {
        let address = (Ipv6Addr::UNSPECIFIED, 0).into();
        let socket = inside(netns, || listen(address, true));
        let mut map = ListenerMap::open(map).unwrap();
        map.set(role, 0, socket.as_fd()).unwrap();
        Self::serve(socket)
    }

    fn serve(socket: TcpListener) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        socket.set_nonblocking(true).unwrap();
        let thread = thread::spawn(move || {
            let mut open: Vec<TcpStream> = Vec::new();
            let mut buffer = vec![0; 65536];
            while !stopped.load(Ordering::Relaxed) {
                let mut idle = true;
                if let Ok((stream, _)) = socket.accept() {
                    stream.set_nonblocking(true).unwrap();
                    open.push(stream);
                    idle = false;
                }
                open.retain_mut(|stream| match stream.read(&mut buffer) {
                    Ok(0) => false,
                    Ok(count) => {
                        idle = false;
                        stream.set_nonblocking(false).unwrap();
                        let sent = stream.write_all(&buffer[..count]).is_ok();
                        stream.set_nonblocking(true).unwrap();
                        sent
                    }
                    Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
                });
                if idle {
                    thread::sleep(Duration::from_millis(1));
                }
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A connection to an [`Echo`].
#[derive(Debug)]
pub(crate) struct Talk(TcpStream);

impl Talk {
    pub(super) fn new(stream: TcpStream) -> Self {
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(TALK_PATIENCE)).unwrap();
        stream.set_write_timeout(Some(TALK_PATIENCE)).unwrap();
        Self(stream)
    }

    /// Sends something and gets it back.
    pub(crate) fn ping(&mut self) -> Result<(), std::io::Error> {
        self.exchange(b"are you there?")
    }

    pub(crate) fn exchange(&mut self, message: &[u8]) -> Result<(), std::io::Error> {
        let mut sender = self.0.try_clone()?;
        let mut answer = vec![0; message.len()];
        thread::scope(|scope| {
            scope.spawn(move || sender.write_all(message));
            self.0.read_exact(&mut answer)
        })?;
        assert!(answer == message, "other bytes than were sent");
        Ok(())
    }
}

/// What a server said about a connection.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Answer {
    /// Label of the server that answered.
    pub(crate) label: String,
    /// The peer as the server sees it.
    pub(crate) peer: SocketAddr,
    /// The local address as the server sees it.
    pub(crate) local: SocketAddr,
    /// The client's own local address.
    pub(crate) client: SocketAddr,
}

impl Answer {
    pub(super) fn parse(text: &str, client: SocketAddr) -> Result<Self, std::io::Error> {
        let words: Vec<_> = text.split_whitespace().collect();
        let [label, peer, local] = words[..] else {
            return Err(std::io::Error::other(format!("no answer but {text:?}")));
        };
        Ok(Self {
            label: label.to_owned(),
            peer: peer.parse().unwrap(),
            local: local.parse().unwrap(),
            client,
        })
    }
}

/// A server that says who it is, who connected and to what, and closes.
#[derive(Debug)]
pub(crate) struct Server {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// An ordinary server of an application.
    pub(crate) fn app(netns: &Path, port: u16) -> Self {
        let socket = inside(netns, || {
            listen((Ipv4Addr::UNSPECIFIED, port).into(), false)
        });
        Self::serve("app", socket)
    }

    /// As [`Server::app`], for both families.
    pub(crate) fn app6(netns: &Path, port: u16) -> Self {
        let address = (Ipv6Addr::UNSPECIFIED, port).into();
        Self::serve("app", inside(netns, || listen(address, false)))
    }

    /// One of ztunnel's listeners, offered in `map` if there is one.
    pub(crate) fn ztunnel(
        netns: &Path,
        role: Role,
        label: &str,
        map: Option<(&Path, u32)>,
    ) -> Self {
        let port = match role {
            Role::Outbound => 15001,
            Role::InboundPlain => 15006,
            Role::InboundHbone => 15008,
            Role::DnsUdp | Role::DnsTcp => 15053,
        };
        let socket = inside(netns, || listen((Ipv6Addr::UNSPECIFIED, port).into(), true));
        if let Some((path, cpu)) = map {
            ListenerMap::open(path)
                .unwrap()
                .set(role, cpu, socket.as_fd())
                .unwrap();
        }
        Self::serve(label, socket)
    }

    fn serve(label: &str, socket: TcpListener) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, label) = (Arc::clone(&stop), label.to_owned());
        socket.set_nonblocking(true).unwrap();
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                match socket.accept() {
                    Ok((mut stream, peer)) => {
                        let local = stream.local_addr().unwrap();
                        let (peer, local) = (unmapped(peer), unmapped(local));
                        let _ = stream.write_all(format!("{label} {peer} {local}").as_bytes());
                    }
                    Err(_) => thread::sleep(Duration::from_millis(2)),
                }
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn unmapped(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(IpAddr::to_canonical(&address.ip()), address.port())
}

fn listen(address: SocketAddr, transparent: bool) -> TcpListener {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )
    .unwrap();
    socket.set_reuse_address(true).unwrap();
    if transparent {
        socket.set_reuse_port(true).unwrap();
        if address.is_ipv6() {
            socket.set_only_v6(false).unwrap();
        }
        socket.set_ip_transparent_v4(true).unwrap();
    }
    socket.bind(&address.into()).unwrap();
    socket.listen(128).unwrap();
    socket.into()
}
