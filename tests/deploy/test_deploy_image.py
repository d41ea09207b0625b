"""The image that everything starts: what a numeric user without rights finds in it, and what was left out of it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import docker
import pytest

from deploy.image import CONTEXT, PASSED_ON, ImageFailed, Recipe, _build, prepared

pytestmark = pytest.mark.docker

UID = 71_234


@pytest.fixture(scope="module")
def client() -> Iterator[docker.APIClient]:
    connection = docker.APIClient(timeout=120)
    yield connection
    connection.close()


@pytest.fixture(scope="module")
def run(client: docker.APIClient, demo_image: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """`run(script)`: what bash prints in the image as a user that the image does not know, as a server runs."""
    home = tmp_path_factory.mktemp("home")
    home.chmod(0o777)

    def inside(script: str) -> str:
        config = client.create_host_config(
            binds={str(home): {"bind": "/home/someone", "mode": "rw"}},
            cap_drop=["ALL"],
            security_opt=["no-new-privileges"],
            network_mode="none",
        )
        made = client.create_container(
            demo_image,
            ["bash", "-c", script],
            user=f"{UID}:{UID}",
            environment={"HOME": "/home/someone", "PYTHONUSERBASE": "/home/someone/.local/image"},
            host_config=config,
        )
        try:
            client.start(made["Id"])
            client.wait(made["Id"], timeout=60)
            return str(client.logs(made["Id"]).decode())
        finally:
            client.remove_container(made["Id"], force=True)

    return inside


def test_image_configuration(client: docker.APIClient, demo_image: str) -> None:
    config = client.inspect_image(demo_image)["Config"]
    assert config["Entrypoint"] in (None, [])
    assert config["Cmd"] == ["/opt/jupyter/bin/jupyterhub-singleuser"]
    assert config["WorkingDir"] == "/workspace"
    path = next(value for value in config["Env"] if value.startswith("PATH="))
    assert path.endswith(":/opt/jupyter/bin")
    assert [value for value in (config["Labels"] or {}).values() if "," in value] == []


def test_image_keeps_nothing_of_the_building_machine(client: docker.APIClient, demo_image: str) -> None:
    told = json.dumps([client.inspect_image(demo_image)["Config"], client.history(demo_image)]).lower()
    assert [name for name in PASSED_ON if name.lower() + "=" in told] == []


def test_image_python_is_the_frameworks(run: Callable[[str], str]) -> None:
    printed = run("python -c 'import sys; print(sys.prefix)'; command -v pip; framework-python")
    prefix, pip, framework = printed.split()
    assert prefix == "/usr"
    assert "/opt/jupyter" not in pip + framework


def test_image_kernel_is_the_frameworks_python(run: Callable[[str], str]) -> None:
    code = (
        "from jupyter_client.kernelspec import KernelSpecManager as K; m = K(); "
        "print(list(m.find_kernel_specs())); print(m.get_kernel_spec('python3').argv[0])"
    )
    kernels, interpreter = run(f'/opt/jupyter/bin/python -c "{code}"; framework-python').splitlines()[:2]
    assert kernels == "['python3']"
    assert interpreter == run("framework-python").strip()
    assert "IPython" in run(f"{interpreter} -m ipykernel_launcher --help")


def test_image_single_user_server_needs_no_rights(run: Callable[[str], str]) -> None:
    assert run("jupyterhub-singleuser --version").strip().count(".") == 2
    assert "71234" in run("id -u; find /opt/jupyter ! -perm -o+r ! -type l | head -3")


def test_image_byte_code_is_complete_and_never_checked(run: Callable[[str], str]) -> None:
    script = (
        "import importlib.util as u, pathlib, jupyterhub; source = jupyterhub.__file__; "
        "print(int.from_bytes(pathlib.Path(u.cache_from_source(source)).read_bytes()[4:8], 'little'))"
    )
    assert run(f'/opt/jupyter/bin/python -c "{script}"').strip() == "1"  # PEP 552: hash-based, unchecked


def test_image_login_shell_keeps_the_path(run: Callable[[str], str]) -> None:
    for shell in ("bash -l", "bash -i"):
        path = run(f"{shell} -c 'echo $PATH' 2>/dev/null").strip()
        assert path.startswith("/home/someone/.local/image/bin:") and path.endswith(":/opt/jupyter/bin"), shell


def test_image_pip_install_goes_to_the_users_own_folder(run: Callable[[str], str]) -> None:
    script = (
        "mkdir -p ~/p/nice && cd ~/p && touch nice/__init__.py && printf "
        '\'[project]\\nname="nice"\\nversion="1"\\n[tool.setuptools]\\npackages=["nice"]\\n\' > pyproject.toml && '
        "pip install -q --no-index --no-build-isolation . 2>&1 | grep -v -i 'defaulting to user' ; "
        "cd / && python -c 'import nice; print(nice.__file__)'"
    )
    assert run(script).strip().splitlines()[-1].startswith("/home/someone/.local/image/lib/")


def test_image_sudo_says_what_to_do_instead(run: Callable[[str], str]) -> None:
    printed = run("sudo apt install cowsay 2>&1; echo status $?")
    assert "pip install" in printed and "ask the people who run this server" in printed
    assert printed.strip().endswith("status 1")


# ------------------------------------------------------------------------------------------------ building


OLD_PYTHON = """\
#!/bin/sh
case "$2" in
    *"(3, 10)"*) exit 1 ;;
    *print*) echo 3.8 ;;
esac
"""


def test_image_refuses_a_base_with_python_3_8(client: docker.APIClient, demo_image: str, tmp_path: Path) -> None:
    """A base like Ubuntu 20.04 ends the build at its first step, with a sentence."""
    old, reference = tmp_path / "old", "dstest-deploy-old:1"
    old.mkdir()
    (old / "python").write_text(OLD_PYTHON)
    (old / "python").chmod(0o755)
    (old / "Dockerfile").write_text(f"FROM {demo_image}\nUSER root\nCOPY python /usr/local/sbin/python\n")
    list(client.build(path=str(old), tag=reference, rm=True, decode=True))
    try:
        with prepared(target="framework", hub="6.1") as recipe, pytest.raises(ImageFailed) as failed:
            _build(client, recipe, reference)
    finally:
        client.remove_image(reference, force=True)
    assert "its Python is 3.8" in str(failed.value) and "3.10 or newer" in str(failed.value)


def test_image_recipe_changes_with_what_matters(tmp_path: Path) -> None:
    def digest(**given: str) -> str:
        with prepared(**({"target": "jupyter", "hub": "6.1"} | given)) as recipe:
            assert isinstance(recipe, Recipe) and (recipe.context / "Dockerfile").exists()
            return recipe.digest

    assert digest() == digest()
    assert len({digest(), digest(hub="5.5"), digest(target="full")}) == 3


def test_image_context_of_the_checkout_is_not_written_to() -> None:
    before = sorted(CONTEXT.rglob("*"))
    with prepared(target="jupyter", hub="6.1"), contextlib.suppress(OSError):
        assert sorted(CONTEXT.rglob("*")) == before
