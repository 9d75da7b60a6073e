//! Programs that know nothing of the mesh, through it: nginx and curl, redis and its benchmark;
//! over the sockmap short-cut postgres with pgbench and iperf3 as well.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod shortcut;
#[path = "../support/mod.rs"]
mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use lab::Redirect;
use rand::{RngCore, SeedableRng, rngs::StdRng};
use support::{Case, Guarded, TestLab, at, at_vip, eventually, run_cases};

const CASES: &[Case] = &[
    ("curl_gets_files_from_nginx", curl_gets_files_from_nginx),
    ("curl_posts_to_nginx", curl_posts_to_nginx),
    ("an_upload_is_refused_early", an_upload_is_refused_early),
    ("redis_benchmark_runs", redis_benchmark_runs),
];

#[test]
fn tunnel() {
    run_cases("tunnel", Redirect::Tunnel, CASES);
}

#[test]
fn ebpf() {
    run_cases("ebpf", Redirect::Ebpf, CASES);
}

#[test]
fn ebpf_with_the_short_cut() {
    shortcut::run("ebpf_with_the_short_cut");
}

#[test]
fn ebpf_with_a_short_cut_nobody_asks_for() {
    shortcut::run_without("ebpf_with_a_short_cut_nobody_asks_for");
}

/// The same programs without a mesh: shows that a failure above is the mesh's.
#[test]
fn none() {
    let cases: &[Case] = &[
        ("curl_gets_a_file_from_nginx", |lab| {
            let directory = tempfile::tempdir().unwrap();
            let _nginx = nginx(lab, "server-b", directory.path());
            fetch(
                lab,
                directory.path(),
                &format!("http://{}/small", at("server-b", 8080)),
                "small",
            );
        }),
        ("an_upload_is_refused_early", an_upload_is_refused_early),
    ];
    run_cases("none", Redirect::None, cases);
}

/// Starts an nginx on `host`:8080 that serves `small` (5 KB) and `large` (20 MB).
fn nginx(lab: &TestLab, host: &str, directory: &Path) -> Guarded {
    let path = directory.display();
    let mut block = vec![0; 999_983];
    StdRng::seed_from_u64(1).fill_bytes(&mut block);
    let content: Vec<u8> = block.iter().copied().cycle().take(20_000_000).collect();
    fs::write(directory.join("large"), &content).unwrap();
    fs::write(directory.join("small"), &content[..5000]).unwrap();
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .iter()
        .map(|kind| format!("{kind}_temp_path {path}/{kind};\n"))
        .collect();
    let config = format!(
        "daemon off;\nmaster_process off;\nuser root;\npid {path}/nginx.pid;\n\
         error_log {path}/error.log;\nevents {{}}\nhttp {{\naccess_log {path}/access.log;\n\
         {temporary}client_max_body_size 0;\n\
         server {{\nlisten 8080;\nroot {path};\n\
         location /refused {{ client_max_body_size 1m; proxy_pass http://127.0.0.1:8081; }}\n\
         location /upload {{ client_body_in_file_only on; proxy_pass http://127.0.0.1:8081; }}\n\
         }}\n\
         server {{\nlisten 127.0.0.1:8081;\nlocation / {{ return 200 $http_content_length; }}\n}}\n}}\n"
    );
    let file = directory.join("nginx.conf");
    fs::write(&file, config).unwrap();
    let mut command = lab.lab.command(host, "nginx").unwrap();
    command
        .arg("-c")
        .arg(&file)
        .arg("-e")
        .arg(directory.join("error.log"));
    let child = command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let nginx = Guarded(child);
    eventually("nginx serves", || {
        lab.try_connect(host, ([127, 0, 0, 1], 8080).into(), Duration::from_secs(1))
            .ok()
    });
    nginx
}

fn curl(lab: &TestLab, arguments: &[&str]) -> Vec<u8> {
    let mut all = vec!["-sS", "--fail", "--noproxy", "*", "--max-time", "30"];
    all.extend(arguments);
    let output = lab.run("client-a", "curl", &all);
    assert!(
        output.status.success(),
        "curl {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

fn fetch(lab: &TestLab, directory: &Path, url: &str, file: &str) {
    let got = curl(lab, &[url]);
    assert!(
        got == fs::read(directory.join(file)).unwrap(),
        "{url} came back different"
    );
}

fn opened(lab: &TestLab, ztunnel: &str) -> u64 {
    let labels = ["source_workload=\"client-a\""];
    lab.metrics(ztunnel)
        .sum("istio_tcp_connections_opened_total", &labels)
}

fn curl_gets_files_from_nginx(lab: &mut TestLab) {
    for server in ["server-b", "server-a"] {
        let directory = tempfile::tempdir().unwrap();
        let _nginx = nginx(lab, server, directory.path());
        let before = opened(lab, "ztunnel-a");
        for to in [at(server, 8080), at_vip(server, 80)] {
            for file in ["small", "large"] {
                fetch(lab, directory.path(), &format!("http://{to}/{file}"), file);
            }
        }
        // One connection, many requests; then a connection per request.
        let to = at(server, 8080);
        let many = format!("http://{to}/small?[1-100]");
        assert_eq!(curl(lab, &[&many]).len(), 100 * 5000);
        for _ in 0..10 {
            fetch(
                lab,
                directory.path(),
                &format!("http://{to}/small"),
                "small",
            );
        }
        let log = fs::read_to_string(directory.path().join("access.log")).unwrap();
        let from_client = log
            .lines()
            .filter(|line| line.starts_with("10.244.1.11 "))
            .count();
        assert_eq!(
            from_client,
            4 + 100 + 10,
            "requests that nginx saw coming from the client"
        );
        eventually("the ztunnel counted curl's connections", || {
            (opened(lab, "ztunnel-a") >= before + 15).then_some(())
        });
    }
}

fn curl_posts_to_nginx(lab: &mut TestLab) {
    let directory = tempfile::tempdir().unwrap();
    let _nginx = nginx(lab, "server-b", directory.path());
    let large: PathBuf = directory.path().join("large");
    let data = format!("@{}", large.display());
    let url = format!("http://{}/upload", at("server-b", 8080));
    let answer = curl(lab, &["-H", "Expect:", "--data-binary", &data, &url]);
    assert_eq!(String::from_utf8_lossy(&answer), "20000000");
    let stored = fs::read_dir(directory.path().join("client_body")).unwrap();
    let stored: Vec<_> = stored.map(|entry| entry.unwrap().path()).collect();
    assert_eq!(stored.len(), 1, "{stored:?}");
    assert!(
        fs::read(&stored[0]).unwrap() == fs::read(&large).unwrap(),
        "the upload differs"
    );
}

/// nginx answers 413 as soon as it has seen how long an upload is; the client, which goes on
/// sending its 60 MB, gets the answer.
fn an_upload_is_refused_early(lab: &mut TestLab) {
    for server in ["server-b", "server-a"] {
        let directory = tempfile::tempdir().unwrap();
        let _nginx = nginx(lab, server, directory.path());
        let file = directory.path().join("upload");
        fs::write(&file, vec![b'u'; 60_000_000]).unwrap();
        let data = format!("@{}", file.display());
        let url = format!("http://{}/refused", at(server, 8080));
        let told = lab.run(
            "client-a",
            "curl",
            &[
                "-sS",
                "--noproxy",
                "*",
                "--max-time",
                "30",
                "-H",
                "Expect:",
                "-o",
                "/dev/null",
                "-w",
                "%{http_code}",
                "--data-binary",
                &data,
                &url,
            ],
        );
        let code = String::from_utf8_lossy(&told.stdout);
        assert_eq!(
            code,
            "413",
            "{server}: {}",
            String::from_utf8_lossy(&told.stderr)
        );
    }
}

fn redis_benchmark_runs(lab: &mut TestLab) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().display().to_string();
    let mut command = lab.lab.command("server-b", "redis-server").unwrap();
    command.args([
        "--port",
        "6379",
        "--bind",
        "0.0.0.0",
        "--protected-mode",
        "no",
    ]);
    command.args(["--save", "", "--appendonly", "no", "--dir", &path]);
    let _redis = Guarded(command.stdout(Stdio::null()).spawn().unwrap());
    let local = ([127, 0, 0, 1], 6379).into();
    eventually("redis serves", || {
        lab.try_connect("server-b", local, Duration::from_secs(1))
            .ok()
    });

    let before = opened(lab, "ztunnel-b");
    let run = |program: &str, host: &str, arguments: &[&str]| {
        let mut all = vec!["-h", host];
        all.extend(arguments);
        let output = lab.run("client-a", program, &all);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            output.status.success(),
            "{program} {arguments:?}: {text} {errors}"
        );
        assert!(
            !text.contains("rror") && !errors.contains("rror"),
            "{text} {errors}"
        );
        text
    };
    let value = "v".repeat(100_000);
    let (address, service) = (
        at("server-b", 6379).ip().to_string(),
        at_vip("server-b", 6379).ip().to_string(),
    );
    assert_eq!(
        run("redis-cli", &address, &["SET", "key", &value]).trim(),
        "OK"
    );
    assert_eq!(run("redis-cli", &service, &["GET", "key"]).trim(), value);
    let tests = ["-t", "ping_mbulk,set,get,lrange_100,mset", "--csv"];
    for shape in [
        &["-n", "10000", "-c", "50"][..],
        &["-n", "20000", "-c", "20", "-P", "16"],
    ] {
        let text = run("redis-benchmark", &address, &[shape, &tests].concat());
        let rows = text.lines().filter(|line| !line.starts_with("\"test\""));
        assert!(rows.count() >= 5, "{text}");
    }
    let large = [
        "-n", "300", "-c", "8", "-d", "200000", "-t", "set,get", "--csv",
    ];
    run("redis-benchmark", &address, &large);
    eventually("the ztunnel counted redis-benchmark's connections", || {
        (opened(lab, "ztunnel-b") >= before + 70).then_some(())
    });
}
