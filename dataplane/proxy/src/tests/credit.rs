//! Every byte that arrives gives its credit back exactly once, whatever becomes of its stream.

use std::collections::VecDeque;

use hbone::Config;

use super::{bufs, pair, pattern, run};

const WINDOW: usize = 64 * 1024;

fn small_windows() -> Config {
    Config {
        stream_window: WINDOW as u32,
        connection_window: 2 * WINDOW as u32,
        ..Config::client()
    }
}

/// Streams that die with payload in the hands of their owner do not take the tunnel's window along.
#[test]
fn abandoned_payload_gives_its_credit_back() {
    run(async {
        let pair = pair(small_windows(), Config::server()).await;
        let data = pattern(1, WINDOW);
        for _ in 0..6 {
            let (client, server) = pair.open().await;
            server
                .send(&mut bufs(&pair.server.pool(), &data))
                .await
                .unwrap();
            let mut taken = VecDeque::new();
            let mut received = 0;
            while received < WINDOW / 2 {
                received += client.recv(&mut taken).await.unwrap();
            }
            drop((client, server)); // the application is gone: nothing was released
        }
        let (client, server) = pair.open().await;
        server
            .send(&mut bufs(&pair.server.pool(), &data))
            .await
            .unwrap();
        server.finish().unwrap();
        let mut back = VecDeque::new();
        let mut received = Vec::new();
        while client.recv(&mut back).await.unwrap() > 0 {
            for buf in back.drain(..) {
                client.release(buf.len());
                received.extend_from_slice(&buf);
            }
        }
        assert!(
            received == data,
            "{} of {} bytes",
            received.len(),
            data.len()
        );
    });
}
