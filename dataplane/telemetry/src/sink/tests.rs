//! Tests of the sink, with outputs that stall when told to.

use super::*;

/// An output that keeps what is written, and stalls while the gate is held.
#[derive(Clone, Default)]
pub(crate) struct TestOutput {
    text: Arc<Mutex<Vec<u8>>>,
    gate: Arc<Mutex<()>>,
    writes: Arc<AtomicU64>,
}

impl Write for TestOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.writes.fetch_add(1, Ordering::SeqCst);
        let _open = self.gate.lock().unwrap();
        self.text.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl TestOutput {
    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.text.lock().unwrap().clone()).unwrap()
    }
}

const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn lines_of_each_producer_arrive_whole_and_in_order() {
    const PRODUCERS: usize = 3;
    const LINES: usize = 20_000;
    let output = TestOutput::default();
    let sink = LogSink::new(LogFormat::Plain, 64 << 20, output.clone()).unwrap();
    thread::scope(|scope| {
        for producer in 0..PRODUCERS {
            let queue = sink.queue();
            scope.spawn(move || {
                for line in 0..LINES {
                    assert!(queue.push(format!("{producer} {line}\n").as_bytes()));
                }
            });
        }
    });
    assert!(sink.flush(PATIENCE));
    let mut next = [0; PRODUCERS];
    for line in output.text().lines() {
        let (producer, number) = line.split_once(' ').unwrap();
        let expected = &mut next[producer.parse::<usize>().unwrap()];
        assert_eq!(number.parse::<usize>().unwrap(), *expected);
        *expected += 1;
    }
    assert_eq!(next, [LINES; PRODUCERS]);
    assert_eq!(sink.dropped(), 0);
    sink.stop();
}

#[test]
fn a_stalled_output_drops_and_counts_and_never_blocks() {
    let output = TestOutput::default();
    let sink = LogSink::new(LogFormat::Plain, 1 << 16, output.clone()).unwrap();
    let queue = sink.queue();
    let stall = output.gate.lock().unwrap();
    queue.push(b"first\n");
    let deadline = Instant::now() + PATIENCE;
    while output.writes.load(Ordering::SeqCst) == 0 {
        assert!(Instant::now() < deadline, "the writer did not wake up");
        thread::yield_now();
    }
    // The writer is now inside write(2), so to say. 10 MB into a queue of 64 KiB:
    let line = [b"x".repeat(99), b"\n".to_vec()].concat();
    let (mut queued, mut dropped) = (0_u64, 0_u64);
    for _ in 0..100_000 {
        if queue.push(&line) {
            queued += 1;
        } else {
            dropped += 1;
        }
    }
    assert_eq!(
        output.writes.load(Ordering::SeqCst),
        1,
        "the writer was not stalled"
    );
    assert_eq!(
        queued,
        2 * ((32 << 10) / 100),
        "the queue holds its bound and no more"
    );
    assert_eq!((queue.dropped(), sink.dropped()), (dropped, dropped));
    assert!(
        !sink.flush(Duration::from_millis(50)),
        "nothing could be flushed"
    );
    drop(stall);
    assert!(sink.flush(PATIENCE));
    let text = output.text();
    assert_eq!(
        text.lines().filter(|l| l.starts_with("xxx")).count() as u64,
        queued
    );
    let notices: Vec<_> = text
        .lines()
        .filter(|l| l.contains("log lines dropped"))
        .collect();
    let [notice] = notices[..] else {
        panic!("{notices:?}")
    };
    let fields =
        "\twarn\ttelemetry::sink\tlog lines dropped: output is slower than the log\tcount=";
    assert_eq!(&notice[27..], format!("{fields}{dropped}"));
    // And it goes on as if nothing had been.
    assert!(queue.push(b"after\n"));
    assert!(sink.flush(PATIENCE));
    assert!(output.text().ends_with("after\n"));
    sink.stop();
}

#[test]
fn a_sleeping_writer_is_woken_by_a_line() {
    let output = TestOutput::default();
    let sink = LogSink::new(LogFormat::Plain, 1 << 16, output.clone()).unwrap();
    let queue = sink.queue();
    for round in 1..=3 {
        let deadline = Instant::now() + PATIENCE;
        while !sink.shared.sleeping.load(Ordering::SeqCst) {
            assert!(Instant::now() < deadline, "the writer does not sleep");
            thread::sleep(Duration::from_millis(1));
        }
        thread::sleep(Duration::from_millis(20));
        queue.push(b"line\n");
        assert!(
            !sink.shared.sleeping.load(Ordering::SeqCst),
            "the line did not wake the writer"
        );
        while output.text().lines().count() < round {
            assert!(Instant::now() < deadline, "line {round} was not written");
            thread::sleep(Duration::from_millis(1));
        }
    }
    sink.stop();
}

#[test]
fn a_drop_notice_in_json_is_json() {
    let mut line = String::new();
    let now = SystemTime::UNIX_EPOCH;
    append_notice(
        &mut line,
        LogFormat::Json,
        &mut Timestamps::default(),
        now,
        7,
    );
    let value: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(value["count"], 7);
    assert_eq!(value["level"], "warn");
    assert_eq!(value["time"], "1970-01-01T00:00:00.000000Z");
    assert!(line.ends_with("}\n"));
}
