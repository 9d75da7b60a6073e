//! The tasks of one worker: their slots, and the two queues of those that are ready.
//!
//! A slot's generation grows when its task ends, so that a waker of the task before wakes nothing.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;

pub(crate) type LocalFuture = Pin<Box<dyn Future<Output = ()>>>;

/// Whether a task goes before others or behind them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Precedence {
    /// In order of readiness.
    Usual,
    /// Behind all of the usual that are ready.
    GivesWay,
}

struct Task {
    generation: u32,
    future: Option<LocalFuture>,
    queued: bool,
    live: bool,
    precedence: Precedence,
}

#[derive(Default)]
pub(crate) struct Tasks {
    slots: Vec<Task>,
    free: Vec<u32>,
    usual: VecDeque<u32>,
    giving_way: VecDeque<u32>,
    live: usize,
}

impl Tasks {
    pub(crate) fn live(&self) -> usize {
        self.live
    }

    /// Some are ready.
    pub(crate) fn has_work(&self) -> bool {
        !self.usual.is_empty() || !self.giving_way.is_empty()
    }

    /// A slot for a task.
    pub(crate) fn reserve(&mut self, precedence: Precedence) -> u32 {
        self.live += 1;
        if let Some(index) = self.free.pop() {
            let slot = &mut self.slots[index as usize];
            slot.live = true;
            slot.queued = false;
            slot.precedence = precedence;
            return index;
        }
        self.slots.push(Task {
            generation: 1,
            future: None,
            queued: false,
            live: true,
            precedence,
        });
        (self.slots.len() - 1) as u32
    }

    pub(crate) fn generation(&self, index: u32) -> Option<u32> {
        self.slots.get(index as usize).map(|slot| slot.generation)
    }

    /// Puts the future of a task, or puts it back.
    pub(crate) fn put(&mut self, index: u32, future: LocalFuture) {
        self.slots[index as usize].future = Some(future);
    }

    /// The future of a task and its generation, to be polled.
    pub(crate) fn take(&mut self, index: u32) -> Option<(LocalFuture, u32)> {
        let slot = &mut self.slots[index as usize];
        Some((slot.future.take()?, slot.generation))
    }

    /// A task has ended.
    pub(crate) fn free(&mut self, index: u32) {
        self.live -= 1;
        let slot = &mut self.slots[index as usize];
        slot.generation = slot.generation.wrapping_add(1);
        slot.live = false;
        self.free.push(index);
    }

    /// The task is ready.
    pub(crate) fn wake(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        if slot.live && !slot.queued {
            slot.queued = true;
            let precedence = slot.precedence;
            self.queue(precedence).push_back(index);
        }
    }

    /// The first that is ready of these.
    pub(crate) fn next(&mut self, precedence: Precedence) -> Option<u32> {
        let index = self.queue(precedence).pop_front()?;
        self.slots[index as usize].queued = false;
        Some(index)
    }

    fn queue(&mut self, precedence: Precedence) -> &mut VecDeque<u32> {
        match precedence {
            Precedence::Usual => &mut self.usual,
            Precedence::GivesWay => &mut self.giving_way,
        }
    }

    /// All futures, to be dropped; nothing is ready any more.
    pub(crate) fn take_all(&mut self) -> Vec<LocalFuture> {
        self.usual.clear();
        self.giving_way.clear();
        let slots = self.slots.iter_mut();
        slots.filter_map(|slot| slot.future.take()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_ready_in_its_own_order_and_once() {
        let mut tasks = Tasks::default();
        let [a, b] = [(); 2].map(|()| tasks.reserve(Precedence::GivesWay));
        let [c, d] = [(); 2].map(|()| tasks.reserve(Precedence::Usual));
        for index in [b, a, c, d, b, c] {
            tasks.wake(index);
        }
        assert!(tasks.has_work());
        let mut all =
            |precedence| std::iter::from_fn(|| tasks.next(precedence)).collect::<Vec<_>>();
        assert_eq!(all(Precedence::Usual), [c, d]);
        assert_eq!(all(Precedence::GivesWay), [b, a]);
        assert!(!tasks.has_work());
    }

    #[test]
    fn a_slot_that_is_used_again_has_the_precedence_of_its_new_task() {
        let mut tasks = Tasks::default();
        let first = tasks.reserve(Precedence::GivesWay);
        let generation = tasks.generation(first);
        tasks.free(first);
        tasks.wake(first);
        assert!(!tasks.has_work(), "it has ended");
        let second = tasks.reserve(Precedence::Usual);
        assert_eq!(first, second);
        assert_ne!(tasks.generation(second), generation);
        tasks.wake(second);
        assert_eq!(tasks.next(Precedence::GivesWay), None);
        assert_eq!(tasks.next(Precedence::Usual), Some(second));
        assert_eq!(tasks.live(), 1);
    }
}
