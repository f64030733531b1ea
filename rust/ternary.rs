//! The canonical form of a ternary weight matrix, and absmean quantization,
//! which makes one from master weights. No layouts and no SIMD: every file
//! format becomes this first, and every kernel packs from this. Its trits may
//! stay as a file has them, four a byte: they become int8 a few rows at a time,
//! where and when they are packed.

use std::ops::Range;

use crate::error::{Error, invalid};

/// `cols` must stay below this: then `|acc| <= 128 * cols < 2^24`, and the
/// integer sum of a row converts to f32 exactly.
pub const MAX_COLS: usize = 131_072;

/// Rows that share a byte of [`TernaryMatrix::from_quarters`].
pub const QUARTERS: usize = 4;

/// How the values of a matrix are stored, row-major.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Values<'a> {
    /// A byte each.
    Bytes(&'a [i8]),
    /// Trits as [`TernaryMatrix::from_quarters`] takes them, and the rows of a
    /// quarter.
    Quarters(&'a [u8], usize),
}

impl<'a> Values<'a> {
    /// Rows as int8: where they stand, or unpacked to `buffer`.
    pub(crate) fn rows<'b>(
        self,
        rows: Range<usize>,
        cols: usize,
        buffer: &'b mut Vec<i8>,
    ) -> &'b [i8]
    where
        'a: 'b,
    {
        match self {
            Values::Bytes(values) => &values[rows.start * cols..rows.end * cols],
            Values::Quarters(bytes, quarter) => {
                buffer.resize(rows.len() * cols, 0);
                for (r, row) in rows.zip(buffer.chunks_exact_mut(cols)) {
                    let bytes = &bytes[r % quarter * cols..][..cols];
                    // A loop for each, since the compiler vectorizes shifts by constants.
                    match r / quarter {
                        0 => unpack_quarter::<0>(bytes, row),
                        1 => unpack_quarter::<1>(bytes, row),
                        2 => unpack_quarter::<2>(bytes, row),
                        _ => unpack_quarter::<3>(bytes, row),
                    }
                }
                buffer
            }
        }
    }
}

fn unpack_quarter<const QUARTER: usize>(bytes: &[u8], row: &mut [i8]) {
    for (t, byte) in row.iter_mut().zip(bytes) {
        *t = (byte >> (2 * QUARTER) & 3) as i8 - 1;
    }
}

/// A matrix of -1, 0 and +1 with one scale, borrowed, row-major.
#[derive(Clone, Copy, Debug)]
pub struct TernaryMatrix<'a> {
    values: Values<'a>,
    rows: usize,
    cols: usize,
    scale: f32,
    /// Instead of it: for each row, that of each group of columns.
    group_scales: Option<&'a [f32]>,
}

impl<'a> TernaryMatrix<'a> {
    /// Checks and wraps `trits`. `scale` multiplies.
    ///
    /// # Errors
    /// A length that is not `rows * cols`, no rows or columns, `cols` of
    /// [`MAX_COLS`] or more, a value other than -1, 0 and +1, a scale that is
    /// not finite.
    pub fn new(trits: &'a [i8], rows: usize, cols: usize, scale: f32) -> Result<Self, Error> {
        check_size("ternary matrix", rows, cols, MAX_COLS - 1, scale)?;
        check_len("values", trits.len(), rows, cols)?;
        // Branch-free over a row, so that checking costs one pass at memory speed.
        for (r, row) in trits.chunks_exact(cols).enumerate() {
            if row.iter().fold(0u8, |bad, &t| bad | u8::from(!(-1..=1).contains(&t))) != 0 {
                let found = row.iter().find(|t| !(-1..=1).contains(*t)).unwrap_or(&0);
                return Err(invalid!("row {r} holds {found}; ternary values are -1, 0 and 1"));
            }
        }
        Ok(Self { values: Values::Bytes(trits), rows, cols, scale, group_scales: None })
    }

    /// Checks and wraps trits in two bits each, as Hugging Face stores them:
    /// with `R = ceil(rows / 4)`, byte `[r, c]` of `R` x `cols` holds, from the
    /// lowest bits on, column `c` of the rows `r`, `R + r`, `2 R + r` and
    /// `3 R + r`, each trit plus one. What would be rows past the last is
    /// padding, and may be any trit.
    ///
    /// # Errors
    /// As [`new`](TernaryMatrix::new); the value that is no trit is code 3, also in padding.
    pub fn from_quarters(
        bytes: &'a [u8],
        rows: usize,
        cols: usize,
        scale: f32,
    ) -> Result<Self, Error> {
        check_size("ternary matrix", rows, cols, MAX_COLS - 1, scale)?;
        let quarter = rows.div_ceil(QUARTERS);
        check_len("bytes", bytes.len(), quarter, cols)?;
        let is_bad = |byte: u8| byte & byte >> 1 & 0x55; // both bits of a code set
        for (r, row) in bytes.chunks_exact(cols).enumerate() {
            if row.iter().fold(0, |bad, &byte| bad | is_bad(byte)) != 0 {
                let c = row.iter().position(|&byte| is_bad(byte) != 0).unwrap_or(0);
                return Err(invalid!(
                    "has the code 3 in byte [{r}, {c}]; packed ternary weights have only 0, 1 and \
                     2 (-1, 0, +1). The file is damaged or not a ternary model"
                ));
            }
        }
        let values = Values::Quarters(bytes, quarter);
        Ok(Self { values, rows, cols, scale, group_scales: None })
    }

    /// Gives it several scales: for each row, one for each of equally many groups of
    /// columns.
    ///
    /// # Errors
    /// A number of them that is no multiple of the rows, or of which the columns are
    /// none; scales that are not finite.
    pub fn with_group_scales(self, scales: &'a [f32]) -> Result<Self, Error> {
        let groups = scales.len() / self.rows;
        if groups == 0
            || !scales.len().is_multiple_of(self.rows)
            || !self.cols.is_multiple_of(groups)
        {
            return Err(invalid!(
                "{} scales for a ternary matrix of {} x {}; wanted one for each of equally many \
                 groups of columns of each row",
                scales.len(),
                self.rows,
                self.cols
            ));
        }
        if let Some(at) = scales.iter().position(|s| !s.is_finite()) {
            return Err(invalid!("a scale of {}; wanted a finite number", scales[at]));
        }
        Ok(Self { group_scales: Some(scales), ..self })
    }

    /// Out-features.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// In-features.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The multiplying scale.
    #[must_use]
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Several scales, if that is what it has.
    #[must_use]
    pub fn group_scales(&self) -> Option<&'a [f32]> {
        self.group_scales
    }

    /// How and where the trits are stored.
    pub(crate) fn values(&self) -> Values<'a> {
        self.values
    }

    /// Rows of trits: where they stand, or unpacked to `buffer`.
    pub fn read<'b>(&'b self, rows: Range<usize>, buffer: &'b mut Vec<i8>) -> &'b [i8] {
        self.values.rows(rows, self.cols, buffer)
    }
}

/// What has to hold of the size and the scale of a matrix with integer
/// weights, `what`: at least one row, and 1 to `most` columns.
pub(crate) fn check_size(
    what: &str,
    rows: usize,
    cols: usize,
    most: usize,
    scale: f32,
) -> Result<(), Error> {
    if rows == 0 || cols == 0 || cols > most {
        return Err(invalid!(
            "a {what} of {rows} x {cols}; wanted at least one row and 1 to {most} columns"
        ));
    }
    if !scale.is_finite() {
        return Err(invalid!("a scale of {scale}; wanted a finite number"));
    }
    Ok(())
}

/// Whether `len` values, or whatever `what` says, are `rows` x `cols` of them.
pub(crate) fn check_len(what: &str, len: usize, rows: usize, cols: usize) -> Result<(), Error> {
    if rows.checked_mul(cols) != Some(len) {
        return Err(invalid!("{len} {what}; wanted {rows} x {cols}"));
    }
    Ok(())
}

/// The sum of the magnitudes of a row of master weights, in float64: 16
/// interleaved sums, then a fixed tree. The order is part of the definition.
#[must_use]
pub fn abs_sum(row: &[f32]) -> f64 {
    let mut lanes = [0f64; 16];
    for chunk in row.chunks(16) {
        for (lane, &w) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(w.abs());
        }
    }
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0]
}

/// The absmean scale of a matrix from its [`abs_sum`]s added up in row order:
/// `max(mean |w|, 1e-5)` in float32.
#[must_use]
pub fn absmean_scale(total: f64, count: usize) -> f32 {
    ((total / count as f64) as f32).max(1e-5)
}

/// Quantizes a row of master weights: `clamp(round_half_even(w * (1 / scale)), -1, 1)`,
/// as `WeightQuant` in transformers' `integrations/bitnet.py` writes it.
pub fn absmean_row(row: &[f32], scale: f32, trits: &mut [i8]) {
    let inverse = 1.0 / scale;
    for (t, &w) in trits.iter_mut().zip(row) {
        *t = (w * inverse).round_ties_even().clamp(-1.0, 1.0) as i8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_is_not_ternary() {
        assert!(TernaryMatrix::new(&[0, 1, -1, 1], 2, 2, 1.0).is_ok());
        for (trits, rows, cols, scale) in [
            (&[0i8, 2][..], 1, 2, 1.0),
            (&[0, 1], 2, 2, 1.0),
            (&[], 0, 4, 1.0),
            (&[0, 1], 1, 2, f32::NAN),
            (&[0; MAX_COLS], 1, MAX_COLS, 1.0),
        ] {
            assert!(TernaryMatrix::new(trits, rows, cols, scale).is_err());
        }
    }

    #[test]
    fn quarters_give_the_rows_they_were_made_of() {
        for (rows, cols) in [(1usize, 1), (3, 5), (4, 3), (8, 70), (9, 2), (10, 33), (127, 19)] {
            let trits: Vec<i8> = (0..rows * cols).map(|i| (i * i % 7 % 3) as i8 - 1).collect();
            let quarter = rows.div_ceil(4);
            let mut bytes = vec![0; quarter * cols];
            for (r, row) in trits.chunks_exact(cols).enumerate() {
                for (c, &t) in row.iter().enumerate() {
                    bytes[r % quarter * cols + c] |= ((t + 1) as u8) << (2 * (r / quarter));
                }
            }
            let w = TernaryMatrix::from_quarters(&bytes, rows, cols, 1.0).unwrap();
            let mut buffer = Vec::new();
            assert_eq!(w.read(0..rows, &mut buffer), trits, "{rows} x {cols}");
            for r in 0..rows {
                assert_eq!(w.read(r..r + 1, &mut buffer), &trits[r * cols..][..cols]);
            }
        }
    }

    #[test]
    fn code_3_is_refused_wherever_it_stands() {
        for (rows, cols) in [(1usize, 1), (8, 37), (9, 16)] {
            let mut bytes = vec![0b01_10_00_01; rows.div_ceil(4) * cols];
            for at in 0..bytes.len() {
                for quarter in 0..4 {
                    let old = bytes[at];
                    bytes[at] |= 3 << (2 * quarter);
                    let error = TernaryMatrix::from_quarters(&bytes, rows, cols, 1.0).unwrap_err();
                    let place = format!("code 3 in byte [{}, {}];", at / cols, at % cols);
                    assert!(error.to_string().contains(&place), "{error}");
                    bytes[at] = old;
                }
            }
            assert!(TernaryMatrix::from_quarters(&bytes, rows, cols, 1.0).is_ok());
            assert!(TernaryMatrix::from_quarters(&bytes[1..], rows, cols, 1.0).is_err());
        }
    }

    #[test]
    fn absmean_rounds_half_to_even() {
        // Scale 1: 0.5 goes to 0, 1.5 to 2 and is clamped, -0.5 to 0.
        let mut trits = [9i8; 6];
        absmean_row(&[0.5, 1.5, -0.5, -0.75, 0.0, 0.51], 1.0, &mut trits);
        assert_eq!(trits, [0, 1, 0, -1, 0, 1]);
        assert_eq!(absmean_scale(abs_sum(&[-3.0, 1.0, 2.0]), 3), 2.0);
        assert_eq!(absmean_scale(0.0, 3), 1e-5);
    }
}
