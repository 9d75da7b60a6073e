//! The relay on tokio.

use std::io;
use std::net::{SocketAddr, TcpListener};

use anyhow::Result;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::runtime::Builder;

use super::buffer;

pub(super) fn run(multi_thread: bool, listener: TcpListener, target: SocketAddr) -> Result<()> {
    let mut builder = if multi_thread {
        Builder::new_multi_thread()
    } else {
        Builder::new_current_thread()
    };
    listener.set_nonblocking(true)?;
    let runtime = builder.enable_io().build()?;
    runtime.block_on(async move {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        loop {
            let (near, _) = listener.accept().await?;
            // An error ends this connection only.
            tokio::spawn(async move { relay(near, target).await.ok() });
        }
    })
}

async fn relay(mut near: TcpStream, target: SocketAddr) -> io::Result<()> {
    near.set_nodelay(true)?;
    let mut far = TcpStream::connect(target).await?;
    far.set_nodelay(true)?;
    let (near_read, near_write) = near.split();
    let (far_read, far_write) = far.split();
    tokio::try_join!(copy(near_read, far_write), copy(far_read, near_write))?;
    Ok(())
}

async fn copy(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) -> io::Result<()> {
    let mut bytes = buffer::first();
    while from.read_buf(&mut bytes).await? > 0 {
        to.write_all(&bytes).await?;
        bytes = buffer::next(bytes);
    }
    to.shutdown().await
}
