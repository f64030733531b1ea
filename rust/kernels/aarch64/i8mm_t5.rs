//! t5 with matrix products, which multiply several tokens (`i8mm_tile.rs`).
//!
//! A single token would leave half of each product unused: that is `sdot`
//! with more shuffling, so GEMV is the one of `dotprod-t5`.

use std::ops::Range;

use super::super::generic::t5::T5;
use super::super::{Kernel, Layout, PackedMatrix, Prepared};
use super::i8mm_tile::{add_run, pair_rows};
use super::tile::{self, Trits};
use super::{dotprod_t5, neon_t5};
use crate::cpu::I8mm;

pub(super) struct I8mmT5(I8mm);

impl I8mmT5 {
    pub(super) fn new(proof: I8mm) -> Self {
        Self(proof)
    }
}

impl Kernel for I8mmT5 {
    fn name(&self) -> &'static str {
        "i8mm-t5"
    }

    fn layout(&self) -> &'static dyn Layout {
        &T5
    }

    fn gemv(&self, w: &PackedMatrix, rows: Range<usize>, x: &Prepared, y: &mut [f32]) {
        let _proof = self.0;
        // SAFETY: `self.0` proves that the CPU has all that `Dotprod` proves.
        unsafe { dotprod_t5::gemv(w, rows, x, y) }
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
    neon_t5::unpack(group, cols, start, out);
    pair_rows(out);
}
