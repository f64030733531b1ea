//! The float half of a forward pass: slices in, slices out, no state, no
//! threads. Every op has one order of operations, which is part of its
//! definition (docs/numerics.md). Most are plain loops, which
//! [`Isa::vectorize`](crate::cpu::Isa::vectorize) compiles for each instruction
//! set; the hot ones are written over `lanes`. Either way one source is both
//! the scalar twin and the fast version.

pub mod activation;
pub mod attention;
pub mod attention_rows;
pub mod dense;
pub mod exp;
pub mod head;
pub(crate) mod lanes;
pub mod rms_norm;
pub mod rope;
pub mod sample;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(test)]
mod tests;

use crate::floats::LANES;

/// Adds up the lanes: 8 + 8, 4 + 4, 2 + 2, 1 + 1.
#[inline(always)]
pub(crate) fn tree_sum(mut lanes: [f32; LANES]) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0]
}

/// The first elements of `x`, followed by zeros: how every reduction treats a
/// ragged tail.
#[inline(always)]
pub(crate) fn zero_padded<T: Copy + Default>(x: &[T]) -> [T; LANES] {
    let mut lanes = [T::default(); LANES];
    lanes[..x.len()].copy_from_slice(x);
    lanes
}
