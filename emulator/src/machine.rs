//! A block of threads, and the launch that runs blocks to their end.

use std::{
    collections::{HashMap, VecDeque},
    rc::Rc,
};

use crate::{
    Options, Schedule,
    clocks::{Kind, ReleaseSum, Released, ThreadClock, View},
    decode::SHARED_BASE,
    interp::{self, Stop},
    memory::{Global, Stretch},
    program::*,
    report::{RawFault, RawPlace, Rule},
    rng::Rng,
};

/// What a thread is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Ready,
    /// Waits for lanes of its warp.
    Meeting,
    /// Waits at this barrier of its block.
    Barrier(u8),
    Done,
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
    pub executed: u64,
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
        let [bx, by, bz] = crate::report::coordinates(serial - 1, env.grid);
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
                serial - 1,
                0,
                1,
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
            executed: 0,
            defined: vec![0; kernel.tracked.div_ceil(64)],
            call_area: vec![0; kernel.call_bytes],
        };
        let start = Rc::new(View { local: vec![0; 2 * count as usize], foreign: Vec::new() });
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
    blocks: Vec<Block>,
    queue: VecDeque<(u32, u32)>,
    next: u32,
    total: u32,
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
    let total = env.grid.iter().product();
    let mut m = Machine { env, blocks: Vec::new(), queue: VecDeque::new(), next: 0, total, constants, shared_bytes };
    for _ in 0..resident.clamp(1, total.max(1)) {
        m.start_block(None);
    }
    m.run()
}

impl Machine<'_, '_> {
    /// Puts the next block of the grid on the machine, in a free place or a new one.
    fn start_block(&mut self, place: Option<usize>) {
        if self.next == self.total {
            return;
        }
        self.next += 1;
        let block = Block::new(self.env, &self.constants, self.next, self.shared_bytes);
        let place = match place {
            Some(place) => {
                self.blocks[place] = block;
                place
            }
            None => {
                self.blocks.push(block);
                self.blocks.len() - 1
            }
        };
        let count = self.blocks[place].threads.len() as u32;
        self.queue.extend((0..count).map(|t| (place as u32, t)));
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

    fn run(&mut self) -> Result<(), Box<RawFault>> {
        while let Some((b, t)) = self.pick() {
            let (b, t) = (b as usize, t as usize);
            match interp::run(self.env, &mut self.blocks[b], t)? {
                Stop::Preempted => match self.env.options.schedule {
                    Schedule::LastIn => self.queue.push_front((b as u32, t as u32)),
                    _ => self.queue.push_back((b as u32, t as u32)),
                },
                Stop::Meeting => self.meet(b, t)?,
                Stop::Barrier => self.barrier(b, t)?,
                Stop::Done => self.done(b, t)?,
            }
        }
        if self.blocks.iter().all(|b| b.live == 0) {
            return Ok(());
        }
        Err(self.stuck())
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
        block.live -= 1;
        if block.live == 0 {
            self.start_block(Some(b));
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
            for (state, pc, threads) in groups {
                let origin = self.env.kernel.origins.get(pc as usize).copied().unwrap_or_default();
                let (line, source) = (origin.line, origin.loc.inlined.map_or(origin.loc.line, |(_, l)| l));
                let who = ranges(&threads);
                lines.push(match state {
                    State::Done => format!("threads {who} have returned"),
                    State::Ready => format!("threads {who} could run"),
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
