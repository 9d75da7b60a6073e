//! What the namespace tests share: labs that go away again, hosts to send and receive on, and
//! a runner that uses one lab for many cases.
//!
//! Sockets are made by threads inside a host's namespace, so tests talk to them directly.
#![allow(
    dead_code,
    reason = "every test binary uses its own part of this module"
)]

use std::fs;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use lab::{Host, Lab, LabOptions, Redirect, http_get};
use rand::{Rng, RngCore, SeedableRng, rngs::StdRng};

/// No single socket operation of a test waits longer than this.
pub(crate) const PATIENCE: Duration = Duration::from_secs(15);

/// Whether the test can run here. If not, says so by name, past libtest's capture.
pub(crate) fn can_run(test: &str) -> bool {
    if nix::unistd::geteuid().is_root() {
        return true;
    }
    let _ = writeln!(io::stderr(), "skipped: {test}: needs root");
    false
}

/// Labs use the whole machine: tests of one binary take turns.
pub(crate) fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A lab name nobody else has.
pub(crate) fn unique(tag: &str) -> String {
    format!("t{}-{tag}", std::process::id())
}

/// A lab that is removed when the test ends, however it ends. `LAB_KEEP=1` leaves it up.
#[derive(Debug)]
pub(crate) struct TestLab {
    pub(crate) lab: Lab,
}

impl TestLab {
    pub(crate) fn up(tag: &str, redirect: Redirect) -> Self {
        Self::with(&LabOptions {
            name: unique(tag),
            redirect,
            ..LabOptions::default()
        })
    }

    pub(crate) fn with(options: &LabOptions) -> Self {
        match Lab::up(options) {
            Ok(lab) => Self { lab },
            Err(error) => panic!("lab up --redirect {}: {error}", options.redirect),
        }
    }

    pub(crate) fn address(&self, host: &str) -> IpAddr {
        Lab::address(host).unwrap()
    }

    /// Listens on `host`, at any address, `port`.
    pub(crate) fn listen(&self, host: &str, port: u16) -> TcpListener {
        let listen = || TcpListener::bind((IpAddr::from([0, 0, 0, 0]), port));
        match self.lab.on(host, listen).unwrap() {
            Ok(listener) => listener,
            Err(error) => panic!("listening on {host}:{port}: {error}"),
        }
    }

    /// Listens on `host`, at any IPv6 address, `port`.
    pub(crate) fn listen_v6(&self, host: &str, port: u16) -> TcpListener {
        let listen = || TcpListener::bind((IpAddr::from([0; 16]), port));
        match self.lab.on(host, listen).unwrap() {
            Ok(listener) => listener,
            Err(error) => panic!("listening on [::] of {host}, port {port}: {error}"),
        }
    }

    /// Connects from `host`.
    pub(crate) fn try_connect(
        &self,
        host: &str,
        to: SocketAddr,
        limit: Duration,
    ) -> io::Result<TcpStream> {
        let stream = self
            .lab
            .on(host, || TcpStream::connect_timeout(&to, limit))
            .unwrap()?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    /// Connects from `host`; fails the test if it cannot.
    pub(crate) fn connect(&self, host: &str, to: SocketAddr) -> TcpStream {
        match self.try_connect(host, to, PATIENCE) {
            Ok(stream) => stream,
            Err(error) => panic!("{host} -> {to}: {error}"),
        }
    }

    /// Runs `program` on `host` to its end.
    pub(crate) fn run(&self, host: &str, program: &str, arguments: &[&str]) -> Output {
        match self
            .lab
            .command(host, program)
            .unwrap()
            .args(arguments)
            .output()
        {
            Ok(output) => output,
            Err(error) => panic!("{program} on {host}: {error}"),
        }
    }

    /// Metrics of the ztunnel `host`.
    pub(crate) fn metrics(&self, host: &str) -> Metrics {
        let server = SocketAddr::from(([127, 0, 0, 1], 15020));
        let netns = self.lab.netns(host).unwrap();
        let (status, text) = http_get(&netns, server, "/metrics", PATIENCE).unwrap();
        assert_eq!(status, 200, "{host} /metrics: {text}");
        Metrics::parse(&text)
    }

    /// `host`'s `/config_dump`.
    pub(crate) fn config_dump(&self, host: &str) -> serde_json::Value {
        let server = SocketAddr::from(([127, 0, 0, 1], 15000));
        let netns = self.lab.netns(host).unwrap();
        let (status, text) = http_get(&netns, server, "/config_dump", PATIENCE).unwrap();
        assert_eq!(status, 200, "{host} /config_dump: {text}");
        serde_json::from_str(&text).unwrap()
    }

    /// Lines that `host`'s log got since it was `from` bytes long.
    pub(crate) fn log_since(&self, host: &str, from: usize) -> Vec<String> {
        let bytes = fs::read(self.lab.log_path(host).unwrap()).unwrap();
        let text = String::from_utf8_lossy(&bytes[from.min(bytes.len())..]);
        text.lines().map(str::to_owned).collect()
    }

    pub(crate) fn log_length(&self, host: &str) -> usize {
        let path = self.lab.log_path(host).unwrap();
        usize::try_from(fs::metadata(path).unwrap().len()).unwrap()
    }
}

impl Drop for TestLab {
    fn drop(&mut self) {
        if std::env::var_os("LAB_KEEP").is_none()
            && let Err(error) = Lab::down(self.lab.name())
        {
            let _ = writeln!(io::stderr(), "lab down: {error}");
        }
    }
}

/// What must be the same before and after a lab: of the machine's own set-up everything, of the
/// rest what carries the lab's name (other labs may come and go meanwhile).
#[derive(Debug, Eq, PartialEq)]
pub(crate) struct Trace {
    pub(crate) namespaces: Vec<String>,
    pub(crate) mounts: Vec<String>,
    pub(crate) routes: String,
    pub(crate) rules: String,
    pub(crate) directory: bool,
    pub(crate) lock: bool,
}

impl Trace {
    pub(crate) fn take(name: &str) -> Self {
        let text = |program: &str, arguments: &[&str]| {
            let output = Command::new(program).args(arguments).output().unwrap();
            assert!(output.status.success());
            String::from_utf8(output.stdout).unwrap()
        };
        let ours = |text: String| -> Vec<String> {
            text.lines()
                .filter(|line| line.contains(name))
                .map(str::to_owned)
                .collect()
        };
        Self {
            namespaces: ours(text("ip", &["netns"])),
            mounts: ours(fs::read_to_string("/proc/mounts").unwrap()),
            routes: text("ip", &["-4", "route", "show", "table", "all"]),
            rules: text("ip", &["rule"]),
            directory: Path::new("/run/zt-lab").join(name).exists(),
            lock: Path::new("/run/zt-lab")
                .join(format!("{name}.lock"))
                .exists(),
        }
    }
}

/// One case of a test that shares its lab with others.
pub(crate) type Case = (&'static str, fn(&mut TestLab));

/// Runs every case on one lab and fails with the names of those that failed. `LAB_CASE=word` runs
/// only cases whose name holds the word.
pub(crate) fn run_cases(test: &str, redirect: Redirect, cases: &[Case]) {
    let options = LabOptions {
        name: unique(redirect.name()),
        redirect,
        ..LabOptions::default()
    };
    run_cases_on(test, &options, cases);
}

/// As [`run_cases`], on a lab with options of its own.
pub(crate) fn run_cases_on(test: &str, options: &LabOptions, cases: &[Case]) {
    if !can_run(test) {
        return;
    }
    let _turn = turn();
    let redirect = options.redirect;
    let mut lab = TestLab::with(options);
    let wanted = std::env::var("LAB_CASE").unwrap_or_default();
    let mut failed = Vec::new();
    for (name, case) in cases.iter().filter(|(name, _)| name.contains(&wanted)) {
        let marks = ["ztunnel-a", "ztunnel-b"].map(|host| {
            (
                host,
                if redirect == Redirect::None {
                    0
                } else {
                    lab.log_length(host)
                },
            )
        });
        let start = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| case(&mut lab)));
        let verdict = if result.is_ok() { "ok" } else { "FAILED" };
        let _ = writeln!(
            io::stderr(),
            "case {test}/{name}: {verdict} ({:.1?})",
            start.elapsed()
        );
        if result.is_err() {
            failed.push(*name);
            if redirect != Redirect::None {
                for (host, mark) in marks {
                    let lines = lab.log_since(host, mark);
                    let tail = &lines[lines.len().saturating_sub(12)..];
                    eprintln!("--- {host} during {name}:\n{}", tail.join("\n"));
                }
            }
        }
    }
    assert!(
        failed.is_empty(),
        "{test}: failed cases: {}",
        failed.join(", ")
    );
}

/// Where a service of `host` is reached.
pub(crate) fn at(host: &str, port: u16) -> SocketAddr {
    SocketAddr::new(Lab::address(host).unwrap(), port)
}

/// Where a service of `host` is reached by IPv6.
pub(crate) fn at_v6(host: &str, port: u16) -> SocketAddr {
    SocketAddr::new(Lab::address_v6(host).unwrap(), port)
}

/// Where the service in front of `host` is reached.
pub(crate) fn at_vip(host: &str, port: u16) -> SocketAddr {
    let host: Host = host.parse().unwrap();
    SocketAddr::new(host.service_address().unwrap(), port)
}

/// Accepts one connection within [`PATIENCE`].
pub(crate) fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    match try_accept(listener, PATIENCE) {
        Some(accepted) => accepted,
        None => panic!("no connection within {PATIENCE:?}"),
    }
}

/// Accepts one connection within `limit`.
pub(crate) fn try_accept(
    listener: &TcpListener,
    limit: Duration,
) -> Option<(TcpStream, SocketAddr)> {
    listener.set_nonblocking(true).unwrap();
    let deadline = Instant::now() + limit;
    loop {
        match listener.accept() {
            Ok((stream, peer)) => {
                stream.set_nonblocking(false).unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                stream.set_write_timeout(Some(PATIENCE)).unwrap();
                return Some((stream, peer));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if Instant::now() >= deadline {
                    return None;
                }
                thread::sleep(Duration::from_millis(2));
            }
            Err(error) => panic!("accept: {error}"),
        }
    }
}

/// Echoes everything `stream` gets until it ends, then ends the other direction.
pub(crate) fn echo(mut stream: TcpStream) -> io::Result<u64> {
    let mut buffer = vec![0; 128 << 10];
    let mut total = 0;
    loop {
        let n = stream.read(&mut buffer)?;
        if n == 0 {
            stream.shutdown(Shutdown::Write)?;
            return Ok(total);
        }
        stream.write_all(&buffer[..n])?;
        total += n as u64;
    }
}

/// An echo server for `connections` connections, one after the other being accepted, all served
/// at once. The thread returns the peers' addresses.
pub(crate) fn echo_server(
    listener: TcpListener,
    connections: usize,
) -> JoinHandle<Vec<SocketAddr>> {
    thread::spawn(move || {
        let mut serving = Vec::new();
        let mut peers = Vec::new();
        for _ in 0..connections {
            let (stream, peer) = accept(&listener);
            peers.push(peer);
            serving.push(thread::spawn(move || echo(stream)));
        }
        for served in serving {
            served.join().unwrap().unwrap();
        }
        peers
    })
}

/// Random bytes that both ends can compute at any offset: a random block, repeated. Its length is
/// prime, so lost, doubled or swapped pieces of any usual size show.
pub(crate) struct Pattern {
    block: Vec<u8>,
}

impl Pattern {
    const LENGTH: usize = 1_048_583;

    pub(crate) fn new(seed: u64) -> Self {
        let mut block = vec![0; Self::LENGTH];
        StdRng::seed_from_u64(seed).fill_bytes(&mut block);
        Self { block }
    }

    /// The bytes from `offset` on, at most `limit` of them and at least one if `limit` is.
    pub(crate) fn at(&self, offset: u64, limit: usize) -> &[u8] {
        let start = usize::try_from(offset % Self::LENGTH as u64).unwrap();
        let end = self.block.len().min(start + limit);
        &self.block[start..end]
    }

    /// Writes the first `total` bytes in chunks of random size up to `chunk_max`.
    pub(crate) fn send(&self, mut to: impl Write, total: u64, seed: u64, chunk_max: usize) {
        let mut random = StdRng::seed_from_u64(seed);
        let mut offset = 0;
        while offset < total {
            let left = usize::try_from(total - offset).unwrap_or(usize::MAX);
            let chunk = self.at(offset, random.random_range(1..=chunk_max).min(left));
            if let Err(error) = to.write_all(chunk) {
                panic!("writing at offset {offset} of {total} (seed {seed}): {error}");
            }
            offset += chunk.len() as u64;
        }
    }

    /// Reads to the end and checks that it is exactly the first `total` bytes.
    pub(crate) fn receive(&self, mut from: impl Read, total: u64) {
        let mut buffer = vec![0; 128 << 10];
        let mut offset = 0_u64;
        loop {
            let n = match from.read(&mut buffer) {
                Ok(n) => n,
                Err(error) => panic!("reading at offset {offset} of {total}: {error}"),
            };
            if n == 0 {
                break;
            }
            let mut got = &buffer[..n];
            while !got.is_empty() {
                let expected = self.at(offset, got.len());
                let (now, rest) = got.split_at(expected.len());
                if now != expected {
                    let wrong = now.iter().zip(expected).position(|(a, b)| a != b).unwrap();
                    panic!("byte {} of {total} differs", offset + wrong as u64);
                }
                offset += now.len() as u64;
                got = rest;
            }
        }
        assert_eq!(offset, total, "the stream ended early or late");
    }
}

/// Sends `total` bytes to an echo server behind `stream` and checks what comes back.
pub(crate) fn check_echo(stream: &TcpStream, pattern: &Pattern, total: u64, seed: u64) {
    let chunk_max = usize::try_from(total.clamp(1, 256 << 10)).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            pattern.send(stream, total, seed, chunk_max);
            stream.shutdown(Shutdown::Write).unwrap();
        });
        pattern.receive(stream, total);
    });
}

/// Opens `connections` from `client` to `server`, then echoes `bytes` over all of them at once.
pub(crate) fn echo_side_by_side(
    lab: &TestLab,
    (client, server): (&str, &str),
    connections: usize,
    pattern: &Pattern,
    bytes: u64,
) {
    let echo = echo_server(lab.listen(server, 8080), connections);
    let open: Vec<TcpStream> = (0..connections)
        .map(|_| lab.connect(client, at(server, 8080)))
        .collect();
    thread::scope(|scope| {
        for (seed, stream) in (0..).zip(&open) {
            scope.spawn(move || check_echo(stream, pattern, bytes, seed));
        }
    });
    echo.join().unwrap();
}

/// A program that becomes `program` with these variables besides.
pub(crate) fn program_with(directory: &Path, program: &str, variables: &[(&str, &str)]) -> PathBuf {
    let exports: String = variables
        .iter()
        .map(|(name, value)| format!("export {name}='{value}'\n"))
        .collect();
    let program = workspace_binary(program);
    let exec = format!("exec '{}' \"$@\"\n", program.display());
    script(directory, &format!("{exports}{exec}"))
}

/// An executable shell script.
pub(crate) fn script(directory: &Path, text: &str) -> PathBuf {
    let path = directory.join("program");
    fs::write(&path, format!("#!/bin/sh\n{text}")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// Prometheus samples: series text and value.
#[derive(Debug)]
pub(crate) struct Metrics(Vec<(String, f64)>);

impl Metrics {
    pub(crate) fn parse(text: &str) -> Self {
        let samples = text
            .lines()
            .filter(|line| !line.starts_with('#'))
            .filter_map(|line| {
                let (series, value) = line.rsplit_once(' ')?;
                Some((series.to_owned(), value.parse().ok()?))
            });
        Self(samples.collect())
    }

    /// Sum over all series of family `name` that carry every one of `labels` (`key="value"`).
    pub(crate) fn sum(&self, name: &str, labels: &[&str]) -> u64 {
        let matching = self.0.iter().filter(|(series, _)| {
            series.split('{').next() == Some(name) && labels.iter().all(|l| series.contains(l))
        });
        let sum: f64 = matching.map(|(_, value)| value).sum();
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "counters"
        )]
        let sum = sum as u64;
        sum
    }
}

/// Polls `f` until it returns something; panics with `what` after [`PATIENCE`].
pub(crate) fn eventually<T>(what: &str, mut f: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = f() {
            return value;
        }
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// A child process that is killed when the test ends.
#[derive(Debug)]
pub(crate) struct Guarded(pub(crate) Child);

impl Drop for Guarded {
    fn drop(&mut self) {
        // Either fails only if the child has ended and been collected.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The `lab` program.
pub(crate) fn lab_program() -> Command {
    Command::new(workspace_binary("lab"))
}

/// A built workspace binary, looked up as the lab does.
pub(crate) fn workspace_binary(name: &str) -> PathBuf {
    lab::workspace_binary(name).unwrap_or_else(|error| panic!("{error}"))
}

/// The one line an error must be; fails the test if it is more or none.
pub(crate) fn one_line(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 1, "not one line on stderr: {text:?}");
    lines[0].to_owned()
}
