//! The ragged batch: segments of (tokens, cache), prefill and decode mixed,
//! flattened to rows of one token each; and what is wanted of it.

use std::ops::Range;

use crate::error::{Error, invalid};
use crate::kv_cache::KvCache;

use super::Model;

/// Tokens to append to one cache.
pub struct Segment<'a> {
    /// Token ids, at least one, each below the vocabulary size.
    pub tokens: &'a [u32],
    /// A cache of the same model, with room for them.
    pub cache: &'a mut KvCache,
}

/// Which logits a forward pass returns.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wanted<'a> {
    /// All logits of the last token of each segment.
    Last,
    /// All logits of every token.
    All,
    /// For each segment, some logits of its last token.
    Each(&'a [Want]),
}

/// Logits that are wanted of one token.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Want {
    /// None.
    Nothing,
    /// All of them.
    All,
    /// The best so many, at least one.
    Top(usize),
    /// Instead of logits, what the head would take: the final norm's output.
    Hidden,
}

/// One token of a batch.
pub(super) struct Row {
    /// Which segment it is of.
    pub(super) segment: usize,
    /// Where in its sequence it stands.
    pub(super) position: usize,
}

impl<'a> Wanted<'a> {
    /// The same of some segments.
    pub(super) fn part(self, segments: Range<usize>) -> Self {
        match self {
            Wanted::Each(wants) => Wanted::Each(&wants[segments]),
            all => all,
        }
    }
}

/// Checks a batch against a model and takes the memory for its keys and values.
///
/// # Errors
/// An empty batch or segment, a token id out of range, a cache of another
/// shape or without room, wants that are not one for each segment.
pub(super) fn reserve(
    model: &dyn Model,
    batch: &mut [Segment<'_>],
    wanted: Wanted<'_>,
) -> Result<(), Error> {
    let dims = model.dims();
    if batch.is_empty() {
        return Err(invalid!("an empty batch; wanted at least one segment"));
    }
    if let Wanted::Each(wants) = wanted {
        if wants.len() != batch.len() {
            return Err(invalid!("{} wants for {} segments", wants.len(), batch.len()));
        }
        if wants.contains(&Want::Top(0)) {
            return Err(invalid!("the best 0 logits; wanted at least one"));
        }
    }
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
    }
    Ok(())
}

/// Lists the rows of a batch, in order.
pub(super) fn rows(batch: &[Segment<'_>], rows: &mut Vec<Row>) {
    rows.clear();
    for (segment, Segment { tokens, cache }) in batch.iter().enumerate() {
        let positions = cache.len()..cache.len() + tokens.len();
        rows.extend(positions.map(|position| Row { segment, position }));
    }
}

/// The rows whose logits are wanted, and which; those of which nothing is
/// wanted left out.
pub(super) fn wants(batch: &[Segment<'_>], wanted: Wanted<'_>) -> Vec<(usize, Want)> {
    let n: usize = batch.iter().map(|s| s.tokens.len()).sum();
    let want = |segment: usize| match wanted {
        Wanted::Each(wants) => wants[segment],
        Wanted::Last | Wanted::All => Want::All,
    };
    if wanted == Wanted::All {
        return (0..n).map(|row| (row, Want::All)).collect();
    }
    let mut end = 0;
    let mut wants = Vec::with_capacity(batch.len());
    for (segment, s) in batch.iter().enumerate() {
        end += s.tokens.len();
        if want(segment) != Want::Nothing {
            wants.push((end - 1, want(segment)));
        }
    }
    wants
}

/// Counts every segment's tokens in its cache: the end of a forward pass.
pub(super) fn commit(batch: &mut [Segment<'_>]) {
    for Segment { tokens, cache } in batch {
        cache.advance(tokens.len());
    }
}
