"""This machine's peaks: `peak.c`, compiled when it is first needed and called through ctypes."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGET = HERE.parents[1] / "target" / "peers"


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled helper, or None where there is no C compiler."""
    source, library = HERE / "peak.c", TARGET / "peak.so"
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        TARGET.mkdir(parents=True, exist_ok=True)
        flags = ["-std=gnu11", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread"]
        command = [os.environ.get("CC", "cc"), *flags, str(source), "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no peak is measured: {getattr(error, 'stderr', None) or error}", file=sys.stderr)
            return None
    helper = ctypes.CDLL(str(library))
    helper.peak_flops.restype = helper.peak_copy.restype = ctypes.c_double
    helper.peak_flops.argtypes = [ctypes.c_int, ctypes.c_double]
    helper.peak_copy.argtypes = [ctypes.c_int, ctypes.c_double, ctypes.c_size_t]
    return helper


def flops(threads: int, seconds: float = 0.005) -> float:
    """FLOP/s of f32 multiply-adds in registers on so many threads at once; NaN if it cannot be measured."""
    helper = _library()
    return helper.peak_flops(threads, seconds) if helper else float("nan")


def copy(threads: int, seconds: float = 0.2, size: int = 64 << 20) -> float:
    """Bytes/s read and written by copies of `size` bytes on each thread; NaN if it cannot be measured."""
    helper = _library()
    return helper.peak_copy(threads, seconds, size) if helper else float("nan")
