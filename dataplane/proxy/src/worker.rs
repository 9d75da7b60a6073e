//! One worker: its listeners, its commands, its end.

use std::fmt;
use std::future::{Future, poll_fn};
use std::net::TcpListener;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use mesh::Snapshot;
use rt::mailbox::Receiver;
use rt::net::{Listener, TcpStream};
use telemetry::WorkerTelemetry;
use tls::CertificateStore;

use crate::config::ProxyConfig;
use crate::context::Context;
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
    /// Use this configuration from now on.
    Snapshot(Arc<Snapshot>),
    /// Stop accepting, let connections finish for this long, then end.
    Drain(Duration),
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
    pub certificates: Arc<CertificateStore>,
    /// Its counters and log.
    pub telemetry: WorkerTelemetry,
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

/// How often unused tunnels are looked for.
const POOL_SWEEP: Duration = Duration::from_secs(30);
/// Pause after `accept(2)` failed for lack of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves connections until a drain has ended. Run it in [`rt::Runtime::run`].
pub async fn serve(setup: WorkerSetup) {
    let WorkerSetup {
        config,
        listeners,
        snapshot,
        certificates,
        telemetry,
        mut commands,
        seed,
    } = setup;
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
    loop {
        match commands.recv().await {
            Command::Snapshot(snapshot) => context.replace_snapshot(snapshot),
            Command::Drain(patience) => {
                context.begin_drain();
                let _ = rt::time::timeout(patience, all_ended(&context)).await;
                return;
            }
        }
    }
}

/// Accepts until the worker drains.
async fn accept<F, H>(context: Rc<Context>, listener: TcpListener, handle: F)
where
    F: Fn(Rc<Context>, TcpStream) -> H,
    H: Future<Output = ()> + 'static,
{
    let mut listener = Listener::from_std(listener);
    loop {
        let accepted = {
            let mut accepting = pin!(listener.accept());
            poll_fn(|cx| {
                if context.draining.get() {
                    return Poll::Ready(None);
                }
                context.drain.register(cx);
                accepting.as_mut().poll(cx).map(Some)
            })
            .await
        };
        match accepted {
            None => return,
            Some(Ok(stream)) => rt::spawn(handle(Rc::clone(&context), stream)),
            Some(Err(error)) => {
                tracing::warn!("cannot accept connections: {error}; trying again");
                rt::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn sweep(context: Rc<Context>) {
    loop {
        rt::time::sleep(POOL_SWEEP.min(context.config.pool_unused)).await;
        context.pool.close_unused(context.config.pool_unused);
    }
}

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
