"""Who takes part: each competitor's step as a function without arguments that returns `Results`.

A new one is a function from `Problem` and the number of threads to such a step, and a line in `COMPETITORS`.
"""

from __future__ import annotations

import ctypes
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import numpy as np

from problem import DEVIATION_EPS, VARIANCE_EPS, Problem, Results

Step = Callable[[], Results]


@dataclass(frozen=True)
class Competitor:
    """A column of the tables."""

    name: str
    build: Callable[..., Step]
    module: str | None = None
    precision: str = "f32"

    def version(self) -> str | None:
        """The version of the package that it needs, or None if that is not installed."""
        try:
            return importlib.import_module(self.module).__version__ if self.module else ""
        except ImportError:
            return None


# PyTorch


def torch_loss(problem: Problem) -> Callable[..., Any]:
    """The objective as one writes it for autograd."""
    import torch

    whole = problem.whole

    def loss(x, w, b):
        a = torch.relu(x @ w.T + b)
        total = -torch.logsumexp(-a, 1).sum()
        if whole:
            variance, centred = a.var(0), a - a.mean(0)
            s = a.std(0) + DEVIATION_EPS
            correlation = centred.T @ centred / (a.shape[0] - 1) / (s[:, None] * s[None, :])
            eye = torch.eye(w.shape[0], dtype=a.dtype, device=a.device)
            total = total - torch.log(variance + VARIANCE_EPS).sum() + ((correlation * (1 - eye)) ** 2).sum()
        return total

    return loss


def torch_gradient(problem: Problem, with_x: bool = False) -> Callable[..., Any]:
    """Loss and gradient as an expert writes them when the gradient is derived by hand."""
    import torch

    whole = problem.whole

    def step(x, w, b):
        a = torch.relu(x @ w.T + b)
        n = a.shape[0]
        row = torch.logsumexp(-a, 1)
        loss, dz = -row.sum(), torch.exp(-a - row[:, None])
        if whole:
            centred = a - a.mean(0)
            covariance = centred.T @ centred / (n - 1)
            variance = covariance.diagonal()
            deviation = variance.sqrt()
            s = deviation + DEVIATION_EPS
            correlation = covariance / (s[:, None] * s[None, :])
            correlation = correlation - torch.diag(correlation.diagonal())
            q = (correlation * correlation).sum(1)
            loss = loss - torch.log(variance + VARIANCE_EPS).sum() + q.sum()
            coupling = 4 / (n - 1) * correlation / (s[:, None] * s[None, :])
            inner = torch.where(deviation > 0, q / (s * deviation), torch.zeros_like(q))
            diagonal = -(4 * inner + 2 / (variance + VARIANCE_EPS)) / (n - 1)
            dz = dz + centred @ coupling + centred * diagonal
        dz = dz * (a > 0)
        return loss, dz.T @ x, dz.sum(0), *([dz @ w] if with_x else [])

    return step


def _torch_arrays(problem: Problem, dtype: Any = None) -> list[Any]:
    import torch

    return [torch.from_numpy(array).to(dtype or torch.float32) for array in (problem.x, problem.w, problem.b)]


def autograd(loss: Callable[..., Any], x: Any, w: Any, b: Any, with_x: bool = False) -> Step:
    x, w, b = (array.detach().requires_grad_(wanted) for array, wanted in ((x, with_x), (w, True), (b, True)))

    def step() -> Results:
        x.grad = w.grad = b.grad = None
        value = loss(x, w, b)
        value.backward()
        return Results(value.detach(), w.grad, b.grad, x.grad)

    return step


def torch_eager(problem: Problem, threads: int) -> Step:
    return autograd(torch_loss(problem), *_torch_arrays(problem))


def torch_compiled(problem: Problem, threads: int) -> Step:
    import torch

    return autograd(torch.compile(torch_loss(problem), dynamic=False), *_torch_arrays(problem))


def torch_by_hand(problem: Problem, threads: int) -> Step:
    import torch

    compiled, arrays = torch.compile(torch_gradient(problem), dynamic=False), _torch_arrays(problem)

    def step() -> Results:
        with torch.no_grad():
            return Results(*compiled(*arrays))

    return step


def torch_autocast(problem: Problem, threads: int) -> Step:
    """The eager step where autocast chooses what is computed in bf16."""
    import torch

    loss = torch_loss(problem)

    def cast(x, w, b):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss(x, w, b)

    return autograd(cast, *_torch_arrays(problem))


def torch_float64(problem: Problem) -> Results:
    """The truth: the same loss by autograd in float64."""
    import torch

    results = autograd(torch_loss(problem), *_torch_arrays(problem, torch.float64))()
    return Results(*(np.asarray(value) for value in results if value is not None))


# JAX


def jax_jit(problem: Problem, threads: int) -> Step:
    import jax
    import jax.numpy as jnp

    def loss(w, b, x):
        a = jax.nn.relu(x @ w.T + b)
        total = -jax.scipy.special.logsumexp(-a, axis=1).sum()
        if problem.whole:
            centred = a - a.mean(0)
            covariance = centred.T @ centred / (a.shape[0] - 1)
            variance = jnp.diagonal(covariance)
            # The derivative of the root at 0, where a latent is dead, would be NaN.
            s = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 0.0) + DEVIATION_EPS
            correlation = covariance / (s[:, None] * s[None, :])
            correlation = correlation - jnp.diag(jnp.diagonal(correlation))
            total = total - jnp.log(variance + VARIANCE_EPS).sum() + (correlation**2).sum()
        return total

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    x, w, b = (jnp.asarray(array) for array in (problem.x, problem.w, problem.b))

    def step() -> Results:
        value, (dw, db) = jax.block_until_ready(compiled(w, b, x))
        return Results(value, dw, db)

    return step


# Ours


class _Objective(ctypes.Structure):
    _fields_ = [(name, ctypes.c_double) for name in ("lse", "var", "tc", "wr", "eps")] + [("reduction", ctypes.c_int32)]


class _Losses(ctypes.Structure):
    _fields_ = [(name, ctypes.c_double) for name in ("lse", "var", "tc", "wr", "total")]


class Library:
    """The C functions of `include/sae_kernels.h`."""

    def __init__(self, path: Path) -> None:
        self.functions = ctypes.CDLL(str(path.resolve()))
        self.functions.saek_last_error.restype = ctypes.c_char_p
        self.functions.saek_version.restype = ctypes.c_char_p
        self.contexts: dict[int, ctypes.c_void_p] = {}

    def version(self) -> str:
        return self.functions.saek_version().decode()

    def check(self, code: int) -> None:
        if code:
            raise RuntimeError(f"error {code}: {self.functions.saek_last_error().decode()}")

    def context(self, threads: int) -> ctypes.c_void_p:
        """One context for all shapes, as a training program has it."""
        if threads not in self.contexts:
            context = ctypes.c_void_p()
            self.check(self.functions.saek_context_create_cpu(ctypes.c_int32(threads), ctypes.byref(context)))
            self.contexts[threads] = context
        return self.contexts[threads]

    def cuda_context(self, device: int, stream: int) -> ctypes.c_void_p:
        """A context that computes on a stream of a GPU, with pointers into its memory; 0 is the default stream."""
        context, stream_ = ctypes.c_void_p(), ctypes.c_void_p(stream)
        self.check(self.functions.saek_context_create_cuda(ctypes.c_int32(device), stream_, ctypes.byref(context)))
        return context

    def call(self, function: str, context: Any, shape: Any, whole: bool, x: int, *pointers: int | None) -> Callable[[], float]:
        """A call of `saek_decoder_free_FUNCTION` with the paper's weights, or the log-sum-exp alone; it returns the loss.

        The pointers are those after `ldx`, and must stay valid.
        """
        n, d, h = map(ctypes.c_int64, shape)
        objective, losses = _Objective(1.0, whole, whole, 0.0, VARIANCE_EPS, 0), _Losses()
        arguments = (context, ctypes.byref(objective), n, d, h, ctypes.c_void_p(x), d, *map(ctypes.c_void_p, pointers))
        arguments += (ctypes.byref(losses),)
        called = getattr(self.functions, f"saek_decoder_free_{function}")

        def call() -> float:
            code = called(*arguments)
            if code:
                self.check(code)
            return losses.total

        return call

    def step(self, problem: Problem, threads: int) -> Step:
        dw, db = np.full_like(problem.w, np.nan), np.full_like(problem.b, np.nan)
        x, w, b, to_w, to_b = (array.ctypes.data for array in (problem.x, problem.w, problem.b, dw, db))
        call = self.call("step_f32", self.context(threads), problem.shape, problem.whole, x, w, b, None, None, to_w, to_b, None)

        def step() -> Results:
            return Results(call(), dw, db)

        step.kept = problem  # what the pointers point to
        return step


OURS = "ours"
REFERENCE_MODULE = "torch"

COMPETITORS: dict[str, Competitor] = {
    OURS: Competitor("sae-kernels", Library.step),
    "eager": Competitor("PyTorch", torch_eager, "torch"),
    "compile": Competitor("torch.compile", torch_compiled, "torch"),
    "manual": Competitor("torch.compile, gradient by hand", torch_by_hand, "torch"),
    "jax": Competitor("JAX jit", jax_jit, "jax"),
    "autocast": Competitor("PyTorch, bf16 autocast", torch_autocast, "torch", "bf16"),
}


def clear_compiled() -> None:
    """Forgets what was compiled for the last shape."""
    import sys

    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
