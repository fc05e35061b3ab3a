//! The identity that the paper is about: ∂L_lse/∂a = r, the responsibilities.
//!
//! The derivative is taken without the formula that it is compared with: by central differences of the row loss, in f64.
//! The CPU backend's gradient, which does use the formula, is then compared with the same responsibilities.

use anyhow::Result;
use sae_kernels::operations::{BackwardDz, Encode, Responsibilities};
use sae_kernels::{Activation, Backend, Cpu, MatMut, MatRef, Reference};

/// Step of the differences: truncation (∝ step²) and rounding (∝ 1/step) are then both about 1e-11.
const STEP: f64 = 1e-5;

/// How far derivatives are from responsibilities, over a batch.
pub struct Identity {
    /// Values compared, N·H.
    pub values: usize,
    /// max |central difference of ℓ − r|, both in f64.
    pub differences: f64,
    /// max |gradient by the CPU backend in f32 − r|, on activations rounded to f32.
    pub kernel: f64,
}

/// Compares on a batch x \[N,D\] with weight \[H,D\] and bias \[H\].
pub fn check(x: &[f32], weight: &[f32], bias: &[f32]) -> Result<Identity> {
    let h = bias.len();
    let d = weight.len() / h;
    let n = x.len() / d;
    let wide = |values: &[f32]| -> Vec<f64> { values.iter().map(|v| f64::from(*v)).collect() };
    let (x, weight, bias) = (wide(x), wide(weight), wide(bias));
    let mut a = vec![0.0; n * h];
    Reference.encode(Encode {
        x: MatRef::new(&x, n, d)?,
        weight: MatRef::new(&weight, h, d)?,
        bias: &bias,
        activation: Activation::Relu,
        activations: Some(MatMut::new(&mut a, n, h)?),
        row_loss: None,
        moments: None,
        workspace: &mut [],
    })?;
    // The same activations for both backends: exact in f32.
    let rounded: Vec<f32> = a.iter().map(|a| *a as f32).collect();
    let a = wide(&rounded);

    let row_loss = row_losses(&a, h)?;
    let mut responsibilities = vec![0.0; n * h];
    Reference.responsibilities(Responsibilities {
        activations: MatRef::new(&a, n, h)?,
        row_loss: &row_loss,
        responsibilities: MatMut::new(&mut responsibilities, n, h)?,
    })?;

    let mut differences = 0.0f64;
    for j in 0..h {
        // A row's loss depends on that row alone, so column j of all rows is moved at once.
        let moved = |step: f64| {
            let mut a = a.clone();
            a.iter_mut().skip(j).step_by(h).for_each(|a| *a += step);
            row_losses(&a, h)
        };
        let (above, below) = (moved(STEP)?, moved(-STEP)?);
        for row in 0..n {
            let derivative = (above[row] - below[row]) / (2.0 * STEP);
            differences = differences.max((derivative - responsibilities[row * h + j]).abs());
        }
    }
    let kernel = kernel_gradient(&rounded, &row_loss, h)?;
    let kernel = kernel.iter().zip(&responsibilities).fold(0.0f64, |most, (g, r)| most.max((f64::from(*g) - r).abs()));
    Ok(Identity { values: n * h, differences, kernel })
}

/// ℓ of rows of activations \[N,H\]: encoding them with the unit matrix and no activation function leaves them as they are.
fn row_losses(a: &[f64], h: usize) -> Result<Vec<f64>> {
    let n = a.len() / h;
    let unit: Vec<f64> = (0..h * h).map(|at| f64::from(u8::from(at / h == at % h))).collect();
    let mut row_loss = vec![0.0; n];
    Reference.encode(Encode {
        x: MatRef::new(a, n, h)?,
        weight: MatRef::new(&unit, h, h)?,
        bias: &vec![0.0; h],
        activation: Activation::Identity,
        activations: None,
        row_loss: Some(&mut row_loss),
        moments: None,
        workspace: &mut [],
    })?;
    Ok(row_loss)
}

/// ∂L_lse/∂a by the CPU backend, from activations and row losses.
fn kernel_gradient(a: &[f32], row_loss: &[f64], h: usize) -> Result<Vec<f32>> {
    let n = a.len() / h;
    let row_loss: Vec<f32> = row_loss.iter().map(|l| *l as f32).collect();
    let backend = Cpu::<f32>::new()?;
    let shape = sae_kernels::Shape { rows: n, inputs: h, latents: h };
    let mut gradient = vec![0.0; n * h];
    backend.backward_dz(BackwardDz {
        activations: MatRef::new(a, n, h)?,
        activation: Activation::Identity,
        row_loss: &row_loss,
        row_weight: 1.0,
        statistics: None,
        dz: MatMut::new(&mut gradient, n, h)?,
        accumulate: false,
        grad_bias: &mut vec![0.0; h],
        workspace: &mut vec![0.0; backend.workspace_len(shape)?],
    })?;
    Ok(gradient)
}

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "∂L_lse/∂a = r: max |∂L_lse/∂a − r| = {:.1e} over {} values, ∂L_lse/∂a by central differences (step {STEP:e}) of the f64 \
             reference's row loss; {:.1e} for the gradient by the CPU kernel in f32",
            self.differences, self.values, self.kernel
        )
    }
}
