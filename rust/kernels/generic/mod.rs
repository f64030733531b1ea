//! Scalar kernels, one file per format. They are the definitions: every other
//! kernel is tested for equal bits against them.

pub(super) mod blocks;
pub(super) mod elut;
pub(super) mod i2;
pub(super) mod i2g;
pub(super) mod t5;
pub(super) mod tl1;
pub(super) mod tl2;

use super::Kernel;
use crate::cpu::Isa;

/// Adds this folder's kernels. The last is the one that everything is compared
/// with, also by name: `generic-i2`.
pub(super) fn register(kernels: &mut Vec<(Isa, Box<dyn Kernel>)>) {
    kernels.push((Isa::GENERIC, Box::new(t5::GenericT5)));
    for (name, layout) in [("generic-tl2", tl2::layout()), ("generic-tl1", tl1::layout())] {
        kernels.push((Isa::GENERIC, Box::new(elut::GenericElut::new(name, layout))));
    }
    kernels.push((Isa::GENERIC, Box::new(i2::GenericI2)));
}

/// The kernel of any levels.
pub(super) fn elut(layout: &'static elut::Elut) -> Box<dyn Kernel> {
    Box::new(elut::GenericElut::new("generic-elut", layout))
}
