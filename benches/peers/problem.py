"""The step that is compared: its data, the FLOPs it needs, and its results in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

VARIANCE_EPS = 1e-6
DEVIATION_EPS = 1e-8


class Shape(NamedTuple):
    """Rows of the batch, inputs, latents."""

    n: int
    d: int
    h: int

    def __str__(self) -> str:
        return f"{self.n}×{self.d}×{self.h}"

    @property
    def flops(self) -> float:
        """What a step needs: the map and dW 2·N·D·H each, the correlation term 3·N·H·min(N, H), whatever form is used."""
        plain = 4.0 * self.n * self.d * self.h
        return plain if self.n == 1 else plain + 3.0 * self.n * self.h * min(self.n, self.h)

    @property
    def flops_of_autograd(self) -> float:
        """What a step takes in the H×H form, by automatic differentiation and without symmetric halves."""
        return 4.0 * self.n * self.d * self.h + (0.0 if self.n == 1 else 6.0 * self.n * self.h * self.h)


class Results(NamedTuple):
    """What a step computes."""

    loss: Any
    dw: Any
    db: Any
    dx: Any = None  # where it was asked for


@dataclass
class Problem:
    """Inputs like digits (sparse, of 8 bits) and weights as they are initialised.

    All are multiples of powers of two and short enough that the sums of the linear map are exact in float32, in any
    order. So every competitor has the same latents at work as the float64 reference, and what differs in the end is
    rounding, or a bug: without this, a latent that is 1e-9 here and 0 there would look like one.
    """

    shape: Shape
    x: np.ndarray = field(init=False)
    w: np.ndarray = field(init=False)
    b: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        n, d, h = self.shape
        random = np.random.default_rng(0)
        lit = random.random((n, d)) < (0.3 if d > 8 else 1.0)
        self.x = (random.integers(1, 256, (n, d)) * lit / 256).astype(np.float32)
        scale = 2.0 ** -(6 + round(np.log2(d) / 2))
        self.w = (random.integers(-64, 65, (h, d)) * scale).astype(np.float32)
        self.b = (random.integers(-64, 65, h) * scale).astype(np.float32)

    @property
    def whole(self) -> bool:
        """Whether all terms of the objective are there. One row has no variance: there it is the log-sum-exp alone."""
        return self.shape.n > 1


def reference(problem: Problem) -> Results:
    """Loss and gradients in float64, from the gradient derived by hand."""
    x, w, b = (array.astype(np.float64) for array in (problem.x, problem.w, problem.b))
    n = len(x)
    a = np.maximum(x @ w.T + b, 0.0)
    least = a.min(1, keepdims=True)
    row = np.log(np.exp(least - a).sum(1, keepdims=True)) - least
    terms, dz = [-row.sum()], np.exp(-a - row)
    if problem.whole:
        centred = a - a.mean(0)
        covariance = centred.T @ centred / (n - 1)
        variance = np.diagonal(covariance)
        deviation = np.sqrt(variance)
        s = deviation + DEVIATION_EPS
        correlation = covariance / np.outer(s, s)
        np.fill_diagonal(correlation, 0.0)
        q = (correlation**2).sum(1)
        terms += [-np.log(variance + VARIANCE_EPS).sum(), q.sum()]
        inner = np.divide(q, s * deviation, out=np.zeros_like(q), where=deviation > 0)
        diagonal = -(4.0 * inner + 2.0 / (variance + VARIANCE_EPS)) / (n - 1)
        dz += centred @ (4.0 / (n - 1) * correlation / np.outer(s, s)) + centred * diagonal
    dz *= a > 0
    return Results(sum(terms), dz.T @ x, dz.sum(0))


def errors(results: Results, truth: Results) -> dict[str, float]:
    """Relative errors: of the loss; of each gradient, the larger of those in the Euclidean and in the maximum norm.

    The Euclidean norm sees what is a little wrong everywhere, the maximum what is wrong in one place.
    """
    found = {}
    for name, value, true in zip(Results._fields, results, truth):
        if value is None or true is None:
            continue
        difference = np.abs(np.asarray(value, dtype=np.float64) - true).ravel()
        true = np.abs(true).ravel()
        tiny = np.finfo(np.float64).tiny
        euclidean = np.linalg.norm(difference) / (np.linalg.norm(true) + tiny)
        found[name] = float(np.maximum(euclidean, difference.max() / (true.max() + tiny)))
    return found
