//! `_core`: the binding. Converts, checks, detaches, calls. No arithmetic.
//!
//! Rules of the line: slices are taken from numpy arrays while attached, and
//! only slices go into `detach`; a computation never runs attached, so that
//! other threads of the interpreter go on meanwhile; errors
//! become built-in exceptions in one place.

// The `pymodule` and `pyclass` macros expand to the C ABI of Python modules.
#![allow(unsafe_code)]
// PyO3 hands arguments over by value; `Bound` and `Python` are such handles.
#![allow(clippy::needless_pass_by_value)]

use std::cell::RefCell;
use std::sync::{Arc, Mutex, TryLockError};
use std::time::Duration;

use half::slice::HalfFloatSliceExt;
use numpy::{
    IntoPyArray, PyArray1, PyArray2, PyArrayDyn, PyArrayMethods, PyReadonlyArray1,
    PyReadonlyArray2, PyReadonlyArrayDyn, PyUntypedArray, PyUntypedArrayMethods,
};
use pyo3::exceptions::{PyKeyError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyFloat, PyInt, PyMapping, PyString};

use crate::cpu::Isa;
use crate::error::{Error, invalid};
use crate::floats::{Bf16, F16};
use crate::kernels::{self, Activations, Kernels, PackedMatrix, Prepared, Projection};
use crate::kv_cache::{KvCache, KvDtype};
use crate::levels::{LevelMatrix, Levels};
use crate::models::{
    self, ConfigMap, Dims, Logits, Machine, Model, Segment, Tensor, TensorData, Value, Visit, Want,
    Wanted, Weights,
};
use crate::ops::dense::{Floats, Shared};
use crate::ops::sample::{Sampling, sample};
use crate::ternary::TernaryMatrix;
use crate::threads::{Team, read_bandwidth};

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        match error {
            Error::Invalid(message) => PyValueError::new_err(message),
            Error::MissingTensor(_) => PyKeyError::new_err(error.to_string()),
            Error::State(message) => PyRuntimeError::new_err(message),
        }
    }
}

/// Objects in objects that are read; no field that the core asks for is deeper.
const CONFIG_DEPTH: usize = 3;

/// A config dict, without its lists and what is nested too deep.
fn config_map(dict: &Bound<'_, PyMapping>, depth: usize) -> PyResult<ConfigMap> {
    let mut map = ConfigMap::default();
    for item in dict.items()?.iter() {
        let (key, value): (Bound<'_, PyAny>, Bound<'_, PyAny>) = item.extract()?;
        let Ok(key) = key.extract::<String>() else { continue };
        // bool before int: a bool is an int in Python.
        let value = if value.is_none() {
            Value::Null
        } else if value.is_instance_of::<PyBool>() {
            Value::Bool(value.extract()?)
        } else if value.is_instance_of::<PyInt>() {
            value.extract().map_or_else(|_| Value::Other(value.to_string()), Value::Int)
        } else if value.is_instance_of::<PyFloat>() {
            Value::Float(value.extract()?)
        } else if value.is_instance_of::<PyString>() {
            Value::Str(value.extract()?)
        } else if depth < CONFIG_DEPTH
            && let Ok(inner) = value.cast::<PyMapping>()
        {
            Value::Map(config_map(inner, depth + 1)?)
        } else {
            Value::Other(format!("a {}", value.get_type().name()?))
        };
        map.0.insert(key, value);
    }
    Ok(map)
}

/// Tensors from a Python mapping. A failure of the mapping itself is kept, so
/// that the loader's own message reaches the user.
struct PyWeights<'a, 'py> {
    mapping: &'a Bound<'py, PyMapping>,
    failure: RefCell<Option<PyErr>>,
}

impl PyWeights<'_, '_> {
    fn fail(&self, error: PyErr) -> Error {
        *self.failure.borrow_mut() = Some(error);
        Error::State("the weights could not be read".to_owned())
    }

    /// The array called `name`, contiguous and aligned.
    fn array(&self, name: &str) -> Result<Bound<'_, PyUntypedArray>, Error> {
        let py = self.mapping.py();
        let array = self.mapping.get_item(name).map_err(|e| {
            // A plain dict says the key and nothing else; a loader says more.
            let bare = e.is_instance_of::<PyKeyError>(py)
                && e.value(py).str().is_ok_and(|s| s.to_string() == format!("'{name}'"));
            if bare { Error::MissingTensor(name.to_owned()) } else { self.fail(e) }
        })?;
        let array = array
            .cast_into::<PyUntypedArray>()
            .map_err(|_| invalid!("tensor {name:?} is not a numpy array; wanted one"))?;
        let aligned = array
            .getattr("flags")
            .and_then(|f| f.getattr("aligned"))
            .and_then(|a| a.extract::<bool>())
            .map_err(|e| self.fail(e))?;
        if !array.is_c_contiguous() || !aligned {
            return Err(invalid!(
                "tensor {name:?} is not contiguous and aligned; pass np.require(x, \
                 requirements=\"CA\")"
            ));
        }
        Ok(array)
    }
}

impl Weights for PyWeights<'_, '_> {
    fn contains(&self, name: &str) -> Result<bool, Error> {
        self.mapping.contains(name).map_err(|e| self.fail(e))
    }

    fn visit(&self, name: &str, visit: &mut Visit<'_>) -> Result<(), Error> {
        let py = self.mapping.py();
        let array = self.array(name)?;
        // The read-only borrow lives until the end of the arm; the slice alone
        // goes into `detach`.
        macro_rules! arm {
            ($type:ty, $data:expr) => {
                if let Ok(array) = array.extract::<PyReadonlyArrayDyn<'_, $type>>() {
                    let shape = array.shape().to_vec();
                    let slice = array.as_slice().map_err(|e| invalid!("tensor {name:?}: {e}"))?;
                    let data = $data(slice);
                    return py.detach(|| visit(&Tensor { shape: &shape, data }));
                }
            };
        }
        arm!(i8, TensorData::I8);
        arm!(u8, TensorData::U8);
        arm!(f32, TensorData::F32);
        arm!(u16, TensorData::Bf16);
        arm!(half::f16, f16_bits);
        Err(invalid!(
            "tensor {name:?} has dtype {}; wanted int8, uint8, float32, float16, or uint16 for \
             bfloat16",
            array.dtype()
        ))
    }

    /// Arrays that nobody can write to, such as mapped files, are held on to;
    /// others are copied.
    fn keep(&self, name: &str) -> Result<(Vec<usize>, Floats), Error> {
        let array = self.array(name)?;
        let shape = array.shape().to_vec();
        if let Some(kept) = kept::<f32, f32>(&array) {
            Ok((shape, Floats::F32(kept)))
        } else if let Some(kept) = kept::<half::f16, F16>(&array) {
            Ok((shape, Floats::F16(kept)))
        } else if let Some(kept) = kept::<u16, Bf16>(&array) {
            Ok((shape, Floats::Bf16(kept)))
        } else {
            Err(invalid!(
                "tensor {name:?} has dtype {}; wanted float32, float16, or uint16 for bfloat16",
                array.dtype()
            ))
        }
    }
}

/// An array whose elements, of type `T`, are read as `U` for as long as this
/// lives.
struct KeptArray<T, U> {
    /// Keeps the elements alive and where they are.
    _array: Py<PyArrayDyn<T>>,
    elements: *const U,
    len: usize,
}

// SAFETY: the elements are plain numbers that nobody writes to (`kept` takes
// arrays that are not writeable), and `Py` may be dropped by any thread.
unsafe impl<T, U: Sync> Send for KeptArray<T, U> {}
// SAFETY: as above.
unsafe impl<T, U: Sync> Sync for KeptArray<T, U> {}

impl<T, U> AsRef<[U]> for KeptArray<T, U> {
    fn as_ref(&self) -> &[U] {
        // SAFETY: `kept` took both from a slice of the array, which is alive.
        unsafe { std::slice::from_raw_parts(self.elements, self.len) }
    }
}

/// The elements of an array of `T`, if it is one. `U` has the form of `T`: a
/// number of as many bytes, all of whose bit patterns are valid.
fn kept<T, U>(array: &Bound<'_, PyUntypedArray>) -> Option<Shared<U>>
where
    T: numpy::Element + Copy + Sync + 'static,
    U: Copy + Send + Sync + 'static,
{
    const { assert!(size_of::<T>() == size_of::<U>() && align_of::<T>() == align_of::<U>()) };
    let borrowed = array.extract::<PyReadonlyArrayDyn<'_, T>>().ok()?;
    let slice = borrowed.as_slice().ok()?;
    let kept = KeptArray {
        _array: (*borrowed).clone().unbind(),
        elements: slice.as_ptr().cast::<U>(),
        len: slice.len(),
    };
    let writeable = array.getattr("flags").and_then(|f| f.getattr("writeable"));
    if writeable.and_then(|w| w.extract::<bool>()).unwrap_or(true) {
        return Some(Arc::new(kept.as_ref().to_vec()));
    }
    Some(Arc::new(kept))
}

fn f16_bits(slice: &[half::f16]) -> TensorData<'_> {
    TensorData::F16(slice.reinterpret_cast())
}

/// A ternary transformer.
#[pyclass(frozen, name = "Model", module = "bitnet_rs._core")]
struct PyModel(Box<dyn Model>);

#[pymethods]
impl PyModel {
    #[new]
    #[pyo3(signature = (config, weights, *, kernel=None, batch_kernels=None, threads=None))]
    fn new(
        config: &Bound<'_, PyMapping>,
        weights: &Bound<'_, PyMapping>,
        kernel: Option<&str>,
        batch_kernels: Option<Vec<String>>,
        threads: Option<usize>,
    ) -> PyResult<Self> {
        let config = config_map(config, 0)?;
        let activations = config.activations()?;
        let machine = Machine::new(activations, kernel, batch_kernels.as_deref(), threads)?;
        let weights = PyWeights { mapping: weights, failure: RefCell::new(None) };
        match models::load(&config, &weights, machine) {
            Ok(model) => Ok(Self(model)),
            Err(error) => Err(weights.failure.take().unwrap_or_else(|| error.into())),
        }
    }

    #[getter]
    fn kernel(&self) -> &'static str {
        self.0.machine().kernels.decode().name()
    }

    #[getter]
    fn batch_kernels(&self) -> Vec<&'static str> {
        self.0.machine().kernels.all()[1..].iter().map(|k| k.name()).collect()
    }

    #[getter]
    fn threads(&self) -> usize {
        self.0.machine().team.threads()
    }

    #[getter]
    fn facts<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let (dims, facts) = (self.0.dims(), self.0.facts());
        let dict = PyDict::new(py);
        dict.set_item("architecture", self.0.architecture())?;
        let activations = self.0.machine().kernels.decode().activations();
        dict.set_item("activations", activations.name())?;
        for (name, value) in [
            ("n_layers", dims.n_layers),
            ("hidden_size", dims.hidden),
            ("intermediate_size", dims.intermediate),
            ("n_heads", dims.n_heads),
            ("n_kv_heads", dims.n_kv_heads),
            ("head_dim", dims.head_dim),
            ("vocab_size", dims.vocab),
            ("max_positions", dims.max_positions),
            ("ternary_params", facts.ternary_params),
            ("params", facts.params),
            ("ternary_bytes", facts.ternary_bytes),
            ("head_bytes", facts.head_bytes),
            ("scan_bytes", facts.scan_bytes),
            ("bytes_per_token", facts.bytes_per_token),
            ("packed_bytes", facts.packed_bytes),
        ] {
            dict.set_item(name, value)?;
        }
        Ok(dict)
    }

    #[pyo3(signature = (capacity, kv_dtype="f16"))]
    fn new_cache(&self, py: Python<'_>, capacity: usize, kv_dtype: &str) -> PyResult<PyKvCache> {
        let dtype = KvDtype::from_name(kv_dtype)?;
        let cache = py.detach(|| KvCache::new(self.0.kv_shape(), capacity, dtype))?;
        Ok(PyKvCache { capacity, n_bytes: cache.n_bytes(), cache: Mutex::new(cache) })
    }

    #[pyo3(signature = (batch, *, logits="last"))]
    fn forward<'py>(
        &self,
        py: Python<'py>,
        batch: Vec<(PyReadonlyArray1<'py, u32>, Py<PyKvCache>)>,
        logits: &str,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let wanted = match logits {
            "last" => Wanted::Last,
            "all" => Wanted::All,
            _ => return Err(invalid!("logits is {logits:?}; wanted \"last\" or \"all\"").into()),
        };
        let logits = self.pass(py, &batch, wanted)?;
        let vocab = self.0.dims().vocab;
        let n = logits.rows.len() / vocab;
        logits.rows.into_pyarray(py).reshape([n, vocab])
    }

    fn forward_top<'py>(
        &self,
        py: Python<'py>,
        batch: Vec<(PyReadonlyArray1<'py, u32>, Py<PyKvCache>)>,
        top: Vec<Option<usize>>,
    ) -> PyResult<Vec<Top<'py>>> {
        let wants: Vec<Want> = top
            .iter()
            .map(|top| match top {
                None => Want::All,
                Some(0) => Want::Nothing,
                Some(k) => Want::Top(*k),
            })
            .collect();
        let logits = self.pass(py, &batch, Wanted::Each(&wants))?;
        let mut best = logits.top.into_iter();
        let mut rows = logits.rows.chunks_exact(self.0.dims().vocab);
        Ok(wants
            .iter()
            .map(|want| match want {
                Want::Nothing => {
                    (Some(PyArray1::from_slice(py, &[])), PyArray1::from_slice(py, &[]))
                }
                Want::All => (None, PyArray1::from_slice(py, rows.next().unwrap_or_default())),
                Want::Top(_) | Want::Hidden => {
                    let top = best.next().unwrap_or_default();
                    (Some(top.ids.into_pyarray(py)), top.logits.into_pyarray(py))
                }
            })
            .collect())
    }

    fn forward_hidden<'py>(
        &self,
        py: Python<'py>,
        batch: Vec<(PyReadonlyArray1<'py, u32>, Py<PyKvCache>)>,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let wants = vec![Want::Hidden; batch.len()];
        let hidden = self.pass(py, &batch, Wanted::Each(&wants))?.hidden;
        hidden.into_pyarray(py).reshape([batch.len(), self.0.dims().hidden])
    }

    #[getter]
    fn head_use<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let used = self.0.head_use();
        let dict = PyDict::new(py);
        dict.set_item("scans", used.scans)?;
        dict.set_item("full", used.full)?;
        dict.set_item("rescored", used.rescored)?;
        Ok(dict)
    }

    fn profile(&self, on: bool) -> Vec<(&'static str, u64, f64, f64)> {
        let laps = self.0.machine().team.profile(on);
        let seconds = |ns: u64| ns as f64 / 1e9;
        laps.iter().map(|l| (l.name, l.count, seconds(l.wall_ns), seconds(l.busy_ns))).collect()
    }
}

/// Ids (None: all of them) and their logits.
type Top<'py> = (Option<Bound<'py, PyArray1<u32>>>, Bound<'py, PyArray1<f32>>);

impl PyModel {
    /// A forward pass, detached.
    fn pass(
        &self,
        py: Python<'_>,
        batch: &[(PyReadonlyArray1<'_, u32>, Py<PyKvCache>)],
        wanted: Wanted<'_>,
    ) -> PyResult<Logits> {
        let parts = batch
            .iter()
            .map(|(tokens, cache)| Ok((tokens.as_slice()?, cache.get())))
            .collect::<PyResult<Vec<(&[u32], &PyKvCache)>>>()?;
        Ok(py.detach(|| {
            let mut guards = parts
                .iter()
                .map(|(_, cache)| cache.try_lock())
                .collect::<Result<Vec<_>, Error>>()?;
            let mut segments: Vec<_> = parts
                .iter()
                .zip(&mut guards)
                .map(|((tokens, _), cache)| Segment { tokens, cache })
                .collect();
            self.0.pass(&mut segments, wanted)
        })?)
    }
}

/// Keys and values of one sequence.
#[pyclass(frozen, name = "KvCache", module = "bitnet_rs._core")]
struct PyKvCache {
    cache: Mutex<KvCache>,
    capacity: usize,
    n_bytes: usize,
}

impl PyKvCache {
    /// The cache, if nobody else is using it: waiting would deadlock when one
    /// cache stands twice in a batch. A poisoned lock is taken all the same:
    /// `KvCache` changes its length last.
    fn try_lock(&self) -> Result<std::sync::MutexGuard<'_, KvCache>, Error> {
        match self.cache.try_lock() {
            Ok(guard) => Ok(guard),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => Err(Error::State(
                "the cache is in use by another thread, or stands twice in the batch; use one \
                 cache for each sequence"
                    .to_owned(),
            )),
        }
    }
}

#[pymethods]
impl PyKvCache {
    fn __len__(&self) -> PyResult<usize> {
        Ok(self.try_lock()?.len())
    }

    #[getter]
    fn capacity(&self) -> usize {
        self.capacity
    }

    #[getter]
    fn n_bytes(&self) -> usize {
        self.n_bytes
    }

    fn truncate(&self, length: usize) -> PyResult<()> {
        Ok(self.try_lock()?.truncate(length)?)
    }

    fn fork(&self, py: Python<'_>, length: usize, capacity: usize) -> PyResult<Self> {
        let cache = py.detach(|| self.try_lock()?.fork(length, capacity))?;
        Ok(Self { capacity, n_bytes: cache.n_bytes(), cache: Mutex::new(cache) })
    }
}

#[pyfunction]
fn kv_bytes(caches: Vec<Py<PyKvCache>>) -> PyResult<usize> {
    let guards = caches.iter().map(|c| c.get().try_lock()).collect::<Result<Vec<_>, Error>>()?;
    Ok(KvCache::bytes_held(guards.iter().map(|guard| &**guard)))
}

#[pyfunction]
#[pyo3(name = "kernels")]
fn kernel_names() -> PyResult<Vec<&'static str>> {
    Ok(kernels::available(Isa::best()?).iter().map(|k| k.name()).collect())
}

#[pyfunction]
fn grouped_kernels(activations: &str) -> PyResult<Vec<&'static str>> {
    let found =
        [Activations::Int8, Activations::Float].into_iter().find(|a| a.name() == activations);
    let found = found
        .ok_or_else(|| invalid!("activations is {activations:?}; wanted \"int8\" or \"float\""))?;
    Ok(kernels::available_grouped(Isa::best()?, found).iter().map(|k| k.name()).collect())
}

#[pyfunction]
fn _kernels_for(levels: Vec<i8>) -> PyResult<Vec<&'static str>> {
    let kernels = kernels::available_for(Isa::best()?, Levels::new(&levels)?);
    Ok(kernels.iter().map(|k| k.name()).collect())
}

#[pyfunction]
#[pyo3(name = "sample", signature = (logits, *, temperature, top_k, top_p, min_p, draw))]
fn py_sample(
    py: Python<'_>,
    logits: PyReadonlyArray1<'_, f32>,
    temperature: f64,
    top_k: usize,
    top_p: f64,
    min_p: f64,
    draw: f64,
) -> PyResult<usize> {
    let (isa, logits) = (Isa::best()?, logits.as_slice()?);
    let sampling = Sampling { temperature, top_k, top_p, min_p };
    Ok(py.detach(|| sample(isa, logits, sampling, draw))?)
}

#[pyfunction]
fn cpu_features() -> PyResult<Vec<&'static str>> {
    Ok(Isa::best()?.features().to_vec())
}

#[pyfunction]
#[pyo3(name = "read_bandwidth", signature = (threads, n_bytes=1 << 29))]
fn py_read_bandwidth(py: Python<'_>, threads: usize, n_bytes: usize) -> PyResult<f64> {
    Ok(py.detach(|| read_bandwidth(&Team::new(Some(threads))?, Isa::best()?, n_bytes))?)
}

#[pyfunction]
fn projections(config: &Bound<'_, PyMapping>) -> PyResult<Vec<(usize, usize, usize)>> {
    let dims = Dims::read(&config_map(config, 0)?)?;
    Ok(dims.projections().iter().map(|p| (p.rows, p.cols, p.count)).collect())
}

#[pyfunction]
fn measure_kernels(
    py: Python<'_>,
    projections: Vec<(usize, usize, usize)>,
    threads: usize,
    budget_s: f64,
) -> PyResult<Vec<(&'static str, Vec<f64>)>> {
    let budget = Duration::try_from_secs_f64(budget_s)
        .map_err(|_| invalid!("budget_s is {budget_s}; wanted a number of seconds from 0 on"))?;
    let projections: Vec<_> = projections
        .into_iter()
        .map(|(rows, cols, count)| Projection { rows, cols, count })
        .collect();
    let speeds = py.detach(|| {
        kernels::measure(&Team::new(Some(threads))?, Isa::best()?, &projections, budget)
    })?;
    Ok(speeds.into_iter().map(|s| (s.kernel, s.seconds.to_vec())).collect())
}

/// Rows, columns and elements of a contiguous matrix.
fn matrix<'a, T: numpy::Element>(
    name: &str,
    array: &'a PyReadonlyArray2<'_, T>,
) -> PyResult<(usize, usize, &'a [T])> {
    // `as_slice` alone would take Fortran order too, and read it transposed.
    if !array.is_c_contiguous() {
        return Err(
            invalid!("{name} is not contiguous in C order; use np.ascontiguousarray").into()
        );
    }
    Ok((array.shape()[0], array.shape()[1], array.as_slice()?))
}

/// A packed matrix on a team of its own: for tests and benchmarks.
#[pyclass(frozen, name = "_PackedMatrix", module = "bitnet_rs._core")]
struct PyPackedMatrix {
    isa: Isa,
    team: Team,
    packed: PackedMatrix,
}

#[pymethods]
impl PyPackedMatrix {
    #[new]
    #[pyo3(signature = (values, scale, kernel, *, threads=1, levels=None, group_scales=None))]
    fn new(
        py: Python<'_>,
        values: PyReadonlyArray2<'_, i8>,
        scale: f32,
        kernel: &str,
        threads: usize,
        levels: Option<Vec<i8>>,
        group_scales: Option<PyReadonlyArray2<'_, f32>>,
    ) -> PyResult<Self> {
        let (rows, cols, values) = matrix("values", &values)?;
        let group_scales = group_scales.as_ref().map(|s| matrix("group_scales", s)).transpose()?;
        let (isa, team) = (Isa::best()?, Team::new(Some(threads))?);
        let levels = levels.map(|levels| Levels::new(&levels)).transpose()?;
        let packed = py.detach(|| {
            let w = match levels {
                None => {
                    let w = TernaryMatrix::new(values, rows, cols, scale)?;
                    LevelMatrix::from(&match group_scales {
                        Some((_, _, scales)) => w.with_group_scales(scales)?,
                        None => w,
                    })
                }
                Some(levels) => LevelMatrix::new(values, rows, cols, scale, levels)?,
            };
            let mut kernels = kernels::available_for(isa, w.levels());
            if w.levels() == Levels::TERNARY {
                for activations in [Activations::Int8, Activations::Float] {
                    kernels.extend(kernels::available_grouped(isa, activations));
                }
            }
            let found = kernels.iter().find(|k| k.name() == kernel).ok_or_else(|| {
                let names: Vec<_> = kernels.iter().map(|k| k.name()).collect();
                invalid!("unknown kernel {kernel:?}; for these levels: {}", names.join(", "))
            })?;
            team.run(|| PackedMatrix::pack(Kernels::of(*found), w, &team))?
        })?;
        Ok(Self { isa, team, packed })
    }

    #[getter]
    fn n_bytes(&self) -> usize {
        self.packed.n_bytes()
    }

    fn unpack<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray2<i8>>> {
        let values = py.detach(|| self.packed.unpack());
        values.into_pyarray(py).reshape([self.packed.rows(), self.packed.cols()])
    }

    fn multiply<'py>(
        &self,
        py: Python<'py>,
        x: PyReadonlyArray2<'py, f32>,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let (n, width, x) = matrix("x", &x)?;
        let (rows, cols) = (self.packed.rows(), self.packed.cols());
        if n == 0 || width != cols {
            return Err(invalid!("x is {n} x {width}; wanted at least one row of {cols}").into());
        }
        let y = py.detach(|| {
            self.team.run(|| {
                let kernel = self.packed.kernels().for_inputs(n);
                let mut xs = vec![Prepared::default(); n];
                for (x, out) in x.chunks_exact(cols).zip(&mut xs) {
                    kernel.prepare(self.isa, x, out);
                }
                let mut y = vec![0f32; n * rows];
                kernels::multiply(&self.team, &xs, [(&self.packed, &mut y)]);
                y
            })
        })?;
        y.into_pyarray(py).reshape([n, rows])
    }
}

#[pyfunction]
fn _gemm<'py>(
    py: Python<'py>,
    trits: PyReadonlyArray2<'py, i8>,
    scale: f32,
    x: PyReadonlyArray2<'py, f32>,
    kernel: &str,
) -> PyResult<Bound<'py, PyArray2<f32>>> {
    let (cols, width) = (trits.shape()[1], x.shape()[1]);
    let packed = PyPackedMatrix::new(py, trits, scale, kernel, 1, None, None)?;
    if width != cols {
        return Err(invalid!("x has {width} columns; wanted {cols}").into());
    }
    packed.multiply(py, x)
}

#[pyfunction]
fn _gemv<'py>(
    py: Python<'py>,
    trits: PyReadonlyArray2<'py, i8>,
    scale: f32,
    x: PyReadonlyArray1<'py, f32>,
    kernel: &str,
) -> PyResult<Bound<'py, PyArray1<f32>>> {
    let x = x.reshape([1, x.len()])?.readonly();
    let y = _gemm(py, trits, scale, x, kernel)?;
    y.reshape([y.len()])
}

#[pyfunction]
fn _absmean<'py>(
    py: Python<'py>,
    w: PyReadonlyArray2<'py, f32>,
) -> PyResult<(Bound<'py, PyArray2<i8>>, f32)> {
    let (rows, cols, w) = matrix("w", &w)?;
    if w.is_empty() {
        return Err(invalid!("w is {rows} x {cols}; wanted at least one element").into());
    }
    let team = Team::new(Some(1))?;
    let (trits, scale) = py.detach(|| models::absmean_matrix(&team, w, |&x| x, rows, cols))?;
    Ok((trits.into_pyarray(py).reshape([rows, cols])?, scale))
}

#[pyfunction]
fn _rms_norm<'py>(
    py: Python<'py>,
    x: PyReadonlyArray1<'py, f32>,
    weight: PyReadonlyArray1<'py, f32>,
    eps: f32,
) -> PyResult<Bound<'py, PyArray1<f32>>> {
    let (x, weight) = (x.as_slice()?, weight.as_slice()?);
    if x.len() != weight.len() {
        return Err(invalid!("x has {} elements, weight {}", x.len(), weight.len()).into());
    }
    let mut out = vec![0f32; x.len()];
    crate::ops::rms_norm::rms_norm(Isa::best()?, x, weight, eps, &mut out);
    Ok(out.into_pyarray(py))
}

#[pyfunction]
fn _exp<'py>(
    py: Python<'py>,
    x: PyReadonlyArray1<'py, f32>,
) -> PyResult<Bound<'py, PyArray1<f32>>> {
    let mut out = x.as_slice()?.to_vec();
    crate::ops::exp::exp_in_place(Isa::best()?, &mut out);
    Ok(out.into_pyarray(py))
}

/// [`kernels::INPUTS`] but the first.
const fn batch_inputs() -> [usize; kernels::INPUTS.len() - 1] {
    let [_, rest @ ..] = kernels::INPUTS;
    rest
}

#[pymodule]
mod _core {
    use super::kernels;

    #[pymodule_export]
    #[allow(non_upper_case_globals)] // Python's name for it
    const __version__: &str = env!("CARGO_PKG_VERSION");
    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const build_profile: &str = if cfg!(debug_assertions) { "debug" } else { "release" };

    /// Numbers of tokens from which on the batch kernels are used.
    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const batch_inputs: [usize; kernels::INPUTS.len() - 1] = super::batch_inputs();

    /// Tokens of a page of keys and values.
    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const kv_page: usize = crate::kv_cache::PAGE;

    #[pymodule_export]
    use super::{
        _absmean, _exp, _gemm, _gemv, _kernels_for, _rms_norm, PyKvCache, PyModel, PyPackedMatrix,
        cpu_features, grouped_kernels, kernel_names, kv_bytes, measure_kernels, projections,
        py_read_bandwidth, py_sample,
    };
}
