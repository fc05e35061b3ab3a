//! Where candle keeps the graph of gradients, they cannot be differentiated again, and that is an error. A process of its own, for the switch is read once.

use candle_core::{DType, Device, Result, Tensor, Var};
use sae_kernels_candle::{Kernels, Objective};
use std::process::Command;

/// The switch, and what says that this process has it.
const SWITCH: &str = "CANDLE_GRAD_DO_NOT_DETACH";

#[test]
fn second_derivatives_are_refused() -> Result<()> {
    if std::env::var(SWITCH).is_err() {
        let this = std::env::current_exe()?;
        let status = Command::new(this).env(SWITCH, "1").status()?;
        assert!(status.success(), "with {SWITCH}=1");
        return Ok(());
    }
    let kernels = Kernels::new();
    let variable = |dims: (usize, usize)| Var::randn(0f64, 1.0, dims, &Device::Cpu);
    let (x, weight, a) = (variable((6, 4))?, variable((5, 4))?, variable((6, 5))?);
    let bias = Var::zeros(5, DType::F64, &Device::Cpu)?;
    let (activations, row_loss) = kernels.encode_lse(&x, &weight, &bias)?;
    let objective = Objective { lambda_wr: 1.0, ..Objective::default() };
    let combined = kernels.combined_loss(&a, &weight, &objective)?.total;
    let fused = kernels.decoder_free_loss(&x, &weight, &bias, &objective)?.total;
    for (name, loss, variable) in [
        ("fused", fused.sqr()?, &weight),
        ("fused", fused, &x),
        ("combined", combined, &a),
        ("lse", kernels.lse_loss(&a)?.0, &a),
        ("variance", kernels.variance_loss(&a, 1e-6)?, &a),
        ("weight", kernels.weight_redundancy_loss(&weight)?, &weight),
        ("encode", activations.sqr()?.sum_all()?, &x),
        ("row loss", row_loss.sum_all()?, &weight),
    ] {
        let gradient = loss.backward()?.remove(variable).expect("a gradient");
        let error = gradient.sqr()?.sum_all()?.backward().map(|_| ()).expect_err(name);
        assert!(error.to_string().contains("no second derivatives"), "{name}: {error}");
    }
    // The switch is on: candle's own operations do have them.
    let cube = a.powf(3.0)?.sum_all()?;
    let gradient: Tensor = cube.backward()?.remove(&a).expect("a gradient");
    assert!(gradient.sum_all()?.backward()?.get(&a).is_some());
    Ok(())
}
