#!/usr/bin/env python3
"""One text of what the stages of `scripts/gpu-bundle` left in a folder: results.md, and roofline.png where matplotlib is there.

    python benches/peers/gpu_report.py FOLDER

Whatever is missing is named as missing. Needs nothing but Python. Every target is met, missed or not measured, and none is met by wrong results.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any, Iterable, NamedTuple

from gpu_names import NAMES, OURS

STAGES = ["device", "tests", "sanitizer", "conformance", "benches", "peers"]
# Samples fewer than this are marked.
FEWEST = 60
MET, MISSED, UNKNOWN = "met", "**missed**", "not measured"
# Milliseconds of a step in bf16 with dx, were every product at an H100's ceiling.
FLOORS = {(8192, 768, 6144): 1.47, (8192, 4096, 32768): 17.5, (16384, 2048, 16384): 20.8, (65536, 1024, 4096): 6.29,
          (4096, 4096, 131072): 26.8}
Record = dict[str, Any]


# What the folder holds


class Bench(NamedTuple):
    """A benchmark: seconds a call, what a call does, and what the same GPU did at best just before."""

    group: str
    name: str
    shape: tuple[int, int, int]
    seconds: float
    low: float
    high: float
    samples: int
    work: float
    unit: str
    peak: float

    @property
    def rate(self) -> float:
        return self.work / self.seconds

    @property
    def share(self) -> float:
        return self.rate / self.peak


class Folder:
    """All that was measured."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stages = {name: read(path / f"{name}.json") for name in STAGES}
        self.ceilings = read(path / "ceilings.json") or {}
        self.peers = read(path / "peers-times.json") or {}
        # The ceilings are there twice; the longer run counts.
        both = [*benches(path / "ceilings"), *benches(path / "benches")]
        self.benches = list({(bench.group, bench.name, bench.shape): bench for bench in both}.values())

    def ceiling(self, what: str) -> tuple[float, str]:
        """The GPU's product or copy a second, and who measured it; NaN where nobody did."""
        if what in self.ceilings:
            found = self.ceilings[what]
            return found["work"] / found["median"], f"PyTorch, {found['what']}"
        unit, text = {"product": ("FLOP/s", "cuBLASLt's fastest product"), "copy": ("B/s", "copy of 256 MiB")}[what]
        return max((b.peak for b in self.benches if b.unit == unit), default=math.nan), f"our benchmark, {text}"

    def of(self, group: str, name: str) -> list[Bench]:
        return [bench for bench in self.benches if bench.group == f"cuda-{group}" and bench.name.startswith(name)]

    def records(self, kind: str) -> list[Record]:
        return [record for record in self.peers.get("records", []) if record["kind"] == kind]

    def on_gpu(self, kind: str) -> list[Record]:
        """The records, but those of a rehearsal: no target is met by a CPU."""
        return self.records(kind) if self.peers.get("device") == "cuda" else []


def read(path: Path) -> Any:
    """None if it is not there, or was cut off."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def benches(path: Path) -> list[Bench]:
    """Criterion's samples, joined with the peaks."""
    try:
        lines = [json.loads(line) for line in (path / "peaks.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return []
    peaks = {(line["group"], line["name"], line["shape"]): line for line in lines}
    found = []
    for file in sorted(path.glob("criterion/**/new/benchmark.json")):
        benchmark, sample = read(file), read(file.parent / "sample.json")
        if not benchmark or not sample:
            continue
        line = peaks.get((benchmark["group_id"], benchmark["function_id"], benchmark["value_str"]))
        if line is None:
            continue
        seconds = [time / calls / 1e9 for time, calls in zip(sample["times"], sample["iters"])]
        low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
        shape = tuple(map(int, line["shape"].split("x")))
        work = (line["work"], line["unit"], line["peak"])
        found.append(Bench(line["group"], line["name"], shape, middle, low, high, len(seconds), *work))
    return sorted(found, key=lambda bench: (bench.group, bench.name, bench.work))


# Targets


class Verdict(NamedTuple):
    """A target at a place."""

    target: str
    where: str
    measured: str
    verdict: str


def verdict(target: str, where: str, measured: str, met: bool, wrong: bool = False) -> Verdict:
    return Verdict(target, where, measured, f"{MISSED} (wrong results)" if wrong else MET if met else MISSED)


def tests_passed(folder: Folder) -> bool:
    """Whether the tests saw no error on the GPU: the benchmarks' results are theirs."""
    return (folder.stages["tests"] or {}).get("status") == "ok"


def encode_alone(target: str, folder: Folder) -> Iterable[Verdict]:
    for bench in folder.of("encode", "encode, row loss only bf16"):
        if bench.shape == (4096, 4096, 131072):
            yield verdict(target, "enqueued", f"{bench.rate / 1e12:.0f} TFLOP/s", bench.rate >= 730e12)
    for record in folder.on_gpu("lse"):
        if record["shape"] == [4096, 4096, 131072] and record["mode"] == "bf16" and (seconds := median(record, OURS)):
            rate = record["flops"] / seconds
            yield verdict(target, "through the C function", f"{rate / 1e12:.0f} TFLOP/s", rate >= 730e12, record["wrong"])


def encode_statistics(target: str, folder: Folder) -> Iterable[Verdict]:
    ceiling, _ = folder.ceiling("product")
    for bench in folder.of("encode", "encode with a and statistics bf16"):
        if 768 <= bench.shape[1] <= 1024:
            share = bench.rate / ceiling
            yield verdict(target, times(bench.shape), percent(share), share >= 0.85)


def primal(target: str, folder: Folder) -> Iterable[Verdict]:
    for bench in folder.of("statistics", "finish_statistics from a bf16"):
        n, _, h = bench.shape
        if h >= 6144:
            factor = 2.0 * n * h * h / bench.peak / bench.seconds
            where = f"{times(bench.shape)}, {bench.name.rsplit(' ', 1)[-1]}"
            yield verdict(target, where, f"{factor:.2f} ×", factor >= 1.85)


def backward(target: str, folder: Folder) -> Iterable[Verdict]:
    for bench in folder.of("backward", "backward_dz, primal bf16"):
        if bench.shape[2] >= 4096:
            where = f"{times(bench.shape)}, {bench.name.rsplit(' ', 1)[-1]}"
            yield verdict(target, where, percent(bench.share), bench.share >= 0.9)


def pointwise(target: str, folder: Folder) -> Iterable[Verdict]:
    ceiling, _ = folder.ceiling("copy")
    for bench in folder.of("optimizer", "adam"):
        # Less stays in the cache.
        if bench.work >= 256e6:
            share = bench.rate / ceiling
            measured = f"{bench.rate / 1e12:.2f} TB/s, {percent(share)}"
            yield verdict(target, f"{times(bench.shape)}, {bench.name}", measured, share >= 0.9)


def tiny(target: str, folder: Folder) -> Iterable[Verdict]:
    shape = (128, 784, 64)
    for bench in folder.of("step", "decoder-free"):
        if bench.shape == shape:
            where = f"enqueued, {bench.name.removeprefix('decoder-free ')}"
            yield verdict(target, where, f"{1e6 * bench.seconds:.1f} µs", bench.seconds <= 30e-6)
    for record in folder.on_gpu("step"):
        seconds = median(record, OURS)
        if tuple(record["shape"]) == shape and record["mode"] != "tf32" and seconds:
            where = f"through the C function with dx, {record['mode']}"
            yield verdict(target, where, f"{1e6 * seconds:.1f} µs", seconds <= 30e-6, record["wrong"])


def whole(_: str, folder: Folder) -> Iterable[Verdict]:
    for record in folder.on_gpu("step"):
        n, _, h = record["shape"]
        dual = n < h
        target = f"full step: ≥ {4 if dual else 2} × torch.compile" + (" (dual regime)" if dual else "")
        where = f"{times(record['shape'])}, {record['mode']}"
        ours, theirs = median(record, OURS), median(record, "compile")
        if not ours or not theirs:
            missing = record["found"].get("compile" if ours else OURS, {}).get("note", "–")
            yield Verdict(target, where, f"torch.compile: {missing}" if ours else f"ours: {missing}", UNKNOWN)
            continue
        yield verdict(target, where, f"{theirs / ours:.2f} ×", theirs / ours >= (4 if dual else 2), record["wrong"])


# Each target's text, and what finds the places where it was measured.
TARGETS = {
    "encode, row loss only, 4096×4096×131072 bf16: ≥ 730 TFLOP/s": encode_alone,
    "encode with a and statistics, D = 768..1024 bf16: ≥ 85 % of the ceiling": encode_statistics,
    "finish_statistics (primal), H ≥ 6144 bf16: ≥ 1.85 × a full cuBLAS product": primal,
    "backward_dz bf16: ≥ 90 % of plain cuBLAS": backward,
    "pointwise (Adam): ≥ 90 % of the copy (2.7 of 3.0 TB/s)": pointwise,
    "step of 128×784×64: ≤ 30 µs": tiny,
    "full step: ≥ 2 × torch.compile, ≥ 4 × in the dual regime": whole,
}


def verdicts(folder: Folder) -> list[Verdict]:
    """At least one of each target."""
    judged = {text: list(judge(text, folder)) for text, judge in TARGETS.items()}
    return [found for text, some in judged.items() for found in some or [Verdict(text, "–", "–", UNKNOWN)]]


# Text


def median(record: Record, key: str, cache: str = "warm") -> float | None:
    return record["found"].get(key, {}).get(cache, {}).get("median")


def times(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape))


def percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.0f} %"


def duration(found: dict[str, Any]) -> str:
    few = "" if found["samples"] >= FEWEST else f", only {found['samples']} samples"
    return f"{1e3 * found['median']:.4g} ({1e3 * found['low']:.4g}–{1e3 * found['high']:.4g}{few})"


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


def device_text(folder: Folder) -> str:
    found = folder.ceilings
    if not found.get("gpu"):
        text = "No GPU was seen."
    else:
        gpu, versions = found["gpu"], found["versions"]
        modules = ", ".join(f"{name} {version}" if version else f"no {name}" for name, version in versions.items())
        text = (f"{found['date']}, {gpu['name']} ({gpu['memory.total']}, limit {gpu['power.limit']}, clocks to {gpu['clocks.max.sm']} and "
                f"{gpu['clocks.max.mem']}), driver {gpu['driver_version']}, CUDA {found['cuda of the driver']}; Python {found['python']}, {modules}.")
        if found.get("under load"):
            text += " Right after the product: " + ", ".join(f"{name} {value}" for name, value in found["under load"].items()) + "."
    rows = []
    for what, unit in (("product", "FLOP/s"), ("copy", "B/s")):
        value, source = folder.ceiling(what)
        rows.append([what, UNKNOWN if math.isnan(value) else f"{value / 1e12:.2f} T{unit}", source])
    return f"{text}\n\n{table(['ceiling', 'measured', 'by'], rows)}"


def stages_text(folder: Folder) -> str:
    rows = []
    for name, stage in folder.stages.items():
        if stage is None:
            rows.append([name, "not run", ""])
            continue
        status = {"failed": "**failed**", "emulated": "skipped", "skipped": "skipped"}.get(stage["status"], stage["status"])
        notes = [stage["why"]] if "why" in stage else []
        notes += ["passed on the emulated GPU, at small sizes"] if stage["status"] == "emulated" else []
        for step in stage["steps"]:
            counts = f"{step['passed']} passed, {step['failed']} failed, {step['ignored']} ignored" if "passed" in step else ""
            end = "" if step["ok"] else " out of time" if step["timed_out"] else f" exit status {step['exit']}"
            notes += [f"`{step['command']}`: {counts}{end}".rstrip(": ")] if counts or end else []
        rows.append([name, status, "; ".join(notes)])
    return table(["stage", "", ""], rows)


def benches_text(folder: Folder) -> str:
    if not folder.benches:
        return "Not measured."
    accuracy = "within the tests' bounds" if tests_passed(folder) else "not shown: the tests did not pass on this GPU"
    product, _ = folder.ceiling("product")
    copy, _ = folder.ceiling("copy")
    rows = []
    for bench in folder.benches:
        seconds = {"median": bench.seconds, "low": bench.low, "high": bench.high, "samples": bench.samples}
        ceiling = product if bench.unit == "FLOP/s" else copy
        rows.append([bench.group.removeprefix("cuda-"), bench.name, times(bench.shape), duration(seconds),
                     f"{bench.rate / 1e12:.3g} T{bench.unit}", percent(bench.share), percent(bench.rate / ceiling), accuracy])
    header = ["group", "operation", "N×D×H", "ms", "a second", "of cuBLASLt or the copy", "of the ceiling", "errors"]
    return ("Calls that are only enqueued, many of them between two CUDA events; the caches are as the call before left them. Median (quartiles) of "
            "samples that are means over many calls. Beside it the share of what cuBLASLt's product of the same extents in bf16, or a copy, did in the "
            f"same run; f32 and `full` multiply several times.\n\n{table(header, rows)}")


def errors_cell(record: Record, found: dict[str, Any]) -> str:
    if "errors" not in found:
        return "not compared"
    cell = " / ".join(f"{name} {value:.0e}" for name, value in found["errors"].items())
    elsewhere = record["kind"] == "step" and record["errors_at"] != record["shape"]
    return cell + (f" at {times(record['errors_at'])}" if elsewhere else "")


def record_rows(record: Record) -> Iterable[list[str]]:
    base = median(record, OURS)
    for key, found in record["found"].items():
        where = [times(record["shape"]), record["mode"], *([record["name"]] if "name" in record else []), NAMES[key]]
        if "warm" not in found:
            yield [*where, found.get("note", "–"), "", "", "", errors_cell(record, found)]
            continue
        bad = "**wrong or missing** " if key == OURS and record["wrong"] else ""
        relative = f"{found['warm']['median'] / base:.2f} ×" if base else "–"
        rate = f"{record['flops'] / found['warm']['median'] / 1e12:.3g}"
        yield [*where, duration(found["cold"]), duration(found["warm"]), rate, relative, bad + errors_cell(record, found)]


HEADER = ["", "ms, L2 cold", "ms, L2 warm", "TFLOP/s", "of our time", "errors against float64"]


def peers_text(folder: Folder) -> str:
    records = folder.peers.get("records", [])
    if not records:
        return f"Not measured{': ' + folder.peers['note'] if 'note' in folder.peers else ''}."
    parts = []
    titles = {"step": "### A step with dx", "lse": "### −log Σ exp(−a) of every row, without a", "product": "### Plain products"}
    for kind, title in titles.items():
        named = ["product"] if kind == "product" else []
        rows = [row for record in folder.records(kind) for row in record_rows(record)]
        if rows:
            parts.append(f"{title}\n\n{table(['N×D×H', 'mode', *named, *HEADER], rows)}")
    floors = [[times(record["shape"]), f"{floor:.4g}", f"{1e3 * seconds:.4g}", percent(floor / 1e3 / seconds)]
              for record in folder.on_gpu("step") if record["mode"] == "bf16" and (floor := FLOORS.get(tuple(record["shape"]))) and (seconds := median(record, OURS))]
    if floors:
        header = ["N×D×H", "ms at an H100's ceiling", "ours", "of the floor"]
        parts.append(f"### Steps beside their floor, bf16\n\n{table(header, floors)}")
    if folder.peers.get("left_out"):
        parts.append("Left out: " + "; ".join(folder.peers["left_out"]) + ".")
    where = "" if folder.peers.get("device") == "cuda" else "**A rehearsal on a CPU: times mean nothing.** "
    text = (f"{where}`benches/peers/gpu.py`: one process, the same tensors and stream, in turns. Median (quartiles) from an idle GPU on, so that gaps "
            "between launches count, and the copy of our losses to the host. Cold: after memory larger than the L2 cache was overwritten; warm: the same "
            "call right after. Modes: f32 is PyTorch's default, tf32 lets it multiply in TF32 (ours is f32), bf16 is autocast. The errors of loss / dW / "
            "db / dx are the larger of those in the Euclidean and in the maximum norm.")
    return "\n\n".join([text, *parts])


def text_of(folder: Folder, picture: str | None) -> str:
    targets = table(["target", "where", "measured", ""], [list(found) for found in verdicts(folder)])
    roofline = f"![Operations below the roofline]({picture})" if picture else "No picture: nothing was measured, or matplotlib is missing."
    return f"""# GPU results

{device_text(folder)}

## Targets

{targets}

## Stages

{stages_text(folder)}

## Steps, log-sum-exp and products beside peers

{peers_text(folder)}

## Operations

{benches_text(folder)}

{roofline}
"""


# The picture


def draw(folder: Folder, path: Path) -> bool:
    """The operations in bf16 below the lines of the copy and the product; whether there is anything to draw."""
    try:
        import roofline
        from problem import Shape
    except ImportError as error:
        print(f"no picture: {error}")
        return False
    compute, copy = folder.ceiling("product")[0], folder.ceiling("copy")[0]
    found = []
    for bench in folder.benches:
        name = bench.name.replace(" bf16", " f32").removesuffix(" storage").removesuffix(", own")
        operation = roofline.OPERATIONS.get(f"{bench.group.removeprefix('cuda-')}/{name}")
        if operation is None or " bf16" not in bench.name:
            continue
        shape = Shape(*bench.shape)
        flops = float(operation.flops(*shape))
        # All in bf16, though some results are f32; of what is bound by memory the benchmark knows the bytes.
        moved = bench.work if bench.unit == "B/s" else 2.0 * operation.floats(*shape)
        found.append(roofline.Point(operation, shape, flops / moved, flops / bench.seconds))
    if not found or math.isnan(compute) or math.isnan(copy):
        print("no picture: no benchmarks in bf16, or no ceilings")
        return False
    title = folder.ceilings.get("gpu", {}).get("name", "GPU")
    roofline.draw({title: (found, roofline.Lines(compute, copy, "cuBLAS, bf16"))}, path)
    return True


def main() -> int:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        print(__doc__)
        return 2
    path = Path(sys.argv[1])
    folder = Folder(path)
    drawn = draw(folder, path / "roofline.png")
    (path / "results.md").write_text(text_of(folder, "roofline.png" if drawn else None))
    for found in verdicts(folder):
        print(f"{found.verdict.replace('*', ''):14} {found.target}: {found.where}: {found.measured}")
    print(path / "results.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
