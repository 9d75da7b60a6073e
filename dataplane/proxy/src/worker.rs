//! One worker: its listeners, its commands, its end.

use std::fmt;
use std::future::{Future, poll_fn};
use std::net::TcpListener;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use identity::CertificateFeed;
use mesh::Snapshot;
use rt::mailbox::{LatestReceiver, Receiver};
use rt::net::TcpStream;
use telemetry::WorkerTelemetry;

use crate::config::ProxyConfig;
use crate::context::{Alive, Context};
use crate::{inbound, outbound, plaintext};

/// Bound and listening sockets of one worker (blocking mode).
#[derive(Debug)]
pub struct Listeners {
    /// Captured from local pods (15001).
    pub outbound: TcpListener,
    /// To local pods from outside the mesh (15006).
    pub inbound_plain: TcpListener,
    /// Tunnels to local pods (15008).
    pub inbound_hbone: TcpListener,
}

/// Orders from the control thread.
#[derive(Debug, Clone)]
pub enum Command {
    /// Stop accepting, let connections finish, then end.
    Drain {
        /// How long connections may take to finish.
        patience: Duration,
        /// How long new ones are still accepted. Longer than nothing where another process has
        /// taken over: those whose handshake was under way at that moment come here.
        accept_for: Duration,
    },
}

impl Command {
    /// Ends without a successor.
    #[must_use]
    pub fn drain(patience: Duration) -> Self {
        let accept_for = LAST_LOOK;
        Self::Drain {
            patience,
            accept_for,
        }
    }
}

/// Everything a worker starts with.
pub struct WorkerSetup {
    /// Settings.
    pub config: Arc<ProxyConfig>,
    /// Its listeners.
    pub listeners: Listeners,
    /// The first configuration.
    pub snapshot: Arc<Snapshot>,
    /// Certificates of local workloads.
    pub certificates: CertificateFeed,
    /// Its counters and log.
    pub telemetry: WorkerTelemetry,
    /// Every later configuration: the newest counts.
    pub snapshots: LatestReceiver<Arc<Snapshot>>,
    /// Its orders.
    pub commands: Receiver<Command>,
    /// Seed of its random numbers (load balancing, trace ids).
    pub seed: u64,
}

impl fmt::Debug for WorkerSetup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerSetup")
            .field("listeners", &self.listeners)
            .finish_non_exhaustive()
    }
}

/// How often a listener says that connections are reset because there are too many.
const REFUSED_LINES: Duration = Duration::from_secs(10);
/// How often unused tunnels are looked for.
const POOL_SWEEP: Duration = Duration::from_secs(30);
/// Pause after `accept(2)` failed for lack of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Connections taken from a listener between two looks at the ring: setting one up costs tens of
/// microseconds, and those that are established must not wait for a crowd.
const ACCEPTS_PER_TURN: usize = 32;

/// How long a draining listener is looked at for connections that came before the drain, at least.
const LAST_LOOK: Duration = Duration::from_millis(5);
/// How long a drained worker waits for its tunnels to say goodbye.
const FAREWELL: Duration = Duration::from_secs(1);

/// Serves connections until a drain has ended. Run it in [`rt::Runtime::run`].
pub async fn serve(setup: WorkerSetup) {
    let WorkerSetup {
        config,
        listeners,
        snapshot,
        certificates,
        telemetry,
        snapshots,
        mut commands,
        seed,
    } = setup;
    let (certificates, follow_certificates) = certificates.open();
    rt::spawn(follow_certificates);
    let context = Rc::new(Context::new(
        config,
        certificates,
        telemetry,
        snapshot,
        seed,
    ));
    rt::spawn(accept(
        Rc::clone(&context),
        listeners.outbound,
        outbound::handle,
    ));
    rt::spawn(accept(
        Rc::clone(&context),
        listeners.inbound_plain,
        plaintext::handle,
    ));
    rt::spawn(accept(
        Rc::clone(&context),
        listeners.inbound_hbone,
        inbound::handle,
    ));
    rt::spawn(sweep(Rc::clone(&context)));
    rt::spawn(tell_left_out(Rc::clone(&context)));
    rt::spawn(follow(Rc::clone(&context), snapshots));
    let Command::Drain {
        patience,
        accept_for,
    } = commands.recv().await;
    context.begin_drain(accept_for);
    let ended = rt::time::timeout(patience, all_ended(&context)).await;
    context.end_drain();
    context.telemetry.tell_left_out();
    if ended.is_ok() {
        let _ = rt::time::timeout(FAREWELL, farewells(&context)).await;
    }
}

/// Uses the newest configuration, to the end: a policy also ends connections that a drain lets
/// finish.
async fn follow(context: Rc<Context>, mut snapshots: LatestReceiver<Arc<Snapshot>>) {
    loop {
        let snapshot = snapshots.recv().await;
        context.replace_snapshot(snapshot);
    }
}

/// Accepts until the worker drains, a moment longer, and then what has connected by then: the
/// kernel has told those clients that they are connected.
async fn accept<F, H>(context: Rc<Context>, listener: TcpListener, handle: F)
where
    F: Fn(Rc<Context>, TcpStream, Alive) -> H,
    H: Future<Output = ()> + 'static,
{
    // The worker does not end before this has.
    let _accepting = context.alive();
    let mut listener = context.listener(listener);
    let take = |stream| {
        rt::spawn_giving_way(handle(Rc::clone(&context), stream, context.alive()));
    };
    let mut accepted_in_turn = 0;
    let mut end = None;
    let mut refused = Refused::default();
    loop {
        if accepted_in_turn == ACCEPTS_PER_TURN {
            accepted_in_turn = 0;
            rt::next_turn().await;
        }
        if end.is_none() && context.draining.get() {
            end = Some(Instant::now() + context.accept_for.get());
        }
        let accepted = match end {
            None => unless_draining(&context, listener.accept()).await,
            Some(end) => {
                let left = end.saturating_duration_since(Instant::now());
                rt::time::timeout(left, listener.accept()).await.ok()
            }
        };
        match accepted {
            None if end.is_some() => break,
            None => {}
            Some(Ok(stream)) => {
                accepted_in_turn += 1;
                if rt::descriptors::open() > context.config.descriptors_max {
                    let _ = stream.reset_on_close(); // the client may be gone already
                    refused.note(&context);
                } else {
                    take(stream);
                }
            }
            Some(Err(error)) => {
                tracing::warn!("cannot accept connections: {error}; trying again");
                rt::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    listener.close().await.into_iter().for_each(take);
}

/// Connections of one listener that were reset because there are too many.
#[derive(Debug, Default)]
struct Refused {
    count: u64,
    told: Option<Instant>,
}

impl Refused {
    /// One more. A line every [`REFUSED_LINES`] tells how many.
    fn note(&mut self, context: &Context) {
        self.count += 1;
        if self.told.is_some_and(|told| told.elapsed() < REFUSED_LINES) {
            return;
        }
        self.told = Some(Instant::now());
        let (count, max) = (self.count, context.config.descriptors_max);
        self.count = 0;
        tracing::warn!(
            "{count} new connections were reset: the data path has more than {max} descriptors \
             open, and the rest is kept for the control plane; raise the limit of open files \
             (RLIMIT_NOFILE) or find out who connects so much"
        );
    }
}

/// What `future` brings, or nothing when the worker begins to drain.
async fn unless_draining<T>(context: &Context, future: impl Future<Output = T>) -> Option<T> {
    let mut future = pin!(future);
    poll_fn(|cx| {
        if let Poll::Ready(value) = future.as_mut().poll(cx) {
            return Poll::Ready(Some(value));
        }
        if context.draining.get() {
            return Poll::Ready(None);
        }
        context.drain.register(cx);
        Poll::Pending
    })
    .await
}

/// Tells what was left out of the log, in time.
async fn tell_left_out(context: Rc<Context>) {
    loop {
        rt::time::sleep(telemetry::REFUSALS_EVERY).await;
        context.telemetry.tell_left_out();
    }
}

async fn sweep(context: Rc<Context>) {
    loop {
        rt::time::sleep(POOL_SWEEP.min(context.config.pool_unused)).await;
        context.pool.close_unused(context.config.pool_unused);
    }
}

/// Waits until every tunnel has sent what it had to say: GOAWAY tells peers which of the streams
/// they have just opened were not served, and close_notify that nothing was cut off.
async fn farewells(context: &Context) {
    while context.tunnels().iter().any(|tunnel| !tunnel.has_ended()) {
        rt::time::sleep(LAST_LOOK).await;
    }
}

/// Waits until the listeners are closed and no connection is left.
async fn all_ended(context: &Context) {
    poll_fn(|cx| {
        if context.connections() == 0 {
            return Poll::Ready(());
        }
        context.ended.register(cx);
        Poll::Pending
    })
    .await;
}
