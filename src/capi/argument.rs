//! What the calls' arguments mean: extents, objective, matrices, statistics.

use super::buffer::{Buffers, Input, Output};
use super::call::Failure;
use super::context::ContextBackend;
use super::{
    SAEK_ERROR_ARGUMENT, SAEK_ERROR_SHAPE, SAEK_REDUCTION_MEAN, SAEK_REDUCTION_SUM, saek_losses, saek_objective,
};
use crate::backend::{Backend, Mat, MatOut, Shape, Slice};
use crate::decoder_free::DecoderFreeStep;
use crate::element::Element;
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
        let shape = shape(n, d, h)?;
        let Shape { rows, inputs, latents } = shape;
        let (ldx, x) = strided(["ldx", "n*ldx"], rows, inputs, ldx)?;
        Ok(Self {
            shape,
            ldx,
            x,
            grad_x: product("n*d", rows, inputs)?,
            weight: product("h*d", latents, inputs)?,
            activations: product("n*h", rows, latents)?,
        })
    }
}

pub(super) fn shape(n: i64, d: i64, h: i64) -> Result<Shape, Failure> {
    let (rows, inputs, latents) = (extent("n", n)?, extent("d", d)?, extent("h", h)?);
    if latents == 0 {
        return Err(Failure::of("h", Error::NoLatents));
    }
    Ok(Shape { rows, inputs, latents })
}

/// The row stride of a matrix, and the elements that it spans; `names` are those of the stride and the span.
pub(super) fn strided(
    [name, span]: [&'static str; 2],
    rows: usize,
    cols: usize,
    stride: i64,
) -> Result<(usize, usize), Failure> {
    let stride = extent(name, stride)?;
    if stride < cols {
        return Err(Failure::of(name, Error::Stride { row_stride: stride, cols }));
    }
    let len = if rows == 0 || cols == 0 { 0 } else { product(span, rows - 1, stride)?.saturating_add(cols) };
    Ok((stride, len))
}

/// A number of elements that is given.
fn extent(name: &'static str, value: i64) -> Result<usize, Failure> {
    usize::try_from(value).map_err(|_| {
        let requirement = if value < 0 { "at least 0" } else { "within the address space" };
        Failure::new(SAEK_ERROR_SHAPE, format!("{name} = {value}, but it must be {requirement}"))
    })
}

pub(super) fn product(what: &'static str, one: usize, other: usize) -> Result<usize, Failure> {
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
/// As [`Input::host`].
pub(super) unsafe fn objective(objective: Input<saek_objective>) -> Result<Objective, Failure> {
    // SAFETY: the caller's promise.
    let given = *unsafe { objective.host() };
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

/// # Safety
/// As [`Output::host`].
pub(super) unsafe fn write_losses(to: Output<saek_losses>, Losses { lse, var, tc, wr, total }: Losses) {
    // SAFETY: the caller's promise.
    *unsafe { to.host() } = saek_losses { lse, var, tc, wr, total };
}

/// A dense matrix to write.
///
/// # Safety
/// As [`Output::slice`].
pub(super) unsafe fn matrix<'a, B: ContextBackend, T: Element>(
    to: Output<T>,
    rows: usize,
    cols: usize,
) -> crate::Result<MatOut<'a, B, T>> {
    // SAFETY: the caller's promise.
    MatMut::from_memory(unsafe { to.slice::<B::Memory>() }, rows, cols, cols)
}

/// The inputs that all calls have.
pub(super) struct Inputs<B: ContextBackend> {
    x: Input<B::Element>,
    weight: Input<B::Element>,
    bias: Input<B::Real>,
}

/// x, weight and bias.
type InputViews<'a, B> =
    (Mat<'a, B, <B as Backend>::Element>, Mat<'a, B, <B as Backend>::Element>, Slice<'a, B, <B as Backend>::Real>);

impl<B: ContextBackend> Inputs<B> {
    pub(super) fn take(
        buffers: &mut Buffers,
        extents: &Extents,
        x: *const B::Element,
        weight: *const B::Element,
        bias: *const B::Real,
    ) -> Result<Self, Failure> {
        Ok(Self {
            x: buffers.input("x", x, extents.x)?,
            weight: buffers.input("weight", weight, extents.weight)?,
            bias: buffers.input("bias", bias, extents.shape.latents)?,
        })
    }

    /// # Safety
    /// As [`Input::slice`].
    pub(super) unsafe fn views<'a>(self, extents: &Extents) -> crate::Result<InputViews<'a, B>> {
        // SAFETY: the caller's promise.
        let (x, weight, bias) =
            unsafe { (self.x.slice::<B::Memory>(), self.weight.slice::<B::Memory>(), self.bias.slice::<B::Memory>()) };
        let Shape { rows, inputs, latents } = extents.shape;
        let x = MatRef::from_memory(x, rows, inputs, extents.ldx)?;
        Ok((x, MatRef::from_memory(weight, latents, inputs, inputs)?, bias))
    }
}

/// The gradients that a call writes.
pub(super) struct Gradients<R> {
    weight: Output<R>,
    bias: Output<R>,
    x: Option<Output<R>>,
}

impl<R: Element> Gradients<R> {
    pub(super) fn take(
        buffers: &mut Buffers,
        extents: &Extents,
        weight: *mut R,
        bias: *mut R,
        x: *mut R,
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
    pub(super) unsafe fn step<'a, B: ContextBackend<Real = R>>(
        self,
        extents: &Extents,
        inputs: Inputs<B>,
        activations: Option<Output<B::Element>>,
        row_loss: Option<Output<R>>,
    ) -> crate::Result<DecoderFreeStep<'a, B>> {
        let Shape { rows, inputs: d, latents } = extents.shape;
        // SAFETY: the caller's promise.
        unsafe {
            let (x, weight, bias) = inputs.views(extents)?;
            Ok(DecoderFreeStep {
                x,
                weight,
                bias,
                grad_weight: matrix::<B, _>(self.weight, latents, d)?,
                grad_bias: self.bias.slice::<B::Memory>(),
                grad_x: self.x.map(|x| matrix::<B, _>(x, rows, d)).transpose()?,
                activations: activations.map(|a| matrix::<B, _>(a, rows, latents)).transpose()?,
                row_loss: row_loss.map(|row_loss| row_loss.slice::<B::Memory>()),
            })
        }
    }
}
