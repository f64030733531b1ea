//! Named tensors in, packed matrices out: one tensor at a time, so that
//! loading needs the packed model and one tensor of memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Dims, HeadUse, Machine};
use crate::error::{Error, invalid};
use crate::floats::{Bf16, Element, F16};
use crate::kernels::PackedMatrix;
use crate::ops::dense::{DenseMatrix, Floats};
use crate::ops::head::{ScanRows, TopLogits};
use crate::ternary::{QUARTERS, TernaryMatrix, abs_sum, absmean_row, absmean_scale};
use crate::threads::Team;

/// A tensor by name, borrowed while it is converted.
pub struct Tensor<'a> {
    /// Sizes, slowest first.
    pub shape: &'a [usize],
    /// Elements, row-major.
    pub data: TensorData<'a>,
}

/// Elements of a tensor, as stored.
#[derive(Clone, Copy)]
pub enum TensorData<'a> {
    /// Trits.
    I8(&'a [i8]),
    /// Trits as [`TernaryMatrix::from_quarters`] takes them.
    U8(&'a [u8]),
    /// float32.
    F32(&'a [f32]),
    /// float16 bits.
    F16(&'a [u16]),
    /// bfloat16 bits.
    Bf16(&'a [u16]),
}

impl TensorData<'_> {
    fn dtype(&self) -> &'static str {
        match self {
            TensorData::I8(_) => "int8",
            TensorData::U8(_) => "uint8",
            TensorData::F32(_) => "float32",
            TensorData::F16(_) => "float16",
            TensorData::Bf16(_) => "bfloat16 (as uint16)",
        }
    }
}

/// What is done with a tensor while it is there. May run on any thread.
pub type Visit<'v> = dyn FnMut(&Tensor<'_>) -> Result<(), Error> + Send + 'v;

/// A source of tensors by canonical name.
pub trait Weights {
    /// Whether there is a tensor called `name`.
    ///
    /// # Errors
    /// The source failed.
    fn contains(&self, name: &str) -> Result<bool, Error>;

    /// Fetches a tensor, calls `visit` with it once, and lets it go.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], a failure of the source, or what `visit` returned.
    fn visit(&self, name: &str, visit: &mut Visit<'_>) -> Result<(), Error>;

    /// Fetches a tensor of floats for good, with its shape: a source that can
    /// leave it where it is, does.
    ///
    /// # Errors
    /// As [`visit`](Weights::visit); int8 elements.
    fn keep(&self, name: &str) -> Result<(Vec<usize>, Floats), Error> {
        let mut out = None;
        self.visit(name, &mut |tensor| {
            let floats = match tensor.data {
                TensorData::F32(v) => Floats::F32(Arc::new(v.to_vec())),
                TensorData::F16(v) => {
                    Floats::F16(Arc::new(v.iter().map(|&b| F16(b)).collect::<Vec<_>>()))
                }
                TensorData::Bf16(v) => {
                    Floats::Bf16(Arc::new(v.iter().map(|&b| Bf16(b)).collect::<Vec<_>>()))
                }
                TensorData::I8(_) | TensorData::U8(_) => {
                    let found = tensor.data.dtype();
                    return named(name, Err(invalid!("has dtype {found}; wanted floats")));
                }
            };
            out = Some((tensor.shape.to_vec(), floats));
            Ok(())
        })?;
        out.ok_or_else(|| Error::MissingTensor(name.to_owned()))
    }
}

/// Names the tensor in an error about its content.
fn named<T>(name: &str, result: Result<T, Error>) -> Result<T, Error> {
    result.map_err(|e| match e {
        Error::Invalid(message) => invalid!("tensor {name:?}: {message}"),
        other => other,
    })
}

fn check_shape(shape: &[usize], wanted: &[usize]) -> Result<(), Error> {
    if shape != wanted {
        return Err(invalid!("has shape {shape:?}; wanted {wanted:?} by the sizes in the config"));
    }
    Ok(())
}

/// A vector of float32, such as the weight of a norm.
pub(super) fn vector(weights: &dyn Weights, name: &str, len: usize) -> Result<Vec<f32>, Error> {
    let mut out = Vec::new();
    weights.visit(name, &mut |tensor| {
        named(name, check_shape(tensor.shape, &[len]))?;
        match tensor.data {
            TensorData::F32(v) if v.iter().all(|x| x.is_finite()) => out = v.to_vec(),
            TensorData::F32(_) => {
                return named(name, Err(invalid!("holds infinities or NaNs")));
            }
            other => {
                let found = other.dtype();
                return named(name, Err(invalid!("has dtype {found}; wanted float32")));
            }
        }
        Ok(())
    })?;
    Ok(out)
}

/// A float matrix, kept as stored.
fn dense(
    weights: &dyn Weights,
    machine: &Machine,
    name: &str,
    rows: usize,
    cols: usize,
) -> Result<DenseMatrix, Error> {
    let (shape, floats) = weights.keep(name)?;
    named(name, check_shape(&shape, &[rows, cols]))?;
    let team = &machine.team;
    named(name, team.run(|| DenseMatrix::new(rows, cols, floats, machine.isa, team))?)
}

/// Scales of a ternary matrix of `rows`: one, or `[rows, groups]` of them.
///
/// # Errors
/// Another shape or dtype.
fn scales(weights: &dyn Weights, name: &str, rows: usize) -> Result<Vec<f32>, Error> {
    let mut out = Vec::new();
    weights.visit(name, &mut |tensor| {
        let data = match (tensor.data, tensor.shape) {
            (TensorData::F32(v), [1]) => v,
            (TensorData::F32(v), &[n, groups]) if n == rows && groups > 0 => v,
            (TensorData::F32(_), shape) => {
                let wanted = "wanted [1], or for each row those of its groups of columns";
                return named(name, Err(invalid!("has shape {shape:?}; {wanted}")));
            }
            (other, _) => {
                let found = other.dtype();
                return named(name, Err(invalid!("has dtype {found}; wanted float32")));
            }
        };
        if !data.iter().all(|scale| scale.is_finite()) {
            return named(name, Err(invalid!("holds infinities or NaNs")));
        }
        out = data.to_vec();
        Ok(())
    })?;
    Ok(out)
}

/// A ternary matrix: trits with a scale or several, or masters to be quantized.
pub(super) fn ternary(
    weights: &dyn Weights,
    machine: &Machine,
    name: &str,
    rows: usize,
    cols: usize,
) -> Result<PackedMatrix, Error> {
    let scale_name = format!("{name}_scale");
    let scale = if weights.contains(&scale_name)? {
        Some(scales(weights, &scale_name, rows)?)
    } else {
        None
    };
    let scaled = |w: TernaryMatrix<'_>, scales: &[f32]| {
        if scales.len() == 1 {
            return pack(machine, &w);
        }
        w.with_group_scales(scales).and_then(|w| pack(machine, &w))
    };
    let mut out = None;
    weights.visit(name, &mut |tensor| {
        let stored_rows = match tensor.data {
            TensorData::U8(_) => rows.div_ceil(QUARTERS),
            _ => rows,
        };
        named(name, check_shape(tensor.shape, &[stored_rows, cols]))?;
        let packed = match (tensor.data, &scale) {
            (TensorData::I8(trits), Some(scale)) => {
                TernaryMatrix::new(trits, rows, cols, scale[0]).and_then(|w| scaled(w, scale))
            }
            (TensorData::U8(bytes), Some(scale)) => {
                TernaryMatrix::from_quarters(bytes, rows, cols, scale[0])
                    .and_then(|w| scaled(w, scale))
            }
            (TensorData::I8(_) | TensorData::U8(_), None) => {
                Err(invalid!("holds trits, but there is no {scale_name:?}"))
            }
            (_, Some(_)) => Err(invalid!(
                "has dtype {} and a {scale_name:?}; wanted int8 or uint8 trits with a scale, or \
                 floats without one",
                tensor.data.dtype()
            )),
            (TensorData::F32(v), None) => absmean(machine, v, |&x| x, rows, cols),
            (TensorData::F16(v), None) => absmean(machine, v, |&b| f16_or_nan(b), rows, cols),
            (TensorData::Bf16(v), None) => absmean(machine, v, |&b| Bf16(b).to_f32(), rows, cols),
        };
        out = Some(named(name, packed)?);
        Ok(())
    })?;
    out.ok_or_else(|| Error::MissingTensor(name.to_owned()))
}

fn f16_or_nan(bits: u16) -> f32 {
    if bits & 0x7c00 == 0x7c00 { f32::NAN } else { F16(bits).to_f32() }
}

fn pack(machine: &Machine, w: &TernaryMatrix<'_>) -> Result<PackedMatrix, Error> {
    machine.team.run(|| PackedMatrix::pack(machine.kernels, w, &machine.team))?
}

/// Quantizes masters by their absolute mean, rows in parallel, and packs them.
fn absmean<T: Sync>(
    machine: &Machine,
    masters: &[T],
    to_f32: impl Fn(&T) -> f32 + Sync,
    rows: usize,
    cols: usize,
) -> Result<PackedMatrix, Error> {
    let (trits, scale) = absmean_matrix(&machine.team, masters, to_f32, rows, cols)?;
    pack(machine, &TernaryMatrix::new(&trits, rows, cols, scale)?)
}

/// Trits and scale of a matrix of masters: [`abs_sum`] of each row, added up
/// in row order, so that threads do not change the mean.
pub(crate) fn absmean_matrix<T: Sync>(
    team: &Team,
    masters: &[T],
    to_f32: impl Fn(&T) -> f32 + Sync,
    rows: usize,
    cols: usize,
) -> Result<(Vec<i8>, f32), Error> {
    let row = |r: usize, out: &mut Vec<f32>| {
        out.clear();
        out.extend(masters[r * cols..(r + 1) * cols].iter().map(&to_f32));
    };
    let mut sums = vec![0f64; rows];
    let mut trits = vec![0i8; rows * cols];
    team.run(|| {
        team.split(&mut sums, 1, 4, |first, sums| {
            let mut buffer = Vec::with_capacity(cols);
            for (r, sum) in sums.iter_mut().enumerate() {
                row(first + r, &mut buffer);
                *sum = abs_sum(&buffer);
            }
        });
        let total: f64 = sums.iter().sum();
        if !total.is_finite() {
            return Err(invalid!("holds infinities or NaNs"));
        }
        let scale = absmean_scale(total, rows * cols);
        team.split(&mut trits, cols, 4, |first, trits| {
            let mut buffer = Vec::with_capacity(cols);
            for (r, trits) in trits.chunks_exact_mut(cols).enumerate() {
                row(first / cols + r, &mut buffer);
                absmean_row(&buffer, scale, trits);
            }
        });
        Ok(scale)
    })?
    .map(|scale| (trits, scale))
}

/// The token embedding and the head, which may be the same matrix, and the
/// head's int8 form.
pub(super) struct Embeddings {
    pub(super) tokens: DenseMatrix,
    /// `None` when tied.
    head: Option<DenseMatrix>,
    pub(super) scan: ScanRows,
    scans: AtomicU64,
    full: AtomicU64,
    rescored: AtomicU64,
}

impl Embeddings {
    pub(super) fn new(weights: &dyn Weights, m: &Machine, dims: &Dims) -> Result<Self, Error> {
        let matrix = |name| dense(weights, m, name, dims.vocab, dims.hidden);
        let tokens = matrix("model.embed_tokens.weight")?;
        let head = if dims.tied { None } else { Some(matrix("lm_head.weight")?) };
        let exact = head.as_ref().unwrap_or(&tokens);
        let scan = m.team.run(|| ScanRows::new(exact, m.isa, &m.team))?;
        let [scans, full, rescored] = [const { AtomicU64::new(0) }; 3];
        Ok(Self { tokens, head, scan, scans, full, rescored })
    }

    pub(super) fn head(&self) -> &DenseMatrix {
        self.head.as_ref().unwrap_or(&self.tokens)
    }

    /// Parameters and bytes of both, a tied matrix once.
    pub(super) fn size(&self) -> (usize, usize) {
        [Some(&self.tokens), self.head.as_ref()]
            .into_iter()
            .flatten()
            .fold((0, 0), |(params, bytes), m| (params + m.rows() * m.cols(), bytes + m.n_bytes()))
    }

    /// Counts what was done for the best logits of some tokens.
    pub(super) fn count(&self, top: &[TopLogits]) {
        for top in top {
            self.scans.fetch_add(1, Ordering::Relaxed);
            if top.rescored == self.head().rows() {
                self.full.fetch_add(1, Ordering::Relaxed);
            } else {
                self.rescored.fetch_add(top.rescored as u64, Ordering::Relaxed);
            }
        }
    }

    pub(super) fn head_use(&self) -> HeadUse {
        let [scans, full, rescored] =
            [&self.scans, &self.full, &self.rescored].map(|n| n.load(Ordering::Relaxed));
        HeadUse { scans, full, rescored }
    }
}
