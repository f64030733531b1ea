//! `llama`: a Llama whose projections are ternary. Llama3-8B-1.58,
//! Falcon3-1.58bit, Falcon-E.
//!
//! Follows `LlamaForCausalLM` in transformers' `modeling_llama.py` with every
//! projection a `BitLinear`: no sub-norms, SiLU.

use super::batch::{self, Segment};
use super::steps::{self, attention, buffer, embed, norm_prepare, prepare, zip_rows};
use super::weights::{Embeddings, ternary, vector};
use super::{ConfigMap, Dims, Facts, Logits, Machine, Model, Weights};
use crate::error::Error;
use crate::kernels::{PackedMatrix, Prepared, multiply};
use crate::ops::activation::{Activation, add, gate_up};
use crate::ops::rope::Rope;

/// The model.
pub(super) struct Llama {
    dims: Dims,
    machine: Machine,
    rope: Rope,
    embeddings: Embeddings,
    layers: Vec<Layer>,
    norm: Vec<f32>,
}

struct Layer {
    input_layernorm: Vec<f32>,
    q_proj: PackedMatrix,
    k_proj: PackedMatrix,
    v_proj: PackedMatrix,
    o_proj: PackedMatrix,
    post_attention_layernorm: Vec<f32>,
    gate_proj: PackedMatrix,
    up_proj: PackedMatrix,
    down_proj: PackedMatrix,
}

impl Layer {
    fn new(w: &dyn Weights, m: &Machine, d: &Dims, index: usize) -> Result<Self, Error> {
        let name = |part: &str| format!("model.layers.{index}.{part}.weight");
        let norm = |part: &str, len| vector(w, &name(part), len);
        let proj = |part: &str, rows, cols| ternary(w, m, &name(part), rows, cols);
        Ok(Self {
            input_layernorm: norm("input_layernorm", d.hidden)?,
            q_proj: proj("self_attn.q_proj", d.q_width(), d.hidden)?,
            k_proj: proj("self_attn.k_proj", d.kv_width(), d.hidden)?,
            v_proj: proj("self_attn.v_proj", d.kv_width(), d.hidden)?,
            o_proj: proj("self_attn.o_proj", d.hidden, d.q_width())?,
            post_attention_layernorm: norm("post_attention_layernorm", d.hidden)?,
            gate_proj: proj("mlp.gate_proj", d.intermediate, d.hidden)?,
            up_proj: proj("mlp.up_proj", d.intermediate, d.hidden)?,
            down_proj: proj("mlp.down_proj", d.hidden, d.intermediate)?,
        })
    }

    fn projections(&self) -> [&PackedMatrix; 7] {
        [
            &self.q_proj,
            &self.k_proj,
            &self.v_proj,
            &self.o_proj,
            &self.gate_proj,
            &self.up_proj,
            &self.down_proj,
        ]
    }

    fn norms(&self) -> [&[f32]; 2] {
        [&self.input_layernorm, &self.post_attention_layernorm]
    }
}

impl Llama {
    pub(super) fn new(
        config: &ConfigMap,
        weights: &dyn Weights,
        machine: Machine,
    ) -> Result<Self, Error> {
        let dims = Dims::read(config)?;
        config.hidden_act(&[Activation::Silu])?;
        // First: while this largest tensor is converted, no layer takes memory yet.
        let embeddings = Embeddings::new(weights, &machine, &dims)?;
        let layers = (0..dims.n_layers)
            .map(|i| Layer::new(weights, &machine, &dims, i))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            rope: Rope::new(dims.head_dim, dims.rope_theta),
            embeddings,
            norm: vector(weights, "model.norm.weight", dims.hidden)?,
            layers,
            machine: machine.stopped(),
            dims,
        })
    }

    fn run(
        &self,
        rows: &[batch::Row],
        batch: &mut [Segment<'_>],
        wanted: &[usize],
    ) -> Result<Vec<f32>, Error> {
        let (d, m, eps) = (&self.dims, &self.machine, self.dims.eps);
        let zeros = |width| buffer(rows.len(), width);
        let (mut h, mut delta) = (zeros(d.hidden)?, zeros(d.hidden)?);
        let (mut q, mut attended) = (zeros(d.q_width())?, zeros(d.q_width())?);
        let (mut k, mut v) = (zeros(d.kv_width())?, zeros(d.kv_width())?);
        let (mut gate, mut up) = (zeros(d.intermediate)?, zeros(d.intermediate)?);
        let mut xs = vec![Prepared::default(); rows.len()];

        embed(&self.embeddings.tokens, batch, &mut h);
        for (index, layer) in self.layers.iter().enumerate() {
            norm_prepare(m, &h, &layer.input_layernorm, eps, &mut xs);
            let products =
                [(&layer.q_proj, &mut q[..]), (&layer.k_proj, &mut k), (&layer.v_proj, &mut v)];
            multiply(&m.team, &xs, products);
            let qkv = [&mut q[..], &mut k[..], &mut v[..]];
            attention(m, d, index, rows, batch, qkv, &mut attended);
            prepare(m, &attended, d.q_width(), &mut xs);
            multiply(&m.team, &xs, [(&layer.o_proj, &mut delta)]);
            zip_rows(m, &mut h, &delta, d.hidden, |h, delta| add(m.isa, h, delta));

            norm_prepare(m, &h, &layer.post_attention_layernorm, eps, &mut xs);
            let products = [(&layer.gate_proj, &mut gate[..]), (&layer.up_proj, &mut up)];
            multiply(&m.team, &xs, products);
            zip_rows(m, &mut gate, &up, d.intermediate, |gate, up| {
                gate_up(m.isa, Activation::Silu, gate, up);
            });
            prepare(m, &gate, d.intermediate, &mut xs);
            multiply(&m.team, &xs, [(&layer.down_proj, &mut delta)]);
            zip_rows(m, &mut h, &delta, d.hidden, |h, delta| add(m.isa, h, delta));
        }
        let logits = steps::logits(m, &h, wanted, &self.norm, eps, self.embeddings.head())?;
        steps::commit(batch);
        Ok(logits)
    }
}

impl Model for Llama {
    fn dims(&self) -> &Dims {
        &self.dims
    }

    fn architecture(&self) -> &'static str {
        "llama"
    }

    fn machine(&self) -> &Machine {
        &self.machine
    }

    fn facts(&self) -> Facts {
        let projections = self.layers.iter().flat_map(Layer::projections);
        let norms = self.layers.iter().flat_map(Layer::norms).chain([&self.norm[..]]);
        Facts::count(projections, norms, &self.embeddings)
    }

    fn forward(&self, batch: &mut [Segment<'_>], logits: Logits) -> Result<Vec<f32>, Error> {
        let rows = batch::rows(self, &self.rope, batch)?;
        let wanted = batch::wanted(batch, logits);
        self.machine.team.run(|| self.run(&rows, batch, &wanted))?
    }
}
