#!/usr/bin/env python3
"""Where the operations stand below this machine's roofline.

    cargo bench                                     # leaves its estimates in target/criterion
    python benches/peers/roofline.py                # docs/roofline.png

The lines are measured now, on as many threads: fused multiply-adds in registers, and copies of 64 MiB. A point is an
operation at a shape: FLOPs per byte that has to be read or written once, computed from the shape, and FLOP/s by the
median of criterion's last run. Operands that fit into a cache may be faster than a copy allows.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Callable, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import peak
from problem import Shape

ROOT = Path(__file__).resolve().parents[2]


class Operation(NamedTuple):
    """FLOPs (by what is needed, symmetric halves once) and numbers of f32 that must move, both from n, d, h."""

    name: str
    flops: Callable[[int, int, int], float]
    floats: Callable[[int, int, int], float]


# By criterion's group and name. An exponential or a logarithm counts as one FLOP.
OPERATIONS: dict[str, Operation] = {
    "encode/encode, row loss only f32": Operation(
        "encode, row loss", lambda n, d, h: 2 * n * d * h, lambda n, d, h: n * d + h * d + h + n),
    "encode/encode with a and statistics f32": Operation(
        "encode, a, statistics", lambda n, d, h: 2 * n * d * h, lambda n, d, h: n * d + h * d + n * h + 4 * h + n),
    "encode/responsibilities f32": Operation(
        "responsibilities", lambda n, d, h: 3 * n * h, lambda n, d, h: 2 * n * h + n),
    "statistics/comoments f32": Operation(
        "comoments", lambda n, d, h: n * h * (h + 1), lambda n, d, h: n * h + h * h),
    "statistics/correlation_dual f32": Operation(
        "correlation, dual", lambda n, d, h: n * (n + 1) * h + 2 * n * n * h, lambda n, d, h: 2 * n * h + n * n),
    "backward/backward_dz, no correlation f32": Operation(
        "dZ, no correlation", lambda n, d, h: 6 * n * h, lambda n, d, h: 2 * n * h + n),
    "backward/backward_dz, primal f32": Operation(
        "dZ, primal", lambda n, d, h: 2 * n * h * h, lambda n, d, h: 2 * n * h + h * h),
    "product/dZᵀ·x f32": Operation(
        "dW", lambda n, d, h: 2 * n * d * h, lambda n, d, h: n * h + n * d + h * d),
    "decode/decode f32": Operation(
        "decode", lambda n, d, h: 2 * n * d * h, lambda n, d, h: n * h + h * d + 2 * n * d),
    "optimizer/adam f32": Operation(
        "Adam", lambda n, d, h: 12 * h * d, lambda n, d, h: 7 * h * d),
    "step/decoder-free f32": Operation(
        "whole step", lambda n, d, h: Shape(n, d, h).flops, lambda n, d, h: n * d + 2 * h * d + 2 * h),
    "statistics/finish_statistics from a f32": Operation(
        "statistics of a, primal", lambda n, d, h: n * h * (h + 1), lambda n, d, h: n * h + 2 * h * h),
}
# Okabe and Ito's colours, and a marker each.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#000000", "#56B4E9"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "*"]


class Point(NamedTuple):
    """An operation at a shape: FLOPs per byte and FLOP/s."""

    operation: Operation
    shape: Shape
    intensity: float
    rate: float


def points(folder: Path, threads: int) -> list[Point]:
    """What criterion measured with so many threads."""
    found = []
    for file in sorted(folder.glob("**/new/benchmark.json")):
        benchmark = json.loads(file.read_text())
        operation = OPERATIONS.get(f"{benchmark['group_id']}/{benchmark['function_id']}")
        extents, _, count = (benchmark["value_str"] or "").partition(" ")
        if operation is None or count != f"{threads}t":
            continue
        shape = Shape(*map(int, extents.split("x")))
        seconds = json.loads((file.parent / "estimates.json").read_text())["median"]["point_estimate"] / 1e9
        flops = float(operation.flops(*shape))
        found.append(Point(operation, shape, flops / (4.0 * operation.floats(*shape)), flops / seconds))
    return found


def size(operation: int, shape: int) -> float:
    """Of a marker; stars look smaller than other markers."""
    return (5 + 2.5 * shape) * (1.5 if MARKERS[operation % len(MARKERS)] == "*" else 1.0)


class Lines(NamedTuple):
    """What bounds a panel's points: FLOP/s, bytes/s, and what the former are of."""

    compute: float
    copy: float
    of: str


def measured(threads: int) -> Lines:
    return Lines(peak.flops(threads, 0.2), max(peak.copy(threads) for _ in range(5)), "fused multiply-adds")


def scaled(value: float) -> str:
    """With three digits, in tera from 10¹³ on."""
    return f"{value / 1e12:.0f} T" if value >= 1e13 else f"{value / 1e12:.2f} T" if value >= 1e12 else f"{value / 1e9:.0f} G"


def panel(axis: Any, title: str, found: list[Point], lines: Lines, shapes: list[Shape]) -> None:
    compute, copy, end = lines.compute, lines.copy, max([4000, *(1.5 * point.intensity for point in found)])
    intensities = np.geomspace(min([0.1, *(p.intensity / 1.5 for p in found)]), end, 200)
    axis.plot(intensities, np.minimum(compute, copy * intensities) / 1e9, color="#555555", linewidth=1.5)
    axis.annotate(f"{lines.of}: {scaled(compute)}FLOP/s", (end, compute / 1e9), xytext=(0, 4),
                  textcoords="offset points", ha="right", fontsize=9)
    axis.annotate(f"copy: {scaled(copy)}B/s", (1.1, copy * 1.1 / 1e9), xytext=(7, -7),
                  textcoords="offset points", fontsize=9)
    operations = list(OPERATIONS.values())
    for point in found:
        place = operations.index(point.operation)
        axis.plot(point.intensity, point.rate / 1e9, MARKERS[place % len(MARKERS)], color=COLOURS[place % len(COLOURS)],
                  markersize=size(place, shapes.index(point.shape)), markeredgecolor="white", markeredgewidth=0.6)
    axis.set(xscale="log", yscale="log", xlabel="FLOPs per byte that must move")
    axis.set_title(title)
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_formatter(lambda value, _: f"{value:g}")
    axis.grid(color="#e5e5e5", linewidth=0.7)
    axis.set_axisbelow(True)


def draw(panels: dict[str, tuple[list[Point], Lines]], path: Path) -> None:
    """A panel for each title, and the legend below."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 160,
                         "axes.titlesize": 10.5, "axes.titlelocation": "left"})
    everything = [point for found, _ in panels.values() for point in found]
    shapes = sorted({point.shape for point in everything}, key=lambda shape: shape.flops)
    figure, axes = plt.subplots(1, len(panels), figsize=(8.3, 4.9), squeeze=False, sharey=True)
    for axis, (title, (found, lines)) in zip(axes[0], panels.items()):
        panel(axis, title, found, lines, shapes)
    axes[0, 0].set_ylabel("GFLOP/s")
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    legends(figure, everything, shapes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"{len(everything)} points: {path}")


def legends(figure: Any, found: list[Point], shapes: list[Shape]) -> None:
    """What the markers and their sizes stand for."""
    style = {"linestyle": "none", "markeredgecolor": "white"}
    of_operations = [
        plt.Line2D([], [], marker=MARKERS[i % len(MARKERS)], color=COLOURS[i % len(COLOURS)], markersize=size(i, 1),
                   label=operation.name, **style)
        for i, operation in enumerate(OPERATIONS.values()) if any(point.operation is operation for point in found)
    ]
    of_shapes = [
        plt.Line2D([], [], marker="o", color="#999999", markersize=size(0, i), label=f"N×D×H = {shape}", **style)
        for i, shape in enumerate(shapes)
    ]
    common = {"frameon": False, "fontsize": 9, "handletextpad": 0.3, "columnspacing": 1.2}
    figure.legend(handles=of_operations, loc="lower left", ncols=4, **common)
    figure.legend(handles=of_shapes, loc="lower right", **common)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--criterion", type=Path, default=ROOT / "target/criterion", help="default: %(default)s")
    parser.add_argument("--threads", default="1,2", help="numbers of threads (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/roofline.png", help="default: %(default)s")
    options = parser.parse_args()
    found = {count: points(options.criterion, count) for count in map(int, options.threads.split(","))}
    panels = {f"{count} thread{'s' * (count > 1)}": (some, measured(count)) for count, some in found.items() if some}
    if not panels:
        sys.exit(f"no estimates of `cargo bench` in {options.criterion}")
    draw(panels, options.out)


if __name__ == "__main__":
    main()
