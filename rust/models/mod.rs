//! The forward passes, one file per architecture, and what they share going
//! in: a config, named tensors, a ragged batch.

mod apart;
mod batch;
mod bit_linear;
mod bitnet;
mod config;
mod frame;
mod gemma3;
mod llama;
mod qwen3;
mod scratch;
mod steps;
mod weights;

use crate::cpu::Isa;
use crate::error::{Error, invalid};
use crate::kernels::{self, Activations, INPUTS, Kernels, PackedMatrix};
use crate::kv_cache::{KvShape, ModelId};
use crate::threads::Team;

pub use crate::ops::head::TopLogits;
pub use batch::{Segment, Want, Wanted};
pub use config::{ConfigMap, Dims, Value};
use weights::Embeddings;
#[cfg(feature = "python")]
pub(crate) use weights::absmean_matrix;
pub use weights::{Tensor, TensorData, Visit, Weights};

/// What a forward pass returns, in the order of the segments.
#[derive(Debug, Default)]
pub struct Logits {
    /// Rows of all logits, `vocab_size` each.
    pub rows: Vec<f32>,
    /// The best logits of a token.
    pub top: Vec<TopLogits>,
    /// Rows of the final norm's output, `hidden_size` each.
    pub hidden: Vec<f32>,
}

/// How the head was used, since the model was loaded.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct HeadUse {
    /// Tokens whose best logits were asked for.
    pub scans: u64,
    /// Those for which all logits were computed after all.
    pub full: u64,
    /// Rows rescored for the others.
    pub rescored: u64,
}

/// What a model is and runs on, apart from its layers.
pub struct Facts {
    /// Weights in ternary matrices.
    pub ternary_params: usize,
    /// All weights; a tied head counts once.
    pub params: usize,
    /// Bytes of the packed ternary matrices.
    pub ternary_bytes: usize,
    /// Bytes of the `lm_head` rows, all read for all logits of a token.
    pub head_bytes: usize,
    /// Bytes of their int8 form, read for the best logits of a token.
    pub scan_bytes: usize,
    /// Bytes of all weights in memory.
    pub packed_bytes: usize,
    /// Bytes of weights read to decode one token, greedily.
    pub bytes_per_token: usize,
}

impl Facts {
    /// Adds up what a model is made of.
    fn count<'a>(
        projections: impl Iterator<Item = &'a PackedMatrix>,
        norms: impl Iterator<Item = &'a [f32]>,
        embeddings: &Embeddings,
    ) -> Self {
        let (ternary_params, ternary_bytes) = projections
            .fold((0, 0), |(params, bytes), p| (params + p.rows() * p.cols(), bytes + p.n_bytes()));
        let norm_params: usize = norms.map(<[f32]>::len).sum();
        let (float_params, float_bytes) = embeddings.size();
        let (norm_bytes, head_bytes) = (4 * norm_params, embeddings.head().n_bytes());
        let scan_bytes = embeddings.scan.n_bytes();
        Self {
            ternary_params,
            params: ternary_params + float_params + norm_params,
            ternary_bytes,
            head_bytes,
            scan_bytes,
            packed_bytes: ternary_bytes + float_bytes + scan_bytes + norm_bytes,
            bytes_per_token: ternary_bytes + scan_bytes + norm_bytes,
        }
    }
}

/// What every model computes with.
pub struct Machine {
    id: ModelId,
    /// Instruction set of the float half.
    pub isa: Isa,
    /// Kernels of the ternary projections.
    pub kernels: Kernels,
    /// Threads.
    pub team: Team,
}

impl Machine {
    /// Takes kernels by name and a number of threads (one for each CPU if
    /// `None`). Without a name it is the first of those for `activations`;
    /// without `batch` kernels, for each of [`INPUTS`] but the first, `kernel` does
    /// all. A kernel of a lower instruction set does not lower that of the float
    /// half: the bits are the same.
    ///
    /// # Errors
    /// An unknown kernel or one for other activations, some that read different layouts or
    /// are not as many as wanted, a wrong `BITNET_RS_ISA`, no threads.
    pub fn new(
        activations: Activations,
        kernel: Option<&str>,
        batch: Option<&[String]>,
        threads: Option<usize>,
    ) -> Result<Self, Error> {
        let isa = Isa::best()?;
        let decode = kernels::by_name(isa, activations, kernel)?;
        let mut all = [decode; INPUTS.len()];
        if let Some(batch) = batch {
            if batch.len() + 1 != all.len() {
                return Err(invalid!(
                    "{} batch kernels; wanted one for each of {:?} tokens",
                    batch.len(),
                    &INPUTS[1..]
                ));
            }
            for (kernel, name) in all[1..].iter_mut().zip(batch) {
                *kernel = kernels::by_name(isa, activations, Some(name))?;
            }
        }
        let kernels = Kernels::new(all)?;
        Ok(Self { id: ModelId::next(), isa, kernels, team: Team::new(threads)? })
    }

    /// One thread with the same kernels, for the same caches.
    fn alone(&self) -> Self {
        Self { team: self.team.alone(), ..*self }
    }

    /// The same machine with no thread started: packing used some, and a
    /// process may fork between loading a model and using it.
    fn stopped(self) -> Self {
        Self { team: self.team.stopped(), ..self }
    }
}

/// A loaded model: immutable, shared freely between threads.
pub trait Model: Send + Sync {
    /// Sizes.
    fn dims(&self) -> &Dims;

    /// `model_type` in its config.
    fn architecture(&self) -> &'static str;

    /// Kernel, instruction set and threads.
    fn machine(&self) -> &Machine;

    /// Counts of parameters and bytes.
    fn facts(&self) -> Facts;

    /// How the head was used until now.
    fn head_use(&self) -> HeadUse;

    /// Appends each segment's tokens to its cache and returns the logits that
    /// are wanted. On an error no cache has changed.
    ///
    /// # Errors
    /// See [`Segment`] and [`Wanted`]; threads that cannot be started.
    fn pass(&self, batch: &mut [Segment<'_>], wanted: Wanted<'_>) -> Result<Logits, Error>;

    /// What a cache for this model holds.
    fn kv_shape(&self) -> KvShape {
        let dims = self.dims();
        KvShape {
            model: self.machine().id,
            n_layers: dims.n_layers,
            n_kv_heads: dims.n_kv_heads,
            head_dim: dims.head_dim,
        }
    }
}

/// Builds the model that `config`'s `model_type` names.
///
/// # Errors
/// An unknown architecture, a config that it cannot run or whose activations are not
/// those of the machine's kernels, tensors that are missing or do not fit.
pub fn load(
    config: &ConfigMap,
    weights: &dyn Weights,
    machine: Machine,
) -> Result<Box<dyn Model>, Error> {
    let (wanted, kernel) = (config.activations()?, machine.kernels.decode());
    if kernel.activations() != wanted {
        return Err(invalid!(
            "kernel {:?} takes {} activations; this model's config wants {}",
            kernel.name(),
            kernel.activations().name(),
            wanted.name()
        ));
    }
    match config.str("model_type")? {
        "bitnet" => Ok(Box::new(bitnet::Bitnet::new(config, weights, machine)?)),
        "gemma3_text" => Ok(Box::new(gemma3::Gemma3::new(config, weights, machine)?)),
        "llama" => Ok(Box::new(llama::Llama::new(config, weights, machine)?)),
        "qwen3" => Ok(Box::new(qwen3::Qwen3::new(config, weights, machine)?)),
        other => Err(invalid!(
            "model_type is {other:?}; wanted \"bitnet\", \"gemma3_text\", \"llama\" or \"qwen3\""
        )),
    }
}
