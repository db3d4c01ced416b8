"""What is shipped and what is promised of it: README, CI, pins and package data agree with each other."""

from __future__ import annotations

import pkgutil
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DATA = ("*.yaml", "*.cu", "*.html", "*.css", "*.js")
ROOMS = ("cluster", "strategies", "orchestrator", "launch")


def command(heading: str) -> str:
    """The only fenced block of the README's only section with this heading."""
    sections = re.split(r"^## ", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    (section,) = (s for s in sections if s.startswith(f"{heading}\n"))
    (block,) = re.findall(r"^```bash\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    assert section.count("```") == 2
    return block.removesuffix("\n")


@pytest.mark.parametrize("heading", ["Run it", "Test it"])
def test_a_readme_command_is_one_line_in_an_environment_of_its_own(heading: str) -> None:
    steps = command(heading).split(" && ")
    assert "\n" not in command(heading)
    assert steps[0] == "python3 launch/environment.py .venv"
    assert all(step.startswith(".venv/bin/") for step in steps[1:])


def test_ci_runs_the_readmes_command_last_and_verbatim() -> None:
    script = ROOT / ".ci" / "run"
    assert script.read_text().splitlines()[-1] == command("Test it")
    assert script.stat().st_mode & 0o111


def test_the_readme_runs_what_it_names() -> None:
    commands = re.findall(r"^\| `shardwise (\w+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert sorted(commands) == sorted(pkgutil.resolve_name("launch.__main__:COMMANDS"))


def test_every_path_that_the_readme_names_is_there() -> None:
    text = (ROOT / "README.md").read_text().partition("## Reading the code")[2]
    for line in text.splitlines():
        folder = ROOT
        for name in re.findall(r"`([\w./]+(?:\.py|\.md|/))`", line):
            named = ROOT / name if (ROOT / name).exists() else folder / name
            assert named.exists(), name
            folder = named if named.is_dir() else named.parent


def test_all_that_is_declared_is_pinned() -> None:
    project = PROJECT["project"]
    declared = [
        *project["dependencies"],
        *(d for extra in project["optional-dependencies"].values() for d in extra),
    ]
    pins = re.findall(r"^([\w-]+)==[\w.]+$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    names = {re.match(r"[\w-]+", requirement)[0].lower() for requirement in declared}  # type: ignore[index]
    assert names <= {pin.lower() for pin in pins}


def test_the_console_script_is_there() -> None:
    (script,) = PROJECT["project"]["scripts"].items()
    assert script[0] == PROJECT["project"]["name"] == "shardwise"
    assert callable(pkgutil.resolve_name(script[1]))


def test_data_beside_the_code_is_packaged() -> None:
    globs = PROJECT["tool"]["setuptools"]["package-data"]
    packaged = {path for room, patterns in globs.items() for p in patterns for path in (ROOT / room).glob(p)}
    data = {path for room in ROOMS for kind in DATA for path in (ROOT / room).rglob(kind)}
    assert packaged == data


def test_every_folder_of_code_is_a_package() -> None:
    folders = {path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert [f for f in folders if not (f / "__init__.py").exists()] == []


def test_the_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert versions[0] == PROJECT["project"]["version"]
