//! Vector look-up tables with NEON: a lane of int16 for each of 16 tokens, in two
//! registers. What they are and the loops around these are in `vlut.rs`.
//!
//! A byte of a row is 64 products for two loads and two additions of a narrow
//! pass. The tile of `neon_tile.rs` needs eight multiplications for as many.

use std::arch::aarch64::*;

use super::super::generic::blocks::ROWS;
use super::super::generic::i2::FIELDS;
use super::super::vlut::{self, Build, LANES, Line, Lines, Table, Tables, Vlut, WIDE, pass_bytes};
use super::super::{Kernel, Part, Prepared};
use super::neon_i2::NeonI2;
use super::neon_tile::{load as load_u8, load_i8};
use crate::cpu::Neon;

/// Tables of a pass over i2: four of 81 lines are 21 KB, which share an L1 of 32
/// KB with the sums and indices that stream through it.
const TABLES: usize = 4;

/// Inputs left over from whole blocks that are multiplied without tables. A byte
/// of a row is then two `smlal` at most, one a cycle on cores with one multiplier;
/// in a narrow pass it is two additions and between two and three loads and stores
/// for any number of inputs. Counted, not measured.
const FEW: usize = 4;

/// Bytes of a register, and of the rows that are split at once.
const STEP: usize = 16;

/// Half a line.
type Half = [int16x8_t; 2];

/// Tables over i2.
pub(super) fn i2(proof: Neon) -> impl Kernel {
    let units = &[WIDE, LANES];
    Vlut::new("neon-i2-vlut", NeonI2::new(proof), FEW, units, move |wide, parts, xs, first| {
        // SAFETY: `proof` says that the CPU has NEON.
        unsafe { multiply(proof, wide, parts, xs, first) }
    })
}

#[target_feature(enable = "neon")]
fn multiply(l: Neon, wide: bool, parts: &mut [Part<'_>], xs: &[Prepared], first: usize) {
    if wide {
        vlut::gemm::<FIELDS, TABLES, _>(l, true, parts, xs, first);
    } else {
        vlut::gemm::<FIELDS, TABLES, _>(l, false, parts, xs, first);
    }
}

impl Lines for Neon {
    #[inline(always)]
    fn transpose(self, q: [&[i8; LANES]; LANES], out: &mut [[i16; LANES]; LANES]) {
        // SAFETY: `self` proves that the CPU has NEON.
        unsafe { transpose(q, out) }
    }

    /// Does nothing: the intrinsic, `_prefetch`, is not stable.
    #[inline(always)]
    fn prefetch(self, _bytes: &[u8], _distance: usize) {}

    #[inline(always)]
    fn split(self, taken: usize, group: &[u8], index: &mut [u64], stride: usize) {
        // SAFETY: as in `transpose`.
        unsafe {
            match taken {
                8 => split::<8>(group, index, stride),
                4 => split::<4>(group, index, stride),
                _ => unreachable!("passes of the layout above"),
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

impl Build<FIELDS> for Neon {
    #[inline(always)]
    fn build(self, columns: &[Line; FIELDS], table: &mut Table) {
        // SAFETY: `self` proves that the CPU has NEON.
        unsafe { build_i2(columns, table) }
    }
}

/// [`Lines::transpose`].
#[target_feature(enable = "neon")]
#[inline]
fn transpose(q: [&[i8; LANES]; LANES], out: &mut [[i16; LANES]; LANES]) {
    let mut v = [vdupq_n_s8(0); LANES];
    for i in 0..LANES {
        v[i] = load_i8(q[i]);
    }
    // Each round takes the highest bit of the token's number to the end of the
    // column's, and the column's highest to the end of the token's.
    for _ in 0..LANES.ilog2() {
        let mut next = v;
        for i in 0..LANES / 2 {
            next[2 * i] = vzip1q_s8(v[i], v[i + LANES / 2]);
            next[2 * i + 1] = vzip2q_s8(v[i], v[i + LANES / 2]);
        }
        v = next;
    }
    for i in 0..LANES {
        store(&mut out[i], [vmovl_s8(vget_low_s8(v[i])), vmovl_high_s8(v[i])]);
    }
}

/// [`Lines::split`] for passes of `BYTES` bytes, 4 or 8: transpositions of units
/// of so many.
#[target_feature(enable = "neon")]
#[inline]
fn split<const BYTES: usize>(group: &[u8], index: &mut [u64], stride: usize) {
    const { assert!(BYTES == 4 || BYTES == 8) };
    let group = group.as_chunks::<STEP>().0;
    let n = group.len() / ROWS;
    for k in 0..n {
        let mut v = [vdupq_n_u8(0); ROWS];
        for r in 0..ROWS {
            v[r] = load_u8(&group[r * n + k]);
        }
        let first = k * STEP / BYTES;
        if BYTES == 8 {
            let (a, b) = (low_u64(v[0], v[1]), low_u64(v[2], v[3]));
            let (c, d) = (high_u64(v[0], v[1]), high_u64(v[2], v[3]));
            for (pass, words) in (first..).zip([[a, b], [c, d]]) {
                store_words(&mut index[pass * stride..], words);
            }
        } else {
            let (a, b) = (low_u32(v[0], v[1]), high_u32(v[0], v[1]));
            let (c, d) = (low_u32(v[2], v[3]), high_u32(v[2], v[3]));
            let words = [low_u64(a, c), high_u64(a, c), low_u64(b, d), high_u64(b, d)];
            for (pass, words) in (first..).zip(words) {
                store_words(&mut index[pass * stride..], [words]);
            }
        }
    }
}

/// [`Build::build`] for i2, whose bytes hold the codes `t + 1` of four fields.
#[target_feature(enable = "neon")]
#[inline]
fn build_i2(columns: &[Line; FIELDS], table: &mut Table) {
    for half in 0..2 {
        let mut q = [[vdupq_n_s16(0); 2]; FIELDS];
        for f in 0..FIELDS {
            q[f] = load(&columns[f].0[half]);
        }
        let [a, b, c, d] = q;
        // All four codes 0: every activation times -1.
        let all = sum(sum(a, b), sum(c, d));
        let mut v3 = [vnegq_s16(all[0]), vnegq_s16(all[1])];
        for code3 in 0..3 {
            let mut v2 = v3;
            for code2 in 0..3 {
                let mut v1 = v2;
                for code1 in 0..3 {
                    let lines = &mut table[code3 << 6 | code2 << 4 | code1 << 2..][..3];
                    let one = sum(v1, a);
                    store(&mut lines[0].0[half], v1);
                    store(&mut lines[1].0[half], one);
                    store(&mut lines[2].0[half], sum(one, a));
                    v1 = sum(v1, b);
                }
                v2 = sum(v2, c);
            }
            v3 = sum(v3, d);
        }
    }
}

/// [`Lines::add`].
#[target_feature(enable = "neon")]
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
            let mut acc = [[vdupq_n_s16(0); 2]; 2];
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
                    acc[0] = sum(acc[0], load(&line.0[0]));
                    acc[1] = sum(acc[1], load(&line.0[1]));
                } else {
                    let line = tables.line(i / 2, byte);
                    acc[0] = sum(acc[0], load(&line.0[i % 2]));
                }
            }
            for half in 0..halves {
                store(&mut sums[half], acc[half]);
            }
        }
    }
}

/// [`Lines::widen`]. A function of its own: the compiler must know that the
/// slices do not overlap.
#[target_feature(enable = "neon")]
#[inline(never)]
fn widen<const FRESH: bool>(sums: &[i16], wide_sums: &mut [i32]) {
    for (wide, sum) in wide_sums.iter_mut().zip(sums) {
        *wide = if FRESH { 0 } else { *wide } + i32::from(*sum);
    }
}

/// [`Lines::rescale`].
#[target_feature(enable = "neon")]
#[inline]
fn rescale(
    sums: [&[i32; LANES]; ROWS],
    divisors: &[f32; LANES],
    scale: f32,
    out: &mut [[f32; ROWS]; LANES],
) {
    let scale = vdupq_n_f32(scale);
    for (quarter, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
        let divisors = load_f32(&divisors.as_chunks().0[quarter]);
        let mut v = [scale; ROWS];
        for r in 0..ROWS {
            let sums = vcvtq_f32_s32(load_i32(&sums[r].as_chunks().0[quarter]));
            v[r] = vmulq_f32(vdivq_f32(sums, divisors), scale);
        }
        store_transposed(out, v);
    }
}

/// Lane by lane.
#[target_feature(enable = "neon")]
#[inline]
fn sum(a: Half, b: Half) -> Half {
    [vaddq_s16(a[0], b[0]), vaddq_s16(a[1], b[1])]
}

/// The low halves of `a` and `b`, four bytes of each in turns.
#[target_feature(enable = "neon")]
#[inline]
fn low_u32(a: uint8x16_t, b: uint8x16_t) -> uint8x16_t {
    vreinterpretq_u8_u32(vzip1q_u32(vreinterpretq_u32_u8(a), vreinterpretq_u32_u8(b)))
}

/// The high halves, likewise.
#[target_feature(enable = "neon")]
#[inline]
fn high_u32(a: uint8x16_t, b: uint8x16_t) -> uint8x16_t {
    vreinterpretq_u8_u32(vzip2q_u32(vreinterpretq_u32_u8(a), vreinterpretq_u32_u8(b)))
}

/// The low halves of `a` and `b`, one after the other.
#[target_feature(enable = "neon")]
#[inline]
fn low_u64(a: uint8x16_t, b: uint8x16_t) -> uint8x16_t {
    vreinterpretq_u8_u64(vzip1q_u64(vreinterpretq_u64_u8(a), vreinterpretq_u64_u8(b)))
}

/// The high halves, likewise.
#[target_feature(enable = "neon")]
#[inline]
fn high_u64(a: uint8x16_t, b: uint8x16_t) -> uint8x16_t {
    vreinterpretq_u8_u64(vzip2q_u64(vreinterpretq_u64_u8(a), vreinterpretq_u64_u8(b)))
}

#[target_feature(enable = "neon")]
#[inline]
fn load(lanes: &[i16; LANES]) -> Half {
    let at = lanes.as_ptr();
    // SAFETY: the array has the twice 16 bytes that are read; no alignment is needed.
    unsafe { [vld1q_s16(at), vld1q_s16(at.add(LANES / 2))] }
}

#[target_feature(enable = "neon")]
#[inline]
fn store(lanes: &mut [i16; LANES], v: Half) {
    let at = lanes.as_mut_ptr();
    // SAFETY: the array has the twice 16 bytes that are written; no alignment is needed.
    unsafe {
        vst1q_s16(at, v[0]);
        vst1q_s16(at.add(LANES / 2), v[1]);
    }
}

/// Stores registers at the beginning of `words`.
#[target_feature(enable = "neon")]
#[inline]
fn store_words<const N: usize>(words: &mut [u64], v: [uint8x16_t; N]) {
    for (words, v) in words[..2 * N].as_chunks_mut::<2>().0.iter_mut().zip(v) {
        // SAFETY: the array has the 16 bytes that are written; no alignment is needed.
        unsafe { vst1q_u64(words.as_mut_ptr(), vreinterpretq_u64_u8(v)) }
    }
}

#[target_feature(enable = "neon")]
#[inline]
fn load_i32(v: &[i32; 4]) -> int32x4_t {
    // SAFETY: the array has the 16 bytes that are read; no alignment is needed.
    unsafe { vld1q_s32(v.as_ptr()) }
}

#[target_feature(enable = "neon")]
#[inline]
fn load_f32(v: &[f32; 4]) -> float32x4_t {
    // SAFETY: as in `load_i32`.
    unsafe { vld1q_f32(v.as_ptr()) }
}

/// `to[i][r] = v[r][i]`.
#[target_feature(enable = "neon")]
#[inline]
fn store_transposed(to: &mut [[f32; ROWS]; 4], v: [float32x4_t; ROWS]) {
    let v = float32x4x4_t(v[0], v[1], v[2], v[3]);
    // SAFETY: the array has the 64 bytes that are written; no alignment is needed.
    unsafe { vst4q_f32(to.as_mut_ptr().cast(), v) }
}
