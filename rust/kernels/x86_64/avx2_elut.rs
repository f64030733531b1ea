//! ELUT with AVX2, and so TL1 and TL2: `vpshufb` looks 32 rows up in one table.
//!
//! ```text
//! for each span of groups                       int16 sums -> int32
//!     for each run of groups                    int8 digits -> int16 sums
//!         for each group k
//!             e = 32 indexes                    mask or shift
//!             low  += sign(shuffle(table[k].low,  e), s)
//!             high += sign(shuffle(table[k].high, e), s)
//!         sums += low + B * high                vpmaddubsw with (1, B)
//! ```
//!
//! The bounds are in [`Digits`]: how many digits fit int8 (nine of three trits,
//! eleven of two), and how many entries fit int16 (85, 127). Three trits of 32
//! rows are 9.3 operations in the vector ports: 2 shuffles, 2 signs, 2 additions,
//! 1.5 for the index, 1.1 for the sign and 0.7 for widening. With int16 sums
//! joined after every look-up and negated there, as in the papers, it is about 13
//! (counted, not measured).
//!
//! Several tokens share the indexes and signs of a group. Their tables are
//! larger than the first-level cache (27 KB each for 2560 columns in TL2, 40 KB
//! in TL1), so [`GROUPS`] row groups use a part of them before the next part is
//! touched. Not so for one token: four row groups at once are four streams
//! from memory, and those came a fifth slower than one.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::generic::elut::{
    BLOCK_BYTES, BLOCK_GROUPS, Code, Digits, ENTRIES, Elut, MAX_GROUP, ROWS, TABLE_BYTES,
};
use super::super::{Kernel, Layout, PackedMatrix, Prepared};
use crate::cpu::Avx2;

/// Row groups that share a part of the tables of several tokens.
const GROUPS: usize = 4;

/// Column groups in a part of the tables, about: 3 KB for each token.
const PART: usize = 96;

/// Tokens that share indexes and signs: 8 registers of digits, half of all.
const TOKENS: usize = 4;

pub(super) struct Avx2Elut {
    proof: Avx2,
    name: &'static str,
    layout: &'static Elut,
}

impl Avx2Elut {
    pub(super) fn new(proof: Avx2, name: &'static str, layout: &'static Elut) -> Self {
        Self { proof, name, layout }
    }
}

impl Kernel for Avx2Elut {
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
            // SAFETY: `self.proof` proves that the CPU has AVX2.
            unsafe { fill_table(digits, code, q, table) }
        });
    }

    fn gemv(&self, w: &PackedMatrix, rows: Range<usize>, x: &Prepared, y: &mut [f32]) {
        let _proof = self.proof;
        // SAFETY: `self.proof` proves that the CPU has AVX2.
        unsafe { multiply::<1>(self.layout, w, rows, [x], &mut [y]) }
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
#[target_feature(enable = "avx2")]
fn load(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: the array has the 32 bytes that are read; the load needs no alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

/// Loads the four pairs of indexes and the signs of a mirrored block.
#[target_feature(enable = "avx2")]
#[inline]
fn load_block(block: &[u8; BLOCK_BYTES]) -> [__m256i; 5] {
    let mut out = [_mm256_setzero_si256(); 5];
    for (v, bytes) in out.iter_mut().zip(block.as_chunks().0) {
        *v = load(bytes);
    }
    out
}

/// Loads the low and the high digits of a table, each into both halves of a
/// register.
#[target_feature(enable = "avx2")]
fn load_table(table: &[u8; TABLE_BYTES]) -> [__m256i; 2] {
    let (low, high) = table.split_at(ENTRIES);
    // SAFETY: a table has twice the 16 bytes that each load reads; they need no
    // alignment.
    let (low, high) =
        unsafe { (_mm_loadu_si128(low.as_ptr().cast()), _mm_loadu_si128(high.as_ptr().cast())) };
    [_mm256_broadcastsi128_si256(low), _mm256_broadcastsi128_si256(high)]
}

#[target_feature(enable = "avx2")]
fn store(v: __m256i, out: &mut [u8; 32]) {
    // SAFETY: the array has the 32 bytes that are written; the store needs no
    // alignment.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), v) }
}

/// The int32 lanes of a register.
#[target_feature(enable = "avx2")]
fn lanes(v: __m256i) -> [i32; 8] {
    let mut out = [0; 8];
    // SAFETY: the array has the 32 bytes that are written; the store needs no
    // alignment.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), v) }
    out
}

/// The tables of one code: 16 entries at a time, as int16, then split in digits.
#[target_feature(enable = "avx2")]
fn fill_table(digits: Digits, code: &Code, q: &[i8], table: &mut [[u8; TABLE_BYTES]]) {
    let mut values = [_mm256_setzero_si256(); MAX_GROUP];
    for (v, levels) in values.iter_mut().zip(&code.values) {
        let mut wide = [0i16; ENTRIES];
        for e in 0..ENTRIES {
            wide[e] = i16::from(levels[e]);
        }
        // SAFETY: the array has the 32 bytes that are read; the load needs no
        // alignment.
        *v = unsafe { _mm256_loadu_si256(wide.as_ptr().cast()) };
    }
    let (base, inverse) = (_mm256_set1_epi16(digits.base), _mm256_set1_epi16(digits.inverse));
    for (q, out) in q.chunks_exact(code.group).zip(table) {
        let mut entries = _mm256_setzero_si256();
        for (&q, &levels) in q.iter().zip(&values) {
            let q = _mm256_set1_epi16(i16::from(q));
            entries = _mm256_add_epi16(entries, _mm256_mullo_epi16(q, levels));
        }
        let high = _mm256_mulhrs_epi16(entries, inverse);
        let low = _mm256_sub_epi16(entries, _mm256_mullo_epi16(high, base));
        // Packing interleaves halves: low 0-7, high 0-7, low 8-15, high 8-15.
        let packed = _mm256_packs_epi16(low, high);
        store(_mm256_permute4x64_epi64::<0b11_01_10_00>(packed), out);
    }
}

/// int32 sums of 32 rows, eight to a register.
type Sums = [__m256i; 4];

/// `T` tokens and all of `rows`.
#[target_feature(enable = "avx2")]
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
        let mut sums = [[[_mm256_setzero_si256(); 4]; T]; GROUPS];
        for from in (0..cut.blocks).step_by(PART / BLOCK_GROUPS) {
            let blocks = from..cut.blocks.min(from + PART / BLOCK_GROUPS);
            let mut part = tables;
            for t in 0..T {
                part[t] = &tables[t][blocks.start * BLOCK_GROUPS..blocks.end * BLOCK_GROUPS];
            }
            for (sums, first) in sums.iter_mut().zip((first..end).step_by(ROWS)) {
                let (group, _) = w.group(first).as_chunks();
                add_blocks(e.digits, &group[blocks.clone()], part, sums);
            }
        }
        for from in (0..cut.pairs).step_by(PART / 2) {
            let pairs = from..cut.pairs.min(from + PART / 2);
            let skip = cut.blocks * BLOCK_GROUPS;
            let mut part = tables;
            for t in 0..T {
                part[t] = &tables[t][skip + 2 * pairs.start..skip + 2 * pairs.end];
            }
            for (sums, first) in sums.iter_mut().zip((first..end).step_by(ROWS)) {
                let (group, _) = w.group(first)[cut.block_bytes()..].as_chunks();
                add_pairs(e.digits, &group[pairs.clone()], part, sums);
            }
        }
        for (sums, first) in sums.iter().zip((first..end).step_by(ROWS)) {
            for t in 0..T {
                let y = &mut ys[t][first - start..end.min(first + ROWS) - start];
                for (y, sums) in y.chunks_mut(8).zip(sums[t]) {
                    for (y, sum) in y.iter_mut().zip(lanes(sums)) {
                        *y = xs[t].rescale(sum, w.scale);
                    }
                }
            }
        }
    }
}

/// Digits of a run: low ones, high ones.
type Run<const T: usize> = [[__m256i; 2]; T];

/// Adds mirrored blocks, with the longest runs that their digits allow.
#[target_feature(enable = "avx2")]
fn add_blocks<const T: usize>(
    digits: Digits,
    blocks: &[[u8; BLOCK_BYTES]],
    tables: [&[[u8; TABLE_BYTES]]; T],
    sums: &mut [Sums; T],
) {
    match digits.run {
        0..4 => add_blocks_in_runs::<T, 1>(digits, blocks, tables, sums),
        4..8 => add_blocks_in_runs::<T, 2>(digits, blocks, tables, sums),
        8.. => add_blocks_in_runs::<T, 4>(digits, blocks, tables, sums),
    }
}

/// `RUN` is in pairs of look-ups.
#[target_feature(enable = "avx2")]
#[inline]
fn add_blocks_in_runs<const T: usize, const RUN: usize>(
    digits: Digits,
    blocks: &[[u8; BLOCK_BYTES]],
    tables: [&[[u8; TABLE_BYTES]]; T],
    sums: &mut [Sums; T],
) {
    let one = _mm256_set1_epi8(1);
    let weights = digit_weights(digits);
    let mut blocks_of: [&[[[u8; TABLE_BYTES]; BLOCK_GROUPS]]; T] = [&[]; T];
    for t in 0..T {
        (blocks_of[t], _) = tables[t].as_chunks();
        assert_eq!(blocks_of[t].len(), blocks.len());
    }
    let span = digits.int16_lookups() / BLOCK_GROUPS;
    for from in (0..blocks.len()).step_by(span) {
        let mut sums16 = [[_mm256_setzero_si256(); 2]; T];
        for b in from..blocks.len().min(from + span) {
            super::prefetch(&blocks[b]);
            let [p0, p1, p2, p3, signs] = load_block(&blocks[b]);
            let mut tables = [&[[0; TABLE_BYTES]; BLOCK_GROUPS]; T];
            for t in 0..T {
                tables[t] = &blocks_of[t][b];
            }
            // `vpsignb` negates by the sign bit, and clears where a byte is zero:
            // so a bit that no sign needs any more is set.
            let s0 = _mm256_or_si256(signs, one);
            let s1 = _mm256_add_epi8(s0, s0);
            let s2 = _mm256_add_epi8(s1, s1);
            let s3 = _mm256_add_epi8(s2, s2);
            let s4 = _mm256_add_epi8(s3, s3);
            let s5 = _mm256_add_epi8(s4, s4);
            let s6 = _mm256_add_epi8(s5, s5);
            let s7 = _mm256_or_si256(_mm256_slli_epi16::<7>(signs), one);
            let mut run: Run<T> = [[_mm256_setzero_si256(); 2]; T];
            // Written out, because the loop was not unrolled, and took more time.
            add_mirrored::<T, 0>(&mut run, p0, [s0, s1], tables);
            if RUN <= 1 {
                widen(&mut sums16, &mut run, weights);
            }
            add_mirrored::<T, 2>(&mut run, p1, [s2, s3], tables);
            if RUN <= 2 {
                widen(&mut sums16, &mut run, weights);
            }
            add_mirrored::<T, 4>(&mut run, p2, [s4, s5], tables);
            if RUN <= 1 {
                widen(&mut sums16, &mut run, weights);
            }
            add_mirrored::<T, 6>(&mut run, p3, [s6, s7], tables);
            widen(&mut sums16, &mut run, weights);
        }
        widen_sums(sums, sums16);
    }
}

/// Adds two mirrored groups, the `K`th of a block and the next.
#[target_feature(enable = "avx2")]
#[inline]
fn add_mirrored<const T: usize, const K: usize>(
    run: &mut Run<T>,
    pair: __m256i,
    signs: [__m256i; 2],
    tables: [&[[u8; TABLE_BYTES]; BLOCK_GROUPS]; T],
) {
    let indexes = split_pair(pair);
    for half in 0..2 {
        for t in 0..T {
            let table = load_table(&tables[t][K + half]);
            for d in 0..2 {
                let digit = _mm256_shuffle_epi8(table[d], indexes[half]);
                let digit = _mm256_sign_epi8(digit, signs[half]);
                run[t][d] = _mm256_add_epi8(run[t][d], digit);
            }
        }
    }
}

/// The indexes of two groups.
#[target_feature(enable = "avx2")]
#[inline]
fn split_pair(pair: __m256i) -> [__m256i; 2] {
    let nibble = _mm256_set1_epi8(15);
    [_mm256_and_si256(pair, nibble), _mm256_and_si256(_mm256_srli_epi16::<4>(pair), nibble)]
}

/// Adds pairs of plain groups.
#[target_feature(enable = "avx2")]
fn add_pairs<const T: usize>(
    digits: Digits,
    pairs: &[[u8; ROWS]],
    tables: [&[[u8; TABLE_BYTES]]; T],
    sums: &mut [Sums; T],
) {
    match digits.run {
        0..2 => add_pairs_in_runs::<T, true>(digits, pairs, tables, sums),
        2.. => add_pairs_in_runs::<T, false>(digits, pairs, tables, sums),
    }
}

/// `SINGLE`: runs are single look-ups.
#[target_feature(enable = "avx2")]
#[inline]
fn add_pairs_in_runs<const T: usize, const SINGLE: bool>(
    digits: Digits,
    pairs: &[[u8; ROWS]],
    tables: [&[[u8; TABLE_BYTES]]; T],
    sums: &mut [Sums; T],
) {
    let weights = digit_weights(digits);
    let mut pairs_of: [&[[[u8; TABLE_BYTES]; 2]]; T] = [&[]; T];
    for t in 0..T {
        (pairs_of[t], _) = tables[t].as_chunks();
        assert_eq!(pairs_of[t].len(), pairs.len());
    }
    let run_pairs = (digits.run / 2).max(1);
    // Whole runs that fit int16. One does: its joined digits fit.
    let span = digits.int16_lookups() / (2 * run_pairs) * run_pairs;
    for from in (0..pairs.len()).step_by(span) {
        let mut sums16 = [[_mm256_setzero_si256(); 2]; T];
        let end = pairs.len().min(from + span);
        for from in (from..end).step_by(run_pairs) {
            let mut run: Run<T> = [[_mm256_setzero_si256(); 2]; T];
            for p in from..end.min(from + run_pairs) {
                super::prefetch(&pairs[p]);
                let indexes = split_pair(load(&pairs[p]));
                for half in 0..2 {
                    for t in 0..T {
                        let table = load_table(&pairs_of[t][p][half]);
                        for d in 0..2 {
                            let digit = _mm256_shuffle_epi8(table[d], indexes[half]);
                            run[t][d] = _mm256_add_epi8(run[t][d], digit);
                        }
                    }
                    if SINGLE {
                        widen(&mut sums16, &mut run, weights);
                    }
                }
            }
            if !SINGLE {
                widen(&mut sums16, &mut run, weights);
            }
        }
        widen_sums(sums, sums16);
    }
}

/// `(1, B)` in each pair of bytes.
#[target_feature(enable = "avx2")]
fn digit_weights(digits: Digits) -> __m256i {
    _mm256_set1_epi16(digits.base << 8 | 1)
}

/// Joins digits and adds them to int16 sums: rows 0-7 and 16-23, rows 8-15 and
/// 24-31. `128 * 127 + 127` is the most that joined digits can be: no saturation.
#[target_feature(enable = "avx2")]
#[inline]
fn widen<const T: usize>(sums: &mut [[__m256i; 2]; T], run: &mut Run<T>, weights: __m256i) {
    for t in 0..T {
        let [low, high] = run[t];
        let a = _mm256_maddubs_epi16(weights, _mm256_unpacklo_epi8(low, high));
        let b = _mm256_maddubs_epi16(weights, _mm256_unpackhi_epi8(low, high));
        sums[t][0] = _mm256_add_epi16(sums[t][0], a);
        sums[t][1] = _mm256_add_epi16(sums[t][1], b);
        run[t] = [_mm256_setzero_si256(); 2];
    }
}

/// Adds int16 sums to int32 sums, rows in order.
#[target_feature(enable = "avx2")]
#[inline]
fn widen_sums<const T: usize>(sums: &mut [Sums; T], sums16: [[__m256i; 2]; T]) {
    for t in 0..T {
        for i in 0..2 {
            let low = _mm256_cvtepi16_epi32(_mm256_castsi256_si128(sums16[t][i]));
            let high = _mm256_cvtepi16_epi32(_mm256_extracti128_si256::<1>(sums16[t][i]));
            sums[t][i] = _mm256_add_epi32(sums[t][i], low);
            sums[t][2 + i] = _mm256_add_epi32(sums[t][2 + i], high);
        }
    }
}
