//! t5 with `vpdpbusd` on 256 bits, in either of its encodings
//! (`avxvnni_tile.rs` says how).
//!
//! Bytes are decoded as in `avx2_t5.rs`. Codes, masked where they stand, are
//! multiplied by activations and added to int32 lanes, so that nothing widens:
//!
//! ```text
//! for 32 packed bytes p of a row:                  160 weights
//!   x, y = decode(p)                               12 instructions
//!   single      = dpbusd(dpbusd(single, y & 3, qa), x & 3, qc)
//!   fourfold    = dpbusd(dpbusd(fourfold, y & 12, qb), x & 12, qd)
//!   sixteenfold = dpbusd(sixteenfold, x & 48, qe)
//! ```
//!
//! 22 instructions for 160 weights. A row is multiplied by [`WINDOW`] blocks
//! before the next one, because three sums of four rows do not fit 16
//! registers; single and fourfold codes have two sums each, so that `vpdpbusd`
//! (4 or 5 cycles) is waited for once a register and not twice.
//!
//! The bound: a code times 16 is at most 32, so a lane of a window grows by at
//! most 8 * 4 * 32 * 128 = 2^17, and a row has at most 103 windows
//! (`MAX_COLS` / 1280): the sums of all fields, divided by their factors, stay
//! below 2 * 128 * `MAX_COLS` = 2^25. Shifts divide exactly, because every term
//! is a multiple.
//!
//! GEMM unpacks once for all tokens, with the AVX2 that both encodings imply. By
//! count on three pipes, for 1280 columns of four rows: a GEMV takes 240 cycles,
//! unpacking 290 and the tile 80 for every token, so that it pays from two on.

use std::arch::x86_64::*;
use std::array::from_ref;
use std::ops::Range;

use super::super::generic::blocks::ROWS;
use super::super::generic::t5::{Cut, T5};
use super::super::{Kernel, Layout, PackedMatrix, Prepared};
use super::avx2_t5::{
    Block, Columns, Decoder, WINDOW, full_columns, tail_blocks, tail_columns, unpack,
};
use super::avx2_tile::{add_lanes, load, load_i8};
use super::avxvnni_tile::{Dpbusd, gemm_codes};
use super::prefetch;
use crate::cpu::{AvxVnni, Evex, Vex};

pub(super) struct AvxVnniT5(AvxVnni);

impl AvxVnniT5 {
    pub(super) fn new(proof: AvxVnni) -> Self {
        Self(proof)
    }
}

impl Kernel for AvxVnniT5 {
    fn name(&self) -> &'static str {
        "avxvnni-t5"
    }

    fn layout(&self) -> &'static dyn Layout {
        &T5
    }

    fn gemv(&self, w: &PackedMatrix, rows: Range<usize>, x: &Prepared, y: &mut [f32]) {
        match self.0 {
            // SAFETY: `proof` has the instructions.
            AvxVnni::Vex(proof) => unsafe { multiply_vex(proof, w, rows, x, y) },
            // SAFETY: as above.
            AvxVnni::Evex(proof) => unsafe { multiply_evex(proof, w, rows, x, y) },
        }
    }

    fn gemm(&self, w: &PackedMatrix, rows: Range<usize>, xs: &[Prepared], ys: &mut [&mut [f32]]) {
        // SAFETY: `self.0` contains the AVX2 that `unpack` is compiled for.
        unsafe { gemm_codes(self.0, w, rows, xs, ys, unpack) }
    }
}

/// [`multiply`] with AVX-VNNI.
#[target_feature(enable = "avx2,avxvnni")]
fn multiply_vex(proof: Vex, w: &PackedMatrix, rows: Range<usize>, x: &Prepared, y: &mut [f32]) {
    multiply(proof, w, rows, x, y);
}

/// [`multiply`] with AVX-512 VNNI and VL.
#[target_feature(enable = "avx2,avx512vl,avx512vnni")]
fn multiply_evex(proof: Evex, w: &PackedMatrix, rows: Range<usize>, x: &Prepared, y: &mut [f32]) {
    multiply(proof, w, rows, x, y);
}

#[inline(always)]
fn multiply<D: Dpbusd>(
    proof: D,
    w: &PackedMatrix,
    rows: Range<usize>,
    x: &Prepared,
    y: &mut [f32],
) {
    let cut = Cut::new(w.cols);
    let columns = full_columns(x);
    let tail_columns = tail_columns(cut, x);
    for (y, first) in y.chunks_mut(ROWS).zip(rows.step_by(ROWS)) {
        let sums = dot(proof, w.group(first), cut, columns, &tail_columns);
        for (y, sum) in y.iter_mut().zip(sums) {
            *y = x.rescale(sum - x.sum, w.scale);
        }
    }
}

/// Sums over codes of a row group.
#[inline(always)]
fn dot<D: Dpbusd>(
    proof: D,
    group: &[u8],
    cut: Cut,
    columns: &[Columns],
    tail_columns: &Columns,
) -> [i32; ROWS] {
    let blocks: &[[Block; ROWS]] = &group.as_chunks().0.as_chunks().0[..cut.blocks];
    let (windows, rest) = blocks.as_chunks::<WINDOW>();
    let (columns, rest_columns) = columns[..cut.blocks].as_chunks::<WINDOW>();
    // SAFETY: `proof` contains AVX2, which is all that these calls need.
    unsafe {
        let decoder = Decoder::new();
        let mut sums = [_mm256_setzero_si256(); ROWS];
        for (blocks, columns) in windows.iter().zip(columns) {
            for i in 0..ROWS {
                // A quarter of the window with each row.
                prefetch(blocks[i].as_flattened());
                add_row(proof, &decoder, &mut sums[i], blocks, i, columns);
            }
        }
        for (block, columns) in rest.iter().zip(rest_columns) {
            for i in 0..ROWS {
                add_row(proof, &decoder, &mut sums[i], from_ref(block), i, from_ref(columns));
            }
        }
        if cut.tail != 0 {
            let block = tail_blocks(cut, group);
            let columns = from_ref(tail_columns);
            for i in 0..ROWS {
                add_row(proof, &decoder, &mut sums[i], from_ref(&block), i, columns);
            }
        }
        add_lanes(sums)
    }
}

/// Adds the products of some blocks of row `i` to int32 lanes.
#[inline(always)]
fn add_row<D: Dpbusd, const N: usize>(
    proof: D,
    decoder: &Decoder,
    sum: &mut __m256i,
    blocks: &[[Block; ROWS]; N],
    i: usize,
    columns: &[Columns; N],
) {
    // The optimizer would load the activations of all four rows at once, and
    // spill them.
    let columns = std::hint::black_box(columns);
    // SAFETY: `proof` contains AVX2, which is all that these calls need.
    unsafe {
        let masks = [_mm256_set1_epi8(3), _mm256_set1_epi8(12), _mm256_set1_epi8(48)];
        let mut single = [*sum, _mm256_setzero_si256()];
        let mut fourfold = [_mm256_setzero_si256(); 2];
        let mut sixteenfold = _mm256_setzero_si256();
        for b in 0..N {
            let block = blocks[b][i].as_chunks().0;
            for half in 0..2 {
                let [x, y] = decoder.decode(load(&block[half]));
                let mut q = [_mm256_setzero_si256(); 5];
                for f in 0..5 {
                    q[f] = load_i8(&columns[b][f].as_chunks().0[half]);
                }
                single[0] = proof.dpbusd(single[0], _mm256_and_si256(y, masks[0]), q[0]);
                fourfold[0] = proof.dpbusd(fourfold[0], _mm256_and_si256(y, masks[1]), q[1]);
                single[1] = proof.dpbusd(single[1], _mm256_and_si256(x, masks[0]), q[2]);
                fourfold[1] = proof.dpbusd(fourfold[1], _mm256_and_si256(x, masks[1]), q[3]);
                sixteenfold = proof.dpbusd(sixteenfold, _mm256_and_si256(x, masks[2]), q[4]);
            }
        }
        let fourfold = _mm256_srai_epi32::<2>(_mm256_add_epi32(fourfold[0], fourfold[1]));
        let sixteenfold = _mm256_srai_epi32::<4>(sixteenfold);
        let single = _mm256_add_epi32(single[0], single[1]);
        *sum = _mm256_add_epi32(single, _mm256_add_epi32(fourfold, sixteenfold));
    }
}
