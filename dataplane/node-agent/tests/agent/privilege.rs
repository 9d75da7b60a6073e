//! What others than root can do to the agent: nothing.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Output, Stdio};

use nix::sys::signal::Signal;

use crate::Site;
use crate::topology::{REMOTE, Server, can_run, inside, run};

const NOBODY: u32 = 65534;

/// Not a test but a process: takes the agent's name and keeps it until it is killed.
#[test]
#[ignore = "a helper of the test below, run by it as another user"]
fn squatter() {
    let name = SocketAddr::from_abstract_name("ztunnel-node-agent").unwrap();
    let _socket = UnixListener::bind_addr(&name).unwrap();
    println!("held");
    std::thread::sleep(std::time::Duration::from_secs(3600));
}

/// Killed when dropped.
struct Squatter(Child);

impl Squatter {
    fn start(site: &Site) -> Self {
        // Where anybody may run it.
        let program = site.topology.dir().join("squatter");
        fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
        for path in [site.topology.dir(), &program] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let mut child = inside(&site.topology.netns("node"), || {
            Command::new(&program)
                .args(["--exact", "privilege::squatter", "--ignored", "--nocapture"])
                .uid(NOBODY)
                .gid(NOBODY)
                .stdout(Stdio::piped())
                .spawn()
                .unwrap()
        });
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let held = lines
            .map_while(Result::ok)
            .any(|line| line.contains("held"));
        assert!(held, "the name is not taken");
        Self(child)
    }
}

/// Runs a command of the agent that should end by itself; one that does not is killed.
fn once(site: &Site, words: &[&str]) -> Output {
    let agent = site.command(words);
    inside(&site.topology.netns("node"), || {
        Command::new("timeout")
            .arg("60")
            .arg(agent.get_program())
            .args(agent.get_args())
            .output()
            .unwrap()
    })
}

impl Drop for Squatter {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn another_user_cannot_keep_the_agent_from_its_work() {
    if !can_run("another_user_cannot_keep_the_agent_from_its_work") {
        return;
    }
    let site = Site::new("ebpf");
    let _squatter = Squatter::start(&site);
    let agent = site.run();
    let _ztunnel = site.listener();
    let _remote = Server::app(&site.topology.netns("remote"), 80);
    assert_eq!(site.answered_by().as_deref(), Some("captured"));
    agent.wait_until_told("held by no agent, ignored", 1);
    // With the same state directory there is still one agent.
    let second = once(&site, &["run"]);
    assert_eq!(second.status.code(), Some(1));
    let (code, log) = agent.end(Signal::SIGTERM);
    assert_eq!(code, Some(0), "{log}");
    site.cleanup();
}

/// What is in the state directory is run as root: who could write there, or put another in its
/// place, would be root.
#[test]
fn a_state_directory_that_others_can_write_is_refused() {
    if !can_run("a_state_directory_that_others_can_write_is_refused") {
        return;
    }
    let site = Site::new("tunnel");
    site.run().end(Signal::SIGTERM);
    let state = site.topology.settings().state_dir;
    let journal = state.join("redirection.json");
    let refused = |path: &std::path::Path| {
        for words in [&["run"][..], &["status"], &["cleanup"]] {
            let output = once(&site, words);
            let message = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(1), "{words:?}: {message}");
            assert!(message.contains(&path.display().to_string()), "{message}");
            assert_eq!(message.lines().count(), 1, "{message}");
        }
    };
    for (path, mode, sound) in [
        (&state, 0o777, 0o700),
        (&state, 0o730, 0o700),
        (&site.topology.dir().to_owned(), 0o777, 0o700),
        (&journal, 0o666, 0o600),
    ] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        refused(path);
        fs::set_permissions(path, fs::Permissions::from_mode(sound)).unwrap();
    }
    for path in [&state, &journal] {
        std::os::unix::fs::chown(path, Some(NOBODY), None).unwrap();
        refused(path);
        std::os::unix::fs::chown(path, Some(0), None).unwrap();
    }
    // What it did is still there: nothing of it was taken back by half.
    let answer = site.topology.ask("app1", (REMOTE, 80));
    assert!(answer.is_err(), "{answer:?}");
    site.cleanup();
}

/// What other tools have pinned in the same directory stays, whatever its name.
#[test]
fn pins_of_others_stay() {
    if !can_run("pins_of_others_stay") {
        return;
    }
    let site = Site::new("ebpf");
    let bpffs = site.topology.bpffs();
    fs::create_dir(&bpffs).unwrap();
    let create = |pin: &str, name: &str| {
        let pin = bpffs.join(pin);
        run(&format!(
            "bpftool map create {} type array key 4 value 8 entries 3 name {name}",
            pin.display()
        ));
    };
    let there = |pin: &str| bpffs.join(pin).exists();
    // A name that is ours, and generic: told, not taken.
    for name in ["config", "counters", "ztunnel_ingress"] {
        create(name, "config");
        let output = once(&site, &["run"]);
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(message.contains("no other tool uses"), "{message}");
        assert!(there(name), "{name} was removed");
        assert_eq!(fs::read_dir(&bpffs).unwrap().count(), 1);
        fs::remove_file(bpffs.join(name)).unwrap();
    }
    // Names that begin as ours do, and one of ours that is another's by now.
    create("app_outbound_policy", "policy");
    create("cut_off_7", "policy");
    create("listeners_of_others", "listeners");
    let agent = site.run();
    agent.end(Signal::SIGTERM);
    fs::remove_file(bpffs.join("events")).unwrap();
    create("events", "theirs");
    let cleaned = once(&site, &["cleanup"]);
    let message = String::from_utf8_lossy(&cleaned.stderr).into_owned();
    assert!(cleaned.status.success(), "{message}");
    let left = || {
        let entries = fs::read_dir(&bpffs).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    let theirs = [
        "app_outbound_policy",
        "cut_off_7",
        "events",
        "listeners_of_others",
    ];
    assert_eq!(left(), theirs);
    // Without a journal ours are known by what they are.
    fs::remove_file(bpffs.join("events")).unwrap();
    site.run().end(Signal::SIGKILL);
    let journal = site.topology.settings().state_dir.join("redirection.json");
    fs::remove_file(journal).unwrap();
    assert!(once(&site, &["cleanup"]).status.success());
    assert_eq!(left(), [theirs[0], theirs[1], theirs[3]]);
}
