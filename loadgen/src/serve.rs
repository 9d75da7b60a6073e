//! The other end: echo, sink and source servers, one thread per core.
//!
//! Every thread has a listener of its own on the same address (`SO_REUSEPORT`), so a connection
//! stays on the thread that accepted it and nothing is shared. Threads sleep until something
//! happens: an unused server costs no CPU.

use std::io::{self, Read as _, Write as _};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token, Waker};

use crate::error::Error;
use crate::net::{self, Progress};
use crate::payload::{self, STREAM_PATTERN};
use crate::worker;

const LISTENER: Token = Token(usize::MAX);
const STOP: Token = Token(usize::MAX - 1);
const BUFFER: usize = 256 * 1024;
/// System calls one connection gets in a row.
const TURNS: usize = 16;
const EVENTS: usize = 1024;

/// What a server does with a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub enum Mode {
    /// Sends back what it receives.
    Echo,
    /// Reads and throws away.
    Sink,
    /// Sends for ever; what it receives is thrown away. When the client has finished sending,
    /// the server stops and closes.
    Source,
}

/// How to serve.
#[derive(Clone, Debug)]
pub struct Options {
    /// The address; port 0 takes a free one.
    pub listen: SocketAddr,
    /// What to do with connections.
    pub mode: Mode,
    /// Threads; `None`: one per CPU (of `cpus` if given).
    pub threads: Option<usize>,
    /// CPUs the threads are bound to, in turn; empty: not bound.
    pub cpus: Vec<usize>,
    /// Print `accepted PEER` for every connection on stdout.
    pub print_peers: bool,
}

/// What a server did, over all threads.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, serde::Serialize)]
pub struct Totals {
    /// Connections accepted.
    pub connections: u64,
    /// Bytes read from them.
    pub received_bytes: u64,
    /// Bytes written to them.
    pub sent_bytes: u64,
    /// Connections that ended by an error, resets by the client included.
    pub errors: u64,
}

/// Stops a server from another thread.
#[derive(Clone, Debug)]
pub struct Stopper {
    stop: Arc<AtomicBool>,
    wakers: Arc<[Waker]>,
}

impl Stopper {
    /// Tells all threads of the server to end.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        for waker in self.wakers.iter() {
            // Fails only if the thread, and with it the descriptor, is gone.
            let _ = waker.wake();
        }
    }
}

/// A running server; dropping it stops it.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    stopper: Stopper,
    threads: Vec<JoinHandle<Result<Totals, Error>>>,
}

impl Server {
    /// Takes the address and starts the threads. Connections are accepted from here on.
    ///
    /// # Errors
    ///
    /// [`Error::Listen`] if the address cannot be had, [`Error::Worker`] if epoll cannot.
    pub fn start(options: &Options) -> Result<Self, Error> {
        let count = options.threads.unwrap_or_else(|| match options.cpus.len() {
            0 => thread::available_parallelism().map_or(1, usize::from),
            n => n,
        });
        let listeners =
            net::listen(options.listen, count.max(1)).map_err(|source| Error::Listen {
                address: options.listen,
                source,
            })?;
        Self::with(listeners, options)
    }

    /// Serves what others have listened on, a thread for each listener: sockets with options that
    /// [`Self::start`] does not know. `listen` and `threads` of `options` mean nothing here.
    ///
    /// # Errors
    ///
    /// [`Error::Listen`] if there is no listener or one cannot be used, [`Error::Worker`] if epoll
    /// cannot.
    pub fn over(listeners: Vec<std::net::TcpListener>, options: &Options) -> Result<Self, Error> {
        let prepared = listeners.into_iter().map(|listener| {
            listener.set_nonblocking(true)?;
            Ok(TcpListener::from_std(listener))
        });
        let listeners: io::Result<Vec<_>> = prepared.collect();
        let listeners = listeners.map_err(|source| Error::Listen {
            address: options.listen,
            source,
        })?;
        Self::with(listeners, options)
    }

    fn with(listeners: Vec<TcpListener>, options: &Options) -> Result<Self, Error> {
        let first = listeners
            .first()
            .ok_or_else(|| io::ErrorKind::InvalidInput.into());
        let address = first.and_then(TcpListener::local_addr);
        let address = address.map_err(|source| Error::Listen {
            address: options.listen,
            source,
        })?;
        let pattern: Arc<[u8]> = payload::pattern(STREAM_PATTERN).into();
        let workers: Vec<Worker> = listeners
            .into_iter()
            .map(|listener| Worker::new(listener, options, Arc::clone(&pattern)))
            .collect::<Result<_, Error>>()?;
        let wakers: Vec<Waker> = workers
            .iter()
            .map(|worker| Waker::new(worker.poll.registry(), STOP))
            .collect::<Result<_, io::Error>>()
            .map_err(Error::worker("create an eventfd"))?;
        let stopper = Stopper {
            stop: Arc::default(),
            wakers: wakers.into(),
        };
        let spawn = |(index, worker): (usize, Worker)| {
            let (stopper, cpus) = (stopper.clone(), options.cpus.clone());
            thread::spawn(move || {
                let result = worker::pin(&cpus, index).and_then(|()| {
                    worker
                        .run(&stopper.stop)
                        .map_err(Error::worker("serve connections"))
                });
                // One thread's failure ends the server: half of it would look like a slow one.
                if result.is_err() {
                    stopper.stop();
                }
                result
            })
        };
        let threads = workers.into_iter().enumerate().map(spawn).collect();
        Ok(Self {
            address,
            stopper,
            threads,
        })
    }

    /// The address taken, with the real port.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What another thread needs to stop this server.
    #[must_use]
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// Waits until the server is stopped and returns what was done.
    ///
    /// # Errors
    ///
    /// The first failure of a thread.
    pub fn join(mut self) -> Result<Totals, Error> {
        let mut totals = Totals::default();
        for (i, thread) in self.threads.drain(..).enumerate() {
            let one = thread.join().map_err(|_| Error::Panicked(i))??;
            totals.connections += one.connections;
            totals.received_bytes += one.received_bytes;
            totals.sent_bytes += one.sent_bytes;
            totals.errors += one.errors;
        }
        Ok(totals)
    }

    /// Closes everything and returns what was done.
    ///
    /// # Errors
    ///
    /// The first failure of a thread.
    pub fn stop(self) -> Result<Totals, Error> {
        self.stopper.stop();
        self.join()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stopper.stop();
    }
}

#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    /// Echo: bytes read that the socket did not take yet, sent up to `unsent_from`.
    unsent: Vec<u8>,
    unsent_from: usize,
    /// Source: bytes sent.
    sent: u64,
    readable: bool,
    writable: bool,
    /// The kernel has told that the client closed: no further event will come.
    closing: bool,
    /// Everything the client sent has been read.
    ended: bool,
    queued: bool,
}

/// What is to become of a connection after its turn.
#[derive(Debug, Eq, PartialEq)]
enum Next {
    Wait,
    Again,
    Close,
}

#[derive(Debug)]
struct Worker {
    poll: Poll,
    listener: TcpListener,
    mode: Mode,
    print_peers: bool,
    pattern: Arc<[u8]>,
    connections: Vec<Option<Connection>>,
    free: Vec<usize>,
    /// Closed in this round; their numbers are given out again in the next one, because events
    /// of this round may still name them.
    closed: Vec<usize>,
    again: Vec<usize>,
    buffer: Vec<u8>,
    totals: Totals,
}

impl Worker {
    fn new(
        mut listener: TcpListener,
        options: &Options,
        pattern: Arc<[u8]>,
    ) -> Result<Self, Error> {
        let poll = Poll::new().map_err(Error::worker("create an epoll instance"))?;
        poll.registry()
            .register(&mut listener, LISTENER, Interest::READABLE)
            .map_err(Error::worker("watch a listener"))?;
        Ok(Self {
            poll,
            listener,
            mode: options.mode,
            print_peers: options.print_peers,
            pattern,
            connections: Vec::new(),
            free: Vec::new(),
            closed: Vec::new(),
            again: Vec::new(),
            buffer: vec![0; BUFFER],
            totals: Totals::default(),
        })
    }

    fn run(mut self, stop: &AtomicBool) -> io::Result<Totals> {
        let mut events = Events::with_capacity(EVENTS);
        let mut turn = Vec::new();
        while !stop.load(Ordering::SeqCst) {
            let timeout = (!self.again.is_empty()).then_some(std::time::Duration::ZERO);
            match self.poll.poll(&mut events, timeout) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                result => result?,
            }
            for event in &events {
                match event.token() {
                    LISTENER => self.accept(),
                    STOP => {}
                    Token(i) => {
                        if let Some(connection) = &mut self.connections[i] {
                            connection.writable |= event.is_writable();
                            connection.readable |=
                                event.is_readable() || event.is_read_closed() || event.is_error();
                            connection.closing |= event.is_read_closed() || event.is_error();
                            self.queue(i);
                        }
                    }
                }
            }
            std::mem::swap(&mut turn, &mut self.again);
            for i in turn.drain(..) {
                self.serve(i);
            }
            self.free.append(&mut self.closed);
        }
        Ok(self.totals)
    }

    fn accept(&mut self) {
        loop {
            let (mut stream, peer) = match self.listener.accept() {
                Ok(accepted) => accepted,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => continue,
                Err(e) => {
                    // Out of descriptors, most likely. The queue is tried again at the next
                    // connection; the client sees its own time-out meanwhile.
                    eprintln!("loadgen: cannot accept a connection: {e}");
                    self.totals.errors += 1;
                    return;
                }
            };
            // Fails only on a connection already reset, which the first read will tell.
            let _ = stream.set_nodelay(true);
            let i = self.free.pop().unwrap_or(self.connections.len());
            let interest = Interest::READABLE | Interest::WRITABLE;
            if self
                .poll
                .registry()
                .register(&mut stream, Token(i), interest)
                .is_err()
            {
                self.totals.errors += 1;
                continue;
            }
            if self.print_peers {
                println!("accepted {peer}");
            }
            self.totals.connections += 1;
            let connection = Connection {
                stream,
                unsent: Vec::new(),
                unsent_from: 0,
                sent: 0,
                readable: true,
                writable: true,
                closing: false,
                ended: false,
                queued: false,
            };
            if i == self.connections.len() {
                self.connections.push(Some(connection));
            } else {
                self.connections[i] = Some(connection);
            }
            // Often the request is there already.
            self.queue(i);
        }
    }

    fn queue(&mut self, i: usize) {
        if let Some(connection) = &mut self.connections[i]
            && !connection.queued
        {
            connection.queued = true;
            self.again.push(i);
        }
    }

    fn serve(&mut self, i: usize) {
        let Some(connection) = &mut self.connections[i] else {
            return;
        };
        connection.queued = false;
        let result = match self.mode {
            Mode::Echo => connection.echo(&mut self.buffer, &mut self.totals),
            Mode::Sink => connection.sink(&mut self.buffer, &mut self.totals),
            Mode::Source => connection.source(&self.pattern, &mut self.buffer, &mut self.totals),
        };
        match result {
            Ok(Next::Wait) => return,
            Ok(Next::Again) => return self.queue(i),
            Ok(Next::Close) => {}
            Err(_) => self.totals.errors += 1,
        }
        self.connections[i] = None;
        self.closed.push(i);
    }
}

impl Connection {
    /// Reads; a short read means that the socket is empty, which saves the call that says so.
    fn read(&mut self, buffer: &mut [u8], totals: &mut Totals) -> io::Result<usize> {
        match net::progress(self.stream.read(buffer))? {
            Progress::Moved(n) => {
                totals.received_bytes += n as u64;
                self.readable = n == buffer.len() || self.closing;
                Ok(n)
            }
            Progress::Blocked => {
                self.readable = false;
                Ok(0)
            }
            Progress::Ended => {
                self.readable = false;
                self.ended = true;
                Ok(0)
            }
        }
    }

    /// Writes; 0 means that the socket is full.
    fn write(&mut self, bytes: &[u8], totals: &mut Totals) -> io::Result<usize> {
        match net::progress(self.stream.write(bytes))? {
            Progress::Moved(n) => {
                totals.sent_bytes += n as u64;
                Ok(n)
            }
            Progress::Blocked | Progress::Ended => {
                self.writable = false;
                Ok(0)
            }
        }
    }

    fn echo(&mut self, buffer: &mut [u8], totals: &mut Totals) -> io::Result<Next> {
        if !self.flush(totals)? {
            return Ok(Next::Wait);
        }
        for _ in 0..TURNS {
            if !self.readable {
                return Ok(if self.ended { Next::Close } else { Next::Wait });
            }
            let n = self.read(buffer, totals)?;
            let mut sent = 0;
            while sent < n {
                let moved = self.write(&buffer[sent..n], totals)?;
                if moved == 0 {
                    self.unsent.extend_from_slice(&buffer[sent..n]);
                    return Ok(Next::Wait);
                }
                sent += moved;
            }
        }
        Ok(Next::Again)
    }

    /// Sends what an earlier turn could not; false if the socket is still full.
    fn flush(&mut self, totals: &mut Totals) -> io::Result<bool> {
        if self.unsent.is_empty() {
            return Ok(true);
        }
        let unsent = std::mem::take(&mut self.unsent);
        let mut from = self.unsent_from;
        while from < unsent.len() && self.writable {
            from += self.write(&unsent[from..], totals)?;
        }
        let done = from == unsent.len();
        self.unsent = unsent;
        self.unsent_from = from;
        if done {
            self.unsent.clear();
            self.unsent_from = 0;
        }
        Ok(done)
    }

    fn sink(&mut self, buffer: &mut [u8], totals: &mut Totals) -> io::Result<Next> {
        for _ in 0..TURNS {
            if !self.readable {
                return Ok(if self.ended { Next::Close } else { Next::Wait });
            }
            self.read(buffer, totals)?;
        }
        Ok(Next::Again)
    }

    fn source(
        &mut self,
        pattern: &[u8],
        buffer: &mut [u8],
        totals: &mut Totals,
    ) -> io::Result<Next> {
        for _ in 0..TURNS {
            if self.readable {
                self.read(buffer, totals)?;
            }
            if self.ended {
                return Ok(Next::Close);
            }
            if self.writable {
                let at = (self.sent % pattern.len() as u64) as usize;
                self.sent += self.write(&pattern[at..], totals)? as u64;
            }
            if !self.readable && !self.writable {
                return Ok(Next::Wait);
            }
        }
        Ok(Next::Again)
    }
}
