"""Kernels for sparse autoencoders on NumPy arrays; `sae_kernels.torch` has the same for PyTorch, with gradients.

Arrays are float32, float16 or float64, x [N,D], weight [H,D], bias [H], activations a [N,H]. Rows may be strided; everything else is
copied where it is not dense. float64 is computed by plain loops, for checks and small batches.
"""

from typing import NamedTuple, Optional

import numpy as np

from . import _library
from ._arguments import check_matrix, check_shape, check_type
from ._library import set_num_threads, version

__all__ = ["ActivationLosses", "Step", "activation_losses", "decoder_free_step", "encode_lse", "set_num_threads", "version"]
__version__ = version()

_STORAGE = {"float32": "f32", "float64": "f64", "float16": "f16"}


class Step(NamedTuple):
    """Losses of a step (not weighted, and their weighted sum) and its gradients; row_loss is ℓ [N]."""

    total: float
    lse: float
    var: float
    tc: float
    wr: float
    activations: np.ndarray
    row_loss: np.ndarray
    grad_weight: np.ndarray
    grad_bias: np.ndarray
    grad_x: np.ndarray


class ActivationLosses(NamedTuple):
    """Losses of given activations (not weighted, and their weighted sum), responsibilities [N,H] and gradients."""

    total: float
    lse: float
    var: float
    tc: float
    wr: float
    responsibilities: np.ndarray
    row_loss: np.ndarray
    grad_activations: np.ndarray
    grad_weight: Optional[np.ndarray]


def _storage(name, array):
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} is a {type(array).__name__}, but it must be a NumPy array: use numpy.asarray")
    if array.dtype.name not in _STORAGE or not array.dtype.isnative:
        raise TypeError(f"{name} is {array.dtype}, but it must be float32, float16 or float64: use {name}.astype(numpy.float32)")
    return _STORAGE[array.dtype.name], np.float64 if array.dtype.name == "float64" else np.float32


def _rows(array):
    """The array, its address and its row stride: as it is where its rows are dense, else a copy."""
    size = array.itemsize
    dense = array.strides[1] == size or array.shape[1] <= 1
    strided = array.shape[0] <= 1 or (array.strides[0] % size == 0 and array.strides[0] >= array.shape[1] * size)
    if not (dense and strided and array.flags.aligned):
        array = np.array(array, order="C")
    stride = array.strides[0] // size if array.shape[0] > 1 else array.shape[1]
    return array, array.ctypes.data, max(stride, array.shape[1])


def _dense(array, dtype=None):
    array = np.ascontiguousarray(array, dtype)
    return array if array.flags.aligned else array.copy()


def _encoder(x, weight, bias):
    storage, real = _storage("x", x)
    n, d = check_matrix("x", x.shape, "[N,D]")
    _storage("weight", weight)
    h, _ = check_matrix("weight", weight.shape, "[H,D]")
    check_shape("weight", weight.shape, (h, d), "[H,D] of x [N,D]")
    check_type("weight", weight.dtype, "x", x.dtype)
    _storage("bias", bias)
    check_shape("bias", bias.shape, (h,), "[H] of weight [H,D]")
    if bias.dtype != real:
        check_type("bias", bias.dtype, "x", x.dtype)
    return storage, real, (n, d, h), _rows(x), _dense(weight), _dense(bias, real)


def encode_lse(x, weight, bias):
    """a = max(x Wᵀ + b, 0) [N,H] and row losses ℓ_n = −log Σ_j exp(−a_nj) [N].

    ValueError for shapes that do not fit, TypeError for types.
    """
    storage, real, (n, d, h), (x, pointer, ldx), weight, bias = _encoder(x, weight, bias)
    activations, row_loss = np.empty((n, h), x.dtype), np.empty(n, real)
    arrays = (a.ctypes.data for a in (weight, bias, activations, row_loss))
    _library.call("decoder_free_forward", storage, _library.only(lambda_lse=1.0), (n, d, h), pointer, ldx, *arrays)
    return activations, row_loss


def decoder_free_step(x, weight, bias, config=None):
    """One step of the decoder-free autoencoder a = max(x Wᵀ + b, 0): a `Step`.

    config: as of `sae_kernels.torch.combined_loss`, and reduction, "sum" (the paper's) or "mean", of the log-sum-exp term. Gradients and row
    losses of float16 arrays are float32. ValueError for fewer than two rows with a term that needs a variance.
    """
    storage, real, (n, d, h), (x, pointer, ldx), weight, bias = _encoder(x, weight, bias)
    activations, row_loss = np.empty((n, h), x.dtype), np.empty(n, real)
    gradients = np.empty((h, d), real), np.empty(h, real), np.empty((n, d), real)
    arrays = (a.ctypes.data for a in (weight, bias, activations, row_loss, *gradients))
    objective = _library.objective(config)
    losses = _library.call("decoder_free_step", storage, objective, (n, d, h), pointer, ldx, *arrays)
    terms = (getattr(losses, term) for term in ("total", *_library.TERMS))
    return Step(*terms, activations, row_loss, *gradients)


def activation_losses(activations, weight=None, config=None):
    """Losses of given activations [N,H], of any sign, and their gradient: an `ActivationLosses`.

    weight [H,D] is needed where lambda_wr is not 0. config: as of `decoder_free_step`.
    """
    storage, real = _storage("activations", activations)
    n, h = check_matrix("activations", activations.shape, "[N,H]")
    d = 0
    if weight is not None:
        _storage("weight", weight)
        _, d = check_matrix("weight", weight.shape, "[H,D]")
        check_shape("weight", weight.shape, (h, d), "[H,D] of activations [N,H]")
        check_type("weight", weight.dtype, "activations", activations.dtype)
        weight = _dense(weight)
    activations, pointer, lda = _rows(activations)
    grad_activations, row_loss = np.empty((n, h), activations.dtype), np.empty(n, real)
    grad_weight = None if weight is None else np.empty((h, d), real)
    responsibilities = np.empty((n, h), real)
    arrays = (weight, grad_activations, grad_weight, responsibilities, row_loss)
    pointers = (None if array is None else array.ctypes.data for array in arrays)
    objective = _library.objective(config)
    losses = _library.call("activation_losses", storage, objective, (n, max(d, int(weight is None)), h), pointer, lda, *pointers)
    terms = (getattr(losses, term) for term in ("total", *_library.TERMS))
    return ActivationLosses(*terms, responsibilities, row_loss, grad_activations, grad_weight)
