"""What stands before a start: stored options, image patterns, links from other pages' doors, start slots."""

from __future__ import annotations

import asyncio

import pytest
from jupyterhub import orm

from ds01spawner.errors import Refusal
from ds01spawner.images import allowed, choose_image
from ds01spawner.model import Request
from ds01spawner.overruled import exposed
from ds01spawner.policy.schema import Profile
from ds01spawner.progress import StartQueue
from ds01spawner.stored_options import acceptable, guard


@pytest.mark.parametrize("options", [None, {}, {"profile": "small"}, {"profile": "p", "size": "s", "cpus": 2}])
def test_options_that_a_start_would_read_are_stored(options: object) -> None:
    assert acceptable(options)


@pytest.mark.parametrize(
    "options",
    [
        {"profile": {"a": 1}},
        {"unknown": 1},
        ["profile"],
        {"profile": "x" * 10_000},
        {"gpus": 10**9},
        "text",
        {"a": object()},
    ],
)
def test_hostile_stored_options_are_not_kept(options: object) -> None:
    assert not acceptable(options)
    guard()
    guard()
    row = orm.Spawner(user_options={"profile": "small"})
    assert row.user_options == {"profile": "small"}
    row.user_options = options
    assert row.user_options == {}


def profile(*patterns: str) -> Profile:
    return Profile(name="p", image="lab/base:1", images=patterns, sizes={"s": {}})


@pytest.mark.parametrize(
    ("image", "pattern", "offered"),
    [
        ("pytorch:2", "pytorch*", True),
        ("pytorch.evil.example/x", "pytorch*", False),
        ("ubuntu:22.04", "ubuntu:*", True),
        ("ubuntu:5000/evil/x", "ubuntu:*", False),
        ("aimehub/pytorch:2", "aimehub/*", True),
        ("localhost/aimehub/x", "*", False),
        ("reg.example:5000/lab/x", "reg.example:5000/lab/*", True),
        ("reg.example:5000/other/../lab/x", "reg.example:5000/*", False),
        ("evil.example/aimehub/x", "*/aimehub/*", False),
    ],
)
def test_image_patterns_do_not_cross_registries(image: str, pattern: str, offered: bool) -> None:
    assert allowed(image, profile(pattern), "lab/base:1") is offered


def test_an_image_by_a_short_id_is_not_offered_by_a_pattern() -> None:
    with pytest.raises(Refusal, match="not offered"):
        choose_image(Request(image="abc"), profile("*"), "lab/base:1", ())


def test_a_hub_without_subdomains_is_told() -> None:
    assert "subdomain_host" in next(exposed({}))
    assert not list(exposed({"JupyterHub": {"subdomain_host": "https://hub.example"}}))


async def test_a_slot_is_given_back_by_those_who_never_answer() -> None:
    queue = StartQueue(1)
    async with queue.slot(longest=0.05):
        await asyncio.wait_for(_enter_and_leave(queue), timeout=5)
    await asyncio.wait_for(_enter_and_leave(queue), timeout=5)


async def _enter_and_leave(queue: StartQueue) -> None:
    async with queue.slot():
        pass
