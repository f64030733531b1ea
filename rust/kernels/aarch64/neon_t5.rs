//! t5 with NEON alone, and the decoding of t5 that all aarch64 kernels share.
//!
//! The layout's two forms are two look-ups, of which the second overrides
//! (`tbx` leaves a byte alone where its index is out of range), and the sign is
//! part of every index, so that nothing is negated:
//!
//! ```text
//! first form    index = sign, bits 3:0               tbl, 32 entries: triple
//! second form   index = bits 2:0, sign, bits 6:3     tbx, 32 entries: triple
//!               out of range unless bits 2:0 are 0, as the second form has them
//! pairs         index = sign, bits 6:4               tbl, 16 entries: a; again: b
//!               in the second form 240 more: out of range, which gives 0
//! ```
//!
//! 10 operations give a and b as trits and (c, d, e) as the codes `t + 1` in
//! three 2-bit fields of a byte: extracting those takes 3 operations where
//! fields may stay in place and 4 otherwise. Sums over c, d and e are corrected
//! by the sum of the activations that they meet. Tried on paper: tables of 128
//! entries (four `tbl`/`tbx` of four registers: 16 registers and about 20
//! cycles' worth of the pipe that shuffles), and signed numbers
//! `c + 4 d + 16 e`, which need no correction, but 5 operations to take apart.
//!
//! GEMV is that of `neon_i2.rs`: 14 operations decode 80 weights, 10 multiply
//! them. Counted, not measured.
//!
//! The bound: a trit's product lies in [-127, 128], a code's in [-256, 254].
//! A register gives 2 of the one and 3 of the other to each lane, in size at
//! most 1024, a block four times as much; [`WIDEN`] blocks reach 16384.
//!
//! Several tokens: `tile.rs`.

use std::arch::aarch64::*;
use std::ops::Range;

use super::super::generic::blocks::ROWS;
use super::super::generic::t5::{BLOCK_COLS, Cut, FIELDS, T5, TRITS};
use super::super::{Kernel, Layout, PackedMatrix, Prepared};
use super::block::Block;
use super::neon_tile::{add_halves, add_run, load, load_i8, reduce, store_i8, widen};
use super::tile::{self, CHUNK, Trits};
use crate::cpu::Neon;

/// Blocks between two widenings, which are then one operation in a hundred.
const WIDEN: usize = 4;

pub(super) struct NeonT5(Neon);

impl NeonT5 {
    pub(super) fn new(proof: Neon) -> Self {
        Self(proof)
    }
}

impl Kernel for NeonT5 {
    fn name(&self) -> &'static str {
        "neon-t5"
    }

    fn layout(&self) -> &'static dyn Layout {
        &T5
    }

    fn gemv(&self, w: &PackedMatrix, rows: Range<usize>, x: &Prepared, y: &mut [f32]) {
        let _proof = self.0;
        // SAFETY: `self.0` proves that the CPU has NEON.
        unsafe { gemv(w, rows, x, y) }
    }

    fn gemm(&self, w: &PackedMatrix, rows: Range<usize>, xs: &[Prepared], ys: &mut [&mut [f32]]) {
        let _proof = self.0;
        // SAFETY: as in `gemv`.
        unsafe { tile::gemm(w, rows, xs, ys, unpack, add_run) }
    }
}

#[target_feature(enable = "neon")]
fn gemv(w: &PackedMatrix, rows: Range<usize>, x: &Prepared, y: &mut [f32]) {
    let tables = Tables::new();
    let correction = sum_of_coded(x);
    for (y, first) in y.chunks_mut(ROWS).zip(rows.step_by(ROWS)) {
        let sums = dot(w.group(first), x, tables);
        for (y, sum) in y.iter_mut().zip(sums) {
            *y = x.rescale(sum - correction, w.scale);
        }
    }
}

/// The sum of the activations that meet codes: fields c, d and e.
pub(super) fn sum_of_coded(x: &Prepared) -> i32 {
    let cut = Cut::new(x.cols);
    let mut sum = 0;
    for b in 0..cut.blocks + usize::from(cut.tail > 0) {
        let bytes = cut.block(b, 0).len();
        let q = &x.padded()[b * BLOCK_COLS..][2 * bytes..FIELDS * bytes];
        sum += q.iter().map(|&q| i32::from(q)).sum::<i32>();
    }
    sum
}

/// Sums of a group of rows: over trits in fields a and b, over codes in the rest.
#[target_feature(enable = "neon")]
#[inline]
fn dot(group: &[u8], x: &Prepared, tables: Tables) -> [i32; ROWS] {
    let cut = Cut::new(x.cols);
    let mut acc = [vdupq_n_s32(0); ROWS];
    let mut acc16 = [[vdupq_n_s16(0); 2]; ROWS];
    for b in 0..cut.blocks + usize::from(cut.tail > 0) {
        let block = Block::new(group, x.padded(), b, cut.block(b, 0).len());
        let mut k = 0;
        loop {
            add_register(&mut acc16, &block, k, tables);
            k += 1;
            if k >= block.registers {
                break;
            }
        }
        if b % WIDEN == WIDEN - 1 {
            widen(&mut acc, &mut acc16);
        }
    }
    widen(&mut acc, &mut acc16);
    reduce(acc)
}

/// Adds the products of one register of each row.
#[target_feature(enable = "neon")]
#[inline]
fn add_register(
    acc: &mut [[int16x8_t; 2]; ROWS],
    block: &Block<'_, FIELDS>,
    k: usize,
    tables: Tables,
) {
    let mut qs = [vdupq_n_s8(0); FIELDS];
    for f in 0..FIELDS {
        qs[f] = load_i8(&block.qs[f][k]);
    }
    for i in 0..ROWS {
        let fields = tables.fields(load(&block.rows[i][k]));
        for f in 0..FIELDS {
            acc[i] = add_halves(acc[i], fields[f], qs[f]);
        }
    }
}

/// A triple as three codes: `c + 1` in bits 1:0, `d + 1` in bits 3:2 and
/// `e + 1` in bits 5:4.
const fn triple(byte: usize) -> u8 {
    let [_, _, c, d, e] = TRITS[byte];
    (c + 1 + 4 * (d + 1) + 16 * (e + 1)) as u8
}

/// Triples of the first form by sign and bits 3:0. The entries of zero bits
/// 2:0, which is not that form, are overridden.
const FIRST: [u8; 32] = {
    let mut table = [0; 32];
    let mut i = 0;
    while i < 32 {
        table[i] = triple((i & 16) << 3 | (i & 15));
        i += 1;
    }
    table
};

/// Triples of the second form by sign and bits 6:3.
const SECOND: [u8; 32] = {
    let mut table = [0; 32];
    let mut i = 0;
    while i < 32 {
        table[i] = triple(i << 3);
        i += 1;
    }
    table
};

/// Trits a and b of the first form by sign and bits 6:4.
const PAIRS: [[i8; 16]; 2] = {
    let mut tables = [[0; 16]; 2];
    let mut h = 0;
    while h < 16 {
        // Any byte of the first form.
        let [a, b, ..] = TRITS[h << 4 | 1];
        tables[0][h] = a;
        tables[1][h] = b;
        h += 1;
    }
    tables
};

/// The tables in registers.
#[derive(Clone, Copy)]
pub(super) struct Tables {
    first: uint8x16x2_t,
    second: uint8x16x2_t,
    pairs: [int8x16_t; 2],
}

impl Tables {
    #[target_feature(enable = "neon")]
    #[inline]
    pub(super) fn new() -> Self {
        let (first, second) = (FIRST.as_chunks().0, SECOND.as_chunks().0);
        let first = uint8x16x2_t(load(&first[0]), load(&first[1]));
        let second = uint8x16x2_t(load(&second[0]), load(&second[1]));
        Self { first, second, pairs: [load_i8(&PAIRS[0]), load_i8(&PAIRS[1])] }
    }

    /// Trits a and b, and the three codes of c, d and e in one byte.
    #[target_feature(enable = "neon")]
    #[inline]
    pub(super) fn decode(self, bytes: uint8x16_t) -> ([int8x16_t; 2], uint8x16_t) {
        let first = vsliq_n_u8::<4>(bytes, vshrq_n_u8::<7>(bytes));
        let second = vsliq_n_u8::<5>(vshrq_n_u8::<3>(bytes), bytes);
        let codes = vqtbx2q_u8(vqtbl2q_u8(self.first, first), self.second, second);
        let is_second = vcltq_u8(second, vdupq_n_u8(32));
        let pair = vsriq_n_u8::<4>(is_second, bytes);
        ([vqtbl1q_s8(self.pairs[0], pair), vqtbl1q_s8(self.pairs[1], pair)], codes)
    }

    /// All five fields: trits a and b, codes of c, d and e.
    #[target_feature(enable = "neon")]
    #[inline]
    fn fields(self, bytes: uint8x16_t) -> [int8x16_t; FIELDS] {
        let ([a, b], codes) = self.decode(bytes);
        let low = vdupq_n_u8(3);
        [
            a,
            b,
            vreinterpretq_s8_u8(vandq_u8(codes, low)),
            vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8::<2>(codes), low)),
            vreinterpretq_s8_u8(vshrq_n_u8::<4>(codes)),
        ]
    }
}

/// An [`Unpack`](tile::Unpack).
#[target_feature(enable = "neon")]
pub(super) fn unpack(group: &[u8], cols: usize, start: usize, out: &mut Trits) {
    let tables = Tables::new();
    let cut = Cut::new(cols);
    let first = start / BLOCK_COLS;
    for b in first..(first + CHUNK / BLOCK_COLS).min(cut.blocks + usize::from(cut.tail > 0)) {
        for i in 0..ROWS {
            let block = group[cut.block(b, i)].as_chunks().0;
            let out = out[i][(b - first) * BLOCK_COLS..].as_chunks_mut().0;
            for (k, bytes) in block.iter().enumerate() {
                let mut fields = tables.fields(load(bytes));
                for f in 2..FIELDS {
                    fields[f] = vsubq_s8(fields[f], vdupq_n_s8(1));
                }
                for f in 0..FIELDS {
                    store_i8(&mut out[f * block.len() + k], fields[f]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_decodes_as_the_layout_says() {
        let bytes: Vec<u8> = (0..=255).collect();
        for bytes in bytes.as_chunks().0 {
            let mut out = [[0; 16]; FIELDS];
            // SAFETY: NEON is in the baseline of every aarch64 target with a
            // standard library.
            let fields = unsafe { Tables::new().fields(load(bytes)) };
            for f in 0..FIELDS {
                // SAFETY: as above.
                unsafe { store_i8(&mut out[f], fields[f]) };
            }
            for (j, &byte) in bytes.iter().enumerate() {
                let [a, b, c, d, e] = TRITS[usize::from(byte)];
                let [x, y, z, u, v] = out.map(|field| field[j]);
                assert_eq!([x, y, z - 1, u - 1, v - 1], [a, b, c, d, e], "{byte:#04x}");
            }
        }
    }
}
