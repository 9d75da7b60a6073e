//! Ways around policies: whatever the route and wherever the pod is, the verdict is one.

use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::{Attack, got, small};
use crate::attack::arena::{
    ATTACKER, Arena, PATIENCE, POLICIES, VICTIM, accept_all, address, attack_mesh, echoes,
    mesh_with, service,
};
use crate::attack::catalog::{Bounds, Failure, Finding};

const FAMILY: &str = super::AROUND;
/// How long a connection that was refused must stay away from the application.
const STAYS_AWAY: Duration = Duration::from_millis(150);

/// Who must not reach which port of whom, in the mesh of every attack.
type Denied = (
    &'static str,
    &'static str,
    fn() -> std::io::Result<SocketAddr>,
    u16,
);

const DENIED: [Denied; 8] = [
    ("denied-by-address", "client-a", || to(VICTIM, 9001), 9001),
    (
        "denied-by-address-same-node",
        "client-a",
        || to("server-a", 9001),
        9001,
    ),
    ("denied-port-for-all", "server-a", || to(VICTIM, 9003), 9003),
    (
        "denied-port-for-all-same-node",
        "client-a",
        || to("server-a", 9003),
        9003,
    ),
    (
        "plain-text-past-strict",
        ATTACKER,
        || to(VICTIM, 9002),
        9002,
    ),
    (
        "denied-by-service",
        "client-a",
        || service(VICTIM, 9000),
        9000,
    ),
    (
        "denied-by-service-same-node",
        "client-a",
        || service("server-a", 9000),
        9000,
    ),
    (
        "plain-text-past-strict-other-node",
        ATTACKER,
        || to("server-a", 9002),
        9002,
    ),
];

pub(super) fn attacks() -> Vec<Attack> {
    let must_not = "the application that a policy keeps from it";
    let mut attacks: Vec<_> = DENIED
        .into_iter()
        .map(|(name, from, to, port)| {
            let run = move |arena: &Arena| {
                needs_policies(arena)?;
                arena.set_mesh(&attack_mesh())?;
                let to = to()?;
                let of_a = [address("server-a", port)?, service("server-a", port)?];
                let host = if of_a.contains(&to) {
                    "server-a"
                } else {
                    VICTIM
                };
                kept_out(arena, from, to, (host, port))
            };
            alone(name, must_not, Box::new(run))
        })
        .collect();
    for (name, from, change) in [
        (
            "tcp-workload-same-node",
            "client-a",
            tcp_workload as fn() -> String,
        ),
        ("tcp-workload-other-node", VICTIM, tcp_workload),
        (
            "passthrough-service-same-node",
            "client-a",
            passthrough_service,
        ),
        (
            "passthrough-service-other-node",
            VICTIM,
            passthrough_service,
        ),
        ("unknown-workload-same-node", "client-a", unknown_workload),
        ("unknown-workload-other-node", VICTIM, unknown_workload),
    ] {
        let run = move |arena: &Arena| {
            needs_policies(arena)?;
            arena.set_mesh(&change())?;
            kept_out(arena, from, address("server-a", 9002)?, ("server-a", 9002))
        };
        attacks.push(alone(name, must_not, Box::new(run)));
    }
    attacks.push(alone(
        "reused-address",
        "the identity that the address had before",
        Box::new(reused_address),
    ));
    attacks.push(alone(
        "policy-comes-later",
        "a connection that goes on once a policy denies it",
        Box::new(comes_later),
    ));
    attacks
}

fn alone(name: &str, must_not: &str, run: super::Run) -> Attack {
    Attack {
        alone: true,
        bounds: Bounds {
            // Some meshes take the honest their way too.
            honest_may_fail: true,
            slower: None,
            ..Bounds::SMALL
        },
        ..small(name, FAMILY, must_not, run)
    }
}

fn to(host: &str, port: u16) -> std::io::Result<SocketAddr> {
    address(host, port).map_err(std::io::Error::other)
}

fn needs_policies(arena: &Arena) -> Result<(), Failure> {
    match arena.is_own() {
        true => Ok(()),
        false => Err(Failure::Skipped(
            "needs a lab of its own, with policies to go around".to_owned(),
        )),
    }
}

/// `from` must not get to the application that listens on `host` and port when it dials `target`.
fn kept_out(arena: &Arena, from: &str, target: SocketAddr, (host, port): (&str, u16)) -> Finding {
    let listener = arena.listen(host, port)?;
    let refused = match arena.dial(from, target) {
        Err(error) => error.to_string(),
        Ok(mut stream) => {
            // The connection to ztunnel may stand; nothing may come of it.
            let _ = stream.write_all(b"let me in");
            stream.set_read_timeout(Some(Duration::from_millis(20)))?;
            let deadline = Instant::now() + PATIENCE;
            loop {
                if !accept_all(&listener)?.is_empty() {
                    return got("a connection to the application");
                }
                match stream.read(&mut [0; 16]) {
                    Ok(1..) => return got("an answer"),
                    Ok(0) => break "closed".to_owned(),
                    Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => {
                        break error.to_string();
                    }
                    Err(_) if Instant::now() >= deadline => {
                        return got("a connection that stays");
                    }
                    Err(_) => {}
                }
            }
        }
    };
    std::thread::sleep(STAYS_AWAY);
    match accept_all(&listener)?.len() {
        0 => Ok(format!("refused: {refused}")),
        n => got(format!("{n} connections to the application ({refused})")),
    }
}

/// For identities only, wherever; of the pods only that of node A is for this.
const STRICT: &str = "\
- name: istio_converted_static_strict
  namespace: \"\"
  scope: Global
  action: Deny
  rules:
  - - - notPrincipals: [{Presence: []}]
        destinationPorts: [9002]
";

/// server-a speaks TCP.
fn tcp_workload() -> String {
    change_server_a(&mesh_with(&format!("{POLICIES}{STRICT}"), ""), |entry| {
        entry.replace("protocol: HBONE", "protocol: TCP")
    })
}

/// A service of another namespace has server-a's address, and passes connections through.
fn passthrough_service() -> String {
    let service = "\
- name: mine
  namespace: attacker
  hostname: mine.attacker.svc.cluster.local
  vips: [\"/10.244.1.12\"]
  ports: {9002: 9002}
  loadBalancer: {routingPreferences: [], mode: Passthrough}
  canonical: true
";
    mesh_with(&format!("{POLICIES}{STRICT}"), service)
}

/// server-a is captured and in no configuration.
fn unknown_workload() -> String {
    change_server_a(&mesh_with(&format!("{POLICIES}{STRICT}"), ""), |_| {
        String::new()
    })
}

/// The mesh with the entry of workload server-a changed.
fn change_server_a(mesh: &str, change: impl FnOnce(&str) -> String) -> String {
    let begin = mesh
        .find("- uid: Kubernetes//v1/Pod/default/server-a")
        .unwrap_or(mesh.len());
    let rest = &mesh[begin..];
    let end = rest[1..].find("\n- ").map_or(rest.len(), |at| at + 2);
    format!("{}{}{}", &mesh[..begin], change(&rest[..end]), &rest[end..])
}

/// The configuration says that the attacker's address is still another workload's, which may do
/// what the attacker may not: the node agent knows better.
fn reused_address(arena: &Arena) -> Finding {
    needs_policies(arena)?;
    let former = attack_mesh()
        .replace("name: client-a\n", "name: former\n")
        .replace("serviceAccount: client-a\n", "serviceAccount: former\n")
        .replace("Pod/default/client-a\n", "Pod/default/former\n");
    arena.set_mesh(&former)?;
    kept_out(arena, "client-a", address(VICTIM, 9001)?, (VICTIM, 9001))
}

/// A connection that is open when a policy begins to deny it.
fn comes_later(arena: &Arena) -> Finding {
    needs_policies(arena)?;
    arena.set_mesh(&attack_mesh())?;
    let mut stream = arena.dial("client-a", address(VICTIM, 8080)?)?;
    if !echoes(&mut stream, b"before") {
        return Err(Failure::Driver("no honest connection".to_owned()));
    }
    let denied = attack_mesh().replace("[9000, 9001]", "[9000, 9001, 8080]");
    arena.set_mesh(&denied)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let waits = std::io::ErrorKind::WouldBlock;
    let ended = !matches!(stream.read(&mut [0; 1]), Err(error) if error.kind() == waits);
    match ended {
        true => Ok("the connection is ended".to_owned()),
        false => got("a connection that a policy denies"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meshes_differ_in_server_a_alone() {
        let base = mesh_with(&format!("{POLICIES}{STRICT}"), "");
        let tcp = tcp_workload();
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
        let differ = lines(&base)
            .into_iter()
            .zip(lines(&tcp))
            .filter(|(a, b)| a != b)
            .count();
        assert_eq!(differ, 1);
        let unknown = unknown_workload();
        assert!(!unknown.contains("Pod/default/server-a\n"));
        assert!(unknown.contains("Pod/default/server-b\n"), "{unknown}");
        assert!(passthrough_service().contains("mode: Passthrough"));
    }
}
