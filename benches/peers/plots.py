"""The picture of `step.py`: shares of the peak by shape."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter

from competitors import COMPETITORS, OURS
from problem import Shape
from report import share, shape_of

# Okabe and Ito's colours, which colour-blind people can tell apart; they also differ in lightness.
COLOURS = {OURS: "#D55E00", "eager": "#56B4E9", "compile": "#0072B2", "manual": "#000000", "jax": "#009E73",
           "autocast": "#CC79A7"}
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 160,
         "axes.titlesize": 10.5, "axes.titlelocation": "left"}


def shares(run: dict[str, Any], path: Path) -> None:
    """A panel for each number of threads; bars of the f32 competitors."""
    plt.rcParams.update(STYLE)
    counts = sorted({record["threads"] for record in run["records"]})
    shapes = list(dict.fromkeys(shape_of(record) for record in run["records"]))
    keys = [key for key in [OURS, *run["peers"]] if COMPETITORS[key].precision == "f32"]
    figure, axes = plt.subplots(len(counts), 1, figsize=(8.3, 1.1 + 2.2 * len(counts)), squeeze=False, sharex=True)
    for axis, threads in zip(axes[:, 0], counts):
        records = [record for record in run["records"] if record["threads"] == threads]
        panel(axis, records, keys, shapes)
        axis.set_title(f"{threads} thread{'s' * (threads > 1)}")
    axes[-1, 0].set_xlabel("rows × inputs × latents")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / figure.get_figheight()))
    figure.legend(handles, labels, loc="upper center", ncols=len(keys), frameon=False, columnspacing=1.2,
                  handlelength=1.0, handletextpad=0.4)
    figure.savefig(path)
    plt.close(figure)


def panel(axis: Any, records: list[dict[str, Any]], keys: list[str], shapes: list[Shape]) -> None:
    width = 0.84 / len(keys)
    for place, key in enumerate(keys):
        left = [shapes.index(shape_of(record)) + (place - (len(keys) - 1) / 2) * width for record in records]
        ran = [(x, share(r, key)) for x, r in zip(left, records) if "median" in r["found"].get(key, {})]
        ran = [(x, value) for x, value in ran if not math.isnan(value)]
        bars = axis.bar([x for x, _ in ran], [value for _, value in ran], 0.92 * width,
                        color=COLOURS.get(key), label=COMPETITORS[key].name)
        axis.bar_label(bars, [f"{100 * value:.0f}" for _, value in ran], fontsize=9, padding=1,
                       fontweight="bold" if key == OURS else "normal")
    names = [str(shape) for shape in shapes]
    if len(shapes) > 5:
        names = [f"{n}×{d}\n×{h}" for n, d, h in shapes]
    axis.set_xticks(range(len(shapes)), names)
    axis.tick_params(axis="x", length=0)
    axis.set_ylim(0, 1)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.grid(axis="y", color="#dddddd", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_ylabel("of the FMA peak")
