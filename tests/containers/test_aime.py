"""AIME's conventions: names, private tags, labels, accounts; and the exact commands of the real tools against them."""

from __future__ import annotations

import json
import re
import subprocess
import uuid
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds01spawner.containers import aime
from ds01spawner.containers.engine import Engine
from ds01spawner.errors import Code, Refusal

HOSTILE = [
    "a b",
    "../etc",
    "a/b",
    "-x",
    "_x",
    "#x",
    ".x",
    "x;rm -rf /",
    "x\n",
    "naïve",
    "a,b",
    "a=b",
    "a._.7",
    "$(id)",
    "\0",
    "x" * 200,
    "${HOME}",
    "%n",
    "`id`",
]


def given_labels(**changes: object) -> aime.LabelInput:
    values: dict[str, object] = {
        "login": "ada",
        "user": "ada@uni.example",
        "name": "lab",
        "instance": "8f6c",
        "token": 42,
        "image": "aimehub/pytorch-2.8.0-aime-cuda12.6.3",
        "image_id": "sha256:" + "0" * 64,
        "framework": "Pytorch-2.8.0-aime",
        "architecture": "CUDA_ADA",
        "gpus": ("GPU-1", "MIG-2"),
        "workspace": "/srv/ws/70000",
        "data": "/data/shared",
    }
    return aime.LabelInput(**{**values, **changes})  # type: ignore[arg-type]


def split_as_mlc_does(labels: dict[str, str]) -> dict[str, str]:
    """What `mlc list` does with `docker ls --format '{{json .}}'` (mlc.py 2.2.0, line 1187); ValueError ends it."""
    joined = ",".join(f"{key}={value}" for key, value in labels.items())
    return {key: value for key, value in (pair.split("=", 1) for pair in joined.split(","))}  # noqa: C416 - as there


# --------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("server", "uid", "name"),
    [("", 70000, "main._.70000"), ("lab", 1000, "lab._.1000"), ("A-b_3", 1700000000, "A-b_3._.1700000000")],
)
def test_container_name_and_back(server: str, uid: int, name: str) -> None:
    assert aime.container_name(server, uid) == name
    assert aime.parse_name(name) == (aime.short_name(server), uid)
    assert aime.server_of(name) == server


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_server_names_are_refused(name: str) -> None:
    with pytest.raises(Refusal) as refused:
        aime.container_name(name, 70000)
    assert refused.value.code is Code.BAD_NAME
    assert len(refused.value.message) < 400


def test_a_server_called_main_would_be_the_default_servers_container() -> None:
    with pytest.raises(Refusal, match="default server"):
        aime.container_name("main", 70000)


def test_name_fits_a_tag_exactly() -> None:
    longest = "x" * (128 - 3 - 5)
    assert len(aime.container_name(longest, 70000)) == 128
    with pytest.raises(Refusal):
        aime.container_name(longest + "x", 70000)


@given(st.text(max_size=140), st.integers(1000, 2**31))
def test_any_accepted_name_is_a_docker_name_a_tag_and_maps_back(server: str, uid: int) -> None:
    try:
        name = aime.container_name(server, uid)
    except Refusal:
        return
    assert re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+", name)
    assert re.fullmatch(r"\w[\w.-]{0,127}", name, re.ASCII)
    assert aime.server_of(name) == server
    # The reverse mapping of the real tool (mlc.py, line 506).
    found = re.match(r"^(.*?)(?:\._\.\w+)?$", name)
    assert found is not None and found[1] == aime.short_name(server)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("jupyter-ada", ("jupyter-ada", None)), ("x._.y", ("x", None)), ("x._.٣", ("x", None)), ("", ("", None))],
)
def test_names_of_others_map_to_no_uid(name: str, expected: tuple[str, None]) -> None:
    assert aime.parse_name(name) == expected
    assert aime.server_of(name) is None


# --------------------------------------------------------------------------- images

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("image", "repository"),
    [
        ("img", "img"),
        ("img:1", "img"),
        ("aimehub/pytorch-2.8.0", "aimehub/pytorch-2.8.0"),
        ("rocm/dev-ubuntu-20.04:5.4.2-complete", "rocm/dev-ubuntu-20.04"),
        ("reg:5000/team/img", "reg:5000/team/img"),
        ("reg:5000/team/img:1.2", "reg:5000/team/img"),
        ("reg:5000/img@" + DIGEST, "reg:5000/img"),
        ("reg:5000/team/img:1.2@" + DIGEST, "reg:5000/team/img"),
        (DIGEST, "ds01/image"),
        (DIGEST.removeprefix("sha256:"), "ds01/image"),
    ],
)
def test_trap_private_image_of_references_with_port_tag_and_digest(image: str, repository: str) -> None:
    assert aime.repository(image) == repository
    assert aime.private_image(image, "lab._.70000") == f"{repository}:lab._.70000"
    assert aime.is_private(aime.private_image(image, "lab._.70000"), 70000)


@pytest.mark.parametrize("image", ["", "-v", "a b", "a;b", "//x", "x/", "../x", "a\nb", "x" * 300, "$(id)", "a//b"])
def test_hostile_images_are_refused_or_harmless(image: str) -> None:
    if image == "":
        assert aime.repository(image) == "ds01/image"
        return
    with pytest.raises(Refusal) as refused:
        aime.private_image(image, "lab._.70000")
    assert refused.value.code is Code.IMAGE_NOT_ALLOWED


def test_a_private_tag_belongs_to_one_uid() -> None:
    assert not aime.is_private("img:lab._.70001", 70000)
    assert not aime.is_private("img:lab._.170000", 70000)
    assert not aime.is_private("img:latest", 70000)


def test_kept_tag_fits_and_stays_private() -> None:
    kept = aime.kept_image(f"reg:5000/a:{'x' * 120}._.70000", "20260102T030405Z")
    assert kept.startswith("reg:5000/a:") and len(kept.rpartition(":")[2]) == 128
    assert aime.is_private(aime.kept_image("a:lab._.70000", "20260102T030405Z"), 70000)


def test_kept_tags_of_two_users_never_meet_however_long_the_name_of_the_server() -> None:
    for length in (1, 50, 100, 110, 115, 120):
        mine, theirs = (aime.kept_image(f"a:{'x' * length}._.{uid}", "20260102T030405") for uid in (70000, 70001))
        assert mine != theirs
        assert aime.is_private(mine, 70000) and not aime.is_private(mine, 70001)
    first, second = (aime.kept_image(f"a:{'x' * 115}{end}._.70000", "20260102T030405") for end in "ab")
    assert first != second


# --------------------------------------------------------------------------- labels


def test_labels_of_both_generations() -> None:
    labels = aime.labels(given_labels())
    assert labels["aime.mlc"] == labels["aime.mlc.USER"] == "ada"
    assert labels["aime.mlc.NAME"] == labels["ds01.name"] == "lab"
    assert labels["aime.mlc.MLC_VERSION"] == "4"
    assert labels["aime.mlc.WORK_MOUNT"] == "/srv/ws/70000"
    assert labels["aime.mlc.MODELS_MOUNT"] == labels["ds01.models_mount"] == "-"
    assert labels["ds01.gpus"] == labels["aime.mlc.GPUS"] == "GPU-1;MIG-2"
    assert labels["ds01.managed"] == "true" and labels["ds01.interface"] == "hub"
    assert labels["ds01.token"] == "42"
    assert aime.token_of(labels, "8f6c") == 42
    assert aime.is_ours(labels, "8f6c")


@pytest.mark.parametrize("change", [{"ds01.instance": "other"}, {"ds01.managed": ""}, {"ds01.token": "-1"}])
def test_labels_of_others_have_no_token(change: dict[str, str]) -> None:
    assert aime.token_of(aime.labels(given_labels()) | change, "8f6c") is None


@pytest.mark.parametrize("token", ["", "x", "1.5", "٣", "9" * 30, "1 "])
def test_an_unreadable_token_is_none(token: str) -> None:
    assert aime.token_of(aime.labels(given_labels()) | {"ds01.token": token}, "8f6c") is None


def test_trap_commas_in_labels_would_end_mlc_list_for_everybody() -> None:
    with pytest.raises(ValueError, match="unpack"):
        split_as_mlc_does({"aime.mlc.GPUS": "device=0,1"})
    labels = aime.labels(given_labels(inherited={"maintainer": "A, B", "fine": "a=1,b=2", "plain": "x"}))
    assert labels["maintainer"] == ""
    assert "fine" not in labels and "plain" not in labels
    split_as_mlc_does({"fine": "a=1,b=2", **labels})


def test_inherited_labels_cannot_forge_ours() -> None:
    forged = {"note": "x,aime.mlc.USER=eve", "ds01.token": "7", "ds01.protected": "true", "aime.mlc.FOO": "1"}
    labels = aime.labels(given_labels(inherited=forged))
    assert labels["note"] == labels["ds01.protected"] == labels["aime.mlc.FOO"] == ""
    assert labels["ds01.token"] == "42"
    assert split_as_mlc_does({**forged, **labels})["aime.mlc.USER"] == "ada"


TEXT = st.text(st.characters(codec="utf-8"), max_size=30)


@given(
    TEXT, TEXT, TEXT, st.lists(TEXT, max_size=3), st.dictionaries(st.from_regex(r"[a-z.]{1,10}", fullmatch=True), TEXT)
)
def test_no_label_breaks_the_list_whatever_is_in_it(
    user: str, image: str, folder: str, gpus: list[str], inherited: dict[str, str]
) -> None:
    labels = aime.labels(
        given_labels(user=user, login=user, image=image, workspace=folder, gpus=tuple(gpus), inherited=inherited)
    )
    everything = {**inherited, **labels}
    split = split_as_mlc_does(everything)
    assert split["aime.mlc.NAME"] == "lab"
    assert split["aime.mlc.USER"] == labels["aime.mlc.USER"]
    for key, value in labels.items():
        assert "," not in value, key
        assert not re.search(r"[\x00-\x1f]", value), key


# --------------------------------------------------------------------------- accounts


@pytest.mark.parametrize(
    ("user", "account"),
    [
        ("ada", "ada"),
        ("a_b-c9", "a_b-c9"),
        ("x.y@uni.example", "x_y-70012"),
        ("Ada", "ada-70012"),
        ("root", "root-70012"),
        ("jovyan", "jovyan-70012"),
        ("9lives", "u9lives-70012"),
        ("@dom", "user-70012"),
        ("Zoë", "zo_-70012"),
        ("-x", "u-x-70012"),
        ("a" * 40, "a" * 26 + "-70012"),
        ("x_y-70013", "x_y-70013-70012"),
        ("x_y-70012", "x_y-70012"),
        ("a:b\nroot:x:0:0", "a_b_root_x_0_0-70012"),
    ],
)
def test_account_names(user: str, account: str) -> None:
    assert aime.account_name(user, 70012) == account


@given(st.text(max_size=60), st.integers(1000, 2**31))
def test_any_account_name_is_posix(user: str, uid: int) -> None:
    account = aime.account_name(user, uid)
    assert re.fullmatch(r"[a-z_][a-z0-9_-]{0,31}", account)
    assert account not in aime.SYSTEM_ACCOUNTS


@given(st.lists(st.text("ab.@-_1", min_size=1, max_size=8), min_size=2, max_size=6, unique=True))
def test_different_users_have_different_accounts(users: list[str]) -> None:
    accounts = [aime.account_name(user, 70000 + number) for number, user in enumerate(users)]
    assert len(set(accounts)) == len(accounts)


# --------------------------------------------------------------------------- the tools' own commands


@pytest.fixture
def stopped(engine: Engine, tiny_image: str) -> Iterator[tuple[str, str]]:
    """Name and login of one stopped container with our labels, and a second one whose name contains none of it."""
    uid = 70000 + uuid.uuid4().int % 20000
    login = f"dstest-c1-{uuid.uuid4().hex[:8]}"
    name = aime.container_name("dstest-c1-lab", uid)
    image = engine.image_facts(tiny_image)
    assert image is not None
    private = aime.private_image(tiny_image, name)
    engine.tag(image.id, private)
    labels = aime.labels(given_labels(login=login, name="dstest-c1-lab", inherited=image.labels))
    engine.create(name, {"Image": private, "Labels": labels, "User": f"{uid}:{uid}", "HostConfig": {"Init": True}})
    yield name, login
    engine.remove(name, force=True)
    engine.remove_image(private)


def docker(*words: str) -> str:
    return subprocess.run(["docker", *words], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.docker
def test_every_filter_of_the_tools_finds_the_container(stopped: tuple[str, str], engine: Engine) -> None:
    name, login = stopped
    assert docker("container", "ls", "-a", "--filter", f"label=aime.mlc={login}", "--format", "{{.Names}}") == name
    by_user = docker("container", "ps", "-a", f"--filter=label=aime.mlc.USER={login}", "--format", "{{.Names}}")
    assert by_user == name
    exists = ("--filter", f"name={name}", "--filter", "label=aime.mlc")
    assert docker("container", "ps", "-a", *exists, "--format", "{{.Names}}") == name
    assert docker("container", "ps", "-a", *exists, "--format", "{{.Image}}") == aime.private_image("dstest-tiny", name)
    running = ("container", "ps", f"--filter=name=^/{name}$", "--filter=label=aime.mlc", "--format", "{{.Names}}")
    assert docker(*running) == ""
    engine.start(name)
    assert docker(*running) == name
    assert len(docker("top", name, "-o", "pid").splitlines()) > 2, "one process: `mlc open` would stop it at its end"


@pytest.mark.docker
def test_the_list_of_the_tools_reads_our_labels(stopped: tuple[str, str]) -> None:
    _, login = stopped
    line = docker("container", "ls", "-a", "--filter", f"label=aime.mlc={login}", "--format", "{{json .}}")
    pairs = dict(pair.split("=", 1) for pair in json.loads(line)["Labels"].split(","))
    assert pairs["aime.mlc.USER"] == login
    assert pairs["aime.mlc.NAME"] == "dstest-c1-lab"


@pytest.mark.docker
def test_removing_as_the_tools_do_leaves_the_shared_image(
    stopped: tuple[str, str], engine: Engine, tiny_image: str
) -> None:
    name, _ = stopped
    image = docker("container", "ps", "-a", "--filter", f"name={name}", "--format", "{{.Image}}")
    docker("container", "rm", name)
    docker("image", "rm", image)
    assert engine.image_facts(tiny_image) is not None
