//! What the fuzzer chooses: a call that is right, and what is then spoilt.

use crate::call::{Call, Operation, ROLES, Role, Storage};
use crate::memory::{Memory, store};
use arbitrary::Arbitrary;
use sae_kernels::capi::*;
use std::ptr::{null_mut, without_provenance_mut};

#[derive(Debug, Clone, Arbitrary)]
pub struct Plan {
    pub operation: Operation,
    storage: Storage,
    extents: [u8; 3],
    gap: u8,
    lambdas: [u8; 4],
    eps: u8,
    mean: bool,
    /// `None`: in [-1, 1).
    numbers: Option<Numbers>,
    seed: u16,
    /// A bit for each optional array, in the function's order.
    left_out: u8,
    add_weight_term: bool,
    layout: Layout,
    sums: Sums,
    spoilt: [Option<Spoilt>; 2],
}

/// Numbers that are worth trying, though their results cannot be compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Arbitrary)]
enum Numbers {
    Zero,
    /// The same in all rows.
    Constant,
    Huge,
    Subnormal,
    /// NaN and infinities among others.
    NotFinite,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Arbitrary)]
enum Layout {
    /// An allocation for each array.
    Apart,
    /// The same, and aligned to an element but to nothing more.
    BarelyAligned,
    /// One array after the other, in one allocation.
    Packed,
}

/// What the second phase is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Arbitrary)]
pub enum Sums {
    /// The sums of these rows.
    Batch,
    /// The sums of these rows and of as many that are the same.
    Twice,
    Zero,
    /// Anything, with a count that may be right.
    Anything(i16),
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Spoilt {
    Null(u8),
    Misaligned(u8, u8),
    /// An array begins so many bytes behind the beginning of another.
    Onto(u8, u8, i8),
    /// An array ends a few bytes, of an element or two, behind the beginning of another.
    Before(u8, u8, i8),
    /// An array lies anywhere.
    Anywhere(u8, i64),
    Extent(u8, Size),
    Extents([Size; 3]),
    Lambda(u8, Weird),
    Reduction(i8),
    /// The count of the sums.
    Count(Weird),
    /// The count of the sums, about the rows of the call.
    CountNear(i8),
    NoContext,
    MisalignedContext(u8),
}

#[derive(Debug, Clone, Copy, Arbitrary)]
pub enum Size {
    Small(i8),
    /// A power of two, and a little.
    Near(u8, i8),
    Any(i64),
}
impl Size {
    pub fn value(self) -> i64 {
        match self {
            Self::Small(value) => i64::from(value),
            Self::Near(power, more) => (1i64 << (power % 64)).wrapping_add(i64::from(more)),
            Self::Any(value) => value,
        }
    }
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Weird {
    NaN,
    Infinity(bool),
    Zero(bool),
    Fraction(i16),
    Any(f64),
}
impl Weird {
    fn value(self) -> f64 {
        match self {
            Self::NaN => f64::NAN,
            Self::Infinity(negative) => f64::INFINITY * if negative { -1.0 } else { 1.0 },
            Self::Zero(negative) => 0.0 * if negative { -1.0 } else { 1.0 },
            Self::Fraction(quarters) => f64::from(quarters) / 4.0,
            Self::Any(value) => value,
        }
    }
}

/// A call and the arrays that it was made with.
pub struct Built {
    pub call: Call,
    pub memory: Memory,
    /// What its results can be checked against: inputs are moderate, and arrays where they were.
    pub comparable: bool,
}

/// Extents around the edges of a vector and of a tile, and a few that are longer.
fn extent(byte: u8) -> i64 {
    i64::from(if byte < 248 { byte % 36 } else { byte - 184 })
}

/// Random bits, the same for the same seed.
struct Random(u64);
impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }
    /// In [-1, 1).
    fn uniform(&mut self) -> f64 {
        self.next() as f64 / 2f64.powi(30) - 1.0
    }
}

impl Plan {
    fn objective(&self) -> saek_objective {
        const LAMBDAS: [f64; 8] = [1.0, 0.0, 0.75, 0.25, -0.5, 2.0, 1e-3, 0.0];
        const EPS: [f64; 4] = [1e-6, 1e-4, 0.01, 1.0];
        let [lambda_lse, lambda_var, lambda_tc, lambda_wr] = self.lambdas.map(|at| LAMBDAS[usize::from(at % 8)]);
        let reduction = if self.mean { SAEK_REDUCTION_MEAN } else { SAEK_REDUCTION_SUM };
        let variance_eps = EPS[usize::from(self.eps % 4)];
        saek_objective { lambda_lse, lambda_var, lambda_tc, lambda_wr, variance_eps, reduction }
    }

    /// The call and its arrays; the sums of a second phase are computed with `other`, a context.
    pub fn build(&self, context: *mut saek_context, other: *mut saek_context) -> Built {
        let phase = matches!(self.operation, Operation::Statistics | Operation::Backward);
        let storage = if phase && self.storage == Storage::F64 { Storage::F32 } else { self.storage };
        let [n, d, h] = self.extents.map(extent);
        let h = h.max(1);
        let mut call = Call {
            operation: self.operation,
            storage,
            context,
            n,
            d,
            h,
            stride: 0,
            add_weight_term: i32::from(self.add_weight_term),
            pointers: [null_mut(); ROLES],
        };
        call.stride = call.cols() + i64::from(self.gap % 8);
        let mut memory = Memory::default();
        self.place(&mut call, &mut memory);
        self.fill(&call);
        if self.operation == Operation::Backward {
            self.fill_sums(&call, other);
        }
        let spoilt: Vec<Spoilt> = self.spoilt.iter().flatten().copied().collect();
        for spoilt in &spoilt {
            self.spoil(&mut call, *spoilt);
        }
        let batch = self.operation != Operation::Backward || self.sums == Sums::Batch;
        let comparable = self.numbers.is_none() && spoilt.is_empty() && batch;
        Built { call, memory, comparable }
    }

    /// Arrays for all arguments but those that are left out.
    fn place(&self, call: &mut Call, memory: &mut Memory) {
        let mut left_out = self.left_out;
        let mut wanted = Vec::new();
        for argument in self.operation.arguments() {
            let bit = left_out & 1 == 1;
            if argument.optional {
                left_out >>= 1;
            }
            if !(argument.optional && bit) {
                wanted.push((argument.role, call.bytes(argument.role) as usize));
            }
        }
        if self.layout == Layout::Packed {
            // What is aligned to more comes first, so that nothing lies between.
            wanted.sort_by_key(|(role, _)| std::cmp::Reverse(role.element_bytes(call.storage).min(8)));
            let base = memory.take(0, wanted.iter().map(|(_, bytes)| bytes).sum());
            let mut at = 0;
            for (role, bytes) in wanted {
                call.pointers[role as usize] = base.wrapping_add(at);
                at += bytes;
            }
            return;
        }
        for (role, bytes) in wanted {
            let before = if self.layout == Layout::BarelyAligned { role.element_bytes(call.storage).min(8) } else { 0 };
            call.pointers[role as usize] = memory.take(before, bytes);
        }
    }

    fn fill(&self, call: &Call) {
        let mut random = Random(u64::from(self.seed));
        for argument in self.operation.arguments() {
            let (role, pointer) = (argument.role, call.pointer(argument.role));
            let (number, len) = (role.number(call.storage), call.len(role) as usize);
            if pointer.is_null() {
                continue;
            }
            let values: Vec<f64> = match role {
                Role::Objective => {
                    // SAFETY: `place` has made room for one.
                    unsafe { pointer.cast::<saek_objective>().write_unaligned(self.objective()) };
                    continue;
                }
                Role::Losses => vec![-1.0, -2.0, -3.0, -4.0, -5.0],
                _ if argument.written => vec![0.5; len],
                _ => (0..len).map(|at| self.number(at, call, role, &mut random)).collect(),
            };
            // SAFETY: `place` has made room for them.
            unsafe { store(pointer, number, values.into_iter()) };
        }
    }

    fn number(&self, at: usize, call: &Call, role: Role, random: &mut Random) -> f64 {
        let uniform = random.uniform();
        match self.numbers {
            None => uniform,
            Some(Numbers::Zero) => 0.0,
            Some(Numbers::Constant) if role == Role::Rows => (at % call.stride.max(1) as usize) as f64 / 8.0,
            Some(Numbers::Constant) => uniform,
            Some(Numbers::Huge) => uniform * 1e30,
            Some(Numbers::Subnormal) => uniform * 1e-40,
            Some(Numbers::NotFinite) => match random.next() % 16 {
                0 => f64::NAN,
                1 => f64::INFINITY,
                2 => f64::NEG_INFINITY,
                _ => uniform,
            },
        }
    }

    fn fill_sums(&self, call: &Call, context: *mut saek_context) {
        let (len, to) = (call.len(Role::Sums) as usize, call.pointer(Role::Sums));
        let mut random = Random(u64::from(self.seed) + 1);
        let values: Vec<f64> = match self.sums {
            Sums::Anything(count) => {
                (0..len).map(|at| if at == 0 { f64::from(count) } else { 4.0 * random.uniform() }).collect()
            }
            _ => vec![0.0; len],
        };
        // SAFETY: `place` has made room for them.
        unsafe { store(to, Storage::F64, values.into_iter()) };
        let phase = Call { operation: Operation::Statistics, context, ..*call };
        let times = match self.sums {
            Sums::Batch => 1,
            Sums::Twice => 2,
            Sums::Zero | Sums::Anything(_) => 0,
        };
        for _ in 0..times {
            // SAFETY: nothing is spoilt yet.
            assert_eq!(unsafe { phase.run() }, SAEK_OK, "the first phase of {call:?}");
        }
    }

    fn spoil(&self, call: &mut Call, spoilt: Spoilt) {
        let arguments = self.operation.arguments();
        let role = |at: u8| arguments[usize::from(at) % arguments.len()].role;
        let before = *call;
        let mut put = |at: u8, pointer: *mut u8| call.pointers[role(at) as usize] = pointer;
        match spoilt {
            Spoilt::Null(at) => put(at, null_mut()),
            Spoilt::Misaligned(at, by) => {
                put(at, before.pointer(role(at)).wrapping_add(1 + usize::from(by) % 7));
            }
            Spoilt::Onto(at, other, by) => {
                put(at, before.pointer(role(other)).wrapping_offset(8 * isize::from(by % 8)));
            }
            Spoilt::Before(at, other, by) => {
                let negative = [before.n, before.d, before.h, before.stride].into_iter().any(|extent| extent < 0);
                let bytes = if negative { 0 } else { before.bytes(role(at)) };
                let end = before.pointer(role(other)).wrapping_offset([0, 2, 4, 8][usize::from(by.unsigned_abs() % 4)]);
                put(at, end.wrapping_sub(bytes as usize));
            }
            Spoilt::Anywhere(at, address) => put(at, without_provenance_mut(address as usize)),
            Spoilt::Extent(at, size) => {
                *[&mut call.n, &mut call.d, &mut call.h, &mut call.stride][usize::from(at) % 4] = size.value();
            }
            Spoilt::Extents(sizes) => {
                [call.n, call.d, call.h] = sizes.map(Size::value);
                call.stride = call.cols();
            }
            Spoilt::Lambda(at, weird) => self.spoil_objective(call, |objective| {
                let saek_objective { lambda_lse, lambda_var, lambda_tc, lambda_wr, variance_eps, .. } = objective;
                let fields = [lambda_lse, lambda_var, lambda_tc, lambda_wr, variance_eps];
                *fields.into_iter().nth(usize::from(at) % 5).expect("one of five") = weird.value();
            }),
            Spoilt::Reduction(value) => {
                self.spoil_objective(call, |objective| objective.reduction = i32::from(value % 4))
            }
            Spoilt::Count(weird) => self.spoil_count(call, weird.value()),
            Spoilt::CountNear(more) => self.spoil_count(call, (before.n as f64) + f64::from(more % 4)),
            Spoilt::NoContext => call.context = null_mut(),
            // Twice might be aligned again, and no context.
            Spoilt::MisalignedContext(by) if call.context.is_aligned() => {
                call.context = call.context.wrapping_byte_add(1 + usize::from(by) % 7);
            }
            Spoilt::MisalignedContext(_) => {}
        }
    }

    fn spoil_objective(&self, call: &Call, change: impl FnOnce(&mut saek_objective)) {
        if self.operation != Operation::Statistics && self.only_numbers() {
            let mut objective = self.objective();
            change(&mut objective);
            // SAFETY: `place` has made room for one.
            unsafe { call.pointer(Role::Objective).cast::<saek_objective>().write_unaligned(objective) };
        }
    }

    fn spoil_count(&self, call: &Call, count: f64) {
        if self.operation == Operation::Backward && self.only_numbers() {
            // SAFETY: `place` has made room for it.
            unsafe { store(call.pointer(Role::Sums), Storage::F64, [count].into_iter()) };
        }
    }

    /// Whether all pointers are still what `place` made them.
    fn only_numbers(&self) -> bool {
        use Spoilt::*;
        self.spoilt
            .iter()
            .flatten()
            .all(|spoilt| !matches!(spoilt, Null(_) | Misaligned(..) | Onto(..) | Before(..) | Anywhere(..)))
    }
}
