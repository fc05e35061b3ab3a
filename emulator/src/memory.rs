//! Memory in which every access is checked: bounds, alignment, initialisation, races.

use crate::{
    clocks::{Cells, Kind, ThreadClock, Who},
    report::{RawFault, Rule},
};

type Outcome<T> = Result<T, Box<RawFault>>;

/// One bit for each byte.
#[derive(Clone, Debug, Default)]
struct Bits(Vec<u64>);

impl Bits {
    fn new(n: usize) -> Self {
        Bits(vec![0; n.div_ceil(64)])
    }

    /// Aligned accesses of up to 16 bytes never straddle a word.
    #[inline]
    fn all(&self, at: usize, n: usize) -> bool {
        let mask = ((1u64 << n) - 1) << (at % 64);
        self.0[at / 64] & mask == mask
    }

    #[inline]
    fn set(&mut self, at: usize, n: usize) {
        self.0[at / 64] |= ((1u64 << n) - 1) << (at % 64);
    }

    fn set_range(&mut self, at: usize, n: usize) {
        let end = at + n;
        let mut i = at;
        while i < end {
            let count = (64 - i % 64).min(end - i);
            self.0[i / 64] |= (u64::MAX >> (64 - count)) << (i % 64);
            i += count;
        }
    }

    fn get(&self, i: usize) -> bool {
        self.0[i / 64] >> (i % 64) & 1 == 1
    }

    fn put(&mut self, i: usize, value: bool) {
        self.0[i / 64] = self.0[i / 64] & !(1 << (i % 64)) | u64::from(value) << (i % 64);
    }
}

/// A stretch of memory: one allocation, or a block's shared memory.
#[derive(Clone, Debug)]
pub(crate) struct Stretch {
    pub bytes: Vec<u8>,
    written: Bits,
    cells: Option<Cells>,
    kind: Kind,
    check_written: bool,
}

/// Memory that nothing has written reads as NaN in every floating-point format.
const UNWRITTEN: u8 = 0xFF;

impl Stretch {
    pub(crate) fn new(bytes: usize, kind: Kind, races: bool, check_written: bool) -> Self {
        Stretch {
            bytes: vec![UNWRITTEN; bytes],
            written: Bits::new(bytes),
            cells: races.then(|| Cells::new(bytes, kind)),
            kind,
            check_written,
        }
    }

    pub(crate) fn new_launch(&mut self) {
        if let Some(cells) = &mut self.cells {
            cells.clear();
        }
    }

    fn space(&self) -> &'static str {
        if self.kind == Kind::Shared { "shared" } else { "global" }
    }

    pub(crate) fn fill_from_host(&mut self, at: usize, data: &[u8]) {
        self.bytes[at..at + data.len()].copy_from_slice(data);
        self.written.set_range(at, data.len());
    }

    /// Bytes, and which of them have been written.
    pub(crate) fn part(&self, at: usize, n: usize) -> (Vec<u8>, Vec<bool>) {
        (self.bytes[at..at + n].to_vec(), (at..at + n).map(|i| self.written.get(i)).collect())
    }

    /// Puts a [`part`](Self::part) here.
    pub(crate) fn fill_from_part(&mut self, at: usize, (bytes, written): (Vec<u8>, Vec<bool>)) {
        self.bytes[at..at + bytes.len()].copy_from_slice(&bytes);
        for (i, written) in written.into_iter().enumerate() {
            self.written.put(at + i, written);
        }
    }

    pub(crate) fn forget(&mut self) {
        self.bytes.fill(UNWRITTEN);
        self.written.0.fill(0);
    }

    pub(crate) fn first_unwritten(&self) -> Option<usize> {
        (0..self.bytes.len()).find(|&i| !self.written.get(i))
    }

    #[inline]
    pub(crate) fn check_read(
        &mut self,
        at: usize,
        n: usize,
        strong: bool,
        who: Who,
        clock: &ThreadClock,
    ) -> Outcome<()> {
        if let Some(cells) = &mut self.cells {
            cells.access(at, n, false, strong, who, clock)?;
        }
        if self.check_written && !self.written.all(at, n) {
            let first = (at..at + n).find(|&i| !self.written.get(i)).unwrap_or(at);
            let mut fault = RawFault::new(
                Rule::UninitialisedRead,
                format!("{} memory at offset {first:#x} is not written, or not yet", self.space()),
            )
            .at(format!("read of {n} bytes"), who);
            fault.address = Some(first as u64);
            return Err(fault);
        }
        Ok(())
    }

    #[inline]
    pub(crate) fn check_write(
        &mut self,
        at: usize,
        n: usize,
        strong: bool,
        who: Who,
        clock: &ThreadClock,
    ) -> Outcome<()> {
        if let Some(cells) = &mut self.cells {
            cells.access(at, n, true, strong, who, clock)?;
        }
        Ok(())
    }

    /// The bytes, without a check.
    #[inline]
    pub(crate) fn get(&self, at: usize, n: usize) -> u128 {
        let mut value = [0; 16];
        value[..n].copy_from_slice(&self.bytes[at..at + n]);
        u128::from_le_bytes(value)
    }

    #[inline]
    pub(crate) fn put(&mut self, at: usize, n: usize, value: u128) {
        self.bytes[at..at + n].copy_from_slice(&value.to_le_bytes()[..n]);
        self.written.set(at, n);
    }
}

/// One allocation of global memory.
#[derive(Clone, Debug)]
struct Allocation {
    base: u64,
    memory: Stretch,
    live: bool,
}

/// Global memory: allocations that are far apart and never reused, so that a stray pointer hits nothing.
#[derive(Clone, Debug)]
pub(crate) struct Global {
    allocations: Vec<Allocation>,
    next: u64,
    last: usize,
    races: bool,
    check_written: bool,
}

const FIRST_ADDRESS: u64 = 0x7_0000_0000;
const ALIGNMENT: u64 = 256;
const GAP: u64 = 4096;

impl Global {
    pub(crate) fn new(races: bool, check_written: bool) -> Self {
        Global { allocations: Vec::new(), next: FIRST_ADDRESS, last: 0, races, check_written }
    }

    pub(crate) fn alloc(&mut self, bytes: usize) -> u64 {
        let base = self.next;
        let memory = Stretch::new(bytes, Kind::Global, self.races, self.check_written);
        self.allocations.push(Allocation { base, memory, live: true });
        // As far to the next as this is large: an index gone wrong by one row or one matrix stays outside.
        self.next = (base + 2 * bytes as u64 + GAP).div_ceil(ALIGNMENT) * ALIGNMENT;
        base
    }

    pub(crate) fn free(&mut self, base: u64) -> bool {
        let found = self.allocations.iter_mut().find(|a| a.base == base && a.live);
        let Some(a) = found else { return false };
        a.live = false;
        a.memory = Stretch::new(0, Kind::Global, false, false);
        true
    }

    pub(crate) fn look_for_no_races(&mut self) {
        self.races = false;
        self.allocations.iter_mut().for_each(|a| a.memory.cells = None);
    }

    pub(crate) fn first_difference(&self, other: &Global) -> Option<u64> {
        self.allocations.iter().zip(&other.allocations).find_map(|(a, b)| {
            let at = a.memory.bytes.iter().zip(&b.memory.bytes).position(|(a, b)| a != b)?;
            Some(a.base + at as u64)
        })
    }

    pub(crate) fn new_launch(&mut self) {
        self.allocations.iter_mut().for_each(|a| a.memory.new_launch());
    }

    /// The allocation that holds all of `address..address + n`.
    #[inline]
    fn find(&mut self, address: u64, n: usize) -> Option<(usize, usize)> {
        let inside = |a: &Allocation| {
            let offset = address.wrapping_sub(a.base);
            (offset < a.memory.bytes.len() as u64 && offset + n as u64 <= a.memory.bytes.len() as u64)
                .then_some(offset as usize)
        };
        if let Some(offset) = self.allocations.get(self.last).and_then(inside) {
            return Some((self.last, offset));
        }
        let i = self.allocations.partition_point(|a| a.base <= address).checked_sub(1)?;
        let offset = inside(&self.allocations[i])?;
        self.last = i;
        Some((i, offset))
    }

    #[cold]
    fn outside(&self, address: u64, n: usize, what: &str, who: Option<Who>) -> Box<RawFault> {
        let near = self.allocations.partition_point(|a| a.base <= address).checked_sub(1).map(|i| &self.allocations[i]);
        let hint = match near {
            Some(a) if !a.live => format!("; the allocation at {:#x} was freed", a.base),
            Some(a) => format!(
                "; the nearest allocation below starts at {:#x} and has {} bytes: this is {} bytes from its start",
                a.base,
                a.memory.bytes.len(),
                address - a.base
            ),
            None => String::new(),
        };
        let mut fault = RawFault::new(
            Rule::OutOfBounds,
            format!("{address:#x} is outside every allocation of global memory{hint}"),
        );
        if let Some(who) = who {
            fault = fault.at(format!("{what} of {n} bytes"), who);
        }
        fault.address = Some(address);
        fault
    }

    /// The stretch and the offset of a checked access.
    #[inline]
    pub(crate) fn at(&mut self, address: u64, n: usize, what: &str, who: Who) -> Outcome<(&mut Stretch, usize)> {
        if !address.is_multiple_of(n as u64) {
            return Err(misaligned("global", address, n, what, who));
        }
        match self.find(address, n) {
            Some((i, offset)) => Ok((&mut self.allocations[i].memory, offset)),
            None => Err(self.outside(address, n, what, Some(who))),
        }
    }

    /// The allocation behind a pointer of the host.
    pub(crate) fn host(&mut self, address: u64, n: usize, what: &str) -> Outcome<(&mut Stretch, usize)> {
        match self.find(address, n) {
            Some((i, offset)) => Ok((&mut self.allocations[i].memory, offset)),
            None => Err(self.outside(address, n, what, None)),
        }
    }
}

#[cold]
pub(crate) fn misaligned(space: &str, address: u64, n: usize, what: &str, who: Who) -> Box<RawFault> {
    let mut fault = RawFault::new(Rule::Misaligned, format!("{space} address {address:#x} is not a multiple of {n}"))
        .at(format!("{what} of {n} bytes"), who);
    fault.address = Some(address);
    fault
}
