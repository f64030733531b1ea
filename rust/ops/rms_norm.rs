//! RMSNorm: `x / sqrt(mean(x^2) + eps) * weight`, normalized first, then
//! weighted, as `BitNetRMSNorm` in transformers' `modeling_bitnet.py`.

use super::{tree_sum, zero_padded};
use crate::cpu::Isa;
use crate::floats::LANES;

/// Normalizes one token's activations into `out`. `x`, `weight` and `out` have
/// the same length.
pub fn rms_norm(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert!(x.len() == weight.len() && x.len() == out.len(), "lengths differ");
    isa.vectorize(
        #[inline(always)]
        || {
            let (chunks, tail) = x.as_chunks::<LANES>();
            let mut lanes = [0f32; LANES];
            for chunk in chunks {
                for i in 0..LANES {
                    lanes[i] = chunk[i].mul_add(chunk[i], lanes[i]);
                }
            }
            let tail = zero_padded(tail);
            for i in 0..LANES {
                lanes[i] = tail[i].mul_add(tail[i], lanes[i]);
            }
            let r = 1.0 / (tree_sum(lanes) / x.len() as f32 + eps).sqrt();
            for ((o, &x), &w) in out.iter_mut().zip(x).zip(weight) {
                *o = x * r * w;
            }
        },
    );
}
