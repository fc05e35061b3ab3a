//! The losses against candle's own autograd of their formulas in f64, and against finite differences.

mod formulas;

use candle_core::{D, DType, Device, IndexOp, Result, Tensor, Var};
use sae_kernels_candle::{Error, Kernels, Objective, Reduction};

/// Fewer rows than latents and more, and around the edges of register tiles: \[N,D,H\].
const SHAPES: [[usize; 3]; 6] = [[2, 1, 1], [5, 3, 1], [9, 20, 40], [33, 7, 64], [130, 64, 33], [300, 100, 17]];
const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::BF16, DType::F16];

fn weights() -> Objective {
    Objective {
        lambda_lse: 0.75,
        lambda_var: 0.5,
        lambda_tc: 0.25,
        lambda_wr: 0.125,
        variance_eps: 1e-4,
        ..Objective::default()
    }
}

/// Relative error of sums of hundreds of terms, and of two roundings to storage.
fn bar(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-12,
        DType::F32 => 2e-5,
        DType::F16 => 4.0 * 2f64.powi(-10),
        _ => 4.0 * 2f64.powi(-7),
    }
}

/// Normally distributed numbers, the same each time.
fn random(shape: &[usize], dtype: DType, seed: u64) -> Result<Tensor> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ shape.iter().sum::<usize>() as u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    };
    let mut normal = || (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos();
    let values = (0..shape.iter().product()).map(|_| normal()).collect::<Vec<f64>>();
    Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)
}

fn variable(shape: &[usize], dtype: DType, seed: u64) -> Result<Var> {
    Var::from_tensor(&random(shape, dtype, seed)?)
}

fn numbers(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|v| v * v).sum::<f64>().sqrt()
}

/// ‖found − truth‖ / ‖truth‖
fn relative(found: &Tensor, truth: &Tensor) -> Result<f64> {
    assert_eq!(found.dims(), truth.dims());
    let (found, truth) = (numbers(found)?, numbers(truth)?);
    let scale = norm(&truth);
    let difference: Vec<f64> = found.iter().zip(&truth).map(|(f, t)| f - t).collect();
    Ok(norm(&difference) / if scale > 0.0 { scale } else { 1.0 })
}

fn scalar(tensor: &Tensor) -> Result<f64> {
    tensor.to_dtype(DType::F64)?.to_scalar()
}

fn same_bits(found: &Tensor, truth: &Tensor) -> Result<bool> {
    Ok(found.dtype() == truth.dtype() && found.dims() == truth.dims() && numbers(found)? == numbers(truth)?)
}

type Formula = fn(&Tensor) -> Result<Tensor>;
type Loss<'a> = &'a dyn Fn([&Tensor; 3]) -> Result<Tensor>;

#[test]
fn losses_of_activations() -> Result<()> {
    let kernels = Kernels::new();
    for (dtype, [n, _, h], relu) in cases() {
        let a = random(&[n, h], dtype, 1)?;
        let a = Var::from_tensor(&if relu { a.relu()? } else { a })?;
        let losses: [(&str, Tensor, Formula); 3] = [
            ("lse", kernels.lse_loss(&a)?.0, formulas::lse),
            ("var", kernels.variance_loss(&a, 1e-6)?, |a| formulas::var(a, 1e-6)),
            ("tc", kernels.correlation_loss(&a)?, formulas::tc),
        ];
        for (name, found, formula) in losses {
            let (truth, [grad]) = formulas::gradients([&a], |[a]| formula(a))?;
            let case = format!("{name} of {n}×{h} {dtype:?}, relu {relu}");
            assert_eq!((found.dtype(), found.rank()), (dtype, 0), "{case}");
            if name == "tc" && h == 1 {
                assert_eq!(scalar(&found)?, 0.0, "one latent is not correlated");
                continue;
            }
            assert!((scalar(&found)? - truth).abs() <= bar(dtype) * truth.abs().max(1e-3), "{case}");
            // A gradient comes from behind.
            let store = (found * -3.0)?.backward()?;
            let found = store.get(&a).expect("a gradient");
            assert_eq!(found.dtype(), dtype, "{case}");
            let error = relative(found, &(grad * -3.0)?)?;
            assert!(error < bar(dtype), "{case}: {error:e}");
        }
    }
    Ok(())
}

fn cases() -> impl Iterator<Item = (DType, [usize; 3], bool)> {
    let shapes = |dtype| SHAPES.into_iter().flat_map(move |shape| [(dtype, shape, false), (dtype, shape, true)]);
    DTYPES.into_iter().flat_map(shapes)
}

#[test]
fn responsibilities() -> Result<()> {
    let kernels = Kernels::new();
    for dtype in DTYPES {
        for [n, h] in [[5, 9], [40, 9], [1, 9], [3, 1]] {
            let a = variable(&[n, h], dtype, 2)?;
            let (loss, r) = kernels.lse_loss(&a)?;
            let e = a.to_dtype(DType::F64)?.neg()?.exp()?;
            let truth = e.broadcast_div(&e.sum_keepdim(D::Minus1)?)?;
            assert_eq!((r.dtype(), r.track_op()), (dtype, false));
            assert!(relative(&r, &truth)? < bar(dtype));
            let store = loss.backward()?;
            assert!(same_bits(store.get(&a).expect("a gradient"), &r)?);
            let combined = kernels.combined_loss(&a, &random(&[h, 2], dtype, 3)?, &lse_alone())?;
            assert!(relative(&combined.responsibilities, &truth)? < bar(dtype));
        }
    }
    Ok(())
}

fn lse_alone() -> Objective {
    Objective { lambda_var: 0.0, lambda_tc: 0.0, ..Objective::default() }
}

#[test]
fn weight_redundancy() -> Result<()> {
    let kernels = Kernels::new();
    for dtype in DTYPES {
        for [_, d, h] in SHAPES.into_iter().skip(2) {
            let weight = variable(&[h, d], dtype, 4)?;
            let found = kernels.weight_redundancy_loss(&weight)?;
            let (truth, [grad]) = formulas::gradients([&weight], |[weight]| formulas::wr(weight))?;
            assert_eq!(found.dtype(), dtype);
            assert!((scalar(&found)? - truth).abs() < bar(dtype) * truth);
            let store = (found * 0.5)?.backward()?;
            let error = relative(store.get(&weight).expect("a gradient"), &(grad * 0.5)?)?;
            assert!(error < bar(dtype), "{h}×{d} {dtype:?}: {error:e}");
        }
    }
    Ok(())
}

#[test]
fn combined_loss() -> Result<()> {
    let kernels = Kernels::new();
    let objectives = [
        Objective::default(),
        weights(),
        Objective { lambda_var: 0.0, lambda_wr: 2.0, ..Objective::default() },
        Objective { lambda_lse: 0.0, lambda_tc: 0.0, ..Objective::default() },
    ];
    for dtype in DTYPES {
        for [n, d, h] in SHAPES.into_iter().skip(2) {
            for objective in objectives {
                let (a, weight) = (variable(&[n, h], dtype, 5)?, variable(&[h, d], dtype, 6)?);
                let found = kernels.combined_loss(&a, &weight, &objective)?;
                let (truth, [grad_a, grad_weight]) =
                    formulas::gradients([&a, &weight], |[a, weight]| formulas::total(a, weight, &objective))?;
                let case = format!("{n}×{d}×{h} {dtype:?} {objective:?}");
                let wide = a.to_dtype(DType::F64)?;
                for (lambda, term, formula) in [
                    (objective.lambda_lse, found.losses.lse, formulas::lse(&wide)?),
                    (objective.lambda_var, found.losses.var, formulas::var(&wide, objective.variance_eps)?),
                    (objective.lambda_tc, found.losses.tc, formulas::tc(&wide)?),
                    (objective.lambda_wr, found.losses.wr, formulas::wr(&weight.to_dtype(DType::F64)?)?),
                ] {
                    let truth = if lambda == 0.0 { 0.0 } else { scalar(&formula)? };
                    assert!(
                        (term - truth).abs() <= bar(DType::F32) * (truth.abs() + h as f64),
                        "{case}: {term} for {truth}"
                    );
                }
                let scale = found.losses.lse.abs() + found.losses.var.abs() + found.losses.tc + found.losses.wr;
                assert!((scalar(&found.total)? - truth).abs() < bar(dtype) * scale, "{case}");
                let store = (&found.total * 2.0)?.backward()?;
                let error = relative(store.get(&a).expect("a gradient"), &(grad_a * 2.0)?)?;
                assert!(error < bar(dtype), "{case}: {error:e}");
                assert_eq!(store.get(&weight).is_some(), objective.lambda_wr != 0.0, "{case}");
                if let Some(found) = store.get(&weight) {
                    assert!(relative(found, &(grad_weight * 2.0)?)? < bar(dtype), "{case}");
                }
            }
        }
    }
    Ok(())
}

/// x, weight and a bias that leaves most latents active.
fn encoder([n, d, h]: [usize; 3], dtype: DType) -> Result<[Var; 3]> {
    let bias = (random(&[h], DType::F64, 9)? + 2.0)?.to_dtype(dtype)?;
    Ok([variable(&[n, d], dtype, 7)?, variable(&[h, d], dtype, 8)?, Var::from_tensor(&bias)?])
}

/// Activations of f64 arguments with the mask, and the rounding, of those that were stored.
fn stored_activations([x, weight, bias]: [&Tensor; 3], stored: &Tensor) -> Result<Tensor> {
    let stored = stored.detach().to_dtype(DType::F64)?;
    let z = x.matmul(&weight.t()?)?.broadcast_add(bias)?;
    let rounding = (&stored - z.detach())?;
    (z + rounding)?.mul(&stored.gt(0.0)?.to_dtype(DType::F64)?)
}

#[test]
fn the_step_with_its_encoder() -> Result<()> {
    let kernels = Kernels::new();
    for (dtype, shape, wide_bias) in cases() {
        // Biases of 16-bit models may be f32.
        if wide_bias && !matches!(dtype, DType::BF16 | DType::F16) {
            continue;
        }
        let [x, weight, bias] = encoder(shape, dtype)?;
        let bias = if wide_bias { Var::from_tensor(&bias.to_dtype(DType::F32)?)? } else { bias };
        let found = kernels.decoder_free_loss(&x, &weight, &bias, &weights())?;
        let case = format!("{shape:?} {dtype:?}");
        let (truth, grads) = formulas::gradients([&x, &weight, &bias], |arguments| {
            formulas::total(&stored_activations(arguments, &found.activations)?, arguments[1], &weights())
        })?;
        let [x64, weight64, bias64] = [&x, &weight, &bias].map(|t| t.to_dtype(DType::F64));
        let a = x64?.matmul(&weight64?.t()?)?.broadcast_add(&bias64?)?.relu()?;
        assert!(relative(&found.activations, &a)? < bar(dtype), "{case}");
        let stored = found.activations.to_dtype(DType::F64)?;
        assert!(relative(&found.row_loss, &formulas::row_loss(&stored)?)? < bar(dtype), "{case}");
        let losses = found.losses;
        let scale = losses.lse.abs() + losses.var.abs() + losses.tc + losses.wr;
        assert!((losses.total - truth).abs() < bar(DType::F32) * scale, "{case}: {} for {truth}", losses.total);
        assert!((scalar(&found.total)? - truth).abs() < bar(dtype) * scale, "{case}");
        assert_eq!((found.total.dtype(), found.activations.dtype(), found.row_loss.dtype()), (dtype, dtype, dtype));
        assert!(!found.activations.track_op() && !found.row_loss.track_op());

        let store = found.total.backward()?;
        for ((name, argument), grad) in [("x", &x), ("weight", &weight), ("bias", &bias)].into_iter().zip(grads) {
            let found = store.get(argument).expect("a gradient");
            assert_eq!(found.dtype(), argument.dtype(), "{case}");
            let error = relative(found, &grad)?;
            assert!(error < 4.0 * bar(dtype), "{case}, {name}: {error:e}");
        }
        // Without gradients, and with some of them only.
        let detached = [&x, &weight, &bias].map(|t| t.as_detached_tensor());
        let [x, _, bias] = &detached;
        let alone = kernels.decoder_free_loss(x, &detached[1], bias, &weights())?;
        assert!(!alone.total.track_op());
        assert!(same_bits(&alone.total, &found.total)? && same_bits(&alone.activations, &found.activations)?);
        let only = kernels.decoder_free_loss(x, &weight, bias, &weights())?.total.backward()?;
        assert!(same_bits(only.get(&weight).expect("a gradient"), store.get(&weight).expect("a gradient"))?);
        assert!(only.get(x).is_none() && only.get(bias).is_none());
    }
    Ok(())
}

#[test]
fn encode_lse() -> Result<()> {
    let kernels = Kernels::new();
    for dtype in DTYPES {
        for shape @ [n, _, h] in [[1, 3, 4], [9, 20, 40], [70, 17, 33]] {
            let [x, weight, bias] = encoder(shape, dtype)?;
            let bias = Var::from_tensor(&(bias.as_tensor() - 2.0)?)?;
            let (a, row_loss) = kernels.encode_lse(&x, &weight, &bias)?;
            let (c, e) = (random(&[n, h], dtype, 10)?, random(&[n], dtype, 11)?);
            let loss = ((&a * &c)?.sum_all()? + (&row_loss * &e)?.sum_all()?)?;
            let (c64, e64) = (c.to_dtype(DType::F64)?, e.to_dtype(DType::F64)?);
            let (_, grads) = formulas::gradients([&x, &weight, &bias], |arguments| {
                let a = stored_activations(arguments, &a)?;
                (&a * &c64)?.sum_all()? + (formulas::row_loss(&a)? * &e64)?.sum_all()?
            })?;
            let store = loss.backward()?;
            for ((name, argument), grad) in [("x", &x), ("weight", &weight), ("bias", &bias)].into_iter().zip(grads) {
                let found = store.get(argument).expect("a gradient");
                let error = relative(found, &grad)?;
                assert_eq!(found.dtype(), dtype);
                assert!(error < 4.0 * bar(dtype), "{shape:?} {dtype:?}, {name}: {error:e}");
            }
            // One result alone, and one argument alone.
            let alone = a.sum_all()?.backward()?;
            let (_, [_, _, truth]) =
                formulas::gradients([&x, &weight, &bias], |arguments| stored_activations(arguments, &a)?.sum_all())?;
            assert!(relative(alone.get(&bias).expect("a gradient"), &truth)? < 4.0 * bar(dtype));
            let (x, weight) = (x.as_detached_tensor(), weight.as_detached_tensor());
            let one = kernels.encode_lse(&x, &weight, &bias)?.0.sum_all()?.backward()?;
            assert!(same_bits(one.get(&bias).expect("a gradient"), alone.get(&bias).expect("a gradient"))?);
            assert!(one.get(&x).is_none() && one.get(&weight).is_none());
        }
    }
    Ok(())
}

/// Central differences of a loss in f64, a few entries of each argument.
#[test]
fn finite_differences() -> Result<()> {
    let kernels = Kernels::new();
    let mean = Objective { reduction: Reduction::Mean, normalize_weight: false, ..weights() };
    let losses: [(&str, Loss); 3] = [
        ("sum", &|[x, weight, bias]| Ok(kernels.decoder_free_loss(x, weight, bias, &weights())?.total)),
        ("mean", &|[x, weight, bias]| Ok(kernels.decoder_free_loss(x, weight, bias, &mean)?.total)),
        ("encode", &|[x, weight, bias]| {
            let (a, row_loss) = kernels.encode_lse(x, weight, bias)?;
            a.sqr()?.sum_all()? + row_loss.sqr()?.sum_all()?
        }),
    ];
    for shape in [[9, 4, 12], [14, 5, 6]] {
        let arguments = encoder(shape, DType::F64)?;
        for (name, loss) in losses {
            let store = loss(arguments.each_ref().map(|argument| argument.as_tensor()))?.backward()?;
            for (which, argument) in arguments.iter().enumerate() {
                let gradient = numbers(store.get(argument).expect("a gradient"))?;
                for entry in (0..gradient.len()).step_by(7) {
                    let shifted = |step: f64| -> Result<f64> {
                        let mut values = numbers(argument)?;
                        values[entry] += step;
                        let other = Tensor::from_vec(values, argument.dims(), &Device::Cpu)?;
                        let mut tensors = arguments.each_ref().map(|argument| argument.as_tensor());
                        tensors[which] = &other;
                        scalar(&loss(tensors)?)
                    };
                    let difference = (shifted(1e-5)? - shifted(-1e-5)?) / 2e-5;
                    let scale = norm(&gradient).max(1.0);
                    let error = (gradient[entry] - difference).abs();
                    assert!(error < 1e-6 * scale, "{name} {shape:?}, {which}[{entry}]: {error:e} of {scale}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn dead_columns() -> Result<()> {
    let kernels = Kernels::new();
    for dtype in [DType::F32, DType::F64] {
        for n in [6, 40] {
            let mut columns = Vec::new();
            for j in 0..12 {
                let column = random(&[n, 1], dtype, 20 + j)?;
                columns.push(if [1, 5, 11].contains(&j) {
                    (column * 0.0)?.affine(1.0, 0.5 * j as f64)?
                } else {
                    column
                });
            }
            let a = Var::from_tensor(&Tensor::cat(&columns, 1)?)?;
            let loss = (kernels.variance_loss(&a, 1e-6)? + kernels.correlation_loss(&a)?)?;
            let store = loss.backward()?;
            let gradient = store.get(&a).expect("a gradient");
            assert!(scalar(&loss)?.is_finite() && numbers(gradient)?.iter().all(|v| v.is_finite()));
            for j in [1, 5, 11] {
                assert!(numbers(&gradient.i((.., j))?)?.iter().all(|v| *v == 0.0));
            }
            let (truth, [grad]) = formulas::gradients([&a], |[a]| formulas::var(a, 1e-6)? + formulas::tc(a)?)?;
            assert!((scalar(&loss)? - truth).abs() < bar(dtype) * truth.abs());
            assert!(relative(gradient, &grad)? < bar(dtype));
        }
    }
    Ok(())
}

/// How a matrix lies in a larger tensor.
type View = fn(&Tensor, usize, usize) -> Result<Tensor>;

/// The same numbers in tensors that are larger, or turned, with the views that give the matrix back.
fn layouts(matrix: &Tensor) -> Result<Vec<(&'static str, Tensor, View)>> {
    let (n, cols) = matrix.dims2()?;
    let nan = |rows, cols| Tensor::full(f32::NAN, (rows, cols), &Device::Cpu)?.to_dtype(matrix.dtype());
    let wide = Tensor::cat(&[&nan(n, 2)?, matrix, &nan(n, 3)?], 1)?;
    let tall = Tensor::cat(&[&nan(3, cols)?, matrix, &nan(1, cols)?], 0)?;
    let every = Tensor::stack(&[matrix, &nan(n, cols)?], 2)?;
    Ok(vec![
        ("strided rows", wide, |t, _, cols| t.narrow(1, 2, cols)),
        ("rows of others", tall, |t, n, _| t.narrow(0, 3, n)),
        ("transposed", matrix.t()?.contiguous()?, |t, _, _| t.t()),
        ("every other", every, |t, _, _| t.narrow(2, 0, 1)?.squeeze(2)),
    ])
}

#[test]
fn tensors_that_are_not_contiguous() -> Result<()> {
    let kernels = Kernels::new();
    let (n, d, h) = (17, 9, 21);
    let dims = [(n, h), (h, d), (n, d)];
    let as_it_is: View = |t, _, _| Ok(t.clone());
    // Losses of a, weight, x and bias, and the gradients of what these are views of, seen the same way.
    let results = |sources: [(&Tensor, View); 3], bias: &Tensor| -> Result<Vec<Tensor>> {
        let mut variables = Vec::new();
        for (source, _) in sources {
            variables.push(Var::from_tensor(source)?);
        }
        let view = |which: usize, of: &Tensor| sources[which].1(of, dims[which].0, dims[which].1);
        let (a, weight, x) = (view(0, &variables[0])?, view(1, &variables[1])?, view(2, &variables[2])?);
        let combined = kernels.combined_loss(&a, &weight, &weights())?.total;
        let fused = kernels.decoder_free_loss(&x, &weight, bias, &weights())?.total;
        let (encoded, row_loss) = kernels.encode_lse(&x, &weight, bias)?;
        let encoded = (encoded.sqr()?.sum_all()? + row_loss.sum_all()?)?;
        let mut results = Vec::new();
        for (loss, arguments) in [(combined, [0, 1]), (fused, [1, 2]), (encoded, [1, 2])] {
            let store = loss.backward()?;
            for which in arguments {
                results.push(view(which, store.get(&variables[which]).expect("a gradient"))?.contiguous()?);
            }
            results.push(loss);
        }
        Ok(results)
    };
    for dtype in DTYPES {
        let given = [random(&[n, h], dtype, 30)?, random(&[h, d], dtype, 31)?, random(&[n, d], dtype, 32)?];
        let bias = random(&[h], dtype, 33)?;
        let expected = results(given.each_ref().map(|tensor| (tensor, as_it_is)), &bias)?;
        for which in 0..3 {
            for (name, source, view) in layouts(&given[which])? {
                assert!(!view(&source, dims[which].0, dims[which].1)?.is_contiguous() || name == "rows of others");
                let mut sources = given.each_ref().map(|tensor| (tensor, as_it_is));
                sources[which] = (&source, view);
                for (found, truth) in results(sources, &bias)?.iter().zip(&expected) {
                    assert!(same_bits(found, truth)?, "{name} for argument {which}, {dtype:?}");
                }
            }
        }
        // A bias with gaps, and rows that are one and the same.
        let gaps = Tensor::stack(&[&bias, &bias.affine(f64::NAN, 0.0)?], 1)?.i((.., 0))?;
        let x = &given[2];
        let loss = |bias| kernels.decoder_free_loss(x, &given[1], bias, &weights());
        assert!(!gaps.is_contiguous() && same_bits(&loss(&gaps)?.total, &loss(&bias)?.total)?);
        let row = given[0].narrow(0, 0, 1)?.broadcast_as((n, h))?;
        assert!(same_bits(&kernels.lse_loss(&row)?.1, &kernels.lse_loss(&row.contiguous()?)?.1)?);
    }
    Ok(())
}

#[test]
fn training_behind_a_layer() -> Result<()> {
    let kernels = Kernels::new();
    let objective = Objective { lambda_wr: 0.1, ..Objective::default() };
    let x = random(&[64, 20], DType::F32, 40)?;
    let start = [(random(&[16, 20], DType::F32, 41)? * 0.2)?, (random(&[16], DType::F32, 42)? * 0.1)?];
    // The same model twice: candle's encoder with a loss behind it, and the step with its own.
    let loss = |fused: bool, weight: &Tensor, bias: &Tensor| -> Result<Tensor> {
        if fused {
            return Ok(kernels.decoder_free_loss(&x, weight, bias, &objective)?.total);
        }
        let a = x.matmul(&weight.t()?)?.broadcast_add(bias)?.relu()?;
        Ok(kernels.combined_loss(&a, weight, &objective)?.total)
    };
    let mut curves = Vec::new();
    for fused in [false, true] {
        let parameters = [Var::from_tensor(&start[0])?, Var::from_tensor(&start[1])?];
        let mut losses = Vec::new();
        for _ in 0..20 {
            let loss = loss(fused, &parameters[0], &parameters[1])?;
            losses.push(scalar(&loss)?);
            let store = loss.backward()?;
            for parameter in &parameters {
                let gradient = store.get(parameter).expect("a gradient");
                assert!(norm(&numbers(gradient)?) > 0.0);
                parameter.set(&(parameter.as_tensor() - (gradient * 1e-3)?)?)?;
            }
        }
        assert!(losses.windows(2).all(|pair| pair[1] < pair[0]), "{losses:?}");
        assert!(losses[19] < losses[0] - 1.0, "{losses:?}");
        curves.push(losses);
    }
    for (apart, fused) in curves[0].iter().zip(&curves[1]) {
        assert!((apart - fused).abs() < 1e-4 * apart.abs(), "{apart} {fused}");
    }
    Ok(())
}

#[test]
fn gradients_add_up_and_can_be_taken_again() -> Result<()> {
    let kernels = Kernels::new();
    let a = variable(&[12, 7], DType::F64, 50)?;
    let loss = (kernels.variance_loss(&a, 1e-6)? + (kernels.correlation_loss(&a)? * 0.5)? + a.sqr()?.sum_all()?)?;
    let (_, [grad]) = formulas::gradients([&a], |[a]| {
        (formulas::var(a, 1e-6)? + (formulas::tc(a)? * 0.5)?)? + a.sqr()?.sum_all()?
    })?;
    for _ in 0..2 {
        let store = loss.backward()?;
        assert!(relative(store.get(&a).expect("a gradient"), &grad)? < 1e-12);
    }
    // One tensor as several arguments.
    let square = variable(&[8, 8], DType::F64, 51)?;
    let bias = random(&[8], DType::F64, 52)?;
    let store = kernels.decoder_free_loss(&square, &square, &bias, &weights())?.total.backward()?;
    let (_, [grad]) = formulas::gradients([&square], |[square]| {
        formulas::total(&square.matmul(&square.t()?)?.broadcast_add(&bias)?.relu()?, square, &weights())
    })?;
    assert!(relative(store.get(&square).expect("a gradient"), &grad)? < 1e-10);
    Ok(())
}

/// A gradient of 2⁻³⁰ is none in f16 before it is scaled.
#[test]
fn gradients_are_scaled_before_they_are_rounded() -> Result<()> {
    let kernels = Kernels::new();
    let x = Tensor::full(2f32.powi(-15), (1, 1), &Device::Cpu)?.to_dtype(DType::F16)?;
    let weight = Var::zeros((2, 1), DType::F16, &Device::Cpu)?;
    let bias = Tensor::ones(2, DType::F16, &Device::Cpu)?;
    let objective = Objective { lambda_lse: 2f64.powi(-14), ..lse_alone() };
    let loss = kernels.decoder_free_loss(&x, &weight, &bias, &objective)?.total;
    for (scale, expected) in [(1.0, 0.0), (4096.0, 2f64.powi(-18))] {
        let store = (&loss * scale)?.backward()?;
        assert_eq!(numbers(store.get(&weight).expect("a gradient"))?, [expected; 2], "{scale}");
    }
    Ok(())
}

/// An error of ℓ is a relative error of the gradient exp(ℓ − a): rounded to bf16, ℓ ≈ 100 would be off by up to 1/4.
#[test]
fn row_losses_are_not_rounded_on_the_way_back() -> Result<()> {
    let kernels = Kernels::new();
    let zeros = |rows| Tensor::zeros((rows, 1), DType::BF16, &Device::Cpu);
    let bias = Var::from_tensor(&Tensor::new(&[100f32, 100.5, 101.0, 103.0], &Device::Cpu)?.to_dtype(DType::BF16)?)?;
    let (_, row_loss) = kernels.encode_lse(&zeros(1)?, &zeros(4)?, &bias)?;
    let store = row_loss.sum_all()?.backward()?;
    let (_, [grad]) = formulas::gradients([&bias], |[bias]| formulas::lse(&bias.unsqueeze(0)?))?;
    assert!(relative(store.get(&bias).expect("a gradient"), &grad)? < bar(DType::BF16) / 4.0);
    Ok(())
}

#[test]
fn memory_that_is_used_again_changes_nothing() -> Result<()> {
    let kernels = Kernels::new();
    let run = |kernels: &Kernels, n: usize, objective: &Objective| -> Result<Vec<Tensor>> {
        let (x, weight, bias) =
            (random(&[n, 11], DType::F32, 60)?, variable(&[30, 11], DType::F32, 61)?, random(&[30], DType::F32, 62)?);
        let step = kernels.decoder_free_loss(&x, &weight, &bias, objective)?;
        let (a, row_loss) = kernels.encode_lse(&x, &weight, &bias)?;
        let combined = kernels.combined_loss(&a, &weight, objective)?;
        let loss = ((&step.total + &combined.total)? + row_loss.sum_all()?)?;
        let store = loss.backward()?;
        let gradient = store.get(&weight).expect("a gradient").clone();
        Ok(vec![step.total, step.activations, combined.total, combined.responsibilities, gradient])
    };
    for (n, objective) in
        [(50, weights()), (20, weights()), (50, Objective::default()), (40, Objective::default()), (70, weights())]
    {
        let expected = run(&Kernels::new(), n, &objective)?;
        for (found, truth) in run(&kernels, n, &objective)?.iter().zip(&expected) {
            assert!(same_bits(found, truth)?, "{n} rows");
        }
        // Of several threads at once, too.
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..3).map(|_| scope.spawn(|| run(&kernels, n, &objective))).collect();
            for thread in threads {
                for (found, truth) in thread.join().expect("no panic")?.iter().zip(&expected) {
                    assert!(same_bits(found, truth)?, "{n} rows");
                }
            }
            Result::Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn nan_is_not_hidden() -> Result<()> {
    let kernels = Kernels::new();
    let mut values = vec![0.5f32; 12];
    values[5] = f32::NAN;
    let x = Var::from_vec(values, (4, 3), &Device::Cpu)?;
    let (weight, bias) = (variable(&[5, 3], DType::F32, 70)?, variable(&[5], DType::F32, 71)?);
    assert!(scalar(&kernels.decoder_free_loss(&x, &weight, &bias, &Objective::default())?.total)?.is_nan());
    let (a, row_loss) = kernels.encode_lse(&x, &weight, &bias)?;
    let rows = numbers(&row_loss)?;
    assert!(rows[1].is_nan() && rows[0].is_finite());
    // The gradient of row 1 passes its activations, which are NaN.
    let store = a.sum_all()?.backward()?;
    assert!(numbers(&store.get(&x).expect("a gradient").i(1)?)?.iter().any(|v| *v != 0.0));
    Ok(())
}

#[test]
fn wrong_tensors_are_refused() -> Result<()> {
    let kernels = Kernels::new();
    let tensor = |dims: &[usize], dtype| Tensor::ones(dims, dtype, &Device::Cpu);
    let f = DType::F32;
    let (x, weight, bias, a) = (tensor(&[6, 4], f)?, tensor(&[5, 4], f)?, tensor(&[5], f)?, tensor(&[6, 5], f)?);
    let objective = Objective::default();
    let step = |x: &Tensor, weight: &Tensor, bias: &Tensor| {
        let encoded = kernels.encode_lse(x, weight, bias).map(|_| ()).expect_err("refused");
        let error = kernels.decoder_free_loss(x, weight, bias, &objective).expect_err("refused");
        assert_eq!(encoded.to_string(), error.to_string());
        error
    };
    let combined = |a: &Tensor, weight: &Tensor| kernels.combined_loss(a, weight, &objective).expect_err("refused");
    let shape = |error: Error, name: &str, what: &str| {
        assert!(matches!(&error, Error::Shape { name: found, .. } if *found == name), "{error}");
        assert!(error.to_string().contains(what), "{error}");
    };
    shape(step(&tensor(&[24], f)?, &weight, &bias), "x", "x has shape [24], but it must be a matrix [N,D]");
    shape(step(&x, &tensor(&[5, 3], f)?, &bias), "weight", "[5, 4], [H,D] of x [N,D]");
    shape(step(&x, &tensor(&[5], f)?, &bias), "weight", "a matrix [H,D]");
    shape(step(&x, &weight, &tensor(&[6], f)?), "bias", "[5], [H] of weight [H,D]");
    shape(step(&x, &weight, &tensor(&[1, 5], f)?), "bias", "[5]");
    shape(combined(&a, &tensor(&[6, 4], f)?), "weight", "[5, 4], [H,D] of a [N,H]");
    shape(combined(&tensor(&[], f)?, &weight), "a", "a matrix [N,H]");
    for (error, name) in [
        (kernels.lse_loss(&bias).map(|_| ()), "a"),
        (kernels.variance_loss(&bias, 1e-6).map(|_| ()), "a"),
        (kernels.correlation_loss(&bias).map(|_| ()), "a"),
        (kernels.weight_redundancy_loss(&bias).map(|_| ()), "weight"),
    ] {
        shape(error.expect_err("refused"), name, "a matrix");
    }

    let integers = tensor(&[6, 5], DType::U32)?;
    for (error, operand) in [
        (kernels.lse_loss(&integers).map(|_| ()), "a"),
        (kernels.variance_loss(&integers, 1e-6).map(|_| ()), "a"),
        (kernels.weight_redundancy_loss(&integers).map(|_| ()), "weight"),
        (kernels.encode_lse(&integers, &weight, &bias).map(|_| ()), "x"),
    ] {
        let error = error.expect_err("refused");
        assert!(matches!(error, Error::DType { name, found: DType::U32, .. } if name == operand), "{error}");
        assert!(error.to_string().contains("use "), "{error}");
    }
    for (error, operand) in [
        (step(&x, &tensor(&[5, 4], DType::BF16)?, &bias), "weight"),
        (step(&x, &weight, &tensor(&[5], DType::F64)?), "bias"),
        (combined(&a, &tensor(&[5, 4], DType::F64)?), "weight"),
    ] {
        assert!(matches!(error, Error::DTypeMismatch { name, expected: DType::F32, .. } if name == operand), "{error}");
        assert!(error.to_string().contains("to_dtype(DType::F32)"), "{error}");
    }

    // What the kernels refuse.
    let few = kernels.decoder_free_loss(&x.narrow(0, 0, 1)?, &weight, &bias, &objective).expect_err("refused");
    assert!(matches!(few, Error::Kernels(sae_kernels::Error::TooFewRows { rows: 1 })), "{few}");
    let eps = kernels.variance_loss(&a, 0.0).expect_err("refused");
    assert!(matches!(eps, Error::Kernels(sae_kernels::Error::Configuration { name: "variance_eps", .. })), "{eps}");
    let none = kernels.encode_lse(&x, &tensor(&[0, 4], f)?, &tensor(&[0], f)?).expect_err("refused");
    assert!(matches!(none, Error::Kernels(sae_kernels::Error::NoLatents)), "{none}");
    // In a function with candle's result it is candle's error, with the same words.
    let words = none.to_string();
    assert!(candle_core::Error::from(none).to_string().contains(&words));
    Ok(())
}

#[test]
fn no_rows_and_no_inputs() -> Result<()> {
    let kernels = Kernels::new();
    let (weight, bias) = (variable(&[5, 4], DType::F32, 80)?, variable(&[5], DType::F32, 81)?);
    let none = Tensor::zeros((0, 4), DType::F32, &Device::Cpu)?;
    let found = kernels.decoder_free_loss(&none, &weight, &bias, &lse_alone())?;
    assert_eq!((scalar(&found.total)?, found.activations.dims()), (0.0, &[0, 5][..]));
    let store = found.total.backward()?;
    assert!(numbers(store.get(&weight).expect("a gradient"))?.iter().all(|v| *v == 0.0));
    let (a, row_loss) = kernels.encode_lse(&none, &weight, &bias)?;
    assert_eq!((a.dims(), row_loss.dims()), (&[0, 5][..], &[0][..]));
    let narrow = Tensor::zeros((3, 0), DType::F32, &Device::Cpu)?;
    let (a, _) = kernels.encode_lse(&narrow, &Tensor::zeros((5, 0), DType::F32, &Device::Cpu)?, &bias)?;
    assert!(relative(&a, &bias.relu()?.broadcast_as((3, 5))?.contiguous()?)? == 0.0);
    Ok(())
}
