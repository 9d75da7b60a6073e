//! The relay on `rt`, one runtime per thread: what the proxy does for plain TCP.

use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use anyhow::Result;
use rt::net::{ConnectOptions, Listener, ReadHalf, Splice, Spliced, TcpStream, WriteHalf, connect};
use rt::{Backend, Runtime, RuntimeConfig};

/// How long the relay of [`run_with_busy_poll`] polls before it sleeps.
const BUSY_POLL: Duration = Duration::from_micros(200);

pub(super) fn run(listener: TcpListener, target: SocketAddr) -> Result<()> {
    serve(on(Backend::IoUring), false, listener, target)
}

pub(super) fn run_with_splice(listener: TcpListener, target: SocketAddr) -> Result<()> {
    serve(on(Backend::IoUring), true, listener, target)
}

pub(super) fn run_with_busy_poll(listener: TcpListener, target: SocketAddr) -> Result<()> {
    let config = RuntimeConfig {
        busy_poll: BUSY_POLL,
        ..on(Backend::IoUring)
    };
    serve(config, false, listener, target)
}

pub(super) fn run_on_epoll(listener: TcpListener, target: SocketAddr) -> Result<()> {
    serve(on(Backend::Epoll), false, listener, target)
}

fn on(backend: Backend) -> RuntimeConfig {
    RuntimeConfig {
        backend,
        ..RuntimeConfig::default()
    }
}

fn serve(
    config: RuntimeConfig,
    splice: bool,
    listener: TcpListener,
    target: SocketAddr,
) -> Result<()> {
    Runtime::new(config)?.run(async move {
        let mut listener = Listener::from_std(listener);
        listener.set_nodelay()?;
        loop {
            let near = listener.accept().await?;
            rt::spawn(async move {
                // An error ends this connection only.
                relay(near, target, splice).await.ok();
            });
        }
    })?
}

async fn relay(near: TcpStream, target: SocketAddr, splice: bool) -> io::Result<()> {
    let far = connect(target, &ConnectOptions::default()).await?;
    let (mut near_read, mut near_write) = near.split();
    let (mut far_read, mut far_write) = far.split();
    // By reference: what a future takes over it keeps twice.
    tokio::try_join!(
        copy(&mut near_read, &mut far_write, splice),
        copy(&mut far_read, &mut near_write, splice)
    )?;
    Ok(())
}

async fn copy(from: &mut ReadHalf, to: &mut WriteHalf, splice: bool) -> io::Result<()> {
    let mut bufs = VecDeque::new();
    loop {
        if splice && Splice::is_possible(from) {
            let mut pipe = Splice::new()?;
            // Boxed: idle connections would hold its state otherwise.
            if Box::pin(pipe.relay(from, to, |_| {})).await? == Spliced::End {
                break;
            }
        }
        if from.recv(&mut bufs).await? == 0 {
            break;
        }
        for buf in bufs.drain(..) {
            to.push(buf);
        }
        to.hand_over().await?;
    }
    to.flush().await?;
    to.shutdown()
}
