//! aarch64 kernels: one file per instruction set and format. The proofs that
//! the instructions exist are in `cpu.rs`.

use super::Kernel;
use crate::cpu::{Isa, Proof};

/// Adds the kernels that `isa` brings over the level below it, fastest first.
pub(super) fn register(isa: Isa, _kernels: &mut Vec<(Isa, Box<dyn Kernel>)>) {
    match isa.proof() {
        Proof::Generic | Proof::Neon(_) | Proof::Dotprod(_) | Proof::I8mm(_) => {}
    }
}
