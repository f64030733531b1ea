//! x86-64 kernels: one file per instruction set and format. The proofs that
//! the instructions exist are in `cpu.rs`.

mod avx2_elut;
mod avx2_i2;
mod avx2_i2_runs;
mod avx2_t5;
mod avx2_tile;
mod avx2_vlut;
mod avx512_i2;
mod avx512_tile;
mod avx512_vlut;
mod avx512vbmi_t5;
mod avxvnni_i2;
mod avxvnni_t5;
mod avxvnni_tile;
mod ssse3_i2;
mod tiles;

use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};

use super::Kernel;
use super::generic::{elut::Elut, tl1, tl2};
use crate::cpu::{Isa, Proof};

/// Adds the kernels that `isa` brings over the level below it, fastest first.
pub(super) fn register(isa: Isa, kernels: &mut Vec<(Isa, Box<dyn Kernel>)>) {
    match isa.proof() {
        Proof::Generic => {}
        Proof::Ssse3(proof) => kernels.push((isa, Box::new(ssse3_i2::Ssse3I2::new(proof)))),
        Proof::Avx2(proof) => {
            kernels.push((isa, Box::new(avx2_i2::Avx2I2::new(proof))));
            kernels.push((isa, Box::new(avx2_vlut::i2(proof))));
            kernels.push((isa, Box::new(avx2_t5::Avx2T5::new(proof))));
            kernels.push((isa, Box::new(avx2_vlut::t5(proof))));
            for (name, layout) in [("avx2-tl2", tl2::layout()), ("avx2-tl1", tl1::layout())] {
                kernels.push((isa, Box::new(avx2_elut::Avx2Elut::new(proof, name, layout))));
            }
        }
        Proof::AvxVnni(proof) => {
            kernels.push((isa, Box::new(avxvnni_i2::AvxVnniI2::new(proof))));
            kernels.push((isa, Box::new(avxvnni_t5::AvxVnniT5::new(proof))));
        }
        Proof::Avx512(proof) => {
            kernels.push((isa, Box::new(avx512_i2::Avx512I2::new(proof))));
            kernels.push((isa, Box::new(avx512_vlut::i2(proof))));
        }
        Proof::Avx512Vbmi(proof) => {
            kernels.push((isa, Box::new(avx512vbmi_t5::Avx512VbmiT5::new(proof))));
        }
    }
}

/// The kernel of any levels that `isa` brings.
pub(super) fn elut(isa: Isa, layout: &'static Elut) -> Option<Box<dyn Kernel>> {
    match isa.proof() {
        Proof::Avx2(proof) => Some(Box::new(avx2_elut::Avx2Elut::new(proof, "avx2-elut", layout))),
        _ => None,
    }
}

/// How far ahead of its reads a GEMV asks for packed bytes: three pages,
/// because hardware prefetchers stop at the end of a page of 4 KiB, also within
/// a huge one. On one thread of a Zen 3 any distance took i2 from 14 to 21 GB/s
/// from memory; on two, of what nothing but reading reached, 1 KiB gave 76 to
/// 78 %, 4 KiB 75 to 83 %, 12 KiB 92 to 98 %, 32 KiB 87 to 89 %.
const AHEAD: usize = 3 * 4096;

/// Asks for the cache lines [`AHEAD`] of `bytes`, which need not exist.
#[inline(always)]
fn prefetch(bytes: &[u8]) {
    prefetch_at(bytes, AHEAD);
}

/// Asks for the cache lines `distance` bytes ahead of `bytes`, which need not exist.
#[inline(always)]
fn prefetch_at(bytes: &[u8], distance: usize) {
    for line in (0..bytes.len()).step_by(64) {
        let at = bytes.as_ptr().wrapping_add(distance + line);
        // SAFETY: SSE is in the target's baseline, and a prefetch of any
        // address does nothing but move a line.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
    }
}
