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
//! A few inputs shift and mask a field once for a tile of 4 rows and all of
//! them, so one accumulator for each pair is enough. More are worth unpacking
//! the codes (`avx512_tile.rs`).
//!
//! Arrays are filled by loops, not by `map` and `from_fn`: a closure that is not
//! inlined loses the instruction set, and a call saves all registers.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::generic::blocks::{BLOCK_BYTES, ROWS};
use super::super::generic::i2::{BLOCK_COLS, Cut, I2};
use super::super::{Kernel, Layout, PackedMatrix, Prepared};
use super::avx512_tile::{CHUNK, Codes, gemm_codes};
use super::prefetch;
use crate::cpu::Avx512;

/// Most tokens that a tile multiplies without unpacked codes: with four rows,
/// 16 accumulators, 4 packed and 4 unpacked registers of the 32. By count, 64
/// `vpdpbusd` and 28 other instructions a block, the tile of unpacked codes
/// comes after 128 to unpack and store (a store takes two cycles on Zen 4)
/// and pays from five tokens on.
const TOKENS: usize = 4;

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
    let masks = [
        _mm512_set1_epi8(0b11),
        _mm512_set1_epi8(0b11 << 2),
        _mm512_set1_epi8(0b11 << 4),
        _mm512_set1_epi8((0b11u8 << 6) as i8),
    ];
    let mut acc = [[_mm512_setzero_si512(); 4]; ROWS];
    let cut = Cut::new(x.cols);
    let q = x.padded();
    let (full, _) = group[..cut.blocks * ROWS * BLOCK_BYTES].as_chunks::<BLOCK_BYTES>();
    let (full, _) = full.as_chunks::<ROWS>();
    for (codes, q) in full.iter().zip(q.as_chunks::<BLOCK_COLS>().0) {
        prefetch(codes.as_flattened());
        let mut qs = [_mm512_setzero_si512(); 4];
        for f in 0..4 {
            qs[f] = load_q(q, f * BLOCK_BYTES);
        }
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
    match xs {
        [a, b] => gemm_few(w, rows, [a, b], ys),
        [a, b, c] => gemm_few(w, rows, [a, b, c], ys),
        [a, b, c, d] => gemm_few(w, rows, [a, b, c, d], ys),
        // SAFETY: `unpack` has the features of this function.
        _ => unsafe { gemm_codes(w, rows, xs, ys, unpack) },
    }
}

/// Up to [`TOKENS`] inputs.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn gemm_few<const T: usize>(
    w: &PackedMatrix,
    rows: Range<usize>,
    xs: [&Prepared; T],
    ys: &mut [&mut [f32]],
) {
    const { assert!(T <= TOKENS) };
    for first in rows.clone().step_by(ROWS) {
        let sums = dot_tile(w.group(first), xs);
        for (t, y) in ys.iter_mut().enumerate() {
            for (y, sums) in y[first - rows.start..].iter_mut().zip(sums) {
                *y = xs[t].rescale(sums[t] - xs[t].sum, w.scale);
            }
        }
    }
}

/// [`UnpackCodes`](super::avx512_tile::UnpackCodes) of this layout.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn unpack(group: &[u8], cols: usize, start: usize, out: &mut Codes) {
    let cut = Cut::new(cols);
    let low = _mm512_set1_epi8(3);
    let first = start / BLOCK_COLS;
    let full = (cut.blocks - first).min(CHUNK / BLOCK_COLS);
    for b in 0..full {
        for i in 0..ROWS {
            let block = group[cut.block(first + b, i)].first_chunk().expect("a full block");
            let mut codes = load(block);
            let out = out[i][b * BLOCK_COLS..][..BLOCK_COLS].as_chunks_mut().0;
            for f in 0..4 {
                store(&mut out[f], _mm512_and_si512(codes, low));
                codes = _mm512_srli_epi16::<2>(codes);
            }
        }
    }
    if full < CHUNK / BLOCK_COLS && cut.tail != 0 {
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

/// Stores 64 codes.
#[target_feature(enable = "avx512f")]
#[inline]
fn store(bytes: &mut [u8; 64], v: __m512i) {
    // SAFETY: the array has the 64 bytes that are written; no alignment is needed.
    unsafe { _mm512_storeu_si512(bytes.as_mut_ptr().cast(), v) }
}

/// Sums over codes of a tile: a field of each row is shifted and masked once
/// for all its tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn dot_tile<const T: usize>(group: &[u8], xs: [&Prepared; T]) -> [[i32; T]; ROWS] {
    let cut = Cut::new(xs[0].cols);
    let (full, tail) = group.split_at(cut.blocks * ROWS * BLOCK_BYTES);
    let full = full.as_chunks::<{ ROWS * BLOCK_BYTES }>().0;
    let mut q: [&[[i8; BLOCK_COLS]]; T] = [&[]; T];
    for t in 0..T {
        q[t] = &xs[t].padded().as_chunks().0[..full.len()];
    }
    let mut acc = [[_mm512_setzero_si512(); T]; ROWS];
    for b in 0..full.len() {
        let block = full[b].as_chunks::<BLOCK_BYTES>().0;
        let mut codes = [_mm512_setzero_si512(); ROWS];
        for i in 0..ROWS {
            codes[i] = load(&block[i]);
        }
        let mut columns: [&[i8]; T] = [&[]; T];
        for t in 0..T {
            columns[t] = &q[t][b];
        }
        tile_block(&mut acc, codes, columns, BLOCK_BYTES);
    }
    if cut.tail != 0 {
        let mut codes = [_mm512_setzero_si512(); ROWS];
        for i in 0..ROWS {
            codes[i] = load_tail(&tail[i * cut.tail..][..cut.tail]);
        }
        let mut columns: [&[i8]; T] = [&[]; T];
        for t in 0..T {
            columns[t] = &xs[t].padded()[cut.blocks * BLOCK_COLS..];
        }
        tile_block(&mut acc, codes, columns, cut.tail);
    }
    let mut sums = [[0; T]; ROWS];
    for i in 0..ROWS {
        for t in 0..T {
            sums[i][t] = _mm512_reduce_add_epi32(acc[i][t]);
        }
    }
    sums
}

/// Adds one block, whose fields are `step` columns apart.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn tile_block<const T: usize>(
    acc: &mut [[__m512i; T]; ROWS],
    mut codes: [__m512i; ROWS],
    q: [&[i8]; T],
    step: usize,
) {
    let low = _mm512_set1_epi8(3);
    for f in 0..4 {
        let mut qs = [_mm512_setzero_si512(); T];
        for t in 0..T {
            qs[t] = load_q(q[t], f * step);
        }
        for i in 0..ROWS {
            let field = _mm512_and_si512(codes[i], low);
            codes[i] = _mm512_srli_epi16::<2>(codes[i]);
            for t in 0..T {
                acc[i][t] = _mm512_dpbusd_epi32(acc[i][t], field, qs[t]);
            }
        }
    }
}
