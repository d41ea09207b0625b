"""AIME's conventions, so that the `mlc` tools and ours work on each other's containers. Pure.

Names, private image tags, labels, account names. The fifteen conditions that a container must meet, with what was
verified against the real tools, are in docs/architecture.md, "AIME conventions"; numbers in comments are theirs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ds01spawner.errors import Code, Refusal
from ds01spawner.model import DEFAULT_SERVER

DEFAULT_NAME = DEFAULT_SERVER
"""What the Hub's unnamed server is called in container names."""
SEPARATOR = "._."
MAX_TAG = 128
"""Most characters of a Docker tag; the container's name is one (condition 1)."""
MLC_VERSION = "4"
"""Version of AIME's container schema that we follow."""
NO_MOUNT = "-"

# Our own labels: an echo for tools, never an authority (design, point 6).
LABEL_MANAGED = "ds01.managed"
LABEL_INTERFACE = "ds01.interface"
LABEL_INSTANCE = "ds01.instance"
LABEL_TOKEN = "ds01.token"  # noqa: S105 - a fencing number, not a secret
LABEL_USER = "ds01.user"
LABEL_NAME = "ds01.name"
LABEL_GPUS = "ds01.gpus"
LABEL_FRAMEWORK = "ds01.framework"
LABEL_IMAGE = "ds01.image"
LABEL_IMAGE_ID = "ds01.image_id"
LABEL_SPEC = "ds01.spec"
LABEL_WORK = "ds01.work_mount"
LABEL_DATA = "ds01.data_mount"
LABEL_MODELS = "ds01.models_mount"
LABEL_ARCH = "ds01.arch"
LABEL_PROBE = "ds01.probe"
"""Marks a never-started container that is only there to read a file from its image."""
INTERFACE = "hub"
PROBE_LABELS: Mapping[str, str] = dict.fromkeys((LABEL_MANAGED, LABEL_INTERFACE, LABEL_INSTANCE, LABEL_TOKEN), "")
"""For a probe: an image's own labels must not make it look like a server of ours."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_TAGGED = re.compile(r"(?P<name>.*?)(?:\._\.(?P<uid>\w+))?", re.DOTALL)
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:-]*")
_ACCOUNT = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
MAX_ACCOUNT = 32
_DAEMONS = frozenset({"root", "daemon", "bin", "sys", "sync", "man", "lp", "mail", "news", "uucp", "proxy", "www-data"})
_SERVICES = frozenset({"games", "backup", "list", "irc", "gnats", "nobody", "_apt", "sshd", "messagebus", "polkitd"})
_GROUPS = frozenset({"adm", "tty", "disk", "kmem", "shadow", "sudo", "video", "render", "docker", "staff", "users"})
SYSTEM_ACCOUNTS = _DAEMONS | _SERVICES | _GROUPS | {"nogroup", "ubuntu", "jovyan"}
"""Names that images bring themselves; a Hub user of that name gets another account name inside the container."""


# --------------------------------------------------------------------------- names


def short_name(server_name: str) -> str:
    """The `<name>` of `<name>._.<uid>`: the server's name; the default server is `main`."""
    return server_name or DEFAULT_NAME


def container_name(server_name: str, uid: int) -> str:
    """Docker name of a server's container, `<name>._.<uid>` (condition 1).

    Raises:
        Refusal: bad_name, when Docker or the AIME tools could not work with the name.
    """
    name = short_name(server_name)
    room = MAX_TAG - len(SEPARATOR) - len(str(uid))
    if server_name == DEFAULT_NAME:
        raise Refusal(
            Code.BAD_NAME,
            f"A server cannot be called {DEFAULT_NAME!r}: that is the name of your default server's container. "
            "Choose another name, or use the default server.",
            facts={"name": name},
        )
    if not _NAME.fullmatch(name) or len(name) > room:
        raise Refusal(
            Code.BAD_NAME,
            f"A server cannot be called {_shown(name)}: use letters, digits, '-' and '_', beginning with a letter or "
            f"digit, at most {room} characters.",
            facts={"name": name[:200], "max_length": room},
        )
    return f"{name}{SEPARATOR}{uid}"


def parse_name(container: str) -> tuple[str, int | None]:
    """Reverse of `container_name`: `x._.1000` → (`x`, 1000); a name of another form → (itself, None)."""
    match = _TAGGED.fullmatch(container)
    if match is None or match["uid"] is None:
        return container, None
    return match["name"], int(match["uid"]) if match["uid"].isascii() and match["uid"].isdigit() else None


def server_of(container: str) -> str | None:
    """The Hub server name that a container name stands for ("" = default server); None if it is of another form."""
    name, uid = parse_name(container)
    if uid is None or not _NAME.fullmatch(name):
        return None
    return "" if name == DEFAULT_NAME else name


def _shown(name: str) -> str:
    return repr(name if len(name) <= 40 else name[:40] + "…")


# --------------------------------------------------------------------------- images


def repository(image: str) -> str:
    """The repository part of an image reference: without tag and digest, with the registry and its port.

    `reg:5000/a/b:1@sha256:…` → `reg:5000/a/b`; `reg:5000/a/b` → itself: a colon before a slash is a port.
    An image id (`sha256:…` or bare hexadecimal) has no repository and gives `ds01/image`.
    """
    bare = image.partition("@")[0]
    if re.fullmatch(r"(sha256:)?[0-9a-f]{64}", bare) or not bare:
        return "ds01/image"
    head, slash, last = bare.rpartition("/")
    return head + slash + last.partition(":")[0]


def private_image(image: str, container: str) -> str:
    """The tag that belongs to one container alone, `<repository>:<name>._.<uid>` (condition 9).

    `mlc remove` runs `docker image rm` on what the container names: a private tag is only untagged, a shared one
    would be lost for everybody. Also where a container's own changes are committed to.

    Raises:
        Refusal: image_not_allowed, when `image` is no reference that Docker could tag.
    """
    repo = repository(image)
    if not _REPOSITORY.fullmatch(repo) or len(repo) > 255 or "//" in repo or repo.endswith(("/", ":")):
        raise Refusal(Code.IMAGE_NOT_ALLOWED, f"{_shown(image)} is no image reference.", facts={"image": image[:200]})
    return f"{repo}:{container}"


def kept_image(private: str, stamp: str) -> str:
    """Where an older commit goes when its container moves to a new image: `<private tag>-<stamp>`.

    Of a tag that grows too long only the server's name is cut, and marked by a hash: without the uid behind it, two
    users' servers of one long name would share a tag, and one would start what the other saved.

    Args:
        private: the private tag. stamp: what tells it from others, such as `20260102T030405`.
    """
    repo, _, tag = private.rpartition(":")
    name, separator, uid = tag.rpartition(SEPARATOR)
    end = f"{separator}{uid}-{stamp}"
    if len(name) + len(end) > MAX_TAG:
        mark = hashlib.sha256(name.encode()).hexdigest()[:8]
        name = f"{name[: MAX_TAG - len(end) - len(mark) - 1]}-{mark}"
    return f"{repo}:{name}{end}"


def is_private(image: str, uid: int) -> bool:
    """True if `image` is a private or kept tag of that uid's containers."""
    tag = image.rpartition(":")[2]
    return re.fullmatch(rf"[A-Za-z0-9][A-Za-z0-9_-]*\._\.{uid}(-[0-9TZ]+)?", tag) is not None


# --------------------------------------------------------------------------- labels


@dataclass(frozen=True)
class LabelInput:
    """What the labels tell. Host folders are None where nothing is mounted there.

    Attributes:
        login: the name that the AIME tools compare with `os.getlogin()`: the Unix account's where there is one
            (condition 2). user: the Hub user.
        image, image_id: the policy's image that this container goes back to (not its private tag).
    """

    login: str
    user: str
    name: str
    instance: str
    token: int
    image: str
    image_id: str = ""
    framework: str = ""
    architecture: str = ""
    gpus: tuple[str, ...] = ()
    workspace: str | None = None
    data: str | None = None
    models: str | None = None
    inherited: Mapping[str, str] = field(default_factory=dict)


def clean(value: str) -> str:
    """`value` as a label that the AIME tools can read: no comma (condition 5), no control character."""
    return _CONTROL.sub(" ", value.replace(",", ";"))


def labels(given: LabelInput) -> dict[str, str]:
    """All labels of one container: AIME's, ours, and blanks over inherited ones that would break `mlc list`."""
    gpus = ";".join(given.gpus)
    own = {
        "aime.mlc": given.login,
        "aime.mlc.USER": given.login,
        "aime.mlc.NAME": given.name,
        "aime.mlc.ARCH": given.architecture,
        "aime.mlc.MLC_VERSION": MLC_VERSION,
        "aime.mlc.WORK_MOUNT": given.workspace or NO_MOUNT,
        "aime.mlc.DATA_MOUNT": given.data or NO_MOUNT,
        "aime.mlc.MODELS_MOUNT": given.models or NO_MOUNT,
        "aime.mlc.FRAMEWORK": given.framework,
        "aime.mlc.GPUS": gpus,
        LABEL_MANAGED: "true",
        LABEL_INTERFACE: INTERFACE,
        LABEL_INSTANCE: given.instance,
        LABEL_TOKEN: str(given.token),
        LABEL_USER: given.user,
        LABEL_NAME: given.name,
        LABEL_GPUS: gpus,
        LABEL_FRAMEWORK: given.framework,
        LABEL_IMAGE: given.image,
        LABEL_IMAGE_ID: given.image_id,
        LABEL_ARCH: given.architecture,
        LABEL_WORK: given.workspace or NO_MOUNT,
        LABEL_DATA: given.data or NO_MOUNT,
        LABEL_MODELS: given.models or NO_MOUNT,
    }
    return blanked(given.inherited) | {key: clean(value) for key, value in own.items()}


def blanked(inherited: Mapping[str, str]) -> dict[str, str]:
    """The labels of an image that a container must not inherit, set to "".

    `mlc list` splits all labels at commas and each piece at its first `=`: a piece without one ends the list with
    an error for everybody. A piece that looks like one of AIME's or our own labels would forge it, and an image
    made from one of our containers by other means may still carry our labels.
    """
    return {key: "" for key, value in inherited.items() if value and (_offends(value) or _ours(key))}


def _offends(value: str) -> bool:
    return any("=" not in piece or _ours(piece.partition("=")[0]) for piece in value.split(",")[1:])


def _ours(key: str) -> bool:
    return key.strip().startswith(("aime.mlc", "ds01."))


def token_of(labels_of_container: Mapping[str, str], instance: str) -> int | None:
    """The fencing token in the labels, if they are of that installation; None otherwise or if unreadable."""
    if labels_of_container.get(LABEL_MANAGED) != "true" or labels_of_container.get(LABEL_INSTANCE) != instance:
        return None
    text = labels_of_container.get(LABEL_TOKEN, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


def is_ours(labels_of_container: Mapping[str, str], instance: str) -> bool:
    """True if the labels say that this installation made the container (condition 11: never touch another)."""
    return (
        labels_of_container.get(LABEL_MANAGED) == "true"
        and labels_of_container.get(LABEL_INTERFACE) == INTERFACE
        and labels_of_container.get(LABEL_INSTANCE) == instance
    )


# --------------------------------------------------------------------------- accounts


def account_name(user: str, uid: int) -> str:
    """Name of a Hub user in the container's passwd file: POSIX, at most 32 characters, never a system account's.

    A name that fits is kept. Any other (`x.y@uni.example`, Unicode, `root`) is cut at `@`, its odd characters
    become `_`, and `-<uid>` makes it unique: `x_y-70012`.
    """
    suffix = f"-{uid}"
    # A name that ends like a made-up one could be somebody else's made-up name.
    borrowed = re.search(r"-\d+$", user) is not None and not user.endswith(suffix)
    if _ACCOUNT.fullmatch(user) and user not in SYSTEM_ACCOUNTS and not borrowed:
        return user
    stem = re.sub(r"[^a-z0-9_-]", "_", user.partition("@")[0].lower())
    if not re.match(r"[a-z_]", stem):
        stem = f"u{stem}" if stem else "user"
    return stem[: MAX_ACCOUNT - len(suffix)] + suffix
