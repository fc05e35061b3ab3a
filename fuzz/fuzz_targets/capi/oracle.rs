//! What the reference computes of a call's inputs, and how far from it the results may be.
//!
//! The bounds find rows, columns and terms that are wrong or missing. How exact the kernels are is for the crate's tests to say: where a
//! variance or a pre-activation is so near zero that rounding decides, nothing is compared.

use crate::call::{Call, Operation, Role, Storage};
use crate::memory::load;
use sae_kernels::capi::*;
use sae_kernels::{
    ActivationLosses, ActivationStep, DecoderFree, DecoderFreeConfig, DecoderFreeStep, Losses, MatMut, MatRef,
    Objective, Reduction, Reference, Shape,
};

/// A call's inputs, widened, and what the sizes of rounding errors follow from.
struct Problem {
    shape: Shape,
    objective: Objective,
    rows: Vec<f64>,
    stride: usize,
    weight: Vec<f64>,
    bias: Vec<f64>,
    /// Rounding to the call's storage type.
    storage: f64,
    /// Errors of sums of what was rounded so.
    relative: f64,
}

/// What the reference computes, for all the arrays that there can be.
struct Truth {
    outputs: Vec<(Role, Vec<f64>)>,
    losses: Losses,
}

/// Compares all that a call has written; `before` is what it adds to.
///
/// # Safety
/// The call has succeeded, and its arrays are there.
pub unsafe fn compare(call: &Call, before: f64) {
    // SAFETY: the caller's promise.
    let problem = unsafe { Problem::of(call) };
    let given = call.operation == Operation::ActivationLosses;
    let Shape { rows: n, latents: h, .. } = problem.shape;
    let z = if given { Vec::new() } else { problem.preactivations() };
    let a: Vec<f64> = if given {
        (0..n).flat_map(|row| problem.rows[row * problem.stride..][..h].to_vec()).collect()
    } else {
        z.iter().map(|z| z.max(0.0)).collect()
    };
    let Some(bounds) = Bounds::of(&problem, &z, &a, given) else { return };
    // SAFETY: the caller's promise.
    let found = |role: Role| unsafe { load(call.pointer(role), role.number(call.storage), call.numbers(role)) };
    let close = |role: Role, truth: &[f64], bound: f64| {
        for (at, (found, truth)) in found(role).iter().zip(truth).enumerate() {
            assert!(
                (found - truth).abs() <= bound,
                "{role:?}[{at}] is {found:e}, by the reference {truth:e}; {bound:e} is allowed; {call:?} {:?}",
                problem.objective
            );
        }
    };
    if call.operation == Operation::Statistics {
        // SAFETY: as above; NULL is a shift of 0.
        let shift = if call.pointer(Role::Shift).is_null() { vec![0.0; h] } else { found(Role::Shift) };
        close(Role::Sums, &problem.sums(&a, &shift, before), bounds.sums);
        return;
    }
    let truth = if given { problem.activation_losses(call, &a) } else { problem.step(call, &a) };
    for (role, values) in &truth.outputs {
        let taken = call.operation.arguments().iter().any(|argument| argument.role == *role && argument.written);
        if !taken || call.pointer(*role).is_null() {
            continue;
        }
        let adds = call.operation == Operation::Backward && matches!(role, Role::GradWeight | Role::GradBias);
        let values: Vec<f64> = values.iter().map(|value| value + if adds { before } else { 0.0 }).collect();
        close(*role, &values, bounds.of_role(*role));
    }
    let Losses { lse, var, tc, wr, total } = truth.losses;
    let loss_bounds = bounds.losses(&problem.objective);
    for ((at, truth), (found, bound)) in
        [lse, var, tc, wr, total].iter().enumerate().zip(found(Role::Losses).iter().zip(loss_bounds))
    {
        assert!(
            (found - truth).abs() <= bound,
            "loss {at} is {found:e}, by the reference {truth:e}; {bound:e} is allowed; {call:?} {:?}",
            problem.objective
        );
    }
}

impl Problem {
    /// # Safety
    /// As [`compare`].
    unsafe fn of(call: &Call) -> Self {
        let take = |role: Role| {
            let taken = call.operation.arguments().iter().any(|argument| argument.role == role);
            if !taken || call.pointer(role).is_null() {
                return Vec::new();
            }
            // SAFETY: the caller's promise.
            unsafe { load(call.pointer(role), role.number(call.storage), call.numbers(role)) }
        };
        let objective = if call.operation == Operation::Statistics {
            Objective::default()
        } else {
            // SAFETY: the caller's promise.
            let given = unsafe { call.pointer(Role::Objective).cast::<saek_objective>().read_unaligned() };
            let saek_objective { lambda_lse, lambda_var, lambda_tc, lambda_wr, variance_eps, reduction } = given;
            let reduction = if reduction == SAEK_REDUCTION_SUM { Reduction::Sum } else { Reduction::Mean };
            Objective { lambda_lse, lambda_var, lambda_tc, lambda_wr, variance_eps, reduction, normalize_weight: true }
        };
        let (storage, relative) = match call.storage {
            Storage::F64 => (1e-12, 1e-9),
            Storage::F32 => (1e-6, 3e-4),
            Storage::F16 => (1e-3, 0.02),
            Storage::Bf16 => (8e-3, 0.1),
        };
        Self {
            shape: Shape { rows: call.n as usize, inputs: call.d as usize, latents: call.h as usize },
            objective,
            rows: take(Role::Rows),
            stride: call.stride as usize,
            weight: take(Role::Weight),
            bias: take(Role::Bias),
            storage,
            relative,
        }
    }

    fn preactivations(&self) -> Vec<f64> {
        let Shape { rows, inputs: d, latents } = self.shape;
        let one = |row: usize, j: usize| {
            let start = if d == 0 { 0 } else { row * self.stride };
            let (x, w) = (&self.rows[start..][..d], &self.weight[j * d..][..d]);
            self.bias[j] + x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>()
        };
        (0..rows * latents).map(|at| one(at / latents, at % latents)).collect()
    }

    fn step(&self, call: &Call, a: &[f64]) -> Truth {
        let mut truth = self.step_of(self.objective, a);
        // The losses are those of the whole batch, whoever adds the weight term's gradient.
        if call.operation == Operation::Backward && call.add_weight_term == 0 {
            truth.outputs = self.step_of(Objective { lambda_wr: 0.0, ..self.objective }, a).outputs;
        }
        truth
    }

    fn step_of(&self, objective: Objective, a: &[f64]) -> Truth {
        let Shape { rows: n, inputs: d, latents: h } = self.shape;
        let config = DecoderFreeConfig { objective, ..DecoderFreeConfig::new(self.shape) };
        let mut model = DecoderFree::new(Reference, config).expect("a small plan");
        let (mut grad_weight, mut grad_bias, mut grad_x) = (vec![0.0; h * d], vec![0.0; h], vec![0.0; n * d]);
        let (mut activations, mut row_loss) = (vec![0.0; n * h], vec![0.0; n]);
        model
            .step(DecoderFreeStep {
                x: MatRef::with_stride(&self.rows, n, d, self.stride).expect("rows that the call was given"),
                weight: MatRef::new(&self.weight, h, d).expect("a weight that the call was given"),
                bias: &self.bias,
                grad_weight: MatMut::new(&mut grad_weight, h, d).expect("its length"),
                grad_bias: &mut grad_bias,
                grad_x: Some(MatMut::new(&mut grad_x, n, d).expect("its length")),
                activations: Some(MatMut::new(&mut activations, n, h).expect("its length")),
                row_loss: Some(&mut row_loss),
            })
            .expect("the call has succeeded, too");
        assert!(activations.iter().zip(a).all(|(one, other)| (one - other).abs() < 1e-12), "the reference's encoder");
        let outputs = vec![
            (Role::GradWeight, grad_weight),
            (Role::GradBias, grad_bias),
            (Role::GradX, grad_x),
            (Role::Activations, activations),
            (Role::RowLoss, row_loss),
        ];
        Truth { outputs, losses: model.losses().expect("losses in the host's memory") }
    }

    fn activation_losses(&self, call: &Call, a: &[f64]) -> Truth {
        let Shape { rows: n, inputs: d, latents: h } = self.shape;
        let mut model = ActivationLosses::new(Reference, self.shape, self.objective).expect("a small plan");
        let (mut grad_activations, mut responsibilities) = (vec![0.0; n * h], vec![0.0; n * h]);
        let (mut grad_weight, mut row_loss) = (vec![0.0; h * d], vec![0.0; n]);
        let weight = !call.pointer(Role::Weight).is_null() || d == 0;
        model
            .step(ActivationStep {
                activations: MatRef::new(a, n, h).expect("its length"),
                weight: weight.then(|| MatRef::new(&self.weight, h, d).expect("a weight that the call was given")),
                grad_activations: Some(MatMut::new(&mut grad_activations, n, h).expect("its length")),
                grad_weight: weight.then(|| MatMut::new(&mut grad_weight, h, d).expect("its length")),
                responsibilities: Some(MatMut::new(&mut responsibilities, n, h).expect("its length")),
                row_loss: Some(&mut row_loss),
            })
            .expect("the call has succeeded, too");
        let outputs = vec![
            (Role::GradActivations, grad_activations),
            (Role::GradWeight, grad_weight),
            (Role::Responsibilities, responsibilities),
            (Role::RowLoss, row_loss),
        ];
        Truth { outputs, losses: model.losses().expect("losses in the host's memory") }
    }

    /// What the header says that statistics are, added to `before`.
    fn sums(&self, a: &[f64], shift: &[f64], before: f64) -> Vec<f64> {
        let Shape { rows, latents: h, .. } = self.shape;
        let centred = |row: usize, j: usize| a[row * h + j] - shift[j];
        let row_loss = |row: usize| -a[row * h..][..h].iter().map(|a| (-a).exp()).sum::<f64>().ln();
        let mut sums = vec![rows as f64, (0..rows).map(row_loss).sum()];
        sums.extend((0..h).map(|j| (0..rows).map(|row| centred(row, j)).sum::<f64>()));
        for i in 0..h {
            sums.extend((i..h).map(|j| (0..rows).map(|row| centred(row, i) * centred(row, j)).sum::<f64>()));
        }
        sums.iter().map(|sum| before + sum).collect()
    }
}

/// How large errors may be: `relative` of what the terms of each sum can be.
struct Bounds {
    relative: f64,
    n: f64,
    h: f64,
    /// Of activations, and of their errors.
    a: f64,
    a_error: f64,
    dz: f64,
    /// Of the weight term's gradient.
    redundancy: f64,
    /// Of a logarithm of a variance, and of a correlation.
    statistic: f64,
    x: f64,
    weight: f64,
    sums: f64,
}

fn most(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |most, value| most.max(value.abs()))
}

impl Bounds {
    /// `None` where results may be far from the reference and right.
    fn of(problem: &Problem, z: &[f64], a: &[f64], given: bool) -> Option<Self> {
        let Shape { rows: n, inputs: d, latents: h } = problem.shape;
        let Objective { lambda_lse, lambda_var, lambda_tc, lambda_wr, variance_eps, .. } = problem.objective;
        let relative = problem.relative;
        // Rounding must not decide which latents are active.
        if z.iter().any(|z| z.abs() < 1e-4) {
            return None;
        }
        let exact = given || relative < 1e-3;
        let least = if exact { 0.05 } else { 0.3 };
        let mut deviation = f64::INFINITY;
        if n > 1 && (lambda_var != 0.0 || lambda_tc != 0.0) {
            for j in 0..h {
                let column = || (0..n).map(|row| a[row * h + j]);
                let mean = column().sum::<f64>() / n as f64;
                let variance = column().map(|a| (a - mean).powi(2)).sum::<f64>() / (n as f64 - 1.0);
                if variance.sqrt() < least && column().any(|a| a != 0.0) {
                    return None;
                }
                if variance > 0.0 {
                    deviation = deviation.min(variance.sqrt());
                }
            }
        }
        let deviation = deviation.min(1.0);
        let norm = |j: usize| problem.weight[j * d..][..d].iter().map(|w| w * w).sum::<f64>().sqrt();
        let norms = if problem.weight.is_empty() { 1.0 } else { (0..h).map(norm).fold(1.0, f64::min) };
        if lambda_wr != 0.0 && norms < 0.05 {
            return None;
        }
        let (largest, x, weight) = (most(a), most(&problem.rows), most(&problem.weight));
        let a_error = problem.storage * (1.0 + largest) + 1e-5 * d as f64 * x * weight;
        let h = h as f64;
        let statistic = 1.0 + largest / deviation;
        let dz = lambda_lse.abs()
            + 2.0 * lambda_var.abs() * largest / (deviation * deviation + variance_eps)
            + 8.0 * lambda_tc.abs() * h * statistic / deviation;
        let most_shifted = largest + 2.0;
        Some(Self {
            relative,
            n: n as f64,
            h,
            a: largest,
            a_error,
            dz,
            redundancy: 16.0 * lambda_wr.abs() * (h + 1.0) / norms,
            statistic,
            // Given activations are no inputs of the weight.
            x: if given { 0.0 } else { x },
            weight,
            sums: relative * (1.0 + n as f64) * most_shifted * most_shifted + 1e-5 * n as f64 * h,
        })
    }

    fn of_role(&self, role: Role) -> f64 {
        let Self { relative, n, h, a_error, dz, redundancy, .. } = *self;
        match role {
            Role::Activations => a_error,
            Role::RowLoss => 2.0 * a_error + 1e-5 * (1.0 + h.ln()),
            Role::Responsibilities => 1e-4 + a_error,
            Role::GradActivations => relative * dz,
            Role::GradBias => relative * n * dz,
            Role::GradX => relative * h * dz * self.weight.max(1e-3),
            Role::GradWeight => relative * (n * dz * self.x + redundancy),
            _ => 0.0,
        }
    }

    fn losses(&self, objective: &Objective) -> [f64; 5] {
        let Self { relative, n, h, a, a_error, statistic, .. } = *self;
        let Objective { lambda_lse, lambda_var, lambda_tc, lambda_wr, .. } = *objective;
        let lse = (n + 1.0) * (2.0 * a_error + 1e-5 * (1.0 + a + h.ln()));
        let var = 4.0 * relative * h * statistic;
        let (tc, wr) = (4.0 * relative * h * h * statistic, 4.0 * relative * (h * h + 1.0));
        let total = lambda_lse.abs() * lse + lambda_var.abs() * var + lambda_tc.abs() * tc + lambda_wr.abs() * wr;
        [lse, var, tc, wr, total]
    }
}
