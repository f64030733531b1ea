//! `qwen3`: a Qwen3 whose projections are ternary. Ternary-Bonsai, and
//! microsoft/bitnet-embedding-0.6b.
//!
//! Follows `Qwen3ForCausalLM` in transformers' `modeling_qwen3.py`: queries and keys
//! are normalized head by head, SiLU. In the embedding models every projection has a
//! norm of its own in front, as `BitLinear` in the training tips of BitNet b1.58
//! (`<projection>.norm.weight`), besides those of the block.

use super::batch::{self, Segment, Wanted};
use super::bit_linear::BitLinear;
use super::scratch::{Scratch, Scratches};
use super::steps::{self, Qkv, angles, attention, embed, q_k_v, zip_rows};
use super::weights::{Embeddings, vector};
use super::{ConfigMap, Dims, Facts, HeadUse, Logits, Machine, Model, Weights};
use crate::error::Error;
use crate::ops::activation::{Activation, add};
use crate::ops::attention::ALL;
use crate::ops::rope::Rope;

/// The model.
pub(super) struct Qwen3 {
    dims: Dims,
    machine: Machine,
    rope: Rope,
    embeddings: Embeddings,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    scratches: Scratches,
}

struct Layer {
    input_layernorm: Vec<f32>,
    q_proj: BitLinear,
    k_proj: BitLinear,
    v_proj: BitLinear,
    q_norm: Vec<f32>,
    k_norm: Vec<f32>,
    o_proj: BitLinear,
    post_attention_layernorm: Vec<f32>,
    gate_proj: BitLinear,
    up_proj: BitLinear,
    down_proj: BitLinear,
}

impl Layer {
    fn new(w: &dyn Weights, m: &Machine, d: &Dims, index: usize) -> Result<Self, Error> {
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let norm = |part: &str, len| vector(w, &format!("{}.weight", name(part)), len);
        let proj = |part: &str, rows, cols| BitLinear::new(w, m, &name(part), rows, cols);
        Ok(Self {
            input_layernorm: norm("input_layernorm", d.hidden)?,
            q_proj: proj("self_attn.q_proj", d.q_width(), d.hidden)?,
            k_proj: proj("self_attn.k_proj", d.kv_width(), d.hidden)?,
            v_proj: proj("self_attn.v_proj", d.kv_width(), d.hidden)?,
            q_norm: norm("self_attn.q_norm", d.head_dim)?,
            k_norm: norm("self_attn.k_norm", d.head_dim)?,
            o_proj: proj("self_attn.o_proj", d.hidden, d.q_width())?,
            post_attention_layernorm: norm("post_attention_layernorm", d.hidden)?,
            gate_proj: proj("mlp.gate_proj", d.intermediate, d.hidden)?,
            up_proj: proj("mlp.up_proj", d.intermediate, d.hidden)?,
            down_proj: proj("mlp.down_proj", d.hidden, d.intermediate)?,
        })
    }

    fn projections(&self) -> [&BitLinear; 7] {
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

    fn norms(&self) -> impl Iterator<Item = &[f32]> {
        let own =
            [&self.input_layernorm, &self.q_norm, &self.k_norm, &self.post_attention_layernorm];
        own.map(|norm| &norm[..])
            .into_iter()
            .chain(self.projections().into_iter().filter_map(BitLinear::norm))
    }
}

impl Qwen3 {
    pub(super) fn new(
        config: &ConfigMap,
        weights: &dyn Weights,
        machine: Machine,
    ) -> Result<Self, Error> {
        let dims = Dims::read(config)?;
        config.hidden_act(&[Activation::Silu])?;
        // First: it stays mapped, and the pages that were read of it may go before the
        // layers take memory.
        let embeddings = Embeddings::new(weights, &machine, &dims)?;
        let layers = (0..dims.n_layers)
            .map(|i| Layer::new(weights, &machine, &dims, i))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            rope: Rope::new(dims.head_dim, dims.rope_theta),
            embeddings,
            norm: vector(weights, "model.norm.weight", dims.hidden)?,
            layers,
            scratches: Scratches::default(),
            machine: machine.stopped(),
            dims,
        })
    }

    fn run(
        &self,
        s: &mut Scratch,
        batch: &mut [Segment<'_>],
        wanted: Wanted<'_>,
    ) -> Result<Logits, Error> {
        let (d, m, eps) = (&self.dims, &self.machine, self.dims.eps);
        s.fit(d)?;
        angles(m, &self.rope, &s.rows, d.head_dim, &mut s.angles);
        embed(&self.embeddings.tokens, batch, &mut s.h);
        m.team.lap("embedding");
        let mut wants = batch::wants(batch, wanted);
        for (index, layer) in self.layers.iter().enumerate() {
            let [q, k, v] = [&layer.q_proj, &layer.k_proj, &layer.v_proj];
            BitLinear::enter([q, k, v], m, d, &layer.input_layernorm, s);
            let qkv = Qkv {
                projections: [&q.w, &k.w, &v.w],
                norms: BitLinear::norms([q, k, v]),
                head_norms: Some([&layer.q_norm, &layer.k_norm]),
            };
            let last = index + 1 == self.layers.len();
            q_k_v(m, d, index, &qkv, s, batch, last.then_some(&mut wants));
            if s.rows.is_empty() {
                break;
            }
            attention(m, d, index, ALL, &s.rows, batch, &s.q, &mut s.parts, &mut s.attended)?;
            m.team.lap("attention");
            layer.o_proj.apply(m, d, &s.attended, &mut s.normed, &mut s.xs, &mut s.delta);
            m.team.lap("o");
            zip_rows(m, &mut s.h, &s.delta, d.hidden, |h, delta| add(m.isa, h, delta));

            let pair = [&layer.gate_proj, &layer.up_proj];
            BitLinear::enter(pair, m, d, &layer.post_attention_layernorm, s);
            BitLinear::gate_up(pair, m, d, Activation::Silu, s);
            m.team.lap("gate, up");
            layer.down_proj.apply(m, d, &s.gate, &mut s.normed, &mut s.xs, &mut s.delta);
            m.team.lap("down");
            zip_rows(m, &mut s.h, &s.delta, d.hidden, |h, delta| add(m.isa, h, delta));
        }
        let Scratch { h, normed, scan, .. } = s;
        let logits = steps::logits(m, h, &wants, &self.norm, eps, &self.embeddings, normed, scan)?;
        batch::commit(batch);
        Ok(logits)
    }
}

impl Model for Qwen3 {
    fn dims(&self) -> &Dims {
        &self.dims
    }

    fn architecture(&self) -> &'static str {
        "qwen3"
    }

    fn machine(&self) -> &Machine {
        &self.machine
    }

    fn facts(&self) -> Facts {
        let projections = self.layers.iter().flat_map(Layer::projections).map(|p| &p.w);
        let norms = self.layers.iter().flat_map(Layer::norms).chain([&self.norm[..]]);
        Facts::count(projections, norms, &self.embeddings)
    }

    fn head_use(&self) -> HeadUse {
        self.embeddings.head_use()
    }

    fn pass(&self, batch: &mut [Segment<'_>], wanted: Wanted<'_>) -> Result<Logits, Error> {
        self.scratches.with(|scratch| {
            batch::rows(self, batch, wanted, &mut scratch.rows)?;
            self.machine.team.run(|| self.run(scratch, batch, wanted))?
        })
    }
}
