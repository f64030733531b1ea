//! One runner for all ops: every instruction set that the machine has against
//! the generic one, bit for bit, and the generic one against float64.

use std::sync::Arc;

use super::activation::{Activation, add, gate_up};
use super::attention::{ALL, KEY_BLOCK, Keys, attend, attend_blocks, block_width, merge_blocks};
use super::attention_rows::attend_rows;
use super::dense::{DenseMatrix, Floats};
use super::exp::exp_in_place;
use super::head::{ScanRows, ScanScratch, top_logits};
use super::rms_norm::rms_norm;
use super::rope::{Rope, rotate};
use crate::cpu::Isa;
use crate::floats::{Bf16, F16};
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
        for activation in [Activation::Relu2, Activation::Silu, Activation::GeluTanh] {
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
                        Activation::GeluTanh => {
                            let u =
                                (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g * g * g);
                            g * (1.0 + u.tanh()) / 2.0
                        }
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
        let mut angles = vec![0f32; head_dim];
        Rope::new(head_dim, 500_000.0).angles(4095, &mut angles);
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
        let half: Vec<F16> = w.iter().map(|&v| F16(half::f16::from_f32(v).to_bits())).collect();
        let brain: Vec<Bf16> = w.iter().map(|&v| Bf16(half::bf16::from_f32(v).to_bits())).collect();
        let xs: Vec<Vec<f32>> = (0..3).map(|t| values(cols, 8 + t)).collect();
        let xs: Vec<&[f32]> = xs.iter().map(Vec::as_slice).collect();
        let wide = |bits: &[F16]| bits.iter().map(|b| half::f16::from_bits(b.0).to_f32()).collect();
        let wider =
            |bits: &[Bf16]| bits.iter().map(|b| half::bf16::from_bits(b.0).to_f32()).collect();
        for (right_row, data) in [
            (w.clone(), Floats::F32(Arc::new(w.clone()))),
            (wide(&half), Floats::F16(Arc::new(half.clone()))),
            (wider(&brain), Floats::Bf16(Arc::new(brain.clone()))),
        ] {
            let right_row: Vec<f32> = right_row;
            let team = Team::new(Some(1)).unwrap();
            let matrix = DenseMatrix::new(rows, cols, data, Isa::GENERIC, &team).unwrap();
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
            matrix.multiply(Isa::GENERIC, 8..rows, &xs[..1], &mut [&mut part]);
            assert_eq!(
                part.map(f32::to_bits)[..],
                y[8..rows].iter().map(|v| v.to_bits()).collect::<Vec<_>>()
            );
        }
    }
}

fn cache(shape: KvShape, dtype: KvDtype, keys: &[f32], values: &[f32], n: usize) -> KvCache {
    let mut cache = KvCache::new(shape, n + 3, dtype).unwrap();
    cache.reserve(n).unwrap();
    cache.write((Isa::GENERIC, &Team::new(Some(1)).unwrap()), 0, 0, keys, values);
    cache.advance(n);
    cache
}

#[test]
fn attention_is_the_same_everywhere_and_right() {
    for (head_dim, group) in [(4, 1), (20, 3), (64, 4), (100, 5), (128, 9)] {
        let shape = KvShape { model: ModelId::next(), n_layers: 1, n_kv_heads: 1, head_dim };
        for (n, window) in [
            (1, ALL),
            (2, 1),
            (16, ALL),
            (17, 9),
            (KEY_BLOCK, 40),
            (KEY_BLOCK + 1, ALL),
            (2 * KEY_BLOCK + 37, [ALL, KEY_BLOCK + 38][group % 2]),
        ] {
            let q = values(group * head_dim, 20);
            let unit = |seed| -> Vec<f32> {
                values(n * head_dim, seed).iter().map(|v| v.clamp(-2.0, 2.0)).collect()
            };
            let (k, v) = (unit(21), unit(22));
            for (dtype, window) in [(KvDtype::F16, ALL), (KvDtype::F32, window)] {
                let cache = cache(shape, dtype, &k, &v, n);
                let keys = Keys { cache: &cache, layer: 0, kv_head: 0, n_keys: n, window };
                let start = n.saturating_sub(window) * head_dim;
                let y = same_bits("attention", |isa| {
                    let mut out = vec![0f32; q.len()];
                    attend(isa, &q, keys, &mut Vec::new(), &mut out);
                    // Block by block, in two parts, then merged: the same bits.
                    let width = group * block_width(head_dim);
                    let mut parts = vec![0f32; keys.blocks() * width];
                    let half = keys.blocks() / 2;
                    let (first, second) = parts.split_at_mut(half * width);
                    attend_blocks(isa, &q, keys, 0..half, first);
                    attend_blocks(isa, &q, keys, half..keys.blocks(), second);
                    let mut merged = vec![0f32; q.len()];
                    merge_blocks(isa, &parts, head_dim, &mut merged);
                    assert_eq!(
                        out.iter().map(|x| x.to_bits()).collect::<Vec<_>>(),
                        merged.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
                    );
                    out
                });
                if dtype == KvDtype::F16 {
                    continue;
                }
                for h in 0..group {
                    let q = &q[h * head_dim..][..head_dim];
                    let right = oracle(q, &k[start..], &v[start..], head_dim);
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

/// Consecutive tokens together give what each gives alone, wherever blocks of keys end.
#[test]
fn attention_of_several_tokens_is_that_of_each() {
    // Few tokens where they are wide: scalar code takes seconds for a million terms.
    for (head_dim, group) in [(4, 1), (20, 3), (100, 1), (128, 4), (36, 7)] {
        let shape = KvShape { model: ModelId::next(), n_layers: 1, n_kv_heads: 1, head_dim };
        let n = 2 * KEY_BLOCK + 37;
        let unit = |seed| -> Vec<f32> {
            values(n * head_dim, seed).iter().map(|v| v.clamp(-2.0, 2.0)).collect()
        };
        let (k, v) = (unit(23), unit(24));
        for dtype in [KvDtype::F16, KvDtype::F32] {
            let cache = cache(shape, dtype, &k, &v, n);
            for (first, tokens, window) in [
                (1, 2, ALL),
                (30, 7, 5),
                (127, 3, ALL),
                (128, 1, 128),
                (120, 13, ALL),
                (254, 4, 100),
                // The block before is behind the windows of all but the first two.
                (256, 6, 2),
            ] {
                let q = values(tokens * group * head_dim, 25);
                let queries: Vec<&[f32]> = q.chunks_exact(group * head_dim).collect();
                let keys = |n_keys| Keys { cache: &cache, layer: 0, kv_head: 0, n_keys, window };
                let found = same_bits("attention of several tokens", |isa| {
                    let mut out = vec![f32::NAN; q.len()];
                    let mut outs: Vec<&mut [f32]> =
                        out.chunks_exact_mut(group * head_dim).collect();
                    attend_rows(isa, &queries, keys(first), &mut outs);
                    out
                });
                for (t, q) in queries.iter().enumerate() {
                    let mut right = vec![0f32; q.len()];
                    attend(Isa::GENERIC, q, keys(first + t), &mut Vec::new(), &mut right);
                    let found = &found[t * q.len()..][..q.len()];
                    assert!(
                        right.iter().zip(found).all(|(a, b)| a.to_bits() == b.to_bits()),
                        "token {t} of {tokens} from {first}, head_dim {head_dim}, {dtype:?}"
                    );
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
        let keys = |cache| Keys { cache, layer: 0, kv_head: 0, n_keys: n, window: ALL };
        attend(Isa::GENERIC, &q, keys(&all), &mut Vec::new(), &mut a);
        attend(Isa::GENERIC, &q, keys(&few), &mut Vec::new(), &mut b);
        assert_eq!(a.map(f32::to_bits), b.map(f32::to_bits), "{n} keys");
    }
}

/// A head of `rows` rows and an input for it, of some kind of difficulty.
fn hard_case(kind: usize, rows: usize, cols: usize, seed: u64) -> (Vec<f32>, Vec<f32>) {
    let (mut w, mut x) = (values(rows * cols, seed), values(cols, seed + 1));
    match kind {
        // Rows that differ in their last bits, so that int8 cannot tell them apart.
        0 => {
            for r in 1..rows {
                for c in 0..cols {
                    let near =
                        (w[c].to_bits() + (r * (c % 3 == 0) as usize) as u32 % 5).min(0x7f00_0000);
                    w[r * cols + c] = if w[c] == 0.0 { 0.0 } else { f32::from_bits(near) };
                }
            }
        }
        // Equal rows, and with them equal logits.
        1 => (1..rows).for_each(|r| w.copy_within((r % 3) * cols..(r % 3 + 1) * cols, r * cols)),
        // Zero rows and tiny ones.
        2 => w.iter_mut().enumerate().for_each(|(i, w)| {
            *w *= [0.0, 1e-36, 1e-30, 1.0][i / cols % 4];
        }),
        // Large numbers: sums overflow.
        3 => w.iter_mut().for_each(|w| *w *= 3e33),
        // One outlier in each row, and in the input.
        4 => {
            (0..rows).for_each(|r| w[r * cols + r % cols] = 1e3);
            x[0] = 1e6;
        }
        // Inputs of all sizes.
        5 => x.iter_mut().for_each(|x| *x *= 1e-36),
        6 => x.iter_mut().for_each(|x| *x *= 1e30),
        7 => x.fill(0.0),
        8 => x[cols / 2] = f32::NAN,
        9 => x[cols - 1] = f32::INFINITY,
        _ => {}
    }
    (w, x)
}

/// The scan against the full head, on every instruction set, whatever the
/// numbers are.
#[test]
fn the_best_of_a_scan_are_the_best_of_all() {
    let team = Team::new(Some(2)).unwrap();
    let mut scratch = ScanScratch::default();
    for (rows, cols) in [(1, 3), (37, 20), (700, 64), (1500, 100)] {
        for kind in 0..=10 {
            let (w, x) = hard_case(kind, rows, cols, 40 + kind as u64);
            let other = values(cols, 60);
            let xs = [&x[..], &other, &x];
            for half in [false, true] {
                let data = if half {
                    let bits = |&v: &f32| Bf16(half::bf16::from_f32(v).to_bits());
                    Floats::Bf16(Arc::new(w.iter().map(bits).collect::<Vec<_>>()))
                } else {
                    Floats::F32(Arc::new(w.clone()))
                };
                let exact = DenseMatrix::new(rows, cols, data, Isa::GENERIC, &team).unwrap();
                let mut full = vec![0f32; 3 * rows];
                let mut parts: Vec<&mut [f32]> = full.chunks_mut(rows).collect();
                exact.multiply(Isa::GENERIC, 0..rows, &xs, &mut parts);
                for isa in Isa::available() {
                    let scan = ScanRows::new(&exact, isa, &team);
                    for k in [1, 2, 40, 300] {
                        let ks = [k, 1, 2 * k];
                        let found = team
                            .run(|| top_logits(&exact, &scan, isa, &team, &xs, &ks, &mut scratch))
                            .unwrap();
                        for (i, found) in found.iter().enumerate() {
                            let row = &full[i * rows..][..rows];
                            let mut ids: Vec<u32> = (0..rows as u32).collect();
                            let key = |id: u32| row[id as usize];
                            ids.sort_by(|&a, &b| {
                                (key(b).is_nan().cmp(&key(a).is_nan()))
                                    .then((key(b) + 0.0).total_cmp(&(key(a) + 0.0)))
                                    .then(a.cmp(&b))
                            });
                            ids.truncate(ks[i]);
                            ids.sort_unstable();
                            assert_eq!(found.ids, ids, "{rows} x {cols}, kind {kind}, best {k}");
                            for (&id, logit) in ids.iter().zip(&found.logits) {
                                assert_eq!(logit.to_bits(), key(id).to_bits());
                            }
                        }
                    }
                }
            }
        }
    }
}

/// More inputs than a row meets at once, and more columns than stay in a cache with them.
#[test]
fn a_scan_for_many_inputs_gives_what_each_gets_alone() {
    let team = Team::new(Some(2)).unwrap();
    let (rows, cols) = (530, 1400);
    let data = Floats::F32(Arc::new(values(rows * cols, 70)));
    let exact = DenseMatrix::new(rows, cols, data, Isa::GENERIC, &team).unwrap();
    let inputs: Vec<Vec<f32>> = (0..19).map(|i| values(cols, 80 + i)).collect();
    let xs: Vec<&[f32]> = inputs.iter().map(Vec::as_slice).collect();
    let mut full = vec![0f32; xs.len() * rows];
    let mut parts: Vec<&mut [f32]> = full.chunks_mut(rows).collect();
    exact.multiply(Isa::GENERIC, 0..rows, &xs, &mut parts);
    let best: Vec<usize> = full
        .chunks(rows)
        .map(|row| (0..rows).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap())
        .collect();
    for isa in Isa::available() {
        let scan = ScanRows::new(&exact, isa, &team);
        let mut scratch = ScanScratch::default();
        for n in [2, 5, 8, 9, 19] {
            let find =
                || top_logits(&exact, &scan, isa, &team, &xs[..n], &vec![1; n], &mut scratch);
            for (i, found) in team.run(find).unwrap().iter().enumerate() {
                assert!(found.rescored < rows, "no bounds");
                assert_eq!(found.ids, [best[i] as u32], "{n} inputs");
                assert_eq!(found.logits[0].to_bits(), full[i * rows + best[i]].to_bits());
            }
        }
    }
}

/// What makes it worth it: few rows of a wide head are candidates.
#[test]
fn a_scan_leaves_few_candidates() {
    let team = Team::new(Some(1)).unwrap();
    let (rows, cols) = (4096, 512);
    // About normal: sums of eight uniform numbers.
    let normal = |n: usize, seed: u64| -> Vec<f32> {
        let mut state = seed;
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f32 / (1u32 << 24) as f32 - 0.5
        };
        (0..n).map(|_| (0..8).map(|_| uniform()).sum()).collect()
    };
    let data = Floats::F32(Arc::new(normal(rows * cols, 1)));
    let exact = DenseMatrix::new(rows, cols, data, Isa::GENERIC, &team).unwrap();
    let scan = ScanRows::new(&exact, Isa::GENERIC, &team);
    let mut scratch = ScanScratch::default();
    for seed in 2..10 {
        let x = normal(cols, seed);
        let top = top_logits(&exact, &scan, Isa::GENERIC, &team, &[&x], &[1], &mut scratch);
        assert!(top[0].rescored < rows / 50, "{}", top[0].rescored);
    }
}
