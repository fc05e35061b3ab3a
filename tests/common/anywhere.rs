//! A step of the decoder-free model on any backend, in the backend's own memory.

use sae_kernels::{
    Backend, DecoderFree, DecoderFreeConfig, DecoderFreeStep, Element, Losses, MatMut, MatRef, Memory, Result,
};

/// Inputs and configuration of a step.
pub struct Step {
    pub config: DecoderFreeConfig,
    pub x: Vec<f64>,
    pub weight: Vec<f64>,
    pub bias: Vec<f64>,
}

/// What a step gives.
pub struct Gradients {
    pub losses: Losses,
    pub weight: Vec<f64>,
    pub bias: Vec<f64>,
    pub x: Vec<f64>,
}

impl Step {
    pub fn run<B: Backend>(&self, backend: B) -> Result<Gradients> {
        let shape = self.config.shape;
        let (n, d, h) = (shape.rows, shape.inputs, shape.latents);
        let mut model = DecoderFree::new(backend, self.config)?;
        let x = upload::<B, B::Element>(model.backend(), &self.x)?;
        let weight = upload::<B, B::Element>(model.backend(), &self.weight)?;
        let bias = upload::<B, B::Real>(model.backend(), &self.bias)?;
        let mut grad_weight = model.backend().alloc::<B::Real>(h * d)?;
        let mut grad_bias = model.backend().alloc::<B::Real>(h)?;
        let mut grad_x = model.backend().alloc::<B::Real>(n * d)?;
        model.step(DecoderFreeStep {
            x: MatRef::from_memory(B::Memory::slice(&x), n, d, d)?,
            weight: MatRef::from_memory(B::Memory::slice(&weight), h, d, d)?,
            bias: B::Memory::slice(&bias),
            grad_weight: MatMut::from_memory(B::Memory::slice_mut(&mut grad_weight), h, d, d)?,
            grad_bias: B::Memory::slice_mut(&mut grad_bias),
            grad_x: Some(MatMut::from_memory(B::Memory::slice_mut(&mut grad_x), n, d, d)?),
            activations: None,
            row_loss: None,
        })?;
        Ok(Gradients {
            losses: model.losses()?,
            weight: download::<B>(model.backend(), &grad_weight, h * d)?,
            bias: download::<B>(model.backend(), &grad_bias, h)?,
            x: download::<B>(model.backend(), &grad_x, n * d)?,
        })
    }
}

fn upload<B: Backend, T: Element>(backend: &B, values: &[f64]) -> Result<<B::Memory as Memory>::Buffer<T>> {
    let values: Vec<T> = values.iter().map(|value| T::from_f64(*value)).collect();
    let mut buffer = backend.alloc::<T>(values.len())?;
    backend.upload(&values, B::Memory::slice_mut(&mut buffer))?;
    Ok(buffer)
}

fn download<B: Backend>(backend: &B, buffer: &<B::Memory as Memory>::Buffer<B::Real>, len: usize) -> Result<Vec<f64>> {
    let mut values = vec![B::Real::from_f64(0.0); len];
    backend.download(B::Memory::slice(buffer), &mut values)?;
    Ok(values.iter().map(|value| value.to_f64()).collect())
}
