//! `config.json` as the core sees it, and the sizes every architecture has.
//! Fields that change the maths are refused when their value is unknown,
//! never ignored.

use std::collections::HashMap;

use crate::error::{Error, invalid};
use crate::kernels::{Activations, Projection};
use crate::ops::activation::Activation;
use crate::ternary::MAX_COLS;

/// A value of `config.json`; lists are of no use here and stay opaque.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// `null`, the same as an absent field.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A number without a fraction.
    Int(i64),
    /// Any other number.
    Float(f64),
    /// Text.
    Str(String),
    /// An object.
    Map(ConfigMap),
    /// Anything else, described.
    Other(String),
}

/// An object of `config.json`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ConfigMap(pub HashMap<String, Value>);

impl ConfigMap {
    pub(super) fn get(&self, field: &str) -> Option<&Value> {
        self.0.get(field).filter(|v| **v != Value::Null)
    }

    /// A text field.
    ///
    /// # Errors
    /// Absent, or something else.
    pub fn str(&self, field: &str) -> Result<&str, Error> {
        match self.get(field) {
            Some(Value::Str(s)) => Ok(s),
            found => Err(mismatch(field, found, "text")),
        }
    }

    /// What projections multiply: `activations`, which is "int8" or "float". Loaders say
    /// it; files have no such field.
    ///
    /// # Errors
    /// Another value.
    pub fn activations(&self) -> Result<Activations, Error> {
        if self.get("activations").is_none() {
            return Ok(Activations::Int8);
        }
        let found = self.str("activations")?;
        [Activations::Int8, Activations::Float].into_iter().find(|a| a.name() == found).ok_or_else(
            || invalid!("config field activations is {found:?}; wanted \"int8\" or \"float\""),
        )
    }

    pub(super) fn count(&self, field: &str) -> Result<usize, Error> {
        match self.get(field) {
            // Beyond 2^31 no size is real, and products of two could overflow.
            Some(&Value::Int(n)) if (1..1 << 31).contains(&n) => Ok(n as usize),
            found => Err(mismatch(field, found, "a whole number of at least 1")),
        }
    }

    fn count_or(&self, field: &str, default: usize) -> Result<usize, Error> {
        self.get(field).map_or(Ok(default), |_| self.count(field))
    }

    pub(super) fn number(&self, field: &str) -> Result<f64, Error> {
        match self.get(field) {
            Some(&Value::Int(n)) => Ok(n as f64),
            Some(&Value::Float(x)) if x.is_finite() => Ok(x),
            found => Err(mismatch(field, found, "a number")),
        }
    }

    pub(super) fn flag_or(&self, field: &str, default: bool) -> Result<bool, Error> {
        match self.get(field) {
            None => Ok(default),
            Some(&Value::Bool(b)) => Ok(b),
            found => Err(mismatch(field, found, "true or false")),
        }
    }

    fn map(&self, field: &str) -> Result<Option<&ConfigMap>, Error> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Map(map)) => Ok(Some(map)),
            found => Err(mismatch(field, found, "an object or null")),
        }
    }

    /// The gate's activation, if it is one of `known`.
    ///
    /// # Errors
    /// Another one.
    pub(super) fn hidden_act(&self, known: &[Activation]) -> Result<Activation, Error> {
        let name = |a: &Activation| match a {
            Activation::Relu2 => "relu2",
            Activation::Silu => "silu",
            Activation::GeluTanh => "gelu_pytorch_tanh",
        };
        let found = self.str("hidden_act")?;
        known.iter().find(|a| name(a) == found).copied().ok_or_else(|| {
            let wanted: Vec<_> = known.iter().map(|a| format!("{:?}", name(a))).collect();
            invalid!("config field hidden_act is {found:?}; wanted {}", wanted.join(" or "))
        })
    }

    /// Refuses a rotary embedding of a part of each head.
    fn whole_rotary(&self, parent: &str) -> Result<(), Error> {
        let field = "partial_rotary_factor";
        if self.get(field).is_some() && self.number(field)? != 1.0 {
            return Err(invalid!("config field {parent}{field}: only 1.0 is supported"));
        }
        Ok(())
    }

    /// The base of the rotary embedding, from `rope_parameters` (transformers
    /// 5) or `rope_theta` (before). Scaled embeddings are refused.
    fn rope_theta(&self) -> Result<f64, Error> {
        for field in ["rope_scaling", "rope_parameters"] {
            let Some(map) = self.map(field)? else { continue };
            for key in ["rope_type", "type"] {
                if map.get(key).is_some() && map.str(key)? != "default" {
                    return Err(invalid!(
                        "config field {field}.{key} is {:?}; only unscaled rotary embeddings \
                         (\"default\" or null) are supported",
                        map.str(key)?
                    ));
                }
            }
            // A factor without a type would scale in some readers and not in others.
            if let Some(key) = map.0.keys().find(|k| {
                !matches!(k.as_str(), "rope_type" | "type" | "rope_theta" | "partial_rotary_factor")
                    && map.get(k).is_some()
            }) {
                return Err(invalid!(
                    "config field {field}.{key} is not supported; only unscaled rotary embeddings \
                     are"
                ));
            }
            map.whole_rotary(&format!("{field}."))?;
        }
        self.whole_rotary("")?;
        let theta = match self.map("rope_parameters")? {
            Some(map) if map.get("rope_theta").is_some() => map.number("rope_theta")?,
            _ => self.number("rope_theta")?,
        };
        if theta <= 0.0 {
            return Err(invalid!("config field rope_theta is {theta}; wanted more than 0"));
        }
        Ok(theta)
    }
}

fn mismatch(field: &str, found: Option<&Value>, wanted: &str) -> Error {
    let found = match found {
        None => return invalid!("config field {field} is missing; wanted {wanted}"),
        Some(Value::Null) => "null".to_owned(),
        Some(Value::Bool(b)) => b.to_string(),
        Some(Value::Int(n)) => n.to_string(),
        Some(Value::Float(x)) => x.to_string(),
        Some(Value::Str(s)) => format!("{s:?}"),
        Some(Value::Map(_)) => "an object".to_owned(),
        Some(Value::Other(what)) => what.clone(),
    };
    invalid!("config field {field} is {found}; wanted {wanted}")
}

/// The sizes and constants that every architecture has.
#[derive(Clone, Debug)]
pub struct Dims {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward network.
    pub intermediate: usize,
    /// Transformer blocks.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key/value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Elements of a head; even.
    pub head_dim: usize,
    /// Rows of logits.
    pub vocab: usize,
    /// Added to the mean square in RMSNorm.
    pub eps: f32,
    /// Base of the rotary embedding.
    pub rope_theta: f64,
    /// Positions the model was made for.
    pub max_positions: usize,
    /// Whether the `lm_head` is the token embedding.
    pub tied: bool,
}

impl Dims {
    /// Reads and checks them. Names and defaults are those of transformers'
    /// `BitNetConfig` and `LlamaConfig`, where they agree.
    ///
    /// # Errors
    /// A field that is missing, of the wrong type or out of range; biases.
    pub fn read(config: &ConfigMap) -> Result<Self, Error> {
        for field in ["attention_bias", "mlp_bias"] {
            if config.flag_or(field, false)? {
                return Err(invalid!("config field {field} is true; biases are not supported"));
            }
        }
        let hidden = config.count("hidden_size")?;
        let n_heads = config.count("num_attention_heads")?;
        if config.get("head_dim").is_none() && !hidden.is_multiple_of(n_heads) {
            return Err(invalid!(
                "config has hidden_size {hidden} and {n_heads} num_attention_heads, which does not \
                 divide it, and no head_dim"
            ));
        }
        let dims = Self {
            hidden,
            intermediate: config.count("intermediate_size")?,
            n_layers: config.count("num_hidden_layers")?,
            n_heads,
            n_kv_heads: config.count_or("num_key_value_heads", n_heads)?,
            head_dim: config.count_or("head_dim", hidden / n_heads)?,
            vocab: config.count("vocab_size")?,
            eps: config.number("rms_norm_eps")? as f32,
            rope_theta: config.rope_theta()?,
            max_positions: config.count("max_position_embeddings")?,
            tied: config.flag_or("tie_word_embeddings", false)?,
        };
        if !n_heads.is_multiple_of(dims.n_kv_heads) {
            return Err(invalid!(
                "config field num_key_value_heads is {}; wanted a divisor of {n_heads} \
                 num_attention_heads",
                dims.n_kv_heads
            ));
        }
        if !dims.head_dim.is_multiple_of(2) {
            return Err(invalid!(
                "config field head_dim is {}; wanted an even number (rotary embedding)",
                dims.head_dim
            ));
        }
        let attention = n_heads.saturating_mul(dims.head_dim);
        for (what, cols) in [
            ("hidden_size", hidden),
            ("intermediate_size", dims.intermediate),
            ("num_attention_heads times head_dim", attention),
        ] {
            if cols >= MAX_COLS {
                return Err(invalid!(
                    "config has {what} {cols}; sums stay exact only below {MAX_COLS}"
                ));
            }
        }
        if !(dims.eps > 0.0 && dims.eps < 1.0) {
            return Err(invalid!("config field rms_norm_eps is {}; wanted 0 to 1", dims.eps));
        }
        Ok(dims)
    }

    /// The ternary matrices that a token is multiplied by, equal shapes
    /// together: q, k, v and o of attention; gate, up and down of the
    /// feed-forward network.
    #[must_use]
    pub fn projections(&self) -> Vec<Projection> {
        let (q, kv) = (self.q_width(), self.kv_width());
        let mut shapes: Vec<Projection> = Vec::new();
        for (rows, cols, n) in [
            (q, self.hidden, 1),
            (kv, self.hidden, 2),
            (self.hidden, q, 1),
            (self.intermediate, self.hidden, 2),
            (self.hidden, self.intermediate, 1),
        ] {
            let count = n * self.n_layers;
            match shapes.iter_mut().find(|p| (p.rows, p.cols) == (rows, cols)) {
                Some(same) => same.count += count,
                None => shapes.push(Projection { rows, cols, count }),
            }
        }
        shapes
    }

    /// Elements of all query heads.
    #[must_use]
    pub fn q_width(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Elements of all key (or value) heads.
    #[must_use]
    pub fn kv_width(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }
}
