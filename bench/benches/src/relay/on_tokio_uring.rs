//! The relay on tokio-uring, one ring per thread.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener};

use anyhow::Result;
use tokio_uring::net::TcpStream;

use super::{RING_ENTRIES, buffer};

pub(super) fn run(listener: TcpListener, target: SocketAddr) -> Result<()> {
    let mut ring = tokio_uring::uring_builder();
    // DEFER_TASKRUN is out of reach: the ring is watched through epoll.
    ring.setup_single_issuer().setup_coop_taskrun();
    tokio_uring::builder()
        .entries(RING_ENTRIES)
        .uring_builder(&ring)
        .start(async move {
            let listener = tokio_uring::net::TcpListener::from_std(listener);
            loop {
                let (near, _) = listener.accept().await?;
                // An error ends this connection only.
                tokio_uring::spawn(async move { relay(&near, target).await.ok() });
            }
        })
}

async fn relay(near: &TcpStream, target: SocketAddr) -> io::Result<()> {
    near.set_nodelay(true)?;
    let far = TcpStream::connect(target).await?;
    far.set_nodelay(true)?;
    tokio::try_join!(copy(near, &far), copy(&far, near))?;
    Ok(())
}

async fn copy(from: &TcpStream, to: &TcpStream) -> io::Result<()> {
    let mut bytes = buffer::first();
    loop {
        let (read, filled) = from.read(bytes).await;
        if read? == 0 {
            return to.shutdown(Shutdown::Write);
        }
        let (written, sent) = to.write_all(filled).await;
        written?;
        bytes = buffer::next(sent);
    }
}
