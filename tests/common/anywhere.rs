//! A step of the decoder-free model on any backend, in the backend's own memory.

use sae_kernels::operations::{Adam, AdamConfig};
use sae_kernels::{
    Backend, Buffer, DecoderFree, DecoderFreeConfig, DecoderFreeStep, Element, Losses, MatMut, MatRef, Memory, Result,
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

fn download<B: Backend>(backend: &B, buffer: &Buffer<B, B::Real>, len: usize) -> Result<Vec<f64>> {
    downloaded::<B, B::Real>(backend, buffer, len)
}

fn downloaded<B: Backend, T: Element>(backend: &B, buffer: &Buffer<B, T>, len: usize) -> Result<Vec<f64>> {
    let mut values = vec![T::from_f64(0.0); len];
    backend.download(B::Memory::slice(buffer), &mut values)?;
    Ok(values.iter().map(|value| value.to_f64()).collect())
}

/// A step and an update of the weight, over and over in the same buffers: what a program captures into a graph.
pub struct Training<B: Backend> {
    model: DecoderFree<B>,
    x: Buffer<B, B::Element>,
    weight: Buffer<B, B::Element>,
    bias: Buffer<B, B::Real>,
    grad_weight: Buffer<B, B::Real>,
    grad_bias: Buffer<B, B::Real>,
    grad_x: Buffer<B, B::Real>,
    parameters: Buffer<B, B::Real>,
    first_moment: Buffer<B, B::Real>,
    second_moment: Buffer<B, B::Real>,
}

impl<B: Backend> Training<B> {
    pub fn new(backend: B, config: DecoderFreeConfig) -> Result<Self> {
        let (n, d, h) = (config.shape.rows, config.shape.inputs, config.shape.latents);
        Ok(Self {
            x: backend.alloc(n * d)?,
            weight: backend.alloc(h * d)?,
            bias: backend.alloc(h)?,
            grad_weight: backend.alloc(h * d)?,
            grad_bias: backend.alloc(h)?,
            grad_x: backend.alloc(n * d)?,
            parameters: backend.alloc(h * d)?,
            first_moment: backend.alloc(h * d)?,
            second_moment: backend.alloc(h * d)?,
            model: DecoderFree::new(backend, config)?,
        })
    }

    /// The inputs of a step, and an optimiser that has not begun.
    pub fn load(&mut self, step: &Step) -> Result<()> {
        fn fill<B: Backend, T: Element>(backend: &B, buffer: &mut Buffer<B, T>, values: &[f64]) -> Result<()> {
            let values: Vec<T> = values.iter().map(|value| T::from_f64(*value)).collect();
            backend.upload(&values, B::Memory::slice_mut(buffer))
        }
        let backend = self.model.backend();
        let zeros = vec![0.0; step.weight.len()];
        fill::<B, B::Element>(backend, &mut self.x, &step.x)?;
        fill::<B, B::Element>(backend, &mut self.weight, &step.weight)?;
        fill::<B, B::Real>(backend, &mut self.bias, &step.bias)?;
        fill::<B, B::Real>(backend, &mut self.parameters, &step.weight)?;
        fill::<B, B::Real>(backend, &mut self.first_moment, &zeros)?;
        fill::<B, B::Real>(backend, &mut self.second_moment, &zeros)
    }

    /// Enqueues the step and the update.
    pub fn enqueue(&mut self) -> Result<()> {
        let shape = self.model.config().shape;
        let (n, d, h) = (shape.rows, shape.inputs, shape.latents);
        self.model.step(DecoderFreeStep {
            x: MatRef::from_memory(B::Memory::slice(&self.x), n, d, d)?,
            weight: MatRef::from_memory(B::Memory::slice(&self.weight), h, d, d)?,
            bias: B::Memory::slice(&self.bias),
            grad_weight: MatMut::from_memory(B::Memory::slice_mut(&mut self.grad_weight), h, d, d)?,
            grad_bias: B::Memory::slice_mut(&mut self.grad_bias),
            grad_x: Some(MatMut::from_memory(B::Memory::slice_mut(&mut self.grad_x), n, d, d)?),
            activations: None,
            row_loss: None,
        })?;
        self.model.backend().adam(Adam {
            config: AdamConfig::default(),
            step: 1,
            gradient: B::Memory::slice(&self.grad_weight),
            first_moment: B::Memory::slice_mut(&mut self.first_moment),
            second_moment: B::Memory::slice_mut(&mut self.second_moment),
            parameters: B::Memory::slice_mut(&mut self.parameters),
            storage: Some(B::Memory::slice_mut(&mut self.weight)),
        })
    }

    /// All that the step and the update write.
    pub fn outcome(&self) -> Result<Vec<(&'static str, Vec<f64>)>> {
        let (backend, shape) = (self.model.backend(), self.model.config().shape);
        let (n, d, h) = (shape.rows, shape.inputs, shape.latents);
        let Losses { lse, var, tc, wr, total } = self.model.losses()?;
        Ok(vec![
            ("losses", vec![lse, var, tc, wr, total]),
            ("dW", downloaded::<B, B::Real>(backend, &self.grad_weight, h * d)?),
            ("db", downloaded::<B, B::Real>(backend, &self.grad_bias, h)?),
            ("dx", downloaded::<B, B::Real>(backend, &self.grad_x, n * d)?),
            ("parameters", downloaded::<B, B::Real>(backend, &self.parameters, h * d)?),
            ("first moment", downloaded::<B, B::Real>(backend, &self.first_moment, h * d)?),
            ("second moment", downloaded::<B, B::Real>(backend, &self.second_moment, h * d)?),
            ("weight", downloaded::<B, B::Element>(backend, &self.weight, h * d)?),
        ])
    }
}
