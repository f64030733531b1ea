//! What a kernel multiplies weights by: one token's input of a projection, quantized, or
//! as floats, perhaps with a lookup table. Apart from the traits because the rules of
//! quantization and of turning sums back into floats are here, and nowhere else.

use crate::cpu::Isa;
use crate::memory::AlignedBytes;

/// One input of a projection, quantized to int8 by its absolute maximum.
#[derive(Clone, Debug, Default)]
pub struct Prepared {
    /// `q`, then zeros up to a multiple of 256 and 64 more, so that kernels
    /// may read whole registers past the last column.
    pub(super) values: AlignedBytes,
    /// How many of `values` are columns.
    pub(super) cols: usize,
    /// `sum(q)`, which turns sums over codes `t + 1` into sums over `t`.
    pub(super) sum: i32,
    /// `s`: divide by it to get the activation back.
    pub(super) divisor: f32,
    /// What kernels of several scales multiply: activations, or `q`, as float32, then
    /// zeros.
    pub(super) floats: Vec<f32>,
    /// A lookup table of one kernel, and the name of its form.
    pub(super) table: AlignedBytes,
    pub(super) table_form: &'static str,
}

impl Prepared {
    /// Quantizes one token's activations:
    /// `q = clamp(round_half_even(x * s), -128, 127)` with `s = (1 / a) * 127`,
    /// all in float32 (`ActQuant` in transformers' `integrations/bitnet.py`;
    /// `1e-5` is a clamp, never added).
    ///
    /// `s` is rounded twice because torch computes `127 / tensor` as a
    /// reciprocal and a product. The last bit matters: embeddings and norm
    /// weights have few bits, so exact halves `x * s = n + 1/2` are common, and
    /// with one rounding some of them fall to the other side.
    pub fn quantize(&mut self, isa: Isa, x: &[f32]) {
        self.cols = x.len();
        self.table_form = "";
        self.values.resize(x.len().next_multiple_of(256) + 64);
        let (values, padding) = self.values.as_mut_i8().split_at_mut(x.len());
        padding.fill(0);
        let (sum, divisor) = isa.vectorize(
            #[inline(always)]
            || {
                // In arrays of sixteen, since a maximum over a slice stays scalar.
                let (chunks, tail) = x.as_chunks::<16>();
                let mut lanes = [1e-5f32; 16];
                for chunk in chunks {
                    for i in 0..16 {
                        let v = chunk[i].abs();
                        lanes[i] = if v > lanes[i] { v } else { lanes[i] };
                    }
                }
                let all = lanes.iter().copied().chain(tail.iter().map(|v| v.abs()));
                let a = all.fold(1e-5f32, |a, v| if v > a { v } else { a });
                let s = 1.0 / a * 127.0;
                let mut sum = 0;
                // Flat: of chunks of sixteen, the compiler would take several at once, one
                // lane of each.
                for (q, v) in values.iter_mut().zip(x) {
                    let rounded = round_to_i8(v * s);
                    *q = rounded as i8;
                    sum += rounded;
                }
                (sum, s)
            },
        );
        self.sum = sum;
        self.divisor = divisor;
    }

    /// An input that is quantized already, for tests and tools: any int8
    /// values, also -128, which [`quantize`](Prepared::quantize) reaches by no
    /// more than a rounding. `divisor` turns them back into activations. A
    /// lookup table is still to be built ([`Kernel::build_table`](super::Kernel::build_table)).
    #[must_use]
    pub fn from_values(values: &[i8], divisor: f32) -> Self {
        let mut out = Self { cols: values.len(), divisor, ..Self::default() };
        out.values.resize(values.len().next_multiple_of(256) + 64);
        out.values.as_mut_i8()[..values.len()].copy_from_slice(values);
        out.sum = values.iter().map(|&q| i32::from(q)).sum();
        out
    }

    /// The quantized activations, one for each column.
    #[must_use]
    pub fn values(&self) -> &[i8] {
        &self.values.as_i8()[..self.cols]
    }

    /// The quantized activations with their zero padding.
    #[must_use]
    pub(super) fn padded(&self) -> &[i8] {
        self.values.as_i8()
    }

    /// Room for a lookup table of `len` bytes, to be filled by
    /// `build_table` of a kernel whose [`Kernel::table`] is `form`. The old content is kept.
    pub(super) fn table_mut(&mut self, form: &'static str, len: usize) -> &mut [u8] {
        self.table_form = form;
        self.table.resize(len);
        self.table.as_mut_slice()
    }

    /// The lookup table that `build_table` made.
    pub(super) fn table(&self) -> &[u8] {
        self.table.as_slice()
    }

    /// Turns the exact integer sum `acc = sum(q * t)` of a row into its
    /// output. Integers become floats here, and by the same operations in vectors in
    /// `Lines::rescale` of `vlut.rs` and `put` of `avx2_i2_runs.rs`; nowhere else. First
    /// by `s`, then by the weights' scale: the order of `AutoBitLinear` in transformers and
    /// of I2_S in bitnet.cpp (docs/numerics.md has the others that were tried).
    #[inline(always)]
    pub(super) fn rescale(&self, acc: i32, weight_scale: f32) -> f32 {
        acc as f32 / self.divisor * weight_scale
    }
}

/// `clamp(round_half_even(x), -128, 127)`; 0 if `x` is not a number. Adding
/// 1.5 * 2^23 rounds, and leaves the integer in the low bits.
#[inline(always)]
fn round_to_i8(x: f32) -> i32 {
    i32::from((x.clamp(-128.0, 127.0) + 12_582_912.0).to_bits() as i8)
}
