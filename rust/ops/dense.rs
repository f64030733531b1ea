//! Float matrices: the token embeddings and the `lm_head`, kept as stored
//! (bfloat16, float16 or float32, which all convert exactly) and where they
//! are: a tensor that is mapped from a file stays mapped.
//!
//! A logit is one dot product: 16 interleaved chains of fused multiply-adds
//! along the row, then a fixed tree. Rows are independent, so tiles of rows
//! and threads change nothing.
//!
//! Rows are multiplied four at a time, whose chains hide each other's
//! latency, and asked for a tile ahead: read without being asked for, four rows
//! side by side come at half the speed of one stream.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::lanes::{LaneOp, Lanes, Load, dispatch};
use super::{tree_sum, zero_padded};
use crate::cpu::Isa;
use crate::error::{Error, invalid};
use crate::floats::{Bf16, Element, F16, LANES};
use crate::threads::Team;

/// Rows that are multiplied side by side.
const ROW_TILE: usize = 4;

/// Elements that somebody keeps alive and unchanged: a vector, a mapped file.
pub type Shared<T> = Arc<dyn AsRef<[T]> + Send + Sync>;

/// Row-major elements of a matrix.
#[derive(Clone)]
pub enum Floats {
    /// float32.
    F32(Shared<f32>),
    /// float16.
    F16(Shared<F16>),
    /// bfloat16.
    Bf16(Shared<Bf16>),
}

/// Runs `$body` with `$data` as the slice of whichever type it is.
macro_rules! with_elements {
    ($floats:expr, $data:ident => $body:expr) => {
        match $floats {
            $crate::ops::dense::Floats::F32(shared) => {
                let $data: &[f32] = (**shared).as_ref();
                $body
            }
            $crate::ops::dense::Floats::F16(shared) => {
                let $data: &[$crate::floats::F16] = (**shared).as_ref();
                $body
            }
            $crate::ops::dense::Floats::Bf16(shared) => {
                let $data: &[$crate::floats::Bf16] = (**shared).as_ref();
                $body
            }
        }
    };
}
pub(super) use with_elements;

/// A float matrix.
pub struct DenseMatrix {
    rows: usize,
    cols: usize,
    data: Floats,
}

impl DenseMatrix {
    /// Takes `rows * cols` finite elements. Call it inside [`Team::run`].
    ///
    /// # Errors
    /// A length that does not fit, or a value that is infinite or not a number.
    pub fn new(
        rows: usize,
        cols: usize,
        data: Floats,
        isa: Isa,
        team: &Team,
    ) -> Result<Self, Error> {
        let finite = with_elements!(&data, data => {
            if rows == 0 || cols == 0 || rows.checked_mul(cols) != Some(data.len()) {
                return Err(invalid!("{} values for a matrix of {rows} x {cols}", data.len()));
            }
            let finite = AtomicBool::new(true);
            team.each_range(rows, 1, CHUNKS, |rows| {
                if !all_finite(isa, &data[rows.start * cols..rows.end * cols]) {
                    finite.store(false, Ordering::Relaxed);
                }
            });
            finite.into_inner()
        });
        if !finite {
            return Err(invalid!("holds infinities or NaNs; wanted finite numbers"));
        }
        Ok(Self { rows, cols, data })
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

    /// Bytes of the elements.
    #[must_use]
    pub fn n_bytes(&self) -> usize {
        with_elements!(&self.data, data => size_of_val(data))
    }

    /// The elements.
    pub(super) fn data(&self) -> &Floats {
        &self.data
    }

    /// Copies row `r` as float32.
    pub fn row(&self, r: usize, out: &mut [f32]) {
        with_elements!(&self.data, data => {
            for (out, x) in out.iter_mut().zip(&data[r * self.cols..][..self.cols]) {
                *out = x.to_f32();
            }
        });
    }

    /// `ys[t][r - rows.start] = row r . xs[t]`.
    pub fn multiply(&self, isa: Isa, rows: Range<usize>, xs: &[&[f32]], ys: &mut [&mut [f32]]) {
        assert!(xs.iter().all(|x| x.len() == self.cols), "input length");
        let cols = self.cols;
        with_elements!(&self.data, data => {
            let data = &data[rows.start * cols..rows.end * cols];
            dispatch(isa, Multiply { data, cols, xs, ys });
        });
    }

    /// `out[i] = row ids[i] . x`: the same bits as [`multiply`](Self::multiply).
    pub(super) fn dots_of(&self, isa: Isa, ids: &[u32], x: &[f32], out: &mut [f32]) {
        assert!(x.len() == self.cols && ids.len() == out.len(), "lengths");
        let cols = self.cols;
        with_elements!(&self.data, data => {
            dispatch(isa, DotsOf { data, cols, ids, x, out });
        });
    }
}

/// Work items handed out per thread, where rows are read from memory.
const CHUNKS: usize = 8;

fn all_finite<E: Element>(isa: Isa, data: &[E]) -> bool {
    isa.vectorize(
        #[inline(always)]
        || data.iter().fold(true, |finite, x| finite & x.is_finite()),
    )
}

/// Row groups times inputs.
struct Multiply<'a, 'y, E> {
    data: &'a [E],
    cols: usize,
    xs: &'a [&'a [f32]],
    ys: &'a mut [&'y mut [f32]],
}

impl<E: Load> LaneOp for Multiply<'_, '_, E> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let tile = ROW_TILE * self.cols;
        let tiles = self.data.chunks_exact(tile);
        let rest = tiles.remainder();
        for (g, rows) in tiles.enumerate() {
            for (x, y) in self.xs.iter().zip(self.ys.iter_mut()) {
                let dots = dots::<ROW_TILE, _, _>(lanes, rows, x);
                y[g * ROW_TILE..][..ROW_TILE].copy_from_slice(&dots);
            }
        }
        let first = self.data.len() / tile * ROW_TILE;
        for (r, row) in rest.chunks_exact(self.cols).enumerate() {
            for (x, y) in self.xs.iter().zip(self.ys.iter_mut()) {
                [y[first + r]] = dots::<1, _, _>(lanes, row, x);
            }
        }
    }
}

/// Single rows, here and there.
struct DotsOf<'a, E> {
    data: &'a [E],
    cols: usize,
    ids: &'a [u32],
    x: &'a [f32],
    out: &'a mut [f32],
}

impl<E: Load> LaneOp for DotsOf<'_, E> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        for (&id, out) in self.ids.iter().zip(self.out) {
            let row = &self.data[id as usize * self.cols..][..self.cols];
            [*out] = dots::<1, _, _>(lanes, row, self.x);
        }
    }
}

/// The definition of a dot product, for `R` rows side by side.
#[inline(always)]
fn dots<const R: usize, E: Load, L: Lanes>(l: L, rows: &[E], x: &[f32]) -> [f32; R] {
    let cols = x.len();
    let rows: [&[E]; R] = std::array::from_fn(|i| &rows[i * cols..][..cols]);
    let rows = rows.map(|row| row.as_chunks::<LANES>());
    let (x, x_tail) = x.as_chunks::<LANES>();
    let mut acc = [l.splat(0.0); R];
    for (c, x) in x.iter().enumerate() {
        let x = l.load_f32(x);
        for i in 0..R {
            let chunk = &rows[i].0[c];
            // The same place of the next tile, half a cache line or more at a time.
            l.prefetch(chunk.as_ptr().wrapping_add(R * cols));
            acc[i] = l.fma(E::load(l, chunk), x, acc[i]);
        }
    }
    if !x_tail.is_empty() {
        let x = l.load_f32(&zero_padded(x_tail));
        for i in 0..R {
            acc[i] = l.fma(E::load(l, &zero_padded(rows[i].1)), x, acc[i]);
        }
    }
    acc.map(|v| tree_sum(l.to_array(v)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_is_not_finite() {
        let team = Team::new(Some(1)).unwrap();
        for n in [1, 15, 16, 17, 40] {
            for at in [0, n / 2, n - 1] {
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let make = |data| DenseMatrix::new(1, n, data, Isa::GENERIC, &team);
                    let with = |bad| (0..n).map(|i| if i == at { bad } else { 3e38 }).collect();
                    let values: Vec<f32> = with(bad);
                    let f16 = |&v: &f32| F16(half::f16::from_f32(v.clamp(-6e4, 6e4)).to_bits());
                    let f16_bad = F16(half::f16::from_f32(bad).to_bits());
                    let mut halves: Vec<F16> = values.iter().map(f16).collect();
                    assert!(
                        values[at].is_nan() || make(Floats::F16(Arc::new(halves.clone()))).is_ok()
                    );
                    halves[at] = f16_bad;
                    assert!(make(Floats::F16(Arc::new(halves))).is_err());
                    let brain = |v: &f32| Bf16(half::bf16::from_f32(*v).to_bits());
                    let brains: Vec<Bf16> = values.iter().map(brain).collect();
                    assert!(make(Floats::Bf16(Arc::new(brains))).is_err());
                    assert!(make(Floats::F32(Arc::new(values))).is_err());
                    assert!(make(Floats::F32(Arc::new(with(-3e38)))).is_ok());
                    assert!(make(Floats::F32(Arc::new(vec![0.0; n + 1]))).is_err());
                }
            }
        }
    }
}
