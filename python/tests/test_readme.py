"""The README's programs run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def programs(path):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / path).read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("path", ["README.md", "python/README.md"])
def test_programs_run(path):
    found = programs(path)
    assert found, f"{path} has no program"
    for program in found:
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert result.returncode == 0, f"{program}\n{result.stderr}"
        assert result.stdout, "a program of a README shows what it does"
