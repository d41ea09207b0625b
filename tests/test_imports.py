"""The one-way imports of the design, and who may import what from outside. Fails when a room reaches upwards."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "ds01spawner"

# Lower number = deeper room; a module may import rooms of a lower number, and its own.
LEVELS = {
    "errors": 0,
    "model": 1,
    "settings": 2,
    "policy": 3,
    "gpu": 3,
    "containers": 4,
    "ledger": 4,
    "admission_words": 5,
    "admission": 6,
    "images": 6,
    "overruled": 6,
    "answer": 4,
    "form": 7,
    "welcome": 8,
    "progress": 4,
    "runtime": 8,
    "keep": 9,
    "scene": 10,
    "body": 10,
    "servers": 10,
    "verify": 10,
    "undo": 11,
    "reconcile": 11,
    "spawn_error": 1,
    "stored_options": 10,
    "spawn_page": 12,
    "launch": 13,
    "spawner": 14,
    "watcher": 14,
    "configure": 15,
    "cli": 15,
    "": 16,
}

PURE = ("policy", "admission", "admission_words", "gpu.placement", "gpu.mig", "containers.spec", "containers.aime")
PURE += (
    "containers.occupancy",
    "containers.facts",
    "form.request",
    "form.choice",
    "form.cards",
    "form.view",
    "images",
    "welcome",
    "reconcile.findings",
    "reconcile.evidence",
    "reconcile.box",
    "reconcile.plan",
)
WORLD = ("docker", "dockerspawner", "jupyterhub", "sqlalchemy", "alembic", "pynvml", "tornado", "requests")


def modules() -> Iterator[tuple[str, Path]]:
    """Dotted name below the package → file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        yield ".".join(parts), path


def imports(name: str, path: Path) -> Iterator[str]:
    """Absolute dotted names that a module imports, also inside functions and for type checking."""
    package = ["ds01spawner", *name.split(".")] if name else ["ds01spawner"]
    if path.name != "__init__.py":
        package.pop()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module.split(".") if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room(name: str) -> str:
    """The room of a dotted name below the package."""
    return name.split(".")[0]


MODULES = dict(modules())


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name: str) -> None:
    own = room(name)
    assert own in LEVELS, f"{own} is a new room: give it its place in LEVELS and in docs/architecture.md"
    for imported in imports(name, MODULES[name]):
        if imported == "ds01spawner" or not imported.startswith("ds01spawner."):
            continue
        other = room(imported.removeprefix("ds01spawner."))
        if other not in LEVELS or other == own:
            continue
        assert LEVELS[other] < LEVELS[own], f"{name} imports {imported}: {other} lies above {own}"


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith(PURE)])
def test_imports_of_pure_modules_touch_nothing(name: str) -> None:
    for imported in imports(name, MODULES[name]):
        assert imported.split(".")[0] not in WORLD, f"{name} is pure and imports {imported}"


def test_imports_of_dockerspawner_and_nvml_in_one_place_each() -> None:
    users = {
        name for name, path in MODULES.items() if "dockerspawner" in {i.split(".")[0] for i in imports(name, path)}
    }
    assert users == {"spawner"}
    nvml = {name for name, path in MODULES.items() if "pynvml" in {i.split(".")[0] for i in imports(name, path)}}
    assert nvml and all(name.startswith("gpu.nvml") for name in nvml)


def test_imports_package_init_files_are_empty() -> None:
    for name, path in MODULES.items():
        if path.name == "__init__.py" and name:
            assert not path.read_text().strip(), f"{path} should be empty"


def test_imports_of_the_package_are_lazy() -> None:
    code = "import sys, ds01spawner; print(sorted(m for m in sys.modules if m in ('jupyterhub','docker','sqlalchemy')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
