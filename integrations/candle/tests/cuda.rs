//! Tensors on a CUDA device give what they give on the CPU. Needs a driver, to start at all; an emulated one will do.

use candle_core::{DType, Device, Result, Tensor, Var};
use sae_kernels_candle::{Error, Kernels, Objective};

/// Two that a step is one launch for, and one beyond it: \[N,D,H\].
const SHAPES: [[usize; 3]; 3] = [[9, 20, 40], [50, 7, 24], [20, 12, 300]];

fn bar(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 1e-4,
        DType::F16 => 2f64.powi(-8),
        _ => 2f64.powi(-5),
    }
}

/// Numbers that look random, rounded to the type.
fn values(shape: &[usize], dtype: DType, seed: usize) -> Result<Tensor> {
    let count = shape.iter().product::<usize>();
    let values = (0..count).map(|i| ((i * i + 7 * i + seed * 131) % 257) as f32 / 128.0 - 1.0).collect::<Vec<_>>();
    Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)
}

fn on(device: &Device, tensor: &Tensor) -> Result<Var> {
    Var::from_tensor(&tensor.to_device(device)?)
}

fn numbers(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

/// Results by name, of the CPU and of the device.
fn compare(
    case: &str,
    bar: f64,
    on_device: &Device,
    run: impl Fn(&Device) -> Result<Vec<(&'static str, Tensor)>>,
) -> Result<()> {
    for ((name, truth), (_, found)) in run(&Device::Cpu)?.iter().zip(run(on_device)?) {
        assert_eq!((found.dtype(), found.dims()), (truth.dtype(), truth.dims()), "{case}: {name}");
        assert!(found.device().same_device(on_device), "{case}: {name} is elsewhere");
        let (found, truth) = (numbers(&found)?, numbers(truth)?);
        let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
        let error = norm(&mut found.iter().zip(&truth).map(|(f, t)| f - t));
        let scale = norm(&mut truth.iter().copied());
        assert!(error <= bar * scale, "{case}: {name} is off by {error:e} of {scale:e}");
    }
    Ok(())
}

fn gradients(loss: &Tensor, of: &[(&'static str, &Var)]) -> Result<Vec<(&'static str, Tensor)>> {
    let store = (loss * -1.5)?.backward()?;
    let gradient = |(name, variable): &(&'static str, &Var)| (*name, store.get(variable).expect("a gradient").clone());
    Ok(of.iter().map(gradient).collect())
}

#[test]
fn every_loss_and_gradient() -> Result<()> {
    let (kernels, device) = (Kernels::new(), Device::new_cuda(0)?);
    let weights = Objective { lambda_wr: 0.125, lambda_tc: 0.5, ..Objective::default() };
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        for [n, d, h] in SHAPES {
            let (x, weight) = (values(&[n, d], dtype, 1)?, values(&[h, d], dtype, 2)?);
            let (bias, a) = (values(&[h], dtype, 3)?, values(&[n, h], dtype, 4)?);
            let case = format!("{n}×{d}×{h} {dtype:?}");
            for objective in [Objective::default(), weights] {
                compare(&case, bar(dtype), &device, |device| {
                    let (x, weight, bias) = (on(device, &x)?, on(device, &weight)?, on(device, &bias)?);
                    let step = kernels.decoder_free_loss(&x, &weight, &bias, &objective)?;
                    let mut results = gradients(&step.total, &[("dx", &x), ("dW", &weight), ("db", &bias)])?;
                    let [x, weight, bias] = [&x, &weight, &bias].map(|t| t.as_detached_tensor());
                    let alone = kernels.decoder_free_loss(&x, &weight, &bias, &objective)?;
                    results.extend([
                        ("total", step.total),
                        ("a", step.activations),
                        ("l", step.row_loss),
                        ("alone", alone.total),
                    ]);
                    Ok(results)
                })?;
            }
            compare(&case, bar(dtype), &device, |device| {
                let (x, weight, bias) = (on(device, &x)?, on(device, &weight)?, on(device, &bias)?);
                let (a, row_loss) = kernels.encode_lse(&x, &weight, &bias)?;
                let of = [("dx", &x), ("dW", &weight), ("db", &bias)];
                let mut results = gradients(&row_loss, &of)?;
                results.extend(gradients(&a, &of)?);
                results.extend([("a", a), ("l", row_loss)]);
                Ok(results)
            })?;
            compare(&case, bar(dtype), &device, |device| {
                let (a, weight) = (on(device, &a)?, on(device, &weight)?);
                let combined = kernels.combined_loss(&a, &weight, &weights)?;
                let mut results = gradients(&combined.total, &[("da", &a), ("dW", &weight)])?;
                results.extend([("total", combined.total), ("r", combined.responsibilities)]);
                let (lse, r) = kernels.lse_loss(&a)?;
                results.extend(gradients(&lse, &[("da of lse", &a)])?);
                results.extend([("lse", lse), ("r of lse", r)]);
                for loss in [kernels.variance_loss(&a, 1e-6)?, kernels.correlation_loss(&a)?] {
                    results.extend(gradients(&loss, &[("da of a term", &a)])?);
                    results.push(("a term", loss));
                }
                let redundancy = kernels.weight_redundancy_loss(&weight)?;
                results.extend(gradients(&redundancy, &[("dW of redundancy", &weight)])?);
                results.push(("redundancy", redundancy));
                Ok(results)
            })?;
        }
    }
    Ok(())
}

#[test]
fn rows_are_read_where_they_lie() -> Result<()> {
    let (kernels, device) = (Kernels::new(), Device::new_cuda(0)?);
    let wide = values(&[30, 50], DType::F32, 5)?;
    compare("part of a matrix", 1e-4, &device, |device| {
        let wide = on(device, &wide)?;
        let part = wide.narrow(0, 3, 9)?.narrow(1, 11, 20)?;
        let loss = kernels.lse_loss(&part)?.0;
        let turned = kernels.lse_loss(&part.t()?)?.0;
        Ok(vec![("loss", loss), ("transposed", turned)])
    })
}

#[test]
fn what_is_used_again_changes_nothing() -> Result<()> {
    let (kernels, device) = (Kernels::new(), Device::new_cuda(0)?);
    let run = |kernels: &Kernels| -> Result<Vec<f64>> {
        let (x, weight) =
            (on(&device, &values(&[9, 7], DType::F32, 6)?)?, on(&device, &values(&[24, 7], DType::F32, 7)?)?);
        let bias = Tensor::zeros(24, DType::F32, &device)?;
        let total = kernels.decoder_free_loss(&x, &weight, &bias, &Objective::default())?.total;
        let (_, row_loss) = kernels.encode_lse(&x, &weight, &bias)?;
        let store = (total + row_loss.sum_all()?)?.backward()?;
        numbers(store.get(&weight).expect("a gradient"))
    };
    let expected = run(&kernels)?;
    assert_eq!(run(&kernels)?, expected);
    // Threads have streams of their own.
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..2).map(|_| scope.spawn(|| run(&kernels))).collect();
        for thread in threads {
            assert_eq!(thread.join().expect("no panic")?, expected);
        }
        Result::Ok(())
    })
}

#[test]
fn what_is_refused() -> Result<()> {
    let (kernels, device) = (Kernels::new(), Device::new_cuda(0)?);
    let (x, weight) = (values(&[4, 3], DType::F32, 8)?, values(&[5, 3], DType::F32, 9)?);
    let bias = Tensor::zeros(5, DType::F32, &Device::Cpu)?;
    let objective = Objective::default();
    let error = kernels.decoder_free_loss(&x.to_device(&device)?, &weight, &bias, &objective).expect_err("two devices");
    assert!(matches!(error, Error::DeviceMismatch { name: "weight", .. }), "{error}");
    let error = kernels.decoder_free_loss(&x, &weight, &bias.to_device(&device)?, &objective).expect_err("two devices");
    assert!(matches!(error, Error::DeviceMismatch { name: "bias", .. }), "{error}");
    // Another stream of the same GPU.
    let other = Device::new_cuda(0)?;
    let error = kernels.combined_loss(&x.to_device(&device)?, &weight.to_device(&other)?, &objective);
    let error = error.expect_err("two streams");
    assert!(matches!(error, Error::DeviceMismatch { name: "weight", .. }), "{error}");
    let wide = x.to_dtype(DType::F64)?.to_device(&device)?;
    let error = kernels.lse_loss(&wide).expect_err("no such kernels");
    assert!(matches!(error, Error::DType { name: "a", found: DType::F64, .. }), "{error}");
    assert!(error.to_string().contains("F32, BF16 or F16 on a CUDA device"), "{error}");
    Ok(())
}
