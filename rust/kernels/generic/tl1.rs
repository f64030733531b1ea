//! TL1: two trits in a nibble, 2 bits a weight. The plain ternary instance of
//! [`Elut`], with nine of the sixteen entries in use.
//!
//! Patterns have the numbers of bitnet.cpp (-1, -1 is 0; 1, 1 is 8). Its files
//! are something else: they order the nibbles by tile sizes that were compiled
//! into the program which wrote them and that no file records.

use std::sync::OnceLock;

use super::elut::Elut;
use crate::levels::Levels;

/// The layout of every TL1 kernel.
pub(in super::super) fn layout() -> &'static Elut {
    static TL1: OnceLock<Elut> = OnceLock::new();
    TL1.get_or_init(|| Elut::new("tl1", Levels::TERNARY, None, 2))
}
