//! The few instructions that the hot loops of the float half are written in:
//! sixteen float32 lanes, loads from the stored types, one fused multiply-add,
//! an integer dot product, sums of ternary weights times floats and a prefetch. Not a
//! SIMD library: the loops over it (dot products of the head and of its scan,
//! attention's scores and values, of one token and of several, and the kernels of
//! `kernels/generic/i2g.rs`) need just these.
//!
//! The compiler vectorizes plain loops over `[f32; 16]` well, but it keeps
//! arrays of accumulators in memory. With values of a register type it keeps
//! them in registers: 4 times as fast for the head.
//!
//! An implementation is a proof type of `cpu.rs`, so that its methods are safe
//! to call; [`Portable`] is the scalar definition.

use crate::cpu::Isa;
#[cfg(target_arch = "x86_64")]
use crate::cpu::Proof;
use crate::floats::{Bf16, Element, F16, LANES};

/// Sixteen float32 lanes of one instruction set.
pub(crate) trait Lanes: Copy {
    /// Their register type.
    type V: Copy;
    /// Registers that sixteen lanes take.
    const REGISTERS: usize;
    /// Partial sums in int32, however many.
    type I: Copy;
    /// Two-bit codes of trits, sixteen in each lane, from the lowest bits on.
    type Codes: Copy;
    /// What [`add_trits`](Lanes::add_trits) makes of a number.
    type Table: Copy;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::V;
    /// Sixteen float32.
    fn load_f32(self, x: &[f32; LANES]) -> Self::V;
    /// Sixteen float16, widened exactly.
    fn load_f16(self, x: &[F16; LANES]) -> Self::V;
    /// Sixteen bfloat16, widened exactly.
    fn load_bf16(self, x: &[Bf16; LANES]) -> Self::V;
    /// `a * b + c` in each lane, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `a + b`.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c` where `a` is a trit: the product is exact, so there is one rounding
    /// however it is computed.
    fn add_exact(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// A word of codes for each lane.
    fn load_codes(self, words: &[u8; 4 * LANES]) -> Self::Codes;
    /// The codes but for the lowest of each lane.
    fn next_codes(self, codes: Self::Codes) -> Self::Codes;
    /// The trits of the lowest codes, as floats.
    fn trits(self, codes: Self::Codes) -> Self::V;
    /// `x` for [`add_trits`](Lanes::add_trits).
    fn table(self, x: f32) -> Self::Table;
    /// `sum + t * x` in each lane, `t` being the trit of the lowest code, `x` finite.
    fn add_trits(self, sum: Self::V, codes: Self::Codes, x: Self::Table) -> Self::V;
    /// The lanes as an array.
    fn to_array(self, v: Self::V) -> [f32; LANES];
    /// `sum + w . p`, over all lanes: sums wrap, and so do not depend on their
    /// order. Byte `2 j` of `w` is unsigned and meets `p[j]`; byte `2 j + 1` is
    /// signed and meets `p[32 + j]`. So both are had of 16 bits without a
    /// shuffle: by a mask, and by a shift.
    fn add_dot(self, sum: Self::I, w: &[u8; DOT], p: &[i16; DOT]) -> Self::I;
    /// No sum yet.
    fn zero(self) -> Self::I;
    /// The lanes added up.
    fn sum_i32(self, a: Self::I) -> i32;
    /// The lanes of each added up.
    #[inline(always)]
    fn sums_i32<const T: usize>(self, a: [Self::I; T]) -> [i32; T] {
        let mut out = [0; T];
        for t in 0..T {
            out[t] = self.sum_i32(a[t]);
        }
        out
    }
    /// Asks for the cache line at `p`, which need not exist.
    fn prefetch<T>(self, p: *const T);
}

/// Elements of one integer dot product of [`Lanes`]: a cache line of bytes.
pub(crate) const DOT: usize = 64;

/// The definition, in scalar code.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

impl Lanes for Portable {
    type V = [f32; LANES];
    const REGISTERS: usize = 4;
    type I = [i32; LANES];
    type Codes = [u32; LANES];
    type Table = f32;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; LANES]
    }

    #[inline(always)]
    fn load_f32(self, x: &[f32; LANES]) -> Self::V {
        *x
    }

    #[inline(always)]
    fn load_f16(self, x: &[F16; LANES]) -> Self::V {
        x.map(F16::to_f32)
    }

    #[inline(always)]
    fn load_bf16(self, x: &[Bf16; LANES]) -> Self::V {
        x.map(Bf16::to_f32)
    }

    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] + b[i])
    }

    // Not `mul_add`, which is a call where there is no instruction for it.
    #[inline(always)]
    fn add_exact(self, a: Self::V, b: Self::V, mut c: Self::V) -> Self::V {
        for i in 0..LANES {
            c[i] += a[i] * b[i];
        }
        c
    }

    #[inline(always)]
    fn load_codes(self, words: &[u8; 4 * LANES]) -> Self::Codes {
        let mut out = [0; LANES];
        for (code, bytes) in out.iter_mut().zip(words.as_chunks::<4>().0) {
            *code = u32::from_le_bytes(*bytes);
        }
        out
    }

    #[inline(always)]
    fn next_codes(self, mut codes: Self::Codes) -> Self::Codes {
        for code in &mut codes {
            *code >>= 2;
        }
        codes
    }

    #[inline(always)]
    fn trits(self, codes: Self::Codes) -> Self::V {
        let mut out = [0.0; LANES];
        for i in 0..LANES {
            out[i] = ((codes[i] & 3) as i32 - 1) as f32;
        }
        out
    }

    #[inline(always)]
    fn table(self, x: f32) -> f32 {
        x
    }

    #[inline(always)]
    fn add_trits(self, mut sum: Self::V, codes: Self::Codes, x: f32) -> Self::V {
        for i in 0..LANES {
            sum[i] += ((codes[i] & 3) as i32 - 1) as f32 * x;
        }
        sum
    }

    #[inline(always)]
    fn to_array(self, v: Self::V) -> [f32; LANES] {
        v
    }

    #[inline(always)]
    fn add_dot(self, mut sum: Self::I, w: &[u8; DOT], p: &[i16; DOT]) -> Self::I {
        for j in 0..DOT / 2 {
            let (low, high) = (i32::from(w[2 * j]), i32::from(w[2 * j + 1] as i8));
            let pair = low * i32::from(p[j]) + high * i32::from(p[DOT / 2 + j]);
            sum[j % LANES] = sum[j % LANES].wrapping_add(pair);
        }
        sum
    }

    #[inline(always)]
    fn zero(self) -> Self::I {
        [0; LANES]
    }

    #[inline(always)]
    fn sum_i32(self, a: Self::I) -> i32 {
        a.iter().fold(0, |sum, &lane| sum.wrapping_add(lane))
    }

    /// The portable code leaves it to the hardware.
    #[inline(always)]
    fn prefetch<T>(self, _p: *const T) {}
}

/// A stored type that lanes can be loaded from.
pub(crate) trait Load: Element {
    /// Sixteen of them, widened exactly.
    fn load<L: Lanes>(lanes: L, x: &[Self; LANES]) -> L::V;
}

impl Load for f32 {
    #[inline(always)]
    fn load<L: Lanes>(lanes: L, x: &[Self; LANES]) -> L::V {
        lanes.load_f32(x)
    }
}

impl Load for F16 {
    #[inline(always)]
    fn load<L: Lanes>(lanes: L, x: &[Self; LANES]) -> L::V {
        lanes.load_f16(x)
    }
}

impl Load for Bf16 {
    #[inline(always)]
    fn load<L: Lanes>(lanes: L, x: &[Self; LANES]) -> L::V {
        lanes.load_bf16(x)
    }
}

/// A loop written over [`Lanes`].
pub(crate) trait LaneOp {
    /// Runs it. Implementations are `#[inline(always)]`, and so is all they call.
    fn run<L: Lanes>(self, lanes: L);
}

/// Runs `op` with the lanes of `isa`, compiled for it.
pub(crate) fn dispatch(isa: Isa, op: impl LaneOp) {
    // Resolved here and not per level: the float half has three forms on
    // x86-64 and one, compiled for the target's baseline, elsewhere.
    match isa.proof() {
        #[cfg(target_arch = "x86_64")]
        Proof::Avx2(avx2) => run(isa, avx2, op),
        #[cfg(target_arch = "x86_64")]
        Proof::AvxVnni(vnni) => run(isa, vnni.avx2(), op),
        #[cfg(target_arch = "x86_64")]
        Proof::Avx512(avx512) => run(isa, avx512, op),
        #[cfg(target_arch = "x86_64")]
        Proof::Avx512Vbmi(vbmi) => run(isa, vbmi.avx512(), op),
        _ => op.run(Portable),
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn run<L: Lanes>(isa: Isa, lanes: L, op: impl LaneOp) {
    isa.vectorize(
        #[inline(always)]
        || op.run(lanes),
    );
}
