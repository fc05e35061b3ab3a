//! What the calls' arguments mean: extents, objective, matrices, statistics.

use super::buffer::{Buffers, Input, Output};
use super::call::Failure;
use super::{
    SAEK_ERROR_ARGUMENT, SAEK_ERROR_SHAPE, SAEK_REDUCTION_MEAN, SAEK_REDUCTION_SUM, saek_losses, saek_objective,
};
use crate::backend::Shape;
use crate::cpu::Cpu;
use crate::decoder_free::DecoderFreeStep;
use crate::error::Error;
use crate::matrix::{MatMut, MatRef};
use crate::objective::{Losses, Objective, Reduction};
use crate::statistics::Statistics;

/// Extents of a call, and the numbers of elements that follow from them.
pub(super) struct Extents {
    pub(super) shape: Shape,
    ldx: usize,
    pub(super) x: usize,
    pub(super) grad_x: usize,
    pub(super) weight: usize,
    pub(super) activations: usize,
}

impl Extents {
    pub(super) fn new(n: i64, d: i64, h: i64, ldx: i64) -> Result<Self, Failure> {
        let (rows, inputs, latents) = (extent("n", n)?, extent("d", d)?, extent("h", h)?);
        let ldx = extent("ldx", ldx)?;
        if latents == 0 {
            return Err(Failure::of("h", Error::NoLatents));
        }
        if ldx < inputs {
            return Err(Failure::of("ldx", Error::Stride { row_stride: ldx, cols: inputs }));
        }
        let x = if rows == 0 || inputs == 0 { 0 } else { product("n*ldx", rows - 1, ldx)?.saturating_add(inputs) };
        Ok(Self {
            shape: Shape { rows, inputs, latents },
            ldx,
            x,
            grad_x: product("n*d", rows, inputs)?,
            weight: product("h*d", latents, inputs)?,
            activations: product("n*h", rows, latents)?,
        })
    }
}

/// A number of elements that is given.
fn extent(name: &'static str, value: i64) -> Result<usize, Failure> {
    usize::try_from(value).map_err(|_| {
        let requirement = if value < 0 { "at least 0" } else { "within the address space" };
        Failure::new(SAEK_ERROR_SHAPE, format!("{name} = {value}, but it must be {requirement}"))
    })
}

fn product(what: &'static str, one: usize, other: usize) -> Result<usize, Failure> {
    Ok(one.checked_mul(other).ok_or(Error::Overflow { what })?)
}

/// Numbers in a buffer of statistics.
pub(super) fn statistics_len(h: i64) -> Result<usize, Failure> {
    let h = extent("h", h)?;
    if h == 0 {
        return Err(Failure::of("h", Error::NoLatents));
    }
    // 2 + h + h(h + 1)/2 ≤ (h + 2)², which leaves room to count bytes too.
    let bound = h.checked_add(2).and_then(|h| h.checked_mul(h)).and_then(|len| len.checked_mul(size_of::<f64>()));
    bound.filter(|bytes| isize::try_from(*bytes).is_ok()).ok_or(Error::Overflow { what: "h*h" })?;
    Ok(Statistics::len(h, true))
}

/// # Safety
/// As [`Input::slice`].
pub(super) unsafe fn objective(objective: Input<saek_objective>) -> Result<Objective, Failure> {
    // SAFETY: the caller's promise.
    let given = unsafe { objective.slice() }[0];
    let reduction = match given.reduction {
        SAEK_REDUCTION_SUM => Reduction::Sum,
        SAEK_REDUCTION_MEAN => Reduction::Mean,
        other => {
            let text = format!(
                "reduction = {other}, but it must be SAEK_REDUCTION_SUM ({SAEK_REDUCTION_SUM}) or SAEK_REDUCTION_MEAN \
                 ({SAEK_REDUCTION_MEAN})"
            );
            return Err(Failure::new(SAEK_ERROR_ARGUMENT, text));
        }
    };
    let saek_objective { lambda_lse, lambda_var, lambda_tc, lambda_wr, variance_eps, .. } = given;
    let objective =
        Objective { lambda_lse, lambda_var, lambda_tc, lambda_wr, variance_eps, reduction, normalize_weight: true };
    objective.check()?;
    Ok(objective)
}

/// A host that averages instead of summing, or forgets to zero the buffer, mostly shows it here.
pub(super) fn check_count(count: f64, rows: usize) -> Result<(), Failure> {
    if count >= rows as f64 && count.fract() == 0.0 && count <= 2f64.powi(53) {
        return Ok(());
    }
    let text = format!(
        "statistics[0] = {count}, but it must be the number of rows of the batch, at least the {rows} of this call; \
         set the buffer to 0 before the first phase, and sum it over the ranks"
    );
    Err(Failure::new(SAEK_ERROR_ARGUMENT, text))
}

/// What the two phases allocate on the way, or a little more: the statistics three times, one of them as f32.
pub(super) fn working_bytes(statistics: usize) -> crate::Result<usize> {
    statistics.checked_mul(3 * size_of::<f64>()).ok_or(Error::Overflow { what: "the size of the statistics" })
}

/// The shift of statistics.
pub(super) fn widened(shift: Option<&[f32]>, h: usize) -> Vec<f64> {
    shift.map_or_else(|| vec![0.0; h], |shift| shift.iter().map(|c| f64::from(*c)).collect())
}

/// # Safety
/// As [`Output::slice`].
pub(super) unsafe fn write_losses(to: Output<saek_losses>, Losses { lse, var, tc, wr, total }: Losses) {
    // SAFETY: the caller's promise.
    let to = unsafe { to.slice() };
    to[0] = saek_losses { lse, var, tc, wr, total };
}

/// The inputs that all calls have.
pub(super) struct Inputs {
    x: Input<f32>,
    weight: Input<f32>,
    bias: Input<f32>,
}

/// x, weight and bias.
type InputViews<'a> = (MatRef<'a, f32>, MatRef<'a, f32>, &'a [f32]);

impl Inputs {
    pub(super) fn take(
        buffers: &mut Buffers,
        extents: &Extents,
        x: *const f32,
        weight: *const f32,
        bias: *const f32,
    ) -> Result<Self, Failure> {
        Ok(Self {
            x: buffers.input("x", x, extents.x)?,
            weight: buffers.input("weight", weight, extents.weight)?,
            bias: buffers.input("bias", bias, extents.shape.latents)?,
        })
    }

    /// # Safety
    /// As [`Input::slice`].
    pub(super) unsafe fn views<'a>(self, extents: &Extents) -> crate::Result<InputViews<'a>> {
        // SAFETY: the caller's promise.
        let (x, weight, bias) = unsafe { (self.x.slice(), self.weight.slice(), self.bias.slice()) };
        let Shape { rows, inputs, latents } = extents.shape;
        Ok((MatRef::with_stride(x, rows, inputs, extents.ldx)?, MatRef::new(weight, latents, inputs)?, bias))
    }
}

/// The gradients that a call writes.
pub(super) struct Gradients {
    weight: Output<f32>,
    bias: Output<f32>,
    x: Option<Output<f32>>,
}

impl Gradients {
    pub(super) fn take(
        buffers: &mut Buffers,
        extents: &Extents,
        weight: *mut f32,
        bias: *mut f32,
        x: *mut f32,
    ) -> Result<Self, Failure> {
        Ok(Self {
            weight: buffers.output("grad_weight", weight, extents.weight)?,
            bias: buffers.output("grad_bias", bias, extents.shape.latents)?,
            x: buffers.optional_output("grad_x", x, extents.grad_x)?,
        })
    }

    /// What a model takes.
    ///
    /// # Safety
    /// As [`Input::slice`] and [`Output::slice`].
    pub(super) unsafe fn step<'a>(
        self,
        extents: &Extents,
        inputs: Inputs,
        activations: Option<Output<f32>>,
        row_loss: Option<Output<f32>>,
    ) -> crate::Result<DecoderFreeStep<'a, Cpu<f32>>> {
        let Shape { rows, inputs: d, latents } = extents.shape;
        // SAFETY: the caller's promise.
        unsafe {
            let (x, weight, bias) = inputs.views(extents)?;
            Ok(DecoderFreeStep {
                x,
                weight,
                bias,
                grad_weight: MatMut::new(self.weight.slice(), latents, d)?,
                grad_bias: self.bias.slice(),
                grad_x: self.x.map(|x| MatMut::new(x.slice(), rows, d)).transpose()?,
                activations: activations.map(|a| MatMut::new(a.slice(), rows, latents)).transpose()?,
                row_loss: row_loss.map(|row_loss| row_loss.slice()),
            })
        }
    }
}
