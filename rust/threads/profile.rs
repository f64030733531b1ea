//! Where the time of a forward pass goes: for `bench --profile`. Off, it costs
//! one load for each step.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// What one part of a forward pass took, over all passes since the profile was
/// switched on.
#[derive(Clone, Debug)]
pub struct Lap {
    /// What was computed.
    pub name: &'static str,
    /// How often.
    pub count: u64,
    /// Time on the clock, in nanoseconds.
    pub wall_ns: u64,
    /// Time that threads spent in its tasks, added up; 0 for what one thread
    /// did alone.
    pub busy_ns: u64,
}

pub(super) struct Profile {
    on: AtomicBool,
    /// Time in tasks since the last lap.
    busy_ns: AtomicU64,
    laps: Mutex<Laps>,
}

struct Laps {
    last: Instant,
    laps: Vec<Lap>,
}

impl Profile {
    pub(super) fn new() -> Self {
        Self {
            on: AtomicBool::new(false),
            busy_ns: AtomicU64::new(0),
            laps: Mutex::new(Laps { last: Instant::now(), laps: Vec::new() }),
        }
    }

    pub(super) fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// Switches on or off; what was collected until now.
    pub(super) fn switch(&self, on: bool) -> Vec<Lap> {
        let mut laps = self.laps.lock().unwrap_or_else(PoisonError::into_inner);
        self.on.store(on, Ordering::Relaxed);
        std::mem::take(&mut laps.laps)
    }

    /// Starts the clock: the beginning of a pass.
    pub(super) fn start(&self) {
        if self.is_on() {
            self.busy_ns.store(0, Ordering::Relaxed);
            self.laps.lock().unwrap_or_else(PoisonError::into_inner).last = Instant::now();
        }
    }

    /// Runs a task with its time counted.
    pub(super) fn timed(&self, task: impl FnOnce()) {
        let start = Instant::now();
        task();
        self.busy_ns.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
    }

    /// Counts the time since the last lap as `name`'s.
    pub(super) fn lap(&self, name: &'static str) {
        if !self.is_on() {
            return;
        }
        let mut laps = self.laps.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let wall_ns = now.duration_since(laps.last).as_nanos() as u64;
        let busy_ns = self.busy_ns.swap(0, Ordering::Relaxed);
        laps.last = now;
        laps.count(&Lap { name, count: 1, wall_ns, busy_ns });
    }

    /// Counts the laps of threads that each computed alone, side by side; the last lap of
    /// the pass is then now.
    pub(super) fn add(&self, parts: Vec<Vec<Lap>>) {
        if !self.is_on() {
            return;
        }
        let mut all = self.laps.lock().unwrap_or_else(PoisonError::into_inner);
        let n = parts.len() as u64;
        for (i, laps) in parts.into_iter().enumerate() {
            for lap in laps {
                let count = if i == 0 { lap.count } else { 0 };
                let (wall_ns, busy_ns) = (lap.wall_ns / n, lap.wall_ns);
                all.count(&Lap { count, wall_ns, busy_ns, ..lap });
            }
        }
        all.last = Instant::now();
        self.busy_ns.store(0, Ordering::Relaxed);
    }
}

impl Laps {
    fn count(&mut self, lap: &Lap) {
        match self.laps.iter_mut().find(|l| l.name == lap.name) {
            Some(all) => {
                all.count += lap.count;
                all.wall_ns += lap.wall_ns;
                all.busy_ns += lap.busy_ns;
            }
            None => self.laps.push(lap.clone()),
        }
    }
}
