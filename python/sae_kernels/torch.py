"""Losses of the decoder-free autoencoder for PyTorch, differentiable.

`lse_loss`, `variance_loss`, `correlation_loss`, `weight_redundancy_loss` and `combined_loss` take the arguments and give the results of the
functions of these names in the paper's code (Oursland 2026, arXiv 2601.06478), so they take their place; `decoder_free_loss` and `encode_lse`
have the encoder within. `batch_statistics` and `sharded_backward` are the two halves of a step whose rows are spread over blocks or ranks;
`sae_kernels.distributed` puts them together. Notation: N rows in the batch, D inputs, H latents; x [N,D], W [H,D], b [H], activations a [N,H].

Tensors are float32, bfloat16, float16 or float64, and results have their type and device. They are read where they lie; only what has neither
dense rows nor a row stride is copied. float64 is computed by plain loops, for `torch.autograd.gradcheck` and small batches. Gradients may be
taken once; those of `lse_loss` and `encode_lse` any number of times.

CUDA tensors (float32, bfloat16, float16) need a package built by `SAE_KERNELS_FEATURES=cuda pip install ./python`. Work goes to the current
stream of their device; calls wait for it, as losses come back through the host. Not yet run on hardware.

All raise TypeError for what is no tensor of these types, ValueError for shapes, devices and objectives that do not fit, and ValueError for
fewer than two rows where a variance is needed.
"""

import torch
from torch.autograd import Function

from . import _library
from ._arguments import check_device, check_matrix, check_shape, check_type

__all__ = [
    "batch_statistics",
    "combined_loss",
    "correlation_loss",
    "decoder_free_loss",
    "encode_lse",
    "lse_loss",
    "sharded_backward",
    "variance_loss",
    "weight_redundancy_loss",
]

_STORAGE = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}


def _storage(name, tensor):
    """The storage type's name in C, and the type of what is not stored in it."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, but it must be a torch.Tensor: use torch.as_tensor")
    if tensor.dtype not in _STORAGE:
        raise TypeError(f"{name} is {tensor.dtype}, but it must be float32, bfloat16, float16 or float64: use {name}.float()")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} is {tensor.layout}, but it must be dense: use {name}.to_dense()")
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} is on {tensor.device}, but it must be on the CPU or a CUDA device: use {name}.cpu()")
    if tensor.device.type == "cuda" and tensor.dtype == torch.float64:
        raise TypeError(f"{name} is float64 on {tensor.device}, where only float32, bfloat16 and float16 are supported: use {name}.float() or {name}.cpu()")
    return _STORAGE[tensor.dtype], torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _rows(matrix):
    """The matrix and its row stride: as it is where its rows are dense, else a copy."""
    n, cols = matrix.shape
    dense = matrix.stride(1) == 1 or cols <= 1
    if not dense or (n > 1 and matrix.stride(0) < cols) or matrix.is_neg():
        matrix = matrix.contiguous().resolve_neg()
    return matrix, max(matrix.stride(0), cols) if n > 1 else max(cols, 1)


def _dense(tensor, dtype=None):
    return tensor.to(dtype or tensor.dtype).contiguous().resolve_neg()


def _scalar(like, value):
    return torch.tensor(value, dtype=like.dtype, device=like.device)


def _empty(like, *shape, dtype=None):
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def _pointers(*arguments):
    """Addresses of tensors; None and numbers as they are."""
    return (argument.data_ptr() if isinstance(argument, torch.Tensor) else argument for argument in arguments)


def _library_call(name, storage, objective, extents, like, *pointers):
    """A C function on the device of `like`, in its current stream."""
    if like.device.type == "cpu":
        return _library.call(name, storage, objective, extents, *pointers)
    # The call leaves its device current to this thread; this puts the caller's back.
    with torch.cuda.device(like.device):
        stream = torch.cuda.current_stream().cuda_stream
        return _library.call(name, storage, objective, extents, *pointers, cuda=(like.device.index, stream))


def _check_activations(a):
    _storage("a", a)
    return check_matrix("a", a.shape, "[batch, latents]")


def _check_weight(W):
    _storage("W", W)
    return check_matrix("W", W.shape, "[latents, inputs]")


def _activation_losses(objective, a, W=None, *, gradient=False, weight_gradient=False, responsibilities=False):
    """(losses, ∂L/∂a, ∂L/∂W, responsibilities); what is not wanted is None."""
    storage, real = _storage("a", a)
    (n, h), d = a.shape, 1 if W is None else W.shape[1]
    a, lda = _rows(a)
    W = None if W is None else _dense(W)
    grad_a = _empty(a, n, h) if gradient else None
    grad_W = _empty(W, h, d, dtype=real) if weight_gradient else None
    r = _empty(a, n, h, dtype=real) if responsibilities else None
    pointers = _pointers(W, grad_a, grad_W, r, None)
    losses = _library_call("activation_losses", storage, objective, (n, d, h), a, a.data_ptr(), lda, *pointers)
    # Results have the type of what they are of.
    grad_W, r = (None if t is None else t.to(a.dtype) for t in (grad_W, r))
    return losses, grad_a, grad_W, r


class _Once(Function):
    """A gradient that depends on the inputs by kernels alone: to differentiate it again is an error, never a silent 0."""

    @staticmethod
    def forward(ctx, grad, *inputs):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "sae_kernels has no second derivatives of this loss: call backward() without create_graph, or write the loss in "
            "PyTorch's own operations where they are needed (those of lse_loss and encode_lse are there)"
        )


def _scaled(grad_loss, grad, *inputs, dtype=None):
    grad = None if grad is None else (grad_loss * grad).to(dtype or grad.dtype)
    return grad if grad is None or not torch.is_grad_enabled() else _Once.apply(grad, *inputs)


class _LseLoss(Function):
    @staticmethod
    def forward(ctx, a):
        ctx.set_materialize_grads(False)
        # The gradient of Σ ℓ is what the responsibilities are.
        losses, r, _, _ = _activation_losses(_library.only(lambda_lse=1.0), a, gradient=True)
        ctx.save_for_backward(r)
        return _scalar(a, losses.lse), r

    @staticmethod
    def backward(ctx, grad_loss, grad_r):
        (r,) = ctx.saved_tensors
        grad = None if grad_loss is None else grad_loss * r
        if grad_r is not None:
            through = r * ((grad_r * r).sum(1, keepdim=True) - grad_r)
            grad = through if grad is None else grad + through
        return grad


class _StatisticsLoss(Function):
    @staticmethod
    def forward(ctx, a, objective, term):
        losses, grad, _, _ = _activation_losses(objective, a, gradient=ctx.needs_input_grad[0])
        ctx.save_for_backward(grad, a)
        return _scalar(a, getattr(losses, term))

    @staticmethod
    def backward(ctx, grad_loss):
        return _scaled(grad_loss, *ctx.saved_tensors), None, None


def _weight_losses(W, gradient):
    none = _empty(W, 0, W.shape[0])
    losses, _, grad, _ = _activation_losses(_library.only(lambda_wr=1.0), none, W, weight_gradient=gradient)
    return losses.wr, grad


class _WeightRedundancyLoss(Function):
    @staticmethod
    def forward(ctx, W):
        loss, grad = _weight_losses(W, ctx.needs_input_grad[0])
        ctx.save_for_backward(grad, W)
        return _scalar(W, loss)

    @staticmethod
    def backward(ctx, grad_loss):
        return _scaled(grad_loss, *ctx.saved_tensors)


class _CombinedLoss(Function):
    @staticmethod
    def forward(ctx, a, W, objective):
        a_grad, W_grad = ctx.needs_input_grad[:2]
        weighted = {term: getattr(objective, f"lambda_{term}") != 0.0 for term in _library.TERMS}
        W_grad = W_grad and weighted["wr"]
        losses, grad_a, grad_W, r = _activation_losses(
            objective, a, W if weighted["wr"] else None, gradient=a_grad, weight_gradient=W_grad, responsibilities=True
        )
        terms = {term: getattr(losses, term) for term in _library.TERMS}
        # Terms without weight are shown all the same.
        if unweighted := {f"lambda_{term}": 1.0 for term in ("lse", "var", "tc") if not weighted[term]}:
            others, *_ = _activation_losses(_library.only(objective.variance_eps, **unweighted), a)
            terms.update({term: getattr(others, term) for term in ("lse", "var", "tc") if not weighted[term]})
        if not weighted["wr"]:
            terms["wr"], _ = _weight_losses(W, False)
        ctx.save_for_backward(grad_a, grad_W, a, W)
        results = [_scalar(a, terms[term]) for term in _library.TERMS] + [r]
        ctx.mark_non_differentiable(*results)
        return _scalar(a, losses.total), *results

    @staticmethod
    def backward(ctx, grad_total, *_):
        grad_a, grad_W, *inputs = ctx.saved_tensors
        return _scaled(grad_total, grad_a, *inputs), _scaled(grad_total, grad_W, *inputs), None


def lse_loss(a):
    """(−Σ_n logsumexp(−a_n), responsibilities softmax(−a) [N,H]), which are also the loss's gradient."""
    _check_activations(a)
    return _LseLoss.apply(a)


def variance_loss(a, eps=1e-6):
    """−Σ_j log(v_j + eps), v the unbiased variance over the batch; eps positive."""
    _check_activations(a)
    return _StatisticsLoss.apply(a, _library.only(eps, lambda_var=1.0), "var")


def correlation_loss(a):
    """Σ_{i≠j} C_ij², C_ij = S_ij/(s_i s_j), S the unbiased covariance and s = √v + 1e-8."""
    _check_activations(a)
    return _StatisticsLoss.apply(a, _library.only(lambda_tc=1.0), "tc")


def weight_redundancy_loss(W):
    """‖Ŵ Ŵᵀ − I‖_F², Ŵ_j = W_j/(‖W_j‖ + 1e-8)."""
    _check_weight(W)
    return _WeightRedundancyLoss.apply(W)


def combined_loss(a, W, config=None):
    """The weighted sum of the four losses, as a dict: total, differentiable with respect to a and W; lse, var, tc, wr (not weighted) and
    responsibilities, detached.

    config: a mapping or an object with lambda_lse, lambda_var, lambda_tc (1 where absent), lambda_wr (0), variance_eps (1e-6), reduction
    ("sum", or "mean" of the log-sum-exp term over the rows).
    """
    n, h = _check_activations(a)
    _, d = _check_weight(W)
    check_shape("W", W.shape, (h, d), "[H,D] of a [N,H]")
    check_type("W", W.dtype, "a", a.dtype)
    check_device("W", W.device, "a", a.device)
    total, lse, var, tc, wr, r = _CombinedLoss.apply(a, W, _library.objective(config))
    return {"total": total, "lse": lse, "var": var, "tc": tc, "wr": wr, "responsibilities": r}


def _encoder(x, weight, bias):
    _, real = _storage("x", x)
    n, d = check_matrix("x", x.shape, "[N,D]")
    _storage("weight", weight)
    h, _ = check_matrix("weight", weight.shape, "[H,D]")
    check_shape("weight", weight.shape, (h, d), "[H,D] of x [N,D]")
    check_type("weight", weight.dtype, "x", x.dtype)
    check_device("weight", weight.device, "x", x.device)
    _storage("bias", bias)
    check_shape("bias", bias.shape, (h,), "[H] of weight [H,D]")
    check_device("bias", bias.device, "x", x.device)
    if bias.dtype != real:
        check_type("bias", bias.dtype, "x", x.dtype)
    return real, (n, d, h)


def _call(name, objective, extents, x, weight, bias, *outputs):
    storage, real = _storage("x", x)
    x, ldx = _rows(x)
    weight, bias = _dense(weight), _dense(bias, dtype=real)
    return _library_call(name, storage, objective, extents, x, x.data_ptr(), ldx, *_pointers(weight, bias, *outputs))


class _EncodeLse(Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.set_materialize_grads(False)
        real, (n, d, h) = _encoder(x, weight, bias)
        a, row_loss = _empty(x, n, h), _empty(x, n, dtype=real)
        _call("decoder_free_forward", _library.only(lambda_lse=1.0), (n, d, h), x, weight, bias, a, row_loss)
        ctx.save_for_backward(x, weight, a)
        ctx.real, ctx.bias_dtype = real, bias.dtype
        return a, row_loss.to(x.dtype)

    # In PyTorch's own operations, which may be differentiated again.
    @staticmethod
    def backward(ctx, grad_a, grad_row_loss):
        x, weight, a = ctx.saved_tensors
        if grad_row_loss is not None:
            # Not exp(ℓ − a): an ℓ of 100 has an error of 0.25 in bfloat16.
            through = (grad_row_loss[:, None] * torch.softmax(-a.to(ctx.real), 1)).to(a.dtype)
            grad_a = through if grad_a is None else grad_a + through
        if grad_a is None:
            return None, None, None
        dz = grad_a.masked_fill(a <= 0, 0.0)
        wanted = ctx.needs_input_grad
        return (
            dz @ weight if wanted[0] else None,
            dz.T @ x if wanted[1] else None,
            dz.sum(0).to(ctx.bias_dtype) if wanted[2] else None,
        )


class _DecoderFreeLoss(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, objective):
        real, (n, d, h) = _encoder(x, weight, bias)
        a, row_loss = _empty(x, n, h), _empty(x, n, dtype=real)
        if any(ctx.needs_input_grad[:3]):
            grads = [_empty(x, *shape, dtype=real) for shape in ((h, d), (h,), (n, d))]
            grad_weight, grad_bias, grad_x = grads
            if not ctx.needs_input_grad[0]:
                grads[2] = grad_x = None
            losses = _call("decoder_free_step", objective, (n, d, h), x, weight, bias, a, row_loss, *grads)
            ctx.save_for_backward(grad_x, grad_weight, grad_bias, x, weight, bias)
        else:
            losses = _call("decoder_free_forward", objective, (n, d, h), x, weight, bias, a, row_loss)
        results = [_scalar(x, getattr(losses, term)) for term in _library.TERMS] + [a, row_loss.to(x.dtype)]
        ctx.mark_non_differentiable(*results)
        return _scalar(x, losses.total), *results

    @staticmethod
    def backward(ctx, grad_total, *_):
        *grads, x, weight, bias = ctx.saved_tensors
        each = zip(grads, (x, weight, bias), ctx.needs_input_grad)
        # Rounded after they are scaled: what scales losses in float16 does so to keep small gradients.
        scaled = (_scaled(grad_total, grad, x, weight, bias, dtype=of.dtype) if needed else None for grad, of, needed in each)
        return *scaled, None


def encode_lse(x, weight, bias):
    """(a, ℓ): activations max(x Wᵀ + b, 0) [N,H] and row losses ℓ_n = −log Σ_j exp(−a_nj) [N], both differentiable."""
    return _EncodeLse.apply(x, weight, bias)


def decoder_free_loss(x, weight, bias, config=None):
    """The loss of a step of the decoder-free autoencoder, a = max(x Wᵀ + b, 0), as a dict: total, differentiable with respect to x, weight and
    bias; lse, var, tc, wr (not weighted; 0 for a term without weight), activations [N,H] and row_loss [N], detached.

    Losses and gradients are computed together, in one step. config: as of `combined_loss`.
    """
    results = _DecoderFreeLoss.apply(x, weight, bias, _library.objective(config))
    return dict(zip(("total", *_library.TERMS, "activations", "row_loss"), results))


def _shard(x, weight, bias, shift=None):
    """What `_encoder` says, of rows that are not the whole batch; and the shift as the C functions want it."""
    real, (n, d, h) = _encoder(x, weight, bias)
    if real == torch.float64:
        raise TypeError("x is float64, but the halves of a step are of float32, bfloat16 and float16: use x.float(), or decoder_free_loss for it all")
    if shift is not None:
        _storage("shift", shift)
        check_shape("shift", shift.shape, (h,), "[H] of weight [H,D]")
        check_device("shift", shift.device, "x", x.device)
        shift = _dense(shift, dtype=real)
    return real, (n, d, h), shift


def _check_sums(name, tensor, x, dtype, shape, what):
    """What the kernels add to, or read, as it lies."""
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype:
        raise TypeError(f"{name} is {getattr(tensor, 'dtype', type(tensor).__name__)}, but it must be a tensor of {dtype}")
    check_shape(name, tensor.shape, shape, what)
    check_device(name, tensor.device, "x", x.device)
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, but it must be dense: use {name}.contiguous()")


@torch.no_grad()
def batch_statistics(x, weight, bias, shift=None, add_to=None):
    """The first half of a step whose rows are spread over blocks or ranks: a float64 tensor [2 + H + H(H+1)/2] of sums over the rows of x,

        N,  Σ_n ℓ_n,  Σ_n (a_nj − c_j),  Σ_n (a_ni − c_i)(a_nj − c_j) for i ≤ j, row by row,

    a = max(x Wᵀ + b, 0), ℓ_n = −log Σ_j exp(−a_nj). Statistics of all rows are the sum of the blocks', element by element.

    shift: c [H], the same for all blocks and for `sharded_backward`; None is 0. It changes nothing but rounding in float64, which shows where a
    mean is millions of deviations from 0. add_to: a tensor to which the sums are added, and which is returned. x may have no rows.
    ValueError for shapes and devices, TypeError for types; float64 is not among them.
    """
    _, (n, d, h), shift = _shard(x, weight, bias, shift)
    shape, what = (_library.statistics_len(h),), "[2 + H + H(H+1)/2] of weight [H,D]"
    statistics = torch.zeros(shape, dtype=torch.float64, device=x.device) if add_to is None else add_to
    _check_sums("add_to", statistics, x, torch.float64, shape, what)
    _call("decoder_free_statistics", None, (n, d, h), x, weight, bias, shift, statistics)
    return statistics


@torch.no_grad()
def sharded_backward(x, weight, bias, statistics, config=None, shift=None, add_weight_term=True, add_to=None):
    """The second half: given the statistics of the whole batch, the gradients of these rows, as a dict: total, lse, var, tc, wr of the whole batch
    (not weighted but for total; 0 for a term without weight), and grad_weight [H,D] and grad_bias [H], all float32. The *sum* of the blocks'
    gradients (never their mean) is the gradient of the whole batch.

    The weight-redundancy term is no sum over rows: add_weight_term is True for one block of all. It decides on gradients; losses have the term
    always. add_to: (grad_weight, grad_bias) to which the gradients are added, and which are returned. config: as of `combined_loss`; shift: as
    of `batch_statistics`. The gradient with respect to x is not computed.
    ValueError for shapes and devices, for statistics whose number of rows is less than that of x or no whole number (as a mean's), and for fewer
    than two rows in all where a variance is needed; TypeError for types.
    """
    real, (n, d, h), shift = _shard(x, weight, bias, shift)
    _check_sums("statistics", statistics, x, torch.float64, (_library.statistics_len(h),), "[2 + H + H(H+1)/2] of weight [H,D]")
    if add_to is None:
        add_to = tuple(torch.zeros(shape, dtype=real, device=x.device) for shape in ((h, d), (h,)))
    grad_weight, grad_bias = add_to
    _check_sums("grad_weight", grad_weight, x, real, (h, d), "[H,D] of weight")
    _check_sums("grad_bias", grad_bias, x, real, (h,), "[H] of weight [H,D]")
    arguments = (shift, statistics, int(add_weight_term), grad_weight, grad_bias, None)
    losses = _call("decoder_free_backward", _library.objective(config), (n, d, h), x, weight, bias, *arguments)
    values = {term: _scalar(grad_bias, getattr(losses, term)) for term in ("total", *_library.TERMS)}
    return {**values, "grad_weight": grad_weight, "grad_bias": grad_bias}
