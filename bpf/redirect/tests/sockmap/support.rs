//! A pod's and a ztunnel's network namespace with a link between them, and sockets in both.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use redirect::Pod;
use redirect::sockmap::{self, Settings, Sockets, Sockmap, Status};
use socket2::{Domain, Protocol, Socket, Type};

pub(crate) const POD: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 11);
pub(crate) const ZTUNNEL: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 2);
pub(crate) const POD6: Ipv6Addr = Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, 11);
pub(crate) const ZTUNNEL6: Ipv6Addr = Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, 2);

const PATIENCE: Duration = Duration::from_secs(10);

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Whether this process may run such tests; says which test was skipped and why if not.
pub(crate) fn can_run(test: &str) -> bool {
    let reason = if !nix::unistd::geteuid().is_root() || redirect::check_privileges(true).is_err() {
        "needs root for network namespaces and BPF".to_owned()
    } else if sockmap::root_cgroup().is_none() {
        "no cgroup2 file system is mounted".to_owned()
    } else if let Err(error) = sockmap::check_kernel() {
        error.to_string()
    } else {
        return true;
    };
    // Not eprintln, which the test harness keeps to itself.
    let _ = writeln!(io::stderr(), "skipped: {test}: {reason}");
    false
}

fn run(line: &str) {
    let words: Vec<_> = line.split_whitespace().collect();
    let output = Command::new(words[0]).args(&words[1..]).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{line}: {stderr}");
}

/// Tests that fill the machine's memory for TCP run alone: the others would find it short.
struct Turn {
    alone: bool,
}

/// How many tests share the machine, and whether one has it for itself.
static TURNS: (Mutex<(usize, bool)>, Condvar) = (Mutex::new((0, false)), Condvar::new());

impl Turn {
    fn take(alone: bool) -> Self {
        let (state, changed) = &TURNS;
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.1 || (alone && state.0 > 0) {
            state = changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if alone {
            state.1 = true;
        } else {
            state.0 += 1;
        }
        Self { alone }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let (state, changed) = &TURNS;
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        if self.alone {
            state.1 = false;
        } else {
            state.0 -= 1;
        }
        changed.notify_all();
    }
}

/// Both namespaces and the installed sockmap; removed when dropped.
pub(crate) struct Net {
    name: String,
    directory: tempfile::TempDir,
    pub(crate) sockmap: Option<Sockmap>,
    /// As in [`Settings`], for the next installation.
    pub(crate) memory_max: Option<u64>,
    /// ztunnel's.
    pub(crate) sockets: Sockets,
    _turn: Turn,
}

impl Net {
    /// The pod is enrolled.
    pub(crate) fn up() -> Self {
        Self::made(false).install()
    }

    /// As [`Net::up`], for a test that fills memory.
    pub(crate) fn up_alone() -> Self {
        Self::made(true).install()
    }

    /// Without the sockmap, for a test that fills memory.
    pub(crate) fn alone() -> Self {
        Self::made(true)
    }

    fn made(alone: bool) -> Self {
        let turn = Turn::take(alone);
        let count = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("sm{}-{count}", std::process::id());
        let directory = tempfile::tempdir().unwrap();
        let net = Self {
            sockets: Sockets::new(&directory.path().join("pins/listeners")),
            directory,
            name,
            sockmap: None,
            memory_max: None,
            _turn: turn,
        };
        mount(
            Some("bpf"),
            net.directory.path(),
            Some("bpf"),
            MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
        let (pod, ztunnel) = (net.host("pod"), net.host("zt"));
        run(&format!("ip netns add {pod}"));
        run(&format!("ip netns add {ztunnel}"));
        run(&format!(
            "ip link add p netns {pod} type veth peer name z netns {ztunnel}"
        ));
        for (host, link, v4, v6) in [(&pod, "p", POD, POD6), (&ztunnel, "z", ZTUNNEL, ZTUNNEL6)] {
            run(&format!("ip -n {host} addr add {v4}/24 dev {link}"));
            run(&format!("ip -n {host} addr add {v6}/64 dev {link} nodad"));
            run(&format!("ip -n {host} link set {link} up"));
            run(&format!("ip -n {host} link set lo up"));
        }
        net
    }

    pub(crate) fn install(mut self) -> Self {
        let mut sockmap = Sockmap::install(&self.settings()).unwrap();
        sockmap.set_pods(&[self.pod()]).unwrap();
        self.sockets.follow([]).unwrap();
        self.sockmap = Some(sockmap);
        self
    }

    pub(crate) fn settings(&self) -> Settings {
        Settings {
            bpffs: self.bpffs(),
            cgroup: sockmap::root_cgroup().unwrap(),
            ztunnel_netns: self.netns("zt"),
            force: true,
            memory_max: self.memory_max,
        }
    }

    pub(crate) fn pod(&self) -> Pod {
        Pod {
            uid: "pod".to_owned(),
            namespace: "default".into(),
            name: "pod".into(),
            service_account: "default".into(),
            addresses: vec![IpAddr::V4(POD), IpAddr::V6(POD6)],
            netns: self.netns("pod"),
            host_interface: "unused".to_owned(),
        }
    }

    pub(crate) fn bpffs(&self) -> PathBuf {
        self.directory.path().join("pins")
    }

    fn host(&self, host: &str) -> String {
        format!("{}-{host}", self.name)
    }

    pub(crate) fn netns(&self, host: &str) -> PathBuf {
        Path::new("/run/netns").join(self.host(host))
    }

    /// Runs `work` on a thread in the namespace of `host`: `pod` or `zt`.
    pub(crate) fn on<T: Send>(&self, host: &str, work: impl FnOnce() -> T + Send) -> T {
        let file = File::open(self.netns(host)).unwrap();
        let joined = thread::scope(|scope| {
            let helper = scope.spawn(|| {
                setns(&file, CloneFlags::CLONE_NEWNET).unwrap();
                work()
            });
            helper.join()
        });
        joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    pub(crate) fn status(&self) -> Status {
        sockmap::status(&self.bpffs()).unwrap().unwrap()
    }

    pub(crate) fn counter(&self, name: &str) -> u64 {
        self.status().counters[name]
    }

    /// Sockets that still pay for the programs.
    pub(crate) fn sockets_in_maps(&self) -> usize {
        sockmap::sockets(&self.bpffs()).unwrap()
    }

    /// Closed sockets leave the maps; a test beside this one that starts a program holds copies of
    /// them for a moment.
    pub(crate) fn expect_empty_maps(&self) {
        eventually("no socket is in the maps", || self.sockets_in_maps() == 0);
    }

    /// Listens in ztunnel's namespace, on the address of this family.
    pub(crate) fn listener(&self, ztunnel: IpAddr) -> TcpListener {
        self.listener_at((ztunnel, 0).into())
    }

    /// A listener of ztunnel's, that asks for the sockmap.
    pub(crate) fn listener_at(&self, address: SocketAddr) -> TcpListener {
        let listener = self.on("zt", || TcpListener::bind(address).unwrap());
        self.sockets.mark(listener.as_fd()).unwrap();
        listener
    }

    /// Connects from ztunnel's namespace and asks for the sockmap.
    pub(crate) fn dial(&self, to: SocketAddr) -> TcpStream {
        let mark = |socket: BorrowedFd<'_>| self.sockets.mark(socket).unwrap();
        self.on("zt", || connect_with(None, to, false, mark))
    }

    /// A connection from the pod's (not blocking) socket to ztunnel's.
    pub(crate) fn connect(&self, listener: &TcpListener) -> (Peer, Peer) {
        let to = listener.local_addr().unwrap();
        let app = self.on("pod", || connect(to, false));
        let (zt, _) = listener.accept().unwrap();
        zt.set_nonblocking(true).unwrap();
        (Peer(app), Peer(zt))
    }

    pub(crate) fn pair(&self) -> (Peer, Peer) {
        self.connect(&self.listener(IpAddr::V4(ZTUNNEL)))
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        drop(self.sockmap.take());
        let removed = sockmap::remove(&self.bpffs());
        for host in ["pod", "zt"] {
            let _ = Command::new("ip")
                .args(["netns", "del", &self.host(host)])
                .status();
        }
        let unmounted = umount2(self.directory.path(), MntFlags::MNT_DETACH);
        if !thread::panicking() {
            removed.unwrap();
            unmounted.unwrap();
        }
    }
}

/// Connects from the calling thread's namespace.
pub(crate) fn connect(to: SocketAddr, blocking: bool) -> TcpStream {
    connect_from(None, to, blocking)
}

/// As [`connect`], from an address of choice.
pub(crate) fn connect_from(from: Option<SocketAddr>, to: SocketAddr, blocking: bool) -> TcpStream {
    connect_with(from, to, blocking, |_| {})
}

fn connect_with(
    from: Option<SocketAddr>,
    to: SocketAddr,
    blocking: bool,
    prepare: impl FnOnce(BorrowedFd<'_>),
) -> TcpStream {
    let domain = Domain::for_address(to);
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP)).unwrap();
    socket.set_nonblocking(!blocking).unwrap();
    prepare(socket.as_fd());
    if let Some(from) = from {
        socket.bind(&from.into()).unwrap();
    }
    match socket.connect(&to.into()) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {
            wait(&socket, PollFlags::POLLOUT);
        }
        other => other.unwrap(),
    }
    let stream = TcpStream::from(socket);
    if let Some(error) = stream.take_error().unwrap() {
        panic!("connect to {to}: {error}");
    }
    stream.set_nodelay(true).unwrap();
    stream
}

/// Waits for `events`, at most [`PATIENCE`].
pub(crate) fn wait(socket: &impl std::os::fd::AsFd, events: PollFlags) {
    let mut fds = [PollFd::new(socket.as_fd(), events)];
    let ms = u16::try_from(PATIENCE.as_millis()).unwrap();
    let ready = poll(&mut fds, PollTimeout::from(ms)).unwrap();
    assert!(ready > 0, "nothing happened on the socket in {PATIENCE:?}");
}

/// A socket that does not block, used as if it did, by polling.
#[derive(Debug)]
pub(crate) struct Peer(pub(crate) TcpStream);

impl Peer {
    /// One receive; 0 at the end.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.read(buffer) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    wait(&self.0, PollFlags::POLLIN);
                }
                other => return other,
            }
        }
    }

    pub(crate) fn write_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.0.write(bytes) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    wait(&self.0, PollFlags::POLLOUT);
                }
                Err(e) => return Err(e),
                Ok(n) => bytes = &bytes[n..],
            }
        }
        Ok(())
    }

    pub(crate) fn expect(&mut self, bytes: &[u8]) {
        let mut received = vec![0; bytes.len()];
        let mut at = 0;
        while at < received.len() {
            let n = self.read(&mut received[at..]).unwrap();
            assert!(n > 0, "end after {at} of {} bytes", bytes.len());
            at += n;
        }
        assert!(received == bytes, "{} bytes differ", bytes.len());
    }
}

/// Tries until `done`, at most [`PATIENCE`].
pub(crate) fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "not in {PATIENCE:?}: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Sends and expects it at the other end.
pub(crate) fn exchange(from: &mut Peer, to: &mut Peer, bytes: &[u8]) {
    from.write_all(bytes).unwrap();
    to.expect(bytes);
}

/// Bytes the kernel could still give, by its own estimate.
pub(crate) fn free_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find(|line| line.starts_with("MemAvailable:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().nth(1));
    kilobytes.and_then(|word| word.parse::<u64>().ok()).unwrap() * 1024
}

nix::ioctl_read_bad!(fionread, libc::FIONREAD, libc::c_int);

/// What FIONREAD says.
pub(crate) fn unread(socket: BorrowedFd<'_>) -> usize {
    let mut bytes = 0;
    // SAFETY: FIONREAD writes one int, and `bytes` is one.
    unsafe { fionread(socket.as_raw_fd(), &raw mut bytes) }.unwrap();
    usize::try_from(bytes).unwrap()
}
