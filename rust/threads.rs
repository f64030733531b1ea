//! The threads that run a forward pass, and the rules by which work is split.
//! The only file that names rayon.
//!
//! Nothing computed may depend on how work was split: callers split rows,
//! tokens or heads, each of which is computed whole by one thread.

use std::ops::Range;
use std::sync::OnceLock;

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::cpu::Isa;
use crate::error::{Error, invalid};
use crate::memory::AlignedBytes;

/// More threads than this is a mistake, not a machine.
const MAX_THREADS: usize = 1024;

/// A fixed number of threads, started on first use. They do not survive a
/// fork: a process that forks after that is told so.
pub struct Team {
    threads: usize,
    pool: OnceLock<Result<Pool, Error>>,
}

struct Pool {
    threads: ThreadPool,
    /// The process that started them: threads do not survive a fork.
    process: u32,
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
        Ok(Self { threads, pool: OnceLock::new() })
    }

    /// The same team with no thread started.
    #[must_use]
    pub fn stopped(self) -> Self {
        Self { threads: self.threads, pool: OnceLock::new() }
    }

    /// How many threads compute.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `f` on the team: the `split`s and `for_each`es inside it use all
    /// threads. One thread runs `f` where it is.
    ///
    /// # Errors
    /// The threads cannot be started, or were started before a fork.
    pub fn run<R: Send>(&self, f: impl FnOnce() -> R + Send) -> Result<R, Error> {
        if self.threads == 1 {
            return Ok(f());
        }
        let pool = self.pool.get_or_init(|| {
            ThreadPoolBuilder::new()
                .num_threads(self.threads)
                .thread_name(|i| format!("bitnet-rs-{i}"))
                .build()
                .map(|threads| Pool { threads, process: std::process::id() })
                .map_err(|e| Error::State(format!("cannot start {} threads: {e}", self.threads)))
        });
        let pool = pool.as_ref().map_err(Clone::clone)?;
        if pool.process != std::process::id() {
            return Err(Error::State(
                "this model was used before the process forked, and its threads did not survive; \
                 fork before the first use, load the model after the fork, or use threads=1"
                    .to_owned(),
            ));
        }
        Ok(pool.threads.install(f))
    }

    /// Cuts `0..n` into at most `threads * chunks` ranges of nearly equal
    /// length, at multiples of `granule`.
    pub fn ranges(
        &self,
        n: usize,
        granule: usize,
        chunks: usize,
    ) -> impl Iterator<Item = Range<usize>> + use<> {
        let step = self.step(n, granule, chunks);
        (0..n.div_ceil(step)).map(move |i| i * step..((i + 1) * step).min(n))
    }

    /// Cuts the columns of `y`, whose rows have `width`, as [`ranges`](Team::ranges)
    /// cuts `0..width`: each range with its part of every row. A matrix split
    /// by columns, without unsafe.
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

    fn step(&self, n: usize, granule: usize, chunks: usize) -> usize {
        let parts = if self.threads == 1 { 1 } else { self.threads * chunks };
        n.div_ceil(granule).div_ceil(parts).max(1) * granule
    }

    /// Calls `f(start, chunk)` for contiguous chunks of `data`, at multiples
    /// of `granule`. Call it inside [`run`](Team::run).
    pub fn split<T: Send>(
        &self,
        data: &mut [T],
        granule: usize,
        chunks: usize,
        f: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let step = self.step(data.len(), granule, chunks);
        if step >= data.len() {
            if !data.is_empty() {
                f(0, data);
            }
            return;
        }
        data.par_chunks_mut(step).enumerate().for_each(|(i, chunk)| f(i * step, chunk));
    }

    /// Calls `f` for each item. Call it inside [`run`](Team::run).
    pub fn for_each<T: Send>(&self, items: &mut [T], f: impl Fn(&mut T) + Send + Sync) {
        if self.threads == 1 || items.len() == 1 {
            items.iter_mut().for_each(f);
        } else {
            items.par_iter_mut().for_each(f);
        }
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
    fn refuses_no_threads_and_absurdly_many() {
        assert!(Team::new(Some(0)).is_err());
        assert!(Team::new(Some(MAX_THREADS + 1)).is_err());
    }
}
