//! The only arithmetic on packed ternary weights.
//!
//! A [`Layout`] is a way to store a matrix; a [`Kernel`] multiplies matrices of
//! one layout with the instructions of one ISA. All kernels give the same bits:
//! sums are exact integers, and one expression, `Prepared::rescale`, turns them
//! into floats. Layouts and the scalar kernels that define them are in
//! `generic/`; each instruction set has a folder named after the `cfg` that
//! selects it.
//!
//! Kernels are single-threaded. Packing and [`multiply`] split rows over a
//! [`Team`], and nothing else here knows of threads.

// The entry of each kernel into code compiled for an instruction set that its
// proof type guarantees.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::cpu::Isa;
use crate::error::{Error, invalid};
use crate::levels::{LevelMatrix, Levels};
use crate::memory::AlignedBytes;
use crate::threads::Team;

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod generic;
mod measure;
mod prepared;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod vlut;
#[cfg(target_arch = "x86_64")]
mod x86_64;

pub use measure::{Projection, Speed, measure};
pub use prepared::Prepared;

/// What a projection multiplies its weights by.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Activations {
    /// int8, each token by its absolute maximum: what BitNet models are trained with.
    Int8,
    /// float32, as they are.
    Float,
}

impl Activations {
    /// As in the config, and in names of kernels.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Activations::Int8 => "int8",
            Activations::Float => "float",
        }
    }
}

/// A way to store a matrix.
///
/// The packed form is a sequence of *row groups* of equal size, so that rows
/// can be packed and multiplied in parallel, split at multiples of
/// [`row_group`](Layout::row_group).
pub trait Layout: Send + Sync {
    /// The format, such as `i2`; with the levels where they are not ternary.
    /// Layouts of equal names are the same.
    fn name(&self) -> &'static str;

    /// How many rows are interleaved.
    fn row_group(&self) -> usize;

    /// Bytes of one packed row group of a matrix with `cols` columns.
    fn group_bytes(&self, cols: usize) -> usize;

    /// Columns that groups with a scale of their own are a multiple of, unless a group
    /// is a whole row; `None` where a matrix has one scale.
    fn scale_granule(&self) -> Option<usize> {
        None
    }

    /// The values that weights may have.
    fn levels(&self) -> Levels {
        Levels::TERNARY
    }

    /// Lays out a row group: row-major `rows` of `cols` columns, into
    /// [`group_bytes`](Layout::group_bytes) zeroed bytes. The last group of a
    /// matrix may have fewer rows than others; the missing ones may become
    /// anything that [`unpack`](Layout::unpack) can read.
    fn pack(&self, rows: &[i8], cols: usize, out: &mut [u8]);

    /// The opposite of [`pack`](Layout::pack): the `row_group` rows of `cols`
    /// columns that `group` holds, row-major.
    fn unpack(&self, group: &[u8], cols: usize, out: &mut [i8]);
}

/// Multiplies packed matrices of one [`Layout`] by activations.
///
/// A kernel can only be constructed on a CPU that has the instructions it
/// uses, so its methods are safe to call.
pub trait Kernel: Send + Sync {
    /// `{isa}-{format}`, such as `avx2-i2`.
    fn name(&self) -> &'static str;

    /// The layout of the matrices that it multiplies.
    fn layout(&self) -> &'static dyn Layout;

    /// What it makes of its inputs.
    fn activations(&self) -> Activations {
        Activations::Int8
    }

    /// Names the form of the table in [`Prepared`] that
    /// [`build_table`](Kernel::build_table) makes and [`gemv`](Kernel::gemv)
    /// reads; empty where there is none.
    fn table(&self) -> &'static str {
        ""
    }

    /// Quantizes the activations and builds what the rows share, such as a
    /// lookup table. Done once for each input.
    fn prepare(&self, isa: Isa, x: &[f32], out: &mut Prepared) {
        out.quantize(isa, x);
        self.build_table(out);
    }

    /// Builds the lookup table of quantized activations, if there is one.
    fn build_table(&self, _x: &mut Prepared) {}

    /// Computes one output for each of `rows`, which start at a multiple of the
    /// layout's `row_group`.
    fn gemv(&self, w: &PackedMatrix, rows: Range<usize>, x: &Prepared, y: &mut [f32]);

    /// Computes `rows` for several inputs: `ys[t][r - rows.start]` is row `r`
    /// for `xs[t]`. Overridden where unpacking once for several inputs pays.
    fn gemm(&self, w: &PackedMatrix, rows: Range<usize>, xs: &[Prepared], ys: &mut [&mut [f32]]) {
        for (x, y) in xs.iter().zip(ys) {
            self.gemv(w, rows.clone(), x, y);
        }
    }

    /// Inputs, of so many in a step, that a task takes at most, where taking more of them
    /// at once brings nothing: tasks then share out inputs rather than rows.
    fn block_inputs(&self, _inputs: usize) -> usize {
        usize::MAX
    }

    /// The name of a kernel of the same layout that does steps of up to so many inputs
    /// for this one: there, the two are as fast, whatever a clock says.
    fn few_inputs(&self) -> Option<(&'static str, usize)> {
        None
    }

    /// [`gemm`](Kernel::gemm) for parts of several matrices of one width.
    /// Overridden where they can share what is made of the inputs.
    fn gemm_parts(&self, parts: &mut [Part<'_>], xs: &[Prepared]) {
        for Part { w, rows, ys } in parts {
            self.gemm(w, rows.clone(), xs, ys);
        }
    }
}

/// Rows of a matrix, and where their products go.
pub struct Part<'a> {
    /// The matrix.
    pub w: &'a PackedMatrix,
    /// Its rows, from a multiple of the layout's `row_group` on.
    pub rows: Range<usize>,
    /// For each input, one output for each of `rows`.
    pub ys: Vec<&'a mut [f32]>,
}

/// Numbers of inputs from which on a step may take another kernel: decoding, a few
/// sequences, batches, and prefill. [`measure`] measures with so many.
pub const INPUTS: [usize; 6] = [1, 2, 8, 12, 16, 32];

/// The kernels of a matrix, for steps of one input (decode), of several, and of
/// many (prefill). They read the same bytes.
#[derive(Clone, Copy)]
pub struct Kernels([&'static dyn Kernel; INPUTS.len()]);

impl Kernels {
    /// One kernel for all.
    #[must_use]
    pub fn of(kernel: &'static dyn Kernel) -> Self {
        Self([kernel; INPUTS.len()])
    }

    /// A kernel for each of [`INPUTS`].
    ///
    /// # Errors
    /// Some have different layouts: a model would need two copies of its weights.
    pub fn new(kernels: [&'static dyn Kernel; INPUTS.len()]) -> Result<Self, Error> {
        let layout = |kernel: &dyn Kernel| kernel.layout().name();
        let first = kernels[0];
        if let Some(other) = kernels.iter().find(|k| layout(**k) != layout(first)) {
            return Err(invalid!(
                "kernel {:?} reads the layout {}, kernel {:?} the layout {}; wanted kernels of one \
                 layout",
                first.name(),
                layout(first),
                other.name(),
                layout(*other)
            ));
        }
        if let Some(other) = kernels.iter().find(|k| k.activations() != first.activations()) {
            return Err(invalid!(
                "kernel {:?} takes {} activations, kernel {:?} takes {}; wanted the same of all",
                first.name(),
                first.activations().name(),
                other.name(),
                other.activations().name()
            ));
        }
        Ok(Self(kernels))
    }

    /// The kernel for single inputs.
    #[must_use]
    pub fn decode(&self) -> &'static dyn Kernel {
        self.0[0]
    }

    /// The kernels for each of [`INPUTS`].
    #[must_use]
    pub fn all(&self) -> [&'static dyn Kernel; INPUTS.len()] {
        self.0
    }

    /// The layout of all.
    #[must_use]
    pub fn layout(&self) -> &'static dyn Layout {
        self.decode().layout()
    }

    /// The kernel for a step of `inputs` inputs.
    #[must_use]
    pub fn for_inputs(&self, inputs: usize) -> &'static dyn Kernel {
        let class = INPUTS.iter().rposition(|&from| from <= inputs).unwrap_or(0);
        self.0[class]
    }
}

/// Random weights, from a linear congruential generator, whose high bits are the
/// random ones.
fn random_weights(n: usize, levels: Levels) -> Vec<i8> {
    let values = levels.values();
    let mut state = 1u32;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        values[(state >> 24) as usize % values.len()]
    };
    (0..n).map(next).collect()
}

/// A matrix in one layout, and the kernels that read it: the two cannot be
/// mixed up.
pub struct PackedMatrix {
    kernels: Kernels,
    rows: usize,
    cols: usize,
    scale: f32,
    /// Where there are several: for each row group and group of columns, that of each
    /// row; and the columns of a group.
    group_scales: Option<(Vec<f32>, usize)>,
    row_group: usize,
    group_bytes: usize,
    bytes: AlignedBytes,
}

/// Row chunks handed out per thread: more than one, so that a thread that the
/// operating system interrupts does not hold up the others for long. Decoding
/// the 2B shape on two threads took 34 ms a token with 2 chunks, 34 with 4, 31 to
/// 32 with 8, 33 with 16 and 37 with 32, where each has too few lines to ask for
/// ahead of their use.
const CHUNKS_PER_THREAD: usize = 8;

impl PackedMatrix {
    /// That inputs and output fit, and were prepared for this layout.
    fn check(&self, xs: &[Prepared], y: &[f32]) {
        let table = self.kernels.for_inputs(xs.len()).table();
        assert_eq!(y.len(), xs.len() * self.rows, "output length");
        assert!(xs.iter().all(|x| x.cols == self.cols), "input length");
        assert!(table.is_empty() || xs.iter().all(|x| x.table_form == table), "lookup table");
    }

    /// Packs `w` for `kernels`, in parallel over rows. Call it inside
    /// [`Team::run`].
    ///
    /// # Errors
    /// The layout holds other levels than the matrix, or not its scales.
    pub fn pack<'a>(
        kernels: Kernels,
        w: impl Into<LevelMatrix<'a>>,
        team: &Team,
    ) -> Result<Self, Error> {
        let (layout, w) = (kernels.layout(), w.into());
        if layout.levels() != w.levels() {
            return Err(invalid!(
                "the layout {} holds the levels {:?}, the matrix has {:?}; take a kernel of \
                 `available_for` these levels",
                layout.name(),
                layout.levels().values(),
                w.levels().values()
            ));
        }
        let mut packed = Self::zeroed(kernels, w.rows(), w.cols(), w.scale());
        packed.group_scales = w.group_scales().map(|s| grouped(layout, &w, s)).transpose()?;
        let (group, group_bytes) = (packed.row_group, packed.group_bytes);
        team.split(packed.bytes.as_mut_slice(), group_bytes, CHUNKS_PER_THREAD, |start, chunk| {
            // One row group as int8, for matrices that are stored otherwise.
            let mut buffer = Vec::new();
            for (i, out) in chunk.chunks_exact_mut(group_bytes).enumerate() {
                let first = (start / group_bytes + i) * group;
                let rows = first..(first + group).min(w.rows());
                layout.pack(w.read(rows, &mut buffer), w.cols(), out);
            }
        });
        Ok(packed)
    }

    /// A matrix of zero bytes, which stand for weights of some kind.
    fn zeroed(kernels: Kernels, rows: usize, cols: usize, scale: f32) -> Self {
        let layout = kernels.layout();
        let (row_group, group_bytes) = (layout.row_group(), layout.group_bytes(cols));
        let bytes = AlignedBytes::zeroed_shared(rows.div_ceil(row_group) * group_bytes);
        Self { kernels, rows, cols, scale, group_scales: None, row_group, group_bytes, bytes }
    }

    /// A matrix of random weights, to measure with; every 64 row groups
    /// they are the same again. (Zeros would not do: tables are only as slow as they
    /// are if the bytes are as many, and a page that never was written is the same page
    /// as all others, so that reading it is reading a cache.) Call it inside
    /// [`Team::run`].
    #[must_use]
    pub fn arbitrary(kernels: Kernels, rows: usize, cols: usize, team: &Team) -> Self {
        let mut w = Self::zeroed(kernels, rows, cols, 1.0);
        let (layout, n) = (kernels.layout(), w.group_bytes);
        let drawn = Self::DRAWN.min(w.bytes.len() / n);
        let values = random_weights(drawn * w.row_group * cols, layout.levels());
        let mut groups = vec![0; drawn * n];
        for (group, rows) in groups.chunks_exact_mut(n).zip(values.chunks(w.row_group * cols)) {
            layout.pack(rows, cols, group);
        }
        team.split(w.bytes.as_mut_slice(), groups.len(), CHUNKS_PER_THREAD, |_, part| {
            part.chunks_mut(groups.len()).for_each(|to| to.copy_from_slice(&groups[..to.len()]));
        });
        w
    }

    /// Row groups of [`arbitrary`](Self::arbitrary) weights.
    const DRAWN: usize = 64;

    /// The weights again, row-major.
    #[must_use]
    pub fn unpack(&self) -> Vec<i8> {
        let mut values = Vec::with_capacity(self.rows * self.cols);
        let mut group = vec![0; self.row_group * self.cols];
        for first in (0..self.rows).step_by(self.row_group) {
            self.kernels.layout().unpack(self.group(first), self.cols, &mut group);
            let rows = self.row_group.min(self.rows - first);
            values.extend_from_slice(&group[..rows * self.cols]);
        }
        values
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
        self.bytes.len() + self.group_scales.as_ref().map_or(0, |(s, _)| size_of_val(&s[..]))
    }

    /// The kernels that read it.
    #[must_use]
    pub fn kernels(&self) -> Kernels {
        self.kernels
    }

    /// The packed bytes of the row group that begins at row `first`.
    #[inline]
    fn group(&self, first: usize) -> &[u8] {
        let n = self.group_bytes;
        &self.bytes.as_slice()[first / self.row_group * n..][..n]
    }

    /// The packed bytes of the row groups of `rows`, which begin at the start of
    /// one.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))] // for `vlut.rs`
    #[inline]
    fn groups(&self, rows: Range<usize>) -> impl Iterator<Item = &[u8]> {
        let groups = rows.start / self.row_group..rows.end.div_ceil(self.row_group);
        let bytes = &self.bytes.as_slice()[groups.start * self.group_bytes..];
        bytes.chunks_exact(self.group_bytes).take(groups.len())
    }
}

/// Scales as [`PackedMatrix`] keeps them, and the columns of a group.
fn grouped(
    layout: &dyn Layout,
    w: &LevelMatrix<'_>,
    scales: &[f32],
) -> Result<(Vec<f32>, usize), Error> {
    let (rows, cols) = (w.rows(), w.cols());
    let groups = scales.len() / rows;
    let group = cols.div_ceil(groups);
    let Some(granule) = layout.scale_granule() else {
        return Err(invalid!(
            "has {groups} scales for each row, and the layout {} holds one for a matrix; take a \
             kernel of the layout i2g",
            layout.name()
        ));
    };
    if groups > 1 && !group.is_multiple_of(granule) {
        return Err(invalid!(
            "has a scale for each {group} columns; wanted a multiple of {granule}"
        ));
    }
    let row_group = layout.row_group();
    let mut out = vec![0.0; rows.div_ceil(row_group) * row_group * groups];
    for (r, scales) in scales.chunks_exact(groups).enumerate() {
        for (g, &scale) in scales.iter().enumerate() {
            out[(r / row_group * groups + g) * row_group + r % row_group] = scale;
        }
    }
    Ok((out, group))
}

/// `y[t * rows + r] = w[r] . xs[t]` for each pair of a matrix and its output:
/// projections of the same input, such as q, k and v, in one dispatch. Rows
/// are split over the team, and weights are read once whatever the number of
/// inputs.
///
/// # Panics
/// If the lengths do not fit, or the inputs were prepared for another kernel
/// than [`Kernels::for_inputs`] of their number: callers are this crate's models.
pub fn multiply<const N: usize>(
    team: &Team,
    xs: &[Prepared],
    products: [(&PackedMatrix, &mut [f32]); N],
) {
    products.iter().for_each(|(w, y)| w.check(xs, y));
    if let [x] = xs {
        let granule = products[0].0.row_group;
        let ws = products.each_ref().map(|(w, _)| *w);
        let ys = products.map(|(_, y)| y);
        team.split_all(ys, granule, CHUNKS_PER_THREAD, |which, start, y| {
            let w = ws[which];
            w.kernels.decode().gemv(w, start..start + y.len(), x, y);
        });
        return;
    }
    let kernel = products[0].0.kernels.for_inputs(xs.len());
    let mut tasks = tasks(team, kernel, xs, products);
    team.for_each(&mut tasks, |(xs, parts)| kernel.gemm_parts(parts, xs));
}

/// Cuts products of several inputs into tasks: some of the inputs, and some rows of
/// each matrix, in the same proportion, since they may share what is made of inputs.
fn tasks<'a, const N: usize>(
    team: &Team,
    kernel: &dyn Kernel,
    xs: &'a [Prepared],
    products: [(&'a PackedMatrix, &'a mut [f32]); N],
) -> Vec<(&'a [Prepared], Vec<Part<'a>>)> {
    let most = kernel.block_inputs(xs.len());
    let block = most.min(xs.len());
    let blocks = xs.len().div_ceil(block);
    let rows: usize = products.iter().map(|(w, _)| w.rows).sum();
    let threads = team.threads();
    let cuts = if most == usize::MAX {
        if threads == 1 { 1 } else { threads * CHUNKS_PER_THREAD }
    } else {
        // A whole number of tasks for each thread, if there are few.
        let wanted = (threads * BLOCKS_PER_THREAD).div_ceil(blocks).min(rows / MIN_ROWS);
        (wanted.max(1) * blocks).next_multiple_of(threads).div_ceil(blocks)
    };
    let mut tasks = Vec::with_capacity(blocks * cuts);
    for xs in xs.chunks(block) {
        tasks.extend((0..cuts).map(|_| (xs, Vec::with_capacity(N))));
    }
    for (w, y) in products {
        let step = w.rows.div_ceil(w.row_group).div_ceil(cuts) * w.row_group;
        for (y, tasks) in y.chunks_mut(w.rows * block).zip(tasks.chunks_mut(cuts)) {
            let inputs = y.len() / w.rows;
            for ((_, parts), start) in tasks.iter_mut().zip((0..w.rows).step_by(step)) {
                let rows = start..(start + step).min(w.rows);
                parts.push(Part { w, rows, ys: Vec::with_capacity(inputs) });
            }
            for y in y.chunks_exact_mut(w.rows) {
                for (y, (_, parts)) in y.chunks_mut(step).zip(tasks.iter_mut()) {
                    parts.last_mut().expect("pushed above").ys.push(y);
                }
            }
        }
    }
    tasks.retain(|(_, parts)| !parts.is_empty());
    tasks
}

/// Tasks per thread of a kernel that takes inputs in blocks, where there are rows
/// enough.
const BLOCKS_PER_THREAD: usize = 4;

/// Rows of a task that tables are still worth building for, if there are others
/// to be shared out.
const MIN_ROWS: usize = 1024;

/// [`multiply`] for two matrices of one shape, and `then` for what comes out of
/// the same rows of both: gate, up and their activation.
///
/// # Panics
/// As [`multiply`]; the shapes or layouts differ.
pub fn multiply_pair(
    team: &Team,
    xs: &[Prepared],
    [(a, y), (b, z)]: [(&PackedMatrix, &mut [f32]); 2],
    then: impl Fn(&mut [f32], &[f32]) + Sync,
) {
    assert!(a.rows == b.rows && a.row_group == b.row_group, "different matrices");
    a.check(xs, y);
    b.check(xs, z);
    let [x] = xs else {
        let kernel = a.kernels.for_inputs(xs.len());
        let mut tasks = tasks(team, kernel, xs, [(a, y), (b, z)]);
        return team.for_each(&mut tasks, |(xs, parts)| {
            kernel.gemm_parts(parts, xs);
            let [Part { ys, .. }, Part { ys: zs, .. }] = &mut parts[..] else {
                unreachable!("two matrices of one shape");
            };
            for (y, z) in ys.iter_mut().zip(zs) {
                then(y, z);
            }
        });
    };
    team.zip((y, z), (1, 1), a.row_group, CHUNKS_PER_THREAD, |start, y, z| {
        a.kernels.decode().gemv(a, start..start + y.len(), x, y);
        b.kernels.decode().gemv(b, start..start + z.len(), x, z);
        then(y, z);
    });
}

/// Ternary kernels that `isa` can run, fastest first; the last is scalar.
#[must_use]
pub fn available(isa: Isa) -> Vec<&'static dyn Kernel> {
    static ALL: OnceLock<Vec<(Isa, Box<dyn Kernel>)>> = OnceLock::new();
    let all = ALL.get_or_init(|| {
        let mut kernels: Vec<(Isa, Box<dyn Kernel>)> = Vec::new();
        for isa in Isa::available().into_iter().rev() {
            #[cfg(target_arch = "x86_64")]
            x86_64::register(isa, &mut kernels);
            #[cfg(target_arch = "aarch64")]
            aarch64::register(isa, &mut kernels);
            if isa == Isa::GENERIC {
                generic::register(&mut kernels);
            }
        }
        kernels
    });
    all.iter().filter(|(needs, _)| *needs <= isa).map(|(_, kernel)| kernel.as_ref()).collect()
}

/// The kernels of [`Layout::scale_granule`] for `activations` that `isa` can run, fastest
/// first; the last is scalar. All give the same bits, which are not those of
/// [`available`], though with int8 activations and one scale they differ by roundings only.
#[must_use]
pub fn available_grouped(isa: Isa, activations: Activations) -> Vec<&'static dyn Kernel> {
    static ALL: OnceLock<Vec<(Isa, generic::i2g::Grouped)>> = OnceLock::new();
    let all = ALL.get_or_init(|| {
        let kinds = [Activations::Float, Activations::Int8];
        let each = |isa| kinds.map(|kind| (isa, generic::i2g::Grouped::new(isa, kind)));
        Isa::available().into_iter().rev().flat_map(each).collect()
    });
    let fits = |(needs, kernel): &&(Isa, generic::i2g::Grouped)| {
        *needs <= isa && kernel.activations() == activations
    };
    all.iter().filter(fits).map(|(_, kernel)| kernel as &dyn Kernel).collect()
}

/// The kernels of `levels` that `isa` can run, fastest first; the last is
/// scalar. For ternary levels that is [`available`]; for others the element-wise
/// tables of the levels' own layout, such as `elut(-3,-1,1,3)`.
///
/// Kernels and layouts of a set of levels are made when it is first asked for,
/// and stay: a few kilobytes for each of the sets that a process uses.
#[must_use]
pub fn available_for(isa: Isa, levels: Levels) -> Vec<&'static dyn Kernel> {
    /// What there is for each set of levels, and what it needs.
    type Sets = HashMap<Levels, &'static [(Isa, Box<dyn Kernel>)]>;
    static ALL: Mutex<Option<Sets>> = Mutex::new(None);
    if levels == Levels::TERNARY {
        return available(isa);
    }
    // No code panics while it holds the lock, and a map is never half-made.
    let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
    let kernels = all.get_or_insert_default().entry(levels).or_insert_with(|| {
        let layout = generic::elut::layout(levels);
        let mut kernels: Vec<(Isa, Box<dyn Kernel>)> = Vec::new();
        for isa in Isa::available().into_iter().rev() {
            #[cfg(target_arch = "x86_64")]
            kernels.extend(x86_64::elut(isa, layout).map(|kernel| (isa, kernel)));
            #[cfg(target_arch = "aarch64")]
            kernels.extend(aarch64::elut(isa, layout).map(|kernel| (isa, kernel)));
            if isa == Isa::GENERIC {
                kernels.push((isa, generic::elut(layout)));
            }
        }
        kernels.leak()
    });
    kernels.iter().filter(|(needs, _)| *needs <= isa).map(|(_, kernel)| kernel.as_ref()).collect()
}

/// The kernel called `name`, or the fastest one for these activations.
///
/// # Errors
/// A name that is not in [`available`] or [`available_grouped`], or of a kernel for other
/// activations.
pub fn by_name(
    isa: Isa,
    activations: Activations,
    name: Option<&str>,
) -> Result<&'static dyn Kernel, Error> {
    let mut kernels = match activations {
        Activations::Int8 => available(isa),
        Activations::Float => Vec::new(),
    };
    kernels.extend(available_grouped(isa, activations));
    match name {
        None => Ok(kernels[0]),
        Some(name) => kernels.iter().find(|k| k.name() == name).copied().ok_or_else(|| {
            let names: Vec<_> = kernels.iter().map(|k| k.name()).collect();
            invalid!(
                "unknown kernel {name:?}; for {} activations this machine has {}",
                activations.name(),
                names.join(", ")
            )
        }),
    }
}
