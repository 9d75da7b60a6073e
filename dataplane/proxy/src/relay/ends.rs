//! How a relay ends.
//!
//! A side that *sends no more* (FIN, END_STREAM) has its end passed on, and the other direction
//! goes on for as long as it likes. A side that *is no more* (a reset, a time-out, a broken tunnel:
//! every error) ends the relay: what it has sent before is still delivered, while its receiver
//! takes it, and then the other side is reset. That a side is no more is seen by whoever receives
//! from it or sends to it, and while nobody does by a wait of its own.
//!
//! Between the two is a stream that was reset with NO_ERROR or CANCEL, as upstream does it when its
//! application has ended: it is read as an end, but nobody is there any more.

use std::cell::Cell;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use rt::net::{Observer, Sent};
use rt::time::Sleep;

use crate::error::ProxyError;
use crate::tunnel::TunnelStream;

/// How long a receiver of what a side has left behind may take nothing of it; and how long an
/// application may go on sending what nobody takes after all it gets is on its way.
const LINGER: Duration = Duration::from_secs(1);
/// As [`LINGER`], where what was left behind is all there was to be: about as long as the kernel
/// keeps the data of a process that has closed its socket (`tcp_orphan_retries`).
const LINGER_COMPLETE: Duration = Duration::from_secs(120);
/// Bound on all of it where it is not complete.
const LINGER_MAX: Duration = Duration::from_secs(30);
/// Between two looks at what is taken.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// What the future of one direction tells of itself.
#[derive(Debug, Default)]
pub(super) struct Flow {
    /// It receives, and would see a failure of its sender.
    pub(super) receiving: Cell<bool>,
    /// The sender's end has been passed on, behind all before it.
    pub(super) ended: Cell<bool>,
    /// The other direction has ended: its sender, who is this one's receiver, sends no more.
    pub(super) is_last: Cell<bool>,
    /// Chunks the receiver has taken.
    moved: Cell<u64>,
}

impl Flow {
    pub(super) fn moved(&self) {
        self.moved.set(self.moved.get().wrapping_add(1));
    }

    /// The direction has passed on everything, the end included. Never returns.
    pub(super) async fn end(&self) -> Result<(), ProxyError> {
        self.ended.set(true);
        std::future::pending().await
    }
}

/// One side of a relay.
#[derive(Debug)]
pub(super) enum Side<'a> {
    /// A socket, and who is behind it.
    Socket(Observer, Who),
    /// A stream of a tunnel.
    Stream(&'a TunnelStream),
}

/// Who is behind a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Who {
    Client,
    Server,
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Client => "client",
            Self::Server => "server",
        })
    }
}

/// Whether somebody is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Present,
    /// Has gone in order: neither sends nor takes any more.
    Left,
    /// Is no more.
    Gone,
}

impl Side<'_> {
    fn state(&self) -> State {
        match self {
            Self::Socket(observer, _) if observer.failure().is_some() => State::Gone,
            Self::Socket(..) => State::Present,
            Self::Stream(stream) => match stream.failure() {
                None => State::Present,
                Some(failure) if failure.is_clean() => State::Left,
                Some(_) => State::Gone,
            },
        }
    }

    /// Sees to it that the task is woken when nobody is there any more.
    fn watch(&mut self, cx: &mut Context<'_>) {
        // `state` tells what was found.
        let _ = match self {
            Self::Socket(observer, _) => observer.poll_failure(cx),
            Self::Stream(stream) => stream.poll_failure(cx).map(|_| ()),
        };
    }

    fn error(&self) -> Option<ProxyError> {
        match self {
            Self::Socket(observer, who) => observer
                .failure()
                .map(|error| ProxyError::Lost { side: *who, error }),
            Self::Stream(stream) => stream.failure().map(ProxyError::from),
        }
    }

    /// What it has taken of what was sent to it. What a stream was given is on its way in order.
    fn sent(&self) -> Sent {
        let none = Sent {
            acknowledged: 0,
            left: 0,
        };
        match self {
            Self::Socket(observer, _) => observer.sent().unwrap_or(none),
            Self::Stream(_) => none,
        }
    }

    /// Whether it had sent all it wanted to.
    fn is_complete(&self) -> bool {
        matches!(self, Self::Stream(stream) if stream.is_complete())
    }
}

/// One direction's future, which ends early only by an error, or because its receiver has left and
/// its sender has ended, too.
type Direction<'a, F> = Pin<&'a mut F>;

/// Runs both directions to the relay's end. The first direction is from the first side to the
/// second, the second one back.
///
/// Pinned by the caller: a future that is moved into another one's state is in it twice. So would
/// be the arguments of an `async fn`.
pub(super) fn both<'a, A, B>(
    mut one: Direction<'a, A>,
    mut other: Direction<'a, B>,
    flows: [&'a Flow; 2],
    sides: [Side<'a>; 2],
) -> impl Future<Output = Result<(), ProxyError>> + use<'a, A, B>
where
    A: Future<Output = Result<(), ProxyError>>,
    B: Future<Output = Result<(), ProxyError>>,
{
    let mut ends = Ends {
        sides,
        flows,
        over: [false; 2],
        unable: None,
        linger: None,
    };
    std::future::poll_fn(move |cx| {
        if ends.may_go_on(0) {
            ends.note(0, one.as_mut().poll(cx));
        }
        if ends.may_go_on(1) {
            ends.note(1, other.as_mut().poll(cx));
        }
        ends.poll(cx)
    })
}

/// What is known of the end of a relay. Direction `n` is from side `n`.
struct Ends<'a> {
    sides: [Side<'a>; 2],
    flows: [&'a Flow; 2],
    /// Directions that will do nothing more.
    over: [bool; 2],
    /// An error that is neither side's.
    unable: Option<Box<ProxyError>>,
    linger: Option<Box<Linger>>,
}

impl Ends<'_> {
    /// Whether a direction has something to do: not if there is no receiver.
    fn may_go_on(&self, way: usize) -> bool {
        !self.over[way] && self.sides[1 - way].state() != State::Gone
    }

    fn note(&mut self, way: usize, polled: Poll<Result<(), ProxyError>>) {
        let ended = self.flows[way].ended.get();
        self.flows[1 - way].is_last.set(ended);
        let Poll::Ready(result) = polled else { return };
        self.over[way] = true;
        let known = self.sides.iter().any(|side| side.state() == State::Gone);
        if let Err(error) = result
            && !known
        {
            self.unable = Some(Box::new(error));
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ProxyError>> {
        if let Some(error) = self.unable.take() {
            return Poll::Ready(Err(*error));
        }
        if self.flows.iter().all(|flow| flow.ended.get()) {
            return Poll::Ready(Ok(()));
        }
        for (side, flow) in self.sides.iter_mut().zip(self.flows) {
            if !flow.receiving.get() {
                side.watch(cx);
            }
        }
        match [self.sides[0].state(), self.sides[1].state()] {
            [State::Present, State::Present] => Poll::Pending,
            [State::Gone, State::Gone] => Poll::Ready(self.lost(0)),
            [State::Gone, _] => self.poll_delivery(cx, 0),
            [_, State::Gone] => self.poll_delivery(cx, 1),
            [State::Left, _] => self.poll_leaving(cx, 0),
            [_, State::Left] => self.poll_leaving(cx, 1),
        }
    }

    fn lost(&self, side: usize) -> Result<(), ProxyError> {
        self.sides[side].error().map_or(Ok(()), Err)
    }

    /// Side `from` is no more: waits until the other one has what it had sent.
    fn poll_delivery(&mut self, cx: &mut Context<'_>, from: usize) -> Poll<Result<(), ProxyError>> {
        let done = self.over[from] || self.flows[from].ended.get();
        if done && self.sides[1 - from].sent().left == 0 {
            return Poll::Ready(self.lost(from));
        }
        self.linger_for(cx, from).map(|()| self.lost(from))
    }

    /// Side `from` has left: what it had sent is delivered, its end as well, and then the other
    /// side may end what it sends.
    fn poll_leaving(&mut self, cx: &mut Context<'_>, from: usize) -> Poll<Result<(), ProxyError>> {
        if !self.flows[from].ended.get() {
            return self.linger_for(cx, from).map(|()| self.lost(from));
        }
        if self.over[1 - from] {
            return Poll::Ready(Ok(()));
        }
        // Its sender may stop now; closing with data unread would reset it, and take away what is
        // still on its way to it.
        self.linger(cx, from, LINGER).map(Ok)
    }

    /// As [`Self::linger`], as long as what `from` has left is worth.
    fn linger_for(&mut self, cx: &mut Context<'_>, from: usize) -> Poll<()> {
        let patience = match self.sides[from].is_complete() {
            true => LINGER_COMPLETE,
            false => LINGER,
        };
        self.linger(cx, from, patience)
    }

    /// Ready when the receiver of what `from` has left takes nothing for `patience`, or slowly.
    fn linger(&mut self, cx: &mut Context<'_>, from: usize, patience: Duration) -> Poll<()> {
        let linger = self.linger.get_or_insert_with(Box::default);
        let progress = (self.sides[1 - from].sent(), self.flows[from].moved.get());
        linger.poll(cx, progress, patience)
    }
}

/// Waits while something is taken.
#[derive(Debug)]
struct Linger {
    began: Instant,
    last: Option<(Sent, u64)>,
    since: Instant,
    look: Sleep,
}

impl Default for Linger {
    fn default() -> Self {
        let now = Instant::now();
        Self {
            began: now,
            last: None,
            since: now,
            look: rt::time::sleep(LOOK_EVERY),
        }
    }
}

impl Linger {
    fn poll(&mut self, cx: &mut Context<'_>, taken: (Sent, u64), patience: Duration) -> Poll<()> {
        if self.last != Some(taken) {
            self.last = Some(taken);
            self.since = Instant::now();
        }
        let late = patience <= LINGER && self.began.elapsed() >= LINGER_MAX;
        if late || self.since.elapsed() >= patience {
            return Poll::Ready(());
        }
        while Pin::new(&mut self.look).poll(cx).is_ready() {
            self.look = rt::time::sleep(LOOK_EVERY);
        }
        Poll::Pending
    }
}
