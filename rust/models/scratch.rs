//! The buffers of a forward pass, laid out once: a step of one token allocates
//! nothing. A model keeps as many as passes have run at the same time.

use std::sync::{Mutex, PoisonError};

use super::Dims;
use super::batch::Row;
use crate::error::Error;
use crate::kernels::Prepared;
use crate::ops::head::ScanScratch;

/// Rows of a pass from which on its buffers are not kept: a long prompt in one
/// piece would hold on to hundreds of megabytes.
const MAX_KEPT_ROWS: usize = 512;

/// Buffers of activations are `[row][width]`; a row is one token.
#[derive(Default)]
pub(super) struct Scratch {
    pub(super) rows: Vec<Row>,
    /// Rotary angles, which all layers share.
    pub(super) angles: Vec<f32>,
    pub(super) h: Vec<f32>,
    pub(super) delta: Vec<f32>,
    pub(super) normed: Vec<f32>,
    pub(super) q: Vec<f32>,
    pub(super) k: Vec<f32>,
    pub(super) v: Vec<f32>,
    pub(super) attended: Vec<f32>,
    /// Attention by blocks of keys.
    pub(super) parts: Vec<f32>,
    pub(super) gate: Vec<f32>,
    pub(super) up: Vec<f32>,
    pub(super) xs: Vec<Prepared>,
    pub(super) scan: ScanScratch,
}

impl Scratch {
    /// Makes room for the rows listed in `rows`.
    ///
    /// # Errors
    /// There is no memory: a long prompt is the user's to cut.
    pub(super) fn fit(&mut self, d: &Dims) -> Result<(), Error> {
        let n = self.rows.len();
        let widest = d.hidden.max(d.q_width()).max(d.intermediate);
        for (buffer, width) in [
            (&mut self.angles, d.head_dim),
            (&mut self.h, d.hidden),
            (&mut self.delta, d.hidden),
            (&mut self.q, d.q_width()),
            (&mut self.k, d.kv_width()),
            (&mut self.v, d.kv_width()),
            (&mut self.attended, d.q_width()),
            (&mut self.gate, d.intermediate),
            (&mut self.up, d.intermediate),
        ] {
            resize(buffer, n, width)?;
        }
        resize(&mut self.normed, 1, widest)?;
        self.xs.resize_with(n, Prepared::default);
        Ok(())
    }
}

/// `rows` rows of `width`, of any content.
///
/// # Errors
/// There is no memory.
pub(super) fn resize(v: &mut Vec<f32>, rows: usize, width: usize) -> Result<(), Error> {
    let wanted = rows.checked_mul(width);
    let more = wanted.map(|len| len.saturating_sub(v.len()));
    match (wanted, more.map(|more| v.try_reserve_exact(more))) {
        (Some(len), Some(Ok(()))) => v.resize(len, 0.0),
        _ => {
            return Err(Error::State(format!(
                "no memory for {rows} rows of {width} numbers; pass fewer tokens at a time"
            )));
        }
    }
    Ok(())
}

/// Scratches that are not in use.
#[derive(Default)]
pub(super) struct Scratches(Mutex<Vec<Scratch>>);

impl Scratches {
    /// Lends one to `f`.
    pub(super) fn with<R>(&self, f: impl FnOnce(&mut Scratch) -> R) -> R {
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut scratch = lock().pop().unwrap_or_default();
        let result = f(&mut scratch);
        if scratch.rows.len() <= MAX_KEPT_ROWS {
            lock().push(scratch);
        }
        result
    }
}
