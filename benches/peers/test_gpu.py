"""The stages of `scripts/gpu-bundle/run.py` and the report of what they leave, without a GPU: `python -m unittest discover benches/peers`."""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import gpu_report
from gpu_report import MET, MISSED, UNKNOWN, Folder


def runner() -> Any:
    """run.py as a module."""
    found = importlib.util.spec_from_file_location("gpu_run", HERE.parents[1] / "scripts/gpu-bundle/run.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def bench(folder: Path, name: str, shape: str, seconds: float, work: float, unit: str, peak: float) -> None:
    """A benchmark as criterion and our harness leave it; every sample is of 2 calls."""
    group, function = name.split("/", 1)
    place = folder / "benches" / "criterion" / name.replace("/", "_") / shape / "new"
    place.mkdir(parents=True)
    (place / "benchmark.json").write_text(json.dumps({"group_id": group, "function_id": function, "value_str": shape}))
    (place / "sample.json").write_text(json.dumps({"iters": [2.0] * 60, "times": [2e9 * seconds] * 60}))
    with (folder / "benches" / "peaks.jsonl").open("a") as file:
        line = {"group": group, "name": function, "shape": shape, "work": work, "unit": unit, "peak": peak}
        file.write(json.dumps(line) + "\n")


def timed(seconds: float, error: float = 1e-3) -> dict[str, Any]:
    found = {"median": seconds, "low": 0.9 * seconds, "high": 1.1 * seconds, "samples": 60}
    return {"cold": found, "warm": found, "errors": {"dw": error}}


def step(shape: list[int], found: dict[str, Any], wrong: bool = False) -> dict[str, Any]:
    return {"kind": "step", "shape": shape, "mode": "bf16", "errors_at": shape, "flops": 1e9, "found": found, "wrong": wrong}


class Report(unittest.TestCase):
    def setUp(self) -> None:
        holder = tempfile.TemporaryDirectory()
        self.addCleanup(holder.cleanup)
        self.path = Path(holder.name)

    def verdicts(self, part: str) -> dict[str, str]:
        """Of the targets whose text has this, by where."""
        return {found.where: found.verdict for found in gpu_report.verdicts(Folder(self.path)) if part in found.target}

    def peers(self, *records: dict[str, Any], device: str = "cuda") -> None:
        run = {"device": device, "records": list(records), "left_out": ["lse: no time left"]}
        (self.path / "peers-times.json").write_text(json.dumps(run))

    def test_an_empty_folder_has_every_target_and_measured_none(self) -> None:
        found = gpu_report.verdicts(Folder(self.path))
        self.assertEqual(len(found), len(gpu_report.TARGETS))
        self.assertEqual({one.verdict for one in found}, {UNKNOWN})
        self.assertIn("not run", gpu_report.text_of(Folder(self.path), None))

    def test_rates_are_held_against_the_target_in_their_unit(self) -> None:
        flops = 2.0 * 4096 * 4096 * 131072
        bench(self.path, "cuda-encode/encode, row loss only bf16", "4096x4096x131072", flops / 731e12, flops, "FLOP/s", 800e12)
        self.assertEqual(self.verdicts("row loss only"), {"enqueued": MET})

    def test_a_rate_just_below_is_missed(self) -> None:
        flops = 2.0 * 4096 * 4096 * 131072
        bench(self.path, "cuda-encode/encode, row loss only bf16", "4096x4096x131072", flops / 729e12, flops, "FLOP/s", 800e12)
        self.assertEqual(self.verdicts("row loss only"), {"enqueued": MISSED})

    def test_the_gram_is_compared_with_a_full_product(self) -> None:
        n, h, peak = 8192, 6144, 700e12
        full = 2.0 * n * h * h / peak
        for name, factor in (("storage", 1.9), ("full", 1.8)):
            name, work = f"cuda-statistics/finish_statistics from a bf16 {name}", float(n * h * (h + 1))
            bench(self.path, name, f"{n}x768x{h}", full / factor, work, "FLOP/s", peak)
        self.assertEqual(self.verdicts("finish_statistics"), {"8192×768×6144, storage": MET, "8192×768×6144, full": MISSED})

    def test_shares_are_of_the_measured_ceiling(self) -> None:
        ceilings = {"product": {"what": "p", "work": 800e12, "median": 1.0}, "copy": {"what": "c", "work": 4e12, "median": 1.0}}
        (self.path / "ceilings.json").write_text(json.dumps(ceilings))
        work = 2.0 * 8192 * 768 * 6144
        # More than 85 % of the product that ran beside it, less of the ceiling.
        bench(self.path, "cuda-encode/encode with a and statistics bf16", "8192x768x6144", work / 670e12, work, "FLOP/s", 700e12)
        bench(self.path, "cuda-optimizer/adam f32", "16384x2048x16384", 1e9 / 3.61e12, 1e9, "B/s", 3.7e12)
        bench(self.path, "cuda-optimizer/adam f32", "128x784x64", 1e6 / 1e12, 1e6, "B/s", 3.7e12)
        self.assertEqual(self.verdicts("statistics, D"), {"8192×768×6144": MISSED})
        self.assertEqual(self.verdicts("Adam"), {"16384×2048×16384, adam f32": MET})

    def test_steps_are_compared_with_the_compiled_loss_by_regime(self) -> None:
        self.peers(
            step([8192, 768, 6144], {"ours": timed(1.0), "compile": timed(2.1)}),
            step([8192, 4096, 32768], {"ours": timed(1.0), "compile": timed(3.9)}),
            step([4096, 4096, 131072], {"ours": timed(1.0), "compile": {"note": "does not fit"}}),
        )
        expected = {"8192×768×6144, bf16": MET, "8192×4096×32768, bf16": MISSED, "4096×4096×131072, bf16": UNKNOWN}
        self.assertEqual(self.verdicts("full step"), expected)
        text = gpu_report.text_of(Folder(self.path), None)
        self.assertIn("does not fit", text)
        self.assertIn("lse: no time left", text)

    def test_a_rehearsal_meets_nothing(self) -> None:
        self.peers(step([8192, 768, 6144], {"ours": timed(1.0), "compile": timed(2.1)}), device="cpu")
        self.assertEqual(list(self.verdicts("full step").values()), [UNKNOWN])
        self.assertIn("rehearsal", gpu_report.text_of(Folder(self.path), None))

    def test_wrong_results_meet_nothing(self) -> None:
        self.peers(step([128, 784, 64], {"ours": timed(1e-6), "compile": timed(1.0)}, wrong=True))
        self.assertEqual(set(self.verdicts("full step").values()) | set(self.verdicts("≤ 30").values()), {f"{MISSED} (wrong results)"})

    def test_operations_are_right_only_where_the_tests_passed(self) -> None:
        bench(self.path, "cuda-step/decoder-free bf16 storage", "128x784x64", 29e-6, 1e6, "FLOP/s", 1e12)
        self.assertEqual(list(self.verdicts("≤ 30").values()), [MET])
        self.assertIn("did not pass", gpu_report.text_of(Folder(self.path), None))
        (self.path / "tests.json").write_text(json.dumps({"stage": "tests", "status": "ok", "steps": []}))
        self.assertIn("within the tests' bounds", gpu_report.text_of(Folder(self.path), None))

    def test_files_that_were_cut_off_are_left_out(self) -> None:
        (self.path / "peers-times.json").write_text('{"records": [')
        self.assertIn("Not measured", gpu_report.text_of(Folder(self.path), None))


class Stages(unittest.TestCase):
    def setUp(self) -> None:
        holder = tempfile.TemporaryDirectory()
        self.addCleanup(holder.cleanup)
        self.path = Path(holder.name)
        self.run_ = runner()

    def run_stage(self, seconds: int, *steps: str) -> tuple[str, dict[str, Any]]:
        commands = [self.run_.Step([sys.executable, "-c", step]) for step in steps]
        self.run_.STAGES["peers"] = self.run_.Stage(seconds, lambda out: commands)
        with mock.patch("builtins.print"):
            status = self.run_.run_stage("peers", self.path, None)
        return status, json.loads((self.path / "peers.json").read_text())

    def test_a_crash_and_a_hang_cost_no_other_step(self) -> None:
        crash, hang = "import os; os.abort()", "import time; time.sleep(60)"
        fine = "print('test result: ok. 3 passed; 0 failed; 1 ignored')"
        status, record = self.run_stage(8, crash, hang, fine)
        self.assertEqual(status, "failed")
        self.assertEqual([one["ok"] for one in record["steps"]], [False, False, True])
        self.assertEqual([one["timed_out"] for one in record["steps"]], [False, True, False])
        self.assertEqual((record["steps"][2]["passed"], record["steps"][2]["ignored"]), (3, 1))
        self.assertIn("3 passed", (self.path / "peers.log").read_text())

    def test_a_program_that_ran_no_test_failed(self) -> None:
        self.assertEqual(self.run_stage(20, "print('test result: ok. 0 passed; 0 failed; 0 ignored')")[0], "failed")
        self.assertEqual(self.run_stage(20, "print('fine')")[0], "ok")

    def test_stages_fit_into_eight_minutes(self) -> None:
        self.assertLessEqual(max(stage.seconds for stage in self.run_.STAGES.values()), 480)

    def test_without_a_driver_stages_are_skipped_with_the_reason(self) -> None:
        with mock.patch.object(self.run_, "driver", lambda: False), mock.patch("builtins.print"):
            for name in ("device", "sanitizer", "conformance", "benches", "peers"):
                self.assertEqual(self.run_.run_stage(name, self.path, None), "skipped")
                self.assertEqual(json.loads((self.path / f"{name}.json").read_text())["why"], "no NVIDIA driver")
            self.assertNotIn("SAE_KERNELS_REQUIRE_GPU", {name for one in self.run_.tests(self.path) for name in one.environment})


if __name__ == "__main__":
    unittest.main()
