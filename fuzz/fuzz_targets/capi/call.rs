//! A call's arguments as plain data: which arrays each function takes, how long they are, and the call itself.

use arbitrary::Arbitrary;
use sae_kernels::capi::*;

/// What a function does; there is one for each [`Storage`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Arbitrary)]
pub enum Operation {
    Step,
    Forward,
    Statistics,
    Backward,
    ActivationLosses,
}

/// What a function's name ends in, and the types of numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Arbitrary)]
pub enum Storage {
    F32,
    F64,
    Bf16,
    F16,
}

/// What a pointer is to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Objective,
    /// x, or given activations: the matrix with a stride.
    Rows,
    Weight,
    Bias,
    Shift,
    Sums,
    Activations,
    RowLoss,
    GradWeight,
    GradBias,
    GradX,
    GradActivations,
    Responsibilities,
    Losses,
}
use Role::*;
pub const ROLES: usize = Losses as usize + 1;

/// What a function takes: a role, whether it is written, and whether NULL leaves it out.
#[derive(Debug, Clone, Copy)]
pub struct Argument {
    pub role: Role,
    pub written: bool,
    pub optional: bool,
}

const fn read(role: Role) -> Argument {
    Argument { role, written: false, optional: false }
}
const fn write(role: Role) -> Argument {
    Argument { role, written: true, optional: false }
}
const fn optional(argument: Argument) -> Argument {
    Argument { optional: true, ..argument }
}

impl Operation {
    pub fn arguments(self) -> &'static [Argument] {
        match self {
            Self::Step => {
                &const {
                    [
                        read(Objective),
                        read(Rows),
                        read(Weight),
                        read(Bias),
                        optional(write(Activations)),
                        optional(write(RowLoss)),
                        write(GradWeight),
                        write(GradBias),
                        optional(write(GradX)),
                        write(Losses),
                    ]
                }
            }
            Self::Forward => {
                &const {
                    [
                        read(Objective),
                        read(Rows),
                        read(Weight),
                        read(Bias),
                        optional(write(Activations)),
                        optional(write(RowLoss)),
                        write(Losses),
                    ]
                }
            }
            Self::Statistics => &const { [read(Rows), read(Weight), read(Bias), optional(read(Shift)), write(Sums)] },
            Self::Backward => {
                &const {
                    [
                        read(Objective),
                        read(Rows),
                        read(Weight),
                        read(Bias),
                        optional(read(Shift)),
                        read(Sums),
                        write(GradWeight),
                        write(GradBias),
                        optional(write(GradX)),
                        write(Losses),
                    ]
                }
            }
            Self::ActivationLosses => {
                &const {
                    [
                        read(Objective),
                        read(Rows),
                        optional(read(Weight)),
                        optional(write(GradActivations)),
                        optional(write(GradWeight)),
                        optional(write(Responsibilities)),
                        optional(write(RowLoss)),
                        write(Losses),
                    ]
                }
            }
        }
    }
}

impl Storage {
    pub fn bytes(self) -> usize {
        match self {
            Self::F64 => 8,
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }
}

impl Role {
    /// The type of the numbers; a structure's, of its doubles.
    pub fn number(self, storage: Storage) -> Storage {
        match self {
            Objective | Losses | Sums => Storage::F64,
            Rows | Weight | Activations | GradActivations => storage,
            _ if storage == Storage::F64 => Storage::F64,
            _ => Storage::F32,
        }
    }
    pub fn element_bytes(self, storage: Storage) -> usize {
        match self {
            Objective => size_of::<saek_objective>(),
            Losses => size_of::<saek_losses>(),
            _ => self.number(storage).bytes(),
        }
    }
}

#[derive(Debug, Clone, Copy)]
pub struct Call {
    pub operation: Operation,
    pub storage: Storage,
    pub context: *mut saek_context,
    pub n: i64,
    pub d: i64,
    pub h: i64,
    pub stride: i64,
    pub add_weight_term: i32,
    /// By [`Role`].
    pub pointers: [*mut u8; ROLES],
}

impl Call {
    pub fn pointer(&self, role: Role) -> *mut u8 {
        self.pointers[role as usize]
    }

    /// Columns of the matrix with a stride.
    pub fn cols(&self) -> i64 {
        if self.operation == Operation::ActivationLosses { self.h } else { self.d }
    }

    /// Elements that the extents say; they are not negative.
    pub fn len(&self, role: Role) -> u128 {
        let [n, d, h, stride, cols] = [self.n, self.d, self.h, self.stride, self.cols()].map(|extent| extent as u128);
        match role {
            Objective | Losses => 1,
            Rows if n == 0 || cols == 0 => 0,
            Rows => (n - 1) * stride + cols,
            Weight | GradWeight => h * d,
            Bias | Shift | GradBias => h,
            Sums => 2 + h + h * (h + 1) / 2,
            Activations | GradActivations | Responsibilities => n * h,
            RowLoss => n,
            GradX => n * d,
        }
    }
    /// Numbers in an array that is there; the losses are five.
    pub fn numbers(&self, role: Role) -> usize {
        if role == Losses { 5 } else { self.len(role) as usize }
    }
    pub fn bytes(&self, role: Role) -> u128 {
        self.len(role).saturating_mul(role.element_bytes(self.storage) as u128)
    }

    /// # Safety
    /// What the header says of pointers; what it says is refused need not hold.
    pub unsafe fn run(&self) -> i32 {
        use Operation as O;
        use Storage::*;
        let Self { context, n, d, h, stride, add_weight_term, .. } = *self;
        let at = |role: Role| self.pointer(role);
        macro_rules! step {
            ($function:ident) => {
                $function(
                    context,
                    at(Objective).cast(),
                    n,
                    d,
                    h,
                    at(Rows).cast(),
                    stride,
                    at(Weight).cast(),
                    at(Bias).cast(),
                    at(Activations).cast(),
                    at(RowLoss).cast(),
                    at(GradWeight).cast(),
                    at(GradBias).cast(),
                    at(GradX).cast(),
                    at(Losses).cast(),
                )
            };
        }
        macro_rules! forward {
            ($function:ident) => {
                $function(
                    context,
                    at(Objective).cast(),
                    n,
                    d,
                    h,
                    at(Rows).cast(),
                    stride,
                    at(Weight).cast(),
                    at(Bias).cast(),
                    at(Activations).cast(),
                    at(RowLoss).cast(),
                    at(Losses).cast(),
                )
            };
        }
        macro_rules! statistics {
            ($function:ident) => {
                $function(
                    context,
                    n,
                    d,
                    h,
                    at(Rows).cast(),
                    stride,
                    at(Weight).cast(),
                    at(Bias).cast(),
                    at(Shift).cast(),
                    at(Sums).cast(),
                )
            };
        }
        macro_rules! backward {
            ($function:ident) => {
                $function(
                    context,
                    at(Objective).cast(),
                    n,
                    d,
                    h,
                    at(Rows).cast(),
                    stride,
                    at(Weight).cast(),
                    at(Bias).cast(),
                    at(Shift).cast(),
                    at(Sums).cast(),
                    add_weight_term,
                    at(GradWeight).cast(),
                    at(GradBias).cast(),
                    at(GradX).cast(),
                    at(Losses).cast(),
                )
            };
        }
        macro_rules! activation_losses {
            ($function:ident) => {
                $function(
                    context,
                    at(Objective).cast(),
                    n,
                    d,
                    h,
                    at(Rows).cast(),
                    stride,
                    at(Weight).cast(),
                    at(GradActivations).cast(),
                    at(GradWeight).cast(),
                    at(Responsibilities).cast(),
                    at(RowLoss).cast(),
                    at(Losses).cast(),
                )
            };
        }
        // SAFETY: the caller's promise.
        unsafe {
            match (self.operation, self.storage) {
                (O::Step, F32) => step!(saek_decoder_free_step_f32),
                (O::Step, F64) => step!(saek_decoder_free_step_f64),
                (O::Step, Bf16) => step!(saek_decoder_free_step_bf16),
                (O::Step, F16) => step!(saek_decoder_free_step_f16),
                (O::Forward, F32) => forward!(saek_decoder_free_forward_f32),
                (O::Forward, F64) => forward!(saek_decoder_free_forward_f64),
                (O::Forward, Bf16) => forward!(saek_decoder_free_forward_bf16),
                (O::Forward, F16) => forward!(saek_decoder_free_forward_f16),
                (O::Statistics, F32) => statistics!(saek_decoder_free_statistics_f32),
                (O::Statistics, Bf16) => statistics!(saek_decoder_free_statistics_bf16),
                (O::Statistics, F16) => statistics!(saek_decoder_free_statistics_f16),
                (O::Backward, F32) => backward!(saek_decoder_free_backward_f32),
                (O::Backward, Bf16) => backward!(saek_decoder_free_backward_bf16),
                (O::Backward, F16) => backward!(saek_decoder_free_backward_f16),
                (O::ActivationLosses, F32) => activation_losses!(saek_activation_losses_f32),
                (O::ActivationLosses, F64) => activation_losses!(saek_activation_losses_f64),
                (O::ActivationLosses, Bf16) => activation_losses!(saek_activation_losses_bf16),
                (O::ActivationLosses, F16) => activation_losses!(saek_activation_losses_f16),
                (O::Statistics | O::Backward, F64) => unreachable!("there are no phases in double"),
            }
        }
    }
}
