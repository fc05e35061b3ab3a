//! The memory of a plan, from its configuration alone.

use super::DecoderFreeConfig;
use crate::backend::{Backend, Shape};
use crate::error::{Error, Result};
use crate::objective::Form;
use crate::operations::Operation;

/// Bytes that a plan owns, by what they hold.
///
/// With B rows of a block, E bytes of the storage type and R of [`Backend::Real`]:
///
/// | part | bytes |
/// |---|---|
/// | `block` | 2·E·B·H |
/// | `correlation` | λ_tc ≠ 0: R·min(N,H)², R·H² in the primal form and for several blocks, R·B² in the dual form |
/// | `redundancy` | λ_wr ≠ 0: R·min(H,D)², R·H² in the primal and R·D² in the dual form |
/// | `vectors` | R·(N + 5·H) + 16·H + 40 |
/// | `gradients` | R·H·(D+1) from the first [`train_step`](super::DecoderFree::train_step) on |
/// | `packed` | 8·[`Statistics::len`](crate::Statistics::len) + R·H from the first call in two phases with [`Statistics`](crate::Statistics) on |
/// | `workspace` | 8 · [`Backend::workspace_len_for`] the operations of the terms that are on |
///
/// `docs/memory.md` has the workspace's formula for CUDA and a bound for the CPU. With blocks of a fixed number of rows, R bytes a row grow with
/// the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PlanMemory {
    /// Activations and ∂L/∂z of a block.
    pub block: usize,
    /// Square matrix of the correlation term.
    pub correlation: usize,
    /// Square matrix of the weight-redundancy term.
    pub redundancy: usize,
    /// Row losses, and vectors over the latents.
    pub vectors: usize,
    /// ∂L/∂W and ∂L/∂b in training.
    pub gradients: usize,
    /// [`Statistics`](crate::Statistics) of the host's memory in the backend's.
    pub packed: usize,
    /// The backend's scratch.
    pub workspace: usize,
}

impl PlanMemory {
    /// All of it.
    pub fn total(&self) -> usize {
        let Self { block, correlation, redundancy, vectors, gradients, packed, workspace } = *self;
        block + correlation + redundancy + vectors + gradients + packed + workspace
    }
}

impl DecoderFreeConfig {
    /// What [`DecoderFree::new`](super::DecoderFree::new) would allocate on this backend; nothing is allocated here. A step takes no more, a step
    /// of training the gradients too: [`PlanMemory`] has the formula.
    ///
    /// ```
    /// use sae_kernels::{Cpu, DecoderFreeConfig, Shape};
    ///
    /// # fn main() -> sae_kernels::Result<()> {
    /// let config = DecoderFreeConfig::new(Shape { rows: 65_536, inputs: 768, latents: 4096 });
    /// let in_blocks = DecoderFreeConfig { block_rows: Some(2048), ..config };
    /// let cpu = Cpu::<f32>::new()?;
    /// assert!(in_blocks.memory(&cpu)?.total() < config.memory(&cpu)?.total() / 4);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`DecoderFree::new`](super::DecoderFree::new), but for those of allocations.
    pub fn memory<B: Backend>(&self, backend: &B) -> Result<PlanMemory> {
        let lens = Lens::new(backend, self, true)?;
        let (element, real) = (size_of::<B::Element>(), size_of::<B::Real>());
        let bytes = || {
            let vectors = self.shape.rows.checked_add(VECTORS_OF_REAL.checked_mul(self.shape.latents)?)?;
            let sums = VECTORS_OF_F64.checked_mul(self.shape.latents)?.checked_add(SCALARS)?;
            Some(PlanMemory {
                block: lens.block.checked_mul(2 * element)?,
                correlation: lens.coupling.checked_mul(real)?,
                redundancy: lens.weight_gram.checked_mul(real)?,
                vectors: vectors.checked_mul(real)?.checked_add(sums.checked_mul(size_of::<f64>())?)?,
                gradients: 0,
                packed: 0,
                workspace: lens.workspace.checked_mul(size_of::<f64>())?,
            })
        };
        bytes().ok_or(Error::Overflow { what: "a plan's memory" })
    }
}

/// Shift, mean, variance, scale and offset.
const VECTORS_OF_REAL: usize = 5;
/// Sums, and sums of squares.
const VECTORS_OF_F64: usize = 2;
/// The sum of row losses, three terms, and what [`FusedStep`](crate::operations::FusedStep) keeps.
const SCALARS: usize = 5;

/// Elements of a plan's buffers, but for vectors.
pub(super) struct Lens {
    pub block_rows: usize,
    /// Of the activations, and as many of ∂L/∂z.
    pub block: usize,
    pub coupling: usize,
    pub weight_gram: usize,
    pub workspace: usize,
}

impl Lens {
    /// What can happen in `step`; the two-phase calls make buffers longer when first used. Without an encoder there is no memory for its
    /// activations and their gradient.
    pub(super) fn new<B: Backend>(backend: &B, config: &DecoderFreeConfig, encoder: bool) -> Result<Self> {
        let Shape { rows, inputs, latents } = config.shape;
        if latents == 0 {
            return Err(Error::NoLatents);
        }
        config.objective.check()?;
        let block_rows = config.block_rows.unwrap_or(rows).min(rows);
        if block_rows == 0 && rows > 0 {
            return Err(Error::Configuration { name: "block_rows", value: 0.0, requirement: "at least 1" });
        }
        let block = block_rows.checked_mul(latents).ok_or(Error::Overflow { what: "the block of activations" })?;
        let correlates = config.objective.lambda_tc != 0.0;
        let primal = correlates
            && match config.correlation_form {
                Form::Auto => block_rows < rows || latents <= rows,
                form => form == Form::Primal,
            };
        // Smaller batches may be computed in the dual form where the largest is not.
        let dual_rows = match config.correlation_form {
            _ if !correlates => 0,
            Form::Primal => 0,
            Form::Dual => block_rows,
            Form::Auto => block_rows.min(latents - 1),
        };
        let primal_len = if primal { square(latents)? } else { 0 };
        let (redundancy, weight_side) = match config.weight_form.is_dual(latents, inputs) {
            true => (Operation::DualRedundancy, inputs),
            false => (Operation::PrimalRedundancy, latents),
        };
        let weighs = config.objective.lambda_wr != 0.0;

        let within = |operation, rows| (operation, Shape { rows, ..config.shape });
        let mut operations = vec![within(Operation::Backward, block_rows)];
        operations.extend(match encoder {
            true => [within(Operation::Encode, block_rows), within(Operation::Product, block_rows)],
            false => [within(Operation::ActivationSums, block_rows), within(Operation::Product, 0)],
        });
        if encoder && config.correlation_form != Form::Dual {
            operations.push(within(Operation::FusedStep, block_rows));
        }
        if config.objective.needs_statistics() {
            operations.push(within(Operation::Variance, block_rows));
        }
        if primal {
            operations.extend(primal_operations(config.shape, block_rows));
        }
        if dual_rows > 0 {
            operations.push(within(Operation::DualCorrelation, dual_rows));
        }
        if weighs {
            operations.push(within(redundancy, block_rows));
        }
        Ok(Self {
            block_rows,
            block: if encoder { block } else { 0 },
            coupling: primal_len.max(square(dual_rows)?),
            weight_gram: if weighs { square(weight_side)? } else { 0 },
            workspace: backend.workspace_len_for(&operations)?,
        })
    }
}

/// Elements of a square matrix.
pub(super) fn square(side: usize) -> Result<usize> {
    side.checked_mul(side).ok_or(Error::Overflow { what: "a square matrix" })
}

/// What a primal correlation takes a workspace for.
pub(super) fn primal_operations(shape: Shape, block_rows: usize) -> [(Operation, Shape); 2] {
    let shape = Shape { rows: block_rows, ..shape };
    [(Operation::PrimalCorrelation, shape), (Operation::PrimalBackward, shape)]
}
