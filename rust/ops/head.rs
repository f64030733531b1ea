//! The best few logits of the `lm_head`, exactly, for half the reading.
//!
//! Beside the exact rows stand int8 rows, `w = scale * q + e`, with bounds for
//! the norms of `q` and `e`. For an input `x = step * p + f`, `p` in int16, a
//! *scan* computes `scale * step * (q . p)`, an integer sum, for every row. By
//! Cauchy and Schwarz, the exact product is no further from it than
//!
//! ```text
//! |w . x - scale step (q . p)| = |e . x + scale q . f| <= |e| |x| + scale |q| |f|
//! ```
//!
//! and the logit, a float sum of `n = ceil(cols / 16) + 4` roundings, no
//! further from the exact product than `n 2^-24 |w| |x|`, a little more
//! (`SLACK`). So the k-th best of the lower bounds is one that the k best
//! logits reach, and only rows whose upper bound reaches it can be among them:
//! their logits are computed, by the same code as all logits are
//! (`DenseMatrix`), so to the same bits. That the result is that of the full
//! head is proven, not probable.
//!
//! `x` has 16 bits and not 8 because activations have outliers: with int8 the
//! bound of a 2560-wide head with normally distributed rows lets a tenth of the
//! vocabulary pass, with int16 some tens of rows.
//!
//! Where the bound says nothing (too many candidates, numbers beyond float32),
//! the full head is computed instead.

use super::dense::{DenseMatrix, with_elements};
use super::lanes::{DOT, LaneOp, Lanes, dispatch};
use crate::cpu::Isa;
use crate::floats::{Element, LANES};
use crate::memory::AlignedBytes;
use crate::threads::Team;

/// Rows that are scanned as one: what is kept of each block are its best lower
/// bounds.
const BLOCK: usize = 512;

/// Most logits that are asked for at once. Beyond, the best lower bounds of the
/// blocks are too many to be worth it.
pub const MAX_TOP: usize = 256;

/// Candidates, as a share of the rows, from which on the full head is cheaper:
/// a row here and there costs about twice its bytes.
const MAX_CANDIDATES: usize = 8;

/// Blocks handed out per thread, at least.
const CHUNKS: usize = 8;

/// Inputs that meet a row in registers, at most. On one thread of a Zen 3, eight are 1.75
/// times as fast as one after the other over rows in L2, four 1.7 times, two 1.4 times. The
/// loop for eight, in assembly and from L1, comes to 80 GMAC/s of 100 that `vpmaddwd` alone
/// does; bounds and lanes to be added up take a tenth.
const RUN: usize = 8;

/// Rows that share the inputs' columns of a chunk, which stay in L1.
const TILE: usize = 16;

/// Lines of a chunk times inputs of a run: 20 KB of int16.
const CHUNK: usize = 160;

/// Bytes ahead of their use that rows are asked for where they come in one stream. One
/// thread of a Zen 3 read 13 to 15 GB/s with the distance of 12 KiB that suits the ternary
/// kernels, 17 asking for nothing, 19 to 20 with this.
const AHEAD: usize = 1024;

/// A row whose elements are all below this has no int8 form: the inverse of its
/// scale might not be finite.
const TINY: f32 = 1e-30;

/// What sums of squares, square roots and conversions in float32 may lose,
/// generously: norms are multiplied by it. The sums have up to 2^17 / 16 terms
/// a lane, so lose at most 2^-11 of themselves.
const SLACK: f32 = 1.001;

/// int8 rows beside a [`DenseMatrix`].
pub struct ScanRows {
    cols: usize,
    /// Bytes from one row to the next: a multiple of [`DOT`], filled with zeros.
    stride: usize,
    /// In each [`DOT`] bytes, byte `2 j` is element `j` plus 128, byte `2 j + 1`
    /// element `32 + j`: the form of [`Lanes::add_dot`].
    q: AlignedBytes,
    bounds: Vec<Bounds>,
    /// The largest `|q|`, which limits `|p|`: `|q . p|` has to fit an int32.
    max_q: f32,
    /// At least the largest `|w|`.
    max_norm: f32,
}

/// Of one row.
#[derive(Clone, Copy, Default)]
struct Bounds {
    scale: f32,
    /// At least `scale |q|`.
    norm: f32,
    /// At least `|e|`.
    error: f32,
}

impl ScanRows {
    /// Makes them, in parallel over rows. Call it inside [`Team::run`].
    #[must_use]
    pub fn new(exact: &DenseMatrix, isa: Isa, team: &Team) -> Self {
        let (rows, cols) = (exact.rows(), exact.cols());
        let stride = cols.next_multiple_of(DOT);
        let mut q = AlignedBytes::zeroed(rows * stride);
        // Bounds, and `|q|`.
        let mut facts = vec![(Bounds::default(), 0f32); rows];
        with_elements!(exact.data(), data => {
            team.zip((q.as_mut_slice(), &mut facts), (stride, 1), 1, CHUNKS, |first, q, facts| {
                for (i, (q, facts)) in q.chunks_exact_mut(stride).zip(facts).enumerate() {
                    *facts = quantize_row(isa, &data[(first + i) * cols..][..cols], q);
                }
            });
        });
        let max_q = facts.iter().fold(0f32, |max, (_, norm)| max.max(*norm));
        let bounds: Vec<_> = facts.into_iter().map(|(bounds, _)| bounds).collect();
        let max_norm = bounds.iter().fold(0f32, |max, b| max.max((b.norm + b.error) * SLACK));
        Self { cols, stride, q, bounds, max_q, max_norm }
    }

    /// Bytes in memory.
    #[must_use]
    pub fn n_bytes(&self) -> usize {
        self.q.len() + size_of_val(&self.bounds[..])
    }
}

/// Added to an integer that is a float, it leaves the integer in the low bits.
const ROUND: f32 = 12_582_912.0;

/// Elements as multiples of `1 / inverse`, rounded; the sum of squares of the
/// results, and of what rounding left.
#[inline(always)]
fn quantize<E: Element>(from: &[E], inverse: f32, mut put: impl FnMut(usize, f32)) -> (f32, f32) {
    let (mut norms, mut errors) = ([0f32; LANES], [0f32; LANES]);
    for (c, from) in from.chunks(LANES).enumerate() {
        for (i, x) in from.iter().enumerate() {
            let scaled = x.to_f32() * inverse;
            let rounded = scaled.round_ties_even();
            let left = scaled - rounded;
            put(c * LANES + i, rounded);
            norms[i] = rounded.mul_add(rounded, norms[i]);
            errors[i] = left.mul_add(left, errors[i]);
        }
    }
    (norms.iter().sum(), errors.iter().sum())
}

#[inline(always)]
fn max_abs<E: Element>(from: &[E]) -> f32 {
    let mut lanes = [0f32; LANES];
    for from in from.chunks(LANES) {
        for (m, x) in lanes.iter_mut().zip(from) {
            let x = x.to_f32().abs();
            *m = if x > *m { x } else { *m };
        }
    }
    lanes.iter().fold(0f32, |a, &m| if m > a { m } else { a })
}

/// What byte `2 j` has more than its element.
const OFFSET: i32 = 128;

fn quantize_row<E: Element>(isa: Isa, row: &[E], q: &mut [u8]) -> (Bounds, f32) {
    q.iter_mut().step_by(2).for_each(|q| *q = OFFSET as u8);
    isa.vectorize(
        #[inline(always)]
        || {
            let root = (row.len() as f32).sqrt();
            let max = max_abs(row);
            if max < TINY {
                return (Bounds { error: TINY * root * SLACK, ..Bounds::default() }, 0.0);
            }
            let scale = max / 127.0;
            let (norm, error) = quantize(row, 1.0 / scale, |i, r| {
                let (chunk, j) = (i / DOT * DOT, i % DOT);
                let bits = (r + ROUND).to_bits() as u8;
                if j < DOT / 2 {
                    q[chunk + 2 * j] = bits.wrapping_add(OFFSET as u8);
                } else {
                    q[chunk + 2 * (j - DOT / 2) + 1] = bits;
                }
            });
            // In units of `scale`: `scaled` is off by up to 3 roundings of 127.
            let off = 127.0 * 3.0 / (1u32 << 24) as f32;
            let norm = norm.sqrt() * SLACK;
            let error = (error.sqrt() * SLACK + off * root) * SLACK;
            (Bounds { scale, norm: scale * norm * SLACK, error: scale * error * SLACK }, norm)
        },
    )
}

/// An input in int16, and what its rows' bounds need of it.
#[derive(Default)]
struct ScanInput {
    /// Padded with zeros to the stride of the rows.
    p: Vec<i16>,
    /// What [`OFFSET`] adds to its sums: `OFFSET` times the sum of those `p` that
    /// meet bytes with it.
    offset: i32,
    step: f32,
    /// At least `|x|`.
    norm: f32,
    /// At least `|f|`.
    error: f32,
}

impl ScanInput {
    /// Whether bounds can be had at all.
    fn prepare(&mut self, isa: Isa, x: &[f32], rows: &ScanRows) -> bool {
        self.p.resize(rows.stride, 0);
        let p = &mut self.p[..];
        let root = (x.len() as f32).sqrt();
        let (norm, max) = isa.vectorize(
            #[inline(always)]
            || {
                let max = max_abs(x);
                // The squares of what is scaled by the maximum neither overflow nor
                // vanish together.
                let mut sums = [0f32; LANES];
                let inverse = 1.0 / max;
                for x in x.chunks(LANES) {
                    for (sum, x) in sums.iter_mut().zip(x) {
                        let x = x * inverse;
                        *sum = x.mul_add(x, *sum);
                    }
                }
                (sums.iter().sum::<f32>().sqrt() * max * SLACK, max)
            },
        );
        // Not a number where `x` holds one, since every comparison with it fails.
        // No partial sum of the float product may overflow, either.
        let usable = max > TINY && norm > 0.0 && norm < 1e30 && norm * rows.max_norm < 1e37;
        if !usable {
            return false;
        }
        // Steps so small that int16 is used, and so large that no sum leaves int32:
        // |q . p| <= |q| |p| < 2^30.
        let limit = (1u32 << 30) as f32;
        let step = f32::max(max / 32_000.0, norm * rows.max_q * SLACK / limit);
        let (_, error) = isa.vectorize(
            #[inline(always)]
            || quantize(x, 1.0 / step, |i, r| p[i] = (r + ROUND).to_bits() as i16),
        );
        let off = 32_000.0 * 3.0 / (1u32 << 24) as f32;
        let sum = |half: &[i16]| half.iter().fold(0i32, |s, &p| s.wrapping_add(i32::from(p)));
        self.offset = self.p.chunks(DOT / 2).step_by(2).map(sum).fold(0, i32::wrapping_add);
        self.offset = self.offset.wrapping_mul(OFFSET);
        self.step = step;
        self.norm = norm;
        self.error = step * (error.sqrt() * SLACK + off * root) * SLACK;
        true
    }
}

/// What the bounds of a row are multiplied by for the distance of its scan from its
/// logit.
struct Reach {
    norm: f32,
    error: f32,
}

impl ScanInput {
    /// Of rows of `cols` columns.
    ///
    /// Beside the two terms of Cauchy and Schwarz, `norm` has what the float sum may lose, of
    /// a product `|w| |x| <= (norm + error) |x|`, and what the scan loses where it multiplies
    /// and adds in float32: five roundings of `scale |q| step |p| <= norm (|x| + |f|)` at most.
    /// Roundings of the distance itself are `SLACK`'s.
    fn reach(&self, cols: usize) -> Reach {
        let unit = 1.0 / (1u32 << 24) as f32;
        let sum = (cols.div_ceil(LANES) + 4) as f32 * unit;
        let norm = self.error + sum * self.norm + 5.0 * unit * (self.norm + self.error);
        Reach { norm: norm * SLACK, error: (self.norm + sum * self.norm) * SLACK }
    }
}

/// What a logit may lose where its products are subnormal, or its scan where the product of
/// its scales is, generously: half of the smallest number, 2^30 times.
const SMALLEST: f32 = 1e-35;

/// What a scan needs, laid out once.
#[derive(Default)]
pub struct ScanScratch {
    inputs: Vec<ScanInput>,
    /// `p` of the inputs in the order of its use: `[run][line of a row][input of the run]`.
    arranged: AlignedBytes,
    /// Of each block, upper bounds, `[input][row]`, then the largest of each input.
    upper: Vec<f32>,
    /// The best lower bounds of each block, `[block][input][k of the input]`.
    lower: Vec<f32>,
    /// Of one input: its blocks' best, then the candidates and their logits.
    best: Vec<f32>,
    ids: Vec<u32>,
    logits: Vec<f32>,
    order: Vec<u32>,
}

/// Some of a row of logits: the best `k`, ids ascending.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TopLogits {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Their logits.
    pub logits: Vec<f32>,
    /// How many rows were rescored to find them; all, where the full head was
    /// computed.
    pub rescored: usize,
}

/// The best `ks[i]` logits of each of `xs`, lower ids first among equals, as the
/// full head would give them. Call it inside [`Team::run`].
pub fn top_logits(
    exact: &DenseMatrix,
    scan: &ScanRows,
    isa: Isa,
    team: &Team,
    xs: &[&[f32]],
    ks: &[usize],
    scratch: &mut ScanScratch,
) -> Vec<TopLogits> {
    let rows = exact.rows();
    scratch.inputs.resize_with(xs.len().max(scratch.inputs.len()), ScanInput::default);
    let inputs = &mut scratch.inputs[..xs.len()];
    // How many to scan for: none where there are no bounds, and the full head is
    // computed. Such an input is scanned with the others, and ignored.
    let scan_ks: Vec<usize> = inputs
        .iter_mut()
        .zip(xs)
        .zip(ks)
        .map(|((input, x), &k)| {
            let k = k.min(rows);
            if k <= MAX_TOP && input.prepare(isa, x, scan) { k } else { 0 }
        })
        .collect();
    let lower_width = scan_ks.iter().sum::<usize>();
    if lower_width > 0 {
        let blocks = rows.div_ceil(BLOCK);
        let upper_width = (BLOCK + 1) * xs.len();
        scratch.upper.resize(blocks * upper_width, 0.0);
        scratch.lower.resize(blocks * lower_width, 0.0);
        let both = (&mut scratch.upper[..], &mut scratch.lower[..]);
        let (inputs, arranged) = (&*inputs, &mut scratch.arranged);
        arrange(inputs, scan.stride / DOT, arranged);
        let arranged = arranged.as_slice_of::<i16>().as_chunks().0;
        team.zip(both, (upper_width, lower_width), 1, CHUNKS, |first, upper, lower| {
            let parts =
                upper.chunks_exact_mut(upper_width).zip(lower.chunks_exact_mut(lower_width));
            for (i, (upper, lower)) in parts.enumerate() {
                let first = (first + i) * BLOCK;
                let block = first..(first + BLOCK).min(rows);
                dispatch(isa, Scan { scan, block, inputs, arranged, ks: &scan_ks, upper, lower });
            }
        });
        team.lap("head: scan");
    }
    let top = (0..xs.len())
        .map(|i| {
            if scan_ks[i] > 0 && select(scratch, rows, i, &scan_ks) {
                let (ids, logits) = (&scratch.ids, &mut scratch.logits);
                logits.resize(ids.len(), 0.0);
                team.split(logits, 1, CHUNKS, |start, logits| {
                    exact.dots_of(isa, &ids[start..start + logits.len()], xs[i], logits);
                });
            } else {
                scratch.ids.clear();
                scratch.ids.extend(0..rows as u32);
                scratch.logits.resize(rows, 0.0);
                team.split(&mut scratch.logits, 4, CHUNKS, |start, part| {
                    exact.multiply(isa, start..start + part.len(), &xs[i..=i], &mut [part]);
                });
            }
            best_of(scratch, ks[i].min(rows))
        })
        .collect();
    team.lap("head: rescore");
    top
}

/// Inputs of each run but the last: about as many in all.
fn run(inputs: usize) -> usize {
    inputs.div_ceil(inputs.div_ceil(RUN))
}

/// Fills [`ScanScratch::arranged`] with rows' `steps` lines of each input.
fn arrange(inputs: &[ScanInput], steps: usize, out: &mut AlignedBytes) {
    out.resize(inputs.len() * steps * size_of::<[i16; DOT]>());
    let mut out = out.as_mut_slice_of::<i16>().as_chunks_mut::<DOT>().0.iter_mut();
    for run in inputs.chunks(run(inputs.len())) {
        for step in 0..steps {
            for (input, out) in run.iter().zip(&mut out) {
                // An input that has no bounds may have no `p` either.
                *out = input.p.as_chunks().0.get(step).copied().unwrap_or([0; DOT]);
            }
        }
    }
}

/// Rows whose upper bound reaches the k-th best lower bound, to `scratch.ids`;
/// whether they are few enough.
fn select(scratch: &mut ScanScratch, rows: usize, i: usize, ks: &[usize]) -> bool {
    let (k, n) = (ks[i], ks.len());
    let (before, width) = (ks[..i].iter().sum::<usize>(), ks.iter().sum::<usize>());
    let best = &mut scratch.best;
    best.clear();
    for lower in scratch.lower.chunks_exact(width).take(rows.div_ceil(BLOCK)) {
        best.extend_from_slice(&lower[before..before + k]);
    }
    let (_, &mut reach, _) = best.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
    scratch.ids.clear();
    for (b, upper) in scratch.upper.chunks_exact(n * (BLOCK + 1)).enumerate() {
        if upper[n * BLOCK + i] < reach {
            continue;
        }
        let block = b * BLOCK;
        let upper = &upper[i * BLOCK..][..BLOCK.min(rows - block)];
        for (c, upper) in upper.chunks(LANES).enumerate() {
            if upper.iter().fold(false, |any, &u| any | (u >= reach)) {
                for (r, &u) in upper.iter().enumerate() {
                    if u >= reach {
                        scratch.ids.push((block + c * LANES + r) as u32);
                    }
                }
            }
        }
    }
    scratch.ids.len() >= k && scratch.ids.len() <= (rows / MAX_CANDIDATES).max(k)
}

/// The best `k` of the rescored, ids ascending. A logit that is not a number
/// counts as the best, so that whoever looks at the best sees it.
fn best_of(scratch: &mut ScanScratch, k: usize) -> TopLogits {
    let (ids, logits, order) = (&scratch.ids, &scratch.logits, &mut scratch.order);
    let key = |i: u32| {
        let x = logits[i as usize];
        // -0 and 0 are equal.
        if x.is_nan() { f32::INFINITY } else { x + 0.0 }
    };
    let best_first = |&a: &u32, &b: &u32| {
        let nan = |i: u32| logits[i as usize].is_nan();
        nan(b).cmp(&nan(a)).then(key(b).total_cmp(&key(a))).then(a.cmp(&b))
    };
    order.clear();
    order.extend(0..ids.len() as u32);
    if k < order.len() {
        order.select_nth_unstable_by(k - 1, best_first);
        order.truncate(k);
    }
    order.sort_unstable();
    TopLogits {
        ids: order.iter().map(|&i| ids[i as usize]).collect(),
        logits: order.iter().map(|&i| logits[i as usize]).collect(),
        rescored: ids.len(),
    }
}

/// One block of rows, all inputs.
struct Scan<'a> {
    scan: &'a ScanRows,
    block: std::ops::Range<usize>,
    inputs: &'a [ScanInput],
    /// [`ScanScratch::arranged`].
    arranged: &'a [[i16; DOT]],
    ks: &'a [usize],
    upper: &'a mut [f32],
    lower: &'a mut [f32],
}

impl LaneOp for Scan<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let Self { scan, block, inputs, arranged, ks, upper, lower } = self;
        lower.fill(f32::NEG_INFINITY);
        let rows = &scan.q.as_slice()[block.start * scan.stride..block.end * scan.stride];
        let rows = rows.as_chunks::<DOT>().0;
        let bounds = &scan.bounds[block.clone()];
        let steps = scan.stride / DOT;
        let (upper, largest) = upper.split_at_mut(BLOCK * inputs.len());
        let (n, run) = (block.len(), run(inputs.len()));
        let mut sums = [[0i32; BLOCK]; RUN];
        for (i, input) in inputs.iter().enumerate() {
            // Sums of a run first, in loops that do nothing else: memory is to be kept busy.
            if i % run == 0 {
                let (sums, p) = (&mut sums, &arranged[i * steps..]);
                match run.min(inputs.len() - i) {
                    1 => add_rows::<L, 1>(l, rows, steps, p, sums),
                    2 => add_rows::<L, 2>(l, rows, steps, p, sums),
                    3 => add_rows::<L, 3>(l, rows, steps, p, sums),
                    4 => add_rows::<L, 4>(l, rows, steps, p, sums),
                    5 => add_rows::<L, 5>(l, rows, steps, p, sums),
                    6 => add_rows::<L, 6>(l, rows, steps, p, sums),
                    7 => add_rows::<L, 7>(l, rows, steps, p, sums),
                    _ => add_rows::<L, 8>(l, rows, steps, p, sums),
                }
            }
            let upper = &mut upper[i * BLOCK..][..n];
            let mut below = [f32::NEG_INFINITY; BLOCK];
            let reach = input.reach(scan.cols);
            let each = sums[i % run].iter().zip(bounds).zip(upper.iter_mut().zip(&mut below));
            for ((sum, bounds), (upper, below)) in each {
                let middle = sum.wrapping_sub(input.offset) as f32 * (bounds.scale * input.step);
                let radius = bounds.norm * reach.norm + bounds.error * reach.error + SMALLEST;
                *upper = middle + radius;
                *below = middle - radius;
            }
            largest[i] = largest_of(upper);
            let at = ks[..i].iter().sum::<usize>();
            match &mut lower[at..at + ks[i]] {
                [best] => *best = largest_of(&below),
                best => {
                    for below in below.as_chunks::<LANES>().0 {
                        if best.last().is_some_and(|&last| largest_of(below) > last) {
                            below.iter().for_each(|&bound| insert(best, bound));
                        }
                    }
                }
            }
        }
    }
}

/// The largest of some numbers. One that is not a number does not count.
#[inline(always)]
fn largest_of(x: &[f32]) -> f32 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for x in chunks {
        for i in 0..LANES {
            lanes[i] = if x[i] > lanes[i] { x[i] } else { lanes[i] };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m })
}

/// `q . p`, and each input's offset, of rows of `steps` lines and the first `T` inputs
/// in `p`. Sums may wrap: `q . p` itself fits.
#[inline(always)]
fn add_rows<L: Lanes, const T: usize>(
    l: L,
    rows: &[[u8; DOT]],
    steps: usize,
    p: &[[i16; DOT]],
    sums: &mut [[i32; BLOCK]; RUN],
) {
    let p = &p.as_chunks::<T>().0[..steps];
    let chunk = steps.div_ceil((steps * T).div_ceil(CHUNK));
    // Alone, a chunk is a row, and rows are one stream.
    let ahead = if chunk == steps { AHEAD } else { TILE * steps * DOT };
    for (rows, first) in rows.chunks(TILE * steps).zip((0..).step_by(TILE)) {
        let mut all = [[l.zero(); T]; TILE];
        for start in (0..steps).step_by(chunk) {
            let columns = start..steps.min(start + chunk);
            let p = &p[columns.clone()];
            for (row, all) in rows.chunks_exact(steps).zip(&mut all) {
                let mut acc = *all;
                for (q, p) in row[columns.clone()].iter().zip(p) {
                    l.prefetch(q.as_ptr().wrapping_add(ahead));
                    for t in 0..T {
                        acc[t] = l.add_dot(acc[t], q, &p[t]);
                    }
                }
                *all = acc;
            }
        }
        // `sums` has room for the rows of the last tile that are not there.
        for (i, all) in all.iter().enumerate() {
            let found = l.sums_i32(*all);
            for t in 0..T {
                sums[t][first + i] = found[t];
            }
        }
    }
}

/// Puts `x` into `best`, which is sorted from best to worst, if it belongs there.
#[inline(always)]
fn insert(best: &mut [f32], x: f32) {
    let Some(last) = best.len().checked_sub(1) else { return };
    if x <= best[last] {
        return;
    }
    let mut at = last;
    while at > 0 && best[at - 1] < x {
        best[at] = best[at - 1];
        at -= 1;
    }
    best[at] = x;
}
