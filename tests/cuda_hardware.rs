//! Whole steps on a real GPU against the CPU backend. Without one they show as ignored, with the reason; `SAE_KERNELS_REQUIRE_GPU=1` makes
//! that a failure, and makes the tests of every other file run their CUDA part on the GPU instead of the emulator.

mod common;

use common::anywhere::Step;
use common::{relative, rng, rounded, uniform};
use libtest_mimic::{Arguments, Failed, Trial};
use ptx_emulator::{Module, Options, conformance};
use sae_kernels::cudarc::driver::{CudaContext, LaunchConfig, PushKernelArg};
use sae_kernels::cudarc::nvrtc::Ptx;
use sae_kernels::{Cpu, CpuElement, Cuda, CudaElement, DecoderFreeConfig, Form, Objective, Precision, Shape};

fn main() {
    let arguments = Arguments::from_args();
    let required = std::env::var("SAE_KERNELS_REQUIRE_GPU").is_ok_and(|value| value == "1");
    let missing = Cuda::<f32>::new(0).err().map(|error| error.to_string());
    let mut trials = vec![Trial::test("conformance", instructions)];
    for form in [Form::Primal, Form::Dual] {
        let name = format!("{form:?}").to_lowercase();
        trials.push(Trial::test(format!("step_f32_{name}"), move || step::<f32>(form)));
        trials.push(Trial::test(format!("step_bf16_{name}"), move || step::<sae_kernels::bf16>(form)));
        trials.push(Trial::test(format!("step_f16_{name}"), move || step::<sae_kernels::f16>(form)));
    }
    if let (Some(reason), false) = (missing, required) {
        trials = trials.into_iter().map(|trial| trial.with_kind(reason.clone()).with_ignored_flag(true)).collect();
    }
    libtest_mimic::run(&arguments, trials).exit();
}

/// Every kernel of `kernels/conformance.cu` here and on the emulator. With `SAE_KERNELS_RECORD=FOLDER` the chip's output is written there,
/// to be kept in `emulator/tests/golden/`.
fn instructions() -> Result<(), Failed> {
    let module = Module::parse(conformance::PTX)?;
    let context = CudaContext::new(0)?;
    let stream = context.new_stream()?;
    let loaded = context.load_module(Ptx::from_src(conformance::PTX))?;
    let input = stream.clone_htod(&conformance::input())?;
    let (mut recorded, mut differences) = (String::new(), Vec::new());
    for kernel in module.kernels() {
        let function = loaded.load_function(kernel)?;
        let mut output = stream.clone_htod(&[conformance::UNWRITTEN; conformance::WORDS])?;
        let geometry = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (32, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the kernels take pointers to this many words of input and output.
        unsafe { stream.launch_builder(&function).arg(&input).arg(&mut output).launch(geometry) }?;
        let chip = stream.clone_dtoh(&output)?;
        recorded += &conformance::to_line(kernel, &chip);
        recorded.push('\n');
        differences.extend(
            conformance::compare(kernel, &chip, &conformance::emulated(&module, kernel, Options::default())?).err(),
        );
    }
    if let Some(folder) = std::env::var_os("SAE_KERNELS_RECORD") {
        let name = context.name()?.replace(|c: char| !c.is_ascii_alphanumeric(), "_");
        let path = std::path::Path::new(&folder).join(format!("{name}.txt"));
        std::fs::write(&path, recorded)?;
        println!("recorded {}", path.display());
    }
    if differences.is_empty() { Ok(()) } else { Err(differences.join("\n").into()) }
}

fn step<E: CudaElement + CpuElement>(form: Form) -> Result<(), Failed> {
    for [rows, inputs, latents] in [[128, 784, 64], [300, 257, 515], [1024, 768, 2048]] {
        let mut rng = rng(rows as u64);
        let shape = Shape { rows, inputs, latents };
        let objective = Objective { lambda_wr: 0.1, ..Objective::default() };
        let step = Step {
            config: DecoderFreeConfig { objective, correlation_form: form, ..DecoderFreeConfig::new(shape) },
            x: rounded::<E>(&uniform(&mut rng, rows * inputs, 1.0)),
            weight: rounded::<E>(&uniform(&mut rng, latents * inputs, 1.0 / (inputs as f64).sqrt())),
            bias: uniform(&mut rng, latents, 0.1),
        };
        let truth = step.run(Cpu::<E>::new()?)?;
        for precision in [Precision::Full, Precision::Storage] {
            let found = step.run(Cuda::<E>::new(0)?.with_precision(precision))?;
            let bar = match precision {
                Precision::Full => (4.0 * E::UNIT_ROUNDOFF).max(1e-4),
                Precision::Storage => 3e-2,
            };
            for (what, found, truth) in
                [("dW", &found.weight, &truth.weight), ("db", &found.bias, &truth.bias), ("dx", &found.x, &truth.x)]
            {
                let error = relative(found, truth);
                if error.is_nan() || error > bar {
                    return Err(
                        format!("{} {shape:?} {form:?} {precision:?}: {what} is off by {error:e}", E::NAME).into()
                    );
                }
            }
            let error = (found.losses.total - truth.losses.total).abs() / truth.losses.total.abs();
            if error.is_nan() || error > bar {
                return Err(format!("{:?}, expected {:?}", found.losses, truth.losses).into());
            }
        }
    }
    Ok(())
}
