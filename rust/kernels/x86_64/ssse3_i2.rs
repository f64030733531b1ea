//! i2 with SSSE3, for CPUs without AVX2: `pmaddubsw` on 128 bits multiplies
//! unsigned codes by signed activations and adds pairs into int16.
//!
//! GEMV is that of `avx2_i2.rs`, of 16 packed bytes: two of the four fields are
//! masked where they stand, and one shift by 4 brings the others there. A tail
//! of 16, 32 or 48 bytes is whole registers. GEMM unpacks once for all tokens
//! within the blocking of `tiles.rs`, and multiplies four rows by two of them.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::generic::blocks::{BLOCK_BYTES, ROWS};
use super::super::generic::i2::{BLOCK_COLS, Cut, I2};
use super::super::{Kernel, Layout, PackedMatrix, Prepared};
use super::prefetch;
use super::tiles::{self, CHUNK, Codes};
use crate::cpu::Ssse3;

/// Blocks between two widenings of a GEMV. The bound: codes are 0 to 2 and
/// activations -128 to 127, so one `pmaddubsw` of fourfold codes lies in
/// [-2048, 2032]; a block adds eight of them to one sum (four registers, two
/// fields), and two blocks add up to -32768 at most, which int16 just holds.
/// Single codes stay a quarter of that.
const BLOCKS: usize = 2;

/// Columns between two widenings of a tile. The bound: one `pmaddubsw` of
/// single codes lies in [-512, 508], and 40 of them add up to -20480. All 80
/// of a chunk would not fit.
const PART: usize = CHUNK / 2;

/// Tokens of a tile: with four rows, 8 of the 16 registers are sums.
const TOKENS: usize = 2;

/// Bytes of a register.
const STEP: usize = 16;

/// Inputs from which on it pays to unpack (8 inputs: 50 instead of 47 GMAC/s;
/// 4: 40 instead of 49, on Zen 3).
const UNPACK: usize = 8;

pub(super) struct Ssse3I2(Ssse3);

impl Ssse3I2 {
    pub(super) fn new(proof: Ssse3) -> Self {
        Self(proof)
    }
}

impl Kernel for Ssse3I2 {
    fn name(&self) -> &'static str {
        "ssse3-i2"
    }

    fn layout(&self) -> &'static dyn Layout {
        &I2
    }

    fn gemv(&self, w: &PackedMatrix, rows: Range<usize>, x: &Prepared, y: &mut [f32]) {
        let _proof = self.0;
        // SAFETY: `self.0` proves that the CPU has SSSE3.
        unsafe { multiply(w, rows, std::slice::from_ref(x), &mut [y]) }
    }

    fn gemm(&self, w: &PackedMatrix, rows: Range<usize>, xs: &[Prepared], ys: &mut [&mut [f32]]) {
        let _proof = self.0;
        // SAFETY: `self.0` proves that the CPU has SSSE3.
        unsafe {
            if xs.len() < UNPACK {
                multiply(w, rows, xs, ys);
            } else {
                tiles::gemm((), w, rows, xs, ys, unpack, add_run);
            }
        }
    }
}

/// One input after the other for every row group, which stays in L1.
#[target_feature(enable = "ssse3")]
fn multiply(w: &PackedMatrix, rows: Range<usize>, xs: &[Prepared], ys: &mut [&mut [f32]]) {
    for first in rows.clone().step_by(ROWS) {
        let (group, at) = (w.group(first), first - rows.start);
        for (x, y) in xs.iter().zip(ys.iter_mut()) {
            for (y, sum) in y[at..].iter_mut().zip(dot(group, x)) {
                *y = x.rescale(sum - x.sum, w.scale);
            }
        }
    }
}

/// Sums over codes of a row group.
#[target_feature(enable = "ssse3")]
#[inline]
fn dot(group: &[u8], x: &Prepared) -> [i32; ROWS] {
    let cut = Cut::new(x.cols);
    let (full, tail) = group.split_at(cut.blocks * ROWS * BLOCK_BYTES);
    let full = full.as_chunks::<{ ROWS * BLOCK_BYTES }>().0;
    let (q, q_tail) = x.padded().split_at(cut.blocks * BLOCK_COLS);
    let q = q.as_chunks::<BLOCK_COLS>().0;
    let mut sums = [_mm_setzero_si128(); ROWS];
    for (blocks, q) in full.chunks(BLOCKS).zip(q.chunks(BLOCKS)) {
        let mut acc = [[_mm_setzero_si128(); 2]; ROWS];
        for (block, q) in blocks.iter().zip(q) {
            prefetch(block);
            add_block(&mut acc, block, BLOCK_BYTES, q);
        }
        widen(&mut sums, acc);
    }
    if cut.tail != 0 {
        let mut acc = [[_mm_setzero_si128(); 2]; ROWS];
        add_block(&mut acc, tail, cut.tail, q_tail);
        widen(&mut sums, acc);
    }
    // Exact: all terms are fourfold.
    for i in 0..ROWS {
        sums[i] = _mm_srai_epi32::<2>(sums[i]);
    }
    add_lanes(sums)
}

/// Adds the products of one block: `bytes` of each row, whose fields are
/// `bytes` columns apart.
#[target_feature(enable = "ssse3")]
#[inline]
fn add_block(acc: &mut [[__m128i; 2]; ROWS], block: &[u8], bytes: usize, q: &[i8]) {
    let single = _mm_set1_epi8(3);
    let fourfold = _mm_set1_epi8(12);
    for at in (0..bytes).step_by(STEP) {
        let mut qs = [_mm_setzero_si128(); 4];
        for f in 0..4 {
            qs[f] = load_i8(q, f * bytes + at);
        }
        for i in 0..ROWS {
            let low = load(block, i * bytes + at);
            let high = _mm_srli_epi16::<4>(low);
            for (c, q) in [(low, [qs[0], qs[1]]), (high, [qs[2], qs[3]])] {
                let [a, b] = &mut acc[i];
                *a = _mm_add_epi16(*a, _mm_maddubs_epi16(_mm_and_si128(c, single), q[0]));
                *b = _mm_add_epi16(*b, _mm_maddubs_epi16(_mm_and_si128(c, fourfold), q[1]));
            }
        }
    }
}

/// Adds int16 sums of single and fourfold codes to int32 sums of fourfold ones.
#[target_feature(enable = "ssse3")]
#[inline]
fn widen(sums: &mut [__m128i; ROWS], acc: [[__m128i; 2]; ROWS]) {
    let one = _mm_set1_epi16(1);
    let four = _mm_set1_epi16(4);
    for i in 0..ROWS {
        let single = _mm_madd_epi16(acc[i][0], four);
        let fourfold = _mm_madd_epi16(acc[i][1], one);
        sums[i] = _mm_add_epi32(sums[i], _mm_add_epi32(single, fourfold));
    }
}

/// The sums of the int32 lanes of four registers.
#[target_feature(enable = "ssse3")]
#[inline]
fn add_lanes(v: [__m128i; ROWS]) -> [i32; ROWS] {
    let v = _mm_hadd_epi32(_mm_hadd_epi32(v[0], v[1]), _mm_hadd_epi32(v[2], v[3]));
    let mut sums = [0; ROWS];
    // SAFETY: the array has the 16 bytes that are written; no alignment is needed.
    unsafe { _mm_storeu_si128(sums.as_mut_ptr().cast(), v) };
    sums
}

/// [`tiles::UnpackCodes`] of this layout.
#[target_feature(enable = "ssse3")]
fn unpack(group: &[u8], cols: usize, start: usize, out: &mut Codes) {
    let cut = Cut::new(cols);
    let low = _mm_set1_epi8(3);
    let first = start / BLOCK_COLS;
    let blocks = (cut.blocks + usize::from(cut.tail > 0) - first).min(CHUNK / BLOCK_COLS);
    for b in 0..blocks {
        for i in 0..ROWS {
            let block = &group[cut.block(first + b, i)];
            let out = &mut out[i][b * BLOCK_COLS..];
            for at in (0..block.len()).step_by(STEP) {
                let mut codes = load(block, at);
                for f in 0..4 {
                    store(out, f * block.len() + at, _mm_and_si128(codes, low));
                    codes = _mm_srli_epi16::<2>(codes);
                }
            }
        }
    }
}

/// The [`tiles::AddRun`] of this tile.
#[target_feature(enable = "ssse3")]
fn add_run(
    _: (),
    codes: &Codes,
    xs: &[Prepared],
    start: usize,
    cols: usize,
    sums: &mut [[i32; ROWS]],
) {
    for (xs, sums) in xs.chunks(TOKENS).zip(sums.chunks_mut(TOKENS)) {
        for part in (0..cols).step_by(PART) {
            let columns = part..cols.min(part + PART);
            match xs {
                [a, b] => add_tile(codes, [a, b], start, columns, sums),
                [a] => add_tile(codes, [a], start, columns, sums),
                _ => unreachable!("chunks of {TOKENS}"),
            }
        }
    }
}

/// Adds the products of a tile of four rows and `T` tokens over some columns
/// of a chunk, which begins at column `start` of the activations.
#[target_feature(enable = "ssse3")]
#[inline]
fn add_tile<const T: usize>(
    codes: &Codes,
    xs: [&Prepared; T],
    start: usize,
    columns: Range<usize>,
    sums: &mut [[i32; ROWS]],
) {
    let steps = columns.len().div_ceil(STEP);
    let mut q: [&[[i8; STEP]]; T] = [&[]; T];
    for t in 0..T {
        q[t] = &xs[t].padded()[start + columns.start..].as_chunks().0[..steps];
    }
    let mut c: [&[[u8; STEP]]; ROWS] = [&[]; ROWS];
    for i in 0..ROWS {
        c[i] = &codes[i][columns.start..].as_chunks().0[..steps];
    }
    let mut acc = [[_mm_setzero_si128(); T]; ROWS];
    for s in 0..steps {
        let mut qs = [_mm_setzero_si128(); T];
        for t in 0..T {
            qs[t] = load_i8(&q[t][s], 0);
        }
        for i in 0..ROWS {
            let code = load(&c[i][s], 0);
            for t in 0..T {
                acc[i][t] = _mm_add_epi16(acc[i][t], _mm_maddubs_epi16(code, qs[t]));
            }
        }
    }
    let one = _mm_set1_epi16(1);
    for t in 0..T {
        let mut wide = [_mm_setzero_si128(); ROWS];
        for i in 0..ROWS {
            wide[i] = _mm_madd_epi16(acc[i][t], one);
        }
        let found = add_lanes(wide);
        for i in 0..ROWS {
            sums[t][i] += found[i];
        }
    }
}

/// Loads 16 packed bytes or codes that begin at `at`.
#[target_feature(enable = "ssse3")]
#[inline]
fn load(bytes: &[u8], at: usize) -> __m128i {
    let bytes: &[u8; STEP] = bytes[at..].first_chunk().expect("blocks are whole registers");
    // SAFETY: the array has the 16 bytes that are read; the load needs no alignment.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

/// Loads 16 activations that begin at `at`.
#[target_feature(enable = "ssse3")]
#[inline]
fn load_i8(q: &[i8], at: usize) -> __m128i {
    let q: &[i8; STEP] = q[at..].first_chunk().expect("Prepared pads its values by 64");
    // SAFETY: as in `load`.
    unsafe { _mm_loadu_si128(q.as_ptr().cast()) }
}

/// Stores 16 codes that begin at `at`.
#[target_feature(enable = "ssse3")]
#[inline]
fn store(out: &mut [u8], at: usize, v: __m128i) {
    let out: &mut [u8; STEP] = out[at..].first_chunk_mut().expect("chunks hold whole blocks");
    // SAFETY: the array has the 16 bytes that are written; no alignment is needed.
    unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), v) }
}
