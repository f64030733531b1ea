//! i2: two bits a weight. The layout, which all instruction sets share, and
//! the scalar kernel that defines the result.
//!
//! A byte holds four columns in its bits 0-1, 2-3, 4-5 and 6-7, as codes
//! `t + 1`; which four, and how rows are cut up and interleaved, is in
//! [blocks](super::blocks). K = 3200 and 8640 waste nothing, K = 5460 eleven
//! bytes a row.
//!
//! Sums run over codes: `sum(q * t) = sum(q * code) - sum(q)`. Padding has
//! `q = 0`, so its code does not matter.

use std::ops::Range;

use super::super::{Kernel, Layout, PackedMatrix, Prepared};
use super::blocks::{self, BLOCK_BYTES, ROWS};

/// Weights of a byte.
pub(in super::super) const FIELDS: usize = 4;

/// Columns of a full block of one row.
pub(in super::super) const BLOCK_COLS: usize = FIELDS * BLOCK_BYTES;

/// How rows are cut up.
pub(in super::super) type Cut = blocks::Cut<FIELDS>;

/// The layout of every i2 kernel.
pub(in super::super) struct I2;

impl Layout for I2 {
    fn name(&self) -> &'static str {
        "i2"
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
        Cut::unpack(group, cols, out, |byte, field| (byte >> (2 * field) & 3) as i8 - 1);
    }
}

/// Four fields of `out.len()` columns each.
fn pack_block(cols: &[i8], out: &mut [u8]) {
    let n = out.len();
    let (a, b, c, d) = (&cols[..n], &cols[n..2 * n], &cols[2 * n..3 * n], &cols[3 * n..4 * n]);
    let code = |t: i8| (t + 1) as u8;
    for j in 0..n {
        out[j] = code(a[j]) | code(b[j]) << 2 | code(c[j]) << 4 | code(d[j]) << 6;
    }
}

/// The definition.
pub(super) struct GenericI2;

impl Kernel for GenericI2 {
    fn name(&self) -> &'static str {
        "generic-i2"
    }

    fn layout(&self) -> &'static dyn Layout {
        &I2
    }

    fn gemv(&self, w: &PackedMatrix, rows: Range<usize>, x: &Prepared, y: &mut [f32]) {
        let cut = Cut::new(w.cols);
        for (y, r) in y.iter_mut().zip(rows) {
            let group = w.group(r - r % ROWS);
            let mut acc = -x.sum;
            for b in 0..cut.blocks + usize::from(cut.tail > 0) {
                let block = &group[cut.block(b, r % ROWS)];
                let q = &x.padded()[b * BLOCK_COLS..];
                for field in 0..4 {
                    for (byte, &q) in block.iter().zip(&q[field * block.len()..]) {
                        acc += i32::from(byte >> (2 * field) & 3) * i32::from(q);
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

    #[test]
    fn wastes_little_on_the_widths_of_known_models() {
        for (cols, bytes) in
            [(2560, 640), (6912, 1728), (3200, 800), (8640, 2160), (5460, 1376), (4096, 1024)]
        {
            assert_eq!(Cut::new(cols).group_bytes(), ROWS * bytes, "{cols} columns");
        }
    }

    #[test]
    fn codes_stand_where_the_layout_says() {
        let (rows, cols) = (3, 256 + 100); // tail: 100 columns in 32 bytes, fields 32 apart
        let trits: Vec<i8> = (0..rows * cols).map(|c| (c * 7 % 3) as i8 - 1).collect();
        let mut bytes = vec![0; I2.group_bytes(cols)];
        I2.pack(&trits, cols, &mut bytes);
        for (r, row) in trits.chunks_exact(cols).enumerate() {
            for (c, &t) in row.iter().enumerate() {
                let (byte, field) = match c {
                    0..256 => (64 * r + c % 64, c / 64),
                    _ => (256 + 32 * r + (c - 256) % 32, (c - 256) / 32),
                };
                assert_eq!((bytes[byte] >> (2 * field) & 3) as i8 - 1, t, "row {r} column {c}");
            }
        }
    }
}
