//! What a context keeps from call to call.

use super::buffer::check_pointer;
use super::call::Failure;
use super::memory::Addressed;
use super::{SAEK_ERROR_DEVICE, saek_context};
use crate::backend::{Backend, Shape};
use crate::cpu::{Cpu, CpuElement};
#[cfg(feature = "cuda")]
use crate::cuda::{Cuda, CudaElement};
use crate::decoder_free::{ActivationLosses, DecoderFree, DecoderFreeConfig};
use crate::objective::Objective;
use crate::reference::Reference;
use std::any::Any;
use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard};

/// A plan of any type.
type Kept = Option<Box<dyn Any + Send>>;

/// The memory of the last call of each kind.
#[derive(Default)]
pub(super) struct Plans {
    step: Kept,
    activations: Kept,
    /// Losses of a weight alone.
    weight: Kept,
}

/// Where a context computes. The storage type is the call's.
pub(super) enum Device {
    Cpu(Cpu<f32>),
    #[cfg(feature = "cuda")]
    Cuda(Cuda<f32>),
}

impl Device {
    /// A CUDA device, in the caller's stream.
    ///
    /// # Safety
    /// The stream is NULL or a stream, and outlives the device.
    #[cfg(feature = "cuda")]
    pub(super) unsafe fn cuda(ordinal: usize, stream: *mut c_void) -> Result<Self, Failure> {
        // SAFETY: the caller's promise.
        Ok(Self::Cuda(unsafe { Cuda::on_raw_stream(ordinal, stream) }?))
    }
    #[cfg(not(feature = "cuda"))]
    pub(super) unsafe fn cuda(_: usize, _: *mut c_void) -> Result<Self, Failure> {
        let text = "the library is built without CUDA; build it with --features capi,cuda (the Python package: \
                    SAE_KERNELS_FEATURES=cuda pip install ./python), or compute on the CPU";
        Err(Failure::new(SAEK_ERROR_DEVICE, text.into()))
    }

    fn cpu(&self) -> Result<&Cpu<f32>, Failure> {
        match self {
            Self::Cpu(cpu) => Ok(cpu),
            // `compute!` sends all other types elsewhere.
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => {
                let text = "a CUDA context has no double; call the function for f32, bf16 or f16, or use a context of \
                            saek_context_create_cpu";
                Err(Failure::new(SAEK_ERROR_DEVICE, text.into()))
            }
        }
    }
}

/// What calls compute with.
pub(super) trait ContextBackend: Backend<Memory: Addressed> + Clone + 'static {
    fn of(context: &saek_context) -> Result<Self, Failure>;
}

impl<E: CpuElement> ContextBackend for Cpu<E> {
    fn of(context: &saek_context) -> Result<Self, Failure> {
        Ok(context.device.cpu()?.storing())
    }
}
/// `double`.
impl ContextBackend for Reference {
    fn of(context: &saek_context) -> Result<Self, Failure> {
        context.device.cpu().map(|_| Reference)
    }
}
#[cfg(feature = "cuda")]
impl<E: CudaElement> ContextBackend for Cuda<E> {
    fn of(context: &saek_context) -> Result<Self, Failure> {
        match &context.device {
            Device::Cuda(cuda) => Ok(cuda.storing()),
            Device::Cpu(_) => unreachable!("compute! asks first"),
        }
    }
}

/// Whether a call is one for CUDA. What is no context is for the call itself to refuse.
///
/// # Safety
/// As [`context_at`].
#[cfg(feature = "cuda")]
pub(super) unsafe fn is_cuda(context: *const saek_context) -> bool {
    // SAFETY: the caller's promise.
    unsafe { context_at(context) }.is_ok_and(|context| matches!(context.device, Device::Cuda(_)))
}

/// What owns the memory of a kind of call.
pub(super) trait Plan: Any + Send + Sized {
    type Backend: Clone;
    fn make(backend: Self::Backend, shape: Shape, objective: Objective) -> crate::Result<Self>;
    fn shape(&self) -> Shape;
    fn objective(&self) -> &Objective;
    fn kept(plans: &mut Plans, shape: Shape) -> &mut Kept;
}

impl<B: ContextBackend> Plan for DecoderFree<B> {
    type Backend = B;
    fn make(backend: B, shape: Shape, objective: Objective) -> crate::Result<Self> {
        DecoderFree::new(backend, DecoderFreeConfig { objective, ..DecoderFreeConfig::new(shape) })
    }
    fn shape(&self) -> Shape {
        self.config().shape
    }
    fn objective(&self) -> &Objective {
        &self.config().objective
    }
    fn kept(plans: &mut Plans, _: Shape) -> &mut Kept {
        &mut plans.step
    }
}

impl<B: ContextBackend> Plan for ActivationLosses<B> {
    type Backend = B;
    fn make(backend: B, shape: Shape, objective: Objective) -> crate::Result<Self> {
        ActivationLosses::new(backend, shape, objective)
    }
    fn shape(&self) -> Shape {
        ActivationLosses::shape(self)
    }
    fn objective(&self) -> &Objective {
        ActivationLosses::objective(self)
    }
    fn kept(plans: &mut Plans, shape: Shape) -> &mut Kept {
        if shape.rows == 0 { &mut plans.weight } else { &mut plans.activations }
    }
}

impl saek_context {
    /// What [`saek_context_destroy`](super::saek_context_destroy) frees.
    pub(super) fn on(device: Device) -> *mut Self {
        Box::into_raw(Box::new(Self { device, plans: Mutex::default() }))
    }

    /// A context on any device that answers as a driver does, for tests. Not part of the API.
    #[cfg(feature = "cuda")]
    #[doc(hidden)]
    pub fn on_driver(driver: std::sync::Arc<dyn crate::cuda::driver::Driver>) -> *mut Self {
        Self::on(Device::Cuda(Cuda::on_driver(driver)))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Plans> {
        self.plans.lock().unwrap_or_else(|poisoned| {
            // A panic has left a plan in the middle of a call.
            self.plans.clear_poison();
            let mut plans = poisoned.into_inner();
            *plans = Plans::default();
            plans
        })
    }

    /// The plan that is there, if it serves the shape and its objective is `right`, else a new one.
    pub(super) fn plan<'a, P: Plan>(
        &self,
        plans: &'a mut Plans,
        backend: &P::Backend,
        shape: Shape,
        objective: Objective,
        right: impl Fn(&Objective) -> bool,
    ) -> crate::Result<&'a mut P> {
        let serves = |plan: &P| {
            let planned = plan.shape();
            (planned.inputs, planned.latents) == (shape.inputs, shape.latents)
                && planned.rows >= shape.rows
                && right(plan.objective())
        };
        let kept = P::kept(plans, shape);
        if !kept.as_ref().and_then(|kept| kept.downcast_ref()).is_some_and(serves) {
            // The old one's memory first.
            *kept = None;
            *kept = Some(Box::new(P::make(backend.clone(), shape, objective)?));
        }
        Ok(kept.as_mut().and_then(|kept| kept.downcast_mut()).expect("it serves, or was made just now"))
    }
}

/// # Safety
/// A pointer that is neither NULL nor misaligned is to a context that lives for `'a`.
pub(super) unsafe fn context_at<'a>(context: *const saek_context) -> Result<&'a saek_context, Failure> {
    check_pointer::<saek_context>("context", context.addr(), 1)?;
    // SAFETY: the caller's promise.
    Ok(unsafe { &*context })
}

#[cfg(test)]
mod tests {
    use super::super::{SAEK_ERROR_PANIC, call};
    use super::*;
    use crate::cpu::Isa;

    #[test]
    fn a_panic_takes_the_plan_with_it_and_nothing_else() {
        let cpu = Cpu::with(Isa::detect(), 1).expect("one thread");
        let context = saek_context { device: Device::Cpu(cpu.clone()), plans: Mutex::default() };
        let shape = Shape { rows: 2, inputs: 3, latents: 4 };
        let objective = Objective::default();
        for _ in 0..2 {
            assert!(context.lock().step.is_none(), "a plan that a panic has interrupted");
            let code = call::status(|| {
                let mut plans = context.lock();
                context
                    .plan::<DecoderFree<Cpu>>(&mut plans, &cpu, shape, objective, |planned| *planned == objective)?;
                panic!("in the middle of a step");
            });
            assert_eq!(code, SAEK_ERROR_PANIC);
        }
        drop(context.lock());
        assert!(context.plans.lock().is_ok(), "once thrown away, the poison is gone");
    }

    #[test]
    fn each_kind_of_call_keeps_its_plan() {
        let cpu = Cpu::with(Isa::detect(), 1).expect("one thread");
        let context = saek_context { device: Device::Cpu(cpu.clone()), plans: Mutex::default() };
        let mut plans = context.lock();
        let shape = |rows| Shape { rows, inputs: 3, latents: 4 };
        let objective = Objective::default();
        let mut made = 0;
        for round in 0..2 {
            let new = |_: &Objective| round > 0;
            let mut count = |there: bool| made += usize::from(!there);
            count(plans.step.is_some());
            context.plan::<DecoderFree<Cpu>>(&mut plans, &cpu, shape(5), objective, new).expect("memory");
            count(plans.activations.is_some());
            context
                .plan::<ActivationLosses<Reference>>(&mut plans, &Reference, shape(5), objective, new)
                .expect("memory");
            count(plans.weight.is_some());
            context.plan::<ActivationLosses<Cpu>>(&mut plans, &cpu, shape(0), objective, new).expect("memory");
        }
        assert_eq!(made, 3);
        // Another type takes the place.
        context.plan::<ActivationLosses<Cpu>>(&mut plans, &cpu, shape(5), objective, |_| true).expect("memory");
        assert!(plans.activations.as_ref().is_some_and(|kept| kept.is::<ActivationLosses<Cpu>>()));
    }
}
