//! Float matrices: the token embeddings and the `lm_head`, kept as stored
//! (bfloat16, float16 or float32, which all convert exactly).
//!
//! A logit is one dot product: 16 interleaved chains of fused multiply-adds
//! along the row, then a fixed tree. Rows are independent, so tiles of rows
//! and threads change nothing.
//!
//! Four rows are interleaved, 32 columns at a time: their four chains hide the
//! latency of a fused multiply-add, and memory is read in one stream. One row
//! at a time, the single chain bounds the speed (11 instead of 20 GB/s on a
//! thread); four rows apart are four streams, which the memory serves at half
//! its speed.

use std::ops::Range;

use super::lanes::{LaneOp, Lanes, Load, dispatch};
use super::tree_sum;
use crate::cpu::Isa;
use crate::error::{Error, invalid};
use crate::floats::{Bf16, Element, F16, LANES};
use crate::threads::Team;

/// Interleaved rows. Split the rows of a product at multiples of it.
pub const ROW_GROUP: usize = 4;

/// Columns of one row that stand together: a cache line of 16-bit numbers.
const CHUNK: usize = 2 * LANES;

/// Row-major elements to make a matrix from.
#[derive(Clone, Copy)]
pub enum StoredFloats<'a> {
    /// float32.
    F32(&'a [f32]),
    /// float16, as bits.
    F16(&'a [u16]),
    /// bfloat16, as bits.
    Bf16(&'a [u16]),
}

/// [`CHUNK`] elements, on a cache line of their own: loads never cross two.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Chunk<E>([E; CHUNK]);

/// Interleaved elements: chunk `c` of row `4 g + i` stands at
/// `(g * chunks + c) * 4 + i`; what is past the last row or column is zero.
enum Chunks {
    F32(Vec<Chunk<f32>>),
    F16(Vec<Chunk<F16>>),
    Bf16(Vec<Chunk<Bf16>>),
}

/// A float matrix.
pub struct DenseMatrix {
    rows: usize,
    cols: usize,
    chunks: Chunks,
}

impl DenseMatrix {
    /// Copies `rows * cols` finite elements, rows in parallel. Call it inside
    /// [`Team::run`].
    ///
    /// # Errors
    /// A length that does not fit, or a value that is infinite or not a number.
    pub fn new(
        rows: usize,
        cols: usize,
        data: StoredFloats<'_>,
        team: &Team,
    ) -> Result<Self, Error> {
        let len = match data {
            StoredFloats::F32(v) => v.len(),
            StoredFloats::F16(v) | StoredFloats::Bf16(v) => v.len(),
        };
        if rows == 0 || cols == 0 || rows.checked_mul(cols) != Some(len) {
            return Err(invalid!("{len} values for a matrix of {rows} x {cols}"));
        }
        // A stored number is infinite or NaN exactly if its exponent bits are
        // all set.
        let bad = match data {
            StoredFloats::F32(v) => v.iter().fold(0, |bad, x| bad | u32::from(!x.is_finite())),
            StoredFloats::F16(v) => {
                v.iter().fold(0, |bad, x| bad | u32::from(x & 0x7c00 == 0x7c00))
            }
            StoredFloats::Bf16(v) => {
                v.iter().fold(0, |bad, x| bad | u32::from(x & 0x7f80 == 0x7f80))
            }
        };
        if bad != 0 {
            return Err(invalid!("holds infinities or NaNs; wanted finite numbers"));
        }
        let chunks = match data {
            StoredFloats::F32(v) => Chunks::F32(interleave(rows, cols, v, |x| x, team)),
            StoredFloats::F16(v) => Chunks::F16(interleave(rows, cols, v, F16, team)),
            StoredFloats::Bf16(v) => Chunks::Bf16(interleave(rows, cols, v, Bf16, team)),
        };
        Ok(Self { rows, cols, chunks })
    }

    /// Out-features, or the vocabulary.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// In-features.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes in memory.
    #[must_use]
    pub fn n_bytes(&self) -> usize {
        match &self.chunks {
            Chunks::F32(v) => size_of_val(&v[..]),
            Chunks::F16(v) => size_of_val(&v[..]),
            Chunks::Bf16(v) => size_of_val(&v[..]),
        }
    }

    /// Copies row `r` as float32.
    pub fn row(&self, r: usize, out: &mut [f32]) {
        let chunks = self.cols.div_ceil(CHUNK);
        let first = r / ROW_GROUP * chunks * ROW_GROUP + r % ROW_GROUP;
        match &self.chunks {
            Chunks::F32(v) => widen(v[first..].iter().step_by(ROW_GROUP), out),
            Chunks::F16(v) => widen(v[first..].iter().step_by(ROW_GROUP), out),
            Chunks::Bf16(v) => widen(v[first..].iter().step_by(ROW_GROUP), out),
        }
    }

    /// `ys[t][r - rows.start] = row r . xs[t]`. `rows` starts at a multiple of
    /// [`ROW_GROUP`].
    pub fn multiply(&self, isa: Isa, rows: Range<usize>, xs: &[&[f32]], ys: &mut [&mut [f32]]) {
        assert!(xs.iter().all(|x| x.len() == self.cols), "input length");
        assert!(rows.start.is_multiple_of(ROW_GROUP) && rows.end <= self.rows, "row range");
        let group = self.cols.div_ceil(CHUNK) * ROW_GROUP;
        let part = rows.start / ROW_GROUP * group..rows.end.div_ceil(ROW_GROUP) * group;
        // Aligned and padded with zeros, which add nothing to a lane.
        let padded = |x: &&[f32]| -> Vec<Chunk<f32>> {
            x.chunks(CHUNK)
                .map(|from| {
                    let mut to = Chunk([0f32; CHUNK]);
                    to.0[..from.len()].copy_from_slice(from);
                    to
                })
                .collect()
        };
        let xs = &xs.iter().map(padded).collect::<Vec<_>>()[..];
        match &self.chunks {
            Chunks::F32(v) => dispatch(isa, Multiply { data: &v[part], group, xs, ys }),
            Chunks::F16(v) => dispatch(isa, Multiply { data: &v[part], group, xs, ys }),
            Chunks::Bf16(v) => dispatch(isa, Multiply { data: &v[part], group, xs, ys }),
        }
    }
}

fn interleave<S: Copy + Sync, E: Element>(
    rows: usize,
    cols: usize,
    data: &[S],
    element: impl Fn(S) -> E + Sync,
    team: &Team,
) -> Vec<Chunk<E>> {
    let group = cols.div_ceil(CHUNK) * ROW_GROUP;
    let mut out = vec![Chunk([E::default(); CHUNK]); rows.div_ceil(ROW_GROUP) * group];
    team.split(&mut out, group, 4, |start, out| {
        for (g, out) in out.chunks_exact_mut(group).enumerate() {
            let first = (start / group + g) * ROW_GROUP;
            for i in 0..ROW_GROUP.min(rows - first) {
                let row = &data[(first + i) * cols..][..cols];
                for (c, from) in row.chunks(CHUNK).enumerate() {
                    for (to, &x) in out[c * ROW_GROUP + i].0.iter_mut().zip(from) {
                        *to = element(x);
                    }
                }
            }
        }
    });
    out
}

fn widen<'a, E: Element>(chunks: impl Iterator<Item = &'a Chunk<E>>, out: &mut [f32]) {
    for (out, chunk) in out.chunks_mut(CHUNK).zip(chunks) {
        for (o, x) in out.iter_mut().zip(&chunk.0) {
            *o = x.to_f32();
        }
    }
}

/// Row groups times inputs.
struct Multiply<'a, 'y, E> {
    data: &'a [Chunk<E>],
    /// Chunks of a row group.
    group: usize,
    xs: &'a [Vec<Chunk<f32>>],
    ys: &'a mut [&'y mut [f32]],
}

impl<E: Load> LaneOp for Multiply<'_, '_, E> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        for (g, group) in self.data.chunks_exact(self.group).enumerate() {
            for (x, y) in self.xs.iter().zip(self.ys.iter_mut()) {
                let dots = dots(lanes, group, x);
                y[g * ROW_GROUP..].iter_mut().zip(dots).for_each(|(y, dot)| *y = dot);
            }
        }
    }
}

/// The definition of a dot product, for the rows of a group side by side.
#[inline(always)]
fn dots<E: Load, L: Lanes>(l: L, group: &[Chunk<E>], x: &[Chunk<f32>]) -> [f32; ROW_GROUP] {
    let mut acc = [l.splat(0.0); ROW_GROUP];
    for (rows, x) in group.as_chunks::<ROW_GROUP>().0.iter().zip(x) {
        let [low, high] = halves(x).map(|half| l.load_f32(half));
        for i in 0..ROW_GROUP {
            let [a, b] = halves(&rows[i]).map(|half| E::load(l, half));
            acc[i] = l.fma(b, high, l.fma(a, low, acc[i]));
        }
    }
    acc.map(|v| tree_sum(l.to_array(v)))
}

#[inline(always)]
fn halves<E>(chunk: &Chunk<E>) -> [&[E; LANES]; 2] {
    let [a, b] = chunk.0.as_chunks::<LANES>().0 else { unreachable!("32 is 2 * 16") };
    [a, b]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_is_not_finite() {
        let team = Team::new(Some(1)).unwrap();
        let make = |cols, data| DenseMatrix::new(1, cols, data, &team);
        assert!(make(2, StoredFloats::F16(&[0, 0x7c00])).is_err());
        assert!(make(2, StoredFloats::Bf16(&[0xffc0, 0])).is_err());
        assert!(make(2, StoredFloats::F32(&[0.0, f32::NAN])).is_err());
        assert!(make(2, StoredFloats::F32(&[0.0; 3])).is_err());
        assert!(make(2, StoredFloats::Bf16(&[0x7f7f, 1])).is_ok());
    }
}
