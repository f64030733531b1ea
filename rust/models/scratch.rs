//! The buffers of a forward pass, laid out once: a step of one token allocates
//! nothing. A model keeps as many as passes have run at the same time.

use std::sync::{Mutex, PoisonError};

use super::batch::{Row, Want};
use super::{Dims, Machine};
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
    /// Where a model has two kinds of layers, those of the kind not in use.
    pub(super) other_angles: Vec<f32>,
    pub(super) h: Vec<f32>,
    /// `h` normalized, where projections have norms of their own.
    pub(super) a: Vec<f32>,
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
    /// Of `xs`, those that the last layer had no use for.
    spare: Vec<Prepared>,
    /// Rows that there is room for.
    fitted: usize,
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
        for (buffer, width) in self.buffers(d) {
            resize(buffer, n, width)?;
        }
        resize(&mut self.normed, 1, widest)?;
        self.xs.append(&mut self.spare);
        self.xs.resize_with(n, Prepared::default);
        self.fitted = n;
        Ok(())
    }
}

impl Scratch {
    /// Keeps the rows that are wanted, in order: what the next steps compute is theirs
    /// alone. `wants` has their new places afterwards.
    pub(super) fn keep(&mut self, m: &Machine, d: &Dims, wants: &mut [(usize, Want)]) {
        for (to, (from, _)) in wants.iter_mut().enumerate() {
            let (h, a, angles) = (&mut self.h, &mut self.a, &mut self.angles);
            for (buffer, width) in [(h, d.hidden), (a, d.hidden), (angles, d.head_dim)] {
                buffer.copy_within(*from * width..(*from + 1) * width, to * width);
            }
            self.rows.swap(to, *from);
            self.xs.swap(to, *from);
            *from = to;
        }
        let n = wants.len();
        self.rows.truncate(n);
        self.spare.extend(self.xs.drain(n..));
        for (buffer, width) in self.buffers(d) {
            buffer.truncate(n * width);
        }
        // Fewer inputs may be another kernel's.
        let kernel = m.kernels.for_inputs(n);
        self.xs.iter_mut().for_each(|x| kernel.build_table(x));
    }

    /// Those that have a row for each token, and their widths.
    fn buffers(&mut self, d: &Dims) -> [(&mut Vec<f32>, usize); 11] {
        [
            (&mut self.angles, d.head_dim),
            (&mut self.other_angles, d.head_dim),
            (&mut self.h, d.hidden),
            (&mut self.a, d.hidden),
            (&mut self.delta, d.hidden),
            (&mut self.q, d.q_width()),
            (&mut self.k, d.kv_width()),
            (&mut self.v, d.kv_width()),
            (&mut self.attended, d.q_width()),
            (&mut self.gate, d.intermediate),
            (&mut self.up, d.intermediate),
        ]
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
        if scratch.fitted <= MAX_KEPT_ROWS {
            lock().push(scratch);
        }
        result
    }
}
