//! The executor: local tasks, wakers that are plain numbers, and the worker's loop.
//!
//! A waker is one word: worker, task slot, generation. Cloning it copies the word and dropping it
//! does nothing, so it can be stored and sent anywhere without counting references; a stale one
//! wakes nothing. Woken on its own thread it appends to the run queue; from another thread it goes
//! through that worker's inbox and eventfd.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::Future;
use std::io;
use std::os::fd::RawFd;
use std::pin::pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, RawWaker, RawWakerVTable, Waker};
use std::time::{Duration, Instant};

use crate::buf::{Pool, PoolConfig};
use crate::counters::SharedCounters;
use crate::driver::{Backend, Driver};
use crate::memory::Collector;
use crate::probe::{self, Refusal};
use crate::tasks::{LocalFuture, Precedence, Tasks};
use crate::timer::{Key, Timers};

/// Sizes of one worker's runtime.
#[derive(Debug, Clone, Copy)]
pub struct RuntimeConfig {
    /// What operations are done with.
    pub backend: Backend,
    /// Submission queue entries (the completion queue has four times as many).
    pub entries: u32,
    /// Buffer memory.
    pub pool: PoolConfig,
    /// Task polls between two looks at the ring, so that no task starves the others.
    pub polls_per_turn: usize,
    /// Completions taken per turn.
    pub completions_per_turn: usize,
    /// How long a worker that has nothing to do polls for work before it sleeps, as long as that
    /// finds some. Lone messages are answered sooner, at the price of the CPU; zero: never.
    pub busy_poll: Duration,
}

impl Default for RuntimeConfig {
    fn default() -> Self {
        Self {
            backend: Backend::Auto,
            entries: 512,
            pool: PoolConfig::default(),
            polls_per_turn: 1024,
            completions_per_turn: 2048,
            busy_poll: Duration::ZERO,
        }
    }
}

/// Why a runtime could not start.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// io_uring is refused.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The ring or its buffers could not be set up.
    #[error("cannot set up the io_uring of this worker: {0}")]
    Setup(#[from] io::Error),
    /// This thread already runs a runtime, or the process runs too many.
    #[error("cannot start a runtime: {0}")]
    Misuse(&'static str),
}

/// What sockets, timers and tasks of one worker share.
pub(crate) struct Inner {
    pub(crate) driver: RefCell<Driver>,
    pub(crate) timers: RefCell<Timers>,
    pub(crate) pool: Pool,
    tasks: RefCell<Tasks>,
    /// Ends the period after which the pool gives back what it did not need.
    trim: Cell<Option<Key>>,
    /// What the allocator has to give back.
    collector: Collector,
    /// Tasks that go on after the next look at the ring.
    next_turn: RefCell<Vec<Waker>>,
    worker: u16,
    remote: Arc<Remote>,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inner")
            .field("worker", &self.worker)
            .finish_non_exhaustive()
    }
}

/// Inbox for wake-ups from other threads.
struct Remote {
    inbox: Mutex<Vec<u64>>,
    wake_fd: RawFd,
    /// The eventfd has been written and not yet been answered.
    signalled: AtomicBool,
    closed: AtomicBool,
}

/// How long tasks that give way may run between two looks at the ring. One of them takes some tens
/// of microseconds, a look one or two.
const GIVING_WAY: Duration = Duration::from_micros(250);

/// How long memory may lie unused.
const TRIM_PERIOD: Duration = Duration::from_secs(1);

const WORKERS_MAX: usize = 1 << 12;
static REMOTES: Mutex<Vec<Option<Arc<Remote>>>> = Mutex::new(Vec::new());

thread_local! {
    static CURRENT: RefCell<Option<Rc<Inner>>> = const { RefCell::new(None) };
    static WORKER: Cell<u16> = const { Cell::new(u16::MAX) };
}

/// The runtime of this thread.
///
/// # Panics
/// Outside [`Runtime::run`].
pub(crate) fn current() -> Rc<Inner> {
    CURRENT.with(|current| {
        current
            .borrow()
            .clone()
            .expect("sockets, timers and tasks live inside Runtime::run")
    })
}

/// This thread's runtime is the current one as long as this lives, however [`Runtime::run`] ends.
struct Entered;

impl Entered {
    fn new(inner: &Rc<Inner>) -> Self {
        CURRENT.with(|current| *current.borrow_mut() = Some(Rc::clone(inner)));
        Self
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let _ = CURRENT.try_with(|current| current.borrow_mut().take());
    }
}

/// One worker's runtime. Create and run it on the worker's own thread.
pub struct Runtime {
    inner: Rc<Inner>,
    config: RuntimeConfig,
    counters: Arc<SharedCounters>,
    refusal: Option<Refusal>,
}

impl fmt::Debug for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runtime")
            .field("inner", &self.inner)
            .finish_non_exhaustive()
    }
}

impl Runtime {
    /// Sets up the ring on this thread.
    ///
    /// # Errors
    /// [`RuntimeError::Refused`] says who refuses io_uring and what to do.
    pub fn new(config: RuntimeConfig) -> Result<Self, RuntimeError> {
        if WORKER.get() != u16::MAX {
            return Err(RuntimeError::Misuse("this thread already has one"));
        }
        let pool = Pool::new(config.pool);
        let (mut driver, refusal) = choose_driver(&config, &pool)?;
        driver.set_busy_poll(config.busy_poll);
        let remote = Arc::new(Remote {
            inbox: Mutex::default(),
            wake_fd: driver.wake_fd(),
            signalled: AtomicBool::new(false),
            closed: AtomicBool::new(false),
        });
        let worker = register_remote(&remote)?;
        WORKER.set(worker);
        let inner = Rc::new(Inner {
            driver: RefCell::new(driver),
            timers: RefCell::default(),
            pool,
            tasks: RefCell::default(),
            trim: Cell::new(None),
            collector: Collector::default(),
            next_turn: RefCell::default(),
            worker,
            remote,
        });
        Ok(Self {
            inner,
            config,
            counters: Arc::new(SharedCounters::of_this_thread()),
            refusal,
        })
    }

    /// What operations are done with: never [`Backend::Auto`].
    #[must_use]
    pub fn backend(&self) -> Backend {
        self.inner.driver.borrow().backend()
    }

    /// Why [`Backend::Auto`] became [`Backend::Epoll`].
    #[must_use]
    pub fn refusal(&self) -> Option<&Refusal> {
        self.refusal.as_ref()
    }

    /// Counters that other threads may read.
    #[must_use]
    pub fn counters(&self) -> Arc<SharedCounters> {
        Arc::clone(&self.counters)
    }

    /// Runs `main` and everything it spawns until `main` ends; other tasks are then dropped.
    ///
    /// # Errors
    /// When the ring itself fails (never for errors of single operations).
    pub fn run<T>(&mut self, main: impl Future<Output = T>) -> io::Result<T> {
        let _entered = Entered::new(&self.inner);
        let mut main = pin!(main);
        let task = self.inner.reserve(Precedence::Usual);
        self.inner.tasks.borrow_mut().wake(task);
        let waker = waker(self.inner.worker, task, 1);
        let result = self.drive(|inner, index| {
            if index == task {
                match main.as_mut().poll(&mut Context::from_waker(&waker)) {
                    Poll::Ready(value) => return Some(value),
                    Poll::Pending => {}
                }
            } else {
                inner.poll_task(index);
            }
            None
        });
        self.inner.drop_tasks();
        result
    }

    fn drive<T>(&self, mut poll: impl FnMut(&Inner, u32) -> Option<T>) -> io::Result<T> {
        let inner = &*self.inner;
        loop {
            for _ in 0..self.config.polls_per_turn {
                let Some(index) = inner.next_task(Precedence::Usual) else {
                    break;
                };
                if let Some(value) = poll(inner, index) {
                    return Ok(value);
                }
            }
            inner.run_those_that_give_way();
            let next_turn = inner.next_turn.take();
            let idle = next_turn.is_empty() && !inner.tasks.borrow().has_work();
            inner.trim_memory();
            let timeout = inner.timers.borrow().next_timeout();
            {
                let mut driver = inner.driver.borrow_mut();
                driver.turn(idle, timeout, self.config.completions_per_turn)?;
                let tasks = inner.tasks.borrow().live();
                self.counters
                    .publish(driver.counters(), tasks, driver.in_flight());
            }
            inner.timers.borrow_mut().fire();
            inner.take_remote();
            // Behind everything the ring has brought.
            next_turn.into_iter().for_each(Waker::wake);
        }
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        {
            let _inbox = self
                .inner
                .remote
                .inbox
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            self.inner.remote.closed.store(true, Ordering::Release);
        }
        unregister_remote(self.inner.worker);
        {
            let mut driver = self.inner.driver.borrow_mut();
            if !driver.quiesce(Duration::from_secs(5)) {
                driver.leak();
            }
        }
        WORKER.set(u16::MAX);
    }
}

impl Inner {
    fn reserve(&self, precedence: Precedence) -> u32 {
        let mut tasks = self.tasks.borrow_mut();
        let index = tasks.reserve(precedence);
        self.collector.note(tasks.live());
        index
    }

    fn spawn(&self, future: LocalFuture, precedence: Precedence) {
        let index = self.reserve(precedence);
        let mut tasks = self.tasks.borrow_mut();
        tasks.put(index, future);
        tasks.wake(index);
    }

    fn next_task(&self, precedence: Precedence) -> Option<u32> {
        self.tasks.borrow_mut().next(precedence)
    }

    fn wake_checked(&self, index: u32, generation: u32) {
        let mut tasks = self.tasks.borrow_mut();
        let current = tasks.generation(index);
        if current.is_some_and(|current| current & GENERATION_MASK == generation) {
            tasks.wake(index);
        }
    }

    /// Runs one of them at least, so that nothing starves them, and more for [`GIVING_WAY`].
    fn run_those_that_give_way(&self) {
        let Some(mut index) = self.next_task(Precedence::GivesWay) else {
            return;
        };
        let start = Instant::now();
        loop {
            self.poll_task(index);
            if start.elapsed() >= GIVING_WAY {
                return;
            }
            match self.next_task(Precedence::GivesWay) {
                Some(next) => index = next,
                None => return,
            }
        }
    }

    fn poll_task(&self, index: u32) {
        let taken = self.tasks.borrow_mut().take(index);
        let Some((mut future, generation)) = taken else {
            return;
        };
        let waker = waker(self.worker, index, generation);
        if future
            .as_mut()
            .poll(&mut Context::from_waker(&waker))
            .is_pending()
        {
            self.tasks.borrow_mut().put(index, future);
            return;
        }
        drop(future);
        self.tasks.borrow_mut().free(index);
    }

    /// Drops every task; their operations become orphans.
    fn drop_tasks(&self) {
        loop {
            let futures = self.tasks.borrow_mut().take_all();
            if futures.is_empty() {
                break;
            }
        }
        *self.tasks.borrow_mut() = Tasks::default();
    }

    /// Every [`TRIM_PERIOD`] in which there is something to spare, gives memory back.
    fn trim_memory(&self) {
        let running = self.trim.get();
        if running.is_none() && !self.has_spare() {
            return;
        }
        let mut timers = self.timers.borrow_mut();
        if let Some(period) = running {
            if timers.is_armed(period) {
                return;
            }
            self.pool.trim();
            self.driver.borrow_mut().trim();
            self.collector.period(self.tasks.borrow().live());
        }
        let spare = self.has_spare();
        self.trim
            .set(spare.then(|| timers.time_out(Instant::now() + TRIM_PERIOD)));
    }

    fn has_spare(&self) -> bool {
        self.driver.borrow().has_spare() || self.collector.is_due(self.tasks.borrow().live())
    }

    fn take_remote(&self) {
        if !self.remote.signalled.swap(false, Ordering::AcqRel) {
            return;
        }
        let woken = {
            let mut inbox = self
                .remote
                .inbox
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *inbox)
        };
        for word in woken {
            let (_, generation, index) = unpack(word);
            self.wake_checked(index, generation);
        }
    }
}

/// The back end that is asked for; [`Backend::Auto`] falls back to epoll where io_uring is refused.
fn choose_driver(
    config: &RuntimeConfig,
    pool: &Pool,
) -> Result<(Driver, Option<Refusal>), RuntimeError> {
    let refusal = match config.backend {
        Backend::Epoll => None,
        Backend::IoUring => {
            probe::check()?;
            return Ok((ring(config, pool)?, None));
        }
        Backend::Auto => match probe::check() {
            Ok(()) => return Ok((ring(config, pool)?, None)),
            Err(refusal) => Some(refusal),
        },
    };
    Ok((Driver::with_epoll(pool)?, refusal))
}

fn ring(config: &RuntimeConfig, pool: &Pool) -> io::Result<Driver> {
    Driver::with_ring(config.entries, config.entries * 4, pool)
}

fn register_remote(remote: &Arc<Remote>) -> Result<u16, RuntimeError> {
    let mut remotes = REMOTES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(free) = remotes.iter().position(Option::is_none) {
        remotes[free] = Some(Arc::clone(remote));
        return Ok(free as u16);
    }
    if remotes.len() >= WORKERS_MAX {
        return Err(RuntimeError::Misuse(
            "more than 4096 runtimes in one process",
        ));
    }
    remotes.push(Some(Arc::clone(remote)));
    Ok((remotes.len() - 1) as u16)
}

fn unregister_remote(worker: u16) {
    let mut remotes = REMOTES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(slot) = remotes.get_mut(usize::from(worker)) {
        *slot = None;
    }
}

/// Starts a task on this worker. It is dropped when [`Runtime::run`]'s main future ends.
///
/// # Panics
/// Outside [`Runtime::run`].
pub fn spawn(future: impl Future<Output = ()> + 'static) {
    current().spawn(Box::pin(future), Precedence::Usual);
}

/// As [`spawn`], for a task that gives way: all others that are ready come first, and it and its
/// kind run for a quarter of a millisecond between two looks at the ring. For what many may want at
/// once and nobody else should wait for, as setting up a connection.
///
/// # Panics
/// Outside [`Runtime::run`].
pub fn spawn_giving_way(future: impl Future<Output = ()> + 'static) {
    current().spawn(Box::pin(future), Precedence::GivesWay);
}

/// Lets other tasks run once.
pub async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(|cx| {
        if yielded {
            return Poll::Ready(());
        }
        yielded = true;
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Goes on after the worker has looked at its ring and run what that brought: for work that takes
/// long, between its parts.
pub async fn next_turn() {
    let mut waited = false;
    std::future::poll_fn(|cx| {
        if waited {
            return Poll::Ready(());
        }
        waited = true;
        current().next_turn.borrow_mut().push(cx.waker().clone());
        Poll::Pending
    })
    .await;
}

const GENERATION_MASK: u32 = (1 << 20) - 1;

fn pack(worker: u16, generation: u32, index: u32) -> u64 {
    u64::from(worker) << 52 | u64::from(generation & GENERATION_MASK) << 32 | u64::from(index)
}

fn unpack(word: u64) -> (u16, u32, u32) {
    (
        (word >> 52) as u16,
        (word >> 32) as u32 & GENERATION_MASK,
        word as u32,
    )
}

const VTABLE: RawWakerVTable = RawWakerVTable::new(clone_word, wake_word, wake_word, drop_word);

fn clone_word(data: *const ()) -> RawWaker {
    RawWaker::new(data, &VTABLE)
}

fn drop_word(_: *const ()) {}

fn wake_word(data: *const ()) {
    let word = data.addr() as u64;
    let (worker, generation, index) = unpack(word);
    if WORKER.get() == worker {
        // During tear-down the thread-local may be gone already: then there is nothing to wake.
        let _ = CURRENT.try_with(|current| {
            if let Some(inner) = &*current.borrow() {
                inner.wake_checked(index, generation);
            }
        });
        return;
    }
    wake_remote(worker, word);
}

fn wake_remote(worker: u16, word: u64) {
    let remote = {
        let remotes = REMOTES.lock().unwrap_or_else(PoisonError::into_inner);
        remotes.get(usize::from(worker)).and_then(Clone::clone)
    };
    let Some(remote) = remote else { return };
    let mut inbox = remote.inbox.lock().unwrap_or_else(PoisonError::into_inner);
    inbox.push(word);
    let closed = remote.closed.load(Ordering::Acquire);
    if !remote.signalled.swap(true, Ordering::AcqRel) && !closed {
        let one: u64 = 1;
        // SAFETY: writes eight bytes from a live local to the worker's eventfd. The worker closes
        // it only after leaving REMOTES and `closed`; a late write to a reused number is prevented
        // by holding the inbox lock, which tear-down takes as well.
        unsafe { libc::write(remote.wake_fd, (&raw const one).cast(), 8) };
    }
}

fn waker(worker: u16, index: u32, generation: u32) -> Waker {
    let word = pack(worker, generation, index);
    let data = std::ptr::without_provenance(word as usize);
    // SAFETY: the vtable's functions treat the pointer as a number and never dereference it; they
    // are thread safe, and clone and drop have nothing to count.
    unsafe { Waker::from_raw(RawWaker::new(data, &VTABLE)) }
}
