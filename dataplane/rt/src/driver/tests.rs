//! What the ring back end takes for granted of the kernel.

use std::io::{ErrorKind, Read};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::rc::Rc;
use std::task::Waker;

use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_send_buffer_size};

use super::*;
use crate::buf::PoolConfig;
use crate::op::Socket;

/// Connections that send in one turn.
const CONNECTIONS: usize = 8;
/// Buffers of one send, at most.
const PIECES: usize = 4;
/// Sends of all connections together.
const SENDS: usize = 4_000;
/// Limit to a wait for what must come.
const HANG: Duration = Duration::from_secs(60);

/// A connection with small buffers, so that it is soon full.
struct Connection {
    socket: Rc<Socket>,
    receiver: TcpStream,
    /// What was handed over, and what has arrived.
    sent: Vec<u8>,
    got: Vec<u8>,
    op: Option<OpId>,
}

impl Connection {
    fn new() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        set_socket_recv_buffer_size(&listener, 8 * 1024).unwrap();
        let sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        set_socket_send_buffer_size(&sender, 8 * 1024).unwrap();
        let (receiver, _) = listener.accept().unwrap();
        receiver.set_nonblocking(true).unwrap();
        Self {
            socket: Rc::new(Socket::new(sender.into())),
            receiver,
            sent: Vec::new(),
            got: Vec::new(),
            op: None,
        }
    }

    /// Hands over up to [`PIECES`] buffers; lengths and bytes follow from `number`.
    fn send(&mut self, driver: &mut Driver, number: usize) {
        let pool = driver.state.pool.clone();
        let mut list = driver.list();
        for piece in 0..=number % PIECES {
            let len = 1 + (number * 7_919 + piece * 104_729) % 4_000;
            let from = self.sent.len();
            self.sent
                .extend((from..from + len).map(|at| (at * 31 % 251) as u8));
            let mut buf = pool.record();
            buf.extend_from_slice(&self.sent[from..]);
            list.push(buf);
        }
        let operation = Operation::Send(Rc::clone(&self.socket), list);
        self.op = Some(driver.start_silent(operation));
    }

    fn drain(&mut self) {
        let mut room = [0; 64 * 1024];
        loop {
            match self.receiver.read(&mut room) {
                Ok(n) => self.got.extend_from_slice(&room[..n]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => panic!("{error}"),
            }
        }
    }
}

/// Uses the blocks that are free now for something else.
fn scribble(pool: &Pool) {
    let mut blocks = Vec::new();
    for _ in 0..CONNECTIONS * PIECES {
        let mut block = pool.record();
        block.extend_from_slice(&vec![0xff; block.tail_room()]); // no pattern has it
        blocks.push(block);
    }
}

/// Silent sends that the table says are over have left nothing with the kernel: their buffers and
/// lists are used for something else at once, and what arrives is what was handed over, also from
/// sockets that were full. `Ring::retire` rests on this.
#[test]
fn what_silent_sends_owned_is_free_when_they_are_over() {
    if let Err(refusal) = crate::probe::check() {
        let name = "what_silent_sends_owned_is_free_when_they_are_over";
        eprintln!("skipped: {name}: {refusal}");
        return;
    }
    let pool = Pool::new(PoolConfig::default());
    let mut driver = Driver::with_ring(64, 256, &pool).unwrap();
    let mut connections: Vec<_> = (0..CONNECTIONS).map(|_| Connection::new()).collect();
    let cx = Context::from_waker(Waker::noop());
    let (mut started, mut silent, mut in_parts) = (0, 0, 0);
    let mut last_progress = Instant::now();
    while connections.iter().any(|one| one.got.len() < one.sent.len()) || started < SENDS {
        for one in connections.iter_mut().filter(|one| one.op.is_none()) {
            if started < SENDS {
                one.send(&mut driver, started);
                started += 1;
            }
        }
        driver
            .turn(false, Some(Duration::ZERO), usize::MAX)
            .unwrap();
        let before = silent + in_parts;
        for one in &mut connections {
            let Some(op) = one.op else { continue };
            match driver.poll_silent(op, &cx) {
                Poll::Pending => continue,
                Poll::Ready(None) => silent += 1,
                Poll::Ready(Some((result, operation))) => {
                    let Operation::Send(_, mut list) = operation else {
                        panic!("{operation:?}")
                    };
                    assert!(result > 0 && list.sent(result as usize), "{result}");
                    driver.recycle_list(list);
                    in_parts += 1;
                }
            }
            one.op = None;
        }
        scribble(&pool);
        if silent + in_parts > before {
            last_progress = Instant::now();
            continue; // until all are full
        }
        connections.iter_mut().for_each(Connection::drain);
        assert!(last_progress.elapsed() < HANG, "{silent} {in_parts}");
    }
    for (index, one) in connections.iter().enumerate() {
        let wrong = one.got.iter().zip(&one.sent).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "connection {index}: first wrong byte");
        assert_eq!(one.got.len(), one.sent.len(), "connection {index}");
    }
    assert!(silent > SENDS / 10, "{silent} sends were silent");
    assert!(in_parts > 100, "{in_parts} sends met a full socket");
    assert!(driver.quiesce(HANG));
}
