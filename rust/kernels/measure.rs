//! How fast each kernel is on the shapes of a model, on this machine, now: what
//! `kernel="auto"` chooses by. Apart from `mod.rs` because it multiplies no
//! weights of anyone's: it runs kernels over a buffer of random bytes, which
//! every layout can read, so that nothing need be packed to find out.
//!
//! What is imitated is what decides: weights come from memory and not from a
//! cache (each pass reads a part of the buffer that was last touched long ago),
//! projections have their real widths and heights, rows are shared out over the
//! team as in a forward pass.
//!
//! Candidates are measured in rounds, one after the other, so that a drift of
//! the machine's speed meets all of them; the median of a candidate counts.
//! Those that are slow from the cache are dropped before the first round:
//! memory cannot make up for it.

use std::time::{Duration, Instant};

use super::{Kernel, Kernels, PackedMatrix, Prepared, available};
use crate::cpu::Isa;
use crate::error::{Error, invalid};
use crate::memory::AlignedBytes;
use crate::ternary::MAX_COLS;
use crate::threads::Team;

/// Matrices of one shape.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Projection {
    /// Out-features.
    pub rows: usize,
    /// In-features.
    pub cols: usize,
    /// How many of them a token is multiplied by.
    pub count: usize,
}

/// What one kernel achieved.
#[derive(Clone, Debug)]
pub struct Speed {
    /// Its name.
    pub kernel: &'static str,
    /// Seconds that all projections take for a single token.
    pub decode_s: f64,
    /// Seconds that they take for one token of a batch of [`BATCH`].
    pub prefill_s: f64,
}

/// Tokens of a batch: enough for any tile to be filled.
pub const BATCH: usize = 32;

/// Bytes that stand for the weights, if the model has that many: more than the
/// last-level cache of most machines. Taking them from the operating system
/// costs a tenth of the time there is.
const BUFFER_BYTES: usize = 64 << 20;

/// Rows of the first, rough measurement: a whole number of row groups of every
/// layout.
const PROBE_ROWS: usize = 32;

/// A candidate so many times slower than the best from the cache is dropped.
/// Layouts differ by less than that in bytes a weight.
const DROP: f64 = 3.0;

/// Rows of each projection, for each thread, that a batch is multiplied by:
/// arithmetic and not memory decides there, and arithmetic is the same for
/// every row.
const BATCH_ROWS: usize = 64;

/// Rounds at most; a median gains little from more.
const ROUNDS: usize = 5;

/// Measures the kernels of `isa` in about `budget`. Those not in the result
/// were dropped; the order is that of [`available`].
///
/// # Errors
/// No projections, one without rows or columns or with too many, a buffer that
/// cannot be had, threads that cannot be started.
pub fn measure(
    team: &Team,
    isa: Isa,
    projections: &[Projection],
    budget: Duration,
) -> Result<Vec<Speed>, Error> {
    if projections.is_empty() {
        return Err(invalid!("no projections to measure"));
    }
    if let Some(p) =
        projections.iter().find(|p| p.rows == 0 || p.count == 0 || !(1..MAX_COLS).contains(&p.cols))
    {
        return Err(invalid!(
            "a projection of {} x {}, {} of them; wanted at least one row, 1 to {} columns and a \
             count of 1 or more",
            p.rows,
            p.cols,
            p.count,
            MAX_COLS - 1
        ));
    }
    let start = Instant::now();
    team.run(|| {
        let mut bench = Bench::new(team, isa, projections);
        let mut candidates: Vec<Candidate> = Vec::new();
        for kernel in available(isa) {
            let probe_s = bench.probe(kernel);
            candidates.push(Candidate { kernel, probe_s, runs: Vec::new() });
        }
        let best = candidates.iter().map(|c| c.probe_s).fold(f64::INFINITY, f64::min);
        candidates.retain(|c| c.probe_s <= best * DROP);
        for round in 0..ROUNDS {
            // The next round takes about as long as the last one did.
            let before = start.elapsed();
            for candidate in &mut candidates {
                candidate.runs.push(bench.run(candidate.kernel));
            }
            let after = start.elapsed();
            if round + 1 < ROUNDS && after + (after - before) > budget {
                break;
            }
        }
        candidates
            .into_iter()
            .map(|c| Speed {
                kernel: c.kernel.name(),
                decode_s: median(c.runs.iter().map(|r| r.0).collect()),
                prefill_s: median(c.runs.iter().map(|r| r.1).collect()),
            })
            .collect()
    })
}

struct Candidate {
    kernel: &'static dyn Kernel,
    probe_s: f64,
    /// Seconds a token, alone and in a batch.
    runs: Vec<(f64, f64)>,
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

struct Bench<'a> {
    team: &'a Team,
    isa: Isa,
    projections: &'a [Projection],
    buffer: AlignedBytes,
    /// Where the next pass reads.
    cursor: usize,
    /// Activations for the widest projection.
    x: Vec<f32>,
}

impl<'a> Bench<'a> {
    fn new(team: &'a Team, isa: Isa, projections: &'a [Projection]) -> Self {
        let weights: usize =
            projections.iter().map(|p| p.rows.saturating_mul(p.cols).saturating_mul(p.count)).sum();
        let widest = projections.iter().map(|p| p.cols).max().unwrap_or(1);
        // At least what the probe reads: at most a byte a weight, and the padding of
        // very narrow matrices.
        let n_bytes = (weights / 4).min(BUFFER_BYTES).max(PROBE_ROWS * (widest + 1024));
        let mut buffer = AlignedBytes::zeroed(n_bytes);
        super::randomize(&mut buffer, team);
        let x = (0..widest).map(|i| (i * 37 % 255) as f32 - 127.0).collect();
        Self { team, isa, projections, buffer, cursor: 0, x }
    }

    /// Seconds for some rows of the widest projection, from the cache, on this
    /// thread.
    fn probe(&mut self, kernel: &'static dyn Kernel) -> f64 {
        let cols = self.x.len();
        let w = self.matrix(kernel, cols);
        let mut x = Prepared::default();
        kernel.prepare(self.isa, &self.x, &mut x);
        let mut y = [0f32; PROBE_ROWS];
        let mut best = f64::INFINITY;
        for _ in 0..3 {
            let start = Instant::now();
            kernel.gemv(&w, 0..PROBE_ROWS, &x, &mut y);
            best = best.min(start.elapsed().as_secs_f64());
        }
        std::hint::black_box(y);
        self.buffer = w.bytes;
        best
    }

    /// Seconds for one token alone, and for one token of a batch.
    fn run(&mut self, kernel: &'static dyn Kernel) -> (f64, f64) {
        let (mut decode_s, mut prefill_s) = (0.0, 0.0);
        for p in self.projections {
            let w = self.matrix(kernel, p.cols);
            let mut x = Prepared::default();
            kernel.prepare(self.isa, &self.x[..p.cols], &mut x);
            let xs = vec![x; BATCH];
            for (inputs, most, total) in [
                (1, p.rows, &mut decode_s),
                (BATCH, BATCH_ROWS * self.team.threads(), &mut prefill_s),
            ] {
                // As many rows as the buffer holds; from the cursor on if they fit.
                let rows = p.rows.min(most).min(w.rows);
                let mut first = self.cursor / w.group_bytes * w.row_group;
                if first + rows > w.rows {
                    first = 0;
                }
                let mut y = vec![0f32; rows * inputs];
                let start = Instant::now();
                let mut tasks =
                    self.team.columns(&mut y, rows, w.row_group, super::CHUNKS_PER_THREAD);
                self.team.for_each(&mut tasks, |(range, ys)| {
                    let rows = first + range.start..first + range.end;
                    match (&xs[..inputs], &mut ys[..]) {
                        ([x], [y]) => kernel.gemv(&w, rows, x, y),
                        (xs, ys) => kernel.gemm(&w, rows, xs, ys),
                    }
                });
                let seconds = start.elapsed().as_secs_f64() / inputs as f64;
                std::hint::black_box(&y);
                *total += seconds * p.count as f64 * (p.rows as f64 / rows as f64);
                self.cursor = (first + rows).div_ceil(w.row_group) * w.group_bytes;
            }
            self.buffer = w.bytes;
        }
        (decode_s, prefill_s)
    }

    /// The buffer as a matrix of as many rows as there is room for; to be given
    /// back.
    fn matrix(&mut self, kernel: &'static dyn Kernel, cols: usize) -> PackedMatrix {
        let layout = kernel.layout();
        let (row_group, group_bytes) = (layout.row_group(), layout.group_bytes(cols));
        PackedMatrix {
            kernels: Kernels::of(kernel),
            rows: self.buffer.len() / group_bytes * row_group,
            cols,
            scale: 1.0,
            row_group,
            group_bytes,
            bytes: std::mem::take(&mut self.buffer),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measures_the_kernels_that_are_not_hopeless() {
        let team = Team::new(Some(2)).unwrap();
        let isa = Isa::best().unwrap();
        let projections = [
            Projection { rows: 100, cols: 256, count: 3 },
            Projection { rows: 33, cols: 700, count: 1 },
        ];
        let speeds = measure(&team, isa, &projections, Duration::from_millis(20)).unwrap();
        assert!(!speeds.is_empty());
        let names: Vec<_> = available(isa).iter().map(|k| k.name()).collect();
        for speed in &speeds {
            assert!(names.contains(&speed.kernel));
            assert!(speed.decode_s > 0.0 && speed.decode_s.is_finite());
            assert!(speed.prefill_s > 0.0 && speed.prefill_s.is_finite());
        }
    }

    #[test]
    fn refuses_shapes_that_are_none() {
        let (team, isa) = (Team::new(Some(1)).unwrap(), Isa::GENERIC);
        let measure = |p: &[Projection]| measure(&team, isa, p, Duration::ZERO);
        assert!(measure(&[]).is_err());
        for (rows, cols, count) in [(0, 1, 1), (1, 0, 1), (1, 1, 0), (1, MAX_COLS, 1)] {
            assert!(measure(&[Projection { rows, cols, count }]).is_err());
        }
        assert!(measure(&[Projection { rows: 1, cols: 1, count: 1 }]).is_ok());
    }
}
