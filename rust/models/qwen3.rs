//! `qwen3`: a Qwen3 whose projections are ternary. Ternary-Bonsai, and
//! microsoft/bitnet-embedding-0.6b.
//!
//! Follows `Qwen3ForCausalLM` in transformers' `modeling_qwen3.py`: queries and keys
//! are normalized head by head, SiLU. In the embedding models every projection has a
//! norm of its own in front, as `BitLinear` in the training tips of BitNet b1.58
//! (`<projection>.norm.weight`), besides those of the block.

use super::batch::{self, Segment, Wanted};
use super::bit_linear::BitLinear;
use super::frame::{Architecture, Frame};
use super::scratch::Scratch;
use super::steps::{Qkv, angles, attention, embed, q_k_v, zip_rows};
use super::weights::vector;
use super::{ConfigMap, Dims, Logits, Machine, Weights};
use crate::error::Error;
use crate::kernels::PackedMatrix;
use crate::ops::activation::{Activation, add};
use crate::ops::attention::ALL;
use crate::ops::rope::Rope;

/// The model.
pub(super) struct Qwen3 {
    frame: Frame,
    rope: Rope,
    layers: Vec<Layer>,
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
        let rope = Rope::new(dims.head_dim, dims.rope_theta);
        let (frame, layers) =
            Frame::new(dims, weights, machine, |m, d, i| Layer::new(weights, m, d, i))?;
        Ok(Self { frame, rope, layers })
    }
}

impl Architecture for Qwen3 {
    const NAME: &'static str = "qwen3";

    fn frame(&self) -> &Frame {
        &self.frame
    }

    fn projections(&self) -> impl Iterator<Item = &PackedMatrix> {
        self.layers.iter().flat_map(Layer::projections).map(|p| &p.w)
    }

    fn norms(&self) -> impl Iterator<Item = &[f32]> {
        self.layers.iter().flat_map(Layer::norms)
    }

    fn run(
        &self,
        m: &Machine,
        s: &mut Scratch,
        batch: &mut [Segment<'_>],
        wanted: Wanted<'_>,
    ) -> Result<Logits, Error> {
        let Frame { dims: d, embeddings, .. } = &self.frame;
        s.fit(d)?;
        angles(m, &self.rope, &s.rows, d.head_dim, &mut s.angles);
        embed(&embeddings.tokens, batch, &mut s.h);
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
        self.frame.finish(m, s, &wants)
    }
}
