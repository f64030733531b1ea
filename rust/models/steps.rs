//! The steps that forward passes are made of, each over all rows of a batch
//! and split over the team. A row is one token; activations are
//! `[row][width]`.
//!
//! A single row is what decoding is about: its vectors are too short to share,
//! so the calling thread normalizes and quantizes alone, and only matrices and
//! attention are dealt out.

use super::batch::{Row, Want};
use super::scratch::{Scratch, resize};
use super::weights::Embeddings;
use super::{Dims, Logits, Machine, Segment};
use crate::error::Error;
use crate::kernels::{PackedMatrix, Prepared, multiply};
use crate::ops::attention::{Keys, attend, attend_blocks, block_width, merge_blocks};
use crate::ops::attention_rows::{QUERIES, attend_rows};
use crate::ops::dense::DenseMatrix;
use crate::ops::head::{ScanScratch, top_logits};
use crate::ops::rms_norm::rms_norm;
use crate::ops::rope::{Rope, rotate};

/// Blocks of keys up to which one thread merges them: a microsecond or two.
const MERGED_ALONE: usize = 4;

/// Work items handed out per thread, for rows of unequal cost.
const CHUNKS: usize = 4;

/// `out[row] = embedding of the row's token`.
pub(super) fn embed(table: &DenseMatrix, batch: &[Segment<'_>], out: &mut [f32]) {
    let tokens = batch.iter().flat_map(|s| s.tokens);
    for (out, &token) in out.chunks_exact_mut(table.cols()).zip(tokens) {
        table.row(token as usize, out);
    }
}

/// `out[row] = rotary angles of the row's position`.
pub(super) fn angles(m: &Machine, rope: &Rope, rows: &[Row], head_dim: usize, out: &mut [f32]) {
    m.team.split(out, head_dim, CHUNKS, |start, out| {
        for (i, out) in out.chunks_exact_mut(head_dim).enumerate() {
            rope.angles(rows[start / head_dim + i].position, out);
        }
    });
}

/// `xs[row] = prepare(rms_norm(x[row]))`: what the next projections take.
/// `normed` is a buffer for one row; of several, each chunk has its own, which
/// stays in the cache of the thread that quantizes it.
pub(super) fn norm_prepare(
    m: &Machine,
    x: &[f32],
    weight: &[f32],
    eps: f32,
    normed: &mut [f32],
    xs: &mut [Prepared],
) {
    let width = weight.len();
    let kernel = m.kernels.for_inputs(xs.len());
    let prepare = |row: usize, normed: &mut [f32], out: &mut Prepared| {
        rms_norm(m.isa, &x[row * width..][..width], weight, eps, normed);
        kernel.prepare(m.isa, normed, out);
    };
    if let [out] = xs {
        return prepare(0, &mut normed[..width], out);
    }
    m.team.split(xs, 1, CHUNKS, |first, xs| {
        let mut normed = vec![0.0; width];
        for (i, out) in xs.iter_mut().enumerate() {
            prepare(first + i, &mut normed, out);
        }
    });
}

/// `xs[row] = prepare(x[row])`, where there is no norm before a projection.
pub(super) fn prepare(m: &Machine, x: &[f32], width: usize, xs: &mut [Prepared]) {
    let kernel = m.kernels.for_inputs(xs.len());
    m.team.split(xs, 1, CHUNKS, |first, xs| {
        for (i, out) in xs.iter_mut().enumerate() {
            kernel.prepare(m.isa, &x[(first + i) * width..][..width], out);
        }
    });
}

/// `out[row] = rms_norm(x[row])`, where what follows takes it as floats.
pub(super) fn norm_rows(m: &Machine, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    m.team.split(out, width, CHUNKS, |start, out| {
        for (x, out) in x[start..].chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            rms_norm(m.isa, x, weight, eps, out);
        }
    });
}

/// Normalizes every head of every row, in place.
fn norm_heads(m: &Machine, x: &mut [f32], weight: &[f32], eps: f32) {
    let head_dim = weight.len();
    m.team.split(x, head_dim, CHUNKS, |_, x| {
        let mut head = vec![0.0; head_dim];
        for x in x.chunks_exact_mut(head_dim) {
            rms_norm(m.isa, x, weight, eps, &mut head);
            x.copy_from_slice(&head);
        }
    });
}

/// Calls `f(a[row], b[row])` for every row, where `b` is only read.
pub(super) fn zip_rows(
    m: &Machine,
    a: &mut [f32],
    b: &[f32],
    width: usize,
    f: impl Fn(&mut [f32], &[f32]) + Sync,
) {
    m.team.split(a, width, 1, |start, a| f(a, &b[start..start + a.len()]));
}

/// Turns rows of queries or of keys to their positions.
fn turn(m: &Machine, dims: &Dims, angles: &[f32], x: &mut [f32]) {
    let head_dim = dims.head_dim;
    let width = x.len() / (angles.len() / head_dim);
    m.team.split(x, width, 1, |start, x| {
        for (i, x) in x.chunks_exact_mut(width).enumerate() {
            rotate(m.isa, &angles[(start / width + i) * head_dim..][..head_dim], x);
        }
    });
}

/// Turns keys to their positions, and writes keys and values of `layer` to the caches.
fn place(
    m: &Machine,
    dims: &Dims,
    layer: usize,
    angles: &[f32],
    batch: &mut [Segment<'_>],
    [k, v]: [&mut [f32]; 2],
) {
    turn(m, dims, angles, k);
    let kv_width = dims.kv_width();
    if batch.iter().all(|s| s.tokens.len() == 1) {
        // One token writes its own; of several sequences, each has a task.
        let rows = k.chunks_exact(kv_width).zip(v.chunks_exact(kv_width));
        let mut tasks: Vec<_> = batch.iter_mut().map(|s| &mut *s.cache).zip(rows).collect();
        return m.team.for_each(&mut tasks, |(cache, (k, v))| {
            cache.write((m.isa, &m.team), layer, cache.len(), k, v);
        });
    }
    let mut at = 0;
    for Segment { tokens, cache } in batch.iter_mut() {
        let part = at * kv_width..(at + tokens.len()) * kv_width;
        cache.write((m.isa, &m.team), layer, cache.len(), &k[part.clone()], &v[part]);
        at += tokens.len();
    }
}

/// What makes queries, keys and values.
pub(super) struct Qkv<'a> {
    /// Their projections.
    pub(super) projections: [&'a PackedMatrix; 3],
    /// Norms before each of them, of the layer's normalized input `Scratch::a`; without
    /// them all three take what is in `Scratch::xs`.
    pub(super) norms: Option<[&'a [f32]; 3]>,
    /// Norms of each head of queries and of keys.
    pub(super) head_norms: Option<[&'a [f32]; 2]>,
}

impl Qkv<'_> {
    /// Those of `which`, from the rows in `s`, normalized.
    fn project<const N: usize>(&self, m: &Machine, d: &Dims, which: [usize; N], s: &mut Scratch) {
        let Scratch { a, normed, xs, q, k, v, .. } = s;
        let mut outs = [Some(&mut q[..]), Some(&mut k[..]), Some(&mut v[..])];
        let mut products = which.map(|i| (i, self.projections[i], outs[i].take()));
        if let Some(norms) = self.norms {
            for (i, w, out) in &mut products {
                norm_prepare(m, a, norms[*i], d.eps, normed, xs);
                multiply(&m.team, xs, [(*w, out.take().unwrap_or_default())]);
            }
        } else {
            multiply(&m.team, xs, products.map(|(_, w, out)| (w, out.unwrap_or_default())));
        }
        if let Some(norms) = self.head_norms {
            for i in which {
                match i {
                    0 => norm_heads(m, q, norms[0], d.eps),
                    1 => norm_heads(m, k, norms[1], d.eps),
                    _ => {}
                }
            }
        }
        m.team.lap("q, k, v");
    }
}

/// Queries, keys and values of a layer, turned, and the latter two in the caches. In
/// the last layer, which is given what is `wanted`, only rows of which logits are
/// wanted have a use for more than keys and values: `s` keeps no others, perhaps none.
pub(super) fn q_k_v(
    m: &Machine,
    dims: &Dims,
    layer: usize,
    qkv: &Qkv<'_>,
    s: &mut Scratch,
    batch: &mut [Segment<'_>],
    wanted: Option<&mut Vec<(usize, Want)>>,
) {
    if let Some(wants) = wanted.filter(|wants| wants.len() < s.rows.len()) {
        qkv.project(m, dims, [1, 2], s);
        place(m, dims, layer, &s.angles, batch, [&mut s.k, &mut s.v]);
        m.team.lap("rotate, cache");
        s.keep(m, dims, wants);
        if s.rows.is_empty() {
            return;
        }
        qkv.project(m, dims, [0], s);
    } else {
        qkv.project(m, dims, [0, 1, 2], s);
        place(m, dims, layer, &s.angles, batch, [&mut s.k, &mut s.v]);
    }
    turn(m, dims, &s.angles, &mut s.q);
    m.team.lap("rotate, cache");
}

/// `out[row] = attention(q[row])`, to the last `window` tokens.
pub(super) fn attention(
    m: &Machine,
    dims: &Dims,
    layer: usize,
    window: usize,
    rows: &[Row],
    batch: &[Segment<'_>],
    q: &[f32],
    parts: &mut Vec<f32>,
    out: &mut [f32],
) -> Result<(), Error> {
    // One item of work: one row's query heads over one key/value head.
    let (head_dim, group) = (dims.head_dim, dims.q_width() / dims.n_kv_heads);
    let keys = |item: usize| {
        let row = &rows[item / dims.n_kv_heads];
        let cache = &*batch[row.segment].cache;
        Keys { cache, layer, kv_head: item % dims.n_kv_heads, n_keys: row.position + 1, window }
    };
    if rows.len() > 1 {
        let mut tasks = tiles(rows, out, dims, group);
        m.team.for_each(&mut tasks, |(row, kv_head, out)| {
            let keys = keys(*row * dims.n_kv_heads + *kv_head);
            let q: Vec<&[f32]> = q[*row * dims.q_width()..]
                .chunks_exact(dims.q_width())
                .take(out.len())
                .map(|q| &q[*kv_head * group..][..group])
                .collect();
            if let [out] = &mut out[..] {
                attend(m.isa, q[0], keys, &mut Vec::new(), out);
            } else {
                attend_rows(m.isa, &q, keys, out);
            }
        });
        return Ok(());
    }
    // One row has few heads and perhaps many keys: the blocks of keys are dealt out.
    let blocks = keys(0).blocks();
    let width = group / head_dim * block_width(head_dim);
    resize(parts, dims.n_kv_heads * blocks, width)?;
    m.team.split(parts, width, CHUNKS, |start, mut parts| {
        let mut at = start / width;
        while !parts.is_empty() {
            let (item, first) = (at / blocks, at % blocks);
            let n = (blocks - first).min(parts.len() / width);
            let (these, rest) = parts.split_at_mut(n * width);
            let q = &q[item * group..][..group];
            attend_blocks(m.isa, q, keys(item), first..first + n, these);
            (parts, at) = (rest, at + n);
        }
    });
    let parts = &*parts;
    let granule = if blocks <= MERGED_ALONE { out.len() } else { group };
    m.team.split(out, granule, 1, |start, out| {
        for (i, out) in out.chunks_exact_mut(group).enumerate() {
            let item = start / group + i;
            let parts = &parts[item * blocks * width..][..blocks * width];
            merge_blocks(m.isa, parts, head_dim, out);
        }
    });
    Ok(())
}

/// Cuts `out` into some consecutive rows of one segment, for each key/value head:
/// (first row, head, its part of each row).
fn tiles<'o>(
    rows: &[Row],
    out: &'o mut [f32],
    dims: &Dims,
    group: usize,
) -> Vec<(usize, usize, Vec<&'o mut [f32]>)> {
    let most = (QUERIES * dims.head_dim / group).max(1);
    let mut tasks = Vec::new();
    let mut outs = out.chunks_exact_mut(dims.q_width());
    let mut first = 0;
    while let Some(row) = rows.get(first) {
        let n = rows[first..].iter().take(most).take_while(|r| r.segment == row.segment).count();
        let start = tasks.len();
        tasks.extend((0..dims.n_kv_heads).map(|kv_head| (first, kv_head, Vec::with_capacity(n))));
        for out in outs.by_ref().take(n) {
            for (out, (.., parts)) in out.chunks_exact_mut(group).zip(&mut tasks[start..]) {
                parts.push(out);
            }
        }
        first += n;
    }
    tasks
}

/// Final norm and head for the rows in `wants`.
pub(super) fn logits(
    m: &Machine,
    h: &[f32],
    wants: &[(usize, Want)],
    norm: &[f32],
    eps: f32,
    embeddings: &Embeddings,
    normed: &mut Vec<f32>,
    scratch: &mut ScanScratch,
) -> Result<Logits, Error> {
    let width = norm.len();
    resize(normed, wants.len(), width)?;
    for (out, &(row, _)) in normed.chunks_exact_mut(width).zip(wants) {
        rms_norm(m.isa, &h[row * width..][..width], norm, eps, out);
    }
    m.team.lap("norm, quantize");
    let head = embeddings.head();
    let (mut full, mut best, mut ks) = (Vec::new(), Vec::new(), Vec::new());
    let mut hidden = Vec::new();
    for (x, (_, want)) in normed.chunks_exact(width).zip(wants) {
        match want {
            Want::Nothing => {}
            Want::All => full.push(x),
            Want::Top(k) => {
                best.push(x);
                ks.push(*k);
            }
            Want::Hidden => hidden.extend_from_slice(x),
        }
    }
    let mut rows = Vec::new();
    if !full.is_empty() {
        resize(&mut rows, full.len(), head.rows())?;
        if let [_] = full[..] {
            m.team.split(&mut rows, 4, 2 * CHUNKS, |start, part| {
                head.multiply(m.isa, start..start + part.len(), &full, &mut [part]);
            });
        } else {
            let mut tasks = m.team.columns(&mut rows, head.rows(), 4, 2 * CHUNKS);
            m.team.for_each(&mut tasks, |(range, ys)| {
                head.multiply(m.isa, range.clone(), &full, ys);
            });
        }
        m.team.lap("head, all logits");
    }
    let top = if best.is_empty() {
        Vec::new()
    } else {
        top_logits(head, &embeddings.scan, m.isa, &m.team, &best, &ks, scratch)
    };
    embeddings.count(&top);
    Ok(Logits { rows, top, hidden })
}
