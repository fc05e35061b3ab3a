//! What four warps do together: wgmma and `setmaxnreg`.

use super::*;
use crate::{
    clocks::{Agent, Shared},
    collective::shared_offset,
    wgmma::{DEPTH, Descriptor, Product, ROWS, Shape, Sums, bits, place},
};

const THREADS: usize = 128;
/// Registers of a multiprocessor.
const REGISTERS: u32 = 64 << 10;

/// Registers that each thread has at launch, if `setmaxnreg` may count on them: as many as the kernel's bounds allow.
pub(super) fn registers_at_launch(kernel: &Kernel, threads: u32) -> u32 {
    match kernel.max_registers {
        Some(n) => n,
        None if kernel.max_threads.is_some() => (REGISTERS / threads.next_multiple_of(32) / 8 * 8).min(256),
        None => 0,
    }
}

impl Machine<'_, '_> {
    /// A thread arrives at a collective of its warpgroup.
    pub(super) fn warpgroup(&mut self, b: usize, t: usize, op: &MachineOp) -> Outcome<Next> {
        let (w, pc) = (t / THREADS, self.pc(b, t));
        let first = w * THREADS;
        let size = (self.blocks[b].threads.len() - first).min(THREADS);
        let group = &mut self.blocks[b].warpgroups[w];
        if let (Some(&other), true) = (group.arrived.first(), group.at != pc) {
            let at = group.at;
            let message = format!("{} threads of the warpgroup wait at another instruction", group.arrived.len());
            let mut fault = self.fault(b, t, Rule::Divergence, &op.name, message);
            fault.other = Some(self.blocks[b].place(other.into(), at, "wait"));
            return Err(fault);
        }
        if group.arrived.is_empty() {
            let gone = (first..first + size).find(|&t| self.blocks[b].threads[t].state == State::Done);
            if let Some(gone) = gone {
                let message = format!("thread {gone} of the warpgroup has returned");
                return Err(self.fault(b, t, Rule::DepartedThread, &op.name, message));
            }
        }
        let group = &mut self.blocks[b].warpgroups[w];
        group.at = pc;
        group.arrived.push(t as u16);
        self.blocks[b].threads[t].state = State::Warpgroup;
        if self.blocks[b].warpgroups[w].arrived.len() < size {
            return Ok(Next::Wait);
        }
        self.blocks[b].warpgroups[w].arrived.clear();
        if size < THREADS && !matches!(op.kind, MachineKind::SetMaxRegisters { .. }) {
            let message = format!("warpgroup {w} has {size} threads");
            return Err(self.fault(b, t, Rule::Wgmma, &op.name, message));
        }
        match &op.kind {
            MachineKind::Wgmma(shape) => self.wgmma(b, w, op, *shape)?,
            MachineKind::WgmmaFence => self.blocks[b].warpgroups[w].fenced = true,
            MachineKind::WgmmaCommit => self.blocks[b].warpgroups[w].committed += 1,
            MachineKind::WgmmaWait { pending } => self.wgmma_wait(b, w, *pending),
            MachineKind::SetMaxRegisters { increase, count } => {
                return self.set_max_registers(b, t, op, (*increase, *count), size as u32);
            }
            _ => {}
        }
        (first..first + size).for_each(|t| self.wake(b, t));
        Ok(Next::Wait)
    }

    /// Threads of a warpgroup of which each has seen something else.
    fn views(&self, b: usize, w: usize) -> Vec<usize> {
        let mut views: Vec<usize> = Vec::new();
        let clocks = &self.blocks[b].clocks;
        for t in w * THREADS..(w + 1) * THREADS {
            if !views.iter().any(|&v| clocks[v].same_view(&clocks[t])) {
                views.push(t);
            }
        }
        views
    }

    fn wgmma(&mut self, b: usize, w: usize, op: &MachineOp, shape: Shape) -> Outcome<()> {
        let (slots, first) = (self.env.kernel.slots, w * THREADS);
        let last = op.a.len() - 1;
        let wrong = |m: &Self, message: &str| Err(m.fault(b, first, Rule::Wgmma, &op.name, message));
        // Descriptors and scale-d are the warpgroup's, not the thread's.
        let shared = if shape.from_registers { 4 } else { 0 };
        for i in shared..=last {
            let value = self.operand(b, first, op, i);
            if (first..first + THREADS).any(|t| self.operand(b, t, op, i) != value) {
                return wrong(self, "descriptors or scale-d differ between threads of the warpgroup");
            }
        }
        let mut chunks = [Vec::new(), Vec::new()];
        for operand in usize::from(shape.from_registers)..2 {
            let value = self.operand(b, first, op, last - 2 + operand);
            let Some(descriptor) = Descriptor::decode(value) else {
                return wrong(self, &format!("{value:#018x} is no matrix descriptor"));
            };
            chunks[operand] = shape.chunks(operand, descriptor);
        }
        let group = self.blocks[b].warpgroups[w].committed + 1;
        let (views, at) = (self.views(b, w), self.pc(b, first));
        let Block { shared, clocks, .. } = &mut self.blocks[b];
        for chunk in chunks.iter().flatten() {
            for &t in &views {
                let who = clocks[t].agent(Agent::Wgmma(w as u16), group, at);
                let offset = shared_offset(chunk.address.into(), 16, shared.bytes.len(), &op.name, who)?;
                shared.check_read(offset, 16, false, who, &clocks[t])?;
            }
        }
        let [a_chunks, b_chunks] = chunks;
        let adds = self.operand(b, first, op, last) != 0;
        let fenced = self.blocks[b].warpgroups[w].fenced || !self.env.options.check_races;
        let a = if shape.from_registers {
            if !fenced {
                return wrong(self, "no wgmma.fence since the registers of A were the threads'");
            }
            let block = &self.blocks[b];
            if (first..first + THREADS).any(|t| op.a[..4].iter().any(|a| block.threads[t].in_flight.sum(a.0).is_some()))
            {
                return wrong(self, "a register of A is an accumulator that has not been waited for");
            }
            Err(shape.from_fragments(|t, r| block.register(slots, first + t, op.a[r].0) as u32))
        } else {
            Ok(a_chunks)
        };

        // Accumulators that are on their way already stay there.
        let known = self.blocks[b].threads[first].in_flight.sum(op.d[0]).map(|(number, _)| number);
        for t in first..first + THREADS {
            let in_flight = &self.blocks[b].threads[t].in_flight;
            let expected = |r: usize| known.map(|number| (number, r as u16));
            if (0..op.d.len()).any(|r| in_flight.sum(op.d[r]) != expected(r)) {
                return wrong(self, "some of the accumulators belong to another wgmma that has not been waited for");
            }
        }
        let number = match known {
            Some(number) => number,
            None => {
                if !fenced {
                    return wrong(self, "no wgmma.fence since the accumulators were the threads'");
                }
                let mut values = vec![0.0; ROWS * shape.columns()];
                let number = self.blocks[b].warpgroups[w].next_sums;
                for t in 0..THREADS {
                    for (r, &slot) in op.d.iter().enumerate() {
                        let (row, column) = place(t, r);
                        let value = f32::from_bits(self.blocks[b].register(slots, first + t, slot) as u32);
                        values[row * shape.columns() + column] = value;
                        let in_flight = &mut self.blocks[b].threads[first + t].in_flight;
                        in_flight.begin(slots, slot, (number, r as u16));
                    }
                }
                let wg = &mut self.blocks[b].warpgroups[w];
                wg.next_sums += 1;
                wg.sums.push(Sums { number, columns: shape.columns(), values, groups: Vec::new(), at });
                number
            }
        };
        let threads = &mut self.blocks[b].threads;
        if shape.from_registers {
            for t in first..first + THREADS {
                threads[t].in_flight.sources.extend(op.a[..4].iter().map(|a| (a.0, group)));
            }
        }
        let wg = &mut self.blocks[b].warpgroups[w];
        let Some(sums) = wg.sums.iter_mut().find(|s| s.number == number) else { return Ok(()) };
        if sums.columns != shape.columns() {
            return wrong(self, "accumulators of a wgmma of another shape that has not been waited for");
        }
        sums.groups.push(group);
        sums.at = at;
        wg.products.push_back((group, Product { shape, a, b: b_chunks, adds, sums: number }));
        if self.lands_now() {
            self.compute(b, w, u32::MAX);
        }
        Ok(())
    }

    /// Computes the products of all groups up to `group`, in the order of their issue.
    fn compute(&mut self, b: usize, w: usize, group: u32) {
        let rounding = self.env.options.rounding;
        let Block { warpgroups, shared, .. } = &mut self.blocks[b];
        let wg = &mut warpgroups[w];
        let read = |address: u32| shared.get((u64::from(address) - SHARED_BASE) as usize, 16);
        while wg.products.front().is_some_and(|(g, _)| *g <= group) {
            let Some((_, product)) = wg.products.pop_front() else { break };
            let Some(sums) = wg.sums.iter_mut().find(|s| s.number == product.sums) else { continue };
            let shape = product.shape;
            let a = match product.a {
                Ok(chunks) => shape.gather(0, &chunks, read),
                Err(values) => values,
            };
            if !product.adds {
                sums.values.fill(0.0);
            }
            debug_assert_eq!(a.len(), ROWS * DEPTH);
            shape.multiply(&a, &shape.gather(1, &product.b, read), &mut sums.values, rounding);
        }
    }

    fn wgmma_wait(&mut self, b: usize, w: usize, pending: u32) {
        let (slots, first) = (self.env.kernel.slots, w * THREADS);
        let wg = &mut self.blocks[b].warpgroups[w];
        let upto = wg.committed.saturating_sub(pending).max(wg.waited);
        wg.waited = upto;
        self.compute(b, w, upto);
        let wg = &mut self.blocks[b].warpgroups[w];
        wg.sums.iter_mut().for_each(|s| s.groups.retain(|&g| g > upto));
        let (done, left) = std::mem::take(&mut wg.sums).into_iter().partition::<Vec<_>, _>(|s| s.groups.is_empty());
        wg.sums = left;
        wg.fenced &= done.is_empty();
        let Block { threads, registers, clocks, .. } = &mut self.blocks[b];
        let mut known = Shared::default();
        for t in 0..THREADS {
            let in_flight = &mut threads[first + t].in_flight;
            in_flight.sources.retain(|&(_, g)| g > upto);
            for sums in &done {
                in_flight.end(sums.number, |slot, r| {
                    let (row, column) = place(t, r.into());
                    let value = bits(sums.values[row * sums.columns + column]);
                    registers[(first + t) * slots + usize::from(slot)] = value.into();
                });
            }
            if self.env.options.check_races {
                clocks[first + t].learn(Agent::Wgmma(w as u16), upto, &mut known);
            }
        }
    }

    fn set_max_registers(
        &mut self,
        b: usize,
        t: usize,
        op: &MachineOp,
        (increase, count): (bool, u32),
        size: u32,
    ) -> Outcome<Next> {
        let (w, block) = (t / THREADS, &self.blocks[b]);
        let now = block.warpgroups[w].registers;
        let wrong = |message: String| Err(self.fault(b, t, Rule::Registers, &op.name, message));
        if now == 0 {
            return wrong("the kernel has neither .maxnreg nor .maxntid: ptxas ignores setmaxnreg".into());
        }
        if increase && count < now || !increase && count > now {
            return wrong(format!("to {count} registers of a thread that has {now}"));
        }
        if !increase {
            self.blocks[b].warpgroups[w].registers = count;
            self.blocks[b].free_registers += (now - count) * size;
            self.grant_registers(b);
            (0..size as usize).for_each(|i| self.wake(b, w * THREADS + i));
            return Ok(Next::Wait);
        }
        let need = (count - now) * size;
        for i in 0..size as usize {
            self.blocks[b].threads[w * THREADS + i].state = State::Registers(need);
        }
        self.grant_registers(b);
        Ok(Next::Wait)
    }

    /// Gives free registers to the warpgroups that wait for them.
    fn grant_registers(&mut self, b: usize) {
        for w in 0..self.blocks[b].warpgroups.len() {
            let block = &mut self.blocks[b];
            let State::Registers(need) = block.threads[w * THREADS].state else { continue };
            let size = (block.threads.len() - w * THREADS).min(THREADS);
            if need > block.free_registers {
                continue;
            }
            block.free_registers -= need;
            block.warpgroups[w].registers += need / size as u32;
            (0..size).for_each(|i| self.wake(b, w * THREADS + i));
        }
    }

    /// A thread returns: nothing of its registers may be on its way.
    pub(super) fn end_of_warpgroup(&mut self, b: usize, t: usize) -> Outcome<()> {
        let block = &self.blocks[b];
        if self.env.options.check_races && !block.threads[t].in_flight.is_empty() {
            let mut fault = RawFault::new(Rule::Wgmma, "a thread returned before its wgmma was waited for");
            let at = block.warpgroups[t / THREADS].sums.last().map_or(0, |s| s.at);
            fault.here = Some(block.place(t, at, "wgmma"));
            return Err(fault);
        }
        Ok(())
    }
}
