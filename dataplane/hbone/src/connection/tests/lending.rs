//! No setting of readers stops another stream: streams whose payload nobody releases hold their own
//! window, and what they hold of the connection's is lent again.

use proptest::prelude::*;

use super::*;

const STREAM_WINDOW: u32 = 70_000;
const CONNECTION_WINDOW: u32 = 2 * STREAM_WINDOW;
/// Payload of each stream: more than several windows.
const BYTES: usize = 400_000;

/// What becomes of what arrives on a stream.
#[derive(Clone, Copy, Debug)]
enum Reader {
    /// Released at once.
    Keen,
    /// So many bytes a round.
    Slow(usize),
    /// Never released.
    Stuck,
    /// Released at once until so many bytes have come, and no more.
    Stops(usize),
    /// Never released, and reset after so many rounds; released then.
    Dies(usize),
    /// As `Dies`, but what it has is released rounds later.
    Lingers(usize),
}

fn reader() -> impl Strategy<Value = Reader> {
    prop_oneof![
        Just(Reader::Keen),
        (1_000usize..40_000).prop_map(Reader::Slow),
        Just(Reader::Stuck),
        (1_000usize..300_000).prop_map(Reader::Stops),
        (0usize..40).prop_map(Reader::Dies),
        (0usize..40).prop_map(Reader::Lingers),
    ]
}

struct Stream {
    id: StreamId,
    reader: Reader,
    left: usize,
    held: usize,
    received: usize,
    gone: Option<usize>,
}

struct Run {
    client: Connection,
    server: Connection,
    streams: Vec<Stream>,
    /// Whether the receiver lends.
    lends: bool,
}

impl Run {
    fn new(readers: &[Reader], lends: bool) -> Self {
        let config = Config {
            stream_window: STREAM_WINDOW,
            connection_window: CONNECTION_WINDOW,
            ..Config::server()
        };
        let mut client = Connection::new(Role::Client, &Config::client());
        let server = Connection::new(Role::Server, &config);
        let streams = readers.iter().map(|&reader| Stream {
            id: client.open(&REQUEST).unwrap(),
            reader,
            left: BYTES,
            held: 0,
            received: 0,
            gone: None,
        });
        let streams = streams.collect();
        Self {
            client,
            server,
            streams,
            lends,
        }
    }

    /// Everybody sends what the windows allow, then reads.
    fn round(&mut self, round: usize) {
        let mut wire = self.client.output().to_vec();
        self.client.consume_output(wire.len());
        for stream in &mut self.streams {
            let max = self.client.max_data_len();
            let n = self
                .client
                .send_capacity(stream.id)
                .min(stream.left)
                .min(max);
            if n > 0 {
                wire.extend(self.client.data_header(stream.id, n, false).unwrap());
                wire.resize(wire.len() + n, 7);
                stream.left -= n;
            }
        }
        for event in feed(&mut self.server, &wire).unwrap() {
            match event {
                Event::Request { id, .. } => self.server.respond(id, 200, None, false).unwrap(),
                Event::Data { id, range } => {
                    let stream = self.streams.iter_mut().find(|s| s.id == id).unwrap();
                    stream.held += range.len();
                    stream.received += range.len();
                }
                _ => {}
            }
        }
        for stream in &mut self.streams {
            let n = match (stream.reader, stream.gone) {
                (Reader::Keen, _) => stream.held,
                (Reader::Stops(at), _) if stream.received < at => stream.held,
                (Reader::Slow(most), _) => most.min(stream.held),
                (Reader::Dies(at) | Reader::Lingers(at), None) if at <= round => {
                    self.server.reset(stream.id, ErrorCode::CANCEL);
                    stream.gone = Some(round);
                    0
                }
                (Reader::Dies(_), Some(_)) => stream.held,
                (Reader::Lingers(_), Some(at)) if at + 20 < round => stream.held,
                _ => 0,
            };
            if n > 0 {
                stream.held -= n;
                self.server.release(stream.id, n);
            }
        }
        // As the tunnel does.
        if self.lends && self.server.wants_credit() {
            self.server.lend();
        }
        let reply = self.server.output().to_vec();
        self.server.consume_output(reply.len());
        feed(&mut self.client, &reply).unwrap();
    }

    /// Whether every reader that reads gets everything, in `rounds`.
    fn all_get_theirs(&mut self, rounds: usize) -> bool {
        (0..rounds).for_each(|round| self.round(round));
        self.streams.iter().all(|stream| match stream.reader {
            Reader::Keen | Reader::Slow(_) => stream.received == BYTES,
            Reader::Stuck => stream.received == STREAM_WINDOW as usize,
            Reader::Dies(_) | Reader::Lingers(_) | Reader::Stops(_) => true,
        })
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn no_setting_of_readers_stops_another_stream(
        readers in prop::collection::vec(reader(), 1..24)
    ) {
        let mut run = Run::new(&readers, true);
        prop_assert!(run.all_get_theirs(1_000));
        // What is open is never more than the streams may hold, and all of it is accounted for.
        let total = run.server.recv.total();
        prop_assert_eq!(total, i64::from(CONNECTION_WINDOW));
        let held: usize = run.streams.iter().map(|stream| stream.held).sum();
        prop_assert_eq!(held, run.server.recv.unreleased() as usize);
        // The last ones let go: the window is as it was, and no larger.
        for stream in &run.streams {
            run.server.release(stream.id, stream.held);
        }
        prop_assert_eq!(run.server.recv.total(), i64::from(CONNECTION_WINDOW));
        prop_assert!(run.server.recv.remaining() <= CONNECTION_WINDOW as i32);
    }
}

/// Four readers that have stopped fill the window; without lending a fifth gets nothing.
#[test]
fn stuck_readers_stop_everyone_where_nothing_is_lent() {
    let readers = [[Reader::Stuck; 4].as_slice(), &[Reader::Keen]].concat();
    assert!(!Run::new(&readers, false).all_get_theirs(1_000));
    assert!(Run::new(&readers, true).all_get_theirs(1_000));
}
