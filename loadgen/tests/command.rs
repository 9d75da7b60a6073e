//! The binary: output, exit status, signals.
#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

fn loadgen(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_loadgen"));
    command
        .args(arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn run(arguments: &[&str]) -> Output {
    loadgen(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

struct Serving {
    child: Child,
    address: String,
}

impl Serving {
    fn start() -> Self {
        let mut child = loadgen(&["serve", "--listen", "127.0.0.1:0"])
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap())
            .read_line(&mut line)
            .unwrap();
        let address = line
            .trim()
            .strip_prefix("listening on ")
            .unwrap()
            .to_owned();
        Self { child, address }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
}

#[test]
fn the_json_file_has_the_fixed_shape() {
    let serving = Serving::start();
    let dir = tempfile::tempdir().unwrap();
    let (json, hgrm) = (dir.path().join("rr.json"), dir.path().join("rr.hgrm"));
    let output = run(&[
        "rr",
        "--to",
        &serving.address,
        "--connections",
        "4",
        "--size",
        "128",
        "--duration",
        "0.5",
        "--warmup",
        "0.1",
        "--json",
        json.to_str().unwrap(),
        "--hgrm",
        hgrm.to_str().unwrap(),
    ]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(
        text(&output.stdout).contains("rr, closed loop"),
        "{}",
        text(&output.stdout)
    );
    let document: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    assert_eq!(document["schema"], 1);
    assert_eq!(document["command"], "rr");
    assert_eq!(document["workload"]["connections"], 4);
    assert_eq!(document["workload"]["size_bytes"], 128);
    assert_eq!(document["saturated"], false);
    assert_eq!(document["skipped"], 0);
    assert!(document["outcomes"]["ok"].as_u64().unwrap() > 0);
    assert_eq!(
        document["outcomes"]["errors_by_kind"],
        serde_json::json!({})
    );
    for name in ["requests_per_s", "p50_us", "p90_us", "p99_us", "p999_us"] {
        assert!(
            document["metrics"][name].as_f64().unwrap() > 0.0,
            "{name}: {document}"
        );
    }
    assert!(std::fs::read_to_string(hgrm).unwrap().contains("#[Max"));
}

#[test]
fn interrupting_still_writes_the_results() {
    let serving = Serving::start();
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("rr.json");
    let child = loadgen(&[
        "rr",
        "--to",
        &serving.address,
        "--duration",
        "60",
        "--warmup",
        "0",
        "--json",
        json.to_str().unwrap(),
    ])
    .spawn()
    .unwrap();
    thread::sleep(Duration::from_millis(700));
    let begun = Instant::now();
    signal(&child, Signal::SIGINT);
    let output = child.wait_with_output().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(30), "it ran on");
    assert!(
        output.status.success(),
        "{:?} {}",
        output.status,
        text(&output.stderr)
    );
    let document: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    assert_eq!(document["interrupted"], true);
    let measured = document["measured_s"].as_f64().unwrap();
    assert!((0.3..3.0).contains(&measured), "{measured}");
    assert!(document["outcomes"]["ok"].as_u64().unwrap() > 0);
}

#[test]
fn a_line_a_second_says_how_it_goes() {
    let serving = Serving::start();
    let output = run(&[
        "rr",
        "--to",
        &serving.address,
        "--duration",
        "2",
        "--warmup",
        "0.5",
        "--progress",
        "--no-calibration",
    ]);
    let stderr = text(&output.stderr);
    let lines: Vec<&str> = stderr.lines().collect();
    assert!((2..=3).contains(&lines.len()), "{stderr}");
    for line in lines {
        let rate = line.split_whitespace().zip(line.split_whitespace().skip(1));
        let rate = rate
            .filter(|(_, unit)| *unit == "requests/s")
            .map(|(n, _)| n);
        let rate: Vec<f64> = rate.map(|n| n.parse().unwrap()).collect();
        assert!(rate.len() == 1 && rate[0] > 0.0, "{line}");
        assert!(line.contains("0 failed"), "{line}");
    }
}

#[test]
fn markers_tell_the_measured_window() {
    let serving = Serving::start();
    let begun = Instant::now();
    let mut child = loadgen(&[
        "rr",
        "--to",
        &serving.address,
        "--duration",
        "0.5",
        "--warmup",
        "0.2",
        "--markers",
    ])
    .spawn()
    .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut next = || {
        (
            lines.next().unwrap().unwrap(),
            begun.elapsed().as_secs_f64(),
        )
    };
    let ((first, from), (second, until)) = (next(), next());
    assert_eq!((first.as_str(), second.as_str()), ("measuring", "measured"));
    // Each may be read late, but not early.
    assert!((0.2..30.0).contains(&from), "{from}");
    assert!((0.7..30.0).contains(&until), "{until}");
    assert!(next().0.starts_with("rr, closed loop"));
    assert!(child.wait().unwrap().success());
}

#[test]
fn serve_ends_on_sigterm_and_says_what_it_did() {
    let mut serving = Serving::start();
    let output = run(&[
        "connect",
        "--to",
        &serving.address,
        "--duration",
        "0.2",
        "--warmup",
        "0",
    ]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    signal(&serving.child, Signal::SIGTERM);
    let status = serving.child.wait().unwrap();
    assert!(status.success(), "{status:?}");
}

/// An address nobody listens on.
fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

#[test]
fn failures_are_one_line_and_a_status() {
    let free = free_address();
    let serving = Serving::start();
    let cases: [(&[&str], i32, &str); 8] = [
        (
            &["rr", "--to", &free, "--duration", "1"],
            1,
            "connect_refused",
        ),
        (
            &[
                "connect",
                "--to",
                &free,
                "--duration",
                "0.2",
                "--warmup",
                "0",
            ],
            1,
            "connect_refused",
        ),
        (
            &["stream", "--to", &free, "--duration", "1"],
            1,
            "connect_refused",
        ),
        (
            &["serve", "--listen", &serving.address],
            1,
            "another process listens there",
        ),
        (
            &["rr", "--to", &free, "--size", "0"],
            1,
            "--size is 0, must be 1 to",
        ),
        (
            &["rr", "--to", &free, "--connections", "0"],
            1,
            "--connections is 0, must be 1 to",
        ),
        (
            &["rr", "--to", &free, "--duration", "soon"],
            2,
            "must be a time such as",
        ),
        (
            &["rr", "--to", &serving.address, "--cpus", "900"],
            1,
            "--cpus",
        ),
    ];
    for (arguments, status, message) in cases {
        let output = run(arguments);
        let stderr = text(&output.stderr);
        assert_eq!(
            output.status.code(),
            Some(status),
            "{arguments:?}: {stderr}"
        );
        assert!(stderr.contains(message), "{arguments:?}: {stderr}");
        if status == 1 {
            assert_eq!(stderr.lines().count(), 1, "{stderr}");
        }
    }
}

#[test]
fn an_unwritable_result_file_is_named() {
    let serving = Serving::start();
    let output = run(&[
        "rr",
        "--to",
        &serving.address,
        "--duration",
        "0.1",
        "--warmup",
        "0",
        "--json",
        "/nonexistent/rr.json",
    ]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("cannot write /nonexistent/rr.json"));
}
