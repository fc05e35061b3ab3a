//! What the lanes of a warp do together once all have arrived.

use crate::{
    Schedule,
    decode::SHARED_BASE,
    machine::{Block, Env, thread_of},
    memory::misaligned,
    program::*,
    report::{RawFault, Rule},
};

type Outcome<T> = Result<T, Box<RawFault>>;

/// Executes `meeting` for the lanes in `mask` of a warp.
pub(crate) fn execute(
    env: &mut Env,
    block: &mut Block,
    warp: usize,
    mask: u32,
    meeting: &Meeting,
    pc: u32,
) -> Outcome<()> {
    let slots = env.kernel.slots;
    let lanes = || (0..32usize).filter(move |l| mask >> l & 1 == 1);
    let get = |block: &Block, lane: usize, slot: Slot| block.register(slots, thread_of(warp, lane), slot);
    match &meeting.what {
        Collective::Shuffle { mode, d, p, a, b, c } => {
            let mut out = [(0u64, 0u64); 32];
            for lane in lanes() {
                let (offset, c) = (get(block, lane, *b) as usize & 31, get(block, lane, *c) as usize);
                let (clamp, segment) = (c & 31, c >> 8 & 31);
                let last = (lane & segment) | (clamp & !segment);
                let (source, inside) = match mode {
                    Shuffle::Up => (lane as isize - offset as isize, lane as isize - offset as isize >= last as isize),
                    Shuffle::Down => ((lane + offset) as isize, lane + offset <= last),
                    Shuffle::Butterfly => ((lane ^ offset) as isize, lane ^ offset <= last),
                    Shuffle::Index => {
                        let j = (lane & segment) | (offset & !segment);
                        (j as isize, j <= last)
                    }
                };
                let source = if inside { source as usize } else { lane };
                if source > 31 || mask >> source & 1 == 0 {
                    let who = block.clocks[thread_of(warp, lane)].who(pc);
                    let message =
                        format!("lane {lane} reads from lane {source}, which is not in the mask {mask:#010x}");
                    return Err(RawFault::new(Rule::WrongMask, message).at(&meeting.name, who));
                }
                out[lane] = (get(block, source, *a), u64::from(inside));
            }
            for lane in lanes() {
                block.set(slots, thread_of(warp, lane), *p, out[lane].1);
                block.set(slots, thread_of(warp, lane), *d, out[lane].0);
            }
        }
        Collective::Vote { mode, negate, d, a } => {
            let ballot = lanes().fold(0u32, |v, l| v | u32::from((get(block, l, *a) != 0) != *negate) << l);
            let answer = match mode {
                Vote::All => u64::from(ballot == mask),
                Vote::Any => u64::from(ballot != 0),
                Vote::Uniform => u64::from(ballot == mask || ballot == 0),
                Vote::Ballot => ballot.into(),
            };
            lanes().for_each(|l| block.set(slots, thread_of(warp, l), *d, answer));
        }
        Collective::Redux { f, d, a } => {
            let sum = lanes().map(|l| get(block, l, *a)).reduce(f).unwrap_or(0);
            lanes().for_each(|l| block.set(slots, thread_of(warp, l), *d, sum));
        }
        Collective::Match { all, d, p, a } => {
            let values: Vec<(usize, u64)> = lanes().map(|l| (l, get(block, l, *a))).collect();
            for &(lane, value) in &values {
                let same = values.iter().filter(|v| v.1 == value).fold(0u32, |m, v| m | 1 << v.0);
                let whole = same == mask;
                let answer = if *all && !whole { 0 } else { same };
                block.set(slots, thread_of(warp, lane), *p, u64::from(whole));
                block.set(slots, thread_of(warp, lane), *d, answer.into());
            }
        }
        Collective::WarpSync => {
            if env.options.check_races {
                let mut sum = crate::clocks::ReleaseSum::default();
                lanes().for_each(|l| block.clocks[thread_of(warp, l)].release_to(&mut sum));
                let view = std::rc::Rc::new(sum.sum);
                lanes().for_each(|l| block.clocks[thread_of(warp, l)].acquire(&view));
            }
        }
        Collective::Elect { d, p } => {
            // Which lane is the hardware's choice, always the same for a mask.
            let nth = match env.options.schedule {
                Schedule::Random(seed) => seed % u64::from(mask.count_ones()),
                _ => 0,
            };
            let leader = lanes().nth(nth as usize).unwrap_or(0);
            for lane in lanes() {
                block.set(slots, thread_of(warp, lane), *d, leader as u64);
                block.set(slots, thread_of(warp, lane), *p, u64::from(lane == leader));
            }
        }
        Collective::LoadMatrix { count, transposed, base, offset, d } => {
            whole_warp(block, warp, mask, meeting, pc)?;
            load_matrix(env, block, warp, *count, *transposed, (*base, *offset), d, pc)?;
        }
        Collective::Mma(mma) => {
            whole_warp(block, warp, mask, meeting, pc)?;
            let read = |list: &[Slot]| {
                let mut out = [[0u32; 4]; 32];
                for (lane, regs) in out.iter_mut().enumerate() {
                    for (r, &slot) in regs.iter_mut().zip(list) {
                        *r = get(block, lane, slot) as u32;
                    }
                }
                out
            };
            let d = mma.shape.product(&read(&mma.a), &read(&mma.b), &read(&mma.c), env.options.rounding);
            for (lane, regs) in d.iter().enumerate() {
                for (&value, &slot) in regs.iter().zip(&mma.d) {
                    block.set(slots, thread_of(warp, lane), slot, value.into());
                }
            }
        }
    }
    Ok(())
}

/// Matrix instructions need all 32 lanes.
fn whole_warp(block: &Block, warp: usize, mask: u32, meeting: &Meeting, pc: u32) -> Outcome<()> {
    if mask == u32::MAX {
        return Ok(());
    }
    let who = block.clocks[thread_of(warp, 0)].who(pc);
    Err(RawFault::new(Rule::WrongMask, format!("warp {warp} has fewer than 32 lanes")).at(&meeting.name, who))
}

/// Matrix i takes its eight rows of 16 bytes from the addresses of lanes 8i to 8i + 7; lane l receives two elements
/// of row l / 4, or of column l / 4 if transposed. The read is made by the lane that gives the address.
#[allow(clippy::too_many_arguments)]
fn load_matrix(
    env: &mut Env,
    block: &mut Block,
    warp: usize,
    count: u8,
    transposed: bool,
    address: (Slot, i32),
    d: &[Slot; 4],
    pc: u32,
) -> Outcome<()> {
    let slots = env.kernel.slots;
    let mut values = [[0u32; 32]; 4];
    for (i, values) in values.iter_mut().enumerate().take(count.into()) {
        let mut rows = [0u128; 8];
        let mut banks = [0u8; 8];
        for (j, row) in rows.iter_mut().enumerate() {
            let thread = thread_of(warp, 8 * i + j);
            let at = block.register(slots, thread, address.0).wrapping_add(address.1 as i64 as u64) & 0xFFFF_FFFF;
            let who = block.clocks[thread].who(pc);
            if !at.is_multiple_of(16) {
                return Err(misaligned("shared", at, 16, "ldmatrix", who));
            }
            let offset = shared_offset(at, 16, block.shared.bytes.len(), "ldmatrix", who)?;
            block.shared.check_read(offset, 16, false, who, &block.clocks[thread])?;
            *row = block.shared.get(offset, 16);
            banks[at as usize / 16 % 8] += 1;
        }
        env.phases += 1;
        env.wavefronts += u64::from(*banks.iter().max().unwrap_or(&1));
        let element = |row: usize, column: usize| (rows[row] >> (16 * column)) as u16;
        for (lane, value) in values.iter_mut().enumerate() {
            let (outer, inner) = (lane / 4, lane % 4 * 2);
            let (low, high) = if transposed {
                (element(inner, outer), element(inner + 1, outer))
            } else {
                (element(outer, inner), element(outer, inner + 1))
            };
            *value = u32::from(high) << 16 | u32::from(low);
        }
    }
    for (values, &slot) in values.iter().zip(d).take(count.into()) {
        for (lane, &value) in values.iter().enumerate() {
            block.set(slots, thread_of(warp, lane), slot, value.into());
        }
    }
    Ok(())
}

/// The offset of a shared address within the block's shared memory.
#[inline]
pub(crate) fn shared_offset(
    address: u64,
    n: usize,
    size: usize,
    what: &str,
    who: crate::clocks::Who,
) -> Outcome<usize> {
    let offset = address.wrapping_sub(SHARED_BASE);
    if offset >= size as u64 || offset + n as u64 > size as u64 {
        let message =
            format!("shared address {address:#x} (offset {}) is outside the block's {size} bytes", offset as i64);
        let mut fault = RawFault::new(Rule::OutOfBounds, message).at(format!("{what} of {n} bytes"), who);
        fault.address = Some(address);
        return Err(fault);
    }
    Ok(offset as usize)
}
