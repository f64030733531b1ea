//! `gemma3_text`: a Gemma 3 whose projections are ternary.
//! microsoft/bitnet-embedding-270m.
//!
//! Follows `Gemma3ForCausalLM` in transformers' `modeling_gemma3.py`: embeddings times
//! the root of their width, queries and keys normalized head by head, norms before
//! *and* after both halves of a block, GELU by tanh, and two kinds of layers with
//! rotary bases of their own. In the embedding models every projection has a norm
//! of its own in front (`bit_linear.rs`).
//!
//! Weights of norms arrive as they multiply, `1 + w`; those of projections' norms are
//! plain. Layers of the kind `sliding_attention` see a window of the last tokens.

use super::batch::{self, Segment, Wanted};
use super::bit_linear::BitLinear;
use super::frame::{Architecture, Frame};
use super::scratch::Scratch;
use super::steps::{Qkv, angles, attention, embed, norm_rows, q_k_v, zip_rows};
use super::weights::vector;
use super::{ConfigMap, Dims, Logits, Machine, Weights};
use crate::error::{Error, invalid};
use crate::kernels::PackedMatrix;
use crate::ops::activation::{Activation, add};
use crate::ops::attention::ALL;
use crate::ops::rope::Rope;

/// The model.
pub(super) struct Gemma3 {
    frame: Frame,
    /// Of layers that attend to everything, and of those with a window.
    ropes: [Rope; 2],
    /// Tokens that the latter see.
    window: usize,
    embed_scale: f32,
    layers: Vec<Layer>,
}

struct Layer {
    sliding: bool,
    input_layernorm: Vec<f32>,
    q_proj: BitLinear,
    k_proj: BitLinear,
    v_proj: BitLinear,
    q_norm: Vec<f32>,
    k_norm: Vec<f32>,
    o_proj: BitLinear,
    post_attention_layernorm: Vec<f32>,
    pre_feedforward_layernorm: Vec<f32>,
    gate_proj: BitLinear,
    up_proj: BitLinear,
    down_proj: BitLinear,
    post_feedforward_layernorm: Vec<f32>,
}

impl Layer {
    fn new(
        w: &dyn Weights,
        m: &Machine,
        d: &Dims,
        index: usize,
        sliding: bool,
    ) -> Result<Self, Error> {
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let norm = |part: &str, len| vector(w, &format!("{}.weight", name(part)), len);
        let proj = |part: &str, rows, cols| BitLinear::new(w, m, &name(part), rows, cols);
        Ok(Self {
            sliding,
            input_layernorm: norm("input_layernorm", d.hidden)?,
            q_proj: proj("self_attn.q_proj", d.q_width(), d.hidden)?,
            k_proj: proj("self_attn.k_proj", d.kv_width(), d.hidden)?,
            v_proj: proj("self_attn.v_proj", d.kv_width(), d.hidden)?,
            q_norm: norm("self_attn.q_norm", d.head_dim)?,
            k_norm: norm("self_attn.k_norm", d.head_dim)?,
            o_proj: proj("self_attn.o_proj", d.hidden, d.q_width())?,
            post_attention_layernorm: norm("post_attention_layernorm", d.hidden)?,
            pre_feedforward_layernorm: norm("pre_feedforward_layernorm", d.hidden)?,
            gate_proj: proj("mlp.gate_proj", d.intermediate, d.hidden)?,
            up_proj: proj("mlp.up_proj", d.intermediate, d.hidden)?,
            down_proj: proj("mlp.down_proj", d.hidden, d.intermediate)?,
            post_feedforward_layernorm: norm("post_feedforward_layernorm", d.hidden)?,
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
        let own = [
            &self.input_layernorm,
            &self.q_norm,
            &self.k_norm,
            &self.post_attention_layernorm,
            &self.pre_feedforward_layernorm,
            &self.post_feedforward_layernorm,
        ];
        own.map(|norm| &norm[..])
            .into_iter()
            .chain(self.projections().into_iter().filter_map(BitLinear::norm))
    }
}

/// Which layers have a window, from `layer_kinds`: "s" or "f" (full) for each layer.
/// Loaders make it of the lists that files have.
fn kinds(config: &ConfigMap, n_layers: usize) -> Result<Vec<bool>, Error> {
    if config.get("layer_kinds").is_none() {
        return Ok(vec![false; n_layers]);
    }
    let found = config.str("layer_kinds")?;
    if found.len() != n_layers || !found.bytes().all(|kind| matches!(kind, b's' | b'f')) {
        return Err(invalid!(
            "config field layer_kinds is {found:?}; wanted {n_layers} letters, s (sliding) or f \
             (full attention)"
        ));
    }
    Ok(found.bytes().map(|kind| kind == b's').collect())
}

impl Gemma3 {
    pub(super) fn new(
        config: &ConfigMap,
        weights: &dyn Weights,
        machine: Machine,
    ) -> Result<Self, Error> {
        let dims = Dims::read(config)?;
        config.hidden_act(&[Activation::GeluTanh])?;
        for field in ["attn_logit_softcapping", "final_logit_softcapping"] {
            if config.get(field).is_some() {
                return Err(invalid!("config field {field} is set; only null is supported"));
            }
        }
        if config.flag_or("use_bidirectional_attention", false)? {
            return Err(invalid!(
                "config field use_bidirectional_attention is true; only causal attention is \
                 supported"
            ));
        }
        if config.number("query_pre_attn_scalar")? != dims.head_dim as f64 {
            return Err(invalid!(
                "config field query_pre_attn_scalar is {}; only head_dim, {}, is supported",
                config.number("query_pre_attn_scalar")?,
                dims.head_dim
            ));
        }
        let kinds = kinds(config, dims.n_layers)?;
        let (mut window, mut local_theta) = (ALL, dims.rope_theta);
        if kinds.contains(&true) {
            window = config.count("sliding_window")?;
            local_theta = config.number("rope_local_base_freq")?;
            if local_theta <= 0.0 {
                return Err(invalid!(
                    "config field rope_local_base_freq is {local_theta}; wanted more than 0"
                ));
            }
        }
        let ropes = [dims.rope_theta, local_theta].map(|theta| Rope::new(dims.head_dim, theta));
        // In float32, as transformers has it where the weights are.
        let embed_scale = (dims.hidden as f64).sqrt() as f32;
        let (frame, layers) =
            Frame::new(dims, weights, machine, |m, d, i| Layer::new(weights, m, d, i, kinds[i]))?;
        Ok(Self { frame, ropes, window, embed_scale, layers })
    }
}

impl Architecture for Gemma3 {
    const NAME: &'static str = "gemma3_text";

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
        let eps = d.eps;
        s.fit(d)?;
        // Those of the first layer in front.
        let mut sliding = self.layers.first().is_some_and(|layer| layer.sliding);
        let [rope, other] = [sliding, !sliding].map(|kind| &self.ropes[usize::from(kind)]);
        angles(m, rope, &s.rows, d.head_dim, &mut s.angles);
        if self.layers.iter().any(|layer| layer.sliding != sliding) {
            angles(m, other, &s.rows, d.head_dim, &mut s.other_angles);
        }
        embed(&embeddings.tokens, batch, &mut s.h);
        s.h.iter_mut().for_each(|x| *x *= self.embed_scale);
        m.team.lap("embedding");
        let mut wants = batch::wants(batch, wanted);
        for (index, layer) in self.layers.iter().enumerate() {
            if layer.sliding != sliding {
                std::mem::swap(&mut s.angles, &mut s.other_angles);
                sliding = layer.sliding;
            }
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
            let window = if layer.sliding { self.window } else { ALL };
            attention(m, d, index, window, &s.rows, batch, &s.q, &mut s.parts, &mut s.attended)?;
            m.team.lap("attention");
            layer.o_proj.apply(m, d, &s.attended, &mut s.normed, &mut s.xs, &mut s.delta);
            m.team.lap("o");
            norm_rows(m, &s.delta, &layer.post_attention_layernorm, eps, &mut s.a);
            zip_rows(m, &mut s.h, &s.a, d.hidden, |h, delta| add(m.isa, h, delta));

            let pair = [&layer.gate_proj, &layer.up_proj];
            BitLinear::enter(pair, m, d, &layer.pre_feedforward_layernorm, s);
            BitLinear::gate_up(pair, m, d, Activation::GeluTanh, s);
            m.team.lap("gate, up");
            layer.down_proj.apply(m, d, &s.gate, &mut s.normed, &mut s.xs, &mut s.delta);
            m.team.lap("down");
            norm_rows(m, &s.delta, &layer.post_feedforward_layernorm, eps, &mut s.a);
            zip_rows(m, &mut s.h, &s.a, d.hidden, |h, delta| add(m.isa, h, delta));
        }
        self.frame.finish(m, s, &wants)
    }
}
