//! Where attacks take place: a lab, and what an attacker has in it.

use std::fs;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustls::ClientConfig;

use super::gauge::{Sample, Watched, Way};
use super::session::Session;
use super::who::{self, Manner, Who};
use crate::ca::CertificateAuthority;
use crate::daemon::workspace_binary;
use crate::error::{Error, Result};
use crate::http::http_get;
use crate::lab::Lab;
use crate::mesh_file;
use crate::state::mesh_path;
use crate::topology::{Host, Node};
use crate::ztunnel;

/// The port of HBONE.
pub(super) const HBONE: u16 = 15_008;
/// The port honest servers echo on.
const ECHO: u16 = 8080;
/// Longest wait for anything that must happen: on a loaded machine, too.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);
/// The host most attacks come from: outside the mesh, on the victim's node.
pub(super) const ATTACKER: &str = "plain-b";
/// The host whose connections are honest.
const HONEST: &str = "server-a";
/// The host most attacks are for.
pub(super) const VICTIM: &str = "server-b";

/// A lab with honest servers in it.
#[derive(Debug)]
pub(super) struct Arena {
    pub(super) lab: Lab,
    ca: CertificateAuthority,
    known: Mutex<Vec<(Who, Arc<ClientConfig>)>>,
    servers: Vec<Child>,
    /// The mesh file may be changed: the lab was brought up for attacks.
    own: bool,
    /// What is in it now.
    mesh: Mutex<String>,
    /// Smaller numbers.
    pub(super) quick: bool,
}

impl Arena {
    pub(super) fn new(lab: Lab, own: bool, quick: bool) -> Result<Self> {
        let mut arena = Self {
            ca: lab.certificate_authority()?,
            known: Mutex::default(),
            servers: Vec::new(),
            own,
            mesh: Mutex::new(attack_mesh()),
            quick,
            lab,
        };
        for host in ["server-a", VICTIM, ATTACKER] {
            arena.serve(host, ECHO)?;
        }
        Ok(arena)
    }

    /// Has `host` echo what comes to `port`, in a process of its own.
    fn serve(&mut self, host: &str, port: u16) -> Result<()> {
        let at = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
        let mut command = self.lab.command(host, workspace_binary("loadgen")?)?;
        command
            .args(["serve", "--mode", "echo", "--threads", "1", "--listen"])
            .arg(at.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let child = command.spawn().map_err(Error::io("starting", "loadgen"))?;
        self.servers.push(child);
        let deadline = Instant::now() + PATIENCE;
        // Asked on the host itself: nothing is captured there.
        let local = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        while let Err(error) = self.lab.on(host, || TcpStream::connect(local))? {
            if Instant::now() >= deadline {
                return Err(Error::io("connecting to the echo server of", host)(error));
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// The honest way through both ztunnels, and one between pods outside the mesh.
    pub(super) fn honest_ways(&self) -> Result<(Way, Way)> {
        let mesh = (self.lab.netns(HONEST)?, address(VICTIM, ECHO)?);
        let plain = (self.lab.netns("waypoint-b")?, address(ATTACKER, ECHO)?);
        Ok((mesh, plain))
    }

    /// The ztunnels' processes and logs.
    pub(super) fn watched(&self) -> Watched {
        Watched {
            pids: self.lab.ztunnel_pids(),
            logs: Node::ALL
                .map(|node| ztunnel::log_path(self.lab.name(), node))
                .to_vec(),
        }
    }

    pub(super) fn sample(&self) -> Sample {
        self.watched().sample()
    }

    /// `full`, or `quick` in the quick set.
    pub(super) fn count(&self, full: usize, quick: usize) -> usize {
        if self.quick { quick } else { full }
    }

    /// Whether the mesh may be changed for an attack.
    pub(super) fn is_own(&self) -> bool {
        self.own
    }

    /// TLS as `who` speaks it; kept, as making keys takes time.
    pub(super) fn tls(&self, who: Who) -> io::Result<Arc<ClientConfig>> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, config)) = known.iter().find(|(known, _)| *known == who) {
            return Ok(Arc::clone(config));
        }
        let config = who::client(&self.ca, who, Manner::default()).map_err(io::Error::other)?;
        let config = Arc::new(config);
        known.push((who, Arc::clone(&config)));
        Ok(config)
    }

    /// As [`Self::tls`], in another manner.
    pub(super) fn tls_as(&self, who: Who, manner: Manner) -> io::Result<Arc<ClientConfig>> {
        let config = who::client(&self.ca, who, manner).map_err(io::Error::other)?;
        Ok(Arc::new(config))
    }

    /// TLS as a server who is `who`.
    pub(super) fn tls_server(&self, who: Who) -> io::Result<Arc<rustls::ServerConfig>> {
        let config = who::server(&self.ca, who).map_err(io::Error::other)?;
        Ok(Arc::new(config))
    }

    /// Connects from `host`.
    pub(super) fn dial(&self, host: &str, to: SocketAddr) -> io::Result<TcpStream> {
        let connect = || TcpStream::connect_timeout(&to, PATIENCE);
        let stream = self.lab.on(host, connect).map_err(io::Error::other)??;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    /// Listens on `host`, on a port of the system's choice if it is 0.
    pub(super) fn listen(&self, host: &str, port: u16) -> io::Result<TcpListener> {
        let listen = || TcpListener::bind((IpAddr::from(Ipv4Addr::UNSPECIFIED), port));
        self.lab.on(host, listen).map_err(io::Error::other)?
    }

    /// A TLS connection of the attacker, who is `who`, to the victim's HBONE port.
    pub(super) fn session(&self, who: Who) -> io::Result<Session> {
        self.session_from(ATTACKER, who)
    }

    pub(super) fn session_from(&self, host: &str, who: Who) -> io::Result<Session> {
        let tcp = self.dial(host, victim(HBONE)?)?;
        Session::open(tcp, &self.tls(who)?)
    }

    /// A page of a ztunnel: status and text.
    pub(super) fn page(&self, host: &str, port: u16, path: &str) -> io::Result<(u16, String)> {
        let netns = self.lab.netns(host).map_err(io::Error::other)?;
        http_get(&netns, (Ipv4Addr::LOCALHOST, port).into(), path, PATIENCE)
    }

    /// Gives both ztunnels this mesh file, if they do not have it, and waits until they take it.
    pub(super) fn set_mesh(&self, mesh: &str) -> io::Result<()> {
        let mut current = self.mesh.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.own || *current == mesh {
            return Ok(());
        }
        mesh.clone_into(&mut current);
        let marks = self.log_lengths();
        fs::write(mesh_path(self.lab.name()), mesh)?;
        for (path, mark) in marks {
            eventually(&format!("{} takes the mesh file", path.display()), || {
                log_since(&path, mark).is_ok_and(|text| text.contains("mesh configuration loaded"))
            })?;
        }
        Ok(())
    }

    /// Both ztunnels' logs and how long they are.
    pub(super) fn log_lengths(&self) -> [(PathBuf, u64); 2] {
        Node::ALL.map(|node| {
            let path = ztunnel::log_path(self.lab.name(), node);
            let length = fs::metadata(&path).map_or(0, |metadata| metadata.len());
            (path, length)
        })
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        for server in &mut self.servers {
            // Fails only if it has ended already.
            let _ = server.kill();
            let _ = server.wait();
        }
    }
}

/// The mesh that attacks find: the lab's, with policies to go around.
pub(super) fn attack_mesh() -> String {
    mesh_with(POLICIES, "")
}

/// The lab's mesh with these policies and services.
pub(super) fn mesh_with(policies: &str, services: &str) -> String {
    mesh_file::default_mesh().replace(
        "policies: []\n",
        &format!("{services}policies:\n{policies}"),
    )
}

/// 9000 and 9001: not for client-a. 9002: for identities only. 9003: for nobody.
pub(super) const POLICIES: &str = "\
- name: not-for-client-a
  namespace: default
  scope: Namespace
  action: Deny
  rules:
  - - - destinationPorts: [9000, 9001]
        principals:
        - Exact: cluster.local/ns/default/sa/client-a
- name: identities-only
  namespace: default
  scope: Namespace
  action: Deny
  rules:
  - - - destinationPorts: [9002]
        notPrincipals: [{Presence: []}]
- name: nobody
  namespace: default
  scope: Namespace
  action: Deny
  rules:
  - - - destinationPorts: [9003]
";

/// `port` of `host`.
pub(super) fn address(host: &str, port: u16) -> Result<SocketAddr> {
    Ok(SocketAddr::new(Lab::address(host)?, port))
}

/// `port` of the victim.
pub(super) fn victim(port: u16) -> io::Result<SocketAddr> {
    address(VICTIM, port).map_err(io::Error::other)
}

/// `port` of the service in front of `host`.
pub(super) fn service(host: &str, port: u16) -> io::Result<SocketAddr> {
    let host: Host = host.parse().map_err(io::Error::other)?;
    let address = host.service_address();
    let address = address.ok_or_else(|| io::Error::other(format!("{host} has no service")))?;
    Ok(SocketAddr::new(address, port))
}

/// The address of the honest.
pub(super) fn honest_address() -> IpAddr {
    Host::ServerA.address()
}

/// What a log got since it was `from` bytes long.
pub(super) fn log_since(path: &Path, from: u64) -> io::Result<String> {
    let mut file = fs::File::open(path)?;
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.take(64 << 20).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Waits until `f` says so.
pub(super) fn eventually(what: &str, mut f: impl FnMut() -> bool) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !f() {
        if Instant::now() >= deadline {
            let seconds = PATIENCE.as_secs();
            return Err(io::Error::other(format!("{what}: not within {seconds} s")));
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// How many connections wait to be accepted; they are.
pub(super) fn accept_all(listener: &TcpListener) -> io::Result<Vec<TcpStream>> {
    listener.set_nonblocking(true)?;
    let mut accepted = Vec::new();
    loop {
        match listener.accept() {
            Ok((stream, _)) => accepted.push(stream),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(accepted),
            Err(error) => return Err(error),
        }
    }
}

/// Whether `stream` echoes `word`.
pub(super) fn echoes(stream: &mut TcpStream, word: &[u8]) -> bool {
    let mut echo = vec![0; word.len()];
    stream.write_all(word).is_ok() && stream.read_exact(&mut echo).is_ok() && echo == word
}
