//! The only arithmetic on packed ternary weights.
//!
//! A [`Kernel`] is a way to lay out a ternary matrix and to multiply it by
//! int8 activations. All kernels give the same bits: sums are exact integers,
//! and one expression, `Prepared::rescale`, turns them into floats. The
//! scalar kernels in `generic/` are the definitions; each instruction set has
//! a folder named after the `cfg` that selects it.
//!
//! Kernels are single-threaded. Packing and [`multiply`] split rows over a
//! [`Team`], and nothing else here knows of threads.

// Allocation of cache-line-aligned bytes below, and the entry of each kernel
// into code compiled for an instruction set that its proof type guarantees.
#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::OnceLock;

use crate::cpu::Isa;
use crate::error::{Error, invalid};
use crate::ternary::TernaryMatrix;
use crate::threads::Team;

mod generic;
#[cfg(target_arch = "x86_64")]
mod x86_64;

/// A way to store a ternary matrix and to multiply it by activations.
///
/// A kernel can only be constructed on a CPU that has the instructions it
/// uses, so its methods are safe to call.
///
/// The packed form is a sequence of *row groups* of equal size, so that rows
/// can be packed and multiplied in parallel, split at multiples of
/// [`row_group`](Kernel::row_group).
pub trait Kernel: Send + Sync {
    /// `{isa}-{format}`, such as `avx2-i2`.
    fn name(&self) -> &'static str;

    /// How many rows the layout interleaves.
    fn row_group(&self) -> usize {
        1
    }

    /// Bytes of one packed row group of a matrix with `cols` columns.
    fn group_bytes(&self, cols: usize) -> usize;

    /// Lays out the row group that begins at row `first`, into
    /// [`group_bytes`](Kernel::group_bytes) bytes. Rows past the end of the
    /// matrix are zeros.
    fn pack(&self, w: &TernaryMatrix<'_>, first: usize, out: &mut [u8]);

    /// Quantizes the activations and builds what the rows share, such as a
    /// lookup table. Done once for each input.
    fn prepare(&self, isa: Isa, x: &[f32], out: &mut Prepared) {
        out.quantize(isa, x);
    }

    /// Computes one output for each of `rows`.
    fn gemv(&self, w: &PackedMatrix, rows: Range<usize>, x: &Prepared, y: &mut [f32]);

    /// Computes `rows` for several inputs: `ys[t][r - rows.start]` is row `r`
    /// for `xs[t]`. Overridden where unpacking once for several inputs pays.
    fn gemm(&self, w: &PackedMatrix, rows: Range<usize>, xs: &[Prepared], ys: &mut [&mut [f32]]) {
        for (x, y) in xs.iter().zip(ys) {
            self.gemv(w, rows.clone(), x, y);
        }
    }
}

/// One input of a projection, quantized to int8 by its absolute maximum.
#[derive(Clone, Debug, Default)]
pub struct Prepared {
    /// `q`, then zeros up to a multiple of 256 and 64 more, so that kernels
    /// may read whole registers past the last column.
    values: AlignedBytes,
    /// How many of `values` are columns.
    cols: usize,
    /// `sum(q)`, which turns sums over codes `t + 1` into sums over `t`.
    sum: i32,
    /// `s`: divide by it to get the activation back.
    divisor: f32,
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
        self.values.resize(x.len().next_multiple_of(256) + 64);
        let (values, padding) = self.values.as_mut_i8().split_at_mut(x.len());
        padding.fill(0);
        let (sum, divisor) = isa.vectorize(
            #[inline(always)]
            || {
                let mut lanes = [1e-5f32; 16];
                for chunk in x.chunks(16) {
                    for (m, v) in lanes.iter_mut().zip(chunk) {
                        *m = if v.abs() > *m { v.abs() } else { *m };
                    }
                }
                let a = lanes.iter().fold(1e-5f32, |a, &m| if m > a { m } else { a });
                let s = 1.0 / a * 127.0;
                let mut sum = 0i32;
                for (q, v) in values.iter_mut().zip(x) {
                    let rounded = (v * s).round_ties_even().clamp(-128.0, 127.0);
                    *q = rounded as i8;
                    sum += i32::from(*q);
                }
                (sum, s)
            },
        );
        self.sum = sum;
        self.divisor = divisor;
    }

    /// The quantized activations, one for each column.
    #[must_use]
    pub fn values(&self) -> &[i8] {
        &self.values.as_i8()[..self.cols]
    }

    /// The quantized activations with their zero padding.
    #[must_use]
    fn padded(&self) -> &[i8] {
        self.values.as_i8()
    }

    /// Turns the exact integer sum `acc = sum(q * t)` of a row into its
    /// output. The one place where integers become floats. First by `s`, then
    /// by the weights' scale: the order of `AutoBitLinear` in transformers and
    /// of I2_S in bitnet.cpp (docs/numerics.md has the others that were tried).
    #[inline(always)]
    fn rescale(&self, acc: i32, weight_scale: f32) -> f32 {
        acc as f32 / self.divisor * weight_scale
    }
}

/// Bytes that start on a cache line, so that no 64-byte load crosses two.
#[derive(Clone, Debug, Default)]
struct AlignedBytes {
    lines: Vec<Line>,
    len: usize,
}

#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Line([u8; 64]);

impl AlignedBytes {
    fn zeroed(len: usize) -> Self {
        Self { lines: vec![Line([0; 64]); len.div_ceil(64)], len }
    }

    /// Keeps what fits of the old content; the rest is zero or old.
    fn resize(&mut self, len: usize) {
        self.lines.resize(len.div_ceil(64), Line([0; 64]));
        self.len = len;
    }

    fn as_slice(&self) -> &[u8] {
        // SAFETY: `lines` is an initialized array of plain bytes, at least
        // `len` long by construction.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }

    fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes the borrow unique.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }

    fn as_i8(&self) -> &[i8] {
        // SAFETY: as in `as_slice`; every byte is an i8.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }

    fn as_mut_i8(&mut self) -> &mut [i8] {
        // SAFETY: as in `as_mut_slice`; every byte is an i8, and every i8 a byte.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

/// A matrix in the layout of one kernel, and that kernel: the two cannot be
/// mixed up.
pub struct PackedMatrix {
    kernel: &'static dyn Kernel,
    rows: usize,
    cols: usize,
    scale: f32,
    row_group: usize,
    group_bytes: usize,
    bytes: AlignedBytes,
}

/// Row chunks handed out per thread: more than one, so that a thread that the
/// operating system interrupts does not hold up the others for long.
const CHUNKS_PER_THREAD: usize = 4;

impl PackedMatrix {
    /// Packs `w` for `kernel`, in parallel over rows. Call it inside
    /// [`Team::run`].
    #[must_use]
    pub fn pack(kernel: &'static dyn Kernel, w: &TernaryMatrix<'_>, team: &Team) -> Self {
        let (group, group_bytes) = (kernel.row_group(), kernel.group_bytes(w.cols()));
        let mut bytes = AlignedBytes::zeroed(w.rows().div_ceil(group) * group_bytes);
        team.split(bytes.as_mut_slice(), group_bytes, CHUNKS_PER_THREAD, |start, chunk| {
            for (i, out) in chunk.chunks_exact_mut(group_bytes).enumerate() {
                kernel.pack(w, (start / group_bytes + i) * group, out);
            }
        });
        Self {
            kernel,
            rows: w.rows(),
            cols: w.cols(),
            scale: w.scale(),
            row_group: group,
            group_bytes,
            bytes,
        }
    }

    /// Out-features.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// In-features.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes in memory, all of which a GEMV reads.
    #[must_use]
    pub fn n_bytes(&self) -> usize {
        self.bytes.len
    }

    /// The kernel whose layout this is.
    #[must_use]
    pub fn kernel(&self) -> &'static dyn Kernel {
        self.kernel
    }

    /// The packed bytes of the row group that begins at row `first`.
    #[inline]
    fn group(&self, first: usize) -> &[u8] {
        let n = self.group_bytes;
        &self.bytes.as_slice()[first / self.row_group * n..][..n]
    }
}

/// `y[t * rows + r] = w[r] . xs[t]` for each pair of a matrix and its output:
/// projections of the same input, such as q, k and v, in one dispatch. Rows
/// are split over the team, and weights are read once whatever the number of
/// inputs.
///
/// # Panics
/// If the lengths do not fit: callers are this crate's models.
pub fn multiply<const N: usize>(
    team: &Team,
    xs: &[Prepared],
    products: [(&PackedMatrix, &mut [f32]); N],
) {
    // Each task owns the same rows of every token's output.
    let mut tasks = Vec::new();
    for (w, y) in products {
        assert_eq!(y.len(), xs.len() * w.rows, "output length");
        assert!(xs.iter().all(|x| x.cols == w.cols), "input length");
        let parts = team.columns(y, w.rows, w.row_group, CHUNKS_PER_THREAD);
        tasks.extend(parts.into_iter().map(|(range, ys)| (w, range, ys)));
    }
    team.for_each(&mut tasks, |(w, range, parts)| match (xs, &mut parts[..]) {
        ([x], [y]) => w.kernel.gemv(w, range.clone(), x, y),
        (xs, ys) => w.kernel.gemm(w, range.clone(), xs, ys),
    });
}

/// Kernels that `isa` can run, fastest first; the last is scalar.
#[must_use]
pub fn available(isa: Isa) -> Vec<&'static dyn Kernel> {
    static ALL: OnceLock<Vec<(Isa, Box<dyn Kernel>)>> = OnceLock::new();
    let all = ALL.get_or_init(|| {
        let mut kernels: Vec<(Isa, Box<dyn Kernel>)> = Vec::new();
        for isa in Isa::available().into_iter().rev() {
            #[cfg(target_arch = "x86_64")]
            x86_64::register(isa, &mut kernels);
            if isa == Isa::GENERIC {
                generic::register(&mut kernels);
            }
        }
        kernels
    });
    all.iter().filter(|(needs, _)| *needs <= isa).map(|(_, kernel)| kernel.as_ref()).collect()
}

/// The kernel called `name`, or the fastest one.
///
/// # Errors
/// A name that is not in [`available`].
pub fn by_name(isa: Isa, name: Option<&str>) -> Result<&'static dyn Kernel, Error> {
    let kernels = available(isa);
    match name {
        None => Ok(kernels[0]),
        Some(name) => kernels.iter().find(|k| k.name() == name).copied().ok_or_else(|| {
            let names: Vec<_> = kernels.iter().map(|k| k.name()).collect();
            invalid!("unknown kernel {name:?}; this machine has {}", names.join(", "))
        }),
    }
}
