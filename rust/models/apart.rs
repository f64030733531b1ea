//! Passes whose sequences are shared out over the threads, instead of every step of every
//! layer. Apart from `steps.rs`, all of whose steps are split over the team: here a thread
//! takes some sequences through all layers by itself, and waits for the others once.
//!
//! Each thread then reads all weights, where otherwise it reads some rows of them. Of a small
//! model, whose weights lie in the cache, that costs less than waiting a dozen times in every
//! layer, in steps of some microseconds.

use super::batch::{Segment, Wanted};
use super::frame::{self, Architecture};
use super::{Logits, Machine, Model};
use crate::error::Error;

/// Most bytes of weights, read for a token, of models whose passes are shared out so. On two
/// threads of a Zen 3, 8 and 4 and 2 sequences came 1.1 to 1.4 times as fast with 2.3 MB, 0.96
/// to 1.2 times with 11 MB, 0.9 to 1.0 times with 25 MB and more, where threads wait for memory.
const MAX_BYTES: usize = 8 << 20;

/// Segments for each thread, if they had better be shared out.
pub(super) fn share(model: &impl Architecture, batch: &[Segment<'_>]) -> Option<usize> {
    let threads = model.machine().team.threads();
    // Of longer segments one may take longer than all others together.
    let decoding = || batch.iter().all(|s| s.tokens.len() == 1);
    (threads > 1
        && batch.len() >= threads
        && decoding()
        && model.facts().bytes_per_token <= MAX_BYTES)
        .then(|| batch.len().div_ceil(threads))
}

/// Takes a batch through all layers, `share` segments for each thread. Call it inside
/// [`Team::run`](crate::threads::Team::run).
///
/// # Errors
/// As [`Architecture::run`].
pub(super) fn run(
    model: &impl Architecture,
    share: usize,
    batch: &mut [Segment<'_>],
    wanted: Wanted<'_>,
) -> Result<Logits, Error> {
    struct Part<'a, 'b> {
        machine: Machine,
        batch: &'a mut [Segment<'b>],
        wanted: Wanted<'a>,
        logits: Result<Logits, Error>,
    }
    let team = &model.machine().team;
    let segments = (0..batch.len()).step_by(share);
    let mut parts: Vec<_> = batch
        .chunks_mut(share)
        .zip(segments)
        .map(|(batch, first)| Part {
            machine: model.machine().alone(),
            wanted: wanted.part(first..first + batch.len()),
            batch,
            logits: Ok(Logits::default()),
        })
        .collect();
    team.for_each(&mut parts, |Part { machine, batch, wanted, logits }| {
        *logits = machine.team.run(|| frame::run(model, machine, batch, *wanted)).flatten();
    });
    team.add_profiles(parts.iter().map(|part| &part.machine.team));
    let mut all = Logits::default();
    for Part { logits, .. } in parts {
        let Logits { rows, top, hidden } = logits?;
        all.rows.extend(rows);
        all.top.extend(top);
        all.hidden.extend(hidden);
    }
    Ok(all)
}
