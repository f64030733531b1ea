//! Float matrices: the token embeddings and the `lm_head`, kept as stored
//! (bfloat16, float16 or float32, which all convert exactly).
//!
//! A logit is one dot product: 16 interleaved chains of fused multiply-adds
//! along the row, then a fixed tree. Rows are independent, so tiles of tokens
//! and threads change nothing.

use std::ops::Range;

use super::lanes::{LaneOp, Lanes, Load, dispatch};
use super::{tree_sum, zero_padded};
use crate::cpu::Isa;
use crate::error::{Error, invalid};
use crate::floats::{Bf16, Element, F16, LANES};

/// Elements of a float matrix, as stored.
#[derive(Debug)]
pub enum Floats {
    /// float32.
    F32(Vec<f32>),
    /// float16.
    F16(Vec<F16>),
    /// bfloat16.
    Bf16(Vec<Bf16>),
}

impl Floats {
    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Floats::F32(v) => v.len(),
            Floats::F16(v) => v.len(),
            Floats::Bf16(v) => v.len(),
        }
    }

    /// Whether there are no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A float matrix, row-major.
#[derive(Debug)]
pub struct DenseMatrix {
    rows: usize,
    cols: usize,
    data: Floats,
}

/// Inputs whose dot products with a row run side by side. For one input the
/// single chain of multiply-adds is still faster than memory, and rows are
/// read one after the other: tiles of four rows, four streams, came at half
/// the speed.
const TILE: usize = 4;

impl DenseMatrix {
    /// Wraps `data`, which has `rows * cols` finite elements.
    ///
    /// # Errors
    /// A length that does not fit, or a value that is infinite or not a number.
    pub fn new(rows: usize, cols: usize, data: Floats) -> Result<Self, Error> {
        if rows == 0 || cols == 0 || rows.checked_mul(cols) != Some(data.len()) {
            return Err(invalid!("{} values for a matrix of {rows} x {cols}", data.len()));
        }
        // A stored number is infinite or NaN exactly if its exponent bits are all set.
        let bad = match &data {
            Floats::F32(v) => v.iter().fold(0, |bad, x| bad | u32::from(!x.is_finite())),
            Floats::F16(v) => v.iter().fold(0, |bad, x| bad | u32::from(x.0 & 0x7c00 == 0x7c00)),
            Floats::Bf16(v) => v.iter().fold(0, |bad, x| bad | u32::from(x.0 & 0x7f80 == 0x7f80)),
        };
        if bad != 0 {
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

    /// Bytes in memory.
    #[must_use]
    pub fn n_bytes(&self) -> usize {
        self.data.len() * if matches!(self.data, Floats::F32(_)) { 4 } else { 2 }
    }

    /// Copies row `r` as float32.
    pub fn row(&self, isa: Isa, r: usize, out: &mut [f32]) {
        let range = r * self.cols..(r + 1) * self.cols;
        isa.vectorize(
            #[inline(always)]
            || match &self.data {
                Floats::F32(v) => convert(&v[range], out),
                Floats::F16(v) => convert(&v[range], out),
                Floats::Bf16(v) => convert(&v[range], out),
            },
        );
    }

    /// `ys[t][r - rows.start] = row r . xs[t]`.
    pub fn multiply(&self, isa: Isa, rows: Range<usize>, xs: &[&[f32]], ys: &mut [&mut [f32]]) {
        assert!(xs.iter().all(|x| x.len() == self.cols), "input length");
        let cols = self.cols;
        match &self.data {
            Floats::F32(data) => dispatch(isa, Multiply { data, rows, cols, xs, ys }),
            Floats::F16(data) => dispatch(isa, Multiply { data, rows, cols, xs, ys }),
            Floats::Bf16(data) => dispatch(isa, Multiply { data, rows, cols, xs, ys }),
        }
    }
}

#[inline(always)]
fn convert<E: Element>(from: &[E], out: &mut [f32]) {
    for (o, v) in out.iter_mut().zip(from) {
        *o = v.to_f32();
    }
}

/// Rows times inputs.
struct Multiply<'a, 'y, E> {
    data: &'a [E],
    rows: Range<usize>,
    cols: usize,
    xs: &'a [&'a [f32]],
    ys: &'a mut [&'y mut [f32]],
}

impl<E: Load> LaneOp for Multiply<'_, '_, E> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { data, rows, cols, xs, ys } = self;
        for (at, r) in rows.enumerate() {
            let row = &data[r * cols..(r + 1) * cols];
            let pairs = xs.chunks(TILE).zip(ys.chunks_mut(TILE));
            for (xs, ys) in pairs {
                if let (Ok(xs), Ok(ys)) =
                    (<[_; TILE]>::try_from(xs), <&mut [_; TILE]>::try_from(&mut *ys))
                {
                    let dots = dots(lanes, row, xs);
                    ys.iter_mut().zip(dots).for_each(|(y, dot)| y[at] = dot);
                } else {
                    xs.iter().zip(ys).for_each(|(x, y)| [y[at]] = dots(lanes, row, [*x]));
                }
            }
        }
    }
}

/// The definition of a dot product, for `N` inputs side by side.
#[inline(always)]
fn dots<const N: usize, E: Load, L: Lanes>(l: L, row: &[E], xs: [&[f32]; N]) -> [f32; N] {
    let mut acc = [l.splat(0.0); N];
    let (ws, w_tail) = row.as_chunks::<LANES>();
    // All slices have as many chunks as `ws`, which the compiler can use.
    let chunks = xs.map(|x| &x.as_chunks::<LANES>().0[..ws.len()]);
    for (c, w) in ws.iter().enumerate() {
        let w = E::load(l, w);
        for n in 0..N {
            acc[n] = l.fma(w, l.load_f32(&chunks[n][c]), acc[n]);
        }
    }
    if !w_tail.is_empty() {
        let w = E::load(l, &zero_padded(w_tail));
        for n in 0..N {
            let x = zero_padded(&xs[n][ws.len() * LANES..]);
            acc[n] = l.fma(w, l.load_f32(&x), acc[n]);
        }
    }
    acc.map(|v| tree_sum(l.to_array(v)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_is_not_finite() {
        assert!(DenseMatrix::new(1, 2, Floats::F16(vec![F16(0), F16(0x7c00)])).is_err());
        assert!(DenseMatrix::new(1, 2, Floats::Bf16(vec![Bf16(0xffc0), Bf16(0)])).is_err());
        assert!(DenseMatrix::new(1, 2, Floats::F32(vec![0.0, f32::NAN])).is_err());
        assert!(DenseMatrix::new(2, 2, Floats::F32(vec![0.0; 3])).is_err());
        assert!(DenseMatrix::new(1, 2, Floats::Bf16(vec![Bf16(0x7f7f), Bf16(1)])).is_ok());
    }
}
