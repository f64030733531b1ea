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
use crate::kv_cache::{HeadKv, KvCache, KvElement, PAGE, STRIP, Storage, Strip};

/// Keys that share a softmax maximum: many enough that merging costs little,
/// few enough that scores and weights stay in L1. A page of the cache.
pub const KEY_BLOCK: usize = PAGE;

/// Query heads that share the loads of keys and values. With the two registers
/// of a strip (32 keys, or 32 dimensions) there are 8 chains of multiply-adds;
/// a head that stands alone takes two strips, for 4: enough to hide their
/// latency.
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
            attend_tile::<HEAD_TILE, 1, E, L>(lanes, q, kv, head_dim, n_keys, out);
        }
        let rest = q[tiles..].chunks_exact(head_dim).zip(out[tiles..].chunks_exact_mut(head_dim));
        for (q, out) in rest {
            attend_tile::<1, 2, E, L>(lanes, q, kv, head_dim, n_keys, out);
        }
    }
}

/// `H` query heads and `S` strips at once.
#[inline(always)]
fn attend_tile<const H: usize, const S: usize, E: KvElement, L: Lanes>(
    lanes: L,
    q: &[f32],
    kv: &HeadKv<E>,
    head_dim: usize,
    n_keys: usize,
    out: &mut [f32],
) {
    // Rounded once, from float64, as transformers' `head_dim**-0.5`.
    let scale = (1.0 / (head_dim as f64).sqrt()) as f32;
    let mut max = [0f32; H];
    let mut sum = [0f32; H];
    let mut p = [[[0f32; LANES]; KEY_BLOCK / LANES]; H];
    for (b, first) in (0..n_keys).step_by(KEY_BLOCK).enumerate() {
        let n = KEY_BLOCK.min(n_keys - first);
        let page = kv.page(b);
        scores::<H, S, E, L>(lanes, q, &page.keys, head_dim, n, scale, &mut p);
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
        let p: [&[f32]; H] = std::array::from_fn(|h| &p[h].as_flattened()[..n]);
        let groups = head_dim.div_ceil(STRIP);
        let mut g = 0;
        while g + S <= groups {
            let tiles = weighted_values::<H, S, E, L>(lanes, p, &page.values[g * PAGE..]);
            for (i, acc) in tiles.iter().enumerate() {
                merge(out, acc, head_dim, g + i, b == 0, keep, gain);
            }
            g += S;
        }
        while g < groups {
            let [acc] = weighted_values::<H, 1, E, L>(lanes, p, &page.values[g * PAGE..]);
            merge(out, &acc, head_dim, g, b == 0, keep, gain);
            g += 1;
        }
    }
    for (out, sum) in out.chunks_exact_mut(head_dim).zip(sum) {
        let inverse = 1.0 / sum;
        for o in out {
            *o *= inverse;
        }
    }
}

/// Adds a block's sums over values, for the dimensions of group `g`.
#[inline(always)]
fn merge<const H: usize>(
    out: &mut [f32],
    acc: &[[[f32; LANES]; 2]; H],
    head_dim: usize,
    g: usize,
    first: bool,
    keep: [f32; H],
    gain: [f32; H],
) {
    let dims = STRIP.min(head_dim - g * STRIP);
    for h in 0..H {
        let out = &mut out[h * head_dim + g * STRIP..][..dims];
        for (o, &a) in out.iter_mut().zip(acc[h].as_flattened()) {
            *o = if first { a } else { o.mul_add(keep[h], a * gain[h]) };
        }
    }
}

/// Scaled scores of `n` keys, 32 at a time; lanes past `n` hold leftovers.
#[inline(always)]
fn scores<const H: usize, const S: usize, E: KvElement, L: Lanes>(
    l: L,
    q: &[f32],
    keys: &[Strip<E>],
    head_dim: usize,
    n: usize,
    scale: f32,
    p: &mut [[[f32; LANES]; KEY_BLOCK / LANES]; H],
) {
    let q: [&[f32]; H] = std::array::from_fn(|h| &q[h * head_dim..][..head_dim]);
    let groups = n.div_ceil(STRIP);
    let mut g = 0;
    while g + S <= groups {
        let tiles = dots::<H, S, E, L>(l, q, &keys[g * head_dim..], head_dim);
        for s in 0..S {
            for h in 0..H {
                for i in 0..2 {
                    p[h][2 * (g + s) + i] = l.to_array(tiles[s][h][i]).map(|x| x * scale);
                }
            }
        }
        g += S;
    }
    while g < groups {
        let [tile] = dots::<H, 1, E, L>(l, q, &keys[g * head_dim..], head_dim);
        for h in 0..H {
            for i in 0..2 {
                p[h][2 * g + i] = l.to_array(tile[h][i]).map(|x| x * scale);
            }
        }
        g += 1;
    }
}

/// Dot products of `H` queries with `S` groups of 32 keys.
#[inline(always)]
fn dots<const H: usize, const S: usize, E: KvElement, L: Lanes>(
    l: L,
    q: [&[f32]; H],
    keys: &[Strip<E>],
    head_dim: usize,
) -> [[[L::V; 2]; H]; S] {
    let keys: [&[Strip<E>]; S] = std::array::from_fn(|s| &keys[s * head_dim..(s + 1) * head_dim]);
    let mut acc = [[[l.splat(0.0); 2]; H]; S];
    for d in 0..head_dim {
        let q: [L::V; H] = std::array::from_fn(|h| l.splat(q[h][d]));
        for s in 0..S {
            let [low, high] = &keys[s][d].0;
            let (low, high) = (E::load(l, low), E::load(l, high));
            for h in 0..H {
                acc[s][h][0] = l.fma(low, q[h], acc[s][h][0]);
                acc[s][h][1] = l.fma(high, q[h], acc[s][h][1]);
            }
        }
    }
    acc
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

/// `sum_j p[j] * values[j]` for `S` groups of 32 dimensions.
#[inline(always)]
fn weighted_values<const H: usize, const S: usize, E: KvElement, L: Lanes>(
    l: L,
    p: [&[f32]; H],
    values: &[Strip<E>],
) -> [[[[f32; LANES]; 2]; H]; S] {
    let n = p[0].len();
    let values: [&[Strip<E>]; S] = std::array::from_fn(|s| &values[s * PAGE..][..n]);
    let mut acc = [[[l.splat(0.0); 2]; H]; S];
    for j in 0..n {
        let p: [L::V; H] = std::array::from_fn(|h| l.splat(p[h][j]));
        for s in 0..S {
            let [low, high] = &values[s][j].0;
            let (low, high) = (E::load(l, low), E::load(l, high));
            for h in 0..H {
                acc[s][h][0] = l.fma(low, p[h], acc[s][h][0]);
                acc[s][h][1] = l.fma(high, p[h], acc[s][h][1]);
            }
        }
    }
    acc.map(|heads| heads.map(|pair| pair.map(|v| l.to_array(v))))
}
