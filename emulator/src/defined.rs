//! Which reads of a register cannot be shown, at load time, to follow a write on every path.
//!
//! Only those are checked while the kernel runs, so the check costs nothing where the compiler did its duty.

use crate::program::*;

impl Op {
    /// Calls `read` with each slot that this operation reads and `write` with each that it writes.
    pub(crate) fn slots(&self, read: &mut dyn FnMut(Slot), write: &mut dyn FnMut(Slot)) {
        let mut rw = |r: &[Slot], w: &[Slot]| {
            r.iter().for_each(|&s| read(s));
            w.iter().for_each(|&s| write(s));
        };
        match self {
            Op::Move { d, a } | Op::Unary { d, a, .. } | Op::Convert { d, a, .. } => rw(&[*a], &[*d]),
            Op::Binary { d, a, b, .. } | Op::Compare { d, a, b, .. } => rw(&[*a, *b], &[*d]),
            Op::Ternary { d, a, b, c, .. } | Op::Lop3 { d, a, b, c, .. } => rw(&[*a, *b, *c], &[*d]),
            Op::BitInsert { d, a, b, c, e, .. } => rw(&[*a, *b, *c, *e], &[*d]),
            Op::Pack { d, count, a, .. } => rw(&a[..usize::from(*count)], &[*d]),
            Op::Unpack { a, count, d, .. } => rw(&[*a], &d[..usize::from(*count)]),
            Op::CompareWith { d, q, a, b, c, .. } => rw(&[*a, *b, *c], &[*d, *q]),
            Op::AddCarry { d, a, b, carry, take, give, .. } => {
                rw(&[*a, *b], &[*d]);
                if *take {
                    rw(&[*carry], &[]);
                }
                if *give {
                    rw(&[], &[*carry]);
                }
            }
            Op::Load(m) => rw(&[m.base], &m.regs[..usize::from(m.count)]),
            Op::Store(m) => {
                rw(&[m.base], &[]);
                rw(&m.regs[..usize::from(m.count)], &[]);
            }
            Op::Atomic(x) => rw(&[x.base, x.b, x.c], &[x.d]),
            Op::ActiveMask { d } | Op::Clock { d, .. } => rw(&[], &[*d]),
            Op::Meet(m) => {
                if let Some(mask) = m.mask {
                    rw(&[mask], &[]);
                }
                match &m.what {
                    Collective::Shuffle { d, p, a, b, c, .. } => rw(&[*a, *b, *c], &[*d, *p]),
                    Collective::Vote { d, a, .. } | Collective::Redux { d, a, .. } => rw(&[*a], &[*d]),
                    Collective::Match { d, p, a, .. } => rw(&[*a], &[*d, *p]),
                    Collective::WarpSync => {}
                    Collective::Elect { d, p } => rw(&[], &[*d, *p]),
                    Collective::LoadMatrix { count, base, d, .. } => rw(&[*base], &d[..usize::from(*count)]),
                    Collective::Mma(x) => {
                        rw(&x.a, &[]);
                        rw(&x.b, &[]);
                        rw(&x.c, &x.d);
                    }
                }
            }
            Op::Machine(m) => {
                m.a.iter().for_each(|&(slot, _)| read(slot));
                if m.adds().is_some() {
                    m.d.iter().for_each(|&slot| read(slot));
                }
                m.d.iter().for_each(|&slot| write(slot));
            }
            Op::Barrier(b) => rw(&[b.id, b.count, b.p], &[b.d]),
            Op::CopyAsync { destination, source, live, ignore, .. } => {
                rw(&[*destination, *source, *live, *ignore], &[])
            }
            Op::BranchIndexed { index, .. } => rw(&[*index], &[]),
            Op::NeedDefined { slot, .. } => rw(&[*slot], &[]),
            Op::SetDefined { .. }
            | Op::CommitGroup
            | Op::WaitGroup { .. }
            | Op::WaitAll
            | Op::Fence { .. }
            | Op::Branch { .. }
            | Op::Call { .. }
            | Op::Return
            | Op::Exit
            | Op::Trap
            | Op::AssertFailed
            | Op::Nothing => {}
        }
    }
}

impl Op {
    /// Calls `f` with every slot of this operation.
    pub(crate) fn rename(&mut self, f: &mut dyn FnMut(&mut Slot)) {
        let mut all = |slots: &mut [&mut Slot]| slots.iter_mut().for_each(|s| f(s));
        match self {
            Op::Move { d, a } | Op::Unary { d, a, .. } | Op::Convert { d, a, .. } => all(&mut [d, a]),
            Op::Binary { d, a, b, .. } | Op::Compare { d, a, b, .. } => all(&mut [d, a, b]),
            Op::Ternary { d, a, b, c, .. } | Op::Lop3 { d, a, b, c, .. } => all(&mut [d, a, b, c]),
            Op::BitInsert { d, a, b, c, e, .. } => all(&mut [d, a, b, c, e]),
            Op::Pack { d, a: list, .. } | Op::Unpack { a: d, d: list, .. } => {
                all(&mut [d]);
                list.iter_mut().for_each(f);
            }
            Op::CompareWith { d, q, a, b, c, .. } => all(&mut [d, q, a, b, c]),
            Op::AddCarry { d, a, b, carry, .. } => all(&mut [d, a, b, carry]),
            Op::Load(m) | Op::Store(m) => {
                all(&mut [&mut m.base]);
                m.regs.iter_mut().for_each(f);
            }
            Op::Atomic(x) => all(&mut [&mut x.base, &mut x.b, &mut x.c, &mut x.d]),
            Op::ActiveMask { d } | Op::Clock { d, .. } => all(&mut [d]),
            Op::Meet(m) => {
                if let Some(mask) = &mut m.mask {
                    all(&mut [mask]);
                }
                match &mut m.what {
                    Collective::Shuffle { d, p, a, b, c, .. } => all(&mut [d, p, a, b, c]),
                    Collective::Vote { d, a, .. } | Collective::Redux { d, a, .. } => all(&mut [d, a]),
                    Collective::Match { d, p, a, .. } => all(&mut [d, p, a]),
                    Collective::WarpSync => {}
                    Collective::Elect { d, p } => all(&mut [d, p]),
                    Collective::LoadMatrix { base, d, .. } => {
                        all(&mut [base]);
                        d.iter_mut().for_each(f);
                    }
                    Collective::Mma(x) => {
                        for list in [&mut x.a, &mut x.b, &mut x.c, &mut x.d] {
                            list.iter_mut().for_each(&mut *f);
                        }
                    }
                }
            }
            Op::Machine(m) => {
                m.d.iter_mut().for_each(&mut *f);
                m.a.iter_mut().for_each(|(slot, _)| f(slot));
            }
            Op::Barrier(b) => all(&mut [&mut b.id, &mut b.count, &mut b.p, &mut b.d]),
            Op::CopyAsync { destination, source, live, ignore, .. } => all(&mut [destination, source, live, ignore]),
            Op::BranchIndexed { index, .. } => all(&mut [index]),
            Op::NeedDefined { slot, .. } => all(&mut [slot]),
            Op::SetDefined { .. }
            | Op::CommitGroup
            | Op::WaitGroup { .. }
            | Op::WaitAll
            | Op::Fence { .. }
            | Op::Branch { .. }
            | Op::Call { .. }
            | Op::Return
            | Op::Exit
            | Op::Trap
            | Op::AssertFailed
            | Op::Nothing => {}
        }
    }
}

/// Whether `slot` is in the set.
pub(crate) fn bit(set: &[u64], slot: usize) -> bool {
    set[slot / 64] >> (slot % 64) & 1 == 1
}

/// Where functions may return to.
pub(crate) fn return_points(code: &[Instruction]) -> Vec<u32> {
    (0..code.len()).filter(|&i| matches!(code[i].op, Op::Call { .. })).map(|i| i as u32 + 1).collect()
}

/// The instructions that begin a basic block.
pub(crate) fn leaders(code: &[Instruction], returns: &[u32]) -> Vec<bool> {
    let mut leader = vec![false; code.len()];
    if let Some(first) = leader.first_mut() {
        *first = true;
    }
    for i in 0..code.len() {
        let next = successors(code, i, returns);
        if next != [i + 1] {
            next.iter().for_each(|&t| leader[t] = true);
            if i + 1 < code.len() {
                leader[i + 1] = true;
            }
        }
    }
    leader
}

/// Where control may go after instruction `i`.
pub(crate) fn successors(code: &[Instruction], i: usize, returns: &[u32]) -> Vec<usize> {
    let next = i + 1;
    let mut out = match &code[i].op {
        Op::Branch { target } => vec![*target as usize],
        Op::BranchIndexed { targets, .. } => targets.iter().map(|&t| t as usize).collect(),
        Op::Call { target } => vec![*target as usize],
        Op::Return => returns.iter().map(|&r| r as usize).collect(),
        Op::Exit | Op::Trap | Op::AssertFailed => Vec::new(),
        _ => vec![next],
    };
    if code[i].guard != TRUE && !out.contains(&next) {
        out.push(next);
    }
    out.retain(|&t| t < code.len());
    out
}

/// Inserts checks where a register may be read before it is written.
pub(crate) fn track(kernel: &mut Kernel) {
    let code = &kernel.code;
    let words = kernel.slots.div_ceil(64);
    let returns = return_points(code);
    let mut start = vec![0u64; words];
    let set = |bits: &mut Vec<u64>, s: Slot| bits[usize::from(s) / 64] |= 1 << (s % 64);
    (0..FIRST_FREE).for_each(|s| set(&mut start, s));
    kernel.constants.iter().for_each(|&(s, _)| set(&mut start, s));

    // Definitely written on entry to each basic block: everything until shown otherwise.
    let leader = leaders(code, &returns);
    let mut before: Vec<Option<Vec<u64>>> = vec![None; code.len()];
    before[0] = Some(start);
    let mut work = vec![0usize];
    while let Some(begin) = work.pop() {
        let Some(mut state) = before[begin].clone() else { continue };
        let mut i = begin;
        loop {
            if code[i].guard == TRUE {
                code[i].op.slots(&mut |_| {}, &mut |s| state[usize::from(s) / 64] |= 1 << (s % 64));
            }
            let next = successors(code, i, &returns);
            if next.len() == 1 && next[0] == i + 1 && !leader[i + 1] {
                i += 1;
                continue;
            }
            for t in next {
                let changed = match &mut before[t] {
                    None => {
                        before[t] = Some(state.clone());
                        true
                    }
                    Some(old) => {
                        let mut changed = false;
                        for (o, s) in old.iter_mut().zip(&state) {
                            changed |= *o & !s != 0;
                            *o &= s;
                        }
                        changed
                    }
                };
                if changed {
                    work.push(t);
                }
            }
            break;
        }
    }

    let mut suspects: Vec<Slot> = Vec::new();
    let mut needs: Vec<Vec<Slot>> = vec![Vec::new(); code.len()];
    let mut state: Option<Vec<u64>> = None;
    for i in 0..code.len() {
        if leader[i] {
            state = before[i].clone();
        }
        let Some(state) = &mut state else { continue };
        let known = |state: &Vec<u64>, s: Slot| state[usize::from(s) / 64] >> (s % 64) & 1 == 1;
        let mut check = |s: Slot| {
            if !known(state, s) {
                needs[i].push(s);
                if !suspects.contains(&s) {
                    suspects.push(s);
                }
            }
        };
        if code[i].guard != TRUE {
            check(code[i].guard);
        }
        code[i].op.slots(&mut check, &mut |_| {});
        if code[i].guard == TRUE {
            code[i].op.slots(&mut |_| {}, &mut |s| state[usize::from(s) / 64] |= 1 << (s % 64));
        }
    }
    if suspects.is_empty() {
        return;
    }

    let old = std::mem::take(&mut kernel.code);
    let origins = std::mem::take(&mut kernel.origins);
    let bit = |s: Slot| suspects.iter().position(|&t| t == s).map(|i| i as u16);
    let mut moved = Vec::with_capacity(old.len());
    for (i, instruction) in old.into_iter().enumerate() {
        moved.push(kernel.code.len() as u32);
        let (guard, negated) = (instruction.guard, instruction.negated);
        let mut marks = Vec::new();
        instruction.op.slots(&mut |_| {}, &mut |s| marks.extend(bit(s)));
        let push = |kernel: &mut Kernel, instruction: Instruction| {
            kernel.code.push(instruction);
            kernel.origins.push(origins[i]);
        };
        for &slot in &needs[i] {
            // The guard itself must be defined whatever it says; the operands only if the instruction runs.
            let (g, n) = match &instruction.op {
                _ if slot == guard => (TRUE, false),
                // A wgmma reads its accumulators only if it adds to them.
                Op::Machine(m) if m.adds().is_some() && m.d.contains(&slot) => (m.adds().unwrap_or(TRUE), false),
                _ => (guard, negated),
            };
            if let Some(bit) = bit(slot) {
                let name = kernel.register_names.iter().position(|(s, _)| *s == slot).unwrap_or(0) as u32;
                push(kernel, Instruction { op: Op::NeedDefined { slot, bit, name }, guard: g, negated: n });
            }
        }
        // The mark goes first: an instruction may overwrite its own guard.
        for bit in marks {
            push(kernel, Instruction { op: Op::SetDefined { bit }, guard, negated });
        }
        push(kernel, instruction);
    }
    moved.push(kernel.code.len() as u32);
    for instruction in &mut kernel.code {
        match &mut instruction.op {
            Op::Branch { target } | Op::Call { target } => *target = moved[*target as usize],
            Op::BranchIndexed { targets, .. } => targets.iter_mut().for_each(|t| *t = moved[*t as usize]),
            _ => {}
        }
    }
    kernel.tracked = suspects.len();
}
