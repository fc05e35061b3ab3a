//! mbarriers: phases, arrivals, transaction bytes, and who waits for them.

use super::*;
use crate::clocks::{Agent, Shared};

/// One mbarrier.
#[derive(Debug)]
pub(crate) struct Mbarrier {
    count: u32,
    pending: u32,
    /// Bytes that are expected and have not come; negative where they came first.
    bytes: i64,
    /// Phases completed.
    pub phase: u32,
    /// Its number among the block's, and the agent that stands for the copies it counts.
    pub index: u16,
    init_by: u16,
    /// Its initialisation has been made visible to the async proxy and the cluster.
    pub fenced: bool,
    /// What the arrivals of this phase have released.
    sum: ReleaseSum,
    /// What the completed phases have.
    done: Rc<View>,
    known: Shared,
    waiting: Vec<u16>,
    /// The phase that counts the last copy, and the last that anybody has waited for.
    pub last_load: u32,
    awaited: u32,
}

/// Arrivals and bytes fit 20 bits.
const LIMIT: u32 = 1 << 20;

impl Mbarrier {
    pub(super) fn describe(&self) -> String {
        format!(
            "phase {}, {} of {} arrivals missing, {} bytes missing",
            self.phase, self.pending, self.count, self.bytes
        )
    }

    /// Whether a copy that it counts has been waited for by nobody.
    pub(super) fn unawaited(&self) -> bool {
        self.last_load > self.awaited
    }
}

impl Machine<'_, '_> {
    /// The block and offset of an mbarrier that has been initialised; the use of it is checked against its initialisation.
    pub(super) fn find_mbarrier(
        &mut self,
        b: usize,
        t: usize,
        address: u64,
        remote: bool,
        what: &str,
    ) -> Outcome<(usize, u32)> {
        let (place, offset) = self.shared_place(b, t, address, 8, remote, what)?;
        let Some(m) = self.blocks[place].mbarriers.get(&offset) else {
            return Err(self.fault(b, t, Rule::Mbarrier, what, format!("no mbarrier at shared offset {offset:#x}")));
        };
        if place != b && !m.fenced && self.env.options.check_races {
            let message = "another block's mbarrier, whose initialisation no fence.mbarrier_init followed";
            return Err(self.fault(b, t, Rule::ProxyFence, what, message));
        }
        let clock = self.blocks[b].clocks[t].clone();
        let who = clock.who(self.pc(b, t));
        self.blocks[place].shared.check_read(offset as usize, 8, true, who, &clock)?;
        Ok((place, offset))
    }

    pub(super) fn mbarrier(&mut self, place: usize, offset: u32) -> &mut Mbarrier {
        // Only `find_mbarrier` gives offsets out, and `inval` is ordered behind their use.
        self.blocks[place].mbarriers.get_mut(&offset).expect("an mbarrier that was found")
    }

    pub(super) fn mbarrier_init(&mut self, b: usize, t: usize, op: &MachineOp) -> Outcome<Next> {
        let (address, count) = (self.operand(b, t, op, 0), self.operand(b, t, op, 1) as u32);
        let (_, offset) = self.shared_place(b, t, address, 8, false, &op.name)?;
        if count == 0 || count >= LIMIT {
            return Err(self.fault(b, t, Rule::Mbarrier, &op.name, format!("{count} arrivals, of 1 to {}", LIMIT - 1)));
        }
        if self.blocks[b].mbarriers.contains_key(&offset) {
            let message = format!("the mbarrier at shared offset {offset:#x} is initialised already");
            return Err(self.fault(b, t, Rule::Mbarrier, &op.name, message));
        }
        self.mbarrier_write(b, t, offset)?;
        let block = &mut self.blocks[b];
        let index = block.mbarriers_made;
        block.mbarriers_made += 1;
        let m = Mbarrier {
            count,
            pending: count,
            bytes: 0,
            phase: 0,
            index,
            init_by: t as u16,
            fenced: false,
            sum: ReleaseSum::default(),
            done: View::start(),
            known: Shared::default(),
            waiting: Vec::new(),
            last_load: 0,
            awaited: 0,
        };
        block.mbarriers.insert(offset, m);
        Ok(Next::Continue)
    }

    /// `init` and `inval` write its eight bytes.
    fn mbarrier_write(&mut self, b: usize, t: usize, offset: u32) -> Outcome<()> {
        let pc = self.pc(b, t);
        let Block { shared, clocks, .. } = &mut self.blocks[b];
        shared.check_write(offset as usize, 8, false, clocks[t].who(pc), &clocks[t])?;
        shared.put(offset as usize, 8, 0);
        Ok(())
    }

    pub(super) fn mbarrier_invalidate(&mut self, b: usize, t: usize, op: &MachineOp) -> Outcome<Next> {
        let (place, offset) = self.find_mbarrier(b, t, self.operand(b, t, op, 0), false, &op.name)?;
        self.mbarrier_write(place, t, offset)?;
        let m = self.blocks[place].mbarriers.remove(&offset);
        if m.is_some_and(|m| !m.waiting.is_empty() || m.unawaited()) {
            let message = "threads wait for it, or a copy that it counts has not been waited for";
            return Err(self.fault(b, t, Rule::Mbarrier, &op.name, message));
        }
        Ok(Next::Continue)
    }

    pub(super) fn mbarrier_arrive(
        &mut self,
        b: usize,
        t: usize,
        op: &MachineOp,
        (counted, with_bytes, release, remote): (bool, bool, bool, bool),
    ) -> Outcome<Next> {
        let (place, offset) = self.find_mbarrier(b, t, self.operand(b, t, op, 0), remote, &op.name)?;
        let count = if counted { self.operand(b, t, op, 1) as u32 } else { 1 };
        let bytes = if with_bytes { self.operand(b, t, op, 1) as u32 } else { 0 };
        self.visit(b, t, place);
        let m = self.mbarrier(place, offset);
        if count > m.pending {
            let message = format!("{count} arrivals at an mbarrier in {}", m.describe());
            return Err(self.fault(b, t, Rule::Mbarrier, &op.name, message));
        }
        let state = m.phase;
        if self.env.options.check_races && release {
            let serial = self.blocks[place].serial;
            let mut sum = std::mem::take(&mut self.mbarrier(place, offset).sum);
            self.blocks[b].clocks[t].release_in(serial, &mut sum);
            self.mbarrier(place, offset).sum = sum;
        }
        if let Some(&d) = op.d.first() {
            self.blocks[b].set(self.env.kernel.slots, t, d, state.into());
        }
        self.expect(b, t, op, (place, offset), bytes)?;
        self.mbarrier(place, offset).pending -= count;
        self.advance(place, offset);
        Ok(Next::Continue)
    }

    pub(super) fn mbarrier_expect(&mut self, b: usize, t: usize, op: &MachineOp, remote: bool) -> Outcome<Next> {
        let at = self.find_mbarrier(b, t, self.operand(b, t, op, 0), remote, &op.name)?;
        self.visit(b, t, at.0);
        self.expect(b, t, op, at, self.operand(b, t, op, 1) as u32)?;
        Ok(Next::Continue)
    }

    fn expect(&mut self, b: usize, t: usize, op: &MachineOp, at: (usize, u32), bytes: u32) -> Outcome<()> {
        let m = self.mbarrier(at.0, at.1);
        m.bytes += i64::from(bytes);
        if m.bytes >= LIMIT.into() {
            let message = format!("more than {} bytes expected: {}", LIMIT - 1, m.describe());
            return Err(self.fault(b, t, Rule::Mbarrier, &op.name, message));
        }
        Ok(())
    }

    /// A copy has brought its bytes.
    pub(super) fn complete_bytes(&mut self, place: usize, offset: u32, bytes: u32) {
        self.mbarrier(place, offset).bytes -= i64::from(bytes);
        self.advance(place, offset);
    }

    /// Ends the phase if nothing is missing, and wakes who waits for it.
    fn advance(&mut self, place: usize, offset: u32) {
        let still = self.loads.iter().filter(|l| l.place == place && l.mbarrier == offset).map(|l| l.phase).min();
        let threads = self.blocks[place].threads.len() as u16;
        let m = self.mbarrier(place, offset);
        if m.pending != 0 || m.bytes != 0 {
            return;
        }
        m.phase += 1;
        m.pending = m.count;
        let mut view = (*m.done).clone();
        view.join(&std::mem::take(&mut m.sum).sum);
        // Copies of this phase are seen, unless one of them is still on its way: then too few bytes were expected.
        if still.is_none_or(|phase| phase > m.phase) {
            view.raise(Agent::Loads(m.index).index(threads), m.phase);
        }
        m.done = Rc::new(view);
        m.known = Shared::default();
        for t in std::mem::take(&mut m.waiting) {
            let t = usize::from(t);
            self.pass(place, t, offset);
            self.wake(place, t);
        }
    }

    /// A wait of a thread is over.
    fn pass(&mut self, b: usize, t: usize, offset: u32) {
        let kernel = self.env.kernel;
        let Op::Machine(op) = &kernel.code[self.pc(b, t) as usize].op else { return };
        let Block { mbarriers, clocks, .. } = &mut self.blocks[b];
        let Some(m) = mbarriers.get_mut(&offset) else { return };
        m.awaited = m.phase;
        if matches!(op.kind, MachineKind::Wait { acquire: true, .. }) && self.env.options.check_races {
            clocks[t].join(&m.done, &mut m.known);
        }
        self.blocks[b].set(kernel.slots, t, op.d[0], 1);
    }

    pub(super) fn mbarrier_wait(
        &mut self,
        b: usize,
        t: usize,
        op: &MachineOp,
        (parity, suspend, _): (bool, bool, bool),
    ) -> Outcome<Next> {
        let (_, offset) = self.find_mbarrier(b, t, self.operand(b, t, op, 0), false, &op.name)?;
        let phase = self.operand(b, t, op, 1);
        let m = self.mbarrier(b, offset);
        let over = if parity { u64::from(m.phase & 1) != phase & 1 } else { u64::from(m.phase) > phase };
        if over {
            self.pass(b, t, offset);
            return Ok(Next::Continue);
        }
        // It may give up at any time; where threads are mixed it sometimes does.
        let mixed = matches!(self.env.options.schedule, Schedule::Random(_));
        if !suspend || (mixed && self.env.rng.below(8) == 0) {
            self.blocks[b].set(self.env.kernel.slots, t, op.d[0], 0);
            // Who only ever polls must find the copies one day.
            if !suspend {
                self.land_one(Some((b, offset)))?;
            }
            return Ok(Next::Yield);
        }
        self.mbarrier(b, offset).waiting.push(t as u16);
        self.blocks[b].threads[t].state = State::Mbarrier(offset);
        Ok(Next::Wait)
    }

    pub(super) fn mbarrier_init_fence(&mut self, b: usize, t: usize) -> Outcome<Next> {
        let own = self.blocks[b].mbarriers.values_mut().filter(|m| usize::from(m.init_by) == t);
        own.for_each(|m| m.fenced = true);
        Ok(Next::Continue)
    }

    pub(super) fn proxy_fence(&mut self, b: usize, t: usize) -> Outcome<Next> {
        if self.env.options.check_races {
            self.blocks[b].clocks[t].proxy_fence();
        }
        self.mbarrier_init_fence(b, t)
    }
}
