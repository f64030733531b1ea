//! `exp` in float32, the same bits everywhere: softmax and SiLU need it, and
//! libm's differ between platforms and versions.
//!
//! `e^x = 2^n * e^r` with `n = round(x / ln 2)` and `|r| <= ln 2 / 2`, where
//! `ln 2` is split in two constants so that `x - n ln 2` loses nothing
//! (Cody and Waite), and `e^r` is its Taylor polynomial of degree 7, whose
//! truncation error at the ends, 6e-9, is a tenth of half an ulp. The result
//! is within 1 ulp. Below -104 the result is 0, above 88.73 it is infinite.

use crate::cpu::Isa;

/// `e^x`.
#[inline(always)]
#[must_use]
pub(crate) fn exp(x: f32) -> f32 {
    // ln 2 = LN2_HIGH + LN2_LOW; the high part has 9 trailing zero bits, so
    // that n * LN2_HIGH is exact for |n| <= 256.
    const LN2_HIGH: f32 = 355.0 / 512.0;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Outside, the result is 0 or infinite; inside, 2^n is two normal powers.
    let x_in = if x < -104.0 { -104.0 } else { x };
    let x_in = if x_in > 89.0 { 89.0 } else { x_in };
    // 1.5 * 2^23, whose ulp is 1: added, it rounds to an integer, to even among
    // equals, which then stands in the lowest bits. A conversion to i32 would
    // saturate, for which there is no vector instruction.
    const SHIFT: f32 = 12_582_912.0;
    let shifted = x_in * std::f32::consts::LOG2_E + SHIFT;
    let n = shifted - SHIFT;
    let r = n.mul_add(-LN2_HIGH, x_in);
    let r = n.mul_add(-LN2_LOW, r);
    let mut p = 1.0 / 5040.0;
    p = r.mul_add(p, 1.0 / 720.0);
    p = r.mul_add(p, 1.0 / 120.0);
    p = r.mul_add(p, 1.0 / 24.0);
    p = r.mul_add(p, 1.0 / 6.0);
    p = r.mul_add(p, 0.5);
    p = r.mul_add(p, 1.0);
    p = r.mul_add(p, 1.0);
    // 2^n in two steps, each a normal number: the second multiplication rounds
    // once into the subnormals, or overflows to infinity.
    // (Of a NaN they are arbitrary: p is NaN then, and stays it.)
    let n = shifted.to_bits().wrapping_sub(SHIFT.to_bits()) as i32;
    let half = n >> 1;
    let power = |k: i32| f32::from_bits(((k + 127) as u32) << 23);
    p * power(half) * power(n - half)
}

/// `e^x` for each element, in place.
pub fn exp_in_place(isa: Isa, x: &mut [f32]) {
    isa.vectorize(
        #[inline(always)]
        || {
            for v in x {
                *v = exp(*v);
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_within_one_ulp() {
        let mut worst = 0f64;
        for i in 0..2_000_000 {
            let x = -87.0 + i as f32 * (175.0 / 2_000_000.0);
            let right = f64::from(x).exp();
            let ulp =
                f64::from(f32::from_bits((right as f32).to_bits() + 1)) - f64::from(right as f32);
            worst = worst.max((f64::from(exp(x)) - right).abs() / ulp);
        }
        assert!(worst < 1.0, "{worst} ulp");
    }

    #[test]
    fn has_the_right_ends() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
        let tiny = exp(-100.0);
        assert!(tiny > 0.0 && !tiny.is_normal(), "{tiny}");
    }
}
