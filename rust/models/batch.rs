//! The ragged batch: segments of (tokens, cache), prefill and decode mixed,
//! flattened to rows of one token each.

use crate::error::{Error, invalid};
use crate::kv_cache::KvCache;
use crate::ops::rope::Rope;

use super::{Logits, Model};

/// Tokens to append to one cache.
pub struct Segment<'a> {
    /// Token ids, at least one, each below the vocabulary size.
    pub tokens: &'a [u32],
    /// A cache of the same model, with room for them.
    pub cache: &'a mut KvCache,
}

/// One token of a batch.
pub(super) struct Row {
    /// Which segment it is of.
    pub(super) segment: usize,
    /// Where in its sequence it stands.
    pub(super) position: usize,
    /// Its rotary angles, which all layers share.
    pub(super) angles: Vec<f32>,
}

/// Checks a batch against a model, takes the memory for its keys and values,
/// and lists its rows, in order.
///
/// # Errors
/// An empty batch or segment, a token id out of range, a cache of another
/// shape or without room.
pub(super) fn rows(
    model: &dyn Model,
    rope: &Rope,
    batch: &mut [Segment<'_>],
) -> Result<Vec<Row>, Error> {
    let dims = model.dims();
    if batch.is_empty() {
        return Err(invalid!("an empty batch; wanted at least one segment"));
    }
    let mut rows = Vec::with_capacity(batch.iter().map(|s| s.tokens.len()).sum());
    for (segment, Segment { tokens, cache }) in batch.iter_mut().enumerate() {
        if tokens.is_empty() {
            return Err(invalid!("segment {segment} has no tokens; wanted at least one"));
        }
        if let Some(id) = tokens.iter().find(|&&id| id as usize >= dims.vocab) {
            return Err(invalid!(
                "token id {id} in segment {segment}; the vocabulary has {} tokens, 0 to {}",
                dims.vocab,
                dims.vocab - 1
            ));
        }
        if cache.shape() != model.kv_shape() {
            return Err(invalid!(
                "the cache of segment {segment} belongs to another model; make one with this \
                 model's new_cache"
            ));
        }
        cache.reserve(tokens.len()).map_err(|e| match e {
            Error::Invalid(message) => invalid!("segment {segment}: {message}"),
            other => other,
        })?;
        let positions = cache.len()..cache.len() + tokens.len();
        rows.extend(positions.map(|position| Row {
            segment,
            position,
            angles: rope.angles(position),
        }));
    }
    Ok(rows)
}

/// Indices of the rows whose logits are wanted.
pub(super) fn wanted(batch: &[Segment<'_>], logits: Logits) -> Vec<usize> {
    let n = batch.iter().map(|s| s.tokens.len()).sum();
    match logits {
        Logits::All => (0..n).collect(),
        Logits::Last => batch
            .iter()
            .scan(0, |end, s| {
                *end += s.tokens.len();
                Some(*end - 1)
            })
            .collect(),
    }
}
