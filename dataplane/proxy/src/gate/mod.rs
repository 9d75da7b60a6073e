//! What bounds handshakes on a worker: how many are under way, how many wait for their turn, and
//! how much of the CPU they get in one go.
//!
//! A handshake costs some hundred microseconds of CPU in two or three steps. [`Cpu`] lets each
//! worker do one such step between two looks at its ring, so that established connections wait for
//! one step at most, however many peers arrive at once.
//!
//! Nobody who only connects can keep others out:
//!
//! * A place ([`places`]) is only for a peer that has sent a whole ClientHello. Until then it waits
//!   beside ([`silent`]), and costs a descriptor and no more.
//! * While places or room to wait are short, whoever has been silent for [`SHORT_PATIENCE`] goes,
//!   the one that has been longest first, and never one that has just come.
//! * One address gets half of all places while nobody else wants them, and a quarter of what there
//!   is otherwise. Those who wait are served by address in turn.
//!
//! Each direction has its own bound: with a common one, two nodes whose outgoing handshakes hold
//! all places would wait for each other's incoming ones. The caller's timeout covers waiting and
//! handshake.

mod cpu;
mod places;
mod silent;

use std::net::IpAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

pub(crate) use cpu::Cpu;
pub(crate) use places::{Overload, Place};
pub(crate) use silent::Displaced;

use places::Places;
use silent::Silent;

/// How long a client may be silent while others wait for what it holds.
const SHORT_PATIENCE: Duration = Duration::from_secs(2);
/// How long a server may be: it has a queue of handshakes, too.
const SERVER_PATIENCE: Duration = Duration::from_secs(5);

/// Peers that have not sent their ClientHello, for each place that there is.
const SILENT_PER_PLACE: usize = 4;

/// One address's part of what is short.
const fn share(of: usize) -> usize {
    if of < 4 { 1 } else { of / 4 }
}

/// One worker's handshakes.
#[derive(Debug)]
pub(crate) struct Handshakes {
    /// Accepted, and without ClientHello.
    arrived: Silent,
    arrived_max: usize,
    incoming: Rc<Places>,
    outgoing: Rc<Places>,
    cpu: Cpu,
}

impl Handshakes {
    /// At most `max` under way in each direction, and as many waiting.
    pub(crate) fn new(max: usize) -> Self {
        Self {
            arrived: Silent::default(),
            arrived_max: max * SILENT_PER_PLACE,
            incoming: Places::new(max, SHORT_PATIENCE),
            outgoing: Places::new(max, SERVER_PATIENCE),
            cpu: Cpu::default(),
        }
    }

    /// Waits for `hello`, the first message of a connection from `peer` that has been accepted.
    pub(crate) async fn arrival<T>(
        &self,
        peer: IpAddr,
        hello: impl Future<Output = T>,
    ) -> Result<T, Displaced> {
        self.make_room(peer);
        self.arrived.listen(peer, Instant::now(), None, hello).await
    }

    /// Sends away who has been silent too long where there are many.
    fn make_room(&self, peer: IpAddr) {
        let arrived = &self.arrived;
        if arrived.len() < self.arrived_max / 2 {
            return;
        }
        while arrived.oldest().is_some_and(|age| age >= SHORT_PATIENCE) {
            arrived.displace_oldest();
        }
        if arrived.of(peer) >= share(self.arrived_max) {
            arrived.displace_oldest_of(peer);
        }
        if arrived.len() >= self.arrived_max {
            arrived.displace_oldest();
        }
    }

    /// Waits for a place for the handshake of an accepted connection from `peer`.
    pub(crate) async fn incoming(&self, peer: IpAddr) -> Result<Place, Overload> {
        self.incoming.take(peer).await
    }

    /// Waits for a place for the handshake of a connection of ours to `peer`.
    pub(crate) async fn outgoing(&self, peer: IpAddr) -> Result<Place, Overload> {
        self.outgoing.take(peer).await
    }

    /// Whose turn it is to compute.
    pub(crate) fn cpu(&self) -> &Cpu {
        &self.cpu
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::net::Ipv4Addr;
    use std::pin::{Pin, pin};
    use std::task::{Context, Poll, Waker};

    use super::*;

    fn poll<T>(future: Pin<&mut impl Future<Output = T>>) -> Poll<T> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    fn address(last: u8) -> IpAddr {
        Ipv4Addr::new(10, 0, 0, last).into()
    }

    #[test]
    fn of_those_who_say_nothing_the_oldest_goes_and_never_the_newest() {
        let handshakes = Handshakes::new(4); // room for 16 that are silent
        let silent = |last| Box::pin(handshakes.arrival(address(last), pending::<()>()));
        let mut all: Vec<_> = (0..16).map(silent).collect();
        for one in &mut all {
            assert!(poll(one.as_mut()).is_pending());
        }
        let mut newest = silent(200);
        assert!(poll(newest.as_mut()).is_pending());
        assert_eq!(poll(all[0].as_mut()), Poll::Ready(Err(Displaced)));
        assert!(poll(all[1].as_mut()).is_pending());
        assert!(poll(newest.as_mut()).is_pending());
        // One that speaks is let through, however full it is.
        let spoken = pin!(handshakes.arrival(address(201), async { 7 }));
        assert_eq!(poll(spoken), Poll::Ready(Ok(7)));
        drop((all, newest));
        assert_eq!(handshakes.arrived.len(), 0);
    }

    #[test]
    fn an_address_with_more_than_its_share_makes_room_by_itself() {
        let handshakes = Handshakes::new(4);
        let silent = |last| Box::pin(handshakes.arrival(address(last), pending::<()>()));
        let mut others: Vec<_> = (0..6).map(silent).collect();
        for other in &mut others {
            assert!(poll(other.as_mut()).is_pending());
        }
        let mut greedy: Vec<_> = (0..40).map(|_| silent(100)).collect();
        for one in &mut greedy {
            assert!(poll(one.as_mut()).is_pending());
        }
        assert!(handshakes.arrived.of(address(100)) <= share(16));
        assert!(
            others
                .iter_mut()
                .all(|other| poll(other.as_mut()).is_pending())
        );
    }
}
