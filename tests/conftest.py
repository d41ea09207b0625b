"""What every test may rely on: `require(…)` for parts of the machine, and who runs when.

A part that this machine cannot run is a failure under `CI=true` and a loud skip elsewhere. `./tests/run`
installs those parts and says where they are: `DS01_TEST_IMAGE` (image of the demo), `DS01_CHROMIUM` (path of a
browser), `DS01_TEST_POSTGRES` (URL of an empty database; optional). `DS01_LONG=1` adds the tests marked `long`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Require = Callable[[str, "str | None"], None]
"""Type of the `require` fixture."""

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")


def demand(part: str, reason: str | None) -> None:
    """End the running test unless `reason` is None: failed under CI=true, skipped elsewhere.

    Args:
        part: what the test needs ("Docker", "a browser").
        reason: why this machine does not have it, or None if it has.
    """
    if reason is None:
        return
    message = f"this machine cannot run the part {part}: {reason} (./tests/run installs what is missing)"
    if os.environ.get("CI") == "true":
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


@pytest.fixture(scope="session")
def require() -> Require:
    """`require(part, reason)`: go on if `reason` is None, else fail (CI=true) or skip loudly."""
    return demand


def _docker_missing() -> str | None:
    if os.geteuid() != 0:
        return "not root"
    import docker  # only tests with the marker pay for the import

    try:
        client = docker.from_env(timeout=10)
    except docker.errors.DockerException as error:
        return f"no Docker daemon answers ({error})"
    try:
        client.ping()
    except (docker.errors.DockerException, OSError) as error:
        return f"no Docker daemon answers ({error})"
    finally:
        client.close()
    return None


def _proxy_missing() -> str | None:
    return None if shutil.which("configurable-http-proxy") else "no configurable-http-proxy on PATH"


def browser_path() -> str | None:
    """Path of the Chromium that browser tests drive, or None."""
    given = os.environ.get("DS01_CHROMIUM")
    if given:
        return given if Path(given).exists() else None
    return next((path for name in CHROMIUM_NAMES if (path := shutil.which(name))), None)


def _browser_missing() -> str | None:
    return None if browser_path() else "no Chromium found ($DS01_CHROMIUM, PATH)"


_PROBES: dict[str, Callable[[], str | None]] = {
    "docker": _docker_missing,
    "hub": _proxy_missing,
    "browser": _browser_missing,
}


@pytest.fixture(scope="session")
def _probed() -> dict[str, str | None]:
    """What the probes said, by marker; each is asked once per run, when the first test needs it."""
    return {}


def _demand_marked(node: pytest.Item | pytest.Collector, probed: dict[str, str | None]) -> None:
    for marker, probe in _PROBES.items():
        if node.get_closest_marker(marker) is not None:
            if marker not in probed:
                probed[marker] = probe()
            demand(marker, probed[marker])


@pytest.fixture(autouse=True, scope="module")
def _parts_of_module(request: pytest.FixtureRequest, _probed: dict[str, str | None]) -> None:
    """Ask for the parts that the module's `pytestmark` names, before its other fixtures try to use them."""
    _demand_marked(request.node, _probed)


@pytest.fixture(autouse=True)
def _parts_of_test(request: pytest.FixtureRequest, _probed: dict[str, str | None]) -> None:
    """Ask for the parts that the test's own markers name."""
    _demand_marked(request.node, _probed)


@pytest.fixture(scope="session")
def demo_image() -> str:
    """Reference of the demo image on the local Docker (`DS01_TEST_IMAGE`, built by ./tests/run)."""
    image = os.environ.get("DS01_TEST_IMAGE", "")
    demand("demo image", None if image else "DS01_TEST_IMAGE is not set")
    return image


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the browser (`DS01_CHROMIUM` or the first on PATH)."""
    path = browser_path()
    demand("browser", None if path else "no Chromium found")
    return path or ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is minutes long unless `DS01_LONG=1`."""
    if os.environ.get("DS01_LONG") == "1":
        return
    long = [item for item in items if item.get_closest_marker("long")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if not item.get_closest_marker("long")]
