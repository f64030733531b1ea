//! What every model has around its layers (embedding, head, final norm, machine, buffers) and
//! what follows from it, so that the file of an architecture has its layers and its
//! pass and nothing else.

use super::batch::{self, Segment, Want, Wanted};
use super::scratch::{Scratch, Scratches};
use super::weights::{Embeddings, vector};
use super::{Dims, Facts, HeadUse, Logits, Machine, Model, Weights, apart, steps};
use crate::error::Error;
use crate::kernels::PackedMatrix;

/// The parts of a model that are not layers.
pub(super) struct Frame {
    pub(super) dims: Dims,
    pub(super) machine: Machine,
    pub(super) embeddings: Embeddings,
    norm: Vec<f32>,
    scratches: Scratches,
}

impl Frame {
    /// Takes the embeddings, then calls `layer` for each of the layers. That order because
    /// embeddings stay mapped, and the pages that were read of them may go before the layers
    /// take memory.
    ///
    /// # Errors
    /// Tensors that are missing or do not fit; what `layer` returns.
    pub(super) fn new<T>(
        dims: Dims,
        weights: &dyn Weights,
        machine: Machine,
        layer: impl Fn(&Machine, &Dims, usize) -> Result<T, Error>,
    ) -> Result<(Self, Vec<T>), Error> {
        let embeddings = Embeddings::new(weights, &machine, &dims)?;
        let layers =
            (0..dims.n_layers).map(|i| layer(&machine, &dims, i)).collect::<Result<_, _>>()?;
        let norm = vector(weights, "model.norm.weight", dims.hidden)?;
        let machine = machine.stopped();
        Ok((Self { dims, machine, embeddings, norm, scratches: Scratches::default() }, layers))
    }

    /// The end of a pass: logits of the rows in `wants`.
    ///
    /// # Errors
    /// There is no memory.
    pub(super) fn finish(
        &self,
        m: &Machine,
        s: &mut Scratch,
        wants: &[(usize, Want)],
    ) -> Result<Logits, Error> {
        let Scratch { h, normed, scan, .. } = s;
        steps::logits(m, h, wants, &self.norm, self.dims.eps, &self.embeddings, normed, scan)
    }
}

/// A model as its architecture's file has it.
pub(super) trait Architecture: Send + Sync {
    /// `model_type`.
    const NAME: &'static str;

    /// What is not layers.
    fn frame(&self) -> &Frame;

    /// All ternary matrices.
    fn projections(&self) -> impl Iterator<Item = &PackedMatrix>;

    /// All norms of layers.
    fn norms(&self) -> impl Iterator<Item = &[f32]>;

    /// The pass on `m`, for the rows listed in `s`, but for counting the tokens in their
    /// caches; see [`Model::pass`].
    fn run(
        &self,
        m: &Machine,
        s: &mut Scratch,
        batch: &mut [Segment<'_>],
        wanted: Wanted<'_>,
    ) -> Result<Logits, Error>;
}

impl<A: Architecture> Model for A {
    fn dims(&self) -> &Dims {
        &self.frame().dims
    }

    fn architecture(&self) -> &'static str {
        A::NAME
    }

    fn machine(&self) -> &Machine {
        &self.frame().machine
    }

    fn facts(&self) -> Facts {
        let frame = self.frame();
        let norms = self.norms().chain([&frame.norm[..]]);
        Facts::count(self.projections(), norms, &frame.embeddings)
    }

    fn head_use(&self) -> HeadUse {
        self.frame().embeddings.head_use()
    }

    fn pass(&self, batch: &mut [Segment<'_>], wanted: Wanted<'_>) -> Result<Logits, Error> {
        let machine = &self.frame().machine;
        batch::reserve(self, batch, wanted)?;
        let logits = machine.team.run(|| match apart::share(self, batch) {
            Some(share) => apart::run(self, share, batch, wanted),
            None => run(self, machine, batch, wanted),
        })??;
        batch::commit(batch);
        Ok(logits)
    }
}

/// Takes a batch through all layers, with buffers of the model's.
pub(super) fn run(
    model: &impl Architecture,
    m: &Machine,
    batch: &mut [Segment<'_>],
    wanted: Wanted<'_>,
) -> Result<Logits, Error> {
    model.frame().scratches.with(|scratch| {
        batch::rows(batch, &mut scratch.rows);
        model.run(m, scratch, batch, wanted)
    })
}
