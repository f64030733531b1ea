//! Memory for what is read in bulk: on cache lines, and on huge pages where it
//! is large. Apart because kernels hold their weights in it and `threads.rs`
//! measures the memory's speed with it: a limit measured on other pages than
//! the weights lie on is none.

// Raw memory is what this file is about; its users see slices.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

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
    /// A mapping of the second number of bytes at the first address.
    #[cfg(target_os = "linux")]
    Mapped(NonNull<libc::c_void>, usize),
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

    /// From the operating system, aligned to huge pages; None if it has no room.
    #[cfg(target_os = "linux")]
    fn mapped(len: usize) -> Option<Self> {
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
        Some(Self { start, len, capacity, origin: Origin::Mapped(base, size) })
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
            // SAFETY: mapped by `mapped` with this size, and not unmapped before.
            #[cfg(target_os = "linux")]
            Origin::Mapped(base, size) => unsafe {
                libc::munmap(base.as_ptr(), size);
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_zero_aligned_and_kept() {
        for len in [0, 1, 63, 64, 65, 4096, (2 << 20) - 1, 2 << 20, (5 << 20) + 3] {
            let mut bytes = AlignedBytes::zeroed(len);
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
