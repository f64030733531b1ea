//! t5 with AVX2. Three look-ups of 16 entries (`vpshufb`) decode a byte into
//! five 2-bit codes `t + 1`; `vpmaddubsw` multiplies codes by activations and
//! adds pairs into int16; sums widen to int32 before they can overflow.
//!
//! ```text
//! for 32 packed bytes p of a row:                  160 weights
//!   x = TRIPLE[p bits 3:0]                         128 + (c + 4 d + 16 e), or NONE
//!   y = min(PAIR[p bits 7:4], x)                   codes of a, b; (0, 0) for NONE
//!   x = max(SPARSE[p bits 6:3], x)                 64 + (c + 4 d + 16 e) for NONE
//!   x = sign(x, p) + 21                            codes of c, d, e in bits 5:0
//!   single      += maddubs(y & 3, qa) + maddubs(x & 3, qc)
//!   fourfold    += maddubs(y & 12, qb) + maddubs(x & 12, qd)
//!   sixteenfold += maddubs(x & 48, qe)
//! ```
//!
//! `min` and `max` choose between the two forms of the code, by what stands
//! above the fields: a regular triple is above all sparse ones and above all
//! pairs, and [`NONE`] is below. They take any of the four pipes of a Zen;
//! `vpblendvb`, which would do as well, takes two there, and is up to three
//! instructions on Intel. Multiples of 64 above the triple survive the sign and
//! the sum and are masked away with the other fields.
//!
//! Fields are masked where they stand, so that a code comes out times 1, 4 or
//! 16, each with its own sum: a shift less for each, and what is saved is more
//! than what the earlier widening costs.
//!
//! That is 27 instructions for 160 weights and one for widening. Zen 3 has four
//! pipes, and independent instructions of this mix keep all of them busy: 7
//! cycles, 23 weights a cycle. Measured: 18 (58 Gweights/s at 3.2 GHz) from
//! cache, 17 from memory. What is missing is reach: a register passes through
//! 12 instructions one after the other, so that three registers must be under
//! way at once, and the schedulers hold 64 instructions, ready or not. Two
//! things help, and cost two stores: four blocks of a row are decoded into L1
//! before the first of them is multiplied (6 % faster), and activations are
//! operands in memory. As registers that four rows share, they are spilt (5 %
//! slower).
//!
//! Tried without gain: a row from end to end, windows of two blocks, a decoder
//! that runs one register ahead (it spills, and loses 15 %). Bits 7:4 are
//! `vpavgb(p >> 3 & 31, 31)`, too, one instruction less; the intrinsic is
//! compiled to eight, and as `asm!` it brought 1.5 %.
//!
//! GEMM unpacks once for all tokens (`avx2_tile.rs`). Two are a little faster
//! than two GEMVs, three by a third.

use std::arch::x86_64::*;
use std::array::from_ref;
use std::hint::black_box;
use std::ops::Range;

use super::super::generic::blocks::{BLOCK_BYTES, ROWS};
use super::super::generic::t5::{BLOCK_COLS, Cut, FIELDS, PAIRS, T5, TRIPLES};
use super::super::{Kernel, Layout, PackedMatrix, Prepared};
use super::avx2_tile::{CHUNK, Codes, add_lanes, gemm_codes, load, load_i8};
use super::prefetch;
use crate::cpu::Avx2;

/// Blocks between two widenings, as many as the bounds at [`add_row`] allow.
pub(super) const WINDOW: usize = 4;

/// A block of a row, and of its activations.
pub(super) type Block = [u8; BLOCK_BYTES];
pub(super) type Columns = [[i8; BLOCK_BYTES]; FIELDS];

pub(super) struct Avx2T5(Avx2);

impl Avx2T5 {
    pub(super) fn new(proof: Avx2) -> Self {
        Self(proof)
    }
}

impl Kernel for Avx2T5 {
    fn name(&self) -> &'static str {
        "avx2-t5"
    }

    fn layout(&self) -> &'static dyn Layout {
        &T5
    }

    fn gemv(&self, w: &PackedMatrix, rows: Range<usize>, x: &Prepared, y: &mut [f32]) {
        let _proof = self.0;
        // SAFETY: `self.0` proves that the CPU has AVX2.
        unsafe { multiply(w, rows, x, y) }
    }

    fn gemm(&self, w: &PackedMatrix, rows: Range<usize>, xs: &[Prepared], ys: &mut [&mut [f32]]) {
        let _proof = self.0;
        // SAFETY: as in `gemv`; `unpack` needs AVX2, too.
        unsafe { gemm_codes(w, rows, xs, ys, unpack) }
    }
}

#[target_feature(enable = "avx2")]
fn multiply(w: &PackedMatrix, rows: Range<usize>, x: &Prepared, y: &mut [f32]) {
    let cut = Cut::new(w.cols);
    let columns = full_columns(x);
    let tail_columns = tail_columns(cut, x);
    for (y, first) in y.chunks_mut(ROWS).zip(rows.step_by(ROWS)) {
        let sums = dot(w.group(first), cut, columns, &tail_columns);
        for (y, sum) in y.iter_mut().zip(sums) {
            *y = x.rescale(sum - x.sum, w.scale);
        }
    }
}

/// Activations in blocks: those of full blocks, and a few more.
pub(super) fn full_columns(x: &Prepared) -> &[Columns] {
    x.padded().as_chunks().0.as_chunks().0
}

/// Activations of the last block as if it were a full one: fields of 64 bytes,
/// with zeros after `tail`, so that what is decoded there does not count.
pub(super) fn tail_columns(cut: Cut, x: &Prepared) -> Columns {
    let mut columns = [[0; BLOCK_BYTES]; FIELDS];
    if cut.tail != 0 {
        let q = x.padded()[cut.blocks * BLOCK_COLS..].chunks_exact(cut.tail);
        for (columns, q) in columns.iter_mut().zip(q) {
            columns[..cut.tail].copy_from_slice(q);
        }
    }
    columns
}

/// The last block of each row of a group as if it were a full one. Copied in
/// pieces of 16 bytes, which need no call.
#[inline]
pub(super) fn tail_blocks(cut: Cut, group: &[u8]) -> [Block; ROWS] {
    let mut blocks = [[0; BLOCK_BYTES]; ROWS];
    for i in 0..ROWS {
        let tail = group[cut.block(cut.blocks, i)].as_chunks::<16>().0;
        for (to, from) in blocks[i].as_chunks_mut().0.iter_mut().zip(tail) {
            *to = *from;
        }
    }
    blocks
}

/// Sums over codes of a row group.
#[target_feature(enable = "avx2")]
#[inline]
fn dot(group: &[u8], cut: Cut, columns: &[Columns], tail_columns: &Columns) -> [i32; ROWS] {
    let decoder = Decoder::new();
    let mut sums = [_mm256_setzero_si256(); ROWS];
    let blocks: &[[Block; ROWS]] = &group.as_chunks().0.as_chunks().0[..cut.blocks];
    let (windows, rest) = blocks.as_chunks::<WINDOW>();
    let (columns, rest_columns) = columns[..cut.blocks].as_chunks::<WINDOW>();
    for (blocks, columns) in windows.iter().zip(columns) {
        for i in 0..ROWS {
            // A quarter of the window with each row.
            prefetch(blocks[i].as_flattened());
            add_row(&decoder, &mut sums[i], blocks, i, columns);
        }
    }
    for (block, columns) in rest.iter().zip(rest_columns) {
        for i in 0..ROWS {
            add_row(&decoder, &mut sums[i], from_ref(block), i, from_ref(columns));
        }
    }
    if cut.tail != 0 {
        let block = tail_blocks(cut, group);
        for i in 0..ROWS {
            add_row(&decoder, &mut sums[i], from_ref(&block), i, from_ref(tail_columns));
        }
    }
    add_lanes(sums)
}

/// Adds the products of some blocks of row `i` to int32 lanes.
///
/// The bounds: codes are 0 to 2 and activations -128 to 127, so one
/// `vpmaddubsw` of codes times 16 lies in [-8192, 8128], and four of them (two
/// blocks) reach -32768, which int16 just holds. Of codes times 4, two for each
/// register, 16 reach -32768: [`WINDOW`] blocks. Single codes reach -8192 in
/// as many, -20480 with the other two sums divided by 4 and 16. Shifts divide
/// exactly, because every term is a multiple.
#[target_feature(enable = "avx2")]
#[inline]
fn add_row<const N: usize>(
    decoder: &Decoder,
    sum: &mut __m256i,
    blocks: &[[Block; ROWS]; N],
    i: usize,
    columns: &[Columns; N],
) {
    const { assert!(N <= WINDOW) };
    let mut decoded = [[[_mm256_setzero_si256(); 2]; 2]; N];
    for b in 0..N {
        let halves = blocks[b][i].as_chunks().0;
        for half in 0..2 {
            decoded[b][half] = decoder.decode(load(&halves[half]));
        }
    }
    // Through memory, and with activations that are not known from the row
    // before: as the notes above say.
    let (decoded, columns) = black_box((&decoded, columns));
    let masks = [_mm256_set1_epi8(3), _mm256_set1_epi8(12), _mm256_set1_epi8(48)];
    let mut single = _mm256_setzero_si256();
    let mut fourfold = _mm256_setzero_si256();
    let mut sixteenfold = _mm256_setzero_si256();
    for b in 0..N {
        for half in 0..2 {
            let [x, y] = decoded[b][half];
            let q = |field: usize| load_i8(&columns[b][field].as_chunks().0[half]);
            let a = _mm256_maddubs_epi16(_mm256_and_si256(y, masks[0]), q(0));
            let b = _mm256_maddubs_epi16(_mm256_and_si256(y, masks[1]), q(1));
            let c = _mm256_maddubs_epi16(_mm256_and_si256(x, masks[0]), q(2));
            let d = _mm256_maddubs_epi16(_mm256_and_si256(x, masks[1]), q(3));
            let e = _mm256_maddubs_epi16(_mm256_and_si256(x, masks[2]), q(4));
            single = _mm256_add_epi16(single, _mm256_add_epi16(a, c));
            fourfold = _mm256_add_epi16(fourfold, _mm256_add_epi16(b, d));
            sixteenfold = _mm256_add_epi16(sixteenfold, e);
        }
        if b % 2 == 1 || b == N - 1 {
            single = _mm256_add_epi16(single, _mm256_srai_epi16::<4>(sixteenfold));
            sixteenfold = _mm256_setzero_si256();
        }
    }
    single = _mm256_add_epi16(single, _mm256_srai_epi16::<2>(fourfold));
    *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(single, _mm256_set1_epi16(1)));
}

/// What stands for a triple where a byte has the sparse form: the codes of
/// (a, b) = (0, 0), less than [`PAIR_BASE`].
const NONE: u8 = 1 + 4;

/// Above the codes of a pair, and none of their bits.
const PAIR_BASE: u8 = 16;

/// Above the triple of the sparse form, [`NONE`] and all pairs, and a multiple
/// of 64, which no field of a triple sees.
const SPARSE_BASE: u8 = 64;

/// Above all of them.
const TRIPLE_BASE: u8 = 128;

/// By bits 3:0: the triple of the regular form.
const TRIPLE: [u8; 16] = {
    let mut table = [NONE; 16];
    let mut l = 0;
    while l < table.len() {
        if l % 8 != 0 {
            table[l] = TRIPLE_BASE + TRIPLES[l - 1 - l / 8] as u8;
        }
        l += 1;
    }
    table
};

/// By bits 6:3: the triple of the sparse form.
const SPARSE: [u8; 16] = {
    let mut table = [SPARSE_BASE; 16];
    let mut i = 0;
    while i < TRIPLES.len() {
        table[i] += TRIPLES[i] as u8;
        i += 1;
    }
    table
};

/// By bits 7:4: the codes of the pair of the regular form, its sign included.
const PAIR: [u8; 16] = {
    let mut table = [PAIR_BASE + 1 + 4; 16];
    let mut i = 0;
    while i < PAIRS.len() {
        table[i] = table[i].wrapping_add_signed(PAIRS[i]);
        table[i + 8] = table[i + 8].wrapping_add_signed(-PAIRS[i]);
        i += 1;
    }
    table
};

/// The tables of the code in registers.
#[derive(Clone, Copy)]
pub(super) struct Decoder {
    triple: __m256i,
    sparse: __m256i,
    pair: __m256i,
}

impl Decoder {
    #[target_feature(enable = "avx2")]
    #[inline]
    pub(super) fn new() -> Self {
        Self { triple: table(&TRIPLE), sparse: table(&SPARSE), pair: table(&PAIR) }
    }

    /// The codes of (c, d, e) in bits 1:0, 3:2 and 5:4 of one register, and
    /// those of (a, b) in bits 1:0 and 3:2 of another. The other bits may be
    /// anything.
    #[target_feature(enable = "avx2")]
    #[inline]
    pub(super) fn decode(self, p: __m256i) -> [__m256i; 2] {
        // `vpshufb` looks at bits 3:0, and at bit 7, which must be clear.
        let index = _mm256_set1_epi8(0x1f);
        let x = _mm256_shuffle_epi8(self.triple, _mm256_and_si256(p, index));
        let sparse = _mm256_and_si256(_mm256_srli_epi16::<3>(p), index);
        let sparse = _mm256_shuffle_epi8(self.sparse, sparse);
        let pair = _mm256_and_si256(_mm256_srli_epi16::<4>(p), index);
        let y = _mm256_min_epu8(_mm256_shuffle_epi8(self.pair, pair), x);
        let x = _mm256_sign_epi8(_mm256_max_epu8(x, sparse), p);
        [_mm256_add_epi8(x, _mm256_set1_epi8(1 + 4 + 16)), y]
    }
}

/// A table of 16 entries in both halves of a register.
#[target_feature(enable = "avx2")]
#[inline]
fn table(bytes: &[u8; 16]) -> __m256i {
    // SAFETY: the array has the 16 bytes that are read; the load needs no alignment.
    _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) })
}

/// [`UnpackCodes`](super::tiles::UnpackCodes) of this layout.
#[target_feature(enable = "avx2")]
pub(super) fn unpack(group: &[u8], cols: usize, start: usize, out: &mut Codes) {
    let cut = Cut::new(cols);
    let decoder = Decoder::new();
    let first = start / BLOCK_COLS;
    let full = (cut.blocks - first).min(CHUNK / BLOCK_COLS);
    for b in 0..full {
        for i in 0..ROWS {
            let block = group[cut.block(first + b, i)].as_chunks().0;
            let out = out[i][b * BLOCK_COLS..][..BLOCK_COLS].as_chunks_mut().0;
            for half in 0..2 {
                let fields = decoder.fields(load(&block[half]));
                for f in 0..FIELDS {
                    store(&mut out[2 * f + half], fields[f]);
                }
            }
        }
    }
    if full < CHUNK / BLOCK_COLS && cut.tail != 0 {
        for (out, block) in out.iter_mut().zip(tail_blocks(cut, group)) {
            let out = &mut out[full * BLOCK_COLS..];
            let block = block.as_chunks().0;
            let halves = [decoder.fields(load(&block[0])), decoder.fields(load(&block[1]))];
            // Each field overwrites what the one before left after its end.
            for f in 0..FIELDS {
                for half in 0..cut.tail.div_ceil(32) {
                    let out = out[f * cut.tail + 32 * half..].first_chunk_mut();
                    store(out.expect("a block of the chunk is left"), halves[half][f]);
                }
            }
        }
    }
}

impl Decoder {
    /// The codes of a, b, c, d and e, a register each.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn fields(self, p: __m256i) -> [__m256i; FIELDS] {
        let low = _mm256_set1_epi8(3);
        let [x, y] = self.decode(p);
        [
            _mm256_and_si256(y, low),
            _mm256_and_si256(_mm256_srli_epi16::<2>(y), low),
            _mm256_and_si256(x, low),
            _mm256_and_si256(_mm256_srli_epi16::<2>(x), low),
            _mm256_and_si256(_mm256_srli_epi16::<4>(x), low),
        ]
    }
}

/// Stores 32 codes.
#[target_feature(enable = "avx2")]
#[inline]
fn store(bytes: &mut [u8; 32], v: __m256i) {
    // SAFETY: the array has the 32 bytes that are written; no alignment is needed.
    unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), v) }
}

#[cfg(test)]
mod tests {
    use super::super::super::generic::t5::TRITS;
    use super::*;
    use crate::cpu::{Isa, Proof};

    /// Every byte, also those that no packer writes.
    #[test]
    fn decodes_as_the_definition_does() {
        if !Isa::available().iter().any(|isa| matches!(isa.proof(), Proof::Avx2(_))) {
            return;
        }
        for start in (0..=255u8).step_by(32) {
            let bytes: [u8; 32] = std::array::from_fn(|i| start + i as u8);
            // SAFETY: this CPU has AVX2.
            let fields: [[u8; 32]; FIELDS] = unsafe {
                let mut fields = [[0; 32]; FIELDS];
                let found = Decoder::new().fields(load(&bytes));
                for f in 0..FIELDS {
                    store(&mut fields[f], found[f]);
                }
                fields
            };
            for (i, &byte) in bytes.iter().enumerate() {
                let codes = TRITS[usize::from(byte)].map(|t| (t + 1) as u8);
                assert_eq!(fields.map(|f| f[i]), codes, "byte {byte:#04x}");
            }
        }
    }
}
