//! The canonical form of a ternary weight matrix, and absmean quantization,
//! which makes one from master weights. No layouts and no SIMD: every file
//! format becomes this first, and every kernel packs from this.

use crate::error::{Error, invalid};

/// `cols` must stay below this: then `|acc| <= 128 * cols < 2^24`, and the
/// integer sum of a row converts to f32 exactly.
pub const MAX_COLS: usize = 131_072;

/// A matrix of -1, 0 and +1 with one scale, borrowed, row-major.
#[derive(Clone, Copy, Debug)]
pub struct TernaryMatrix<'a> {
    trits: &'a [i8],
    rows: usize,
    cols: usize,
    scale: f32,
}

impl<'a> TernaryMatrix<'a> {
    /// Checks and wraps `trits`. `scale` multiplies.
    ///
    /// # Errors
    /// A length that is not `rows * cols`, no rows or columns, `cols` of
    /// [`MAX_COLS`] or more, a value other than -1, 0 and +1, a scale that is
    /// not finite.
    pub fn new(trits: &'a [i8], rows: usize, cols: usize, scale: f32) -> Result<Self, Error> {
        check_matrix("ternary matrix", trits.len(), rows, cols, MAX_COLS - 1, scale)?;
        // Branch-free over a row, so that checking costs one pass at memory speed.
        for (r, row) in trits.chunks_exact(cols).enumerate() {
            if row.iter().fold(0u8, |bad, &t| bad | u8::from(!(-1..=1).contains(&t))) != 0 {
                let found = row.iter().find(|t| !(-1..=1).contains(*t)).unwrap_or(&0);
                return Err(invalid!("row {r} holds {found}; ternary values are -1, 0 and 1"));
            }
        }
        Ok(Self { trits, rows, cols, scale })
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

    /// All trits, row-major.
    #[must_use]
    pub fn trits(&self) -> &'a [i8] {
        self.trits
    }

    /// One row of trits.
    #[must_use]
    pub fn row(&self, r: usize) -> &'a [i8] {
        &self.trits[r * self.cols..(r + 1) * self.cols]
    }
}

/// What has to hold of `len` values that make a matrix with integer weights,
/// `what`, of `rows` x `cols`: at least one, and at most `most` columns.
pub(crate) fn check_matrix(
    what: &str,
    len: usize,
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
    if rows.checked_mul(cols) != Some(len) {
        return Err(invalid!("{len} values for a {what} of {rows} x {cols}"));
    }
    if !scale.is_finite() {
        return Err(invalid!("a scale of {scale}; wanted a finite number"));
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
    fn absmean_rounds_half_to_even() {
        // Scale 1: 0.5 goes to 0, 1.5 to 2 and is clamped, -0.5 to 0.
        let mut trits = [9i8; 6];
        absmean_row(&[0.5, 1.5, -0.5, -0.75, 0.0, 0.51], 1.0, &mut trits);
        assert_eq!(trits, [0, 1, 0, -1, 0, 1]);
        assert_eq!(absmean_scale(abs_sum(&[-3.0, 1.0, 2.0]), 3), 2.0);
        assert_eq!(absmean_scale(0.0, 3), 1e-5);
    }
}
