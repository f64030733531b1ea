//! Memory for what is read in bulk: on cache lines, and on huge pages where it
//! is large. Apart because kernels hold their weights in it and `threads.rs`
//! measures the memory's speed with it: a limit measured on other pages than
//! the weights lie on is none.

// Raw memory is what this file is about; its users see slices.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
#[cfg(target_os = "linux")]
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// A cache line: no aligned 64-byte load crosses two.
const LINE: usize = 64;

/// From this size on, memory comes straight from the operating system, on huge
/// pages of 2 MiB if it has any. Plain reading by one thread of a Zen 3 came to
/// 17.5, 18.1 and 20.4 GB/s on small pages and to 22.5, 20.9 and 20.5 on huge
/// ones, in turns; by two threads, where memory is the limit, to 30 to 33 and
/// 28 to 33. Where huge pages are given on request only (`madvise`, the usual
/// setting), they have to be asked for.
#[cfg(target_os = "linux")]
const HUGE: usize = 2 << 20;

/// Matrices from this size on share mappings ([`AlignedBytes::zeroed_shared`]).
/// Smaller ones are those of models that caches hold, and a huge page would be
/// most of what such a model takes.
#[cfg(target_os = "linux")]
const SHARED: usize = HUGE / 8;

/// Size of a shared mapping: of each, at most a huge page, 3 %, is in memory for
/// nothing; whatever else no matrix took was never written, and so is no memory.
/// With a mapping for each matrix, those of 4.4 MB in a 2B model took 6, 142 MB
/// in all, and those of 1.6 MB lay on small pages.
#[cfg(target_os = "linux")]
const MAPPING: usize = 64 << 20;

/// A type without padding, of which any bytes are a value.
///
/// # Safety
/// That it is so.
pub(crate) unsafe trait Plain: Copy {}

// SAFETY: integers, of which any bytes are some.
unsafe impl Plain for i16 {}
// SAFETY: as above.
unsafe impl Plain for i32 {}
// SAFETY: as above.
unsafe impl Plain for u64 {}

/// Zeroed bytes that start on a cache line. Large ones are not yet provided by
/// the operating system: the threads that write them first do, side by side.
pub(crate) struct AlignedBytes {
    start: NonNull<u8>,
    len: usize,
    /// Bytes that may be used without another allocation.
    capacity: usize,
    origin: Origin,
}

/// Where memory came from, and so how it is given back.
enum Origin {
    /// Nowhere: there are no bytes.
    Empty,
    Heap(Layout),
    /// A part of a mapping, which lives as long as any of its parts.
    #[cfg(target_os = "linux")]
    Mapped {
        _mapping: Arc<Mapping>,
    },
}

/// Zeroed memory from the operating system, on huge pages if it has any.
#[cfg(target_os = "linux")]
struct Mapping {
    /// What was mapped, and how many bytes.
    base: NonNull<libc::c_void>,
    size: usize,
    /// The first huge page in it; `capacity` bytes from there on are in use.
    start: NonNull<u8>,
    capacity: usize,
}

// SAFETY: the addresses are only handed on, and unmapping may be done by any thread.
#[cfg(target_os = "linux")]
unsafe impl Send for Mapping {}
// SAFETY: as above.
#[cfg(target_os = "linux")]
unsafe impl Sync for Mapping {}

#[cfg(target_os = "linux")]
impl Mapping {
    /// At least `len` bytes, aligned to huge pages; None if there is no room.
    fn new(len: usize) -> Option<Self> {
        let capacity = len.checked_next_multiple_of(HUGE)?;
        let size = capacity.checked_add(HUGE)?;
        // SAFETY: a new private mapping, wherever there is room: nothing of
        // this process is touched.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return None;
        }
        let base = NonNull::new(base)?;
        let skip = base.cast::<u8>().as_ptr().align_offset(HUGE).min(HUGE);
        // SAFETY: `skip` is at most the `HUGE` bytes that `size` has beyond `capacity`.
        let start = unsafe { base.cast::<u8>().add(skip) };
        // Advice: without huge pages the kernel says no, and small ones do.
        // SAFETY: the range lies in the mapping.
        unsafe { libc::madvise(start.as_ptr().cast(), capacity, libc::MADV_HUGEPAGE) };
        Some(Self { base, size, start, capacity })
    }
}

#[cfg(target_os = "linux")]
impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this size; whoever has a part of it has an
        // `Arc` of it, so none is left.
        unsafe { libc::munmap(self.base.as_ptr(), self.size) };
    }
}

// SAFETY: the bytes are owned and plain, and `&AlignedBytes` only reads them.
unsafe impl Send for AlignedBytes {}
// SAFETY: as above.
unsafe impl Sync for AlignedBytes {}

impl AlignedBytes {
    /// `len` zeros. Without memory for them the process ends, as with `Vec`.
    pub(crate) fn zeroed(len: usize) -> Self {
        Self::try_zeroed(len).unwrap_or_else(|| {
            handle_alloc_error(
                Layout::array::<[u8; LINE]>(len.div_ceil(LINE)).unwrap_or(Layout::new::<u8>()),
            )
        })
    }

    /// `len` zeros, if there is memory for them.
    pub(crate) fn try_zeroed(len: usize) -> Option<Self> {
        if len == 0 {
            return Some(Self::default());
        }
        #[cfg(target_os = "linux")]
        if len >= HUGE {
            return Self::mapped(len);
        }
        let capacity = len.checked_next_multiple_of(LINE)?;
        let layout = Layout::from_size_align(capacity, LINE).ok()?;
        // SAFETY: the layout's size is not zero.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        Some(Self { start, len, capacity, origin: Origin::Heap(layout) })
    }

    /// `len` zeros for a matrix of a model, side by side with its others, so
    /// that they fill whole huge pages together. Their memory goes back to the
    /// operating system when all that share a mapping are dropped.
    pub(crate) fn zeroed_shared(len: usize) -> Self {
        #[cfg(target_os = "linux")]
        if len >= SHARED
            && let Some(bytes) = Self::shared(len)
        {
            return bytes;
        }
        Self::zeroed(len)
    }

    /// A mapping of its own; None if there is no room for it.
    #[cfg(target_os = "linux")]
    fn mapped(len: usize) -> Option<Self> {
        let mapping = Mapping::new(len)?;
        let (start, capacity) = (mapping.start, mapping.capacity);
        Some(Self { start, len, capacity, origin: Origin::Mapped { _mapping: Arc::new(mapping) } })
    }

    /// The next part of the mapping that is being filled, or of a new one.
    #[cfg(target_os = "linux")]
    fn shared(len: usize) -> Option<Self> {
        /// The mapping that is being filled, and how far. Parts that are dropped
        /// are not used again: what is handed out was never written.
        static FILLED: Mutex<(Weak<Mapping>, usize)> = Mutex::new((Weak::new(), 0));
        let capacity = len.checked_next_multiple_of(LINE)?;
        // No code panics while it holds the lock.
        let mut filled = FILLED.lock().unwrap_or_else(PoisonError::into_inner);
        let open = filled.0.upgrade().filter(|m| m.capacity - filled.1 >= capacity);
        let mapping = if let Some(mapping) = open {
            mapping
        } else {
            let mapping = Arc::new(Mapping::new(capacity.max(MAPPING))?);
            *filled = (Arc::downgrade(&mapping), 0);
            mapping
        };
        // SAFETY: `filled.1 + capacity <= mapping.capacity`.
        let start = unsafe { mapping.start.add(filled.1) };
        filled.1 += capacity;
        Some(Self { start, len, capacity, origin: Origin::Mapped { _mapping: mapping } })
    }

    /// Keeps what fits of the old content; the rest is zero or old.
    pub(crate) fn resize(&mut self, len: usize) {
        if len > self.capacity {
            let mut larger = Self::zeroed(len);
            larger.as_mut_slice()[..self.len].copy_from_slice(self.as_slice());
            *self = larger;
        }
        self.len = len;
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: `start` is the start of `capacity >= len` initialized bytes that
        // `self` owns, or dangling with none.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes the borrow unique.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }

    /// As many whole `T` as there is room for.
    pub(crate) fn as_slice_of<T: Plain>(&self) -> &[T] {
        const { assert!(align_of::<T>() <= LINE) };
        // SAFETY: as in `as_slice`; the start is on a cache line, `T` is no stricter,
        // and any bytes are a `T`.
        unsafe { std::slice::from_raw_parts(self.start_of::<T>(), self.len / size_of::<T>()) }
    }

    /// As many whole `T` as there is room for.
    pub(crate) fn as_mut_slice_of<T: Plain>(&mut self) -> &mut [T] {
        const { assert!(align_of::<T>() <= LINE) };
        // SAFETY: as in `as_slice_of` and `as_mut_slice`.
        unsafe { std::slice::from_raw_parts_mut(self.start_of::<T>(), self.len / size_of::<T>()) }
    }

    fn start_of<T>(&self) -> *mut T {
        if self.len == 0 { std::ptr::dangling_mut() } else { self.start.as_ptr().cast() }
    }

    pub(crate) fn as_i8(&self) -> &[i8] {
        // SAFETY: as in `as_slice`; every byte is an i8.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.len) }
    }

    pub(crate) fn as_mut_i8(&mut self) -> &mut [i8] {
        // SAFETY: as in `as_mut_slice`; every byte is an i8, and every i8 a byte.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.len) }
    }
}

impl Default for AlignedBytes {
    fn default() -> Self {
        Self { start: NonNull::dangling(), len: 0, capacity: 0, origin: Origin::Empty }
    }
}

impl Clone for AlignedBytes {
    fn clone(&self) -> Self {
        let mut copy = Self::zeroed(self.len);
        copy.as_mut_slice().copy_from_slice(self.as_slice());
        copy
    }
}

impl std::fmt::Debug for AlignedBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedBytes({} bytes)", self.len)
    }
}

impl Drop for AlignedBytes {
    fn drop(&mut self) {
        match self.origin {
            Origin::Empty => {}
            // SAFETY: allocated with this layout, and not freed before.
            Origin::Heap(layout) => unsafe { dealloc(self.start.as_ptr(), layout) },
            // The mapping goes with its last part.
            #[cfg(target_os = "linux")]
            Origin::Mapped { .. } => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_zero_aligned_and_kept() {
        for len in [0, 1, 63, 64, 65, 4096, (2 << 20) - 1, 2 << 20, (5 << 20) + 3] {
            for mut bytes in [AlignedBytes::zeroed(len), AlignedBytes::zeroed_shared(len)] {
                assert_eq!(bytes.len(), len);
                assert!(bytes.as_slice().iter().all(|&b| b == 0));
                assert!(len == 0 || bytes.as_slice().as_ptr().align_offset(LINE) == 0);
                for (i, b) in bytes.as_mut_slice().iter_mut().enumerate() {
                    *b = (i % 251) as u8;
                }
                let copy = bytes.clone();
                bytes.resize(2 * len + 1);
                assert_eq!(&bytes.as_slice()[..len], copy.as_slice());
                bytes.resize(len / 2);
                assert_eq!(bytes.as_slice(), &copy.as_slice()[..len / 2]);
                assert_eq!(bytes.as_i8().len(), bytes.as_mut_i8().len());
            }
        }
    }

    #[test]
    fn parts_of_a_mapping_are_apart() {
        let lens = [1 << 20, (1 << 20) + 1, 70 << 20, 300_000, 63 << 20, 3 << 20, 5];
        let mut parts: Vec<_> = lens.map(AlignedBytes::zeroed_shared).into();
        for (i, part) in parts.iter_mut().enumerate() {
            assert!(part.as_slice().iter().all(|&b| b == 0), "part {i}");
            part.as_mut_slice().fill(i as u8 + 1);
        }
        // Others stay when one goes, and what comes after is zero again.
        parts.remove(1);
        let next = AlignedBytes::zeroed_shared(1 << 20);
        assert!(next.as_slice().iter().all(|&b| b == 0));
        for (part, i) in parts.iter().zip([0, 2, 3, 4, 5, 6]) {
            assert!(part.len() == lens[i] && part.as_slice().iter().all(|&b| b == i as u8 + 1));
        }
    }
}
