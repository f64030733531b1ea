//! i2 with matrix products, which multiply several tokens (`i8mm_tile.rs`).
//!
//! A single token would leave half of each product unused: that is `sdot`
//! with more shuffling, so GEMV is the one of `dotprod-i2`.

use std::ops::Range;

use super::super::generic::i2::I2;
use super::super::{Kernel, Layout, PackedMatrix, Prepared};
use super::i8mm_tile::{add_run, pair_rows};
use super::tile::{self, Trits};
use super::{dotprod_i2, neon_i2};
use crate::cpu::I8mm;

pub(super) struct I8mmI2(I8mm);

impl I8mmI2 {
    pub(super) fn new(proof: I8mm) -> Self {
        Self(proof)
    }
}

impl Kernel for I8mmI2 {
    fn name(&self) -> &'static str {
        "i8mm-i2"
    }

    fn layout(&self) -> &'static dyn Layout {
        &I2
    }

    fn gemv(&self, w: &PackedMatrix, rows: Range<usize>, x: &Prepared, y: &mut [f32]) {
        let _proof = self.0;
        // SAFETY: `self.0` proves that the CPU has all that `Dotprod` proves.
        unsafe { dotprod_i2::gemv(w, rows, x, y) }
    }

    fn gemm(&self, w: &PackedMatrix, rows: Range<usize>, xs: &[Prepared], ys: &mut [&mut [f32]]) {
        let _proof = self.0;
        // SAFETY: `self.0` proves that the CPU has matrix products.
        unsafe { tile::gemm(w, rows, xs, ys, unpack, add_run) }
    }
}

/// An [`Unpack`](tile::Unpack) of paired rows.
#[target_feature(enable = "neon")]
fn unpack(group: &[u8], cols: usize, start: usize, out: &mut Trits) {
    neon_i2::unpack(group, cols, start, out);
    pair_rows(out);
}
