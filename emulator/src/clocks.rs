//! Happens-before, by vector clocks.
//!
//! An *agent* is something that acts on memory in an order of its own: each thread of a block, and each thread's
//! `cp.async` engine. Every agent has a clock. A thread's *view* says up to which clock it has seen each agent; an
//! access is ordered after an earlier one exactly when the view covers the earlier agent's clock at that time. This is
//! exact for the executed path, whatever the schedule.
//!
//! wgmma and bulk copies act through the async proxy. What the generic proxy wrote is visible there only behind a
//! `fence.proxy.async` on the way from the write to the access, so each view has a second part: what the async proxy may
//! see. Only writes ask for it: that a read has happened is order enough for what overwrites it.
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

/// What acts on memory in an order of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Agent {
    Thread(u16),
    /// A thread's `cp.async`.
    Copies(u16),
    /// A warpgroup's wgmma.
    Wgmma(u16),
    /// A thread's bulk stores, as they read shared memory.
    Stores(u16),
    /// The same, as they write global memory: they complete later.
    Writes(u16),
    /// The bulk loads that an mbarrier counts.
    Loads(u16),
}

/// The most warpgroups of a block.
const WARPGROUPS: u16 = 8;

impl Agent {
    /// Its number in a block of so many threads.
    pub(crate) fn index(self, threads: u16) -> u16 {
        match self {
            Agent::Thread(t) => t,
            Agent::Copies(t) => threads + t,
            Agent::Wgmma(w) => 2 * threads + w,
            Agent::Stores(t) => 2 * threads + WARPGROUPS + t,
            Agent::Writes(t) => 3 * threads + WARPGROUPS + t,
            Agent::Loads(i) => 4 * threads + WARPGROUPS + i,
        }
    }

    fn of(index: u16, threads: u16) -> Agent {
        match index {
            i if i < threads => Agent::Thread(i),
            i if i < 2 * threads => Agent::Copies(i - threads),
            i if i < 2 * threads + WARPGROUPS => Agent::Wgmma(i - 2 * threads),
            i if i < 3 * threads + WARPGROUPS => Agent::Stores(i - 2 * threads - WARPGROUPS),
            i if i < 4 * threads + WARPGROUPS => Agent::Writes(i - 3 * threads - WARPGROUPS),
            i => Agent::Loads(i - 4 * threads - WARPGROUPS),
        }
    }

    /// Whether it acts through the async proxy.
    fn by_async_proxy(self) -> bool {
        !matches!(self, Agent::Thread(_) | Agent::Copies(_))
    }
}

/// Up to which clock each agent of one block has been seen, and how much of that the async proxy may see.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Clocks {
    seen: Vec<u32>,
    proxied: Vec<u32>,
}

fn raise(clocks: &mut Vec<u32>, agent: usize, clock: u32) {
    if clocks.len() <= agent {
        clocks.resize(agent + 1, 0);
    }
    clocks[agent] = clocks[agent].max(clock);
}

impl Clocks {
    fn join(&mut self, other: &Clocks) {
        join_clocks(&mut self.seen, &other.seen);
        join_clocks(&mut self.proxied, &other.proxied);
    }

    #[inline]
    fn covers(&self, agent: u16, clock: u32) -> bool {
        self.seen.get(usize::from(agent)).is_some_and(|&c| clock <= c)
    }

    fn proxy_covers(&self, agent: u16, clock: u32) -> bool {
        self.proxied.get(usize::from(agent)).is_some_and(|&c| clock <= c)
    }

    fn proxy_fence(&mut self) {
        join_clocks(&mut self.proxied, &self.seen);
    }
}

/// What has been seen of every agent: of this block, and of others through global memory or their cluster.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct View {
    local: Clocks,
    foreign: Vec<(u32, Rc<Clocks>)>,
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
        self.local.join(&other.local);
        for (block, clocks) in &other.foreign {
            self.join_foreign(*block, clocks);
        }
    }

    fn join_foreign(&mut self, block: u32, clocks: &Rc<Clocks>) {
        match self.foreign.iter_mut().find(|(b, _)| *b == block) {
            Some((_, mine)) => Rc::make_mut(mine).join(clocks),
            None => self.foreign.push((block, clocks.clone())),
        }
    }
}

/// A view released to memory, and whose it is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Released {
    /// Views by block: the releasing block's own and what it had seen of others.
    by_block: Vec<(u32, Rc<Clocks>)>,
}

impl Released {
    pub(crate) fn join(&mut self, other: &Released) {
        for (block, clocks) in &other.by_block {
            match self.by_block.iter_mut().find(|(b, _)| b == block) {
                Some((_, mine)) => Rc::make_mut(mine).join(clocks),
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
        self.agent(Agent::Copies(self.thread), self.committed + 1, at)
    }

    /// Work that this thread has issued, done by an agent of its own block.
    pub(crate) fn agent(&self, agent: Agent, clock: u32, at: u32) -> Who {
        Who { block: self.block, thread: self.thread, agent: agent.index(self.threads), clock, at }
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
                self.view.local.covers(agent, clock)
            }
        } else {
            let foreign = self.view.foreign.iter().find(|(b, _)| *b == block);
            foreign.is_some_and(|(_, clocks)| clocks.covers(agent, clock))
        }
    }

    /// Whether an earlier write has been seen by the proxy through which `who` acts.
    #[inline]
    fn sees_write(&self, mark: &Mark, who: Who) -> bool {
        // Generic accesses are the common case; behind the threads and their copies, all agents use the async proxy.
        if who.agent < 2 * self.threads || mark.agent >= 2 * self.threads {
            return self.sees(mark.block, mark.agent, mark.clock);
        }
        if mark.block == self.block {
            self.view.local.proxy_covers(mark.agent, mark.clock)
        } else {
            let foreign = self.view.foreign.iter().find(|(b, _)| *b == mark.block);
            foreign.is_some_and(|(_, clocks)| clocks.proxy_covers(mark.agent, mark.clock))
        }
    }

    /// `fence.proxy.async`: what this thread has done or seen, the async proxy may see.
    pub(crate) fn proxy_fence(&mut self) {
        let mut view = (*self.view).clone();
        let (me, copier) = (usize::from(self.thread), usize::from(self.threads + self.thread));
        view.local.proxy_fence();
        raise(&mut view.local.proxied, me, self.own);
        raise(&mut view.local.proxied, copier, self.waited);
        view.foreign.iter_mut().for_each(|(_, clocks)| Rc::make_mut(clocks).proxy_fence());
        self.view = Rc::new(view);
        self.own += 1;
    }

    /// Whether this thread has synchronised with any thread of another block.
    pub(crate) fn has_met(&self, block: u32) -> bool {
        self.view.foreign.iter().any(|(b, _)| *b == block)
    }

    /// Whether the block's exit, made by this thread, comes after an access that another block made.
    pub(crate) fn knows(&self, block: u32, agent: u16, clock: u32) -> bool {
        self.sees(block, agent, clock)
    }

    /// Adds what this thread knows to `view` and moves its clock on: half of every synchronisation.
    pub(crate) fn release_to(&mut self, view: &mut ReleaseSum) {
        if !view.last.as_ref().is_some_and(|l| Rc::ptr_eq(l, &self.view)) {
            view.sum.join(&self.view);
            view.last = Some(self.view.clone());
        }
        let clocks = &mut view.sum.local.seen;
        clocks.resize(clocks.len().max(2 * usize::from(self.threads)), 0);
        let (me, copier) = (usize::from(self.thread), usize::from(self.threads + self.thread));
        clocks[me] = clocks[me].max(self.own);
        clocks[copier] = clocks[copier].max(self.waited);
        self.own += 1;
    }

    /// The same for something that lies in `block`, perhaps another block of the cluster.
    pub(crate) fn release_in(&mut self, block: u32, view: &mut ReleaseSum) {
        if block == self.block {
            return self.release_to(view);
        }
        for (from, clocks) in self.released().by_block {
            if from == block {
                view.sum.local.join(&clocks);
            } else {
                view.sum.join_foreign(from, &clocks);
            }
        }
    }

    /// Takes in a view of the same block. Threads that shared one view share one afterwards.
    pub(crate) fn join(&mut self, found: &Rc<View>, known: &mut Shared) {
        self.view = known.step(&self.view, |view| view.join(found));
    }

    /// Takes in that an agent of the block has come so far.
    pub(crate) fn learn(&mut self, agent: Agent, clock: u32, known: &mut Shared) {
        let agent = usize::from(agent.index(self.threads));
        self.view = known.step(&self.view, |view| raise(&mut view.local.seen, agent, clock));
    }

    /// Whether two threads of a block have seen the same.
    pub(crate) fn same_view(&self, other: &ThreadClock) -> bool {
        Rc::ptr_eq(&self.view, &other.view)
    }

    /// The other half: everyone who waited now shares one view.
    pub(crate) fn acquire(&mut self, view: &Rc<View>) {
        self.view = view.clone();
    }

    pub(crate) fn released(&mut self) -> Released {
        let mut sum = ReleaseSum::default();
        self.release_to(&mut sum);
        let mut by_block = sum.sum.foreign;
        by_block.push((self.block, Rc::new(sum.sum.local)));
        Released { by_block }
    }

    fn take_in(&mut self, found: &Released) {
        self.take_in_shared(found, &mut Shared::default());
    }

    /// Takes in a view of many blocks. Threads that shared one view share one afterwards.
    pub(crate) fn take_in_shared(&mut self, found: &Released, known: &mut Shared) {
        let own = self.block;
        self.view = known.step(&self.view, |view| {
            for (block, clocks) in &found.by_block {
                if *block == own {
                    view.local.join(clocks);
                } else {
                    view.join_foreign(*block, clocks);
                }
            }
        });
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

/// Views that have been changed in one way: the old and the new. Threads mostly share their view, and what makes views
/// cheap is that they go on sharing it.
#[derive(Debug, Default)]
pub(crate) struct Shared(Vec<(Rc<View>, Rc<View>)>);

impl Shared {
    fn step(&mut self, old: &Rc<View>, change: impl FnOnce(&mut View)) -> Rc<View> {
        if let Some((_, new)) = self.0.iter().find(|(known, _)| Rc::ptr_eq(known, old)) {
            return new.clone();
        }
        let mut view = (**old).clone();
        change(&mut view);
        let new = Rc::new(view);
        self.0.push((old.clone(), new.clone()));
        new
    }
}

impl View {
    /// The view at a block's start.
    pub(crate) fn start() -> Rc<View> {
        Rc::default()
    }

    /// An agent of the block has come so far.
    pub(crate) fn raise(&mut self, agent: u16, clock: u32) {
        raise(&mut self.local.seen, agent.into(), clock);
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
        if w.clock != 0 && !(strong && w.strong) && !clock.sees_write(&w, who) {
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
        let space = if self.kind == Kind::Shared { "shared" } else { "global" };
        let (me, them) = (Agent::of(who.agent, threads), Agent::of(mark.agent, threads));
        let name = |writes: bool, agent: Agent| {
            let by = match agent {
                Agent::Thread(_) => "",
                Agent::Copies(_) => "asynchronous ",
                Agent::Wgmma(_) => "wgmma ",
                Agent::Stores(_) | Agent::Writes(_) => "bulk store's ",
                Agent::Loads(_) => "bulk copy's ",
            };
            format!("{by}{}", if writes { "write" } else { "read" })
        };
        let thread = match them {
            Agent::Thread(t) | Agent::Copies(t) | Agent::Stores(t) | Agent::Writes(t) => t.into(),
            Agent::Wgmma(w) => u32::from(w) * 128,
            // Any thread may have issued it.
            Agent::Loads(_) => 0,
        };
        let same_block = mark.block == who.block;
        let unfenced = other_writes && me.by_async_proxy() && clock.sees(mark.block, mark.agent, mark.clock);
        let (rule, why) = match (me, them) {
            (Agent::Thread(a), Agent::Copies(b)) if same_block && a == b => {
                (Rule::CopyNotAwaited, "the thread has not waited for its own cp.async")
            }
            (Agent::Thread(a), Agent::Stores(b) | Agent::Writes(b)) if same_block && a == b => {
                (Rule::CopyNotAwaited, "the thread has not waited for its own bulk store")
            }
            (Agent::Thread(_) | Agent::Wgmma(_), Agent::Loads(_)) if other_writes && same_block => {
                (Rule::CopyNotAwaited, "nobody has waited for the mbarrier that counts the bulk copy")
            }
            _ if unfenced => (Rule::ProxyFence, "no fence.proxy.async between them"),
            _ if !same_block => (Rule::RaceBetweenBlocks, "nothing orders the two"),
            _ => (Rule::Race, "nothing orders the two"),
        };
        let mut fault = RawFault::new(rule, format!("two accesses of {space} memory at offset {offset:#x}: {why}"))
            .at(name(write, me), who);
        fault.address = Some(offset as u64);
        fault.other = Some(RawPlace { what: name(other_writes, them), at: mark.at, block: mark.block, thread });
        fault
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn threads(n: u16) -> Vec<ThreadClock> {
        (0..n).map(|t| ThreadClock::new(1, t, n, View::start())).collect()
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
