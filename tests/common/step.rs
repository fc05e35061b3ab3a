//! A whole step of the decoder-free model as plain data, on any backend, in one call or in two phases.

use super::ops::{self, Backward, Correlation, Covariance, Finish, StatisticsPart};
use super::{Guarded, HostBackend, Place, Under, reference, rounded};
use sae_kernels::operations::Layout;
use sae_kernels::{
    Activation, DecoderFree, DecoderFreeConfig, DecoderFreeStep, Element, Form, Losses, Objective, Result, Shape,
    Statistics,
};
use std::ops::Range;

/// A batch, parameters, and what is to be minimised.
#[derive(Debug, Clone)]
pub struct Problem {
    pub shape: Shape,
    pub x: Vec<f64>,
    pub weight: Vec<f64>,
    pub bias: Vec<f64>,
    pub objective: Objective,
    pub activation: Activation,
}

/// How a step is computed; none of it may matter but for rounding.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    pub correlation_form: Form,
    pub weight_form: Form,
    pub block_rows: Option<usize>,
    /// Whether the caller's buffers take activations and row losses, or the model's own.
    pub outputs: bool,
    pub place: Place,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            correlation_form: Form::Auto,
            weight_form: Form::Auto,
            block_rows: None,
            outputs: true,
            place: Place::DENSE,
        }
    }
}

impl Plan {
    /// Forms, micro-batch sizes and layouts worth trying for a batch; fewer for large ones.
    pub fn all<B: HostBackend>(under: &Under<B>, shape: Shape) -> Vec<Self> {
        let rows = shape.rows;
        let large = rows * shape.inputs * shape.latents > 1_000_000;
        let mut plans = Vec::new();
        for form in [Form::Primal, Form::Dual, Form::Auto] {
            plans.push(Self { correlation_form: form, weight_form: form, ..Self::default() });
        }
        for (at, block_rows) in
            [1, 2, 7, 16, rows.div_ceil(2), rows.saturating_sub(1), rows + 5].into_iter().enumerate()
        {
            // One row a block is slow for many rows, and says no more of them.
            if block_rows > 0 && rows / block_rows <= if large { 10 } else { 100 } {
                let place = Place::ALL[at % 2];
                plans.push(Self { block_rows: Some(block_rows), outputs: at % 3 == 0, place, ..Self::default() });
            }
        }
        let few = [0, 1, plans.len() - 1].map(|at| plans[at]);
        under.cases(plans, few)
    }
}

/// All that a step gives, widened.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    pub activations: Vec<f64>,
    pub row_loss: Vec<f64>,
    pub losses: Losses,
    pub grad_weight: Vec<f64>,
    pub grad_bias: Vec<f64>,
    pub grad_x: Vec<f64>,
}

impl Outcome {
    pub fn gradients(&self) -> [(&'static str, &[f64]); 3] {
        [("grad_weight", &self.grad_weight), ("grad_bias", &self.grad_bias), ("grad_x", &self.grad_x)]
    }
    pub fn terms(&self) -> [(&'static str, f64); 5] {
        let Losses { lse, var, tc, wr, total } = self.losses;
        [("lse", lse), ("var", var), ("tc", tc), ("wr", wr), ("total", total)]
    }
}

impl Problem {
    /// Inputs as `B` stores them.
    pub fn rounded_for<B: HostBackend>(&self) -> Self {
        Self {
            x: rounded::<B::Element>(&self.x),
            weight: rounded::<B::Element>(&self.weight),
            bias: rounded::<B::Real>(&self.bias),
            ..self.clone()
        }
    }

    pub fn config(&self, plan: &Plan) -> DecoderFreeConfig {
        DecoderFreeConfig {
            shape: self.shape,
            objective: self.objective,
            activation: self.activation,
            correlation_form: plan.correlation_form,
            weight_form: plan.weight_form,
            block_rows: plan.block_rows,
        }
    }

    pub fn model<B: HostBackend>(&self, under: &Under<B>, plan: &Plan) -> Result<DecoderFree<B>> {
        DecoderFree::new(under.fresh(), self.config(plan))
    }

    /// One step of the whole batch.
    pub fn step<B: HostBackend>(&self, under: &Under<B>, plan: &Plan) -> Result<Outcome> {
        let mut buffers = Buffers::<B>::new(self, plan.place);
        let mut model = self.model(under, plan)?;
        let Shape { rows, .. } = self.shape;
        model.step(buffers.step(0..rows, plan.outputs))?;
        let losses = model.losses()?;
        if !plan.outputs {
            let (activations, row_loss) = (buffers.activations.mat_mut(), buffers.row_loss.slice_mut());
            let (x, weight, bias) = (buffers.x.mat(), buffers.weight.mat(), buffers.bias.slice());
            model.forward(x, weight, bias, Some(activations), Some(row_loss))?;
            assert_eq!(
                format!("{:?}", model.losses()?),
                format!("{losses:?}"),
                "{}: losses of forward and step differ {plan:?}",
                under.name
            );
        }
        Ok(buffers.outcome(&under.name, losses))
    }

    /// The same in two phases, as if each part of the rows were on another host.
    pub fn sharded<B: HostBackend>(
        &self,
        under: &Under<B>,
        plan: &Plan,
        shards: &[Range<usize>],
    ) -> Result<(Outcome, Statistics)> {
        let full = self.objective.lambda_tc != 0.0;
        let mut whole = Statistics::new(self.shape.latents, full);
        let mut buffers = Buffers::<B>::new(self, plan.place);
        // Gradients are added to, over shards.
        buffers.zero_gradients();
        for shard in shards {
            let mut statistics = Statistics::new(self.shape.latents, full);
            let (x, weight, bias) = (buffers.x.mat(), buffers.weight.mat(), buffers.bias.slice());
            self.model(under, plan)?.statistics(x.rows_range(shard.clone()), weight, bias, &mut statistics)?;
            whole.merge(&statistics)?;
        }
        let mut losses = Vec::new();
        for (rank, shard) in shards.iter().enumerate() {
            let mut model = self.model(under, plan)?;
            model.backward(buffers.step(shard.clone(), plan.outputs), &whole, rank == 0)?;
            losses.push(model.losses()?);
        }
        assert!(
            losses.iter().all(|l| *l == losses[0]),
            "{}: every shard must report the whole batch's losses",
            under.name
        );
        if !plan.outputs {
            let (activations, row_loss) = (buffers.activations.mat_mut(), buffers.row_loss.slice_mut());
            let (x, weight, bias) = (buffers.x.mat(), buffers.weight.mat(), buffers.bias.slice());
            self.model(under, plan)?.forward(x, weight, bias, Some(activations), Some(row_loss))?;
        }
        Ok((buffers.outcome(&under.name, losses[0]), whole))
    }

    /// What the reference makes of given activations, for instance those that a kernel stored: its rounding of z and its mask.
    pub fn given_activations(&self, activations: &[f64]) -> Outcome {
        let Shape { rows: n, inputs: d, latents: h } = self.shape;
        let (reference, place, objective) = (reference(), Place::DENSE, self.objective);
        let row_loss: Vec<f64> = activations.chunks(h).take(n).map(row_loss).collect();
        let mut losses = Losses { lse: row_loss.iter().sum(), ..Losses::default() };
        losses.lse *= Objective { lambda_lse: 1.0, ..objective }.row_weight(n as u64);
        let finished = objective.needs_statistics().then(|| finish(activations, n, h, objective));
        if let Some(finished) = &finished {
            [losses.var, losses.tc] = [finished.losses[0], finished.losses[1]];
        }
        let backward = Backward {
            n,
            h,
            activations: activations.to_vec(),
            activation: self.activation,
            row_loss: row_loss.clone(),
            row_weight: objective.row_weight(n as u64),
            statistics: finished.map(|f| StatisticsPart {
                mean: f.mean,
                scale: f.scale,
                correlation: Correlation::Primal { coupling: f.coupling, offset: f.offset },
            }),
            before: None,
        };
        let (dz, grad_bias) = backward.run(&reference, place);
        let (x_t, dz_t, weight_t) =
            (super::transposed(n, d, &self.x), super::transposed(n, h, &dz), super::transposed(h, d, &self.weight));
        let mut grad_weight = ops::product(&reference, place, Layout::Tn, [h, d, n], &dz_t, &x_t, None);
        let grad_x = ops::product(&reference, place, Layout::Nn, [n, d, h], &dz, &weight_t, None);
        if objective.lambda_wr != 0.0 {
            let redundancy = ops::Redundancy {
                h,
                d,
                weight: self.weight.clone(),
                normalize: objective.normalize_weight,
                form: Form::Primal,
                lambda: objective.lambda_wr,
                before: Some(grad_weight),
            };
            (losses.wr, grad_weight, _) = redundancy.run(&reference, place);
        }
        // A term without weight is not shown.
        for (lambda, term) in [
            (objective.lambda_lse, &mut losses.lse),
            (objective.lambda_var, &mut losses.var),
            (objective.lambda_tc, &mut losses.tc),
            (objective.lambda_wr, &mut losses.wr),
        ] {
            *term = if lambda == 0.0 { 0.0 } else { *term };
            losses.total += lambda * *term;
        }
        Outcome { activations: activations.to_vec(), row_loss, losses, grad_weight, grad_bias, grad_x }
    }
}

impl Problem {
    /// Norms of the gradients made of every term's magnitude, with that of the rounded mean: what rounding errors are relative to,
    /// however much cancels in the gradients themselves.
    pub fn magnitudes(&self, activations: &[f64]) -> [f64; 3] {
        let Shape { rows: n, inputs: d, latents: h } = self.shape;
        let finished = self.objective.needs_statistics().then(|| finish(activations, n, h, self.objective));
        let mut dz = vec![0.0; n * h];
        for at in (0..n * h).filter(|at| activations[*at] > 0.0) {
            let (row, j) = (at / h, at % h);
            let a = &activations[row * h..][..h];
            dz[at] = self.objective.row_weight(n as u64).abs() * (row_loss(a) - a[j]).exp();
            if let Some(f) = &finished {
                let centred = |i: usize| (a[i] - f.mean[i]).abs();
                dz[at] += (0..h).map(|i| centred(i) * f.coupling[i * h + j].abs()).sum::<f64>();
                // The dual form has the diagonal in its product, and takes it out again.
                let dead = f.variance[j] == 0.0;
                let diagonal =
                    if dead { 0.0 } else { 4.0 * self.objective.lambda_tc.abs() / (n as f64 - 1.0) / f.variance[j] };
                dz[at] += (centred(j) + f.mean[j].abs()) * (f.scale[j].abs() + diagonal);
            }
        }
        let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|v| v * v).sum::<f64>().sqrt();
        let (x, w) =
            (|row: usize, k: usize| self.x[row * d + k].abs(), |j: usize, k: usize| self.weight[j * d + k].abs());
        let row_norm = |j: usize| (0..d).map(|k| w(j, k).powi(2)).sum::<f64>().sqrt();
        // ‖4GŴ/‖W_j‖‖, twice for the part through the norm, with every |G_ij| ≤ 2.
        let divisor = |j: usize| if self.objective.normalize_weight { row_norm(j) + 1e-8 } else { 1.0 };
        let unit = |j: usize| row_norm(j) / divisor(j);
        let all: f64 = (0..h).map(|i| unit(i).powi(2)).sum::<f64>() + 1.0;
        let redundancy = norm(&mut (0..h).map(|j| 8.0 * self.objective.lambda_wr.abs() * all * unit(j) / divisor(j)));
        [
            norm(&mut (0..h * d).map(|at| (0..n).map(|row| dz[row * h + at / d] * x(row, at % d)).sum())) + redundancy,
            norm(&mut (0..h).map(|j| (0..n).map(|row| dz[row * h + j]).sum())),
            norm(&mut (0..n * d).map(|at| (0..h).map(|j| dz[at / d * h + j] * w(j, at % d)).sum())),
        ]
    }
}

/// The reference's statistics of activations, about their mean.
pub fn finish(activations: &[f64], n: usize, h: usize, objective: Objective) -> ops::Finished {
    let (reference, place) = (reference(), Place::DENSE);
    let mut sum = vec![0.0; h];
    for row in activations.chunks(h).take(n) {
        sum.iter_mut().zip(row).for_each(|(sum, a)| *sum += a);
    }
    let (shift, sum, sum_squares) = ops::recentre(&reference, place, (n, h), activations, &sum, &vec![0.0; h]);
    let covariance = Covariance::Activations(activations[..n * h].to_vec());
    Finish { h, count: n as u64, objective, shift, sum, sum_squares, covariance }.run(&reference, place)
}

/// ℓ = −log Σ_j exp(−a_j).
pub fn row_loss(row: &[f64]) -> f64 {
    let least = row.iter().copied().fold(f64::INFINITY, f64::min);
    least - row.iter().map(|a| (least - a).exp()).sum::<f64>().ln()
}

/// The ranges between cuts.
pub fn shards(cuts: &[usize]) -> Vec<Range<usize>> {
    cuts.windows(2).map(|cut| cut[0]..cut[1]).collect()
}

/// A step's inputs and outputs in guarded memory.
pub struct Buffers<B: HostBackend> {
    rows: usize,
    pub x: Guarded<B::Element>,
    pub weight: Guarded<B::Element>,
    pub bias: Guarded<B::Real>,
    pub grad_weight: Guarded<B::Real>,
    pub grad_bias: Guarded<B::Real>,
    pub grad_x: Guarded<B::Real>,
    pub activations: Guarded<B::Element>,
    pub row_loss: Guarded<B::Real>,
}

impl<B: HostBackend> Buffers<B> {
    pub fn new(problem: &Problem, place: Place) -> Self {
        let Shape { rows: n, inputs: d, latents: h } = problem.shape;
        Self {
            rows: n,
            x: Guarded::matrix(place, n, d, &problem.x),
            weight: Guarded::matrix(place, h, d, &problem.weight),
            bias: Guarded::vector(place, &problem.bias),
            grad_weight: Guarded::poisoned(place, h, d),
            grad_bias: Guarded::vector_or_poison(place, h, None),
            grad_x: Guarded::poisoned(place, n, d),
            activations: Guarded::poisoned(place, n, h),
            row_loss: Guarded::vector_or_poison(place, n, None),
        }
    }

    fn zero_gradients(&mut self) {
        let zero = B::Real::from_f64(0.0);
        let mut grad_weight = self.grad_weight.mat_mut();
        (0..grad_weight.rows()).for_each(|i| grad_weight.row_mut(i).fill(zero));
        self.grad_bias.slice_mut().fill(zero);
    }

    /// The step of some of the rows.
    pub fn step(&mut self, rows: Range<usize>, outputs: bool) -> DecoderFreeStep<'_, B> {
        assert!(rows.end <= self.rows);
        DecoderFreeStep {
            x: self.x.mat().rows_range(rows.clone()),
            weight: self.weight.mat(),
            bias: self.bias.slice(),
            grad_weight: self.grad_weight.mat_mut(),
            grad_bias: self.grad_bias.slice_mut(),
            grad_x: Some(self.grad_x.mat_mut().rows_range(rows.clone())),
            activations: outputs.then(|| self.activations.mat_mut().rows_range(rows.clone())),
            row_loss: outputs.then(|| &mut self.row_loss.slice_mut()[rows]),
        }
    }

    pub fn outcome(&self, context: &str, losses: Losses) -> Outcome {
        Outcome {
            activations: self.activations.checked(context, "activations"),
            row_loss: self.row_loss.checked(context, "row_loss"),
            losses,
            grad_weight: self.grad_weight.checked(context, "grad_weight"),
            grad_bias: self.grad_bias.checked(context, "grad_bias"),
            grad_x: self.grad_x.checked(context, "grad_x"),
        }
    }
}
