//! The same and more over the sockmap short-cut, forced where the kernel's is refused. What the
//! programs send and get is compared; counters show that the bytes did take the short-cut. And what
//! becomes of bulk, with ztunnels that ask for the short-cut and with others.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use lab::{LabOptions, Redirect};
use serde_json::Value;

use crate::support::{
    Case, Guarded, TestLab, at, eventually, program_with, run_cases_on, unique, workspace_binary,
};
use crate::{curl_gets_files_from_nginx, nginx, redis_benchmark_runs};

const SERVER: &str = "server-a";

const CASES: &[Case] = &[
    ("redis", |lab| {
        counted(lab, "redis-server", Way::ShortCut, redis_benchmark_runs);
    }),
    ("nginx_and_curl", |lab| {
        counted(lab, "nginx", Way::ShortCut, curl_gets_files_from_nginx);
    }),
    ("long_requests_to_nginx", |lab| {
        counted(lab, "nginx", Way::ShortCut, long_requests_to_nginx);
    }),
    ("postgres", |lab| {
        counted(lab, "/usr/lib/postgresql", Way::ShortCut, postgres);
    }),
    // Its sockets block: that of the first connection is entered, and shows it.
    ("iperf3", |lab| counted(lab, "iperf3", Way::Tcp, iperf3)),
    ("bulk_is_spliced_in_the_end", bulk_is_spliced_in_the_end),
];

/// An agent with the short-cut, ztunnels without.
const WITHOUT_CASES: &[Case] = &[
    ("bulk_stays_with_tcp", bulk_stays_with_tcp),
    ("redis", |lab| redis_benchmark_runs(lab)),
];

/// How a program's bytes are expected to go, at least some of them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Way {
    ShortCut,
    Tcp,
}

pub(super) fn run(test: &str) {
    let options = LabOptions {
        name: unique("sockmap"),
        redirect: Redirect::Ebpf,
        sockmap: true,
        ..LabOptions::default()
    };
    run_cases_on(test, &options, CASES);
}

/// The agent offers the short-cut to ztunnels that do not ask for it.
pub(super) fn run_without(test: &str) {
    let directory = tempfile::tempdir().unwrap();
    let off = program_with(directory.path(), "ztunnel", &[("SOCKMAP", "off")]);
    let options = LabOptions {
        name: unique("unasked"),
        redirect: Redirect::Ebpf,
        sockmap: true,
        ztunnel: Some(off),
        ..LabOptions::default()
    };
    run_cases_on(test, &options, WITHOUT_CASES);
}

/// Runs a case and sees that its bytes went the way they should, if there is a short-cut and the
/// program is there.
fn counted(lab: &mut TestLab, program: &str, way: Way, case: fn(&mut TestLab)) {
    let skipped = |reason: &str| {
        let _ = writeln!(io::stderr(), "skipped: short-cut: {program}: {reason}");
    };
    if shortcut(lab)["enabled"] != true {
        return skipped("this kernel's sockmap is refused even if forced");
    }
    if !is_installed(program) {
        return skipped("it is not installed");
    }
    let before = shortcut(lab);
    case(lab);
    let after = shortcut(lab);
    let more = |name: &str| counter(&after, name) - counter(&before, name);
    let (there, back) = (more("to_ztunnel_bytes"), more("to_pod_bytes"));
    let by_tcp = more("bypassed_bytes");
    println!("{program}: to ztunnel {there} bytes, to pods {back}, by TCP {by_tcp}");
    assert!(more("sockets") > 0, "{program} had no socket in the map");
    match way {
        Way::ShortCut => assert!(there + back > 0, "no byte of {program} took the short-cut"),
        Way::Tcp => assert!(by_tcp > 0, "no byte of {program} went by TCP"),
    }
}

/// Streams bytes to an echo server, all of them checked, for longer and longer until some are
/// spliced: a flow leaves the short-cut within a fraction of a second where the machine is quiet.
/// Returns how many took the short-cut.
fn bulk(lab: &TestLab) -> u64 {
    let loadgen = workspace_binary("loadgen");
    let loadgen = loadgen.to_str().unwrap();
    let arguments = ["serve", "--listen", "0.0.0.0:9000", "--mode", "echo"];
    let _server = serve(lab, 9000, loadgen, &arguments);
    let spliced = || {
        let metrics = lab.metrics("ztunnel-a");
        metrics.sum("ztunnel_worker_spliced_bytes_total", &[])
    };
    let redirected = || {
        let status = shortcut(lab);
        // None where the kernel is refused.
        let counter = |name: &str| status["counters"][name].as_u64().unwrap_or(0);
        counter("to_ztunnel_bytes") + counter("to_pod_bytes")
    };
    let to = at(SERVER, 9000).to_string();
    let (spliced_before, redirected_before) = (spliced(), redirected());
    let small = ["rr", "--to", &to, "--duration", "0.5", "--warmup", "0"];
    client(lab, loadgen, &small);
    assert_eq!(spliced(), spliced_before, "messages were spliced");
    for seconds in ["1", "4", "16"] {
        let shape = ["--connections", "4", "--direction", "both", "--verify"];
        let fixed = [
            "stream",
            "--to",
            &to,
            "--warmup",
            "0",
            "--duration",
            seconds,
        ];
        let text = client(lab, loadgen, &[&fixed[..], &shape].concat());
        let text = String::from_utf8_lossy(&text);
        assert!(text.contains(" 0 failed"), "{text}");
        if spliced() > spliced_before {
            return redirected() - redirected_before;
        }
    }
    panic!("nothing was spliced");
}

fn bulk_is_spliced_in_the_end(lab: &mut TestLab) {
    let redirected = bulk(lab);
    let enabled = shortcut(lab)["enabled"] == true;
    assert_eq!(redirected > 0, enabled, "{redirected} bytes redirected");
}

fn bulk_stays_with_tcp(lab: &mut TestLab) {
    assert_eq!(bulk(lab), 0, "bytes were redirected");
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    Path::new(program).is_absolute() && Path::new(program).exists()
        || std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// The agent's word on the short-cut of node A.
fn shortcut(lab: &TestLab) -> Value {
    let config = lab.lab.directory().join("node-a-agent.yaml");
    let agent = workspace_binary("node-agent");
    let arguments = ["status", "--json", "--config", config.to_str().unwrap()];
    let output = lab.run("node-a", agent.to_str().unwrap(), &arguments);
    assert!(output.status.success(), "{output:?}");
    let status: Value = serde_json::from_slice(&output.stdout).unwrap();
    status["sockmap"].clone()
}

fn counter(status: &Value, name: &str) -> u64 {
    status["counters"][name].as_u64().unwrap()
}

/// Starts a server and waits for its port.
fn serve(lab: &TestLab, port: u16, program: &str, arguments: &[&str]) -> Guarded {
    let mut command = lab.lab.command(SERVER, program).unwrap();
    let command = command.args(arguments).stdin(Stdio::null());
    let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let server = Guarded(child.unwrap());
    eventually(&format!("{program} serves"), || {
        let local = ([127, 0, 0, 1], port).into();
        lab.try_connect(SERVER, local, Duration::from_secs(1)).ok()
    });
    server
}

/// Runs a client to its successful end and returns its standard output.
fn client(lab: &TestLab, program: &str, arguments: &[&str]) -> Vec<u8> {
    let output = lab.run("client-a", program, arguments);
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {} {}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

/// Where the kernel's FIONREAD is wrong on sockets in a map, nginx now and then waits in vain after
/// a request that filled its receive buffer: why such kernels are refused. Elsewhere all are
/// answered; an answer that comes is whole everywhere.
fn long_requests_to_nginx(lab: &mut TestLab) {
    let directory = tempfile::tempdir().unwrap();
    let _nginx = nginx(lab, SERVER, directory.path());
    let small = fs::read(directory.path().join("small")).unwrap();
    let forced = shortcut(lab)["forced"] == true;
    let url = format!("http://{}/small", at(SERVER, 8080));
    let mut stalled = 0;
    for size in [100, 900, 1500, 2000, 2500, 3000, 3500, 5000, 7000] {
        let header = format!("X-Long: {}", "x".repeat(size));
        let fixed = ["-sS", "--fail", "--noproxy", "*", "--max-time"];
        let patience = if forced { "2" } else { "30" };
        let arguments = [&fixed[..], &[patience, "-H", &header, &url]].concat();
        let output = lab.run("client-a", "curl", &arguments);
        if output.status.success() {
            assert!(output.stdout == small, "after a header of {size} bytes");
        } else {
            stalled += 1;
        }
    }
    println!("{stalled} requests to nginx were waited for in vain");
    assert!(
        forced || stalled == 0,
        "{stalled} requests were not answered"
    );
}

/// The newest version's directory of programs.
fn postgres_programs() -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").unwrap();
    let newest = versions.map(|entry| entry.unwrap().path()).max().unwrap();
    newest.join("bin")
}

/// A new cluster in `directory` that serves on 5432, run by the user postgres: it refuses root.
fn postgres_server(lab: &TestLab, directory: &Path) -> Guarded {
    let programs = postgres_programs();
    let program = |name: &str| programs.join(name).to_str().unwrap().to_owned();
    let data = directory.join("data");
    let data = data.to_str().unwrap();
    let user = [
        "--reuid",
        "postgres",
        "--regid",
        "postgres",
        "--clear-groups",
    ];
    let own = ["-R", "postgres", directory.to_str().unwrap()];
    assert!(lab.run(SERVER, "chown", &own).status.success());
    let init = program("initdb");
    let arguments = [&user[..], &[&init, "-A", "trust", "-N", "-D", data]].concat();
    let made = lab.run(SERVER, "setpriv", &arguments);
    assert!(made.status.success(), "{made:?}");
    let all = "host all all 0.0.0.0/0 trust\n";
    fs::write(format!("{data}/pg_hba.conf"), all).unwrap();
    let server = program("postgres");
    let sockets = format!("unix_socket_directories={data}");
    let options = ["-D", data, "-h", "0.0.0.0", "-F", "-c", &sockets];
    let arguments = [&user[..], &[&server], &options].concat();
    serve(lab, 5432, "setpriv", &arguments)
}

fn postgres(lab: &mut TestLab) {
    let directory = tempfile::tempdir().unwrap();
    let _server = postgres_server(lab, directory.path());
    let programs = postgres_programs();
    let (bench, psql) = (programs.join("pgbench"), programs.join("psql"));
    let (bench, psql) = (bench.to_str().unwrap(), psql.to_str().unwrap());
    let to = at(SERVER, 1).ip().to_string();
    let login = ["-h", &to, "-U", "postgres", "postgres"];
    eventually("postgres answers", || {
        let arguments = [&["-X", "-c", "select 1"][..], &login].concat();
        lab.run("client-a", psql, &arguments)
            .status
            .success()
            .then_some(())
    });
    client(lab, bench, &[&["-i", "-q"][..], &login].concat());
    for shape in [&["-S", "-c", "8"][..], &["-c", "4", "-M", "prepared"]] {
        let arguments = [shape, &["-t", "200"], &login].concat();
        let text = client(lab, bench, &arguments);
        let text = String::from_utf8_lossy(&text);
        assert!(text.contains("number of failed transactions: 0 "), "{text}");
    }
    // 10 MB there and back.
    let sql = |commands: &[&str]| {
        let flags = commands.iter().flat_map(|command| ["-c", command]);
        let flags = ["-X", "-A", "-t", "-q"].into_iter().chain(flags);
        client(lab, psql, &flags.chain(login).collect::<Vec<_>>())
    };
    let all = "string_agg(md5(i::text), '' order by i)";
    let from = "from generate_series(1, 300000) i";
    let text = sql(&[&format!("select {all} {from}")]);
    assert_eq!(text.trim_ascii().len(), 32 * 300_000);
    let expected = sql(&[&format!("select md5({all}) {from}")]);
    let rows = directory.path().join("rows");
    fs::write(&rows, text.trim_ascii()).unwrap();
    let sum = sql(&[
        "create table copied (content text)",
        &format!("\\copy copied from '{}'", rows.display()),
        "select md5(content) from copied",
    ]);
    assert_eq!(sum, expected);
}

fn iperf3(lab: &mut TestLab) {
    let _server = serve(lab, 5201, "iperf3", &["-s"]);
    let to = at(SERVER, 1).ip().to_string();
    for shape in [&["-P", "4"][..], &["-P", "2", "-R"], &["--bidir"]] {
        let arguments = [&["-c", &to, "-n", "16M", "-J"][..], shape].concat();
        let text = client(lab, "iperf3", &arguments);
        let report: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(report.get("error"), None, "{report}");
        // Streams of both ways stop together when they have sent about what was asked for, some
        // blocks less included, and a receiver stops counting when its sender says that it is
        // through.
        let bytes = |kind: &str| -> u64 {
            let ways = ["", "_bidir_reverse"].map(|way| format!("sum_{kind}{way}"));
            let counted = ways.map(|sum| report["end"][sum]["bytes"].as_u64().unwrap_or(0));
            counted.iter().sum()
        };
        let (sent, received) = (bytes("sent"), bytes("received"));
        assert!(
            sent >= 12 << 20 && received > 0,
            "{sent} sent, {received} received"
        );
    }
}
