#!/usr/bin/env python3
"""On a GPU: a training step (losses, dW, db, dx), the fused log-sum-exp and plain products, ours beside PyTorch's; and the GPU's ceilings.

    python benches/peers/gpu.py ceilings --out ceilings.json
    python benches/peers/gpu.py peers --lib libsae_kernels.so --out peers-times.json
    python benches/peers/gpu.py peers --device cpu --shapes "16,12,40 65,33,17" --samples 3      # a rehearsal: times mean nothing

Ours is called through the C functions, with the addresses of PyTorch's tensors; its library is built with `--features capi,cuda`.
All competitors of a shape run in one process, on the same tensors and the same stream, in turns; the order moves on from round to round. In
each round each is called twice: after a memory larger than the L2 cache was overwritten (cold), and again (warm). Before either the GPU is
idle, and CUDA events around the call count the time: so gaps between launches count, and the copy of our losses to the host. Compilation
and first calls are not timed.

f32 is PyTorch's default, tf32 lets it multiply in TF32 (ours stays f32), bf16 and f16 are tensors of that type under autocast, with products in
the type and the rest in f32. All results are compared with autograd of the same loss in float64, at the shape itself or, where that does not
fit, with n and h halved until it does. The exit status is 3 if ours are wrong or missing. The file is written after each shape.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Callable, NamedTuple

from gpu_names import NAMES, OURS
from problem import Problem, Results, Shape

FEWEST = 60
# Largest relative errors. In 16 bits the rounded activations count, which the truth does not round.
TOLERANCES = {"f32": 1e-4, "tf32": 1e-4, "bf16": 5e-2, "f16": 1e-2}
# More than any L2 cache holds.
FLUSHED_BYTES = 256 << 20
LARGEST_TRUTH_FLOPS = {"cuda": 5e13, "cpu": 1e10}


class Mode(NamedTuple):
    """What is multiplied, and whether autocast decides about it."""

    dtype: str
    ours: str
    matmul: str
    autocast: bool


MODES = {
    "f32": Mode("float32", "f32", "highest", False),
    "tf32": Mode("float32", "f32", "high", False),
    "bf16": Mode("bfloat16", "bf16", "highest", True),
    "f16": Mode("float16", "f16", "highest", True),
}

# The shapes that have targets, the most telling first; and what to compare there.
WORK = [
    ("128,784,64", "bf16 f32 tf32", "step lse products"),
    ("8192,768,6144", "bf16", "step lse products"),
    ("4096,4096,131072", "bf16", "lse step"),
    ("16384,2048,16384", "bf16", "step products"),
    ("8192,4096,32768", "bf16", "step products"),
    ("65536,1024,4096", "bf16", "step products"),
    ("8192,768,6144", "tf32 f32", "step"),
]

Call = Callable[[], Any]


# Ceilings and facts


def query(*names: str) -> dict[str, str]:
    """What nvidia-smi says of the first GPU."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(names, line.split(", ")))


def version_of(module: str) -> str | None:
    try:
        return getattr(importlib.import_module(module), "__version__", "?")
    except Exception:  # a package that is there and broken is as good as missing
        return None


def driver_version() -> int | None:
    try:
        found = ctypes.c_int()
        return found.value if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(found)) == 0 else None
    except OSError:
        return None


def facts() -> dict[str, Any]:
    modules = ["torch", "triton", "cupy", "cut_cross_entropy", "liger_kernel", "numpy", "matplotlib"]
    gpu = query("name", "driver_version", "memory.total", "power.limit", "clocks.max.sm", "clocks.max.mem", "temperature.gpu")
    version = driver_version()
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()), "gpu": gpu, "python": platform.python_version(),
        "cuda of the driver": f"{version // 1000}.{version % 1000 // 10}" if version else None,
        "versions": {name: version_of(name) for name in modules},
    }


def ceilings(options: argparse.Namespace) -> int:
    """The copy's bytes and the product's FLOPs a second, and the clocks under that load."""
    found = facts()
    write(options.out, found)
    print(json.dumps(found, indent=1))
    if found["versions"]["torch"] is None:
        print("no PyTorch: the ceilings are those that our benchmark measured")
        return 0
    import torch

    extent, size = (8192, 1 << 28) if options.device == "cuda" else (256, 1 << 20)
    clock = Clock(options.device)
    left, right = (torch.randn(extent, extent, device=options.device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty(extent, extent, device=options.device, dtype=torch.bfloat16)
    source = torch.randn(size // 4, device=options.device)
    target = torch.empty_like(source)
    calls = {"product": lambda: torch.matmul(left, right.T, out=out), "copy": lambda: target.copy_(source)}
    end = time.monotonic() + (2.0 if options.device == "cuda" else 0.0)
    while time.monotonic() < end:
        calls["product"]()
        clock.synchronize()
    found["torch cuda"] = torch.version.cuda
    times = {name: [clock.time(call) for _ in range(FEWEST)] for name, call in calls.items()}
    found["under load"] = query("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_event_reasons.active")
    found["product"] = {"what": f"cuBLAS bf16 {extent}³, random", "work": 2.0 * extent**3, "unit": "FLOP/s", **summary(times["product"])}
    found["copy"] = {"what": f"copy of {size >> 20} MiB", "work": 2.0 * size, "unit": "B/s", **summary(times["copy"])}
    write(options.out, found)
    for name in calls:
        print(f"{found[name]['what']}: {found[name]['work'] / found[name]['median'] / 1e12:.2f} T{found[name]['unit']}")
    return 0


# Timing


def summary(seconds: list[float]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {"median": middle, "low": low, "high": high, "samples": len(seconds)}


class Clock:
    """Times calls by CUDA events, or on the CPU by its clock; and empties the caches."""

    def __init__(self, device: str) -> None:
        import torch

        self.cuda = device == "cuda"
        self.synchronize: Callable[[], None] = torch.cuda.synchronize if self.cuda else lambda: None
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self.cuda else []
        self.flushed = torch.empty(FLUSHED_BYTES if self.cuda else 1 << 20, dtype=torch.int8, device=device)

    def flush(self) -> None:
        self.flushed.zero_()

    def time(self, call: Call) -> float:
        """Seconds, from an idle GPU on."""
        self.synchronize()
        if not self.cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        start, end = self.events
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def interleaved(calls: dict[str, Call], clock: Clock, samples: int, end: float) -> dict[str, dict[str, Any]]:
    """Seconds of each, cold and warm; fewer samples only where the time ends."""
    warm_up = time.monotonic() + (0.5 if clock.cuda else 0.0)
    for turn in range(1000):
        for call in calls.values():
            call()
        clock.synchronize()
        if turn >= 4 and time.monotonic() > warm_up:
            break
    times: dict[str, dict[str, list[float]]] = {key: {"cold": [], "warm": []} for key in calls}
    order = list(calls)
    for turn in range(samples):
        for key in order[turn % len(order):] + order[:turn % len(order)]:
            clock.flush()
            for cache in ("cold", "warm"):
                times[key][cache].append(clock.time(calls[key]))
        if time.monotonic() > end:
            break
    return {key: {cache: summary(values) for cache, values in both.items()} for key, both in times.items()}


# Competitors at a step


class Setting:
    """A problem's tensors in a mode, and the competitors on them."""

    def __init__(self, problem: Problem, mode: str, options: argparse.Namespace, ours: Any) -> None:
        import torch

        self.problem, self.mode, self.ours, self.device = problem, MODES[mode], ours, options.device
        dtype = getattr(torch, self.mode.dtype)
        # Exact in 16 bits: the numbers have 8.
        tensor = lambda array, dtype: torch.from_numpy(array).to(options.device, dtype)
        self.x, self.w = tensor(problem.x, dtype), tensor(problem.w, dtype)
        self.b = tensor(problem.b, torch.float32)

    def cast(self) -> Any:
        import torch

        return torch.autocast(self.device, dtype=self.x.dtype) if self.mode.autocast else nullcontext()

    def in_mode(self, call: Call) -> Call:
        """The call under the mode's precision of products, which is a setting of the process."""
        import torch

        def called() -> Any:
            if torch.get_float32_matmul_precision() != self.mode.matmul:
                torch.set_float32_matmul_precision(self.mode.matmul)
            return call()

        return called

    def build(self, key: str) -> Call:
        """The step of a competitor, which returns its results."""
        import torch
        from competitors import autograd, torch_gradient, torch_loss

        if key == OURS:
            return self.our_step()
        if key == "manual":
            compiled = torch.compile(torch_gradient(self.problem, with_x=True), dynamic=False)

            def by_hand() -> Results:
                with torch.no_grad(), self.cast():
                    return Results(*compiled(self.x, self.w, self.b))

            return self.in_mode(by_hand)
        loss = torch_loss(self.problem)
        loss = torch.compile(loss, dynamic=False) if key == "compile" else loss

        def cast_loss(*arrays: Any) -> Any:
            with self.cast():
                return loss(*arrays)

        return self.in_mode(autograd(cast_loss, self.x, self.w, self.b, with_x=True))

    def our_step(self) -> Call:
        import torch

        like = lambda tensor: torch.full(tensor.shape, math.nan, dtype=torch.float32, device=self.device)
        dw, db, dx = map(like, (self.w, self.b, self.x))
        tensors = (self.x, self.w, self.b, None, None, dw, db, dx)
        call = self.ours.call(f"step_{self.mode.ours}", self.problem.shape, self.problem.whole, *tensors)
        return lambda: Results(call(), dw, db, dx)

    def lse(self, key: str) -> tuple[Call, Call]:
        """-log Σ exp(−a) of every row: a call, and one that returns what it gave for the first rows, with their truth."""
        import torch

        rows = slice(0, min(64, self.problem.shape.n))
        if key in (OURS, "unfused"):
            a = torch.relu(self.x[rows].double() @ self.w.double().T + self.b.double())
            true = -torch.logsumexp(-a, 1)
            del a
        if key == OURS:
            out = torch.full((self.problem.shape.n,), math.nan, dtype=torch.float32, device=self.device)
            call = self.ours.call(f"forward_{self.mode.ours}", self.problem.shape, False, self.x, self.w, self.b, None, out)
            return call, lambda: (out[rows], true)
        if key == "unfused":
            compiled = torch.compile(lambda x, w, b: -torch.logsumexp(-torch.relu(x @ w.T + b), 1), dynamic=False)

            def unfused() -> Any:
                with torch.no_grad(), self.cast():
                    return compiled(self.x, self.w, self.b)

            return self.in_mode(unfused), lambda: (unfused()[rows], true)
        # Cross entropy is the nearest that these have: log Σ exp(x·wᵀ) less the target's, without bias or ReLU.
        targets = torch.zeros(self.problem.shape.n, dtype=torch.int64, device=self.device)
        if key == "cce":
            from cut_cross_entropy import linear_cross_entropy

            function = lambda x, t: linear_cross_entropy(x, self.w, t, reduction="mean")
        else:
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

            def function(x: Any, t: Any) -> Any:
                found = liger_fused_linear_cross_entropy(x, self.w, t, reduction="mean")
                return found[0] if isinstance(found, tuple) else found

        def fused(part: slice = slice(None)) -> Any:
            with torch.no_grad():
                return function(self.x[part], targets[part])

        def check() -> tuple[Any, Any]:
            logits = self.x[rows].double() @ self.w.double().T
            return fused(rows).reshape(1), (torch.logsumexp(logits, 1) - logits[:, 0]).mean().reshape(1)

        return fused, check


class Ours:
    """The C library in a context of the device."""

    def __init__(self, path: Path, device: str) -> None:
        from competitors import Library

        self.library = Library(path)
        self.version = self.library.version
        if device == "cuda":
            import torch

            # The stream of PyTorch's calls, so that all is in order.
            self.context = self.library.cuda_context(torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream)
        else:
            self.context = self.library.context(1)

    def call(self, function: str, shape: Shape, whole: bool, *tensors: Any) -> Callable[[], float]:
        """A call that owns the tensors whose addresses it passes on."""
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        call = self.library.call(function, self.context, shape, whole, *pointers)
        call.tensors = tensors
        return call


class Missing:
    """In the place of ours where there is no library or no context: the peers are timed all the same."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def version(self) -> str:
        return f"not there: {self.error}"

    def call(self, *arguments: Any) -> Any:
        raise self.error


# Errors


def free_bytes(device: str) -> int:
    import torch

    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    return 4 << 30


def forget() -> None:
    """Gives back the memory of the last shape."""
    import gc

    import torch
    from competitors import clear_compiled

    clear_compiled()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def autograd_bytes(shape: Shape, size: int) -> float:
    """What autograd of the loss holds at a time, about."""
    n, d, h = shape
    return size * (12.0 * n * h + 8.0 * h * h * (n > 1) + 4.0 * h * d + 3.0 * n * d)


def shape_of_truth(shape: Shape, device: str) -> Shape:
    """The shape, or the largest with n and h halved whose float64 step fits."""
    room = 0.6 * free_bytes(device)
    while autograd_bytes(shape, 8) > room or shape.flops_of_autograd > LARGEST_TRUTH_FLOPS[device]:
        shape = Shape(max(2, shape.n // 2), shape.d, max(2, shape.h // 2))
    return shape


def truth_of(setting: Setting) -> Results:
    """Autograd in float64, on the device."""
    from competitors import autograd, torch_loss

    arrays = (tensor.double() for tensor in (setting.x, setting.w, setting.b))
    return autograd(torch_loss(setting.problem), *arrays, with_x=True)()


def errors_of(results: Results, true: Results) -> dict[str, float]:
    """`problem.errors` of tensors, where they are: those of a GPU may be too many to move."""
    import torch

    found = {}
    for name, value, right in zip(Results._fields, results, true):
        right = torch.as_tensor(right, dtype=torch.float64).reshape(-1)
        difference = (torch.as_tensor(value, device=right.device).double().reshape(-1) - right).abs()
        tiny = sys.float_info.min
        euclidean = difference.norm() / (right.norm() + tiny)
        # A NaN wins.
        found[name] = float(torch.maximum(euclidean, difference.max() / (right.abs().max() + tiny)))
    return found


def wrong(found: dict[str, Any], mode: str) -> bool:
    """Whether our errors, or a NaN, are beyond the tolerance and the peers' are not: a shape may have no better answer in a type."""
    if "errors" not in found[OURS]:
        return True
    largest = lambda values: math.nan if any(map(math.isnan, values)) else max(values)
    peers = [largest(f["errors"].values()) for key, f in found.items() if key != OURS and "errors" in f]
    excuse = 2.0 * max((error for error in peers if error < 0.5), default=0.0)
    return not largest(found[OURS]["errors"].values()) <= max(TOLERANCES[mode], excuse)


# What is compared


def attempt(key: str, build: Callable[[], Any], notes: dict[str, Any]) -> Any:
    """A peer that fails is a remark in its column; that we fail is an error in ours."""
    try:
        return build()
    except Exception as error:  # whatever a peer throws
        text = "does not fit" if "out of memory" in str(error).lower() else f"failed: {type(error).__name__}"
        print(f"{NAMES[key]}: {str(error)[:2000]}", file=sys.stderr, flush=True)
        notes[key] = {"note": text}
        return None


def compare_steps(shape: Shape, mode: str, options: argparse.Namespace, ours: Ours, end: float) -> dict[str, Any]:
    setting = Setting(Problem(shape), mode, options, ours)
    found: dict[str, Any] = {}
    keys = [OURS, *options.peers]
    # Matrices of H×H of the centred activations' correlations, some at a time.
    if autograd_bytes(shape, 4) > free_bytes(options.device):
        found |= {key: {"note": "does not fit"} for key in options.peers}
        keys = [OURS]
    steps = {}
    for key in keys:
        step = attempt(key, lambda: setting.build(key), found)
        if step is not None and attempt(key, lambda: (step(), True), found):
            steps[key] = step
    at = shape_of_truth(shape, options.device)
    checked, small = steps, setting
    if at != shape:
        small = Setting(Problem(at), mode, options, ours)
        uncompiled = [key for key in (OURS, "eager") if key in steps or (key == "eager" and key in options.peers)]
        checked = {key: step for key in uncompiled if (step := attempt(key, lambda: small.build(key), {}))}
    true = truth_of(small)
    errors_found = {}
    for key, step in checked.items():
        results = attempt(key, step, {})
        if results is not None:
            errors_found[key] = errors_of(perturbed(results, options) if key == OURS else results, true)
        del results
    del true, checked, small
    times = interleaved(steps, Clock(options.device), options.samples, end)
    for key, both in times.items():
        found[key] = both
    for key, values in errors_found.items():
        found.setdefault(key, {})["errors"] = values
    return {"kind": "step", "shape": list(shape), "mode": mode, "errors_at": list(at), "flops": with_dx(shape), "found": found,
            "wrong": wrong(found, mode) if OURS in found else True}


def with_dx(shape: Shape) -> float:
    return shape.flops + 2.0 * shape.n * shape.d * shape.h


def perturbed(results: Results, options: argparse.Namespace) -> Results:
    """The results with one element of dW wrong, where that is asked for."""
    if not options.perturb:
        return results
    dw = results.dw.clone()
    dw[-1, -1] += options.perturb * dw.abs().max()
    return results._replace(dw=dw)


def compare_lse(shape: Shape, mode: str, options: argparse.Namespace, ours: Ours, end: float) -> dict[str, Any]:
    setting = Setting(Problem(shape), mode, options, ours)
    found: dict[str, Any] = {}
    calls = {}
    for key in [OURS, "unfused", "cce", "liger"]:
        module = {"cce": "cut_cross_entropy", "liger": "liger_kernel"}.get(key)
        if module and version_of(module) is None:
            found[key] = {"note": "not installed"}
            continue
        pair = attempt(key, lambda: setting.lse(key), found)
        if pair is None:
            continue
        errors_found = attempt(key, lambda: (pair[0](), lse_error(*pair[1]()))[1], found)
        if errors_found is not None:
            calls[key] = pair[0]
            found[key] = {"errors": {"row loss": errors_found}}
    for key, both in interleaved(calls, Clock(options.device), options.samples, end).items():
        found[key] |= both
    n, d, h = shape
    return {"kind": "lse", "shape": list(shape), "mode": mode, "errors_at": list(shape), "flops": 2.0 * n * d * h, "found": found,
            "wrong": wrong(found, mode)}


def lse_error(found: Any, true: Any) -> float:
    return float((found.double() - true).abs().max() / true.abs().max())


def compare_products(shape: Shape, mode: str, options: argparse.Namespace, ours: Ours, end: float) -> list[dict[str, Any]]:
    """Every plain product that a step has, by cuBLAS."""
    import torch

    n, d, h = shape
    dtype = getattr(torch, MODES[mode].dtype)
    torch.set_float32_matmul_precision(MODES[mode].matmul)
    new = lambda rows, cols: torch.rand(rows, cols, device=options.device, dtype=dtype) * 2 - 1
    products = {"x·Wᵀ": (n, h, d, "nt"), "dZᵀ·x": (h, d, n, "tn"), "dZ·W": (n, d, h, "nn")}
    primal = {"aᵀ·a": (h, h, n, "tn"), "a·M": (n, h, h, "nn")}
    products |= primal if n >= h else {"a·aᵀ": (n, n, h, "nt"), "K·a": (n, h, n, "nn")}
    records = []
    for name, (rows, cols, depth, layout) in products.items():
        left = new(depth, rows).T if layout[0] == "t" else new(rows, depth)
        right = new(cols, depth).T if layout[1] == "t" else new(depth, cols)
        out = torch.empty(rows, cols, device=options.device, dtype=dtype)
        times = interleaved({"cublas": lambda: torch.matmul(left, right, out=out)}, Clock(options.device), options.samples, end)
        true = left[:16].double() @ right.double()
        error = float((out[:16].double() - true).norm() / true.norm())
        found = {"cublas": {**times["cublas"], "errors": {"product": error}}}
        records.append({"kind": "product", "name": name, "shape": list(shape), "mode": mode, "errors_at": [16, cols, depth],
                        "flops": 2.0 * rows * cols * depth, "found": found, "wrong": False})
        del left, right, out, true
    return records


# The run


def work_of(options: argparse.Namespace) -> list[tuple[Shape, str, str]]:
    """Shape, mode and kind of everything, in order."""
    listed = WORK
    if options.shapes:
        listed = [(shape, options.modes or "f32 bf16", "step lse products") for shape in options.shapes.split()]
    found = []
    for text, modes, kinds in listed:
        shape = Shape(*map(int, text.split(",")))
        for mode in modes.split():
            found += [(shape, mode, kind) for kind in kinds.split() if not options.modes or mode in options.modes.split()]
    return found


def write(path: Path | None, value: Any) -> None:
    """All of it, or what was there before."""
    if path:
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(value, indent=1, ensure_ascii=False))
        partial.replace(path)


def progress(record: dict[str, Any]) -> str:
    n, d, h = record["shape"]
    verdict = " WRONG OR MISSING" if record["wrong"] else ""
    lines = [f"\n{record['kind']} {record.get('name', '')} {n}×{d}×{h} {record['mode']}{verdict}"]
    for key, found in record["found"].items():
        if "warm" not in found:
            lines.append(f"  {NAMES[key]:34} {found.get('note', '–')}")
            continue
        error = max(found.get("errors", {"": math.nan}).values())
        cold, warm = found["cold"]["median"], found["warm"]["median"]
        rate = record["flops"] / warm / 1e12
        lines.append(f"  {NAMES[key]:34} cold {1e3 * cold:.4g} ms, warm {1e3 * warm:.4g} ms, {rate:.3g} TFLOP/s, error {error:.0e}")
    return "\n".join(lines)


def peers(options: argparse.Namespace) -> int:
    start = time.monotonic()
    if version_of("torch") is None:
        write(options.out, {"facts": facts(), "records": [], "left_out": [], "note": "no PyTorch"})
        print("skipped: no PyTorch in this Python; PYTHON=... ./run.sh peers names another")
        return 0
    import torch

    torch.manual_seed(0)
    try:
        ours: Any = Ours(options.lib, options.device)
    except (OSError, AttributeError, RuntimeError) as error:
        print(f"ours is missing: {error}", file=sys.stderr, flush=True)
        ours = Missing(error)
    run: dict[str, Any] = {"facts": facts(), "device": options.device, "library": ours.version(), "records": [], "left_out": []}
    work = work_of(options)
    kinds = {"step": compare_steps, "lse": compare_lse, "product": compare_products, "products": compare_products}
    crashed = False
    for at, (shape, mode, kind) in enumerate(work):
        used = time.monotonic() - start
        name = f"{kind} {shape} {mode}"
        if used > options.seconds - 15:
            run["left_out"].append(f"{name}: no time left")
            continue
        # No part may take more than a third of what is left.
        end = time.monotonic() + max(5.0, (options.seconds - used) / 3)
        try:
            records = kinds[kind](shape, mode, options, ours, end)
            for record in records if isinstance(records, list) else [records]:
                run["records"].append(record)
                print(progress(record), flush=True)
        except Exception as error:  # the next shape may do better
            memory = "out of memory" in str(error).lower()
            crashed = crashed or not memory
            run["left_out"].append(f"{name}: {'does not fit' if memory else str(error)[:300]}")
            print(f"{name}: {error}", file=sys.stderr, flush=True)
        write(options.out, run)
        forget()
    write(options.out, run)
    print("\n".join(["", *run["left_out"], f"{time.monotonic() - start:.0f} s in all"]))
    bad = [record for record in run["records"] if record["wrong"]]
    for record in bad:
        where = f"{record['kind']} {Shape(*record['shape'])} {record['mode']}"
        print(f"wrong or missing results of ours: {where}: {record['found'].get(OURS)}")
    return 3 if bad else 1 if crashed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["ceilings", "peers"])
    parser.add_argument("--out", type=Path, help="file of JSON")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--lib", type=Path, default=Path(__file__).resolve().parents[2] / "target/release/libsae_kernels.so",
                        help="our C library (default: %(default)s)")
    parser.add_argument("--shapes", help="N,D,H of each, instead of those that have targets")
    parser.add_argument("--modes", help=f"of {', '.join(MODES)}; others are left out")
    parser.add_argument("--peers", default="eager,compile,manual", help="at a step (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=FEWEST, help="of each, cold and warm (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=440.0, help="in all; the rest is left out (default: %(default)s)")
    parser.add_argument("--perturb", type=float, default=0.0, metavar="E",
                        help="move one element of our dW by E times the largest")
    options = parser.parse_args()
    options.peers = [key for key in options.peers.split(",") if key in NAMES]
    return ceilings(options) if options.what == "ceilings" else peers(options)


if __name__ == "__main__":
    sys.exit(main())
