//! The threads that run a forward pass, and the rules by which work is split.
//!
//! Nothing computed may depend on how work was split: callers split rows,
//! tokens, heads or blocks of keys, each of which is computed whole by one
//! thread.

// Slices that tasks own side by side are cut from one by raw pointers; the
// cuts are made here, and so is the argument that they do not overlap.
#![allow(unsafe_code)]

mod crew;
mod profile;

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::cpu::Isa;
use crate::error::{Error, invalid};
use crate::memory::AlignedBytes;
use crew::Crew;
pub use profile::Lap;
use profile::Profile;

/// More threads than this is a mistake, not a machine.
const MAX_THREADS: usize = 1024;

/// A fixed number of threads: the one that calls, and workers that are started
/// on first use. They do not survive a fork: a process that forks after that is
/// told so.
pub struct Team {
    threads: usize,
    crew: OnceLock<Result<Crew, Error>>,
    /// Held during a pass: passes of several callers take turns, since two at
    /// once would be twice as many threads as were asked for.
    turn: Mutex<()>,
    profile: Profile,
}

impl Team {
    /// A team of `threads`, or of one for each CPU this process may use.
    ///
    /// # Errors
    /// Zero threads, or absurdly many.
    pub fn new(threads: Option<usize>) -> Result<Self, Error> {
        let threads =
            threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()));
        if !(1..=MAX_THREADS).contains(&threads) {
            return Err(invalid!("threads is {threads}; wanted 1 to {MAX_THREADS}"));
        }
        Ok(Self::of(threads))
    }

    fn of(threads: usize) -> Self {
        Self { threads, crew: OnceLock::new(), turn: Mutex::new(()), profile: Profile::new() }
    }

    /// The same team with no thread started.
    #[must_use]
    pub fn stopped(self) -> Self {
        Self::of(self.threads)
    }

    /// A team of one, to compute within a task what is measured with this team's.
    #[must_use]
    pub fn alone(&self) -> Self {
        let team = Self::of(1);
        team.profile.switch(self.profile.is_on());
        team
    }

    /// How many threads compute.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `f` here, with the team at hand: `split`s and the like inside it use
    /// all threads. A call while another thread's runs waits for it, so `f` must
    /// not call `run`. A team of one waits for nobody.
    ///
    /// # Errors
    /// The threads cannot be started, or were started before a fork.
    pub fn run<R>(&self, f: impl FnOnce() -> R) -> Result<R, Error> {
        if self.threads == 1 {
            self.profile.start();
            return Ok(f());
        }
        let crew = self.crew.get_or_init(|| {
            Crew::start(self.threads - 1)
                .map_err(|e| Error::State(format!("cannot start {} threads: {e}", self.threads)))
        });
        if !crew.as_ref().map_err(Clone::clone)?.is_alive() {
            return Err(Error::State(
                "this model was used before the process forked, and its threads did not survive; \
                 fork before the first use, load the model after the fork, or use threads=1"
                    .to_owned(),
            ));
        }
        // Nothing is guarded that a panic could leave half-made.
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.profile.start();
        Ok(f())
    }

    /// Runs `task(0)` to `task(n - 1)` on the team. Outside of
    /// [`run`](Team::run), and inside another task, one after the other.
    ///
    /// Numbers are handed out so that a thread mostly gets consecutive ones: what
    /// it asks memory for at the end of one task is the beginning of its next.
    /// Handed out in order, matrices came 3 to 10 % slower.
    fn step(&self, n: usize, task: impl Fn(usize) + Sync) {
        let task = |i| task(self.spread(i, n));
        // A single task is what one thread does alone, and so is everything if there is one.
        if n > 1 && self.threads > 1 && self.profile.is_on() {
            let timed = |i| self.profile.timed(|| task(i));
            self.step_on_crew(n, &timed);
        } else {
            self.step_on_crew(n, &task);
        }
    }

    fn step_on_crew(&self, n: usize, task: &(dyn Fn(usize) + Sync)) {
        match self.crew.get() {
            Some(Ok(crew)) if self.threads > 1 => crew.step(n, task),
            _ => (0..n).for_each(task),
        }
    }

    /// The `i`-th of `n` tasks to be handed out: the first of each thread's
    /// share, then the second of each, and so on. A permutation of `0..n`.
    fn spread(&self, i: usize, n: usize) -> usize {
        let (share, rest) = (n / self.threads, n % self.threads);
        let (row, thread) = (i / self.threads, i % self.threads);
        thread * share + thread.min(rest) + row
    }

    /// Switches measuring on or off; what was measured until now.
    pub fn profile(&self, on: bool) -> Vec<Lap> {
        self.profile.switch(on)
    }

    /// Counts what was measured with `parts` that computed side by side, each
    /// [alone](Team::alone): their average as time on the clock, their sum as time in tasks.
    pub fn add_profiles<'a>(&self, parts: impl Iterator<Item = &'a Team>) {
        self.profile.add(parts.map(|part| part.profile.switch(false)).collect());
    }

    /// Counts the time since the last lap of this pass as `name`'s, if it is
    /// measured.
    pub fn lap(&self, name: &'static str) {
        self.profile.lap(name);
    }

    /// Cuts `0..n` into at most `threads * chunks` ranges of nearly equal
    /// length, at multiples of `granule`.
    pub fn ranges(
        &self,
        n: usize,
        granule: usize,
        chunks: usize,
    ) -> impl Iterator<Item = Range<usize>> + use<> {
        let step = self.step_length(n, granule, chunks);
        (0..n.div_ceil(step)).map(move |i| i * step..((i + 1) * step).min(n))
    }

    /// Cuts the columns of `y`, whose rows have `width`, as [`ranges`](Team::ranges)
    /// cuts `0..width`: each range with its part of every row. A matrix split
    /// by columns.
    pub fn columns<'y>(
        &self,
        y: &'y mut [f32],
        width: usize,
        granule: usize,
        chunks: usize,
    ) -> Vec<(Range<usize>, Vec<&'y mut [f32]>)> {
        let n = y.len() / width;
        let mut parts: Vec<_> = self
            .ranges(width, granule, chunks)
            .map(|range| (range, Vec::with_capacity(n)))
            .collect();
        for mut row in y.chunks_exact_mut(width) {
            for (range, slices) in &mut parts {
                let (slice, rest) = row.split_at_mut(range.len());
                slices.push(slice);
                row = rest;
            }
        }
        parts
    }

    fn step_length(&self, n: usize, granule: usize, chunks: usize) -> usize {
        let parts = if self.threads == 1 { 1 } else { self.threads * chunks };
        n.div_ceil(granule).div_ceil(parts).max(1) * granule
    }

    /// Calls `f(start, chunk)` for contiguous chunks of `data`, at multiples
    /// of `granule`.
    pub fn split<T: Send>(
        &self,
        data: &mut [T],
        granule: usize,
        chunks: usize,
        f: impl Fn(usize, &mut [T]) + Sync,
    ) {
        self.split_all([data], granule, chunks, |_, start, chunk| f(start, chunk));
    }

    /// Cuts several slices in one step: calls `f(which, start, chunk)` for
    /// contiguous chunks of each, at multiples of `granule`, of about the same
    /// length in all.
    pub fn split_all<T: Send, const N: usize>(
        &self,
        data: [&mut [T]; N],
        granule: usize,
        chunks: usize,
        f: impl Fn(usize, usize, &mut [T]) + Sync,
    ) {
        let total = data.iter().map(|d| d.len()).sum();
        let length = self.step_length(total, granule, chunks);
        let data = data.map(Cuttable::new);
        let tasks = data.iter().map(|d| d.len.div_ceil(length)).sum();
        self.step(tasks, |mut i| {
            for (which, slice) in data.iter().enumerate() {
                let parts = slice.len.div_ceil(length);
                if i < parts {
                    let range = i * length..((i + 1) * length).min(slice.len);
                    // SAFETY: tasks have different numbers, and different numbers
                    // different slices or ranges; each runs once, during the borrows.
                    return f(which, range.start, unsafe { slice.part(range) });
                }
                i -= parts;
            }
        });
    }

    /// Cuts two slices of items side by side: item `i` is `widths.0` elements of
    /// `a` and `widths.1` of `b`. Calls `f(first_item, a_chunk, b_chunk)`.
    ///
    /// # Panics
    /// The slices do not hold the same number of items.
    pub fn zip<A: Send, B: Send>(
        &self,
        (a, b): (&mut [A], &mut [B]),
        widths: (usize, usize),
        granule: usize,
        chunks: usize,
        f: impl Fn(usize, &mut [A], &mut [B]) + Sync,
    ) {
        let n = a.len() / widths.0;
        assert!(a.len() == n * widths.0 && b.len() == n * widths.1, "different numbers of items");
        let length = self.step_length(n, granule, chunks);
        let (a, b) = (Cuttable::new(a), Cuttable::new(b));
        self.step(n.div_ceil(length), |i| {
            let items = i * length..((i + 1) * length).min(n);
            let of = |width| items.start * width..items.end * width;
            // SAFETY: tasks have different numbers, and so different ranges of both;
            // each runs once, during the borrows.
            let (a, b) = unsafe { (a.part(of(widths.0)), b.part(of(widths.1))) };
            f(items.start, a, b);
        });
    }

    /// Calls `f` for ranges that make up `0..n`, cut as [`ranges`](Team::ranges)
    /// cuts it: for work that writes nothing that could be cut.
    pub fn each_range(
        &self,
        n: usize,
        granule: usize,
        chunks: usize,
        f: impl Fn(Range<usize>) + Sync,
    ) {
        let length = self.step_length(n, granule, chunks);
        self.step(n.div_ceil(length), |i| f(i * length..((i + 1) * length).min(n)));
    }

    /// Calls `f` for each item.
    pub fn for_each<T: Send>(&self, items: &mut [T], f: impl Fn(&mut T) + Send + Sync) {
        let items = Cuttable::new(items);
        self.step(items.len, |i| {
            // SAFETY: one task for each item, which runs once, during the borrow.
            unsafe { items.part(i..i + 1) }.iter_mut().for_each(&f);
        });
    }
}

/// A slice of which tasks take different parts.
struct Cuttable<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: it stands for a `&mut [T]`, parts of which go to other threads.
unsafe impl<T: Send> Sync for Cuttable<'_, T> {}

impl<'a, T> Cuttable<'a, T> {
    fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), borrow: PhantomData }
    }

    /// # Safety
    /// No two parts that overlap may be in use at a time.
    #[expect(clippy::mut_from_ref, reason = "the caller promises that parts do not overlap")]
    unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: the range lies in the slice, which `self` borrows; that nothing
        // else uses it is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

/// Speed at which the team reads `n_bytes` of memory, in GB/s (1e9 bytes): the
/// limit that decoding is held against. The median of seven passes over a
/// buffer that should be far larger than the caches.
///
/// # Errors
/// Threads that cannot be started, a buffer of less than 1 MiB, no memory for it.
pub fn read_bandwidth(team: &Team, isa: Isa, n_bytes: usize) -> Result<f64, Error> {
    if !(1 << 20..=1 << 36).contains(&n_bytes) {
        return Err(invalid!("n_bytes is {n_bytes}; wanted 1 MiB to 64 GiB"));
    }
    let mut memory = AlignedBytes::try_zeroed(n_bytes).ok_or_else(|| {
        Error::State(format!("no memory for a buffer of {n_bytes} bytes; pass a smaller n_bytes"))
    })?;
    team.run(|| {
        team.split(memory.as_mut_slice(), 4096, 1, |_, part| part.fill(1));
        let mut speeds = [0f64; 7];
        for speed in &mut speeds {
            let start = std::time::Instant::now();
            // Shared out in advance, as a forward pass does, and summed so
            // that the reading cannot be optimized away.
            team.split(memory.as_mut_slice(), 4096, 1, |_, part| {
                let sum = isa.vectorize(
                    #[inline(always)]
                    || {
                        let (words, _) = part.as_chunks::<8>();
                        words.iter().fold(0u64, |sum, w| sum.wrapping_add(u64::from_le_bytes(*w)))
                    },
                );
                std::hint::black_box(sum);
            });
            *speed = n_bytes as f64 / start.elapsed().as_secs_f64() / 1e9;
        }
        speeds.sort_by(f64::total_cmp);
        speeds[speeds.len() / 2]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_cover_everything_once() {
        for threads in [1, 2, 3, 7] {
            let team = Team::new(Some(threads)).unwrap();
            for n in [1, 2, 15, 16, 17, 640, 641] {
                for granule in [1, 4, 16] {
                    let ranges: Vec<_> = team.ranges(n, granule, 4).collect();
                    assert!(ranges.len() <= threads * 4);
                    assert_eq!(ranges.first().unwrap().start, 0);
                    assert_eq!(ranges.last().unwrap().end, n);
                    for pair in ranges.windows(2) {
                        assert_eq!(pair[0].end, pair[1].start);
                        assert_eq!(pair[1].start % granule, 0);
                    }
                }
            }
        }
    }

    #[test]
    fn tasks_are_spread_over_the_shares() {
        for threads in [1, 2, 3, 7] {
            let team = Team::new(Some(threads)).unwrap();
            for n in 0..40 {
                let mut order: Vec<_> = (0..n).map(|i| team.spread(i, n)).collect();
                if threads == 2 && n == 5 {
                    assert_eq!(order, [0, 3, 1, 4, 2]);
                }
                order.sort_unstable();
                assert!(order.into_iter().eq(0..n));
            }
        }
    }

    #[test]
    fn every_element_is_in_one_chunk() {
        for threads in [1, 2, 3, 7] {
            let team = Team::new(Some(threads)).unwrap();
            for (n, granule) in [(0, 1), (1, 4), (15, 4), (640, 32), (641, 16)] {
                let (mut a, mut b, mut c) = (vec![0u32; n], vec![0u32; 2 * n], vec![0u32; 3]);
                team.run(|| {
                    team.split_all([&mut a, &mut b, &mut c], granule, 4, |which, start, chunk| {
                        assert_eq!(start % granule, 0);
                        for (i, x) in chunk.iter_mut().enumerate() {
                            *x += (1000 * which + start + i) as u32;
                        }
                    });
                })
                .unwrap();
                for (which, data) in [a, b, c].iter().enumerate() {
                    assert!(data.iter().enumerate().all(|(i, &x)| x as usize == 1000 * which + i));
                }
                let (mut a, mut b) = (vec![0u32; n], vec![0u8; 3 * n]);
                team.run(|| {
                    team.zip((&mut a, &mut b), (1, 3), granule, 4, |first, a, b| {
                        assert_eq!(3 * a.len(), b.len());
                        a.iter_mut().enumerate().for_each(|(i, a)| *a += (first + i) as u32);
                        b.iter_mut().for_each(|b| *b += 1);
                    });
                    team.for_each(&mut b, |b| *b += 1);
                })
                .unwrap();
                assert!(a.iter().enumerate().all(|(i, &x)| x as usize == i));
                assert!(b.iter().all(|&x| x == 2));
            }
        }
    }

    #[test]
    fn laps_are_measured_when_asked_for() {
        let team = Team::new(Some(2)).unwrap();
        let pass = || {
            team.run(|| {
                team.lap("alone");
                team.split(&mut [0; 64], 1, 4, |_, part| part.fill(1));
                team.lap("together");
            })
            .unwrap();
        };
        pass();
        assert!(team.profile(true).is_empty());
        pass();
        pass();
        let laps = team.profile(false);
        assert_eq!(
            laps.iter().map(|l| (l.name, l.count)).collect::<Vec<_>>(),
            [("alone", 2), ("together", 2)]
        );
        assert!(laps[0].busy_ns == 0 && laps[1].busy_ns > 0 && laps[1].wall_ns > 0);
        pass();
        assert!(team.profile(false).is_empty());
    }

    #[test]
    fn refuses_no_threads_and_absurdly_many() {
        assert!(Team::new(Some(0)).is_err());
        assert!(Team::new(Some(MAX_THREADS + 1)).is_err());
    }
}
