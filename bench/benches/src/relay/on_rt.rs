//! The relay on `rt`, one runtime per thread: what the proxy does for plain TCP.

use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, TcpListener};

use anyhow::Result;
use rt::net::{ConnectOptions, Listener, ReadHalf, TcpStream, WriteHalf, connect};
use rt::{Runtime, RuntimeConfig};

pub(super) fn run(listener: TcpListener, target: SocketAddr) -> Result<()> {
    Runtime::new(RuntimeConfig::default())?.run(async move {
        let mut listener = Listener::from_std(listener);
        loop {
            let near = listener.accept().await?;
            rt::spawn(async move {
                // An error ends this connection only.
                relay(near, target).await.ok();
            });
        }
    })?
}

async fn relay(near: TcpStream, target: SocketAddr) -> io::Result<()> {
    near.set_nodelay()?;
    let far = connect(target, &ConnectOptions::default()).await?;
    let (near_read, near_write) = near.split();
    let (far_read, far_write) = far.split();
    tokio::try_join!(copy(near_read, far_write), copy(far_read, near_write))?;
    Ok(())
}

async fn copy(mut from: ReadHalf, mut to: WriteHalf) -> io::Result<()> {
    let mut bufs = VecDeque::new();
    while from.recv(&mut bufs).await? > 0 {
        for buf in bufs.drain(..) {
            to.push(buf);
        }
        to.flush().await?;
    }
    to.shutdown()
}
