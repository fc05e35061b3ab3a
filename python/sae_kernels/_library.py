"""The C functions of include/sae_kernels.h by ctypes: contexts, signatures, errors."""

import ctypes
import os
import sys
import threading
from ctypes import POINTER, byref, c_char_p, c_double, c_int32, c_int64, c_void_p
from pathlib import Path

NAMES = {"darwin": "libsae_kernels.dylib", "win32": "sae_kernels.dll"}
PATH = Path(__file__).parent / NAMES.get(sys.platform, "libsae_kernels.so")

TERMS = ("lse", "var", "tc", "wr")
REDUCTIONS = {"sum": 0, "mean": 1}
# Codes of the header for wrong arguments; the others are the machine's, or ours.
NULL, ARGUMENT, SHAPE, POINTER_, MEMORY = 1, 2, 3, 4, 5


class Objective(ctypes.Structure):
    _fields_ = [(f"lambda_{term}", c_double) for term in TERMS] + [("variance_eps", c_double), ("reduction", c_int32)]


class Losses(ctypes.Structure):
    _fields_ = [(term, c_double) for term in (*TERMS, "total")]


def _load():
    try:
        library = ctypes.CDLL(str(PATH))
    except OSError as error:
        raise ImportError(f"{PATH} cannot be loaded ({error}); build it anew by `pip install ./python` in a clone") from error
    library.saek_last_error.restype = library.saek_version.restype = c_char_p
    library.saek_context_create_cpu.argtypes = [c_int32, POINTER(c_void_p)]
    library.saek_context_create_cuda.argtypes = [c_int32, c_void_p, POINTER(c_void_p)]
    begin = [c_void_p, POINTER(Objective), c_int64, c_int64, c_int64]
    pointers = {
        # x, ldx, weight, bias, activations, row_loss
        "decoder_free_forward": [c_void_p, c_int64] + 4 * [c_void_p],
        # … grad_weight, grad_bias, grad_x
        "decoder_free_step": [c_void_p, c_int64] + 7 * [c_void_p],
        # activations, lda, weight, grad_activations, grad_weight, responsibilities, row_loss
        "activation_losses": [c_void_p, c_int64] + 5 * [c_void_p],
    }
    for name, arguments in pointers.items():
        for storage in ("f32", "f64", "bf16", "f16"):
            getattr(library, f"saek_{name}_{storage}").argtypes = begin + arguments + [POINTER(Losses)]
    library.saek_statistics_len.argtypes, library.saek_statistics_len.restype = [c_int64], c_int64
    for storage in ("f32", "bf16", "f16"):
        # x, ldx, weight, bias, shift, statistics
        statistics = getattr(library, f"saek_decoder_free_statistics_{storage}")
        statistics.argtypes = [c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64] + 4 * [c_void_p]
        # … add_weight_term, grad_weight, grad_bias, grad_x
        backward = getattr(library, f"saek_decoder_free_backward_{storage}")
        backward.argtypes = begin + [c_void_p, c_int64] + 4 * [c_void_p] + [c_int32] + 3 * [c_void_p] + [POINTER(Losses)]
    return library


_library = _load()
_lock = threading.Lock()
# A context is of no use in a forked child, so each process makes its own. They live as long as the process.
_contexts = {}
_threads = 0


def version():
    """The library's version."""
    return _library.saek_version().decode()


def set_num_threads(threads):
    """Threads of all later calls; 0 is one for each processor. Results have the same bits for any number."""
    global _threads
    _context("cpu", int(threads))
    _threads = int(threads)


def _context(kind, *arguments):
    """The context of saek_context_create_<kind> for its arguments: threads of the CPU, or number and stream of a CUDA device."""
    key = (os.getpid(), kind, *arguments)
    with _lock:
        if key not in _contexts:
            context = c_void_p()
            _check(getattr(_library, f"saek_context_create_{kind}")(*arguments, byref(context)))
            _contexts[key] = context
        return _contexts[key]


def _check(code):
    if code == 0:
        return
    text = _library.saek_last_error().decode()
    raise {ARGUMENT: ValueError, SHAPE: ValueError, MEMORY: MemoryError}.get(code, RuntimeError)(text)


def objective(config=None, **override):
    """The objective of a mapping, of an object with the same attributes, or of None: the paper's."""
    if config is None or hasattr(config, "keys"):
        given = {} if config is None else config
        value = given.get if hasattr(given, "get") else lambda key, default: given[key] if key in given.keys() else default
    elif isinstance(config, (str, bytes, int, float, list, tuple, set)):
        raise TypeError(f"config is a {type(config).__name__}, but it must be a mapping, an object with attributes, or None")
    else:
        value = lambda key, default: getattr(config, key, default)  # noqa: E731
    reduction = override.get("reduction", value("reduction", "sum"))
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}, but it must be 'sum' or 'mean'")
    defaults = {"lambda_lse": 1.0, "lambda_var": 1.0, "lambda_tc": 1.0, "lambda_wr": 0.0, "variance_eps": 1e-6}
    numbers = {key: float(override.get(key, value(key, default))) for key, default in defaults.items()}
    return Objective(**numbers, reduction=REDUCTIONS[reduction])


def only(variance_eps=1e-6, **lambdas):
    """The objective of the terms that are named."""
    return Objective(**{**{f"lambda_{term}": 0.0 for term in TERMS}, **lambdas}, variance_eps=float(variance_eps))


def statistics_len(h):
    """Numbers in a buffer of statistics of h latents."""
    length = _library.saek_statistics_len(h)
    if length < 0:
        raise ValueError(_library.saek_last_error().decode())
    return length


def call(name, storage, objective, extents, *pointers, cuda=None):
    """A C function by its name without saek_; returns its losses. None is NULL. objective is None where the function takes no objective, and so
    has no losses.

    cuda: number and stream (an address, 0 or None for the default one) of the CUDA device whose memory the pointers are to; None: the host's.
    """
    losses = Losses()
    function = getattr(_library, f"saek_{name}_{storage}")
    context = _context("cpu", _threads) if cuda is None else _context("cuda", *cuda)
    arguments = (*extents, *pointers) if objective is None else (byref(objective), *extents, *pointers, byref(losses))
    _check(function(context, *arguments))
    return losses
