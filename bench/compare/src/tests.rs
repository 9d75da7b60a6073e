//! Whole comparisons, and whether what they report is true.

use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Child, Command, Stdio};

use super::sample::{Role, Watched};
use super::*;
use report::metric::Spender;
use report::schema::Verdict;

#[test]
fn one_path_is_measured_against_itself_unless_that_is_off() {
    let repeated = |paths: &[&str], aa: Option<&str>| {
        let paths: Vec<String> = paths.iter().map(|&path| path.to_owned()).collect();
        let mut plan = Plan::new(&paths, &[], false)?;
        choose_repeated(&mut plan, aa)?;
        anyhow::Ok(plan.arms.into_iter().find_map(|arm| arm.replicate_of))
    };
    assert_eq!(repeated(&[], None).unwrap().as_deref(), Some("ebpf"));
    assert_eq!(
        repeated(&["none", "tunnel"], None).unwrap().as_deref(),
        Some("tunnel")
    );
    assert_eq!(
        repeated(&["tunnel", "tunnel", "ebpf"], None)
            .unwrap()
            .as_deref(),
        Some("tunnel")
    );
    assert_eq!(
        repeated(&[], Some("none")).unwrap().as_deref(),
        Some("none")
    );
    assert_eq!(repeated(&[], Some("off")).unwrap(), None);
    assert!(repeated(&["ebpf"], Some("tunnel")).is_err());
    assert!(repeated(&["ebpf", "ebpf"], Some("off")).is_err());
    assert!(repeated(&["ebpf", "ebpf", "none", "none"], None).is_err());
}

#[test]
fn a_comparison_reports_and_leaves_nothing() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: a_comparison_reports_and_leaves_nothing: needs root");
        return;
    }
    if let Err(error) = workspace_binary("loadgen") {
        eprintln!("skipped: a_comparison_reports_and_leaves_nothing: {error}");
        return;
    }
    let out = tempfile::tempdir().unwrap();
    let options = CompareOptions {
        paths: vec!["none".to_owned()],
        workloads: ["rr", "stream", "rr-open"].map(str::to_owned).to_vec(),
        trials: Some(2),
        duration: Some(0.2),
        quick: true,
        out: Some(out.path().join("report")),
        peers: vec!["absent=/no/such/file".to_owned()],
        ..CompareOptions::default()
    };
    let prefix = format!("c{}", std::process::id());
    let directory = run_as(&prefix, &options).unwrap();
    let document = report::read(&directory).unwrap();
    let itself = document.against_itself.as_ref().unwrap();
    assert_eq!(
        (itself.path.as_str(), itself.again.as_str()),
        ("none", "none#2")
    );
    assert!(itself.ratios > 0);
    // What a cluster has, unless one asks for something else; and the report says so.
    assert_eq!(document.settings.services, "iptables");
    assert!(document.command.ends_with("--services iptables"));
    let said = |note: &String| note.starts_with("Services: iptables");
    assert!(document.notes.iter().any(said), "{:?}", document.notes);
    assert_eq!(document.skipped_peers[0].name, "absent");
    let single = document.rows.iter().filter(|row| row.path == "none");
    assert_eq!(single.count(), document.cells().len());
    for row in &document.rows {
        let metric = Metric::throughput(&row.workload);
        assert_eq!(row.metrics[&metric].values.len(), 2, "{row:?}");
        assert!(row.median(metric).unwrap() > 0.0, "{row:?}");
        assert_eq!(row.median(Metric::Errors), Some(0.0), "{row:?}");
        assert_eq!(row.offered_per_s.is_some(), row.workload == "rr-open");
    }
    assert!(document.tunnel_driver.is_none());
    let html = fs::read_to_string(directory.join("report.html")).unwrap();
    assert!(html.contains("<svg"));
    let trials = fs::read_to_string(directory.join(TRIALS)).unwrap();
    let counted: usize = document.rows.iter().map(|row| row.trials).sum();
    assert_eq!(trials.lines().count(), counted);
    assert!(
        !lab::Lab::names()
            .iter()
            .any(|name| name.starts_with(&prefix))
    );
    let _ = fs::remove_file(format!("/run/zt-lab-{prefix}.lock"));
}

/// Why a test that needs root and the programs of the workspace cannot run.
fn missing(programs: &[&str]) -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root".to_owned());
    }
    let missing = |name: &&str| workspace_binary(name).err();
    programs
        .iter()
        .find_map(missing)
        .map(|error| error.to_string())
}

#[test]
fn redirection_alone_is_measured_without_ztunnels() {
    const NAME: &str = "redirection_alone_is_measured_without_ztunnels";
    if let Some(reason) = missing(&["loadgen", "node-agent", "lab"]) {
        eprintln!("skipped: {NAME}: {reason}");
        return;
    }
    let out = tempfile::tempdir().unwrap();
    let options = CompareOptions {
        workloads: vec!["redirect-rr".to_owned(), "redirect-connect".to_owned()],
        trials: Some(1),
        duration: Some(0.8),
        out: Some(out.path().join("report")),
        ..CompareOptions::default()
    };
    let prefix = format!("r{}", std::process::id());
    let directory = run_as(&prefix, &options).unwrap();
    let _ = fs::remove_file(format!("/run/zt-lab-{prefix}.lock"));
    let document = report::read(&directory).unwrap();
    assert_eq!(document.paths, ["none", "tunnel", "ebpf"]);
    assert_eq!(document.rows.len(), 4 * 3);
    let busy = document.settings.idle_busy_share;
    for row in &document.rows {
        let throughput = Metric::throughput(&row.workload);
        if busy > 0.5 && row.median(throughput) == Some(0.0) {
            eprintln!("skipped: {NAME}: {}: the machine is busy", row.workload);
            continue;
        }
        let machine = Metric::cpu(Spender::Machine, &row.workload);
        assert!(row.median(machine).unwrap() > 0.0, "{row:?}");
        assert!(row.median(throughput).unwrap() > 0.0, "{row:?}");
        assert_eq!(row.median(Metric::Errors), Some(0.0), "{row:?}");
        let of = |part: &str| row.metrics.keys().any(|m| m.name().starts_with(part));
        assert!(of("server_cpu") && of("client_cpu"), "{row:?}");
        assert!(!of("ztunnel"), "{row:?}");
        assert_eq!(row.scope, "same-node");
    }
    let against_none = |ratio: &&report::schema::Ratio| ratio.to == "none";
    assert!(document.ratios.iter().any(|ratio| against_none(&ratio)));
    let text = fs::read_to_string(directory.join("report.md")).unwrap();
    assert!(text.contains("## Redirection alone"), "{text}");
}

/// A control group of this test.
struct Group(PathBuf);

impl Group {
    fn new() -> Option<Self> {
        let mounts = fs::read_to_string("/proc/mounts").ok()?;
        let mount = mounts.lines().find_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let path = fields.next()?;
            (fields.next()? == "cgroup2").then_some(path)
        })?;
        let path = Path::new(mount).join(format!("lab-test-{}", std::process::id()));
        fs::create_dir(&path).ok()?;
        let group = Self(path);
        group.usage_s().is_some().then_some(group)
    }

    fn take(&self, child: &Child) {
        fs::write(self.0.join("cgroup.procs"), child.id().to_string()).unwrap();
    }

    /// CPU time of all its processes, as the kernel sums it.
    fn usage_s(&self) -> Option<f64> {
        let text = fs::read_to_string(self.0.join("cpu.stat")).ok()?;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("usage_usec "))?;
        Some(line.parse::<f64>().ok()? / 1e6)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Not empty only if a process outlived the test.
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn reported_cpu_time_agrees_with_the_kernels_own_sum() {
    const NAME: &str = "reported_cpu_time_agrees_with_the_kernels_own_sum";
    if let Some(reason) = missing(&["loadgen"]) {
        eprintln!("skipped: {NAME}: {reason}");
        return;
    }
    let Some(group) = Group::new() else {
        eprintln!("skipped: {NAME}: no cgroup2 with CPU times to make a group in");
        return;
    };
    let start = |arguments: &[&str]| {
        let mut command = Command::new(workspace_binary("loadgen").unwrap());
        command
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        group.take(&child);
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        (child, lines)
    };
    let (mut server, mut lines) = start(&["serve", "--listen", "127.0.0.1:0"]);
    let line = lines.next().unwrap().unwrap();
    let to = line.strip_prefix("listening on ").unwrap();
    let (mut client, mut lines) = start(&[
        "rr",
        "--to",
        to,
        "--connections",
        "64",
        "--warmup",
        "0.3",
        "--duration",
        "1.5",
        "--markers",
    ]);
    let watched = [(Role::Server, &server), (Role::Client, &client)].map(|(role, child)| Watched {
        role,
        pid: child.id(),
    });
    let mut read = |marker: &str| {
        assert_eq!(lines.next().unwrap().unwrap(), marker);
        (Sample::take(&watched).unwrap(), group.usage_s().unwrap())
    };
    let (begin, usage_before) = read("measuring");
    let (end, usage_after) = read("measured");
    client.wait().unwrap();
    server.kill().unwrap();
    server.wait().unwrap();
    let spent = end.since(&begin);
    let (usage, reported) = (
        usage_after - usage_before,
        spent.of(Role::Client).unwrap() + spent.of(Role::Server).unwrap(),
    );
    if usage < 0.2 {
        eprintln!("skipped: {NAME}: others left {usage} s of CPU time, too little to compare");
        return;
    }
    assert!(
        (reported / usage - 1.0).abs() < 0.05,
        "{reported} s of {usage} s"
    );
    // The machine's, interrupts included, has them all; it is counted in ticks of 10 ms.
    assert!(
        spent.machine_s > reported * 0.95,
        "{reported} s in {spent:?}"
    );
}

/// A program that is our ztunnel, slowed by `percent`; `None` if that one cannot be slowed, as a
/// release build.
fn slowed(directory: &Path, percent: u32) -> Option<PathBuf> {
    const KNOB: &str = "ZTUNNEL_DEBUG_SLOWDOWN_PERCENT";
    let ztunnel = workspace_binary("ztunnel").ok()?;
    let bytes = fs::read(&ztunnel).ok()?;
    bytes
        .windows(KNOB.len())
        .find(|window| *window == KNOB.as_bytes())?;
    let path = directory.join("slowed");
    let ztunnel = ztunnel.display();
    let text = format!("#!/bin/sh\nexport {KNOB}={percent}\nexec '{ztunnel}' \"$@\"\n");
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    Some(path)
}

#[test]
fn a_slowdown_of_a_fifth_is_found() {
    const NAME: &str = "a_slowdown_of_a_fifth_is_found";
    if let Some(reason) = missing(&["loadgen", "ztunnel", "node-agent"]) {
        eprintln!("skipped: {NAME}: {reason}");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let Some(slowed) = slowed(directory.path(), 20) else {
        eprintln!("skipped: {NAME}: this ztunnel is built without the feature slowdown");
        return;
    };
    // Six trials of 0.3 s miss it now and then, on a machine that does something else as well.
    for last in [false, false, true] {
        match compare_with(&slowed, directory.path()) {
            Ok(()) => return,
            Err(what) if !last => eprintln!("{NAME}: {what}"),
            Err(what) => panic!("{what}"),
        }
    }
}

/// Compares our ztunnel with the slowed one; what is wrong with the result.
fn compare_with(slowed: &Path, directory: &Path) -> Result<(), String> {
    let options = CompareOptions {
        paths: vec!["ebpf".to_owned()],
        workloads: vec!["rr".to_owned()],
        trials: Some(6),
        duration: Some(0.3),
        quick: true,
        out: Some(directory.join("report")),
        peers: vec![format!("slowed=shared:{}", slowed.display())],
        ..CompareOptions::default()
    };
    let prefix = format!("s{}", std::process::id());
    let report = run_as(&prefix, &options).unwrap();
    let _ = fs::remove_file(format!("/run/zt-lab-{prefix}.lock"));
    let document = report::read(&report).unwrap();
    let ratios: Vec<_> = document
        .ratios
        .iter()
        .filter(|r| (r.of.as_str(), r.to.as_str()) == ("ebpf", "slowed"))
        .filter(|r| r.metric == Metric::cpu(Spender::Ztunnels, "rr"))
        .collect();
    let count = |verdict| ratios.iter().filter(|r| r.verdict == verdict).count();
    let median = stats::median(&ratios.iter().map(|r| r.ratio).collect::<Vec<_>>());
    let found = count(Verdict::Better) >= 1 && count(Verdict::Worse) == 0;
    let as_much = (0.7..0.95).contains(&median);
    let busy = document.settings.idle_busy_share;
    // A row is missing if a trial of it had no request. One workload is enough to find it; none may
    // show the opposite.
    if ratios.len() == 5 && found && as_much {
        return Ok(());
    }
    let all = "of five ratios, one of them better, none worse, a median from 0.7 to 0.95";
    Err(format!(
        "not {all}: {median}, other processes use {:.0} % of the CPUs: {ratios:#?}",
        busy * 100.0
    ))
}
