//! Enrolment of many pods at once: how long it takes, and that packets cost no more for it.

use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use redirect::Redirection;

use crate::shared::{CLSACT, EBPF, HARDENED, Kind, assert_same};
use crate::topology::{APP1, ManyPods, REMOTE, Topology, can_run, inside, run};

/// Pods in the tests of every day.
const MANY: u32 = 300;
/// The aim is 1,000 in 5 seconds on a machine with nothing else to do. This is to find out that a
/// pod's share grows with the number of pods, or a process is started for each, on any machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Enrols `count` pods, says how long that took and checks that all are.
fn enrol(kind: Kind, count: u32) -> Duration {
    let topology = Topology::new();
    let many = ManyPods::add(&topology, count);
    let before = topology.traces();
    let taken = kind.on_node(&topology, |redirection| {
        redirection.install().unwrap();
        let one = redirection.status().unwrap().owned.len();
        let start = Instant::now();
        redirection.add_pods(&many.pods).unwrap();
        let taken = start.elapsed();
        let status = redirection.status().unwrap();
        assert_eq!(status.pods.len(), count as usize);
        assert!(status.pods.iter().all(|pod| pod.present));
        // At least what is looked up for a packet, and what makes packets be looked at.
        assert!(status.owned.len() - one >= 2 * count as usize);
        let start = Instant::now();
        redirection.cleanup().unwrap();
        eprintln!(
            "{kind:?}: {count} pods enrolled in {taken:?}, removed in {:?}",
            start.elapsed()
        );
        taken
    });
    // The kernel lets go of links when it finds the time.
    let deadline = Instant::now() + PATIENCE;
    while topology.traces() != before && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(200));
    }
    assert_same(&before, &topology.traces());
    taken
}

fn enrols_many(kind: Kind) {
    let taken = enrol(kind, MANY);
    assert!(taken < PATIENCE, "{MANY} pods took {taken:?}");
}

#[test]
fn many_pods_at_once_tcx() {
    if can_run("many_pods_at_once_tcx") {
        enrols_many(EBPF);
    }
}

#[test]
fn many_pods_at_once_clsact() {
    if can_run("many_pods_at_once_clsact") {
        enrols_many(CLSACT);
    }
}

#[test]
fn many_pods_at_once_iptables() {
    if can_run("many_pods_at_once_iptables") {
        enrols_many(HARDENED);
    }
}

/// The figures of docs/node-agent.md.
#[test]
#[ignore = "takes a minute; part of make soak"]
fn a_thousand_pods() {
    for kind in [EBPF, CLSACT, HARDENED] {
        let taken = enrol(kind, 1000);
        assert!(taken < PATIENCE, "{kind:?}: 1000 pods took {taken:?}");
    }
}

/// A TCP segment of app1's to the remote pod, as it comes in by the pod's interface.
fn segment() -> Vec<u8> {
    let mut frame = vec![0; 14 + 20 + 20];
    frame[12..14].copy_from_slice(&[8, 0]);
    frame[14] = 0x45;
    frame[17] = 40;
    frame[22..24].copy_from_slice(&[64, 6]);
    frame[26..30].copy_from_slice(&APP1.octets());
    frame[30..34].copy_from_slice(&REMOTE.octets());
    frame[34..38].copy_from_slice(&[0x80, 0, 0, 80]);
    frame[46..48].copy_from_slice(&[0x50, 0x10]);
    frame
}

/// Nanoseconds the program at `pin` takes for one packet of app1's.
fn cost(topology: &Topology, pin: &Path) -> u32 {
    let (frame, context) = (topology.dir().join("frame"), topology.dir().join("context"));
    std::fs::write(&frame, segment()).unwrap();
    let index = topology.ip("node", "-o link show dev va1");
    let index: u32 = index.split(':').next().unwrap().parse().unwrap();
    // `struct __sk_buff`, in which `ifindex` is the eleventh word.
    let mut words = [0_u32; 48];
    words[10] = index;
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    std::fs::write(&context, bytes).unwrap();
    let shown = inside(&topology.netns("node"), || {
        let output = Command::new("bpftool")
            .args(["-j", "prog", "run", "pinned"])
            .arg(pin)
            .arg("data_in")
            .arg(&frame)
            .arg("ctx_in")
            .arg(&context)
            .args(["repeat", "200000"])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    });
    let answer: serde_json::Value = serde_json::from_str(&shown).unwrap();
    // TC_ACT_REDIRECT: the packet is app1's and goes to ztunnel.
    assert_eq!(answer["retval"], 7, "{shown}");
    answer["duration"].as_u64().unwrap().try_into().unwrap()
}

/// Pins the program of a pinned link, for [`cost`].
fn pin_program(topology: &Topology) -> std::path::PathBuf {
    let bpffs = topology.bpffs();
    let index = topology.ip("node", "-o link show dev va1");
    let index = index.split(':').next().unwrap();
    let link = bpffs.join(format!("app_outbound_{index}"));
    let shown = run(&format!("bpftool -j link show pinned {}", link.display()));
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    let pin = topology.bpffs_root().join("measured");
    run(&format!(
        "bpftool prog pin id {} {}",
        shown["prog_id"],
        pin.display()
    ));
    pin
}

/// The least of several, as others use the machine, too.
fn least_cost(topology: &Topology, pin: &Path) -> u32 {
    (0..7).map(|_| cost(topology, pin)).min().unwrap()
}

/// What is looked up for a packet does not depend on the number of pods.
#[test]
fn a_packet_costs_the_same_with_many_pods() {
    if can_run("a_packet_costs_the_same_with_many_pods") {
        costs_the_same_with(MANY);
    }
}

/// The figures of docs/node-agent.md.
#[test]
#[ignore = "makes a thousand pods; part of make soak"]
fn a_packet_costs_the_same_with_a_thousand_pods() {
    costs_the_same_with(1000);
}

fn costs_the_same_with(count: u32) {
    let topology = Topology::new();
    let many = ManyPods::add(&topology, count);
    let app1 = &topology.pods()[..1];
    let (alone, among_many) = EBPF.on_node(&topology, |redirection: &mut dyn Redirection| {
        redirection.install().unwrap();
        redirection.add_pods(app1).unwrap();
        let pin = pin_program(&topology);
        let alone = least_cost(&topology, &pin);
        redirection.add_pods(&many.pods).unwrap();
        let among_many = least_cost(&topology, &pin);
        std::fs::remove_file(pin).unwrap();
        (alone, among_many)
    });
    let figures = format!("{alone} ns a packet with 1 pod, {among_many} ns with {count} more");
    eprintln!("app_outbound: {figures}");
    assert!(among_many <= 2 * alone + 50, "{figures}");
}
