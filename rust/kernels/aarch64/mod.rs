//! aarch64 kernels: one file per instruction set and format. The proofs that
//! the instructions exist are in `cpu.rs`.

mod block;
mod dotprod_i2;
mod dotprod_t5;
mod dotprod_tile;
mod i8mm_i2;
mod i8mm_t5;
mod i8mm_tile;
mod neon_elut;
mod neon_i2;
mod neon_t5;
mod neon_tile;
mod neon_vlut;
mod tile;

use super::Kernel;
use super::generic::{elut::Elut, tl1, tl2};
use crate::cpu::{Isa, Proof};

/// Adds the kernels that `isa` brings over the level below it, fastest first.
pub(super) fn register(isa: Isa, kernels: &mut Vec<(Isa, Box<dyn Kernel>)>) {
    match isa.proof() {
        Proof::Generic => {}
        Proof::Neon(proof) => {
            kernels.push((isa, Box::new(neon_i2::NeonI2::new(proof))));
            kernels.push((isa, Box::new(neon_vlut::i2(proof))));
            kernels.push((isa, Box::new(neon_t5::NeonT5::new(proof))));
            for (name, layout) in [("neon-tl2", tl2::layout()), ("neon-tl1", tl1::layout())] {
                kernels.push((isa, Box::new(neon_elut::NeonElut::new(proof, name, layout))));
            }
        }
        Proof::Dotprod(proof) => {
            kernels.push((isa, Box::new(dotprod_i2::DotprodI2::new(proof))));
            kernels.push((isa, Box::new(dotprod_t5::DotprodT5::new(proof))));
        }
        Proof::I8mm(proof) => {
            kernels.push((isa, Box::new(i8mm_i2::I8mmI2::new(proof))));
            kernels.push((isa, Box::new(i8mm_t5::I8mmT5::new(proof))));
        }
    }
}

/// The kernel of any levels that `isa` brings.
pub(super) fn elut(isa: Isa, layout: &'static Elut) -> Option<Box<dyn Kernel>> {
    match isa.proof() {
        Proof::Neon(proof) => Some(Box::new(neon_elut::NeonElut::new(proof, "neon-elut", layout))),
        _ => None,
    }
}
