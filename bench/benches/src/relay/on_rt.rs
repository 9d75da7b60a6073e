//! The relay on `rt`, one runtime per thread: what the proxy does for plain TCP.

use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, TcpListener};

use anyhow::Result;
use rt::net::{ConnectOptions, Listener, ReadHalf, Splice, Spliced, TcpStream, WriteHalf, connect};
use rt::{Backend, Runtime, RuntimeConfig};

pub(super) fn run(listener: TcpListener, target: SocketAddr) -> Result<()> {
    serve(Backend::IoUring, false, listener, target)
}

pub(super) fn run_with_splice(listener: TcpListener, target: SocketAddr) -> Result<()> {
    serve(Backend::IoUring, true, listener, target)
}

pub(super) fn run_on_epoll(listener: TcpListener, target: SocketAddr) -> Result<()> {
    serve(Backend::Epoll, false, listener, target)
}

fn serve(backend: Backend, splice: bool, listener: TcpListener, target: SocketAddr) -> Result<()> {
    let config = RuntimeConfig {
        backend,
        ..RuntimeConfig::default()
    };
    Runtime::new(config)?.run(async move {
        let mut listener = Listener::from_std(listener);
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
    near.set_nodelay()?;
    let far = connect(target, &ConnectOptions::default()).await?;
    let (near_read, near_write) = near.split();
    let (far_read, far_write) = far.split();
    tokio::try_join!(
        copy(near_read, far_write, splice),
        copy(far_read, near_write, splice)
    )?;
    Ok(())
}

async fn copy(mut from: ReadHalf, mut to: WriteHalf, splice: bool) -> io::Result<()> {
    let mut bufs = VecDeque::new();
    loop {
        if splice && Splice::is_possible(&from) {
            let ended = Splice::new()?.relay(&mut from, &mut to, |_| {}).await?;
            if ended == Spliced::End {
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
