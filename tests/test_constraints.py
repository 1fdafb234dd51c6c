"""constraints.txt pins each package that an installation brings, and nothing that it does not."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
NOT_HERE = {"atheris"}
"""Pinned for `make fuzz`, which installs it."""


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): at for name, at in pins}


def wanted() -> list[str]:
    """What `make` installs: the package with its optional parts, and the tools of its developers."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    optional = [one for extra in project["project"]["optional-dependencies"].values() for one in extra]
    return [*project["project"]["dependencies"], *optional, *project["dependency-groups"]["dev"]]


def needed(requirements: Iterable[str], extra: str = "") -> Iterator[Requirement]:
    for one in map(Requirement, requirements):
        if one.marker is None or one.marker.evaluate({"extra": extra}):
            yield one


def installed() -> dict[str, str]:
    """Name and version of all that those bring along."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    left = list(needed(wanted()))
    while left:
        one = left.pop()
        name = canonicalize_name(one.name)
        for extra in ("", *one.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                found[name] = version(name)
                left += needed(requires(name) or [], extra)
    return found


def test_every_package_that_comes_along_is_pinned_at_the_version_that_is_tested() -> None:
    pins = pinned()
    there = installed()
    assert {name: at for name, at in there.items() if pins.get(name) != at} == {}


def test_nothing_is_pinned_that_does_not_come_along() -> None:
    assert set(pinned()) - set(installed()) - NOT_HERE == set()


def test_what_is_pinned_for_a_tool_of_its_own_has_that_name() -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    assert {canonicalize_name(Requirement(one).name) for one in groups["fuzz"]} == NOT_HERE
