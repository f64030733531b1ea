//! Vector look-up tables with AVX-512: a line of 32 tokens is one register. What
//! they are and the loops around these are in `vlut.rs`; what is not hot is that of
//! AVX2 (`avx2_vlut.rs`).
//!
//! A wide pass over i2 is five loads of 64 bytes, four additions and a store for 512
//! multiplications. Where a cycle has one such load (Zen 4), that is what ten loads of
//! AVX2 come to, with half the instructions; where it has two, half the time. A narrow
//! pass takes its halves from different lines, and remains AVX2's. Not timed: counted.

use std::arch::x86_64::*;

use super::super::generic::blocks::ROWS;
use super::super::generic::i2::FIELDS;
use super::super::vlut::{self, Build, LANES, Line, Lines, Table, Tables, Vlut, WIDE};
use super::super::{Kernel, Part, Prepared};
use super::avx2_vlut::I2_TABLES;
use super::avx512_i2::Avx512I2;
use crate::cpu::Avx512;

/// Inputs left over from whole blocks that are still worth tables: a narrow pass takes
/// the time of 16, in which `vpdpbusd` would do 14, by count.
const FEW: usize = 13;

/// Tables over i2.
pub(super) fn i2(proof: Avx512) -> impl Kernel {
    let units = &[WIDE, LANES];
    Vlut::new("avx512-i2-vlut", Avx512I2::new(proof), FEW, units, move |wide, parts, xs, first| {
        // SAFETY: `proof` says that the CPU has AVX-512 F and BW.
        unsafe { multiply(proof, wide, parts, xs, first) }
    })
}

#[target_feature(enable = "avx512f,avx512bw")]
fn multiply(l: Avx512, wide: bool, parts: &mut [Part<'_>], xs: &[Prepared], first: usize) {
    if wide {
        vlut::gemm::<FIELDS, I2_TABLES, _>(l, true, parts, xs, first);
    } else {
        vlut::gemm::<FIELDS, I2_TABLES, _>(l, false, parts, xs, first);
    }
}

impl Lines for Avx512 {
    #[inline(always)]
    fn transpose(self, q: [&[i8; LANES]; LANES], out: &mut [[i16; LANES]; LANES]) {
        self.avx2().transpose(q, out);
    }

    #[inline(always)]
    fn prefetch(self, bytes: &[u8], distance: usize) {
        self.avx2().prefetch(bytes, distance);
    }

    #[inline(always)]
    fn split(self, taken: usize, group: &[u8], index: &mut [u64], stride: usize) {
        self.avx2().split(taken, group, index, stride);
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
        if !wide {
            return self.avx2().add::<T>(false, fresh, tables, index, sums);
        }
        // SAFETY: `self` proves that the CPU has AVX-512 F and BW.
        unsafe {
            if fresh {
                add_wide::<T, true>(tables, index, sums);
            } else {
                add_wide::<T, false>(tables, index, sums);
            }
        }
    }

    #[inline(always)]
    fn widen(self, fresh: bool, sums: &[i16], wide_sums: &mut [i32]) {
        self.avx2().widen(fresh, sums, wide_sums);
    }

    #[inline(always)]
    fn rescale(
        self,
        sums: [&[i32; LANES]; ROWS],
        divisors: &[f32; LANES],
        scale: f32,
        out: &mut [[f32; ROWS]; LANES],
    ) {
        self.avx2().rescale(sums, divisors, scale, out);
    }
}

impl Build<FIELDS> for Avx512 {
    #[inline(always)]
    fn build(self, columns: &[Line; FIELDS], table: &mut Table) {
        // SAFETY: `self` proves that the CPU has AVX-512 F and BW.
        unsafe { build(columns, table) }
    }
}

/// [`Build::build`]: as AVX2's, a line at a time.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn build(columns: &[Line; FIELDS], table: &mut Table) {
    let (a, b) = (load(&columns[0]), load(&columns[1]));
    let (c, d) = (load(&columns[2]), load(&columns[3]));
    // All four codes 0: every activation times -1.
    let all = _mm512_add_epi16(_mm512_add_epi16(a, b), _mm512_add_epi16(c, d));
    let mut v3 = _mm512_sub_epi16(_mm512_setzero_si512(), all);
    for code3 in 0..3 {
        let mut v2 = v3;
        for code2 in 0..3 {
            let mut v1 = v2;
            for code1 in 0..3 {
                let lines = &mut table[code3 << 6 | code2 << 4 | code1 << 2..][..3];
                let one = _mm512_add_epi16(v1, a);
                store(&mut lines[0], v1);
                store(&mut lines[1], one);
                store(&mut lines[2], _mm512_add_epi16(one, a));
                v1 = _mm512_add_epi16(v1, b);
            }
            v2 = _mm512_add_epi16(v2, c);
        }
        v3 = _mm512_add_epi16(v3, d);
    }
}

/// [`Lines::add`], wide.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn add_wide<const T: usize, const FRESH: bool>(tables: &Tables, index: &[u64], sums: &mut [i16]) {
    let sums = sums.as_chunks_mut::<WIDE>().0;
    let quads = index.chunks_exact(ROWS * T / 8).zip(sums.as_chunks_mut::<ROWS>().0);
    for (index, sums) in quads {
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: the array has the 64 bytes that are read and written; no alignment is
            // needed.
            unsafe {
                let sums = sums.as_mut_ptr().cast();
                let mut acc = if FRESH { _mm512_setzero_si512() } else { _mm512_loadu_si512(sums) };
                for i in 0..T {
                    let at = r * T + i;
                    let byte = (index[at / 8] >> (at % 8 * 8)) as u8;
                    acc = _mm512_add_epi16(acc, load(tables.line(i, byte)));
                }
                _mm512_storeu_si512(sums, acc);
            }
        }
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn load(line: &Line) -> __m512i {
    // SAFETY: a line is 64 aligned bytes.
    unsafe { _mm512_load_si512(std::ptr::from_ref(line).cast()) }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn store(line: &mut Line, v: __m512i) {
    // SAFETY: a line is 64 aligned bytes.
    unsafe { _mm512_store_si512(std::ptr::from_mut(line).cast(), v) }
}
