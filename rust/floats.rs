//! Stored float types, their exact conversion to float32, and the number of
//! lanes that every float reduction is defined over. Apart, because both the
//! ops and the KV cache are laid out by them.

/// Interleaved partial sums of a reduction: lane `i` takes elements `i`,
/// `i + 16`, `i + 32`, ... AVX-512 holds them in one register, AVX2 in two,
/// NEON in four.
pub(crate) const LANES: usize = 16;

/// A stored float type and its exact conversion.
pub(crate) trait Element: Copy + Default + Send + Sync + 'static {
    /// The value, exactly.
    fn to_f32(self) -> f32;

    /// Whether it is neither infinite nor not a number.
    fn is_finite(self) -> bool;
}

impl Element for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline(always)]
    fn is_finite(self) -> bool {
        f32::is_finite(self)
    }
}

/// float16 bits.
#[derive(Clone, Copy, Default, PartialEq, Debug)]
#[repr(transparent)]
pub struct F16(pub u16);

impl Element for F16 {
    /// Shifts exponent and mantissa into place and corrects the exponent's
    /// bias by a multiplication, which is exact and normalizes subnormals too.
    /// Infinities and NaNs become 2^16 and above: nothing here stores them.
    #[inline(always)]
    fn to_f32(self) -> f32 {
        let bits = u32::from(self.0);
        let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
        f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16)
    }

    #[inline(always)]
    fn is_finite(self) -> bool {
        self.0 & 0x7c00 != 0x7c00
    }
}

impl F16 {
    /// Rounds half to even; beyond the largest finite number, 65504, to that.
    /// Plain integer operations, which compile to vector code.
    #[inline(always)]
    pub(crate) fn from_f32_saturating(x: f32) -> Self {
        let bits = x.to_bits();
        let sign = (bits >> 16) as u16 & 0x8000;
        let magnitude = bits & 0x7fff_ffff;
        let limited = magnitude.min(65504f32.to_bits());
        // Normal numbers: half of the last place, less one where it is even,
        // carries; then the exponent's bias changes from 127 to 15.
        let rounded = limited + 0xfff + (limited >> 13 & 1);
        let normal = (rounded.wrapping_sub(112 << 23) >> 13) as u16;
        // Below 2^-14: adding 0.5 leaves multiples of 2^-24 in the last places,
        // rounded by the addition.
        let shifted = f32::from_bits(limited) + 0.5;
        let subnormal = (shifted.to_bits() - 0.5f32.to_bits()) as u16;
        let finite = if limited < 0x3880_0000 { subnormal } else { normal };
        let nan = magnitude > f32::INFINITY.to_bits();
        Self(sign | if nan { 0x7e00 } else { finite })
    }
}

/// bfloat16 bits.
#[derive(Clone, Copy, Default, PartialEq, Debug)]
#[repr(transparent)]
pub struct Bf16(pub u16);

impl Element for Bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }

    #[inline(always)]
    fn is_finite(self) -> bool {
        self.0 & 0x7f80 != 0x7f80
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f16_bits_convert_exactly() {
        for bits in 0..=u16::MAX {
            let right = half::f16::from_bits(bits);
            if right.is_finite() {
                assert_eq!(F16(bits).to_f32().to_bits(), right.to_f32().to_bits(), "{bits:#x}");
            }
        }
    }

    #[test]
    fn f16_rounds_half_to_even_and_saturates() {
        let right = |x: f32| half::f16::from_f32(x.clamp(-65504.0, 65504.0)).to_bits();
        // Every float16, and what lies around and halfway between two.
        for bits in 0..0x7c00 {
            let x = F16(bits).to_f32();
            let halfway = (x + F16((bits + 1).min(0x7bff)).to_f32()) / 2.0;
            for x in [x, halfway] {
                for step in -1..=1 {
                    let x = f32::from_bits((x.to_bits() as i32 + step).max(0) as u32);
                    for x in [x, -x] {
                        assert_eq!(F16::from_f32_saturating(x).0, right(x), "{x:e}");
                    }
                }
            }
        }
        for x in [1e9, f32::INFINITY, f32::MAX, 65504.0, 65519.9, 65520.0, 1e-40, 1e-8, 3e-8] {
            assert_eq!(F16::from_f32_saturating(x).0, right(x), "{x:e}");
            assert_eq!(F16::from_f32_saturating(-x).0, right(-x), "{x:e}");
        }
        assert_eq!(F16::from_f32_saturating(f32::NAN).0 & 0x7fff, 0x7e00);
    }
}
