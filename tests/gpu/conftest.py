"""The stub NVML, compiled once per run, and `read_nvml`, which reads a topology through it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.nvml_stub.topology import Topology

ROOT = Path(__file__).parents[2]
STUB = ROOT / "tests" / "nvml_stub"

ReadNvml = Callable[..., list[dict[str, Any]]]
"""`read_nvml(topology, …, setting="nvml")`: one answer of drive.py per topology."""


@pytest.fixture(scope="session")
def stub_library(tmp_path_factory: pytest.TempPathFactory, require: Callable[[str, str | None], None]) -> Path:
    """Folder of the compiled stub."""
    compiler = shutil.which("cc")
    require("C compiler", None if compiler else "cc is not installed")
    folder = tmp_path_factory.mktemp("nvml")
    library = folder / "libnvidia-ml.so.1"
    flags = ["-shared", "-fPIC", "-std=c11", "-D_POSIX_C_SOURCE=200809L", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([str(compiler), *flags, "-o", str(library), str(STUB / "stub.c")], check=True)
    return folder


@pytest.fixture
def read_nvml(stub_library: Path, tmp_path: Path) -> ReadNvml:
    def read(*topologies: Topology, setting: str = "nvml", library: Path | None = stub_library) -> list[dict[str, Any]]:
        files = []
        for number, topology in enumerate(topologies):
            file = tmp_path / f"topology-{number}"
            file.write_text(topology.text)
            files.append(str(file))
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment["LD_LIBRARY_PATH"] = str(library) if library else str(tmp_path)
        command = [sys.executable, "-W", "error", "-m", "tests.nvml_stub.drive", setting, *files]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        answers: list[dict[str, Any]] = json.loads(done.stdout)
        return answers

    return read
