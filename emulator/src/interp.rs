//! One thread, until it must wait.

use crate::{
    arith::{bit_insert, lop3, low, sign_extend},
    clocks::{ThreadClock, Who},
    collective::shared_offset,
    decode::{LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, WINDOW},
    machine::{Block, Copy, Env, Thread, lands_now},
    memory::{Global, Stretch, misaligned},
    parse::Space,
    program::*,
    report::{RawFault, Rule},
    wgmma::Watch,
};

type Outcome<T> = Result<T, Box<RawFault>>;

/// Why a thread stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    Preempted,
    Meeting,
    Barrier,
    /// At an operation that the machine executes.
    Machine,
    Done,
}

/// So many instructions before others get a turn, where no preemption is asked for: threads may spin on memory.
const SLICE: u64 = 20_000;

/// Runs thread `t` of `block` until it waits, ends or its slice is over.
pub(crate) fn run(env: &mut Env, block: &mut Block, t: usize) -> Outcome<Stop> {
    let kernel = env.kernel;
    let code = &kernel.code[..];
    let slots = kernel.slots;
    let slice = match env.options.preemption {
        Some(n) => 1 + env.rng.below(2 * u64::from(n)),
        None => SLICE,
    };
    let thread = &mut block.threads[t];
    let regs = &mut block.registers[t * slots..(t + 1) * slots];
    let clock = &mut block.clocks[t];
    let shared = &mut block.shared;
    let local = &mut block.local[t * kernel.local_bytes..(t + 1) * kernel.local_bytes];
    let mut pc = thread.pc as usize;
    let mut left = slice;

    macro_rules! r {
        ($slot:expr) => {
            regs[usize::from($slot)]
        };
    }
    let stop = loop {
        if left == 0 {
            break Stop::Preempted;
        }
        left -= 1;
        let instruction = &code[pc];
        if instruction.guard != TRUE && (r!(instruction.guard) != 0) == instruction.negated {
            pc += 1;
            continue;
        }
        let watch = kernel.watched[pc];
        if watch != Watch::None {
            thread
                .in_flight
                .watch(&instruction.op, watch, env.options.check_races)
                .map_err(|message| RawFault::new(Rule::Wgmma, message).at("register access", clock.who(pc as u32)))?;
        }
        match &instruction.op {
            Op::Move { d, a } => r!(*d) = r!(*a),
            Op::Unary { f, d, a } => r!(*d) = f(r!(*a)),
            Op::Binary { f, d, a, b } => r!(*d) = f(r!(*a), r!(*b)),
            Op::Ternary { f, d, a, b, c } => r!(*d) = f(r!(*a), r!(*b), r!(*c)),
            Op::Compare { f, d, a, b } => r!(*d) = u64::from(f(r!(*a), r!(*b))),
            Op::Branch { target } => {
                pc = *target as usize;
                continue;
            }
            Op::Load(m) => {
                let address = r!(m.base).wrapping_add(m.offset as i64 as u64);
                let n = usize::from(m.bytes) * usize::from(m.count);
                let who = clock.who(pc as u32);
                if is_elsewhere(m.space, address) {
                    break Stop::Machine;
                }
                let mut memory = Memory { env, home: who.block, shared, local, thread, clock };
                let value = memory.load(m, address, n, who)?;
                put_loaded(m, value, regs);
                // The same again: it is polling, and learns nothing before others had their turn.
                if m.strong && thread.read.replace((address, value)) == Some((address, value)) {
                    pc += 1;
                    break Stop::Preempted;
                }
            }
            Op::Store(m) => {
                let address = r!(m.base).wrapping_add(m.offset as i64 as u64);
                let n = usize::from(m.bytes) * usize::from(m.count);
                if is_elsewhere(m.space, address) {
                    break Stop::Machine;
                }
                let (value, who) = (stored(m, regs), clock.who(pc as u32));
                let mut memory = Memory { env, home: who.block, shared, local, thread, clock };
                memory.store(m, address, n, value, who)?;
            }
            Op::Convert { d, a, how } => r!(*d) = how.apply(r!(*a)),
            Op::Lop3 { d, a, b, c, table, bits64 } => {
                let v = lop3(r!(*a), r!(*b), r!(*c), *table);
                r!(*d) = if *bits64 { v } else { low(v, 32) };
            }
            Op::BitInsert { d, a, b, c, e, bits64 } => {
                r!(*d) = bit_insert(r!(*a), r!(*b), r!(*c), r!(*e), if *bits64 { 64 } else { 32 });
            }
            Op::Pack { d, bits, count, a } => {
                let mut v = 0;
                for i in 0..usize::from(*count) {
                    v |= low(r!(a[i]), (*bits).into()) << (usize::from(*bits) * i);
                }
                r!(*d) = v;
            }
            Op::Unpack { a, bits, count, d } => {
                let v = r!(*a);
                for i in 0..usize::from(*count) {
                    r!(d[i]) = low(v >> (usize::from(*bits) * i), (*bits).into());
                }
            }
            Op::CompareWith { f, combine, d, q, a, b, c } => {
                let (holds, c) = (u64::from(f(r!(*a), r!(*b))), r!(*c));
                r!(*q) = combine(holds ^ 1, c);
                r!(*d) = combine(holds, c);
            }
            Op::AddCarry { d, a, b, carry, bits64, subtract, take, give } => {
                let bits = if *bits64 { 64 } else { 32 };
                let (a, b) = (u128::from(r!(*a)), u128::from(r!(*b)));
                let flag = if *take { u128::from(r!(*carry)) } else { 0 };
                let wide = if *subtract { a.wrapping_sub(b).wrapping_sub(flag) } else { a + b + flag };
                if *give {
                    r!(*carry) = (wide >> bits & 1) as u64;
                }
                r!(*d) = low(wide as u64, bits);
            }
            Op::Atomic(x) => {
                let address = r!(x.base).wrapping_add(x.offset as i64 as u64);
                if is_elsewhere(x.space, address) {
                    break Stop::Machine;
                }
                let (b, c) = (r!(x.b), r!(x.c));
                let who = clock.who(pc as u32);
                let mut memory = Memory { env, home: who.block, shared, local, thread, clock };
                r!(x.d) = memory.atomic(x, address, b, c, who)?;
            }
            Op::ActiveMask { d } => {
                // Which lanes are together is the hardware's choice; one lane alone is always a right answer.
                r!(*d) = 1 << (t % 32);
            }
            Op::Clock { d, mask } => r!(*d) = (env.executed + thread.executed + slice - left) & mask,
            Op::Meet(_) => break Stop::Meeting,
            Op::Machine(_) => break Stop::Machine,
            Op::Barrier(_) => break Stop::Barrier,
            Op::CopyAsync { destination, to, source, from, bytes, live, ignore } => {
                let at = r!(*destination).wrapping_add(*to as i64 as u64) & 0xFFFF_FFFF;
                let from = r!(*source).wrapping_add(*from as i64 as u64);
                let (live, ignore) = (r!(*live), r!(*ignore) != 0);
                let live = if ignore { 0 } else { live };
                let who = clock.copier(pc as u32);
                let n = usize::from(*bytes);
                if live > u64::from(*bytes) {
                    let message = format!("cp.async of {n} bytes reads {live}");
                    return Err(RawFault::new(Rule::OutOfBounds, message).at("cp.async", who));
                }
                if !at.is_multiple_of(n as u64) {
                    return Err(misaligned("shared", at, n, "cp.async", who));
                }
                if !from.is_multiple_of(n as u64) {
                    return Err(misaligned("global", from, n, "cp.async", who));
                }
                let to = shared_offset(at, n, shared.bytes.len(), "cp.async", who)?;
                let mut done = 0;
                while done < live {
                    // The live bytes in pieces that are powers of two.
                    let piece = 1u64 << (live - done).ilog2();
                    let (memory, offset) = env.global.at(from + done, piece as usize, "cp.async", who)?;
                    memory.check_read(offset, piece as usize, false, who, clock)?;
                    done += piece;
                }
                shared.check_write(to, n, false, who, clock)?;
                let copy = Copy { to, from, bytes: *bytes, live: live as u8, at: pc as u32 };
                if lands_now(env) {
                    land(env.global, shared, &copy)?;
                    // It stays on the books, with nothing left to do, until it is waited for.
                    thread.open.push(Copy { bytes: 0, ..copy });
                } else {
                    thread.open.push(copy);
                }
            }
            Op::CommitGroup => {
                let group = std::mem::take(&mut thread.open);
                thread.groups.push_back(group);
                clock.committed += 1;
            }
            Op::WaitGroup { pending } => {
                while thread.groups.len() > *pending as usize {
                    for copy in thread.groups.pop_front().into_iter().flatten() {
                        land(env.global, shared, &copy)?;
                    }
                }
                clock.waited = clock.waited.max(clock.committed.saturating_sub(*pending));
            }
            Op::WaitAll => {
                let open = std::mem::take(&mut thread.open);
                thread.groups.push_back(open);
                clock.committed += 1;
                for copy in thread.groups.drain(..).flatten() {
                    land(env.global, shared, &copy)?;
                }
                clock.waited = clock.committed;
            }
            Op::Fence { block_only } => {
                if env.options.check_races {
                    clock.fence(*block_only);
                }
            }
            Op::BranchIndexed { index, targets } => {
                let i = r!(*index) as usize;
                let Some(&target) = targets.get(i) else {
                    let message = format!("brx.idx with index {i} of {}", targets.len());
                    return Err(RawFault::new(Rule::OutOfBounds, message).at("branch", clock.who(pc as u32)));
                };
                pc = target as usize;
                continue;
            }
            Op::Call { target } => {
                thread.calls.push(pc as u32 + 1);
                pc = *target as usize;
                continue;
            }
            Op::Return => match thread.calls.pop() {
                Some(back) => {
                    pc = back as usize;
                    continue;
                }
                None => break Stop::Done,
            },
            Op::Exit => break Stop::Done,
            Op::Trap => return Err(RawFault::new(Rule::Trap, "trap").at("trap", clock.who(pc as u32))),
            Op::AssertFailed => {
                return Err(RawFault::new(Rule::Trap, "an assertion failed").at("assert", clock.who(pc as u32)));
            }
            Op::Nothing => {}
            Op::NeedDefined { bit, name, .. } => {
                if thread.defined[usize::from(*bit) / 64] >> (bit % 64) & 1 == 0 {
                    let name = kernel.register_names.get(*name as usize).map_or("?", |(_, n)| n);
                    let message = format!("register {name} is read before it is written");
                    return Err(RawFault::new(Rule::UndefinedRegister, message).at("read", clock.who(pc as u32)));
                }
            }
            Op::SetDefined { bit } => thread.defined[usize::from(*bit) / 64] |= 1 << (bit % 64),
        }
        pc += 1;
    };
    thread.pc = pc as u32;
    thread.executed += slice - left;
    env.executed += slice - left;
    if thread.executed > env.options.instruction_limit {
        let message = format!("a thread executed more than {} instructions", env.options.instruction_limit);
        return Err(RawFault::new(Rule::InstructionLimit, message).at("loop", clock.who(pc as u32)));
    }
    Ok(stop)
}

/// A `cp.async` writes its bytes: `live` from global memory, zeros behind.
fn land(global: &mut Global, shared: &mut Stretch, copy: &Copy) -> Outcome<()> {
    if copy.bytes == 0 {
        return Ok(());
    }
    let mut value = 0u128;
    if copy.live > 0 {
        let n = usize::from(copy.live);
        let (memory, offset) = global.host(copy.from, n, "cp.async")?;
        value = memory.get(offset, n);
    }
    shared.put(copy.to, copy.bytes.into(), value);
    Ok(())
}

/// Whether an address lies in another block's shared memory: only the machine has that at hand.
#[inline]
fn is_elsewhere(space: Space, address: u64) -> bool {
    let rank = address >> 24 & 0xFF;
    match space {
        Space::Cluster => rank != 0,
        Space::Generic => rank != 0 && (SHARED_WINDOW..SHARED_WINDOW + WINDOW).contains(&address),
        _ => false,
    }
}

/// The address and size of a load, store or atomic.
pub(crate) fn memory_access(op: &Op) -> Option<(Slot, i32, usize)> {
    match op {
        Op::Load(m) | Op::Store(m) => Some((m.base, m.offset, usize::from(m.bytes) * usize::from(m.count))),
        Op::Atomic(x) => Some((x.base, x.offset, x.bytes.into())),
        _ => None,
    }
}

/// Executes a load, store or atomic on the shared memory of a block, which is given with its serial number.
pub(crate) fn access_peer(
    env: &mut Env,
    block: &mut Block,
    t: usize,
    op: &Op,
    (shared, home): (&mut Stretch, u32),
    address: u64,
) -> Outcome<()> {
    let (slots, bytes) = (env.kernel.slots, env.kernel.local_bytes);
    let thread = &mut block.threads[t];
    let regs = &mut block.registers[t * slots..(t + 1) * slots];
    let clock = &mut block.clocks[t];
    let local = &mut block.local[t * bytes..(t + 1) * bytes];
    let who = clock.who(thread.pc);
    let n = memory_access(op).map_or(0, |m| m.2);
    let mut memory = Memory { env, home, shared, local, thread, clock };
    match op {
        Op::Load(m) => {
            let value = memory.load(&Access { space: Space::Shared, ..*m }, address, n, who)?;
            put_loaded(m, value, regs);
        }
        Op::Store(m) => memory.store(&Access { space: Space::Shared, ..*m }, address, n, stored(m, regs), who)?,
        Op::Atomic(x) => {
            let (b, c) = (regs[usize::from(x.b)], regs[usize::from(x.c)]);
            let x = Atomic { space: Space::Shared, ..**x };
            regs[usize::from(x.d)] = memory.atomic(&x, address, b, c, who)?;
        }
        _ => {}
    }
    Ok(())
}

/// Puts what was loaded into its registers.
#[inline]
fn put_loaded(m: &Access, value: u128, regs: &mut [u64]) {
    let bits = u32::from(m.bytes) * 8;
    if m.count == 1 && m.extend == 0 {
        regs[usize::from(m.regs[0])] = value as u64;
        return;
    }
    for i in 0..usize::from(m.count) {
        let element = low((value >> (bits as usize * i)) as u64, bits);
        regs[usize::from(m.regs[i])] = match m.extend {
            0 => element,
            width => low(sign_extend(element, bits) as u64, width.into()),
        };
    }
}

/// What is to be stored, from its registers.
#[inline]
fn stored(m: &Access, regs: &[u64]) -> u128 {
    let bits = u32::from(m.bytes) * 8;
    (0..usize::from(m.count))
        .fold(0, |value, i| value | u128::from(low(regs[usize::from(m.regs[i])], bits)) << (bits as usize * i))
}

/// The memories as one thread sees them.
struct Memory<'m, 'e> {
    env: &'m mut Env<'e>,
    /// The block of `shared`.
    home: u32,
    shared: &'m mut Stretch,
    local: &'m mut [u8],
    thread: &'m mut Thread,
    clock: &'m mut ThreadClock,
}

impl Memory<'_, '_> {
    /// The space behind a generic address.
    #[inline]
    fn resolve(space: Space, address: u64) -> (Space, u64) {
        match space {
            Space::Generic => {
                let in_window = |w: u64| address >= w && address < w + WINDOW;
                if in_window(SHARED_WINDOW) {
                    (Space::Shared, address - SHARED_WINDOW)
                } else if in_window(LOCAL_WINDOW) {
                    (Space::Local, address - LOCAL_WINDOW)
                } else if in_window(PARAM_WINDOW) {
                    (Space::Param, address - PARAM_WINDOW)
                } else {
                    (Space::Global, address)
                }
            }
            Space::Shared | Space::Cluster => (Space::Shared, address & 0xFFFF_FFFF),
            Space::Const => (Space::Global, address),
            other => (other, address),
        }
    }

    #[inline]
    fn load(&mut self, m: &Access, address: u64, n: usize, who: Who) -> Outcome<u128> {
        let (space, address) = Self::resolve(m.space, address);
        let value = match space {
            Space::Global => {
                let (memory, offset) = self.env.global.at(address, n, "read", who)?;
                memory.check_read(offset, n, m.strong, who, self.clock)?;
                memory.get(offset, n)
            }
            Space::Shared => {
                if !address.is_multiple_of(n as u64) {
                    return Err(misaligned("shared", address, n, "read", who));
                }
                let offset = shared_offset(address, n, self.shared.bytes.len(), "read", who)?;
                self.shared.check_read(offset, n, m.strong, who, self.clock)?;
                self.shared.get(offset, n)
            }
            _ => {
                let mut bytes = [0; 16];
                // The kernel's own parameters are the same for all threads and never written.
                if let (Space::Param, Some(value)) =
                    (space, self.env.parameters.get(address as usize..(address as usize).saturating_add(n)))
                {
                    bytes[..n].copy_from_slice(value);
                    return Ok(u128::from_le_bytes(bytes));
                }
                bytes[..n].copy_from_slice(self.private(space, address, n, who)?);
                return Ok(u128::from_le_bytes(bytes));
            }
        };
        if m.strong && self.env.options.check_races {
            let key = (if space == Space::Shared { self.home } else { 0 }, address);
            if let Some(found) = self.env.locations.get(&key) {
                self.clock.observe(found, m.acquire);
            }
        }
        Ok(value)
    }

    #[inline]
    fn store(&mut self, m: &Access, address: u64, n: usize, value: u128, who: Who) -> Outcome<()> {
        let (space, address) = Self::resolve(m.space, address);
        match space {
            Space::Global => {
                let (memory, offset) = self.env.global.at(address, n, "write", who)?;
                memory.check_write(offset, n, m.strong, who, self.clock)?;
                memory.put(offset, n, value);
            }
            Space::Shared => {
                if !address.is_multiple_of(n as u64) {
                    return Err(misaligned("shared", address, n, "write", who));
                }
                let offset = shared_offset(address, n, self.shared.bytes.len(), "write", who)?;
                self.shared.check_write(offset, n, m.strong, who, self.clock)?;
                self.shared.put(offset, n, value);
            }
            _ => self.private(space, address, n, who)?.copy_from_slice(&value.to_le_bytes()[..n]),
        }
        if m.strong && self.env.options.check_races {
            let shared = space == Space::Shared;
            let key = (if shared { self.home } else { 0 }, address);
            match self.clock.publish(m.release, shared && self.home == who.block) {
                Some(view) => self.env.locations.insert(key, view),
                None => self.env.locations.remove(&key),
            };
        }
        Ok(())
    }

    fn atomic(&mut self, x: &Atomic, address: u64, b: u64, c: u64, who: Who) -> Outcome<u64> {
        let (space, address) = Self::resolve(x.space, address);
        let n = usize::from(x.bytes);
        let clock = &mut *self.clock;
        let (memory, offset) = match space {
            Space::Global => self.env.global.at(address, n, "atomic", who)?,
            Space::Shared => {
                if !address.is_multiple_of(n as u64) {
                    return Err(misaligned("shared", address, n, "atomic", who));
                }
                let offset = shared_offset(address, n, self.shared.bytes.len(), "atomic", who)?;
                (&mut *self.shared, offset)
            }
            _ => return Err(RawFault::new(Rule::OutOfBounds, "an atomic on local memory").at("atomic", who)),
        };
        memory.check_write(offset, n, true, who, clock)?;
        // The read half: initialisation.
        memory.check_read(offset, n, true, who, clock)?;
        let old = memory.get(offset, n) as u64;
        memory.put(offset, n, u128::from(low((x.f)(old, b, c), 8 * n as u32)));
        if self.env.options.check_races {
            let shared = space == Space::Shared;
            let key = (if shared { self.home } else { 0 }, address);
            if let Some(found) = self.env.locations.get(&key) {
                clock.observe(found, x.acquire);
            }
            if let Some(view) = clock.publish(x.release, shared && self.home == who.block) {
                match self.env.locations.get_mut(&key) {
                    Some(old) => old.join(&view),
                    None => {
                        self.env.locations.insert(key, view);
                    }
                }
            }
        }
        Ok(old)
    }

    /// Local memory and parameters: nobody else sees them.
    fn private(&mut self, space: Space, address: u64, n: usize, who: Who) -> Outcome<&mut [u8]> {
        let kernel_bytes = self.env.kernel.parameter_bytes as u64;
        let (bytes, at): (&mut [u8], u64) = match space {
            Space::Param => (&mut self.thread.call_area, address.wrapping_sub(kernel_bytes)),
            _ => (self.local, address),
        };
        if at >= bytes.len() as u64 || at + n as u64 > bytes.len() as u64 {
            let message = format!("{space:?} address {address:#x} is outside its {} bytes", bytes.len());
            return Err(RawFault::new(Rule::OutOfBounds, message).at(format!("access of {n} bytes"), who));
        }
        if !address.is_multiple_of(n as u64) {
            return Err(misaligned("local", address, n, "access", who));
        }
        Ok(&mut bytes[at as usize..at as usize + n])
    }
}
