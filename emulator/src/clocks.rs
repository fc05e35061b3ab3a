//! Happens-before, by vector clocks.
//!
//! An *agent* is something that acts on memory in an order of its own: each thread of a block, and each thread's
//! `cp.async` engine. Every agent has a clock. A thread's *view* says up to which clock it has seen each agent; an
//! access is ordered after an earlier one exactly when the view covers the earlier agent's clock at that time. This is
//! exact for the executed path, whatever the schedule.
//!
//! Agents of a block of T threads: `0..T` are the threads, `T..2T` their `cp.async`. Hopper's agents (one for each
//! mbarrier's bulk loads, one for each warpgroup's wgmma, one for each thread's bulk stores) go behind, at `2T..`; what
//! the async proxy may see becomes a second view beside `ThreadClock::view`, advanced by `fence.proxy.async`.
//!
//! Accesses are remembered per cell. Cells start at 16 bytes and are split as soon as a smaller access is seen, so two
//! accesses share a cell only if they share a byte.

use std::rc::Rc;

use crate::report::{RawFault, RawPlace, Rule};

/// Who makes an access: the issuing thread, the agent that performs it, and that agent's clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Who {
    pub block: u32,
    pub thread: u16,
    pub agent: u16,
    pub clock: u32,
    /// Index of the instruction.
    pub at: u32,
}

/// What has been seen of every agent: of this block, and of others through global memory.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct View {
    pub local: Vec<u32>,
    pub foreign: Vec<(u32, Rc<Vec<u32>>)>,
}

fn join_clocks(into: &mut Vec<u32>, from: &[u32]) {
    if into.len() < from.len() {
        into.resize(from.len(), 0);
    }
    for (a, b) in into.iter_mut().zip(from) {
        *a = (*a).max(*b);
    }
}

impl View {
    /// Takes in another view of the same block.
    pub(crate) fn join(&mut self, other: &View) {
        join_clocks(&mut self.local, &other.local);
        for (block, clocks) in &other.foreign {
            self.join_foreign(*block, clocks);
        }
    }

    fn join_foreign(&mut self, block: u32, clocks: &Rc<Vec<u32>>) {
        match self.foreign.iter_mut().find(|(b, _)| *b == block) {
            Some((_, mine)) => join_clocks(Rc::make_mut(mine), clocks),
            None => self.foreign.push((block, clocks.clone())),
        }
    }
}

/// A view released to memory, and whose it is.
#[derive(Clone, Debug)]
pub(crate) struct Released {
    /// Views by block: the releasing block's own and what it had seen of others.
    by_block: Vec<(u32, Rc<Vec<u32>>)>,
}

impl Released {
    pub(crate) fn join(&mut self, other: &Released) {
        for (block, clocks) in &other.by_block {
            match self.by_block.iter_mut().find(|(b, _)| b == block) {
                Some((_, mine)) => join_clocks(Rc::make_mut(mine), clocks),
                None => self.by_block.push((*block, clocks.clone())),
            }
        }
    }
}

/// The clock of one thread.
#[derive(Clone, Debug)]
pub(crate) struct ThreadClock {
    pub block: u32,
    pub thread: u16,
    threads: u16,
    /// The thread's own time: moves on at every release.
    pub own: u32,
    /// Its `cp.async` groups: committed, and waited for.
    pub committed: u32,
    pub waited: u32,
    view: Rc<View>,
    /// The view at the last fence of the whole device, which a later strong write publishes.
    fenced: Option<Released>,
    /// The view at the last fence of any scope: what other threads of the block may see.
    fenced_in_block: Option<Released>,
    /// What strong reads have found since the last fence, which the next fence takes in.
    found: Option<Released>,
}

impl ThreadClock {
    pub(crate) fn new(block: u32, thread: u16, threads: u16, start: Rc<View>) -> Self {
        ThreadClock {
            block,
            thread,
            threads,
            own: 1,
            committed: 0,
            waited: 0,
            view: start,
            fenced: None,
            fenced_in_block: None,
            found: None,
        }
    }

    /// The thread itself, at instruction `at`.
    pub(crate) fn who(&self, at: u32) -> Who {
        Who { block: self.block, thread: self.thread, agent: self.thread, clock: self.own, at }
    }

    /// The thread's `cp.async` group now open.
    pub(crate) fn copier(&self, at: u32) -> Who {
        Who { block: self.block, thread: self.thread, agent: self.threads + self.thread, clock: self.committed + 1, at }
    }

    /// Whether an earlier access has been seen.
    #[inline]
    fn sees(&self, block: u32, agent: u16, clock: u32) -> bool {
        if block == self.block {
            if agent == self.thread {
                true
            } else if agent == self.threads + self.thread {
                clock <= self.waited
            } else {
                clock <= self.view.local[usize::from(agent)]
            }
        } else {
            let foreign = self.view.foreign.iter().find(|(b, _)| *b == block);
            foreign.is_some_and(|(_, clocks)| clock <= clocks[usize::from(agent)])
        }
    }

    /// Adds what this thread knows to `view` and moves its clock on: half of every synchronisation.
    pub(crate) fn release_to(&mut self, view: &mut ReleaseSum) {
        if !view.last.as_ref().is_some_and(|l| Rc::ptr_eq(l, &self.view)) {
            view.sum.join(&self.view);
            view.last = Some(self.view.clone());
        }
        let clocks = &mut view.sum.local;
        clocks.resize(2 * usize::from(self.threads), 0);
        let (me, copier) = (usize::from(self.thread), usize::from(self.threads + self.thread));
        clocks[me] = clocks[me].max(self.own);
        clocks[copier] = clocks[copier].max(self.waited);
        self.own += 1;
    }

    /// The other half: everyone who waited now shares one view.
    pub(crate) fn acquire(&mut self, view: &Rc<View>) {
        self.view = view.clone();
    }

    fn released(&mut self) -> Released {
        let mut sum = ReleaseSum::default();
        self.release_to(&mut sum);
        let mut by_block = sum.sum.foreign;
        by_block.push((self.block, Rc::new(sum.sum.local)));
        Released { by_block }
    }

    fn take_in(&mut self, found: &Released) {
        let mut view = (*self.view).clone();
        for (block, clocks) in &found.by_block {
            if *block == self.block {
                join_clocks(&mut view.local, clocks);
            } else {
                view.join_foreign(*block, clocks);
            }
        }
        self.view = Rc::new(view);
    }

    /// `fence` or `membar`.
    pub(crate) fn fence(&mut self, block_only: bool) {
        if let Some(found) = self.found.take() {
            self.take_in(&found);
        }
        let released = self.released();
        if !block_only {
            self.fenced = Some(released.clone());
        }
        self.fenced_in_block = Some(released);
    }

    /// A strong write to a location: what it publishes there.
    pub(crate) fn publish(&mut self, release: bool, shared: bool) -> Option<Released> {
        if release {
            Some(self.released())
        } else if shared {
            self.fenced_in_block.clone()
        } else {
            self.fenced.clone()
        }
    }

    /// A strong read of a location where `found` was published.
    pub(crate) fn observe(&mut self, found: &Released, acquire: bool) {
        if acquire {
            self.take_in(found);
        } else {
            match &mut self.found {
                Some(mine) => mine.join(found),
                None => self.found = Some(found.clone()),
            }
        }
    }
}

/// A view being put together at a barrier.
#[derive(Debug, Default)]
pub(crate) struct ReleaseSum {
    pub sum: View,
    last: Option<Rc<View>>,
}

/// An access that a cell remembers. Clock 0: none.
#[derive(Clone, Copy, Debug, Default)]
struct Mark {
    block: u32,
    clock: u32,
    at: u32,
    agent: u16,
    strong: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Cell {
    write: Mark,
    reads: [Mark; 2],
    /// 1 + index of further reads.
    more: u32,
}

/// How a memory is told apart in reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Shared,
    Global,
}

/// The remembered accesses of one stretch of memory.
#[derive(Clone, Debug)]
pub(crate) struct Cells {
    shift: u32,
    bytes: usize,
    cells: Vec<Cell>,
    more: Vec<Vec<Mark>>,
    kind: Kind,
    used: bool,
}

/// In global memory only so many concurrent readers of one cell are kept; shared memory keeps all.
const GLOBAL_READERS: usize = 8;

impl Cells {
    pub(crate) fn new(bytes: usize, kind: Kind) -> Self {
        let shift = 4;
        Cells {
            shift,
            bytes,
            cells: vec![Cell::default(); bytes.div_ceil(1 << shift)],
            more: Vec::new(),
            kind,
            used: false,
        }
    }

    /// Forgets everything: a new launch or a new block.
    pub(crate) fn clear(&mut self) {
        if std::mem::take(&mut self.used) {
            self.cells.fill(Cell::default());
            self.more.clear();
        }
    }

    fn split(&mut self, shift: u32) {
        let factor = 1usize << (self.shift - shift);
        let old = std::mem::take(&mut self.cells);
        self.cells.reserve_exact(old.len() * factor);
        for cell in old {
            for part in 0..factor {
                let mut copy = cell;
                if part > 0 && cell.more != 0 {
                    self.more.push(self.more[cell.more as usize - 1].clone());
                    copy.more = self.more.len() as u32;
                }
                self.cells.push(copy);
            }
        }
        self.cells.truncate(self.bytes.div_ceil(1 << shift).max(1));
        self.shift = shift;
    }

    /// Checks an access against what the cells remember, then remembers it. `offset` is aligned to `bytes`, a power
    /// of two up to 16.
    #[inline]
    pub(crate) fn access(
        &mut self,
        offset: usize,
        bytes: usize,
        write: bool,
        strong: bool,
        who: Who,
        clock: &ThreadClock,
    ) -> Result<(), Box<RawFault>> {
        self.used = true;
        let need = bytes.trailing_zeros();
        if need < self.shift {
            self.split(need);
        }
        let (first, last) = (offset >> self.shift, (offset + bytes - 1) >> self.shift);
        for i in first..=last {
            self.one(i, write, strong, who, clock)
                .map_err(|other| self.race(i << self.shift, write, who, clock, other))?;
        }
        Ok(())
    }

    #[inline]
    fn one(&mut self, i: usize, write: bool, strong: bool, who: Who, clock: &ThreadClock) -> Result<(), (Mark, bool)> {
        let cell = &mut self.cells[i];
        let w = cell.write;
        if w.clock != 0 && !(strong && w.strong) && !clock.sees(w.block, w.agent, w.clock) {
            return Err((w, true));
        }
        let mark = Mark { block: who.block, clock: who.clock, at: who.at, agent: who.agent, strong };
        if write {
            for r in cell.reads {
                if r.clock != 0 && !(strong && r.strong) && !clock.sees(r.block, r.agent, r.clock) {
                    return Err((r, false));
                }
            }
            if cell.more != 0 {
                let more = &mut self.more[cell.more as usize - 1];
                for r in more.iter() {
                    let together = strong && r.strong;
                    if !together && !clock.sees(r.block, r.agent, r.clock) {
                        return Err((*r, false));
                    }
                }
                more.clear();
            }
            cell.write = mark;
            cell.reads = [Mark::default(); 2];
            return Ok(());
        }
        // A read that is ordered before this one need not be remembered. A read of the thread itself is.
        for r in &mut cell.reads {
            if r.clock == 0 || (r.block == who.block && r.agent == who.agent) || clock.sees(r.block, r.agent, r.clock) {
                // A strong read may hide no weaker one.
                let strong = if r.clock == 0 { strong } else { strong && r.strong };
                *r = Mark { strong, ..mark };
                return Ok(());
            }
        }
        if cell.more == 0 {
            self.more.push(Vec::new());
            cell.more = self.more.len() as u32;
        }
        let more = &mut self.more[cell.more as usize - 1];
        if let Some(r) = more.iter_mut().find(|r| r.block == who.block && r.agent == who.agent) {
            *r = mark;
        } else if self.kind == Kind::Shared || more.len() < GLOBAL_READERS {
            more.push(mark);
        }
        Ok(())
    }

    #[cold]
    fn race(&self, offset: usize, write: bool, who: Who, clock: &ThreadClock, other: (Mark, bool)) -> Box<RawFault> {
        let (mark, other_writes) = other;
        let threads = clock.threads;
        let asynchronous = mark.agent >= threads;
        let thread = u32::from(if asynchronous { mark.agent - threads } else { mark.agent });
        let space = if self.kind == Kind::Shared { "shared" } else { "global" };
        let name = |writes: bool, asynchronous: bool| {
            format!("{}{}", if asynchronous { "asynchronous " } else { "" }, if writes { "write" } else { "read" })
        };
        let own_copy =
            mark.block == who.block && asynchronous && thread == u32::from(who.thread) && who.agent < threads;
        let (rule, why) = if own_copy {
            (Rule::CopyNotAwaited, "the thread has not waited for its own cp.async")
        } else if mark.block != who.block {
            (Rule::RaceBetweenBlocks, "nothing orders the two")
        } else {
            (Rule::Race, "nothing orders the two")
        };
        let mut fault = RawFault::new(rule, format!("two accesses of {space} memory at offset {offset:#x}: {why}"))
            .at(name(write, who.agent >= threads), who);
        fault.address = Some(offset as u64);
        fault.other = Some(RawPlace { what: name(other_writes, asynchronous), at: mark.at, block: mark.block, thread });
        fault
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn threads(n: u16) -> Vec<ThreadClock> {
        let start = Rc::new(View { local: vec![0; 2 * usize::from(n)], foreign: Vec::new() });
        (0..n).map(|t| ThreadClock::new(1, t, n, start.clone())).collect()
    }

    fn barrier(clocks: &mut [ThreadClock]) {
        let mut sum = ReleaseSum::default();
        clocks.iter_mut().for_each(|c| c.release_to(&mut sum));
        let view = Rc::new(sum.sum);
        clocks.iter_mut().for_each(|c| c.acquire(&view));
    }

    #[test]
    fn a_barrier_orders() {
        let mut c = threads(4);
        let mut cells = Cells::new(64, Kind::Shared);
        cells.access(0, 4, true, false, c[0].who(0), &c[0]).unwrap();
        assert!(cells.access(0, 4, false, false, c[1].who(1), &c[1]).is_err());
        assert!(cells.access(4, 4, false, false, c[1].who(1), &c[1]).is_ok());
        barrier(&mut c);
        assert!(cells.access(0, 4, false, false, c[1].who(1), &c[1]).is_ok());
        assert!(cells.access(0, 4, true, false, c[2].who(2), &c[2]).is_err());
        barrier(&mut c);
        assert!(cells.access(0, 4, true, false, c[2].who(2), &c[2]).is_ok());
    }

    #[test]
    fn a_copy_is_seen_only_after_its_wait_and_a_barrier() {
        let mut c = threads(2);
        let mut cells = Cells::new(64, Kind::Shared);
        cells.access(0, 16, true, false, c[0].copier(0), &c[0]).unwrap();
        c[0].committed += 1;
        let fault = cells.access(0, 2, false, false, c[0].who(1), &c[0]).unwrap_err();
        assert_eq!(fault.rule, Rule::CopyNotAwaited);
        barrier(&mut c);
        assert!(cells.access(0, 2, false, false, c[1].who(1), &c[1]).is_err());
        c[0].waited = 1;
        assert!(cells.access(0, 2, false, false, c[0].who(1), &c[0]).is_ok());
        assert!(cells.access(0, 2, false, false, c[1].who(1), &c[1]).is_err());
        barrier(&mut c);
        assert!(cells.access(0, 2, false, false, c[1].who(1), &c[1]).is_ok());
    }

    #[test]
    fn every_reader_is_remembered() {
        let mut c = threads(8);
        let mut cells = Cells::new(16, Kind::Shared);
        for clock in &c {
            cells.access(0, 4, false, false, clock.who(0), clock).unwrap();
        }
        let mut sum = ReleaseSum::default();
        c[..7].iter_mut().for_each(|c| c.release_to(&mut sum));
        let view = Rc::new(sum.sum);
        c[..7].iter_mut().for_each(|c| c.acquire(&view));
        assert!(cells.access(0, 4, true, false, c[0].who(0), &c[0]).is_err());
        barrier(&mut c);
        assert!(cells.access(0, 4, true, false, c[0].who(0), &c[0]).is_ok());
    }
}
