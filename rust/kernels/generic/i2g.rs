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
//! source, over the lanes of the float half (`ops/lanes.rs`), is both the definition
//! and the fast kernel. Inputs are finite: of one that is not, a zero weight may make
//! zero or NaN.

use std::ops::Range;

use super::super::{Activations, Kernel, Layout, PackedMatrix, Prepared};
use crate::cpu::Isa;
use crate::ops::lanes::{LaneOp, Lanes, dispatch};

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

/// Bytes of a block of all rows.
const BLOCK_BYTES: usize = WORDS * WORD_BYTES;

/// Bytes ahead of those in use that are asked for.
const AHEAD: usize = 4096;

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
        cols.div_ceil(BLOCK) * BLOCK_BYTES
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
        dispatch(self.isa, Rows { w, rows, xs, ys });
    }
}

/// Rows times inputs.
struct Rows<'a, 'y> {
    w: &'a PackedMatrix,
    rows: Range<usize>,
    xs: &'a [Prepared],
    ys: &'a mut [&'y mut [f32]],
}

impl LaneOp for Rows<'_, '_> {
    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let Self { w, rows, xs, ys } = self;
        let inputs: Vec<&[[f32; BLOCK]]> = xs.iter().map(|x| x.floats.as_chunks().0).collect();
        let mut totals = vec![l.splat(0.0); xs.len()];
        for first in rows.clone().step_by(ROWS) {
            let group = w.group(first).as_chunks::<BLOCK_BYTES>().0;
            let scales = Scales::of(w, first);
            totals.fill(l.splat(0.0));
            match (&inputs[..], &mut totals[..]) {
                ([x], [total]) => one(l, group, scales, x, total),
                (xs, totals) => several(l, group, scales, xs, totals),
            }
            let at = first - rows.start;
            for ((y, total), x) in ys.iter_mut().zip(&totals).zip(xs) {
                let n = ROWS.min(y.len() - at);
                for (y, total) in y[at..at + n].iter_mut().zip(l.to_array(*total)) {
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
    Groups(&'a [[f32; ROWS]], usize),
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
    fn block<L: Lanes>(self, l: L, b: usize) -> L::V {
        match self {
            Scales::One(scale) => l.splat(scale),
            Scales::Groups(scales, blocks) => l.load_f32(&scales[b / blocks]),
        }
    }
}

/// `total + scale * ((a + b) + (c + d))`.
#[inline(always)]
fn add_block<L: Lanes>(l: L, [a, b, c, d]: [L::V; WORDS], scales: L::V, total: L::V) -> L::V {
    l.fma(scales, l.add(l.add(a, b), l.add(c, d)), total)
}

/// Sixteen rows times one input.
#[inline(always)]
fn one<L: Lanes>(
    l: L,
    group: &[[u8; BLOCK_BYTES]],
    scales: Scales<'_>,
    x: &[[f32; BLOCK]],
    total: &mut L::V,
) {
    for (b, (bytes, x)) in group.iter().zip(x).enumerate() {
        let (bytes, x) = (bytes.as_chunks::<WORD_BYTES>().0, x.as_chunks::<WORD>().0);
        l.prefetch(bytes.as_ptr().wrapping_byte_add(AHEAD));
        let mut sums = [l.splat(0.0); WORDS];
        // Two chains at a time: what AVX2 has registers for.
        for v in [0, 2] {
            let w = v + 1;
            let (mut p, mut q) = (l.load_codes(&bytes[v]), l.load_codes(&bytes[w]));
            for j in 0..WORD {
                sums[v] = l.add_trits(sums[v], p, l.table(x[v][j]));
                sums[w] = l.add_trits(sums[w], q, l.table(x[w][j]));
                (p, q) = (l.next_codes(p), l.next_codes(q));
            }
        }
        *total = add_block(l, sums, scales.block(l, b), *total);
    }
}

/// Inputs that share the loads of weights: with AVX2, twelve sums, two registers of
/// weights and one of an input.
const INPUTS: usize = 6;

/// Sixteen rows times several inputs: weights become floats once for all.
#[inline(always)]
fn several<L: Lanes>(
    l: L,
    group: &[[u8; BLOCK_BYTES]],
    scales: Scales<'_>,
    xs: &[&[[f32; BLOCK]]],
    totals: &mut [L::V],
) {
    let mut tile = [[0f32; ROWS]; BLOCK];
    for (b, bytes) in group.iter().enumerate() {
        let words = bytes.as_chunks::<WORD_BYTES>().0;
        for (word, tile) in words.iter().zip(tile.as_chunks_mut::<WORD>().0) {
            let mut codes = l.load_codes(word);
            for column in tile {
                *column = l.to_array(l.trits(codes));
                codes = l.next_codes(codes);
            }
        }
        let scales = scales.block(l, b);
        let mut i = 0;
        while i + INPUTS <= xs.len() {
            tokens::<INPUTS, L>(l, &tile, scales, b, &xs[i..], &mut totals[i..]);
            i += INPUTS;
        }
        while i + 2 <= xs.len() {
            tokens::<2, L>(l, &tile, scales, b, &xs[i..], &mut totals[i..]);
            i += 2;
        }
        if i < xs.len() {
            tokens::<1, L>(l, &tile, scales, b, &xs[i..], &mut totals[i..]);
        }
    }
}

/// One block of `N` inputs.
#[inline(always)]
fn tokens<const N: usize, L: Lanes>(
    l: L,
    tile: &[[f32; ROWS]; BLOCK],
    scales: L::V,
    b: usize,
    xs: &[&[[f32; BLOCK]]],
    totals: &mut [L::V],
) {
    let mut x: [&[f32; BLOCK]; N] = [&[0.0; BLOCK]; N];
    for n in 0..N {
        x[n] = &xs[n][b];
    }
    let mut sums = [[l.splat(0.0); WORDS]; N];
    for (w, tile) in tile.as_chunks::<WORD>().0.iter().enumerate() {
        let mut acc = [l.splat(0.0); N];
        for (j, column) in tile.iter().enumerate() {
            let column = l.load_f32(column);
            for n in 0..N {
                acc[n] = l.add_exact(column, l.splat(x[n][w * WORD + j]), acc[n]);
            }
        }
        for n in 0..N {
            sums[n][w] = acc[n];
        }
    }
    for n in 0..N {
        totals[n] = add_block(l, sums[n], scales, totals[n]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::lanes::Portable;

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
                let word = Portable.load_codes(&bytes.as_chunks().0[c / WORD])[r];
                assert_eq!((word >> (2 * (c % WORD)) & 3) as i8 - 1, t, "row {r} column {c}");
            }
        }
    }
}
