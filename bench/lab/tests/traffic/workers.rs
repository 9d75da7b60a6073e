//! Fewer workers than CPUs: packets arrive on all CPUs, and connections on a CPU without a worker
//! are another worker's.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream};

use lab::{LabOptions, Redirect};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::support::{PATIENCE, TestLab, at, can_run, echo_server, program_with, turn, unique};

pub(super) fn one_worker_serves_every_cpu(test: &str) {
    if !can_run(test) {
        return;
    }
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let one = [("ZTUNNEL_WORKER_THREADS", "1")];
    let lab = TestLab::with(&LabOptions {
        name: unique("one"),
        redirect: Redirect::Ebpf,
        ztunnel: Some(program_with(directory.path(), "ztunnel", &one)),
        ..LabOptions::default()
    });
    let log = lab.log_since("ztunnel-a", 0).join("\n");
    assert!(log.contains(" 1 workers"), "{log}");
    let cpus = available();
    for server in ["server-b", "server-a"] {
        let echo = echo_server(lab.listen(server, 8080), cpus.len() * 10);
        for cpu in cpus.iter().copied().cycle().take(cpus.len() * 10) {
            let mut stream = connect_on(&lab, cpu, server);
            let text = format!("from CPU {cpu}");
            stream.write_all(text.as_bytes()).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            let mut back = String::new();
            stream.read_to_string(&mut back).unwrap();
            assert_eq!(back, text);
        }
        assert_eq!(echo.join().unwrap().len(), cpus.len() * 10);
    }
}

/// CPUs that this process may use.
fn available() -> Vec<usize> {
    let set = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let usable = |cpu: &usize| set.is_set(*cpu).unwrap_or(false);
    (0..CpuSet::count()).filter(usable).collect()
}

/// Connects from client-a by a thread bound to `cpu`, which then takes the SYN through to ztunnel.
fn connect_on(lab: &TestLab, cpu: usize, server: &str) -> TcpStream {
    let connect = || {
        let mut set = CpuSet::new();
        set.set(cpu).unwrap();
        sched_setaffinity(Pid::from_raw(0), &set).unwrap();
        TcpStream::connect_timeout(&at(server, 8080), PATIENCE)
    };
    match lab.lab.on("client-a", connect).unwrap() {
        Ok(stream) => {
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream
        }
        Err(error) => panic!("client-a on CPU {cpu} -> {server}: {error}"),
    }
}
