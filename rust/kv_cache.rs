//! Keys and values of one sequence: storage, append, truncate. No attention
//! maths, but the layout is made for it.
//!
//! There are pages of 128 positions, in which for each layer and key/value head
//! stand:
//!
//! - keys in groups of 32 positions, transposed: `[group][head_dim][32]`, so
//!   that the lanes of a register are keys;
//! - values in groups of 32 dimensions: `[group][position][32]`, so that the
//!   lanes are dimensions; `head_dim` is rounded up with zeros.
//!
//! A strip of 32 is two registers, which attention takes side by side, and
//! it walks each group from beginning to end: one stream. Values by position,
//! `[position][head_dim]`, were read in strides, at a third of the speed.
//!
//! Rounded to the cache's type when written; prefill and decode both read
//! them from here, so they see the same numbers. Float16 saturates at +-65504
//! instead of becoming infinite. Pages are added as they are needed: a cache
//! costs what it holds, and running out of memory is an error like any other.
//!
//! Sequences that begin alike share pages ([`KvCache::fork`]). A page that is
//! shared is never written: the page is copied first.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::cpu::Isa;
use crate::error::{Error, invalid};
use crate::floats::{F16, LANES};
use crate::memory::{AlignedBytes, Plain};
use crate::ops::lanes::Load;
use crate::threads::Team;

/// Positions of a page, which is also a block of the attention's softmax.
pub(crate) const PAGE: usize = 128;

/// Type of the stored keys and values.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KvDtype {
    /// float16: half the memory and half the reading, the default.
    F16,
    /// float32, for comparison with outside oracles.
    F32,
}

impl KvDtype {
    fn n_bytes(self) -> usize {
        match self {
            KvDtype::F16 => 2,
            KvDtype::F32 => 4,
        }
    }

    /// From its name, `"f16"` or `"f32"`.
    ///
    /// # Errors
    /// Any other name.
    pub fn from_name(name: &str) -> Result<Self, Error> {
        match name {
            "f16" => Ok(KvDtype::F16),
            "f32" => Ok(KvDtype::F32),
            _ => Err(invalid!("kv_dtype is {name:?}; wanted \"f16\" or \"f32\"")),
        }
    }
}

/// A number that no other model in this process has. Keys and values of one
/// model mean nothing to another, even of the same shape.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ModelId(u64);

impl ModelId {
    /// One that was never given out.
    #[must_use]
    pub fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// Whose keys and values a cache holds, and what for each position.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KvShape {
    /// The model they belong to.
    pub model: ModelId,
    /// Layers.
    pub n_layers: usize,
    /// Key/value heads of a layer.
    pub n_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

impl KvShape {
    /// `head_dim` rounded up to whole strips.
    fn width(self) -> usize {
        self.head_dim.next_multiple_of(STRIP)
    }
}

/// Elements of a [`Strip`]; divides [`PAGE`].
pub(crate) const STRIP: usize = 2 * LANES;

/// Two registers of elements, on a cache line of their own.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(crate) struct Strip<E>(pub(crate) [[E; LANES]; 2]);

// SAFETY: 32 numbers of 16 or 32 bits, without padding: any bytes are some.
#[expect(unsafe_code, reason = "a promise about the type above")]
unsafe impl Plain for Strip<F16> {}
// SAFETY: as above.
#[expect(unsafe_code, reason = "a promise about the type above")]
unsafe impl Plain for Strip<f32> {}

/// One head's keys and values of [`PAGE`] positions.
#[derive(Clone, Copy)]
pub(crate) struct Page<'a, E> {
    /// `[position / 32][dimension][position % 32]`
    pub(crate) keys: &'a [Strip<E>],
    /// `[dimension / 32][position][dimension % 32]`
    pub(crate) values: &'a [Strip<E>],
}

/// A type that keys and values are rounded to.
pub(crate) trait KvElement: Load {
    /// Rounds half to even; saturates.
    fn from_f32(x: f32) -> Self;

    /// Rounds many, which compiles to vector code.
    #[inline(always)]
    fn round_all(from: &[f32], to: &mut [Self]) {
        for (to, &x) in to.iter_mut().zip(from) {
            *to = Self::from_f32(x);
        }
    }
}

impl KvElement for f32 {
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
}

impl KvElement for F16 {
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        F16::from_f32_saturating(x)
    }
}

/// Pages of all heads of all layers. Those of the same positions lie together,
/// `[layer][head]` and keys before values, so that a layer is read in one
/// stream, and on huge pages where they are large.
pub(crate) struct Pages<E> {
    pages: Vec<Arc<AlignedBytes>>,
    head_dim: usize,
    /// Room for one head's key and value of a single token, rounded, before they are
    /// written.
    rounded: Vec<E>,
}

impl<E: KvElement> Pages<E>
where
    Strip<E>: Plain,
{
    fn new(shape: KvShape) -> Self {
        let rounded = vec![E::default(); 2 * shape.head_dim];
        Self { pages: Vec::new(), head_dim: shape.head_dim, rounded }
    }

    /// Strips of the keys of a page, and of its values.
    fn strips(&self) -> (usize, usize) {
        let values = self.head_dim.div_ceil(STRIP) * PAGE;
        (PAGE / STRIP * self.head_dim, values)
    }

    /// Positions `PAGE * index` and on of head `head`, counted over all layers.
    #[inline(always)]
    pub(crate) fn page(&self, head: usize, index: usize) -> Page<'_, E> {
        let (keys, values) = self.strips();
        let page = &self.pages[index].as_slice_of::<Strip<E>>()[head * (keys + values)..];
        Page { keys: &page[..keys], values: &page[keys..keys + values] }
    }

    /// Adds pages until `last` positions fit, and copies those that are shared
    /// among the pages from position `first` on, which are to be written; None if
    /// there is no memory.
    fn reserve(&mut self, heads: usize, first: usize, last: usize) -> Option<()> {
        let (keys, values) = self.strips();
        while self.pages.len() * PAGE < last {
            let n_bytes = (heads * (keys + values)).checked_mul(size_of::<Strip<E>>())?;
            self.pages.try_reserve(1).ok()?;
            self.pages.push(Arc::new(AlignedBytes::try_zeroed(n_bytes)?));
        }
        for page in &mut self.pages[first / PAGE..last.div_ceil(PAGE)] {
            if Arc::get_mut(page).is_none() {
                *page = Arc::new(copy_of(page)?);
            }
        }
        Some(())
    }

    /// The pages of the first `positions`: whole ones shared, the last copied where it
    /// is not full; None if there is no memory.
    fn fork(&self, positions: usize) -> Option<Self> {
        let mut pages = Vec::new();
        pages.try_reserve(positions.div_ceil(PAGE)).ok()?;
        pages.extend_from_slice(&self.pages[..positions / PAGE]);
        if !positions.is_multiple_of(PAGE) {
            pages.push(Arc::new(copy_of(&self.pages[positions / PAGE])?));
        }
        let rounded = vec![E::default(); self.rounded.len()];
        Some(Self { pages, head_dim: self.head_dim, rounded })
    }

    /// A page to be written.
    #[inline(always)]
    fn page_mut(page: &mut Arc<AlignedBytes>) -> &mut [Strip<E>] {
        Arc::get_mut(page).expect("`reserve` copied what was shared").as_mut_slice_of()
    }

    /// Writes one position of one head.
    #[inline(always)]
    fn write(&mut self, head: usize, position: usize, key: &[E], value: &[E]) {
        let (keys, values) = self.strips();
        let page = Self::page_mut(&mut self.pages[position / PAGE]);
        let page = &mut page[head * (keys + values)..][..keys + values];
        let (keys, values) = page.split_at_mut(keys);
        put(keys, values, position % PAGE, key, value);
    }

    /// The parts of the `n` heads from `head` on, to be written side by side.
    fn heads(&mut self, head: usize, n: usize, pages: Range<usize>) -> Vec<Head<'_, E>> {
        let (keys, values) = self.strips();
        let mut heads: Vec<Head<'_, E>> = (0..n).map(|_| Vec::new()).collect();
        for page in &mut self.pages[pages] {
            let page = &mut Self::page_mut(page)[head * (keys + values)..];
            for (head, page) in heads.iter_mut().zip(page.chunks_exact_mut(keys + values)) {
                head.push(page.split_at_mut(keys));
            }
        }
        heads
    }
}

/// A page of the same content, if there is memory for it.
fn copy_of(page: &AlignedBytes) -> Option<AlignedBytes> {
    let mut copy = AlignedBytes::try_zeroed(page.len())?;
    copy.as_mut_slice().copy_from_slice(page.as_slice());
    Some(copy)
}

/// Keys and values of one head, by pages.
type Head<'a, E> = Vec<(&'a mut [Strip<E>], &'a mut [Strip<E>])>;

/// Writes one position of a page of one head.
#[inline(always)]
fn put<E: KvElement>(
    keys: &mut [Strip<E>],
    values: &mut [Strip<E>],
    position: usize,
    key: &[E],
    value: &[E],
) {
    let group = &mut keys[position / STRIP * key.len()..][..key.len()];
    for (strip, &k) in group.iter_mut().zip(key) {
        strip.0[position % STRIP / LANES][position % LANES] = k;
    }
    for (strips, v) in values.chunks_exact_mut(PAGE).zip(value.chunks(STRIP)) {
        strips[position].0.as_flattened_mut()[..v.len()].copy_from_slice(v);
    }
}

/// Rounds `keys` and `values`, `[token][head][head_dim]`, and writes them to
/// the `n` heads from `head` on, from position `first` on. Of several tokens, heads
/// are shared out over the team.
fn write_all<E: KvElement>(
    (isa, team): (Isa, &Team),
    pages: &mut Pages<E>,
    (head, n): (usize, usize),
    first: usize,
    keys: &[f32],
    values: &[f32],
) where
    Strip<E>: Plain + Send,
{
    let head_dim = pages.head_dim;
    let tokens = || keys.chunks_exact(n * head_dim).zip(values.chunks_exact(n * head_dim));
    if tokens().len() == 1 {
        return isa.vectorize(
            #[inline(always)]
            || {
                let mut rounded = std::mem::take(&mut pages.rounded);
                let (key, value) = rounded.split_at_mut(head_dim);
                let heads = keys.chunks_exact(head_dim).zip(values.chunks_exact(head_dim));
                for (h, (k, v)) in heads.enumerate() {
                    E::round_all(k, key);
                    E::round_all(v, value);
                    pages.write(head + h, first, key, value);
                }
                pages.rounded = rounded;
            },
        );
    }
    let first_page = first / PAGE;
    let end_page = (first + tokens().len()).div_ceil(PAGE);
    let heads = pages.heads(head, n, first_page..end_page);
    team.for_each(&mut heads.into_iter().enumerate().collect::<Vec<_>>(), |(h, pages)| {
        let mut rounded = vec![E::default(); 2 * head_dim];
        let (key, value) = rounded.split_at_mut(head_dim);
        let part = *h * head_dim..(*h + 1) * head_dim;
        isa.vectorize(
            #[inline(always)]
            || {
                for (position, (k, v)) in (first - first_page * PAGE..).zip(tokens()) {
                    E::round_all(&k[part.clone()], key);
                    E::round_all(&v[part.clone()], value);
                    let (keys, values) = &mut pages[position / PAGE];
                    put(keys, values, position % PAGE, key, value);
                }
            },
        );
    });
}

fn no_memory(positions: usize) -> Error {
    Error::State(format!("no memory for keys and values of {positions} tokens"))
}

/// Keys and values of all layers.
pub(crate) enum Storage {
    F16(Pages<F16>),
    F32(Pages<f32>),
}

/// Keys and values of one sequence.
pub struct KvCache {
    shape: KvShape,
    capacity: usize,
    length: usize,
    n_bytes: usize,
    storage: Storage,
}

impl KvCache {
    /// An empty cache for up to `capacity` positions.
    ///
    /// # Errors
    /// No capacity, or more than can be addressed.
    pub fn new(shape: KvShape, capacity: usize, dtype: KvDtype) -> Result<Self, Error> {
        let n_bytes = capacity
            .checked_next_multiple_of(PAGE)
            .and_then(|positions| positions.checked_mul(shape.n_layers * shape.n_kv_heads))
            .and_then(|n| n.checked_mul((shape.head_dim + shape.width()) * dtype.n_bytes()))
            .filter(|_| capacity > 0)
            .ok_or_else(|| {
                invalid!("a cache capacity of {capacity}; wanted 1 to what can be addressed")
            })?;
        let storage = match dtype {
            KvDtype::F16 => Storage::F16(Pages::new(shape)),
            KvDtype::F32 => Storage::F32(Pages::new(shape)),
        };
        Ok(Self { shape, capacity, length: 0, n_bytes, storage })
    }

    /// Tokens held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether no token is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Tokens that fit.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// What it holds for each position.
    #[must_use]
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Bytes that a full cache takes.
    #[must_use]
    pub fn n_bytes(&self) -> usize {
        self.n_bytes
    }

    /// Forgets the tokens from `length` on.
    ///
    /// # Errors
    /// `length` is more than there are.
    pub fn truncate(&mut self, length: usize) -> Result<(), Error> {
        if length > self.length {
            return Err(invalid!("cannot truncate {} tokens to {length}", self.length));
        }
        self.length = length;
        Ok(())
    }

    /// Takes the memory for `n` more tokens.
    ///
    /// # Errors
    /// The capacity is exceeded, or there is no memory.
    pub(crate) fn reserve(&mut self, n: usize) -> Result<(), Error> {
        let room = self.capacity - self.length;
        if n > room {
            return Err(invalid!(
                "{n} tokens for a cache that holds {} of {}: room for {room}",
                self.length,
                self.capacity
            ));
        }
        let (heads, positions) = (self.shape.n_layers * self.shape.n_kv_heads, self.length + n);
        match &mut self.storage {
            Storage::F16(pages) => pages.reserve(heads, self.length, positions),
            Storage::F32(pages) => pages.reserve(heads, self.length, positions),
        }
        .ok_or_else(|| no_memory(positions))
    }

    /// A cache of its own that begins with the first `length` tokens of this one.
    /// Whole pages are shared until one of the two writes to them, so it costs
    /// at most one page.
    ///
    /// # Errors
    /// `length` is more than there are or than `capacity`, or there is no memory.
    pub fn fork(&self, length: usize, capacity: usize) -> Result<Self, Error> {
        if length > self.length || length > capacity {
            return Err(invalid!(
                "cannot take {length} tokens of {} into a cache of {capacity}",
                self.length
            ));
        }
        let mut fork = Self::new(self.shape, capacity, self.dtype())?;
        fork.storage = match &self.storage {
            Storage::F16(pages) => pages.fork(length).map(Storage::F16),
            Storage::F32(pages) => pages.fork(length).map(Storage::F32),
        }
        .ok_or_else(|| no_memory(length))?;
        fork.length = length;
        Ok(fork)
    }

    /// Type of the stored keys and values.
    fn dtype(&self) -> KvDtype {
        match self.storage {
            Storage::F16(_) => KvDtype::F16,
            Storage::F32(_) => KvDtype::F32,
        }
    }

    /// Bytes of memory that caches take now; a page that several share counts
    /// once.
    pub fn bytes_held<'a>(caches: impl IntoIterator<Item = &'a Self>) -> usize {
        let mut seen = HashSet::new();
        caches
            .into_iter()
            .flat_map(|cache| match &cache.storage {
                Storage::F16(pages) => &pages.pages,
                Storage::F32(pages) => &pages.pages,
            })
            .filter(|page| seen.insert(Arc::as_ptr(page)))
            .map(|page| page.len())
            .sum()
    }

    /// Writes the keys and values of consecutive tokens of one layer from
    /// position `first` on; `keys` and `values` are
    /// `[token][n_kv_heads * head_dim]`. The length does not change until
    /// [`advance`](Self::advance), so a pass that fails leaves no trace.
    pub(crate) fn write(
        &mut self,
        (isa, team): (Isa, &Team),
        layer: usize,
        first: usize,
        keys: &[f32],
        values: &[f32],
    ) {
        let on = (isa, team);
        let heads = (layer * self.shape.n_kv_heads, self.shape.n_kv_heads);
        match &mut self.storage {
            Storage::F16(pages) => write_all(on, pages, heads, first, keys, values),
            Storage::F32(pages) => write_all(on, pages, heads, first, keys, values),
        }
    }

    /// Counts `n` more tokens, written in every layer.
    pub(crate) fn advance(&mut self, n: usize) {
        debug_assert!(self.length + n <= self.capacity);
        self.length += n;
    }

    pub(crate) fn storage(&self) -> &Storage {
        &self.storage
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn truncates_only_downwards() {
        let shape = KvShape { model: ModelId::next(), n_layers: 1, n_kv_heads: 1, head_dim: 4 };
        let mut cache = KvCache::new(shape, 3, KvDtype::F16).unwrap();
        assert!(cache.reserve(4).is_err());
        cache.reserve(2).unwrap();
        cache.write((Isa::GENERIC, &Team::new(Some(1)).unwrap()), 0, 0, &[1.0; 8], &[2.0; 8]);
        cache.advance(2);
        assert!(cache.truncate(3).is_err());
        assert!(cache.truncate(1).is_ok());
        assert_eq!(cache.len(), 1);
        assert!(KvCache::new(shape, 0, KvDtype::F16).is_err());
        assert!(KvCache::new(shape, usize::MAX, KvDtype::F16).is_err());
        let mut huge = KvCache::new(shape, 1 << 50, KvDtype::F16).unwrap();
        assert!(huge.reserve(1).is_ok());
    }

    /// Writes `n` tokens whose keys and values are all `x`.
    fn fill(cache: &mut KvCache, team: &Team, n: usize, x: f32) {
        let row = vec![x; n * 4];
        cache.reserve(n).unwrap();
        cache.write((Isa::GENERIC, team), 0, cache.len(), &row, &row);
        cache.advance(n);
    }

    /// The first value of each position.
    fn values(cache: &KvCache) -> Vec<f32> {
        let Storage::F32(pages) = cache.storage() else { panic!("made with f32") };
        (0..cache.len()).map(|i| pages.page(0, i / PAGE).values[i % PAGE].0[0][0]).collect()
    }

    #[test]
    fn forks_share_pages_and_never_each_others_writing() {
        let team = Team::new(Some(1)).unwrap();
        let shape = KvShape { model: ModelId::next(), n_layers: 1, n_kv_heads: 1, head_dim: 4 };
        let mut first = KvCache::new(shape, 3 * PAGE, KvDtype::F32).unwrap();
        fill(&mut first, &team, 2 * PAGE + 5, 1.0);
        let page = KvCache::bytes_held([&first]) / 3;
        let mut fork = first.fork(2 * PAGE, 4 * PAGE).unwrap();
        assert_eq!(KvCache::bytes_held([&first, &fork]), 3 * page);
        fill(&mut fork, &team, 1, 2.0);
        assert_eq!(KvCache::bytes_held([&first, &fork]), 4 * page);
        // The last page is copied where it is not full.
        let mut odd = first.fork(PAGE + 7, 2 * PAGE).unwrap();
        assert_eq!(KvCache::bytes_held([&first, &odd]), 4 * page);
        fill(&mut odd, &team, 3, 3.0);
        // Cut back into a shared page and written over: the other one keeps its own.
        fork.truncate(PAGE - 1).unwrap();
        fill(&mut fork, &team, 2, 4.0);
        drop(odd);
        assert_eq!(values(&first), vec![1.0; 2 * PAGE + 5]);
        let mut expected = vec![1.0; PAGE - 1];
        expected.extend([4.0, 4.0]);
        assert_eq!(values(&fork), expected);
        assert!(first.fork(2 * PAGE + 6, 9 * PAGE).is_err());
        assert!(first.fork(2 * PAGE, PAGE).is_err());
        assert!(KvCache::bytes_held([&first.fork(0, 1).unwrap()]) == 0);
    }
}
