//! The threads themselves, and the barrier between the steps of a forward
//! pass. Apart from `mod.rs`, which knows how to cut work, because this is the
//! part that needs `unsafe`: tasks that borrow from the caller's stack are run
//! by threads that outlive it.
//!
//! A *step* is a number of tasks that may run side by side. The thread that
//! asks for one, the *driver*, publishes it, takes tasks itself, and comes back
//! when all are done; between steps it does alone what is too small to share.
//! A pass of a 30-layer model is some 150 steps, most of them well below a
//! millisecond, so what stands between two steps decides: workers wait for the next one
//! spinning, and a step costs two transfers of a cache line, not two system
//! calls. After [`SPINS`] rounds they sleep.
//!
//! Tasks are claimed one by one, from a counter, and a step is over when its
//! tasks are done: no worker has to show up. Where there are more runnable
//! threads than cores, a worker that gets no core claims nothing, and the
//! others do its share; only a thread interrupted in the middle of a task
//! holds up the step.

#![allow(unsafe_code)]

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Rounds of waiting before a thread sleeps: 40 microseconds on a Zen 3, 150
/// where `pause` takes 140 cycles (Intel since Skylake). Longer than what a
/// driver does alone between two steps; shorter than what matters to whoever
/// else wants the core. Waking a sleeper costs about as much.
const SPINS: u32 = 4000;

/// Tasks of one step: `next` counts up to it, and each thread may count once
/// too far, in 16 bits.
const MAX_TASKS: usize = 1 << 15;

/// A task, by its number.
type Task<'a> = dyn Fn(usize) + Sync + 'a;

/// Something on cache lines of its own (two: the prefetcher fetches pairs), so
/// that threads that wait for it are not disturbed by its neighbours.
#[repr(align(128))]
struct Line<T>(T);

struct Shared {
    /// `step << 32 | tasks << 16 | next`: one addition claims task `next` of the
    /// current step and tells which step that was.
    state: Line<AtomicU64>,
    /// Tasks of the current step that are done.
    done: Line<AtomicU32>,
    /// The current step's task function. Written by the driver while no task is
    /// claimed, read by whoever has claimed one.
    task: UnsafeCell<*const Task<'static>>,
    /// Whether a step is running.
    stepping: AtomicBool,
    stop: AtomicBool,
    workers: Gate,
    driver: Gate,
    /// What the first task that panicked, panicked with.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `task` is the only field that is not `Sync` or `Send` by itself; the
// protocol of `state` and `done` orders its writes and reads (see `step`).
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

/// Threads that run steps. They do not survive a fork.
pub(super) struct Crew {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    process: u32,
}

impl Crew {
    /// Starts `workers` threads beside the one that will drive.
    pub(super) fn start(workers: usize) -> std::io::Result<Self> {
        // With more threads than CPUs, a spinning thread keeps one from working.
        let cpus = std::thread::available_parallelism().map_or(1, |n| n.get());
        let spins = if workers < cpus { SPINS } else { 0 };
        let nothing: &Task<'static> = &|_| {};
        let shared = Arc::new(Shared {
            state: Line(AtomicU64::new(0)),
            done: Line(AtomicU32::new(0)),
            task: UnsafeCell::new(nothing),
            stepping: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            workers: Gate::new(spins),
            driver: Gate::new(spins),
            panic: Mutex::new(None),
        });
        let mut crew = Self { shared, workers: Vec::new(), process: std::process::id() };
        for i in 0..workers {
            let shared = crew.shared.clone();
            let builder = std::thread::Builder::new().name(format!("bitnet-rs-{}", i + 1));
            // On an error, dropping the crew ends those that were started.
            crew.workers.push(builder.spawn(move || shared.work())?);
        }
        Ok(crew)
    }

    /// Whether this is the process that started the threads.
    pub(super) fn is_alive(&self) -> bool {
        self.process == std::process::id()
    }

    /// Runs `task(0)` to `task(n - 1)`, side by side, and returns when all are
    /// done. Within a task, or while another thread's step runs, it runs them
    /// one after the other.
    ///
    /// # Panics
    /// With what the first task that panicked, panicked with.
    pub(super) fn step(&self, n: usize, task: &Task<'_>) {
        if n > MAX_TASKS {
            return self.step(MAX_TASKS, &|i| (i..n).step_by(MAX_TASKS).for_each(task));
        }
        let shared = &*self.shared;
        if n <= 1 || shared.stepping.swap(true, Ordering::Acquire) {
            return (0..n).for_each(task);
        }
        // SAFETY: only the lifetime changes. The pointer is used by threads that have
        // claimed a task of this step, and this function returns after all claimed
        // tasks are done (panics are caught and counted as done), so within the
        // borrow. Thereafter no task can be claimed until the next step is published.
        let erased: *const Task<'static> =
            unsafe { std::mem::transmute::<*const Task<'_>, *const Task<'static>>(task) };
        // SAFETY: `stepping` makes this the only driver, and every task of the step
        // before is done: nobody reads the pointer.
        unsafe { *shared.task.get() = erased };
        shared.done.0.store(0, Ordering::Relaxed);
        let step = (shared.state.0.load(Ordering::Relaxed) >> 32).wrapping_add(1);
        shared.state.0.store(step << 32 | (n as u64) << 16, Ordering::SeqCst);
        shared.workers.wake();
        shared.run_tasks();
        shared.driver.wait(|| shared.done.0.load(Ordering::SeqCst) == n as u32);
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        shared.stepping.store(false, Ordering::Release);
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        if !self.is_alive() {
            return; // a fork has no threads to wait for
        }
        let shared = &*self.shared;
        shared.stop.store(true, Ordering::SeqCst);
        shared.workers.wake();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its tasks, and has none of its own.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// The life of a worker.
    fn work(&self) {
        let stop = || self.stop.load(Ordering::SeqCst);
        while !stop() {
            let step = self.run_tasks();
            self.workers.wait(|| self.state.0.load(Ordering::SeqCst) >> 32 != step || stop());
        }
    }

    /// Claims and runs tasks until there are none; the number of the step that
    /// had none.
    fn run_tasks(&self) -> u64 {
        loop {
            let state = self.state.0.fetch_add(1, Ordering::AcqRel);
            let (step, n, next) = (state >> 32, state >> 16 & 0xffff, state & 0xffff);
            if next >= n {
                return step;
            }
            // SAFETY: this thread has claimed a task, so the step cannot end and the
            // pointer is neither written nor dangling before `done` counts it. The
            // addition above has acquired what the driver wrote before it published.
            let task = unsafe { &**self.task.get() };
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| task(next as usize))) {
                let mut panic = self.panic.lock().unwrap_or_else(PoisonError::into_inner);
                panic.get_or_insert(payload);
            }
            if self.done.0.fetch_add(1, Ordering::SeqCst) + 1 == n as u32 {
                self.driver.wake();
            }
        }
    }
}

/// Where threads wait: spinning first, then asleep.
struct Gate {
    spins: u32,
    sleepers: Line<AtomicU32>,
    lock: Mutex<()>,
    woken: Condvar,
}

impl Gate {
    fn new(spins: u32) -> Self {
        let sleepers = Line(AtomicU32::new(0));
        Self { spins, sleepers, lock: Mutex::new(()), woken: Condvar::new() }
    }

    /// Returns once `ready`, which another thread makes true and then calls
    /// [`wake`](Gate::wake).
    fn wait(&self, ready: impl Fn() -> bool) {
        for _ in 0..self.spins {
            if ready() {
                return;
            }
            std::hint::spin_loop();
        }
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        // All four accesses are sequentially consistent: either `wake` sees this
        // sleeper, or `ready` sees what happened before `wake`.
        self.sleepers.0.fetch_add(1, Ordering::SeqCst);
        while !ready() {
            guard = self.woken.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.0.fetch_sub(1, Ordering::SeqCst);
    }

    fn wake(&self) {
        if self.sleepers.0.load(Ordering::SeqCst) > 0 {
            // A sleeper that has not seen the change holds the lock until it sleeps.
            drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner));
            self.woken.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn every_task_runs_once() {
        for workers in [1, 2, 7] {
            let crew = Crew::start(workers).unwrap();
            for n in (0..200).chain([MAX_TASKS - 1, MAX_TASKS, MAX_TASKS + 1, 3 * MAX_TASKS + 5]) {
                let counts: Vec<AtomicUsize> = (0..n).map(|_| AtomicUsize::new(0)).collect();
                crew.step(n, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "{workers} {n}");
            }
        }
    }

    #[test]
    fn many_steps_with_pauses_long_enough_to_sleep() {
        let crew = Crew::start(3).unwrap();
        let sum = AtomicUsize::new(0);
        for round in 0..20_000 {
            crew.step(5, &|i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            if round % 1000 == 0 {
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
        }
        assert_eq!(sum.into_inner(), 20_000 * 10);
    }

    #[test]
    fn a_crew_ends_whatever_its_workers_do_at_the_time() {
        for round in 0..2000 {
            let crew = Crew::start(3).unwrap();
            if round % 2 == 0 {
                crew.step(4, &|_| {});
            }
            for _ in 0..round % 300 {
                std::hint::spin_loop();
            }
        }
    }

    #[test]
    fn steps_within_tasks_and_of_other_threads_run_too() {
        let crew = Crew::start(2).unwrap();
        let count = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        crew.step(3, &|_| {
                            crew.step(4, &|_| {
                                count.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(count.into_inner(), 4 * 500 * 12);
    }

    #[test]
    fn a_panic_reaches_the_driver_after_the_step() {
        let crew = Crew::start(2).unwrap();
        for panicking in 0..4 {
            let done = AtomicUsize::new(0);
            let result = catch_unwind(AssertUnwindSafe(|| {
                crew.step(4, &|i| {
                    assert!(i != panicking, "task {i}");
                    done.fetch_add(1, Ordering::Relaxed);
                });
            }));
            let payload = result.unwrap_err();
            assert_eq!(*payload.downcast::<String>().unwrap(), format!("task {panicking}"));
            assert_eq!(done.into_inner(), 3);
            crew.step(2, &|_| {}); // and the crew still works
        }
    }
}
