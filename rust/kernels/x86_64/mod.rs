//! x86-64 kernels: one file per instruction set and format. The proofs that
//! the instructions exist are in `cpu.rs`.

mod avx2_elut;
mod avx2_i2;
mod avx2_tile;
mod avx512_i2;

use super::Kernel;
use super::generic::{elut::Elut, tl1, tl2};
use crate::cpu::{Isa, Proof};

/// Adds the kernels that `isa` brings over the level below it, fastest first.
pub(super) fn register(isa: Isa, kernels: &mut Vec<(Isa, Box<dyn Kernel>)>) {
    match isa.proof() {
        Proof::Generic | Proof::Ssse3(_) | Proof::AvxVnni(_) | Proof::Avx512Vbmi(_) => {}
        Proof::Avx2(proof) => {
            kernels.push((isa, Box::new(avx2_i2::Avx2I2::new(proof))));
            for (name, layout) in [("avx2-tl2", tl2::layout()), ("avx2-tl1", tl1::layout())] {
                kernels.push((isa, Box::new(avx2_elut::Avx2Elut::new(proof, name, layout))));
            }
        }
        Proof::Avx512(proof) => kernels.push((isa, Box::new(avx512_i2::Avx512I2::new(proof)))),
    }
}

/// The kernel of any levels that `isa` brings.
pub(super) fn elut(isa: Isa, layout: &'static Elut) -> Option<Box<dyn Kernel>> {
    match isa.proof() {
        Proof::Avx2(proof) => Some(Box::new(avx2_elut::Avx2Elut::new(proof, "avx2-elut", layout))),
        _ => None,
    }
}
