//! A kernel after decoding: what the interpreter runs.
//!
//! Every operand is a slot of the thread's register file. Immediates, addresses of variables and special registers
//! have slots too, filled in before a thread starts, so that an instruction never asks what kind of operand it has.
//! Arithmetic is a function pointer chosen at load time: the interpreter has one arm for all two-operand arithmetic.

use crate::{
    arith::{Binary, Convert, Ternary, Test, Unary},
    matrix::Shape,
    parse::{Loc, Space},
};

/// A slot of the register file.
pub(crate) type Slot = u16;

/// The special registers, in the order of their slots.
pub(crate) const SPECIAL: [&str; 41] = [
    "%tid.x",
    "%tid.y",
    "%tid.z",
    "%ntid.x",
    "%ntid.y",
    "%ntid.z",
    "%ctaid.x",
    "%ctaid.y",
    "%ctaid.z",
    "%nctaid.x",
    "%nctaid.y",
    "%nctaid.z",
    "%laneid",
    "%warpid",
    "%nwarpid",
    "%smid",
    "%nsmid",
    "%lanemask_eq",
    "%lanemask_lt",
    "%lanemask_le",
    "%lanemask_gt",
    "%lanemask_ge",
    "%dynamic_smem_size",
    "%total_smem_size",
    "%gridid",
    "%clusterid.x",
    "%clusterid.y",
    "%clusterid.z",
    "%nclusterid.x",
    "%nclusterid.y",
    "%nclusterid.z",
    "%cluster_ctaid.x",
    "%cluster_ctaid.y",
    "%cluster_ctaid.z",
    "%cluster_nctaid.x",
    "%cluster_nctaid.y",
    "%cluster_nctaid.z",
    "%cluster_ctarank",
    "%cluster_nctarank",
    "%is_explicit_cluster",
    "%tid",
];

/// A slot nobody reads: the destination `_`.
pub(crate) const SINK: Slot = SPECIAL.len() as Slot;
/// A slot that always holds 1: the guard of an unguarded instruction.
pub(crate) const TRUE: Slot = SINK + 1;
/// The first slot that a kernel gives out.
pub(crate) const FIRST_FREE: Slot = TRUE + 1;

/// What fills a constant slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Constant {
    Value(u64),
    /// Address of a module variable in global or constant memory.
    Global(u32),
    /// Address of the dynamic shared memory.
    DynamicShared,
}

/// A load or store of 1 to 4 elements.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Access {
    pub space: Space,
    /// Bytes of one element.
    pub bytes: u8,
    pub count: u8,
    /// For loads: the width in bits to which an element is sign-extended; 0 extends with zeros.
    pub extend: u8,
    /// volatile, relaxed, acquire or release: takes part in synchronisation and never races with its like.
    pub strong: bool,
    pub acquire: bool,
    pub release: bool,
    pub base: Slot,
    pub offset: i32,
    pub regs: [Slot; 4],
}

/// A read-modify-write.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Atomic {
    pub space: Space,
    pub bytes: u8,
    pub acquire: bool,
    pub release: bool,
    pub d: Slot,
    pub base: Slot,
    pub offset: i32,
    pub b: Slot,
    /// The new value of compare-and-swap.
    pub c: Slot,
    /// (old, b, c) → new
    pub f: Ternary,
}

/// How `shfl.sync` chooses the source lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shuffle {
    Up,
    Down,
    Butterfly,
    Index,
}

/// What `vote.sync` answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vote {
    All,
    Any,
    Uniform,
    Ballot,
}

/// Fragments of one matrix product.
#[derive(Clone, Debug)]
pub(crate) struct Mma {
    pub shape: Shape,
    pub d: Vec<Slot>,
    pub a: Vec<Slot>,
    pub b: Vec<Slot>,
    pub c: Vec<Slot>,
}

/// An instruction that lanes of a warp execute together.
#[derive(Clone, Debug)]
pub(crate) enum Collective {
    Shuffle { mode: Shuffle, d: Slot, p: Slot, a: Slot, b: Slot, c: Slot },
    Vote { mode: Vote, negate: bool, d: Slot, a: Slot },
    Redux { f: Binary, d: Slot, a: Slot },
    Match { all: bool, d: Slot, p: Slot, a: Slot },
    WarpSync,
    Elect { d: Slot, p: Slot },
    LoadMatrix { count: u8, transposed: bool, base: Slot, offset: i32, d: [Slot; 4] },
    Mma(Mma),
}

/// A collective and who must meet: the slot of the mask, or the whole warp.
#[derive(Clone, Debug)]
pub(crate) struct Meeting {
    pub name: String,
    pub mask: Option<Slot>,
    pub what: Collective,
}

/// What the threads of a block bring to a barrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reduction {
    None,
    Count,
    And,
    Or,
}

/// A barrier of the block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BarrierOp {
    pub id: Slot,
    /// Number of threads, or SINK for the whole block.
    pub count: Slot,
    pub wait: bool,
    /// All threads of a warp must execute this very instruction.
    pub aligned: bool,
    pub reduction: Reduction,
    pub d: Slot,
    pub p: Slot,
    pub negate: bool,
}

/// What the machine does for a thread: it concerns asynchronous work, a warpgroup or other blocks of the cluster.
///
/// `a` in the comments is the list of operands that are read.
#[derive(Clone, Debug)]
pub(crate) enum MachineKind {
    /// a: address, count
    MbarrierInit,
    /// a: address
    MbarrierInvalidate,
    /// a: address, then `count` and `bytes` as far as given; d: the state, if asked for
    Arrive {
        count: bool,
        bytes: bool,
        release: bool,
        remote: bool,
    },
    /// a: address, bytes
    ExpectBytes {
        remote: bool,
    },
    /// a: address, parity or state; d: whether the phase is over. `suspend` may wait for it.
    Wait {
        parity: bool,
        suspend: bool,
        acquire: bool,
    },
    /// a: shared address, tensor map, mbarrier, coordinates, the mask of blocks if multicast
    TensorLoad {
        rank: u8,
        multicast: bool,
    },
    /// a: tensor map, shared address, coordinates
    TensorStore {
        rank: u8,
    },
    /// a: shared address, global address, bytes, mbarrier, the mask of blocks if multicast
    BulkLoad {
        multicast: bool,
    },
    /// a: global address, shared address, bytes
    BulkStore,
    /// a: shared address in the cluster, own shared address, bytes, mbarrier
    BulkToPeer,
    BulkCommit,
    /// `read` waits until shared memory has been read only.
    BulkWait {
        pending: u32,
        read: bool,
    },
    ProxyFence,
    MbarrierInitFence,
    /// d: accumulators; a: descriptor or four registers of A, descriptor of B, whether to add to the accumulators
    Wgmma(crate::wgmma::Shape),
    WgmmaFence,
    WgmmaCommit,
    WgmmaWait {
        pending: u32,
    },
    SetMaxRegisters {
        increase: bool,
        count: u32,
    },
    ClusterArrive {
        release: bool,
    },
    ClusterWait {
        acquire: bool,
    },
}

/// An operation of the machine and its operands: slots to write, and slots to read with what is added to each.
#[derive(Clone, Debug)]
pub(crate) struct MachineOp {
    pub name: String,
    pub kind: MachineKind,
    pub d: Vec<Slot>,
    pub a: Vec<(Slot, i32)>,
}

impl MachineOp {
    /// The slot that says whether a wgmma adds to its accumulators.
    pub(crate) fn adds(&self) -> Option<Slot> {
        if let MachineKind::Wgmma(_) = self.kind { self.a.last().map(|&(slot, _)| slot) } else { None }
    }

    /// The registers that a wgmma has in hand until it is waited for: accumulators, and A if it comes from registers.
    pub(crate) fn in_hand(&self) -> impl Iterator<Item = Slot> {
        let (d, a) = match self.kind {
            MachineKind::Wgmma(shape) => (&self.d[..], if shape.from_registers { &self.a[..4] } else { &[] }),
            _ => (&[][..], &[][..]),
        };
        d.iter().copied().chain(a.iter().map(|&(slot, _)| slot))
    }
}

/// One operation.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    Move {
        d: Slot,
        a: Slot,
    },
    Unary {
        f: Unary,
        d: Slot,
        a: Slot,
    },
    Binary {
        f: Binary,
        d: Slot,
        a: Slot,
        b: Slot,
    },
    Ternary {
        f: Ternary,
        d: Slot,
        a: Slot,
        b: Slot,
        c: Slot,
    },
    Convert {
        d: Slot,
        a: Slot,
        how: Convert,
    },
    Lop3 {
        d: Slot,
        a: Slot,
        b: Slot,
        c: Slot,
        table: u8,
        bits64: bool,
    },
    BitInsert {
        d: Slot,
        a: Slot,
        b: Slot,
        c: Slot,
        e: Slot,
        bits64: bool,
    },
    Pack {
        d: Slot,
        bits: u8,
        count: u8,
        a: [Slot; 4],
    },
    Unpack {
        a: Slot,
        bits: u8,
        count: u8,
        d: [Slot; 4],
    },
    Compare {
        f: Test,
        d: Slot,
        a: Slot,
        b: Slot,
    },
    /// `setp.lt.and p|q, a, b, c`: p = (a < b) & c, q = !(a < b) & c
    CompareWith {
        f: Test,
        combine: Binary,
        d: Slot,
        q: Slot,
        a: Slot,
        b: Slot,
        c: Slot,
    },
    AddCarry {
        d: Slot,
        a: Slot,
        b: Slot,
        carry: Slot,
        bits64: bool,
        subtract: bool,
        take: bool,
        give: bool,
    },
    Load(Access),
    Store(Access),
    Atomic(Box<Atomic>),
    ActiveMask {
        d: Slot,
    },
    Clock {
        d: Slot,
        mask: u64,
    },
    Meet(Box<Meeting>),
    Machine(Box<MachineOp>),
    Barrier(Box<BarrierOp>),
    /// `destination` in shared memory, `source` in global memory.
    CopyAsync {
        destination: Slot,
        to: i32,
        source: Slot,
        from: i32,
        bytes: u8,
        live: Slot,
        ignore: Slot,
    },
    CommitGroup,
    WaitGroup {
        pending: u32,
    },
    WaitAll,
    Fence {
        block_only: bool,
    },
    Branch {
        target: u32,
    },
    BranchIndexed {
        index: Slot,
        targets: Box<[u32]>,
    },
    Call {
        target: u32,
    },
    Return,
    Exit,
    Trap,
    Nothing,
    /// Fault if the slot has not been written: inserted where an undefined read cannot be excluded.
    NeedDefined {
        slot: Slot,
        bit: u16,
        name: u32,
    },
    /// Remember that a slot has been written.
    SetDefined {
        bit: u16,
    },
    /// `__assertfail`
    AssertFailed,
}

/// An operation under its guard.
#[derive(Clone, Debug)]
pub(crate) struct Instruction {
    pub op: Op,
    pub guard: Slot,
    pub negated: bool,
}

/// Where an instruction came from.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Origin {
    pub loc: Loc,
    /// Line of the PTX text.
    pub line: u32,
}

/// A parameter of a kernel.
#[derive(Clone, Debug)]
pub(crate) struct Parameter {
    pub offset: usize,
    pub size: usize,
}

/// A kernel ready to run.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    pub name: String,
    pub code: Vec<Instruction>,
    pub origins: Vec<Origin>,
    /// What each instruction has to do with the registers of wgmma.
    pub watched: Vec<crate::wgmma::Watch>,
    pub slots: usize,
    pub constants: Vec<(Slot, Constant)>,
    pub parameters: Vec<Parameter>,
    pub parameter_bytes: usize,
    /// Parameters of called functions live behind the kernel's own.
    pub call_bytes: usize,
    pub static_shared: u32,
    pub dynamic_align: u32,
    pub local_bytes: usize,
    /// How many slots are tracked at run time because a path may read them undefined.
    pub tracked: usize,
    pub max_threads: Option<u32>,
    /// `.minnctapersm`
    pub min_blocks: Option<u32>,
    /// `.maxnreg`
    pub max_registers: Option<u32>,
    /// `.reqnctapercluster`
    pub cluster: Option<[u32; 3]>,
    /// Names for reports of undefined reads.
    pub register_names: Vec<(Slot, String)>,
}
