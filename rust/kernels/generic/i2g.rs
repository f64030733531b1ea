//! i2g: two bits a weight, and where a matrix has several scales, one for each
//! group of columns of each row. For models whose activations stay float32
//! (TriLM, Ternary-Bonsai), and for those with several scales in a matrix.
//!
//! Apart from the other layouts because its arithmetic is another one: sums of
//! floats have an order, which is part of their definition. For one row,
//!
//! ```text
//! for each block of 64 columns, in order
//!   for each word of 16 columns: a chain of additions of t * x, in order
//!   sum   = (word 0 + word 1) + (word 2 + word 3)
//!   total = fma(scale of the block, sum, total)
//! y = total / divisor
//! ```
//!
//! `t * x` is `x`, `-x` or zero, so each step rounds once. The divisor is 1 for
//! float activations. int8 activations are the same code over their integers,
//! whose sums within a block are exact.
//!
//! Sixteen rows are interleaved, word by word, in 64 bytes: lanes are rows, so
//! that chains vectorize in any order that the definition leaves open, and one
//! source, compiled for each instruction set, is both the definition and the fast
//! kernel.

use std::ops::Range;

use super::super::{Activations, Kernel, Layout, PackedMatrix, Prepared};
use crate::cpu::Isa;

/// Interleaved rows.
pub(in super::super) const ROWS: usize = 16;

/// Columns of a word: two bits each.
const WORD: usize = 16;

/// Words of a block, each a chain of its own: four chains hide the latency of an
/// addition.
const WORDS: usize = 4;

/// Columns of a block: groups with a scale of their own are a multiple of it.
pub(in super::super) const BLOCK: usize = WORD * WORDS;

/// Bytes of a word of all rows.
const WORD_BYTES: usize = 4 * ROWS;

/// Sixteen rows.
type Lanes<T> = [T; ROWS];

/// The layout.
pub(in super::super) struct I2g;

impl Layout for I2g {
    fn name(&self) -> &'static str {
        "i2g"
    }

    fn row_group(&self) -> usize {
        ROWS
    }

    /// Whole blocks: what is past the last column is zeros, in weights and inputs.
    fn group_bytes(&self, cols: usize) -> usize {
        cols.div_ceil(BLOCK) * WORDS * WORD_BYTES
    }

    fn scale_granule(&self) -> Option<usize> {
        Some(BLOCK)
    }

    fn pack(&self, rows: &[i8], cols: usize, out: &mut [u8]) {
        for (w, out) in out.as_chunks_mut::<WORD_BYTES>().0.iter_mut().enumerate() {
            for (r, out) in out.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                let row = rows.get(r * cols..(r + 1) * cols).unwrap_or(&[]);
                let codes = (0..WORD).map(|j| {
                    let t = row.get(w * WORD + j).copied().unwrap_or(0);
                    ((t + 1) as u32) << (2 * j)
                });
                *out = codes.sum::<u32>().to_le_bytes();
            }
        }
    }

    fn unpack(&self, group: &[u8], cols: usize, out: &mut [i8]) {
        for (r, row) in out.chunks_exact_mut(cols).enumerate() {
            for (c, t) in row.iter_mut().enumerate() {
                let byte = group[c / WORD * WORD_BYTES + 4 * r + c % WORD / 4];
                *t = (byte >> (2 * (c % 4)) & 3) as i8 - 1;
            }
        }
    }
}

/// The kernel, for one instruction set and one kind of activations.
pub(in super::super) struct Grouped {
    /// Compiled for it.
    isa: Isa,
    activations: Activations,
    name: &'static str,
}

impl Grouped {
    /// `name` is leaked: there are two for each level of the CPU.
    pub(in super::super) fn new(isa: Isa, activations: Activations) -> Self {
        let name = format!("{}-i2g-{}", isa.name(), activations.name());
        Self { isa, activations, name: name.leak() }
    }
}

impl Kernel for Grouped {
    fn name(&self) -> &'static str {
        self.name
    }

    fn layout(&self) -> &'static dyn Layout {
        &I2g
    }

    fn activations(&self) -> Activations {
        self.activations
    }

    fn table(&self) -> &'static str {
        match self.activations {
            Activations::Float => "float32",
            Activations::Int8 => "int8 as float32",
        }
    }

    fn prepare(&self, isa: Isa, x: &[f32], out: &mut Prepared) {
        match self.activations {
            Activations::Float => {
                out.cols = x.len();
                out.divisor = 1.0;
                out.floats.clear();
                out.floats.extend_from_slice(x);
            }
            Activations::Int8 => {
                out.quantize(isa, x);
                let Prepared { floats, values, cols, .. } = out;
                floats.clear();
                floats.extend(values.as_i8()[..*cols].iter().map(|&q| f32::from(q)));
            }
        }
        out.floats.resize(x.len().next_multiple_of(BLOCK), 0.0);
        out.table_form = self.table();
    }

    fn gemv(&self, w: &PackedMatrix, rows: Range<usize>, x: &Prepared, y: &mut [f32]) {
        self.gemm(w, rows, std::slice::from_ref(x), &mut [y]);
    }

    fn gemm(&self, w: &PackedMatrix, rows: Range<usize>, xs: &[Prepared], ys: &mut [&mut [f32]]) {
        let inputs: Vec<&[[f32; BLOCK]]> = xs.iter().map(|x| x.floats.as_chunks().0).collect();
        let mut totals = vec![[0f32; ROWS]; xs.len()];
        for first in rows.clone().step_by(ROWS) {
            let group = w.group(first).as_chunks::<{ WORDS * WORD_BYTES }>().0;
            let scales = Scales::of(w, first);
            totals.fill([0.0; ROWS]);
            self.isa.vectorize(
                #[inline(always)]
                || match (&inputs[..], &mut totals[..]) {
                    ([x], [total]) => one(group, scales, x, total),
                    (xs, totals) => several(group, scales, xs, totals),
                },
            );
            let at = first - rows.start;
            for ((y, total), x) in ys.iter_mut().zip(&totals).zip(xs) {
                let n = ROWS.min(y.len() - at);
                for (y, total) in y[at..at + n].iter_mut().zip(total) {
                    *y = total / x.divisor;
                }
            }
        }
    }
}

/// Scales of sixteen rows.
#[derive(Clone, Copy)]
enum Scales<'a> {
    /// One for the matrix.
    One(f32),
    /// Those of each group, and the blocks of a group.
    Groups(&'a [Lanes<f32>], usize),
}

impl<'a> Scales<'a> {
    fn of(w: &'a PackedMatrix, first: usize) -> Self {
        let Some((scales, group)) = &w.group_scales else { return Scales::One(w.scale) };
        let scales = scales.as_chunks::<ROWS>().0;
        let groups = w.cols.div_ceil(*group);
        // A group of all columns may end within a block.
        Scales::Groups(&scales[first / ROWS * groups..][..groups], group.div_ceil(BLOCK))
    }

    #[inline(always)]
    fn block(self, b: usize) -> Lanes<f32> {
        match self {
            Scales::One(scale) => [scale; ROWS],
            Scales::Groups(scales, blocks) => scales[b / blocks],
        }
    }
}

/// Codes of a word of all rows.
#[inline(always)]
fn codes(word: &[u8]) -> Lanes<u32> {
    let mut out = [0; ROWS];
    for (code, bytes) in out.iter_mut().zip(word.as_chunks::<4>().0) {
        *code = u32::from_le_bytes(*bytes);
    }
    out
}

/// `total += scale * ((a + b) + (c + d))`.
#[inline(always)]
fn add_block(words: [Lanes<f32>; WORDS], scales: Lanes<f32>, total: &mut Lanes<f32>) {
    let [a, b, c, d] = words;
    for r in 0..ROWS {
        let sum = (a[r] + b[r]) + (c[r] + d[r]);
        total[r] = scales[r].mul_add(sum, total[r]);
    }
}

/// Sixteen rows times one input.
#[inline(always)]
fn one(
    group: &[[u8; WORDS * WORD_BYTES]],
    scales: Scales<'_>,
    x: &[[f32; BLOCK]],
    total: &mut Lanes<f32>,
) {
    for (b, (bytes, x)) in group.iter().zip(x).enumerate() {
        let mut sums = [[0f32; ROWS]; WORDS];
        for pair in 0..WORDS / 2 {
            // Two chains at a time: what AVX2 has registers for.
            let (v, w) = (2 * pair, 2 * pair + 1);
            let (p, q) = (codes(&bytes[v * WORD_BYTES..]), codes(&bytes[w * WORD_BYTES..]));
            let (mut s, mut t) = ([0f32; ROWS], [0f32; ROWS]);
            for j in 0..WORD {
                let (x, y) = (x[v * WORD + j], x[w * WORD + j]);
                for r in 0..ROWS {
                    s[r] += ((p[r] >> (2 * j) & 3) as i32 - 1) as f32 * x;
                    t[r] += ((q[r] >> (2 * j) & 3) as i32 - 1) as f32 * y;
                }
            }
            (sums[v], sums[w]) = (s, t);
        }
        add_block(sums, scales.block(b), total);
    }
}

/// Sixteen rows times several inputs: weights become floats once for all.
#[inline(always)]
fn several(
    group: &[[u8; WORDS * WORD_BYTES]],
    scales: Scales<'_>,
    xs: &[&[[f32; BLOCK]]],
    totals: &mut [Lanes<f32>],
) {
    let mut tile = [[0f32; ROWS]; BLOCK];
    for (b, bytes) in group.iter().enumerate() {
        for (word, tile) in bytes.chunks_exact(WORD_BYTES).zip(tile.as_chunks_mut::<WORD>().0) {
            let codes = codes(word);
            for (j, tile) in tile.iter_mut().enumerate() {
                for r in 0..ROWS {
                    tile[r] = ((codes[r] >> (2 * j) & 3) as i32 - 1) as f32;
                }
            }
        }
        let scales = scales.block(b);
        let mut i = 0;
        while i + 4 <= xs.len() {
            tokens::<4>(&tile, scales, b, &xs[i..], &mut totals[i..]);
            i += 4;
        }
        while i < xs.len() {
            tokens::<1>(&tile, scales, b, &xs[i..], &mut totals[i..]);
            i += 1;
        }
    }
}

/// One block of `N` inputs.
#[inline(always)]
fn tokens<const N: usize>(
    tile: &[Lanes<f32>; BLOCK],
    scales: Lanes<f32>,
    b: usize,
    xs: &[&[[f32; BLOCK]]],
    totals: &mut [Lanes<f32>],
) {
    let mut sums = [[[0f32; ROWS]; WORDS]; N];
    for (w, tile) in tile.as_chunks::<WORD>().0.iter().enumerate() {
        let mut acc = [[0f32; ROWS]; N];
        for (j, tile) in tile.iter().enumerate() {
            for n in 0..N {
                let x = xs[n][b][w * WORD + j];
                for r in 0..ROWS {
                    acc[n][r] += tile[r] * x;
                }
            }
        }
        for n in 0..N {
            sums[n][w] = acc[n];
        }
    }
    for n in 0..N {
        add_block(sums[n], scales, &mut totals[n]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_stand_where_the_layout_says() {
        let (rows, cols) = (13, 70);
        let trits: Vec<i8> = (0..rows * cols).map(|c| (c * 7 % 3) as i8 - 1).collect();
        let mut bytes = vec![0; I2g.group_bytes(cols)];
        assert_eq!(bytes.len(), 2 * 64 * ROWS / 4);
        I2g.pack(&trits, cols, &mut bytes);
        let mut found = vec![9; ROWS * cols];
        I2g.unpack(&bytes, cols, &mut found);
        assert_eq!(found[..rows * cols], trits);
        assert!(found[rows * cols..].iter().all(|&t| t == 0));
        for (r, row) in trits.chunks_exact(cols).enumerate() {
            for (c, &t) in row.iter().enumerate() {
                let word = codes(&bytes[c / WORD * WORD_BYTES..])[r];
                assert_eq!((word >> (2 * (c % WORD)) & 3) as i8 - 1, t, "row {r} column {c}");
            }
        }
    }
}
