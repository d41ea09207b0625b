"""A Docker image without any registry: busybox from the host, imported as one layer."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

from ds01spawner.containers.engine import Engine

TINY_TAG = "dstest-tiny:2"
APPLETS = ("sh", "bash", "sleep", "cat", "ls", "mkdir", "rm", "rmdir", "mv", "ln", "id", "env", "touch", "chmod", "dd")
MORE_APPLETS = (
    "true",
    "false",
    "echo",
    "head",
    "grep",
    "nc",
    "ping",
    "wget",
    "ip",
    "mount",
    "kill",
    "ps",
    "stat",
    "cp",
)


def busybox() -> Path | None:
    """The host's statically linked busybox (package busybox-static), or None."""
    return next((Path(p) for p in ("/bin/busybox", shutil.which("busybox") or "") if p and Path(p).exists()), None)


def tiny_tar(program: bytes) -> bytes:
    """A root file system of 2 MB: busybox, its applets, a passwd file, /workspace and a world-writable /opt/user."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:

        def add(
            name: str, *, kind: bytes = tarfile.DIRTYPE, mode: int = 0o755, data: bytes = b"", link: str = ""
        ) -> None:
            member = tarfile.TarInfo(name)
            member.type, member.mode, member.size, member.linkname = kind, mode, len(data), link
            archive.addfile(member, io.BytesIO(data))

        for folder in ("bin", "etc", "proc", "sys", "dev", "run", "root", "home", "workspace", "opt"):
            add(folder)
        for folder in ("tmp", "var", "var/tmp", "opt/user"):
            add(folder, mode=0o1777 if folder != "var" else 0o755)
        add("bin/busybox", kind=tarfile.REGTYPE, data=program)
        for applet in (*APPLETS, *MORE_APPLETS):
            add(f"bin/{applet}", kind=tarfile.SYMTYPE, link="busybox")
        passwd = b"root:x:0:0:root:/root:/bin/sh\nubuntu:x:1000:1000::/home/ubuntu:/bin/sh\n"
        add("etc/passwd", kind=tarfile.REGTYPE, mode=0o644, data=passwd)
        add("etc/group", kind=tarfile.REGTYPE, mode=0o644, data=b"root:x:0:\nvideo:x:44:\n")
        add("etc/os-release", kind=tarfile.SYMTYPE, link="../opt/release")
        add("opt/release", kind=tarfile.REGTYPE, mode=0o644, data=b"ID=tiny\n")
    return buffer.getvalue()


def ensure_tiny(engine: Engine) -> str | None:
    """Import `TINY_TAG` unless the engine has it; why that cannot be, or None."""
    if engine.image_facts(TINY_TAG) is not None:
        return None
    program = busybox()
    if program is None:
        return "no /bin/busybox (apt-get install busybox-static)"
    changes = ['CMD ["sleep", "600"]', "ENV PATH=/bin", "ENV TINY=yes", 'LABEL note="a, b"']
    engine.client.import_image_from_data(tiny_tar(program.read_bytes()), *TINY_TAG.split(":"), changes=changes)
    return None
