//! Vector look-up tables: GEMM with tokens in the lanes. The loops over rows,
//! columns and tokens, which instruction sets share; theirs are in their
//! folders (`x86_64/avx2_vlut.rs`, `aarch64/neon_vlut.rs`).
//!
//! A byte of a packed row stands for a few weights, so it has few values: 81
//! for the four trits of i2, 243 for the five of t5. For each of them the sum
//! of trit times activation is computed once, for 16 tokens in the lanes of a
//! register; then a row costs one load and one addition for each of its bytes,
//! which is 64 or 80 multiplications. A dot product of as many lanes does 32.
//! (The idea: Vec-LUT, arXiv 2512.06443. Theirs has its own layout of weights;
//! here the bytes of the layouts for GEMV are the indices.)
//!
//! ```text
//! for rows in tiles
//!   for columns in blocks of 64 bytes
//!     indices of the tile, in the order in which they are used    in L2
//!     for tokens in units of 32 or 16
//!       for passes over some bytes
//!         widen the sums if they may overflow                     rarely
//!         their tables, from the activations                      in L1
//!         for rows: int16 sums += tables[index]                   in L2
//!   rescale the sums
//! ```
//!
//! A table has a [`Line`] of 64 bytes for each value of a byte. *Wide*, it holds
//! 32 tokens, and a pass takes a byte for each table. *Narrow*, it holds 16
//! tokens twice, for two bytes: then a pass takes two bytes for each table. Both
//! come to loads from the two halves of lines in turns, and that matters: two
//! loads of a cycle must not fall on the same half of different lines (Zen 3,
//! tables of 32 bytes a line: 191 instead of 236 GMAC/s in the innermost loop).
//!
//! The sums are exact. |sum| <= sum(|q|) for each token, whatever the weights; the
//! driver adds that up pass by pass and widens all sums to int32 before it can
//! pass 32767. Normally distributed activations get there every 1000 columns or so,
//! the worst possible, -128 throughout, every 240.

use std::cell::RefCell;
use std::ops::Range;

use super::generic::blocks::{BLOCK_BYTES, Cut, ROWS};
use super::{Kernel, Layout, PackedMatrix, Part, Prepared};
use crate::memory::{AlignedBytes, Plain};

/// Lanes of int16 in half a line.
pub(super) const LANES: usize = 16;

/// Tokens of a wide pass.
pub(super) const WIDE: usize = 2 * LANES;

/// Two times sixteen int16, on a cache line of their own.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [[i16; LANES]; 2]);

// SAFETY: 32 integers without padding: any bytes are some.
unsafe impl Plain for Line {}

/// A line for every byte, also for those that no packer writes.
pub(super) type Table = [Line; 256];

/// Lines from one table to the next. The 81 bytes of i2 leave gaps, at the same
/// places of each table, and so do the sets of L1 that they fall on: moved by 13
/// lines, no set of L1 is in use by more than three of the four tables (found by
/// trying all distances).
const STRIDE: usize = 256 + 13;

/// Inputs that share the indices of a block of columns, which take a tenth of the time.
/// For 64 they would take half that, but sums of 64 leave L2 room for fewer rows, and
/// tables cost more: no faster in all (Zen 3, 512 KB of L2).
const BLOCK: usize = 32;

/// What a tile's rows may take of L2: int16 sums and the indices of a block of columns.
/// More rows share a table's cost.
const TILE_BYTES: usize = 2560 * 128;

/// Tables of a pass at most.
const MAX_TABLES: usize = 4;

/// Row groups ahead of the one in use whose bytes are asked for: they stand a
/// row's length apart, where hardware prefetchers do not follow.
const AHEAD: usize = 8;

/// The tables of a pass: so many lines that no index is out of bounds, which the
/// compiler can see.
#[derive(Clone, Copy)]
pub(super) struct Tables([Line; (MAX_TABLES - 1) * STRIDE + 256]);

// SAFETY: lines, of which any bytes are some.
unsafe impl Plain for Tables {}

impl Tables {
    /// The line of `byte` in table `t`.
    #[inline(always)]
    pub(super) fn line(&self, t: usize, byte: u8) -> &Line {
        &self.0[t * STRIDE + usize::from(byte)]
    }
}

/// What an instruction set does with lines.
pub(super) trait Lines: Copy {
    /// `out[c][t] = q[t][c]`.
    fn transpose(self, q: [&[i8; LANES]; LANES], out: &mut [[i16; LANES]; LANES]);

    /// Asks for the bytes that stand `distance` after these, which need not exist.
    fn prefetch(self, bytes: &[u8], distance: usize);

    /// Puts the bytes of a row group, row after row, in the order of their use: those of
    /// pass `p`, `taken` of each row, are to begin at `index[p * stride]`. A row has a
    /// multiple of 16 bytes.
    fn split(self, taken: usize, group: &[u8], index: &mut [u64], stride: usize);

    /// Adds to the sums of each row (`WIDE` lanes or `LANES`) the lines of its bytes in
    /// `T` tables, or sets them if `fresh`. Rows come in fours. `index` has their bytes one
    /// after the other, lowest first, `T` of each or `2 * T`.
    fn add<const T: usize>(
        self,
        wide: bool,
        fresh: bool,
        tables: &Tables,
        index: &[u64],
        sums: &mut [i16],
    );

    /// Adds int16 sums to int32 ones, or sets those if they are `fresh`.
    fn widen(self, fresh: bool, sums: &[i16], wide_sums: &mut [i32]);

    /// [`Prepared::rescale`] of the sums of four rows, transposed:
    /// `out[t][r] = sums[r][t] as f32 / divisors[t] * scale`.
    fn rescale(
        self,
        sums: [&[i32; LANES]; ROWS],
        divisors: &[f32; LANES],
        scale: f32,
        out: &mut [[f32; ROWS]; LANES],
    );
}

/// Tables of the layout whose bytes have `F` fields.
pub(super) trait Build<const F: usize>: Lines {
    /// Fills the line of every byte that packers write: in each lane the sum of its
    /// trits times the fields' columns.
    fn build(self, columns: &[Line; F], table: &mut Table);
}

/// Bytes of a row in a pass.
#[inline(always)]
pub(super) const fn pass_bytes(tables: usize, wide: bool) -> usize {
    if wide { tables } else { 2 * tables }
}

/// What a thread needs, kept from call to call: about a megabyte.
#[derive(Default)]
struct Scratch {
    tables: AlignedBytes,
    columns: AlignedBytes,
    index: AlignedBytes,
    sums: AlignedBytes,
    wide_sums: AlignedBytes,
}

/// Rows that are multiplied together: pieces of matrices, one after the other.
struct Tile {
    pieces: Vec<Piece>,
    /// Rows of all, with those that fill up row groups.
    rows: usize,
}

/// Rows of a tile that belong to one matrix.
struct Piece {
    part: usize,
    rows: Range<usize>,
}

/// The kernel of a layout and an instruction set whose [`gemm`] `multiply` enters:
/// it is told whether wide, and where its inputs' outputs begin.
pub(super) struct Vlut<K, F> {
    name: &'static str,
    /// What does single inputs, and remainders of up to `few`.
    other: K,
    few: usize,
    /// Inputs of a pass, [`WIDE`] or [`LANES`], the larger first.
    units: &'static [usize],
    multiply: F,
}

impl<K, F> Vlut<K, F>
where
    K: Kernel,
    F: Fn(bool, &mut [Part<'_>], &[Prepared], usize) + Send + Sync,
{
    pub(super) fn new(
        name: &'static str,
        other: K,
        few: usize,
        units: &'static [usize],
        multiply: F,
    ) -> Self {
        Self { name, other, few, units, multiply }
    }
}

impl<K, F> Kernel for Vlut<K, F>
where
    K: Kernel,
    F: Fn(bool, &mut [Part<'_>], &[Prepared], usize) + Send + Sync,
{
    fn name(&self) -> &'static str {
        self.name
    }

    fn layout(&self) -> &'static dyn Layout {
        self.other.layout()
    }

    fn gemv(&self, w: &PackedMatrix, rows: Range<usize>, x: &Prepared, y: &mut [f32]) {
        self.other.gemv(w, rows, x, y);
    }

    fn few_inputs(&self) -> Option<(&'static str, usize)> {
        Some((self.other.name(), self.few))
    }

    fn block_inputs(&self, inputs: usize) -> usize {
        if inputs <= self.few { usize::MAX } else { BLOCK }
    }

    fn gemm_parts(&self, parts: &mut [Part<'_>], xs: &[Prepared]) {
        for (block, xs) in xs.chunks(BLOCK).enumerate() {
            let mut at = 0;
            for (i, &unit) in self.units.iter().enumerate() {
                // What is left of whole units is one more, unless the next smaller unit and a
                // few inputs beside it hold it: 17 inputs are 16 and one, not 32. A wide unit
                // takes two thirds of a narrow one more, and that as long as `few` inputs.
                let rest = (xs.len() - at) % unit;
                let smaller =
                    self.units.get(i + 1).map_or(self.few, |next| next + self.few * 2 / 3);
                let end = if rest > smaller { xs.len() } else { xs.len() - rest };
                if end > at {
                    (self.multiply)(unit == WIDE, parts, &xs[at..end], block * BLOCK + at);
                    at = end;
                }
            }
            if at < xs.len() {
                for Part { w, rows, ys } in &mut *parts {
                    self.other.gemm(w, rows.clone(), &xs[at..], &mut ys[block * BLOCK + at..]);
                }
            }
        }
    }
}

/// Multiplies parts of matrices by up to [`BLOCK`] inputs, in passes of `T` tables;
/// outputs are those from `first` on.
///
/// To be inlined into a function compiled for the instruction set of `l`.
#[inline(always)]
pub(super) fn gemm<const F: usize, const T: usize, L: Build<F>>(
    l: L,
    wide: bool,
    parts: &mut [Part<'_>],
    xs: &[Prepared],
    first: usize,
) {
    thread_local! {
        static SCRATCH: RefCell<Scratch> = RefCell::default();
    }
    let Some(cols) = parts.first().map(|p| p.w.cols) else { return };
    assert!(xs.len() <= BLOCK && parts.iter().all(|p| p.w.cols == cols));
    let lanes = if wide { WIDE } else { LANES };
    let total: usize = parts.iter().map(|p| p.rows.len().next_multiple_of(ROWS)).sum();
    let row_bytes = BLOCK_BYTES + xs.len().next_multiple_of(lanes) * size_of::<i16>();
    let tiles = total.div_ceil(TILE_BYTES / row_bytes);
    let most = total.div_ceil(tiles.max(1)).next_multiple_of(ROWS);
    // Taken and put back: a closure that `with` runs is not compiled for `l`.
    let mut scratch = SCRATCH.take();
    let mut tile = Tile { pieces: Vec::new(), rows: 0 };
    for part in 0..parts.len() {
        let mut rows = parts[part].rows.clone();
        while !rows.is_empty() {
            let end = rows.end.min(rows.start + most - tile.rows);
            tile.pieces.push(Piece { part, rows: rows.start..end });
            tile.rows += (end - rows.start).next_multiple_of(ROWS);
            rows.start = end;
            if tile.rows == most || part + 1 == parts.len() && rows.is_empty() {
                multiply_tile::<F, T, L>(l, wide, parts, &tile, xs, first, &mut scratch);
                tile.pieces.clear();
                tile.rows = 0;
            }
        }
    }
    SCRATCH.set(scratch);
}

/// One tile.
#[inline(always)]
fn multiply_tile<const F: usize, const T: usize, L: Build<F>>(
    l: L,
    wide: bool,
    parts: &mut [Part<'_>],
    tile: &Tile,
    xs: &[Prepared],
    first: usize,
    scratch: &mut Scratch,
) {
    const { assert!(T <= MAX_TABLES) };
    let lanes = if wide { WIDE } else { LANES };
    let units = xs.len().div_ceil(lanes);
    let bytes = pass_bytes(T, wide);
    let words = ROWS * bytes / 8; // of the indices of a row group, in a pass
    // A line more, so that the passes of a row group do not fall on the same sets.
    let stride = tile.rows / ROWS * words + 8;
    scratch.tables.resize(size_of::<Tables>());
    scratch.columns.resize(BLOCK_BYTES * F * size_of::<Line>());
    scratch.index.resize(BLOCK_BYTES / bytes * stride * size_of::<u64>());
    scratch.sums.resize(units * tile.rows * lanes * size_of::<i16>());
    scratch.wide_sums.resize(units * tile.rows * lanes * size_of::<i32>());
    let columns: &mut [Line] = scratch.columns.as_mut_slice_of();
    let index: &mut [u64] = scratch.index.as_mut_slice_of();
    let sums: &mut [i16] = scratch.sums.as_mut_slice_of();
    let wide_sums: &mut [i32] = scratch.wide_sums.as_mut_slice_of();
    let [tables] = scratch.tables.as_mut_slice_of::<Tables>() else { unreachable!("sized above") };
    let mut bounds = [Bound { sums: [0; WIDE], fresh: true, wide_fresh: true }; BLOCK / LANES];

    let cut = Cut::<F>::new(parts[0].w.cols);
    for block in 0..cut.blocks + usize::from(cut.tail > 0) {
        let block_bytes = if block < cut.blocks { BLOCK_BYTES } else { cut.tail };
        let mut at = 0;
        for piece in &tile.pieces {
            let w = parts[piece.part].w;
            for group in w.groups(piece.rows.clone()) {
                let group = &group[block * ROWS * BLOCK_BYTES..][..ROWS * block_bytes];
                l.prefetch(group, w.group_bytes * AHEAD);
                l.split(bytes, group, &mut index[at..], stride);
                at += words;
            }
        }
        let units = sums.chunks_exact_mut(tile.rows * lanes);
        let units = units.zip(wide_sums.chunks_exact_mut(tile.rows * lanes));
        for ((xs, bound), (sums, wide_sums)) in xs.chunks(lanes).zip(&mut bounds).zip(units) {
            arrange::<F, L>(l, wide, xs, block * F * BLOCK_BYTES, block_bytes, columns);
            let passes = columns.chunks_exact(T * F).take(block_bytes / bytes);
            for (columns, index) in passes.zip(index.chunks_exact(stride)) {
                if bound.grow(wide, columns) {
                    l.widen(bound.wide_fresh, sums, wide_sums);
                    (bound.fresh, bound.wide_fresh) = (true, false);
                }
                for (t, columns) in columns.as_chunks::<F>().0.iter().enumerate() {
                    let table = tables.0[t * STRIDE..].first_chunk_mut().expect("as the type says");
                    l.build(columns, table);
                }
                l.add::<T>(wide, bound.fresh, tables, &index[..stride - 8], sums);
                bound.fresh = false;
            }
        }
    }

    let units = sums.chunks_exact(tile.rows * lanes);
    let units = units.zip(wide_sums.chunks_exact_mut(tile.rows * lanes));
    for (i, ((xs, bound), (sums, wide_sums))) in
        xs.chunks(lanes).zip(&bounds).zip(units).enumerate()
    {
        l.widen(bound.wide_fresh, sums, wide_sums);
        put(l, parts, tile, xs, first + i * lanes, wide_sums.as_chunks().0);
    }
}

/// What is known of the sums of a unit of inputs.
#[derive(Clone, Copy)]
struct Bound {
    /// For each token, no sum is larger than that.
    sums: [u32; WIDE],
    /// Whether the sums are still to be set, and the wide ones.
    fresh: bool,
    wide_fresh: bool,
}

impl Bound {
    /// Takes in the columns of a pass: whether the sums have to be widened before it.
    #[inline(always)]
    fn grow(&mut self, wide: bool, columns: &[Line]) -> bool {
        let more = magnitudes(wide, columns);
        let full = (0..WIDE).any(|i| self.sums[i] + more[i] > i16::MAX as u32);
        for i in 0..WIDE {
            self.sums[i] = if full { more[i] } else { self.sums[i] + more[i] };
        }
        full
    }
}

/// Rescales the sums of a unit of inputs, and puts them to the outputs from `first` on.
#[inline(always)]
fn put<L: Lines>(
    l: L,
    parts: &mut [Part<'_>],
    tile: &Tile,
    xs: &[Prepared],
    first: usize,
    sums: &[[i32; LANES]],
) {
    // Lanes without a token divide by one.
    let mut divisors = [1.0; WIDE];
    for (divisor, x) in divisors.iter_mut().zip(xs) {
        *divisor = x.divisor;
    }
    let halves = sums.len() / tile.rows;
    let mut sums = sums.chunks_exact(ROWS * halves);
    for piece in &tile.pieces {
        let part = &mut parts[piece.part];
        let (start, scale) = (part.rows.start, part.w.scale);
        for (at, sums) in piece.rows.clone().step_by(ROWS).zip(&mut sums) {
            let mut scaled = [[[0f32; ROWS]; LANES]; 2];
            for half in 0..halves {
                let mut quad = [&[0; LANES]; ROWS];
                for r in 0..ROWS {
                    quad[r] = &sums[r * halves + half];
                }
                l.rescale(quad, &divisors.as_chunks().0[half], scale, &mut scaled[half]);
            }
            let n = ROWS.min(piece.rows.end - at);
            let ys = part.ys[first..].iter_mut().take(xs.len());
            for (y, scaled) in ys.zip(scaled.as_flattened()) {
                let y = &mut y[at - start..];
                match y.first_chunk_mut() {
                    Some(y) if n == ROWS => *y = *scaled,
                    _ => (0..n).for_each(|r| y[r] = scaled[r]),
                }
            }
        }
    }
}

/// Activations of the columns of a block of `bytes` bytes from column `start` on,
/// tokens in lanes: `columns` is `[pass][table][field]`.
#[inline(always)]
fn arrange<const F: usize, L: Build<F>>(
    l: L,
    wide: bool,
    xs: &[Prepared],
    start: usize,
    bytes: usize,
    columns: &mut [Line],
) {
    for field in 0..F {
        for at in (0..bytes).step_by(LANES) {
            for half in 0..if wide { 2 } else { 1 } {
                let mut q = [&[0; LANES]; LANES];
                for (q, x) in q.iter_mut().zip(xs.iter().skip(half * LANES)) {
                    let columns = &x.padded()[start + field * bytes + at..];
                    *q = columns.first_chunk().expect("Prepared pads its values");
                }
                let mut out = [[0; LANES]; LANES];
                l.transpose(q, &mut out);
                for (j, out) in (at..).zip(&out) {
                    let (table, half) = if wide { (j, half) } else { (j / 2, j % 2) };
                    columns[table * F + field].0[half] = *out;
                }
            }
        }
    }
}

/// The sum of the magnitudes of each token's activations in a pass.
#[inline(always)]
fn magnitudes(wide: bool, columns: &[Line]) -> [u32; WIDE] {
    let mut sums = [[0u16; LANES]; 2];
    for line in columns {
        for half in 0..2 {
            for i in 0..LANES {
                sums[half][i] += line.0[half][i].unsigned_abs();
            }
        }
    }
    let mut found = [0; WIDE];
    for i in 0..LANES {
        let [a, b] = [u32::from(sums[0][i]), u32::from(sums[1][i])];
        [found[i], found[LANES + i]] = if wide { [a, b] } else { [a + b, 0] };
    }
    found
}
