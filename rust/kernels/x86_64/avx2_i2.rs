//! i2 with AVX2. `vpmaddubsw` multiplies unsigned codes by signed activations
//! and adds pairs into int16; sums widen to int32 before they can overflow.
//!
//! The bound: codes are 0, 1 or 2 and activations -128 to 127, so one
//! `vpmaddubsw` result lies in [-512, 508]. 64 of them reach -32768 and still
//! fit; [`STEPS`] registers of four fields each make 32, half of that.
//!
//! GEMV and GEMM are one tile of four rows and one or two tokens.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::generic::i2::{BLOCK_BYTES, BLOCK_COLS, Cut, I2, ROWS};
use super::super::{Kernel, Layout, PackedMatrix, Prepared};
use super::avx2_tile::{CHUNK, Codes, gemm_codes};
use crate::cpu::Avx2;

/// Registers of 32 packed bytes between two widenings.
const STEPS: usize = 8;

/// Tokens whose activations are walked over again for every row tile, as in
/// the AVX-512 kernel.
const TOKEN_BLOCK: usize = 64;

pub(super) struct Avx2I2(Avx2);

impl Avx2I2 {
    pub(super) fn new(proof: Avx2) -> Self {
        Self(proof)
    }
}

impl Kernel for Avx2I2 {
    fn name(&self) -> &'static str {
        "avx2-i2"
    }

    fn layout(&self) -> &'static dyn Layout {
        &I2
    }

    fn gemv(&self, w: &PackedMatrix, rows: Range<usize>, x: &Prepared, y: &mut [f32]) {
        let _proof = self.0;
        // SAFETY: `self.0` proves that the CPU has AVX2.
        unsafe { multiply::<1>(w, rows, std::slice::from_ref(x), &mut [y]) }
    }

    fn gemm(&self, w: &PackedMatrix, rows: Range<usize>, xs: &[Prepared], ys: &mut [&mut [f32]]) {
        let _proof = self.0;
        // SAFETY: as in `gemv`.
        unsafe { gemm_codes(w, rows, xs, ys, unpack) }
    }
}

/// Loads 32 bytes that begin at `at`.
#[target_feature(enable = "avx2")]
fn load<T: Byte>(bytes: &[T], at: usize) -> __m256i {
    let bytes: &[T; 32] = bytes[at..].first_chunk().expect("a padded slice");
    // SAFETY: the array has the 32 bytes that are read; the load needs no alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

/// What [`load`] may read: one-byte integers.
trait Byte {}
impl Byte for u8 {}
impl Byte for i8 {}

/// Four rows and `T` tokens at a time over `rows` and all of `xs`.
#[target_feature(enable = "avx2")]
fn multiply<const T: usize>(
    w: &PackedMatrix,
    rows: Range<usize>,
    xs: &[Prepared],
    ys: &mut [&mut [f32]],
) {
    for (xs, ys) in xs.chunks(TOKEN_BLOCK).zip(ys.chunks_mut(TOKEN_BLOCK)) {
        for first in rows.clone().step_by(ROWS) {
            let (group, at) = (w.group(first), first - rows.start);
            for (xs, ys) in xs.chunks(T).zip(ys.chunks_mut(T)) {
                // A tile that hangs over the edge computes its last token again.
                let inputs: [&Prepared; T] = std::array::from_fn(|t| &xs[t.min(xs.len() - 1)]);
                let sums = dot_tile(group, inputs);
                for (t, y) in ys.iter_mut().enumerate() {
                    for (y, sums) in y[at..].iter_mut().zip(sums) {
                        *y = inputs[t].rescale(sums[t] - inputs[t].sum, w.scale);
                    }
                }
            }
        }
    }
}

/// Sums over codes of a tile.
#[target_feature(enable = "avx2")]
#[inline]
fn dot_tile<const T: usize>(group: &[u8], xs: [&Prepared; T]) -> [[i32; T]; ROWS] {
    let cut = Cut::new(xs[0].cols);
    let qs: [&[i8]; T] = xs.map(Prepared::padded);
    let mut acc = [[_mm256_setzero_si256(); T]; ROWS];
    // Half blocks: 32 bytes, fields 64 columns apart.
    let halves = 2 * cut.blocks;
    let mut first = 0;
    while first < halves {
        let mut acc16 = [[_mm256_setzero_si256(); T]; ROWS];
        let end = halves.min(first + STEPS);
        for h in first..end {
            let (b, half) = (h / 2, h % 2 * 32);
            let codes: [__m256i; ROWS] =
                std::array::from_fn(|i| load(group, cut.block(b, i).start + half));
            tile_block(&mut acc16, codes, qs, b * BLOCK_COLS + half, BLOCK_BYTES);
        }
        widen(&mut acc, acc16);
        first = end;
    }
    if cut.tail != 0 {
        // Zero bytes after the tail: their products are zero whatever they meet.
        let mut padded = [[0u8; BLOCK_BYTES]; ROWS];
        for i in 0..ROWS {
            padded[i][..cut.tail].copy_from_slice(&group[cut.block(cut.blocks, i)]);
        }
        let mut acc16 = [[_mm256_setzero_si256(); T]; ROWS];
        for half in 0..cut.tail.div_ceil(32) {
            let codes: [__m256i; ROWS] = std::array::from_fn(|i| load(&padded[i], half * 32));
            let at = cut.blocks * BLOCK_COLS + half * 32;
            tile_block(&mut acc16, codes, qs, at, cut.tail);
        }
        widen(&mut acc, acc16);
    }
    // Loops, not `map`: a closure that is not inlined loses the instruction set.
    let mut sums = [[0; T]; ROWS];
    for i in 0..ROWS {
        for t in 0..T {
            sums[i][t] = reduce(acc[i][t]);
        }
    }
    sums
}

/// Adds int16 sums to int32 sums.
#[target_feature(enable = "avx2")]
#[inline]
fn widen<const T: usize>(acc: &mut [[__m256i; T]; ROWS], acc16: [[__m256i; T]; ROWS]) {
    let ones = _mm256_set1_epi16(1);
    for i in 0..ROWS {
        for t in 0..T {
            acc[i][t] = _mm256_add_epi32(acc[i][t], _mm256_madd_epi16(acc16[i][t], ones));
        }
    }
}

/// Adds four fields of 32 columns, `step` columns apart from `at` on.
#[target_feature(enable = "avx2")]
#[inline]
fn tile_block<const T: usize>(
    acc16: &mut [[__m256i; T]; ROWS],
    codes: [__m256i; ROWS],
    qs: [&[i8]; T],
    at: usize,
    step: usize,
) {
    let low = _mm256_set1_epi8(3);
    let shifted: [[__m256i; 4]; ROWS] = codes.map(|c| {
        [c, _mm256_srli_epi16::<2>(c), _mm256_srli_epi16::<4>(c), _mm256_srli_epi16::<6>(c)]
    });
    for f in 0..4 {
        let q: [__m256i; T] = std::array::from_fn(|t| load(qs[t], at + f * step));
        for i in 0..ROWS {
            let field = _mm256_and_si256(shifted[i][f], low);
            for t in 0..T {
                acc16[i][t] = _mm256_add_epi16(acc16[i][t], _mm256_maddubs_epi16(field, q[t]));
            }
        }
    }
}

/// The sum of eight int32 lanes.
#[target_feature(enable = "avx2")]
#[inline]
fn reduce(v: __m256i) -> i32 {
    let v = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
    let v = _mm_add_epi32(v, _mm_shuffle_epi32::<0b00_00_11_10>(v));
    _mm_cvtsi128_si32(_mm_add_epi32(v, _mm_shuffle_epi32::<0b00_00_00_01>(v)))
}

/// Codes in the order of the columns.
#[target_feature(enable = "avx2")]
fn unpack(group: &[u8], cols: usize, start: usize, out: &mut Codes) {
    let cut = Cut::new(cols);
    let low = _mm256_set1_epi8(3);
    let first = start / BLOCK_COLS;
    let full = (cut.blocks - first).min(CHUNK / BLOCK_COLS);
    for b in 0..full {
        for i in 0..ROWS {
            let block = cut.block(first + b, i).start;
            let out: &mut [[u8; 32]] = out[i][b * BLOCK_COLS..][..BLOCK_COLS].as_chunks_mut().0;
            for half in 0..2 {
                let c = load(group, block + 32 * half);
                store(&mut out[half], _mm256_and_si256(c, low));
                store(&mut out[half + 2], _mm256_and_si256(_mm256_srli_epi16::<2>(c), low));
                store(&mut out[half + 4], _mm256_and_si256(_mm256_srli_epi16::<4>(c), low));
                store(&mut out[half + 6], _mm256_and_si256(_mm256_srli_epi16::<6>(c), low));
            }
        }
    }
    if full < CHUNK / BLOCK_COLS {
        for i in 0..ROWS {
            let block = &group[cut.block(cut.blocks, i)];
            let out = &mut out[i][full * BLOCK_COLS..];
            for (j, byte) in block.iter().enumerate() {
                for field in 0..4 {
                    out[field * cut.tail + j] = byte >> (2 * field) & 3;
                }
            }
        }
    }
}

/// Stores 32 bytes.
#[target_feature(enable = "avx2")]
fn store(bytes: &mut [u8; 32], v: __m256i) {
    // SAFETY: the array has the 32 bytes that are written; no alignment is needed.
    unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), v) }
}
