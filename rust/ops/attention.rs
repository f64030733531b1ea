//! Attention of one token's query heads over one key/value head (grouped
//! heads, GQA). Prefill and decode call the same function, so they give the
//! same bits.
//!
//! The definition, for one query head:
//!
//! 1. A score is one chain of fused multiply-adds over `head_dim`, in order,
//!    times `1 / sqrt(head_dim)`. Lanes are keys, so the chain vectorizes.
//! 2. Keys are taken in blocks of [`KEY_BLOCK`] at multiples of it. A block
//!    gives its maximum `m`, its weights `p = e^(score - m)`, their sum (16
//!    interleaved lanes, then the tree) and, for each dimension, one chain of
//!    fused multiply-adds of `p * value` over its keys, in order.
//! 3. Blocks merge in order: with `m'` the larger maximum, both sides are
//!    rescaled by `e^(m - m')`, then added.
//! 4. The sum over values is multiplied by the reciprocal of the sum of weights.
//!
//! Blocks are independent until they merge, so they may also be computed by
//! different threads.

use super::exp::exp;
use super::lanes::{LaneOp, Lanes, dispatch};
use super::tree_sum;
use crate::cpu::Isa;
use crate::floats::LANES;
use crate::kv_cache::{HeadKv, KvCache, KvElement, PAGE, Storage};

/// Keys that share a softmax maximum: many enough that merging costs little,
/// few enough that scores and weights stay in L1. A page of the cache.
pub const KEY_BLOCK: usize = PAGE;

/// Query heads that share the loads of keys and values: four chains hide the
/// latency of a fused multiply-add.
const HEAD_TILE: usize = 4;

/// Attends with the query heads `q` (each `head_dim` long, already turned by
/// RoPE) that share key/value head `kv_head` of `layer`, to the first `n_keys`
/// positions of `cache`. `out` has the shape of `q`.
pub fn attend(
    isa: Isa,
    q: &[f32],
    cache: &KvCache,
    layer: usize,
    kv_head: usize,
    n_keys: usize,
    out: &mut [f32],
) {
    let shape = cache.shape();
    assert!(n_keys > 0 && n_keys <= cache.capacity() && q.len() == out.len());
    let index = layer * shape.n_kv_heads + kv_head;
    let head_dim = shape.head_dim;
    match cache.storage() {
        Storage::F16(heads) => {
            dispatch(isa, Attend { q, kv: &heads[index], head_dim, n_keys, out });
        }
        Storage::F32(heads) => {
            dispatch(isa, Attend { q, kv: &heads[index], head_dim, n_keys, out });
        }
    }
}

struct Attend<'a, E> {
    q: &'a [f32],
    kv: &'a HeadKv<E>,
    head_dim: usize,
    n_keys: usize,
    out: &'a mut [f32],
}

impl<E: KvElement> LaneOp for Attend<'_, E> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { q, kv, head_dim, n_keys, out } = self;
        let tile = HEAD_TILE * head_dim;
        let tiles = q.len() / tile * tile;
        for (q, out) in q[..tiles].chunks_exact(tile).zip(out[..tiles].chunks_exact_mut(tile)) {
            attend_tile::<HEAD_TILE, E, L>(lanes, q, kv, head_dim, n_keys, out);
        }
        let rest = q[tiles..].chunks_exact(head_dim).zip(out[tiles..].chunks_exact_mut(head_dim));
        for (q, out) in rest {
            attend_tile::<1, E, L>(lanes, q, kv, head_dim, n_keys, out);
        }
    }
}

/// `H` query heads at once.
#[inline(always)]
fn attend_tile<const H: usize, E: KvElement, L: Lanes>(
    lanes: L,
    q: &[f32],
    kv: &HeadKv<E>,
    head_dim: usize,
    n_keys: usize,
    out: &mut [f32],
) {
    // Rounded once, from float64, as transformers' `head_dim**-0.5`.
    let scale = (1.0 / (head_dim as f64).sqrt()) as f32;
    let width = head_dim.div_ceil(LANES);
    let mut max = [0f32; H];
    let mut sum = [0f32; H];
    let mut p = [[[0f32; LANES]; KEY_BLOCK / LANES]; H];
    for (b, first) in (0..n_keys).step_by(KEY_BLOCK).enumerate() {
        let n = KEY_BLOCK.min(n_keys - first);
        let page = kv.page(b);
        scores(lanes, q, &page.keys, head_dim, n, scale, &mut p);
        // What the block adds to: its own maximum if it is the first.
        let mut keep = [0f32; H];
        let mut gain = [1f32; H];
        for h in 0..H {
            let (block_max, block_sum) = weights(&mut p[h], n);
            if b == 0 {
                (max[h], sum[h]) = (block_max, block_sum);
            } else {
                let new = if block_max > max[h] { block_max } else { max[h] };
                (keep[h], gain[h]) = (exp(max[h] - new), exp(block_max - new));
                sum[h] = sum[h].mul_add(keep[h], block_sum * gain[h]);
                max[h] = new;
            }
        }
        for c in 0..width {
            let acc = weighted_values(lanes, &p, &page.values[c..], width, n);
            let dims = LANES.min(head_dim - c * LANES);
            for h in 0..H {
                let out = &mut out[h * head_dim + c * LANES..][..dims];
                for (o, &a) in out.iter_mut().zip(&acc[h]) {
                    *o = if b == 0 { a } else { o.mul_add(keep[h], a * gain[h]) };
                }
            }
        }
    }
    for (out, sum) in out.chunks_exact_mut(head_dim).zip(sum) {
        let inverse = 1.0 / sum;
        for o in out {
            *o *= inverse;
        }
    }
}

/// Scaled scores of `n` keys, 16 at a time; lanes past `n` hold leftovers.
#[inline(always)]
fn scores<const H: usize, E: KvElement, L: Lanes>(
    l: L,
    q: &[f32],
    keys: &[[E; LANES]],
    head_dim: usize,
    n: usize,
    scale: f32,
    p: &mut [[[f32; LANES]; KEY_BLOCK / LANES]; H],
) {
    let q: [&[f32]; H] = std::array::from_fn(|h| &q[h * head_dim..][..head_dim]);
    for (g, keys) in keys.chunks_exact(head_dim).take(n.div_ceil(LANES)).enumerate() {
        let mut acc = [l.splat(0.0); H];
        for (d, k) in keys.iter().enumerate() {
            let k = E::load(l, k);
            for h in 0..H {
                acc[h] = l.fma(k, l.splat(q[h][d]), acc[h]);
            }
        }
        for h in 0..H {
            p[h][g] = l.to_array(acc[h]).map(|s| s * scale);
        }
    }
}

/// Turns the scores of a block into weights; their maximum and sum.
#[inline(always)]
fn weights(p: &mut [[f32; LANES]; KEY_BLOCK / LANES], n: usize) -> (f32, f32) {
    let mut maxima = [f32::NEG_INFINITY; LANES];
    for (g, p) in p.iter().take(n.div_ceil(LANES)).enumerate() {
        for i in 0..LANES {
            maxima[i] = if g * LANES + i < n && p[i] > maxima[i] { p[i] } else { maxima[i] };
        }
    }
    let max = maxima.iter().fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m });
    let mut lanes = [0f32; LANES];
    for (g, p) in p.iter_mut().take(n.div_ceil(LANES)).enumerate() {
        for i in 0..LANES {
            p[i] = if g * LANES + i < n { exp(p[i] - max) } else { 0.0 };
            lanes[i] += p[i];
        }
    }
    (max, tree_sum(lanes))
}

/// `sum_j p[j] * values[j]` over `n` keys, for 16 dimensions.
#[inline(always)]
fn weighted_values<const H: usize, E: KvElement, L: Lanes>(
    l: L,
    p: &[[[f32; LANES]; KEY_BLOCK / LANES]; H],
    values: &[[E; LANES]],
    width: usize,
    n: usize,
) -> [[f32; LANES]; H] {
    let p: [&[f32]; H] = std::array::from_fn(|h| &p[h].as_flattened()[..n]);
    let mut acc = [l.splat(0.0); H];
    for (j, v) in values.iter().step_by(width).take(n).enumerate() {
        let v = E::load(l, v);
        for h in 0..H {
            acc[h] = l.fma(v, l.splat(p[h][j]), acc[h]);
        }
    }
    acc.map(|v| l.to_array(v))
}
