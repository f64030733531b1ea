//! i2 with dot products.
//!
//! GEMV masks a 2-bit field without shifting it, so that a code comes out as
//! `code * 4^field`; `sdot` takes it as a signed byte, which the three low
//! fields fit (32 at most), and the top field is shifted down by the one
//! instruction that would mask it. Sums of different multiples are kept apart
//! and shifted right at the end, which is exact: every term is a multiple.
//!
//! ```text
//! for 16 bytes of each of four rows, 64 columns
//!   sums of codes        += (bytes & 3) . q0  + (bytes >> 6) . q3
//!   sums of 4 x codes    += (bytes & 12) . q1
//!   sums of 16 x codes   += (bytes & 48) . q2
//! ```
//!
//! 4 operations extract 64 codes, 4 multiply them, in 12 chains: enough for
//! two `sdot` a cycle (Neoverse N1) and nearly for four (V1, Apple M1), of a
//! latency of 3 or 4 cycles. Counted, not measured.
//!
//! A lane grows by at most 4 * 4 * 32 * 128 = 2^16 a block, and there are at
//! most 512 blocks (`MAX_COLS`): below 2^26.
//!
//! Several tokens: `tile.rs`.

use std::arch::aarch64::*;
use std::ops::Range;

use super::super::generic::blocks::ROWS;
use super::super::generic::i2::{Cut, I2};
use super::super::{Kernel, Layout, PackedMatrix, Prepared};
use super::block::Block;
use super::dotprod_tile::{add_run, sdot};
use super::neon_i2::unpack;
use super::neon_tile::{load, load_i8, reduce};
use super::tile;
use crate::cpu::Dotprod;

pub(super) struct DotprodI2(Dotprod);

impl DotprodI2 {
    pub(super) fn new(proof: Dotprod) -> Self {
        Self(proof)
    }
}

impl Kernel for DotprodI2 {
    fn name(&self) -> &'static str {
        "dotprod-i2"
    }

    fn layout(&self) -> &'static dyn Layout {
        &I2
    }

    fn gemv(&self, w: &PackedMatrix, rows: Range<usize>, x: &Prepared, y: &mut [f32]) {
        let _proof = self.0;
        // SAFETY: `self.0` proves that the CPU has dot products.
        unsafe { gemv(w, rows, x, y) }
    }

    fn gemm(&self, w: &PackedMatrix, rows: Range<usize>, xs: &[Prepared], ys: &mut [&mut [f32]]) {
        let _proof = self.0;
        // SAFETY: as in `gemv`.
        unsafe { tile::gemm(w, rows, xs, ys, unpack, add_run) }
    }
}

#[target_feature(enable = "neon,dotprod")]
pub(super) fn gemv(w: &PackedMatrix, rows: Range<usize>, x: &Prepared, y: &mut [f32]) {
    for (y, first) in y.chunks_mut(ROWS).zip(rows.step_by(ROWS)) {
        let sums = dot(w.group(first), x);
        for (y, sum) in y.iter_mut().zip(sums) {
            *y = x.rescale(sum - x.sum, w.scale);
        }
    }
}

/// Sums over codes of a group of rows.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn dot(group: &[u8], x: &Prepared) -> [i32; ROWS] {
    let cut = Cut::new(x.cols);
    let mut acc = [[vdupq_n_s32(0); 3]; ROWS];
    for b in 0..cut.blocks + usize::from(cut.tail > 0) {
        let block = Block::new(group, x.padded(), b, cut.block(b, 0).len());
        let mut k = 0;
        loop {
            add_register(&mut acc, &block, k);
            k += 1;
            if k >= block.registers {
                break;
            }
        }
    }
    let mut sums = [vdupq_n_s32(0); ROWS];
    for i in 0..ROWS {
        let [ones, fours, sixteens] = acc[i];
        sums[i] = vsraq_n_s32::<4>(vsraq_n_s32::<2>(ones, fours), sixteens);
    }
    reduce(sums)
}

/// Adds the products of one register of each row.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn add_register(acc: &mut [[int32x4_t; 3]; ROWS], block: &Block<'_, 4>, k: usize) {
    let mut qs = [vdupq_n_s8(0); 4];
    for f in 0..4 {
        qs[f] = load_i8(&block.qs[f][k]);
    }
    for i in 0..ROWS {
        let bytes = load(&block.rows[i][k]);
        let [ones, fours, sixteens] = acc[i];
        let ones = sdot(ones, vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(3))), qs[0]);
        acc[i] = [
            sdot(ones, vreinterpretq_s8_u8(vshrq_n_u8::<6>(bytes)), qs[3]),
            sdot(fours, vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(12))), qs[1]),
            sdot(sixteens, vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(48))), qs[2]),
        ];
    }
}
