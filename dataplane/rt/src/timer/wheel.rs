//! A hierarchical timer wheel: what waits for a tick, in lists by how far away the tick is.
//!
//! Level 0 has one list for each of the next 64 ticks, level 1 one for each of the next 64 runs of
//! 64 ticks, and so on. An entry lies on the level of the highest digit (to base 64) in which its
//! tick differs from the present one, and moves down when that digit is reached: at most
//! `LEVELS - 1` times. Everything on a level is due before anything on the next one, so that a bit
//! per list finds the earliest. Inserting and removing take constant time, and entries live in a
//! slab: nothing is allocated for one unless more are armed than ever before.

const BITS: u32 = 6;
const SLOTS: usize = 1 << BITS;
const LEVELS: usize = 8;
/// Ticks beyond are taken for this one: 2^48 of a runtime's ticks are a thousand years.
const TICK_MAX: u64 = (1 << (BITS * LEVELS as u32)) - 1;
const NONE: u32 = u32::MAX;
/// Entries of a list that [`Wheel::next`] looks through for the earliest tick.
const LOOKED_AT: usize = 16;

/// Name of an entry; stale once the entry is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Key {
    index: u32,
    generation: u32,
}

#[derive(Debug)]
struct Entry<T> {
    tick: u64,
    /// None: the entry is free.
    value: Option<T>,
    generation: u32,
    next: u32,
    previous: u32,
    level: u8,
    slot: u8,
}

#[derive(Debug, Clone, Copy)]
struct Level {
    /// A bit for each list that is not empty.
    occupied: u64,
    heads: [u32; SLOTS],
}

#[derive(Debug)]
pub(crate) struct Wheel<T> {
    /// Everything due at this tick or before has fired.
    now: u64,
    levels: [Level; LEVELS],
    entries: Vec<Entry<T>>,
    /// First free entry; they are linked by `next`.
    free: u32,
    live: usize,
}

impl<T> Default for Wheel<T> {
    fn default() -> Self {
        let level = Level {
            occupied: 0,
            heads: [NONE; SLOTS],
        };
        Self {
            now: 0,
            levels: [level; LEVELS],
            entries: Vec::new(),
            free: NONE,
            live: 0,
        }
    }
}

impl<T> Wheel<T> {
    /// Entries that wait.
    pub(crate) fn len(&self) -> usize {
        self.live
    }

    /// Lets `value` wait for `tick`; one that has passed fires with the next.
    pub(crate) fn insert(&mut self, tick: u64, value: T) -> Key {
        let index = if self.free == NONE {
            self.entries.push(Entry {
                tick: 0,
                value: None,
                generation: 0,
                next: NONE,
                previous: NONE,
                level: 0,
                slot: 0,
            });
            (self.entries.len() - 1) as u32
        } else {
            self.free
        };
        let now = self.now;
        let entry = &mut self.entries[index as usize];
        if index == self.free {
            self.free = entry.next;
        }
        entry.tick = tick.clamp(now + 1, TICK_MAX);
        entry.value = Some(value);
        let generation = entry.generation;
        self.live += 1;
        self.link(index);
        Key { index, generation }
    }

    /// What the entry waits with, to change it. None: it has fired or been removed.
    pub(crate) fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        let entry = self.entries.get_mut(key.index as usize)?;
        if entry.generation != key.generation {
            return None;
        }
        entry.value.as_mut()
    }

    /// Takes an entry out. None: it has fired or been removed.
    pub(crate) fn remove(&mut self, key: Key) -> Option<T> {
        self.get_mut(key)?;
        self.unlink(key.index);
        self.vacate(key.index)
    }

    /// No entry is due before this tick. It is the earliest one's, unless many lie far away
    /// together.
    pub(crate) fn next(&self) -> Option<u64> {
        let (level, slot) = self.earliest()?;
        let mut index = self.levels[level].heads[slot];
        if level == 0 {
            return Some(self.entries[index as usize].tick);
        }
        let mut tick = u64::MAX;
        for _ in 0..LOOKED_AT {
            let entry = &self.entries[index as usize];
            tick = tick.min(entry.tick);
            if entry.next == NONE {
                return Some(tick);
            }
            index = entry.next;
        }
        Some(self.first_tick(level, slot))
    }

    /// Goes on to tick `now` and hands out everything that is due by then, earliest tick first.
    pub(crate) fn advance(&mut self, now: u64, mut fire: impl FnMut(T)) {
        let now = now.min(TICK_MAX - 1);
        while let Some((level, slot)) = self.earliest() {
            let first = self.first_tick(level, slot);
            if first > now {
                break;
            }
            self.now = first;
            let mut index = std::mem::replace(&mut self.levels[level].heads[slot], NONE);
            self.levels[level].occupied &= !(1 << slot);
            while index != NONE {
                let Entry { tick, next, .. } = self.entries[index as usize];
                if tick > first {
                    self.link(index);
                } else if let Some(value) = self.vacate(index) {
                    fire(value);
                }
                index = next;
            }
        }
        self.now = self.now.max(now);
    }

    /// The list with the earliest entry.
    fn earliest(&self) -> Option<(usize, usize)> {
        let occupied = |level: &Level| level.occupied != 0;
        let level = self.levels.iter().position(occupied)?;
        Some((level, self.levels[level].occupied.trailing_zeros() as usize))
    }

    /// The first tick of a list that is not empty: lists lie ahead of now, within the present turn
    /// of their level.
    fn first_tick(&self, level: usize, slot: usize) -> u64 {
        let shift = BITS * level as u32;
        let turn = self.now >> (shift + BITS) << (shift + BITS);
        turn | (slot as u64) << shift
    }

    /// Puts an entry into the list its tick belongs to.
    fn link(&mut self, index: u32) {
        let entry = &mut self.entries[index as usize];
        let differs = (entry.tick ^ self.now) | (SLOTS as u64 - 1);
        let level = (differs.ilog2() / BITS) as usize;
        let slot = (entry.tick >> (BITS * level as u32)) as usize & (SLOTS - 1);
        (entry.level, entry.slot) = (level as u8, slot as u8);
        let lists = &mut self.levels[level];
        let head = std::mem::replace(&mut lists.heads[slot], index);
        lists.occupied |= 1 << slot;
        entry.next = head;
        entry.previous = NONE;
        if head != NONE {
            self.entries[head as usize].previous = index;
        }
    }

    fn unlink(&mut self, index: u32) {
        let entry = &self.entries[index as usize];
        let (next, previous) = (entry.next, entry.previous);
        let (level, slot) = (usize::from(entry.level), usize::from(entry.slot));
        if next != NONE {
            self.entries[next as usize].previous = previous;
        }
        if previous != NONE {
            self.entries[previous as usize].next = next;
            return;
        }
        let lists = &mut self.levels[level];
        lists.heads[slot] = next;
        if next == NONE {
            lists.occupied &= !(1 << slot);
        }
    }

    /// Frees an entry that is in no list.
    fn vacate(&mut self, index: u32) -> Option<T> {
        let entry = &mut self.entries[index as usize];
        entry.generation = entry.generation.wrapping_add(1);
        entry.next = self.free;
        self.free = index;
        self.live -= 1;
        entry.value.take()
    }
}

#[cfg(test)]
mod tests {
    use std::cmp::Reverse;
    use std::collections::{BTreeSet, BinaryHeap, VecDeque};
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    /// Of one case; Miri takes a second for some.
    const STEPS: usize = if cfg!(miri) { 30 } else { 200 };

    #[derive(Debug, Clone)]
    enum Step {
        Insert(u64),
        Remove(usize),
        Advance(u64),
    }

    /// Distances of all magnitudes: near ones are not rarer than far ones.
    fn distance() -> impl Strategy<Value = u64> {
        (0..40_u32, 0..64_u64).prop_map(|(shift, digit)| digit << shift >> 3)
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => distance().prop_map(Step::Insert),
            1 => any::<usize>().prop_map(Step::Remove),
            2 => distance().prop_map(Step::Advance),
        ]
    }

    /// A wheel and an ordered set of what must be in it.
    #[derive(Default)]
    struct Pair {
        wheel: Wheel<u64>,
        model: BTreeSet<(u64, u64)>,
        keys: Vec<(Key, u64, u64)>,
        now: u64,
        named: u64,
    }

    impl Pair {
        fn take(&mut self, step: &Step) {
            match *step {
                Step::Insert(ahead) => {
                    let tick = (self.now + ahead).max(self.now + 1);
                    self.named += 1;
                    let key = self.wheel.insert(self.now + ahead, self.named);
                    self.model.insert((tick, self.named));
                    self.keys.push((key, tick, self.named));
                }
                Step::Remove(at) if !self.keys.is_empty() => {
                    let (key, tick, name) = self.keys.swap_remove(at % self.keys.len());
                    let was = self.model.remove(&(tick, name));
                    assert_eq!(self.wheel.get_mut(key).copied(), was.then_some(name));
                    assert_eq!(self.wheel.remove(key), was.then_some(name));
                    assert_eq!(self.wheel.remove(key), None, "it is gone");
                }
                Step::Remove(_) => {}
                Step::Advance(ahead) => self.advance(self.now + ahead),
            }
            assert_eq!(self.wheel.len(), self.model.len());
            let earliest = self.model.first().map(|(tick, _)| *tick);
            let next = self.wheel.next();
            assert_eq!(next.is_some(), earliest.is_some());
            assert!(next <= earliest, "{next:?} is later than {earliest:?}");
            assert!(next.is_none_or(|next| next > self.now), "{next:?} is past");
            if self.model.len() <= LOOKED_AT {
                assert_eq!(next, earliest, "few entries: exact");
            }
        }

        fn advance(&mut self, now: u64) {
            self.now = now;
            let later = self.model.split_off(&(now + 1, 0));
            let due = std::mem::replace(&mut self.model, later);
            let mut fired = Vec::new();
            self.wheel.advance(now, |name| fired.push(name));
            let tick_of = |name: &u64| due.iter().find(|(_, due)| due == name).map(|(t, _)| *t);
            let ticks: Vec<_> = fired.iter().map(tick_of).collect();
            assert!(ticks.iter().all(Option::is_some), "fired early: {ticks:?}");
            assert!(ticks.is_sorted(), "fired out of order: {ticks:?}");
            assert_eq!(fired.len(), due.len(), "all that is due, once");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: if cfg!(miri) { 2 } else { 256 },
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        #[test]
        fn a_wheel_does_what_an_ordered_set_does(steps in prop::collection::vec(step(), 1..STEPS)) {
            let mut pair = Pair::default();
            steps.iter().for_each(|step| pair.take(step));
            let end = pair.model.last().map_or(0, |(tick, _)| *tick).max(pair.now);
            pair.advance(end);
            prop_assert_eq!(pair.wheel.len(), 0);
        }
    }

    #[test]
    fn ticks_beyond_the_last_wait_for_the_last() {
        let mut wheel = Wheel::default();
        wheel.insert(u64::MAX, "far");
        assert_eq!(wheel.next(), Some(TICK_MAX));
        wheel.advance(u64::MAX, |name| panic!("{name} fired"));
        assert_eq!(wheel.len(), 1);
    }

    /// What the wheel replaced: a heap whose cancelled entries stay until they surface or outnumber
    /// the others.
    #[derive(Default)]
    struct Heap {
        heap: BinaryHeap<Reverse<(u64, u32, u32)>>,
        generations: Vec<u32>,
        free: Vec<u32>,
        live: usize,
    }

    /// What the comparison asks of either.
    trait Timers {
        type Name;
        fn arm(&mut self, tick: u64) -> Self::Name;
        fn cancel(&mut self, name: Self::Name);
        fn earliest(&mut self) -> Option<u64>;
    }

    impl Timers for Wheel<u64> {
        type Name = Key;
        fn arm(&mut self, tick: u64) -> Key {
            self.insert(tick, tick)
        }
        fn cancel(&mut self, name: Key) {
            self.remove(name);
        }
        fn earliest(&mut self) -> Option<u64> {
            self.next()
        }
    }

    impl Timers for Heap {
        type Name = (u32, u32);
        fn arm(&mut self, tick: u64) -> (u32, u32) {
            self.live += 1;
            let index = self.free.pop().unwrap_or_else(|| {
                self.generations.push(0);
                (self.generations.len() - 1) as u32
            });
            let generation = self.generations[index as usize];
            self.heap.push(Reverse((tick, index, generation)));
            (index, generation)
        }
        fn cancel(&mut self, (index, _): (u32, u32)) {
            self.generations[index as usize] += 1;
            self.free.push(index);
            self.live -= 1;
            if self.heap.len() > 64 && self.heap.len() > self.live * 4 {
                let generations = &self.generations;
                let live = |&Reverse((_, index, generation)): &Reverse<(u64, u32, u32)>| {
                    generations[index as usize] == generation
                };
                self.heap.retain(live);
            }
        }
        fn earliest(&mut self) -> Option<u64> {
            while let Some(&Reverse((tick, index, generation))) = self.heap.peek() {
                if self.generations[index as usize] == generation {
                    return Some(tick);
                }
                self.heap.pop();
            }
            None
        }
    }

    /// Of this thread: what else runs on the machine does not count.
    fn cpu_time() -> Duration {
        if cfg!(miri) {
            return Duration::ZERO; // it has no such clock
        }
        let mut time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: the kernel fills a live local.
        unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
        Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
    }

    /// Nanoseconds of CPU time to arm and cancel one, with `live` others: of connections that come
    /// and go (cancelled in the order of arming), or of deadlines that are put off (in any order).
    fn churn<T: Timers>(mut timers: T, live: usize, any_order: bool) -> f64 {
        let rounds = if cfg!(miri) { 200 } else { 200_000 };
        let ahead = |n: usize| 76_000 + n as u64 / 8 + (n as u64 * 7919) % 512;
        let mut armed: VecDeque<_> = (0..live).map(|n| timers.arm(ahead(n))).collect();
        let started = cpu_time();
        for n in live..live + rounds {
            armed.push_back(timers.arm(ahead(n)));
            if any_order {
                let at = (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20) % armed.len();
                armed.swap(0, at);
            }
            armed
                .pop_front()
                .into_iter()
                .for_each(|name| timers.cancel(name));
            if n.is_multiple_of(8) {
                std::hint::black_box(timers.earliest());
            }
        }
        (cpu_time() - started).as_secs_f64() * 1e9 / rounds as f64
    }

    /// Prints the table of `docs/decisions/0005-timers-on-a-wheel.md`.
    #[test]
    fn beside_a_heap() {
        let sizes = if cfg!(miri) {
            &[10][..]
        } else {
            &[0, 1_000, 10_000, 100_000]
        };
        for &live in sizes {
            for any_order in [false, true] {
                let wheel = churn(Wheel::default(), live, any_order);
                let heap = churn(Heap::default(), live, any_order);
                let order = if any_order { "any order" } else { "in order" };
                println!("{live} live, {order}: wheel {wheel:.0} ns, heap {heap:.0} ns");
            }
        }
    }
}
