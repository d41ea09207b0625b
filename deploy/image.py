"""Builds the image that the demo and the tests start, without needing a registry.

`python -m deploy.image` prints the image's reference on its last line. The base comes from `docker pull` where that
works, else from `debootstrap` with the mirror of this machine's own apt. The image is the target `jupyter` of
images/Dockerfile; it is built once per recipe (files, version of JupyterHub, certificates) and kept.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, cast

import docker
from docker.errors import APIError, ImageNotFound

from .apt_sources import Source, for_release, read_sources

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = ROOT / "images"
LOGS = ROOT / ".demo"
RECIPE_LABEL = "ds01.recipe"
REPOSITORY = "ds01-demo"
BASE_REPOSITORY = "ds01-base"
PULL_SECONDS = 60
BUILD_SECONDS = 1800
TARGETS = ("framework", "jupyter", "data-science", "full", "use-case")

# Releases with Python >= 3.10, by the codename that /etc/os-release gives; anything else builds on the default.
DEBIAN, UBUNTU = "debian", "ubuntu"
RELEASES = {"bookworm": DEBIAN, "trixie": DEBIAN, "forky": DEBIAN, "jammy": UBUNTU, "noble": UBUNTU, "resolute": UBUNTU}
DEFAULT_RELEASE = "bookworm"
MIRRORS = {DEBIAN: "http://deb.debian.org/debian", UBUNTU: "http://archive.ubuntu.com/ubuntu"}
KEYRINGS = {
    DEBIAN: "/usr/share/keyrings/debian-archive-keyring.gpg",
    UBUNTU: "/usr/share/keyrings/ubuntu-archive-keyring.gpg",
}

CA_BUNDLES = ("PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "CURL_CA_BUNDLE")
"""Environment variables that may name this machine's bundle of certificates, first one wins."""

PASSED_ON = (
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "FTP_PROXY",
    "NO_PROXY",
    "PIP_INDEX_URL",
    "PIP_EXTRA_INDEX_URL",
    "PIP_TRUSTED_HOST",
)
"""Variables of this environment that the build gets, where they are set. Docker keeps the proxies out of an image's
history by itself; the pip ones are used in stages that are left behind."""

_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


class ImageFailed(Exception):
    """The image could not be made; the message says why and where the whole log is."""


@dataclass(frozen=True)
class Recipe:
    """What decides how the image turns out.

    Attributes:
        context: folder for the build, certificates included. target: stage of the Dockerfile.
        hub: major.minor of the Hub. digest: hash of all of it, in the image's tag and label.
    """

    context: Path
    target: str
    hub: str
    digest: str

    @property
    def reference(self) -> str:
        """The image's name and tag."""
        return f"{REPOSITORY}:{self.target}-{self.digest[:12]}"


def say(text: str) -> None:
    """One short line about what happens now (stderr: stdout is for the result)."""
    print(f"· {text}", file=sys.stderr, flush=True)


def ensure_image(*, target: str = "jupyter", hub: str | None = None) -> str:
    """Build the image unless it is there, and return its reference.

    Args:
        target: stage of images/Dockerfile.
        hub: major.minor of the Hub it must fit; default: the installed one's.

    Raises:
        ImageFailed: no base could be made, or the build failed.
    """
    client = docker.APIClient(timeout=BUILD_SECONDS)
    try:
        with prepared(target=target, hub=hub or installed_hub()) as recipe:
            if _exists(client, recipe.reference):
                say(f"image {recipe.reference} is there")
                return recipe.reference
            started = time.monotonic()
            base = ensure_base(client)
            say(f"image {recipe.reference}: building on {base} (a few minutes, once)")
            _build(client, recipe, base)
            say(f"image {recipe.reference}: built in {time.monotonic() - started:.0f} s")
            return recipe.reference
    finally:
        client.close()


def installed_hub() -> str:
    """major.minor of the JupyterHub in this environment."""
    return ".".join(version("jupyterhub").split(".")[:2])


# ------------------------------------------------------------------------------------------------ recipe


@contextmanager
def prepared(*, target: str, hub: str) -> Iterator[Recipe]:
    """The recipe with a build folder that lasts for the block: images/ plus this machine's own certificates."""
    with tempfile.TemporaryDirectory(prefix="ds01-image-") as folder:
        context = Path(folder) / "context"
        shutil.copytree(CONTEXT, context)
        for number, pem in enumerate(own_certificates()):
            (context / "certificates" / f"host-{number:02d}.crt").write_text(pem + "\n")
        yield Recipe(context, target, hub, _digest(context, target, hub))


def own_certificates() -> tuple[str, ...]:
    """Certificates (PEM) that this machine trusts beyond its distribution's: a TLS proxy's, an internal authority's."""
    named = next((path for name in CA_BUNDLES if (path := os.environ.get(name))), "/etc/ssl/certs/ca-certificates.crt")
    files = [Path(named), *sorted(Path("/usr/local/share/ca-certificates").rglob("*.crt"))]
    trusted = dict.fromkeys(pem for path in files if path.is_file() for pem in certificates_in(path))
    distribution = {pem for path in Path("/usr/share/ca-certificates").rglob("*.crt") for pem in certificates_in(path)}
    if not distribution and len(trusted) > 100:  # a whole public bundle without the package that it came from
        return ()
    return tuple(pem for pem in trusted if pem not in distribution)


def certificates_in(path: Path) -> tuple[str, ...]:
    """The PEM blocks of a file, each without what stands around it."""
    return tuple(re.sub(r"\s*\n\s*", "\n", block) for block in _CERTIFICATE.findall(path.read_text(errors="replace")))


def _digest(context: Path, target: str, hub: str) -> str:
    digest = hashlib.sha256(f"{target}\0{hub}\0{platform.machine()}".encode())
    for path in sorted(p for p in context.rglob("*") if p.is_file() and p.suffix != ".md"):
        digest.update(f"\0{path.relative_to(context)}\0{path.stat().st_mode & 0o111:o}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _exists(client: docker.APIClient, reference: str) -> bool:
    try:
        client.inspect_image(reference)  # type: ignore[no-untyped-call]
    except ImageNotFound:
        return False
    return True


# ------------------------------------------------------------------------------------------------ base


def ensure_base(client: docker.APIClient) -> str:
    """Reference of a Debian or Ubuntu base on the local Docker: one made here before, pulled, or debootstrapped."""
    release = host_release()
    local = f"{BASE_REPOSITORY}:{release}"
    if _exists(client, local):
        return local
    public = f"debian:{release}-slim" if RELEASES[release] == DEBIAN else f"ubuntu:{release}"
    if _exists(client, public) or _pulled(public):
        return public
    say(f"no registry answers: making {local} with debootstrap")
    _debootstrap(client, release, local)
    return local


def host_release() -> str:
    """Codename of this machine's release if it is known to have a Python that is new enough, else Debian 12's."""
    text = Path("/etc/os-release").read_text() if Path("/etc/os-release").exists() else ""
    match = re.search(r'^VERSION_CODENAME="?([a-z]+)"?$', text, re.MULTILINE)
    return match[1] if match and match[1] in RELEASES else DEFAULT_RELEASE


def _pulled(reference: str) -> bool:
    """True if the registry gave it within `PULL_SECONDS`. A thread would outlive the wait, a process does not."""
    code = "import sys, docker; docker.APIClient(timeout=600).pull(sys.argv[1])"
    try:
        done = subprocess.run([sys.executable, "-c", code, reference], capture_output=True, timeout=PULL_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def _debootstrap(client: docker.APIClient, release: str, reference: str) -> None:
    family = RELEASES[release]
    sources = for_release(read_sources(), release) or (Source(MIRRORS[family], release, ("main",)),)
    with tempfile.TemporaryDirectory(prefix="ds01-base-", dir="/var/tmp") as folder:
        tree = Path(folder) / "tree"
        keyring = sources[0].signed_by or KEYRINGS[family]
        _logged(
            [
                "debootstrap",
                "--variant=minbase",
                f"--components={','.join(sources[0].components)}",
                f"--keyring={keyring}",
                release,
                str(tree),
                sources[0].uri,
            ],
            LOGS / "debootstrap.log",
        )
        _finish_tree(tree, sources)
        say(f"importing {reference}")
        with tempfile.TemporaryFile(dir="/var/tmp") as packed:
            with tarfile.open(fileobj=packed, mode="w") as archive:
                archive.add(tree, arcname=".", filter=_without_devices)
            packed.seek(0)
            _import(client, packed, reference)


def _finish_tree(tree: Path, sources: tuple[Source, ...]) -> None:
    """Give the base the host's mirrors (with their keys) and drop what an image does not need."""
    for source in sources:
        if source.signed_by and Path(source.signed_by).is_file():
            target = tree / source.signed_by.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.signed_by, target)
    (tree / "etc/apt/sources.list").write_text("".join(f"{source.line()}\n" for source in sources))
    for folder in ("var/cache/apt/archives", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale"):
        shutil.rmtree(tree / folder, ignore_errors=True)
        (tree / folder).mkdir(parents=True)


def _without_devices(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if member.isdev() and not member.isfile() else member


def _import(client: docker.APIClient, packed: IO[bytes], reference: str) -> None:
    name, tag = reference.split(":")
    answer = client.import_image(packed, repository=name, tag=tag)
    if "error" in str(answer):
        raise ImageFailed(f"Docker could not import the base image: {answer}")


# ------------------------------------------------------------------------------------------------ build


def _build(client: docker.APIClient, recipe: Recipe, base: str) -> None:
    LOGS.mkdir(exist_ok=True)
    log = LOGS / "image-build.log"
    arguments = {"BASE_IMAGE": base, "JUPYTERHUB_VERSION": recipe.hub, **_passed_on()}
    failed = ""
    with log.open("w") as lines:
        try:
            steps = client.build(
                path=str(recipe.context),
                tag=recipe.reference,
                target=recipe.target,
                buildargs=arguments,
                labels={RECIPE_LABEL: recipe.digest},
                network_mode="host",
                rm=True,
                forcerm=True,
                decode=True,
            )
            for step in cast("Iterator[dict[str, Any]]", steps):
                lines.write(step.get("stream", ""))
                failed = failed or step.get("error", "")  # read on to the end: a half-read answer keeps its socket
        except APIError as error:
            raise ImageFailed(f"Docker refused the build: {error.explanation or error}") from error
    if failed:
        raise ImageFailed(f"{failed} {_tail(log)}")


def _passed_on() -> dict[str, str]:
    found = {}
    for name in PASSED_ON:
        for spelling in (name, name.lower()):
            if spelling in os.environ:
                found[spelling] = os.environ[spelling]
    return found


def _tail(log: Path) -> str:
    last = log.read_text(errors="replace").splitlines()[-25:]
    return "\n".join([f"(whole log: {log})", *last])


def _logged(command: list[str], log: Path) -> None:
    """Run `command` with its output in `log`.

    Raises:
        ImageFailed: it is not installed, or it failed.
    """
    LOGS.mkdir(exist_ok=True)
    with log.open("wb") as output:
        try:
            subprocess.run(command, check=True, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        except FileNotFoundError as error:
            raise ImageFailed(f"{command[0]} is not installed (apt-get install {command[0]})") from error
        except subprocess.CalledProcessError as error:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise ImageFailed(
                f"{command[0]} failed with exit status {error.returncode} (whole log: {log})\n{tail}"
            ) from error


def main() -> int:
    """Build what the arguments ask for; the last line of stdout is the image's reference."""
    parser = argparse.ArgumentParser(description="Build the image of the demo and the tests.")
    parser.add_argument("--target", choices=TARGETS, default="jupyter", help="stage of images/Dockerfile")
    parser.add_argument("--hub", metavar="MAJOR.MINOR", help="version of JupyterHub; default: the installed one's")
    given = parser.parse_args()
    try:
        print(ensure_image(target=given.target, hub=given.hub))
    except ImageFailed as error:
        print(f"The image could not be built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
