//! The steps that forward passes are made of, each over all rows of a batch
//! and split over the team. A row is one token; activations are
//! `[row][width]`.

use super::batch::Row;
use super::{Dims, Machine, Segment};
use crate::error::Error;
use crate::kernels::Prepared;
use crate::ops::attention::attend;
use crate::ops::dense::{DenseMatrix, ROW_GROUP};
use crate::ops::rms_norm::rms_norm;
use crate::ops::rope::rotate;

/// Work items handed out per thread, for rows of unequal cost.
const CHUNKS: usize = 4;

/// Zeros for `rows` rows.
///
/// # Errors
/// There is no memory: a long prompt is the user's to cut.
pub(super) fn buffer(rows: usize, width: usize) -> Result<Vec<f32>, Error> {
    let mut v = Vec::new();
    let len = rows.checked_mul(width);
    match len.map(|len| v.try_reserve_exact(len)) {
        Some(Ok(())) => v.resize(rows * width, 0.0),
        _ => {
            return Err(Error::State(format!(
                "no memory for {rows} rows of {width} numbers; pass fewer tokens at a time"
            )));
        }
    }
    Ok(v)
}

/// `out[row] = embedding of the row's token`.
pub(super) fn embed(table: &DenseMatrix, batch: &[Segment<'_>], out: &mut [f32]) {
    let tokens = batch.iter().flat_map(|s| s.tokens);
    for (out, &token) in out.chunks_exact_mut(table.cols()).zip(tokens) {
        table.row(token as usize, out);
    }
}

/// `xs[row] = prepare(rms_norm(x[row]))`: what the next projections take.
pub(super) fn norm_prepare(m: &Machine, x: &[f32], weight: &[f32], eps: f32, xs: &mut [Prepared]) {
    let width = weight.len();
    let kernel = m.kernels.for_inputs(xs.len());
    m.team.split(xs, 1, CHUNKS, |first, xs| {
        let mut normed = vec![0f32; width];
        for (i, out) in xs.iter_mut().enumerate() {
            rms_norm(m.isa, &x[(first + i) * width..][..width], weight, eps, &mut normed);
            kernel.prepare(m.isa, &normed, out);
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

/// Turns queries and keys to their positions, writes keys and values of
/// `layer` to the caches, and attends: `out[row] = attention(q[row])`.
pub(super) fn attention(
    m: &Machine,
    dims: &Dims,
    layer: usize,
    rows: &[Row],
    batch: &mut [Segment<'_>],
    [q, k, v]: [&mut [f32]; 3],
    out: &mut [f32],
) {
    let (q_width, kv_width) = (dims.q_width(), dims.kv_width());
    for (x, width) in [(&mut *q, q_width), (&mut *k, kv_width)] {
        m.team.split(x, width, 1, |start, x| {
            for (i, x) in x.chunks_exact_mut(width).enumerate() {
                rotate(m.isa, &rows[start / width + i].angles, x);
            }
        });
    }
    let mut at = 0;
    for Segment { tokens, cache } in batch.iter_mut() {
        let part = at * kv_width..(at + tokens.len()) * kv_width;
        cache.write(layer, cache.len(), &k[part.clone()], &v[part]);
        at += tokens.len();
    }
    // One item of work: one row's query heads over one key/value head.
    let group = q_width / dims.n_kv_heads;
    let batch = &*batch;
    m.team.split(out, group, CHUNKS, |start, out| {
        for (i, out) in out.chunks_exact_mut(group).enumerate() {
            let item = start / group + i;
            let row = &rows[item / dims.n_kv_heads];
            let cache = &*batch[row.segment].cache;
            let q = &q[item * group..][..group];
            attend(m.isa, q, cache, layer, item % dims.n_kv_heads, row.position + 1, out);
        }
    });
}

/// Final norm and head for the rows in `wanted`: `[wanted][vocab]`.
pub(super) fn logits(
    m: &Machine,
    h: &[f32],
    wanted: &[usize],
    norm: &[f32],
    eps: f32,
    head: &DenseMatrix,
) -> Result<Vec<f32>, Error> {
    let width = norm.len();
    let mut normed = vec![0f32; wanted.len() * width];
    for (out, &row) in normed.chunks_exact_mut(width).zip(wanted) {
        rms_norm(m.isa, &h[row * width..][..width], norm, eps, out);
    }
    let xs: Vec<&[f32]> = normed.chunks_exact(width).collect();
    let mut y = buffer(wanted.len(), head.rows())?;
    let mut tasks = m.team.columns(&mut y, head.rows(), ROW_GROUP, CHUNKS);
    m.team.for_each(&mut tasks, |(range, ys)| head.multiply(m.isa, range.clone(), &xs, ys));
    Ok(y)
}

/// Counts every segment's tokens in its cache: the end of a forward pass.
pub(super) fn commit(batch: &mut [Segment<'_>]) {
    for Segment { tokens, cache } in batch {
        cache.advance(tokens.len());
    }
}
