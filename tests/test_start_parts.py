"""The small parts of a start: what answers, what is written down, what has no effect, what is refused before Docker."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from traitlets.config import Config

from ds01spawner.answer import answers
from ds01spawner.body import HubSide, require_folders, require_limits
from ds01spawner.containers.facts import ContainerFacts, ImageFacts
from ds01spawner.containers.pulling import PullProgress
from ds01spawner.containers.spec import api_token, without_devices
from ds01spawner.errors import Code, EngineError, HostError, Refusal
from ds01spawner.images import ImageChoice, SavedImage, choose_image
from ds01spawner.keep import require_permitted
from ds01spawner.launch import Cancelled, Launch
from ds01spawner.ledger.records import ImageRecord
from ds01spawner.model import Admission, Limit, Limits, Mount, Request, Resources
from ds01spawner.overruled import INSTEAD, overruled
from ds01spawner.policy.schema import Profile
from ds01spawner.scene import MAX_RECORDED, Person, recordable

# --------------------------------------------------------------------------- the first answer


async def server(reply: bytes | None) -> tuple[asyncio.Server, int]:
    """Something that listens and answers with `reply`; None = closes at once."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if reply is not None:
            writer.write(reply)
        writer.close()

    listening = await asyncio.start_server(handle, "127.0.0.1", 0)
    return listening, listening.sockets[0].getsockname()[1]


@pytest.mark.parametrize(
    ("reply", "up"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", True),
        (b"HTTP/1.0 302 Found\r\nLocation: /hub\r\n\r\n", True),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", True),
        (b"HTTP/1.1 500 Oops\r\n\r\n", False),
        (b"HTTP/1.1 503 Soon\r\n\r\n", False),
        (b"SSH-2.0-OpenSSH\r\n", False),
        (b"HTTP/1.1 two hundred\r\n", False),
        (b"\xff\xfe" * 10_000, False),
        (b"", False),
        (None, False),
    ],
)
async def test_answer_is_what_the_hub_takes_for_one(reply: bytes | None, up: bool) -> None:
    listening, port = await server(reply)
    async with listening:
        assert await answers("127.0.0.1", port, "/user/alice/api") is up
    assert not await answers("127.0.0.1", port, "/user/alice/api"), "nobody listens any more"


# --------------------------------------------------------------------------- request rows


@pytest.mark.parametrize(
    ("options", "row"),
    [
        ({"profile": "small"}, {"profile": "small"}),
        ({"profile": "a\0b"}, {"profile": "a\ufffdb"}),
        ({"profile": "\ud800"}, {"profile": "?"}),
        ({"\ud800": ["\0", {"x": None}]}, {"?": ["\ufffd", {"x": None}]}),
        ({"profile": "\\u0000 in words"}, {"profile": "\\u0000 in words"}),
        ({"cpus": float("nan")}, {"unreadable": True}),
        ({"profile": {1, 2}}, {"unreadable": True}),
    ],
)
def test_request_row_holds_what_every_database_stores(options: dict[str, Any], row: dict[str, Any]) -> None:
    assert recordable(options) == row
    json.dumps(recordable(options)).encode()


def test_request_row_is_bounded() -> None:
    assert recordable({"profile": "x" * MAX_RECORDED}).keys() == {"too_long"}
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    assert recordable({"profile": deep}) == {"unreadable": True}


# --------------------------------------------------------------------------- limits and folders


def admission(**changes: Any) -> Admission:
    """A granted request whose resources are `changes`."""
    resources = replace(Resources(1.0, 2**30, None, None, 100), **changes)
    names = {"max_cpus": resources.cpus, "memory": resources.memory, "pids_limit": resources.pids_limit}
    limits = Limits("alice", "g", ("g",), {key: Limit(value, "group g") for key, value in names.items()})
    return Admission(Request(), limits, "image", (), resources)


def test_limits_of_nothing_are_refused_with_their_source() -> None:
    require_limits(admission())
    require_limits(admission(cpus=None, memory=None, pids_limit=None))
    for changes, key in (({"cpus": 0.0}, "max_cpus"), ({"memory": 0}, "memory"), ({"pids_limit": 0}, "pids_limit")):
        with pytest.raises(Refusal, match=f"{key} is 0 for you \\(group g\\)") as refused:
            require_limits(admission(**changes))
        assert refused.value.code is Code.NOT_ALLOWED


def test_limits_of_nothing_in_a_size_name_the_profile() -> None:
    granted = admission()
    zero = replace(granted, resources=replace(granted.resources, cpus=0.0))
    with pytest.raises(Refusal, match="the profile"):
        require_limits(zero)


def test_folders_that_are_missing_or_no_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    require_folders([Mount(str(tmp_path), "/data")])
    for host in (tmp_path / "gone", tmp_path / "file"):
        with pytest.raises(HostError, match=str(host)) as refused:
            require_folders([Mount(str(tmp_path), "/data"), Mount(str(host), "/models")])
        assert refused.value.code is Code.STORAGE_REFUSED and "/models" in refused.value.message


# --------------------------------------------------------------------------- tokens


def test_token_stand_in_carries_none() -> None:
    env = {"JUPYTERHUB_API_TOKEN": "secret", "JPY_API_TOKEN": "secret", "PATH": "/bin", "DS01_GPUS": "0 A100 GPU-1"}
    old = ContainerFacts(id="a" * 64, name="main._.70000", image_ref="x:main._.70000", env=env)
    assert api_token(old) == "secret"
    body = without_devices(old)
    assert "secret" not in json.dumps(body) and "PATH=/bin" in body["Env"]


def test_token_of_a_hub_side_that_knows_no_better_lives_if_there_is_one() -> None:
    hub = HubSide({}, (), (), 8888)
    assert hub.token_lives("x") and not hub.token_lives("")
    assert "secret" not in repr(HubSide({"JUPYTERHUB_API_TOKEN": "secret"}, (), (), 8888))


# --------------------------------------------------------------------------- images


def profile(*patterns: str) -> Profile:
    """A profile whose own image is lab/base:1, with patterns for more."""
    sizes = {"s": {}}
    return Profile.model_validate({"name": "p", "image": "lab/base:1", "images": list(patterns), "sizes": sizes})


HIDDEN = [
    "lab/base:main._.70001",
    "lab/base:main._.70001-20260102T030405",
    "docker.io/lab/base:main._.70001",
    "sha256:" + "ab" * 32,
    "ab" * 32,
    "abcdef012345",
    "abcd",
]


@pytest.mark.parametrize("image", HIDDEN)
@pytest.mark.parametrize("pattern", ["*", "lab/*", "lab/base:*", "sha256:*", "*abc*"])
def test_image_patterns_reach_no_ids_and_no_containers_own_tags(image: str, pattern: str) -> None:
    with pytest.raises(Refusal) as refused:
        choose_image(Request(image=image), profile(pattern), "lab/base:1", ())
    assert refused.value.code is Code.IMAGE_NOT_ALLOWED


def test_image_of_ones_own_is_found_by_its_tag_and_a_pattern_finds_what_has_a_name() -> None:
    mine = SavedImage("lab/base:main._.70000-20260102T030405", "sha256:1", "lab/base:1", "")
    assert choose_image(Request(image=mine.ref), profile(), "lab/base:1", (mine,)).saved == mine
    assert choose_image(Request(image="lab/other:2"), profile("lab/*"), "lab/base:1", ()).source == "lab/other:2"


def test_image_that_an_admin_named_by_its_id_is_the_profiles_own() -> None:
    chosen = choose_image(Request(), profile(), "sha256:" + "ab" * 32, ())
    assert chosen.source == "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("ref", "tags", "ok"),
    [
        ("lab/a:1", ("lab/a:1",), True),  # an admin gave somebody's image a name and offers it
        ("lab/a", ("lab/a:latest",), True),
        ("lab/a@sha256:" + "0" * 64, ("lab/base:main._.70001-20260102T030405",), False),
        ("lab/saved:1", ("lab/saved:1",), False),
    ],
)
def test_image_of_another_user_is_not_permitted_however_it_was_found(ref: str, tags: tuple[str, ...], ok: bool) -> None:
    """Fails without `require_permitted`: some engines find any image of theirs by a digest."""
    bobs = ImageRecord("bob", "lab/saved:1", "sha256:1", "lab/base:1")
    ledger = SimpleNamespace(find_image=lambda name: bobs if name in (bobs.ref, bobs.image_id) else None)
    runtime: Any = SimpleNamespace(ledger=ledger)
    facts = ImageFacts(id="sha256:1", tags=tags)
    require_permitted(runtime, "bob", ref, facts)
    if ok:
        require_permitted(runtime, "alice", ref, facts)
    else:
        with pytest.raises(Refusal) as refused:
            require_permitted(runtime, "alice", ref, facts)
        assert refused.value.code is Code.IMAGE_NOT_ALLOWED


# --------------------------------------------------------------------------- pulling


def test_pull_tells_bytes_and_stops_when_the_start_is_given_up() -> None:
    """Fails without `Launch._pulled`: neither a figure for the page nor an end for a cancelled start."""
    told: list[tuple[str, float | None]] = []

    def pull(_ref: str, progress: Callable[[PullProgress], None]) -> ImageFacts:
        progress(PullProgress(3 * 2**20, 10 * 2**20, 1, 4))
        launch.cancel()
        progress(PullProgress(4 * 2**20, 10 * 2**20, 1, 4))
        raise AssertionError("the pull goes on")

    runtime: Any = SimpleNamespace(engine=SimpleNamespace(image_facts=lambda _: None, pull=pull))
    launch = Launch(runtime, Person("alice"), "", lambda _stage, text, fraction=None: told.append((text, fraction)))
    launch._image = ImageChoice("lab/base:1", "lab/base:1")
    with pytest.raises(Cancelled):
        launch.fetch_image()
    assert told[-1] == ("Fetching lab/base:1: 3 MiB of 10 MiB, 1 of 4 layers", 0.3)


# --------------------------------------------------------------------------- settings without effect


def test_overruled_settings_are_told_with_the_place_that_decides() -> None:
    config = Config()
    config.DockerSpawner.mem_limit = "1G"
    config.Spawner.environment = {"A": "b"}
    config.DS01Spawner.pull_policy = "always"
    told = list(overruled(config, ["Spawner", "DockerSpawner", "DS01Spawner"]))
    assert told == [
        "c.DockerSpawner.mem_limit has no effect with ds01spawner: resource-limits.yaml and the sizes of profiles.yaml "
        "decide."
    ]


def test_overruled_names_are_traits_that_exist() -> None:
    """Fails when DockerSpawner renames one: it would be passed over in silence."""
    from dockerspawner import DockerSpawner

    assert set(INSTEAD) <= set(DockerSpawner.class_trait_names())


# --------------------------------------------------------------------------- errors at the Hub's doors


@pytest.mark.parametrize(
    ("error", "status", "refusal"),
    [
        (Refusal(Code.USER_QUOTA, "50 % is used."), 409, True),
        (EngineError("Docker does not answer."), 503, False),
        (HostError("No limits."), 503, False),
    ],
)
def test_error_is_a_refusal_or_a_failure_to_the_hub(error: Any, status: int, refusal: bool) -> None:
    """Fails if what is broken counts as a refusal: `consecutive_failure_limit` would never see it."""
    from jupyterhub import spawner as hub_spawner

    from ds01spawner.spawn_error import spawn_error

    told: Any = spawn_error(error)
    kind: Callable[[object], bool] = lambda e: isinstance(e, getattr(hub_spawner, "SpawnException", ()))  # noqa: E731
    assert told.status_code == status and told.jupyterhub_message == error.message
    assert kind(told) is (refusal and hasattr(hub_spawner, "SpawnException"))
    str(told)  # a % in a sentence is no format
