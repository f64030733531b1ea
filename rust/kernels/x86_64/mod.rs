//! x86-64 kernels: one file per instruction set and format. The proofs that
//! the instructions exist are in `cpu.rs`.

mod avx2_i2;
mod avx2_tile;
mod avx512_i2;

use super::Kernel;
use crate::cpu::{Isa, Proof};

/// Adds the kernels that `isa` brings over the level below it, fastest first.
pub(super) fn register(isa: Isa, kernels: &mut Vec<(Isa, Box<dyn Kernel>)>) {
    match isa.proof() {
        Proof::Generic | Proof::Ssse3(_) | Proof::AvxVnni(_) | Proof::Avx512Vbmi(_) => {}
        Proof::Avx2(proof) => kernels.push((isa, Box::new(avx2_i2::Avx2I2::new(proof)))),
        Proof::Avx512(proof) => kernels.push((isa, Box::new(avx512_i2::Avx512I2::new(proof)))),
    }
}
