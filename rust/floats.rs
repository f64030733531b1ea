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
}

impl Element for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
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
}
