//! A ztunnel that cannot work says so in one line, ends with a code that is not zero, and leaves
//! nothing behind; and so does a lab whose ztunnel cannot work.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

use std::fs;
use std::io::Write as _;
use std::net::{IpAddr, TcpListener};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use lab::{CertificateAuthority, Redirect};
use support::{Case, Guarded, TestLab, lab_program, one_line, run_cases, unique, workspace_binary};

/// How long a ztunnel may take to find out that it cannot work.
const LIMIT: Duration = Duration::from_secs(60);

const MESH: &str = "workloads: []\nservices: []\npolicies: []\n";

/// ztunnel alone, in the namespace of ztunnel-a of a lab without redirection.
#[test]
fn ztunnel() {
    let cases: &[Case] = &[
        ("good_input_starts", good_input_starts),
        ("malformed_mesh_file", malformed_mesh_file),
        ("missing_mesh_file", missing_mesh_file),
        ("missing_ca", missing_ca),
        ("broken_ca", broken_ca),
        ("occupied_ports", occupied_ports),
        ("missing_capability", missing_capability),
        ("bad_values", bad_values),
    ];
    run_cases("ztunnel", Redirect::None, cases);
}

/// A ztunnel's input, good until a test spoils it.
struct Input {
    directory: tempfile::TempDir,
    environment: Vec<(String, String)>,
    /// Command and arguments in front of the binary.
    wrapper: Vec<&'static str>,
}

impl Input {
    fn good() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).display().to_string();
        let authority = CertificateAuthority::generate("cluster.local").unwrap();
        authority
            .write(
                &directory.path().join("ca.pem"),
                &directory.path().join("ca-key.pem"),
            )
            .unwrap();
        fs::write(directory.path().join("mesh.yaml"), MESH).unwrap();
        let environment = [
            ("LOCAL_XDS_PATH", path("mesh.yaml")),
            ("LOCAL_CA_CERT", path("ca.pem")),
            ("LOCAL_CA_KEY", path("ca-key.pem")),
            ("REDIRECT_MODE", "node".to_owned()),
            ("NODE_NAME", "node-a".to_owned()),
            ("XDS_ADDRESS", String::new()),
            ("CA_ADDRESS", String::new()),
        ];
        let environment = environment
            .map(|(key, value)| (key.to_owned(), value))
            .into();
        Self {
            directory,
            environment,
            wrapper: Vec::new(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn set(&mut self, key: &str, value: &str) {
        self.environment.retain(|(known, _)| known != key);
        self.environment.push((key.to_owned(), value.to_owned()));
    }

    fn spawn(&self, lab: &TestLab) -> Guarded {
        let binary = workspace_binary("ztunnel");
        let mut command = match self.wrapper.split_first() {
            Some((program, arguments)) => {
                let mut command = lab.lab.command("ztunnel-a", program).unwrap();
                command.args(arguments).arg(binary);
                command
            }
            None => lab.lab.command("ztunnel-a", binary).unwrap(),
        };
        for (key, value) in &self.environment {
            command.env(key, value);
        }
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Guarded(command.spawn().unwrap())
    }

    /// Runs ztunnel, which must end by itself, and returns its one line.
    fn refusal(&self, lab: &TestLab) -> String {
        let mut ztunnel = self.spawn(lab);
        let start = Instant::now();
        let status = loop {
            if let Some(status) = ztunnel.0.try_wait().unwrap() {
                break status;
            }
            assert!(start.elapsed() < LIMIT, "ztunnel runs instead of refusing");
            thread::sleep(Duration::from_millis(10));
        };
        let read = |stream: Option<&mut dyn std::io::Read>| {
            let mut bytes = Vec::new();
            stream.unwrap().read_to_end(&mut bytes).unwrap();
            bytes
        };
        let stderr = read(ztunnel.0.stderr.as_mut().map(|s| s as _));
        let stdout = read(ztunnel.0.stdout.as_mut().map(|s| s as _));
        let output = Output {
            status,
            stdout,
            stderr,
        };
        assert!(!status.success(), "exit code 0: {output:?}");
        assert!(status.code().is_some(), "killed by a signal: {output:?}");
        let line = one_line(&output);
        assert!(!line.contains("panicked"), "{line}");
        nothing_left(lab);
        line
    }
}

/// No process and no listener is left in ztunnel-a's namespace.
fn nothing_left(lab: &TestLab) {
    let status = lab.lab.status();
    let host = status
        .hosts
        .iter()
        .find(|host| host.name == "ztunnel-a")
        .unwrap();
    assert!(host.pids.is_empty(), "processes left: {:?}", host.pids);
    support::eventually("ztunnel's ports are free", || {
        let listen = |port: u16| TcpListener::bind((IpAddr::from([0, 0, 0, 0]), port));
        let all = || [15000, 15001, 15006, 15008, 15020, 15021].map(listen);
        lab.lab
            .on("ztunnel-a", all)
            .unwrap()
            .iter()
            .all(Result::is_ok)
            .then_some(())
    });
}

fn assert_names(line: &str, words: &[&str]) {
    for word in words {
        assert!(line.contains(word), "no `{word}` in: {line}");
    }
}

/// The control: what the other cases spoil does start.
fn good_input_starts(lab: &mut TestLab) {
    let input = Input::good();
    let ztunnel = input.spawn(lab);
    let netns = lab.lab.netns("ztunnel-a").unwrap();
    support::eventually("ztunnel is ready", || {
        let server = ([127, 0, 0, 1], 15021).into();
        let answer = lab::http_get(&netns, server, "/healthz/ready", Duration::from_secs(1));
        matches!(answer, Ok((200, _))).then_some(())
    });
    drop(ztunnel);
    nothing_left(lab);
}

fn malformed_mesh_file(lab: &mut TestLab) {
    let workload = "workloads:\n- {uid: x, name: x, namespace: x, serviceAccount: x, \
                    workloadIps: [\"10.1.1.1\"], protocol: HBONE, node: n, services: {}";
    let cases = [
        ("workloads: [\n".to_owned(), "mesh.yaml"),
        ("workloads: 7\n".to_owned(), "mesh.yaml"),
        ("workload: []\n".to_owned(), "workload"),
        (format!("{workload}, colour: red}}\n"), "colour"),
        (
            format!("{workload}}}\n").replace("10.1.1.1", "10.1.1.256"),
            "10.1.1.256",
        ),
        (format!("{workload}}}\n").replace("HBONE", "QUIC"), "QUIC"),
    ];
    for (text, word) in cases {
        let input = Input::good();
        fs::write(input.path("mesh.yaml"), &text).unwrap();
        assert_names(&input.refusal(lab), &["mesh.yaml", word]);
    }
}

fn missing_mesh_file(lab: &mut TestLab) {
    let mut input = Input::good();
    input.set("LOCAL_XDS_PATH", "/no/such/mesh.yaml");
    assert_names(&input.refusal(lab), &["/no/such/mesh.yaml"]);
}

fn missing_ca(lab: &mut TestLab) {
    for variable in ["LOCAL_CA_CERT", "LOCAL_CA_KEY"] {
        let mut input = Input::good();
        input.set(variable, "/no/such/ca.pem");
        assert_names(&input.refusal(lab), &["/no/such/ca.pem"]);
        let mut input = Input::good();
        input.environment.retain(|(key, _)| key != variable);
        assert_names(&input.refusal(lab), &[variable]);
    }
}

fn broken_ca(lab: &mut TestLab) {
    let input = Input::good();
    fs::write(input.path("ca.pem"), "not a certificate\n").unwrap();
    assert_names(&input.refusal(lab), &["ca.pem"]);
    // A key that others can change.
    let input = Input::good();
    let writable = fs::Permissions::from_mode(0o666);
    fs::set_permissions(input.path("ca-key.pem"), writable).unwrap();
    assert_names(&input.refusal(lab), &["LOCAL_CA_KEY", "ca-key.pem", "0666"]);
    // The key of another root.
    let input = Input::good();
    let other = CertificateAuthority::generate("cluster.local").unwrap();
    other
        .write(&input.path("other.pem"), &input.path("ca-key.pem"))
        .unwrap();
    assert_names(&input.refusal(lab), &["ca"]);
}

fn occupied_ports(lab: &mut TestLab) {
    for port in [15001_u16, 15006, 15008, 15020, 15021] {
        let occupied = lab.listen("ztunnel-a", port);
        let input = Input::good();
        let mut ztunnel = input.spawn(lab);
        let start = Instant::now();
        let status = loop {
            if let Some(status) = ztunnel.0.try_wait().unwrap() {
                break status;
            }
            assert!(
                start.elapsed() < LIMIT,
                "ztunnel runs although {port} is taken"
            );
            thread::sleep(Duration::from_millis(10));
        };
        assert!(!status.success(), "port {port}");
        let mut stderr = Vec::new();
        std::io::Read::read_to_end(&mut ztunnel.0.stderr.take().unwrap(), &mut stderr).unwrap();
        let line = one_line(&Output {
            status,
            stdout: Vec::new(),
            stderr,
        });
        assert_names(&line, &[&port.to_string()]);
        drop(occupied);
        nothing_left(lab);
    }
}

fn missing_capability(lab: &mut TestLab) {
    let mut input = Input::good();
    input.wrapper = vec![
        "setpriv",
        "--bounding-set=-net_admin,-net_raw",
        "--inh-caps=-net_admin,-net_raw",
        "--ambient-caps=-all",
    ];
    assert_names(&input.refusal(lab), &["CAP_NET_ADMIN"]);
}

fn bad_values(lab: &mut TestLab) {
    let cases = [
        ("REDIRECT_MODE", "sideways"),
        ("SOCKMAP", "maybe"),
        ("POOL_MAX_STREAMS_PER_CONNECTION", "many"),
        ("POOL_MAX_STREAMS_PER_CONNECTION", "70000"),
        ("POOL_UNUSED_RELEASE_TIMEOUT", "5 parsecs"),
        ("ZTUNNEL_WORKER_THREADS", "-3"),
    ];
    for (variable, value) in cases {
        let mut input = Input::good();
        input.set(variable, value);
        assert_names(&input.refusal(lab), &[variable, value]);
    }
}

/// `lab up` with a mesh file or a ztunnel that does not work: one line, and nothing left.
#[test]
fn lab_up() {
    if !support::can_run("lab_up") {
        return;
    }
    let _turn = support::turn();
    let directory = tempfile::tempdir().unwrap();
    let mesh = directory.path().join("broken-mesh.yaml");
    fs::File::create(&mesh)
        .unwrap()
        .write_all(b"workloads: 7\n")
        .unwrap();
    let mesh = mesh.display().to_string();
    for redirect in ["tunnel", "ebpf"] {
        let name = unique(redirect);
        for extra in [["--config", mesh.as_str()], ["--ztunnel", "/bin/false"]] {
            let output = lab_program()
                .args(["up", "--redirect", redirect, "--name", &name])
                .args(extra)
                .output()
                .unwrap();
            assert!(!output.status.success(), "{redirect} {extra:?} came up");
            let line = one_line(&output);
            assert_names(&line, &["ztunnel on ztunnel-a"]);
            let netns = std::process::Command::new("ip")
                .arg("netns")
                .output()
                .unwrap();
            assert!(
                !String::from_utf8_lossy(&netns.stdout).contains(&name),
                "{redirect}"
            );
            let mounts = fs::read_to_string("/proc/mounts").unwrap();
            assert!(!mounts.contains(&name), "{redirect}");
            assert!(!std::path::Path::new("/run/zt-lab").join(&name).exists());
        }
    }
}
