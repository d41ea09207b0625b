"""The notebook that an empty workspace starts with: is the GPU there, where do files live, how to stop. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence

from .form.words import size_text, unit_words
from .model import Unit

_LOOK = """\
import shutil, subprocess

if shutil.which("nvidia-smi"):
    print(subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout or "nvidia-smi sees no GPU")
else:
    print("no nvidia-smi in this container: it has no GPU, or a simulated one")"""

_TRY = """\
try:
    import torch
except ImportError:
    print("PyTorch is not installed in this image; that is fine if you work with something else.")
else:
    if torch.cuda.is_available():
        x = torch.rand(2000, 2000, device="cuda")
        free, total = torch.cuda.mem_get_info()
        print(torch.cuda.get_device_name(0), f"{total / 2**30:.1f} GB", "- product:", float((x @ x).sum()))
    else:
        print("PyTorch runs on the CPU here: this server has no GPU.")"""


def welcome_notebook(
    account: str,
    units: Sequence[Unit] = (),
    *,
    server: str | None = None,
    cpus: float | None = None,
    memory: int | None = None,
) -> bytes:
    """`welcome.ipynb` (nbformat 4.5, UTF-8 JSON) for a new workspace.

    Args:
        account: the user's name in the container. units: what this first server got.
        server: its name for people. cpus, memory: its limits in cores and bytes. None = not told.
    """
    cells = [
        _markdown("hello", _hello(account, units, server, cpus, memory)),
        _markdown("gpu", "## Is the GPU there?\nRun the two cells below with Shift + Enter."),
        _code("gpu-list", _LOOK),
        _code("gpu-try", _TRY),
        _markdown("files", _files()),
        _markdown("packages", _packages()),
        _markdown("stop", _stop()),
    ]
    notebook = {
        "cells": cells,
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return (json.dumps(notebook, indent=1, ensure_ascii=False) + "\n").encode()


def _hello(account: str, units: Sequence[Unit], server: str | None, cpus: float | None, memory: int | None) -> str:
    gpu = " and ".join(unit_words(unit) for unit in units) or "no GPU"
    rows = [f"- GPU: {gpu}"]
    if cpus is not None:
        rows.append(f"- CPU: {cpus:g} cores")
    if memory is not None:
        rows.append(f"- Memory: {size_text(memory)}. A program that takes more is ended.")
    what = f"your server **{_plain(server)}**" if server else "your server"
    return "\n".join([f"# Welcome, {_plain(account)}", f"This is {what}. It has:", "", *rows])


def _files() -> str:
    return """\
## Where your files live
| folder | what it is |
|---|---|
| `/workspace` | your work. It stays when the server stops, and all your servers see it. |
| your home folder (`~`) | settings, caches, SSH keys. It stays too. |
| `/data`, `/models` | shared by everybody, where your admin has set them up; usually read-only. |
| everything else | belongs to this container. It is kept while the container is, but do not count on it. |"""


def _packages() -> str:
    return """\
## Installing packages
`pip install NAME` survives: it goes to your home folder, apart for every image, so that one image never breaks
another. In a notebook write `%pip install NAME` and restart the kernel."""


def _stop() -> str:
    return """\
## Stopping
Closing the browser does **not** stop the server: it goes on and keeps its GPU from others. When you are done:
*File → Hub Control Panel → Stop My Server*. Your files stay, and the next start brings you back here.

You may delete this notebook; it is written only once, into an empty workspace."""


def _plain(text: str) -> str:
    """`text` without what Markdown would read as markup."""
    return "".join(f"\\{char}" if char in r"\`*_{}[]<>()#+-!|" else char for char in text if char.isprintable())


def _markdown(name: str, text: str) -> dict[str, object]:
    return {"cell_type": "markdown", "id": name, "metadata": {}, "source": text.splitlines(keepends=True)}


def _code(name: str, text: str) -> dict[str, object]:
    return {
        "cell_type": "code",
        "id": name,
        "metadata": {},
        "execution_count": None,
        "outputs": [],
        "source": text.splitlines(keepends=True),
    }
