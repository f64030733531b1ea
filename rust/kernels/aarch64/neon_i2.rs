//! i2 with NEON alone.
//!
//! ```text
//! for 16 bytes of each of four rows, 64 columns
//!   for each 2-bit field
//!     shift it down and mask it: 16 codes
//!     smlal, smlal2: codes x activations into eight int16 lanes each
//! ```
//!
//! 6 operations extract 64 codes, 8 multiply them. Four rows share the loads
//! of the activations, and have two sums each, so that eight chains hide the
//! latency of `smlal` on cores that do not forward sums. Cores with one
//! multiplier beside one other pipe (Cortex-A72, Neoverse N1) are bound by
//! `smlal` either way: masking fields in place, as the dot-product kernels do,
//! would spare one operation of 14 and cost wider sums. Counted, not measured.
//!
//! The bound: codes are 0 to 2 and activations -128 to 127, so a product lies
//! in [-256, 254]. A lane takes 16 of each block and [`WIDEN`] blocks before
//! it is widened: -16384. (Even a code 3, which no packer writes, would keep
//! to -24576.)
//!
//! Several tokens: `tile.rs`.

use std::arch::aarch64::*;
use std::ops::Range;

use super::super::generic::blocks::ROWS;
use super::super::generic::i2::{BLOCK_COLS, Cut, I2};
use super::super::{Kernel, Layout, PackedMatrix, Prepared};
use super::block::Block;
use super::neon_tile::{add_halves, add_run, load, load_i8, reduce, store_i8, widen};
use super::tile::{self, CHUNK, Trits};
use crate::cpu::Neon;

/// Blocks between two widenings, which are then one operation in a hundred.
const WIDEN: usize = 4;

pub(super) struct NeonI2(Neon);

impl NeonI2 {
    pub(super) fn new(proof: Neon) -> Self {
        Self(proof)
    }
}

impl Kernel for NeonI2 {
    fn name(&self) -> &'static str {
        "neon-i2"
    }

    fn layout(&self) -> &'static dyn Layout {
        &I2
    }

    fn gemv(&self, w: &PackedMatrix, rows: Range<usize>, x: &Prepared, y: &mut [f32]) {
        let _proof = self.0;
        // SAFETY: `self.0` proves that the CPU has NEON.
        unsafe { gemv(w, rows, x, y) }
    }

    fn gemm(&self, w: &PackedMatrix, rows: Range<usize>, xs: &[Prepared], ys: &mut [&mut [f32]]) {
        let _proof = self.0;
        // SAFETY: as in `gemv`.
        unsafe { tile::gemm(w, rows, xs, ys, unpack, add_run) }
    }
}

#[target_feature(enable = "neon")]
fn gemv(w: &PackedMatrix, rows: Range<usize>, x: &Prepared, y: &mut [f32]) {
    for (y, first) in y.chunks_mut(ROWS).zip(rows.step_by(ROWS)) {
        let sums = dot(w.group(first), x);
        for (y, sum) in y.iter_mut().zip(sums) {
            *y = x.rescale(sum - x.sum, w.scale);
        }
    }
}

/// Sums over codes of a group of rows.
#[target_feature(enable = "neon")]
#[inline]
fn dot(group: &[u8], x: &Prepared) -> [i32; ROWS] {
    let cut = Cut::new(x.cols);
    let mut acc = [vdupq_n_s32(0); ROWS];
    let mut acc16 = [[vdupq_n_s16(0); 2]; ROWS];
    for b in 0..cut.blocks + usize::from(cut.tail > 0) {
        let block = Block::new(group, x.padded(), b, cut.block(b, 0).len());
        let mut k = 0;
        loop {
            add_register(&mut acc16, &block, k);
            k += 1;
            if k >= block.registers {
                break;
            }
        }
        if b % WIDEN == WIDEN - 1 {
            widen(&mut acc, &mut acc16);
        }
    }
    widen(&mut acc, &mut acc16);
    reduce(acc)
}

/// Adds the products of one register of each row.
#[target_feature(enable = "neon")]
#[inline]
fn add_register(acc: &mut [[int16x8_t; 2]; ROWS], block: &Block<'_, 4>, k: usize) {
    let mut qs = [vdupq_n_s8(0); 4];
    for f in 0..4 {
        qs[f] = load_i8(&block.qs[f][k]);
    }
    for i in 0..ROWS {
        let codes = fields(load(&block.rows[i][k]));
        for f in 0..4 {
            acc[i] = add_halves(acc[i], codes[f], qs[f]);
        }
    }
}

/// The codes of the four fields.
#[target_feature(enable = "neon")]
#[inline]
fn fields(bytes: uint8x16_t) -> [int8x16_t; 4] {
    let low = vdupq_n_u8(3);
    [
        vreinterpretq_s8_u8(vandq_u8(bytes, low)),
        vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8::<2>(bytes), low)),
        vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8::<4>(bytes), low)),
        vreinterpretq_s8_u8(vshrq_n_u8::<6>(bytes)),
    ]
}

/// An [`Unpack`](tile::Unpack).
#[target_feature(enable = "neon")]
pub(super) fn unpack(group: &[u8], cols: usize, start: usize, out: &mut Trits) {
    let cut = Cut::new(cols);
    let first = start / BLOCK_COLS;
    for b in first..(first + CHUNK / BLOCK_COLS).min(cut.blocks + usize::from(cut.tail > 0)) {
        for i in 0..ROWS {
            let block = group[cut.block(b, i)].as_chunks().0;
            let out = out[i][(b - first) * BLOCK_COLS..].as_chunks_mut().0;
            for (k, bytes) in block.iter().enumerate() {
                let codes = fields(load(bytes));
                for f in 0..4 {
                    let trits = vsubq_s8(codes[f], vdupq_n_s8(1));
                    store_i8(&mut out[f * block.len() + k], trits);
                }
            }
        }
    }
}
