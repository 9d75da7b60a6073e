//! Whether anybody is still at the other end.
//!
//! Only a question that nobody answers ends a tunnel. Elapsed time alone says nothing: this process
//! may have been suspended, the CPU taken by others, or a timer late, and the answer may lie unread
//! in the socket. So [`Keepalive`] counts steps at which it was awake in time and had heard nothing
//! since it asked, and it does not count while the question itself has not left: a peer that takes
//! what lies before the question on a slow path is alive.

use std::rc::Weak;
use std::time::{Duration, Instant};

use hbone::ErrorCode;

use super::{Tunnel, TunnelError};

/// What a PING of ours carries.
const QUESTION: [u8; 8] = *b"ztunnel?";
/// Steps in which the time for an answer passes.
const STEPS: u32 = 4;

/// What has been seen of the peer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Signs {
    /// When something was received last.
    pub(super) last_heard: Instant,
    /// How often something was received.
    pub(super) heard: u64,
    /// Bytes queued for sending so far.
    pub(super) queued: u64,
    /// Bytes that the socket has taken so far.
    pub(super) taken: u64,
}

/// What to do now.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Next {
    /// Wake again when due.
    Wait,
    /// Send a PING now, then as before. [`Keepalive::asked`] is to be told.
    Ask,
    /// Nobody answers.
    GiveUp,
}

/// When to ask and when to give up. Pure: the clock is passed in.
#[derive(Debug)]
struct Keepalive {
    /// Silence after which the peer is asked.
    interval: Duration,
    step: Duration,
    due: Instant,
    question: Option<Question>,
}

/// A question without an answer.
#[derive(Debug)]
struct Question {
    /// [`Signs::heard`] when it was asked.
    heard: u64,
    /// [`Signs::queued`] behind it.
    end: u64,
    /// [`Signs::taken`] at the last step.
    taken: u64,
    steps_left: u32,
}

impl Keepalive {
    fn new(interval: Duration, patience: Duration, now: Instant) -> Self {
        Self {
            interval,
            step: patience / STEPS,
            due: now + interval,
            question: None,
        }
    }

    /// To be called at `due`, or as soon after it as may be.
    fn wake(&mut self, now: Instant, signs: Signs) -> Next {
        let in_time = now < self.due + self.step;
        let Some(question) = &mut self.question else {
            let silence_ends = signs.last_heard + self.interval;
            if now < silence_ends {
                self.due = silence_ends;
                return Next::Wait;
            }
            return Next::Ask;
        };
        if signs.heard != question.heard {
            self.question = None;
            self.due = now.max(signs.last_heard + self.interval);
            return Next::Wait;
        }
        // The question is still on its way out, and that way moves.
        let moves = signs.taken != question.taken && question.taken < question.end;
        question.taken = signs.taken;
        if moves {
            question.steps_left = STEPS;
        } else if in_time {
            question.steps_left -= 1;
        }
        if question.steps_left == 0 {
            return Next::GiveUp;
        }
        self.due = now + self.step;
        Next::Wait
    }

    /// The question is queued.
    fn asked(&mut self, now: Instant, signs: Signs) {
        self.question = Some(Question {
            heard: signs.heard,
            end: signs.queued,
            taken: signs.taken,
            steps_left: STEPS,
        });
        self.due = now + self.step;
    }
}

/// Asks for signs of life, and ends the tunnel when nobody answers.
pub(super) async fn watch(tunnel: Weak<Tunnel>, (interval, patience): (Duration, Duration)) {
    let mut keepalive = Keepalive::new(interval, patience, Instant::now());
    let mut told = Instant::now();
    loop {
        rt::time::sleep_until(keepalive.due).await;
        let Some(tunnel) = tunnel.upgrade() else {
            return;
        };
        // A tunnel that only has to send its last still has to have somebody at the other end.
        if tunnel.error.borrow().is_some() {
            return;
        }
        let now = Instant::now();
        let seconds = now.duration_since(told).as_secs();
        told += Duration::from_secs(seconds);
        let seconds = u32::try_from(seconds).unwrap_or(u32::MAX);
        tunnel.codec.borrow_mut().pass_time(seconds);
        if tunnel.memory.is_used_up() {
            tunnel.memory.make_room(&tunnel.pool);
        }
        match keepalive.wake(now, tunnel.signs()) {
            Next::Wait => {}
            Next::Ask => {
                tunnel.codec.borrow_mut().ping(QUESTION);
                tunnel.pump();
                keepalive.asked(now, tunnel.signs());
            }
            Next::GiveUp => {
                tunnel.abort(TunnelError::KeepaliveTimeout, ErrorCode::NO_ERROR);
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::Random;

    /// The two periods of production.
    const INTERVAL: Duration = Duration::from_secs(10);
    const PATIENCE: Duration = Duration::from_secs(20);
    const MS: Duration = Duration::from_millis(1);

    /// One end of a tunnel and its peer, in virtual time.
    struct World {
        random: Random,
        now: Instant,
        signs: Signs,
        keepalive: Keepalive,
        /// When what the peer has said arrives in the socket.
        arrives: Option<Instant>,
        questions: u32,
    }

    impl World {
        fn new(seed: u64) -> Self {
            let now = Instant::now();
            let signs = Signs {
                last_heard: now,
                heard: 1,
                queued: 0,
                taken: 0,
            };
            Self {
                random: Random(seed),
                now,
                signs,
                keepalive: Keepalive::new(INTERVAL, PATIENCE, now),
                arrives: None,
                questions: 0,
            }
        }

        /// The keepalive is woken once, `late` after it was due. Before that the reader has had its
        /// turn, or, if `reads` is not so, not: then the worker did not run since the last time.
        fn wake(&mut self, late: Duration, reads: bool, round_trip: Option<Duration>) -> Next {
            let due = self.now.max(self.keepalive.due);
            if reads && let Some(at) = self.arrives.filter(|at| *at < due + late) {
                self.hear(at);
            }
            self.now = due + late;
            let next = self.keepalive.wake(self.now, self.signs);
            if next == Next::Ask {
                self.questions += 1;
                self.signs.queued += 39;
                self.signs.taken += 39;
                self.keepalive.asked(self.now, self.signs);
                self.arrives = round_trip.map(|time| self.now + time);
            }
            // The reader's turn in any case.
            if self.arrives.is_some_and(|at| at <= self.now) {
                self.hear(self.now);
            }
            next
        }

        fn hear(&mut self, at: Instant) {
            self.signs.heard += 1;
            self.signs.last_heard = at;
            self.arrives = None;
        }
    }

    /// Timers fire late by a little, by seconds (others have the CPU), or by minutes (the process
    /// was suspended), and before or after what the socket holds is read.
    #[test]
    fn a_peer_that_answers_is_never_given_up_however_late_we_are() {
        for seed in 1..=200 {
            let mut world = World::new(seed);
            let kind = seed % 4;
            let begin = world.now;
            while world.now - begin < Duration::from_secs(3600 * 4) {
                let random = &mut world.random;
                let late = match (kind, random.below(20)) {
                    (0, _) => MS * random.below(2) as u32,
                    (1 | 3, 0) => MS * random.below(400_000) as u32,
                    (1, _) => MS * random.below(3) as u32,
                    _ => MS * random.below(9_000) as u32,
                };
                let round_trip = MS * (1 + random.below(900) as u32);
                let reads = late < MS * 2 || random.below(2) == 0;
                let next = world.wake(late, reads, Some(round_trip));
                assert_ne!(next, Next::GiveUp, "seed {seed}");
            }
            assert!(world.questions > 10, "seed {seed}: {}", world.questions);
        }
    }

    /// Traffic just before the timer is due: neither too early a question nor an end without one.
    #[test]
    fn silence_just_short_of_the_interval_is_no_silence() {
        for short in [1, 5, 100, 9_999] {
            let mut world = World::new(1);
            world.hear(world.now + MS * short);
            let late = Duration::from_micros(300);
            assert_eq!(world.wake(late, true, None), Next::Wait);
            assert_eq!(world.wake(late, true, None), Next::Ask);
            let silent = world.now - world.signs.last_heard;
            assert!(silent >= INTERVAL && silent < INTERVAL + MS * 10);
        }
    }

    #[test]
    fn a_peer_that_does_not_answer_is_given_up_after_a_question_and_its_time() {
        for (late, most) in [(MS, 21), (MS * 900, 26)] {
            let mut world = World::new(1);
            while world.wake(late, true, None) != Next::Ask {}
            let asked = world.now;
            while world.wake(late, true, None) != Next::GiveUp {}
            assert_eq!(world.questions, 1);
            let waited = (world.now - asked).as_secs();
            assert!((20..=most).contains(&waited), "{waited} s");
        }
    }

    /// Time in which this process did not run is not time in which the peer did not answer.
    #[test]
    fn only_steps_in_time_count() {
        let mut world = World::new(1);
        while world.wake(MS, true, None) != Next::Ask {}
        for _ in 0..100 {
            assert_eq!(world.wake(PATIENCE, true, None), Next::Wait);
        }
        let ends = (0..STEPS).any(|_| world.wake(MS, true, None) == Next::GiveUp);
        assert!(ends, "now nobody has answered");
    }

    /// A question behind megabytes on a slow path has not been asked yet; one that does not move
    /// has been asked long enough.
    #[test]
    fn a_question_on_its_way_is_waited_for() {
        let mut world = World::new(1);
        world.signs.queued = 500_000;
        while world.wake(MS, true, None) != Next::Ask {}
        let signs = &mut world.signs;
        signs.taken = 0;
        world.keepalive.asked(world.now, *signs);
        for _ in 0..10 * STEPS {
            world.signs.taken += 10_000;
            assert_eq!(world.wake(MS, true, None), Next::Wait);
        }
        let until = (0..).find(|_| world.wake(MS, true, None) == Next::GiveUp);
        assert_eq!(until, Some(STEPS as usize - 1));
        // What is sent behind the question says nothing.
        let mut world = World::new(1);
        while world.wake(MS, true, None) != Next::Ask {}
        let until = (0..).find(|_| {
            world.signs.queued += 1000;
            world.signs.taken += 1000;
            world.wake(MS, true, None) == Next::GiveUp
        });
        assert_eq!(until, Some(STEPS as usize - 1));
    }
}
