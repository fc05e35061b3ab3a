//! L-BFGS for a smooth convex function of a few hundred variables, in `f64`.
//!
//! Liu & Nocedal 1989: the two-loop recursion over the last pairs of steps and gradient differences, and a line search by
//! bisection for the weak Wolfe conditions, which is sure to end on a function that is bounded below.

use std::collections::VecDeque;

/// Pairs of (step, gradient difference) that are kept.
const MEMORY: usize = 10;
/// Share of the first-order decrease that a step must reach.
const DECREASE: f64 = 1e-4;
/// Share of the slope that may remain after a step.
const CURVATURE: f64 = 0.9;
/// Trials of one line search; only rounding can use them up.
const TRIALS: usize = 40;

/// Where the search ended.
#[derive(Debug, Clone)]
pub struct Minimum {
    /// The variables.
    pub point: Vec<f64>,
    /// The function there.
    pub value: f64,
    /// max |∂f/∂x_i| there.
    pub gradient: f64,
    /// Iterations done.
    pub iterations: usize,
    /// Whether the gradient came below the tolerance.
    pub converged: bool,
}

/// Minimises `function`, which returns its value and writes its gradient, from `point` on.
///
/// Stops when no element of the gradient is above `tolerance`, after `iterations`, or when rounding leaves no step that decreases.
pub fn minimise(
    mut point: Vec<f64>,
    tolerance: f64,
    iterations: usize,
    mut function: impl FnMut(&[f64], &mut [f64]) -> f64,
) -> Minimum {
    let len = point.len();
    let mut gradient = vec![0.0; len];
    let mut value = function(&point, &mut gradient);
    let mut pairs: VecDeque<(Vec<f64>, Vec<f64>)> = VecDeque::new();
    let mut done = 0;
    while done < iterations && largest(&gradient) > tolerance {
        let direction = direction(&gradient, &pairs);
        let slope = dot(&direction, &gradient);
        // Nothing is known of the curvature before the first step: a step of length 1 at most.
        let first = if pairs.is_empty() { 1.0 / dot(&gradient, &gradient).sqrt().max(1.0) } else { 1.0 };
        let (mut low, mut high, mut length) = (0.0, f64::INFINITY, first);
        let mut next = vec![0.0; len];
        let mut next_gradient = vec![0.0; len];
        let mut found = None;
        for _ in 0..TRIALS {
            for ((next, x), d) in next.iter_mut().zip(&point).zip(&direction) {
                *next = x + length * d;
            }
            let trial = function(&next, &mut next_gradient);
            // A value that is not a number is none, so it counts as too far.
            let is_lower = trial <= value + DECREASE * length * slope;
            if !is_lower {
                high = length;
            } else if dot(&direction, &next_gradient) < CURVATURE * slope {
                low = length;
            } else {
                found = Some(trial);
                break;
            }
            length = if high.is_finite() { 0.5 * (low + high) } else { 2.0 * length };
        }
        let Some(trial) = found else { break };
        let step: Vec<f64> = next.iter().zip(&point).map(|(new, old)| new - old).collect();
        let change: Vec<f64> = next_gradient.iter().zip(&gradient).map(|(new, old)| new - old).collect();
        // The curvature condition makes this positive, but for rounding.
        if dot(&step, &change) > 0.0 {
            pairs.push_back((step, change));
            if pairs.len() > MEMORY {
                pairs.pop_front();
            }
        }
        (point, gradient, value) = (next, next_gradient, trial);
        done += 1;
    }
    let gradient = largest(&gradient);
    Minimum { point, value, gradient, iterations: done, converged: gradient <= tolerance }
}

/// −H·gradient, with H the inverse Hessian that the pairs tell of.
fn direction(gradient: &[f64], pairs: &VecDeque<(Vec<f64>, Vec<f64>)>) -> Vec<f64> {
    let mut q = gradient.to_vec();
    let mut shares = Vec::with_capacity(pairs.len());
    for (step, change) in pairs.iter().rev() {
        let share = dot(step, &q) / dot(step, change);
        add(&mut q, -share, change);
        shares.push(share);
    }
    if let Some((step, change)) = pairs.back() {
        let scale = dot(step, change) / dot(change, change);
        q.iter_mut().for_each(|q| *q *= scale);
    }
    for ((step, change), share) in pairs.iter().zip(shares.into_iter().rev()) {
        let correction = share - dot(change, &q) / dot(step, change);
        add(&mut q, correction, step);
    }
    q.iter_mut().for_each(|q| *q = -*q);
    q
}

fn dot(left: &[f64], right: &[f64]) -> f64 {
    left.iter().zip(right).map(|(l, r)| l * r).sum()
}

fn add(target: &mut [f64], factor: f64, source: &[f64]) {
    for (t, s) in target.iter_mut().zip(source) {
        *t += factor * s;
    }
}

fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |largest, v| if v.abs() <= largest { largest } else { v.abs() })
}
