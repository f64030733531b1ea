//! i2 with AVX-512 VNNI. `vpdpbusd` multiplies unsigned codes by signed
//! activations and adds four products to an int32 lane.
//!
//! GEMV masks a 2-bit field without shifting it, so that a code comes out as
//! `code * 4^field`, an unsigned byte of at most 128; each field has its own
//! accumulator, and the four sums are shifted right by `2 * field` at the end,
//! which is exact, since every term is a multiple. Four rows share the loads
//! of the activations: 16 chains hide the 4 cycles that `vpdpbusd` takes.
//! A lane grows by at most 4 * 128 * 128 = 2^16 a block, and there are at most
//! 512 blocks (`MAX_COLS`): below 2^26.
//!
//! GEMM shifts and masks a field once for a tile of 4 rows x 4 tokens, so one
//! accumulator for each pair is enough.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::generic::i2::{BLOCK_BYTES, BLOCK_COLS, Cut, I2, ROWS};
use super::super::{Kernel, Layout, PackedMatrix, Prepared};
use crate::cpu::Avx512;

/// Tokens of a GEMM tile: with four rows, 16 accumulators, 4 packed and 4
/// unpacked registers of the 32.
const TOKENS: usize = 4;

/// Tokens whose activations are walked over again for every row tile: 64 of
/// 2560 to 6912 columns stay in a 1 MB L2.
const TOKEN_BLOCK: usize = 64;

pub(super) struct Avx512I2(Avx512);

impl Avx512I2 {
    pub(super) fn new(proof: Avx512) -> Self {
        Self(proof)
    }
}

impl Kernel for Avx512I2 {
    fn name(&self) -> &'static str {
        "avx512-i2"
    }

    fn layout(&self) -> &'static dyn Layout {
        &I2
    }

    fn gemv(&self, w: &PackedMatrix, rows: Range<usize>, x: &Prepared, y: &mut [f32]) {
        let _proof = self.0;
        // SAFETY: `self.0` proves that the CPU has AVX-512 F, BW, VL and VNNI.
        unsafe { gemv(w, rows, x, y) }
    }

    fn gemm(&self, w: &PackedMatrix, rows: Range<usize>, xs: &[Prepared], ys: &mut [&mut [f32]]) {
        let _proof = self.0;
        // SAFETY: as in `gemv`.
        unsafe { gemm(w, rows, xs, ys) }
    }
}

/// Loads 64 bytes.
#[target_feature(enable = "avx512f")]
fn load(bytes: &[u8; 64]) -> __m512i {
    // SAFETY: the array has the 64 bytes that are read; the load needs no alignment.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

/// Loads 64 activations that begin at `at`.
#[target_feature(enable = "avx512f")]
fn load_q(q: &[i8], at: usize) -> __m512i {
    let q: &[i8; 64] = q[at..].first_chunk().expect("Prepared pads its values by 64");
    // SAFETY: the array has the 64 bytes that are read; the load needs no alignment.
    unsafe { _mm512_loadu_si512(q.as_ptr().cast()) }
}

/// Loads a tail block of at most 64 bytes, followed by zeros: their products
/// are zero whatever activation they meet.
#[target_feature(enable = "avx512f,avx512bw")]
fn load_tail(bytes: &[u8]) -> __m512i {
    assert!(bytes.len() <= 64);
    let mask = u64::MAX.checked_shr(64 - bytes.len() as u32).unwrap_or(0);
    // SAFETY: only the bytes under the mask are read, and `bytes` has them.
    unsafe { _mm512_maskz_loadu_epi8(mask, bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn gemv(w: &PackedMatrix, rows: Range<usize>, x: &Prepared, y: &mut [f32]) {
    for (y, first) in y.chunks_mut(ROWS).zip(rows.step_by(ROWS)) {
        let sums = dot_masked(w.group(first), x);
        for (y, sum) in y.iter_mut().zip(sums) {
            *y = x.rescale(sum - x.sum, w.scale);
        }
    }
}

/// Sums over codes of a group of rows: fields masked in place, shifted at the
/// end.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn dot_masked(group: &[u8], x: &Prepared) -> [i32; ROWS] {
    let masks: [__m512i; 4] = std::array::from_fn(|f| _mm512_set1_epi8((3u8 << (2 * f)) as i8));
    let mut acc = [[_mm512_setzero_si512(); 4]; ROWS];
    let cut = Cut::new(x.cols);
    let q = x.padded();
    let (full, _) = group[..cut.blocks * ROWS * BLOCK_BYTES].as_chunks::<BLOCK_BYTES>();
    let (full, _) = full.as_chunks::<ROWS>();
    for (codes, q) in full.iter().zip(q.as_chunks::<BLOCK_COLS>().0) {
        let qs: [__m512i; 4] = std::array::from_fn(|f| load_q(q, f * BLOCK_BYTES));
        for i in 0..ROWS {
            let codes = load(&codes[i]);
            for f in 0..4 {
                acc[i][f] =
                    _mm512_dpbusd_epi32(acc[i][f], _mm512_and_si512(codes, masks[f]), qs[f]);
            }
        }
    }
    if cut.tail != 0 {
        for i in 0..ROWS {
            let codes = load_tail(&group[cut.block(cut.blocks, i)]);
            for f in 0..4 {
                let q = load_q(q, cut.blocks * BLOCK_COLS + f * cut.tail);
                acc[i][f] = _mm512_dpbusd_epi32(acc[i][f], _mm512_and_si512(codes, masks[f]), q);
            }
        }
    }
    let mut sums = [0; ROWS];
    for i in 0..ROWS {
        let [a, b, c, d] = acc[i];
        // Lane by lane: each lane of field f is a multiple of 4^f.
        let ab = _mm512_add_epi32(a, _mm512_srai_epi32::<2>(b));
        let cd = _mm512_add_epi32(_mm512_srai_epi32::<4>(c), _mm512_srai_epi32::<6>(d));
        sums[i] = _mm512_reduce_add_epi32(_mm512_add_epi32(ab, cd));
    }
    sums
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn gemm(w: &PackedMatrix, rows: Range<usize>, xs: &[Prepared], ys: &mut [&mut [f32]]) {
    for (xs, ys) in xs.chunks(TOKEN_BLOCK).zip(ys.chunks_mut(TOKEN_BLOCK)) {
        for first in rows.clone().step_by(ROWS) {
            let (group, at) = (w.group(first), first - rows.start);
            for (xs, ys) in xs.chunks(TOKENS).zip(ys.chunks_mut(TOKENS)) {
                // A tile that hangs over the edge computes its last token again.
                let inputs: [&Prepared; TOKENS] = std::array::from_fn(|t| &xs[t.min(xs.len() - 1)]);
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

/// Sums over codes of a tile: a field of each row is shifted and masked once
/// for all its tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn dot_tile(group: &[u8], xs: [&Prepared; TOKENS]) -> [[i32; TOKENS]; ROWS] {
    let mut acc = [[_mm512_setzero_si512(); TOKENS]; ROWS];
    let cut = Cut::new(xs[0].cols);
    let blocks = cut.blocks;
    let qs: [&[i8]; TOKENS] = xs.map(Prepared::padded);
    let full_q: [&[[i8; BLOCK_COLS]]; TOKENS] =
        qs.map(|q| &q.as_chunks::<BLOCK_COLS>().0[..blocks]);
    let (full, _) = group[..blocks * ROWS * BLOCK_BYTES].as_chunks::<BLOCK_BYTES>();
    for (b, codes) in full.as_chunks::<ROWS>().0.iter().enumerate() {
        let codes: [__m512i; ROWS] = std::array::from_fn(|i| load(&codes[i]));
        let q: [&[i8]; TOKENS] = std::array::from_fn(|t| &full_q[t][b][..]);
        tile_block(&mut acc, codes, q, BLOCK_BYTES);
    }
    if cut.tail != 0 {
        let codes: [__m512i; ROWS] =
            std::array::from_fn(|i| load_tail(&group[cut.block(blocks, i)]));
        let q: [&[i8]; TOKENS] = std::array::from_fn(|t| &qs[t][blocks * BLOCK_COLS..]);
        tile_block(&mut acc, codes, q, cut.tail);
    }
    // Loops, not `map`: a closure that is not inlined loses the instruction set.
    let mut sums = [[0; TOKENS]; ROWS];
    for i in 0..ROWS {
        for t in 0..TOKENS {
            sums[i][t] = _mm512_reduce_add_epi32(acc[i][t]);
        }
    }
    sums
}

/// Adds one block, whose fields are `step` columns apart.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn tile_block(
    acc: &mut [[__m512i; TOKENS]; ROWS],
    codes: [__m512i; ROWS],
    q: [&[i8]; TOKENS],
    step: usize,
) {
    let low = _mm512_set1_epi8(3);
    let shifted: [[__m512i; 4]; ROWS] = codes.map(|c| {
        [c, _mm512_srli_epi16::<2>(c), _mm512_srli_epi16::<4>(c), _mm512_srli_epi16::<6>(c)]
    });
    for f in 0..4 {
        let qs: [__m512i; TOKENS] = std::array::from_fn(|t| load_q(q[t], f * step));
        for i in 0..ROWS {
            let field = _mm512_and_si512(shifted[i][f], low);
            for t in 0..TOKENS {
                acc[i][t] = _mm512_dpbusd_epi32(acc[i][t], field, qs[t]);
            }
        }
    }
}
