//! The table of operations: one line an operation, the same for every backend.
//!
//! An operation's arguments, shapes, formula, units, errors and source stand with its argument struct in
//! [`operations`](crate::operations). Each struct also checks its own shapes, once for all backends.

use crate::element::Element;
use crate::error::Result;
use crate::matrix::{MatMut, MatRef, Memory};
use crate::operations::*;

/// A slice in the backend's memory.
pub type Slice<'a, B, T> = <<B as Backend>::Memory as Memory>::Slice<'a, T>;
/// A mutable slice in the backend's memory.
pub type SliceMut<'a, B, T> = <<B as Backend>::Memory as Memory>::SliceMut<'a, T>;
/// An owned buffer in the backend's memory.
pub type Buffer<B, T> = <<B as Backend>::Memory as Memory>::Buffer<T>;
/// A matrix in the backend's memory.
pub type Mat<'a, B, T> = MatRef<'a, T, <B as Backend>::Memory>;
/// A mutable matrix in the backend's memory.
pub type MatOut<'a, B, T> = MatMut<'a, T, <B as Backend>::Memory>;

/// Extents of a problem: N rows in a block, D inputs, H latents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    /// N, the largest number of rows in one call.
    pub rows: usize,
    /// D, the width of the input.
    pub inputs: usize,
    /// H, the number of latents.
    pub latents: usize,
}

/// An implementation of the table of operations for one kind of memory and one storage type.
///
/// Calls neither allocate nor wait: buffers come from [`alloc`](Backend::alloc), scratch from a workspace whose size
/// [`workspace_len`](Backend::workspace_len) tells for a shape, or [`workspace_len_for`](Backend::workspace_len_for) for some operations, and a
/// backend on a device only enqueues ([`download`](Backend::download) waits). The workspace's content never matters and is undefined after a call.
///
/// The same call with the same inputs gives the same bits again, whatever the number of threads.
pub trait Backend: Send + Sync {
    /// Where the backend computes.
    type Memory: Memory;
    /// Storage type of inputs, weights and activations.
    type Element: Element;
    /// Type of biases, gradients, row losses and statistics: `f32`, or `f64` for the reference.
    type Real: Element;

    /// A zeroed buffer whose memory is already mapped.
    fn alloc<T: Element>(&self, len: usize) -> Result<Buffer<Self, T>>;
    /// Copies from the host; the lengths must agree.
    fn upload<T: Element>(&self, source: &[T], target: SliceMut<'_, Self, T>) -> Result<()>;
    /// Copies to the host, once everything enqueued before is done; the lengths must agree.
    fn download<T: Element>(&self, source: Slice<'_, Self, T>, target: &mut [T]) -> Result<()>;
    /// Number of `f64` that a workspace must have for one operation within `shape`.
    ///
    /// # Errors
    /// [`Error::Overflow`](crate::Error::Overflow).
    fn workspace_len_of(&self, operation: Operation, shape: Shape) -> Result<usize>;
    /// Number of `f64` that a workspace must have for each of these operations within its shape.
    ///
    /// # Errors
    /// As [`workspace_len_of`](Self::workspace_len_of).
    fn workspace_len_for(&self, operations: &[(Operation, Shape)]) -> Result<usize> {
        operations
            .iter()
            .try_fold(0, |most, (operation, shape)| Ok(most.max(self.workspace_len_of(*operation, *shape)?)))
    }
    /// Number of `f64` that a workspace must have for any operation of the table within `shape`. Some need far more than others, such as those
    /// with matrices of H×H numbers.
    ///
    /// # Errors
    /// As [`workspace_len_of`](Self::workspace_len_of).
    fn workspace_len(&self, shape: Shape) -> Result<usize> {
        self.workspace_len_for(&Operation::ALL.map(|operation| (operation, shape)))
    }

    // Encoder
    /// z = x Wᵀ + b, a = f(z), row log-sum-exp and column moments, in one pass.
    fn encode(&self, args: Encode<'_, Self>) -> Result<()>;
    /// Row log-sum-exp and column moments of given activations.
    fn activation_sums(&self, args: ActivationSums<'_, Self>) -> Result<()>;
    /// r_nj = exp(ℓ_n − a_nj).
    fn responsibilities(&self, args: Responsibilities<'_, Self>) -> Result<()>;

    // Batch statistics
    /// Moves the shift of the moments to the mean.
    fn recentre(&self, args: Recentre<'_, Self>) -> Result<()>;
    /// Σ_n (a − c)(a − c)ᵀ.
    fn comoments(&self, args: Comoments<'_, Self>) -> Result<()>;
    /// Adds a block's moments and comoments to the sums over the whole batch.
    fn pack_statistics(&self, args: PackStatistics<'_, Self>) -> Result<()>;
    /// Moments and comoments of the whole batch from those sums.
    fn unpack_statistics(&self, args: UnpackStatistics<'_, Self>) -> Result<()>;
    /// Variance and correlation losses, and what the backward pass needs of them.
    fn finish_statistics(&self, args: FinishStatistics<'_, Self>) -> Result<()>;
    /// The correlation term over pairs of rows instead of pairs of latents.
    fn correlation_dual(&self, args: CorrelationDual<'_, Self>) -> Result<()>;

    // Backward
    /// ∂L/∂z and ∂L/∂b of the decoder-free objective.
    fn backward_dz(&self, args: BackwardDz<'_, Self>) -> Result<()>;
    /// A plain matrix product, for ∂L/∂W = dZᵀ x and ∂L/∂x = dZ W.
    fn product(&self, args: Product<'_, Self>) -> Result<()>;
    /// Σ_n m_nj.
    fn column_sums(&self, args: ColumnSums<'_, Self>) -> Result<()>;
    /// ‖Ŵ Ŵᵀ − I‖² and its gradient.
    fn weight_redundancy(&self, args: WeightRedundancy<'_, Self>) -> Result<()>;

    // Decoder of the standard sparse autoencoder
    /// x̂ = a W + b, squared error against the input, and its gradient.
    fn decode(&self, args: Decode<'_, Self>) -> Result<()>;
    /// ∂L/∂z of reconstruction and L1 loss.
    fn decode_backward(&self, args: DecodeBackward<'_, Self>) -> Result<()>;

    // Optimisers
    /// Stochastic gradient descent with momentum.
    fn sgd(&self, args: Sgd<'_, Self>) -> Result<()>;
    /// Adam with decoupled weight decay.
    fn adam(&self, args: Adam<'_, Self>) -> Result<()>;
    /// A product for ∂L/∂W, and the optimiser's step with it.
    fn product_update(&self, args: ProductUpdate<'_, Self>) -> Result<()> {
        product_then_update(self, args)
    }

    // Whole steps
    /// A batch's losses, and gradients or updates, at once: true if the backend has a way to for these extents, else nothing is done. It
    /// depends on the extents of the call alone, so that a plan that is larger than a batch changes nothing.
    fn fused_step(&self, args: FusedStep<'_, Self>) -> Result<bool> {
        let _ = args;
        Ok(false)
    }
}

/// A product and the optimiser's step, one after the other.
pub(crate) fn product_then_update<B: Backend + ?Sized>(backend: &B, mut args: ProductUpdate<'_, B>) -> Result<()> {
    let (m, n, _) = args.check()?;
    backend.product(Product {
        layout: Layout::Tn,
        left: args.left,
        right: args.right,
        accumulate: args.accumulate,
        out: MatMut::from_memory(B::Memory::reborrow(&mut args.gradient), m, n, n)?,
        workspace: B::Memory::reborrow(&mut args.workspace),
    })?;
    update(backend, &mut args.optimizer, B::Memory::as_ref(&args.gradient), &mut args.parameters, &mut args.storage)
}

/// The optimiser's step alone.
pub(crate) fn update<B: Backend + ?Sized>(
    backend: &B,
    optimizer: &mut Optimizer<'_, B>,
    gradient: Slice<'_, B, B::Real>,
    parameters: &mut SliceMut<'_, B, B::Real>,
    storage: &mut Option<SliceMut<'_, B, B::Element>>,
) -> Result<()> {
    let gradient = B::Memory::shorten(gradient);
    let parameters = B::Memory::reborrow(parameters);
    let storage = storage.as_mut().map(B::Memory::reborrow);
    match optimizer {
        Optimizer::Sgd { config, velocity } => {
            let velocity = B::Memory::reborrow(velocity);
            backend.sgd(Sgd { config: *config, gradient, velocity, parameters, storage })
        }
        Optimizer::Adam { config, step, first_moment, second_moment } => {
            let (first_moment, second_moment) = (B::Memory::reborrow(first_moment), B::Memory::reborrow(second_moment));
            backend.adam(Adam {
                config: *config,
                step: *step,
                gradient,
                first_moment,
                second_moment,
                parameters,
                storage,
            })
        }
    }
}
