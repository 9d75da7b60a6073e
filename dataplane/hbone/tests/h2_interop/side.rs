//! Our side of the connection: a caller of [`Connection`] over an asynchronous pipe.

use std::collections::{BTreeMap, VecDeque};

use hbone::{
    Config, ConnectRequest, Connection, ConnectionError, ErrorCode, Event, RequestHead, Role,
    StreamId,
};
use testkit::Random;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf};

pub(crate) const PIPE: usize = 96 << 10;

pub(crate) fn pattern(seed: u32, at: usize) -> u8 {
    (at.wrapping_mul(31) ^ (at >> 8) ^ seed as usize) as u8
}

pub(crate) fn payload(seed: u32, len: usize) -> Vec<u8> {
    (0..len).map(|at| pattern(seed, at)).collect()
}

/// What our side does on one stream.
#[derive(Default)]
pub(crate) struct Flow {
    pub(crate) head: Option<RequestHead>,
    pub(crate) status: Option<u16>,
    pub(crate) queued: VecDeque<u8>,
    /// Send END_STREAM when the queue is empty.
    pub(crate) finish: bool,
    pub(crate) finished: bool,
    pub(crate) received: Vec<u8>,
    pub(crate) ended: bool,
    pub(crate) reset: Option<ErrorCode>,
}

/// Our connection with its transport. Payload is copied here for the sake of the test.
pub(crate) struct Side {
    pub(crate) connection: Connection,
    pub(crate) read: ReadHalf<DuplexStream>,
    pub(crate) write: WriteHalf<DuplexStream>,
    pub(crate) out: Vec<u8>,
    pub(crate) flows: BTreeMap<StreamId, Flow>,
    pub(crate) events: VecDeque<Event>,
    pub(crate) random: Random,
    pub(crate) echo: bool,
    pub(crate) pongs: Vec<[u8; 8]>,
    pub(crate) go_away: Option<(u32, ErrorCode)>,
    pub(crate) failure: Option<ConnectionError>,
    pub(crate) eof: bool,
}

impl Side {
    pub(crate) fn new(role: Role, config: &Config, io: DuplexStream, seed: u64) -> Self {
        let (read, write) = tokio::io::split(io);
        Self {
            connection: Connection::new(role, config),
            read,
            write,
            out: Vec::new(),
            flows: BTreeMap::new(),
            events: VecDeque::new(),
            random: Random::new(seed),
            echo: role == Role::Server,
            pongs: Vec::new(),
            go_away: None,
            failure: None,
            eof: false,
        }
    }

    /// Runs until `done`, or the peer closes.
    pub(crate) async fn run(&mut self, done: impl Fn(&Self) -> bool) {
        let mut buffer = vec![0; 40_000];
        while !done(self) && !self.eof {
            self.fill();
            if self.failure.is_some() && self.out.is_empty() {
                return;
            }
            let limit = 1 + self.random.below(buffer.len());
            tokio::select! {
                biased;
                read = self.read.read(&mut buffer[..limit]) => match read {
                    Ok(0) | Err(_) => self.eof = true,
                    Ok(n) => self.on_bytes(&buffer[..n]),
                },
                written = self.write.write(&self.out), if !self.out.is_empty() => match written {
                    Ok(n) => drop(self.out.drain(..n)),
                    Err(_) => self.eof = true,
                },
            }
        }
        self.fill();
        let _ = self.write.write_all(&std::mem::take(&mut self.out)).await;
    }

    pub(crate) fn take_output(&mut self) {
        self.out.extend_from_slice(self.connection.output());
        self.connection
            .consume_output(self.connection.output().len());
    }

    /// Queues what the windows allow, in random chunks.
    pub(crate) fn fill(&mut self) {
        self.take_output();
        for (&id, flow) in &mut self.flows {
            while self.out.len() < 64 << 10 && !flow.finished && flow.reset.is_none() {
                let room = self
                    .connection
                    .send_capacity(id)
                    .min(self.connection.max_data_len());
                let chunk = 1 + self.random.below(50_000);
                let len = flow.queued.len().min(room).min(chunk);
                let end = flow.finish && len == flow.queued.len();
                if len == 0 && !end {
                    break;
                }
                let header = self.connection.data_header(id, len, end).unwrap();
                self.out.extend_from_slice(&header);
                self.out.extend(flow.queued.drain(..len));
                flow.finished = end;
                if self.echo {
                    self.connection.release(id, len);
                }
            }
        }
        self.take_output();
    }

    pub(crate) fn on_bytes(&mut self, input: &[u8]) {
        if let Err(error) = self.connection.receive(input, &mut self.events) {
            self.failure = Some(error);
        }
        while let Some(event) = self.events.pop_front() {
            match event {
                Event::Request { id, head } => {
                    let flow = Flow {
                        head: Some(*head),
                        ..Flow::default()
                    };
                    if self.echo {
                        self.connection
                            .respond(id, 200, Some("peer=ours"), false)
                            .unwrap();
                    }
                    self.flows.insert(id, flow);
                }
                Event::Response { id, status, .. } => {
                    self.flows.get_mut(&id).unwrap().status = Some(status);
                }
                Event::Data { id, range } => {
                    let flow = self.flows.get_mut(&id).unwrap();
                    if self.echo {
                        flow.queued.extend(&input[range.clone()]);
                    } else {
                        self.connection.release(id, range.len());
                    }
                    flow.received.extend_from_slice(&input[range]);
                }
                Event::End { id } => {
                    let flow = self.flows.get_mut(&id).unwrap();
                    flow.ended = true;
                    flow.finish |= self.echo;
                }
                Event::Reset { id, code } => {
                    let flow = self.flows.get_mut(&id).unwrap();
                    flow.reset = Some(code);
                    if self.echo {
                        self.connection.release(id, flow.queued.len());
                        flow.queued.clear();
                    }
                }
                Event::Pong(payload) => self.pongs.push(payload),
                Event::GoAway { last, code } => self.go_away = Some((last.get(), code)),
                Event::Writable { .. } | Event::Settings => {}
            }
        }
    }

    pub(crate) fn open(&mut self, authority: &str, body: Vec<u8>, finish: bool) -> StreamId {
        let request = ConnectRequest {
            authority,
            forwarded: Some("for=\"10.0.0.9:1234\""),
            baggage: Some("k8s.namespace.name=default"),
            ..ConnectRequest::default()
        };
        let id = self.connection.open(&request).unwrap();
        self.flows.insert(
            id,
            Flow {
                queued: body.into(),
                finish,
                ..Flow::default()
            },
        );
        id
    }
}
