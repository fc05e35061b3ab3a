//! Fewer slots: registers that are never needed at the same time share one.
//!
//! nvcc's registers are virtual, thousands in a large kernel; hardly more than a hundred hold a value at once. A small
//! register file is one that stays in the host's cache.

use std::collections::BinaryHeap;

use crate::{
    defined::{bit, leaders, successors},
    program::*,
};

/// Gives slots anew, by linear scan over the stretches of code in which each is live.
pub(crate) fn share(kernel: &mut Kernel) {
    let code = &kernel.code;
    let n = kernel.slots;
    let words = n.div_ceil(64);
    let returns = crate::defined::return_points(code);
    let leader = leaders(code, &returns);

    // Live on entry to each basic block, backwards to a fixed point.
    let starts: Vec<usize> = (0..code.len()).filter(|&i| leader[i]).collect();
    let mut live_in: Vec<Vec<u64>> = vec![vec![0; words]; starts.len()];
    let block_of = |i: usize| starts.partition_point(|&s| s <= i) - 1;
    let end_of = |b: usize| starts.get(b + 1).copied().unwrap_or(code.len());
    let backwards = |live: &mut Vec<u64>, i: usize| {
        let c = &code[i];
        if c.guard == TRUE {
            c.op.slots(&mut |_| {}, &mut |s| live[usize::from(s) / 64] &= !(1 << (s % 64)));
        }
        c.op.slots(&mut |s| live[usize::from(s) / 64] |= 1 << (s % 64), &mut |_| {});
        live[usize::from(c.guard) / 64] |= 1 << (c.guard % 64);
    };
    let live_out = |live_in: &[Vec<u64>], b: usize| {
        let mut live = vec![0u64; words];
        for t in successors(code, end_of(b) - 1, &returns) {
            live.iter_mut().zip(&live_in[block_of(t)]).for_each(|(a, b)| *a |= b);
        }
        live
    };
    loop {
        let mut changed = false;
        for b in (0..starts.len()).rev() {
            let mut live = live_out(&live_in, b);
            (starts[b]..end_of(b)).rev().for_each(|i| backwards(&mut live, i));
            if live != live_in[b] {
                live_in[b] = live;
                changed = true;
            }
        }
        if !changed {
            break;
        }
    }

    // The stretch from the first to the last instruction that touches or carries each slot.
    let mut stretch: Vec<Option<(usize, usize)>> = vec![None; n];
    let mut extend = |s: usize, at: usize| {
        let (first, last) = stretch[s].get_or_insert((at, at));
        (*first, *last) = ((*first).min(at), (*last).max(at));
    };
    for b in 0..starts.len() {
        for (live, at) in [(&live_in[b], starts[b]), (&live_out(&live_in, b), end_of(b) - 1)] {
            (0..n).filter(|&s| bit(live, s)).for_each(|s| extend(s, at));
        }
    }
    for (i, c) in code.iter().enumerate() {
        extend(c.guard.into(), i);
        let mut touched = Vec::new();
        c.op.slots(&mut |s| touched.push(s), &mut |_| {});
        c.op.slots(&mut |_| {}, &mut |s| touched.push(s));
        touched.into_iter().for_each(|s| extend(s.into(), i));
    }

    // What wgmma reads and writes while the code goes on stays for itself.
    for c in code {
        if let Op::Machine(m) = &c.op
            && m.adds().is_some()
        {
            m.d.iter().chain(m.a.iter().map(|(slot, _)| slot)).for_each(|&s| extend(s.into(), code.len()));
        }
    }

    // Special registers and constants keep slots of their own, in front.
    let mut place: Vec<Slot> = vec![SINK; n];
    (0..FIRST_FREE).for_each(|s| place[usize::from(s)] = s);
    let mut next = FIRST_FREE;
    for (slot, _) in &mut kernel.constants {
        if *slot >= FIRST_FREE {
            place[usize::from(*slot)] = next;
            *slot = next;
            next += 1;
        }
    }
    let mut order: Vec<(usize, usize, usize)> = (usize::from(FIRST_FREE)..n)
        .filter(|&s| place[s] == SINK)
        .filter_map(|s| stretch[s].map(|(first, last)| (first, last, s)))
        .collect();
    order.sort_unstable();
    let mut busy: BinaryHeap<std::cmp::Reverse<(usize, Slot)>> = BinaryHeap::new();
    for (first, last, s) in order {
        // An instruction may read one register and write the other that shares its slot only if the stretches do not
        // even touch: some operations write one result before they have read every operand.
        let reuse = matches!(busy.peek(), Some(std::cmp::Reverse((end, _))) if *end < first);
        let slot = match if reuse { busy.pop() } else { None } {
            Some(std::cmp::Reverse((_, slot))) => slot,
            None => {
                next += 1;
                next - 1
            }
        };
        place[s] = slot;
        busy.push(std::cmp::Reverse((last, slot)));
    }

    for c in &mut kernel.code {
        c.guard = place[usize::from(c.guard)];
        c.op.rename(&mut |s| *s = place[usize::from(*s)]);
    }
    kernel.slots = next.into();
}
