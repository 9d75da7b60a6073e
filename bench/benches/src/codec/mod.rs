//! The HBONE codec and the `h2` crate doing the same, both ends in memory on one thread.
//!
//! The transport is a pair of byte queues that either copies into and out of, as a socket would:
//! its cost is part of both sides' numbers. Windows and frame sizes are the mesh's defaults
//! (4 MiB and 16 MiB) on both.

pub mod ours;
pub mod theirs;

/// Payload bytes of a small DATA frame: a request.
pub const SMALL: usize = 1024;
/// Payload bytes of a full DATA frame: one TLS record of plaintext less the frame's header.
pub const BULK: usize = 16_384 - 9;

const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
const AUTHORITY: &str = "10.244.2.11:8080";
const BAGGAGE: &str = "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,\
    k8s.deployment.name=web,service.name=web,service.version=v1,cloud.region=eu,\
    cloud.availability_zone=eu-1";
const FORWARDED: &str = "for=\"10.244.1.11:40312\"";

/// One direction of the transport.
#[derive(Debug, Default)]
struct Wire {
    bytes: Vec<u8>,
    read: usize,
}

impl Wire {
    fn write(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Copies up to `into.len()` bytes out and returns how many.
    fn read(&mut self, into: &mut [u8]) -> usize {
        self.take(into.len(), |bytes| {
            into[..bytes.len()].copy_from_slice(bytes);
        })
    }

    /// Hands up to `max` bytes to `receive` and returns how many.
    fn take(&mut self, max: usize, receive: impl FnOnce(&[u8])) -> usize {
        let waiting = &self.bytes[self.read..];
        let n = waiting.len().min(max);
        receive(&waiting[..n]);
        self.read += n;
        if self.read == self.bytes.len() {
            self.bytes.clear();
            self.read = 0;
        }
        n
    }
}
