//! Memory that a call leaves for the next one like it: to make it takes longer than a small step.

use sae_kernels::{ActivationLosses, Backend, Buffer, DecoderFree, DecoderFreeConfig, Objective, Result, Shape};
use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What owns the memory of a kind of call, for batches up to a shape.
pub(crate) trait Plan: Any + Send + Sized {
    type Backend: Backend;
    fn make(backend: Self::Backend, shape: Shape, objective: Objective) -> Result<Self>;
    fn serves(&self, shape: Shape, objective: &Objective) -> bool;
}

fn fits(planned: Shape, shape: Shape) -> bool {
    (planned.inputs, planned.latents) == (shape.inputs, shape.latents) && planned.rows >= shape.rows
}

impl<B: Backend + 'static> Plan for DecoderFree<B> {
    type Backend = B;
    fn make(backend: B, shape: Shape, objective: Objective) -> Result<Self> {
        DecoderFree::new(backend, DecoderFreeConfig { objective, ..DecoderFreeConfig::new(shape) })
    }
    fn serves(&self, shape: Shape, objective: &Objective) -> bool {
        fits(self.config().shape, shape) && self.config().objective == *objective
    }
}

impl<B: Backend + 'static> Plan for ActivationLosses<B> {
    type Backend = B;
    fn make(backend: B, shape: Shape, objective: Objective) -> Result<Self> {
        ActivationLosses::new(backend, shape, objective)
    }
    fn serves(&self, shape: Shape, objective: &Objective) -> bool {
        fits(self.shape(), shape) && self.objective() == objective
    }
}

/// A backend and its workspace, for single operations; any objective will do.
pub(crate) struct Scratch<B: Backend> {
    pub(crate) backend: B,
    pub(crate) workspace: Buffer<B, f64>,
    shape: Shape,
}

impl<B: Backend + 'static> Plan for Scratch<B> {
    type Backend = B;
    fn make(backend: B, shape: Shape, _: Objective) -> Result<Self> {
        let workspace = backend.alloc(backend.workspace_len(shape)?)?;
        Ok(Self { backend, workspace, shape })
    }
    fn serves(&self, shape: Shape, _: &Objective) -> bool {
        fits(self.shape, shape)
    }
}

type Kept = HashMap<(TypeId, &'static str), Box<dyn Any + Send>>;

/// At most one plan of each kind, for each name.
#[derive(Default)]
pub(crate) struct Plans(Mutex<Kept>);

impl Plans {
    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Works with the plan that is there, if it serves, else with a new one, and keeps it.
    ///
    /// The plan is taken out for that time. So threads do not wait for each other, and a panic takes the plan with it.
    pub(crate) fn with<P: Plan, R>(
        &self,
        name: &'static str,
        shape: Shape,
        objective: &Objective,
        backend: impl FnOnce() -> Result<P::Backend>,
        work: impl FnOnce(&mut P) -> Result<R>,
    ) -> Result<R> {
        let key = (TypeId::of::<P>(), name);
        let kept = self.lock().remove(&key).and_then(|plan| plan.downcast::<P>().ok());
        // The memory of one that does not serve goes before that of the new one comes.
        let mut plan = match kept.filter(|plan| plan.serves(shape, objective)) {
            Some(plan) => plan,
            None => Box::new(P::make(backend()?, shape, *objective)?),
        };
        let result = work(&mut plan);
        self.lock().insert(key, plan);
        result
    }
}
