//! Whole steps on a real GPU against the CPU backend. Without one they show as ignored, with the reason; `SAE_KERNELS_REQUIRE_GPU=1` makes
//! that a failure, and makes the tests of every other file run their CUDA part on the GPU instead of the emulator.
//!
//! What needs cuBLASLt shows as ignored where its library is not found.

mod common;

use common::anywhere::{Step, Training};
use common::staged::Staged;
use common::{Place, Under, assert_same_bits, ops, relative, rng, rounded, uniform};
use libtest_mimic::{Arguments, Failed, Trial};
use ptx_emulator::{Options, conformance};
use sae_kernels::cudarc::driver::sys::{self, CUgraphInstantiate_flags, CUstreamCaptureMode};
use sae_kernels::cudarc::driver::{CudaContext, DevicePtr, DeviceRepr, LaunchConfig, PushKernelArg};
use sae_kernels::cudarc::nvrtc::Ptx;
use sae_kernels::operations::Layout;
use sae_kernels::{
    Cpu, CpuElement, Cuda, CudaElement, DecoderFree, DecoderFreeConfig, DecoderFreeStep, Form, MatMut, MatRef,
    Objective, Precision, Products, Shape, bf16, f16,
};

fn main() {
    let arguments = Arguments::from_args();
    let required = std::env::var("SAE_KERNELS_REQUIRE_GPU").is_ok_and(|value| value == "1");
    let missing = Cuda::<f32>::new(0).err().map(|error| error.to_string());
    let mut trials = vec![Trial::test("conformance", instructions)];
    for form in [Form::Primal, Form::Dual] {
        let name = format!("{form:?}").to_lowercase();
        // The smallest are for a sanitizer or an emulator, which are slow.
        let smallest: &[[usize; 3]] = &[[130, 40, 141]];
        let sizes: &[[usize; 3]] = &[[128, 784, 64], [300, 257, 515], [1024, 768, 2048]];
        for (prefix, sizes) in [("smallest_", smallest), ("full_", sizes)] {
            trials.push(Trial::test(format!("{prefix}step_f32_{name}"), move || step::<f32>(form, sizes)));
            trials.push(Trial::test(format!("{prefix}step_bf16_{name}"), move || step::<bf16>(form, sizes)));
            trials.push(Trial::test(format!("{prefix}step_f16_{name}"), move || step::<f16>(form, sizes)));
        }
        for (prefix, size) in [("smallest_", [130, 40, 141]), ("full_", [300, 257, 515])] {
            for products in [Products::Library, Products::Own] {
                let name = format!("{prefix}graph_bf16_{name}_{products:?}").to_lowercase();
                trials.push(Trial::test(name, move || graph::<bf16>(form, products, size)));
            }
            let name = format!("{prefix}graph_f32_{name}");
            trials.push(Trial::test(name, move || graph::<f32>(form, Products::Own, size)));
        }
    }
    let library = missing.is_none() && Cuda::<bf16>::new(0).is_ok_and(|cuda| cuda.products() == Products::Library);
    for layout in [Layout::Nn, Layout::Nt, Layout::Tn] {
        let name = format!("{layout:?}").to_lowercase();
        let both = [
            Trial::test(format!("library_bf16_{name}"), move || library_and_own::<bf16>(layout)),
            Trial::test(format!("library_f16_{name}"), move || library_and_own::<f16>(layout)),
        ];
        trials.extend(both.map(|trial| {
            let ignored = !library && missing.is_none();
            if ignored { trial.with_kind("no cuBLASLt").with_ignored_flag(true) } else { trial }
        }));
    }
    trials.push(Trial::test("views", views));
    #[cfg(feature = "capi")]
    trials.push(Trial::test("raw_streams", raw_streams));
    if let (Some(reason), false) = (missing, required) {
        trials = trials.into_iter().map(|trial| trial.with_kind(reason.clone()).with_ignored_flag(true)).collect();
    }
    libtest_mimic::run(&arguments, trials).exit();
}

/// A tensor map as a kernel's argument.
#[repr(C, align(64))]
struct Map(sys::CUtensorMap);
// SAFETY: kernels take the 128 bytes by value.
unsafe impl DeviceRepr for Map {}

/// The map of a suite's input, which lies at this address.
fn map_of(tensor: &conformance::Tensor, address: u64) -> Result<Map, Failed> {
    let mut map = Map(sys::CUtensorMap { opaque: [0; 16] });
    // SAFETY: the arrays are as long as the rank says; the address is not followed.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map.0,
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT16,
            3,
            address as *mut _,
            tensor.extents.as_ptr(),
            tensor.strides.as_ptr(),
            tensor.shape.as_ptr(),
            [1, 1, 1].as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_NONE,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()?;
    Ok(map)
}

/// Every kernel of `kernels/conformance.cu`, and of `conformance_sm90.cu` on its chip, here and on the emulator. With
/// `SAE_KERNELS_RECORD=FOLDER` the chip's output is written there, to be kept in `emulator/tests/golden/`.
fn instructions() -> Result<(), Failed> {
    let context = CudaContext::new(0)?;
    let (stream, capability) = (context.new_stream()?, context.compute_capability()?);
    let mut differences = Vec::new();
    for suite in conformance::SUITES {
        if suite.target == "sm_90a" && capability != (9, 0) {
            println!("not of compute capability 9.0: without the kernels of {}", suite.target);
            continue;
        }
        let module = suite.module()?;
        let loaded = context.load_module(Ptx::from_src(suite.ptx))?;
        let input = stream.clone_htod(&suite.input())?;
        let map = match &suite.tensor {
            Some(tensor) => Some(map_of(tensor, input.device_ptr(&stream).0)?),
            None => None,
        };
        let run = |kernel: &str| -> Result<Vec<u32>, Failed> {
            let function = loaded.load_function(kernel)?;
            let mut output = stream.clone_htod(&vec![conformance::UNWRITTEN; suite.words])?;
            let mut launch = stream.launch_builder(&function);
            if let Some(map) = &map {
                launch.arg(map);
            }
            launch.arg(&input).arg(&mut output);
            let (grid_dim, block_dim) = ((suite.blocks, 1, 1), (suite.threads, 1, 1));
            // SAFETY: the kernels take the suite's map, if it has one, and pointers to its input and its words of output.
            unsafe { launch.launch(LaunchConfig { grid_dim, block_dim, shared_mem_bytes: 0 }) }?;
            Ok(stream.clone_dtoh(&output)?)
        };
        let mut recorded = String::new();
        for kernel in module.kernels() {
            match run(kernel) {
                Ok(chip) => {
                    recorded += &conformance::to_line(kernel, &chip);
                    recorded.push('\n');
                    let here = suite.emulated(&module, kernel, Options::default())?;
                    differences.extend(conformance::compare(kernel, &chip, &here).err());
                }
                // After most errors of a kernel the context takes no other; what the others made is kept.
                Err(error) => {
                    differences.push(format!("{kernel}: {}", error.message().unwrap_or_default()));
                    break;
                }
            }
        }
        if let Some(folder) = std::env::var_os("SAE_KERNELS_RECORD") {
            let chip = context.name()?.replace(|c: char| !c.is_ascii_alphanumeric(), "_");
            let path = std::path::Path::new(&folder).join(format!("{chip}.{}.txt", suite.target));
            std::fs::write(&path, recorded)?;
            println!("recorded {}", path.display());
        }
    }
    if differences.is_empty() { Ok(()) } else { Err(differences.join("\n").into()) }
}

fn step<E: CudaElement + CpuElement>(form: Form, sizes: &[[usize; 3]]) -> Result<(), Failed> {
    for &[rows, inputs, latents] in sizes {
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
        for (precision, portable) in
            [(Precision::Full, false), (Precision::Storage, false), (Precision::Full, true), (Precision::Storage, true)]
        {
            // On a GPU of 9.0 one has wgmma, the other mma.sync.
            let cuda = if portable {
                Cuda::<E>::with_portable_kernels(CudaContext::new(0)?.new_stream()?)?
            } else {
                Cuda::<E>::new(0)?
            };
            let found = step.run(cuda.with_precision(precision))?;
            let context = format!("{} {shape:?} {form:?} {precision:?}, portable kernels: {portable}", E::NAME);
            let bar = match precision {
                Precision::Full => (4.0 * E::UNIT_ROUNDOFF).max(1e-4),
                Precision::Storage => 3e-2,
            };
            for (what, found, truth) in
                [("dW", &found.weight, &truth.weight), ("db", &found.bias, &truth.bias), ("dx", &found.x, &truth.x)]
            {
                let error = relative(found, truth);
                if error.is_nan() || error > bar {
                    return Err(format!("{context}: {what} is off by {error:e}").into());
                }
            }
            let error = (found.losses.total - truth.losses.total).abs() / truth.losses.total.abs();
            if error.is_nan() || error > bar {
                return Err(format!("{context}: {:?}, expected {:?}", found.losses, truth.losses).into());
            }
        }
    }
    Ok(())
}

/// cuBLASLt and our kernels multiply the same 16-bit numbers, and both sum in f32.
fn library_and_own<E: CudaElement>(layout: Layout) -> Result<(), Failed> {
    let cuda = Cuda::<E>::new(0)?;
    let own = cuda.clone().with_products(Products::Own);
    let library = Under::new("cuBLASLt".into(), move || Staged(cuda.clone()));
    let own = Under::new("our kernels".into(), move || Staged(own.clone()));
    let mut rng = rng(11);
    let sizes = [[1, 1, 1], [7, 5, 3], [128, 256, 64], [300, 257, 515], [64, 1024, 9001], [2, 3, 0], [0, 3, 2]];
    for [m, n, k] in sizes {
        let (left, right) = (uniform(&mut rng, m * k, 1.0), uniform(&mut rng, n * k, 1.0));
        let before = uniform(&mut rng, m * n, 1.0);
        // Rows at multiples of 16 bytes, if the extents are; of 2 bytes; and of 16 bytes with gaps.
        for place in [Place::DENSE, Place::STRIDED, Place { offset: 8, gap: 8, ..Place::DENSE }] {
            // Without `before` the output holds NaN.
            for before in [None, Some(&before[..])] {
                let product =
                    |under: &Under<Staged<E>>| ops::product(under, place, layout, [m, n, k], &left, &right, before);
                let (found, again, expected) = (product(&library), product(&library), product(&own));
                let context = format!("{} {layout:?} {m}×{n}×{k} {place:?} {}", E::NAME, before.is_some());
                assert_same_bits(&context, "a repeated product", &again, &found);
                let error = relative(&found, &expected);
                if error.is_nan() || error > 1e-4 {
                    return Err(format!("{context}: off by {error:e}").into());
                }
            }
        }
    }
    Ok(())
}

/// A step and an update, captured into a graph: the same bits as without one.
fn graph<E: CudaElement>(form: Form, products: Products, [rows, inputs, latents]: [usize; 3]) -> Result<(), Failed> {
    let shape = Shape { rows, inputs, latents };
    for block_rows in [None, Some(128)] {
        let objective = Objective { lambda_wr: 0.1, ..Objective::default() };
        let config =
            DecoderFreeConfig { objective, correlation_form: form, block_rows, ..DecoderFreeConfig::new(shape) };
        if form == Form::Dual && block_rows.is_some() {
            continue;
        }
        let cuda = Cuda::<E>::new(0)?.with_products(products);
        let stream = cuda.stream().expect("a GPU has a stream").clone();
        let steps = [1, 2, 3].map(|seed| {
            let mut rng = rng(seed);
            Step {
                config,
                x: uniform(&mut rng, shape.rows * shape.inputs, 1.0),
                weight: rounded::<E>(&uniform(&mut rng, shape.latents * shape.inputs, 0.06)),
                bias: uniform(&mut rng, shape.latents, 0.1),
            }
        });
        let mut training = Training::new(cuda, config)?;
        let mut eager = Vec::new();
        for step in &steps {
            training.load(step)?;
            training.enqueue()?;
            eager.push(training.outcome()?);
        }
        // The eager steps were first, so that kernels are loaded and cuBLASLt has its plans.
        stream.synchronize()?;
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        let enqueued = training.enqueue();
        let graph = stream.end_capture(CUgraphInstantiate_flags(0));
        enqueued?;
        let graph = graph?.ok_or("an empty graph")?;
        for (step, expected) in steps.iter().zip(&eager) {
            training.load(step)?;
            graph.launch()?;
            for ((what, found), (_, expected)) in training.outcome()?.iter().zip(expected) {
                assert_same_bits(&format!("{} {form:?} {products:?}", E::NAME), what, found, expected);
            }
        }
    }
    Ok(())
}

/// A step on cudarc's own buffers, which another stream wrote.
fn views() -> Result<(), Failed> {
    let shape = Shape { rows: 20, inputs: 9, latents: 14 };
    let (n, d, h) = (shape.rows, shape.inputs, shape.latents);
    let mut rng = rng(5);
    let step = Step {
        config: DecoderFreeConfig::new(shape),
        x: uniform(&mut rng, n * d, 1.0),
        weight: uniform(&mut rng, h * d, 0.3),
        bias: uniform(&mut rng, h, 0.1),
    };
    let truth = step.run(Cpu::<f32>::new()?)?;
    let context = CudaContext::new(0)?;
    let (theirs, cuda) = (context.new_stream()?, Cuda::<f32>::on_stream(context.new_stream()?)?);
    let upload = |values: &[f64]| theirs.clone_htod(&values.iter().map(|value| *value as f32).collect::<Vec<_>>());
    let (x, weight, bias) = (upload(&step.x)?, upload(&step.weight)?, upload(&step.bias)?);
    let (mut grad_weight, mut grad_bias) = (theirs.alloc_zeros::<f32>(h * d)?, theirs.alloc_zeros::<f32>(h)?);
    let mut model = DecoderFree::new(cuda.clone(), step.config)?;
    model.step(DecoderFreeStep {
        x: MatRef::from_memory(cuda.view(&x)?, n, d, d)?,
        weight: MatRef::from_memory(cuda.view(&weight)?, h, d, d)?,
        bias: cuda.view(&bias)?,
        grad_weight: MatMut::from_memory(cuda.view_mut(&mut grad_weight)?, h, d, d)?,
        grad_bias: cuda.view_mut(&mut grad_bias)?,
        grad_x: None,
        activations: None,
        row_loss: None,
    })?;
    let losses = model.losses()?;
    let wide = |values: Vec<f32>| values.into_iter().map(f64::from).collect::<Vec<_>>();
    let (grad_weight, grad_bias) = (wide(theirs.clone_dtoh(&grad_weight)?), wide(theirs.clone_dtoh(&grad_bias)?));
    let errors = [
        relative(&grad_weight, &truth.weight),
        relative(&grad_bias, &truth.bias),
        relative(&[losses.total], &[truth.losses.total]),
    ];
    if errors.iter().all(|error| *error <= 1e-5) { Ok(()) } else { Err(format!("off by {errors:?}").into()) }
}

/// Contexts of the C interface take the default stream and streams of the device's primary context, and no others.
#[cfg(feature = "capi")]
fn raw_streams() -> Result<(), Failed> {
    use sae_kernels::capi::{
        SAEK_ERROR_DEVICE, SAEK_OK, saek_context_create_cuda, saek_context_destroy, saek_last_error,
    };
    let create = |stream: sys::CUstream| {
        let mut context = std::ptr::null_mut();
        // SAFETY: a stream or NULL, which outlives the context, and pointers to variables; nobody uses the context afterwards.
        unsafe {
            let code = saek_context_create_cuda(0, stream.cast(), &mut context);
            saek_context_destroy(context);
            (code, std::ffi::CStr::from_ptr(saek_last_error()).to_string_lossy().into_owned())
        }
    };
    let (primary, other) = (CudaContext::new(0)?, CudaContext::new_non_primary(0, 0)?);
    let (own, foreign) = (primary.new_stream()?, other.new_stream()?);
    for (what, stream, expected) in [
        ("the default stream", std::ptr::null_mut(), SAEK_OK),
        ("a stream of the primary context", own.cu_stream(), SAEK_OK),
        ("a stream of another context", foreign.cu_stream(), SAEK_ERROR_DEVICE),
    ] {
        let (code, text) = create(stream);
        if code != expected || (expected != SAEK_OK && !text.contains("not of the primary context of device 0")) {
            return Err(format!("{what}: {code}, {text}").into());
        }
    }
    Ok(())
}
