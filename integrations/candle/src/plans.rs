//! Memory that a call leaves for the next one like it: to make it takes longer than a small step.

use crate::error::Result;
use crate::place::{Place, PlaceId};
use sae_kernels::operations::Operation;
use sae_kernels::{ActivationLosses, Backend, Buffer, DecoderFree, DecoderFreeConfig, Objective, Shape};
use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What owns the memory of a kind of call, for batches up to a shape.
pub(crate) trait Plan: Any + Send + Sized {
    type Backend: Backend;
    fn make(backend: Self::Backend, shape: Shape, objective: Objective) -> sae_kernels::Result<Self>;
    fn serves(&self, shape: Shape, objective: &Objective) -> bool;
}

fn fits(planned: Shape, shape: Shape) -> bool {
    (planned.inputs, planned.latents) == (shape.inputs, shape.latents) && planned.rows >= shape.rows
}

impl<B: Backend + 'static> Plan for DecoderFree<B> {
    type Backend = B;
    fn make(backend: B, shape: Shape, objective: Objective) -> sae_kernels::Result<Self> {
        DecoderFree::new(backend, DecoderFreeConfig { objective, ..DecoderFreeConfig::new(shape) })
    }
    fn serves(&self, shape: Shape, objective: &Objective) -> bool {
        fits(self.config().shape, shape) && self.config().objective == *objective
    }
}

impl<B: Backend + 'static> Plan for ActivationLosses<B> {
    type Backend = B;
    fn make(backend: B, shape: Shape, objective: Objective) -> sae_kernels::Result<Self> {
        ActivationLosses::new(backend, shape, objective)
    }
    fn serves(&self, shape: Shape, objective: &Objective) -> bool {
        fits(self.shape(), shape) && self.objective() == objective
    }
}

/// A backend and its workspace, for an encoder and its backward pass; any objective will do.
pub(crate) struct Scratch<B: Backend> {
    pub(crate) backend: B,
    pub(crate) workspace: Buffer<B, f64>,
    shape: Shape,
}

impl<B: Backend + 'static> Plan for Scratch<B> {
    type Backend = B;
    fn make(backend: B, shape: Shape, _: Objective) -> sae_kernels::Result<Self> {
        // Others need far more.
        let operations = [Operation::Encode, Operation::Product, Operation::ColumnSums];
        let workspace = backend.alloc(backend.workspace_len_for(&operations.map(|operation| (operation, shape)))?)?;
        Ok(Self { backend, workspace, shape })
    }
    fn serves(&self, shape: Shape, _: &Objective) -> bool {
        fits(self.shape, shape)
    }
}

/// A plan's type, the name of the call, and where it computes.
type Key = (TypeId, &'static str, PlaceId);

/// At most one plan of each kind, for each name and place.
#[derive(Default)]
pub(crate) struct Plans(Mutex<HashMap<Key, Box<dyn Any + Send>>>);

impl Plans {
    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Box<dyn Any + Send>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Works with the plan that is there, if it serves, else with a new one, and keeps it.
    ///
    /// The plan is taken out for that time. So threads do not wait for each other, and a panic takes the plan with it.
    pub(crate) fn with<P: Place, L: Plan<Backend = P::Backend>, R>(
        &self,
        name: &'static str,
        place: &P,
        shape: Shape,
        objective: &Objective,
        work: impl FnOnce(&mut L) -> Result<R>,
    ) -> Result<R> {
        let key = (TypeId::of::<L>(), name, place.id());
        let kept = self.lock().remove(&key).and_then(|plan| plan.downcast::<L>().ok());
        // The memory of one that does not serve goes before that of the new one comes.
        let mut plan = match kept.filter(|plan| plan.serves(shape, objective)) {
            Some(plan) => plan,
            None => Box::new(L::make(place.backend()?, shape, *objective)?),
        };
        let result = work(&mut plan);
        self.lock().insert(key, plan);
        result
    }
}
