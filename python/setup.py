"""Builds the crate's C library with cargo and puts it into the package; all else stands in pyproject.toml.

SAE_KERNELS_FEATURES=cuda adds the CUDA kernels, for which nvcc must be there.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
MANIFEST = HERE.parent / "Cargo.toml"


def build_library() -> Path:
    """The path of the library, which cargo names."""
    if not MANIFEST.is_file():
        sys.exit(f"{MANIFEST} is not there: the package is built from a clone of the repository, by `pip install ./python`")
    features = ",".join(["capi", *os.environ.get("SAE_KERNELS_FEATURES", "").replace(",", " ").split()])
    command = ["cargo", "rustc", "--release", "--lib", "--crate-type", "cdylib", "--features", features]
    command += ["--manifest-path", str(MANIFEST), "--message-format", "json-render-diagnostics"]
    try:
        messages = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    except FileNotFoundError:
        sys.exit("cargo was not found: install Rust from https://rustup.rs, then try again")
    except subprocess.CalledProcessError as error:
        sys.exit(f"cargo could not build the library (exit status {error.returncode}); its messages stand above")
    for line in messages.splitlines():
        message = json.loads(line)
        if message["reason"] == "compiler-artifact" and message["target"]["name"] == "sae_kernels":
            for path in map(Path, message["filenames"]):
                if path.suffix in (".so", ".dylib", ".dll"):
                    return path
    sys.exit("cargo built no dynamic library")


class BuildWithLibrary(build_py):
    def run(self):
        super().run()
        package = HERE / "sae_kernels" if self.editable_mode else Path(self.build_lib) / "sae_kernels"
        package.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build_library(), package)


class PlatformWheel(bdist_wheel):
    """One wheel for every Python, but for this platform alone."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class PlatformDistribution(Distribution):
    def has_ext_modules(self):
        return True


setup(cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": PlatformWheel}, distclass=PlatformDistribution)
