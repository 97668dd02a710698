//! An allocator for programs that use the kernels.

use std::alloc::{GlobalAlloc, Layout, System};

/// The system's allocator, except that large buffers begin with a cache line.
///
/// A 512-bit register then reads one line instead of two, and whole lines can be written past the caches.
/// A program installs it with `#[global_allocator]`; without it results are the same, but slower.
#[derive(Debug, Clone, Copy, Default)]
pub struct CacheLines;

/// Bytes from which a buffer is aligned.
const LARGE: usize = 1024;

/// Bytes of a cache line.
pub(crate) const CACHE_LINE: usize = 64;

/// What the system is asked for: room for a large buffer behind its own address, which is kept in front
/// of the buffer. (Asked for the alignment itself, glibc cuts its heap into pieces that fit nothing else:
/// memory grows, and single steps take twice their time.)
fn padded(layout: Layout) -> Option<Layout> {
    if layout.size() < LARGE || layout.align() > CACHE_LINE {
        return None;
    }
    Layout::from_size_align(layout.size().checked_add(CACHE_LINE)?, ADDRESS_BYTES).ok()
}

/// Bytes of an address, which the system's buffers are aligned to at least.
const ADDRESS_BYTES: usize = size_of::<*mut u8>();

/// The buffer within `start`, which has room for a [`padded`] layout.
///
/// # Safety
/// `start` is null or the system's answer to such a layout.
unsafe fn buffer_in(start: *mut u8) -> *mut u8 {
    if start.is_null() {
        return start;
    }
    // The next line but never this one, so that the address has room between.
    let shift = CACHE_LINE - start.addr() % CACHE_LINE;
    // SAFETY: the padding is a line, of which the shift takes an address at least and all at most.
    unsafe {
        let buffer = start.add(shift);
        buffer.sub(ADDRESS_BYTES).cast::<*mut u8>().write(start);
        buffer
    }
}

// SAFETY: every call goes to the system's allocator with a layout that only the given one determines, so
// that memory goes back with the layout that it came with; buffers lie within what the system gave.
unsafe impl GlobalAlloc for CacheLines {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe {
            match padded(layout) {
                Some(padded) => buffer_in(System.alloc(padded)),
                None => System.alloc(layout),
            }
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        unsafe {
            match padded(layout) {
                Some(padded) => buffer_in(System.alloc_zeroed(padded)),
                None => System.alloc_zeroed(layout),
            }
        }
    }

    unsafe fn realloc(&self, buffer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller's promise: the new size is one that a layout can have.
        let new = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
        // SAFETY: as above; a buffer that is padded before or after moves, as its place within changes.
        unsafe {
            if padded(layout).is_none() && padded(new).is_none() {
                return System.realloc(buffer, layout, new_size);
            }
            let moved = self.alloc(new);
            if !moved.is_null() {
                moved.copy_from_nonoverlapping(buffer, layout.size().min(new_size));
                self.dealloc(buffer, layout);
            }
            moved
        }
    }

    unsafe fn dealloc(&self, buffer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise; `alloc` left the address in front of a padded buffer.
        unsafe {
            match padded(layout) {
                Some(padded) => {
                    System.dealloc(buffer.sub(ADDRESS_BYTES).cast::<*mut u8>().read(), padded);
                }
                None => System.dealloc(buffer, layout),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_buffers_begin_with_a_line_and_keep_their_values() {
        for bytes in [1, LARGE - 1, LARGE, 5000, 1 << 20] {
            for align in [1, 16, 64, 4096] {
                let layout = Layout::from_size_align(bytes, align).expect("a small layout");
                let expected = if bytes < LARGE { align } else { align.max(CACHE_LINE) };
                // SAFETY: the layout has a size; the buffer is written and read within it and goes back
                // with the layout that it has by then.
                unsafe {
                    let buffer = CacheLines.alloc_zeroed(layout);
                    assert!(!buffer.is_null() && buffer.addr().is_multiple_of(expected));
                    assert!((0..bytes).all(|i| buffer.add(i).read() == 0));
                    buffer.write_bytes(7, bytes);
                    let grown = CacheLines.realloc(buffer, layout, 2 * bytes);
                    assert!((0..bytes).all(|i| grown.add(i).read() == 7));
                    let layout = Layout::from_size_align(2 * bytes, align).expect("a small layout");
                    CacheLines.dealloc(grown, layout);
                }
            }
        }
    }
}
