//! t5: five trits a byte, 1.6 bits a weight. The layout, which all instruction
//! sets share, and the scalar kernel that defines the result.
//!
//! A byte holds five columns, here called a, b, c, d and e; which five, and how
//! rows are cut up and interleaved, is in [blocks](super::blocks).
//!
//! The code of a byte is a *mirror code*. The 243 patterns of five trits are
//! zero and 121 pairs of opposites; bit 7 tells opposites apart (set, it
//! negates all five trits), and bits 6:0 are an index of 122 patterns. So a
//! table of 128 entries decodes a byte, where a machine has one.
//!
//! The index is made for machines whose tables have 16 entries (`pshufb`,
//! `tbl`). With `h` = bits 6:4 and `l` = bits 3:0:
//!
//! ```text
//! l mod 8 != 0    (c, d, e) = TRIPLES[l - 1 - l / 8]     14 triples
//!                 (a, b)    = PAIRS[h]                   8 pairs, all but (0, 0)
//! l mod 8 == 0    (c, d, e) = TRIPLES[bits 6:3]          14 triples
//!                 (a, b)    = (0, 0)
//! ```
//!
//! `TRIPLES` are zero and one of each two opposites. Nothing is missing:
//! patterns with (a, b) = (0, 0) are the second form, and those with another
//! (a, b) have (c, d, e) or its opposite among the triples. 4 + 2 indices are
//! left over: (0, 0, 0) needs only one of two opposite pairs, and the second
//! form has 16 places for 14 triples. No packer writes those, and to read them
//! does no harm.
//!
//! What makes this cheap to decode: each form is one table look-up for each
//! part; the nibble of bits 7:4 has the sign in it, so that its table gives
//! (a, b) negated already; a triple as a signed number `c + 4 d + 16 e` is
//! negated by one instruction; byte 0 is the zero pattern, so that `psignb`
//! with the byte itself as the sign is right even where it gives zero.

use std::ops::Range;

use super::super::{Kernel, Layout, PackedMatrix, Prepared};
use super::blocks::{self, BLOCK_BYTES, ROWS};

/// Trits of a byte.
pub(in super::super) const FIELDS: usize = 5;

/// Columns of a full block of one row.
pub(in super::super) const BLOCK_COLS: usize = FIELDS * BLOCK_BYTES;

/// How rows are cut up.
pub(in super::super) type Cut = blocks::Cut<FIELDS>;

/// The bit that negates all trits of a byte.
pub(in super::super) const SIGN: u8 = 0x80;

/// (c, d, e) as the number `c + 4 d + 16 e`: zero, then those that are
/// positive, which is one of each two opposites, in rising order.
pub(in super::super) const TRIPLES: [i8; 14] = triples();

/// (a, b) as the number `a + 4 b`: all but zero. Opposites stand four apart:
/// flipping the highest bit of `h` negates the pair.
pub(in super::super) const PAIRS: [i8; 8] = [1, 3, 4, 5, -1, -3, -4, -5];

/// The five trits of every byte.
pub(in super::super) const TRITS: [[i8; FIELDS]; 256] = trits();

/// The byte of every pattern of five trits, by [`number`].
const BYTES: [u8; 243] = bytes();

/// Balanced digits in base 4 of a number from -21 to 21, lowest first. `None`
/// if one of them is neither -1, 0 nor 1.
const fn digits(mut number: i8) -> Option<[i8; 3]> {
    let mut found = [0; 3];
    let mut i = 0;
    while i < 3 {
        // The residue of 2 is where there is no such digit.
        found[i] = (number + 1).rem_euclid(4) - 1;
        if found[i] == 2 {
            return None;
        }
        number = (number - found[i]) / 4;
        i += 1;
    }
    Some(found)
}

const fn triples() -> [i8; 14] {
    let mut triples = [0; 14];
    let (mut n, mut number) = (0, 0);
    while number <= 1 + 4 + 16 {
        if digits(number).is_some() {
            triples[n] = number;
            n += 1;
        }
        number += 1;
    }
    assert!(n == triples.len());
    triples
}

/// `a + 4 b` and `c + 4 d + 16 e` of the pattern of an index.
const fn parts(index: u8) -> (i8, i8) {
    let (h, l) = (index >> 4, index & 15);
    if l % 8 != 0 {
        (PAIRS[h as usize], TRIPLES[(l - 1 - l / 8) as usize])
    } else {
        let i = (index >> 3) as usize;
        (0, if i < TRIPLES.len() { TRIPLES[i] } else { 0 })
    }
}

const fn trits() -> [[i8; FIELDS]; 256] {
    let mut trits = [[0; FIELDS]; 256];
    let mut byte = 0;
    while byte < trits.len() {
        let (pair, triple) = parts(byte as u8 & !SIGN);
        let sign = if byte as u8 & SIGN == 0 { 1 } else { -1 };
        let (Some([a, b, _]), Some([c, d, e])) = (digits(sign * pair), digits(sign * triple))
        else {
            panic!("pairs and triples are made of trits");
        };
        trits[byte] = [a, b, c, d, e];
        byte += 1;
    }
    trits
}

/// A pattern as a number in base 3.
const fn number(trits: [i8; FIELDS]) -> usize {
    let mut number = 0;
    let mut i = 0;
    while i < FIELDS {
        number = 3 * number + (trits[i] + 1) as usize;
        i += 1;
    }
    number
}

/// Opposites get one index, the first that has either of them.
const fn bytes() -> [u8; 243] {
    let mut bytes = [0; 243];
    let mut known = [false; 243];
    let mut index = 0;
    while index < SIGN {
        let n = number(TRITS[index as usize]);
        // The number of the opposite: each digit is subtracted from 2.
        let opposite = known.len() - 1 - n;
        if !known[n] {
            bytes[opposite] = index | SIGN;
            bytes[n] = index;
            known[opposite] = true;
            known[n] = true;
        }
        index += 1;
    }
    let mut n = 0;
    while n < known.len() {
        assert!(known[n]);
        n += 1;
    }
    bytes
}

/// The layout of every t5 kernel.
pub(in super::super) struct T5;

impl Layout for T5 {
    fn name(&self) -> &'static str {
        "t5"
    }

    fn row_group(&self) -> usize {
        ROWS
    }

    fn group_bytes(&self, cols: usize) -> usize {
        Cut::new(cols).group_bytes()
    }

    fn pack(&self, rows: &[i8], cols: usize, out: &mut [u8]) {
        Cut::pack(rows, cols, out, pack_block);
    }

    fn unpack(&self, group: &[u8], cols: usize, out: &mut [i8]) {
        Cut::unpack(group, cols, out, |byte, field| TRITS[usize::from(byte)][field]);
    }
}

/// Five fields of `out.len()` columns each. First the [`number`]s of all
/// patterns, in a loop for each field, which the compiler vectorizes.
fn pack_block(cols: &[i8], out: &mut [u8]) {
    out.fill(0);
    for field in cols.chunks_exact(out.len()) {
        for (number, &t) in out.iter_mut().zip(field) {
            *number = 3 * *number + (t + 1) as u8;
        }
    }
    for byte in out {
        *byte = BYTES[usize::from(*byte)];
    }
}

/// The definition.
pub(super) struct GenericT5;

impl Kernel for GenericT5 {
    fn name(&self) -> &'static str {
        "generic-t5"
    }

    fn layout(&self) -> &'static dyn Layout {
        &T5
    }

    fn gemv(&self, w: &PackedMatrix, rows: Range<usize>, x: &Prepared, y: &mut [f32]) {
        let cut = Cut::new(w.cols);
        for (y, r) in y.iter_mut().zip(rows) {
            let group = w.group(r - r % ROWS);
            let mut acc = 0;
            for b in 0..cut.blocks + usize::from(cut.tail > 0) {
                let block = &group[cut.block(b, r % ROWS)];
                let n = block.len();
                let q = &x.padded()[b * BLOCK_COLS..][..FIELDS * n];
                for (j, &byte) in block.iter().enumerate() {
                    let trits = TRITS[usize::from(byte)];
                    for field in 0..FIELDS {
                        acc += i32::from(trits[field]) * i32::from(q[field * n + j]);
                    }
                }
            }
            *y = x.rescale(acc, w.scale);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All patterns of five trits.
    fn patterns() -> impl Iterator<Item = [i8; FIELDS]> {
        (0..243).map(|n| [81, 27, 9, 3, 1].map(|power| (n / power % 3) as i8 - 1))
    }

    #[test]
    fn every_pattern_has_a_byte() {
        let mut used = [false; 256];
        for trits in patterns() {
            let byte = BYTES[number(trits)];
            assert_eq!(TRITS[usize::from(byte)], trits);
            assert!(!used[usize::from(byte)], "{trits:?} shares {byte:#04x}");
            used[usize::from(byte)] = true;
        }
        // 121 indices with both signs, and zero with one.
        assert_eq!(used.iter().filter(|used| **used).count(), 243);
        assert_eq!((1..128).filter(|&i| used[i] && used[i + 128]).count(), 121);
        assert!(used[0] && !used[128], "zero is byte 0");
    }

    #[test]
    fn opposites_differ_in_bit_7() {
        for trits in patterns().filter(|trits| *trits != [0; FIELDS]) {
            assert_eq!(BYTES[number(trits)] ^ BYTES[number(trits.map(|t| -t))], SIGN);
        }
        // True of the bytes that no packer writes, too.
        for byte in 0..128 {
            assert_eq!(TRITS[byte + 128], TRITS[byte].map(|t| -t));
        }
    }

    #[test]
    fn any_byte_decodes_to_trits() {
        assert!(TRITS.iter().flatten().all(|t| (-1..=1).contains(t)));
    }

    #[test]
    fn wastes_little_on_the_widths_of_known_models() {
        for (cols, bytes) in
            [(2560, 512), (6912, 1392), (3200, 640), (8640, 1728), (5460, 1104), (4096, 832)]
        {
            assert_eq!(Cut::new(cols).group_bytes(), ROWS * bytes, "{cols} columns");
        }
    }

    /// Kernels read whole registers of 64 activations at every field of the
    /// last block, and padding there must be enough. Widths recur at 1280, the
    /// common multiple of 256 and 320.
    #[test]
    fn the_padding_of_activations_is_enough() {
        for cols in 1..=1280 {
            let cut = Cut::new(cols);
            let padded = Prepared::from_values(&vec![0; cols], 1.0).padded().len();
            if cut.tail > 0 {
                let last = cut.blocks * BLOCK_COLS + (FIELDS - 1) * cut.tail;
                assert!(last + 64 <= padded, "{cols} columns");
                assert!(last + cut.tail >= cols, "{cols} columns");
            }
        }
    }

    #[test]
    fn trits_stand_where_the_layout_says() {
        let (rows, cols) = (3, 320 + 100); // tail: 100 columns in 32 bytes, fields 32 apart
        let trits: Vec<i8> = (0..rows * cols).map(|c| (c * 7 % 3) as i8 - 1).collect();
        let mut bytes = vec![0; T5.group_bytes(cols)];
        T5.pack(&trits, cols, &mut bytes);
        for (r, row) in trits.chunks_exact(cols).enumerate() {
            for (c, &t) in row.iter().enumerate() {
                let (byte, field) = match c {
                    0..320 => (64 * r + c % 64, c / 64),
                    _ => (256 + 32 * r + (c - 320) % 32, (c - 320) / 32),
                };
                assert_eq!(TRITS[usize::from(bytes[byte])][field], t, "row {r} column {c}");
            }
        }
    }
}
