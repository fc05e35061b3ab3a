//! The C ABI on a CUDA context: the calls of a CPU context with addresses of an emulated device, and what is refused. With
//! `SAE_KERNELS_REQUIRE_GPU=1` the device is a real one, in a stream that the test made.
#![cfg(sae_kernels_ptx)]

mod common;

use common::emulated::Emulated;
use common::{relative, rng, rounded, uniform};
use ptx_emulator::Options;
use sae_kernels::capi::*;
use sae_kernels::cuda_driver::Driver;
use sae_kernels::cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr};
use sae_kernels::{CpuElement, CudaElement, Element, bf16, f16};
use std::ffi::CStr;
use std::ptr::{null, null_mut, without_provenance_mut};
use std::sync::Arc;

const ALL_TERMS: saek_objective = saek_objective {
    lambda_lse: 0.75,
    lambda_var: 0.5,
    lambda_tc: 0.25,
    lambda_wr: 0.125,
    variance_eps: 1e-4,
    reduction: SAEK_REDUCTION_MEAN,
};

fn last_error() -> String {
    // SAFETY: the text is valid until this thread's next failure.
    unsafe { CStr::from_ptr(saek_last_error()) }.to_str().unwrap().to_owned()
}

/// A context that ends with the test, and where its arrays are.
struct Context {
    context: *mut saek_context,
    place: Place,
}

#[derive(Clone)]
enum Place {
    Host,
    Emulated(Arc<Emulated>),
    Gpu(Arc<CudaStream>),
}

impl Context {
    fn cpu() -> Self {
        let mut context = null_mut();
        // SAFETY: the pointer is to a variable.
        assert_eq!(unsafe { saek_context_create_cpu(1, &mut context) }, SAEK_OK);
        Self { context, place: Place::Host }
    }
    fn cuda() -> Self {
        if std::env::var("SAE_KERNELS_REQUIRE_GPU").is_ok_and(|value| value == "1") {
            return Self::gpu(CudaContext::new(0).unwrap().new_stream().unwrap());
        }
        // No search for races: what follows is about the host's calls.
        let device = Arc::new(Emulated::new(Options { check_races: false, ..Options::default() }));
        Self { context: saek_context::on_driver(device.clone()), place: Place::Emulated(device) }
    }
    fn gpu(stream: Arc<CudaStream>) -> Self {
        let mut context = null_mut();
        // SAFETY: the stream is kept until the context is destroyed, and the pointer is to a variable.
        let code = unsafe { saek_context_create_cuda(0, stream.cu_stream().cast(), &mut context) };
        assert_eq!(code, SAEK_OK, "{}", last_error());
        Self { context, place: Place::Gpu(stream) }
    }
    fn array<T: Element>(&self, values: &[f64]) -> Array<T> {
        let host: Vec<T> = values.iter().map(|value| T::from_f64(*value)).collect();
        let memory = match &self.place {
            _ if host.is_empty() => Memory::Host,
            Place::Host => Memory::Host,
            Place::Emulated(device) => {
                let address = device.alloc(size_of_val(host.as_slice())).unwrap();
                // SAFETY: just allocated, as many bytes.
                unsafe { device.upload(bytemuck::cast_slice(&host), address) }.unwrap();
                Memory::Emulated(device.clone(), address)
            }
            Place::Gpu(stream) => Memory::Gpu(stream.clone_htod(bytemuck::cast_slice::<T, u8>(&host)).unwrap()),
        };
        Array { host, memory }
    }
    /// For a call to write.
    fn output<T: Element>(&self, len: usize) -> Array<T> {
        self.array(&vec![-123.25; len])
    }
}
impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: made above, and used by nobody any more.
        unsafe { saek_context_destroy(self.context) };
    }
}

/// An array of a call; NULL if it is empty.
struct Array<T> {
    host: Vec<T>,
    memory: Memory,
}

enum Memory {
    Host,
    Emulated(Arc<Emulated>, u64),
    Gpu(CudaSlice<u8>),
}

impl<T: Element> Array<T> {
    fn pointer<U>(&mut self) -> *mut U {
        match &self.memory {
            Memory::Emulated(_, address) => without_provenance_mut(*address as usize),
            Memory::Gpu(bytes) => without_provenance_mut(bytes.device_ptr(bytes.stream()).0 as usize),
            Memory::Host if self.host.is_empty() => null_mut(),
            Memory::Host => self.host.as_mut_ptr().cast(),
        }
    }
    fn values(&self) -> Vec<f64> {
        let mut values = self.host.clone();
        let bytes = bytemuck::cast_slice_mut(&mut values);
        match &self.memory {
            Memory::Host => {}
            // SAFETY: this array's memory.
            Memory::Emulated(device, address) => unsafe { device.download(*address, bytes) }.unwrap(),
            Memory::Gpu(memory) => memory.stream().memcpy_dtoh(memory, bytes).unwrap(),
        }
        values.iter().map(|value| value.to_f64()).collect()
    }
}
impl Drop for Memory {
    fn drop(&mut self) {
        if let Memory::Emulated(device, address) = self {
            // SAFETY: allocated in `Context::array`, and used by nobody any more.
            unsafe { device.free(*address) };
        }
    }
}

fn terms(losses: saek_losses) -> Vec<f64> {
    let saek_losses { lse, var, tc, wr, total } = losses;
    vec![lse, var, tc, wr, total]
}

/// All that calls wrote, by name.
type Written = Vec<(&'static str, Vec<f64>)>;

/// The C functions of a storage type.
trait Calls: CudaElement + CpuElement {
    /// Every call on the same numbers; n rows `stride` elements apart.
    fn run(on: &Context, extents: [usize; 3], gap: usize) -> Written;
}

macro_rules! calls {
    ($($storage:ty, $step:ident, $forward:ident, $statistics:ident, $backward:ident, $activation_losses:ident;)*) => {
        $(impl Calls for $storage {
            fn run(on: &Context, [n, d, h]: [usize; 3], gap: usize) -> Written {
                let mut rng = rng((n + 3 * d + 7 * h) as u64);
                let mut random = |len, scale| rounded::<Self>(&uniform(&mut rng, len, scale));
                let (ldx, lda) = (d + gap, h + gap);
                let mut x = on.array::<Self>(&random(n * ldx, 1.0));
                let mut weight = on.array::<Self>(&random(h * d, 3.0 / (d.max(1) as f64).sqrt()));
                let mut bias = on.array::<f32>(&random(h, 0.5));
                let mut shift = on.array::<f32>(&random(h, 0.5));
                let mut given = on.array::<Self>(&random(n * lda, 1.0));
                let mut losses = saek_losses::default();
                let mut written = Written::new();
                let mut activations = on.output::<Self>(n * h);
                let mut row_loss = on.output::<f32>(n);
                let mut grad_weight = on.output::<f32>(h * d);
                let mut grad_bias = on.output::<f32>(h);
                let mut grad_x = on.output::<f32>(n * d);
                let (x, weight, bias, shift) = (x.pointer(), weight.pointer(), bias.pointer(), shift.pointer());
                let [rows, inputs, latents, ldx, lda] = [n, d, h, ldx, lda].map(|extent| extent as i64);
                // SAFETY: all arrays are as long as the extents say, in the memory of the context.
                let code = unsafe {
                    $step(
                        on.context, &ALL_TERMS, rows, inputs, latents, x, ldx, weight, bias, activations.pointer(),
                        row_loss.pointer(), grad_weight.pointer(), grad_bias.pointer(), grad_x.pointer(), &mut losses,
                    )
                };
                assert_eq!(code, SAEK_OK, "{}", last_error());
                written.extend([
                    ("losses", terms(losses)),
                    ("activations", activations.values()),
                    ("row losses", row_loss.values()),
                    ("dW", grad_weight.values()),
                    ("db", grad_bias.values()),
                    ("dx", grad_x.values()),
                ]);

                let (mut activations, mut row_loss) = (on.output::<Self>(n * h), on.output::<f32>(n));
                // SAFETY: as above.
                let code = unsafe {
                    $forward(
                        on.context, &ALL_TERMS, rows, inputs, latents, x, ldx, weight, bias, activations.pointer(),
                        row_loss.pointer(), &mut losses,
                    )
                };
                assert_eq!(code, SAEK_OK, "{}", last_error());
                written.extend([
                    ("losses of forward", terms(losses)),
                    ("activations of forward", activations.values()),
                    ("row losses of forward", row_loss.values()),
                ]);

                // Two ranks, the first of which has a third of the rows and the weight term.
                let (first, len) = (rows / 3, saek_statistics_len(latents) as usize);
                let ranks = [(0, first), (first, rows - first)];
                let at = |from: i64| x.wrapping_add((from * ldx) as usize);
                let mut statistics = on.array::<f64>(&vec![0.0; len]);
                for (from, rows) in ranks {
                    // SAFETY: as above.
                    let code = unsafe {
                        $statistics(
                            on.context, rows, inputs, latents, at(from), ldx, weight, bias, shift, statistics.pointer(),
                        )
                    };
                    assert_eq!(code, SAEK_OK, "{}", last_error());
                }
                let mut grad_weight = on.array::<f32>(&vec![1.0; h * d]);
                let mut grad_bias = on.array::<f32>(&vec![1.0; h]);
                for (from, rows) in ranks {
                    let mut grad_x = on.output::<f32>(rows as usize * d);
                    // SAFETY: as above.
                    let code = unsafe {
                        $backward(
                            on.context, &ALL_TERMS, rows, inputs, latents, at(from), ldx, weight, bias, shift,
                            statistics.pointer(), i32::from(from == 0), grad_weight.pointer(), grad_bias.pointer(),
                            grad_x.pointer(), &mut losses,
                        )
                    };
                    assert_eq!(code, SAEK_OK, "{}", last_error());
                    written.push(("dx of a rank", grad_x.values()));
                }
                written.extend([
                    ("statistics", statistics.values()),
                    ("dW of ranks", grad_weight.values()),
                    ("db of ranks", grad_bias.values()),
                    ("losses of ranks", terms(losses)),
                ]);

                let mut grad_activations = on.output::<Self>(n * h);
                let mut grad_weight = on.output::<f32>(h * d);
                let mut responsibilities = on.output::<f32>(n * h);
                // SAFETY: as above.
                let code = unsafe {
                    $activation_losses(
                        on.context, &ALL_TERMS, rows, inputs, latents, given.pointer(), lda, weight,
                        grad_activations.pointer(), grad_weight.pointer(), responsibilities.pointer(), null_mut(),
                        &mut losses,
                    )
                };
                assert_eq!(code, SAEK_OK, "{}", last_error());
                written.extend([
                    ("losses of activations", terms(losses)),
                    ("da", grad_activations.values()),
                    ("dW of the weight term", grad_weight.values()),
                    ("responsibilities", responsibilities.values()),
                ]);

                // The weight's term alone: no rows, and activations that are NULL.
                let alone = saek_objective { lambda_lse: 0.0, lambda_var: 0.0, lambda_tc: 0.0, ..ALL_TERMS };
                let mut grad_weight = on.output::<f32>(h * d);
                // SAFETY: as above.
                let code = unsafe {
                    $activation_losses(
                        on.context, &alone, 0, inputs, latents, null(), latents, weight, null_mut(),
                        grad_weight.pointer(), null_mut(), null_mut(), &mut losses,
                    )
                };
                assert_eq!(code, SAEK_OK, "{}", last_error());
                written.extend([("losses of a weight", terms(losses)), ("dW alone", grad_weight.values())]);
                written
            }
        })*
    };
}
calls! {
    f32, saek_decoder_free_step_f32, saek_decoder_free_forward_f32, saek_decoder_free_statistics_f32,
        saek_decoder_free_backward_f32, saek_activation_losses_f32;
    bf16, saek_decoder_free_step_bf16, saek_decoder_free_forward_bf16, saek_decoder_free_statistics_bf16,
        saek_decoder_free_backward_bf16, saek_activation_losses_bf16;
    f16, saek_decoder_free_step_f16, saek_decoder_free_forward_f16, saek_decoder_free_statistics_f16,
        saek_decoder_free_backward_f16, saek_activation_losses_f16;
}

/// Panics unless all calls give what they give on the CPU.
fn check<E: Calls>(extents: [usize; 3]) {
    let bar = (4.0 * E::UNIT_ROUNDOFF).max(1e-5);
    let (cpu, cuda) = (Context::cpu(), Context::cuda());
    let (truth, found) = (E::run(&cpu, extents, 3), E::run(&cuda, extents, 3));
    assert_eq!(truth.len(), found.len());
    for ((name, truth), (_, found)) in truth.iter().zip(&found) {
        let error = relative(found, truth);
        assert!(error <= bar, "{} {extents:?}: {name} is off by {error:e}", E::NAME);
    }
}

#[test]
fn f32_on_the_device_is_as_on_the_cpu() {
    check::<f32>([33, 20, 40]);
}
#[test]
fn bf16_on_the_device_is_as_on_the_cpu() {
    check::<bf16>([33, 20, 40]);
}
/// More rows than latents.
#[test]
fn f16_on_the_device_is_as_on_the_cpu() {
    check::<f16>([45, 9, 17]);
}
/// The weight is then NULL.
#[test]
fn no_inputs_are_as_on_the_cpu() {
    check::<f32>([8, 0, 5]);
}

#[test]
fn double_is_refused_with_a_way_out() {
    let cuda = Context::cuda();
    let mut losses = saek_losses { total: -5.0, ..Default::default() };
    // SAFETY: refused before anything is read.
    let code = unsafe {
        saek_decoder_free_forward_f64(
            cuda.context,
            &ALL_TERMS,
            2,
            1,
            1,
            null(),
            1,
            null(),
            null(),
            null_mut(),
            null_mut(),
            &mut losses,
        )
    };
    assert_eq!(code, SAEK_ERROR_DEVICE);
    assert!(last_error().contains("no double; call the function for f32"), "{}", last_error());
    // SAFETY: as above.
    let code = unsafe {
        saek_activation_losses_f64(
            cuda.context,
            &ALL_TERMS,
            2,
            1,
            1,
            null(),
            1,
            null(),
            null_mut(),
            null_mut(),
            null_mut(),
            null_mut(),
            &mut losses,
        )
    };
    assert_eq!((code, losses.total), (SAEK_ERROR_DEVICE, -5.0));
}

/// Addresses of a device are checked as those of the host, and what is refused has written nothing.
#[test]
fn wrong_addresses_are_refused() {
    let cuda = Context::cuda();
    let [n, d, h] = [4, 3, 5];
    let (mut x, mut weight, mut bias) = (cuda.output::<f32>(n * d), cuda.output::<f32>(h * d), cuda.output::<f32>(h));
    let (mut grad_weight, mut grad_bias) = (cuda.output::<f32>(h * d), cuda.output::<f32>(h));
    let (x, weight, bias) = (x.pointer::<f32>(), weight.pointer::<f32>(), bias.pointer::<f32>());
    let (to_weight, to_bias) = (grad_weight.pointer::<f32>(), grad_bias.pointer::<f32>());
    let mut losses = saek_losses { total: -5.0, ..Default::default() };
    let mut step = |x: *const f32, grad_bias: *mut f32| {
        // SAFETY: as long as the extents say, or refused.
        let code = unsafe {
            saek_decoder_free_step_f32(
                cuda.context,
                &ALL_TERMS,
                n as i64,
                d as i64,
                h as i64,
                x,
                d as i64,
                weight,
                bias,
                null_mut(),
                null_mut(),
                to_weight,
                grad_bias,
                null_mut(),
                &mut losses,
            )
        };
        (code, losses.total)
    };
    for (code, text, x, to_bias) in [
        (SAEK_ERROR_NULL, "x is NULL", null(), to_bias),
        (SAEK_ERROR_NULL, "grad_bias is NULL", x.cast_const(), null_mut()),
        (SAEK_ERROR_POINTER, "must be a multiple of 4", x.cast_const().wrapping_byte_add(2), to_bias),
        (SAEK_ERROR_POINTER, "grad_bias overlaps grad_weight", x, to_weight.wrapping_add(h * d - 1)),
        (SAEK_ERROR_POINTER, "grad_bias overlaps x", x, x),
    ] {
        assert_eq!(step(x, to_bias), (code, -5.0), "{text}");
        assert!(last_error().contains(text), "{}", last_error());
    }
    assert!(grad_weight.values().iter().chain(&grad_bias.values()).all(|value| *value == -123.25));
    // And the same call without a fault is none.
    assert_eq!(step(x, to_bias).0, SAEK_OK, "{}", last_error());
}

/// There is no such device anywhere, and mostly no driver either.
#[test]
fn a_missing_device_is_an_error() {
    let mut context = without_provenance_mut(8);
    // SAFETY: the pointer is to a variable.
    assert_eq!(unsafe { saek_context_create_cuda(i32::MAX, null_mut(), &mut context) }, SAEK_ERROR_DEVICE);
    let text = last_error();
    assert!(text.contains("no NVIDIA driver") || text.contains("no CUDA device 2147483647"), "{text}");
    // SAFETY: as above.
    assert_eq!(unsafe { saek_context_create_cuda(-1, null_mut(), &mut context) }, SAEK_ERROR_ARGUMENT);
    assert!(last_error().contains("device = -1"), "{}", last_error());
    assert_eq!(context.addr(), 8, "a failed call writes nothing");
    // SAFETY: refused.
    assert_eq!(unsafe { saek_context_create_cuda(0, null_mut(), null_mut()) }, SAEK_ERROR_NULL);
}
