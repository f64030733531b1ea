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
//! Blocks are independent until they merge, so threads may share the blocks of
//! a long context ([`attend_blocks`], then [`merge_blocks`]) where there are
//! fewer heads than they need.

use std::ops::Range;

use super::exp::exp;
use super::lanes::{LaneOp, Lanes, dispatch};
use super::tree_sum;
use crate::cpu::Isa;
use crate::floats::LANES;
use crate::kv_cache::{HeadKv, KvCache, KvElement, PAGE, Page, STRIP, Storage, Strip};

/// Keys that share a softmax maximum: many enough that merging costs little,
/// few enough that scores and weights stay in L1. A page of the cache.
pub const KEY_BLOCK: usize = PAGE;

/// Query heads that share the loads of keys and values. With the two registers
/// of a strip (32 keys, or 32 dimensions) there are 8 chains of multiply-adds;
/// a head that stands alone takes two strips, for 4: enough to hide their
/// latency.
const HEAD_TILE: usize = 4;

/// The keys that query heads attend to: the first `n_keys` positions of one
/// key/value head of one layer.
#[derive(Clone, Copy)]
pub struct Keys<'a> {
    /// Where they are.
    pub cache: &'a KvCache,
    /// Of which layer.
    pub layer: usize,
    /// Of which key/value head.
    pub kv_head: usize,
    /// How many of them, at least one.
    pub n_keys: usize,
}

impl Keys<'_> {
    /// Blocks of keys, the last of them perhaps not full.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.n_keys.div_ceil(KEY_BLOCK)
    }
}

/// Attends with the query heads `q` (each `head_dim` long, already turned by
/// RoPE) that share a key/value head. `out` has the shape of `q`.
pub fn attend(isa: Isa, q: &[f32], keys: Keys<'_>, out: &mut [f32]) {
    assert_eq!(q.len(), out.len(), "lengths differ");
    run(isa, q, keys, 0..keys.blocks(), Output::Attended(out));
}

/// Numbers that a block gives for each query head: its maximum, its sum of
/// weights, and `head_dim` sums over values.
#[must_use]
pub fn block_width(head_dim: usize) -> usize {
    2 + head_dim
}

/// The blocks `blocks` by themselves: `parts` is `[block][query head][block_width]`.
pub fn attend_blocks(isa: Isa, q: &[f32], keys: Keys<'_>, blocks: Range<usize>, parts: &mut [f32]) {
    let head_dim = keys.cache.shape().head_dim;
    assert_eq!(parts.len(), blocks.len() * q.len() / head_dim * block_width(head_dim), "parts");
    run(isa, q, keys, blocks, Output::Parts(parts));
}

/// What [`attend`] gives, from all blocks' parts. `out` is `[query head][head_dim]`.
pub fn merge_blocks(isa: Isa, parts: &[f32], head_dim: usize, out: &mut [f32]) {
    let width = block_width(head_dim);
    let block = out.len() / head_dim * width;
    isa.vectorize(
        #[inline(always)]
        || {
            for (h, out) in out.chunks_exact_mut(head_dim).enumerate() {
                let mut merged = Merged::default();
                for (b, parts) in parts.chunks_exact(block).enumerate() {
                    let part = &parts[h * width..][..width];
                    merged.add(b == 0, [part[0], part[1]]).merge(out, &part[2..]);
                }
                merged.finish(out);
            }
        },
    );
}

fn run(isa: Isa, q: &[f32], keys: Keys<'_>, blocks: Range<usize>, output: Output<'_>) {
    let Keys { cache, layer, kv_head, n_keys } = keys;
    let shape = cache.shape();
    assert!(n_keys > 0 && n_keys <= cache.capacity() && blocks.end <= keys.blocks());
    let index = layer * shape.n_kv_heads + kv_head;
    let head_dim = shape.head_dim;
    match cache.storage() {
        Storage::F16(heads) => {
            let kv = &heads[index];
            dispatch(isa, Attend { q, kv, head_dim, n_keys, blocks, output });
        }
        Storage::F32(heads) => {
            let kv = &heads[index];
            dispatch(isa, Attend { q, kv, head_dim, n_keys, blocks, output });
        }
    }
}

enum Output<'a> {
    /// All blocks, merged.
    Attended(&'a mut [f32]),
    /// Each block by itself.
    Parts(&'a mut [f32]),
}

struct Attend<'a, E> {
    q: &'a [f32],
    kv: &'a HeadKv<E>,
    head_dim: usize,
    n_keys: usize,
    blocks: Range<usize>,
    output: Output<'a>,
}

impl<E: KvElement> LaneOp for Attend<'_, E> {
    #[inline(always)]
    fn run<L: Lanes>(mut self, lanes: L) {
        let tile = HEAD_TILE * self.head_dim;
        let tiles = self.q.len() / tile * tile;
        for at in (0..tiles).step_by(tile) {
            self.tile::<HEAD_TILE, 1, L>(lanes, at);
        }
        for at in (tiles..self.q.len()).step_by(self.head_dim) {
            self.tile::<1, 2, L>(lanes, at);
        }
    }
}

impl<E: KvElement> Attend<'_, E> {
    /// The `H` query heads from element `at` of `q` on, `S` strips at once.
    #[inline(always)]
    fn tile<const H: usize, const S: usize, L: Lanes>(&mut self, lanes: L, at: usize) {
        let (head_dim, width) = (self.head_dim, block_width(self.head_dim));
        let q = &self.q[at..][..H * head_dim];
        let heads = self.q.len() / head_dim;
        let mut merged = [Merged::default(); H];
        let mut p = [[[0f32; LANES]; KEY_BLOCK / LANES]; H];
        for (i, b) in self.blocks.clone().enumerate() {
            let n = KEY_BLOCK.min(self.n_keys - b * KEY_BLOCK);
            let page = self.kv.page(b);
            let blocks = block_weights::<H, S, E, L>(lanes, q, page, head_dim, n, &mut p);
            let p: [&[f32]; H] = std::array::from_fn(|h| &p[h].as_flattened()[..n]);
            match &mut self.output {
                Output::Parts(parts) => {
                    let parts = &mut parts[(i * heads + at / head_dim) * width..][..H * width];
                    for (part, block) in parts.chunks_exact_mut(width).zip(blocks) {
                        part[..2].copy_from_slice(&block);
                    }
                    block_values::<H, S, E, L>(lanes, p, page, head_dim, |h, d, values| {
                        parts[h * width + 2 + d..][..values.len()].copy_from_slice(values);
                    });
                }
                Output::Attended(out) => {
                    let factors: [Factors; H] =
                        std::array::from_fn(|h| merged[h].add(b == 0, blocks[h]));
                    block_values::<H, S, E, L>(lanes, p, page, head_dim, |h, d, values| {
                        let out = &mut out[at + h * head_dim + d..][..values.len()];
                        factors[h].merge(out, values);
                    });
                }
            }
        }
        if let Output::Attended(out) = &mut self.output {
            for h in 0..H {
                merged[h].finish(&mut out[at + h * head_dim..][..head_dim]);
            }
        }
    }
}

/// Maximum and sum of weights of the blocks so far.
#[derive(Clone, Copy, Default)]
struct Merged {
    max: f32,
    sum: f32,
}

/// What the values so far, and a block's, are multiplied by. None: the block is
/// the first.
#[derive(Clone, Copy)]
struct Factors(Option<(f32, f32)>);

impl Merged {
    #[inline(always)]
    fn add(&mut self, first: bool, [block_max, block_sum]: [f32; 2]) -> Factors {
        if first {
            *self = Self { max: block_max, sum: block_sum };
            return Factors(None);
        }
        let new = if block_max > self.max { block_max } else { self.max };
        let (keep, gain) = (exp(self.max - new), exp(block_max - new));
        self.sum = self.sum.mul_add(keep, block_sum * gain);
        self.max = new;
        Factors(Some((keep, gain)))
    }

    /// Sums over values to their mean.
    #[inline(always)]
    fn finish(self, out: &mut [f32]) {
        let inverse = 1.0 / self.sum;
        for o in out {
            *o *= inverse;
        }
    }
}

impl Factors {
    #[inline(always)]
    fn merge(self, out: &mut [f32], values: &[f32]) {
        match self.0 {
            None => out.copy_from_slice(values),
            Some((keep, gain)) => {
                for (o, &a) in out.iter_mut().zip(values) {
                    *o = o.mul_add(keep, a * gain);
                }
            }
        }
    }
}

/// The weights of one block's `n` keys for `H` heads, to `p`; each head's
/// maximum and sum.
#[inline(always)]
fn block_weights<const H: usize, const S: usize, E: KvElement, L: Lanes>(
    lanes: L,
    q: &[f32],
    page: &Page<E>,
    head_dim: usize,
    n: usize,
    p: &mut [[[f32; LANES]; KEY_BLOCK / LANES]; H],
) -> [[f32; 2]; H] {
    // Rounded once, from float64, as transformers' `head_dim**-0.5`.
    let scale = (1.0 / (head_dim as f64).sqrt()) as f32;
    scores::<H, S, E, L>(lanes, q, &page.keys, head_dim, n, scale, p);
    std::array::from_fn(|h| {
        let (max, sum) = weights(&mut p[h], n);
        [max, sum]
    })
}

/// The weighted values of one block: calls `put(head, first dimension, values)`.
#[inline(always)]
fn block_values<const H: usize, const S: usize, E: KvElement, L: Lanes>(
    lanes: L,
    p: [&[f32]; H],
    page: &Page<E>,
    head_dim: usize,
    mut put: impl FnMut(usize, usize, &[f32]),
) {
    let groups = head_dim.div_ceil(STRIP);
    let mut put_group = |acc: &[[[f32; LANES]; 2]; H], g: usize| {
        let dims = STRIP.min(head_dim - g * STRIP);
        for h in 0..H {
            put(h, g * STRIP, &acc[h].as_flattened()[..dims]);
        }
    };
    let mut g = 0;
    while g + S <= groups {
        let tiles = weighted_values::<H, S, E, L>(lanes, p, &page.values[g * PAGE..]);
        for (i, acc) in tiles.iter().enumerate() {
            put_group(acc, g + i);
        }
        g += S;
    }
    while g < groups {
        let [acc] = weighted_values::<H, 1, E, L>(lanes, p, &page.values[g * PAGE..]);
        put_group(&acc, g);
        g += 1;
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
