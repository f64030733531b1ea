//! The gated activations of the feed-forward network.

use super::exp::exp;
use crate::cpu::Isa;

/// Which function gates the feed-forward network (`hidden_act`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Activation {
    /// `relu(x)^2`: `"relu2"`.
    Relu2,
    /// `x / (1 + e^-x)`: `"silu"`.
    Silu,
    /// `x / (1 + e^-2u)`, `u = sqrt(2 / pi) (x + 0.044715 x^3)`:
    /// `"gelu_pytorch_tanh"`, which is written `x (1 + tanh u) / 2`.
    GeluTanh,
}

/// `gate[i] = activation(gate[i]) * up[i]`.
pub fn gate_up(isa: Isa, activation: Activation, gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len(), "lengths differ");
    match activation {
        Activation::Relu2 => isa.vectorize(
            #[inline(always)]
            || {
                for (g, &u) in gate.iter_mut().zip(up) {
                    let relu = if *g > 0.0 { *g } else { 0.0 };
                    *g = relu * relu * u;
                }
            },
        ),
        Activation::Silu => isa.vectorize(
            #[inline(always)]
            || {
                for (g, &u) in gate.iter_mut().zip(up) {
                    *g = *g / (1.0 + exp(-*g)) * u;
                }
            },
        ),
        Activation::GeluTanh => isa.vectorize(
            #[inline(always)]
            || {
                /// `2 sqrt(2 / pi)`.
                const SLOPE: f32 = 1.595_769;
                for (g, &u) in gate.iter_mut().zip(up) {
                    let x = *g;
                    let cubic = (x * x * x).mul_add(0.044_715, x);
                    *g = x / (1.0 + exp(-SLOPE * cubic)) * u;
                }
            },
        ),
    }
}

/// `x[i] += y[i]`: the residual connection.
pub fn add(isa: Isa, x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len(), "lengths differ");
    isa.vectorize(
        #[inline(always)]
        || {
            for (x, &y) in x.iter_mut().zip(y) {
                *x += y;
            }
        },
    );
}
