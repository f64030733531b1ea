//! Scalar kernels, one file per format. They are the definitions: every other
//! kernel is tested for equal bits against them.

pub(super) mod i2;
pub(super) mod t5;

use super::Kernel;
use crate::cpu::Isa;

/// Adds this folder's kernels, fastest first.
pub(super) fn register(kernels: &mut Vec<(Isa, Box<dyn Kernel>)>) {
    kernels.push((Isa::GENERIC, Box::new(t5::GenericT5)));
    kernels.push((Isa::GENERIC, Box::new(i2::GenericI2)));
}
