//! The relay on monoio, one ring per thread.

use std::io;
use std::net::{SocketAddr, TcpListener};

use anyhow::Result;
use monoio::io::{AsyncReadRent, AsyncWriteRent, AsyncWriteRentExt as _, Splitable as _};
use monoio::net::TcpStream;
use monoio::{IoUringDriver, RuntimeBuilder};

use super::{RING_ENTRIES, buffer};

pub(super) fn run(listener: TcpListener, target: SocketAddr) -> Result<()> {
    let mut runtime = RuntimeBuilder::<IoUringDriver>::new()
        .with_entries(RING_ENTRIES)
        .build()?;
    runtime.block_on(async move {
        let listener = monoio::net::TcpListener::from_std(listener)?;
        loop {
            let (near, _) = listener.accept().await?;
            // An error ends this connection only.
            monoio::spawn(async move { relay(near, target).await.ok() });
        }
    })
}

async fn relay(near: TcpStream, target: SocketAddr) -> io::Result<()> {
    near.set_nodelay(true)?;
    let far = TcpStream::connect_addr(target).await?;
    far.set_nodelay(true)?;
    let (near_read, near_write) = near.into_split();
    let (far_read, far_write) = far.into_split();
    tokio::try_join!(copy(near_read, far_write), copy(far_read, near_write))?;
    Ok(())
}

async fn copy(mut from: impl AsyncReadRent, mut to: impl AsyncWriteRent) -> io::Result<()> {
    let mut bytes = buffer::first();
    loop {
        let (read, filled) = from.read(bytes).await;
        if read? == 0 {
            return to.shutdown().await;
        }
        let (written, sent) = to.write_all(filled).await;
        written?;
        bytes = buffer::next(sent);
    }
}
