//! Matrix products of a warpgroup: where its operands are in shared memory and registers, and what it keeps until they
//! are waited for.
//!
//! Descriptors and fragments are those of the PTX ISA, section "Asynchronous warpgroup level matrix operation".

use half::f16;

use crate::{
    Rounding,
    arith::Type,
    matrix::{NAN, truncated},
    program::{Op, SINK, Slot},
    tensor_map::Swizzle,
};

/// Rows of A and D.
pub(crate) const ROWS: usize = 64;
/// Depth of one instruction, for elements of 16 bits.
pub(crate) const DEPTH: usize = 16;

/// `wgmma.mma_async.m64nNk16` with f32 accumulators.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    element: Type,
    columns: u16,
    pub from_registers: bool,
    negate: [bool; 2],
    /// Operands whose rows (A) or columns (B) are contiguous: "MN-major".
    across: [bool; 2],
}

impl Shape {
    /// `types` are those of d, a and b.
    pub(crate) fn find(
        size: &str,
        types: [Type; 3],
        from_registers: bool,
        negate: [bool; 2],
        across: [bool; 2],
    ) -> Option<Shape> {
        let columns: u16 = size.strip_prefix("m64n")?.strip_suffix("k16")?.parse().ok()?;
        let element = types[1];
        let known = types[0] == Type::F32 && element == types[2] && matches!(element, Type::Bf16 | Type::F16);
        let fits = (8..=256).contains(&columns) && columns % 8 == 0;
        (known && fits).then_some(Shape { element, columns, from_registers, negate, across })
    }

    pub(crate) fn columns(self) -> usize {
        self.columns.into()
    }

    fn value(self, bits: u16, operand: usize) -> f32 {
        let v = if self.element == Type::Bf16 {
            f32::from_bits(u32::from(bits) << 16)
        } else {
            f16::from_bits(bits).to_f32()
        };
        if self.negate[operand] { -v } else { v }
    }

    /// The shared addresses, before the swizzle, of the 16-byte chunks of an operand: 0 for A, 1 for B.
    pub(crate) fn chunks(self, operand: usize, descriptor: Descriptor) -> Vec<Chunk> {
        let lines = if operand == 0 { ROWS } else { self.columns() };
        // Eight elements along the contiguous direction make a chunk.
        let (along, steps) = if self.across[operand] { (lines / 8, DEPTH) } else { (DEPTH / 8, lines) };
        let mut chunks = Vec::with_capacity(along * steps);
        for step in 0..steps {
            for i in 0..along {
                let (line, depth) = if self.across[operand] { (8 * i, step) } else { (step, 8 * i) };
                let address = descriptor.address(self.across[operand], line as u32, depth as u32);
                chunks.push(Chunk { address, line: line as u16, depth: depth as u8 });
            }
        }
        chunks
    }

    /// Puts an operand's chunks in order: A as [64][16], B as [16][columns].
    pub(crate) fn gather(self, operand: usize, chunks: &[Chunk], read: impl Fn(u32) -> u128) -> Vec<f32> {
        let columns = self.columns();
        let mut out = vec![0.0; if operand == 0 { ROWS } else { columns } * DEPTH];
        for c in chunks {
            let bits = read(c.address);
            for e in 0..8 {
                let (line, depth) = (usize::from(c.line), usize::from(c.depth));
                let (line, depth) = if self.across[operand] { (line + e, depth) } else { (line, depth + e) };
                let at = if operand == 0 { line * DEPTH + depth } else { depth * columns + line };
                out[at] = self.value((bits >> (16 * e)) as u16, operand);
            }
        }
        out
    }

    /// A from the four registers of each thread.
    pub(crate) fn from_fragments(self, register: impl Fn(usize, usize) -> u32) -> Vec<f32> {
        let mut out = vec![0.0; ROWS * DEPTH];
        for thread in 0..128 {
            for r in 0..4 {
                let bits = register(thread, r);
                let row = thread / 32 * 16 + thread % 32 / 4 + r % 2 * 8;
                let at = row * DEPTH + thread % 4 * 2 + r / 2 * 8;
                out[at] = self.value(bits as u16, 0);
                out[at + 1] = self.value((bits >> 16) as u16, 0);
            }
        }
        out
    }

    /// d += a b
    pub(crate) fn multiply(self, a: &[f32], b: &[f32], d: &mut [f32], rounding: Rounding) {
        let n = self.columns();
        for (row, sums) in a.chunks_exact(DEPTH).zip(d.chunks_exact_mut(n)) {
            if rounding == Rounding::F32 {
                for (x, column) in row.iter().zip(b.chunks_exact(n)) {
                    sums.iter_mut().zip(column).for_each(|(s, y)| *s += x * y);
                }
                continue;
            }
            for (j, s) in sums.iter_mut().enumerate() {
                let terms = (0..DEPTH).map(|k| f64::from(row[k]) * f64::from(b[k * n + j]));
                *s = if rounding == Rounding::Exact {
                    (f64::from(*s) + terms.sum::<f64>()) as f32
                } else {
                    truncated(*s, terms)
                };
            }
        }
    }
}

/// Sixteen bytes of an operand: elements from (line, depth) on, along the contiguous direction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chunk {
    pub address: u32,
    line: u16,
    depth: u8,
}

/// A 64-bit matrix descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    start: u32,
    leading: u32,
    stride: u32,
    base: u32,
    swizzle: Swizzle,
}

impl Descriptor {
    /// None where bits are set that mean nothing.
    pub(crate) fn decode(bits: u64) -> Option<Descriptor> {
        const UNUSED: u64 = 0b11 << 14 | 0b11 << 30 | 0b111 << 46 | 0x3FF << 52;
        let field = |at: u32| ((bits >> at & 0x3FFF) << 4) as u32;
        (bits & UNUSED == 0).then(|| Descriptor {
            start: field(0),
            leading: field(16),
            stride: field(32),
            base: (bits >> 49 & 7) as u32,
            swizzle: [Swizzle::None, Swizzle::B128, Swizzle::B64, Swizzle::B32][(bits >> 62) as usize],
        })
    }

    /// Where the chunk of eight elements from (line, depth) on is; line counts rows of A or columns of B.
    ///
    /// Without swizzle the operand consists of 8 x 8 "core matrices" of 128 contiguous bytes. With it, of groups of
    /// eight rows of a span; what is exchanged depends on the address alone.
    fn address(self, across: bool, line: u32, depth: u32) -> u32 {
        let span = self.swizzle.span();
        let plain = match (across, self.swizzle) {
            (false, Swizzle::None) => line / 8 * self.stride + line % 8 * 16 + depth / 8 * self.leading,
            (false, _) => line / 8 * self.stride + line % 8 * span + depth * 2,
            (true, Swizzle::None) => line / 8 * self.stride + depth % 8 * 16 + depth / 8 * self.leading,
            (true, _) => {
                let along = line * 2;
                along / span * self.leading + along % span + depth % 8 * span + depth / 8 * self.stride
            }
        };
        // The address has 18 bits.
        self.swizzle.apply((self.start + plain) & 0x3_FFFF, self.base)
    }
}

/// A product on its way: A by its chunks or as values, B by its chunks.
#[derive(Clone, Debug)]
pub(crate) struct Product {
    pub shape: Shape,
    pub a: Result<Vec<Chunk>, Vec<f32>>,
    pub b: Vec<Chunk>,
    pub adds: bool,
    /// Number of its accumulators.
    pub sums: u32,
}

/// Accumulators that have left the threads' registers.
#[derive(Clone, Debug)]
pub(crate) struct Sums {
    pub number: u32,
    pub columns: usize,
    /// [64][columns]
    pub values: Vec<f32>,
    /// Products not yet waited for, by group.
    pub groups: Vec<u32>,
    /// The instruction that issued the last.
    pub at: u32,
}

/// Row and column of accumulator register `r` of a thread of the warpgroup.
pub(crate) fn place(thread: usize, r: usize) -> (usize, usize) {
    (thread / 32 * 16 + thread % 32 / 4 + r % 4 / 2 * 8, r / 4 * 8 + thread % 4 * 2 + r % 2)
}

/// The bits of an accumulator in a register: tensor cores give one NaN only.
pub(crate) fn bits(value: f32) -> u32 {
    if value.is_nan() { NAN } else { value.to_bits() }
}

/// A warpgroup's part of the machine.
#[derive(Clone, Debug, Default)]
pub(crate) struct Warpgroup {
    /// Threads that have arrived at a collective, and where.
    pub arrived: Vec<u16>,
    pub at: u32,
    /// A `wgmma.fence` has been executed since the threads had their accumulators.
    pub fenced: bool,
    /// Committed groups.
    pub committed: u32,
    /// Groups waited for.
    pub waited: u32,
    /// Products that have not been computed, with their group, oldest first.
    pub products: std::collections::VecDeque<(u32, Product)>,
    pub sums: Vec<Sums>,
    pub next_sums: u32,
    /// Registers of each thread, if `setmaxnreg` is used.
    pub registers: u32,
}

/// What a thread's registers have to do with products on their way.
///
/// nvcc may copy an accumulator between two wgmma; ptxas makes one register of both. So a copy of a register whose value
/// will come is another name for it.
#[derive(Clone, Debug, Default)]
pub(crate) struct InFlight {
    /// For each slot: the accumulators and the index within the thread's, if its value will come.
    sums: Vec<Option<(u32, u16)>>,
    /// How many.
    count: usize,
    /// Registers that are being read: slot, and the group that reads it.
    pub sources: Vec<(Slot, u32)>,
}

impl InFlight {
    pub(crate) fn is_empty(&self) -> bool {
        self.count == 0 && self.sources.is_empty()
    }

    /// What will come into a slot.
    pub(crate) fn sum(&self, slot: Slot) -> Option<(u32, u16)> {
        self.sums.get(usize::from(slot)).copied().flatten()
    }

    /// From now on a value is to come into a slot.
    pub(crate) fn begin(&mut self, slots: usize, slot: Slot, sum: (u32, u16)) {
        self.sums.resize(slots, None);
        self.put(slot, Some(sum));
    }

    fn put(&mut self, slot: Slot, sum: Option<(u32, u16)>) {
        if let Some(old) = self.sums.get_mut(usize::from(slot)) {
            self.count = self.count + usize::from(sum.is_some()) - usize::from(old.is_some());
            *old = sum;
        }
    }

    /// The values of these accumulators have come: `give` puts one in each slot that names it.
    pub(crate) fn end(&mut self, number: u32, mut give: impl FnMut(Slot, u16)) {
        for slot in 0..self.sums.len() {
            if let Some((n, r)) = self.sums[slot]
                && n == number
            {
                give(slot as Slot, r);
                self.put(slot as Slot, None);
            }
        }
    }

    /// Checks an operation that the thread itself executes.
    pub(crate) fn check(&mut self, op: &Op) -> Result<(), String> {
        // These know what is on its way.
        if matches!(op, Op::Machine(op) if op.adds().is_some()) || matches!(op, Op::SetDefined { .. }) {
            return Ok(());
        }
        let (mut read, mut written) = (None, [SINK; 8]);
        let (moves, mut count) = (matches!(op, Op::Move { .. } | Op::NeedDefined { .. }), 0);
        op.slots(&mut |s| read = read.or(self.sum(s).filter(|_| !moves)), &mut |s| {
            written[count.min(7)] = s;
            count += 1;
        });
        if read.is_some() {
            return Err("an accumulator of a wgmma is read before wgmma.wait_group".into());
        }
        let incoming = if let Op::Move { a, .. } = op { self.sum(*a) } else { None };
        for slot in written {
            if self.sources.iter().any(|s| s.0 == slot) {
                return Err("a register of A is written before the wgmma that reads it was waited for".into());
            }
            let old = self.sum(slot);
            if old == incoming {
                continue;
            }
            self.put(slot, if slot == SINK { None } else { incoming });
            if old.is_some() && !self.sums.contains(&old) {
                return Err("an accumulator of a wgmma is overwritten before wgmma.wait_group".into());
            }
        }
        Ok(())
    }
}
