//! Vector look-up tables with AVX2: a lane of int16 for each of 16 tokens. What
//! they are and the loops around these are in `vlut.rs`.

use std::arch::x86_64::*;

use super::super::generic::blocks::ROWS;
use super::super::generic::i2::FIELDS as I2_FIELDS;
use super::super::generic::t5::{FIELDS as T5_FIELDS, PAIRS, SIGN, TRIPLES, TRITS};
use super::super::vlut::{self, Build, LANES, Line, Lines, Table, Tables, Vlut, WIDE, pass_bytes};
use super::super::{Kernel, Part, Prepared};
use super::avx2_i2::Avx2I2;
use super::avx2_t5::Avx2T5;
use super::prefetch_at;
use crate::cpu::Avx2;

/// Tables of a pass over i2: four of 81 lines are 21 KB, which share an L1 of 32
/// KB with the sums and indices that stream through it.
pub(super) const I2_TABLES: usize = 4;

/// Tables of a pass over t5: one of 243 lines is 16 KB.
const T5_TABLES: usize = 1;

/// Inputs left over from whole blocks up to which dot products are as fast as tables: a
/// narrow pass of i2 takes the time of 16, in which they do 14 (Zen 3, one thread, 2560 x 2560:
/// 146 and 130 GMAC/s for 16 and 14 inputs).
const FEW: usize = 14;

/// The same of t5, whose dot products are slower.
const T5_FEW: usize = 8;

/// Tables over i2.
pub(super) fn i2(proof: Avx2) -> impl Kernel {
    let units = &[WIDE, LANES];
    Vlut::new("avx2-i2-vlut", Avx2I2::new(proof), FEW, units, move |wide, parts, xs, first| {
        // SAFETY: `proof` says that the CPU has AVX2.
        unsafe { multiply_i2(proof, wide, parts, xs, first) }
    })
}

/// Tables over t5. Narrow only: a wide pass would add one table for each trip of a
/// row's sums.
pub(super) fn t5(proof: Avx2) -> impl Kernel {
    Vlut::new("avx2-t5-vlut", Avx2T5::new(proof), T5_FEW, &[LANES], move |_, parts, xs, first| {
        // SAFETY: `proof` says that the CPU has AVX2.
        unsafe { multiply_t5(proof, parts, xs, first) }
    })
}

#[target_feature(enable = "avx2")]
fn multiply_i2(l: Avx2, wide: bool, parts: &mut [Part<'_>], xs: &[Prepared], first: usize) {
    if wide {
        vlut::gemm::<I2_FIELDS, I2_TABLES, _>(l, true, parts, xs, first);
    } else {
        vlut::gemm::<I2_FIELDS, I2_TABLES, _>(l, false, parts, xs, first);
    }
}

#[target_feature(enable = "avx2")]
fn multiply_t5(l: Avx2, parts: &mut [Part<'_>], xs: &[Prepared], first: usize) {
    vlut::gemm::<T5_FIELDS, T5_TABLES, _>(l, false, parts, xs, first);
}

impl Lines for Avx2 {
    #[inline(always)]
    fn transpose(self, q: [&[i8; LANES]; LANES], out: &mut [[i16; LANES]; LANES]) {
        // SAFETY: `self` proves that the CPU has AVX2.
        unsafe { transpose(q, out) }
    }

    #[inline(always)]
    fn prefetch(self, bytes: &[u8], distance: usize) {
        prefetch_at(bytes, distance);
    }

    #[inline(always)]
    fn split(self, taken: usize, group: &[u8], index: &mut [u64], stride: usize) {
        // SAFETY: as in `transpose`.
        unsafe {
            match taken {
                8 => split::<8>(group, index, stride),
                4 => split::<4>(group, index, stride),
                2 => split::<2>(group, index, stride),
                _ => unreachable!("passes of the layouts above"),
            }
        }
    }

    #[inline(always)]
    fn add<const T: usize>(
        self,
        wide: bool,
        fresh: bool,
        tables: &Tables,
        index: &[u64],
        sums: &mut [i16],
    ) {
        // SAFETY: as in `transpose`.
        unsafe {
            match (wide, fresh) {
                (true, true) => add::<T, true, true>(tables, index, sums),
                (true, false) => add::<T, true, false>(tables, index, sums),
                (false, true) => add::<T, false, true>(tables, index, sums),
                (false, false) => add::<T, false, false>(tables, index, sums),
            }
        }
    }

    #[inline(always)]
    fn widen(self, fresh: bool, sums: &[i16], wide_sums: &mut [i32]) {
        // SAFETY: as in `transpose`.
        unsafe {
            if fresh {
                widen::<true>(sums, wide_sums);
            } else {
                widen::<false>(sums, wide_sums);
            }
        }
    }

    #[inline(always)]
    fn rescale(
        self,
        sums: [&[i32; LANES]; ROWS],
        divisors: &[f32; LANES],
        scale: f32,
        out: &mut [[f32; ROWS]; LANES],
    ) {
        // SAFETY: as in `transpose`.
        unsafe { rescale(sums, divisors, scale, out) }
    }
}

impl Build<I2_FIELDS> for Avx2 {
    #[inline(always)]
    fn build(self, columns: &[Line; I2_FIELDS], table: &mut Table) {
        // SAFETY: `self` proves that the CPU has AVX2.
        unsafe { build_i2(columns, table) }
    }
}

impl Build<T5_FIELDS> for Avx2 {
    #[inline(always)]
    fn build(self, columns: &[Line; T5_FIELDS], table: &mut Table) {
        // SAFETY: `self` proves that the CPU has AVX2.
        unsafe { build_t5(columns, table) }
    }
}

/// [`Lines::split`] for passes of `BYTES` bytes, 2, 4 or 8: transpositions of units
/// of so many.
#[target_feature(enable = "avx2")]
#[inline]
fn split<const BYTES: usize>(group: &[u8], index: &mut [u64], stride: usize) {
    const { assert!(BYTES == 2 || BYTES == 4 || BYTES == 8) };
    let n = group.len() / ROWS;
    assert!(n.is_multiple_of(16) && n > 0);
    assert!(stride >= BYTES / 2 && index.len() >= (n / BYTES - 1) * stride + BYTES / 2);
    let group = group.as_ptr();
    let index = index.as_mut_ptr();
    // Two words from `word` on of a pass.
    let put = |pass: usize, word: usize, v| {
        // SAFETY: `pass < n / BYTES` and `word + 2 <= BYTES / 2`, for which `index` was
        // found to have room; no alignment is needed.
        unsafe { _mm_storeu_si128(index.add(pass * stride + word).cast(), v) }
    };
    // The only word of two passes.
    let put_two = |pass: usize, v| {
        // SAFETY: `pass + 1 < n / BYTES`, and as above.
        unsafe {
            _mm_storel_epi64(index.add(pass * stride).cast(), v);
            let high = _mm_unpackhi_epi64(v, v);
            _mm_storel_epi64(index.add((pass + 1) * stride).cast(), high);
        }
    };
    for at in (0..n).step_by(16) {
        let mut v = [_mm_setzero_si128(); ROWS];
        for r in 0..ROWS {
            // SAFETY: row `r` has the bytes from `r * n` on, and 16 of them from `at` on,
            // since `n` is a multiple of 16.
            v[r] = unsafe { _mm_loadu_si128(group.add(r * n + at).cast()) };
        }
        let pass = at / BYTES;
        if BYTES == 8 {
            for half in 0..2 {
                let (a, b) = (v[2 * half], v[2 * half + 1]);
                put(pass, 2 * half, _mm_unpacklo_epi64(a, b));
                put(pass + 1, 2 * half, _mm_unpackhi_epi64(a, b));
            }
        } else if BYTES == 2 {
            let (a, b) = (_mm_unpacklo_epi16(v[0], v[1]), _mm_unpackhi_epi16(v[0], v[1]));
            let (c, d) = (_mm_unpacklo_epi16(v[2], v[3]), _mm_unpackhi_epi16(v[2], v[3]));
            put_two(pass, _mm_unpacklo_epi32(a, c));
            put_two(pass + 2, _mm_unpackhi_epi32(a, c));
            put_two(pass + 4, _mm_unpacklo_epi32(b, d));
            put_two(pass + 6, _mm_unpackhi_epi32(b, d));
        } else {
            let (a, b) = (_mm_unpacklo_epi32(v[0], v[1]), _mm_unpackhi_epi32(v[0], v[1]));
            let (c, d) = (_mm_unpacklo_epi32(v[2], v[3]), _mm_unpackhi_epi32(v[2], v[3]));
            put(pass, 0, _mm_unpacklo_epi64(a, c));
            put(pass + 1, 0, _mm_unpackhi_epi64(a, c));
            put(pass + 2, 0, _mm_unpacklo_epi64(b, d));
            put(pass + 3, 0, _mm_unpackhi_epi64(b, d));
        }
    }
}

/// [`Lines::widen`]. A function of its own: the compiler must know that the
/// slices do not overlap.
#[target_feature(enable = "avx2")]
#[inline(never)]
fn widen<const FRESH: bool>(sums: &[i16], wide_sums: &mut [i32]) {
    for (wide, sum) in wide_sums.iter_mut().zip(sums) {
        *wide = if FRESH { 0 } else { *wide } + i32::from(*sum);
    }
}

/// [`Lines::rescale`].
#[target_feature(enable = "avx2")]
#[inline]
fn rescale(
    sums: [&[i32; LANES]; ROWS],
    divisors: &[f32; LANES],
    scale: f32,
    out: &mut [[f32; ROWS]; LANES],
) {
    let scale = _mm256_set1_ps(scale);
    for half in 0..2 {
        let divisors = load_f32(&divisors.as_chunks().0[half]);
        let mut v = [scale; ROWS];
        for r in 0..ROWS {
            let sums = _mm256_cvtepi32_ps(load_i32(&sums[r].as_chunks().0[half]));
            v[r] = _mm256_mul_ps(_mm256_div_ps(sums, divisors), scale);
        }
        // Four by four in each half of the registers.
        let (a, b) = (_mm256_unpacklo_ps(v[0], v[1]), _mm256_unpackhi_ps(v[0], v[1]));
        let (c, d) = (_mm256_unpacklo_ps(v[2], v[3]), _mm256_unpackhi_ps(v[2], v[3]));
        let low =
            |x, y| _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(x), _mm256_castps_pd(y)));
        let high =
            |x, y| _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(x), _mm256_castps_pd(y)));
        for (t, v) in [low(a, c), high(a, c), low(b, d), high(b, d)].into_iter().enumerate() {
            store_f32(&mut out[8 * half + t], _mm256_castps256_ps128(v));
            store_f32(&mut out[8 * half + 4 + t], _mm256_extractf128_ps::<1>(v));
        }
    }
}

/// [`Lines::transpose`].
#[target_feature(enable = "avx2")]
#[inline]
fn transpose(q: [&[i8; LANES]; LANES], out: &mut [[i16; LANES]; LANES]) {
    let mut v = [_mm_setzero_si128(); LANES];
    for i in 0..LANES {
        // SAFETY: the array has the 16 bytes that are read; no alignment is needed.
        v[i] = unsafe { _mm_loadu_si128(q[i].as_ptr().cast()) };
    }
    // Each round takes the highest bit of the token's number to the end of the
    // column's, and the column's highest to the end of the token's.
    for _ in 0..LANES.ilog2() {
        let mut next = v;
        for i in 0..LANES / 2 {
            next[2 * i] = _mm_unpacklo_epi8(v[i], v[i + LANES / 2]);
            next[2 * i + 1] = _mm_unpackhi_epi8(v[i], v[i + LANES / 2]);
        }
        v = next;
    }
    for i in 0..LANES {
        store(&mut out[i], _mm256_cvtepi8_epi16(v[i]));
    }
}

/// [`Build::build`] for i2, whose bytes hold the codes `t + 1` of four fields.
#[target_feature(enable = "avx2")]
#[inline]
fn build_i2(columns: &[Line; I2_FIELDS], table: &mut Table) {
    for half in 0..2 {
        let [a, b, c, d] = columns.each_ref().map(
            #[inline(always)]
            |line| load(&line.0[half]),
        );
        // All four codes 0: every activation times -1.
        let all = _mm256_add_epi16(_mm256_add_epi16(a, b), _mm256_add_epi16(c, d));
        let mut v3 = _mm256_sub_epi16(_mm256_setzero_si256(), all);
        for code3 in 0..3 {
            let mut v2 = v3;
            for code2 in 0..3 {
                let mut v1 = v2;
                for code1 in 0..3 {
                    let lines = &mut table[code3 << 6 | code2 << 4 | code1 << 2..][..3];
                    let one = _mm256_add_epi16(v1, a);
                    store(&mut lines[0].0[half], v1);
                    store(&mut lines[1].0[half], one);
                    store(&mut lines[2].0[half], _mm256_add_epi16(one, a));
                    v1 = _mm256_add_epi16(v1, b);
                }
                v2 = _mm256_add_epi16(v2, c);
            }
            v3 = _mm256_add_epi16(v3, d);
        }
    }
}

/// [`Build::build`] for t5: 122 patterns, and their opposites.
#[target_feature(enable = "avx2")]
#[inline]
fn build_t5(columns: &[Line; T5_FIELDS], table: &mut Table) {
    /// Bytes of each pair with the triple (0, 0, 0), of each triple with the pair (0, 0),
    /// and of both together, as the layout has them.
    const fn of_pair(h: usize) -> usize {
        h << 4 | 1
    }
    const fn of_triple(t: usize) -> usize {
        t << 3
    }
    const fn of_both(h: usize, t: usize) -> usize {
        h << 4 | (t + 1 + t / 7)
    }
    for half in 0..2 {
        let zero = _mm256_setzero_si256();
        let mut q = [zero; T5_FIELDS];
        for f in 0..T5_FIELDS {
            q[f] = load(&columns[f].0[half]);
        }
        let sum = |byte: usize| {
            let mut sum = zero;
            for f in 0..T5_FIELDS {
                let trit = _mm256_set1_epi16(i16::from(TRITS[byte][f]));
                sum = _mm256_add_epi16(sum, _mm256_sign_epi16(q[f], trit));
            }
            sum
        };
        let mut put = |byte: usize, sum| {
            store(&mut table[byte].0[half], sum);
            store(&mut table[byte | usize::from(SIGN)].0[half], _mm256_sub_epi16(zero, sum));
        };
        let mut pairs = [zero; PAIRS.len()];
        for (h, pair) in pairs.iter_mut().enumerate() {
            *pair = sum(of_pair(h));
        }
        for t in 0..TRIPLES.len() {
            let triple = sum(of_triple(t));
            put(of_triple(t), triple);
            for (h, pair) in pairs.iter().enumerate() {
                put(of_both(h, t), _mm256_add_epi16(*pair, triple));
            }
        }
    }
}

/// [`Lines::add`].
#[target_feature(enable = "avx2")]
#[inline]
fn add<const T: usize, const WIDE: bool, const FRESH: bool>(
    tables: &Tables,
    index: &[u64],
    sums: &mut [i16],
) {
    let bytes = pass_bytes(T, WIDE);
    let halves = if WIDE { 2 } else { 1 };
    let sums = sums.as_chunks_mut::<LANES>().0;
    let quads = index.chunks_exact(ROWS * bytes / 8).zip(sums.chunks_exact_mut(ROWS * halves));
    for (index, sums) in quads {
        for (r, sums) in sums.chunks_exact_mut(halves).enumerate() {
            let mut acc = [_mm256_setzero_si256(); 2];
            if !FRESH {
                for half in 0..halves {
                    acc[half] = load(&sums[half]);
                }
            }
            for i in 0..bytes {
                let at = r * bytes + i;
                let byte = (index[at / 8] >> (at % 8 * 8)) as u8;
                if WIDE {
                    let line = tables.line(i, byte);
                    acc[0] = _mm256_add_epi16(acc[0], load_in_order(&line.0[0]));
                    acc[1] = _mm256_add_epi16(acc[1], load_in_order(&line.0[1]));
                } else {
                    let line = tables.line(i / 2, byte);
                    acc[0] = _mm256_add_epi16(acc[0], load_in_order(&line.0[i % 2]));
                }
            }
            for half in 0..halves {
                store(&mut sums[half], acc[half]);
            }
        }
    }
}

#[target_feature(enable = "avx2")]
#[inline]
fn load(lanes: &[i16; LANES]) -> __m256i {
    // SAFETY: the array has the 32 bytes that are read; no alignment is needed.
    unsafe { _mm256_loadu_si256(lanes.as_ptr().cast()) }
}

/// Loads in the order of the calls, which the compiler would change: from the two
/// halves of lines in turns.
#[target_feature(enable = "avx2")]
#[inline]
fn load_in_order(lanes: &[i16; LANES]) -> __m256i {
    /// A vector without its alignment.
    #[repr(C, packed)]
    struct Unaligned(__m256i);
    // SAFETY: the array has the 32 bytes that are read, any bytes are a vector of
    // integers, and the type has no alignment.
    unsafe { std::ptr::read_volatile(lanes.as_ptr().cast::<Unaligned>()).0 }
}

#[target_feature(enable = "avx2")]
#[inline]
fn store(lanes: &mut [i16; LANES], v: __m256i) {
    // SAFETY: the array has the 32 bytes that are written; no alignment is needed.
    unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), v) }
}

#[target_feature(enable = "avx2")]
#[inline]
fn load_i32(v: &[i32; 8]) -> __m256i {
    // SAFETY: the array has the 32 bytes that are read; no alignment is needed.
    unsafe { _mm256_loadu_si256(v.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
#[inline]
fn load_f32(v: &[f32; 8]) -> __m256 {
    // SAFETY: as in `load_i32`.
    unsafe { _mm256_loadu_ps(v.as_ptr()) }
}

#[target_feature(enable = "avx2")]
#[inline]
fn store_f32(to: &mut [f32; ROWS], v: __m128) {
    // SAFETY: the array has the 16 bytes that are written; no alignment is needed.
    unsafe { _mm_storeu_ps(to.as_mut_ptr(), v) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{Isa, Proof};

    /// The line of every byte that a packer writes.
    #[test]
    fn tables_have_the_sums_of_the_layouts() {
        let Some(avx2) = Isa::available().iter().find_map(|isa| match isa.proof() {
            Proof::Avx2(proof) => Some(proof),
            _ => None,
        }) else {
            return;
        };
        let columns: [Line; 5] = std::array::from_fn(|f| {
            Line(std::array::from_fn(|half| {
                std::array::from_fn(|i| ((f * 67 + half * 31 + i * 53) % 256) as i16 - 128)
            }))
        });
        let check = |table: &Table, byte: usize, trits: &[i8]| {
            for half in 0..2 {
                for i in 0..LANES {
                    let products =
                        trits.iter().zip(&columns).map(|(&t, c)| i16::from(t) * c.0[half][i]);
                    assert_eq!(table[byte].0[half][i], products.sum::<i16>(), "byte {byte:#04x}");
                }
            }
        };
        let mut table = [Line([[0; LANES]; 2]); 256];
        avx2.build(&columns, &mut table);
        for byte in (0..256).filter(|&byte| TRITS[byte] != [0; 5] || byte == 0) {
            check(&table, byte, &TRITS[byte]);
        }
        avx2.build(columns.first_chunk::<4>().unwrap(), &mut table);
        for byte in 0..256usize {
            let trits: Vec<i8> = (0..4).map(|f| (byte >> (2 * f) & 3) as i8 - 1).collect();
            if !trits.contains(&2) {
                check(&table, byte, &trits);
            }
        }
    }
}
