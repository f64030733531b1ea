//! One runner for all ops: every instruction set that the machine has against
//! the generic one, bit for bit, and the generic one against float64.

use super::activation::{Activation, add, gate_up};
use super::attention::{KEY_BLOCK, attend};
use super::dense::{DenseMatrix, ROW_GROUP, StoredFloats};
use super::exp::exp_in_place;
use super::rms_norm::rms_norm;
use super::rope::{Rope, rotate};
use crate::cpu::Isa;
use crate::kv_cache::{KvCache, KvDtype, KvShape, ModelId};
use crate::threads::Team;

/// Values of very different sizes, subnormals and zeros among them.
fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|i| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let x = (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0;
            match i % 11 {
                7 => x * 1e-38,
                8 => x * 1e4,
                9 => 0.0,
                _ => x,
            }
        })
        .collect()
}

/// Runs `f` for every instruction set; all results must have the bits of the
/// generic one, which is returned.
fn same_bits(what: &str, f: impl Fn(Isa) -> Vec<f32>) -> Vec<f32> {
    let right = f(Isa::GENERIC);
    for isa in Isa::available() {
        let found = f(isa);
        for (i, (a, b)) in found.iter().zip(&right).enumerate() {
            assert_eq!(a.to_bits(), b.to_bits(), "{what} on {} at {i}: {a} {b}", isa.name());
        }
    }
    right
}

/// Ragged and round widths.
const WIDTHS: [usize; 10] = [1, 2, 15, 16, 17, 31, 96, 100, 500, 2560];

#[test]
fn rms_norm_is_the_same_everywhere_and_right() {
    for n in WIDTHS {
        let (x, w) = (values(n, 1), values(n, 2));
        let y = same_bits("rms_norm", |isa| {
            let mut out = vec![0f32; n];
            rms_norm(isa, &x, &w, 1e-5, &mut out);
            out
        });
        let mean = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / n as f64;
        for i in 0..n {
            let right = f64::from(x[i]) / (mean + 1e-5).sqrt() * f64::from(w[i]);
            assert!((f64::from(y[i]) - right).abs() <= 1e-5 * right.abs() + 1e-37, "{i} of {n}");
        }
    }
}

#[test]
fn exp_is_the_same_everywhere() {
    let mut x = values(4099, 3);
    x.iter_mut().for_each(|v| *v *= 60.0);
    x.extend([f32::NEG_INFINITY, f32::INFINITY, -104.0, 88.8, -87.5, 0.0, -0.0]);
    same_bits("exp", |isa| {
        let mut y = x.clone();
        exp_in_place(isa, &mut y);
        y
    });
}

#[test]
fn activations_are_the_same_everywhere_and_right() {
    for n in WIDTHS {
        let (gate, up) = (values(n, 4), values(n, 5));
        for activation in [Activation::Relu2, Activation::Silu] {
            let y = same_bits("gate_up", |isa| {
                let mut y = gate.clone();
                gate_up(isa, activation, &mut y, &up);
                y
            });
            for i in 0..n {
                let g = f64::from(gate[i]);
                let right = f64::from(up[i])
                    * match activation {
                        Activation::Relu2 => g.max(0.0).powi(2),
                        Activation::Silu => g / (1.0 + (-g).exp()),
                    };
                assert!((f64::from(y[i]) - right).abs() <= 1e-6 * right.abs() + 1e-37);
            }
        }
        same_bits("add", |isa| {
            let mut y = gate.clone();
            add(isa, &mut y, &up);
            y
        });
    }
}

#[test]
fn rope_is_the_same_everywhere() {
    for head_dim in [2, 20, 96, 100, 128] {
        let angles = Rope::new(head_dim, 500_000.0).angles(4095);
        let x = values(3 * head_dim, 6);
        same_bits("rotate", |isa| {
            let mut y = x.clone();
            rotate(isa, &angles, &mut y);
            y
        });
    }
}

#[test]
fn the_head_is_the_same_everywhere_and_right() {
    for cols in WIDTHS {
        let rows = 11; // two groups and a part of one
        let w = values(rows * cols, 7);
        let half: Vec<u16> = w.iter().map(|&v| half::f16::from_f32(v).to_bits()).collect();
        let brain: Vec<u16> = w.iter().map(|&v| half::bf16::from_f32(v).to_bits()).collect();
        let xs: Vec<Vec<f32>> = (0..3).map(|t| values(cols, 8 + t)).collect();
        let xs: Vec<&[f32]> = xs.iter().map(Vec::as_slice).collect();
        for (data, right_row) in [
            (StoredFloats::F32(&w), w.clone()),
            (
                StoredFloats::F16(&half),
                half.iter().map(|&b| half::f16::from_bits(b).to_f32()).collect(),
            ),
            (
                StoredFloats::Bf16(&brain),
                brain.iter().map(|&b| half::bf16::from_bits(b).to_f32()).collect(),
            ),
        ] {
            let matrix = DenseMatrix::new(rows, cols, data, &Team::new(Some(1)).unwrap()).unwrap();
            let y = same_bits("head", |isa| {
                let mut y = vec![0f32; 3 * rows];
                let mut parts: Vec<&mut [f32]> = y.chunks_mut(rows).collect();
                matrix.multiply(isa, 0..rows, &xs, &mut parts);
                y
            });
            let mut row = vec![0f32; cols];
            for r in 0..rows {
                matrix.row(r, &mut row);
                assert_eq!(row, right_row[r * cols..][..cols]);
                for (t, x) in xs.iter().enumerate() {
                    let terms = row.iter().zip(*x).map(|(&w, &x)| f64::from(w) * f64::from(x));
                    let (right, size) = terms.fold((0.0, 0.0), |(s, a), v| (s + v, a + v.abs()));
                    let error = (f64::from(y[t * rows + r]) - right).abs();
                    assert!(error <= 1e-5 * size + 1e-37, "{error} at {r}, {cols} columns");
                }
            }
            // A part of the rows, one input: the same bits again.
            let mut part = [0f32; 3];
            matrix.multiply(Isa::GENERIC, 2 * ROW_GROUP..rows, &xs[..1], &mut [&mut part]);
            assert_eq!(
                part.map(f32::to_bits)[..],
                y[2 * ROW_GROUP..rows].iter().map(|v| v.to_bits()).collect::<Vec<_>>()
            );
        }
    }
}

fn cache(shape: KvShape, dtype: KvDtype, keys: &[f32], values: &[f32], n: usize) -> KvCache {
    let mut cache = KvCache::new(shape, n + 3, dtype).unwrap();
    cache.reserve(n).unwrap();
    cache.write(0, 0, keys, values);
    cache.advance(n);
    cache
}

#[test]
fn attention_is_the_same_everywhere_and_right() {
    for (head_dim, group) in [(4, 1), (20, 3), (64, 4), (100, 5), (128, 9)] {
        let shape = KvShape { model: ModelId::next(), n_layers: 1, n_kv_heads: 1, head_dim };
        for n in [1, 2, 16, 17, KEY_BLOCK, KEY_BLOCK + 1, 2 * KEY_BLOCK + 37] {
            let q = values(group * head_dim, 20);
            let unit = |seed| -> Vec<f32> {
                values(n * head_dim, seed).iter().map(|v| v.clamp(-2.0, 2.0)).collect()
            };
            let (k, v) = (unit(21), unit(22));
            for dtype in [KvDtype::F16, KvDtype::F32] {
                let cache = cache(shape, dtype, &k, &v, n);
                let y = same_bits("attention", |isa| {
                    let mut out = vec![0f32; q.len()];
                    attend(isa, &q, &cache, 0, 0, n, &mut out);
                    out
                });
                if dtype == KvDtype::F16 {
                    continue;
                }
                for h in 0..group {
                    let q = &q[h * head_dim..][..head_dim];
                    let right = oracle(q, &k, &v, head_dim);
                    for d in 0..head_dim {
                        let error = (f64::from(y[h * head_dim + d]) - right[d]).abs();
                        // Scores reach 1e4, where float32 has steps of 1e-3.
                        assert!(error < 2e-2, "{error}: head {h}, dimension {d}, {n} keys");
                    }
                }
            }
        }
    }
}

/// Softmax attention in float64.
fn oracle(q: &[f32], k: &[f32], v: &[f32], head_dim: usize) -> Vec<f64> {
    let dot = |k: &[f32]| -> f64 {
        q.iter().zip(k).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum::<f64>()
            / (head_dim as f64).sqrt()
    };
    let scores: Vec<f64> = k.chunks_exact(head_dim).map(dot).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let p: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let sum: f64 = p.iter().sum();
    let mut out = vec![0f64; head_dim];
    for (p, v) in p.iter().zip(v.chunks_exact(head_dim)) {
        for (o, &v) in out.iter_mut().zip(v) {
            *o += p / sum * f64::from(v);
        }
    }
    out
}

/// A query sees the keys before it and nothing of those after, even in the
/// same group of lanes or page.
#[test]
fn later_keys_leave_no_trace() {
    let shape = KvShape { model: ModelId::next(), n_layers: 1, n_kv_heads: 1, head_dim: 20 };
    let (q, k, v) = (values(20, 30), values(200 * 20, 31), values(200 * 20, 32));
    let all = cache(shape, KvDtype::F16, &k, &v, 200);
    for n in [1, 5, 16, 127, 128, 129] {
        let few = cache(shape, KvDtype::F16, &k[..n * 20], &v[..n * 20], n);
        let (mut a, mut b) = ([0f32; 20], [0f32; 20]);
        attend(Isa::GENERIC, &q, &all, 0, 0, n, &mut a);
        attend(Isa::GENERIC, &q, &few, 0, 0, n, &mut b);
        assert_eq!(a.map(f32::to_bits), b.map(f32::to_bits), "{n} keys");
    }
}
