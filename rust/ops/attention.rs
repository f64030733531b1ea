//! Attention of one token's query heads over one key/value head (grouped
//! heads, GQA), and the definition of it. Of several tokens `attention_rows.rs`
//! computes the same, bit for bit.
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
use crate::kv_cache::{KvCache, KvElement, PAGE, Page, Pages, STRIP, Storage, Strip};
use crate::memory::Plain;

/// Keys that share a softmax maximum: many enough that merging costs little,
/// few enough that scores and weights stay in L1. A page of the cache.
pub const KEY_BLOCK: usize = PAGE;

/// Strips ahead of the one in use that are asked for: keys and values are in no
/// cache when their layer's turn comes. In float16 a kibibyte, as in the scan of
/// the head (`head.rs`); over 1024 keys from memory, one thread of a Zen 3 took 7.3
/// ms a token with 16 or 32, 8.7 with 192.
const AHEAD: usize = 16;

/// Query heads that share the loads of keys and values, where there are so many; else two.
/// A strip (32 keys, or 32 dimensions) is then 8 or 4 chains of multiply-adds; a head that
/// stands alone takes two strips, for 4: enough to hide their latency.
const HEAD_TILE: usize = 4;

/// The keys that query heads attend to: of the first `n_keys` positions of one
/// key/value head of one layer, the last `window`.
#[derive(Clone, Copy)]
pub struct Keys<'a> {
    /// Where they are.
    pub cache: &'a KvCache,
    /// Of which layer.
    pub layer: usize,
    /// Of which key/value head.
    pub kv_head: usize,
    /// Positions up to the token's own, at least one.
    pub n_keys: usize,
    /// How many of them are seen, at least one: [`ALL`] for all.
    pub window: usize,
}

/// No window.
pub const ALL: usize = usize::MAX;

impl Keys<'_> {
    /// Blocks of keys, the first and the last of them perhaps not full.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.n_keys.div_ceil(KEY_BLOCK) - self.first() / KEY_BLOCK
    }

    /// The first key that is seen.
    pub(super) fn first(&self) -> usize {
        self.n_keys.saturating_sub(self.window)
    }
}

/// Numbers that a block gives for each query head: its maximum, its sum of
/// weights, and `head_dim` sums over values.
#[must_use]
pub fn block_width(head_dim: usize) -> usize {
    2 + head_dim
}

/// Attends with the query heads `q` (each `head_dim` long, already turned by
/// RoPE) that share a key/value head. `out` has the shape of `q`; `parts` is a
/// buffer.
pub fn attend(isa: Isa, q: &[f32], keys: Keys<'_>, parts: &mut Vec<f32>, out: &mut [f32]) {
    let head_dim = keys.cache.shape().head_dim;
    parts.resize(keys.blocks() * q.len() / head_dim * block_width(head_dim), 0.0);
    attend_blocks(isa, q, keys, 0..keys.blocks(), parts);
    merge_blocks(isa, parts, head_dim, out);
}

/// The blocks `blocks`, counted from the first that is seen, by themselves: `parts` is `[block][query head][block_width]`.
pub fn attend_blocks(isa: Isa, q: &[f32], keys: Keys<'_>, blocks: Range<usize>, parts: &mut [f32]) {
    let Keys { cache, layer, kv_head, n_keys, window } = keys;
    let shape = cache.shape();
    let head_dim = shape.head_dim;
    assert!(n_keys > 0 && n_keys <= cache.capacity() && blocks.end <= keys.blocks());
    assert!(window > 0, "a window of no keys");
    let seen = keys.first()..n_keys;
    let start = seen.start / KEY_BLOCK;
    let blocks = start + blocks.start..start + blocks.end;
    assert_eq!(parts.len(), blocks.len() * q.len() / head_dim * block_width(head_dim), "parts");
    let kv_head = layer * shape.n_kv_heads + kv_head;
    match cache.storage() {
        Storage::F16(pages) => {
            dispatch(isa, Attend { q, pages, kv_head, head_dim, seen, blocks, parts });
        }
        Storage::F32(pages) => {
            dispatch(isa, Attend { q, pages, kv_head, head_dim, seen, blocks, parts });
        }
    }
}

/// What [`attend`] gives, from all blocks' parts. `out` is `[query head][head_dim]`.
pub fn merge_blocks(isa: Isa, parts: &[f32], head_dim: usize, out: &mut [f32]) {
    let width = block_width(head_dim);
    let block = out.len() / head_dim * width;
    isa.vectorize(
        #[inline(always)]
        || {
            for (h, out) in out.chunks_exact_mut(head_dim).enumerate() {
                let (mut max, mut sum) = (0.0, 0.0);
                for (b, parts) in parts.chunks_exact(block).enumerate() {
                    let part = &parts[h * width..][..width];
                    merge(b == 0, &mut max, &mut sum, out, part);
                }
                let inverse = 1.0 / sum;
                for o in out {
                    *o *= inverse;
                }
            }
        },
    );
}

/// Adds one head's block to the blocks before it: their maximum, sum of weights
/// and sums over values.
#[inline(always)]
pub(super) fn merge(first: bool, max: &mut f32, sum: &mut f32, out: &mut [f32], part: &[f32]) {
    let (block_max, block_sum, values) = (part[0], part[1], &part[2..]);
    if first {
        (*max, *sum) = (block_max, block_sum);
        out.copy_from_slice(values);
        return;
    }
    let new = if block_max > *max { block_max } else { *max };
    let (keep, gain) = (exp(*max - new), exp(block_max - new));
    *sum = sum.mul_add(keep, block_sum * gain);
    *max = new;
    for (o, &a) in out.iter_mut().zip(values) {
        *o = o.mul_add(keep, a * gain);
    }
}

struct Attend<'a, E> {
    q: &'a [f32],
    pages: &'a Pages<E>,
    /// Counted over all layers.
    kv_head: usize,
    head_dim: usize,
    /// Keys.
    seen: Range<usize>,
    blocks: Range<usize>,
    parts: &'a mut [f32],
}

impl<E: KvElement> LaneOp for Attend<'_, E>
where
    Strip<E>: Plain,
{
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { q, pages, kv_head, head_dim, seen, blocks, parts } = self;
        let width = block_width(head_dim);
        let heads = q.len() / head_dim;
        for (parts, b) in parts.chunks_exact_mut(heads * width).zip(blocks) {
            let n = KEY_BLOCK.min(seen.end - b * KEY_BLOCK);
            let n = seen.start.saturating_sub(b * KEY_BLOCK)..n;
            let page = pages.page(kv_head, b);
            let mut at = 0;
            while at < heads {
                let (q, parts) = (&q[at * head_dim..], &mut parts[at * width..]);
                let n = n.clone();
                at += match heads - at {
                    HEAD_TILE.. => block::<HEAD_TILE, 1, E, L>(lanes, q, page, head_dim, n, parts),
                    2.. => block::<2, 1, E, L>(lanes, q, page, head_dim, n, parts),
                    _ => block::<1, 2, E, L>(lanes, q, page, head_dim, n, parts),
                };
            }
        }
    }
}

/// What scores are multiplied by: rounded once, from float64, as transformers'
/// `head_dim**-0.5`.
pub(super) fn score_scale(head_dim: usize) -> f32 {
    (1.0 / (head_dim as f64).sqrt()) as f32
}

/// The keys `seen` of one block for the first `H` query heads, `S` groups of strips at once;
/// returns `H`.
/// Sums run over those before them, too, whose weight is zero: that leaves a sum that is
/// zero what it is.
// Closures say `#[inline(always)]`: one that is not inlined is compiled for no
// instruction set.
#[inline(always)]
fn block<const H: usize, const S: usize, E: KvElement, L: Lanes>(
    l: L,
    q: &[f32],
    page: Page<'_, E>,
    head_dim: usize,
    seen: Range<usize>,
    parts: &mut [f32],
) -> usize {
    let n = seen.end;
    let width = block_width(head_dim);
    let scale = score_scale(head_dim);
    let mut p = [[[0f32; LANES]; KEY_BLOCK / LANES]; H];
    scores::<H, S, E, L>(l, q, page.keys, head_dim, n, scale, &mut p);
    for h in 0..H {
        (parts[h * width], parts[h * width + 1]) = weights(&mut p[h], seen.clone());
    }
    let p: [&[f32]; H] = std::array::from_fn(|h| &p[h].as_flattened()[..n]);
    let groups = head_dim.div_ceil(STRIP);
    let mut g = 0;
    while g + S <= groups {
        strip_sums::<H, S, E, L>(
            l,
            p,
            &page.values[g * PAGE..],
            PAGE,
            #[inline(always)]
            |s, half, tile| put_values(l, (g + s) * STRIP + half * LANES, tile, head_dim, parts),
        );
        g += S;
    }
    while g < groups {
        strip_sums::<H, 1, E, L>(
            l,
            p,
            &page.values[g * PAGE..],
            PAGE,
            #[inline(always)]
            |_, half, tile| put_values(l, g * STRIP + half * LANES, tile, head_dim, parts),
        );
        g += 1;
    }
    H
}

/// Puts the lanes of `tile` that are dimensions, from `first` on, to each head's
/// part.
#[inline(always)]
fn put_values<const H: usize, L: Lanes>(
    l: L,
    first: usize,
    tile: [L::V; H],
    head_dim: usize,
    parts: &mut [f32],
) {
    let dims = LANES.min(head_dim.saturating_sub(first));
    for h in 0..H {
        let values = &l.to_array(tile[h])[..dims];
        parts[h * block_width(head_dim) + 2 + first.min(head_dim)..][..dims]
            .copy_from_slice(values);
    }
}

/// Whether the accumulators of `H` heads for both halves of a strip fit the
/// registers. AVX2 has 16, where four heads would need them all for 16 chains and
/// spill: one half after the other is 6 times as fast there.
#[inline(always)]
fn both_halves<const H: usize, L: Lanes>() -> bool {
    H * 2 * L::REGISTERS <= 8
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
        strip_sums::<H, S, E, L>(
            l,
            q,
            &keys[g * head_dim..],
            head_dim,
            #[inline(always)]
            |s, half, tile| put_scores(l, 2 * (g + s) + half, tile, scale, p),
        );
        g += S;
    }
    while g < groups {
        strip_sums::<H, 1, E, L>(
            l,
            q,
            &keys[g * head_dim..],
            head_dim,
            #[inline(always)]
            |_, half, tile| put_scores(l, 2 * g + half, tile, scale, p),
        );
        g += 1;
    }
}

/// Scales the scores of sixteen keys, the `i`-th sixteen of a block.
#[inline(always)]
fn put_scores<const H: usize, L: Lanes>(
    l: L,
    i: usize,
    tile: [L::V; H],
    scale: f32,
    p: &mut [[[f32; LANES]; KEY_BLOCK / LANES]; H],
) {
    for h in 0..H {
        p[h][i] = l.to_array(tile[h]).map(|x| x * scale);
    }
}

/// For `S` groups of strips that begin every `stride` strips, and the `H`
/// factors of each strip of a group: calls `put(group, half, sums)` with the sums
/// of factor times strip.
///
/// Scores are such sums over dimensions (the factors are queries), and so are
/// weighted values, over keys (the factors are weights).
#[inline(always)]
fn strip_sums<const H: usize, const S: usize, E: KvElement, L: Lanes>(
    l: L,
    factors: [&[f32]; H],
    strips: &[Strip<E>],
    stride: usize,
    mut put: impl FnMut(usize, usize, [L::V; H]),
) {
    let n = factors[0].len();
    let strips: [&[Strip<E>]; S] = std::array::from_fn(|s| &strips[s * stride..][..n]);
    if both_halves::<H, L>() {
        let acc = sums_of::<H, S, 2, E, L>(l, factors, strips, 0);
        for s in 0..S {
            put(s, 0, acc[s][0]);
            put(s, 1, acc[s][1]);
        }
    } else {
        for half in 0..2 {
            let acc = sums_of::<H, S, 1, E, L>(l, factors, strips, half);
            for s in 0..S {
                put(s, half, acc[s][0]);
            }
        }
    }
}

/// The sums of `N` halves from `first` on. Nothing else is in this function, so
/// that the sums stay in registers.
#[inline(always)]
fn sums_of<const H: usize, const S: usize, const N: usize, E: KvElement, L: Lanes>(
    l: L,
    factors: [&[f32]; H],
    strips: [&[Strip<E>]; S],
    first: usize,
) -> [[[L::V; H]; N]; S] {
    let n = factors[0].len();
    let factors = factors.map(|f| &f[..n]);
    let strips = strips.map(|s| &s[..n]);
    let mut acc = [[[l.splat(0.0); H]; N]; S];
    for i in 0..n {
        let mut f = [l.splat(0.0); H];
        for h in 0..H {
            f[h] = l.splat(factors[h][i]);
        }
        for s in 0..S {
            if first == 0 {
                l.prefetch(strips[s].as_ptr().wrapping_add(i + AHEAD));
            }
            for half in 0..N {
                let x = E::load(l, &strips[s][i].0[first + half]);
                for h in 0..H {
                    acc[s][half][h] = l.fma(x, f[h], acc[s][half][h]);
                }
            }
        }
    }
    acc
}

/// Turns the scores of a block, of which some keys are seen, into weights; their maximum
/// and sum.
#[inline(always)]
pub(super) fn weights(p: &mut [[f32; LANES]; KEY_BLOCK / LANES], seen: Range<usize>) -> (f32, f32) {
    let p = &mut p[..seen.end.div_ceil(LANES)];
    // The rest weighs nothing: e to the minus infinity is 0.
    p.as_flattened_mut()[..seen.start].fill(f32::NEG_INFINITY);
    p.as_flattened_mut()[seen.end..].fill(f32::NEG_INFINITY);
    let mut maxima = [f32::NEG_INFINITY; LANES];
    for p in p.iter() {
        for i in 0..LANES {
            maxima[i] = if p[i] > maxima[i] { p[i] } else { maxima[i] };
        }
    }
    let max = maxima.iter().fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m });
    let mut lanes = [0f32; LANES];
    for p in p.iter_mut() {
        for i in 0..LANES {
            p[i] = exp(p[i] - max);
            lanes[i] += p[i];
        }
    }
    (max, tree_sum(lanes))
}
