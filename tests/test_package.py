"""The package as it is installed: what importing it costs, its parts and its data."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from importlib.resources import files

import pytest

import sharpcore

HEAVY = (
    "diffusers",
    "triton",
    "pandas",
    "pyarrow",
    "matplotlib",
    "typer",
    "rich",
    "scipy",
    "sklearn",
    "transformers",
)


def installed() -> importlib.metadata.Distribution:
    for distribution in importlib.metadata.distributions(name="sharpcore"):
        # What a build leaves in the source tree has no such list.
        if distribution.read_text("RECORD") is not None:
            return distribution
    pytest.skip("sharpcore runs from its source tree, it is not installed")


def test_import_brings_in_no_heavy_package(tmp_path):
    code = (
        "import sys, json, torch\n"
        "before = set(sys.modules)\n"
        "import sharpcore\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300
    )
    added = {module.partition(".")[0] for module in json.loads(done.stdout)}
    assert "sharpcore" in added
    assert not added & set(HEAVY)


def test_kernels_belong_to_sharpcore(tmp_path):
    code = "import sharpcore, sharpcore.kernels; print(*sharpcore.kernels.__path__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.strip()


def test_no_top_level_package_called_kernels():
    distribution = installed()
    assert (distribution.read_text("top_level.txt") or "").split() == ["sharpcore"]
    assert not [file for file in distribution.files or () if file.parts[0] == "kernels"]


def test_metadata():
    distribution = installed()
    assert distribution.version == sharpcore.__version__
    assert distribution.metadata["License-Expression"] == "Apache-2.0"
    assert {"diffusers", "gpu", "dev"} <= set(distribution.metadata.get_all("Provides-Extra") or ())
    (script,) = (entry for entry in distribution.entry_points if entry.name == "sharpcore")
    assert script.value == "sharpcore.cli:main"


def test_data_comes_along():
    package = files("sharpcore")
    assert (package / "py.typed").is_file()
    model = package / "models" / "tiny-sd-eps"
    for name in ("model_index.json", "prompts_mem.txt", "prompts_nonmem.txt", "unet/config.json"):
        assert (model / name).is_file(), name
