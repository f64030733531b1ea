//! The best logits by int8 rows against the full head: the same ids and the
//! same bits, whatever the numbers are. `rust/ops/tests.rs` has the cases that
//! somebody thought of; here are those that nobody did.

use std::sync::Arc;

use bitnet_rs::cpu::Isa;
use bitnet_rs::floats::{Bf16, F16};
use bitnet_rs::ops::dense::{DenseMatrix, Floats};
use bitnet_rs::ops::head::{ScanRows, ScanScratch, top_logits};
use bitnet_rs::threads::Team;
use proptest::prelude::*;

mod common;

/// Finite floats of any size, small integers (which make ties) and zeros.
fn number() -> impl Strategy<Value = f32> {
    prop_oneof![
        4 => -1f32..1.0,
        2 => (-3i8..=3).prop_map(f32::from),
        1 => any::<f32>().prop_filter("finite", |x| x.is_finite()),
    ]
}

/// What all numbers of a row, or an input, are multiplied by: mostly nothing.
fn size() -> impl Strategy<Value = f32> {
    prop_oneof![5 => Just(1f32), 1 => (-40i32..38).prop_map(|e| 10f32.powi(e))]
}

#[derive(Debug)]
struct Case {
    rows: usize,
    cols: usize,
    w: Vec<f32>,
    xs: Vec<Vec<f32>>,
    ks: Vec<usize>,
}

fn case() -> impl Strategy<Value = Case> {
    (1usize..700, 1usize..90, 1usize..4).prop_flat_map(|(rows, cols, n)| {
        let vector = || (prop::collection::vec(number(), cols), size());
        // A few rows, again and again: the same, or with noise in their last bits, up to what int8
        // can tell apart and beyond.
        let kinds = prop::collection::vec(vector(), 1..6);
        let inputs = prop::collection::vec(vector(), n);
        let ks = prop::collection::vec(1usize..300, n);
        (kinds, inputs, ks, any::<u64>(), 0u32..22).prop_map(move |(kinds, xs, ks, seed, noise)| {
            let mut state = seed | 1;
            let mut w = Vec::with_capacity(rows * cols);
            for _ in 0..rows {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let (row, size) = &kinds[(state >> 33) as usize % kinds.len()];
                w.extend(row.iter().map(|x| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let bits = (x * size).to_bits() ^ ((state >> 40) as u32 & ((1 << noise) - 1));
                    let x = f32::from_bits(bits);
                    if x.is_finite() { x } else { 0.0 }
                }));
            }
            let xs = xs.into_iter().map(|(x, s)| x.iter().map(|x| x * s).collect()).collect();
            Case { rows, cols, w, xs, ks }
        })
    })
}

fn stored(w: &[f32], dtype: u8) -> Floats {
    match dtype {
        0 => Floats::F32(Arc::new(w.to_vec())),
        1 => {
            let bits = |v: &f32| F16(half::f16::from_f32(v.clamp(-6e4, 6e4)).to_bits());
            Floats::F16(Arc::new(w.iter().map(bits).collect::<Vec<_>>()))
        }
        _ => {
            let bits = |v: &f32| Bf16((v.to_bits() >> 16) as u16);
            Floats::Bf16(Arc::new(w.iter().map(bits).collect::<Vec<_>>()))
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256 / common::one_in() as u32))]

    #[test]
    fn the_best_are_the_full_heads(case in case(), dtype in 0u8..3, threads in 1usize..4) {
        let Case { rows, cols, w, xs, ks } = &case;
        let (isa, team) = (Isa::best().unwrap(), Team::new(Some(threads)).unwrap());
        let exact = DenseMatrix::new(*rows, *cols, stored(w, dtype), isa, &team).unwrap();
        let scan = ScanRows::new(&exact, isa, &team);
        let xs: Vec<&[f32]> = xs.iter().map(Vec::as_slice).collect();
        let mut full = vec![0f32; xs.len() * rows];
        let mut parts: Vec<&mut [f32]> = full.chunks_mut(*rows).collect();
        exact.multiply(isa, 0..*rows, &xs, &mut parts);
        let mut scratch = ScanScratch::default();
        let found =
            team.run(|| top_logits(&exact, &scan, isa, &team, &xs, ks, &mut scratch)).unwrap();
        for ((row, found), &k) in full.chunks(*rows).zip(&found).zip(ks) {
            let mut ids: Vec<u32> = (0..*rows as u32).collect();
            ids.sort_by(|&a, &b| {
                let (x, y) = (row[a as usize], row[b as usize]);
                // Not a number first; 0 and -0 are equal.
                y.is_nan()
                    .cmp(&x.is_nan())
                    .then((y + 0.0).total_cmp(&(x + 0.0)))
                    .then(a.cmp(&b))
            });
            ids.truncate(k);
            ids.sort_unstable();
            prop_assert_eq!(&found.ids, &ids);
            for (&id, logit) in ids.iter().zip(&found.logits) {
                prop_assert_eq!(logit.to_bits(), row[id as usize].to_bits());
            }
        }
    }
}
