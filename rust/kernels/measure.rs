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

use super::{INPUTS, Kernel, Kernels, PackedMatrix, Prepared, available};
use crate::cpu::Isa;
use crate::error::{Error, invalid};
use crate::levels::Levels;
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
    /// Seconds that all projections take for one of each number of inputs in
    /// [`INPUTS`].
    pub seconds: [f64; INPUTS.len()],
}

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

/// Rows, for each thread, that several inputs are multiplied by, of the projection
/// with the most weights: arithmetic and not memory decides there, and arithmetic is
/// the same for all rows, once they are so many that tables are worth building.
const BATCH_ROWS: usize = 1024;

/// What one measurement of several inputs takes at least.
const SHORTEST: Duration = Duration::from_micros(50);

/// Rounds at most; a median gains little from more.
const ROUNDS: usize = 7;

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
        let seconds =
            |c: &Candidate, i: usize| median(c.runs.iter().map(|r| r[i]).collect::<Vec<_>>());
        candidates
            .iter()
            .map(|c| {
                // What another kernel does for this one is that one's figure.
                let (few, most) = c.kernel.few_inputs().unwrap_or_default();
                let other = candidates.iter().find(|other| other.kernel.name() == few);
                let of = |inputs| other.filter(|_| inputs <= most).unwrap_or(c);
                Speed {
                    kernel: c.kernel.name(),
                    seconds: std::array::from_fn(|i| seconds(of(INPUTS[i]), i)),
                }
            })
            .collect()
    })
}

/// Fills memory with bytes that every layout can read: four codes of two bits that
/// are not 3, at random. For the tables of i2 they are weights; those of t5 meet a
/// third of the bytes that weights would have, and look a little better than they are.
fn randomize(bytes: &mut AlignedBytes, team: &Team) {
    const PAGE: usize = 4096;
    let trits = super::random_weights(4 * PAGE, Levels::TERNARY);
    let code = |byte: u8, &t: &i8| byte << 2 | (t + 1) as u8;
    let page: Vec<u8> = trits.as_chunks::<4>().0.iter().map(|q| q.iter().fold(0, code)).collect();
    team.split(bytes.as_mut_slice(), PAGE, super::CHUNKS_PER_THREAD, |_, part| {
        part.chunks_mut(PAGE).for_each(|to| to.copy_from_slice(&page[..to.len()]));
    });
}

struct Candidate {
    kernel: &'static dyn Kernel,
    probe_s: f64,
    /// Seconds a token, for each of [`INPUTS`].
    runs: Vec<[f64; INPUTS.len()]>,
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
        randomize(&mut buffer, team);
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

    /// Seconds for one token, alone and of each number of inputs.
    fn run(&mut self, kernel: &'static dyn Kernel) -> [f64; INPUTS.len()] {
        let mut seconds = [0.0; INPUTS.len()];
        for p in self.projections {
            seconds[0] += self.time(kernel, p.cols, p.rows, 1, p.rows * p.count);
        }
        let weights = |p: &Projection| p.rows.saturating_mul(p.cols).saturating_mul(p.count);
        let Some(most) = self.projections.iter().max_by_key(|p| weights(p)) else { return seconds };
        let all: f64 = self.projections.iter().map(|p| weights(p) as f64).sum();
        for (seconds, inputs) in seconds.iter_mut().zip(INPUTS).skip(1) {
            let rows = most.rows.min(BATCH_ROWS * self.team.threads());
            let share = all / weights(most) as f64;
            *seconds = share * self.time(kernel, most.cols, rows, inputs, most.rows * most.count);
        }
        seconds
    }

    /// Seconds for one of `inputs` inputs and `total` rows, found from `rows` of them,
    /// or as many as there is room for.
    fn time(
        &mut self,
        kernel: &'static dyn Kernel,
        cols: usize,
        rows: usize,
        inputs: usize,
        total: usize,
    ) -> f64 {
        let mut w = self.matrix(kernel, cols);
        let mut x = Prepared::default();
        kernel.prepare(self.isa, &self.x[..cols], &mut x);
        let xs = vec![x; inputs];
        let rows = rows.min(w.rows);
        let mut y = vec![0f32; rows * inputs];
        let seconds = if inputs == 1 {
            // From the cursor on if they fit.
            let mut first = self.cursor / w.group_bytes * w.row_group;
            if first + rows > w.rows {
                first = 0;
            }
            self.cursor = (first + rows).div_ceil(w.row_group) * w.group_bytes;
            let start = Instant::now();
            self.team.split(&mut y, w.row_group, super::CHUNKS_PER_THREAD, |start, y| {
                kernel.gemv(&w, first + start..first + start + y.len(), &xs[0], y);
            });
            start.elapsed().as_secs_f64()
        } else {
            w.rows = rows;
            // Small matrices again and again: a forward pass finds them in the cache, too,
            // and one step of some microseconds tells more of the clock than of the kernel.
            let (start, mut times) = (Instant::now(), 0);
            loop {
                super::multiply(self.team, &xs, [(&w, &mut y)]);
                times += 1;
                let elapsed = start.elapsed();
                if elapsed >= SHORTEST {
                    break elapsed.as_secs_f64() / f64::from(times);
                }
            }
        };
        std::hint::black_box(&y);
        self.buffer = w.bytes;
        seconds / inputs as f64 * (total as f64 / rows as f64)
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
            group_scales: None,
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
        let find = |name| speeds.iter().find(|s| s.kernel == name);
        for kernel in available(isa) {
            let Some((few, most)) = kernel.few_inputs() else { continue };
            assert!(names.contains(&few) && most < INPUTS[INPUTS.len() - 1]);
            if let (Some(this), Some(other)) = (find(kernel.name()), find(few)) {
                assert_eq!(this.seconds[0], other.seconds[0], "{few}");
            }
        }
        for speed in &speeds {
            assert!(names.contains(&speed.kernel));
            assert!(speed.seconds.iter().all(|s| *s > 0.0 && s.is_finite()));
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
