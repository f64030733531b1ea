//! i2 with AVX2, several tokens at once: up to eight of them, a *run*, meet each
//! row's codes in registers. Apart from `avx2_i2.rs`, the GEMV, because
//! activations and sums are arranged otherwise.
//!
//! ```text
//! for inputs in blocks of 64
//!   arrange the activations, all tokens of a run side by side
//!   for rows in tiles of 128, fewer where there are several runs
//!     for columns in chunks of 2560
//!       for runs of 8 tokens                       activations stay in L1: 20 KB
//!         for rows of the tile
//!           acc[t] = -(sum of the activations)
//!           for 32 packed bytes, for field c of them
//!             acc[t] += maddubs(c, q[t])           for each token
//!     rescale the sums
//! ```
//!
//! `vpmaddubsw` multiplies 32 codes by 32 activations and adds pairs, on two of four
//! pipes; the other two add its result, so that 64 multiplications a cycle are the
//! limit of this arithmetic, 58 with the seven instructions that unpack 128 codes. One
//! row and eight tokens need one load for each product, an operand of it, of the two that
//! a cycle has. Activations stand in the order of their use: two loads of a cycle from the
//! same half of different cache lines would take two.
//!
//! The bound: every sum of codes times activations begins with minus the
//! activations, so it is one of trits times activations in the end; whatever int16
//! did in between does not matter. A product has two of them, at most 128 in size each,
//! and the [`REGISTERS`] of a chunk 80 products: 20480.
//!
//! Measured on one thread of a Zen 3, 10240 x 2560 weights, quantizing included, GMAC/s: 102
//! for 2 tokens, 133 for 4, 145 for 8, 139 for 12, 132 for 64. Narrow matrices are slower, for
//! a row's lanes to be added up: 768 x 256 weights 79 for 8. The loop itself, in assembly and
//! from L1, comes to 157, which is what `vpmaddubsw` and its addition come to without any
//! loads (150 to 173): additions take its pipes. Unpacked into L1 and multiplied in tiles of
//! four rows and three tokens, as t5 still is: 94 for 8 where this was 137.
//!
//! What brought that from 135 to 145, and from 59 to 79 for the narrow ones: tiles of 128
//! rows instead of 16, outputs of eight rows at once instead of eight tokens at once, which
//! were stored one by one, sums that are not zeroed first.
//!
//! Tried, 8 tokens: two rows by four tokens 121, four by two 100; codes unpacked into L1
//! first and then a row by eight 133 where this was 139; half as many columns in a chunk
//! 137, for more adding up of lanes; 12 tokens in a run 126. Without [`apart`] 128. With
//! fewer tokens, several rows at once, to add up their lanes together: 7 % faster for 2
//! tokens by 4 rows, 10 % slower for 4 by 2.

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

use super::super::generic::blocks::{BLOCK_BYTES, ROWS};
use super::super::generic::i2::{BLOCK_COLS, Cut, FIELDS};
use super::super::{PackedMatrix, Part, Prepared};
use super::avx2_tile::{load, load_i8};
use super::prefetch_at;
use crate::memory::AlignedBytes;

/// Tokens of a run: their sums are half of the registers.
const RUN: usize = 8;

/// Inputs whose activations are arranged together.
const INPUTS: usize = 8 * RUN;

/// Sums of a tile, rows times runs: a whole number of eights of rows, whatever the runs.
const SUMS: usize = 16 * INPUTS / RUN;

/// Rows ahead of their use that weights are asked for.
const AHEAD: usize = 16;

/// Bytes of a register.
const STEP: usize = 32;

/// Registers of packed bytes of a chunk: two for each block.
const REGISTERS: usize = 2 * 10;

/// What meets a register of packed bytes: for each field the columns of each token.
type Columns<const T: usize> = [[[i8; STEP]; T]; FIELDS];

/// Sums of a row for the tokens of a run.
type Sums = [i32; RUN];

/// Activations, arranged, and what sums of a chunk begin with.
#[derive(Default)]
struct Scratch {
    columns: AlignedBytes,
    offsets: AlignedBytes,
}

/// Multiplies as [`Kernel::gemm_parts`](super::super::Kernel::gemm_parts) does.
#[target_feature(enable = "avx2")]
pub(super) fn gemm_parts(parts: &mut [Part<'_>], xs: &[Prepared]) {
    thread_local! {
        static SCRATCH: RefCell<Scratch> = RefCell::default();
    }
    let Some(cols) = parts.first().map(|p| p.w.cols) else { return };
    let cut = Cut::new(cols);
    let registers = 2 * cut.blocks + cut.tail.div_ceil(STEP);
    let mut sums = [[0; RUN]; SUMS];
    // Taken and put back: a closure that `with` runs is not compiled for AVX2.
    let mut scratch = SCRATCH.take();
    for (block, xs) in xs.chunks(INPUTS).enumerate() {
        let run = xs.len().div_ceil(xs.len().div_ceil(RUN));
        let batch = Batch::arrange(cut, registers, run, xs, &mut scratch);
        // As many as there are sums for, in whole eights.
        let tile = SUMS / xs.len().div_ceil(run) / 8 * 8;
        for Part { w, rows, ys } in &mut *parts {
            assert!(w.cols == cols);
            let start = rows.start;
            let ys = &mut ys[block * INPUTS..][..xs.len()];
            for first in rows.clone().step_by(tile) {
                let rows = first..rows.end.min(first + tile);
                batch.multiply(w, start, rows, xs, ys, &mut sums);
            }
        }
    }
    SCRATCH.set(scratch);
}

/// Inputs that are multiplied together, arranged.
struct Batch<'a> {
    cut: Cut,
    /// Registers of packed bytes of a row.
    registers: usize,
    /// Tokens of a run, but for the last.
    run: usize,
    inputs: usize,
    /// `[run][register][field][token][column]`.
    columns: &'a [[i8; STEP]],
    /// `[run][chunk][token][lane]`.
    offsets: &'a [[i16; STEP / 2]],
}

impl<'a> Batch<'a> {
    #[target_feature(enable = "avx2")]
    fn arrange(
        cut: Cut,
        registers: usize,
        run: usize,
        xs: &[Prepared],
        s: &'a mut Scratch,
    ) -> Self {
        let chunk = chunk(registers);
        let chunks = registers.div_ceil(chunk);
        s.columns.resize(registers * FIELDS * xs.len() * STEP);
        s.offsets.resize(chunks * xs.len() * STEP);
        let columns = s.columns.as_mut_i8().as_chunks_mut::<STEP>().0;
        let offsets = s.offsets.as_mut_slice_of::<i16>().as_chunks_mut::<{ STEP / 2 }>().0;
        let parts =
            columns.chunks_mut(registers * FIELDS * run).zip(offsets.chunks_mut(chunks * run));
        for (xs, (columns, offsets)) in xs.chunks(run).zip(parts) {
            let n = xs.len();
            let columns = columns.chunks_mut(chunk * FIELDS * n).zip(offsets.chunks_mut(n));
            for ((columns, offsets), start) in columns.zip((0..).step_by(chunk)) {
                for (t, x) in xs.iter().enumerate() {
                    let acc = arrange_token(cut, start, x.padded(), columns, n, t);
                    // SAFETY: the array has the 32 bytes that are written; no alignment is needed.
                    unsafe { _mm256_storeu_si256(offsets[t].as_mut_ptr().cast(), acc) };
                }
            }
        }
        Self { cut, registers, run, inputs: xs.len(), columns, offsets }
    }

    /// The products of some rows, of which there are sums for all runs; `ys` begin at row
    /// `start`.
    #[target_feature(enable = "avx2")]
    fn multiply(
        &self,
        w: &PackedMatrix,
        start: usize,
        rows: Range<usize>,
        xs: &[Prepared],
        ys: &mut [&mut [f32]],
        sums: &mut [Sums; SUMS],
    ) {
        let each = SUMS / self.inputs.div_ceil(self.run);
        let step = chunk(self.registers);
        for (c, from) in (0..self.registers).step_by(step).enumerate() {
            let registers = from..self.registers.min(from + step);
            for (at, sums) in (0..self.inputs).step_by(self.run).zip(sums.chunks_exact_mut(each)) {
                let (r, c) = (rows.clone(), (c, registers.clone()));
                match self.run.min(self.inputs - at) {
                    1 => self.add_run::<1>(w, r, at, c, sums),
                    2 => self.add_run::<2>(w, r, at, c, sums),
                    3 => self.add_run::<3>(w, r, at, c, sums),
                    4 => self.add_run::<4>(w, r, at, c, sums),
                    5 => self.add_run::<5>(w, r, at, c, sums),
                    6 => self.add_run::<6>(w, r, at, c, sums),
                    7 => self.add_run::<7>(w, r, at, c, sums),
                    _ => self.add_run::<8>(w, r, at, c, sums),
                }
            }
        }
        let runs = xs.chunks(self.run).zip(ys.chunks_mut(self.run));
        for ((xs, ys), sums) in runs.zip(sums.chunks_exact(each)) {
            let rows = rows.start - start..rows.end - start;
            for (first, sums) in rows.clone().step_by(8).zip(sums.as_chunks().0) {
                put(sums, w.scale, xs, ys, first..rows.end.min(first + 8));
            }
        }
    }

    /// Adds the products of some rows and the `T` tokens from `at` on, over the
    /// registers of a chunk.
    #[target_feature(enable = "avx2")]
    fn add_run<const T: usize>(
        &self,
        w: &PackedMatrix,
        rows: Range<usize>,
        at: usize,
        (chunk_index, registers): (usize, Range<usize>),
        sums: &mut [Sums],
    ) {
        let columns = &self.columns[at * self.registers * FIELDS..].as_chunks::<T>().0;
        let columns: &[Columns<T>] = &columns.as_chunks::<FIELDS>().0[registers.clone()];
        let chunks = self.registers.div_ceil(chunk(self.registers));
        let offsets = &self.offsets[at * chunks..].as_chunks::<T>().0[chunk_index];
        let first = registers.start / 2;
        let full = registers.end.min(2 * self.cut.blocks) - registers.start;
        let (columns, tail_columns) = columns.split_at(full);
        let columns = columns.as_chunks::<2>().0;
        let ahead = AHEAD / ROWS * w.group_bytes;
        for (group, sums) in w.groups(rows.clone()).zip(sums.chunks_mut(ROWS)) {
            let (blocks, tail) = group.split_at(self.cut.blocks * ROWS * BLOCK_BYTES);
            let blocks = &blocks.as_chunks::<{ ROWS * BLOCK_BYTES }>().0[first..][..columns.len()];
            for (i, sums) in sums.iter_mut().enumerate() {
                let mut acc = [_mm256_setzero_si256(); T];
                for t in 0..T {
                    acc[t] = load_i16(&offsets[t]);
                }
                for (block, columns) in blocks.iter().zip(columns) {
                    let row = &block.as_chunks::<BLOCK_BYTES>().0[i];
                    prefetch_at(row, ahead);
                    let halves: &[[u8; STEP]; 2] = row.as_chunks().0.try_into().expect("64 bytes");
                    add_register(&mut acc, &halves[0], &columns[0]);
                    add_register(&mut acc, &halves[1], &columns[1]);
                }
                for (columns, at) in tail_columns.iter().zip((0..).step_by(STEP)) {
                    let n = (self.cut.tail - at).min(STEP);
                    let mut codes = [0; STEP];
                    codes[..n].copy_from_slice(&tail[i * self.cut.tail + at..][..n]);
                    add_register(&mut acc, &codes, columns);
                }
                add_lanes(acc, chunk_index == 0, sums);
            }
        }
    }
}

/// Registers of each chunk but the last: whole blocks, about as many in all chunks.
fn chunk(registers: usize) -> usize {
    registers.div_ceil(registers.div_ceil(REGISTERS)).next_multiple_of(2)
}

/// Writes the columns of token `t` of `n` of a chunk from register `start` on, and
/// returns minus the sum of those that meet in a lane.
#[target_feature(enable = "avx2")]
#[inline]
fn arrange_token(
    cut: Cut,
    start: usize,
    q: &[i8],
    columns: &mut [[i8; STEP]],
    n: usize,
    t: usize,
) -> __m256i {
    let q = &q[start / 2 * BLOCK_COLS..];
    let full = cut.blocks.saturating_sub(start / 2);
    let mut acc = _mm256_setzero_si256();
    let mut blocks = columns.chunks_mut(2 * FIELDS * n);
    for (to, q) in blocks.by_ref().take(full).zip(q.as_chunks::<BLOCK_COLS>().0) {
        for half in 0..2 {
            for field in 0..FIELDS {
                let q = q[field * BLOCK_BYTES + half * STEP..].first_chunk().expect("a block");
                acc = put_columns(acc, load_i8(q), &mut to[(half * FIELDS + field) * n + t]);
            }
        }
    }
    for (i, to) in blocks.flat_map(|to| to.chunks_mut(n)).enumerate() {
        let (at, field) = (i / FIELDS * STEP, i % FIELDS);
        // Zeros after the tail, where no codes are.
        let mut padded = [0; STEP];
        let len = (cut.tail - at).min(STEP);
        padded[..len].copy_from_slice(&q[full * BLOCK_COLS + field * cut.tail + at..][..len]);
        acc = put_columns(acc, load_i8(&padded), &mut to[t]);
    }
    acc
}

/// Writes some columns, and takes them from the sum.
#[target_feature(enable = "avx2")]
#[inline]
fn put_columns(acc: __m256i, q: __m256i, to: &mut [i8; STEP]) -> __m256i {
    // SAFETY: the array has the 32 bytes that are written; no alignment is needed.
    unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), q) };
    _mm256_sub_epi16(acc, _mm256_maddubs_epi16(_mm256_set1_epi8(1), q))
}

/// Adds the products of 32 packed bytes of a row and their columns.
#[target_feature(enable = "avx2")]
#[inline]
fn add_register<const T: usize>(acc: &mut [__m256i; T], codes: &[u8; STEP], columns: &Columns<T>) {
    let low = _mm256_set1_epi8(3);
    let c = load(codes);
    let fields =
        [c, _mm256_srli_epi16::<2>(c), _mm256_srli_epi16::<4>(c), _mm256_srli_epi16::<6>(c)];
    for f in 0..FIELDS {
        let code = _mm256_and_si256(fields[f], low);
        for t in 0..T {
            let products = _mm256_maddubs_epi16(code, load_i8(&columns[f][t]));
            acc[t] = apart(_mm256_add_epi16(acc[t], products));
        }
    }
}

/// Itself, but to the compiler another value: it would add products to each other
/// first, and run out of registers.
#[target_feature(enable = "avx2")]
#[inline]
fn apart(mut v: __m256i) -> __m256i {
    // SAFETY: no instruction.
    unsafe {
        asm!("/* {} */", inout(ymm_reg) v, options(pure, nomem, nostack, preserves_flags));
    }
    v
}

/// Adds the lanes of each register to one of `sums`, the first time to zero.
#[target_feature(enable = "avx2")]
#[inline]
fn add_lanes<const T: usize>(acc: [__m256i; T], first: bool, sums: &mut Sums) {
    let ones = _mm256_set1_epi16(1);
    let mut v = [_mm256_setzero_si256(); RUN];
    for t in 0..T {
        v[t] = _mm256_madd_epi16(acc[t], ones);
    }
    // A transposition whose parts are added on the way.
    let mut pairs = [_mm256_setzero_si256(); RUN / 2];
    for i in 0..RUN / 2 {
        let (a, b) = (v[2 * i], v[2 * i + 1]);
        pairs[i] = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    }
    let mut fours = [_mm256_setzero_si256(); RUN / 4];
    for i in 0..RUN / 4 {
        let (a, b) = (pairs[2 * i], pairs[2 * i + 1]);
        fours[i] = _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
    }
    let low = _mm256_permute2x128_si256::<0x20>(fours[0], fours[1]);
    let high = _mm256_permute2x128_si256::<0x31>(fours[0], fours[1]);
    let found = _mm256_add_epi32(low, high);
    // SAFETY: the array has the 32 bytes that are read and written; no alignment is needed.
    unsafe {
        let sums: *mut __m256i = sums.as_mut_ptr().cast();
        let before = if first { _mm256_setzero_si256() } else { _mm256_loadu_si256(sums) };
        _mm256_storeu_si256(sums, _mm256_add_epi32(before, found));
    }
}

/// [`Prepared::rescale`] of up to eight rows' sums, to the places `at` of each output.
#[target_feature(enable = "avx2")]
#[inline]
fn put(sums: &[Sums; 8], scale: f32, xs: &[Prepared], ys: &mut [&mut [f32]], at: Range<usize>) {
    let scale = _mm256_set1_ps(scale);
    for ((x, y), sums) in xs.iter().zip(ys).zip(transpose(sums)) {
        let quotients = _mm256_div_ps(_mm256_cvtepi32_ps(sums), _mm256_set1_ps(x.divisor));
        let found = _mm256_mul_ps(quotients, scale);
        let y = &mut y[at.clone()];
        let mut out = [0.0; 8];
        let whole = y.first_chunk_mut().unwrap_or(&mut out);
        // SAFETY: the array has the 32 bytes that are written; no alignment is needed.
        unsafe { _mm256_storeu_ps(whole.as_mut_ptr(), found) };
        if y.len() < 8 {
            y.copy_from_slice(&out[..y.len()]);
        }
    }
}

/// Eight rows' sums for each token.
#[target_feature(enable = "avx2")]
#[inline]
fn transpose(sums: &[Sums; 8]) -> [__m256i; RUN] {
    let mut v = [_mm256_setzero_si256(); 8];
    for i in 0..8 {
        // SAFETY: the array has the 32 bytes that are read; no alignment is needed.
        v[i] = unsafe { _mm256_loadu_si256(sums[i].as_ptr().cast()) };
    }
    let mut pairs = v;
    for i in 0..4 {
        pairs[2 * i] = _mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        pairs[2 * i + 1] = _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    let mut fours = v;
    for i in [0, 4] {
        for j in 0..2 {
            fours[i + 2 * j] = _mm256_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
            fours[i + 2 * j + 1] = _mm256_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
        }
    }
    for i in 0..4 {
        v[i] = _mm256_permute2x128_si256::<0x20>(fours[i], fours[i + 4]);
        v[i + 4] = _mm256_permute2x128_si256::<0x31>(fours[i], fours[i + 4]);
    }
    v
}

#[target_feature(enable = "avx2")]
#[inline]
fn load_i16(lanes: &[i16; STEP / 2]) -> __m256i {
    // SAFETY: the array has the 32 bytes that are read; no alignment is needed.
    unsafe { _mm256_loadu_si256(lanes.as_ptr().cast()) }
}
