//! Rotary position embedding, in halves (NeoX, `rotate_half`): element `i` of
//! a head turns with element `i + head_dim / 2`.
//!
//! The angles are those of transformers, which rounds to float32 at every
//! step, as models were trained: `2i / head_dim`, `theta` to that power, its
//! reciprocal, times the position. Powers, sines and cosines come from the
//! `libm` crate in float64, then rounded: the platform's libm is never asked.

use crate::cpu::Isa;

/// The frequencies of a model.
pub struct Rope {
    inv_freq: Vec<f32>,
}

impl Rope {
    /// Frequencies for heads of `head_dim` elements, an even number.
    #[must_use]
    pub fn new(head_dim: usize, theta: f64) -> Self {
        let power = |i: usize| {
            let exponent = (2 * i) as f32 / head_dim as f32;
            libm::pow(theta, f64::from(exponent)) as f32
        };
        let inv_freq = (0..head_dim / 2).map(|i| 1.0 / power(i)).collect();
        Self { inv_freq }
    }

    /// The cosines, then the sines, of a position's angles: `head_dim` numbers
    /// that all layers share.
    pub fn angles(&self, position: usize, out: &mut [f32]) {
        let (cos, sin) = out.split_at_mut(self.inv_freq.len());
        for ((f, cos), sin) in self.inv_freq.iter().zip(cos).zip(sin) {
            let angle = f64::from(position as f32 * f);
            (*cos, *sin) = (libm::cos(angle) as f32, libm::sin(angle) as f32);
        }
    }
}

/// Turns every head in `x` (one token's, as long as `angles` each).
pub fn rotate(isa: Isa, angles: &[f32], x: &mut [f32]) {
    let half = angles.len() / 2;
    let (cos, sin) = angles.split_at(half);
    isa.vectorize(
        #[inline(always)]
        || {
            for head in x.chunks_exact_mut(2 * half) {
                let (a, b) = head.split_at_mut(half);
                for i in 0..half {
                    let (x, y) = (a[i], b[i]);
                    a[i] = x * cos[i] - y * sin[i];
                    b[i] = y * cos[i] + x * sin[i];
                }
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_pairs_by_position_times_frequency() {
        let rope = Rope::new(4, 100.0);
        let mut x = [1.0, 2.0, 3.0, 4.0];
        let mut angles = [0f32; 4];
        rope.angles(0, &mut angles);
        rotate(Isa::GENERIC, &angles, &mut x);
        assert_eq!(x, [1.0, 2.0, 3.0, 4.0]);
        rope.angles(7, &mut angles);
        rotate(Isa::GENERIC, &angles, &mut x);
        for (i, freq) in [(0, 1.0f64), (1, 0.1)] {
            let (sin, cos) = (7.0 * freq).sin_cos();
            let (a, b) = ([1.0, 2.0][i], [3.0, 4.0][i]);
            assert!((f64::from(x[i]) - (a * cos - b * sin)).abs() < 1e-6);
            assert!((f64::from(x[i + 2]) - (b * cos + a * sin)).abs() < 1e-6);
        }
    }
}
