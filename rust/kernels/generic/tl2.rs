//! TL2: three trits in a nibble and a sign bit, 1.67 bits a weight. The
//! mirrored ternary instance of [`Elut`], with fourteen of the
//! sixteen entries in use. What does not fill a block of 24 columns is TL1.
//!
//! Patterns have the index and sign of bitnet.cpp (0, 0, 0 is 0; 1, 1, 1 is 13,
//! and -1, -1, -1 its opposite). As with TL1, its files are in an order that
//! they do not record.

use std::sync::OnceLock;

use super::elut::Elut;
use crate::levels::Levels;

/// The layout of every TL2 kernel.
pub(in super::super) fn layout() -> &'static Elut {
    static TL2: OnceLock<Elut> = OnceLock::new();
    TL2.get_or_init(|| Elut::new("tl2", Levels::TERNARY, Some(3), 2))
}
