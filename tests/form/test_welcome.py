"""The notebook for an empty workspace."""

from __future__ import annotations

import ast
import contextlib
import io
import json

from form_scene import GIB, box, units

from ds01spawner.welcome import welcome_notebook


def cells(notebook: bytes, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(notebook)["cells"] if cell["cell_type"] == kind]


def test_the_notebook_has_the_shape_that_jupyter_reads() -> None:
    notebook = json.loads(welcome_notebook("ada"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in notebook["cells"]]
    assert len(names) == len(set(names))
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        assert (cell["cell_type"] == "code") == ("outputs" in cell and "execution_count" in cell)


def test_it_tells_what_the_server_has() -> None:
    inventory = box()
    chosen = [*units(inventory, "1g.5gb")[:1], *units(inventory, None)]
    text = cells(welcome_notebook("ada", chosen, server="lab", cpus=4, memory=16 * GIB), "markdown")[0]
    assert "a 5 GB slice of one A100-40GB and one whole A100-40GB with 40 GB" in text
    assert "4 cores" in text
    assert "16 GB" in text
    assert "**lab**" in text
    assert "no GPU" in cells(welcome_notebook("ada"), "markdown")[0]


def test_it_tells_about_files_packages_and_stopping() -> None:
    text = "\n".join(cells(welcome_notebook("ada"), "markdown"))
    for word in ("/workspace", "/data", "/models", "home folder", "pip install NAME", "Stop My Server"):
        assert word in text


def test_names_are_no_markup() -> None:
    text = cells(welcome_notebook("<script>*a*\n# x"), "markdown")[0]
    assert "<script" not in text.replace("\\<script", "")
    assert "\n# x" not in text


def test_the_cells_run_where_there_is_no_gpu() -> None:
    for code in cells(welcome_notebook("ada"), "code"):
        ast.parse(code)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, "cell", "exec"), {})
        assert out.getvalue().strip()
