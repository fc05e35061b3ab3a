//! Blocks of a cluster: their barrier, and each other's shared memory.

use super::*;
use crate::{
    arith::{low, sign_extend},
    clocks::{Released, Shared, Who},
    collective::shared_offset,
    decode::{SHARED_WINDOW, WINDOW},
    memory::misaligned,
};

/// The barrier of a cluster.
#[derive(Debug, Default)]
pub(super) struct ClusterBarrier {
    /// Times it has been passed.
    phase: u32,
    /// Living threads that have arrived since.
    arrived: u32,
    sum: Released,
    done: Released,
    waiting: Vec<(usize, usize)>,
}

impl Machine<'_, '_> {
    /// The block of a shared address of the cluster, and the offset in its shared memory.
    pub(super) fn shared_place(
        &self,
        b: usize,
        t: usize,
        address: u64,
        bytes: usize,
        remote: bool,
        what: &str,
    ) -> Outcome<(usize, u32)> {
        let address = if (SHARED_WINDOW..SHARED_WINDOW + WINDOW).contains(&address) {
            address - SHARED_WINDOW
        } else {
            address & 0xFFFF_FFFF
        };
        let who = self.blocks[b].clocks[t].who(self.pc(b, t));
        let (mut place, mut own) = (b, address);
        let rank = (address >> 24) as usize;
        if remote && rank > 0 {
            let ranks = self.cluster_size();
            if rank > ranks {
                let message = format!("shared address {address:#x} of block {} of a cluster of {ranks}", rank - 1);
                return Err(self.fault(b, t, Rule::OutOfBounds, what, message));
            }
            (place, own) = (b / ranks * ranks + rank - 1, address & 0xFF_FFFF);
        }
        if !own.is_multiple_of(bytes as u64) {
            return Err(misaligned("shared", own, bytes, what, who));
        }
        let offset = shared_offset(own, bytes, self.blocks[place].shared.bytes.len(), what, who)?;
        self.peer_is_there(b, t, place, what)?;
        Ok((place, offset as u32))
    }

    /// Another block's shared memory is there from its first synchronisation with this thread to its end.
    pub(super) fn peer_is_there(&self, b: usize, t: usize, place: usize, what: &str) -> Outcome<()> {
        if place == b {
            return Ok(());
        }
        let (peer, clock) = (&self.blocks[place], &self.blocks[b].clocks[t]);
        if peer.live == 0 {
            let message = "shared memory of a block of the cluster that has ended";
            return Err(self.fault(b, t, Rule::DepartedBlock, what, message));
        }
        if self.env.options.check_races && !clock.has_met(peer.serial) {
            let message = "shared memory of a block of the cluster that may not have started: nothing orders the two";
            return Err(self.fault(b, t, Rule::DepartedBlock, what, message));
        }
        Ok(())
    }

    /// Remembers that a thread touches another block's shared memory, which must still be there then.
    pub(super) fn visit(&mut self, b: usize, t: usize, place: usize) {
        if place == b || !self.env.options.check_races {
            return;
        }
        let who = self.blocks[b].clocks[t].who(self.pc(b, t));
        let visits = &mut self.blocks[place].visits;
        match visits.iter_mut().find(|v| v.block == who.block && v.agent == who.agent) {
            Some(old) => *old = who,
            None => visits.push(who),
        }
    }

    pub(super) fn cluster_arrive(&mut self, b: usize, t: usize, release: bool) -> Outcome<Next> {
        let c = b / self.cluster_size();
        let thread = &mut self.blocks[b].threads[t];
        if thread.cluster_arrivals > self.cluster_barriers[c].phase {
            let message = "a second arrival at the cluster's barrier before the first is over";
            return Err(self.fault(b, t, Rule::Divergence, "barrier.cluster.arrive", message));
        }
        thread.cluster_arrivals = self.cluster_barriers[c].phase + 1;
        if self.env.options.check_races && release {
            let released = self.blocks[b].clocks[t].released();
            self.cluster_barriers[c].sum.join(&released);
        }
        self.cluster_barriers[c].arrived += 1;
        self.cluster_advance(c);
        Ok(Next::Continue)
    }

    pub(super) fn cluster_wait(&mut self, b: usize, t: usize, acquire: bool) -> Outcome<Next> {
        let c = b / self.cluster_size();
        let (arrivals, phase) = (self.blocks[b].threads[t].cluster_arrivals, self.cluster_barriers[c].phase);
        if arrivals == 0 {
            let message = "a wait at the cluster's barrier without an arrival";
            return Err(self.fault(b, t, Rule::Divergence, "barrier.cluster.wait", message));
        }
        if phase >= arrivals {
            if acquire && self.env.options.check_races {
                self.blocks[b].clocks[t].take_in_shared(&self.cluster_barriers[c].done, &mut Shared::default());
            }
            return Ok(Next::Continue);
        }
        self.blocks[b].threads[t].state = State::Cluster;
        self.cluster_barriers[c].waiting.push((b, t));
        Ok(Next::Wait)
    }

    /// The barrier is passed once every living thread of the cluster has arrived.
    fn cluster_advance(&mut self, c: usize) {
        let ranks = self.cluster_size();
        let live: usize = self.blocks[c * ranks..(c + 1) * ranks].iter().map(|b| b.live).sum();
        let barrier = &mut self.cluster_barriers[c];
        if barrier.arrived == 0 || (barrier.arrived as usize) < live {
            return;
        }
        barrier.phase += 1;
        barrier.arrived = 0;
        barrier.done = std::mem::take(&mut barrier.sum);
        let kernel = self.env.kernel;
        let mut known: Vec<(usize, Shared)> = Vec::new();
        for (b, t) in std::mem::take(&mut self.cluster_barriers[c].waiting) {
            let op = &kernel.code[self.pc(b, t) as usize].op;
            let acquires =
                matches!(op, Op::Machine(op) if matches!(op.kind, MachineKind::ClusterWait { acquire: true }));
            if self.env.options.check_races && acquires {
                if !known.iter().any(|k| k.0 == b) {
                    known.push((b, Shared::default()));
                }
                let Some((_, known)) = known.iter_mut().find(|k| k.0 == b) else { continue };
                self.blocks[b].clocks[t].take_in_shared(&self.cluster_barriers[c].done, known);
            }
            self.wake(b, t);
        }
    }

    /// A thread returns: the barrier no longer waits for it.
    pub(super) fn end_in_cluster(&mut self, b: usize, t: usize) -> Outcome<()> {
        let c = b / self.cluster_size();
        if self.blocks[b].threads[t].cluster_arrivals > self.cluster_barriers[c].phase {
            self.cluster_barriers[c].arrived -= 1;
        }
        Ok(())
    }

    /// A block's last thread returns: nobody may touch its shared memory any more.
    pub(super) fn end_of_block(&mut self, b: usize, t: usize) -> Outcome<()> {
        let ranks = self.cluster_size();
        let first = b / ranks * ranks;
        let block = &self.blocks[b];
        let unawaited = self.env.options.check_races && block.mbarriers.values().any(Mbarrier::unawaited);
        if unawaited || self.loads.iter().any(|l| l.touches(b)) {
            let message = "the block ended before a bulk copy into or out of its shared memory was waited for";
            return Err(self.fault(b, t, Rule::CopyNotAwaited, "exit", message));
        }
        let unknown = |v: &&Who| !block.clocks.iter().any(|c| c.knows(v.block, v.agent, v.clock));
        if let Some(visit) = block.visits.iter().find(unknown) {
            let message = "a block ended while another block of its cluster may still touch its shared memory";
            let mut fault = self.fault(b, t, Rule::DepartedBlock, "exit", message);
            fault.other =
                Some(RawPlace { what: "access".into(), at: visit.at, block: visit.block, thread: visit.thread.into() });
            return Err(fault);
        }
        self.cluster_advance(first / ranks);
        if self.blocks[first..first + ranks].iter().all(|b| b.live == 0) {
            self.start_cluster(Some(first));
        }
        Ok(())
    }

    /// `ld.shared::cluster`
    pub(super) fn remote_load(&mut self, b: usize, t: usize, op: &MachineOp, access: &Access) -> Outcome<Next> {
        let n = usize::from(access.bytes) * usize::from(access.count);
        let (place, offset) = self.shared_place(b, t, self.operand(b, t, op, 0), n, true, &op.name)?;
        self.visit(b, t, place);
        let clock = self.blocks[b].clocks[t].clone();
        let who = clock.who(self.pc(b, t));
        let shared = &mut self.blocks[place].shared;
        shared.check_read(offset as usize, n, access.strong, who, &clock)?;
        let (value, bits) = (shared.get(offset as usize, n), u32::from(access.bytes) * 8);
        for (i, &slot) in op.d.iter().enumerate() {
            let element = low((value >> (bits as usize * i)) as u64, bits);
            let element = match access.extend {
                0 => element,
                width => low(sign_extend(element, bits) as u64, width.into()),
            };
            self.blocks[b].set(self.env.kernel.slots, t, slot, element);
        }
        Ok(Next::Continue)
    }

    /// `st.shared::cluster`
    pub(super) fn remote_store(&mut self, b: usize, t: usize, op: &MachineOp, access: &Access) -> Outcome<Next> {
        let n = usize::from(access.bytes) * usize::from(access.count);
        let (place, offset) = self.shared_place(b, t, self.operand(b, t, op, 0), n, true, &op.name)?;
        self.visit(b, t, place);
        let bits = u32::from(access.bytes) * 8;
        let value = (1..op.a.len())
            .fold(0, |value, i| value | u128::from(low(self.operand(b, t, op, i), bits)) << (bits as usize * (i - 1)));
        let clock = self.blocks[b].clocks[t].clone();
        let who = clock.who(self.pc(b, t));
        let shared = &mut self.blocks[place].shared;
        shared.check_write(offset as usize, n, access.strong, who, &clock)?;
        shared.put(offset as usize, n, value);
        Ok(Next::Continue)
    }
}
