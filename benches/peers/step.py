#!/usr/bin/env python3
"""One training step (losses, dW, db) of the decoder-free autoencoder on the CPU, ours beside its peers.

    cargo rustc --release --lib --crate-type cdylib --features capi
    pip install -r benches/peers/requirements.txt
    python benches/peers/step.py                # a grid of shapes, into benches/results/cpu.md and docs/peers.png
    python benches/peers/step.py --sweep        # is any peer faster anywhere? into benches/results/sweep.md
    python benches/peers/step.py --quick        # tiny shapes: checks errors, times mean nothing

All competitors of a number of threads run in one process, pinned to as many cores, on the same arrays, in turns: a
round is a block of calls of each, and the order moves on from round to round. Before a block there is a pause, so that
threads that still spin after the last block end, and a call that is not timed. Compilation is not timed either. Times
are medians over rounds, with their quartiles. The peak (fused multiply-adds in registers) is measured in every round; the
median counts.

Every competitor's loss, dW and db are compared with float64: autograd's where PyTorch is installed, else those of the
gradient derived by hand. The exit status is 3 if ours are wrong.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterable

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "target" / "peers"
SHAPES = "128,784,64 1024,784,64 4096,784,256 1024,768,4096 4096,768,1024"
LARGE_SHAPE = "4096,768,6144"
# With both forms of the correlation term, odd extents, one column, and the log-sum-exp alone (one row).
QUICK_SHAPES = "32,20,8 16,12,40 65,33,17 8,1,3 7,5,1 1,10,6"
EXTENTS = [1, 8, 64, 512, 4096]
LARGE_EXTENT = 8192
# A block of calls takes at least this long, so that the clock does not matter.
BLOCK_SECONDS = 0.01
PAUSE_SECONDS = 0.003


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lib", type=Path, default=ROOT / "target/release/libsae_kernels.so", help="our C library")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="tiny shapes, few rounds, results in target/peers only")
    mode.add_argument("--sweep", action="store_true", help="all combinations of extents, and the worst ratio to a peer")
    parser.add_argument("--peers", help="of eager, compile, manual, jax, autocast; none: ours alone (default: all; "
                        "with --quick and --sweep: eager,jax)")
    parser.add_argument("--threads", default="1,2", help="numbers of threads (default: %(default)s)")
    parser.add_argument("--shapes", help=f'N,D,H of each (default: "{SHAPES}"); results go to target/peers')
    parser.add_argument("--large", action="store_true", help=f"also {LARGE_SHAPE}; with --sweep also {LARGE_EXTENT}")
    parser.add_argument("--seconds", type=float, help="of rounds for each shape (default: 15; sweep: 0.5; quick: 0.1)")
    parser.add_argument("--max-gflop", type=float, default=100.0,
                        help="of a peer's step; larger shapes are left out of the sweep (default: %(default)s)")
    parser.add_argument("--reference-gflop", type=float, default=1500.0,
                        help="of a step; nothing is compared with float64 beyond (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, help="of our relative errors (default: 1e-4; quick: 1e-5)")
    parser.add_argument("--out", type=Path, help="folder for tables and pictures, instead of benches/results and docs")
    parser.add_argument("--redraw", action="store_true", help="tables and pictures of the last run, without a new one")
    parser.add_argument("--perturb", type=float, default=0.0, metavar="E",
                        help="move one element of our dW by E times the largest: it must be noticed")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.mode = "quick" if options.quick else "sweep" if options.sweep else "grid"
    if options.peers is None:
        options.peers = "eager,compile,manual,jax,autocast" if options.mode == "grid" else "eager,jax"
    options.peers = [] if options.peers == "none" else options.peers.split(",")
    options.threads = [int(threads) for threads in options.threads.split(",")]
    if options.seconds is None:
        options.seconds = {"grid": 15.0, "sweep": 0.5, "quick": 0.1}[options.mode]
    if options.tolerance is None:
        options.tolerance = 1e-5 if options.quick else 1e-4
    if not options.redraw and not options.lib.exists():
        parser.error(f"{options.lib} is not there: cargo rustc --release --lib --crate-type cdylib --features capi")
    return options


def cores() -> list[int]:
    """The cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return sorted(affinity(0)) if affinity else list(range(os.cpu_count() or 1))


def waited() -> float:
    """Seconds for which the main thread has waited for a core that others used; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


# What one process per number of threads does


def shapes(options: argparse.Namespace) -> Iterable[Any]:
    """The shapes to time; those of the sweep grow, so that a run that is cut off has seen the small ones."""
    from problem import Shape

    if options.shapes or options.mode != "sweep":
        text = options.shapes or (QUICK_SHAPES if options.quick else SHAPES)
        chosen = [Shape(*map(int, shape.split(","))) for shape in text.split()]
        large = [Shape(*map(int, LARGE_SHAPE.split(",")))] if options.large and options.mode == "grid" else []
        return chosen + large
    extents = EXTENTS + ([LARGE_EXTENT] if options.large else [])
    everything = sorted((Shape(*extent) for extent in itertools.product(extents, repeat=3)), key=lambda s: s.flops)
    return [shape for shape in everything if shape.flops_of_autograd <= 1e9 * options.max_gflop]


def block(step: Any, calls: int, warm: bool) -> tuple[float, Any]:
    """Seconds a call, and the last call's results."""
    time.sleep(PAUSE_SECONDS)
    results = step() if warm else None
    start = time.perf_counter()
    for _ in range(calls):
        results = step()
    return (time.perf_counter() - start) / calls, results


def rounds(steps: dict[str, Any], seconds: float, threads: int, fewest: int, most: int) -> tuple[dict, list, dict]:
    """Times of every competitor and peaks, a number each round; and the last results."""
    import peak

    times: dict[str, list[float]] = {key: [] for key in steps}
    peaks, last = [], {}
    # What a call takes, roughly: some steps of a round's block are not timed, where that costs little.
    rough = {key: block(step, 1, False)[0] for key, step in steps.items()}
    end = time.perf_counter() + seconds
    for turn in range(most):
        if turn >= fewest and time.perf_counter() > end:
            break
        peaks.append(peak.flops(threads))
        order = list(steps)
        turned = turn % len(order)
        for key in order[turned:] + order[:turned]:
            calls = int(min(200, max(1, BLOCK_SECONDS / rough[key])))
            taken, last[key] = block(steps[key], calls, rough[key] < 0.1)
            times[key].append(taken)
            rough[key] = min(rough[key], taken)
    return times, peaks, last


def prepare(problem: Any, options: argparse.Namespace, library: Any, threads: int) -> tuple[dict, dict, dict]:
    """Steps that ran twice, their first results, and notes on the competitors that have none."""
    import numpy as np
    from competitors import COMPETITORS, OURS
    from problem import Results

    steps, results, notes = {}, {}, {}
    for key in [OURS, *options.peers]:
        competitor = COMPETITORS[key]
        if competitor.version() is None:
            notes[key] = "not installed"
            continue
        try:
            step = competitor.build(library, problem, threads) if key == OURS else competitor.build(problem, threads)
            step()
            results[key] = Results(*(np.array(np.asarray(value), dtype=np.float64) for value in step() if value is not None))
            steps[key] = step
        except Exception as error:  # a peer that fails is a remark in its column
            if key == OURS:
                raise
            notes[key] = "failed"
            print(f"{competitor.name} at {problem.shape}: {error}", file=sys.stderr)
    return steps, results, notes


def truth(problem: Any, options: argparse.Namespace) -> Any:
    """The float64 results, or None if they take too long."""
    from competitors import COMPETITORS, torch_float64
    from problem import errors, reference

    if problem.shape.flops_of_autograd > 1e9 * options.reference_gflop:
        return None
    if COMPETITORS["eager"].version() is None:
        return reference(problem)
    true = torch_float64(problem)
    if options.quick:
        found = errors(reference(problem), true)
        if not all(error < 1e-9 for error in found.values()):
            raise AssertionError(f"the references differ at {problem.shape}: {found}")
    return true


def perturbed(results: Any, by: float) -> Any:
    """The results with one element of dW wrong, where that is asked for."""
    import numpy as np

    if not by:
        return results
    dw = np.array(results.dw, dtype=np.float64)
    dw[-1, -1] += by * np.abs(dw).max()
    return results._replace(dw=dw)


def run_shape(shape: Any, threads: int, options: argparse.Namespace, library: Any) -> dict[str, Any]:
    """Everything that is found out about one shape."""
    import numpy as np
    from competitors import OURS, clear_compiled
    from problem import Problem, errors

    problem = Problem(shape)
    steps, results, notes = prepare(problem, options, library, threads)
    fewest, most = {"grid": (5, 60), "sweep": (5, 15), "quick": (2, 5)}[options.mode]
    waited_before, start = waited(), time.perf_counter()
    times, peaks, last = rounds(steps, options.seconds, threads, fewest, most)
    busy = (waited() - waited_before) / (time.perf_counter() - start)
    true = truth(problem, options)
    found: dict[str, Any] = {key: {"note": note} for key, note in notes.items()}
    for key in steps:
        low, middle, high = np.quantile(times[key], [0.25, 0.5, 0.75])
        found[key] = {"median": middle, "low": low, "high": high}
        if true is not None:
            change = options.perturb if key == OURS else 0.0
            both = [errors(perturbed(what[key], change), true) for what in (results, last)]
            # A NaN wins.
            found[key]["errors"] = {name: float(np.max([one[name] for one in both])) for name in both[0]}
    clear_compiled()
    return {"shape": list(shape), "threads": threads, "peak": float(np.median(peaks)), "rounds": len(peaks), "busy": busy,
            "mode": options.mode, "found": found}


def work(options: argparse.Namespace) -> None:
    """The process of one number of threads: a line of JSON for each shape."""
    from competitors import COMPETITORS, Library
    from report import progress

    (threads,) = options.threads
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(cores()[:threads]))
    if any(COMPETITORS[key].module == "torch" for key in options.peers) and COMPETITORS["eager"].version():
        import torch

        torch.set_num_threads(threads)
    library = Library(options.lib)
    with options.worker.open("w") as file:
        for shape in shapes(options):
            record = run_shape(shape, threads, options, library)
            print(json.dumps(record), file=file, flush=True)
            print(progress(record, options.tolerance), flush=True)


# The parent


def start_worker(threads: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs the process of a number of threads: libraries read theirs when they are loaded."""
    file = TARGET / f"{options.mode}-{threads}.jsonl"
    names = ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"]
    environment = os.environ | {name: str(threads) for name in names}
    # No idle processes that compile, no look at other devices.
    environment |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"PYTHONWARNINGS": "ignore::FutureWarning"}  # PyTorch's of its own functions
    command = [sys.executable, __file__, *sys.argv[1:], "--threads", str(threads), "--worker", str(file)]
    subprocess.run(command, check=True, env=environment)
    return [json.loads(line) for line in file.read_text().splitlines()]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs every number of threads for which there are cores, and keeps what they found in target/peers."""
    from report import machine

    TARGET.mkdir(parents=True, exist_ok=True)
    records = []
    for threads in options.threads:
        if threads > len(cores()):
            # The quick run is about errors.
            print(f"{threads} threads on {len(cores())} cores: " + ("times mean nothing" if options.quick else "left out"))
            if not options.quick:
                continue
        records += start_worker(threads, options)
    run = {"machine": machine(options), "mode": options.mode, "partial": bool(options.shapes),
           "peers": options.peers, "records": records}
    (TARGET / f"{options.mode}.json").write_text(json.dumps(run, indent=1))
    return run


def main() -> int:
    options = arguments()
    if options.worker:
        work(options)
        return 0
    import report

    start = time.perf_counter()
    kept = TARGET / f"{options.mode}.json"
    found = json.loads(kept.read_text()) if options.redraw else run(options)
    if not options.redraw:
        print(f"{time.perf_counter() - start:.0f} s in all")
    if not found["records"]:
        print("nothing ran", file=sys.stderr)
        return 1
    report.write(found, options)
    return report.verdict(found, options)


if __name__ == "__main__":
    sys.exit(main())
