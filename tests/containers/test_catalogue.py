"""AIME's catalogue: what the tolerant grammar takes, what it warns of, and which image is the newest for a box."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds01spawner.containers import catalogue
from ds01spawner.containers.catalogue import Row, architecture_of, architecture_of_box, read_catalogue
from ds01spawner.errors import Code, Ds01Error

SMALL = """\
Pytorch, 2.9.1, [CUDA_BLACKWELL], aimehub/pytorch-2.9.1-cuda12.8.1
Pytorch, 2.8.0-aime, [CUDA_ADA], aimehub/pytorch-2.8.0-aime-cuda12.6.3
Pytorch, 2.8.0, [CUDA_ADA], aimehub/pytorch-2.8.0-cuda12.6.3
Pytorch, 2.7.1-aime, [CUDA_AMPERE], aimehub/pytorch-2.7.1-aime-cuda11.8.0
Tensorflow, 2.14.0, [CUDA_ADA;CUDA_AMPERE], aimehub/tensorflow-2.14.0-cuda11.8.0
Tensorflow, 2.11.0, [CUDA_AMPERE], aimehub/tensorflow-2.11.0-cuda11.8.0
Tensorflow, 1.15.4-nvidia, [CUDA_AMPERE], aimehub/tensorflow-1.15.4-nvidia
Tensorflow, 1.15.4-nvidia, [CUDA_AMPERE], aimehub/tensorflow-1.15.4-nvidia-20.12
Pytorch, 2.6.0, [ROCM6], aimehub/pytorch-2.6.0-rocm6.1
ROCM, 5.4.2, [ROCM5], rocm/dev-ubuntu-20.04:5.4.2-complete
"""


def one(line: str) -> Row | str:
    """The row of a line, or the message why there is none."""
    read = read_catalogue(line)
    return read.rows[0] if read.rows else read.problems[0].message


@pytest.mark.parametrize(
    ("line", "architectures"),
    [
        ("F, 1, [CUDA_ADA], x/y", ("CUDA_ADA",)),
        ("F, 1, CUDA_ADA, x/y", ("CUDA_ADA",)),
        ("F, 1, [CUDA; CUDA_ADA], x/y", ("CUDA", "CUDA_ADA")),
        ("F, 1, [CUDA,CUDA_ADA], x/y", ("CUDA", "CUDA_ADA")),
        ('F, 1, "[CUDA,CUDA_ADA]", x/y', ("CUDA", "CUDA_ADA")),
        ('"F","1","[CUDA]","x/y"', ("CUDA",)),
        ('"F", "1", "[CUDA]", "x/y"', ("CUDA",)),
        ("F, 1, [CUDA], x/y, reserved, more", ("CUDA",)),
        ("F\t,\t1 ,\t[CUDA]\t, x/y\t", ("CUDA",)),
        ("\ufeffF, 1, [CUDA], x/y", ("CUDA",)),
        ("F, 1, [CUDA], x/y # a note, with a comma", ("CUDA",)),
        ("F, 1, [CUDA;;], x/y", ("CUDA",)),
    ],
)
def test_tolerated_forms(line: str, architectures: tuple[str, ...]) -> None:
    assert one(line) == Row("F", "1", architectures, "x/y", 1)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("F, 1, [CUDA]", "four fields"),
        ("F", "four fields"),
        ("F, , [CUDA], x", "four fields"),
        ("F, 1, [], x", "no architecture"),
        ("F, 1, [ ; ], x", "no architecture"),
        ("F, 1, [CUDA], x y", "no image reference"),
        ("F, 1, [CUDA], -x", "no image reference"),
        ('F, 1, [CUDA], "x', "cannot be read"),
    ],
)
def test_unusable_rows_are_left_out_with_their_line(line: str, reason: str) -> None:
    read = read_catalogue(f"A, 1, [CUDA], a\n\n{line}\nB, 1, [CUDA], b\n", "/opt/aime/ml_images.repo")
    assert [row.framework for row in read.rows] == ["A", "B"]
    (problem,) = read.problems
    assert reason in problem.message
    assert str(problem).startswith("/opt/aime/ml_images.repo:3: warning:")


@pytest.mark.parametrize("text", ["", "\n \n\t\n", "# only\n  # comments, with, three, commas\n", "\r\n\r\n", "\ufeff"])
def test_nothing_is_no_row_and_no_problem(text: str) -> None:
    assert read_catalogue(text) == catalogue.Catalogue()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_and_numbers(end: str) -> None:
    read = read_catalogue(end.join(["# head", "F, 1, [CUDA], x", "", "F, 2, [CUDA], y"]))
    assert [(row.version, row.line) for row in read.rows] == [("1", 2), ("2", 4)]


def test_the_first_of_two_equal_rows_is_used() -> None:
    read = read_catalogue(SMALL)
    row = read.newest("Tensorflow", "1.15.4-nvidia", "CUDA_AMPERE")
    assert row is not None and row.image == "aimehub/tensorflow-1.15.4-nvidia"
    (problem,) = read.problems
    assert problem.line == 8 and "line 7" in problem.message and problem.warning


@pytest.mark.parametrize(
    ("framework", "version", "architecture", "expected"),
    [
        ("Pytorch", None, "CUDA_BLACKWELL", "2.9.1"),
        ("pytorch", None, "CUDA_ADA", "2.8.0-aime"),
        ("Pytorch", "2.8.0", "CUDA_ADA", "2.8.0"),
        ("Pytorch", "2.8", "CUDA_ADA", "2.8.0-aime"),
        ("Pytorch", "2", "CUDA_AMPERE", "2.7.1-aime"),
        ("Pytorch", "2.80", "CUDA_ADA", None),
        ("Pytorch", None, None, "2.9.1"),
        ("Pytorch", None, "ROCM6", "2.6.0"),
        ("Tensorflow", None, "CUDA_AMPERE", "2.14.0"),
        ("Tensorflow", None, "CUDA_BLACKWELL", None),
        ("Nothing", None, "CUDA_ADA", None),
    ],
)
def test_newest_per_framework_and_architecture(
    framework: str, version: str | None, architecture: str | None, expected: str | None
) -> None:
    row = read_catalogue(SMALL).newest(framework, version, architecture)
    assert (row.version if row else None) == expected


def test_row_of_an_image() -> None:
    read = read_catalogue(SMALL)
    row = read.row_of("rocm/dev-ubuntu-20.04:5.4.2-complete")
    assert row is not None and row.label == "ROCM-5.4.2"
    assert read.row_of("other") is None
    assert read.frameworks == ("Pytorch", "Tensorflow", "ROCM")


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [
        ((12, 0), "CUDA_BLACKWELL"),
        ((10, 0), "CUDA_BLACKWELL"),
        ((9, 0), "CUDA_ADA"),
        ((8, 9), "CUDA_ADA"),
        ((8, 7), "CUDA_AMPERE"),
        ((8, 6), "CUDA_AMPERE"),
        ((8, 0), "CUDA_AMPERE"),
        ((7, 5), "CUDA"),
        ((6, 1), "CUDA"),
        (None, None),
    ],
)
def test_architecture_by_compute_capability(capability: tuple[int, int] | None, architecture: str | None) -> None:
    assert architecture_of(capability) == architecture


def test_a_mixed_box_takes_the_images_of_its_newest_gpu() -> None:
    assert architecture_of_box([(8, 0), None, (9, 0), (7, 5)]) == "CUDA_ADA"
    assert architecture_of_box([None]) is None
    assert architecture_of_box([]) is None


def test_a_missing_file_is_told_with_the_setting(tmp_path: Path) -> None:
    assert catalogue.open_catalogue(None).rows == ()
    with pytest.raises(Ds01Error, match="setting") as error:
        catalogue.open_catalogue(tmp_path / "none.repo")
    assert error.value.code is Code.SETTINGS_INVALID
    (tmp_path / "ml.repo").write_bytes(SMALL.encode() + b"\xff\xfe, 1, [CUDA], x\n")
    assert len(catalogue.open_catalogue(tmp_path / "ml.repo").rows) == 11
    (tmp_path / "big.repo").write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(Ds01Error, match="bytes"):
        catalogue.open_catalogue(tmp_path / "big.repo")


@given(st.text(max_size=300))
def test_no_text_breaks_the_reader(text: str) -> None:
    read = read_catalogue(text)
    assert all(row.framework and row.version and row.architectures and row.image for row in read.rows)
    assert all(problem.warning and problem.line for problem in read.problems)


def test_the_real_file_if_it_is_there() -> None:
    """With DS01_TEST_CATALOGUE=path of AIME's file: all rows are read, and the newest are the ones in its README."""
    path = os.environ.get("DS01_TEST_CATALOGUE")
    if not path:
        return
    read = catalogue.open_catalogue(Path(path))
    assert len(read.rows) == 117 and len(read.problems) == 1
    newest = {arch: read.newest("Pytorch", architecture=arch) for arch in catalogue.ARCHITECTURES}
    versions = [row.version if row else None for row in newest.values()]
    assert versions == ["2.9.1", "2.8.0-aime", "2.7.1-aime", "1.7.0"]
