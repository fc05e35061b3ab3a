//! Losses and gradient of given activations: those of the reference's formulas, and those of a step that encodes the same activations.

#[macro_use]
mod common;

use common::checks::element;
use common::{Guarded, HostBackend, Place, Problem, Under, assert_same_bits, relative, rng, uniform};
use sae_kernels::{
    Activation, ActivationLosses, ActivationStep, Element, Error, Losses, Objective, Reduction, Reference, Result,
    Shape,
};

on_every_backend!(
    losses_and_gradients,
    what_is_not_wanted_is_left_out,
    a_plan_may_be_larger_than_the_batch,
    weight_alone,
    few_rows,
    dead_columns,
    wrong_arguments,
);

const ALL_TERMS: Objective = Objective {
    lambda_lse: 0.75,
    lambda_var: 0.5,
    lambda_tc: 0.25,
    lambda_wr: 0.125,
    variance_eps: 1e-4,
    reduction: Reduction::Mean,
    normalize_weight: true,
};
const NOTHING: Objective = Objective { lambda_lse: 0.0, lambda_var: 0.0, lambda_tc: 0.0, lambda_wr: 0.0, ..ALL_TERMS };

/// Fewer rows than latents, and more: both forms of each term.
const SHAPES: [[usize; 3]; 6] = [[2, 3, 2], [9, 20, 40], [40, 3, 9], [70, 17, 33], [300, 64, 48], [33, 200, 130]];

struct Case {
    shape: Shape,
    objective: Objective,
    activations: Vec<f64>,
    weight: Vec<f64>,
}

/// All that a call gives, widened; empty where not wanted.
#[derive(Debug, Clone, PartialEq)]
struct Outcome {
    losses: Losses,
    grad_activations: Vec<f64>,
    grad_weight: Vec<f64>,
    responsibilities: Vec<f64>,
    row_loss: Vec<f64>,
}

impl Case {
    /// Activations of both signs, as `B` stores them.
    fn new<B: HostBackend>([rows, inputs, latents]: [usize; 3], objective: Objective) -> Self {
        let mut rng = rng((rows + 3 * inputs + 7 * latents) as u64);
        Self {
            shape: Shape { rows, inputs, latents },
            objective,
            activations: element::<B>(uniform(&mut rng, rows * latents, 2.0)),
            weight: element::<B>(uniform(&mut rng, latents * inputs, 1.0)),
        }
    }

    fn plan<B: HostBackend>(&self, under: &Under<B>) -> ActivationLosses<B> {
        ActivationLosses::new(under.fresh(), self.shape, self.objective).unwrap()
    }

    /// `wanted`: the weight, and the outputs in their order.
    fn run<B: HostBackend>(&self, plan: &mut ActivationLosses<B>, place: Place, wanted: [bool; 5]) -> Result<Outcome> {
        let Shape { rows: n, inputs: d, latents: h } = self.shape;
        let activations = Guarded::<B::Element>::matrix(place, n, h, &self.activations);
        let weight = Guarded::<B::Element>::matrix(place, h, d, &self.weight);
        let mut grad_activations = Guarded::<B::Element>::poisoned(place, n, h);
        let mut grad_weight = Guarded::<B::Real>::poisoned(place, h, d);
        let mut responsibilities = Guarded::<B::Real>::poisoned(place, n, h);
        let mut row_loss = Guarded::<B::Real>::vector_or_poison(place, n, None);
        let result = plan.step(ActivationStep {
            activations: activations.mat(),
            weight: wanted[0].then(|| weight.mat()),
            grad_activations: wanted[1].then(|| grad_activations.mat_mut()),
            grad_weight: wanted[2].then(|| grad_weight.mat_mut()),
            responsibilities: wanted[3].then(|| responsibilities.mat_mut()),
            row_loss: wanted[4].then(|| row_loss.slice_mut()),
        });
        if let Err(error) = result {
            grad_activations.assert_poisoned("after an error", "grad_activations");
            grad_weight.assert_poisoned("after an error", "grad_weight");
            responsibilities.assert_poisoned("after an error", "responsibilities");
            row_loss.assert_poisoned("after an error", "row_loss");
            return Err(error);
        }
        let keep = |wanted: bool, values: Vec<f64>| if wanted { values } else { Vec::new() };
        Ok(Outcome {
            losses: plan.losses()?,
            grad_activations: keep(wanted[1], grad_activations.checked("a call", "grad_activations")),
            grad_weight: keep(wanted[2], grad_weight.checked("a call", "grad_weight")),
            responsibilities: keep(wanted[3], responsibilities.checked("a call", "responsibilities")),
            row_loss: keep(wanted[4], row_loss.checked("a call", "row_loss")),
        })
    }

    /// The reference's formulas. With the unit matrix for a weight, the gradient of x is that of the activations.
    fn truth(&self) -> Outcome {
        let Shape { rows, inputs, latents: h } = self.shape;
        let problem = |inputs: usize, weight: Vec<f64>, objective: Objective| Problem {
            shape: Shape { rows, inputs, latents: h },
            x: vec![0.0; rows * inputs],
            weight,
            bias: vec![0.0; h],
            objective,
            activation: Activation::Identity,
        };
        let unit = (0..h * h).map(|at| f64::from(u8::from(at / h == at % h))).collect();
        let weightless = Objective { lambda_wr: 0.0, ..self.objective };
        let whole = problem(inputs, self.weight.clone(), self.objective).given_activations(&self.activations);
        let gradient = problem(h, unit, weightless).given_activations(&self.activations).grad_x;
        let row = |at: usize| whole.row_loss[at / h];
        Outcome {
            losses: whole.losses,
            grad_activations: gradient,
            grad_weight: whole.grad_weight,
            responsibilities: (0..rows * h).map(|at| (row(at) - self.activations[at]).exp()).collect(),
            row_loss: whole.row_loss,
        }
    }
}

const ALL: [bool; 5] = [true; 5];

/// What rounding may leave of a result's norm: sums of hundreds of terms, and one rounding to storage after several before.
fn tolerance<B: HostBackend>() -> f64 {
    let (real, element) = (B::Real::UNIT_ROUNDOFF, B::Element::UNIT_ROUNDOFF);
    256.0 * real + if element > real { 4.0 * element } else { 0.0 }
}

fn assert_close(context: &str, what: &str, found: &[f64], truth: &[f64], tolerance: f64) {
    let error = relative(found, truth);
    assert!(error <= tolerance, "{context}: {what} is off by {error:e}, allowed {tolerance:e}");
}

fn losses_and_gradients<B: HostBackend>(under: &Under<B>) {
    for shape in under.cases(SHAPES, [[9, 20, 40], [133, 20, 9]]) {
        for objective in [Objective::default(), ALL_TERMS, Objective { lambda_lse: 1.0, ..NOTHING }] {
            for place in Place::ALL {
                let case = Case::new::<B>(shape, objective);
                let context = format!("{}: {shape:?} {place:?} {objective:?}", under.name);
                let (found, truth) = (case.run(&mut case.plan(under), place, ALL).unwrap(), case.truth());
                let most = tolerance::<B>();
                let terms = |l: Losses| [l.lse, l.var, l.tc, l.wr, l.total];
                assert_close(&context, "losses", &terms(found.losses), &terms(truth.losses), most);
                assert_close(&context, "row_loss", &found.row_loss, &truth.row_loss, most);
                assert_close(&context, "grad_activations", &found.grad_activations, &truth.grad_activations, most);
                assert_close(&context, "grad_weight", &found.grad_weight, &truth.grad_weight, most);
                assert_close(&context, "responsibilities", &found.responsibilities, &truth.responsibilities, most);
            }
        }
    }
}

fn what_is_not_wanted_is_left_out<B: HostBackend>(under: &Under<B>) {
    for shape in under.cases([[9, 20, 40], [70, 17, 33]], [[9, 20, 40]]) {
        let case = Case::new::<B>(shape, ALL_TERMS);
        let all = case.run(&mut case.plan(under), Place::DENSE, ALL).unwrap();
        for without in under.cases(0..16, [0, 15]) {
            let wanted = [true, without & 1 == 0, without & 2 == 0, without & 4 == 0, without & 8 == 0];
            let some = case.run(&mut case.plan(under), Place::DENSE, wanted).unwrap();
            let context = format!("{}: {shape:?} {wanted:?}", under.name);
            assert_eq!(some.losses, all.losses, "{context}");
            for (wanted, some, all) in [
                (wanted[1], &some.grad_activations, &all.grad_activations),
                (wanted[2], &some.grad_weight, &all.grad_weight),
                (wanted[3], &some.responsibilities, &all.responsibilities),
                (wanted[4], &some.row_loss, &all.row_loss),
            ] {
                assert_same_bits(&context, "an output", some, if wanted { all } else { &[] });
            }
        }
    }
}

fn a_plan_may_be_larger_than_the_batch<B: HostBackend>(under: &Under<B>) {
    let large = Case::new::<B>([50, 9, 20], ALL_TERMS);
    let mut plan = large.plan(under);
    for (at, n) in under.cases([50, 20, 7, 2, 50, 15], [50, 7]).into_iter().enumerate() {
        let mut case = Case::new::<B>([n, 9, 20], ALL_TERMS);
        case.activations = large.activations[..n * 20].to_vec();
        let wanted = [true, at % 2 == 0, true, true, true];
        let found = case.run(&mut plan, Place::STRIDED, wanted).unwrap();
        let fresh = case.run(&mut case.plan(under), Place::DENSE, wanted).unwrap();
        assert_eq!(found, fresh, "{}: {n} rows in a plan of 50", under.name);
    }
    let wrong = Case::new::<B>([51, 9, 20], ALL_TERMS).run(&mut plan, Place::DENSE, ALL);
    assert_eq!(wrong, Err(Error::TooManyRows { planned: 50, found: 51 }), "{}", under.name);
}

/// No rows, and no term that needs any.
fn weight_alone<B: HostBackend>(under: &Under<B>) {
    for shape in [[0, 9, 20], [0, 20, 9]] {
        let case = Case::new::<B>(shape, Objective { lambda_wr: 2.0, ..NOTHING });
        let (found, truth) = (case.run(&mut case.plan(under), Place::DENSE, ALL).unwrap(), case.truth());
        assert_close(&under.name, "wr", &[found.losses.wr], &[truth.losses.wr], tolerance::<B>());
        assert_close(&under.name, "grad_weight", &found.grad_weight, &truth.grad_weight, tolerance::<B>());
    }
    // Without the term its gradient is 0.
    let case = Case::new::<B>([4, 9, 20], Objective { lambda_lse: 1.0, ..NOTHING });
    let found = case.run(&mut case.plan(under), Place::DENSE, ALL).unwrap();
    assert!(found.grad_weight.iter().all(|g| *g == 0.0), "{}", under.name);
}

fn few_rows<B: HostBackend>(under: &Under<B>) {
    let lse = Objective { lambda_lse: 1.0, ..NOTHING };
    for (n, h) in [(0, 5), (1, 5), (3, 1)] {
        let case = Case::new::<B>([n, 3, h], lse);
        let (found, truth) = (case.run(&mut case.plan(under), Place::DENSE, ALL).unwrap(), case.truth());
        assert_close(&under.name, "few rows", &found.grad_activations, &truth.grad_activations, tolerance::<B>());
        if n > 1 {
            continue;
        }
        for objective in [Objective { lambda_var: 1.0, ..lse }, Objective { lambda_tc: 1.0, ..lse }] {
            let case = Case { objective, ..Case::new::<B>([n, 3, 5], lse) };
            let result = case.run(&mut case.plan(under), Place::DENSE, ALL);
            assert_eq!(result, Err(Error::TooFewRows { rows: n as u64 }), "{}", under.name);
        }
    }
}

/// Columns that never change have no gradient but the log-sum-exp's.
fn dead_columns<B: HostBackend>(under: &Under<B>) {
    for shape @ [_, _, h] in [[6, 3, 20], [40, 3, 9]] {
        let mut case = Case::new::<B>(shape, Objective::default());
        for (at, a) in case.activations.iter_mut().enumerate() {
            *a = if at % h % 4 == 1 { [0.0, -1.5, 3.0][at % h % 3] } else { *a };
        }
        let (found, truth) = (case.run(&mut case.plan(under), Place::DENSE, ALL).unwrap(), case.truth());
        assert!(found.losses.total.is_finite() && found.grad_activations.iter().all(|g| g.is_finite()));
        assert_close(&under.name, "losses", &[found.losses.total], &[truth.losses.total], tolerance::<B>());
        let dead = |values: &[f64]| -> Vec<f64> {
            values.iter().enumerate().filter(|(at, _)| at % h % 4 == 1).map(|(_, v)| *v).collect()
        };
        assert_close(
            &under.name,
            "dead columns",
            &dead(&found.grad_activations),
            &dead(&found.responsibilities),
            tolerance::<B>(),
        );
    }
}

fn wrong_arguments<B: HostBackend>(under: &Under<B>) {
    let case = Case::new::<B>([7, 5, 3], ALL_TERMS);
    let missing = case.run(&mut case.plan(under), Place::DENSE, [false, true, true, true, true]);
    assert!(matches!(missing, Err(Error::Configuration { name: "lambda_wr", .. })), "{}: {missing:?}", under.name);
    let case = Case { objective: Objective { lambda_wr: 0.0, ..ALL_TERMS }, ..case };
    let missing = case.run(&mut case.plan(under), Place::DENSE, [false, true, true, true, true]);
    assert!(matches!(missing, Err(Error::Length { operand: "weight", .. })), "{}: {missing:?}", under.name);
    assert!(case.run(&mut case.plan(under), Place::DENSE, [false, true, false, true, true]).is_ok());
    let no_latents = ActivationLosses::new(under.fresh(), Shape { latents: 0, ..case.shape }, ALL_TERMS);
    assert_eq!(no_latents.err(), Some(Error::NoLatents));
    let wrong_eps = Objective { variance_eps: 0.0, ..ALL_TERMS };
    assert!(ActivationLosses::new(under.fresh(), case.shape, wrong_eps).is_err());
    for wrong in ["activations", "weight", "grad_activations", "grad_weight", "responsibilities", "row_loss"] {
        let size = |this: &str, len: usize| if this == wrong { len + 1 } else { len };
        let mat = |this: &str, rows: usize, cols: usize| {
            Guarded::<B::Element>::matrix(Place::DENSE, rows, size(this, cols), &vec![1.0; rows * size(this, cols)])
        };
        let (activations, weight) = (mat("activations", 7, 3), mat("weight", 3, 5));
        let mut grad_activations = Guarded::<B::Element>::poisoned(Place::DENSE, 7, size("grad_activations", 3));
        let mut grad_weight = Guarded::<B::Real>::poisoned(Place::DENSE, size("grad_weight", 3), 5);
        let mut responsibilities = Guarded::<B::Real>::poisoned(Place::DENSE, size("responsibilities", 7), 3);
        let mut row_loss = Guarded::<B::Real>::vector_or_poison(Place::DENSE, size("row_loss", 7), None);
        let result = case.plan(under).step(ActivationStep {
            activations: activations.mat(),
            weight: Some(weight.mat()),
            grad_activations: Some(grad_activations.mat_mut()),
            grad_weight: Some(grad_weight.mat_mut()),
            responsibilities: Some(responsibilities.mat_mut()),
            row_loss: Some(row_loss.slice_mut()),
        });
        match result {
            Err(Error::Shape { operand, .. } | Error::Length { operand, .. }) => assert_eq!(operand, wrong),
            other => panic!("{}: wrong {wrong}: {other:?}", under.name),
        }
        grad_activations.assert_poisoned(wrong, "grad_activations");
        grad_weight.assert_poisoned(wrong, "grad_weight");
        responsibilities.assert_poisoned(wrong, "responsibilities");
        row_loss.assert_poisoned(wrong, "row_loss");
    }
}

/// In `f64`, against differences of the losses.
#[test]
fn the_gradient_is_that_of_the_losses() {
    const STEP: f64 = 1e-5;
    for shape in [[5, 3, 4], [3, 4, 6]] {
        for objective in [ALL_TERMS, Objective { reduction: Reduction::Sum, variance_eps: 1e-2, ..ALL_TERMS }] {
            let mut case = Case::new::<Reference>(shape, objective);
            let mut plan = case.plan(&common::reference());
            let mut run = |case: &Case| case.run(&mut plan, Place::DENSE, ALL).unwrap();
            let gradients = run(&case);
            type Field = fn(&mut Case) -> &mut Vec<f64>;
            let fields: [(Field, Vec<f64>); 2] =
                [(|c| &mut c.activations, gradients.grad_activations), (|c| &mut c.weight, gradients.grad_weight)];
            for (field, gradient) in fields {
                let differences: Vec<f64> = (0..gradient.len())
                    .map(|at| {
                        let value = field(&mut case)[at];
                        let mut total = |moved: f64| {
                            field(&mut case)[at] = moved;
                            run(&case).losses.total
                        };
                        let difference = total(value + STEP) - total(value - STEP);
                        field(&mut case)[at] = value;
                        difference / (2.0 * STEP)
                    })
                    .collect();
                assert_close(&format!("{shape:?}"), "gradient", &gradient, &differences, 1e-7);
            }
        }
    }
}
