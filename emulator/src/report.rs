//! What the checker says when a rule is broken.

use std::fmt;

use crate::program::{Kernel, Origin};

/// The rules that the emulator enforces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Rule {
    /// An access outside every allocation, or outside the block's shared memory.
    OutOfBounds,
    /// An address that is not a multiple of the access size.
    Misaligned,
    /// A read of memory that nothing has written.
    UninitialisedRead,
    /// Two accesses of one address, one of them a write, that nothing orders.
    Race,
    /// Like `Race`, between two blocks.
    RaceBetweenBlocks,
    /// The data of a `cp.async` or bulk copy used, or the thread's end reached, before the wait that makes it visible.
    CopyNotAwaited,
    /// wgmma or a bulk copy touches what the generic proxy wrote, or an mbarrier's initialisation, without a fence of
    /// the proxies between them.
    ProxyFence,
    /// An mbarrier that is used before `init`, initialised twice, or arrived at too often.
    Mbarrier,
    /// Registers of a wgmma touched before its wait, no `wgmma.fence` before it, or threads that disagree on it.
    Wgmma,
    /// A tensor map that is none, or that does not fit the instruction.
    TensorMap,
    /// `setmaxnreg` with a number that is not allowed, or more than the block has.
    Registers,
    /// Shared memory of a block of the cluster that has ended, or may have.
    DepartedBlock,
    /// Lanes of one warp, or threads of one block, at different places where they must meet.
    Divergence,
    /// A collective's mask that leaves out the executing lane, names absent lanes or differs between lanes.
    WrongMask,
    /// A thread that has returned is awaited by others.
    DepartedThread,
    /// Nobody can go on.
    Deadlock,
    /// The launch asks for more than an H100 or the kernel's own bounds allow, or its arguments do not fit.
    Launch,
    /// A register read that no write precedes.
    UndefinedRegister,
    /// More instructions than `Options::instruction_limit`.
    InstructionLimit,
    /// `trap` or a failed `assert`.
    Trap,
}

/// A thread at a place of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// What happened there: "write of 4 bytes".
    pub what: String,
    /// Source file, empty without `-lineinfo`.
    pub file: String,
    /// Source line.
    pub line: u32,
    /// Where the source line was inlined, as "file:line".
    pub inlined: Option<String>,
    /// Line of the PTX text.
    pub ptx_line: u32,
    /// The block.
    pub block: [u32; 3],
    /// The thread within its block.
    pub thread: [u32; 3],
}

/// A broken rule: the first that the launch met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Which rule.
    pub rule: Rule,
    /// The kernel.
    pub kernel: String,
    /// What is wrong, in a sentence.
    pub message: String,
    /// Who broke the rule.
    pub here: Option<Box<Place>>,
    /// The other party of a race.
    pub other: Option<Box<Place>>,
    /// The address, in the space that `message` names.
    pub address: Option<u64>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ([bx, by, bz], [x, y, z]) = (self.block, self.thread);
        write!(f, "{} by thread ({x},{y},{z}) of block ({bx},{by},{bz}) at ", self.what)?;
        if !self.file.is_empty() {
            write!(f, "{}:{}", self.file, self.line)?;
            if let Some(inlined) = &self.inlined {
                write!(f, " inlined at {inlined}")?;
            }
            write!(f, ", ")?;
        }
        write!(f, "PTX line {}", self.ptx_line)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} in kernel {}: {}", self.rule, self.kernel, self.message)?;
        if let Some(here) = &self.here {
            write!(f, "\n    {here}")?;
        }
        if let Some(other) = &self.other {
            write!(f, "\n    and {other}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Fault {}

/// A fault before its places have names: cheap to make deep inside the machine.
#[derive(Debug)]
pub(crate) struct RawFault {
    pub rule: Rule,
    pub message: String,
    pub address: Option<u64>,
    pub here: Option<RawPlace>,
    pub other: Option<RawPlace>,
}

#[derive(Clone, Debug)]
pub(crate) struct RawPlace {
    pub what: String,
    /// Index of the instruction.
    pub at: u32,
    /// Serial number of the block within the launch.
    pub block: u32,
    pub thread: u32,
}

impl RawFault {
    pub(crate) fn new(rule: Rule, message: impl Into<String>) -> Box<RawFault> {
        Box::new(RawFault { rule, message: message.into(), address: None, here: None, other: None })
    }

    pub(crate) fn at(mut self: Box<Self>, what: impl Into<String>, who: crate::clocks::Who) -> Box<RawFault> {
        self.here = Some(RawPlace { what: what.into(), at: who.at, block: who.block, thread: who.thread.into() });
        self
    }
}

/// `index` as coordinates of a box of this size.
pub(crate) fn coordinates(index: u32, size: [u32; 3]) -> [u32; 3] {
    [index % size[0], index / size[0] % size[1], index / size[0] / size[1]]
}

/// The short name of a source place.
pub(crate) fn source_line(
    kernel: &Kernel,
    files: &dyn Fn(u32) -> String,
    at: u32,
) -> (String, u32, Option<String>, u32) {
    let origin = kernel.origins.get(at as usize).copied().unwrap_or(Origin::default());
    let inlined = origin.loc.inlined.map(|(f, l)| format!("{}:{l}", files(f)));
    let file = if origin.loc.file == 0 { String::new() } else { files(origin.loc.file) };
    (file, origin.loc.line, inlined, origin.line)
}
