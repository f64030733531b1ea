//! t5 with AVX-512 VBMI and VNNI. The index of a byte is one of 128, and
//! `vpermi2b` looks up 64 bytes in a table of 128 entries. It ignores bit 7,
//! which is the sign:
//!
//! ```text
//! for 64 packed bytes p of a row:                  320 weights
//!   four = permi2b(FOUR, p)                        codes t + 1 of a, b, c, d
//!   last = permi2b(LAST, p)                        and that of e
//!   minus = movb2m(p)
//!   four = 0b10101010 - four, where minus          t + 1 becomes 2 - (t + 1)
//!   last = 2 - last, where minus
//!   acc0 = dpbusd(dpbusd(acc0, last, qe), four & 3, qa)
//!   acc1 = dpbusd(acc1, four & 12, qb)             code * 4
//!   acc2 = dpbusd(acc2, four & 48, qc)             code * 16
//!   acc3 = dpbusd(acc3, four & 192, qd)            code * 64
//! in the end: sum = acc0 + acc1 / 4 + acc2 / 16 + acc3 / 64
//! ```
//!
//! 14 instructions and a load for 320 weights. No field borrows from the next
//! in the subtraction, because no code is above 2. Divisions are shifts, exact
//! because every term is a multiple. Four rows share the loads of the
//! activations: 16 sums, 5 registers of activations and 4 of tables; of the
//! constants, those that find no register are operands in memory.
//!
//! The bound: a code times 64 is at most 128, so a lane grows by at most
//! 4 * 128 * 128 = 2^16 a block, and there are at most 410 blocks (`MAX_COLS`):
//! below 2^25.
//!
//! GEMM unpacks once for all tokens (`avx512_tile.rs`).

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::generic::blocks::{BLOCK_BYTES, ROWS};
use super::super::generic::t5::{BLOCK_COLS, Cut, FIELDS, T5, TRITS};
use super::super::{Kernel, Layout, PackedMatrix, Prepared};
use super::avx512_tile::{CHUNK, Codes, gemm_codes};
use super::prefetch;
use crate::cpu::Avx512Vbmi;

/// Inputs from which on it pays to unpack, by count on the pipes of a Zen 4
/// (two for these instructions, one with `vpdpbusd`, half a store a cycle): for
/// 1280 columns of four rows, a GEMV takes 120 cycles, a tile 80 for every
/// input and the unpacking 190.
const UNPACK: usize = 5;

/// A block of a row, and of its activations.
type Block = [u8; BLOCK_BYTES];
type Columns = [[i8; BLOCK_BYTES]; FIELDS];

pub(super) struct Avx512VbmiT5(Avx512Vbmi);

impl Avx512VbmiT5 {
    pub(super) fn new(proof: Avx512Vbmi) -> Self {
        Self(proof)
    }
}

impl Kernel for Avx512VbmiT5 {
    fn name(&self) -> &'static str {
        "avx512vbmi-t5"
    }

    fn layout(&self) -> &'static dyn Layout {
        &T5
    }

    fn gemv(&self, w: &PackedMatrix, rows: Range<usize>, x: &Prepared, y: &mut [f32]) {
        let _proof = self.0;
        // SAFETY: `self.0` proves that the CPU has AVX-512 F, BW, VL, VNNI and VBMI.
        unsafe { multiply(w, rows, x, y) }
    }

    fn gemm(&self, w: &PackedMatrix, rows: Range<usize>, xs: &[Prepared], ys: &mut [&mut [f32]]) {
        if xs.len() < UNPACK {
            for (x, y) in xs.iter().zip(ys) {
                self.gemv(w, rows.clone(), x, y);
            }
        } else {
            let _proof = self.0;
            // SAFETY: as in `gemv`; `unpack` needs the same.
            unsafe { gemm_codes(w, rows, xs, ys, unpack) }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
fn multiply(w: &PackedMatrix, rows: Range<usize>, x: &Prepared, y: &mut [f32]) {
    for (y, first) in y.chunks_mut(ROWS).zip(rows.step_by(ROWS)) {
        for (y, sum) in y.iter_mut().zip(dot(w.group(first), x)) {
            *y = x.rescale(sum - x.sum, w.scale);
        }
    }
}

/// Sums over codes of a row group.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
#[inline]
fn dot(group: &[u8], x: &Prepared) -> [i32; ROWS] {
    let cut = Cut::new(x.cols);
    let decoder = Decoder::new();
    let mut acc = [[_mm512_setzero_si512(); 4]; ROWS];
    let blocks: &[[Block; ROWS]] = &group.as_chunks().0.as_chunks().0[..cut.blocks];
    let columns: &[Columns] = x.padded().as_chunks().0.as_chunks().0;
    for (block, columns) in blocks.iter().zip(columns) {
        prefetch(block.as_flattened());
        let mut q = [_mm512_setzero_si512(); FIELDS];
        for f in 0..FIELDS {
            q[f] = load_q(&columns[f]);
        }
        for i in 0..ROWS {
            add_block(&mut acc[i], decoder.decode(load(&block[i])), q);
        }
    }
    if cut.tail != 0 {
        // Zero activations after the tail: what is decoded there does not count.
        let mut q = [_mm512_setzero_si512(); FIELDS];
        for f in 0..FIELDS {
            q[f] = load_tail(&x.padded()[cut.blocks * BLOCK_COLS + f * cut.tail..], cut.tail);
        }
        for i in 0..ROWS {
            let bytes = load_tail(&group[cut.block(cut.blocks, i)], cut.tail);
            add_block(&mut acc[i], decoder.decode(bytes), q);
        }
    }
    let mut sums = [0; ROWS];
    for i in 0..ROWS {
        let [a, b, c, d] = acc[i];
        let ab = _mm512_add_epi32(a, _mm512_srai_epi32::<2>(b));
        let cd = _mm512_add_epi32(_mm512_srai_epi32::<4>(c), _mm512_srai_epi32::<6>(d));
        sums[i] = _mm512_reduce_add_epi32(_mm512_add_epi32(ab, cd));
    }
    sums
}

/// Adds the products of one block of a row, by the factors of its codes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
#[inline]
fn add_block(acc: &mut [__m512i; 4], codes: [__m512i; 2], q: [__m512i; FIELDS]) {
    let masks = [
        _mm512_set1_epi8(0b11),
        _mm512_set1_epi8(0b11 << 2),
        _mm512_set1_epi8(0b11 << 4),
        _mm512_set1_epi8((0b11u8 << 6) as i8),
    ];
    let [four, last] = codes;
    for f in 0..4 {
        acc[f] = _mm512_dpbusd_epi32(acc[f], _mm512_and_si512(four, masks[f]), q[f]);
    }
    acc[0] = _mm512_dpbusd_epi32(acc[0], last, q[4]);
}

/// By index: the codes of a, b, c and d, two bits each.
const FOUR: [[u8; 64]; 2] = {
    let mut table = [[0; 64]; 2];
    let mut i = 0;
    while i < 128 {
        let [a, b, c, d, _] = TRITS[i];
        table[i / 64][i % 64] = (a + 1 + 4 * (b + 1) + 16 * (c + 1)) as u8 + 64 * (d + 1) as u8;
        i += 1;
    }
    table
};

/// By index: the code of e.
const LAST: [[u8; 64]; 2] = {
    let mut table = [[0; 64]; 2];
    let mut i = 0;
    while i < 128 {
        table[i / 64][i % 64] = (TRITS[i][4] + 1) as u8;
        i += 1;
    }
    table
};

/// The tables in registers.
#[derive(Clone, Copy)]
struct Decoder {
    four: [__m512i; 2],
    last: [__m512i; 2],
}

impl Decoder {
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn new() -> Self {
        Self { four: [load(&FOUR[0]), load(&FOUR[1])], last: [load(&LAST[0]), load(&LAST[1])] }
    }

    /// The codes of a, b, c and d, two bits each, and that of e.
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    #[inline]
    fn decode(self, p: __m512i) -> [__m512i; 2] {
        let four = _mm512_permutex2var_epi8(self.four[0], p, self.four[1]);
        let last = _mm512_permutex2var_epi8(self.last[0], p, self.last[1]);
        let minus = _mm512_movepi8_mask(p);
        let twos = _mm512_set1_epi8(0b1010_1010_u8 as i8);
        [
            _mm512_mask_sub_epi8(four, minus, twos, four),
            _mm512_mask_sub_epi8(last, minus, _mm512_set1_epi8(2), last),
        ]
    }
}

/// Loads 64 bytes.
#[target_feature(enable = "avx512f")]
#[inline]
fn load(bytes: &[u8; 64]) -> __m512i {
    // SAFETY: the array has the 64 bytes that are read; the load needs no alignment.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

/// Loads 64 activations.
#[target_feature(enable = "avx512f")]
#[inline]
fn load_q(q: &[i8; 64]) -> __m512i {
    // SAFETY: the array has the 64 bytes that are read; the load needs no alignment.
    unsafe { _mm512_loadu_si512(q.as_ptr().cast()) }
}

/// Loads the first `n` bytes, at most 64, followed by zeros.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn load_tail<T: Byte>(bytes: &[T], n: usize) -> __m512i {
    assert!(n <= bytes.len().min(64));
    let mask = u64::MAX.checked_shr(64 - n as u32).unwrap_or(0);
    // SAFETY: only the bytes under the mask are read, and `bytes` has them.
    unsafe { _mm512_maskz_loadu_epi8(mask, bytes.as_ptr().cast()) }
}

/// What [`load_tail`] may read: one-byte integers.
trait Byte {}
impl Byte for u8 {}
impl Byte for i8 {}

/// [`UnpackCodes`](super::avx512_tile::UnpackCodes) of this layout.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
fn unpack(group: &[u8], cols: usize, start: usize, out: &mut Codes) {
    let cut = Cut::new(cols);
    let decoder = Decoder::new();
    let first = start / BLOCK_COLS;
    let full = (cut.blocks - first).min(CHUNK / BLOCK_COLS);
    for b in 0..full {
        for i in 0..ROWS {
            let block = group[cut.block(first + b, i)].first_chunk().expect("a full block");
            let fields = decoder.fields(load(block));
            let out = out[i][b * BLOCK_COLS..][..BLOCK_COLS].as_chunks_mut().0;
            for f in 0..FIELDS {
                store(&mut out[f], fields[f]);
            }
        }
    }
    if full < CHUNK / BLOCK_COLS && cut.tail != 0 {
        for i in 0..ROWS {
            let fields = decoder.fields(load_tail(&group[cut.block(cut.blocks, i)], cut.tail));
            let out = &mut out[i][full * BLOCK_COLS..][..BLOCK_COLS];
            // Each field overwrites what the one before left after its end.
            for f in 0..FIELDS {
                let out = out[f * cut.tail..].first_chunk_mut();
                store(out.expect("a tail is at most 64 bytes"), fields[f]);
            }
        }
    }
}

impl Decoder {
    /// The codes of a, b, c, d and e, a register each.
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    #[inline]
    fn fields(self, p: __m512i) -> [__m512i; FIELDS] {
        let low = _mm512_set1_epi8(3);
        let [four, last] = self.decode(p);
        [
            _mm512_and_si512(four, low),
            _mm512_and_si512(_mm512_srli_epi16::<2>(four), low),
            _mm512_and_si512(_mm512_srli_epi16::<4>(four), low),
            _mm512_and_si512(_mm512_srli_epi16::<6>(four), low),
            last,
        ]
    }
}

/// Stores 64 codes.
#[target_feature(enable = "avx512f")]
#[inline]
fn store(bytes: &mut [u8; 64], v: __m512i) {
    // SAFETY: the array has the 64 bytes that are written; no alignment is needed.
    unsafe { _mm512_storeu_si512(bytes.as_mut_ptr().cast(), v) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tables, as the instructions read them: index and sign apart.
    #[test]
    fn tables_and_sign_give_the_trits() {
        for (byte, trits) in TRITS.iter().enumerate() {
            let index = byte % 128;
            let (mut four, mut last) = (FOUR[index / 64][index % 64], LAST[index / 64][index % 64]);
            if byte >= 128 {
                (four, last) = (0b1010_1010 - four, 2 - last);
            }
            let found = [four & 3, four >> 2 & 3, four >> 4 & 3, four >> 6, last];
            assert_eq!(found.map(|code| code as i8 - 1), *trits, "byte {byte:#04x}");
        }
    }
}
