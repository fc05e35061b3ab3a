//! The arrays of a call, in allocations that end where the arrays do, and their bytes before and after.

use crate::call::Storage;
use sae_kernels::{Element, bf16, f16};
use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ops::Range;
use std::slice;

/// What `malloc` aligns to.
const ALIGN: usize = 16;

/// An allocation; AddressSanitizer sees what is read or written beside it.
struct Block {
    start: *mut u8,
    layout: Layout,
}

impl Block {
    fn new(bytes: usize) -> Self {
        let layout = Layout::from_size_align(bytes, ALIGN).expect("a small block");
        // SAFETY: the caller below asks for at least a byte.
        let start = unsafe { alloc(layout) };
        if start.is_null() {
            handle_alloc_error(layout);
        }
        // SAFETY: as many bytes as were allocated.
        unsafe { start.write_bytes(0xa5, bytes) };
        Self { start, layout }
    }
    fn range(&self) -> Range<usize> {
        self.start.addr()..self.start.addr() + self.layout.size()
    }
    fn bytes(&self) -> &[u8] {
        // SAFETY: written in `new`; nobody writes while they are borrowed, as calls have returned.
        unsafe { slice::from_raw_parts(self.start, self.layout.size()) }
    }
}
impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: made in `new`, of this layout.
        unsafe { dealloc(self.start, self.layout) };
    }
}

#[derive(Default)]
pub struct Memory {
    blocks: Vec<Block>,
}

impl Memory {
    /// Bytes of their own, behind `before` others. No bytes are nowhere.
    pub fn take(&mut self, before: usize, bytes: usize) -> *mut u8 {
        if bytes == 0 {
            return std::ptr::without_provenance_mut(ALIGN);
        }
        self.blocks.push(Block::new(before + bytes));
        self.blocks[self.blocks.len() - 1].start.wrapping_add(before)
    }

    /// Whether the bytes are all in one block.
    pub fn holds(&self, bytes: &Range<u128>) -> bool {
        self.blocks
            .iter()
            .map(Block::range)
            .any(|block| block.start as u128 <= bytes.start && bytes.end <= block.end as u128)
    }

    pub fn snapshot(&self) -> Vec<Vec<u8>> {
        self.blocks.iter().map(|block| block.bytes().to_vec()).collect()
    }
    pub fn restore(&mut self, snapshot: &[Vec<u8>]) {
        for (block, bytes) in self.blocks.iter().zip(snapshot) {
            // SAFETY: as many bytes as the block has, and nobody reads them now.
            unsafe { bytes.as_ptr().copy_to_nonoverlapping(block.start, bytes.len()) };
        }
    }

    /// Panics where a byte outside the ranges is not what it was.
    pub fn assert_kept(&self, before: &[Vec<u8>], written: &[Range<usize>], context: &dyn Fn() -> String) {
        for (block, before) in self.blocks.iter().zip(before) {
            if block.bytes() == before {
                continue;
            }
            for (at, (now, was)) in block.bytes().iter().zip(before).enumerate() {
                let address = block.start.addr() + at;
                assert!(
                    now == was || written.iter().any(|range| range.contains(&address)),
                    "{}: byte {at} of {} at {:p} was {was:#x}, is {now:#x}",
                    context(),
                    before.len(),
                    block.start
                );
            }
        }
    }
}

/// Reads numbers.
///
/// # Safety
/// They are there.
pub unsafe fn load(from: *const u8, number: Storage, len: usize) -> Vec<f64> {
    /// # Safety
    /// As above.
    unsafe fn all<T: Element>(from: *const u8, len: usize) -> Vec<f64> {
        // SAFETY: the caller's promise.
        (0..len).map(|at| unsafe { from.cast::<T>().add(at).read_unaligned() }.to_f64()).collect()
    }
    // SAFETY: the caller's promise.
    unsafe {
        match number {
            Storage::F32 => all::<f32>(from, len),
            Storage::F64 => all::<f64>(from, len),
            Storage::Bf16 => all::<bf16>(from, len),
            Storage::F16 => all::<f16>(from, len),
        }
    }
}

/// Rounds numbers and writes them.
///
/// # Safety
/// There is room for them.
pub unsafe fn store(to: *mut u8, number: Storage, values: impl Iterator<Item = f64>) {
    for (at, value) in values.enumerate() {
        // SAFETY: the caller's promise.
        unsafe {
            match number {
                Storage::F32 => to.cast::<f32>().add(at).write_unaligned(Element::from_f64(value)),
                Storage::F64 => to.cast::<f64>().add(at).write_unaligned(value),
                Storage::Bf16 => to.cast::<bf16>().add(at).write_unaligned(Element::from_f64(value)),
                Storage::F16 => to.cast::<f16>().add(at).write_unaligned(Element::from_f64(value)),
            }
        }
    }
}
