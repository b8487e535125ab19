"""The README's commands install the versions that the tests were run with."""

import re

from packaging.requirements import Requirement

from tests.runs import ROOT
from training.config import tomllib


def requirements(lines: list[str]) -> dict[str, Requirement]:
    parsed = [Requirement(line) for line in lines]
    return {requirement.name: requirement for requirement in parsed}


def pinned() -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    found = requirements([line for line in lines if line])
    versions = {name: re.fullmatch(r"==([\d.]+)", str(pin.specifier)) for name, pin in found.items()}
    return {name: version[1] for name, version in versions.items() if version}


def test_the_pinned_releases_are_within_the_limits() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    limits = requirements(project["dependencies"]) | requirements(project["optional-dependencies"]["test"])
    assert set(pinned()) == {"torch", "triton"} <= set(limits)
    for name, version in pinned().items():
        assert limits[name].specifier.contains(version)
        assert limits[name].specifier.contains("1000"), f"{name}: the range is open upwards"


def test_the_marked_commands_of_the_readme_take_them() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"<!-- (\w+) command -->\n```sh\n(.*?)\n```", readme, re.DOTALL)
    assert [name for name, _ in commands] == ["run", "test"]
    assert all(" -c constraints.txt " in command for _, command in commands)
