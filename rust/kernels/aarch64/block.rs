//! How a GEMV walks over four interleaved rows, in either of the two layouts
//! of 64-byte blocks.

use super::super::generic::blocks::BLOCK_BYTES;
use super::tile::{ROWS, STEP};

/// One block of each row, in registers of 16 bytes, and the activations that
/// their fields meet. The last, shorter block has fewer registers, but whole
/// ones, too: layouts see to that, and activations are padded.
pub(super) struct Block<'a, const FIELDS: usize> {
    pub(super) rows: [&'a [[u8; STEP]]; ROWS],
    pub(super) qs: [&'a [[i8; STEP]]; FIELDS],
    /// The length of each of them: at least one, since an empty block is none.
    /// GEMVs test it after the first, as a loop that may not run at all made
    /// the compiler copy its sums: 57 instructions instead of 46.
    pub(super) registers: usize,
}

impl<'a, const FIELDS: usize> Block<'a, FIELDS> {
    /// Block `b` of a row group, which has `bytes` bytes for each row.
    #[inline(always)]
    pub(super) fn new(group: &'a [u8], q: &'a [i8], b: usize, bytes: usize) -> Self {
        let registers = bytes / STEP;
        let mut rows = [&[][..]; ROWS];
        let mut rest = group[b * ROWS * BLOCK_BYTES..].as_chunks().0;
        for row in &mut rows {
            (*row, rest) = rest.split_at(registers);
        }
        let mut qs = [&[][..]; FIELDS];
        let mut rest = q[b * FIELDS * BLOCK_BYTES..].as_chunks().0;
        for q in &mut qs {
            (*q, rest) = rest.split_at(registers);
        }
        Self { rows, qs, registers }
    }
}
