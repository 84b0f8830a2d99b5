//! What a thread allocates and copies, counted exactly: the allocator, `memcpy` and `memmove` of this test are here.
//!
//! A copy of more than 128 bytes, or of a length that is not known when the code is made, is a call of one of the two; a
//! program's own definition comes before the C library's. What the kernel copies is not seen, and not meant.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// What one thread did while it was watched.
#[derive(Default)]
pub struct Watched {
    is_on: AtomicBool,
    pub allocations: AtomicUsize,
    pub copies: AtomicUsize,
    /// Copies of more than [`SHORT`] bytes.
    pub long_copies: AtomicUsize,
    /// Bytes of the longest copy.
    pub longest: AtomicUsize,
}

/// As long as heads are, with what belongs to them.
pub const SHORT: usize = 256;

thread_local! {
    static WATCHED: Cell<Option<&'static Watched>> = const { Cell::new(None) };
}

impl Watched {
    /// For the rest of the process: its thread may outlive the test.
    pub fn new() -> &'static Self {
        Box::leak(Box::default())
    }

    /// Watches this thread.
    pub fn watch(&'static self) {
        WATCHED.set(Some(self));
    }

    /// Counts what `task`, or the thread meanwhile, does.
    pub fn count<T>(&self, task: impl FnOnce() -> T) -> T {
        self.is_on.store(true, Ordering::SeqCst);
        let done = task();
        self.is_on.store(false, Ordering::SeqCst);
        done
    }

    pub fn read(counter: &AtomicUsize) -> usize {
        counter.load(Ordering::SeqCst)
    }
}

fn note(what: impl FnOnce(&Watched)) {
    if let Some(watched) = WATCHED.get()
        && watched.is_on.load(Ordering::Relaxed)
    {
        what(watched);
    }
}

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: all is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(|watched| _ = watched.allocations.fetch_add(1, Ordering::Relaxed));
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(|watched| _ = watched.allocations.fetch_add(1, Ordering::Relaxed));
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, old: *mut u8, layout: Layout, len: usize) -> *mut u8 {
        note(|watched| _ = watched.allocations.fetch_add(1, Ordering::Relaxed));
        // SAFETY: the caller's promise.
        unsafe { System.realloc(old, layout, len) }
    }

    unsafe fn dealloc(&self, old: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(old, layout) }
    }
}

fn note_copy(len: usize) {
    note(|watched| {
        watched.copies.fetch_add(1, Ordering::Relaxed);
        watched.long_copies.fetch_add(usize::from(len > SHORT), Ordering::Relaxed);
        watched.longest.fetch_max(len, Ordering::Relaxed);
    });
}

/// Copies forwards, by an instruction of its own: a loop would be made a call of what it is part of.
///
/// # Safety
/// As for `memcpy`.
#[cfg(target_arch = "x86_64")]
unsafe fn forwards(to: *mut u8, from: *const u8, len: usize) {
    // SAFETY: the caller's promise; the direction flag is clear, as the calling convention has it.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") len => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags)
        );
    }
}

/// # Safety
/// As the C library's.
#[cfg(target_arch = "x86_64")]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    note_copy(len);
    // SAFETY: the caller's promise.
    unsafe { forwards(to, from, len) };
    to
}

/// # Safety
/// As the C library's.
#[cfg(target_arch = "x86_64")]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    note_copy(len);
    if (to as usize).wrapping_sub(from as usize) >= len {
        // SAFETY: the caller's promise; what is written lies before what is yet to be read.
        unsafe { forwards(to, from, len) };
    } else {
        // SAFETY: from the last byte on; the direction flag is put back.
        unsafe {
            std::arch::asm!(
                "std", "rep movsb", "cld",
                inout("rcx") len => _,
                inout("rdi") to.wrapping_add(len).wrapping_sub(1) => _,
                inout("rsi") from.wrapping_add(len).wrapping_sub(1) => _,
                options(nostack)
            );
        }
    }
    to
}

#[test]
fn what_is_allocated_and_copied_is_seen() {
    let watched = Watched::new();
    watched.watch();
    let len = std::hint::black_box(SHORT + 1);
    let mut bytes = vec![1u8; 2 * len];
    watched.count(|| {
        bytes.copy_within(..len, 7);
        let other = std::hint::black_box(bytes[..len].to_vec());
        bytes[..len - 1].copy_from_slice(&other[1..]);
    });
    assert_eq!(Watched::read(&watched.allocations), 1);
    assert!(Watched::read(&watched.copies) >= 3);
    #[cfg(target_arch = "x86_64")]
    assert_eq!((Watched::read(&watched.long_copies), Watched::read(&watched.longest)), (2, SHORT + 1));
    // And they do copy.
    let mut row: Vec<u8> = (0..200).collect();
    row.copy_within(0..std::hint::black_box(150), 50);
    assert!(row[50..].iter().zip(0..).all(|(byte, number)| *byte == number));
    row.copy_within(std::hint::black_box(50)..200, 0);
    assert!(row[..150].iter().zip(0..).all(|(byte, number)| *byte == number));
}
