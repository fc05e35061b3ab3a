"""Tables and verdicts of what `step.py` found out."""

from __future__ import annotations

import argparse
import datetime
import math
import platform
import subprocess
from pathlib import Path
from typing import Any

from competitors import COMPETITORS, OURS, Library
from problem import Shape

ROOT = Path(__file__).resolve().parents[2]
RED, PLAIN = "\033[31m", "\033[0m"
Record = dict[str, Any]


# What a record says


def shape_of(record: Record) -> Shape:
    return Shape(*record["shape"])


def share(record: Record, key: str) -> float:
    """Of the peak, by the FLOPs that the step needs. NaN if there is no peak."""
    return shape_of(record).flops / record["found"][key]["median"] / record["peak"]


def timed(record: Record, precision: str = "f32") -> dict[str, float]:
    """Medians of the peers of a precision that ran."""
    found = record["found"].items()
    return {k: v["median"] for k, v in found if k != OURS and "median" in v and COMPETITORS[k].precision == precision}


def ratio(record: Record) -> float:
    """The best f32 peer's time by ours: below 1 that peer is faster. NaN without peers."""
    return min(timed(record).values(), default=math.nan) / record["found"][OURS]["median"]


def largest_error(record: Record, key: str) -> float:
    """NaN if there is one, or if nothing was compared."""
    found = record["found"][key].get("errors")
    values = list(found.values()) if found else [math.nan]
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def excused(record: Record) -> bool:
    """Whether, in the sweep, f32 peers are about as far off: then the shape has no better answer in f32.

    A batch of 8 rows with one input has latents of nearly no variance, whose gradients have few digits in f32.
    """
    if record["mode"] != "sweep":
        return False
    peers = [largest_error(record, key) for key in timed(record)]
    return largest_error(record, OURS) <= 4.0 * max((error for error in peers if error < 0.5), default=0.0)


def wrong(record: Record, tolerance: float) -> bool:
    """Whether our results are beyond the tolerance; NaN is."""
    if "errors" not in record["found"][OURS]:
        return False
    return not largest_error(record, OURS) <= tolerance and not excused(record)


# Text


def duration(seconds: float, digits: int = 3) -> str:
    """Milliseconds with so many significant digits."""
    milliseconds = 1e3 * seconds
    decimals = max(0, digits - 1 - math.floor(math.log10(max(milliseconds, 1e-9))))
    return f"{milliseconds:.{decimals}f}"


def percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.0f} %"


def factor(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f} ×"


def busy(records: list[Record]) -> str:
    """A remark, if others used the cores: the peak is that of undisturbed moments, and the times are not."""
    share_ = max(record["busy"] for record in records)
    return f"; other work on the cores took up to {percent(share_)} of the time" if share_ > 0.03 else ""


def progress(record: Record, tolerance: float) -> str:
    """A shape's block of text for the terminal."""
    threads = record["threads"]
    lines = [f"\n{shape_of(record)}, {threads} thread{'s' * (threads > 1)}, {record['rounds']} rounds, "
             f"peak {record['peak'] / 1e9:.1f} GFLOP/s{busy([record])}"]
    for key, found in record["found"].items():
        name = f"  {COMPETITORS[key].name:34}"
        if "note" in found:
            lines.append(f"{name}{found['note']}")
            continue
        quartiles = f"({duration(found['low'])}–{duration(found['high'])})"
        relative = found["median"] / record["found"][OURS]["median"]
        errors = " ".join(f"{name} {value:.0e}" for name, value in found.get("errors", {}).items())
        bad = key == OURS and wrong(record, tolerance)
        errors = f"{RED}{errors} WRONG{PLAIN}" if bad else errors
        median = duration(found["median"])
        share_ = percent(share(record, key))
        lines.append(f"{name}{median:>9} ms {quartiles:20} {share_:>6} {relative:6.2f} × ours  {errors}")
    return "\n".join(lines)


def output_of(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return f"no {command[0]}"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    sets = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    widest = "AVX-512" if "avx512f" in sets else "AVX2" if "avx2" in sets else platform.machine()
    return f"{names[0] if names else platform.processor() or platform.machine()} ({len(names) or '?'} cores, {widest})"


def machine(options: argparse.Namespace) -> str:
    """Date, machine and versions in a line."""
    modules = sorted({COMPETITORS[key].module for key in options.peers})
    versions = []
    for module in ["numpy", *modules]:
        version = next((c.version() for c in COMPETITORS.values() if c.module == module), None)
        if module == "numpy":
            import numpy

            version = numpy.__version__
        versions.append(f"{module} {version}" if version else f"no {module}")
    rust = " ".join(output_of(["rustc", "--version"]).split()[:2])
    ours = f"sae-kernels {Library(options.lib).version()}"
    python = f"Python {platform.python_version()}"
    return ", ".join([datetime.date.today().isoformat(), processor(), ours, rust, python, *versions])


# Tables


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def time_cell(record: Record, key: str) -> str:
    found = record["found"].get(key, {"note": "–"})
    if "note" in found:
        return found["note"]
    quartiles = f"({duration(found['low'])}–{duration(found['high'])})"
    return f"{duration(found['median'])} {quartiles}, {percent(share(record, key))}"


def error_cell(record: Record, key: str, tolerance: float) -> str:
    found = record["found"].get(key, {"note": "–"})
    if "errors" not in found:
        return found.get("note", "not compared")
    cell = " / ".join(f"{value:.0e}" for value in found["errors"].values())
    return f"**wrong: {cell}**" if key == OURS and wrong(record, tolerance) else cell


def columns(run: dict[str, Any]) -> list[str]:
    return [OURS, *run["peers"]]


def times_table(run: dict[str, Any], threads: int) -> str:
    records = [record for record in run["records"] if record["threads"] == threads]
    header = ["N×D×H", "at the peak", *(COMPETITORS[key].name for key in columns(run)), "best f32 peer / ours"]
    rows = []
    for record in records:
        least = duration(shape_of(record).flops / record["peak"]) if not math.isnan(record["peak"]) else "–"
        cells = [time_cell(record, key) for key in columns(run)]
        rows.append([str(shape_of(record)), least, *cells, factor(ratio(record))])
    peaks = [record["peak"] / 1e9 for record in records]
    plural = "s" if threads > 1 else ""
    return f"{threads} thread{plural}, peak {min(peaks):.0f}–{max(peaks):.0f} GFLOP/s{busy(records)}:\n\n{table(header, rows)}"


def errors_table(run: dict[str, Any], tolerance: float) -> str:
    header = ["N×D×H", "threads", *(COMPETITORS[key].name for key in columns(run))]
    rows = [
        [str(shape_of(record)), str(record["threads"]), *(error_cell(record, key, tolerance) for key in columns(run))]
        for record in run["records"]
    ]
    return table(header, rows)


def grid_text(run: dict[str, Any], tolerance: float) -> str:
    threads = sorted({record["threads"] for record in run["records"]})
    times = "\n\n".join(times_table(run, count) for count in threads)
    return f"""{run["machine"]}.

One step (losses, dW, db) of the paper's objective in f32, made by `benches/peers/step.py`: all in one process in turns, on the same arrays.
Median milliseconds (quartiles), and the share of the peak that the FLOPs a step needs, 4·N·D·H + 3·N·H·min(N, H), come to in that time.
The peak, fused multiply-adds in registers, is measured in the same rounds. A call's way from Python into each library is part of its time.

{times}

Relative errors of loss / dW / db against float64 (the larger of those in the Euclidean and in the maximum norm):

{errors_table(run, tolerance)}"""


def sweep_rows(records: list[Record]) -> list[list[str]]:
    rows = []
    for record in records:
        peers = timed(record)
        best = min(peers, key=peers.get) if peers else None
        rows.append([
            factor(ratio(record)), str(shape_of(record)), str(record["threads"]),
            duration(record["found"][OURS]["median"]), duration(peers[best]) if best else "–",
            COMPETITORS[best].name if best else "–", percent(share(record, OURS)),
            f"{largest_error(record, OURS):.0e}", f"{max([largest_error(record, k) for k in peers] or [math.nan]):.0e}",
        ])
    return rows


SWEEP_HEADER = ["best peer / ours", "N×D×H", "threads", "ours, ms", "best peer, ms", "which", "ours, of the peak",
                "our error", "peers' error"]


def sweep_summary(run: dict[str, Any]) -> str:
    """The worst ratio and where, and how many shapes a peer is faster at, for each number of threads."""
    lines = []
    for threads in sorted({record["threads"] for record in run["records"]}):
        records = [r for r in run["records"] if r["threads"] == threads and not math.isnan(ratio(r))]
        if not records:
            continue
        worst = min(records, key=ratio)
        faster = sum(ratio(record) < 1.0 for record in records)
        lines.append(f"* {threads} thread{'s' * (threads > 1)}: the worst ratio (best peer's time by ours) is "
                     f"{factor(ratio(worst))} at {shape_of(worst)}; a peer is faster at {faster} of {len(records)} shapes.")
    return "\n".join(lines) or "* No peers."


def sweep_text(run: dict[str, Any], most: int | None = None) -> str:
    """All rows, the worst first, or so many."""
    records = sorted(run["records"], key=ratio)
    names = ", ".join(COMPETITORS[key].name for key in run["peers"])
    rows = table(SWEEP_HEADER, sweep_rows(records[:most]))
    return f"""{run["machine"]}.

Every N, D, H of the list in `benches/peers/step.py --sweep` whose step in the H×H form is affordable, against {names or "nobody"}.
At N = 1 there is no variance, so there the objective is the log-sum-exp alone.

{sweep_summary(run)}

{rows}"""


def replace_block(path: Path, name: str, text: str) -> None:
    """Puts the text between this name's markers, at the end of the file if it has none yet."""
    begin, end = f"<!-- {name}: generated -->", f"<!-- {name}: end -->"
    block = f"{begin}\n{text}\n{end}"
    old = path.read_text() if path.exists() else ""
    if begin in old and end in old:
        head, rest = old.split(begin, 1)
        new = head + block + rest.split(end, 1)[1]
    else:
        new = f"{old.rstrip()}\n\n{block}\n".lstrip()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(new)


def write(run: dict[str, Any], options: argparse.Namespace) -> None:
    """Tables and the picture, into the repository, or into a folder: target/peers for a quick run or chosen shapes."""
    folder = options.out or (ROOT / "target" / "peers" if run["mode"] == "quick" or run["partial"] else None)
    results, pictures = (folder, folder) if folder else (ROOT / "benches" / "results", ROOT / "docs")
    if run["mode"] == "sweep":
        replace_block(results / "cpu.md", "peers-sweep", "## Is a peer faster anywhere?\n\n" + sweep_text(run, 10))
        (results / "sweep.md").write_text("# Sweep of shapes\n\n" + sweep_text(run) + "\n")
        print(sweep_text(run))
        return
    replace_block(results / "cpu.md", "peers-step", "## A step beside its peers\n\n" + grid_text(run, options.tolerance))
    try:
        import plots
    except ImportError as error:
        print(f"no picture: {error}")
        return
    pictures.mkdir(parents=True, exist_ok=True)
    plots.shares(run, pictures / "peers.png")
    print(f"{results / 'cpu.md'}, {pictures / 'peers.png'}")


def verdict(run: dict[str, Any], options: argparse.Namespace) -> int:
    """The exit status: 3 if our results are wrong somewhere."""
    bad = [record for record in run["records"] if wrong(record, options.tolerance)]
    for record in bad:
        where = f"{shape_of(record)}, threads {record['threads']}"
        print(f"{RED}wrong results of ours{PLAIN} at {where}: {record['found'][OURS]['errors']}")
    compared = [record for record in run["records"] if "errors" in record["found"][OURS]]
    within = sum(largest_error(record, OURS) <= options.tolerance for record in compared)
    print(f"of {len(run['records'])} results of ours, {len(compared)} were compared with float64: {within} are within the "
          f"tolerance, {len(compared) - within - len(bad)} are as far off as f32 peers, {len(bad)} are wrong")
    return 3 if bad else 0
