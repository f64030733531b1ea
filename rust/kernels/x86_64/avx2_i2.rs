//! i2 with AVX2. `vpmaddubsw` multiplies unsigned codes by signed activations
//! and adds pairs into int16; sums widen to int32 before they can overflow.
//!
//! GEMV masks the fields 0 and 1 of a register where they stand, so that the
//! codes of field 1 come out times 4, and has two sums a row, of single and of
//! fourfold codes. One shift by 4 brings the fields 2 and 3 to the same place:
//!
//! ```text
//! for 32 packed bytes c of each of four rows:      128 weights
//!   single   += maddubs(c & 3, q0)      fourfold += maddubs(c & 12, q1)
//!   c >>= 4
//!   single   += maddubs(c & 3, q2)      fourfold += maddubs(c & 12, q3)
//! every 8 registers: sum += 4 * single + fourfold, in int32
//! ```
//!
//! That is 13 instructions for 128 weights besides loads, on four pipes: 39
//! weights a cycle at best. Measured from cache on Zen 3: 31 (100 Gweights/s),
//! where shifting each field to the bottom, 15 instructions and more
//! widenings, reached 20. From memory it is as fast as reading.
//!
//! Several tokens are multiplied together: `avx2_i2_runs.rs`.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::generic::blocks::{BLOCK_BYTES, ROWS};
use super::super::generic::i2::{BLOCK_COLS, Cut, I2};
use super::super::{Kernel, Layout, PackedMatrix, Part, Prepared};
use super::avx2_i2_runs::gemm_parts;
use super::avx2_tile::{CHUNK, Codes, add_lanes, load, load_i8};
use super::prefetch;
use crate::cpu::Avx2;

/// Blocks between two widenings. The bound: codes are 0 to 2 and activations
/// -128 to 127, so one `vpmaddubsw` of fourfold codes lies in [-2048, 2032];
/// a block adds four of them to one sum (two registers, two fields), and four
/// blocks add up to -32768 at most, which int16 just holds. Single codes stay
/// a quarter of that.
const BLOCKS: usize = 4;

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
        unsafe { multiply(w, rows, x, y) }
    }

    fn gemm(&self, w: &PackedMatrix, rows: Range<usize>, xs: &[Prepared], ys: &mut [&mut [f32]]) {
        let ys = ys.iter_mut().map(|y| &mut **y).collect();
        self.gemm_parts(&mut [Part { w, rows, ys }], xs);
    }

    fn gemm_parts(&self, parts: &mut [Part<'_>], xs: &[Prepared]) {
        let _proof = self.0;
        if let [x] = xs {
            for Part { w, rows, ys } in parts {
                self.gemv(w, rows.clone(), x, ys[0]);
            }
            return;
        }
        // SAFETY: as in `gemv`.
        unsafe { gemm_parts(parts, xs) }
    }
}

#[target_feature(enable = "avx2")]
fn multiply(w: &PackedMatrix, rows: Range<usize>, x: &Prepared, y: &mut [f32]) {
    for (first, y) in rows.step_by(ROWS).zip(y.chunks_mut(ROWS)) {
        for (y, sum) in y.iter_mut().zip(dot(w.group(first), x)) {
            *y = x.rescale(sum - x.sum, w.scale);
        }
    }
}

/// Sums over codes of a row group.
#[target_feature(enable = "avx2")]
#[inline]
fn dot(group: &[u8], x: &Prepared) -> [i32; ROWS] {
    let cut = Cut::new(x.cols);
    let (full, tail) = group.split_at(cut.blocks * ROWS * BLOCK_BYTES);
    let full = full.as_chunks::<{ ROWS * BLOCK_BYTES }>().0;
    let (q, q_tail) = x.padded().split_at(cut.blocks * BLOCK_COLS);
    let q = q.as_chunks::<BLOCK_COLS>().0;
    let mut sums = [_mm256_setzero_si256(); ROWS];
    for (blocks, q) in full.chunks(BLOCKS).zip(q.chunks(BLOCKS)) {
        let mut acc = [[_mm256_setzero_si256(); 2]; ROWS];
        for (block, q) in blocks.iter().zip(q) {
            prefetch(block);
            let (c, q) = (block.as_chunks().0, q.as_chunks().0);
            for h in 0..2 {
                let codes = [&c[h], &c[h + 2], &c[h + 4], &c[h + 6]];
                add_register(&mut acc, codes, [&q[h], &q[h + 2], &q[h + 4], &q[h + 6]]);
            }
        }
        widen(&mut sums, acc);
    }
    if cut.tail != 0 {
        let mut acc = [[_mm256_setzero_si256(); 2]; ROWS];
        for at in (0..cut.tail).step_by(32) {
            let n = (cut.tail - at).min(32);
            // Zero codes after the tail: their products are zero whatever they meet.
            let mut codes = [[0; 32]; ROWS];
            for i in 0..ROWS {
                codes[i][..n].copy_from_slice(&tail[i * cut.tail + at..][..n]);
            }
            let mut q = [&[0; 32]; 4];
            for f in 0..4 {
                let columns = &q_tail[f * cut.tail + at..];
                q[f] = columns.first_chunk().expect("Prepared pads its values by 64");
            }
            add_register(&mut acc, codes.each_ref(), q);
        }
        widen(&mut sums, acc);
    }
    // Exact: all terms are fourfold.
    for i in 0..ROWS {
        sums[i] = _mm256_srai_epi32::<2>(sums[i]);
    }
    add_lanes(sums)
}

/// Adds the products of 32 bytes of each row and their four fields' columns.
#[target_feature(enable = "avx2")]
#[inline]
fn add_register(acc: &mut [[__m256i; 2]; ROWS], codes: [&[u8; 32]; ROWS], q: [&[i8; 32]; 4]) {
    let single = _mm256_set1_epi8(3);
    let fourfold = _mm256_set1_epi8(12);
    let mut qs = [_mm256_setzero_si256(); 4];
    for f in 0..4 {
        qs[f] = load_i8(q[f]);
    }
    for i in 0..ROWS {
        let low = load(codes[i]);
        let high = _mm256_srli_epi16::<4>(low);
        for (c, q) in [(low, [qs[0], qs[1]]), (high, [qs[2], qs[3]])] {
            let [a, b] = &mut acc[i];
            *a = _mm256_add_epi16(*a, _mm256_maddubs_epi16(_mm256_and_si256(c, single), q[0]));
            *b = _mm256_add_epi16(*b, _mm256_maddubs_epi16(_mm256_and_si256(c, fourfold), q[1]));
        }
    }
}

/// Adds int16 sums of single and fourfold codes to int32 sums of fourfold ones.
#[target_feature(enable = "avx2")]
#[inline]
fn widen(sums: &mut [__m256i; ROWS], acc: [[__m256i; 2]; ROWS]) {
    let one = _mm256_set1_epi16(1);
    let four = _mm256_set1_epi16(4);
    for i in 0..ROWS {
        let single = _mm256_madd_epi16(acc[i][0], four);
        let fourfold = _mm256_madd_epi16(acc[i][1], one);
        sums[i] = _mm256_add_epi32(sums[i], _mm256_add_epi32(single, fourfold));
    }
}

/// [`UnpackCodes`](super::avx2_tile::UnpackCodes) of this layout.
#[target_feature(enable = "avx2")]
pub(super) fn unpack(group: &[u8], cols: usize, start: usize, out: &mut Codes) {
    let cut = Cut::new(cols);
    let low = _mm256_set1_epi8(3);
    let first = start / BLOCK_COLS;
    let full = (cut.blocks - first).min(CHUNK / BLOCK_COLS);
    for b in 0..full {
        for i in 0..ROWS {
            let block = group[cut.block(first + b, i)].as_chunks().0;
            let out = out[i][b * BLOCK_COLS..][..BLOCK_COLS].as_chunks_mut().0;
            for half in 0..2 {
                let c = load(&block[half]);
                store(&mut out[half], _mm256_and_si256(c, low));
                store(&mut out[half + 2], _mm256_and_si256(_mm256_srli_epi16::<2>(c), low));
                store(&mut out[half + 4], _mm256_and_si256(_mm256_srli_epi16::<4>(c), low));
                store(&mut out[half + 6], _mm256_and_si256(_mm256_srli_epi16::<6>(c), low));
            }
        }
    }
    if full < CHUNK / BLOCK_COLS {
        for i in 0..ROWS {
            let out = &mut out[i][full * BLOCK_COLS..];
            for (j, byte) in group[cut.block(cut.blocks, i)].iter().enumerate() {
                for f in 0..4 {
                    out[f * cut.tail + j] = byte >> (2 * f) & 3;
                }
            }
        }
    }
}

/// Stores 32 codes.
#[target_feature(enable = "avx2")]
#[inline]
fn store(bytes: &mut [u8; 32], v: __m256i) {
    // SAFETY: the array has the 32 bytes that are written; no alignment is needed.
    unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), v) }
}
