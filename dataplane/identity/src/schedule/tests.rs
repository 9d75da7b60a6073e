use proptest::prelude::*;

use super::*;

const TTL: Duration = Duration::from_secs(1000);
const SECOND: Duration = Duration::from_secs(1);

fn identity(number: usize) -> Identity {
    Identity::new("td", "default", &format!("w{number}")).unwrap()
}

/// A schedule and its clocks.
struct Fixture {
    schedule: Schedule,
    now: Now,
}

impl Fixture {
    fn new() -> Self {
        let now = Now {
            monotonic: Instant::now(),
            time_of_day: SystemTime::now(),
        };
        Self {
            schedule: Schedule::new(now, 7),
            now,
        }
    }

    /// Lets time pass, without a look at it.
    fn pass(&mut self, time: Duration) {
        self.now.monotonic += time;
        self.now.time_of_day += time;
    }

    /// Lets time pass as the driver does: it looks when it was told to.
    fn live(&mut self, time: Duration) {
        let end = self.now.monotonic + time;
        loop {
            let next = self.schedule.wake_at().min(end);
            self.pass(next.saturating_duration_since(self.now.monotonic));
            self.schedule.fire(self.now);
            if next == end {
                return;
            }
        }
    }

    fn demand(&mut self, number: usize) {
        self.schedule.demand(&identity(number), false, self.now);
    }

    fn want(&mut self, numbers: std::ops::Range<usize>) {
        let wanted = numbers.map(|number| (identity(number), true)).collect();
        self.schedule.want(wanted);
    }

    /// All that may be asked for now.
    fn next(&mut self) -> Vec<Identity> {
        std::iter::from_fn(|| self.schedule.next()).collect()
    }

    fn issued(&mut self, number: usize) {
        let span = self.span();
        self.schedule
            .finished(&identity(number), Some(span), self.now);
    }

    fn span(&self) -> Span {
        Span {
            start: self.now.time_of_day,
            end: self.now.time_of_day + TTL,
        }
    }

    fn failed(&mut self, number: usize) -> bool {
        self.schedule.finished(&identity(number), None, self.now)
    }

    fn waiting(&self) -> bool {
        !self.schedule.queue.is_empty()
    }
}

fn numbers(numbers: impl IntoIterator<Item = usize>) -> Vec<Identity> {
    numbers.into_iter().map(identity).collect()
}

/// Of each kind some, brought in in the wrong order.
#[test]
fn connections_come_before_what_is_fetched_ahead_and_that_before_renewals() {
    let mut fixture = Fixture::new();
    fixture.want(0..3);
    for number in fixture.next() {
        let span = fixture.span();
        fixture.schedule.finished(&number, Some(span), fixture.now);
    }
    fixture.live(TTL / 2);
    // 0 to 2 are due for renewal. More is wanted, and of that some is waited for.
    fixture.want(0..6);
    fixture.demand(5);
    fixture.demand(9);
    let order = fixture.next();
    assert_eq!(order[..2], numbers([5, 9]));
    let mut ahead = order[2..4].to_vec();
    ahead.sort();
    assert_eq!(ahead, numbers([3, 4]));
    let mut renewals = order[4..].to_vec();
    renewals.sort();
    assert_eq!(renewals, numbers(0..3));
}

#[test]
fn what_is_fetched_ahead_is_raised_when_a_connection_waits_for_it() {
    let mut fixture = Fixture::new();
    fixture.want(0..30);
    let first = fixture.next();
    assert_eq!(first.len(), UNDER_WAY_MAX);
    let last = fixture.schedule.queue.last().unwrap().2.clone();
    fixture.schedule.demand(&last, false, fixture.now);
    let span = fixture.span();
    fixture
        .schedule
        .finished(&first[0], Some(span), fixture.now);
    assert_eq!(fixture.next(), [last]);
}

#[test]
fn eight_are_under_way_at_most_and_each_once() {
    let mut fixture = Fixture::new();
    for number in (0..20).chain(0..20) {
        fixture.demand(number);
    }
    assert_eq!(fixture.next(), numbers(0..8));
    for number in 0..20 {
        fixture.demand(number); // of 0..8 for the third time
    }
    assert_eq!(fixture.next(), []);
    fixture.issued(3);
    fixture.failed(5);
    assert_eq!(fixture.next(), numbers([8, 9]));
}

/// The delays after failures in a row: they double from one second to 150, less up to a fifth.
#[test]
fn delays_grow_to_a_limit_and_a_success_resets_them() {
    let mut fixture = Fixture::new();
    fixture.want(0..1);
    for longest in [1, 2, 4, 8, 16, 32, 64, 128, 150, 150, 150] {
        assert_eq!(fixture.next(), numbers([0]));
        fixture.failed(0);
        fixture.demand(0);
        assert!(!fixture.waiting(), "nobody shortens the delay");
        let longest = SECOND * longest;
        fixture.live(longest * 79 / 100);
        assert!(!fixture.waiting(), "{longest:?}");
        fixture.live(longest * 21 / 100);
        assert!(fixture.waiting(), "{longest:?}");
    }
    assert_eq!(fixture.next(), numbers([0]));
    fixture.issued(0);
    fixture.live(TTL / 2);
    assert_eq!(fixture.next(), numbers([0]));
    fixture.failed(0);
    fixture.live(SECOND);
    assert_eq!(fixture.next(), numbers([0]), "the delays begin anew");
}

/// Nodes that have failed together do not come back together.
#[test]
fn delays_differ_by_chance() {
    let mut fixture = Fixture::new();
    fixture.want(0..8);
    for identity in fixture.next() {
        fixture.schedule.finished(&identity, None, fixture.now);
    }
    let delays: BTreeSet<Instant> = fixture.schedule.timers.iter().map(|(at, _)| *at).collect();
    assert!(delays.len() > 3, "{delays:?}");
}

#[test]
fn who_waits_is_told_with_the_second_failure() {
    let mut fixture = Fixture::new();
    fixture.demand(0);
    assert_eq!(fixture.next(), numbers([0]));
    assert!(!fixture.failed(0), "a moment later it may work");
    fixture.live(SECOND);
    // As a connection's, not as one that is fetched ahead.
    let queued = fixture.schedule.queue.first().unwrap().0;
    assert_eq!(queued, Priority::Awaited);
    assert_eq!(fixture.next(), numbers([0]));
    assert!(fixture.failed(0));
    fixture.live(2 * SECOND);
    let queued = fixture.schedule.queue.first().unwrap().0;
    assert_eq!(queued, Priority::Prefetch);
}

#[test]
fn renewed_by_timer_at_half_the_lifetime() {
    // A certificate's start and end, relative to the moment it comes, and when it is renewed.
    let hour = 3600_i64;
    for (start, end, renewal) in [
        (0, 24 * hour, 12 * hour as u64),
        (-120, 24 * hour, (12 * hour - 60) as u64),
        // It has been of age for long.
        (-10 * hour, 4 * hour, (2 * hour) as u64),
        // It lives for seconds: no more than one a second.
        (-120, 10, 5),
        (-120, 1, 1),
    ] {
        let mut fixture = Fixture::new();
        fixture.want(0..1);
        fixture.next();
        let at = |offset: i64| match u64::try_from(offset) {
            Ok(ahead) => fixture.now.time_of_day + SECOND * ahead as u32,
            Err(_) => fixture.now.time_of_day - SECOND * offset.unsigned_abs() as u32,
        };
        let span = Span {
            start: at(start),
            end: at(end),
        };
        fixture
            .schedule
            .finished(&identity(0), Some(span), fixture.now);
        fixture.live(SECOND * renewal as u32 - Duration::from_millis(1));
        assert!(!fixture.waiting(), "{start} {end}");
        fixture.live(Duration::from_millis(1));
        let queued = fixture.schedule.queue.first().map(|first| first.0);
        let kind = match end > renewal as i64 {
            true => Priority::Renewal,
            false => Priority::Prefetch,
        };
        assert_eq!(queued, Some(kind), "{start} {end}");
    }
}

/// A failed renewal is tried again when the certificate ends, if that is sooner.
#[test]
fn the_end_of_a_certificate_is_not_slept_through() {
    let mut fixture = Fixture::new();
    fixture.want(0..1);
    fixture.next();
    fixture.issued(0);
    fixture.live(TTL / 2);
    let mut attempts = 0;
    while fixture.now.time_of_day < fixture.schedule.entries[&identity(0)].span.unwrap().end {
        attempts += fixture.next().len();
        fixture.failed(0);
        let wake = fixture.schedule.wake_at();
        fixture.live(wake.saturating_duration_since(fixture.now.monotonic));
        while !fixture.waiting() {
            let wake = fixture.schedule.wake_at();
            fixture.live(wake.saturating_duration_since(fixture.now.monotonic));
        }
    }
    let (end, now) = (
        fixture.schedule.entries[&identity(0)].span.unwrap().end,
        fixture.now.time_of_day,
    );
    assert!(now.duration_since(end).unwrap() <= SECOND, "{attempts}");
    let queued = fixture.schedule.queue.first().unwrap().0;
    assert_eq!(queued, Priority::Prefetch, "there is none any more");
}

/// A clock that was hours off and is corrected: what is not valid by the right time is asked for
/// without anyone waiting, what is stays.
#[test]
fn a_corrected_clock_makes_certificates_due() {
    let hours = SECOND * 3 * 3600;
    for (ahead, correction, due) in [
        (false, hours, true),  // expired by the right time
        (true, hours, true),   // not valid yet by the right time
        (true, TTL / 4, true), // not valid yet, by little
        (false, TTL / 4, false),
        (false, TTL / 2, true), // half its life is over
        (false, SECOND / 2, false),
    ] {
        let mut fixture = Fixture::new();
        fixture.want(0..1);
        fixture.next();
        fixture.issued(0);
        fixture.live(SECOND);
        if ahead {
            fixture.now.time_of_day -= correction;
        } else {
            fixture.now.time_of_day += correction;
        }
        fixture.live(CLOCK_CHECK);
        assert_eq!(fixture.waiting(), due, "{ahead} {correction:?}");
    }
}

/// Delays after failures last as long as they last, whatever is done to the time of day.
#[test]
fn a_corrected_clock_changes_no_delay_after_a_failure() {
    for ahead in [true, false] {
        let mut fixture = Fixture::new();
        fixture.want(0..1);
        for _ in 0..6 {
            fixture.next();
            fixture.failed(0);
            fixture.live(SECOND * 40);
        }
        fixture.next();
        fixture.failed(0); // 64 s, less a fifth at most
        if ahead {
            fixture.now.time_of_day += SECOND * 7200;
        } else {
            fixture.now.time_of_day -= SECOND * 7200;
        }
        fixture.live(SECOND * 51);
        assert!(!fixture.waiting());
        fixture.live(SECOND * 13);
        assert!(fixture.waiting());
    }
}

/// A worker found that a certificate is not valid before this thread did.
#[test]
fn a_certificate_that_a_connection_finds_useless_is_replaced_at_once() {
    let mut fixture = Fixture::new();
    fixture.want(0..1);
    fixture.next();
    fixture.issued(0);
    fixture.demand(0);
    assert!(!fixture.waiting(), "it is on its way");
    fixture.schedule.demand(&identity(0), true, fixture.now);
    assert_eq!(fixture.schedule.queue.first().unwrap().0, Priority::Awaited);
}

#[test]
fn an_identity_is_forgotten_with_its_last_pod() {
    let mut fixture = Fixture::new();
    fixture.want(0..6);
    fixture.next();
    for number in [0, 1, 2] {
        fixture.issued(number);
    }
    fixture.failed(3);
    // 4 and 5 are under way, somebody waits for 5.
    fixture.demand(5);
    fixture.want(0..1);
    let mut forgotten = fixture.schedule.take_forgotten();
    forgotten.sort();
    assert_eq!(forgotten, numbers([1, 2, 3]));
    fixture.issued(4);
    assert_eq!(fixture.schedule.take_forgotten(), numbers([4]));
    // Who waited gets it, and others for a while.
    fixture.issued(5);
    assert_eq!(fixture.schedule.take_forgotten(), []);
    fixture.live(UNWANTED);
    assert_eq!(fixture.schedule.take_forgotten(), numbers([5]));
    fixture.live(TTL);
    assert_eq!(fixture.next(), numbers([0]), "no other is renewed");
    assert_eq!(fixture.schedule.entries.len(), 1);
}

#[test]
fn what_comes_back_while_it_is_asked_for_stays() {
    let mut fixture = Fixture::new();
    fixture.want(0..1);
    fixture.next();
    fixture.want(1..1);
    fixture.want(0..1);
    assert_eq!(fixture.next(), [], "one request is enough");
    fixture.issued(0);
    assert_eq!(fixture.schedule.take_forgotten(), []);
}

#[test]
fn of_what_is_not_fetched_ahead_there_is_what_was_waited_for() {
    let mut fixture = Fixture::new();
    let wanted: Wanted = [(identity(0), false), (identity(1), false)].into();
    fixture.schedule.want(wanted);
    assert!(!fixture.waiting());
    fixture.demand(0);
    assert_eq!(fixture.next(), numbers([0]));
    fixture.issued(0);
    fixture.live(TTL / 2);
    assert_eq!(fixture.next(), numbers([0]), "and that is renewed");
}

#[derive(Clone, Debug)]
enum Event {
    Demand(usize),
    Useless(usize),
    Want(usize, usize),
    Start,
    Issued(usize),
    Failed(usize),
    Live(u64),
    Correct(i64),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (0..24_usize).prop_map(Event::Demand),
        1 => (0..24_usize).prop_map(Event::Useless),
        2 => (0..24_usize, 0..24_usize).prop_map(|(from, to)| Event::Want(from, to)),
        4 => Just(Event::Start),
        4 => (0..8_usize).prop_map(Event::Issued),
        3 => (0..8_usize).prop_map(Event::Failed),
        3 => (0..700_u64).prop_map(Event::Live),
        1 => (-4000..4000_i64).prop_map(Event::Correct),
    ]
}

impl Fixture {
    fn apply(&mut self, event: &Event, under_way: &mut Vec<Identity>) {
        match *event {
            Event::Demand(number) => self.demand(number),
            Event::Useless(number) => self.schedule.demand(&identity(number), true, self.now),
            Event::Want(from, to) => self.want(from..to),
            Event::Start => {
                // The best of what is queued, and never one that is under way.
                let best = self.schedule.queue.first().map(|first| first.0);
                let next = self.schedule.next();
                assert_eq!(
                    next.is_some(),
                    best.is_some() && under_way.len() < UNDER_WAY_MAX
                );
                if let Some(identity) = next {
                    assert!(!under_way.contains(&identity));
                    under_way.push(identity);
                }
            }
            Event::Issued(index) | Event::Failed(index) if !under_way.is_empty() => {
                let identity = under_way.swap_remove(index % under_way.len());
                let span = matches!(event, Event::Issued(_)).then(|| self.span());
                self.schedule.finished(&identity, span, self.now);
            }
            Event::Issued(_) | Event::Failed(_) => {}
            Event::Live(seconds) => self.live(SECOND * seconds as u32),
            Event::Correct(by) if by < 0 => {
                self.now.time_of_day -= SECOND * by.unsigned_abs() as u32;
            }
            Event::Correct(by) => self.now.time_of_day += SECOND * by as u32,
        }
    }

    /// What holds at any moment.
    fn check(&self, under_way: &[Identity]) {
        let schedule = &self.schedule;
        assert_eq!(schedule.under_way, under_way.len());
        assert!(schedule.under_way <= UNDER_WAY_MAX);
        let mut queued = 0;
        for (identity, entry) in &schedule.entries {
            let timed = entry.timer.is_some_and(|at| {
                assert!(schedule.timers.contains(&(at, identity.clone())));
                true
            });
            match entry.step {
                Step::Idle => assert!(timed, "{identity} is never looked at again"),
                Step::Queued(priority, arrival) => {
                    queued += 1;
                    assert!(!timed);
                    let key = (priority, arrival, identity.clone());
                    assert!(schedule.queue.contains(&key));
                    assert_eq!(entry.awaited, priority == Priority::Awaited);
                }
                Step::UnderWay => assert!(under_way.contains(identity) && !timed),
            }
        }
        let timed = schedule.entries.values().filter(|e| e.timer.is_some());
        assert_eq!(schedule.timers.len(), timed.count());
        assert_eq!(schedule.queue.len(), queued);
        for identity in under_way {
            assert!(schedule.entries.contains_key(identity));
        }
    }
}

proptest! {
    /// Whatever happens in whatever order: nothing is lost, nothing is asked for twice, and a CA
    /// that works again gives everybody a certificate within its longest delay.
    #[test]
    fn nothing_is_lost_whatever_happens(events in prop::collection::vec(event(), 1..200)) {
        let mut fixture = Fixture::new();
        let mut under_way = Vec::new();
        for event in &events {
            fixture.apply(event, &mut under_way);
            fixture.check(&under_way);
        }
        fixture.want(0..24);
        let deadline = fixture.now.monotonic + RETRY_MAX;
        while fixture.now.monotonic <= deadline {
            loop {
                under_way.extend(fixture.next());
                let Some(identity) = under_way.pop() else { break };
                let span = fixture.span();
                fixture.schedule.finished(&identity, Some(span), fixture.now);
            }
            fixture.check(&under_way);
            fixture.live(SECOND);
        }
        let now = fixture.now.time_of_day;
        let valid = |entry: &&Entry| entry.span.is_some_and(|span| span.is_valid(now));
        let ready = fixture.schedule.entries.values().filter(valid).count();
        prop_assert_eq!(ready, 24);
        prop_assert_eq!(fixture.schedule.entries.len(), 24);
    }
}
