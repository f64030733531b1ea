//! Projections that may have a norm of their own in front of the quantizer, and the
//! steps that differ by it. For the architectures that exist with and without such
//! norms, which read the same either way.

use super::scratch::Scratch;
use super::steps::{norm_prepare, norm_rows, prepare};
use super::weights::{ternary, vector};
use super::{Dims, Machine, Weights};
use crate::error::Error;
use crate::kernels::{PackedMatrix, Prepared, multiply, multiply_pair};
use crate::ops::activation::{Activation, gate_up};

/// A ternary matrix and perhaps its norm: `BitLinear` of the training tips.
pub(super) struct BitLinear {
    norm: Option<Vec<f32>>,
    pub(super) w: PackedMatrix,
}

impl BitLinear {
    /// Takes `<name>.weight` and, if there is one, `<name>.norm.weight`.
    ///
    /// # Errors
    /// As [`ternary`] and [`vector`].
    pub(super) fn new(
        weights: &dyn Weights,
        machine: &Machine,
        name: &str,
        rows: usize,
        cols: usize,
    ) -> Result<Self, Error> {
        let norm = format!("{name}.norm.weight");
        let norm =
            if weights.contains(&norm)? { Some(vector(weights, &norm, cols)?) } else { None };
        Ok(Self { norm, w: ternary(weights, machine, &format!("{name}.weight"), rows, cols)? })
    }

    /// Its norm's weight.
    pub(super) fn norm(&self) -> Option<&[f32]> {
        self.norm.as_deref()
    }

    /// Those of several, if all have one.
    pub(super) fn norms<const N: usize>(all: [&Self; N]) -> Option<[&[f32]; N]> {
        let norms = all.map(|p| p.norm.as_deref());
        norms.iter().all(Option::is_some).then(|| norms.map(Option::unwrap_or_default))
    }

    /// The norm of a block, in front of several projections: where each has one of its
    /// own, `s.a` becomes what they take, else `s.xs`.
    pub(super) fn enter<const N: usize>(
        all: [&Self; N],
        m: &Machine,
        d: &Dims,
        block_norm: &[f32],
        s: &mut Scratch,
    ) {
        if Self::norms(all).is_some() {
            norm_rows(m, &s.h, block_norm, d.eps, &mut s.a);
        } else {
            norm_prepare(m, &s.h, block_norm, d.eps, &mut s.normed, &mut s.xs);
        }
        m.team.lap("norm, quantize");
    }

    /// `out[row] = projection of x[row]`.
    pub(super) fn apply(
        &self,
        m: &Machine,
        d: &Dims,
        x: &[f32],
        normed: &mut [f32],
        xs: &mut [Prepared],
        out: &mut [f32],
    ) {
        match &self.norm {
            Some(norm) => norm_prepare(m, x, norm, d.eps, normed, xs),
            None => prepare(m, x, self.w.cols(), xs),
        }
        m.team.lap("norm, quantize");
        multiply(&m.team, xs, [(&self.w, out)]);
    }

    /// `s.gate[row] = activation(gate) * up`, after [`enter`](Self::enter).
    pub(super) fn gate_up(
        pair: [&Self; 2],
        m: &Machine,
        d: &Dims,
        activation: Activation,
        s: &mut Scratch,
    ) {
        let Scratch { a, normed, xs, gate, up, .. } = s;
        if let [Some(_), Some(_)] = pair.map(|p| &p.norm) {
            for (projection, out) in pair.into_iter().zip([&mut *gate, up]) {
                projection.apply(m, d, a, normed, xs, out);
            }
            m.team.split(gate, 1, 4, |start, gate| {
                gate_up(m.isa, activation, gate, &up[start..start + gate.len()]);
            });
        } else {
            let [g, u] = pair;
            multiply_pair(&m.team, xs, [(&g.w, gate), (&u.w, up)], |gate, up| {
                gate_up(m.isa, activation, gate, up);
            });
        }
    }
}
