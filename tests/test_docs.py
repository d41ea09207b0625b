"""The documents tell the truth: every code, setting and command is documented, and what they name exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from ds01spawner.cli.admin import main
from ds01spawner.errors import Code, Ds01Error
from ds01spawner.form.request import SpawnRequest
from ds01spawner.reconcile.findings import What
from ds01spawner.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "images").rglob("*.md"))
}
BY_HAND = "\n".join(text for name, text in TEXTS.items() if name != "docs/configuration.md")
DEFINED_TESTS = {
    name
    for path in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^\s*(?:async )?def (test_\w+)", path.read_text(), re.MULTILINE)
}
MODULES = sorted(path.relative_to(ROOT / "ds01spawner").as_posix() for path in (ROOT / "ds01spawner").rglob("*.py"))


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """Every command below `command` that does something, by its full name."""
    if not isinstance(command, click.Group):
        yield name, command
        return
    context = click.Context(command)
    for part in command.list_commands(context):
        found = command.get_command(context, part)
        assert found is not None, f"{name} {part} cannot be loaded"
        yield from commands(found, f"{name} {part}")


COMMANDS = dict(commands(main, "ds01-admin"))


# --------------------------------------------------------------------------- complete


@pytest.mark.parametrize("code", Code)
def test_docs_tell_what_to_do_for_every_code(code: Code) -> None:
    error = Ds01Error("x", code=code)
    row = re.search(rf"^\| `{code.value}` \| (\d+) \| (\d+) \|", TEXTS["docs/troubleshooting.md"], re.MULTILINE)
    assert row is not None, f"docs/troubleshooting.md has no row for the code {code.value}"
    assert (int(row[1]), int(row[2])) == (error.http_status, error.exit_code)


@pytest.mark.parametrize("what", What)
def test_docs_explain_every_finding_of_the_watcher(what: What) -> None:
    assert re.search(rf"^\| `{what.value}` \|", TEXTS["docs/troubleshooting.md"], re.MULTILINE), what.value


@pytest.mark.parametrize("name", Settings.model_fields)
def test_docs_explain_every_setting(name: str) -> None:
    row = re.search(rf"^\| `{name}` \| (.*?) \|", TEXTS["docs/admin.md"], re.MULTILINE)
    assert row is not None, f"docs/admin.md has no row for the setting {name}"
    shown = row[1].strip("`")
    default = Settings.model_fields[name].get_default()
    wanted = {None: "none", "": "none", True: "on", False: "off"}.get(default, str(default))
    assert shown == wanted, f"docs/admin.md says that {name} is {shown} by default; it is {wanted}"


@pytest.mark.parametrize("name", SpawnRequest.model_fields)
def test_docs_explain_every_field_of_a_request(name: str) -> None:
    assert re.search(rf"^\| `{name}` \|", TEXTS["docs/user.md"], re.MULTILINE), f"docs/user.md has no row for {name}"


@pytest.mark.parametrize("name", COMMANDS)
def test_docs_show_every_command_with_every_option(name: str) -> None:
    assert name in BY_HAND, f"no document shows `{name}`"
    for parameter in COMMANDS[name].params:
        for option in parameter.opts if isinstance(parameter, click.Option) else ():
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", BY_HAND), f"{option} of `{name}`"


@pytest.mark.parametrize("module", [name for name in MODULES if not name.endswith("__init__.py")])
def test_docs_name_every_module_in_its_room(module: str) -> None:
    *room, file = module.split("/")
    text = TEXTS["docs/architecture.md"]
    where = text if not room else _section(text, f"{room[0]}/")
    found = re.search(rf"(?<![\w/]){re.escape(file)}(?!\w)", where)
    assert found, f"docs/architecture.md does not say what {module} is"


def _section(text: str, room: str) -> str:
    """The lines of the tree that belong to a room: its own and those that are indented further."""
    lines = text.splitlines()
    start = next((n for n, line in enumerate(lines) if line.lstrip().startswith(room)), None)
    assert start is not None, f"docs/architecture.md has no room {room}"
    indent = len(lines[start]) - len(lines[start].lstrip())
    found = [lines[start]]
    for line in lines[start + 1 :]:
        if len(line) - len(line.lstrip()) <= indent:
            break
        found.append(line)
    return "\n".join(found)


# --------------------------------------------------------------------------- true


@pytest.mark.parametrize("name", TEXTS)
def test_docs_name_only_tests_that_exist(name: str) -> None:
    files = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    named = set(re.findall(r"\btest_\w+", TEXTS[name]))
    assert not (unknown := named - DEFINED_TESTS - files), f"{name} names tests that do not exist: {sorted(unknown)}"


@pytest.mark.parametrize("name", TEXTS)
def test_docs_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        file, _, anchor = target.partition("#")
        if "://" in target:
            continue
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), f"{name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            assert anchor in {_anchor(heading) for heading in headings}, f"{name} links to {target}"


def _anchor(heading: str) -> str:
    """The anchor that a heading gets on the usual forges."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", TEXTS)
def test_docs_name_only_commands_and_options_that_exist(name: str) -> None:
    shown = re.findall(r"ds01-admin(?: [^`\n|]*)?", TEXTS[name])
    for line in shown:
        words = [word for word in line.split()[1:] if re.fullmatch(r"[a-z][a-z-]*|--[a-z-]+", word)]
        if not words or words[0].startswith("--"):
            continue
        known = [full for full in COMMANDS if full.split()[1] == words[0]]
        assert known, f"{name}: there is no command {line!r}"
        options = {option for full in known for parameter in COMMANDS[full].params for option in parameter.opts}
        unknown = [word for word in words if word.startswith("--") and word not in options | {"--help", "--version"}]
        assert not unknown, f"{name}: {line!r} has no {unknown}"


# --------------------------------------------------------------------------- the README's examples


def examples() -> list[tuple[str, str]]:
    """(command, output as printed in README.md) of every `ds01-admin` example."""
    found: list[tuple[str, str]] = []
    for block in re.findall(r"```console\n(.*?)```", TEXTS["README.md"], re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            if command.startswith("ds01-admin "):
                found.append((command, output.rstrip("\n")))
    return found


@pytest.mark.parametrize(("command", "printed"), examples())
def test_docs_examples_print_what_the_readme_says(
    command: str, printed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("ds01spawner.cli.installation.DEFAULT_STATE_DIR", tmp_path)  # nothing is installed here
    monkeypatch.delenv("DS01_SETTINGS", raising=False)
    result = CliRunner().invoke(main, shlex.split(command)[1:])
    output = "\n".join(line.rstrip() for line in result.output.splitlines())
    pattern = "".join(_pattern(line) for line in printed.splitlines())
    assert re.fullmatch(pattern, output + "\n"), f"{command} prints\n{output}"


def _pattern(line: str) -> str:
    """A regular expression for one printed line; `…` stands for any lines, what differs between runs for its kind."""
    if line == "…":
        return r"(?:.*\n)*?"
    text = re.escape(line.rstrip())
    text = re.sub(r"(GPU|MIG)\\-[0-9a-f]{8}(\\-[0-9a-f]{4}){3}\\-[0-9a-f]{12}", r"\1-[0-9a-f-]{36}", text)
    text = re.sub(r"; [0-9a-f]{12}\\\)", r"; [0-9a-f]{12}\\)", text.replace("\\ ", " "))
    text = re.sub(r"\d{4}\\-\d\d\\-\d\d \d\d:\d\d", r"\\d{4}-\\d\\d-\\d\\d \\d\\d:\\d\\d", text)
    return text + "\n"
