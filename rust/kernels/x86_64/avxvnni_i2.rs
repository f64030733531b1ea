//! i2 with `vpdpbusd` on 256 bits, in either of its encodings
//! (`avxvnni_tile.rs` says how). It multiplies unsigned codes by signed
//! activations and adds four products to an int32 lane.
//!
//! GEMV is that of `avx2_i2.rs` without the int16 between: fields 0 and 1 of a
//! register are masked where they stand, so that field 1 comes out times 4, and
//! one shift by 4 brings the fields 2 and 3 to the same place:
//!
//! ```text
//! for 32 packed bytes c of each of four rows:      128 weights
//!   single = dpbusd(single, c & 3, q0)    fourfold = dpbusd(fourfold, c & 12, q1)
//!   c >>= 4
//!   single = dpbusd(single, c & 3, q2)    fourfold = dpbusd(fourfold, c & 12, q3)
//! in the end: sum = single + fourfold / 4
//! ```
//!
//! Masking all four fields in place, as `avx512_i2.rs` does, saves the shift,
//! one of 9 instructions, but takes four sums a row: with 4 masks and 4
//! registers of activations, the 16 registers of the VEX encoding have room
//! for less than two rows, and a row group would be read in two streams.
//!
//! The bound: a fourfold code is at most 8 (12, if the packed bytes are none
//! that were packed), so a lane grows by at most 2 * 4 * 12 * 128 < 2^14 for a
//! register, and a row has at most 1024 of them (`MAX_COLS` / 128): 2^24. The
//! division is a shift, exact because every term is a multiple.
//!
//! GEMM unpacks once for all tokens, with the AVX2 that both encodings imply.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::generic::blocks::{BLOCK_BYTES, ROWS};
use super::super::generic::i2::{BLOCK_COLS, Cut, I2};
use super::super::{Kernel, Layout, PackedMatrix, Prepared};
use super::avx2_i2::unpack;
use super::avx2_tile::{add_lanes, load, load_i8};
use super::avxvnni_tile::{Dpbusd, gemm_codes};
use super::prefetch;
use crate::cpu::{AvxVnni, Evex, Vex};

/// Inputs from which on it pays to unpack, by count on three pipes, two of
/// which have `vpdpbusd`: for 1280 columns of four rows, a GEMV takes 120
/// cycles, a tile 80 for every input and the unpacking 150, for its stores.
const UNPACK: usize = 5;

pub(super) struct AvxVnniI2(AvxVnni);

impl AvxVnniI2 {
    pub(super) fn new(proof: AvxVnni) -> Self {
        Self(proof)
    }

    fn multiply(
        &self,
        w: &PackedMatrix,
        rows: Range<usize>,
        xs: &[Prepared],
        ys: &mut [&mut [f32]],
    ) {
        match self.0 {
            // SAFETY: `proof` has the instructions.
            AvxVnni::Vex(proof) => unsafe { multiply_vex(proof, w, rows, xs, ys) },
            // SAFETY: as above.
            AvxVnni::Evex(proof) => unsafe { multiply_evex(proof, w, rows, xs, ys) },
        }
    }
}

impl Kernel for AvxVnniI2 {
    fn name(&self) -> &'static str {
        "avxvnni-i2"
    }

    fn layout(&self) -> &'static dyn Layout {
        &I2
    }

    fn gemv(&self, w: &PackedMatrix, rows: Range<usize>, x: &Prepared, y: &mut [f32]) {
        self.multiply(w, rows, std::slice::from_ref(x), &mut [y]);
    }

    fn gemm(&self, w: &PackedMatrix, rows: Range<usize>, xs: &[Prepared], ys: &mut [&mut [f32]]) {
        if xs.len() < UNPACK {
            self.multiply(w, rows, xs, ys);
        } else {
            // SAFETY: `self.0` contains the AVX2 that `unpack` is compiled for.
            unsafe { gemm_codes(self.0, w, rows, xs, ys, unpack) }
        }
    }
}

/// [`multiply`] with AVX-VNNI.
#[target_feature(enable = "avx2,avxvnni")]
fn multiply_vex(
    proof: Vex,
    w: &PackedMatrix,
    rows: Range<usize>,
    xs: &[Prepared],
    ys: &mut [&mut [f32]],
) {
    multiply(proof, w, rows, xs, ys);
}

/// [`multiply`] with AVX-512 VNNI and VL.
#[target_feature(enable = "avx2,avx512vl,avx512vnni")]
fn multiply_evex(
    proof: Evex,
    w: &PackedMatrix,
    rows: Range<usize>,
    xs: &[Prepared],
    ys: &mut [&mut [f32]],
) {
    multiply(proof, w, rows, xs, ys);
}

/// One input after the other for every row group, which stays in L1.
#[inline(always)]
fn multiply<D: Dpbusd>(
    proof: D,
    w: &PackedMatrix,
    rows: Range<usize>,
    xs: &[Prepared],
    ys: &mut [&mut [f32]],
) {
    for first in rows.clone().step_by(ROWS) {
        let (group, at) = (w.group(first), first - rows.start);
        for (x, y) in xs.iter().zip(ys.iter_mut()) {
            for (y, sum) in y[at..].iter_mut().zip(dot(proof, group, x)) {
                *y = x.rescale(sum - x.sum, w.scale);
            }
        }
    }
}

/// Sums over codes of a row group.
#[inline(always)]
fn dot<D: Dpbusd>(proof: D, group: &[u8], x: &Prepared) -> [i32; ROWS] {
    let cut = Cut::new(x.cols);
    let (full, tail) = group.split_at(cut.blocks * ROWS * BLOCK_BYTES);
    let full = full.as_chunks::<{ ROWS * BLOCK_BYTES }>().0;
    let (q, q_tail) = x.padded().split_at(cut.blocks * BLOCK_COLS);
    let q = q.as_chunks::<BLOCK_COLS>().0;
    // SAFETY: `proof` contains AVX2, which is all that these calls need.
    unsafe {
        let mut acc = [[_mm256_setzero_si256(); 2]; ROWS];
        for (block, q) in full.iter().zip(q) {
            prefetch(block);
            let (c, q) = (block.as_chunks().0, q.as_chunks().0);
            for h in 0..2 {
                let codes = [&c[h], &c[h + 2], &c[h + 4], &c[h + 6]];
                add_register(proof, &mut acc, codes, [&q[h], &q[h + 2], &q[h + 4], &q[h + 6]]);
            }
        }
        for at in (0..cut.tail).step_by(32) {
            let n = (cut.tail - at).min(32);
            // Zero codes after the tail: their products are zero whatever they meet.
            let mut codes = [[0; 32]; ROWS];
            for i in 0..ROWS {
                codes[i][..n].copy_from_slice(&tail[i * cut.tail + at..][..n]);
            }
            let mut q = [&[0; 32]; 4];
            for f in 0..4 {
                let columns = &q_tail[f * cut.tail + at..];
                q[f] = columns.first_chunk().expect("Prepared pads its values by 64");
            }
            add_register(proof, &mut acc, codes.each_ref(), q);
        }
        let mut sums = [_mm256_setzero_si256(); ROWS];
        for i in 0..ROWS {
            sums[i] = _mm256_add_epi32(acc[i][0], _mm256_srai_epi32::<2>(acc[i][1]));
        }
        add_lanes(sums)
    }
}

/// Adds the products of 32 bytes of each row and their four fields' columns.
#[inline(always)]
fn add_register<D: Dpbusd>(
    proof: D,
    acc: &mut [[__m256i; 2]; ROWS],
    codes: [&[u8; 32]; ROWS],
    q: [&[i8; 32]; 4],
) {
    // SAFETY: `proof` contains AVX2, which is all that these calls need.
    unsafe {
        let single = _mm256_set1_epi8(3);
        let fourfold = _mm256_set1_epi8(12);
        let q = [load_i8(q[0]), load_i8(q[1]), load_i8(q[2]), load_i8(q[3])];
        for i in 0..ROWS {
            let low = load(codes[i]);
            let high = _mm256_srli_epi16::<4>(low);
            let [a, b] = &mut acc[i];
            *a = proof.dpbusd(*a, _mm256_and_si256(low, single), q[0]);
            *b = proof.dpbusd(*b, _mm256_and_si256(low, fourfold), q[1]);
            *a = proof.dpbusd(*a, _mm256_and_si256(high, single), q[2]);
            *b = proof.dpbusd(*b, _mm256_and_si256(high, fourfold), q[3]);
        }
    }
}

/// Everything but the instruction, on any CPU with AVX2.
#[cfg(test)]
mod tests {
    use super::super::super::{Activations, Kernels, by_name};
    use super::super::avxvnni_tile::add_run;
    use super::super::tiles;
    use super::*;
    use crate::cpu::{Avx2, Isa, Proof};
    use crate::ternary::TernaryMatrix;
    use crate::threads::Team;

    impl Dpbusd for Avx2 {
        #[inline(always)]
        fn dpbusd(self, sums: __m256i, codes: __m256i, q: __m256i) -> __m256i {
            // SAFETY: `self` proves that the CPU has AVX2.
            unsafe {
                let pairs = _mm256_maddubs_epi16(codes, q);
                _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
            }
        }
    }

    #[test]
    fn a_stand_in_for_the_instruction_gives_the_right_bits() {
        let proofs = Isa::available().into_iter().map(Isa::proof);
        let Some(proof) = proofs.into_iter().find_map(|proof| match proof {
            Proof::Avx2(proof) => Some(proof),
            _ => None,
        }) else {
            return;
        };
        let generic = by_name(Isa::GENERIC, Activations::Int8, Some("generic-i2")).unwrap();
        let team = Team::new(Some(1)).unwrap();
        let rows = 22;
        for cols in (1..700).step_by(13).chain([256, 1024, 1280, 2560, 3000, 6912]) {
            let trits: Vec<i8> = (0..rows * cols).map(|i| (i * i % 7 % 3) as i8 - 1).collect();
            let w = TernaryMatrix::new(&trits, rows, cols, 0.3).unwrap();
            let w = PackedMatrix::pack(Kernels::of(generic), &w, &team).unwrap();
            let input = |t: usize| (0..cols).map(|c| (c * 31 + t * 57) as u8 as i8).collect();
            let inputs: Vec<Vec<i8>> = (0..14).map(input).collect();
            for n in [1, 2, 3, 14] {
                let xs = &inputs[..n];
                let xs: Vec<_> = xs.iter().map(|q| Prepared::from_values(q, 2.0)).collect();
                let run = |f: &dyn Fn(&mut [&mut [f32]])| {
                    let mut y = vec![f32::NAN; n * rows];
                    f(&mut y.chunks_mut(rows).collect::<Vec<_>>());
                    y
                };
                let right = run(&|ys| generic.gemm(&w, 0..rows, &xs, ys));
                assert_eq!(run(&|ys| multiply(proof, &w, 0..rows, &xs, ys)), right, "{cols} {n}");
                // SAFETY: `proof` is of AVX2, and nothing else is needed.
                let found = run(&|ys| unsafe {
                    tiles::gemm(proof, &w, 0..rows, &xs, ys, unpack, add_run::<Avx2>);
                });
                assert_eq!(found, right, "{cols} {n}");
            }
        }
    }
}
