#!/usr/bin/env python3
"""Tests and measures the CUDA backend on this machine's GPU, in stages. Each leaves a log and JSON in the output folder.

    device       the GPU, its driver and clocks, and its ceilings: a copy, and cuBLAS's product of 8192³ in bf16
    tests        every operation against the reference, on the GPU; without a driver a few on the emulated GPU
    sanitizer    the smallest steps under compute-sanitizer, where that is installed
    conformance  what each PTX instruction gives on this chip, beside the emulator's answer
    benches      every operation beside the ceilings
    peers        a step, the log-sum-exp and plain products beside PyTorch, all against float64
    report       results.md and roofline.png of what the folder holds

Needs an NVIDIA driver and Python; PyTorch for peers, matplotlib for the picture. Without a driver, stages say that they were skipped.
A stage that crashes or runs out of time costs no other. The exit status is 1 if a stage failed.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

HERE = Path(__file__).resolve().parent
PROGRAMS = HERE / "bin"
# Programs with tests of one operation on every backend; those on the GPU have `cuda_` in their names.
TESTS = ["integers", "differential", "optimizers", "edge_cases", "promises", "golden"]
# Tests that the emulated GPU runs in seconds.
EMULATED = [("integers", "cuda_bf16"), ("golden", "cuda_f32"), ("promises", "cuda_bf16::same_call_same_bits")]
TOOLS = ["memcheck", "racecheck", "synccheck", "initcheck"]
NO_DRIVER = "no NVIDIA driver"


class Step(NamedTuple):
    """A command of a stage."""

    command: list[str]
    environment: dict[str, str] = {}


class Stage(NamedTuple):
    """Seconds that it may take, and what it runs: steps, or the reason why there are none."""

    seconds: int
    steps: Callable[[Path], list[Step] | str]


# What this machine has


def driver() -> bool:
    """Whether there is a driver that finds a GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def libraries() -> list[str]:
    """Folders of the libraries that pip installed for CUDA, cuBLASLt's among them."""
    found = importlib.util.find_spec("nvidia")
    places = list(found.submodule_search_locations or []) if found else []
    return [str(folder) for place in places for folder in sorted(Path(place).glob("*/lib"))]


def environment() -> dict[str, str]:
    """Programs find cuBLASLt, and the golden vectors and the PTX that lie beside them."""
    paths = [*filter(None, [os.environ.get("LD_LIBRARY_PATH")]), *libraries()]
    beside = {"CARGO_MANIFEST_DIR": str(HERE), "SAE_KERNELS_PTX_DIR": str(HERE / "ptx")}
    return os.environ | beside | {"LD_LIBRARY_PATH": ":".join(paths)}


def unpack() -> None:
    """Unpacks the programs and what they read, once; one that is interrupted is begun again."""
    if PROGRAMS.exists():
        return
    place = HERE / "unpacking"
    shutil.rmtree(place, ignore_errors=True)
    shutil.unpack_archive(HERE / "programs.tar.xz", place)
    for name in ["lib", "ptx", "tests", PROGRAMS.name]:
        (place / name).replace(HERE / name)
    place.rmdir()


# The stages


def on_gpu(steps: Callable[[Path], list[Step] | str]) -> Callable[[Path], list[Step] | str]:
    return lambda out: steps(out) if driver() else NO_DRIVER


def python(script: str, *arguments: str) -> list[str]:
    return [sys.executable, str(HERE / script), *arguments]


def device(out: Path) -> list[Step]:
    smi = [Step(["nvidia-smi", "-q", "-d", "CLOCK,POWER,PERFORMANCE,MEMORY"])] if shutil.which("nvidia-smi") else []
    # Once by PyTorch, where it is there, and once by our benchmark.
    by_torch = Step(python("peers/gpu.py", "ceilings", "--out", str(out / "ceilings.json")))
    return [*smi, by_torch, benchmark(out / "ceilings", "cuda-ceiling")]


def tests(out: Path) -> list[Step]:
    if not driver():
        return [Step([str(PROGRAMS / name), what]) for name, what in EMULATED]
    required = {"SAE_KERNELS_REQUIRE_GPU": "1"}
    programs = [Step([str(PROGRAMS / name), "cuda_"], required) for name in TESTS]
    return [Step([str(PROGRAMS / "cuda_hardware")], required), *programs]


def sanitizer(out: Path) -> list[Step] | str:
    if not shutil.which("compute-sanitizer"):
        return "no compute-sanitizer on PATH"
    program = [str(PROGRAMS / "cuda_hardware"), "smallest_step"]
    required = {"SAE_KERNELS_REQUIRE_GPU": "1"}
    return [Step(["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *program], required) for tool in TOOLS]


def conformance(out: Path) -> list[Step]:
    folder = out / "conformance"
    folder.mkdir(exist_ok=True)
    variables = {"SAE_KERNELS_REQUIRE_GPU": "1", "SAE_KERNELS_RECORD": str(folder)}
    return [Step([str(PROGRAMS / "cuda_hardware"), "--exact", "conformance"], variables)]


def benchmark(folder: Path, what: str) -> Step:
    """Benchmarks with such names, whose samples and peaks the folder then has."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    variables = {"SAE_KERNELS_REQUIRE_GPU": "1", "CRITERION_HOME": str(folder / "criterion"),
                 "SAE_KERNELS_PEAKS": str(folder / "peaks.jsonl")}
    # A sample is a mean over many calls.
    options = ["--sample-size", "60", "--measurement-time", "1", "--nresamples", "2000"]
    return Step([str(PROGRAMS / "kernels"), "--bench", *options, what], variables)


def benches(out: Path) -> list[Step]:
    return [benchmark(out / "benches", "cuda-")]


def peers(out: Path) -> list[Step]:
    files = ["--lib", str(HERE / "lib/libsae_kernels.so"), "--out", str(out / "peers-times.json")]
    return [Step(python("peers/gpu.py", "peers", *files, "--seconds", "440"))]


def report(out: Path) -> list[Step]:
    return [Step(python("peers/gpu_report.py", str(out)))]


# In this order; a whole run fits into half an hour where nothing hangs.
STAGES = {
    "device": Stage(120, on_gpu(device)),
    "tests": Stage(470, tests),
    "sanitizer": Stage(300, on_gpu(sanitizer)),
    "conformance": Stage(60, on_gpu(conformance)),
    "benches": Stage(470, on_gpu(benches)),
    "peers": Stage(470, on_gpu(peers)),
    "report": Stage(60, report),
}


# Running them


def shown(command: list[str]) -> str:
    return " ".join(part.replace(f"{HERE}/", "") for part in command)


def run_step(step: Step, limit: float, log: Path) -> dict[str, object]:
    """Runs a command whose output goes to the terminal and to the log; at the limit it and its children are killed."""
    start = time.monotonic()
    print(f"\n== {shown(step.command)}", flush=True)
    with log.open("a") as file:
        file.write(f"\n== {shown(step.command)}\n")
    text: list[str] = []
    child = subprocess.Popen(["timeout", "--kill-after=5", f"{limit:.0f}", *step.command], env=environment() | step.environment,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    try:
        with log.open("a") as file:
            for line in child.stdout:
                text.append(line)
                file.write(line)
                file.flush()
                print(line, end="", flush=True)
        code = child.wait()
    except KeyboardInterrupt:
        child.send_signal(signal.SIGTERM)
        child.wait()
        raise
    finally:
        child.stdout.close()
    # What cargo's test programs and libtest-mimic print at the end.
    counts = re.findall(r"test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored", "".join(text))
    seconds = time.monotonic() - start
    # 137: it did not end when it was asked to.
    late = code in (124, 137) and seconds > limit - 1
    found = {"command": shown(step.command), "seconds": round(seconds, 1), "exit": code, "timed_out": late}
    if counts:
        found |= dict(zip(("passed", "failed", "ignored"), (sum(map(int, column)) for column in zip(*counts))))
    # A filter that no test's name has would pass.
    found["ok"] = code == 0 and not ("passed" in found and found["passed"] == 0)
    if not found["ok"]:
        print(f"== failed: {shown(step.command)}: {'out of time' if late else f'exit status {code}'}", flush=True)
    return found


def run_stage(name: str, out: Path, limit: float | None) -> str:
    """Runs a stage, and keeps what came of it in NAME.json: ok, failed or skipped."""
    log = out / f"{name}.log"
    log.write_text(f"{datetime.datetime.now(datetime.timezone.utc):%F %T} UTC: {name}\n")
    stage = STAGES[name]
    end = time.monotonic() + (limit or stage.seconds)
    record: dict[str, object] = {"stage": name, "date": f"{datetime.date.today()}", "steps": []}
    steps = stage.steps(out)
    emulated = name == "tests" and not driver()
    if isinstance(steps, str):
        record |= {"status": "skipped", "why": steps}
        print(f"\n{name}: skipped: {steps}", flush=True)
        with log.open("a") as file:
            file.write(f"skipped: {steps}\n")
    else:
        if emulated:
            record["why"] = NO_DRIVER
            print(f"\n{name}: skipped: {NO_DRIVER}; on the emulated GPU instead, at small sizes:", flush=True)
        for at, step in enumerate(steps):
            left = end - time.monotonic()
            if left < 1:
                record["steps"].append({"command": shown(step.command), "ok": False, "timed_out": True, "seconds": 0.0})
                print(f"== failed: {shown(step.command)}: no time left", flush=True)
                continue
            # Nearly twice its share of what is left, and the last all of it: one that hangs leaves time for the others.
            record["steps"].append(run_step(step, 2 * left / (len(steps) - at + 1), log))
        passed = all(step["ok"] for step in record["steps"])
        record["status"] = ("emulated" if emulated else "ok") if passed else "failed"
    (out / f"{name}.json").write_text(json.dumps(record, indent=1))
    return record["status"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="./run.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"), help="output folder (default: %(default)s); what it has is kept")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="of each stage, instead of its own (at most 470)")
    parser.add_argument("stages", nargs="*", metavar="stage", help="of those above, or all (the default)")
    options = parser.parse_args()
    unknown = [name for name in options.stages if name not in (*STAGES, "all")]
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}: {', '.join(STAGES)}, or all")
    names = list(STAGES) if not options.stages or "all" in options.stages else options.stages
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    unpack()
    found = {name: run_stage(name, out, options.limit) for name in names}
    print("\n" + "\n".join(f"{name:12} {status}" for name, status in found.items()) + f"\n{out}")
    return 1 if "failed" in found.values() else 0


if __name__ == "__main__":
    sys.exit(main())
