//! How i2 and t5 cut up a matrix: rows in blocks of 64 bytes, four rows
//! interleaved block by block. The two differ in what a byte holds, `FIELDS`
//! weights, and in nothing here.
//!
//! A block holds `FIELDS * 64` columns. Byte `j` holds the columns `j`, `64 + j`,
//! `128 + j` and so on, so that one register meets contiguous runs of
//! activations, which need no rearranging. What is left over of a row is one
//! shorter block of the same form: `tail` bytes, with fields `tail` columns
//! apart. `tail` is a multiple of 16.
//!
//! The rows are interleaved so that a kernel that multiplies them together
//! reads memory in one stream from beginning to end. Read as four streams, rows
//! apart, the same bytes came half as fast (Zen 4: 16 instead of 28 GB/s on one
//! thread).

use std::ops::Range;

/// Interleaved rows.
pub(in super::super) const ROWS: usize = 4;

/// Bytes of a full block of one row.
pub(in super::super) const BLOCK_BYTES: usize = 64;

/// How a row of a given width is cut up.
#[derive(Clone, Copy)]
pub(in super::super) struct Cut<const FIELDS: usize> {
    /// Full blocks.
    pub(in super::super) blocks: usize,
    /// Bytes of the last, shorter block; 0 if there is none.
    pub(in super::super) tail: usize,
}

impl<const FIELDS: usize> Cut<FIELDS> {
    /// Columns of a full block.
    const COLS: usize = FIELDS * BLOCK_BYTES;

    pub(in super::super) fn new(cols: usize) -> Self {
        let tail = (cols % Self::COLS).div_ceil(FIELDS).next_multiple_of(16);
        Self { blocks: cols / Self::COLS, tail }
    }

    /// Bytes of four interleaved rows.
    pub(in super::super) fn group_bytes(self) -> usize {
        ROWS * (self.blocks * BLOCK_BYTES + self.tail)
    }

    /// Where block `b` of row `i` of a group stands; block `blocks` is the tail.
    pub(in super::super) fn block(self, b: usize, i: usize) -> Range<usize> {
        let bytes = if b < self.blocks { BLOCK_BYTES } else { self.tail };
        let start = b * ROWS * BLOCK_BYTES + i * bytes;
        start..start + bytes
    }

    /// Packs a row group of `cols` columns. `pack_block` is given the
    /// `FIELDS * n` values of each block of `n` bytes.
    pub(super) fn pack(
        rows: &[i8],
        cols: usize,
        out: &mut [u8],
        pack_block: impl Fn(&[i8], &mut [u8]),
    ) {
        let cut = Self::new(cols);
        for (i, row) in rows.chunks_exact(cols).enumerate() {
            for (b, values) in row.chunks(Self::COLS).enumerate() {
                let out = &mut out[cut.block(b, i)];
                if values.len() == FIELDS * out.len() {
                    pack_block(values, out);
                } else {
                    let mut padded = [[0; BLOCK_BYTES]; FIELDS];
                    let padded = &mut padded.as_flattened_mut()[..FIELDS * out.len()];
                    padded[..values.len()].copy_from_slice(values);
                    pack_block(padded, out);
                }
            }
        }
    }

    /// Unpacks a row group of `cols` columns. `value` is given a byte and a
    /// field.
    pub(super) fn unpack(
        group: &[u8],
        cols: usize,
        out: &mut [i8],
        value: impl Fn(u8, usize) -> i8,
    ) {
        let cut = Self::new(cols);
        for (i, row) in out.chunks_exact_mut(cols).enumerate() {
            for (b, row) in row.chunks_mut(Self::COLS).enumerate() {
                let block = &group[cut.block(b, i)];
                for (field, row) in row.chunks_mut(block.len()).enumerate() {
                    for (v, &byte) in row.iter_mut().zip(block) {
                        *v = value(byte, field);
                    }
                }
            }
        }
    }
}
