//! [`Lanes`] on x86-64: one register with AVX-512, two with AVX2. Each method
//! is an instruction or two; the proof types guarantee that they exist.

#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::lanes::{DOT, Lanes};
use crate::cpu::{Avx2, Avx512};
use crate::floats::{Bf16, F16, LANES};

impl Lanes for Avx512 {
    type V = __m512;
    const REGISTERS: usize = 1;
    type I = __m512i;
    type Codes = __m512i;
    type Table = __m512;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    fn load_f32(self, x: &[f32; LANES]) -> __m512 {
        // SAFETY: `self` proves AVX-512 F; the array has the 64 bytes read.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }

    #[inline(always)]
    fn load_f16(self, x: &[F16; LANES]) -> __m512 {
        // SAFETY: `self` proves AVX-512 F; the array has the 32 bytes read.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
    }

    #[inline(always)]
    fn load_bf16(self, x: &[Bf16; LANES]) -> __m512 {
        // SAFETY: `self` proves AVX-512 F; the array has the 32 bytes read.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn add_exact(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        self.fma(a, b, c)
    }

    #[inline(always)]
    fn load_codes(self, words: &[u8; 4 * LANES]) -> __m512i {
        // SAFETY: `self` proves AVX-512 F; the array has the 64 bytes read.
        unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
    }

    #[inline(always)]
    fn next_codes(self, codes: __m512i) -> __m512i {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_srli_epi32::<2>(codes) }
    }

    #[inline(always)]
    fn trits(self, codes: __m512i) -> __m512 {
        // SAFETY: `self` proves AVX-512 F. The lowest two bits of each lane choose.
        unsafe { _mm512_permutevar_ps(self.table(1.0), codes) }
    }

    #[inline(always)]
    fn table(self, x: f32) -> __m512 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe {
            let signs = _mm512_broadcast_f32x4(_mm_setr_ps(-1.0, 0.0, 1.0, 0.0));
            _mm512_mul_ps(signs, _mm512_set1_ps(x))
        }
    }

    #[inline(always)]
    fn add_trits(self, sum: __m512, codes: __m512i, x: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_add_ps(sum, _mm512_permutevar_ps(x, codes)) }
    }

    #[inline(always)]
    fn to_array(self, v: __m512) -> [f32; LANES] {
        let mut out = [0f32; LANES];
        // SAFETY: `self` proves AVX-512 F; the array has the 64 bytes written.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), v) };
        out
    }

    #[inline(always)]
    fn add_dot(self, sum: __m512i, w: &[u8; DOT], p: &[i16; DOT]) -> __m512i {
        let p: *const __m512i = p.as_ptr().cast();
        // SAFETY: `self` proves AVX-512 BW; the arrays have the 64 and 128 bytes read.
        unsafe {
            let w = _mm512_loadu_si512(w.as_ptr().cast());
            let low = _mm512_and_si512(w, _mm512_set1_epi16(0xff));
            let high = _mm512_srai_epi16::<8>(w);
            let sum = _mm512_add_epi32(sum, _mm512_madd_epi16(low, _mm512_loadu_si512(p)));
            _mm512_add_epi32(sum, _mm512_madd_epi16(high, _mm512_loadu_si512(p.add(1))))
        }
    }

    #[inline(always)]
    fn zero(self) -> __m512i {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    fn sum_i32(self, a: __m512i) -> i32 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_reduce_add_epi32(a) }
    }

    #[inline(always)]
    fn prefetch<T>(self, p: *const T) {
        // SAFETY: a hint, which faults at no address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
}

impl Lanes for Avx2 {
    type V = [__m256; 2];
    const REGISTERS: usize = 2;
    type I = __m256i;
    type Codes = [__m256i; 2];
    type Table = __m256;

    #[inline(always)]
    fn splat(self, x: f32) -> [__m256; 2] {
        // SAFETY: `self` proves AVX.
        unsafe { [_mm256_set1_ps(x); 2] }
    }

    #[inline(always)]
    fn load_f32(self, x: &[f32; LANES]) -> [__m256; 2] {
        // SAFETY: `self` proves AVX; the array has the 64 bytes read.
        unsafe { [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))] }
    }

    #[inline(always)]
    fn load_f16(self, x: &[F16; LANES]) -> [__m256; 2] {
        let x: *const __m128i = x.as_ptr().cast();
        // SAFETY: `self` proves F16C; the array has the 32 bytes read.
        unsafe { [_mm256_cvtph_ps(_mm_loadu_si128(x)), _mm256_cvtph_ps(_mm_loadu_si128(x.add(1)))] }
    }

    #[inline(always)]
    fn load_bf16(self, x: &[Bf16; LANES]) -> [__m256; 2] {
        let x: *const __m128i = x.as_ptr().cast();
        // SAFETY: `self` proves AVX2; the array has the 32 bytes read.
        unsafe {
            [x, x.add(1)].map(|half| {
                let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(half));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
            })
        }
    }

    #[inline(always)]
    fn fma(self, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: `self` proves FMA.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    fn add(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: `self` proves AVX.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn add_exact(self, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
        self.fma(a, b, c)
    }

    #[inline(always)]
    fn load_codes(self, words: &[u8; 4 * LANES]) -> [__m256i; 2] {
        let words: *const __m256i = words.as_ptr().cast();
        // SAFETY: `self` proves AVX; the array has the 64 bytes read.
        unsafe { [_mm256_loadu_si256(words), _mm256_loadu_si256(words.add(1))] }
    }

    #[inline(always)]
    fn next_codes(self, codes: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: `self` proves AVX2.
        unsafe { [_mm256_srli_epi32::<2>(codes[0]), _mm256_srli_epi32::<2>(codes[1])] }
    }

    #[inline(always)]
    fn trits(self, codes: [__m256i; 2]) -> [__m256; 2] {
        let one = self.table(1.0);
        // SAFETY: `self` proves AVX. The lowest two bits of each lane choose.
        unsafe { [_mm256_permutevar_ps(one, codes[0]), _mm256_permutevar_ps(one, codes[1])] }
    }

    #[inline(always)]
    fn table(self, x: f32) -> __m256 {
        // SAFETY: `self` proves AVX.
        unsafe {
            let signs = _mm256_setr_ps(-1.0, 0.0, 1.0, 0.0, -1.0, 0.0, 1.0, 0.0);
            _mm256_mul_ps(signs, _mm256_set1_ps(x))
        }
    }

    #[inline(always)]
    fn add_trits(self, sum: [__m256; 2], codes: [__m256i; 2], x: __m256) -> [__m256; 2] {
        // SAFETY: `self` proves AVX.
        unsafe {
            [
                _mm256_add_ps(sum[0], _mm256_permutevar_ps(x, codes[0])),
                _mm256_add_ps(sum[1], _mm256_permutevar_ps(x, codes[1])),
            ]
        }
    }

    #[inline(always)]
    fn to_array(self, v: [__m256; 2]) -> [f32; LANES] {
        let mut out = [0f32; LANES];
        // SAFETY: `self` proves AVX; the array has the 64 bytes written.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), v[1]);
        }
        out
    }

    #[inline(always)]
    fn add_dot(self, sum: __m256i, w: &[u8; DOT], p: &[i16; DOT]) -> __m256i {
        let (w, p): (*const __m256i, *const __m256i) = (w.as_ptr().cast(), p.as_ptr().cast());
        // SAFETY: `self` proves AVX2; the arrays have the 64 and 128 bytes read.
        unsafe {
            let w = [w, w.add(1)].map(|w| _mm256_loadu_si256(w));
            let low = w.map(|w| _mm256_and_si256(w, _mm256_set1_epi16(0xff)));
            let high = w.map(|w| _mm256_srai_epi16::<8>(w));
            // `p` in the order in which it stands: two loads of a cycle from the same half of
            // different cache lines would take two.
            let product = |w, i| _mm256_madd_epi16(w, _mm256_loadu_si256(p.add(i)));
            let lows = _mm256_add_epi32(product(low[0], 0), product(low[1], 1));
            let highs = _mm256_add_epi32(product(high[0], 2), product(high[1], 3));
            _mm256_add_epi32(sum, _mm256_add_epi32(lows, highs))
        }
    }

    #[inline(always)]
    fn zero(self) -> __m256i {
        // SAFETY: `self` proves AVX.
        unsafe { _mm256_setzero_si256() }
    }

    #[inline(always)]
    fn sum_i32(self, a: __m256i) -> i32 {
        let mut lanes = [0i32; 8];
        // SAFETY: `self` proves AVX; the array has the 32 bytes written.
        unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), a) };
        lanes.iter().fold(0, |sum, &lane| sum.wrapping_add(lane))
    }

    /// Eight at once: lanes of neighbours are added to each other three times.
    #[inline(always)]
    fn sums_i32<const T: usize>(self, a: [__m256i; T]) -> [i32; T] {
        let mut out = [0; T];
        if T < 4 {
            for t in 0..T {
                out[t] = self.sum_i32(a[t]);
            }
            return out;
        }
        for (a, out) in a.chunks(8).zip(out.chunks_mut(8)) {
            let mut v = [self.zero(); 8];
            v[..a.len()].copy_from_slice(a);
            let mut sums = [0; 8];
            // SAFETY: `self` proves AVX2; the array has the 32 bytes written.
            unsafe {
                let pair = |i| _mm256_hadd_epi32(v[i], v[i + 1]);
                let low = _mm256_hadd_epi32(pair(0), pair(2));
                let high = _mm256_hadd_epi32(pair(4), pair(6));
                let halves = _mm256_add_epi32(
                    _mm256_permute2x128_si256::<0x20>(low, high),
                    _mm256_permute2x128_si256::<0x31>(low, high),
                );
                _mm256_storeu_si256(sums.as_mut_ptr().cast(), halves);
            }
            out.copy_from_slice(&sums[..out.len()]);
        }
        out
    }

    #[inline(always)]
    fn prefetch<T>(self, p: *const T) {
        // SAFETY: a hint, which faults at no address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
}
