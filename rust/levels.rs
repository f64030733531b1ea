//! Weights of a few integer values: the general form of a low-bit matrix, of
//! which the ternary one is the case -1, 0, +1. Kernels pack from this; only
//! the element-wise tables (`kernels/generic/elut.rs`) take anything but
//! trits. Apart from `ternary.rs` because models know ternary matrices alone.

use std::ops::Range;

use crate::error::{Error, invalid};
use crate::ternary::{TernaryMatrix, Values, check_len, check_size};

/// Most levels: three bits.
pub const MAX_LEVELS: usize = 8;

/// 2 to 8 distinct integers that weights take, in rising order.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Levels {
    values: [i8; MAX_LEVELS],
    len: usize,
}

impl Levels {
    /// -1, 0 and +1.
    pub const TERNARY: Levels = Levels { values: [-1, 0, 1, 0, 0, 0, 0, 0], len: 3 };

    /// Checks and sorts `values`.
    ///
    /// # Errors
    /// Fewer than 2 or more than 8, one twice, or -128, whose opposite is no
    /// int8.
    pub fn new(values: &[i8]) -> Result<Self, Error> {
        let wrong = |what: String| invalid!("levels {values:?}: {what}");
        if !(2..=MAX_LEVELS).contains(&values.len()) {
            return Err(wrong(format!("{} of them; wanted 2 to {MAX_LEVELS}", values.len())));
        }
        let mut sorted = [0; MAX_LEVELS];
        sorted[..values.len()].copy_from_slice(values);
        sorted[..values.len()].sort_unstable();
        if sorted[..values.len()].windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(wrong("one stands there twice".to_owned()));
        }
        if sorted[0] == i8::MIN {
            return Err(wrong("wanted values from -127 to 127".to_owned()));
        }
        Ok(Self { values: sorted, len: values.len() })
    }

    /// In rising order.
    #[must_use]
    pub fn values(&self) -> &[i8] {
        &self.values[..self.len]
    }

    /// Where `value` stands among them.
    #[must_use]
    pub fn index(&self, value: i8) -> Option<usize> {
        self.values().iter().position(|&v| v == value)
    }

    /// Whether `-v` is a level for every level `v`.
    #[must_use]
    pub fn is_symmetric(&self) -> bool {
        self.values().iter().zip(self.values().iter().rev()).all(|(a, b)| *a == -*b)
    }

    /// The largest magnitude.
    #[must_use]
    pub fn max_abs(&self) -> i32 {
        self.values().iter().map(|&v| i32::from(v).abs()).max().unwrap_or(0)
    }
}

/// A row-major matrix of levels with one scale, borrowed.
#[derive(Clone, Copy, Debug)]
pub struct LevelMatrix<'a> {
    values: Values<'a>,
    rows: usize,
    cols: usize,
    scale: f32,
    group_scales: Option<&'a [f32]>,
    levels: Levels,
}

impl<'a> LevelMatrix<'a> {
    /// Checks and wraps `values`. `scale` multiplies.
    ///
    /// # Errors
    /// A length that is not `rows * cols`, no rows or columns, so many columns
    /// that a sum of `128 * max_abs` each could reach 2^24 (where integers stop
    /// being exact in float32), a value that is no level, a scale that is not
    /// finite.
    pub fn new(
        values: &'a [i8],
        rows: usize,
        cols: usize,
        scale: f32,
        levels: Levels,
    ) -> Result<Self, Error> {
        let most = ((1usize << 24) - 1) / (128 * levels.max_abs().max(1) as usize);
        let what = format!("matrix with levels {:?}", levels.values());
        check_size(&what, rows, cols, most, scale)?;
        check_len("values", values.len(), rows, cols)?;
        let mut allowed = [false; 256];
        levels.values().iter().for_each(|&v| allowed[usize::from(v as u8)] = true);
        if let Some(at) = values.iter().position(|&v| !allowed[usize::from(v as u8)]) {
            return Err(invalid!(
                "row {} holds {}; the levels are {:?}",
                at / cols,
                values[at],
                levels.values()
            ));
        }
        Ok(Self { values: Values::Bytes(values), rows, cols, scale, group_scales: None, levels })
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

    /// Several scales, of a ternary matrix that has them.
    #[must_use]
    pub fn group_scales(&self) -> Option<&'a [f32]> {
        self.group_scales
    }

    /// What values there may be.
    #[must_use]
    pub fn levels(&self) -> Levels {
        self.levels
    }

    /// Rows of values: where they stand, or unpacked to `buffer`.
    pub fn read<'b>(&'b self, rows: Range<usize>, buffer: &'b mut Vec<i8>) -> &'b [i8] {
        self.values.rows(rows, self.cols, buffer)
    }
}

/// A ternary matrix has been checked already.
impl<'a> From<&TernaryMatrix<'a>> for LevelMatrix<'a> {
    fn from(w: &TernaryMatrix<'a>) -> Self {
        Self {
            values: w.values(),
            rows: w.rows(),
            cols: w.cols(),
            scale: w.scale(),
            group_scales: w.group_scales(),
            levels: Levels::TERNARY,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_sorted_and_distinct() {
        assert_eq!(Levels::new(&[3, -1, 1, -3]).unwrap().values(), [-3, -1, 1, 3]);
        assert_eq!(Levels::new(&[0, 1, -1]).unwrap(), Levels::TERNARY);
        assert!(Levels::new(&[1, -1]).unwrap().is_symmetric());
        assert!(!Levels::new(&[0, 1]).unwrap().is_symmetric());
        assert!(!Levels::new(&[-2, -1, 0, 1]).unwrap().is_symmetric());
        for wrong in [&[1i8][..], &[1, 1], &[-128, 1], &[0, 1, 2, 3, 4, 5, 6, 7, 8]] {
            assert!(Levels::new(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_matrix_holds_nothing_but_its_levels() {
        let levels = Levels::new(&[-3, -1, 1, 3]).unwrap();
        assert!(LevelMatrix::new(&[-3, 1, 3, -1], 2, 2, 1.0, levels).is_ok());
        assert!(LevelMatrix::new(&[-3, 0], 1, 2, 1.0, levels).is_err());
        assert!(LevelMatrix::new(&[-3], 1, 2, 1.0, levels).is_err());
        assert!(LevelMatrix::new(&[1], 1, 1, f32::INFINITY, levels).is_err());
        // 128 * 3 * 43_691 would reach 2^24.
        let wide = vec![1; 43_691];
        assert!(LevelMatrix::new(&wide, 1, wide.len(), 1.0, levels).is_err());
        assert!(LevelMatrix::new(&wide[1..], 1, wide.len() - 1, 1.0, levels).is_ok());
    }
}
