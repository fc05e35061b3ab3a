"""The READMEs' programs run, and the tables of docs/scaling.md are what its program prints."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def programs(path):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / path).read_text(encoding="utf-8"), re.M | re.S)


def run(program):
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, f"{program}\n{result.stderr}"
    return result.stdout


@pytest.mark.parametrize("path", ["README.md", "python/README.md"])
def test_programs_run(path):
    found = programs(path)
    assert found, f"{path} has no program"
    for program in found:
        assert run(program), "a program of a README shows what it does"


def test_tables_of_scaling():
    (program,) = programs("docs/scaling.md")
    rows = run(program).splitlines()
    text = (ROOT / "docs/scaling.md").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 12 and [line for line in text if line in rows] == rows
