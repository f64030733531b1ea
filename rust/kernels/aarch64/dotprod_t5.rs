//! t5 with dot products. Decoding is that of `neon_t5.rs`, multiplying that of
//! `dotprod_i2.rs`: codes of d stay where they are, as `4 * code`, and have
//! their own sum, which is shifted right at the end.
//!
//! ```text
//! for 16 bytes of each of four rows, 80 columns
//!   sums      += a . q0 + b . q1 + (triple & 3) . q2 + (triple >> 4) . q4
//!   sums of 4 x codes   += (triple & 12) . q3
//! ```
//!
//! 13 operations decode 80 weights, 5 multiply them: about 1.8 times the work
//! of i2 for each weight, for 4/5 of the bytes. It pays where memory is shared
//! by enough cores. Codes of e could stay in place, too; shifting them down
//! takes the same operation and spares four sums and a mask: 6 tables, 3 masks,
//! 8 sums and 5 activations leave enough of 32 registers. Counted, not
//! measured.
//!
//! A lane grows by at most 4 * 4 * 8 * 128 = 2^14 a block: below 2^23 in the
//! 410 blocks of `MAX_COLS`.
//!
//! Several tokens: `tile.rs`.

use std::arch::aarch64::*;
use std::ops::Range;

use super::super::generic::blocks::ROWS;
use super::super::generic::t5::{Cut, FIELDS, T5};
use super::super::{Kernel, Layout, PackedMatrix, Prepared};
use super::block::Block;
use super::dotprod_tile::{add_run, sdot};
use super::neon_t5::{Tables, sum_of_coded, unpack};
use super::neon_tile::{load, load_i8, reduce};
use super::tile;
use crate::cpu::Dotprod;

pub(super) struct DotprodT5(Dotprod);

impl DotprodT5 {
    pub(super) fn new(proof: Dotprod) -> Self {
        Self(proof)
    }
}

impl Kernel for DotprodT5 {
    fn name(&self) -> &'static str {
        "dotprod-t5"
    }

    fn layout(&self) -> &'static dyn Layout {
        &T5
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
    let tables = Tables::new();
    let correction = sum_of_coded(x);
    for (y, first) in y.chunks_mut(ROWS).zip(rows.step_by(ROWS)) {
        let sums = dot(w.group(first), x, tables);
        for (y, sum) in y.iter_mut().zip(sums) {
            *y = x.rescale(sum - correction, w.scale);
        }
    }
}

/// Sums of a group of rows: over trits in fields a and b, over codes in the rest.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn dot(group: &[u8], x: &Prepared, tables: Tables) -> [i32; ROWS] {
    let cut = Cut::new(x.cols);
    let mut acc = [[vdupq_n_s32(0); 2]; ROWS];
    for b in 0..cut.blocks + usize::from(cut.tail > 0) {
        let block = Block::new(group, x.padded(), b, cut.block(b, 0).len());
        let mut k = 0;
        loop {
            add_register(&mut acc, &block, k, tables);
            k += 1;
            if k >= block.registers {
                break;
            }
        }
    }
    let mut sums = [vdupq_n_s32(0); ROWS];
    for i in 0..ROWS {
        sums[i] = vsraq_n_s32::<2>(acc[i][0], acc[i][1]);
    }
    reduce(sums)
}

/// Adds the products of one register of each row.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn add_register(
    acc: &mut [[int32x4_t; 2]; ROWS],
    block: &Block<'_, FIELDS>,
    k: usize,
    tables: Tables,
) {
    let mut qs = [vdupq_n_s8(0); FIELDS];
    for f in 0..FIELDS {
        qs[f] = load_i8(&block.qs[f][k]);
    }
    for i in 0..ROWS {
        let ([a, b], triple) = tables.decode(load(&block.rows[i][k]));
        let [ones, fours] = acc[i];
        let ones = sdot(sdot(ones, a, qs[0]), b, qs[1]);
        let ones = sdot(ones, vreinterpretq_s8_u8(vandq_u8(triple, vdupq_n_u8(3))), qs[2]);
        acc[i] = [
            sdot(ones, vreinterpretq_s8_u8(vshrq_n_u8::<4>(triple)), qs[4]),
            sdot(fours, vreinterpretq_s8_u8(vandq_u8(triple, vdupq_n_u8(12))), qs[3]),
        ];
    }
}
