//! What a context keeps from call to call.

use super::buffer::check_pointer;
use super::call::Failure;
use super::saek_context;
use crate::backend::Shape;
use crate::cpu::Cpu;
use crate::decoder_free::{DecoderFree, DecoderFreeConfig};
use crate::objective::Objective;
use std::sync::MutexGuard;

/// The memory of the last step, and what it was made for.
pub(super) type Plan = Option<DecoderFree<Cpu<f32>>>;

impl saek_context {
    pub(super) fn lock(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(|poisoned| {
            // A panic has left this plan in the middle of a step.
            self.plan.clear_poison();
            let mut plan = poisoned.into_inner();
            *plan = None;
            plan
        })
    }

    /// The plan that is there, if it serves the shape and its objective is `right`, else a new one.
    pub(super) fn plan<'a>(
        &self,
        plan: &'a mut Plan,
        shape: Shape,
        objective: Objective,
        right: impl Fn(&Objective) -> bool,
    ) -> crate::Result<&'a mut DecoderFree<Cpu<f32>>> {
        let serves = |planned: &DecoderFreeConfig| {
            (planned.shape.inputs, planned.shape.latents) == (shape.inputs, shape.latents)
                && planned.shape.rows >= shape.rows
                && right(&planned.objective)
        };
        if !plan.as_ref().is_some_and(|plan| serves(plan.config())) {
            // The old one's memory first.
            *plan = None;
        }
        match plan {
            Some(plan) => Ok(plan),
            none => {
                let config = DecoderFreeConfig { objective, ..DecoderFreeConfig::new(shape) };
                Ok(none.insert(DecoderFree::new(self.cpu.clone(), config)?))
            }
        }
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
    use std::sync::Mutex;

    #[test]
    fn a_panic_takes_the_plan_with_it_and_nothing_else() {
        let cpu = Cpu::with(Isa::detect(), 1).expect("one thread");
        let context = saek_context { cpu, plan: Mutex::new(None) };
        let shape = Shape { rows: 2, inputs: 3, latents: 4 };
        let objective = Objective::default();
        for _ in 0..2 {
            assert!(context.lock().is_none(), "a plan that a panic has interrupted");
            let code = call::status(|| {
                let mut plan = context.lock();
                context.plan(&mut plan, shape, objective, |planned| *planned == objective)?;
                panic!("in the middle of a step");
            });
            assert_eq!(code, SAEK_ERROR_PANIC);
        }
        drop(context.lock());
        assert!(context.plan.lock().is_ok(), "once thrown away, the poison is gone");
    }
}
