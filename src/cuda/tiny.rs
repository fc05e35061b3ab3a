//! [`FusedStep`]: one launch for a small batch.

use super::gemm::{THREADS, blocks};
use super::memory::{Layout, View, lay_out};
use super::optimizer::{AdamRule, SgdRule};
use super::{Argument, Core, Cuda, CudaElement, activation};
use crate::decoder_free::Trained;
use crate::error::Result;
use crate::operations::{FusedParameters, FusedStep, Optimizer};
use bytemuck::{Pod, Zeroable};

/// The largest batch, inputs and latents. Latents: a thread each. The others: beyond them products of whole tiles on tensor cores should
/// win over few launches. Not yet measured.
const MOST_ROWS: usize = 512;
const MOST_INPUTS: usize = 1024;
const MOST_LATENTS: usize = THREADS as usize;

/// Rows and columns of a block's square of a product, its latents in a group, inputs that it has of ∂L/∂W, rows of row losses.
const SQUARE: usize = 8;
const GROUP: usize = 4;
const WEIGHT_COLS: usize = 128;
const LOSS_ROWS: usize = 8;

/// `Shared` of `kernels/tiny.cu`.
const SHARED_BYTES: u32 = 18_176;

/// `Outlet` of `kernels/tiny.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Outlet {
    gradient: View,
    sgd: SgdRule,
    adam: AdamRule,
    rule: u32,
    padding: u32,
}

impl Outlet {
    fn gradient(gradient: View) -> Self {
        Self { gradient, ..Self::zeroed() }
    }

    fn trained<E: CudaElement>(trained: &Trained<'_, Cuda<E>>) -> Self {
        let (parameters, storage) = (&trained.parameters, trained.storage.as_ref());
        match &trained.optimizer {
            Optimizer::Sgd { config, velocity } => {
                Self { sgd: SgdRule::new(config, velocity, parameters, storage), rule: 1, ..Self::zeroed() }
            }
            Optimizer::Adam { config, step, first_moment, second_moment } => {
                let moments = [first_moment, second_moment];
                Self { adam: AdamRule::new(config, *step, moments, parameters, storage), rule: 2, ..Self::zeroed() }
            }
        }
    }
}

/// `TinyStep` of `kernels/tiny.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct TinyStep {
    x: View,
    weight: View,
    bias: u64,
    activations: View,
    dz: View,
    row_loss: u64,
    row_loss_sum: u64,
    losses: u64,
    barrier: u64,
    scratch: Scratch,
    weight_outlet: Outlet,
    bias_outlet: Outlet,
    eps: f64,
    lambda_var: f64,
    lambda_tc: f64,
    rows: i32,
    inputs: i32,
    latents: i32,
    row_weight: f32,
    activation: u32,
    backward: u32,
}

/// Scratch, in the order of `TinyStep`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Scratch {
    a: u64,
    gradient: u64,
    coupling: u64,
    column_sums: u64,
    shift: u64,
    scale: u64,
    offset: u64,
    row_losses: u64,
    variance_losses: u64,
    q: u64,
}

impl Scratch {
    fn take(layout: &mut Layout, n: usize, h: usize) -> Result<Self> {
        let (rows, width) = (n.next_multiple_of(4), h.next_multiple_of(4));
        Ok(Self {
            a: layout.take::<f32>(rows, width)?,
            gradient: layout.take::<f32>(rows, width)?,
            coupling: layout.take::<f32>(width, width)?,
            column_sums: layout.take::<f32>(rows / 4, width)?,
            shift: layout.take::<f32>(width, 1)?,
            scale: layout.take::<f32>(width, 1)?,
            offset: layout.take::<f32>(width, 1)?,
            row_losses: layout.take::<f64>(n, 1)?,
            variance_losses: layout.take::<f64>(width, 1)?,
            q: layout.take::<f64>(width, 1)?,
        })
    }
}

/// Scratch of the largest batch within these rows.
pub(super) fn plan(layout: &mut Layout, n: usize, d: usize, h: usize) -> Result<()> {
    if d <= MOST_INPUTS && h <= MOST_LATENTS {
        Scratch::take(layout, n.min(MOST_ROWS), h)?;
    }
    Ok(())
}

pub(super) fn fused_step<E: CudaElement>(core: &Core, args: FusedStep<'_, Cuda<E>>) -> Result<bool> {
    let (n, d, h) = args.check()?;
    let resident = core.driver.cooperative_blocks();
    if resident == 0 || n > MOST_ROWS || d > MOST_INPUTS || h > MOST_LATENTS {
        return Ok(false);
    }
    let scratch = lay_out(&args.workspace, |layout| Scratch::take(layout, n, h))?;
    let none = Outlet::zeroed();
    let (weight_outlet, bias_outlet) = match &args.parameters {
        FusedParameters::Fixed { .. } => (none, none),
        FusedParameters::Gradients { grad_weight, grad_bias, .. } => {
            let bias = View { address: grad_bias.address(), row_stride: 0 };
            (Outlet::gradient(View::of(grad_weight)), Outlet::gradient(bias))
        }
        FusedParameters::Trained { weight, bias } => (Outlet::trained(weight), Outlet::trained(bias)),
    };
    let objective = args.objective;
    let argument = TinyStep {
        x: View::new(&args.x),
        weight: View::new(&args.parameters.weight(d)?),
        bias: args.parameters.bias().address(),
        activations: args.activations.as_ref().map_or(View::NONE, View::of),
        dz: args.dz.as_ref().map_or(View::NONE, View::of),
        row_loss: args.row_loss.address(),
        row_loss_sum: args.row_loss_sum.address(),
        losses: args.losses.address(),
        barrier: args.state.address(),
        scratch,
        weight_outlet,
        bias_outlet,
        eps: objective.variance_eps,
        lambda_var: objective.lambda_var,
        lambda_tc: objective.lambda_tc,
        rows: n as i32,
        inputs: d as i32,
        latents: h as i32,
        row_weight: objective.row_weight(n as u64) as f32,
        activation: activation(args.activation),
        backward: u32::from(!matches!(args.parameters, FusedParameters::Fixed { .. })),
    };
    // Units of the phase that has most.
    let groups = h.div_ceil(GROUP);
    let units = [
        n.div_ceil(SQUARE) * h.div_ceil(SQUARE),
        groups + n.div_ceil(LOSS_ROWS),
        groups * d.div_ceil(WEIGHT_COLS).max(1),
    ];
    let grid = blocks(units.into_iter().max().unwrap_or(1))?.min(resident);
    core.launch_together(E::KERNELS.tiny_step, grid, THREADS, SHARED_BYTES, Argument::new(&argument))?;
    Ok(true)
}
