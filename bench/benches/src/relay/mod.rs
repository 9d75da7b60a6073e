//! One plain TCP relay on four runtimes, and the measurement of what it costs.
//!
//! Every relay does the same: accept, connect to the target, set `TCP_NODELAY` on both sockets,
//! copy both directions with half-close until both have ended. Each is written the way its
//! runtime wants it: readiness and one task per connection on tokio, owned buffers on tokio-uring
//! and monoio, pool buffers on `rt`. Buffers of the three others grow with the flow ([`buffer`]),
//! so that neither small messages nor bulk are handicapped. The thread-per-core runtimes get one
//! thread for each CPU they may use, with a listener of its own that the kernel picks by the CPU
//! the connection arrives on, as a proxy would do.

pub mod buffer;
pub mod measure;
mod on_monoio;
mod on_rt;
mod on_tokio;
mod on_tokio_uring;
pub mod plan;
pub mod process;

use std::io::Write as _;
use std::net::{SocketAddr, TcpListener};
use std::thread;

use anyhow::{Context as _, Result, anyhow};
use socket2::{Domain, Protocol, Socket, Type};

/// Connections the kernel keeps for a listener that has not accepted them yet.
const BACKLOG: i32 = 4096;
/// Submission queue entries of the ring of monoio and tokio-uring.
const RING_ENTRIES: u32 = 4096;

/// What a relay runs on.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq, clap::ValueEnum)]
pub enum Backend {
    /// This project's runtime.
    Rt,
    /// The same, with bulk through a pipe.
    RtSplice,
    /// The same, looking for news before it sleeps.
    RtBusyPoll,
    /// The same on epoll.
    RtEpoll,
    /// tokio, current-thread flavour.
    TokioCurrentThread,
    /// tokio, multi-thread flavour with as many workers as CPUs.
    TokioMultiThread,
    /// tokio-uring.
    TokioUring,
    /// monoio with its io_uring driver.
    Monoio,
}

impl Backend {
    /// Those of every workload, the subject first.
    pub const ALL: [Self; 5] = [
        Self::Rt,
        Self::TokioCurrentThread,
        Self::TokioMultiThread,
        Self::TokioUring,
        Self::Monoio,
    ];

    /// The name in results; both flavours of tokio are one baseline.
    #[must_use]
    pub fn baseline(self) -> &'static str {
        match self {
            Self::Rt | Self::RtSplice | Self::RtBusyPoll => "rt",
            Self::RtEpoll => "rt-epoll",
            Self::TokioCurrentThread | Self::TokioMultiThread => "tokio",
            Self::TokioUring => "tokio-uring",
            Self::Monoio => "monoio",
        }
    }

    /// Flavour within the baseline; empty where there is one only.
    #[must_use]
    pub fn flavour(self) -> &'static str {
        match self {
            Self::TokioCurrentThread => "current-thread",
            Self::TokioMultiThread => "multi-thread",
            _ => "",
        }
    }
}

/// Relays connections to `target` for ever; prints `listening on ADDR` when ready.
///
/// # Errors
/// The listener or the runtime cannot be set up.
pub fn run(backend: Backend, target: SocketAddr) -> Result<()> {
    match backend {
        Backend::TokioCurrentThread | Backend::TokioMultiThread => {
            let listener = listen(localhost(), None)?;
            announce(&listener)?;
            on_tokio::run(backend == Backend::TokioMultiThread, listener, target)
        }
        Backend::Rt => per_cpu(target, on_rt::run),
        Backend::RtSplice => per_cpu(target, on_rt::run_with_splice),
        Backend::RtBusyPoll => per_cpu(target, on_rt::run_with_busy_poll),
        Backend::RtEpoll => per_cpu(target, on_rt::run_on_epoll),
        Backend::TokioUring => per_cpu(target, on_tokio_uring::run),
        Backend::Monoio => per_cpu(target, on_monoio::run),
    }
}

fn localhost() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

fn announce(listener: &TcpListener) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "listening on {}", listener.local_addr()?)?;
    Ok(stdout.flush()?)
}

/// A listener on `address`; with `cpu` one of several that share it, for connections whose packets
/// arrive on that CPU.
fn listen(address: SocketAddr, cpu: Option<u32>) -> Result<TcpListener> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    if let Some(cpu) = cpu {
        socket.set_reuse_port(true)?;
        socket.set_cpu_affinity(cpu as usize)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Runs `relay` on a pinned thread for each CPU this process may use.
fn per_cpu(
    target: SocketAddr,
    relay: impl Fn(TcpListener, SocketAddr) -> Result<()> + Copy + Send + 'static,
) -> Result<()> {
    let cpus = rt::available_cpus().context("list the CPUs of this process")?;
    let (&first, others) = cpus
        .split_first()
        .context("this process may use no CPU at all")?;
    let listener = listen(localhost(), Some(first))?;
    let address = listener.local_addr()?;
    let mut threads = Vec::new();
    for &cpu in others {
        let listener = listen(address, Some(cpu))?;
        threads.push(thread::spawn(move || pinned(cpu, listener, target, relay)));
    }
    announce(&listener)?;
    pinned(first, listener, target, relay)?;
    for thread in threads {
        thread
            .join()
            .map_err(|_| anyhow!("a relay thread panicked"))??;
    }
    Ok(())
}

fn pinned(
    cpu: u32,
    listener: TcpListener,
    target: SocketAddr,
    relay: impl Fn(TcpListener, SocketAddr) -> Result<()>,
) -> Result<()> {
    rt::pin_current_thread(cpu).with_context(|| format!("pin a relay thread to CPU {cpu}"))?;
    relay(listener, target)
}
