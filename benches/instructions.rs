//! Steps for `scripts/instructions.sh` to count the instructions of: fixed data, one thread, AVX2 (of which there is a simulator).

use sae_kernels::operations::{AdamConfig, Optimizer};
use sae_kernels::{
    Cpu, CpuElement, DecoderFree, DecoderFreeConfig, DecoderFreeStep, DecoderFreeTrainStep, Form, Isa, MatMut, MatRef,
    Shape, StandardConfig, StandardGradients, StandardParameters, StandardSae, Trained, bf16,
};

fn main() {
    let case = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    match case.as_deref() {
        Some("paper") => decoder_free::<f32>(PAPER, Form::Primal),
        Some("paper-bf16") => decoder_free::<bf16>(PAPER, Form::Primal),
        Some("dual") => decoder_free::<f32>(Shape { rows: 48, inputs: 64, latents: 256 }, Form::Dual),
        Some("training") => training(PAPER),
        Some("standard") => standard(PAPER),
        _ => println!("run by scripts/instructions.sh with a case: paper, paper-bf16, dual, training, standard"),
    }
}

const PAPER: Shape = Shape { rows: 128, inputs: 784, latents: 64 };

fn cpu<E: CpuElement>() -> Cpu<E> {
    Cpu::with(Isa::Avx2, 1).expect("instructions are counted on a processor with AVX2")
}

/// A Weyl sequence in [−1/2, 1/2).
fn values<E: CpuElement>(len: usize) -> Vec<E> {
    (1..=len as u32).map(|i| E::from_f64(f64::from(i.wrapping_mul(0x9e37_79b9)) / 2f64.powi(32) - 0.5)).collect()
}

fn decoder_free<E: CpuElement>(shape: Shape, correlation_form: Form) {
    let Shape { rows, inputs, latents } = shape;
    let mut config = DecoderFreeConfig::new(shape);
    config.correlation_form = correlation_form;
    config.objective.lambda_wr = 1.0;
    let (x, weight, bias) = (values::<E>(rows * inputs), values::<E>(latents * inputs), values::<f32>(latents));
    let (mut grad_weight, mut grad_bias) = (vec![0.0; latents * inputs], vec![0.0; latents]);
    let mut model = DecoderFree::new(cpu::<E>(), config).unwrap();
    model
        .step(DecoderFreeStep {
            x: MatRef::new(&x, rows, inputs).unwrap(),
            weight: MatRef::new(&weight, latents, inputs).unwrap(),
            bias: &bias,
            grad_weight: MatMut::new(&mut grad_weight, latents, inputs).unwrap(),
            grad_bias: &mut grad_bias,
            grad_x: None,
            activations: None,
            row_loss: None,
        })
        .unwrap();
}

fn adam<'a>(first_moment: &'a mut [f32], second_moment: &'a mut [f32]) -> Optimizer<'a, Cpu> {
    Optimizer::Adam { config: AdamConfig::default(), step: 1, first_moment, second_moment }
}

fn training(shape: Shape) {
    let Shape { rows, inputs, latents } = shape;
    let (x, mut weight, mut bias) =
        (values::<f32>(rows * inputs), values::<f32>(latents * inputs), values::<f32>(latents));
    let mut state = [latents * inputs, latents * inputs, latents, latents].map(|len| vec![0.0; len]);
    let [weight_first, weight_second, bias_first, bias_second] = &mut state;
    let mut model = DecoderFree::new(cpu::<f32>(), DecoderFreeConfig::new(shape)).unwrap();
    model
        .train_step(DecoderFreeTrainStep {
            x: MatRef::new(&x, rows, inputs).unwrap(),
            weight: Trained { parameters: &mut weight, storage: None, optimizer: adam(weight_first, weight_second) },
            bias: Trained { parameters: &mut bias, storage: None, optimizer: adam(bias_first, bias_second) },
            activations: None,
            row_loss: None,
        })
        .unwrap();
}

fn standard(shape: Shape) {
    let Shape { rows, inputs, latents } = shape;
    let (x, weight) = (values::<f32>(rows * inputs), values::<f32>(latents * inputs));
    let (encoder_bias, decoder_bias) = (values::<f32>(latents), values::<f32>(inputs));
    let (mut grad_encoder, mut grad_decoder) = (vec![0.0; latents * inputs], vec![0.0; latents * inputs]);
    let (mut grad_encoder_bias, mut grad_decoder_bias) = (vec![0.0; latents], vec![0.0; inputs]);
    let mut model = StandardSae::new(cpu::<f32>(), StandardConfig { shape, lambda_l1: 0.01 }).unwrap();
    let parameters = StandardParameters::<Cpu> {
        encoder_weight: MatRef::new(&weight, latents, inputs).unwrap(),
        encoder_bias: &encoder_bias,
        decoder_weight: MatRef::new(&weight, latents, inputs).unwrap(),
        decoder_bias: &decoder_bias,
    };
    let gradients = StandardGradients::<Cpu> {
        encoder_weight: MatMut::new(&mut grad_encoder, latents, inputs).unwrap(),
        encoder_bias: &mut grad_encoder_bias,
        decoder_weight: MatMut::new(&mut grad_decoder, latents, inputs).unwrap(),
        decoder_bias: &mut grad_decoder_bias,
    };
    model.step(MatRef::new(&x, rows, inputs).unwrap(), parameters, gradients).unwrap();
}
