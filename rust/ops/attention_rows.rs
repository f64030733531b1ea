//! Attention of several consecutive tokens, as prefill has them: the definition
//! of `attention.rs`, bit for bit, with keys and values loaded once for a tile of
//! queries instead of once for each token. Apart because nothing but the
//! definition and three of its functions is shared.
//!
//! A query is one query head of one token. For a block of keys:
//!
//! ```text
//! for strips of 32 keys                      8 KB in float16: stay in L1
//!   for six queries: their scores            12 sums of 8 lanes with AVX2
//! for queries: weights, maximum and sum
//! for strips of 32 dimensions                8 KB
//!   for six queries: sums over the keys that all tokens see
//!   for queries: the keys that only later tokens see, one after the other
//! merge the block
//! ```
//!
//! The keys a token must not see have scores, too, which `weights` drops as it
//! drops those of a block that is not full; over values no chain is longer than
//! in the definition.

use super::attention::{KEY_BLOCK, Keys, block_width, merge, score_scale, weights};
use super::lanes::{LaneOp, Lanes, dispatch};
use crate::cpu::Isa;
use crate::floats::LANES;
use crate::kv_cache::{KvElement, PAGE, Pages, STRIP, Storage, Strip};
use crate::memory::Plain;

/// Queries that share the loads of keys and values: as many sums as AVX2 has
/// registers for beside a strip and a factor. Twelve multiply-adds, six cycles of two
/// pipes, then need eight loads, four cycles of two.
const TILE: usize = 6;

/// Queries of a task: their scores take 24 KB.
pub const QUERIES: usize = 8 * TILE;

/// Scores of one query, then weights.
type Scores = [[f32; LANES]; KEY_BLOCK / LANES];

/// Attends with consecutive tokens: `q` has for each the query heads that share a
/// key/value head, `head_dim` numbers each, already turned by RoPE; `out` is of the
/// same shape. The first token sees up to the `keys.n_keys`-th key, each other one
/// more than the one before it, and each the last `keys.window` of them.
///
/// # Panics
/// The shapes differ, or the keys are not there.
pub fn attend_rows(isa: Isa, q: &[&[f32]], keys: Keys<'_>, out: &mut [&mut [f32]]) {
    let Keys { cache, layer, kv_head, n_keys, window } = keys;
    let shape = cache.shape();
    let head_dim = shape.head_dim;
    assert!(n_keys > 0 && n_keys + q.len() - 1 <= cache.capacity() && q.len() == out.len());
    assert!(window > 0, "a window of no keys");
    let width = q[0].len();
    assert!(q.iter().all(|q| q.len() == width) && out.iter().all(|out| out.len() == width));
    let kv_head = layer * shape.n_kv_heads + kv_head;
    match cache.storage() {
        Storage::F16(pages) => {
            dispatch(isa, AttendRows { q, pages, kv_head, head_dim, n_keys, window, out });
        }
        Storage::F32(pages) => {
            dispatch(isa, AttendRows { q, pages, kv_head, head_dim, n_keys, window, out });
        }
    }
}

struct AttendRows<'a, 'o, E> {
    q: &'a [&'a [f32]],
    pages: &'a Pages<E>,
    /// Counted over all layers.
    kv_head: usize,
    head_dim: usize,
    /// Of the first token.
    n_keys: usize,
    window: usize,
    out: &'a mut [&'o mut [f32]],
}

// Closures say `#[inline(always)]`: one that is not inlined is compiled for no
// instruction set.
impl<E: KvElement> LaneOp for AttendRows<'_, '_, E>
where
    Strip<E>: Plain,
{
    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let Self { q, pages, kv_head, head_dim, n_keys, window, out } = self;
        let (n_tokens, heads) = (q.len(), q[0].len() / head_dim);
        let n = n_tokens * heads;
        let scale = score_scale(head_dim);
        let mut queries: Vec<&[f32]> = Vec::with_capacity(n);
        for q in q {
            queries.extend(q.chunks_exact(head_dim));
        }
        let mut scores: Vec<Scores> = vec![[[0.0; LANES]; KEY_BLOCK / LANES]; n];
        let width = block_width(head_dim);
        let mut parts = vec![0f32; n * width];
        let mut state = vec![(0f32, 0f32); n];
        let last = n_keys + n_tokens - 1;
        let first_key = |token: usize| (n_keys + token).saturating_sub(window);
        for b in first_key(0) / KEY_BLOCK..last.div_ceil(KEY_BLOCK) {
            let page = pages.page(kv_head, b);
            // Keys of this block that a token sees: none if its window starts behind it.
            let within = |key: usize| key.saturating_sub(b * KEY_BLOCK).min(KEY_BLOCK);
            let seen = |token: usize| within(first_key(token))..within(n_keys + token);
            let end = seen(n_tokens - 1).end;
            let keys = page.keys.chunks_exact(head_dim).take(end.div_ceil(STRIP));
            for (g, strips) in keys.enumerate() {
                for first in (0..n).step_by(TILE) {
                    tile_sums(
                        l,
                        #[inline(always)]
                        |i| queries[(first + i).min(n - 1)],
                        strips,
                        #[inline(always)]
                        |half, i, sums| {
                            if let Some(scores) = scores.get_mut(first + i) {
                                scores[2 * g + half] = l.to_array(sums).map(
                                    #[inline(always)]
                                    |x| x * scale,
                                );
                            }
                        },
                    );
                }
            }
            for i in 0..n {
                let seen = seen(i / heads);
                if !seen.is_empty() {
                    (parts[i * width], parts[i * width + 1]) = weights(&mut scores[i], seen);
                }
            }
            // Up to here for all; what a window leaves out in front weighs nothing.
            let common = seen(0).end;
            for (g, strips) in page.values.chunks_exact(PAGE).enumerate() {
                for first in (0..n).step_by(TILE) {
                    tile_sums(
                        l,
                        #[inline(always)]
                        |i| &scores[(first + i).min(n - 1)].as_flattened()[..common],
                        &strips[..common],
                        #[inline(always)]
                        |half, i, mut sums| {
                            let query = first + i;
                            if query >= n {
                                return;
                            }
                            for key in common..seen(query / heads).end {
                                let weight = l.splat(scores[query].as_flattened()[key]);
                                let values = E::load(l, &strips[key].0[half]);
                                sums = l.fma(values, weight, sums);
                            }
                            let at = g * STRIP + half * LANES;
                            let part = &mut parts[query * width..][2..width];
                            let dims = LANES.min(head_dim.saturating_sub(at));
                            part[at.min(head_dim)..][..dims]
                                .copy_from_slice(&l.to_array(sums)[..dims]);
                        },
                    );
                }
            }
            for (token, out) in out.iter_mut().enumerate().filter(|(t, _)| !seen(*t).is_empty()) {
                for (h, out) in out.chunks_exact_mut(head_dim).enumerate() {
                    let i = token * heads + h;
                    let (max, sum) = &mut state[i];
                    let start = first_key(token) / KEY_BLOCK;
                    merge(b == start, max, sum, out, &parts[i * width..][..width]);
                }
            }
        }
        for (out, (_, sum)) in out.iter_mut().flat_map(|o| o.chunks_exact_mut(head_dim)).zip(state)
        {
            let inverse = 1.0 / sum;
            for o in out {
                *o *= inverse;
            }
        }
    }
}

/// The sums of factor times strip, for the factors of [`TILE`] queries:
/// `put(half, query, sums)` for both halves of the strips' lanes.
#[inline(always)]
fn tile_sums<'f, E: KvElement, L: Lanes>(
    l: L,
    factors: impl Fn(usize) -> &'f [f32],
    strips: &[Strip<E>],
    mut put: impl FnMut(usize, usize, L::V),
) {
    let mut slices: [&[f32]; TILE] = [&[]; TILE];
    for i in 0..TILE {
        slices[i] = factors(i);
    }
    if L::REGISTERS == 1 {
        let [a, b] = sums_of::<2, E, L>(l, slices, strips, 0);
        for i in 0..TILE {
            put(0, i, a[i]);
            put(1, i, b[i]);
        }
        return;
    }
    for half in 0..2 {
        let [a] = sums_of::<1, E, L>(l, slices, strips, half);
        for i in 0..TILE {
            put(half, i, a[i]);
        }
    }
}

/// The sums of `N` halves from `first` on. Nothing else is in this function, so
/// that the sums stay in registers.
#[inline(always)]
fn sums_of<const N: usize, E: KvElement, L: Lanes>(
    l: L,
    factors: [&[f32]; TILE],
    strips: &[Strip<E>],
    first: usize,
) -> [[L::V; TILE]; N] {
    let n = strips.len();
    let mut f: [&[f32]; TILE] = [&[]; TILE];
    for i in 0..TILE {
        f[i] = &factors[i][..n];
    }
    let mut sums = [[l.splat(0.0); TILE]; N];
    for s in 0..n {
        let mut x = [l.splat(0.0); N];
        for half in 0..N {
            x[half] = E::load(l, &strips[s].0[first + half]);
        }
        for i in 0..TILE {
            let factor = l.splat(f[i][s]);
            for half in 0..N {
                sums[half][i] = l.fma(x[half], factor, sums[half][i]);
            }
        }
    }
    sums
}
