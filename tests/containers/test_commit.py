"""Saving what changed outside the mounts: what is worth it, what must not be in it, and many layers made one."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds01spawner.containers import aime, commit, layers, spec
from ds01spawner.containers.commit import CommittedImage, DiskUse
from ds01spawner.containers.engine import Engine
from ds01spawner.containers.facts import ContainerFacts, ImageFacts
from ds01spawner.errors import Code, EngineError, Refusal
from ds01spawner.model import Resources

# --------------------------------------------------------------------------- what is worth a commit

MOUNTS = ("/workspace", "/home/ada", "/data", "/etc/passwd", "/etc/group")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], ()),
        ([("/opt", 0), ("/opt/new", 1)], ("/opt/new",)),
        ([("/opt", 0), ("/opt/old", 2)], ("/opt/old",)),
        ([("/usr/bin/tool", 0)], ("/usr/bin/tool",)),
        ([("/opt/empty", 1)], ("/opt/empty",)),
        ([("/tmp", 0), ("/tmp/x", 1), ("/run", 0), ("/run/y", 1), ("/var", 0), ("/var/tmp", 0), ("/var/tmp/z", 1)], ()),
        ([("/workspace", 1), ("/home", 0), ("/home/ada", 1), ("/data", 1)], ()),
        ([("/workspace/.cache", 1)], ()),
        ([("/workspaces", 1)], ("/workspaces",)),
        ([("/etc", 0), ("/etc/passwd", 0), ("/etc/hosts", 0), ("/etc/hostname", 0), ("/etc/resolv.conf", 0)], ()),
        ([("/etc", 0), ("/etc/profile", 0)], ("/etc/profile",)),
        ([("/usr", 0), ("/usr/sbin", 0), ("/usr/sbin/docker-init", 1)], ()),
        ([("/sbin", 1), ("/sbin/docker-init", 1), ("/.dockerenv", 1), ("/dev", 0), ("/dev/console", 1)], ()),
        ([("/opt/a", 0), ("/opt/a/__pycache__", 1), ("/opt/a/__pycache__/m.cpython-310.pyc", 1)], ()),
        ([("/tmpfile", 1)], ("/tmpfile",)),
    ],
)
def test_substance(changes: list[tuple[str, int]], expected: tuple[str, ...]) -> None:
    assert commit.substance(changes, MOUNTS) == expected


def test_the_hubs_variables_and_our_labels_do_not_pass_on() -> None:
    config = {
        "Env": ["PATH=/bin", "JUPYTERHUB_API_TOKEN=s3cret", "JPY_API_TOKEN=s3cret", "JUPYTERHUB_USER=ada"],
        "Labels": {"ds01.token": "3", "aime.mlc.USER": "ada", "aime.mlc": "ada", "maintainer": "x"},
        "Cmd": ["run"],
    }
    assert commit.scrubbed(config) == {"Env": ["PATH=/bin"], "Labels": {"maintainer": "x"}, "Cmd": ["run"]}
    assert commit.scrubbed({}) == {"Env": [], "Labels": {}}


def test_dockers_own_commit_is_told_to_blank_everything_that_is_not_the_images() -> None:
    env = ["PATH=/bin", "JUPYTERHUB_API_TOKEN=s3cret"]
    image = ImageFacts("sha256:1", config={"Env": env, "Labels": {"a": "1"}, "Cmd": ["run"], "User": ""})
    container = ContainerFacts(
        "c", env={"PATH": "/x", "JUPYTERHUB_API_TOKEN": "s3cret", "MINE": "1"}, labels={"a": "1", "ds01.token": "3"}
    )
    told = commit.blanked(container, image)
    assert told["Env"] == ["PATH=/bin", "JUPYTERHUB_API_TOKEN=", "MINE="]
    assert told["Labels"] == {"a": "1", "ds01.token": ""}
    assert told["User"] == "0" and told["Cmd"] == ["run"]
    assert "s3cret" not in json.dumps(told)


@pytest.mark.parametrize(("limit", "refused"), [(None, False), (100, False), (99, True), (0, True)])
def test_max_container_disk_counts_what_was_committed_before(limit: int | None, refused: bool) -> None:
    use = DiskUse(written=60, committed=40)
    if not refused:
        commit.require_room(use, limit, "lab._.70000")
        return
    with pytest.raises(Refusal) as refusal:
        commit.require_room(use, limit, "lab._.70000")
    assert refusal.value.code is Code.DISK_FULL
    assert refusal.value.facts == {"size": 100, "written": 60, "committed": 40, "limit": limit}


def test_layers_above_the_base() -> None:
    base = ImageFacts("b", layers=("1", "2"))
    assert commit.above(ImageFacts("x", layers=("1", "2", "3")), base) == 1
    assert commit.above(base, base) == 0
    assert commit.above(ImageFacts("x", layers=("1", "9", "3")), base) is None
    assert commit.above(ImageFacts("x", layers=("1",)), base) is None
    assert commit.above(base, None) is None


# --------------------------------------------------------------------------- merging layers

Tree = dict[str, "str | None"]
"""A file system: content by path, None for a folder."""
Entry = tuple[str, "str | None"]


def tar_of(entries: Sequence[Entry], path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in entries:
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(member)
            else:
                member.size = len(content.encode())
                tar.addfile(member, io.BytesIO(content.encode()))
    return path


def entries_of(path: Path) -> list[Entry]:
    with tarfile.open(path) as tar:
        return [(m.name, None if m.isdir() else (tar.extractfile(m) or io.BytesIO()).read().decode()) for m in tar]


def below(path: str, folder: str) -> bool:
    return path.startswith(folder + "/") if folder else True


def apply(tree: Tree, entries: Sequence[Entry]) -> Tree:
    """What an engine makes of a layer: whiteouts and opaque folders act on what lies below; the rest is laid on."""
    found = dict(tree)
    for name, _ in entries:
        folder, _, last = name.rpartition("/")
        if last == ".wh..wh..opq":
            found = {p: c for p, c in found.items() if not below(p, folder)}
        elif last.startswith(".wh."):
            gone = f"{folder}/{last[4:]}".lstrip("/")
            found = {p: c for p, c in found.items() if p != gone and not below(p, gone)}
    for name, content in entries:
        if name.rpartition("/")[2].startswith(".wh."):
            continue
        if content is not None or found.get(name, "") is not None:
            found = {p: c for p, c in found.items() if p != name and not below(p, name)}
        found[name] = content
    return found


def merged(stack: Sequence[Sequence[Entry]], folder: Path) -> list[Entry]:
    files = [tar_of(entries, folder / f"{number}.tar") for number, entries in enumerate(stack)]
    out = folder / "merged.tar"
    with out.open("wb") as target:
        digest = layers.merge(files, target)
    assert digest == "sha256:" + hashlib.sha256(out.read_bytes()).hexdigest()
    return entries_of(out)


CASES: list[tuple[str, list[list[Entry]], list[Entry]]] = [
    ("later content wins", [[("a", "1")], [("a", "2")]], [("a", "2")]),
    ("a deletion stays for the base", [[(".wh.a", "")]], [(".wh.a", "")]),
    ("made, then deleted", [[("a", "1")], [(".wh.a", "")]], [(".wh.a", "")]),
    ("deleted, then made", [[(".wh.a", "")], [("a", "2")]], [("a", "2")]),
    ("folder deleted", [[("d", None), ("d/x", "1")], [(".wh.d", "")]], [(".wh.d", "")]),
    (
        "deleted and made anew as a folder must hide the base's",
        [[(".wh.d", "")], [("d", None), ("d/y", "1")]],
        [("d", None), ("d/.wh..wh..opq", ""), ("d/y", "1")],
    ),
    (
        "opaque above hides what is below it",
        [[("d", None), ("d/x", "1")], [("d", None), ("d/.wh..wh..opq", ""), ("d/y", "2")]],
        [("d", None), ("d/.wh..wh..opq", ""), ("d/y", "2")],
    ),
    (
        "opaque below stays, with what came later",
        [[("d", None), ("d/.wh..wh..opq", ""), ("d/x", "1")], [("d", None), ("d/y", "2")]],
        [("d", None), ("d/.wh..wh..opq", ""), ("d/x", "1"), ("d/y", "2")],
    ),
    ("file over folder", [[("d", None), ("d/x", "1")], [("d", "file")]], [("d", "file")]),
    (
        "folder over file must hide a folder of the base",
        [[("d", "file")], [("d", None), ("d/x", "1")]],
        [("d", None), ("d/.wh..wh..opq", ""), ("d/x", "1")],
    ),
    (
        "deletions below a deleted folder say nothing",
        [[("d", None), ("d/.wh.x", "")], [(".wh.d", "")]],
        [(".wh.d", "")],
    ),
]


@pytest.mark.parametrize(("stack", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_merge(stack: list[list[Entry]], expected: list[Entry], tmp_path: Path) -> None:
    assert merged(stack, tmp_path) == expected


NAMES = st.sampled_from(["a", "b"])
STEPS = st.lists(
    st.tuples(st.sampled_from(["file", "folder", "delete", "remake"]), st.lists(NAMES, min_size=1, max_size=3)),
    max_size=4,
)


def step(tree: Tree, kind: str, path: str) -> Tree:
    """One change of a file system, folders on the way made; impossible ones change nothing."""
    parent = path.rpartition("/")[0]
    if parent and kind != "delete":
        tree = step(tree, "folder", parent)
        if tree.get(parent, "") is not None:
            return tree
    without = {p: c for p, c in tree.items() if p != path and not below(p, path)}
    if kind == "delete":
        return without
    if kind == "file":
        return {**without, path: f"{len(tree)}"}
    if kind == "folder" and path in tree:
        return tree
    return {**without, path: None}


def difference(old: Tree, new: Tree, remade: set[str]) -> list[Entry]:
    """A layer that leads from `old` to `new`: remade folders as overlay file systems tell them, the rest naively."""
    entries: list[Entry] = []
    for path in sorted(new):
        opaque = path in remade and new[path] is None
        within = any(below(path, folder) for folder in remade)
        if opaque or within or path not in old or old[path] != new[path]:
            entries.append((path, new[path]))
        if opaque:
            entries.append((f"{path}/.wh..wh..opq", ""))
    for path in sorted(set(old) - set(new)):
        parent, _, name = path.rpartition("/")
        if (not parent or new.get(parent, "") is None) and not any(below(path, folder) for folder in remade):
            entries.append((f"{parent}/.wh.{name}".lstrip("/"), ""))
    return entries


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(base=STEPS, stack=st.lists(STEPS, min_size=1, max_size=4))
def test_one_merged_layer_does_what_all_of_them_do(
    base: list[tuple[str, list[str]]], stack: list[list[tuple[str, list[str]]]], tmp_path: Path
) -> None:
    tree: Tree = {}
    for kind, names in base:
        tree = step(tree, kind, "/".join(names))
    start = tree
    told: list[list[Entry]] = []
    for steps in stack:
        before, remade = tree, set()
        for kind, names in steps:
            path = "/".join(names)
            after = step(tree, kind, path)
            if kind == "remake" and after.get(path, "") is None and before.get(path, "") is None and after != tree:
                remade.add(path)
            tree = after
        remade = {path for path in remade if tree.get(path, "") is None}
        told.append(difference(before, tree, remade))
        assert apply(before, told[-1]) == tree
    assert apply(start, merged(told, tmp_path)) == tree


def test_hard_links_survive_and_a_replaced_target_lives_on(tmp_path: Path) -> None:
    lower, upper = tmp_path / "lower.tar", tmp_path / "upper.tar"
    with tarfile.open(lower, "w") as tar:
        member = tarfile.TarInfo("one")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"old"))
        for name in ("three", "two"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.LNKTYPE, "one"
            tar.addfile(link)
    tar_of([("one", "new"), ("x", "1")], upper)
    with (tmp_path / "out.tar").open("wb") as out:
        layers.merge([lower, upper], out)
    with tarfile.open(tmp_path / "out.tar") as tar:
        kinds = {m.name: (m.type, m.linkname) for m in tar}
        assert kinds["three"] == (tarfile.REGTYPE, "") and kinds["two"] == (tarfile.LNKTYPE, "three")
        read = {name: (tar.extractfile(name) or io.BytesIO()).read() for name in ("one", "two", "three")}
    assert read == {"one": b"new", "two": b"old", "three": b"old"}
    with (tmp_path / "same.tar").open("wb") as out:
        layers.merge([lower], out)
    with tarfile.open(tmp_path / "same.tar") as tar:
        assert [m.linkname for m in tar if m.islnk()] == ["one", "one"]


def test_owners_modes_links_and_attributes_survive(tmp_path: Path) -> None:
    lower = tmp_path / "lower.tar"
    long = "d/" + "x" * 200
    with tarfile.open(lower, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("d"))
        member = tarfile.TarInfo(long)
        member.uid, member.gid, member.mode, member.mtime = 70000, 70001, 0o2750, 1_700_000_000
        member.pax_headers = {"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\udcff"}
        tar.addfile(member)
        link = tarfile.TarInfo("d/l")
        link.type, link.linkname = tarfile.SYMTYPE, "../else"
        tar.addfile(link)
        node = tarfile.TarInfo("d/n")
        node.type, node.devmajor, node.devminor = tarfile.CHRTYPE, 1, 3
        tar.addfile(node)
    with (tmp_path / "out.tar").open("wb") as out:
        layers.merge([lower], out)
    with tarfile.open(tmp_path / "out.tar") as tar:
        member = tar.getmember(long)
        assert (member.uid, member.gid, member.mode, member.mtime) == (70000, 70001, 0o2750, 1_700_000_000)
        assert member.pax_headers["SCHILY.xattr.security.capability"] == "\x01\x00\x00\x02\udcff"
        assert tar.getmember("d/l").linkname == "../else"
        assert (tar.getmember("d/n").devmajor, tar.getmember("d/n").devminor) == (1, 3)


def test_what_passes_is_left_out(tmp_path: Path) -> None:
    layer = tar_of([("tmp", None), ("tmp/junk", "1"), ("opt", None), ("opt/keep", "1")], tmp_path / "l.tar")
    with (tmp_path / "out.tar").open("wb") as out:
        layers.merge([layer], out, commit.passing)
    assert [name for name, _ in entries_of(tmp_path / "out.tar")] == ["opt", "opt/keep"]


# --------------------------------------------------------------------------- archives


def save_archive(contents: Mapping[str, bytes]) -> Iterator[bytes]:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    data = buffer.getvalue()
    yield from (data[at : at + 700] for at in range(0, len(data), 700))


@pytest.mark.parametrize("form", ["{own}/layer.tar", "blobs/sha256/{digest}"])
def test_wanted_layers_of_an_archive(form: str, tmp_path: Path) -> None:
    contents = [b"base" * 500, b"one" * 900, b"two"]
    digests = [hashlib.sha256(content).hexdigest() for content in contents]
    names = [form.format(own=f"id{n}", digest=digest) for n, digest in enumerate(digests)]
    archive = {**dict(zip(names, contents, strict=True)), "manifest.json": b"[]"}
    wanted = [f"sha256:{digest}" for digest in digests[1:]]
    found = layers.unpack(save_archive(archive), [*wanted, "sha256:missing"], tmp_path)
    assert {diff: path.read_bytes() for diff, path in found.items()} == dict(zip(wanted, contents[1:], strict=True))
    assert len(list(tmp_path.iterdir())) == 2, "the base's layers leave nothing behind"


def test_a_packed_archive_is_what_docker_load_takes(tmp_path: Path) -> None:
    layer = tmp_path / "new.tar"
    layer.write_bytes(b"x" * 5000)
    draft = layers.ImageDraft(
        "r:1", {"Env": ["A=1"]}, ("sha256:b", "sha256:n"), ("base", "mine"), "2026-01-02T03:04:05Z"
    )
    data = b"".join(layers.pack(draft, {"sha256:n": layer}))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        names = tar.getnames()
        manifest = json.loads((tar.extractfile("manifest.json") or io.BytesIO()).read())
        document = (tar.extractfile(manifest[0]["Config"]) or io.BytesIO()).read()
    assert names == ["n/layer.tar", manifest[0]["Config"], "manifest.json"]
    assert manifest[0]["RepoTags"] == ["r:1"] and manifest[0]["Layers"] == ["b/layer.tar", "n/layer.tar"]
    assert draft.image_id == "sha256:" + hashlib.sha256(document).hexdigest()
    content = json.loads(document)
    assert content["rootfs"]["diff_ids"] == ["sha256:b", "sha256:n"] and len(content["history"]) == 2


# --------------------------------------------------------------------------- the real engine

SECRET = "s3cret-t0k3n"


class Lab:
    """One user's container over several starts."""

    def __init__(self, engine: Engine, base: str, tmp: Path) -> None:
        facts = engine.image_facts(base)
        assert facts is not None
        self.engine, self.base, self.base_facts, self.tmp = engine, base, facts, tmp
        self.uid = 70000 + uuid.uuid4().int % 20000
        self.name = f"dstest-c1-{uuid.uuid4().hex[:6]}._.{self.uid}"
        self.target = aime.private_image(base, self.name)
        engine.tag(facts.id, self.target)
        self.seen: set[str] = set()

    def run(self, script: str) -> str:
        """A new container from the private image, in which `script` runs to its end; what it printed."""
        image = self.engine.image_facts(self.target)
        assert image is not None
        self.seen.add(image.id)
        given = spec.SpecInput(
            name=self.name,
            image=self.target,
            base_image=self.base,
            base_image_id=self.base_facts.id,
            command=("sh", "-c", script),
            env={"JUPYTERHUB_API_TOKEN": SECRET, "MY_KEY": SECRET, "HOME": "/tmp"},
            labels=aime.labels(
                aime.LabelInput("ada", "ada", "lab", "i", 3, self.base, self.base_facts.id, inherited=image.labels)
            ),
            uid=self.uid,
            gid=self.uid,
            resources=Resources(None, None, None, None, None),
            mounts=(spec.Bind(str(self.tmp), "/workspace"),),
        )
        made = spec.build(given)
        self.engine.remove(self.name, force=True)
        self.engine.create(made.name, made.config)
        self.engine.start(self.name)
        assert self.engine.wait(self.name, timeout=30) == 0
        return self.engine.logs(self.name)

    @property
    def facts(self) -> ContainerFacts:
        found = self.engine.inspect_facts(self.name)
        assert found is not None
        return found

    def commit(self, **rest: int) -> CommittedImage | None:
        saved = commit.commit(
            self.engine, self.facts, target=self.target, base_image=self.base, workdir=self.tmp, **rest
        )
        if saved is not None:
            self.seen |= {saved.image_id, *saved.superseded}
        return saved

    def clean(self) -> None:
        self.engine.remove(self.name, force=True)
        self.engine.remove_image(self.target)
        for image in self.seen - {self.base_facts.id}:
            self.engine.remove_image(image)


@pytest.fixture
def lab(engine: Engine, tiny_image: str, tmp_path: Path) -> Iterator[Lab]:
    tmp_path.chmod(0o777)
    lab = Lab(engine, tiny_image, tmp_path)
    yield lab
    lab.clean()


@pytest.mark.docker
def test_nothing_of_substance_is_not_committed(lab: Lab) -> None:
    lab.run("echo x > /tmp/x; echo y > /workspace/y; echo z > /var/tmp/z")
    assert lab.commit() is None
    image = lab.engine.image_facts(lab.target)
    assert image is not None and image.id == lab.base_facts.id


@pytest.mark.docker
def test_changes_go_on_and_no_secret_does(lab: Lab) -> None:
    lab.run("echo 12345 > /opt/user/mine; mkdir /opt/user/d")
    saved = lab.commit()
    assert saved is not None
    assert (saved.ref, saved.base, saved.layers, saved.size) == (lab.target, lab.base, 1, 6)
    assert saved.superseded == (), "the base is not ours to delete"
    image = lab.engine.image_facts(lab.target)
    assert image is not None and image.id == saved.image_id
    assert image.env == lab.base_facts.env and image.labels == lab.base_facts.labels
    assert (image.user, image.cmd, image.working_dir) == (lab.base_facts.user, lab.base_facts.cmd, "")
    assert lab.run("cat /opt/user/mine") == "12345\n"
    config_and_layers = b"".join(lab.engine.save(saved.image_id))
    assert SECRET.encode() not in config_and_layers
    assert SECRET not in json.dumps(lab.engine.client.inspect_image(saved.image_id))
    assert SECRET not in json.dumps(lab.engine.client.history(saved.image_id))


@pytest.mark.docker
def test_trap_dockers_own_commit_would_keep_the_token(lab: Lab) -> None:
    """Why the image is written anew: engines before 25 keep the container's environment in the image."""
    lab.run("echo 1 > /opt/user/x")
    raw = lab.engine.commit(lab.name, commit.blanked(lab.facts, lab.base_facts))
    lab.seen.add(raw)
    told = json.dumps(lab.engine.client.inspect_image(raw))
    if "ContainerConfig" in told and lab.engine.info().api_version < (1, 44):
        assert SECRET in told


@pytest.mark.docker
def test_the_temporary_image_of_a_commit_does_not_stay(lab: Lab) -> None:
    before = {row["Id"] for row in lab.engine.client.images(all=True)}
    lab.run("echo 1 > /opt/user/x")
    saved = lab.commit()
    assert saved is not None
    new = {row["Id"] for row in lab.engine.client.images(all=True)} - before
    mine = {i for i in new if _is_of(lab, i)}
    assert mine == {saved.image_id}


def _is_of(lab: Lab, image: str) -> bool:
    facts = lab.engine.image_facts(image)
    return facts is not None and facts.layers[:1] == lab.base_facts.layers[:1] and len(facts.layers) > 1


@pytest.mark.docker
def test_a_commit_above_the_disk_limit_is_refused_and_changes_nothing(lab: Lab) -> None:
    lab.run("dd if=/dev/zero of=/opt/user/big bs=1024 count=100 2>/dev/null")
    with pytest.raises(Refusal) as refused:
        lab.commit(max_bytes=100 * 1024 - 1)
    assert refused.value.code is Code.DISK_FULL and refused.value.facts["written"] == 100 * 1024
    image = lab.engine.image_facts(lab.target)
    assert image is not None and image.id == lab.base_facts.id
    assert lab.commit(max_bytes=100 * 1024) is not None
    lab.run("dd if=/dev/zero of=/opt/user/more bs=1024 count=1 2>/dev/null")
    assert commit.disk_use(lab.engine, lab.facts, lab.base) == DiskUse(1024, 100 * 1024)
    with pytest.raises(Refusal):
        lab.commit(max_bytes=100 * 1024)


@pytest.mark.docker
def test_many_layers_become_one_that_does_the_same(lab: Lab) -> None:
    lab.run("cd /opt/user; echo 1 > one; mkdir d; echo x > d/x; ln one two; echo gone > gone; echo junk > /tmp/junk")
    first = lab.commit(rebase_at=3)
    lab.run("cd /opt/user; rm gone; rm -r d; mkdir d; echo y > d/y; echo 2 > one")
    second = lab.commit(rebase_at=3)
    assert first is not None and second is not None
    assert (first.layers, second.layers, second.superseded) == (1, 2, (first.image_id,))
    lab.run("cd /opt/user; ln -s d/y link; chmod 700 d; echo 3 > three")
    third = lab.commit(rebase_at=3)
    assert third is not None and third.note == ""
    assert third.layers == 1
    image = lab.engine.image_facts(lab.target)
    assert image is not None and image.id == third.image_id
    assert len(image.layers) == len(lab.base_facts.layers) + 1
    assert image.layers[: len(lab.base_facts.layers)] == lab.base_facts.layers
    seen = lab.run("cd /opt/user; for f in *; do echo $f; done; cat one two three link; ls /tmp; stat -c %a:%u d")
    assert seen.split() == ["d", "link", "one", "three", "two", "2", "1", "3", "y", f"700:{lab.uid}"]
    lab.engine.remove(lab.name)
    commit.discard(lab.engine, [*second.superseded, *third.superseded])
    assert [lab.engine.image_facts(i) for i in (*second.superseded, *third.superseded)] == [None] * 3
    assert lab.engine.image_facts(lab.target) is not None


@pytest.mark.docker
def test_a_failing_rebase_keeps_the_changes(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.run("echo 1 > /opt/user/x")

    def fails(image: str) -> Iterator[bytes]:
        raise EngineError("no space left")

    monkeypatch.setattr(lab.engine, "save", fails)
    saved = lab.commit(rebase_at=1)
    assert saved is not None and "no space left" in saved.note and saved.layers == 1
    monkeypatch.undo()
    assert lab.run("cat /opt/user/x") == "1\n"


@pytest.mark.docker
def test_discard_leaves_what_has_a_name(lab: Lab) -> None:
    commit.discard(lab.engine, [lab.base_facts.id, "sha256:" + "0" * 64])
    assert lab.engine.image_facts(lab.base) is not None


@pytest.mark.docker
def test_an_image_that_is_gone_is_told(lab: Lab) -> None:
    lab.run("echo 1 > /opt/user/x")
    with pytest.raises(EngineError, match="gone"):
        commit.commit(
            lab.engine, replace(lab.facts, image_id="sha256:" + "0" * 64), target=lab.target, base_image=lab.base
        )


def test_times_are_told_in_utc() -> None:
    assert commit._stamp(datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)) == "2026-01-02T03:04:05Z"
