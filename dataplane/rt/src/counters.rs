//! What a worker counts, and how other threads read it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Counters of one worker. They only grow; all are totals since start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// `io_uring_enter(2)` or `epoll_wait(2)` calls.
    pub enters: u64,
    /// Completions entered.
    pub completions: u64,
    /// Operations submitted.
    pub submissions: u64,
    /// Times the completion queue overflowed (the kernel then keeps the entries, nothing is lost).
    pub overflows: u64,
    /// Receives that found no free block (`ENOBUFS`).
    pub starved: u64,
    /// Wake-ups from other threads.
    pub wakes: u64,
    /// Bytes that went from socket to socket through a pipe.
    pub spliced: u64,
}

/// Counters of a worker, readable from any thread; the worker stores them once per turn.
#[derive(Debug)]
pub struct SharedCounters {
    values: [AtomicU64; 7],
    tasks: AtomicU64,
    operations: AtomicU64,
    thread: rustix::thread::Pid,
}

/// CPU time of a worker's thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuTime {
    /// Outside the kernel.
    pub user: Duration,
    /// In the kernel: system calls, and the network work done on their way.
    pub kernel: Duration,
}

impl SharedCounters {
    pub(crate) fn of_this_thread() -> Self {
        Self {
            values: Default::default(),
            tasks: AtomicU64::new(0),
            operations: AtomicU64::new(0),
            thread: rustix::thread::gettid(),
        }
    }

    pub(crate) fn publish(&self, counters: &Counters, tasks: usize, operations: usize) {
        let values = [
            counters.enters,
            counters.completions,
            counters.submissions,
            counters.overflows,
            counters.starved,
            counters.wakes,
            counters.spliced,
        ];
        for (cell, value) in self.values.iter().zip(values) {
            cell.store(value, Ordering::Relaxed);
        }
        self.tasks.store(tasks as u64, Ordering::Relaxed);
        self.operations.store(operations as u64, Ordering::Relaxed);
    }

    /// Operations the kernel had not finished in the worker's last turn.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.operations.load(Ordering::Relaxed)
    }

    /// CPU time of the worker's thread, as the kernel counts it (in ticks of a hundredth of a
    /// second); read when asked for, so that the worker pays nothing. None once it has ended.
    #[must_use]
    pub fn cpu_time(&self) -> Option<CpuTime> {
        let path = format!("/proc/self/task/{}/stat", self.thread.as_raw_nonzero());
        let text = std::fs::read_to_string(path).ok()?;
        // The name may hold spaces and parentheses; user and system time are fields 14 and 15.
        let mut fields = text.rsplit_once(')')?.1.split_whitespace().skip(11);
        let mut time = || {
            let ticks: u64 = fields.next()?.parse().ok()?;
            Some(Duration::from_millis(ticks * 10)) // USER_HZ is 100 on every architecture
        };
        let user = time()?;
        let kernel = time()?;
        Some(CpuTime { user, kernel })
    }

    /// The ring's counters as of the worker's last turn.
    #[must_use]
    pub fn ring(&self) -> Counters {
        let value = |index: usize| self.values[index].load(Ordering::Relaxed);
        Counters {
            enters: value(0),
            completions: value(1),
            submissions: value(2),
            overflows: value(3),
            starved: value(4),
            wakes: value(5),
            spliced: value(6),
        }
    }

    /// Live tasks.
    #[must_use]
    pub fn tasks(&self) -> u64 {
        self.tasks.load(Ordering::Relaxed)
    }
}
