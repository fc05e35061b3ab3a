//! A block of threads, and the launch that runs blocks to their end.

mod bulk;
mod cluster;
mod mbarrier;
mod warpgroup;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    rc::Rc,
};

use crate::{
    Asynchronous, Options, Schedule,
    clocks::{Kind, ReleaseSum, Released, ThreadClock, View},
    decode::SHARED_BASE,
    interp::{self, Stop},
    memory::{Global, Stretch},
    program::*,
    report::{RawFault, RawPlace, Rule},
    rng::Rng,
    wgmma::{InFlight, Warpgroup},
};

use bulk::{BulkLoad, BulkStores};
use cluster::ClusterBarrier;
use mbarrier::Mbarrier;

type Outcome<T> = Result<T, Box<RawFault>>;

/// What a thread is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Ready,
    /// Waits for lanes of its warp.
    Meeting,
    /// Waits at this barrier of its block.
    Barrier(u8),
    /// Waits for the rest of its warpgroup.
    Warpgroup,
    /// Waits for a phase of the mbarrier at this offset of its block's shared memory.
    Mbarrier(u32),
    /// Waits for the rest of its cluster.
    Cluster,
    /// Waits for so many registers to be given back by other warpgroups.
    Registers(u32),
    Done,
}

/// What becomes of a thread after an operation of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// It goes on behind the operation.
    Continue,
    /// So it does, when the others had their turn: it may be polling.
    Yield,
    /// It waits, at the operation.
    Wait,
}

/// A `cp.async` on its way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Copy {
    pub to: usize,
    pub from: u64,
    pub bytes: u8,
    pub live: u8,
    pub at: u32,
}

/// A thread: its registers live in the block.
#[derive(Clone, Debug)]
pub(crate) struct Thread {
    pub pc: u32,
    pub state: State,
    pub calls: Vec<u32>,
    /// Committed groups of copies, oldest first, and the open one.
    pub groups: VecDeque<Vec<Copy>>,
    pub open: Vec<Copy>,
    pub stores: BulkStores,
    pub in_flight: InFlight,
    /// Cluster barriers arrived at.
    pub cluster_arrivals: u32,
    pub executed: u64,
    /// The last strong load: where, and what it found.
    pub read: Option<(u64, u128)>,
    pub defined: Vec<u64>,
    pub call_area: Vec<u8>,
}

/// Lanes of a warp that meet at one instruction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Meet {
    pub pc: u32,
    pub mask: u32,
    pub arrived: u32,
}

/// One of a block's sixteen barriers.
#[derive(Debug, Default)]
pub(crate) struct Barrier {
    expected: u32,
    arrived: u32,
    waiting: Vec<u16>,
    sum: ReleaseSum,
    votes: u32,
    at: u32,
    /// It waits for the whole block.
    whole: bool,
}

/// A block on the machine.
#[derive(Debug)]
pub(crate) struct Block {
    pub serial: u32,
    pub registers: Vec<u64>,
    pub threads: Vec<Thread>,
    pub clocks: Vec<ThreadClock>,
    pub shared: Stretch,
    pub local: Vec<u8>,
    pub warps: Vec<Vec<Meet>>,
    pub barriers: Vec<Barrier>,
    /// By offset in shared memory.
    mbarriers: BTreeMap<u32, Mbarrier>,
    mbarriers_made: u16,
    warpgroups: Vec<Warpgroup>,
    /// Registers given back by `setmaxnreg.dec`.
    free_registers: u32,
    /// What other blocks of the cluster did to this block's shared memory: block, agent, its clock, where, thread.
    visits: Vec<crate::clocks::Who>,
    live: usize,
}

/// What a launch shares: memory, options, counters.
pub(crate) struct Env<'a> {
    pub kernel: &'a Kernel,
    pub options: &'a Options,
    pub global: &'a mut Global,
    pub parameters: &'a [u8],
    /// What strong writes have published: by address, and by block for shared memory.
    pub locations: HashMap<(u32, u64), Released>,
    pub rng: Rng,
    pub executed: u64,
    /// `ldmatrix`: phases, and the shared-memory wavefronts they took.
    pub phases: u64,
    pub wavefronts: u64,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub cluster: [u32; 3],
}

/// Whether asynchronous work that is issued now lands now.
pub(crate) fn lands_now(env: &mut Env) -> bool {
    match env.options.asynchronous {
        Asynchronous::Late => false,
        Asynchronous::AtOnce => true,
        Asynchronous::Random => env.rng.below(2) == 0,
    }
}

/// Index of a warp's thread.
pub(crate) fn thread_of(warp: usize, lane: usize) -> usize {
    warp * 32 + lane
}

impl Block {
    fn new(env: &Env, constants: &[(Slot, u64)], serial: u32, shared_bytes: u32) -> Block {
        let kernel = env.kernel;
        let count = env.block.iter().product::<u32>();
        let mut template = vec![0u64; kernel.slots];
        for &(slot, value) in constants {
            template[usize::from(slot)] = value;
        }
        let at = crate::report::coordinates(serial - 1, env.grid);
        let [bx, by, bz] = at;
        let size = env.cluster;
        let [cx, cy, cz] = [0, 1, 2].map(|i| at[i] % size[i]);
        let clusters = [0, 1, 2].map(|i| env.grid[i] / size[i]);
        let mut registers = Vec::with_capacity(kernel.slots * count as usize);
        for t in 0..count {
            let [x, y, z] = crate::report::coordinates(t, env.block);
            let lane = t % 32;
            let special = [
                x,
                y,
                z,
                env.block[0],
                env.block[1],
                env.block[2],
                bx,
                by,
                bz,
                env.grid[0],
                env.grid[1],
                env.grid[2],
                lane,
                t / 32,
                count.div_ceil(32),
                0,
                1,
                1 << lane,
                (1 << lane) - 1,
                ((2u64 << lane) - 1) as u32,
                !(((2u64 << lane) - 1) as u32),
                !((1 << lane) - 1),
                shared_bytes - kernel.static_shared,
                shared_bytes,
                0,
                bx / size[0],
                by / size[1],
                bz / size[2],
                clusters[0],
                clusters[1],
                clusters[2],
                cx,
                cy,
                cz,
                size[0],
                size[1],
                size[2],
                cx + size[0] * (cy + size[1] * cz),
                size.iter().product(),
                u32::from(kernel.cluster.is_some() || size != [1, 1, 1]),
                0,
            ];
            for (slot, value) in template.iter_mut().zip(special) {
                *slot = value.into();
            }
            registers.extend_from_slice(&template);
        }
        let thread = Thread {
            pc: 0,
            state: State::Ready,
            calls: Vec::new(),
            groups: VecDeque::new(),
            open: Vec::new(),
            stores: BulkStores::default(),
            in_flight: InFlight::default(),
            cluster_arrivals: 0,
            executed: 0,
            read: None,
            defined: vec![0; kernel.tracked.div_ceil(64)],
            call_area: vec![0; kernel.call_bytes],
        };
        let start = View::start();
        let (races, written) = (env.options.check_races, env.options.check_uninitialised);
        Block {
            serial,
            registers,
            threads: vec![thread; count as usize],
            clocks: (0..count).map(|t| ThreadClock::new(serial, t as u16, count as u16, start.clone())).collect(),
            shared: Stretch::new(shared_bytes as usize, Kind::Shared, races, written),
            local: vec![0xFF; kernel.local_bytes * count as usize],
            warps: vec![Vec::new(); (count as usize).div_ceil(32)],
            barriers: (0..16).map(|_| Barrier::default()).collect(),
            mbarriers: BTreeMap::new(),
            mbarriers_made: 0,
            warpgroups: vec![
                Warpgroup {
                    registers: warpgroup::registers_at_launch(kernel, count),
                    ..Warpgroup::default()
                };
                count.div_ceil(128) as usize
            ],
            free_registers: 0,
            visits: Vec::new(),
            live: count as usize,
        }
    }

    /// The lanes of a warp that exist.
    fn lanes(&self, warp: usize) -> u32 {
        let left = self.threads.len() - warp * 32;
        if left >= 32 { u32::MAX } else { (1 << left) - 1 }
    }

    pub(crate) fn register(&self, slots: usize, thread: usize, slot: Slot) -> u64 {
        self.registers[thread * slots + usize::from(slot)]
    }

    pub(crate) fn set(&mut self, slots: usize, thread: usize, slot: Slot, value: u64) {
        self.registers[thread * slots + usize::from(slot)] = value;
    }

    fn place(&self, thread: usize, at: u32, what: impl Into<String>) -> RawPlace {
        RawPlace { what: what.into(), at, block: self.serial, thread: thread as u32 }
    }
}

struct Machine<'e, 'a> {
    env: &'e mut Env<'a>,
    /// Blocks of a cluster stand together, by rank.
    blocks: Vec<Block>,
    queue: VecDeque<(u32, u32)>,
    /// The next cluster, and how many there are.
    next: u32,
    total: u32,
    /// Of each cluster on the machine.
    cluster_barriers: Vec<ClusterBarrier>,
    /// Bulk loads on their way, in the order of their issue.
    loads: VecDeque<BulkLoad>,
    /// Turns that ended in the middle since a bulk load landed: threads that spin may be waiting for one.
    spins: usize,
    constants: Vec<(Slot, u64)>,
    shared_bytes: u32,
}

/// Runs every block of the grid, `resident` at a time.
pub(crate) fn run_grid(
    env: &mut Env,
    resident: u32,
    shared_bytes: u32,
    global_symbols: &dyn Fn(u32) -> u64,
) -> Result<(), Box<RawFault>> {
    let kernel = env.kernel;
    let dynamic = kernel.static_shared.next_multiple_of(kernel.dynamic_align.max(1));
    let constants = kernel
        .constants
        .iter()
        .map(|&(slot, c)| {
            let value = match c {
                Constant::Value(v) => v,
                Constant::Global(i) => global_symbols(i),
                Constant::DynamicShared => SHARED_BASE + u64::from(dynamic),
            };
            (slot, value)
        })
        .collect();
    let size = env.cluster.iter().product::<u32>();
    let total = env.grid.iter().product::<u32>() / size;
    let mut m = Machine {
        env,
        blocks: Vec::new(),
        queue: VecDeque::new(),
        next: 0,
        total,
        cluster_barriers: Vec::new(),
        loads: VecDeque::new(),
        spins: 0,
        constants,
        shared_bytes,
    };
    for _ in 0..(resident / size).clamp(1, total.max(1)) {
        m.start_cluster(None);
    }
    m.run()
}

impl Machine<'_, '_> {
    fn cluster_size(&self) -> usize {
        self.env.cluster.iter().product::<u32>() as usize
    }

    /// Puts the next cluster of the grid on the machine, in a free place or a new one. Mostly it is one block.
    fn start_cluster(&mut self, place: Option<usize>) {
        if self.next == self.total {
            return;
        }
        let (grid, size) = (self.env.grid, self.env.cluster);
        let cluster = crate::report::coordinates(self.next, [0, 1, 2].map(|i| grid[i] / size[i]));
        self.next += 1;
        let ranks = self.cluster_size();
        let first = place.unwrap_or(self.blocks.len());
        for rank in 0..ranks {
            let within = crate::report::coordinates(rank as u32, size);
            let [x, y, z] = [0, 1, 2].map(|i| cluster[i] * size[i] + within[i]);
            let serial = 1 + x + grid[0] * (y + grid[1] * z);
            let block = Block::new(self.env, &self.constants, serial, self.shared_bytes);
            if place.is_some() {
                self.blocks[first + rank] = block;
            } else {
                self.blocks.push(block);
            }
            let count = self.blocks[first + rank].threads.len() as u32;
            self.queue.extend((0..count).map(|t| ((first + rank) as u32, t)));
        }
        let barrier = ClusterBarrier::default();
        if place.is_some() {
            self.cluster_barriers[first / ranks] = barrier;
        } else {
            self.cluster_barriers.push(barrier);
        }
    }

    fn pick(&mut self) -> Option<(u32, u32)> {
        match self.env.options.schedule {
            Schedule::FirstIn => self.queue.pop_front(),
            Schedule::LastIn => self.queue.pop_back(),
            Schedule::Random(_) => {
                let n = self.queue.len() as u64;
                if n == 0 { None } else { self.queue.swap_remove_back(self.env.rng.below(n) as usize) }
            }
        }
    }

    fn run(&mut self) -> Outcome<()> {
        loop {
            while let Some((b, t)) = self.pick() {
                self.turn(b as usize, t as usize)?;
            }
            if self.blocks.iter().all(|b| b.live == 0) {
                return Ok(());
            }
            // Bulk copies that land late have waited for everybody to wait for them.
            if !self.land_one(None)? {
                return Err(self.stuck());
            }
        }
    }

    /// A thread's turn.
    fn turn(&mut self, b: usize, t: usize) -> Outcome<()> {
        loop {
            let stop = interp::run(self.env, &mut self.blocks[b], t)?;
            match stop {
                Stop::Preempted => self.polled(b, t)?,
                Stop::Meeting => self.meet(b, t)?,
                Stop::Barrier => self.barrier(b, t)?,
                Stop::Machine => {
                    let next = self.machine_op(b, t)?;
                    if next != Next::Wait {
                        self.blocks[b].threads[t].pc += 1;
                    }
                    let mixed = matches!(self.env.options.schedule, Schedule::Random(_));
                    match next {
                        Next::Continue if !mixed => continue,
                        Next::Continue => self.requeue(b, t),
                        Next::Yield => self.polled(b, t)?,
                        Next::Wait => {}
                    }
                }
                Stop::Done => self.done(b, t)?,
            }
            return Ok(());
        }
    }

    /// A thread that may be polling lets others run first. Where everybody polls, bulk copies must land for anybody to go on.
    fn polled(&mut self, b: usize, t: usize) -> Outcome<()> {
        self.spins += 1;
        if self.spins > 8 + 2 * self.queue.len() {
            self.land_one(None)?;
        }
        self.requeue(b, t);
        Ok(())
    }

    fn requeue(&mut self, b: usize, t: usize) {
        match self.env.options.schedule {
            Schedule::LastIn => self.queue.push_front((b as u32, t as u32)),
            _ => self.queue.push_back((b as u32, t as u32)),
        }
    }

    /// What a thread cannot do by itself.
    fn machine_op(&mut self, b: usize, t: usize) -> Outcome<Next> {
        let kernel = self.env.kernel;
        let op = match &kernel.code[self.pc(b, t) as usize].op {
            Op::Machine(op) => op,
            other => return self.peer_access(b, t, other),
        };
        match &op.kind {
            MachineKind::MbarrierInit => self.mbarrier_init(b, t, op),
            MachineKind::MbarrierInvalidate => self.mbarrier_invalidate(b, t, op),
            MachineKind::Arrive { count, bytes, release, remote } => {
                self.mbarrier_arrive(b, t, op, (*count, *bytes, *release, *remote))
            }
            MachineKind::ExpectBytes { remote } => self.mbarrier_expect(b, t, op, *remote),
            MachineKind::Wait { parity, suspend, .. } => self.mbarrier_wait(b, t, op, (*parity, *suspend)),
            MachineKind::TensorLoad { rank, multicast } => self.tensor_load(b, t, op, *rank, *multicast),
            MachineKind::TensorStore { rank } => self.tensor_store(b, t, op, *rank),
            MachineKind::BulkLoad { multicast } => self.bulk_load(b, t, op, *multicast),
            MachineKind::BulkStore => self.bulk_store(b, t, op),
            MachineKind::BulkToPeer => self.bulk_to_peer(b, t, op),
            MachineKind::BulkCommit => self.bulk_commit(b, t),
            MachineKind::BulkWait { pending, read } => self.bulk_wait(b, t, *pending, *read),
            MachineKind::ProxyFence => self.proxy_fence(b, t),
            MachineKind::MbarrierInitFence => self.mbarrier_init_fence(b, t),
            MachineKind::Wgmma(_)
            | MachineKind::WgmmaFence
            | MachineKind::WgmmaCommit
            | MachineKind::WgmmaWait { .. }
            | MachineKind::SetMaxRegisters { .. } => self.warpgroup(b, t, op),
            MachineKind::ClusterArrive { release } => self.cluster_arrive(b, t, *release),
            MachineKind::ClusterWait { acquire } => self.cluster_wait(b, t, *acquire),
        }
    }

    /// What operand `i` of the operation is for a thread.
    fn operand(&self, b: usize, t: usize, op: &MachineOp, i: usize) -> u64 {
        let (slot, offset) = op.a[i];
        self.blocks[b].register(self.env.kernel.slots, t, slot).wrapping_add(offset as i64 as u64)
    }

    fn pc(&self, b: usize, t: usize) -> u32 {
        self.blocks[b].threads[t].pc
    }

    fn fault(&self, b: usize, t: usize, rule: Rule, what: &str, message: impl Into<String>) -> Box<RawFault> {
        let mut fault = RawFault::new(rule, message);
        fault.here = Some(self.blocks[b].place(t, self.pc(b, t), what));
        fault
    }

    /// Whether asynchronous work that is issued now lands now.
    fn lands_now(&mut self) -> bool {
        lands_now(self.env)
    }

    fn wake(&mut self, b: usize, t: usize) {
        let thread = &mut self.blocks[b].threads[t];
        thread.state = State::Ready;
        thread.pc += 1;
        self.queue.push_back((b as u32, t as u32));
    }

    fn done(&mut self, b: usize, t: usize) -> Result<(), Box<RawFault>> {
        let block = &mut self.blocks[b];
        let thread = &mut block.threads[t];
        thread.state = State::Done;
        let copy = thread.open.iter().chain(thread.groups.iter().flatten()).next().copied();
        if let (Some(copy), true) = (copy, self.env.options.check_races) {
            let mut fault =
                RawFault::new(Rule::CopyNotAwaited, "a thread returned before its cp.async was waited for".to_string());
            fault.here = Some(block.place(t, copy.at, "cp.async"));
            return Err(fault);
        }
        self.end_of_stores(b, t)?;
        self.end_of_warpgroup(b, t)?;
        self.end_in_cluster(b, t)?;
        let block = &mut self.blocks[b];
        block.live -= 1;
        if block.live == 0 {
            self.end_of_block(b, t)?;
        }
        Ok(())
    }

    /// A thread arrives at a collective of its warp.
    fn meet(&mut self, b: usize, t: usize) -> Result<(), Box<RawFault>> {
        let kernel = self.env.kernel;
        let block = &mut self.blocks[b];
        let (warp, lane) = (t / 32, t % 32);
        let pc = block.threads[t].pc;
        let Op::Meet(meeting) = &kernel.code[pc as usize].op else { return Ok(()) };
        let lanes = block.lanes(warp);
        let wrong = |block: &Block, rule, message: String| {
            let mut fault = RawFault::new(rule, message);
            fault.here = Some(block.place(t, pc, &meeting.name));
            fault
        };
        let mask = match meeting.mask {
            // A full mask in a partial warp means all that exist.
            Some(slot) => match block.register(kernel.slots, t, slot) as u32 {
                u32::MAX => lanes,
                mask => mask,
            },
            None => lanes,
        };
        if mask >> lane & 1 == 0 {
            return Err(wrong(block, Rule::WrongMask, format!("lane {lane} is not in its own mask {mask:#010x}")));
        }
        if mask & !lanes != 0 {
            return Err(wrong(block, Rule::WrongMask, format!("the mask {mask:#010x} names lanes that do not exist")));
        }
        let any_place = matches!(meeting.what, Collective::WarpSync);
        let mut mine = None;
        for (i, other) in block.warps[warp].iter().enumerate() {
            if other.mask & mask == 0 {
                continue;
            }
            let same_kind = any_place
                && matches!(&kernel.code[other.pc as usize].op, Op::Meet(m) if matches!(m.what, Collective::WarpSync));
            if other.pc != pc && !same_kind {
                let waiting = other.arrived.trailing_zeros() as usize;
                let mut fault = wrong(
                    block,
                    Rule::Divergence,
                    format!("lanes {:#010x} of the warp wait at another instruction", other.arrived),
                );
                fault.other = Some(block.place(thread_of(warp, waiting), other.pc, "wait"));
                return Err(fault);
            }
            if other.mask != mask {
                let message = format!("the mask is {mask:#010x} here and {:#010x} in another lane", other.mask);
                return Err(wrong(block, Rule::WrongMask, message));
            }
            mine = Some(i);
        }
        let i = match mine {
            Some(i) => i,
            None => {
                // Who leaves later is found when nobody can go on.
                let gone =
                    (0..32).find(|l| mask >> l & 1 == 1 && block.threads[thread_of(warp, *l)].state == State::Done);
                if let Some(gone) = gone {
                    let message = format!("lane {gone}, which is named in the mask {mask:#010x}, has returned");
                    return Err(wrong(block, Rule::DepartedThread, message));
                }
                block.warps[warp].push(Meet { pc, mask, arrived: 0 });
                block.warps[warp].len() - 1
            }
        };
        let meet = &mut block.warps[warp][i];
        meet.arrived |= 1 << lane;
        block.threads[t].state = State::Meeting;
        if meet.arrived != meet.mask {
            return Ok(());
        }
        block.warps[warp].swap_remove(i);
        crate::collective::execute(self.env, block, warp, mask, meeting, pc)?;
        // Matrix instructions often follow each other directly: the warp is together already. Where threads are to be mixed, they meet anew.
        let mixed = self.env.options.preemption.is_some() || matches!(self.env.options.schedule, Schedule::Random(_));
        let mut last = pc;
        while let (false, true, Some(Instruction { guard: TRUE, op: Op::Meet(next), .. })) =
            (mixed, mask == lanes, kernel.code.get(last as usize + 1))
            && next.mask.is_none()
        {
            last += 1;
            crate::collective::execute(self.env, block, warp, mask, next, last)?;
        }
        if last != pc {
            let more = u64::from(last - pc);
            for l in (0..32).filter(|l| mask >> l & 1 == 1) {
                let thread = &mut block.threads[thread_of(warp, l)];
                thread.pc = last;
                thread.executed += more;
                self.env.executed += more;
            }
        }
        for l in (0..32).filter(|l| mask >> l & 1 == 1) {
            self.wake(b, thread_of(warp, l));
        }
        Ok(())
    }

    /// A thread arrives at a barrier of its block.
    fn barrier(&mut self, b: usize, t: usize) -> Result<(), Box<RawFault>> {
        let kernel = self.env.kernel;
        let slots = kernel.slots;
        let block = &mut self.blocks[b];
        let pc = block.threads[t].pc;
        let Op::Barrier(op) = &kernel.code[pc as usize].op else { return Ok(()) };
        let id = block.register(slots, t, op.id) as usize;
        let all = block.threads.len() as u32;
        let count = if op.count == SINK { all } else { block.register(slots, t, op.count) as u32 };
        let wrong = |block: &Block, rule, message: String| {
            let mut fault = RawFault::new(rule, message);
            fault.here = Some(block.place(t, pc, "barrier"));
            fault
        };
        if id >= 16 {
            return Err(wrong(block, Rule::Launch, format!("barrier {id}: there are sixteen")));
        }
        if op.count != SINK && (count == 0 || count % 32 != 0) {
            return Err(wrong(block, Rule::Launch, format!("barrier {id} of {count} threads: not whole warps")));
        }
        if op.aligned && op.wait {
            let warp = t / 32 * 32;
            for other in warp..(warp + 32).min(block.threads.len()) {
                if matches!(block.threads[other].state, State::Barrier(_)) && block.threads[other].pc != pc {
                    let mut fault =
                        wrong(block, Rule::Divergence, "lanes of one warp are at different barriers".to_string());
                    fault.other = Some(block.place(other, block.threads[other].pc, "wait"));
                    return Err(fault);
                }
            }
        }
        let p = block.register(slots, t, op.p) != 0;
        if op.count == SINK
            && block.live < block.threads.len()
            && let Some(gone) = block.threads.iter().position(|x| x.state == State::Done)
        {
            let message = format!("barrier {id} waits for all {all} threads, but thread {gone} has returned");
            return Err(wrong(block, Rule::DepartedThread, message));
        }
        let bar = &mut block.barriers[id];
        if bar.arrived == 0 {
            (bar.expected, bar.at, bar.whole) = (count, pc, op.count == SINK);
        } else if bar.expected != count {
            let (expected, at) = (bar.expected, bar.at);
            let mut fault = wrong(
                block,
                Rule::Divergence,
                format!("barrier {id} of {count} threads here, of {expected} elsewhere"),
            );
            fault.other = Some(block.place(t, at, "barrier"));
            return Err(fault);
        }
        bar.arrived += 1;
        bar.votes += u32::from(p != op.negate);
        if self.env.options.check_races {
            block.clocks[t].release_to(&mut bar.sum);
        }
        if op.wait {
            bar.waiting.push(t as u16);
            block.threads[t].state = State::Barrier(id as u8);
        } else {
            block.threads[t].pc += 1;
            self.queue.push_back((b as u32, t as u32));
        }
        let bar = &mut block.barriers[id];
        if bar.arrived < bar.expected {
            return Ok(());
        }
        let finished = std::mem::take(bar);
        let view = Rc::new(finished.sum.sum);
        for &w in &finished.waiting {
            let w = usize::from(w);
            if self.env.options.check_races {
                block.clocks[w].acquire(&view);
            }
            if let Op::Barrier(op) = &kernel.code[block.threads[w].pc as usize].op {
                let answer = match op.reduction {
                    Reduction::None => continue,
                    Reduction::Count => finished.votes,
                    Reduction::And => u32::from(finished.votes == finished.expected),
                    Reduction::Or => u32::from(finished.votes != 0),
                };
                block.set(slots, w, op.d, answer.into());
            }
        }
        for w in finished.waiting {
            self.wake(b, w.into());
        }
        Ok(())
    }

    /// Nobody can run: who waits where.
    fn stuck(&self) -> Box<RawFault> {
        let mut lines = Vec::new();
        let mut rule = Rule::Deadlock;
        let mut first = None;
        for block in self.blocks.iter().filter(|b| b.live > 0) {
            let mut groups: Vec<(State, u32, Vec<usize>)> = Vec::new();
            for (t, thread) in block.threads.iter().enumerate() {
                let key = (thread.state, if thread.state == State::Done { 0 } else { thread.pc });
                match groups.iter_mut().find(|g| (g.0, g.1) == key) {
                    Some(g) => g.2.push(t),
                    None => groups.push((key.0, key.1, vec![t])),
                }
            }
            for (w, warp) in block.warps.iter().enumerate() {
                for meet in warp {
                    let mut missing = (0..32).filter(|l| (meet.mask & !meet.arrived) >> l & 1 == 1);
                    let gone = missing.any(|l| block.threads[thread_of(w, l)].state == State::Done);
                    rule = if gone { Rule::DepartedThread } else { Rule::Divergence };
                }
            }
            let done = block.threads.iter().any(|t| t.state == State::Done);
            for group in block.threads.chunks(128) {
                let waits = |state| group.iter().any(|t| t.state == state);
                if waits(State::Warpgroup) && waits(State::Done) {
                    rule = Rule::DepartedThread;
                }
            }
            for (state, pc, threads) in groups {
                let origin = self.env.kernel.origins.get(pc as usize).copied().unwrap_or_default();
                let (line, source) = (origin.line, origin.loc.inlined.map_or(origin.loc.line, |(_, l)| l));
                let who = ranges(&threads);
                lines.push(match state {
                    State::Done => format!("threads {who} have returned"),
                    State::Ready => format!("threads {who} could run"),
                    State::Mbarrier(offset) => {
                        let m = block.mbarriers.get(&offset).map_or_else(String::new, Mbarrier::describe);
                        format!(
                            "threads {who} wait for the mbarrier at shared offset {offset:#x} ({m}) at source line {source} (PTX line {line})"
                        )
                    }
                    State::Warpgroup => format!(
                        "threads {who} wait for the rest of their warpgroup at source line {source} (PTX line {line})"
                    ),
                    State::Cluster => {
                        format!("threads {who} wait for their cluster at source line {source} (PTX line {line})")
                    }
                    State::Registers(need) => format!(
                        "threads {who} wait for {need} registers, {} are free, at source line {source} (PTX line {line})",
                        block.free_registers
                    ),
                    State::Meeting => {
                        format!("threads {who} wait for lanes of their warp at source line {source} (PTX line {line})")
                    }
                    State::Barrier(id) => {
                        let bar = &block.barriers[usize::from(id)];
                        if done && bar.whole && rule == Rule::Deadlock {
                            rule = Rule::DepartedThread;
                        }
                        format!(
                            "threads {who} wait at barrier {id} ({} of {} have arrived) at source line {source} (PTX line {line})",
                            bar.arrived, bar.expected
                        )
                    }
                });
                if first.is_none() && state != State::Done {
                    first = Some(block.place(threads[0], pc, "wait"));
                }
            }
        }
        let mut fault = RawFault::new(rule, format!("nobody can go on: {}", lines.join("; ")));
        fault.here = first;
        fault
    }
}

/// "0..31, 64, 66..70"
fn ranges(threads: &[usize]) -> String {
    let mut parts: Vec<(usize, usize)> = Vec::new();
    for &t in threads {
        match parts.last_mut() {
            Some((_, end)) if *end + 1 == t => *end = t,
            _ => parts.push((t, t)),
        }
    }
    let text: Vec<String> =
        parts.iter().map(|&(a, b)| if a == b { a.to_string() } else { format!("{a}..={b}") }).collect();
    text.join(", ")
}
