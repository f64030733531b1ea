//! ELUT with NEON, and so TL1 and TL2: `tbl` looks 16 rows up in one table.
//!
//! ```text
//! for each run of groups                        int8 digits -> int16 sums
//!     for each group k
//!         e = 2 x 16 indexes                    mask or shift
//!         s = 2 x 16 signs                      cmtst, orr: -1 or 1
//!         low  += s * tbl(table[k].low,  e)     mla
//!         high += s * tbl(table[k].high, e)
//!     sums += low, high                         saddw, saddw2
//! acc += low sums + B * high sums               int32
//! ```
//!
//! `mla` multiplies by a sign and adds in one instruction; the papers negate with
//! two and then add. Three trits of 16 rows take 7.5 operations and, with runs
//! of eight, one for widening.
//!
//! The bounds: a run's digits add up to at most 127 in magnitude ([`Digits`]), so
//! 258 runs fit the int16 sums, which are kept apart for low and high digits and
//! only joined in int32. A part of the tables has [`PART`] groups, so no more
//! runs than that.
//!
//! Parts of the tables, and tokens that share indexes and signs: as with AVX2.

use std::arch::aarch64::*;
use std::ops::Range;

use super::super::generic::elut::{
    BLOCK_BYTES, BLOCK_GROUPS, Code, Digits, ENTRIES, Elut, MAX_GROUP, ROWS, TABLE_BYTES,
};
use super::super::{Kernel, Layout, PackedMatrix, Prepared};
use crate::cpu::Neon;

/// Row groups that share a part of the tables of several tokens.
const GROUPS: usize = 4;

/// Column groups in a part of the tables: 3 KB for each token.
const PART: usize = 96;
const _: () = assert!(PART * 127 <= i16::MAX as usize && PART.is_multiple_of(BLOCK_GROUPS));

/// Tokens that share indexes and signs: 16 registers of digits, half of all.
const TOKENS: usize = 4;

pub(super) struct NeonElut {
    proof: Neon,
    name: &'static str,
    layout: &'static Elut,
}

impl NeonElut {
    pub(super) fn new(proof: Neon, name: &'static str, layout: &'static Elut) -> Self {
        Self { proof, name, layout }
    }
}

impl Kernel for NeonElut {
    fn name(&self) -> &'static str {
        self.name
    }

    fn layout(&self) -> &'static dyn Layout {
        self.layout
    }

    fn table(&self) -> &'static str {
        self.layout.name()
    }

    fn build_table(&self, x: &mut Prepared) {
        let (_proof, digits) = (self.proof, self.layout.digits);
        self.layout.fill_table(x, |code, q, table| {
            // SAFETY: `self.proof` proves that the CPU has NEON.
            unsafe { fill_table(digits, code, q, table) }
        });
    }

    fn gemv(&self, w: &PackedMatrix, rows: Range<usize>, x: &Prepared, y: &mut [f32]) {
        let _proof = self.proof;
        // SAFETY: `self.proof` proves that the CPU has NEON.
        unsafe { multiply(self.layout, w, rows, [x], &mut [y]) }
    }

    fn gemm(&self, w: &PackedMatrix, rows: Range<usize>, xs: &[Prepared], ys: &mut [&mut [f32]]) {
        let _proof = self.proof;
        for (xs, ys) in xs.chunks(TOKENS).zip(ys.chunks_mut(TOKENS)) {
            let (rows, e) = (rows.clone(), self.layout);
            // SAFETY: as in `gemv`.
            unsafe {
                match xs {
                    [a] => multiply(e, w, rows, [a], ys),
                    [a, b] => multiply(e, w, rows, [a, b], ys),
                    [a, b, c] => multiply(e, w, rows, [a, b, c], ys),
                    [a, b, c, d] => multiply(e, w, rows, [a, b, c, d], ys),
                    _ => {}
                }
            }
        }
    }
}

/// Loads a register.
#[target_feature(enable = "neon")]
fn load(bytes: &[u8; 16]) -> uint8x16_t {
    // SAFETY: the array has the 16 bytes that are read.
    unsafe { vld1q_u8(bytes.as_ptr()) }
}

#[target_feature(enable = "neon")]
fn store(v: int8x16_t, out: &mut [u8; 16]) {
    // SAFETY: the array has the 16 bytes that are written.
    unsafe { vst1q_u8(out.as_mut_ptr(), vreinterpretq_u8_s8(v)) }
}

/// The lanes of a register.
#[target_feature(enable = "neon")]
fn lanes(v: int32x4_t) -> [i32; 4] {
    let mut out = [0; 4];
    // SAFETY: the array has the 16 bytes that are written.
    unsafe { vst1q_s32(out.as_mut_ptr(), v) }
    out
}

/// The tables of one code: 16 entries at a time, as int16, then split in digits.
#[target_feature(enable = "neon")]
fn fill_table(digits: Digits, code: &Code, q: &[i8], table: &mut [[u8; TABLE_BYTES]]) {
    let mut values = [[vdupq_n_s16(0); 2]; MAX_GROUP];
    for (v, levels) in values.iter_mut().zip(&code.values) {
        let levels = load(&levels.map(|level| level as u8));
        let levels = vreinterpretq_s8_u8(levels);
        *v = [vmovl_s8(vget_low_s8(levels)), vmovl_high_s8(levels)];
    }
    for (q, out) in q.chunks_exact(code.group).zip(table) {
        let mut entries = [vdupq_n_s16(0); 2];
        for (&q, levels) in q.iter().zip(&values) {
            for h in 0..2 {
                entries[h] = vmlaq_n_s16(entries[h], levels[h], i16::from(q));
            }
        }
        let (mut low, mut high) = (entries, entries);
        for h in 0..2 {
            high[h] = vqrdmulhq_n_s16(entries[h], digits.inverse);
            low[h] = vmlsq_n_s16(entries[h], high[h], digits.base);
        }
        let (out, _) = out.as_chunks_mut::<ENTRIES>();
        store(vmovn_high_s16(vmovn_s16(low[0]), low[1]), &mut out[0]);
        store(vmovn_high_s16(vmovn_s16(high[0]), high[1]), &mut out[1]);
    }
}

/// Digits of a run: low or high, then rows 0-15 or 16-31.
type Run<const T: usize> = [[[int8x16_t; 2]; 2]; T];

/// Sums of digits: low or high, then eight rows to a register.
type Sums<const T: usize> = [[[int16x8_t; 4]; 2]; T];

/// `T` tokens and all of `rows`.
#[target_feature(enable = "neon")]
fn multiply<const T: usize>(
    e: &Elut,
    w: &PackedMatrix,
    rows: Range<usize>,
    xs: [&Prepared; T],
    ys: &mut [&mut [f32]],
) {
    let cut = e.cut(w.cols);
    let mut tables: [&[[u8; TABLE_BYTES]]; T] = [&[]; T];
    for t in 0..T {
        (tables[t], _) = xs[t].table().as_chunks();
    }
    let start = rows.start;
    let step = if T == 1 { ROWS } else { GROUPS * ROWS };
    for first in rows.clone().step_by(step) {
        let end = rows.end.min(first + step);
        let mut acc = [[[vdupq_n_s32(0); 8]; T]; GROUPS];
        for from in (0..cut.blocks).step_by(PART / BLOCK_GROUPS) {
            let blocks = from..cut.blocks.min(from + PART / BLOCK_GROUPS);
            let mut part = tables;
            for t in 0..T {
                part[t] = &tables[t][blocks.start * BLOCK_GROUPS..blocks.end * BLOCK_GROUPS];
            }
            for (acc, first) in acc.iter_mut().zip((first..end).step_by(ROWS)) {
                let (group, _) = w.group(first).as_chunks();
                add_blocks(e.digits, &group[blocks.clone()], part, acc);
            }
        }
        for from in (0..cut.pairs).step_by(PART / 2) {
            let pairs = from..cut.pairs.min(from + PART / 2);
            let skip = cut.blocks * BLOCK_GROUPS;
            let mut part = tables;
            for t in 0..T {
                part[t] = &tables[t][skip + 2 * pairs.start..skip + 2 * pairs.end];
            }
            for (acc, first) in acc.iter_mut().zip((first..end).step_by(ROWS)) {
                let (group, _) = w.group(first)[cut.block_bytes()..].as_chunks();
                add_pairs(e.digits, &group[pairs.clone()], part, acc);
            }
        }
        for (acc, first) in acc.iter().zip((first..end).step_by(ROWS)) {
            for t in 0..T {
                let y = &mut ys[t][first - start..end.min(first + ROWS) - start];
                for (y, acc) in y.chunks_mut(4).zip(acc[t]) {
                    for (y, sum) in y.iter_mut().zip(lanes(acc)) {
                        *y = xs[t].rescale(sum, w.scale);
                    }
                }
            }
        }
    }
}

/// Adds mirrored blocks, with the longest runs that their digits allow.
#[target_feature(enable = "neon")]
fn add_blocks<const T: usize>(
    digits: Digits,
    blocks: &[[u8; BLOCK_BYTES]],
    tables: [&[[u8; TABLE_BYTES]]; T],
    acc: &mut [[int32x4_t; 8]; T],
) {
    match digits.run {
        0..4 => add_blocks_in_runs::<T, 1>(digits, blocks, tables, acc),
        4..8 => add_blocks_in_runs::<T, 2>(digits, blocks, tables, acc),
        8.. => add_blocks_in_runs::<T, 4>(digits, blocks, tables, acc),
    }
}

/// `RUN` is in pairs of look-ups.
#[target_feature(enable = "neon")]
#[inline]
fn add_blocks_in_runs<const T: usize, const RUN: usize>(
    digits: Digits,
    blocks: &[[u8; BLOCK_BYTES]],
    tables: [&[[u8; TABLE_BYTES]]; T],
    acc: &mut [[int32x4_t; 8]; T],
) {
    let mut blocks_of: [&[[[u8; TABLE_BYTES]; BLOCK_GROUPS]]; T] = [&[]; T];
    for t in 0..T {
        (blocks_of[t], _) = tables[t].as_chunks();
        assert_eq!(blocks_of[t].len(), blocks.len());
    }
    let mut sums: Sums<T> = [[[vdupq_n_s16(0); 4]; 2]; T];
    for (b, block) in blocks.iter().enumerate() {
        let (block, _) = block.as_chunks::<16>();
        let signs = [load(&block[BLOCK_GROUPS]), load(&block[BLOCK_GROUPS + 1])];
        let mut tables = [&[[0; TABLE_BYTES]; BLOCK_GROUPS]; T];
        for t in 0..T {
            tables[t] = &blocks_of[t][b];
        }
        let mut run: Run<T> = [[[vdupq_n_s8(0); 2]; 2]; T];
        add_mirrored::<T, 0>(&mut run, block, signs, tables);
        if RUN <= 1 {
            widen(&mut sums, &mut run);
        }
        add_mirrored::<T, 2>(&mut run, block, signs, tables);
        if RUN <= 2 {
            widen(&mut sums, &mut run);
        }
        add_mirrored::<T, 4>(&mut run, block, signs, tables);
        if RUN <= 1 {
            widen(&mut sums, &mut run);
        }
        add_mirrored::<T, 6>(&mut run, block, signs, tables);
        widen(&mut sums, &mut run);
    }
    join(acc, sums, digits.base);
}

/// Adds two mirrored groups, the `K`th of a block and the next.
#[target_feature(enable = "neon")]
#[inline]
fn add_mirrored<const T: usize, const K: usize>(
    run: &mut Run<T>,
    block: &[[u8; 16]],
    signs: [uint8x16_t; 2],
    tables: [&[[u8; TABLE_BYTES]; BLOCK_GROUPS]; T],
) {
    let one = vdupq_n_u8(1);
    let indexes = split_pair([load(&block[K]), load(&block[K + 1])]);
    for half in 0..2 {
        let bit = vdupq_n_u8(0x80 >> (K + half));
        let mut sign = [vdupq_n_s8(0); 2];
        for h in 0..2 {
            // All ones, which is -1, or 0; then -1 or 1.
            sign[h] = vreinterpretq_s8_u8(vorrq_u8(vtstq_u8(signs[h], bit), one));
        }
        for t in 0..T {
            let (table, _) = tables[t][K + half].as_chunks::<ENTRIES>();
            for d in 0..2 {
                let table = load(&table[d]);
                for h in 0..2 {
                    let digits = vreinterpretq_s8_u8(vqtbl1q_u8(table, indexes[half][h]));
                    run[t][d][h] = vmlaq_s8(run[t][d][h], digits, sign[h]);
                }
            }
        }
    }
}

/// The indexes of two groups.
#[target_feature(enable = "neon")]
#[inline]
fn split_pair(pair: [uint8x16_t; 2]) -> [[uint8x16_t; 2]; 2] {
    let nibble = vdupq_n_u8(15);
    [
        [vandq_u8(pair[0], nibble), vandq_u8(pair[1], nibble)],
        [vshrq_n_u8::<4>(pair[0]), vshrq_n_u8::<4>(pair[1])],
    ]
}

/// Adds pairs of plain groups.
#[target_feature(enable = "neon")]
fn add_pairs<const T: usize>(
    digits: Digits,
    pairs: &[[u8; ROWS]],
    tables: [&[[u8; TABLE_BYTES]]; T],
    acc: &mut [[int32x4_t; 8]; T],
) {
    match digits.run {
        0..2 => add_pairs_in_runs::<T, true>(digits, pairs, tables, acc),
        2.. => add_pairs_in_runs::<T, false>(digits, pairs, tables, acc),
    }
}

/// `SINGLE`: runs are single look-ups.
#[target_feature(enable = "neon")]
#[inline]
fn add_pairs_in_runs<const T: usize, const SINGLE: bool>(
    digits: Digits,
    pairs: &[[u8; ROWS]],
    tables: [&[[u8; TABLE_BYTES]]; T],
    acc: &mut [[int32x4_t; 8]; T],
) {
    let mut pairs_of: [&[[[u8; TABLE_BYTES]; 2]]; T] = [&[]; T];
    for t in 0..T {
        (pairs_of[t], _) = tables[t].as_chunks();
        assert_eq!(pairs_of[t].len(), pairs.len());
    }
    let run_pairs = (digits.run / 2).max(1);
    let mut sums: Sums<T> = [[[vdupq_n_s16(0); 4]; 2]; T];
    for from in (0..pairs.len()).step_by(run_pairs) {
        let mut run: Run<T> = [[[vdupq_n_s8(0); 2]; 2]; T];
        for p in from..pairs.len().min(from + run_pairs) {
            let (pair, _) = pairs[p].as_chunks();
            let indexes = split_pair([load(&pair[0]), load(&pair[1])]);
            for half in 0..2 {
                for t in 0..T {
                    let (table, _) = pairs_of[t][p][half].as_chunks::<ENTRIES>();
                    for d in 0..2 {
                        let table = load(&table[d]);
                        for h in 0..2 {
                            let digits = vreinterpretq_s8_u8(vqtbl1q_u8(table, indexes[half][h]));
                            run[t][d][h] = vaddq_s8(run[t][d][h], digits);
                        }
                    }
                }
                if SINGLE {
                    widen(&mut sums, &mut run);
                }
            }
        }
        if !SINGLE {
            widen(&mut sums, &mut run);
        }
    }
    join(acc, sums, digits.base);
}

/// Adds digits to int16 sums.
#[target_feature(enable = "neon")]
#[inline]
fn widen<const T: usize>(sums: &mut Sums<T>, run: &mut Run<T>) {
    for t in 0..T {
        for d in 0..2 {
            for h in 0..2 {
                let digits = run[t][d][h];
                sums[t][d][2 * h] = vaddw_s8(sums[t][d][2 * h], vget_low_s8(digits));
                sums[t][d][2 * h + 1] = vaddw_high_s8(sums[t][d][2 * h + 1], digits);
                run[t][d][h] = vdupq_n_s8(0);
            }
        }
    }
}

/// Joins sums of digits and adds them to int32 sums, rows in order.
#[target_feature(enable = "neon")]
#[inline]
fn join<const T: usize>(acc: &mut [[int32x4_t; 8]; T], sums: Sums<T>, base: i16) {
    for t in 0..T {
        let [low, high] = sums[t];
        for i in 0..4 {
            let a = vaddw_s16(acc[t][2 * i], vget_low_s16(low[i]));
            acc[t][2 * i] = vmlal_n_s16(a, vget_low_s16(high[i]), base);
            let b = vaddw_high_s16(acc[t][2 * i + 1], low[i]);
            acc[t][2 * i + 1] = vmlal_high_n_s16(b, high[i], base);
        }
    }
}
