//! The losses as plain differentiable candle, from their formulas: what the tests compare with, in f64.

use candle_core::{D, DType, Device, Result, Tensor, Var};
use sae_kernels_candle::Objective;

/// −Σ_n logsumexp(−a_n)
pub fn lse(a: &Tensor) -> Result<Tensor> {
    row_loss(a)?.sum_all()
}

/// ℓ_n = −log Σ_j exp(−a_nj)
pub fn row_loss(a: &Tensor) -> Result<Tensor> {
    a.neg()?.exp()?.sum(D::Minus1)?.log()?.neg()
}

fn centred(a: &Tensor) -> Result<Tensor> {
    a.broadcast_sub(&a.mean_keepdim(0)?)
}

/// v \[1,H\]
fn variance(a: &Tensor) -> Result<Tensor> {
    centred(a)?.sqr()?.sum_keepdim(0)? / (a.dim(0)? - 1) as f64
}

/// −Σ_j log(v_j + eps)
pub fn var(a: &Tensor, eps: f64) -> Result<Tensor> {
    (variance(a)? + eps)?.log()?.sum_all()?.neg()
}

/// Σ_{i≠j} C_ij²
pub fn tc(a: &Tensor) -> Result<Tensor> {
    let (n, h) = a.dims2()?;
    let centred = centred(a)?;
    let covariance = (centred.t()?.matmul(&centred)? / (n - 1) as f64)?;
    let v = variance(a)?;
    // The gradient of a root is taken to be 0 at 0.
    let dead = v.eq(0.0)?.to_dtype(DType::F64)?.detach();
    let deviation = ((((v + &dead)?.sqrt()? - dead)?) + 1e-8)?;
    let correlation = covariance.broadcast_div(&deviation)?.broadcast_div(&deviation.t()?)?;
    (correlation * (1.0 - Tensor::eye(h, DType::F64, &Device::Cpu)?)?)?.sqr()?.sum_all()
}

/// ‖Ŵ Ŵᵀ − I‖²
pub fn wr(weight: &Tensor) -> Result<Tensor> {
    let norm = (weight.sqr()?.sum_keepdim(1)?.sqrt()? + 1e-8)?;
    let unit = weight.broadcast_div(&norm)?;
    (unit.matmul(&unit.t()?)? - Tensor::eye(weight.dim(0)?, DType::F64, &Device::Cpu)?)?.sqr()?.sum_all()
}

/// The weighted sum of terms that have a weight.
pub fn total(a: &Tensor, weight: &Tensor, objective: &Objective) -> Result<Tensor> {
    let terms = [
        (objective.lambda_lse, lse(a)?),
        (objective.lambda_var, var(a, objective.variance_eps)?),
        (objective.lambda_tc, tc(a)?),
        (objective.lambda_wr, wr(weight)?),
    ];
    let mut sum = Tensor::zeros((), DType::F64, &Device::Cpu)?;
    for (lambda, term) in terms {
        sum = (sum + (term * lambda)?)?;
    }
    Ok(sum)
}

/// The value of a loss and its gradients, in f64 at the tensors' values.
pub fn gradients<const K: usize>(
    tensors: [&Tensor; K],
    loss: impl Fn([&Tensor; K]) -> Result<Tensor>,
) -> Result<(f64, [Tensor; K])> {
    let wide = tensors.map(|t| Var::from_tensor(&t.detach().to_dtype(DType::F64)?.copy()?));
    let mut variables = Vec::new();
    for variable in wide {
        variables.push(variable?);
    }
    let value = loss(std::array::from_fn(|i| variables[i].as_tensor()))?;
    let store = value.backward()?;
    let gradients = std::array::from_fn(|i| match store.get(&variables[i]) {
        Some(gradient) => gradient.clone(),
        None => variables[i].zeros_like().expect("zeros"),
    });
    Ok((value.to_scalar()?, gradients))
}
