//! Bulk copies: loads that an mbarrier counts, stores that a thread's groups count.

use super::*;
use crate::{
    clocks::{Agent, Shared, Who},
    collective::shared_offset,
    decode::{PARAM_WINDOW, WINDOW},
    memory::misaligned,
    tensor_map::{Decoded, Piece, linear},
};

/// Where a load takes its bytes.
#[derive(Clone, Debug)]
enum Source {
    Global,
    /// Shared memory of this place: what the pieces call global is a shared address there.
    Block(usize),
}

/// A load on its way.
#[derive(Clone, Debug)]
pub(crate) struct BulkLoad {
    pieces: Rc<Vec<Piece>>,
    from: Source,
    bytes: u32,
    /// The block whose shared memory it fills, and the mbarrier there.
    pub place: usize,
    pub mbarrier: u32,
    /// The phase that counts it.
    pub phase: u32,
}

impl BulkLoad {
    /// Whether it reads or writes shared memory of this block.
    pub(super) fn touches(&self, b: usize) -> bool {
        self.place == b || matches!(self.from, Source::Block(from) if from == b)
    }
}

/// A store on its way: the data is there once shared memory has been read.
#[derive(Clone, Debug)]
struct BulkStore {
    pieces: Rc<Vec<Piece>>,
    data: Option<Vec<u128>>,
    done: bool,
    at: u32,
}

/// A thread's stores: committed groups that are not complete, oldest first, and the open one.
#[derive(Clone, Debug, Default)]
pub(crate) struct BulkStores {
    groups: VecDeque<Vec<BulkStore>>,
    open: Vec<BulkStore>,
    committed: u32,
    /// Groups waited for: until shared memory was read, and until all was written.
    read: u32,
}

/// Shared addresses of bulk tensor copies.
const TENSOR_ALIGNMENT: u64 = 128;

impl Machine<'_, '_> {
    /// The tensor map at a generic address.
    fn tensor_map(&mut self, b: usize, t: usize, op: &MachineOp, address: u64, rank: u8) -> Outcome<Decoded> {
        let who = self.blocks[b].clocks[t].who(self.pc(b, t));
        if !address.is_multiple_of(64) {
            return Err(misaligned("tensor map", address, 64, &op.name, who));
        }
        let map = if (PARAM_WINDOW..PARAM_WINDOW + WINDOW).contains(&address) {
            let at = (address - PARAM_WINDOW) as usize;
            self.env.parameters.get(at..at + 128).and_then(Decoded::from_bytes)
        } else {
            let (memory, offset) = self.env.global.at(address, 64, &op.name, who)?;
            memory.bytes.get(offset..offset + 128).and_then(Decoded::from_bytes)
        };
        let Some(map) = map else {
            return Err(self.fault(b, t, Rule::TensorMap, &op.name, format!("no tensor map at {address:#x}")));
        };
        if map.rank != usize::from(rank) {
            let message = format!("a tensor map of {} dimensions, the instruction has {rank}", map.rank);
            return Err(self.fault(b, t, Rule::TensorMap, &op.name, message));
        }
        Ok(map)
    }

    fn coordinates(&self, b: usize, t: usize, op: &MachineOp, first: usize, rank: u8) -> [i32; 5] {
        std::array::from_fn(|i| if i < rank.into() { self.operand(b, t, op, first + i) as i32 } else { 0 })
    }

    pub(super) fn tensor_load(
        &mut self,
        b: usize,
        t: usize,
        op: &MachineOp,
        rank: u8,
        multicast: bool,
    ) -> Outcome<Next> {
        let map = self.tensor_map(b, t, op, self.operand(b, t, op, 1), rank)?;
        let (place, to) = self.bulk_shared(b, t, op, self.operand(b, t, op, 0), TENSOR_ALIGNMENT, map.bytes(), true)?;
        let pieces = map.pieces(to, self.coordinates(b, t, op, 3, rank));
        let mask = multicast.then(|| self.operand(b, t, op, 3 + usize::from(rank)));
        self.issue(b, t, op, (place, self.operand(b, t, op, 2), mask), pieces, Source::Global)
    }

    pub(super) fn bulk_load(&mut self, b: usize, t: usize, op: &MachineOp, multicast: bool) -> Outcome<Next> {
        let bytes = self.linear_bytes(b, t, op, self.operand(b, t, op, 1))?;
        let (place, to) = self.bulk_shared(b, t, op, self.operand(b, t, op, 0), 16, bytes, true)?;
        let pieces = linear(to, self.operand(b, t, op, 1), bytes);
        let mask = multicast.then(|| self.operand(b, t, op, 4));
        self.issue(b, t, op, (place, self.operand(b, t, op, 3), mask), pieces, Source::Global)
    }

    pub(super) fn bulk_to_peer(&mut self, b: usize, t: usize, op: &MachineOp) -> Outcome<Next> {
        let bytes = self.linear_bytes(b, t, op, 0)?;
        let (place, to) = self.bulk_shared(b, t, op, self.operand(b, t, op, 0), 16, bytes, true)?;
        let (_, from) = self.bulk_shared(b, t, op, self.operand(b, t, op, 1), 16, bytes, false)?;
        let pieces = linear(to, from.into(), bytes);
        self.issue(b, t, op, (place, self.operand(b, t, op, 3), None), pieces, Source::Block(b))
    }

    /// Bytes of a copy that is no tensor's.
    fn linear_bytes(&self, b: usize, t: usize, op: &MachineOp, global: u64) -> Outcome<u32> {
        let bytes = self.operand(b, t, op, 2) as u32;
        for value in [global, bytes.into()] {
            if !value.is_multiple_of(16) {
                let who = self.blocks[b].clocks[t].who(self.pc(b, t));
                return Err(misaligned("the size or global", value, 16, &op.name, who));
            }
        }
        Ok(bytes)
    }

    /// The block behind a shared address, and the address within it.
    #[allow(clippy::too_many_arguments)]
    fn bulk_shared(
        &self,
        b: usize,
        t: usize,
        op: &MachineOp,
        address: u64,
        align: u64,
        bytes: u32,
        remote: bool,
    ) -> Outcome<(usize, u32)> {
        let (place, offset) = self.shared_place(b, t, address, 16, remote, &op.name)?;
        let who = self.blocks[b].clocks[t].who(self.pc(b, t));
        if !address.is_multiple_of(align) {
            return Err(misaligned("shared", address, align as usize, &op.name, who));
        }
        let address = u64::from(offset) + SHARED_BASE;
        shared_offset(address, bytes as usize, self.blocks[place].shared.bytes.len(), &op.name, who)?;
        Ok((place, address as u32))
    }

    /// Issues a load, into one block or all of a mask.
    fn issue(
        &mut self,
        b: usize,
        t: usize,
        op: &MachineOp,
        (place, mbarrier, mask): (usize, u64, Option<u64>),
        pieces: Vec<Piece>,
        from: Source,
    ) -> Outcome<Next> {
        let (at, ranks) = (self.pc(b, t), self.cluster_size());
        let first = b / ranks * ranks;
        let (home, offset) = self.find_mbarrier(b, t, mbarrier, true, &op.name)?;
        if home != place {
            let message = "the mbarrier lies in another block than the data";
            return Err(self.fault(b, t, Rule::Mbarrier, &op.name, message));
        }
        let places: Vec<usize> = match mask {
            None => vec![place],
            Some(mask) if (mask & 0xFFFF) >> ranks != 0 || mask & 0xFFFF == 0 => {
                let message = format!("the mask {mask:#x} in a cluster of {ranks} blocks");
                return Err(self.fault(b, t, Rule::WrongMask, &op.name, message));
            }
            Some(mask) => (0..ranks).filter(|r| mask >> r & 1 == 1).map(|r| first + r).collect(),
        };
        let bytes = pieces.iter().map(|p| u32::from(p.bytes)).sum();
        let pieces = Rc::new(pieces);
        let clock = self.blocks[b].clocks[t].clone();
        for place in places {
            self.peer_is_there(b, t, place, &op.name)?;
            let serial = self.blocks[place].serial;
            let Some(m) = self.blocks[place].mbarriers.get_mut(&offset) else {
                let message = format!("no mbarrier at shared offset {offset:#x} of block {place}");
                return Err(self.fault(b, t, Rule::Mbarrier, &op.name, message));
            };
            if !m.fenced && self.env.options.check_races {
                let message =
                    "the mbarrier's initialisation was followed by no fence.mbarrier_init or fence.proxy.async";
                return Err(self.fault(b, t, Rule::ProxyFence, &op.name, message));
            }
            let phase = m.phase + 1;
            m.last_load = phase;
            let who = Who { block: serial, ..clock.agent(Agent::Loads(m.index), phase, at) };
            let name = |mut fault: Box<RawFault>| {
                if let Some(here) = &mut fault.here {
                    (here.block, here.thread) = (clock.block, t as u32);
                }
                fault
            };
            check_shared(&mut self.blocks[place].shared, &pieces, true, who, &clock).map_err(name)?;
            for p in pieces.iter() {
                let (Some(global), n) = (p.global, usize::from(p.bytes)) else { continue };
                let (memory, offset) = match from {
                    Source::Global => self.env.global.at(global, n, &op.name, who).map_err(name)?,
                    Source::Block(b) => (&mut self.blocks[b].shared, (global - SHARED_BASE) as usize),
                };
                memory.check_read(offset, n, false, who, &clock).map_err(name)?;
            }
            let load = BulkLoad { pieces: pieces.clone(), from: from.clone(), bytes, place, mbarrier: offset, phase };
            if self.lands_now() { self.land(load)? } else { self.loads.push_back(load) }
        }
        Ok(Next::Continue)
    }

    fn land(&mut self, load: BulkLoad) -> Outcome<()> {
        for p in load.pieces.iter() {
            let n = usize::from(p.bytes);
            let value = match (p.global, &load.from) {
                (None, _) => 0,
                (Some(global), Source::Global) => {
                    let (memory, offset) = self.env.global.host(global, n, "bulk copy")?;
                    memory.get(offset, n)
                }
                (Some(address), Source::Block(b)) => self.blocks[*b].shared.get((address - SHARED_BASE) as usize, n),
            };
            self.blocks[load.place].shared.put((u64::from(p.shared) - SHARED_BASE) as usize, n, value);
        }
        self.complete_bytes(load.place, load.mbarrier, load.bytes);
        Ok(())
    }

    /// Lands one load that is on its way, perhaps only one that an mbarrier counts.
    pub(super) fn land_one(&mut self, mbarrier: Option<(usize, u32)>) -> Outcome<bool> {
        let fits: Vec<usize> = (0..self.loads.len())
            .filter(|&i| mbarrier.is_none_or(|m| (self.loads[i].place, self.loads[i].mbarrier) == m))
            .collect();
        let pick = match (fits.len() as u64, self.env.options.schedule) {
            (0, _) => return Ok(false),
            (_, Schedule::FirstIn) => 0,
            (n, Schedule::LastIn) => n as usize - 1,
            (n, Schedule::Random(_)) => self.env.rng.below(n) as usize,
        };
        let Some(load) = self.loads.remove(fits[pick]) else { return Ok(false) };
        self.land(load)?;
        Ok(true)
    }

    pub(super) fn tensor_store(&mut self, b: usize, t: usize, op: &MachineOp, rank: u8) -> Outcome<Next> {
        let map = self.tensor_map(b, t, op, self.operand(b, t, op, 0), rank)?;
        let address = self.operand(b, t, op, 1);
        let (_, from) = self.bulk_shared(b, t, op, address, TENSOR_ALIGNMENT, map.bytes(), false)?;
        let pieces = map.pieces(from, self.coordinates(b, t, op, 2, rank));
        self.store(b, t, op, pieces)
    }

    pub(super) fn bulk_store(&mut self, b: usize, t: usize, op: &MachineOp) -> Outcome<Next> {
        let bytes = self.linear_bytes(b, t, op, self.operand(b, t, op, 0))?;
        let (_, from) = self.bulk_shared(b, t, op, self.operand(b, t, op, 1), 16, bytes, false)?;
        self.store(b, t, op, linear(from, self.operand(b, t, op, 0), bytes))
    }

    fn store(&mut self, b: usize, t: usize, op: &MachineOp, mut pieces: Vec<Piece>) -> Outcome<Next> {
        let at = self.pc(b, t);
        let clock = self.blocks[b].clocks[t].clone();
        let group = self.blocks[b].threads[t].stores.committed + 1;
        let reader = clock.agent(Agent::Stores(t as u16), group, at);
        check_shared(&mut self.blocks[b].shared, &pieces, false, reader, &clock)?;
        pieces.retain(|p| p.global.is_some());
        let writer = clock.agent(Agent::Writes(t as u16), group, at);
        for p in &pieces {
            let n = usize::from(p.bytes);
            let (memory, offset) = self.env.global.at(p.global.unwrap_or(0), n, &op.name, writer)?;
            memory.check_write(offset, n, false, writer, &clock)?;
        }
        let mut store = BulkStore { pieces: Rc::new(pieces), data: None, done: false, at };
        if self.lands_now() {
            self.read_for(b, &mut store);
            // The two halves land at times of their own.
            if self.lands_now() {
                self.write_for(&mut store)?;
            }
        }
        self.blocks[b].threads[t].stores.open.push(store);
        Ok(Next::Continue)
    }

    fn read_for(&self, b: usize, store: &mut BulkStore) {
        let shared = &self.blocks[b].shared;
        let get = |p: &Piece| shared.get((u64::from(p.shared) - SHARED_BASE) as usize, p.bytes.into());
        store.data.get_or_insert_with(|| store.pieces.iter().map(get).collect());
    }

    fn write_for(&mut self, store: &mut BulkStore) -> Outcome<()> {
        if !std::mem::replace(&mut store.done, true) {
            for (p, value) in store.pieces.iter().zip(store.data.iter().flatten()) {
                let (memory, offset) = self.env.global.host(p.global.unwrap_or(0), p.bytes.into(), "bulk store")?;
                memory.put(offset, p.bytes.into(), *value);
            }
        }
        Ok(())
    }

    pub(super) fn bulk_commit(&mut self, b: usize, t: usize) -> Outcome<Next> {
        let stores = &mut self.blocks[b].threads[t].stores;
        let open = std::mem::take(&mut stores.open);
        stores.groups.push_back(open);
        stores.committed += 1;
        Ok(Next::Continue)
    }

    pub(super) fn bulk_wait(&mut self, b: usize, t: usize, pending: u32, read_only: bool) -> Outcome<Next> {
        let mut groups = std::mem::take(&mut self.blocks[b].threads[t].stores.groups);
        let complete = groups.len().saturating_sub(pending as usize);
        for store in groups.iter_mut().take(complete).flatten() {
            self.read_for(b, store);
            if !read_only {
                self.write_for(store)?;
            }
        }
        if !read_only {
            groups.drain(..complete);
        }
        let Block { threads, clocks, .. } = &mut self.blocks[b];
        let stores = &mut threads[t].stores;
        stores.groups = groups;
        stores.read = stores.read.max(stores.committed.saturating_sub(pending));
        if self.env.options.check_races {
            let upto = stores.committed.saturating_sub(pending);
            clocks[t].learn(Agent::Stores(t as u16), upto, &mut Shared::default());
            if !read_only {
                clocks[t].learn(Agent::Writes(t as u16), upto, &mut Shared::default());
            }
        }
        Ok(Next::Continue)
    }

    /// A thread returns: what it has stored will be in global memory, but shared memory may be gone.
    pub(super) fn end_of_stores(&mut self, b: usize, t: usize) -> Outcome<()> {
        let mut stores = std::mem::take(&mut self.blocks[b].threads[t].stores);
        let unread = (stores.committed - stores.read) as usize;
        let first = stores.groups.iter().rev().take(unread).flatten().chain(&stores.open).next();
        if let (Some(store), true) = (first, self.env.options.check_races) {
            let message = "a thread returned before its bulk store had read shared memory (no wait_group.read)";
            let mut fault = RawFault::new(Rule::CopyNotAwaited, message);
            fault.here = Some(self.blocks[b].place(t, store.at, "bulk store"));
            return Err(fault);
        }
        for store in stores.groups.iter_mut().flatten().chain(&mut stores.open) {
            self.read_for(b, store);
            self.write_for(store)?;
        }
        Ok(())
    }
}

/// Checks the shared side of a copy, chunk by chunk.
fn check_shared(
    shared: &mut crate::memory::Stretch,
    pieces: &[Piece],
    write: bool,
    who: Who,
    clock: &ThreadClock,
) -> Outcome<()> {
    let mut last = u32::MAX;
    for p in pieces {
        let chunk = p.shared & !15;
        if chunk == last {
            continue;
        }
        last = chunk;
        let offset = (u64::from(chunk) - SHARED_BASE) as usize;
        if write {
            shared.check_write(offset, 16, false, who, clock)?;
        } else {
            shared.check_read(offset, 16, false, who, clock)?;
        }
    }
    Ok(())
}
