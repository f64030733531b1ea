//! `llama`: a Llama whose projections are ternary. Llama3-8B-1.58,
//! Falcon3-1.58bit, Falcon-E.
//!
//! Follows `LlamaForCausalLM` in transformers' `modeling_llama.py` with every
//! projection a `BitLinear`: no sub-norms, SiLU.

use super::batch::{self, Segment, Wanted};
use super::frame::{Architecture, Frame};
use super::scratch::Scratch;
use super::steps::{Qkv, angles, attention, embed, norm_prepare, prepare, q_k_v, zip_rows};
use super::weights::{ternary, vector};
use super::{ConfigMap, Dims, Logits, Machine, Weights};
use crate::error::Error;
use crate::kernels::{PackedMatrix, multiply, multiply_pair};
use crate::ops::activation::{Activation, add, gate_up};
use crate::ops::attention::ALL;
use crate::ops::rope::Rope;

/// The model.
pub(super) struct Llama {
    frame: Frame,
    rope: Rope,
    layers: Vec<Layer>,
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
        let rope = Rope::new(dims.head_dim, dims.rope_theta);
        let (frame, layers) =
            Frame::new(dims, weights, machine, |m, d, i| Layer::new(weights, m, d, i))?;
        Ok(Self { frame, rope, layers })
    }
}

impl Architecture for Llama {
    const NAME: &'static str = "llama";

    fn frame(&self) -> &Frame {
        &self.frame
    }

    fn projections(&self) -> impl Iterator<Item = &PackedMatrix> {
        self.layers.iter().flat_map(Layer::projections)
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
        let eps = d.eps;
        s.fit(d)?;
        angles(m, &self.rope, &s.rows, d.head_dim, &mut s.angles);
        embed(&embeddings.tokens, batch, &mut s.h);
        m.team.lap("embedding");
        let mut wants = batch::wants(batch, wanted);
        for (index, layer) in self.layers.iter().enumerate() {
            norm_prepare(m, &s.h, &layer.input_layernorm, eps, &mut s.normed, &mut s.xs);
            m.team.lap("norm, quantize");
            let qkv = Qkv {
                projections: [&layer.q_proj, &layer.k_proj, &layer.v_proj],
                norms: None,
                head_norms: None,
            };
            let last = index + 1 == self.layers.len();
            q_k_v(m, d, index, &qkv, s, batch, last.then_some(&mut wants));
            if s.rows.is_empty() {
                break;
            }
            attention(m, d, index, ALL, &s.rows, batch, &s.q, &mut s.parts, &mut s.attended)?;
            m.team.lap("attention");
            prepare(m, &s.attended, d.q_width(), &mut s.xs);
            m.team.lap("norm, quantize");
            multiply(&m.team, &s.xs, [(&layer.o_proj, &mut s.delta)]);
            m.team.lap("o");
            zip_rows(m, &mut s.h, &s.delta, d.hidden, |h, delta| add(m.isa, h, delta));

            norm_prepare(m, &s.h, &layer.post_attention_layernorm, eps, &mut s.normed, &mut s.xs);
            m.team.lap("norm, quantize");
            let pair = [(&layer.gate_proj, &mut s.gate[..]), (&layer.up_proj, &mut s.up)];
            multiply_pair(&m.team, &s.xs, pair, |gate, up| {
                gate_up(m.isa, Activation::Silu, gate, up)
            });
            m.team.lap("gate, up");
            prepare(m, &s.gate, d.intermediate, &mut s.xs);
            m.team.lap("norm, quantize");
            multiply(&m.team, &s.xs, [(&layer.down_proj, &mut s.delta)]);
            m.team.lap("down");
            zip_rows(m, &mut s.h, &s.delta, d.hidden, |h, delta| add(m.isa, h, delta));
        }
        self.frame.finish(m, s, &wants)
    }
}
