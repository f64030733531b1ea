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

use super::super::generic::i2::{BLOCK_BYTES, BLOCK_COLS, Cut, I2, ROWS};
use super::super::{Kernel, Layout, PackedMatrix, Prepared};
use super::neon_tile::{add_run, load, load_i8, reduce, store_i8};
use super::tile::{self, CHUNK, STEP, Trits};
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
    let (full, tail) = group.split_at(cut.blocks * ROWS * BLOCK_BYTES);
    let full = full.as_chunks::<BLOCK_BYTES>().0.as_chunks::<ROWS>().0;
    let (full_q, tail_q) = x.padded().split_at(cut.blocks * BLOCK_COLS);
    let full_q = full_q.as_chunks::<BLOCK_COLS>().0;
    let mut acc = [vdupq_n_s32(0); ROWS];
    for (blocks, qs) in full.chunks(WIDEN).zip(full_q.chunks(WIDEN)) {
        let mut acc16 = [[vdupq_n_s16(0); 2]; ROWS];
        for (block, q) in blocks.iter().zip(qs) {
            let q = q.as_chunks().0;
            for k in 0..BLOCK_BYTES / STEP {
                let qs = [&q[k], &q[k + 4], &q[k + 8], &q[k + 12]];
                add_strip(&mut acc16, block.each_ref().map(|row| &row.as_chunks().0[k]), qs);
            }
        }
        widen(&mut acc, acc16);
    }
    // The tail's bytes and their columns are whole registers, too.
    let mut acc16 = [[vdupq_n_s16(0); 2]; ROWS];
    let (tail, tail_q) = (tail.as_chunks().0, tail_q.as_chunks().0);
    let strips = cut.tail / STEP;
    for k in 0..strips {
        let rows = [&tail[k], &tail[strips + k], &tail[2 * strips + k], &tail[3 * strips + k]];
        let qs =
            [&tail_q[k], &tail_q[strips + k], &tail_q[2 * strips + k], &tail_q[3 * strips + k]];
        add_strip(&mut acc16, rows, qs);
    }
    widen(&mut acc, acc16);
    reduce(acc)
}

/// Adds 16 bytes of each row, whose four fields meet `qs`.
#[target_feature(enable = "neon")]
#[inline]
fn add_strip(acc: &mut [[int16x8_t; 2]; ROWS], rows: [&[u8; STEP]; ROWS], qs: [&[i8; STEP]; 4]) {
    let qs = [load_i8(qs[0]), load_i8(qs[1]), load_i8(qs[2]), load_i8(qs[3])];
    for i in 0..ROWS {
        let codes = fields(load(rows[i]));
        for f in 0..4 {
            let [low, high] = acc[i];
            acc[i] = [
                vmlal_s8(low, vget_low_s8(codes[f]), vget_low_s8(qs[f])),
                vmlal_high_s8(high, codes[f], qs[f]),
            ];
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

/// Adds int16 sums to int32 sums.
#[target_feature(enable = "neon")]
#[inline]
fn widen(acc: &mut [int32x4_t; ROWS], acc16: [[int16x8_t; 2]; ROWS]) {
    for i in 0..ROWS {
        acc[i] = vpadalq_s16(vpadalq_s16(acc[i], acc16[i][0]), acc16[i][1]);
    }
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
